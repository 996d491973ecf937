"""What compiled metrics find of each sample, in the programs that predict: the batch is not put together for them."""

# t: tensor of the graph

from typing import Any

import keras
import tensorflow as tf
from keras import tree

from tfpar.compat import _keras, _keras_metrics
from tfpar.engine import batch_results
from tfpar.engine.engine import Engine
from tfpar.engine.executor import Execution

NAME = "the metrics"  # of the operation


class Metrics:
    """What the compiled metrics of a model take the means of, for a part of a batch."""

    variables = ()

    def __init__(self, model: keras.Model):
        self.model = model

    def __call__(self, y_pred: Any, y: Any) -> list[tf.Tensor]:
        return [call.values() for call in _keras_metrics.metric_calls(self.model, y, y_pred)]


def values_of_samples(engine: Engine, y: Any) -> list[keras.KerasTensor] | None:
    """Symbols of what each metric finds of samples; `None` if a metric is not a mean of such values.

    Args:
        y: symbols of the targets.
    """
    if not _keras_metrics.are_means_of_samples(engine.model):
        return None
    batch = engine.graph.symbols[engine.graph.graph.inputs[0]].shape[:1]
    specs = [call.spec() for call in _keras_metrics.metric_calls(engine.model, y, engine.graph.output_symbols)]
    if not all(spec.shape for spec in specs):
        return None
    return [keras.KerasTensor((*batch, *spec.shape[1:]), spec.dtype) for spec in specs]


def computed(run: Execution, x: Any, y: Any, sample_weight: Any) -> dict[str, Any]:
    """What Keras' `compute_metrics` gives for the batch of a finished pass."""
    model, route = run.engine.model, run.route
    if route.metrics is None:
        y_pred = batch_results.structured(route.graph, batch_results.outputs(run))
        return model.compute_metrics(x, y, y_pred, sample_weight=sample_weight)
    values = []
    for t in route.metrics:
        edge = batch_results.output(run, t)
        values.append(edge.value)
        _keras.set_keras_mask(edge.value, edge.mask)
    y_pred = tree.map_structure(lambda t: tf.zeros(()), route.graph.outputs)  # which nothing reads
    with _keras_metrics.given_values(model, values):
        return model.compute_metrics(x, y, y_pred, sample_weight=sample_weight)
