"""Callbacks see, and do, what they do on one device."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from training import STRATEGIES, check, compiled, data, history

from tfpar.testing import assert_same, difference

X, Y = data()


class Record(keras.callbacks.Callback):
    """Every number that Keras tells."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def on_train_batch_end(self, batch, logs=None):
        self.seen.append((batch, {k: float(v) for k, v in logs.items()}))

    def on_test_batch_end(self, batch, logs=None):
        self.seen.append((batch, {k: float(v) for k, v in logs.items()}))

    def on_predict_batch_end(self, batch, logs=None):
        self.seen.append((batch, np.asarray(logs["outputs"])))

    def on_epoch_end(self, epoch, logs=None):
        self.seen.append((epoch, {k: float(v) for k, v in logs.items()}, float(self.model.optimizer.learning_rate)))


@pytest.mark.parametrize(
    "callbacks",
    [
        lambda: [keras.callbacks.EarlyStopping("val_loss", min_delta=1.0, patience=1, restore_best_weights=True)],
        lambda: [keras.callbacks.ReduceLROnPlateau("loss", factor=0.5, min_delta=1.0, patience=1)],
        lambda: [keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate * 0.7)],
        lambda: [keras.callbacks.TerminateOnNaN(), keras.callbacks.LambdaCallback()],
        lambda: [keras.callbacks.SwapEMAWeights()],
    ],
    ids=["EarlyStopping", "ReduceLROnPlateau", "LearningRateScheduler", "TerminateOnNaN", "SwapEMAWeights"],
)
def test_what_they_see(strategy, callbacks):
    def use(model):
        record = Record()
        model.fit(
            X, Y, batch_size=8, epochs=4, shuffle=False, verbose=0, validation_split=0.2,
            callbacks=[*callbacks(), record],
        )  # fmt: skip
        model.evaluate(X, Y, batch_size=8, verbose=0, callbacks=[record])
        model.predict(X, batch_size=8, verbose=0, callbacks=[record])
        return record.seen

    check(strategy, use, optimizer=lambda: keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.9))


@pytest.mark.fast
def test_model_checkpoint(strategy, tmp_path):
    path = str(tmp_path / "best.keras")
    best = keras.callbacks.ModelCheckpoint(path, "loss", save_best_only=True)
    model = compiled(strategy)
    history(X, Y, batch_size=8, epochs=2, callbacks=[best])(model)
    assert_same(model, keras.saving.load_model(path), 0.0)


def test_backup_and_restore(strategy, tmp_path):
    """A run that dies and goes on is the run that did not die."""

    class Die(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                raise KeyboardInterrupt

    whole, interrupted, resumed = (compiled(strategy, "adam") for _ in range(3))
    history(X, Y, batch_size=8, epochs=4)(whole)
    backup = keras.callbacks.BackupAndRestore(tmp_path / "backup")
    with pytest.raises(KeyboardInterrupt):
        history(X, Y, batch_size=8, epochs=4, callbacks=[backup, Die()])(interrupted)
    history(X, Y, batch_size=8, epochs=4, callbacks=[keras.callbacks.BackupAndRestore(tmp_path / "backup")])(resumed)
    assert_same(whole, resumed, 1e-6)


def test_tensorboard(strategy, tmp_path):
    """The logs hold the losses, and a profile in which each action has its name."""
    board = keras.callbacks.TensorBoard(tmp_path, histogram_freq=1, write_graph=False, profile_batch=(2, 2))
    model = compiled(strategy)
    losses = history(X, Y, batch_size=8, epochs=2, callbacks=[board])(model)["loss"]
    files = sorted(tmp_path.glob("train/events*"))
    logged = [
        float(tf.make_ndarray(value.tensor))
        for file in files
        for event in tf.compat.v1.train.summary_iterator(str(file))
        for value in event.summary.value
        if value.tag == "epoch_loss"
    ]
    assert difference(losses, logged) < 1e-6
    profile = next(tmp_path.rglob("*.xplane.pb")).read_bytes()
    for s in range(2):
        for m in range(strategy.micro_batches):
            for action in ("forward", "backward") if not s else ("forward_backward",):
                assert f"stage{s}/mb{m}/{action}".encode() in profile


@pytest.mark.fast
@pytest.mark.parametrize("name", STRATEGIES)
def test_nan_in_the_data_is_nan_in_the_loss(name):
    x = X.copy()
    x[9] = np.nan

    def use(model):
        record = Record()
        model.fit(x, Y, batch_size=4, shuffle=False, verbose=0, callbacks=[keras.callbacks.TerminateOnNaN(), record])
        return record.seen

    _, model = check(STRATEGIES[name](), use)
    assert all(np.isnan(w).any() for w in model.get_weights())
