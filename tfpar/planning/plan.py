"""What goes where: the result of planning."""

from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from rich.console import RenderableType

from tfpar.planning import plan_report
from tfpar.planning.cost import BACKWARD, Hardware, StageCost, op_seconds
from tfpar.planning.mesh import FIRST, Coordinate, Mesh
from tfpar.planning.partition import Partition
from tfpar.planning.schedule import Schedule
from tfpar.planning.sharding import REPLICATED, Layout, Sharding, sharded
from tfpar.planning.timeline import Timeline, simulate

HTML = '<pre style="line-height: normal; font-family: monospace">{code}</pre>'


class Weight(NamedTuple):
    """How a weight is divided between the ranks of a tensor axis, and why."""

    path: str
    shape: tuple[int, ...]
    bytes: int
    layout: Layout
    why: str


class Exchange(NamedTuple):
    """What crosses between ranks once in a step.

    Args:
        kind: "all-reduce", "all-gather" or "reduce-scatter".
        where: the operation that it belongs to.
        backward: whether in the backward pass.
        bytes: of one sample of the whole tensor; of all of it, for gradients of weights.
        scope: its name in TensorFlow's graph and in profiles, after the kind.
        batched: whether `bytes` are those of one sample.
    """

    kind: str
    where: str
    backward: bool
    bytes: int
    scope: str = ""
    batched: bool = True


@dataclass(frozen=True, repr=False)
class Plan:
    """A partition on a mesh, run by a schedule. `print(plan)`, or a notebook's cell that ends in it, explains it.

    Args:
        partition: the stage of each operation.
        mesh: the devices.
        schedule: for a full batch.
        hardware: what the estimates assume.
        rows: samples in a full batch.
        slot_bytes: for each variable of the graph, the bytes that the optimizer keeps for it.
        global_batch: operations that are run for the parts of all replicas at once.
        segments: programs of a replica.
        zero: what replicas divide, see `MeshStrategy`.
        weights: how each variable of the graph is divided between ranks.
        exchanges: what crosses between ranks in a training step.
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

    def device(self, stage: int, at: Coordinate = FIRST) -> str:
        """The device of a stage of a lane."""
        return self.mesh.device(at._replace(stage=self.schedule.device_of[stage]))

    def home(self, variable: int) -> str:
        """The device of a variable, in the first replica."""
        return self.device(self.partition.home(variable))

    @property
    def micro_rows(self) -> int:
        """Samples in the largest micro-batch."""
        return -(-self.rows // (self.mesh.data * self.schedule.micro_batches))

    @property
    def cost(self) -> StageCost:
        """Estimated seconds of each stage for one micro-batch."""
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
        """The simulated step."""
        return simulate(self.schedule, self.cost)

    def bytes(self, stage: int, at: Coordinate = FIRST) -> int:
        """An estimate of what a lane needs for a stage: of all columns of the table."""
        kinds = self.parameter_bytes, self.gradient_bytes, self.optimizer_bytes
        return sum(of(stage, at) for of in kinds) + self.activation_bytes(stage)

    def edge_bytes(self, stage: int) -> int:
        """Bytes of one sample that leave a stage."""
        return sum(self.partition.graph.tensors[t].bytes for t in self.partition.edges(stage))

    def parameter_bytes(self, stage: int, at: Coordinate = FIRST) -> int:
        """Bytes of the variables that a lane has of a stage."""
        return sum(self.part(v, at) for v in self.variables(stage))

    def optimizer_bytes(self, stage: int, at: Coordinate = FIRST) -> int:
        """Bytes of the optimizer's slots that a lane has of a stage."""
        return sum(self.part(v, at, self.slot_bytes[v], 1) for v in self.variables(stage) if self.slot_bytes)

    def gradient_bytes(self, stage: int, at: Coordinate = FIRST) -> int:
        """Bytes of the gradients that a lane has of a stage.

        With micro-batches they are those of one beside the sums, and the weights in the dtype in which all read them.
        """
        found = 0
        for v in self.variables(stage):
            variable = self.partition.graph.variables[v]
            if variable.trainable:
                found += self.part(v, at, zero=2)
                if self.schedule.micro_batches > 1:
                    read = variable.read_bytes
                    found += self.part(v, at, read or variable.bytes, 4) + self.part(v, at, read, 4)
        return found

    def variables(self, stage: int) -> list[int]:
        """The variables of a stage."""
        return [v for v in range(len(self.partition.graph.variables)) if self.partition.home(v) == stage]

    def part(self, v: int, at: Coordinate, whole: int | None = None, zero: int = 3) -> int:
        """Of the bytes of a variable, or of its slots, those that a lane has.

        Args:
            zero: from which kind of ZeRO on replicas divide them; 4 for what they never divide.
        """
        variable = self.partition.graph.variables[v]
        part = self.sharding(v, zero).shape(variable.shape, at, self.mesh.data)
        return (variable.bytes if whole is None else whole) * prod(part) // max(1, prod(variable.shape))

    def sharding(self, v: int, zero: int = 3) -> Sharding:
        """How lanes divide a variable, or its slots; `zero` as for `part`."""
        variable = self.partition.graph.variables[v]
        layout = self.weights[v].layout if v < len(self.weights) else REPLICATED
        sharding = Sharding(layout, self.mesh.tensor)
        divides = variable.trainable and self.zero >= zero
        return sharded(variable.shape, sharding, self.mesh.data) if divides else sharding

    def activation_bytes(self, stage: int) -> int:
        """Bytes of what a stage's operations make, for as many micro-batches as the schedule holds at once."""
        graph = self.partition.graph
        made = sum(graph.tensors[t].bytes for i in self.partition.ops(stage) for t in graph.ops[i].outputs)
        return made * self.micro_rows * self.schedule.in_flight(stage)

    def rank_bytes(self, rank: int) -> int:
        """Bytes of the variables of a rank, on all stages."""
        return sum(self.parameter_bytes(s, Coordinate(tensor=rank)) for s in range(self.partition.stages))

    def __rich__(self) -> RenderableType:
        return plan_report.tables(self)

    def __str__(self) -> str:
        return plan_report.printed(self).export_text()

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """For notebooks."""
        return plan_report.printed(self).export_html(inline_styles=True, code_format=HTML)
