"""From the gradients of all replicas to new weights: reduced, then Keras' own optimizer on each replica."""

# r: replica, v: variable of the graph

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from tfpar import _keras, _keras_parts, outcome
from tfpar._tf import LogicalReplica
from tfpar.collectives import add, all_reduce, on_each
from tfpar.collectives import reduced as summed
from tfpar.engine import Engine, device_of, layout_of, read
from tfpar.layout import REPLICATED
from tfpar.passes import Pass
from tfpar.variables import LogicalVariable


class Update:
    """The end of a scheduled step.

    Args:
        strategy: gives `mesh` and `cross_device_ops`.
        engine: of the model.
    """

    def __init__(self, strategy: Any, engine: Engine):
        self.strategy, self.engine, self.model = strategy, engine, engine.model
        mesh = strategy.mesh
        self.lanes = [mesh.device(data=r, tensor=k) for r in range(mesh.data) for k in range(mesh.tensor)]
        self.program, self.squares = engine.traced(self.bound), engine.traced(self.squared)

    def penalties(self) -> list[tf.Tensor]:
        """What regularizers make of the weights."""
        found = []
        for variable in self.model.trainable_weights:
            if variable.regularizer is not None:
                with tf.device(device_of(variable)):
                    found.append(variable.regularizer(whole(variable)))
        return found

    def __call__(self, run: Pass, scale: Any):
        """Reduce the gradients of a pass and apply them."""
        reduced = self.reduced(run)
        compiled = self.engine.jit_compile and self.strategy.mesh.stage == 1
        if self.engine.layouts and not by_parts(self.model):
            self.apply([self.whole_gradient(*pair) for pair in zip(self.places, reduced, strict=True)], scale)
            return
        if len(self.lanes) == 1 and not compiled:
            self.apply([parts[0] for parts in reduced], scale)
            return
        norms = [None] * len(self.lanes)
        if self.engine.layouts and _keras_parts.clips_norms(self.model.optimizer):
            found = self.of_lanes(self.squares, reduced, scale, norms)
            # what all ranks have counts once
            norms = summed([n * w for n, w in zip(found, self.counted(), strict=True)], self.lanes)
        self.of_lanes(self.program, reduced, scale, norms)

    def of_lanes(self, program: Callable, reduced: list[list[Any]], scale: Any, norms: list) -> list:
        """The results of a program on each lane, for its copies and gradients."""

        def run(r: int) -> Any:
            copies = [_keras.stored(v).copies[r] for v in self.variables]
            return program(copies, [parts[r] for parts in reduced], tf.identity(scale), norms[r])

        return on_each(self.lanes, run)

    def counted(self) -> list[tf.Tensor]:
        """For each lane, with what weight each of its gradients counts in a norm."""
        divided = [layout_of(v) != REPLICATED for v in self.model.trainable_weights]
        return [tf.constant([float(d or not r) for d in divided], tf.float64) for r in range(len(self.lanes))]

    def reduced(self, run: Pass) -> list[list[Any]]:
        """The gradient of each weight on each lane; those that come from one stage are added up together."""
        weights = self.places
        last = {v: min(s for s, _, of in run.gradients if of == v) for _, _, v in run.gradients}
        buckets: dict[int, list[int]] = {}
        for n, v in enumerate(weights):
            buckets.setdefault(last.get(v, 0) if run.ranks == 1 else 0, []).append(n)
        found: list[list[Any]] = [[] for _ in weights]
        for members in buckets.values():
            gradients = {n: outcome.gradients(run, weights[n]) for n in members}
            summands = [n for n in members if run.ranks == 1 or weights[n] in self.engine.partial]
            with tf.name_scope("all-reduce/weights"):
                totals = all_reduce([gradients[n] for n in summands], self.lanes, self.strategy.cross_device_ops)
            gradients.update(zip(summands, totals, strict=True))
            for n in members:
                found[n] = gradients[n]
        return found

    @property
    def places(self) -> list[int | None]:
        """The variable of the graph that each weight to train is."""
        places = self.engine.graph.places
        return [places.get(id(weight)) for weight in self.model.trainable_weights]

    def whole_gradient(self, v: int | None, parts: Sequence[Any]) -> Any:
        """The gradient of a weight, from those of its parts."""
        if v not in self.engine.layouts or parts[0] is None:
            return parts[0]
        return tf.concat([tf.convert_to_tensor(part) for part in parts], self.engine.layouts[v].dim)

    @property
    def variables(self) -> list[keras.Variable]:
        """All that the optimizer reads or writes."""
        known = {id(v): v for v in [*self.model.trainable_weights, *self.model.optimizer.variables]}
        return [v for v in known.values() if isinstance(_keras.stored(v), LogicalVariable)]

    @contextlib.contextmanager
    def binding(self, copies: Sequence[tf.Variable]) -> Iterator[None]:
        """Inside, variables are the copies of one lane."""
        variables = [_keras.stored(v) for v in self.variables]
        for variable, copy in zip(variables, copies, strict=True):
            copy.handle._distributed_container = weakref.ref(variable)
        bound = {id(variable): copy for variable, copy in zip(variables, copies, strict=True)}
        with LogicalReplica(self.strategy, 0, bound):
            yield

    def bound(self, copies: Sequence[tf.Variable], gradients: Sequence[Any], scale: tf.Tensor, squares: Any = None):
        """Apply gradients to the copies of one lane; traced once for all of them.

        Args:
            squares: of the norm of each weight's gradient, where the lane has a part of it only.
        """
        with self.binding(copies):
            self.apply(gradients, scale, squares)

    def squared(self, copies: Sequence[tf.Variable], gradients: Sequence[Any], scale: tf.Tensor, _: Any) -> tf.Tensor:
        """The squared norm of each of a lane's gradients, those of regularizers added; 0 where there is none."""
        with self.binding(copies):
            return tf.stack([square(g) for g in self.with_penalties(gradients, scale)])

    def apply(self, gradients: Sequence[Any], scale: Any, squares: tf.Tensor | None = None):
        """Add the gradients of regularizers, and let the optimizer do its work."""
        total = self.with_penalties(gradients, scale)
        given = contextlib.nullcontext()
        if squares is not None:
            present = [n for n, gradient in enumerate(total) if gradient is not None]
            given = _keras_parts.given_norms(self.model.optimizer, [squares[n] for n in present])
        with given:
            self.model.optimizer.apply_gradients(zip(total, self.model.trainable_weights, strict=True))

    def with_penalties(self, gradients: Sequence[Any], scale: Any) -> list[Any]:
        """The gradients, those of regularizers added."""
        total = []
        for weight, gradient in zip(self.model.trainable_weights, gradients, strict=True):
            if weight.regularizer is not None:
                with tf.device(_keras.stored(weight).device):
                    value = tf.convert_to_tensor(_keras.stored(weight))
                    with tf.GradientTape() as tape:
                        tape.watch(value)
                        penalty = weight.regularizer(value)
                        scaled = penalty * tf.cast(scale, penalty.dtype)
                    of_penalty = tape.gradient(scaled, value)
                    gradient = of_penalty if gradient is None else add(gradient, of_penalty)
            total.append(gradient)
        return total


