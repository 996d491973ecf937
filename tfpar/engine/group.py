"""Segments that several lanes of a pass run together: on the gathered batch, or to exchange what ranks have."""

# s: segment, m: micro-batch of a lane, t: tensor of the graph, v: variable

from typing import TYPE_CHECKING

import tensorflow as tf

from tfpar.compat._tf import independent
from tfpar.engine import added_losses, micro_batch
from tfpar.engine.engine import MicroBatch, tensors_of
from tfpar.engine.program import Edge, with_logits
from tfpar.engine.vjp import keep
from tfpar.planning.schedule import Kind

if TYPE_CHECKING:
    from tfpar.engine.executor import Execution


def forward_global_batch(run: "Execution", s: int, first: MicroBatch):
    """Run a segment on the parts of all replicas at once, and divide what it makes."""
    places = run.together(s, first)
    program = run.program(s)
    edges = {t: run.gather(t, places) for t in with_logits(run.values[first], run.partition.needs(s))}
    variables = [run.variable(s, first, v) for v in program.variables]
    result = run.ran(s, first, program, variables, edges)
    for t, (value, mask) in result.edges.items():
        parts = zip(run.divided(s, t, value, places), run.divided(s, t, mask, places), strict=True)
        for m, part in zip(places, parts, strict=True):
            run.values[m][t] = Edge(*part)
    run.state[first].update(result.state)
    run.results[s, first] = result


def backward_global_batch(run: "Execution", s: int, first: MicroBatch):
    """Take the parts of all replicas back through a segment."""
    places = run.together(s, first)
    if run.head and s == run.partition.stages - 1:
        for m in places:
            with tf.device(run.device(s, m.lane)):
                run.send(m, run.head(run, m, with_logits(run.values[m], run.route.ends)))
    arrived = [run.arrived(s, m) for m in places]
    cotangents = {
        t: micro_batch.concat([a[t] for a in arrived]) if run.is_batched(t) else tf.add_n([a[t] for a in arrived])
        for t in arrived[0]
    }
    variables, edges = run.pullbacks.pop((s, first))(cotangents, added_losses.cotangents(run, s, first))
    independent(tensors_of((variables, edges)))
    keep(run, s, first, variables)
    for t, cotangent in edges.items():
        pieces = run.divided(s, t, cotangent, places) if run.is_batched(t) else [cotangent]
        for m, piece in zip(places, pieces, strict=False):
            run.send(m, {t: piece})


def forward_collective(run: "Execution", s: int, first: MicroBatch):
    """Exchange what ranks have of a tensor."""
    collective, places, devices, inputs, (y,) = exchanged(run, s, first)
    edges = [run.values[m][inputs[0]] if inputs else Edge(None) for m in places]
    values = collective.there([e.value for e in edges], devices, run.engine.reduce)
    masks = collective.of_mask([e.mask for e in edges], devices)
    for m, value, mask in zip(places, values, masks, strict=True):
        run.values[m][y] = Edge(value, mask)


def backward_collective(run: "Execution", s: int, first: MicroBatch):
    """Exchange what ranks have of a gradient."""
    collective, places, devices, inputs, (y,) = exchanged(run, s, first)
    arrived = [run.cotangents[m].get(y) for m in places]
    if all(arrived) and (run.watch_inputs or run.is_learned(y)):
        summed = []
        for parts, device in zip(arrived, devices, strict=True):
            with tf.device(device):
                summed.append(tf.add_n(parts) if len(parts) > 1 else parts[0])
        for m, gradient in zip(places, collective.back(summed, devices, run.engine.reduce), strict=True):
            run.send(m, {inputs[0]: gradient})


def exchanged(run: "Execution", s: int, first: MicroBatch) -> tuple:
    """A collective, the micro-batches of the ranks, their devices, what goes in and what comes out."""
    (i,) = run.partition.ops(s)
    op = run.graph.ops[i]
    places = run.together(s, first)
    return run.route.collectives[s], places, [run.device(s, m.lane) for m in places], op.inputs, op.outputs


GLOBAL_BATCH = {Kind.FORWARD: forward_global_batch, Kind.BACKWARD: backward_global_batch}
COLLECTIVE = {Kind.FORWARD: forward_collective, Kind.BACKWARD: backward_collective}
