"""Run a schedule on paper."""

from tfpar.cost import StageCost
from tfpar.schedule import Action, Schedule, needs
from tfpar.timeline import Span, Timeline


def simulate(schedule: Schedule, cost: StageCost) -> Timeline:
    """When each action of `schedule` starts and stops if every action takes what `cost` says.

    A device runs one action at a time, in its order; an action starts when the device is free and what it needs has
    arrived. Transfers overlap with computation.

    Example:
        >>> from tfpar.schedule import gpipe
        >>> timeline = simulate(gpipe(stages=4, micro_batches=4), StageCost.even(4))
        >>> round(timeline.bubble, 3)  # (S - 1) / (M + S - 1)
        0.429
    """
    free = [0.0] * len(schedule.devices)
    stopped: dict[Action, float] = {}
    spans = []
    for action in schedule.order:
        device = schedule.device_of[action.stage]
        arrived = [stopped[n] + cost.between(n, action) for n in needs(action, schedule.stages)]
        start = max([free[device], *arrived])
        stopped[action] = free[device] = start + cost.seconds(action)
        spans.append(Span(device, action, start, stopped[action]))
    return Timeline(tuple(spans))
