"""When each action ran on each device: simulated and measured runs have the same type."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from rich.console import Console, ConsoleOptions
from rich.text import Text

from tfpar.planning.cost import StageCost
from tfpar.planning.schedule import Action, Kind, Schedule, needs

FORWARD_DIGITS, BACKWARD_DIGITS, IDLE = "0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹", "·"
STYLE = {**dict.fromkeys(FORWARD_DIGITS, "cyan"), **dict.fromkeys(BACKWARD_DIGITS, "magenta"), IDLE: "dim"}


class Span(NamedTuple):
    """One action on one device.

    Args:
        device: its number.
        action: what ran.
        start, stop: seconds from the start of the step.
    """

    device: int
    action: Action
    start: float
    stop: float


@dataclass(frozen=True)
class Timeline:
    """When each action of one step ran on each device; `print(timeline.draw())` shows it.

    Args:
        spans: one for each action.

    Example:
        >>> first, second = Action(0, Kind.FORWARD, 0), Action(1, Kind.FORWARD, 0)
        >>> timeline = Timeline((Span(0, first, 0.0, 1.0), Span(1, second, 1.0, 2.0)))
        >>> timeline.bubble
        0.5
    """

    spans: tuple[Span, ...]

    @property
    def devices(self) -> int:
        """The number of devices, those without an action before the last one included."""
        return 1 + max(s.device for s in self.spans)

    @property
    def makespan(self) -> float:
        """Seconds from the first start to the last stop."""
        return max(s.stop for s in self.spans) - min(s.start for s in self.spans)

    def busy(self, device: int) -> float:
        """Seconds in which a device ran actions; where they overlap, they count once."""
        return sum(stop - start for start, stop in merged((s.start, s.stop) for s in self.spans if s.device == device))

    @property
    def bubble(self) -> float:
        """The share of all devices' time, from the first start to the last stop, in which they were idle: 0 to 1."""
        return 1 - sum(self.busy(d) for d in range(self.devices)) / (self.devices * self.makespan)

    def draw(self, width: int = 80) -> str:
        """A picture, one line per device: `0` is the forward pass of micro-batch 0, `⁰` its backward pass, `·` idle.

        Of a micro-batch's number the last digit is shown.

        Args:
            width: of the time axis, in characters; three more stand before it.

        Example:
            >>> from tfpar import one_f_one_b
            >>> print(simulate(one_f_one_b(2, 2), StageCost.even(2)).draw(width=9))
             0 01··⁰⁰·¹¹
             1 ·0⁰⁰1¹¹··
        """
        first = min(s.start for s in self.spans)
        scale = width / self.makespan
        lines = [[IDLE] * width for _ in range(self.devices)]
        for span in self.spans:
            digits = FORWARD_DIGITS if span.action.kind is Kind.FORWARD else BACKWARD_DIGITS
            start = min(int((span.start - first) * scale), width - 1)
            stop = max(start + 1, round((span.stop - first) * scale))
            for column in range(start, min(stop, width)):
                lines[span.device][column] = digits[span.action.micro_batch % 10]
        return "\n".join(f"{d:>2} {''.join(line)}" for d, line in enumerate(lines))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        for line in self.draw(options.max_width - 3).splitlines():
            yield Text.assemble(line[:3], *((mark, STYLE[mark]) for mark in line[3:]))


def merged(intervals: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The union of intervals, as disjoint ones."""
    union: list[tuple[float, float]] = []
    for start, stop in sorted(intervals):
        if union and start <= union[-1][1]:
            union[-1] = (union[-1][0], max(stop, union[-1][1]))
        else:
            union.append((start, stop))
    return union


def simulate(schedule: Schedule, cost: StageCost) -> Timeline:
    """When each action of `schedule` starts and stops if it takes as long as `cost` says.

    A device runs one action at a time, in its order; an action starts when the device is free and what it needs has
    arrived. Transfers overlap with computation.

    Args:
        cost: seconds of each stage of the schedule, and of transfers.

    Raises:
        IndexError: `cost` has fewer stages than the schedule.

    Example:
        >>> from tfpar import gpipe
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
