"""What moves elements, or combines those along other dims: reshapes, transposes, reductions, products."""

from collections.abc import Iterator, Sequence
from math import prod

import numpy as np
import tensorflow as tf
from keras import layers, ops

from tfpar.graph.keras_graph import Ref
from tfpar.planning.layout_search import Option
from tfpar.planning.sharding import REPLICATED, Layout
from tfpar.tensor_parallel.rank_graph import RankGraphBuilder
from tfpar.tensor_parallel.rules import Site, rule
from tfpar.tensor_parallel.rules.elementwise import along_each_dim, but


def kept(before: Sequence, after: Sequence, ranks: int) -> Iterator[tuple[int, int]]:
    """Pairs of a dim before a reshape and one after it, such that a part along the first is a part along the second.

    They begin at the same element, and either are as long, or the shorter one has a multiple of `ranks` elements.

    Example:
        >>> list(kept((None, 6, 8), (None, 6, 4, 2), 2))
        [(1, 1), (2, 2)]
    """
    for d in range(1, len(before)):
        for e in range(1, len(after)):
            sizes = before[d], after[e]
            starts = [(prod(filter(None, s[:k])), s[:k].count(None)) for s, k in ((before, d), (after, e))]
            if None in sizes or starts[0] != starts[1]:
                continue
            rest = [prod(filter(None, s[k + 1 :])) for s, k in ((before, d), (after, e))]
            if sizes[0] * rest[0] != sizes[1] * rest[1]:
                continue
            if sizes[0] == sizes[1] >= ranks or (not sizes[0] % ranks and not sizes[1] % ranks):
                yield d, e


class ReshapedPart:
    """A reshape of a part of a tensor along one dim; `shape` is that of the whole."""

    variables = ()

    def __init__(self, shape: Sequence, dim: int):
        self.shape, self.dim = shape, dim

    def __call__(self, x):
        shape = [-1 if d == self.dim else n for d, n in enumerate(self.shape)]
        return ops.reshape(x, [tf.shape(x)[0], *shape[1:]])


@rule(layers.Reshape, layers.Flatten, "Reshape", "Ravel", "ExpandDims", "Squeeze")
def reshape(site: Site) -> Iterator[Option]:
    """Along a dim that stays together."""
    before, after = site.inputs[0], site.outputs[0]
    if before[0] != after[0] or None in after[1:]:
        return

    def build(e: int):
        def reshaped(local: RankGraphBuilder, inputs: list[int]) -> int:
            return local.run(ReshapedPart(after, e), Ref(inputs[0]), like=site.op.outputs, layouts=[Layout(e)])

        return reshaped

    for d, e in kept(before, after, site.ranks):
        yield site.option("reshape", [Layout(d)], [Layout(e)], build=build(e))


def moved_dims(site: Site, order: Sequence[int], name: str) -> Iterator[Option]:
    """Along any dim of a transpose; output dim `k` is input dim `order[k]`."""
    for after, before in enumerate(order):
        if after and before and site.divides(site.inputs[0][before]):
            yield site.option(name, [Layout(before)], [Layout(after)])


@rule(layers.Permute)
def permute(site: Site) -> Iterator[Option]:
    """Along any dim."""
    yield from moved_dims(site, [0, *site.layer.dims], "transpose")


@rule("Transpose", "Swapaxes", "Moveaxis")
def transpose(site: Site) -> Iterator[Option]:
    """Along any dim; the order is seen from what the operation does with the numbers of the dims."""
    rank = len(site.inputs[0])
    sizes = tf.zeros([d + 2 for d in range(rank)])  # no two dims are alike
    order = [n - 2 for n in site.layer(sizes).shape] if rank < 8 else []
    yield from moved_dims(site, order, "transpose")


@rule(layers.RepeatVector)
def repeat(site: Site) -> Iterator[Option]:
    """Along the features."""
    if site.divides(site.inputs[0][1]):
        yield site.option("repeat", [Layout(1)], [Layout(2)])


@rule(layers.Concatenate, "Concatenate")
def concatenate(site: Site) -> Iterator[Option]:
    """Along the other dims."""
    rank, axis = len(site.outputs[0]), site.layer.axis
    for dim in range(1, rank):
        if axis is not None and dim != axis % rank and site.divides(site.outputs[0][dim]):
            yield site.option("concatenation", [Layout(dim)] * len(site.inputs), [Layout(dim)])


@rule("Split")
def split(site: Site) -> Iterator[Option]:
    """Along the other dims."""
    yield from but(along_each_dim(site, "split"), [site.layer.axis % len(site.inputs[0])])


@rule("Mean", "Sum", "Max", "Min", "Var", "Std", "Prod", "Logsumexp", "Amax", "Amin")
def reduction(site: Site) -> Iterator[Option]:
    """Along the dims that stay."""
    before, axis = site.inputs[0], site.layer.axis
    if axis is None:
        return
    axes = {a % len(before) for a in np.ravel(axis)}
    for dim in range(1, len(before)):
        if dim not in axes and site.divides(before[dim]):
            after = dim if site.layer.keepdims else dim - sum(a < dim for a in axes)
            if after:
                yield site.option("reduction", [Layout(dim)], [Layout(after)])


@rule("Matmul")
def matmul(site: Site) -> Iterator[Option]:
    """Of two stacks of matrices, along the stack; of one with all the rest, along the rows."""
    if len(site.inputs) != 2 or len({len(shape) for shape in (*site.inputs, *site.outputs)}) > 1:
        return
    rank = len(site.outputs[0])
    for dim in range(1, rank - 2):
        if site.inputs[0][dim] == site.inputs[1][dim] and site.divides(site.outputs[0][dim]):
            yield site.option("stack of products", [Layout(dim)] * 2, [Layout(dim)])
    if site.divides(site.outputs[0][-2]) and rank > 2:
        rows = Layout(rank - 2)
        yield site.option("rows", [rows, REPLICATED], [rows])


@rule("Einsum")
def einsum(site: Site) -> Iterator[Option]:
    """Along a letter that the output has; inputs without it are needed whole."""
    equation = site.layer.subscripts.replace(" ", "")
    if "..." in equation or "->" not in equation or len(site.inputs) != equation.count(",") + 1:
        return
    sources, target = equation.split("->")
    sources = sources.split(",")
    for at, letter in enumerate(target):
        places = [source.find(letter) for source in sources]
        if at and 0 not in places and site.divides(site.outputs[0][at]):
            yield site.option("einsum", [Layout(p) if p > 0 else REPLICATED for p in places], [Layout(at)])


@rule("DotProductAttention")
def dot_product_attention(site: Site) -> Iterator[Option]:
    """By heads, dim 2 of queries, keys and values."""
    heads = {shape[2] for shape in site.inputs[:3]}
    if len(site.inputs) == 3 and len(heads) == 1 and site.divides(*heads):
        yield site.option("heads", [Layout(2)] * 3, [Layout(2)])
