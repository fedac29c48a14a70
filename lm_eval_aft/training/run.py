"""Training a vector on a harness task's training split: `train_vector` and its steps."""

from __future__ import annotations

import itertools
import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from lm_eval_aft._util.errors import AFTError
from lm_eval_aft._util.files import exclusive_dir
from lm_eval_aft._util.pages import html_table, write_formats
from lm_eval_aft._util.process import is_main_process, now, postponed
from lm_eval_aft._util.tracking import Trackers
from lm_eval_aft.engine.batching import TokenizedDocument
from lm_eval_aft.engine.checks import baseline_not_finite, rows_may_be_packed
from lm_eval_aft.harness.examples import Example, encode
from lm_eval_aft.harness.splits import MixedSplits
from lm_eval_aft.lm import AFTLM
from lm_eval_aft.steering.fingerprint import fingerprint
from lm_eval_aft.steering.intervention import Intervention
from lm_eval_aft.steering.vector import SteeringVector
from lm_eval_aft.training.artifacts import (
    draw_sweep,
    finished_vector,
    layer_table,
    promoted_tokens,
    training_metadata,
    training_page,
    write_card,
)
from lm_eval_aft.training.candidate import Candidate, Engine, Recipe, Workers
from lm_eval_aft.training.checkpoint import (
    PAGE,
    PICTURE,
    Listener,
    RunRecorder,
    State,
    TrainingLedger,
    check_output,
    digest,
    drop_state,
    log_training,
    open_run,
    seed_file,
)
from lm_eval_aft.training.cost import Estimate, Forecast, Passes, UpperBlocks
from lm_eval_aft.training.onepass import OnePass, one_pass
from lm_eval_aft.training.recipe import Stage, TrainingPlan
from lm_eval_aft.training.rft import Rounds
from lm_eval_aft.training.setup import (
    Initializer,
    Prepared,
    apply_control,
    first_gradients,
    layer_order,
    load_model,
    prepare,
    rank_correlation,
)
from lm_eval_aft.training.sweep import Sweep, SweepResult, coefficients, score_again
from lm_eval_aft.training.trainer import Trajectory, make_engine, master_dtype, residual_norms

logger = logging.getLogger(__name__)
SCREENED = 64  # documents that the screen reads
SAMPLED = 64  # documents of either kind whose lengths a dry run takes for those of all


@dataclass
class TrainingResult:
    """A finished run.

    Attributes:
        vector: the chosen vector (median seed of the chosen layer).
        sweep: every layer's selection score; ``None`` for `rft`, whose rounds have one each.
        folder: where it was written, or ``None``.
        seconds: wall-clock time of the training itself.
        engine: which engine ran: ``packed``, ``unpacked`` or ``reference``.
    """

    vector: SteeringVector
    finalists: dict[int, SteeringVector]
    sweep: SweepResult | None
    folder: Path | None
    seconds: float
    engine: str
    counts: dict[str, int] = field(default_factory=dict)
    screen: dict[str, Any] | None = None

    def _repr_html_(self) -> str:
        """What a notebook shows: every layer's selection scores, which are not results."""
        return html_table(layer_table(self.vector)) if self.sweep else self.vector._repr_html_()


