"""The loss of a part of a batch, as its exact share of that of the batch: an operation of the training graph."""

# t: tensor of the graph

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import keras
import tensorflow as tf
from keras import tree

from tfpar.compat import _keras
from tfpar.compat._tf import unfolded
from tfpar.engine import metrics, micro_batch
from tfpar.engine.batch_results import structured
from tfpar.engine.engine import Engine, ExecutionGraph
from tfpar.engine.executor import Execution
from tfpar.engine.program import Edge
from tfpar.graph.batch_probe import Combine, loss_combination, reads_variables
from tfpar.graph.keras_graph import Call, Ref, Rewriting
from tfpar.graph.recording import HasMask
from tfpar.planning.op_graph import Op, Tensor
from tfpar.planning.partition import Partition
from tfpar.tensor_parallel.loss_parallel import CrossEntropy
from tfpar.variables.parts import HOST

NAME = "the loss"  # of the operation


def symbolic_calls(engine: Engine, y: Any, sample_weight: Any) -> list[Any]:
    """What the compiled losses would be called with, as symbols."""
    y, sample_weight = tree.map_structure(_keras.symbolic, (y, sample_weight))
    return _keras.loss_calls(engine.model, y, engine.graph.output_symbols, sample_weight)


def separable(engine: Engine, data: Any, parts: int) -> bool:
    """Whether the compiled losses of a batch are sums of those of its parts, weighted by what their means divide by.

    They are if each reduces as Keras does, reads no variables, and gives each sample a value of its own; that is tried
    on random numbers.
    """
    if _keras.compilation(engine.model)[0] is None or not _keras.is_compiled_built(engine.model):
        return False

    _, y, sample_weight = _keras.unpack_x_y_sample_weight(data)
    calls = symbolic_calls(engine, y, sample_weight)
    if not all(_keras.has_plain_reduction(c.loss) for c in calls):
        return False
    if any(reads_variables(c.loss, c.y_true, c.y_pred) for c in calls):
        return False
    return parts == 1 or all(loss_combination(c.loss, c.y_true, c.y_pred) is Combine.ROWS for c in calls)


class Loss:
    """The compiled losses of a part of a batch: their weighted sum, then each of them, as shares of the batch's.

    Args:
        model: that was compiled with them.
        loss: what ranks find together, of which the losses are computed in the place of the model's output.
        masked: whether it is known that outputs may have masks.
    """

    variables = ()

    def __init__(self, model: keras.Model, loss: CrossEntropy | None, masked: bool):
        self.model, self.loss, self.masked = model, loss, masked

    def __call__(self, y_pred: Any, y: Any, sample_weight: Any, totals: list[tf.Tensor] | None) -> list[tf.Tensor]:
        """The losses.

        Args:
            totals: for each loss, what the mean over the whole batch divides by; `None` if this is all of it.

        Raises:
            HasMask: an output has a mask, but `totals` were counted without.
        """
        if totals is not None and not self.masked and any(map(has_mask, tree.flatten(y_pred))):
            raise HasMask
        values, weighted = [], []
        for n, call in enumerate(self.calls(y_pred, y, sample_weight)):
            value, count = _keras.evaluate_loss(call)
            if totals is not None:
                value = value * tf.math.divide_no_nan(count, tf.cast(totals[n], count.dtype))
            values.append(tf.cast(value, _keras.loss_dtype(self.model)))
            weighted.append(values[-1] if call.weight is None else values[-1] * call.weight)
        return [tf.add_n(weighted), *values]

    def calls(self, y_pred: Any, y: Any, sample_weight: Any) -> list[Any]:
        """What each loss is called with."""
        if self.loss is None:
            return _keras.loss_calls(self.model, y, y_pred, sample_weight)
        prediction = self.loss.prediction(y_pred)
        if has_mask(y_pred):
            _keras.set_keras_mask(prediction, _keras.get_keras_mask(y_pred))
        return _keras.loss_calls(self.model, self.loss.targets(y), prediction, sample_weight)


def has_mask(x: Any) -> bool:
    """Whether Keras has attached a mask to a tensor."""
    return _keras.get_keras_mask(x) is not None


def with_loss(engine: Engine, y: Any, sample_weight: Any, several: bool, training: bool) -> ExecutionGraph:
    """The way through the model to the loss and, if possible, what metrics find of samples.

    Targets, their weights and totals are its last inputs; the model's outputs are there only if metrics need them.

    Args:
        several: whether these are parts of a batch.
    """
    symbols, masked = tree.map_structure(_keras.symbolic, (y, sample_weight)), has_masks(engine)
    key = (
        str(tree.map_structure(lambda s: None if s is None else (s.shape, s.dtype), symbols)),
        several,
        masked,
        training,
    )
    if key not in engine.losses:
        loss, base = engine.before_loss(training)
        found = metrics.values_of_samples(engine, symbols[0])
        end, number = Loss(engine.model, loss, masked), len(symbolic_calls(engine, y, sample_weight))
        engine.losses[key] = extended(base, end, *symbols, number, several, found)
    return engine.losses[key]


