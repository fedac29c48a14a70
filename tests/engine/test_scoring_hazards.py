"""Fast scoring where stock is unforgiving: overflow, few requests, long rows, caches, odd arguments."""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from lm_eval.models.huggingface import HFLM

from lm_eval_aft import AFTError, SteeringVector, evaluate_pair
from lm_eval_aft.engine import precision
from lm_eval_aft.engine.kv_cache import Budget, RowCache
from lm_eval_aft.lm import AFTLM
from tests.conftest import CHOICE_YAML, tiny_model, tiny_tokenizer, toy_documents
from tests.engine.test_routing import a_library
from tests.support.families import WORDS, tiny_config

Pair = tuple[str, Any]
needs_reordering = pytest.mark.skipif(
    not precision.ReorderedWeights(torch.nn.Linear(2, 2)), reason="no reordered weights on this machine"
)


def sentence(length: int, seed: int) -> str:
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS) for _ in range(length))


def asked(kind: str, pairs: Sequence[Pair], task: str = "toy") -> list[Instance]:
    return [Instance(kind, {}, pair, i, (task, i, 1)) for i, pair in enumerate(pairs)]


def stock(model: Any, **options: Any) -> HFLM:
    return HFLM(model, tokenizer=tiny_tokenizer(), device="cpu", **{"batch_size": 4, **options})


def ours(model: Any, **options: Any) -> AFTLM:
    return AFTLM(model, tokenizer=tiny_tokenizer(), device="cpu", **{"batch_size": 4, **options})


def assert_equal(found: Sequence[Any], expected: Sequence[Any]) -> None:
    for (value, greedy), (other, same) in zip(found, expected, strict=True):
        assert value == pytest.approx(other, rel=1e-6, abs=1e-4)
        assert greedy == same


DOCUMENTS = [
    (sentence(random.Random(i).randint(4, 40), i), " " + sentence(6, 1000 + 4 * i + j))
    for i in range(60)
    for j in range(3)
]


@pytest.fixture
def several_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Budget, "of", lambda *_, **__: Budget(256, 128, 1 << 19))


@pytest.mark.usefixtures("several_groups")
def test_what_a_group_leaves_in_memory_reaches_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = asked("loglikelihood", DOCUMENTS)
    model = tiny_model("llama")
    expected = stock(model).loglikelihood(requests, disable_tqdm=True)
    laid_out = RowCache.lay_out
    reused = []

    def poisoned(self: RowCache, rows: int, capacity: int) -> bool:
        found = laid_out(self, rows, capacity)
        for pair in self._flat.values():
            for buffer in pair:
                buffer.fill_(math.nan)
        reused.append(found)
        return found

    monkeypatch.setattr(RowCache, "lay_out", poisoned)
    lm = ours(model)
    found = lm.loglikelihood(requests, disable_tqdm=True)
    assert any(reused)
    assert lm.get_model_info()["aft"]["scoring_path"].startswith("packed (100.0%")
    assert_equal(found, expected)


@pytest.mark.usefixtures("several_groups")
def test_a_document_that_overflows_takes_no_other_with_it() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[tiny_tokenizer().get_vocab()["river"]] = math.nan
    documents = [
        (context.replace("river", "cat"), tail.replace("river", "cat")) for context, tail in DOCUMENTS
    ]
    longest = max(range(60), key=lambda i: len(documents[3 * i][0].split()))
    for j in range(3 * longest, 3 * longest + 3):
        documents[j] = ("river " + documents[j][0], documents[j][1])
    found = ours(model).loglikelihood(asked("loglikelihood", documents), disable_tqdm=True)
    assert [i for i, (value, _) in enumerate(found) if math.isnan(value)] == [
        3 * longest, 3 * longest + 1, 3 * longest + 2,
    ]  # fmt: skip


