"""``--model aft``: lm-eval's `hf` model with a steering vector."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import CacheHook
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm

from lm_eval_aft.backbone import find_backbone
from lm_eval_aft.demo import resolve_pretrained
from lm_eval_aft.errors import AFTError, print_errors_plainly
from lm_eval_aft.fingerprint import fingerprint
from lm_eval_aft.library import load_vector
from lm_eval_aft.scoring.companions import Companions
from lm_eval_aft.scoring.loglikelihood import Answers, Scorer
from lm_eval_aft.scoring.paths import Paths
from lm_eval_aft.scoring.requests import Answer, Request
from lm_eval_aft.scoring.texts import Texts
from lm_eval_aft.steering import SteeringHandle, attach
from lm_eval_aft.vector import POSITIONS, SteeringVector, canonical_json

logger = logging.getLogger(__name__)

# What one batch of the stock path may take with `batch_size=auto` where that is not tried out.
STOCK_BATCH_BYTES = 2 << 30


class AFTLM(HFLM):
    """A Hugging Face causal LM, scored by lm-eval, with a vector added to its residual stream.

    Takes every argument of ``hf`` (``pretrained``, ``dtype``, ``revision``, ``peft``, ...) and:

    Args:
        vector: vector folder, ``.safetensors`` file or `SteeringVector`; none means baseline.
        coefficient: replaces the vector's own; 0 is the baseline.
        positions: replaces the vector's own; ``all``.
        allow_mismatch: try a vector trained on another model, with a warning.
        fast: share work among requests where that gives stock's answers (`lm_eval_aft.scoring`);
            false scores exactly as `hf` does.
        blocks: dotted path of the decoder blocks, for architectures not recognised.
        device: default CUDA where there is one, else the CPU.

    Raises:
        AFTError: model or vector missing, unreadable or not fitting each other.
    """

    def __init__(
        self,
        pretrained: Any,
        vector: str | SteeringVector | None = None,
        coefficient: float | None = None,
        positions: str | None = None,
        allow_mismatch: bool = False,
        fast: bool = True,
        blocks: str | None = None,
        device: str | None = None,
        **kwargs: Any,
    ) -> None:
        print_errors_plainly()
        if isinstance(pretrained, str):
            pretrained = resolve_pretrained(pretrained)
        if positions is not None and positions not in POSITIONS:
            raise AFTError(f"positions={positions!r} is not known.", f"Use one of: {', '.join(POSITIONS)}.")
        # Read before the model, so that a wrong path fails in milliseconds.
        loaded = None if vector in (None, "") else load_vector(_as_path(vector))
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            super().__init__(pretrained=pretrained, device=device, **kwargs)
        except OSError as error:
            raise AFTError(
                f"The model {pretrained!r} cannot be loaded: {str(error).strip().splitlines()[0]}",
                "Give a local folder written by save_pretrained, or the name of a model on the Hub.",
            ) from error
        if self.backend != "causal":
            raise AFTError("Encoder-decoder models are not supported.", "Use a decoder-only (causal) model.")
        self._blocks = blocks
        self.fast = bool(fast)
        self._shared: tuple[Paths, Texts] | None = None
        self._companions: Companions | None = None
        self._reckons = False
        self._vector: SteeringVector | None = None
        self._handle = SteeringHandle([])
        self.steer(loaded, coefficient=coefficient, positions=positions, allow_mismatch=bool(allow_mismatch))

    def steer(
        self,
        vector: SteeringVector | None,
        *,
        coefficient: float | None = None,
        positions: str | None = None,
        allow_mismatch: bool = False,
    ) -> None:
        """Replace the vector in force; ``None`` makes this the baseline again."""
        self._handle.remove()
        self._vector = None
        for part in self._shared or ():
            part.taken.clear()
        if vector is None:
            return
        vector = SteeringVector(
            vector.layers,
            vector.coefficient if coefficient is None else float(coefficient),
            positions or vector.positions,
            vector.method,
            vector.metadata,
        )
        self._handle = attach(
            self.model, vector, tokenizer=self.tokenizer, allow_mismatch=allow_mismatch, blocks=self._blocks
        )
        self._vector = vector

    @property
    def vector(self) -> SteeringVector | None:
        """The vector in force, with the coefficient and positions it is applied with."""
        return self._vector

    def score_along(self, vectors: Sequence[SteeringVector]) -> None:
        """While this is the baseline, find the answers of ``vectors`` to the same requests as well.

        They are kept until `steer` puts such a vector in force, which then answers from them.
        Log-likelihoods only, and only with ``fast``; the vectors must have passed `steer` before.
        """
        self._companions = Companions(vectors) if self.fast else None

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Answer]:
        """As `HFLM`; what was found while the baseline was scored is not computed again."""
        vector, companions = self._vector, self._companions
        if vector is None or companions is None:
            return self._strings_to_answers(requests, disable_tqdm)
        found = companions.answers(vector, [request.args for request in requests])
        missing = [request for request, answer in zip(requests, found, strict=True) if answer is None]
        for request, answer in zip(requests, found, strict=True):
            if answer is not None:
                self.cache_hook.add_partial("loglikelihood", request.args, answer)
        rest = iter(self._strings_to_answers(missing, disable_tqdm) if missing else [])
        return [next(rest) if answer is None else answer for answer in found]

    def _strings_to_answers(self, requests: list[Instance], disable_tqdm: bool) -> list[Answer]:
        answers: list[Answer] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return answers

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Answer]:
        # Rolling windows bring a batch size of their own: long rows without anything to share.
        if not self.fast or override_bs is not None or not requests:
            return self._stock_answers(requests, disable_tqdm, override_bs)
        found: Answers = {}
        companions = self._companions if self._vector is None else None
        quiet = disable_tqdm or self.rank != 0
        with tqdm(total=len(requests), disable=quiet, desc="Running loglikelihood requests") as bar:

            def report(states: list[Answers]) -> None:
                for index, answer in states[0].items():
                    strings = requests[index][0]
                    if strings is not None:
                        self.cache_hook.add_partial("loglikelihood", strings, answer)
                        if companions is not None and len(states) > 1:
                            companions.keep(strings, [state[index] for state in states[1:]])
                found.update(states[0])
                bar.update(len(states[0]))

            paths, _ = self._fast()
            before = paths.taken.copy()
            paths.score(requests, report, companions.shifts if companions is not None else [])
        if companions is not None:
            companions.paths += paths.taken - before
        return [found[i] for i in range(len(requests))]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """As `HFLM`; plain greedy decoding in fp32 goes the fast way, the rest to stock."""
        if not self.fast or not requests:
            return self._stock_texts(requests, disable_tqdm)
        _, generator = self._fast()
        if generator.refusal():
            generator.taken["stock"] += len(requests)
            return self._stock_texts(requests, disable_tqdm)
        texts: dict[int, str] = {}
        quiet = disable_tqdm or self.rank != 0
        with tqdm(total=len(requests), disable=quiet, desc="Running generate_until requests") as bar:
            for index, text in generator.answers(requests):
                self.cache_hook.add_partial("generate_until", requests[index].args, text)
                texts[index] = text
                bar.update(1)
        left = [i for i in range(len(requests)) if i not in texts]
        if left:
            stock = self._alone(self._stock_texts)([requests[i] for i in left])
            texts |= dict(zip(left, stock, strict=True))
        return [texts[i] for i in range(len(requests))]

    def _fast(self) -> tuple[Paths, Texts]:
        """What scores and generates the fast way; made on first use."""
        if self._shared is None:
            scorer = Scorer(
                self.model,
                find_backbone(self.model, self._blocks),
                device=self.device,
                softmax_dtype=self.softmax_dtype,
                autocast=self.mixed_precision_dtype,
            )
            paths = Paths(scorer, self._alone(self._stock_answers), self.max_length)
            self._shared = paths, Texts(self, scorer, self._alone(self._stock_texts))
        return self._shared

    def _alone(self, stock: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """``stock`` without `HFLM`'s search for a batch size, in which all processes must take part."""

        def ask(requests: Any) -> Any:
            self._reckons = True
            try:
                return stock(requests)
            finally:
                self._reckons = False

        return ask

    def _detect_batch_size(self, requests: Sequence[Request] | None = None, pos: int = 0) -> int:
        """On a CPU nothing runs out of memory until the machine does: reckon, where `HFLM` tries."""
        if not self._reckons and not (self.fast and self.device.type == "cpu"):
            found: int = super()._detect_batch_size(requests, pos)
            return found
        length = self.max_length
        if requests:
            length = min(length, len(requests[pos][1]) + len(requests[pos][2]))
        row = 4 * length * self.model.config.get_text_config().vocab_size
        # Logits, their log-softmax, and as much again for everything else.
        most = STOCK_BATCH_BYTES // (4 * int(row))
        return max(1, min(int(self.max_batch_size), most))

    def _stock_texts(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        texts: list[str] = super().generate_until(requests, disable_tqdm=disable_tqdm)
        return texts

    def _stock_answers(
        self, requests: Sequence[Request], disable_tqdm: bool = True, override_bs: int | None = None
    ) -> list[Answer]:
        answers: list[Answer] = super()._loglikelihood_tokens(
            list(requests), disable_tqdm=disable_tqdm, override_bs=override_bs
        )
        return answers

    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        """Give this model and vector a table of their own in lm-eval's ``--use_cache`` file.

        lm-eval keys that file by the request alone, so a steered run would be served the
        baseline's answers. `CachingLM` looks answers up, and hooks write them, through one
        ``SqliteDict``; renaming its table here separates both.
        """
        super().set_cache_hook(cache_hook)
        database = cache_hook.dbdict
        if database is None:
            return
        table = f"aft_{hashlib.sha256(canonical_json(self._answers_depend_on()).encode()).hexdigest()[:24]}"
        database.tablename = table
        database.conn.execute(f'CREATE TABLE IF NOT EXISTS "{table}" (key TEXT PRIMARY KEY, value BLOB)')
        database.conn.commit()

    def get_model_info(self) -> dict[str, Any]:
        """HFLM's model information and an ``aft`` entry that says what steered it."""
        return {**super().get_model_info(), "aft": self._aft_info()}

    def _aft_info(self) -> dict[str, Any]:
        vector = self._vector
        info: dict[str, Any] = {
            "fingerprint": fingerprint(self.model, self.tokenizer),
            "world_size": self.world_size,
            "softmax_dtype": None if self.softmax_dtype is None else str(self.softmax_dtype),
            "scoring_path": self._path_taken(),
            "vector": None,
        }
        if vector is not None:
            info["vector"] = {
                "sha256": vector.digest(),
                "layers": list(vector.layers),
                "coefficient": vector.coefficient,
                "positions": vector.positions,
                "method": vector.method,
                "norm": vector.norm(),
                "task": vector.metadata.get("task"),
                "num_fewshot": vector.metadata.get("num_fewshot"),
                "control": vector.metadata.get("control"),
                # Chosen on evaluation documents, by its own word: no report may take it for a result.
                "biased": bool((vector.metadata.get("protocol") or {}).get("biased")),
                "base_model": vector.metadata.get("base_model"),
            }
        return info

    def _path_taken(self) -> str:
        """Which way documents were scored: the most frequent path and its share, then the others."""
        taken = sum((part.taken for part in self._shared or ()), Counter[str]())
        if self._companions is not None and self._vector is not None:
            taken = taken + self._companions.paths
        total = sum(taken.values())
        return ", ".join(f"{path} ({n / total:.1%} of {total})" for path, n in taken.most_common()) or "stock"

    def _answers_depend_on(self) -> dict[str, Any]:
        vector = self._vector
        steered = vector is not None and vector.coefficient != 0
        return {
            "model": fingerprint(self.model, self.tokenizer),
            "vector": vector.digest() if vector is not None and steered else None,
            "dtype": str(self.model.dtype),
            "softmax_dtype": str(self.softmax_dtype),
            "mixed_precision_dtype": str(self.mixed_precision_dtype),
            "max_length": self.max_length,
            "add_bos_token": self.add_bos_token,
            "prefix_token_id": self.prefix_token_id,
            "fast": self.fast,
        }


def _as_path(vector: Any) -> Any:
    # lm-eval turns the text of --model_args into numbers where it can.
    return str(vector) if isinstance(vector, int | float) else vector
