"""What a study's report may claim, what its addresses depend on, and what its file may say."""

from __future__ import annotations

import itertools
import json
import os
import types
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.tasks import TaskManager

from lm_eval_aft import AFTError, SteeringVector
from lm_eval_aft.evaluation.compare import VerdictRow
from lm_eval_aft.harness.identity import contents_digest, digest, model_identity, task_identity
from lm_eval_aft.studies import ray, runner
from lm_eval_aft.studies.config import BenchStudy, read_bench_study, read_library_study, require_plain
from lm_eval_aft.studies.jobs import (
    Done,
    Job,
    Schedule,
    Session,
    Store,
    StudyCell,
    StudyLedger,
    _no_round,
    build_cells,
)
from lm_eval_aft.studies.ray import LOSSES
from lm_eval_aft.studies.report import build_study_report, study_tables, summary
from lm_eval_aft.studies.runner import StudyProgress
from lm_eval_aft.studies.train_set import Transfer
from lm_eval_aft.training.setup import check_control, random_like

Outcomes = Callable[[StudyCell], dict[str, Any] | None]
FOUR = "tasks: [{task: aft_demo_choice, name: a, limit: 100}, {task: aft_demo_choice, name: b, limit: 101}, \
{task: aft_demo_choice, name: c, limit: 102}, {task: aft_demo_choice, name: d, limit: 103}]\n"


def outcome(difference: float, *, sha: str, given_up: str = "", task: str = "t") -> dict[str, Any]:
    """A cell that came out so, as the ledger keeps it."""
    row = VerdictRow(
        run="steered", kind="steered", task=task, metric="acc", filter="none", primary=True, family=True,
        higher_is_better=True, share=True, n=1000, baseline=0.5, baseline_stderr=0.01, baseline_low=0.47,
        baseline_high=0.53, steered=0.5 + difference, steered_stderr=0.01, steered_low=0.47,
        steered_high=0.53,
        difference=difference, low=difference - 0.02, high=difference + 0.02, wins=10, losses=5, p_value=0.2,
        p_adjusted=None, verdict="", mde=0.03, test="McNemar", interval="BP", clusters="",
    )  # fmt: skip
    vector = {"sha256": sha, "layers": [2], "pruned": given_up, "selection_change": -0.1}
    return {"rows": [asdict(row)], "vector": vector, "notes": []}


def read(folder: Path, text: str) -> BenchStudy:
    path = folder / "study.yaml"
    path.write_text(text)
    return read_bench_study(path)


def schedule(folder: Path, study: BenchStudy, outcomes: Outcomes) -> Schedule:
    """The study as far as ``outcomes`` knows its cells."""
    store = Store(folder / "out")
    store.root.mkdir()
    (store.root / "ledger.jsonl").touch()
    ledger, cells = StudyLedger(store.root / "ledger.jsonl"), build_cells(study)
    for cell in cells:
        found = outcomes(cell)
        if found is not None:
            ledger.append(event="cell", name=cell.name, key=cell.key, seconds={}, worker="local", **found)
            store.scores(cell.key).mkdir(parents=True)
    return Schedule(cells, store, ledger, prune=study.prune)


def shown(folder: Path, study: BenchStudy, outcomes: Outcomes) -> dict[str, list[list[str]]]:
    report = build_study_report(study, schedule(folder, study, outcomes))
    return {table.title: table.lines for table in study_tables(report)}


def test_a_method_is_not_judged_by_the_pairs_it_did_well_on(tmp_path: Path) -> None:
    """Two pairs gained 5 points with every seed; two lost 6 and were pruned after their first."""
    study = read(
        tmp_path,
        "models: [demo]\n" + FOUR + "methods: [static]\nseeds: 3\nprune: true\nrecipe: {protocol: maximum}\n",
    )

    def outcomes(cell: StudyCell) -> dict[str, Any] | None:
        if cell.task.name in "ab":
            return outcome(0.05, sha=cell.key)
        return outcome(-0.06, sha=cell.key, given_up="no better") if cell.seed == 0 else None

    (line,) = shown(tmp_path, study, outcomes)["Methods"]
    assert line == ["static", "4", "3", "−0.50", "no claim: 2 of them without every seed"]


