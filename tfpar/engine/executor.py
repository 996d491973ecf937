"""One batch on its way through the stages: emits each action on its device, in its order, into one tf.function."""

# s: segment of a stage, l: lane, a rank of a replica, m: micro-batch of a lane, t: tensor of the graph, v: variable,
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
from tfpar.engine.engine import Engine, ExecutionGraph, each, now, read, tensors_of
from tfpar.engine.group import COLLECTIVE, GLOBAL_BATCH
from tfpar.engine.program import Edge, Program, Result, tensor_of, with_logits
from tfpar.engine.vjp import again_of, keep, vjp
from tfpar.errors import Caught, ModelError
from tfpar.graph.batch_probe import Combine, Findings
from tfpar.graph.recording import NeedsWholeBatch
from tfpar.planning.schedule import Action, Kind, Schedule


@dataclass
class Execution:
    """One batch on its way through the stages.

    Args:
        engine: whose programs to run.
        parts: how the batch is divided. All ranks of a replica get the same parts; `m` counts the micro-batches of
            the first lane, then those of the next.
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
    read: Callable[[int, int, int], tf.Tensor] | None = None
    clock: bool = False
    route: ExecutionGraph | None = None
    scatters: bool = False

    def __post_init__(self):
        self.route = self.route or self.engine.route(self.training)
        self.graph, self.partition = self.route.graph.graph, self.route.partition
        self.ranks = self.engine.plan.mesh.tensor
        self.all = range(len(self.inputs) * self.ranks)
        self.values: list[dict[int, Edge]] = [
            dict(zip(self.graph.inputs, self.inputs[self.part(m)], strict=True)) for m in self.all
        ]
        self.state: list[dict[int, tf.Tensor]] = [{} for _ in self.all]
        self.results: dict[tuple[int, int], Result] = {}
        self.pullbacks: dict[tuple[int, int], Callable] = {}
        self.cotangents: list[dict[int, list[tf.Tensor]]] = [{} for _ in self.all]
        self.gradients: dict[tuple[int, int, int], Any] = {}  # by segment, lane and variable
        self.waiting: dict[tuple, dict[int, Any]] = {}  # gradients that lack those of other replicas
        self.known: dict[tuple[int, int, int], tf.Tensor] = {}  # by segment, lane and variable
        self.last: dict[tuple[int, int], list[Any]] = {}  # by lane and device, what tells that it is free
        self.before: dict[tuple[int, int], list[Any]] = {}  # the same, an action earlier
        self.starts: dict[Action, tf.Tensor] = {}
        self.stops: dict[Action, tf.Tensor] = {}

    def run(self, schedule: Schedule, *kinds: Kind) -> "Execution":
        """Emit the schedule's actions of these kinds, each on its device."""
        for action, emit in self.actions(schedule, *kinds):
            with tf.device(self.device(action.stage, self.lane(action.micro_batch))), tf.name_scope(self.scope(action)):
                try:
                    emit()
                except Exception as error:
                    error.add_note(f"in {self.scope(action)}: {', '.join(self.route.names(action.stage))}")
                    raise
        return self

    def actions(self, schedule: Schedule, *kinds: Kind) -> Iterator[tuple[Action, Callable]]:
        """The schedule's actions of these kinds, for every lane or for those that go together, and what emits each."""
        self.schedule = schedule
        for s, kind, m in schedule.order:
            ways = COLLECTIVE if s in self.route.collectives else GLOBAL_BATCH if s in self.route.whole else RUN
            for lane in range(self.lanes) if kind in kinds else ():
                action = Action(s, kind, lane * self.parts.micro_batches + m)
                if self.together(s, action.micro_batch)[0] == action.micro_batch:
                    yield action, partial(ways[kind], self, action)

    def together(self, s: int, m: int) -> list[int]:
        """The micro-batches, of several lanes, that go through a segment together with this one; the first leads."""
        lane, micro_batch = divmod(m, self.parts.micro_batches)
        replica, rank = divmod(lane, self.ranks)
        lanes = [lane]
        if s in self.route.whole:
            lanes = list(range(rank, self.lanes, self.ranks))
        elif s in self.route.collectives:
            lanes = list(range(replica * self.ranks, (replica + 1) * self.ranks))
        return [lane * self.parts.micro_batches + micro_batch for lane in lanes]

    def share(self, s: int, m: int) -> Any:
        """The share in the batch of what goes through a segment together."""
        parts = [self.weights[self.part(n)] for n in self.together(s, m)]
        return tf.add_n(parts) if len(parts) > 1 else parts[0]

    @property
    def lanes(self) -> int:
        """How many run the same programs side by side."""
        return self.parts.replicas * self.ranks

    def device(self, s: int, lane: int = 0) -> str:
        """The device of a segment of a lane."""
        replica, rank = divmod(lane, self.ranks)
        return self.engine.plan.mesh.device(data=replica, stage=self.schedule.device_of[s], tensor=rank)

    def scope(self, action: Action) -> str:
        """The name of an action, as profiles show it."""
        s, kind, m = action
        replica, rank = divmod(self.lane(m), self.ranks)
        where = f"replica{replica}/" if self.parts.replicas > 1 else ""
        exchange = self.route.collectives.get(s)
        if exchange is not None:
            name = self.graph.ops[self.partition.ops(s)[0]].scope
            return f"{where}{exchange.forward if kind is Kind.FORWARD else exchange.backward}/{name}"
        where += f"rank{rank}/" if self.ranks > 1 else ""
        what = "forward_backward" if self.turns(action) else kind.name.lower()
        stages = self.route.stages
        segment = f"segment{s}/" if len(stages) > stages[-1] + 1 else ""
        return f"{where}stage{stages[s]}/{segment}mb{m % self.parts.micro_batches}/{what}"

    def again(self) -> "Execution":
        """The same forward passes, for another backward pass."""
        other = copy.copy(self)
        other.cotangents, other.gradients, other.last = [{} for _ in self.all], {}, {}
        other.pullbacks = dict(self.pullbacks)
        return other

    def program(self, s: int) -> Program:
        """What a segment runs."""
        return self.engine.program(self.route, s, self.training)

    def lane(self, m: int) -> int:
        """Whose micro-batch this is."""
        return m // self.parts.micro_batches

    def rank(self, m: int) -> int:
        """Which of the ranks of a replica has this micro-batch."""
        return self.lane(m) % self.ranks

    def part(self, m: int) -> int:
        """Which part of the batch this is."""
        return self.lane(m) // self.ranks * self.parts.micro_batches + m % self.parts.micro_batches

    @property
    def firsts(self) -> list[int]:
        """The micro-batches of the first rank of each replica: each part of the batch once."""
        return [m for m in self.all if not self.rank(m)]

    # ---- actions, under the device of their stage

    def forward(self, action: Action):
        """Run a segment on a part."""
        s, _, m = action
        program = self.program(s)
        edges = self.started(action, with_logits(self.values[m], self.partition.needs(s)))
        variables = [self.variable(s, m, v) for v in program.variables]
        if self.turns(action):
            result, gradients, cotangents = self.head.turn(self, m, program, variables, edges)
            independent(tensors_of((result, gradients, cotangents)))
            self.returned(action, gradients, cotangents)
        else:
            result = self.ran(s, m, program, variables, edges)
            self.stopped(action, result.edges)
        self.values[m].update(result.edges)
        self.state[m].update(result.state)
        self.results[s, m] = result

    def ran(self, s: int, m: int, program: Program, variables: list[tf.Tensor], edges: dict[int, Edge]) -> Result:
        """The result of a segment's program, and for later its backward pass."""
        if self.differentiate:
            result, self.pullbacks[s, m] = vjp(
                self, program, variables, edges, again_of(self, s, m, program, variables)
            )
        else:
            result = program(variables, edges)
        independent(tensors_of(result))
        return result

    def turns(self, action: Action) -> bool:
        """Whether the backward pass begins at once, so that forward, loss and backward are one program."""
        s, _, m = action
        if self.head is None or not self.head.can_turn or self.clock or s < self.partition.stages - 1:
            return False
        makers = {self.partition.stage_of[self.graph.producer[t]] for t in self.route.ends if t in self.graph.producer}
        if makers != {s} or not set(self.route.ends) <= set(self.graph.producer):
            return False  # some outputs are made elsewhere
        line = self.schedule.devices[self.schedule.device_of[s]]
        here = line.index(Action(s, Kind.FORWARD, m % self.parts.micro_batches))
        return line[here + 1] == line[here]._replace(kind=Kind.BACKWARD)

    def backward(self, action: Action):
        """Take a part back through a segment: gradients of variables are added up, those of edges passed on."""
        s, _, m = action
        if self.turns(action):
            return
        if self.head and s == self.partition.stages - 1:
            outputs = self.started(action, with_logits(self.values[m], self.route.ends))
            self.send(m, self.head(self, m, outputs))
            cotangents = self.arrived(s, m)
        else:
            cotangents = self.started(action, self.arrived(s, m))
        variables, edges = self.pullbacks.pop((s, m))(cotangents, added_losses.cotangents(self, s, m))
        independent(tensors_of((variables, edges)))
        self.returned(action, variables, edges)

    def returned(self, action: Action, variables: dict[int, Any], edges: dict[int, tf.Tensor]):
        """Keep what came back through a segment."""
        s, _, m = action
        keep(self, s, m, variables)
        of_weights = [self.gradients.get((s, self.lane(m), v), gradient) for v, gradient in variables.items()]
        self.stopped(action, (edges, of_weights))
        self.send(m, edges)

    def send(self, m: int, cotangents: dict[int, tf.Tensor]):
        """Pass cotangents on to the stages that made their tensors."""
        for t, cotangent in cotangents.items():
            self.cotangents[m].setdefault(t, []).append(cotangent)

    def count_of(self, s: int) -> int:
        """In how many parts a batch goes through a segment."""
        return self.parts.micro_batches if s in self.route.whole else self.parts.count

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

    def joined(self, t: int, places: Sequence[int]) -> Edge:
        """A tensor of several parts as one."""
        parts = [self.values[m][t] for m in places]
        if not self.is_batched(t):
            return parts[0]
        return Edge(micro_batch.joined([p.value for p in parts]), micro_batch.joined([p.mask for p in parts]))

    def divided(self, s: int, t: int, value: Any, places: Sequence[int]) -> list[Any]:
        """A tensor of several parts together as those of each, which have as many rows as what came in."""
        if value is None or not self.is_batched(t):
            return [value] * len(places)
        like = next(filter(self.is_batched, [*self.partition.needs(s), *self.graph.inputs]))
        return micro_batch.split_like(value, [micro_batch.count([self.values[m][like].value]) for m in places])

    # ---- the order on a device

    def started(self, action: Action, values: Any) -> Any:
        """The values on this device, once its previous action is done; their transfer does not wait for that."""
        values = each(tf.identity, values)
        before = self.last.get(self.place(action), [])
        if self.clock:
            self.starts[action] = now([*before, *tensors_of(values)])
            before = [self.starts[action]]
        with tf.control_dependencies(before):
            return each(tf.identity, values)

    def stopped(self, action: Action, values: Any):
        """The next action on this device will wait for all of these."""
        done = tf.group(*map(awaited, tensors_of(values)))
        if self.clock:
            done = self.stops[action] = now([done])
        place = self.place(action)
        self.before[place], self.last[place] = self.last.get(place, []), [done]

    def place(self, action: Action) -> tuple[int, int]:
        """The lane and the device of an action."""
        return self.lane(action.micro_batch), self.schedule.device_of[action.stage]

    # ---- what flows

    def variable(self, s: int, m: int, v: int) -> tf.Tensor:
        """A variable's value for a part: as its replica left it, or as it was before the batch."""
        lane, variable = self.lane(m), self.engine.graph.variables[v]
        if v in self.state[m]:
            return tf.identity(self.state[m][v])
        if (s, lane, v) not in self.known:
            if self.engine.gathers(v):  # for this action alone, while the one before it runs
                with tf.control_dependencies(self.before.get((lane, self.schedule.device_of[s]), [])):
                    return self.cast(s, v, self.value(s, v, lane))
            self.known[s, lane, v] = self.cast(s, v, self.value(s, v, lane))
        value = self.known[s, lane, v]
        if not _keras.is_seed(variable):
            return value
        # ranks that fill the same tensor draw the same numbers
        return _keras.nth_seed(value, m if v in self.route.drawn else self.part(m))

    def value(self, s: int, v: int, lane: int) -> tf.Tensor:
        """A variable's value before the batch."""
        return self.read(s, v, lane) if self.read else read(self.engine.graph.variables[v], lane)

    def cast(self, s: int, v: int, value: tf.Tensor) -> tf.Tensor:
        """A weight as a segment's layers read it: in mixed precision cast once, not in every micro-batch."""
        dtype = self.program(s).reads.get(v) if self.parts.micro_batches > 1 else None
        return value if dtype is None else tf.cast(value, dtype)

    def arrived(self, s: int, m: int) -> dict[int, tf.Tensor]:
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


RUN: dict[Kind, Callable[[Execution, Action], None]] = {
    Kind.FORWARD: Execution.forward,
    Kind.BACKWARD: Execution.backward,
}
