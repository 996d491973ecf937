"""Every rule divides what it says, and the numbers stay those of one device."""

import contextlib

import keras
import numpy as np
import pytest
from keras import layers, ops
from training import some_fast

import tfpar
from tfpar.compat import _keras
from tfpar.graph.keras_graph import Ref, graph_from
from tfpar.tensor_parallel import rules
from tfpar.testing import assert_same
from tfpar.trainer.hooks import hooks_of

C, T = 6, 4  # divided by 2 and 3


def model(shape, *steps, dtype=None):
    def build():
        x = h = layers.Input(shape, dtype=dtype)
        for step in steps:
            h = step()(h) if isinstance(step, type) or not hasattr(step, "apply") else step.apply(h)
        return keras.Model(x, h)

    return build


class apply:
    """A step that is not a layer."""

    def __init__(self, function):
        self.apply = function


def attention(x):
    return layers.MultiHeadAttention(3, 2)(x, x, use_causal_mask=True)


def grouped(heads, groups, **kwargs):
    return apply(lambda x: layers.GroupQueryAttention(2, heads, groups, **kwargs)(x, x))


def heads(x):
    """Attention of the elementary operations."""
    q, k, v = (
        ops.transpose(ops.reshape(layers.Dense(C)(x), (-1, T, 3, 2)), (0, 2, 1, 3)) for _ in range(3)
    )  # fmt: skip
    scores = ops.softmax(ops.einsum("bhqd,bhkd->bhqk", q, k) * 0.5)
    return ops.reshape(ops.transpose(ops.matmul(scores, v), (0, 2, 1, 3)), (-1, T, C))


def reversible(**kwargs):
    def call(tokens):
        layer = layers.ReversibleEmbedding(7, C, **kwargs)
        return layer(layers.LayerNormalization()(layer(tokens)), reverse=True)

    return apply(call)


def dense(units=C, **kwargs):
    return apply(lambda x: layers.Dense(units, **kwargs)(x))


def layer(kind, *args, **kwargs):
    return apply(lambda x: kind(*args, **kwargs)(x))


IMAGE, SEQUENCE = (8, 8, C), (T, C)
CASES = {  # a model, and which of its options must be chosen
    "dense": (model((5,), dense(12, activation="gelu"), dense(5)), "column-parallel row-parallel"),
    "dense, softmax": (model((5,), dense(12, activation="softmax")), "column-parallel, gathered"),
    "einsum": (
        model(SEQUENCE, layer(layers.EinsumDense, "btc,chd->bthd", (T, 3, 2), bias_axes="hd"),
              layer(layers.EinsumDense, "bthd,hdc->btc", (T, C), bias_axes="c", activation="softmax")),
        "column-parallel row-parallel",
    ),
    "embedding": (
        model((T,), layer(layers.Embedding, 7, 5), layer(layers.GRU, 3), dtype="int32"), "vocabulary-parallel",
    ),
    "masked embedding": (
        model((T,), layer(layers.Embedding, 7, C, mask_zero=True), layer(layers.GRU, 3), dtype="int32"), "parallel",
    ),
    "reversible embedding": (model((T,), reversible(), dtype="int32"), "vocabulary-parallel column-parallel"),
    "untied embedding": (model((T,), reversible(tie_weights=False), dtype="int32"), "column-parallel"),
    "attention": (model(SEQUENCE, apply(attention)), "heads"),
    "grouped attention": (model(SEQUENCE, grouped(6, 6)), "heads"),
    "few groups": (model(SEQUENCE, grouped(6, 1)), "heads"),
    "gated": (model(SEQUENCE, grouped(6, 2, use_gate=True)), "heads"),
    "elementary attention": (
        model(SEQUENCE, layer(layers.LayerNormalization), apply(heads), dense(C)),
        "column-parallel reshape transpose einsum elementwise softmax of other dims stack of products row-parallel",
    ),
    "convolution": (
        model(IMAGE, layer(layers.Conv2D, C, 3, activation="relu"), layer(layers.MaxPooling2D),
              layer(layers.ZeroPadding2D), layer(layers.Conv2D, 4, 3, padding="same", activation="relu")),
        "column-parallel channels row-parallel",
    ),
    "convolution 1d": (
        model(SEQUENCE, layer(layers.Conv1D, 12, 2), layer(layers.SpatialDropout1D, 0.0), layer(layers.Conv1D, 4, 2)),
        "column-parallel row-parallel",
    ),
    "separable": (
        model(IMAGE, layer(layers.SeparableConv2D, C, 3), layer(layers.DepthwiseConv2D, 3, activation="relu"),
              layer(layers.SeparableConv2D, 4, 3)),
        "column-parallel channels row-parallel",
    ),
    "batch normalization": (
        model(IMAGE, layer(layers.Conv2D, C, 3), layer(layers.BatchNormalization), layer(layers.ReLU),
              layer(layers.GlobalAveragePooling2D), dense(3)),
        "column-parallel channels elementwise row-parallel",
    ),
    "group normalization": (
        model(IMAGE, layer(layers.Conv2D, 12, 3), layer(layers.GroupNormalization, 6),
              layer(layers.Conv2D, 4, 3)),
        "groups row-parallel",
    ),
    "layer normalization": (
        model((5,), dense(12), layer(layers.LayerNormalization), dense(5)), "normalisation, statistics gathered",
    ),
    "rms normalization": (
        model((5,), dense(12), layer(layers.RMSNormalization), dense(5)), "normalisation, statistics gathered",
    ),
    "prelu": (model((5,), dense(12), layer(layers.PReLU), dense(5)), "elementwise"),
    "reshaping": (
        model((5,), dense(12), layer(layers.Reshape, (6, 2)), layer(layers.Permute, (2, 1)),
              layer(layers.UpSampling1D, 2), apply(lambda x: ops.mean(x, axis=1)), dense(5)),
        "reshape transpose channels reduction row-parallel",
    ),
    "merging": (
        model((5,), apply(lambda x: layers.concatenate(
            [layers.RepeatVector(2)(layers.Dense(12)(x)), layers.RepeatVector(1)(layers.Dense(12)(x))], axis=1)),
            dense(5)),
        "repeat concatenation",
    ),
    "splitting": (
        model((5,), dense(12), layer(layers.Reshape, (6, 2)),
              apply(lambda x: layers.multiply(ops.split(x, 2, axis=2))), layer(layers.Reshape, (6,)), dense(3)),
        "reshape split elementwise",
    ),
}  # fmt: skip


