"""What a vector's header says of its training."""

from __future__ import annotations

import hashlib
import platform
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from lm_eval_aft.errors import AFTError
from lm_eval_aft.training.calibrate import Calibration
from lm_eval_aft.training.controls import random_like
from lm_eval_aft.training.fit import Candidate
from lm_eval_aft.training.objectives import loss_of
from lm_eval_aft.training.parallel import Workers
from lm_eval_aft.training.prepared import Prepared
from lm_eval_aft.training.sweep import LayerResult, SweepResult
from lm_eval_aft.vector import SteeringVector


def finished_vector(
    candidate: Candidate,
    metadata: dict[str, Any],
    control: str | None,
    calibration: Calibration | None = None,
) -> SteeringVector:
    """A finalist's best epoch as a vector; a random direction of its norm for that control.

    Raises:
        AFTError: it never had a finite score.
    """
    if candidate.best is None or candidate.best_score is None:
        raise AFTError(f"{candidate.name} has no finite score.", "Lower the learning rate.")
    own = {
        "seed": candidate.seed,
        "epoch": candidate.best_epoch,
        "selection": {**metadata["selection"], "vector": candidate.best_score.to_dict()},
    }
    intervention = candidate.intervention
    if calibration:
        own["calibration"] = calibration.to_dict()
    vector = SteeringVector.from_tensors(
        candidate.best,
        coefficient=calibration.coefficient if calibration else 1.0,
        positions=intervention.positions,
        method=intervention.method.name,
        metadata={**metadata, **own},
    )
    return random_like(vector, candidate.seed) if control == "random" else vector


def training_metadata(
    prepared: Prepared,
    sweep: SweepResult,
    identity: dict[str, Any],
    engine: str,
    seconds: float,
    drawn: int,
    screen: dict[str, Any] | None,
) -> dict[str, Any]:
    """The header entries that all finalists of a run share.

    Args:
        identity: the base model's fingerprint.
        drawn: training documents a seed draws.
        screen: what the screen said, if it ran.
    """
    plan, lm, splits = prepared.plan, prepared.lm, prepared.splits
    template = getattr(lm.tokenizer, "chat_template", None) if plan.prompts.apply_chat_template else None
    return {
        "num_hidden_layers": len(prepared.backbone.blocks),
        "base_model": {"name": _name(lm.pretrained), "revision": lm.revision},
        "fingerprint": identity,
        **_tasks(prepared),
        "prompts": asdict(plan.prompts),
        "chat_template": template and hashlib.sha256(str(template).encode()).hexdigest(),
        "objective": prepared.objective.name,
        "metric": prepared.objective.metric,
        "loss": loss.to_dict() if (loss := loss_of(prepared.objective)) else None,
        "control": plan.control,
        "parameters": prepared.method.parameters(prepared.backbone.hidden_size, len(prepared.layers)),
        "protocol": {
            **plan.protocol.to_dict(),
            "layers": prepared.layers,
            "chosen": dict(zip(("layer", "lr", "l2"), sweep.finalist.setting, strict=True)),
            "retries_used": sweep.retries,
            "pruned": sweep.pruned,
            **({"screen_result": screen} if screen else {}),
        },
        "engine": engine,
        "dtype": str(lm.model.dtype).removeprefix("torch."),
        "processes": Workers().size,
        "splits": {
            **splits.counts,
            "train": drawn,
            "selection_sha256": splits.selection_digest,
            "selection_documents": list(splits.selection_documents),
        },
        "selection": {
            "baseline": sweep.baseline.to_dict(),
            "layers": {str(result.layer): _layer(result, sweep) for result in sweep.layers},
        },
        "seconds": round(seconds, 1),
        "created": now(),
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    packages = ("lm-eval-aft", "torch", "transformers", "lm-eval", "datasets")
    return {name: version(name) for name in packages} | {"python": platform.python_version()}


def _tasks(prepared: Prepared) -> dict[str, Any]:
    """What was trained on. Of several tasks ``num_fewshot`` is what they share; ``tasks`` tells each's own.

    Their own selection scores stand in ``selection``, under ``tasks`` of the baseline's and the vector's.
    """
    parts, plan = prepared.parts, prepared.plan
    shots = {part.num_fewshot for part in parts}
    found: dict[str, Any] = {
        "task": plan.task,
        "task_version": ",".join(str(part.splits.extractor.task.VERSION) for part in parts),
        "num_fewshot": shots.pop() if len(shots) == 1 else None,
    }
    if len(parts) > 1:
        found["tasks"] = [
            {
                "task": part.name,
                "task_version": str(part.splits.extractor.task.VERSION),
                "num_fewshot": part.num_fewshot,
                "metric": part.objective.metric,
                "splits": {
                    **part.splits.counts,
                    "train": len(part.splits.train(plan.first_seed)),
                    "selection_sha256": part.splits.selection_digest,
                },
            }
            for part in parts
        ]
    return found


def _layer(result: LayerResult, sweep: SweepResult) -> dict[str, Any]:
    """A layer's outcome on the scale of the whole selection split.

    Layers that left early were judged on fewer documents: the difference from the baseline there
    is added to the baseline's score on all of them.
    """
    accuracy = sweep.baseline.accuracy + result.accuracy - result.baseline.accuracy
    return {
        "score": sweep.baseline.score + result.change,
        "accuracy": min(1.0, max(0.0, accuracy)),
        "stage": result.stage,
        "n": result.baseline.n,
    }


def _name(pretrained: Any) -> str:
    return str(pretrained if isinstance(pretrained, str) else getattr(pretrained, "name_or_path", ""))


def now() -> str:
    """The time in UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")
