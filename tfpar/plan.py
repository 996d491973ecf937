"""What goes where: the result of planning, and what a user is told of it."""

from dataclasses import dataclass

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from tfpar.cost import BACKWARD, Hardware, StageCost, op_seconds
from tfpar.mesh import Mesh
from tfpar.partition import Partition
from tfpar.schedule import Schedule
from tfpar.simulate import simulate
from tfpar.timeline import Timeline


@dataclass(frozen=True)
class Plan:
    """A partition on a mesh, run by a schedule. `print(plan)` explains it.

    Args:
        partition: the stage of each operation.
        mesh: the devices.
        schedule: for a full batch.
        hardware: what the estimates assume.
        rows: samples in a full batch.
        slot_bytes: for each variable of the graph, the bytes that the optimizer keeps for it.
        whole: stages that take the parts of all replicas at once.
    """

    partition: Partition
    mesh: Mesh
    schedule: Schedule
    hardware: Hardware
    rows: int
    slot_bytes: tuple[int, ...] = ()
    whole: frozenset[int] = frozenset()

    def device(self, stage: int, replica: int = 0) -> str:
        """The device of a stage."""
        return self.mesh.device(data=replica, stage=self.schedule.device_of[stage])

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

    def edge_bytes(self, stage: int) -> int:
        """Bytes of one sample that leave a stage."""
        return sum(self.partition.graph.tensors[t].bytes for t in self.partition.edges(stage))

    def parameter_bytes(self, stage: int) -> int:
        """Bytes of the variables that live on a stage."""
        return sum(v.bytes for i, v in enumerate(self.partition.graph.variables) if self.partition.home(i) == stage)

    def optimizer_bytes(self, stage: int) -> int:
        """Bytes of the optimizer's slots on a stage."""
        return sum(b for i, b in enumerate(self.slot_bytes) if self.partition.home(i) == stage)

    def activation_bytes(self, stage: int) -> int:
        """Bytes of what a stage's operations make, for as many micro-batches as the schedule holds at once."""
        graph = self.partition.graph
        made = sum(graph.tensors[t].bytes for i in self.partition.ops(stage) for t in graph.ops[i].outputs)
        return made * self.micro_rows * self.schedule.in_flight(stage)

    def __rich__(self) -> Table:
        return self.of_replicas() if self.mesh.data > 1 else self.of_stages()

    def of_stages(self) -> Table:
        """What is on each stage."""
        title = f"{self.partition.stages} stages, {self.schedule.micro_batches} micro-batches"
        table = Table(title=title, box=SIMPLE, padding=(0, 1, 0, 0))
        for name in ("stage", "device", "first layer"):
            table.add_column(name)
        table.add_column("layers", justify="right")
        for name in ("time", "parameters", "optimizer", f"activations\nof {self.rows} samples"):
            table.add_column(name, justify="right")
        whole = sum(self.cost.forward) or 1.0
        for s in range(self.partition.stages):
            ops = self.partition.ops(s)
            table.add_row(
                str(s), self.device(s), self.partition.graph.ops[ops[0]].layer, str(len(ops)),
                f"{self.cost.forward[s] / whole:.0%}", size(self.parameter_bytes(s)),
                size(self.optimizer_bytes(s)) if any(self.slot_bytes) else "?",
                size(self.activation_bytes(s)),
            )  # fmt: skip
        table.caption = f"predicted bubble {self.timeline.bubble:.0%} (idle share of all devices)"
        return table

    def of_replicas(self) -> Table:
        """What is on each replica."""
        graph, stages = self.partition.graph, range(self.partition.stages)
        table = Table(title=f"{self.mesh.data} replicas", box=SIMPLE, padding=(0, 1, 0, 0))
        for name in ("replica", "device"):
            table.add_column(name)
        for name in ("samples", "parameters", "optimizer", f"activations\nof {self.rows} samples"):
            table.add_column(name, justify="right")
        edges = [self.rows * r // self.mesh.data for r in range(self.mesh.data + 1)]
        parameters, activations = (size(sum(map(of, stages))) for of in (self.parameter_bytes, self.activation_bytes))
        slots = size(sum(self.slot_bytes)) if any(self.slot_bytes) else "?"
        for r in range(self.mesh.data):
            samples = str(edges[r + 1] - edges[r])
            table.add_row(str(r), self.device(0, r), samples, parameters, slots, activations)
        reduced = size(sum(v.bytes for v in graph.variables if v.trainable))
        together = [graph.ops[i].name for s in sorted(self.whole) for i in self.partition.ops(s)]
        table.caption = (
            f"{reduced} of gradients added up over replicas, from {len(stages) - len(together)} programs"
            + (f"\ncomputed for all replicas at once: {', '.join(together)}" if together else "")
        )
        return table

    def __str__(self) -> str:
        console = Console(width=120)
        with console.capture() as capture:
            console.print(self, *([self.timeline] if self.mesh.data == 1 else []))
        return capture.get()


def size(count: float) -> str:
    """Bytes in the unit that suits: `1.5 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
