"""Private parts of Keras' layers, which rules divide. Checked against Keras 3.15.1.

`tests/compat/test_keras_layers.py` tests each.
"""

from collections.abc import Callable, Iterator
from typing import Any

import keras


class ToldTraining:
    """A callable that Keras tells whether it is in training, as it tells a layer whose `call` has that argument."""

    _call_context_args = ("training",)


def is_told_training(operation: Any) -> bool:
    """Whether an operation takes an argument `training`."""
    return "training" in getattr(operation, "_call_context_args", ())


def kernel(layer: keras.layers.Layer) -> keras.Variable:
    """The kernel of a Dense, EinsumDense or convolution; `layer.kernel` is a sum where LoRA is enabled."""
    return layer._kernel


def table(layer: keras.layers.Layer) -> keras.Variable:
    """The table of an Embedding, (vocabulary, features)."""
    return layer._embeddings


def heads(layer: keras.layers.Layer) -> int:
    """How many heads a MultiHeadAttention has."""
    return layer._num_heads


def output_projection(layer: keras.layers.Layer) -> keras.layers.EinsumDense:
    """What an attention layer sums its heads up with."""
    return layer._output_dense


def input_projections(layer: keras.layers.Layer, *of: str) -> Iterator[keras.layers.EinsumDense]:
    """Of "query", "key", "value" and "gate", those projections of an attention layer that it has."""
    for name in of:
        dense = getattr(layer, f"_{name}_dense", None)
        if dense is not None:
            yield dense


def compute_attention(layer: keras.layers.Layer) -> tuple[str, Callable]:
    """The name, and the function, with which an attention layer goes from queries, keys and values to its output."""
    return "_compute_attention", type(layer)._compute_attention
