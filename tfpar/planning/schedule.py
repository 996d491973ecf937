"""Pipeline schedules as data: for each device an ordered line of actions.

`0F2` is stage 0, forward, micro-batch 2. The simulator and the engine execute the same object.
"""

# s: stage, m: micro-batch, d: device

import enum
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from tfpar.errors import ScheduleError


class Kind(enum.Enum):
    """What an action computes."""

    FORWARD = "F"
    BACKWARD = "B"


class Action(NamedTuple):
    """Run one micro-batch through one stage; written `0F2`."""

    stage: int
    kind: Kind
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind.value}{self.micro_batch}"


@dataclass(frozen=True)
class Schedule:
    """What each device does, in order: `devices[d]` is the work of device `d`.

    A device may hold several stages. A schedule without backward actions is one for inference.

    Raises:
        ScheduleError: an action is missing or doubled, a stage is on two devices, or the lines wait for each other.

    Example:
        >>> print(one_f_one_b(stages=2, micro_batches=3))
        0F0 0F1 0B0 0F2 0B1 0B2
        1F0 1B0 1F1 1B1 1F2 1B2
    """

    devices: tuple[tuple[Action, ...], ...]

    def __post_init__(self):
        actions = [a for line in self.devices for a in line]
        if not actions:
            raise ScheduleError("a schedule needs at least one action")
        doubled = {a for a in actions if actions.count(a) > 1} if len(set(actions)) < len(actions) else set()
        if doubled:
            raise ScheduleError(f"{min(doubled, key=str)} stands more than once in the schedule\n{self}")
        kinds = [Kind.FORWARD, Kind.BACKWARD] if self.trains else [Kind.FORWARD]
        every = {Action(s, k, m) for s in range(self.stages) for k in kinds for m in range(self.micro_batches)}
        if every != set(actions):
            missing = ", ".join(sorted(str(a) for a in every - set(actions)))
            raise ScheduleError(f"the schedule lacks {missing}\n{self}")
        for s in range(self.stages):
            holders = [d for d, line in enumerate(self.devices) if any(a.stage == s for a in line)]
            if len(holders) > 1:
                raise ScheduleError(f"stage {s} is on devices {holders}: it must stay on one\n{self}")
        _ = self.order

    @cached_property
    def trains(self) -> bool:
        """Whether there are backward actions."""
        return any(a.kind is Kind.BACKWARD for line in self.devices for a in line)

    @cached_property
    def stages(self) -> int:
        """How many stages."""
        return 1 + max(a.stage for line in self.devices for a in line)

    @cached_property
    def micro_batches(self) -> int:
        """How many micro-batches."""
        return 1 + max(a.micro_batch for line in self.devices for a in line)

    @cached_property
    def device_of(self) -> tuple[int, ...]:
        """The device of each stage."""
        places = {a.stage: d for d, line in enumerate(self.devices) for a in line}
        return tuple(places[s] for s in range(self.stages))

    @cached_property
    def order(self) -> tuple[Action, ...]:
        """One order of all actions that respects every device's order and every dependency."""
        todo = [list(reversed(line)) for line in self.devices]
        done: dict[Action, None] = {}
        while any(todo):
            ready = [line for line in todo if line and all(n in done for n in needs(line[-1], self.stages))]
            if not ready:
                stuck = [
                    f"{line[-1]} waits for {next(n for n in needs(line[-1], self.stages) if n not in done)}"
                    for line in todo
                    if line
                ]
                raise ScheduleError(f"deadlock after {len(done)} actions: {', '.join(stuck)}\n{self}")
            done.update(dict.fromkeys(line.pop() for line in ready))
        return tuple(done)

    def in_flight(self, stage: int) -> int:
        """The most micro-batches of a stage that are forward but not yet backward: what its memory must hold."""
        alive = most = 0
        for action in self.devices[self.device_of[stage]]:
            if action.stage == stage:
                alive += 1 if action.kind is Kind.FORWARD else -1
                most = max(most, alive)
        return most if self.trains else 1

    def __str__(self) -> str:
        return "\n".join(" ".join(map(str, line)) for line in self.devices)


def needs(action: Action, stages: int) -> list[Action]:
    """The actions that must finish before `action` may start."""
    s, kind, m = action
    if kind is Kind.FORWARD:
        return [Action(s - 1, kind, m)] if s else []
    after = [Action(s + 1, kind, m)] if s < stages - 1 else []
    return [Action(s, Kind.FORWARD, m), *after]


def gpipe(stages: int, micro_batches: int) -> Schedule:
    """All forwards, then all backwards in reverse (fill-drain): every micro-batch's activations are held.

    Huang et al., "GPipe: Efficient Training of Giant Neural Networks using Pipeline Parallelism".

    Example:
        >>> print(gpipe(2, 2))
        0F0 0F1 0B1 0B0
        1F0 1F1 1B1 1B0
    """
    forward = [(Kind.FORWARD, m) for m in range(micro_batches)]
    backward = [(Kind.BACKWARD, m) for m in reversed(range(micro_batches))]
    return Schedule(tuple(tuple(Action(s, k, m) for k, m in forward + backward) for s in range(stages)))


def one_f_one_b(stages: int, micro_batches: int) -> Schedule:
    """Fill the pipe, then alternate one forward with one backward: stage `s` holds at most `stages - s` micro-batches.

    Narayanan et al., "Memory-Efficient Pipeline-Parallel DNN Training" (PipeDream-Flush).

    Example:
        >>> one_f_one_b(4, 16).in_flight(stage=1)
        3
    """

    def work(s: int) -> Iterator[Action]:
        warmup = min(stages - s - 1, micro_batches)
        for m in range(warmup):
            yield Action(s, Kind.FORWARD, m)
        for m in range(micro_batches - warmup):
            yield Action(s, Kind.FORWARD, warmup + m)
            yield Action(s, Kind.BACKWARD, m)
        for m in range(micro_batches - warmup, micro_batches):
            yield Action(s, Kind.BACKWARD, m)

    return Schedule(tuple(tuple(work(s)) for s in range(stages)))


def in_segments(schedule: Schedule, stage_of: Sequence[int]) -> Schedule:
    """The same work with stages in segments: an action becomes those of its stage's segments, backward in reverse.

    Args:
        stage_of: the stage of each segment.

    Example:
        >>> print(in_segments(one_f_one_b(2, 1), stage_of=(0, 0, 1)))
        0F0 1F0 1B0 0B0
        2F0 2B0
    """
    there = {s: [n for n, of in enumerate(stage_of) if of == s] for s in range(schedule.stages)}
    ways = {Kind.FORWARD: there, Kind.BACKWARD: {s: segments[::-1] for s, segments in there.items()}}
    return Schedule(tuple(tuple(Action(n, k, m) for s, k, m in line for n in ways[k][s]) for line in schedule.devices))


def only(kind: Kind, schedule: Schedule) -> tuple[tuple[Action, ...], ...]:
    """The lines of a schedule with one kind of action left."""
    return tuple(tuple(a for a in line if a.kind is kind) for line in schedule.devices)


def forward_only(schedule: Schedule) -> Schedule:
    """The same devices and micro-batches, for inference.

    Example:
        >>> print(forward_only(one_f_one_b(2, 2)))
        0F0 0F1
        1F0 1F1
    """
    return Schedule(only(Kind.FORWARD, schedule))


SCHEDULES: dict[str, Callable[[int, int], Schedule]] = {"gpipe": gpipe, "1f1b": one_f_one_b}
