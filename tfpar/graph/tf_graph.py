"""What a Keras layer runs on TensorFlow, operation by operation: traced once, with layers that are kept whole in it."""

# x: tensor of TensorFlow's graph, t: tensor of ours

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import keras
import tensorflow as tf
from keras import tree

from tfpar.compat import _keras, _keras_attention, _keras_hub, _keras_parts
from tfpar.compat._keras_parts import LAYER_CALLS
from tfpar.compat._replaced import InThread
from tfpar.compat._tf import copied_for_tapes, has_own_gradient
from tfpar.errors import ModelError
from tfpar.graph.keras_graph import Builder, KerasGraph, Ref
from tfpar.graph.recording import RecordingScope

CONSTANT = 4096  # elements up to which a value that is known while tracing is kept as a number


class TensorFlowOp:
    """An operation of a TensorFlow graph, to be run on other tensors.

    Args:
        op: the operation.

    Attributes:
        type: as TensorFlow calls it, "Einsum".
    """

    variables = ()

    def __init__(self, op: tf.Operation):
        self.op, self.type, self.name = op, op.type, op.name
        self.eager: Any = None

    def __call__(self, *inputs: Any) -> Any:
        given = [tf.convert_to_tensor(x, like.dtype) for x, like in zip(inputs, self.op.inputs, strict=True)]
        if tf.executing_eagerly():
            self.eager = self.eager or tf.function(self.emit, autograph=False)
            return self.eager.get_concrete_function(*given)(*given)  # no warning of many shapes: they are few
        return self.emit(*given)

    def emit(self, *given: tf.Tensor) -> Any:
        """The same operation on these, in the present graph."""
        found = copied_for_tapes(self.op, given)
        return found[0] if len(found) == 1 else found

    def attribute(self, name: str) -> Any:
        """One of its attributes."""
        return self.op.get_attr(name)


class Read:
    """A variable as a tensor, in its own dtype."""

    type = "Read"

    def __call__(self, variable: keras.Variable) -> tf.Tensor:
        with _keras.uncast():
            return tf.convert_to_tensor(variable)


class Kept:
    """A function of Keras that is called as it is.

    Args:
        function: the function.
        type: its name.
    """

    variables = ()

    def __init__(self, function: Callable, type: str):
        self.function, self.type = function, type

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


@dataclass
class Whole:
    """A call that is kept as it is.

    Args:
        operation, args, kwargs: what is called.
        outputs: the tensors it made.
        name: of the operation.
    """

    operation: Callable
    args: tuple
    kwargs: dict[str, Any]
    outputs: list[tf.Tensor]
    name: str


class Trace(RecordingScope):
    """Inside, variables are placeholders of a TensorFlow graph, and some calls are kept whole.

    Args:
        graph: what is traced into.

    Attributes:
        wholes: the calls that are kept whole.
        read: the variables that are read, by the names of their placeholders.
        changed: paths of those that are written, but for what is kept whole.
    """

    def __init__(self, graph: Any):
        super().__init__([])
        self.graph = graph
        self.wholes: list[Whole] = []
        self.read: dict[str, keras.Variable] = {}
        self.placeholders: dict[int, tf.Tensor] = {}
        self.changed: list[str] = []
        self.within: set[str] = set()  # operations in what is kept whole
        self.inside = False  # whether such a call is being traced
        self.has_masks = False  # whether Keras masks reach layers or results, to which operations do not hand them on

    def add_update(self, update):
        if not self.inside:
            self.changed.append(update[0].path)
        super().add_update(update)

    def get_current_value(self, variable):
        value = super().get_current_value(variable)
        if value is not None:
            return value
        if id(variable) not in self.placeholders:
            with self.graph.as_default():
                placeholder = tf.compat.v1.placeholder(_keras_parts.own_dtype(variable), variable.shape)
            self.placeholders[id(variable)], self.read[placeholder.name] = placeholder, variable
        return self.placeholders[id(variable)]

    def whole(self, function: Callable, operation: Callable, args: tuple, kwargs: dict, name: str) -> Any:
        """What `function` returns, traced as one call of `operation`."""
        in_branch = tf.compat.v1.get_default_graph() is not self.graph  # or a loop: these are graphs of their own
        if self.inside or in_branch:
            return function()
        before, self.inside = len(self.graph.get_operations()), True
        try:
            results = function()
        finally:
            self.inside = False
        copy = lambda x: _keras.with_mask_of(x, tf.identity(x)) if isinstance(x, tf.Tensor) else x  # noqa: E731
        results = tree.map_structure(copy, results)
        self.within.update(op.name for op in self.graph.get_operations()[before:])
        scope = self.graph.get_name_scope()
        name = f"{scope}/{name}" if scope else name
        number = lambda x: x.numpy() if isinstance(x, tf.__internal__.EagerTensor) else x  # noqa: E731
        args, kwargs = tree.map_structure(number, (args, kwargs))
        self.wholes.append(Whole(operation, args, kwargs, tree.flatten(results), name))
        return results

    def finish(self, inputs: Sequence[tf.Tensor], outputs: Any) -> KerasGraph:
        """What was traced between these tensors.

        Raises:
            ModelError: it does what cannot be told operation by operation, and what that is.
        """
        if self.changed:
            raise ModelError(f"it changes {', '.join(self.changed)}, or draws random numbers, beside its layers")
        if self.has_masks:
            raise ModelError("it makes a Keras mask that it hands on")
        if self.losses:
            raise ModelError("it adds losses; add them in a layer of their own")
        for op in self.graph.get_operations():
            if op.op_def.is_stateful and op.name not in self.within and op.type not in HARMLESS:
                raise ModelError(f"it runs {op.type}, which keeps a state")
        return Conversion(self, inputs).finish(outputs)


