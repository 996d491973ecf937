"""What cannot work says so, with what to do; nothing hangs, and nothing is silently wrong."""

import re
import types
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops
from training import STRATEGIES, WIDTH, build, check, compiled, data, history, some_fast

import tfpar
from tfpar import BatchError, DeviceError, ModelError, PartitionError, ScheduleError, ScopeError
from tfpar.comm.devices import each_gpu_is_one_device
from tfpar.planning.schedule import forward_only
from tfpar.testing import logical_cpus

X, Y = data()
TWO = ["CPU:0", "CPU:1"]


def fit(strategy, build=build, x=X, y=Y, **fit):
    with strategy.scope():
        model = build()
        model.compile("sgd", "sparse_categorical_crossentropy")
    model.fit(x, y, verbose=0, **fit)
    return model


# ---- devices


@pytest.mark.fast
@pytest.mark.parametrize("make", [tfpar.LayerPlacementStrategy, tfpar.PipelineStrategy])
def test_devices(make):
    with pytest.raises(DeviceError, match="no device 'GPU:0'; there are CPU:0, CPU:1"):
        make(["GPU:0"])
    with pytest.raises(DeviceError, match="no device 'CPU:99'"):
        make(["CPU:99"])
    with pytest.raises(DeviceError, match="each device has one place in a mesh; CPU:1 repeats"):
        make(["CPU:1", "CPU:0", "/device:CPU:1"])
    assert make().mesh.stage == 8  # all logical CPUs where there is no GPU
    assert make(["/job:localhost/replica:0/task:0/device:CPU:2", "cpu:3"]).mesh.devices == ("CPU:2", "CPU:3")


@pytest.mark.fast
def test_other_ways_to_name_devices():
    logical = tf.config.list_logical_devices("CPU")
    for devices, names in (("CPU:1", ["CPU:1"]), (2, TWO), (logical[2:4], ["CPU:2", "CPU:3"]), (logical[1], ["CPU:1"])):
        assert tfpar.DataParallelStrategy(devices).mesh.devices == tuple(names)
    for devices, match in {
        "/job:worker/task:3/device:CPU:1": "is on another host; a strategy's devices are on this one: CPU:0",
        "/job:localhost/task:1/device:CPU:1": "is on another host",
        "CPU:a:b": "there is no device 'CPU:a:b'",
        9: "there are 8 devices, CPU:0, CPU:1.*; 9 were asked for",
        0: "; 0 were asked for",
        (1, 2): "devices are names such as 'CPU:0', tf.config.LogicalDevice objects, or how many",
        True: "; received True",
    }.items():
        with pytest.raises(DeviceError, match=match):
            tfpar.DataParallelStrategy(devices)


@pytest.mark.fast
def test_fewer_devices_than_one_would_think(monkeypatch):
    with pytest.warns(UserWarning, match=r"zero=3 divides between replicas, and Mesh\(stage=2\) has one") as warned:
        strategy = tfpar.MeshStrategy(tfpar.Mesh(stage=2), zero=3)
    assert warned[0].filename == __file__
    assert strategy.buckets == 1 and strategy.zero == 0
    with pytest.raises(ModelError, match=r"Mesh\(shard=2\) divides by `shard` what ZeRO divides: give zero=1, 2 or 3"):
        tfpar.MeshStrategy(tfpar.Mesh(shard=2))
    one = tf.config.list_logical_devices()[:1]
    monkeypatch.setattr(tf.config, "list_logical_devices", lambda *_: one)
    with pytest.warns(
        UserWarning, match="DataParallelStrategy found one device, CPU:0, so nothing is divided"
    ) as warned:
        tfpar.DataParallelStrategy()
    assert warned[0].filename == __file__ and "tfpar.testing.logical_cpus(4)" in str(warned[0].message)
    with warnings.catch_warnings(action="error"):
        tfpar.DataParallelStrategy("CPU:0"), tfpar.MeshStrategy(tfpar.Mesh())


