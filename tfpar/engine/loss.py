"""The loss of a micro-batch as its exact share of the loss of the batch."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import tensorflow as tf
from keras import tree

from tfpar.compat import _keras
from tfpar.compat._tf import independent
from tfpar.engine import micro_batch
from tfpar.engine.added_losses import weights
from tfpar.engine.engine import Engine, ExecutionGraph, MicroBatch, each, tensors_of
from tfpar.engine.executor import Execution
from tfpar.engine.program import Edge, Program, differentiable, restored
from tfpar.engine.vjp import present, watched
from tfpar.graph.batch_probe import Combine, loss_combination, reads_variables
from tfpar.graph.recording import HasMask
from tfpar.variables.logical import HOST


def separable(engine: Engine, data: Any, parts: int) -> bool:
    """Whether the compiled losses of a batch are sums of those of its parts, weighted by what their means divide by.

    They are if each reduces as Keras does, reads no variables, and gives each sample a value of its own; that is tried
    on random numbers.
    """
    if _keras.compilation(engine.model)[0] is None:
        return False

    _, y, sample_weight = tree.map_structure(_keras.symbolic, _keras.unpack_x_y_sample_weight(data))
    y_pred = tree.map_structure(lambda t: engine.graph.symbols[t], engine.graph.outputs)
    calls = _keras.loss_calls(engine.model, y, y_pred, sample_weight)
    if not all(_keras.has_plain_reduction(c.loss) for c in calls):
        return False
    if any(reads_variables(c.loss, c.y_true, c.y_pred) for c in calls):
        return False
    return parts == 1 or all(loss_combination(c.loss, c.y_true, c.y_pred) is Combine.ROWS for c in calls)


def structured(engine: Engine, outputs: dict[int, Edge], route: ExecutionGraph | None = None) -> Any:
    """The model's outputs as Keras expects them: in their structure, with their masks and logits."""
    graph = route.graph if route else engine.graph
    return tree.map_structure(lambda t: restored(t, outputs, graph), graph.outputs)


def whole_inputs(run: Execution) -> list[Edge]:
    """The model's flat inputs for the whole batch."""
    parts = zip(*run.inputs, strict=True)
    return [
        Edge(micro_batch.concat([e.value for e in edges]), micro_batch.concat([e.mask for e in edges]))
        for edges in parts
    ]


