"""How a finished cell came out: its scores against its baseline's, and what its vector is."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from lm_eval_aft.bench.matrix import Cell
from lm_eval_aft.bench.store import Store
from lm_eval_aft.reporting.notes import warnings
from lm_eval_aft.reporting.pairing import compare_runs, require_comparable
from lm_eval_aft.reporting.results import Run, read_run
from lm_eval_aft.reporting.vectors import describe_vector
from lm_eval_aft.reporting.verdicts import judge
from lm_eval_aft.vector import SteeringVector


def assess(cell: Cell, store: Store) -> dict[str, Any]:
    """Compare a cell's scores with its baseline's, document by document.

    Returns plain values: ``rows`` (see `lm_eval_aft.reporting.verdicts.Row`; p-values not yet adjusted for
    the other cells), ``vector`` (what it is and how it was chosen), ``notes``.

    Raises:
        AFTError: scores or vector damaged or missing, or runs that were not asked the same.
    """
    baseline = read_run(store.baseline(cell.baseline_key), "baseline", "baseline")
    place = store.scores(cell.key)
    kind = "placebo" if cell.control else "steered"
    runs = [_named(read_run(place / "steered", "steered", kind), store.vector(cell.vector_key))]
    runs += [
        read_run(folder, f"placebo/{folder.name}", "placebo") for folder in sorted(place.glob("placebo/*"))
    ]
    comparisons = []
    for run in runs:
        require_comparable(baseline, run)
        comparisons += [(run, each) for each in compare_runs(baseline, run)]
    infos = {run.name: describe_vector(run) for run in runs}
    rows = judge(baseline, comparisons, infos)
    return {
        "rows": [asdict(row) for row in rows],
        "vector": _vector(SteeringVector.load(store.vector(cell.vector_key))),
        "notes": warnings(baseline, runs, list(infos.values()), rows),
    }


def _named(run: Run, vector: Path) -> Run:
    """The run with its vector where it lies now: a study's folder may have been moved."""
    for each in run.tasks.values():
        each.results["config"]["model_args"]["vector"] = str(vector)
    return run


def _vector(vector: SteeringVector) -> dict[str, Any]:
    facts = vector.metadata
    selection, protocol = facts.get("selection") or {}, facts.get("protocol") or {}
    chosen, baseline = (selection.get(key) or {} for key in ("vector", "baseline"))
    return {
        "sha256": vector.digest(),
        "layers": list(vector.layers),
        "depth": facts.get("num_hidden_layers"),
        "norm": vector.norm(),
        "epoch": facts.get("epoch"),
        "chosen": protocol.get("chosen"),
        "selection_change": chosen.get("score", 0.0) - baseline.get("score", 0.0),
        "retries": protocol.get("retries_used", 0),
        "pruned": protocol.get("pruned") or _no_round(facts.get("rft") or {}),
        "engine": facts.get("engine"),
        "train": (facts.get("splits") or {}).get("train"),
    }


def _no_round(rft: dict[str, Any]) -> str:
    return "no round of rejection sampling beat the baseline" if rft.get("best_round") == 0 else ""