def train_vector(
    model: str | AFTLM,
    task: str | Sequence[str] | TrainingPlan,
    output: str | os.PathLike[str] | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    model_args: Mapping[str, Any] | None = None,
    documents: dict[Any, Any] | None = None,
    log: Sequence[str] = (),
    **settings: Any,
) -> TrainingResult:
    """Fit a vector on a task's training split, choosing layer and length (or epoch) on a selection split.

    Args:
        model: Hub name, local folder, ``demo``, or an `AFTLM` without a vector.
        task: harness task with a training split, or several (a list, or comma-separated); or a whole plan,
            without further settings.
        output: folder to write the vector, model card and ledger into; ``None`` writes nothing.
        resume: go on with an interrupted run in ``output``.
        overwrite: replace what is in ``output``.
        progress: show a progress bar.
        model_args: arguments of lm-eval's ``hf`` model (``dtype``, ``revision``, ...); without a
            ``dtype`` the fastest one is taken, see `lm_eval_aft.engine.precision`.
        documents: a dictionary in which calls with one `AFTLM` keep the documents they have built, for plans
            that differ in their recipe only.
        log: experiment trackers to log to, of `lm_eval_aft._util.tracking.TRACKERS`; needs an output folder.
        settings: ``protocol`` by name, changes to it (``lr=1e-2``), and fields of `TrainingPlan`.

    Raises:
        AFTError: see `prepare`; or the output folder is taken, or a tracker's package is missing.

    >>> result = train_vector("demo", "aft_demo_choice", train_docs=8, selection_docs=8, protocol="rapid",
    ...     layers="1", epochs=1, progress=False)
    >>> list(result.vector.layers)
    [1]
    """
    folder = None if output is None else Path(output)
    if log and folder is None:
        raise AFTError(
            "A run is logged with its output folder, and none was given.", "Give an output folder."
        )
    with Trackers(log, folder or "", model=str(model)) as trackers, exclusive_dir(folder):
        if folder is not None and is_main_process():
            check_output(folder, resume=resume, overwrite=overwrite)
        if isinstance(task, TrainingPlan) and settings:
            raise AFTError(
                f"A plan has its settings already: {', '.join(settings)}.", "Put them into the plan."
            )
        plan = task if isinstance(task, TrainingPlan) else TrainingPlan.of(task, **settings)
        prepared = prepare(load_model(model, model_args), plan, documents)
        listener = partial(log_training, trackers) if trackers else None
        return run(prepared, folder, resume=resume, progress=progress, listener=listener)


def run(
    prepared: Prepared,
    folder: Path | None,
    *,
    resume: bool = False,
    progress: bool = True,
    picture: bool = True,
    listener: Listener | None = None,
) -> TrainingResult:
    """Carry out a prepared plan, in a folder locked by the caller (`lm_eval_aft._util.files.exclusive_dir`).

    ``picture``: draw ``sweep.png`` and ``training.html``, which takes a second or two. ``listener``: see
    `open_run`.

    Raises:
        AFTError: the output folder cannot be used, nothing kept a finite score, or (`rft`) the model
            never writes a right answer.
    """
    if prepared.objective.note and is_main_process():
        logger.warning("%s", prepared.objective.note)
    if prepared.plan.rft is None:
        return run_sweep(
            prepared, folder, resume=resume, progress=progress, picture=picture, listener=listener
        )
    started = time.monotonic()
    train = partial(run_sweep, resume=True, progress=progress, picture=picture, listener=listener)
    rounds = Rounds(prepared, folder, train, resume=resume, progress=progress, listener=listener)
    vector, finalists = rounds.run()
    seconds, engine = time.monotonic() - started, str(vector.metadata["engine"])
    return TrainingResult(vector, finalists, None, folder, seconds, engine, prepared.splits.counts)


