"""A copy of the model on each device."""

import tensorflow as tf

from tfpar.comm.devices import Devices, local_devices
from tfpar.planning.mesh import Mesh
from tfpar.strategies.base import Strategy


class DataParallelStrategy(Strategy):
    """Gives each device a copy of the model and its part of each batch; the numbers are those of one device.

    Only random numbers, as in Dropout, differ: each replica draws its own.

    Args:
        devices: names such as `"GPU:1"`, or how many; all GPUs, else all logical CPUs, if not given.
        batch_norm: `"global"`: BatchNormalization uses the mean and variance of the whole batch, as one device would,
            put together from those of its parts (Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm
            for Computing Sample Variances", 1979); `"local"`: each replica uses those of its own part, which saves two
            small exchanges for each layer.
        buckets: into how many segments the model is cut; the gradients of each are reduced as soon as they are there.
            If not given, 1, or 8 with `zero` 2 or 3.
        cross_device_ops: how gradients are added up, as for `tf.distribute.MirroredStrategy`; if not given, by NCCL
            where each device is a GPU of its own, else by copies.
        zero, offload: what replicas divide in place of each having all of it, see `MeshStrategy`.
        reduce_dtype: in which gradients are sent and added up, see `MeshStrategy`; their own, if not given.

    Raises:
        DeviceError: a device that does not exist, is of another host or repeats; no devices, or more than there are.
        ModelError: an unknown `batch_norm`, `zero`, `offload` or `reduce_dtype`, or `buckets` that is no whole number
            of at least 1.

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
        reduce_dtype: str | None = None,
    ):
        names = local_devices(devices, type(self).__name__)
        super().__init__(
            Mesh(data=len(names), devices=names), schedule="gpipe", batch_norm=batch_norm, buckets=buckets,
            cross_device_ops=cross_device_ops, zero=zero, offload=offload, reduce_dtype=reduce_dtype,
        )  # fmt: skip
