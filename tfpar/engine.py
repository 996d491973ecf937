"""Executes schedules: emits each action on its device, in its order, into one tf.function."""

# s: stage, m: micro-batch, t: tensor of the graph, v: variable of the graph, i: operation, k: its k-th added loss

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import keras
import tensorflow as tf

from tfpar import _keras, batch
from tfpar._tf import awaited, independent, unrecorded
from tfpar.errors import ModelError
from tfpar.model import KerasGraph
from tfpar.partition import Partition
from tfpar.plan import Plan
from tfpar.probe import Combine, Probe
from tfpar.program import Edge, Program, Result, differentiable, tensor_of, with_logits
from tfpar.schedule import Action, Kind, Schedule
from tfpar.state import UnknownVariables, whole_moments
from tfpar.variables import HOST

SEED_STRIDE = 0x9E3779B9  # between the random seeds of micro-batches: 2**32 over the golden ratio


@dataclass
class Engine:
    """A model cut into programs, one for each stage.

    Args:
        plan: which operations and variables go where.
        model, graph: what the plan is of.
        inference: the same graph with what to call outside of training, where that differs.
        jit_compile, eager: how programs run.
    """

    plan: Plan
    model: keras.Model
    graph: KerasGraph
    inference: KerasGraph | None = None
    jit_compile: bool = False
    eager: bool = False
    programs: dict[tuple[int, bool | None], Program] = field(default_factory=dict)
    raw: dict[int, Callable] = field(default_factory=dict)  # of tensors that are functions of their logits, which

    def __post_init__(self):
        self.probe = Probe(self.graph)
        trainable = {id(v) for v in self.model.trainable_weights}
        self.trainable = {v for v, variable in enumerate(self.graph.variables) if id(variable) in trainable}

    def program(self, stage: int, training: bool | None) -> Program:
        """The program of a stage, made once."""
        if (stage, training) not in self.programs:
            partition = self.plan.partition
            graph = self.graph if training or self.inference is None else self.inference
            self.programs[stage, training] = Program(
                graph, partition.ops(stage), partition.edges(stage), self.model, training,
                self.jit_compile, self.eager, self.raw,
            )  # fmt: skip
        return self.programs[stage, training]

    def extended(self, unknown: UnknownVariables) -> "Engine":
        """The same model, in which a call has the variables that it was found to use."""
        graph = self.graph.with_variables(unknown)
        inference = self.inference and self.inference.with_variables(unknown)
        plan = replace(self.plan, partition=Partition(graph.graph, self.plan.partition.stage_of))
        return replace(self, plan=plan, graph=graph, inference=inference, programs={})

    def masks(self, inputs: Sequence[Edge], training: bool | None) -> dict[int, Any]:
        """The masks of the model's outputs for a whole batch.

        The stages run on all of it, here and not in functions of their own: what leads to no mask is pruned.
        """
        known = dict(zip(self.graph.graph.inputs, inputs, strict=True))
        with tf.device(HOST):
            for s in range(self.plan.partition.stages):
                program = self.program(s, training)
                variables = [read(self.graph.variables[v]) for v in program.variables]
                known.update(program.run(variables, {t: known[t] for t in self.plan.partition.needs(s)}).edges)
        return {t: known[t].mask for t in self.graph.graph.outputs}


