"""Does what a function makes of a batch follow from what it makes of the batch's parts, and how?

Asked of numbers, not of code: the function is run on some random samples, and on two parts of them.
"""

import enum
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import tree

from tfpar import _keras, _moments
from tfpar.errors import Caught, ModelError, brief, user_level
from tfpar.model import Call, KerasGraph
from tfpar.state import RecordingScope

SIZES = (3, 5)  # samples in each part
PARTS = (slice(0, SIZES[0]), slice(SIZES[0], sum(SIZES)))
GUESS = 16  # for dimensions that the model leaves open
DRAWS: tuple[Callable[[np.random.Generator, Sequence[int]], np.ndarray], ...] = (
    lambda rng, shape: rng.uniform(0.05, 0.95, shape),
    lambda rng, shape: rng.normal(0.0, 2.0, shape),
    lambda rng, shape: rng.normal(0.0, 30.0, shape),
)


class Combine(enum.Enum):
    """How the result for a batch follows from those of its parts."""

    ROWS = "concatenation"
    SAME = "each part's"
    MEAN = "mean weighted by samples"
    SUM = "sum"
    MIXED = "some of each"


def combination(whole: Any, parts: Sequence[Any], base: Any = 0) -> Combine | None:
    """How `whole` follows from `parts`, or `None`.

    Args:
        base: for state, the value before: a sum is one of changes.
    """
    tolerance = 0.05 if np.asarray(whole).dtype.itemsize == 2 else 1e-5  # of the largest number; 2: half precision
    whole, base, *parts = (np.asarray(a, np.float64) for a in (whole, base, *parts))
    largest = max((np.abs(a).max() for a in (whole, *parts) if a.size), default=0.0)
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
        if same_shape and np.allclose(combined, whole, rtol=0.0, atol=tolerance * largest):
            return kind
    return None


def agreed(kinds: Sequence[Combine | None]) -> Combine | None:
    """The one way on which all draws that tell something agree."""
    return kinds[0] if kinds and len(set(kinds)) == 1 else None


def sample(
    shape: Sequence[int | None], dtype: str, rng: np.random.Generator, batched: bool = True, draw: Callable = DRAWS[0]
) -> tf.Tensor:
    """Random samples; integers are 0 or 1, valid as an index nearly everywhere."""
    shape = sized(shape, sum(SIZES) if batched else None)
    if tf.as_dtype(dtype).is_floating:
        values = draw(rng, shape)
        values[: SIZES[0]] *= 0.3  # so that the parts are not alike
        return tf.cast(values, dtype)
    return tf.cast(rng.integers(0, 2, shape), dtype)


def sized(shape: Sequence[int | None], rows: int | None) -> list[int]:
    """A shape with all dimensions known, and this number of samples, unless that is `None`."""
    known = [GUESS if dim is None else dim for dim in shape]
    return known if rows is None else [rows, *known[1:]]


@dataclass(frozen=True)
class Findings:
    """How the outputs, added losses and written state of a call combine."""

    outputs: tuple[Combine | None, ...] = ()
    losses: tuple[Combine | None, ...] = ()
    state: dict[int, Combine | None] = field(default_factory=dict)


