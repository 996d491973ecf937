"""Files hold ordinary Keras models: written under a strategy, read on one device, and the other way around."""

import inspect
import logging
import threading

import keras
import numpy as np
import pytest
import tensorflow as tf
from training import compiled, data, history

import tfpar
from tfpar import Mesh
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


# ---- in the background


@pytest.fixture
def blocked(monkeypatch):
    """Until this event is set, nothing is written to files of weights."""
    event = threading.Event()
    original = keras.Model.save_weights, keras.Model.save
    monkeypatch.setattr(keras.Model, "save_weights", lambda *a, **k: event.wait(60) and original[0](*a, **k))
    monkeypatch.setattr(keras.Model, "save", lambda *a, **k: event.wait(60) and original[1](*a, **k))
    yield event
    event.set()


@pytest.mark.fast
def test_training_goes_on_while_a_file_is_written(trained, blocked, tmp_path):
    """The file is that of the moment: weights, slots, the rate of learning and the number of the step."""
    blocked.set()
    trained.save(tmp_path / "now.keras")
    blocked.clear()
    saved = trained.save(tmp_path / "later.keras", asynchronous=True)
    trained.optimizer.learning_rate = 0.5
    history(X, Y, batch_size=8)(trained)
    trained.layers[-1].bias.assign_add(trained.layers[-1].bias)
    assert not saved.done() and not (tmp_path / "later.keras").exists()
    blocked.set()
    saved.result()
    now, later = (keras.saving.load_model(tmp_path / f"{name}.keras") for name in ("now", "later"))
    assert_same(now, later, 0.0)
    assert now.optimizer.get_config() == later.optimizer.get_config()


@pytest.mark.parametrize("mesh, zero", [(Mesh(data=2, tensor=2), 1), (Mesh(data=2, stage=2), 3)])
def test_what_is_divided_is_saved_in_the_background(mesh, zero, blocked, tmp_path):
    model = compiled(tfpar.MeshStrategy(mesh, zero=zero), keras.optimizers.Adam)
    history(X, Y, batch_size=8)(model)
    test_training_goes_on_while_a_file_is_written(model, blocked, tmp_path)


def test_what_comes_next_waits_for_the_background(trained, blocked, tmp_path):
    """A file is read, and written again, once it is there; the background writes one at a time."""
    path = tmp_path / "model.weights.h5"
    first = trained.save_weights(path, asynchronous=True)
    threading.Timer(0.2, blocked.set).start()
    trained.load_weights(path)
    assert first.done()
    blocked.clear()
    first = trained.save_weights(path, asynchronous=True)
    threading.Timer(0.2, blocked.set).start()
    second = trained.save_weights(path, asynchronous=True)
    assert first.done() and second.result() is None and [f.name for f in tmp_path.iterdir()] == [path.name]


def test_what_goes_wrong_in_the_background(trained, tmp_path, caplog):
    """It is logged, and raised to who asks for the result."""
    (tmp_path / "model.weights.h5").mkdir()
    with caplog.at_level(logging.ERROR, "tfpar"):
        saved = trained.save_weights(tmp_path / "model.weights.h5", asynchronous=True)
        with pytest.raises(OSError, match="directory"):
            saved.result()
    assert "could not be saved" in caplog.text
    backup = tfpar.BackupAndRestore(str(tmp_path / "backup"), asynchronous=True)
    trained.optimizer.iterations.assign(0)
    (tmp_path / "backup" / "1-0-3.weights.h5").mkdir(parents=True)
    with pytest.raises(OSError, match="directory"):
        history(X, Y, batch_size=8, epochs=2, callbacks=[backup])(trained)


@pytest.mark.parametrize("wrong", ["live", "no slots"])
def test_planted_bugs_in_the_background_are_found(wrong, blocked, tmp_path, monkeypatch):
    from tfpar.trainer import saving

    if wrong == "live":
        monkeypatch.setattr(saving.Snapshot, "get_current_value", lambda self, variable: None)
    else:
        monkeypatch.setattr(saving, "variables_of", lambda model: model.variables)
    model = compiled(tfpar.TensorParallelStrategy(["CPU:0", "CPU:1"]), keras.optimizers.Adam)
    history(X, Y, batch_size=8)(model)
    with pytest.raises(AssertionError):
        test_training_goes_on_while_a_file_is_written(model, blocked, tmp_path)
