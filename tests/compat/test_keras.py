"""Each private name of Keras does what tfpar needs of it."""

import pathlib
import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops
from training import STRATEGIES, build, compiled, data

import tfpar
from tfpar.compat import _keras, _keras_calls, _keras_run, _moments
from tfpar.graph.recording import RecordingScope
from tfpar.testing import difference
from tfpar.trainer.hooks import hooks_of

pytestmark = pytest.mark.fast

X, Y = data(8)


def test_every_name_is_tested():
    mine = pathlib.Path(__file__).read_text()
    code = "".join(pathlib.Path(bridge.__file__).read_text() for bridge in (_keras, _keras_calls, _keras_run, _moments))
    names = re.findall(r"^(?:def|class) (\w+)", code, re.MULTILINE)
    assert [n for n in [*names, *_keras.__all__] if n not in mine] == []


def test_initial_shape():
    """`initial_shape`: only of what is the same whenever it is made."""
    made = []
    with tf.variable_creator_scope(lambda create, **kwargs: made.append(kwargs["initial_value"]) or create(**kwargs)):
        keras.Variable("glorot_uniform", shape=(2, 3))
        keras.Variable(keras.initializers.RandomNormal(seed=keras.random.SeedGenerator(1)), shape=(2, 3))
        keras.Variable(lambda shape, dtype: np.random.normal(size=shape), shape=(2, 3))
        keras.Variable(np.ones(3))
    assert [_keras.initial_shape(value) for value in made] == [(2, 3), None, None, None, None]


def test_in_symbolic_call():
    seen = []

    class Layer(keras.layers.Layer):
        def call(self, x):
            seen.append(_keras.in_symbolic_call())
            return x

    layer = Layer()
    layer(keras.Input((2,)))
    layer(tf.ones((1, 2)))
    assert seen == [True, False]


# ---- models


def test_adoption_touches_keras_only_inside_scopes():
    """`adopt` and `of_this_scope`."""
    before = {(owner, name): vars(owner)[name] for owner, name in _keras_calls.ADOPTION.methods}

    def is_touched():
        same = {vars(owner)[name] is method for (owner, name), method in before.items()}
        assert len(same) == 1
        return not same.pop()

    assert len(before) == 3 and not is_touched()
    one, other = (make() for make in STRATEGIES.values())
    with one.scope():
        assert is_touched() and hasattr(build(), "_tfpar_hooks")
    assert not is_touched()
    with pytest.raises(KeyError), other.scope():
        raise KeyError
    assert not is_touched() and not hasattr(build(), "_tfpar_hooks")


def test_overrides():
    class Own(keras.Model):
        def test_step(self, data):
            return {}

    assert _keras.overrides(Own(), "train_step", "test_step") == "test_step"
    assert _keras.overrides(build(), "train_step", "test_step", "compute_loss") is None


class Called(keras.Model):
    def call(self, x, training=None):
        return x


class Silent(keras.Model):
    def call(self, x):
        return x


def test_is_graph_and_graph_of():
    sequential = keras.Sequential([layers.Dense(2)])
    assert _keras.graph_of(sequential) is None and not _keras.is_graph(sequential)
    sequential.build((None, 3))
    assert _keras.is_graph(sequential) and _keras.is_graph(build())
    assert _keras.graph_of(sequential).inputs[0].shape == (None, 3)
    assert not _keras.is_graph(Called()) and not _keras.is_graph(layers.Dense(2))


def test_nodes_in_order_and_output_structure():
    x = layers.Input((3,))
    first = layers.Dense(2, name="first")
    h = first(x)
    y = layers.add([h, first(x)], name="sum")
    model = keras.Model(x, {"y": y, "h": h})
    names = [node.operation.name for node in _keras.nodes_in_order(model)]
    assert names == ["first", "first", "sum"]
    assert set(_keras.output_structure(model)) == {"y", "h"}
    assert not isinstance(_keras.output_structure(keras.Sequential([layers.Input((3,)), first])._functional), list)


