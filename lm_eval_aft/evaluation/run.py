"""Scoring baseline, vectors and placebos on the same tasks, into ordinary lm-eval result folders."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval_aft._util.errors import AFTError
from lm_eval_aft._util.files import canonical_json, exclusive_dir, replacing, sha256
from lm_eval_aft._util.private_names import borrowed, require
from lm_eval_aft.engine.routing import Routing, whole_spec
from lm_eval_aft.evaluation.results import unfinished
from lm_eval_aft.harness.tasks import (
    check_names,
    environment_asked_once,
    require_scorable,
    scorable,
    task_manager_for,
)
from lm_eval_aft.library.load import folder_of, load_vector
from lm_eval_aft.library.store import Library
from lm_eval_aft.lm import AFTLM
from lm_eval_aft.steering.vector import SteeringVector
from lm_eval_aft.steering.vector_file import FILE_NAME
from lm_eval_aft.training.controls import random_like

if TYPE_CHECKING:
    from lm_eval.config.evaluate_config import EvaluatorConfig
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.tasks import TaskManager

# lm-eval's flags that are about what becomes of one run's results.
UNSERVED = (
    "predict_only",
    "show_config",
    "hf_hub_log_args",
    "wandb_args",
    "wandb_config_args",
    "trackio_args",
)
# Arguments of `AFTLM` that differ from run to run.
OWN_ARGUMENTS = frozenset({"vector", "route", "library", "answer_only"})


def evaluate_pair(
    model: str,
    vectors: str | Sequence[str],
    tasks: Sequence[str],
    output: str | Path,
    *,
    placebo: str = "none",
    all_seeds: bool = False,
    library: str | Path | None = None,
    routes: Sequence[str] = (),
    answer_only: bool = False,
    model_args: dict[str, Any] | None = None,
    flags: Sequence[str] = (),
    resume: bool = False,
) -> list[PlannedRun]:
    """Score the baseline and every vector (and placebos, and routers) with lm-eval.

    Log-likelihoods of baseline, vectors and placebos are found in one go, sharing tokens, batches and
    the blocks below each vector's layer; generation runs once for each, and so does a router, whose
    samples say in ``steered_by`` which vector each document got. Returns the runs, baseline first;
    compare them with `lm_eval_aft.evaluation.results`.

    Each run lands in ``output/<name>`` exactly as ``lm_eval --model aft --log_samples`` would
    write it, and appears there whole or not at all. Log-softmax is taken in fp32 on every side unless
    ``model_args`` says otherwise.

    Args:
        library: folder of the library that names come from; default the user's own.
        routes: routers over it, each a run of its own, ``steered/routed-...``.
        answer_only: score the baseline and every vector with the contexts removed too, as
            ``answer-only/...``, on those tasks that have options or answers to score.
        model_args: further arguments of `AFTLM`. ``coefficient`` and ``positions`` replace those of every
            vector, placebo and routed vector.
        flags: further flags of ``lm_eval run``, for example ``["--limit", "50"]``.
        resume: keep the runs that are in ``output`` already, and score the others.

    Raises:
        AFTError: bad input; an output folder that already holds such runs, or was asked something else;
            or another process is writing there.
    """
    shelf = None if library is None else str(library)
    chosen = [vectors] if isinstance(vectors, str) else vectors
    runs = plan_runs(chosen, placebo, all_seeds, library=shelf, routes=routes, answer_only=answer_only)
    if not vectors and (answer_only or not routes):
        raise AFTError(
            "There is nothing to compare with the baseline.",
            "--answer-only needs a vector." if answer_only else "Give a vector or a router.",
        )
    folder = Path(output)
    arguments = {"softmax_dtype": "float32", **(model_args or {})}
    if own := sorted(OWN_ARGUMENTS & arguments.keys()):
        raise AFTError(
            f"{', '.join(own)} among the model arguments would be the same in every run, the baseline too.",
            "Say what steers by --vector, --route, --library and --answer-only.",
        )
    asked = {"model": model, "model_args": arguments, "tasks": list(tasks), "flags": list(flags)}
    with exclusive_dir(folder):
        missing, note = lacking(folder, runs, asked, shelf, resume)
        if missing:
            _evaluate(model, arguments, missing, tasks, folder, flags, shelf, answer_only, note)
    return runs


def _evaluate(
    model: str,
    arguments: dict[str, Any],
    runs: Sequence[PlannedRun],
    tasks: Sequence[str],
    folder: Path,
    flags: Sequence[str],
    shelf: str | None,
    answer_only: bool,
    note: str,
) -> None:
    arguments = dict(arguments)
    config, manager = _opened(model, arguments, tasks, folder, flags)
    if answer_only:
        _announce(require_scorable(manager.load(list(tasks))["tasks"])[1])
    device = arguments.pop("device", None) or (None if config.device == "cuda:0" else config.device)
    lm = AFTLM(
        model,
        **arguments,
        batch_size=config.batch_size,
        max_batch_size=config.max_batch_size or 64,
        device=device,
    )
    mismatch = bool(arguments.get("allow_mismatch", False))
    replaced = {key: arguments.get(key) for key in ("coefficient", "positions")}
    in_force, routings = [], {}
    for run in runs:  # every vector must fit before hours are spent on the first
        lm.steer(run.vector, **replaced, allow_mismatch=mismatch)
        in_force += [lm.vector] if lm.vector is not None else []
        if run.route is not None:
            routing = lm.routing_of(run.route, Library(shelf), allow_mismatch=mismatch)
            routings[run.name] = routing.adjusted(**replaced)
    lm.score_along(in_force)
    if int(os.environ.get("RANK", "0")) == 0:
        note_asked(folder, note)
    described_once: list[str] = []
    for run in runs:
        print(f"scoring {run.name} on {', '.join(tasks)}", flush=True)
        lm.answer_only = run.answer_only
        if run.name in routings:
            lm.follow(routings[run.name])
        else:
            lm.steer(run.vector, **replaced, allow_mismatch=mismatch)
        described = {"pretrained": model, **arguments}
        if shelf is not None and run.spec is not None:
            described["library"] = shelf
        if run.answer_only:
            described["answer_only"] = True
        with environment_asked_once(described_once):
            score(lm, run, config, manager, folder / run.name, described)


def _opened(
    model: str, arguments: dict[str, Any], tasks: Sequence[str], folder: Path, flags: Sequence[str]
) -> tuple[EvaluatorConfig, TaskManager]:
    """The flags as lm-eval reads them, and a manager that knows the tasks."""
    config = read_flags(tasks, folder, flags)
    # As lm-eval does: tasks that build their documents for a model are told of it.
    config.metadata = {"pretrained": model, **arguments, **(config.metadata or {})}
    included = [config.include_path] if config.include_path else []
    manager = task_manager_for(tasks, included, metadata=config.metadata)
    check_names(tasks, manager)
    return config, manager


def read_flags(tasks: Sequence[str], folder: Path, flags: Sequence[str] = ()) -> EvaluatorConfig:
    """Read lm-eval's own flags with lm-eval's own parser.

    Raises:
        AFTError: lm-eval refuses them, or they name model arguments.
    """
    with borrowed("lm-eval: lm_eval._cli.run.Run, EvaluatorConfig.from_cli"):
        from lm_eval._cli.run import Run as StockRun
        from lm_eval.config.evaluate_config import EvaluatorConfig

        create, from_cli = StockRun.create, EvaluatorConfig.from_cli
    parser = argparse.ArgumentParser(prog="lm_eval")
    create(parser.add_subparsers())
    ours = ["--model", "aft", "--tasks", ",".join(tasks), "--log_samples", "--output_path", str(folder)]
    try:
        config = from_cli(parser.parse_args(["run", *ours, *flags]))
    except ValueError as error:
        raise AFTError(f"lm-eval refuses these flags: {error}", "See `lm_eval run --help`.") from error
    if config.model_args:
        raise AFTError("Model arguments belong before the `--`.", "Use --model-args of `aft eval`.")
    asked = [flag for flag in UNSERVED if getattr(config, flag, None)]
    if asked:
        raise AFTError(
            f"--{asked[0]} has no meaning for several runs at once.",
            "Leave it out, or run `lm_eval --model aft` for each.",
        )
    return config


def score(
    lm: AFTLM,
    run: PlannedRun,
    config: EvaluatorConfig,
    manager: TaskManager,
    folder: Path,
    model_args: dict[str, Any],
) -> None:
    """Score what is in force on ``lm``, and write lm-eval's ordinary result files into ``folder``.

    The folder appears whole or not at all.

    Args:
        run: names the vector in force, if it has a place.
        config: the evaluation, as `read_flags` makes it.
        model_args: what the results say the model was loaded with.

    Raises:
        AFTError: the results cannot be written.
    """
    from lm_eval.loggers import EvaluationTracker

    require(
        "lm-eval: EvaluationTracker.general_config_tracker, save_results_aggregated, save_results_samples"
    )
    if run.spec is not None:
        model_args = {**model_args, "vector": run.spec}
    if lm.routing is not None:
        model_args = {**model_args, "library": str(lm.routing.library), "route": lm.routing.spec}
    place = unfinished(folder)
    tracker = EvaluationTracker(output_path=str(place))
    results = _evaluated(lm, _tasks(run, config, manager), config, manager, tracker)
    if results is None:  # not the main process
        return
    shutil.rmtree(place, ignore_errors=True)  # of a process that died in here
    samples = results.pop("samples")
    if lm.routing is not None:
        _say_routes(lm.routing, results, samples)
    results["config"] |= {"model": "aft", "model_args": model_args}
    tracker.general_config_tracker.log_experiment_args(
        "aft",
        model_args,
        config.system_instruction,
        lm.chat_template(config.apply_chat_template) if config.apply_chat_template else None,
        bool(config.fewshot_as_multiturn),
    )
    tracker.save_results_aggregated(results=results, samples=samples)
    for task in results["configs"]:
        tracker.save_results_samples(task_name=task, samples=samples[task])
    if not whole(place, {task: len(samples[task]) for task in results["configs"]}):
        # The tracker logs failures to write, and goes on.
        raise AFTError(f"The results could not be written to {folder}.", "Check its rights and free space.")
    place.rename(folder)


def _tasks(run: PlannedRun, config: EvaluatorConfig, manager: TaskManager) -> list[Any]:
    tasks: list[Any] = config.tasks.split(",") if isinstance(config.tasks, str) else list(config.tasks)
    if not run.answer_only:
        return tasks
    # The tasks themselves: by their names they would lose their group's settings.
    loaded = manager.load(tasks)["tasks"]
    return [loaded[name] for name in scorable(loaded)[0]]


def _evaluated(
    lm: AFTLM, tasks: list[Any], config: EvaluatorConfig, manager: TaskManager, tracker: EvaluationTracker
) -> Any:
    """lm-eval's results; ``None`` where another process has them."""
    from lm_eval import simple_evaluate

    seeds = config.seed or [None] * 4
    return simple_evaluate(
        model=lm,
        tasks=tasks,
        num_fewshot=config.num_fewshot,
        batch_size=config.batch_size,
        max_batch_size=config.max_batch_size,
        device=str(lm.device),
        use_cache=config.use_cache,
        limit=config.limit,
        samples=config.samples,
        cache_requests=config.cache_requests.get("cache_requests", False),
        rewrite_requests_cache=config.cache_requests.get("rewrite_requests_cache", False),
        delete_requests_cache=config.cache_requests.get("delete_requests_cache", False),
        check_integrity=config.check_integrity,
        write_out=config.write_out,
        log_samples=True,
        system_instruction=config.system_instruction,
        apply_chat_template=config.apply_chat_template,
        fewshot_as_multiturn=bool(config.fewshot_as_multiturn),
        gen_kwargs=config.gen_kwargs or None,
        task_manager=manager,
        evaluation_tracker=tracker,
        random_seed=seeds[0],
        numpy_random_seed=seeds[1],
        torch_random_seed=seeds[2],
        fewshot_random_seed=seeds[3],
        confirm_run_unsafe_code=config.confirm_run_unsafe_code,
        metadata=config.metadata,
    )