def extended(
    base: ExecutionGraph, end: Loss, y: Any, sample_weight: Any, number: int, several: bool,
    found: list[keras.KerasTensor] | None,
) -> ExecutionGraph:  # fmt: skip
    """The same way with so many losses of these symbols at its end, and what metrics find."""
    new, scalar = Rewriting(base.graph), keras.KerasTensor((), _keras.loss_dtype(end.model))
    new.ops, new.calls = list(base.graph.graph.ops), list(base.graph.calls)

    def tensor(symbol: keras.KerasTensor) -> int:
        kind = tf.as_dtype(symbol.dtype)
        return new.tensor(Tensor((), kind.size, kind.is_floating), symbol)

    def given(symbol: keras.KerasTensor | None) -> Ref | None:
        if symbol is None:
            return None
        new.inputs.append(tensor(symbol))
        return Ref(new.inputs[-1])

    targets = tree.map_structure(given, (y, sample_weight))
    totals = [given(scalar) for _ in range(number)] if several else None
    y_pred = Ref(base.graph.graph.outputs[-1]) if end.loss else tree.map_structure(Ref, base.graph.outputs)
    made = tuple(tensor(scalar) for _ in range(1 + number))
    new.ends += made
    call = Call(end, (y_pred, *targets, totals), {}, made)
    new.add(Op(NAME, call.inputs, made, stage=base.stages[-1]), call)
    last = base.partition.stages - 1
    alone = last in base.collectives or last in base.global_batch
    values = None
    if found is not None:
        values = tuple(map(tensor, found))
        arguments = tree.map_structure(Ref, base.graph.outputs), targets[0]
        call = Call(metrics.Metrics(end.model), arguments, {}, values)
        new.add(Op(metrics.NAME, call.inputs, values, stage=base.stages[-1]), call)
        new.ends += values
    graph = new.finish()
    if found is not None:
        graph = replace(graph, graph=replace(graph.graph, outputs=tuple(new.ends)))
    added = len(graph.calls) - len(base.graph.calls)
    cut = Partition(graph.graph, (*base.partition.stage_of, *[last + alone] * added))
    return replace(base, graph=graph, partition=cut, loss=made, metrics=values)


def has_masks(engine: Engine) -> bool:
    """Whether outputs have masks, as far as it is known."""
    return engine.has_masks or any(map(has_mask, tree.flatten(engine.graph.output_symbols)))


def totals(
    engine: Engine, y: Any, sample_weight: Any, inputs: Sequence[Sequence[Edge]], training: bool | None,
    loss: CrossEntropy | None,
) -> list[tf.Tensor]:  # fmt: skip
    """What each loss's mean over the whole batch divides by, before any part of it is through.

    It depends on shapes, weights and masks, not on predictions: zeros stand for those.

    Args:
        inputs: of the model, flat, for each part.
        loss: what ranks find together.
    """
    source = engine.training.source
    outputs, like = source.graph.outputs, {}
    with tf.device(HOST):
        edges: list[Any] = [None] * len(outputs)
        if has_masks(engine) or any(None in source.symbols[t].shape[1:] for t in outputs):
            edges = engine.outputs(list(map(micro_batch.joined, zip(*inputs, strict=True))), training)
        for t, edge in zip(outputs, edges, strict=True):
            shape = (edge.value if edge else source.symbols[t]).shape[1:]
            shape = (*shape[:-1], 2) if loss else shape  # a token's own class, and all others
            known = None not in tuple(shape)
            zeros = (
                tf.zeros([micro_batch.count(y), *shape], source.symbols[t].dtype)
                if known
                else tf.zeros_like(edge.value)
            )
            zeros.set_shape([None, *shape])
            like[t] = Edge(zeros, edge and edge.mask)
        y_pred = structured(source, like)
        return [
            unfolded(_keras.evaluate_loss(call)[1])
            for call in Loss(engine.model, loss, True).calls(y_pred, y, sample_weight)
        ]


def of_batch(run: Execution) -> list[tf.Tensor]:
    """The compiled loss of the batch, then each output's loss without its weight."""
    return [tf.add_n([run.values[m][t].value for m in run.firsts]) for t in run.route.loss]
