"""`aft report`: the same numbers everywhere, on real runs, in a browser, and at size."""

from __future__ import annotations

import csv
import html
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner, Result

from lm_eval_aft import AFTError, SteeringVector
from lm_eval_aft.cli.main import aft
from lm_eval_aft.evaluation import compare as compare_module
from lm_eval_aft.evaluation import formatting
from lm_eval_aft.evaluation.compare import VerdictRow
from lm_eval_aft.evaluation.render import update_cards
from lm_eval_aft.evaluation.report import Report, compare
from lm_eval_aft.steering.vector import describe_vector
from lm_eval_aft.training.artifacts import write_card
from tests.conftest import toy_documents
from tests.result_folders import steered_by, write_results
from tests.support.browser import browse, colours, needs_chromium

FORMATS = ("md", "json", "csv", "html")


def call(*arguments: str | Path) -> Result:
    result = CliRunner().invoke(aft, [str(word) for word in arguments])
    assert not isinstance(result.exception, Exception) or isinstance(result.exception, SystemExit)
    return result


def metadata(**splits: Any) -> dict[str, Any]:
    """What train-vector writes into a vector, as far as reports and cards read it."""
    layers = {str(i): {"score": 1.2 - 0.05 * (i % 5), "accuracy": 0.3 + 0.02 * i} for i in range(8)}
    return {
        "num_hidden_layers": 8,
        "base_model": {"name": "some/model", "revision": "main"},
        "task": "arc_challenge",
        "num_fewshot": 0,
        "objective": "choice",
        "metric": "acc_norm",
        "control": None,
        "seed": 0,
        "epoch": 2,
        "protocol": {"name": "sweep", "seeds": 2},
        "splits": {"train": 100, "selection": 50, **splits},
        "selection": {
            "baseline": {"score": 1.4, "cross_entropy": 1.5, "accuracy": 0.25, "temperature": 1.0, "n": 50},
            "layers": layers,
        },
    }


