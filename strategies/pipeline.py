"""Consecutive layers on consecutive devices, all of them busy."""

from collections.abc import Callable

from tfpar.comm.devices import Devices, local_devices
from tfpar.planning.mesh import Mesh
from tfpar.planning.schedule import Schedule
from tfpar.strategies.base import Placement, Strategy


class PipelineStrategy(Strategy):
    """Cuts the model into stages and each batch into micro-batches, which follow one another through the stages.

    Args:
        devices: names such as `"GPU:1"`, or how many; all GPUs, else all logical CPUs, if not given.
        micro_batches: more of them leave devices less idle, and make each product smaller.
        schedule: `"1f1b"` (little memory), `"gpipe"`, or a function `(stages, micro_batches) -> Schedule`.
        placement: `"auto"`, a list of layer names where a new stage begins, or a mapping layer name -> stage.

    Example:
        >>> strategy = tfpar.PipelineStrategy(micro_batches=8)  # doctest: +SKIP
        >>> with strategy.scope():  # doctest: +SKIP
        ...     model = build()
    """

    def __init__(
        self,
        devices: Devices = None,
        micro_batches: int = 8,
        schedule: str | Callable[[int, int], Schedule] = "1f1b",
        placement: Placement = "auto",
    ):
        names = local_devices(devices, type(self).__name__)
        super().__init__(Mesh(stage=len(names), devices=names), micro_batches, schedule, placement)
