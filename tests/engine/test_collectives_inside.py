"""Programs that hold their collectives: the numbers of one device, what is in them, and that a bug would be seen.

On CPUs the collectives are TensorFlow's own, in programs that are not compiled; `tests/on_gpus.py` runs XLA's.
"""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from training import check, compiled, data, history

import tfpar
from tfpar import Mesh
from tfpar.comm import in_program
from tfpar.compat import _xla
from tfpar.engine import weights_inside
from tfpar.engine.optimizer_step import Update
from tfpar.engine.program import Function
from tfpar.trainer import planner
from tfpar.trainer.hooks import hooks_of
from tfpar.trainer.step_function import StepFunction

FAST, EVERY = pytest.mark.fast, pytest.mark.every
X, Y = data(16)


def inside(**shape):
    options = {k: shape.pop(k) for k in ("zero", "sequence_parallel", "micro_batches", "buckets") if k in shape}
    return tfpar.MeshStrategy(Mesh(**shape), collectives="inside", **options)


def encoder():
    x = layers.Input((4,), dtype="int32")
    h = layers.Embedding(8, 8)(x) + layers.Embedding(4, 8)(keras.ops.arange(4))
    h = layers.LayerNormalization()(h + layers.MultiHeadAttention(4, 2)(h, h))
    return keras.Model(x, layers.Dense(8, "softmax")(layers.Dense(8)(layers.Dense(16, activation="relu")(h))))


def normalized():
    x = layers.Input((6,))
    h = layers.LayerNormalization()(layers.Dense(16, activation="tanh")(x))
    return keras.Model(x, layers.Dense(4, activation="softmax")(layers.Dense(12)(h)))


def words(rows=16):
    rng = np.random.default_rng(0)
    return rng.integers(0, 8, (rows, 4)), rng.integers(0, 8, (rows, 4))


@pytest.mark.parametrize(
    "strategy",
    [
        pytest.param({"tensor": 4, "micro_batches": 2}, marks=EVERY),
        pytest.param({"data": 2}, marks=EVERY),
        {"data": 2, "tensor": 2, "micro_batches": 2},
        {"data": 2, "buckets": 3},
        pytest.param({"data": 2, "tensor": 2}, marks=EVERY),
        pytest.param({"data": 2, "tensor": 2, "zero": 1}, marks=EVERY),
        {"data": 2, "tensor": 2, "zero": 3, "sequence_parallel": True},
    ],
    ids=str,
)
def test_numbers_are_those_of_one_device(strategy):
    adam = lambda: keras.optimizers.Adam(0.01, epsilon=1e-4, global_clipnorm=0.5)  # noqa: E731
    fit = history(*words(20), batch_size=8, epochs=2)  # the last batch is half as large
    _, model = check(inside(**strategy), fit, build=encoder, optimizer=adam, rtol=1e-4, atol=1e-5)
    assert hooks_of(model).engine.inside


@pytest.mark.parametrize(
    "strategy, jit_compile",
    [
        (lambda: tfpar.MeshStrategy(Mesh()), True),
        pytest.param(lambda: inside(data=2), False, marks=EVERY),
        (lambda: inside(data=2, tensor=2), False),
    ],
    ids=["one device", "data", "both"],
)
@pytest.mark.parametrize("optimizer", ["adamw", "average, accumulated"])
def test_programs_end_with_the_update(strategy, jit_compile, optimizer, monkeypatch):
    """Of sparse gradients too: rows of all replicas for tokens, sums for positions."""
    make = {
        "adamw": lambda: keras.optimizers.AdamW(0.01, epsilon=1e-4),
        "average, accumulated": lambda: keras.optimizers.SGD(0.1, use_ema=True, gradient_accumulation_steps=2),
    }[optimizer]
    apart = strategy().mesh.tensor > 1 and optimizer != "adamw"  # which keeps what it needs of all ranks
    if not apart:
        monkeypatch.setattr(Update, "__call__", lambda *_: pytest.fail("the update was not inside"))
    fit = history(*words(), batch_size=8, epochs=2)
    check(strategy(), fit, build=encoder, optimizer=make, jit_compile=jit_compile, rtol=1e-4, atol=1e-5)


