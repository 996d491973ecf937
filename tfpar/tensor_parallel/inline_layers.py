"""Layers that are made of layers, opened as a subclassed model is."""

# t: tensor of the graph, i: operation

from dataclasses import replace
from functools import partial
from typing import Any

import keras
import tensorflow as tf

from tfpar.compat import _keras, _keras_calls, _keras_parts
from tfpar.errors import Caught, ModelError, brief
from tfpar.graph.inline_model import followed, perturbed
from tfpar.graph.keras_graph import KerasGraph, Rewriting, config_of
from tfpar.graph.samples import first_that_works, small_samples
from tfpar.tensor_parallel import rules
from tfpar.variables.logical import HOST


def inline_layers(
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
                found[i] = inline_layers(inner, training, checked, closed, f"{prefix}{op.name}/")
            except ModelError as error:
                closed[prefix + op.name] = brief(error).split(". To divide")[0].split("\n")[0]
    if not found:
        return graph
    new = Rewriting(graph)
    renamed: dict[int, int] = {}  # outputs of opened layers
    places = graph.places
    for i, (op, call) in enumerate(zip(graph.graph.ops, graph.calls, strict=True)):
        if i not in found:
            new.copy(op, call, renamed)
            continue
        inner = found[i]
        into = dict(zip(inner.graph.inputs, (renamed.get(t, t) for t in op.inputs), strict=True))
        for t in range(len(inner.symbols)):
            if t not in into:
                into[t] = new.tensor(inner.graph.tensors[t], inner.symbols[t])
        variables = [places[id(v)] for v in inner.variables]
        for inner_op, inner_call in zip(inner.graph.ops, inner.calls, strict=True):
            outputs = tuple(into[t] for t in inner_op.outputs)
            used = tuple(sorted(variables[v] for v in inner_op.variables))
            name = f"{op.name}/{inner_op.name}"
            described = replace(inner_op, name=name, stage=op.stage, outputs=outputs, variables=used)
            new.copy(described, replace(inner_call, outputs=outputs), into)
        renamed.update(zip(op.outputs, (into[t] for t in inner.graph.outputs), strict=True))
    return new.finish(renamed)


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
