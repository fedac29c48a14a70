"""Rejection-sampling fine-tuning: training on the model's own solutions that its task marks right.

Source: Yuan et al. 2023, "Scaling Relationship on Learning Mathematical Reasoning with Large Language
Models"; in rounds as in Zelikman et al. 2022 (STaR): each starts anew from the frozen model, and trains on
solutions sampled with the vector of the round before.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from lm_eval.api.instance import Instance
from torch import Tensor
from tqdm import tqdm
from transformers import StoppingCriteria, StoppingCriteriaList

from lm_eval_aft._util.errors import AFTError
from lm_eval_aft._util.private_names import borrowed
from lm_eval_aft._util.process import now
from lm_eval_aft.harness.examples import Example
from lm_eval_aft.harness.grading import (
    Marker,
    Solution,
    SolveRates,
    distinct_right,
    read_solutions,
    write_solutions,
)
from lm_eval_aft.harness.splits import Splits
from lm_eval_aft.lm import AFTLM
from lm_eval_aft.steering.fingerprint import fingerprint
from lm_eval_aft.steering.vector import SteeringVector
from lm_eval_aft.steering.vector_file import FILE_NAME
from lm_eval_aft.training.artifacts import write_card
from lm_eval_aft.training.candidate import Workers
from lm_eval_aft.training.checkpoint import (
    PAGE,
    PICTURE,
    SEEDS,
    Listener,
    TrainingLedger,
    digest,
    drop_state,
    open_run,
    save_state,
    seed_file,
)
from lm_eval_aft.training.recipe import SMALLEST_SHARE
from lm_eval_aft.training.selection import solve_rate
from lm_eval_aft.training.setup import Prepared, random_like


class Trained(Protocol):
    """The result of training on a round's solutions; see `lm_eval_aft.training.run.TrainingResult`."""

    @property
    def vector(self) -> SteeringVector: ...

    @property
    def finalists(self) -> dict[int, SteeringVector]: ...


Train = Callable[[Prepared, Path | None], Trained]
Chosen = tuple[SteeringVector, dict[int, SteeringVector]]  # the vector, and the finalists by seed


