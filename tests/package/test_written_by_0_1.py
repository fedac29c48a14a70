"""Vectors, libraries, results, studies and exports written by release 0.1 are read as they were meant."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from lm_eval_aft import SteeringVector, load_vector
from lm_eval_aft.cli.main import aft
from lm_eval_aft.export.formats import import_vector
from lm_eval_aft.lm import AFTLM
from lm_eval_aft.steering.vector_file import read_header

WRITTEN = Path(__file__).parents[1] / "fixtures" / "0.1"
DIGESTS: dict[str, str] = json.loads((WRITTEN / "digests.json").read_text())
SINGLE = sorted(path.stem for path in (WRITTEN / "vectors").iterdir())


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of everything, which is the working directory."""
    shutil.copytree(WRITTEN, tmp_path / "w")
    shutil.copytree(tmp_path / "w/library/math/trained", tmp_path / "w/trained")  # as the results name it
    monkeypatch.chdir(tmp_path / "w")
    return tmp_path / "w"


def said(*words: str) -> str:
    done = CliRunner().invoke(aft, list(words))
    assert done.exit_code == 0, done.output
    return done.output


def without_its_time(folder: str) -> dict[str, Any]:
    """A report of then, but for when and by what it was written."""
    report: dict[str, Any] = json.loads(Path(folder, "report.json").read_text())
    assert report.pop("version") == "0.1.0"
    del report["created"]
    return report


def holds(now: Any, before: Any, where: str = "") -> None:
    """Everything of ``before`` is in ``now``; mappings may have gained keys."""
    if isinstance(before, dict):
        assert isinstance(now, dict), where
        for key, value in before.items():
            assert key in now, f"{where}/{key}"
            holds(now[key], value, f"{where}/{key}")
    elif isinstance(before, list):
        assert len(now) == len(before), where
        for i, (ours, theirs) in enumerate(zip(now, before, strict=True)):
            holds(ours, theirs, f"{where}/{i}")
    elif isinstance(before, float):
        assert now == pytest.approx(before, rel=1e-9, nan_ok=True), where
    else:
        assert now == before, where


@pytest.mark.parametrize("name", SINGLE)
def test_vectors_of_every_method(name: str, tmp_path: Path) -> None:
    file = WRITTEN / "vectors" / f"{name}.safetensors"
    vector = SteeringVector.load(file)
    assert (vector.method, vector.coefficient, vector.digest()) == (name, 0.75, DIGESTS[name])
    assert vector.metadata["note"] == "naïve"
    assert read_header(file).layers == tuple(vector.layers)
    assert SteeringVector.load(vector.save(tmp_path)).digest() == DIGESTS[name]


def test_a_library(written: Path) -> None:
    holds(
        json.loads(said("vectors", "list", "--library", "library", "--json")),
        json.loads((written / "listing.json").read_text()),
    )
    said("vectors", "verify", "--library", "library")
    for name, key in (("math/trained", "trained"), ("math/sum", "math/sum"), ("logic/static", "static")):
        assert load_vector(name, "library").digest() == DIGESTS[key]
    again = load_vector("math/trained*0.5 + math/trained*0.25", "library")
    assert again.digest() == DIGESTS["math/sum"]


def test_a_vector_steers_the_model_it_was_trained_on(written: Path) -> None:
    lm = AFTLM("demo", vector="math/trained", library="library")  # its fingerprint is compared
    assert lm.get_model_info()["aft"]["vector"]["sha256"] == DIGESTS["trained"]


def test_result_folders(written: Path) -> None:
    said("report", "results", "-o", "now")
    before = without_its_time("report")
    holds(json.loads(Path("now/report.json").read_text()), before)


def test_evaluations_are_resumed(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lm_eval_aft.evaluation.run.score", None)  # every run is there already
    said(
        *("eval", "--model", "demo", "--vector", "trained", "--tasks", "aft_demo_choice"),
        *("--output", "results", "--placebo", "random:1", "--resume", "--", "--limit", "12"),
    )


def test_studies_are_resumed_without_doing_anything_again(
    written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = without_its_time("study")
    ledger = Path("study/ledger.jsonl").read_bytes()
    monkeypatch.setattr(AFTLM, "__init__", None)  # no model is loaded
    output = said("bench", "study.yaml", "--output", "study", "--device", "cpu", "--resume")
    assert "2 cells: 2 done" in output
    holds(json.loads(Path("study/report.json").read_text()), before)
    told = Path("study/ledger.jsonl").read_bytes().removeprefix(ledger)
    assert [json.loads(line)["event"] for line in told.split(b"\n") if line.strip()] == ["start"]


@pytest.mark.parametrize("source", ["adapter", "vector.gguf"])
def test_exports_are_imported(written: Path, source: str) -> None:
    trained = load_vector("math/trained", "library")
    import_vector(f"exports/{source}", "back", model="demo")
    back = SteeringVector.load("back")
    assert back.layers.keys() == trained.layers.keys()
    for layer, values in trained.layers.items():
        assert torch.equal(back.layers[layer], values * trained.coefficient)
    assert back.metadata["splits"] == trained.metadata["splits"]
