"""What needs the whole batch when replicas see parts of it: batch statistics, and operations that mix samples."""

from collections.abc import Set
from dataclasses import replace

import keras
import tensorflow as tf

from tfpar.compat import _keras, _moments
from tfpar.compat._keras_layers import ToldTraining
from tfpar.graph.keras_graph import Call, KerasGraph, Ref
from tfpar.planning.op_graph import Op, OpGraph, Tensor


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


def share_moments(mean: tf.Tensor, variance: tf.Tensor, divisor: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """The statistics of the batch, once for each of its parts."""
    of_batch = _moments.whole_moments(_moments.Moments(mean, variance, divisor))
    return tuple(tf.broadcast_to(x, tf.shape(mean)) for x in of_batch)


class NormalizeWith(ToldTraining):
    """A BatchNormalization's call with statistics that it is given."""

    def __init__(self, call: Call):
        self.call, self.variables = call, call.operation.variables

    def __call__(self, mean, variance, *args, training=None, **kwargs):
        layer = self.call.operation
        with _moments.given(layer, mean[0], variance[0]):
            return _keras.call_operation(layer, args, kwargs, training, self.call.explicit)


def with_shared_statistics(graph: KerasGraph, global_batch: Set[str]) -> tuple[KerasGraph, frozenset[str]]:
    """The graph with each BatchNormalization outside of `global_batch` in three operations, and which share statistics.

    What a replica computes goes through XLA in one piece; so the statistics leave it, are put together, and come back.
    """
    ops: list[Op] = []
    calls: list[Call] = []
    tensors, symbols = list(graph.graph.tensors), list(graph.symbols)
    names = set()
    batch = graph.symbols[graph.graph.inputs[0]].shape[0]

    def tensor(dtype: str, *shape: int) -> int:
        tensors.append(Tensor(shape, tf.as_dtype(dtype).size))
        symbols.append(keras.KerasTensor((batch, *shape), dtype))
        return len(tensors) - 1

    for op, call in zip(graph.graph.ops, graph.calls, strict=True):
        if not _moments.is_batch_normalization(call.operation) or op.name in global_batch:
            ops.append(op)
            calls.append(call)
            continue
        statistic = call.operation.moving_mean.dtype, call.operation.moving_mean.shape[0]
        taken = (tensor(*statistic), tensor(*statistic), tensor(statistic[0]))
        shared = (tensor(*statistic), tensor(*statistic))
        ops += [
            replace(op, name=f"{op.name}/moments", outputs=taken, flops=op.flops / 2),
            Op(f"{op.name}/all_replicas", taken, shared, stage=op.stage),
            replace(op, inputs=(*shared, *op.inputs), flops=op.flops / 2),
        ]
        names.add(f"{op.name}/all_replicas")
        calls += [
            Call(TakeMoments(call), call.args, call.kwargs, taken),
            Call(share_moments, tuple(map(Ref, taken)), {}, shared),
            Call(NormalizeWith(call), (*map(Ref, shared), *call.args), call.kwargs, call.outputs),
        ]
    described = OpGraph(tuple(ops), tuple(tensors), graph.graph.variables, graph.graph.inputs, graph.graph.outputs)
    return replace(graph, graph=described, calls=tuple(calls), symbols=tuple(symbols)), frozenset(names)
