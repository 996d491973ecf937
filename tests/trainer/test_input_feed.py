"""Batches sent ahead: each once, whole, on the devices of the replicas."""

import numpy as np
import pytest
import tensorflow as tf
from training import check, data, history

import tfpar
from tfpar.strategies.base import ForKeras
from tfpar.trainer.input_feed import Feed, can_be_fed

X, Y = data(19)


@pytest.mark.fast
@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("batch_size", [8, 2])
def test_pieces(count, batch_size):
    read = []

    def batches():
        for start in range(0, 19, batch_size):
            read.append(start)
            yield X[start : start + batch_size], Y[start : start + batch_size]

    signature = tf.TensorSpec([None, X.shape[1]], X.dtype), tf.TensorSpec([None], Y.dtype)
    devices = [f"CPU:{n}" for n in range(count)]
    found = list(Feed(tf.data.Dataset.from_generator(batches, output_signature=signature), devices))
    assert read == list(range(0, 19, batch_size))
    assert np.array_equal(np.concatenate([b.whole[0] for b in found]), X)
    assert np.array_equal(np.concatenate([b.whole[1] for b in found]), Y)
    for b in found:
        rows = [len(piece[0]) for piece in b.pieces]
        assert len(rows) == min(count, sum(rows)) and max(rows) - min(rows) <= 1
        assert [piece[0].device.rsplit("device:")[-1] for piece in b.pieces] == devices[: len(rows)]


@pytest.mark.fast
def test_whole_numbers_stay_with_the_host():
    tokens = tf.data.Dataset.from_tensor_slices((Y[:, None], Y)).batch(8)
    (batch, *_) = Feed(tokens, ["CPU:1", "CPU:2"])
    assert np.array_equal(batch.whole[1], Y[:8])
    assert {x.device[-5:] for piece in batch.pieces for x in piece} == {"CPU:0"}


@pytest.mark.parametrize("jit", [False, True])
def test_training(monkeypatch, jit):
    """As on GPUs."""
    feed = lambda self, dataset, options=None: Feed(dataset, self.extended.replicas)  # noqa: E731
    monkeypatch.setattr(ForKeras, "experimental_distribute_dataset", feed)

    def use(model):
        if jit:  # every size of a batch is compiled
            return history(X, Y, sample_weight=np.arange(19.0), batch_size=10, epochs=2)(model)
        fit = history(X, Y, sample_weight=np.arange(19.0), batch_size=8, epochs=2, validation_data=(X, Y))(model)
        small = history(X, Y, batch_size=2, steps_per_epoch=4, epochs=2)(model)
        return fit, small, model.predict(X, batch_size=5, verbose=0), model.evaluate(X, Y, batch_size=7, verbose=0)

    check(tfpar.DataParallelStrategy(["CPU:0", "CPU:1", "CPU:2"][: 2 if jit else 3]), use, jit_compile=jit)


@pytest.mark.fast
def test_what_can_be_fed():
    arrays = tf.data.Dataset.from_tensor_slices((X, Y))
    assert can_be_fed(arrays.batch(4)) and not can_be_fed(arrays) and not can_be_fed(X)
    assert not can_be_fed(tf.data.Dataset.from_tensors(tf.constant(["a"])))
    assert not can_be_fed(tf.data.Dataset.from_tensors(tf.ragged.constant([[1], [2, 3]])))
