"""Operations of TensorFlow, of which layers without a rule of their own are made."""

from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np

from tfpar.graph.keras_graph import Ref
from tfpar.planning.layout_search import Option
from tfpar.planning.sharding import REPLICATED, Layout
from tfpar.tensor_parallel.rank_graph import RankGraphBuilder, with_tensors
from tfpar.tensor_parallel.rules import Site, rule
from tfpar.tensor_parallel.rules.elementwise import ELEMENTWISE

REDUCTIONS = ("All", "Any", "EuclideanNorm", "Max", "Mean", "Min", "Prod", "Sum")


def named(*types: str) -> tuple[str, ...]:
    """The names of the rules for operations of these types."""
    return tuple(f"tf.{kind}" for kind in types)


class Operands:
    """What an operation of TensorFlow is given, tensors and constants.

    Args:
        site: the operation.
    """

    def __init__(self, site: Site):
        self.site, self.args = site, site.graph.calls[site.index].args
        self.operation = site.layer
        self.shapes = [site.shape(a.tensor) if isinstance(a, Ref) else np.shape(a) for a in self.args]

    def constant(self, place: int) -> Any:
        """The constant at a place; `None` for a tensor."""
        return None if isinstance(self.args[place], Ref) else self.args[place]

    def divides(self, shape: Sequence, dim: int) -> bool:
        """Whether ranks can divide a tensor of this shape along a dim, which is not that of the batch."""
        batch = self.site.graph.symbols[self.site.graph.graph.inputs[0]].shape[:1]
        return self.site.divides(shape[dim]) and (dim > 0 or tuple(shape[:1]) != tuple(batch))

    def option(
        self, name: str, given: Sequence[int | None], made: Sequence[int | None], build: Any = None, **options: Any
    ) -> Iterator[Option]:
        """The way in which operands and results are divided along these dims, if no constant has to be.

        Args:
            given: a dim for each operand, `None` for one that all ranks have; more are `None`.
            made: the same for each result.
        """
        dims = [d for d, _ in zip_longest(given, self.args)]
        if all(d is None or isinstance(a, Ref) for d, a in zip(dims, self.args, strict=True)):
            inputs = [Layout(d) for d, a in zip(dims, self.args, strict=True) if isinstance(a, Ref)]
            yield self.site.option(name, inputs, [Layout(d) for d in made], build=build, **options)

    def mapped(self, name: str, place: int, dims: Sequence[int | None], build: Any = None) -> Iterator[Option]:
        """For each dim of the results, along the dim of the operand that it is; `None` for one that it is not.

        Args:
            build: gives, for a dim of the results, what builds the option.
        """
        for after, before in enumerate(dims):
            if before is not None and self.divides(self.shapes[place], before):
                given = [None] * place + [before]
                made = [after] * len(self.site.outputs)
                yield from self.option(name, given, made, build and build(after))


@rule(*named(*ELEMENTWISE))
def elementwise(site: Site) -> Iterator[Option]:
    """Along any dim but the batch's, operands as their broadcasting demands."""
    of, (shape,) = Operands(site), site.outputs
    for dim in range(len(shape)):
        places = [dim - (len(shape) - len(s)) for s in of.shapes]
        given = [p if p >= 0 and s[p] != 1 else None for p, s in zip(places, of.shapes, strict=True)]
        known = all(d is None or s[d] is not None for d, s in zip(given, of.shapes, strict=True))
        if known and of.divides(shape, dim) and any(d is not None for d in given):
            yield from of.option("elementwise", given, [dim])


@rule(*named("Softmax", "LogSoftmax", "TopKV2"))
def but_last(site: Site) -> Iterator[Option]:
    """Along the dims but the last."""
    rank = len(site.inputs[0])
    yield from Operands(site).mapped("softmax of other dims", 0, [*range(rank - 1), None])


