"""Training a vector on the training split of a harness task."""

from __future__ import annotations

from lm_eval_aft.training.plan import TrainingPlan
from lm_eval_aft.training.train import TrainingResult, train_vector

__all__ = ["TrainingPlan", "TrainingResult", "train_vector"]
