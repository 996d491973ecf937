"""What tells layers apart: those that are alike run the same, each on weights of its own."""

import inspect
from typing import Any

import keras
import numpy as np

from tfpar.compat import _keras, _keras_parts
from tfpar.errors import Caught


def attributes(value: Any, around: tuple[int, ...] = ()) -> Any:
    """What a layer, or another object, holds, as far as it can be compared; else something that no other has.

    Args:
        around: the `id`s of objects that hold it.
    """
    if id(value) in around:
        return len(around) - around.index(id(value))
    around += (id(value),)
    if isinstance(value, keras.layers.Layer):
        own = {name: attributes(x, around) for name, x in _keras_parts.own_attributes(value).items()}
        return id(type(value)), value.dtype_policy.name, own  # classes of one factory have one name
    if isinstance(value, keras.Variable):
        return value.shape, value.dtype, value.trainable
    if isinstance(value, dict):
        return {key: attributes(x, around) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [attributes(x, around) for x in value]
    if isinstance(value, np.ndarray):
        return value.shape, value.dtype, value.tobytes()
    own = isinstance(value, keras.initializers.Initializer | keras.regularizers.Regularizer | keras.DTypePolicy)
    if own and type(value).__module__.startswith("keras."):  # others may leave out what tells them apart
        return keras.saving.serialize_keras_object(value)
    plain = value is None or isinstance(value, bool | int | float | str | np.generic | type)
    return value if plain or (inspect.isfunction(value) and not value.__closure__) else id(value)


def config_of(layer: keras.layers.Layer) -> Any:
    """The configuration of a layer without names; something that no other layer has, if that does not tell it apart."""
    try:
        return without_names(layer.get_config()) if all(map(tells_apart, _keras.layers_in(layer))) else id(layer)
    except NotImplementedError:  # as Keras says of a class that does not have one
        return id(layer)
    except Exception as error:
        Caught.theirs(error, f"{layer.name}.get_config")
        return id(layer)


def tells_apart(layer: keras.layers.Layer) -> bool:
    """Whether a layer's configuration has all that its class is told: one that it inherits may leave out a flag."""
    kinds = type(layer).__mro__
    if next(kind for kind in kinds if "get_config" in vars(kind)) is keras.layers.Layer:
        return True  # Keras has noted what it was told
    own = [kind for kind in kinds if not kind.__module__.startswith(("keras.", "keras_hub.", "builtins"))]
    made = [inspect.signature(vars(kind)["__init__"]) for kind in own if "__init__" in vars(kind)]
    told = [p for signature in made for p in list(signature.parameters.values())[1:]]
    named = {p.name for p in told if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    return not named or named <= layer.get_config().keys()


def without_names(config: Any) -> Any:
    """A configuration without the names of layers."""
    if isinstance(config, dict):
        return {k: without_names(v) for k, v in config.items() if k not in ("name", "shared_object_id")}
    return [without_names(v) for v in config] if isinstance(config, list | tuple) else config
