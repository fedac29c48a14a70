"""Solutions that a model has generated for a task's problems, marked by the task itself."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonlines
from lm_eval.api.instance import Instance

from lm_eval_aft._util.errors import AFTError
from lm_eval_aft._util.files import replacing
from lm_eval_aft._util.private_names import borrowed

if TYPE_CHECKING:
    from lm_eval.api.task import ConfigurableTask


@dataclass(frozen=True)
class Solution:
    """One generated solution of a problem.

    Attributes:
        doc_id: the problem's index in its split.
        text: as the harness passes it to the task's filters: cut at the first stop string.
        right: whether the task's own filter and metric accept it.
        greedy: decoded greedily, not sampled.
    """

    doc_id: int
    text: str
    right: bool
    greedy: bool = False


class Marker:
    """Marks texts right or wrong by the task's own filters and ``process_results``, as lm-eval does.

    Args:
        filter_name: one of the task's filters; default its first.
        metric: one of the task's metrics; default its first.

    Raises:
        AFTError: the task has no such filter or metric, or lower values of the metric are better.
    """

    def __init__(
        self, task: ConfigurableTask, filter_name: str | None = None, metric: str | None = None
    ) -> None:
        self.task = task
        name = task.config.task
        with borrowed("lm-eval: ConfigurableTask._filters"):
            filters = {each.name: each for each in task._filters}
        metrics = list(task.aggregation())
        self.filter = next(iter(filters)) if filter_name is None else filter_name
        self.metric = metrics[0] if metric is None else metric
        if self.filter not in filters:
            raise AFTError(
                f"The task {name!r} has no filter {self.filter!r}.",
                f"--rft-filter takes one of: {', '.join(filters)}.",
            )
        if self.metric not in metrics:
            raise AFTError(
                f"The task {name!r} has no metric {self.metric!r}.",
                f"--metric takes one of: {', '.join(metrics)}.",
            )
        if not task.higher_is_better().get(self.metric, True):
            raise AFTError(
                f"Lower values of {self.metric!r} are better: it does not mark right answers.",
                "Choose a metric that is 1 for a right answer and 0 for a wrong one with --metric.",
            )
        self._ensemble = filters[self.filter]

    def marks(self, problems: Sequence[dict[str, Any]], texts: Sequence[str]) -> list[bool]:
        """Whether each text is a right answer to the document beside it.

        Raises:
            AFTError: the metric gave a value other than 0 and 1, or the filter needs several samples at
                once.
        """
        instances = [
            Instance("generate_until", problem, ("", {}), 0, (self.task.config.task, place, 1), [text])
            for place, (problem, text) in enumerate(zip(problems, texts, strict=True))
        ]
        if not instances:
            return []
        try:
            self._ensemble.apply(instances)
        except AssertionError as error:
            raise AFTError(
                f"The filter {self.filter!r} cannot be applied to a single sample ({error}).",
                "Choose another one of the task's filters with --rft-filter.",
            ) from error
        return [self._right(instance) for instance in instances]

    def _right(self, instance: Instance) -> bool:
        value = self.task.process_results(instance.doc, [instance.filtered_resps[self.filter]])[self.metric]
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if number not in (0.0, 1.0):
            raise AFTError(
                f"The metric {self.metric!r} of {self.task.config.task!r} gave {value!r} for one answer; rft "
                "needs one that is 1 for right and 0 for wrong answers.",
                "Choose another one with --metric, or train with --objective lm.",
            )
        return number == 1.0


def distinct_right(solutions: Iterable[Solution]) -> list[Solution]:
    """The right samples in order, each text once per problem (ignoring white space at its ends)."""
    found = {
        (each.doc_id, each.text.strip()): each
        for each in reversed([s for s in solutions if s.right and not s.greedy and s.text.strip()])
    }
    return list(reversed(found.values()))


def pass_at_k(tried: int, right: int, k: int) -> float:
    """Unbiased estimate of the chance that at least one of ``k`` samples is right.

    1 - C(tried - right, k) / C(tried, k): Chen et al. 2021, "Evaluating Large Language Models
    Trained on Code", equation 1. Needs ``1 <= k <= tried``.

    >>> pass_at_k(tried=4, right=1, k=2)
    0.5
    """
    return 1.0 - math.comb(tried - right, k) / math.comb(tried, k)


@dataclass(frozen=True)
class SolveRates:
    """How a model does on problems, by the task's metric; shares between 0 and 1.

    Attributes:
        greedy: share of problems that greedy decoding solves.
        pass_at: k -> mean over problems of `pass_at_k`; that of 1 is the mean over samples.
        problems: how many problems.
    """

    greedy: float
    pass_at: dict[str, float]
    problems: int

    @classmethod
    def of(cls, solutions: Iterable[Solution]) -> SolveRates:
        """From one greedy answer and equally many samples of every problem."""
        greedy: dict[int, bool] = {}
        sampled: dict[int, list[bool]] = {}
        for each in solutions:
            if each.greedy:
                greedy[each.doc_id] = each.right
            else:
                sampled.setdefault(each.doc_id, []).append(each.right)
        n = min(map(len, sampled.values()))
        pass_at = {}
        for k in sorted({*(2**i for i in range(n.bit_length())), n}):
            shares = [pass_at_k(len(marks), sum(marks), k) for marks in sampled.values()]
            pass_at[str(k)] = math.fsum(shares) / len(shares)
        return cls(sum(greedy.values()) / len(greedy), pass_at, len(greedy))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for ledgers and headers."""
        return asdict(self)


def write_solutions(path: Path, solutions: Iterable[Solution]) -> None:
    """Write solutions as JSON Lines, whole or not at all."""
    with replacing(path) as temporary, jsonlines.open(temporary, "w") as writer:
        writer.write_all(asdict(each) for each in solutions)


def read_solutions(path: Path) -> list[Solution]:
    """Read what `write_solutions` wrote.

    Raises:
        AFTError: the file is damaged.
    """
    try:
        with jsonlines.open(path) as reader:
            return [Solution(**line) for line in reader.iter(type=dict)]
    except (jsonlines.InvalidLineError, TypeError, OSError) as error:
        raise AFTError(f"{path} is damaged ({error}).", "Start again with --overwrite.") from error