def save_vector(folder: Path, **splits: Any) -> SteeringVector:
    """A vector folder with a ledger of 8 layers × 2 seeds × 3 epochs."""
    vector = SteeringVector({4: torch.ones(16)}, metadata=metadata(**splits))
    vector.save(folder)
    recipe = {"name": "maximum", "layers": "all", "seeds": 2, "lr": [0.03], "l2": [0.0], "epochs": 3}
    start = {"task": "arc_challenge", "protocol": recipe, "prompts": {}}
    lines: list[dict[str, Any]] = [{"event": "start", "settings": start}]
    for layer in range(8):
        for seed in range(2):
            name = f"layer{layer}-seed{seed}"
            lines += [
                {
                    "event": "epoch",
                    "candidate": name,
                    "layer": layer,
                    "seed": seed,
                    "epoch": epoch,
                    "score": 1.3 - 0.04 * epoch - 0.01 * layer + 0.02 * seed,
                    "accuracy": 0.3,
                }
                for epoch in (1, 2, 3)
            ]
    (folder / "training.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return vector


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An `aft eval` folder: two tasks, one vector that helps on one of them, two placebos."""
    monkeypatch.chdir(tmp_path)
    digest = save_vector(tmp_path / "arc").digest()
    root = tmp_path / "results"
    zeros, n = [0.0] * 200, 200
    before = {
        "arc_challenge": [float(i % 4 == 0) for i in range(n)],
        "gsm8k": [float(i % 9 == 0) for i in range(n)],
    }
    norm = {"arc_challenge": {"acc_norm": before["arc_challenge"]}}
    nasty: dict[str, Any] = {
        "question": "<script>alert('|')</script> {{ 7 * 7 }} Why",
        "doc": {"note": "& <b>"},
    }
    write_results(root / "baseline", before, others=norm, **nasty)
    better = [float((i % 4 == 0 and i % 40 != 0) or i % 5 == 1) for i in range(n)]
    after = {"arc_challenge": better, "gsm8k": [float(i % 10 == 0) for i in range(n)]}
    vector = steered_by(sha256=digest)
    write_results(
        root / "steered" / "arc",
        after,
        others={"arc_challenge": {"acc_norm": better}},
        vector=vector,
        **nasty,
    )
    for seed in range(2):
        same = {"arc_challenge": before["arc_challenge"], "gsm8k": zeros if seed else before["gsm8k"]}
        control = steered_by(sha256=f"{seed}" * 64, control="random")
        write_results(
            root / "placebo" / f"arc-random-{seed}",
            same,
            others=norm,
            vector=control,
            config={"model_args": {"pretrained": "some/model"}},
            **nasty,
        )
    return root


def texts(page: str) -> str:
    """What a reader of an HTML page sees, roughly."""
    return html.unescape(re.sub(r"<[^>]+>", " ", page))


def test_the_same_numbers_in_every_format(runs: Path, tmp_path: Path) -> None:
    result = call("report", runs, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        f"report.{f}" for f in FORMATS
    )
    content = {f: (tmp_path / "out" / f"report.{f}").read_text() for f in FORMATS}
    rows = json.loads(content["json"])["rows"]
    table = list(csv.DictReader(content["csv"].splitlines()))
    assert len(rows) == len(table) == 9
    assert {row["verdict"] for row in rows} == {"better", "no detectable difference", ""}
    page = texts(content["html"])
    for row, line in zip(rows, table, strict=True):
        for name in ("baseline", "steered", "difference", "low", "high", "p_value", "mde"):
            assert line[name] == ("" if row[name] is None else repr(row[name])), name
        shown = formatting.row_cells(VerdictRow(**row))
        markdown = next(
            text for text in content["md"].splitlines() if text.startswith(f"| {' | '.join(shown[:3])} |")
        )
        assert markdown == f"| {' | '.join(shown)} |"
        for cell in shown[4:]:
            assert cell in page
            assert cell in result.output
    steered = next(row for row in rows if row["family"] and row["task"] == "arc_challenge")
    assert (steered["wins"], steered["losses"]) == (30, 5)  # counted by hand from the two patterns


def test_terminal_placebos_and_notes(runs: Path) -> None:
    output = call("report", runs).output
    assert re.search(r"arc_challenge acc_norm +│ +25.00 ± 3.07 %", output)
    assert re.search(r"steered/arc .* better", output)
    assert re.search(r"placebo/arc-random-1 .* placebo", output)
    assert "over 2 comparison(s)" in output


def test_a_norm_is_shown_with_its_share_of_the_residual_norm(runs: Path, tmp_path: Path) -> None:
    assert "% of the residual norm" not in call("report", runs).output  # not recorded
    vector = SteeringVector.load(tmp_path / "arc")
    vector.metadata["share"] = {"4": 0.1416}
    vector.save(tmp_path / "arc")
    assert vector.digest() == SteeringVector.load(tmp_path / "arc").digest()
    call("report", runs, "-o", tmp_path / "out")
    (facts,) = (each["facts"] for each in compare(runs).vectors if each["run"] == "steered/arc")
    assert facts["norm"] == 4.0
    assert facts["norm as a share of the residual norm"] == "14.2 %"
    assert "14.2 %" in (tmp_path / "out" / "report.html").read_text()
    described = describe_vector(vector)
    assert (described["norm"], described["share"]) == (4.0, 0.1416)
    assert compare_module._norm(described) == "4.0000 (14.2 % of the residual norm)"
    assert compare_module._norm({"norm": 4.0}) == "4.0000"


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A report on runs whose names, options and contexts would be markup; its page."""
    attack = "</pre></details><script>document.title='x'</script><img src=x onerror=alert(1)> \"' {{ 7 * 7 }}"
    for name, scores in (("a", [0.0, 1.0] * 20), ("b<script>", [1.0, 0.0] * 20)):
        write_results(tmp_path / name, {"task": scores}, metric="acc_norm", fewshot=attack * 10)
        (path,) = (tmp_path / name).rglob("samples_*.jsonl")
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for line in lines:
            context = line["arguments"]["gen_args_0"]["arg_0"]
            line["arguments"] = {f"g{i}": {"arg_0": context, "arg_1": f" {attack}{i}"} for i in range(2)}
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert call("report", tmp_path / "a", tmp_path / "b<script>", "-o", tmp_path / "out").exit_code == 0
    return tmp_path / "out" / "report.html"


class Elements(HTMLParser):
    """The names of a page's elements, and of their attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}


def test_hostile_options_and_contexts_are_text(hostile: Path) -> None:
    page = hostile.read_text()
    found = Elements(page)
    assert not found.tags & {"script", "img", "iframe", "object", "embed"}
    assert not {name for name in found.attributes if name.startswith("on")}
    assert page.count("<details") == page.count("</details>") > 40  # 20 won, 20 lost, and long contexts
    assert "{{ 7 * 7 }}" in html.unescape(page)


def test_a_notebook_shows_the_verdicts_of_primary_metrics(runs: Path, tmp_path: Path) -> None:
    report = replace(compare(runs), title="<script>alert(1)</script>", warnings=["<b>careful</b>"])
    shown = report._repr_html_()
    assert not Elements(shown).tags & {"script", "b"}
    rows = [row for row in report.rows if row.primary]
    assert shown.count('<th scope="row">') == len(rows) < len(report.rows)
    read = " ".join(texts(shown).split())
    for row in rows:
        assert formatting.points(row.difference, row.share) in read
    assert "<b>careful</b>" in read


@needs_chromium
def test_hostile_texts_do_nothing_in_a_browser(hostile: Path, tmp_path: Path) -> None:
    """The texts would change the title or ask for a picture; the policy would log what it stops."""
    assert browse(hostile, tmp_path / "hostile.png", "1280,3000") == ("", [])


def test_flipped_documents_that_are_left_out_are_counted(runs: Path, tmp_path: Path) -> None:
    call("report", runs, "-o", tmp_path / "out")
    page = " ".join(texts((tmp_path / "out" / "report.html").read_text()).split())
    # 30 won and 5 lost; 20 of either are shown.
    assert "Not shown: 10 won, 0 lost. aft report --flips 30 with the same folders shows all of them." in page
    call("report", runs, "--flips", "30", "-o", tmp_path / "all")
    assert "Not shown" not in (tmp_path / "all" / "report.html").read_text()


def test_flipped_documents_are_filtered_without_scripts(runs: Path, tmp_path: Path) -> None:
    """Each group of radio buttons is one task's; the style sheet hides what is not asked for."""
    call("report", runs, "-o", tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    groups = re.findall(r'<input type="radio" name="([^"]+)" id="([^"]+)" class="([^"]+)"( checked)?>', page)
    assert len({group for group, *_ in groups}) == page.count('<div class="flips">') == 2
    assert len({name for _, name, *_ in groups}) == len(groups) == 6
    assert [kind for *_, kind, checked in groups if checked] == ["all", "all"]
    assert all(f'<label for="{name}">' in page for _, name, *_ in groups)
    assert ".only-won:checked ~ .pair > .lost, .only-lost:checked ~ .pair > .won { display: none; }" in page


def test_nothing_from_documents_is_markup(runs: Path, tmp_path: Path) -> None:
    call("report", runs, "-o", tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    assert "&lt;script&gt;alert(" in page
    assert "<script" not in page
    assert "{{ 7 * 7 }}" in html.unescape(page)
    assert not re.search(r"""(src|href|action)=["'](?!data:)|url\(|@import|https?://(?!www\.w3)""", page)


def test_flipped_documents_are_told_in_full(runs: Path) -> None:
    report = compare(runs)
    flips = next(f for f in report.flips if f["task"] == "arc_challenge")
    assert (flips["won_count"], flips["lost_count"], len(flips["won"])) == (30, 5, 20)
    doc = flips["won"][0]
    assert doc["doc_id"] == 1
    assert doc["context"].endswith("Why 1?\nAnswer:")
    assert doc["options"] == [
        {
            "text": "yes",
            "gold": True,
            "before": -1.0,
            "after": -1.0,
            "score_before": -1.0 / 3,
            "score_after": -1.0 / 3,
            "chosen_before": True,
            "chosen_after": True,
        },
        {
            "text": "no",
            "gold": False,
            "before": -2.5,
            "after": -2.5,
            "score_before": -2.5 / 2,
            "score_after": -2.5 / 2,
            "chosen_before": False,
            "chosen_after": False,
        },
    ]
    assert [f["task"] for f in report.flips] == [
        "arc_challenge",
        "gsm8k",
    ]  # no placebos, no secondary metrics


def test_a_generation_that_flipped(tmp_path: Path) -> None:
    settings = {
        "metric": "exact_match",
        "gen_kwargs": {"until": ["Q"]},
        "fewshot": "x" * 2000,
        "target": "so #### 4",
    }
    write_results(tmp_path / "a", {"gsm8k": [0.0, 0.0]}, **settings)
    write_results(tmp_path / "b", {"gsm8k": [1.0, 0.0]}, **settings)
    (doc,) = compare(tmp_path / "a", tmp_path / "b").flips[0]["won"]
    assert doc["target"] == "so #### 4"
    assert doc["generations"]["after"] == {
        "text": "So the answer is 4",
        "repeats": 1,
        "answer": "So the answer is 4",
    }
    assert (len(doc["context"]), doc["context_cut"]) == (1500, 2000 + len("Question 0?\nAnswer:") - 1500)


def test_curves_settings_and_commands(runs: Path) -> None:
    report = compare(runs)
    (vector,) = report.vectors
    assert [each["layer"] for each in vector["layers"] if each["chosen"]] == [4]
    assert (len(vector["curves"]), len(vector["curves"][0]["points"])) == (16, 3)
    assert [curve["name"] for curve in vector["curves"] if curve["chosen"]] == ["layer4-seed0"]
    words = shlex.split(vector["command"])
    assert words[:6] == ["aft", "train", "--model", "some/model", "--task", "arc_challenge"]
    assert words[words.index("--lr") + 1] == "0.03"
    settings = {column["run"]: column["values"] for column in report.settings}
    assert settings["baseline"]["dtype"] == "float32"
    assert settings["steered/arc"]["vector sha256"] == vector["sha256"]
    assert settings["placebo/arc-random-0"]["control"] == "random"
    commands = {each["run"]: each["commands"] for each in report.commands}
    assert commands["placebo/arc-random-0"] == []
    (line,) = commands["steered/arc"]
    from lm_eval._cli.harness import HarnessCLI

    parsed = HarnessCLI()._parser.parse_args(["run", *shlex.split(line)[1:]])
    assert (parsed.model, parsed.num_fewshot, parsed.device) == ("aft", 0, "cpu")
    assert parsed.model_args == {"pretrained": "some/model", "vector": "arc"}
    assert parsed.log_samples


def test_training_flags_exist(runs: Path) -> None:
    """The printed `aft train` call is one that the command accepts."""
    from lm_eval_aft.cli.train import train_vector

    words = shlex.split(compare(runs).vectors[0]["command"])[2:]
    train_vector.make_context("train", words)


def test_a_vector_that_changed_since(runs: Path, tmp_path: Path) -> None:
    SteeringVector({4: torch.zeros(16)}, metadata=metadata()).save(tmp_path / "arc")
    report = compare(runs)
    assert any("no longer the one that was scored" in line for line in report.warnings)
    assert report.vectors[0]["layers"] == []


def test_selected_on_the_documents_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the vector's file to the verdict: by document hashes, and by the protocol's name."""
    monkeypatch.chdir(tmp_path)
    before, after = [0.0] * 30, [1.0] * 20 + [0.0] * 10
    write_results(tmp_path / "base", {"arc_challenge": before})
    samples = next((tmp_path / "base").rglob("samples_*.jsonl")).read_text().splitlines()
    hashes = [json.loads(line)["doc_hash"] for line in samples]
    verdicts = {}
    for name, documents in (
        ("fresh", ["0" * 64]),
        ("one", ["0" * 64, hashes[29]]),
        ("short", [hashes[3][:16]]),
    ):
        vector = save_vector(tmp_path / "arc", selection_documents=documents)
        write_results(tmp_path / name, {"arc_challenge": after}, vector=steered_by(sha256=vector.digest()))
        verdicts[name] = compare(tmp_path / "base", tmp_path / name).rows[0].verdict
    biased = metadata()
    biased["protocol"]["biased"] = True
    vector = SteeringVector({4: torch.ones(16)}, metadata=biased)
    vector.save(tmp_path / "arc")
    verdicts["biased"] = compare(tmp_path / "base", tmp_path / "fresh").rows[0].verdict
    selected = "not assessable: selected on these documents"
    assert verdicts == {"fresh": "better", "one": selected, "short": selected, "biased": selected}
    for each in FORMATS:
        call("report", "base", "fresh", "-o", "out")
        assert selected in (tmp_path / "out" / f"report.{each}").read_text()
    assert selected in " ".join(call("report", "base", "fresh").output.replace("│", " ").split())


def test_forced_comparisons_say_so_everywhere(tmp_path: Path) -> None:
    write_results(tmp_path / "a", {"arc_challenge": [0.0] * 30})
    write_results(tmp_path / "b", {"arc_challenge": [1.0] * 30}, config={"model_dtype": "bfloat16"})
    refused = call("report", tmp_path / "a", tmp_path / "b", "-o", tmp_path / "out")
    assert refused.exit_code == 1
    assert refused.output.count("Error:") == 1
    assert "dtype (float32 against bfloat16)" in refused.output
    assert not (tmp_path / "out").exists()
    forced = call("report", tmp_path / "a", tmp_path / "b", "--force", "-o", tmp_path / "out")
    for text in (forced.output, *((tmp_path / "out" / f"report.{f}").read_text() for f in FORMATS)):
        assert "dtype (float32 against bfloat16)" in html.unescape(text)
    for name in ("md", "html"):
        assert "Forced comparison" in (tmp_path / "out" / f"report.{name}").read_text()


def test_over_seeds(tmp_path: Path) -> None:
    """Three finalists of one vector: an interval of their mean, over seeds (Student) and over documents."""
    write_results(tmp_path / "baseline", {"arc": [0.0] * 100})
    for seed, right in enumerate((8, 10, 12)):
        write_results(
            tmp_path / "steered" / f"v-seed-{seed}",
            {"arc": [1.0] * right + [0.0] * (100 - right)},
            vector=steered_by(sha256=str(seed) * 64),
        )
    report = compare(tmp_path)
    (row,) = report.seeds
    seeds = 4.302652729911275 * 0.02 / 3**0.5  # t at 97.5 % with 2 degrees of freedom
    documents = sum(each.high - each.low for each in report.rows) / 6
    half = (seeds**2 + documents**2) ** 0.5
    assert documents > 0.05  # 10 of 100 documents
    assert (row["run"], row["seeds"]) == ("steered/v", 3)
    assert (row["low"], row["high"]) == pytest.approx((0.1 - half, 0.1 + half))


def test_leaderboard(tmp_path: Path) -> None:
    whole = {"n-samples": {"arc_challenge": {"original": 1172, "effective": 20}}}
    right = {"model_name": "Qwen/Qwen1.5-0.5B"}
    settings: dict[str, Any] = {"metric": "acc_norm", "shots": 25}
    for name, top in (("short", right | whole), ("same", right)):
        write_results(tmp_path / name / "a", {"arc_challenge": [1.0] * 6 + [0.0] * 14}, **settings, top=top)
        write_results(tmp_path / name / "b", {"arc_challenge": [1.0] * 7 + [0.0] * 13}, **settings, top=top)
    arc, hellaswag, gsm8k = compare(tmp_path / "same" / "a", tmp_path / "same" / "b").leaderboard
    assert (arc["same_settings"], arc["published"]) == (True, 31.48)
    assert arc["calibration"] == pytest.approx(30 - 31.48)
    assert (hellaswag["deviations"], gsm8k["published"]) == (["not scored"], None)
    output = call("report", tmp_path / "same" / "a", tmp_path / "same" / "b", "--leaderboard").output
    for words in ("31.48 % (−1.48)", "30.00 %", "35.00 %", "25-shot acc_norm", "Same settings"):
        assert words in output
    short = compare(tmp_path / "short" / "a", tmp_path / "short" / "b").leaderboard[0]
    assert short["deviations"] == ["20 of 1172 documents"]


def test_model_card(runs: Path, tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    result = call("report", runs, "--card")
    assert result.exit_code == 0, result.output
    card = ModelCard.load(tmp_path / "arc" / "README.md")
    data = card.data.to_dict()
    assert (data["library_name"], data["base_model"]) == ("lm-eval-aft", "some/model")
    assert data["base_model_relation"] == "adapter"
    report = compare(runs)
    rows = [row for row in report.rows if row.run == "steered/arc"]
    assert [each.metric_value for each in card.data.eval_results or []] == [row.steered for row in rows]
    for row in rows:
        assert formatting.interval(row.low, row.high, row.share) in card.text
    assert "they are not results" in " ".join(card.text.split()).replace("**", "")
    for row, found in zip(rows, card.data.eval_results or [], strict=True):
        assert found.dataset_name == row.task
        assert found.metric_args["baseline"] == row.baseline
        assert found.metric_args["interval"] == [row.low, row.high]


CARD_ROW = {
    "dataset": "allenai/ai2_arc",
    "metric": "acc_norm",
    "num_fewshot": "25",
    "split": "test",
    "n": 9,
    "value": 0.25,
    "baseline": "20.00 %",
    "steered": "25.00 %",
    "difference": "+5.00",
    "interval": "",
    "p": "0.01",
    "verdict": "better",
    "against": {"baseline": 0.2, "interval": [0.01, 0.09], "p": 0.01},
}


def test_results_are_read_back_by_the_hubs_own_parsers(tmp_path: Path) -> None:
    from huggingface_hub import ModelCard, parse_eval_result_entries

    from lm_eval_aft.library.files import RESULTS, vector_files

    vector = SteeringVector({1: torch.ones(4)}, metadata={"task": "arc_easy", "base_model": {"name": "a/b"}})
    vector.save(tmp_path)
    rows = [
        CARD_ROW | {"task": "arc_easy", "config": "ARC-Easy"},
        CARD_ROW | {"task": "arc_challenge", "config": "ARC-Challenge", "value": 0.3},
        CARD_ROW | {"task": "own", "dataset": "/data/own", "config": ""},
    ]
    write_card(tmp_path, vector, rows)
    card = ModelCard.load(tmp_path / "README.md", ignore_metadata_errors=False)
    found = {each.dataset_name: each for each in card.data.eval_results}
    assert list(found) == ["arc_easy", "arc_challenge", "own"]  # of one dataset, and still apart
    easy = found["arc_easy"]
    assert (easy.dataset_type, easy.dataset_config, easy.dataset_split) == (
        "allenai/ai2_arc",
        "ARC-Easy",
        "test",
    )
    assert (easy.metric_type, easy.metric_value, easy.dataset_args) == (
        "acc_norm",
        0.25,
        {"num_fewshot": "25"},
    )
    assert easy.metric_args == CARD_ROW["against"]
    assert card.data.datasets == ["allenai/ai2_arc"]
    entries = parse_eval_result_entries(yaml.safe_load((tmp_path / RESULTS).read_text()))
    assert [(each.dataset_id, each.task_id, each.value) for each in entries] == [
        ("allenai/ai2_arc", "ARC-Easy", 0.25),
        ("allenai/ai2_arc", "ARC-Challenge", 0.3),
    ]
    assert RESULTS in vector_files(tmp_path)
    # Selection scores are no results: a card without held-out ones has neither.
    selection = {
        "baseline": {"score": 1.0, "accuracy": 0.4, "n": 5},
        "layers": {"1": {"score": 0.9, "accuracy": 0.5}},
    }
    vector.metadata["selection"] = selection
    write_card(tmp_path, vector)
    card = ModelCard.load(tmp_path / "README.md")
    assert "0.9000" in card.text
    assert card.data.eval_results is None
    assert "model-index" not in card.content
    assert not (tmp_path / RESULTS).exists()


def test_a_sum_of_vectors_too_long_for_a_path(tmp_path: Path) -> None:
    """What cannot be a path is none: the report says that the vectors were not found, and has all scores."""
    spec = " + ".join(["no/such_vector*0.01"] * 20)
    base = write_results(tmp_path / "base", {"arc_easy": [1.0, 0.0, 1.0]})
    config = {"model_args": {"pretrained": "some/model", "vector": spec}}
    run = write_results(tmp_path / "sum", {"arc_easy": [1.0, 1.0, 1.0]}, vector=steered_by(), config=config)
    report = compare(base, run)
    assert [(row.wins, row.losses) for row in report.rows] == [(1, 0)]
    assert any("no/such_vector" in each for each in report.warnings)
    with pytest.raises(AFTError, match="No vector of these runs is in a folder"):
        update_cards(report)


def test_cards_take_no_results_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    digest = save_vector(tmp_path / "arc").digest()
    write_results(tmp_path / "a", {"arc_challenge": [0.0] * 30})
    logged = steered_by(sha256=digest, biased=True)
    write_results(tmp_path / "b", {"arc_challenge": [1.0] * 30}, vector=logged)
    assert call("report", "a", "b", "--card").exit_code == 0
    assert "## Results" not in (tmp_path / "arc" / "README.md").read_text()
    shutil.rmtree(tmp_path / "arc")
    missing = call("report", "a", "b", "--card")
    assert missing.exit_code == 1
    assert "No vector of these runs is in a folder" in missing.output


def _table(results: dict[str, Any]) -> dict[tuple[str, str, str], tuple[float, float]]:
    """lm-eval's own table: (task, metric, filter) -> (value, stderr), four digits less trailing zeros."""
    from lm_eval.utils import make_table

    found, task = {}, ""
    for line in make_table(results).splitlines()[2:]:
        columns = [cell.strip() for cell in line.strip("|").split("|")]
        task = columns[0] or task
        found[task, columns[4], columns[2]] = (float(columns[6]), float(columns[8]))
    return found


def _equals_lm_eval(report: Report, root: Path) -> None:
    for side in ("baseline", "steered"):
        (file,) = (root / side).rglob("results_*.json")
        table = _table(json.loads(file.read_text()))
        rows = [row for row in report.rows if row.kind == "steered"]
        assert {(row.task, row.metric, row.filter) for row in rows} == set(table)
        for row in rows:
            shown = table[row.task, row.metric, row.filter]
            ours = (getattr(row, side), getattr(row, f"{side}_stderr"))
            assert shown == tuple(float(f"{value:.4f}") for value in ours)


def test_numbers_equal_lm_evals_table(
    checkpoint: Callable[..., str], toy_tasks: Callable[..., str], tmp_path: Path
) -> None:
    tasks = toy_tasks()
    torch.manual_seed(0)
    SteeringVector({1: torch.randn(32) * 4}).save(tmp_path / "v")
    result = call(
        *(
            "eval",
            "--model",
            checkpoint("llama"),
            "--vector",
            tmp_path / "v",
            "--tasks",
            "toy_choice,toy_generate",
        ),
        *("--output", tmp_path / "r", "--", "--include_path", tasks, "--batch_size", "4"),
    )
    assert result.exit_code == 0, result.output
    report = compare(tmp_path / "r")
    _equals_lm_eval(report, tmp_path / "r")
    assert sum(row.wins + row.losses for row in report.rows) > 0  # the vector changed something


@pytest.mark.slow
def test_a_trained_vector_scored_on_its_selection_documents(
    checkpoint: Callable[..., str], toy_tasks: Callable[..., str], tmp_path: Path
) -> None:
    """Training documents are refused by no rule of the harness; the report knows them by their hash."""
    model, vector = checkpoint("llama"), tmp_path / "v"
    tasks = toy_tasks()
    small = ("--train-docs", "12", "--selection-docs", "12", "--seeds", "1", "--epochs", "1", "--layers", "1")
    base = ("--model", model, "--task", "toy_choice", "--include-path", tasks, *small)
    assert call("train", *base, "--output", vector).exit_code == 0
    verdicts = {}
    for name, documents in (("fresh", toy_documents(20, start=200)), ("seen", toy_documents(60))):
        toy_tasks(test=documents)
        result = call(
            *("eval", "--model", model, "--vector", vector, "--tasks", "toy_choice"),
            *("--output", tmp_path / name, "--", "--include_path", tasks, "--batch_size", "8"),
        )
        assert result.exit_code == 0, result.output
        verdicts[name] = compare(tmp_path / name).rows[0].verdict
    assert verdicts["seen"] == "not assessable: selected on these documents"
    assert not verdicts["fresh"].startswith("not assessable")


@pytest.mark.slow
def test_real_tasks(test_data: Path, tmp_path: Path) -> None:
    """A steered and an unsteered run of a real model over real data, through every format."""
    torch.manual_seed(1)
    SteeringVector({3: torch.randn(320) * 1.2}).save(tmp_path / "v")
    result = call(
        *("eval", "--model", test_data / "models" / "english-neox-12m", "--vector", tmp_path / "v"),
        *(
            "--tasks",
            "arc_challenge,hellaswag,gsm8k",
            "--placebo",
            "random:1",
            "--output",
            tmp_path / "r",
            "--",
        ),
        *("--limit", "10", "--batch_size", "8", "--gen_kwargs", "max_gen_toks=16"),
    )
    assert result.exit_code == 0, result.output
    report = compare(tmp_path / "r")
    _equals_lm_eval(report, tmp_path / "r")
    assert call("report", tmp_path / "r", "-o", tmp_path / "out").exit_code == 0
    assert [each["deviations"][0] for each in report.leaderboard] == [
        "0-shot",
        "0-shot",
        "10 of 1319 documents",
    ]


@pytest.mark.slow
def test_a_hundred_thousand_documents(tmp_path: Path) -> None:
    """Under 30 s and 1 GB, every format written; lines as long as four-option questions have."""
    n = 100_000
    padding = {"doc": {"passage": "word " * 150}, "fewshot": "word " * 100}
    write_results(tmp_path / "a", {"arc_challenge": [float(i % 4 == 0) for i in range(n)]}, **padding)
    write_results(tmp_path / "b", {"arc_challenge": [float(i % 5 < 2) for i in range(n)]}, **padding)
    # The peak of this address space alone: what getrusage says includes the process it was forked from.
    program = (
        "import sys; from lm_eval_aft.cli.main import aft; aft(sys.argv[1:], standalone_mode=False); "
        "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    started = os.times()
    done = subprocess.run(
        [sys.executable, "-c", program, "report", "a", "b", "-o", "out"],
        cwd=tmp_path, check=True, capture_output=True, text=True,
    )  # fmt: skip
    ended = os.times()  # the child's own, not what it waited for a core
    seconds = ended.children_user + ended.children_system - started.children_user - started.children_system
    megabytes = int(done.stdout.rsplit("VmHWM:", 1)[1].split()[0]) / 1024
    print(f"{seconds:.1f} s, {megabytes:.0f} MB")
    assert seconds < 30
    assert megabytes < 1024
    assert json.loads((tmp_path / "out" / "report.json").read_text())["rows"][0]["n"] == n


@needs_chromium
def test_the_page_in_a_browser(runs: Path, tmp_path: Path) -> None:
    """No console message, no request; the charts have ink, by day and by night, wide and narrow."""
    call("report", runs, "-o", tmp_path / "out")
    page = tmp_path / "out" / "report.html"
    bare = tmp_path / "bare.html"
    bare.write_text(re.sub(r"(<svg[^>]*>).*?</svg>", r"\1</svg>", page.read_text(), flags=re.DOTALL))
    light, dark = [(0x8A, 0x93, 0xA1), (0x1F, 0x7A, 0x54)], [(0x73, 0x7D, 0x8C), (0x52, 0xB7, 0x88)]
    night = ("--blink-settings=preferredColorScheme=0",)
    for name, size, flags, tones in (
        ("desktop", "1280,3000", (), light),
        ("phone", "390,5000", (), light),
        ("dark", "1280,3000", night, dark),
    ):
        console, requests = browse(page, tmp_path / f"{name}.png", size, *flags)
        assert (console, requests) == ("", [])
        browse(bare, tmp_path / f"{name}-bare.png", size, *flags)
        drawn, without = colours(tmp_path / f"{name}.png"), colours(tmp_path / f"{name}-bare.png")
        for tone in tones:  # the baseline's bars and those of a run that got better
            assert drawn.get(tone, 0) > without.get(tone, 0) + 400, (name, tone)


@needs_chromium
def test_the_browser_test_can_fail(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("<img src='http://127.0.0.1:9/x.png'><script>console.error('no good')</script>")
    console, requests = browse(page, tmp_path / "page.png", "400,300")
    assert "no good" in console
    assert "http://127.0.0.1:9/x.png" in requests


@pytest.mark.parametrize(
    ("metric", "chosen"),
    [("acc", 0), ("acc_norm", 1), ("acc_bytes", 2), ("acc_mutual_info", 1), ("exact_match", 3), ("own", 0)],
)
def test_every_metric_of_choices(tmp_path: Path, metric: str, chosen: int) -> None:
    """What is compared, and the option shown as chosen, are what lm-eval's metric of that name says."""
    options = ["a", "aaaaaaaa", "é" * 6, "bbbb"]
    values, alone = [-1.0, -2.4, -2.0, -9.0], [-1.0, -5.0, -2.0, -9.0]
    for name, scores in (("a", [0.0] * 30), ("b", [1.0] * 30)):
        write_results(tmp_path / name, {"task": scores}, metric=metric, target="3")
        (path,) = (tmp_path / name).rglob("samples_*.jsonl")
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for line in lines:
            contexts = [line["doc"]["question"]] * 4 + [""] * 4 * (metric == "acc_mutual_info")
            asked = zip(contexts, options * 2, strict=False)
            line["arguments"] = {f"g{i}": {"arg_0": c, "arg_1": f" {o}"} for i, (c, o) in enumerate(asked)}
            greedy = ["False", "False", "False", "True"] * 2
            line["resps"] = [
                [[str(v), g]] for v, g in zip([*values, *alone][: len(contexts)], greedy, strict=False)
            ]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    report = compare(tmp_path / "a", tmp_path / "b")
    assert [(row.metric, row.verdict, row.wins) for row in report.rows] == [(metric, "better", 30)]
    shown = report.flips[0]["won"][0]["options"]
    # What lm-eval's own process_results compares: see MultipleChoiceTask in lm_eval/api/task.py.
    expected = {
        "acc_norm": [-1.0, -2.4 / 8, -2.0 / 6, -9.0 / 4],
        "acc_bytes": [-1.0, -2.4 / 8, -2.0 / 12, -9.0 / 4],
        "acc_mutual_info": [0.0, 2.6, 0.0, 0.0],
    }.get(metric, values)
    assert [each["score_after"] for each in shown] == pytest.approx(expected)
    assert [i for i, each in enumerate(shown) if each["chosen_after"]] == [chosen]
    assert [each["text"] for each in shown] == options


def test_metrics_without_a_score_per_document_are_listed(tmp_path: Path) -> None:
    """Brier scores and likelihoods are logged as pairs of gold and predictions: both values, no test."""
    listed = [
        {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        {"metric": "brier_score", "aggregation": "brier_score", "higher_is_better": False},
    ]
    pair: list[Any] = [0, [0.5, 0.5]]
    for name, score in (("a", 0.5), ("b", 0.25)):
        others: Any = {"task": {"brier_score": [pair] * 30}}
        write_results(
            tmp_path / name, {"task": [1.0] * 30}, others=others, task_config={"metric_list": listed}
        )
        (path,) = (tmp_path / name).rglob("results_*.json")
        results = json.loads(path.read_text())
        results["results"]["task"]["brier_score,none"] = score
        path.write_text(json.dumps(results))
    report = compare(tmp_path / "a", tmp_path / "b")
    assert [row.metric for row in report.rows] == ["acc"]
    assert [(row["metric"], row["baseline"], row["steered"]) for row in report.corpus] == [
        ("brier_score,none", 0.5, 0.25)
    ]


def test_tasks_without_any_score_per_document(tmp_path: Path) -> None:
    """Perplexities of whole corpora, Matthews' coefficient: nothing to test, and all the same a report."""
    listed = [{"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False}]
    pair: Any = [[-3.5, 2]] * 4
    for name, score in (("a", 20.5), ("b", 18.25)):
        where = write_results(
            tmp_path / name, {"task": pair}, metric="word_perplexity", task_config={"metric_list": listed}
        )
        (path,) = where.rglob("results_*.json")
        results = json.loads(path.read_text())
        results["results"]["task"]["word_perplexity,none"] = score
        path.write_text(json.dumps(results))
    words = ["report", *(str(tmp_path / name) for name in ("a", "b")), "-o", str(tmp_path / "written")]
    done = CliRunner().invoke(aft, words)
    assert done.exit_code == 0, done.output
    for text in (done.output, (tmp_path / "written" / "report.md").read_text()):
        assert "word_perplexity" in text
        assert "20.5" in text
        assert "18.25" in text
    assert json.loads((tmp_path / "written" / "report.json").read_text())["rows"] == []
    for path in tmp_path.rglob("results_*.json"):
        results = json.loads(path.read_text())
        del results["results"]["task"]["word_perplexity,none"]
        path.write_text(json.dumps(results))
    done = CliRunner().invoke(aft, words)
    assert done.exit_code == 1
    assert "no metric in common" in done.output
