"""Sums over replicas."""

# r: replica

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from tfpar._tf import batch_reduce
from tfpar.passes import add


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
