"""Segments in which lanes exchange what they have: collectives over an axis of the mesh."""

# s: segment, m: micro-batch of a lane, x, y: tensors of the graph, before and after

from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from tfpar.comm.collectives import on_each
from tfpar.engine import micro_batch
from tfpar.engine.engine import MicroBatch
from tfpar.engine.program import Component, Edge
from tfpar.planning.schedule import Kind

if TYPE_CHECKING:
    from tfpar.engine.executor import Execution

NOTHING = Edge(None)  # what an exchange of nothing begins with: that of numbers of ranks


def forward_collective(run: "Execution", s: int, first: MicroBatch):
    """Exchange what lanes have of tensors."""
    collective, places, devices, exchanged = exchange(run, s, first)
    for x, y in exchanged:
        values, masks, logits = zip(*(run.values[m].get(x, NOTHING) for m in places), strict=True)
        offsets = offsets_of(run, s, places, values)
        there = partial(collective.there, devices=devices, ops=run.engine.cross_device_ops, offsets=offsets)
        logits = logits if logits[0] is None else there(logits)
        found = zip(there(values), collective.of_mask(masks, devices, offsets), logits, strict=True)
        for m, edge in zip(places, found, strict=True):
            run.values[m][y] = Edge(*edge)


def backward_collective(run: "Execution", s: int, first: MicroBatch):
    """Exchange what lanes have of the tensors' gradients."""
    collective, places, devices, exchanged = exchange(run, s, first)
    for x, y in exchanged:
        for key in (Component(y), Component(y, "logits")):
            arrived = all(key in run.cotangents[m] for m in places)
            if arrived and (run.watch_inputs or y in run.graph.learned):
                offsets = offsets_of(run, s, places, [run.values[m].get(x, NOTHING).value for m in places])
                summed = on_each(devices, lambda n: run.cotangent(places[n], key))  # noqa: B023
                gradients = collective.back(summed, devices, run.engine.cross_device_ops, offsets)
                for m, gradient in zip(places, gradients, strict=True):
                    run.send(m, {key._replace(tensor=x): gradient})


def exchange(run: "Execution", s: int, first: MicroBatch) -> tuple:
    """A collective, the micro-batches of the lanes, their devices, and each tensor before and after."""
    (i,) = run.partition.ops(s)
    op = run.graph.ops[i]
    places = run.together(s, first)
    exchanged = list(zip(op.inputs or op.outputs, op.outputs, strict=True))
    return run.route.collectives[s], places, [run.device(s, m.lane) for m in places], exchanged


def offsets_of(run: "Execution", s: int, places: Sequence[MicroBatch], values: Sequence[Any]) -> list[Any] | None:
    """Where the rows of each replica begin and end, if replicas exchange; `None` for nearly equal parts."""
    collective = run.route.collectives[s]
    if collective.axis != "samples":
        return None
    rows = [micro_batch.count(value) for value in values]
    if collective.forward == "slice":
        rows = micro_batch.in_proportion(rows[0], [samples(run, m) for m in places])
    return [0, *accumulate(rows)]


def samples(run: "Execution", m: MicroBatch) -> Any:
    """The samples of a part."""
    return micro_batch.count([run.values[m][next(filter(run.route.graph.is_batched, run.graph.inputs))].value])


COLLECTIVE = {Kind.FORWARD: forward_collective, Kind.BACKWARD: backward_collective}
