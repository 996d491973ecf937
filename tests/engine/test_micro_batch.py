"""Dividing batches."""

import numpy as np
import pytest
import tensorflow as tf
from keras import tree

from tfpar.engine import micro_batch
from tfpar.errors import BatchError

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("count, parts", [(8, 4), (10, 4), (3, 3), (19, 8)])
def test_parts_are_nearly_equal_and_whole(count, parts):
    x = {"a": tf.range(count), "b": (tf.reshape(tf.range(count * 2), (count, 2)), None)}
    pieces = micro_batch.split(x, parts)
    sizes = [len(p["a"]) for p in pieces]
    assert max(sizes) - min(sizes) <= 1 and sum(sizes) == count
    assert np.array_equal(micro_batch.concat([p["b"][0] for p in pieces]), x["b"][0])
    assert micro_batch.concat([p["b"][1] for p in pieces]) is None
    assert np.allclose(micro_batch.shares(sizes), np.array(sizes) / count)


def test_sizes_known_only_when_run():
    @tf.function(input_signature=[tf.TensorSpec([None, 3])])
    def sizes(x):
        counts = [micro_batch.count(piece) for piece in micro_batch.split([x], 3)]
        return counts, micro_batch.shares(counts)

    for count in (3, 7):
        found, shares = sizes(tf.ones((count, 3)))
        edges = micro_batch.bounds(count, 3)
        assert [int(n) for n in found] == [b - a for a, b in zip(edges[:-1], edges[1:], strict=True)]
        assert float(tf.add_n(shares)) == pytest.approx(1.0)


def test_ragged():
    x = tf.ragged.constant([[1], [2, 3], [4]])
    assert [p.to_list() for p in micro_batch.split(x, 2)] == [[[1]], [[2, 3], [4]]]


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
        micro_batch.rows(arrays)


def test_structures_are_kept():
    pieces = micro_batch.split(((tf.ones(4), [tf.zeros(4)]), None), 2)
    tree.assert_same_structure(pieces[0], ((0, [0]), None))


@pytest.mark.parametrize("rows, fits", [(1, (1, 1)), (3, (3, 1)), (7, (4, 1)), (8, (4, 2)), (99, (4, 2))])
def test_parts_fit_the_rows(rows, fits):
    parts = micro_batch.Parts(4, 2).fit(rows)
    assert parts == fits and parts.count == fits[0] * fits[1]


def test_sparse():
    x = tf.sparse.from_dense([[1, 0], [0, 2], [3, 4]])
    pieces = micro_batch.split(x, 2)
    assert [tf.sparse.to_dense(p).numpy().tolist() for p in pieces] == [[[1, 0]], [[0, 2], [3, 4]]]
    assert np.array_equal(tf.sparse.to_dense(micro_batch.concat(pieces)), tf.sparse.to_dense(x))
    assert micro_batch.in_proportion(10, [2, 3]) == [4, 6]


def test_batch_of_pieces():
    pieces = ((tf.constant([1, 2]), None), (tf.constant([3]), None))
    given = micro_batch.Batch(pieces)
    assert given.parts(2) == list(pieces) and given.whole[0].numpy().tolist() == [1, 2, 3] and given.whole[1] is None
    assert [p[0].numpy().tolist() for p in given.parts(3)] == [[1], [2], [3]]
