"""Each private name of TensorFlow does what tfpar needs of it."""

import contextlib
import pathlib
import re

import numpy as np
import pytest
import tensorflow as tf

import tfpar
from tfpar.compat import _tf

pytestmark = pytest.mark.fast


def test_every_name_is_tested():
    mine = pathlib.Path(__file__).read_text()
    names = re.findall(r"^def (\w+)", pathlib.Path(_tf.__file__).read_text(), re.MULTILINE)
    assert [n for n in [*names, *_tf.__all__] if n not in mine] == []


def test_copied():
    """In another graph too; a gradient that the operation had in its place stays behind."""

    @tf.function(autograph=False)
    def one(x):
        return tf.raw_ops.MatMul(a=x, b=x, transpose_b=True)

    op = one.get_concrete_function(tf.TensorSpec((2, 3))).graph.get_operations()[1]
    assert op.type == "MatMul"
    op._set_attr("_gradient_op_type", tf.compat.v1.AttrValue(s=b"none"))

    @tf.function(autograph=False)
    def other(x):
        new = _tf.copied(op, [x, x])
        assert new.get_attr("transpose_b") and "_gradient_op_type" not in new.node_def.attr
        assert _tf.copied(op, [x, x], new.graph).graph is new.graph
        return new.outputs[0]

    x = tf.constant([[1.0, 2.0, 3.0], [0.0, 1.0, 0.0]])
    assert np.array_equal(other(x), x @ tf.transpose(x))


