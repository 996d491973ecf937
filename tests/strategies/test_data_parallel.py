"""`DataParallelStrategy` where tf.distribute's own is wrong or raises: through `fit`, each equals one device."""

import concurrent.futures
import contextlib
import unittest.mock

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops
from training import ROWS, WIDTH, build, check, compiled, data, history, some_fast

import tfpar
from tfpar.comm import collectives
from tfpar.compat import _moments
from tfpar.engine.loss import Loss
from tfpar.errors import ModelError, ScopeError
from tfpar.testing import assert_same, difference
from tfpar.trainer.hooks import hooks_of
from tfpar.trainer.step_function import StepFunction

X, Y = data(19)


def replicas(count, **options):
    return tfpar.DataParallelStrategy([f"CPU:{n}" for n in range(count)], **options)


def sgd(**options):
    return lambda: keras.optimizers.SGD(0.1, momentum=0.9, **options)


# ---- silently wrong with MirroredStrategy


@pytest.mark.parametrize("count", some_fast([1, 2, 3, 4], 3))
def test_uneven_batches_and_clipping(count):
    """19 rows in batches of 8, and of 2, which is fewer than there are replicas; what callbacks see of each batch."""
    seen = []

    def use(model):
        seen_now = []
        watch = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: seen_now.append(dict(logs)))
        for batch_size in (8, 2):
            model.fit(X, Y, batch_size=batch_size, shuffle=False, verbose=0, callbacks=[watch])
        seen.append(seen_now)
        return [list(logs.values()) for logs in seen_now]

    check(replicas(count), use, optimizer=sgd(clipnorm=0.3))
    assert len(seen[0]) == 13


@pytest.mark.fast
@pytest.mark.parametrize(
    "options", [{"global_clipnorm": 0.2}, {"clipvalue": 0.05}, {"gradient_accumulation_steps": 2, "clipnorm": 0.1}]
)
def test_clipping_after_the_sum(options):
    check(replicas(2), history(X, Y, batch_size=8, epochs=2), optimizer=sgd(**options))


def test_adam_with_clipping():
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    x, y = data(19)
    adam = lambda: keras.optimizers.Adam(0.01, clipnorm=0.1)  # noqa: E731
    check(replicas(3), history(x, y, batch_size=8, epochs=2), 1e-9, 1e-10, optimizer=adam)


def scalar_loss(y, p):
    return tf.reduce_mean(tf.square(tf.cast(y[:, None], p.dtype) - p)) ** 0.5


class OwnLoss(keras.Model):
    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return ops.max(ops.abs(y_pred)) + super().compute_loss(x, y, y_pred, sample_weight)


def own_loss():
    x = layers.Input((WIDTH,))
    return OwnLoss(x, layers.Dense(3, activation="softmax")(layers.Dense(4)(x)))


@pytest.mark.fast
@pytest.mark.parametrize("options", [{"loss": scalar_loss}, {"build": own_loss}])
def test_scalar_losses(options):
    check(replicas(2), history(X, Y, batch_size=8, epochs=2), optimizer=sgd(), **options)


def masked():
    x = layers.Input((5,), dtype="int32")
    h = layers.Embedding(7, 4, mask_zero=True)(x)
    return keras.Model(x, layers.Dense(3, activation="softmax")(layers.LSTM(4, return_sequences=True)(h)))


@pytest.mark.parametrize("reduction", ["sum_over_batch_size", "mean_with_sample_weight"])
def test_masks_and_weights(reduction):
    """The replicas have different numbers of valid tokens, and of weights."""
    rng = np.random.default_rng(0)
    x = rng.integers(1, 7, size=(ROWS, 5)) * (np.arange(5) < rng.integers(1, 6, size=(ROWS, 1)))
    y, weights = rng.integers(0, 3, size=(ROWS, 5)), rng.uniform(0.1, 3.0, size=(ROWS, 5)).astype("float32")
    loss = lambda: keras.losses.SparseCategoricalCrossentropy(reduction=reduction)  # noqa: E731
    strategy = replicas(3)
    one, other = compiled(build=masked, loss=loss()), compiled(strategy, build=masked, loss=loss())
    for model in (one, other):
        model.fit(x, y, sample_weight=weights, batch_size=8, shuffle=False, verbose=0)
        model.fit(x, y, batch_size=8, shuffle=False, verbose=0)
    assert_same(one, other, 1e-5, 1e-7)


