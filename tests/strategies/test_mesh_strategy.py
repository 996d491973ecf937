"""Several axes at once: what is refused, what is where, what crosses, and that a bug would be seen."""

import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from training import OPTIMIZERS, Own, Spy, check, compiled, data, deep, history, mostly

import tfpar
from tfpar import Mesh
from tfpar.comm import collectives
from tfpar.engine.executor import Execution
from tfpar.engine.optimizer_step import Update
from tfpar.planning.mesh import Coordinate
from tfpar.testing import assert_same, planned_exchanges, traced_exchanges
from tfpar.trainer.hooks import hooks_of
from tfpar.trainer.step_function import StepFunction

X, Y = data(16)
CUBE = Mesh(data=2, stage=2, tensor=2)


def graph(model):
    steps = hooks_of(model)
    return StepFunction(steps, steps.train_step).prepared(((X, Y),), None, None)[0].graph


@pytest.mark.fast
@pytest.mark.parametrize(
    "mesh, options, error, match",
    [
        (
            Mesh(4, 4),
            {},
            tfpar.DeviceError,
            r"Mesh\(data=4, stage=4\) has 16 places; there are 8 devices: CPU:0, CPU:1",
        ),
        (Mesh(2), {"zero": 4}, tfpar.ModelError, "zero is 0, 1, 2 or 3; received 4"),
        (Mesh(2), {"offload": "all"}, tfpar.ModelError, "offload is None or \"optimizer\"; received 'all'"),
        (Mesh(2), {"micro_batches": 0}, tfpar.ScheduleError, "at least 1; received 0"),
        (Mesh(devices=("GPU:7",)), {}, tfpar.DeviceError, "there is no device 'GPU:7'"),
    ],
)
def test_refused(mesh, options, error, match):
    with pytest.raises(error, match=match):
        tfpar.MeshStrategy(mesh, **options)


@pytest.mark.fast
def test_ranks_are_the_closest_devices():
    strategy = tfpar.MeshStrategy(CUBE)
    assert strategy.mesh.devices == tuple(f"CPU:{n}" for n in range(8))
    device = strategy.mesh.device
    assert [device(Coordinate(tensor=k)) for k in range(2)] == ["CPU:0", "CPU:1"]
    assert device(Coordinate(stage=1)) == "CPU:2" and device(Coordinate(data=1)) == "CPU:4"
    assert strategy.num_replicas_in_sync == 2 and isinstance(strategy, tf.distribute.MirroredStrategy)
    assert tfpar.MeshStrategy(Mesh(2, devices=("CPU:5", "CPU:3"))).mesh.devices == ("CPU:5", "CPU:3")


def test_each_device_has_its_part():
    strategy = tfpar.MeshStrategy(CUBE, micro_batches=2)
    model = compiled(strategy, "adam", build=deep)
    history(X, Y, batch_size=16)(model)
    plan = strategy.explain(model)
    for r in range(2):
        for s in range(2):
            for k in range(2):
                device = strategy.mesh.device(Coordinate(r, s, k))
                held = [c for v in model.weights for c in v.value.copies if c.device.endswith(device)]
                assert sum(np.asarray(c).nbytes for c in held) == plan.parameter_bytes(s, Coordinate(r, s, k)) > 0
    kernel = model.layers[1].kernel.value
    assert {tuple(copy.shape) for copy in kernel.copies} == {(6, 4)} and kernel.shape == (6, 8)
    assert np.array_equal(kernel.copies[0], kernel.copies[2])  # rank 0 of both replicas
    used = {op.device[-5:] for op in graph(model).get_operations() if "PartitionedCall" in op.type}
    assert used == {f"CPU:{n}" for n in range(8)}


def test_explain():
    strategy = tfpar.MeshStrategy(CUBE, micro_batches=2, zero=3)
    model = compiled(strategy, "adam", build=deep)
    text = str(strategy.explain(model, batch_size=32))
    assert "2 replicas, 2 stages, 2 ranks, 2 micro-batches" in text and "predicted bubble" in text
    rows = [line.split()[:4] for line in text.splitlines() if re.search(r"CPU:\d", line)]
    assert rows == [[*f"{n:03b}", f"CPU:{n}"] for n in range(8)]
    assert "replicas divide weights, slots and gradients (ZeRO 3)" in text
    history(X, Y, batch_size=16)(model)
    plan = strategy.explain(model)
    slots = [c for v in model.optimizer.variables if "dense" in v.path for c in v.value.copies]
    mine = sum(np.asarray(c).nbytes for c in slots if c.device.endswith("CPU:5"))
    last = Coordinate(data=1, tensor=1)
    norms = sum(
        plan.bytes_of(v, last, plan.slot_bytes[v], 1)
        for v in plan.variables(0)
        if "norm" in plan.partition.graph.variables[v].path
    )
    assert mine == plan.optimizer_bytes(0, last) - norms > 0