def _announce(left_out: dict[str, str]) -> None:
    for task, why in left_out.items():
        print(f"answer-only runs leave out {task}: {why}", flush=True)


def _say_routes(routing: Routing, results: dict[str, Any], samples: dict[str, Any]) -> None:
    """Note in every logged sample which vector it got.

    The router is asked again: other processes and lm-eval's cache may have answered for it.
    """
    for task, logged in samples.items():
        for sample in logged:
            name = routing.pick(task, sample["doc_id"], sample["doc"], str(sample["arguments"][0][0]))
            sample["steered_by"] = name
    results["config"]["aft"]["routing"] = routing.info()


# The model states that an evaluation scores, and what their result folders are called.

# Characters of a run's name that come from an expression.
LONGEST_LABEL = 80


@dataclass(frozen=True)
class PlannedRun:
    """One model state to score: ``name`` is also its folder below the output.

    ``answer_only`` runs score the tasks that can do without their questions; see `lm_eval_aft.harness.tasks`.
    """

    name: str
    spec: str | None = None
    vector: SteeringVector | None = None
    route: str | None = None
    answer_only: bool = False


def plan_runs(
    vectors: Sequence[str],
    placebo: str = "none",
    all_seeds: bool = False,
    *,
    library: str | None = None,
    routes: Sequence[str] = (),
    answer_only: bool = False,
) -> list[PlannedRun]:
    """The runs an evaluation needs: the baseline, then vectors and routers, placebos, answer-only runs.

    Args:
        vectors: what `load_vector` takes.
        placebo: ``none`` or ``random:N``, N directions of the vector's norm at its layers.
        all_seeds: score every finalist of each vector folder, not only the chosen one.
        library: folder of the library that names come from.
        routes: routers over that library, as ``--model aft`` takes them.
        answer_only: score baseline and vectors without the questions too; routers pick by the question.

    Raises:
        AFTError: a vector that cannot be read, or an unknown placebo or router.
    """
    match = re.fullmatch(r"none|random(?::(\d+))?", placebo)
    if not match:
        raise AFTError(f"There is no placebo {placebo!r}.", "Use none or random:N, for example random:3.")
    draws = 0 if placebo == "none" else int(match[1] or 3)
    runs = [PlannedRun("baseline")]
    placebos = []
    for spec in vectors:
        name = _unique(f"steered/{vector_label(spec)}", runs)
        vector = load_vector(spec, library)
        runs.append(PlannedRun(name, spec, vector))
        if all_seeds:
            folder = folder_of(spec, library)
            finalists = sorted((folder / "seeds").glob("*.safetensors")) if folder else []
            if not finalists:
                raise AFTError(f"{spec} has no seeds/ with other finalists.", "Leave out --all-seeds.")
            for each in finalists:
                runs.append(PlannedRun(_unique(f"{name}-{each.stem}", runs), str(each), load_vector(each)))
        for seed in range(draws):
            placebos.append(
                PlannedRun(
                    f"placebo/{name.removeprefix('steered/')}-random-{seed}",
                    vector=random_like(vector, seed),
                )
            )
    for route in routes:
        kind, _, rest = whole_spec(route).partition(":")
        table = "" if not rest else f"-{Path(rest).stem if Path(rest).is_file() else _label(rest)}"
        runs.append(PlannedRun(_unique(f"steered/routed-{kind}{table}", runs), route=whole_spec(route)))
    return [*runs, *placebos, *(_bare(runs) if answer_only else [])]


