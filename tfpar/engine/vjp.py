"""The backward pass through a segment: cotangents to those of its variables and edges, added up as they come.

What programs that hold collectives sum over devices, and shards of ZeRO 2 and 3, are exchanged here too.
"""

# s: segment, m: micro-batch of a lane, v: variable, t: tensor of the graph, i: operation, k: its k-th added loss

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import tensorflow as tf

from tfpar.comm.collectives import elements_of
from tfpar.comm.gradients import add, cast
from tfpar.compat._tf import recompute_inputs
from tfpar.engine import in_place
from tfpar.engine.combination import known_rows
from tfpar.engine.engine import MicroBatch, device_of, tensors_of
from tfpar.engine.program import Component, Edge, Program, Result, components, key_of, packed
from tfpar.engine.reading import is_gathered, value_of
from tfpar.engine.remat import SplitProgram, makers, present
from tfpar.engine.weight_edge import edge_of, exchange
from tfpar.graph.recording import UnusedResults
from tfpar.planning.mesh import Coordinate

if TYPE_CHECKING:
    from tfpar.engine.executor import Execution

AT_ONCE = 2**26  # elements of gradients that a compiled program adds up


def keep(run: "Execution", s: int, m: MicroBatch, gradients: dict[int, Any]):
    """Add gradients of variables to those of earlier micro-batches; of those that replicas divide, the shards."""
    whole = {}
    for v, gradient in gradients.items():
        gradient, edge = known_rows(run, s, v, gradient), edge_of(run.engine, v, run.in_parts)
        if run.scatters and edge.scattered and (v, edge.scattered) not in run.exchanged:
            run.waiting.setdefault(v, {})[m.lane] = cast(gradient, edge.variable.dtype)
        else:
            whole[v] = gradient
    count(run, s, m.lane, whole)
    if m.lane == run.lanes[-1]:
        for v, found in run.waiting.items():
            edge = edge_of(run.engine, v, True)
            axis = edge.scattered
            for lanes in run.mesh.groups(axis):
                parts = [found.get(lane) for lane in lanes]
                busy = any(part is not None for part in parts)  # a short batch may leave a group without samples
                shards = exchange([edge], axis, lanes, [parts], None)[0] if busy else []
                for lane, shard in zip(lanes, shards, strict=False):
                    with tf.device(device_of(edge.variable, lane)):
                        count(run, s, lane, {v: shard})
        run.waiting.clear()


def count(run: "Execution", s: int, lane: Coordinate, gradients: dict[int, Any]):
    """Add to the gradients of variables, which have the dtype of these."""
    later = {}
    for v, gradient in gradients.items():
        known = run.gradients.get((s, lane, v))
        if run.engine.jit_compile and isinstance(known, tf.Tensor) and isinstance(gradient, tf.Tensor):
            later[v] = gradient
            continue
        gradient = cast(gradient, run.engine.graph.variables[v].dtype)  # of a weight cast for all micro-batches
        run.gradients[s, lane, v] = gradient if known is None else add(known, gradient)
    for some in portions(later):
        sums = run.engine.sums([run.gradients[s, lane, v] for v in some], [later[v] for v in some])
        run.gradients.update({(s, lane, v): total for v, total in zip(some, sums, strict=True)})


def portions(gradients: dict[int, tf.Tensor]) -> Iterable[list[int]]:
    """The variables of these gradients, so many together that their sums, there twice for a moment, are not many."""
    some, most = [], 0
    for v, gradient in gradients.items():
        most += elements_of(gradient)
        if some and most > AT_ONCE:
            yield some
            some, most = [], elements_of(gradient)
        some.append(v)
    if some:
        yield some


