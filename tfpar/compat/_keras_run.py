"""Private names of Keras that `strategy.run` needs. Checked against Keras 3.15.1 by `tests/compat/test_keras.py`.

A user's function runs once for each replica, in a thread of its own. While it does, what Keras would do with the part
of a batch that a replica sees is done with the whole: gradients are added up before clipping, accumulation and the
update; batch statistics are those of all replicas; random numbers differ between replicas.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf
from keras.src.backend.common import global_state
from keras.src.optimizers.base_optimizer import BaseOptimizer
from keras.src.optimizers.loss_scale_optimizer import LossScaleOptimizer
from keras.src.optimizers.multi_optimizer import MultiOptimizer
from keras.src.random.seed_generator import SeedGenerator, global_seed_generator

from tfpar.compat import _keras, _moments
from tfpar.compat._replaced import Replacement
from tfpar.compat._tf import LogicalReplica, has_shared_rows


@contextlib.contextmanager
def running_replicas() -> Iterator[None]:
    """Inside, optimizers, BatchNormalization and seeds look whether they are in one of several replicas."""
    global_seed_generator()  # its variable cannot be created in a replica
    with REPLICAS.inside():
        yield


def is_one_of_several() -> bool:
    """Whether `strategy.run` of a strategy of ours is running one of several replicas here."""
    return one_of_several() is not None


def one_of_several() -> tf.distribute.ReplicaContext | None:
    """The replica that is being run, if it is one of several of a strategy of ours."""
    context = tf.distribute.get_replica_context()
    ours = context is not None and hasattr(context.strategy, "_adopt") and not isinstance(context, LogicalReplica)
    return context if ours and context.num_replicas_in_sync > 1 else None


def apply(original: Callable, self: Any, grads: Any, trainable_variables: Any = None) -> Any:
    """`Optimizer.apply`: the gradients of all replicas, then each replica its own copies."""
    replica = one_of_several()
    if replica is None:
        return original(self, grads, trainable_variables)
    # of rows that all replicas have, the values are added up; of others, the rows are those of all
    shared = [has_shared_rows(g) for g in grads]
    present = [g.values if s else g for g, s in zip(grads, shared, strict=True) if g is not None]
    reduced = iter(replica.all_reduce(tf.distribute.ReduceOp.SUM, present) if present else ())
    sums = [None if g is None else next(reduced) for g in grads]
    grads = [
        tf.IndexedSlices(total, g.indices, g.dense_shape) if s else total
        for g, total, s in zip(grads, sums, shared, strict=True)
    ]
    with LogicalReplica(replica.strategy, replica._replica_id):
        return original(self, grads, trainable_variables)


def moments(original: Callable, self: Any, inputs: tf.Tensor, mask: Any) -> tuple[tf.Tensor, tf.Tensor]:
    """`BatchNormalization._moments`, of the inputs of all replicas."""
    replica = one_of_several()
    if replica is None or replica.strategy.batch_norm == "local" or self.synchronized:
        return original(self, inputs, mask)
    mean, variance = original(self, inputs, mask)
    divisor = _moments.divisor(self, inputs, mask, mean.dtype)
    number, at = replica.num_replicas_in_sync, replica._replica_id
    # the statistics of replica r in row r, zeros in the others: their sum over replicas has those of all
    parts = [tf.scatter_nd([[at]], x[None], [number, *x.shape]) for x in (mean, variance, divisor)]
    return _moments.whole_moments(_moments.Moments(*replica.all_reduce(tf.distribute.ReduceOp.SUM, parts)))


def next_seed(original: Callable, self: SeedGenerator, ordered: bool = True) -> tf.Tensor:
    """`SeedGenerator.next`: other numbers for each replica."""
    seed, replica = original(self, ordered), one_of_several()
    return seed if replica is None else _keras.nth_seed(seed, replica._replica_id)


REPLICAS = Replacement(
    (BaseOptimizer, "apply", apply),
    (LossScaleOptimizer, "apply", apply),
    (MultiOptimizer, "apply", apply),
    (keras.layers.BatchNormalization, "_moments", moments),
    (SeedGenerator, "next", next_seed),
)


def as_in_this_thread(function: Callable) -> Callable:
    """A function that sees, in whichever thread it runs, Keras' state of this one, such as the dtype policy."""
    trackers = global_state.GLOBAL_STATE_TRACKER, global_state.GLOBAL_SETTINGS_TRACKER
    states = [dict(vars(t)) for t in trackers]

    @functools.wraps(function)
    def run(*args, **kwargs):
        for tracker, state in zip(trackers, states, strict=True):
            vars(tracker).update(state)
        return function(*args, **kwargs)

    return run
