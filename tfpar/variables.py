"""One logical variable, wherever its value lives."""

import weakref
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import tensorflow as tf

from tfpar import _keras
from tfpar._tf import (
    LogicalReplica,
    MirroredVariable,
    ResourceVariable,
    record_gradient,
    replica_of,
    saveable,
    unrecorded,
)
from tfpar.errors import ModelError
from tfpar.layout import REPLICATED, Layout, bounds, part_of

HOST = "CPU:0"


class LogicalVariable(MirroredVariable):
    """A variable that keeps its identity wherever its value lives: on one device, or copied or divided over several.

    One whose place depends on the plan is created in host memory and waits there, so that a model larger than one
    device never touches one. To `tf.distribute`, Keras and checkpoints it is a `MirroredVariable`. Outside of replicas
    and ranks, reading gives the whole value and writing writes all of it; it needs no scope.

    Args:
        strategy: the strategy in whose scope it was created.
        values: the `tf.Variable`s that hold the value, one for each replica or rank, or one for all.
        aggregation: what becomes of the values that replicas assign in `strategy.run`.
        layout: how the value is divided over `values`.
    """

    def __init__(
        self, strategy, values, aggregation=tf.VariableAggregation.NONE, var_policy=None, layout=REPLICATED, shape=None
    ):
        self._layout, self._whole_shape = layout, values[0].shape if shape is None else tf.TensorShape(shape)
        super().__init__(strategy, values, aggregation, var_policy)
        self._key = self._primary._unique_id
        self._followers: list[weakref.ref[LogicalVariable]] = []
        self._settled = len(values) > 1

    @property
    def _unique_id(self):
        return self._key

    @property
    def copies(self) -> tuple:
        """The variables that hold the value or a part of it, by replica or rank."""
        return self._values

    @property
    def layout(self) -> Layout:
        """How the value is divided."""
        return self._layout

    @property
    def shape(self):
        return self._whole_shape

    @property
    def _is_gathered(self) -> bool:
        """Whether reading puts parts together: the value is divided, and no rank reads its own."""
        replica = replica_of(self._distribute_strategy)
        return self._layout != REPLICATED and (replica is None or getattr(replica, "copy", None) is None)

    def _get(self):
        return self.read_value() if self._is_gathered else self._copy()

    def _copy(self):
        """The variable that a replica or rank reads and writes; outside of them, the first."""
        replica = replica_of(self._distribute_strategy)
        bound = getattr(replica, "bound", None)
        if bound:
            return bound[id(self)]
        if not tf.executing_eagerly() and not _keras.in_program():
            self._settled = True  # a function holds on to the value where it is
        return self._values[replica._replica_id if replica and len(self._values) > 1 else 0]

    _get_cross_replica = _get_on_device_or_primary = _get

    @property
    def handle(self):
        return self._copy().handle

    def read_value(self):
        if not self._is_gathered:
            return self._copy().read_value()
        self._copy()
        first = self._values[0].read_value()
        whole = unrecorded(lambda: tf.concat([part.read_value() for part in self._values], self._layout.dim))
        # to a tape, the first part stands for the variable: its gradient is that of the whole
        return record_gradient([whole], [first], lambda gradient: [gradient])[0]

    def value(self):
        return self.read_value() if self._is_gathered else super().value()

    def sparse_read(self, indices, name=None):
        return tf.gather(self.read_value(), indices) if self._is_gathered else super().sparse_read(indices, name)

    def _dense_var_to_tensor(self, dtype=None, name=None, as_ref=False):
        return tf.convert_to_tensor(self._get(), dtype=dtype, name=name)

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

    def _update(self, update_fn, value, **kwargs):
        replica = replica_of(self._distribute_strategy)
        if replica is not None and not isinstance(replica, LogicalReplica):
            return super()._update(update_fn, value, **kwargs)
        if len(self._values) == 1 or (replica is not None and replica.copy is not None):
            return update_fn(self._copy(), value, **kwargs)
        updates = []
        for copy, given in zip(self._values, self.divided(value), strict=True):
            with tf.device(copy.device):
                updates.append(update_fn(copy, given, **kwargs))
        return updates[0]

    def divided(self, value: Any) -> list[Any]:
        """A value for all as what each copy is given of it."""
        if self._layout != REPLICATED and isinstance(value, tf.IndexedSlices):
            parts = zip(self._values, self.edges, strict=True)
            return [sparse_part(value, self._layout.dim, copy.shape, *edges) for copy, edges in parts]
        return parts_of(value, self._layout, len(self._values))

    def whole_from(self, number: int, part: tf.Tensor) -> tf.Tensor:
        """A tensor of the shape of the whole value, with a part in the place of a copy's, and zeros."""
        start, stop = self.edges[number]
        around = [[start, self.shape[d] - stop] if d == self._layout.dim else [0, 0] for d in range(self.shape.rank)]
        return tf.pad(part, around)

    @property
    def edges(self) -> list[tuple[int, int]]:
        """Where the part of each copy begins and ends."""
        return list(pairwise(bounds(self.shape[self._layout.dim], len(self._values))))

    def _export_to_saved_model_graph(self, *args, **kwargs):
        if self._layout != REPLICATED:
            raise ModelError(
                f"{self._common_name} is divided between devices, and a SavedModel holds whole variables: save the "
                "model as a .keras file, load it outside of the strategy's scope, and export that"
            )
        return super()._export_to_saved_model_graph(*args, **kwargs)

    def _gather_saveables_for_checkpoint(self):
        if self._layout == REPLICATED:
            return super()._gather_saveables_for_checkpoint()
        return saveable(self.read_value, self.assign, self.dtype, self._common_name)

    def followed_by(self, other: "LogicalVariable"):
        """From now on `other`, an optimizer's slot for instance, moves along."""
        self._followers.append(weakref.ref(other))

    def place(self, devices: Sequence[str], layout: Layout = REPLICATED):
        """Move the value, and that of each follower, to these devices, for good: a copy or a part for each.

        Once it has its place, or a function has been traced that reads it, it stays: the function would go on with
        the old value. Another model that uses the variable reads it from there.
        """
        with tf.init_scope():
            old = self._copy()
            settled, self._settled = self._settled, True
            if not settled and (len(devices) > 1 or not is_on(old, devices[0])):
                self._values, self._layout = copies_of(self, old, devices, layout), layout
        for follower in self._followers:
            if (variable := follower()) is not None:
                alike = variable.shape == self.shape
                variable.place(devices, layout if alike else REPLICATED)


