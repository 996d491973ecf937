"""What goes where: the result of planning, and what a user is told of it."""

from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from rich.box import SIMPLE
from rich.console import Console, Group, RenderableType
from rich.table import Table

from tfpar.cost import BACKWARD, Hardware, StageCost, op_seconds
from tfpar.layout import Layout, bounds
from tfpar.mesh import Mesh
from tfpar.partition import Partition
from tfpar.schedule import Schedule
from tfpar.simulate import simulate
from tfpar.timeline import Timeline


class Weight(NamedTuple):
    """How a weight is divided between the ranks of a tensor axis, and why."""

    path: str
    shape: tuple[int, ...]
    bytes: int
    layout: Layout
    why: str

    def part(self, rank: int, ranks: int) -> tuple[int, ...]:
        """The shape of what a rank has."""
        if self.layout.dim is None:
            return self.shape
        edges = bounds(self.shape[self.layout.dim], ranks)
        return tuple(edges[rank + 1] - edges[rank] if d == self.layout.dim else n for d, n in enumerate(self.shape))

    def part_bytes(self, rank: int, ranks: int) -> int:
        """The bytes of what a rank has."""
        return self.bytes // max(1, prod(self.shape)) * prod(self.part(rank, ranks))


class Exchange(NamedTuple):
    """What crosses between ranks once in a step.

    Args:
        kind: "all-reduce", "all-gather" or "reduce-scatter".
        where: the operation that it belongs to.
        backward: whether on the way back.
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
        weights: how each variable of the graph is divided between ranks.
        exchanges: what crosses between ranks in a training step.
    """

    partition: Partition
    mesh: Mesh
    schedule: Schedule
    hardware: Hardware
    rows: int
    slot_bytes: tuple[int, ...] = ()
    whole: frozenset[int] = frozenset()
    weights: tuple[Weight, ...] = ()
    exchanges: tuple[Exchange, ...] = ()

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

    def __rich__(self) -> RenderableType:
        if self.mesh.tensor > 1:
            return self.of_ranks()
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

    def rank_bytes(self, rank: int) -> int:
        """Bytes of the variables of a rank."""
        return sum(weight.part_bytes(rank, self.mesh.tensor) for weight in self.weights)

    def of_ranks(self) -> Group:
        """How weights are divided between ranks, what each rank holds, and what they exchange."""
        ranks = self.mesh.tensor
        weights = Table(title=f"{ranks} ranks", box=SIMPLE, padding=(0, 1, 0, 0))
        for name in ("weight", "shape", "part", "why"):
            weights.add_column(name, overflow="fold")
        for weight in self.weights:
            part = "" if weight.layout.dim is None else str(weight.part(0, ranks))
            weights.add_row(weight.path, str(weight.shape), part, weight.why)
        devices = Table(box=SIMPLE, padding=(0, 1, 0, 0))
        for name in ("rank", "device"):
            devices.add_column(name)
        for name in ("parameters", "of all", "optimizer"):
            devices.add_column(name, justify="right")
        whole = sum(weight.bytes for weight in self.weights) or 1
        for k in range(ranks):
            held = self.rank_bytes(k)
            slots = sum(
                slot * weight.part_bytes(k, ranks) // max(1, weight.bytes)
                for slot, weight in zip(self.slot_bytes, self.weights, strict=False)
            )
            slot = size(slots) if any(self.slot_bytes) else "?"
            devices.add_row(str(k), self.mesh.device(tensor=k), size(held), f"{held / whole:.0%}", slot)
        exchanges = Table(box=SIMPLE, padding=(0, 1, 0, 0))
        for name in ("collectives of a training step", "direction"):
            exchanges.add_column(name)
        for name in ("number", f"bytes\nof {self.rows} samples"):
            exchanges.add_column(name, justify="right")
        for kind, backward in dict.fromkeys((e.kind, e.backward) for e in self.exchanges):
            found = [e for e in self.exchanges if (e.kind, e.backward) == (kind, backward)]
            total = sum(e.bytes * (self.rows if e.batched else 1) for e in found)
            exchanges.add_row(kind, "backward" if backward else "forward", str(len(found)), size(total))
        return Group(weights, devices, exchanges)

    def __str__(self) -> str:
        console = Console(width=120)
        with console.capture() as capture:
            console.print(self, *([self.timeline] if self.mesh.data * self.mesh.tensor == 1 else []))
        return capture.get()


def size(count: float) -> str:
    """Bytes in the unit that suits: `1.5 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
