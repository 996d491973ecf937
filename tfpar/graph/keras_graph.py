"""A Keras model as an `OpGraph`, with what to call for each operation."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import tree

from tfpar.compat import _keras, _keras_calls
from tfpar.compat._keras_layers import ToldTraining, is_told_training
from tfpar.graph.flops import flops
from tfpar.graph.recording import UnknownVariables
from tfpar.planning.op_graph import Op, OpGraph, Tensor, Variable

UNKNOWN = 128  # the size assumed for a dimension that the model leaves open, in estimates of cost


@dataclass(frozen=True)
class Ref:
    """Stands for a tensor of the graph among the arguments of a call."""

    tensor: int


@dataclass(frozen=True)
class Call:
    """What an operation of the graph runs.

    Args:
        operation: a layer, a `keras.ops` operation, or a function.
        args, kwargs: its arguments, with a `Ref` for each tensor.
        outputs: the tensors it makes.
        explicit: whether a `training` argument in `kwargs` wins over that of the step.
    """

    operation: Callable
    args: tuple
    kwargs: dict[str, Any]
    outputs: tuple[int, ...]
    explicit: bool = False

    def __call__(self, tensors: dict[int, Any], training: bool | None):
        """Run, taking from and adding to `tensors`."""
        args, kwargs = self.arguments(lambda ref: tensors[ref.tensor])
        results = _keras.call_operation(self.operation, args, kwargs, training, self.explicit)
        tensors.update(zip(self.outputs, tree.flatten(results), strict=True))

    def arguments(self, of: Callable[[Ref], Any]) -> tuple[Any, Any]:
        """Its arguments, with what `of` gives for each `Ref`, asked in order."""
        return tree.map_structure(lambda a: of(a) if isinstance(a, Ref) else a, (self.args, self.kwargs))

    def on(self, tensors: Mapping[int, int]) -> "Call":
        """The same call on other tensors, where there are others."""
        args, kwargs = self.arguments(lambda ref: Ref(tensors.get(ref.tensor, ref.tensor)))
        return replace(self, args=args, kwargs=kwargs)

    @property
    def inputs(self) -> tuple[int, ...]:
        """The tensors among its arguments, in order."""
        return tuple(a.tensor for a in tree.flatten((self.args, self.kwargs)) if isinstance(a, Ref))

    @property
    def variables(self) -> list[keras.Variable]:
        """The variables it uses: a layer's own, and those among the arguments."""
        arguments = tree.flatten((self.args, self.kwargs))
        return [*getattr(self.operation, "variables", ()), *(a for a in arguments if isinstance(a, keras.Variable))]

    @property
    def named_arguments(self) -> dict[str, Any]:
        """The arguments by the names that the operation's `call` gives them, as far as it does."""
        call = getattr(self.operation, "call", self.operation)
        try:
            return inspect.signature(call).bind(*self.args, **self.kwargs).arguments
        except (TypeError, ValueError):
            return self.kwargs


