"""Training: one configuration, one loop, runs that continue exactly where they stopped."""

from recurformer.store.checkpoints import resolve
from recurformer.store.runs import read_metrics
from recurformer.training.config import TrainConfig
from recurformer.training.config_file import read_train_config
from recurformer.training.distributed import EndedElsewhereError
from recurformer.training.loop import NonFiniteError, TrainResult, train
from recurformer.training.run import TrainingError, read_run_config

__all__ = [
    "EndedElsewhereError",
    "NonFiniteError",
    "TrainConfig",
    "TrainResult",
    "TrainingError",
    "read_metrics",
    "read_run_config",
    "read_train_config",
    "resolve",
    "train",
]
