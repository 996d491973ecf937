"""How what comes of the parts of a batch makes up what comes of the batch: asked of the model, on random samples."""

# s: segment, v: variable of the graph, i: operation

from typing import TYPE_CHECKING, Any

import tensorflow as tf

from tfpar.comm.gradients import SharedRows
from tfpar.errors import Caught, ModelError
from tfpar.graph.batch_probe import Combine, Findings
from tfpar.graph.recording import NeedsWholeBatch

if TYPE_CHECKING:
    from tfpar.engine.executor import Execution


def of_operation(run: "Execution", i: int, what: str, key: int) -> Combine | None:
    """How a loss or a state of an operation combines; `None` where the numbers do not tell."""
    if run.partition.stage_of[i] in run.route.global_batch:
        return Combine.SAME
    source = run.route.in_source(i)
    try:
        findings = Findings() if source is None else run.route.probe.of(source, run.training)
    except Exception as error:
        Caught.theirs(error, f"{run.graph.ops[i].name} on random samples")
        findings = Findings()
    return findings.state.get(key) if what == "state" else dict(enumerate(findings.losses)).get(key)


def needs_whole(run: "Execution", i: int, why: str) -> Exception:
    """What to raise where an operation's results for a batch do not follow from those of its parts."""
    if run.parts.micro_batches == 1:
        return NeedsWholeBatch(run.graph.ops[i].name, run.route.graph)
    return ModelError(f"{why}. Use micro_batches=1 (LayerPlacementStrategy)")


def known_rows(run: "Execution", s: int, v: int, gradient: Any) -> Any:
    """A variable's gradient in a segment, as `SharedRows` if it has the same rows for each part of the batch."""
    shared = shares_rows(run, s, v, gradient)
    return SharedRows(gradient.values, gradient.indices, gradient.dense_shape) if shared else gradient


def shares_rows(run: "Execution", s: int, v: int, gradient: Any) -> bool:
    """Whether a variable's gradient in a segment has the same rows for each part of the batch.

    Raises:
        NeedsWholeBatch, ModelError: it has some such rows, and others that are each part's own.
    """
    if not isinstance(gradient, tf.IndexedSlices) or run.parts.count == 1:
        return False
    if s in run.route.global_batch:
        return True
    variable = run.engine.graph.variables[v]
    found = run.route.rows(s, v, variable)
    if Combine.MIXED in found.values() or {Combine.ROWS, Combine.SAME} <= set(found.values()):
        i = next(i for i, kind in found.items() if kind is not Combine.ROWS)
        why = f"{run.graph.ops[i].name} looks up rows of {variable.path} for each sample, and rows for all of them"
        raise needs_whole(run, i, why)
    return Combine.SAME in found.values()
