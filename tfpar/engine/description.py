"""What a strategy says of itself to what runs it."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import tensorflow as tf

from tfpar.engine.micro_batch import Parts
from tfpar.planning.mesh import Mesh
from tfpar.planning.schedule import Schedule


class Description(Protocol):
    """A strategy as engine and trainer see it; `tfpar.strategies.base.Strategy` explains each."""

    mesh: Mesh
    parts: Parts
    placement: str | Sequence[str] | Mapping[str, int]
    layout: Any
    sequence_parallel: bool
    batch_norm: str
    buckets: int
    zero: int
    offload: str | None
    collectives: str
    reduce_dtype: str | None
    cross_device_ops: tf.distribute.CrossDeviceOps | None
    extended: Any  # its side of `tf.distribute`: `tfpar.variables.distribute.Extended`

    def schedule(self, micro_batches: int) -> Schedule:
        """The order of the actions of each stage."""

    def planning(self) -> AbstractContextManager:
        """Its scope, entered from anywhere."""
