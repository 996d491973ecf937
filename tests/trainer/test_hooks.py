"""Keras as it is: what people do with `fit` and its relatives gives what one device gives."""

import contextlib

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from training import ROWS, STRATEGIES, WIDTH, build, check, compiled, data, history, mostly, some_fast

import tfpar
from tfpar.errors import ModelError
from tfpar.testing import assert_same, difference
from tfpar.trainer import model_call


def test_arrays_with_validation(strategy):
    x, y = data()
    check(strategy, history(x, y, batch_size=8, epochs=2, validation_split=0.25))


def test_lists(strategy):
    x, y = data()
    check(strategy, lambda m: m.evaluate([x], y, batch_size=8, return_dict=True, verbose=0))


def batches(x, y):
    return [(x[i : i + 8], y[i : i + 8]) for i in range(0, len(x), 8)]


class Sequence(keras.utils.PyDataset):
    def __len__(self):
        return 3

    def __getitem__(self, index):
        return batches(*data())[index]


INPUTS = {
    "dataset": lambda: tf.data.Dataset.from_tensor_slices(data()).batch(8),
    "full batches": lambda: tf.data.Dataset.from_tensor_slices(data()).batch(8, drop_remainder=True),
    "generator": lambda: (batch for batch in batches(*data()) * 2),
    "PyDataset": lambda: Sequence(workers=1),
    "PyDataset in threads": lambda: Sequence(workers=2, use_multiprocessing=False),
}


@pytest.mark.parametrize("kind", some_fast(INPUTS, "dataset"))
def test_input(strategy, kind):
    steps = {"steps_per_epoch": 3} if kind == "generator" else {}
    check(strategy, lambda m: m.fit(INPUTS[kind](), epochs=2, verbose=0, shuffle=False, **steps).history)


def test_shuffling_is_that_of_one_device(strategy):
    x, y = data()
    check(
        strategy, lambda m: (keras.utils.set_random_seed(5), m.fit(x, y, batch_size=8, epochs=2, verbose=0).history)[1]
    )


@pytest.mark.fast
def test_class_weight(strategy):
    x, y = data()
    check(strategy, history(x, y, batch_size=8, class_weight={0: 0.2, 1: 1.0, 2: 3.0}), weighted_metrics=["accuracy"])


@pytest.mark.fast
def test_batches_of_the_user(strategy):
    x, y = data()

    def use(model):
        first = model.train_on_batch(x[:7], y[:7], sample_weight=np.arange(7.0), return_dict=True)
        second = model.train_on_batch(x[7:12], y[7:12], class_weight={0: 1.0, 1: 2.0, 2: 0.5})
        return first, second, model.test_on_batch(x, y), model.predict_on_batch(x[:5]), model.predict_on_batch(x[:1])

    check(strategy, use)


def test_steps_per_execution_counts_as_on_one_device(strategy):
    x, y = data(40)

    class Count(keras.callbacks.Callback):
        def __init__(self):
            super().__init__()
            self.seen = []

        def on_train_batch_end(self, batch, logs=None):
            self.seen.append((batch, float(logs["loss"])))

    def use(model):
        count = Count()
        model.fit(x, y, batch_size=8, verbose=0, shuffle=False, callbacks=[count])
        return count.seen, model.predict(x, batch_size=8, verbose=0)

    check(strategy, use, steps_per_execution=2)


@pytest.mark.fast
def test_run_eagerly(strategy):
    x, y = data(9)
    check(strategy, history(x, y, batch_size=4), run_eagerly=True)


def test_jit_compile(strategy):
    x, y = data(12)
    one, other = check(strategy, history(x, y, batch_size=8), jit_compile=True)
    assert other.jit_compile


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("own_step", [False, True])
def test_a_layer_that_assigns_what_is_trained(strategy, own_step, jit):
    """As on one device, the gradient is applied to what was assigned, and does not go through the assignment."""

    class Own(keras.Model):
        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                loss = self.compute_loss(y=y, y_pred=self(x, training=True))
            weights = self.trainable_weights
            self.optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))
            return {"loss": loss}

    def build():
        x = layers.Input((WIDTH,))
        h = layers.SpectralNormalization(layers.Dense(8, activation="tanh"))(x)
        y = layers.Dense(3, activation="softmax")(layers.SpectralNormalization(layers.Dense(6))(h))
        return (Own if own_step else keras.Model)(x, y)

    x, y = data(16)
    check(strategy, history(x, y, batch_size=8, epochs=2), build=build, metrics=lambda: None, jit_compile=jit)


