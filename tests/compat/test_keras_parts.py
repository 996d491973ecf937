"""Each private name of Keras that running layers on parts needs does what tfpar takes it to do."""

import pathlib
import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from tfpar.compat import _keras_parts, _replaced

pytestmark = pytest.mark.fast


def test_every_name_is_tested():
    mine = pathlib.Path(__file__).read_text()
    names = re.findall(r"^def (\w+)", pathlib.Path(_keras_parts.__file__).read_text(), re.MULTILINE)
    assert [n for n in names if n not in mine] == []


def test_outside_of_scope():
    with keras.StatelessScope() as scope, pytest.raises(ValueError, match="stateless"):
        _keras_parts.outside_of_scope(keras.Variable, 0.0)
        keras.Variable(0.0)
    assert not scope.state_mapping


def test_saving_in_scope(tmp_path):
    model = keras.Sequential([keras.Input((3,)), layers.Dense(2)])
    model.compile("adam", "mse")
    model.fit(np.ones((4, 3)), np.ones((4, 2)), verbose=0)
    with keras.StatelessScope([(v, tf.fill(v.shape, 3.0)) for v in model.trainable_weights]):
        with pytest.raises(ValueError, match="stateless"):
            model.save(tmp_path / "model.keras")
        with _keras_parts.SAVING_IN_SCOPE.inside():
            model.save(tmp_path / "model.keras")
    assert all(np.all(w == 3.0) for w in keras.saving.load_model(tmp_path / "model.keras").get_weights())


def built(layer, *shape):
    layer.build((None, *shape))
    return layer


def test_shaped():
    layer = built(layers.Dense(4), 6)
    with _keras_parts.shaped([(layer._kernel, tf.zeros((6, 2))), (layer.bias, tf.zeros(4))]):
        assert tuple(layer._kernel.shape) == (6, 2)
        assert tuple(layer.bias.shape) == (4,)
    assert tuple(layer._kernel.shape) == (6, 4)


def test_unchecked():
    layer = built(layers.DepthwiseConv1D(2), 5, 4)
    model = keras.Sequential([layer])
    spec = layer.input_spec
    with pytest.raises(ValueError, match="incompatible"):
        layer(tf.zeros((1, 5, 3)))
    with _keras_parts.unchecked(model):
        assert layer.input_spec is None
    assert layer.input_spec is spec


def test_replaced():
    layer = built(layers.Dense(4, "relu"), 6)
    x, bias = np.ones((2, 6), "float32"), layer.bias
    with _keras_parts.replaced(layer, bias=None, activation=None):
        np.testing.assert_allclose(layer(x), x @ layer.kernel.numpy(), rtol=1e-6)
    assert layer.bias is bias
    assert layer.activation is keras.activations.relu


def test_given_method():
    layer = layers.Dense(4)
    with _keras_parts.given_method(layer, "call", lambda x: x * 3):
        assert float(layer(tf.ones((1, 1)))[0, 0]) == 3
    assert "call" not in vars(layer)


def test_is_plain_layer():
    class Called(layers.Dense):
        def __call__(self, x):
            return super().__call__(x)

    assert _keras_parts.is_plain_layer(layers.Dense(2))
    for other in (Called(2), layers.Dense(2, activity_regularizer="l1"), layers.Dense(2, dtype="int8_from_float32")):
        assert not _keras_parts.is_plain_layer(other)


def test_is_its_call():
    assert _keras_parts.is_its_call(layers.Dense(2, dtype="int8_from_float32"))
    assert not _keras_parts.is_its_call(layers.Dense(2, activity_regularizer="l1"))


