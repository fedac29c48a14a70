"""Rejection-sampling fine-tuning: training on what the model wrote itself and its task marked right.

Source: Yuan et al. 2023, "Scaling Relationship on Learning Mathematical Reasoning with Large Language
Models"; in rounds as in Zelikman et al. 2022 (STaR): each starts anew from the frozen model, on what
the model steered by the round before has written.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import jsonlines
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
from lm_eval_aft.harness.splits import GivenSplits
from lm_eval_aft.lm import AFTLM
from lm_eval_aft.steering.fingerprint import fingerprint
from lm_eval_aft.steering.vector import SteeringVector
from lm_eval_aft.steering.vector_file import FILE_NAME
from lm_eval_aft.training.artifacts import write_card
from lm_eval_aft.training.checkpoint import (
    PICTURE,
    SEEDS,
    TrainingLedger,
    digest,
    drop_state,
    open_run,
    save_state,
    seed_file,
)
from lm_eval_aft.training.controls import random_like
from lm_eval_aft.training.distributed import Workers
from lm_eval_aft.training.recipe import SMALLEST_SHARE
from lm_eval_aft.training.setup import Prepared


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
        self._author = SolutionSampler(prepared, folder, self._workers, progress)
        self._problems = prepared.splits.train(prepared.plan.first_seed)
        self._ledger: TrainingLedger | None = None
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
        if self.folder is None or not self._workers.is_main:
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
        standing = {"round": number, **SolveRates.of(answers).to_dict(), **(entry or {})}
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
        if self._workers.broadcast(folder is not None and (folder / FILE_NAME).exists()):
            return self._workers.broadcast(
                _load(folder) if folder and self._workers.is_main else None
            ), judged
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


# The model as author of solutions: what it writes in each round, marked, and kept in files.


def round_file(folder: Path, number: int) -> Path:
    """Where a run keeps the samples that a round is trained on."""
    return folder / f"rft-round-{number}.jsonl"


class SolutionSampler:
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
        is_main = self._workers.is_main
        if self._workers.broadcast(path is not None and path.exists()):
            return list(
                self._workers.broadcast(read_solutions(path) if is_main and path is not None else None)
            )
        made = make()
        if is_main and path is not None:
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


# Sampling many texts from a model, in batches that a seed reproduces.

with borrowed(
    "lm-eval: lm_eval.models.utils (handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text)"
):
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

# Constants, not what happens to be free: the batches decide which random numbers a sample gets.
CACHE_BYTES = 4 << 30  # keys and values of a batch
MOST_ROWS = 256


@dataclass
class Sampler:
    """Writes solutions with a model, steered or not; rows are shared out among processes.

    Args:
        lm: the model; without a vector of its own, and left so.
        gen_kwargs: the task's generation settings. Stop strings, length and whatever else it sets
            hold; how tokens are drawn is decided here.

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
                "rft trains on what follows the prompt, and a model that thinks first hides part of that.",
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
        """Rows of a prompt of ``length`` tokens whose keys and values fit, heads sharing none."""
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
    """Ends each row at the first stop string in what it has generated.

    The harness's own criterion waits until all rows have met the *same* string; the texts, cut at
    the first stop string, are the same. It looks back as far as the harness's does: two tokens more
    than a stop string has, for one spelt in other tokens.
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
    """Raise a batch size of 1, at which nobody asked for more, where stock code generates."""
    before = lm.batch_size_per_gpu
    if before == 1:
        lm.batch_size_per_gpu = rows
    try:
        yield
    finally:
        lm.batch_size_per_gpu = before