@pytest.mark.fast
def test_jit_compile_is_off_on_cpus(strategy):
    assert not compiled(strategy).jit_compile


OPTIMIZERS = {
    "SGD": lambda: keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "clipvalue": lambda: keras.optimizers.SGD(0.1, clipvalue=0.01),
    "global_clipnorm": lambda: keras.optimizers.SGD(0.1, global_clipnorm=0.05),
    "accumulated, clipped": lambda: keras.optimizers.Adam(0.1, gradient_accumulation_steps=2, clipnorm=0.05),
    "averaged": lambda: keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.9),
    "overwritten by averages": lambda: keras.optimizers.Adam(0.1, use_ema=True, ema_overwrite_frequency=2),
    "schedule": lambda: keras.optimizers.SGD(keras.optimizers.schedules.ExponentialDecay(0.1, 2, 0.5)),
    "callable rate": lambda: keras.optimizers.SGD(lambda: 0.05),
    "scaled": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.1), dynamic_growth_steps=2),
    **{
        name: getattr(keras.optimizers, name)
        for name in (
            "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "Ftrl", "Lamb", "Lion", "Muon", "Nadam",
            "RMSprop",
        )
        if hasattr(keras.optimizers, name)
    },
}  # fmt: skip


@pytest.mark.parametrize("name", mostly(OPTIMIZERS, list(OPTIMIZERS)[::2], ["global_clipnorm", "averaged"]))
def test_optimizer(name):
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    x, y = data()
    check(STRATEGIES["pipeline"](), history(x, y, batch_size=8, epochs=2), 1e-9, 1e-10, optimizer=OPTIMIZERS[name])


@pytest.mark.fast
def test_every_optimizer_is_tested():
    base = keras.optimizers.Optimizer
    kinds = {
        n for n, v in vars(keras.optimizers).items() if isinstance(v, type) and issubclass(v, base) and v is not base
    }
    # wrong on one device unless it was built eagerly, and one that only holds others
    assert kinds - set(OPTIMIZERS) - {"LossScaleOptimizer"} <= {"ScheduleFreeAdamW", "MultiOptimizer"}


@pytest.mark.parametrize("policy", some_fast(["mixed_float16", "mixed_bfloat16"], "mixed_bfloat16"))
def test_mixed_precision(strategy, policy):
    keras.config.set_dtype_policy(policy)
    x, y = data()
    tolerance = 2e-2 if policy == "mixed_bfloat16" else 2e-3  # of a sum of products in this type
    one, other = check(strategy, history(x, y, batch_size=8), tolerance, tolerance, optimizer="adam")
    assert isinstance(other.optimizer, keras.optimizers.LossScaleOptimizer) == (policy == "mixed_float16")
    assert {v.dtype for v in other.weights} == {"float32"}


@pytest.mark.fast
def test_overflow_skips_the_update_everywhere(strategy):
    keras.config.set_dtype_policy("mixed_float16")
    x, y = data(8)
    model = compiled(
        strategy,
        optimizer=lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1), initial_scale=2.0**60),
    )
    before = model.get_weights()
    model.fit(x, y, verbose=0)
    assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))
    assert float(model.optimizer.dynamic_scale) == 2.0**59


LOSSES = {
    "sum": keras.losses.SparseCategoricalCrossentropy(reduction="sum"),
    "mean_with_sample_weight": keras.losses.SparseCategoricalCrossentropy(reduction="mean_with_sample_weight"),
    "a function": lambda y, p: keras.ops.abs(keras.ops.cast(y, p.dtype) - p[:, 0]),
    "a scalar": lambda y, p: keras.ops.mean(keras.ops.square(keras.ops.cast(y, p.dtype) - p[:, 0])),
    "across samples": lambda y, p: keras.ops.abs(p[:, 0] - keras.ops.mean(p[:, 0])),
    "unreduced": keras.losses.SparseCategoricalCrossentropy(reduction=None),
    "Dice": keras.losses.Dice(),
    "Circle": keras.losses.Circle(remove_diagonal=False),
}
WHOLE = ("Dice", "Circle")  # one number for a batch: there is nothing for weights of samples to weigh


@pytest.mark.parametrize(
    "name, weighted",
    some_fast(
        [(name, weighted) for name in LOSSES for weighted in (False, True) if not weighted or name not in WHOLE],
        ("mean_with_sample_weight", True), ("Dice", False),
    ),
)  # fmt: skip
def test_loss(strategy, name, weighted):
    x, y = data()
    y = keras.utils.to_categorical(y, 3) if name == "Dice" else y
    weights = np.linspace(0.1, 3.0, ROWS) if weighted else None
    check(strategy, history(x, y, batch_size=8, sample_weight=weights), loss=LOSSES[name], metrics=list)