def test_batches_that_leave_replicas_idle():
    for size, match in ((3, "a batch of 3 samples keeps 3 of 4 replicas busy: make batches of at least 4"), (4, None)):
        model = compiled(tfpar.DataParallelStrategy(4))
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            model.fit(X[:9], Y[:9], batch_size=size, shuffle=False, verbose=0)  # the last one may be smaller
        found = [w for w in found if "replicas busy" in str(w.message)]
        assert [str(w.message) for w in found] == ([match] if match else [])
        assert all(w.filename == __file__ for w in found)


@pytest.mark.fast
def test_the_gpus_that_are_visible_count(monkeypatch):
    gpus = [types.SimpleNamespace(name=f"/device:GPU:{n}", device_type="GPU") for n in range(8)]
    monkeypatch.setattr(tf.config, "list_logical_devices", lambda kind=None: gpus[:2])
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind=None: gpus)
    monkeypatch.setattr(tf.config, "get_visible_devices", lambda kind=None: gpus[:2])
    assert each_gpu_is_one_device()
    monkeypatch.setattr(tf.config, "get_visible_devices", lambda kind=None: gpus[:1])
    assert not each_gpu_is_one_device()


@pytest.mark.fast
@pytest.mark.parametrize("buckets", [0, -1, 2.5])
def test_buckets(buckets):
    with pytest.raises(ModelError, match=f"buckets is a whole number of at least 1; received {buckets}"):
        tfpar.DataParallelStrategy(TWO, buckets=buckets)


# ---- the cut


@pytest.mark.fast
def test_fewer_layers_than_stages():
    message = "cannot cut 3 layers into 8 stages: a stage needs at least one layer; use at most 3 devices"
    with pytest.raises(PartitionError, match=message):
        fit(tfpar.PipelineStrategy())


PLACEMENTS = {
    "unknown": (["dense9"], "no layer 'dense9'; the nearest names are dense, dense_2, dense_1"),
    "unknown in a mapping": ({"dens": 1}, "no layer 'dens'; the nearest names are dense"),
    "too few": ([], "2 stages need 1 names where a new one begins; received 0"),
    "first": (["dense"], "each after at least one layer"),
    "backwards": ({"dense": 1, "dense_1": 0, "dense_2": 1}, "dense_1 .*stage 0.*dense.*stage 1"),
    "out of range": ({"dense_2": 2}, "dense_2 is placed on stage 2; the stages are 0 to 1"),
    "unused": ({"dense_2": 0}, "no layer is placed on stage 1"),
    "a word": ("dense_2", "placement is"),
    "a number": (3, "placement is"),
}


@pytest.mark.fast
@pytest.mark.parametrize("name", PLACEMENTS)
@pytest.mark.parametrize("make", [tfpar.LayerPlacementStrategy, tfpar.PipelineStrategy])
def test_placement(make, name):
    placement, message = PLACEMENTS[name]

    def named():
        x = layers.Input((WIDTH,))
        h = layers.Dense(5, name="dense_1")(layers.Dense(5, name="dense")(x))
        return keras.Model(x, layers.Dense(3, activation="softmax", name="dense_2")(h))

    with pytest.raises(PartitionError, match=message):
        fit(make(TWO, placement=placement), named)


# ---- schedules and micro-batches


@pytest.mark.fast
@pytest.mark.parametrize("micro_batches", [0, -1, 2.0, "8"])
def test_micro_batches(micro_batches):
    with pytest.raises(ScheduleError, match="a whole number of at least 1; received"):
        tfpar.PipelineStrategy(TWO, micro_batches=micro_batches)


@pytest.mark.fast
def test_schedule():
    with pytest.raises(ScheduleError, match="'gpipe', '1f1b', 'eager-1f1b' or a function.*received 'zb'"):
        tfpar.PipelineStrategy(TWO, schedule="zb")
    for wrong in (
        lambda stages, parts: "0F0",
        lambda stages, parts: tfpar.gpipe(3, parts),
        lambda stages, parts: tfpar.gpipe(stages, 3),
        lambda stages, parts: forward_only(tfpar.gpipe(stages, parts)),
    ):
        with pytest.raises(ScheduleError, match="(?s)for 2 devices and 8 micro-batches.*received\n0F0"):
            fit(tfpar.PipelineStrategy(TWO, schedule=wrong))


