"""One logical variable, wherever its value lives."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tfpar.compat import _keras
from tfpar.compat._tf import (
    LogicalReplica,
    number_of,
    record_gradient,
    replica_of,
    saveable,
    unrecorded,
)
from tfpar.errors import ModelError
from tfpar.planning.mesh import AXES, FIRST, Coordinate, dividing
from tfpar.planning.sharding import UNSHARDED, Sharding
from tfpar.variables.parts import HOST, copy_on_device, of_shards, parts_of, sparse_part
from tfpar.variables.placed import PlacedVariable, on_host


class AsNumber:
    """What has a `numpy()`, as NumPy and Python take it for a number."""

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.numpy(), dtype)

    def __int__(self):
        return int(self.numpy())

    def __float__(self):
        return float(self.numpy())

    def __complex__(self):
        return complex(self.numpy())

    def __bool__(self):
        return bool(self.numpy())


class LogicalVariable(AsNumber, PlacedVariable):
    """A variable that keeps its identity wherever its value lives: on one device, or copied or divided over several.

    One whose place depends on the plan is created in host memory and waits there, so that a model larger than one
    device never touches one; without a value, if it is known how to make it when it is needed. To `tf.distribute`,
    Keras and checkpoints it is a `MirroredVariable`. Outside of replicas and ranks, reading gives the whole value and
    writing writes all of it; it needs no scope.

    Args:
        strategy: the strategy in whose scope it was created.
        values: the `tf.Variable`s that hold the value, one for each lane, or one for all.
        aggregation: what becomes of the values that replicas assign in `strategy.run`.
        sharding: how the value is divided over `values`.
        initial: makes the value, if `values` have none yet.
    """

    def __init__(
        self,
        strategy,
        values,
        aggregation=tf.VariableAggregation.NONE,
        var_policy=None,
        sharding=UNSHARDED,
        shape=None,
        initial: Callable[[], Any] | None = None,
    ):
        self._whole_shape = values[0].shape if shape is None else tf.TensorShape(shape)
        super().__init__(strategy, values, aggregation, var_policy, sharding, initial)
        self._key = self._primary._unique_id

    @property
    def _unique_id(self):
        return self._key

    @property
    def common_name(self) -> str:
        """The name, without the number of an output."""
        return self._common_name

    def assign(self, value, *args, **kwargs):
        if not self.is_waiting or not tf.executing_eagerly():
            return super().assign(value, *args, **kwargs)
        self._distribute_strategy.extended.before_loading(self)
        if self.is_waiting:
            value = tf.ensure_shape(tf.convert_to_tensor(value, self.dtype), self.shape)
            self._fill(value)
            return self
        return super().assign(value, *args, **kwargs)

    @property
    def sharding(self) -> Sharding:
        """How the value is divided."""
        return self._sharding

    @property
    def shape(self):
        return self._whole_shape

    @property
    def _is_gathered(self) -> bool:
        """Whether reading puts parts together: the value is divided, and no rank reads its own."""
        replica = replica_of(self._distribute_strategy)
        return self._sharding.divides and (replica is None or getattr(replica, "copy", None) is None)

    def _get(self):
        return self.read_value() if self._is_gathered else self._copy()

    def _copy(self):
        """The variable that a replica or rank reads and writes; outside of them, the first."""
        replica = replica_of(self._distribute_strategy)
        bound = getattr(replica, "bound", None)
        if bound:
            return bound[id(self)]
        if tf.executing_eagerly() or not _keras.in_symbolic_call():  # there its shape alone is needed
            self._begin()
        if not tf.executing_eagerly() and not _keras.in_program():
            self._settled = True  # a function holds on to the value where it is
        return self._held(self._sharding.replica(number_of(replica), len(self._values)) if replica else FIRST)

    _get_cross_replica = _get_on_device_or_primary = _get

    @property
    def handle(self):
        return self._copy().handle

    def read_value(self):
        if not self._is_gathered:
            return self._copy().read_value()
        self._copy()
        first = self._values[0].read_value()
        with tf.device(HOST) if tf.executing_eagerly() else contextlib.nullcontext():
            whole = unrecorded(lambda: tf.identity(of_shards([v.read_value() for v in self._values], self._sharding)))
        # to a tape, the first part stands for the variable: its gradient is that of the whole
        return record_gradient([whole], [first], lambda gradient: [gradient])[0]

    def value(self):
        return self.read_value() if self._is_gathered else super().value()

    def sparse_read(self, indices, name=None):
        return tf.gather(self.read_value(), indices) if self._is_gathered else super().sparse_read(indices, name)

    def _dense_var_to_tensor(self, dtype=None, name=None, as_ref=False):
        return tf.convert_to_tensor(self._get(), dtype=dtype, name=name)

    def _update(self, update_fn, value, **kwargs):
        replica = replica_of(self._distribute_strategy)
        if replica is not None and not isinstance(replica, LogicalReplica):
            return super()._update(update_fn, value, **kwargs)
        if len(self._values) == 1 or (replica is not None and replica.copy is not None):
            return update_fn(self._copy(), value, **kwargs)
        updates = []
        for copy, given in zip(self.copies, self.divided(value), strict=True):
            with tf.device(copy.device):
                updates.append(update_fn(copy, given, **kwargs))
        return updates[0]

    def divided(self, value: Any) -> list[Any]:
        """A value for all as what each copy is given of it."""
        if self._sharding.divides and isinstance(value, tf.IndexedSlices):
            shape = self.shape.as_list()
            return [sparse_part(value, self._sharding.region(shape, at)) for at in self.lanes]
        if self._sharding.divides:  # what a gradient of an unknown number of rows made of it has no known shape
            value = tf.ensure_shape(tf.convert_to_tensor(value), self.shape)
        return parts_of(value, self._sharding, len(self._values))

    def copy_of(self, at: Coordinate) -> tf.Variable:
        """The variable that holds the value, or a part of it, for a lane."""
        self._begin()
        return self._held(at)

    def _held(self, at: Coordinate) -> tf.Variable:
        """The same, which has no value as long as this one is waiting."""
        return self._values[self._sharding.number(at) if len(self._values) > 1 else 0]

    @property
    def lanes(self) -> list[Coordinate]:
        """Whose each copy or part is."""
        return self._sharding.lanes(len(self._values))

    def of_lane(self, at: Coordinate) -> tf.Tensor:
        """The value, or the part of a rank, for a lane, on the current device."""
        shards = {lane: copy_on_device(self.copy_of(lane)) for lane in self._sharding.group(at)}
        return self._sharding.joined(shards, tf.concat, *dividing("samples"))

    def kept(self) -> Callable[[], tf.Tensor]:
        """A function that gives the value of now, later; its parts are in host memory."""
        shape, sharding = self.shape.as_list(), self._sharding
        distinct = {sharding.region(shape, at): at for at in reversed(self.lanes)}  # of copies, the first
        with tf.device(HOST):
            parts = {at: copy_on_device(self.copy_of(at)) for at in sorted(distinct.values())}

        def value():
            with tf.device(HOST):
                return sharding.joined(parts, tf.concat, *AXES)

        return value

    def _export_to_saved_model_graph(self, *args, **kwargs):
        if self._sharding.divides:
            raise ModelError(
                f"{self._common_name} is divided between devices, and a SavedModel holds whole variables: use "
                "model.export, which puts them together"
            )
        self._begin()
        return super()._export_to_saved_model_graph(*args, **kwargs)

    def _gather_saveables_for_checkpoint(self):
        self._begin()
        if not self._sharding.divides:
            return super()._gather_saveables_for_checkpoint()
        return saveable(self.read_value, self.assign, self.dtype, self._common_name)


@contextlib.contextmanager
def as_host_variables(variables: Sequence[LogicalVariable]) -> Iterator[None]:
    """Inside, these are ordinary variables with all of their value in host memory, for those that look closely."""
    before = [(v._values, v._sharding, v._settled) for v in variables]
    try:
        for variable in variables:
            variable.hold((on_host(variable),), UNSHARDED)
        yield
    finally:
        for variable, (values, sharding, settled) in zip(variables, before, strict=True):
            variable.hold(values, sharding)
            variable._settled = settled


def follower_bytes(variable: LogicalVariable) -> int:
    """Bytes of the slots that an optimizer keeps for a variable, all parts together."""
    return sum(f.shape.num_elements() * f.dtype.size for f in getattr(variable, "followers", ()))
