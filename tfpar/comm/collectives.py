"""What replicas and ranks exchange."""

# r: replica or rank

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import tensorflow as tf

from tfpar.comm.gradients import SharedRows, dense_part, is_sparse, plain, sparse_part, sum_of
from tfpar.compat._tf import batch_reduce
from tfpar.planning.sharding import bounds


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
        tensors = [[p.values if isinstance(p, SharedRows) else p for p in found[n]] for n in complete]
        for n, reduced in zip(complete, batch_reduce(ops, tensors), strict=True):
            shared = isinstance(found[n][0], SharedRows)
            result[n] = [p._replace(values=x) if shared else x for p, x in zip(found[n], reduced, strict=True)]
    load = [0] * len(devices)
    for n, parts in enumerate(found):
        if result[n] is None:
            at = load.index(min(load))
            load[at] += elements_of(parts[0])
            result[n] = copied(summed(parts, devices[at]), devices)
    return result


def reduce_scatter(parts: Sequence[Any], devices: Sequence[str], dim: int, shape: Sequence[int]) -> list[Any]:
    """The sum of what replicas have, if they have something of this shape, divided along `dim`: to each its shard."""
    found = [x for x in parts if x is not None]
    if not found:
        return [None] * len(devices)
    sparse = all(map(is_sparse, found))
    shards = []
    for device, edges in zip(devices, pairwise(bounds(shape[dim], len(devices))), strict=True):
        parts = [sparse_part(x, dim, shape, *edges) if sparse else dense_part(plain(x), dim, *edges) for x in found]
        shards.append(summed(parts, device))
    return shards


def elements_of(value: Any) -> int:
    """The number of elements, as far as it is known."""
    return (value.values if is_sparse(value) else value).shape.num_elements() or 1


def summed(parts: Sequence[Any], device: str) -> Any:
    """The sum of the parts, on one device."""
    with tf.device(device):
        return sum_of(parts)


def on_each(devices: Sequence[str], make: Callable[[int], Any]) -> list[Any]:
    """What `make` gives for each replica or rank, made on its device."""
    values = []
    for r, device in enumerate(devices):
        with tf.device(device):
            values.append(make(r))
    return values


def copied(value: Any, devices: Sequence[str]) -> list[Any]:
    """A value on each device."""
    return on_each(devices, lambda _: tf.nest.map_structure(tf.identity, value, expand_composites=True))


NCCL = (tf.float16, tf.float32, tf.float64)  # which dtypes TensorFlow's NCCL kernels add up; not bfloat16


# ---- between the ranks of a tensor axis: a value for each, on its device

Values = Sequence[tf.Tensor]


def identity(values: Values, devices: Sequence[str], dim: int = 0, extent: Any = None, ops: Any = None) -> Values:
    """The same values."""
    return list(values)


def reduced(values: Values, devices: Sequence[str], dim: int = 0, extent: Any = None, ops: Any = None) -> Values:
    """The sum, everywhere, to the last bit the same."""
    if ops is not None and values[0].dtype in NCCL:
        return batch_reduce(ops, [values])[0]
    if len(devices) == 2 or not values[0].shape.rank:
        return [summed(values, device) for device in devices]
    return all_gather(scattered(values, devices), devices)  # each adds up a part


def all_gather(values: Values, devices: Sequence[str], dim: int = 0, extent: Any = None, ops: Any = None) -> Values:
    """All parts along `dim`, everywhere."""
    return on_each(devices, lambda _: tf.concat(list(values), dim))


def own_part(values: Values, devices: Sequence[str], dim: int = 0, extent: Any = None, ops: Any = None) -> Values:
    """Of what all have, each its part."""
    return on_each(devices, lambda r: part_of_rank(values[r], dim, r, len(devices), extent))


def scattered(values: Values, devices: Sequence[str], dim: int = 0, extent: Any = None, ops: Any = None) -> Values:
    """Of the sum, each its part."""
    if ops is not None and values[0].dtype in NCCL:
        return own_part(reduced(values, devices, ops=ops), devices, dim, extent)
    return [
        summed([part_of_rank(value, dim, r, len(devices), extent) for value in values], device)
        for r, device in enumerate(devices)
    ]


def part_of_rank(value: tf.Tensor, dim: int, r: int, ranks: int, extent: Any = None) -> tf.Tensor:
    """The part of rank `r` along `dim`, of which there are `extent` elements; placed where the value is."""
    extent = value.shape[dim] if extent is None else extent
    edges = bounds(tf.shape(value)[dim] if extent is None else extent, ranks)
    return dense_part(value, dim, edges[r], edges[r + 1])


def maximum(values: Values, devices: Sequence[str], dim: int = 0, extent: Any = None, ops: Any = None) -> Values:
    """The largest of one element that each has along the last dim, everywhere."""
    return on_each(devices, lambda _: tf.reduce_max(tf.concat(list(values), -1), -1, keepdims=True))


def numbers(values: Values, devices: Sequence[str], dim: int = 0, extent: Any = None, ops: Any = None) -> Values:
    """To each its number."""
    return on_each(devices, tf.constant)


EXCHANGES: dict[str, Callable] = {
    "identity": identity, "all-reduce": reduced, "all-gather": all_gather, "slice": own_part,
    "reduce-scatter": scattered, "maximum": maximum, "rank": numbers,
}  # fmt: skip
LOCAL = ("identity", "slice", "rank")  # nothing crosses between ranks


@dataclass(frozen=True)
class Collective:
    """An exchange between ranks, and that of the gradients in the backward pass, by their names in `EXCHANGES`.

    What all ranks have in common has the whole gradient on each of them; of a part, its gradient. So the transpose of
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

    def there(self, values: Values, devices: Sequence[str], ops: Any = None) -> Values:
        """What each rank has afterwards."""
        return EXCHANGES[self.forward](values, devices, self.dim, self.extent, ops)

    def back(self, gradients: Values, devices: Sequence[str], ops: Any = None) -> Values:
        """The gradients of what each rank had before."""
        return EXCHANGES[self.backward](gradients, devices, self.dim, self.extent, ops)

    def of_mask(self, masks: Values, devices: Sequence[str]) -> Values:
        """The Keras masks of what each rank has afterwards."""
        if masks[0] is None or self.dim >= masks[0].shape.rank:
            return list(masks)
        exchange = {"reduce-scatter": "slice", "all-reduce": "identity"}.get(self.forward, self.forward)
        return EXCHANGES[exchange](masks, devices, self.dim, self.extent)
