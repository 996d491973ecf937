"""A program and its backward pass: the numbers of one device, with less kept in between than TensorFlow keeps."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from training import check, data, history, mostly

import tfpar
from tfpar.engine import executor, in_place, remat, vjp
from tfpar.engine.program import Function

X, Y = data(12)
WORDS = np.random.default_rng(0).integers(0, 9, (12, 5))
WIDTH = X.shape[1]


def block(h, width):
    attention = layers.MultiHeadAttention(2, width // 2)
    h = layers.LayerNormalization()(layers.add([h, attention(h, h)]))
    f = layers.Dense(width)(layers.Dense(4 * width, activation="gelu")(h))
    return layers.LayerNormalization()(layers.add([h, f]))


def encoder():
    x = layers.Input((5,), dtype="int32")
    embedding = layers.Embedding(9, 8)
    h = block(embedding(x), 8)
    logits = keras.ops.matmul(h, keras.ops.transpose(embedding(keras.ops.arange(9))))  # a tied weight
    return keras.Model(x, layers.Softmax()(layers.Dense(3)(layers.GlobalAveragePooling1D()(logits))))


def several_ends():
    """An output without a loss, one that is another's input, a loss that a layer adds."""
    x = layers.Input((WIDTH,))
    h = layers.Dense(6, activation="silu", activity_regularizer="l2")(x)
    first = layers.Dense(3, activation="softmax", name="first")(h)
    unused = layers.Dense(2, name="unused")(h)
    return keras.Model(
        x, [layers.Dense(3, activation="softmax", name="second")(layers.concatenate([first, h])), unused]
    )


class Custom(layers.Layer):
    """Has a gradient of its own: not that of what it computes."""

    def call(self, x):
        @tf.custom_gradient
        def function(x):
            y = tf.exp(-x * x)
            return y, lambda upstream: upstream * y * 0.5

        return function(x)


def custom():
    x = layers.Input((WIDTH,))
    h = Custom()(layers.Dense(8)(x))
    return keras.Model(x, layers.Dense(3, activation="softmax")(Custom()(layers.Dense(8, activation="elu")(h))))


class Assigns(layers.Layer):
    """Changes its own weight after it has used it."""

    def build(self, shape):
        self.k = self.add_weight(shape=(shape[-1], shape[-1]), trainable=False, initializer="glorot_uniform")

    def call(self, x):
        y = keras.ops.matmul(x, self.k)
        self.k.assign(self.k * 0.5)
        return y


def assigned():
    x = layers.Input((WIDTH,))
    return keras.Model(x, layers.Dense(3, activation="softmax")(Assigns()(layers.Dense(8)(x))))


def compared():
    """A maximum, the gradient of which looks for it again; frozen weights."""
    x = layers.Input((WIDTH,))
    frozen = layers.Dense(8, activation="relu6")
    frozen.trainable = False
    h = layers.Dense(8)(x)
    h = keras.ops.max(keras.ops.reshape(layers.Dense(8, activation="gelu")(frozen(h)), (-1, 4, 2)), axis=-1)
    return keras.Model(x, layers.Dense(3, activation="softmax", dtype="float32")(h))


def loops():
    x = layers.Input((5,), dtype="int32")
    h = layers.GRU(6, return_sequences=True)(layers.Embedding(9, 8)(x))
    return keras.Model(x, layers.Dense(3, activation="softmax")(layers.GRU(6)(h)))