@FAST
def test_what_needs_an_update_apart_has_one(monkeypatch):
    class Assigning(layers.Layer):
        def build(self, shape):
            self.w = self.add_weight(shape=(shape[-1],), initializer="ones", name="w")

        def call(self, x):
            self.w.assign(self.w * 0.9)
            return x * self.w

    def build():
        x = layers.Input((6,))
        return keras.Model(x, layers.Dense(3, activation="softmax")(Assigning()(x)))

    fit = history(X, Y, batch_size=8, epochs=2)
    _, model = check(tfpar.MeshStrategy(Mesh()), fit, build=build, jit_compile=True)
    assert hooks_of(model).engine.updates_apart

    def regularized():
        return keras.Sequential([layers.Input((6,)), layers.Dense(3, "softmax", kernel_regularizer="l2")])

    check(tfpar.MeshStrategy(Mesh()), fit, build=regularized, jit_compile=True)


@pytest.mark.parametrize("options", [{}, {"sequence_parallel": True}], ids=str)
def test_micro_batches_take_turns_at_each_collective(options, monkeypatch):
    """On the way forward and back, and none waits for all of another."""
    seen, original = [], in_program.InProgram.emit
    monkeypatch.setattr(
        in_program.InProgram,
        "emit",
        lambda self, kind, *a: (seen.append((self.number, kind)), original(self, kind, *a))[1],
    )
    fit = history(*words(), batch_size=8)
    _, model = check(inside(tensor=2, micro_batches=2, **options), fit, build=encoder, rtol=1e-4, atol=1e-5)
    assert hooks_of(model).engine.inside
    exchanges = [pair for pair in seen if pair[1] not in ("identity", "slice")]
    assert len(exchanges) > 8 and exchanges[::2] == exchanges[1::2]


def looked_up_twice():
    """A table of which each sample has the same rows, once some and, after an exchange, others."""
    table = layers.Embedding(16, 8)
    x = layers.Input((5, 8))
    h = layers.Dense(8, activation="tanh")(x + table(keras.ops.arange(0, 5)))
    h = layers.MultiHeadAttention(2, 4)(h, h)
    return keras.Model(x, layers.Dense(4, "softmax")(h + table(keras.ops.arange(7, 12))))


@FAST
def test_rows_that_all_samples_have_are_added_up_for_each_look_up():
    rng = np.random.default_rng(0)
    fit = history(rng.normal(size=(16, 5, 8)).astype("float32"), rng.integers(0, 4, (16, 5)), batch_size=8, epochs=2)
    _, model = check(inside(tensor=2, micro_batches=2), fit, build=looked_up_twice, rtol=1e-4, atol=1e-5)
    assert hooks_of(model).engine.inside


def leads_to(x):
    """The operations that a tensor follows from."""
    found, left = set(), [x.op]
    while left:
        op = left.pop()
        if op not in found:
            found.add(op)
            left += [y.op for y in op.inputs]
    return found


def operations(strategy, monkeypatch, optimizer="sgd"):
    """Those of the programs of training as XLA would compile them for GPUs."""
    monkeypatch.setattr(_xla, "gather_gang", lambda *_: None)
    monkeypatch.setattr(planner, "inter_op_threads", lambda: 99)
    traced, original = [], Function.trace
    monkeypatch.setattr(Function, "trace", lambda self, args: (traced.append(original(self, args)), traced[-1])[1])
    with strategy.scope():
        model = encoder()
        model.compile(optimizer, "sparse_categorical_crossentropy", jit_compile=True)
    steps = hooks_of(model)
    StepFunction(steps, steps.train_step).prepared([(*map(tf.constant, words()), None)], None, None)
    return [op for f in traced for op in f.graph.get_operations()]


def modules(ops, text):
    """The operations of StableHLO among some in whose text this is."""
    return [op for op in ops if op.type == "XlaCallModule" and text in op.get_attr("module")]


@FAST
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_turns_wait_for_what_is_computed_not_for_what_is_exchanged(micro_batches, monkeypatch):
    exchanges = modules(operations(inside(tensor=2, micro_batches=micro_batches), monkeypatch), b"@exchange")
    pairs = [(before, set().union(*(leads_to(x) for x in op.inputs if x.op is not before)))
             for before, op in itertools.pairwise(exchanges)]  # fmt: skip
    assert len(pairs) >= 6
    waiting = [before in made for before, made in pairs]
    assert sum(waiting) == 0 if micro_batches == 2 else sum(waiting) > len(pairs) / 2
    computed = [before.inputs[0].op in made for before, made in pairs]
    assert sum(computed) > len(pairs) * 0.8


ZERO = {"data": 2, "zero": 3}


