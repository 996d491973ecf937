"""Dividing batches."""

import numpy as np
import pytest
import tensorflow as tf
from keras import tree

from tfpar import batch
from tfpar.errors import BatchError


@pytest.mark.parametrize("count, parts", [(8, 4), (10, 4), (3, 3), (19, 8)])
def test_parts_are_nearly_equal_and_whole(count, parts):
    x = {"a": tf.range(count), "b": (tf.reshape(tf.range(count * 2), (count, 2)), None)}
    pieces = batch.split(x, parts)
    sizes = [len(p["a"]) for p in pieces]
    assert max(sizes) - min(sizes) <= 1 and sum(sizes) == count
    assert np.array_equal(batch.joined([p["b"][0] for p in pieces]), x["b"][0])
    assert batch.joined([p["b"][1] for p in pieces]) is None
    assert np.allclose(batch.shares(count, parts), np.array(sizes) / count)


def test_sizes_known_only_when_run():
    @tf.function(input_signature=[tf.TensorSpec([None, 3])])
    def sizes(x):
        return [tf.shape(p)[0] for p in batch.split([x], 3) for p in p], batch.shares(batch.count([x]), 3)

    for count in (3, 7):
        found, shares = sizes(tf.ones((count, 3)))
        edges = batch.bounds(count, 3)
        assert [int(n) for n in found] == [b - a for a, b in zip(edges[:-1], edges[1:], strict=True)]
        assert float(tf.add_n(shares)) == pytest.approx(1.0)


def test_ragged():
    x = tf.ragged.constant([[1], [2, 3], [4]])
    assert [p.to_list() for p in batch.split(x, 2)] == [[[1]], [[2, 3], [4]]]


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"x": tf.ones((0, 2))}, "has no samples"),
        (
            {"x": tf.ones((3, 2)), "y": tf.ones(4)},
            "equally long; received {\"batch\\['x'\\]\": 3, \"batch\\['y'\\]\": 4}",
        ),
        ({"x": tf.ones((3, 2)), "y": tf.ones(())}, "batch\\['y'\\] has no batch dimension"),
        ({"x": None}, "holds no arrays"),
    ],
)
def test_refused(arrays, message):
    with pytest.raises(BatchError, match=message):
        batch.rows(arrays)


def test_structures_are_kept():
    pieces = batch.split(((tf.ones(4), [tf.zeros(4)]), None), 2)
    tree.assert_same_structure(pieces[0], ((0, [0]), None))