@keras.saving.register_keras_serializable()
class Block(layers.Layer):
    """A layer of layers, as users write them, with a BatchNormalization inside."""

    def __init__(self, **options):
        super().__init__(**options)
        self.dense, self.normalize = layers.Dense(5, use_bias=False), layers.BatchNormalization(momentum=0.5)

    def call(self, x, training=None):
        return ops.tanh(self.normalize(self.dense(x), training=training))


class Unfollowable(keras.Model):
    """A model whose `call` takes no symbolic inputs."""

    def __init__(self):
        super().__init__()
        self.block, self.last = Block(), layers.Dense(3, activation="softmax")

    def call(self, x, training=None):
        return self.last(self.block(tf.reverse(x, [1]), training=training))


def with_block():
    x = layers.Input((WIDTH,))
    return keras.Model(x, layers.Dense(3, activation="softmax")(Block(name="block")(x)))


@pytest.mark.parametrize(
    "make, name", some_fast([(with_block, "block"), (Unfollowable, "unfollowable")], (with_block, "block"))
)
def test_batch_statistics_inside_of_layers(make, name):
    with pytest.warns(UserWarning, match=f"{name}.*computed for the whole batch on every replica"):
        check(replicas(3), history(X, Y, batch_size=8, epochs=2, validation_data=(X, Y)), build=make, optimizer=sgd())


def normalized():
    x = layers.Input((WIDTH,))
    h = layers.BatchNormalization(momentum=0.5)(layers.Dense(5, use_bias=False)(x))
    return keras.Model(x, layers.Dense(3, activation="softmax")(ops.tanh(h)))


@pytest.mark.fast
def test_local_batch_statistics():
    """Each replica normalises with its own; what `predict` uses moves by those of the whole batch."""
    model = compiled(replicas(2, batch_norm="local"), build=normalized)
    one = compiled(build=normalized)
    for m in (model, one):
        m.train_on_batch(X[:8], Y[:8])
    moved = [[w.numpy() for w in m.weights if "moving" in w.path] for m in (one, model)]
    assert all(difference(a, b) < 1e-5 for a, b in zip(*moved, strict=True))
    assert difference(one.layers[1].kernel.numpy(), model.layers[1].kernel.numpy()) > 1e-4
    with pytest.raises(ModelError, match='batch_norm is "global" or "local"; received 1'):
        replicas(2, batch_norm=1)


def drops(seed=1):
    x = layers.Input((WIDTH,))
    return keras.Model(x, layers.Dropout(0.5, seed=seed)(x))


@pytest.mark.fast
def test_dropout_is_independent_and_reproducible():
    def masks(count):
        seen = []

        def see(y_true, y_pred):
            if tf.executing_eagerly():  # not while Keras looks at shapes
                seen.append(y_pred.numpy() > 0)
            return tf.zeros(())

        model = compiled(replicas(count), build=drops, loss="mse", metrics=lambda: [see])
        x = np.ones((8, WIDTH), "float32")
        model.run_eagerly = True
        for _ in range(2):
            model.train_on_batch(x, x)
        assert hooks_of(model).engine is not None
        return seen[-2:]

    with pytest.warns(UserWarning, match="does not have any trainable weights"):
        first, second = masks(2)
        assert not np.array_equal(first[:4], first[4:]) and not np.array_equal(first, second)
        assert np.array_equal(masks(2)[0], first)
        one = masks(1)
        assert np.array_equal(one[0][:4], first[:4])  # the first replica draws what one device would for its rows


@pytest.mark.fast
def test_calls_on_batches():
    """The work is divided, and the results are those of one device."""

    def use(model):
        train = model.train_on_batch(X[:7], Y[:7], sample_weight=np.arange(7))
        return train, model.test_on_batch(X[:7], Y[:7]), model.predict_on_batch(X[:4])

    _, model = check(replicas(2), use, optimizer=sgd())
    assert model.predict_on_batch(X[:4]).shape == (4, 3)


