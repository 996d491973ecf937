"""Gradients of micro-batches, added up in variables by compiled programs."""

import keras
import numpy as np
import pytest
from keras import layers
from training import check, history

import tfpar
from tfpar import Mesh
from tfpar.engine import in_place
from tfpar.trainer.hooks import hooks_of

FAST, EVERY = pytest.mark.fast, pytest.mark.every


def build():
    """Alike blocks behind an embedding, of which one weight is used on both stages."""
    x = layers.Input((4,), dtype="int32")
    shared = layers.Dense(8, activation="tanh")
    h = shared(layers.Embedding(8, 8)(x))
    for _ in range(2):
        h = layers.LayerNormalization()(h + layers.Dense(8, activation="gelu")(h))
    return keras.Model(x, layers.Dense(8, "softmax")(shared(h)))


def fit(rows=20):
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 8, (2, rows, 4))
    return history(x, y, batch_size=8, epochs=2)  # the last batch is half as large


def trained(strategy):
    adam = lambda: keras.optimizers.Adam(0.01, epsilon=1e-4)  # noqa: E731
    _, model = check(strategy, fit(), build=build, optimizer=adam, jit_compile=True, rtol=1e-4, atol=1e-5)
    return hooks_of(model).engine


@pytest.mark.parametrize(
    "strategy",
    [
        lambda: tfpar.PipelineStrategy(2, micro_batches=4),
        pytest.param(lambda: tfpar.PipelineStrategy(2, micro_batches=2, schedule="gpipe"), marks=EVERY),
        pytest.param(lambda: tfpar.PipelineStrategy(["CPU:0"], micro_batches=2), marks=EVERY),
        pytest.param(lambda: tfpar.MeshStrategy(Mesh(data=2, stage=2), 2), marks=EVERY),
        lambda: tfpar.MeshStrategy(Mesh(stage=2, tensor=2), 2),
    ],
    ids=["1F1B", "GPipe", "one device", "data", "tensor"],
)
def test_sums_are_those_of_one_device(strategy):
    engine = trained(strategy())
    lanes = len(engine.mesh.lanes)
    places = {(lane, v) for _, lane, v in engine.sums_in_place}
    embedding = next(v for v, variable in enumerate(engine.graph.variables) if "embedding" in variable.path)
    assert {v for _, v in places} == engine.trainable - {embedding}  # whose gradient is rows
    assert len(places) == lanes * (len(engine.trainable) - 1)


@EVERY
def test_shards_are_added_up_as_they_come():
    assert not trained(tfpar.MeshStrategy(Mesh(data=2, stage=2), 2, zero=2)).sums_in_place


@pytest.mark.parametrize("first", [pytest.param(False, marks=FAST), pytest.param(True, marks=EVERY)])
def test_planted_sums_are_caught(first, monkeypatch):
    """Sums that go on from step to step; the last micro-batch alone."""
    original = in_place.added
    monkeypatch.setattr(in_place, "added", lambda program, found, sums, _: original(program, found, sums, first))
    with pytest.raises(AssertionError):
        trained(tfpar.PipelineStrategy(2, micro_batches=2))
