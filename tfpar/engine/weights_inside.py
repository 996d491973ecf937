"""What a program that holds its collectives exchanges of weights: shards of their values, and gradients."""

# v: variable of the graph, c: part of the way

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import tensorflow as tf

from tfpar.comm.collectives import elements_of
from tfpar.comm.gradients import SharedRows
from tfpar.comm.in_program import Gang
from tfpar.compat import _keras
from tfpar.compat._tf import recompute_values
from tfpar.engine.combination import shares_rows
from tfpar.engine.program import Program
from tfpar.engine.remat import fewest_bytes
from tfpar.engine.vjp import portions
from tfpar.engine.weight_edge import edge_of
from tfpar.planning.mesh import AXES, dividing

if TYPE_CHECKING:
    from tfpar.engine.executor import Execution

ALONE = 2**22  # elements of a tensor that has a sum of its own: XLA copies those of one into one buffer first


class GatheredWeights:
    """Weights of which replicas have shards, put together for each part of the way that reads them (ZeRO 3).

    Those of the next part are on their way while a part is computed; on the way back they are gathered once more, so
    that a lane has those of few parts at a time.

    Args:
        run: whose.
        program: of the whole way.
        values: what the lane has of each variable.
        lane: its number.
        parts: the variables of each part.
    """

    def __init__(
        self,
        run: "Execution",
        program: Program,
        values: dict[int, tf.Tensor],
        lane: tf.Tensor,
        parts: Sequence[Sequence[int]],
    ):
        self.gang, self.reads, self.values, self.lane = program.gang, program.reads, values, lane
        edges = {v: edge_of(run.engine, v, run.in_parts) for v in values}
        self.dims = {
            v: (axis, _keras.stored(edge.variable).sharding.dims[axis])
            for v, edge in edges.items()
            for axis in dividing("samples")
            if edge.forward(axis) == "all-gather"
        }
        self.parts = [[v for v in part if v in self.dims] for part in parts]
        self.there: dict[tuple[str, int], dict[int, tf.Tensor]] = {}

    def forward(self, c: int) -> dict[int, tf.Tensor]:
        """The weights of a part on the way forward."""
        for n in (c, c + 1):
            if self.dims and n < len(self.parts) and ("forward", n) not in self.there:
                self.there["forward", n] = self.gathered(("forward", n), self.parts[n], ())
        return self.there.get(("forward", c), {})

    def ahead(self, c: int, cotangents: Sequence[tf.Tensor]):
        """Gather those of the part that comes before, now that these cotangents arrive at a part on the way back."""
        if self.dims and c and ("backward", c - 1) not in self.there:
            self.there["backward", c - 1] = self.gathered(("backward", c - 1), self.parts[c - 1], cotangents[:1])

    def let_go(
        self, c: int, forward: Sequence[tf.Operation], taken: Sequence[tf.Tensor], backward: Sequence[tf.Operation],
        cotangents: Sequence[tf.Tensor],
    ):  # fmt: skip
        """Hold on to little between the ways forward and back through a part, but for the last, which turns around.

        What was gathered is gathered again; what cheap operations make of other tensors, or of weights, is made again.

        Args:
            forward, backward: the operations of both ways.
            taken: what those forward take that is not there anyway.
            cotangents: what arrives on the way back.
        """
        if c >= len(self.parts) - 1:
            return
        own = {x.name for op in forward for x in op.outputs} | {x.name for x in taken}
        there = {x.name: x for op in forward for x in op.inputs if x.name not in own}
        ends = {x.name: x for op in backward for x in op.inputs if x.name in own}
        kept = [x for x in fewest_bytes(list(ends.values()), taken, there) if self.gang.can_wait(x)]
        pairs = {x.name: (x, x) for x in there.values()}
        pairs.update({x.name: (x, y) for x, y in zip(kept, self.gang.after(kept, cotangents[:1]), strict=True)})
        first, again = (self.there.get((way, c), {}) for way in ("forward", "backward"))
        pairs.update({first[v].name: (first[v], again[v]) for v in first})
        recompute_values(backward, forward, list(pairs.values()))

    def gathered(self, name: Any, variables: Sequence[int], after: Sequence[tf.Tensor]) -> dict[int, tf.Tensor]:
        """All that a rank has of these variables, exchanged in the dtype in which layers read them."""
        found = {}
        own = [self.values[v] for v in variables]
        given = dict(zip(variables, self.gang.after(own, after), strict=True))
        for (axis, dtype), same in grouped(variables, lambda v: (self.dims[v][0], self.dtype(v))).items():
            for some in portions({v: given[v] for v in same}):
                parts = {(name, v): (tf.cast(given[v], dtype), self.dims[v][1]) for v in some}
                whole = self.gang.gathered(axis, parts, self.lane)
                found.update({v: tf.identity(tf.cast(x, given[v].dtype)) for (_, v), x in whole.items()})
        return found

    def dtype(self, v: int) -> tf.DType:
        """In which dtype a variable is exchanged."""
        return tf.as_dtype(self.reads.get(v, self.values[v].dtype))


