"""A model cut into programs, and where their variables are."""

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import keras
import tensorflow as tf

from tfpar import _keras, batch
from tfpar._tf import unrecorded
from tfpar.collectives import Collective
from tfpar.crossentropy import CrossEntropy
from tfpar.layout import REPLICATED, Layout
from tfpar.local import is_collective
from tfpar.model import KerasGraph
from tfpar.partition import Partition
from tfpar.plan import Plan
from tfpar.probe import Probe
from tfpar.program import Edge, Function, Program
from tfpar.schedule import Schedule, in_turn
from tfpar.state import UnknownVariables
from tfpar.variables import HOST


def copy_of(variable: keras.Variable, replica: int) -> tf.Variable:
    """The variable that holds the value for a lane: a replica, or a rank."""
    copies = getattr(_keras.stored(variable), "copies", ())
    return copies[replica] if len(copies) > 1 else _keras.stored(variable)


def device_of(variable: keras.Variable, replica: int = 0) -> str:
    """Where a variable lives."""
    return copy_of(variable, replica).device


def layout_of(variable: keras.Variable) -> Layout:
    """How a variable is divided between ranks."""
    return getattr(_keras.stored(variable), "layout", REPLICATED)


def read(variable: keras.Variable, replica: int = 0) -> tf.Tensor:
    """A variable's value on the current device; TensorFlow reads it only where it lives."""
    with tf.device(device_of(variable, replica)):
        value = unrecorded(lambda: tf.convert_to_tensor(copy_of(variable, replica)))
    return tf.identity(value)


@dataclass(frozen=True, eq=False)
class Route:
    """The way of a pass through the model.

    Args:
        graph, partition: the operations, and the stage of each.
        whole: stages that take the parts of all replicas at once.
        drawn: states of random numbers from which the ranks of a replica draw differently.
        learned: the tensors that depend on weights to train, if that is known.
        loss: where ranks find the loss of a part of the outputs each, which; the targets are the last input then, and
            what the loss is computed from is the last output.
    """

    graph: KerasGraph
    partition: Partition
    whole: Set[int] = frozenset()
    drawn: Set[int] = frozenset()
    learned: Set[int] | None = None
    loss: CrossEntropy | None = None

    @property
    def ends(self) -> tuple[int, ...]:
        """The tensors that the loss is computed from."""
        outputs = self.graph.graph.outputs
        return outputs[-1:] if self.loss else outputs

    @cached_property
    def probe(self) -> Probe:
        """What is known of how the results of its operations combine."""
        return Probe(self.graph)

    @cached_property
    def collectives(self) -> dict[int, Collective]:
        """The exchanges between ranks, each a stage of its own."""
        calls = zip(self.partition.stage_of, self.graph.calls, strict=True)
        return {s: call.operation for s, call in calls if is_collective(call)}

    def knowing(self, unknown: UnknownVariables) -> "Route":
        """The same way, in which a call has the variables that it was found to use."""
        graph = self.graph.with_variables(unknown, unknown.call if unknown.graph is self.graph else None)
        return replace(self, graph=graph, partition=Partition(graph.graph, self.partition.stage_of))


@dataclass
class Engine:
    """A model cut into programs, one for each stage.

    Args:
        plan: which operations and variables go where.
        model: what the plan is of.
        training, inference: the ways through it; they share their variables, their inputs and their outputs.
        called: the way of a call in training by a user's own step, if it is another.
        jit_compile, eager: how programs run.
        layouts, partial: of the variables that ranks have parts of, how; of the others, of which ranks find parts of
            the gradient.
        reduce: the `tf.distribute.CrossDeviceOps` that add up tensors of ranks; copies, if not given.
    """

    plan: Plan
    model: keras.Model
    training: Route
    inference: Route
    jit_compile: bool = False
    eager: bool = False
    called: Route | None = None
    layouts: dict[int, Layout] = field(default_factory=dict)
    partial: Set[int] = frozenset()
    reduce: Any = None
    has_masks: bool = False  # outputs have masks that their symbols do not show
    programs: dict[tuple[Route, int, bool | None], Program] = field(default_factory=dict)
    raw: dict[int, Callable] = field(default_factory=dict)  # of tensors that are functions of their logits, which

    def __post_init__(self):
        trainable = {id(v) for v in self.model.trainable_weights}
        self.trainable = {v for v, variable in enumerate(self.graph.variables) if id(variable) in trainable}

    @property
    def graph(self) -> KerasGraph:
        """The model in training; its variables, inputs and outputs are those of inference too."""
        return self.training.graph

    def route(self, training: bool | None) -> Route:
        """The way of a pass."""
        return self.training if training else self.inference

    def program(self, route: Route, stage: int, training: bool | None) -> Program:
        """The program of a stage of one of the ways, made once."""
        key = route, stage, training
        if key not in self.programs:
            self.programs[key] = Program(
                route.graph, route.partition.ops(stage), route.partition.edges(stage), self.model, training,
                self.jit_compile, self.eager, self.raw,
            )  # fmt: skip
        return self.programs[key]

    @property
    def routes(self) -> list[Route]:
        """All ways through the model."""
        return [self.training, self.inference, *([self.called] if self.called else [])]

    def extended(self, unknown: UnknownVariables) -> "Engine":
        """The same model, in which a call has the variables that it was found to use."""
        training, inference = self.training.knowing(unknown), self.inference.knowing(unknown)
        called = self.called.knowing(unknown) if self.called else None
        plan = replace(self.plan, partition=training.partition)
        return replace(self, plan=plan, training=training, inference=inference, called=called, programs={})

    def traced(self, function: Callable) -> Callable:
        """A function of tensors as programs run: traced once, compiled where asked."""
        return function if self.eager else Function(function, self.jit_compile)

    def schedule(self, strategy: Any, parts: batch.Parts, training: bool | None) -> Schedule:
        """The order of the actions of each replica."""
        if self.plan.mesh.data * self.plan.mesh.tensor > 1:
            return in_turn(self.route(training).partition.stages, parts.micro_batches)
        return strategy.schedule(parts.micro_batches)

    def masks(self, inputs: Sequence[Edge], training: bool | None) -> dict[int, Any]:
        """The masks of the model's outputs for a whole batch.

        The stages run on all of it, here and not in functions of their own: what leads to no mask is pruned.
        """
        route = self.route(training)
        known = dict(zip(self.graph.graph.inputs, inputs, strict=True))
        with tf.device(HOST):
            for s in range(route.partition.stages):
                program = self.program(route, s, training)
                variables = [read(self.graph.variables[v]) for v in program.variables]
                known.update(program.run(variables, {t: known[t] for t in route.partition.needs(s)}).edges)
        return {t: known[t].mask for t in self.graph.graph.outputs}


def each(function: Callable, values: Any) -> Any:
    """`function` of every tensor in a structure that may hold `None`."""
    return tf.nest.map_structure(lambda x: None if x is None else function(x), values)


def tensors_of(values: Any) -> list[tf.Tensor]:
    """All tensors in a structure, those of sparse gradients too."""
    return [x for x in tf.nest.flatten(values, expand_composites=True) if x is not None]
