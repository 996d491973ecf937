"""The devices that a user means."""

import os
import warnings
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from tfpar.errors import DeviceError, user_level


def each_gpu_is_one_device() -> bool:
    """Whether no GPU that this process sees is split into several devices, as NCCL demands."""
    return len(tf.config.get_visible_devices("GPU")) == len(tf.config.list_logical_devices("GPU"))


def inter_op_threads() -> int:
    """How many operations TensorFlow runs at once on the host, programs of GPUs among them."""
    asked = tf.config.threading.get_inter_op_parallelism_threads() or int(os.environ.get("TF_NUM_INTEROP_THREADS", 0))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return asked or cores


def largest_fused_head(devices: Sequence[str]) -> int:
    """The largest attention head that cuDNN's fused kernels take on these devices; 0 if they have none.

    Source:
        The support matrix of cuDNN's scaled dot-product attention.
    """
    if not all("GPU" in device for device in devices):
        return 0
    details = map(tf.config.experimental.get_device_details, tf.config.get_visible_devices("GPU"))
    capability = min((d.get("compute_capability", (0, 0)) for d in details), default=(0, 0))
    return 256 if capability >= (9, 0) else 128 if capability >= (8, 0) else 0


Devices = Sequence[Any] | str | int | None


def local_devices(devices: Devices, name: str) -> tuple[str, ...]:
    """The devices asked for, or all GPUs, or else all logical CPUs; warns if that is one.

    Args:
        devices: names or `tf.config.LogicalDevice`s, one of these, or how many of the GPUs or CPUs.
        name: of the strategy.

    Raises:
        DeviceError: what no device is; the message lists those there are.
    """
    known = [d.name.removeprefix("/device:") for d in tf.config.list_logical_devices()]
    every = [d for d in known if d.startswith("GPU")] or [d for d in known if d.startswith("CPU")]
    if devices is None and len(every) == 1:
        warnings.warn(
            f"{name} found one device, {every[0]}, so nothing is divided. To try it on a machine without GPUs, call "
            "tfpar.testing.logical_cpus(4) before TensorFlow starts",
            stacklevel=user_level(),
        )
    if devices is None:
        return tuple(every)
    if isinstance(devices, int) and not isinstance(devices, bool):
        if not 1 <= devices <= len(every):
            raise DeviceError(f"there are {len(every)} devices, {', '.join(every)}; {devices} were asked for")
        return tuple(every[:devices])
    single = isinstance(devices, str) or hasattr(devices, "name") or not isinstance(devices, Sequence)
    asked = [devices] if single else devices
    return tuple(local_device(device, known) for device in asked)


def local_device(device: Any, known: Sequence[str]) -> str:
    """The short name of a device.

    Raises:
        DeviceError: there is none such on this host.
    """
    name = getattr(device, "name", device)
    if not isinstance(name, str):
        raise DeviceError(
            f"devices are names such as {known[0]!r}, tf.config.LogicalDevice objects, or how many there are to be; "
            f"received {device!r}"
        )
    try:
        spec = tf.DeviceSpec.from_string(name if "/" in name or ":" not in name else f"/device:{name}")
    except ValueError:
        spec = tf.DeviceSpec()
    if spec.job not in (None, "localhost") or spec.task or spec.replica:
        raise DeviceError(f"{name!r} is on another host; a strategy's devices are on this one: {', '.join(known)}")
    short = f"{spec.device_type}:{spec.device_index or 0}"
    if short not in known:
        raise DeviceError(f"there is no device {name!r}; there are {', '.join(known)}")
    return short