HARMLESS = ("Placeholder", "Assert")


class Conversion:
    """From a trace to a `KerasGraph`.

    Args:
        trace: the trace.
        inputs: the tensors that it begins with.
    """

    def __init__(self, trace: Trace, inputs: Sequence[tf.Tensor]):
        self.trace, self.inputs = trace, inputs
        self.builder = Builder(opened=True)
        self.tensors = {x.name: self.builder.tensor(symbol_of(x)) for x in inputs}
        outside = [(outer, inner.name) for outer, inner in trace.graph.captures]
        self.constants: dict[str, Any] = {name: outer.numpy() for outer, name in outside if hasattr(outer, "numpy")}
        self.made = {x.name: whole for whole in trace.wholes for x in whole.outputs if isinstance(x, tf.Tensor)}

    def finish(self, outputs: Any) -> KerasGraph:
        """The graph that ends with these."""
        ends = tree.map_structure(self.real, outputs)
        waiting = [(x, False) for x in reversed(tree.flatten(ends))]
        while waiting:
            x, ready = waiting.pop()
            if x.name in self.tensors:
                continue
            if ready:
                self.add(x)
            else:
                taken = [y for y in self.taken(x) if self.constant(y) is None]
                waiting += [(x, True), *((y, False) for y in reversed(taken))]
        starts = [self.tensors[x.name] for x in self.inputs]
        return self.builder.finish(starts, tree.map_structure(lambda x: self.tensors[x.name], ends))

    def is_kept(self, x: tf.Tensor) -> bool:
        """Whether a tensor is there, or comes of what is kept whole, or is a variable."""
        return x.name in self.tensors or x.name in self.made or x.name in self.trace.read

    def real(self, x: tf.Tensor) -> tf.Tensor:
        """The tensor of which this is one and the same."""
        while x.op.type == "Identity" and not self.is_kept(x):
            x = x.op.inputs[0]
        return x

    def taken(self, x: tf.Tensor) -> list[tf.Tensor]:
        """The tensors of which a tensor is made."""
        if x.name in self.trace.read:
            return []
        whole = self.made.get(x.name)
        given = x.op.inputs if whole is None else tree.flatten((whole.args, whole.kwargs))
        return [self.real(y) for y in given if isinstance(y, tf.Tensor)]

    def constant(self, x: tf.Tensor) -> Any:
        """The value of a tensor that is the same for all samples; `None` if that is not known."""
        if x.name not in self.constants:
            small = x.op.type == "Const" or (x.shape.num_elements() or CONSTANT + 1) <= CONSTANT
            value = tf.get_static_value(x) if small and not self.is_kept(x) else None
            if value is None and small and x.dtype.is_integer and not self.is_kept(x):
                value = self.folded(x)
            self.constants[x.name] = value
        return self.constants[x.name]

    def folded(self, x: tf.Tensor) -> Any:
        """A whole number that follows from constants alone; `None` if it does not."""
        given = [self.constant(self.real(y)) for y in x.op.inputs]
        if not given or x.op.op_def.is_stateful or any(value is None for value in given):
            return None
        with tf.init_scope():
            return tree.flatten(TensorFlowOp(x.op)(*given))[x.value_index].numpy()

    def add(self, x: tf.Tensor):
        """What makes a tensor, of others that are there."""
        whole, variable = self.made.get(x.name), self.trace.read.get(x.name)
        if whole is not None:
            name, operation, results = whole.name, whole.operation, whole.outputs
            args, kwargs = tree.map_structure(self.argument, (whole.args, whole.kwargs))
        elif variable is not None:
            name, operation, args, kwargs, results = f"{variable.name}/read", Read(), (variable,), {}, [x]
        else:
            self.check(x.op)
            name, operation, results = x.op.name, TensorFlowOp(x.op), x.op.outputs
            args, kwargs = tuple(map(self.argument, x.op.inputs)), {}
        results = [y for y in results if isinstance(y, tf.Tensor)]
        made = self.builder.add(name, operation, args, kwargs, list(map(symbol_of, results)), whole is not None)
        self.tensors.update((y.name, t) for y, t in zip(results, made, strict=True))

    def argument(self, x: Any) -> Any:
        """What stands for a value among the arguments of a call."""
        if not isinstance(x, tf.Tensor):
            return x
        x = self.real(x)
        constant = self.constant(x)
        return Ref(self.tensors[x.name]) if constant is None else constant

    def check(self, op: tf.Operation):
        """Check that an operation can be run again.

        Raises:
            ModelError: it cannot.
        """
        if op.name in self.trace.within:
            raise ModelError(f"a layer in it hands on {op.name} beside its output")
        if has_own_gradient(op):
            raise ModelError(f"{op.name} has a gradient of its own")
        if any(a.HasField("func") for a in op.node_def.attr.values()) or op.type == "Placeholder":
            raise ModelError(f"{op.name} is a loop, a branch or a function ({op.type})")


