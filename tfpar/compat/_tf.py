"""Private names of TensorFlow, but for those of XLA. Checked against 2.21.0; `tests/compat/test_tf.py` tests each."""

import contextlib
import hashlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tensorflow as tf
from tensorflow.python.data.ops.multi_device_iterator_ops import OwnedMultiDeviceIterator
from tensorflow.python.distribute import distribute_lib
from tensorflow.python.distribute.distribute_lib import ReplicaContext
from tensorflow.python.distribute.distribute_utils import select_replica, update_regroup
from tensorflow.python.distribute.mirrored_strategy import MirroredExtended
from tensorflow.python.distribute.values import MirroredVariable, PerReplica
from tensorflow.python.eager import execute, record
from tensorflow.python.framework import ops
from tensorflow.python.ops import control_flow_util_v2
from tensorflow.python.ops.control_flow_util import GraphOrParentsInXlaContext
from tensorflow.python.ops.handle_data_util import get_handle_data
from tensorflow.python.ops.resource_variable_ops import ResourceVariable, UninitializedVariable
from tensorflow.python.trackable.base import VARIABLE_VALUE_KEY
from tensorflow.python.training.saving.saveable_object import SaveableObject, SaveSpec

__all__ = [
    "LogicalReplica", "MirroredExtended", "MirroredVariable", "OwnedMultiDeviceIterator", "PerReplica",
    "ResourceVariable", "awaited", "batch_reduce", "call_flat", "copied", "copied_for_tapes", "empty_variable",
    "fingerprint", "following_inputs", "has_own_gradient", "has_shared_rows", "in_xla", "independent",
    "loops_of_functions", "number_of", "outside_replica", "recompute_inputs", "record_gradient", "recorded",
    "replica_of", "saveable", "select_replica", "set_container", "tape_watches", "unfolded", "unrecorded",
    "update_regroup", "without_device",
]  # fmt: skip


class LogicalReplica(ReplicaContext):
    """A replica that needs no others: in it, the strategy has this one only and reduces nothing.

    Args:
        strategy: whose.
        copy: the copy of each variable that is read and written; `None` for all replicas taken as one, which reads the
            first and writes all.
        bound: by `id` of a distributed variable, what to use in its place.
    """

    def __init__(self, strategy: tf.distribute.Strategy, copy: int | None = None, bound: dict[int, Any] | None = None):
        super().__init__(strategy, replica_id_in_sync_group=copy or 0)
        self.copy, self.bound = copy, bound or {}

    def all_reduce(self, reduce_op: Any, value: Any, options: Any = None) -> Any:
        """The value: there is nothing to reduce. TensorFlow's own keeps the graph for as long as the process runs."""
        return value


def replica_of(strategy: tf.distribute.Strategy) -> ReplicaContext | None:
    """The replica of this strategy that is being run, if one is."""
    context = tf.distribute.get_replica_context()
    return context if context is not None and context.strategy is strategy else None


def number_of(replica: ReplicaContext) -> int:
    """Which replica this is."""
    return replica._replica_id


@contextlib.contextmanager
def outside_replica(strategy: tf.distribute.Strategy) -> Iterator[None]:
    """Inside a replica of `strategy`, the context of its scope again, in which variables are created."""
    distribute_lib._push_per_thread_mode(distribute_lib._CrossReplicaThreadMode(strategy))
    try:
        yield
    finally:
        distribute_lib._pop_per_thread_mode()


@contextlib.contextmanager
def following_inputs() -> Iterator[None]:
    """Inside a tf.function, an operation without a device goes to the device of its largest input.

    `tf.device` takes no functions in TensorFlow 2; `ops.device` of a graph does. Without it, Keras' clipping would pull
    every gradient to the first device.
    """
    if tf.executing_eagerly():
        yield
    else:
        with ops.device(largest_input_device):
            yield


def largest_input_device(op: tf.Operation) -> str:
    """The device of the largest input that has one; `op`'s own where it has one."""
    if op.device:
        return op.device
    placed = [(elements_of(t), device) for t in op.inputs if (device := device_of(t))]
    return max(placed, key=lambda p: p[0])[1] if placed else ""


def elements_of(tensor: tf.Tensor) -> int:
    """The number of elements, taking an unknown one for a large one."""
    elements = tensor.shape.num_elements()
    return 1 << 62 if elements is None else elements


