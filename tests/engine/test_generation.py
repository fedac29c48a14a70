"""Fast generation against stock `generate_until` at batch size 1: the same strings."""

from __future__ import annotations

import copy
import logging
import math
import random
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance

from lm_eval_aft import SteeringVector
from lm_eval_aft.engine import generation
from lm_eval_aft.engine.generation import DecodingRow, Followers, Width, Words
from lm_eval_aft.engine.kv_cache import Budget, RowCache
from lm_eval_aft.engine.rows import Step
from lm_eval_aft.engine.scorer import Scorer
from lm_eval_aft.lm import AFTLM
from tests.conftest import FAMILIES, WORDS, tiny_model, tiny_tokenizer

OPTIONS: dict[str, Any] = {"device": "cpu", "batch_size": 1, "tokenizer": tiny_tokenizer()}
UNSHARED = {"mistral-window", "gemma2", "falcon", "bloom", "gpt_neo"}
GREEDY = {"until": ["Question", "cat :"], "max_gen_toks": 12, "do_sample": False}

_made: dict[str, AFTLM] = {}


def fresh(family: str) -> AFTLM:
    """A model of the family with nothing checked or attached yet."""
    if family not in _made:
        _made[family] = AFTLM(tiny_model(family), **OPTIONS)
    lm = _made[family]
    lm._shared = None
    lm.steer(None)
    return lm


def prompts(n: int = 7, prefix: str = "", longest: int = 30) -> list[str]:
    draw = random.Random(1)
    return [prefix + " ".join(draw.choice(WORDS) for _ in range(draw.randint(1, longest))) for _ in range(n)]


def instances(contexts: list[str], kwargs: dict[str, Any]) -> list[Instance]:
    return [
        Instance("generate_until", {}, (context, dict(kwargs)), i, ("toy", i, 1))  # type: ignore[arg-type]
        for i, context in enumerate(contexts)
    ]


def both(lm: AFTLM, contexts: list[str], kwargs: dict[str, Any] = GREEDY) -> tuple[list[str], list[str]]:
    """Texts of the fast way, then stock's."""
    found = []
    for fast in (True, False):
        lm.fast = fast
        found.append(lm.generate_until(instances(contexts, kwargs), disable_tqdm=True))
    lm.fast = True
    return found[0], found[1]


def path(lm: AFTLM) -> str:
    return str(lm.get_model_info()["aft"]["scoring_path"])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_writes_stock_texts(family: str) -> None:
    lm = fresh(family)
    shared = prompts(9, prefix=" ".join(WORDS[:20]) + " ", longest=6)
    for vector, contexts in ((None, prompts(4)), (SteeringVector({1: torch.ones(32)}), shared)):
        lm.steer(vector)
        fast, slow = both(lm, contexts)
        assert fast == slow
        assert path(lm).startswith("stock" if family in UNSHARED else "generated in shared batches (100")


def ending(lm: AFTLM, contexts: list[str]) -> list[str]:
    """Words that the model writes early for some prompts, so that rows end at different times."""
    texts = lm.stock_texts(instances(contexts, GREEDY | {"until": []}))
    return [text.split()[k] for text, k in zip(texts, (0, 1, 2, 3), strict=False) if len(text.split()) > k]


