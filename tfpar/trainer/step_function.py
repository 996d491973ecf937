"""A step as tf.functions, traced once for each kind of batch instead of once for each size."""

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import tensorflow as tf
from keras import tree

from tfpar.compat import _keras
from tfpar.engine import micro_batch
from tfpar.graph.recording import Discovered
from tfpar.trainer.diagnose import explained

if TYPE_CHECKING:
    from tfpar.trainer.hooks import KerasHooks

TRACING = threading.RLock()  # layers, losses and models are changed for a moment while they are traced


class StepFunction:
    """A step of a model.

    Args:
        hooks: whose.
        step: `(batch, parts) -> results`, run in one replica that stands for all.
        lazy: whether the step's own code decides which models it calls: then nothing is planned before it does.
    """

    def __init__(
        self, hooks: "KerasHooks", step: Callable[[micro_batch.Batch, micro_batch.Parts], Any], lazy: bool = False
    ):
        self.hooks, self.step, self.lazy = hooks, step, lazy
        self.functions: dict[Any, list[tuple[list[tf.TensorSpec], Callable]]] = {}
        self.known: dict[Any, Callable] = {}  # for plain batches that came before, what to call

    def __call__(self, data: Any, declared: Any = None) -> Any:
        """Run the step.

        Args:
            data: `(x, y, sample_weight)` of arrays, or a `Batch` of such pieces.
            declared: the specs under which an iterator gives them; a batch size that it leaves open stays open.
        """
        pieces = data.pieces if isinstance(data, micro_batch.Batch) else (data,)
        seen = rows_of(declared)
        key = self.key(pieces, seen)
        if key in self.known:
            function, arrays = self.known[key], [v for piece in pieces for v in piece if v is not None]
        else:
            with TRACING:
                function, arrays = self.prepared(pieces, declared, seen)
        if key is not None and function is not None:
            self.known[key] = function
        if function is None:
            return arrays
        try:
            return function(*arrays)
        except tf.errors.OpError as error:
            raise self.explained(error, pieces) from error

    def explained(self, error: tf.errors.OpError, pieces: Sequence[Any]) -> Exception:
        """What to tell of an error that a device raised."""
        if self.hooks.engine is None:
            return error
        pieces, rows, uniform = self.of(pieces)
        training = self.step == self.hooks.train_step
        return explained(
            error, self.hooks, micro_batch.Batch(pieces, rows, uniform), self.hooks.strategy.parts.fit(rows), training
        )

    def of(self, pieces: Sequence[Any]) -> tuple[tuple, int, bool]:
        """A batch as tensors, its rows, and whether all arrays have as many."""
        pieces = tuple(
            tree.map_structure(micro_batch.tensor, _keras.without_optionals(self.hooks.model, piece))
            for piece in pieces
        )
        lengths = [list(micro_batch.lengths(piece).values()) for piece in pieces]
        rows = (
            sum(max(filter(None, n), default=1) for n in lengths) if self.lazy else sum(map(micro_batch.rows, pieces))
        )
        return pieces, rows, all(len(set(n)) == 1 for n in lengths)

    def prepared(self, pieces: Sequence[Any], declared: Any, seen: int | None) -> tuple[Callable | None, Any]:
        """The function for a batch and its arguments; run eagerly, none and the results."""
        model, strategy = self.hooks.model, self.hooks.strategy
        pieces, rows, uniform = self.of(pieces)
        parts, self.hooks.seen = strategy.parts.fit(rows), rows
        learns = self.step not in (self.hooks.test_step, self.hooks.predict_step)
        while True:
            if not self.lazy:
                self.hooks.prepared(pieces[0], rows, learns)
            try:
                if model.run_eagerly:
                    given = micro_batch.Batch(pieces, rows, uniform)
                    return None, strategy.extended.run_as_one(self.step, given, parts)
                function = self.function(pieces, declared, parts, (seen, uniform))
                return function.get_concrete_function(), present(pieces)
            except Discovered as discovered:
                self.hooks.learn(discovered)

    def key(self, pieces: Sequence[Any], seen: int | None) -> Any:
        """What tells batches of a few tensors apart, at little cost; `None` for others."""
        if not all(isinstance(piece, tuple) for piece in pieces):
            return None
        if not all(v is None or type(v) is tf.__internal__.EagerTensor for piece in pieces for v in piece):
            return None
        kinds = tuple(v if v is None else (v.dtype, *v.shape) for piece in pieces for v in piece)
        return self.hooks.compilation(), len(pieces), seen, kinds

    def function(self, pieces: Sequence[Any], declared: Any, parts: micro_batch.Parts, known_of: tuple) -> Callable:
        """The tf.function for this kind of batch, made if there is none."""
        specs = self.specs(pieces, declared)
        kinds = tree.map_structure(lambda v: None if v is None else (type(v).__name__, v.dtype, v.shape.rank), pieces)
        key = parts, known_of, str(kinds)
        known = self.functions.setdefault(key, [])
        for signature, function in known:
            if all(s.is_compatible_with(v) for s, v in zip(signature, present(pieces), strict=True)):
                return function
        if not self.hooks.model.jit_compile:
            for signature, _ in known:
                specs = [s.most_specific_common_supertype([other]) for s, other in zip(specs, signature, strict=True)]

        def run(*arrays):
            left = iter(arrays)
            given = tree.map_structure(lambda v: None if v is None else next(left), pieces)
            return self.hooks.strategy.extended.run_as_one(self.step, micro_batch.Batch(given, *known_of), parts)

        function = tf.function(run, input_signature=specs, autograph=False)
        known.insert(0, (specs, function))
        return function

    def specs(self, pieces: Any, declared: Any) -> list[Any]:
        """The shapes to trace for: XLA knows all sizes, a plain function leaves open what the iterator does."""
        exact = [tf.type_spec_from_value(v) for v in present(pieces)]
        if self.hooks.model.jit_compile or declared is None:
            return exact
        given = [s for s in tf.nest.flatten(declared) if isinstance(s, tf.TypeSpec)] * len(pieces)
        if len(pieces) > 1:
            given = [tf.TensorSpec([None, *s.shape[1:]], s.dtype) for s in given]
        fits = len(given) == len(exact) and all(
            type(g) is type(e) and g.is_compatible_with(v)
            for g, e, v in zip(given, exact, present(pieces), strict=True)
        )
        return given if fits else exact


def rows_of(declared: Any) -> int | None:
    """The number of samples that an iterator declares for each batch; `None` if it leaves that open."""
    shapes = [s.shape for s in tf.nest.flatten(declared) if isinstance(s, tf.TensorSpec)]
    return shapes[0][0] if shapes and shapes[0].rank else None


def present(data: Any) -> list[Any]:
    """The leaves of a batch that are not `None`."""
    return [v for v in tree.flatten(data) if v is not None]
