"""One segment of a stage as a pure function."""

import weakref
from collections.abc import Callable, Container, Iterable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from tfpar.comm.in_program import Gang
from tfpar.compat import _keras, _keras_attention, _keras_calls, _keras_einsum, _keras_parts, _moments
from tfpar.compat._tf import NOT_COPIED, call_flat, fingerprint, without_device
from tfpar.graph.keras_graph import KerasGraph
from tfpar.graph.recording import RecordingScope, UnknownVariables
from tfpar.planning.op_graph import OpGraph


class Edge(NamedTuple):
    """A tensor on its way between stages, with what Keras attaches to it.

    Args:
        value: the tensor.
        mask: of its time steps.
        logits: what it is the softmax or the sigmoid of; crossentropies compute from these.
    """

    value: Any
    mask: Any = None
    logits: Any = None


class Component(NamedTuple):
    """What gradients are taken of in the edge of a tensor: its value, or its logits."""

    tensor: int
    field: str = "value"

    def of(self, edges: dict[int, Edge]) -> Any:
        """The component of its edge."""
        return getattr(edges[self.tensor], self.field)


def components(edges: dict[int, Edge], graph: OpGraph) -> dict[Component, tf.Tensor]:
    """What gradients can be taken of in these edges."""
    keys = [Component(t) for t in edges if graph.tensors[t].differentiable]
    keys += [Component(t, "logits") for t, edge in edges.items() if edge.logits is not None]
    return {key: key.of(edges) for key in keys}


class Result(NamedTuple):
    """What a program returns, each part keyed as said.

    Args:
        edges: the tensors of the graph that others need.
        losses: what the layers added, by operation.
        moments: batch statistics, by BatchNormalization layer of the program.
        state: new values of variables, by variable of the graph.
    """

    edges: dict[int, Edge]
    losses: dict[int, list[tf.Tensor]]
    moments: dict[int, list[_moments.Moments]]
    state: dict[int, tf.Tensor]


class Function:
    """A function that is traced once for each kind of arguments, wherever it is called.

    A `tf.function` is traced again for each device from whose scope it is called.

    Args:
        function: of structures of tensors and variables; the variables that it uses are among them.
        jit_compile: whether to compile with XLA.
        differentiated: whether gradients of it are taken from outside.
        often: whether a step calls it often: TensorFlow then does not copy it into each call and optimise every copy,
            but what a call is given is not written over by what it computes, so that a step takes a little longer.
    """

    def __init__(self, function: Callable, jit_compile: bool, differentiated: bool = False, often: bool = False):
        attributes = NOT_COPIED if often else None
        self.plain = tf.function(function, autograph=False, experimental_attributes=attributes)
        self.compiled = tf.function(function, autograph=False, jit_compile=True) if jit_compile else None
        self.differentiated = differentiated
        self.traces: dict[str, Callable] = {}

    def __call__(self, *args: Any) -> Any:
        kind = key_of(args)
        if kind not in self.traces:
            self.traces[kind] = shared(self.trace(args), self.compiled is not None)
        return self.traces[kind](*args)

    def of(self, *args: Any) -> Any:
        """The traced function for arguments of this kind, which it was called with."""
        trace = self.traces[key_of(args)]
        return trace.function if isinstance(trace, Trace) else trace

    def trace(self, args: Any) -> Callable:
        """The function for this kind of arguments, compiled if it can be."""
        examples = tf.nest.map_structure(lambda x: x if isinstance(x, tf.Variable) else kind_of(x), args)
        with without_device():
            if self.compiled is None:
                return self.plain.get_concrete_function(*examples)
            compiled = self.compiled.get_concrete_function(*examples)
            kinds = {op.type.removeprefix("Stateless") for op in compiled.graph.get_operations()}
            # what a loop or a branch keeps for its gradient cannot leave a compiled program
            kept = self.differentiated and kinds & {"While", "If", "Case"}
            return self.plain.get_concrete_function(*examples) if kept else compiled