@pytest.mark.parametrize("count", some_fast([2, 3], 2))
def test_infinity_on_one_replica(count):
    """Loss scaling skips the step on all of them."""
    x = X.copy()
    x[2] = np.inf

    def use(model):
        for values in (X, x, X):
            model.fit(values, Y, batch_size=8, shuffle=False, verbose=0)

    scaled = lambda: keras.optimizers.LossScaleOptimizer(  # noqa: E731
        keras.optimizers.SGD(0.1), initial_scale=4.0, dynamic_growth_steps=2
    )
    one, other = (compiled(s, optimizer=scaled) for s in (None, replicas(count)))
    for model in (one, other):
        use(model)
    weights = [[w.numpy() for w in m.variables] for m in (one, other)]
    assert all(np.isfinite(w).all() for w in weights[1])
    assert all(difference(a, b) < 1e-5 for a, b in zip(*weights, strict=True))
    assert_same(one, other, 1e-5, 1e-7)


@pytest.mark.fast
def test_generators():
    """Every batch is used, and each once."""
    served = []

    def batches():
        for n in range(6):
            served.append(n)
            yield X[:5] + n, Y[:5]

    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return 6

        def __getitem__(self, n):
            return X[:5] + n, Y[:5]

    one, other = compiled(optimizer=sgd()), compiled(replicas(2), optimizer=sgd())
    for source in (batches, lambda: Batches(workers=2)):
        for model in (one, other):
            model.fit(source(), verbose=0, shuffle=False)
    assert sorted(served) == sorted([*range(6)] * 2)
    weights = [[w.numpy() for w in m.weights] for m in (one, other)]
    assert all(difference(a, b) < 1e-5 for a, b in zip(*weights, strict=True))


# ---- raises with MirroredStrategy


@pytest.mark.fast
def test_first_batch_is_uneven():
    def use(model):
        fit = model.fit(X, Y, batch_size=7, shuffle=False, verbose=0, validation_data=(X[:3], Y[:3])).history
        return fit, model.evaluate(X, Y, batch_size=19, verbose=0)

    check(replicas(4), use)


class Lengths(keras.Model):
    """Takes strings, a ragged array and booleans."""

    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(3, activation="softmax")

    def call(self, x):
        lengths = tf.cast(tf.strings.length(x["text"]), "float32")[:, None]
        return self.dense(tf.concat([lengths, tf.reduce_sum(x["words"], 1)[:, None], tf.cast(x["flag"], "float32")], 1))


def test_strings_ragged_and_booleans():
    words = tf.ragged.constant([[1.0] * (n % 4 + 1) for n in range(10)])
    x = {"text": tf.constant(["a" * n for n in range(10)]), "words": words, "flag": tf.constant([[True], [False]] * 5)}
    batches = tf.data.Dataset.from_tensor_slices((x, Y[:10])).batch(4)

    def use(model):
        return model.fit(batches, verbose=0).history, model.predict(batches, verbose=0)

    check(replicas(2), use, build=Lengths, optimizer=sgd())


@pytest.mark.parametrize("jit", [False, True])
def test_conditional_updates(jit):
    options = {"gradient_accumulation_steps": 3, "use_ema": True, "ema_overwrite_frequency": 2}
    check(replicas(2), history(X, Y, batch_size=8, epochs=2), optimizer=sgd(**options), jit_compile=jit)


def test_steps_per_execution_and_xla():
    check(replicas(3), history(X, Y, batch_size=4, epochs=2), steps_per_execution=2, jit_compile=True)


def test_two_strategies_two_models():
    models = [compiled(s, build=b) for s in (replicas(2), replicas(3)) for b in (build, normalized)]
    for _ in range(2):
        for model in models:
            model.fit(X, Y, batch_size=8, shuffle=False, verbose=0)
    for b, pair in ((build, models[::2]), (normalized, models[1::2])):
        one = compiled(build=b)
        for _ in range(2):
            one.fit(X, Y, batch_size=8, shuffle=False, verbose=0)
        for model in pair:
            assert_same(one, model, 1e-5, 1e-7)


class Unseeded(layers.Layer):
    def call(self, x):
        return x + 0.0 * keras.random.normal(ops.shape(x))


