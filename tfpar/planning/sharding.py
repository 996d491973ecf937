"""How tensors and weights are divided over the `tensor` axis of a mesh, and the cheapest way to divide a model."""

# i: operation, t: tensor, v: variable, T: ranks

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from tfpar.errors import LayoutError
from tfpar.planning.cost import BACKWARD, Hardware
from tfpar.planning.op_graph import OpGraph

ROWS = 64  # samples that costs are compared for: how a weight is divided must not depend on the batch
BEAM = 64  # ways that are kept while the model is walked through
FUSED = 0.1  # of what elementwise operations move, the share that costs: they are computed with their neighbours
FORCED = 100.0  # what cutting a tensor costs that all ranks have, in bytes that cross: only where a layout demands it
KERNEL = 1000.0  # what holding a byte of a matrix on every rank costs, in bytes of one sample that cross between ranks


def bounds(count: Any, parts: int) -> list[Any]:
    """Where `parts` nearly equal parts of `count` begin, and where the last ends; `count` may be a tensor.

    Example:
        >>> bounds(10, 4)
        [0, 2, 5, 7, 10]
    """
    return [count * part // parts for part in range(parts + 1)]


def part_of(value: Any, dim: int, start: Any, stop: Any) -> Any:
    """A part of a tensor along one dim."""
    return value[(slice(None),) * dim + (slice(start, stop),)]


class Layout(NamedTuple):
    """Whether every rank has all of a tensor, or a part along one dim.

    Example:
        >>> str(Layout(1)), str(Layout())
        ('split along dim 1', 'replicated')
    """

    dim: int | None = None

    def __str__(self) -> str:
        return "replicated" if self.dim is None else f"split along dim {self.dim}"


REPLICATED = Layout()


@dataclass(frozen=True)
class Sharding:
    """What each lane of a mesh holds of a variable; lane `r * ranks + k` is rank `k` of replica `r`.

    Args:
        layout: how ranks divide it.
        ranks: how many they are.
        shards: how replicas divide what a rank has (ZeRO).

    Example:
        >>> Sharding(Layout(0), ranks=2, shards=Layout(1)).region((4, 6), lane=3, lanes=4)
        ((2, 4), (3, 6))
    """

    layout: Layout = REPLICATED
    ranks: int = 1
    shards: Layout = REPLICATED

    @property
    def of_ranks(self) -> "Sharding":
        """What each rank has of it, the shards of its replicas together."""
        return replace(self, shards=REPLICATED)

    @property
    def divides(self) -> bool:
        """Whether no lane has all of it."""
        return self.layout != REPLICATED or self.shards != REPLICATED

    def region(self, shape: Sequence[int], lane: int, lanes: int) -> tuple[tuple[int, int], ...]:
        """Where the part of a lane begins and ends, along each dim."""
        replica, rank = divmod(lane, self.ranks)
        region = [(0, n) for n in shape]
        for layout, part, parts in ((self.layout, rank, self.ranks), (self.shards, replica, lanes // self.ranks)):
            if layout.dim is not None:
                start, stop = region[layout.dim]
                edges = bounds(stop - start, parts)
                region[layout.dim] = start + edges[part], start + edges[part + 1]
        return tuple(region)

    def shape(self, shape: Sequence[int], lane: int, lanes: int) -> tuple[int, ...]:
        """The shape of what a lane has."""
        return tuple(stop - start for start, stop in self.region(shape, lane, lanes))


UNSHARDED = Sharding()


def sharded(shape: Sequence[int], sharding: Sharding, replicas: int) -> Sharding:
    """The same, what a rank has divided between replicas too: along its longest dim, if that is long enough."""
    part = sharding.shape(shape, 0, sharding.ranks * replicas)
    dim = max(range(len(part)), key=lambda d: part[d], default=None)
    if replicas == 1 or dim is None or part[dim] < replicas:
        return sharding
    return replace(sharding, shards=Layout(dim))


@dataclass(frozen=True)
class Option:
    """One way in which ranks can run an operation.

    Args:
        name: the field's word for it, `column-parallel`.
        inputs, outputs: the layout that each tensor must have, and gets.
        weights: the layouts of variables that are divided; the others are replicated.
        split: whether ranks compute different parts, so that gradients of replicated inputs and weights are partial.
        moved: bytes of one sample that cross between ranks within the operation, forward and backward.
        build: adds what each rank runs to a `RankGraphBuilder`; if not given, the operation on what the rank has.
    """

    name: str
    inputs: tuple[Layout, ...]
    outputs: tuple[Layout, ...]
    weights: Mapping[int, Layout] = field(default_factory=dict)
    split: bool = True
    moved: float = 0.0
    build: Callable | None = None


def replicated(graph: OpGraph, i: int) -> Option:
    """The way that is always there: every rank computes all of it."""
    op = graph.ops[i]
    return Option("replicated", (REPLICATED,) * len(op.inputs), (REPLICATED,) * len(op.outputs), split=False)


class Way(NamedTuple):
    """The cheapest way to a point of the model that leaves tensors and shared weights as they are there."""

    cost: float
    layouts: dict[int, Layout]
    shared: dict[int, Any]
    chosen: Any  # the options so far, the last first, linked


def choose(
    graph: OpGraph, options: Sequence[Sequence[Option]], ranks: int, hardware: Hardware, sequence: bool = False
) -> list[Option]:
    """The cheapest option of each operation, all together, by dynamic programming along the model.

    A state is the layout of each tensor that is still needed, and of each weight that several operations use; of more
    than `BEAM` states the cheapest are kept. Costs are seconds of computing and of moving data between ranks; a matrix
    that is not divided costs far more, because to divide weights is what tensor parallelism is for.

    Args:
        sequence: whether a replicated tensor may be cut along dim 1.
    """
    users = [sum(v in op.variables for op in graph.ops) for v in range(len(graph.variables))]
    last = {t: max(users_of, default=-1) for t, users_of in graph.consumers.items()}
    last.update(dict.fromkeys(graph.outputs, len(graph.ops)))
    ways = [Way(0.0, dict.fromkeys(graph.inputs, REPLICATED), {}, None)]
    for i, op in enumerate(graph.ops):
        best: dict[Any, Way] = {}
        for way in ways:
            for option in options[i]:
                cost = way.cost + work(graph, i, option, ranks, hardware)
                uses = {v: use(option, v) for v in op.variables if users[v] > 1}
                if any(way.shared.get(v, use) != use for v, use in uses.items()):
                    continue
                moves = [
                    moved(graph, t, way.layouts[t], wanted, option.split, ranks, sequence)
                    for t, wanted in dict.fromkeys(zip(op.inputs, option.inputs, strict=True))
                ]
                cost += sum(moves) * ROWS / hardware.link_bytes
                layouts = {t: layout for t, layout in way.layouts.items() if last[t] > i}
                layouts.update((t, y) for t, y in zip(op.outputs, option.outputs, strict=True) if last[t] > i)
                shared = {**way.shared, **uses}
                key = (*sorted(layouts.items()), *sorted(shared.items()))
                if key not in best or cost < best[key].cost:
                    best[key] = Way(cost, layouts, shared, (option, way.chosen))
        if not best:
            raise LayoutError(f"{op.name} shares weights with operations that can only divide them in another way")
        ways = sorted(best.values(), key=lambda way: way.cost)[:BEAM]
    ends = {
        id(way): way.cost
        + sum(moved(graph, t, way.layouts[t], REPLICATED, False, ranks, sequence) for t in graph.outputs)
        * ROWS / hardware.link_bytes
        for way in ways
    }  # fmt: skip
    chosen, found = min(ways, key=lambda way: ends[id(way)]).chosen, []
    while chosen is not None:
        option, chosen = chosen
        found.append(option)
    return found[::-1]


def use(option: Option, v: int) -> tuple:
    """How an operation uses a weight: all that share it must do alike, for its gradients to be of one kind."""
    layout = option.weights.get(v, REPLICATED)
    return layout, option.split, option.outputs if option.split and layout == REPLICATED else ()


def work(graph: OpGraph, i: int, option: Option, ranks: int, hardware: Hardware) -> float:
    """The cost of an operation on its own."""
    op = graph.ops[i]
    touched = sum(graph.tensors[t].bytes for t in {*op.inputs, *op.outputs})
    touched *= 1.0 if op.flops else FUSED
    seconds = (1 + BACKWARD) * ROWS * hardware.seconds(op.flops, touched) / (ranks if option.split else 1)
    matrices = sum(
        graph.variables[v].bytes for v in op.variables if len(graph.variables[v].shape) > 1 and v not in option.weights
    )
    return seconds + (ROWS * option.moved + KERNEL * matrices) / hardware.link_bytes


def moved(graph: OpGraph, t: int, have: Layout, want: Layout, split: bool, ranks: int, sequence: bool) -> float:
    """Bytes of one sample of a tensor that its change of layout moves, forward and backward.

    Args:
        split: whether the operation that wants it computes a part on each rank.
    """
    size = graph.tensors[t].bytes * (ranks - 1) / ranks
    back = size if graph.tensors[t].differentiable else 0.0
    if have == want:
        return 2 * back if split and have == REPLICATED else 0.0  # a partial gradient is added up
    if want == REPLICATED:
        return size + (back if split else 0.0)
    if have == REPLICATED and sequence and want.dim == 1:
        return back
    return back + (1 + FORCED) * size  # cut what all have, or gather and cut