@FAST
@pytest.mark.parametrize("buckets", [1, 4])
def test_weights_are_gathered_anew_on_the_way_back(buckets, monkeypatch):
    """No product of the way back holds on to what was gathered on the way forward, but those of the last part."""
    ops = operations(inside(**ZERO, buckets=buckets), monkeypatch, "adam")
    gathers, scatters = modules(ops, b"stablehlo.all_gather"), modules(ops, b"stablehlo.reduce_scatter")
    again = [op for op in gathers if modules(followed(op, lambda op: [x.op for x in op.inputs]), b"@later")]
    places = {op: n for n, op in enumerate(ops)}
    assert bool(again) == (buckets > 1) and len(scatters) >= buckets - 1
    if again:
        turn, first = min(places[op] for op in again), [op for op in gathers if op not in again]
        assert places[scatters[0]] < places[again[-1]]  # gradients do not wait until all are there
        users = {op: followed(op, lambda op: [user for x in op.outputs for user in x.consumers()]) for op in first}
        held = [op for op in first if any(places[x] > turn and "MatMul" in x.type for x in users[op])]
        assert 0 < len(held) < len(first) - len(held)


@FAST
@pytest.mark.parametrize("zero, exchange", [(0, b"stablehlo.all_reduce"), (2, b"stablehlo.reduce_scatter")])
def test_parts_let_go(zero, exchange, monkeypatch):
    """Gradients are exchanged part by part, and what is kept for the way back went through a barrier."""
    ops = operations(inside(data=2, zero=zero, buckets=4), monkeypatch)
    products = [n for n, op in enumerate(ops) if "MatMul" in op.type]
    sums, later = ([n for n, op in enumerate(ops) if op in modules(ops, text)] for text in (exchange, b"@later"))
    assert len(sums) > 2 and sums[0] < products[-1]
    (loss,) = (n for n, op in enumerate(ops) if "CrossEntropy" in op.type)
    made = [
        op
        for op in ops[:loss]
        if op.type in ("BiasAdd", "Einsum", "MatMul", "Mul", "Relu", "Softmax", "SquaredDifference")
    ]
    users = {
        user for op in made for user in op.outputs[0].consumers() if user.type not in ("Identity", "XlaCallModule")
    }
    assert len(made) > 8 and not [user for user in users if ops.index(user) > later[0]]


def followed(op, neighbours):
    """The operations that are next to one, and next to those of them that only give another form to a tensor."""
    found, left = [], [op]
    for op in left:
        found += neighbours(op)
        left += [
            x for x in neighbours(op) if x.type in ("Cast", "ConcatV2", "Identity", "Reshape", "Transpose", "SplitV")
        ]
    return found


@pytest.mark.parametrize(
    "shape", [{"shard": 2}, pytest.param({"tensor": 2}, marks=EVERY), {"tensor": 2, "micro_batches": 2}], ids=str
)
def test_shards_are_gathered_summed_and_updated_in_one_program(shape, monkeypatch):
    """Of sparse gradients too, clipped by norms that lanes find parts of."""
    monkeypatch.setattr(Update, "__call__", lambda *_: pytest.fail("the update was not inside"))
    adam = lambda: keras.optimizers.Adam(0.01, epsilon=1e-4, global_clipnorm=0.5)  # noqa: E731
    fit = history(*words(), batch_size=8, epochs=2)
    check(inside(**ZERO, **shape), fit, build=encoder, optimizer=adam, rtol=1e-4, atol=1e-5)


def odd():
    """Of shapes that layers ask for, divided along several dims."""
    x = layers.Input((7,))
    h = layers.GroupNormalization(2)(layers.LayerNormalization()(layers.Dense(8, kernel_regularizer="l2")(x)))
    return keras.Model(x, layers.Dense(4, activation="softmax")(h))


@pytest.mark.parametrize(
    "optimizer, rows",
    [
        pytest.param("sgd", 16, marks=FAST), ("sgd", 14), (lambda: keras.optimizers.SGD(0.1, use_ema=True), 16),
        pytest.param("adafactor", 16, marks=EVERY),
    ],
    ids=["regularized", "a batch of unknown size", "average", "whole weights"],
)  # fmt: skip
def test_programs_gather_weights_that_they_do_not_update(optimizer, rows, monkeypatch):
    """Which would be there all at once if they were handed over."""
    seen, original = [], weights_inside.GatheredWeights.gathered
    monkeypatch.setattr(
        weights_inside.GatheredWeights,
        "gathered",
        lambda self, name, variables, after: (seen.append(len(variables)), original(self, name, variables, after))[1],
    )
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(rows, 7)).astype("float32"), rng.integers(0, 4, rows)
    fit = history(x, y, batch_size=8, epochs=2)
    check(inside(**ZERO), fit, build=odd, optimizer=optimizer, rtol=1e-4, atol=1e-5)
    assert sum(seen) >= 6