class Trace:
    """A traced function of tensors.

    Args:
        function: to call.
        results: the structure of what it returns.
    """

    def __init__(self, function: Callable, results: Any):
        self.function, self.results = function, results

    def __call__(self, *args: Any) -> Any:
        given = [x for x in tf.nest.flatten(args, expand_composites=True) if x is not None]
        return packed(self.results, call_flat(self.function, given))


def packed(structure: Any, values: Sequence[tf.Tensor]) -> Any:
    """Flat values in a structure that may hold `None`."""
    found = iter(values)
    return tf.nest.map_structure(lambda x: None if x is None else next(found), structure, expand_composites=True)


KNOWN: weakref.WeakValueDictionary[tuple, Trace] = weakref.WeakValueDictionary()


def shared(function: Any, compiled: bool) -> Callable:
    """A traced function, or an earlier one that computes the same: blocks of a model that are alike compile once."""
    mark = fingerprint(function)
    if mark is None:
        return function
    own = Trace(function, function.structured_outputs)
    first = KNOWN.setdefault((mark, compiled), own)
    if first is not own:
        own.function, own.first = first.function, first  # which is known for as long as somebody uses it
    return own


def kind_of(value: Any) -> Any:
    """The type of an argument."""
    if value is None:
        return None
    variable = isinstance(value, tf.Variable)
    return tf.TensorSpec(value.shape, value.dtype) if variable else tf.type_spec_from_value(value)


def key_of(args: Any) -> str:
    """Tells arguments of different kinds apart."""
    return str(tf.nest.map_structure(kind_of, args))


