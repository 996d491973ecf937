"""Dividing a batch into micro-batches, and putting results together: the one place that does."""

from typing import Any

import tensorflow as tf
from keras import tree

from tfpar.errors import BatchError


def rows(batch: Any) -> int:
    """The number of samples in a structure of arrays, all of which have them along dimension 0.

    Raises:
        BatchError: no arrays, no samples, or arrays of unequal length.
    """
    lengths = {}
    for path, leaf in tree.flatten_with_path(batch):
        if leaf is not None:
            name = "batch" + "".join(f"[{part!r}]" for part in path)
            if not leaf.shape.rank:
                raise BatchError(f"{name} has no batch dimension: every array of a batch needs one, as dimension 0")
            lengths[name] = leaf.shape[0] if leaf.shape[0] is not None else int(tf.shape(leaf)[0])
    if not lengths:
        raise BatchError("the batch holds no arrays")
    if len(set(lengths.values())) > 1:
        raise BatchError(f"the arrays of a batch must be equally long; received {lengths}")
    count = next(iter(lengths.values()))
    if not count:
        raise BatchError("the batch has no samples: an empty batch has no loss; drop it from the data")
    return count


def count(batch: Any) -> Any:
    """The number of samples: a whole number where it is known while tracing, else a tensor."""
    first = next(leaf for leaf in tree.flatten(batch) if leaf is not None)
    return first.shape[0] if first.shape[0] is not None else tf.shape(first)[0]


def bounds(count: Any, parts: int) -> list[Any]:
    """Where `parts` nearly equal parts of `count` rows begin, and where the last ends; `count` may be a tensor.

    Example:
        >>> bounds(10, 4)
        [0, 2, 5, 7, 10]
    """
    return [count * part // parts for part in range(parts + 1)]


def shares(count: Any, parts: int) -> list[tf.Tensor]:
    """The share of each part in `count` rows, as float64 scalars."""
    edges = bounds(count, parts)
    return [tf.cast((b - a) / count, tf.float64) for a, b in zip(edges[:-1], edges[1:], strict=True)]


def split(batch: Any, parts: int) -> list[Any]:
    """A structure of tensors as `parts` structures of nearly equal numbers of rows; `None` stays `None`.

    Raises:
        BatchError: a sparse tensor.
    """
    if parts > 1 and any(isinstance(x, tf.SparseTensor) for x in tree.flatten(batch)):
        raise BatchError("a sparse array cannot be divided; use micro_batches=1 (LayerPlacementStrategy)")
    edges = bounds(count(batch), parts)
    return [
        tree.map_structure(lambda x: x if x is None or parts == 1 else x[start:stop], batch)  # noqa: B023
        for start, stop in zip(edges[:-1], edges[1:], strict=True)
    ]


def joined(values: list[Any]) -> Any:
    """The rows of the parts, in order; `None` for parts that are `None`."""
    return values[0] if len(values) == 1 or values[0] is None else tf.concat(values, axis=0)
