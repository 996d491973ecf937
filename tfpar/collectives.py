"""What replicas and ranks exchange."""

# r: replica or rank

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from tfpar._tf import batch_reduce
from tfpar.layout import bounds


def add(a: Any, b: Any) -> Any:
    """The sum of two gradients; of two sparse ones, a sparse one."""
    if isinstance(a, tf.IndexedSlices) and isinstance(b, tf.IndexedSlices):
        values, indices = tf.concat([a.values, b.values], 0), tf.concat([a.indices, b.indices], 0)
        return tf.IndexedSlices(values, indices, a.dense_shape)
    return tf.convert_to_tensor(a) + tf.convert_to_tensor(b)


def all_reduce(values: Sequence[Sequence[Any]], devices: Sequence[str], ops: Any = None) -> list[list[Any]]:
    """The sum over replicas of each value, on every replica's device.

    Args:
        values: for each value, what each replica has of it; `None` for nothing. A batch with fewer rows than there are
            replicas leaves the last ones without a part, and what was computed for all is on the first alone.
        devices: of all replicas.
        ops: the `tf.distribute.CrossDeviceOps` that reduce; tensors are copied and added if not given.
    """
    if len(devices) == 1:
        return [list(parts) for parts in values]
    found = [[part for part in parts if part is not None] for parts in values]
    result: list[Any] = [None if parts else [None] * len(devices) for parts in found]
    complete = [n for n, parts in enumerate(found) if len(parts) == len(devices)]
    if ops is not None and complete:
        for n, reduced in zip(complete, batch_reduce(ops, [found[n] for n in complete]), strict=True):
            result[n] = reduced
    load = [0] * len(devices)
    for n, parts in enumerate(found):
        if result[n] is None:
            at = load.index(min(load))
            load[at] += size(parts[0])
            result[n] = copied(summed(parts, devices[at]), devices)
    return result


def size(value: Any) -> int:
    """The number of elements, as far as it is known."""
    return (value.values if isinstance(value, tf.IndexedSlices) else value).shape.num_elements() or 1


def summed(parts: Sequence[Any], device: str) -> Any:
    """The sum of the parts, on one device."""
    with tf.device(device):
        total = parts[0]
        for part in parts[1:]:
            total = add(total, part)
    return total


def copied(value: Any, devices: Sequence[str]) -> list[Any]:
    """A value on each device."""
    copies = []
    for device in devices:
        with tf.device(device):
            copies.append(tf.nest.map_structure(tf.identity, value, expand_composites=True))
    return copies


NCCL = (tf.float16, tf.float32, tf.float64)  # which dtypes TensorFlow's NCCL kernels add up; not bfloat16


# ---- between the ranks of a tensor axis: a value for each, on its device


def identity(values: Sequence[tf.Tensor], devices: Sequence[str], dim: int, extent: Any, ops: Any) -> list[tf.Tensor]:
    """The same values."""
    return list(values)


def reduced(values: Sequence[tf.Tensor], devices: Sequence[str], dim: int, extent: Any, ops: Any) -> list[tf.Tensor]:
    """The sum, everywhere, to the last bit the same."""
    if ops is not None and values[0].dtype in NCCL:
        return batch_reduce(ops, [values])[0]
    rows = values[0].shape.rank
    if len(devices) == 2 or not rows:
        return [summed(values, device) for device in devices]
    return gathered(scattered(values, devices, 0, None, None), devices, 0, None, None)  # each adds up a part


def gathered(values: Sequence[tf.Tensor], devices: Sequence[str], dim: int, extent: Any, ops: Any) -> list[tf.Tensor]:
    """All parts along `dim`, everywhere."""
    whole = []
    for device in devices:
        with tf.device(device):
            whole.append(tf.concat(list(values), dim))
    return whole


def cut(values: Sequence[tf.Tensor], devices: Sequence[str], dim: int, extent: Any, ops: Any) -> list[tf.Tensor]:
    """Of what all have, each its part."""
    parts = []
    for r, device in enumerate(devices):
        with tf.device(device):
            parts.append(part(values[r], dim, r, len(devices), extent))
    return parts


def scattered(values: Sequence[tf.Tensor], devices: Sequence[str], dim: int, extent: Any, ops: Any) -> list[tf.Tensor]:
    """Of the sum, each its part."""
    if ops is not None and values[0].dtype in NCCL:
        return cut(reduced(values, devices, dim, extent, ops), devices, dim, extent, ops)
    return [
        summed([part(value, dim, r, len(devices), extent) for value in values], device)
        for r, device in enumerate(devices)
    ]


def part(value: tf.Tensor, dim: int, r: int, ranks: int, extent: Any = None) -> tf.Tensor:
    """The part of rank `r` along `dim`, of which there are `extent` elements; placed where the value is."""
    extent = value.shape[dim] if extent is None else extent
    edges = bounds(tf.shape(value)[dim] if extent is None else extent, ranks)
    with tf.device(value.device or None):
        return value[(slice(None),) * dim + (slice(edges[r], edges[r + 1]),)]


def maximum(values: Sequence[tf.Tensor], devices: Sequence[str], dim: int, extent: Any, ops: Any) -> list[tf.Tensor]:
    """The largest of one element that each has along the last dim, everywhere."""
    return [
        tf.reduce_max(whole, -1, keepdims=True)
        for whole in gathered(values, devices, values[0].shape.rank - 1, None, None)
    ]


def numbers(values: Sequence[tf.Tensor], devices: Sequence[str], dim: int, extent: Any, ops: Any) -> list[tf.Tensor]:
    """To each its number."""
    found = []
    for r, device in enumerate(devices):
        with tf.device(device):
            found.append(tf.constant(r))
    return found


EXCHANGES: dict[str, Callable] = {
    "identity": identity, "all-reduce": reduced, "all-gather": gathered, "slice": cut, "reduce-scatter": scattered,
    "maximum": maximum, "rank": numbers,
}  # fmt: skip
LOCAL = ("identity", "slice", "rank")  # nothing crosses between ranks


@dataclass(frozen=True)
class Collective:
    """An exchange between ranks, and that of the gradients on the way back, by their names in `EXCHANGES`.

    What all ranks have in common has the whole gradient on each of them; of a part, its gradient. So the way back of
    an all-reduce is nothing at all, and that of handing a common tensor to ranks which compute different things is an
    all-reduce (Shoeybi et al., "Megatron-LM", section 3).

    Args:
        dim: along which tensors are divided.
        extent: elements along it, if that is known.
    """

    forward: str
    backward: str
    dim: int = 0
    extent: int | None = None
    variables: tuple = ()

    def there(self, values: Sequence[tf.Tensor], devices: Sequence[str], ops: Any = None) -> list[tf.Tensor]:
        """What each rank has afterwards."""
        return EXCHANGES[self.forward](values, devices, self.dim, self.extent, ops)

    def back(self, gradients: Sequence[tf.Tensor], devices: Sequence[str], ops: Any = None) -> list[tf.Tensor]:
        """The gradients of what each rank had before."""
        return EXCHANGES[self.backward](gradients, devices, self.dim, self.extent, ops)

    def of_mask(self, masks: Sequence[tf.Tensor], devices: Sequence[str]) -> list[tf.Tensor]:
        """The Keras masks of what each rank has afterwards."""
        if masks[0] is None or self.dim >= masks[0].shape.rank:
            return list(masks)
        exchange = {"reduce-scatter": "slice", "all-reduce": "identity"}.get(self.forward, self.forward)
        return EXCHANGES[exchange](masks, devices, self.dim, self.extent, None)
