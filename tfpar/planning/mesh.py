"""The devices, arranged along the three axes on which work can be divided."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

from tfpar.errors import DeviceError


class Coordinate(NamedTuple):
    """Where a device is in a mesh.

    Args:
        data: which replica of the model, from 0.
        stage: which of its consecutive parts.
        tensor: which piece of a layer.

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
    """Devices arranged as `devices[data, stage, tensor]`.

    `data` counts replicas of the model, `stage` its consecutive parts, `tensor` the pieces of a layer. Neighbours
    along `tensor` are the closest devices, then those along `stage`, then those along `data`.

    Args:
        data, stage, tensor: the size of each axis, at least 1.
        devices: one name per coordinate, in that order; empty for a mesh that only has a shape.

    Raises:
        DeviceError: a size below 1, a device that repeats, or not as many devices as coordinates.

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
        """How many devices the mesh has."""
        return self.data * self.stage * self.tensor

    @property
    def on_gpus(self) -> bool:
        """Whether there are devices, and all of them are GPUs."""
        return bool(self.devices) and all("GPU" in device for device in self.devices)

    def device(self, at: Coordinate) -> str:
        """The name of the device at a coordinate."""
        return self.devices[(at.data * self.stage + at.stage) * self.tensor + at.tensor]

    @property
    def lanes(self) -> tuple[Coordinate, ...]:
        """Each rank of each replica, on the first stage; the other stages of a lane differ in that alone."""
        return tuple(Coordinate(data=r, tensor=k) for r, k in product(range(self.data), range(self.tensor)))

    def along(self, axis: str, at: Coordinate) -> tuple[Coordinate, ...]:
        """The coordinates that differ from this one along an axis only, itself among them."""
        return tuple(at._replace(**{axis: n}) for n in range(getattr(self, axis)))

    def on(self, devices: Sequence[str]) -> "Mesh":
        """The same shape on these devices."""
        return Mesh(*self.shape, devices=tuple(devices))

    def __str__(self) -> str:
        return f"Mesh({', '.join(f'{a}={n}' for a, n in zip(AXES, self.shape, strict=True) if n > 1) or 'data=1'})"