@pytest.mark.parametrize("most", [1, 2, 12])
def test_rows_end_by_themselves(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At stop strings, at end of text, at the limit; and the others go on in a smaller batch."""
    lm, contexts = fresh("llama"), prompts(12)
    stops = ending(lm, contexts)
    kwargs = GREEDY | {"until": stops, "max_gen_toks": most}
    fast, slow = both(lm, contexts, kwargs)
    assert fast == slow
    assert len({len(text) for text in slow}) > 1
    written = lm.tok_encode(lm.stock_texts(instances(contexts[:1], GREEDY))[0])
    monkeypatch.setattr(lm.model.generation_config, "eos_token_id", [0, written[-1]])
    fast, slow = both(lm, contexts)
    assert fast == slow


@pytest.mark.parametrize("prefix", ["", " ".join(WORDS[:20]) + " "], ids=["apart", "shared prefix"])
def test_groups_use_the_same_memory_and_nothing_of_it_shows(
    prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One group's keys and values lie where another's lay, were these NaN even."""
    laid_out = []

    def poisoned(slots: RowCache, rows: int, columns: int) -> bool:
        done = lay_out(slots, rows, columns)
        for buffers in slots._flat.values():
            for buffer in buffers if done else ():
                buffer.fill_(float("nan"))
        laid_out.append(done)
        return done

    lay_out = RowCache.lay_out
    monkeypatch.setattr(RowCache, "lay_out", poisoned)
    monkeypatch.setattr(Budget, "of", lambda *_, **__: Budget(64, 64, 80_000))
    lm = fresh("llama")
    fast, slow = both(lm, prompts(12, prefix))
    assert fast == slow
    assert laid_out.count(True) >= 2
    assert path(lm).startswith("generated in shared batches (100")


def guesser(kind: str, written: dict[tuple[int, ...], list[int]]) -> type[Words]:
    """`Words` that guess what will be written: all of it, none, its first token, or that of some prompts."""

    class Told(Words):
        def __init__(self, tokens: Iterable[int], others: Followers) -> None:
            self.prompt = tuple(tokens)
            self.made = 0
            super().__init__(self.prompt, others)

        def append(self, token: int) -> None:
            self.made += 1
            super().append(token)

        def guess(self, count: int) -> list[int]:
            right = (written[self.prompt][self.made :] + [0] * count)[:count]
            wrong = [1 + token % 60 for token in right]
            some = right if len(self.prompt) > 100 else wrong
            first = right[:1] + wrong[1:]
            return {"right": right, "wrong": wrong, "right at first": first, "right for some": some}[kind]

    return Told


def record(
    monkeypatch: pytest.MonkeyPatch, lm: AFTLM, contexts: list[str]
) -> dict[tuple[int, ...], list[int]]:
    """What is written behind each prompt, token by token, without any guess."""
    written = {}

    class Recorded(DecodingRow):
        def append(self, token: int) -> None:
            super().append(token)
            written[self.prompt.tokens] = list(self.tokens)

    with monkeypatch.context() as patched:
        patched.setattr(generation, "DecodingRow", Recorded)
        patched.setattr(Width, "choose", lambda *_: 1)
        lm.generate_until(instances(contexts, GREEDY), disable_tqdm=True)
    return written


@pytest.mark.parametrize("widths", [[2], [8], [8, 1, 5, 2, 3], [1, 4]], ids=str)
@pytest.mark.parametrize("kind", ["looked up", "right", "wrong", "right at first", "right for some"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_guesses_change_nothing(
    family: str, kind: str, widths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many, right or wrong; also where the last ones would lie behind the window's end."""
    lm, contexts = fresh(family), [*prompts(9), " ".join(WORDS * 5)]
    written = record(monkeypatch, lm, contexts)
    read: list[Step] = []
    logits = Scorer.logits

    def watched(self: Scorer, step: Step, slots: RowCache | None) -> Any:
        read.append(step)
        return logits(self, step, slots)

    asked = iter(widths * 1000)
    monkeypatch.setattr(Width, "choose", lambda _self, _rows, _columns, most: min(most, next(asked)))
    monkeypatch.setattr(Scorer, "logits", watched)
    if kind != "looked up":
        monkeypatch.setattr(generation, "Words", guesser(kind, written))
    fast, slow = both(lm, contexts)
    assert fast == slow
    assert path(lm).startswith("generated in shared batches (100")
    passes = [step.inputs["position_ids"] for step in read if isinstance(step.start, torch.Tensor)]
    assert {each.shape[1] for each in passes} >= set(widths[:2])
    if family == "gpt2" and kind == "right for some" and widths == [8]:
        assert max(int(each.max()) for each in passes) == lm.max_length - 1
    if kind == "right" and len(widths) == 1:
        assert len(passes) == math.ceil(GREEDY["max_gen_toks"] / widths[0])


def test_a_guess_that_overflows_reaches_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks hide a wrong guess, but not its NaN."""
    lm, contexts = AFTLM(tiny_model("llama"), **OPTIONS), prompts(9)
    written = record(monkeypatch, lm, contexts)
    unused = sorted(set(range(1, 64)) - {t for prompt, more in written.items() for t in (*prompt, *more)})
    with torch.no_grad():
        lm.model.get_input_embeddings().weight[unused[0]] = math.nan
    told = guesser("right at first", written)

    class Poisoned(told):  # type: ignore[misc, valid-type]
        def guess(self, count: int) -> list[int]:
            return [*super().guess(1), *[unused[0]] * count][:count]

    monkeypatch.setattr(generation, "Words", Poisoned)
    asked = iter([4, 3, 1] * 1000)
    monkeypatch.setattr(Width, "choose", lambda _self, _rows, _columns, most: min(most, next(asked)))
    fast, slow = both(lm, contexts)
    assert fast == slow
    assert path(lm).startswith("generated in shared batches (100")


def test_long_prompts_are_cut_as_stock_cuts_them() -> None:
    contexts = [" ".join(WORDS * 3), *prompts(3)]
    fast, slow = both(fresh("gpt_neox"), contexts)
    assert fast == slow


@pytest.mark.parametrize(
    "change",
    [
        {"do_sample": True, "temperature": 0.8, "top_k": 1},
        {"num_beams": 2},
        {"repetition_penalty": 1.3},
        {"until": "Question"},
        {"until": None},
        {"max_gen_toks": None, "max_new_tokens": 5},
        {"temperature": 0.0},
    ],
    ids=str,
)
def test_any_setting_is_honoured(change: dict[str, Any]) -> None:
    lm = fresh("qwen2")
    kwargs = {key: value for key, value in (GREEDY | change).items() if value is not None}
    fast, slow = both(lm, prompts(4), kwargs)
    assert fast == slow
    unusual = {"do_sample", "num_beams", "repetition_penalty"} & set(change)
    assert path(lm).startswith("stock" if unusual else "generated")


def test_a_models_own_generation_settings_are_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = fresh("llama")
    monkeypatch.setattr(lm.model.generation_config, "repetition_penalty", 1.5)
    fast, slow = both(lm, prompts(4))
    assert fast == slow
    assert path(lm).startswith("stock")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "qwen2"])
def test_sixteen_bits_err_no_more_than_plain_passes(family: str, dtype: torch.dtype) -> None:
    """Every written token's log-probability against a float32 copy of the model, one whole pass a prompt."""
    model = tiny_model(family, dtype=dtype)
    exact = copy.deepcopy(model).float()
    lm = AFTLM(model, **OPTIONS)
    asked = prompts(12)
    lm.generate_until(instances(asked, GREEDY), disable_tqdm=True)
    assert path(lm) == "generated in shared batches (100.0% of 12)"
    texts = lm._fast()[1]
    settings = texts._settings(GREEDY)
    assert settings is not None
    rows = [texts._prompt(i, context, settings, 0) for i, context in enumerate(asked)]
    seen: dict[int, list[torch.Tensor]] = {}
    with texts.scorer.prepared(), torch.no_grad():
        list(
            texts._decode(
                [row for row in rows if row], settings, lambda i, x: seen.setdefault(i, []).append(x)
            )
        )
        errors: list[list[torch.Tensor]] = [[], []]
        for row in filter(None, rows):
            logits = torch.stack(seen[row.options[0].index])
            tokens = logits.argmax(-1)
            ids = torch.tensor([[*row.tokens, *tokens.tolist()][:-1]])
            found = [logits, *(each(ids).logits[0, len(row.tokens) - 1 :] for each in (model, exact))]
            fast, plain, true = (
                each.float().log_softmax(-1).gather(-1, tokens[:, None])[:, 0] for each in found
            )
            errors[0].append(fast - true)
            errors[1].append(plain - true)
    ours, stock = (float(torch.cat(each).square().mean().sqrt()) for each in errors)
    assert 0 < ours <= 1.5 * stock


def test_mixed_precision_is_left_to_stock() -> None:
    lm = AFTLM(tiny_model("llama"), **OPTIONS, mixed_precision_dtype="bfloat16")
    fast, slow = both(lm, prompts(3))
    assert fast == slow
    assert path(lm).startswith("stock")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_way_is_left_with_a_warning(dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    lm = AFTLM(tiny_model("llama", dtype=dtype), **OPTIONS)
    forward = lm.model.model.forward

    def shifted(*args: Any, position_ids: Any = None, **kwargs: Any) -> Any:
        ours = any(isinstance(value, RowCache) for value in kwargs.values())
        if ours and position_ids is not None:
            position_ids = position_ids * 0
        return forward(*args, position_ids=position_ids, **kwargs)

    lm.model.model.forward = shifted
    with caplog.at_level(logging.WARNING):
        fast, slow = both(lm, prompts(12))
    assert fast == slow
    how = "differ by" if dtype == torch.float32 else "err by"
    assert f"Generation is left to stock: {how}" in caplog.text


def test_cached_answers_and_order() -> None:
    lm, contexts = fresh("llama"), prompts(6)
    kept: list[Any] = []
    lm.cache_hook.add_partial = lambda *a: kept.append(a)  # type: ignore[method-assign]
    try:
        fast = lm.generate_until(instances(contexts, GREEDY), disable_tqdm=True)
    finally:
        del lm.cache_hook.add_partial
    stored = {request[0]: text for name, request, text in kept if name == "generate_until"}
    assert [stored[context] for context in contexts] == fast
