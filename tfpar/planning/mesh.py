"""The devices, arranged along the three axes on which work can be divided."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

from tfpar.errors import DeviceError


class Coordinate(NamedTuple):
    """Where a device is in a mesh: three numbers, each from 0.

    Args:
        data: the replica of the model.
        stage: the stage, one of the model's consecutive parts.
        tensor: the rank, which has a shard of each divided weight.

    Example:
        >>> Coordinate(stage=1)
        Coordinate(data=0, stage=1, tensor=0)
    """

    data: int = 0
    stage: int = 0
    tensor: int = 0


AXES = Coordinate._fields
FIRST = Coordinate()


@dataclass(frozen=True)
class Mesh:
    """Devices in a grid `devices[data, stage, tensor]`.

    Ranks exchange most and are neighbours in the list of devices, then stages, then replicas (Narayanan et al.,
    "Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM", section 3).

    Args:
        data: how many replicas of the model there are; each trains on its part of a batch.
        stage: how many stages, consecutive parts, the model is cut into.
        tensor: how many ranks divide the weights of each layer.
        devices: one name per coordinate, `tensor` counting fastest and `data` slowest; empty for a mesh that only has
            a shape.

    Raises:
        DeviceError: a size that is no whole number of at least 1, a device that repeats, or not as many devices as
            coordinates.

    Example:
        >>> mesh = Mesh(data=2, stage=2, devices=("GPU:0", "GPU:1", "GPU:2", "GPU:3"))
        >>> mesh.device(Coordinate(data=1, stage=0))
        'GPU:2'
    """

    data: int = 1
    stage: int = 1
    tensor: int = 1
    devices: tuple[str, ...] = ()

    def __post_init__(self):
        for axis, size in zip(AXES, self.shape, strict=True):
            if not isinstance(size, int) or size < 1:
                raise DeviceError(f"a mesh axis has a whole size of at least 1; received {axis}={size!r}")
        repeated = sorted({d for d in self.devices if self.devices.count(d) > 1})
        if repeated:
            raise DeviceError(
                f"each device has one place in a mesh; {', '.join(repeated)} repeats in {list(self.devices)}"
            )
        if self.devices and len(self.devices) != self.size:
            raise DeviceError(f"{self} has {self.size} places, but {len(self.devices)} devices were given")

    @property
    def shape(self) -> tuple[int, int, int]:
        """The sizes of `data`, `stage` and `tensor`."""
        return self.data, self.stage, self.tensor

    @property
    def size(self) -> int:
        """The number of coordinates: data x stage x tensor."""
        return self.data * self.stage * self.tensor

    @property
    def on_gpus(self) -> bool:
        """Whether the mesh names devices, all of them GPUs."""
        return bool(self.devices) and all("GPU" in device for device in self.devices)

    def device(self, at: Coordinate) -> str:
        """The name of the device at a coordinate of this mesh.

        Raises:
            IndexError: the mesh names no devices.
        """
        return self.devices[(at.data * self.stage + at.stage) * self.tensor + at.tensor]

    @property
    def lanes(self) -> tuple[Coordinate, ...]:
        """The coordinate of each lane on stage 0: a lane is a rank of a replica, on all its stages."""
        return tuple(Coordinate(data=r, tensor=k) for r, k in product(range(self.data), range(self.tensor)))

    def along(self, axis: str, at: Coordinate) -> tuple[Coordinate, ...]:
        """The coordinates that differ from `at` along an axis only, `at` itself among them.

        Args:
            axis: `"data"`, `"stage"` or `"tensor"`.
        """
        return tuple(at._replace(**{axis: n}) for n in range(getattr(self, axis)))

    def on(self, devices: Sequence[str]) -> "Mesh":
        """A mesh of the same shape on these devices.

        Raises:
            DeviceError: as the constructor.
        """
        return Mesh(*self.shape, devices=tuple(devices))

    def __str__(self) -> str:
        return f"Mesh({', '.join(f'{a}={n}' for a, n in zip(AXES, self.shape, strict=True) if n > 1) or 'data=1'})"
