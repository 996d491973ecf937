"""Collectives over an axis of the mesh: between replicas, and between ranks."""

# r: replica or rank, the place of a device along the axis

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import tensorflow as tf

from tfpar.comm.gradients import SharedRows, dense_part, is_sparse, plain, sparse_part, sum_of
from tfpar.compat._tf import batch_reduce
from tfpar.planning.sharding import bounds


def all_reduce_gradients(values: Sequence[Sequence[Any]], devices: Sequence[str], ops: Any = None) -> list[list[Any]]:
    """The sum over replicas, or ranks, of each gradient, on the device of each.

    Args:
        values: for each value, what each replica has of it; `None` for nothing. A batch with fewer rows than there are
            replicas leaves the last ones without a part.
        devices: of all replicas.
        ops: the `tf.distribute.CrossDeviceOps` that reduce; tensors are copied and added if not given, and those of a
            dtype that NCCL does not add up, if it is NCCL.
    """
    if len(devices) == 1:
        return [list(parts) for parts in values]
    found = [[part for part in parts if part is not None] for parts in values]
    result: list[Any] = [None if parts else [None] * len(devices) for parts in found]
    every = not isinstance(ops, tf.distribute.NcclAllReduce)  # dtypes
    complete = [n for n, parts in enumerate(found) if len(parts) == len(devices)]
    complete = [n for n in complete if every or plain(found[n][0]).dtype in NCCL]
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


def reduce_scatter_gradient(parts: Sequence[Any], devices: Sequence[str], dim: int, shape: Sequence[int]) -> list[Any]:
    """The sum of what replicas have, if they have something of this shape, divided along `dim`: to each its shard."""
    found = [x for x in parts if x is not None]
    if not found:
        return [None] * len(devices)
    sparse = all(map(is_sparse, found))
    shards = []
    for device, ends in zip(devices, pairwise(bounds(shape[dim], len(devices))), strict=True):
        parts = [sparse_part(x, dim, shape, *ends) if sparse else dense_part(plain(x), dim, *ends) for x in found]
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


# ---- of activations: a value for each device along an axis, on that device

Values = Sequence[tf.Tensor]
Offsets = Sequence[Any] | None  # where the part of each begins along `dim`, and where the last ends; nearly equal parts


def identity(values: Values, devices: Sequence[str], dim: int = 0, offsets: Offsets = None, ops: Any = None) -> Values:
    """The same values."""
    return list(values)


def all_reduce(
    values: Values, devices: Sequence[str], dim: int = 0, offsets: Offsets = None, ops: Any = None
) -> Values:
    """The sum, everywhere, to the last bit the same."""
    if len(devices) == 1:  # a short batch keeps one replica busy
        return list(values)
    if ops is not None and values[0].dtype in NCCL:
        return batch_reduce(ops, [values])[0]
    if len(devices) == 2 or not values[0].shape.rank:
        return [summed(values, device) for device in devices]
    return all_gather(reduce_scatter(values, devices), devices)  # each adds up a part


def all_gather(
    values: Values, devices: Sequence[str], dim: int = 0, offsets: Offsets = None, ops: Any = None
) -> Values:
    """All parts along `dim`, everywhere."""
    return on_each(devices, lambda _: tf.concat(list(values), dim))


def own_part(values: Values, devices: Sequence[str], dim: int = 0, offsets: Offsets = None, ops: Any = None) -> Values:
    """Of what all have, each its part."""
    return on_each(devices, lambda r: part_of_device(values[r], dim, r, offsets or equal(values[r], dim, len(devices))))


def reduce_scatter(
    values: Values, devices: Sequence[str], dim: int = 0, offsets: Offsets = None, ops: Any = None
) -> Values:
    """Of the sum, each its part."""
    if ops is not None and values[0].dtype in NCCL:
        return own_part(all_reduce(values, devices, ops=ops), devices, dim, offsets)

    def parts(r: int) -> list[tf.Tensor]:
        return [part_of_device(value, dim, r, offsets or equal(value, dim, len(devices))) for value in values]

    return [summed(parts(r), device) for r, device in enumerate(devices)]


