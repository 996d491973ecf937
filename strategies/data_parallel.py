"""A copy of the model on each device."""

import tensorflow as tf

from tfpar.comm.devices import Devices, local_devices
from tfpar.planning.mesh import Mesh
from tfpar.strategies.base import Strategy


class DataParallelStrategy(Strategy):
    """Gives each device a copy of the model and its part of each batch; the numbers are those of one device.

    Args:
        devices: names such as `"GPU:1"`, or how many; all GPUs, else all logical CPUs, if not given.
        batch_norm: `"global"`: BatchNormalization uses the statistics of the whole batch, as one device would;
            `"local"`: each replica those of its own part, which saves two small exchanges for each layer.
        buckets: into how many parts the gradients are divided, each reduced as soon as it is there.
        cross_device_ops: how gradients are added up, as for `tf.distribute.MirroredStrategy`; NCCL on physical GPUs,
            else copies, if not given.
        zero, offload: what replicas divide in place of each having all of it, see `MeshStrategy`.

    Example:
        >>> strategy = tfpar.DataParallelStrategy()  # doctest: +SKIP
        >>> with strategy.scope():  # doctest: +SKIP
        ...     model = build()
    """

    def __init__(
        self,
        devices: Devices = None,
        batch_norm: str = "global",
        buckets: int | None = None,
        cross_device_ops: tf.distribute.CrossDeviceOps | None = None,
        zero: int = 0,
        offload: str | None = None,
    ):
        names = local_devices(devices, type(self).__name__)
        super().__init__(
            Mesh(data=len(names), devices=names), schedule="gpipe", batch_norm=batch_norm, buckets=buckets,
            cross_device_ops=cross_device_ops, zero=zero, offload=offload,
        )  # fmt: skip
