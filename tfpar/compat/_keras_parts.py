"""Private names of Keras that dividing layers and losses between ranks needs. Checked against Keras 3.15.1.

`tests/compat/test_keras_parts.py` tests each.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import tree
from keras.src.backend.common import global_state
from keras.src.backend.tensorflow import nn
from keras.src.optimizers.multi_optimizer import MultiOptimizer
from keras.src.saving import saving_lib

from tfpar.compat._keras import graph_of, layers_in
from tfpar.compat._replaced import InThread

backend_nn = nn  # what `keras.ops` calls


def outside_of_scope(function: Callable, *args: Any) -> Any:
    """Call a function outside of the `keras.StatelessScope`."""
    scope = global_state.get_global_attribute("stateless_scope")
    global_state.set_global_attribute("stateless_scope", None)
    try:
        return function(*args)
    finally:
        global_state.set_global_attribute("stateless_scope", scope)


# while it saves, Keras makes objects to see which attributes all of them have; an optimizer has a variable
SAVING_IN_SCOPE = InThread((saving_lib, "get_attr_skipset", outside_of_scope))


@contextlib.contextmanager
def shaped(values: Sequence[tuple[keras.Variable, tf.Tensor]]) -> Iterator[None]:
    """Inside, each variable has the shape of the value that it is given, which may be a part of its own."""
    other = [(v, v._shape, tuple(value.shape)) for v, value in values if tuple(value.shape) != tuple(v._shape)]
    for variable, _, shape in other:
        variable._shape = shape
    try:
        yield
    finally:
        for variable, shape, _ in other:
            variable._shape = shape


@contextlib.contextmanager
def unchecked(operation: Any) -> Iterator[None]:
    """Inside, a layer and the layers in it take inputs of other sizes than they were built for."""
    layers = layers_in(operation)
    specs = [layer.input_spec for layer in layers]
    for layer in layers:
        vars(layer)["_input_spec"] = None
    try:
        yield
    finally:
        for layer, spec in zip(layers, specs, strict=True):
            vars(layer)["_input_spec"] = spec


@contextlib.contextmanager
def replaced(operation: Any, **attributes: Any) -> Iterator[None]:
    """Inside, attributes of a layer have other values."""
    before = {name: vars(operation)[name] for name in attributes}
    vars(operation).update(attributes)
    try:
        yield
    finally:
        vars(operation).update(before)


@contextlib.contextmanager
def given_method(operation: Any, name: str, method: Callable) -> Iterator[None]:
    """Inside, a method of a layer is this one."""
    vars(operation)[name] = method
    try:
        yield
    finally:
        del vars(operation)[name]


def converted_arguments(layer: keras.layers.Layer, arguments: Any) -> Any:
    """What `Layer.__call__` makes of tensors among its arguments: floats in the layer's compute dtype."""
    if not layer._convert_input_args:
        return arguments
    convert = layer.dtype_policy.convert_input
    return tree.map_structure(lambda a: convert(a, layer.autocast, layer.input_dtype), arguments)


def is_plain_layer(layer: keras.layers.Layer) -> bool:
    """Whether calling a layer is no more than its `call`, and its weights are not quantized."""
    return is_its_call(layer) and layer.dtype_policy.quantization_mode is None


def is_its_call(layer: keras.layers.Layer) -> bool:
    """Whether calling a layer is no more than its `call`."""
    return (
        type(layer).__call__ is keras.layers.Layer.__call__
        and all(inner.activity_regularizer is None for inner in layers_in(layer))
        and getattr(layer, "_remat_mode", None) is None
    )


def handled(function: Callable, layer: keras.layers.Layer, *args: Any, **kwargs: Any) -> Any:
    """A layer's `__call__`, by whoever handles calls in this thread: `(function, layer, args, kwargs) -> outputs`."""
    return LAYER_CALLS.given.get()(function, layer, args, kwargs)


LAYER_CALLS = InThread((keras.layers.Layer, "__call__", handled))
OF_ALL_LAYERS = {*vars(keras.layers.Layer()), "_build_shapes_dict"}


def own_attributes(layer: keras.layers.Layer) -> dict[str, Any]:
    """The attributes of a layer that Keras and TensorFlow do not give to all."""
    return {k: v for k, v in vars(layer).items() if k not in OF_ALL_LAYERS and not k.startswith("_self_")}


@contextlib.contextmanager
def unwritten(variables: Sequence[keras.Variable]) -> Iterator[None]:
    """Inside, these variables take no new values; whether a value fits is checked."""
    with contextlib.ExitStack() as stack:
        for variable in variables:
            stack.enter_context(given_method(variable, "_direct_assign", lambda value: None))
        yield