def run_sweep(
    prepared: Prepared,
    folder: Path | None,
    *,
    resume: bool = False,
    progress: bool = True,
    picture: bool = True,
    listener: Listener | None = None,
) -> TrainingResult:
    """Train a plan's candidates on its documents, once, and choose among them.

    Under `accelerate launch` the processes divide the candidates; the first one writes.
    """
    started = time.monotonic()
    plan, lm, splits, workers = prepared.plan, prepared.lm, prepared.splits, Workers()
    selection, train = _encoded(prepared)
    every = dict.fromkeys([*selection, *itertools.chain.from_iterable(train.values())])
    engine, engine_name = make_engine(lm.model, prepared.backbone, prepared.objective, list(every))
    identity = fingerprint(lm.model, lm.tokenizer)
    settings = {**plan.to_dict(), "fingerprint": identity, "documents": digest([selection, *train.items()])}
    log: TrainingLedger | None = None
    saved: dict[str, State] = {}
    if folder is not None and workers.is_main:
        log, saved = open_run(folder, settings, resume, listener)
    saved = workers.broadcast(saved)
    layers, screened = _screen(plan.screen, engine, prepared.sites, train[plan.first_seed])
    bar = _progress_bar(prepared.stages(), workers, len(selection), progress)
    with bar, postponed() as asked:
        events = RunRecorder(bar, folder, settings, log, saved, asked)
        shared: dict[str, Any] = {"seeds": plan.seeds(), "train": train, "selection": selection}
        shared |= {"events": events, "workers": workers, "saved": saved}
        steered = prepared.layers if plan.protocol.one_pass or prepared.method.steers_all_layers else layers
        norms = workers.broadcast(residual_norms(lm.model, prepared.backbone, steered, selection))
        sweep: Sweep | OnePass
        if plan.protocol.one_pass:
            sweep = one_pass(prepared, engine, norms=norms, **shared)
        else:
            start = Initializer(prepared, train, norms)
            sweep = Sweep(engine, plan.protocol, layers, start=start, norms=norms, **shared)
        baseline = sweep.baseline()
        if not math.isfinite(baseline.score):
            raise baseline_not_finite(lm.model)
        if log and log.lines == 1:
            note = {"note": prepared.objective.note} if prepared.objective.note else {}
            log.append(event="baseline", **baseline.to_dict(), **note)
        found = sweep.run()
        calibrations = (
            coefficients(prepared, engine, found, selection, events.tick) if workers.is_main else {}
        )
        calibrations = workers.broadcast(calibrations)
    if screened and plan.screen == "order":  # how well it agrees with the sweep of all layers
        changes = {result.layer: result.change for result in found.layers}
        agreement = rank_correlation(screened["order"], changes)
        screened |= {"rank_correlation": agreement} if math.isfinite(agreement) else {}
    seconds = time.monotonic() - started
    drawn = len(train[plan.first_seed])
    metadata = training_metadata(
        prepared,
        found,
        identity=identity,
        engine=engine_name,
        seconds=seconds,
        drawn=drawn,
        screen=screened,
    )
    # With one pass, random directions were searched themselves.
    placebo = None if plan.protocol.one_pass else plan.control
    finalists = {
        c.seed: finished_vector(c, metadata, placebo, calibrations.get(c.seed))
        for c in found.chosen.candidates
    }
    if calibrations or placebo == "random":
        score_again(finalists, found, engine, selection, workers)
    vector = finalists[found.finalist.seed]
    result = TrainingResult(vector, finalists, found, folder, seconds, engine_name, splits.counts, screened)
    if folder and log:
        _write(folder, result, prepared, log, picture)
    return result


def _encoded(prepared: Prepared) -> tuple[list[TokenizedDocument], dict[int, list[TokenizedDocument]]]:
    """The selection documents, and the training documents of each seed, as the model reads them."""
    plan, lm, splits = prepared.plan, prepared.lm, prepared.splits
    train = {seed: encode(apply_control(splits.train(seed), plan.control, seed), lm) for seed in plan.seeds()}
    if empty := [seed for seed, documents in train.items() if not documents]:
        raise AFTError(
            f"No training document of seed {empty[0]} has a usable gold answer.",
            "Check the task's YAML, or use more training documents.",
        )
    return encode(splits.selection, lm), train


def _progress_bar(stages: Sequence[Stage], workers: Workers, judged: int, shown: bool) -> Any:
    """Counts (candidate, document) pairs."""
    return tqdm(
        total=sum(stage.documents for stage in stages) // workers.size + judged,
        desc=f"{stages[0].name}: {stages[0].candidates} candidates",
        unit="doc",
        smoothing=0.05,
        disable=not (shown and workers.is_main),
    )


def cost(prepared: Prepared) -> Estimate:
    """What the plan would cost, by timing parts of a few passes; see `lm_eval_aft.training.cost`."""
    lm, plan, protocol = prepared.lm, prepared.plan, prepared.plan.protocol
    train = encode(apply_control(_some_training(prepared), plan.control, plan.first_seed), lm)
    selection = encode(prepared.splits.selection[:SAMPLED], lm)
    counts = (prepared.splits.drawn, len(prepared.splits.selection))
    shortest = min((*train, *selection), key=lambda document: document.tokens(False))
    ways: list[dict[str, bool]] = [{"packed": True}, {"packed": False}, {"whole": True}]
    for way in ways if rows_may_be_packed(lm.model, [*train, *selection]) else ways[1:]:
        try:
            engine = UpperBlocks(lm.model, prepared.backbone, prepared.objective, like=shortest, **way)
            return Forecast(
                engine,
                partial(_probe, prepared),
                prepared.sites,
                Passes.of(train, engine, counts[0] if protocol.one_pass else protocol.batch_size, counts[0]),
                Passes.of(selection, engine, None, counts[1]),
                counts[1],
                prepared.stages(),
                protocol,
            ).estimate()
        except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
            # As in a run: packed rows, then unpacked ones resumed from a layer, then whole passes.
            if "whole" in way:
                raise
            logger.info("Could not be timed with %s: %s", way, error)
    raise AssertionError("the last way returns or raises")