def test_copied_for_tapes():
    @tf.function
    def power(x):
        return tf.einsum("ij,kj->ik", x, x)

    (op,) = [o for o in power.get_concrete_function(tf.TensorSpec([2, 3])).graph.get_operations() if o.type == "Einsum"]

    @tf.function
    def gradient(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            (y,) = _tf.copied_for_tapes(op, [x, x])
        return tape.gradient(y, x)

    np.testing.assert_allclose(gradient(tf.ones([2, 3])), np.full((2, 3), 4.0))


def test_has_own_gradient():
    @tf.function
    def run(x):
        return tf.nn.silu(x) + tf.exp(x)

    found = {_tf.has_own_gradient(op) for op in run.get_concrete_function(tf.TensorSpec([2])).graph.get_operations()}
    assert found == {True, False}


@pytest.mark.parametrize("calls", [True, False])
def test_loops_of_functions(calls):
    @tf.function
    def run(x):
        with _tf.loops_of_functions() if calls else contextlib.nullcontext():
            return tf.while_loop(lambda x: x < 9, lambda x: (x + 1,), (x,))[0]

    (loop,) = [o for o in run.get_concrete_function(1).graph.get_operations() if "While" in o.type]
    assert ("_lower_using_switch_merge" in loop.node_def.attr) is not calls
    assert int(run(1)) == 9


def test_classes():
    """The strategy is built on them."""
    strategy = tfpar.LayerPlacementStrategy(["CPU:0"])
    assert isinstance(strategy.extended, _tf.MirroredExtended)
    with strategy.scope():
        variable = tf.Variable(1.0)
    assert isinstance(variable, _tf.MirroredVariable) and isinstance(variable.values[0], _tf.ResourceVariable)
    seen = strategy.run(tf.distribute.get_replica_context)
    assert isinstance(seen, _tf.LogicalReplica)


def test_logical_replica():
    strategy = tfpar.DataParallelStrategy(["CPU:0", "CPU:1"])
    with strategy.scope():
        variable = tf.Variable(1.0)
    with strategy.scope(), _tf.LogicalReplica(strategy, 1):
        assert _tf.replica_of(strategy).copy == 1 and strategy.num_replicas_in_sync == 1
        variable.assign(2.0)
        assert float(variable) == 2.0
    assert [float(copy) for copy in variable.copies] == [1.0, 2.0] and strategy.num_replicas_in_sync == 2
    assert _tf.replica_of(strategy) is None
    with strategy.scope(), _tf.LogicalReplica(strategy):
        variable.assign(3.0)
    assert [float(copy) for copy in variable.copies] == [3.0, 3.0]
    other = tf.Variable(5.0)
    with strategy.scope(), _tf.LogicalReplica(strategy, 0, {id(variable): other}):
        variable.assign_add(1.0)
    assert float(other) == 6.0 and float(variable) == 3.0


def test_updates_of_copies():
    strategy = tfpar.DataParallelStrategy(["CPU:0", "CPU:1"])
    with strategy.scope():
        variable = tf.Variable(0.0)
    make = strategy.experimental_distribute_values_from_function
    values = make(lambda context: tf.constant(1.0 + context.replica_id_in_sync_group))
    assert isinstance(values, _tf.PerReplica) and float(_tf.select_replica(1, values)) == 2.0
    result = strategy.extended.update(variable, lambda copy, value: copy.assign(value), args=(values,))
    assert [float(copy) for copy in variable.copies] == [1.0, 2.0]
    assert result is not None and _tf.update_regroup is not None


def test_batch_reduce():
    parts = []
    for n in range(2):
        with tf.device(f"CPU:{n}"):
            parts.append(tf.constant([1.0 + n]))
    (total,) = _tf.batch_reduce(tf.distribute.ReductionToOneDevice(), [parts])
    assert [t.numpy().tolist() for t in total] == [[3.0], [3.0]]
    assert [tf.DeviceSpec.from_string(t.device).device_index for t in total] == [0, 1]


def test_sums_that_are_not_used_are_computed():
    """NCCL waits for all devices, and TensorFlow leaves out its operations where nobody asks for the result."""
    made = []

    @tf.function
    def first(parts):
        (total,) = _tf.batch_reduce(tf.distribute.ReductionToOneDevice(), [parts])
        made.extend(total)
        return total[0]

    graph = first.get_concrete_function([tf.constant([1.0]), tf.constant([2.0])]).graph
    assert {x.op.name for x in made} <= {op.name for op in graph.control_outputs}


def test_outside_replica():
    strategy = tfpar.LayerPlacementStrategy(["CPU:0"])

    def step():
        assert not tf.distribute.in_cross_replica_context()
        with _tf.outside_replica(strategy):
            assert tf.distribute.in_cross_replica_context()
        assert not tf.distribute.in_cross_replica_context()

    strategy.run(step)


def device(tensor):
    return tf.DeviceSpec.from_string(tensor.op.device).device_index


def test_following_inputs():
    @tf.function
    def function(x, y):
        with tf.device("CPU:1"):
            large = tf.ones((8, 8)) + x
        with tf.device("CPU:2"):
            small = tf.ones(()) * y
        with _tf.following_inputs():
            product = large * small
            with tf.device("CPU:3"):
                told = large * small
            nothing = tf.constant(1.0)
            branch = tf.cond(y > 0, lambda: large + 1.0, lambda: large)
            inner = next(
                op for op in tf.compat.v1.get_default_graph().get_operations() if op.type in ("If", "StatelessIf")
            )
        assert device(product) == 1 and device(told) == 3 and not nothing.op.device
        assert _tf.device_of(product) == product.op.device
        assert _tf.largest_input_device(product.op) == product.op.device
        assert _tf.elements_of(small) < _tf.elements_of(large)
        assert device(inner.outputs[0]) == 1
        return product, branch

    function(tf.constant(1.0), tf.constant(2.0))
    with _tf.following_inputs():
        assert float(tf.constant(1.0) + 1.0) == 2.0


def test_size_of_an_open_shape():
    sizes = []

    @tf.function(input_signature=[tf.TensorSpec([None, 3])])
    def function(x):
        sizes.append(_tf.elements_of(x))

    function(np.zeros((2, 3), "float32"))
    assert sizes[0] > 2**60


@pytest.mark.parametrize("wrap", [tf.function, lambda f: f], ids=["graph", "eager"])
def test_record_gradient(wrap):
    @wrap
    def function(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            (y,) = _tf.record_gradient([tf.constant(5.0)], [x], lambda dy: [3.0 * dy])
            z = 2.0 * y
        return y, tape.gradient(z, x)

    assert [float(v) for v in function(tf.constant(1.0))] == [5.0, 6.0]


def test_tape_watches_and_unrecorded():
    x = tf.constant(1.0)
    assert not _tf.tape_watches([x])
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(x)
        assert _tf.tape_watches([x])
        y = _tf.unrecorded(lambda: 2.0 * x)
        assert not _tf.tape_watches([y])
        z = y * x
    assert float(tape.gradient(z, x)) == 2.0 and tape.gradient(y, x) is None


def test_independent():
    """Two programs with random operations wait for each other unless they are freed."""

    @tf.function
    def inner():
        return tf.random.uniform((2,))

    def waits(free):
        @tf.function
        def function():
            results = [inner(), inner()]
            if free:
                _tf.independent(results)
            return results

        operations = function.get_concrete_function().graph.get_operations()
        return any(op.control_inputs for op in operations if "PartitionedCall" in op.type)

    assert waits(False) and not waits(True)
    _tf.independent([tf.constant(1.0)])


def test_awaited():
    """An identity for what a function returns, nothing for other tensors."""

    @tf.function
    def inner(x):
        return x + 1.0

    kinds = []

    @tf.function
    def function(x):
        y = inner(x)
        kinds.append((_tf.awaited(y).op.type, _tf.awaited(x + y).op.type))
        return y

    function(tf.constant(1.0))
    assert kinds == [("Identity", "AddV2")]
    x = tf.constant(1.0)
    assert _tf.awaited(x) is x


def test_unfolded():
    """The same number, from an operation that is no constant."""
    numbers = []

    @tf.function
    def function():
        numbers.append(_tf.unfolded(tf.constant(2.0)))
        return numbers[0] + 1.0

    assert function() == 3.0 and numbers[0].op.type == "PlaceholderWithDefault" and numbers[0].shape == ()
    x = tf.constant(1.0)
    assert _tf.unfolded(x) is x


def test_in_xla():
    seen = []
    for jit in (False, True):
        tf.function(lambda x: seen.append(_tf.in_xla()) or x, jit_compile=jit)(tf.constant(1.0))
    assert seen == [False, True] and not _tf.in_xla()


def test_recorded():
    x = tf.constant(2.0)
    with tf.GradientTape() as tape:
        tape.watch(x)
        with tape.stop_recording():
            values = [tf.identity(x), tf.identity(x)]
        first, _ = _tf.recorded(values, [x], lambda *found: [sum((n + 1.0) * g for n, g in enumerate(found))])
        y = first * 5.0
    assert float(tape.gradient(y, x)) == 5.0  # of the other, which is not used, it is given zero


def test_without_device():
    @tf.function
    def function(x):
        with tf.device("CPU:1"), _tf.following_inputs():
            with _tf.without_device():
                free = x + 1.0
            return free, x * 2.0

    free, placed = function.get_concrete_function(tf.constant(1.0)).outputs
    ops = {op.type: op.device for op in free.graph.get_operations()}
    assert placed is not None and not ops["AddV2"] and "CPU:1" in ops["Mul"]


def test_owned_multi_device_iterator():
    """Elements go to the devices in turn, and it tells when there are no more."""
    dataset = tf.data.Dataset.range(4)
    iterator = _tf.OwnedMultiDeviceIterator(dataset=dataset, devices=["CPU:0", "CPU:1"], source_device="CPU:0")
    assert [[int(x) for x in iterator.get_next()] for _ in range(2)] == [[0, 1], [2, 3]]
    with pytest.raises(tf.errors.OutOfRangeError):
        iterator.get_next()


def traced(function, *examples):
    return tf.function(function, autograph=False).get_concrete_function(*examples)


def test_fingerprint_tells_functions_apart_by_what_they_compute():
    """`renamed` makes the names of nodes not matter; `call_flat` calls one in the place of another."""
    x = tf.TensorSpec((3,), tf.float32)
    one = traced(lambda a, b: {"sum": tf.add(a, b, name="one"), "none": None}, x, x)
    same = traced(lambda a, b: {"sum": tf.add(a, b, name="other"), "none": None}, x, x)
    others = [
        traced(lambda a, b: a - b, x, x), traced(lambda a, b: b + a, x, x), traced(lambda a, b: a + b + 1.0, x, x),
        traced(lambda a, b: a + b, tf.TensorSpec((4,)), tf.TensorSpec((4,))),
    ]  # fmt: skip
    mark = _tf.fingerprint(one)
    assert mark == _tf.fingerprint(same)
    assert mark not in [_tf.fingerprint(f) for f in others]
    assert len({_tf.fingerprint(f) for f in others}) == len(others)
    (found,) = _tf.call_flat(one, [tf.ones(3), tf.ones(3)])
    assert found.numpy().tolist() == [2.0] * 3
    assert _tf.renamed("^a", {"a": "7"}) == "^7:0"
    assert _tf.renamed("a:1", {"a": "7"}) == "7:1"


def test_fingerprint_of_what_the_graph_does_not_tell():
    x, variable = tf.TensorSpec((3,), tf.float32), tf.Variable(tf.ones(3))

    def reversal(scale):
        @tf.custom_gradient
        def call(a):
            return tf.identity(a), lambda g: scale * g

        return call

    inner = tf.function(lambda a: a * 2)
    for function in (lambda a: a + variable, reversal(-1.0), lambda a: inner(a)):
        assert _tf.fingerprint(traced(function, x)) is None


def test_saveable():
    """A checkpoint holds what `read` gives, and hands it to `assign`."""
    seen = []

    class Whole(tf.__internal__.tracking.Trackable):
        def _gather_saveables_for_checkpoint(self):
            return _tf.saveable(lambda: tf.constant([1.0, 2.0]), seen.append, tf.float32, "whole")

    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = tf.train.Checkpoint(whole=Whole()).write(f"{folder}/file")
        tf.train.Checkpoint(whole=Whole()).read(path)
    assert [v.numpy().tolist() for v in seen] == [[1.0, 2.0]]


@pytest.mark.parametrize("compiled", [False, True])
def test_recompute_inputs(compiled):
    """The backward pass uses what it gets again, also where the function kept something made of that alone."""

    @tf.function(jit_compile=compiled)
    def function(w, x):
        return tf.tanh(tf.matmul(x, tf.transpose(tf.cast(w, "float64"))))

    w, x = tf.constant([[1.0, 2.0], [3.0, 4.0]]), tf.constant([[0.1, 0.2]], "float64")
    traced = function.get_concrete_function(w, x)

    def gradients(again):
        @tf.function
        def outer(w, x):
            with tf.GradientTape() as tape:
                tape.watch([w, x])
                y = _tf.call_flat(traced, [w, x])[0]
            known = len(y.op.outputs)
            found = tape.gradient(y, [w, x])
            kept = [z for z in y.op.outputs[known:] if z.consumers()]
            if again:
                _tf.recompute_inputs(y.op, traced, known, [lambda: 2.0 * w])
                assert len([z for z in y.op.outputs[known:] if z.consumers()]) < len(kept)
            return found

        return outer(w, x)

    (dw, dx), (dw_again, dx_again) = gradients(False), gradients(True)
    np.testing.assert_allclose(dw_again, dw)
    np.testing.assert_allclose(dx_again, 2.0 * dx)


def test_takes_again():
    """Operations from a place on use another tensor, also where they use what follows from it alone."""

    @tf.function(autograph=False)
    def found(w, x, other):
        first, again = tf.identity(w), tf.identity(other)
        with tf.GradientTape() as tape, _tf.operations_made() as forward:
            tape.watch(x)
            y = tf.matmul(x, tf.transpose(first * tf.constant(2.0)))
        with _tf.operations_made() as back:
            gradient = tape.gradient(y, x)
        _tf.recompute_values(back, forward, [(first, again)])
        return y, gradient

    w, x = tf.constant([[1.0, 2.0], [3.0, 4.0]]), tf.constant([[0.1, 0.2]])
    y, gradient = found(w, x, 10.0 * w)
    np.testing.assert_allclose(y, 2.0 * x @ tf.transpose(w), rtol=1e-6)
    np.testing.assert_allclose(gradient, 20.0 * tf.ones_like(y) @ w, rtol=1e-6)


def test_number_of():
    strategy = tfpar.DataParallelStrategy(["CPU:0", "CPU:1"])
    assert _tf.number_of(_tf.LogicalReplica(strategy, 1)) == 1


def test_containers():
    variable, other = tf.Variable(1.0), tf.Variable(2.0)
    _tf.set_container(variable, other)
    assert variable.handle._distributed_container() is other


def test_empty_variable():
    with tf.device("CPU:1"):
        variable = _tf.empty_variable((2, 3), "float32", True, "layer_10")
    assert variable.name == "layer_10:0" and variable.shape == (2, 3) and not variable.is_initialized()
    variable.assign(tf.ones((2, 3)))
    assert variable.device.endswith("CPU:1") and np.array_equal(variable, np.ones((2, 3)))


def test_rows_that_no_sample_chose():
    """Of learned positions, whose length may be that of the input; of tokens, they are chosen by samples."""
    table, found = tf.Variable(tf.ones((5, 2))), []

    @tf.function(autograph=False)
    def rows(tokens, own):
        with tf.GradientTape() as tape:
            y = tf.gather(table, tokens if own else tf.range(tf.shape(tokens)[1]))
        found.append(_tf.has_shared_rows(tape.gradient(y, table)))

    for own in (False, True):
        rows(tf.constant([[1, 2]]), own)
    assert found == [True, False]
    eager = tf.IndexedSlices(tf.ones((1, 2)), tf.constant([0]))
    assert not _tf.has_shared_rows(eager)  # no operation tells where its rows come from


def test_is_inner_size():
    with tf.Graph().as_default():
        shape = tf.shape(tf.compat.v1.placeholder(tf.float32, (None, None)))
        assert _tf.is_inner_size(shape[1].op) and not _tf.is_inner_size(shape[0].op)
