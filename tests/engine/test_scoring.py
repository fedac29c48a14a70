"""Fast log-likelihoods against stock `hf`: the same answers, whichever path a model takes."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

import lm_eval_aft.engine.stock as stock_module
import lm_eval_aft.lm as lm_module
from lm_eval_aft import SteeringVector, evaluate_pair
from lm_eval_aft.engine.rows import gather, with_common_prefixes
from lm_eval_aft.lm import AFTLM
from tests.conftest import FAMILIES, WORDS, tiny_model, tiny_tokenizer

OPTIONS: dict[str, Any] = {"device": "cpu", "batch_size": 4, "tokenizer": tiny_tokenizer()}
UNPACKED = {"mistral-window", "gemma2", "falcon", "bloom", "gpt_neo"}
Pair = tuple[str, str]


def words(draw: random.Random, n: int) -> str:
    return " ".join(draw.choice(WORDS[:40]) for _ in range(n))


def questions(n: int = 6, prefix: str = "", seed: int = 0) -> list[Pair]:
    """Documents of two to four options; some options one token long, some beginning alike."""
    draw = random.Random(seed)
    pairs = []
    for i in range(n):
        context = prefix + words(draw, draw.randint(1, 14))
        pairs += [(context, " " + words(draw, draw.randint(1, 5))) for _ in range(2 + i % 2)]
        pairs += [(context, pairs[-1][1] + " " + words(draw, 2))]
    return pairs


def instances(pairs: Sequence[tuple[Any, ...]], kind: str = "loglikelihood") -> list[Instance]:
    return [Instance(kind, {}, pair, i, ("toy", i, 1)) for i, pair in enumerate(pairs)]  # type: ignore[arg-type]


def ask(lm: HFLM, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
    return lm.loglikelihood(instances(pairs), disable_tqdm=True)


def assert_same(fast: Sequence[tuple[float, bool]], slow: Sequence[tuple[float, bool]]) -> None:
    for (value, greedy), (expected, expected_greedy) in zip(fast, slow, strict=True):
        assert abs(value - expected) <= max(1e-4, 1e-6 * abs(expected))
        assert greedy == expected_greedy


def stock(lm: AFTLM, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
    """What the stock path answers for the same model, under the same vector."""
    lm.fast = False
    try:
        return ask(lm, pairs)
    finally:
        lm.fast = True


_made: dict[str, AFTLM] = {}


def fresh(family: str) -> AFTLM:
    """A model of the family with nothing checked, attached or kept yet."""
    if family not in _made:
        _made[family] = AFTLM(tiny_model(family), **OPTIONS)
    lm = _made[family]
    lm._shared = lm._companions = None
    lm.steer(None)
    return lm


def path(lm: AFTLM) -> str:
    return str(lm.get_model_info()["aft"]["scoring_path"])


def some_vector(layer: int = 1, seed: int = 0) -> SteeringVector:
    return SteeringVector({layer: torch.randn(32, generator=torch.Generator().manual_seed(seed))})


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_stock_answers(family: str) -> None:
    lm = fresh(family)
    shared = questions(9, prefix=words(random.Random(9), 20) + " ", seed=1)
    pairs = questions()
    for vector in (None, some_vector(2)):
        lm.steer(vector)
        assert path(lm) == "stock"
        assert_same(ask(lm, pairs), stock(lm, pairs))
        assert path(lm) == ("trimmed" if family in UNPACKED else "packed") + " (100.0% of 6)"
        assert_same(ask(lm, shared), stock(lm, shared))
        assert ("prefixed" in path(lm)) == (family not in UNPACKED)


@pytest.mark.parametrize("family", [*FAMILIES, "llama behind a prefix", "gpt2 behind a prefix"])
def test_vectors_scored_along_equal_each_by_itself(family: str) -> None:
    lm = fresh(family.split()[0])
    prefix = words(random.Random(9), 20) + " " if "prefix" in family else ""
    pairs = questions(9 if prefix else 6, prefix=prefix)
    both = SteeringVector({0: some_vector(0, 1).layers[0], 2: some_vector(2, 2).layers[2]}, 0.5)
    vectors = [some_vector(0), some_vector(3, 1), both, SteeringVector({1: torch.ones(32)}, 0.0)]
    lm.score_along(vectors)
    baseline = ask(lm, pairs)
    for vector in vectors:
        lm.steer(vector)
        before = path(lm)
        fast = ask(lm, pairs)
        assert path(lm) == before, "it was computed again"
        lm._companions, kept = None, lm._companions
        assert_same(fast, stock(lm, pairs))
        lm._companions = kept
    lm.steer(None)
    assert_same(baseline, stock(lm, pairs))


def test_unknown_requests_and_vectors_are_scored_when_their_turn_comes() -> None:
    lm, pairs, other = fresh("llama"), questions(), questions(seed=5)
    lm.score_along([some_vector(1)])
    ask(lm, pairs)
    found = []
    for vector, asked in ((some_vector(1), [*pairs[:3], *other]), (some_vector(2), pairs)):
        lm.steer(vector)
        found.append((vector, asked, ask(lm, asked)))
    lm.score_along([])
    for vector, asked, fast in found:
        lm.steer(vector)
        assert_same(fast, stock(lm, asked))


@pytest.mark.parametrize("batch_size", [1, 4])
def test_long_prompts_are_left_to_stock(batch_size: int, checkpoint: Callable[..., str]) -> None:
    """128 tokens fit; 129 fit with a last token that is only predicted; more are cut by stock."""
    folder = checkpoint("llama")
    options = OPTIONS | {"batch_size": batch_size}
    draw = random.Random(0)
    contexts = [words(draw, n) for n in (61, 62, 63, 64, 65, 66, 90)]
    pairs = [(context, tail) for context in contexts for tail in (" red", " blue fish tree", " the cat")]
    lm, stock = AFTLM(folder, **options), HFLM(folder, **options)
    fast, slow = ask(lm, pairs), ask(stock, pairs)
    assert_same(fast, slow)
    if batch_size == 1:
        assert fast[-9:] == slow[-9:]
    assert "packed" in path(lm)
    assert "stock" in path(lm)
    lm.score_along([some_vector()])
    ask(lm, pairs)
    lm.steer(some_vector())
    assert_same(ask(lm, pairs), ask(AFTLM(folder, vector=some_vector(), fast=False, **options), pairs))


@pytest.mark.parametrize(
    "pairs",
    [
        [("the cat", option) for option in (":", ".", "?", ",", "#")],
        [("", "the cat sees"), ("", "the dog"), ("", "<eos> the"), ("the", " cat"), ("", "two")],
        [("the cat sees", " the dog"), ("the cat sees", " the dog"), ("the cat sees", " the")],
        [("the cat ", "dog"), ("the cat  ", "dog"), ("the cat", "  dog red")],
        [(f"one {word}", " sees the dog") for word in ("cat", "bird", "fish")],
    ],
    ids=["one-token options", "empty contexts", "repeats", "trailing blanks", "contexts differ"],
)
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "bloom"])
def test_unusual_requests(pairs: list[Pair], family: str) -> None:
    model = fresh(family).model
    for extra in ({}, {"add_bos_token": True}, {"prefix_token_id": 7}, {"logits_cache": False}):
        options = OPTIONS | extra
        assert_same(ask(AFTLM(model, **options), pairs), ask(HFLM(model, **options), pairs))


def test_answers_come_in_the_order_asked() -> None:
    lm, pairs = fresh("qwen2"), questions(12)
    random.Random(3).shuffle(pairs)
    assert_same(ask(lm, pairs), stock(lm, pairs))


def test_rolling_stays_stock_bit_for_bit(checkpoint: Callable[..., str]) -> None:
    texts = [(words(random.Random(i), n),) for i, n in enumerate((3, 30, 200))]
    asked = instances(texts, "loglikelihood_rolling")
    folder = checkpoint("llama")
    lm = AFTLM(folder, **OPTIONS)
    ask(lm, questions())
    assert lm.loglikelihood_rolling(asked) == HFLM(folder, **OPTIONS).loglikelihood_rolling(asked)


def test_greedy_is_what_stock_says() -> None:
    """Options that the model itself would write, and the same with another last token."""
    lm = fresh("llama")
    asked = []
    for context, _ in questions(6)[::3]:
        head = lm.tok_encode(context)
        ids = torch.tensor([head])
        for _ in range(3):
            ids = torch.cat([ids, lm.model(ids).logits[:, -1:].argmax(-1)], dim=1)
        written = ids[0, -3:].tolist()
        asked += [
            (None, head, tail) for tail in (written, [*written[:2], (written[2] + 1) % 64], written[:1])
        ]
    slow = lm.stock_answers(asked)
    assert {greedy for _, greedy in slow} == {True, False}
    assert_same(lm._loglikelihood_tokens(asked, disable_tqdm=True), slow)
    assert path(lm).startswith("packed")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("softmax_dtype", [None, "float32"])
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "bloom"])
def test_sixteen_bits_err_no_more_than_stock(family: str, softmax_dtype: str | None, dtype: str) -> None:
    pairs = questions(40)
    exact = [value for value, _ in stock(fresh(family), pairs)]
    model = tiny_model(family, dtype=getattr(torch, dtype))
    lm = AFTLM(model, **OPTIONS, softmax_dtype=softmax_dtype)
    errors = [
        torch.tensor([abs(value - e) for (value, _), e in zip(found, exact, strict=True)])
        for found in (ask(lm, pairs), stock(lm, pairs))
    ]
    assert ("packed" in path(lm)) == (family != "bloom")
    # Both are rounding noise, so their sizes are compared with room for chance.
    assert float(errors[0].mean()) <= 1.1 * float(errors[1].mean())
    assert float(errors[0].max()) <= 1.5 * float(errors[1].max())


def test_mixed_precision() -> None:
    pairs = questions(20)
    lm = AFTLM(fresh("llama").model, **OPTIONS, mixed_precision_dtype="bfloat16", softmax_dtype="float32")
    fast, slow = ask(lm, pairs), stock(lm, pairs)
    exact = ask(fresh("llama"), pairs)
    errors = [sum(abs(a - b) for (a, _), (b, _) in zip(each, exact, strict=True)) for each in (fast, slow)]
    assert errors[0] <= 1.1 * errors[1]
    assert "packed" in path(lm)


def test_a_peft_model(checkpoint: Callable[..., str], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    folder, pairs = checkpoint("llama"), questions()
    model = AutoModelForCausalLM.from_pretrained(folder)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "lora")
    options = OPTIONS | {"peft": str(tmp_path / "lora")}
    for vector in (None, some_vector()):
        lm = AFTLM(folder, vector=vector, **options)
        assert_same(ask(lm, pairs), ask(AFTLM(folder, vector=vector, fast=False, **options), pairs))
        assert path(lm).startswith("packed (100")


def test_a_wrong_path_is_left_with_a_warning(
    checkpoint: Callable[..., str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, pairs = checkpoint("llama"), questions(9, prefix=words(random.Random(9), 20) + " ")
    slow = ask(HFLM(folder, **OPTIONS), pairs)
    lm = AFTLM(folder, **OPTIONS)
    forward = lm.model.model.forward
    # Deaf to the tree mask: packed rows see each other's options.
    lm.model.model.forward = lambda *a, attention_mask=None, **k: forward(*a, **k)
    with caplog.at_level(logging.WARNING):
        assert_same(ask(lm, pairs), slow)
    assert path(lm) == "trimmed (100.0% of 9)"
    assert "from prefixed to packed" in caplog.text
    assert "from packed to trimmed: log-likelihoods differ by" in caplog.text
    lm = AFTLM(folder, **OPTIONS)
    head = lm.model.lm_head

    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError("only whole rows")

    lm.model.get_output_embeddings = lambda: refuse()
    with caplog.at_level(logging.WARNING):
        assert_same(ask(lm, pairs), slow)
    assert path(lm) == "stock (100.0% of 9)"
    assert "from trimmed to stock: the model refuses it (RuntimeError: only whole rows)" in caplog.text
    assert head is lm.model.lm_head


def test_a_model_that_cannot_start_midway_scores_each_vector_by_itself(
    checkpoint: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    folder, pairs = checkpoint("llama"), questions()
    lm = AFTLM(folder, **OPTIONS)  # a model of its own, to be tampered with
    final = lm.model.model.norm.forward
    ran: list[int] = []
    original = lm.model.model.layers[0].mlp.forward
    lm.model.model.layers[0].mlp.forward = lambda x: (ran.append(1), original(x))[1]
    lm.model.model.norm.forward = lambda x: final(x) * (1.0 if ran else 2.0)
    lm.model.model.embed_tokens.register_forward_hook(lambda *_: ran.clear())
    lm.score_along([some_vector()])
    with caplog.at_level(logging.WARNING):
        ask(lm, pairs)
    assert "passes cannot start midway" in caplog.text
    lm.steer(some_vector())
    assert_same(ask(lm, pairs), ask(AFTLM(folder, vector=some_vector(), fast=False, **OPTIONS), pairs))


def test_hooks_and_forwards_are_as_before() -> None:
    lm = fresh("llama")
    lm.score_along([some_vector()])
    ask(lm, questions(9, prefix=words(random.Random(9), 20) + " "))
    for module in lm.model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert "forward" not in module.__dict__


def test_progress_and_automatic_batches(
    checkpoint: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """``auto`` on a CPU tries no huge batch, not even for prompts that stock must cut."""
    seen: list[int] = []

    class Bar(lm_module.tqdm):  # type: ignore[misc, name-defined]
        def update(self, n: int = 1) -> Any:
            seen.append(n)
            return super().update(n)

    monkeypatch.setattr(lm_module, "tqdm", Bar)
    folder = checkpoint("llama")
    lm = AFTLM(folder, **(OPTIONS | {"batch_size": "auto", "max_batch_size": 64}))
    rows: list[int] = []
    call = lm._model_call
    monkeypatch.setattr(lm, "_model_call", lambda inps, **k: (rows.append(inps.numel()), call(inps, **k))[1])
    monkeypatch.setattr(stock_module, "STOCK_BATCH_BYTES", 4 * 4 * 64 * 128 * 2)
    pairs = [*questions(), *[(words(random.Random(i), 80), " red") for i in range(5)]]
    assert_same(ask(lm, pairs), ask(HFLM(folder, **OPTIONS), pairs))
    assert sum(seen) == len(pairs)
    assert max(rows) <= 2 * 128


def test_steering_adds_no_matmul() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    lm, counts = fresh("llama"), []
    ask(lm, questions())
    for vector in (None, some_vector()):
        lm.steer(vector)
        with FlopCounterMode(display=False) as counter:
            ask(lm, questions())
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]


def test_requests_are_gathered_by_context() -> None:
    asked = [(None, [1, 2], [3, 4]), (None, [1, 2], [3, 5]), (None, [1, 9], [3]), (None, [1, 2], [4])]
    found = gather(enumerate(asked))
    assert [[option.index for option in question.options] for question in found] == [[0, 1], [2], [3]]
    # Both options begin with 3, which is read once; 4 and 5 are only predicted.
    assert (found[0].cached, found[0].tokens) == (1, (1, 2, 3))
    assert [(run.start, run.after) for run in found[0].runs] == [(0, -1), (2, 1)]
    assert (found[0].unshared, found[0].longest, found[2].unshared) == (1, 4, 1)


def test_prefixes_are_found_by_token() -> None:
    common = list(range(40))
    asked = [(None, [*common, i, 7], [3, 4]) for i in range(20)] + [(None, [99] * 50, [1])]
    sets = with_common_prefixes(gather(enumerate(asked)))
    assert [(length, len(members)) for length, members in sets] == [(40, 20), (0, 1)]
    # A short one before long contexts does not pay.
    long = [(None, [*common, *range(100 * i, 100 * i + 130), 7], [3, 4]) for i in range(1, 20)]
    assert [length for length, _ in with_common_prefixes(gather(enumerate(long)))] == [0]


def test_evaluate_pair_scores_all_in_one_go(
    checkpoint: Callable[..., str], toy_tasks: Callable[..., str], tmp_path: Path, monkeypatch: Any
) -> None:
    """One pass over the requests, and in each folder what that vector by itself would have got."""
    folder, tasks = checkpoint("gpt_neox"), toy_tasks()
    places = [str(some_vector(layer, layer).save(tmp_path / f"v{layer}").parent) for layer in (0, 2)]
    calls: list[int] = []
    score = AFTLM._loglikelihood_tokens
    counting = lambda self, requests, **k: (calls.append(len(requests)), score(self, requests, **k))[1]  # noqa: E731
    monkeypatch.setattr(AFTLM, "_loglikelihood_tokens", counting)
    flags = ["--include_path", tasks, "--limit", "6", "--batch_size", "4"]
    out = tmp_path / "out"
    runs = evaluate_pair(folder, places, ["toy_choice"], out, placebo="random:1", flags=flags)
    assert [run.name for run in runs] == [
        "baseline", "steered/v0", "steered/v2", "placebo/v0-random-0", "placebo/v2-random-0",
    ]  # fmt: skip
    assert calls == [24]
    lm = AFTLM(folder, **OPTIONS, softmax_dtype="float32")
    for run in runs:
        (file,) = (out / run.name).rglob("samples_*.jsonl")
        samples = sorted(map(json.loads, file.read_text().splitlines()), key=lambda s: s["doc_id"])
        pairs = [tuple(a.values()) for s in samples for a in s["arguments"].values()]
        fast = [(float(r[0][0]), r[0][1] == "True") for s in samples for r in s["resps"]]
        lm.steer(run.vector)
        assert_same(fast, stock(lm, pairs))
        (results,) = (out / run.name).rglob("results_*.json")
        assert json.loads(results.read_text())["config"]["aft"]["scoring_path"] == "packed (100.0% of 6)"


def test_chat_templates(toy_tasks: Callable[..., str]) -> None:
    from lm_eval import simple_evaluate

    from lm_eval_aft.harness.tasks import task_manager_for

    lm, tasks, found = fresh("qwen2"), toy_tasks(), []
    manager = task_manager_for(["toy_choice"], [tasks])
    for fast in (True, False):
        lm.fast = fast
        results = simple_evaluate(
            lm, tasks=["toy_choice"], num_fewshot=2, limit=8, apply_chat_template=True,
            fewshot_as_multiturn=True, task_manager=manager, log_samples=True, bootstrap_iters=0,
        )  # fmt: skip
        samples = results["samples"]["toy_choice"]
        found.append([(r[0][0], r[0][1]) for s in samples for r in s["resps"]])
    lm.fast = True
    assert "user :" in samples[0]["arguments"][0][0]
    assert_same(*found)