@dataclass(frozen=True)
class KerasGraph:
    """A model's operations and what they call.

    Args:
        graph: the plain description.
        calls: one for each operation of the graph.
        variables: one for each variable of the graph.
        symbols: one `KerasTensor` for each tensor of the graph.
        outputs: the structure of the model's outputs, with tensor indices.
    """

    graph: OpGraph
    calls: tuple[Call, ...]
    variables: tuple[keras.Variable, ...]
    symbols: tuple[keras.KerasTensor, ...]
    outputs: Any

    def run(self, inputs: Sequence[Any], training: bool | None) -> Any:
        """All operations on flat inputs, in order."""
        tensors = dict(zip(self.graph.inputs, inputs, strict=True))
        for call in self.calls:
            call(tensors, training)
        return tree.map_structure(lambda t: tensors[t], self.outputs)

    @cached_property
    def activations(self) -> dict[int, Callable]:
        """Of each tensor that was found to be a TensorFlow function of its logits, that function."""
        return {}

    @cached_property
    def places(self) -> dict[int, int]:
        """The number of each variable, by its `id`."""
        return {id(v): n for n, v in enumerate(self.variables)}

    def is_batched(self, tensor: int) -> bool:
        """Whether dimension 0 is the batch: as open, or as fixed, as that of the model's input."""
        shape, batch = self.symbols[tensor].shape, self.symbols[self.graph.inputs[0]].shape
        return bool(shape) and bool(batch) and shape[0] == batch[0]

    @property
    def output_symbols(self) -> Any:
        """The symbols of the model's outputs, in their structure."""
        return tree.map_structure(lambda t: self.symbols[t], self.outputs)

    def in_stages(self, stage_of: Sequence[int]) -> "KerasGraph":
        """The same graph, each operation with its stage, those of earlier stages first."""
        order = sorted(range(len(stage_of)), key=lambda i: stage_of[i])
        ops = tuple(replace(self.graph.ops[i], stage=stage_of[i]) for i in order)
        return replace(self, graph=replace(self.graph, ops=ops), calls=tuple(self.calls[i] for i in order))

    def over(self, variables: tuple[keras.Variable, ...]) -> "KerasGraph":
        """The same graph with its variables in this order, among others that it does not use."""
        places = {id(v): n for n, v in enumerate(variables)}
        ops = tuple(
            replace(op, variables=tuple(sorted(places[id(self.variables[v])] for v in op.variables)))
            for op in self.graph.ops
        )  # fmt: skip
        known = dict(zip(map(id, self.variables), self.graph.variables, strict=True))
        graph = replace(self.graph, ops=ops, variables=tuple(known.get(id(v)) or describe(v) for v in variables))
        return replace(self, graph=graph, variables=variables)

    def with_variables(self, unknown: UnknownVariables, call: int | None) -> "KerasGraph":
        """The same graph with these variables too, which a call uses."""
        new = [v for v in unknown.variables if all(v is not known for known in self.variables)]
        variables = (*self.variables, *new)
        used = [n for n, v in enumerate(variables) if any(v is u for u in unknown.variables)]
        ops = list(self.graph.ops)
        if call is not None:
            ops[call] = replace(ops[call], variables=tuple(sorted({*ops[call].variables, *used})))
        described = (*self.graph.variables, *(describe(v) for v in new))
        return replace(self, graph=replace(self.graph, ops=tuple(ops), variables=described), variables=variables)


class Rewriting:
    """A graph that is copied operation by operation, with others among them.

    Args:
        source: what is copied; its tensors keep their numbers.
    """

    def __init__(self, source: KerasGraph):
        self.source = source
        self.ops: list[Op] = []
        self.calls: list[Call] = []
        self.tensors, self.symbols = list(source.graph.tensors), list(source.symbols)
        self.inputs, self.ends = list(source.graph.inputs), []  # more of either may be appended

    def tensor(self, described: Tensor, symbol: keras.KerasTensor) -> int:
        """A new tensor."""
        self.tensors.append(described)
        self.symbols.append(symbol)
        return len(self.symbols) - 1

    def like(self, tensor: int) -> int:
        """A new tensor of the kind of another."""
        return self.tensor(self.tensors[tensor], self.symbols[tensor])

    def add(self, op: Op, call: Call):
        """The next operation."""
        self.ops.append(op)
        self.calls.append(call)

    def copy(self, op: Op, call: Call, tensors: Mapping[int, int]):
        """The next operation, on other tensors where there are others."""
        self.add(replace(op, inputs=tuple(tensors.get(t, t) for t in op.inputs)), call.on(tensors))

    def finish(self, tensors: Mapping[int, int] = MappingProxyType({})) -> KerasGraph:
        """The finished graph; some of its outputs may be other tensors than before."""
        outputs = tree.map_structure(lambda t: tensors.get(t, t), self.source.outputs)
        ends = *(tensors.get(t, t) for t in self.source.graph.outputs), *self.ends
        described = OpGraph(
            tuple(self.ops), tuple(self.tensors), self.source.graph.variables, tuple(self.inputs), ends
        )  # fmt: skip
        calls, symbols = tuple(self.calls), tuple(self.symbols)
        return replace(self.source, graph=described, calls=calls, symbols=symbols, outputs=outputs)