def _bare(runs: Sequence[PlannedRun]) -> list[PlannedRun]:
    """The same model states, but for routers, to be scored without the questions."""
    found: list[PlannedRun] = []
    for run in (each for each in runs if each.route is None):
        name = _unique(f"answer-only/{run.name.removeprefix('steered/')}", found)
        found.append(replace(run, name=name, answer_only=True))
    return found


def vector_label(spec: str) -> str:
    """What a vector's run is called: a file's or folder's own name, else all of the spec, made a file name.

    ``math/algebra*0.7 + logic/analogy*0.3`` becomes ``math-algebrax0.7+logic-analogyx0.3``.
    """
    path = Path(spec)
    try:
        if path.suffix == ".safetensors":
            return path.stem
        if path.exists():
            return path.resolve().name
    except OSError:  # too long for a path
        pass
    return _label(spec)


def _label(text: str) -> str:
    plain = re.sub(r"\s+", "", text).replace("/", "-").replace("*", "x")
    plain = re.sub(r"[^\w.+-]+", "_", plain).strip(".-_") or "vector"
    if len(plain) <= LONGEST_LABEL:
        return plain
    return f"{plain[:LONGEST_LABEL]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _unique(name: str, runs: Sequence[PlannedRun]) -> str:
    taken = {run.name for run in runs}
    if name.endswith(".json"):  # lm-eval would take it for a file
        name += "_"
    candidate, count = name, 2
    while candidate in taken:
        candidate, count = f"{name}-{count}", count + 1
    return candidate


