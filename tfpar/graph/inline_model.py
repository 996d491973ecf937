"""Models and layers that are made of layers, opened by calling them on symbolic inputs and checked by numbers."""

# t: tensor of the graph, i: operation

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import tree

from tfpar.compat import _keras, _keras_calls
from tfpar.errors import Caught, ModelError, brief
from tfpar.graph.keras_graph import KerasGraph, graph_from
from tfpar.graph.recording import RecordingScope
from tfpar.graph.samples import first_that_works, small_samples


def opened(model: keras.Model, x: Any, training: bool) -> KerasGraph:
    """A subclassed model as the layers that its `call` calls.

    Args:
        x: a few samples of real input, for the check.

    Raises:
        ModelError: `call` does not take symbolic inputs, or what it does with them is not what it does with numbers.
    """
    flat = tree.flatten(x)

    def call(*values):
        return _keras_calls.own_call(model, tree.pack_sequence_as(x, values), training=training)

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
) -> KerasGraph:
    """The layers and operations that `call` runs, as a graph.

    Args:
        layer: whose call it is.
        call: of flat tensors.
        symbols, samples: for each of them; without samples, nothing is checked.

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
    expected, changed = perturbed(lambda: call(*samples))
    try:
        inside, written = perturbed(lambda: graph.run(samples, training))
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
        stored = _keras.stored(variable)
        return stored * 1.05 + tf.cast(0.01, stored.dtype)


def perturbed(run: Callable[[], Any]) -> tuple[list[np.ndarray], set[int]]:
    """The flat results of `run` with perturbed weights, and which variables it would write."""
    with Perturbed([]) as scope:
        results = [np.asarray(r) for r in tree.flatten(run())]
    return results, set(scope.written)