def recompute_of(
    run: "Execution", s: int, m: MicroBatch, program: Program, variables: list[tf.Tensor]
) -> list[Callable | None]:
    """For each variable of a program, what gives it for the backward pass, if what goes forward must not keep it.

    That is so for what was gathered for this program alone; and a compiled program would keep a copy of each weight for
    each micro-batch. What a layer has assigned on the way forward is as it was before. Random numbers, which XLA draws
    in its own way, are not drawn again.
    """
    copies = run.engine.jit_compile and run.parts.micro_batches > 1

    def recompute(v: int, before: tf.Tensor) -> tf.Tensor:
        return tf.identity(before) if v in run.state[m] else value_of(run, s, m, v)

    return [
        partial(recompute, v, before) if before.dtype.is_floating and (copies or is_gathered(run, v)) else None
        for v, before in zip(program.variables, variables, strict=True)
    ]


def vjp(
    run: "Execution", s: int, m: MicroBatch, program: Program, variables: list[tf.Tensor], edges: dict[int, Edge],
    recompute: list[Callable | None],
) -> tuple[Result, Callable]:  # fmt: skip
    """A program's result, and a function from its cotangents to those of its variables and edges.

    Args:
        recompute: what gathers variables for the backward pass, so that it holds on to none.
    """
    inside, outside = watched(run, program, variables, edges)
    at = run.device(s, m.lane)
    compiled = run.engine.jit_compile and run.route.loss and not tf.executing_eagerly()
    split = split_program(program, variables, edges, inside, outside) if compiled else None
    if split is None:
        return taped(run, at, program, variables, edges, recompute, inside, outside)
    result, kept = split.forward(list(variables), edges)

    def pullback(cotangents: dict[Component, tf.Tensor], added: dict[tuple[int, int], tf.Tensor]):
        given, tensors = {**cotangents, **added}, {key.tensor for key in cotangents}
        for key in split.targets:  # a tensor and its logits are made of the same: who has the gradient does not matter
            if isinstance(key, Component) and key.tensor in tensors and key not in given:
                given[key] = tf.zeros_like(key.of(result.edges))
        if program.targets is None and given.keys() < set(split.targets):
            program.targets = frozenset(given)
            raise UnusedResults(program.graph)
        if given.keys() != set(split.targets):  # not the same as before
            values = [make() if make else x for x, make in zip(variables, recompute, strict=True)]
            sources = watched(run, program, values, edges)
            return taped(run, at, program, values, edges, [None] * len(recompute), *sources)[1](cotangents, added)
        values = [*zip(variables, recompute, strict=True), *((x, None) for x in tensors_of(edges))]
        taken = [make() if make else x for x, make in map(values.__getitem__, split.needs)]
        ends = [tf.convert_to_tensor(given[t]) for t in split.targets]
        sums = in_place.sums_for(run, s, m, program, variables)
        found, passed, done = split.backward(split.for_backward(taken, result, kept), ends, *sums)
        in_place.note(run, s, m, program, sums, done)
        return found, passed

    return result, pullback


def split_program(
    program: Program,
    variables: list[tf.Tensor],
    edges: dict[int, Edge],
    inside: Iterable[int],
    outside: Iterable[Component],
) -> SplitProgram | None:
    """A program and its backward pass as two functions, made once for each kind of arguments; `None` if it has none."""
    kind = key_of((list(variables), edges)), tuple(inside), tuple(outside), program.targets
    if kind not in program.split:
        places = [program.variables.index(v) for v in inside]
        program.split[kind] = SplitProgram(program, variables, edges, places, list(outside))
    return program.split[kind] if program.split[kind].splittable else None


