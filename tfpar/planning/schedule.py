"""Pipeline schedules as data: for each device the actions that it runs, in order.

`0F2` is stage 0, forward, micro-batch 2. The simulator and the engine execute it; the engine by segments of stages
(`in_segments`).
"""

# s: stage, m: micro-batch, d: device

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from tfpar.errors import ScheduleError


class Kind(enum.Enum):
    """Whether an action is the forward or the backward pass of a stage."""

    FORWARD = "F"
    BACKWARD = "B"


class Action(NamedTuple):
    """The forward or backward pass of one micro-batch through one stage.

    Args:
        stage, micro_batch: numbers from 0.
        kind: forward or backward.

    Example:
        >>> print(Action(stage=0, kind=Kind.FORWARD, micro_batch=2))
        0F2
    """

    stage: int
    kind: Kind
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind.value}{self.micro_batch}"


@dataclass(frozen=True)
class Schedule:
    """The order in which each device runs its actions.

    A device may have several stages, as in the interleaved schedule of Narayanan et al., "Efficient Large-Scale
    Language Model Training on GPU Clusters Using Megatron-LM", section 2.2.2. A schedule without backward actions is
    one for inference.

    Args:
        devices: for each device, its actions in order.

    Raises:
        ScheduleError: there are no actions, one is missing or there twice, a stage is on two devices, or there is a
            deadlock, as devices wait for each other.

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
        """Whether there are backward actions: whether the schedule is one for training."""
        return any(a.kind is Kind.BACKWARD for line in self.devices for a in line)

    @cached_property
    def stages(self) -> int:
        """The number of stages."""
        return 1 + max(a.stage for line in self.devices for a in line)

    @cached_property
    def micro_batches(self) -> int:
        """The number of micro-batches."""
        return 1 + max(a.micro_batch for line in self.devices for a in line)

    @cached_property
    def device_of(self) -> tuple[int, ...]:
        """For each stage, the index of its device in `devices`."""
        places = {a.stage: d for d, line in enumerate(self.devices) for a in line}
        return tuple(places[s] for s in range(self.stages))

    @cached_property
    def order(self) -> tuple[Action, ...]:
        """All actions, in an order that keeps that of each device and has each action after those that it needs."""
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
        """The most micro-batches whose activations a stage holds at once, from forward to backward; 1 for inference."""
        alive = most = 0
        for action in self.devices[self.device_of[stage]]:
            if action.stage == stage:
                alive += 1 if action.kind is Kind.FORWARD else -1
                most = max(most, alive)
        return most if self.trains else 1

    def __str__(self) -> str:
        return "\n".join(" ".join(map(str, line)) for line in self.devices)


def needs(action: Action, stages: int) -> list[Action]:
    """The actions that must finish before `action` may start.

    Forward needs the forward of the stage before; backward needs the stage's own forward and the backward of the stage
    after.

    Args:
        stages: the number of stages in the schedule.
    """
    s, kind, m = action
    if kind is Kind.FORWARD:
        return [Action(s - 1, kind, m)] if s else []
    after = [Action(s + 1, kind, m)] if s < stages - 1 else []
    return [Action(s, Kind.FORWARD, m), *after]


def gpipe(stages: int, micro_batches: int) -> Schedule:
    """All micro-batches forward, then all backward: each stage holds the activations of all of them.

    The bubble of even stages is (stages - 1) / (micro_batches + stages - 1): Huang et al., "GPipe: Efficient Training
    of Giant Neural Networks using Pipeline Parallelism", sections 2.2 and 2.3.

    Raises:
        ScheduleError: no stages or no micro-batches.

    Example:
        >>> print(gpipe(2, 2))
        0F0 0F1 0B1 0B0
        1F0 1F1 1B1 1B0
    """
    forward = [(Kind.FORWARD, m) for m in range(micro_batches)]
    backward = [(Kind.BACKWARD, m) for m in reversed(range(micro_batches))]
    return Schedule(tuple(tuple(Action(s, k, m) for k, m in forward + backward) for s in range(stages)))


def one_f_one_b(stages: int, micro_batches: int) -> Schedule:
    """Fill the pipeline, then alternate one forward with one backward (1F1B).

    Stage `s` holds the activations of at most `stages - s` micro-batches; the bubble is that of `gpipe`. This is
    PipeDream-Flush: Narayanan et al., "Memory-Efficient Pipeline-Parallel DNN Training", section 3.2.

    Raises:
        ScheduleError: no stages or no micro-batches.

    Example:
        >>> one_f_one_b(4, 16).in_flight(stage=1)
        3
    """

    return Schedule(tuple(alternating(s, stages - s - 1, micro_batches) for s in range(stages)))


def eager_one_f_one_b(stages: int, micro_batches: int) -> Schedule:
    """1F1B with more micro-batches under way, so that a stage computes while tensors come and go (eager 1F1B).

    In 1F1B a stage has nothing else to do while what it needs is on its way: each micro-batch takes longer by the time
    of a transfer. Here stage `s` holds the activations of at most `2 * (stages - s) - 1` micro-batches. This is
    Zhuang et al., "On Optimizing the Communication of Model Parallelism", 2023, section 4.

    Raises:
        ScheduleError: no stages or no micro-batches.

    Example:
        >>> eager_one_f_one_b(4, 16).in_flight(stage=1)
        5
    """
    return Schedule(tuple(alternating(s, 2 * (stages - s - 1), micro_batches) for s in range(stages)))


def alternating(s: int, warmup: int, micro_batches: int) -> tuple[Action, ...]:
    """The line of a stage that runs `warmup` micro-batches forward, then alternates one forward with one backward."""
    warmup = min(warmup, micro_batches)
    line = [Action(s, Kind.FORWARD, m) for m in range(warmup)]
    for m in range(micro_batches):
        line += [Action(s, Kind.FORWARD, warmup + m)] if warmup + m < micro_batches else []
        line.append(Action(s, Kind.BACKWARD, m))
    return tuple(line)


def in_segments(schedule: Schedule, stage_of: Sequence[int]) -> Schedule:
    """The schedule of segments: an action becomes those of its stage's segments, in reverse if it is backward.

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
    """The forward actions of a schedule, for inference.

    Example:
        >>> print(forward_only(one_f_one_b(2, 2)))
        0F0 0F1
        1F0 1F1
    """
    return Schedule(only(Kind.FORWARD, schedule))


SCHEDULES: dict[str, Callable[[int, int], Schedule]] = {
    "gpipe": gpipe, "1f1b": one_f_one_b, "eager-1f1b": eager_one_f_one_b,
}  # fmt: skip
