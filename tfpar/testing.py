"""For tests: logical devices on a machine without GPUs, and the comparison of two models, number by number."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tfpar.comm.collectives import EXCHANGES, LOCAL
from tfpar.errors import DeviceError
from tfpar.trainer.hooks import steps_of
from tfpar.trainer.step_function import StepFunction


def logical_cpus(count: int, threads: int | None = None):
    """Make `count` logical devices of the CPU, before TensorFlow starts.

    Args:
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
    """The largest difference of any number in two arrays, relative to the largest magnitude in the first.

    Infinite for arrays of different shapes, and where one has a NaN or an infinity that the other has not.

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
    """The largest difference of any number in two arrays; infinite as for `difference`."""
    one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
    if one.shape != other.shape:
        return float("inf")
    same = (one == other) | (np.isnan(one) & np.isnan(other))
    if not np.isfinite(one[~same]).all() or not np.isfinite(other[~same]).all():
        return float("inf")
    return float(np.abs(one[~same] - other[~same]).max(initial=0.0))


def named_values(model: Any) -> dict[str, np.ndarray]:
    """Every weight, state and optimizer slot of a model, in the order of creation."""
    variables = [*model.variables, *(model.optimizer.variables if getattr(model, "optimizer", None) else [])]
    return {f"{i} {v.path}": np.asarray(v.numpy(), np.float64) for i, v in enumerate(variables)}


def assert_same(one: Any, other: Any, rtol: float, atol: float = 0.0):
    """Check that two models hold the same numbers: each variable on its own, relative to its largest magnitude.

    Raises:
        AssertionError: names each variable that differs, and by how much.
    """
    a, b = named_values(one), named_values(other)
    assert len(a) == len(b), f"{len(a)} variables against {len(b)}"
    wrong = different(list(a), list(a.values()), list(b.values()), rtol, atol)
    assert not wrong, "these differ by more than they may:\n" + "\n".join(wrong)


def different(names: Sequence[str], one: Sequence[Any], other: Sequence[Any], rtol: float, atol: float) -> list[str]:
    """The names of the arrays that differ, each with its difference, or the two shapes."""
    return [
        f"{name}: {difference(a, b):.2g}" if np.shape(a) == np.shape(b) else f"{name}: {np.shape(a)}, not {np.shape(b)}"
        for name, a, b in zip(names, one, other, strict=True)
        if difference(a, b) > rtol and distance(a, b) > atol
    ]


KINDS = "|".join(kind for kind in EXCHANGES if kind not in LOCAL)


def traced_exchanges(model: Any, *batch: Any) -> list[tuple[str, str]]:
    """The collectives between ranks in the TensorFlow graph of a training step, each as its kind and where it is.

    A collective counts if it has operations on every device.

    Args:
        model: compiled, constructed in the scope of a `TensorParallelStrategy`.
        batch: `x, y` or `x, y, sample_weight`.

    Example:
        >>> assert traced_exchanges(model, x, y) == planned_exchanges(strategy.explain(model))  # doctest: +SKIP
    """
    steps = steps_of(model)
    function, _ = StepFunction(steps, steps.train_step).prepared((batch,), None, None)
    devices: dict[tuple[str, str], set[str]] = {}
    for op in function.graph.get_operations():
        found = re.match(rf"(?:replica\d+/)?({KINDS})/(weights|.+?/(?:{KINDS})(?:-of-gradient)?)/", op.name)
        if found:
            devices.setdefault((found[1], found[2]), set()).add(op.device)
    ranks = set(map(str, steps.strategy.mesh.devices))
    return sorted(key for key, on in devices.items() if len(on) >= len(ranks))


def planned_exchanges(plan: Any) -> list[tuple[str, str]]:
    """The collectives between ranks that a plan announces, in the same form."""
    return sorted((e.kind, e.scope) for e in plan.exchanges)
