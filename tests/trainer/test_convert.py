"""What one strategy saved, any other goes on with: the same weights and slots as without the interruption."""

import contextlib
import itertools
import os
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from training import compiled, data, deep, history, mostly

import tfpar
from tfpar import Mesh
from tfpar.testing import assert_same, difference

X, Y = data(16)
STRATEGIES = {
    "one device": lambda: None,
    "cube": lambda: tfpar.MeshStrategy(Mesh(2, 2, 2), micro_batches=2),
    "zero 3": lambda: tfpar.MeshStrategy(Mesh(2, shard=2), zero=3),
    "offload": lambda: tfpar.MeshStrategy(Mesh(1, 2, 2), offload="optimizer"),
    "pipeline": lambda: tfpar.PipelineStrategy(["CPU:3", "CPU:1"], micro_batches=2),
}


def adam():
    return keras.optimizers.Adam(0.01)


def fresh(name):
    model = compiled(STRATEGIES[name](), adam, build=deep)
    model.optimizer.build(model.trainable_variables)
    return model


def fit(model, epochs=2, **kwargs):
    history(X, Y, batch_size=8, epochs=epochs, **kwargs)(model)
    return model


@pytest.fixture(scope="module")
def whole():
    """The run that was not interrupted."""
    keras.utils.clear_session(free_memory=False)
    return fit(compiled(None, adam, build=deep), 4)


def keras_file(model, path):
    model.save(path / "model.keras")


def from_keras_file(name, path):
    strategy = STRATEGIES[name]()
    with strategy.scope() if strategy else contextlib.nullcontext():
        return keras.saving.load_model(path / "model.keras")


def weights_file(model, path):
    model.save_weights(path / "model.weights.h5")


def from_weights_file(name, path):
    model = fresh(name)
    model.load_weights(path / "model.weights.h5")
    return model


def checkpoint(model, path):
    tf.train.Checkpoint(model=model, optimizer=model.optimizer).write(str(path / "checkpoint"))


def from_checkpoint(name, path):
    model = fresh(name)
    saved = tf.train.Checkpoint(model=model, optimizer=model.optimizer)
    saved.read(str(path / "checkpoint")).assert_existing_objects_matched()
    return model


def orbax(model, path):
    callback = keras.callbacks.OrbaxCheckpoint(str(path / "orbax"), save_on_background=False)
    callback.set_model(model)
    callback.on_train_begin()
    callback.on_epoch_end(1, {"val_loss": 1.0})
    callback.on_train_end()


def from_orbax(name, path):
    model = fresh(name)
    model.load_weights(str(path / "orbax"))
    return model


WAYS = {
    "keras": (keras_file, from_keras_file),
    "weights": (weights_file, from_weights_file),
    "checkpoint": (checkpoint, from_checkpoint),
    "orbax": (orbax, from_orbax),
}
NAMES = list(STRATEGIES)[:4]


PAIRS = list(itertools.product(NAMES, WAYS))


def places(first, way):
    """Of the two in their lists."""
    return NAMES.index(first), list(WAYS).index(way)


@pytest.mark.parametrize("first, way", mostly(PAIRS, [pair for pair in PAIRS if sum(places(*pair)) % 5 == 1]))
def test_saved_here_resumed_there(first, way, whole, tmp_path):
    save, load = WAYS[way]
    save(fit(fresh(first)), tmp_path)
    keras.utils.clear_session(free_memory=False)
    at, number = places(first, way)
    second = NAMES[(at + 1 + number % 3) % len(NAMES)]  # over all ways, any to any
    assert_same(whole, fit(load(second, tmp_path)), 1e-5, 1e-7)


