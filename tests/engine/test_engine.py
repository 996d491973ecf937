"""The work is really divided: devices, order, memory, traces."""

import itertools
import pathlib
import runpy
from collections import deque

import keras
import pytest
import tensorflow as tf
from keras import layers
from training import Spy, check, compiled, data, history

import tfpar
from tfpar.engine import executor
from tfpar.engine.collectives_between import COLLECTIVE
from tfpar.engine.device_order import DeviceOrder
from tfpar.engine.executor import RUN, Execution
from tfpar.engine.loss import Loss
from tfpar.graph.recording import UnknownVariables
from tfpar.planning.schedule import Action, Kind, gpipe, one_f_one_b
from tfpar.trainer.hooks import hooks_of
from tfpar.trainer.step_function import StepFunction

pytestmark = pytest.mark.fast

X, Y = data(16)
FOUR = [f"CPU:{n}" for n in range(4)]


def build():
    x = h = layers.Input((X.shape[1],))
    for n in range(4):
        h = layers.Dense(8, activation="tanh", name=f"layer_{n}")(h)
    return keras.Model(x, layers.Dense(3, activation="softmax", name="last")(h))


def graph(strategy, build=build, call="train_on_batch", **compile):
    """The graph of one step, and the model."""
    made = []
    original = StepFunction.function

    def recording(*args):
        made.append(original(*args))
        return made[-1]

    model = compiled(strategy, build=build, optimizer="adam", **compile)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StepFunction, "function", recording)
        getattr(model, call)(*((X,) if call == "predict_on_batch" else (X, Y)))
    return made[0].get_concrete_function().graph, model


def device(op):
    return tf.DeviceSpec.from_string(op.device).device_index if op.device else None


def calls(g):
    """The calls of programs in a graph: by action, the operation."""
    found = {}
    for op in g.get_operations():
        parts = op.name.split("/")
        if "PartitionedCall" in op.type and len(parts) > 3:
            stage, micro_batch, kind = parts[0][5:], parts[1][2:], parts[2]
            for each in kind.split("_"):  # the last stage may turn: forward, loss and backward in one program
                found.setdefault(Action(int(stage), Kind[each.upper()], int(micro_batch)), op)
    return found


def comes_before(first, then):
    """Whether `then` waits for `first`."""
    seen, left = set(), deque([then])
    while left:
        op = left.popleft()
        if op is first:
            return True
        for before in [*op.control_inputs, *(t.op for t in op.inputs)]:
            if before.name not in seen:
                seen.add(before.name)
                left.append(before)
    return False


EXAMPLE = pathlib.Path(__file__).parent.parent.parent / "examples" / "03_own_schedule.py"
interleaved = runpy.run_path(str(EXAMPLE))["interleaved"]  # two stages on each device

