"""Dense and EinsumDense: by columns (outputs) or rows (inputs) of the kernel.

Shoeybi et al., "Megatron-LM: Training Multi-Billion Parameter Language Models Using Model Parallelism", section 3.
"""

from collections.abc import Iterator
from typing import Any

import keras
from keras import ops

from tfpar.compat import _keras, _keras_parts
from tfpar.compat._keras_layers import ToldTraining
from tfpar.compat._keras_layers import kernel as kernel_of
from tfpar.graph.keras_graph import Ref
from tfpar.planning.layout_search import Option
from tfpar.planning.sharding import REPLICATED, Layout
from tfpar.tensor_parallel.rank_graph import RankGraphBuilder
from tfpar.tensor_parallel.rules import Site, rule
from tfpar.tensor_parallel.rules.elementwise import is_elementwise


class WithoutEnd(ToldTraining):
    """A layer's call on a part of the weights, before bias and activation."""

    def __init__(self, call: Any, also: dict | None = None):
        self.call, self.end = call, {"bias": None, "activation": None} | (also or {})
        bias = call.operation.bias
        self.variables = [v for v in call.variables if v is not bias]

    def __call__(self, *args, training=None, **kwargs):
        layer = self.call.operation
        with _keras_parts.unchecked(layer), _keras_parts.replaced(layer, **self.end):
            return _keras.call_operation(layer, args, kwargs, training, self.call.explicit)


class End:
    """A layer's bias and activation."""

    def __init__(self, layer: Any, channels: int = -1, bias: bool = True):
        self.layer, self.channels = layer, channels
        self.bias = layer.bias if bias else None
        self.variables = [] if self.bias is None else [self.bias]

    def __call__(self, x):
        y = x
        with _keras.autocast_of(self.layer):
            if self.bias is not None:
                shape = [1] * len(x.shape)
                if len(self.bias.shape) == 1:
                    shape[self.channels] = self.bias.shape[0] if self.bias.shape[0] == x.shape[self.channels] else -1
                else:
                    shape[len(shape) - len(self.bias.shape) :] = self.bias.shape
                y = ops.add(y, ops.reshape(self.bias, shape))  # as Keras: a float32 layer in a model of bfloat16
            if self.layer.activation is not None:
                y = self.layer.activation(y)
        return _keras.with_mask_of(x, y)  # a layer without its end has set what it hands on


def summed_up(site: Site, layout: Layout, channels: int, also: dict):
    """What each rank runs where the sum of what ranks find is the layer's output before bias and activation."""
    call = site.graph.calls[site.index]

    def build(local: RankGraphBuilder, inputs: list[int]) -> int:
        x = local.run(WithoutEnd(call, also), Ref(inputs[0]), like=site.op.outputs, layouts=[REPLICATED])
        x = local.reduced(x, layout)
        if site.layer.bias is None and site.layer.activation is None:
            return x
        return local.run(End(site.layer, channels), Ref(x), like=site.op.outputs, layouts=[layout])

    return build


def activated_after(site: Site, channels: int = -1):
    """What each rank runs where an activation needs all of what ranks find in parts."""
    call, part = site.graph.calls[site.index], Layout(channels % len(site.outputs[0]))

    def build(local: RankGraphBuilder, inputs: list[int]) -> int:
        without = WithoutActivation(call)
        x = local.run(without, Ref(inputs[0]), like=site.op.outputs, layouts=[part])
        if site.layer.activation is keras.activations.softmax:
            local.logits[site.op.outputs[0]] = x
        x = local.all_gather(x)
        return local.run(End(site.layer, bias=False), Ref(x), like=site.op.outputs, layouts=[REPLICATED])

    return build


class WithoutActivation(WithoutEnd):
    """A layer's call on a part of the weights, before the activation."""

    def __init__(self, call: Any):
        super().__init__(call)
        self.end, self.variables = {"activation": None}, call.variables


def by_columns(site: Site, layout: Layout, weights: list) -> Iterator[Option]:
    """Each rank makes a part of the outputs."""
    if is_elementwise(site.layer.activation):
        yield site.option("column-parallel", outputs=[layout], weights=weights)
    else:
        moved, build = site.bytes(site.op.outputs[0]), activated_after(site, layout.dim)
        yield site.option("column-parallel, gathered", weights=weights, moved=moved, build=build, exchanges=1)


def by_rows(site: Site, layout: Layout, weights: list, channels: int = -1, also: dict | None = None):
    """Each rank has a part of the inputs, and outputs are added up."""
    # what follows the sum must treat the sequence's elements one by one
    plain = is_elementwise(site.layer.activation) and channels in (-1, len(site.outputs[0]) - 1)
    plain = plain and (site.layer.bias is None or len(site.layer.bias.shape) == 1)
    for left in site.sequences() if plain else [REPLICATED]:
        moved = site.bytes(site.op.outputs[0]) * (2 if left == REPLICATED else 2.01)
        build = summed_up(site, left, channels, also or {})
        yield site.option("row-parallel", [layout], [left], weights, moved, build)


@rule(keras.layers.Dense)
def dense(site: Site) -> Iterator[Option]:
    """The kernel `(inputs, units)` by its columns or its rows, the LoRA matrices accordingly."""
    layer, last = site.layer, len(site.inputs[0]) - 1
    lora = (layer.lora_kernel_a, layer.lora_kernel_b) if layer.lora_enabled else (None, None)
    if site.divides(layer.units):
        yield from by_columns(site, Layout(last), [(kernel_of(layer), 1), (layer.bias, 0), (lora[1], 1)])
    if site.divides(site.inputs[0][-1]):
        yield from by_rows(site, Layout(last), [(kernel_of(layer), 0), (lora[0], 0)])


@rule(keras.layers.EinsumDense)
def einsum_dense(site: Site) -> Iterator[Option]:
    """The kernel along any letter of the equation, the LoRA matrix that has this letter accordingly."""
    layer = site.layer
    source, kernel, target = letters(layer.equation, len(site.inputs[0]), len(site.outputs[0]))
    bias = (
        {} if layer.bias is None else dict(zip(bias_letters(layer, target), range(len(layer.bias.shape)), strict=False))
    )
    for at, letter in enumerate(kernel):
        if not site.divides(kernel_of(layer).shape[at]) or source.find(letter) == 0:
            continue
        weights = [(kernel_of(layer), at)]
        if layer.lora_enabled:
            weights.append((layer.lora_kernel_b, 1) if at == len(kernel) - 1 else (layer.lora_kernel_a, at))
        if letter in target:
            if letter in bias:  # else it is the same for every part
                weights.append((layer.bias, bias[letter]))
            inputs = [Layout(source.find(letter))] if letter in source else None
            if is_elementwise(layer.activation):
                yield site.option("column-parallel", inputs, [Layout(target.find(letter))], weights)
        elif letter in source:
            yield from by_rows(site, Layout(source.find(letter)), weights)


def bias_letters(layer: Any, target: str) -> str:
    """The letters of the dims of a bias, which end with the output's last."""
    axes = "".join(c for c in target if c in layer.bias_axes)
    first = min((target.index(c) for c in axes), default=len(target))
    return target[first:]


def letters(equation: str, inputs: int, outputs: int) -> tuple[str, str, str]:
    """The letters of an equation's input, kernel and output, a digit for each dim that an ellipsis stands for."""
    left, target = equation.replace(" ", "").split("->")
    source, kernel = left.split(",")
    filled = [
        side.replace("...", "".join(map(str, range(rank - len(side.replace("...", ""))))))
        for side, rank in ((source, inputs), (target, outputs))
    ]
    return filled[0], kernel.replace("...", ""), filled[1]
