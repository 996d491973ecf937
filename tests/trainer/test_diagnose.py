"""What goes wrong on a device, in a loss or in a file: an error that says where, and a model that goes on."""

import pathlib
import re
import subprocess
import sys

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from training import compiled, data, deep, history, some_fast

import tfpar
from tfpar import Mesh
from tfpar.engine import engine
from tfpar.testing import named_values
from tfpar.trainer.diagnose import at_node
from tfpar.trainer.hooks import hooks_of

X, Y = data(16)
MESHES = {
    "pipeline": lambda: tfpar.PipelineStrategy(["CPU:0", "CPU:1"], micro_batches=2),
    "cube": lambda: tfpar.MeshStrategy(Mesh(2, 2, 2), micro_batches=2, zero=3),
    "replicas": lambda: tfpar.DataParallelStrategy(["CPU:0", "CPU:1"]),
}
FAULT = [""]


@keras.saving.register_keras_serializable()
class Fragile(layers.Layer):
    """Fails as `FAULT` says, for samples that begin with 9."""

    def call(self, x):
        def run(value):
            if FAULT[0] and np.any(value[:, 0] > 8):
                if FAULT[0] == "memory":
                    raise tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor with shape[9,9]")
                raise ValueError("this layer does not like nines")
            return value

        y = tf.numpy_function(run, [x], x.dtype)
        y.set_shape(x.shape)
        return x + tf.stop_gradient(y - x)


class Overflows(layers.Layer):
    """Infinite for samples that begin with 9."""

    def call(self, x):
        return x + keras.ops.where(x[:, :1] > 8, np.inf, 0.0)


def model_with(strategy, layer, **compile):
    def build():
        x = h = layers.Input((6,))
        for n in range(3):
            h = layers.Dense(6, kernel_initializer="identity", name=f"before_{n}")(h)
        h = layer(name="fragile")(h)
        return keras.Model(x, layers.Dense(3, activation="softmax", name="last")(h))

    return compiled(strategy, build=build, **compile)


def nines():
    x = X.copy()
    x[13, 0] = 9.0  # the last replica's, the last micro-batch's
    return x


@pytest.mark.filterwarnings("ignore:could not check")
@pytest.mark.parametrize("fault, match", [("memory", "OOM when allocating"), ("raises", "does not like nines")])
@pytest.mark.parametrize("name", some_fast(MESHES, "pipeline", "replicas"))
def test_a_stage_that_fails(name, fault, match):
    strategy = MESHES[name]()
    model = model_with(strategy, Fragile)
    history(X, Y, batch_size=16)(model)
    FAULT[0] = fault
    try:
        with pytest.raises(tfpar.StageError, match=match) as raised:
            history(nines(), Y, batch_size=16)(model)
    finally:
        FAULT[0] = ""
    message = str(raised.value)
    stage, micro_batch = strategy.mesh.stage - 1, strategy.micro_batches - 1
    assert message.startswith(f"stage {stage}, micro-batch {micro_batch}") and "in fragile failed" in message
    assert ("replica 1" in message) == (strategy.mesh.data > 1)
    assert np.isfinite(history(X, Y, batch_size=16)(model)["loss"]).all()  # the process goes on


@pytest.mark.filterwarnings("ignore:could not check")
def test_a_stage_that_stops_others(monkeypatch):
    """TensorFlow may tell of a device that was stopped, and not why, where programs are functions of their own."""
    monkeypatch.setattr(engine, "FEW", 0)
    test_a_stage_that_fails("replicas", "raises", "does not like nines")


@pytest.mark.parametrize("name", some_fast(MESHES, "pipeline", "replicas"))
def test_a_loss_that_is_not_finite(name):
    strategy = MESHES[name]()
    model = model_with(strategy, Overflows)
    check = tfpar.CheckNumerics()
    history(X, Y, batch_size=16, callbacks=[check])(model)
    before = model.get_weights()
    with pytest.raises(tfpar.StageError, match="the loss is not finite; it comes from stage") as raised:
        history(nines(), Y, batch_size=16, callbacks=[check])(model)
    stage, micro_batch = strategy.mesh.stage - 1, strategy.micro_batches - 1
    assert f"stage {stage}, micro-batch {micro_batch}" in str(raised.value) and "in fragile" in str(raised.value)
    assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))
    assert np.isfinite(history(X, Y, batch_size=16)(model)["loss"]).all()


@pytest.mark.fast
def test_own_steps_that_compute_the_loss_are_checked():
    class Own(keras.Model):
        def train_step(self, batch):
            x, y = batch
            with tf.GradientTape() as tape:
                loss = self.compute_loss(x=x, y=y, y_pred=self(x, training=True))
            weights = self.trainable_weights
            self.optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))
            return {"loss": loss}

    def build():
        x = layers.Input((6,))
        return Own(x, layers.Dense(3, activation="softmax")(Overflows(name="fragile")(x)))

    model = compiled(MESHES["replicas"](), build=build, metrics=lambda: None)
    with pytest.raises(tfpar.StageError, match="in fragile"):
        history(nines(), Y, batch_size=16, callbacks=[tfpar.CheckNumerics()])(model)
    history(nines(), Y, batch_size=16)(model)  # without the callback nothing is checked


