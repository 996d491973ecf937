"""Callbacks of `fit`, besides Keras' own."""

import keras

from tfpar.trainer.hooks import hooks_of


class CheckNumerics(keras.callbacks.Callback):
    """Makes a loss that is NaN or infinite an error that names the stage, the micro-batch and the layer it comes from.

    The step that failed changes no weights; the loss of every training step is looked at. A `train_step` of your own is
    checked where it calls `compute_loss`; a model of no strategy is not checked.

    Raises:
        StageError: from `fit`; with `run_eagerly=True` TensorFlow's `InvalidArgumentError`.

    Example:
        >>> model.fit(x, y, callbacks=[tfpar.CheckNumerics()])  # doctest: +SKIP
    """

    def on_train_begin(self, logs=None):
        hooks = hooks_of(self.model)
        if hooks is not None:
            hooks.check(True)
