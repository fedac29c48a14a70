"""Scores and texts of tiny models, steered and not, compared with a naive computation."""

from __future__ import annotations

import logging
import random
import string
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from lm_eval.api.instance import Instance
from torch import Tensor

from lm_eval_aft._util.errors import AFTError
from lm_eval_aft.engine.batching import capture
from lm_eval_aft.engine.checks import Naive, packing_ruled_out
from lm_eval_aft.lm import AFTLM
from lm_eval_aft.steering.backbone import find_backbone
from lm_eval_aft.steering.hooks import attach, hidden_states
from lm_eval_aft.steering.intervention import POSITIONS
from lm_eval_aft.steering.vector import SteeringVector

LAYER = 1
TOKENS = 6  # to generate
# Tolerance, in nats and logits: rounding errors are a thousand times smaller, a misplaced vector's error a
# thousand times larger.
BAR = 1e-3
RIGHT, SLOWER, REFUSED, WRONG, BROKEN = "right", "slower", "refused", "WRONG", "BROKEN"
FAST = ("prefixed", "packed", "trimmed")


@dataclass(frozen=True)
class Outcome:
    """The result of one part of a trial.

    Attributes:
        part: prefixed, packed, trimmed, resumed; log-likelihoods; generation, stock, by hand.
        verdict: right; slower (a fast path was not taken); refused; WRONG; BROKEN (an unexpected error).
        positions: those of the vector; ``""`` without one or where it does not matter.
        why: the reason, unless "right".
    """

    part: str
    verdict: str
    positions: str = ""
    why: str = ""

    @property
    def bad(self) -> bool:
        """Whether an answer is wrong, or missing because of an unexpected error."""
        return self.verdict in (WRONG, BROKEN)


@dataclass
class Trial:
    """A family's outcomes; if the model cannot be made there are none, and ``absent`` says why."""

    family: str
    outcomes: list[Outcome] = field(default_factory=list)
    absent: str = ""

    def note(self, part: str, verdict: str, positions: str = "", why: str = "") -> None:
        """Add an outcome."""
        self.outcomes.append(Outcome(part, verdict, positions, why))


def try_family(family: str, device: str = "cpu") -> Trial:
    """Make a tiny model of the family and check every way of scoring and generating."""
    trial = Trial(family)
    try:
        model = tiny_model(family).to(device)
    except LookupError as error:
        trial.absent = str(error)
        return trial
    except Exception as error:  # whatever a config or a model class raises
        trial.absent = _told(error)
        return trial
    with _guarded(trial, "log-likelihoods"):
        _Subject(trial, model, device).ask()
    return trial


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"


@contextmanager
def _guarded(trial: Trial, part: str, positions: str = "") -> Iterator[None]:
    """Record an error in the block as an outcome."""
    try:
        yield
    except AFTError as error:
        trial.note(part, REFUSED, positions, " ".join([error.what, error.hint]).strip())
    except Exception as error:  # of any library: that it was raised is the finding
        trial.note(part, BROKEN, positions, _told(error))


@contextmanager
def _package_warnings() -> Iterator[list[str]]:
    """Collect the package's warnings, which are not printed."""
    ours = logging.getLogger("lm_eval_aft")
    messages: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    handler, before = Collector(logging.WARNING), ours.propagate
    ours.addHandler(handler)
    ours.propagate = False
    try:
        yield messages
    finally:
        ours.removeHandler(handler)
        ours.propagate = before


