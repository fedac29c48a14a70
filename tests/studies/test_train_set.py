"""A whole library from a study file: it runs through, goes on after a sudden death, and is scored."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from lm_eval_aft import AFTError, load_vector
from lm_eval_aft.cli.main import aft
from lm_eval_aft.library.store import Library
from lm_eval_aft.studies import train_set
from lm_eval_aft.studies.config import read_library_study
from lm_eval_aft.training import checkpoint

QUICK = {
    "protocol": "maximum", "layers": 1, "seeds": 1, "train_docs": 16, "selection_docs": 12, "epochs": 1,
    "lr": "1e-2", "batch_size": 4, "retries": 0, "regression": False,
}  # fmt: skip
NEEDED = "mmlu has no training split."


def write_study(folder: Path, **changes: Any) -> Path:
    study = {
        "defaults": QUICK,
        "vectors": {
            "knowledge/facts": "aft_demo_choice",
            "math/sums": {"task": "aft_demo_math", "train_docs": 8, "limit": 6},
        },
        "unavailable": {"knowledge/history": NEEDED},
        "scores": {"limit": 12},
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({**study, **changes}))
    return path


def call(study: Path, library: Path, *more: str, code: int = 0) -> Result:
    words = ["vectors", "train-set", str(study), "--model", "demo", "--library", str(library), *more]
    done = CliRunner().invoke(aft, [*words, "--device", "cpu"])
    assert done.exit_code == code, done.output
    return done


# Dies without a word while the second vector is being trained.
DYING = """
import os, signal, sys
from lm_eval_aft.training import checkpoint
save = checkpoint.RunRecorder.save
def dying(self, candidates):
    save(self, candidates)
    if "math" in str(self._folder):
        os.kill(os.getpid(), signal.SIGKILL)
checkpoint.RunRecorder.save = dying
from lm_eval_aft.cli.main import aft
aft(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_killed_study_goes_on_and_is_scored(tmp_path: Path) -> None:
    study, root = write_study(tmp_path), tmp_path / "library"
    words = ["vectors", "train-set", str(study), "--model", "demo", "--library", str(root), "--device", "cpu"]
    died = subprocess.run(
        [sys.executable, "-c", DYING, *words], env=os.environ, capture_output=True, check=False
    )
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()
    goes_on(study, root)


def test_an_interrupted_study_goes_on_and_is_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study, root = write_study(tmp_path), tmp_path / "library"
    save = checkpoint.RunRecorder.save

    def interrupted(self: checkpoint.RunRecorder, candidates: Any) -> None:
        save(self, candidates)
        if "math" in str(self._folder):
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint.RunRecorder, "save", interrupted)
        assert "go on with --resume" in call(study, root, code=130).output
    goes_on(study, root)


def goes_on(study: Path, root: Path) -> None:
    """One vector is finished, the second begun: --resume ends the study, and does nothing twice."""
    library = Library(root)
    assert library.names() == ["knowledge/facts"]
    plan = call(study, root, "--dry-run").output
    assert [line.split("│")[-2].strip() for line in plan.splitlines() if "aft_demo" in line] == [
        "in the library",
        "begun",
    ]
    assert f"knowledge/history: not trainable. {NEEDED}" in plan
    assert "--resume" in call(study, root, code=1).output
    before = library.path("knowledge/facts").stat().st_ino
    done = call(study, root, "--resume").output
    assert "knowledge/facts: already in the library" in done
    assert library.names() == ["knowledge/facts", "math/sums"]
    assert library.path("knowledge/facts").stat().st_ino == before
    assert load_vector("math/sums", library).metadata["splits"]["train"] == 8
    assert not list((root / ".train-set/work").iterdir())
    rows = json.loads((root / "cross-scores.json").read_text())
    assert [(row["vector"], row["task"], row["own"], row["n"]) for row in rows] == [
        ("knowledge/facts", "aft_demo_choice", True, 12),
        ("math/sums", "aft_demo_choice", False, 12),
        ("knowledge/facts", "aft_demo_math", False, 6),
        ("math/sums", "aft_demo_math", True, 6),
    ]
    table = (root / "cross-scores.md").read_text()
    assert "| baseline |" in table
    assert "| math/sums |" in table
    again = call(study, root, "--resume").output  # nothing left to do
    assert "training on" not in again
    assert "scoring" not in again
    assert "Cross-scores" in again


def quick(folder: Path, **changes: Any) -> Path:
    return write_study(folder, vectors={"k/facts": "aft_demo_choice"}, defaults={**QUICK, **changes})


