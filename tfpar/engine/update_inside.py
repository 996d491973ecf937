"""The optimizer's work as the end of the program that finds the gradients: weights are read and written in place."""

# v: variable of the graph, n: weight to train

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import tensorflow as tf

from tfpar.comm.in_program import Gang
from tfpar.compat import _keras, _keras_parts
from tfpar.engine.engine import ExecutionGraph
from tfpar.engine.micro_batch import Parts
from tfpar.engine.stage_update import StageUpdate
from tfpar.engine.vjp import portions
from tfpar.engine.weights_inside import grouped
from tfpar.graph.recording import UpdatesApart
from tfpar.planning.mesh import Coordinate, dividing
from tfpar.variables.logical import LogicalVariable

if TYPE_CHECKING:
    from tfpar.engine.optimizer_step import Update


def can_be_inside(update: "Update", route: ExecutionGraph, parts: Parts, equal: bool) -> bool:
    """Whether a program can end with the update: it is the only one of its device, and has all that the update needs.

    Args:
        route: the way to the loss.
        equal: whether all replicas have as many samples.
    """
    engine = update.engine
    alone = len(update.mesh.lanes) == parts.micro_batches == 1 and engine.jit_compile
    together = bool(route.gangs) and (equal or update.mesh.count("samples") == 1)
    return (
        (alone or together)
        and route.partition.stages == 1
        and not (engine.updates_apart or engine.eager or engine.has_masks or route.global_batch or update.away)
        and update.in_parts
        and all(weight.regularizer is None for weight in update.weights)
    )


@dataclass(frozen=True, eq=False)
class UpdateInside:
    """An update as a part of a program.

    Args:
        update: which is otherwise made after all programs.
    """

    update: "Update"

    @cached_property
    def work(self) -> StageUpdate:
        """The optimizer's work for all weights."""
        update = self.update
        return StageUpdate(update.strategy, update.model.optimizer, update.weights, self.detached, update.variables(0))

    @cached_property
    def detached(self) -> list[LogicalVariable]:
        """The weights that all replicas have, and of which each updates a shard (ZeRO 1 and 2)."""
        return [_keras.stored(w) for n, w in enumerate(self.update.weights) if self.update.is_detached(n)]

    @cached_property
    def variables(self) -> list[LogicalVariable]:
        """What is read or written."""
        return [*self.work.variables, *self.detached]

    @cached_property
    def places(self) -> dict[int, int]:
        """For each variable of the graph that is updated, its place among the copies."""
        known = {id(v): place for place, v in enumerate(self.variables)}
        pairs = zip(self.update.numbers, self.update.weights, strict=True)
        found = {v: known.get(id(_keras.stored(weight))) for v, weight in pairs if v is not None}
        return {v: place for v, place in found.items() if place is not None}

    def copies(self, lane: Coordinate) -> list[tf.Variable]:
        """What a lane has of all that the optimizer reads or writes."""
        (place,) = (place for place in self.update.places if place.lane == lane)
        return [self.update.copy(v, place) for v in self.variables]

    def read(self, v: int, copies: Sequence[tf.Variable]) -> tf.Tensor:
        """The value of a variable that is updated, before that."""
        return copies[self.places[v]].read_value()

    def apply(
        self, copies: Sequence[tf.Variable], gradients: dict[int, Any], written: Any, scale: tf.Tensor,
        gang: Gang | None, lane: tf.Tensor | None,
    ):  # fmt: skip
        """Update a lane's copies.

        Args:
            gradients: by variable, over all lanes, or the shards of them that the lane updates.
            written: the variables that layers have assigned.
            scale: by which the loss was multiplied.
            gang, lane: of the program, if it exchanges tensors.

        Raises:
            UpdatesApart: nothing has a gradient, or a layer has assigned a weight that is updated.
        """
        found = [None if v is None else gradients.get(v) for v in self.update.numbers]
        if all(gradient is None for gradient in found) or any(v in self.places for v in written):
            raise UpdatesApart(self.update.engine.graph)
        attached, whole = copies[: len(self.work.variables)], copies[len(self.work.variables) :]
        axes = [next(axis for axis in dividing("samples") if axis in v.slot_sharding.dims) for v in self.detached]
        dims = [v.slot_sharding.dims[axis] for v, axis in zip(self.detached, axes, strict=True)]
        ways = zip(whole, axes, dims, strict=True)
        values = [gang.own_part(axis, copy.read_value(), lane, dim) for copy, axis, dim in ways]
        norms = self.norms(attached, values, found, scale, gang, lane)
        new = self.work.applied(attached, values, found, scale, norms)
        for (axis, _), same in grouped(range(len(new)), lambda n: (axes[n], new[n].dtype)).items():
            for some in portions({n: new[n] for n in same}):
                updated = gang.gathered(axis, {("updated", n): (new[n], dims[n]) for n in some}, lane)
                for n in some:
                    whole[n].assign(updated["updated", n])

    def norms(
        self, copies: Sequence[tf.Variable], values: Sequence[tf.Tensor], gradients: Sequence[Any], scale: tf.Tensor,
        gang: Gang | None, lane: tf.Tensor | None,
    ) -> tuple[tf.Tensor, tf.Tensor] | None:  # fmt: skip
        """The squared norm of each whole gradient, and of all, where the optimizer needs them and a lane has parts."""
        if not (_keras_parts.clips_norms(self.update.model.optimizer) and self.update.is_divided):
            return None
        squares = self.work.squares(copies, values, gradients, scale, None)
        for axis in gang.groups:
            parts = tf.constant([axis in edge.sharding.dims for edge in self.update.edges])
            if len(gang.groups[axis][0]) > 1:
                total = gang.exchanged("all-reduce", axis, squares, lane, ("squares", axis))
                squares = tf.where(parts, total, squares)
        return squares, tf.reduce_sum(squares)
