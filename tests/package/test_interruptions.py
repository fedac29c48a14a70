"""Long runs and what ends them early: SIGTERM, kill -9, a second process, a full disk."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from lm_eval_aft import AFTError, load_vector, train_vector
from lm_eval_aft._util.files import LOCK, exclusive_dir
from lm_eval_aft._util.process import Terminated, postponed, terminable
from lm_eval_aft.cli.main import aft
from lm_eval_aft.evaluation.report import compare
from lm_eval_aft.evaluation.run import evaluate_pair
from lm_eval_aft.lm import AFTLM
from lm_eval_aft.training import checkpoint as events_module

PLAN: dict[str, Any] = {
    "protocol": "maximum",
    "lr": 3e-2,
    "l2": 0.0,
    "epochs": 3,
    "seeds": 2,
    "layers": "1-2",
    "batch_size": 4,
    "retries": 0,
    "train_docs": 12,
    "selection_docs": 10,
    "progress": False,
}


@pytest.fixture
def plan(toy_tasks: Callable[..., str]) -> dict[str, Any]:
    return {**PLAN, "include_path": (toy_tasks(),)}


@pytest.fixture(scope="module")
def lm(checkpoint: Callable[..., str]) -> AFTLM:
    return AFTLM(checkpoint("llama"), device="cpu", batch_size=8)


def told(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "training.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "time"} for line in lines]


def test_sigterm_in_the_midst_of_an_epoch_loses_no_step(
    lm: AFTLM, plan: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ended after every few steps, a run goes on from that very step to the same vector and ledger."""
    whole = train_vector(lm, "toy_choice", tmp_path / "whole", **plan)
    original, steps = events_module.RunRecorder.tick, 0

    def tick(self: Any, done: int, /) -> None:
        nonlocal steps
        steps += 1
        if steps % 4 == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        original(self, done)

    monkeypatch.setattr(events_module.RunRecorder, "tick", tick)
    ends = 0
    while ends < 100:
        try:
            resumed = train_vector(lm, "toy_choice", tmp_path / "ended", resume=True, **plan)
            break
        except Terminated:
            ends += 1
    assert ends >= 5
    assert resumed.vector.digest() == whole.vector.digest()
    assert told(tmp_path / "ended") == told(tmp_path / "whole")
    assert not list((tmp_path / "ended").rglob(".*"))


