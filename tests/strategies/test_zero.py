"""ZeRO: what replicas divide, in bytes; the same numbers with any optimizer; slots in host memory."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from test_mesh_strategy import CUBE, graph
from training import OPTIMIZERS, check, compiled, data, history, mostly, some_fast

import tfpar
from tfpar import Mesh
from tfpar.comm import collectives
from tfpar.engine.gradient_reduction import GradientReduction
from tfpar.planning.sharding import UNSHARDED, Sharding, sharded
from tfpar.testing import assert_same
from tfpar.variables import shard_view
from tfpar.variables.logical import LogicalVariable
from tfpar.variables.parts import of_shards, parts_of

X, Y = data(16)


def wide():
    x = h = layers.Input((6,))
    for _ in range(4):
        h = layers.Dense(16, activation="tanh")(h)
    return keras.Model(x, layers.Dense(3, activation="softmax")(h))


def words():
    x = layers.Input((6,))
    h = layers.Embedding(12, 8)(layers.Lambda(lambda v: keras.ops.cast(keras.ops.abs(v) * 3, "int32") % 12)(x))
    return keras.Model(x, layers.Dense(3, activation="softmax")(layers.Flatten()(h)))


def held(variables, device):
    return sum(np.asarray(c).nbytes for v in variables for c in v.value.copies if c.device.endswith(device))


@pytest.mark.parametrize(
    "zero, mesh",
    some_fast(
        [(0, Mesh(4)), (1, Mesh(4)), (2, Mesh(4, 2)), (3, Mesh(2, shard=2)), (3, Mesh(2, 1, 2)), (1, CUBE), (3, CUBE)],
        (3, Mesh(2, 1, 2)), (3, Mesh(2, shard=2)),
    ),
    ids=str,
)  # fmt: skip
def test_bytes_on_each_device(zero, mesh):
    """Rajbhandari et al., section 5: of N replicas each holds an Nth of the slots, and with ZeRO 3 of the weights.

    With `shard`, of the N of a group.
    """
    parts = mesh.shard if mesh.shard > 1 else mesh.data
    strategy = tfpar.MeshStrategy(mesh, zero=zero)
    model = compiled(strategy, "adam", build=wide)
    history(X, Y, batch_size=16)(model)
    weights = model.trainable_weights
    slots = [v for v in model.optimizer.variables if len(v.shape)]
    for s in range(mesh.stage):
        places = [strategy.mesh.device(lane._replace(stage=s)) for lane in mesh.lanes]
        ours = [w for w in weights if any(c.device.endswith(places[0]) for c in w.value.copies)]
        whole = sum(np.asarray(w).nbytes for w in ours)
        ranks = sum(np.asarray(w).nbytes / (1 if "tensor" not in w.value.sharding.dims else mesh.tensor) for w in ours)
        for place in places:
            assert held(weights, place) == pytest.approx(ranks / (parts if zero == 3 else 1), rel=0.1)
            assert held(slots, place) == pytest.approx(2 * ranks / (parts if zero else 1), rel=0.1)
        assert whole > 0
    assert strategy.zero == zero


def test_gradients_are_divided_where_they_are_made():
    strategy = tfpar.MeshStrategy(Mesh(2), zero=2, micro_batches=2)
    model = compiled(strategy, build=wide)
    history(X, Y, batch_size=16)(model)
    ops = graph(model).get_operations()
    sums = [op for op in ops if "/backward/" in op.name and op.type == "AddV2" and len(op.outputs[0].shape) == 2]
    halves = {(8, 16), (3, 16), (8, 3)}  # of the matrices 16 x 16, 6 x 16 and 16 x 3
    assert sums and {tuple(op.outputs[0].shape) for op in sums} <= halves


def test_gathered_weights_are_let_go():
    """What is kept for the backward pass does not follow from weights alone: those are gathered again."""
    strategy = tfpar.MeshStrategy(Mesh(2), zero=3, micro_batches=2)
    model = compiled(strategy, build=wide)
    history(X, Y, batch_size=16)(model)
    calls = [op for op in graph(model).get_operations() if "PartitionedCall" in op.type and "/forward/" in op.name]
    kept = [y for op in calls for y in op.outputs if y.consumers()]
    assert kept and not [y for y in kept if y.shape in ((16, 16), (6, 16), (16, 6))]


@pytest.mark.fast
def test_a_group_without_samples():
    """Two samples for two groups of two: the second group has none, and its shards come from the first."""
    strategy = tfpar.MeshStrategy(Mesh(2, shard=2), zero=3)
    check(strategy, history(X, Y, batch_size=2), optimizer="adam", build=wide)


@pytest.mark.parametrize("name", mostly(OPTIMIZERS, [*list(OPTIMIZERS)[:11:4], "Ftrl"], list(OPTIMIZERS)[:5:4]))
def test_optimizers(name):
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    number = list(OPTIMIZERS).index(name)
    mesh = Mesh(2, shard=2) if number % 2 else Mesh(3)
    strategy = tfpar.MeshStrategy(mesh, zero=1 + number % 3, micro_batches=2)
    check(strategy, history(X, Y, batch_size=8, epochs=2), 1e-9, 1e-11, optimizer=OPTIMIZERS[name], build=wide)


@pytest.mark.fast
def test_what_is_no_slot_stays_out_of_compiled_updates():
    """Adafactor keeps int32 in place of some slots, which TensorFlow has on the host."""
    strategy = tfpar.DataParallelStrategy(2)
    model = compiled(strategy, optimizer=lambda: keras.optimizers.Adafactor(0.01))
    history(X, Y, batch_size=8)(model)
    assert any(v.dtype == "int32" for v in model.optimizer.variables)
    steps = strategy._steps(model)
    assert not [v for v in steps.update.variables(0) if v.dtype == tf.int32]


@pytest.mark.parametrize("zero", [1, 2, 3])
@pytest.mark.parametrize(
    "options", some_fast([{"clipnorm": 0.1}, {"global_clipnorm": 0.1}, {}], {"global_clipnorm": 0.1}), ids=str
)
def test_sparse_gradients(zero, options):
    """Keras clips the rows of a sparse gradient one by one, those that repeat too."""
    check(
        tfpar.DataParallelStrategy(["CPU:0", "CPU:1", "CPU:2"], zero=zero), history(X, Y, batch_size=8, epochs=2),
        build=words, optimizer=lambda: keras.optimizers.SGD(0.5, momentum=0.9, **options),
    )  # fmt: skip


@pytest.mark.parametrize("options", [{"clipnorm": 0.1}, {"global_clipnorm": 0.1}], ids=lambda o: next(iter(o)))
def test_sparse_gradients_that_are_squared(options):
    """Rows that repeat are added up before Adam squares them, or not, as Keras does."""
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    adam = lambda: keras.optimizers.Adam(0.01, **options)  # noqa: E731
    strategy = tfpar.DataParallelStrategy(["CPU:0", "CPU:1"], zero=3)
    check(strategy, history(*data(16), batch_size=8, epochs=2), 1e-9, build=words, optimizer=adam)


@pytest.mark.fast
@pytest.mark.parametrize("mesh, zero", [(Mesh(2), 1), (Mesh(2, 2), 0)], ids=str)
def test_replicas_without_whole_copies_have_no_loop(mesh, zero):
    strategy = tfpar.MeshStrategy(mesh, zero=zero)
    with pytest.raises(tfpar.ModelError, match="strategy.run needs a whole copy of each variable on each replica"):
        strategy.run(lambda: 1.0)


@pytest.mark.parametrize("mesh", some_fast([Mesh(1), Mesh(2), Mesh(2, 1, 2), Mesh(1, 2)], Mesh(1, 2)), ids=str)
def test_slots_in_host_memory(mesh):
    strategy = tfpar.MeshStrategy(mesh.on([f"CPU:{n + 1}" for n in range(mesh.size)]), offload="optimizer")
    adam = lambda: keras.optimizers.Adam(0.01, global_clipnorm=0.1)  # noqa: E731
    _, model = check(strategy, history(X, Y, batch_size=8, epochs=2), optimizer=adam, build=wide)
    assert {c.device[-5:] for v in model.optimizer.variables for c in v.value.copies} == {"CPU:0"}
    assert {c.device[-5:] for v in model.weights for c in v.value.copies} == {*strategy.mesh.devices}
    slots = [v for v in model.optimizer.variables if len(v.shape) and "tensor" not in v.value.sharding.dims]
    whole = [v for v in slots if "data" not in v.value.sharding.dims]  # three numbers make no two equal parts
    assert all(n % mesh.data for v in whole for n in v.shape) or mesh.data == 1
    copies = [mesh.data if any(v is w for w in whole) else 1 for v in slots]
    found = sum(np.asarray(v).nbytes * n for v, n in zip(slots, copies, strict=True)) * mesh.tensor
    assert held(slots, "CPU:0") == found


@pytest.mark.fast
def test_regularizers_and_constraints():
    def build():
        x = layers.Input((6,))
        h = layers.Dense(8, kernel_regularizer="l2", kernel_constraint=keras.constraints.MaxNorm(0.5))(x)
        return keras.Model(x, layers.Dense(3, activation="softmax", kernel_regularizer=keras.regularizers.L1(0.1))(h))

    check(tfpar.MeshStrategy(Mesh(2), zero=3), history(X, Y, batch_size=8, epochs=2), build=build, optimizer="adam")


# ---- what is where, as plain data


@pytest.mark.fast
def test_sharded():
    four, eight = Sharding({}, Mesh(4)), Mesh(2, 1, 4)
    assert sharded((6, 16), four) == Sharding({"data": 1}, Mesh(4))
    assert sharded((6, 16), Sharding({"tensor": 1}, eight)) == Sharding({"tensor": 1, "data": 0}, eight)
    assert sharded((3,), four) == sharded((), four) == four and sharded((8,), UNSHARDED) == UNSHARDED


@pytest.mark.fast
@pytest.mark.parametrize("shape", [(8, 6), (5, 7), (4, 3, 2)])
@pytest.mark.parametrize("layout, shards", [(None, 0), (0, 0), (0, 1), (1, 0), (1, None), (None, None)])
def test_parts_make_up_the_whole(shape, layout, shards):
    value = tf.reshape(tf.range(np.prod(shape)), shape)
    dims = {"tensor": layout, "data": shards}
    sharding = Sharding({axis: dim for axis, dim in dims.items() if dim is not None}, Mesh(3, 1, 2))
    parts = parts_of(value, sharding, 6)
    assert [tuple(p.shape) for p in parts] == [sharding.shape(shape, lane) for lane in Mesh(3, 1, 2).lanes]
    assert np.array_equal(of_shards(parts, sharding), value)
    if shards is not None:
        assert sum(p.shape.num_elements() for p in parts) == value.shape.num_elements() * (
            1 if layout is not None else 2
        )


# ---- bugs that must be seen


def shards_in_another_order(patch):
    original = shard_view.write_shards
    wrong = lambda variable, shards: original(variable, shards[::-1])  # noqa: E731
    patch.setattr("tfpar.engine.optimizer_step.write_shards", wrong)


def gradients_of_one_replica(patch):
    original = collectives.reduce_scatter_gradient
    wrong = lambda parts, *a: original(parts[:1], *a)  # noqa: E731
    patch.setattr("tfpar.engine.weight_edge.reduce_scatter_gradient", wrong)


def same_weights_again(patch):
    original = LogicalVariable.of_lane
    patch.setattr(LogicalVariable, "of_lane", lambda self, lane: original(self, lane) * (0.5 if any(lane) else 1.0))


def groups_apart(patch):
    original = GradientReduction.exchange

    def exchange(self, terms, axis, lanes):
        return None if axis == "data" else original(self, terms, axis, lanes)

    patch.setattr(GradientReduction, "exchange", exchange)


@pytest.mark.parametrize(
    "bug, zero",
    [(None, 1), (None, 2), (None, 3), (shards_in_another_order, 1), (gradients_of_one_replica, 1),
     (gradients_of_one_replica, 2), (same_weights_again, 3), (groups_apart, 3)],
)  # fmt: skip
def test_planted_bugs_are_caught(bug, zero, monkeypatch):
    mesh = Mesh(2, shard=2) if bug in (None, groups_apart) and zero == 3 else Mesh(2)
    one, other = (compiled(s, "adam", build=wide) for s in (None, tfpar.MeshStrategy(mesh, zero=zero)))
    if bug:
        bug(monkeypatch)
    for model in (one, other):
        history(X, Y, batch_size=8, epochs=2)(model)
    if bug:
        with pytest.raises(AssertionError, match="differ"):
            assert_same(one, other, 1e-5, 1e-7)
    else:
        assert_same(one, other, 1e-5, 1e-7)
