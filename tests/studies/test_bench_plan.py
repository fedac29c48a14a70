"""Dry runs: the shipped studies offline, and their costs against counting on real models."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner

from lm_eval_aft.cli.main import aft
from lm_eval_aft.harness import identity
from lm_eval_aft.steering.backbone import find_backbone
from lm_eval_aft.studies import planner, simulated_device
from lm_eval_aft.studies.config import read_bench_study
from lm_eval_aft.studies.jobs import build_cells
from lm_eval_aft.studies.planner import (
    KNOWN,
    CostEstimator,
    Shape,
    find_config,
    find_shape,
    plan_cost,
    typical_documents,
)
from lm_eval_aft.studies.simulated_device import Device, meta_model
from lm_eval_aft.training.cost import flops_of
from lm_eval_aft.training.objectives import make_objective
from lm_eval_aft.training.recipe import Protocol
from lm_eval_aft.training.trainer import DEFAULT_TOKEN_BUDGET, Trajectory
from tests.conftest import FAMILIES, tiny_model

STUDIES = Path(__file__).parents[2] / "scripts/studies"
# study -> cells, models, tasks
SHIPPED = {
    "rapid": (63, 7, 3),
    "maximum": (90, 5, 3),
    "full": (45, 5, 3),
    "search": (108, 3, 3),
    "transfer": (36, 3, 4),
    "methods": (160, 2, 2),
    "scale-7b": (27, 3, 3),
}
# Parameters as published with the models; checks the shapes that estimates are made from.
PUBLISHED = {
    "EleutherAI/pythia-160m": 162_322_944,
    "EleutherAI/pythia-410m": 405_334_016,
    "Qwen/Qwen1.5-0.5B": 463_987_712,
    "Qwen/Qwen1.5-1.8B": 1_836_828_672,
    "Qwen/Qwen1.5-7B": 7_721_324_544,
    "microsoft/phi-1_5": 1_418_270_720,
    "stabilityai/stablelm-2-1_6b": 1_644_515_328,
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
}


def models_of(study: str) -> list[str]:
    return [entry.pretrained for entry in read_bench_study(STUDIES / f"{study}.yaml").models]


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "study",
    # Each lays out every model it names; one of each kind in the slow tier.
    [
        pytest.param(study, marks=pytest.mark.slow if study in ("scale-7b", "maximum") else pytest.mark.full)
        for study in SHIPPED
    ],
)
def test_a_shipped_study_passes_its_dry_run_offline(study: str) -> None:
    done = CliRunner().invoke(
        aft, ["bench", str(STUDIES / f"{study}.yaml"), "--dry-run", "--plan-for", "24gb"]
    )
    assert done.exit_code == 0, done.output
    cells, models, tasks = SHIPPED[study]
    assert f"{cells} cells (0 finished), {models * tasks} baselines, {models} models" in done.output
    assert re.search(r"operations and [\d.]+ hours at most", done.output)
    lines = [line for line in done.output.splitlines() if " B │" in line]
    assert len(lines) == models
    for line in lines:
        weights, above, whole = (float(text) for text in line.split("│")[5:8])
        assert 0 < weights < 16
        assert above > 0
        assert whole == pytest.approx(weights + above, abs=0.11)
    print(done.output)


def test_what_does_not_fit_is_planned_in_smaller_passes(tmp_path: Path) -> None:
    study = tmp_path / "study.yaml"
    study.write_text("models: [demo]\ntasks: [arc_easy]\nmethods: [static]\nrecipe: {protocol: rapid}\n")
    (cell,) = build_cells(read_bench_study(study))[:1]
    shape = find_shape(cell.model)
    roomy = Device("a GPU", "cuda", 1e14, 1e12, 1e12, 1e-5)
    whole = CostEstimator(shape, roomy)
    assert whole.fitting_budget(cell, 0) == DEFAULT_TOKEN_BUDGET
    cost = whole.plan(cell, 0)
    above = cost.peak_bytes
    small = replace(roomy, memory=cost.weight_bytes + above / 5)
    budget = CostEstimator(shape, small).fitting_budget(cell, 0)
    assert budget is not None
    assert DEFAULT_TOKEN_BUDGET / 16 <= budget <= DEFAULT_TOKEN_BUDGET / 4
    assert CostEstimator(shape, small, budget).plan(cell, 0).peak_bytes <= above / 5
    assert CostEstimator(shape, replace(roomy, memory=cost.weight_bytes)).fitting_budget(cell, 0) is None


def test_what_cells_share_is_planned_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: Counter[str] = Counter()

    def counted(where: Any, name: str) -> None:
        plain = getattr(where, name)

        def count(*args: Any, **options: Any) -> Any:
            calls[name] += 1
            return plain(*args, **options)

        monkeypatch.setattr(where, name, count)

    for where, name in (
        (planner, "meta_model"),  # models on the meta device
        (planner, "find_config"),
        (simulated_device.MetaEngine, "baseline"),  # frozen passes
        (Trajectory, "outputs"),
        (identity, "_hashed"),  # contents of files
    ):
        counted(where, name)

    def plan(methods: list[str], seeds: int) -> Counter[str]:
        study = {"models": ["demo"], "tasks": ["aft_demo_choice", "aft_demo_math"], "methods": methods}
        file = tmp_path / "study.yaml"
        file.write_text(yaml.safe_dump({**study, "seeds": seeds, "recipe": {"protocol": "rapid"}}))
        calls.clear()
        done = CliRunner().invoke(aft, ["bench", str(file), "--dry-run"])
        assert done.exit_code == 0, done.output
        return Counter(calls)

    one = plan(["static"], 1)
    assert (one["find_config"], one["_hashed"]) == (1, 0)
    assert one["meta_model"] <= 3  # the whole one, and two shallow ones in its place
    assert one["baseline"] > 0
    many = plan(["static", "drab", "mlp", "caa"], 3)
    for name in ("find_config", "meta_model", "baseline", "_hashed"):
        assert many[name] == one[name], name
    # Only the passes whose memory is measured are made again with each method: a step and a judged batch.
    assert many["outputs"] - one["outputs"] <= 3 * 2 * 2 * 2


def test_keys_name_results_only_where_contents_were_read(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text("models: [demo]\ntasks: [aft_demo_choice, aft_demo_math]\nseeds: 2\n")
    study = read_bench_study(file)
    plain, hashed = build_cells(study, hashed=False), build_cells(study)
    assert [cell.name for cell in plain] == [cell.name for cell in hashed]
    assert len({cell.key for cell in plain}) == 4
    assert len({cell.baseline_key for cell in plain}) == 2
    assert not {cell.key for cell in plain} & {cell.key for cell in hashed}


@pytest.mark.parametrize("model", PUBLISHED)
def test_shipped_shapes_have_the_published_number_of_parameters(model: str) -> None:
    shape = Shape(find_config(model), True, torch.bfloat16)
    parameters = meta_model(shape.config, shape.dtype).parameters()
    assert sum(parameter.numel() for parameter in parameters) == PUBLISHED[model]


def test_every_model_of_the_hub_studies_has_a_shipped_shape_and_a_tiny_relative() -> None:
    used = {model for study in SHIPPED for model in models_of(study)}
    assert used <= set(KNOWN)
    assert {KNOWN[model][0] for model in used} <= set(FAMILIES)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_families_of_the_hub_studies_run(
    tmp_path: Path, toy_tasks: Callable[..., str], checkpoint: Callable[..., str]
) -> None:
    families = sorted({KNOWN[model][0] for study in SHIPPED for model in models_of(study)})
    assert families == ["gpt_neox", "llama", "mistral", "phi", "qwen2", "stablelm"]
    named = {family: "mistral-window" if family == "mistral" else family for family in families}
    # Transformers reads a tokenizer in a folder of a Qwen2 model as Qwen2's own, which this one is not.
    words = {"tokenizer": checkpoint("llama")}
    content: dict[str, Any] = {
        "models": [
            {"name": family, "pretrained": checkpoint(named[family]), "model_args": words}
            for family in families
        ],
        "tasks": ["toy_choice", {"task": "toy_generate", "limit": 4}],
        "methods": ["static"],
        "recipe": {"protocol": "rapid", "layers": "1,2", "train_docs": 8, "selection_docs": 8, "epochs": 1},
        "evaluation": {"limit": 8},
        "include_path": toy_tasks(),
    }
    study = tmp_path / "study.yaml"
    study.write_text(yaml.safe_dump(content))
    done = CliRunner().invoke(
        aft, ["bench", str(study), "--output", str(tmp_path / "out"), "--device", "cpu"]
    )
    assert done.exit_code == 0, done.output
    assert "12 cells: 12 done" in done.output


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "qwen2", "phi", "stablelm", "mistral-window"])
def test_scoring_on_paper_makes_the_operations_that_a_real_model_makes(family: str) -> None:
    model = tiny_model(family, layers=6)
    packed = family != "mistral-window"
    documents = typical_documents("arc_easy", 0, 1)
    objective = make_objective("choice", "acc", ["acc"])
    engine = Trajectory(model, find_backbone(model), objective, packed=packed, budget=1024)
    cpu = Device("a CPU", "cpu", 1e10, 1e10, 1e10, 1e-6)
    protocol = Protocol("once", train_docs=2, selection_docs=2, epochs=1, seeds=1)
    plan = plan_cost(model.config, protocol, documents, device=cpu, dtype=torch.float32, budget=1024)
    assert plan.packed == packed
    # The longest one decides the memory only. Judged one by one, so that padding is none or the same.
    counted = sum(flops_of(lambda: engine.baseline([one], lambda _: None)) for one in documents[:-1])  # noqa: B023
    # Not to the last operation: older versions of transformers form the rotary angles by a matrix product.
    assert plan.scored.flops * len(documents[:-1]) == pytest.approx(counted, rel=1e-4)
