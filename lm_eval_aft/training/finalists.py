"""What is settled of a run's finalists after the search: coefficients, and the scores headers state."""

from __future__ import annotations

from collections.abc import Sequence

from lm_eval_aft.intervention import Intervention
from lm_eval_aft.methods import METHODS
from lm_eval_aft.packing import Document
from lm_eval_aft.training.calibrate import Calibration, calibrate, norm_cap
from lm_eval_aft.training.fit import Candidate, Engine, Recipe, Tick
from lm_eval_aft.training.parallel import Workers
from lm_eval_aft.training.prepared import Prepared
from lm_eval_aft.training.sweep import SweepResult
from lm_eval_aft.training.trajectory import residual_norm
from lm_eval_aft.vector import SteeringVector


def coefficients(
    prepared: Prepared, engine: Engine, found: SweepResult, selection: Sequence[Document], tick: Tick
) -> dict[int, Calibration]:
    """The finalists' coefficients by seed, where the plan leaves them open.

    All get the one that was found for the chosen one, as far as their own norms allow.
    """
    plan, finalist = prepared.plan, found.finalist
    if not (plan.calibrate or plan.norm_cap) or finalist.best is None:
        return {}
    caps: dict[int, float | None] = {c.seed: None for c in found.chosen.candidates}
    if plan.norm_cap is not None:
        layers = finalist.intervention.layers
        norms = {at: residual_norm(prepared.lm.model, prepared.backbone, at, selection[:64]) for at in layers}
        for each in found.chosen.candidates:
            if each.best is not None:
                own = {at: each.best[f"layers.{at}"] for at in layers}
                caps[each.seed] = norm_cap(plan.norm_cap, norms, own)
    chosen = Calibration({}, 1.0, None)
    if plan.calibrate:
        cap = caps[finalist.seed]
        chosen = calibrate(engine, finalist, found.baseline, selection, cap, tick)
    return {seed: chosen.capped(cap) for seed, cap in caps.items()}


def score_again(
    finalists: dict[int, SteeringVector],
    found: SweepResult,
    engine: Engine,
    selection: Sequence[Document],
    workers: Workers,
) -> None:
    """Put the selection scores of the vectors as they are saved into their headers.

    What the search gave the trained directions at coefficient 1 stays beside them, as ``trained``.
    """
    group = []
    for seed, vector in finalists.items():
        own = {name: tensor.clone() for name, tensor in vector.tensors.items()}
        used = Intervention(METHODS[vector.method], own, vector.coefficient, vector.positions)
        group.append(Candidate(found.finalist.layer, seed, Recipe(), used, "finished"))
    scores = engine.evaluate(group, selection, lambda _: None) if workers.leads else []
    for vector, score in zip(finalists.values(), workers.agree(scores), strict=True):
        said = vector.metadata["selection"]
        vector.metadata["selection"] = {**said, "vector": score.to_dict(), "trained": said["vector"]}
