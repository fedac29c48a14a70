"""The answer-only diagnostic: scored as stock hf scores emptied contexts, kept apart, and reported."""

from __future__ import annotations

import csv
import html
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from lm_eval.models.huggingface import HFLM

from lm_eval_aft import AFTError, SteeringVector
from lm_eval_aft.cli.main import aft
from lm_eval_aft.evaluation import formatting
from lm_eval_aft.evaluation.compare import VerdictRow
from lm_eval_aft.evaluation.report import compare, meaning
from lm_eval_aft.evaluation.run import plan_runs
from lm_eval_aft.lm import AFTLM
from lm_eval_aft.steering.hooks import attach
from tests.conftest import tiny_tokenizer
from tests.result_folders import steered_by, write_results

OPTIONS: dict[str, Any] = {"device": "cpu", "batch_size": 3, "tokenizer": tiny_tokenizer()}
PAIRS = [(c, t) for c in ("the cat sees", "one two ", "a") for t in (" the dog", " six", "yes no")]


def instances(pairs: list[tuple[str, str]]) -> list[Instance]:
    return [Instance("loglikelihood", {}, pair, i, ("toy", i, 1)) for i, pair in enumerate(pairs)]


def some_vector() -> SteeringVector:
    return SteeringVector({1: torch.randn(32, generator=torch.Generator().manual_seed(0)) * 4})


def call(*arguments: str | Path) -> Any:
    return CliRunner().invoke(aft, [str(word) for word in arguments])


@pytest.mark.parametrize("steered", [False, True])
def test_equals_stock_hf_on_contexts_emptied_by_hand(steered: bool, checkpoint: Callable[..., str]) -> None:
    emptied = [("", tail) for _, tail in PAIRS]
    lm = AFTLM(checkpoint("llama"), answer_only=True, fast=False, **OPTIONS)
    if steered:
        lm.steer(some_vector())
        with attach((stock := HFLM(checkpoint("llama"), **OPTIONS)).model, some_vector()):
            expected = stock.loglikelihood(instances(emptied))
    else:
        expected = HFLM(checkpoint("llama"), **OPTIONS).loglikelihood(instances(emptied))
    asked = instances(PAIRS)
    assert lm.loglikelihood(asked) == expected
    assert [each.args for each in asked] == PAIRS  # the samples still log what the task asked
    fast = AFTLM(checkpoint("llama"), answer_only=True, vector=some_vector() if steered else None, **OPTIONS)
    for (got, greedy), (wanted, same) in zip(fast.loglikelihood(asked), expected, strict=True):
        assert got == pytest.approx(wanted, abs=1e-4)
        assert greedy == same


def test_never_mistaken_for_an_ordinary_model(checkpoint: Callable[..., str], tmp_path: Path) -> None:
    lms = [AFTLM(checkpoint("llama"), answer_only=bare, **OPTIONS) for bare in (False, True)]
    assert [lm.get_model_info()["aft"]["answer_only"] for lm in lms] == [False, True]
    alone = [lm.loglikelihood(instances(PAIRS)) for lm in lms]
    cached = [CachingLM(lm, str(tmp_path / "cache.db")).loglikelihood(instances(PAIRS)) for lm in lms * 2]
    assert cached == alone * 2
    assert alone[0] != alone[1]
    generation = Instance("generate_until", {}, ("a", {"until": ["\n"]}), 0, ("toy_generate", 0, 1))
    with pytest.raises(AFTError, match="answer_only=true cannot generate, as toy_generate asks"):
        lms[1].generate_until([generation])


def test_runs_of_an_evaluation(tmp_path: Path) -> None:
    some_vector().save(tmp_path / "baseline")  # a vector may be called so
    runs = plan_runs([str(tmp_path / "baseline")], "random:1", routes=["constant:a/b"], answer_only=True)
    assert [(run.name, run.answer_only) for run in runs] == [
        ("baseline", False),
        ("steered/baseline", False),
        ("steered/routed-constant-a-b", False),
        ("placebo/baseline-random-0", False),
        ("answer-only/baseline", True),
        ("answer-only/baseline-2", True),
    ]


