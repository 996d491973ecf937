"""What is on each device, and when it runs: the result of planning."""

from dataclasses import dataclass, replace
from math import prod
from typing import NamedTuple

from rich.console import RenderableType

from tfpar.planning import plan_report
from tfpar.planning.cost import BACKWARD, Hardware, StageCost, op_seconds
from tfpar.planning.mesh import FIRST, Coordinate, Mesh
from tfpar.planning.partition import Partition
from tfpar.planning.schedule import Schedule
from tfpar.planning.sharding import Layout, Sharding, sharded
from tfpar.planning.timeline import Timeline, simulate

HTML = '<pre style="line-height: normal; font-family: monospace">{code}</pre>'


class Weight(NamedTuple):
    """How ranks divide a variable of the model, and why.

    Args:
        path: as Keras gives it.
        shape, bytes: of all of it, in all shards.
        layout: the dim along which ranks divide it, if they do.
        why: a phrase for people.
    """

    path: str
    shape: tuple[int, ...]
    bytes: int
    layout: Layout
    why: str


class Exchange(NamedTuple):
    """A collective over an axis of the mesh, which runs once for each micro-batch, or for weights once in a step.

    Args:
        kind: "all-reduce", "all-gather", "reduce-scatter", or "maximum", an all-reduce of the largest value.
        where: the operation that it belongs to; "weights" for the gradients of replicated weights.
        backward: whether it is in the backward pass.
        bytes: of one sample of the undivided tensor; of all, for gradients of weights and statistics of batches.
        scope: its name in TensorFlow's graph and in profiles, after the kind.
        batched: whether `bytes` are those of one sample.
        axis: of the mesh, or `"samples"` for all that divide these.
    """

    kind: str
    where: str
    backward: bool
    bytes: int
    scope: str = ""
    batched: bool = True
    axis: str = "tensor"