@rule(*named(*REDUCTIONS, "ArgMax", "ArgMin"))
def reduction(site: Site) -> Iterator[Option]:
    """Along the dims that stay; along one that does not with a sum over ranks."""
    of = Operands(site)
    rank, axes = len(of.shapes[0]), of.constant(1)
    if axes is None:
        return
    axes = {int(a) % rank for a in np.ravel(axes)}
    keeps = of.operation.type not in ("ArgMax", "ArgMin") and of.operation.attribute("keep_dims")
    stay = [d if d not in axes else None for d in range(rank) if keeps or d not in axes]
    yield from of.mapped("reduction", 0, stay)


@rule(*named("Cumsum", "Cumprod"))
def cumulative(site: Site) -> Iterator[Option]:
    """Along the other dims."""
    of = Operands(site)
    if of.constant(1) is not None:
        rank = len(of.shapes[0])
        yield from of.mapped("cumulative", 0, [d if d != int(of.constant(1)) % rank else None for d in range(rank)])


@rule(*named("MatMul", "BatchMatMulV2", "BatchMatMulV3", "Einsum"))
def product(site: Site) -> Iterator[Option]:
    """Along a letter that the result has, operands without it whole; along one that it does not, then added up."""
    of = Operands(site)
    equation = equation_of(of)
    if equation is None:
        return
    sources, target = equation
    where = [{letter: at for at, letter in enumerate(source)} for source in sources]
    sizes: dict[str, Any] = {}
    for places, shape in zip(where, of.shapes, strict=True):
        for letter, at in places.items():
            if shape[at] != 1:
                sizes[letter] = of.divides(shape, at) and sizes.get(letter, True)
    for letter in dict.fromkeys("".join(sources)):
        given = [
            p.get(letter) if letter in p and s[p[letter]] != 1 else None for p, s in zip(where, of.shapes, strict=True)
        ]
        if not sizes.get(letter):
            continue
        if letter in target:
            yield from of.option("product", given, [target.index(letter)])
        elif None not in given:
            for left in site.sequences():
                moved = site.bytes(site.op.outputs[0]) * (2 if left == REPLICATED else 2.01)
                yield from of.option("row-parallel", given, [left.dim], summed_up(site, left), moved=moved)


def summed_up(site: Site, layout: Layout):
    """What each rank runs where the sum of what ranks find is the result."""

    def build(local: RankGraphBuilder, inputs: list[int]) -> int:
        args, _ = with_tensors(site.graph.calls[site.index], inputs)
        return local.reduced(local.run(site.layer, *args, like=site.op.outputs, layouts=[REPLICATED]), layout)

    return build


def equation_of(of: Operands) -> tuple[list[str], str] | None:
    """The letters of the dims of the operands and of the result of a product; `None` if that is not known."""
    ranks = [len(shape) for shape in of.shapes]
    if of.operation.type == "Einsum":
        sources, target = of.operation.attribute("equation").decode().replace(" ", "").split("->")
        sources = sources.split(",")
        free = [rank - len(s.replace("...", "")) for s, rank in zip(sources, ranks, strict=True)]
        most = max([n for n, s in zip(free, sources, strict=True) if "..." in s], default=0)
        spread = [s.replace("...", "0123456789"[most - n : most]) for n, s in zip(free, sources, strict=True)]
        target = target.replace("...", "0123456789"[:most])
        return (spread, target) if all(len(set(s)) == len(s) for s in (*spread, target)) else None
    names = ("transpose_a", "transpose_b") if of.operation.type == "MatMul" else ("adj_x", "adj_y")
    turned = [of.operation.attribute(name) for name in names]
    most = max(ranks) - 2
    batch = ["0123456789"[most - (rank - 2) : most] for rank in ranks]
    ends = [end[::-1] if turn else end for end, turn in zip(("ik", "kj"), turned, strict=True)]
    return [b + e for b, e in zip(batch, ends, strict=True)], "0123456789"[:most] + "ij"


@rule("tf.Read")
def read(site: Site) -> Iterator[Option]:
    """A weight along any dim."""
    (variable,) = site.graph.calls[site.index].args
    for dim, size in enumerate(variable.shape):
        if site.divides(size):
            yield site.option("read", outputs=[Layout(dim)], weights=[(variable, dim)])
