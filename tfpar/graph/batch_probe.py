"""Does what a function makes of a batch follow from what it makes of the batch's parts, and how?

Asked of numbers, not of code: the function is run on some random samples, and on two parts of them.
"""

import enum
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import tree

from tfpar.compat import _keras
from tfpar.errors import Caught
from tfpar.graph.alike import attributes, config_of
from tfpar.graph.keras_graph import Call, KerasGraph
from tfpar.graph.recording import RecordingScope
from tfpar.graph.samples import DRAWS, GUESSES, PARTS, SIZES, candidates, first_that_works, sample, sized

OF_FRAMES = 5040  # has all numbers up to 10 as factors: dim 0 can be samples times frames


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


def guesses_for(call: Call) -> list[int]:
    """For dimensions that the model leaves open: also the sizes of a call's weights, such as a table of positions."""
    return list(dict.fromkeys([*GUESSES, *(n for v in call.variables for n in v.shape if n < max(GUESSES))]))


def agreed(kinds: Sequence[Combine | None]) -> Combine | None:
    """The one way on which all draws that tell something agree."""
    return kinds[0] if kinds and len(set(kinds)) == 1 else None


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
    alike: dict[Any, list[dict[int, int | None]]] = field(default_factory=dict)  # the same, by kind of call
    written: dict[Any, list[keras.Variable]] = field(default_factory=dict)  # what a call changed, as `known`
    random: dict[Any, bool] = field(default_factory=dict)  # whether a call is, as `known`
    tried: dict[int, dict[int, tuple]] = field(default_factory=dict)  # what `shapes` found

    def shapes(self, index: int) -> dict[int, tuple]:
        """By tensor, the shapes of samples with which a call can be tried.

        Raises:
            Exception: whatever the call raises on random samples of all shapes.
        """
        if index not in self.tried:
            op = self.graph.graph.ops[index]
            tensors = list(dict.fromkeys(op.inputs))
            symbols, batched = [self.graph.symbols[t] for t in tensors], [self.graph.is_batched(t) for t in tensors]
            attempts = candidates([s.shape for s in symbols], batched, guesses=guesses_for(self.graph.calls[index]))

            def run(shapes: list[tuple]) -> dict[int, tuple]:
                found = dict(zip(tensors, shapes, strict=True))
                self.emit(index, False, self.drawn(index, np.random.default_rng(0), DRAWS[0], found))
                return found

            with tf.init_scope():
                self.tried[index] = first_that_works(attempts, run)
        return self.tried[index]

    def drawn(self, index: int, rng: np.random.Generator, draw: Callable, shapes: dict[int, tuple]) -> dict[int, Any]:
        """Random samples for the tensors that a call takes."""
        symbols = self.graph.symbols
        return {
            t: sample(shape, symbols[t].dtype, rng, self.graph.is_batched(t), draw) for t, shape in shapes.items()
        }  # fmt: skip

    def emit(self, index: int, training: bool, tensors: dict[int, Any]) -> RecordingScope:
        """Run a call on these tensors, to which its outputs are added; what it writes is recorded."""
        call = self.graph.calls[index]
        with RecordingScope([]) as scope:
            call(tensors, training)
            scope.values = {i: scope.get_current_value(v) for i, v in scope.written.items()}
        _keras.clear_losses(call.operation)
        return scope

    def of(self, index: int, training: bool) -> Findings:
        """What is known of a call.

        Raises:
            Exception: whatever the call raises on random samples.
        """
        if (index, training) not in self.known:
            with tf.init_scope():
                self.known[index, training] = self.run(index, training)
        return self.known[index, training]

    def run(self, index: int, training: bool) -> Findings:
        """Run a call on all samples and on the parts, for several draws, and see how the results combine."""
        written: dict[int, keras.Variable] = {}
        runs = [self.run_once(index, training, draw, written) for draw in DRAWS]
        self.written[index, training] = list(written.values())

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

        It is asked of shapes: the call is traced for batches of two sizes; of calls that are alike, the first.

        Returns:
            `ROWS` for look-ups of samples, `SAME` for those that do not come from samples, or `MIXED`; `None` where the
            gradient is dense, or the call cannot be traced on its own.
        """
        if index is None:
            return None
        variables = list({id(v): v for v in self.graph.calls[index].variables}.values())
        if index not in self.counts:
            shapes = str([(v.shape, v.trainable) for v in variables])
            kind = type(self.graph.calls[index].operation), key_of(self.graph, index), shapes
            if kind not in self.alike:
                self.alike[kind] = self.count_rows(index, variables)
            self.counts[index] = self.alike[kind]
        place = next((n for n, v in enumerate(variables) if v is variable), None)
        one, other = (found.get(place) for found in self.counts[index])
        if one is None or other is None:
            return None
        if one * SIZES[1] == other * SIZES[0] or has_seed(self.graph, index):
            return Combine.ROWS
        return Combine.SAME if one == other else Combine.MIXED

    def count_rows(self, index: int, variables: Sequence[keras.Variable]) -> list[dict[int, int | None]]:
        """For batches of each of two sizes, how many rows the sparse gradients by a call of some of these have."""
        symbols = {t: self.graph.symbols[t] for t in self.graph.graph.ops[index].inputs}
        batched = [self.graph.is_batched(t) for t in symbols]

        def of(attempt: tuple[int, list[tuple]]) -> list[dict[int, int | None]]:
            times, shapes = attempt
            kinds = zip(symbols.values(), shapes, batched, strict=True)
            specs = [partial(spec_of, s, shape, is_batched) for s, shape, is_batched in kinds]
            return [self.traced_rows(index, variables, [spec(times * rows) for spec in specs]) for rows in SIZES]

        guesses = guesses_for(self.graph.calls[index])
        found = list(candidates([s.shape for s in symbols.values()], batched, guesses=guesses))
        with tf.init_scope():
            return first_that_works(itertools.product((1, OF_FRAMES), found), of)

    def traced_rows(
        self, index: int, variables: Sequence[keras.Variable], inputs: list[tf.TensorSpec]
    ) -> dict[int, int | None]:
        """How many rows the sparse gradients by a call of these inputs have, by the place of their variables."""
        call, op, found = self.graph.calls[index], self.graph.graph.ops[index], {}
        learned = {n: v for n, v in enumerate(variables) if v.trainable}

        def gradients(values, inputs):
            tensors = dict(zip(dict.fromkeys(op.inputs), inputs, strict=True))
            with RecordingScope(list(zip(learned.values(), values, strict=True))):
                call(tensors, True)
            made = [tensors[t] for t in call.outputs if tensors[t].dtype.is_floating]
            for n, gradient in zip(learned, tf.gradients(made, values), strict=True):
                if isinstance(gradient, tf.IndexedSlices):
                    found[n] = gradient.indices.shape[0]
            return ()

        weights = [tf.TensorSpec(v.shape, v.dtype) for v in learned.values()]
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
        shapes, first = self.shapes(index), PARTS[0]
        batched = {t for t in shapes if self.graph.is_batched(t)}
        with tf.init_scope():
            some, other = (self.drawn(index, np.random.default_rng(n), DRAWS[0], shapes) for n in (0, others))
            tensors = {t: tf.concat([x[first], other[t][PARTS[1]]], 0) if t in batched else x for t, x in some.items()}
            self.emit(index, training, tensors)
            return [tensors[t][first] for t in self.graph.calls[index].outputs if self.graph.is_batched(t)]

    def run_once(self, index: int, training: bool, draw: Callable, changed: dict[int, keras.Variable]) -> list[Any]:
        """The state before, then outputs, losses and written state of all samples and of each part.

        Args:
            changed: is given the variables that are written.
        """
        whole = self.drawn(index, np.random.default_rng(0), draw, self.shapes(index))
        batched = {t for t in whole if self.graph.is_batched(t)}
        results: list[Any] = [{}]
        for rows in (slice(None), *PARTS):
            tensors = {t: v[rows] if t in batched else v for t, v in whole.items()}
            scope = self.emit(index, training, tensors)
            changed.update(scope.written)
            outputs = dict(enumerate(tensors[t] for t in self.graph.calls[index].outputs))
            results.append((outputs, dict(enumerate(scope.losses)), scope.values))
            results[0].update({i: _keras.stored(v) for i, v in scope.written.items()})
        return results


def key_of(graph: KerasGraph, index: int) -> Any:
    """What tells apart operations that may treat samples differently; a text, of a class of layers, if for good."""
    call, op = graph.calls[index], graph.graph.ops[index]
    shapes = [(graph.symbols[t].shape, graph.symbols[t].dtype, graph.is_batched(t)) for t in op.inputs]
    arguments = str((shapes, call.arguments(lambda ref: "tensor")))
    if not isinstance(call.operation, keras.layers.Layer):
        return type(call.operation), getattr(call.operation, "function", call.operation), arguments
    config = None if isinstance(call.operation, keras.layers.Lambda) else config_of(call.operation)
    return f"{config} {arguments}" if isinstance(config, dict) else (str(attributes(call.operation)), arguments)


def spec_of(symbol: keras.KerasTensor, shape: tuple, batched: bool, rows: int) -> tf.TensorSpec:
    """What a call is traced for where a tensor has this shape, and a batch so many rows."""
    return tf.TensorSpec(sized(shape, rows if batched else None), symbol.dtype)


def has_seed(graph: KerasGraph, index: int) -> bool:
    """Whether a call can draw random numbers from a seed of its own."""
    return any(_keras.is_seed(graph.variables[v]) for v in graph.graph.ops[index].variables)


def are_close(some: Sequence[Any], others: Sequence[Any]) -> bool:
    """Whether all of these arrays are the same, to rounding."""
    return all(np.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(some, others, strict=True))


def reads_variables(loss: keras.losses.Loss, y_true: Any, y_pred: Any) -> bool:
    """Whether a loss uses variables besides the predictions; also if it cannot be traced on its own."""

    def captures(samples: Any) -> bool:
        cast = tree.map_structure(lambda y: tf.cast(y, loss.dtype), samples)
        graph = tf.function(loss.call, autograph=False).get_concrete_function(*cast).graph
        return any(outside.dtype == tf.resource for outside, _ in graph.captures)

    return tried_loss(loss, y_true, y_pred, captures, True)


def loss_combination(loss: keras.losses.Loss, y_true: Any, y_pred: Any) -> Combine | None:
    """How the values of a loss, before its reduction, combine; `None` if it cannot be run on random samples."""

    def values(samples: Any, rows: slice) -> Any:
        return loss.call(*tree.map_structure(lambda y: tf.cast(y[rows], loss.dtype), samples))

    def combine(samples: Any) -> Combine | None:
        results = [values(samples, rows) for rows in (slice(None), *PARTS)]
        told = np.ptp(results[0]) > 0  # zeros alone would fit any rule
        return combination(results[0], results[1:]) if told else None

    return tried_loss(loss, y_true, y_pred, combine, None)


def tried_loss(loss: Any, y_true: Any, y_pred: Any, run: Callable, otherwise: Any) -> Any:
    """What `run` gives for random targets and predictions; `otherwise`, where it runs for none."""
    plain = all(isinstance(y, keras.KerasTensor) for y in (y_true, y_pred))
    given = compatible(y_true, y_pred) if plain else (y_true, y_pred)
    symbols = tree.flatten(given)

    def of(shapes: list[tuple]) -> Any:
        rng = np.random.default_rng(0)
        values = [sample(shape, y.dtype, rng) for shape, y in zip(shapes, symbols, strict=True)]
        return run(tree.pack_sequence_as(given, values))

    try:
        with tf.init_scope():
            return first_that_works(candidates([y.shape for y in symbols], [True] * len(symbols)), of)
    except Exception as error:  # whatever it needs, it is not a batch like any other
        Caught.theirs(error, f"{loss.name} on random samples")
        return otherwise


def compatible(y_true: keras.KerasTensor, y_pred: keras.KerasTensor) -> tuple[keras.KerasTensor, keras.KerasTensor]:
    """The symbols of targets and predictions, each with the sizes that it leaves open and the other has."""

    def filled(y: keras.KerasTensor, other: keras.KerasTensor) -> keras.KerasTensor:
        sizes = [*other.shape[1 : len(y.shape)], *[None] * len(y.shape)]
        known = (n if n is not None else m for n, m in zip(y.shape[1:], sizes, strict=False))
        return keras.KerasTensor((None, *known), y.dtype)

    return filled(y_true, y_pred), filled(y_pred, y_true)