def device_of(tensor: tf.Tensor) -> str:
    """The device of a symbolic tensor; for what a branch of `tf.cond` captures, that of the tensor outside."""
    if tf.executing_eagerly() or not hasattr(tensor, "op"):
        return getattr(tensor, "device", "") or ""
    if tensor.op.type == "Placeholder" and not tensor.op.device:
        outside = next((o for o, inside in getattr(tensor.graph, "captures", ()) if inside is tensor), None)
        return device_of(outside) if outside is not None else ""
    return tensor.op.device


def record_gradient(
    outputs: Sequence[tf.Tensor], inputs: Sequence[tf.Tensor], backward: Callable[..., Sequence[tf.Tensor | None]]
) -> list[tf.Tensor]:
    """Copies of `outputs` whose gradient, on every tape that watches `inputs`, is what `backward` makes of theirs.

    Unlike `tf.custom_gradient` it adds no operations that could end up on another device.
    """
    with record.stop_recording():
        copies = [tf.identity(y) for y in outputs]
    return recorded(copies, inputs, backward)


def recorded(outputs: Sequence[tf.Tensor], inputs: Sequence[tf.Tensor], backward: Callable) -> list[tf.Tensor]:
    """The same for tensors that no tape has seen; a tape gives `backward` zeros for those that nothing depends on."""
    record.record_operation("tfpar", list(outputs), list(inputs), backward)
    return list(outputs)


def independent(tensors: Sequence[tf.Tensor]):
    """Free the operations that make these tensors from the order in which a tf.function runs stateful operations.

    Random numbers and checks make a program stateful; without this, no two of them would run at the same time.
    """
    for tensor in tensors:
        if not tf.executing_eagerly() and hasattr(tensor, "op") and tensor.op.op_def.is_stateful:
            tensor.graph.experimental_acd_manager.run_independently(tensor.op)


def unfolded(number: tf.Tensor) -> tf.Tensor:
    """A number that TensorFlow's optimiser does not know.

    It copies each function into which it can write a constant, and optimises the copy: one for each micro-batch.
    """
    return number if tf.executing_eagerly() else tf.raw_ops.PlaceholderWithDefault(input=number, shape=number.shape)


def awaited(tensor: tf.Tensor) -> tf.Tensor:
    """The tensor, from an operation for which a control edge waits.

    It does not for the outputs of a function call: when TensorFlow inlines the function, the edge is left with its
    side effects.
    """
    called = not tf.executing_eagerly() and tensor.op.type in ("PartitionedCall", "StatefulPartitionedCall")
    return tf.identity(tensor) if called else tensor


def unrecorded(read: Callable[[], tf.Tensor]) -> tf.Tensor:
    """What `read` returns, as a tensor that no tape watches: what becomes of it is not recorded."""
    with record.stop_recording():
        return tf.identity(read())


def tape_watches(tensors: Sequence[tf.Tensor]) -> bool:
    """Whether a gradient tape is recording what happens to any of `tensors`."""
    return bool(record.should_record_backprop(list(tensors)))


def batch_reduce(ops: tf.distribute.CrossDeviceOps, values: Sequence[Sequence[Any]]) -> list[list[Any]]:
    """The sums over replicas of several values, each on the devices of its parts, by `tf.distribute`'s own means.

    All of them are computed, used or not: NCCL waits for every device, and TensorFlow would leave out what is not used.
    """
    pairs = [(per_replica, per_replica) for per_replica in map(PerReplica, map(tuple, values))]
    totals = [list(total.values) for total in ops.batch_reduce(tf.distribute.ReduceOp.SUM, pairs)]
    if not tf.executing_eagerly():
        tf.compat.v1.get_default_graph().control_outputs.extend(x.op for total in totals for x in total)
    return totals


def in_xla() -> bool:
    """Whether a function that is to be compiled is being traced: there are no other devices in it."""
    return not tf.executing_eagerly() and bool(GraphOrParentsInXlaContext(ops.get_default_graph()))


def without_device() -> contextlib.AbstractContextManager:
    """Inside, no `tf.device` counts: a function that is traced there belongs to none."""
    return ops.colocate_with(None, ignore_existing=True)


def saveable(read: Callable, assign: Callable, dtype: tf.DType, name: str) -> dict[str, Callable]:
    """What a variable tells a checkpoint of its value, where that is more than one `tf.Variable`."""

    class Whole(SaveableObject):
        def __init__(self, name):
            super().__init__(read, [SaveSpec(read, "", name, dtype=dtype, device="CPU:0")], name)

        def restore(self, restored_tensors, restored_shapes):
            return assign(restored_tensors[0])

    return {VARIABLE_VALUE_KEY: lambda name=name: Whole(name)}


