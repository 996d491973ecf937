"""What work costs: an estimate from sizes, good for comparing stages, not for predicting seconds."""

from dataclasses import dataclass

from tfpar.planning.op_graph import Op, OpGraph
from tfpar.planning.schedule import Action, Kind

BACKWARD = 2.0  # a backward pass multiplies twice for each product of the forward pass


@dataclass(frozen=True)
class Hardware:
    """The speed of one device.

    Args:
        flops: floating-point operations per second.
        bytes: bytes per second that go through its memory.
        link_bytes: bytes per second that go to the next device.
        link_seconds: what an exchange takes, however small.

    Example:
        >>> Hardware(flops=1e12, bytes=1e11, link_bytes=1e10).seconds(flops=1e12, bytes=1e11)
        2.0
    """

    flops: float
    bytes: float
    link_bytes: float
    link_seconds: float = 0.0

    def seconds(self, flops: float, bytes: float) -> float:
        """Seconds of `flops` floating-point operations, plus those of moving `bytes` through memory."""
        return flops / self.flops + bytes / self.bytes


# one core with AVX2; an H100 with NVLink in bfloat16: round figures of what Keras models reach
HARDWARE = {"CPU": Hardware(5e10, 1e10, 5e9, 3e-4), "GPU": Hardware(4e14, 2e12, 2e11, 1e-5)}


def op_seconds(graph: OpGraph, op: Op, rows: int, hardware: Hardware) -> float:
    """Estimated seconds of one operation's forward pass over `rows` samples."""
    activations = sum(graph.tensors[t].bytes for t in {*op.inputs, *op.outputs})
    variables = sum(graph.variables[v].bytes for v in op.variables) if op.flops else 0
    return hardware.seconds(op.flops * rows, activations * rows + variables)


@dataclass(frozen=True)
class StageCost:
    """Seconds that each stage takes for one micro-batch.

    Args:
        forward, backward: seconds of a forward and of a backward pass, one number per stage.
        transfer: seconds that a tensor takes from a stage to the next, or its gradient to the one before.

    Example:
        >>> StageCost.even(stages=2).seconds(Action(0, Kind.BACKWARD, 0))
        2.0
    """

    forward: tuple[float, ...]
    backward: tuple[float, ...]
    transfer: float = 0.0

    @classmethod
    def even(cls, stages: int, forward: float = 1.0, backward: float = BACKWARD) -> "StageCost":
        """Stages that all take the same time.

        Args:
            forward, backward: seconds; `backward` does not follow from `forward`.
        """
        return cls((forward,) * stages, (backward,) * stages)

    def seconds(self, action: Action) -> float:
        """Seconds that an action takes.

        Raises:
            IndexError: a stage for which there is no number.
        """
        return (self.forward if action.kind is Kind.FORWARD else self.backward)[action.stage]

    def between(self, source: Action, target: Action) -> float:
        """Seconds that the result of `source` takes to the stage of `target`: `transfer` for each stage on the way."""
        return self.transfer * abs(source.stage - target.stage)
