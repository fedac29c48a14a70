"""docs/study: the page says what the committed results say; rows beside vectors are what they claim."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from lm_eval_aft import load_vector
from lm_eval_aft.studies.config import read_bench_study
from tests.support.scripts import load_script

ROOT = Path(__file__).resolve().parents[2]
STUDY = ROOT / "docs" / "study"


@pytest.fixture(scope="module")
def page() -> ModuleType:
    return load_script("study_page")


def test_the_pages_are_made_from_the_committed_results(page: ModuleType) -> None:
    found = page.blocks()
    for name, blocks in (("docs/study.md", {"cells", "seeds", "hours"}), ("README.md", {"readme"})):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert blocks <= {block for block in found if f"<!-- {block} -->" in text}
        assert page.filled(text, found) == text, "run: python scripts/study_page.py write"


@pytest.mark.parametrize("name", [name for name in ("real", "sizes") if (STUDY / name).is_dir()])
def test_every_cell_has_its_vector_and_belongs_to_the_study(name: str, page: ModuleType) -> None:
    cells = page.cells(STUDY / name)
    file = ROOT / "scripts" / "studies" / ("real.yaml" if name == "real" else "real-sizes.yaml")
    text = file.read_text(encoding="utf-8")
    digests = {load_vector(each).digest() for each in (STUDY / name / "vectors").iterdir()}
    assert cells
    for cell in cells:
        assert cell["vector"]["sha256"] in digests, cell["key"]
        assert all(f"{cell[part]}" in text for part in ("model", "task", "method")), cell


def test_what_is_committed_is_small_and_has_no_samples() -> None:
    files = [each for each in STUDY.rglob("*") if each.is_file()]
    assert not [each for each in files if each.name.startswith("samples_")]
    assert sum(each.stat().st_size for each in files) <= 8 << 20


def test_holm_leaves_controls_out(page: ModuleType) -> None:
    def row(method: str, p: float) -> dict[str, object]:
        return {"method": method, "row": {"p_value": p, "difference": 0.1}}

    rows = [row("static", 0.02), row("shuffled", 0.001), row("lora", 0.04), row("answer-only", 0.9)]
    page.adjust(rows)
    assert [each.get("p_adjusted") for each in rows] == [pytest.approx(0.04), None, pytest.approx(0.04), None]
    assert rows[0]["verdict"] == rows[2]["verdict"] == "better"


@pytest.mark.slow
def test_rows_beside_a_study_of_the_demo(tmp_path: Path) -> None:
    """LoRA, shown documents and answers alone, on the documents of the study's own cell."""
    file = tmp_path / "small.yaml"
    file.write_text(
        "study: small\nmodels: [demo]\ntasks: [{task: aft_demo_choice, limit: 64}]\n"
        "recipe: {train_docs: 40, selection_docs: 40}\n"
    )
    read_bench_study(file)
    aft = [sys.executable, "-m", "lm_eval_aft.cli.main"]
    subprocess.run([*aft, "bench", str(file), "--output", str(tmp_path / "study")], check=True, cwd=tmp_path)
    script = [sys.executable, str(ROOT / "scripts" / "study_rows.py"), str(file), "--shots", "3"]
    own = ["--study", "study", "--model", "demo", "--task", "aft_demo_choice", "--output", "rows"]
    for _ in range(2):  # the second time everything is there
        subprocess.run([*script, *own], check=True, cwd=tmp_path)
    rows = json.loads((tmp_path / "rows" / "demo-aft_demo_choice" / "rows.json").read_text())
    found = {each["row"]: each for each in rows}
    assert set(found) == {"few-shot (3)", "answer-only", "lora"}
    assert all(each["n"] == 64 for each in rows)
    assert found["lora"]["selection_change"] < -0.1
    assert found["lora"]["steered"] > found["lora"]["baseline"]
    # The prompts show training documents of this very cell.
    (samples,) = (tmp_path / "rows").rglob("scores/few-shot-3/**/samples_*.jsonl")
    prompt = json.loads(samples.read_text().splitlines()[0])["arguments"]["gen_args_0"]["arg_0"]
    (shown,) = (tmp_path / "rows").rglob("aft_demo_choice_shown_3.yaml")
    import yaml

    documents = yaml.safe_load(shown.read_text())["fewshot_config"]["samples"]
    assert len(documents) == 3
    assert prompt.count("\n\n") >= 3
