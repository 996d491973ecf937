"""Private names of Keras that fused attention needs. Checked against Keras 3.15.1.

On TensorFlow, Keras computes attention by its formula alone, with all products of queries and keys in memory. Inside
`fused`, it computes what cuDNN can by cuDNN.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import keras
import tensorflow as tf
from keras.src.backend.tensorflow import nn

from tfpar.compat import _cudnn_attention, _keras_hub
from tfpar.compat._replaced import InThread

LARGE = {tf.bfloat16: -(2.0**41), tf.float16: -(2.0**15)}  # cuDNN subtracts two of them without an overflow
SHORT = 2**14  # products of queries and keys of a head; with fewer the formula is used unless asked otherwise


@contextlib.contextmanager
def fused(head: int, tell: Callable[[str | None], None]) -> Iterator[None]:
    """Inside, in this thread, attention is computed by cuDNN where it can be.

    Args:
        head: the largest head that it can compute; 0 if it cannot at all.
        tell: is called for each attention, with the reason if it is computed by the formula.
    """
    if not head:
        yield
        return
    with ATTENTION.inside(partial(attention, head, tell)), _keras_hub.fused(head):
        yield


def attention(
    largest: int, tell: Callable[[str | None], None], formula: Callable,
    query: Any, key: Any, value: Any, bias: Any = None, mask: Any = None, scale: Any = None,
    is_causal: bool = False, flash_attention: bool | None = None, attn_logits_soft_cap: Any = None,
) -> tf.Tensor:  # fmt: skip
    """`keras.ops.dot_product_attention`, by cuDNN inside `fused`."""
    query, key, value = map(tf.convert_to_tensor, (query, key, value))
    bias = bias if bias is None else tf.cast(bias, query.dtype)
    mask = _keras_hub.with_window(mask)
    why = why_not(largest, query, key, value, bias, mask, scale, flash_attention, attn_logits_soft_cap)
    tell(why)
    if why:
        key, value = repeated(query, key, value)
        output = formula(query, key, value, bias, mask, scale, is_causal, None, attn_logits_soft_cap)
    else:
        scale = 1 / math.sqrt(query.shape[-1]) if scale is None else float(scale)
        output = by_cudnn(query, key, value, bias, mask, scale, is_causal)
    return _keras_hub.as_in_formula(output, mask)


def handled(formula: Callable, *args: Any, **kwargs: Any) -> Any:
    """Attention as who is inside wants it."""
    return ATTENTION.given.get()(formula, *args, **kwargs)


def repeated(query: Any, key: Any, value: Any) -> tuple[Any, Any]:
    """Keys and values with as many heads as Keras' formula takes: it repeats several, but not a single one."""
    heads, one = query.shape[2], key.shape[2] == 1
    return (tf.repeat(key, heads, 2), tf.repeat(value, heads, 2)) if one and heads != 1 else (key, value)


def kept(
    query: Any, key: Any, value: Any, bias: Any, mask: Any, scale: Any, causal: bool, flash: bool | None, cap: Any
) -> tf.Tensor:
    """`keras.ops.dot_product_attention`, where it was found in what a layer runs."""
    if ATTENTION.given.get() is None:
        key, value = repeated(query, key, value)
    return keras.ops.dot_product_attention(query, key, value, bias, mask, scale, causal, flash, cap)


ATTENTION = InThread((nn, "dot_product_attention", handled))


def why_not(
    largest: int, query: tf.Tensor, key: tf.Tensor, value: tf.Tensor, bias: Any, mask: Any, scale: Any,
    asked: bool | None, cap: Any,
) -> str | None:  # fmt: skip
    """Why cuDNN cannot or should not compute an attention; `None` if it can.

    Args:
        largest: the largest head that it computes.
        asked: the layer's `flash_attention`; `None` for as is best.
    """
    sizes = query.shape, key.shape, value.shape
    if asked is False or keras.config.is_flash_attention_enabled() is False:
        return "flash attention is disabled"
    if query.dtype not in LARGE or not query.dtype == key.dtype == value.dtype:
        return f"{query.dtype.name}, not bfloat16 or float16"
    if any(size.rank != 4 or not size.is_fully_defined() for size in sizes):
        return f"shapes {', '.join(str(size) for size in sizes)}, not four known dims"
    (_, t, n, h), (_, s, k, _) = query.shape.as_list(), key.shape.as_list()
    if value.shape != key.shape or key.shape[3] != h or h % 8 or h > largest:
        return f"heads of {h} and {value.shape[3]}, not of one multiple of 8 up to {largest}"
    if n % k:
        return f"{n} heads of queries are no multiple of {k} of keys"
    if (bias is not None or mask is not None) and (t % 2 or s % 2):
        return f"a mask or a bias over {t} queries and {s} keys, not even numbers"
    if isinstance(scale, tf.Tensor) or cap is not None:
        return "a scale that is computed, or a soft cap"
    if asked is None and t * s < SHORT:
        return f"{t} queries and {s} keys are few"
    return None


def by_cudnn(
    query: tf.Tensor, key: tf.Tensor, value: tf.Tensor, bias: tf.Tensor | None, mask: Any, scale: float, causal: bool
) -> tf.Tensor:
    """Attention by cuDNN: masks are a bias, but for the causal one."""
    sizes = [query.shape[1], key.shape[1]]
    learned = [] if bias is None else [spread(bias, sizes)]
    if mask is not None:
        mask = spread(tf.cast(mask, tf.bool), sizes)
        if causal:  # a query that sees no key at all sees all of them alike, later ones too
            mask, causal = mask & tf.linalg.band_part(tf.ones(sizes, tf.bool), -1, 0), False

    blind = None
    if mask is not None:  # queries that see no key have the mean of the values, whatever they are
        blind = tf.logical_not(tf.transpose(tf.reduce_any(mask, -1, keepdims=True), [0, 2, 1, 3]))

    @tf.custom_gradient
    def attend(query, key, value, *learned):
        added = learned[0] if learned else None
        if mask is not None:
            query = tf.where(blind, tf.zeros((), query.dtype), query)
            added = tf.where(mask, tf.zeros((), query.dtype) if added is None else added, LARGE[query.dtype])
        output, statistics = _cudnn_attention.forward(query, key, value, added, scale, causal)

        def back(gradient):
            rest = None
            if mask is not None:
                rest = tf.reduce_sum(tf.where(blind, gradient, tf.zeros((), gradient.dtype)), 1, keepdims=True)
                gradient = tf.where(blind, tf.zeros((), gradient.dtype), gradient)
            of_query, of_key, of_value, *of_bias = _cudnn_attention.backward(
                query, key, value, added, statistics, output, gradient, scale, causal, bool(learned)
            )
            if rest is not None:
                b, s, k, h = value.shape.as_list()
                of_value += tf.reduce_sum(tf.reshape(rest, [b, 1, k, -1, h]), 3) / s
            return [of_query, of_key, of_value, *of_bias]

        return output, back

    return attend(query, key, value, *learned)


def spread(x: tf.Tensor, sizes: list[int]) -> tf.Tensor:
    """A mask or a bias with four dims, of which the last two are those of queries and keys."""
    x = tf.reshape(x, [1] * (4 - x.shape.rank) + x.shape.as_list())
    return tf.broadcast_to(x, [*x.shape[:2], *sizes])