@pytest.mark.usefixtures("several_groups")
def test_a_vector_that_overflows_takes_no_other_with_it() -> None:
    model = tiny_model("gpt_neox")
    requests = asked("loglikelihood", DOCUMENTS)
    good = SteeringVector({1: torch.randn(32, generator=torch.Generator().manual_seed(0))})
    bad = SteeringVector({1: 3e38 * torch.tensor([1.0, -1.0] * 16)})
    lm = ours(model)
    lm.score_along([good, bad])
    lm.loglikelihood(requests, disable_tqdm=True)
    lm.steer(good)
    together = lm.loglikelihood(requests, disable_tqdm=True)
    lm.steer(None)
    alone = ours(model, vector=good)
    assert_equal(together, alone.loglikelihood(requests, disable_tqdm=True))


@pytest.mark.parametrize("batch_size", ["auto", "auto:4"])
def test_an_automatic_batch_size_that_divides_few_requests(batch_size: str, tmp_path: Path) -> None:
    model = tiny_model("llama")
    options: dict[str, Any] = {"batch_size": batch_size, "max_batch_size": 4, "max_length": 64}
    few = [(sentence(5 + i, i), " dog sees") for i in range(12)]
    for pairs in (few, [*few, (sentence(100, 1), " dog")]):  # the last one is left to stock
        requests = asked("loglikelihood", pairs)
        lm = ours(model, **options)
        expected = stock(model, **options).loglikelihood(requests, disable_tqdm=True)
        assert_equal(lm.loglikelihood(requests, disable_tqdm=True), expected)
        assert lm.batch_schedule == float(batch_size.partition(":")[2] or 1)
    library = str(a_library(tmp_path).root)
    routed = [
        Instance("loglikelihood", {}, (sentence(6, i), " dog"), i, (task, i, 1))
        for i, task in enumerate(["red", "green", "blue"] * 3)
    ]
    answers = []
    for fast in (False, True):
        lm = ours(model, **options, library=library, route="task", fast=fast)
        answers.append(lm.loglikelihood(routed, disable_tqdm=True))
        lm.steer(None)
    assert_equal(*answers)


def chunked_model() -> Any:
    config = tiny_config("llama4_text")
    config.attention_chunk_size = 64
    return scaled(config)


def scaled(config: Any) -> Any:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4)
    return model.float().eval()


def test_prompts_longer_than_the_chunks_of_attention() -> None:
    model = chunked_model()
    tails = (" dog sees", " fish sees one", " cat")
    short = [(f"{sentence(18, 1)} {sentence(2 + i % 3, 10 + i)}", t) for i in range(12) for t in tails]
    long = [(f"{sentence(45, 2)} {sentence(2 + i % 3, 40 + i)}", t) for i in range(12) for t in tails]
    requests = asked("loglikelihood", short) + asked("loglikelihood", long, "other")
    lm = ours(model)
    expected = stock(model).loglikelihood(requests, disable_tqdm=True)
    assert_equal(lm.loglikelihood(requests, disable_tqdm=True), expected)
    assert {path for path, n in lm.paths_taken().items() if n} == {"prefixed", "trimmed"}
    settings = [{"until": ["\n"], "max_gen_toks": most, "do_sample": False} for most in (3, 8)]
    texts = asked(
        "generate_until",
        [(sentence(3 + i, i), settings[0]) for i in range(2)]
        + [(sentence(50 + i, i), settings[1]) for i in range(4)],
    )
    assert ours(model).generate_until(texts, disable_tqdm=True) == stock(model, batch_size=1).generate_until(
        texts, disable_tqdm=True
    )