class OwnLoss(keras.Model):
    def compute_loss(self, x, y, y_pred, sample_weight=None, training=True):
        return keras.ops.sum(keras.ops.square(y_pred)) + keras.ops.sum(self.losses)

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        return {"loss": keras.ops.max(y_pred), "rows": keras.ops.shape(x)[0]}


class OwnSteps(keras.Model):
    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            with tf.GradientTape() as inner:
                inner.watch(x)
                y_pred = self(x, training=True)
            loss = self.compute_loss(x, y, y_pred) + keras.ops.mean(inner.gradient(y_pred, x) ** 2)
        gradients = tape.gradient(loss, self.trainable_weights)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_weights, strict=True))
        return {"loss": loss}

    def test_step(self, data):
        return {"sum": keras.ops.sum(self(data[0], training=False))}

    def predict_step(self, data):
        return 2.0 * self(data, training=False)


class OwnGradient(OwnSteps):
    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            tape.watch(x)
            y_pred = self(x, training=True)
            loss = self.compute_loss(x, y, y_pred)
        *gradients, of_x = tape.gradient(loss, [*self.trainable_weights, x])
        self.optimizer.apply_gradients(zip(gradients, self.trainable_weights, strict=True))
        return {"loss": loss, "slope": keras.ops.sum(keras.ops.abs(of_x))}


@pytest.mark.parametrize("kind", some_fast([OwnLoss, OwnGradient], OwnLoss))
def test_overridden_steps(strategy, kind):
    x, y = data()

    def build():
        inputs = layers.Input((WIDTH,))
        h = layers.Dense(4, activity_regularizer="l2")(layers.Dense(5, kernel_regularizer="l2")(inputs))
        return kind(inputs, layers.Dense(3, activation="softmax")(h))

    def use(model):
        # predictions of a batch of 8, so that the second model's come in the same batches
        return history(x, y, batch_size=8)(model), model.predict(x, batch_size=8, verbose=0)

    check(strategy, use, build=build, metrics=lambda: None)


class Adversaries(keras.Model):
    """Two models in one, each with its optimizer, and no call of its own."""

    def __init__(self):
        super().__init__()
        self.judge = keras.Sequential([layers.Input((WIDTH,)), layers.Dense(4, "relu"), layers.Dense(1)], name="judge")
        self.forger = keras.Sequential(
            [layers.Input((3,)), layers.Dense(4, "relu"), layers.Dense(WIDTH)], name="forger"
        )

    def compile(self, optimizer, other, **_):
        super().compile(optimizer)
        self.other = other

    def train_step(self, data):
        x, _ = data
        softplus, mean = keras.ops.softplus, keras.ops.mean
        forged = self.forger(x[:, :3], training=True)
        with tf.GradientTape() as tape:
            loss = mean(softplus(-self.judge(x, training=True))) + mean(softplus(self.judge(forged, training=True)))
        weights = self.judge.trainable_weights
        self.optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))
        with tf.GradientTape() as tape:
            other = mean(softplus(-self.judge(self.forger(x[:, :3], training=True), training=True)))
        weights = self.forger.trainable_weights
        self.other.apply_gradients(zip(tape.gradient(other, weights), weights, strict=True))
        return {"loss": loss, "other": other}


def test_models_in_a_model(strategy):
    x, y = data()
    models = []
    for s in (None, strategy):
        keras.utils.set_random_seed(3)
        with s.scope() if s else contextlib.nullcontext():
            model = Adversaries()
            model.compile(keras.optimizers.SGD(0.1), keras.optimizers.SGD(0.1))
        models.append((model, history(x, y, batch_size=8, epochs=2)(model)))
    (one, a), (other, b) = models
    assert all(difference(a[k], b[k]) < 1e-5 for k in a)
    assert_same(one, other, 1e-5, 1e-7)
    assert len({v.value.device for v in other.judge.weights}) == 2


def test_frozen_layers_and_a_second_compile(strategy):
    x, y = data()

    def use(model):
        first = history(x, y, batch_size=8)(model)
        model.layers[1].trainable = False
        model.compile(keras.optimizers.SGD(0.5), "sparse_categorical_crossentropy")
        return first, history(x, y, batch_size=8)(model)

    check(strategy, use)


