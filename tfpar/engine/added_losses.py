"""Losses that layers add, as exact shares of those of the whole batch."""

# s: segment, m: micro-batch of a lane, i: operation, k: its k-th added loss

from typing import TYPE_CHECKING, Any

import tensorflow as tf

from tfpar.engine.combination import needs_whole, of_operation
from tfpar.engine.program import Result
from tfpar.graph.batch_probe import Combine

if TYPE_CHECKING:
    from tfpar.engine.executor import Execution


def cotangents(run: "Execution", result: Result, share: Any, of_batch: Any) -> dict[tuple[int, int], tf.Tensor]:
    """The gradient of each loss that a segment added for a part with this share of the batch.

    Args:
        of_batch: that of the batch's, one for all or one for each.
    """
    found = {}
    for (i, k), factor in weights(run, result, share).items():
        dtype, whole = result.losses[i][k].dtype, of_batch[i, k] if isinstance(of_batch, dict) else of_batch
        found[i, k] = tf.cast(factor, dtype) * tf.cast(whole, dtype)
    return found


def weights(run: "Execution", result: Result, share: Any) -> dict[tuple[int, int], Any]:
    """The weight of each loss that a segment added for a part with this share of the batch."""
    return {(i, k): weight(run, i, k, share) for i, losses in result.losses.items() for k in range(len(losses))}


def weight(run: "Execution", i: int, k: int, share: Any) -> Any:
    """By what to multiply an added loss of a part with this share of the batch, so that the sum is the batch's."""
    if run.parts.count == 1:
        return 1.0
    kind = of_operation(run, i, "losses", k)
    if kind in (Combine.MEAN, Combine.SAME):
        return share
    if kind is Combine.SUM:
        return 1.0
    raise needs_whole(
        run,
        i,
        f"the loss that {run.graph.ops[i].name} adds is neither a mean nor a sum over samples, or zero on random "
        "ones, so the losses of micro-batches do not make up that of the batch",
    )
