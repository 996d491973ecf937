"""What a finished pass leaves: outputs, losses, gradients and state of the whole batch."""

# s: segment, m: micro-batch of a lane, t: tensor of the graph, v: variable, i: operation, k: its k-th added loss

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tensorflow as tf
from keras import tree

from tfpar.comm.gradients import SharedRows, sum_of
from tfpar.compat import _keras, _moments
from tfpar.engine import micro_batch
from tfpar.engine.added_losses import weights
from tfpar.engine.combination import needs_whole, of_operation
from tfpar.engine.engine import copy_of, device_of, layout_of, read
from tfpar.engine.executor import Execution
from tfpar.engine.global_batch import TakeMoments
from tfpar.engine.program import Component, Edge, restored, selected
from tfpar.graph.batch_probe import Combine
from tfpar.graph.keras_graph import KerasGraph
from tfpar.planning.mesh import FIRST, Coordinate
from tfpar.planning.sharding import REPLICATED
from tfpar.variables.parts import HOST


def outputs(run: Execution) -> dict[int, Edge]:
    """The model's outputs for the whole batch, each on the device that made its first rows."""
    return {t: output(run, t) for t in selected(run.values[run.all[0]], tree.flatten(run.route.graph.outputs))}


def output(run: Execution, t: int) -> Edge:
    """A tensor for the whole batch, on the device that made its first rows."""
    source = run.graph.producer.get(t)
    with tf.device(HOST if source is None else run.device(run.partition.stage_of[source])):
        parts = [run.values[m][t] for m in run.firsts]
        return micro_batch.joined(parts) if run.route.graph.is_batched(t) else parts[0]


def structured(graph: KerasGraph, outputs: dict[int, Edge]) -> Any:
    """The model's outputs as Keras expects them: in their structure, with their masks and logits."""
    return tree.map_structure(lambda t: restored(t, outputs, graph), graph.outputs)


def added_losses(run: Execution) -> dict[tuple[int, int], tf.Tensor]:
    """What layers added to the loss, for the whole batch."""
    total: dict[tuple[int, int], tf.Tensor] = {}
    for (_, m), result in run.results.items():
        for (i, k), weight in weights(run, result, run.share(m)).items() if m.lane == m.lane.replica else ():
            loss = result.losses[i][k]
            part = tf.math.multiply_no_nan(loss, tf.cast(weight, loss.dtype))  # no rows have no mean
            total[i, k] = total[i, k] + part if (i, k) in total else part
    return total


def gradients(run: Execution) -> dict[int, list[dict[Coordinate, Any]]]:
    """The gradient of each variable that has one, in terms: each what lanes have of it, on their devices.

    It is in one term, but for rows that all parts of a batch have: those of each segment are added up on their own.
    """
    found: dict[int, dict[Any, dict[Coordinate, list]]] = {}
    for (s, lane, v), gradient in run.gradients.items():
        term = s if isinstance(gradient, SharedRows) else None
        found.setdefault(v, {}).setdefault(term, {}).setdefault(lane, []).append(gradient)
    return {
        v: [{lane: summed(run, v, lane, term.get(lane, ())) for lane in run.mesh.lanes} for term in terms.values()]
        for v, terms in found.items()
    }


def summed(run: Execution, v: int, lane: Coordinate, gradients: Sequence[Any]) -> Any:
    """The sum of some gradients of a variable, on the device of a lane; `None` of none."""
    with tf.device(device_of(run.engine.graph.variables[v], lane)):
        return sum_of(gradients)


def input_gradient(run: Execution, t: int) -> tf.Tensor | None:
    """The gradient of an input of the model; `None` if nothing depends on it."""
    parts = [c[Component(t)] for c in run.cotangents.values() if Component(t) in c]
    return micro_batch.concat([tf.add_n(p) for p in parts]) if parts else None


