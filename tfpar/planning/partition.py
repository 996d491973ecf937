"""Cutting a model into stages."""

# i, j: positions in the order of operations, s: stage

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np

from tfpar.errors import PartitionError
from tfpar.planning.cost import BACKWARD, Hardware, op_seconds
from tfpar.planning.op_graph import OpGraph


@dataclass(frozen=True)
class Partition:
    """The stage of each operation of a graph.

    Args:
        graph: the model's operations.
        stage_of: for each operation, the number of its stage.

    Raises:
        PartitionError: a stage without operations, or a tensor that would go from a later stage to an earlier one.

    Example:
        >>> from tfpar.planning.op_graph import Op, OpGraph, Tensor
        >>> chain = OpGraph((Op("a", (0,), (1,)), Op("b", (1,), (2,))), (Tensor((4,)),) * 3, (), (0,), (2,))
        >>> Partition(chain, (0, 1)).edges(0)
        (1,)
    """

    graph: OpGraph
    stage_of: tuple[int, ...]

    def __post_init__(self):
        for s in range(self.stages):
            if s not in self.stage_of:
                raise PartitionError(
                    f"stage {s} of {self.stages} has no layers: a stage needs at least one; number the stages from 0 "
                    "without gaps, one for each device"
                )
        for t, consumers in self.graph.consumers.items():
            source = self.graph.producer.get(t)
            for op in consumers:
                if source is not None and self.stage_of[op] < self.stage_of[source]:
                    a, b = self.graph.ops[source].name, self.graph.ops[op].name
                    raise PartitionError(
                        f"this placement sends data backwards: {b} on stage {self.stage_of[op]} uses what {a} makes on "
                        f"stage {self.stage_of[source]}; put {b} on stage {self.stage_of[source]} or later"
                    )

    @property
    def stages(self) -> int:
        """The number of stages."""
        return 1 + max(self.stage_of)

    def ops(self, stage: int) -> tuple[int, ...]:
        """The operations of a stage, in order, as indices into the graph's."""
        return tuple(i for i, s in enumerate(self.stage_of) if s == stage)

    def edges(self, stage: int) -> tuple[int, ...]:
        """The tensors that a stage makes for later stages or as outputs of the model, as indices into the graph's."""
        return tuple(
            t
            for i in self.ops(stage)
            for t in self.graph.ops[i].outputs
            if t in self.graph.outputs or any(self.stage_of[c] > stage for c in self.graph.consumers[t])
        )

    def needs(self, stage: int) -> tuple[int, ...]:
        """The tensors that a stage uses and does not make, as indices into the graph's."""
        made = {t for i in self.ops(stage) for t in self.graph.ops[i].outputs}
        return tuple(dict.fromkeys(t for i in self.ops(stage) for t in self.graph.ops[i].inputs if t not in made))

    def home(self, variable: int) -> int:
        """The stage that has a variable: the first one that uses it; stage 0 for one that no operation uses."""
        return next((s for op, s in zip(self.graph.ops, self.stage_of, strict=True) if variable in op.variables), 0)


def segmented(graph: OpGraph, labels: Sequence[Any], alone: Set[int] = frozenset()) -> Partition:
    """The graph in segments: neighbours with the same label are in one, each operation of `alone` in one of its own."""
    segment_of: list[int] = []
    for i, label in enumerate(labels):
        begins = i and (label != labels[i - 1] or i in alone or i - 1 in alone)
        segment_of.append((segment_of[-1] if i else 0) + bool(begins))
    return Partition(graph, tuple(segment_of))


def balanced(graph: OpGraph, stages: int, hardware: Hardware, rows: int = 1) -> Partition:
    """The partition into consecutive operations whose slowest stage is fastest.

    The time of a stage is that of its operations, forward and backward, and of receiving its inputs from other stages.
    Exact, by dynamic programming over the graph's order; among equally fast partitions, the one that sends the least.

    Args:
        hardware: the speed of each device.
        rows: samples in a micro-batch.

    Raises:
        PartitionError: fewer operations than stages.
    """
    n = len(graph.ops)
    if n < stages:
        raise PartitionError(
            f"cannot cut {n} layers into {stages} stages: a stage needs at least one layer; use at most {n} devices"
        )
    work = np.array([(1 + BACKWARD) * op_seconds(graph, op, rows, hardware) for op in graph.ops])
    until = np.concatenate([[0.0], np.cumsum(work)])
    sent = np.array([2 * rows * b / hardware.link_bytes for b in live_bytes(graph)])

    def stage_costs(j: int) -> np.ndarray:
        """The cost of the stage [i, j) for every i < j."""
        return until[j] - until[:j] + sent[:j]

    def best(merge, admit) -> tuple[float, list[int]]:
        """Fold the costs of stages along the order: `merge` joins a cut's cost and the next stage's."""
        cost = np.full((stages + 1, n + 1), np.inf)
        start = np.zeros((stages + 1, n + 1), int)
        cost[0, 0] = 0.0
        for s in range(1, stages + 1):
            for j in range(s, n + 1):
                options = np.where(admit(stage_costs(j)), merge(cost[s - 1, :j], j), np.inf)
                start[s, j] = np.argmin(options)
                cost[s, j] = options[start[s, j]]
        cuts, j = [], n
        for s in range(stages, 0, -1):
            j = int(start[s, j])
            cuts.append(j)
        return cost[stages, n], cuts[::-1]

    slowest, _ = best(lambda before, j: np.maximum(before, stage_costs(j)), lambda c: np.isfinite(c))
    _, cuts = best(lambda before, j: before + sent[:j], lambda c: c <= slowest * (1 + 1e-9))
    return Partition(graph, tuple(int(np.searchsorted(cuts, i, side="right")) - 1 for i in range(n)))