# The output folder of an evaluation: what was asked of it, what it lacks, what in it is whole.

# The note of what was asked.
EVALUATION_SETTINGS = ".asked.json"


def lacking(
    folder: Path, runs: Sequence[PlannedRun], asked: dict[str, Any], shelf: str | None, resume: bool
) -> tuple[list[PlannedRun], str]:
    """The runs that an output folder lacks, and what to note there of what was asked of it.

    Raises:
        AFTError: it holds some already and is not to be resumed, or was asked something else.
    """
    asked = {**asked, "runs": {run.name: _depends_on(run, shelf) for run in runs}}
    asked = json.loads(json.dumps(asked, default=str))
    taken = [run.name for run in runs if (folder / run.name).exists()]
    if taken and not resume:
        raise AFTError(
            f"{folder} already holds {', '.join(taken)}.",
            "Choose another output folder, or keep them and score what is missing with --resume.",
        )
    if taken:
        before = _read_asked(folder)
        differing = [key for key in sorted(asked) if key != "runs" and asked[key] != before.get(key)]
        known = before.get("runs", {})
        differing += [name for name in taken if asked["runs"][name] != known.get(name, "not recorded")]
        if differing:
            raise AFTError(
                f"What is in {folder} was asked otherwise: {', '.join(differing)} differ.",
                "Give the same arguments again, or choose another output folder.",
            )
        asked["runs"] = known | asked["runs"]
    return [run for run in runs if run.name not in taken], canonical_json(asked)


