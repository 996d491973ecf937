"""Compiled metrics in two steps: what they find of each sample, and its mean."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import keras
import tensorflow as tf
from keras.metrics import MeanMetricWrapper, Metric

from tfpar.compat._keras import output_spec, overrides, with_mask_of
from tfpar.compat._keras_parts import given_method

__all__ = ["MetricCall", "are_means_of_samples", "given_values", "metric_calls"]


OF_SAMPLES = tuple(
    getattr(keras.metrics, name)
    for name in (
        "binary_accuracy", "categorical_accuracy", "sparse_categorical_accuracy", "top_k_categorical_accuracy",
        "sparse_top_k_categorical_accuracy", "binary_crossentropy", "categorical_crossentropy",
        "sparse_categorical_crossentropy", "mean_squared_error", "mean_absolute_error",
        "mean_absolute_percentage_error", "mean_squared_logarithmic_error", "kl_divergence", "poisson",
    )
)  # fmt: skip


class MetricCall(NamedTuple):
    """One of the compiled metrics with the arguments that Keras resolved for it."""

    metric: Metric
    y_true: Any
    y_pred: Any

    def values(self) -> tf.Tensor:
        """What the metric takes the mean of, one or more numbers of each sample, with the mask of the predictions."""
        found = self.metric._fn(self.y_true, self.y_pred, **self.metric._fn_kwargs)
        return with_mask_of(self.y_pred, tf.identity(found))

    def spec(self) -> keras.KerasTensor:
        """The symbol of these values, if the call is one of symbols."""
        return output_spec(
            lambda y_true, y_pred: self._replace(y_true=y_true, y_pred=y_pred).values(), self.y_true, self.y_pred
        )


def compiled_metrics(model: keras.Model) -> list[Metric]:
    """The metrics that a model was compiled with, each once, in the order of Keras; they have been built."""
    compiled = model._compile_metrics
    of_outputs = (*compiled._flat_metrics, *compiled._flat_weighted_metrics) if compiled is not None else ()
    return list(dict.fromkeys(metric for several in of_outputs if several for metric in several.metrics))


def are_means_of_samples(model: keras.Model) -> bool:
    """Whether all compiled metrics are means, over samples, of one of `OF_SAMPLES`.

    Other functions, also of Keras, may look at the whole batch: hinge losses ask whether all of it is 0 or 1.
    """
    compiled = model._compile_metrics
    if overrides(model, "compute_metrics") or (compiled is not None and not compiled.built):
        return False
    return all(
        isinstance(metric, MeanMetricWrapper)
        and type(metric).update_state is MeanMetricWrapper.update_state
        and any(metric._fn is known for known in OF_SAMPLES)
        and metric._fn_kwargs.get("axis", -1) == -1
        for metric in compiled_metrics(model)
    )


@contextlib.contextmanager
def updated_by(model: keras.Model, update: Callable) -> Iterator[None]:
    """Inside, `update(metric, y_true, y_pred, sample_weight)` is called in the place of each compiled metric's own."""
    with contextlib.ExitStack() as stack:
        for metric in compiled_metrics(model):
            stack.enter_context(given_method(metric, "update_state", partial(update, metric)))
        yield


def metric_calls(model: keras.Model, y: Any, y_pred: Any) -> list[MetricCall]:
    """What the compiled metrics would be called with, found by Keras' own matching of names and structures."""
    found: list[MetricCall] = []

    def record(metric, y_true, y_pred, sample_weight=None):
        found.append(MetricCall(metric, y_true, y_pred))

    with updated_by(model, record):
        if model._compile_metrics is not None:
            model._compile_metrics.update_state(y, y_pred)
    return found


@contextlib.contextmanager
def given_values(model: keras.Model, values: Sequence[tf.Tensor]) -> Iterator[None]:
    """Inside, the compiled metrics take the means of these, in the order of `metric_calls`, whatever they are given."""
    left = iter(values)

    def update(metric, y_true, y_pred, sample_weight=None):
        value, own = next(left), metric._fn
        vars(metric)["_fn"] = lambda *args, **options: tf.identity(value)  # without its mask
        try:
            return type(metric).update_state(metric, y_true, value, sample_weight)
        finally:
            vars(metric)["_fn"] = own

    with updated_by(model, update):
        yield
