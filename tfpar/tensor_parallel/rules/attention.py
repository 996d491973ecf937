"""Attention: by heads."""

from collections.abc import Iterator
from typing import Any

import tensorflow as tf
from keras import layers

from tfpar.compat import _keras, _keras_parts
from tfpar.compat._keras_layers import (
    ToldTraining,
    compute_attention,
    heads,
    input_projections,
    kernel,
    output_projection,
)
from tfpar.graph.keras_graph import Ref
from tfpar.planning.layout_search import Option
from tfpar.planning.sharding import REPLICATED, Layout, bounds
from tfpar.tensor_parallel.rank_graph import RankGraphBuilder, with_tensors
from tfpar.tensor_parallel.rules import Site, rule
from tfpar.tensor_parallel.rules.dense import End
from tfpar.tensor_parallel.rules.tensorflow_ops import Operands


class OfHeads(ToldTraining):
    """An attention layer's call for this rank's heads, before the bias of its output projection."""

    def __init__(self, call: Any, ranks: int):
        self.call, self.ranks = call, ranks
        bias = output_projection(call.operation).bias
        self.variables = [v for v in call.variables if v is not bias]

    def __call__(self, *args, training=None, **kwargs):
        layer = self.call.operation
        with _keras_parts.unchecked(layer), _keras_parts.replaced(output_projection(layer), bias=None):
            return _keras.call_operation(layer, args, kwargs, training, self.call.explicit)


class OfQueryHeads(OfHeads):
    """The same where ranks share key and value heads: each has all of them, and takes those of its query heads."""

    def __call__(self, rank, *args, **kwargs):
        layer = self.call.operation
        edges = tf.stack(bounds(layer.num_query_heads, self.ranks))
        name, original = compute_attention(layer)

        def attention(query, key, value, **kwargs):
            mine = slice(edges[rank], edges[rank + 1])
            return original(layer, query, key[:, :, mine], value[:, :, mine], **kwargs)

        with _keras_parts.given_method(layer, name, attention):
            return super().__call__(*args, **kwargs)


def by_heads(site: Site, weights: list, kind: type = OfHeads) -> Iterator[Option]:
    """Each rank computes some heads, and its part of the output projection; the sum of these is the output."""
    call, output = site.graph.calls[site.index], output_projection(site.layer)

    def build(layout: Layout):
        def of_heads(local: RankGraphBuilder, inputs: list[int]) -> int:
            args, kwargs = with_tensors(call, inputs)
            rank = [Ref(local.rank())] if kind is OfQueryHeads else []
            run = kind(call, site.ranks)
            x = local.run(run, *rank, *args, like=site.op.outputs, layouts=[REPLICATED], **kwargs)
            x = local.reduced(x, layout)
            return x if output.bias is None else local.run(End(output), Ref(x), like=site.op.outputs, layouts=[layout])

        return of_heads

    for left in site.sequences():
        moved = site.bytes(site.op.outputs[0]) * (2 if left == REPLICATED else 2.01)
        yield site.option("heads", None, [left], weights, moved, build(left))


def projections(layer: Any, *names: str) -> list[tuple[Any, int]]:
    """The kernels `(features, heads, …)` and biases `(heads, …)` of these projections, along their heads."""
    found = []
    for dense in input_projections(layer, *names):
        found.append((kernel(dense), 1))
        if dense.bias is not None:
            found.append((dense.bias, 0))
    return found


def usual(site: Site, layer: Any) -> bool:
    """Whether the call is one whose output is a sum over heads."""
    plain = all(not d.lora_enabled for d in _keras.layers_in(layer) if isinstance(d, layers.EinsumDense))
    mask = site.arguments.get("attention_mask")
    if len(site.shape(mask.tensor) if isinstance(mask, Ref) else getattr(mask, "shape", ())) > 3:
        return False  # it has heads of its own
    return plain and not site.arguments.get("return_attention_scores") and len(site.op.outputs) == 1


@rule(layers.MultiHeadAttention)
def multi_head_attention(site: Site) -> Iterator[Option]:
    """Queries, keys and values by heads."""
    layer = site.layer
    if usual(site, layer) and site.divides(heads(layer)) and len(site.outputs[0]) == 3:
        inward = projections(layer, "query", "key", "value", "gate")
        yield from by_heads(site, [*inward, (kernel(output_projection(layer)), 0)])


@rule(layers.GroupQueryAttention)
def grouped_query_attention(site: Site) -> Iterator[Option]:
    """Groups of heads; where there are fewer key and value heads than ranks, those are on all of them."""
    layer = site.layer
    if not usual(site, layer) or not site.divides(layer.num_query_heads):
        return
    queries = [*projections(layer, "query", "gate"), (kernel(output_projection(layer)), 0)]
    if site.divides(layer.num_key_value_heads) and not layer.num_key_value_heads % site.ranks:
        yield from by_heads(site, [*queries, *projections(layer, "key", "value")])
    else:
        yield from by_heads(site, queries, OfQueryHeads)


@rule("tf.dot_product_attention")
def products(site: Site) -> Iterator[Option]:
    """Heads of queries with their own of keys and values: one of each, or groups."""
    of = Operands(site)
    queries, keys = of.shapes[0][2], of.shapes[1][2]
    groups = queries is not None and keys is not None and not queries % site.ranks and not keys % site.ranks
    broadcast = of.shapes[3:6]  # a bias, a mask and a scale
    known = all(len(s) < 3 or s[-3] is not None for s in broadcast)
    if known and (queries == keys or groups) and of.divides(of.shapes[0], 2):
        added = [len(s) - 3 if len(s) > 2 and s[-3] != 1 else None for s in broadcast]
        yield from of.option("heads", [2, 2, 2, *added], [2])
