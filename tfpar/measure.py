"""When each action really ran."""

from functools import partial
from typing import Any

import keras
import tensorflow as tf

from tfpar.batch import Batch, Parts
from tfpar.errors import ModelError
from tfpar.schedule import Action
from tfpar.step import Steps, steps_of
from tfpar.timeline import Span, Timeline
from tfpar.traced import Traced


def measured(model: keras.Model, *batch: Any, repeat: int = 1) -> Timeline:
    """Train on one batch, and tell when each action ran: the fastest of `repeat` steps, after one to warm up.

    The clock is the host's. On a GPU an action counts as done when it has been enqueued: use TensorBoard's profiler
    there, in which actions have names such as `stage0/mb3/backward`.

    Args:
        model: compiled, constructed in the scope of a strategy.
        batch: `x, y` or `x, y, sample_weight`.

    Returns:
        Spans in seconds, the same type as `tfpar.simulate` returns.

    Raises:
        ModelError: a model that no strategy schedules.

    Example:
        >>> timeline = measured(model, x, y)  # doctest: +SKIP
        >>> print(timeline.draw())  # doctest: +SKIP
    """
    steps = steps_of(model)
    if steps is None or not model.compiled:
        raise ModelError(f"{model.name} is not scheduled: construct and compile it in the scope of a strategy")
    clocked = Traced(steps, partial(clocked_step, steps))
    runs = [clocked(batch) for _ in range(repeat + 1)][1:]
    return min((timeline(steps, run) for run in runs), key=lambda t: t.makespan)


def clocked_step(steps: Steps, data: Batch, parts: Parts) -> dict[str, tuple[tf.Tensor, tf.Tensor]]:
    """A scheduled step that returns the times of its actions."""
    if not steps.is_scheduled(data, parts):
        raise ModelError(
            f"{steps.model.name} is not scheduled: its train_step, compute_loss or loss needs the whole batch at once"
        )
    _, run = steps.scheduled_step(data, parts, clock=True)
    return {str(action): (run.starts[action], run.stops[action]) for action in run.stops}


def timeline(steps: Steps, times: dict[str, tuple[tf.Tensor, tf.Tensor]]) -> Timeline:
    """The times of a run as spans."""
    plan = steps.engine.plan
    parts = Parts(1, len({name.split("F")[1] for name in times if "F" in name}))
    schedule = steps.engine.schedule(steps.strategy, parts, steps.engine.training)
    actions: list[Action] = [a for a in schedule.order if str(a) in times]
    begin = min(float(start) for start, _ in times.values())
    return Timeline(
        tuple(
            Span(
                a.micro_batch if plan.mesh.data > 1 else schedule.device_of[a.stage],  # a replica has one part
                a,
                float(times[str(a)][0]) - begin,
                float(times[str(a)][1]) - begin,
            )
            for a in actions
        )
    )