def test_more_micro_batches_than_samples():
    check(tfpar.PipelineStrategy(TWO, micro_batches=16), history(X, Y, batch_size=3))


# ---- batches


@pytest.mark.fast
def test_empty_batch(strategy):
    model = compiled(strategy)
    for call in (model.train_on_batch, model.test_on_batch):
        with pytest.raises(BatchError, match="the batch has no samples"):
            call(X[:0], Y[:0])
    with pytest.raises(BatchError, match="the batch has no samples"):
        model.predict_on_batch(X[:0])
    data = tf.data.Dataset.from_tensor_slices((X, Y)).batch(8).concatenate(tf.data.Dataset.from_tensors((X[:0], Y[:0])))
    with pytest.raises(BatchError, match="drop it from the data"):
        model.fit(data, verbose=0)
    model.fit(X, Y, verbose=0)


@pytest.mark.fast
def test_unequal_lengths(strategy):
    model = compiled(strategy)
    with pytest.raises(BatchError, match="must be equally long; received .*20.*19"):
        model.fit(tf.data.Dataset.from_tensors((X, Y[:19])), verbose=0)
    with pytest.raises(BatchError, match="no batch dimension"):
        model.fit(tf.data.Dataset.from_tensors((X, Y[0])), verbose=0)


@pytest.mark.fast
def test_wrong_shape_says_what_keras_says(strategy):
    with pytest.raises(ValueError, match=re.escape("expected shape=(None, 6), found shape=(None, 5)")):
        compiled(strategy).fit(X[:, :5], Y, verbose=0)


def test_labels_out_of_range(strategy):
    """NaN on every device, as Keras gives on a GPU; TensorFlow's error on a CPU."""
    with pytest.raises((tf.errors.InvalidArgumentError, ValueError), match="valid range"):
        compiled(strategy).fit(X, Y + 3, verbose=0)
    model = compiled(strategy)
    model.fit(X, Y, verbose=0)


# ---- scopes


@pytest.mark.fast
def test_built_outside(strategy):
    model = compiled(None)
    with pytest.raises(ScopeError, match="not constructed in this strategy's scope"):
        strategy.explain(model)
    layer = layers.Dense(4, name="early")
    layer.build((None, WIDTH))

    def mixed():
        x = layers.Input((WIDTH,))
        return keras.Model(x, layers.Dense(3, activation="softmax")(layer(x)))

    with pytest.raises(
        ScopeError, match="early/kernel was created outside of this strategy's scope.*\n.*with strategy"
    ):
        fit(strategy, mixed)


@pytest.mark.fast
def test_layer_of_another_strategy():
    strategies = [make() for make in STRATEGIES.values()]
    with strategies[0].scope():
        model = build()
    with strategies[1].scope(), pytest.raises(ScopeError, match="was created outside of this strategy's scope"):
        other = keras.Model(model.input, layers.Dense(3, activation="softmax")(model.layers[1].output))
        other.compile("sgd", "sparse_categorical_crossentropy")
        other.fit(X, Y, verbose=0)


def test_a_second_strategy():
    """Any number of them, one after the other; not one in the other's scope."""
    one, other = (make() for make in STRATEGIES.values())
    fit(one), fit(other), fit(one)
    with (
        one.scope(),
        pytest.raises(ScopeError, match="scope of a LayerPlacementStrategy, .* no scope of a PipelineStrategy"),
        other.scope(),
    ):
        pass
    with one.scope():
        fit(one)
    fit(other)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_compiled_in_the_scope_of_no_model_of_its(strategy, optimizer):
    """A model that was built outside, or elsewhere, would train on one device, or fail with TensorFlow's own words."""
    plain, other = build(), compiled(tfpar.DataParallelStrategy(2))
    message = "was constructed outside of this .*Strategy's scope, so it is of {}, and {} would not divide it"
    with strategy.scope():
        with pytest.raises(ScopeError, match=message.format("none", "compile")):
            plain.compile(optimizer, "mse")
        with pytest.raises(ScopeError, match=message.format("another strategy", "compile")):
            other.compile(optimizer, "mse")
        with pytest.raises(ScopeError, match=message.format("another strategy", "fit")):
            other.fit(X, Y, verbose=0)
    history(X, Y)(other)