def test_unseeded_random_numbers():
    def noisy():
        x = layers.Input((WIDTH,))
        return keras.Model(x, layers.Dense(3, activation="softmax")(Unseeded()(x)))

    check(replicas(2), history(X, Y, batch_size=8), build=noisy)


@pytest.mark.fast
def test_layers_from_outside_of_the_scope():
    outside = layers.Dense(3, name="outsider")
    outside.build((None, WIDTH))

    def use_it():
        x = layers.Input((WIDTH,))
        return keras.Model(x, outside(x))

    model = compiled(replicas(2), build=use_it, loss="mse")
    with pytest.raises(ScopeError, match="outsider/kernel was created outside of this strategy's scope") as error:
        model.fit(X, X[:, :3], verbose=0)
    assert "    with strategy.scope():\n        model = ..." in str(error.value)


def test_optimizer_from_outside_of_the_scope():
    def use(model):
        model.compile(
            keras.optimizers.Adam(0.01, epsilon=1e-3), "sparse_categorical_crossentropy", metrics=["accuracy"]
        )
        schedule = keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate * 0.5)
        model.fit(X, Y, batch_size=8, epochs=2, shuffle=False, verbose=0, callbacks=[schedule])
        return int(model.optimizer.iterations), float(model.optimizer.learning_rate)

    check(replicas(2), use)


# ---- operations that need the whole batch


def contrastive():
    x = layers.Input((WIDTH,))
    h = layers.Dense(4)(x)
    h = layers.Lambda(lambda v: v - ops.mean(v, axis=0), name="centred")(h)
    return keras.Model(x, layers.Dense(3, activation="softmax")(h))


class Quantile(layers.Layer):
    """Adds a loss that is neither a sum nor a mean over samples, and keeps a maximum."""

    def build(self, shape):
        self.most = self.add_weight(shape=(), trainable=False, initializer="zeros", name="most")

    def call(self, x):
        self.add_loss(0.1 * ops.max(ops.abs(x)))
        self.most.assign(ops.maximum(self.most, ops.max(x)))
        return x * 1.0


def quantile():
    x = layers.Input((WIDTH,))
    return keras.Model(x, layers.Dense(3, activation="softmax")(Quantile(name="quantile")(layers.Dense(4)(x))))


def recurrent():
    x = layers.Input(batch_shape=(6, 4, 2))
    h = layers.LSTM(4, stateful=True, name="memory")(x)
    return keras.Model(x, layers.Dense(3, activation="softmax")(h))


@pytest.mark.parametrize(
    "jit, make, name",
    some_fast(
        [*((False, *c) for c in ((contrastive, "centred"), (quantile, "quantile"), (recurrent, "memory"))),
         (True, contrastive, "centred")],
        (False, contrastive, "centred"), (False, quantile, "quantile"),
    ),
)  # fmt: skip
def test_operations_that_need_the_whole_batch(make, name, jit):
    x, y = (np.random.default_rng(0).normal(size=(18, 4, 2)).astype("float32"), Y[:18]) if make is recurrent else (X, Y)
    batch_size = 6 if make is recurrent else 8
    with pytest.warns(UserWarning, match=f"{name}: computed for the whole batch"):
        check(replicas(3), history(x, y, batch_size=batch_size, epochs=2), build=make, optimizer=sgd(), jit_compile=jit)


def called_twice():
    x, layer = layers.Input((WIDTH,)), Quantile(name="quantile")
    return keras.Model(x, layers.Dense(3, activation="softmax")(layer(layers.Dense(4)(layer(x)))))


class RandomlyCentred(layers.Layer):
    """Mixes samples in training only, and is random there."""

    def __init__(self, **options):
        super().__init__(**options)
        self.noise = layers.GaussianNoise(1e-9, seed=1)

    def call(self, x, training=None):
        x = self.noise(x, training=training)
        return x - ops.mean(x, axis=0) if training else x


def randomly_centred():
    x = layers.Input((WIDTH,))
    return keras.Model(x, layers.Dense(3, activation="softmax")(RandomlyCentred(name="centred")(layers.Dense(4)(x))))


