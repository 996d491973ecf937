"""The strategies: what the user puts around a model."""

from tfpar.callbacks import BackupAndRestore, CheckNumerics
from tfpar.strategies.base import Strategy
from tfpar.strategies.data_parallel import DataParallelStrategy
from tfpar.strategies.layer_placement import LayerPlacementStrategy
from tfpar.strategies.mesh import MeshStrategy
from tfpar.strategies.pipeline import PipelineStrategy
from tfpar.strategies.tensor_parallel import TensorParallelStrategy

__all__ = [
    "BackupAndRestore",
    "CheckNumerics",
    "DataParallelStrategy",
    "LayerPlacementStrategy",
    "MeshStrategy",
    "PipelineStrategy",
    "Strategy",
    "TensorParallelStrategy",
]
