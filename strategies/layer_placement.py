"""Consecutive layers on consecutive devices."""

from tfpar.comm.devices import Devices, local_devices
from tfpar.planning.mesh import Mesh
from tfpar.strategies.base import Placement, Strategy


class LayerPlacementStrategy(Strategy):
    """Puts consecutive layers on consecutive devices: for a model that does not fit one of them.

    One device works at a time; the numbers are those of one device, whatever the model does with its batch. For speed
    see `PipelineStrategy`.

    Args:
        devices: names such as `"GPU:1"`, or how many; all GPUs, else all logical CPUs, if not given.
        placement: the layers of each stage. `"auto"`: consecutive ones, so that the slowest stage is as fast as
            possible; a list of layer names, at each of which a new stage begins; or a mapping layer name -> stage from
            0, in which a layer that is not named goes to the latest stage of its inputs.

    Raises:
        DeviceError: a device that does not exist, is of another host or repeats; no devices, or more than there are.
        PartitionError: when the model is first used, fewer layers than devices, or a placement that does not fit it.
        ModelError: when it is first used, a subclassed model whose `call` cannot be followed, as it is more than Keras
            layers and `keras.ops`.

    Example:
        >>> strategy = tfpar.LayerPlacementStrategy(placement=["block_6"])  # doctest: +SKIP
        >>> with strategy.scope():  # doctest: +SKIP
        ...     model = build()
    """

    def __init__(self, devices: Devices = None, placement: Placement = "auto"):
        names = local_devices(devices, type(self).__name__)
        super().__init__(Mesh(stage=len(names), devices=names), schedule="gpipe", placement=placement)
