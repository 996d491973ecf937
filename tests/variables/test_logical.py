"""One variable to everybody, wherever its value is."""

import copy

import keras
import numpy as np
import pytest
import tensorflow as tf
from training import WIDTH, build, compiled, data, history

import tfpar
from tfpar.variables.logical import LogicalVariable, follower_bytes

pytestmark = pytest.mark.fast


@pytest.fixture
def variable(strategy):
    with strategy.scope():
        return keras.Variable([1.0, 2.0], name="v")


def test_it_is_a_variable_of_mirrored_strategy(variable, strategy):
    from tensorflow.python.distribute.values import MirroredVariable

    assert isinstance(variable.value, LogicalVariable) and isinstance(variable.value, MirroredVariable)
    assert isinstance(strategy, tf.distribute.MirroredStrategy)
    assert strategy.num_replicas_in_sync == 1
    assert strategy.experimental_local_results(variable.value)[0] is variable.value


def test_reading_and_writing_need_no_scope(variable, strategy):
    value = variable.value
    value.assign([3.0, 4.0])
    value.assign_add([1.0, 1.0])
    variable.assign_sub([0.5, 0.5])
    assert np.array_equal(value, [3.5, 4.5]) and np.array_equal(value + 1.0, [4.5, 5.5])
    with strategy.scope():
        value.assign([7.0, 8.0])
    strategy.run(lambda: value.assign_add([1.0, 1.0]))
    assert np.array_equal(tf.function(lambda: value * 2.0)(), [16.0, 18.0])
    with strategy.scope():
        scalar = keras.Variable(3, dtype="int32")
    assert int(scalar) == 3 and float(scalar.value) == 3.0 and bool(scalar.value) and complex(scalar.value) == 3


def test_placing_moves_the_value_and_keeps_the_identity(variable, strategy):
    value, key = variable.value, variable.value._unique_id
    with strategy.scope(), strategy.extended.colocate_vars_with(value):
        slot = keras.Variable([5.0, 6.0, 7.0])
    assert value.device.endswith("CPU:0") and follower_bytes(value) == 12
    value.assign([3.0, 4.0])
    value.place(["CPU:3"])
    assert value.device.endswith("CPU:3") and slot.value.device.endswith("CPU:3")
    assert value._unique_id == key and variable.value is value
    assert np.array_equal(value, [3.0, 4.0]) and np.array_equal(slot.value, [5.0, 6.0, 7.0])
    before = value.handle
    value.place(["CPU:3"])
    assert value.handle is before  # it is there already


def test_a_slot_begins_where_its_variable_is(variable, strategy):
    variable.value.place(["CPU:2"])
    with strategy.extended.colocate_vars_with(variable.value):  # as an optimizer does, without a scope
        slot = keras.Variable([0.0])
    assert slot.value.device.endswith("CPU:2")


def test_gradients(variable):
    variable.value.place(["CPU:1"])
    with tf.GradientTape() as tape:
        y = tf.reduce_sum(variable.value**2)
    assert np.array_equal(tape.gradient(y, variable.value), [2.0, 4.0])


def test_checkpoints(variable, tmp_path):
    path = tf.train.Checkpoint(v=variable.value).write(str(tmp_path / "v"))
    variable.value.place(["CPU:1"])
    variable.assign([0.0, 0.0])
    tf.train.Checkpoint(v=variable.value).read(path).assert_consumed()
    assert np.array_equal(variable.value, [1.0, 2.0]) and variable.value.device.endswith("CPU:1")


def test_models_can_be_copied(strategy):
    model = compiled(strategy)
    history(*data())(model)
    with strategy.scope():
        clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    assert all(np.array_equal(a, b) for a, b in zip(model.get_weights(), clone.get_weights(), strict=True))
    assert copy.copy(model.get_config()) == model.get_config()


def test_nothing_is_created_on_an_accelerator_before_the_plan():
    strategy = tfpar.PipelineStrategy(["CPU:4", "CPU:5"])
    with strategy.scope():
        model = build()
    assert all(v.value.device.endswith("CPU:0") for v in model.weights)
    model.predict(np.zeros((4, WIDTH), "float32"), verbose=0)
    assert {v.value.device[-5:] for v in model.weights} == {"CPU:4", "CPU:5"}


def test_custom_loops(strategy):
    """`strategy.run`, `reduce`, `gather` and distributed datasets, as with MirroredStrategy."""
    with strategy.scope():
        v = tf.Variable(1.0)
        metric = keras.metrics.Mean()
    dataset = strategy.experimental_distribute_dataset(tf.data.Dataset.range(6).batch(3))

    def step(x):
        context = tf.distribute.get_replica_context()
        v.assign_add(tf.cast(tf.reduce_sum(x), "float32"))
        metric.update_state(x)
        return context.all_reduce("sum", tf.cast(x, "float32"))

    results = [strategy.run(step, args=(x,)) for x in dataset]
    assert float(v) == 16.0 and float(metric.result()) == 2.5
    assert float(strategy.reduce("sum", results[0], axis=None)[2]) == 2.0
    assert float(strategy.reduce("mean", results[1], axis=0)) == 4.0
    assert np.array_equal(strategy.gather(results[1], axis=0), [3.0, 4.0, 5.0])
    function = tf.function(lambda x: strategy.run(step, args=(x,)))
    assert np.array_equal(function(tf.constant([1, 2, 3])), [1.0, 2.0, 3.0])
