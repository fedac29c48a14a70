"""Sampling many texts from a model, in batches that a seed reproduces."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from lm_eval.api.instance import Instance
from torch import Tensor
from tqdm import tqdm
from transformers import StoppingCriteria, StoppingCriteriaList

from lm_eval_aft.errors import AFTError
from lm_eval_aft.lm import AFTLM
from lm_eval_aft.private_names import borrowed
from lm_eval_aft.training.parallel import Workers
from lm_eval_aft.vector import SteeringVector

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
        quiet = not (self.progress and self.workers.leads)
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
