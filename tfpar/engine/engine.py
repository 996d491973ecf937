"""A model cut into programs, and where their variables are."""

from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from tfpar.comm.collectives import Collective
from tfpar.comm.in_program import Gang, InProgram
from tfpar.compat import _keras
from tfpar.compat._tf import independent
from tfpar.engine import micro_batch
from tfpar.engine.description import Description
from tfpar.engine.program import Edge, Function, Program
from tfpar.graph.batch_probe import Combine, Probe
from tfpar.graph.keras_graph import KerasGraph
from tfpar.graph.recording import UnknownVariables
from tfpar.planning.mesh import FIRST, Coordinate, Mesh
from tfpar.planning.partition import Partition
from tfpar.planning.plan import Plan
from tfpar.planning.schedule import Schedule, in_segments
from tfpar.planning.sharding import REPLICATED, Layout
from tfpar.tensor_parallel.loss_parallel import CrossEntropy
from tfpar.tensor_parallel.rank_graph import is_collective
from tfpar.variables.logical import LogicalVariable
from tfpar.variables.parts import HOST, copy_on_device

FEW = 2  # micro-batches, of which TensorFlow may optimise each for itself


class MicroBatch(NamedTuple):
    """A micro-batch of a lane.

    Args:
        lane: the rank of a replica that it goes through.
        micro_batch: which of those of the replica it is.
    """

    lane: Coordinate
    micro_batch: int


def up_to(segments: Iterable[int], ends: Sequence[bool]) -> list[list[int]]:
    """Segments, in turns of which each goes up to one that ends it."""
    found: list[list[int]] = [[]]
    for s in segments:
        found[-1].append(s)
        if ends[s]:
            found.append([])
    return [turn for turn in found if turn]


def copy_of(variable: keras.Variable, at: Coordinate = FIRST) -> tf.Variable:
    """The variable that holds the value for a lane: a rank of a replica."""
    value = _keras.stored(variable)
    return value.copy_of(at) if len(getattr(value, "copies", ())) > 1 else value


def device_of(variable: keras.Variable, at: Coordinate = FIRST) -> str:
    """Where a variable lives."""
    return copy_of(variable, at).device


def layout_of(variable: keras.Variable) -> Layout:
    """How a variable is divided between ranks."""
    value = _keras.stored(variable)
    return value.sharding.layout("tensor") if isinstance(value, LogicalVariable) else REPLICATED


def read(variable: keras.Variable, at: Coordinate = FIRST) -> tf.Tensor:
    """What a lane has of a variable's value, its replicas' shards put together, on the current device."""
    value = _keras.stored(variable)
    return value.of_lane(at) if isinstance(value, LogicalVariable) else copy_on_device(value)


