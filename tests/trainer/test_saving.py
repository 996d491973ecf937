"""Files hold ordinary Keras models: written under a strategy, read on one device, and the other way around."""

import inspect

import keras
import numpy as np
import pytest
import tensorflow as tf
from training import compiled, data, history

from tfpar.errors import ScopeError
from tfpar.testing import assert_same, difference

X, Y = data()


@pytest.fixture
def trained(strategy):
    model = compiled(strategy, keras.optimizers.Adam)
    history(X, Y, batch_size=8)(model)
    return model


def devices(model):
    return {v.value.device for v in model.weights}


def test_a_keras_file_is_read_on_one_device(trained, tmp_path):
    trained.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert_same(trained, loaded, 0.0)
    for model in (trained, loaded):
        history(X, Y, batch_size=8)(model)
    assert_same(loaded, trained, 1e-5, 1e-7)


@pytest.mark.fast
def test_a_keras_file_is_read_under_a_strategy(strategy, tmp_path):
    one = compiled(None, keras.optimizers.Adam)
    history(X, Y, batch_size=8)(one)
    one.save(tmp_path / "model.keras")
    with strategy.scope():
        loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert_same(one, loaded, 0.0)
    for model in (one, loaded):
        history(X, Y, batch_size=8)(model)
    assert_same(one, loaded, 1e-5, 1e-7)
    assert len(devices(loaded)) == 2


def test_a_keras_file_read_outside_is_one_of_one_device(trained, tmp_path):
    trained.save(tmp_path / "model.keras")
    with pytest.raises(ScopeError, match="was not constructed in this strategy's scope"):
        trained.distribute_strategy.explain(keras.saving.load_model(tmp_path / "model.keras"))


def test_positional_arguments_are_those_of_keras(trained, tmp_path):
    trained.save(tmp_path / "model.keras", True, None)
    trained.save_weights(tmp_path / "model.weights.json", True, 1)
    trained.load_weights(tmp_path / "model.weights.json", False)
    for method in ("save", "save_weights", "load_weights"):
        ours, theirs = (list(inspect.signature(getattr(o, method)).parameters)[:3] for o in (trained, type(trained)))
        assert ours[:2] == theirs[1:3]


@pytest.mark.fast
def test_weights(trained, tmp_path):
    trained.save_weights(tmp_path / "model.weights.h5")
    one, other = compiled(), compiled(trained.distribute_strategy)
    for model in (one, other):
        model.load_weights(tmp_path / "model.weights.h5")
        assert all(np.array_equal(a, b) for a, b in zip(trained.get_weights(), model.get_weights(), strict=True))
    other.predict(X, verbose=0)
    other.load_weights(tmp_path / "model.weights.h5")  # now that they are in their places
    assert difference(trained.predict(X, verbose=0), other.predict(X, verbose=0)) == 0.0


def test_set_weights_before_and_after_training(strategy):
    one = compiled()
    keras.utils.clear_session(free_memory=False)  # names count from the start
    other = compiled(strategy)
    for factor in (2.0, 3.0):
        for model in (one, other):
            model.set_weights([factor * w for w in model.get_weights()])
            history(X, Y, batch_size=8)(model)
        assert_same(one, other, 1e-5, 1e-7)
    assert one.count_params() == other.count_params()
    assert summary(one) == summary(other)


def summary(model):
    lines = []
    model.summary(print_fn=lambda text: lines.append(text))
    return lines


@pytest.mark.fast
def test_export(trained, tmp_path):
    trained.export(tmp_path / "exported", verbose=False)
    exported = tf.saved_model.load(tmp_path / "exported")
    assert difference(trained.predict(X, verbose=0), exported.serve(tf.constant(X))) < 1e-6


def test_checkpoint(trained, tmp_path):
    path = tf.train.Checkpoint(model=trained, optimizer=trained.optimizer).write(str(tmp_path / "checkpoint"))
    for strategy in (None, trained.distribute_strategy):
        model = compiled(strategy, keras.optimizers.Adam)
        history(X, Y, batch_size=5)(model)
        tf.train.Checkpoint(model=model, optimizer=model.optimizer).read(path).assert_existing_objects_matched()
        assert_same(trained, model, 0.0)


def test_clone(trained):
    clone = keras.models.clone_model(trained)
    clone.set_weights(trained.get_weights())
    assert difference(trained.predict(X, verbose=0), clone.predict(X, verbose=0)) < 1e-6
