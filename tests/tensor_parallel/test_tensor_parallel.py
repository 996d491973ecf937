"""Tensor parallelism: numbers of one device, weights really divided, and as many exchanges as Megatron's."""

import contextlib
import types

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops
from training import OPTIMIZERS, check, data, history, mostly, some_fast
from zoo import ZOO

import tfpar
from tfpar.comm import collectives
from tfpar.engine.program import KNOWN
from tfpar.graph.keras_graph import graph_from
from tfpar.planning.sharding import REPLICATED
from tfpar.tensor_parallel.inline_layers import kind_of
from tfpar.testing import assert_same, difference, planned_exchanges, traced_exchanges
from tfpar.trainer.hooks import hooks_of
from tfpar.variables import logical, placed
from tfpar.variables.parts import parts_of

T, V, D = 6, 13, 12


def ranks(count=2, **kwargs):
    return tfpar.TensorParallelStrategy([f"CPU:{k}" for k in range(count)], **kwargs)


@keras.saving.register_keras_serializable()
class Block(layers.Layer):
    """A pre-norm transformer block as users write them, of layers and operations."""

    def __init__(self, heads=3, dropout=0.0, **kwargs):
        super().__init__(**kwargs)
        self.heads, self.rate = heads, dropout
        self.norms = [layers.LayerNormalization(), layers.RMSNormalization()]
        self.q, self.k, self.v, self.out = (layers.Dense(D, name=n) for n in ("q", "k", "v", "out"))
        self.up, self.down = layers.Dense(4 * D, activation="gelu", name="up"), layers.Dense(D, name="down")
        self.dropout = layers.Dropout(dropout, seed=7)

    def build(self, shape):
        self.scale = self.add_weight(shape=(D,), initializer="ones", name="scale")
        for layer in (*self.norms, self.q, self.k, self.v, self.out, self.up):
            layer.build(shape)
        self.down.build((*shape[:-1], 4 * D))

    def call(self, x, training=None):
        tokens, width = x.shape[1], D // self.heads
        y = self.norms[0](x)
        q, k, v = (
            ops.transpose(ops.reshape(dense(y), (-1, tokens, self.heads, width)), (0, 2, 1, 3))
            for dense in (self.q, self.k, self.v)
        )
        attention = ops.softmax(ops.matmul(q, ops.transpose(k, (0, 1, 3, 2))) / width**0.5)
        y = ops.reshape(ops.transpose(ops.matmul(attention, v), (0, 2, 1, 3)), (-1, tokens, D))
        x = x + self.dropout(self.out(y), training=training) * self.scale
        return x + self.down(self.up(self.norms[1](x)))

    def get_config(self):
        return {**super().get_config(), "heads": self.heads, "dropout": self.rate}


def gpt(blocks=1, heads=3, dropout=0.0):
    tokens = layers.Input((T,), dtype="int32")
    embedding = layers.ReversibleEmbedding(V, D)
    h = embedding(tokens)
    for _ in range(blocks):
        h = Block(heads, dropout)(h)
    return keras.Model(tokens, embedding(layers.LayerNormalization()(h), reverse=True))