def test_weights_that_a_layer_gets_later():
    strategy = tfpar.TensorParallelStrategy(2)
    with strategy.scope():
        model = build()
    model.layers[1].enable_lora(2)
    model.compile("sgd", "sparse_categorical_crossentropy")
    with pytest.raises(ScopeError, match="lora_kernel_a was created outside (?s:.*)enable_lora and the like"):
        model.fit(X, Y, verbose=0)
    with strategy.scope():
        model = build()
        model.layers[1].enable_lora(2)
        model.compile("sgd", "sparse_categorical_crossentropy")
    history(X, Y)(model)


@pytest.mark.fast
def test_a_mesh_strategy_without_a_mesh():
    with pytest.raises(DeviceError, match=r"belong to a Mesh: MeshStrategy\(Mesh\(data=2\)\)"):
        tfpar.MeshStrategy(data=2)
    with pytest.raises(DeviceError, match=r"MeshStrategy\(Mesh\(data=2, tensor=2\)\); received 4"):
        tfpar.MeshStrategy(4)
    with pytest.raises(TypeError, match="has no argument stages"):
        tfpar.MeshStrategy(tfpar.Mesh(), stages=2)


@pytest.mark.fast
def test_logical_cpus_come_first():
    for options in ({}, {"threads": 2}):
        with pytest.raises(DeviceError, match="TensorFlow has started, with 8 CPU devices: call logical_cpus"):
            logical_cpus(4, **options)


def test_compiled_outside(strategy):
    """An optimizer made outside of the scope is given to the strategy with the model."""
    one = compiled()
    with strategy.scope():
        keras.utils.set_random_seed(3)
        other = build()
    other.compile(keras.optimizers.SGD(momentum=0.9), "sparse_categorical_crossentropy")
    one.compile(keras.optimizers.SGD(momentum=0.9), "sparse_categorical_crossentropy")
    assert history(X, Y)(one)["loss"] == pytest.approx(history(X, Y)(other)["loss"])
    assert len({v.value.device for v in other.optimizer.variables}) == 2


@pytest.mark.fast
def test_never_compiled(strategy):
    with strategy.scope():
        model = build()
    assert model.predict(X, verbose=0).shape == (20, 3)
    with pytest.raises(ValueError, match="compile"):
        model.fit(X, Y, verbose=0)


# ---- models


class Raw(keras.Model):
    """A TensorFlow function between layers, which cannot be followed."""

    def __init__(self):
        super().__init__()
        self.first, self.last = layers.Dense(4), layers.Dense(3, activation="softmax")

    def call(self, x):
        return self.last(tf.nn.relu(self.first(x)))


class Wrapped(Raw):
    """The same in a layer."""

    def __init__(self):
        super().__init__()
        self.relu = layers.Lambda(tf.nn.relu)

    def call(self, x):
        return self.last(self.relu(self.first(x)))


def test_raw_tensorflow_in_a_subclassed_model(strategy):
    with pytest.raises(ModelError, match="(?s)Raw.*keras.layers.Lambda"):
        fit(strategy, Raw)
    check(strategy, history(X, Y, batch_size=8), build=Wrapped)


class Counting(keras.Model):
    """Does something else each time."""

    def __init__(self):
        super().__init__()
        self.parts, self.calls = [layers.Dense(3) for _ in range(3)], 0

    def call(self, x):
        self.calls += 1
        return ops.softmax(self.parts[0](x) + self.parts[1](x) * float(self.calls))


@pytest.mark.fast
def test_a_subclassed_model_that_is_not_what_it_seems(strategy):
    with pytest.raises(ModelError, match="Counting"):
        fit(strategy, Counting)