class _Subject:
    def __init__(self, trial: Trial, model: Any, device: str) -> None:
        self.trial = trial
        self.model = model
        self.tokenizer = tokenizer()
        self.lm = AFTLM(model, tokenizer=self.tokenizer, device=device, batch_size=1)
        self.backbone = find_backbone(model)
        self.vector = self._long_vector()
        self._naively: SteeringVector | None = None
        self.naive = Naive(
            model,
            self.backbone,
            lambda _: self._naively,
            device=torch.device(device),
            window=SIZES["max_position_embeddings"],
        )
        self._expected: dict[str, list[float]] = {}

    def _long_vector(self) -> Tensor:
        """A random direction with the norm of the residual stream, so that misplacing it shows."""
        ids = torch.arange(4, 20, device=self.model.device)[None]
        with torch.no_grad(), capture(self.backbone, [LAYER]) as outputs:
            self.model(input_ids=ids, use_cache=False)
        norm = hidden_states(outputs[LAYER]).float().norm(dim=-1).mean().cpu()
        direction = torch.randn(self.backbone.hidden_size, generator=torch.Generator().manual_seed(1))
        found: Tensor = direction / direction.norm() * norm
        return found

    def ask(self) -> None:
        """Check all parts."""
        pairs = _questions()
        for positions in ("", *POSITIONS):
            with _guarded(self.trial, "log-likelihoods", positions):
                self._score(pairs, positions)
        with _guarded(self.trial, "resumed"):
            self._score_along(pairs)
        prompts = _prompts()
        for positions in ("", *POSITIONS):
            wanted = [self._plain(prompt, positions) for prompt in prompts]
            for part, write in (
                ("generation", self._fast),
                ("stock", self._stock),
                ("by hand", self._by_hand),
            ):
                with _guarded(self.trial, part, positions):
                    self._compare_texts(part, positions, wanted, write(prompts, positions))

    # Log-likelihoods

    def _steer(self, positions: str) -> None:
        self.lm.steer(self._steering(positions) if positions else None)

    def _steering(self, positions: str) -> SteeringVector:
        return SteeringVector({LAYER: self.vector.clone()}, positions=positions)

    def _wanted(self, pairs: Sequence[tuple[str, str]], positions: str) -> list[float]:
        if positions not in self._expected:
            self._steer_naively(positions)
            self._expected[positions] = [
                self.naive.answer((None, self._ids(context), self._ids(tail)))[0] for context, tail in pairs
            ]
        return self._expected[positions]

    def _steer_naively(self, positions: str) -> None:
        self.lm.steer(None)
        self._naively = self._steering(positions) if positions else None

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _score(self, pairs: Sequence[tuple[str, str]], positions: str) -> None:
        wanted = self._wanted(pairs, positions)
        self._steer(positions)
        with _package_warnings() as messages:
            found = self.lm.loglikelihood(_instances(pairs), disable_tqdm=True)
        if not positions:
            self._note_paths(messages)
        self._compare("log-likelihoods", positions, [value for value, _ in found], wanted)

    def _note_paths(self, messages: Sequence[str]) -> None:
        taken = self.lm.paths_taken()
        longest = max(len(self._ids(context + tail)) for context, tail in _questions())
        rule = packing_ruled_out(self.model, longest)
        for path in FAST:
            if taken.get(path):
                self.trial.note(path, RIGHT)
            else:
                why = next((each for each in messages if f"from {path} to" in each), "") or rule
                self.trial.note(path, SLOWER, "", why or "not taken")

    def _score_along(self, pairs: Sequence[tuple[str, str]]) -> None:
        """Score the vector together with the baseline, from the vector's layer on."""
        steering, wanted = self._steering("all"), self._wanted(pairs, "all")
        self.lm.steer(None)
        self.lm.score_along([steering])
        try:
            with _package_warnings() as messages:
                self.lm.loglikelihood(_instances(pairs), disable_tqdm=True)
                self.lm.steer(steering)
                before = self.lm.paths_taken()
                found = self.lm.loglikelihood(_instances(pairs), disable_tqdm=True)
        finally:
            self.lm.score_along([])
        why = next((each for each in messages if "midway" in each), "")
        asked_again = sum((self.lm.paths_taken() - before).values())
        if why or asked_again:
            self.trial.note("resumed", SLOWER, "", why or f"{asked_again} questions were asked again")
        else:
            self.trial.note("resumed", RIGHT)
        self._compare("resumed", "all", [value for value, _ in found], wanted)

    def _compare(self, part: str, positions: str, found: Sequence[float], wanted: Sequence[float]) -> None:
        worst = max(range(len(wanted)), key=lambda i: _apart(found[i], wanted[i]))
        if _apart(found[worst], wanted[worst]) <= BAR:
            self.trial.note(part, RIGHT, positions)
            return
        many = sum(_apart(a, b) > BAR for a, b in zip(found, wanted, strict=True))
        self.trial.note(
            part,
            WRONG,
            positions,
            f"{many} of {len(wanted)} log-likelihoods, one of them {found[worst]:.4f} "
            f"instead of {wanted[worst]:.4f}",
        )

    # Texts

    def _plain(self, prompt: str, positions: str) -> tuple[list[int], list[float]]:
        """The greedy continuation, up to `TOKENS` tokens or the end of the text, and each token's lead.

        The lead is how far the token's logit lies above the next one's.
        """
        self._steer_naively(positions)
        prompt_ids = self._ids(prompt)
        tokens: list[int] = []
        leads: list[float] = []
        while len(tokens) < TOKENS and tokens[-1:] != [self.model.config.eos_token_id]:
            last = self.naive.logits([*prompt_ids, *tokens], len(prompt_ids))[-1]
            first, second = last.topk(2).values.tolist()
            tokens.append(int(last.argmax()))
            leads.append(first - second)
        return tokens, leads

    def _written(self, prompts: Sequence[str]) -> list[str]:
        settings = {"until": ["<never>"], "max_gen_toks": TOKENS, "do_sample": False}
        requests = _instances([(prompt, settings) for prompt in prompts], "generate_until")
        return self.lm.generate_until(requests, disable_tqdm=True)

    def _fast(self, prompts: Sequence[str], positions: str) -> list[str]:
        self._steer(positions)
        with _package_warnings() as messages:
            texts = self._written(prompts)
        if not self.lm.paths_taken().get("generated in shared batches"):
            why = next((each for each in messages if each.startswith("Generation")), "") or packing_ruled_out(
                self.model, 64
            )
            self.trial.note("generation", SLOWER, positions, why or "left to stock")
        return texts

    def _stock(self, prompts: Sequence[str], positions: str) -> list[str]:
        self._steer(positions)
        self.lm.fast = False
        try:
            return self._written(prompts)
        finally:
            self.lm.fast = True

    def _by_hand(self, prompts: Sequence[str], positions: str) -> list[str]:
        self.lm.steer(None)
        texts = []
        with attach(self.model, self._steering(positions)) if positions else nullcontext():
            for prompt in prompts:
                ids = torch.tensor([self._ids(prompt)], device=self.model.device)
                mask = torch.ones_like(ids)
                written = self.model.generate(
                    input_ids=ids, attention_mask=mask, max_new_tokens=TOKENS, do_sample=False, pad_token_id=1
                )
                texts.append(self.tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True))
        return texts

    def _compare_texts(
        self, part: str, positions: str, wanted: Sequence[tuple[list[int], list[float]]], found: Sequence[str]
    ) -> None:
        wrong = []
        for (tokens, leads), text in zip(wanted, found, strict=True):
            right = self.tokenizer.decode(tokens, skip_special_tokens=True)
            if text != right and not _tied(tokens, leads, self._ids(text)):
                wrong.append((text, right))
        if wrong:
            text, right = wrong[0]
            why = f"{len(wrong)} of {len(found)} texts, one of them {text!r} instead of {right!r}"
            self.trial.note(part, WRONG, positions, why)
        else:
            self.trial.note(part, RIGHT, positions)