def test_longer_questions_are_compared_with_stock_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a config does not say is found by the check, whatever was asked first."""
    monkeypatch.setattr("lm_eval_aft.engine.fallback.packing_ruled_out", lambda _model, _longest: "")
    monkeypatch.setattr("lm_eval_aft.engine.generation.packing_ruled_out", lambda _model, _longest: "")
    model = chunked_model()
    short = asked("loglikelihood", [(sentence(8 + i, i), t) for i in range(4) for t in (" dog", " cat sees")])
    long = asked("loglikelihood", [(sentence(60 + i, i), t) for i in range(4) for t in (" dog", " cat sees")])
    lm = ours(model)
    lm.loglikelihood(short, disable_tqdm=True)
    assert lm.paths_taken()["packed"] == 4
    expected = stock(model).loglikelihood(long, disable_tqdm=True)
    assert_equal(lm.loglikelihood(long, disable_tqdm=True), expected)
    assert lm.paths_taken()["packed"] == 4
    settings = {"until": ["\n"], "max_gen_toks": 6, "do_sample": False}
    few, many = (asked("generate_until", [(sentence(n + i, i), settings) for i in range(4)]) for n in (5, 60))
    lm.generate_until(few, disable_tqdm=True)
    assert lm.generate_until(many, disable_tqdm=True) == stock(model, batch_size=1).generate_until(
        many, disable_tqdm=True
    )
    assert lm.paths_taken()["generated in shared batches"] == 4


def test_positions_that_follow_the_longest_row_of_a_batch() -> None:
    config = tiny_config("phi3")
    config.original_max_position_embeddings = 40
    config.max_position_embeddings = 128
    config.rope_parameters = {
        "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4,
        "original_max_position_embeddings": 40,
    }  # fmt: skip
    model = scaled(config)
    requests = asked(
        "loglikelihood", [(sentence(8 + i, i), f" {t}") for i in range(24) for t in ("dog", "cat")]
    )
    for batch_size in (1, 4, 64):
        lm = ours(model, batch_size=batch_size)
        expected = stock(model, batch_size=batch_size).loglikelihood(requests, disable_tqdm=True)
        assert lm.loglikelihood(requests, disable_tqdm=True) == expected
    brief = requests[:8]
    lm = ours(model)
    lm.loglikelihood(brief, disable_tqdm=True)
    assert lm.get_model_info()["aft"]["scoring_path"].startswith("trimmed (100.0%")


@pytest.mark.parametrize(
    "pairs", [[("", "<eos>")], [("the cat", "")], [("the cat", " sees"), ("the cat", ""), ("the cat", " a")]]
)
def test_an_option_without_tokens_is_refused_as_stock_does(pairs: list[Pair]) -> None:
    model = tiny_model("llama")
    for lm in (stock(model), ours(model)):
        with pytest.raises(AssertionError):
            lm.loglikelihood(
                asked("loglikelihood", [DOCUMENTS[0], ("a", " dog"), *pairs, ("a", " cat")]),
                disable_tqdm=True,
            )


def test_cached_answers_are_the_models_own(tmp_path: Path) -> None:
    requests = asked("loglikelihood", DOCUMENTS[:12])
    texts = asked(
        "generate_until",
        [(sentence(5 + i, i), {"until": ["\n"], "max_gen_toks": 12, "do_sample": False}) for i in range(4)],
    )
    plain = tiny_model("llama")
    stretched_config = copy.deepcopy(plain.config)
    stretched_config.rope_parameters = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    stretched = transformers.AutoModelForCausalLM.from_config(stretched_config).float().eval()
    stretched.load_state_dict(plain.state_dict())
    quantised = [tiny_model("llama", seed) for seed in (0, 1)]
    for model in quantised:
        model.is_quantized = True  # all that transformers' quantisers leave for the fingerprint to see
    cache = str(tmp_path / "cache.db")
    for model in (plain, stretched, *quantised):
        alone = ours(model).loglikelihood(requests, disable_tqdm=True)
        for _ in range(2):
            assert CachingLM(ours(model), cache).loglikelihood(requests) == alone
    word = max(WORDS, key=lambda w: sum(w in t for t in ours(plain).generate_until(texts, disable_tqdm=True)))
    for options in ({}, {"think_end_token": word}):
        alone = ours(plain, **options).generate_until(texts, disable_tqdm=True)
        assert CachingLM(ours(plain, **options), cache).generate_until(texts) == alone


def test_positions_replace_those_of_routed_vectors(tmp_path: Path) -> None:
    library = str(a_library(tmp_path).root)
    requests = asked("loglikelihood", DOCUMENTS[:12])
    found = []
    for chosen in ({"vector": "colours/red"}, {"route": "constant:colours/red"}):
        for positions in (None, "last"):
            lm = ours(tiny_model("llama"), library=library, positions=positions, **chosen)
            found.append(lm.loglikelihood(requests, disable_tqdm=True))
    assert_equal(found[2], found[0])
    assert_equal(found[3], found[1])
    assert found[0] != found[1]


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_at_coefficient_0_the_slow_way_is_stock_whatever_the_positions(family: str) -> None:
    model = tiny_model(family)
    vector = SteeringVector({1: torch.randn(32)}, positions="prompt")
    requests = asked("loglikelihood", DOCUMENTS[:40])
    lm = ours(model, vector=vector, coefficient=0, fast=False, batch_size=8)
    expected = stock(model, batch_size=8).loglikelihood(requests, disable_tqdm=True)
    assert lm.loglikelihood(requests, disable_tqdm=True) == expected


def count(seen: list[int], *_: Any) -> None:
    seen.append(1)


def test_vectors_scored_along_cost_generation_nothing() -> None:
    model = tiny_model("llama")
    vectors = [SteeringVector({1: torch.randn(32)}) for _ in range(5)]
    settings = {"until": ["\n"], "max_gen_toks": 3, "do_sample": False}
    texts = asked("generate_until", [(f"{sentence(40, 5)} {sentence(3, i)}", settings) for i in range(6)])
    passes = []
    for along in ([], vectors):
        lm = ours(model)
        lm.score_along(along)
        lm.loglikelihood(asked("loglikelihood", DOCUMENTS[:12]), disable_tqdm=True)
        lm.generate_until(texts, disable_tqdm=True)
        seen: list[int] = []
        watch = model.register_forward_pre_hook(partial(count, seen))
        lm.steer(vectors[0])
        lm.generate_until(texts, disable_tqdm=True)
        watch.remove()
        lm.steer(None)
        passes.append(len(seen))
    assert passes[0] == passes[1]


def test_model_arguments_of_a_comparison_are_applied_or_refused(tmp_path: Path) -> None:
    model, vector = tmp_path / "model", tmp_path / "v"
    tiny_model("llama").save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    SteeringVector({1: torch.randn(32)}).save(vector)
    folder = tmp_path / "tasks"
    folder.mkdir()
    files = {}
    for split, documents in {"train": toy_documents(12), "test": toy_documents(6, start=200)}.items():
        files[split] = str(folder / f"{split}.jsonl")
        Path(files[split]).write_text("".join(json.dumps(each) + "\n" for each in documents))
    (folder / "toy_choice.yaml").write_text(CHOICE_YAML.format(files=json.dumps(files)))
    flags = ["--include_path", str(folder)]

    def evaluated(name: str, **arguments: Any) -> tuple[dict[str, Any], list[Any], list[Any]]:
        evaluate_pair(
            str(model), str(vector), ["toy_choice"], tmp_path / name,
            model_args={"device": "cpu", **arguments}, flags=flags,
        )  # fmt: skip
        (results,) = (tmp_path / name / "steered").glob("**/results*.json")
        samples = [
            [json.loads(line)["filtered_resps"] for line in path.read_text().splitlines()]
            for run in ("baseline", "steered")
            for path in (tmp_path / name / run).glob("**/samples*.jsonl")
        ]
        return json.loads(results.read_text())["config"], samples[0], samples[1]

    config, baseline, steered = evaluated("plain")
    assert config["aft"]["vector"]["coefficient"] == 1
    config, _, zero = evaluated("zero", coefficient=0.0)
    assert config["aft"]["vector"]["coefficient"] == config["model_args"]["coefficient"] == 0
    assert zero == baseline != steered
    config, _, last = evaluated("last", positions="last")
    assert config["aft"]["vector"]["positions"] == "last"
    assert last not in (steered, baseline)
    for key in ("vector", "route", "library", "answer_only"):
        with pytest.raises(AFTError, match=f"^{key} among the model arguments"):
            evaluated("refused", **{key: "x"})
    flags.append("--predict_only")
    with pytest.raises(AFTError, match="--predict_only has no meaning for several runs"):
        evaluated("refused")
    assert not (tmp_path / "refused").exists()


def test_tasks_are_told_of_the_model_as_by_stock(tmp_path: Path) -> None:
    """Tasks made by functions of the task's metadata, as RULER's: here a number of documents."""
    model, vector, folder = tmp_path / "model", tmp_path / "v", tmp_path / "tasks"
    tiny_model("llama").save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    SteeringVector({1: torch.randn(32)}).save(vector)
    folder.mkdir()
    (folder / "made.py").write_text(
        "import datasets\n"
        "def load(**metadata):\n"
        "    n = int(metadata.get('n', 3))\n"
        "    rows = [{'q': 'the cat', 'options': [' sees', ' a'], 'gold': i % 2} for i in range(n)]\n"
        "    return {'test': datasets.Dataset.from_list(rows)}\n"
    )
    (folder / "toy_made.yaml").write_text(
        "task: toy_made\ncustom_dataset: !function made.load\noutput_type: multiple_choice\n"
        "test_split: test\ndoc_to_text: q\ndoc_to_choice: options\ndoc_to_target: gold\n"
    )
    evaluate_pair(
        str(model), str(vector), ["toy_made"], tmp_path / "out", model_args={"device": "cpu"},
        flags=["--include_path", str(folder), "--metadata", '{"n": 7}'],
    )  # fmt: skip
    for run in ("baseline", "steered"):
        (samples,) = (tmp_path / "out" / run).glob("**/samples*.jsonl")
        assert len(samples.read_text().splitlines()) == 7


def off_by(monkeypatch: pytest.MonkeyPatch, error: float) -> None:
    """A processor whose kernels for reordered weights are wrong."""
    product = precision._product

    def wrong(weight: Any, bias: Any) -> Any:
        forward = product(weight, bias)
        return lambda inputs: forward(inputs) * (1 + error)

    monkeypatch.setattr(precision, "_product", wrong)


@needs_reordering
@pytest.mark.parametrize("error", [0.0, 1e-2, math.nan])
def test_kernels_that_are_wrong_are_found_out(
    error: float, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model("llama")
    requests = asked("loglikelihood", DOCUMENTS)
    texts = asked(
        "generate_until", [(sentence(9 + i, i), {"until": ["."], "max_gen_toks": 8}) for i in range(6)]
    )
    plain = stock(model, batch_size=1)
    expected = (
        plain.loglikelihood(requests, disable_tqdm=True),
        plain.generate_until(texts, disable_tqdm=True),
    )
    off_by(monkeypatch, error)
    for kind in (0, 1):
        lm = ours(model)
        caplog.clear()
        if kind:
            assert lm.generate_until(texts, disable_tqdm=True) == expected[1]
        else:
            assert_equal(lm.loglikelihood(requests, disable_tqdm=True), expected[0])
        # The path itself is not to blame, and stays.
        assert lm.get_model_info()["aft"]["scoring_path"] == (
            "generated in shared batches (100.0% of 6)" if kind else "packed (100.0% of 60)"
        )
        assert ("in the order of the checkpoint" in caplog.text) == (error != 0)


@needs_reordering
def test_weights_that_change_between_calls_are_read_anew() -> None:
    model = tiny_model("llama")
    lm, requests = ours(model), asked("loglikelihood", DOCUMENTS[:30])
    lm.loglikelihood(requests, disable_tqdm=True)
    for parameter in lm.model.parameters():
        parameter.data.mul_(1.5)  # as merging an adapter does: no version tells of it
    assert_equal(
        lm.loglikelihood(requests, disable_tqdm=True),
        stock(lm.model).loglikelihood(requests, disable_tqdm=True),
    )
    assert lm.get_model_info()["aft"]["scoring_path"].startswith("packed")


@needs_reordering
def test_passes_that_are_compared_with_are_stock_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    products = []
    product = precision._product

    def counted(weight: Any, bias: Any) -> Any:
        forward = product(weight, bias)
        return lambda inputs: (products.append(1), forward(inputs))[1]

    monkeypatch.setattr(precision, "_product", counted)
    lm, requests = ours(tiny_model("llama")), asked("loglikelihood", DOCUMENTS[:30])
    lm.loglikelihood(requests, disable_tqdm=True)
    assert products
    products.clear()
    paths = lm._fast()[0]
    with paths.scorer.prepared():
        paths.lm.stock_answers([(None, [1, 2, 3], [4])])
    assert not products