@dataclass(frozen=True, repr=False)
class Plan:
    """What is on each device, and in which order it runs; `strategy.explain` makes it, `print(plan)` shows it.

    Bytes and seconds are estimates, from the sizes of tensors.

    Args:
        partition: the stage of each operation.
        mesh: the devices.
        schedule: the order of the actions on the devices of a lane, for a full batch.
        hardware: the speed of a device that the estimates of seconds assume.
        rows: samples in a full batch, over all replicas.
        slot_bytes: for each variable of the graph, the bytes of the optimizer's slots for it, undivided; empty if they
            are not known.
        global_batch: names of the operations that every replica computes for the whole batch.
        segments: into how many segments the forward pass of training is cut.
        zero: what replicas divide, see `MeshStrategy`.
        weights: how ranks divide each variable of the graph; empty without ranks.
        exchanges: the collectives in a training step, but for the sums of gradients over replicas.
        cut_because: why programs end at these; `None` if they are inside the programs.
        attention: for each operation with attention that has been compiled for GPUs, why it is computed by the formula;
            `None` if by cuDNN's fused kernels.

    Example:
        >>> plan = strategy.explain(model, batch_size=64)  # doctest: +SKIP
        >>> [plan.parameter_bytes(s) for s in range(plan.partition.stages)]  # doctest: +SKIP
        [2000, 2000]
    """

    partition: Partition
    mesh: Mesh
    schedule: Schedule
    hardware: Hardware
    rows: int
    slot_bytes: tuple[int, ...] = ()
    global_batch: tuple[str, ...] = ()
    segments: int = 1
    zero: int = 0
    weights: tuple[Weight, ...] = ()
    exchanges: tuple[Exchange, ...] = ()
    cut_because: str | None = None
    attention: tuple[tuple[str, str | None], ...] = ()

    def device(self, stage: int, at: Coordinate = FIRST) -> str:
        """The name of the device of a stage, in the lane of `at`: its replica and rank."""
        return self.mesh.device(at._replace(stage=self.schedule.device_of[stage]))

    def home(self, variable: int) -> str:
        """The name of the device of a variable, given by its index in the graph, in the first replica and rank."""
        return self.device(self.partition.home(variable))

    @property
    def micro_rows(self) -> int:
        """Samples in the largest micro-batch."""
        return -(-self.rows // (self.mesh.count("samples") * self.schedule.micro_batches))

    @property
    def cost(self) -> StageCost:
        """Estimated seconds of each stage for the largest micro-batch.

        Of all work of a stage, however many ranks divide it; without collectives.
        """
        graph = self.partition.graph
        forward = tuple(
            sum(op_seconds(graph, graph.ops[i], self.micro_rows, self.hardware) for i in self.partition.ops(s))
            for s in range(self.partition.stages)
        )
        largest = max((self.edge_bytes(s) for s in range(self.partition.stages - 1)), default=0)
        return StageCost(
            forward, tuple(BACKWARD * f for f in forward), largest * self.micro_rows / self.hardware.link_bytes
        )

    @property
    def timeline(self) -> Timeline:
        """The simulated training step of one lane: `simulate` of the schedule and `cost`."""
        return simulate(self.schedule, self.cost)

    def bytes(self, stage: int, at: Coordinate = FIRST) -> int:
        """Bytes that the device of a stage needs in a lane: parameters, gradients, slots and activations.

        What XLA or TensorFlow need within a program is not in it.
        """
        kinds = self.parameter_bytes, self.gradient_bytes, self.optimizer_bytes
        return sum(of(stage, at) for of in kinds) + self.activation_bytes(stage)

    def edge_bytes(self, stage: int) -> int:
        """Bytes of the activations of one sample that a stage makes for later ones or as outputs of the model."""
        return sum(self.partition.graph.tensors[t].bytes for t in self.partition.edges(stage))

    def parameter_bytes(self, stage: int, at: Coordinate = FIRST) -> int:
        """Bytes of the variables of a stage that a lane has: of its copies and shards."""
        return sum(self.bytes_of(v, at) for v in self.variables(stage))

    def optimizer_bytes(self, stage: int, at: Coordinate = FIRST) -> int:
        """Bytes of the optimizer's slots for a stage's variables that a lane has; 0 if they are not known."""
        return sum(self.bytes_of(v, at, self.slot_bytes[v], 1) for v in self.variables(stage) if self.slot_bytes)

    def gradient_bytes(self, stage: int, at: Coordinate = FIRST) -> int:
        """Bytes of the gradients of a stage that a lane has.

        With micro-batches: of their sums, of the gradients of one micro-batch, and in mixed precision of the weights in
        the dtype in which layers read them.
        """
        found = 0
        for v in self.variables(stage):
            variable = self.partition.graph.variables[v]
            if variable.trainable:
                found += self.bytes_of(v, at, zero=2)
                if self.schedule.micro_batches > 1:
                    read = variable.read_bytes
                    found += self.bytes_of(v, at, read or variable.bytes, 4) + self.bytes_of(v, at, read, 4)
        return found

    def variables(self, stage: int) -> list[int]:
        """The variables of a stage, as indices into the graph's; the first stage that uses one has it."""
        return [v for v in range(len(self.partition.graph.variables)) if self.partition.home(v) == stage]

    def bytes_of(self, v: int, at: Coordinate, whole: int | None = None, zero: int = 3) -> int:
        """Of the bytes of a variable, or of its slots or gradient, those that a lane has.

        Args:
            v: the variable's index in the graph.
            whole: the bytes of all of it; the variable's own, if not given.
            zero: from which kind of ZeRO on replicas divide it; 4 for what they never divide.
        """
        variable = self.partition.graph.variables[v]
        part = self.sharding(v, zero).shape(variable.shape, at)
        return (variable.bytes if whole is None else whole) * prod(part) // max(1, prod(variable.shape))

    def sharding(self, v: int, zero: int = 3) -> Sharding:
        """How lanes divide a variable, or its slots or gradient; `v` and `zero` as for `part`."""
        variable = self.partition.graph.variables[v]
        dim = self.weights[v].layout.dim if v < len(self.weights) else None
        sharding = Sharding({} if dim is None else {"tensor": dim}, replace(self.mesh, stage=1, devices=()))
        divides = variable.trainable and self.zero >= zero
        return sharded(variable.shape, sharding) if divides else sharding

    def activation_bytes(self, stage: int) -> int:
        """Bytes of what a stage's operations make, for as many micro-batches as the schedule holds at once.

        Of undivided tensors, however many ranks divide them.
        """
        graph = self.partition.graph
        made = sum(graph.tensors[t].bytes for i in self.partition.ops(stage) for t in graph.ops[i].outputs)
        return made * self.micro_rows * self.schedule.in_flight(stage)

    def rank_bytes(self, rank: int) -> int:
        """Bytes of the variables that a rank of the first replica has, on all stages."""
        return sum(self.parameter_bytes(s, Coordinate(tensor=rank)) for s in range(self.partition.stages))

    def __rich__(self) -> RenderableType:
        return plan_report.tables(self)

    def __str__(self) -> str:
        return plan_report.printed(self).export_text()

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """For notebooks."""
        return plan_report.printed(self).export_html(inline_styles=True, code_format=HTML)