def exchanged(
    run: "Execution", program: Program, gradients: dict[int, Any], own: dict[int, tf.Tensor], lane: tf.Tensor | None
) -> dict[int, Any]:  # fmt: skip
    """The gradients of weights, summed or summed and divided over each axis; which are said in `program.exchanged`.

    Sparse ones only where the program ends with the update: devices add those up otherwise.

    Args:
        own: what the lane has of variables that are updated.
        lane: its number.
    """
    gang, found = program.gang, dict(gradients)
    if gang is None:
        return found
    last_first = sorted(gradients, key=run.engine.first_used.__getitem__, reverse=True)
    edges = {v: edge_of(run.engine, v, run.in_parts) for v in last_first}
    for axis in reversed(gang.groups):
        kinds = grouped(last_first, lambda v: edges[v].backward(axis))  # noqa: B023
        dense = {kind: [v for v in of if isinstance(found[v], tf.Tensor)] for kind, of in kinds.items()}
        for kind in ("reduce-scatter", "all-reduce"):
            for dtype, same in grouped(dense.get(kind, ()), lambda v: found[v].dtype).items():
                parted = portions if kind == "reduce-scatter" else packs
                for some in parted({v: found[v] for v in same}):
                    given = {v: tf.cast(found[v], run.engine.reduce_dtype or dtype) for v in some}
                    if kind == "all-reduce":
                        sums = gang.added_up(axis, given, lane)
                    else:
                        dims = {(axis, v): (x, edges[v].sharding.dims[axis]) for v, x in given.items()}
                        sums = {v: x for (_, v), x in gang.scattered(axis, dims, lane).items()}
                    found.update({v: tf.cast(total, dtype) for v, total in sums.items()})
                    program.exchanged.update((v, axis) for v in some)
        for v in last_first if run.update else ():  # in one order on all lanes
            kind = edges[v].backward(axis)
            if kind != "identity" and not isinstance(found[v], tf.Tensor):
                found[v] = rows_of_all(run, v, found[v], axis, gang, lane)
                if kind == "reduce-scatter":
                    dim, shape = edges[v].sharding.dims[axis], own[v].shape.as_list()
                    if edges[v].forward(axis) == "identity":
                        shape[dim] //= getattr(gang.mesh, axis)
                    found[v] = gang.own_rows(axis, found[v], lane, dim, shape)
    return found


def rows_of_all(
    run: "Execution", v: int, gradient: Any, axis: str, gang: Gang, lane: tf.Tensor
) -> tf.IndexedSlices:  # fmt: skip
    """A sparse gradient with the rows of all lanes along an axis; where all have the same rows, with their sums."""
    (values, indices, shape), rows = (gradient.values, gradient.indices, gradient.dense_shape), ("rows", v, axis)
    shared = isinstance(gradient, SharedRows) or shares_rows(run, 0, v, gradient)
    if AXES[axis].divides != "samples" or shared:
        return tf.IndexedSlices(gang.exchanged("all-reduce", axis, values, lane, rows), indices, shape)
    values = gang.exchanged("all-gather", axis, values, lane, rows)
    return tf.IndexedSlices(values, gang.exchanged("all-gather", axis, indices, lane, (*rows, "indices")), shape)


def grouped(items: Iterable[int], kind: Any) -> dict[Any, list[int]]:
    """Items by their kind, in their order."""
    found: dict[Any, list[int]] = {}
    for item in items:
        found.setdefault(kind(item), []).append(item)
    return found


def packs(tensors: dict[int, tf.Tensor]) -> list[list[int]]:
    """Tensors that have a sum in common: small ones; each large one has its own."""
    large = [v for v, x in tensors.items() if elements_of(x) >= ALONE]
    return [*([v] for v in large), *portions({v: x for v, x in tensors.items() if v not in large})]
