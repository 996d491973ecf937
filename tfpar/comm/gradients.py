"""Gradients of weights as they are added up, divided and put together: dense ones, and the sparse ones of look-ups.

Keras' optimizers square and clip the rows of a sparse gradient one by one, those that repeat too. So what several
devices find has to have the same rows as that of one device, and is sparse where that is.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from tfpar.planning.sharding import Layout, bounds, part_of


class SharedRows(NamedTuple):
    """A sparse gradient with the same rows for each part of a batch, such as that of learned positions.

    Rows of look-ups of samples are those of all parts; of these here there is one set, whose values are added up.

    Args:
        values: of shape (rows, ...).
        indices: of shape (rows,).
        dense_shape: of the weight, if it is known.
    """

    values: tf.Tensor
    indices: tf.Tensor
    dense_shape: Any = None


def is_sparse(gradient: Any) -> bool:
    """Whether a gradient has some rows of a weight only."""
    return isinstance(gradient, tf.IndexedSlices | SharedRows)


def plain(gradient: Any) -> Any:
    """A gradient as TensorFlow and Keras know it."""
    return tf.IndexedSlices(*gradient) if isinstance(gradient, SharedRows) else gradient


def add(a: Any, b: Any) -> Any:
    """The sum of two gradients of the same kind; sparse, if both are."""
    if isinstance(a, SharedRows) and isinstance(b, SharedRows):
        return a._replace(values=a.values + b.values)
    a, b = plain(a), plain(b)
    if isinstance(a, tf.IndexedSlices) and isinstance(b, tf.IndexedSlices):
        values = tf.concat([a.values, b.values], 0)
        indices = [g.indices if a.indices.dtype == b.indices.dtype else tf.cast(g.indices, "int64") for g in (a, b)]
        return tf.IndexedSlices(values, tf.concat(indices, 0), a.dense_shape)
    return tf.convert_to_tensor(a) + tf.convert_to_tensor(b)


def sum_of(gradients: Iterable[Any]) -> Any:
    """The sum of some gradients, in this order; `None` of none."""
    total = None
    for gradient in gradients:
        total = gradient if total is None else add(total, gradient)
    return total


def cast(gradient: Any, dtype: Any) -> Any:
    """A gradient in another dtype."""
    if isinstance(gradient, SharedRows):
        return gradient._replace(values=tf.cast(gradient.values, dtype))
    return tf.cast(gradient, dtype)


def folded(gradient: tf.IndexedSlices, parts: int) -> SharedRows:
    """The sum over parts of a batch of a gradient that has the same rows for each of them, one part after the other."""
    values, rows = gradient.values, tf.shape(gradient.indices)[0] // parts
    by_part = tf.reshape(values, tf.concat([[parts, rows], tf.shape(values)[1:]], 0))
    total = tf.ensure_shape(tf.reduce_sum(by_part, 0), [None, *values.shape[1:]])
    return SharedRows(total, gradient.indices[:rows], gradient.dense_shape)


# ---- parts of gradients


def dense_part(value: Any, dim: int, start: Any, stop: Any) -> tf.Tensor:
    """A part of a tensor along `dim`, placed where the tensor is."""
    value = tf.convert_to_tensor(value)
    with tf.device(value.device or None):
        return part_of(value, dim, start, stop)


def sparse_part(gradient: Any, dim: int, shape: Sequence[int], start: int, stop: int) -> Any:
    """A shard of a sparse gradient, of as many rows: those of other shards are zero."""
    values, indices = gradient.values, gradient.indices
    if dim:
        values = part_of(values, dim, start, stop)
    else:
        values, indices = rows_of_shard(values, indices, start, stop - start)
    dense = [stop - start if d == dim else n for d, n in enumerate(shape)]
    return type(gradient)(values, indices, tf.constant(dense, tf.int32))


def rows_of_shard(values: tf.Tensor, indices: tf.Tensor, start: Any, size: int) -> tuple[tf.Tensor, tf.Tensor]:
    """Rows, and which of a shard's each is; those of other shards are zero, so that XLA knows all shapes.

    Args:
        start: the first row of the shard; may be a tensor.
        size: its rows.
    """
    start = tf.cast(start, indices.dtype)
    inside = (indices >= start) & (indices < start + size)
    values = tf.where(tf.reshape(inside, [-1] + [1] * (values.shape.rank - 1)), values, tf.zeros((), values.dtype))
    return values, tf.where(inside, indices - start, tf.zeros((), indices.dtype))


def of_parts(parts: Sequence[Any], layout: Layout, shape: Sequence[int]) -> Any:
    """The gradient of a weight of this shape of which ranks have these parts; sparse, if they are."""
    if layout.dim is None or len(parts) == 1:
        return parts[0]
    if not all(map(is_sparse, parts)):
        return tf.concat([tf.convert_to_tensor(part) for part in map(plain, parts)], layout.dim)
    dense = tf.constant(list(shape), tf.int32)
    if layout.dim:  # all have the same rows
        return tf.IndexedSlices(tf.concat([p.values for p in parts], layout.dim), parts[0].indices, dense)
    starts = bounds(shape[0], len(parts))
    moved = [p.indices + tf.cast(start, p.indices.dtype) for p, start in zip(parts, starts, strict=False)]
    return tf.IndexedSlices(tf.concat([p.values for p in parts], 0), tf.concat(moved, 0), dense)