def equal(value: tf.Tensor, dim: int, parts: int) -> list[Any]:
    """The offsets of nearly equal parts along `dim`, where the value is."""
    with tf.device(value.device or None):
        return bounds(tf.shape(value)[dim] if value.shape[dim] is None else value.shape[dim], parts)


def part_of_device(value: tf.Tensor, dim: int, r: int, offsets: Sequence[Any]) -> tf.Tensor:
    """The part of the `r`-th device along `dim`; placed where the value is."""
    return dense_part(value, dim, offsets[r], offsets[r + 1])


def pad(values: Values, devices: Sequence[str], dim: int = 0, offsets: Offsets = None, ops: Any = None) -> Values:
    """Each its part, zeros in the places of the others'."""

    def padded(r: int) -> tf.Tensor:
        around = [[0, 0] for _ in range(values[r].shape.rank)]
        around[dim] = [offsets[r], offsets[-1] - offsets[r + 1]]
        return tf.pad(values[r], around)

    return on_each(devices, padded)


def maximum(values: Values, devices: Sequence[str], dim: int = 0, offsets: Offsets = None, ops: Any = None) -> Values:
    """The largest of one element that each has along the last dim, everywhere."""
    return on_each(devices, lambda _: tf.reduce_max(tf.concat(list(values), -1), -1, keepdims=True))


def numbers(values: Values, devices: Sequence[str], dim: int = 0, offsets: Offsets = None, ops: Any = None) -> Values:
    """To each its number."""
    return on_each(devices, tf.constant)


EXCHANGES: dict[str, Callable] = {
    "identity": identity, "all-reduce": all_reduce, "all-gather": all_gather, "slice": own_part, "pad": pad,
    "reduce-scatter": reduce_scatter, "maximum": maximum, "rank": numbers,
}  # fmt: skip
LOCAL = ("identity", "slice", "pad", "rank")  # nothing crosses between devices
SUMS = ("all-reduce", "reduce-scatter")


@dataclass(frozen=True)
class Collective:
    """What the devices along an axis exchange of a tensor, and of its gradient, by their names in `EXCHANGES`.

    Over `tensor`, what all ranks have in common has the whole gradient on each of them; of a part, its gradient. So the
    transpose of an all-reduce is nothing at all, and that of handing a common tensor to ranks which compute different
    things is an all-reduce (Shoeybi et al., "Megatron-LM", section 3). Over `data`, each replica has the gradient of
    its own samples' loss, and gradients of weights are added up: the transpose of an all-gather is a reduce-scatter,
    that of a slice are zeros around it.

    Args:
        dim: along which tensors are divided.
        extent: elements along it, if that is known.
        axis: of the mesh.
    """

    forward: str
    backward: str
    dim: int = 0
    extent: int | None = None
    axis: str = "tensor"

    def there(self, values: Values, devices: Sequence[str], ops: Any = None, offsets: Offsets = None) -> Values:
        """What each has afterwards."""
        return EXCHANGES[self.forward](values, devices, self.dim, offsets or self.offsets(len(devices)), ops)

    def back(self, gradients: Values, devices: Sequence[str], ops: Any = None, offsets: Offsets = None) -> Values:
        """The gradients of what each had before."""
        return EXCHANGES[self.backward](gradients, devices, self.dim, offsets or self.offsets(len(devices)), ops)

    def offsets(self, parts: int) -> Offsets:
        """Where the part of each begins and ends, if that is known."""
        return None if self.extent is None else bounds(self.extent, parts)

    def of_mask(self, masks: Values, devices: Sequence[str], offsets: Offsets = None) -> Values:
        """The Keras masks of what each has afterwards."""
        if masks[0] is None or self.dim >= masks[0].shape.rank:
            return list(masks)
        return EXCHANGES[self.kind_of_masks](masks, devices, self.dim, offsets or self.offsets(len(devices)))

    @property
    def kind_of_masks(self) -> str:
        """What is exchanged of Keras' masks: what is added up has the same mask everywhere."""
        return {"reduce-scatter": "slice", "all-reduce": "identity"}.get(self.forward, self.forward)
