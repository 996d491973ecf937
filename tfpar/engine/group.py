"""Segments in which lanes exchange what they have: collectives over an axis of the mesh."""

# s: segment, m: micro-batch of a lane, x, y: tensors of the graph, before and after

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from tfpar.comm.collectives import on_each
from tfpar.engine import micro_batch
from tfpar.engine.engine import MicroBatch
from tfpar.engine.program import Edge, with_logits
from tfpar.planning.schedule import Kind

if TYPE_CHECKING:
    from tfpar.engine.executor import Execution

NOTHING = Edge(None)  # what an exchange of nothing begins with: that of numbers of ranks


def forward_collective(run: "Execution", s: int, first: MicroBatch):
    """Exchange what lanes have of tensors."""
    collective, places, devices, exchanged = exchange(run, s, first)
    for x, y in exchanged:
        for key in (x, ~x) if ~x in run.values[first] else (x,):
            given = [run.values[m].get(key, NOTHING) for m in places]
            edges = edges_of(run, s, places, given)
            values = collective.there([e.value for e in given], devices, run.engine.cross_device_ops, edges)
            masks = collective.of_mask([e.mask for e in given], devices, edges)
            for m, value, mask in zip(places, values, masks, strict=True):
                run.values[m][y if key == x else ~y] = Edge(value, mask)


def backward_collective(run: "Execution", s: int, first: MicroBatch):
    """Exchange what lanes have of the tensors' gradients."""
    collective, places, devices, exchanged = exchange(run, s, first)
    for x, y in exchanged:
        for key in with_logits(run.values[first], [y]):
            source = x if key == y else ~x
            arrived = all(key in run.cotangents[m] for m in places)
            if arrived and (run.watch_inputs or y in run.graph.learned):
                edges = edges_of(run, s, places, [run.values[m].get(source, NOTHING) for m in places])
                summed = on_each(devices, lambda n: run.cotangent(places[n], key))  # noqa: B023
                gradients = collective.back(summed, devices, run.engine.cross_device_ops, edges)
                for m, gradient in zip(places, gradients, strict=True):
                    run.send(m, {source: gradient})


def exchange(run: "Execution", s: int, first: MicroBatch) -> tuple:
    """A collective, the micro-batches of the lanes, their devices, and each tensor before and after."""
    (i,) = run.partition.ops(s)
    op = run.graph.ops[i]
    places = run.together(s, first)
    exchanged = list(zip(op.inputs or op.outputs, op.outputs, strict=True))
    return run.route.collectives[s], places, [run.device(s, m.lane) for m in places], exchanged


def edges_of(run: "Execution", s: int, places: Sequence[MicroBatch], given: Sequence[Edge]) -> list[Any] | None:
    """Where the rows of each replica begin and end, if replicas exchange; `None` for nearly equal parts."""
    collective = run.route.collectives[s]
    if collective.axis != "samples":
        return None
    rows = [micro_batch.count(e.value) for e in given]
    if collective.forward == "slice":
        rows = micro_batch.in_proportion(rows[0], [samples(run, m) for m in places])
    return [0, *accumulate(rows)]


def samples(run: "Execution", m: MicroBatch) -> Any:
    """The samples of a part."""
    return micro_batch.count([run.values[m][next(filter(run.route.is_batched, run.graph.inputs))].value])


COLLECTIVE = {Kind.FORWARD: forward_collective, Kind.BACKWARD: backward_collective}
