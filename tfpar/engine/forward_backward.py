"""Forward and backward as one function; several micro-batches take turns in it, at the collectives that it holds.

While the tensors of one are exchanged, the other computes: Wang et al., "Domino: Eliminating Communication in LLM
Training via Generic Tensor Slicing and Overlapping", 2024, section 3.
"""

# s: segment, c: part of it, m: micro-batch of a lane, n: its number, v: variable, t: tensor of the graph

from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import tensorflow as tf

from tfpar.comm.gradients import SharedRows, add, cast, plain, sum_of
from tfpar.comm.in_program import Gang
from tfpar.compat._tf import independent, operations_made
from tfpar.engine import added_losses, in_place
from tfpar.engine.combination import known_rows
from tfpar.engine.engine import MicroBatch, tensors_of
from tfpar.engine.program import Component, Edge, Program, Result, components, selected
from tfpar.engine.reading import is_gathered, own_value, value_of
from tfpar.engine.remat import present
from tfpar.engine.vjp import watched
from tfpar.engine.weights_inside import GatheredWeights, exchanged
from tfpar.planning.schedule import Kind

if TYPE_CHECKING:
    from tfpar.engine.executor import Execution


class Part(NamedTuple):
    """What the forward pass of a micro-batch through some operations leaves for the way back.

    Args:
        tape: that has seen it.
        inside, outside: the variables and the edges of which gradients are wanted.
        result: of the operations.
        taken: what they take that is not there anyway: edges, and seeds.
        made: the operations of the graph.
    """

    tape: tf.GradientTape
    inside: dict[int, tf.Tensor]
    outside: dict[Component, tf.Tensor]
    result: Result
    taken: list[tf.Tensor]
    made: Sequence[tf.Operation]


class Given(NamedTuple):
    """What a micro-batch brings along.

    Args:
        variables: the values, in the order of the program's; `None` for the same as of the first micro-batch, and for
            what is read for the update.
        edges: what the program needs.
        cotangents: of its edges.
        share: of the batch's samples.
    """

    variables: Sequence[Any]
    edges: dict[int, Edge]
    cotangents: dict[Component, tf.Tensor]
    share: Any


def forward_backward(run: "Execution", s: int, micro_batches: Sequence[MicroBatch]):
    """Run a segment on a part, or on several of a lane at once, forward and backward as one action."""
    program, first = run.program(s), micro_batches[0]
    action, at = (s, Kind.FORWARD, first), run.at(s, first.lane)
    edges = [selected(run.values[m], run.partition.needs(s)) for m in micro_batches]
    edges = run.order.started(action, at, edges)
    inside, given = run.update.places if run.update else (), []
    for m, needed in zip(micro_batches, edges, strict=True):
        value = own_value if program.gang else value_of
        variables = [None if v in inside else value(run, s, m, v) for v in program.variables]
        if given:  # weights are handed over once
            pairs = zip(variables, given[0].variables, strict=True)
            variables = [None if value is same else value for value, same in pairs]
        given.append(Given(variables, needed, run.arrived(s, m), run.share(m)))
    results, gradients, cotangents = fused(run, s, first, program, given)
    independent(tensors_of((results, gradients, cotangents)))
    for m, result, passed in zip(micro_batches, results, cotangents, strict=True):
        run.found(s, m, result)
        run.send(m, passed)
    run.returned(s, Kind.FORWARD, first, gradients, cotangents)


