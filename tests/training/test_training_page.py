"""``training.html``: what it shows is in the ledger; the tokens; hostile texts; notebooks; in a browser."""

from __future__ import annotations

import html
import json
import logging
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from lm_eval_aft import SteeringVector, load_vector, train_vector
from lm_eval_aft._util.pages import heat_map
from lm_eval_aft.lm import AFTLM
from lm_eval_aft.steering.backbone import find_backbone
from lm_eval_aft.training import run as run_module
from lm_eval_aft.training.artifacts import promoted_tokens, training_page
from lm_eval_aft.training.run import TrainingResult
from tests.conftest import FAMILIES, tiny_model, tiny_tokenizer
from tests.evaluation.test_report import Elements, texts
from tests.support.browser import browse, colours, needs_chromium

ATTACK = "</td></table><script>alert(1)</script><img src=x onerror=alert(1)>\"'"


@pytest.fixture
def settings(toy_tasks: Callable[..., str]) -> dict[str, Any]:
    return {"include_path": (toy_tasks(),), "train_docs": 20, "selection_docs": 24, "progress": False}


@pytest.fixture
def lm(checkpoint: Callable[..., str]) -> AFTLM:
    return AFTLM(checkpoint("llama"), device="cpu", batch_size=4)


def ledger(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "training.jsonl").read_text().splitlines()]


def cells(page: str) -> dict[tuple[int, str], tuple[str, int]]:
    """Of the heat map: layer and column -> change in nats and number of documents."""
    found = re.findall(
        r"<title>layer (\d+), (?:length|learning rate) (\S+): (\S+) nats, (\d+) documents",
        html.unescape(page),
    )
    return {(int(layer), column): (change, int(n)) for layer, column, change, n in found}


def signed(value: float) -> str:
    return f"{value:+.4f}".replace("-", "−")


def test_the_search_of_one_pass_is_the_ledgers(lm: AFTLM, settings: dict[str, Any], tmp_path: Path) -> None:
    train_vector(lm, "toy_choice", tmp_path / "v", protocol="onepass", seeds=2, refine=1, **settings)
    page = (tmp_path / "v" / "training.html").read_text()
    expected: dict[tuple[int, str], tuple[int, float]] = {}
    for line in ledger(tmp_path / "v"):
        if line["event"] == "trial":
            power = min(1, round(math.log2(line["share"])))  # the grid is of powers of two, up to 2
            key = line["layer"], f"{100 * 2.0**power:.3g}"
            value = -line["n"], line["score"] - line["baseline"]
            expected[key] = min(expected.get(key, value), value)
    assert cells(page) == {key: (signed(change), -n) for key, (n, change) in expected.items()}
    assert len(expected) > 4
    meta = load_vector(tmp_path / "v").metadata
    read = " ".join(texts(page).split())
    assert "These numbers are not results." in read
    tried = len({line["candidate"] for line in ledger(tmp_path / "v") if line["event"] == "trial"})
    assert f"Chosen from {tried} vectors scored" in read
    (cosine,) = meta["protocol"]["seeds_cosine"]
    assert f"{cosine:+.3f}".replace("-", "−") in read
    assert "Split halves" in read
    before, after = meta["selection"]["baseline"], meta["selection"]["vector"]
    assert f"{before['score']:.4f} → {after['score']:.4f} nats" in read


def test_the_search_of_an_optimiser_is_the_ledgers(
    lm: AFTLM, settings: dict[str, Any], tmp_path: Path
) -> None:
    train_vector(
        lm, "toy_choice", tmp_path / "v", protocol="maximum", layers="1-2", lr=(1e-3, 3e-2), epochs=2,
        seeds=2, retries=0, l2=0.0, regression=False, **settings,
    )  # fmt: skip
    page = (tmp_path / "v" / "training.html").read_text()
    changes: dict[tuple[int, str], list[float]] = {}
    for line in ledger(tmp_path / "v"):
        if line["event"] == "epoch":
            key = line["layer"], f"{line['lr']:g}"
            changes.setdefault(key, []).append(line["score"] - line["baseline"])
    assert cells(page) == {key: (signed(min(values)), 24) for key, values in changes.items()}
    assert {column for _, column in changes} == {"0.001", "0.03"}
    read = " ".join(texts(page).split())
    assert "Epochs selection cross-entropy" in read
    vectors = [load_vector(tmp_path / "v" / "seeds" / f"seed-{seed}.safetensors") for seed in (0, 1)]
    (one, other) = (next(iter(vector.layers.values())) for vector in vectors)
    assert f"{float(one @ other / one.norm() / other.norm()):+.3f}".replace("-", "−") in read