def test_training_on_a_batch_in_a_callback():
    """It does not end the checks of the fit around it; another fit has none."""
    model = model_with(MESHES["pipeline"](), Overflows)

    class Train(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            self.model.train_on_batch(X, Y)

    with pytest.raises(tfpar.StageError, match="in fragile"):
        history(nines(), Y, batch_size=16, callbacks=[tfpar.CheckNumerics(), Train()])(model)
    history(nines(), Y, batch_size=16, callbacks=[Train()])(model)


@pytest.mark.fast
def test_a_weight_that_is_not_finite():
    model = compiled(MESHES["pipeline"]())
    model.layers[1].kernel.assign(np.full((6, 5), np.nan))
    with pytest.raises(tfpar.StageError, match="it comes from dense/kernel, which was not finite before this step"):
        history(X, Y, callbacks=[tfpar.CheckNumerics()])(model)


@pytest.mark.fast
def test_a_loss_function_that_is_not_finite():
    model = compiled(MESHES["pipeline"](), loss=lambda y, p: keras.ops.log(p[:, 0] - 2.0))
    with pytest.raises(tfpar.StageError, match="the loss itself: what the model makes is finite"):
        history(X, Y, callbacks=[tfpar.CheckNumerics()])(model)


@pytest.mark.fast
@pytest.mark.parametrize(
    "node, where",
    [
        (
            "replica1/stage1/mb1/backward/PartitionedCall",
            "stage 1, micro-batch 1, replica 1 on GPU:3, backward in .*last",
        ),
        ("stage0/mb0/forward_backward/x", "stage 0, micro-batch 0 on GPU:3, forward and backward in before_0"),
        ("before_1/MatMul", r"the backward pass or the update \(stage 0, before_1 on GPU:3\)"),
        ("somewhere", r"the backward pass or the update \(operation somewhere on GPU:3\)"),
    ],
)
def test_an_error_that_does_not_come_again(node, where):
    """A device that was out of memory, for one: TensorFlow names an operation."""
    model = model_with(MESHES["pipeline"](), layers.ReLU)
    history(X, Y, batch_size=16)(model)
    message = f"OOM when allocating tensor on /job:localhost/device:GPU:3 by allocator\n\t [[{{{{node {node}}}}}]]"
    error = tf.errors.ResourceExhaustedError(None, None, message)
    assert re.match(where, at_node(error, hooks_of(model).engine, True))


@pytest.mark.fast
@pytest.mark.parametrize("name", ["pipeline", "replicas"])
def test_a_loss_that_fails(name):
    """It is named with the part of the batch and the stage that it belongs to."""
    strategy = MESHES[name]()
    model = model_with(strategy, layers.ReLU)
    labels = Y.copy()
    labels[-1] = 7  # there are three
    with pytest.raises(tfpar.StageError, match=r"in the loss failed: .*label value of 7") as raised:
        history(X, labels, batch_size=16)(model)
    last = f"micro-batch {strategy.micro_batches - 1}" if name == "pipeline" else f"replica {strategy.mesh.data - 1}"
    assert last in str(raised.value) and f"stage {strategy.mesh.stage - 1}" in str(raised.value)


@pytest.mark.fast
def test_errors_while_tracing_have_a_note():
    class Wrong(layers.Layer):
        def call(self, x, training=None):
            if training and tf.inside_function():
                raise TypeError("not in training")
            return x

    with pytest.raises(TypeError, match="not in training") as raised:
        history(X, Y)(model_with(MESHES["pipeline"](), Wrong))
    assert any("in stage1/mb0/" in note and "fragile" in note for note in raised.value.__notes__)


def test_watchdog():
    """A process in which a stage fails ends, on any mesh: no device waits for another for ever."""
    script = pathlib.Path(__file__).parent.parent / "fails.py"
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.count("StageError") == 3


# ---- files


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    keras.utils.clear_session(free_memory=False)
    model = compiled(None, "adam", build=deep)
    history(X, Y)(model)
    path = tmp_path_factory.mktemp("good") / "good.weights.h5"
    model.save_weights(path)
    return path.read_bytes()


@pytest.fixture
def file(good, tmp_path):
    (tmp_path / "good.weights.h5").write_bytes(good)
    return tmp_path / "good.weights.h5"


def truncated(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def overwritten(file):
    file.write_bytes(b"these are no weights" * 100)


def of_another_model(file):
    other = compiled(None, "adam")
    history(X, Y)(other)
    other.save_weights(file)


def without_the_last_layer(file):
    with h5py.File(file, "a") as f:
        del f["layers/dense_3"]


def missing(file):
    file.unlink()


@pytest.mark.parametrize(
    "name, damage",
    [("pipeline", d) for d in (truncated, overwritten, without_the_last_layer, missing)]
    + [("cube", truncated), ("replicas", of_another_model)],
)
def test_a_damaged_file_leaves_the_model(name, damage, file):
    model = compiled(MESHES[name](), "adam", build=deep)
    history(X, Y, batch_size=16)(model)
    model.load_weights(file)
    history(X, Y, batch_size=16)(model)
    before = named_values(model)
    damage(file)
    with pytest.raises(tfpar.FileError, match="cannot be loaded into .*, which stays as it is"):
        model.load_weights(file)
    after = named_values(model)
    assert len(before) > 20 and all(np.array_equal(before[name], after[name]) for name in before)
    history(X, Y, batch_size=16)(model)


def test_a_save_that_fails_leaves_the_file(file, monkeypatch):
    model = compiled(MESHES["cube"](), "adam", build=deep)
    before = file.read_bytes()
    monkeypatch.setattr(layers.LayerNormalization, "save_own_variables", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.save_weights(file)
    assert file.read_bytes() == before and [f.name for f in file.parent.iterdir()] == [file.name]
