"""The main job: fit a vector on a harness task's training split."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lm_eval_aft.errors import AFTError
from lm_eval_aft.fingerprint import fingerprint
from lm_eval_aft.lm import AFTLM
from lm_eval_aft.training.card import write_card
from lm_eval_aft.training.controls import random_like, spoil
from lm_eval_aft.training.examples import encode
from lm_eval_aft.training.fit import Candidate
from lm_eval_aft.training.ledger import LEDGER, Ledger, drop_state, load_state, save_state
from lm_eval_aft.training.plan import Prepared, TrainingPlan, prepare
from lm_eval_aft.training.sweep import SweepResult, run_sweep
from lm_eval_aft.training.trajectory import make_engine
from lm_eval_aft.vector import SteeringVector

logger = logging.getLogger(__name__)


@dataclass
class TrainingResult:
    """A finished run.

    Attributes:
        vector: the chosen vector (median seed of the chosen layer).
        sweep: every layer's selection score.
        folder: where it was written, or ``None``.
        seconds: wall-clock time of the training itself.
        engine: which engine ran: ``packed``, ``unpacked`` or ``reference``.
    """

    vector: SteeringVector
    finalists: dict[int, SteeringVector]
    sweep: SweepResult
    folder: Path | None
    seconds: float
    engine: str
    counts: dict[str, int] = field(default_factory=dict)


def train_vector(
    model: str | AFTLM,
    task: str,
    output: str | os.PathLike[str] | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    model_args: dict[str, Any] | None = None,
    **settings: Any,
) -> TrainingResult:
    """Fit a vector on a task's training split, choosing layer and epoch on a selection split.

    Args:
        model: Hub name, local folder, ``demo``, or an `AFTLM` without a vector.
        task: harness task with a training split.
        output: folder to write the vector, model card and ledger into; ``None`` writes nothing.
        resume: go on with an interrupted run in ``output``.
        overwrite: replace what is in ``output``.
        model_args: arguments of lm-eval's ``hf`` model (``dtype``, ``revision``, ...).
        settings: fields of `TrainingPlan`.

    Raises:
        AFTError: see `prepare`; or the output folder is taken.
    """
    folder = None if output is None else Path(output)
    if folder is not None:
        check_output(folder, resume=resume, overwrite=overwrite)
    lm = model if isinstance(model, AFTLM) else AFTLM(model, **(model_args or {}))
    return run(prepare(lm, TrainingPlan(task=task, **settings)), folder, resume=resume, progress=progress)


def check_output(folder: Path, *, resume: bool = False, overwrite: bool = False) -> None:
    """Refuse an output folder that holds something, unless told what to do with it.

    Even then only a folder that a training run began is touched: overwriting empties it.
    """
    if folder.exists() and not folder.is_dir():
        raise AFTError(f"The output {folder} is a file.", "Give a folder.")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not (resume or overwrite):
        raise AFTError(
            f"The output folder {folder} is not empty.",
            "Choose another one, go on with --resume, or replace it with --overwrite.",
        )
    if not (folder / LEDGER).exists():
        raise AFTError(
            f"The output folder {folder} is not empty, and no training run wrote what is in it.",
            "Choose another folder.",
        )


def run(
    prepared: Prepared, folder: Path | None, *, resume: bool = False, progress: bool = True
) -> TrainingResult:
    """Carry out a prepared plan."""
    started = time.monotonic()
    plan, lm, splits = prepared.plan, prepared.lm, prepared.splits
    selection = encode(splits.selection, lm)
    train = {seed: encode(spoil(splits.train(seed), plan.control, seed), lm) for seed in plan.seed_range()}
    engine, engine_name = make_engine(lm.model, prepared.backbone, prepared.objective, selection)
    candidates = prepared.candidates()
    settings = {**plan.to_dict(), "fingerprint": fingerprint(lm.model, lm.tokenizer)}
    ledger = _open_run(folder, settings, candidates, resume)
    drawn = len(train[plan.first_seed])
    per_epoch = drawn + len(selection)
    left = [c for c in candidates if not c.stopped]
    bar = tqdm(
        total=sum((plan.recipe.epochs - c.epoch) * per_epoch for c in left) + len(selection),
        desc=f"training {len(prepared.layers)} layers x {plan.seeds} seeds",
        unit="doc",
        smoothing=0.05,
        disable=not progress,
    )

    def tick(done: int) -> None:
        bar.update(done)

    def after_epoch(candidate: Candidate, score: Any) -> None:
        if candidate.stopped:
            bar.total -= (plan.recipe.epochs - candidate.epoch) * per_epoch
        if ledger:
            ledger.append(
                event="epoch",
                candidate=candidate.name,
                layer=candidate.layer,
                seed=candidate.seed,
                epoch=candidate.epoch,
                norm=float(candidate.vector.detach().norm()),
                stopped=candidate.stopped,
                **score.to_dict(),
            )

    def save() -> None:
        for candidate in candidates:
            if ledger and candidate.stopped.endswith("not finite") and candidate.name not in reported:
                reported.add(candidate.name)
                ledger.append(event="dropped", candidate=candidate.name, reason=candidate.stopped)
        if ledger and folder:
            save_state(folder, settings, ledger, candidates)

    reported: set[str] = set()
    with bar:
        baseline = engine.baseline(selection, tick)
        if ledger and ledger.lines == 1:
            ledger.append(event="baseline", **baseline.to_dict())
        sweep = run_sweep(
            engine, candidates, train, selection, baseline, tick=tick, after_epoch=after_epoch, save=save
        )
    seconds = time.monotonic() - started
    metadata = _metadata(prepared, sweep, settings["fingerprint"], engine_name, seconds, drawn)
    finalists = {c.seed: _vector(c, metadata, plan.control) for c in sweep.chosen.candidates}
    vector = finalists[sweep.finalist.seed]
    result = TrainingResult(vector, finalists, sweep, folder, seconds, engine_name, splits.counts)
    if folder and ledger:
        _write(folder, result, ledger)
    return result


def _open_run(
    folder: Path | None, settings: dict[str, Any], candidates: Sequence[Candidate], resume: bool
) -> Ledger | None:
    if folder is None:
        return None
    check_output(folder, resume=True)
    ledger = Ledger(folder)
    if resume and folder.exists():
        if load_state(folder, settings, ledger, candidates):
            return ledger
        if (folder / "vector.safetensors").exists():
            raise AFTError(f"The run in {folder} is finished.", "Replace it with --overwrite.")
    try:
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
    except OSError as error:
        raise AFTError(f"Cannot write into {folder}: {error.strerror}.", "Choose another folder.") from error
    ledger.append(
        event="start", time=_now(), settings={k: v for k, v in settings.items() if k != "fingerprint"}
    )
    save_state(folder, settings, ledger, candidates)
    return ledger


def _vector(candidate: Candidate, metadata: dict[str, Any], control: str | None) -> SteeringVector:
    if candidate.best is None or candidate.best_score is None:
        raise AFTError(f"{candidate.name} has no finite score.", "Lower the learning rate.")
    own = {
        "seed": candidate.seed,
        "epoch": candidate.best_epoch,
        "selection": {**metadata["selection"], "vector": candidate.best_score.to_dict()},
    }
    vector = SteeringVector({candidate.layer: candidate.best}, metadata={**metadata, **own})
    return random_like(vector, candidate.seed) if control == "random" else vector


def _metadata(
    prepared: Prepared, sweep: SweepResult, identity: dict[str, Any], engine: str, seconds: float, drawn: int
) -> dict[str, Any]:
    plan, lm, splits = prepared.plan, prepared.lm, prepared.splits
    template = getattr(lm.tokenizer, "chat_template", None) if plan.prompts.apply_chat_template else None
    return {
        "num_hidden_layers": len(prepared.backbone.blocks),
        "base_model": {"name": _name(lm.pretrained), "revision": lm.revision},
        "fingerprint": identity,
        "task": plan.task,
        "task_version": str(splits.extractor.task.VERSION),
        "num_fewshot": splits.extractor.num_fewshot,
        "prompts": asdict(plan.prompts),
        "chat_template": template and hashlib.sha256(str(template).encode()).hexdigest(),
        "objective": prepared.objective.name,
        "metric": prepared.objective.metric,
        "control": plan.control,
        "protocol": {
            "name": "sweep",
            "layers": prepared.layers,
            "seeds": plan.seeds,
            **plan.recipe.to_dict(),
        },
        "engine": engine,
        "splits": {
            **splits.counts,
            "train": drawn,
            "selection_sha256": splits.selection_digest,
            "selection_documents": list(splits.selection_documents),
        },
        "selection": {
            "baseline": sweep.baseline.to_dict(),
            "layers": {
                str(result.layer): {"score": result.score, "accuracy": result.accuracy}
                for result in sweep.layers
            },
        },
        "seconds": round(seconds, 1),
        "created": _now(),
        "versions": {
            name: version(name) for name in ("lm-eval-aft", "torch", "transformers", "lm-eval", "datasets")
        }
        | {"python": platform.python_version()},
    }


def _write(folder: Path, result: TrainingResult, ledger: Ledger) -> None:
    for seed, vector in result.finalists.items():
        vector.save(folder / "seeds" / f"seed-{seed}.safetensors")
    chosen = result.sweep.finalist
    ledger.append(event="chosen", candidate=chosen.name, layer=chosen.layer, seed=chosen.seed, time=_now())
    write_card(folder, result.vector)
    # The vector last: a folder that has one is finished.
    result.vector.save(folder)
    drop_state(folder)


def _name(pretrained: Any) -> str:
    return str(pretrained if isinstance(pretrained, str) else getattr(pretrained, "name_or_path", ""))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
