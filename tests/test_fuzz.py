"""Random trainings against one device: some here, thousands by `-m every`; and bugs that they must find."""

import contextlib

import fuzz
import keras
import pytest
from fuzz import KNOWN, Case, Skipped, check, failing
from training import mostly, some_fast

from tfpar.comm import collectives, gradients
from tfpar.compat import _keras, _moments
from tfpar.engine import micro_batch, stage_update
from tfpar.engine.optimizer_step import Update
from tfpar.variables.logical import LogicalVariable


@pytest.fixture(autouse=True)
def unshrunk(monkeypatch):
    """A failure is shown as it is drawn; `python tests/fuzz.py` shrinks."""
    monkeypatch.setenv("SHRINK", "0")


@pytest.mark.parametrize("number", mostly([0, 1], [0]))
def test_some(number):
    error, tried = failing(6, 100 + number)
    assert error is None, error
    assert tried["checked"] > 2


@pytest.mark.every
@pytest.mark.parametrize("number", range(20))
def test_many(number):
    error, _ = failing(100, number)
    assert error is None, error


@pytest.mark.parametrize("case", some_fast(KNOWN, *(KNOWN[n] for n in (12, 15))), ids=range(len(KNOWN)))
def test_what_failed_once(case):
    check(case)


@pytest.mark.parametrize("policy", mostly(fuzz.ROUNDING, ["float64"], ["float64"]))
def test_the_comparison_sees_one_wrong_number(policy, monkeypatch):
    case = Case(blocks=("dense",), policy=policy)
    check(case)
    original = fuzz.under_strategy

    def wrong(*args):
        told, found = original(*args)
        name = next(n for n in found if n.endswith("kernel"))
        found[name] = found[name] * (1.5 if case.policy != "float64" else 1 + 1e-8)
        return told, found

    monkeypatch.setattr(fuzz, "under_strategy", wrong)
    with pytest.raises(AssertionError, match="differs from one device"):
        check(case)


def test_rounding_that_one_device_amplifies_is_skipped():
    """The sign of what is zero but for rounding."""
    with pytest.raises(Skipped, match="one device makes"):
        check(Case("text", ("plain", "cross"), "class", optimizer="Lion(0.1)", loss="CategoricalHinge()"))


# ---- planted bugs: each has to be found within 200 cases


def gradient_sums(patch):
    def kept(values, devices, ops):
        return [list(parts) for parts in values]

    patch.setattr("tfpar.engine.weight_edge.all_reduce_gradients", kept)


def shares_of_uneven_batches(patch):
    original = micro_batch.shares
    patch.setattr(micro_batch, "shares", lambda counts: original([1] * len(counts)))


def sparse_updates_of_divided_weights(patch):
    original = gradients.sparse_part

    def unmoved(gradient, dim, shape, start, stop):
        part = original(gradient, dim, shape, start, stop)
        return part if dim else type(part)(part.values, part.indices * 0, part.dense_shape)

    patch.setattr(collectives, "sparse_part", unmoved)
    of_first = lambda parts, *rest: gradients.of_parts(parts[:1] * len(parts), *rest)  # noqa: E731
    patch.setattr("tfpar.engine.optimizer_step.of_parts", of_first)


def clipping(patch):
    patch.setattr(Update, "counted", lambda self, place: original(self, place) * 0.5)


original = Update.counted


def averages(patch):
    apply = stage_update.apply

    def forgetful(optimizer, *args):
        before = optimizer.ema_momentum
        optimizer.ema_momentum = before * 0.9
        try:
            apply(optimizer, *args)
        finally:
            optimizer.ema_momentum = before

    for module in ("stage_update", "optimizer_step"):
        patch.setattr(f"tfpar.engine.{module}.apply", forgetful)


def batch_statistics(patch):
    import tensorflow as tf

    def without_spread(parts):
        count = parts.divisor[:, None]
        total = tf.reduce_sum(count)
        return tuple(tf.reduce_sum(x * count, 0) / total for x in parts[:2])

    patch.setattr(_moments, "whole_moments", without_spread)


def accumulation(patch):
    patch.setattr("tfpar.engine.vjp.add", lambda known, gradient: gradient)


def gathered_shards(patch):
    of_lane = LogicalVariable.of_lane

    def shifted(self, lane):
        value = of_lane(self, lane)
        return value if self.sharding.dims.get("data") != 0 else keras.ops.roll(value, 1, axis=0)

    patch.setattr(LogicalVariable, "of_lane", shifted)


def largest_logit(patch):
    patch.setitem(collectives.EXCHANGES, "maximum", collectives.identity)


def seeds(patch):
    nth = _keras.nth_seed
    patch.setattr(_keras, "nth_seed", lambda seed, number: nth(seed, number + 1))


BUGS = (
    gradient_sums, shares_of_uneven_batches, sparse_updates_of_divided_weights, clipping, averages, batch_statistics,
    accumulation, gathered_shards, largest_logit, seeds,
)  # fmt: skip


@pytest.mark.parametrize("bug", mostly(BUGS, [gradient_sums], [gradient_sums]))
def test_planted_bugs_are_found(bug):
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Skipped):
        bug(patch)
        error, tried = failing(200, 7)
        assert error is not None, f"not found in {tried}"
        print(f"{bug.__name__}: found after {tried['checked']} cases that told something: {str(error)[:300]}")