def encoder(blocks=2, width=D, heads=4):
    x = h = layers.Input((T, width))
    for _ in range(blocks):
        h = layers.LayerNormalization()(layers.add([h, layers.MultiHeadAttention(heads, width // heads)(h, h)]))
        f = layers.Dense(width)(layers.Dense(4 * width, activation="gelu")(h))
        h = layers.LayerNormalization()(layers.add([h, f]))
    return keras.Model(x, h)


def words(rows=10):
    rng = np.random.default_rng(0)
    return rng.integers(0, V, (rows, T)), rng.integers(0, V, (rows, T))


def reals(rows=8, width=D):
    rng = np.random.default_rng(0)
    return tuple(rng.normal(size=(rows, T, width)).astype(keras.config.floatx()) for _ in range(2))


def from_logits(**kwargs):
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True, **kwargs)


def trained(strategy, build, optimizer="sgd", loss="mse", x=None, y=None, epochs=2, **compile):
    keras.utils.set_random_seed(1)
    with strategy.scope() if strategy else contextlib.nullcontext():
        model = build()
        model.compile(optimizer() if callable(optimizer) else optimizer, loss() if callable(loss) else loss, **compile)
    model.fit(x, y, batch_size=4, epochs=epochs, shuffle=False, verbose=0)
    return model


# ---- what is divided


@pytest.mark.parametrize("sequence", some_fast([False, True], False))
def test_exchanges_are_megatrons(sequence):
    blocks, strategy = 3, ranks(2, sequence_parallel=sequence)
    x, y = reals()
    model = trained(strategy, lambda: encoder(blocks), x=x, y=y)
    plan = strategy.explain(model)
    assert traced_exchanges(model, x, y) == planned_exchanges(plan)
    kinds = [(e.kind, e.backward) for e in plan.exchanges if e.where not in ("outputs", "weights")]
    if not sequence:
        # two all-reduces forward and two backward in each block; no gradient goes back to the model's input
        assert kinds == [("all-reduce", False)] * 2 * blocks + [("all-reduce", True)] * (2 * blocks - 1)
        assert not hooks_of(model).engine.partial
    else:
        assert kinds.count(("reduce-scatter", False)) == 2 * blocks  # f and g of Korthikanti et al., figure 5
        assert kinds.count(("all-gather", False)) == 2 * blocks - 1  # the model's input is there already
        assert kinds.count(("all-gather", True)) == 2 * blocks
        assert kinds.count(("reduce-scatter", True)) == 2 * blocks - 1
        assert len(kinds) == 8 * blocks - 2


def test_bytes_of_a_transformer_on_four_ranks():
    strategy = ranks(4)
    x, y = reals(width=64)
    model = trained(strategy, lambda: encoder(2, 64), "adam", x=x, y=y)
    whole = sum(v.value.shape.num_elements() for v in model.variables)
    for k in range(4):
        held = sum(v.value.copies[k].shape.num_elements() for v in model.variables if v.value.copies[k].shape.rank)
        assert held <= 0.27 * whole
        assert strategy.explain(model).rank_bytes(k) <= 0.27 * 4 * whole
    slot = next(v for v in model.optimizer.variables if v.path.endswith("dense_kernel_momentum"))
    assert [c.shape.as_list() for c in slot.value.copies] == [[64, 64]] * 4
    assert {c.device[-5:] for c in slot.value.copies} == {"CPU:0", "CPU:1", "CPU:2", "CPU:3"}
    for layer in range(2):
        kernel = model.get_layer("multi_head_attention" + "_1" * layer).query_dense.kernel
        assert [c.shape.as_list() for c in kernel.value.copies] == [[64, 1, 16]] * 4


def test_products_run_on_every_device():
    x, y = reals()
    model = trained(ranks(3), encoder, x=x, y=y)
    from tfpar.trainer.step_function import StepFunction

    steps = hooks_of(model)
    function, _ = StepFunction(steps, steps.train_step).prepared(((x, y),), None, None)
    called = [op.device for op in function.graph.get_operations() if op.type == "PartitionedCall"]
    assert {d[-5:] for d in called} == {"CPU:0", "CPU:1", "CPU:2"}


def test_alike_blocks_are_compiled_once():
    x, y = reals()
    before = len(KNOWN)
    strategy = ranks(2)
    model = trained(strategy, lambda: encoder(6), x=x, y=y)
    engine = hooks_of(model).engine
    functions = [t.function for p in engine.programs.values() for t in p.call.traces.values()]
    assert len(functions) >= 20
    assert len({id(f) for f in functions}) <= 5
    assert len(KNOWN) - before <= 8


def test_composite_layers_are_opened():
    strategy = ranks(3)
    model = trained(strategy, gpt, loss=from_logits, x=words()[0], y=words()[1])
    plan = strategy.explain(model)
    assert {w.why.split(" in ")[0] for w in plan.weights if w.layout.dim is not None} == {
        "vocabulary-parallel", "column-parallel", "row-parallel",
    }  # fmt: skip
    forward = [e.where for e in plan.exchanges if not e.backward and e.where not in ("loss", "outputs")]
    assert len(forward) == 1 + 2  # the embedding's, and two for the block
    assert plan.rank_bytes(0) < 0.4 * sum(w.bytes for w in plan.weights)


@keras.saving.register_keras_serializable()
class Frozen(layers.Layer):
    """Cannot be opened: it has a loop."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.inner = layers.Dense(D)

    def build(self, shape):
        self.inner.build(shape)

    def call(self, x):
        return tf.map_fn(self.inner, x)


def test_what_no_rule_divides_runs_on_every_rank():
    def build():
        x = layers.Input((T, D))
        return keras.Model(x, layers.GRU(4)(Frozen()(layers.Dense(D)(x))))

    x, _ = reals()
    y = np.zeros((8, 4), "float32")
    strategy = ranks(2)
    model = trained(strategy, build, x=x, y=y)
    assert_same(trained(None, build, x=x, y=y), model, 1e-5, 1e-7)
    why = {w.path.split("/")[0]: w.why for w in strategy.explain(model).weights}
    assert why["frozen"].startswith("no rule divides Frozen, and what it runs is not divided: map")
    assert why["gru"] == "no rule divides GRU"


# ---- numbers of one device


@pytest.mark.parametrize("count, sequence", [(3, True), pytest.param(4, False, marks=pytest.mark.every)])
def test_gpt_equals_one_device(count, sequence):
    x, y = words()
    one = trained(None, gpt, loss=from_logits, x=x, y=y, metrics=["accuracy"])
    other = trained(
        ranks(count, sequence_parallel=sequence), gpt, loss=from_logits, x=x, y=y, metrics=["accuracy"]
    )  # fmt: skip
    assert_same(one, other, 1e-5, 1e-7)
    assert difference(one.predict(x, verbose=0), other.predict(x, verbose=0)) < 1e-5
    assert difference(one.evaluate(x, y, verbose=0), other.evaluate(x, y, verbose=0)) < 1e-5


def dense_model():
    x = layers.Input((D,))
    h = layers.Dense(
        2 * D, activation="tanh", kernel_regularizer="l2", kernel_constraint=keras.constraints.MaxNorm(0.9)
    )(x)
    return keras.Model(x, layers.Dense(D, bias_regularizer=keras.regularizers.L1(0.01))(h))


@pytest.mark.parametrize("name", mostly(OPTIMIZERS, list(OPTIMIZERS)[1:12:4], ["adamw, norms", "average"]))
def test_optimizers(name):
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 8, D))

    def build():
        model = dense_model()
        if name not in ("muon", "lamb"):  # those are tested with a constraint
            model.layers[1]._kernel.constraint = None
        return model

    one, other = (trained(s, build, OPTIMIZERS[name], x=x, y=y) for s in (None, ranks(3)))
    assert_same(one, other, 1e-9, 1e-11)


@pytest.mark.parametrize("bug", ["shares of the norm", "no sum", "parts in another order", "whole gradient twice"])
def test_planted_bugs_are_caught(bug, monkeypatch):
    x, y = reals()
    optimizer = lambda: keras.optimizers.SGD(0.05, global_clipnorm=0.05)  # noqa: E731
    one = trained(None, encoder, optimizer, x=x, y=y)
    from tfpar.engine.optimizer_step import Update

    if bug == "shares of the norm":
        monkeypatch.setattr(Update, "counted", lambda self, p: tf.ones(len(self.members[p.stage]), tf.float64))
    if bug == "no sum":
        monkeypatch.setitem(collectives.EXCHANGES, "all-reduce", collectives.identity)
    if bug == "parts in another order":
        for module in (logical, placed):
            monkeypatch.setattr(module, "parts_of", lambda *a: parts_of(*a)[::-1])
    if bug == "whole gradient twice":
        original = collectives.Collective.back
        monkeypatch.setattr(
            collectives.Collective, "back", lambda self, gradients, *a: [2 * g for g in original(self, gradients, *a)]
        )  # fmt: skip
    with pytest.raises(AssertionError):
        assert_same(one, trained(ranks(2), encoder, optimizer, x=x, y=y), 1e-5, 1e-7)


@pytest.mark.parametrize("loss", some_fast(["logits", "softmax", "ignored", "class 0 ignored", "weights"], "softmax"))
def test_loss_of_divided_logits(loss):
    options = {"ignored": {"ignore_class": 5}, "class 0 ignored": {"ignore_class": 0}}.get(loss, {})
    x, y = words()

    def build():
        tokens = layers.Input((T,), dtype="int32")
        activation = "softmax" if loss == "softmax" else None
        h = layers.LayerNormalization()(layers.Embedding(V, D)(tokens))
        return keras.Model(tokens, layers.Dense(50, activation)(h))

    def compiled(strategy):
        with strategy.scope() if strategy else contextlib.nullcontext():
            keras.utils.set_random_seed(0)
            model = build()
            made = keras.losses.SparseCategoricalCrossentropy(from_logits=loss != "softmax", **options)
            model.compile("sgd", made, metrics=["accuracy"], weighted_metrics=["accuracy"])
        weights = np.random.default_rng(1).uniform(size=y.shape) if loss == "weights" else None
        logs = model.fit(x, y, sample_weight=weights, batch_size=4, epochs=2, shuffle=False, verbose=0).history
        return model, logs

    strategy = ranks(3)
    (one, expected), (other, found) = compiled(None), compiled(strategy)
    assert_same(one, other, 1e-5, 1e-7)
    for name, values in expected.items():
        assert difference(values, found[name]) < 1e-5
    assert hooks_of(other).engine.loss_parallel
    kinds = [e.kind for e in strategy.explain(other).exchanges if e.where == "loss"]
    assert kinds == ["maximum", "all-reduce"]


@pytest.mark.fast
def test_two_classes_keep_their_precision():
    from tfpar.tensor_parallel.loss_parallel import CrossEntropy, Terms, TwoClasses

    logits = np.array([[80.0, 1.0, 0.0], [0.0, 1.0, 80.0]], "float32")  # a sure prediction, and one that is wrong
    y = tf.constant([0, 0])
    loss = CrossEntropy(True, None, "float32", ((None,), "int32"))
    terms = sum(
        Terms(loss, 3, 3)(tf.constant(k), tf.constant(logits[:, k : k + 1]), tf.reduce_max(logits, -1)[:, None], y)
        for k in range(3)
    )
    two = TwoClasses(loss)(terms, tf.reduce_max(logits, -1)[:, None])
    found = from_logits(reduction=None)(loss.targets(y), two)
    expected = from_logits(reduction=None)(y, logits)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.fast
def test_random_masks():
    """Where ranks have all of a tensor they drop the same elements, of parts each drops others."""
    x = np.ones((4, 2000), "float32")

    def build(divided):
        inputs = h = layers.Input((2000,))
        h = layers.Dense(2000, use_bias=False, kernel_initializer="identity")(h) if divided else h
        h = layers.Dropout(0.5, seed=3)(h)
        return keras.Model(inputs, h)

    for divided in (False, True):
        with ranks(2).scope():
            model = build(divided)
            model.compile("sgd", "mse")
        seen = np.array(model_in_training(model, x))
        halves = seen[:, :1000], seen[:, 1000:]
        assert 0.45 < np.mean(seen == 0) < 0.55
        assert np.any(halves[0] != halves[1])
        again = np.array(model_in_training(model, x))
        assert np.any(seen != again)
        one = build(divided)
        if not divided:
            assert_close = model_in_training(one, x)
            assert np.array_equal(seen, assert_close)


def model_in_training(model, x):
    """What a step of a user's own sees of the model in training."""
    found = []

    class Watch(keras.callbacks.Callback):
        pass

    steps = hooks_of(model)
    if steps is None:
        return model(x, training=True)

    def step(data, parts):
        with steps.running(data, parts):
            return model(data.whole[0], training=True)

    from tfpar.trainer.step_function import StepFunction

    found = StepFunction(steps, step)((x,))
    return found


def test_dropout_trains():
    x, y = words()
    model = trained(ranks(2), lambda: gpt(1, dropout=0.3), "adam", from_logits, x, y, epochs=2)
    history = model.fit(x, y, epochs=12, verbose=0).history["loss"]
    assert history[-1] < history[0]


@pytest.mark.fast
def test_state_of_divided_channels():
    zoo = ZOO["normalized"]
    rng = np.random.default_rng(0)
    x, y = zoo.data(rng, 8)
    one, other = (trained(s, zoo.build, loss=zoo.loss, x=x, y=y) for s in (None, ranks(2)))
    assert_same(one, other, 1e-5, 1e-7)
    moving = other.layers[2].moving_mean
    assert [c.shape.as_list() for c in moving.value.copies] == [[2], [2]]


# ---- everything else a user does


def test_files_hold_whole_weights(tmp_path):
    x, y = reals()
    strategy = ranks(2)
    model = trained(strategy, encoder, "adam", x=x, y=y)
    alone = trained(None, encoder, "adam", x=x, y=y)
    for name in ("model.keras", "model.weights.h5"):
        for one, other, scope in (
            (model, None, contextlib.nullcontext()),
            (alone, ranks(3), None),
        ):
            path = str(tmp_path / name)
            one.save(path) if name.endswith("keras") else one.save_weights(path)
            with scope or other.scope():
                if name.endswith("keras"):
                    loaded = keras.models.load_model(path)
                    assert_same(one, loaded, 0)
                    loaded.fit(x, y, batch_size=4, epochs=1, shuffle=False, verbose=0)
                    assert len(loaded.optimizer.variables) == len(one.optimizer.variables)
                else:
                    loaded = encoder()
                    loaded.load_weights(path)
                    for a, b in zip(one.weights, loaded.weights, strict=True):
                        np.testing.assert_array_equal(a, b)
            if other is not None:
                loaded.predict(x, verbose=0)
                assert len(loaded.layers[1].query_dense.kernel.value.copies) == 3
    checkpoint = tf.train.Checkpoint(model=model)
    path = checkpoint.save(str(tmp_path / "checkpoint"))
    plain = encoder()
    tf.train.Checkpoint(model=plain).restore(path).expect_partial()
    for a, b in zip(model.weights, plain.weights, strict=True):
        np.testing.assert_array_equal(a, b)
    for weight in model.weights:
        weight.assign(np.zeros(weight.shape))
    checkpoint.restore(path)
    for a, b in zip(model.weights, plain.weights, strict=True):
        np.testing.assert_array_equal(a, b)


def test_get_and_set_weights():
    x, y = reals()
    model = trained(ranks(3), encoder, x=x, y=y)
    values = [np.random.default_rng(n).normal(size=v.shape).astype("float32") for n, v in enumerate(model.weights)]
    model.set_weights(values)
    for a, b, variable in zip(values, model.get_weights(), model.weights, strict=True):
        np.testing.assert_array_equal(a, b)
        assert variable.shape == a.shape == tuple(variable.value.shape)
    kernel = model.layers[1].query_dense.kernel
    kernel.assign_add(np.ones(kernel.shape))
    np.testing.assert_array_equal(kernel, values[0] + 1)
    np.testing.assert_allclose(np.concatenate([c.numpy() for c in kernel.value.copies], 1), values[0] + 1)


def test_rows_are_scattered_to_their_parts():
    x, y = words()
    model = trained(ranks(3), gpt, loss=from_logits, x=x, y=y)
    table = model.layers[1]._embeddings.value
    before = table.numpy()
    table.scatter_add(tf.IndexedSlices(tf.ones((2, D)), tf.constant([0, V - 1]), tf.constant([V, D])))
    before[[0, V - 1]] += 1
    np.testing.assert_allclose(table.numpy(), before)


class OwnStep(keras.Model):
    """A step with the gradient of a gradient."""

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as outer:
            with tf.GradientTape() as tape:
                tape.watch(x := tf.convert_to_tensor(x))
                y_pred = self(x, training=True)
            slope = tape.gradient(y_pred, x)
            loss = tf.reduce_mean(tf.square(y - y_pred)) + 0.1 * tf.reduce_mean(tf.square(slope))
        gradients = outer.gradient(loss, self.trainable_variables)
        self.optimizer.apply(gradients, self.trainable_variables)
        return {"loss": loss}


def test_own_train_step():
    def build():
        x = layers.Input((6,))
        h = layers.Dense(5, activation="tanh")(x)
        return OwnStep(x, layers.Dense(3)(layers.Dense(4, activation="softplus")(h)))

    x = data()[0]
    y = np.random.default_rng(2).normal(size=(len(x), 3)).astype("float32")
    _, other = check(ranks(2), history(x, y, batch_size=8, epochs=2), build=build, loss=None, metrics=lambda: None)
    assert any(weight.layout != REPLICATED for weight in hooks_of(other).engine.plan.weights)


def test_mixed_precision():
    keras.config.set_dtype_policy("mixed_bfloat16")
    x, y = reals()
    one, other = (trained(s, encoder, x=x, y=y) for s in (None, ranks(2)))
    for a, b in zip(one.weights, other.weights, strict=True):
        assert np.abs(np.asarray(a) - np.asarray(b)).max() < 2e-2
    exchanged = [e for e in hooks_of(other).engine.plan.exchanges if e.kind == "all-reduce"]
    assert {e.bytes for e in exchanged} == {T * D * 2}  # bfloat16


@pytest.mark.parametrize("jit", [False, True])
def test_a_float32_layer_in_a_model_of_bfloat16(jit):
    """As a classifier's last layer is to be; Keras reads its weights in bfloat16 all the same."""
    keras.config.set_dtype_policy("mixed_bfloat16")

    def build():
        x = layers.Input((16,))
        return keras.Model(x, layers.Dense(8, "softmax", dtype="float32")(layers.Dense(32, "relu")(x)))

    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(16, 16)).astype("float32"), rng.integers(0, 8, 16)
    models = [
        trained(s, build, x=x, y=y, loss="sparse_categorical_crossentropy", jit_compile=jit) for s in (None, ranks(2))
    ]
    for a, b in zip(*(m.weights for m in models), strict=True):
        assert np.abs(np.asarray(a) - np.asarray(b)).max() < 2e-2


def test_jit_compile_and_eager():
    x, y = reals()
    one = trained(None, lambda: encoder(1), x=x, y=y)
    for options in ({"jit_compile": True}, {"run_eagerly": True}):
        assert_same(one, trained(ranks(2), lambda: encoder(1), x=x, y=y, **options), 1e-5, 1e-7)


def test_compiled_again_keeps_its_parts():
    x, y = reals()
    strategy = ranks(2)
    model = trained(strategy, encoder, x=x, y=y)
    kernel = model.layers[1].query_dense.kernel
    before = kernel.value.copies
    model.compile("adam", "mse", jit_compile=False)
    model.fit(x, y, verbose=0)
    assert kernel.value.copies is before


def test_lora():
    x, y = reals()

    def build():
        inputs = layers.Input((T, D))
        up, down = layers.Dense(4 * D, activation="gelu"), layers.Dense(D)
        model = keras.Model(inputs, down(up(inputs)))
        for layer in (up, down):
            layer.enable_lora(2)
            layer.lora_kernel_b.assign(np.random.default_rng(0).normal(size=layer.lora_kernel_b.shape))
        return model

    one, other = (trained(s, build, "adam", x=x, y=y) for s in (None, ranks(2)))
    assert_same(one, other, 1e-4, 1e-6)
    up, down = other.layers[1:]
    assert up.lora_kernel_b.value.copies[0].shape[1] == 2 * D
    assert down.lora_kernel_a.value.copies[0].shape[0] == 2 * D


def test_explain_before_and_after_training():
    strategy = ranks(2)
    with strategy.scope():
        model = encoder(1)
        model.compile("adam", "mse")
    before = str(strategy.explain(model))
    x, y = reals()
    model.fit(x, y, verbose=0)
    after = str(strategy.explain(model))
    for text in (before, after):
        assert "heads in multi_head_attention" in text
        assert "(12, 24)" in text
        assert "all-reduce" in text
        assert "CPU:1" in text
        assert "?" not in text  # slots are known once the model is compiled


def test_one_rank():
    x, y = reals()
    assert_same(trained(None, encoder, x=x, y=y), trained(ranks(1), encoder, x=x, y=y), 1e-6, 1e-7)


def test_two_models_share_a_layer():
    x, y = reals()
    shared_by = types.SimpleNamespace()

    def build():
        inputs = layers.Input((T, D))
        layer = layers.Dense(2 * D)
        shared_by.one = keras.Model(inputs, layers.Dense(D)(layer(inputs)))
        return keras.Model(inputs, layers.Dense(D)(ops.tanh(layer(inputs))))

    found = []
    for strategy in (None, ranks(2)):
        model = trained(strategy, build, x=x, y=y)
        with strategy.scope() if strategy else contextlib.nullcontext():
            shared_by.one.compile("sgd", "mse")
        shared_by.one.fit(x, y, batch_size=4, epochs=1, shuffle=False, verbose=0)
        found.append((model, shared_by.one))
    assert_same(found[0][0], found[1][0], 1e-5, 1e-7)
    assert_same(found[0][1], found[1][1], 1e-5, 1e-7)


# ---- what was wrong once


def test_mixed_precision_outside_of_training():
    """Within a model's call, Keras variables read as cast tensors."""
    keras.config.set_dtype_policy("mixed_bfloat16")
    x, y = reals()
    one, other = (trained(s, lambda: encoder(1), x=x, y=y) for s in (None, ranks(2)))
    assert difference(one.evaluate(x, y, verbose=0), other.evaluate(x, y, verbose=0)) < 1e-2
    assert difference(one.predict(x, verbose=0).astype("float32"), other.predict(x, verbose=0).astype("float32")) < 2e-2


@keras.saving.register_keras_serializable()
class OtherInInference(keras.Model):
    """Calls its layers in another order in inference, and one of them only there."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.two = [layers.Dense(D, activation="tanh"), layers.Dense(D)]
        self.last = layers.Dense(D)

    def build(self, shape):
        for layer in (*self.two, self.last):
            layer.build(shape)

    def call(self, x, training=None):
        return self.two[0](self.two[1](x)) if training else self.last(self.two[1](self.two[0](x)))


def test_other_layers_in_inference():
    x, y = reals()
    one, other = (trained(s, OtherInInference, x=x, y=y) for s in (None, ranks(2)))
    assert_same(one, other, 1e-5, 1e-7)
    assert difference(one.predict(x, verbose=0), other.predict(x, verbose=0)) < 1e-5


def test_own_loop():
    """A tape sees the whole of a divided weight, and updates are of the whole."""
    x, y = reals()
    found = []
    for strategy in (None, ranks(2)):
        model = trained(strategy, lambda: encoder(1), x=x, y=y)
        for _ in range(2):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(tf.square(model(x, training=True) - y))
            gradients = tape.gradient(loss, model.trainable_variables)
            assert [g.shape for g in gradients] == [v.shape for v in model.trainable_variables]
            model.optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        found.append(model)
    assert_same(*found, 1e-5, 1e-6)


@keras.saving.register_keras_serializable()
class Counts(layers.Layer):
    """Keeps a count beside its layer."""

    def build(self, shape):
        self.inner = layers.Dense(D)
        self.inner.build(shape)
        self.count = self.add_weight(shape=(), initializer="zeros", trainable=False)

    def call(self, x):
        self.count.assign_add(1.0)
        return self.inner(x) * (1.0 + self.count)


@keras.saving.register_keras_serializable()
class Casts(layers.Layer):
    """Computes in another dtype than its model."""

    def build(self, shape):
        self.inner = layers.Dense(D, dtype=self.dtype_policy)
        self.inner.build(shape)

    def call(self, x):
        return self.inner(x) + ops.exp(x)


@pytest.mark.parametrize("kind", [Counts, lambda: Casts(dtype="mixed_bfloat16")])
def test_composites_that_do_more(kind):
    def build():
        x = layers.Input((T, D))
        return keras.Model(x, layers.Dense(D, dtype="float32")(kind()(layers.Dense(D)(x))))

    x, y = reals()
    one, other = (trained(s, build, keras.optimizers.SGD(1e-3), x=x, y=y) for s in (None, ranks(2)))
    assert_same(one, other, 1e-5 if kind is Counts else 2e-3, 1e-7)


@keras.saving.register_keras_serializable()
class Affine(layers.Layer):
    """Weights without dimensions."""

    def build(self, shape):
        self.scale, self.bias = (self.add_weight(shape=(), initializer=start) for start in ("ones", "zeros"))

    def call(self, x):
        return self.scale * x + self.bias


@pytest.mark.fast
def test_scalar_weights_of_what_is_divided():
    def build():
        x = layers.Input((T, D))
        return keras.Model(x, layers.Dense(D)(Affine()(layers.Dense(8 * D)(x))))

    x, y = reals()
    strategy = ranks(2)
    one, other = (trained(s, build, x=x, y=y) for s in (None, strategy))
    assert_same(one, other, 1e-5, 1e-7)
    assert strategy.explain(other).parameter_bytes(0) < 0.6 * one.count_params() * 4


@keras.saving.register_keras_serializable()
class Branches(layers.Layer):
    """Decides by a size that is not known before there is data."""

    def build(self, shape):
        self.none, self.some = layers.Dense(D), layers.Dense(D)
        self.none.build(shape)
        self.some.build(shape)

    def call(self, x):
        return ops.cond(ops.greater(ops.shape(x)[1], 0), lambda: self.some(x), lambda: self.none(x))


@pytest.mark.fast
def test_layers_in_branches():
    def build():
        x = layers.Input((None, D))
        return keras.Model(x, layers.Dense(D)(Branches()(x)))

    x, y = reals()
    one, other = (trained(s, build, x=x, y=y) for s in (None, ranks(2)))
    assert_same(one, other, 1e-5, 1e-7)


@keras.saving.register_keras_serializable()
class Places(layers.Layer):
    """Looks up positions that are a tensor of the layer, as ViT does."""

    def build(self, shape):
        self.positions, self.dense = layers.Embedding(T, D), layers.Dense(D)
        self.places = ops.arange(T)
        self.positions.build(shape)
        self.dense.build(shape)

    def call(self, x):
        return self.dense(x + self.positions(self.places))


@pytest.mark.fast
def test_layers_that_are_given_a_constant():
    def build():
        x = layers.Input((T, D))
        return keras.Model(x, Places()(x))

    x, y = reals()
    strategy = ranks(2)
    one, other = (trained(s, build, x=x, y=y) for s in (None, strategy))
    assert_same(one, other, 1e-5, 1e-7)
    assert strategy.explain(other).parameter_bytes(0) < 0.7 * one.count_params() * 4


class Normed(layers.Dense):
    """Another kernel behind an unchanged call."""

    @property
    def kernel(self):
        return self._kernel / ops.norm(self._kernel, axis=0)


@pytest.mark.fast
def test_rules_are_for_what_a_layer_inherits_unchanged():
    from tfpar.tensor_parallel.rules import rule_of

    assert rule_of(Normed(3)) is None


@pytest.mark.fast
def test_layers_that_get_a_mask():
    def build():
        tokens = layers.Input((T,), dtype="int32")
        h = layers.Embedding(V, D, mask_zero=True)(tokens)
        h = layers.BatchNormalization()(h)
        return keras.Model(tokens, layers.Dense(V)(layers.GlobalAveragePooling1D()(h)))

    x, y = words()
    one, other = (trained(s, build, loss=from_logits, x=x, y=y[:, 0]) for s in (None, ranks(2)))
    assert_same(one, other, 1e-5, 1e-7)


def test_softmax_along_the_sequence():
    def along(t):
        return ops.softmax(t, axis=1)

    def build():
        x = layers.Input((T, D))
        h = layers.Dense(D, activation=along)(layers.Dense(4 * D, activation="relu")(x))
        return keras.Model(x, layers.Dense(D)(layers.Dense(4 * D, activation="relu")(layers.LayerNormalization()(h))))

    x, y = reals()
    one, other = (trained(s, build, x=x, y=y) for s in (None, ranks(2, sequence_parallel=True)))
    assert_same(one, other, 1e-5, 1e-7)


def test_words_that_there_are_not():
    x, y = words(4)
    build = lambda: gpt(1)  # noqa: E731
    with pytest.raises(tfpar.StageError, match="rank 0 on CPU:0, in reversible_embedding failed.*not in"):
        trained(ranks(2), build, loss=from_logits, x=x + V, y=y)
    model = trained(ranks(2), build, loss=from_logits, x=x, y=y + V, epochs=1)
    assert np.isnan(model.weights[0].numpy()).any()  # the loss was NaN, not a number made up


def test_masks_of_heads_and_shared_dropout():
    mask = np.random.default_rng(0).integers(0, 2, (1, 4, T, T)).astype(bool)

    def build():
        x = layers.Input((T, D))
        h = layers.MultiHeadAttention(4, 3)(x, x, attention_mask=mask)
        return keras.Model(
            x, layers.Dense(D)(layers.Dropout(0.5, noise_shape=(None, T, 1), seed=1)(layers.Dense(24)(h)))
        )

    x, y = reals()
    one, other = (trained(s, build, x=x, y=y) for s in (None, ranks(2)))
    assert_same(one, other, 1e-5, 1e-7)


def test_prediction_before_training_keeps_the_loss_divided():
    x, y = words()
    strategy = ranks(2)
    with strategy.scope():
        model = gpt(1)
        model.compile("sgd", from_logits())
    model.predict(x, verbose=0)
    model.fit(x, y, verbose=0)
    assert hooks_of(model).engine.loss_parallel


def test_saved_model_by_hand_says_what_to_do(tmp_path):
    x, y = reals()
    model = trained(ranks(2), lambda: encoder(1), x=x, y=y)
    with pytest.raises(tfpar.ModelError, match="use model.export"):
        tf.saved_model.save(model, str(tmp_path / "exported"))


def test_written_layouts_that_do_not_fit_together():
    layout = {"(query|key|value)/kernel": (None, "tensor", None), "dense_(1|2)/kernel": (None, "tensor")}

    def build():
        x = layers.Input((T, D))
        h = layers.MultiHeadAttention(4, 3)(x, x)
        return keras.Model(x, layers.Dense(D, name="dense_2")(layers.Dense(D, name="dense_1")(h)))

    x, y = reals()
    one, other = (trained(s, build, x=x, y=y) for s in (None, ranks(2, layout=layout)))
    assert_same(one, other, 1e-5, 1e-7)


@keras.saving.register_keras_serializable()
class Causal(layers.Layer):
    """Makes a mask of the size of its batch, as a well-known example does."""

    def build(self, shape):
        self.attention, self.dense = layers.MultiHeadAttention(4, 3), layers.Dense(D)
        self.attention.build(shape, shape)
        self.dense.build(shape)

    def call(self, x):
        rows, tokens = ops.shape(x)[0], ops.shape(x)[1]
        i, j = ops.arange(tokens)[:, None], ops.arange(tokens)
        mask = ops.tile(ops.reshape(ops.cast(i >= j, "int32"), (1, tokens, tokens)), (rows, 1, 1))
        return self.dense(self.attention(x, x, attention_mask=mask))


@pytest.mark.fast
def test_composites_that_ask_for_the_size_of_their_batch():
    def build():
        x = layers.Input((T, D))
        return keras.Model(x, Causal()(x))

    x, y = reals(6)  # batches of 4 and 2
    strategy = ranks(2)
    one, other = (trained(s, build, x=x, y=y) for s in (None, strategy))
    assert_same(one, other, 1e-5, 1e-7)
    assert "heads in causal" in str(strategy.explain(other))


def test_calls_with_other_large_constants_are_not_alike():
    class Shifted(layers.Layer):
        def call(self, x, by):
            return x + by

    x = keras.Input((2000,))
    one, other = np.zeros(2000, "float32"), np.zeros(2000, "float32")
    other[1000] = 1.0  # where a text of it has dots
    model = keras.Model(x, [Shifted()(x, by=one), Shifted()(x, by=other)])
    graph = graph_from(model)
    first, second = (kind_of(graph, i) for i in range(2))
    assert first != second and first == kind_of(graph, 0)
