"""The loss of a micro-batch as its exact share of the loss of the batch."""

from dataclasses import dataclass, field
from typing import Any

import tensorflow as tf
from keras import tree

from tfpar import _keras, batch
from tfpar._tf import independent
from tfpar.engine import Engine, each, tensors_of
from tfpar.probe import Combine, loss_combination, reads_variables
from tfpar.program import Edge, differentiable, restored
from tfpar.variables import HOST


def separable(engine: Engine, data: Any, parts: int) -> bool:
    """Whether the compiled losses of a batch are sums of those of its parts, weighted by what their means divide by.

    They are if each reduces as Keras does, reads no variables, and gives each sample a value of its own; that is tried
    on random numbers.
    """
    if engine.model._compile_loss is None:
        return False

    _, y, sample_weight = tree.map_structure(_keras.symbolic, _keras.unpack_x_y_sample_weight(data))
    y_pred = tree.map_structure(lambda t: engine.graph.symbols[t], engine.graph.outputs)
    calls = _keras.loss_calls(engine.model, y, y_pred, sample_weight)
    if not all(_keras.has_plain_reduction(c.loss) for c in calls):
        return False
    if any(reads_variables(c.loss, c.y_true, c.y_pred) for c in calls):
        return False
    return parts == 1 or all(loss_combination(c.loss, c.y_true, c.y_pred) is Combine.ROWS for c in calls)


def structured(engine: Engine, outputs: dict[int, Edge]) -> Any:
    """The model's outputs as Keras expects them: in their structure, with their masks and logits."""
    return tree.map_structure(lambda t: restored(t, outputs, engine.raw), engine.graph.outputs)


class LossProgram:
    """The compiled losses of a micro-batch and their gradient, as one pure function, traced or compiled once."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.call = self.run if engine.eager else tf.function(self.run, jit_compile=engine.jit_compile, autograph=False)

    def run(self, outputs: dict[int, Edge], y: Any, sample_weight: Any, totals: list[tf.Tensor] | None, scale: Any):
        """Each loss's share of the batch's, their weighted sum, and the gradient of `scale` times it.

        Args:
            outputs: the model's, for the micro-batch.
            totals: for each loss, what the mean over the whole batch divides by; `None` if this is all of it.
        """
        model, graph = self.engine.model, self.engine.graph.graph
        sources = {t: e.value for t, e in outputs.items() if differentiable(graph, t)}
        values, weighted = [], []
        with tf.GradientTape() as tape:
            tape.watch(sources)
            calls = _keras.loss_calls(model, y, structured(self.engine, outputs), sample_weight)
            for n, call in enumerate(calls):
                value, count = _keras.evaluate_loss(call)
                if totals is not None:
                    value = value * tf.math.divide_no_nan(count, tf.cast(totals[n], count.dtype))
                values.append(tf.cast(value, _keras.loss_dtype(model)))
                weighted.append(values[-1] if call.weight is None else values[-1] * call.weight)
            loss = tf.add_n(weighted)
            scaled = loss * tf.cast(scale, loss.dtype)
        gradients = tape.gradient(scaled, sources)
        return values, loss, {t: g for t, g in gradients.items() if g is not None}


@dataclass
class Head:
    """The end of a scheduled pass: computes the loss of each micro-batch, and starts its way back.

    Args:
        program: the losses.
        inputs: the model's flat inputs for the whole batch.
        y, sample_weight: for the whole batch.
        parts: how many micro-batches.
        scale: what the optimizer multiplies the loss with.
        training: what the layers are told.
    """

    program: LossProgram
    inputs: list[Edge]
    y: Any
    sample_weight: Any
    parts: int
    scale: Any
    training: bool | None
    values: list[list[tf.Tensor]] = field(default_factory=list)
    losses: list[tf.Tensor] = field(default_factory=list)
    totals: list[tf.Tensor] | None = None

    def __post_init__(self):
        self.targets = batch.split((self.y, self.sample_weight), self.parts)

    def __call__(self, m: int, outputs: dict[int, Edge]) -> dict[int, tf.Tensor]:
        """The cotangents of the model's outputs for micro-batch `m`."""
        if self.parts > 1 and self.totals is None:
            self.totals = self.whole_counts(outputs)
        y, sample_weight = each(tf.identity, self.targets[m])
        values, loss, cotangents = self.program.call(outputs, y, sample_weight, self.totals, self.scale)
        independent(tensors_of((loss, cotangents)))
        self.values.append(values)
        self.losses.append(loss)
        return cotangents

    def whole_counts(self, outputs: dict[int, Edge]) -> list[tf.Tensor]:
        """What each loss's mean over the whole batch divides by, before all micro-batches are through.

        It depends on shapes, weights and masks, not on predictions: zeros stand for those.
        """
        engine = self.program.engine
        masked = any(e.mask is not None for e in outputs.values())
        masks = engine.masks(self.inputs, self.training) if masked else {}
        with tf.device(HOST):
            rows = batch.count(self.y)
            like = {
                t: Edge(tf.zeros(tf.concat([[rows], tf.shape(e.value)[1:]], 0), e.value.dtype), masks.get(t))
                for t, e in outputs.items()
            }
            for t, e in outputs.items():
                like[t].value.set_shape([None, *e.value.shape[1:]])
            calls = _keras.loss_calls(engine.model, self.y, structured(engine, like), self.sample_weight)
            return [_keras.evaluate_loss(call)[1] for call in calls]

    def total(self) -> tf.Tensor:
        """The compiled loss of the batch."""
        return tf.add_n(self.losses)

    def each_loss(self) -> list[tf.Tensor]:
        """Each output's loss for the batch, without its weight."""
        return [tf.add_n(parts) for parts in zip(*self.values, strict=True)]
