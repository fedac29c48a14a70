"""Progress bar, ledger and state of a run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lm_eval_aft.termination import Terminated
from lm_eval_aft.training.fit import Candidate
from lm_eval_aft.training.ledger import Ledger, State, save_state
from lm_eval_aft.training.objectives import Score

# Seconds of an unfinished epoch that a sudden death may cost.
SAVE_EVERY = 300.0


class Events:
    """Tells the outside what a sweep does; see `lm_eval_aft.training.sweep.Events`.

    Args:
        asked: whether the process was asked to end.
    """

    def __init__(
        self,
        bar: tqdm,
        folder: Path | None,
        settings: dict[str, Any],
        ledger: Ledger | None,
        saved: dict[str, State],
        asked: Callable[[], bool] = lambda: False,
    ) -> None:
        self._bar, self._folder, self._settings, self._ledger = bar, folder, settings, ledger
        self._told = {n for n, (_, values) in saved.items() if values["stopped"] and not values["steps"]}
        self._asked, self._saved_at = asked, time.monotonic()

    def tick(self, done: int, /) -> None:
        self._bar.update(done)

    def epoch(self, candidate: Candidate, baseline: Score) -> None:
        self._bar.set_description(f"{candidate.stage}: layer {candidate.layer}, epoch {candidate.epoch}")
        if self._ledger is None:
            return
        own = {"candidate": candidate.name, "stage": candidate.stage}
        if candidate.stopped.endswith("not finite"):
            if candidate.name not in self._told:
                self._told.add(candidate.name)
                self._ledger.append(event="dropped", **own, reason=candidate.stopped)
            return
        score = candidate.scores[-1]
        self._ledger.append(
            event="epoch",
            **own,
            layer=candidate.layer,
            seed=candidate.seed,
            lr=candidate.recipe.lr,
            l2=candidate.recipe.l2,
            epoch=candidate.epoch,
            norm=candidate.norm(),
            stopped=candidate.stopped,
            baseline=baseline.score,
            **score.to_dict(),
        )

    def save(self, candidates: Iterable[Candidate]) -> None:
        if self._ledger and self._folder:
            save_state(self._folder, self._settings, self._ledger, candidates)
        self._saved_at = time.monotonic()

    def pause(self, candidates: Iterable[Candidate]) -> None:
        asked = self._asked()
        if asked or time.monotonic() - self._saved_at > SAVE_EVERY:
            self.save(candidates)
        if asked:
            raise Terminated
