"""Several tasks trained on together: documents interleaved evenly, each task judged on its own scale."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lm_eval_aft.packing import Batch
from lm_eval_aft.training.objectives import Objective, Score, loss_of


class _OfTask(Protocol):
    @property
    def task(self) -> int: ...


T = TypeVar("T", bound=_OfTask)


def interleaved(items: Sequence[T]) -> list[T]:
    """Items (examples or documents) with their tasks spread evenly, each task's in the order they had.

    Item ``j`` of a task's ``n`` is put at ``(j + 1/2) / n``; tasks with as many items as each other
    take turns, a smaller one is spread over the whole. One task alone is left as it is.
    """
    counts = Counter(item.task for item in items)
    seen: Counter[int] = Counter()
    places = []
    for item in items:
        places.append(((seen[item.task] + 0.5) / counts[item.task], item.task))
        seen[item.task] += 1
    return [items[i] for i in sorted(range(len(items)), key=places.__getitem__)]


class Mixture:
    """One objective over several tasks, each with its own metric.

    Losses are each document's own task's. The selection score is the mean over tasks of each task's
    own score, after fitting a temperature *per task*: confidence is a nuisance of every task by
    itself, and with one temperature for all a vector could win by bringing the tasks' confidences
    into line without ranking one option better. Tasks count alike, however many documents each has.

    Args:
        objectives: one per task, all of the same name.
        names: the tasks.
    """

    def __init__(self, objectives: Sequence[Objective], names: Sequence[str]) -> None:
        self.name = objectives[0].name
        self.metric = ", ".join(dict.fromkeys(objective.metric for objective in objectives))
        self.objectives = list(objectives)
        self.loss = loss_of(objectives[0])
        self.names = list(names)

    def losses(self, logits: Tensor, batch: Batch) -> Tensor:
        tables = {key: one.losses(logits, batch) for key, one in self._present(batch).items()}
        if len(tables) == 1:
            return next(iter(tables.values()))
        rows = [tables[self._key(document.task)][i] for i, document in enumerate(batch.documents)]
        return torch.stack(rows)

    def outcomes(self, logits: Tensor, batch: Batch) -> list[NDArray[np.float64]]:
        """Each document's own objective's outcome, headed by a row (or entry) that says its task."""
        tables = {key: one.outcomes(logits, batch) for key, one in self._present(batch).items()}
        found = []
        for i, document in enumerate(batch.documents):
            outcome = tables[self._key(document.task)][i]
            found.append(np.concatenate([np.full_like(outcome[:1], document.task), outcome]))
        return found

    def summarise(self, outcomes: Sequence[NDArray[np.float64]]) -> Score:
        """Means over tasks; ``temperature`` is the geometric mean; ``tasks`` holds each task's own."""
        groups: dict[int, list[NDArray[np.float64]]] = {}
        for outcome in outcomes:
            groups.setdefault(int(outcome.flat[0]), []).append(outcome[1:])
        own = {task: self.objectives[task].summarise(groups[task]) for task in sorted(groups)}
        scores = list(own.values())

        def mean(values: Sequence[float]) -> float:
            return math.fsum(values) / len(values)

        return Score(
            mean([score.score for score in scores]),
            mean([score.cross_entropy for score in scores]),
            mean([score.accuracy for score in scores]),
            math.exp(mean([math.log(score.temperature) for score in scores])),
            sum(score.n for score in scores),
            math.sqrt(math.fsum(score.stderr**2 for score in scores)) / len(scores),
            {self.names[task]: score for task, score in own.items()},
        )

    def _key(self, task: int) -> str:
        return self.objectives[task].metric  # the same metric, the same computation

    def _present(self, batch: Batch) -> dict[str, Objective]:
        tasks = dict.fromkeys(document.task for document in batch.documents)
        return {self._key(task): self.objectives[task] for task in tasks}
