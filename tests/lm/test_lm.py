"""``--model aft`` against stock `hf` and lm-eval's own `steered`: the same bits on the stock path."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from lm_eval.models.hf_steered import SteeredModel
from lm_eval.models.huggingface import HFLM

from lm_eval_aft import AFTError, SteeringVector
from lm_eval_aft.lm import AFTLM
from lm_eval_aft.steering.backbone import find_backbone
from tests.conftest import tiny_tokenizer

# test_support compares the same path of every family with `hf` under a plain hook.
FAMILIES = [
    *("gpt_neox", "llama", "gpt2"),
    *(pytest.param(family, marks=pytest.mark.full) for family in ("qwen2", "phi", "stablelm", "mistral")),
]
# The tokenizer is passed along: by folder, some families would get a class of their own for it.
OPTIONS: dict[str, Any] = {"device": "cpu", "batch_size": 3, "tokenizer": tiny_tokenizer()}
CONTEXTS = ["the cat sees", "one two three four five", "Question : is the red fish small ?", "a"]
TAILS = [" the dog", " six", " yes", " no and the large tree"]


def requests(kind: str) -> list[Instance]:
    if kind == "loglikelihood":
        arguments: list[tuple[Any, ...]] = [(c, t) for c in CONTEXTS for t in TAILS] + [("", "the cat")]
    elif kind == "loglikelihood_rolling":
        arguments = [(" ".join(CONTEXTS * k),) for k in (1, 2, 9)]
    else:
        arguments = [(c, {"until": ["\n"], "max_gen_toks": 12, "do_sample": False}) for c in CONTEXTS]
    return [Instance(kind, {}, a, i, ("toy", i, 1)) for i, a in enumerate(arguments)]  # type: ignore[arg-type]


def answers(lm: Any) -> dict[str, list[Any]]:
    kinds = ("loglikelihood", "loglikelihood_rolling", "generate_until")
    return {kind: getattr(lm, kind)(requests(kind)) for kind in kinds}


def some_vector(seed: int = 0, layer: int = 1) -> SteeringVector:
    return SteeringVector({layer: torch.randn(32, generator=torch.Generator().manual_seed(seed))})


@pytest.mark.parametrize("family", FAMILIES)
def test_without_effect_equals_hf_bit_for_bit(
    family: str, checkpoint: Callable[..., str], tmp_path: Path
) -> None:
    folder = checkpoint(family)
    stock = answers(HFLM(folder, **OPTIONS))
    assert answers(AFTLM(folder, fast=False, **OPTIONS)) == stock
    vector = some_vector().save(tmp_path / "v")
    assert answers(AFTLM(folder, vector=str(vector), coefficient=0, fast=False, **OPTIONS)) == stock
    steered = answers(AFTLM(folder, vector=str(vector), fast=False, **OPTIONS))
    assert all(steered[kind] != stock[kind] for kind in ("loglikelihood", "loglikelihood_rolling"))


@pytest.mark.parametrize("family", FAMILIES)
def test_steered_equals_lm_evals_own_bit_for_bit(
    family: str, checkpoint: Callable[..., str], tmp_path: Path
) -> None:
    folder = checkpoint(family)
    vector = some_vector(layer=2)
    ours = AFTLM(folder, vector=vector, fast=False, **OPTIONS)
    hookpoint = f"{find_backbone(ours.model).name}.2".removeprefix(f"{ours.model.base_model_prefix}.")
    config = {hookpoint: {"steering_vector": vector.layers[2], "steering_coefficient": 1.0, "action": "add"}}
    torch.save(config, tmp_path / "steer.pt")
    theirs = SteeredModel(folder, str(tmp_path / "steer.pt"), **OPTIONS)
    assert answers(ours) == answers(theirs)


def test_each_model_and_vector_has_its_own_cached_answers(
    checkpoint: Callable[..., str], tmp_path: Path
) -> None:
    folder = checkpoint("llama")
    lms: dict[str, Callable[[], Any]] = {
        "hf": lambda: HFLM(folder, **OPTIONS),
        "baseline": lambda: AFTLM(folder, fast=False, **OPTIONS),
        "one": lambda: AFTLM(folder, vector=some_vector(1), **OPTIONS),
        "two": lambda: AFTLM(folder, vector=some_vector(2), **OPTIONS),
        "one, weaker": lambda: AFTLM(folder, vector=some_vector(1), coefficient=0.5, **OPTIONS),
        "another model": lambda: AFTLM(checkpoint("llama", seed=1), vector=some_vector(1), **OPTIONS),
    }
    alone = {name: answers(make()) for name, make in lms.items()}
    cache = str(tmp_path / "cache.db")
    for _ in range(2):  # the second round is served from the file
        for name, make in lms.items():
            assert answers(CachingLM(make(), cache)) == alone[name], name
    assert alone["hf"] == alone["baseline"]
    different = [repr(alone[name]) for name in lms if name != "hf"]
    assert len(set(different)) == len(different)


def test_cached_answers_are_used(checkpoint: Callable[..., str], tmp_path: Path, monkeypatch: Any) -> None:
    cache = str(tmp_path / "cache.db")
    first = answers(CachingLM(AFTLM(checkpoint("llama"), vector=some_vector(), **OPTIONS), cache))
    again = AFTLM(checkpoint("llama"), vector=some_vector(), **OPTIONS)

    def no_call(*_: Any, **__: Any) -> Any:
        raise AssertionError("the model was asked although the answer is cached")

    for kind in first:
        monkeypatch.setattr(again, kind, no_call)
    assert answers(CachingLM(again, cache)) == first


def test_model_info_tells_what_steered(checkpoint: Callable[..., str]) -> None:
    vector = some_vector()
    lm = AFTLM(checkpoint("llama"), vector=vector, coefficient=0.5, softmax_dtype="float32", **OPTIONS)
    info = lm.get_model_info()["aft"]
    expected = SteeringVector(vector.layers, 0.5)
    assert info["vector"]["sha256"] == expected.digest()
    assert (info["vector"]["layers"], info["vector"]["coefficient"]) == ([1], 0.5)
    assert (info["world_size"], info["softmax_dtype"]) == (1, "torch.float32")
    assert AFTLM(checkpoint("llama"), **OPTIONS).get_model_info()["aft"]["vector"] is None


def test_steer_replaces_and_removes(checkpoint: Callable[..., str]) -> None:
    lm = AFTLM(checkpoint("llama"), **OPTIONS)
    plain = answers(lm)
    lm.steer(some_vector())
    steered = answers(lm)
    lm.steer(None)
    assert answers(lm) == plain
    assert steered != plain


def test_refusals(checkpoint: Callable[..., str], tmp_path: Path) -> None:
    with pytest.raises(AFTError, match="No steering vector at"):
        AFTLM(checkpoint("llama"), vector=str(tmp_path / "nothing"))
    with pytest.raises(AFTError, match="cannot be loaded"):
        AFTLM(str(tmp_path / "no-model"))
    with pytest.raises(AFTError, match="hidden size 8, the model 32"):
        AFTLM(checkpoint("llama"), vector=SteeringVector({0: torch.ones(8)}))
    with pytest.raises(AFTError, match="positions='some'"):
        AFTLM(checkpoint("llama"), positions="some")


def test_the_vectors_fingerprint_is_checked_with_the_tokenizer(checkpoint: Callable[..., str]) -> None:
    from lm_eval_aft.steering.fingerprint import fingerprint

    lm = AFTLM(checkpoint("llama"), **OPTIONS)
    identity = fingerprint(lm.model, lm.tokenizer)
    vector = SteeringVector(
        some_vector().layers, metadata={"fingerprint": identity | {"vocabulary": "other"}}
    )
    with pytest.raises(AFTError, match="tokenizer vocabulary differ"):
        lm.steer(vector)
    lm.steer(vector, allow_mismatch=True)


def test_a_local_folder_called_demo_wins_with_a_warning(
    checkpoint: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "demo").symlink_to(checkpoint("llama"))
    monkeypatch.chdir(tmp_path)
    assert AFTLM("demo", **OPTIONS).pretrained == "demo"
    assert "Using the folder ./demo" in caplog.text