@pytest.mark.slow
def test_a_diverged_candidate_is_told_though_the_run_ended_before_its_epoch_did(
    lm: AFTLM, plan: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval_aft.training.candidate import Candidate

    step = Candidate.step

    def diverging(self: Candidate) -> None:
        if (self.layer, self.seed, self.steps) == (1, 0, 0):
            for tensor in self._tensors:
                tensor.grad = None if tensor.grad is None else tensor.grad * float("nan")
        step(self)

    monkeypatch.setattr(Candidate, "step", diverging)
    train_vector(lm, "toy_choice", tmp_path / "whole", **plan)
    asked = iter([False, True])
    with monkeypatch.context() as patch:
        patch.setattr(events_module.RunRecorder, "_asked", lambda _self: next(asked, False), raising=False)
        patch.setattr(
            events_module.RunRecorder, "__init__", _without_asked(events_module.RunRecorder.__init__)
        )
        with pytest.raises(Terminated):
            train_vector(lm, "toy_choice", tmp_path / "ended", **plan)
    train_vector(lm, "toy_choice", tmp_path / "ended", resume=True, **plan)
    dropped = [line for line in told(tmp_path / "ended") if line["event"] == "dropped"]
    assert [line["reason"] for line in dropped] == ["gradient not finite"]
    assert told(tmp_path / "ended") == told(tmp_path / "whole")


def _without_asked(original: Callable[..., None]) -> Callable[..., None]:
    def init(self: Any, *arguments: Any) -> None:
        original(self, *arguments)
        del self._asked  # the class's stands in

    return init


@pytest.mark.slow
def test_a_long_epoch_is_saved_in_between(
    lm: AFTLM, plan: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saves = []
    original = events_module.RunRecorder.save
    monkeypatch.setattr(events_module.RunRecorder, "save", lambda *a: (saves.append(1), original(*a))[1])
    train_vector(lm, "toy_choice", tmp_path / "short", **plan)
    ordinary = len(saves)
    monkeypatch.setattr(events_module, "SAVE_EVERY", -1.0)
    train_vector(lm, "toy_choice", tmp_path / "long", **plan)
    assert len(saves) - ordinary > 3 * ordinary
    assert told(tmp_path / "long") == told(tmp_path / "short")


@pytest.mark.slow
def test_the_clock_may_jump(
    lm: AFTLM, plan: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wall-clock time going back a year, or on, changes nothing but the times noted."""
    whole = train_vector(lm, "toy_choice", tmp_path / "whole", **plan)
    now, calls = time.time(), 0

    def jumping() -> float:
        nonlocal calls
        calls += 1
        return now + (-1) ** calls * 365 * 86400

    monkeypatch.setattr(time, "time", jumping)
    jumped = train_vector(lm, "toy_choice", tmp_path / "jumped", **plan)
    assert jumped.vector.digest() == whole.vector.digest()
    assert jumped.seconds >= 0


def test_termination_in_and_out_of_blocks() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated) as ended, terminable():
        os.kill(os.getpid(), signal.SIGTERM)
    assert ended.value.code == 143
    done = []

    def works_on() -> None:
        with terminable(), postponed() as asked:
            os.kill(os.getpid(), signal.SIGTERM)
            done.append(asked())

    with pytest.raises(Terminated):
        works_on()
    assert done == [True]
    assert signal.getsignal(signal.SIGTERM) is before
    mine = []
    signal.signal(signal.SIGTERM, lambda *_: mine.append(1))
    try:
        with terminable(), postponed() as asked:
            os.kill(os.getpid(), signal.SIGTERM)
            assert not asked()
        assert mine == [1]  # a program's own handler stays
    finally:
        signal.signal(signal.SIGTERM, before)


def test_one_process_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    with exclusive_dir(folder):
        assert (folder / LOCK).exists()
        with pytest.raises(AFTError, match="Another process is writing into"), exclusive_dir(folder):
            pass
        command = [sys.executable, "-m", "lm_eval_aft.cli.main", "train", "--model", "demo"]
        command += ["--task", "aft_demo_choice", "--output", str(folder), "--resume"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert "Another process is writing into" in done.stderr
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "a").exists()  # nothing was left there, so nothing stays
    folder.mkdir(parents=True)
    (folder / LOCK).write_text("left by a process that was killed")
    with exclusive_dir(folder):
        (folder / "work").write_text("")
    assert [each.name for each in folder.iterdir()] == ["work"]


def test_the_lock_of_a_killed_process_keeps_nobody_out(tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom lm_eval_aft._util.files import exclusive_dir\n"
        "with exclusive_dir(Path(sys.argv[1])):\n    print('in', flush=True)\n    time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "out")], stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"in\n"
        with pytest.raises(AFTError, match="Another process"), exclusive_dir(tmp_path / "out"):
            pass
        other.kill()
    with exclusive_dir(tmp_path / "out"):
        pass


def test_an_output_that_cannot_be_written(
    plan: dict[str, Any], lm: AFTLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a mount for reading only answers; root may write anywhere, so rights would test nothing."""
    (tmp_path / "file").write_text("")
    with pytest.raises(AFTError, match="is a file"):
        train_vector(lm, "toy_choice", tmp_path / "file", **plan)
    with pytest.raises(AFTError, match="Cannot write into /proc/out"):
        train_vector(lm, "toy_choice", "/proc/out", **plan)

    def no_locks(*_args: Any, **_kwargs: Any) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("filelock.FileLock.acquire", no_locks)
    with exclusive_dir(tmp_path / "out"):  # a network mount without locks: a warning, and on
        pass


def test_an_evaluation_goes_on_where_it_ended(
    checkpoint: Callable[..., str], lm: AFTLM, plan: dict[str, Any], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    train_vector(lm, "toy_choice", tmp_path / "v", **{**plan, "epochs": 1})
    arguments: list[Any] = [checkpoint("llama"), str(tmp_path / "v"), ["toy_choice"]]
    flags = ["--include_path", plan["include_path"][0], "--limit", "8"]
    options: dict[str, Any] = {"placebo": "random:1", "flags": flags, "model_args": {"device": "cpu"}}
    evaluate_pair(*arguments, tmp_path / "whole", **options)
    from lm_eval.loggers import EvaluationTracker

    original, saved = EvaluationTracker.save_results_samples, []

    def save(self: Any, **values: Any) -> None:
        saved.append(1)
        if len(saved) == 2:
            raise Terminated  # results of the second run are there, its samples are not
        original(self, **values)

    with monkeypatch.context() as patch:
        patch.setattr(EvaluationTracker, "save_results_samples", save)
        with pytest.raises(Terminated):
            evaluate_pair(*arguments, tmp_path / "ended", **options)
    with pytest.raises(AFTError, match="one baseline and at least one steered"):
        compare(tmp_path / "ended")  # half a run is none
    with pytest.raises(AFTError, match="already holds baseline"):
        evaluate_pair(*arguments, tmp_path / "ended", **options)
    other = {**options, "flags": [*flags, "--num_fewshot", "1"]}
    with pytest.raises(AFTError, match="made with other settings: flags differ"):
        evaluate_pair(*arguments, tmp_path / "ended", resume=True, **other)
    (baseline,) = (tmp_path / "ended" / "baseline").rglob("results_*.json")
    before = baseline.stat().st_mtime_ns
    evaluate_pair(*arguments, tmp_path / "ended", resume=True, **options)
    assert baseline.stat().st_mtime_ns == before  # it was kept
    assert compare(tmp_path / "ended").rows == compare(tmp_path / "whole").rows
    assert sorted(p.name for p in (tmp_path / "ended").iterdir()) == [
        ".asked.json", "baseline", "placebo", "steered",
    ]  # fmt: skip
    (tmp_path / "ended" / ".asked.json").write_text("[1")
    with pytest.raises(AFTError, match="made with other settings"):
        evaluate_pair(*arguments, tmp_path / "ended", resume=True, **options)


def test_overwriting_dies_half_way(
    lm: AFTLM, plan: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left is no finished run, and can be overwritten again."""
    train_vector(lm, "toy_choice", tmp_path / "v", **plan)
    original = Path.unlink

    def unlink(self: Path, **options: Any) -> None:
        if self.name == "training.jsonl":
            raise KeyboardInterrupt
        original(self, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", unlink)
        with pytest.raises(KeyboardInterrupt):
            train_vector(lm, "toy_choice", tmp_path / "v", overwrite=True, **plan)
    with pytest.raises(AFTError, match="No steering vector"):
        load_vector(str(tmp_path / "v" / "vector.safetensors"))
    (tmp_path / "v" / ".state.safetensors.abc.tmp").write_text("half")
    train_vector(lm, "toy_choice", tmp_path / "v", overwrite=True, **plan)
    assert not list((tmp_path / "v").rglob(".*"))


@pytest.mark.slow
def test_resume_after_the_ledger_was_cut_anywhere(
    lm: AFTLM, plan: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes lost from the ledger's end are either beyond the saved state, or the run says so."""
    with monkeypatch.context() as patch:
        patch.setattr(events_module.RunRecorder, "_asked", lambda self: self._ledger.lines > 4, raising=False)
        patch.setattr(
            events_module.RunRecorder, "__init__", _without_asked(events_module.RunRecorder.__init__)
        )
        with pytest.raises(Terminated):
            train_vector(lm, "toy_choice", tmp_path / "v", **plan)
    from safetensors import safe_open

    from lm_eval_aft.training.checkpoint import TrainingLedger, open_run

    ledger, state = tmp_path / "v" / "training.jsonl", tmp_path / "v" / "state.safetensors"
    text, saved = ledger.read_bytes(), state.read_bytes()
    with safe_open(state, framework="pt") as file:
        settings = json.loads(file.metadata()["state"])["settings"]
    outcomes = {"resumed": 0, "refused": 0}
    for cut in range(len(text) + 1):
        ledger.write_bytes(text[:cut])
        try:
            found, states = open_run(tmp_path / "v", settings, resume=True)
        except AFTError as error:
            outcomes["refused"] += "--overwrite" in error.hint
        else:
            assert isinstance(found, TrainingLedger)
            assert states
            assert ledger.read_bytes() == text
            outcomes["resumed"] += 1
        state.write_bytes(saved)
    assert outcomes["resumed"] >= 1
    assert outcomes["refused"] >= len(text) - 1
    for cut in [*range(0, len(saved), 97), len(saved) - 1]:
        ledger.write_bytes(text)
        state.write_bytes(saved[:cut])
        with pytest.raises(AFTError, match="is damaged"):
            open_run(tmp_path / "v", settings, resume=True)


@pytest.mark.slow
def test_sigterm_ends_commands_with_143(tmp_path: Path, checkpoint: Callable[..., str]) -> None:
    """As a scheduler sends it, to a real process."""
    command = [sys.executable, "-m", "lm_eval_aft.cli.main", "train", "--model", "demo"]
    command += ["--task", "aft_demo_choice", "--protocol", "full", "--output", str(tmp_path / "v")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline and not (tmp_path / "v" / "state.safetensors").exists():
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert "Terminated. What is finished is kept: go on with --resume" in err
    assert "Traceback" not in err
    left = sorted(each.name for each in (tmp_path / "v").iterdir())
    assert left == ["state.safetensors", "training.jsonl"]


def test_the_help_tells_of_resume() -> None:
    assert "--resume" in CliRunner().invoke(aft, ["eval", "--help"]).output
