"""A live model from one strategy to another."""

import gc
from collections.abc import Sequence, Set
from typing import Any

import keras
import tensorflow as tf

from tfpar.compat import _keras, _keras_parts
from tfpar.errors import ScopeError
from tfpar.trainer.hooks import USED, KerasHooks, family
from tfpar.trainer.saving import variables_of
from tfpar.variables.logical import LogicalVariable


def convert(model: keras.Model, other: Any):
    """Move a model, the models in it, their optimizers and metrics to another strategy.

    Variables go through host memory, one by one, and wait there until the model is used.

    Args:
        other: a strategy of tfpar.

    Raises:
        ScopeError: `other` is no strategy of tfpar; or another model, which has been used and stays behind, shares
            variables with this one. Nothing has moved then.
    """
    if not hasattr(other, "_adopt"):
        raise ScopeError(f"convert moves a model to another strategy of tfpar; received {other!r}")
    check_alone(model)
    for hooks in family(model):
        inner = hooks.model
        for variable in variables_of(inner):
            hand_over(variable, other)
        for optimizer in _keras_parts.optimizers_of(inner):
            _keras.give_strategy(optimizer, other)
        inner.train_function = inner.test_function = inner.predict_function = None
        other._adopt(inner)


def check_alone(model: keras.Model):
    """Refuse to take variables away from the functions of a model that stays behind.

    Raises:
        ScopeError: there is such a model; the message names it.
    """
    ours, moved = family(model), {id(v) for v in variables_of(model)}
    if user_of(moved, ours):
        gc.collect()  # one that is gone does not count
    if hooks := user_of(moved, ours):
        raise ScopeError(
            f"{hooks.model.name} has been used and shares variables with {model.name}: it would keep the old ones. "
            f"Convert {hooks.model.name}, or delete it first"
        )


def user_of(variables: Set[int], ours: Sequence[KerasHooks]) -> KerasHooks | None:
    """Of other models that have been used, one that has any of these variables."""
    others = [hooks for hooks in USED if hooks not in ours]
    return next((s for s in others if any(id(v) in variables for v in s.engine.graph.variables)), None)


def hand_over(variable: keras.Variable, other: Any):
    """Let a variable belong to another strategy."""
    stored = _keras.stored(variable)
    if isinstance(stored, LogicalVariable):
        stored.hand_over(other)
    elif isinstance(stored, tf.distribute.DistributedValues):  # each replica has its own, for sums
        value = variable.numpy()
        with other.scope():
            new = tf.Variable(
                value, trainable=False, name=variable.name, aggregation=stored.aggregation,
                synchronization=tf.VariableSynchronization.ON_READ,
            )  # fmt: skip
        _keras.set_value(variable, new)
