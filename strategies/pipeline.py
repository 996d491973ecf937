"""Consecutive layers on consecutive devices, all of them busy."""

from collections.abc import Callable

from tfpar.comm.devices import Devices, local_devices
from tfpar.planning.mesh import Mesh
from tfpar.planning.schedule import Schedule
from tfpar.strategies.base import Placement, Strategy


class PipelineStrategy(Strategy):
    """Cuts the model into stages and each batch into micro-batches, which follow one another through the stages.

    BatchNormalization normalises each micro-batch with its own statistics, as in GPipe (Huang et al., section 2.2).

    Args:
        devices: names such as `"GPU:1"`, or how many; all GPUs, else all logical CPUs, if not given.
        micro_batches: into how many a batch is divided; one for each sample, if there are fewer. More of them leave
            devices less idle, about (stages - 1) / (micro_batches + stages - 1) of the time, and make each matrix
            product smaller.
        schedule: `"1f1b"` (least memory), `"eager-1f1b"` (faster on GPUs), `"gpipe"`, or a function
            `(devices, micro_batches) -> Schedule`.
        placement: the layers of each stage, see `LayerPlacementStrategy`.

    Raises:
        DeviceError: a device that does not exist, is of another host or repeats; no devices, or more than there are.
        ScheduleError: `micro_batches` is no whole number of at least 1, or `schedule` is not known; when the model is
            first used, a function that returns no schedule of these sizes.
        PartitionError: when the model is first used, fewer layers than stages, or a placement that does not fit it.
        ModelError: when it is first used, a model whose numbers for a batch do not follow from those of micro-batches:
            a layer mixes samples or keeps a state for each, an output has no batch dimension, a state or an added loss
            is no sum and no mean; or as for `LayerPlacementStrategy`.

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
