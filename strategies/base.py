"""What all strategies share: they extend MirroredStrategy, and describe; the engine does the work."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import tensorflow as tf

from tfpar import _keras
from tfpar._tf import MirroredExtended, ReplicaContext, UpdateContext, outside_replica
from tfpar.errors import DeviceError, ScheduleError, ScopeError
from tfpar.mesh import Mesh
from tfpar.plan import Plan
from tfpar.schedule import SCHEDULES, Schedule
from tfpar.step import Steps, steps_of
from tfpar.variables import HOST, LogicalVariable

Placement = str | Sequence[str] | Mapping[str, int]


class Extended(MirroredExtended):
    """The `tf.distribute` side of a strategy with one replica: variables with one piece, wherever that is."""

    def __init__(self, strategy: "Strategy", devices: Sequence[str]):
        super().__init__(strategy, devices=list(devices))
        self.new_variables_on = HOST

    @contextlib.contextmanager
    def creating_on(self, device: str) -> Iterator[None]:
        """Inside, new variables begin on this device instead of waiting on the host."""
        before, self.new_variables_on = self.new_variables_on, device
        try:
            yield
        finally:
            self.new_variables_on = before

    @property
    def _num_replicas_in_sync(self):
        return 1

    def _use_merge_call(self):
        return False

    def _create_variable(self, next_creator, **kwargs):
        reference = kwargs.pop("colocate_with", None)
        follows = isinstance(reference, LogicalVariable)
        with tf.init_scope(), tf.device(reference.device if follows else self.new_variables_on):
            variable = LogicalVariable(self._container_strategy(), [next_creator(**kwargs)])
        if follows:
            reference.followed_by(variable)
        return variable

    @contextlib.contextmanager
    def colocate_vars_with(self, colocate_with_variable: tf.Variable) -> Iterator[None]:
        """Inside, new variables live where this one does and move along; needs no scope, as an optimizer has none."""
        with self._container_strategy().planning(), super().colocate_vars_with(colocate_with_variable):
            yield

    def _validate_colocate_with_variable(self, colocate_with_variable):
        """Any variable will do."""

    def _call_for_each_replica(self, fn, args, kwargs):
        with ReplicaContext(self._container_strategy(), replica_id_in_sync_group=0):
            return fn(*args, **kwargs)

    def _replica_ctx_all_reduce(self, reduce_op, value, options=None):
        return value

    def _reduce_to(self, reduce_op, value, destinations, options):
        return value

    def _batch_reduce_to(self, reduce_op, value_destination_pairs, options):
        return [value for value, _ in value_destination_pairs]

    def _gather_to_implementation(self, value, destinations, axis, options):
        return value

    def _update(self, var, fn, args, kwargs, group):
        piece = var.values[0] if isinstance(var, LogicalVariable) else var
        with tf.device(piece.device), UpdateContext(0):
            return fn(piece, *args, **kwargs)

    _replica_ctx_update = _update

    def _experimental_distribute_dataset(self, dataset, options):
        return dataset

    def _local_results(self, value):
        return (value,)


class Strategy(tf.distribute.MirroredStrategy):
    """The base of tfpar's strategies.

    Args:
        mesh: the shape of the work, and its devices; all GPUs, else all logical CPUs, if it names none.
        micro_batches: into how many parts each batch is divided.
        schedule: `"1f1b"`, `"gpipe"`, or a function `(stages, micro_batches) -> Schedule`.
        placement: which layers go together, see `tfpar.partition.partition`.

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
    ):
        if not isinstance(micro_batches, int) or micro_batches < 1:
            raise ScheduleError(f"micro_batches is a whole number of at least 1; received {micro_batches!r}")
        if not callable(schedule) and schedule not in SCHEDULES:
            raise ScheduleError(
                f"the schedules are {', '.join(map(repr, SCHEDULES))} or a function (stages, micro_batches) -> "
                f"Schedule; received {schedule!r}"
            )
        self.mesh, self.micro_batches, self.placement = mesh, micro_batches, placement
        self._schedule = schedule if callable(schedule) else SCHEDULES[schedule]
        super(tf.distribute.MirroredStrategy, self).__init__(Extended(self, mesh.devices))

    @contextlib.contextmanager
    def scope(self) -> Iterator["Strategy"]:
        """Models and variables created inside belong to this strategy."""
        with _keras.Adoption.in_scope(), super().scope():
            yield self

    @contextlib.contextmanager
    def planning(self) -> Iterator[None]:
        """The scope, entered from anywhere: also while a step is being traced."""
        in_replica = tf.distribute.has_strategy() and not tf.distribute.in_cross_replica_context()
        with tf.init_scope(), outside_replica(self) if in_replica else self.scope():
            yield

    def _adopt(self, model):
        Steps(self, model).adopt()

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
        steps = steps_of(model)
        if steps is None or steps.strategy is not self:
            raise ScopeError(
                f"{model.name} was not constructed in this strategy's scope:\n"
                "    with strategy.scope():\n        model = ..."
            )
        return steps.plan(batch_size)


def local_devices(devices: Sequence[str] | None) -> tuple[str, ...]:
    """The devices asked for, or all GPUs, or else all logical CPUs.

    Raises:
        DeviceError: a name that no device has; the message lists those there are.
    """
    known = {d.name.removeprefix("/device:"): d for d in tf.config.list_logical_devices()}
    if devices is None:
        gpus = [name for name in known if name.startswith("GPU")]
        return tuple(gpus or [name for name in known if name.startswith("CPU")])
    names = []
    for device in devices:
        spec = tf.DeviceSpec.from_string(device if "/" in device or ":" not in device else f"/device:{device}")
        name = f"{spec.device_type}:{spec.device_index or 0}"
        if name not in known:
            raise DeviceError(f"there is no device {device!r}; there are {', '.join(known)}")
        names.append(name)
    return tuple(names)