class Builder:
    """Collects operations while walking through a model.

    Args:
        opened: whether it is a `call` that was followed, in which a `training` argument of a layer is that of the code.
    """

    def __init__(self, opened: bool = False):
        self.opened = opened
        self.ops: list[Op] = []
        self.calls: list[Call] = []
        self.symbols: list[keras.KerasTensor] = []
        self.variables: list[keras.Variable] = []
        self.places: dict[int, int] = {}  # of each variable, by id
        self.names: dict[str, int] = {}

    def tensor(self, symbol: keras.KerasTensor) -> int:
        """A new tensor."""
        self.symbols.append(symbol)
        return len(self.symbols) - 1

    def add(self, name: str, operation: Callable, args: tuple, kwargs: dict, results: Sequence, explicit: bool):
        """A new operation; returns its output tensors."""
        outputs = tuple(self.tensor(r) for r in results)
        call = Call(operation, args, kwargs, outputs, explicit)
        inputs = call.inputs
        for variable in call.variables:
            if id(variable) not in self.places:
                self.places[id(variable)] = len(self.variables)
                self.variables.append(variable)
        repeats = self.names.get(name, 0)
        self.names[name] = repeats + 1
        self.ops.append(
            Op(
                name=f"{name}:{repeats}" if repeats else name,
                inputs=inputs,
                outputs=outputs,
                variables=tuple(sorted({self.places[id(v)] for v in call.variables})),
                flops=flops(operation, [self.shape(i) for i in inputs], [self.shape(o) for o in outputs]),
            )
        )
        self.calls.append(call)
        return outputs

    def shape(self, tensor: int) -> tuple[int, ...]:
        """The shape of one sample, guessing dimensions that are not known."""
        return tuple(UNKNOWN if dim is None else dim for dim in self.symbols[tensor].shape[1:])

    def walk(self, function: Any, inputs: Sequence[int], prefix: str = "", told: bool | None = None) -> Any:
        """Add the operations of a Functional model or `keras.Function`; returns its outputs as tensor indices.

        Args:
            told: the `training` that a nested model was called with, which wins over what its own nodes have noted.
        """
        known = {id(symbol): tensor for symbol, tensor in zip(function.inputs, inputs, strict=True)}
        for node in _keras.nodes_in_order(function):
            if any(id(t) not in known for t in node.input_tensors):
                continue  # it belongs to a larger graph of which this one is a part
            args, kwargs = tree.map_structure(
                lambda a: Ref(known[id(a)]) if isinstance(a, keras.KerasTensor) else a,
                (node.arguments.args, node.arguments.kwargs),
            )
            explicit = told is not None or (self.opened and not prefix)
            if told is not None and is_told_training(node.operation):
                kwargs = {**kwargs, "training": told}
            name = prefix + name_of(node.operation, self.opened)
            if _keras.is_graph(node.operation) and len(args) == 1 and set(kwargs) <= {"training", "mask"}:
                inner = _keras.graph_of(node.operation)
                entered = self.enter(name, node.operation, inner, args[0], kwargs.get("mask"))
                outputs = tree.flatten(
                    self.walk(inner, entered, name + "/", kwargs.get("training") if explicit else None)
                )
            else:
                # a Sequential model that first saw numbers has their batch size in its symbols
                results = [rebatched(t, function.inputs[0], self.symbols[inputs[0]]) for t in node.outputs]
                outputs = self.add(name, node.operation, args, kwargs, results, explicit)
            known.update((id(t), o) for t, o in zip(node.outputs, outputs, strict=True))
        return tree.map_structure(lambda t: known[id(t)], _keras.output_structure(function))

    def enter(self, name: str, model: keras.Model, inner: Any, given: Any, mask: Any) -> list[int]:
        """The inputs of a nested model: those given to it, or what it converts them to."""
        refs = tree.flatten(given)
        same = len(refs) == len(inner.inputs) and all(
            isinstance(r, Ref)
            and len(self.symbols[r.tensor].shape) == len(i.shape)
            and self.symbols[r.tensor].dtype == i.dtype
            and not (_keras.converts_inputs(model) and "float" in i.dtype and i.dtype != model.input_dtype)
            for r, i in zip(refs, inner.inputs, strict=False)
        )
        if same and mask is None:
            return [r.tensor for r in refs]

        def standardize(inputs, mask=None):
            flat = [tf.identity(x) for x in _keras.graph_inputs(model, _keras.converted_inputs(model, inputs))]
            for x, m in zip(flat, tree.flatten(mask) if mask is not None else [], strict=False):
                _keras.set_keras_mask(x, m)
            return flat

        return list(self.add(f"{name}/inputs", standardize, (given, mask), {}, inner.inputs, False))

    def users(self, variable: int) -> list[Any]:
        """What uses a variable."""
        return [call.operation for op, call in zip(self.ops, self.calls, strict=True) if variable in op.variables]

    def finish(self, inputs: Sequence[int], outputs: Any) -> KerasGraph:
        """The finished graph."""
        graph = OpGraph(
            ops=tuple(self.ops),
            tensors=tuple(
                Tensor(self.shape(t), tf.as_dtype(s.dtype).size, tf.as_dtype(s.dtype).is_floating)
                for t, s in enumerate(self.symbols)
            ),
            variables=tuple(describe(v, self.users(n)) for n, v in enumerate(self.variables)),
            inputs=tuple(inputs),
            outputs=tuple(tree.flatten(outputs)),
        )
        return KerasGraph(graph, tuple(self.calls), tuple(self.variables), tuple(self.symbols), outputs)