def images():
    x = layers.Input((WIDTH,))
    h = layers.Conv2D(4, 2, activation="relu", padding="same")(layers.Reshape((WIDTH // 2, 2, 1))(x))
    h = layers.MaxPooling2D((2, 1))(layers.GroupNormalization(2)(h))
    return keras.Model(x, layers.Dense(3, activation="softmax")(layers.Flatten()(h)))


ONE = "sparse_categorical_crossentropy"
MODELS = {
    "encoder": (encoder, WORDS, Y, ONE),
    "several ends": (several_ends, X, (Y, np.zeros((12, 2))), [ONE, None]),
    "custom gradient": (custom, X, Y, ONE),
    "assigned": (assigned, X, Y, ONE),
    "compared": (compared, X, Y, ONE),
    "mean squares": (custom, X, np.eye(3)[Y], "mse"),
    "loops": (loops, WORDS, Y, ONE),
    "images": (images, X, Y, ONE),
}


def trained(name, schedule="gpipe", **options):
    build, x, y, loss = MODELS[name]
    strategy = tfpar.PipelineStrategy(["CPU:0", "CPU:1"], micro_batches=3, schedule=schedule)
    options = {"build": build, "loss": loss, "optimizer": "sgd", "metrics": lambda: None, **options}
    return check(strategy, history(x, y, batch_size=12, epochs=3), jit_compile=True, **options)


def made(patch):
    """All that is made from now on."""
    found = []
    original = remat.SplitProgram.__init__
    patch.setattr(remat.SplitProgram, "__init__", lambda self, *args: (original(self, *args), found.append(self))[0])
    return found


CASES = [*((m, "gpipe") for m in MODELS), ("encoder", "eager-1f1b"), ("images", "1f1b")]


@pytest.mark.parametrize("name, schedule", mostly(CASES, [*CASES[:3], *CASES[5:8]], [("images", "gpipe")]))
def test_same_numbers(name, schedule, monkeypatch):
    found = made(monkeypatch)
    trained(name, schedule)
    assert found and all(h.splittable for h in found) == (name != "loops")


class Take(layers.Layer):
    """Rows of the batch in another order; the gradient of what they were is sparse."""

    def call(self, x):
        return keras.ops.take(x, np.arange(12)[::-1], axis=0)


def test_a_sparse_gradient_over_a_cut(monkeypatch):
    found = made(monkeypatch)

    def build():
        x = layers.Input((WIDTH,))
        h = layers.Dense(8)(Take(name="taken")(layers.Dense(8)(x)))
        return keras.Model(x, layers.Dense(3, activation="softmax")(h))

    strategy = tfpar.LayerPlacementStrategy(["CPU:0", "CPU:1"], placement=["taken"])
    check(strategy, history(X, Y, batch_size=12, epochs=2), build=build, metrics=lambda: None, jit_compile=True)
    assert any(h.splittable for h in found)


@pytest.mark.parametrize("name", mostly(["encoder", "mean squares", "several ends"], ["mean squares", "several ends"]))
def test_no_program_runs_forward_twice(name, monkeypatch):
    """Neither where a softmax is asked for, nor for what leads to no loss: an output without one, an edge to argmax."""
    monkeypatch.setattr(vjp, "taped", None)
    trained(name)


def test_ranks_and_shards(monkeypatch):
    found = made(monkeypatch)
    for mesh, options in [(tfpar.Mesh(stage=2, tensor=2), {"micro_batches": 2}), (tfpar.Mesh(data=2), {"zero": 3})]:
        strategy = tfpar.MeshStrategy(mesh, **options)
        use = history(WORDS, Y, batch_size=12, epochs=2)
        check(strategy, use, build=encoder, loss=ONE, metrics=lambda: None, jit_compile=True)
    assert found and all(h.splittable for h in found)


def test_the_same_random_numbers(monkeypatch):
    """Which differ from those of one device: each micro-batch has its own."""

    def train():
        keras.utils.set_random_seed(0)
        keras.utils.clear_session()
        with tfpar.PipelineStrategy(["CPU:0", "CPU:1"], micro_batches=3).scope():
            h = layers.Dropout(0.3, seed=1)(layers.Dense(8, activation="gelu")(x := layers.Input((WIDTH,))))
            h = layers.GaussianNoise(0.1, seed=2)(layers.Dense(8)(h))
            model = keras.Model(x, layers.Dense(3)(layers.Dropout(0.2, seed=3)(layers.Dense(8)(h))))
            model.compile("adam", "mse", jit_compile=True)
        model.fit(X, np.eye(3)[Y], epochs=3, verbose=0, shuffle=False)
        return [w.numpy() for w in model.weights]

    found = made(monkeypatch)
    one = train()
    assert found and all(h.splittable for h in found)
    monkeypatch.setattr(vjp, "split_program", lambda *args: None)
    other = train()
    monkeypatch.setattr(executor, "recompute_of", lambda run, s, m, program, variables: [None] * len(variables))
    for a, b, c in zip(one, other, train(), strict=True):  # what TensorFlow keeps is what went forward
        np.testing.assert_allclose(a, c, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(b, c, rtol=1e-5, atol=1e-7)


def test_keeps_products_and_little_else(monkeypatch):
    """Of a dense layer with an activation and a normalisation: what went in, the product, two numbers for each row."""
    found = made(monkeypatch)
    strategy = tfpar.PipelineStrategy(["CPU:0", "CPU:1"], micro_batches=3, placement=["dense_last"])

    def build():
        x = layers.Input((WIDTH,))
        h = layers.LayerNormalization()(layers.Dense(64, activation="gelu")(x))
        return keras.Model(x, layers.Dense(3, activation="softmax", name="dense_last")(h))

    check(strategy, history(X, Y, batch_size=12), build=build, jit_compile=True)
    (first,) = (h for h in found if len(h.program.variables) == 4)
    rows = 12 // 3
    kept = sorted(tuple(x.shape) for x in first.kept)
    assert kept == [(rows, 1), (rows, 1), (rows, 64)] and {"MatMul", "BiasAdd"} & {x.op.type for x in first.kept}
    assert [first.inputs[n].shape[0] for n in first.needs if n >= 4] == [rows]


def test_what_is_a_result_already_is_not_kept_once_more(monkeypatch):
    found = made(monkeypatch)

    def build():
        x = layers.Input((WIDTH,))
        h = layers.Activation("gelu", name="second")(layers.Dense(8)(layers.Dense(8, activation="tanh")(x)))
        return keras.Model(x, layers.Dense(3, activation="softmax")(h))

    strategy = tfpar.PipelineStrategy(["CPU:0", "CPU:1"], micro_batches=3, placement=["second"], schedule="gpipe")
    check(strategy, history(X, Y, batch_size=12), build=build, jit_compile=True)
    first = next(h for h in found if h.known or h.kept)
    results = {remat.same(x).name for x in first.outputs}
    assert first.kept and not results & {x.name for x in first.kept}


def test_blocks_that_are_alike_are_compiled_once(monkeypatch):
    found = made(monkeypatch)

    def build():
        x = h = layers.Input((8,))
        for n in range(4):
            h = layers.Dense(8, name=f"second_{n}")(layers.Dense(16, activation="gelu", name=f"{'zyxw'[n]}_first")(h))
        return keras.Model(x, layers.Dense(3, activation="softmax")(h))

    cuts = [f"{'zyxw'[n]}_first" for n in (1, 2, 3)]
    strategy = tfpar.PipelineStrategy([f"CPU:{n}" for n in range(4)], micro_batches=3, placement=cuts)
    x = np.random.default_rng(0).normal(size=(12, 8)).astype("float32")
    check(strategy, history(x, Y, batch_size=12), build=build, jit_compile=True)
    middle = [h for h in found if h.outside][:2]
    for way in ("forward", "backward"):
        one, other = ([*getattr(h, way).traces.values()] for h in middle)
        assert len(one) == len(other) == 1 and one[0].function is other[0].function


def test_sums_are_made_in_groups(monkeypatch):
    monkeypatch.setattr(vjp, "AT_ONCE", 100)
    calls = []
    original = Function.__call__
    monkeypatch.setattr(
        Function,
        "__call__",
        lambda self, *args: (calls.append(args) if len(args) == 2 else None, original(self, *args))[1],
    )
    trained("loops")  # whose programs are not divided
    sums = [found for known, found in calls if isinstance(known, list) and isinstance(found, list)]
    assert sums and all(len(s) == 1 or sum(np.prod(x.shape) for x in s) <= 100 for s in sums)


# ---- planted bugs


def lost_gradient(patch):
    added = in_place.added

    def without_first(program, found, sums, first):
        return added(program, dict(list(found.items())[1:]), sums, first)

    patch.setattr(in_place, "added", without_first)


def stale_weights(patch):
    again = remat.SplitProgram.for_backward
    patch.setattr(
        remat.SplitProgram, "for_backward", lambda self, needed, *rest: again(self, [x * 1.01 for x in needed], *rest)
    )


def wrong_order(patch):
    again = remat.SplitProgram.for_backward

    def mixed(self, values, result, kept):
        same = {}
        for n, x in enumerate(kept):
            same.setdefault((x.shape.as_list().__str__(), x.dtype), []).append(n)
        order = {n: m for group in same.values() for n, m in zip(group, group[::-1], strict=True)}
        return again(self, values, result, [kept[order[n]] for n in range(len(kept))])

    patch.setattr(remat.SplitProgram, "for_backward", mixed)


@pytest.mark.parametrize("bug", [lost_gradient, stale_weights, wrong_order])
def test_planted_bugs_are_caught(bug):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(AssertionError):
        bug(patch)
        trained("images" if bug is not wrong_order else "encoder")