@pytest.mark.parametrize(
    "kind, first, second",
    [(keras.callbacks.BackupAndRestore, "one device", "cube"), (tfpar.BackupAndRestore, "cube", "zero 3"),
     (tfpar.BackupAndRestore, "zero 3", "one device")],
)  # fmt: skip
def test_backup_under_another_strategy(kind, first, second, whole, tmp_path):
    fit(fresh(first), callbacks=[kind(str(tmp_path / "backup"), delete_checkpoint=False)])
    model = fit(fresh(second), 4, callbacks=[kind(str(tmp_path / "backup"))])
    assert_same(whole, model, 1e-5, 1e-7)
    assert not (tmp_path / "backup").exists()


def test_model_checkpoint_of_a_mesh(whole, tmp_path):
    path = str(tmp_path / "at-{epoch}.keras")
    fit(fresh("cube"), callbacks=[keras.callbacks.ModelCheckpoint(path)])
    model = fit(keras.saving.load_model(path.format(epoch=2)))
    assert_same(whole, model, 1e-5, 1e-7)


@pytest.mark.parametrize("name", mostly(["cube", "zero 3", "pipeline"], ["cube"]))
def test_exported_for_one_device(name, tmp_path):
    model = fit(fresh(name))
    model.export(tmp_path / "served", verbose=False)
    copies = {c.device for v in model.weights for c in v.value.copies}
    assert len(copies) > 1  # they are back in their places
    np.save(tmp_path / "x.npy", X)
    serve = (
        "import sys, numpy as np, tensorflow as tf; p = sys.argv[1]\n"
        "assert len(tf.config.list_logical_devices()) == 1\n"
        "served = tf.saved_model.load(p + '/served')\n"
        "np.save(p + '/y.npy', served.serve(np.load(p + '/x.npy')))"
    )
    subprocess.run([sys.executable, "-c", serve, str(tmp_path)], check=True, capture_output=True)
    assert difference(model.predict(X, verbose=0), np.load(tmp_path / "y.npy")) < 1e-6
    fit(model, 1)


# ---- a live model


def test_convert(whole):
    """Through every strategy, one epoch in each; what was predicted stays."""
    strategies = [STRATEGIES[name]() for name in ("pipeline", "cube", "zero 3", "offload")]
    model = fit(compiled(strategies[0], adam, build=deep), 1)
    kernel = model.layers[1].kernel
    for current, other in zip(strategies, strategies[1:], strict=False):
        before = model.predict(X, verbose=0)
        assert current.convert(model, other) is model
        assert difference(before, model.predict(X, verbose=0)) < 1e-6
        fit(model, 1)
        assert {c.device[-5:] for v in model.weights for c in v.value.copies} == {*other.mesh.devices}
        assert kernel is model.layers[1].kernel and kernel.value.distribute_strategy is other
    assert_same(whole, model, 1e-5, 1e-7)
    with pytest.raises(tfpar.ScopeError, match="was not constructed in this strategy's scope"):
        strategies[0].convert(model, strategies[1])


@pytest.mark.fast
def test_a_loop_right_after_it():
    strategy, other = STRATEGIES["pipeline"](), tfpar.DataParallelStrategy(2)
    model = fit(compiled(strategy, adam, build=deep), 1)
    expected = model.predict(X, verbose=0)
    strategy.convert(model, other)
    found = other.run(lambda: model(X))
    assert all(difference(expected, y) < 1e-6 for y in other.experimental_local_results(found))


@pytest.mark.fast
def test_convert_with_all_its_optimizers():
    class Two(keras.Model):
        def __init__(self):
            super().__init__()
            self.first, self.second = keras.layers.Dense(4, activation="tanh"), keras.layers.Dense(3)

        def compile(self, other):
            super().compile(adam())
            self.other = other

        def call(self, x):
            return self.second(self.first(x))

        def train_step(self, data):
            for layer, optimizer in ((self.first, self.optimizer), (self.second, self.other)):
                with tf.GradientTape() as tape:
                    loss = keras.ops.mean(keras.ops.square(self(data[0], training=True)))
                gradients = tape.gradient(loss, layer.trainable_weights)
                optimizer.apply_gradients(zip(gradients, layer.trainable_weights, strict=True))
            return {"loss": loss}

    strategy, other = tfpar.DataParallelStrategy(["CPU:0", "CPU:1"]), tfpar.MeshStrategy(Mesh())
    models = []
    for s in (None, strategy):
        keras.utils.set_random_seed(3)
        with s.scope() if s else contextlib.nullcontext():
            models.append(Two())
            models[-1].compile(adam())
        fit(models[-1], 1)
    strategy.convert(models[1], other)
    found = [[*fit(model, 1).weights, *model.other.variables] for model in models]
    assert len(found[0]) > 8 and all(difference(a, b) < 1e-5 for a, b in zip(*found, strict=True))