def test_from_evaluation_to_report(
    checkpoint: Callable[..., str], toy_tasks: Callable[..., str], tmp_path: Path
) -> None:
    some_vector().save(tmp_path / "v")
    base = ("eval", "--model", checkpoint("llama"), "--vector", tmp_path / "v", "--answer-only")
    flags = ("--", "--include_path", toy_tasks(), "--batch_size", "4")
    refused = call(*base, "--tasks", "toy_generate", "--output", tmp_path / "no", *flags)
    assert refused.exit_code != 0
    assert "No task can be scored without its questions (toy_generate: its answers are generated)" in (
        refused.output
    )
    result = call(
        *base, "--tasks", "toy_choice,toy_generate", "--output", tmp_path / "r", *flags, "--num_fewshot", "2"
    )
    assert result.exit_code == 0, result.output
    assert "answer-only runs leave out toy_generate" in result.output
    names = ("baseline", "steered/v", "answer-only/baseline", "answer-only/v")
    files = {name: next((tmp_path / "r" / name).rglob("results_*.json")) for name in names}
    scores = {name: json.loads(file.read_text()) for name, file in files.items()}
    assert [scores[name]["config"]["aft"]["answer_only"] for name in names] == [False, False, True, True]
    assert list(scores["answer-only/v"]["results"]) == ["toy_choice"]
    report = compare(tmp_path / "r")
    (pair,) = report.answer_only
    for row, before, after in (
        (pair.with_question, "baseline", "steered/v"),
        (pair.without_question, "answer-only/baseline", "answer-only/v"),
    ):
        key = f"{row.metric},{row.filter}"
        assert row.baseline == pytest.approx(scores[before]["results"]["toy_choice"][key])
        assert row.steered == pytest.approx(scores[after]["results"]["toy_choice"][key])
    assert report.family == 2  # one vector, two tasks: nothing of answer-only counts
    assert "Without the question" in result.output
    with pytest.raises(AFTError, match=r"differ in: answer_only \(false against true\)\."):
        compare(tmp_path / "r" / "baseline", tmp_path / "r" / "answer-only" / "v")
    among = compare(tmp_path / "r" / "answer-only")
    assert any("without the questions" in note for note in among.warnings)


def outcomes(root: Path, bare_gain: bool) -> Path:
    """Results in which a vector gains 30 of 200 with the question, and as much without it, or nothing."""
    before, after = ([float(i % 4 == 0) for i in range(200)] for _ in range(2))
    for i in range(1, 120, 4):
        after[i] = 1.0
    vector = steered_by()
    write_results(root / "baseline", {"arc_challenge": before})
    write_results(root / "steered" / "arc", {"arc_challenge": after}, vector=vector)
    bare: dict[str, Any] = {"aft": {"answer_only": True}}
    write_results(root / "answer-only" / "baseline", {"arc_challenge": before}, **bare)
    gained = after if bare_gain else before
    write_results(root / "answer-only" / "arc", {"arc_challenge": gained}, vector=vector, **bare)
    return root


@pytest.mark.parametrize("bare_gain", [False, True])
def test_report_in_every_format(bare_gain: bool, tmp_path: Path) -> None:
    root = outcomes(tmp_path / "r", bare_gain)
    result = call("report", root, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    (pair,) = json.loads((tmp_path / "out/report.json").read_text())["answer_only"]
    assert pair["without_question"]["difference"] == pytest.approx(0.15 if bare_gain else 0.0)
    assert ("100% of the ordinary one survives" in pair["meaning"]) is bare_gain
    lines = list(csv.DictReader((tmp_path / "out/report.csv").read_text().splitlines()))
    assert [(line["run"], line["kind"], line["verdict"]) for line in lines] == [
        ("steered/arc", "steered", "better"),
        ("answer-only/arc", "answer-only", ""),
    ]
    (shown,) = (formatting.answer_only_cells(each) for each in compare(root).answer_only)
    page = html.unescape(re.sub(r"<[^>]+>", " ", (tmp_path / "out/report.html").read_text()))
    markdown = (tmp_path / "out/report.md").read_text()
    assert f"| {' | '.join(shown)} |" in markdown
    for text in (*shown, pair["meaning"]):
        assert text in page
        assert text in markdown
    assert pair["meaning"] in result.output


def test_report_refuses_what_does_not_belong_together(tmp_path: Path) -> None:
    root = outcomes(tmp_path / "r", True)
    bare: dict[str, Any] = {"aft": {"answer_only": True}, "config": {"limit": 200}}
    zeros = {"arc_challenge": [0.0] * 200}
    write_results(root / "answer-only" / "baseline", zeros, stamp="2027-01-01T00-00-00.000000", **bare)
    with pytest.raises(AFTError, match=r"cannot stand beside baseline; they differ in: limit"):
        compare(root)
    for file in (root / "answer-only" / "baseline").rglob("*"):
        if file.is_file():
            file.unlink()
    with pytest.raises(AFTError, match="0 answer-only runs of the baseline"):
        compare(root)


def test_meanings(tmp_path: Path) -> None:
    (pair,) = compare(outcomes(tmp_path / "r", True)).answer_only
    gain = pair.with_question
    loss = replace(gain, difference=-0.15, verdict="")
    none = replace(gain, p_value=0.7, verdict="")
    bare = replace(gain, verdict="")

    def said(first: VerdictRow, second: VerdictRow) -> str:
        return meaning(first, second).partition(":")[0]

    assert said(gain, bare) == "A gain of 100% of the ordinary one survives without the question"
    assert said(gain, loss) == "Without the question the vector loses"
    assert said(gain, none) == "Without the question no gain is detectable"
    assert meaning(none, bare).startswith("The vector favours right answers by their style alone")
    assert meaning(loss, none).startswith("There is no gain with the question")