def test_inputs():
    model = build()
    assert _keras.converted_inputs(Called(), tf.constant(X.astype("float64"))).dtype == "float32"
    with pytest.raises(ValueError, match="incompatible"):
        _keras.converted_inputs(model, tf.constant(X[:, :2]))
    named = keras.Model({"a": layers.Input((2,), name="a"), "b": (b := layers.Input((1,), name="b"))}, b)
    flat = _keras.graph_inputs(named, {"b": tf.ones((4, 1)), "a": tf.ones((4, 2))})
    assert [v.shape[1] for v in flat] == [2, 1]
    assert [v.shape[1] for v in _keras.graph_inputs(Called(), [tf.ones((4, 3)), tf.ones((4, 2))])] == [3, 2]


def test_training_argument_and_call_operation():
    class Told(layers.Layer):
        def call(self, x, training=None):
            return x + float(bool(training))

    x = tf.zeros((1,))
    assert _keras_calls.training_argument(Called(), True) == {"training": True}
    assert _keras_calls.training_argument(Silent(), True) == {}
    told = Told()
    assert float(_keras.call_operation(told, (x,), {}, True, False)[0]) == 1.0
    assert float(_keras.call_operation(told, (x,), {"training": False}, True, True)[0]) == 0.0
    assert float(_keras.call_operation(told, (x,), {"training": False}, True, False)[0]) == 1.0  # as in Functional
    assert float(_keras.call_operation(ops.add, (x, 2.0), {}, True, False)[0]) == 2.0


def test_uncast():
    variable = keras.Variable(np.ones(2), dtype="float32")
    with keras.src.backend.common.variables.AutocastScope("bfloat16"), _keras.uncast():
        assert tf.convert_to_tensor(variable).dtype == tf.float32


def test_autocast_of():
    layer = layers.Dense(2, dtype="mixed_bfloat16")
    layer.build((None, 3))
    with _keras.autocast_of(layer):
        assert ops.convert_to_tensor(layer.kernel).dtype == "bfloat16"
    plain = layers.Dense(2)
    plain.build((None, 3))
    with _keras.autocast_of(plain):
        assert ops.convert_to_tensor(plain.kernel).dtype == "float32"


# ---- state


def test_masks():
    x = tf.constant([1.0])
    assert _keras.get_keras_mask(x) is None
    _keras.set_keras_mask(x, tf.constant([True]))
    assert bool(_keras.get_keras_mask(x)[0])
    y, z = tf.constant([2.0]), tf.constant([3.0])
    _keras.set_keras_mask(z, tf.constant([False]))
    assert bool(_keras.get_keras_mask(_keras.with_mask_of(x, y))[0])
    assert not bool(_keras.get_keras_mask(_keras.with_mask_of(x, z))[0])
    assert bool(_keras.get_keras_mask(_keras.masked_by(layers.Dense(1), x, x))[0])
    assert _keras.get_keras_mask(_keras.masked_by(layers.RMSNormalization(), x, x)) is None


@pytest.mark.parametrize("wrap", [tf.function, lambda f: f], ids=["graph", "eager"])
def test_logits_of(wrap):
    x = tf.constant([[1.0, 2.0]])
    found = []

    @wrap
    def function(x):
        y = tf.identity(x)
        _keras.set_logits(y, x)
        results = [y, keras.activations.softmax(x), keras.activations.sigmoid(x), tf.nn.softmax(x), x]
        found.extend((logits is x, kind) for logits, kind in map(_keras.logits_of, results))
        return x

    function(x)
    raw = (True, tf.nn.softmax) if wrap is tf.function else (False, None)
    assert found == [(True, None), (True, None), (True, None), raw, (False, None)]


def test_passed_through():
    @_keras.passed_through
    class Own(Exception):
        pass

    class Raises(layers.Layer):
        def call(self, x):
            raise Own("said so")

    with pytest.raises(Own, match="^said so$"):
        Raises()(X)