def slots_of(optimizer: Any) -> Iterator[tuple[keras.Variable, keras.Variable]]:
    """What a built optimizer keeps for each weight, with the weight."""
    weights = optimizer._trainable_variables
    for name, values in vars(optimizer).items():
        if isinstance(values, list) and len(values) == len(weights) and name not in NOT_SLOTS:
            pairs = zip(values, weights, strict=True)
            yield from ((slot, weight) for slot, weight in pairs if isinstance(slot, keras.Variable))


def slot_bytes_of(optimizer: Any, weights: Sequence[keras.Variable]) -> dict[int, int]:
    """Bytes of the slots that an optimizer, built or not, keeps for each of these weights, by `id`.

    One like it is built for small weights that stand for these: the sizes of their dims tell slots of other shapes.
    """
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    if isinstance(inner, MultiOptimizer):
        return {}
    like, sizes = type(inner).from_config(inner.get_config()), (2, 3, 5, 7, 11, 13, 17, 19)
    small = []
    for weight in weights:
        shape = sizes[: len(weight.shape)]
        small.append(keras.Variable(np.zeros(shape), dtype=weight.dtype, name=weight.name))
        small[-1]._path = weight.path
    like.build(small)
    found = dict.fromkeys(map(id, weights), 0)
    of = {id(stand_in): weight for stand_in, weight in zip(small, weights, strict=True)}
    for slot, stand_in in slots_of(like):
        weight = of[id(stand_in)]
        real = dict(zip(sizes, weight.shape, strict=False))
        count = int(np.prod([real.get(n, n) for n in slot.shape]))
        found[id(weight)] += count * tf.as_dtype(slot.dtype).size
    return found


def optimizers_of(model: keras.Model) -> list[keras.optimizers.Optimizer]:
    """A model's own optimizer, and others that it has been given as attributes."""
    found = [model.optimizer] if model.compiled and model.optimizer is not None else []
    found += [value for value in vars(model).values() if isinstance(value, keras.optimizers.Optimizer)]
    return list({id(optimizer): optimizer for optimizer in found}.values())


NOT_SLOTS = ("_variables", "_trainable_variables")


def clips_norms(optimizer: Any) -> bool:
    """Whether an optimizer clips gradients by their norms."""
    return bool(optimizer.clipnorm or optimizer.global_clipnorm)


@contextlib.contextmanager
def given_norms(optimizer: Any, squares: Sequence[tf.Tensor], total: tf.Tensor) -> Iterator[None]:
    """Inside, an optimizer clips its gradients by these squared norms in place of its own.

    Args:
        squares: one for each gradient, before its loss scale is taken out.
        total: of all gradients, also those that the optimizer is not given.
    """
    factor = 1.0 if optimizer.loss_scale_factor is None else float(optimizer.loss_scale_factor)

    def clip(gradients):
        norms = [tf.sqrt(square) / factor for square in squares]
        if optimizer.clipnorm:
            limit = optimizer.clipnorm
            scales = [limit / tf.maximum(norm, limit) for norm in norms]
        else:
            limit, norm = optimizer.global_clipnorm, tf.sqrt(total) / factor
            scales = [limit * tf.minimum(1.0 / norm, 1.0 / limit) + (norm - norm)] * len(norms)
            gradients = [tf.convert_to_tensor(g) for g in gradients]  # as Keras: here sparse ones become dense
        return [scaled(g, tf.cast(s, g.dtype)) for g, s in zip(gradients, scales, strict=True)]

    def scaled(gradient, scale):
        if isinstance(gradient, tf.IndexedSlices):
            return tf.IndexedSlices(gradient.values * scale, gradient.indices, gradient.dense_shape)
        return gradient * scale

    with given_method(optimizer, "_clip_gradients", clip):
        yield


def only_loss(model: keras.Model) -> Any:
    """The loss of a model that was compiled with one, of its one output, without a weight; `None` for others."""
    compiled = model._compile_loss
    if compiled is None or compiled._user_loss_weights is not None or isinstance(compiled._user_loss, list | dict):
        return None
    loss = keras.losses.get(compiled._user_loss)
    named = loss is keras.losses.sparse_categorical_crossentropy  # a string gives the function
    return keras.losses.SparseCategoricalCrossentropy() if named else loss


def loss_options(loss: Any) -> dict[str, Any]:
    """What a loss of Keras passes on to the function that computes it."""
    return loss._fn_kwargs


def own_dtype(variable: keras.Variable) -> str:
    """The dtype in which a variable is stored, whatever layers read it in now."""
    return variable._dtype


def input_symbols(model: keras.Model) -> Any:
    """The symbolic inputs of a model's graph in their structure; `None` for a model that has no graph."""
    function = graph_of(model)
    return function._inputs_struct if function is not None else None


def flat_outputs(model: keras.Model) -> list[Any]:
    """The symbolic outputs of a model's graph; none for a model that has no graph."""
    function = graph_of(model)
    return tree.flatten(function._outputs_struct) if function is not None else []