def test_a_vector_from_a_file_gives_the_page_of_its_run(
    lm: AFTLM, settings: dict[str, Any], tmp_path: Path
) -> None:
    """A file keeps layers in the order of their names, where 10 comes before 2."""
    result = train_vector(lm, "toy_choice", tmp_path / "v", protocol="onepass", **settings)
    vector = load_vector(tmp_path / "v")
    for part, key in (
        (vector.metadata["selection"], "layers"),
        (vector.metadata["protocol"], "halves_cosine"),
    ):
        part[key] = dict(reversed(part[key].items()))
    promoted = promoted_tokens(lm.model, lm.tokenizer, find_backbone(lm.model), vector)
    page = training_page(vector, result.finalists, ledger(tmp_path / "v"), promoted)
    assert page == (tmp_path / "v" / "training.html").read_text()


@pytest.mark.parametrize("broken", ["training_page", "promoted_tokens", "draw_sweep"])
def test_what_cannot_be_drawn_costs_no_vector(
    broken: str,
    lm: AFTLM,
    settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*_: Any) -> None:
        raise ValueError("no pen")

    monkeypatch.setattr(run_module, broken, fail)
    with caplog.at_level(logging.WARNING):
        result = train_vector(lm, "toy_choice", tmp_path / "v", protocol="onepass", layers="1-2", **settings)
    assert load_vector(tmp_path / "v").digest() == result.vector.digest()
    assert not (tmp_path / "v" / "state.safetensors").exists()
    lost, kept = ("sweep.png", "training.html")[:: 1 if broken == "draw_sweep" else -1]
    assert f"{lost} could not be drawn: ValueError: no pen" in caplog.text
    assert not (tmp_path / "v" / lost).exists()
    assert (tmp_path / "v" / kept).exists()


# Each final norm written out, without its bias, for a vector v and the norm's weight w.
NORMS = {
    "llama": lambda v, w: w * v / (v.square().mean() + 1e-6).sqrt(),
    "gemma2": lambda v, w: (1 + w) * v / (v.square().mean() + 1e-6).sqrt(),
    "gpt2": lambda v, w: functional.layer_norm(v, v.shape, weight=w),
    "phi": lambda v, w: functional.layer_norm(v, v.shape, weight=w),
}


@pytest.mark.parametrize("family", NORMS)
def test_promoted_tokens_are_those_of_the_logit_lens(family: str) -> None:
    model, tokenizer = tiny_model(family, 0), tiny_tokenizer()
    backbone = find_backbone(model)
    place = {"gpt2": "transformer.ln_f", "phi": "model.final_layernorm"}.get(family, "model.norm")
    norm = model.get_submodule(place)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # those of new models are all ones and zeros
        for each in norm.parameters():
            each.copy_(torch.randn(each.shape, generator=generator))
    vector = torch.randn(backbone.hidden_size, generator=generator)
    logits = model.get_output_embeddings().weight @ NORMS[family](vector, norm.weight)
    logits = logits[: len(tokenizer)].detach()
    order = logits.argsort(descending=True).tolist()
    found = promoted_tokens(model, tokenizer, backbone, SteeringVector({1: vector}))
    assert [line[0] for line in found.lines] == [repr(tokenizer.decode([i])) for i in order[:20]]
    assert [line[2] for line in found.lines] == [repr(tokenizer.decode([i])) for i in order[:-21:-1]]
    spread = (logits - logits.mean()) / logits.std()
    assert [float(line[1].replace("−", "-")) for line in found.lines] == pytest.approx(
        spread[order[:20]].tolist(), abs=0.006
    )


def test_every_family_has_a_final_norm_or_a_reason() -> None:
    without = []
    for family in FAMILIES:
        model = tiny_model(family, 0)
        backbone = find_backbone(model)
        vector = SteeringVector({0: torch.ones(backbone.hidden_size).cumsum(0)})
        found = promoted_tokens(model, tiny_tokenizer(), backbone, vector)
        assert bool(found.lines) != bool(found.intro)
        without += [] if found.lines else [family]
    assert without == []