def whole(variable: keras.Variable) -> tf.Tensor:
    """All of a variable's value, wherever its parts are."""
    return _keras.stored(variable).read_value() if layout_of(variable) != REPLICATED else read(variable)


def square(gradient: Any) -> tf.Tensor:
    """The squared norm of a gradient."""
    if gradient is None:
        return tf.zeros((), tf.float64)
    values = gradient.values if isinstance(gradient, tf.IndexedSlices) else gradient
    return tf.cast(tf.reduce_sum(tf.square(values)), tf.float64)


ELEMENTWISE = {
    getattr(keras.optimizers, name)
    for name in ("SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "Adadelta", "Adamax", "Nadam", "Ftrl", "Lion")
}
SUMS = (keras.regularizers.L1, keras.regularizers.L2, keras.regularizers.L1L2)


def by_parts(model: keras.Model) -> bool:
    """Whether each part of a weight can be updated on its own: nothing looks at more than one element at a time."""
    optimizer = model.optimizer
    whole = optimizer.use_ema or optimizer.gradient_accumulation_steps
    divided = [v for v in model.trainable_weights if layout_of(v) != REPLICATED]
    plain = all(v.constraint is None and (v.regularizer is None or type(v.regularizer) in SUMS) for v in divided)
    return type(optimizer) in ELEMENTWISE and not whole and plain