def test_pairs_without_any_seed_allow_no_claim_either(tmp_path: Path) -> None:
    study = read(
        tmp_path,
        "models: [demo]\n" + FOUR + "methods: [static, caa]\nseeds: 3\nrecipe: {protocol: rapid}\n",
    )

    def outcomes(cell: StudyCell) -> dict[str, Any] | None:
        if cell.method.name == "caa" and cell.task.name == "d":
            return None
        return outcome(0.05 + 0.001 * cell.seed, sha=cell.key) if cell.task.name != "c" else None

    first, second, contrast = shown(tmp_path, study, outcomes)["Methods"]
    assert first[1:] == ["3", "3", "+5.10", "no claim: 1 more without any seed"]
    assert second[1:] == ["2", "3", "+5.10", "no claim: 2 more without any seed"]
    assert contrast[1:] == ["2", "3", "0.00", "no claim: not all of them in both"]


def test_seeds_that_make_one_vector_are_no_seeds(tmp_path: Path) -> None:
    study = read(
        tmp_path,
        "models: [demo]\ntasks: [aft_demo_choice]\nmethods: [caa]\nseeds: 3\nrecipe: {protocol: rapid}\n",
    )
    found = shown(tmp_path, study, lambda _cell: outcome(0.03, sha="same"))
    assert found["Methods"][0][-1] == "no claim: every seed makes the same vector"
    assert "Over seeds" not in found


def test_one_task_with_two_prompts_is_two_tasks_over_seeds(tmp_path: Path) -> None:
    study = read(
        tmp_path,
        "models: [demo]\ntasks: [{name: zero, task: aft_demo_choice, num_fewshot: 0}, {name: five, "
        "task: aft_demo_choice, num_fewshot: 5}]\nmethods: [static]\nseeds: 3\nrecipe: {protocol: rapid}\n",
    )

    def outcomes(cell: StudyCell) -> dict[str, Any]:
        gain = (0.08 if cell.task.name == "zero" else -0.02) + 0.001 * cell.seed
        return outcome(gain, sha=cell.key, task="aft_demo_choice")

    lines = shown(tmp_path, study, outcomes)["Over seeds"]
    assert [line[:4] for line in lines] == [
        ["demo/zero/static", "aft_demo_choice", "3", "+8.10"],
        ["demo/five/static", "aft_demo_choice", "3", "−1.90"],
    ]


def test_one_seed_of_three_does_not_give_a_pair_up(tmp_path: Path) -> None:
    study = read(
        tmp_path,
        "models: [demo]\ntasks: [aft_demo_choice]\nmethods: [static]\nseeds: 3\nrecipe: {protocol: full}\n",
    )

    def outcomes(cell: StudyCell) -> dict[str, Any]:
        return outcome(0.01, sha=cell.key, given_up="no better" if cell.seed == 1 else "")

    (line,) = shown(tmp_path, study, outcomes)["Negative results"]
    assert line[4] == "this method only"


def test_earlier_figures_stand_beside_the_method_that_the_recipe_names(tmp_path: Path) -> None:
    study = read(
        tmp_path,
        "models: [demo]\ntasks: [aft_demo_choice]\nmethods: [{name: plain}]\nearlier: methods\n"
        "recipe: {protocol: rapid, method: mlp}\n",
    )
    assert build_cells(study)[0].plan.method == "mlp"
    ours = {
        line[2]: line[4]
        for line in shown(tmp_path, study, lambda c: outcome(-0.1, sha=c.key))["The earlier study's figures"]
    }
    assert ours["mlp"].startswith("−10.00")
    assert ours["static"] == "–"


