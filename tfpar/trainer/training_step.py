"""A step in the order of the schedule: forward and loss of all parts; in training, backward and the update, too."""

import contextlib
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import keras
import tensorflow as tf
from keras import tree

from tfpar.compat import _keras, _keras_calls, _keras_parts
from tfpar.compat._tf import awaited, following_inputs, record_gradient, unrecorded
from tfpar.engine import batch_results, metrics, micro_batch
from tfpar.engine.collectives_inside import held_inside
from tfpar.engine.executor import Execution
from tfpar.engine.loss import of_batch, separable, totals, with_loss
from tfpar.engine.program import Edge
from tfpar.errors import user_level
from tfpar.planning.schedule import Kind

if TYPE_CHECKING:
    from tfpar.trainer.hooks import KerasHooks

NOT_FINITE = "the loss is not finite"


@dataclass
class TrainingStep:
    """What one batch does to a model that is trained, or is evaluated on it.

    Args:
        hooks: the model's `KerasHooks`; give `model`, `engine`, `strategy`, `update` and `checks`.
        data: the batch.
        parts: how it is divided.
        training: whether the model learns from it.
    """

    hooks: "KerasHooks"
    data: micro_batch.Batch
    parts: micro_batch.Parts
    training: bool = True

    def is_scheduled(self) -> bool:
        """Whether it can follow the schedule: with Keras' own step, and a loss that is a sum over parts."""
        step = "train_step" if self.training else "test_step"
        own = _keras.overrides(self.hooks.model, step, *_keras.LOSSES) is None
        return own and self.data.uniform and separable(self.hooks.engine, self.data.pieces[0], self.parts.count)

    def run(self, clock: bool = False) -> tuple[Any, Execution]:
        """The logs of the step, and what was run.

        Args:
            clock: whether to note when each action starts and stops.
        """
        hooks, model = self.hooks, self.hooks.model
        x, y, sample_weight = _keras.unpack_x_y_sample_weight(self.data.whole)
        with following_inputs():
            scale = model.optimizer.scale_loss(tf.ones((), _keras.loss_dtype(model)))
            run = self.execution(
                True, differentiate=True, loss_cotangent=scale, clock=clock, in_parts=hooks.update.in_parts
            )
            run.run(hooks.engine.schedule(hooks.strategy, self.parts, run.route), Kind.FORWARD, Kind.BACKWARD)
            loss = self.tracked_loss(run)
            with tf.control_dependencies([loss] if hooks.checks else []):
                batch_results.write_state(run)  # first: a layer may have assigned a weight that is trained
                if model.trainable_weights and not run.update:
                    hooks.update(run, scale)
                elif not run.update:
                    warnings.warn("The model does not have any trainable weights.", stacklevel=user_level())  # as Keras
            return metrics.computed(run, x, y, sample_weight), run

    def evaluate(self) -> Any:
        """The logs of the step, which learns nothing."""
        with following_inputs():
            run = self.execution(True)
            run.run(self.hooks.engine.schedule(self.hooks.strategy, self.parts, run.route), Kind.FORWARD)
            self.tracked_loss(run)
            batch_results.write_state(run)
            return metrics.computed(run, *_keras.unpack_x_y_sample_weight(self.data.whole))

    def tracked_loss(self, run: Execution) -> tf.Tensor:
        """The loss of the batch, which the model's trackers are told."""
        hooks, model = self.hooks, self.hooks.model
        compiled, *each_loss = of_batch(run)
        if run.update:  # what programs end with runs, though nothing else may need it
            with tf.control_dependencies([awaited(run.values[m][run.route.loss[0]].value) for m in run.all]):
                compiled = tf.identity(compiled)
        losses = [compiled, *batch_results.added_losses(run).values(), *hooks.update.penalties()]
        loss = tf.add_n([tf.cast(tf.reduce_sum(part), _keras.loss_dtype(model)) for part in losses])
        loss = stop_if_not_finite(loss) if hooks.checks and self.training else loss
        _keras.track_loss(model, loss, micro_batch.count(_keras.unpack_x_y_sample_weight(self.data.whole)[0]))
        for tracker, value in zip(_keras.loss_trackers(model), each_loss, strict=False):
            tracker.update_state(value, sample_weight=self.data.rows)  # as Keras: the static size, if there is one
        return loss

    def execution(self, loss: bool, alone: bool = False, **options: Any) -> Execution:
        """The batch before its first action.

        Args:
            loss: whether the pass goes on to the loss.
            alone: whether actions are run one by one: the loss of a part is its own, and no program waits for others.
            options: of `Execution`.
        """
        model, engine, training = self.hooks.model, self.hooks.engine, self.training
        pieces = [_keras.unpack_x_y_sample_weight(part) for part in self.data.parts(self.parts.count)]
        inputs = [
            list(map(Edge, _keras.graph_inputs(model, _keras.converted_inputs(model, part)))) for part, *_ in pieces
        ]
        told = _keras_calls.training_argument(model, training).get("training")
        route = engine.route(training)
        if loss:
            _, *targets = _keras.unpack_x_y_sample_weight(self.data.whole)
            several = not alone and self.parts.count > 1
            route = with_loss(engine, *targets, several, training)
            by_ranks, _ = engine.before_loss(training)
            divisors = totals(engine, *targets, inputs, told, by_ranks) if several else []
            for part, (_, *of_part) in zip(inputs, pieces, strict=True):
                ranks = tree.flatten(of_part)[:1] if by_ranks else []  # who find what the loss follows from
                part += [Edge(leaf) for leaf in (*ranks, *tree.flatten(of_part), *divisors) if leaf is not None]
        if loss and not alone and not options.get("clock"):
            route = held_inside(engine, route, self.parts)
        update = None
        if options.get("differentiate") and not options.get("clock") and not self.hooks.checks:
            rows = micro_batch.count(self.data.whole)
            equal = isinstance(rows, int) and rows % engine.mesh.count("samples") == 0
            update = self.hooks.update.inside(route, self.parts, equal)
        shares = micro_batch.shares([micro_batch.count(part) for part, *_ in pieces])
        return Execution(engine, self.parts, inputs, shares, told, route=route, update=update, **options)


def checked_loss(model: keras.Model) -> contextlib.AbstractContextManager:
    """Inside, a loss that Keras computes stops the step if it is not finite."""
    original = model.compute_loss
    return _keras_parts.given_method(model, "compute_loss", lambda *a, **k: stop_if_not_finite(original(*a, **k)))


def stop_if_not_finite(loss: tf.Tensor) -> tf.Tensor:
    """The loss, which stops the step if it is not finite; its gradient waits for that."""
    found = unrecorded(lambda: tf.debugging.check_numerics(loss, NOT_FINITE))

    def back(gradient: tf.Tensor) -> list[tf.Tensor]:
        with tf.control_dependencies([found]):
            return [tf.identity(gradient)]

    return record_gradient([found], [loss], back)[0]