def test_a_vector_that_waits_is_not_taken_for_one_of_other_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained, but not yet moved into the library; then the study asks for something else."""
    root = tmp_path / "library"

    def full(*_: Any, **__: Any) -> None:
        raise AFTError("The disk is full.", "Make room.")

    with monkeypatch.context() as patched:
        patched.setattr(Library, "add", full)
        call(quick(tmp_path), root, "--no-scores", code=1)
    told = call(quick(tmp_path, train_docs=20), root, "--no-scores", "--resume").output
    assert "begun with other settings, and is started anew" in told
    assert load_vector("k/facts", Library(root)).metadata["splits"]["train"] == 20


def test_a_vector_that_waits_is_moved_and_not_trained_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, add = tmp_path / "library", Library.add

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Library, "add", interrupted)
        call(quick(tmp_path), root, "--no-scores", code=130)
    # Sudden death has cut the ledger's last line short.
    ledger = root / ".train-set" / "ledger.jsonl"
    ledger.write_bytes(ledger.read_bytes()[:20])
    monkeypatch.setattr(train_set, "train_vector", interrupted)
    assert Library.add is add
    call(quick(tmp_path), root, "--no-scores", "--resume")
    assert "already in the library" in call(quick(tmp_path), root, "--no-scores", "--resume").output


def test_a_strangers_vector_and_another_dtype_are_told_from_its_own(tmp_path: Path) -> None:
    root = tmp_path / "library"
    call(quick(tmp_path), root, "--no-scores")
    said = call(quick(tmp_path), root, "--no-scores", "--resume", "--dtype", "bfloat16", code=1).output
    assert "other settings (model_args)" in said
    stranger = load_vector("k/facts", Library(root))
    stranger.coefficient = 2.0
    Library(root).add(stranger.save(tmp_path / "other"), "k/facts", replace=True)
    said = call(quick(tmp_path), root, "--no-scores", "--resume", code=1).output
    assert "that this study did not train" in said


def test_what_cannot_be_trained_and_what_was_trained_otherwise_is_told(tmp_path: Path) -> None:
    vectors = {"a/none": "no_such.yaml", "b/facts": "aft_demo_choice"}
    study, root = write_study(tmp_path, vectors=vectors), tmp_path / "library"
    done = call(study, root, "--no-scores", code=1).output
    assert "a/none: not trained." in done
    assert "1 of 2 vectors were not trained: a/none" in done
    assert Library(root).names() == ["b/facts"]  # the one did not stop the other
    changed = write_study(tmp_path, vectors=vectors, defaults={**QUICK, "train_docs": 30})
    assert "other settings (train_docs)" in call(changed, root, "--resume", code=1).output
    other = write_study(tmp_path, vectors={"c/facts": "aft_demo_choice"})
    Library(root).add(Library(root).path("b/facts"), "c/facts")
    assert "this study did not train" in call(other, root, "--resume", code=1).output


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vectors": {}}, "vectors: must have at least one entry"),
        ({"vectors": {"facts": "t"}}, "cannot name a vector"),
        ({"vectors": {"a/b": {"protocol": "rapid"}}}, "vectors.a/b.task: is missing"),
        ({"vectors": {"a/b": {"task": "t", "colour": 3}}}, "a/b: A protocol has no setting 'colour'"),
        ({"vectors": {"a/b": {"task": "t", "limit": "many"}}}, "vectors.a/b.limit: must be a whole number"),
        ({"vectors": {"a/b": {"task": "t", "protocol": "swift"}}}, "a/b: .*swift"),
        ({"colours": 1}, "colours: there is no such field"),
        ({"scores": [1]}, "must be a mapping"),
    ],
)
def test_what_is_wrong_with_a_study_is_said(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(AFTError, match=message):
        read_library_study(write_study(tmp_path, **changes))


def test_the_shipped_study(tmp_path: Path) -> None:
    study = read_library_study(Path(__file__).parents[2] / "scripts/studies/library.yaml")
    assert {entry.name: entry.task for entry in study.entries} == {
        "math/word_problems": "gsm8k",
        "math/algebra": "hendrycks_math_algebra",
        "logic/deduction": "logiqa",
        "logic/analogy": "arc_challenge",
        "knowledge/science": "sciq",
    }
    assert {entry.plan().protocol.name for entry in study.entries} == {"adaptive"}
    assert "training split" in study.unavailable["knowledge/history"]


def test_settings_as_yaml_reads_them(tmp_path: Path, toy_tasks: Callable[..., str]) -> None:
    folder = Path(toy_tasks())
    vectors = {"a/b": {"task": "toy_choice", "lr": ["1e-3", 0.01], "num_fewshot": 2, "layers": [0, 2]}}
    study = read_library_study(write_study(tmp_path, vectors=vectors, include_path=folder.name))
    plan = study.entries[0].plan()
    assert plan.protocol.lr == (1e-3, 1e-2)
    assert plan.protocol.layers == "0,2"
    assert plan.prompts.num_fewshot == 2
    assert plan.include_path == (str(folder),)
