"""From the gradients of all replicas to new weights: reduced, then Keras' own optimizer on each replica."""

# r: replica, v: variable of the graph

import weakref
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from tfpar import outcome
from tfpar._tf import LogicalReplica
from tfpar.collectives import all_reduce
from tfpar.engine import Engine, device_of, read
from tfpar.passes import Pass, add
from tfpar.program import Function
from tfpar.variables import LogicalVariable


class Update:
    """The end of a scheduled step.

    Args:
        strategy: gives `mesh` and `cross_device_ops`.
        engine: of the model.
    """

    def __init__(self, strategy: Any, engine: Engine):
        self.strategy, self.engine, self.model = strategy, engine, engine.model
        self.replicas = [strategy.mesh.device(data=r) for r in range(strategy.mesh.data)]
        self.program = Function(self.bound, engine.jit_compile)

    def penalties(self) -> list[tf.Tensor]:
        """What regularizers make of the weights."""
        found = []
        for variable in self.model.trainable_weights:
            if variable.regularizer is not None:
                with tf.device(device_of(variable)):
                    found.append(variable.regularizer(read(variable)))
        return found

    def __call__(self, run: Pass, scale: Any):
        """Reduce the gradients of a pass and apply them."""
        reduced = self.reduced(run)
        compiled = self.engine.jit_compile and self.strategy.mesh.stage == 1
        if len(self.replicas) == 1 and not compiled:
            self.apply([parts[0] for parts in reduced], scale)
            return
        for r, device in enumerate(self.replicas):
            with tf.device(device):
                if self.engine.eager:
                    with LogicalReplica(self.strategy, r):
                        self.apply([parts[r] for parts in reduced], scale)
                else:
                    copies = [v.value.copies[r] for v in self.variables]
                    self.program(copies, [parts[r] for parts in reduced], tf.identity(scale))

    def reduced(self, run: Pass) -> list[list[Any]]:
        """The gradient of each weight on each replica; those that come from one stage are added up together."""
        places = {id(variable): v for v, variable in enumerate(self.engine.graph.variables)}
        weights = [places.get(id(weight)) for weight in self.model.trainable_weights]
        last = {v: min(s for s, _, of in run.gradients if of == v) for _, _, v in run.gradients}
        buckets: dict[int, list[int]] = {}
        for n, v in enumerate(weights):
            buckets.setdefault(last.get(v, 0), []).append(n)
        found: list[list[Any]] = [[] for _ in weights]
        for members in buckets.values():
            gradients = [outcome.gradients(run, weights[n]) for n in members]
            totals = all_reduce(gradients, self.replicas, self.strategy.cross_device_ops)
            for n, total in zip(members, totals, strict=True):
                found[n] = total
        return found

    @property
    def variables(self) -> list[keras.Variable]:
        """All that the optimizer reads or writes."""
        known = {id(v): v for v in [*self.model.trainable_weights, *self.model.optimizer.variables]}
        return [v for v in known.values() if isinstance(v.value, LogicalVariable)]

    def bound(self, copies: Sequence[tf.Variable], gradients: Sequence[Any], scale: tf.Tensor):
        """Apply gradients to the copies of one replica; traced once for all of them."""
        variables = [v.value for v in self.variables]
        for variable, copy in zip(variables, copies, strict=True):
            copy.handle._distributed_container = weakref.ref(variable)
        bound = {id(variable): copy for variable, copy in zip(variables, copies, strict=True)}
        with LogicalReplica(self.strategy, 0, bound):
            self.apply(gradients, scale)

    def apply(self, gradients: Sequence[Any], scale: Any):
        """Add the gradients of regularizers, and let the optimizer do its work."""
        weights = self.model.trainable_weights
        total = []
        for weight, gradient in zip(weights, gradients, strict=True):
            if weight.regularizer is not None:
                with tf.device(weight.value.device):
                    value = tf.convert_to_tensor(weight.value)
                    with tf.GradientTape() as tape:
                        tape.watch(value)
                        penalty = weight.regularizer(value)
                        scaled = penalty * tf.cast(scale, penalty.dtype)
                    of_penalty = tape.gradient(scaled, value)
                    gradient = of_penalty if gradient is None else add(gradient, of_penalty)
            total.append(gradient)
        self.model.optimizer.apply_gradients(zip(total, weights, strict=True))
