"""When each action really ran."""

from functools import partial
from typing import Any

import keras
import tensorflow as tf

from tfpar.engine.micro_batch import Batch, Parts
from tfpar.errors import ModelError
from tfpar.planning.schedule import Action
from tfpar.planning.timeline import Span, Timeline
from tfpar.trainer.hooks import KerasHooks, hooks_of
from tfpar.trainer.step_function import StepFunction
from tfpar.trainer.training_step import TrainingStep

__all__ = ["measured"]


def measured(model: keras.Model, *batch: Any, repeat: int = 1) -> Timeline:
    """Train on one batch, and return when each action ran: the fastest of `repeat` steps, after one to warm up.

    These steps change weights. Forward and backward of the last stage, which may be one program in `fit`, are two here.

    The clock is the host's. On a GPU an action counts as done when it has been enqueued: use TensorBoard's profiler
    there, in which actions have names such as `stage0/mb3/backward`.

    Args:
        model: compiled, constructed in the scope of a strategy.
        batch: `x, y` or `x, y, sample_weight`, each with samples along dim 0.
        repeat: how many steps are measured, at least 1.

    Returns:
        A `Timeline` in seconds, the type that `tfpar.simulate` returns. A span's `device` is an index into the devices
        of the mesh. Micro-batches are counted over all replicas, in the order of the batch. Where stages are cut into
        segments, `stage` is the number of the segment. What devices run together, such as an all-reduce, has no span.

    Raises:
        ModelError: a model that is of no strategy or not compiled, or whose `train_step`, `compute_loss` or loss needs
            the whole batch at once.
        BatchError: an empty batch, or arrays of unequal length.
        StageError: a step that fails on a device.

    Example:
        >>> timeline = measured(model, x, y)  # doctest: +SKIP
        >>> print(timeline.draw())  # doctest: +SKIP
    """
    hooks = hooks_of(model)
    if hooks is None or not model.compiled:
        raise ModelError(f"{model.name} is not scheduled: construct and compile it in the scope of a strategy")
    places: dict[str, tuple[int, Action]] = {}
    clocked = StepFunction(hooks, partial(clocked_step, hooks, places))
    runs = [clocked(batch) for _ in range(repeat + 1)][1:]
    return min((timeline(places, run) for run in runs), key=lambda t: t.makespan)


def clocked_step(
    hooks: KerasHooks, places: dict[str, tuple[int, Action]], data: Batch, parts: Parts
) -> dict[str, tuple[tf.Tensor, tf.Tensor]]:
    """A scheduled step that returns when each action starts and stops, by its name.

    Args:
        places: is given, by name, the number of each action's device, and the action with its micro-batch counted over
            all replicas.
    """
    step = TrainingStep(hooks, data, parts)
    if not step.is_scheduled():
        raise ModelError(
            f"{hooks.model.name} is not scheduled: its train_step, compute_loss or loss needs the whole batch at once"
        )
    _, run = step.run(clock=True)
    devices = hooks.strategy.mesh.devices
    for s, kind, m in run.order.stops:
        places[str((s, kind, m))] = devices.index(run.device(s, m.lane)), Action(s, kind, run.part_number(m))
    return {str(action): (run.order.starts[action], stop) for action, stop in run.order.stops.items()}


def timeline(places: dict[str, tuple[int, Action]], times: dict[str, tuple[tf.Tensor, tf.Tensor]]) -> Timeline:
    """The times of a run as spans, in the order of their starts."""
    begin = min(float(start) for start, _ in times.values())
    spans = [
        Span(*places[name], float(start) - begin, float(stop) - begin) for name, (start, stop) in times.items()
    ]  # fmt: skip
    return Timeline(tuple(sorted(spans, key=lambda span: span.start)))