def test_frozen_without_a_second_compile(strategy):
    """As in Keras, that counts when the model is compiled again."""
    x, y = data()

    def use(model):
        first = history(x, y, batch_size=8)(model)
        model.layers[1].trainable = False
        return first, history(x[:15], y[:15], batch_size=5)(model)

    check(strategy, use)


def test_metrics_see_the_whole_batch(strategy):
    x, y = data()
    own = lambda y, p: keras.ops.std(p)  # noqa: E731  (not a mean over samples)

    def metrics():
        return [keras.metrics.F1Score(), keras.metrics.AUC(num_thresholds=20), own, "categorical_accuracy"]

    check(
        strategy, history(x, keras.utils.to_categorical(y, 3), batch_size=8, epochs=2, validation_split=0.2),
        loss="categorical_crossentropy", metrics=metrics,
    )  # fmt: skip


@pytest.mark.fast
def test_a_model_that_shares_layers_with_a_trained_one(strategy):
    x, y = data()
    with strategy.scope():
        model = compiled(strategy)
        part = keras.Model(model.input, model.layers[2].output)
    untrained = part.predict(x, verbose=0)
    model.fit(x, y, verbose=0)
    trained = part.predict(x, verbose=0)
    assert difference(untrained, trained) > 1e-3
    assert difference(np.asarray(part(x)), trained) < 1e-6


def test_two_strategies_in_one_process():
    x, y = data()
    for make in STRATEGIES.values():
        check(make(), history(x, y, batch_size=8))


def test_unseeded_random_numbers(strategy):
    """They come from Keras' global seed, which no layer owns."""
    x, y = data()

    class Noise(layers.Layer):
        def call(self, x, training=None):
            return x + keras.random.normal((WIDTH,)) if training else x

    def build():
        inputs = layers.Input((WIDTH,))
        return keras.Model(inputs, layers.Dense(3, activation="softmax")(layers.Dense(5)(Noise()(inputs))))

    models = []
    for s in (None, strategy, strategy):
        keras.utils.clear_session(free_memory=False)
        model = compiled(s, build=build)
        models.append((model, history(x, y, batch_size=8, epochs=2)(model)["loss"]))
    (one, expected), (other, found), (again, same) = models
    assert found == same and found[0] != found[1]
    assert_same(other, again, 0.0)
    if strategy.micro_batches == 1:
        assert difference(expected, found) < 1e-5
        assert_same(one, other, 1e-5, 1e-7)


PROBABILITIES = {  # activation, loss, factor of the initial weights
    "softmax": ("softmax", "sparse_categorical_crossentropy", 20.0),
    "a layer": (layers.Softmax(), "sparse_categorical_crossentropy", 20.0),
    "TensorFlow's softmax": (tf.nn.softmax, "sparse_categorical_crossentropy", 20.0),
    "TensorFlow's sigmoid": (tf.sigmoid, "binary_crossentropy", 20.0),
    "another's sigmoid": (tf.sigmoid, "categorical_crossentropy", 3.0),
}


@pytest.mark.parametrize("name", PROBABILITIES)
def test_extreme_probabilities(strategy, name):
    """Keras computes crossentropies from the logits that it finds behind probabilities, which 0 and 1 would lose."""
    activation, loss, factor = PROBABILITIES[name]
    x, y = data()
    y = y if loss.startswith("sparse") else keras.utils.to_categorical(y, 3)

    def build():
        inputs = layers.Input((WIDTH,))
        return keras.Model(inputs, layers.Dense(3, activation=activation)(layers.Dense(4)(inputs)))

    def use(model):
        model.set_weights([factor * w for w in model.get_weights()])
        return history(x, y, batch_size=8, validation_split=0.2)(model), model.evaluate(x, y, verbose=0)

    optimizer = lambda: keras.optimizers.SGD(1e-3)  # noqa: E731
    check(strategy, use, optimizer=optimizer, build=build, loss=loss, metrics=lambda: [loss])


# ---- what a review found: each was wrong, silently or with a crash


def with_a_layer(make):
    """The model of these tests with one more layer in it."""

    def build():
        x = layers.Input((WIDTH,))
        h = make()(layers.Dense(5, name="before")(x))
        return keras.Model(x, layers.Dense(3, activation="softmax", name="after")(h))

    return build


def test_a_loss_that_reads_a_weight(strategy):
    x, y = data()
    for mean in (keras.ops.mean, lambda v, axis: keras.ops.mean(v)):

        def use(model, mean=mean):
            kernel = model.layers[1].kernel

            def loss(y, p):
                return mean(keras.ops.square(p), axis=-1) + 0.1 * keras.ops.sum(keras.ops.square(kernel))

            model.compile(keras.optimizers.SGD(0.1), loss)
            return history(x, y, batch_size=8)(model)

        check(strategy, use)


