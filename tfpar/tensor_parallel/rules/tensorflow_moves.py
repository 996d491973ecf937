"""Operations of TensorFlow that move elements: reshapes, transposes, slices, stacks."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tfpar.graph.keras_graph import Ref
from tfpar.planning.layout_search import Option
from tfpar.planning.sharding import REPLICATED, Layout
from tfpar.tensor_parallel.rank_graph import RankGraphBuilder, with_tensors
from tfpar.tensor_parallel.rules import Site, rule
from tfpar.tensor_parallel.rules.reshaping import kept
from tfpar.tensor_parallel.rules.tensorflow_ops import Operands, named


def patched(local: RankGraphBuilder, shape: Any, dim: int, size: Any) -> Any:
    """A shape, constant or tensor, with another size in one place."""
    if not isinstance(shape, Ref):
        return np.concatenate([shape[:dim], [size], shape[dim + 1 :]]).astype(np.int32)
    return Ref(local.make(Patched(dim, size), shape, shape=local.full[shape.tensor], dtype="int32"))


class Patched:
    """A shape with another size in one place."""

    __name__, variables = "shape", ()

    def __init__(self, dim: int, size: int):
        self.dim, self.size = dim, size

    def __call__(self, shape):
        shape = tf.cast(shape, tf.int32)
        return tf.concat([shape[: self.dim], [self.size], shape[self.dim + 1 :]], 0)


def run(site: Site, place: int, change: Any, layouts: Sequence[Layout]):
    """What each rank runs where one operand, a shape, has to be that of its part.

    Args:
        change: `(local, operand) -> operand`.
    """

    def build(local: RankGraphBuilder, inputs: list[int]):
        args = list(with_tensors(site.graph.calls[site.index], inputs)[0])
        args[place] = change(local, args[place])
        return local.run(site.layer, *args, like=site.op.outputs, layouts=layouts)

    return build


@rule(*named("Reshape"))
def reshape(site: Site) -> Iterator[Option]:
    """Along a dim that stays together."""
    of, after = Operands(site), site.outputs[0]
    before = of.shapes[0]
    pairs = kept((1, *before), (1, *after), site.ranks)  # all dims, also the first
    for d, e in ((d - 1, e - 1) for d, e in pairs):
        if of.divides(before, d):
            size = after[e] // site.ranks if not after[e] % site.ranks else -1
            shape = of.constant(1)
            if size == -1 and (shape is None or -1 in np.delete(shape, e)):
                continue

            def change(local: RankGraphBuilder, shape: Any, e: int = e, size: int = size) -> Any:
                return patched(local, shape, e, size)

            yield from of.option("reshape", [d], [e], run(site, 1, change, [Layout(e)]))


@rule(*named("Transpose"))
def transpose(site: Site) -> Iterator[Option]:
    """Along any dim."""
    of = Operands(site)
    if of.constant(1) is not None:
        yield from of.mapped("transpose", 0, [int(d) for d in of.constant(1)])


@rule(*named("ExpandDims"))
def expand(site: Site) -> Iterator[Option]:
    """Along any dim."""
    of = Operands(site)
    if of.constant(1) is not None:
        dims: list[int | None] = list(range(len(of.shapes[0])))
        dims.insert(int(of.constant(1)) % (len(dims) + 1), None)
        yield from of.mapped("reshape", 0, dims)


@rule(*named("Squeeze"))
def squeeze(site: Site) -> Iterator[Option]:
    """Along any dim that stays."""
    of = Operands(site)
    rank = len(of.shapes[0])
    gone = {int(d) % rank for d in of.operation.attribute("squeeze_dims")}
    if gone:
        yield from of.mapped("reshape", 0, [d for d in range(rank) if d not in gone])


@rule(*named("Pack"))
def pack(site: Site) -> Iterator[Option]:
    """Along the dims of what is stacked."""
    of, axis = Operands(site), site.layer.attribute("axis")
    rank = len(site.outputs[0])
    for after in range(rank):
        before = after - (after > axis % rank)
        if after != axis % rank and of.divides(of.shapes[0], before):
            yield from of.option("stack", [before] * len(of.args), [after])


@rule(*named("Unpack"))
def unpack(site: Site) -> Iterator[Option]:
    """Along the other dims."""
    of = Operands(site)
    rank = len(of.shapes[0])
    axis = of.operation.attribute("axis") % rank
    yield from of.mapped("stack", 0, [d for d in range(rank) if d != axis])


@rule(*named("ConcatV2"))
def concat(site: Site) -> Iterator[Option]:
    """Along the other dims."""
    of, (shape,) = Operands(site), site.outputs
    if of.constant(-1) is not None:
        for dim in range(len(shape)):
            if dim != int(of.constant(-1)) % len(shape) and of.divides(shape, dim):
                yield from of.option("concatenation", [dim] * (len(of.args) - 1), [dim])


@rule(*named("Split", "SplitV"))
def split(site: Site) -> Iterator[Option]:
    """Along the other dims."""
    of = Operands(site)
    value, axis = (1, of.constant(0)) if of.operation.type == "Split" else (0, of.constant(2))
    if axis is not None:
        rank = len(of.shapes[value])
        yield from of.mapped("split", value, [d if d != int(axis) % rank else None for d in range(rank)])


@rule(*named("Slice", "Tile", "Pad", "PadV2", "MirrorPad"))
def same_dims(site: Site) -> Iterator[Option]:
    """Along the dims that it leaves alone: those of which the size stays."""
    of = Operands(site)
    sizes = zip(of.shapes[0], site.outputs[0], strict=True)
    if of.operation.type != "Slice":
        yield from of.mapped("other dims", 0, [d if a == b else None for d, (a, b) in enumerate(sizes)])
        return
    for dim, (before, after) in enumerate(sizes):
        if before == after and of.divides(of.shapes[0], dim):
            whole = run(site, 2, lambda local, size, dim=dim: patched(local, size, dim, -1), [Layout(dim)])
            yield from of.option("other dims", [dim], [dim], whole)


@rule(*named("StridedSlice"))
def strided_slice(site: Site) -> Iterator[Option]:
    """Along dims of which everything is taken."""
    of = Operands(site)
    dims = slice_dims(of)
    if dims is not None:
        yield from of.mapped("other dims", 0, dims)


def slice_dims(of: Operands) -> list[int | None] | None:
    """For each dim of the result, the dim of the operand of which it is everything; `None` where that is not known."""
    begin, end, strides = map(of.constant, (1, 2, 3))
    if strides is None:
        return None
    masks = {
        name: of.operation.attribute(f"{name}_mask") for name in ("begin", "end", "ellipsis", "new_axis", "shrink_axis")
    }
    entries = len(strides)
    rest = len(of.shapes[0]) - sum(not (masks["new_axis"] | masks["ellipsis"]) >> n & 1 for n in range(entries))
    found: list[int | None] = []
    dim = 0
    for n in range(entries):
        bit = {name: bool(mask >> n & 1) for name, mask in masks.items()}
        if bit["ellipsis"]:
            found += range(dim, dim + rest)
            dim += rest
        elif bit["new_axis"]:
            found.append(None)
        else:
            first = bit["begin"] or (begin is not None and begin[n] == 0)
            last = bit["end"] or (end is not None and end[n] >= 2**30)
            if not bit["shrink_axis"]:
                found.append(dim if first and last and strides[n] == 1 else None)
            dim += 1
    return found + list(range(dim, len(of.shapes[0])))


@rule(*named("BroadcastTo"))
def broadcast(site: Site) -> Iterator[Option]:
    """Along any dim of the result with equal parts."""
    of, (shape,) = Operands(site), site.outputs
    for dim in range(len(shape)):
        before = dim - (len(shape) - len(of.shapes[0]))
        has = before >= 0 and of.shapes[0][before] != 1
        if of.divides(shape, dim) and not shape[dim] % site.ranks and has:
            size = shape[dim] // site.ranks
            change = run(site, 1, lambda local, s, dim=dim, size=size: patched(local, s, dim, size), [Layout(dim)])
            yield from of.option("broadcast", [before], [dim], change)


@rule(*named("GatherV2"))
def gather(site: Site) -> Iterator[Option]:
    """Along dims of the table that are not looked up in."""
    of = Operands(site)
    if of.constant(2) is None or of.operation.attribute("batch_dims"):
        return
    axis, more = int(of.constant(2)) % len(of.shapes[0]), len(of.shapes[1]) - 1
    for dim in range(len(of.shapes[0])):
        if dim != axis and of.divides(of.shapes[0], dim):
            yield from of.option("look-up of parts", [dim], [dim if dim < axis else dim + more])


@rule(*named("OneHot"))
def one_hot(site: Site) -> Iterator[Option]:
    """Along the dims of the indices."""
    of = Operands(site)
    dims: list[int | None] = list(range(len(of.shapes[0])))
    dims.insert(of.operation.attribute("axis") % (len(dims) + 1), None)
    yield from of.mapped("other dims", 0, dims)


@rule(*named("XlaDynamicUpdateSlice"))
def update(site: Site) -> Iterator[Option]:
    """Along dims of which everything is written."""
    of, (shape,) = Operands(site), site.outputs
    for dim, size in enumerate(shape):
        if size == of.shapes[1][dim] and of.divides(shape, dim):
            yield from of.option("update of parts", [dim, dim], [dim])


@rule(*named("Shape"))
def shape_of(site: Site) -> Iterator[Option]:
    """Of a part, that of the whole."""
    of = Operands(site)
    for dim, size in enumerate(of.shapes[0]):
        if of.divides(of.shapes[0], dim):

            def build(local: RankGraphBuilder, inputs: list[int], dim: int = dim, size: int = size) -> int:
                return local.run(
                    WholeShape(site.layer, dim, size), Ref(inputs[0]), like=site.op.outputs, layouts=[REPLICATED]
                )

            yield from of.option("shape", [dim], [None], build)


class WholeShape:
    """The shape of a tensor, of which there is a part along one dim."""

    variables = ()

    def __init__(self, operation: Any, dim: int, size: int):
        self.operation, self.patched = operation, Patched(dim, size)

    def __call__(self, x):
        shape = self.operation(x)
        return tf.cast(self.patched(shape), shape.dtype)