def test_recording_and_in_program():
    norm = layers.BatchNormalization()
    norm.build((None, 3))
    assert not _keras.in_program()
    with RecordingScope([]) as scope:
        assert _keras.in_program()
        norm(tf.ones((2, 3)), training=True)
    assert set(scope.written) == {id(norm.moving_mean), id(norm.moving_variance)}
    assert np.array_equal(norm.moving_mean, [0, 0, 0])


def test_clear_losses():
    layer = layers.ActivityRegularization(1.0)
    layer(tf.ones((2, 2)))
    assert layer.losses
    _keras.clear_losses(layer)
    _keras.clear_losses(ops.add)
    assert not layer.losses


def test_nth_seed():
    seed = keras.random.SeedGenerator(7).state.value
    seeds = [tuple(_keras.nth_seed(seed, n).numpy().tolist()) for n in range(4)]
    assert seeds[0] == (7, 0) and len(set(seeds)) == 4


def test_is_seed():
    assert _keras.is_seed(keras.random.SeedGenerator(1).state)
    assert not _keras.is_seed(keras.Variable(1.0))


@pytest.mark.parametrize("renorm", [False, True])
def test_moments(renorm):
    """Recorded, and moved by hand, they are what the layer's own call leaves behind."""
    rng = np.random.default_rng(0)
    x = tf.constant(rng.normal(2.0, 3.0, size=(6, 4)), "float32")
    own, moved = (layers.BatchNormalization(momentum=0.7, renorm=renorm) for _ in range(2))
    for layer in (own, moved):
        layer.build((None, 4))
    own(x, training=True)
    found = []
    with keras.StatelessScope(), _moments.recorded([moved], found):
        moved(x, training=True)
    ((index, moments),) = found
    assert index == 0 and isinstance(moments, _moments.Moments) and float(moments.divisor) == 6
    _moments.move_statistics(moved, moments.mean, moments.variance)
    pairs = zip(_moments.moving_statistics(own), _moments.moving_statistics(moved), strict=True)
    assert all(np.allclose(a, b, rtol=1e-6) for a, b in pairs)
    assert "_moments" not in vars(moved)
    assert _moments.batch_normalizations(keras.Sequential([own, layers.Dense(1)])) == [own]
    assert _moments.batch_normalizations(ops.add) == []
    assert _keras.layers_in(own) == [own] and _keras.layers_in(ops.add) == []
    assert _moments.is_batch_normalization(own) and not _moments.is_batch_normalization(layers.Dense(1))
    mask = tf.constant([True, False, True, True, False, True])
    assert float(_moments.divisor(own, x, mask, tf.float64)) == 4 + keras.config.epsilon()


def test_whole_moments():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(20, 3)).astype("float32") * [1, 10, 0.1] + [0, 5, -3]
    parts = x[:3], x[3:4], x[4:]
    means, variances = (tf.stack([f(p, axis=0) for p in parts]) for f in (np.mean, np.var))
    mean, variance = _moments.whole_moments(_moments.Moments(means, variances, tf.constant([3, 1, 16], means.dtype)))
    assert difference(x.mean(0), mean) < 1e-6
    assert difference(x.var(0), variance) < 1e-6


def test_whole_moments_with_a_mask():
    """Keras divides by a little more than the number of values, in each part and in the whole."""
    rng = np.random.default_rng(0)
    x, mask = tf.constant(rng.normal(3.0, size=(6, 5, 3))), tf.constant(rng.integers(0, 2, (6, 5)).astype(bool))
    mask = tf.concat([mask[:4], tf.zeros_like(mask[4:])], 0)  # the last part has no values at all
    layer = keras.layers.BatchNormalization(dtype="float64")
    layer.build(x.shape)
    parts = [
        (*layer._moments(x[rows], mask[rows]), _moments.divisor(layer, x[rows], mask[rows], x.dtype))
        for rows in (slice(0, 1), slice(1, 4), slice(4, 6))
    ]
    found = _moments.whole_moments(_moments.Moments(*(tf.stack(values) for values in zip(*parts, strict=True))))
    for a, b in zip(layer._moments(x, mask), found, strict=True):
        assert difference(a, b) < 1e-14


