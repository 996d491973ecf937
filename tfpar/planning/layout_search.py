"""The cheapest way to divide a model between the ranks of the `tensor` axis."""

# i: operation, t: tensor, v: variable, T: ranks

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import itemgetter
from types import MappingProxyType
from typing import Any, NamedTuple

from tfpar.errors import LayoutError
from tfpar.planning.cost import BACKWARD, Hardware
from tfpar.planning.op_graph import OpGraph
from tfpar.planning.sharding import REPLICATED, Layout

ROWS = 64  # samples that costs are compared for: how a weight is divided must not depend on the batch
BEAM = 64  # ways that are kept while the model is walked through
FUSED = 0.1  # of what elementwise operations move, the share that costs: they are computed with their neighbours
FORCED = 100.0  # what cutting a tensor costs that all ranks have, in bytes that cross: only where a layout demands it
LATENCY = 0.02  # what an exchange costs beside its bytes at most, of what holding a matrix costs: small models too
KERNEL = 1000.0  # what holding a byte of a matrix on every rank costs, in bytes of one sample that cross between ranks


@dataclass(frozen=True)
class Option:
    """One way in which ranks can run an operation.

    Args:
        name: the field's word for it, such as `column-parallel`.
        inputs, outputs: the layout that each input must have, and that each output gets.
        weights: by index, the layouts of the variables that are divided; the others are replicated.
        split: whether ranks compute different parts, so that gradients of replicated inputs and weights are partial.
        moved: bytes of one sample that each rank sends within the operation, forward and backward.
        exchanges: in how many exchanges it does.
        build: adds what each rank runs to a `RankGraphBuilder`; if not given, the operation on what the rank has.
    """

    name: str
    inputs: tuple[Layout, ...]
    outputs: tuple[Layout, ...]
    weights: Mapping[int, Layout] = field(default_factory=dict)
    split: bool = True
    moved: float = 0.0
    build: Callable | None = None
    exchanges: int = 2


def replicated(graph: OpGraph, i: int) -> Option:
    """The option that there is for every operation: each rank computes all of it."""
    op = graph.ops[i]
    return Option("replicated", (REPLICATED,) * len(op.inputs), (REPLICATED,) * len(op.outputs), split=False)


class Way(NamedTuple):
    """The cheapest way to a point of the model that leaves tensors and shared weights as they are there."""

    cost: float
    layouts: dict[int, Layout]
    known: dict[int, frozenset]  # of tensors, for whom they were exchanged already
    shared: dict[int, Any]
    chosen: Any  # the options so far, the last first, linked


def choose(
    graph: OpGraph,
    options: Sequence[Sequence[Option]],
    ranks: int,
    hardware: Hardware,
    sequence: bool = False,
    ends: Mapping[int, Layout] = MappingProxyType({}),
) -> tuple[list[Option], float]:
    """An option for each operation, so that the model costs the least, by dynamic programming along it.

    A state is the layout of each tensor that is still needed, for whom it was exchanged (what others want alike is
    exchanged once), and the layout of each weight that several operations use; of more than `BEAM` states the cheapest
    are kept. Costs are seconds of computing and of moving data between ranks; a matrix that is not divided costs far
    more, because to divide weights is what tensor parallelism is for.

    Args:
        options: for each operation.
        sequence: whether a replicated tensor may be divided along dim 1, the sequence.
        ends: the layouts of inputs and outputs that are not replicated.

    Returns:
        The options, and what they cost.

    Raises:
        LayoutError: operations that share a weight have no option that divides it alike.
    """
    hardware = replace(hardware, link_seconds=min(hardware.link_seconds, LATENCY * holding(graph, hardware)))
    users = [sum(v in op.variables for op in graph.ops) for v in range(len(graph.variables))]
    last = {t: max(users_of, default=-1) for t, users_of in graph.consumers.items()}
    last.update(dict.fromkeys(graph.outputs, len(graph.ops)))
    ways = [Way(0.0, {t: ends.get(t, REPLICATED) for t in graph.inputs}, {}, {}, None)]
    apart = on_every_rank(graph, ends)
    for i, op in enumerate(graph.ops):
        best: dict[Any, Way] = {}
        if i in apart:
            continue
        several = [v for v in op.variables if users[v] > 1]
        known_of = [(o, work(graph, i, o, ranks, hardware), {v: use(o, v) for v in several}) for o in options[i]]
        for way in ways:
            for option, seconds, uses in known_of:
                cost = way.cost + seconds
                if any(way.shared.get(v, use) != use for v, use in uses.items()):
                    continue
                known = {t: done for t, done in way.known.items() if last[t] > i}
                for t, wanted in dict.fromkeys(zip(op.inputs, option.inputs, strict=True)):
                    have, done = way.layouts.get(t, REPLICATED), way.known.get(t, frozenset())
                    if (wanted, option.split) not in done:
                        sizes = moved(graph, t, have, wanted, option.split, ranks, sequence)
                        cost += exchanging(sizes, hardware)
                        if any(sizes) and last[t] > i:
                            known[t] = done | {(wanted, option.split)}
                layouts = {t: layout for t, layout in way.layouts.items() if last[t] > i}
                layouts.update((t, y) for t, y in zip(op.outputs, option.outputs, strict=True) if last[t] > i)
                shared = {**way.shared, **uses}
                key = (*sorted(layouts.items()), *sorted(known.items(), key=itemgetter(0)), *sorted(shared.items()))
                if key not in best or cost < best[key].cost:
                    best[key] = Way(cost, layouts, known, shared, (option, way.chosen))
        if not best:
            raise LayoutError(f"{op.name} shares weights with operations that can only divide them in another way")
        ways = sorted(best.values(), key=lambda way: way.cost)[:BEAM]
    costs = []
    for way in ways:
        pairs = [(way.layouts.get(t, REPLICATED), t, ends.get(t, REPLICATED)) for t in graph.outputs]
        back = [moved(graph, t, have, want, False, ranks, sequence) for have, t, want in pairs]
        costs.append(way.cost + sum(exchanging(sizes, hardware) for sizes in back))
    cost, found = min(costs), []
    chosen = ways[costs.index(cost)].chosen
    while chosen is not None:
        option, chosen = chosen
        found.append(option)
    return [options[i][0] if i in apart else found.pop() for i in range(len(graph.ops))], cost