@dataclass
class Probe:
    """Probes the calls of a model, each once."""

    graph: KerasGraph
    known: dict[Any, Findings] = field(default_factory=dict)
    counts: dict[int, list[dict[int, int | None]]] = field(default_factory=dict)  # of rows, by call
    written: dict[Any, list[keras.Variable]] = field(default_factory=dict)  # what a call changed, as `known`
    random: dict[Any, bool] = field(default_factory=dict)  # whether a call is, as `known`

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
        """Run a call on all samples and on the parts, for several draws, and see how the results combine."""
        written: dict[int, keras.Variable] = {}
        runs = [self.run_once(call, training, draw, written) for draw in DRAWS]
        self.written[self.graph.calls.index(call), training] = list(written.values())

        def gathered(number: int, tells: Callable[[Any, Any], bool]) -> dict[int, list[Combine | None]]:
            kinds: dict[int, list[Combine | None]] = {}
            for before, whole, *parts in runs:
                for key, new in whole[number].items():
                    old = before.get(key, 0)
                    kinds.setdefault(key, [])
                    if np.all(np.isfinite(np.asarray(new, np.float64))) and tells(new, old):
                        kinds[key].append(combination(new, [p[number][key] for p in parts], old))
            return kinds

        outputs = gathered(0, lambda new, old: True)
        losses = gathered(1, lambda new, old: np.any(new))
        state = gathered(2, lambda new, old: not np.array_equal(new, old))
        if not all(outputs.values()):
            raise ValueError("its results on random samples are not finite")
        return Findings(
            tuple(map(agreed, outputs.values())), tuple(map(agreed, losses.values())),
            {v: agreed(kinds) for v, kinds in state.items()},
        )  # fmt: skip

    def rows(self, index: int | None, variable: keras.Variable) -> Combine | None:
        """How the rows of a variable's sparse gradient by a call follow from those of parts of a batch.

        It is asked of shapes: the call is traced for batches of two sizes.

        Returns:
            `ROWS` for look-ups of samples, `SAME` for those that do not come from samples, or `MIXED`; `None` where the
            gradient is dense, or the call cannot be traced on its own.
        """
        if index is None:
            return None
        if index not in self.counts:
            with tf.init_scope():
                self.counts[index] = self.count_rows(index)
        one, other = (found.get(id(variable)) for found in self.counts[index])
        if one is None or other is None:
            return None
        if one * SIZES[1] == other * SIZES[0] or has_seed(self.graph, index):
            return Combine.ROWS
        return Combine.SAME if one == other else Combine.MIXED

    def count_rows(self, index: int) -> list[dict[int, int | None]]:
        """For batches of each of two sizes, how many rows each variable's sparse gradient by a call has, by `id`."""
        call, op = self.graph.calls[index], self.graph.graph.ops[index]
        variables = [v for v in (self.graph.variables[v] for v in op.variables) if v.trainable]
        weights = [tf.TensorSpec(v.shape, v.dtype) for v in variables]
        found = []
        for rows in SIZES:
            inputs = [
                tf.TensorSpec(sized(s.shape, rows if self.graph.is_batched(t) else None), s.dtype)
                for t, s in ((t, self.graph.symbols[t]) for t in op.inputs)
            ]

            def gradients(values, inputs):
                tensors = dict(zip(op.inputs, inputs, strict=True))
                with RecordingScope(list(zip(variables, values, strict=True))):
                    call(tensors, True)
                made = [tensors[t] for t in call.outputs if tensors[t].dtype.is_floating]
                counts = {id(v): g for v, g in zip(variables, tf.gradients(made, values), strict=True)}
                sparse = {v: g for v, g in counts.items() if isinstance(g, tf.IndexedSlices)}
                found.append({v: g.indices.shape[0] for v, g in sparse.items()})
                return ()

            tf.function(gradients, autograph=False).get_concrete_function(weights, inputs)
            _keras.clear_losses(call.operation)
        return found

    def is_random(self, index: int, training: bool) -> bool:
        """Whether a call draws random numbers: from a seed of Keras', or others each time."""
        if (index, training) not in self.random:
            outputs = self.of(index, training).outputs
            seeds = any(map(_keras.is_seed, self.written[index, training]))
            plain = all(kind in (Combine.ROWS, Combine.SAME) for kind in outputs)
            self.random[index, training] = seeds or (not plain and not self.repeats(index, training))
        return self.random[index, training]

    def repeats(self, index: int, training: bool) -> bool:
        """Whether a call makes the same of the same samples, with the same random numbers."""
        return are_close(*(self.with_others(index, training, 0) for _ in range(2)))

    def sees_others(self, index: int, training: bool) -> bool:
        """Whether the first samples' results depend on the others, with the same random numbers; if that is known."""
        some, others = (self.with_others(index, training, n) for n in (0, 1))
        return self.repeats(index, training) and not are_close(some, others)

    def with_others(self, index: int, training: bool, others: int) -> list[tf.Tensor]:
        """The first samples' results in a batch with such others."""
        call, op = self.graph.calls[index], self.graph.graph.ops[index]
        first, tensors = PARTS[0], {}
        for t in op.inputs:
            symbol, batched = self.graph.symbols[t], self.graph.is_batched(t)
            one, other = (
                sample(symbol.shape, symbol.dtype, np.random.default_rng(n), batched) for n in (0, others)
            )  # fmt: skip
            tensors[t] = tf.concat([one[first], other[PARTS[1]]], 0) if batched else one
        with tf.init_scope(), RecordingScope([]):
            call(tensors, training)
        _keras.clear_losses(call.operation)
        return [tensors[t][first] for t in call.outputs if self.graph.is_batched(t)]

    def run_once(self, call: Call, training: bool, draw: Callable, changed: dict[int, keras.Variable]) -> list[Any]:
        """The state before, then outputs, losses and written state of all samples and of each part.

        Args:
            changed: is given the variables that are written.
        """
        rng = np.random.default_rng(0)
        op = self.graph.graph.ops[self.graph.calls.index(call)]
        symbols = {t: self.graph.symbols[t] for t in op.inputs}
        batched = {t for t in symbols if self.graph.is_batched(t)}
        whole = {t: sample(s.shape, s.dtype, rng, t in batched, draw) for t, s in symbols.items()}
        results: list[Any] = [{}]
        for rows in (slice(None), *PARTS):
            tensors = {t: v[rows] if t in batched else v for t, v in whole.items()}
            with RecordingScope([]) as scope:
                call(tensors, training)
                written = {i: scope.get_current_value(v) for i, v in scope.written.items()}
            _keras.clear_losses(call.operation)
            changed.update(scope.written)
            outputs = dict(enumerate(tensors[t] for t in call.outputs))
            results.append((outputs, dict(enumerate(scope.losses)), written))
            results[0].update({i: v._value for i, v in scope.written.items()})
        return results