def test_given_moments():
    """A layer normalises with them, and moves by them."""
    layer = layers.BatchNormalization(momentum=0.5, epsilon=0.0)
    layer.build((None, 2))
    with _moments.given(layer, tf.constant([1.0, 2.0]), tf.constant([4.0, 4.0])):
        y = layer(tf.constant([[3.0, 2.0]]), training=True)
    assert np.allclose(y, [[1.0, 0.0]]) and np.allclose(layer.moving_mean, [0.5, 1.0])
    assert "_moments" not in vars(layer)


def test_discarded_writes():
    """They reach neither the layer nor the scope around, whose values are read."""
    layer = layers.BatchNormalization()
    layer.build((None, 2))
    with RecordingScope([(layer.gamma, tf.constant([2.0, 2.0]))]) as scope, _keras.discarded_writes():
        layer(tf.ones((3, 2)), training=True)
        assert np.allclose(layer.gamma.value, 2.0)
    assert not scope.written and np.allclose(layer.moving_mean, 0.0)


def test_set_value_and_strategy():
    variable, model = keras.Variable(1.0), build()
    _keras.set_value(variable, tf.Variable(2.0))
    assert float(variable) == 2.0
    strategy = tfpar.DataParallelStrategy(["CPU:0"])
    _keras.set_strategy(model, strategy)
    assert model.distribute_strategy is strategy


def test_set_functions():
    asked = []
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    auto_jit, build = (lambda: asked.append("jit")), (lambda *a, **k: asked.append("build"))
    _keras.set_functions(model, auto_jit, build)
    model.compile("sgd", "mse", jit_compile="auto")
    model.fit(np.ones((2, 2)), np.ones((2, 1)), verbose=0)
    assert {"jit", "build"} == {*asked} and set(vars(model)) >= {"_resolve_auto_jit_compile", "_maybe_symbolic_build"}


def test_replicas_touch_keras_only_while_they_run():
    """`running_replicas`."""
    names = list(_keras_run.REPLICAS.methods)
    before = [vars(owner)[name] for owner, name in names]
    strategy = tfpar.DataParallelStrategy(["CPU:0", "CPU:1"])

    def inside():
        assert all(vars(owner)[name] is not b for (owner, name), b in zip(names, before, strict=True))
        assert _keras_run.one_of_several() is tf.distribute.get_replica_context()
        assert keras.config.dtype_policy().name == "mixed_bfloat16"

    keras.config.set_dtype_policy("mixed_bfloat16")
    strategy.run(inside)  # `as_in_this_thread`: threads of replicas see this thread's policy
    assert [vars(owner)[name] for owner, name in names] == before
    assert _keras_run.one_of_several() is None and _keras_run.REPLICAS.users == 0
    assert not _keras_run.is_one_of_several()


def test_methods_in_replicas():
    """`apply` adds up before it clips; `moments` are those of all; `next_seed` differs."""
    strategy = tfpar.DataParallelStrategy(["CPU:0", "CPU:1"])
    with strategy.scope():
        weight = keras.Variable([1.0])
        optimizer = keras.optimizers.SGD(1.0, clipvalue=1.0)
        seeds = keras.random.SeedGenerator(1)
        layer = layers.BatchNormalization()
        layer.build((None, 1))

    def step(x):
        optimizer.apply([tf.reduce_sum(x)[None]], [weight])
        return seeds.next(), layer._moments(x, None)

    def part(context):
        return tf.constant([[-3.0], [2.0]] if context.replica_id_in_sync_group else [[0.4], [0.2]])

    drawn, moments = strategy.run(step, args=(strategy.experimental_distribute_values_from_function(part),))
    assert np.allclose(weight, 1.0 - (0.6 - 1.0))  # each replica's own, clipped: 0.6 and -1, and the sum: -0.4
    assert not np.array_equal(*drawn.values)
    x = np.array([-3.0, 2.0, 0.4, 0.2])
    assert all(np.allclose(v, [x.mean()]) for v in moments[0].values)
    assert all(np.allclose(v, [x.var()]) for v in moments[1].values)


