"""What a finished pass leaves: outputs, losses, gradients and state of the whole batch."""

# s: stage, m: micro-batch of a lane, t: tensor of the graph, v: variable, i: operation, k: its k-th added loss

from typing import Any

import tensorflow as tf

from tfpar import _keras, _moments, batch
from tfpar.engine import device_of, read
from tfpar.passes import Pass, add
from tfpar.probe import Combine
from tfpar.program import Edge, tensor_of, with_logits
from tfpar.state import whole_moments
from tfpar.variables import HOST
from tfpar.whole import NormalizeWith


def outputs(run: Pass) -> dict[int, Edge]:
    """The model's outputs for the whole batch, and their logits, each on the device that made its first rows."""
    found = {}
    for t in with_logits(run.values[0], run.graph.outputs):
        source = run.graph.producer.get(tensor_of(t))
        with tf.device(HOST if source is None else run.device(run.partition.stage_of[source])):
            found[t] = run.whole(t)
    return found


def added_losses(run: Pass) -> dict[tuple[int, int], tf.Tensor]:
    """What layers added to the loss, for the whole batch."""
    total: dict[tuple[int, int], tf.Tensor] = {}
    for (_, m), result in run.results.items():
        for (i, k), weight in run.loss_weights(result, run.weights[run.part(m)]).items() if not run.rank(m) else ():
            loss = result.losses[i][k]
            part = tf.math.multiply_no_nan(loss, tf.cast(weight, loss.dtype))  # no rows have no mean
            total[i, k] = total[i, k] + part if (i, k) in total else part
    return total


def gradients(run: Pass, v: int | None) -> list[Any]:
    """The gradient of a variable, if there is one, for each lane on its device; `None` if nothing depends on it."""
    if v is None:
        return [None] * run.lanes
    found = []
    for lane in range(run.lanes):
        parts = [g for (_, owner, of), g in run.gradients.items() if (owner, of) == (lane, v)]
        with tf.device(device_of(run.engine.graph.variables[v], lane)):
            total = parts[0] if parts else None
            for part in parts[1:]:
                total = add(total, part)
        found.append(total)
    return found


def input_gradient(run: Pass, t: int) -> tf.Tensor | None:
    """The gradient of an input of the model; `None` if nothing depends on it."""
    parts = [c[t] for c in run.cotangents if t in c]
    return batch.joined([tf.add_n(p) for p in parts]) if parts else None


def write_state(run: Pass):
    """Assign what layers changed: once for the batch, however many parts it had."""
    moved = move_statistics(run) if len(run.inputs) > 1 else set()
    for v in dict.fromkeys(v for state in run.state for v in state):
        variable = run.engine.graph.variables[v]
        if v in run.engine.layouts:
            for rank, copy in enumerate(_keras.stored(variable).copies):  # every part has a value of its own
                with tf.device(copy.device):
                    copy.assign(run.state[rank][v])
        elif id(variable) not in moved:
            with tf.device(device_of(variable)):
                variable.assign(combined(run, v, [run.state[m][v] for m in run.firsts if v in run.state[m]]))


def combined(run: Pass, v: int, parts: list[tf.Tensor]) -> tf.Tensor:
    """The value of a variable after the batch, from those after each part."""
    variable = run.engine.graph.variables[v]
    if len(parts) == 1 or _keras.is_seed(variable):
        return parts[0]
    s = max(s for (s, m), result in run.results.items() if v in result.state)
    writer = run.program(s).writers[v]
    shared = isinstance(run.route.graph.calls[writer].operation, NormalizeWith)
    kind = Combine.SAME if shared else run.found(writer, "state", id(variable))
    if kind is Combine.SAME:
        return parts[0]
    if kind is Combine.MEAN:
        return tf.add_n([p * tf.cast(w, p.dtype) for p, w in zip(parts, run.weights, strict=True)])
    if kind is Combine.SUM:
        before = read(variable)
        return before + tf.add_n([p - before for p in parts])
    raise run.needs_whole(
        writer,
        f"{run.graph.ops[writer].name} keeps {variable.path}, whose value after a batch does not follow from its "
        "values after the micro-batches",
    )


def move_statistics(run: Pass) -> set[int]:
    """Move the statistics of each BatchNormalization by those of the whole batch; returns which variables moved."""
    moved: set[int] = set()
    for s in set(range(run.partition.stages)) - set(run.route.whole):
        layers = run.program(s).normalizations
        for number, layer in enumerate(layers):
            calls = zip(*(run.results[s, m].moments.get(number, []) for m in range(len(run.inputs))), strict=True)
            for parts in calls:
                with tf.device(device_of(layer.moving_mean)):
                    stacked = _moments.Moments(*(tf.stack(values) for values in zip(*parts, strict=True)))
                    _moments.move_statistics(layer, *whole_moments(stacked))
                moved |= {id(v) for v in _moments.moving_statistics(layer)}
    return moved
