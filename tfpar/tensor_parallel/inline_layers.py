"""Layers without a rule of their own, opened: divided as what they run."""

# t: tensor of the graph, i: operation

from collections.abc import Set
from dataclasses import replace
from typing import Any

import keras
import tensorflow as tf
from keras import tree

from tfpar.compat import _keras, _keras_calls, _keras_parts
from tfpar.errors import Caught, ModelError, brief
from tfpar.graph.alike import attributes
from tfpar.graph.keras_graph import Call, KerasGraph, Rewriting
from tfpar.graph.tf_graph import traced
from tfpar.tensor_parallel import rules
from tfpar.variables.parts import HOST


def inline_layers(
    graph: KerasGraph, training: bool | None, closed: dict[str, str], undivided: Set[str] = frozenset()
) -> KerasGraph:
    """The graph with what layers without a rule run in their place, as far as that is known.

    Args:
        closed: is given, by the names of operations, why a layer could not be opened.
        undivided: names of operations that every rank computes all of.
    """
    found: dict[int, KerasGraph] = {}
    known: dict[Any, tuple[Any, KerasGraph]] = {}  # by kind of call, the layer that was opened, and what it runs
    for i, (op, call) in enumerate(zip(graph.graph.ops, graph.calls, strict=True)):
        if can_be_opened(call.operation) and op.name not in undivided:
            try:
                kind = kind_of(graph, i)
                if kind not in known:
                    known[kind] = call.operation, inside(graph, i, training)
                found[i] = of_other(*known[kind], call.operation)
            except ModelError as error:
                closed[op.name] = brief(error).split("\n")[0]
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


def inside(graph: KerasGraph, i: int, training: bool | None) -> KerasGraph:
    """What a layer runs.

    Raises:
        ModelError: it cannot be opened, and why.
    """
    call, op = graph.calls[i], graph.graph.ops[i]
    layer = call.operation
    if any(_keras.get_keras_mask(graph.symbols[t]) is not None for t in op.inputs):
        raise ModelError("its input has a Keras mask, which the layers in it would be given one by one")
    told = call.kwargs.get("training", training) if call.explicit else training
    given = _keras_calls.training_argument(layer, told)

    def of_flat(*values):
        left = iter(values)
        args, kwargs = call.arguments(lambda _: next(left))
        kwargs.pop("training", None)
        args, kwargs = _keras_parts.converted_arguments(layer, (args, kwargs))
        with _keras.autocast_of(layer), _keras_calls.telling(layer, told):
            run = layer.call if layer.quantization_mode is None else layer.quantized_call
            return run(*args, **{**kwargs, **given})

    try:
        with tf.device(HOST):
            inner = traced(of_flat, [graph.symbols[t] for t in op.inputs], has_rule)
    except ModelError:
        raise
    except Exception as error:  # it stays one operation, on every rank
        Caught.theirs(error, f"opening {op.name}")
        raise ModelError(brief(error)) from error
    known = {id(v) for v in layer.variables}
    if {id(v) for v in inner.variables} - known or len(inner.graph.outputs) != len(op.outputs):
        raise ModelError("it uses weights that are not its own, or has other outputs than its graph")
    return inner


def kind_of(graph: KerasGraph, i: int) -> Any:
    """What calls of layers have in common that run the same, each with its own weights."""
    call, op = graph.calls[i], graph.graph.ops[i]
    shapes = [(graph.symbols[t].shape, graph.symbols[t].dtype) for t in op.inputs]
    return str((shapes, attributes(call.arguments(lambda ref: "tensor")), attributes(call.operation)))


def of_other(layer: keras.layers.Layer, graph: KerasGraph, other: keras.layers.Layer) -> KerasGraph:
    """What a layer runs, from what another one runs that is alike."""
    if other is layer:
        return graph
    layers = dict(zip(map(id, _keras.layers_in(layer)), _keras.layers_in(other), strict=True))
    variables = dict(zip(map(id, layer.variables), other.variables, strict=True))

    def replaced(call: Call) -> Call:
        args, kwargs = tree.map_structure(lambda a: variables.get(id(a), a), (call.args, call.kwargs))
        return replace(call, operation=layers.get(id(call.operation), call.operation), args=args, kwargs=kwargs)

    own = tuple(variables[id(v)] for v in graph.variables)
    return replace(graph, calls=tuple(map(replaced, graph.calls)), variables=own)


def has_rule(layer: keras.layers.Layer) -> bool:
    """Whether there is a rule for a layer, with what LoRA has added to it."""
    adapted = any(getattr(part, "lora_enabled", False) for part in _keras.layers_in(layer))
    return rules.rule_of(layer) is not None and (not adapted or isinstance(layer, WITH_LORA))


WITH_LORA = (keras.layers.Dense, keras.layers.EinsumDense)  # whose rules divide its matrices, too


def can_be_opened(layer: Any) -> bool:
    """Whether this is a layer without a rule, which does no more than its `call`."""
    return (
        isinstance(layer, keras.layers.Layer)
        and not has_rule(layer)
        and _keras_parts.is_its_call(layer)
        and type(layer).compute_mask is keras.layers.Layer.compute_mask
        and (not type(layer).__module__.startswith("keras.src.") or layer.quantization_mode is not None)
    )