def rebatched(symbol: keras.KerasTensor, inside: keras.KerasTensor, outside: keras.KerasTensor) -> keras.KerasTensor:
    """A tensor of a nested model with the batch size of what the model is given."""
    if not symbol.shape or not inside.shape or inside.shape[0] is None or symbol.shape[0] != inside.shape[0]:
        return symbol
    return keras.KerasTensor((outside.shape[0], *symbol.shape[1:]), symbol.dtype)


def name_of(operation: Any, opened: bool) -> str:
    """A layer's name; an operation's too, except in an opened model, where it counts up at each opening."""
    unstable = opened and not isinstance(operation, keras.layers.Layer)
    return type(operation).__name__.lower() if unstable else operation.name


def describe(variable: keras.Variable, users: Sequence[Any] = ()) -> Variable:
    """A Keras variable, which these operations use, as plain data."""
    count, dtype = int(np.prod(variable.shape)), _keras.read_as(variable, users) if users else None
    read = count * tf.as_dtype(dtype).size if dtype else 0
    return Variable(
        variable.path, count * tf.as_dtype(variable.dtype).size, variable.trainable, tuple(variable.shape), read
    )


def graph_from(function: Any, opened: bool = False) -> KerasGraph:
    """The graph of a Functional model or a `keras.Function`, with nested models inlined; `opened` as for `Builder`."""
    builder = Builder(opened)
    inputs = [builder.tensor(symbol) for symbol in function.inputs]
    return builder.finish(inputs, builder.walk(function, inputs))


class OwnCall(ToldTraining):
    """A model's own `call`, as an operation."""

    def __init__(self, model: keras.Model):
        self.model, self.variables = model, model.variables

    def __call__(self, inputs, training=None):
        return _keras_calls.own_call(self.model, inputs, training=training)


def one_call(model: keras.Model, x: Any) -> KerasGraph:
    """A model as a single operation, its own `call`."""
    builder = Builder()
    symbols = tree.map_structure(_keras.symbolic, x)
    inputs = [builder.tensor(symbol) for symbol in tree.flatten(symbols)]
    spec = _keras.output_spec(model, symbols)
    refs = tree.pack_sequence_as(x, [Ref(t) for t in inputs])

    outputs = builder.add(model.name, OwnCall(model), (refs,), {}, tree.flatten(spec), False)
    return builder.finish(inputs, tree.pack_sequence_as(spec, outputs))
