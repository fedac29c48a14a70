"""No deprecated name of another library is used by us: commands with such warnings as errors."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from lm_eval_aft.evaluation.self_check import RIGHT, try_family
from lm_eval_aft.harness.tasks import tasks_path

STRICT = [sys.executable, "-W", "error::FutureWarning", "-W", "error::DeprecationWarning"]
RAPID = "--protocol rapid --layers 2 --train-docs 24 --selection-docs 24"
TASK = "aft_demo_choice"
# The README's commands on the embedded model, in the order that a user would give them.
COMMANDS = {
    "train": f"train --model demo --task {TASK} {RAPID} --output v",
    "lm-eval": f"lm-eval run --model aft --model_args pretrained=demo,vector=v --tasks {TASK} --limit 6 "
    f"--device cpu --include_path {tasks_path()} --output_path one",
    "eval": f"eval --model demo --vector v --tasks {TASK} --placebo random:1 --output both -- --limit 6",
    "report": "report both --output report",
    "merged": "export v --model demo --to merged -o merged",
    "peft": "export v --model demo --to peft -o adapter",
    "gguf": "export v --model demo --to gguf -o v.gguf",
    "steered": "export v --model demo --to steered -o v.pt",
    "import": "import adapter -o back --model demo",
    "add": "vectors add v --name demo/choice --library library",
    "list": "vectors list --library library",
    "tasks": f"tasks {TASK}",
    "methods": "methods",
}


def run(place: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    loud = {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "warning", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [*STRICT, *arguments],
        cwd=place,
        env={**os.environ, **loud},
        capture_output=True,
        text=True,
        timeout=280,
    )


@pytest.mark.slow
def test_commands_raise_no_deprecation(tmp_path: Path) -> None:
    for name, command in COMMANDS.items():
        done = run(tmp_path, "-m", "lm_eval_aft.cli.main", *command.split())
        assert done.returncode == 0, f"{name}\n{done.stdout}\n{done.stderr}"
        assert "deprecat" not in (done.stdout + done.stderr).lower(), name


def test_stock_lm_eval_raises_no_deprecation(tmp_path: Path) -> None:
    arguments = f"run --model aft --model_args pretrained=demo --tasks {TASK} --limit 4 --device cpu"
    done = run(tmp_path, "-m", "lm_eval", *arguments.split(), "--include_path", str(tasks_path()))
    assert done.returncode == 0, done.stderr
    assert "deprecat" not in (done.stdout + done.stderr).lower()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_scoring_and_generation_use_no_deprecated_name(
    family: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers tells some of its deprecations by its logger alone."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING, "transformers"):
        warnings.simplefilter("error", FutureWarning)
        warnings.simplefilter("error", DeprecationWarning)
        trial = try_family(family)
    parts = {each.part for each in trial.outcomes if each.verdict == RIGHT}
    assert {"prefixed", "packed", "trimmed", "resumed", "generation"} <= parts
    assert "BROKEN" not in {each.verdict for each in trial.outcomes}
    assert not [record.getMessage() for record in caplog.records if "deprecat" in record.getMessage()]