class Rounds:
    """The rounds of a run: each samples solutions, keeps the right ones, trains on them and is evaluated.

    A round's layer and epoch are chosen by cross-entropy on right solutions of the selection problems, one
    each, sampled by the round before: held-out text like the training text, whereas gold answers would
    reward a wording that is not trained. (Gold answers are used where fewer than `SMALLEST_SHARE` problems
    have a right solution.) Rounds are compared by the share of selection problems that greedy decoding
    solves, and at equal shares by the share of right samples, which is finer; the baseline is round 0.

    All seeds of a round share its problems and solutions, those of the first seed's draw, in different
    orders: sampling for each seed would multiply the cost.

    Args:
        train: carries out one ordinary run of the plan's protocol on given documents; it resumes from
            what is in its folder.
    """

    def __init__(
        self,
        prepared: Prepared,
        folder: Path | None,
        train: Train,
        *,
        resume: bool,
        progress: bool,
        listener: Listener | None = None,
    ) -> None:
        assert prepared.plan.rft is not None
        self.prepared, self.folder, self.settings = prepared, folder, prepared.plan.rft
        self._train, self._resume, self._listener = train, resume, listener
        self._workers = Workers()
        self._sampler = SolutionSampler(prepared, folder, self._workers, progress)
        self._problems = prepared.splits.train(prepared.plan.first_seed)
        self._ledger: TrainingLedger | None = None
        self._run_settings: dict[str, Any] = {}
        self._noted: set[tuple[Any, Any]] = set()

    def run(self) -> Chosen:
        """Carry out the rounds and return the best one's vector and finalists.

        Where no round beats the baseline, they are the first round's, and the metadata say so.

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
            written = self._sampler.training_samples(number, sampler, self._problems)
            kept = distinct_right(written)
            counts = self._counts(written, kept)
            self._note("sampled", number, counts)
            if not kept:
                if number == 1:
                    raise self._nothing_right(len(written))
                break
            if number == 1:
                held_out, row = self._evaluated(0, None)
                table.append(row)
            trained, judged = self._trained(number, kept, held_out)
            sampler = trained[0]
            held_out, row = self._evaluated(number, sampler, {**counts, "judged_on": judged})
            table.append(row)
            chosen = chosen or trained
            if solve_rate(row) <= solve_rate(table[best]):
                break
            best, chosen = number, trained
            if row["greedy"] == 1.0:  # no round can be better
                break
        assert chosen is not None
        return self._finish(chosen, best, table)

    def _open(self) -> None:
        if self.folder is None or not self._workers.is_main:
            return
        lm = self.prepared.lm
        asked = [each.requests for each in (*self.prepared.splits.selection, *self._problems)]
        self._run_settings = {
            **self.prepared.plan.to_dict(),
            "fingerprint": fingerprint(lm.model, lm.tokenizer),
            "documents": digest(asked),
        }
        self._ledger, _ = open_run(self.folder, self._run_settings, self._resume, self._listener)
        lines = self._ledger.read()
        self._ledger.lines = len(lines)
        self._noted = {(line["event"], line.get("round")) for line in lines}

    def _note(self, event: str, number: int, entry: Mapping[str, Any]) -> None:
        """Add a line to the ledger, unless this run wrote it before it was interrupted."""
        if self._ledger is None or self.folder is None or (event, number) in self._noted:
            return
        self._ledger.append(**{"event": event, "round": number, **entry})
        save_state(self.folder, self._run_settings, self._ledger, ())

    def _evaluated(
        self, number: int, vector: SteeringVector | None, entry: Mapping[str, Any] | None = None
    ) -> tuple[list[Solution], dict[str, Any]]:
        """A round's answers to the selection problems, and its line in the table of rounds."""
        answers = self._sampler.selection_answers(number, vector, self.prepared.splits.selection)
        row = {"round": number, **SolveRates.of(answers).to_dict(), **(entry or {})}
        if vector is not None:
            row |= {"layer": next(iter(vector.layers)), "norm": vector.norm(), "share": vector.share()}
        self._note("round", number, row)
        return answers, row

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
        """A round's vector and finalists, and the kind of text that its layer and epoch were chosen on."""
        splits = self.prepared.splits
        made = _examples(self._problems, kept)
        first = {each.doc_id: each for each in reversed(distinct_right(held_out))}
        selection, judged = _examples(splits.selection, list(first.values())), "samples"
        if len(selection) < SMALLEST_SHARE:
            selection, judged = splits.selection, "gold"
        given = Splits(
            self.prepared.parts[0].splits.extractor,
            selection,
            pool=[],
            train_docs=len(made),
            counts=splits.counts,
            selection_digest=splits.selection_digest,
            selection_documents=splits.selection_documents,
            given=made,
        )
        # Only the finished vector is replaced by a control: sampling needs the real one.
        plan = replace(self.prepared.plan, control=None)
        own = replace(self.prepared, plan=plan, splits=given)
        folder = self.folder / "rounds" / str(number) if self.folder else None
        if self._workers.broadcast(folder is not None and (folder / FILE_NAME).exists()):
            loaded: Chosen = self._workers.broadcast(
                _load(folder) if folder and self._workers.is_main else None
            )
            return loaded, judged
        trained = self._train(own, folder)
        return (trained.vector, trained.finalists), judged

    def _finish(self, chosen: Chosen, best: int, table: list[dict[str, Any]]) -> Chosen:
        """The vectors with the rounds in their headers; written, if there is a folder."""
        plan = self.prepared.plan
        shown = max(best, 1)
        own = {
            "rft": {
                **asdict(self.settings),
                "filter": self._sampler.marker.filter,
                "metric": self._sampler.marker.metric,
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
        for name in (PICTURE, PAGE):
            drawn = self.folder / "rounds" / str(shown) / name
            if drawn.exists():
                shutil.copyfile(drawn, self.folder / name)
        # The vector last: a folder that has one is finished.
        vector.save(self.folder)
        drop_state(self.folder)
        return vector, finalists

    def _nothing_right(self, tried: int) -> AFTError:
        settings, marker = self.settings, self._sampler.marker
        seen = f" What it wrote is in {round_file(self.folder, 1)}." if self.folder else ""
        return AFTError(
            f"rft cannot start: none of {tried} sampled solutions ({len(self._problems)} problems x "
            f"{settings.samples} samples, temperature {settings.temperature:g}) is right by "
            f"{marker.metric} after the filter {marker.filter!r}. It can only strengthen what the model "
            f"sometimes does already, and here it never did.{seen}",
            "Draw more samples (--rft-samples, --train-docs) or more varied ones (--rft-temperature), show "
            "the model more or fewer examples (--num-fewshot), take an easier task or another --rft-filter, "
            "or train on the gold answers with --objective lm.",
        )


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


# Each round's samples, marked and kept in files.


def round_file(folder: Path, number: int) -> Path:
    """Where a run keeps the samples that a round is trained on."""
    return folder / f"rft-round-{number}.jsonl"


class SolutionSampler:
    """Samples solutions from the model, steered or not, and has the task mark them.

    Samples that a run's folder already holds are read, not drawn again: files appear whole or not at all.

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

    def training_samples(
        self, number: int, vector: SteeringVector | None, problems: Sequence[Example]
    ) -> list[Solution]:
        """The samples of a round's training problems: ``rft-round-N.jsonl``."""
        title = f"round {number}: {len(problems)} problems x {self._settings.samples}"
        path = round_file(self._folder, number) if self._folder else None
        return self._cached(path, lambda: self._sampled(vector, problems, f"{number}|train", title))

    def selection_answers(
        self, number: int, vector: SteeringVector | None, problems: Sequence[Example]
    ) -> list[Solution]:
        """A greedy answer and the samples of each problem after a round: ``rft-selection-N.jsonl``.

        Round 0 is the baseline.
        """

        def make() -> list[Solution]:
            texts = self._sampler.greedy(vector, [each.requests[0][0] for each in problems])
            greedy = self._marked(problems, [[text] for text in texts], greedy=True)
            title = f"round {number}: evaluating on {len(problems)} problems"
            return [*greedy, *self._sampled(vector, problems, f"{number}|selection", title)]

        return self._cached(self._folder / f"rft-selection-{number}.jsonl" if self._folder else None, make)

    def _cached(self, path: Path | None, make: Callable[[], list[Solution]]) -> list[Solution]:
        """The solutions in a file, or those that ``make`` returns, which are then written there."""
        path = path if self._workers.is_main else None
        if self._workers.broadcast(path is not None and path.exists()):
            return list(self._workers.broadcast(read_solutions(path) if path else None))
        made = make()
        if path:
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


# Sampling texts from a model, in batches that a seed reproduces.

with borrowed(
    "lm-eval: lm_eval.models.utils (handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text)"
):
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

# Constants, not the free memory: the batches decide which random numbers a sample gets.
CACHE_BYTES = 4 << 30  # keys and values of a batch
MOST_ROWS = 256


@dataclass
class Sampler:
    """Generates texts with a model, steered or not; batches are divided among processes.

    Args:
        lm: the model, which has no vector of its own before and after.
        gen_kwargs: the task's generation settings (stop strings, length, ...); how tokens are drawn is
            decided here.

    Raises:
        AFTError: the longest answer does not fit into the model's context, or the model thinks first.
    """

    lm: AFTLM
    gen_kwargs: dict[str, Any]
    workers: Workers = field(default_factory=Workers)
    progress: bool = True

    def __post_init__(self) -> None:
        kwargs: dict[str, Any] = dict(normalize_gen_kwargs(deepcopy(self.gen_kwargs), self.lm.max_gen_toks))
        eos = self.lm.tok_decode(self.lm.eot_token_id, skip_special_tokens=False)
        self._until = [stop for stop in handle_stop_sequences(kwargs.pop("until", None), eos=eos) if stop]
        self._most = int(kwargs.pop("max_gen_toks"))
        self._other = {k: v for k, v in kwargs.items() if k not in ("do_sample", "temperature", "max_length")}
        if self._most >= self.lm.max_length:
            raise AFTError(
                f"The task asks for up to {self._most} new tokens, but the model's context holds "
                f"{self.lm.max_length}.",
                "Choose a model with a longer context, or a task with shorter answers.",
            )
        if self.lm.think_end_token is not None:
            raise AFTError(
                "rft trains on the text after the prompt, and think_end_token hides part of that.",
                "Leave out think_end_token.",
            )

    def sample(
        self,
        vector: SteeringVector | None,
        contexts: Sequence[str],
        count: int,
        temperature: float,
        seed: str,
        title: str = "sampling",
    ) -> list[list[str]]:
        """``count`` texts per context, cut at the first stop string.

        The same arguments give the same texts, on the same machine.
        """
        lm = self.lm
        window = lm.max_length - self._most
        lengths = [min(len(lm.tok_encode(context)), window) for context in contexts]
        rows = sorted((i for i in range(len(contexts)) for _ in range(count)), key=lambda i: (-lengths[i], i))
        batches = list(self._batches(rows, lengths))
        mine = range(self.workers.rank, len(batches), self.workers.size)
        found: list[tuple[int, list[str]]] = []
        quiet = not (self.progress and self.workers.is_main)
        with (
            steered(lm, vector),
            tqdm(total=sum(len(batches[i]) for i in mine), desc=title, unit="text", disable=quiet) as bar,
        ):
            for place in mine:
                draw = int.from_bytes(hashlib.sha256(f"{seed}|{place}".encode()).digest()[:8], "big")
                found.append(
                    (place, self._generate([contexts[i] for i in batches[place]], temperature, draw))
                )
                bar.update(len(batches[place]))
        texts: list[list[str]] = [[] for _ in contexts]
        for place, written in sorted(pair for part in self.workers.gather(found) for pair in part):
            for row, text in zip(batches[place], written, strict=True):
                texts[row].append(text)
        return texts

    def greedy(self, vector: SteeringVector | None, contexts: Sequence[str]) -> list[str]:
        """What greedy decoding answers, by the harness's own ``generate_until``."""
        kwargs = {**self.gen_kwargs, "do_sample": False, "temperature": 0.0}
        mine = range(self.workers.rank, len(contexts), self.workers.size)
        requests = [
            Instance("generate_until", {}, (contexts[i], deepcopy(kwargs)), 0, ("", i, 1)) for i in mine
        ]
        longest = max((len(self.lm.tok_encode(context)) for context in contexts), default=1)
        with steered(self.lm, vector), _batch_size(self.lm, self._rows(longest)):
            written = self.lm.generate_until(requests, not self.progress) if requests else []
        found = {
            place: text
            for part in self.workers.gather(list(zip(mine, written, strict=True)))
            for place, text in part
        }
        return [found[place] for place in range(len(contexts))]

    def _rows(self, length: int) -> int:
        """How many rows of ``length`` prompt tokens fit, if no heads share keys and values."""
        config = self.lm.model.config.get_text_config()
        token = int(2 * config.num_hidden_layers * config.hidden_size * self.lm.model.dtype.itemsize)
        return max(1, min(MOST_ROWS, CACHE_BYTES // (token * (length + self._most))))

    def _batches(self, rows: Sequence[int], lengths: Sequence[int]) -> Iterator[Sequence[int]]:
        """Cut rows, longest first, into batches."""
        start = 0
        while start < len(rows):
            batch = rows[start : start + self._rows(lengths[rows[start]])]
            yield batch
            start += len(batch)

    def _generate(self, contexts: list[str], temperature: float, seed: int) -> list[str]:
        lm = self.lm
        ids, mask = lm.tok_batch_encode(
            contexts, left_truncate_len=lm.max_length - self._most, truncation=lm.truncation
        )
        ids, mask = ids.to(lm.device), mask.to(lm.device)
        start = ids.shape[1]
        cuda = list(range(torch.cuda.device_count())) if lm.device.type == "cuda" else []
        with (
            torch.random.fork_rng(cuda),
            torch.autocast(
                lm.device.type, dtype=lm.mixed_precision_dtype, enabled=lm.mixed_precision_dtype is not None
            ),
        ):
            torch.manual_seed(seed)
            written = lm.model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_length=start + self._most,
                stopping_criteria=StoppingCriteriaList([Stops(lm.tokenizer, self._until, start, len(ids))]),
                pad_token_id=lm.tokenizer.pad_token_id,
                use_cache=True,
                **{**self._other, "do_sample": True, "temperature": temperature},
            )
        return [
            postprocess_generated_text(lm.tok_decode(tokens), self._until, None)
            for tokens in written[:, start:].tolist()
        ]


class Stops(StoppingCriteria):
    """Ends each row at the first stop string that it has generated.

    The harness's own criterion waits until all rows have met the *same* string; the texts, cut at
    the first stop string, are the same. It looks back as far as the harness's does: two tokens more
    than a stop string has, since it may be generated as other tokens.
    """

    def __init__(self, tokenizer: Any, until: Sequence[str], start: int, rows: int) -> None:
        self._tokenizer, self._until, self._start = tokenizer, until, start
        self._back = 2 + max((len(tokenizer.encode(s, add_special_tokens=False)) for s in until), default=0)
        self._done = [False] * rows

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        live = [row for row, done in enumerate(self._done) if not done]
        tails = input_ids[live, max(self._start, input_ids.shape[1] - self._back) :]
        for row, text in zip(live, self._tokenizer.batch_decode(tails), strict=True):
            self._done[row] = any(stop in text for stop in self._until)
        return torch.tensor(self._done, device=input_ids.device)


@contextmanager
def steered(lm: AFTLM, vector: SteeringVector | None) -> Iterator[None]:
    """Steer ``lm`` inside a ``with`` block; afterwards it is the baseline."""
    lm.steer(vector)
    try:
        yield
    finally:
        lm.steer(None)


@contextmanager
def _batch_size(lm: AFTLM, rows: int) -> Iterator[None]:
    """Use ``rows`` as the batch size of stock generation, where the user has set none."""
    before = lm.batch_size_per_gpu
    if before == 1:
        lm.batch_size_per_gpu = rows
    try:
        yield
    finally:
        lm.batch_size_per_gpu = before
