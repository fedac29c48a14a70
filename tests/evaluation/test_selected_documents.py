"""Choosing on the documents reported: what noise alone gives, and that it never passes for a result."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lm_eval_aft.evaluation.compare import VerdictRow, compare_runs, judge
from lm_eval_aft.evaluation.provenance import HASH_DIGITS, VectorInfo
from lm_eval_aft.evaluation.results import Sample, ScoredRun, TaskRun
from lm_eval_aft.evaluation.stats import NO_DIFFERENCE

LAYERS, SELECTION, FRESH, SEEDS = 24, 30, 300, 200
NOT_ASSESSABLE = "not assessable: selected on these documents"


def doc_hash(i: int) -> str:
    return hashlib.sha256(f"document {i}".encode()).hexdigest()


def run_of(name: str, outcomes: np.ndarray[Any, Any], first: int) -> ScoredRun:
    samples = {
        i: Sample(doc_hash(first + i), "", b"", b"", False, 2, None, {"acc": float(value)}, {}, 0)
        for i, value in enumerate(outcomes)
    }
    task = TaskRun("arc", {"results": {}}, Path("results.json"), Path("samples.jsonl"), {"none": samples})
    return ScoredRun(name, "baseline" if name == "baseline" else "steered", {"arc": task})


def judged(
    before: np.ndarray[Any, Any], after: np.ndarray[Any, Any], first: int, info: VectorInfo
) -> VerdictRow:
    baseline, steered = run_of("baseline", before, first), run_of("steered", after, first)
    (row,) = judge(baseline, [(steered, each) for each in compare_runs(baseline, steered)], {"steered": info})
    return row


def test_a_sweep_chosen_on_the_documents_reported() -> None:
    """24 layers without any effect, the best on 30 documents chosen; 200 times."""
    known = VectorInfo("steered", "vector", None, selection_documents=[doc_hash(i)[:16] for i in range(30)])
    confessed = VectorInfo("steered", "vector", None, biased=True)
    gains, claims = [], 0
    for seed in range(SEEDS):
        rng = np.random.default_rng(seed)
        n = SELECTION + FRESH
        baseline = rng.random(n) < 0.3
        # A vector without effect changes some answers, for better as often as for worse.
        redrawn = rng.random((LAYERS, n)) < 0.5
        layers = np.where(redrawn, rng.random((LAYERS, n)) < 0.3, baseline)
        best = int(np.argmax(layers[:, :SELECTION].mean(axis=1)))
        for info in (known, confessed):
            row = judged(baseline[:SELECTION], layers[best, :SELECTION], 0, info)
            assert (row.verdict, row.p_adjusted, row.family) == (NOT_ASSESSABLE, None, False)
        gains.append(row.difference)
        # One shared document is enough.
        assert judged(baseline[29:], layers[best, 29:], 29, known).verdict == NOT_ASSESSABLE
        fresh = judged(baseline[SELECTION:], layers[best, SELECTION:], SELECTION, known)
        assert fresh.family
        claims += fresh.verdict != NO_DIFFERENCE
    # The noise that the verdict withholds is a headline: around +15 points.
    assert np.mean(gains) > 0.1
    # Exact McNemar keeps 5 %; 200 draws at that rate exceed 16 one time in fifty.
    assert claims <= 16


@pytest.mark.slow
def test_fresh_documents_give_the_nominal_rate() -> None:
    """At most 5.5 % of 4,000 vectors chosen elsewhere get a verdict on fresh documents."""
    info = VectorInfo(
        "steered", "vector", None, selection_documents=[doc_hash(i)[:HASH_DIGITS] for i in range(30)]
    )
    claims = 0
    for seed in range(4000):
        rng = np.random.default_rng(10_000 + seed)
        baseline = rng.random(FRESH) < 0.3
        after = np.where(rng.random(FRESH) < 0.5, rng.random(FRESH) < 0.3, baseline)
        claims += judged(baseline, after, SELECTION, info).verdict != NO_DIFFERENCE
    assert claims / 4000 <= 0.055
