"""The edge from a weight to the programs that read it: what devices exchange of its value, and of its gradient."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

from tfpar.comm.collectives import all_reduce_gradients, reduce_scatter_gradient
from tfpar.comm.gradients import cast
from tfpar.compat import _keras
from tfpar.engine.engine import Engine, device_of
from tfpar.planning.mesh import AXES, Coordinate, dividing
from tfpar.planning.sharding import UNSHARDED, Sharding
from tfpar.variables.logical import LogicalVariable


@dataclass(frozen=True)
class WeightEdge:
    """What devices along each axis exchange of a weight, by the names of `comm.collectives.EXCHANGES`.

    | | forward | backward |
    |---|---|---|
    | data parallelism | identity | all-reduce |
    | ZeRO 1 and 2 | identity | reduce-scatter |
    | ZeRO 3 | all-gather | reduce-scatter |
    | ranks that find parts of the sum | identity | all-reduce |

    Sums over micro-batches and exchanges are both linear, so that it is up to the caller which comes first.

    Args:
        variable: the weight.
        is_partial: whether ranks have copies of it, and find parts of its gradient.
        in_parts: whether each device updates its shard alone; else all need the whole gradient.
        reduce_dtype: in which gradients are exchanged, if not in their own.
    """

    variable: keras.Variable
    is_partial: bool
    in_parts: bool
    reduce_dtype: str | None = None

    @property
    def sharding(self) -> Sharding:
        """How the gradient is divided afterwards."""
        value = _keras.stored(self.variable)
        if not isinstance(value, LogicalVariable):
            return UNSHARDED
        return value.slot_sharding if self.in_parts else value.sharding.along(*dividing("weights"))

    def forward(self, axis: str) -> str:
        """What is exchanged of the value: replicas have shards of it in ZeRO 3 only."""
        sharding = getattr(_keras.stored(self.variable), "sharding", UNSHARDED)
        return "all-gather" if axis in sharding.dims and AXES[axis].divides == "samples" else "identity"

    @property
    def scattered(self) -> str | None:
        """The axis along which the gradient is divided as soon as it is there; `None` if it is not."""
        return next((axis for axis in AXES if self.backward(axis) == "reduce-scatter"), None)

    def backward(self, axis: str) -> str:
        """What is exchanged of the gradient: replicas have those of their own samples."""
        if AXES[axis].divides == "samples":
            return "reduce-scatter" if axis in self.sharding.dims else "all-reduce"
        return "all-reduce" if self.is_partial else "identity"


def edge_of(engine: Engine, v: int, in_parts: bool) -> WeightEdge:
    """The edge of a variable of the graph."""
    return WeightEdge(engine.graph.variables[v], v in engine.partial, in_parts, engine.reduce_dtype)


def exchange(
    edges: Sequence[WeightEdge], axis: str, lanes: Sequence[Coordinate], gradients: Sequence[Sequence[Any]], ops: Any
) -> list[list[Any]]:
    """What lanes along an axis have of weights' gradients after the exchange; what is summed, is summed together.

    Args:
        gradients: for each weight, what each lane has: dense, sparse, or `None`.
        ops: as for `all_reduce_gradients`.
    """
    kinds = [edge.backward(axis) for edge in edges]
    devices = [[device_of(edge.variable, lane) for lane in lanes] for edge in edges]
    rows = zip(gradients, edges, devices, strict=True)
    found = [
        [in_dtype(x, edge.reduce_dtype, *at) for x, *at in zip(parts, on, strict=True)] for parts, edge, on in rows
    ]
    summed = [n for n, kind in enumerate(kinds) if kind == "all-reduce"]
    if summed:
        sums = all_reduce_gradients([found[n] for n in summed], devices[summed[0]], ops)
        for n, parts in zip(summed, sums, strict=True):
            found[n] = parts
    for n in (n for n, kind in enumerate(kinds) if kind == "reduce-scatter"):
        sharding, shape = edges[n].sharding, tuple(edges[n].variable.shape)
        of_rank = sharding.along(*(a for a in AXES if a != axis)).shape(shape, lanes[0])
        found[n] = reduce_scatter_gradient(found[n], devices[n], sharding.dims[axis], of_rank)
    rows = zip(found, edges, devices, strict=True)
    return [
        [in_dtype(x, edge.reduce_dtype and edge.variable.dtype, *at) for x, *at in zip(parts, on, strict=True)]
        for parts, edge, on in rows
    ]


def in_dtype(gradient: Any, dtype: str | None, device: str) -> Any:
    """A gradient in another dtype, if one is given, on its device."""
    if gradient is None or dtype is None:
        return gradient
    with tf.device(device):
        return cast(gradient, dtype)
