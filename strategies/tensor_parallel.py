"""Every weight divided between devices."""

from typing import Any

import tensorflow as tf

from tfpar.comm.devices import Devices, local_devices
from tfpar.planning.mesh import Mesh
from tfpar.strategies.base import Strategy


class TensorParallelStrategy(Strategy):
    """Divides the weights of each layer, and the work with them, between devices that all see the whole batch.

    The layout is found by itself: matrices by columns, then by rows, attention by heads, embeddings by the vocabulary,
    so that a transformer block costs two all-reduces forward and two backward (Shoeybi et al., "Megatron-LM: Training
    Multi-Billion Parameter Language Models Using Model Parallelism", section 3). What no rule divides is computed on
    every device; `tfpar.rules` takes more rules.

    Args:
        devices: names such as `"GPU:1"`, or how many; all GPUs, else all logical CPUs, if not given.
        layout: `"auto"`, a `keras.distribution.LayoutMap`, or a mapping from regular expressions over the paths of
            weights to a tuple with an entry for each dim, `"tensor"` for the one that is divided, else `None`.
        sequence_parallel: whether what lies between divided layers, normalisation and dropout for instance, is divided
            along dim 1, the sequence, which saves memory at no cost in bytes exchanged (Korthikanti et al., "Reducing
            Activation Recomputation in Large Transformer Models", section 4.2.2).
        cross_device_ops: how tensors are added up, as for `tf.distribute.MirroredStrategy`; by copies, if not given,
            and bfloat16 always, which TensorFlow's NCCL kernels do not add up.

    Raises:
        DeviceError: a device that does not exist, is of another host or repeats; no devices, or more than there are.
        LayoutError: when the model is first used, a layout that does not fit it.

    Example:
        >>> strategy = tfpar.TensorParallelStrategy()  # doctest: +SKIP
        >>> with strategy.scope():  # doctest: +SKIP
        ...     model = build()
    """

    def __init__(
        self,
        devices: Devices = None,
        layout: Any = "auto",
        sequence_parallel: bool = False,
        cross_device_ops: tf.distribute.CrossDeviceOps | None = None,
    ):
        names = local_devices(devices, type(self).__name__)
        super().__init__(
            Mesh(tensor=len(names), devices=names), schedule="gpipe", layout=layout,
            sequence_parallel=sequence_parallel, cross_device_ops=cross_device_ops,
        )  # fmt: skip
