"""Random samples to try operations on: small ones, whatever the size of the model's tensors."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfpar.errors import TfparError

SIZES = (3, 5)  # samples in each of the two parts of a batch
PARTS = (slice(0, SIZES[0]), slice(SIZES[0], sum(SIZES)))
GUESSES = (16, 4, 64, 2, 256)  # for dimensions that the model leaves open, the likeliest to fit first
SMALL = 16  # larger sizes are replaced by such as these, if the operation takes them
DRAWS: tuple[Callable[[np.random.Generator, Sequence[int]], np.ndarray], ...] = (
    lambda rng, shape: rng.uniform(0.05, 0.95, shape),
    lambda rng, shape: rng.normal(0.0, 2.0, shape),
    lambda rng, shape: rng.normal(0.0, 30.0, shape),
)

Shape = tuple[int | None, ...]


def candidates(
    shapes: Sequence[Shape], batched: Sequence[bool], own: bool = True, guesses: Sequence[int] = GUESSES
) -> Iterator[list[Shape]]:
    """For tensors of these shapes, shapes to try an operation with: small ones, then their own.

    Equal sizes stay equal. Where `batched`, dim 0 is left open.

    Args:
        own: whether to try their own, if they are not small.
        guesses: for dimensions that the model leaves open.
    """
    inner = [shape[1:] if b else shape for shape, b in zip(shapes, batched, strict=True)]
    large = sorted({n for shape in inner for n in shape if n is not None and n > SMALL})
    small = {n: SMALL // 2 + 1 + k for k, n in enumerate(large)}
    guesses = guesses if any(None in shape for shape in inner) else guesses[:1]

    def sized(shape: Shape, guess: int, kept: int) -> Shape:
        """With its last `kept` sizes, the others small."""
        first = len(shape) - kept
        return tuple(guess if n is None else small.get(n, n) if d < first else n for d, n in enumerate(shape))

    full = max(map(len, inner), default=0)
    for kept in [*([0, 1] if large else []), *([full] if own else [])]:
        for guess in guesses:
            found = [sized(shape, guess, kept) for shape in inner]
            yield [(None, *shape) if b else shape for shape, b in zip(found, batched, strict=True)]


def first_that_works(attempts: Iterator[Any], run: Callable[[Any], Any]) -> Any:
    """What `run` gives for the first attempt for which it raises nothing.

    Raises:
        Exception: if all of them fail, the first that says what is wrong with the model, else the first.
    """
    errors: list[Exception] = []
    for attempt in attempts:
        try:
            return run(attempt)
        except Exception as error:
            errors.append(error)
    raise next((error for error in errors if isinstance(error, TfparError)), errors[0])


def sample(
    shape: Sequence[int | None], dtype: str, rng: np.random.Generator, batched: bool = True, draw: Callable = DRAWS[0]
) -> tf.Tensor:
    """Random samples; integers are 0 or 1, valid as an index nearly everywhere."""
    shape = sized(shape, sum(SIZES) if batched else None)
    if tf.as_dtype(dtype).is_floating:
        values = draw(rng, shape)
        if batched:
            values[: SIZES[0]] *= 0.3  # so that the parts are not alike
        return tf.cast(values, dtype)
    return tf.cast(rng.integers(0, 2, shape), dtype)


def sized(shape: Sequence[int | None], rows: int | None) -> list[int]:
    """A shape with all dimensions known, and this number of samples, unless that is `None`."""
    known = [GUESSES[0] if dim is None else dim for dim in shape]
    return known if rows is None else [rows, *known[1:]]


def small_samples(
    symbols: Sequence[Any], batched: Sequence[bool], rows: int, own: bool = True
) -> Iterator[tuple[list, list]]:
    """Symbols like these in the sizes of each of the candidates, and so many random samples for them."""
    for shapes in candidates([s.shape for s in symbols], batched, own):
        rng = np.random.default_rng(0)
        like = [keras.KerasTensor(shape, s.dtype) for shape, s in zip(shapes, symbols, strict=True)]
        values = [sample(s.shape, s.dtype, rng, b) for s, b in zip(like, batched, strict=True)]
        yield like, [x[:rows] if b else x for x, b in zip(values, batched, strict=True)]
