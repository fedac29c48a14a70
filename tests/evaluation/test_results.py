"""Reading result folders, joining them, and refusing what cannot be compared."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from lm_eval_aft._util.errors import AFTError
from lm_eval_aft.evaluation.compare import compare_runs, differences, primary_metric
from lm_eval_aft.evaluation.render import to_html
from lm_eval_aft.evaluation.report import build_report, compare
from lm_eval_aft.evaluation.results import discover, read_run
from tests.result_folders import STAMP, steered_by, write_results

ZEROS, ONES = [0.0] * 20, [0.0] * 10 + [1.0] * 10
TASK = "arc_challenge"


def pair(tmp_path: Path, first: dict[str, Any], second: dict[str, Any]) -> tuple[Path, Path]:
    outcomes = {TASK: ONES}
    before = write_results(tmp_path / "baseline", first.pop("outcomes", outcomes), **first)
    after = write_results(tmp_path / "steered", second.pop("outcomes", outcomes), **second)
    return before, after


# What differs -> (baseline's settings, steered run's settings, how the refusal names it)
REFUSALS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "task version": ({}, {"version": 2.0}, "task version of arc_challenge (1.0 against 2.0)"),
    "n-shot": ({"shots": 25}, {"shots": 10}, "n-shot of arc_challenge (25 against 10)"),
    "few-shot seed": (
        {"shots": 5},
        {"shots": 5, "config": {"fewshot_seed": 7}},
        "few-shot seed of arc_challenge (1234 against 7)",
    ),
    "prompts": ({}, {"fewshot": "Be careful. "}, "prompts of arc_challenge (20 documents, first 0)"),
    "documents": ({}, {"first_document": 5}, "document contents of arc_challenge (20 documents, first 0)"),
    "targets": ({}, {"target": "1"}, "targets of arc_challenge (20 documents, first 0)"),
    "tokenizer": ({}, {"top": {"tokenizer_eos_token": ["</s>", "2"]}}, "tokenizer ("),
    "vocabulary": ({}, {"aft": {"fingerprint": {"vocabulary": "e" * 64}}}, "tokenizer ("),
    "chat template": ({}, {"top": {"chat_template_sha": "f" * 64}}, "chat template (null against ffff"),
    "system instruction": ({}, {"top": {"system_instruction_sha": "f" * 64}}, "system instruction"),
    "multi-turn": ({}, {"top": {"fewshot_as_multiturn": True}}, "fewshot_as_multiturn (false against true)"),
    "gen_kwargs": ({}, {"config": {"gen_kwargs": {"temperature": 0.7}}}, 'gen_kwargs ({} against {"temp'),
    "generation settings": (
        {"gen_kwargs": {"until": ["\n"], "do_sample": False}},
        {"gen_kwargs": {"until": ["Q:"], "do_sample": False}},
        "generation_kwargs of arc_challenge",
    ),
    "sampling seed": (
        {"gen_kwargs": {"do_sample": True}},
        {"gen_kwargs": {"do_sample": True}, "config": {"torch_seed": 1}},
        "sampling seed of arc_challenge (1234 against 1)",
    ),
    "limit": (
        {"config": {"limit": 20.0}},
        {"config": {"limit": 10.0}, "outcomes": {TASK: ONES[:10]}},
        "limit (20.0 against 10.0)",
    ),
    "dtype": ({}, {"config": {"model_dtype": "torch.bfloat16"}}, "dtype (float32 against bfloat16)"),
    "softmax dtype": ({}, {"aft": {"softmax_dtype": None}}, "softmax dtype (float32 against null)"),
    "maximum length": ({}, {"top": {"max_length": 64}}, "maximum length (128 against 64)"),
    "repeats": ({}, {"task_config": {"repeats": 8}}, "repeats of arc_challenge (1 against 8)"),
    "filters": ({}, {"task_config": {"filter_list": [{"name": "x"}]}}, "filters of arc_challenge"),
}


@pytest.mark.parametrize("field", REFUSALS)
def test_refusals_name_the_field(tmp_path: Path, field: str) -> None:
    first, second, words = REFUSALS[field]
    before, after = pair(tmp_path, dict(first), dict(second))
    with pytest.raises(AFTError) as refusal:
        compare(before, after)
    assert words in refusal.value.what, refusal.value.what
    assert "--force" in refusal.value.hint
    forced = compare(before, after, force=True)
    assert words in forced.banner[0]
    assert {row.verdict for row in forced.rows} == {"not assessable: the runs differ"}
    assert forced.family == 0


def test_a_single_difference_is_named_alone(tmp_path: Path) -> None:
    before, after = pair(tmp_path, {}, {"config": {"model_dtype": "torch.bfloat16"}})
    assert differences(read_run(before), read_run(after)) == ["dtype (float32 against bfloat16)"]


def test_every_difference_is_named(tmp_path: Path) -> None:
    before, after = pair(
        tmp_path,
        {"shots": 5},
        {"shots": 5, "version": 2.0, "fewshot": "x", "config": {"model_dtype": "float16", "fewshot_seed": 1}},
    )
    found = " ".join(differences(read_run(before), read_run(after)))
    for word in ("task version", "few-shot seed", "dtype", "prompts"):
        assert word in found


def test_spellings_are_no_differences(tmp_path: Path) -> None:
    """What other model types log differently but mean alike."""
    before, after = pair(
        tmp_path,
        {},
        {
            "config": {
                "model": "hf",
                "aft": None,
                "model_args": "pretrained=some/model,softmax_dtype=float32",
                "gen_kwargs": None,
                "fewshot_seed": 99,  # 0-shot: nothing is drawn
            },
            "top": {"fewshot_as_multiturn": False},
        },
    )
    assert differences(read_run(before), read_run(after)) == []
    report = compare(before, after)
    assert report.rows[0].verdict == "no detectable difference"
    assert any("what was changed and how it was chosen is not logged" in line for line in report.warnings)


def test_missing_results_and_samples(tmp_path: Path) -> None:
    with pytest.raises(AFTError, match="No lm-eval results below"):
        read_run(tmp_path)
    folder = write_results(tmp_path / "run", {TASK: ONES, "hellaswag": ZEROS})
    (folder / "model" / f"samples_hellaswag_{STAMP}.jsonl").unlink()
    with pytest.raises(AFTError, match="no samples of hellaswag beside it") as refusal:
        read_run(folder)
    assert "--log_samples" in refusal.value.hint
    (folder / "model" / f"results_{STAMP}.json").write_text("[]")
    with pytest.raises(AFTError, match="holds no object"):
        read_run(folder)
    (folder / "model" / f"results_{STAMP}.json").write_text("{}")
    with pytest.raises(AFTError, match="holds no lm-eval results"):
        read_run(folder)


def test_folders_named_after_a_relative_path_and_unfinished_ones(tmp_path: Path) -> None:
    """lm-eval names the folder of ../models/m ..__models__m; what is still being written does not count."""
    for name, outcomes in (("baseline", ZEROS), ("steered/arc", ONES)):
        vector = steered_by() if name != "baseline" else None
        folder = write_results(tmp_path / name, {TASK: outcomes}, vector=vector)
        (folder / "model").rename(folder / "..__models__m")
    shutil.copytree(tmp_path / "baseline", tmp_path / "steered" / ".other.scoring")
    (row,) = compare(tmp_path).rows
    assert row.run == "steered/arc"
    died = tmp_path / "died"
    shutil.copytree(tmp_path / "baseline", died / ".baseline.scoring")
    with pytest.raises(AFTError, match="No lm-eval results below"):
        read_run(died)


def test_a_samples_file_cut_off(tmp_path: Path) -> None:
    """Mid-line: the line is named. Between lines, or swapped: the count or the sum gives it away."""
    folder = write_results(tmp_path / "run", {TASK: ONES})
    file = folder / "model" / f"samples_{TASK}_{STAMP}.jsonl"
    whole = file.read_bytes()
    lines = whole.splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:12]) + lines[12][: len(lines[12]) // 2])
    with pytest.raises(AFTError, match=r"samples_arc_challenge_.*\.jsonl, line 13, is damaged"):
        read_run(folder)
    file.write_bytes(b"".join(lines[:12]))
    with pytest.raises(AFTError, match="holds 12 documents .* counts 20"):
        read_run(folder)
    file.write_bytes(whole.replace(b'"acc": 1.0', b'"acc": 0.0', 1))
    with pytest.raises(AFTError, match=r"averages 0.450000 in acc; .* states 0.500000"):
        read_run(folder)
    file.write_bytes(b"".join([*lines[:19], lines[3]]))
    with pytest.raises(AFTError, match="line 20, repeats document 3"):
        read_run(folder)
    file.write_bytes(b"".join([*lines[:19], b'{"doc_id": 19}\n']))
    with pytest.raises(AFTError, match="line 20, lacks what lm-eval logs"):
        read_run(folder)
    file.write_bytes(b"")
    with pytest.raises(AFTError, match="is empty"):
        read_run(folder)
    file.write_bytes(whole)
    assert len(read_run(folder).tasks[TASK].samples["none"]) == 20


def test_joined_by_document_not_by_line(tmp_path: Path) -> None:
    """A run on several devices logs documents in another order."""
    before, after = pair(tmp_path, {}, {"outcomes": {TASK: ONES[::-1]}})
    file = after / "model" / f"samples_{TASK}_{STAMP}.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    random.Random(0).shuffle(lines)
    file.write_text("".join(lines))
    (row,) = compare(before, after).rows
    assert (row.wins, row.losses, row.n) == (10, 10, 20)
    won = compare(before, after).flips[0]["won"]
    assert [doc["doc_id"] for doc in won] == list(range(10))
    assert won[3]["context"].startswith("Question 3?")


def test_several_runs_in_one_folder(tmp_path: Path) -> None:
    """One model: its tasks join, and of a task scored twice the newest counts. Two models: refused."""
    later = STAMP.replace("2026-01-01", "2026-02-01")
    write_results(tmp_path / "run", {TASK: ZEROS, "gsm8k": ONES})
    write_results(tmp_path / "run", {TASK: ONES}, stamp=later)
    run = read_run(tmp_path / "run")
    assert sorted(run.tasks) == [TASK, "gsm8k"]
    assert sum(s.metrics["acc"] for s in run.tasks[TASK].samples["none"].values()) == 10
    assert run.notes == ("arc_challenge was scored more than once in run: the newest counts.",)
    last = STAMP.replace("2026-01-01", "2026-03-01")
    write_results(tmp_path / "run", {TASK: ONES}, stamp=last, vector=steered_by())
    with pytest.raises(AFTError, match="2 different models or vectors"):
        read_run(tmp_path / "run")
    file = tmp_path / "run" / "model" / f"results_{last}.json"
    assert read_run(file).vector is not None
    # A folder that lm-eval filled with both is a baseline and a steered run.
    runs = discover(tmp_path / "run")
    assert [(run.name, run.kind) for run in runs] == [("baseline", "baseline"), ("steered/arc", "steered")]


def test_results_in_a_file_of_a_name_of_ones_own(tmp_path: Path) -> None:
    """lm_eval --output_path mine.json writes mine_STAMP.json, and the samples beside it."""
    folder = write_results(tmp_path / "run", {"arc": [1.0, 0.0]})
    (results,) = folder.rglob("results_*.json")
    mine = results.rename(results.with_name(results.name.replace("results_", "mine_")))
    for given in (mine, folder):
        assert list(read_run(given).tasks) == ["arc"]


def test_folder_of_aft_eval(tmp_path: Path) -> None:
    write_results(tmp_path / "baseline", {TASK: ZEROS})
    write_results(tmp_path / "steered" / "arc", {TASK: ONES}, vector=steered_by())
    for seed in range(2):
        control = steered_by(control="random", sha256=f"{seed}" * 64)
        write_results(tmp_path / "placebo" / f"arc-random-{seed}", {TASK: ZEROS}, vector=control)
    report = compare(tmp_path)
    assert [(run["name"], run["kind"]) for run in report.runs] == [
        ("baseline", "baseline"),
        ("steered/arc", "steered"),
        ("placebo/arc-random-0", "placebo"),
        ("placebo/arc-random-1", "placebo"),
    ]
    assert [(row.kind, row.family, row.verdict) for row in report.rows] == [
        ("steered", True, "better"),
        ("placebo", False, ""),
        ("placebo", False, ""),
    ]
    with pytest.raises(AFTError, match="should hold one baseline and at least one steered run"):
        discover(tmp_path / "placebo")


def test_primary_metrics_and_holm(tmp_path: Path) -> None:
    """acc_norm decides where a task has it; secondary metrics stand outside Holm's family."""
    others = {TASK: {"acc_norm": [0.0] * 14 + [1.0] * 6}}
    more = {TASK: {"acc_norm": [0.0] * 8 + [1.0] * 12}}
    before, after = pair(
        tmp_path,
        {"outcomes": {TASK: ZEROS, "boolq": [1.0] * 20}, "others": others},
        {"outcomes": {TASK: ONES, "boolq": [1.0] * 13 + [0.0] * 7}, "others": more},
    )
    report = compare(before, after)
    rows = {(row.task, row.metric): row for row in report.rows}
    assert [key for key, row in rows.items() if row.family] == [(TASK, "acc_norm"), ("boolq", "acc")]
    assert report.family == 2
    assert rows[TASK, "acc_norm"].p_value == pytest.approx(2 / 2**6)
    assert rows["boolq", "acc"].p_value == pytest.approx(2 / 2**7)
    assert rows["boolq", "acc"].p_adjusted == pytest.approx(2 * 2 / 2**7)
    assert rows["boolq", "acc"].verdict == "worse"
    assert rows[TASK, "acc_norm"].p_adjusted == pytest.approx(2 / 2**6)
    assert rows[TASK, "acc_norm"].verdict == "better"
    assert rows[TASK, "acc"].p_adjusted is None


