"""The model as author of solutions: what it writes in each round, marked, and kept in files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from lm_eval_aft.training.examples import Example
from lm_eval_aft.training.parallel import Workers
from lm_eval_aft.training.prepared import Prepared
from lm_eval_aft.training.sampling import Sampler
from lm_eval_aft.training.solutions import Marker, Solution, read_solutions, write_solutions
from lm_eval_aft.vector import SteeringVector


def round_file(folder: Path, number: int) -> Path:
    """Where a run keeps the samples that a round is trained on."""
    return folder / f"rft-round-{number}.jsonl"


class Author:
    """Writes solutions with the model, steered or not, and has the task mark them.

    What is in a run's folder already is read, not written again: files appear whole or not at all.

    Attributes:
        marker: the task's own marks.
    """

    def __init__(self, prepared: Prepared, folder: Path | None, workers: Workers, progress: bool) -> None:
        plan, task = prepared.plan, prepared.parts[0].splits.extractor.task
        assert plan.rft is not None
        self.marker = Marker(task, plan.rft.filter, plan.metric)
        self._settings, self._seed = plan.rft, plan.first_seed
        self._folder, self._workers = folder, workers
        kwargs = dict(task.config.generation_kwargs or {})
        self._sampler = Sampler(prepared.lm, kwargs, workers, progress)

    def written(
        self, number: int, vector: SteeringVector | None, problems: Sequence[Example]
    ) -> list[Solution]:
        """The samples of a round's training problems: ``rft-round-N.jsonl``."""
        title = f"round {number}: {len(problems)} problems x {self._settings.samples}"
        path = round_file(self._folder, number) if self._folder else None
        return self._kept(path, lambda: self._sampled(vector, problems, f"{number}|train", title))

    def examined(
        self, number: int, vector: SteeringVector | None, problems: Sequence[Example]
    ) -> list[Solution]:
        """One greedy answer and the samples of each problem after a round: ``rft-selection-N.jsonl``.

        Round 0 is the baseline.
        """

        def make() -> list[Solution]:
            texts = self._sampler.greedy(vector, [each.requests[0][0] for each in problems])
            greedy = self._marked(problems, [[text] for text in texts], greedy=True)
            title = f"round {number}: evaluating on {len(problems)} problems"
            return [*greedy, *self._sampled(vector, problems, f"{number}|selection", title)]

        return self._kept(self._folder / f"rft-selection-{number}.jsonl" if self._folder else None, make)

    def _kept(self, path: Path | None, make: Callable[[], list[Solution]]) -> list[Solution]:
        """What is in a file, or what ``make`` makes, which is then put there."""
        leads = self._workers.leads
        if self._workers.agree(path is not None and path.exists()):
            return list(self._workers.agree(read_solutions(path) if leads and path is not None else None))
        made = make()
        if leads and path is not None:
            write_solutions(path, made)
        return made

    def _sampled(
        self, vector: SteeringVector | None, problems: Sequence[Example], name: str, title: str
    ) -> list[Solution]:
        contexts = [each.requests[0][0] for each in problems]
        count, temperature = self._settings.samples, self._settings.temperature
        texts = self._sampler.sample(vector, contexts, count, temperature, f"{self._seed}|{name}", title)
        return self._marked(problems, texts)

    def _marked(
        self, problems: Sequence[Example], texts: Sequence[Sequence[str]], greedy: bool = False
    ) -> list[Solution]:
        pairs = [(problem, text) for problem, its in zip(problems, texts, strict=True) for text in its]
        marks = self.marker.marks([problem.doc for problem, _ in pairs], [text for _, text in pairs])
        return [
            Solution(problem.doc_id, text, mark, greedy)
            for (problem, text), mark in zip(pairs, marks, strict=True)
        ]
