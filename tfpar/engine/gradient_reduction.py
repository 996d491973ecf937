"""Gradients of weights, added up: over replicas, and over ranks where each finds a part of the sum."""

# n: weight to train, v: variable of the graph, s: stage or segment

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

from tfpar.comm.collectives import all_reduce_gradients
from tfpar.comm.gradients import plain, sum_of
from tfpar.engine import batch_results
from tfpar.engine.engine import Engine, device_of, each, scattered, shards_of
from tfpar.engine.executor import Execution
from tfpar.planning.mesh import FIRST, Coordinate
from tfpar.planning.sharding import REPLICATED


@dataclass(frozen=True)
class GradientReduction:
    """Sums of gradients over axes of the mesh.

    Args:
        engine: of the model.
        weights: those to train.
        numbers: the variable of the graph that each is.
        members: the weights of each stage.
    """

    engine: Engine
    weights: Sequence[keras.Variable]
    numbers: Sequence[int | None]
    members: dict[int, list[int]]

    def reduce(self, run: Execution, in_parts: bool) -> list[dict[Coordinate, Any]]:
        """The gradient of each weight on each lane, or the shard that it updates.

        Those that come from one segment are added up together.

        Args:
            run: of which every action has been emitted.
            in_parts: whether each device updates what it has, and needs no more than a shard.
        """
        last: dict[int, int] = {}  # of each variable, the segment that is the last to go backward
        for s, _, v in run.gradients:
            last[v] = min(s, last.get(v, s))
        buckets: dict[tuple, list[int]] = {}
        for s, members in self.members.items():
            for n in members:
                v = self.numbers[n]
                if v is not None:
                    key = s, last.get(v, 0) if run.ranks == 1 else 0, v in self.engine.partial
                    buckets.setdefault(key, []).append(n)
        mesh, gradients = self.engine.mesh, batch_results.gradients(run)
        terms = {n: gradients.get(v, []) for n, v in enumerate(self.numbers)}
        with tf.name_scope("all-reduce/weights"):
            for (*_, is_partial), members in buckets.items():
                copied = {n for n in members if not in_parts or shards_of(self.weights[n]) == REPLICATED}
                every = [(n, term) for n in members for term in terms[n]]
                for rank in mesh.along("tensor", FIRST):
                    replicas = mesh.along("data", rank)
                    self.add_up([(n, term) for n, term in every if n in copied], replicas)
                    if not run.scatters:
                        self.scatter([(n, term) for n, term in every if n not in copied], replicas)
                for replica in mesh.along("data", FIRST) if is_partial else ():
                    self.add_up(every, mesh.along("tensor", replica))
        found = [{lane: self.total(n, lane, terms[n]) for lane in mesh.lanes} for n in range(len(self.weights))]
        if self.engine.plan.zero < 3:
            return found
        # other replicas read a shard until they are back; TensorFlow's optimizer may lose the edges that say so
        with tf.control_dependencies([done for last in run.order.last.values() for done in last]):
            return [{lane: each(tf.identity, g) for lane, g in parts.items()} for parts in found]

    def add_up(self, terms: Sequence[tuple[int, dict]], lanes: Sequence[Coordinate]):
        """Replace gradients of these lanes by their sum."""
        if terms:
            devices = [device_of(self.weights[terms[0][0]], lane) for lane in lanes]
            values = [[term[lane] for lane in lanes] for _, term in terms]
            sums = all_reduce_gradients(values, devices, self.engine.cross_device_ops)
            for (_, term), totals in zip(terms, sums, strict=True):
                for lane, total in zip(lanes, totals, strict=True):
                    term[lane] = total

    def scatter(self, terms: Sequence[tuple[int, dict]], lanes: Sequence[Coordinate]):
        """Replace gradients of these lanes, each by its shard of their sum."""
        for n, term in terms:
            shards = scattered(self.weights[n], [term[lane] for lane in lanes], lanes)
            for lane, shard in zip(lanes, shards, strict=True):
                term[lane] = shard

    def total(self, n: int, lane: Coordinate, terms: Sequence[dict]) -> Any:
        """The gradient of a weight on a lane from its terms; `None` if it has none."""
        present = [term[lane] for term in terms if term[lane] is not None]
        if len(present) < 2:
            return plain(present[0]) if present else None
        with tf.device(device_of(self.weights[n], lane)):
            return plain(sum_of(present))
