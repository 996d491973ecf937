"""A variable's part on its way through an optimizer."""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from tfpar.planning.mesh import Coordinate, dividing
from tfpar.variables.logical import LogicalVariable
from tfpar.variables.parts import region_of


class ShardView:
    """A part of a variable's value on its way through an optimizer, which reads and assigns it like a variable.

    Args:
        variable: whose.
        value: of the part.
    """

    device = ""

    def __init__(self, variable: LogicalVariable, value: tf.Tensor):
        self.variable, self.tensor, self.dtype, self.name = variable, value, value.dtype, variable.name

    def _distributed_container(self) -> LogicalVariable:
        return self.variable

    def value(self) -> tf.Tensor:
        """The value now."""
        return self.tensor

    read_value = value

    @property
    def shape(self) -> tf.TensorShape:
        """Of the part."""
        return self.tensor.shape

    def assign(self, value: Any, **_: Any):
        """A new value."""
        self.tensor = tf.cast(tf.convert_to_tensor(value), self.dtype)

    def assign_add(self, value: Any, **_: Any):
        """Add to it."""
        self.assign(self.tensor + value)

    def assign_sub(self, value: Any, **_: Any):
        """Subtract from it."""
        self.assign(self.tensor - value)

    def scatter_add(self, rows: tf.IndexedSlices, **_: Any):
        """Add to some rows."""
        self.tensor = tf.tensor_scatter_nd_add(self.tensor, rows.indices[:, None], tf.cast(rows.values, self.dtype))

    def scatter_sub(self, rows: tf.IndexedSlices, **_: Any):
        """Subtract from some rows."""
        self.scatter_add(tf.IndexedSlices(-rows.values, rows.indices))

    def __tf_tensor__(self, dtype=None, name=None):
        return self.tensor

    def __mul__(self, other):
        return self.tensor * other

    def __add__(self, other):
        return self.tensor + other

    def __sub__(self, other):
        return self.tensor - other


def shard_of(variable: LogicalVariable, at: Coordinate) -> tf.Tensor:
    """What an optimizer updates for a lane, on the current device."""
    copy, shape = variable.copy_of(at), variable.shape.as_list()
    with tf.device(copy.device):
        value = copy.read_value()
        if variable.slot_sharding != variable.sharding:
            here, there = (sharding.region(shape, at) for sharding in (variable.sharding, variable.slot_sharding))
            value = region_of(value, [(a - c, b - c) for (c, _), (a, b) in zip(here, there, strict=True)])
    return tf.identity(value)


def write_shards(variable: LogicalVariable, shards: Sequence[tf.Tensor]):
    """Assign what an optimizer made of `shard_of` each lane."""
    of_lane = dict(zip(variable.lanes, shards, strict=True))
    for at, copy in zip(variable.lanes, variable.copies, strict=True):
        with tf.device(copy.device):
            value = of_lane[at]
            if variable.slot_sharding != variable.sharding:
                of_rank = {lane: of_lane[lane] for lane in variable.slot_sharding.group(at)}
                value = variable.slot_sharding.joined(of_rank, tf.concat, *dividing("samples"))
            copy.assign(value)
