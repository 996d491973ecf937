"""Stages that several lanes of a pass run together: on the gathered batch, or to exchange what ranks have."""

# s: stage, m: micro-batch of a lane, t: tensor of the graph, v: variable

from typing import Any

import tensorflow as tf

from tfpar import batch
from tfpar._tf import independent
from tfpar.engine import tensors_of
from tfpar.program import Edge, with_logits
from tfpar.schedule import Action, Kind


def forward_whole(run: Any, action: Action):
    """Run a stage on the whole batch, and divide what it makes."""
    s = action.stage
    program = run.program(s)
    needs = list(with_logits(run.values[0], run.partition.needs(s)))
    edges = {t: run.whole(t) for t in needs}
    variables = [run.variable(s, 0, v) for v in program.variables]
    result = run.ran(s, 0, program, variables, edges)
    for t, (value, mask) in result.edges.items():
        parts = zip(run.divided(s, t, value), run.divided(s, t, mask), strict=True)
        for values, part in zip(run.values, parts, strict=True):
            values[t] = Edge(*part)
    run.state[0].update(result.state)
    run.results[s, 0] = result


def backward_whole(run: Any, action: Action):
    """Take the whole batch back through a stage."""
    s = action.stage
    if run.head and s == run.partition.stages - 1:
        for m, values in enumerate(run.values):
            with tf.device(run.device(s, run.lane(m))):
                run.send(m, run.head(run, m, with_logits(values, run.route.ends)))
    arrived = [run.arrived(s, m) for m in range(len(run.inputs))]
    cotangents = {
        t: batch.joined([a[t] for a in arrived]) if run.is_batched(t) else tf.add_n([a[t] for a in arrived])
        for t in arrived[0]
    }
    variables, edges = run.pullbacks.pop((s, 0))(cotangents, run.added_cotangents(run.results[s, 0], 0))
    independent(tensors_of((variables, edges)))
    run.gradients.update({(s, 0, v): gradient for v, gradient in variables.items()})
    for t, cotangent in edges.items():
        pieces = run.divided(s, t, cotangent) if run.is_batched(t) else [cotangent]
        for m, piece in enumerate(pieces):
            run.send(m, {t: piece})


def forward_collective(run: Any, action: Action):
    """Exchange what ranks have of a tensor."""
    collective, places, devices, inputs, (y,) = exchanged(run, action)
    edges = [run.values[m][inputs[0]] if inputs else Edge(None) for m in places]
    values = collective.there([e.value for e in edges], devices, run.engine.reduce)
    masks = collective.of_mask([e.mask for e in edges], devices)
    for m, value, mask in zip(places, values, masks, strict=True):
        run.values[m][y] = Edge(value, mask)


def backward_collective(run: Any, action: Action):
    """Exchange what ranks have of a gradient."""
    collective, places, devices, inputs, (y,) = exchanged(run, action)
    arrived = [run.cotangents[m].get(y) for m in places]
    if all(arrived) and (run.watch_inputs or run.is_learned(y)):
        summed = []
        for parts, device in zip(arrived, devices, strict=True):
            with tf.device(device):
                summed.append(tf.add_n(parts) if len(parts) > 1 else parts[0])
        for m, gradient in zip(places, collective.back(summed, devices, run.engine.reduce), strict=True):
            run.send(m, {inputs[0]: gradient})


def exchanged(run: Any, action: Action) -> tuple:
    """A collective, the micro-batches of the ranks, their devices, what goes in and what comes out."""
    s, _, first = action
    (i,) = run.partition.ops(s)
    op = run.graph.ops[i]
    places = [first + k * run.parts.micro_batches for k in range(run.ranks)]
    return run.route.collectives[s], places, [run.device(s, run.lane(m)) for m in places], op.inputs, op.outputs


WHOLE = {Kind.FORWARD: forward_whole, Kind.BACKWARD: backward_whole}
COLLECTIVE = {Kind.FORWARD: forward_collective, Kind.BACKWARD: backward_collective}