def fused(
    run: "Execution", s: int, first: MicroBatch, program: Program, given: Sequence[Given]
) -> tuple[list[Result], dict[int, Any], list[dict[Component, tf.Tensor]]]:
    """As `passes`, in one function, which ends with the update if there is one in `run`.

    Args:
        first: of the micro-batches of a lane.
        given: what each of them brings along; the cotangents must not depend on the result.
    """
    update = run.update

    def both(given, loss_cotangent, lane, copies, sums, replaces):
        read = {v: update.read(v, copies) for v in program.variables if v in update.places} if update else {}
        weights = [read.get(v, value) for v, value in zip(program.variables, given[0].variables, strict=True)]
        given = [
            x._replace(variables=[a if b is None else b for a, b in zip(weights, x.variables, strict=True)])
            for x in given
        ]
        own = {v: x for v, x in zip(program.variables, weights, strict=True) if program.gang and is_gathered(run, v)}
        results, of_weights, cotangents = passes(run, s, program, given, loss_cotangent, {**own, **read}, lane)
        if update:
            written = [v for result in results for v in result.state]
            gradients = {v: plain(x) for v, x in of_weights.items()}
            update.apply(copies, gradients, written, loss_cotangent, program.gang, lane)
            of_weights = {}
        of_weights, done = in_place.added(program, of_weights, sums, replaces)
        return (results, of_weights, cotangents), done

    lane = run.values[first][run.route.lane].value if program.gang else None
    kind = run.parts, update is not None
    if kind not in program.fused:
        program.fused[kind] = run.engine.traced(both)
    copies = update.copies(first.lane) if update else []
    sums = in_place.sums_for(run, s, first, program, given[0].variables)
    found, done = program.fused[kind](list(given), run.loss_cotangent, lane, copies, *sums)
    in_place.note(run, s, first, program, sums, done)
    run.exchanged |= program.exchanged
    return found


def passes(
    run: "Execution", s: int, program: Program, given: Sequence[Given], loss_cotangent: Any,
    own: dict[int, tf.Tensor], lane: tf.Tensor | None,
) -> tuple[list[Result], dict[int, Any], list[dict[Component, tf.Tensor]]]:  # fmt: skip
    """For each micro-batch its result, the gradients of variables over all, and of each one's edges.

    Args:
        program: of the segment.
        given: for each micro-batch; one takes all of its operations at once, if the model is not cut into parts.
        own: what the lane has of variables of which it has a shard, or that the program reads itself.
        lane: its number, if the program exchanges tensors.
    """
    route, programs, turns = run.route, [program], ([[0]], [[0]])
    several = len(given) > 1
    in_parts = bool(program.gang) and (run.engine.buckets > 1 or any(map(partial(is_gathered, run), own)))
    if cut := several or in_parts:
        program.gang.meet()
        route = run.route.cut_inside
        programs = [run.engine.program(route, c, run.training) for c in range(route.partition.stages)]
        turns = route.turns
    weights = GatheredWeights(run, program, own, lane, [part.variables for part in programs])
    values = [dict(x.edges) for x in given]
    pairs = [zip(program.variables, x.variables, strict=True) for x in given]
    variables = [{v: x for v, x in of if v not in weights.dims} for of in pairs]  # others are gathered, or assigned
    taken: dict[tuple[int, int], Part] = {}
    for turn in turns[0]:
        for n, _ in enumerate(given):
            for c in turn:
                needed = selected(values[n], route.partition.needs(c)) if cut else values[n]
                needed = held(program.gang, needed) if several and c == turn[0] else needed
                known = {**weights.forward(c), **variables[n]}
                part = forward(run, programs[c], [known[v] for v in programs[c].variables], needed)
                values[n].update(part.result.edges)
                variables[n].update(part.result.state)
                taken[c, n] = part
    cotangents = [{key: [x] for key, x in micro.cotangents.items()} for micro in given]
    terms: dict[int, dict[Any, Any]] = {}  # of rows that all parts of the batch have, one for each part of the way
    total: dict[int, Any] = {}
    for turn in turns[1]:
        for n, x in enumerate(given):
            for c in turn:
                part, arrived = taken[c, n], cotangents[n]
                ends = of_edges(run, part.result.edges, arrived)
                ends = held(program.gang, ends) if several and c == turn[0] else ends
                weights.ahead(c, list(ends.values()))
                with operations_made() as made:
                    of_weights, edges = backward(run, part, ends, x.share, loss_cotangent)
                if in_parts:
                    weights.let_go(c, part.made, part.taken, made, list(ends.values()))
                for v, gradient in of_weights.items():
                    if several:  # added up in the dtype of the variable
                        gradient = cast(known_rows(run, s, v, gradient), run.engine.graph.variables[v].dtype)
                    of, key = terms.setdefault(v, {}), c if isinstance(gradient, SharedRows) else None
                    of[key] = add(of[key], gradient) if key in of else gradient
                for key, cotangent in edges.items():
                    arrived.setdefault(key, []).append(cotangent)
                if in_parts and x is given[-1]:  # what is complete is exchanged: the lane keeps its shards
                    left = {v for before in programs[:c] for v in before.variables}
                    total.update(exchanged(run, program, summed(terms, terms.keys() - left), own, lane))
    results = [merged(program, programs, [taken[c, n].result for c in range(len(programs))]) for n in range(len(given))]
    pairs = zip(given, cotangents, strict=True)
    needed = [of_edges(run, x.edges, found) for x, found in pairs]
    total.update(exchanged(run, program, summed(terms, terms.keys()), own, lane))
    return results, total, needed


