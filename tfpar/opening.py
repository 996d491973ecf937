"""Models and layers that are made of layers, opened by calling them on symbolic inputs and checked by numbers."""

# t: tensor of the graph, i: operation

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import tree

from tfpar import _keras, _keras_calls, _keras_parts, rules
from tfpar.errors import Caught, ModelError, brief
from tfpar.graph import OpGraph
from tfpar.model import Call, KerasGraph, Ref, config_of, graph_from
from tfpar.samples import first_that_works, small_samples
from tfpar.state import RecordingScope
from tfpar.variables import HOST


def opened(model: keras.Model, x: Any, training: bool) -> KerasGraph:
    """A subclassed model as the layers that its `call` calls.

    Args:
        x: a few samples of real input, for the check.

    Raises:
        ModelError: `call` does not take symbolic inputs, or what it does with them is not what it does with numbers.
    """
    flat = tree.flatten(x)

    def call(*values):
        return _keras_calls.own_call(model, tree.pack_sequence_as(x, values), training)

    symbols = [_keras.symbolic(a) for a in flat]
    small = small_samples(symbols, [True] * len(flat), len(flat[0]), own=False)
    try:
        first_that_works(small, lambda pair: followed(model, call, *pair, training))
    except Exception:  # it takes only samples of its own size
        return followed(model, call, symbols, flat, training)
    return followed(model, call, symbols, None, training)


def followed(
    layer: keras.layers.Layer,
    call: Callable,
    symbols: Sequence[Any],
    samples: Sequence[Any] | None,
    training: Any,
    original: Callable | None = None,
) -> KerasGraph:
    """The layers and operations that `call` runs, as a graph.

    Args:
        layer: whose call it is.
        call: of flat tensors.
        symbols, samples: for each of them; without samples, nothing is checked.
        original: what the graph is to compute; `call`, if not given.

    Raises:
        ModelError: as `opened`.
    """
    name = type(layer).__name__
    cure = (
        "To divide a model, tfpar follows its layers. Build it from keras.layers and keras.ops "
        "(a raw TensorFlow function belongs in the call() of a layer of its own, or in keras.layers.Lambda), "
        "or use a Functional or Sequential model"
    )
    try:
        with RecordingScope([]) as scope:
            function = keras.Function(list(symbols), call(*symbols))
    except Exception as error:
        Caught.theirs(error, f"{name}.call on symbolic inputs")
        raise ModelError(f"{name}.call does not work on symbolic inputs: {brief(error)}\n{cure}.") from error
    if scope.written:
        paths = [v.path for v in scope.written.values()]
        raise ModelError(f"{name}.call changes {paths} beside its layers, which symbolic inputs do not show. {cure}.")
    graph = graph_from(function, opened=True)
    if samples is None:
        return graph
    expected, changed, _ = perturbed(lambda: (original or call)(*samples))
    try:
        inside, written, _ = perturbed(lambda: graph.run(samples, training))
        same = written == changed and all(
            np.allclose(a, b, rtol=1e-4, atol=1e-5, equal_nan=True) for a, b in zip(inside, expected, strict=True)
        )
    except Exception as error:  # a symbol was kept where a number is needed
        Caught.theirs(error, f"running the layers of {name} one by one")
        same = False
    if not same:
        unseen = [v.path for v in layer.weights if all(v is not g for g in graph.variables)]
        hidden = "what it computes beside its layers (conditions, random numbers, its own weights) is frozen"
        if unseen:
            hidden = (
                f"it does not see the weights {unseen} there. A layer that is called on numbers alone, such as "
                "ops.arange(...), does not show: make them of the input, or call the layer outside"
            )
        raise ModelError(
            f"{name}.call gives other numbers when its layers are run one by one than when it is called: "
            f"{hidden}. {cure}."
        )
    return graph


class Perturbed(RecordingScope):
    """Every weight reads a little different from its value, so that one that was frozen shows."""

    def get_current_value(self, variable):
        value = self.state_mapping.get(id(variable))
        if value is not None or not variable.trainable:
            return value
        return variable._value * 1.05 + tf.cast(0.01, variable._value.dtype)


def perturbed(run: Callable[[], Any]) -> tuple[list[np.ndarray], set[int], bool]:
    """The flat results of `run` with perturbed weights, which variables it would write, and whether it adds losses."""
    with Perturbed([]) as scope:
        results = [np.asarray(r) for r in tree.flatten(run())]
    return results, set(scope.written), bool(scope.losses)


# ---- layers made of layers


