"""From the gradients of all lanes to new weights: reduced, then Keras' own optimizer on each device."""

# n: weight to train, v: variable of the graph, r: replica, k: rank

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from tfpar.comm.collectives import all_reduce, on_each
from tfpar.comm.gradients import of_parts
from tfpar.compat import _keras, _keras_parts
from tfpar.engine.description import Description
from tfpar.engine.engine import Engine, ExecutionGraph, device_of, each, full_value, layout_of
from tfpar.engine.executor import Execution
from tfpar.engine.gradient_reduction import GradientReduction
from tfpar.engine.micro_batch import Parts
from tfpar.engine.stage_update import StageUpdate, apply
from tfpar.engine.update_inside import UpdateInside, can_be_inside
from tfpar.engine.weight_edge import WeightEdge
from tfpar.planning.mesh import AXES, FIRST, Coordinate
from tfpar.variables.logical import LogicalVariable
from tfpar.variables.parts import HOST
from tfpar.variables.shard_view import shard_of, write_shards


class Place(NamedTuple):
    """A device that updates the weights of a stage for a lane.

    Args:
        device: its name.
        number: its place in the mesh.
    """

    device: str
    stage: int
    lane: Coordinate
    number: int


class Update:
    """The end of a scheduled step.

    Args:
        strategy: gives `mesh`, `cross_device_ops` and `offload`.
        engine: of the model.
    """

    def __init__(self, strategy: Description, engine: Engine):
        self.strategy, self.engine, self.model = strategy, engine, engine.model
        self.weights = list(self.model.trainable_weights)  # as they were when the model was compiled
        self.mesh, self.stages = strategy.mesh, range(engine.plan.partition.stages)
        self.away = strategy.offload == "optimizer"

    def penalties(self) -> list[tf.Tensor]:
        """What regularizers make of the weights."""
        found = []
        for variable in self.weights:
            if variable.regularizer is not None:
                with tf.device(device_of(variable)):
                    found.append(variable.regularizer(full_value(variable)))
        return found

    def __call__(self, run: Execution, scale: Any):
        """Reduce the gradients of a pass and apply them."""
        reduced = self.reduction.reduce(run)
        as_one = len(self.mesh.lanes) == 1 and not self.engine.jit_compile and not self.away
        nothing = all(gradient is None for lanes in reduced for gradient in lanes.values())
        as_one = as_one or nothing  # Keras says what is wrong
        if as_one or not self.in_parts:
            found = [self.whole_gradient(n, g) for n, g in enumerate(reduced)]
            apply(self.model.optimizer, self.weights, found, scale)
            return
        busy = [p for p in self.places if any(reduced[n][p.lane] is not None for n in self.members[p.stage])]
        norms = [None] * len(busy)
        if _keras_parts.clips_norms(self.model.optimizer) and (self.is_divided or len(self.stages) > 1):
            norms = self.norms(busy, reduced, scale)
        updated = self.at_places("applied", busy, reduced, scale, norms)
        for s in self.stages:
            detached = [n for n in self.members[s] if self.is_detached(n)]
            for number, n in enumerate(detached):
                shards = [new[number] for place, new in zip(busy, updated, strict=True) if place.stage == s]
                if shards:
                    write_shards(_keras.stored(self.weights[n]), shards)
        for place in self.places:
            for variable in self.common if place not in busy else ():  # steps are counted everywhere
                self.copy(variable, place).assign(self.copy(variable, busy[0]).read_value())

    def inside(self, route: ExecutionGraph, parts: Parts, equal: bool) -> UpdateInside | None:
        """This update as the end of the programs of a way, if they can end with it; arguments as of `can_be_inside`."""
        able = bool(self.weights) and can_be_inside(self, route, parts, equal)
        return self.as_part if able else None

    @cached_property
    def as_part(self) -> UpdateInside:
        """This update as the end of programs."""
        return UpdateInside(self)

    @cached_property
    def edges(self) -> list[WeightEdge]:
        """What lanes exchange of the gradient of each weight."""
        partial, dtype = self.engine.partial, self.engine.reduce_dtype
        pairs = zip(self.weights, self.numbers, strict=True)
        return [WeightEdge(weight, v in partial, self.in_parts, dtype) for weight, v in pairs]

    @cached_property
    def reduction(self) -> GradientReduction:
        """Adds up gradients of lanes."""
        return GradientReduction(self.engine, self.edges, self.numbers, self.members)

    @cached_property
    def programs(self) -> dict[int, dict[str, Callable]]:
        """What runs for the weights of each stage."""
        found = {}
        for s in self.stages:
            weights = [self.weights[n] for n in self.members[s]]
            detached = [_keras.stored(self.weights[n]) for n in self.members[s] if self.is_detached(n)]
            update = StageUpdate(self.strategy, self.model.optimizer, weights, detached, self.variables(s))
            runs = {"applied": update.applied, "squares": update.squares}
            found[s] = {name: self.engine.traced(run, compiled=not self.away) for name, run in runs.items()}
        return found

    # ---- what is where

    @cached_property
    def numbers(self) -> list[int | None]:
        """The variable of the graph that each weight is."""
        return [self.engine.graph.places.get(id(weight)) for weight in self.weights]

    @cached_property
    def members(self) -> dict[int, list[int]]:
        """The weights of each stage."""
        home = [0 if v is None else self.engine.plan.partition.home(v) for v in self.numbers]
        return {s: [n for n, of in enumerate(home) if of == s] for s in self.stages}

    @cached_property
    def places(self) -> list[Place]:
        """Every device, once for each stage that it has."""
        devices = [(self.engine.plan.device(s, lane), s, lane) for lane in self.mesh.lanes for s in self.stages]
        return [Place(*place, self.mesh.devices.index(place[0])) for place in devices]

    @property
    def is_divided(self) -> bool:
        """Whether lanes have parts of weights, or of slots."""
        return any(map(is_divided, self.weights))

    @cached_property
    def in_parts(self) -> bool:
        """Whether each device can update what it has: nothing looks at more than that, but norms."""
        optimizer, kind, divided = self.model.optimizer, type(self.model.optimizer), [*filter(is_divided, self.weights)]
        if (len(self.stages) > 1 or divided) and (optimizer.use_ema or optimizer.gradient_accumulation_steps):
            return False
        if not divided:
            return len(self.stages) == 1 or kind in ELEMENTWISE | PER_WEIGHT
        plain = all(v.constraint is None and (v.regularizer is None or type(v.regularizer) in SUMS) for v in divided)
        return kind in ELEMENTWISE and plain

    def is_detached(self, n: int) -> bool:
        """Whether a weight is updated away from its copies: its slots cover another part of it, or are elsewhere."""
        stored = _keras.stored(self.weights[n])
        return isinstance(stored, LogicalVariable) and (self.away or stored.slot_sharding != stored.sharding)

    @property
    def slots(self) -> list[list[Any]]:
        """What the optimizer keeps for each weight."""
        return [list(getattr(_keras.stored(weight), "followers", ())) for weight in self.weights]

    @property
    def common(self) -> list[keras.Variable]:
        """What the optimizer keeps for all weights together."""
        slots = {id(slot) for found in self.slots for slot in found}
        return [v for v in self.model.optimizer.variables if id(_keras.stored(v)) not in slots]

    def variables(self, stage: int) -> list[LogicalVariable]:
        """What the optimizer reads or writes where it is, for the weights of a stage.

        Not the int32 that Adafactor keeps in place of a slot, and never reads: TensorFlow has those of a GPU on the
        host, where XLA's programs for the GPU cannot be given them.
        """
        slots = self.slots
        known = {id(_keras.stored(v)) for v in self.model.optimizer.variables}
        found = [_keras.stored(self.weights[n]) for n in self.members[stage] if not self.is_detached(n)]
        found += [slot for n in self.members[stage] for slot in slots[n] if id(slot) in known]
        found += [_keras.stored(v) for v in self.common]
        found = [v for v in {id(v): v for v in found}.values() if isinstance(v, LogicalVariable)]
        return [v for v in found if v.dtype != tf.int32]

    def copy(self, variable: Any, place: Place) -> tf.Variable:
        """What a device has of a variable."""
        copies = _keras.stored(variable).copies if isinstance(variable, keras.Variable) else variable.copies
        if len(copies) == self.mesh.size:
            return copies[place.number]
        return copies[self.mesh.lanes.index(place.lane) if len(copies) > 1 else 0]

    def whole_gradient(self, n: int, parts: dict[Coordinate, Any]) -> Any:
        """The gradient of a weight, from those of its ranks' parts, each the sum over replicas."""
        stored = _keras.stored(self.weights[n])
        if parts[FIRST] is None or not is_divided(self.weights[n]):
            return parts[FIRST]
        of_ranks = [parts[rank] for rank in self.mesh.ranks]
        return of_parts(of_ranks, layout_of(self.weights[n]), stored.shape.as_list())

    # ---- the optimizer

    def at_places(self, which: str, places: Sequence[Place], reduced: list[dict], scale: Any, norms: list) -> list:
        """The results of a program on each of these devices, for its copies and gradients."""

        def run(number: int) -> Any:
            place, norm = places[number], norms[number]
            members = self.members[place.stage]
            copies = [self.copy(v, place) for v in self.variables(place.stage)]
            values = [shard_of(_keras.stored(self.weights[n]), place.lane) for n in members if self.is_detached(n)]
            gradients = [each(tf.identity, reduced[n][place.lane]) for n in members]
            given = None if norm is None else (tf.gather(norm, members), tf.reduce_sum(norm))
            return self.programs[place.stage][which](copies, values, gradients, tf.identity(scale), given)

        return on_each([HOST if self.away else place.device for place in places], run)

    def norms(self, places: Sequence[Place], reduced: list[dict], scale: Any) -> list[tf.Tensor]:
        """For each of these devices, the squared norm of every weight's gradient; 0 where there is none."""
        squares = self.at_places("squares", places, reduced, scale, [None] * len(places))
        found = []
        for place, square in zip(places, squares, strict=True):
            with tf.device(place.device):  # what several have counts once
                spread = tf.one_hot(self.members[place.stage], len(self.weights), dtype=tf.float64)
                found.append(tf.linalg.matvec(spread, square * self.counted(place), transpose_a=True))
        return all_reduce(found, [HOST if self.away else place.device for place in places])

    def counted(self, place: Place) -> tf.Tensor:
        """With what weight each gradient of a device counts in a norm."""
        shardings = [self.edges[n].sharding for n in self.members[place.stage]]
        counts = [all(getattr(place.lane, axis) == 0 or axis in of.dims for axis in AXES) for of in shardings]
        return tf.cast(tf.constant(counts), tf.float64)


def is_divided(weight: keras.Variable) -> bool:
    """Whether lanes have parts of a weight, or of the slots of an optimizer."""
    return getattr(_keras.stored(weight), "is_divided", False)


ELEMENTWISE = {
    getattr(keras.optimizers, name)
    for name in ("SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "Adadelta", "Adamax", "Nadam", "Ftrl", "Lion")
}
PER_WEIGHT = {getattr(keras.optimizers, name) for name in ("Adafactor", "Lamb", "Muon")}  # look at all of a weight
SUMS = (keras.regularizers.L1, keras.regularizers.L2, keras.regularizers.L1L2)
