"""The values of variables as the segments of a pass read them."""

# s: segment, m: micro-batch of a lane, v: variable of the graph

from typing import TYPE_CHECKING

import tensorflow as tf

from tfpar.compat import _keras
from tfpar.engine.engine import MicroBatch, copy_of, read
from tfpar.engine.weight_edge import edge_of
from tfpar.planning.mesh import dividing
from tfpar.variables.parts import copy_on_device

if TYPE_CHECKING:
    from tfpar.engine.executor import Execution


def value_of(run: "Execution", s: int, m: MicroBatch, v: int) -> tf.Tensor:
    """A variable's value for a part: as its lane left it, or as it was before the batch."""
    lane = m.lane
    if v in run.state[m]:
        return tf.identity(run.state[m][v])
    if (s, lane, v) not in run.known:
        if is_gathered(run, v):  # for this action alone, while the one before it runs
            with tf.control_dependencies(run.order.before.get(run.at(s, lane), [])):
                return before_batch(run, s, m, v)
        run.known[s, lane, v] = before_batch(run, s, m, v)
    value = run.known[s, lane, v]
    if not _keras.is_seed(run.engine.graph.variables[v]):
        return value
    if s in run.route.global_batch:  # every replica computes the same
        m = m._replace(lane=lane.rank)
    # ranks that fill the same tensor draw the same numbers
    return _keras.nth_seed(value, run.all.index(m) if v in run.route.drawn else run.part_number(m))


def own_value(run: "Execution", s: int, m: MicroBatch, v: int) -> tf.Tensor:
    """The same; of a variable of which replicas have shards, the shard, for a program that gathers them itself."""
    if not is_gathered(run, v):
        return value_of(run, s, m, v)
    if (s, m.lane, v) not in run.known:
        run.known[s, m.lane, v] = copy_on_device(copy_of(run.engine.graph.variables[v], m.lane))
    return run.known[s, m.lane, v]


def is_gathered(run: "Execution", v: int) -> bool:
    """Whether replicas have shards of a variable, which are put together for each action that reads it."""
    edge = edge_of(run.engine, v, run.scatters)
    return any(edge.forward(axis) == "all-gather" for axis in dividing("samples"))


def before_batch(run: "Execution", s: int, m: MicroBatch, v: int) -> tf.Tensor:
    """A variable's value before the batch, as a segment's layers read it.

    In mixed precision a weight is cast once, not in every micro-batch.
    """
    value = run.read(s, v, m.lane) if run.read else read(run.engine.graph.variables[v], m.lane)
    dtype = run.program(s).reads.get(v) if run.parts.micro_batches > 1 else None
    return value if dtype is None else tf.cast(value, dtype)