def fingerprint(function: Any) -> str | None:
    """What a traced function computes, whatever its operations are called; `None` where the graph does not tell.

    It does not where the function has captured variables, calls others, or has a gradient that is written in Python.
    """
    if function.captured_inputs:
        return None
    nodes = function.graph.as_graph_def().node
    names = {node.name: str(n) for n, node in enumerate(nodes)}
    digest = hashlib.sha256()
    for node in nodes:
        if "_gradient_op_type" in node.attr or any(a.HasField("func") or a.list.func for a in node.attr.values()):
            return None
        inputs = [renamed(name, names) for name in node.input]
        attributes = sorted((k, v.SerializeToString(deterministic=True)) for k, v in node.attr.items() if k[0] != "_")
        digest.update(repr((node.op, node.device, inputs, attributes)).encode())
    ends = [(names[x.op.name], x.value_index) for x in (*function.inputs, *function.outputs)]
    variables = [str(get_handle_data(x)) for x in function.inputs if x.dtype == tf.resource]
    digest.update(repr((len(function.inputs), ends, variables)).encode())
    return digest.hexdigest()


def renamed(name: str, names: dict[str, str]) -> str:
    """An input of a node with the number of the node in place of its name."""
    before, _, output = name.lstrip("^").partition(":")
    return f"{'^' if name[0] == '^' else ''}{names[before]}:{output or 0}"


NOT_COPIED = {"_noinline": True}  # attributes of a function that TensorFlow leaves one function


def recompute_inputs(call: tf.Operation, function: Any, known: int, inputs: Sequence[Callable[[], tf.Tensor] | None]):
    """Let the backward pass of a function compute anew what depends on some inputs only: nothing holds on to those.

    Args:
        call: of the function, its gradient taken.
        function: what it calls, traced.
        known: the outputs that the call had before its gradient was taken; those since are kept for the backward pass.
        inputs: for each of the first inputs, what gives it again.
    """
    given = {x.name: make for x, make in zip(function.graph.inputs, inputs, strict=False) if make is not None}
    anew = Anew(function.graph.get_operations(), given, call.graph)
    for output, inside in zip(call.outputs[known:], function.graph.outputs[known:], strict=False):
        for user in output.consumers() if inside.op.type != "Const" and anew.follows(inside) is not None else ():
            for index, taken in enumerate(user.inputs):
                if taken is output:
                    user._update_input(index, anew(inside))


@contextlib.contextmanager
def operations_made() -> Iterator[list[tf.Operation]]:
    """Gives a list that afterwards has the operations that were made inside, in the present graph."""
    graph, found = ops.get_default_graph(), []
    before = len(graph.get_operations())
    yield found
    found += graph.get_operations()[before:]


def recompute_values(
    operations: Sequence[tf.Operation], made: Sequence[tf.Operation], given: Sequence[tuple[tf.Tensor, tf.Tensor]]
):
    """Let operations of the present graph take tensors in place of others, and of what follows from those alone.

    Args:
        operations: these.
        made: others before them, in their order, of which the results may be made anew.
        given: tensors, and what takes the place of each.
    """
    anew = Anew(made, {x.name: lambda y=y: y for x, y in given}, ops.get_default_graph())
    for op in operations:
        for index, taken in enumerate(op.inputs):
            if anew.follows(taken):
                op._update_input(index, anew(taken))


class Anew:
    """Makes tensors anew that follow from some alone.

    Args:
        operations: that may be repeated, in their order.
        sources: of these tensors, by their names, what gives them again.
        graph: where.
    """

    def __init__(self, operations: Sequence[tf.Operation], sources: dict[str, Callable], graph: tf.Graph):
        self.sources, self.graph = sources, graph
        self.known: dict[str, bool | None] = {}
        self.made: dict[str, tf.Operation] = {}
        for op in operations:
            plain = op.inputs and not op.control_inputs and not op.op_def.is_stateful and "Call" not in op.type
            of = [self.follows(x) for x in op.inputs] if plain else []
            self.known[op.name] = False if op.type == "Const" else None if not of or None in of else any(of)

    def follows(self, x: tf.Tensor) -> bool | None:
        """Whether a tensor follows from sources, or else from constants only; `None` if from anything else."""
        return x.name in self.sources or self.known.get(x.op.name)

    def __call__(self, x: tf.Tensor) -> tf.Tensor:
        if x.name in self.sources:
            return self.sources[x.name]()
        if x.op.name not in self.made:
            self.made[x.op.name] = copied(x.op, [self(y) for y in x.op.inputs], self.graph)
        return self.made[x.op.name].outputs[x.value_index]


