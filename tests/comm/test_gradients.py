"""Gradients of look-ups have, row by row, what one device's have: Keras squares and clips rows one by one."""

import contextlib

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops
from training import Own, check, compiled, history, mostly, some_fast

import tfpar
from tfpar import Mesh
from tfpar.comm import gradients
from tfpar.comm.gradients import SharedRows, add, folded, of_parts, plain, sparse_part
from tfpar.graph.batch_probe import Combine, Probe
from tfpar.graph.keras_graph import graph_from
from tfpar.planning.sharding import REPLICATED, Layout
from tfpar.testing import assert_same

V, T, D = 11, 6, 8
RNG = np.random.default_rng(0)
X = RNG.integers(0, V, size=(14, T))
Y = RNG.integers(0, 3, size=(14, T))


@pytest.fixture(autouse=True)
def float64():
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")


@keras.saving.register_keras_serializable()
class TokensAndPositions(layers.Layer):
    """Learned positions, as tutorials write them."""

    def __init__(self, **options):
        super().__init__(**options)
        self.tokens, self.positions = layers.Embedding(V, D), layers.Embedding(T, D)

    def call(self, x):
        return self.tokens(x) + self.positions(ops.arange(0, ops.shape(x)[-1], 1))


class Distances(layers.Layer):
    """A table by distance, of which most rows are looked up several times; and a part of it by the tokens."""

    def __init__(self, tokens=False, **options):
        super().__init__(**options)
        self.table, self.by_tokens = layers.Embedding(V, D), tokens

    def call(self, x):
        ids = ops.arange(ops.shape(x)[-1])
        near = self.table(ops.minimum(ops.abs(ids[:, None] - ids), 3))
        found = ops.sum(near, 1) + ops.cast(x, "float64")[..., None] * 0.1
        return found + self.table(x) if self.by_tokens else found


class Dense(layers.Layer):
    """No look-up at all."""

    def build(self, shape):
        self.kernel = self.add_weight(shape=(T, D))

    def call(self, x):
        return ops.matmul(ops.cast(x, "float64"), self.kernel)


def words(length):
    def build():
        x = layers.Input((length,), dtype="int32")
        h = layers.Embedding(V, D)(x)
        return keras.Model(x, layers.Dense(3, activation="softmax")(layers.Dense(D, activation="tanh")(h)))

    return build


def with_layer(make, length=T):
    def build():
        x = layers.Input((length,), dtype="int32")
        h = layers.Dense(D, activation="tanh")(make()(x))
        return keras.Model(x, layers.Dense(3, activation="softmax")(h))

    return build


def tied(length):
    """One table at both ends: its gradient is dense."""

    def build():
        x = layers.Input((length,), dtype="int32")
        table = layers.ReversibleEmbedding(V, D)
        h = table(layers.Dense(D, activation="tanh")(table(x)), reverse=True)
        return keras.Model(x, layers.Dense(3, activation="softmax")(h))

    return build


