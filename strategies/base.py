"""What all strategies share: they extend MirroredStrategy, and describe; the engine does the work."""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import tensorflow as tf

from tfpar.comm.devices import each_gpu_is_one_device
from tfpar.compat import _keras_calls
from tfpar.compat._keras_run import Replicas, as_in_this_thread
from tfpar.compat._tf import (
    LogicalReplica,
    MirroredExtended,
    PerReplica,
    outside_replica,
    replica_of,
    select_replica,
    update_regroup,
)
from tfpar.engine.micro_batch import Parts
from tfpar.errors import ModelError, ScheduleError, ScopeError, user_level
from tfpar.planning.mesh import Mesh
from tfpar.planning.plan import Plan
from tfpar.planning.schedule import SCHEDULES, Schedule
from tfpar.planning.sharding import WHOLE
from tfpar.trainer.convert import convert
from tfpar.trainer.hooks import Steps, steps_of
from tfpar.trainer.input_feed import Feed, can_be_fed
from tfpar.variables.logical import HOST, Home, LogicalVariable, parts_of

MirroredStrategy = tf.distribute.MirroredStrategy
SEGMENTS = (1, 1, 8, 8)  # for each kind of ZeRO, into how many a model is cut if it is not said
Placement = str | Sequence[str] | Mapping[str, int]


class Extended(MirroredExtended):
    """The `tf.distribute` side of a strategy: its variables, and what `strategy.run` and `strategy.reduce` do."""

    def __init__(self, strategy: "Strategy", mesh: Mesh, cross_device_ops: Any = None, on_all: bool = False):
        self.mesh = mesh
        self.replicas = tuple(mesh.device(data=r) for r in range(mesh.data))
        ops = cross_device_ops or tf.distribute.ReductionToOneDevice()
        super().__init__(strategy, devices=list(self.replicas), cross_device_ops=ops)
        # variables of stages and ranks wait in host memory until a plan says where they belong
        self.has_copies = on_all
        self.new_variables_on = self.replicas if on_all else (HOST,)

    @property
    def strategy(self) -> "Strategy":
        """Whose this is."""
        return self._container_strategy()

    @contextlib.contextmanager
    def creating_on(self, device: str) -> Iterator[None]:
        """Inside, new variables are on this device alone."""
        before, self.new_variables_on = self.new_variables_on, (device,)
        try:
            yield
        finally:
            self.new_variables_on = before

    @contextlib.contextmanager
    def as_one(self) -> Iterator[None]:
        """Inside, one replica stands for all."""
        with self.strategy.scope(), LogicalReplica(self.strategy):
            yield

    def run_as_one(self, fn: Callable, *args: Any) -> Any:
        """`fn` in one replica that stands for all."""
        with self.as_one():
            return fn(*args)

    @property
    def is_one(self) -> bool:
        """Whether there is one replica, here."""
        return len(self.replicas) == 1 or isinstance(replica_of(self.strategy), LogicalReplica)

    @property
    def _num_replicas_in_sync(self):
        return 1 if self.is_one else len(self.replicas)

    def _use_merge_call(self):
        return not self.is_one

    def _create_variable(self, next_creator, **kwargs):
        if len(self.replicas) > 1 and kwargs.get("synchronization") == tf.VariableSynchronization.ON_READ:
            with tf.init_scope():
                return super()._create_variable(next_creator, **kwargs)
        if kwargs.get("synchronization") in (None, tf.VariableSynchronization.AUTO):
            kwargs["synchronization"] = tf.VariableSynchronization.ON_WRITE
        reference = kwargs.pop("colocate_with", None)
        follows = isinstance(reference, LogicalVariable)
        devices, sharding = reference.follow if follows else Home(self.new_variables_on, WHOLE)
        aggregation = kwargs.get("aggregation") or tf.VariableAggregation.NONE
        copies, shape = [], None
        with tf.init_scope():
            if len(devices) > 1 and callable(kwargs["initial_value"]):
                with tf.device(HOST):
                    kwargs["initial_value"] = kwargs["initial_value"]()  # once: the copies begin alike
            if len(devices) > 1 and follows:
                with tf.device(HOST):
                    whole = tf.convert_to_tensor(kwargs["initial_value"])
                    (devices, sharding), shape = reference.follow.of(whole.shape == reference.shape), whole.shape
                    parts = parts_of(whole, sharding, len(devices))
            for number, device in enumerate(devices):
                with tf.device(device):
                    if copies:
                        kwargs["name"] = f"{copies[0].name.split(':')[0]}/replica_{number}/"
                    if sharding.divides:
                        kwargs.update(initial_value=parts[number], shape=None)
                    copies.append(next_creator(**kwargs))
            variable = LogicalVariable(self.strategy, copies, aggregation, None, sharding, shape)
        if follows:
            reference.followed_by(variable)
        return variable

    @contextlib.contextmanager
    def colocate_vars_with(self, colocate_with_variable: tf.Variable) -> Iterator[None]:
        """Inside, new variables live where this one does and move along; needs no scope, as an optimizer has none."""
        with self.strategy.planning(), super().colocate_vars_with(colocate_with_variable):
            yield

    def _validate_colocate_with_variable(self, colocate_with_variable):
        """Any variable will do."""

    def _call_for_each_replica(self, fn, args, kwargs):
        if not self.is_one:
            with Replicas.run():
                return super()._call_for_each_replica(fn, args, kwargs)
        with LogicalReplica(self.strategy):
            return fn(*args, **kwargs)

    def _replica_ctx_all_reduce(self, reduce_op, value, options=None):
        return value if self.is_one else super()._replica_ctx_all_reduce(reduce_op, value, options)

    def _reduce_to(self, reduce_op, value, destinations, options):
        return value if self.is_one else super()._reduce_to(reduce_op, value, places(destinations), options)

    def _batch_reduce_to(self, reduce_op, value_destination_pairs, options):
        if self.is_one:
            return [value for value, _ in value_destination_pairs]
        pairs = [(value, places(destinations)) for value, destinations in value_destination_pairs]
        return super()._batch_reduce_to(reduce_op, pairs, options)

    def _broadcast_to(self, tensor, destinations):
        return tensor  # an update on a device fetches it there

    def _gather_to_implementation(self, value, destinations, axis, options):
        return value if self.is_one else super()._gather_to_implementation(value, destinations, axis, options)

    def _update(self, var, fn, args, kwargs, group):
        replica = replica_of(self.strategy)
        if isinstance(replica, LogicalReplica) and replica.copy is not None:
            piece = var._get() if isinstance(var, LogicalVariable) else var
            with tf.device(piece.device) if piece.device else contextlib.nullcontext():
                return fn(piece, *args, **kwargs)
        if isinstance(var, LogicalVariable) and (self.mesh.tensor > 1 or var.is_divided):
            return fn(var, *args, **kwargs)  # all ranks as one: it reads and writes the whole value
        copies = var.copies if isinstance(var, LogicalVariable) else getattr(var, "values", (var,))
        updates = []
        for number, copy in enumerate(copies):
            with tf.device(copy.device), LogicalReplica(self.strategy, number):
                updates.append(fn(copy, *select_replica(number, args), **select_replica(number, kwargs)))
        return updates[0] if self.is_one else update_regroup(self, updates, group)

    def _replica_ctx_update(self, var, fn, args, kwargs, group):
        if self.is_one:
            return self._update(var, fn, args, kwargs, group)
        return super()._replica_ctx_update(var, fn, args, kwargs, group)

    def _experimental_distribute_dataset(self, dataset, options):
        return dataset if self.is_one else super()._experimental_distribute_dataset(dataset, options)

    def _local_results(self, value):
        return (value,) if self.is_one else super()._local_results(value)


