"""Batches on their way to the replicas before they are needed."""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from tfpar.compat._tf import OwnedMultiDeviceIterator
from tfpar.engine import micro_batch
from tfpar.variables.parts import HOST


class Feed:
    """A dataset whose next batch goes to the devices of the replicas, divided, while the present one is computed.

    The dataset is read once, whatever the number of replicas. Batches of int32 and int64 alone, such as
    tokens, stay with the host: they are small, and TensorFlow would fetch them back from a GPU, and wait, in each step.

    Args:
        dataset: of batches.
        devices: of the replicas.
    """

    def __init__(self, dataset: tf.data.Dataset, devices: Sequence[str]):
        whole_numbers = all(spec.dtype in (tf.int32, tf.int64) for spec in tf.nest.flatten(dataset.element_spec))
        self.devices = [HOST] * len(devices) if whole_numbers else list(devices)
        self.element_spec = dataset.element_spec
        self.pieces = dataset.flat_map(self.divided)

    def divided(self, *data: Any) -> tf.data.Dataset:
        """The pieces of a batch, one for each replica; the last ones are empty where there are too few rows."""
        first = tf.shape(tf.nest.flatten(data)[0], tf.int64)[0]
        used = tf.minimum(first, len(self.devices))

        def piece(number):
            def sliced(x):
                rows = tf.shape(x, tf.int64)[0]
                start, stop = (tf.minimum(n, used) * rows // tf.maximum(used, 1) for n in (number, number + 1))
                return x[start:stop]

            pieces = tf.nest.map_structure(sliced, data)
            return pieces if len(data) > 1 else pieces[0]

        return tf.data.Dataset.range(len(self.devices)).map(piece)

    def __iter__(self) -> "Iterator":
        pieces = OwnedMultiDeviceIterator(dataset=self.pieces, devices=self.devices, source_device=HOST)
        return Iterator(pieces, self.element_spec)


class Iterator:
    """What `iter(feed)` returns.

    Args:
        pieces: gives those of a batch, for all devices.
        element_spec: of whole batches.
    """

    def __init__(self, pieces: OwnedMultiDeviceIterator, element_spec: Any):
        self.pieces, self.element_spec = pieces, element_spec

    def __iter__(self) -> "Iterator":
        return self

    def __next__(self) -> micro_batch.Batch:
        try:
            pieces = self.pieces.get_next()
        except tf.errors.OutOfRangeError:
            raise StopIteration from None
        full = [piece for piece in pieces if tf.nest.flatten(piece)[0].shape[0]]
        return micro_batch.Batch(tuple(full or pieces[:1]))


def can_be_fed(dataset: Any) -> bool:
    """Whether all arrays of a dataset's batches can be sent to other devices, and divided."""
    return isinstance(dataset, tf.data.Dataset) and all(
        isinstance(spec, tf.TensorSpec) and spec.shape.rank and spec.dtype not in (tf.string, tf.variant)
        for spec in tf.nest.flatten(dataset.element_spec)
    )
