"""How much a Keras layer computes, from the shapes of its weights and of what goes in and out."""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import keras

Shape = Sequence[int]  # without the batch


def kernels(layer: keras.layers.Layer) -> int:
    """Elements of the weights that multiply an input: those of two dimensions or more, without biases."""
    return sum(prod(w.shape) for w in layer.weights if len(w.shape) > 1 and "bias" not in w.name)


def per_position(layer: Any, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> float:
    """Every kernel applied at every position of the input: dense and recurrent layers, and layers made of layers."""
    return 2.0 * kernels(layer) * prod(inputs[0][:-1])


def convolution(layer: Any, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> float:
    """The kernel applied at every position of the output."""
    spatial = outputs[0][:-1] if layer.data_format == "channels_last" else outputs[0][1:]
    return 2.0 * kernels(layer) * prod(spatial)


def transposed_convolution(layer: Any, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> float:
    """The kernel applied at every position of the input."""
    return convolution(layer, outputs, inputs)


def einsum(layer: Any, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> float:
    """The kernel applied at every position that input and output share."""
    source, rest = layer.equation.replace(" ", "").split(",")
    _, target = rest.split("->")
    dims = dict(zip(source.replace("...", "")[-len(inputs[0]) :], inputs[0], strict=False))
    return 2.0 * kernels(layer) * prod(size for letter, size in dims.items() if letter in target)


def attention(layer: Any, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> float:
    """The projections, and every query position with every key position."""
    query, value = inputs[0], inputs[1] if len(inputs) > 1 else inputs[0]
    width = outputs[0][-1] if outputs else query[-1]
    return 2.0 * kernels(layer) * prod(query[:-1]) + 4.0 * prod(query[:-1]) * prod(value[:-1]) * width


def nothing(layer: Any, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> float:
    """A look-up."""
    return 0.0


RULES: dict[type, Callable[..., float]] = {
    keras.layers.Embedding: nothing,
    keras.layers.EinsumDense: einsum,
    keras.layers.MultiHeadAttention: attention,
    keras.layers.GroupQueryAttention: attention,
    **dict.fromkeys(
        (keras.layers.Conv1DTranspose, keras.layers.Conv2DTranspose, keras.layers.Conv3DTranspose),
        transposed_convolution,
    ),
    **dict.fromkeys(
        (
            keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D,
            keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D,
            keras.layers.SeparableConv1D, keras.layers.SeparableConv2D,
        ),
        convolution,
    ),
}  # fmt: skip


def flops(operation: Any, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> float:
    """Floating-point operations of one sample's forward pass; 0 for what only moves or maps elements.

    Args:
        operation: a layer or a `keras.ops` operation.
        inputs, outputs: shapes without the batch.
    """
    if not isinstance(operation, keras.layers.Layer) or not operation.weights or not inputs:
        return 0.0
    rule = next((RULES[c] for c in type(operation).__mro__ if c in RULES), per_position)
    return rule(operation, inputs, outputs)