def test_own_attributes():
    class Scaled(layers.Layer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.scale, self.inner = 2.0, layers.Dense(2)

    found = _keras_parts.own_attributes(built(Scaled(), 3))
    assert set(found) == {"scale", "inner"}


def test_layer_calls_are_handled():
    seen = []

    def handler(function, layer, args, kwargs):
        seen.append(layer.name)
        return function(layer, *args, **kwargs) * 2

    x, layer = np.ones((1, 2), "float32"), layers.Identity(name="same")
    with _keras_parts.LAYER_CALLS.inside(handler):
        assert float(layer(x)[0, 0]) == 2
    assert float(layer(x)[0, 0]) == 1 and seen == ["same"] and _keras_parts.handled


def test_silu_is_one_function():
    assert keras.ops.silu.__module__ == "keras.src.ops.nn"
    x = tf.constant([1.0])
    with _replaced.Replacement((_keras_parts.backend_nn, "silu", lambda silu, x: silu(x) + 1)).inside():
        assert float(keras.ops.silu(x)[0]) == pytest.approx(1 + 1 / (1 + np.exp(-1)))


@pytest.mark.parametrize("options", [{"clipnorm": 0.5}, {"global_clipnorm": 0.7}])
@pytest.mark.parametrize("factor", [None, 4.0])
def test_given_norms(options, factor):
    rng = np.random.default_rng(0)
    gradients = [tf.constant(rng.normal(size=n).astype("float32")) for n in (3, 5)]
    rows = tf.IndexedSlices(gradients[1][:, None], tf.range(5), tf.constant([5, 1]))
    plain = keras.optimizers.SGD(**options)
    optimizer = keras.optimizers.SGD(loss_scale_factor=factor, **options)
    assert _keras_parts.clips_norms(optimizer)
    assert not _keras_parts.clips_norms(keras.optimizers.SGD(clipvalue=1.0))
    squares = [tf.reduce_sum(tf.square(g)) * (factor or 1.0) ** 2 for g in gradients]
    with _keras_parts.given_norms(optimizer, squares, tf.add_n(squares)):
        found = optimizer._clip_gradients(gradients)
        sparse = optimizer._clip_gradients([gradients[0], rows])[1]
    for a, b in zip(found, plain._clip_gradients(gradients), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    assert isinstance(sparse, tf.IndexedSlices) == (
        "clipnorm" in options
    )  # as Keras, which adds repeated rows up or not
    values = sparse.values if isinstance(sparse, tf.IndexedSlices) else sparse
    np.testing.assert_allclose(values[:, 0], found[1], rtol=1e-6)
    assert "_clip_gradients" not in vars(optimizer)


@pytest.mark.parametrize("make", [keras.optimizers.Adam, keras.optimizers.Adafactor, keras.optimizers.Muon])
def test_slot_bytes_of(make):
    shapes = [(6, 4), (4,), (3, 3, 2, 5), ()]
    weights = [keras.Variable(np.zeros(shape), name=f"w{n}") for n, shape in enumerate(shapes)]
    expected, optimizer = _keras_parts.slot_bytes_of(make(), weights), make()
    assert not optimizer.built
    optimizer.build(weights)
    for weight in weights:
        slots = [slot for slot, of in _keras_parts.slots_of(optimizer) if of is weight]
        assert expected[id(weight)] == sum(np.asarray(slot).nbytes for slot in slots)


def test_optimizers_of():
    model = keras.Sequential([layers.Dense(1)])
    assert _keras_parts.optimizers_of(model) == []
    model.compile("sgd")
    model.other = keras.optimizers.Adam()
    assert _keras_parts.optimizers_of(model) == [model.optimizer, model.other]


def test_unwritten():
    variable = keras.Variable([1.0, 2.0])
    with _keras_parts.unwritten([variable]):
        variable.assign([3.0, 4.0])
        with pytest.raises(ValueError, match="shape"):
            variable.assign([3.0])
    assert np.array_equal(variable.numpy(), [1.0, 2.0])
    variable.assign([3.0, 4.0])
    assert np.array_equal(variable.numpy(), [3.0, 4.0])


@pytest.mark.parametrize(
    "optimizer, count",
    [(keras.optimizers.SGD(), 0), (keras.optimizers.Adam(amsgrad=True), 6), (keras.optimizers.Adafactor(), 6)],
)
def test_slots_of(optimizer, count):
    weights = [keras.Variable(np.zeros((2, 3)), name=name) for name in "ab"]
    optimizer.build(weights)
    found = list(_keras_parts.slots_of(optimizer))
    assert len(found) == count and all(any(slot is v for v in optimizer.variables) for slot, _ in found)
    assert [weight.name for _, weight in found] == ["a", "b"] * (count // 2)


def test_converted_arguments():
    layer = layers.Dense(2, dtype="mixed_bfloat16")
    x = {"a": tf.ones((1, 2)), "b": keras.KerasTensor((None, 2)), "c": tf.ones(1, tf.int32), "d": 3}
    found = _keras_parts.converted_arguments(layer, x)
    assert [keras.backend.standardize_dtype(found[k].dtype) for k in "abc"] == ["bfloat16", "bfloat16", "int32"]
    assert found["d"] == 3
    layer._convert_input_args = False
    assert _keras_parts.converted_arguments(layer, x) is x


# ---- the loss that ranks find together


def test_only_loss():
    """`only_loss` and `loss_options` tell what `compile` was given."""
    model = make_model()
    for given, found in (("mse", keras.losses.mean_squared_error), (["mse"], None), (None, None)):
        model.compile("sgd", given)
        assert _keras_parts.only_loss(model) is found
    model.compile("sgd", "sparse_categorical_crossentropy")
    assert type(_keras_parts.only_loss(model)) is keras.losses.SparseCategoricalCrossentropy
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=3))
    options = _keras_parts.loss_options(_keras_parts.only_loss(model))
    assert options["from_logits"] is True and options["ignore_class"] == 3
    model.compile("sgd", "mse", loss_weights=[2.0])
    assert _keras_parts.only_loss(model) is None


def test_flat_outputs():
    x = keras.Input((2,))
    assert len(_keras_parts.flat_outputs(keras.Model(x, {"a": x + 1, "b": [x * 2]}))) == 2
    assert _keras_parts.flat_outputs(keras.Sequential([keras.layers.Dense(1)])) == []


def make_model():
    return keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "bfloat16", "float64"])
def test_own_dtype(policy):
    class Read(layers.Layer):
        def build(self, shape):
            self.scale = self.add_weight(shape=())

        def call(self, x):
            return _keras_parts.own_dtype(self.scale), self.scale.dtype

    expected = {"mixed_bfloat16": ("float32", "bfloat16")}.get(policy, (policy, policy))
    layer = Read(dtype=policy)
    layer.build((1,))
    assert layer(tf.ones(1)) == expected


def test_input_symbols():
    inputs = {"a": keras.Input((3,)), "b": keras.Input((None,), dtype="int32")}
    model = keras.Model(inputs, keras.layers.Dense(2)(inputs["a"]))
    found = _keras_parts.input_symbols(model)
    assert {name: (x.shape, x.dtype) for name, x in found.items()} == {
        "a": ((None, 3), "float32"), "b": ((None, None), "int32"),
    }  # fmt: skip
    assert _keras_parts.input_symbols(keras.Sequential([keras.layers.Dense(2)])) is None
