"""Which operations of a model mix the samples of a batch: known by name, followed into their layers, or tried."""

import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from tfpar.compat import _keras, _keras_calls, _moments
from tfpar.errors import Caught, ModelError, brief, user_level
from tfpar.graph.batch_probe import Combine, Probe, key_of
from tfpar.graph.keras_graph import KerasGraph, graph_from
from tfpar.graph.recording import RecordingScope
from tfpar.graph.rowwise import is_rowwise

MIXING = keras.layers.MixUp | keras.layers.CutMix


def is_known(graph: KerasGraph, index: int) -> bool:
    """Whether it is known without trying that a call treats samples one by one.

    That is so for most operations, and for Keras' own layers, unless they are told the batch's axis.
    """
    operation, op = graph.calls[index].operation, graph.graph.ops[index]
    shapes = [graph.symbols[t].shape for t in op.inputs]
    if not isinstance(operation, keras.layers.Layer):
        batched, outputs = [graph.is_batched(t) for t in op.inputs], [graph.symbols[t].shape for t in op.outputs]
        arguments = graph.calls[index].args, graph.calls[index].kwargs
        return is_rowwise(operation, shapes, batched, outputs, arguments)
    rank = len(shapes[0]) if shapes else 0
    layers = _keras.layers_in(operation)
    axes = [a for x in layers for name in ("axis", "axes") for a in np.ravel(getattr(x, name, None))]
    return not {0, -rank} & set(axes) and all(
        type(x).__module__.startswith("keras.src.layers") and not isinstance(x, keras.layers.Lambda | MIXING)
        for x in layers
    )


VERDICTS: weakref.WeakKeyDictionary[type, dict[str, bool]] = weakref.WeakKeyDictionary()  # of layers alike, by class


def mixing(graph: KerasGraph, probe: Probe) -> Iterator[int]:
    """The operations whose output for a sample depends on other samples of the batch.

    What are alike are asked once. Warns where an operation cannot be run on random samples.
    """
    known: dict[Any, bool] = {}
    for index, call in enumerate(graph.calls):
        if is_known(graph, index):
            continue
        verdicts, key = known, key_of(graph, index)
        if isinstance(key, str):
            verdicts = VERDICTS.setdefault(type(call.operation), {})
        if key not in verdicts:
            verdicts[key] = mixes(graph, probe, index)
        if verdicts[key]:
            yield index


def mixes(graph: KerasGraph, probe: Probe, index: int) -> bool:
    """Whether an operation mixes samples: one of those in it, if it can be followed, or seen from random samples."""
    name, call = graph.graph.ops[index].name, graph.calls[index]
    if any(isinstance(x, MIXING) for x in _keras.layers_in(call.operation)):
        return True
    inner = followed(graph, index)
    if inner is not None and all(is_known(inner, i) for i in range(len(inner.calls))):
        return False
    try:
        kinds: list[Combine | None] = []
        for training in (False, True):
            normalizes = training and _moments.batch_normalizations(call.operation)
            if probe.is_random(index, training):
                if not normalizes and probe.sees_others(index, training):
                    return True
            elif not normalizes:
                kinds += probe.of(index, training).outputs
    except Exception as error:
        Caught.theirs(error, f"{name} on random samples")
        warnings.warn(
            f"could not check that {name} treats the samples of a batch one by one ({brief(error)}); if it does not, "
            "its numbers depend on how the batch is divided",
            stacklevel=user_level(),
        )
        return False
    return any(kind not in (Combine.ROWS, Combine.SAME) for kind in kinds)


def followed(graph: KerasGraph, index: int) -> KerasGraph | None:
    """What a layer's `call` runs on symbols; `None` for what cannot be followed.

    What it does not show, conditions and constants, does not depend on the samples, and so does not mix them.
    """
    call, op = graph.calls[index], graph.graph.ops[index]
    layer = call.operation
    if not isinstance(layer, keras.layers.Layer):
        return None
    symbols = [keras.KerasTensor(graph.symbols[t].shape, graph.symbols[t].dtype) for t in op.inputs]
    left = iter(symbols)
    args, kwargs = call.arguments(lambda _: next(left))
    told = kwargs.pop("training", True)
    try:
        with RecordingScope([]), _keras_calls.telling(layer, told), _keras.autocast_of(layer):
            results = layer.call(*args, **{**kwargs, **_keras_calls.training_argument(layer, told)})
        return graph_from(keras.Function(symbols, results), opened=True)
    except Exception as error:
        Caught.log.debug("%s cannot be followed", layer.name, exc_info=error)
        return None


def check_independence(graph: KerasGraph, probe: Probe):
    """Check that no operation mixes the samples of a batch, which micro-batches would keep apart.

    Raises:
        ModelError: an operation whose output for a sample depends on other samples.
    """
    for index in mixing(graph, probe):
        raise ModelError(
            f"{graph.graph.ops[index].name} mixes the samples of a batch: what it computes for a whole batch is not "
            "what it computes for its parts. Use micro_batches=1 (LayerPlacementStrategy), or keep to operations that "
            "leave dimension 0 alone"
        )