@FAST
@pytest.mark.parametrize("buckets", [1, 4])
def test_what_a_layer_assigns_is_not_gathered_again(buckets):
    """A weight that a layer assigns each time it is called, in several parts."""

    class Shrinking(layers.Layer):
        def build(self, shape):
            self.w = self.add_weight(shape=shape[1:], initializer="ones", name="w")

        def call(self, x):
            y = x * self.w
            self.w.assign(self.w * 0.9)
            return y

    def build():
        shrinking = Shrinking()
        x = h = layers.Input((6,))
        for _ in range(3):
            h = shrinking(layers.Dense(6, activation="tanh")(h))
        return keras.Model(x, layers.Dense(3, activation="softmax")(h))

    _, model = check(inside(**ZERO, buckets=buckets), history(X, Y, batch_size=8, epochs=2), build=build)
    assert hooks_of(model).engine.inside


@pytest.mark.parametrize("zero", [1, pytest.param(2, marks=EVERY)])
def test_slots_are_divided_where_weights_are_not(zero, monkeypatch):
    monkeypatch.setattr(Update, "__call__", lambda *_: pytest.fail("the update was not inside"))
    sgd = lambda: keras.optimizers.SGD(0.1, momentum=0.9, clipnorm=0.1)  # noqa: E731
    fit = history(*words(), batch_size=8, epochs=2)
    _, model = check(inside(data=2, zero=zero), fit, build=encoder, optimizer=sgd, rtol=1e-4, atol=1e-5)
    slots = [v.value for v in model.optimizer.variables if "momentum" in v.path and len(v.shape) > 1]
    assert slots and all(v.copies[0].shape.num_elements() * 2 == v.shape.num_elements() for v in slots)


@FAST
@pytest.mark.parametrize("kind", ["of its own samples", "the first part of each"])
def test_planted_scattered_gradients_are_caught(kind, monkeypatch):
    def planted(self, axis, values, lane):
        own = kind == "of its own samples"
        return {k: self.own_part(axis, x, lane if own else 0 * lane, dim) for k, (x, dim) in values.items()}

    monkeypatch.setattr(in_program.Gang, "scattered", planted)
    with pytest.raises(AssertionError):
        check(inside(**ZERO), history(*words(), batch_size=8, epochs=2), build=encoder)


@FAST
def test_planted_values_made_again_are_caught(monkeypatch):
    """What the way back takes is what was there on the way forward."""
    original = in_program.Gang.after

    def planted(self, values, others):
        return [x * 1.1 if x.dtype.is_floating and others else x for x in original(self, values, others)]

    monkeypatch.setattr(in_program.Gang, "after", planted)
    with pytest.raises(AssertionError):
        check(inside(**ZERO), history(*words(), batch_size=8), build=encoder)


@FAST
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("compiled", [True, False])
def test_own_rows_are_those_of_the_dense_gradient(dim, compiled):
    """Those of others add nothing, whatever adds rows up."""
    gang = in_program.Gang(("a", "b", "c"), Mesh(data=3), compiled)
    rows = tf.IndexedSlices(tf.reshape(tf.range(24.0), (4, 6)), tf.constant([5, 1, 5, 0]), tf.constant([6, 6]))
    expected = tf.split(tf.convert_to_tensor(rows), 3, dim)

    @tf.function(jit_compile=compiled)
    def found(variable, place):
        own = gang.own_rows("data", rows, place, dim, expected[0].shape)
        variable.scatter_sub(own)
        return tf.convert_to_tensor(own)

    for place, part in enumerate(expected):
        variable = tf.Variable(tf.zeros(part.shape))
        np.testing.assert_array_equal(found(variable, tf.constant(place)), part)
        np.testing.assert_array_equal(-variable, part)


