"""Gradients of weights, exchanged: over replicas, and over ranks where each finds a part of the sum."""

# n: weight to train, v: variable of the graph, s: stage or segment

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from tfpar.comm.gradients import plain, sum_of
from tfpar.engine import batch_results
from tfpar.engine.engine import Engine, device_of, each
from tfpar.engine.executor import Execution
from tfpar.engine.weight_edge import WeightEdge, exchange
from tfpar.planning.mesh import AXES, Coordinate


@dataclass(frozen=True)
class GradientReduction:
    """Sums of gradients over axes of the mesh.

    Args:
        engine: of the model.
        edges: of the weights to train.
        numbers: the variable of the graph that each weight is.
        members: the weights of each stage.
    """

    engine: Engine
    edges: Sequence[WeightEdge]
    numbers: Sequence[int | None]
    members: dict[int, list[int]]

    def reduce(self, run: Execution) -> list[dict[Coordinate, Any]]:
        """The gradient of each weight on each lane, or the shard that it updates.

        Those that come from one segment are added up together.

        Args:
            run: of which every action has been emitted.
        """
        last: dict[int, int] = {}  # of each variable, the segment that is the last to go backward
        for s, _, v in run.gradients:
            last[v] = min(s, last.get(v, s))
        buckets: dict[tuple, list[int]] = {}
        for s, members in self.members.items():
            for n in members:
                v = self.numbers[n]
                if v is not None:
                    key = s, last.get(v, 0) if len(run.mesh.ranks) == 1 else 0, self.edges[n].is_partial
                    buckets.setdefault(key, []).append(n)
        mesh, gradients = self.engine.mesh, batch_results.gradients(run)
        terms = {n: gradients.get(v, []) for n, v in enumerate(self.numbers)}
        with tf.name_scope("all-reduce/weights"):
            for members in buckets.values():
                for axis in (axis for axis in reversed(AXES) if AXES[axis].divides != "operations"):
                    found = [(n, term) for n in members for term in terms[n] if not self.is_done(run, n, axis)]
                    for lanes in mesh.groups(axis):
                        self.exchange(found, axis, lanes)
        found = [{lane: self.total(n, lane, terms[n]) for lane in mesh.lanes} for n in range(len(self.edges))]
        if self.engine.plan.zero < 3:
            return found
        # other replicas read a shard until they are back; TensorFlow's optimizer may lose the edges that say so
        with tf.control_dependencies([done for last in run.order.last.values() for done in last]):
            return [{lane: each(tf.identity, g) for lane, g in parts.items()} for parts in found]

    def is_done(self, run: Execution, n: int, axis: str) -> bool:
        """Whether there is nothing to exchange, or it was done in a program or after each micro-batch."""
        kind = self.edges[n].backward(axis)
        early = kind == "reduce-scatter" and run.scatters
        return kind == "identity" or early or (self.numbers[n], axis) in run.exchanged

    def exchange(self, terms: Sequence[tuple[int, dict]], axis: str, lanes: Sequence[Coordinate]):
        """Replace gradients of these lanes by what they have after the exchange."""
        values = [[term[lane] for lane in lanes] for _, term in terms]
        exchanged = exchange([self.edges[n] for n, _ in terms], axis, lanes, values, self.engine.cross_device_ops)
        for (_, term), parts in zip(terms, exchanged, strict=True):
            term.update(zip(lanes, parts, strict=True))

    def total(self, n: int, lane: Coordinate, terms: Sequence[dict]) -> Any:
        """The gradient of a weight on a lane from its terms; `None` if it has none."""
        present = [term[lane] for term in terms if term[lane] is not None]
        if len(present) < 2:
            return plain(present[0]) if present else None
        with tf.device(device_of(self.edges[n].variable, lane)):
            return plain(sum_of(present))
