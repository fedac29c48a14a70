"""Reports of folders that are odd in some way: no verdict that does not hold, none lost, no traceback."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lm_eval_aft import AFTError, SteeringVector
from lm_eval_aft.evaluation.compare import SELECTED
from lm_eval_aft.evaluation.formatting import blocks
from lm_eval_aft.evaluation.render import card_results, update_cards, write_report
from lm_eval_aft.evaluation.report import Report, compare, group_scores
from lm_eval_aft.evaluation.results import read_run
from lm_eval_aft.evaluation.run import plan_runs
from tests.result_folders import digest, steered_by, write_results

TASK = "arc_challenge"
BEFORE = [0.0] * 30 + [1.0] * 30
AFTER = [1.0] * 20 + [0.0] * 10 + [1.0] * 30
NO_CHANGE = [0.0] * 29 + [1.0] * 2 + [1.0] * 28 + [0.0]


def edited(folder: Path, change: Callable[[dict[str, Any]], None], kind: str = "samples_*.jsonl") -> None:
    for path in folder.rglob(kind):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for each in lines:
            change(each)
        path.write_text("".join(json.dumps(each) + "\n" for each in lines))


def two(folder: Path, change: Callable[[dict[str, Any]], None] | None = None, **settings: Any) -> Report:
    before = write_results(folder / "base", {TASK: BEFORE}, **settings)
    after = write_results(folder / "steered", {TASK: AFTER}, vector=steered_by(), **settings)
    for each in (before, after):
        if change is not None:
            edited(each, change)
    return compare(before, after)


def a_vector(folder: Path, **metadata: Any) -> SteeringVector:
    vector = SteeringVector({3: torch.ones(8)}, metadata={"task": TASK, **metadata})
    vector.save(folder)
    return vector


def scored(vector: SteeringVector, path: Path, **arguments: Any) -> dict[str, Any]:
    """What a run of this vector logs, with arguments that replace its own."""
    used = SteeringVector(dict(vector.layers), **arguments)
    logged = steered_by(sha256=used.digest(), **arguments)
    model_args = {"pretrained": "some/model", "vector": str(path), **arguments}
    return {"vector": logged, "config": {"model_args": model_args}}


@pytest.mark.parametrize("arguments", [{}, {"positions": "generated"}, {"coefficient": 0.5}])
def test_a_vector_chosen_on_these_documents_is_known_whatever_replaces_its_own(
    tmp_path: Path, arguments: dict[str, Any]
) -> None:
    chosen_on = digest(json.dumps({"question": "Question 7?"}, indent=2))
    vector = a_vector(tmp_path / "v", splits={"selection_documents": [chosen_on]})
    before = write_results(tmp_path / "base", {TASK: BEFORE})
    after = write_results(tmp_path / "steered", {TASK: AFTER}, **scored(vector, tmp_path / "v", **arguments))
    report = compare(before, after)
    assert [row.verdict for row in report.rows] == [SELECTED]
    assert not [each for each in report.warnings if "no longer" in each]


def test_two_vectors_below_one_folder_are_refused(tmp_path: Path) -> None:
    write_results(tmp_path / "baseline", {"a": BEFORE, "b": BEFORE})
    write_results(tmp_path / "steered", {"a": AFTER}, vector=steered_by(sha256="1" * 64))
    other = steered_by(sha256="2" * 64, biased=True)
    write_results(tmp_path / "steered", {"b": AFTER}, vector=other, stamp="2026-01-02T00-00-00.000000")
    with pytest.raises(AFTError, match="steered holds runs of 2 different models or vectors"):
        compare(tmp_path)


def test_runs_that_would_share_a_name_are_numbered(tmp_path: Path) -> None:
    write_results(tmp_path / "one", {TASK: BEFORE})
    for name, sha, biased in (("two", "1", False), ("three", "2", True)):
        write_results(tmp_path / name, {TASK: AFTER}, vector=steered_by(sha256=sha * 64, biased=biased))
    report = compare(tmp_path)
    assert sorted(row.run for row in report.rows) == ["steered/arc", "steered/arc-2"]
    assert sorted(row.verdict for row in report.rows) == ["better", SELECTED]


def test_one_digest_with_two_outcomes_is_two_comparisons(tmp_path: Path) -> None:
    write_results(tmp_path / "baseline", {TASK: BEFORE})
    for name, outcomes in (("a", AFTER), ("b", NO_CHANGE)):
        write_results(tmp_path / "steered" / name, {TASK: outcomes}, vector=steered_by())
    report = compare(tmp_path)
    assert report.family == 2
    assert [row.verdict for row in report.rows] == ["better", "no detectable difference"]


def test_a_placebo_is_one_whatever_its_folder_is_called(tmp_path: Path) -> None:
    base = write_results(tmp_path / "baseline", {TASK: BEFORE})
    arc = write_results(tmp_path / "steered" / "arc", {TASK: AFTER}, vector=steered_by())
    control = steered_by(sha256="9" * 64, control="shuffled")
    placebo = write_results(tmp_path / "steered" / "shuffled", {TASK: AFTER}, vector=control)
    for report in (compare(tmp_path), compare(base, arc, placebo)):
        assert report.family == 1
        assert [(row.kind, row.verdict) for row in report.rows] == [("steered", "better"), ("placebo", "")]


@pytest.mark.parametrize("document", [0, 5])
def test_a_score_that_is_no_number_is_told_and_the_next_metric_taken(tmp_path: Path, document: int) -> None:
    def spoil(sample: dict[str, Any]) -> None:
        if sample["doc_id"] == document:
            sample["acc_norm"] = math.nan

    report = two(tmp_path, spoil, metric="acc_norm", others={TASK: {"acc": BEFORE}})
    assert [(row.metric, row.verdict) for row in report.rows if row.primary] == [
        ("acc", "no detectable difference")
    ]
    assert "steered: acc_norm of arc_challenge is no finite number for 2 answers; the verdict is on acc." in (
        report.warnings
    )


def test_nothing_but_nan_is_told_too(tmp_path: Path) -> None:
    def spoil(sample: dict[str, Any]) -> None:
        if sample["doc_id"] < 2:
            sample["acc_norm"] = math.nan

    write_results(tmp_path / "baseline", {TASK: BEFORE, "other": BEFORE}, metric="acc_norm")
    write_results(tmp_path / "steered", {TASK: AFTER, "other": AFTER}, metric="acc_norm", vector=steered_by())
    for path in tmp_path.rglob(f"samples_{TASK}_*"):
        edited(path.parent, spoil, path.name)
    report = compare(tmp_path)
    assert [row.task for row in report.rows] == ["other"]
    assert any("acc_norm of arc_challenge" in each and "no verdict" in each for each in report.warnings)


def test_cards_get_nothing_of_what_cannot_be_assessed(tmp_path: Path) -> None:
    vector = a_vector(tmp_path / "v")
    before = write_results(tmp_path / "base", {TASK: BEFORE}, others={TASK: {"f": BEFORE}})
    own = scored(vector, tmp_path / "v")
    own["vector"]["biased"] = True
    after = write_results(tmp_path / "biased", {TASK: AFTER}, others={TASK: {"f": AFTER}}, **own)
    report = compare(before, after)
    assert {row.primary for row in report.rows} == {True, False}
    assert card_results(report, "biased") == []
    bare = [
        write_results(tmp_path / name, {TASK: values}, aft={"answer_only": True}, **settings)
        for name, values, settings in (("b", BEFORE, {}), ("s", AFTER, scored(vector, tmp_path / "v")))
    ]
    assert card_results(compare(*bare), "s") == []
    before = write_results(tmp_path / "plain base", {TASK: BEFORE})
    other = write_results(
        tmp_path / "other", {TASK: AFTER}, **scored(vector, tmp_path / "v", coefficient=-10.0)
    )
    with pytest.raises(AFTError, match="No vector of these runs"):
        update_cards(compare(before, other))
    plain = write_results(tmp_path / "plain", {TASK: AFTER}, **scored(vector, tmp_path / "v"))
    assert len(card_results(compare(before, plain), "plain")) == 1


def leaderboard(folder: Path, **settings: Any) -> dict[str, Any]:
    before = write_results(folder / "b", {TASK: BEFORE}, metric="acc_norm", shots=25, **settings)
    after = write_results(
        folder / "s", {TASK: AFTER}, metric="acc_norm", shots=25, vector=steered_by(), **settings
    )
    return next(row for row in compare(before, after).leaderboard if row["task"] == TASK)


def test_leaderboard_settings_are_those_of_all_documents_with_their_questions(tmp_path: Path) -> None:
    assert leaderboard(tmp_path / "0")["same_settings"]
    for name, settings, words in (
        ("1", {"aft": {"answer_only": True}}, "scored without the questions"),
        ("2", {"top": {"n-samples": {}}, "config": {"limit": 60.0}}, "limit 60"),
        ("3", {"top": {"n-samples": {TASK: {"original": 1172, "effective": 1172}}}}, "60 of 1172 documents"),
    ):
        row = leaderboard(tmp_path / name, **settings)
        assert words in row["deviations"], row
        assert not row["same_settings"]


def test_commands_keep_each_tasks_shots_and_how_examples_were_put(tmp_path: Path) -> None:
    top = {"n-shot": {"a": 0, "b": 5}, "chat_template_sha": "x", "fewshot_as_multiturn": False}
    before = write_results(tmp_path / "b", {"a": BEFORE, "b": BEFORE}, top=top)
    after = write_results(tmp_path / "s", {"a": AFTER, "b": AFTER}, vector=steered_by(), top=top)
    first = compare(before, after).commands[0]["commands"]
    assert [
        f"--tasks {task} --num_fewshot {n}" in each for task, n, each in zip("ab", "05", first, strict=True)
    ]
    assert all("--apply_chat_template --fewshot_as_multiturn false" in each for each in first)


def test_another_models_name_is_told_where_no_fingerprint_says_it(tmp_path: Path) -> None:
    before = write_results(
        tmp_path / "b", {TASK: BEFORE}, config={"model": "hf"}, aft={"fingerprint": None},
        top={"model_name": "other/model"},
    )  # fmt: skip
    after = write_results(tmp_path / "s", {TASK: AFTER}, vector=steered_by())
    assert any("some/model, the baseline's other/model" in each for each in compare(before, after).warnings)


def test_the_tasks_own_list_says_which_way_is_better(tmp_path: Path) -> None:
    listed = {"metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": False}]}
    report = two(tmp_path, task_config=listed, top={"higher_is_better": {}})
    assert [(row.verdict, row.wins, row.losses) for row in report.rows] == [("worse", 0, 20)]


def test_group_scores_of_several_calls(tmp_path: Path) -> None:
    def group(score: float) -> dict[str, Any]:
        return {"groups": {"g": {"acc,none": score}}, "group_subtasks": {"g": ["h"], "h": ["a", "b"]}}

    for name, vector, values in (("b", None, BEFORE), ("s", steered_by(), AFTER)):
        write_results(tmp_path / name, {"a": values, "b": values}, vector=vector, top=group(0.5))
        write_results(tmp_path / name, {"c": values}, vector=vector, stamp="2026-01-02T00-00-00.000000")
    runs = [read_run(tmp_path / name, name) for name in ("b", "s")]
    assert [each["task"] for each in group_scores(runs[0], runs[1:])] == ["g"]
    # One of the group's tasks is scored again: lm-eval's score of the group is of the old answers.
    write_results(tmp_path / "s", {"b": BEFORE}, vector=steered_by(), stamp="2026-01-03T00-00-00.000000")
    assert group_scores(runs[0], [read_run(tmp_path / "s", "s")]) == []


def test_rows_on_other_documents_do_not_stand_under_a_baseline_of_theirs(tmp_path: Path) -> None:
    base = write_results(tmp_path / "b", {TASK: BEFORE})
    whole = write_results(tmp_path / "s", {TASK: AFTER}, vector=steered_by())
    part = write_results(tmp_path / "t", {TASK: AFTER[:20]}, vector=steered_by(sha256="2" * 64))
    report = compare(base, whole, part, force=True)
    assert [(first.n, first.baseline, len(rows)) for first, rows in blocks(report.rows)] == [
        (60, 0.5, 1), (20, 0.0, 1),
    ]  # fmt: skip


def as_list(sample: dict[str, Any]) -> None:
    sample["arguments"] = [list(each.values()) for each in sample["arguments"].values()]


def squared(sample: dict[str, Any]) -> None:
    sample["target"] = "²"


def half_a_pair(sample: dict[str, Any]) -> None:
    sample["arguments"]["gen_args_0"]["arg_0"] += "\ud83d"


@pytest.mark.parametrize("change", [as_list, squared, half_a_pair])
def test_samples_that_are_odd_are_told_all_the_same(
    tmp_path: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    report = two(tmp_path, change)
    assert [row.verdict for row in report.rows] == ["better"]
    written = write_report(report, tmp_path / "report")
    assert all(path.read_text() for path in written)


def test_metrics_with_documents_of_their_own(tmp_path: Path) -> None:
    """lm-eval counts the documents of the metric that has most: a lower bound."""

    def less(results: dict[str, Any]) -> None:
        results["results"][TASK]["sample_len"] = 40

    before = write_results(tmp_path / "b", {TASK: BEFORE})
    after = write_results(tmp_path / "s", {TASK: AFTER}, vector=steered_by())
    for each in (before, after):
        edited(each, less, "results_*.json")
    assert [row.n for row in compare(before, after).rows] == [60]


def test_numbers_as_text_are_the_same_numbers(tmp_path: Path) -> None:
    before = write_results(tmp_path / "b", {TASK: BEFORE}, config={"gen_kwargs": "temperature=0,top_p=0.9"})
    own = {"gen_kwargs": {"temperature": 0, "top_p": 0.9}}
    own["model_args"] = {"pretrained": "some/model", "vector": "arc"}
    after = write_results(tmp_path / "s", {TASK: AFTER}, vector=steered_by(), config=own)
    assert [row.verdict for row in compare(before, after).rows] == ["better"]


def test_finalists_whose_names_would_collide(tmp_path: Path) -> None:
    for name in ("arc", "arc-seed-0"):
        a_vector(tmp_path / name)
        (tmp_path / name / "seeds").mkdir()
        SteeringVector({3: torch.ones(8)}).save(tmp_path / name / "seeds" / "seed-0.safetensors")
    runs = plan_runs([str(tmp_path / "arc-seed-0"), str(tmp_path / "arc")], all_seeds=True)
    assert len({run.name for run in runs}) == len(runs) == 5


def test_names_in_brackets_are_printed_whole(capsys: pytest.CaptureFixture[str]) -> None:
    from lm_eval_aft.cli.options import print_table

    print_table("A [title]", ("run",), [["arc[v1]"]])
    shown = capsys.readouterr().out
    assert "A [title]" in shown
    assert "arc[v1]" in shown


@pytest.mark.parametrize("odd", [None, 3, "x", ["x"], {"x": ["y"]}, float("nan")])
def test_odd_entries_beside_the_scores(tmp_path: Path, odd: Any) -> None:
    """What only notes, causes and printed commands read may be anything: the verdicts stand."""
    aft: dict[str, Any] = {"asked": odd, "not_finite": odd if not isinstance(odd, dict) else None}
    for name, score, vector in (("a", 0.0, None), ("b", 1.0, steered_by(coefficient=odd))):
        write_results(
            tmp_path / name, {TASK: [score] * 30}, aft=aft, vector=vector, task_config={"metadata": odd}
        )
    report = compare(tmp_path / "a", tmp_path / "b")
    assert report.rows[0].verdict == "better"
    assert report.commands[0]["commands"][0].startswith("lm_eval --model aft")
    (samples,) = (tmp_path / "b").rglob("samples_*.jsonl")
    samples.write_text(samples.read_text().replace('"-1.0"', '"nan"'))
    assert compare(tmp_path / "a", tmp_path / "b").rows == []
