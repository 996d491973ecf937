"""What each rank of a tensor axis runs: the model's graph with local operations, and collectives between them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from types import MappingProxyType
from typing import Any

import keras
import tensorflow as tf
from keras import tree

from tfpar.comm.collectives import LOCAL, SUMS, Collective
from tfpar.comm.in_program import Gang, InProgram
from tfpar.compat import _keras, _keras_parts
from tfpar.compat._keras_layers import ToldTraining
from tfpar.graph.keras_graph import UNKNOWN, Call, KerasGraph, Ref
from tfpar.planning.layout_search import Option
from tfpar.planning.op_graph import Op, OpGraph, Tensor
from tfpar.planning.plan import Exchange
from tfpar.planning.sharding import REPLICATED, Layout


@dataclass(frozen=True)
class RankGraph:
    """What each rank runs.

    Args:
        graph: local operations, traced alike on all ranks, and `Collective`s, each an operation of its own.
        exchanges: what moves between ranks, as plain data.
        layouts: of the variables that are divided.
        partial: variables that all ranks have, of which each finds a part of the gradient.
        drawn: states of random numbers which ranks draw from differently, as each fills a part of a tensor.
        with_terms: the same with what ranks find of the loss together, if they do: the targets are one more input, and
            what the loss follows from is one more output.
    """

    graph: KerasGraph
    exchanges: tuple[Exchange, ...]
    layouts: dict[int, Layout]
    partial: frozenset[int]
    drawn: frozenset[int]
    with_terms: "RankGraph | None" = None


class RankGraphBuilder:
    """Collects what each rank runs, operation by operation.

    Args:
        source: the model's graph.
        ranks: how many there are.
        ends: the layouts of inputs and outputs that are not replicated.
    """

    def __init__(self, source: KerasGraph, ranks: int, ends: Mapping[int, Layout] = MappingProxyType({})):
        self.ends = ends
        self.source, self.ranks = source, ranks
        self.ops: list[Op] = []
        self.calls: list[Call] = []
        self.sites: list[str] = []  # of each operation, that of the source for which it was added
        self.tensors: list[Tensor] = []
        self.symbols: list[keras.KerasTensor] = []
        self.layouts: list[Layout] = []
        self.full: list[tuple] = []  # shapes of the whole tensors
        self.converted: dict[Any, int] = {}
        self.known: dict[int, int] = {}  # of each tensor of the source, that of a rank
        self.name, self.flops, self.stage = "", 0.0, 0
        self.logits: dict[int, int] = {}  # of each tensor that is a softmax, what a rank has of its logits
        self.learned: set[int] = set()  # tensors that depend on weights to train: their gradients are wanted
        self.inputs = [
            self.tensor(source.symbols[t].shape, source.symbols[t].dtype, ends.get(t, REPLICATED))
            for t in source.graph.inputs
        ]
        self.known.update(zip(source.graph.inputs, self.inputs, strict=True))

    def tensor(self, shape: Sequence, dtype: str, layout: Layout = REPLICATED) -> int:
        """A new tensor; `shape` is that of the whole."""
        local = list(shape)
        if layout.dim is not None:
            known = local[layout.dim] is not None and not local[layout.dim] % self.ranks
            local[layout.dim] = local[layout.dim] // self.ranks if known else None
        self.symbols.append(keras.KerasTensor(local, dtype))
        kind = tf.as_dtype(dtype)
        guess = tuple(
            UNKNOWN if n is None else -(-n // self.ranks) if d == layout.dim else n for d, n in enumerate(shape) if d
        )
        self.tensors.append(Tensor(guess, kind.size, kind.is_floating))
        self.layouts.append(layout)
        self.full.append(tuple(shape))
        return len(self.symbols) - 1

    def add(self, call: Call, name: str, flops: float = 0.0) -> tuple[int, ...]:
        """A new operation of every rank."""
        variables = sorted({self.source.places[id(v)] for v in call.variables})
        inputs = call.inputs
        self.ops.append(Op(name, inputs, call.outputs, tuple(variables), flops, self.stage))
        self.calls.append(call)
        self.sites.append(self.name)
        if self.learned.intersection(inputs) or any(self.source.graph.variables[v].trainable for v in variables):
            self.learned.update(t for t in call.outputs if self.tensors[t].differentiable)
        return call.outputs

    def run(self, operation: Callable, *args: Any, like: Sequence[int] = (), layouts: Sequence[Layout] = (), **kwargs):
        """Run a function or a layer, on tensors of this rank, that makes tensors like these of the source.

        Returns:
            Its outputs; one if there is one.
        """
        source = self.source.symbols
        outputs = tuple(
            self.tensor(source[t].shape, source[t].dtype, y) for t, y in zip(like, layouts, strict=True)
        )  # fmt: skip
        part = self.name if not self.ops or self.ops[-1].name != self.name else f"{self.name}/{len(self.ops)}"
        return one(self.add(Call(operation, args, kwargs, outputs), part, self.flops))

    def make(self, operation: Callable, *args: Any, shape: Sequence, dtype: str, layout: Layout = REPLICATED) -> int:
        """Run a function that makes a tensor which the model does not have; `shape` is that of the whole."""
        outputs = (self.tensor(shape, dtype, layout),)
        return one(self.add(Call(operation, args, {}, outputs), f"{self.name}/{operation.__name__}"))

    def exchange(self, x: int, forward: str, backward: str, layout: Layout, dim: int | None = None) -> int:
        """A tensor after ranks have exchanged what they have of it."""
        dim = next((d for d in (dim, layout.dim, self.layouts[x].dim) if d is not None), 0)
        key = x, forward, backward, dim, self.stage  # a later stage does not send back
        if key in self.converted:
            return self.converted[key]
        shape, dtype = self.full[x], self.symbols[x].dtype
        y = self.tensor(shape, dtype, layout)
        kind = forward if forward not in LOCAL else f"{backward}-of-gradient"
        extent = shape[dim] if shape else None  # a scalar is on all ranks
        self.add(Call(Collective(forward, backward, dim, extent), (Ref(x),), {}, (y,)), f"{self.name}/{kind}")
        self.converted[key] = y
        return y

    def reduced(self, x: int, layout: Layout = REPLICATED) -> int:
        """The sum of what ranks have; each gets all of it, or its part."""
        if layout == REPLICATED:
            return self.exchange(x, "all-reduce", "identity", REPLICATED)
        return self.exchange(x, "reduce-scatter", "all-gather", layout)

    def all_gather(self, x: int, split: bool = False) -> int:
        """All of a tensor that is divided.

        Args:
            split: whether ranks will compute different things with it.
        """
        return self.exchange(x, "all-gather", "reduce-scatter" if split else "slice", REPLICATED)

    def rank(self) -> int:
        """The number of the rank, a scalar."""
        key = "rank", self.stage
        if key not in self.converted:
            self.converted[key] = self.tensor((), "int32")
            self.add(Call(Collective("rank", "identity"), (), {}, (self.converted[key],)), f"{self.name}/rank")
        return self.converted[key]

    def wanted(self, t: int, layout: Layout, split: bool) -> int:
        """A tensor of the source in this layout, for an operation of which ranks compute parts or all."""
        x = self.known[t]
        have = self.layouts[x]
        if have == layout:
            shared = split and have == REPLICATED and x in self.learned
            return self.exchange(x, "identity", "all-reduce", REPLICATED) if shared else x
        if layout == REPLICATED:
            return self.all_gather(x, split)
        return self.exchange(x if have == REPLICATED else self.all_gather(x), "slice", "all-gather", layout)

    def follow(self, i: int, option: Option):
        """Add an operation of the source in the way that was chosen for it."""
        op, call = self.source.graph.ops[i], self.source.calls[i]
        self.name, self.stage = op.name, op.stage
        self.flops = op.flops / (self.ranks if option.split else 1)
        inputs = [self.wanted(t, y, option.split) for t, y in zip(op.inputs, option.inputs, strict=True)]
        if option.build is not None:
            outputs = option.build(self, inputs)
            outputs = (outputs,) if isinstance(outputs, int) else outputs
        else:
            args, kwargs = with_tensors(call, inputs)
            operation = OnParts(call) if option.split else call.operation
            made = zip(op.outputs, option.outputs, strict=True)
            outputs = tuple(self.tensor(self.source.symbols[t].shape, self.source.symbols[t].dtype, y) for t, y in made)
            self.add(replace(call, operation=operation, args=args, kwargs=kwargs, outputs=outputs), op.name, self.flops)
        self.known.update(zip(op.outputs, outputs, strict=True))

    def input(self, shape: Sequence, dtype: str) -> int:
        """One more input, after the model's own."""
        self.inputs.append(self.tensor(shape, dtype))
        return self.inputs[-1]

    def alone(self) -> set[int]:
        """The variables with which each rank computes something of its own only: a part of a tensor, or of a sum."""
        users: dict[int, list[int]] = {}
        parts: dict[int, bool] = {}
        for i, (op, call) in reversed(list(enumerate(zip(self.ops, self.calls, strict=True)))):
            after = [n for t in op.outputs for n in users.get(t, ())]
            within = bool(after) and all(parts[n] and self.sites[n] == self.sites[i] for n in after)
            terms = any(is_collective(self.calls[n]) and self.calls[n].operation.forward in SUMS for n in after)
            parts[i] = not is_collective(call) and (
                within or terms or any(self.layouts[t] != REPLICATED for t in op.outputs)
            )
            for t in op.inputs:
                users.setdefault(t, []).append(i)
        every = {v for i, op in enumerate(self.ops) if not parts[i] for v in op.variables}
        return {v for op in self.ops for v in op.variables} - every

    def finish(self, layouts: dict[int, Layout], *ends: int) -> RankGraph:
        """What was collected until now; every rank has all of the model's outputs, or what `ends` tells.

        Args:
            layouts: of the variables that are divided.
            ends: more outputs.
        """
        self.name, self.flops = "outputs", 0.0
        source = self.source
        final = {
            t: self.wanted(t, self.ends.get(t, REPLICATED), False) for t in dict.fromkeys(source.graph.outputs)
        }  # fmt: skip
        graph = OpGraph(
            tuple(self.ops), tuple(self.tensors), source.graph.variables,
            tuple(self.inputs), (*(final[t] for t in source.graph.outputs), *ends),
        )  # fmt: skip
        structure = tree.map_structure(lambda t: final[t], source.outputs)
        local = KerasGraph(graph, tuple(self.calls), source.variables, tuple(self.symbols), structure)
        variables = source.graph.variables
        alone = self.alone()
        partial = frozenset(v for v in alone if v not in layouts and variables[v].trainable)
        drawn = frozenset(v for v in alone if _keras.is_seed(source.variables[v]))
        crossing = [*exchanges(local, self.full)]
        if partial:
            crossing.append(
                Exchange("all-reduce", "weights", True, sum(variables[v].bytes for v in partial), "weights", False)
            )
        return RankGraph(local, tuple(crossing), layouts, partial, drawn)