class Hands:
    """An executor whose jobs leave empty folders."""

    def run(self, schedule: Schedule, begin: Callable[[Any], None], finish: Callable[[Done], None]) -> None:
        while (job := schedule.take()) is not None:
            begin(job)
            store = schedule.store
            place = store.scores(job.key) if job.kind == "cell" else store.baseline(job.key)
            place.mkdir(parents=True)
            finish(Done(job))


SMALL = "models: [demo]\ntasks: [aft_demo_choice]\nmethods: [static]\nseeds: 2\nrecipe: {protocol: rapid}\n"


def study_of(folder: Path, resume: bool = False) -> list[str]:
    """The states of a small study's cells, its file kept in the folder of its results."""
    path = folder / "study.yaml"
    path.write_text(SMALL)
    report = runner.run_study(
        read_bench_study(path), path, Store(folder / "out"), Hands(), resume=resume, progress=StudyProgress()
    )
    return [f"{cell.state}: {cell.why}" for cell in report.cells]


def test_a_task_without_a_primary_metric_fails_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def assess(cell: StudyCell, _store: Store) -> dict[str, Any]:
        found = outcome(0.1, sha=cell.key)
        found["rows"][0]["primary"] = cell.seed == 1
        return found

    monkeypatch.setattr(runner, "assess", assess)
    first, second = study_of(tmp_path)
    assert "None of the task's metrics" in first
    assert second == "done: "


def test_damaged_scores_are_made_anew_and_kept_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def assess(cell: StudyCell, store: Store) -> dict[str, Any]:
        if cell.seed == 0 and not (store.root / "errors").exists():
            raise AFTError(f"{store.scores(cell.key)}/samples.jsonl, line 4, is damaged.", "Put it right.")
        return outcome(0.1, sha=cell.key)

    monkeypatch.setattr(runner, "assess", assess)
    assert [state.partition(":")[0] for state in study_of(tmp_path)] == ["failed", "done"]
    assert len(list((tmp_path / "out/errors").iterdir())) == 1
    assert study_of(tmp_path, resume=True) == ["done: ", "done: "]


def test_a_study_goes_on_from_the_file_it_keeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "assess", lambda cell, _store: outcome(0.1, sha=cell.key))
    study_of(tmp_path)
    kept = tmp_path / "out/study.yaml"
    report = runner.run_study(read_bench_study(kept), kept, Store(tmp_path / "out"), Hands(), resume=True)
    assert [cell.state for cell in report.cells] == ["done", "done"]


def test_seeds_that_share_their_documents_do_not_narrow_what_documents_do(tmp_path: Path) -> None:
    """Three seeds gained alike; the interval is not narrower than one seed's own over documents."""
    study = read(tmp_path, SMALL.replace("seeds: 2", "seeds: 3"))
    (line,) = shown(tmp_path, study, lambda c: outcome(0.01 + 1e-6 * c.seed, sha=c.key))["Methods"]
    assert line[3:] == ["+1.00", "−1.00 to +3.00"]


def test_an_unfinished_studys_verdicts_are_provisional(tmp_path: Path) -> None:
    study = read(tmp_path, SMALL)
    plan = schedule(tmp_path, study, lambda c: outcome(0.1, sha=c.key) if c.seed == 0 else None)
    assert "provisional: 1 cells are not finished" in summary(build_study_report(study, plan))


def test_placebos_behave_and_are_not_pruned_for_it(tmp_path: Path) -> None:
    study = read(
        tmp_path,
        "models: [demo]\ntasks: [aft_demo_choice]\nmethods: [{name: s, control: shuffled}, caa]\nseeds: 3\n"
        "prune: true\nrecipe: {protocol: maximum}\n",
    )

    def outcomes(cell: StudyCell) -> dict[str, Any] | None:
        return outcome(-0.05, sha=cell.key, given_up="no better") if cell.seed == 0 else None

    states = schedule(tmp_path, study, outcomes).states
    assert [states[f"demo/aft_demo_choice/s/seed-{n}"] for n in range(3)] == ["done", "to do", "to do"]
    assert [states[f"demo/aft_demo_choice/caa/seed-{n}"] for n in range(3)] == ["done", "pruned", "pruned"]


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "scripts/studies").glob("*.yaml")))
def test_every_shipped_studys_controls_fit_its_tasks(path: Path) -> None:
    if path.name == "library.yaml":
        assert read_library_study(path).entries
        return
    study = read_bench_study(path)
    kinds = {"generate_until": "lm"}
    for cell in itertools.product(study.models, study.tasks, study.methods):
        plan = study.plan(*cell, 0)
        found = task_identity(cell[1].task, study.include_path)["config"]
        check_control(plan.control, plan.objective or kinds.get(found["output_type"], "choice"))