def note_asked(folder: Path, note: str) -> None:
    """Write what `lacking` gave."""
    with replacing(folder / EVALUATION_SETTINGS) as temporary:
        temporary.write_text(note, encoding="utf-8")


def _read_asked(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / EVALUATION_SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and isinstance(found.get("runs"), dict) else {}


def _depends_on(run: PlannedRun, shelf: str | None) -> Any:
    """What steers a run: the vector's digest; for a router its table's and the library's."""
    if run.route is None:
        return run.vector.digest() if run.vector else None
    library, table = Library(shelf), Path(run.route.partition(":")[2])
    found: dict[str, Any] = {name: sha256(library.path(name) / FILE_NAME) for name in library.names()}
    return {"route": run.route, "table": sha256(table) if table.is_file() else None, "vectors": found}


def whole(folder: Path, samples: dict[str, int]) -> bool:
    """Whether a folder holds a results file and so many samples of each task, to the last byte."""
    found = list(folder.rglob("results_*.json"))
    try:
        for path in found:
            json.loads(path.read_bytes())
            for task, count in samples.items():
                stamp = path.stem.removeprefix("results_")
                lines = path.with_name(f"samples_{task}_{stamp}.jsonl").read_bytes().splitlines(keepends=True)
                if len(lines) != count or not all(line.endswith(b"\n") for line in lines):
                    return False
    except (OSError, ValueError):
        return False
    return bool(found)