def taped(
    run: "Execution",
    at: str,
    program: Program,
    variables: list[tf.Tensor],
    edges: dict[int, Edge],
    recompute: list[Callable | None],
    inside: dict[int, tf.Tensor],
    outside: dict[Component, tf.Tensor],
) -> tuple[Result, Callable]:
    """The same by a gradient tape: what the backward pass takes is what TensorFlow keeps for it."""
    sources = [*inside.values(), *outside.values()]
    with tf.GradientTape(persistent=not run.route.loss) as tape:  # a user may ask more than once
        tape.watch(sources)
        result = program(variables, edges)
    traced = None if tf.executing_eagerly() else program.traced(variables, edges)

    def pullback(cotangents: dict[Component, tf.Tensor], added: dict[tuple[int, int], tf.Tensor]):
        targets = [key.of(result.edges) for key in cotangents] + [result.losses[i][k] for i, k in added]
        if not targets:
            return {}, {}
        known = len(targets[0].op.outputs) if traced else 0
        others = without_cotangents(result, targets) if traced else []
        ends = [*cotangents.values(), *added.values(), *(zeros(run, at, x) for x in others)]
        found = tape.gradient([*targets, *others], sources, ends)
        if traced and any(recompute):
            recompute_inputs(targets[0].op, traced, known, recompute)
        if traced and lacks_cotangents(run, result, cotangents, added):
            some, others = reached(traced, result, [*cotangents, *added], variables, edges)
            used = [program.variables.index(v) in some for v in inside] + [key in others for key in outside]
            found = [x if use else None for use, x in zip(used, found, strict=True)]
        return present(inside, found), present(outside, found[len(inside) :])

    return result, pullback


def without_cotangents(result: Result, targets: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    """The other results of a traced program of which TensorFlow would take gradients, if their shapes are known."""
    seen = {id(x) for x in targets}
    return [x for x in tensors_of(result) if id(x) not in seen and x.dtype.is_floating and x.shape.is_fully_defined()]


def zeros(run: "Execution", at: str, like: tf.Tensor) -> tf.Tensor:
    """Zeros on a device, one constant for all micro-batches: of one for each, TensorFlow makes as many programs."""
    key = at, tuple(like.shape), like.dtype
    if key not in run.zeros:
        run.zeros[key] = tf.zeros(like.shape, like.dtype)
    return run.zeros[key]


def lacks_cotangents(
    run: "Execution", result: Result, cotangents: Iterable[Component], added: Iterable[tuple[int, int]]
) -> bool:
    """Whether some of a program's results have no cotangent; a tensor and its logits are made of the same."""
    ends = {key.tensor for key in components(result.edges, run.graph)}
    losses = {(i, k) for i, found in result.losses.items() for k in range(len(found))}
    return not (ends <= {key.tensor for key in cotangents} and losses <= {*added})


def reached(
    function: Any, result: Result, keys: Iterable[Any], variables: list[tf.Tensor], edges: dict[int, Edge]
) -> tuple[set[int], set[Component]]:
    """The places of variables, and what of the edges, that lead to some results of a traced program.

    The others have no gradient. TensorFlow's is zero where a result leads to that has no cotangent, and an optimizer
    may move a weight for a gradient of zero.

    Args:
        function: the program, traced.
        result: of a call with these variables and edges.
        keys: of the results: components of edges, and added losses `(i, k)`.
    """
    ends = packed(result, function.outputs)
    wanted = [key.of(ends.edges) if isinstance(key, Component) else ends.losses[key[0]][key[1]] for key in keys]
    made = [x for op in function.graph.get_operations() for x in op.outputs]
    stops = {x.name for x in made if x.op.type == "StopGradient" or x.dtype.is_integer or x.dtype.is_bool}
    found = {op.name for op in makers(wanted, stops)}
    inputs = iter([x.op.name in found for x in function.inputs])
    places = {n for n, x in enumerate(variables) if any([next(inputs) for _ in tensors_of(x)])}
    keys = [Component(t, field) for t in sorted(edges) for field in Edge._fields]
    return places, {key for key in keys if any([next(inputs) for _ in tensors_of(key.of(edges))])}


def watched(
    run: "Execution", program: Program, variables: list[tf.Tensor], edges: dict[int, Edge]
) -> tuple[dict[int, tf.Tensor], dict[Component, tf.Tensor]]:
    """The variables of a program, and what of its edges, of which gradients are wanted."""
    return {v: x for v, x in zip(program.variables, variables, strict=True) if v in run.engine.trainable}, {
        key: x for key, x in components(edges, run.graph).items() if run.watch_inputs or key.tensor in run.graph.learned
    }