@FAST
def test_tensors_that_are_exchanged_together_come_back_as_they_were(monkeypatch):
    def exchanged(kind, values, groups, dim):
        """As if the other lane had 100 more."""
        (x,) = values
        return [tf.concat([x, x + 100.0], dim) if kind == "all-gather" else tf.split(x, 2, dim)[1]]

    monkeypatch.setattr(_xla, "exchanged", exchanged)
    gang, dims = in_program.Gang(("a", "b"), Mesh(data=2), True), [((4,), 0), ((2, 6), 0), ((2, 6), 1), ((3, 5, 4), 2)]
    given = {n: (tf.random.stateless_uniform(shape, (n, 0)), dim) for n, (shape, dim) in enumerate(dims)}
    for n, found in gang.gathered("data", given, 0).items():
        x, dim = given[n]
        np.testing.assert_array_equal(found, tf.concat([x, x + 100.0], dim))
    for n, found in gang.scattered("data", given, 0).items():
        x, dim = given[n]
        np.testing.assert_array_equal(found, tf.split(x, 2, dim)[1])


@FAST
def test_each_device_runs_one_program():
    keras.utils.set_random_seed(0)
    with (strategy := inside(data=2, tensor=2)).scope():
        model = encoder()
        model.compile("sgd", "sparse_categorical_crossentropy")
    model.fit(*words(), batch_size=16, verbose=0)
    (way,) = hooks_of(model).engine.inside.values()
    assert way.partition.stages == 1 and not way.collectives
    assert "collectives are inside the programs of training" in str(strategy.explain(model))


@FAST
@pytest.mark.parametrize(
    "strategy, build, why",
    [
        (lambda: tfpar.MeshStrategy(Mesh(tensor=2)), encoder, "only programs that XLA compiles"),
        (lambda: tfpar.MeshStrategy(Mesh(tensor=2), collectives="between"), encoder, "was asked for"),
        (lambda: tfpar.MeshStrategy(Mesh(1, 2, 2), 2, collectives="inside"), encoder, "several stages"),
        (lambda: tfpar.MeshStrategy(Mesh(tensor=2), 4), encoder, 'with collectives="inside", exactly two take turns'),
        (lambda: inside(tensor=3), encoder, "elements make no equal parts for 3 devices"),
    ],
)
def test_where_programs_are_cut_explain_says_why(strategy, build, why):
    with (strategy := strategy()).scope():
        model = build()
    said = strategy.explain(model)
    assert why in said.cut_because and "collectives are between programs" in str(said)


@FAST
@pytest.mark.parametrize("more", [{}, {"zero": 1}, {"buckets": 2}, {"zero": 3}], ids=str)
def test_on_gpus_programs_hold_what_replicas_exchange(more, monkeypatch):
    monkeypatch.setattr(Mesh, "on_gpus", True)
    monkeypatch.setattr(planner, "each_gpu_is_one_device", lambda: True)
    monkeypatch.setattr(planner, "inter_op_threads", lambda: 8)
    model = encoder()
    model.compile("sgd", "mse", jit_compile=True)
    assert planner.cut_because(tfpar.DataParallelStrategy(2, **more), model) is None


@FAST
def test_too_few_threads_would_wait_for_each_other():
    with (strategy := inside(tensor=2)).scope():
        model = encoder()
        model.compile("sgd", "mse", jit_compile=True)
    assert "inter-op threads for 2 devices are too few" in strategy.explain(model).cut_because


@FAST
def test_a_short_batch_leaves_no_program_waiting():
    """Of fewer samples than replicas; programs that hold collectives would wait for those without a part."""
    fit = history(X[:9], Y[:9], batch_size=4, epochs=1)
    check(inside(data=4), fit)


def test_a_step_that_fails_is_explained():
    def wrong(x):
        with tf.control_dependencies([tf.debugging.assert_less(tf.reduce_max(x), 0.0)]):
            return tf.identity(x)

    with inside(tensor=2).scope():
        x = layers.Input((6,))
        h = layers.Lambda(wrong, name="wrong", output_shape=(6,))(layers.Dense(6)(x))
        model = keras.Model(x, layers.Dense(3)(h))
        model.compile("sgd", "mse")
    with pytest.raises(tfpar.StageError, match="wrong failed"):
        model.fit(X, X[:, :3], batch_size=8, verbose=0)