def test_models_that_share_layers_train_on(strategy):
    """A part is used after the whole was traced: its weights stay where they are."""
    x, _ = data()

    def use(model):
        part = keras.Model(model.input, model.layers[2].output)
        first = history(x, data()[1], batch_size=8)(model)
        return first, part.predict(x, batch_size=8, verbose=0), history(x, data()[1], batch_size=8)(model)

    one, other = compiled(), compiled(strategy)
    a = use(one)
    with strategy.scope():
        b = use(other)
    assert all(difference(i, j) < 1e-5 for i, j in zip(*map(keras.tree.flatten, (a, b)), strict=True))
    assert_same(one, other, 1e-5, 1e-7)


class InputGradients(keras.Model):
    """Asks twice for the gradient of an input that two stages use."""

    def train_step(self, data):
        x, y = data
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(x)
            y_pred = self(x, training=True)
            loss = self.compute_loss(x, y, y_pred)
        gradients = tape.gradient(loss, self.trainable_weights)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_weights, strict=True))
        return {"loss": loss, "slope": keras.ops.sum(tape.gradient(loss, x) ** 2)}


def test_gradients_asked_for_twice(strategy):
    x, y = data()

    def build():
        inputs = layers.Input((WIDTH,))
        h = layers.multiply([layers.Dense(WIDTH)(inputs), inputs])
        h = layers.multiply([layers.Dense(WIDTH)(h), inputs])
        return InputGradients(inputs, layers.Dense(3, activation="softmax")(h))

    check(strategy, history(x, y, batch_size=8), build=build, metrics=lambda: None)


@pytest.mark.fast
def test_a_gradient_of_a_gradient(strategy):
    x, y = data()

    def build():
        inputs = layers.Input((WIDTH,))
        return OwnSteps(inputs, layers.Dense(3, activation="softmax")(layers.Dense(5)(inputs)))

    with pytest.raises(ModelError, match="a gradient of a gradient of .*outside of the strategy's scope"):
        history(x, y, batch_size=8)(compiled(strategy, build=build, metrics=lambda: None))


def test_nothing_to_train(strategy):
    x, y = data()

    def build():
        model = with_a_layer(lambda: layers.Activation("tanh"))()
        model.trainable = False
        return model

    with pytest.warns(UserWarning, match="does not have any trainable weights"):
        check(strategy, history(x, y, batch_size=8), build=build)


class Adds(layers.Layer):
    """Adds a loss that only negative numbers make, and counts those."""

    def build(self, shape):
        self.count = self.add_weight(name="count", initializer="zeros", trainable=False)

    def call(self, x):
        self.add_loss(0.1 * keras.ops.sum(keras.ops.relu(-x)))
        self.count.assign_add(keras.ops.sum(keras.ops.cast(x < 0, "float32")))
        return x


@pytest.mark.fast
def test_losses_and_state_of_negative_numbers(strategy):
    x, y = data()
    check(strategy, history(x, y, batch_size=8), build=with_a_layer(Adds))


def test_a_call_on_fewer_rows(strategy):
    """Two rows of the batch, in fewer micro-batches."""

    class Few(keras.Model):
        def train_step(self, data):
            self(data[0][:1], training=True)
            return super().train_step(data)

    def build():
        inputs = layers.Input((WIDTH,))
        h = layers.BatchNormalization()(layers.Dense(5)(inputs))
        return Few(inputs, layers.Dense(3, activation="softmax")(h))

    model = compiled(strategy, build=build)
    history(*data(), batch_size=8)(model)
    assert all(np.isfinite(w).all() for w in model.get_weights())


@pytest.mark.fast
def test_a_step_that_names_its_inputs_is_run_by_the_engine(monkeypatch):
    class Names(keras.Model):
        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                predicted = self(inputs=x, training=True)
                loss = self.compute_loss(x, y, predicted)
            self.optimizer.apply(tape.gradient(loss, self.trainable_weights), self.trainable_weights)
            return self.compute_metrics(x, y, predicted)

    def named():
        model = build()
        return Names(model.inputs, model.outputs)

    runs, original = [], model_call.forward_on_tape
    monkeypatch.setattr(model_call, "forward_on_tape", lambda *args: runs.append(args) or original(*args))
    strategy = tfpar.TensorParallelStrategy(["CPU:0", "CPU:1"])
    check(strategy, history(*data(), batch_size=10), build=named)
    assert runs
