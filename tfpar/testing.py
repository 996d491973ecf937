"""For tests: logical devices on a machine without GPUs, and the comparison of two models, number by number."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tfpar.comm.collectives import EXCHANGES, LOCAL
from tfpar.errors import DeviceError
from tfpar.planning.plan import Plan
from tfpar.trainer.hooks import hooks_of
from tfpar.trainer.step_function import StepFunction

__all__ = [
    "assert_same", "difference", "distance", "logical_cpus", "named_values", "planned_exchanges", "traced_exchanges",
]  # fmt: skip


def logical_cpus(count: int, threads: int | None = None):
    """Make `count` logical devices of the CPU, which share its cores, before TensorFlow starts.

    Args:
        count: how many; they are `"CPU:0"`, `"CPU:1"` and so on.
        threads: how many operations run at once, each on one core; TensorFlow's choice if not given.

    Raises:
        DeviceError: TensorFlow has started already; call this first in the process.

    Example:
        >>> logical_cpus(4)  # doctest: +SKIP
    """
    cpu = tf.config.list_physical_devices("CPU")[0]
    try:
        if threads:
            tf.config.threading.set_intra_op_parallelism_threads(1)
            tf.config.threading.set_inter_op_parallelism_threads(threads)
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * count)
    except RuntimeError as error:
        found = len(tf.config.list_logical_devices("CPU"))
        raise DeviceError(
            f"TensorFlow has started, with {found} CPU devices: call logical_cpus({count}) before anything is computed "
            "or any model or strategy is made, best right after the imports; in a notebook, restart the kernel first"
        ) from error


def difference(one: Any, other: Any) -> float:
    """The largest difference of any number in two arrays, relative to the largest finite magnitude in the first.

    Absolute if that is zero; infinite for arrays of different shapes, and where one has a NaN or an infinity that the
    other has not.

    Example:
        >>> difference([100.0, 1.0], [100.0, 2.0])
        0.01
        >>> difference([1.0, 2.0], [1.0, float("nan")])
        inf
    """
    one = np.asarray(one, np.float64)
    scale = np.abs(one[np.isfinite(one)]).max(initial=0.0)
    return float(distance(one, other) / (scale if scale > 0 else 1.0))


def distance(one: Any, other: Any) -> float:
    """The largest absolute difference of any number in two arrays; infinite as for `difference`.

    Example:
        >>> distance([100.0, 1.0], [100.0, 2.0])
        1.0
    """
    one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
    if one.shape != other.shape:
        return float("inf")
    same = (one == other) | (np.isnan(one) & np.isnan(other))
    if not np.isfinite(one[~same]).all() or not np.isfinite(other[~same]).all():
        return float("inf")
    return float(np.abs(one[~same] - other[~same]).max(initial=0.0))


def named_values(model: Any) -> dict[str, np.ndarray]:
    """Every weight, state and optimizer variable of a model in float64, by number and path: `"0 dense/kernel"`."""
    variables = [*model.variables, *(model.optimizer.variables if getattr(model, "optimizer", None) else [])]
    return {f"{i} {v.path}": np.asarray(v.numpy(), np.float64) for i, v in enumerate(variables)}


def assert_same(one: Any, other: Any, rtol: float, atol: float = 0.0):
    """Check that two models have the same numbers: each weight, state and optimizer variable on its own, in order.

    Args:
        rtol: how much a variable may differ, relative to its largest magnitude in the first model.
        atol: absolute differences up to this are ignored.

    Raises:
        AssertionError: names each variable that differs by more than both, and by how much; or says that one model has
            more variables than the other.

    Example:
        >>> assert_same(on_one_device, under_a_strategy, rtol=1e-5)  # doctest: +SKIP
    """
    a, b = named_values(one), named_values(other)
    assert len(a) == len(b), f"{len(a)} variables against {len(b)}"
    wrong = different(list(a), list(a.values()), list(b.values()), rtol, atol)
    assert not wrong, "these differ by more than they may:\n" + "\n".join(wrong)


def different(names: Sequence[str], one: Sequence[Any], other: Sequence[Any], rtol: float, atol: float) -> list[str]:
    """The names of the arrays that differ by more than `rtol` and `atol`, each with its difference, or both shapes."""
    return [
        f"{name}: {difference(a, b):.2g}" if np.shape(a) == np.shape(b) else f"{name}: {np.shape(a)}, not {np.shape(b)}"
        for name, a, b in zip(names, one, other, strict=True)
        if difference(a, b) > rtol and distance(a, b) > atol
    ]


KINDS = "|".join(kind for kind in EXCHANGES if kind not in LOCAL)


def traced_exchanges(model: Any, *batch: Any) -> list[tuple[str, str]]:
    """The collectives in the TensorFlow graph of a training step, which is traced and does not run.

    A collective counts if it has operations on every device of the mesh, so that there must be one stage.

    Args:
        model: compiled, constructed in the scope of a `TensorParallelStrategy`.
        batch: `x, y` or `x, y, sample_weight`.

    Returns:
        For each collective its kind, such as `"all-reduce"`, and its scope, which begins with the operation; sorted.

    Example:
        >>> assert traced_exchanges(model, x, y) == planned_exchanges(strategy.explain(model))  # doctest: +SKIP
    """
    hooks = hooks_of(model)
    function, _ = StepFunction(hooks, hooks.train_step).prepared((batch,), None, None)
    devices: dict[tuple[str, str], set[str]] = {}
    for op in function.graph.get_operations():
        found = re.match(rf"(?:[a-z]+\d+/)*({KINDS})/(weights|.+?/(?:{KINDS})(?:-of-gradient)?)/", op.name)
        if found:
            devices.setdefault((found[1], found[2]), set()).add(op.device)
    ranks = set(map(str, hooks.strategy.mesh.devices))
    return sorted(key for key, on in devices.items() if len(on) >= len(ranks))


def planned_exchanges(plan: Plan) -> list[tuple[str, str]]:
    """The collectives that a plan announces, in the form of `traced_exchanges`.

    Those of the loss are in it once the model has been traced or trained with targets.

    Args:
        plan: what `strategy.explain` returns.
    """
    return sorted((e.kind, e.scope) for e in plan.exchanges)