def of_edges(
    run: "Execution", edges: dict[int, Edge], found: dict[Component, list[tf.Tensor]]
) -> dict[Component, tf.Tensor]:
    """The cotangents of these edges, each the sum of what was found."""
    return {key: tf.add_n(found[key]) for key in components(edges, run.graph) if key in found}


def summed(terms: dict[int, dict[Any, Any]], variables: Iterable[int]) -> dict[int, Any]:
    """The gradients of variables, taken out of what they are the sums of."""
    found = {v: terms.pop(v) for v in list(terms) if v in variables}
    return {v: of.popitem()[1] if len(of) == 1 else sum_of(map(plain, of.values())) for v, of in found.items()}


def held(gang: Gang, values: Any) -> Any:
    """The same structure of tensors, which wait for what the other micro-batch computes, not for what it exchanges."""
    flat = tf.nest.flatten(values)
    known = [
        n for n, x in enumerate(flat) if isinstance(x, tf.Tensor) and x.dtype.is_floating and x.shape.is_fully_defined()
    ]
    found = dict(zip(known, gang.held([flat[n] for n in known]), strict=True))
    return tf.nest.pack_sequence_as(values, [found.get(n, x) for n, x in enumerate(flat)])


def forward(run: "Execution", program: Program, variables: Sequence[Any], edges: dict[int, Edge]) -> Part:
    """A part of the way forward."""
    inside, outside = watched(run, program, variables, edges)
    with tf.GradientTape() as tape, operations_made() as made:
        tape.watch([*inside.values(), *outside.values()])
        result = program.run(list(variables), edges)
    taken = [*tensors_of(edges), *(x for x in variables if not x.dtype.is_floating)]
    return Part(tape, inside, outside, result, taken, made)


def backward(
    run: "Execution", part: Part, cotangents: dict[Component, tf.Tensor], share: Any, loss_cotangent: Any
) -> tuple[dict[int, Any], dict[Component, tf.Tensor]]:
    """The same part on the way back: the gradients of its variables and edges."""
    added = added_losses.cotangents(run, part.result, share, loss_cotangent)
    ends = [key.of(part.result.edges) for key in cotangents] + [part.result.losses[i][k] for i, k in added]
    if not ends:
        return {}, {}
    sources = [*part.inside.values(), *part.outside.values()]
    found = part.tape.gradient(ends, sources, [*cotangents.values(), *added.values()])
    return present(part.inside, found), present(part.outside, found[len(part.inside) :])


def merged(program: Program, parts: Sequence[Program], found: Sequence[Result]) -> Result:
    """The results of all parts of the way of a micro-batch as that of the program."""
    if parts[0] is program:
        return found[0]
    moments: dict[int, list] = {}
    for part, result in zip(parts, found, strict=True):
        program.writers.update(part.writers)
        for number, of_layer in result.moments.items():
            place = next(n for n, x in enumerate(program.normalizations) if x is part.normalizations[number])
            moments.setdefault(place, []).extend(of_layer)
    edges = {t: edge for result in found for t, edge in result.edges.items() if t in program.gives}
    losses = {i: x for result in found for i, x in result.losses.items()}
    return Result(edges, losses, moments, {v: x for result in found for v, x in result.state.items()})