def symbol_of(x: tf.Tensor) -> keras.KerasTensor:
    """The symbol of a tensor.

    Raises:
        ModelError: it has an unknown number of dims, or is no array of numbers.
    """
    if x.shape.rank is None or not (x.dtype.is_bool or x.dtype.is_integer or x.dtype.is_floating or x.dtype.is_complex):
        raise ModelError(f"{x.name}, {x.dtype.name}, is no array with a known number of dims")
    return keras.KerasTensor(x.shape.as_list(), x.dtype.name)


def traced(
    function: Callable,
    symbols: Sequence[keras.KerasTensor],
    keeps: Callable[[keras.layers.Layer], bool] = lambda layer: False,
) -> KerasGraph:
    """What a function of flat tensors runs.

    Args:
        symbols: one for each tensor.
        keeps: tells which layers are kept whole.

    Raises:
        ModelError: it cannot be told operation by operation, and why.
    """
    graph = tf.__internal__.FuncGraph("traced")
    with graph.as_default():
        inputs = [tf.compat.v1.placeholder(s.dtype, s.shape) for s in symbols]
        with (
            Trace(graph) as trace,
            FUNCTIONS.inside(trace),
            _keras_attention.ATTENTION.inside(partial(attention_kept, trace)),
            LAYER_CALLS.inside(partial(layer_called, trace, keeps)),
        ):
            results = function(*inputs)
            trace.has_masks |= any(map(has_mask, tree.flatten(results)))
            outputs = tree.map_structure(tf.identity, results)
    return trace.finish(inputs, outputs)


def layer_called(trace: Trace, keeps: Callable, function: Callable, layer: Any, args: tuple, kwargs: dict) -> Any:
    """A layer's `__call__` in a trace."""
    if not keeps(layer):
        return function(layer, *args, **kwargs)
    trace.has_masks |= not trace.inside and any(map(has_mask, tree.flatten((args, kwargs))))
    return trace.whole(partial(function, layer, *args, **kwargs), layer, args, kwargs, layer.name)


def has_mask(x: Any) -> bool:
    """Whether a tensor has a Keras mask."""
    return isinstance(x, tf.Tensor) and _keras.get_keras_mask(x) is not None


def function_kept(function: Callable, *args: Any, **kwargs: Any) -> Any:
    """A function of Keras with a gradient of its own, as it is."""
    trace = FUNCTIONS.given.get()
    return trace.whole(
        lambda: function(*args, **kwargs), Kept(function, function.__name__), args, kwargs, function.__name__
    )


def attention_kept(
    trace: Trace, formula: Callable, query: Any, key: Any, value: Any, bias: Any = None, mask: Any = None,
    scale: Any = None, is_causal: bool = False, flash_attention: bool | None = None, attn_logits_soft_cap: Any = None,
) -> tf.Tensor:  # fmt: skip
    """`keras.ops.dot_product_attention` as it is, so that programs can have cuDNN compute it."""

    mask = _keras_hub.with_window(mask)

    def by_formula():
        keys, values = _keras_attention.repeated(query, key, value)
        return formula(query, keys, values, bias, mask, scale, is_causal, None, attn_logits_soft_cap)

    args = query, key, value, bias, mask, scale, is_causal, flash_attention, attn_logits_soft_cap
    operation = Kept(_keras_attention.kept, formula.__name__)
    return _keras_hub.as_in_formula(trace.whole(by_formula, operation, args, {}, formula.__name__), mask)


FUNCTIONS = InThread((_keras_parts.backend_nn, "silu", function_kept))