class LossProgram:
    """The compiled losses of a part and their gradient, as pure functions, traced or compiled once."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.call = engine.traced(self.run)
        self.turns: dict[tuple[Program, micro_batch.Parts], Callable] = {}

    def values(self, outputs: dict[int, Edge], y: Any, sample_weight: Any, totals: list[tf.Tensor] | None):
        """Each loss's share of the batch's, and their weighted sum.

        Args:
            outputs: the model's, for the part.
            totals: for each loss, what the mean over the whole batch divides by; `None` if this is all of it.
        """
        model, values, weighted = self.engine.model, [], []
        for n, call in enumerate(self.calls(outputs, y, sample_weight)):
            value, count = _keras.evaluate_loss(call)
            if totals is not None:
                value = value * tf.math.divide_no_nan(count, tf.cast(totals[n], count.dtype))
            values.append(tf.cast(value, _keras.loss_dtype(model)))
            weighted.append(values[-1] if call.weight is None else values[-1] * call.weight)
        return values, tf.add_n(weighted)

    def calls(self, outputs: dict[int, Edge], y: Any, sample_weight: Any) -> list[Any]:
        """What each loss is called with."""
        model, loss = self.engine.model, self.engine.training.loss
        if loss is None:
            return _keras.loss_calls(model, y, structured(self.engine, outputs), sample_weight)
        (t,) = self.engine.training.ends
        y_pred = loss.prediction(outputs[t].value)
        if outputs[t].mask is not None:
            _keras.set_keras_mask(y_pred, outputs[t].mask)
        return _keras.loss_calls(model, loss.targets(y), y_pred, sample_weight)

    def run(self, outputs: dict[int, Edge], y: Any, sample_weight: Any, totals: list[tf.Tensor] | None, scale: Any):
        """The values, and the gradient of `scale` times their sum by the outputs."""
        sources = {t: e.value for t, e in outputs.items() if differentiable(self.engine.graph.graph, t)}
        with tf.GradientTape() as tape:
            tape.watch(sources)
            values, loss = self.values(outputs, y, sample_weight, totals)
            scaled = loss * tf.cast(scale, loss.dtype)
        gradients = tape.gradient(scaled, sources)
        return values, loss, {t: g for t, g in gradients.items() if g is not None}

    def turn(self, run: Execution, program: Program) -> Callable:
        """The last stage, the losses, and the backward pass through both, as one function."""
        if (program, run.parts) not in self.turns:

            def turn(variables, edges, y, sample_weight, totals, scale, share):
                inside, outside = watched(run, program, variables, edges)
                sources = [*inside.values(), *outside.values()]
                with tf.GradientTape() as tape:
                    tape.watch(sources)
                    result = program.run(variables, edges)
                    if totals is not None and any(e.mask is not None for e in result.edges.values()):
                        raise HasMask
                    values, loss = self.values(result.edges, y, sample_weight, totals)
                    scaled = loss * tf.cast(scale, loss.dtype)
                    for (i, k), weight in weights(run, result, share).items():
                        added = result.losses[i][k]
                        scaled += tf.cast(
                            added * tf.cast(weight, added.dtype) * tf.cast(scale, added.dtype), loss.dtype
                        )
                found = tape.gradient(scaled, sources)
                return result, values, loss, present(inside, found), present(outside, found[len(inside) :])

            self.turns[program, run.parts] = self.engine.traced(turn)
        return self.turns[program, run.parts]


@dataclass
class Head:
    """The end of a scheduled pass: computes the loss of each part, and starts its backward pass.

    Args:
        program: the losses.
        y, sample_weight: for the whole batch.
        targets: the same for each part.
        scale: what the optimizer multiplies the loss with.
        training: what the layers are told.
    """

    program: LossProgram
    y: Any
    sample_weight: Any
    targets: list[Any]
    scale: Any
    training: bool | None
    values_of: list[list[tf.Tensor]] = field(default_factory=list)
    losses: list[tf.Tensor] = field(default_factory=list)
    totals: list[tf.Tensor] | None = None

    @property
    def parts(self) -> int:
        """How many there are."""
        return len(self.targets)

    @property
    def can_turn(self) -> bool:
        """Whether what the mean over the batch divides by follows from shapes that are known before the outputs are."""
        engine = self.program.engine
        symbols = [engine.graph.symbols[t] for t in engine.training.ends]
        plain = all(None not in s.shape[1:] and s.shape and _keras.get_keras_mask(s) is None for s in symbols)
        return self.parts == 1 or (plain and not engine.has_masks)

    def __call__(self, run: Execution, m: MicroBatch, outputs: dict[int, Edge]) -> dict[int, tf.Tensor]:
        """The cotangents of the model's outputs for part `m`."""
        if self.parts > 1 and self.totals is None:
            masks = {}
            if any(e.mask is not None for e in outputs.values()):
                found = self.program.engine.masks(whole_inputs(run), self.training)
                masks = dict(zip(run.route.ends, found, strict=True))
            self.totals = self.whole_counts({t: (e.value.shape, e.value.dtype) for t, e in outputs.items()}, masks)
        y, sample_weight = each(tf.identity, self.targets[run.part(m)])
        values, loss, cotangents = self.program.call(outputs, y, sample_weight, self.totals, self.scale)
        independent(tensors_of((loss, cotangents)))
        self.count(run, m, values, loss)
        return cotangents

    def turn(self, run: Execution, m: MicroBatch, program: Program, variables: list[tf.Tensor], edges: dict[int, Edge]):
        """The last stage's result for part `m`, the gradients of its variables, and the cotangents of its edges."""
        if self.parts > 1 and self.totals is None:
            symbols = self.program.engine.graph.symbols
            self.totals = self.whole_counts({t: (symbols[t].shape, symbols[t].dtype) for t in run.route.ends}, {})
        y, sample_weight = each(tf.identity, self.targets[run.part(m)])
        result, values, loss, gradients, cotangents = self.program.turn(run, program)(
            variables, edges, y, sample_weight, self.totals, self.scale, run.weights[run.part(m)]
        )
        independent(tensors_of((values, loss)))
        self.count(run, m, values, loss)
        return result, gradients, cotangents

    def count(self, run: Execution, m: MicroBatch, values: list[tf.Tensor], loss: tf.Tensor):
        """Note the loss of a part, which all ranks find alike."""
        if not m.lane.tensor:
            self.values_of.append(values)
            self.losses.append(loss)

    def whole_counts(self, outputs: dict[int, tuple[Any, Any]], masks: dict[int, Any]) -> list[tf.Tensor]:
        """What each loss's mean over the whole batch divides by, before all parts are through.

        It depends on shapes, weights and masks, not on predictions: zeros stand for those.
        """
        with tf.device(HOST):
            rows = micro_batch.count(self.y)
            like = {t: Edge(tf.zeros([rows, *shape[1:]], dtype), masks.get(t)) for t, (shape, dtype) in outputs.items()}
            for t, (shape, _) in outputs.items():
                like[t].value.set_shape([None, *shape[1:]])
            calls = self.program.calls(like, self.y, self.sample_weight)
            return [_keras.evaluate_loss(call)[1] for call in calls]

    def total(self) -> tf.Tensor:
        """The compiled loss of the batch."""
        return tf.add_n(self.losses)

    def each_loss(self) -> list[tf.Tensor]:
        """Each output's loss for the batch, without its weight."""
        return [tf.add_n(parts) for parts in zip(*self.values_of, strict=True)]
