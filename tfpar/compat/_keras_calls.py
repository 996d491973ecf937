"""Private names of Keras that taking over models and their calls needs. Checked against Keras 3.15.1.

`tests/compat/test_keras.py` tests each.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf
from keras.src.backend.common.global_state import get_global_attribute, set_global_attribute
from keras.src.backend.tensorflow.trainer import TensorFlowTrainer
from keras.src.layers.layer import CallContext
from keras.src.trainers.trainer import Trainer

from tfpar.compat._replaced import Replacement
from tfpar.errors import ScopeError


def adopt(original: Callable, model: Any):
    """A model's `__init__`, which reads the strategy of the scope around it; Keras nowhere tells that of the model."""
    original(model)
    adopt = getattr(model._distribute_strategy, "_adopt", None)
    if adopt is not None:
        adopt(model)


def of_this_scope(original: Callable, model: Any, *args: Any, **options: Any) -> Any:
    """A method of a model, if the model belongs to the scope around here."""
    scope = tf.distribute.get_strategy()
    if hasattr(scope, "_adopt") and getattr(model._distribute_strategy, "extended", None) is not scope.extended:
        whose = "of none" if not hasattr(model._distribute_strategy, "_adopt") else "of another strategy"
        raise ScopeError(
            f"{model.name} was constructed outside of this {type(scope).__name__}'s scope, so it is {whose}, and "
            f"{original.__name__} would not divide it. Construct it inside:\n"
            "    with strategy.scope():\n        model = ...\n        model.compile(...)"
        )
    return original(model, *args, **options)


# while any strategy's scope is open: new models come to their strategy, and models of others are refused
ADOPTION = Replacement(
    (TensorFlowTrainer, "__init__", adopt),
    (Trainer, "compile", of_this_scope),
    (TensorFlowTrainer, "fit", of_this_scope),
)


# ---- calls


def training_argument(model: keras.Model, training: bool | None) -> dict[str, Any]:
    """What Keras passes on of `training` when a step calls the model."""
    return {"training": training} if model._call_has_training_arg else {}


def own_call(model: keras.Model, *args: Any, training: bool | None, **kwargs: Any) -> Any:
    """What the model's class computes, whatever `running` has put in its place."""
    with telling(model, training), own_calls():
        return type(model).call(model, *args, **kwargs, **training_argument(model, training))


@contextlib.contextmanager
def telling(layer: keras.layers.Layer, training: bool | None) -> Iterator[None]:
    """Inside, layers that are called without a `training` argument take this one, as they do in a call of `layer`."""
    before, context = get_global_attribute("current_call_ctx"), CallContext(layer)
    context.set_value("training", training)
    set_global_attribute("current_call_ctx", context)
    try:
        yield
    finally:
        set_global_attribute("current_call_ctx", before)


def told() -> bool | None:
    """The `training` that the call of a layer around here was given."""
    context = get_global_attribute("current_call_ctx")
    return None if context is None else context.get_value("training")


@contextlib.contextmanager
def running(model: keras.Model, call: Callable, losses: list[tf.Tensor]) -> Iterator[None]:
    """Inside, `model(x)` runs `call` in place of the model's own, and `model.losses` are what `losses` holds."""
    before = vars(model).get("call", model.call)
    vars(model).update(call=call, _losses_override=losses)
    try:
        yield
    finally:
        vars(model).update(call=before, _losses_override=[])


OWN: contextvars.ContextVar[bool] = contextvars.ContextVar("own", default=False)


@contextlib.contextmanager
def own_calls() -> Iterator[None]:
    """Inside, calls of models are those of their classes."""
    token = OWN.set(True)
    try:
        yield
    finally:
        OWN.reset(token)


def override_losses(model: keras.Model, losses: list[tf.Tensor]):
    """Let `model.losses` be these until its next call; none stand for those of its weights."""
    vars(model)["_losses_override"] = losses
