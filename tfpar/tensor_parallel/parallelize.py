"""From a model's graph to what each rank of a tensor axis runs: rules, the cheapest way, the local graph."""

# i: operation, v: variable

from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from types import MappingProxyType
from typing import NamedTuple

from tfpar.errors import LayoutError
from tfpar.graph.keras_graph import KerasGraph
from tfpar.planning.cost import Hardware
from tfpar.planning.layout_search import Option, choose
from tfpar.planning.plan import Weight
from tfpar.planning.sharding import REPLICATED, Layout
from tfpar.tensor_parallel import rules
from tfpar.tensor_parallel.loss_parallel import CrossEntropy, add_loss
from tfpar.tensor_parallel.rank_graph import RankGraph, RankGraphBuilder


class Choice(NamedTuple):
    """How a layer is run by ranks.

    Args:
        options: of each operation, the number of the one that was chosen.
        layout: of its caches.
    """

    options: Sequence[int]
    layout: Layout


def divided(
    graph: KerasGraph,
    ranks: int,
    hardware: Hardware,
    sequence: bool,
    given: Mapping[int, Layout],
    loss: CrossEntropy | None = None,
    undivided: Set[str] = frozenset(),
    closed: Mapping[str, str] = MappingProxyType({}),
) -> tuple[RankGraph, tuple[Weight, ...]]:
    """What each rank runs of a model, and how its weights are divided.

    Args:
        sequence: whether activations may be divided along the sequence (sequence parallelism).
        given: the layouts of variables of the graph that must have a certain one.
        loss: of the model's output; ranks find it together, if each has a part of the logits.
        undivided: names of operations that every rank computes all of.
        closed: by the names of operations, why what they run is not divided.

    Raises:
        LayoutError: no rule divides a weight as it is given.
    """
    sites = [rules.Site(graph, i, ranks, sequence) for i in range(len(graph.calls))]
    options = [list(rules.options(site)) for site in sites]
    options = [o[:1] if site.op.name in undivided else o for site, o in zip(sites, options, strict=True)]
    fit = [fitting(site, found, given) for site, found in zip(sites, options, strict=True)]
    chosen, _ = choose(graph.graph, fit, ranks, hardware, sequence)
    local, layouts = RankGraphBuilder(graph, ranks), {}
    for i, option in enumerate(chosen):
        local.follow(i, option)
        layouts.update(option.weights)
    weights = []
    for v, variable in enumerate(graph.graph.variables):
        i = next((i for i, op in enumerate(graph.graph.ops) if v in op.variables), None)
        why = reason(sites[i], options[i], chosen[i], v, closed) if i is not None else "no operation uses it"
        weights.append(Weight(variable.path, variable.shape, variable.bytes, layouts.get(v, REPLICATED), why))
    logits = logits_of(local, loss) if loss is not None else None
    ranks_graph = local.finish(layouts)
    if logits is not None:
        end = add_loss(local, logits, loss, local.input(*loss.y))
        ranks_graph = replace(ranks_graph, with_terms=local.finish(layouts, end))
    return ranks_graph, tuple(weights)


def with_caches(
    graph: KerasGraph,
    ranks: int,
    hardware: Hardware,
    given: Mapping[int, Layout],
    caches: Set[int],
    layout: Layout | None = None,
    before: Choice | None = None,
) -> tuple[KerasGraph, Choice]:
    """What each rank runs of a layer whose caches may be divided, they and what they become alike.

    Args:
        given: the layouts of variables.
        caches: inputs that are; outputs of their shape are what they become.
        layout: theirs, if it is known.
        before: what was chosen for a layer that is alike.

    Returns:
        The graph, and what was chosen.
    """
    sites = [rules.Site(graph, i, ranks) for i in range(len(graph.calls))]
    fit = [fitting(site, list(rules.options(site)), given) for site in sites]
    if before is None:
        before = chosen_with_caches(graph, fit, ranks, hardware, caches, layout)
    local = RankGraphBuilder(graph, ranks, ends_of(alike(graph, caches), before.layout))
    for i, n in enumerate(before.options):
        local.follow(i, fit[i][n])
    return local.finish(dict(given)).graph, before


def alike(graph: KerasGraph, caches: Set[int]) -> list[int]:
    """Caches, and what they become."""
    shapes = {graph.symbols[t].shape for t in caches}
    return [t for t in (*graph.graph.inputs, *graph.graph.outputs) if graph.symbols[t].shape in shapes]


def chosen_with_caches(
    graph: KerasGraph, fit: Sequence[list[Option]], ranks: int, hardware: Hardware, caches: Set[int],
    layout: Layout | None,
) -> Choice:  # fmt: skip
    """The cheapest way of a layer whose caches are divided as it is best, or known."""
    shapes = {graph.symbols[t].shape for t in caches}
    dims = range(1, min(map(len, shapes), default=1))
    equal = [d for d in dims if all(shape[d] and not shape[d] % ranks for shape in shapes)]
    ways = [layout] if layout else [REPLICATED, *map(Layout, equal)]
    ends = alike(graph, caches)
    found = [choose(graph.graph, fit, ranks, hardware, False, ends_of(ends, way)) for way in ways]
    costs = [cost for _, cost in found]
    n = costs.index(min(costs))
    numbers = [
        next(k for k, known in enumerate(options) if known is option)
        for options, option in zip(fit, found[n][0], strict=True)
    ]
    return Choice(numbers, ways[n])


def ends_of(tensors: Sequence[int], layout: Layout) -> dict[int, Layout]:
    """The layouts of inputs and outputs that are not replicated, if these have this one."""
    return {} if layout == REPLICATED else dict.fromkeys(tensors, layout)


def logits_of(local: RankGraphBuilder, loss: CrossEntropy) -> int | None:
    """What a rank has of the logits of the model's output, if that is a part along the last dim."""
    (t,) = local.source.graph.outputs
    x = local.known[t] if loss.from_logits else local.logits.get(t)
    return x if x is not None and local.layouts[x] == Layout(len(local.full[x]) - 1) else None


def fitting(site: rules.Site, options: list[Option], given: Mapping[int, Layout]) -> list[Option]:
    """The options that divide weights as they are given.

    Raises:
        LayoutError: there is none.
    """
    wanted = {v: given[v] for v in site.op.variables if v in given}
    found = [o for o in options if all(o.weights.get(v, REPLICATED) == layout for v, layout in wanted.items())]
    if not found:
        variables = site.graph.graph.variables
        asked = ", ".join(f"{variables[v].path} {variables[v].shape} {layout}" for v, layout in wanted.items())
        there = "; ".join(
            ", ".join(f"{variables[v].path} {o.weights.get(v, REPLICATED)}" for v in wanted) for o in options
        )
        raise LayoutError(f"{site.op.name} cannot run on {site.ranks} ranks with {asked}; it can with: {there}")
    return found


def reason(site: rules.Site, options: list[Option], chosen: Option, v: int, closed: Mapping[str, str]) -> str:
    """Why a weight is divided as it is, or is not."""
    if v in chosen.weights:
        return f"{chosen.name} in {site.op.name}"
    if chosen.split:
        return f"every rank needs all of it in {site.op.name}, {chosen.name}"
    kind = type(site.layer).__name__
    if rules.rule_of(site.layer) is None:
        why = closed.get(site.op.name)
        return f"no rule divides {kind}" + (f", and what it runs is not divided: {why}" if why else "")
    if not any(v in o.weights for o in options):
        return f"the rule for {kind} does not divide it between {site.ranks} ranks"
    return "cheaper so, or used elsewhere by an operation that needs all of it"
