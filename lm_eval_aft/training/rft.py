"""Rejection-sampling fine-tuning: training on what the model wrote itself and its task marked right.

Source: Yuan et al. 2023, "Scaling Relationship on Learning Mathematical Reasoning with Large Language
Models"; in rounds as in Zelikman et al. 2022 (STaR): each starts anew from the frozen model, on what
the model steered by the round before has written.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import jsonlines

from lm_eval_aft.errors import AFTError
from lm_eval_aft.fingerprint import fingerprint
from lm_eval_aft.training.author import Author, round_file
from lm_eval_aft.training.card import write_card
from lm_eval_aft.training.controls import random_like
from lm_eval_aft.training.examples import Example
from lm_eval_aft.training.folder import PICTURE, SEEDS, digest, open_run, seed_file
from lm_eval_aft.training.ledger import Ledger, drop_state, save_state
from lm_eval_aft.training.parallel import Workers
from lm_eval_aft.training.prepared import Prepared
from lm_eval_aft.training.protocols import SMALLEST_SHARE
from lm_eval_aft.training.record import now
from lm_eval_aft.training.solutions import Solution, Standing, distinct_right
from lm_eval_aft.training.splits import GivenSplits
from lm_eval_aft.vector import FILE_NAME, SteeringVector


class Trained(Protocol):
    """What training a round on its solutions gives."""

    @property
    def vector(self) -> SteeringVector:
        """The median seed of the chosen layer."""

    @property
    def finalists(self) -> dict[int, SteeringVector]:
        """Every seed's vector."""


Train = Callable[[Prepared, Path | None], Trained]
Chosen = tuple[SteeringVector, dict[int, SteeringVector]]  # the vector, and the finalists by seed


