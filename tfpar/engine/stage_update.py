"""The optimizer's work for the weights of a stage, on what one lane has of them."""

# n: weight of the stage

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from tfpar.comm.gradients import add
from tfpar.compat import _keras, _keras_parts
from tfpar.compat._tf import LogicalReplica, set_container
from tfpar.engine.description import Description
from tfpar.variables.logical import LogicalVariable
from tfpar.variables.shard_view import ShardView


class StageUpdate:
    """Keras' own optimizer on the copies of one lane, as functions that are traced once for all lanes.

    Args:
        strategy: of the model.
        optimizer: of the model.
        weights: of the stage, to train.
        detached: of these, what is updated away from its copies.
        variables: what the optimizer reads or writes where it is.
    """

    def __init__(
        self,
        strategy: Description,
        optimizer: keras.optimizers.Optimizer,
        weights: Sequence[keras.Variable],
        detached: Sequence[LogicalVariable],
        variables: Sequence[LogicalVariable],
    ):
        self.strategy, self.optimizer = strategy, optimizer
        self.weights, self.detached, self.variables = weights, detached, variables

    @contextlib.contextmanager
    def binding(self, copies: Sequence[tf.Variable], values: Sequence[tf.Tensor]) -> Iterator[list]:
        """Inside, variables are the copies of one lane, and detached ones have these values; gives the latter."""
        detached = [ShardView(variable, value) for variable, value in zip(self.detached, values, strict=True)]
        bound: dict[int, Any] = {id(away.variable): away for away in detached}
        for variable, copy in zip(self.variables, copies, strict=True):
            set_container(copy, variable)
            bound[id(variable)] = copy
        known = [*self.weights, *self.optimizer.variables]
        parts = [(v, bound[id(_keras.stored(v))]) for v in known if id(_keras.stored(v)) in bound]
        with LogicalReplica(self.strategy, 0, bound), _keras_parts.shaped(parts):
            yield detached

    def applied(
        self, copies: Sequence[tf.Variable], values: Sequence[tf.Tensor], gradients: Sequence[Any],
        scale: tf.Tensor, norms: Any,
    ) -> list[tf.Tensor]:  # fmt: skip
        """Apply gradients to the copies of one lane.

        Args:
            norms: the squared norms of the gradients of these weights, and of all of the model together, where this
                lane does not have them all.

        Returns:
            The new values of what was detached.
        """
        with self.binding(copies, values) as detached:
            apply(self.optimizer, self.weights, gradients, scale, norms)
            return [away.value() for away in detached]

    def squares(
        self, copies: Sequence[tf.Variable], values: Sequence[tf.Tensor], gradients: Sequence[Any],
        scale: tf.Tensor, _: Any,
    ) -> tf.Tensor:  # fmt: skip
        """The squared norm of each of a lane's gradients, those of regularizers added; 0 where there is none."""
        with self.binding(copies, values):
            return tf.stack([square(g) for g in with_penalties(self.weights, gradients, scale)])


def apply(
    optimizer: keras.optimizers.Optimizer,
    weights: Sequence[keras.Variable],
    gradients: Sequence[Any],
    scale: Any,
    norms: tuple[tf.Tensor, tf.Tensor] | None = None,
):
    """Add the gradients of regularizers, and let the optimizer do its work; `norms` as for `StageUpdate.applied`."""
    total = with_penalties(weights, gradients, scale)
    given = contextlib.nullcontext()
    if norms is not None:
        each, of_all = norms
        present = [each[n] for n, gradient in enumerate(total) if gradient is not None]
        given = _keras_parts.given_norms(optimizer, present, of_all)
    with given:
        optimizer.apply_gradients(zip(total, weights, strict=True))


def with_penalties(weights: Sequence[keras.Variable], gradients: Sequence[Any], scale: Any) -> list[Any]:
    """The gradients, those of regularizers added."""
    total = []
    for weight, gradient in zip(weights, gradients, strict=True):
        if weight.regularizer is not None:
            value = tf.convert_to_tensor(_keras.stored(weight))
            with tf.device(value.device or None), tf.GradientTape() as tape:
                tape.watch(value)
                penalty = weight.regularizer(value)
                scaled = penalty * tf.cast(scale, penalty.dtype)
            of_penalty = tape.gradient(scaled, value)
            gradient = of_penalty if gradient is None else add(gradient, of_penalty)
        total.append(gradient)
    return total


def square(gradient: Any) -> tf.Tensor:
    """The squared norm of a gradient."""
    if gradient is None:
        return tf.zeros((), tf.float64)
    values = gradient.values if isinstance(gradient, tf.IndexedSlices) else gradient
    return tf.cast(tf.reduce_sum(tf.square(values)), tf.float64)