def copied(op: tf.Operation, inputs: list[tf.Tensor], graph: tf.Graph | None = None) -> tf.Operation:
    """The same operation on other inputs, in the present graph if not told; its gradient is that of its type."""
    dtypes, attributes = [y.dtype for y in op.outputs], {k: v for k, v in op.node_def.attr.items() if k[0] != "_"}
    graph = graph or ops.get_default_graph()
    return graph._create_op_internal(op.type, inputs, dtypes, attrs=attributes, op_def=op.op_def)


def copied_for_tapes(op: tf.Operation, inputs: list[tf.Tensor]) -> list[tf.Tensor]:
    """The results of the same operation on other inputs, in the present graph; tapes record it."""
    copy = copied(op, inputs)
    if execute.must_record_gradient():
        names = [a.name for a in op.op_def.attr if a.type != "func"]
        attributes = tuple(x for name in names for x in (name, op.get_attr(name)))
        execute.record_gradient(op.type, copy.inputs, attributes, copy.outputs)
    return list(copy.outputs)


def has_own_gradient(op: tf.Operation) -> bool:
    """Whether an operation has another gradient than its type, which `copied` would not have."""
    return "_gradient_op_type" in op.node_def.attr


@contextlib.contextmanager
def loops_of_functions() -> Iterator[None]:
    """Inside, loops are traced as calls of functions, in which collectives meet those of other devices."""
    before = control_flow_util_v2._DISABLE_LOWER_USING_SWITCH_MERGE
    control_flow_util_v2._DISABLE_LOWER_USING_SWITCH_MERGE = True
    try:
        yield
    finally:
        control_flow_util_v2._DISABLE_LOWER_USING_SWITCH_MERGE = before


def call_flat(function: Any, tensors: Sequence[Any]) -> list[tf.Tensor]:
    """The flat results of a traced function for flat arguments, variables among them."""
    given = [x.handle if isinstance(x, tf.Variable) else x for x in tensors]
    found = tf.nest.flatten(function._call_flat(given, function.captured_inputs), expand_composites=True)
    return [x for x in found if x is not None]


def empty_variable(shape: Sequence[int], dtype: Any, trainable: bool, name: str) -> ResourceVariable:
    """A variable on the current device that has no value yet: it is given one by `assign`."""
    with tf.init_scope():
        handle = UninitializedVariable(shape=shape, dtype=dtype, name=name).handle
        variable = ResourceVariable(handle=handle, shape=shape, dtype=dtype, trainable=trainable)
    variable._handle_name = f"{name}:0"  # TensorFlow takes zeros away from the end of a name
    return variable


def set_container(copy: tf.Variable, variable: Any):
    """Let TensorFlow know of which distributed variable this is a copy or a part."""
    copy.handle._distributed_container = weakref.ref(variable)


def has_shared_rows(gradient: Any) -> bool:
    """Whether a sparse gradient in a function that is being traced has rows that no sample chose: no input does."""
    if not isinstance(gradient, tf.IndexedSlices) or tf.executing_eagerly():
        return False
    waiting, seen = [gradient.indices.op], set()
    while waiting:
        op = waiting.pop()
        if op.name in seen or op.type in ("Const", "ReadVariableOp") or is_inner_size(op):
            continue
        seen.add(op.name)
        if not op.inputs or op.op_def.is_stateful or "Call" in op.type:
            return False
        waiting += [x.op for x in op.inputs]
    return True


def is_inner_size(op: tf.Operation) -> bool:
    """Whether an operation tells one size of a tensor, and not that of the batch."""
    if op.type != "StridedSlice" or op.inputs[0].op.type != "Shape":
        return False
    begin, end = (tf.get_static_value(x) for x in op.inputs[1:3])
    masks = [op.get_attr(name) for name in ("begin_mask", "end_mask", "ellipsis_mask", "new_axis_mask")]
    return begin is not None and end is not None and len(begin) == 1 and begin[0] != 0 and not any(masks)