def twice():
    """Positions looked up twice, by different layers, which may be on different stages."""
    x = layers.Input((T,), dtype="int32")
    table, ids = layers.Embedding(T, D), np.arange(T)
    h = layers.Embedding(V, D)(x) + table(ops.convert_to_tensor(ids))
    h = layers.Dense(D, activation="tanh")(layers.Dense(D, activation="tanh")(h))
    h = layers.Dense(D)(h + table(ops.convert_to_tensor(ids // 2)))
    return keras.Model(x, layers.Dense(3, activation="softmax")(h))


def own(build):
    def made():
        model = build()
        return Own(model.inputs, model.outputs)

    return made


MODELS = {
    "words of unknown length": words(None), "words": words(T), "positions": with_layer(TokensAndPositions),
    "positions of unknown length": with_layer(TokensAndPositions, None), "distances": with_layer(Distances),
    "tied": tied(None), "twice": twice, "own step": own(with_layer(TokensAndPositions)),
    "own step, words of unknown length": own(words(None)), "own step, distances": own(with_layer(Distances, None)),
}  # fmt: skip
STRATEGIES = {
    "data": lambda: tfpar.DataParallelStrategy(["CPU:0", "CPU:1", "CPU:2"]),
    "zero": lambda: tfpar.DataParallelStrategy(["CPU:0", "CPU:1"], zero=3),
    "pipeline": lambda: tfpar.PipelineStrategy(["CPU:0", "CPU:1"], micro_batches=3),
    "tensor": lambda: tfpar.TensorParallelStrategy(["CPU:0", "CPU:1"]),
    "mesh": lambda: tfpar.MeshStrategy(Mesh(data=2, tensor=2)),
    "zero 2 in micro-batches": lambda: tfpar.MeshStrategy(Mesh(data=2), micro_batches=2, zero=2),
}
OPTIMIZERS = {
    "adam": lambda: keras.optimizers.Adam(0.01, epsilon=1e-4),
    "clipped": lambda: keras.optimizers.SGD(0.5, clipnorm=0.01),
    "lamb": lambda: keras.optimizers.Lamb(0.01, epsilon=1e-4),
    "adafactor": lambda: keras.optimizers.Adafactor(0.01),
    "average": lambda: keras.optimizers.Adam(0.01, epsilon=1e-4, use_ema=True, ema_overwrite_frequency=2),
}
CASES = [
    (m, s, list(OPTIMIZERS)[(i + j) % len(OPTIMIZERS)])
    for i, m in enumerate(MODELS) for j, s in enumerate(STRATEGIES)
]  # fmt: skip


@pytest.mark.parametrize(
    "model, strategy, optimizer",
    mostly(CASES, CASES[::3], [CASES[0], CASES[9], CASES[42]]),
)
def test_equals_one_device(model, strategy, optimizer):
    fit = history(X, Y, batch_size=5, epochs=2)
    check(STRATEGIES[strategy](), fit, 1e-9, 1e-12, build=MODELS[model], optimizer=OPTIMIZERS[optimizer])


@pytest.mark.parametrize("strategy", ["data", "pipeline"])
def test_one_table_by_tokens_and_by_positions(strategy):
    """Replicas compute it for the whole batch; a pipeline cannot."""
    build = with_layer(lambda: Distances(True, name="both"))
    if strategy == "pipeline":
        model = compiled(STRATEGIES[strategy](), build=build)
        with pytest.raises(tfpar.ModelError, match="both looks up rows of .* for each sample, and rows for all"):
            model.fit(X, Y, verbose=0)
    else:
        fit = history(X, Y, batch_size=5)
        check(STRATEGIES[strategy](), fit, 1e-9, 1e-12, build=build, optimizer=OPTIMIZERS["adam"])


@pytest.mark.parametrize("strategy", ["data", "tensor"])
def test_slots_that_do_not_look_like_their_weight(strategy):
    """Adafactor keeps sums of rows and of columns; where stages update apart, each has a copy of them."""
    mesh = {"data": Mesh(data=2, stage=2), "tensor": Mesh(stage=2, tensor=2)}[strategy]
    model = check(
        tfpar.MeshStrategy(mesh), history(X, Y, batch_size=5, epochs=2), 1e-9, 1e-12, build=words(T),
        optimizer=OPTIMIZERS["adafactor"],
    )[1]  # fmt: skip
    assert {len(v.value.copies) for v in model.optimizer.variables if len(v.shape) == 1} <= {2, 4}


@pytest.mark.parametrize(
    "model, bug",
    some_fast(
        [("positions", False), ("positions", True), ("positions of unknown length", False), ("distances", False),
         ("words of unknown length", False)],
        ("positions", False),
    ),
)  # fmt: skip
def test_strategy_run(model, bug, monkeypatch):
    """Replicas of a loop of one's own add up what learned positions have in common, too."""
    if bug:
        monkeypatch.setattr("tfpar.compat._keras_run.has_shared_rows", lambda gradient: False)
    strategy, models, optimizers = tfpar.DataParallelStrategy(2), [], []
    for scope in (contextlib.nullcontext(), strategy.scope()):
        keras.utils.set_random_seed(1)
        with scope:
            models.append(MODELS[model]())
            optimizers.append(OPTIMIZERS["adam"]())

    def step(model, optimizer, x, y):
        with tf.GradientTape() as tape:
            losses = keras.losses.sparse_categorical_crossentropy(y, model(x, training=True))
            loss = tf.reduce_sum(losses) / 14.0
        weights = model.trainable_variables
        optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))

    batches = tf.data.Dataset.from_tensor_slices((X, Y)).batch(14)
    one = tf.function(lambda x, y: step(models[0], optimizers[0], x, y), autograph=False)
    several = tf.function(
        lambda x, y: strategy.run(step, args=(models[1], optimizers[1], x, y)), autograph=False, reduce_retracing=True
    )
    for _ in range(3):
        for batch in batches:
            one(*batch)
        for batch in strategy.experimental_distribute_dataset(batches):
            several(*batch)
    with pytest.raises(AssertionError, match="embeddings") if bug else contextlib.nullcontext():
        assert_same(*models, 1e-9, 1e-12)


# ---- how rows follow from those of parts


def kinds(make, length=None):
    x = layers.Input((length,), dtype="int32")
    graph = graph_from(keras.Model(x, make()(x)))
    return [Probe(graph).rows(0, v) for v in graph.variables]


@pytest.mark.fast
def test_kinds_of_rows():
    assert kinds(lambda: layers.Embedding(V, D)) == [Combine.ROWS]
    for length in (None, T):
        assert kinds(TokensAndPositions, length) == [Combine.ROWS, Combine.SAME]
    assert kinds(Distances) == [Combine.SAME] and kinds(lambda: Distances(True)) == [Combine.MIXED]
    assert kinds(lambda: Dense(), T) == [None]


# ---- arithmetic


VALUES = tf.constant(RNG.normal(size=(5, 4)))
ROWS = tf.IndexedSlices(VALUES, tf.constant([0, 2, 2, 5, 1]), tf.constant([6, 4]))
SHARED = SharedRows(*(ROWS.values, ROWS.indices, ROWS.dense_shape))


def dense(gradient):
    return tf.convert_to_tensor(plain(gradient)).numpy()


@pytest.mark.fast
def test_sums():
    assert np.allclose(dense(add(ROWS, ROWS)), 2 * dense(ROWS)) and add(ROWS, ROWS).values.shape == (10, 4)
    assert np.allclose(dense(add(SHARED, SHARED)), 2 * dense(ROWS)) and add(SHARED, SHARED).values.shape == (5, 4)
    assert add(SHARED, ROWS).values.shape == (10, 4)
    assert np.allclose(add(SHARED, tf.ones((6, 4), tf.float64)), 1 + dense(ROWS))
    one = folded(add(ROWS, ROWS), 2)
    assert np.array_equal(one.indices, ROWS.indices) and np.array_equal(one.values, 2 * VALUES)
    wide = tf.IndexedSlices(ROWS.values, tf.cast(ROWS.indices, "int64"), ROWS.dense_shape)
    assert np.allclose(dense(add(wide, ROWS)), 2 * dense(ROWS)) and np.allclose(dense(add(ROWS, wide)), 2 * dense(ROWS))


@pytest.mark.fast
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("make", [lambda: ROWS, lambda: SHARED, lambda: tf.convert_to_tensor(ROWS)])
def test_parts_make_up_the_whole(dim, make):
    gradient, edges = make(), [0, 2, 4] if dim else [0, 3, 6]
    pairs = list(zip(edges[:-1], edges[1:], strict=True))
    if isinstance(gradient, tf.Tensor):
        parts = [gradients.dense_part(gradient, dim, *pair) for pair in pairs]
    else:
        parts = [sparse_part(gradient, dim, (6, 4), *pair) for pair in pairs]
        assert all(type(part) is type(gradient) for part in parts)
    assert np.allclose(dense(of_parts(list(map(plain, parts)), Layout(dim), (6, 4))), dense(gradient))
    assert of_parts([gradient], REPLICATED, (6, 4)) is gradient


# ---- planted bugs


def rows_one_after_the_other(patch):
    patch.setattr("tfpar.engine.combination.shares_rows", lambda run, s, v, gradient: False)


def dense_at_once(patch):
    original = gradients.add
    for module in ("engine.vjp", "engine.stage_update", "comm.gradients"):
        patch.setattr(f"tfpar.{module}.add", lambda a, b: tf.convert_to_tensor(original(a, b)))


def rows_of_each_replica(patch):
    patch.setattr("tfpar.trainer.model_call.folded", lambda gradient, parts: gradient)


@pytest.mark.parametrize(
    "bug, model",
    some_fast(
        [(None, "positions"), (rows_one_after_the_other, "positions"), (dense_at_once, "words"),
         (rows_of_each_replica, "own step")],
        (None, "positions"), (rows_one_after_the_other, "positions"),
    ),
)  # fmt: skip
def test_planted_bugs_are_caught(bug, model, monkeypatch):
    if bug:
        bug(monkeypatch)
    options = {"build": MODELS[model], "optimizer": OPTIMIZERS["adam"]}
    one, other = compiled(**options), compiled(STRATEGIES["data"](), **options)
    for each in (one, other):
        history(X, Y, batch_size=5)(each)
    if bug:
        with pytest.raises(AssertionError, match="embeddings"):
            assert_same(one, other, 1e-9, 1e-12)
    else:
        assert_same(one, other, 1e-9, 1e-12)
