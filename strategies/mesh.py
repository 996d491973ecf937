"""Data, pipeline and tensor parallelism at once."""

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

    The other strategies are meshes of one axis.

    Args:
        mesh: the size of each axis; its devices are the first GPUs, else logical CPUs, if it names none.
        micro_batches: into how many micro-batches each replica divides its part of a batch; one for each sample, if
            there are fewer. They follow one another through its stages.
        schedule: `"1f1b"` (least memory), `"eager-1f1b"` (faster on GPUs), `"gpipe"`, or a function
            `(devices, micro_batches) -> Schedule`, where `devices` is the size of the axis `stage`.
        placement: the layers of each stage, see `LayerPlacementStrategy`.
        layout, sequence_parallel: how ranks divide weights and activations, see `TensorParallelStrategy`.
        zero: what replicas divide between them, in place of each having all of it: 1 the optimizer's slots, 2 gradients
            too, 3 weights too, which are gathered for each segment of the model just before it runs (Rajbhandari et
            al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", section 5). With one replica
            it divides nothing, and a warning says so.
        offload: `"optimizer"` keeps slots in host memory, where they are updated (Ren et al., "ZeRO-Offload:
            Democratizing Billion-Scale Model Training"); several replicas divide them, as with `zero=1`.
        batch_norm: `"global"`: replicas normalise with the statistics of all; `"local"`: with their own. See
            `DataParallelStrategy`.
        buckets: into how many segments the model is cut for exchanges between replicas: the gradients of a segment are
            reduced as soon as they are there, its weights gathered before it runs. If not given, 1, or 8 with `zero` 2
            or 3.
        cross_device_ops: how tensors of replicas and ranks are added up, as for `tf.distribute.MirroredStrategy`; if
            not given, by NCCL if there are several replicas and each device is a GPU of its own, else by copies.
        collectives: where devices exchange tensors in training: `"inside"` the programs, where each device has one (no
            pipeline; with tensor parallelism two micro-batches may take turns in it); `"between"` programs, which end
            there; `"auto"`: inside where XLA compiles them and each device is a GPU of its own. The numbers are the
            same. `explain` says why programs end where they could go on.
        reduce_dtype: in which gradients of weights are sent and added up, `"bfloat16"` for instance, in place of their
            own. That halves what replicas exchange of float32 gradients and changes them: a sum over replicas then has
            8 bits, a relative error of up to 0.4 % in each; weights, slots and the update keep theirs. Loops and
            training steps of your own exchange gradients as they are.

    Raises:
        DeviceError: `mesh` is no `Mesh`, has a device that does not exist, is of another host or repeats, or is larger
            than there are devices.
        TypeError: an unknown argument.
        ScheduleError, PartitionError, LayoutError: as for `PipelineStrategy` and `TensorParallelStrategy`.
        ModelError: an unknown `batch_norm`, `zero`, `offload`, `collectives` or `reduce_dtype`, or `buckets` that is no
            whole number of at least 1; when the model is first used, as for `PipelineStrategy`.

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
        collectives: str = "auto",
        reduce_dtype: str | None = None,
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
            layout, sequence_parallel, zero, offload, collectives, reduce_dtype,
        )  # fmt: skip
