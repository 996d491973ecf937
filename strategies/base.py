"""What all strategies share: they extend `tf.distribute.MirroredStrategy`; the engine does the work."""

import contextlib
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import tensorflow as tf

from tfpar.comm.devices import each_gpu_is_one_device
from tfpar.compat import _keras, _keras_calls
from tfpar.compat._keras_run import as_in_this_thread
from tfpar.compat._tf import (
    outside_replica,
)
from tfpar.engine.micro_batch import Parts
from tfpar.errors import ModelError, ScheduleError, ScopeError, user_level
from tfpar.planning.mesh import Mesh
from tfpar.planning.plan import Plan
from tfpar.planning.schedule import SCHEDULES, Schedule
from tfpar.trainer.convert import convert
from tfpar.trainer.explain import explained
from tfpar.trainer.hooks import KerasHooks, hooks_of
from tfpar.trainer.input_feed import Feed, can_be_fed
from tfpar.trainer.placement import place_before_loading
from tfpar.variables.distribute import Extended

MirroredStrategy = tf.distribute.MirroredStrategy
SEGMENTS = (1, 1, 8, 8)  # for each kind of ZeRO, into how many a model is cut if it is not said
Placement = str | Sequence[str] | Mapping[str, int]


class Strategy(MirroredStrategy):
    """The base class of tfpar's strategies; make a `MeshStrategy` or one of the others.

    Args:
        mesh: with the name of a device for each coordinate.
        micro_batches, schedule, placement, batch_norm, buckets, cross_device_ops, layout, sequence_parallel, zero,
            offload, collectives, reduce_dtype: as for `MeshStrategy`.

    Raises:
        IndexError: a mesh that names no devices.
        ScheduleError: `micro_batches` is no whole number of at least 1, or `schedule` is not known.
        ModelError: an unknown `batch_norm`, `zero`, `offload`, `collectives` or `reduce_dtype`, or `buckets` that is no
            whole number of at least 1.
    """

    def __init__(
        self,
        mesh: Mesh,
        micro_batches: int = 1,
        schedule: str | Callable[[int, int], Schedule] = "1f1b",
        placement: Placement = "auto",
        batch_norm: str = "global",
        buckets: int | None = None,
        cross_device_ops: tf.distribute.CrossDeviceOps | None = None,
        layout: Any = "auto",
        sequence_parallel: bool = False,
        zero: int = 0,
        offload: str | None = None,
        collectives: str = "auto",
        reduce_dtype: str | None = None,
    ):
        if not isinstance(micro_batches, int) or micro_batches < 1:
            raise ScheduleError(f"micro_batches is a whole number of at least 1; received {micro_batches!r}")
        if not callable(schedule) and schedule not in SCHEDULES:
            raise ScheduleError(
                f"the schedules are {', '.join(map(repr, SCHEDULES))} or a function (devices, micro_batches) -> "
                f"Schedule; received {schedule!r}"
            )
        replicas = mesh.count("samples")
        self.mesh, self.parts, self.placement = mesh, Parts(replicas, micro_batches), placement
        if batch_norm not in ("global", "local"):
            raise ModelError(f'batch_norm is "global" or "local"; received {batch_norm!r}')
        if replicas > 1 and cross_device_ops is None and mesh.on_gpus and each_gpu_is_one_device():
            cross_device_ops = tf.distribute.NcclAllReduce()
        if zero not in (0, 1, 2, 3):
            raise ModelError(f"zero is 0, 1, 2 or 3; received {zero!r}")
        if mesh.shard > 1 and not zero and not offload:
            raise ModelError(f"{mesh} divides by `shard` what ZeRO divides: give zero=1, 2 or 3, or more of `data`")
        if offload not in (None, "optimizer"):
            raise ModelError(f'offload is None or "optimizer"; received {offload!r}')
        if collectives not in ("auto", "inside", "between"):
            raise ModelError(f'collectives is "auto", "inside" or "between"; received {collectives!r}')
        if reduce_dtype not in (None, "bfloat16", "float16", "float32"):
            raise ModelError(f'reduce_dtype is None, "bfloat16", "float16" or "float32"; received {reduce_dtype!r}')
        if buckets is not None and (not isinstance(buckets, int) or buckets < 1):
            raise ModelError(f"buckets is a whole number of at least 1; received {buckets!r}")
        if zero and replicas == 1:
            warnings.warn(
                f"zero={zero} divides between replicas, and {mesh} has one: nothing is divided", stacklevel=user_level()
            )
        self.zero, self.offload = (max(zero, 1) if offload else zero) if replicas > 1 else 0, offload
        self.batch_norm, self.cross_device_ops, self.collectives = batch_norm, cross_device_ops, collectives
        self.reduce_dtype = reduce_dtype
        self.buckets = buckets or SEGMENTS[zero if replicas > 1 else 0]
        self.layout, self.sequence_parallel = layout, sequence_parallel
        self._schedule = schedule if callable(schedule) else SCHEDULES[schedule]
        self._not_loaded: list[weakref.ref[KerasHooks]] = []
        extended = Extended(self, mesh, cross_device_ops, replicas == mesh.size and not self.zero and not offload)
        super(MirroredStrategy, self).__init__(extended)
        extended.before_loading = self._before_loading

    @property
    def micro_batches(self) -> int:
        """How many micro-batches a replica makes of its part of a batch; one for each sample, if it has fewer."""
        return self.parts.micro_batches

    @contextlib.contextmanager
    def scope(self) -> Iterator["Strategy"]:
        """Models and variables created inside belong to this strategy.

        Raises:
            ScopeError: in the scope of another strategy; and from `compile` and `fit` inside, for a model of another
                strategy or of none.
        """
        around = tf.distribute.get_strategy()
        if tf.distribute.has_strategy() and around.extended is not self.extended:
            raise ScopeError(
                f"this is the scope of a {type(around).__name__}, in which there can be no scope of a "
                f"{type(self).__name__}: a model has one strategy. Leave the one before entering the other; to divide "
                "batches, layers and weights at once use one MeshStrategy(Mesh(data=2, stage=2, tensor=2))"
            )
        with _keras_calls.ADOPTION.inside(), super().scope():
            yield self

    @contextlib.contextmanager
    def planning(self) -> Iterator[None]:
        """The scope, entered from anywhere, also while a step is being traced; for tfpar itself."""
        in_replica = tf.distribute.has_strategy() and not tf.distribute.in_cross_replica_context()
        with tf.init_scope(), outside_replica(self) if in_replica else self.scope():
            yield

    def run(self, fn: Callable, args: tuple = (), kwargs: dict | None = None, options: Any = None) -> Any:
        """Run `fn` once for each replica, as `tf.distribute.Strategy.run` does; once, if there is one replica.

        In `fn` optimizers add up the gradients of all replicas, BatchNormalization uses the statistics of all unless
        `batch_norm="local"`, and each replica draws its own random numbers. Keras' settings of this thread, such as its
        dtype policy, hold there unless `fn` is a `tf.function` itself.

        Raises:
            ModelError: several replicas, of which not each has a copy of every variable: with ZeRO, offload, stages or
                ranks.
        """
        if not self.extended.is_one and not self.extended.has_copies:
            raise ModelError(
                "strategy.run needs a whole copy of each variable on each replica, and with ZeRO, offload, stages or "
                "ranks there is none: call the model in your loop without strategy.run (its calls are divided by "
                "themselves), train with fit, or use DataParallelStrategy(zero=0)"
            )
        if isinstance(fn, tf.types.experimental.PolymorphicFunction) or self.extended.is_one:
            return super().run(fn, args, kwargs, options)
        return super().run(as_in_this_thread(fn), args, kwargs, options)

    def _adopt(self, model):
        hooks = KerasHooks(self, model)
        hooks.adopt(ForKeras(self))
        self._not_loaded.append(weakref.ref(hooks))

    def _before_loading(self, variable):
        """Called before a variable gets a first value that is not its own: its model is planned, if it is large."""
        for reference in reversed(self._not_loaded):
            hooks = reference()
            if hooks is None or hooks.engine is not None:
                self._not_loaded.remove(reference)
            elif any(_keras.stored(v) is variable for v in hooks.model.variables):
                self._not_loaded.remove(reference)
                with self.planning(), hooks.announced():
                    return place_before_loading(self, hooks.model, hooks.seen)

    def schedule(self, micro_batches: int) -> Schedule:
        """The order of actions on the devices along `stage`, for so many micro-batches.

        Raises:
            ScheduleError: a schedule function returns no `Schedule` of forward and backward actions with so many
                devices and micro-batches.
        """
        schedule = self._schedule(self.mesh.stage, micro_batches)
        fits = isinstance(schedule, Schedule) and schedule.trains and len(schedule.devices) == self.mesh.stage
        if not fits or schedule.micro_batches != micro_batches:
            raise ScheduleError(
                f"for {self.mesh.stage} devices and {micro_batches} micro-batches, a schedule function returns a "
                "tfpar.Schedule of forward and backward actions with so many lines and micro-batches; "
                f"received\n{schedule}"
            )
        return schedule

    def explain(self, model: Any, batch_size: int | None = None) -> Plan:
        """The plan of a model, for `print`: what is on each device, in how many bytes, and the predicted bubble.

        Args:
            model: one that was constructed in this strategy's scope.
            batch_size: samples of a batch, over all replicas; if not given, those of the first batch since the model
                was compiled, or 32 if there was none.

        Raises:
            ScopeError: a model of another strategy, or of none.
            ModelError: a subclassed model that has seen no data, one that is never called itself while models in it
                are, or one that cannot be divided.
            PartitionError, LayoutError, ScheduleError: a `placement`, `layout` or `schedule` that does not fit it.
        """
        return explained(self._steps(model), batch_size)

    def convert(self, model: Any, other: "Strategy") -> Any:
        """Move a live model of this strategy, its optimizers and metrics, to another strategy.

        So it can train on one mesh, say, and predict on another. A callback, a checkpoint or a loop that has the model
        or its variables goes on with them; a `tf.function` of yours that was traced with it must be traced again.

        Args:
            model: one that was constructed in this strategy's scope; it is changed.
            other: a strategy of tfpar; `MeshStrategy(Mesh())` for one device.

        Returns:
            The same model, which is now of the other strategy.

        Raises:
            ScopeError: a model of another strategy, or of none; or another model, which has been used and stays behind,
                shares variables with it.
        """
        self._steps(model)
        convert(model, other)
        return model

    def _steps(self, model: Any) -> KerasHooks:
        hooks = hooks_of(model)
        if hooks is None or hooks.strategy is not self:
            raise ScopeError(
                f"{model.name} was not constructed in this strategy's scope:\n"
                "    with strategy.scope():\n        model = ..."
            )
        return hooks


class ForKeras(Strategy):
    """A strategy as Keras' `fit` sees it: it hands on undivided batches, and the step divides them.

    Args:
        strategy: the one that it is otherwise.
    """

    def __init__(self, strategy: Strategy):
        self.__dict__ = strategy.__dict__

    def scope(self):
        """The strategy's own."""
        return self.extended.strategy.scope()

    def experimental_distribute_dataset(self, dataset: Any, options: Any = None) -> Any:
        """The dataset as it is; for replicas on GPUs, one that sends them their parts ahead of time."""
        feeds = self.mesh.stage == 1 and self.mesh.on_gpus and can_be_fed(dataset)
        return Feed(dataset, self.extended.replicas) if feeds else dataset