@pytest.mark.parametrize("where, zero", [pytest.param("inside", 0, marks=FAST), ("between", 2)])
def test_gradients_are_exchanged_in_another_dtype(where, zero):
    """Sums over two replicas have 8 bits then; those of one, none of it."""
    strategy = tfpar.MeshStrategy(Mesh(data=2), collectives=where, zero=zero, reduce_dtype="bfloat16")
    one, other = (compiled(s, keras.optimizers.SGD(1.0)) for s in (None, strategy))
    before = one.get_weights()
    for model in (one, other):
        model.fit(X, Y, batch_size=16, verbose=0)
    moved = [(a - b, c - b) for a, b, c in zip(one.get_weights(), before, other.get_weights(), strict=True)]
    off = max(np.abs(a - b).max() / np.abs(a).max() for a, b in moved)
    assert 1e-5 < off < 2**-7


@FAST
def test_unknown_dtype_is_refused():
    with pytest.raises(tfpar.ModelError, match="\"float32\"; received 'int8'"):
        tfpar.DataParallelStrategy(2, reduce_dtype="int8")


@FAST
def test_unknown_place_is_refused():
    with pytest.raises(tfpar.ModelError, match='"inside" or "between"; received 3'):
        tfpar.MeshStrategy(Mesh(tensor=2), collectives=3)


def test_parts_may_be_unequal_where_sums_alone_are_exchanged():
    """Ranks then have programs of their own, which are to meet all the same."""

    def build():
        x = layers.Input((6,))
        return keras.Model(x, layers.Dense(3, activation="softmax")(layers.Dense(5, activation="tanh")(x)))

    _, model = check(inside(tensor=2), history(X, Y, batch_size=8), build=build)
    assert hooks_of(model).engine.inside


def test_models_on_the_same_devices_do_not_meet():
    """Of which one has weights of (6, 4) where the other has (4, 6)."""

    def build(width, units):
        x = layers.Input((width,))
        return keras.Model(x, layers.Dense(units, activation="softmax")(x))

    for width, units in ((6, 4), (4, 6)):
        check(inside(data=2), history(X[:, :width], Y, batch_size=8), build=lambda w=width, u=units: build(w, u))


@pytest.mark.parametrize("kind", ["all-reduce", "all-gather", "reduce-scatter"])
def test_planted_bugs_are_caught(kind, monkeypatch):
    original = in_program.Gang.exchanged

    def wrong(self, what, axis, x, lane, *more):
        off = 1e-3 * tf.cast(lane, x.dtype) if what == kind else 0
        return original(self, what, axis, x * (1 + off), lane, *more)

    monkeypatch.setattr(in_program.Gang, "exchanged", wrong)
    exchanging = ZERO if kind == "reduce-scatter" else {"tensor": 2}
    with pytest.raises(AssertionError):
        check(inside(**exchanging), history(X, Y, batch_size=8), build=normalized)


def test_large_gradients_have_a_sum_of_their_own(monkeypatch):
    """XLA copies what is in one sum into one buffer."""
    sums, original = [], in_program.Gang.added_up

    def added_up(self, axis, values, lane):
        sums.append([x.shape.num_elements() for x in values.values()])
        return original(self, axis, values, lane)

    monkeypatch.setattr(in_program.Gang, "added_up", added_up)
    monkeypatch.setattr(weights_inside, "ALONE", 20)
    check(inside(data=2), history(X, Y, batch_size=8))
    assert any(len(some) > 1 for some in sums) and any(some[0] >= 20 for some in sums)
    assert all(len(some) == 1 or max(some) < 20 for some in sums)


def test_planted_gradient_sums_are_caught(monkeypatch):
    monkeypatch.setattr(in_program.Gang, "added_up", lambda self, axis, values, lane: values)
    with pytest.raises(AssertionError):
        check(inside(data=2), history(X, Y, batch_size=8))


@FAST
def test_stablehlo_is_what_it_says():
    """The text, without running it: that takes GPUs."""

    @tf.function
    def program(x, y):
        (a, b) = _xla.exchanged("all-reduce", [x, y], [[0, 1], [2, 3]])
        return _xla.exchanged("all-gather", [a], [[0, 2], [1, 3]], 1)[0] + b[0, 0]

    traced = program.get_concrete_function(tf.TensorSpec([2, 3]), tf.TensorSpec([4, 3]))
    first, second = (op for op in traced.graph.get_operations() if op.type == "XlaCallModule")
    assert [x.shape.as_list() for x in (*first.outputs, *second.outputs)] == [[2, 3], [4, 3], [2, 6]]
    assert second.inputs[1] is first.outputs[0]  # in this order on every device
    text = second.get_attr("module").decode()
    assert "tensor<2x3xf32>) -> (tensor<2x6xf32>)" in text and "dense<[[0, 2], [1, 3]]> : tensor<2x2xi64>" in text
