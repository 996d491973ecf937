"""One batch on its way through the stages: emits each action on its device, in its order, into one tf.function."""

# s: segment of a stage, m: micro-batch of a lane, t: tensor of the graph, v: variable,
# i: operation, k: its k-th added loss

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import tensorflow as tf

from tfpar.compat import _keras
from tfpar.compat._tf import awaited, independent
from tfpar.engine import added_losses, micro_batch
from tfpar.engine.engine import Engine, ExecutionGraph, MicroBatch, each, now, read, tensors_of
from tfpar.engine.group import COLLECTIVE, GLOBAL_BATCH
from tfpar.engine.program import Edge, Program, Result, tensor_of, with_logits
from tfpar.engine.vjp import again_of, keep, vjp
from tfpar.errors import Caught, ModelError
from tfpar.graph.batch_probe import Combine, Findings
from tfpar.graph.recording import NeedsWholeBatch
from tfpar.planning.mesh import FIRST, Coordinate
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
        head: ends a training pass: from the model's outputs for a part to their cotangents.
        loss_cotangent: the gradient of each added loss, one for all or one for each.
        read: a variable's value in a segment for a lane, on the current device, if a tape is to see it.
        clock: whether to note when each action starts and stops.
        route: the way through the model; that of `training`, if not given.
        scatters: whether replicas divide gradients between them as soon as they are there.
    """

    engine: Engine
    parts: micro_batch.Parts
    inputs: Sequence[Sequence[Edge]]
    weights: Sequence[Any]
    training: bool | None
    differentiate: bool = False
    watch_inputs: bool = False
    head: Any = None
    loss_cotangent: Any = 1.0
    read: Callable[[int, int, Coordinate], tf.Tensor] | None = None
    clock: bool = False
    route: ExecutionGraph | None = None
    scatters: bool = False

    def __post_init__(self):
        self.route = self.route or self.engine.route(self.training)
        self.graph, self.partition = self.route.graph.graph, self.route.partition
        self.mesh = self.engine.mesh
        self.ranks = self.mesh.tensor
        of_lane = range(self.parts.micro_batches)
        self.all = [MicroBatch(lane, n) for lane in self.lanes for n in of_lane]
        self.values: dict[MicroBatch, dict[int, Edge]] = {
            m: dict(zip(self.graph.inputs, self.inputs[self.part(m)], strict=True)) for m in self.all
        }
        self.state: dict[MicroBatch, dict[int, tf.Tensor]] = {m: {} for m in self.all}
        self.results: dict[tuple[int, MicroBatch], Result] = {}
        self.pullbacks: dict[tuple[int, MicroBatch], Callable] = {}
        self.cotangents: dict[MicroBatch, dict[int, list[tf.Tensor]]] = {m: {} for m in self.all}
        self.gradients: dict[tuple[int, Coordinate, int], Any] = {}  # by segment, lane and variable
        self.waiting: dict[tuple, dict[Coordinate, Any]] = {}  # gradients that lack those of other replicas
        self.known: dict[tuple[int, Coordinate, int], tf.Tensor] = {}  # by segment, lane and variable
        self.last: dict[Coordinate, list[Any]] = {}  # by device, what tells that it is free
        self.before: dict[Coordinate, list[Any]] = {}  # the same, an action earlier
        self.starts: dict[tuple[int, Kind, MicroBatch], tf.Tensor] = {}
        self.stops: dict[tuple[int, Kind, MicroBatch], tf.Tensor] = {}

    def run(self, schedule: Schedule, *kinds: Kind) -> "Execution":
        """Emit the schedule's actions of these kinds, each on its device."""
        for (s, kind, m), emit in self.actions(schedule, *kinds):
            with tf.device(self.device(s, m.lane)), tf.name_scope(self.scope(s, kind, m)):
                try:
                    emit()
                except Exception as error:
                    error.add_note(f"in {self.scope(s, kind, m)}: {', '.join(self.route.names(s))}")
                    raise
        return self

    def actions(self, schedule: Schedule, *kinds: Kind) -> Iterator[tuple[tuple[int, Kind, MicroBatch], Callable]]:
        """The schedule's actions of these kinds, for every lane or for those that go together, and what emits each."""
        self.schedule = schedule
        for s, kind, n in schedule.order:
            ways = COLLECTIVE if s in self.route.collectives else GLOBAL_BATCH if s in self.route.global_batch else RUN
            for lane in self.lanes if kind in kinds else ():
                m = MicroBatch(lane, n)
                if self.together(s, m)[0] == m:
                    yield (s, kind, m), partial(ways[kind], self, s, m)

    def together(self, s: int, m: MicroBatch) -> list[MicroBatch]:
        """The micro-batches, of several lanes, that go through a segment together with this one; the first leads."""
        axis = "data" if s in self.route.global_batch else "tensor" if s in self.route.collectives else None
        if axis is None:
            return [m]
        return [n for lane in self.mesh.along(axis, m.lane) if (n := m._replace(lane=lane)) in self.values]

    def share(self, s: int, m: MicroBatch) -> Any:
        """The share in the batch of what goes through a segment together."""
        parts = [self.weights[self.part(n)] for n in self.together(s, m)]
        return tf.add_n(parts) if len(parts) > 1 else parts[0]

    @property
    def lanes(self) -> tuple[Coordinate, ...]:
        """Those that run the same programs side by side; replicas without a part of the batch do not."""
        return self.mesh.lanes[: self.parts.replicas * self.ranks]

    def at(self, s: int, lane: Coordinate = FIRST) -> Coordinate:
        """Where a segment of a lane runs."""
        return lane._replace(stage=self.schedule.device_of[s])

    def device(self, s: int, lane: Coordinate = FIRST) -> str:
        """The device of a segment of a lane."""
        return self.mesh.device(self.at(s, lane))

    def scope(self, s: int, kind: Kind, m: MicroBatch) -> str:
        """The name of an action, as profiles show it."""
        replica, _, rank = m.lane
        where = f"replica{replica}/" if self.parts.replicas > 1 else ""
        exchange = self.route.collectives.get(s)
        if exchange is not None:
            name = self.graph.ops[self.partition.ops(s)[0]].scope
            return f"{where}{exchange.forward if kind is Kind.FORWARD else exchange.backward}/{name}"
        where += f"rank{rank}/" if self.ranks > 1 else ""
        what = "forward_backward" if self.turns(s, m) else kind.name.lower()
        stages = self.route.stages
        segment = f"segment{s}/" if len(stages) > stages[-1] + 1 else ""
        return f"{where}stage{stages[s]}/{segment}mb{m.micro_batch}/{what}"

    def again(self) -> "Execution":
        """The same forward passes, for another backward pass."""
        other = copy.copy(self)
        other.cotangents, other.gradients, other.last = {m: {} for m in self.all}, {}, {}
        other.pullbacks = dict(self.pullbacks)
        return other

    def program(self, s: int) -> Program:
        """What a segment runs."""
        return self.engine.program(self.route, s, self.training)

    def part(self, m: MicroBatch) -> int:
        """Which part of the batch this is."""
        return m.lane.data * self.parts.micro_batches + m.micro_batch

    @property
    def firsts(self) -> list[MicroBatch]:
        """The micro-batches of the first rank of each replica: each part of the batch once."""
        return [m for m in self.all if not m.lane.tensor]

    # ---- actions, under the device of their stage

    def forward(self, s: int, m: MicroBatch):
        """Run a segment on a part."""
        program = self.program(s)
        edges = self.started(s, Kind.FORWARD, m, with_logits(self.values[m], self.partition.needs(s)))
        variables = [self.variable(s, m, v) for v in program.variables]
        if self.turns(s, m):
            result, gradients, cotangents = self.head.turn(self, m, program, variables, edges)
            independent(tensors_of((result, gradients, cotangents)))
            self.returned(s, Kind.FORWARD, m, gradients, cotangents)
        else:
            result = self.ran(s, m, program, variables, edges)
            self.stopped(s, Kind.FORWARD, m, result.edges)
        self.values[m].update(result.edges)
        self.state[m].update(result.state)
        self.results[s, m] = result

    def ran(
        self, s: int, m: MicroBatch, program: Program, variables: list[tf.Tensor], edges: dict[int, Edge]
    ) -> Result:
        """The result of a segment's program, and for later its backward pass."""
        if self.differentiate:
            result, self.pullbacks[s, m] = vjp(
                self, program, variables, edges, again_of(self, s, m, program, variables)
            )
        else:
            result = program(variables, edges)
        independent(tensors_of(result))
        return result

    def turns(self, s: int, m: MicroBatch) -> bool:
        """Whether the backward pass begins at once, so that forward, loss and backward are one program."""
        if self.head is None or not self.head.can_turn or self.clock or s < self.partition.stages - 1:
            return False
        makers = {self.partition.stage_of[self.graph.producer[t]] for t in self.route.ends if t in self.graph.producer}
        if makers != {s} or not set(self.route.ends) <= set(self.graph.producer):
            return False  # some outputs are made elsewhere
        line = self.schedule.devices[self.schedule.device_of[s]]
        here = line.index(Action(s, Kind.FORWARD, m.micro_batch))
        return line[here + 1] == line[here]._replace(kind=Kind.BACKWARD)

    def backward(self, s: int, m: MicroBatch):
        """Take a part back through a segment: gradients of variables are added up, those of edges passed on."""
        if self.turns(s, m):
            return
        if self.head and s == self.partition.stages - 1:
            outputs = self.started(s, Kind.BACKWARD, m, with_logits(self.values[m], self.route.ends))
            self.send(m, self.head(self, m, outputs))
            cotangents = self.arrived(s, m)
        else:
            cotangents = self.started(s, Kind.BACKWARD, m, self.arrived(s, m))
        variables, edges = self.pullbacks.pop((s, m))(cotangents, added_losses.cotangents(self, s, m))
        independent(tensors_of((variables, edges)))
        self.returned(s, Kind.BACKWARD, m, variables, edges)

    def returned(self, s: int, kind: Kind, m: MicroBatch, variables: dict[int, Any], edges: dict[int, tf.Tensor]):
        """Keep what came back through a segment."""
        keep(self, s, m, variables)
        of_weights = [self.gradients.get((s, m.lane, v), gradient) for v, gradient in variables.items()]
        self.stopped(s, kind, m, (edges, of_weights))
        self.send(m, edges)

    def send(self, m: MicroBatch, cotangents: dict[int, tf.Tensor]):
        """Pass cotangents on to the stages that made their tensors."""
        for t, cotangent in cotangents.items():
            self.cotangents[m].setdefault(t, []).append(cotangent)

    def count_of(self, s: int) -> int:
        """In how many parts a batch goes through a segment."""
        return self.parts.micro_batches if s in self.route.global_batch else self.parts.count

    def shares_rows(self, s: int, v: int, gradient: Any) -> bool:
        """Whether a variable's gradient in a segment has the same rows for each part of the batch.

        Raises:
            NeedsWholeBatch, ModelError: it has some such rows, and others that are each part's own.
        """
        if not isinstance(gradient, tf.IndexedSlices) or self.count_of(s) == 1:
            return False
        variable = self.engine.graph.variables[v]
        found = self.route.rows(s, v, variable)
        if Combine.MIXED in found.values() or {Combine.ROWS, Combine.SAME} <= set(found.values()):
            i = next(i for i, kind in found.items() if kind is not Combine.ROWS)
            why = f"{self.graph.ops[i].name} looks up rows of {variable.path} for each sample, and rows for all of them"
            raise self.needs_whole(i, why)
        return Combine.SAME in found.values()

    def is_learned(self, t: int) -> bool:
        """Whether the gradient of a tensor is one of weights, too."""
        return t in (self.graph.producer if self.route.learned is None else self.route.learned)

    # ---- for segments that lanes run together

    def is_batched(self, t: int) -> bool:
        """Whether dimension 0 of a tensor, or of its logits, is the batch."""
        return self.route.graph.is_batched(tensor_of(t))

    def gather(self, t: int, places: Sequence[MicroBatch]) -> Edge:
        """A tensor of several parts as one."""
        parts = [self.values[m][t] for m in places]
        if not self.is_batched(t):
            return parts[0]
        return Edge(micro_batch.concat([p.value for p in parts]), micro_batch.concat([p.mask for p in parts]))

    def divided(self, s: int, t: int, value: Any, places: Sequence[MicroBatch]) -> list[Any]:
        """A tensor of several parts together as those of each, which have as many rows as what came in."""
        if value is None or not self.is_batched(t):
            return [value] * len(places)
        like = next(filter(self.is_batched, [*self.partition.needs(s), *self.graph.inputs]))
        return micro_batch.split_like(value, [micro_batch.count([self.values[m][like].value]) for m in places])

    # ---- the order on a device

    def started(self, s: int, kind: Kind, m: MicroBatch, values: Any) -> Any:
        """The values on this device, once its previous action is done; their transfer does not wait for that."""
        values = each(tf.identity, values)
        before = self.last.get(self.at(s, m.lane), [])
        if self.clock:
            self.starts[s, kind, m] = now([*before, *tensors_of(values)])
            before = [self.starts[s, kind, m]]
        with tf.control_dependencies(before):
            return each(tf.identity, values)

    def stopped(self, s: int, kind: Kind, m: MicroBatch, values: Any):
        """The next action on this device will wait for all of these."""
        done = tf.group(*map(awaited, tensors_of(values)))
        if self.clock:
            done = self.stops[s, kind, m] = now([done])
        at = self.at(s, m.lane)
        self.before[at], self.last[at] = self.last.get(at, []), [done]

    # ---- what flows

    def variable(self, s: int, m: MicroBatch, v: int) -> tf.Tensor:
        """A variable's value for a part: as its replica left it, or as it was before the batch."""
        lane, variable = m.lane, self.engine.graph.variables[v]
        if v in self.state[m]:
            return tf.identity(self.state[m][v])
        if (s, lane, v) not in self.known:
            if self.engine.gathers(v):  # for this action alone, while the one before it runs
                with tf.control_dependencies(self.before.get(self.at(s, lane), [])):
                    return self.cast(s, v, self.value(s, v, lane))
            self.known[s, lane, v] = self.cast(s, v, self.value(s, v, lane))
        value = self.known[s, lane, v]
        if not _keras.is_seed(variable):
            return value
        # ranks that fill the same tensor draw the same numbers
        return _keras.nth_seed(value, self.all.index(m) if v in self.route.drawn else self.part(m))

    def value(self, s: int, v: int, lane: Coordinate) -> tf.Tensor:
        """A variable's value before the batch."""
        return self.read(s, v, lane) if self.read else read(self.engine.graph.variables[v], lane)

    def cast(self, s: int, v: int, value: tf.Tensor) -> tf.Tensor:
        """A weight as a segment's layers read it: in mixed precision cast once, not in every micro-batch."""
        dtype = self.program(s).reads.get(v) if self.parts.micro_batches > 1 else None
        return value if dtype is None else tf.cast(value, dtype)

    def arrived(self, s: int, m: MicroBatch) -> dict[int, tf.Tensor]:
        """The cotangents of a segment's edges, summed over those that used them."""
        parts = with_logits(self.cotangents[m], self.partition.edges(s))
        return {t: tf.add_n(p) if len(p) > 1 else p[0] for t, p in parts.items()}

    def needs_whole(self, i: int, why: str) -> Exception:
        """What to raise where an operation's results for a batch do not follow from those of its parts."""
        if self.parts.micro_batches == 1:
            return NeedsWholeBatch(self.graph.ops[i].name, self.route.graph)
        return ModelError(f"{why}. Use micro_batches=1 (LayerPlacementStrategy)")

    def found(self, i: int, what: str, key: int) -> Combine | None:
        """How a loss or a state of an operation combines; `None` where the numbers do not tell."""
        source = self.route.in_source(i)
        try:
            findings = Findings() if source is None else self.route.probe.of(source, self.training)
        except Exception as error:
            Caught.theirs(error, f"{self.graph.ops[i].name} on random samples")
            findings = Findings()
        return findings.state.get(key) if what == "state" else dict(enumerate(findings.losses)).get(key)


RUN: dict[Kind, Callable[[Execution, int, MicroBatch], None]] = {
    Kind.FORWARD: Execution.forward,
    Kind.BACKWARD: Execution.backward,
}