class Rounds:
    """The rounds of a run; each samples, keeps what is right, trains on it and is evaluated.

    A round's layer and epoch are chosen by cross-entropy on right solutions that its own sampler
    wrote to the selection problems, one to each: held-out text of the kind the gradients see, where
    gold answers would reward their author's wording, which nothing here trains. (Gold answers stand
    in where fewer than `SMALLEST_SHARE` problems have one.) Rounds compete by what matters in the
    end, the share of selection problems that greedy decoding solves, and at equal shares by the
    share of samples that are right, which is finer; the baseline is round 0.

    All seeds of a round share its problems and solutions, those of the first seed's draw, and
    differ in order: sampling for each would cost as much again.

    Args:
        train: carries out one ordinary run of the plan's protocol on given documents, going on with
            what it finds in its folder.
    """

    def __init__(
        self, prepared: Prepared, folder: Path | None, train: Train, *, resume: bool, progress: bool
    ) -> None:
        assert prepared.plan.rft is not None
        self.prepared, self.folder, self.settings = prepared, folder, prepared.plan.rft
        self._train, self._resume = train, resume
        self._workers = Workers()
        self._author = Author(prepared, folder, self._workers, progress)
        self._problems = prepared.splits.train(prepared.plan.first_seed)
        self._ledger: Ledger | None = None
        self._run_settings: dict[str, Any] = {}
        self._noted: set[tuple[Any, Any]] = set()

    def run(self) -> Chosen:
        """Carry out the rounds; the best one's vector and finalists.

        Where no round beats the baseline, the first round's, marked so in its metadata.

        Raises:
            AFTError: the baseline's samples hold no right answer, or the folder cannot be used.
        """
        self._open()
        chosen: Chosen | None = None
        sampler: SteeringVector | None = None
        held_out: list[Solution] = []
        table: list[dict[str, Any]] = []
        best = 0
        for number in range(1, self.settings.rounds + 1):
            written = self._author.written(number, sampler, self._problems)
            kept = distinct_right(written)
            counts = self._counts(written, kept)
            self._note("sampled", number, counts)
            if not kept:
                if number == 1:
                    raise self._hopeless(len(written))
                break
            if number == 1:
                held_out, standing = self._evaluated(0, None)
                table.append(standing)
            trained, judged = self._trained(number, kept, held_out)
            sampler = trained[0]
            held_out, standing = self._evaluated(number, sampler, {**counts, "judged_on": judged})
            table.append(standing)
            chosen = chosen or trained
            if _rank(standing) <= _rank(table[best]):
                break
            best, chosen = number, trained
            if standing["greedy"] == 1.0:  # no round can be better
                break
        assert chosen is not None
        return self._finish(chosen, best, table)

    def _open(self) -> None:
        if self.folder is None or not self._workers.leads:
            return
        lm = self.prepared.lm
        asked = [each.requests for each in (*self.prepared.splits.selection, *self._problems)]
        self._run_settings = {
            **self.prepared.plan.to_dict(),
            "fingerprint": fingerprint(lm.model, lm.tokenizer),
            "documents": digest(asked),
        }
        self._ledger, _ = open_run(self.folder, self._run_settings, self._resume)
        with jsonlines.open(self._ledger.path) as reader:
            lines = list(reader.iter(type=dict))
        self._ledger.lines = len(lines)
        self._noted = {(line["event"], line.get("round")) for line in lines}

    def _note(self, event: str, number: int, entry: Mapping[str, Any]) -> None:
        """A line in the ledger, unless an earlier part of this run has written it."""
        if self._ledger is None or self.folder is None or (event, number) in self._noted:
            return
        self._ledger.append(**{"event": event, "round": number, **entry})
        save_state(self.folder, self._run_settings, self._ledger, ())

    def _evaluated(
        self, number: int, vector: SteeringVector | None, entry: Mapping[str, Any] | None = None
    ) -> tuple[list[Solution], dict[str, Any]]:
        """A round's answers to the selection problems, and its line in the table of rounds."""
        answers = self._author.examined(number, vector, self.prepared.splits.selection)
        standing = {"round": number, **Standing.of(answers).to_dict(), **(entry or {})}
        if vector is not None:
            standing |= {"layer": next(iter(vector.layers)), "norm": vector.norm()}
        self._note("round", number, standing)
        return answers, standing

    def _counts(self, written: Sequence[Solution], kept: Sequence[Solution]) -> dict[str, int]:
        return {
            "problems_tried": len(self._problems),
            "tried": len(written),
            "right": sum(each.right for each in written),
            "kept": len(kept),
            "solved": len({each.doc_id for each in kept}),
        }

    def _trained(
        self, number: int, kept: Sequence[Solution], held_out: Sequence[Solution]
    ) -> tuple[Chosen, str]:
        """A round's vector and finalists, and which text chose its layer and epoch."""
        splits = self.prepared.splits
        made = _examples(self._problems, kept)
        first = {each.doc_id: each for each in reversed(distinct_right(held_out))}
        selection, judged = _examples(splits.selection, list(first.values())), "samples"
        if len(selection) < SMALLEST_SHARE:
            selection, judged = splits.selection, "gold"
        given = GivenSplits(
            self.prepared.parts[0].splits.extractor,
            selection,
            [],
            len(made),
            splits.counts,
            splits.selection_digest,
            splits.selection_documents,
            made=made,
        )
        # A control is drawn like the finished vector: what samples is always the real one.
        plan = replace(self.prepared.plan, control=None)
        own = replace(self.prepared, plan=plan, splits=given)
        folder = self.folder / "rounds" / str(number) if self.folder else None
        if self._workers.agree(folder is not None and (folder / FILE_NAME).exists()):
            return self._workers.agree(_load(folder) if folder and self._workers.leads else None), judged
        trained = self._train(own, folder)
        return (trained.vector, trained.finalists), judged

    def _finish(self, chosen: Chosen, best: int, table: list[dict[str, Any]]) -> Chosen:
        """The vectors with the rounds in their headers; written, if there is a folder."""
        plan = self.prepared.plan
        shown = max(best, 1)
        own = {
            "rft": {
                **vars(self.settings),
                "filter": self._author.marker.filter,
                "metric": self._author.marker.metric,
                "best_round": best,
                "rounds_done": len(table) - 1,
                "table": table,
            },
            "control": plan.control,
        }

        def finished(vector: SteeringVector, seed: int) -> SteeringVector:
            vector = replace(vector, metadata={**vector.metadata, **own})
            return random_like(vector, seed) if plan.control == "random" else vector

        vector = finished(chosen[0], int(chosen[0].metadata["seed"]))
        finalists = {seed: finished(each, seed) for seed, each in chosen[1].items()}
        if self.folder is None or self._ledger is None:
            return vector, finalists
        for seed, each in finalists.items():
            each.save(seed_file(self.folder, seed))
        self._note("chosen", best, {"layer": next(iter(vector.layers)), "time": now()})
        write_card(self.folder, vector)
        drawn = self.folder / "rounds" / str(shown) / PICTURE
        if drawn.exists():
            shutil.copyfile(drawn, self.folder / PICTURE)
        # The vector last: a folder that has one is finished.
        vector.save(self.folder)
        drop_state(self.folder)
        return vector, finalists

    def _hopeless(self, tried: int) -> AFTError:
        settings, marker = self.settings, self._author.marker
        seen = f" What it wrote is in {round_file(self.folder, 1)}." if self.folder else ""
        return AFTError(
            f"rft cannot start: none of {tried} sampled solutions ({len(self._problems)} problems x "
            f"{settings.samples} samples, temperature {settings.temperature:g}) is right by "
            f"{marker.metric} after the filter {marker.filter!r}. It can only strengthen what the model "
            f"sometimes does already, and here it never did.{seen}",
            "Draw more (--rft-samples, --train-docs) or bolder samples (--rft-temperature), show the model "
            "more or fewer examples (--num-fewshot), take an easier task or another --rft-filter, or learn "
            "from the gold answers with --objective lm.",
        )


def _rank(standing: Mapping[str, Any]) -> tuple[float, float]:
    """Sorts worse rounds first."""
    return (standing["greedy"], standing["pass_at"]["1"])


def _examples(problems: Sequence[Example], solutions: Sequence[Solution]) -> list[Example]:
    """Training examples: a problem's own prompt, continued by each of its solutions."""
    known = {problem.doc_id: problem for problem in problems}
    return [
        replace(
            known[each.doc_id],
            requests=((known[each.doc_id].requests[0][0], each.text.rstrip()),),
            lengths=(float(len(each.text)),),
        )
        for each in solutions
    ]


def _load(folder: Path) -> Chosen:
    """The vector and finalists of a round that is finished."""
    finalists = [SteeringVector.load(path) for path in sorted((folder / SEEDS).iterdir())]
    return SteeringVector.load(folder), {int(each.metadata["seed"]): each for each in finalists}