def on_every_rank(graph: OpGraph, ends: Mapping[int, Layout]) -> set[int]:
    """The operations that every rank computes all of, whatever else is divided: sizes, masks, angles.

    They follow from the model's inputs alone, and no weight is in them.
    """
    known, found = set(graph.inputs).difference(ends), set()
    for i, op in enumerate(graph.ops):
        if not op.variables and not op.flops and known.issuperset(op.inputs):
            found.add(i)
            known.update(op.outputs)
    return found


def use(option: Option, v: int) -> tuple:
    """How an operation uses a weight: all that share it must use it alike, for its gradients to be of one kind."""
    layout = option.weights.get(v, REPLICATED)
    return layout, option.split, option.outputs if option.split and layout == REPLICATED else ()


def work(graph: OpGraph, i: int, option: Option, ranks: int, hardware: Hardware) -> float:
    """The cost of an option for operation `i` in seconds, without changes of the layout of its inputs."""
    op = graph.ops[i]
    bytes_of_all = sum(graph.tensors[t].bytes for t in {*op.inputs, *op.outputs})
    touched = bytes_of_all * (1.0 if op.flops else FUSED)
    seconds = (1 + BACKWARD) * ROWS * hardware.seconds(op.flops, touched) / (ranks if option.split else 1)
    matrices = sum(
        graph.variables[v].bytes for v in op.variables if len(graph.variables[v].shape) > 1 and v not in option.weights
    )
    return (
        seconds
        + exchanging([option.moved / option.exchanges] * option.exchanges, hardware)
        + KERNEL * matrices / hardware.link_bytes
    )


def holding(graph: OpGraph, hardware: Hardware) -> float:
    """What it costs on average that every rank holds all of a matrix, in seconds."""
    sizes = [v.bytes for v in graph.variables if len(v.shape) > 1]
    return KERNEL * sum(sizes) / max(1, len(sizes)) / hardware.link_bytes


def exchanging(sizes: Sequence[float], hardware: Hardware) -> float:
    """Seconds of exchanges in which each rank sends so many bytes of one sample, for `ROWS` samples."""
    return sum(ROWS * size / hardware.link_bytes + hardware.link_seconds for size in sizes if size)


def moved(
    graph: OpGraph, t: int, have: Layout, want: Layout, split: bool, ranks: int, sequence: bool
) -> tuple[float, float]:
    """Bytes of one sample of tensor `t` that each rank sends for its change of layout, in up to two exchanges.

    An all-reduce is two: a reduce-scatter and an all-gather.

    Args:
        split: whether the operation that wants it computes a part on each rank.
    """
    size = graph.tensors[t].bytes * (ranks - 1) / ranks
    back = size if t in graph.learned else 0.0
    if have == want:
        return (back, back) if split and have == REPLICATED else (0.0, 0.0)  # a partial gradient is added up
    if want == REPLICATED:
        return size, back if split else 0.0
    if have == REPLICATED and sequence and want.dim == 1:
        return 0.0, back
    return (1 + FORCED) * size, back  # cut what all have, or gather and cut