def more_rows_inside():
    x = layers.Input((WIDTH,))
    h = layers.Lambda(lambda v: ops.reshape(v, (-1, 2)) - ops.mean(v), output_shape=(2,), name="pairs")(x)
    h = layers.Lambda(lambda v: ops.reshape(v, (-1, WIDTH)), output_shape=(WIDTH,))(layers.Dense(2)(h))
    return keras.Model(x, layers.Dense(3, activation="softmax")(h))


@pytest.mark.parametrize("make", [called_twice, randomly_centred, more_rows_inside])
def test_more_that_needs_the_whole_batch(make):
    with pytest.warns(UserWarning, match="computed for the whole batch"):
        check(replicas(3), history(X, Y, batch_size=8, epochs=2), build=make, optimizer=sgd())


# ---- unusual models and batches


def test_an_input_as_output():
    def both():
        x = layers.Input((WIDTH,))
        return keras.Model(x, [layers.Dense(3, activation="softmax")(x), x])

    losses = ["sparse_categorical_crossentropy", "mse"]
    for count in (1, 3):
        use = history(X, [Y, X], batch_size=8, epochs=2)
        check(replicas(count), use, build=both, loss=losses, metrics=lambda: None)


@pytest.mark.fast
def test_targets_with_more_rows_than_inputs():
    def tokens():
        x = layers.Input((4, 2))
        h = layers.Lambda(lambda v: ops.reshape(v, (-1, 2)), output_shape=(2,))(x)
        return keras.Model(x, layers.Dense(3, activation="softmax")(h))

    x, y = np.random.default_rng(0).normal(size=(6, 4, 2)).astype("float32"), np.arange(24) % 3
    check(replicas(3), lambda model: model.train_on_batch(x, y), build=tokens, optimizer=sgd())


@pytest.mark.fast
def test_a_scalar_in_the_batch():
    class Scaled(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(3)

        def call(self, x):
            return self.dense(x)

        def train_step(self, given):
            batch = given[0]
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(tf.square(self(batch["x"], training=True))) * batch["scale"]
            gradients = tape.gradient(loss, self.trainable_variables)
            self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
            return {"loss": loss}

    batch = {"x": tf.constant(X[:7]), "scale": tf.constant(0.5)}
    use = lambda model: model.train_on_batch(batch, return_dict=True)  # noqa: E731
    check(replicas(2), use, build=Scaled, loss=None, metrics=lambda: None)


def test_dense_then_sparse():
    dense = np.eye(WIDTH, dtype="float32")
    sparse = tf.data.Dataset.from_tensor_slices((tf.sparse.from_dense(dense), Y[:WIDTH])).batch(3)

    def use(model):
        return history(dense, Y[:WIDTH], batch_size=3)(model), model.fit(sparse, verbose=0).history

    check(replicas(2), use)


@pytest.mark.fast
def test_threads():
    """Each with batches of its own size, so that they all trace."""
    model = compiled(replicas(2))
    expected = model.predict(X, verbose=0)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda n: model.predict_on_batch(X[:n]), range(3, 11)))
    assert all(difference(expected[:n], found) < 1e-5 for n, found in enumerate(results, 3))


@pytest.mark.fast
@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("aggregation, total", [("SUM", 18.0), ("MEAN", 6.0), ("ONLY_FIRST_REPLICA", 5.0)])
def test_variables_that_replicas_assign(aggregation, total, eager):
    """As with MirroredStrategy."""
    strategy = replicas(3)
    with strategy.scope():
        variable = tf.Variable(0.0, aggregation=tf.VariableAggregation[aggregation])

    def step():
        variable.assign_add(tf.cast(tf.distribute.get_replica_context().replica_id_in_sync_group, "float32") + 5.0)

    run = lambda: strategy.run(step)  # noqa: E731
    (run if eager else tf.function(run))()
    assert [float(copy) for copy in variable.copies] == [total] * 3


# ---- own steps and loops


class Penalized(keras.Model):
    """A training step with a gradient of a gradient, and clipping of its own."""

    def __init__(self):
        super().__init__()
        self.first, self.last = layers.Dense(5, activation="tanh"), layers.Dense(3)

    def call(self, x):
        return self.last(self.first(x))

    def train_step(self, batch):
        x, y = batch
        with tf.GradientTape() as tape:
            with tf.GradientTape() as inner:
                inner.watch(x)
                p = self(x, training=True)
            slope = inner.gradient(p, x)
            loss = tf.reduce_mean(keras.losses.sparse_categorical_crossentropy(y, p, from_logits=True))
            loss += tf.reduce_mean(tf.square(slope))
        gradients, norm = tf.clip_by_global_norm(tape.gradient(loss, self.trainable_variables), 0.1)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
        return {"loss": loss, "norm": norm}


@pytest.mark.parametrize("jit", some_fast([False, True], False))
def test_own_training_step(jit):
    options = {"build": Penalized, "optimizer": sgd(), "loss": None, "metrics": lambda: None, "jit_compile": jit}
    check(replicas(3), history(X, Y, batch_size=8, epochs=2), **options)


@pytest.mark.parametrize("eager", [False, True])
def test_own_training_loop(eager):
    options = {"global_clipnorm": 0.1, "gradient_accumulation_steps": 2}
    """As with MirroredStrategy, except that clipping and accumulation see the sum over replicas."""
    strategy, size = replicas(2), 8
    models = [compiled(None, build=normalized), compiled(strategy, build=normalized)]
    optimizers = []
    for scope in (contextlib.nullcontext(), strategy.scope()):
        with scope:
            optimizers.append(sgd(**options)())

    def step(model, optimizer, x, y):
        with tf.GradientTape() as tape:
            p = model(x, training=True)
            loss = tf.reduce_sum(keras.losses.sparse_categorical_crossentropy(y, p)) / size
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return loss

    def one_step(x, y):
        return step(models[0], optimizers[0], x, y)

    def shared_step(x, y):
        losses = strategy.run(step, args=(models[1], optimizers[1], x, y))
        return strategy.reduce("SUM", losses, axis=None)

    steps = (one_step, shared_step) if eager else tuple(map(tf.function, (one_step, shared_step)))
    batches = tf.data.Dataset.from_tensor_slices((X, Y)).batch(size)
    losses = [float(steps[0](x, y)) for x, y in batches]
    shared = [float(steps[1](x, y)) for x, y in strategy.experimental_distribute_dataset(batches)]
    assert difference(losses, shared) < 1e-5
    assert_same(*models, 1e-5, 1e-7)
    for variable in models[1].variables:
        assert len({copy.numpy().tobytes() for copy in variable.value.copies}) == 1
    first = next(iter(strategy.experimental_distribute_dataset(batches)))[0]
    gathered = strategy.gather(strategy.run(models[1], args=(first,)), axis=0)
    assert difference(models[0](X[:size]), gathered) < 1e-5


# ---- the work is divided


def graph(strategy, make=build, **options):
    """The graph of one training step."""
    made, original = [], StepFunction.function
    model = compiled(strategy, build=make, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StepFunction, "function", lambda *args: made.append(original(*args)) or made[-1])
        model.train_on_batch(X[:8], Y[:8])
    return made[0].get_concrete_function().graph, model


@pytest.mark.fast
@pytest.mark.parametrize("make", [build, normalized])
def test_replicas_share_the_work(make):
    """Each device runs the same programs, traced once; weights and slots have equal copies."""
    g, model = graph(replicas(2), make, optimizer=sgd())
    ran = {}
    for op in g.get_operations():
        if "PartitionedCall" in op.type and op.name.startswith("replica"):
            ran.setdefault(op.name.split("/")[0], []).append((op.get_attr("f").name, op.device))
    names = {replica: [name for name, _ in calls] for replica, calls in ran.items()}
    assert sorted(ran) == ["replica0", "replica1"] and len(set(names["replica1"])) == len(names["replica1"]) > 0
    assert [n for n in names["replica0"] if n in names["replica1"]] == names["replica1"]
    places = [{tf.DeviceSpec.from_string(d).device_index for _, d in ran[r]} for r in sorted(ran)]
    assert places == [{0}, {1}]
    for variable in [*model.variables, *model.optimizer.variables]:
        devices = [tf.DeviceSpec.from_string(c.device).device_index for c in variable.value.copies]
        assert devices in ([0, 1], [0])  # metrics have one copy
        assert len({c.numpy().tobytes() for c in variable.value.copies}) == 1


def test_buckets():
    """The gradients of the last layers do not wait for the first."""
    strategy = replicas(2, buckets=2)
    assert hooks_of(graph(strategy)[1]).engine.training.partition.stages == 2
    check(replicas(2, buckets=3), history(X, Y, batch_size=8, epochs=2), optimizer=sgd(clipnorm=0.1))


def test_cross_device_ops():
    used = []

    class Recording(tf.distribute.ReductionToOneDevice):
        def batch_reduce_implementation(self, reduce_op, pairs, options):
            used.append(len(pairs))
            return super().batch_reduce_implementation(reduce_op, pairs, options)

    for buckets, calls in ((1, [6]), (2, [4, 2])):
        used.clear()
        strategy = replicas(2, cross_device_ops=Recording(), buckets=buckets)
        check(strategy, history(X[:16], Y[:16], batch_size=8), optimizer=sgd())
        assert sorted(used, reverse=True) == calls


def test_statistics_of_a_batch_for_one_replica():
    """The last batch has one sample: what replicas exchange, one has; an own reduction is not asked for it."""
    strategy = replicas(2, cross_device_ops=tf.distribute.ReductionToOneDevice())
    check(strategy, history(X[:5], Y[:5], batch_size=4), build=normalized, optimizer=sgd())


@pytest.mark.fast
def test_sums_over_replicas():
    devices = ["CPU:0", "CPU:1", "CPU:2"]
    sparse = [tf.IndexedSlices(tf.ones((1, 2)) * n, tf.constant([n]), tf.constant([4, 2])) for n in range(3)]
    dense = [tf.constant([1.0, n]) for n in range(3)]
    results = collectives.all_reduce_gradients([dense, sparse, [None] * 3, dense[:2]], devices)
    for value, total in zip(results, ([3.0, 3.0], None, None, [2.0, 1.0]), strict=True):
        for copy, device in zip(value, devices, strict=True):
            if total is not None:
                assert copy.numpy().tolist() == total and copy.device.endswith(device)
    assert tf.convert_to_tensor(results[1][2]).numpy().tolist() == [[0, 0], [1, 1], [2, 2], [0, 0]]
    assert results[2] == [None] * 3


def test_sums_that_nccl_does_not_know_are_copies():
    class Refusing(tf.distribute.NcclAllReduce):
        def batch_reduce_implementation(self, reduce_op, pairs, options):
            raise TypeError("no kernel")

    values = [[tf.constant([1.0, n], tf.bfloat16) for n in range(2)]]
    ((first, second),) = collectives.all_reduce_gradients(values, ["CPU:0", "CPU:1"], Refusing())
    assert first.numpy().tolist() == second.numpy().tolist() == [2.0, 1.0]
    own = tf.distribute.ReductionToOneDevice()  # a user's, of which nothing is known, is asked for every dtype
    with unittest.mock.patch.object(own, "batch_reduce", wraps=own.batch_reduce) as asked:
        collectives.all_reduce_gradients(values, ["CPU:0", "CPU:1"], own)
    assert asked.call_count == 1


# ---- planted bugs


def mean_for_sum(patch):
    original = collectives.summed
    patch.setattr(collectives, "summed", lambda parts, device: original(parts, device) / len(parts))


def own_gradients(patch):
    def kept(values, devices, ops=None):
        return [[v[r % len(v)] for r in range(len(devices))] for v in values]

    patch.setattr("tfpar.engine.weight_edge.all_reduce_gradients", kept)


def equal_shares(patch):
    original = Loss.__call__
    patch.setattr(Loss, "__call__", lambda self, p, y, s, t: original(self, p, y, s, t and [x * 0 + 8.0 for x in t]))


def local_statistics(patch):
    patch.setattr(_moments, "is_batch_normalization", lambda operation: False)
    patch.setattr("tfpar.trainer.planner.hidden_normalizations", lambda graph: set())


@pytest.mark.fast
@pytest.mark.parametrize("bug", [None, mean_for_sum, own_gradients, equal_shares, local_statistics])
def test_planted_bugs_are_caught(bug):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(AssertionError) if bug else contextlib.nullcontext():
        if bug:
            bug(patch)
        check(
            replicas(2), history(X[:7], Y[:7], batch_size=7, epochs=2), build=normalized, optimizer=sgd(clipnorm=0.05)
        )