def _some_training(prepared: Prepared) -> list[Example]:
    """The first training documents that a run draws; building them all may take long."""
    splits = prepared.splits
    parts = splits.parts if isinstance(splits, MixedSplits) else [splits]
    few = [replace(part, train_docs=min(part.drawn, -(-SAMPLED // len(parts)))) for part in parts]
    drawn = replace(splits, parts=few) if isinstance(splits, MixedSplits) else few[0]
    return drawn.train(prepared.plan.first_seed)


def _probe(prepared: Prepared, layer: int) -> Candidate:
    """A candidate as the run's, at any layer; of a method that steers all, what is above the layer."""
    method, parameter = prepared.method, next(prepared.lm.model.parameters())
    others = [each for each in prepared.layers if each > layer] if method.steers_all_layers else []
    width = prepared.backbone.hidden_size
    tensors = method.initial_tensors(width, (layer, *others), torch.Generator())
    own = {k: v.to(parameter.device, master_dtype(parameter.dtype)) for k, v in tensors.items()}
    positions = "all" if prepared.plan.positions == "auto" else prepared.plan.positions
    return Candidate(layer, 0, Recipe(), Intervention(method, own, positions=positions))


def _screen(
    screen: str, engine: Engine, layers: list[int], documents: Sequence[TokenizedDocument]
) -> tuple[list[int], dict[str, Any] | None]:
    """The layers to sweep, in order, and the screen's result."""
    if screen == "off":
        return layers, None
    if not isinstance(engine, Trajectory):
        logger.warning("No screen: it needs the fast engine, which this model does not allow.")
        return layers, None
    gradients = first_gradients(engine, documents[:SCREENED])
    order = layer_order(gradients, layers)
    result = {"order": order, "gradient_norm": {str(k): float(v.norm()) for k, v in gradients.items()}}
    return (order if screen == "order" else sorted(order[: int(screen)])), result


def _write(
    folder: Path, result: TrainingResult, prepared: Prepared, ledger: TrainingLedger, picture: bool
) -> None:
    for seed, vector in result.finalists.items():
        vector.save(seed_file(folder, seed))
    if result.sweep is not None:
        chosen = result.sweep.finalist
        length = {"norm": result.vector.norm(), "share": result.vector.share()}
        own = {"layer": chosen.layer, "seed": chosen.seed, **length}
        ledger.append(event="chosen", candidate=chosen.name, **own, time=now())
    write_card(folder, result.vector)
    if picture:
        _draw(folder, result, prepared, ledger)
    # The vector last: a folder that has one is finished.
    result.vector.save(folder)
    drop_state(folder)


def _draw(folder: Path, result: TrainingResult, prepared: Prepared, ledger: TrainingLedger) -> None:
    """Draw ``sweep.png`` and ``training.html``; what fails here is told, and the vector is kept."""

    def picture() -> None:
        if result.sweep is not None:
            draw_sweep(result.sweep, str(result.vector.metadata["metric"]), folder / PICTURE)

    def page() -> None:
        lm = prepared.lm
        promoted = promoted_tokens(lm.model, lm.tokenizer, prepared.backbone, result.vector)
        text = training_page(result.vector, result.finalists, list(ledger.read()), promoted)
        write_formats({"html": text}, folder, Path(PAGE).stem)

    for name, draw in ((PICTURE, picture), (PAGE, page)):
        try:
            draw()
        except Exception as error:
            logger.warning("%s could not be drawn: %s: %s", name, type(error).__name__, error)
