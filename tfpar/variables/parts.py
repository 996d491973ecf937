"""The parts of a value: what each lane has of it, and where."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from tfpar.compat._tf import unrecorded
from tfpar.planning.mesh import AXES
from tfpar.planning.sharding import UNSHARDED, Sharding

HOST = "CPU:0"


class Home(NamedTuple):
    """Where copies or parts of a variable live.

    Args:
        devices: one for each.
        sharding: which part each has.
    """

    devices: tuple[str, ...]
    sharding: Sharding

    def of(self, alike: bool) -> "Home":
        """The same for a variable that has this shape or, if not, another: it is copied."""
        return self if alike else Home(self.devices, UNSHARDED)


def of_shards(parts: Sequence[tf.Tensor], sharding: Sharding) -> tf.Tensor:
    """The value of which lanes have these parts."""
    return sharding.joined(dict(zip(sharding.lanes(len(parts)), parts, strict=True)), tf.concat, *AXES)


def copy_on_device(variable: tf.Variable) -> tf.Tensor:
    """A variable's value on the current device; TensorFlow reads it only where it lives."""
    with tf.device(variable.device):
        value = unrecorded(lambda: tf.convert_to_tensor(variable))
    return tf.identity(value)


def is_on(variable: tf.Variable, device: str) -> bool:
    """Whether a variable lives on this device."""
    with tf.device(device):
        return tf.DeviceSpec.from_string(variable.device) == tf.DeviceSpec.from_string(tf.identity(0).device)


def parts_of(value: Any, sharding: Sharding, lanes: int) -> list[Any]:
    """What each of so many lanes has of a value."""
    if not sharding.divides:
        return [value] * lanes
    value = tf.convert_to_tensor(value)
    regions = [sharding.region(value.shape.as_list(), at) for at in sharding.lanes(lanes)]
    if not tf.executing_eagerly():
        return [region_of(value, region) for region in regions]
    with tf.device(value.device):  # rows are a view of the whole, which would be there as long as they are
        return [tf.raw_ops.DeepCopy(x=region_of(value, region)) for region in regions]


def region_of(value: Any, region: Sequence[tuple[int, int]]) -> Any:
    """A part of a tensor."""
    return value[tuple(slice(start, stop) for start, stop in region)]


def sparse_part(value: tf.IndexedSlices, region: Sequence[tuple[int, int]]) -> tf.IndexedSlices:
    """A part of rows to scatter."""
    (start, stop), *inside = region
    here = tf.where((value.indices >= start) & (value.indices < stop))[:, 0]
    rows = tf.gather(value.indices, here) - tf.cast(start, value.indices.dtype)
    values = region_of(tf.gather(value.values, here), [(0, None), *inside])
    return tf.IndexedSlices(values, rows, tf.constant([stop - start for start, stop in region]))