@pytest.mark.fast
@pytest.mark.parametrize("name", ["data", "zero", *STRATEGIES])
def test_no_gradient_for_any_weight(name):
    make = {"data": lambda: tfpar.DataParallelStrategy(2), "zero": lambda: tfpar.DataParallelStrategy(2, zero=3)}
    strategy = {**make, **STRATEGIES}[name]()

    def stopped():
        x = layers.Input((WIDTH,))
        h = layers.Dense(3, activation="softmax")(layers.Dense(4)(layers.Dense(4)(x)))
        return keras.Model(x, ops.stop_gradient(h))

    with pytest.raises(ValueError, match="No gradients provided for any variable"):
        fit(strategy, stopped)


@pytest.mark.fast
def test_outputs_without_a_batch():
    def scalar():
        x = layers.Input((WIDTH,))
        return keras.Model(x, ops.sum(layers.Dense(3)(x)))

    for make in STRATEGIES.values():
        strategy = make()
        with strategy.scope():
            model = scalar()
        if strategy.micro_batches > 1:
            with pytest.raises(ModelError, match="micro_batches=1"):
                model.predict_on_batch(X)
        else:
            assert np.isfinite(model.predict_on_batch(X))


@pytest.mark.fast
def test_nothing_is_left_of_a_failure(strategy):
    """After an error the same process trains as before."""
    for wrong in (Raw, Counting):
        with pytest.raises(ModelError):
            fit(strategy, wrong)
    check(strategy, history(X, Y, batch_size=8))


# ---- layers that need their batch whole


class TrainingMean(layers.Layer):
    def call(self, x, training=None):
        return x - ops.mean(x, axis=0) if training else x


class Norm(layers.Layer):
    def __init__(self, over):
        super().__init__(name=f"norm_{over + 1}")
        self.over = over

    def build(self, shape):
        self.scale = self.add_weight(initializer="ones")

    def call(self, x):
        return self.scale * x / ops.norm(x, axis=self.over, keepdims=True)


WHOLE = {
    "only in training": lambda h: TrainingMean(name="centred")(h),
    "only negative numbers": lambda h: layers.Lambda(lambda t: t + ops.max(ops.relu(-t), axis=0, keepdims=True))(h),
    "the second of a class": lambda h: Norm(0)(Norm(-1)(h)),
    "a negative axis": lambda h: layers.Softmax(axis=-2)(h),
}


@pytest.mark.parametrize("name", some_fast(WHOLE, "the second of a class"))
def test_layers_that_mix_samples(name):
    def mixed():
        x = layers.Input((WIDTH,))
        return keras.Model(x, layers.Dense(3, activation="softmax")(WHOLE[name](layers.Dense(5)(x))))

    with pytest.raises(ModelError, match="(centred|lambda|norm_1|softmax) mixes the samples of a batch"):
        fit(tfpar.PipelineStrategy(TWO), mixed)
    check(tfpar.LayerPlacementStrategy(TWO), history(X, Y, batch_size=8), build=mixed)


def test_stateful_recurrent_layers():
    def stateful():
        x = layers.Input((4, 2), batch_size=10)
        h = layers.LSTM(3, stateful=True, name="memory")(x)
        return keras.Model(x, layers.Dense(3, activation="softmax")(h))

    x = np.random.default_rng(0).normal(size=(20, 4, 2)).astype("float32")
    with pytest.raises(ModelError, match="memory keeps a state for each sample.*micro_batches=1"):
        fit(tfpar.PipelineStrategy(TWO), stateful, x=x, batch_size=10)
    check(tfpar.LayerPlacementStrategy(TWO), history(x, Y, batch_size=10), build=stateful)


def test_sparse_input():
    dense = np.eye(WIDTH, dtype="float32")[np.arange(20) % WIDTH]
    sparse = tf.data.Dataset.from_tensor_slices((tf.sparse.from_dense(dense), Y)).batch(10)

    def model():
        x = layers.Input((WIDTH,), sparse=True)
        return keras.Model(x, layers.Dense(3, activation="softmax")(layers.Dense(5)(x)))

    for strategy in (tfpar.PipelineStrategy(TWO), tfpar.LayerPlacementStrategy(TWO), tfpar.DataParallelStrategy(TWO)):
        check(strategy, lambda m: m.fit(sparse, verbose=0).history, build=model)