UNEVEN = [
    "einsum", "few groups", "grouped attention", "batch normalization", "separable", "elementary attention", "merging",
]  # fmt: skip
COUNTS = [*((name, 2) for name in CASES), *((name, 3) for name in UNEVEN)]
FAST = [("dense", 2), ("masked embedding", 2), ("attention", 2), ("layer normalization", 2), ("einsum", 3)]


@pytest.mark.parametrize("name, count", some_fast(COUNTS, *FAST))
def test_rule(name, count):
    build, wanted = CASES[name]
    strategy = tfpar.TensorParallelStrategy([f"CPU:{k}" for k in range(count)])
    found = []
    for scope in (None, strategy):
        keras.utils.set_random_seed(2)
        with scope.scope() if scope else contextlib.nullcontext():
            made = build()
            made.compile(keras.optimizers.SGD(0.1), "mse")
        rng = np.random.default_rng(0)
        shape = (5, *made.inputs[0].shape[1:])
        x = rng.integers(0, 7, shape) if made.inputs[0].dtype == "int32" else rng.normal(size=shape)
        y = rng.normal(size=(5, *made.outputs[0].shape[1:]))
        made.fit(x, y, batch_size=5, epochs=2, verbose=0)
        found.append(made)
    assert_same(*found, 1e-5, 1e-7)
    plan = strategy.explain(found[1])
    assert any(w.layout.dim is not None for w in plan.weights)
    graph = graph_from(_keras.graph_of(found[1]))
    names = {o.name for i in range(len(graph.calls)) for o in rules.options(rules.Site(graph, i, count))}
    missing = [w for w in wanted.split() if not any(w in n for n in names)]
    assert not missing
    held = plan.rank_bytes(0) / sum(w.bytes for w in plan.weights)
    assert held < 0.95
    assert len({c.device for v in found[1].weights for c in v.value.copies}) == count


class Own(layers.Layer):
    """A layer of a user's own."""

    def build(self, shape):
        self.kernel = self.add_weight(shape=(shape[-1], 12), name="kernel")

    def call(self, x):
        return ops.sin(ops.matmul(x, self.kernel))


@pytest.mark.fast
def test_own_rule():
    build = model((5,), layer(Own), dense(5))
    x, y = np.random.default_rng(0).normal(size=(2, 8, 5))
    try:

        @rules.rule(Own)
        def own(site):
            yield site.option("column-parallel", outputs=[site.last()], weights=[(site.layer.kernel, 1)])

        found = []
        for strategy in (None, tfpar.TensorParallelStrategy(["CPU:0", "CPU:1"])):
            keras.utils.set_random_seed(0)
            with strategy.scope() if strategy else contextlib.nullcontext():
                made = build()
                made.compile("sgd", "mse")
            made.fit(x, y, verbose=0)
            found.append(made)
        assert_same(*found, 1e-5, 1e-7)
        kernel = found[1].layers[1].kernel.value
        assert [c.shape.as_list() for c in kernel.copies] == [[5, 6]] * 2
        assert not hooks_of(found[1]).engine.partial
    finally:
        del rules.RULES[Own]