def live_bytes(graph: OpGraph) -> Iterator[int]:
    """For each operation, the bytes of one sample that those before it make for it and for later ones."""
    last = {t: max(ops) for t, ops in graph.consumers.items() if ops}
    crossing: set[int] = set()
    for i, op in enumerate(graph.ops):
        crossing = {t for t in crossing if last[t] >= i}
        yield sum(graph.tensors[t].bytes for t in crossing)
        crossing |= {t for t in op.outputs if last.get(t, -1) > i}


def matches(op_name: str, name: str) -> bool:
    """Whether a user's `name` means this operation: itself, one of its calls, or a model that contains it."""
    layer = op_name.split(":")[0]
    return op_name == name or layer == name or layer.startswith(name + "/") or layer.endswith("/" + name)


def beginning_at(graph: OpGraph, names: Sequence[str], stages: int) -> Partition:
    """Stages that begin at the named layers; the first stage begins at the model's inputs.

    Raises:
        PartitionError: an unknown name, names out of order, or not one name for each stage after the first.
    """
    if len(names) != stages - 1:
        raise PartitionError(
            f"{stages} stages need {stages - 1} names where a new one begins; received {len(names)}: {list(names)}"
        )
    starts = [first(graph, name) for name in names]
    if starts != sorted(set(starts)) or 0 in starts:
        order = [graph.ops[i].name for i in sorted(starts)]
        raise PartitionError(
            f"stages begin in the order of the model, each after at least one layer; received {list(names)}, "
            f"the model's order is {order}"
        )
    return Partition(graph, tuple(sum(start <= i for start in starts) for i in range(len(graph.ops))))


def assigned(graph: OpGraph, placement: Mapping[str, int], stages: int) -> Partition:
    """Stages from a mapping layer name -> stage; a layer that is not named follows the latest of its inputs.

    The name of a nested model stands for its layers; of two names for a layer, the one that stands for fewer counts.

    Raises:
        PartitionError: an unknown name, a stage out of range, or data that would flow backwards.
    """
    for name, stage in placement.items():
        first(graph, name)
        if not isinstance(stage, int) or not 0 <= stage < stages:
            raise PartitionError(f"layer {name} is placed on stage {stage!r}; the stages are 0 to {stages - 1}")
    stands_for = {name: sum(matches(op.name, name) for op in graph.ops) for name in placement}
    stage_of: list[int] = []
    for op in graph.ops:
        named = [name for name in placement if matches(op.name, name)]
        before = [stage_of[graph.producer[t]] for t in op.inputs if t in graph.producer]
        stage_of.append(placement[min(named, key=stands_for.__getitem__)] if named else max(before, default=0))
    if 1 + max(stage_of) < stages:
        raise PartitionError(f"no layer is placed on stage {stages - 1}: {stages} devices need {stages} stages")
    return Partition(graph, tuple(stage_of))


def first(graph: OpGraph, name: str) -> int:
    """The first operation that `name` means.

    Raises:
        PartitionError: no operation has this name; the message gives the nearest names.
    """
    found = next((i for i, op in enumerate(graph.ops) if matches(op.name, name)), None)
    if found is None:
        import difflib

        known = list(dict.fromkeys(op.layer for op in graph.ops))
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.3) or known[:3]
        raise PartitionError(f"the model has no layer {name!r}; the nearest names are {', '.join(near)}")
    return found


def partition(graph: OpGraph, stages: int, placement, hardware: Hardware, rows: int = 1) -> Partition:
    """The partition that `placement` asks for.

    Args:
        placement: `"auto"` for `balanced`, names of layers where a stage begins for `beginning_at`, or a mapping layer
            name -> stage for `assigned`.
        hardware: the speed of each device.
        rows: samples in a micro-batch.

    Raises:
        PartitionError: another kind of placement, or one that does not fit the graph and the number of stages.

    Example:
        >>> from tfpar.planning.cost import HARDWARE
        >>> from tfpar.planning.op_graph import Op, OpGraph, Tensor
        >>> a, b = Op("a", (0,), (1,), flops=1e9), Op("b", (1,), (2,), flops=1e9)
        >>> chain = OpGraph((a, b), (Tensor((4,)),) * 3, (), (0,), (2,))
        >>> partition(chain, 2, "auto", HARDWARE["CPU"]).stage_of
        (0, 1)
    """
    if placement == "auto":
        return balanced(graph, stages, hardware, rows)
    if isinstance(placement, Mapping):
        return assigned(graph, placement, stages)
    if isinstance(placement, Sequence) and not isinstance(placement, str):
        return beginning_at(graph, placement, stages)
    raise PartitionError(
        f'placement is "auto", a list of layer names where a stage begins, or a mapping layer name -> stage; '
        f"received {placement!r}"
    )
