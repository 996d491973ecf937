"""Dividing a batch into micro-batches, and putting results together: the one place that does."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import tensorflow as tf
from keras import tree

from tfpar.compat._tf import unfolded
from tfpar.errors import BatchError
from tfpar.planning.sharding import bounds


class Parts(NamedTuple):
    """How a batch is divided: among replicas, and by each of them into micro-batches."""

    replicas: int
    micro_batches: int

    @property
    def count(self) -> int:
        """The parts in all; those of a replica follow one another."""
        return self.replicas * self.micro_batches

    def fit(self, rows: int) -> "Parts":
        """Fewer parts, where there are fewer rows."""
        replicas = max(1, min(self.replicas, rows))
        return Parts(replicas, max(1, min(self.micro_batches, rows // replicas)))


@dataclass(frozen=True)
class Batch:
    """The samples of a step, in one piece or in those that were sent to the replicas ahead of time.

    Args:
        pieces: structures of tensors.
        rows: the number of samples as Keras would know it while tracing; `None` where the data leaves it open.
        uniform: whether all arrays have as many rows.
    """

    pieces: tuple[Any, ...]
    rows: int | None = None
    uniform: bool = True

    @property
    def whole(self) -> Any:
        """All samples."""
        return tree.map_structure(lambda *values: concat(list(values)), *self.pieces)

    def parts(self, count: int) -> list[Any]:
        """The samples in so many parts."""
        return list(self.pieces) if len(self.pieces) == count else split(self.whole, count)


def tensor(value: Any) -> Any:
    """A leaf of a batch as a tensor; ragged and sparse ones stay what they are, those of replicas are put together."""
    if isinstance(value, tf.distribute.DistributedValues):
        return concat(list(value.values))
    return value if value is None or isinstance(value, tf.__internal__.CompositeTensor) else tf.convert_to_tensor(value)


def rows(batch: Any) -> int:
    """The number of samples in a structure of arrays: the rows of the first, of which others may have a multiple.

    Raises:
        BatchError: no arrays, no samples, or lengths that do not go together.
    """
    found = lengths(batch)
    for name, length in found.items():
        if length is None:
            raise BatchError(f"{name} has no batch dimension: every array of a batch needs one, as dimension 0")
    if not found:
        raise BatchError("the batch holds no arrays")
    if not min(found.values()):
        raise BatchError("the batch has no samples: an empty batch has no loss; drop it from the data")
    if max(found.values()) % min(found.values()):
        raise BatchError(f"the arrays of a batch must be equally long; received {found}")
    return next(iter(found.values()))


def lengths(batch: Any) -> dict[str, int | None]:
    """The rows of each array by its name; `None` for a scalar."""
    found = {}
    for path, leaf in tree.flatten_with_path(batch):
        if leaf is not None:
            known = leaf.shape[0] if leaf.shape.rank else None
            if leaf.shape.rank and known is None:
                known = int(tf.shape(leaf)[0])
            found["batch" + "".join(f"[{part!r}]" for part in path)] = known
    return found


def count(batch: Any) -> Any:
    """The number of samples: a whole number where it is known while tracing, else a tensor."""
    first = next(leaf for leaf in tree.flatten(batch) if leaf is not None)
    return first.shape[0] if first.shape[0] is not None else tf.shape(first)[0]


def shares(counts: list[Any]) -> list[tf.Tensor]:
    """The share of each part in the rows of all, as float64 scalars."""
    found = [rows / sum(counts) for rows in counts]
    return [share if isinstance(share, tf.Tensor) else unfolded(tf.constant(share, tf.float64)) for share in found]


def sliced(x: Any, start: Any, stop: Any) -> Any:
    """Some rows of a tensor."""
    if not isinstance(x, tf.SparseTensor):
        return None if x is None else x[start:stop]
    columns = tf.shape(x, out_type=tf.int64)[1:]
    start, stop = (tf.cast(bound, tf.int64) for bound in (start, stop))
    return tf.sparse.slice(x, tf.concat([[start], columns * 0], 0), tf.concat([[stop - start], columns], 0))


def split(batch: Any, parts: int) -> list[Any]:
    """A structure of tensors as `parts` structures of nearly equal numbers of rows; `None` stays `None`."""
    if parts == 1:
        return [batch]
    return [
        tree.map_structure(lambda x: sliced(x, start, stop), batch)  # noqa: B023
        for start, stop in pairwise(bounds(count(batch), parts))
    ]


def in_proportion(rows: Any, sizes: list[Any]) -> list[Any]:
    """So many rows as parts in proportion to these sizes, of whose sum they are a multiple."""
    return [n * rows // sum(sizes) for n in sizes]


def concat(values: list[Any]) -> Any:
    """The rows of the parts, in order; `None` for parts that are `None`."""
    if len(values) == 1 or values[0] is None:
        return values[0]
    return tf.sparse.concat(0, values) if isinstance(values[0], tf.SparseTensor) else tf.concat(values, axis=0)


def joined(edges: Sequence[Any]) -> Any:
    """The values, masks and logits of several parts as one."""
    return type(edges[0])(*(concat(list(parts)) for parts in zip(*edges, strict=True)))