@pytest.mark.fast
def test_a_changed_call_has_no_rule():
    class Changed(layers.Dense):
        def call(self, x):
            return super().call(x) + ops.mean(x)

    class Named(layers.Dense):
        pass

    assert rules.rule_of(Changed(3)) is None
    assert rules.rule_of(Named(3)) is rules.RULES[layers.Dense]
    assert rules.rule_of(layers.Dense(3, activity_regularizer="l2")) is None
    assert rules.rule_of(layers.Lambda(lambda x: x)) is None


@pytest.mark.fast
@pytest.mark.parametrize(
    "before, after, ranks, pairs",
    [
        ((None, 12), (None, 6, 2), 2, [(1, 1)]),
        ((None, 12), (None, 6, 2), 5, []),
        ((None, 4, 3, 2), (None, 4, 6), 3, [(1, 1), (2, 2)]),
        ((None, 4, 3, 2), (None, 24), 2, [(1, 1)]),
        ((None, 4, 6), (None, 6, 4), 2, [(1, 1)]),
        ((None, 4, 6), (None, 6, 4), 3, []),
    ],
)
def test_dims_that_a_reshape_keeps(before, after, ranks, pairs):
    from tfpar.tensor_parallel.rules.reshaping import kept

    assert list(kept(before, after, ranks)) == pairs


class Gated(layers.Layer):
    """Each feature times a number of its own, and a product, before or after."""

    def __init__(self, rows):
        super().__init__()
        self.rows = rows

    def build(self, shape):
        self.kernel = self.add_weight(shape=(shape[-1], 12), name="kernel")
        self.gain = self.add_weight(shape=(12 if self.rows else shape[-1],), initializer="ones", name="gain")

    def call(self, x):
        return ops.matmul(x, self.kernel) * self.gain if self.rows else ops.matmul(x * self.gain, self.kernel)


class With:
    """A function of a tensor and a weight."""

    def __init__(self, function, weight):
        self.function, self.variables, self.__name__ = function, [weight], function.__name__

    def __call__(self, x):
        return self.function(x, ops.convert_to_tensor(self.variables[0]))


def columns(site):
    def build(local, inputs):
        gain, kernel = With(ops.multiply, site.layer.gain), With(ops.matmul, site.layer.kernel)
        x = local.make(gain, Ref(inputs[0]), shape=site.inputs[0], dtype="float32")
        return local.run(kernel, Ref(x), like=site.op.outputs, layouts=[site.last()])

    yield site.option("own", outputs=[site.last()], weights=[(site.layer.kernel, 1)], build=build)


def rows(site):
    def build(local, inputs):
        gain, kernel = With(ops.multiply, site.layer.gain), With(ops.matmul, site.layer.kernel)
        x = local.run(kernel, Ref(inputs[0]), like=site.op.outputs, layouts=[rules.REPLICATED])
        return local.reduced(local.run(gain, Ref(x), like=site.op.outputs, layouts=[rules.REPLICATED]))

    yield site.option("own", [site.last()], weights=[(site.layer.kernel, 0)], build=build)


@pytest.mark.fast
@pytest.mark.parametrize("rule", [columns, rows])
def test_weights_in_the_steps_of_a_rule(rule):
    """Ranks find parts of their gradients, however many steps come before a division, or before a sum."""
    x, y = np.random.default_rng(0).normal(size=(8, 6)), np.random.default_rng(1).normal(size=(8, 2))
    try:
        rules.rule(Gated)(rule)
        found = []
        for strategy in (None, tfpar.TensorParallelStrategy(["CPU:0", "CPU:1"])):
            keras.utils.set_random_seed(0)
            with strategy.scope() if strategy else contextlib.nullcontext():
                made = keras.Sequential([layers.Input((6,)), Gated(rule is rows), layers.Dense(2)])
                made.compile("sgd", "mse")
            made.fit(x, y, verbose=0)
            found.append(made)
        assert_same(*found, 1e-5, 1e-7)
        engine = hooks_of(found[1]).engine
        assert [engine.graph.variables[v].name for v in engine.partial] == ["gain"]
    finally:
        del rules.RULES[Gated]