def write_state(run: Execution):
    """Assign what layers changed: once for the batch, however many parts it had."""
    moved = move_statistics(run) if len(run.inputs) > 1 else set()
    for v in dict.fromkeys(v for state in run.state.values() for v in state):
        variable = run.engine.graph.variables[v]
        if id(variable) in moved:
            continue
        if layout_of(variable) != REPLICATED:
            for lane in run.mesh.lanes:  # every rank has a value of its own
                with tf.device(device_of(variable, lane)):
                    copy_of(variable, lane).assign(combined(run, v, lane.rank))
        else:
            with tf.device(device_of(variable)):
                variable.assign(combined(run, v))


def combined(run: Execution, v: int, rank: Coordinate = FIRST) -> tf.Tensor:
    """The value of a variable, or of a rank's part, after the batch, from those after each part."""
    variable = run.engine.graph.variables[v]
    places = [m for m in run.all if m.lane.rank == rank and v in run.state[m]]
    parts = [run.state[m][v] for m in places]
    if len(parts) == 1 or _keras.is_seed(variable):
        return parts[0]
    s = max(s for (s, m), result in run.results.items() if v in result.state)
    writer = run.program(s).writers[v]
    kind = of_operation(run, writer, "state", id(variable))
    if kind is Combine.SAME:
        return parts[0]
    if kind is Combine.MEAN:
        return tf.add_n([p * tf.cast(run.share(m), p.dtype) for p, m in zip(parts, places, strict=True)])
    if kind is Combine.SUM:
        before = read(variable, rank)
        return before + tf.add_n([p - before for p in parts])
    raise needs_whole(
        run,
        writer,
        f"{run.graph.ops[writer].name} keeps {variable.path}, whose value after a batch does not follow from its "
        "values after the micro-batches",
    )


def move_statistics(run: Execution) -> set[int]:
    """Move the statistics of each BatchNormalization by those of the whole batch; returns which variables moved."""
    moved: set[int] = set()
    for layer, parts in statistics(run):
        with tf.device(device_of(layer.moving_mean)):
            _moments.move_statistics(layer, *_moments.whole_moments(parts))
        moved |= {id(v) for v in _moments.moving_statistics(layer)}
    return moved


def statistics(run: Execution) -> Iterator[tuple[Any, _moments.Moments]]:
    """Each BatchNormalization that moves, and the statistics of each part, (parts, channels) and (parts,)."""
    places, written = run.engine.graph.places, {v for state in run.state.values() for v in state}

    def moves(layer: Any) -> bool:
        return places.get(id(layer.moving_mean)) in written

    def of_ranks(layer: Any, of: Callable[[Coordinate], _moments.Moments]) -> _moments.Moments:
        ranks = run.mesh.ranks if layout_of(layer.moving_mean) != REPLICATED else (FIRST,)
        mean, variance, divisors = zip(*map(of, ranks), strict=True)
        return _moments.Moments(tf.concat(mean, -1), tf.concat(variance, -1), divisors[0])

    for op, call in zip(run.graph.ops, run.route.graph.calls, strict=True):
        if isinstance(call.operation, TakeMoments) and moves(layer := call.operation.call.operation):

            def taken(rank: Coordinate, outputs: Any = op.outputs) -> _moments.Moments:
                parts = [run.values[m] for m in run.all if m.lane.rank == rank]
                return _moments.Moments(*(tf.concat([values[t].value for values in parts], 0) for t in outputs))

            yield layer, of_ranks(layer, taken)
    for s in range(run.partition.stages):
        for number, layer in enumerate([] if s in run.route.collectives else run.program(s).normalizations):
            results = [(m.lane.rank, found) for (of, m), found in run.results.items() if of == s]
            calls = len(results[0][1].moments.get(number, []))
            if s in run.route.global_batch:  # it has moved by itself
                continue
            for n in range(calls):

                def recorded(rank: Coordinate, at: Any = (number, n), results: Any = results) -> _moments.Moments:
                    parts = [found.moments[at[0]][at[1]] for of, found in results if of == rank]
                    return _moments.Moments(*(tf.stack(values) for values in zip(*parts, strict=True)))

                yield layer, of_ranks(layer, recorded)
