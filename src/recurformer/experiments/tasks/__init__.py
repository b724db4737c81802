"""State-tracking tasks: which of them a layer learns that sees its own outputs, and up to which length.

`TASKS` lists the tasks and `make_task` makes one. `run_tasks` trains and scores models on them. `run_hybrids` compares
placements of recurrent layers.
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