def places(destinations: Any) -> Any:
    """Where a sum should go; of a variable, where its copies are, for TensorFlow would ask for its value."""
    return PerReplica(destinations.copies) if isinstance(destinations, LogicalVariable) else destinations


class Strategy(MirroredStrategy):
    """The base of tfpar's strategies.

    Args:
        mesh: the shape of the work, and its devices; all GPUs, else all logical CPUs, if it names none.
        micro_batches: into how many parts each replica divides its share of a batch.
        schedule: `"1f1b"`, `"gpipe"`, or a function `(stages, micro_batches) -> Schedule`.
        placement: which layers go together, see `tfpar.planning.partition.partition`.
        batch_norm: `"global"`: replicas normalise with the statistics of the whole batch; `"local"`: with their own.
        buckets: into how many segments the model is cut for exchanges between replicas.
        cross_device_ops: how tensors of several replicas are added up; see `tfpar.collectives`.
        layout: how weights are divided between ranks, see `TensorParallelStrategy`.
        sequence_parallel: whether ranks divide activations along the sequence between layers that they divide.
        zero, offload: what replicas divide, and what waits in host memory, see `MeshStrategy`.

    Raises:
        DeviceError: a device that does not exist, or one that repeats.
        ScheduleError: a schedule that is not known.
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
    ):
        if not isinstance(micro_batches, int) or micro_batches < 1:
            raise ScheduleError(f"micro_batches is a whole number of at least 1; received {micro_batches!r}")
        if not callable(schedule) and schedule not in SCHEDULES:
            raise ScheduleError(
                f"the schedules are {', '.join(map(repr, SCHEDULES))} or a function (stages, micro_batches) -> "
                f"Schedule; received {schedule!r}"
            )
        self.mesh, self.parts, self.placement = mesh, Parts(mesh.data, micro_batches), placement
        if batch_norm not in ("global", "local"):
            raise ModelError(f'batch_norm is "global" or "local"; received {batch_norm!r}')
        if mesh.data > 1 and cross_device_ops is None and mesh.on_gpus and each_gpu_is_one_device():
            cross_device_ops = tf.distribute.NcclAllReduce()
        if zero not in (0, 1, 2, 3):
            raise ModelError(f"zero is 0, 1, 2 or 3; received {zero!r}")
        if offload not in (None, "optimizer"):
            raise ModelError(f'offload is None or "optimizer"; received {offload!r}')
        if buckets is not None and (not isinstance(buckets, int) or buckets < 1):
            raise ModelError(f"buckets is a whole number of at least 1; received {buckets!r}")
        if zero and mesh.data == 1:
            warnings.warn(
                f"zero={zero} divides between replicas, and {mesh} has one: nothing is divided", stacklevel=user_level()
            )
        self.zero, self.offload = (max(zero, 1) if offload else zero) if mesh.data > 1 else 0, offload
        self.batch_norm, self.cross_device_ops = batch_norm, cross_device_ops
        self.buckets = buckets or SEGMENTS[zero if mesh.data > 1 else 0]
        self.layout, self.sequence_parallel = layout, sequence_parallel
        self._schedule = schedule if callable(schedule) else SCHEDULES[schedule]
        super(MirroredStrategy, self).__init__(
            Extended(self, mesh, cross_device_ops, on_all=mesh.data == mesh.size and not self.zero and not offload)
        )

    @property
    def micro_batches(self) -> int:
        """Into how many parts a replica divides its share of a batch."""
        return self.parts.micro_batches

    @contextlib.contextmanager
    def scope(self) -> Iterator["Strategy"]:
        """Models and variables created inside belong to this strategy.

        Raises:
            ScopeError: in the scope of another strategy.
        """
        around = tf.distribute.get_strategy()
        if tf.distribute.has_strategy() and around.extended is not self.extended:
            raise ScopeError(
                f"this is the scope of a {type(around).__name__}, in which there can be no scope of a "
                f"{type(self).__name__}: a model has one strategy. Leave the one before entering the other; to divide "
                "batches, layers and weights at once use one MeshStrategy(Mesh(data=2, stage=2, tensor=2))"
            )
        with _keras_calls.Adoption.in_scope(), super().scope():
            yield self

    @contextlib.contextmanager
    def planning(self) -> Iterator[None]:
        """The scope, entered from anywhere: also while a step is being traced."""
        in_replica = tf.distribute.has_strategy() and not tf.distribute.in_cross_replica_context()
        with tf.init_scope(), outside_replica(self) if in_replica else self.scope():
            yield

    def run(self, fn: Callable, args: tuple = (), kwargs: dict | None = None, options: Any = None) -> Any:
        """Run `fn` once for each replica, as `tf.distribute.Strategy.run`, with what Keras keeps for this thread.

        Raises:
            ModelError: replicas without whole copies of variables: with ZeRO, offload, stages or ranks.
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
        Steps(self, model).adopt(ForKeras(self))

    def schedule(self, micro_batches: int) -> Schedule:
        """The schedule for so many micro-batches.

        Raises:
            ScheduleError: a schedule function that returns something else.
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
        """What goes where, for `print`: stages, devices, bytes, and the predicted bubble.

        Args:
            model: one that was constructed in this strategy's scope.
            batch_size: samples of a batch; those of the first batch the model saw, or 32.

        Raises:
            ScopeError: a model of another strategy, or of none.
        """
        return self._steps(model).plan(batch_size)

    def convert(self, model: Any, other: "Strategy") -> Any:
        """Move a live model of this strategy, its optimizer and metrics, to another one: to train on one mesh, say, and
        predict on another. A callback, a checkpoint or a loop that holds the model or its variables goes on with them.

        Args:
            model: one that was constructed in this strategy's scope; it is changed.
            other: where to; `MeshStrategy(Mesh())` for one device.

        Returns:
            The model.

        Raises:
            ScopeError: a model of another strategy, or of none.
        """
        self._steps(model)
        convert(model, other)
        return model

    def _steps(self, model: Any) -> Steps:
        steps = steps_of(model)
        if steps is None or steps.strategy is not self:
            raise ScopeError(
                f"{model.name} was not constructed in this strategy's scope:\n"
                "    with strategy.scope():\n        model = ..."
            )
        return steps


class ForKeras(Strategy):
    """A strategy as Keras' `fit` sees it: it gets batches whole, and the step divides them.

    Args:
        strategy: what it is in all else.
    """

    def __init__(self, strategy: Strategy):
        self.__dict__ = strategy.__dict__

    def scope(self):
        """The strategy's own."""
        return self.extended.strategy.scope()

    def experimental_distribute_dataset(self, dataset: Any, options: Any = None) -> Any:
        """The dataset as it is, or on its way to replicas on GPUs."""
        feeds = self.mesh.stage == 1 and self.mesh.on_gpus and can_be_fed(dataset)
        return Feed(dataset, self.extended.replicas) if feeds else dataset
