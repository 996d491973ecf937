"""One training step in the order of the schedule: forward, loss and backward of all parts, and the update."""

import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import tensorflow as tf

from tfpar.compat import _keras, _keras_calls
from tfpar.compat._tf import following_inputs, record_gradient, unrecorded
from tfpar.engine import batch_results, micro_batch
from tfpar.engine.executor import Execution
from tfpar.engine.loss import Head, separable, structured
from tfpar.engine.program import Edge
from tfpar.errors import user_level
from tfpar.planning.schedule import Kind

if TYPE_CHECKING:
    from tfpar.trainer.hooks import KerasHooks

NOT_FINITE = "the loss is not finite"


@dataclass
class TrainingStep:
    """What one batch does to a model.

    Args:
        hooks: the model's `KerasHooks`; give `model`, `engine`, `strategy`, `loss`, `update` and `checks`.
        data: the batch.
        parts: how it is divided.
    """

    hooks: "KerasHooks"
    data: micro_batch.Batch
    parts: micro_batch.Parts

    def is_scheduled(self) -> bool:
        """Whether training can follow the schedule: with Keras' own step, and a loss that is a sum over parts."""
        own = _keras.overrides(self.hooks.model, "train_step", "compute_loss", "_compute_loss") is None
        return own and self.data.uniform and separable(self.hooks.engine, self.data.pieces[0], self.parts.count)

    def run(self, clock: bool = False) -> tuple[Any, Execution]:
        """The logs of the step, and what was run.

        Args:
            clock: whether to note when each action starts and stops.
        """
        hooks, model = self.hooks, self.hooks.model
        x, y, sample_weight = _keras.unpack_x_y_sample_weight(self.data.whole)
        with following_inputs():
            run = self.execution(True)
            scale = model.optimizer.scale_loss(tf.ones((), _keras.loss_dtype(model)))
            head = self.head(scale, run.training)
            run = replace(
                run, differentiate=True, head=head, loss_cotangent=scale, clock=clock, scatters=hooks.update.scatters
            )  # fmt: skip
            run.run(hooks.engine.schedule(hooks.strategy, self.parts, run.route), Kind.FORWARD, Kind.BACKWARD)
            losses = [head.total(), *batch_results.added_losses(run).values(), *hooks.update.penalties()]
            loss = tf.add_n([tf.cast(tf.reduce_sum(part), _keras.loss_dtype(model)) for part in losses])
            loss = stop_if_not_finite(loss) if hooks.checks else loss
            _keras.track_loss(model, loss, micro_batch.count(x))
            outputs = batch_results.outputs(run)
            for tracker, value in zip(_keras.loss_trackers(model), head.each_loss(), strict=False):
                tracker.update_state(value, sample_weight=self.data.rows)  # as Keras: the static size, if there is one
            with tf.control_dependencies([loss] if hooks.checks else []):
                batch_results.write_state(run)  # first: a layer may have assigned a weight that is trained
                if model.trainable_weights:
                    hooks.update(run, scale)
                else:
                    warnings.warn("The model does not have any trainable weights.", stacklevel=user_level())  # as Keras
            y_pred = structured(hooks.engine, outputs)
            return model.compute_metrics(x, y, y_pred, sample_weight=sample_weight), run

    def head(self, scale: Any, training: bool | None) -> Head:
        """The losses of the parts, where their backward passes start."""
        _, y, sample_weight = _keras.unpack_x_y_sample_weight(self.data.whole)
        targets = [targets for _, *targets in map(_keras.unpack_x_y_sample_weight, self.data.parts(self.parts.count))]
        return Head(self.hooks.loss, y, sample_weight, targets, scale, training)

    def execution(self, training: bool) -> Execution:
        """The batch before its first action."""
        model, engine = self.hooks.model, self.hooks.engine
        pieces = [_keras.unpack_x_y_sample_weight(part) for part in self.data.parts(self.parts.count)]
        inputs = [
            [Edge(v) for v in _keras.graph_inputs(model, _keras.converted_inputs(model, part))]
            + ([Edge(targets)] if training and engine.training.loss else [])
            for part, targets, _ in pieces
        ]
        shares = micro_batch.shares([micro_batch.count(part) for part, *_ in pieces])
        told = _keras_calls.training_argument(model, training).get("training")
        return Execution(engine, self.parts, inputs, shares, told, route=engine.route(training))


def stop_if_not_finite(loss: tf.Tensor) -> tf.Tensor:
    """The loss, which stops the step if it is not finite; its gradient waits for that."""
    found = unrecorded(lambda: tf.debugging.check_numerics(loss, NOT_FINITE))

    def back(gradient: tf.Tensor) -> list[tf.Tensor]:
        with tf.control_dependencies([found]):
            return [tf.identity(gradient)]

    return record_gradient([found], [loss], back)[0]
