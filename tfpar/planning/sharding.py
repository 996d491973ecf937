"""How tensors and weights are divided over the axes of a mesh."""

# i: operation, t: tensor, v: variable, T: ranks

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from tfpar.planning.mesh import FIRST, Coordinate


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
    """What each lane of a mesh has of a variable.

    Args:
        layout: how ranks divide it.
        ranks: how many ranks there are.
        shards: how replicas divide what a rank has (ZeRO).

    Example:
        >>> Sharding(Layout(0), ranks=2, shards=Layout(1)).region((4, 6), Coordinate(data=1, tensor=1), replicas=2)
        ((2, 4), (3, 6))
    """

    layout: Layout = REPLICATED
    ranks: int = 1
    shards: Layout = REPLICATED

    @property
    def of_ranks(self) -> "Sharding":
        """The same for ranks alone: what a rank has in all its replicas."""
        return replace(self, shards=REPLICATED)

    @property
    def divides(self) -> bool:
        """Whether no lane has all of it."""
        return self.layout != REPLICATED or self.shards != REPLICATED

    def lanes(self, copies: int) -> list[Coordinate]:
        """The lane of each of so many copies or shards."""
        return [Coordinate(data=n // self.ranks, tensor=n % self.ranks) for n in range(copies)]

    def number(self, at: Coordinate) -> int:
        """The index of a lane's copy or shard."""
        return at.data * self.ranks + at.tensor

    def region(self, shape: Sequence[int], at: Coordinate, replicas: int) -> tuple[tuple[int, int], ...]:
        """Where the shard of a lane begins and ends in a variable of this shape: `(start, stop)` for each dim."""
        region = [(0, n) for n in shape]
        for layout, part, parts in ((self.layout, at.tensor, self.ranks), (self.shards, at.data, replicas)):
            if layout.dim is not None:
                start, stop = region[layout.dim]
                edges = bounds(stop - start, parts)
                region[layout.dim] = start + edges[part], start + edges[part + 1]
        return tuple(region)

    def shape(self, shape: Sequence[int], at: Coordinate = FIRST, replicas: int = 1) -> tuple[int, ...]:
        """The shape of the shard of a lane, for a variable of this shape."""
        return tuple(stop - start for start, stop in self.region(shape, at, replicas))


UNSHARDED = Sharding()


def sharded(shape: Sequence[int], sharding: Sharding, replicas: int) -> Sharding:
    """The same, with what a rank has divided between replicas along its longest dim, if each gets an element."""
    part = sharding.of_ranks.shape(shape)
    dim = max(range(len(part)), key=lambda d: part[d], default=None)
    if replicas == 1 or dim is None or part[dim] < replicas:
        return sharding
    return replace(sharding, shards=Layout(dim))
