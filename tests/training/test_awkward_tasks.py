"""Awkward tasks and arguments: trained by what is reported, dropped and counted, or refused."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from lm_eval_aft import AFTError, SteeringVector, train_vector
from lm_eval_aft.cli.evaluate import evaluate
from lm_eval_aft.cli.options import parse_model_args
from lm_eval_aft.cli.train import train_vector as command
from lm_eval_aft.harness.examples import Extractor, PromptSettings, encode
from lm_eval_aft.harness.tasks import load_task
from lm_eval_aft.lm import AFTLM
from lm_eval_aft.steering.intervention import Intervention
from lm_eval_aft.training.candidate import Candidate, Recipe
from lm_eval_aft.training.objectives import make_objective
from lm_eval_aft.training.recipe import TrainingPlan
from lm_eval_aft.training.selection import CRITERIA, Score, find_criterion, register_criterion
from lm_eval_aft.training.setup import load_model, prepare
from lm_eval_aft.training.sweep import calibrate
from lm_eval_aft.training.trainer import Reference
from tests.conftest import tiny_model, tiny_tokenizer, toy_documents

CHOICE = (
    'doc_to_target: gold\ndoc_to_choice: choices\noutput_type: multiple_choice\ndoc_to_text: "{{question}}"\n'
)
PLAN: dict[str, Any] = {
    "protocol": "rapid", "layers": "1", "epochs": 1, "train_docs": 12, "selection_docs": 10, "batch_size": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def lm(checkpoint: str) -> AFTLM:
    return AFTLM(checkpoint, device="cpu", batch_size=4)


def a_task(folder: Path, yaml: str, train: list[dict[str, Any]] | None = None, code: str = "") -> tuple[str]:
    """A task `own` with toy documents."""
    folder.mkdir(exist_ok=True)
    files = {}
    for split, documents in {"train": train or toy_documents(40), "test": toy_documents(9, 200)}.items():
        files[split] = str(folder / f"{split}.jsonl")
        Path(files[split]).write_text("".join(json.dumps(each) + "\n" for each in documents))
    (folder / "own.yaml").write_text(
        f"task: own\ndataset_path: json\ndataset_kwargs: {{data_files: {json.dumps(files)}}}\n"
        f"training_split: train\ntest_split: test\n{yaml}"
    )
    (folder / "utils.py").write_text(code)
    return (str(folder),)


def reporting(*metrics: str) -> str:
    how = {"aggregation": "mean", "higher_is_better": True}
    return f"metric_list: {json.dumps([{'metric': name, **how} for name in metrics])}\n"


# Texts of which nothing is left, and gold answers that are none.

GOOD = toy_documents(30)
ODD: dict[str, dict[str, Any]] = {
    "blank question": {"question": "  "},
    "empty question": {"question": ""},
    "one option": {"choices": ["the red cat"], "gold": 0},
    "gold out of range": {"gold": 9},
    "negative gold": {"gold": -1},
    "no gold": {"gold": None},
    "no options": {"choices": []},
}
# Scored by lm-eval as they are, and so trained on.
EVEN: dict[str, dict[str, Any]] = {
    "options alike": {"choices": ["the cat", "the cat", "the dog", "the fish"]},
    "all options alike": {"choices": ["the cat"] * 4},
}


@pytest.mark.parametrize("kind", [*ODD, *EVEN])
def test_odd_documents_are_dropped_and_counted_or_kept(kind: str, lm: AFTLM, tmp_path: Path) -> None:
    odd = {**toy_documents(1, start=100)[0], **(ODD | EVEN)[kind]}
    include = a_task(tmp_path, CHOICE, [*GOOD, odd])
    extractor = Extractor(load_task("own", include), lm, PromptSettings())
    example = extractor.example(odd, 30)
    # The tiny tokenizer has no token for a blank, so nothing would be left before the options.
    assert (example is None) == (kind in ODD and kind != "empty question")
    if example is not None:
        (document,) = encode([example], lm)
        assert all(head and tail for head, tail in document.pairs)
        return
    plan = {**PLAN, "train_docs": 16, "selection_docs": 15}
    prepared = prepare(lm, TrainingPlan.of("own", include_path=include, **plan))
    kept = [*prepared.splits.selection, *prepared.splits.train(0)]
    assert len(kept) == 30
    assert prepared.splits.counts["unusable"] == 1
    assert odd["question"] not in [each.doc["question"] for each in kept]


def test_a_blank_answer_to_generate_is_dropped(lm: AFTLM, tmp_path: Path) -> None:
    yaml = 'output_type: generate_until\ndoc_to_text: "{{question}}"\ndoc_to_target: answer\n'
    yaml += "generation_kwargs: {until: [x], max_gen_toks: 4}\n"
    include = a_task(tmp_path, yaml)
    extractor = Extractor(load_task("own", include), lm, PromptSettings())
    assert extractor.example({**GOOD[0], "answer": " \n"}, 0) is None
    assert extractor.example(GOOD[0], 0) is not None


def test_a_document_that_its_template_fails_on_is_dropped_and_told(
    lm: AFTLM, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    yaml = CHOICE.replace('doc_to_text: "{{question}}"', "doc_to_text: !function utils.text")
    code = "def text(doc):\n    return doc['question'] if 'bad' not in doc['question'] else {}['gone']\n"
    lost = [{**each, "question": f"bad {i}"} for i, each in enumerate(toy_documents(2, start=100))]
    include = a_task(tmp_path / "some", yaml, [*GOOD, *lost], code)
    plan = {**PLAN, "train_docs": 1, "selection_docs": 31}
    prepared = prepare(lm, TrainingPlan.of("own", include_path=include, **plan))
    assert prepared.splits.counts["unusable"] >= 1
    assert (
        "left out whose prompts cannot be built: lm-eval cannot build a prompt of 'own': KeyE" in caplog.text
    )
    include = a_task(
        tmp_path / "all", yaml, [{**each, "question": f"bad {i}"} for i, each in enumerate(GOOD)], code
    )
    with pytest.raises(AFTError, match="lm-eval cannot build a prompt of 'own': KeyError"):
        prepare(lm, TrainingPlan.of("own", include_path=include, **PLAN))


# What a task reports.


def test_acc_bytes_is_trained_where_it_is_reported(lm: AFTLM, tmp_path: Path) -> None:
    documents = [{**each, "choices": ["éé é", *each["choices"][1:]]} for each in toy_documents(40)]
    include = a_task(tmp_path, CHOICE + reporting("acc_bytes"), documents)
    prepared = prepare(lm, TrainingPlan.of("own", include_path=include, **PLAN))
    assert (prepared.objective.metric, prepared.objective.note) == ("acc_bytes", "")
    example = prepared.splits.selection[0]
    assert example.lengths == tuple(float(len(text.encode())) for text in example.doc["choices"])
    # Lm-eval's own marks, from the same log-likelihoods.
    batch = prepared.splits.selection
    score = Reference(lm.model, prepared.backbone, prepared.objective).baseline(
        encode(batch, lm), lambda _: None
    )
    task = prepared.parts[0].splits.extractor.task
    marks = []
    for each in batch:
        requests = prepared.parts[0].splits.extractor.requests(each.doc)
        answers = [lm.loglikelihood([_instance(args)])[0] for args in requests]
        marks.append(task.process_results(each.doc, answers)["acc_bytes"])
    assert score.accuracy == pytest.approx(sum(marks) / len(marks))


def _instance(args: Any) -> Any:
    from lm_eval.api.instance import Instance

    return Instance("loglikelihood", {}, args, 0)


@pytest.mark.parametrize(
    ("reported", "metric", "noted"),
    [
        (("acc",), "acc", False),
        (("acc", "acc_norm"), "acc_norm", False),
        (("acc_bytes", "acc"), "acc", False),
        (("brier_score",), "acc", True),
        (("acc_mutual_info",), "acc", True),
        (("exact_match",), "acc", True),
        (("acc", "brier_score"), "acc", False),
    ],
)
def test_what_is_not_reported_is_told(
    reported: tuple[str, ...], metric: str, noted: bool, lm: AFTLM, tmp_path: Path
) -> None:
    include = a_task(tmp_path, CHOICE + reporting(*reported))
    prepared = prepare(lm, TrainingPlan.of("own", include_path=include, **PLAN))
    assert prepared.objective.metric == metric
    assert bool(prepared.objective.note) == noted
    assert prepared.summary().get("note", "") == prepared.objective.note
    assert not noted or f"reports {reported[0]}" in prepared.objective.note


def test_scores_computed_by_the_task_itself_are_told_everywhere(
    lm: AFTLM, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    code = "def results(doc, res):\n    return {'acc': 1.0, 'margin': 0.5}\n"
    yaml = CHOICE + "process_results: !function utils.results\n" + reporting("acc", "margin")
    include = a_task(tmp_path / "t", yaml, code=code)
    result = train_vector(lm, "own", tmp_path / "out", include_path=include, progress=False, **PLAN)
    note = "The task 'own' reports acc, margin, computed by code of its own (process_results)."
    assert note in caplog.text
    assert result.vector.metadata["metric_note"].startswith(note)
    assert note in (tmp_path / "out" / "README.md").read_text()
    lines = map(json.loads, (tmp_path / "out" / "training.jsonl").read_text().splitlines())
    assert [line["note"].startswith(note) for line in lines if line["event"] == "baseline"] == [True]


# Arguments.


@pytest.mark.parametrize("name", ["vector", "coefficient", "answer_only", "library", "route", "positions"])
def test_arguments_that_would_change_what_is_trained_are_refused(name: str, checkpoint: str) -> None:
    with pytest.raises(AFTError, match=f"model argument {name}= has no place here: a vector is trained"):
        load_model(checkpoint, {name: "1"})


def test_a_model_that_is_steered_already_is_refused(checkpoint: str) -> None:
    lm = AFTLM(checkpoint, device="cpu", vector=SteeringVector({1: torch.ones(32)}), allow_mismatch=True)
    with pytest.raises(AFTError, match="The model is steered"):
        load_model(lm)
    lm.steer(None)
    assert load_model(lm) is lm


def test_thinking_is_refused_where_nothing_is_generated(lm: AFTLM, tmp_path: Path) -> None:
    include = a_task(tmp_path, CHOICE)
    lm.enable_thinking = True
    try:
        with pytest.raises(AFTError, match="enable_thinking=true is for tasks that generate, and own"):
            prepare(lm, TrainingPlan.of("own", include_path=include, **PLAN))
    finally:
        lm.enable_thinking = None


def test_patterns_and_metadata_reach_training_and_the_printed_command(
    checkpoint: str, tmp_path: Path
) -> None:
    code = (
        "import datasets, json\nfrom pathlib import Path\n\n"
        "def sized(size, pretrained, **metadata):\n"
        "    rows = [json.loads(line) for line in (Path(__file__).parent / 'train.jsonl').open()]\n"
        "    assert pretrained\n"
        "    parts = {'train': rows[:size], 'test': rows[30:]}\n"
        "    return {name: datasets.Dataset.from_list(part) for name, part in parts.items()}\n"
    )
    folder = tmp_path / "t"
    a_task(folder, CHOICE, code=code)
    made = "task: own_made\ncustom_dataset: !function utils.sized\ntraining_split: train\ntest_split: test\n"
    (folder / "own_made.yaml").write_text(made + CHOICE)
    words = ["--model", checkpoint, "--task", "own_made", "--include-path", str(folder), "--device", "cpu"]
    words += ["--protocol", "rapid", "--layers", "1", "--epochs", "1", "--dtype", "float32"]
    words += ["--train-docs", "8", "--selection-docs", "8", "--output", str(tmp_path / "out")]
    words += ["--num-fewshot", "1", "--system-instruction", "Be brief, please.", "--metadata", "size=20"]
    words += ["--model-args", "max_length=64"]
    found = CliRunner().invoke(command, words, catch_exceptions=False)
    assert found.exit_code == 0, found.output
    meta = SteeringVector.load(tmp_path / "out").metadata
    assert meta["splits"]["split"] == 20
    printed = shlex.split(found.output.strip().splitlines()[-1])
    assert printed[:2] == ["aft", "eval"]
    options = evaluate.make_context("eval", printed[2:]).params
    assert parse_model_args(options["model_args"]) == {"dtype": "float32", "max_length": 64}
    assert options["tasks"] == "own_made"
    assert list(options["flags"]) == [
        *("--num_fewshot", "1", "--system_instruction", "Be brief, please.", "--include_path", str(folder)),
        *("--metadata", '{"size": 20}'),
    ]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "max_length=64,dtype=float32,vector=FOLDER --tasks own_made --num_fewshot 1" in card


def test_a_group_is_trained_as_a_mixture(lm: AFTLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.tasks import TaskManager

    from lm_eval_aft.harness import tasks

    def index(include: Sequence[str], metadata: Any = None) -> TaskManager:
        return TaskManager(include_path=list(map(str, include)), include_defaults=False, metadata=metadata)

    monkeypatch.setattr(tasks, "full_index", index)  # without lm-eval's own, which take ten seconds
    folder = tmp_path / "t"
    include = a_task(folder, CHOICE)
    text = (folder / "own.yaml").read_text()
    (folder / "other.yaml").write_text(text.replace("task: own", "task: other"))
    (folder / "group.yaml").write_text("group: both\ntask: [own, other]\n")
    prepared = prepare(lm, TrainingPlan.of("both", include_path=include, **PLAN))
    assert [part.name for part in prepared.parts] == ["own", "other"]
    assert prepared.summary()["task"] == "own,other"


# Scores that are no numbers.


def test_no_criterion_takes_what_is_not_finite_for_the_best() -> None:
    good = Score(1.0, 1.0, 0.5, 1.0, 10)
    bad = [replace(good, score=value) for value in (math.nan, math.inf, -math.inf)]
    for criterion in CRITERIA.values():
        for each in bad:
            assert criterion.best([each, good, each]) is good
            assert not criterion.improves(each, on=good)
            assert not criterion.change(each, good) < 0
            assert criterion.coefficient({0.0: good, 1.0: each}) == 0.0
    try:
        own = register_criterion("own")(lambda score: (-score.score,))
        assert own.best([*bad, good]) is good
        assert find_criterion("own") is own
    finally:
        CRITERIA.pop("own", None)


class Overflowing:
    """An engine whose model overflows above a coefficient."""

    def __init__(self, above: float) -> None:
        self.above = above

    def evaluate(self, candidates: Sequence[Candidate], documents: Any, tick: Any) -> list[Score]:
        def score(coefficient: float) -> float:
            return math.nan if coefficient > self.above else 1.0 - 0.1 * coefficient

        return [Score(score(c.intervention.coefficient), 1.0, 0.5, 1.0, 4) for c in candidates]


def test_calibration_leaves_out_what_is_not_finite() -> None:
    candidate = Candidate(1, 0, Recipe(), Intervention.static(1, torch.zeros(4)))
    baseline = Score(1.0, 1.0, 0.5, 1.0, 4)
    candidate.record(replace(baseline, score=0.9))
    found = calibrate(Overflowing(2.2), candidate, baseline, [], None, lambda _: None)  # type: ignore[arg-type]
    assert found.coefficient == 2.0
    assert all(math.isfinite(score.score) for score in found.curve.values())
    with pytest.raises(AFTError, match="no finite score at any coefficient"):
        calibrate(Overflowing(0.0), candidate, baseline, [], None, lambda _: None)  # type: ignore[arg-type]


def test_each_metric_of_choices_has_its_default() -> None:
    assert make_objective("choice", None, ["acc_bytes"]).metric == "acc_bytes"
    assert make_objective("choice", "both", ["acc_bytes"]).metrics == ("acc", "acc_norm")


def test_a_screen_of_two_layers_has_no_rank_correlation(lm: AFTLM, tmp_path: Path) -> None:
    plan = {**PLAN, "layers": "0,1", "screen": "order"}
    include = a_task(tmp_path / "t", CHOICE)
    result = train_vector(lm, "own", tmp_path / "out", include_path=include, progress=False, **plan)
    kept = SteeringVector.load(tmp_path / "out").metadata["protocol"]["screen_result"]
    assert result.screen == kept
    assert sorted(kept["order"]) == [0, 1]
    assert "rank_correlation" not in kept


def test_criteria_are_listed_and_given_by_name(checkpoint: str, tmp_path: Path) -> None:
    words = ["--model", checkpoint, "--task", "own", "--include-path", *a_task(tmp_path, CHOICE), "--dry-run"]
    told = CliRunner().invoke(command, ["--help"]).output
    assert f"Whatmakesonecandidatebetter:{','.join(CRITERIA)}" in "".join(told.split())
    found = CliRunner().invoke(command, [*words, "--criterion", "magic"])
    assert found.exit_code == 1
    assert f"There is no criterion 'magic'.\nChoose one of: {', '.join(CRITERIA)}." in found.output
