"""What needs the whole batch when replicas see parts of it: batch statistics, and operations that mix samples."""

from collections.abc import Set
from dataclasses import replace

import keras
import tensorflow as tf

from tfpar.comm.collectives import Collective
from tfpar.compat import _keras, _moments
from tfpar.compat._keras_layers import ToldTraining
from tfpar.graph.keras_graph import Call, KerasGraph, Ref, Rewriting
from tfpar.planning.op_graph import Op, Tensor


class TakeMoments(ToldTraining):
    """The statistics that a BatchNormalization takes of its input: mean and variance (1, channels), divisor (1,)."""

    def __init__(self, call: Call):
        self.call, self.variables = call, call.operation.variables

    def __call__(self, *args, training=None, **kwargs):
        layer, found = self.call.operation, []
        with _moments.recorded([layer], found), _keras.discarded_writes():
            _keras.call_operation(layer, args, kwargs, training, self.call.explicit)
        if not found:  # it is not in training: it uses its moving statistics
            nothing = tf.zeros_like(layer.moving_mean)[None]
            return nothing, nothing, nothing[:, 0]
        mean, variance, divisor = found[0][1]
        return mean[None], variance[None], divisor[None]


class NormalizeWith(ToldTraining):
    """A BatchNormalization's call with the statistics of all replicas' parts, (replicas, channels) and (replicas,)."""

    def __init__(self, call: Call):
        self.call, self.variables = call, call.operation.variables

    def __call__(self, mean, variance, divisor, *args, training=None, **kwargs):
        layer = self.call.operation
        with _moments.given(layer, *_moments.whole_moments(_moments.Moments(mean, variance, divisor))):
            return _keras.call_operation(layer, args, kwargs, training, self.call.explicit)


def with_shared_statistics(graph: KerasGraph, global_batch: Set[str], replicas: int) -> KerasGraph:
    """The graph in which each BatchNormalization outside of `global_batch` normalises with all replicas' statistics."""
    new = Rewriting(graph)

    def tensor(dtype: str, *shape: int) -> int:
        return new.tensor(Tensor(shape[1:], tf.as_dtype(dtype).size), keras.KerasTensor(shape, dtype))

    for op, call in zip(graph.graph.ops, graph.calls, strict=True):
        if not _moments.is_batch_normalization(call.operation) or op.name in global_batch:
            new.add(op, call)
            continue
        dtype, (channels,) = call.operation.moving_mean.dtype, call.operation.moving_mean.shape
        own, every = ((tensor(dtype, n, channels), tensor(dtype, n, channels), tensor(dtype, n)) for n in (1, replicas))
        taken = Call(TakeMoments(call), call.args, call.kwargs, own)
        new.add(replace(op, name=f"{op.name}/moments", outputs=own, flops=op.flops / 2), taken)
        exchange = Collective("all-gather", "reduce-scatter", axis="samples")
        new.add(*collective(f"{op.name}/moments", exchange, own, every, op.stage))
        normalized = Call(NormalizeWith(call), (*map(Ref, every), *call.args), call.kwargs, call.outputs)
        new.add(replace(op, inputs=(*every, *op.inputs), flops=op.flops / 2), normalized)
    return new.finish()


def with_global_batch(graph: KerasGraph, names: Set[str]) -> KerasGraph:
    """The graph in which these operations get all replicas' parts of a batch, and others their own of what they make.

    Every replica computes all of it; each has the gradient of its own samples' loss, and the sum is that of the batch.
    """
    new, moved = Rewriting(graph), {}
    everywhere: set[int] = set()  # tensors of the whole batch

    def move(t: int, collective_: Collective, op: Op):
        moved[t] = new.like(t)
        name = graph.graph.ops[graph.graph.producer[t]].name if t in graph.graph.producer else "inputs"
        new.add(*collective(f"{name}/{t}", collective_, (t,), (moved[t],), op.stage))

    for op, call in zip(graph.graph.ops, graph.calls, strict=True):
        inside = op.name in names
        for t in filter(graph.is_batched, dict.fromkeys(op.inputs) if inside else ()):
            if t not in everywhere and t not in moved:
                move(t, Collective("all-gather", "reduce-scatter", axis="samples"), op)
        new.copy(op, call, {t: moved[t] for t in op.inputs if t in moved and inside == (t not in everywhere)})
        everywhere.update(op.outputs if inside else ())
        for t in filter(graph.is_batched, op.outputs if inside else ()):
            users = {graph.graph.ops[i].name for i in graph.graph.consumers[t]}
            if t in graph.graph.outputs or not users <= names:
                move(t, Collective("slice", "pad", axis="samples"), op)
    return new.finish({t: moved[t] for t in everywhere & moved.keys()})


def collective(
    name: str, exchange: Collective, inputs: tuple[int, ...], outputs: tuple[int, ...], stage: int
) -> tuple[Op, Call]:
    """An exchange as an operation of a graph."""
    op = Op(f"{name}/{exchange.forward}", inputs, outputs, stage=stage)
    return op, Call(exchange, tuple(map(Ref, inputs)), {}, outputs)