def are_close(some: Sequence[Any], others: Sequence[Any]) -> bool:
    """Whether all of these arrays are the same, to rounding."""
    return all(np.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(some, others, strict=True))


MIXING = keras.layers.MixUp | keras.layers.CutMix


def is_known(operation: Any, rank: int) -> bool:
    """Whether Keras says that this layer treats samples one by one: its own layers, unless told the batch's axis."""
    if not isinstance(operation, keras.layers.Layer):
        return False
    layers = _keras.layers_in(operation)
    axes = [a for x in layers for name in ("axis", "axes") for a in np.ravel(getattr(x, name, None))]
    return not {0, -rank} & set(axes) and all(
        type(x).__module__.startswith("keras.src.layers") and not isinstance(x, keras.layers.Lambda | MIXING)
        for x in layers
    )


def has_seed(graph: KerasGraph, index: int) -> bool:
    """Whether a call can draw random numbers from a seed of its own."""
    return any(_keras.is_seed(graph.variables[v]) for v in graph.graph.ops[index].variables)


def mixing(graph: KerasGraph, probe: Probe) -> Iterator[int]:
    """The operations whose output for a sample depends on other samples of the batch.

    Warns where an operation cannot be run on random samples.
    """
    known: dict[Any, bool] = {}
    for index, call in enumerate(graph.calls):
        shapes = [graph.symbols[t].shape for t in graph.graph.ops[index].inputs]
        layer = id(call.operation) if isinstance(call.operation, keras.layers.Layer) else type(call.operation)
        key = (layer, getattr(call.operation, "function", None), str((shapes, call.args, call.kwargs)))
        if key not in known and not is_known(call.operation, len(shapes[0]) if shapes else 0):
            known[key] = mixes(graph, probe, index)
        if known.get(key):
            yield index