def is_on(variable: tf.Variable, device: str) -> bool:
    """Whether a variable lives on this device."""
    with tf.device(device):
        return tf.DeviceSpec.from_string(variable.device) == tf.DeviceSpec.from_string(tf.identity(0).device)


def copies_of(variable: LogicalVariable, old: tf.Variable, devices: Sequence[str], layout: Layout) -> tuple:
    """New variables with the value of an old one, or with a part of it each."""
    with tf.device(old.device):
        value = old.read_value()
        parts = parts_of(value, layout, len(devices))
    found = []
    for number, (device, part) in enumerate(zip(devices, parts, strict=True)):
        name = f"{variable._common_name}/rank_{number}" if number else variable._common_name
        with tf.device(device):
            found.append(ResourceVariable(part, trainable=old.trainable, name=name, dtype=old.dtype))
        found[-1].handle._distributed_container = weakref.ref(variable)
    return tuple(found)


def parts_of(value: Any, layout: Layout, ranks: int) -> list[Any]:
    """What each rank has of a value."""
    if layout == REPLICATED:
        return [value] * ranks
    value = tf.convert_to_tensor(value)
    return [part_of(value, layout.dim, *edges) for edges in pairwise(bounds(value.shape[layout.dim], ranks))]


def sparse_part(value: tf.IndexedSlices, dim: int, shape: Any, start: int, stop: int) -> tf.IndexedSlices:
    """A part along one dim of rows to scatter."""
    if dim:
        return tf.IndexedSlices(part_of(value.values, dim, start, stop), value.indices, tf.constant(shape.as_list()))
    inside = tf.where((value.indices >= start) & (value.indices < stop))[:, 0]
    rows = tf.gather(value.indices, inside) - tf.cast(start, value.indices.dtype)
    return tf.IndexedSlices(tf.gather(value.values, inside), rows, tf.constant(shape.as_list()))


def follower_bytes(variable: LogicalVariable) -> int:
    """Bytes of the slots that an optimizer keeps for a variable, all parts together."""
    followers = [f() for f in getattr(variable, "_followers", ())]
    return sum(f.shape.num_elements() * f.dtype.size for f in followers if f is not None)