@dataclass(frozen=True, eq=False)
class ExecutionGraph:
    """The way of a pass through the model.

    Args:
        graph, partition: the operations, and the segment of each: what is one program. A stage has one or more.
        probe: what is known of how the results of the model's own operations, of which `graph` was made, combine.
        global_batch: segments that take the parts of all replicas at once.
        drawn: states of random numbers from which the ranks of a replica draw differently.
        loss: scalars, if it ends with the loss: the weighted sum, and each output's.
        metrics: what each compiled metric finds of the samples, if it ends with that in the place of the outputs.
        gangs: for each segment, who runs it at once and exchanges tensors in it, if its collectives are in it.
        lane: the input that is the number of the lane, if collectives need it.
        cut_segments: then the segment of each operation if programs ended at collectives.
    """

    graph: KerasGraph
    partition: Partition
    probe: Probe
    global_batch: Set[int] = frozenset()
    drawn: Set[int] = frozenset()
    loss: tuple[int, ...] = ()
    metrics: tuple[int, ...] | None = None
    gangs: tuple[Gang, ...] = ()
    lane: int | None = None
    cut_segments: tuple[int, ...] = ()

    @property
    def source(self) -> KerasGraph:
        """The model's own operations."""
        return self.probe.graph

    @cached_property
    def stages(self) -> tuple[int, ...]:
        """The stage of each segment."""
        return tuple(self.graph.graph.ops[self.partition.ops(s)[0]].stage for s in range(self.partition.stages))

    def leads_on(self, s: int, t: int) -> bool:
        """Whether a later segment uses a tensor of this one."""
        return any(self.partition.stage_of[i] > s for i in self.graph.graph.consumers[t])

    def unused(self, s: int) -> frozenset[int]:
        """The tensors of a segment that the loss does not depend on outside of it."""
        edges = self.partition.edges(s) if self.loss else ()
        return frozenset(t for t in edges if not self.leads_on(s, t) and t != self.loss[0])

    def names(self, s: int) -> list[str]:
        """The operations of a segment."""
        return [self.graph.graph.ops[i].name for i in self.partition.ops(s)]

    def rows(self, s: int, v: int, variable: keras.Variable) -> dict[int, Combine]:
        """For each operation of a segment that looks up rows of a variable, how they follow from those of parts."""
        users = [i for i in self.partition.ops(s) if v in self.graph.graph.ops[i].variables]
        found = {i: self.probe.rows(self.in_source(i), variable) for i in users}
        return {i: kind for i, kind in found.items() if kind is not None}

    def in_source(self, i: int) -> int | None:
        """The model's own operation that an operation stands for."""
        name = self.graph.graph.ops[i].name
        return next((n for n, op in enumerate(self.source.graph.ops) if op.name == name), None)

    @cached_property
    def collectives(self) -> dict[int, Collective]:
        """The exchanges between devices, each a segment of its own."""
        calls = zip(self.partition.stage_of, self.graph.calls, strict=True)
        return {s: call.operation for s, call in calls if is_collective(call)}

    @cached_property
    def cut_inside(self) -> "ExecutionGraph":
        """The same way in the segments that it would have if programs ended at collectives."""
        return replace(self, partition=Partition(self.graph.graph, self.cut_segments), gangs=())

    @cached_property
    def turns(self) -> tuple[list[list[int]], list[list[int]]]:
        """The segments of a way that is cut inside, forward and backward: those up to an exchange make one turn."""
        calls, segments = self.graph.calls, range(self.partition.stages)
        first = [calls[self.partition.ops(s)[0]].operation for s in segments]
        last = [calls[self.partition.ops(s)[-1]].operation for s in segments]
        forward = [isinstance(x, InProgram) and x.exchanges_forward for x in last]
        backward = [isinstance(x, InProgram) and x.exchanges_backward for x in first]
        return up_to(segments, forward), up_to(reversed(segments), backward)

    def knowing(self, unknown: UnknownVariables) -> "ExecutionGraph":
        """The same way, in which a call has the variables that it was found to use."""
        call = unknown.call if unknown.graph is self.graph else None
        graph = self.graph.with_variables(unknown, call)
        source = self.source.with_variables(unknown, None if call is None else self.in_source(call))
        return replace(
            self, graph=graph, probe=Probe(source), partition=Partition(graph.graph, self.partition.stage_of)
        )