def _filtered(folder: Path, scores: dict[str, Sequence[float]], task: str = TASK) -> None:
    """Rewrite a run as lm-eval logs several filters: each document once for every filter."""
    file = folder / "model" / f"samples_{task}_{STAMP}.jsonl"
    documents = [json.loads(line) for line in file.read_text().splitlines()]
    lines = [
        json.dumps(doc | {"filter": name, "acc": column[doc["doc_id"]]})
        for name, column in scores.items()
        for doc in documents
    ]
    file.write_text("\n".join(lines) + "\n")
    results = folder / "model" / f"results_{STAMP}.json"
    content = json.loads(results.read_text())
    content["results"][task] = {f"acc,{name}": sum(c) / len(c) for name, c in scores.items()}
    results.write_text(json.dumps(content).replace('"acc', '"exact_match'))
    file.write_text(file.read_text().replace('"acc"', '"exact_match"'))


def test_several_filters(tmp_path: Path) -> None:
    """Strict matching decides; flexible is shown beside it."""
    before, after = pair(tmp_path, {}, {})
    _filtered(before, {"flexible-extract": ZEROS, "strict-match": ZEROS})
    _filtered(after, {"flexible-extract": ONES, "strict-match": [0.0] * 14 + [1.0] * 6})
    rows = compare(before, after).rows
    assert [(r.filter, r.primary, r.wins) for r in rows] == [
        ("strict-match", True, 6),
        ("flexible-extract", False, 10),
    ]
    assert primary_metric(read_run(before).tasks[TASK]) == ("strict-match", "exact_match")


