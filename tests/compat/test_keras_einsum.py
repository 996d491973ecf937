"""Products of a batch with a weight: one for all samples, in compiled programs only."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops
from keras.src.backend.tensorflow import numpy

import tfpar
from tfpar.compat._keras_einsum import EINSUM, has_weight, whole

pytestmark = pytest.mark.fast


def gradient(subscripts, *shapes):
    """The result, the gradients, and the types of the operations that find them."""
    rng = np.random.default_rng(0)
    x, y = (tf.constant(rng.normal(size=shape)) for shape in shapes)

    @tf.function
    def both(x, y):
        with tf.GradientTape() as tape:
            tape.watch((x, y))
            z = ops.einsum(subscripts, x, y)
        return z, *tape.gradient(z, (x, y), tf.cos(z))

    kinds = [op.type for op in both.get_concrete_function(x, y).graph.get_operations()]
    return both(x, y), kinds


@pytest.mark.parametrize(
    ("subscripts", "shapes"),
    [
        ("abc,cde->abde", [(3, 4, 5), (5, 2, 6)]),
        ("abc,cd->abd", [(3, 4, 5), (5, 2)]),
        ("abcd,cde->abe", [(3, 4, 2, 5), (2, 5, 6)]),
        ("bti,oi->bto", [(3, 4, 5), (6, 5)]),
    ],
)
def test_the_gradient_of_a_weight_is_one_product(subscripts, shapes):
    plain, before = gradient(subscripts, *shapes)
    with whole(True):
        found, kinds = gradient(subscripts, *shapes)
    for a, b in zip(plain, found, strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-13, atol=1e-13)
    assert "Sum" in before and "Sum" not in kinds


@pytest.mark.parametrize(
    ("subscripts", "shapes"), [("abcd,aecd->acbe", [(3, 4, 2, 5), (3, 6, 2, 5)]), ("ab,b->a", [(3, 4), (4,)])]
)
def test_other_products_are_as_keras_writes_them(subscripts, shapes):
    assert has_weight(subscripts) == (subscripts == "ab,b->a")
    plain, _ = gradient(subscripts, *shapes)
    with whole(True):
        found, _ = gradient(subscripts, *shapes)
    for a, b in zip(plain, found, strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("subscripts", ["...ab,bc->...ac", "ab->ba", "ab,bc,cd->ad", "ab,cb"])
def test_what_is_not_known_is_left_alone(subscripts):
    sizes = {"...ab": (2, 3, 4), "ab": (3, 4), "bc": (4, 5), "cd": (5, 2), "cb": (6, 4)}
    operands = [np.ones(sizes[part]) for part in subscripts.split("->")[0].split(",")]
    with whole(True):
        np.testing.assert_allclose(ops.einsum(subscripts, *operands), np.einsum(subscripts, *operands))


def test_integers_and_mixed_dtypes_are_as_before():
    x, y = np.ones((2, 3, 4), "int8"), np.ones((4, 5), "float32")
    plain = [ops.einsum("abc,cd->abd", x, x[0].T), ops.einsum("abc,cd->abd", x, y)]
    with whole(True):
        found = [ops.einsum("abc,cd->abd", x, x[0].T), ops.einsum("abc,cd->abd", x, y)]
    assert [a.dtype for a in plain] == [b.dtype for b in found]


@pytest.mark.parametrize("jit_compile", [True, False])
def test_compiled_programs_alone_have_them(jit_compile, monkeypatch):
    called = []
    original = tf.einsum

    def counted(subscripts, *operands, **kwargs):
        called.extend([subscripts] if has_weight(subscripts) else [])
        return original(subscripts, *operands, **kwargs)

    monkeypatch.setattr(tf, "einsum", counted)

    def trained(strategy):
        keras.utils.set_random_seed(0)
        with strategy.scope():
            x = layers.Input((6, 8))
            model = keras.Model(x, layers.MultiHeadAttention(2, 4)(x, x))
            model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=jit_compile)
        rng = np.random.default_rng(0)
        model.train_on_batch(*rng.normal(size=(2, 4, 6, 8)).astype("float32"))
        return model.get_weights()

    plain = trained(tf.distribute.get_strategy())
    assert not called
    found = trained(tfpar.PipelineStrategy(["CPU:0"], micro_batches=2))
    assert bool(called) == jit_compile
    assert numpy.einsum is next(iter(EINSUM.methods.values()))[0]
    for a, b in zip(plain, found, strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-6)