@dataclass
class Engine:
    """A model cut into programs, one for each segment of a stage.

    Args:
        plan: which operations and variables go where.
        model: what the plan is of.
        training, inference: the ways through it; they share their variables, their inputs and their outputs.
        loss_parallel: how ranks find the loss of a part of the outputs each, if they do, and the way to what it is
            computed from, which is the last output; the targets are the last input.
        jit_compile, eager: how programs run.
        partial: variables that all ranks have, but find parts of the gradient of.
        cross_device_ops: what adds up tensors of several devices; they are copied and added, if not given.
        cut_because: why programs end at collectives; `None` if they hold them.
        reduce_dtype: in which gradients are exchanged, if not in their own.
        fused_head: the largest attention head that programs have cuDNN compute; 0 for none.
        buckets: in how many parts a program that holds its collectives has what is exchanged of weights.
    """

    plan: Plan
    model: keras.Model
    training: ExecutionGraph
    inference: ExecutionGraph
    jit_compile: bool = False
    eager: bool = False
    loss_parallel: tuple[CrossEntropy, ExecutionGraph] | None = None
    partial: Set[int] = frozenset()
    cross_device_ops: tf.distribute.CrossDeviceOps | None = None
    cut_because: str | None = "there is one lane"
    reduce_dtype: str | None = None
    fused_head: int = 0
    buckets: int = 1
    updates_apart: bool = False  # no program can end with the update
    has_masks: bool = False  # outputs have masks that their symbols do not show
    programs: dict[tuple[ExecutionGraph, int, bool | None], Program] = field(default_factory=dict)
    losses: dict[Any, ExecutionGraph] = field(default_factory=dict)  # ways to the loss, by kinds of targets
    sums_in_place: dict[tuple, tf.Variable] = field(default_factory=dict)  # by segment, lane and variable
    inside: dict[ExecutionGraph, ExecutionGraph] = field(default_factory=dict)  # of ways, those with collectives inside

    def __post_init__(self):
        trainable = {id(v) for v in self.model.trainable_weights}
        self.trainable = {v for v, variable in enumerate(self.graph.variables) if id(variable) in trainable}

    @property
    def graph(self) -> KerasGraph:
        """The model in training; its variables, inputs and outputs are those of inference too."""
        return self.training.graph

    def route(self, training: bool | None) -> ExecutionGraph:
        """The way of a pass."""
        return self.training if training else self.inference

    def before_loss(self, training: bool) -> tuple[CrossEntropy | None, ExecutionGraph]:
        """The way to what the loss is computed from, and what ranks have found of it then."""
        return (self.loss_parallel if training else None) or (None, self.route(training))

    def program(self, route: ExecutionGraph, segment: int, training: bool | None) -> Program:
        """The program of a segment of one of the ways, made once."""
        key = route, segment, training
        if key not in self.programs:
            self.programs[key] = Program(
                route.graph, route.partition.ops(segment), route.partition.edges(segment), self.model, training,
                self.jit_compile, self.eager, route.unused(segment), route.gangs[segment] if route.gangs else None,
                self.fused_head, self.often,
            )  # fmt: skip
        return self.programs[key]

    @property
    def routes(self) -> list[ExecutionGraph]:
        """All ways through the model."""
        terms = [self.loss_parallel[1]] if self.loss_parallel else []
        return [self.training, self.inference, *terms, *self.losses.values(), *self.inside.values()]

    def extended(self, unknown: UnknownVariables) -> "Engine":
        """The same model, in which a call has the variables that it was found to use."""
        for route, inside in self.inside.items():  # the same operations
            unknown.graph = route.graph if inside.graph is unknown.graph else unknown.graph
        for (*_, training), route in self.losses.items():  # which begins with the way without
            if route.graph is unknown.graph:
                unknown.graph = self.before_loss(training)[1].graph
        training, inference = self.training.knowing(unknown), self.inference.knowing(unknown)
        parallel = self.loss_parallel and (self.loss_parallel[0], self.loss_parallel[1].knowing(unknown))
        cut = self.plan.partition
        graph = replace(cut.graph, variables=training.source.graph.variables)
        plan = replace(self.plan, partition=Partition(graph, cut.stage_of))
        return replace(
            self, plan=plan, training=training, inference=inference, loss_parallel=parallel, programs={}, losses={},
            inside={},
        )  # fmt: skip

    @property
    def attention(self) -> dict[str, str | None]:
        """For each operation with attention, as far as it was traced, why cuDNN does not compute it, or `None`."""
        return {name: why for program in self.programs.values() for name, why in program.attention.items()}

    @cached_property
    def first_used(self) -> list[int]:
        """For each variable, the first operation that uses it: gradients come in the opposite order."""
        ops = self.graph.graph.ops
        return [
            next((i for i, op in enumerate(ops) if v in op.variables), 0) for v, _ in enumerate(self.graph.variables)
        ]

    @property
    def mesh(self) -> Mesh:
        """The devices."""
        return self.plan.mesh

    def traced(self, function: Callable, compiled: bool = True) -> Callable:
        """A function of tensors as programs run: traced once, compiled where asked."""
        return function if self.eager else Function(function, self.jit_compile and compiled, often=self.often)

    @property
    def often(self) -> bool:
        """Whether a step calls the same program so often that what each call adds to the first step counts more."""
        return self.plan.schedule.micro_batches > FEW

    @cached_property
    def sums(self) -> Callable:
        """Adds gradients of a micro-batch to those before, in the dtype of those."""
        return self.traced(lambda known, found: [k + tf.cast(f, k.dtype) for k, f in zip(known, found, strict=True)])

    def schedule(self, strategy: Description, parts: micro_batch.Parts, route: ExecutionGraph) -> Schedule:
        """The order of the actions of each lane."""
        return in_segments(strategy.schedule(parts.micro_batches), route.stages)

    def outputs(self, inputs: Sequence[Edge], training: bool | None) -> list[Edge]:
        """The model's outputs for a whole batch, for their masks and shapes.

        All operations run on all of it, here and not in functions of their own: what leads to values only is pruned.
        """
        graph = self.route(training).source
        program = Program(
            graph, range(len(graph.calls)), graph.graph.outputs, self.model, training, False, True
        )  # fmt: skip
        with tf.device(HOST):
            variables = [full_value(graph.variables[v]) for v in program.variables]
            edges = program(variables, dict(zip(graph.graph.inputs, inputs, strict=False))).edges
        return [edges[t] for t in graph.graph.outputs]


def full_value(variable: keras.Variable) -> tf.Tensor:
    """All of a variable's value, wherever its parts are."""
    return _keras.stored(variable).read_value() if layout_of(variable) != REPLICATED else read(variable)


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