def with_opened_layers(
    graph: KerasGraph, training: bool, checked: set[str], closed: dict[str, str], prefix: str = ""
) -> KerasGraph:
    """The graph with what composite layers run in their place, as far as they can be opened.

    Args:
        checked: kinds of layers, with their configuration, that were found to be what their layers are.
        closed: is given, by the names of operations, why a layer could not be opened.
        prefix: of these names.
    """
    found = {}
    for i, (op, call) in enumerate(zip(graph.graph.ops, graph.calls, strict=True)):
        if is_composite(call.operation):
            try:
                inner = inside(graph, i, training, checked)
                found[i] = with_opened_layers(inner, training, checked, closed, f"{prefix}{op.name}/")
            except ModelError as error:
                closed[prefix + op.name] = brief(error).split(". To divide")[0].split("\n")[0]
    if not found:
        return graph
    ops, calls, tensors, symbols = [], [], list(graph.graph.tensors), list(graph.symbols)
    renamed: dict[int, int] = {}  # outputs of opened layers
    places = graph.places
    for i, (op, call) in enumerate(zip(graph.graph.ops, graph.calls, strict=True)):
        if i not in found:
            ops.append(replace(op, inputs=tuple(renamed.get(t, t) for t in op.inputs)))
            calls.append(with_refs(call, renamed))
            continue
        inner = found[i]
        into = dict(zip(inner.graph.inputs, (renamed.get(t, t) for t in op.inputs), strict=True))
        for t in range(len(inner.symbols)):
            if t not in into:
                into[t] = len(symbols)
                tensors.append(inner.graph.tensors[t])
                symbols.append(inner.symbols[t])
        variables = [places[id(v)] for v in inner.variables]
        for inner_op, inner_call in zip(inner.graph.ops, inner.calls, strict=True):
            ops.append(
                replace(
                    inner_op, name=f"{op.name}/{inner_op.name}", stage=op.stage,
                    inputs=tuple(into[t] for t in inner_op.inputs),
                    outputs=tuple(into[t] for t in inner_op.outputs),
                    variables=tuple(sorted(variables[v] for v in inner_op.variables)),
                )
            )  # fmt: skip
            call_inside = with_refs(inner_call, into)
            calls.append(replace(call_inside, outputs=tuple(into[t] for t in inner_call.outputs)))
        renamed.update(zip(op.outputs, (into[t] for t in inner.graph.outputs), strict=True))
    outputs = tree.map_structure(lambda t: renamed.get(t, t), graph.outputs)
    plain = OpGraph(
        tuple(ops), tuple(tensors), graph.graph.variables, graph.graph.inputs, tuple(tree.flatten(outputs))
    )  # fmt: skip
    return KerasGraph(plain, tuple(calls), graph.variables, tuple(symbols), outputs)


def with_refs(call: Call, places: dict[int, int]) -> Call:
    """A call on other tensors."""
    args, kwargs = call.arguments(lambda ref: Ref(places.get(ref.tensor, ref.tensor)))
    return replace(call, args=args, kwargs=kwargs)


def inside(graph: KerasGraph, i: int, training: bool, checked: set[str]) -> KerasGraph:
    """What a composite layer runs.

    Raises:
        ModelError: it cannot be opened, and why.
    """
    call, op = graph.calls[i], graph.graph.ops[i]
    layer = call.operation
    if any(_keras.get_keras_mask(graph.symbols[t]) is not None for t in op.inputs):
        raise ModelError("its input has a Keras mask, which the layers in it would be given one by one")
    told = call.kwargs.get("training", training) if call.explicit else training
    given = _keras_calls.training_argument(layer, told)

    def run(*values, function=None):
        left = iter(values)
        args, kwargs = call.arguments(lambda _: next(left))
        kwargs.pop("training", None)
        if function is None:
            args, kwargs = _keras_parts.converted_arguments(layer, (args, kwargs))
        with _keras.autocast_of(layer), _keras_calls.telling(layer, told):
            return (function or layer.call)(*args, **{**kwargs, **given})

    if {inner.compute_dtype for inner in _keras.layers_in(layer)} != {layer.compute_dtype}:
        raise ModelError("the layers in it compute in other dtypes than itself")  # so would its own weights be read

    symbols = [keras.KerasTensor(graph.symbols[t].shape, graph.symbols[t].dtype) for t in op.inputs]
    kind = f"{type(layer)} {config_of(layer)} {[(s.shape, s.dtype) for s in symbols]} {told}"
    original, losses = partial(run, function=layer), []

    def follow(batch: int | None) -> KerasGraph:
        def check(pair: tuple[list, list]):
            like, samples = pair
            followed(layer, run, [of_batch(s, batch) for s in like], samples, told, original)
            losses.append(perturbed(lambda: original(*samples))[2])

        if kind not in checked:
            batched = [graph.is_batched(t) for t in op.inputs]
            first_that_works(small_samples(symbols, batched, 2), check)
        return followed(layer, run, [of_batch(s, batch) for s in symbols], None, told)

    try:
        with tf.device(HOST):
            try:
                inner = follow(None)
            except ModelError:  # perhaps it asks for the size: a mask that it makes for one sample fits all
                inner = follow(1)
    except ModelError:
        raise
    except Exception as error:  # it stays one operation, on every rank
        Caught.theirs(error, f"opening {op.name}")
        raise ModelError(brief(error)) from error
    inner = replace(inner, symbols=tuple(of_batch(s, graph.symbols[op.inputs[0]].shape[0], 1) for s in inner.symbols))
    known = {id(v) for v in layer.variables}
    if any(losses):
        raise ModelError("it adds losses; add them in a layer of their own")
    if {id(v) for v in inner.variables} - known or len(inner.graph.outputs) != len(op.outputs):
        raise ModelError("it uses weights that are not its own, or has other outputs than its graph")
    checked.add(kind)
    return inner


def of_batch(symbol: keras.KerasTensor, batch: int | None, instead_of: int | None = None) -> keras.KerasTensor:
    """A symbol with this number of samples, where it has as many as `instead_of`."""
    if not symbol.shape or symbol.shape[0] != instead_of:
        return symbol
    return keras.KerasTensor((batch, *symbol.shape[1:]), symbol.dtype)


def is_composite(layer: Any) -> bool:
    """Whether this is a layer of a user's own that calls layers, and does no more than that."""
    return (
        isinstance(layer, keras.layers.Layer)
        and len(_keras.layers_in(layer)) > 1
        and not type(layer).__module__.startswith("keras.src.")
        and rules.rule_of(layer) is None
        and _keras_parts.is_plain_layer(layer)
    )
