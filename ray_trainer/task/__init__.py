"""What is trained: the task's description, the experiment's parts, and what one batch means for a model."""

from ray_trainer.task.experiment import Experiment
from ray_trainer.task.explain import explain_forward_error
from ray_trainer.task.kinds import TASK_KINDS, TaskKind
from ray_trainer.task.spec import TaskSpec, get_default_task_specs
from ray_trainer.task.task import BatchResult, Task, loss_for

__all__ = [
    "TASK_KINDS",
    "BatchResult",
    "Experiment",
    "Task",
    "TaskKind",
    "TaskSpec",
    "explain_forward_error",
    "get_default_task_specs",
    "loss_for",
]