def exchanges(graph: KerasGraph, shapes: Sequence[tuple]) -> Iterator[Exchange]:
    """What crosses between devices for a batch, forward and then backward.

    Args:
        shapes: of tensors, whole; those of which the first dim is open are of samples.
    """

    def bytes_of(t: int) -> int:
        shape = shapes[t][1:] if is_batched(t) else shapes[t]
        return prod(UNKNOWN if n is None else n for n in shape) * graph.graph.tensors[t].itemsize

    def is_batched(t: int) -> bool:
        return shapes[t][:1] == (None,)

    found = [(op, call.operation) for op, call in zip(graph.graph.ops, graph.calls, strict=True) if is_collective(call)]
    for backward in (False, True):
        for op, collective in found:
            kind = collective.backward if backward else collective.forward
            if kind not in LOCAL and (not backward or op.outputs[0] in graph.graph.learned):
                where, size = op.name.rpartition("/")[0], sum(map(bytes_of, op.outputs))
                yield Exchange(kind, where, backward, size, op.scope, is_batched(op.outputs[0]), collective.axis)


class OnParts(ToldTraining):
    """A layer's call on a part of its input, with a part of its weights."""

    def __init__(self, call: Call):
        self.call, self.variables = call, call.variables

    def __call__(self, *args, training=None, **kwargs):
        with _keras_parts.unchecked(self.call.operation):
            return _keras.call_operation(self.call.operation, args, kwargs, training, self.call.explicit)


def with_tensors(call: Call, tensors: Sequence[int]) -> tuple[Any, Any]:
    """The arguments of a call with these tensors in place of its own, in order."""
    left = iter(tensors)
    return call.arguments(lambda _: Ref(next(left)))


def is_collective(call: Call) -> bool:
    """Whether devices exchange something here."""
    return isinstance(call.operation, Collective)


def in_program(call: Call, gang: Gang, lane: int) -> Call:
    """A call as part of a program that all lanes run at once: an exchange takes the number of the lane, a tensor."""
    if not is_collective(call):
        return call
    return Call(InProgram(call.operation, gang), (*call.args, Ref(lane)), {}, call.outputs)


def one(values: Sequence[int]) -> Any:
    """The only one of these, or all."""
    return values[0] if len(values) == 1 else values
