"""What work costs: an estimate from sizes, good for comparing stages, not for predicting seconds."""

from dataclasses import dataclass

from tfpar.planning.op_graph import Op, OpGraph
from tfpar.planning.schedule import Action, Kind

BACKWARD = 2.0  # a backward pass multiplies twice for each product of the forward pass


@dataclass(frozen=True)
class Hardware:
    """The speed of one device: its arithmetic, its memory, its link to the next device (all per second).

    Example:
        >>> Hardware(flops=1e12, bytes=1e11, link_bytes=1e10).seconds(flops=1e12, bytes=1e11)
        2.0
    """

    flops: float
    bytes: float
    link_bytes: float

    def seconds(self, flops: float, bytes: float) -> float:
        """Time of an operation that computes `flops` and moves `bytes` through memory."""
        return flops / self.flops + bytes / self.bytes


# one core with AVX2; an H100 with NVLink in bfloat16: round figures of what Keras models reach
HARDWARE = {"CPU": Hardware(5e10, 1e10, 5e9), "GPU": Hardware(4e14, 2e12, 2e11)}


def op_seconds(graph: OpGraph, op: Op, rows: int, hardware: Hardware) -> float:
    """Estimated seconds of one operation's forward pass over `rows` samples."""
    activations = sum(graph.tensors[t].bytes for t in {*op.inputs, *op.outputs})
    variables = sum(graph.variables[v].bytes for v in op.variables) if op.flops else 0
    return hardware.seconds(op.flops * rows, activations * rows + variables)


@dataclass(frozen=True)
class StageCost:
    """Seconds that each stage takes for one micro-batch.

    Args:
        forward, backward: one number per stage.
        transfer: seconds from each stage to the next, one number for all.

    Example:
        >>> StageCost.even(stages=2).seconds(Action(0, Kind.BACKWARD, 0))
        2.0
    """

    forward: tuple[float, ...]
    backward: tuple[float, ...]
    transfer: float = 0.0

    @classmethod
    def even(cls, stages: int, forward: float = 1.0, backward: float = BACKWARD) -> "StageCost":
        """Stages of equal cost."""
        return cls((forward,) * stages, (backward,) * stages)

    def seconds(self, action: Action) -> float:
        """The duration of an action."""
        return (self.forward if action.kind is Kind.FORWARD else self.backward)[action.stage]

    def between(self, source: Action, target: Action) -> float:
        """How long the result of `source` travels to `target`."""
        return self.transfer * abs(source.stage - target.stage)
