"""Train any Keras model on many devices, unchanged and with unchanged numbers."""

import importlib

from tfpar.errors import (
    BatchError,
    DeviceError,
    FileError,
    LayoutError,
    ModelError,
    PartitionError,
    ScheduleError,
    ScopeError,
    StageError,
    TfparError,
)
from tfpar.planning.cost import Hardware, StageCost
from tfpar.planning.mesh import Coordinate, Mesh
from tfpar.planning.schedule import Action, Kind, Schedule, eager_one_f_one_b, gpipe, one_f_one_b
from tfpar.planning.timeline import Timeline, simulate

__version__ = "0.7.0"
__all__ = [
    "Action", "BackupAndRestore", "BatchError", "CheckNumerics", "Coordinate", "DataParallelStrategy",
    "DeviceError", "FileError", "Hardware", "Kind", "LayerPlacementStrategy", "LayoutError", "Mesh", "MeshStrategy",
    "ModelError", "PartitionError", "PipelineStrategy", "Schedule", "ScheduleError", "ScopeError", "StageCost",
    "StageError", "TensorParallelStrategy", "TfparError", "Timeline", "eager_one_f_one_b", "gpipe", "one_f_one_b",
    "simulate",
]  # fmt: skip


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str):
    """Strategies and callbacks are imported on first use, and TensorFlow with them."""
    if name in __all__:
        return getattr(importlib.import_module("tfpar.strategies"), name)
    raise AttributeError(f"module 'tfpar' has no attribute {name!r}")