def test_a_method_that_adds_no_constant_has_no_tokens(lm: AFTLM) -> None:
    method = SteeringVector({1: torch.ones(32)}, method="scale")
    found = promoted_tokens(lm.model, lm.tokenizer, find_backbone(lm.model), method)
    assert (found.lines, found.intro) == ([], "The method 'scale' adds no constant vector.")


@pytest.fixture
def finished(lm: AFTLM, settings: dict[str, Any], tmp_path: Path) -> tuple[TrainingResult, str]:
    """A run, and its page with hostile names in place of its own."""
    result = train_vector(lm, "toy_choice", tmp_path / "v", protocol="onepass", layers="1-3", **settings)
    assert result.folder is not None
    names = {"task": f"toy{ATTACK}", "base_model": {"name": f"model{ATTACK}"}, "metric": ATTACK}
    vector = replace(result.vector, metadata={**result.vector.metadata, **names, "metric_note": ATTACK})

    class Words:
        def __len__(self) -> int:
            return 64

        def decode(self, ids: list[int]) -> str:
            return f"{ATTACK}{ids}"

    promoted = promoted_tokens(lm.model, Words(), find_backbone(lm.model), vector)
    result.vector = vector
    return result, training_page(vector, {0: vector}, ledger(result.folder), promoted)


def test_hostile_texts_are_text(finished: tuple[TrainingResult, str]) -> None:
    result, page = finished
    for text in (page, result._repr_html_(), result.vector._repr_html_()):
        found = Elements(text)
        assert not found.tags & {"script", "img"}
        assert not {name for name in found.attributes if name.startswith("on")}
    assert html.unescape(page).count("alert(1)") > 40
    assert "default-src 'none'" in page
    assert not re.search(
        r"""(src|href|action)=["'](?!data:)|url\(|@import|https?://""", page.replace(html.escape(ATTACK), "")
    )


@pytest.mark.parametrize("values", [(-0.2, 0.1), (0.1, 7.0), (0.0, 0.0), (-0.3, -0.1)])
def test_colours_of_the_heat_map_are_those_of_the_numbers(values: tuple[float, float]) -> None:
    drawn = heat_map(["0"], ["a", "b"], {(0, j): (v, "") for j, v in enumerate(values)}, None, ("", ""), "")
    found = re.findall(r'class="cell (good|bad)".*?fill-opacity="([\d.]+)"', drawn)
    assert [tone == "good" for tone, _ in found] == [value < 0 for value in values]
    strengths = [float(strength) for _, strength in found]
    assert all(0 <= each <= 0.65 for each in strengths)
    larger = [abs(value) for value in values]
    assert (strengths[0] > strengths[1]) == (larger[0] > larger[1])


def test_notebooks_show_the_layers_and_say_what_they_are(finished: tuple[TrainingResult, str]) -> None:
    result, _ = finished
    shown = " ".join(texts(result._repr_html_()).split())
    assert "these numbers chose the vector and are not results" in shown
    assert "(chosen)" in shown
    own = texts(result.vector._repr_html_())
    assert f"{result.vector.norm():.4g}" in own
    assert "positions" in own


@pytest.mark.slow
@needs_chromium
def test_the_page_in_a_browser(finished: tuple[TrainingResult, str], tmp_path: Path) -> None:
    """No console message (the policy would log there), no request; the charts have ink, by day and night."""
    page, bare = tmp_path / "page.html", tmp_path / "bare.html"
    page.write_text(finished[1])
    bare.write_text(re.sub(r"(<svg[^>]*>).*?</svg>", r"\1</svg>", finished[1], flags=re.DOTALL))
    for name, size, flags, tone in (
        ("desktop", "1280,2800", (), (0x3F, 0x6F, 0xB0)),
        ("phone", "390,4500", (), (0x3F, 0x6F, 0xB0)),
        ("dark", "1280,2800", ("--blink-settings=preferredColorScheme=0",), (0x7B, 0xA7, 0xE0)),
    ):
        assert browse(page, tmp_path / f"{name}.png", size, *flags) == ("", [])
        browse(bare, tmp_path / f"{name}-bare.png", size, *flags)
        drawn, without = colours(tmp_path / f"{name}.png"), colours(tmp_path / f"{name}-bare.png")
        assert drawn.get(tone, 0) > without.get(tone, 0) + 100, name
        assert len(drawn) > len(without) + 10, name