@pytest.mark.fast
def test_convert_leaves_no_model_with_old_variables():
    x, strategy = keras.layers.Input((6,)), tfpar.DataParallelStrategy(["CPU:0", "CPU:1"])
    with strategy.scope():
        inner = keras.Model(x, keras.layers.Dense(4)(x))
        outer = keras.Model(x, keras.layers.Dense(3)(inner(x)), name="outer")
        outer.compile("sgd", "mse")
    outer.predict(X, verbose=0)
    with pytest.raises(tfpar.ScopeError, match="outer has been used and shares variables"):
        strategy.convert(inner, tfpar.MeshStrategy(Mesh()))
    with pytest.raises(tfpar.ScopeError, match="to another strategy of tfpar; received 3"):
        strategy.convert(outer, 3)
    outer.fit(X, X[:, :3], verbose=0)
    del outer
    strategy.convert(inner, tfpar.MeshStrategy(Mesh()))


@pytest.mark.parametrize("name", ["cube", "pipeline"])
def test_exported_before_it_is_used(name, whole, tmp_path):
    model = fresh(name)
    model.export(tmp_path / "served", verbose=False)
    assert_same(whole, fit(model, 4), 1e-5, 1e-7)
    strategy = STRATEGIES[name]()
    assert {c.device[-5:] for v in model.weights for c in v.value.copies} == {*strategy.mesh.devices}


@pytest.mark.fast
def test_a_function_that_reads_too_early():
    model = fresh("cube")
    tf.function(lambda: tf.reduce_sum(model.layers[1].kernel))()
    with pytest.raises(tfpar.ScopeError, match="call fit, evaluate or predict first"):
        fit(model, 1)


@pytest.mark.fast
def test_convert_between_replicas_and_stages():
    """Metrics of replicas are sums of their own; subclassed models have no configuration to build them from."""

    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.first, self.second = keras.layers.Dense(4, activation="tanh"), keras.layers.Dense(3)

        def call(self, x):
            return keras.ops.softmax(self.second(self.first(x)))

    replicas, stages = tfpar.DataParallelStrategy(["CPU:0", "CPU:1"]), tfpar.LayerPlacementStrategy(["CPU:2", "CPU:3"])
    one, other = (compiled(s, adam, build=Own) for s in (None, replicas))
    for current, following in ((replicas, stages), (stages, replicas)):
        for model in (one, other):
            fit(model, 1)
        current.convert(other, following)
        found = [m.evaluate(X, Y, verbose=0, return_dict=True) for m in (one, other)]
        assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert_same(one, other, 1e-5, 1e-7)


# ---- memory

MEASURE = pathlib.Path(__file__).parent.parent / "peak_memory.py"


@pytest.mark.parametrize("mesh", mostly(["zero 3", "ranks"], ["zero 3"]))
def test_peak_memory(mesh, tmp_path):
    """Neither creating a model, nor writing, nor reading its file holds all of it a second time."""
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}  # what is freed goes back to the system
    run = subprocess.run([sys.executable, str(MEASURE), mesh, str(tmp_path)], capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stderr
    whole, *peaks = map(float, run.stdout.split()[-5:])
    assert whole < peaks[0] and max(peaks) < 1.25 * whole, (whole, peaks)
