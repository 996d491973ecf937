"""One batch on its way through the stages: emits each action on its device, in its order, into one tf.function."""

# s: segment of a stage, m: micro-batch of a lane, t: tensor of the graph, v: variable,
# i: operation, k: its k-th added loss

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import tensorflow as tf

from tfpar.compat._tf import independent
from tfpar.engine import added_losses, in_place, micro_batch
from tfpar.engine.collectives_between import COLLECTIVE
from tfpar.engine.device_order import DeviceOrder
from tfpar.engine.engine import Engine, ExecutionGraph, MicroBatch, tensors_of
from tfpar.engine.forward_backward import forward_backward
from tfpar.engine.program import Component, Edge, Program, Result, selected
from tfpar.engine.reading import value_of
from tfpar.engine.update_inside import UpdateInside
from tfpar.engine.vjp import keep, recompute_of, vjp
from tfpar.planning.mesh import AXES, FIRST, Coordinate, dividing
from tfpar.planning.schedule import Action, Kind, Schedule


@dataclass
class Execution:
    """One batch on its way through the stages.

    Args:
        engine: whose programs to run.
        parts: how the batch is divided. All ranks of a replica get the same parts.
        inputs: for each part, the model's flat inputs.
        weights: for each part, its share of the batch's samples.
        training: what layers are told.
        differentiate: whether there will be a backward pass; a tape may record the pass itself instead.
        watch_inputs: whether the gradient of the inputs is wanted.
        loss_cotangent: the gradient of the loss, and of each added loss, one for all or one for each.
        read: a variable's value in a segment for a lane, on the current device, if a tape is to see it.
        clock: whether to note when each action starts and stops.
        route: the way through the model; that of `training`, if not given.
        in_parts: whether each device updates its shards alone.
        update: what programs end with, if they update weights.
    """

    engine: Engine
    parts: micro_batch.Parts
    inputs: Sequence[Sequence[Edge]]
    weights: Sequence[Any]
    training: bool | None
    differentiate: bool = False
    watch_inputs: bool = False
    loss_cotangent: Any = 1.0
    read: Callable[[int, int, Coordinate], tf.Tensor] | None = None
    clock: bool = False
    route: ExecutionGraph | None = None
    in_parts: bool = False
    update: UpdateInside | None = None

    def __post_init__(self):
        self.route = self.route or self.engine.route(self.training)
        self.graph, self.partition = self.route.graph.graph, self.route.partition
        self.mesh = self.engine.mesh
        self.all = [MicroBatch(lane, n) for lane in self.lanes for n in range(self.parts.micro_batches)]
        given = [t for t in self.graph.inputs if t != self.route.lane]
        self.values: dict[MicroBatch, dict[int, Edge]] = {
            m: dict(zip(given, self.inputs[self.part_number(m)], strict=True)) for m in self.all
        }
        for m in self.all if self.route.lane is not None else ():
            self.values[m][self.route.lane] = Edge(tf.constant(self.mesh.lanes.index(m.lane)))
        self.state: dict[MicroBatch, dict[int, tf.Tensor]] = {m: {} for m in self.all}
        self.results: dict[tuple[int, MicroBatch], Result] = {}
        self.pullbacks: dict[tuple[int, MicroBatch], Callable] = {}
        ends = self.route.loss[:1] if self.differentiate else ()
        self.cotangents: dict[MicroBatch, dict[Component, list[tf.Tensor]]] = {
            m: {Component(t): [self.loss_cotangent] for t in ends} for m in self.all
        }
        self.gradients: dict[tuple[int, Coordinate, int], Any] = {}  # by segment, lane and variable
        self.added: dict[tuple[int, Coordinate], tuple] = {}  # what programs add up in place, and when that is done
        self.exchanged: set[tuple[int, str]] = set()  # gradients of variables and the axes over which that is done
        self.waiting: dict[int, dict[Coordinate, Any]] = {}  # by variable: gradients that lack those of other replicas
        self.known: dict[tuple[int, Coordinate, int], tf.Tensor] = {}  # by segment, lane and variable
        self.zeros: dict[tuple, tf.Tensor] = {}  # by device, shape and dtype
        self.order = DeviceOrder(self.clock)

    def run(self, schedule: Schedule, *kinds: Kind) -> "Execution":
        """Emit the schedule's actions of these kinds, each on its device."""
        for (s, kind, m), emit in self.actions(schedule, *kinds):
            with tf.device(self.device(s, m.lane)), tf.name_scope(scope(self, s, kind, m)):
                try:
                    emit()
                except Exception as error:
                    error.add_note(f"in {scope(self, s, kind, m)}: {', '.join(self.route.names(s))}")
                    raise
        in_place.read(self)
        return self

    def actions(self, schedule: Schedule, *kinds: Kind) -> Iterator[tuple[tuple[int, Kind, MicroBatch], Callable]]:
        """The schedule's actions of these kinds, for every lane or for those that go together, and what emits each."""
        self.schedule = schedule
        for s, kind, n in schedule.order:
            ways = COLLECTIVE if s in self.route.collectives else RUN
            for lane in self.lanes if kind in kinds else ():
                m = MicroBatch(lane, n)
                if self.together(s, m)[0] == m:
                    yield (s, kind, m), partial(ways[kind], self, s, m)

    def together(self, s: int, m: MicroBatch) -> list[MicroBatch]:
        """The micro-batches, of this lane or of several, that go through a segment with this one; the first leads."""
        if self.takes_turns:
            return [MicroBatch(m.lane, n) for n in range(self.parts.micro_batches)]
        if s not in self.route.collectives:
            return [m]
        lanes = self.mesh.along(self.route.collectives[s].axis, m.lane)
        return [n for lane in lanes if (n := m._replace(lane=lane)) in self.values]

    @property
    def takes_turns(self) -> bool:
        """Whether the micro-batches of a lane are in one program, which holds its collectives."""
        return bool(self.route.gangs) and self.parts.micro_batches > 1

    @property
    def scatters(self) -> bool:
        """Whether replicas divide gradients between them as soon as they are there (ZeRO 2 and 3)."""
        return self.engine.plan.zero >= 2 and self.in_parts

    def share(self, m: MicroBatch) -> Any:
        """The share of a part in the batch."""
        return self.weights[self.part_number(m)]

    @property
    def lanes(self) -> tuple[Coordinate, ...]:
        """Those that run the same programs side by side; replicas without a part of the batch do not."""
        replicas = self.mesh.replicas[: self.parts.replicas]
        return tuple(lane for lane in self.mesh.lanes if lane.replica in replicas)

    def at(self, s: int, lane: Coordinate = FIRST) -> Coordinate:
        """Where a segment of a lane runs."""
        return lane._replace(stage=self.schedule.device_of[s])

    def device(self, s: int, lane: Coordinate = FIRST) -> str:
        """The device of a segment of a lane."""
        return self.mesh.device(self.at(s, lane))

    def program(self, s: int) -> Program:
        """What a segment runs."""
        return self.engine.program(self.route, s, self.training)

    def part_number(self, m: MicroBatch) -> int:
        """Which part of the batch this is."""
        return self.mesh.replicas.index(m.lane.replica) * self.parts.micro_batches + m.micro_batch

    @property
    def firsts(self) -> list[MicroBatch]:
        """The micro-batches of the first rank of each replica: each part of the batch once."""
        return [m for m in self.all if m.lane == m.lane.replica]

    # ---- actions, under the device of their stage

    def forward(self, s: int, m: MicroBatch):
        """Run a segment on a part."""
        if self.is_fused(s, m):
            return forward_backward(self, s, self.together(s, m))
        program, edges = self.program(s), selected(self.values[m], self.partition.needs(s))
        edges = self.order.started((s, Kind.FORWARD, m), self.at(s, m.lane), edges)
        variables = [value_of(self, s, m, v) for v in program.variables]
        if self.differentiate:
            recompute = recompute_of(self, s, m, program, variables)
            result, self.pullbacks[s, m] = vjp(self, s, m, program, variables, edges, recompute)
        else:
            result = program(variables, edges)
        independent(tensors_of(result))
        self.order.stopped((s, Kind.FORWARD, m), self.at(s, m.lane), result.edges)
        self.found(s, m, result)

    def found(self, s: int, m: MicroBatch, result: Result):
        """Keep the result of a segment."""
        self.values[m].update(result.edges)
        self.state[m].update(result.state)
        self.results[s, m] = result

    def is_fused(self, s: int, m: MicroBatch) -> bool:
        """Whether forward and backward of a segment are one program: they follow each other, and nothing between."""
        ends = self.route.loss[:1]
        if not ends or self.clock or not self.differentiate or self.partition.stage_of[-1] != s:
            return False
        if any(self.route.leads_on(s, t) for t in self.partition.edges(s)):
            return False
        if self.takes_turns:
            return True
        line = self.schedule.devices[self.schedule.device_of[s]]
        here = line.index(Action(s, Kind.FORWARD, m.micro_batch))
        return line[here + 1] == line[here]._replace(kind=Kind.BACKWARD)

    def backward(self, s: int, m: MicroBatch):
        """Take a part back through a segment: gradients of variables are added up, those of edges passed on."""
        if self.is_fused(s, m):
            return
        cotangents = self.order.started((s, Kind.BACKWARD, m), self.at(s, m.lane), self.arrived(s, m))
        added = added_losses.cotangents(self, self.results[s, m], self.share(m), self.loss_cotangent)
        variables, edges = self.pullbacks.pop((s, m))(cotangents, added)
        independent(tensors_of((variables, edges)))
        self.send(m, edges)
        self.returned(s, Kind.BACKWARD, m, variables, edges)

    def returned(self, s: int, kind: Kind, m: MicroBatch, variables: dict[int, Any], edges: Any):
        """Keep the gradients that came back through a segment; those of edges tell when that is done, too."""
        keep(self, s, m, variables)
        of_weights = [self.gradients.get((s, m.lane, v), gradient) for v, gradient in variables.items()]
        _, added = self.added.get((s, m.lane), (None, None))
        self.order.stopped((s, kind, m), self.at(s, m.lane), (edges, of_weights, added))

    def send(self, m: MicroBatch, cotangents: dict[Component, tf.Tensor]):
        """Pass cotangents on to the stages that made their tensors."""
        for key, cotangent in cotangents.items():
            self.cotangents[m].setdefault(key, []).append(cotangent)

    def arrived(self, s: int, m: MicroBatch) -> dict[Component, tf.Tensor]:
        """The cotangents of a segment's edges, summed over those that used them."""
        edges = self.partition.edges(s)
        return {key: self.cotangent(m, key) for key in sorted(self.cotangents[m]) if key.tensor in edges}

    def cotangent(self, m: MicroBatch, key: Component) -> tf.Tensor:
        """The cotangent of what an edge has, summed over the segments that used it."""
        parts = self.cotangents[m][key]
        return tf.add_n(parts) if len(parts) > 1 else parts[0]


def scope(run: Execution, s: int, kind: Kind, m: MicroBatch) -> str:
    """The name of an action, as profiles show it."""
    exchange = run.route.collectives.get(s)
    axes = [axis for axis in several(run.lanes) if exchange is None or axis not in dividing(exchange.axis)]
    where = "".join(f"{AXES[axis].member}{getattr(m.lane, axis)}/" for axis in axes)
    if exchange is not None:
        name = run.graph.ops[run.partition.ops(s)[0]].scope
        return f"{where}{exchange.forward if kind is Kind.FORWARD else exchange.backward}/{name}"
    what = "forward_backward" if run.is_fused(s, m) else kind.name.lower()
    stages = run.route.stages
    segment = f"segment{s}/" if len(stages) > stages[-1] + 1 else ""
    return f"{where}stage{stages[s]}/{segment}mb{m.micro_batch}/{what}"


def several(lanes: Sequence[Coordinate]) -> list[str]:
    """The axes along which there are several of these lanes."""
    return [axis for axis in AXES if len({getattr(lane, axis) for lane in lanes}) > 1]


RUN: dict[Kind, Callable[[Execution, int, MicroBatch], None]] = {
    Kind.FORWARD: Execution.forward,
    Kind.BACKWARD: Execution.backward,
}
