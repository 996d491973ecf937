"""Replicas of stages of divided layers."""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from tfpar.comm.devices import local_devices
from tfpar.errors import DeviceError
from tfpar.planning.mesh import Mesh
from tfpar.planning.schedule import Schedule
from tfpar.strategies.base import Placement, Strategy


class MeshStrategy(Strategy):
    """Divides the batch, the layers and the weights of each layer at once: data x stage x tensor parallelism.

    The other strategies are meshes of one axis. Ranks of `tensor`, which exchange most, are neighbouring devices, then
    those of `stage`, then those of `data`.

    Args:
        mesh: the size of each axis; its devices are the first GPUs, else logical CPUs, if it names none.
        micro_batches: into how many parts each replica divides its share of a batch, which follow one another through
            its stages.
        schedule: `"1f1b"` (little memory), `"gpipe"`, or a function `(stages, micro_batches) -> Schedule`.
        placement: `"auto"`, a list of layer names where a new stage begins, or a mapping layer name -> stage.
        layout: how ranks divide weights, see `TensorParallelStrategy`.
        sequence_parallel: whether what lies between divided layers is divided along the sequence.
        zero: what replicas divide between them, in place of each having all of it: 1 the optimizer's slots, 2 gradients
            too, 3 weights too, which are gathered for each segment of the model just before it runs (Rajbhandari et
            al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models").
        offload: `"optimizer"` keeps slots in host memory, where they are updated (Ren et al., "ZeRO-Offload"); replicas
            divide them then.
        batch_norm: `"global"`: replicas normalise with the statistics of all; `"local"`: with their own.
        buckets: into how many segments the model is cut for exchanges with other replicas: gradients are reduced as
            soon as those of a segment are there, weights are gathered segment by segment. 1, with `zero` from 2 on 8,
            if not given.
        cross_device_ops: how tensors are added up, as for `tf.distribute.MirroredStrategy`.

    Raises:
        DeviceError: fewer devices than the mesh has places.

    Example:
        >>> strategy = tfpar.MeshStrategy(tfpar.Mesh(data=2, stage=2, tensor=2), micro_batches=8)  # doctest: +SKIP
        >>> with strategy.scope():  # doctest: +SKIP
        ...     model = build()
    """

    def __init__(
        self,
        mesh: Mesh = None,
        micro_batches: int = 1,
        schedule: str | Callable[[int, int], Schedule] = "1f1b",
        placement: Placement = "auto",
        layout: Any = "auto",
        sequence_parallel: bool = False,
        zero: int = 0,
        offload: str | None = None,
        batch_norm: str = "global",
        buckets: int | None = None,
        cross_device_ops: tf.distribute.CrossDeviceOps | None = None,
        **axes: int,
    ):
        if not isinstance(mesh, Mesh):
            sizes = ", ".join(f"{axis}={size}" for axis, size in axes.items()) or "data=2, tensor=2"
            given = "" if mesh is None else f"; received {mesh!r}"
            raise DeviceError(f"the sizes of the axes belong to a Mesh: MeshStrategy(Mesh({sizes})){given}")
        if axes:
            raise TypeError(f"MeshStrategy has no argument {', '.join(axes)}")
        names = local_devices(mesh.devices or (1 if mesh.size == 1 else None), type(self).__name__)
        if len(names) < mesh.size:
            raise DeviceError(f"{mesh} has {mesh.size} places; there are {len(names)} devices: {', '.join(names)}")
        super().__init__(
            mesh.on(names[: mesh.size]), micro_batches, schedule, placement, batch_norm, buckets, cross_device_ops,
            layout, sequence_parallel, zero, offload,
        )  # fmt: skip