STRATEGIES = {
    "1f1b": lambda: tfpar.PipelineStrategy(FOUR, micro_batches=4),
    "gpipe": lambda: tfpar.PipelineStrategy(FOUR, micro_batches=4, schedule="gpipe"),
    "two stages each": lambda: tfpar.PipelineStrategy(FOUR[:2], micro_batches=2, schedule=interleaved),
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_action_runs_on_its_device_in_its_order(name):
    strategy = STRATEGIES[name]()
    g, _ = graph(strategy)
    schedule = strategy.schedule(strategy.micro_batches)
    found = calls(g)
    assert set(found) == set(schedule.order)
    for d, line in enumerate(schedule.devices):
        assert {device(found[a]) for a in line} == {d}
        for before, after in zip(line[:-1], line[1:], strict=True):
            assert comes_before(found[before], found[after]), f"{after} does not wait for {before}"
            assert found[after] is found[before] or not comes_before(found[after], found[before])
    pairs = itertools.combinations(found.values(), 2)
    assert any(not comes_before(a, b) and not comes_before(b, a) for a, b in pairs if device(a) != device(b))


def test_an_action_waits_for_all_that_the_one_before_makes():
    """A control edge from a function's call would not: it is left with the function's side effects."""
    g, _ = graph(STRATEGIES["1f1b"]())
    for op in g.get_operations():
        waited = [c for c in op.control_inputs if "PartitionedCall" in c.type]
        assert not waited, f"{op.name} waits for the call {waited[0].name}"


def test_weights_and_updates_stay_on_their_devices():
    g, model = graph(STRATEGIES["1f1b"]())
    places = {}
    for n in range(4):
        for v in model.get_layer(f"layer_{n}").weights:
            places[id(v.value.handle)] = device(v.value)
    assert sorted(places.values()) == [0, 0, 1, 1, 2, 2, 3, 3]
    inside = {id(outer): inner for outer, inner in g.captures}
    for handle, d in places.items():
        uses = {device(op) for op in inside[handle].consumers() if op.type != "NoOp"}
        assert uses - {None} == {d}  # None: an assignment, which TensorFlow runs where the variable is


@pytest.mark.parametrize("call", ["train_on_batch", "test_on_batch", "predict_on_batch"])
def test_all_devices_work(call):
    g, _ = graph(STRATEGIES["1f1b"](), call=call)
    assert {device(op) for op in g.get_operations() if "PartitionedCall" in op.type} == {0, 1, 2, 3}


@pytest.mark.parametrize("name", STRATEGIES)
def test_memory_follows_the_plan(name):
    strategy = STRATEGIES[name]()
    model = compiled(strategy, build=build, optimizer="adam")
    assert {device(v.value) for v in model.weights} == {0}  # waits on the host
    history(X, Y, batch_size=8)(model)
    plan = strategy.explain(model)
    slots = {v.path: v for v in model.optimizer.variables}
    for n, variable in enumerate(plan.partition.graph.variables):
        (weight,) = (v for v in model.weights if v.path == variable.path)
        assert f"CPU:{device(weight.value)}" == plan.home(n)
        mine = [v for path, v in slots.items() if path.split("/")[1].startswith(variable.path.replace("/", "_"))]
        assert len(mine) == 2
        assert {device(v.value) for v in mine} == {device(weight.value)}
    for s in range(plan.partition.stages):
        assert plan.optimizer_bytes(s) == 2 * plan.parameter_bytes(s) > 0


def test_one_trace_for_all_sizes_of_batches():
    strategy = tfpar.PipelineStrategy(FOUR[:2], micro_batches=2)
    Spy.traces.clear()

    def build():
        x = layers.Input((X.shape[1],))
        return keras.Model(x, layers.Dense(3, activation="softmax")(Spy()(layers.Dense(4)(x))))

    model = compiled(strategy, build=build)
    x, y = data(45)
    batches = tf.data.Dataset.from_tensor_slices((x, y)).batch(8)
    model.fit(batches, epochs=3, verbose=0)
    known = len(Spy.traces)
    assert Spy.traces.count(True) == 1
    model.fit(batches, epochs=2, verbose=0)
    model.fit(tf.data.Dataset.from_tensor_slices((x, y)).batch(6), verbose=0)
    assert len(Spy.traces) == known


def test_weights_are_cast_once():
    """In mixed precision, for all micro-batches together; their gradients are added up in the dtype of the weights."""
    keras.config.set_dtype_policy("mixed_bfloat16")
    counts = []
    for micro_batches in (2, 4):
        g, model = graph(tfpar.PipelineStrategy(FOUR[:2], micro_batches=micro_batches))
        shapes = {tuple(w.shape) for w in model.weights}
        casts = [op for op in g.get_operations() if op.type == "Cast" and tuple(op.inputs[0].shape) in shapes]
        counts.append(sum(op.get_attr("DstT") == tf.bfloat16 for op in casts))
        back = sum(op.get_attr("DstT") == tf.float32 and "/mb" in op.name for op in casts)
        assert back == micro_batches * len(model.weights)
    assert counts == [len(model.weights)] * 2


def test_compiled_programs_keep_no_weights():
    """What goes forward would keep a copy for each micro-batch; the backward pass takes the weights themselves."""
    strategy = tfpar.PipelineStrategy(FOUR[:2], micro_batches=4)
    g, model = graph(strategy, jit_compile=True)
    forward = [op for action, op in calls(g).items() if action.kind is Kind.FORWARD and action.stage == 0]
    kept = [y for op in forward for y in op.outputs if y.consumers()]
    shapes = {tuple(w.shape) for w in model.weights}
    assert kept and not [y for y in kept if tuple(y.shape) in shapes]


def test_several_stages_on_a_device():
    check(STRATEGIES["two stages each"](), history(X, Y, batch_size=6, epochs=2), build=build)


def test_the_table_of_actions_is_total():
    assert set(RUN) == set(COLLECTIVE) == set(Kind)


def test_unknown_variables_name_themselves():
    seed = keras.random.SeedGenerator(1).state
    assert seed.path in str(UnknownVariables(3, [seed]))


# ---- planted bugs: each of them makes a comparison with one device fail


def dropped_accumulation(patch):
    original = Execution.backward

    def backward(self, s, m):
        self.gradients = {k: v for k, v in self.gradients.items() if k[0] != s}
        original(self, s, m)

    patch.setitem(RUN, Kind.BACKWARD, backward)


def lost_skip(patch):
    original = Execution.arrived
    patch.setattr(
        Execution, "arrived", lambda self, s, m: {k: c for k, c in original(self, s, m).items() if k.tensor != 2}
    )


def equal_shares(patch):
    original = Loss.__call__
    patch.setattr(Loss, "__call__", lambda self, p, y, s, t: original(self, p, y, s, t and [x * 0 + 8.0 for x in t]))


def clipped_before_the_sum(patch):
    original = executor.vjp

    def vjp(run, *args):
        result, pullback = original(run, *args)

        def clipped(*cotangents):
            variables, edges = pullback(*cotangents)
            return {v: tf.clip_by_norm(g, 0.01) for v, g in variables.items()}, edges

        return result, clipped

    patch.setattr(executor, "vjp", vjp)


def trained_with(bug):
    """A comparison with one device that needs sums over micro-batches, uneven shares and a skip connection."""

    def build():
        x = layers.Input((X.shape[1],))
        first = layers.Dense(6)(x)
        h = layers.Dense(6, activation="tanh")(layers.Dense(6)(first))
        return keras.Model(x, layers.Dense(3, activation="softmax")(layers.add([h, layers.Dense(6)(h), first])))

    with pytest.MonkeyPatch.context() as patch:
        bug(patch)
        strategy = tfpar.PipelineStrategy(FOUR[:3], micro_batches=3)
        optimizer = lambda: keras.optimizers.SGD(0.1, clipnorm=0.01)  # noqa: E731
        check(strategy, history(X[:7], Y[:7], batch_size=7), build=build, optimizer=optimizer)


@pytest.mark.parametrize("bug", [dropped_accumulation, lost_skip, equal_shares, clipped_before_the_sum])
def test_planted_bugs_are_caught(bug):
    with pytest.raises(AssertionError):
        trained_with(bug)


def test_without_a_bug_nothing_is_caught():
    trained_with(lambda patch: None)


def test_a_placement_on_one_device_is_caught():
    with pytest.MonkeyPatch.context() as patch, pytest.raises(AssertionError):
        patch.setattr(Execution, "device", lambda self, s, r=0: "CPU:0")
        test_every_action_runs_on_its_device_in_its_order("1f1b")


def test_a_schedule_that_is_ignored_is_caught():
    def started(self, action, at, values):
        return tf.nest.map_structure(lambda x: x, values)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(AssertionError, match="does not wait for"):
        patch.setattr(DeviceOrder, "started", started)
        test_every_action_runs_on_its_device_in_its_order("1f1b")


def test_schedules_differ_in_memory():
    assert one_f_one_b(4, 8).in_flight(0) == 4 < gpipe(4, 8).in_flight(0)


def test_steps_know_their_model():
    model = compiled(STRATEGIES["1f1b"]())
    assert hooks_of(model).model is model and hooks_of(build()) is None


@pytest.mark.fast
def test_what_a_layer_reads_of_its_state_has_no_gradient():
    """Though it has just assigned it from a weight."""

    class Average(layers.Layer):
        def build(self, shape):
            self.w = self.add_weight(shape=shape[1:], initializer="ones", name="w")
            self.average = self.add_weight(shape=shape[1:], initializer="ones", trainable=False, name="average")

        def call(self, x, training=None):
            if training:
                self.average.assign(0.9 * self.average + 0.1 * self.w)
            return x * self.w + self.average

    def build():
        x = layers.Input((6,))
        return keras.Model(x, layers.Dense(3, activation="softmax")(Average()(x)))

    x, y = data(16)
    check(tfpar.DataParallelStrategy(2), history(x, y, batch_size=8, epochs=2), build=build)
