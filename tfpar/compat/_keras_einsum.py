"""Private names of Keras that products with weights need in compiled programs. Checked against Keras 3.15.1.

Keras writes an `einsum` of a batch with a weight, as in MultiHeadAttention, as `tf.matmul`, and TensorFlow finds the
gradient of the weight as one product for each sample, then adds those up; XLA compiles just that. Inside `whole`, such
an `einsum` is `tf.einsum`, and so its gradient is one product over all samples.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import tensorflow as tf
from keras.src.backend.tensorflow import numpy

from tfpar.compat._replaced import InThread


def whole(wanted: bool) -> contextlib.AbstractContextManager[None]:
    """Inside, in this thread, an `einsum` of a batch with a weight is one product, if that is wanted."""
    return EINSUM.inside() if wanted else contextlib.nullcontext()


def einsum(original: Callable, subscripts: str, *operands: Any, **kwargs: Any) -> tf.Tensor:
    """`keras.ops.einsum`, with whole products inside `whole`."""
    if kwargs or not has_weight(subscripts):
        return original(subscripts, *operands, **kwargs)
    x, y = map(numpy.convert_to_tensor, operands)
    if x.dtype != y.dtype or not x.dtype.is_floating:
        return original(subscripts, x, y)
    return tf.einsum(subscripts, x, y)


def has_weight(subscripts: str) -> bool:
    """Whether the first dim of the first of two operands, the batch, is in the result but not in the second operand."""
    operands, _, result = subscripts.replace(" ", "").partition("->")
    first, comma, second = operands.partition(",")
    return bool(comma and first and "," not in second) and first[0] in result and first[0] not in second


EINSUM = InThread((numpy, "einsum", einsum))