class Program:
    """The operations of one stage as a pure function `(variables, edges) -> Result`.

    It reads no variable and writes none, so it can run anywhere, with parameters that were gathered or moved, and any
    number of times; it is traced once for each kind of input, and compiled with XLA where asked.

    Args:
        graph: the whole model.
        ops: the operations of the stage.
        gives: the tensors to return.
        model: whose autocast scope to run in.
        training: what the layers are told; `None` to leave it to them.
        jit_compile: whether to compile with XLA.
        eager: whether to run operation by operation, untraced.
        unused: which of `gives` have no gradient.
        gang: who runs it at once and exchanges tensors in it, if it holds collectives.
        fused_head: the largest attention head that cuDNN is to compute; 0 for none.
        often: whether a step calls it for many micro-batches.

    Attributes:
        attention: for each operation with attention, why cuDNN does not compute it; `None` if it does.
    """

    def __init__(
        self,
        graph: KerasGraph,
        ops: Sequence[int],
        gives: Sequence[int],
        model: keras.Model,
        training: bool | None,
        jit_compile: bool,
        eager: bool,
        unused: Container[int] = (),
        gang: Gang | None = None,
        fused_head: int = 0,
        often: bool = False,
    ):
        self.unused, self.gang, self.fused_head = unused, gang, fused_head
        self.attention: dict[str, str | None] = {}
        self.graph, self.ops, self.gives = graph, ops, gives
        self.model, self.training = model, training
        self.variables = tuple(sorted({v for i in ops for v in graph.graph.ops[i].variables}))
        layers = {id(x): x for i in ops for x in _moments.batch_normalizations(graph.calls[i].operation)}
        self.normalizations = list(layers.values()) if training else []
        self.writers: dict[int, int] = {}  # of each variable that changes, the operation that wrote it last
        self.split: dict[tuple, Any] = {}  # the ways forward and back, by the kind of arguments
        self.fused: dict[Any, Callable] = {}  # both at once, by how the batch is divided
        self.exchanged: set[tuple[int, str]] = set()  # gradients of variables and the axes over which it sums them
        self.added: set[int] = set()  # variables of which the backward pass adds up the gradients of micro-batches
        self.targets: Any = None  # of its results, those that lead to a loss, if some are known not to
        self.compiled = jit_compile and not eager
        self.call = self.run if eager else Function(self.run, jit_compile, True, often)

    def __call__(self, variables: Sequence[tf.Tensor], edges: dict[int, Edge]) -> Result:
        return self.call(list(variables), edges)

    def traced(self, variables: Sequence[tf.Tensor], edges: dict[int, Edge]) -> Any:
        """The traced function that a call with these arguments runs; `None` if it runs untraced."""
        return self.call.of(list(variables), edges) if isinstance(self.call, Function) else None

    @cached_property
    def reads(self) -> dict[int, str]:
        """Weights that all operations read in another dtype than their own, and which."""
        uses = {v: [i for i in self.ops if v in self.graph.graph.ops[i].variables] for v in self.variables}
        calls, variables = self.graph.calls, self.graph.variables
        found = {v: _keras.read_as(variables[v], [calls[i].operation for i in uses[v]]) for v in self.variables}
        return {v: dtype for v, dtype in found.items() if dtype is not None}

    def run(self, variables: list[tf.Tensor], edges: dict[int, Edge]) -> Result:
        """Run the operations; `variables` are the values of `self.variables`."""
        if self.gang:
            self.gang.meet()
        try:
            return self.emit(variables, edges)
        except UnknownVariables as unknown:
            unknown.graph = self.graph
            raise

    def emit(self, variables: list[tf.Tensor], edges: dict[int, Edge]) -> Result:
        """The operations, without the context of errors."""
        places = {id(self.graph.variables[v]): v for v in self.variables}
        values = [(self.graph.variables[v], value) for v, value in zip(self.variables, variables, strict=True)]
        tensors = {t: restored(t, edges, self.graph) for t in edges}
        found: list[tuple[int, _moments.Moments]] = []
        losses, told, names = {}, self.attention, [op.name for op in self.graph.graph.ops]
        with (
            RecordingScope(values, strict=True) as scope,
            _keras_parts.shaped(values),
            _keras.autocast_of(self.model),
            _keras_calls.telling(self.model, self.training),
            _moments.recorded(self.normalizations, found),
            _keras_einsum.whole(self.compiled),
            _keras_attention.fused(self.fused_head, lambda why: told.update({names[scope.call]: why})),
        ):
            for scope.call in self.ops:
                scope.losses = []  # Keras takes a layer's losses out again when it is called once more
                self.graph.calls[scope.call](tensors, self.training)
                for t in self.graph.calls[scope.call].outputs:
                    set_sizes(tensors[t], self.graph.symbols[t].shape)
                if scope.losses:
                    losses[scope.call] = scope.losses
        for i in losses:
            _keras.clear_losses(self.graph.calls[i].operation)
        self.writers = {places[v]: i for v, i in scope.writers.items()}
        moments: dict[int, list[_moments.Moments]] = {}
        for layer, value in found:
            moments.setdefault(layer, []).append(value)
        given = {}
        for t in self.gives:
            logits, activation = _keras.logits_of(tensors[t])
            given[t] = Edge(tensors[t], _keras.get_keras_mask(tensors[t]), logits)
            if activation is not None:
                self.graph.activations[t] = activation
        return Result(
            given,
            losses,
            moments,
            {places[v]: scope.state_mapping[v] for v in scope.written},
        )


def set_sizes(x: Any, shape: Sequence[int | None]):
    """Tell TensorFlow the sizes of a tensor, but for the batch: it does not see what another program has computed."""
    if isinstance(x, tf.Tensor) and x.shape.rank == len(shape) and not x.shape[1:].is_fully_defined():
        x.set_shape([None, *(n if size is None else size for size, n in zip(x.shape[1:], shape[1:], strict=True))])


def restored(t: int, edges: dict[int, Edge], graph: KerasGraph) -> Any:
    """A tensor with what Keras attaches to it: its mask, and the logits from which crossentropies compute."""
    value, mask, logits = edges[t]
    if logits is not None and t in graph.activations:
        value = graph.activations[t](logits)
    elif logits is not None:
        _keras.set_logits(value, logits)
    if mask is not None:
        _keras.set_keras_mask(value, mask)
    return value


def selected(edges: dict[Any, Any], keys: Iterable[Any]) -> dict[Any, Any]:
    """What there is of these."""
    return {key: edges[key] for key in keys if key in edges}