def test_each_vector_has_placebos_of_its_own() -> None:
    first, second = (random_like(SteeringVector({1: torch.full((64,), scale)}), 0) for scale in (1.0, 2.0))
    alike = torch.nn.functional.cosine_similarity(first.layers[1], second.layers[1], dim=0)
    assert abs(float(alike)) < 0.6
    again = random_like(SteeringVector({1: torch.full((64,), 1.0)}), 0)
    assert torch.equal(first.layers[1], again.layers[1])


def test_rejection_sampling_without_a_better_round_is_a_negative_result() -> None:
    assert _no_round({"best_round": 0})
    assert not _no_round({"best_round": 2})
    assert not _no_round({})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model's folder with a large file, and a task beside its data."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model/model.safetensors").write_bytes(bytes(range(256)) * 2**16)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/a.jsonl").write_text("{}\n")
    return tmp_path


def test_weights_changed_in_the_middle_are_another_model(folder: Path) -> None:
    place, path = str(folder / "model"), folder / "model/model.safetensors"
    before, stat = model_identity(place, {}), path.stat()
    with path.open("r+b") as stream:
        stream.seek(stat.st_size // 2)
        stream.write(b"other")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert model_identity(place, {}) != before


def test_an_adapter_trained_again_is_another_model(folder: Path) -> None:
    arguments = {"peft": str(folder / "data"), "dtype": "float32"}
    before = model_identity("some/model", arguments)
    (folder / "data/a.jsonl").write_text("{} \n")
    assert model_identity("some/model", arguments) != before


TASK = """task: mine
output_type: multiple_choice
test_split: test
doc_to_text: q
doc_to_target: 0
doc_to_choice: [a, b]
"""


@pytest.mark.parametrize(
    "data",
    [
        {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "DATA/a.jsonl"}}},
        {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": ["DATA/*.jsonl"]}}},
        {"dataset_path": "json", "dataset_kwargs": {"data_dir": "DATA"}},
        {"dataset_path": "DATA"},
    ],
    ids=["file", "pattern", "folder", "path"],
)
def test_a_task_is_its_data_however_that_is_named(folder: Path, data: dict[str, Any]) -> None:
    tasks = folder / "tasks"
    tasks.mkdir()
    told = json.dumps(data).replace("DATA", str(folder / "data"))[1:-1]
    (tasks / "mine.yaml").write_text(
        TASK + "\n".join(f"{k}: {json.dumps(v)}" for k, v in json.loads(f"{{{told}}}").items())
    )
    before = task_identity("mine", [str(tasks)])
    # Neither notes nor results that lie there make it another task.
    (tasks / "README.md").write_text("notes")
    (tasks / "out").mkdir()
    (tasks / "out/ledger.jsonl").touch()
    (tasks / "out/more.json").write_text("{}")
    assert task_identity("mine", [str(tasks)]) == before
    digest = contents_digest("some/model", {}, "mine", [str(tasks)])
    (folder / "data/a.jsonl").write_text('{"other": 1}\n')
    assert task_identity("mine", [str(tasks)]) != before
    assert contents_digest("some/model", {}, "mine", [str(tasks)]) != digest


def _coded(folder: Path) -> Path:
    """A study of a task whose documents, in part, come from Python functions of its own and of a parent's."""
    (folder / "tasks/mine").mkdir(parents=True)
    (folder / "tasks/mine/mine.yaml").write_text(
        TASK + "include: ../base.yaml\nprocess_docs: !function utils.first\ndataset_path: json\n"
    )
    (folder / "tasks/mine/utils.py").write_text("def first(docs):\n    return docs\n")
    (folder / "tasks/base.yaml").write_text("process_results: !function shared.judge\n")
    (folder / "tasks/shared.py").write_text("def judge(doc, results):\n    return {}\n")
    study = folder / "study.yaml"
    study.write_text("models: [demo]\ntasks: [mine, mmlu_pro_math]\ninclude_path: tasks/mine\n")
    return study


def test_a_moved_study_keeps_the_addresses_of_its_cells(tmp_path: Path) -> None:
    before = [cell.key for cell in build_cells(read_bench_study(_coded(tmp_path / "here")))]
    (tmp_path / "here").rename(tmp_path / "there")
    study = read_bench_study(tmp_path / "there/study.yaml")
    assert [cell.key for cell in build_cells(study)] == before
    (tmp_path / "there/tasks/mine/utils.py").write_text("def first(docs):\n    return docs[:1]\n")
    mine, theirs = (cell.key for cell in build_cells(study))
    assert (mine != before[0], theirs) == (True, before[1])
    (tmp_path / "there/tasks/shared.py").write_text("def judge(doc, results):\n    return {'acc': 1}\n")
    assert build_cells(study)[0].key not in (mine, before[0])


def test_addresses_of_0_1_with_the_paths_of_functions_are_known(tmp_path: Path) -> None:
    study = read_bench_study(_coded(tmp_path))
    cells = build_cells(study)
    # As 0.1 made it: the digest of the resolved definition, functions by their absolute paths.
    config = task_identity("mine", study.include_path, absolute=True)["config"]
    assert config["process_docs"] == str(tmp_path / "tasks/mine/utils.first")
    plan = {key: value for key, value in cells[0].plan.to_dict().items() if key != "include_path"}
    about = ["aft-bench/1", model_identity("demo", {})]
    about.append(task_identity("mine", study.include_path, absolute=True))
    vector, baseline = digest([*about, plan]), digest([*about, None, asdict(cells[0].plan.prompts)])
    key = digest([vector, baseline, 0])
    assert key != cells[0].key
    found = build_cells(study, {key: {}})
    assert [(c.key, c.vector_key, c.baseline_key) for c in found[:1]] == [(key, vector, baseline)]
    assert found[1:] == cells[1:]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("models: [{pretrained: demo, model_args: {coefficient: 3}}]", "steer by themselves"),
        ("models: [{pretrained: demo, model_args: {answer_only: 'no'}}]", "answer_only= has no place"),
        (
            "models: [{pretrained: demo, model_args: {fast: 'maybe'}}]",
            r"models\[0\].model_args: fast='maybe' is",
        ),
        ("models: [{pretrained: demo, model_args: {max_length: many}}]", "max_length='many' is not a whole"),
        ("models: [{pretrained: demo, model_args: {trust_remote_cod: 1}}]", "mean trust_remote_code"),
        ("models: [{pretrained: demo, model_args: {pretrained: gpt2}}]", "remove pretrained"),
        ("models: [{pretrained: demo, model_args: {batch_size: 3}}]", "remove batch_size"),
        (
            "models: [{pretrained: demo, apply_chat_template: 'false'}]",
            "apply_chat_template: must be true or false, got 'false'",
        ),
        ("models: [demo]\nseeds: 1\nseeds: 2", "'seeds' occurs twice"),
        ("models: [demo]\nrecipe: {control: shufled}", "no control 'shufled'"),
        ("models: [demo]\nrecipe: {objective: choise}", "no objective 'choise'"),
        ("models: [demo]\nrecipe: {positions: al}", "no positions 'al'"),
        ("models: [demo]\nrecipe: {lr: true}", "lr=True"),
    ],
)
def test_what_a_study_would_pass_over_is_refused(tmp_path: Path, line: str, said: str) -> None:
    with pytest.raises(AFTError, match=said):
        read(tmp_path, f"{line}\ntasks: [aft_demo_choice]\n")


def test_model_arguments_of_a_study_are_what_they_say(tmp_path: Path) -> None:
    study = read(
        tmp_path,
        "models: [{pretrained: demo, model_args: {fast: 'no', max_length: '64', truncation: on}}]\n"
        "tasks: [aft_demo_choice]\n",
    )
    assert study.models[0].model_args == {"fast": False, "max_length": 64, "truncation": True}


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ("x_*", r"'x_\*' is no plain task: .* \(x_group, x_one, x_tag, x_two\)"),
        ("x_group", r"'x_group' is no plain task: .* \(x_one, x_two\)"),
        ("x_tag", r"'x_tag' is no plain task: .* \(x_two\)"),
        ("x_on", r"no harness task 'x_on'"),
        ("x_one,x_two", "names several tasks"),
        ("tasks/one.yaml", "names a file"),
    ],
)
def test_patterns_groups_tags_and_files_are_no_task_of_a_cell(
    tmp_path: Path, task: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "one.yaml").write_text(TASK.replace("mine", "x_one"))
    (tasks / "two.yaml").write_text(TASK.replace("mine", "x_two") + "tag: x_tag\n")
    (tasks / "group.yaml").write_text("group: x_group\ntask: [x_one, x_two]\n")
    monkeypatch.setattr(  # of these tasks alone: all others take ten seconds
        "lm_eval_aft.studies.config.full_index",
        lambda include_path: TaskManager(include_path=list(include_path), include_defaults=False),
    )
    with pytest.raises(AFTError, match=said):
        require_plain([task], [str(tasks)])
    require_plain(["x_one", "x_two"], [str(tasks)])
    if "," not in task and "/" not in task:
        path = tmp_path / "study.yaml"
        path.write_text(f"models: [demo]\ntasks: [{{task: '{task}', name: t}}]\ninclude_path: tasks\n")
        with pytest.raises(AFTError, match=said):
            build_cells(read_bench_study(path))
    with pytest.raises(AFTError, match=said):
        Transfer("demo", (task,), tmp_path / "out", settings={"include_path": (str(tasks),)}).run()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("scores: {tasks: aft_demo_math}", "scores.tasks: must be a list"),
        ("scores: {task: [aft_demo_math]}", "scores.task: there is no such field; did you mean tasks"),
        ("include_path: 5", r"include_path\[0\]: must be text, got 5"),
        ("include_path: nowhere", "there is no folder"),
        ("defaults: {rungs: 'a:b'}", "ung"),
    ],
)
def test_what_a_library_study_would_pass_over_is_refused(tmp_path: Path, more: str, said: str) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(f"vectors:\n  a/b: aft_demo_choice\n{more}\n")
    with pytest.raises(AFTError, match=said):
        read_library_study(path)


def test_a_library_study_reads_rungs_as_flags_do(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text("vectors:\n  a/b: aft_demo_choice\ndefaults: {rungs: '1:1:1:0.5'}\n")
    (entry,) = read_library_study(path).entries
    assert entry.plan().protocol.rungs[0].keep == 0.5


class Gone(Exception):
    """What the cluster below raises for actors that died."""


class Actor:
    """A worker of the cluster below; its methods are put on it there."""


class Cluster:
    """As much of Ray as the driver uses; ``slots`` actors fit, the others wait."""

    def __init__(self, slots: int, stillborn: bool = False) -> None:
        self.slots, self.stillborn = slots, stillborn
        self.alive: list[Any] = []
        self.waiting: list[Any] = []
        self.queue: dict[str, tuple[Any, Any]] = {}
        self.results: dict[str, Any] = {}
        self.numbers = itertools.count()
        self.exceptions = types.SimpleNamespace(RayError=Gone)
        self.node_dies_at = ""

    def is_initialized(self) -> bool:
        return True

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": float(self.slots)}

    def remote(self, _kind: Any) -> Any:
        return types.SimpleNamespace(options=lambda **_: types.SimpleNamespace(remote=self._actor))

    def _actor(self, *_: Any) -> Any:
        actor = Actor()
        for name in ("ready", "do"):
            setattr(actor, name, types.SimpleNamespace(remote=partial(self._ask, actor)))
        (self.alive if len(self.alive) < self.slots else self.waiting).append(actor)
        return actor

    def _ask(self, actor: Any, *job: Any) -> str:
        reference = f"reference {next(self.numbers)}"
        self.queue[reference] = (actor, job[0] if job else None)
        return reference

    def kill(self, actor: Any) -> None:
        for actors in (self.alive, self.waiting):
            if actor in actors:
                actors.remove(actor)

    def wait(self, references: list[str], num_returns: int) -> tuple[list[str], list[str]]:
        for reference in references:
            actor, job = self.queue[reference]
            if actor in self.alive:
                self.results[reference] = Done(job) if job else "there"
                if job is None and self.stillborn:
                    self.kill(actor)
                    self.results[reference] = Gone("no module named torch")
                if job is not None and job.name == self.node_dies_at:
                    self.node_dies_at, self.slots = "", self.slots - 1
                    self.kill(actor)
                    self.results[reference] = Gone("node died")
                return [reference], []
        raise AssertionError("the driver would wait for ever")

    def get(self, reference: str) -> Any:
        found = self.results[reference]
        if isinstance(found, Exception):
            raise found
        return found


@pytest.fixture
def six(tmp_path: Path) -> Schedule:
    study = read(
        tmp_path,
        "models: [demo]\ntasks: [aft_demo_choice]\nmethods: [static]\nseeds: 6\nrecipe: {protocol: rapid}\n",
    )
    return schedule(tmp_path, study, lambda _cell: None)


def test_work_goes_on_where_a_node_is_lost_for_good(six: Schedule, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(2)
    cluster.node_dies_at = "demo/aft_demo_choice/static/seed-1"
    monkeypatch.setattr(ray, "_ray", lambda: cluster)

    def finish(done: Done) -> None:
        six.finish(done, None if done.job.kind == "baseline" else outcome(0.0, sha="x"))

    ray.Ray(six.store, {}, ray.RayOptions()).run(six, lambda _job: None, finish)
    assert set(six.states.values()) == {"done"}


def test_workers_that_never_start_end_the_study(six: Schedule, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(2, stillborn=True)
    monkeypatch.setattr(ray, "_ray", lambda: cluster)
    with pytest.raises(AFTError, match="No worker could be started: no module named torch"):
        ray.Ray(six.store, {}, ray.RayOptions()).run(six, lambda _j: None, lambda _d: None)
    assert next(cluster.numbers) == 2 + LOSSES


def test_aliases_of_ordinary_size_are_read(tmp_path: Path) -> None:
    """As YAML writers make them of values that occur twice."""
    study = read(
        tmp_path,
        "models: [demo]\n"
        "tasks: [{task: aft_demo_choice, layers: &a '1'}, {task: aft_demo_math, layers: *a}]\n"
        "recipe: {protocol: rapid}\n",
    )
    assert [task.settings["layers"] for task in study.tasks] == ["1", "1"]


@pytest.mark.parametrize(("code", "goes_on"), [(2, True), (143, False)])
def test_a_refused_flag_fails_its_cell_and_a_signal_ends_the_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, goes_on: bool
) -> None:
    def leave(*_: Any) -> None:
        raise SystemExit(code)

    study = read(tmp_path, SMALL)
    session = Session(Store(tmp_path / "out"), device="cpu", batch_size="4", data=None)
    monkeypatch.setattr(Session, "model", leave)
    job = Job("cell", "key", build_cells(study)[0])
    if goes_on:
        assert "refused its settings" in session.do(job).error
    else:
        with pytest.raises(SystemExit):
            session.do(job)