def _apart(one: float, other: float) -> float:
    difference = abs(one - other)
    return difference if difference == difference else float("inf")  # NaN counts as wrong


def _tied(tokens: Sequence[int], leads: Sequence[float], found: Sequence[int]) -> bool:
    """Whether texts first differ at a token that rounding can decide."""
    place = next((i for i, (a, b) in enumerate(zip(tokens, found, strict=False)) if a != b), None)
    return place is not None and leads[place] < BAR


def _words(draw: random.Random, count: int) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(count))


def _questions() -> list[tuple[str, str]]:
    """Questions with a shared prefix, others with several options, and others with one continuation."""
    draw = random.Random(1)
    prefix = _words(draw, 20)
    pairs = []
    for kind, options in (("shared", 2), ("own", 3), ("single", 1)):
        for i in range(8 if kind == "shared" else 3):
            own = _words(draw, 2 + i)
            context = f"{prefix} {own}" if kind == "shared" else own
            pairs += [(context, " " + _words(draw, 1 + k % 3)) for k in range(options)]
    return pairs


def _prompts() -> list[str]:
    draw = random.Random(2)
    return [_words(draw, count) for count in (2, 5, 9)]


def _instances(arguments: Sequence[tuple[Any, ...]], kind: str = "loglikelihood") -> list[Instance]:
    return [Instance(kind, {}, each, i, ("doctor", i, 1)) for i, each in enumerate(arguments)]


# Tiny random models of common families and a tokenizer, made from configs in memory.

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 1,
}
_GROUPED: dict[str, Any] = {"num_key_value_heads": 2}
_HEADS: dict[str, Any] = {**_GROUPED, "head_dim": 8}
# Name -> its config's class in transformers, and settings besides SIZES.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _GROUPED),
    "qwen2": ("Qwen2Config", _GROUPED),
    "qwen3": ("Qwen3Config", _HEADS),
    "gemma3": ("Gemma3TextConfig", {**_HEADS, "sliding_window": 16, "sliding_window_pattern": 2}),
    "mistral (window)": ("MistralConfig", {**_GROUPED, "sliding_window": 16}),
    "phi3": ("Phi3Config", {**_GROUPED, "sliding_window": None}),
    "olmo2": ("Olmo2Config", _GROUPED),
    "gpt2": ("GPT2Config", {}),
    "gpt_neox": ("GPTNeoXConfig", {}),
    "phi": ("PhiConfig", {}),
    "opt": ("OPTConfig", {"word_embed_proj_dim": 32, "ffn_dim": 64}),
    "falcon": ("FalconConfig", {"alibi": False, "parallel_attn": True, "multi_query": True}),
    "mamba": ("MambaConfig", {"state_size": 8}),
}
WORDS = [*string.ascii_lowercase, *(2 * letter for letter in string.ascii_lowercase[:24])]


def tiny_model(family: str) -> Any:
    """A random model of the family, in float32 on the CPU, the same each time.

    Raises:
        LookupError: the transformers that is installed has no such family.
    """
    import transformers

    name, extra = FAMILIES[family]
    make = getattr(transformers, name, None)
    if make is None:
        raise LookupError(f"transformers has no {name}")
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(make(**{**SIZES, **extra}))
    with torch.no_grad():  # fresh weights are so small that all answers are nearly equal
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4)
    return model.float().eval()


def tokenizer() -> Any:
    """A tokenizer whose tokens are the words in `WORDS` and the space between two."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<eos>", "<pad>", "<unk>", " ", *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(" ", behavior="isolated")
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<eos>", bos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )
