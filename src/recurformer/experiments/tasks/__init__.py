"""State-tracking tasks: what a layer that sees its own outputs can learn, and how far beyond the training length.

`TASKS` lists them, `make_task` makes one, `run_tasks` trains and scores models on them, `run_hybrids` asks which layers
need recurrence.
"""

from recurformer.experiments.tasks.generators import TASKS, Task, make_task
from recurformer.experiments.tasks.hybrids import HybridSettings, placements, run_hybrids
from recurformer.experiments.tasks.sweep import TaskSettings, run_tasks
from recurformer.experiments.tasks.training import Fit, accuracy, fit

__all__ = [
    "TASKS",
    "Fit",
    "HybridSettings",
    "Task",
    "TaskSettings",
    "accuracy",
    "fit",
    "make_task",
    "placements",
    "run_hybrids",
    "run_tasks",
]