@dataclass
class Pass:
    """One batch on its way through the stages.

    Args:
        engine: whose programs to run.
        inputs: for each micro-batch, the model's flat inputs.
        weights: for each micro-batch, its share of the batch's samples.
        training: what layers are told.
        differentiate: whether there will be a backward pass.
        watch_inputs: whether the gradient of the inputs is wanted.
        head: from a micro-batch and the model's outputs for it to their cotangents, called on the last stage's device.
        loss_cotangent: the gradient of each added loss, one for all or one for each.
        clock: whether to note when each action starts and stops.
    """

    engine: Engine
    inputs: Sequence[Sequence[Edge]]
    weights: Sequence[Any]
    training: bool | None
    differentiate: bool = False
    watch_inputs: bool = False
    head: Callable[[int, dict[int, Edge]], dict[int, tf.Tensor]] | None = None
    loss_cotangent: Any = 1.0
    clock: bool = False

    def __post_init__(self):
        self.graph, self.partition = self.engine.graph.graph, self.engine.plan.partition
        self.values: list[dict[int, Edge]] = [dict(zip(self.graph.inputs, x, strict=True)) for x in self.inputs]
        self.state: list[dict[int, tf.Tensor]] = [{} for _ in self.inputs]
        self.results: dict[tuple[int, int], Result] = {}
        self.pullbacks: dict[tuple[int, int], Callable] = {}
        self.cotangents: list[dict[int, list[tf.Tensor]]] = [{} for _ in self.inputs]
        self.gradients: dict[tuple[int, int], Any] = {}  # by stage and variable
        self.read: dict[tuple[int, int], tf.Tensor] = {}  # by stage and variable
        self.last: dict[int, list[Any]] = {}  # by device, what tells that its previous action is done
        self.starts: dict[Action, tf.Tensor] = {}
        self.stops: dict[Action, tf.Tensor] = {}

    def run(self, schedule: Schedule, *kinds: Kind) -> "Pass":
        """Emit the schedule's actions of these kinds."""
        for action in schedule.order:
            if action.kind in kinds:
                with (
                    tf.device(self.engine.plan.device(action.stage)),
                    tf.name_scope(f"stage{action.stage}/mb{action.micro_batch}/{action.kind.name.lower()}"),
                ):
                    RUN[action.kind](self, action)
        return self

    def again(self) -> "Pass":
        """The same forward passes, for another way back."""
        other = copy.copy(self)
        other.cotangents, other.gradients, other.last = [{} for _ in self.inputs], {}, {}
        other.pullbacks = dict(self.pullbacks)
        return other

    # ---- actions, under the device of their stage

    def forward(self, action: Action):
        """Run a stage on a micro-batch."""
        s, _, m = action
        program = self.engine.program(s, self.training)
        edges = self.started(action, with_logits(self.values[m], self.partition.needs(s)))
        variables = [self.variable(s, m, v) for v in program.variables]
        if self.differentiate:
            result, self.pullbacks[s, m] = self.vjp(program, variables, edges)
        else:
            result = program(variables, edges)
        independent(tensors_of(result))
        self.stopped(action, result.edges)
        self.values[m].update(result.edges)
        self.state[m].update(result.state)
        self.results[s, m] = result

    def backward(self, action: Action):
        """Take a micro-batch back through a stage: gradients of variables are added up, those of edges passed on."""
        s, _, m = action
        if self.head and s == self.partition.stages - 1:
            outputs = self.started(action, with_logits(self.values[m], self.graph.outputs))
            for t, cotangent in self.head(m, outputs).items():
                self.cotangents[m].setdefault(t, []).append(cotangent)
            cotangents = self.arrived(s, m)
        else:
            cotangents = self.started(action, self.arrived(s, m))
        added = {
            (i, k): tf.cast(self.loss_weight(i, k, m), losses[k].dtype)
            * tf.cast(self.cotangent_of(i, k), losses[k].dtype)
            for i, losses in self.results[s, m].losses.items()
            for k in range(len(losses))
        }
        variables, edges = self.pullbacks.pop((s, m))(cotangents, added)
        independent(tensors_of((variables, edges)))
        for v, gradient in variables.items():
            known = self.gradients.get((s, v))
            self.gradients[s, v] = gradient if known is None else add(known, gradient)
        self.stopped(action, (edges, [self.gradients[s, v] for v in variables]))
        for t, cotangent in edges.items():
            self.cotangents[m].setdefault(t, []).append(cotangent)

    def vjp(self, program: Program, variables: list[tf.Tensor], edges: dict[int, Edge]) -> tuple[Result, Callable]:
        """A program's result, and a function from its cotangents to those of its variables and edges."""
        inside = {v: x for v, x in zip(program.variables, variables, strict=True) if v in self.engine.trainable}
        outside = {
            t: e.value
            for t, e in edges.items()
            if differentiable(self.graph, t) and (self.watch_inputs or tensor_of(t) in self.graph.producer)
        }
        sources = [*inside.values(), *outside.values()]
        with tf.GradientTape(persistent=self.head is None) as tape:  # a user may ask more than once
            tape.watch(sources)
            result = program(variables, edges)

        def pullback(cotangents: dict[int, tf.Tensor], added: dict[tuple[int, int], tf.Tensor]):
            targets = [result.edges[t].value for t in cotangents] + [result.losses[i][k] for i, k in added]
            if not targets:
                return {}, {}
            found = dict(enumerate(tape.gradient(targets, sources, [*cotangents.values(), *added.values()])))
            keys = [*((True, v) for v in inside), *((False, t) for t in outside)]
            return (
                {k: found[n] for n, (is_variable, k) in enumerate(keys) if is_variable and found[n] is not None},
                {k: found[n] for n, (is_variable, k) in enumerate(keys) if not is_variable and found[n] is not None},
            )

        return result, pullback

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
        self.last[self.place(action)] = [done]

    def place(self, action: Action) -> int:
        """The device of an action."""
        return self.engine.plan.schedule.device_of[action.stage]

    # ---- what flows

    def variable(self, s: int, m: int, v: int) -> tf.Tensor:
        """A variable's value for a micro-batch: as it left it, or as it was before the batch."""
        if v in self.state[m]:
            return tf.identity(self.state[m][v])
        if (s, v) not in self.read:
            self.read[s, v] = read(self.engine.graph.variables[v])
        value = self.read[s, v]
        if m and _keras.is_seed(self.engine.graph.variables[v]):
            return value + tf.constant([m * SEED_STRIDE, 0], value.dtype)
        return value

    def arrived(self, s: int, m: int) -> dict[int, tf.Tensor]:
        """The cotangents of a stage's edges, summed over those that used them."""
        parts = with_logits(self.cotangents[m], self.partition.edges(s))
        return {t: tf.add_n(p) if len(p) > 1 else p[0] for t, p in parts.items()}

    def cotangent_of(self, i: int, k: int) -> Any:
        """The gradient of an added loss of the batch."""
        return self.loss_cotangent[i, k] if isinstance(self.loss_cotangent, dict) else self.loss_cotangent

    def loss_weight(self, i: int, k: int, m: int) -> Any:
        """By what to multiply a micro-batch's added loss so that the sum is that of the batch."""
        if len(self.inputs) == 1:
            return 1.0
        kind = self.found(i, "losses", k)
        if kind in (Combine.MEAN, Combine.SAME):
            return self.weights[m]
        if kind is Combine.SUM:
            return 1.0
        raise ModelError(
            f"the loss that {self.graph.ops[i].name} adds is neither a mean nor a sum over samples, or zero on random "
            "ones, so the losses of micro-batches do not make up that of the batch. Use micro_batches=1 "
            "(LayerPlacementStrategy)"
        )

    def found(self, i: int, what: str, key: int) -> Combine | None:
        """How a loss or a state of an operation combines; `None` where the numbers do not tell."""
        try:
            return getattr(self.engine.probe.of(i, self.training), what)[key]
        except Exception:  # the operation does not run on random samples
            return None

    # ---- results, after the last action

    def outputs(self) -> dict[int, Edge]:
        """The model's outputs for the whole batch, and their logits, each on the device that made it."""
        joined = {}
        for t in with_logits(self.values[0], self.graph.outputs):
            parts = [values[t] for values in self.values]
            source = self.graph.producer.get(tensor_of(t))
            with tf.device(HOST if source is None else self.engine.plan.device(self.partition.stage_of[source])):
                joined[t] = Edge(batch.joined([p.value for p in parts]), batch.joined([p.mask for p in parts]))
        return joined

    def added_losses(self) -> dict[tuple[int, int], tf.Tensor]:
        """What layers added to the loss, for the whole batch."""
        total: dict[tuple[int, int], tf.Tensor] = {}
        for (_, m), result in self.results.items():
            for i, losses in result.losses.items():
                for k, loss in enumerate(losses):
                    weight = tf.cast(self.loss_weight(i, k, m), loss.dtype)
                    part = tf.math.multiply_no_nan(loss, weight)  # no rows have no mean
                    total[i, k] = total[i, k] + part if (i, k) in total else part
        return total

    def gradient(self, v: int) -> Any:
        """The gradient of a variable, on its device; `None` if nothing depends on it."""
        parts = [self.gradients[s, v] for s in range(self.partition.stages) if (s, v) in self.gradients]
        if not parts:
            return None
        with tf.device(device_of(self.engine.graph.variables[v])):
            total = parts[0]
            for part in parts[1:]:
                total = add(total, part)
        return total

    def input_gradient(self, t: int) -> tf.Tensor | None:
        """The gradient of an input of the model; `None` if nothing depends on it."""
        parts = [c[t] for c in self.cotangents if t in c]
        return batch.joined([tf.add_n(p) for p in parts]) if parts else None

    def write_state(self):
        """Assign what layers changed: once for the batch, however many micro-batches it had."""
        moved = self.move_statistics() if len(self.inputs) > 1 else set()
        for v in dict.fromkeys(v for state in self.state for v in state):
            variable = self.engine.graph.variables[v]
            if id(variable) not in moved:
                with tf.device(device_of(variable)):
                    variable.assign(self.combined(v, [state[v] for state in self.state]))

    def combined(self, v: int, parts: list[tf.Tensor]) -> tf.Tensor:
        """The value of a variable after the batch, from those after each micro-batch."""
        variable = self.engine.graph.variables[v]
        if len(parts) == 1 or _keras.is_seed(variable):
            return parts[0]
        s = max(s for (s, m), result in self.results.items() if v in result.state)
        writer = self.engine.program(s, self.training).writers[v]
        kind = self.found(writer, "state", id(variable))
        if kind is Combine.SAME:
            return parts[0]
        if kind is Combine.MEAN:
            return tf.add_n([p * tf.cast(w, p.dtype) for p, w in zip(parts, self.weights, strict=True)])
        if kind is Combine.SUM:
            before = read(variable)
            return before + tf.add_n([p - before for p in parts])
        raise ModelError(
            f"{self.graph.ops[writer].name} keeps {variable.path}, whose value after a batch does not follow from its "
            "values after the micro-batches. Use micro_batches=1 (LayerPlacementStrategy)"
        )

    def move_statistics(self) -> set[int]:
        """Move the statistics of each BatchNormalization by those of the whole batch; returns which variables moved."""
        moved: set[int] = set()
        for s in range(self.partition.stages):
            layers = self.engine.program(s, self.training).normalizations
            for number, layer in enumerate(layers):
                calls = zip(*(self.results[s, m].moments.get(number, []) for m in range(len(self.inputs))), strict=True)
                for parts in calls:
                    with tf.device(device_of(layer.moving_mean)):
                        _keras.move_statistics(layer, *whole_moments(parts))
                    moved |= {id(v) for v in _keras.moving_statistics(layer)}
        return moved