def test_exchanges_are_those_of_each_replica():
    strategy = tfpar.MeshStrategy(Mesh(data=2, tensor=2))
    model = compiled(strategy, build=deep)
    history(X, Y, batch_size=16)(model)
    planned, found = (set(f) for f in (planned_exchanges(strategy.explain(model)), traced_exchanges(model, X, Y)))
    assert planned and {kind for kind, _ in planned} <= {"all-reduce", "all-gather", "reduce-scatter"}
    names = [op.name for op in graph(model).get_operations()]
    for kind, scope in planned - {("all-reduce", "weights")}:
        assert all(any(n.startswith(f"replica{r}/{kind}/{scope}/") for n in names) for r in range(2))
    assert ("all-reduce", "weights") in found


def test_a_stage_is_traced_once():
    """Whatever the number of micro-batches, replicas and ranks."""

    def build():
        x = h = layers.Input((6,))
        for _ in range(2):
            h = layers.Dense(4)(h)
        return keras.Model(x, layers.Dense(3, activation="softmax")(Spy()(h)))

    counts = []
    for micro_batches in (2, 4):
        Spy.traces.clear()
        strategy = tfpar.MeshStrategy(Mesh(2, 2, 2), micro_batches=micro_batches)
        history(X, Y, batch_size=16)(compiled(strategy, build=build))
        counts.append(Spy.traces.count(True))
    assert counts[0] == counts[1] <= 2


@pytest.mark.parametrize("name", mostly(OPTIMIZERS, ["adam, global norm", "average"]))
def test_optimizers_over_stages_and_replicas(name):
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    check(
        tfpar.MeshStrategy(Mesh(2, 2)), history(X, Y, batch_size=8, epochs=2), 1e-9, 1e-11,
        optimizer=OPTIMIZERS[name], build=deep,
    )  # fmt: skip


@pytest.mark.parametrize(
    "options", mostly([{}, {"zero": 3}, {"micro_batches": 2}], [{"zero": 3}, {"micro_batches": 2}]), ids=str
)
def test_own_train_step(options):
    def build():
        plain = deep()
        return Own(plain.inputs, plain.outputs)

    check(tfpar.MeshStrategy(CUBE, **options), history(X, Y, batch_size=8), build=build, optimizer="adam")


def test_eagerly():
    strategy = tfpar.MeshStrategy(CUBE, micro_batches=2, zero=1)
    check(strategy, history(X, Y, batch_size=8), build=deep, optimizer="adam", run_eagerly=True)


def test_compiled_with_xla():
    strategy = tfpar.MeshStrategy(CUBE, micro_batches=2, zero=3)
    check(strategy, history(X, Y, batch_size=8, epochs=2), build=deep, optimizer="adam", jit_compile=True)


def no_sum_over_replicas(patch):
    def kept(values, devices, ops):
        return [list(parts) for parts in values]

    patch.setattr("tfpar.engine.weight_edge.all_reduce_gradients", kept)


def no_sum_over_ranks(patch):
    patch.setitem(collectives.EXCHANGES, "all-reduce", collectives.identity)


def first_part_for_all(patch):
    patch.setattr(Execution, "part_number", lambda self, m: 0)


def norms_of_parts(patch):
    patch.setattr(Update, "counted", lambda self, place: tf.ones(len(self.members[place.stage]), tf.float64))


BUGS = [None, no_sum_over_replicas, no_sum_over_ranks, first_part_for_all, norms_of_parts]


@pytest.mark.parametrize("bug", mostly(BUGS, [None, no_sum_over_ranks, norms_of_parts], [None]))
def test_planted_bugs_are_caught(bug, monkeypatch):
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    fit = history(*data(16), batch_size=8)
    adam = lambda: keras.optimizers.Adam(0.01, global_clipnorm=0.05)  # noqa: E731
    one = compiled(None, adam, build=deep)
    fit(one)
    if bug:
        bug(monkeypatch)
    other = compiled(tfpar.MeshStrategy(CUBE, micro_batches=2), adam, build=deep)
    fit(other)
    if bug:
        with pytest.raises(AssertionError, match="differ"):
            assert_same(one, other, 1e-9, 1e-12)
    else:
        assert_same(one, other, 1e-9, 1e-12)