# ---- steps


def test_without_optionals():
    model = compiled()
    batch = (tf.ones((2, 3)), tf.experimental.Optional.empty(tf.TensorSpec((2,))))
    assert _keras.without_optionals(model, batch)[1] is None


def test_symbolic_and_build():
    assert _keras.symbolic(X).shape == (None, 6) and _keras.symbolic(None) is None
    model = keras.Sequential([layers.Dense(3)])
    model.compile("sgd", "mse", metrics=["mae"])
    _keras.build(model, (X, np.zeros((8, 3))))
    assert model.built and not model._compile_metrics.built and not _keras.is_compiled_built(model)
    _keras.build(model, (X, np.zeros((8, 3))), keras.KerasTensor((None, 3)))
    assert model._compile_metrics.built and model._compile_loss.built and _keras.is_compiled_built(model)
    assert _keras.compilation(model) == (model._compile_loss, model._compile_metrics)
    assert _keras.converts_inputs(model) and not _keras.converts_inputs(layers.StringLookup())
    assert _keras.output_spec(model, keras.KerasTensor((None, 6))).shape == (None, 3)
    assert [m.name for m in model.metrics] == ["loss", "compile_metrics"]


LOSSES = ["sum_over_batch_size", "sum", "mean", "mean_with_sample_weight"]


@pytest.mark.parametrize("reduction", LOSSES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_evaluate_loss(reduction, weighted, masked):
    """The loss, and by what its mean divides: the parts make up the whole."""
    rng = np.random.default_rng(0)
    y, p = (tf.constant(rng.normal(size=(7, 5, 2)), "float32") for _ in range(2))
    weight = tf.constant(rng.uniform(size=(7, 5)), "float32") if weighted else None
    mask = tf.constant(rng.uniform(size=(7, 5)) > 0.4)
    model = keras.Sequential([layers.Input((5, 2)), layers.Dense(2)])
    model.compile("sgd", keras.losses.MeanSquaredError(reduction=reduction), loss_weights=[0.5])
    model.compute_loss(None, y, p)

    def of(rows):
        prediction = p[rows]
        if masked:
            _keras.set_keras_mask(prediction, mask[rows])
        part = None if weight is None else weight[rows]
        (call,) = _keras.loss_calls(model, y[rows], prediction, part)
        assert isinstance(call, _keras.LossCall) and call.weight == 0.5
        assert _keras.has_plain_reduction(call.loss)
        value, count = _keras.evaluate_loss(call)
        assert np.allclose(value, call.loss(y[rows], prediction, part))
        return float(value), float(count)

    whole, count = of(slice(None))
    parts = [of(rows) for rows in (slice(0, 2), slice(2, 7))]
    total = 1.0 if reduction == "sum" else count
    assert np.isclose(whole, sum(v * (c / total) for v, c in parts), rtol=1e-5)
    assert not _keras.has_plain_reduction(keras.losses.MeanSquaredError(reduction="none"))


def test_trackers():
    x = layers.Input((2,))
    model = keras.Model(x, {"a": layers.Dense(1)(x), "b": layers.Dense(1)(x)})
    assert not _keras.loss_trackers(model) and _keras.loss_dtype(model) == "float32"
    model.compile("sgd", {"a": "mse", "b": "mae"})
    data = tf.ones((4, 2)), {"a": tf.ones((4, 1)), "b": tf.ones((4, 1))}
    model.evaluate(*data, verbose=0)
    assert len(_keras.loss_trackers(model)) == 2 and _keras.loss_dtype(model) == "float32"
    model.reset_metrics()
    _keras.track_loss(model, tf.constant(3.0), tf.constant(4))
    assert float(model.metrics[0].result()) == 3.0


def test_added_losses():
    model = keras.Sequential([layers.Input((2,)), layers.Dense(1, kernel_regularizer="l2")])
    added = _keras.added_losses(model, [tf.constant(5.0)])
    assert float(added[0]) == 5.0 and len(added) == 2 and float(added[1]) > 0


def test_give_strategy():
    strategy = STRATEGIES["layers"]()
    scaled = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD())
    _keras.give_strategy(scaled, strategy)
    assert scaled._distribution_strategy is scaled.inner_optimizer._distribution_strategy is strategy


