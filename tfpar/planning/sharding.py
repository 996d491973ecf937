"""How tensors and weights are divided over the axes of a mesh."""

# i: operation, t: tensor, v: variable, T: ranks

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from tfpar.planning.mesh import AXES, FIRST, Coordinate, Mesh, coordinate_of, dividing, number_of


def bounds(count: Any, parts: int) -> list[Any]:
    """Where `parts` nearly equal parts of `count` elements begin, and where the last ends; `count` may be a tensor.

    Example:
        >>> bounds(10, 4)
        [0, 2, 5, 7, 10]
    """
    return [count * part // parts for part in range(parts + 1)]


def part_of(value: Any, dim: int, start: Any, stop: Any) -> Any:
    """A part of a tensor along one dim."""
    return value[(slice(None),) * dim + (slice(start, stop),)]


class Layout(NamedTuple):
    """Whether every rank has all of a tensor (it is replicated), or a part along one dim.

    Args:
        dim: the dim along which ranks divide it, from 0; `None` for a replicated tensor.

    Example:
        >>> str(Layout(1)), str(Layout())
        ('split along dim 1', 'replicated')
    """

    dim: int | None = None

    def __str__(self) -> str:
        return "replicated" if self.dim is None else f"split along dim {self.dim}"


REPLICATED = Layout()


@dataclass(frozen=True)
class Sharding:
    """Along which dim each axis of a mesh divides a variable, its gradient, or a slot of an optimizer.

    Args:
        dims: for each axis that divides it, the dim: `{"tensor": 0}`, or `{"data": 1}` for ZeRO.
        mesh: how many each axis has; every lane has a copy, or its part.

    Example:
        >>> Sharding({"tensor": 0, "data": 1}, Mesh(data=2, tensor=2)).region((4, 6), Coordinate(data=1, tensor=1))
        ((2, 4), (3, 6))
    """

    dims: Mapping[str, int] = field(default_factory=dict)
    mesh: Mesh = field(default_factory=Mesh)

    @property
    def divides(self) -> bool:
        """Whether no lane has all of it."""
        return bool(self.dims)

    def along(self, *axes: str) -> "Sharding":
        """How these axes divide it, the parts of others together."""
        return replace(self, dims={axis: dim for axis, dim in self.dims.items() if axis in axes})

    def layout(self, axis: str) -> Layout:
        """How one axis divides it."""
        return Layout(self.dims.get(axis))

    def lanes(self, copies: int) -> list[Coordinate]:
        """Whose each of so many copies or parts is."""
        (_, *sizes), found = self.mesh.lane_shape, []
        for number in range(copies):
            at = []
            for size in reversed(sizes):
                number, place = divmod(number, size)
                at.append(place)
            found.append(coordinate_of([number, *reversed(at)]))
        return found

    def replica(self, number: int, copies: int) -> Coordinate:
        """The first lane of a replica, of those that so many copies or parts are of."""
        return FIRST if copies == 1 else [lane for lane in self.lanes(copies) if lane == lane.replica][number]

    def group(self, at: Coordinate) -> tuple[Coordinate, ...]:
        """The lanes whose shards make up what the rank of a lane has."""
        axis = next((axis for axis in dividing("samples") if axis in self.dims), None)
        return (at,) if axis is None else self.mesh.along(axis, at)

    def number(self, at: Coordinate) -> int:
        """Which of the copies or parts is that of a lane."""
        return number_of(at, self.mesh.lane_shape)

    def region(self, shape: Sequence[int], at: Coordinate) -> tuple[tuple[int, int], ...]:
        """Where the part of a lane begins and ends, along each dim; replicas divide what a rank has."""
        region = [(0, n) for n in shape]
        for axis in filter(self.dims.__contains__, reversed(AXES)):
            start, stop = region[self.dims[axis]]
            edges, part = bounds(stop - start, getattr(self.mesh, axis)), getattr(at, axis)
            region[self.dims[axis]] = start + edges[part], start + edges[part + 1]
        return tuple(region)

    def shape(self, shape: Sequence[int], at: Coordinate = FIRST) -> tuple[int, ...]:
        """The shape of what a lane has."""
        return tuple(stop - start for start, stop in self.region(shape, at))

    def joined(self, parts: Mapping[Coordinate, Any], concat: Callable[[list, int], Any], *axes: str) -> Any:
        """What lanes have, put together along these axes; of copies, the first.

        Args:
            parts: of each lane that differs from the first along these axes only.
            concat: `(parts, dim) -> whole`.
        """
        for axis in filter(axes.__contains__, AXES):  # replicas first: they divide what a rank has
            rows: dict[Coordinate, list] = {}
            for at, part in parts.items():
                rows.setdefault(at._replace(**{axis: 0}), []).append(part)
            dim = self.dims.get(axis)
            parts = {at: row[0] if dim is None or len(row) == 1 else concat(row, dim) for at, row in rows.items()}
        (whole,) = parts.values()
        return whole


UNSHARDED = Sharding()


def sharded(shape: Sequence[int], sharding: Sharding) -> Sharding:
    """The same, what a rank has divided between the replicas of a group too: along its first dim with equal parts.

    What has none stays whole. A group is along the last axis that divides samples.
    """
    mesh = sharding.mesh
    axis = next((axis for axis in reversed(dividing("samples")) if mesh.count(axis) > 1), None)
    if axis is None:
        return sharding
    of_ranks = [sharding.shape(shape, rank) for rank in mesh.ranks]
    equal = [d for d, _ in enumerate(shape) if all(part[d] and part[d] % mesh.count(axis) == 0 for part in of_ranks)]
    return replace(sharding, dims={**sharding.dims, axis: equal[0]}) if equal else sharding