RUN: dict[Kind, Callable[[Pass, Action], None]] = {Kind.FORWARD: Pass.forward, Kind.BACKWARD: Pass.backward}


def each(function: Callable, values: Any) -> Any:
    """`function` of every tensor in a structure that may hold `None`."""
    return tf.nest.map_structure(lambda x: None if x is None else function(x), values)


def tensors_of(values: Any) -> list[tf.Tensor]:
    """All tensors in a structure, those of sparse gradients too."""
    return [x for x in tf.nest.flatten(values, expand_composites=True) if x is not None]


def now(after: list[tf.Tensor]) -> tf.Tensor:
    """The host's time, in seconds, once these are there."""
    with tf.device(HOST), tf.control_dependencies(after):
        time = tf.timestamp()
    independent([time])
    return time


def device_of(variable: keras.Variable) -> str:
    """Where a variable lives."""
    return variable.value.device


def read(variable: keras.Variable) -> tf.Tensor:
    """A variable's value on the current device; TensorFlow reads it only where it lives."""
    with tf.device(device_of(variable)):
        value = unrecorded(lambda: tf.convert_to_tensor(variable.value))
    return tf.identity(value)


def add(a: Any, b: Any) -> Any:
    """The sum of two gradients; of two sparse ones, a sparse one."""
    if isinstance(a, tf.IndexedSlices) and isinstance(b, tf.IndexedSlices):
        values, indices = tf.concat([a.values, b.values], 0), tf.concat([a.indices, b.indices], 0)
        return tf.IndexedSlices(values, indices, a.dense_shape)
    return tf.convert_to_tensor(a) + tf.convert_to_tensor(b)
