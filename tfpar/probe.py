"""Does what a function makes of a batch follow from what it makes of the batch's parts, and how?

Asked of numbers, not of code: the function is run on some random samples, and on two parts of them.
"""

import enum
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import tree

from tfpar import _keras
from tfpar.errors import ModelError, brief
from tfpar.model import Call, KerasGraph
from tfpar.state import RecordingScope

SIZES = (3, 5)  # samples in each part
PARTS = (slice(0, SIZES[0]), slice(SIZES[0], sum(SIZES)))
GUESS = 16  # for dimensions that the model leaves open


class Combine(enum.Enum):
    """How the result for a batch follows from those of its parts."""

    ROWS = "concatenation"
    SAME = "each part's"
    MEAN = "mean weighted by samples"
    SUM = "sum"


def combination(whole: Any, parts: Sequence[Any], base: Any = 0) -> Combine | None:
    """How `whole` follows from `parts`, or `None`.

    Args:
        base: for state, the value before: a sum is one of changes.
    """
    whole, base, *parts = (np.asarray(a, np.float64) for a in (whole, base, *parts))
    candidates = {
        Combine.SAME: lambda: parts[0] if np.array_equal(parts[0], parts[1]) else None,
        Combine.ROWS: lambda: np.concatenate(parts),
        Combine.MEAN: lambda: np.average(parts, axis=0, weights=SIZES),
        Combine.SUM: lambda: base + sum(p - base for p in parts),
    }
    for kind, combine in candidates.items():
        try:
            combined = combine()
        except ValueError:  # shapes that do not go together
            continue
        same_shape = combined is not None and combined.shape == whole.shape
        if same_shape and np.allclose(combined, whole, rtol=1e-5, atol=1e-7, equal_nan=True):
            return kind
    return None


def sample(shape: Sequence[int | None], dtype: str, rng: np.random.Generator, batched: bool = True) -> tf.Tensor:
    """Random samples; integers are 0 or 1, valid as an index nearly everywhere."""
    shape = [GUESS if dim is None else dim for dim in shape]
    if batched:
        shape[0] = sum(SIZES)
    if tf.as_dtype(dtype).is_floating:
        values = rng.uniform(0.05, 0.95, shape)
        values[: SIZES[0]] *= 0.3  # so that the parts are not alike
        return tf.cast(values, dtype)
    return tf.cast(rng.integers(0, 2, shape), dtype)


@dataclass(frozen=True)
class Findings:
    """How the outputs, added losses and written state of a call combine."""

    outputs: tuple[Combine | None, ...] = ()
    losses: tuple[Combine | None, ...] = ()
    state: dict[int, Combine | None] = field(default_factory=dict)


@dataclass
class Probe:
    """Probes the calls of a model, each kind of call once."""

    graph: KerasGraph
    known: dict[Any, Findings] = field(default_factory=dict)

    def of(self, index: int, training: bool) -> Findings:
        """What is known of a call.

        Raises:
            Exception: whatever the call raises on random samples.
        """
        if (index, training) not in self.known:
            with tf.init_scope():
                self.known[index, training] = self.run(self.graph.calls[index], training)
        return self.known[index, training]

    def run(self, call: Call, training: bool) -> Findings:
        """Run a call on all samples and on the parts."""
        rng = np.random.default_rng(0)
        op = self.graph.graph.ops[self.graph.calls.index(call)]
        symbols = {t: self.graph.symbols[t] for t in op.inputs}
        batched = {t for t in symbols if self.graph.is_batched(t)}
        whole = {t: sample(s.shape, s.dtype, rng, t in batched) for t, s in symbols.items()}
        results = []
        for rows in (slice(None), *PARTS):
            tensors = {t: v[rows] if t in batched else v for t, v in whole.items()}
            with RecordingScope([]) as scope:
                call(tensors, training)
                written = {i: scope.get_current_value(v) for i, v in scope.written.items()}
            _keras.clear_losses(call.operation)
            results.append(([tensors[t] for t in call.outputs], scope.losses, written))
            before = {i: v._value for i, v in scope.written.items()}
        (outputs, losses, state), *parts = results
        return Findings(
            tuple(combination(y, [p[0][i] for p in parts]) for i, y in enumerate(outputs)),
            tuple(combination(loss, [p[1][i] for p in parts]) for i, loss in enumerate(losses)),
            {v: combination(new, [p[2][v] for p in parts], before[v]) for v, new in state.items()},
        )


def is_known(operation: Any) -> bool:
    """Whether Keras says that this layer treats samples one by one: its own layers, unless told an axis 0."""
    if not isinstance(operation, keras.layers.Layer):
        return False
    layers = operation._flatten_layers()
    axes = [a for x in layers for name in ("axis", "axes") for a in np.ravel(getattr(x, name, None))]
    return 0 not in axes and all(
        type(x).__module__.startswith("keras.src.layers") and not isinstance(x, keras.layers.Lambda) for x in layers
    )


def check_independence(graph: KerasGraph, probe: Probe):
    """Check that no operation mixes the samples of a batch, which micro-batches would keep apart.

    Warns where an operation cannot be run on random samples.

    Raises:
        ModelError: an operation whose output for a sample depends on other samples.
    """
    seen = set()
    for index, call in enumerate(graph.calls):
        op = graph.graph.ops[index]
        shapes = str([graph.symbols[t].shape for t in op.inputs])
        key = (type(call.operation), getattr(call.operation, "function", None), shapes, str(call.kwargs))
        if is_known(call.operation) or (key in seen and op.variables):
            continue
        seen.add(key)
        try:
            outputs = probe.of(index, False).outputs
        except Exception as error:
            warnings.warn(
                f"could not check that {op.name} treats the samples of a batch one by one ({brief(error)}); if it "
                "does not, its numbers depend on micro_batches",
                stacklevel=2,
            )
            continue
        mixed = [kind for kind in outputs if kind not in (Combine.ROWS, Combine.SAME)]
        if mixed:
            raise ModelError(
                f"{op.name} mixes the samples of a batch: what it computes for a whole batch is not what it computes "
                "for its parts. Use micro_batches=1 (LayerPlacementStrategy), or keep to operations that leave "
                "dimension 0 alone"
            )


def loss_combination(loss: keras.losses.Loss, y_true: Any, y_pred: Any) -> Combine | None:
    """How the values of a loss, before its reduction, combine; `None` if it cannot be run on random samples."""
    with tf.init_scope():
        rng = np.random.default_rng(0)
        y_true, y_pred = tree.map_structure(lambda s: sample(s.shape, s.dtype, rng), (y_true, y_pred))

        def values(rows):
            return loss.call(*tree.map_structure(lambda v: tf.cast(v[rows], loss.dtype), (y_true, y_pred)))

        try:
            results = [values(rows) for rows in (slice(None), *PARTS)]
        except Exception:  # whatever it needs, it is not a batch like any other
            return None
        told = np.ptp(results[0]) > 0  # zeros alone would fit any rule
        return combination(results[0], results[1:]) if told else None