def test_auto_jit():
    assert _keras.auto_jit(build())

    class Without(layers.Layer):
        def __init__(self):
            super().__init__()
            self.supports_jit = False

        def call(self, x):
            return x

    assert not _keras.auto_jit(keras.Sequential([layers.Input((2,)), Without()]))


def test_running():
    model = build()
    model.compile("sgd", "sparse_categorical_crossentropy")
    with _keras_calls.running(model, lambda x, training=None: x * 2.0, [tf.constant(7.0)]):
        assert np.array_equal(model(X, training=True), X * 2.0)
        assert [float(v) for v in model.losses] == [7.0]
        assert _keras_calls.own_call(model, X, training=True).shape == (8, 3)
    assert model(X).shape == (8, 3) and model.losses == []


class Told(layers.Layer):
    """Makes what it is told of training."""

    def call(self, x, training=None):
        return x * (0.0 if training is None else 2.0 if training else 1.0)


def test_telling():
    layer, x = Told(), np.ones(2, "float32")
    assert _keras_calls.told() is None and float(layer(x)[0]) == 0.0
    for training, made in ((True, 2.0), (False, 1.0), (None, 0.0)):
        with _keras_calls.telling(layer, training):
            assert _keras_calls.told() is training and float(layer(x)[0]) == made
            with _keras_calls.telling(layer, None):
                assert float(layer(x)[0]) == 0.0
    assert _keras_calls.told() is None


def test_own_calls():
    with tfpar.DataParallelStrategy(2).scope():
        model = build()
    called = hooks_of(model).divides_calls
    assert called(tf.constant(X)) and not called(keras.KerasTensor((None, 6)))
    with _keras_calls.own_calls():
        assert not called(tf.constant(X))
    assert called(tf.constant(X))


def test_override_losses():
    model = build()
    _keras_calls.override_losses(model, [3.0])
    assert model.losses == [3.0]
    _keras_calls.override_losses(model, [])
    assert model.losses == []


def test_unpack_x_y_sample_weight():
    assert _keras.unpack_x_y_sample_weight((1, 2)) == (1, 2, None)


def test_stored():
    """In an autocast scope `value` is a tensor, `stored` the variable."""
    layer = keras.layers.Dense(1, dtype="mixed_bfloat16")
    layer.build((None, 2))
    with _keras.autocast_of(layer):
        assert not isinstance(layer._kernel.value, tf.Variable)
        assert _keras.stored(layer._kernel) is layer._kernel._value


def test_read_as():
    policy = keras.DTypePolicy("mixed_bfloat16")
    mixed, plain, norm = layers.Dense(2, dtype=policy), layers.Dense(2), layers.BatchNormalization(dtype=policy)
    for layer in (mixed, plain, norm):
        layer.build((None, 3))
    assert _keras.read_as(mixed.kernel, [mixed]) == "bfloat16"
    assert _keras.read_as(mixed.kernel, [mixed, plain]) is None  # read in two dtypes
    assert _keras.read_as(mixed.kernel, [keras.ops.matmul]) is None  # nobody knows
    assert _keras.read_as(plain.kernel, [plain]) is None
    assert _keras.read_as(norm.moving_mean, [norm]) is None  # a state
    with tf.GradientTape(), keras.src.backend.common.variables.AutocastScope("bfloat16"):
        assert mixed.kernel.value.dtype == tf.bfloat16