def test_other_kinds_of_metric(tmp_path: Path) -> None:
    """Lower is better; continuous; means over repeats; corpus-level ones shown without a test."""
    metric_list = [
        {"metric": "loss", "aggregation": "mean", "higher_is_better": False},
        {"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False},
        {"metric": "pass", "aggregation": "mean", "higher_is_better": True},
        {"metric": "f1", "higher_is_better": True},  # lm-eval leaves out what it adds by default
        {"metric": "perplexity", "higher_is_better": False},
    ]
    rng = random.Random(0)
    losses = [rng.uniform(1, 3) for _ in range(40)]
    extra: dict[str, Any] = {"word_perplexity": [[-9.0, 3]] * 40, "pass": [[1.0, 0.0]] * 40}
    extra |= {"f1": [[1, 0]] * 40, "perplexity": [-2.0] * 40}
    settings = {"metric": "loss", "task_config": {"metric_list": metric_list}}
    before, after = pair(
        tmp_path,
        {"outcomes": {"wiki": losses}, "others": {"wiki": extra}, **settings},
        {"outcomes": {"wiki": [x - 0.3 for x in losses]}, "others": {"wiki": extra}, **settings},
    )
    for folder, value in ((before, 20.0), (after, 15.0)):
        file = folder / "model" / f"results_{STAMP}.json"
        content = json.loads(file.read_text())
        content["results"]["wiki"] |= {"word_perplexity,none": value, "perplexity,none": 7.4, "f1,none": 0.3}
        file.write_text(json.dumps(content))
    report = compare(before, after)
    rows = {row.metric: row for row in report.rows}
    assert set(rows) == {"loss", "pass"}
    loss = rows["loss"]
    assert (loss.primary, loss.verdict, loss.wins, loss.losses, loss.share) == (True, "better", 40, 0, False)
    assert (loss.test, loss.interval) == ("sign-flip over documents", "paired bootstrap")
    assert loss.difference == pytest.approx(-0.3)
    assert rows["pass"].baseline == 0.5
    assert sorted((c["metric"], c["baseline"], c["steered"]) for c in report.corpus) == [
        ("f1,none", 0.3, 0.3),
        ("perplexity,none", 7.4, 7.4),
        ("word_perplexity,none", 20.0, 15.0),
    ]


def test_groups_are_shown_without_a_test(tmp_path: Path) -> None:
    group = {"groups": {"mmlu": {"acc,none": 0.25, "acc_stderr,none": 0.1, "alias": "mmlu"}}}
    better = {"groups": {"mmlu": {"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": "mmlu"}}}
    outcomes = {"outcomes": {"mmlu_a": ONES, "mmlu_b": ONES}}
    before, after = pair(tmp_path, {**outcomes, "top": group}, {**outcomes, "top": better})
    report = compare(before, after)
    assert [row.task for row in report.rows] == ["mmlu_a", "mmlu_b"]
    assert report.groups == [
        {"run": "steered", "task": "mmlu", "metric": "acc,none", "baseline": 0.25, "steered": 0.5}
    ]


def test_tasks_the_baseline_lacks(tmp_path: Path) -> None:
    before, after = pair(tmp_path, {}, {"outcomes": {TASK: ONES, "gsm8k": ONES}})
    with pytest.raises(AFTError, match="steered has gsm8k, baseline has not"):
        compare(before, after)
    # The other way round only the shared task is compared.
    assert [row.task for row in compare(after, before).rows] == [TASK]


def test_warnings(tmp_path: Path) -> None:
    before, after = pair(
        tmp_path,
        {"shots": 25, "doc": {"source_id": "wikihow"}, "config": {"use_cache": "x.db", "model": "hf"}},
        {
            "shots": 25,
            "doc": {"source_id": "wikihow"},
            "vector": steered_by(num_fewshot=0),
            "aft": {"fingerprint": {"config": "a", "parameters": "other", "vocabulary": "c" * 64}},
            "top": {"lm_eval_version": "0.5.0"},
        },
    )
    text = " ".join(compare(before, after).warnings)
    for words in (
        "trained on 0-shot prompts of arc_challenge, scored 25-shot",
        "its base model is not the baseline's",
        "lm_eval 0.5.0, baseline 0.4.13",
        "--use_cache, which hf does not key by model",
        "1 source_id value(s): too few or too uneven",
        "No steering vector at arc",
    ):
        assert words in text, text


def test_one_vector_under_two_names_is_one_comparison(tmp_path: Path) -> None:
    """`aft eval --all-seeds` scores the chosen seed twice: Holm counts it once."""
    write_results(tmp_path / "baseline", {TASK: ZEROS})
    for name, sha, right in (("v", "1", 6), ("v-seed-0", "1", 6), ("v-seed-1", "2", 8)):
        outcomes = {TASK: [1.0] * right + [0.0] * (20 - right)}
        write_results(tmp_path / "steered" / name, outcomes, vector=steered_by(sha256=sha * 64))
    report = compare(tmp_path)
    assert report.family == 2
    assert [row.p_adjusted for row in report.rows] == pytest.approx([2 / 2**6, 2 / 2**6, 2 * 2 / 2**8])
    assert [row.verdict for row in report.rows] == ["better"] * 3


def test_biased_vectors_are_not_assessable(tmp_path: Path) -> None:
    """Whatever p: by the run's own word."""
    before, after = pair(tmp_path, {"outcomes": {TASK: ZEROS}}, {"vector": steered_by(biased=True)})
    (row,) = compare(before, after).rows
    assert row.p_value == pytest.approx(2 / 2**10)
    assert (row.verdict, row.p_adjusted) == ("not assessable: selected on these documents", None)


def test_one_run_is_no_comparison(tmp_path: Path) -> None:
    run = read_run(write_results(tmp_path / "run", {TASK: ONES}))
    with pytest.raises(AFTError, match="nothing to compare"):
        build_report([run])
    assert compare_runs(run, run)[0].row.p_value == 1
    with pytest.raises(AFTError, match="given twice"):
        compare(tmp_path / "run", tmp_path / "run")


def _places(value: dict[str, Any], before: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, each in value.items():
        yield (*before, key)
        if isinstance(each, dict):
            yield from _places(each, (*before, key))


def test_damaged_results_files(tmp_path: Path) -> None:
    """Whatever is missing or of the wrong kind: one message, or a report without it; no traceback."""
    before, after = pair(tmp_path, {}, {"vector": steered_by()})
    (file,) = after.rglob("results_*.json")
    whole = file.read_text()
    refused = 0
    for place in list(_places(json.loads(whole))):
        for wrong in (None, 3):
            content = json.loads(whole)
            part = content
            for key in place[:-1]:
                part = part[key]
            part[place[-1]] = wrong
            file.write_text(json.dumps(content))
            try:
                to_html(compare(before, after, force=True))
            except AFTError:
                refused += 1
    assert refused > 10
