"""The devices, arranged along the axes on which work can be divided."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from itertools import product
from math import prod
from typing import NamedTuple

from tfpar.errors import DeviceError


class Coordinate(NamedTuple):
    """Where a device is in a mesh: a number along each axis, from 0. Not in the order of `Mesh`: name the axes.

    Args:
        data: the replica of the model; with `shard`, the group of replicas.
        stage: the stage, one of the model's consecutive parts.
        tensor: the rank, which has a shard of each divided weight.
        shard: which replica of its group it is, and so which shard of what ZeRO divides it has.

    Example:
        >>> Coordinate(stage=1)
        Coordinate(data=0, stage=1, tensor=0, shard=0)
    """

    data: int = 0
    stage: int = 0
    tensor: int = 0
    shard: int = 0

    @property
    def replica(self) -> "Coordinate":
        """The first of those that have the same samples: 0 along every axis that does not divide samples."""
        return FIRST._replace(**{axis: getattr(self, axis) for axis in dividing("samples")})

    @property
    def rank(self) -> "Coordinate":
        """The first of those that have the same part of the model: 0 along every axis that divides samples."""
        return self._replace(**dict.fromkeys(dividing("samples"), 0))


class Axis(NamedTuple):
    """An axis of a mesh.

    Args:
        divides: what of the work: `"samples"` of a batch, `"operations"` of the model, or `"weights"`, with what each
            operation does.
        member: what one along it is called.
    """

    divides: str
    member: str


AXES = {
    "data": Axis("samples", "replica"), "shard": Axis("samples", "shard"), "stage": Axis("operations", "stage"),
    "tensor": Axis("weights", "rank"),
}  # fmt: skip
FIRST = Coordinate()


@cache
def dividing(name: str) -> tuple[str, ...]:
    """The axes that divide `"samples"`, `"operations"` or `"weights"`; of the name of an axis, that axis."""
    return (name,) if name in AXES else tuple(axis for axis in AXES if AXES[axis].divides == name)


@dataclass(frozen=True)
class Mesh:
    """Devices in a grid `devices[data, shard, stage, tensor]`.

    Ranks exchange most and are neighbours in the list of devices, then stages, then replicas (Narayanan et al.,
    "Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM", section 3).

    Args:
        data: how many replicas of the model there are; each trains on its part of a batch.
        stage: how many stages, consecutive parts, the model is cut into.
        tensor: how many ranks divide the weights of each layer.
        devices: one name per coordinate, `tensor` counting fastest and `data` slowest; empty for a mesh that only has
            a shape.
        shard: how many replicas share one set of what ZeRO divides. There are `data` times `shard` replicas, in `data`
            groups, of which each has all of it (hybrid sharding; Zhao et al., "PyTorch FSDP", 2023, section 3.2.2).
            Without it, all replicas share one set.

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
    shard: int = field(default=1, kw_only=True)

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

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """The sizes of the axes: `data`, `shard`, `stage` and `tensor`."""
        return tuple(getattr(self, axis) for axis in AXES)

    @property
    def size(self) -> int:
        """The number of coordinates: data x shard x stage x tensor."""
        return prod(self.shape)

    @property
    def on_gpus(self) -> bool:
        """Whether the mesh names devices, all of them GPUs."""
        return bool(self.devices) and all("GPU" in device for device in self.devices)

    def device(self, at: Coordinate) -> str:
        """The name of the device at a coordinate of this mesh.

        Raises:
            IndexError: the mesh names no devices, or has no such coordinate.
        """
        if not all(0 <= getattr(at, axis) < size for axis, size in zip(AXES, self.shape, strict=True)):
            raise IndexError(f"{self} has no {at}")
        return self.devices[number_of(at, self.shape)]

    @cached_property
    def lane_shape(self) -> tuple[int, ...]:
        """The sizes of the axes, 1 for `stage`."""
        return tuple(1 if AXES[axis].divides == "operations" else getattr(self, axis) for axis in AXES)

    @cached_property
    def lanes(self) -> tuple[Coordinate, ...]:
        """The coordinate of each lane on stage 0: a lane is a rank of a replica, on all its stages."""
        return tuple(map(coordinate_of, product(*map(range, self.lane_shape))))

    @cached_property
    def replicas(self) -> tuple[Coordinate, ...]:
        """The first lane of each replica: every part of a batch once."""
        return tuple(lane for lane in self.lanes if lane == lane.replica)

    @cached_property
    def ranks(self) -> tuple[Coordinate, ...]:
        """The lanes of the first replica: every part of a layer's weights once."""
        return tuple(lane for lane in self.lanes if lane == lane.rank)

    def count(self, axis: str) -> int:
        """How many devices there are along an axis, or along all that divide `"samples"`, say."""
        return prod(getattr(self, each) for each in dividing(axis))

    def along(self, axis: str, at: Coordinate) -> tuple[Coordinate, ...]:
        """The coordinates that differ from `at` along an axis only, `at` itself among them.

        Args:
            axis: its name, or what several divide: `"samples"`, say.
        """
        axes = dividing(axis)
        places = product(*(range(getattr(self, each)) for each in axes))
        return tuple(at._replace(**dict(zip(axes, place, strict=True))) for place in places)

    def groups(self, axis: str) -> list[tuple[Coordinate, ...]]:
        """All lanes, in groups of those that differ along an axis only."""
        firsts = [lane for lane in self.lanes if not any(getattr(lane, each) for each in dividing(axis))]
        return [self.along(axis, first) for first in firsts]

    def on(self, devices: Sequence[str]) -> "Mesh":
        """A mesh of the same shape on these devices.

        Raises:
            DeviceError: as the constructor.
        """
        return replace(self, devices=tuple(devices))

    def __str__(self) -> str:
        return f"Mesh({', '.join(f'{a}={n}' for a, n in zip(AXES, self.shape, strict=True) if n > 1) or 'data=1'})"


def coordinate_of(places: Sequence[int]) -> Coordinate:
    """The coordinate with these places, in the order of `AXES`."""
    return Coordinate(**dict(zip(AXES, places, strict=True)))


def number_of(at: Coordinate, shape: Sequence[int]) -> int:
    """The place of a coordinate in a list of all of a grid, sizes in the order of `AXES`, the last counting fastest."""
    number = 0
    for size, axis in zip(shape, AXES, strict=True):
        number = number * size + getattr(at, axis)
    return number