def mixes(graph: KerasGraph, probe: Probe, index: int) -> bool:
    """Whether an operation gives other results for some random samples than for parts of them."""
    name, call = graph.graph.ops[index].name, graph.calls[index]
    if any(isinstance(x, MIXING) for x in _keras.layers_in(call.operation)):
        return True
    try:
        kinds: list[Combine | None] = []
        for training in (False, True):
            normalizes = training and _moments.batch_normalizations(call.operation)
            if probe.is_random(index, training):
                if not normalizes and probe.sees_others(index, training):
                    return True
            elif not normalizes:
                kinds += probe.of(index, training).outputs
    except Exception as error:
        Caught.theirs(error, f"{name} on random samples")
        warnings.warn(
            f"could not check that {name} treats the samples of a batch one by one ({brief(error)}); if it does not, "
            "its numbers depend on how the batch is divided",
            stacklevel=user_level(),
        )
        return False
    return any(kind not in (Combine.ROWS, Combine.SAME) for kind in kinds)


def check_independence(graph: KerasGraph, probe: Probe):
    """Check that no operation mixes the samples of a batch, which micro-batches would keep apart.

    Raises:
        ModelError: an operation whose output for a sample depends on other samples.
    """
    for index in mixing(graph, probe):
        raise ModelError(
            f"{graph.graph.ops[index].name} mixes the samples of a batch: what it computes for a whole batch is not "
            "what it computes for its parts. Use micro_batches=1 (LayerPlacementStrategy), or keep to operations that "
            "leave dimension 0 alone"
        )


def reads_variables(loss: keras.losses.Loss, y_true: Any, y_pred: Any) -> bool:
    """Whether a loss uses variables besides the predictions; also if it cannot be traced on its own."""
    with tf.init_scope():
        rng = np.random.default_rng(0)
        symbols = compatible(y_true, y_pred)
        samples = tree.map_structure(lambda s: tf.cast(sample(s.shape, s.dtype, rng), loss.dtype), symbols)
        try:
            graph = tf.function(loss.call, autograph=False).get_concrete_function(*samples).graph
        except Exception as error:
            Caught.theirs(error, f"{loss.name} on random samples")
            return True
    return any(outside.dtype == tf.resource for outside, _ in graph.captures)


def compatible(y_true: Any, y_pred: Any) -> tuple[Any, Any]:
    """The symbols of targets and predictions, each with the sizes that it leaves open and the other has."""
    if not all(isinstance(y, keras.KerasTensor) for y in (y_true, y_pred)):
        return y_true, y_pred

    def filled(y: keras.KerasTensor, other: keras.KerasTensor) -> keras.KerasTensor:
        sizes = [*other.shape[1 : len(y.shape)], *[None] * len(y.shape)]
        return keras.KerasTensor(
            (None, *(n if n is not None else m for n, m in zip(y.shape[1:], sizes, strict=False))), y.dtype
        )

    return filled(y_true, y_pred), filled(y_pred, y_true)


def loss_combination(loss: keras.losses.Loss, y_true: Any, y_pred: Any) -> Combine | None:
    """How the values of a loss, before its reduction, combine; `None` if it cannot be run on random samples."""
    with tf.init_scope():
        rng = np.random.default_rng(0)
        y_true, y_pred = tree.map_structure(lambda s: sample(s.shape, s.dtype, rng), compatible(y_true, y_pred))

        def values(rows):
            return loss.call(*tree.map_structure(lambda v: tf.cast(v[rows], loss.dtype), (y_true, y_pred)))

        try:
            results = [values(rows) for rows in (slice(None), *PARTS)]
        except Exception as error:  # whatever it needs, it is not a batch like any other
            Caught.theirs(error, f"{loss.name} on random samples")
            return None
        told = np.ptp(results[0]) > 0  # zeros alone would fit any rule
        return combination(results[0], results[1:]) if told else None
