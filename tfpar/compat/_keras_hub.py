"""Private names of KerasHub that its tasks and fused attention need. Checked against KerasHub 0.32.

Its attention layers write the formula themselves on TensorFlow, and call `keras.ops.dot_product_attention` elsewhere.
"""

import contextlib
import contextvars
import sys
from collections.abc import Callable, Iterator
from functools import cache
from types import ModuleType
from typing import Any

import keras
import tensorflow as tf

from tfpar.compat._replaced import InThread

PIPELINE_MODEL = "keras_hub.src.utils.pipeline_model"
MODELS, SWITCH, METHOD = "keras_hub.src.models.", "fused_attention_op_available", "_compute_attention"
CALL: contextvars.ContextVar[tuple[Any, int] | None] = contextvars.ContextVar("call", default=None)


def is_plain(call: Callable) -> bool:
    """Whether a class' `__call__` is that of Keras, or that of KerasHub's tasks, which looks for strings before it."""
    return call is keras.layers.Layer.__call__ or getattr(call, "__module__", None) == PIPELINE_MODEL


@contextlib.contextmanager
def fused(head: int) -> Iterator[None]:
    """Inside, in this thread, KerasHub's attention layers call `keras.ops.dot_product_attention`.

    Args:
        head: the largest head that is computed otherwise than by the formula; if it is 0, nothing changes.
    """
    if not head:
        yield
        return
    with contextlib.ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.startswith(MODELS) and hasattr(module, SWITCH):
                stack.enter_context(replacement(module).inside())
        yield


@cache
def replacement(module: ModuleType) -> InThread:
    """What takes the place of the switch, and of methods that ask it, in a module."""
    owners = [x for x in vars(module).values() if isinstance(x, type) and METHOD in vars(x)]
    owners = [x for x in owners if x.__module__ == module.__name__]
    return InThread((module, SWITCH, available), *((owner, METHOD, within) for owner in owners))


def within(function: Callable, layer: Any, *args: Any, **kwargs: Any) -> Any:
    """A layer's method, by which it is known who asks for attention, and from which query on."""
    start = kwargs.get("cache_update_index")
    token = CALL.set((layer, 0 if start is None else start))
    try:
        return function(layer, *args, **kwargs)
    finally:
        CALL.reset(token)


def available(function: Callable) -> bool:
    """Whether a layer is to call `keras.ops.dot_product_attention`."""
    return CALL.get() is not None or function()


def with_window(mask: Any) -> Any:
    """The mask that a layer gives `keras.ops.dot_product_attention`, with its sliding window.

    Qwen's layers keep to it in their own formula only.

    Args:
        mask: `(batch, 1, queries, keys)`, boolean.
    """
    layer, start = CALL.get() or (None, 0)
    if mask is None or not any(owner.__module__.startswith(f"{MODELS}qwen") for owner in type(layer).__mro__):
        return mask
    window = getattr(layer, "use_sliding_window_attention", True) and layer.sliding_window_size
    if not window or (mask.shape[3] is not None and mask.shape[3] <= window):
        return mask
    return tf.expand_dims(layer._mask_sliding_window(mask[:, 0], cache_update_index=start), 1)


def as_in_formula(output: tf.Tensor, mask: Any) -> tf.Tensor:
    """What `keras.ops.dot_product_attention` gives such a layer, with zeros for queries that see no key.

    Args:
        output: `(batch, queries, heads, features)`.
        mask: `(batch, 1, queries, keys)`.
    """
    if CALL.get() is None or mask is None:
        return output
    sees = tf.transpose(tf.reduce_any(tf.cast(mask, tf.bool), -1, keepdims=True), [0, 2, 1, 3])
    return tf.where(sees, output, tf.zeros((), output.dtype))


def drawn(function: Callable, logits: Any, *args: Any, **kwargs: Any) -> tf.Tensor:
    """`keras.random.categorical` for some prompts: what it draws for them among all."""
    rows, total = DRAWS.given.get()
    zeros = tf.zeros(tf.stack([total, tf.shape(logits)[1]]), logits.dtype)
    whole = tf.tensor_scatter_nd_update(zeros, rows[:, None], logits)  # a row may be there twice
    return tf.gather(function(whole, *args, **kwargs), rows)


DRAWS = InThread((keras.random, "categorical", drawn))
