"""Scoring baseline, vectors and placebos on the same tasks, into ordinary lm-eval result folders."""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval_aft._util.errors import AFTError
from lm_eval_aft._util.files import canonical_json, exclusive_dir, exists, replacing, replacing_dir, sha256
from lm_eval_aft._util.model_source import model_source
from lm_eval_aft._util.private_names import borrowed, require
from lm_eval_aft._util.process import is_main_process
from lm_eval_aft.engine.active_steering import Routing, whole_spec
from lm_eval_aft.engine.checks import require_finite
from lm_eval_aft.harness.tasks import (
    environment_asked_once,
    find_tasks,
    load_tasks,
    require_scorable,
    scorable,
)
from lm_eval_aft.library.load import folder_of, load_vector
from lm_eval_aft.library.store import Library
from lm_eval_aft.lm import AFTLM
from lm_eval_aft.steering.vector import SteeringVector
from lm_eval_aft.steering.vector_file import FILE_NAME
from lm_eval_aft.training.setup import random_like

if TYPE_CHECKING:
    from lm_eval.config.evaluate_config import EvaluatorConfig
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.tasks import TaskManager

# lm-eval's flags about what is done with the results of a single run.
UNSUPPORTED_FLAGS = (
    *("predict_only", "show_config", "hf_hub_log_args"),
    *("wandb_args", "wandb_config_args", "trackio_args"),
)
# Arguments of `AFTLM` that differ from run to run.
STEERING_ARGUMENTS = frozenset({"vector", "route", "library", "answer_only"})


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

    Log-likelihoods of baseline, vectors and placebos are computed together, sharing tokens, batches and
    the blocks below each vector's layer. Generation runs once for each of them. Each router is a run of
    its own, whose samples say in ``steered_by`` which vector each document got.

    Each run is written to ``output/<name>`` exactly as ``lm_eval --model aft --log_samples`` would write
    it, and appears there complete or not at all. The log-softmax is computed in float32 in every run
    unless ``model_args`` says otherwise.

    Args:
        tasks: what ``lm_eval --tasks`` takes: names, patterns, groups, tags, YAML files, or one folder.
        library: folder of the library that names come from; default the user's own.
        routes: routers over it; their runs are called ``steered/routed-...``.
        answer_only: score the baseline and every vector with the contexts removed too, as
            ``answer-only/...``, on those tasks that have options or answers to score.
        model_args: further arguments of `AFTLM`. ``coefficient`` and ``positions`` replace those of every
            vector, placebo and routed vector.
        flags: further flags of ``lm_eval run``, for example ``["--limit", "50"]``.
        resume: keep the runs that are in ``output`` already, and score the others.

    Returns:
        The runs, baseline first; `lm_eval_aft.compare(output)` compares them.

    Raises:
        AFTError: bad input; an output folder that already holds such runs, or was started with other
            settings; or another process is writing there.

    >>> evaluate_pair("demo", "math.safetensors", ["aft_demo_math"], "results")  # doctest: +SKIP
    """
    library_path = None if library is None else str(library)
    chosen = [vectors] if isinstance(vectors, str) else vectors
    runs = plan_runs(chosen, placebo, all_seeds, library=library_path, routes=routes, answer_only=answer_only)
    if not vectors and (answer_only or not routes):
        raise AFTError(
            "There is nothing to compare with the baseline.",
            "--answer-only needs a vector." if answer_only else "Give a vector or a router.",
        )
    folder = Path(output)
    model, given = model_source(model, model_args or {})
    arguments = {"softmax_dtype": "float32", **given}
    if own := sorted(STEERING_ARGUMENTS & arguments.keys()):
        raise AFTError(
            f"{', '.join(own)} among the model arguments would apply to every run, the baseline included.",
            "Use --vector, --route, --library and --answer-only instead.",
        )
    settings = {"model": model, "model_args": arguments, "tasks": list(tasks), "flags": list(flags)}
    with exclusive_dir(folder):
        missing, record = missing_runs(folder, runs, settings, library_path, resume)
        if missing:
            _evaluate(missing, folder, settings, library_path, record)
    return runs


def _evaluate(
    runs: Sequence[PlannedRun], folder: Path, settings: dict[str, Any], library: str | None, record: str
) -> None:
    """Load the model once and score all runs; ``record`` is written to the folder before the first."""
    model, arguments, tasks = settings["model"], dict(settings["model_args"]), settings["tasks"]
    config = read_flags(tasks, folder, settings["flags"])
    # As lm-eval does: tasks that build their documents for a model are given it.
    config.metadata = {"pretrained": model, **arguments, **(config.metadata or {})}
    included = [config.include_path] if config.include_path else []
    manager, config.tasks = find_tasks(tasks, included, config.metadata)
    if any(run.answer_only for run in runs):
        for task, why in require_scorable(load_tasks(manager, config.tasks)["tasks"])[1].items():
            print(f"answer-only runs leave out {task}: {why}", flush=True)
    device = arguments.pop("device", None) or (None if config.device == "cuda:0" else config.device)
    sizes = {"batch_size": config.batch_size, "max_batch_size": config.max_batch_size or 64}
    lm = AFTLM(model, **arguments, **sizes, device=device)
    require_finite(lm)
    lm.require_finite = True
    mismatch = bool(arguments.get("allow_mismatch", False))
    replaced = {key: arguments.get(key) for key in ("coefficient", "positions")}
    vectors, routings = [], {}
    for run in runs:  # check that every vector fits before spending hours on the first
        lm.steer(run.vector, **replaced, allow_mismatch=mismatch)
        vectors += [lm.vector] if lm.vector is not None else []
        if run.route is not None:
            routing = lm.routing_of(run.route, Library(library), allow_mismatch=mismatch)
            routings[run.name] = routing.adjusted(**replaced)
    lm.score_along(vectors)
    if is_main_process():
        with replacing(folder / SETTINGS_FILE) as temporary:
            temporary.write_text(record, encoding="utf-8")
    environment: list[str] = []
    for run in runs:
        print(f"scoring {run.name} on {', '.join(tasks)}", flush=True)
        lm.answer_only = run.answer_only
        if run.name in routings:
            lm.follow(routings[run.name])
        else:
            lm.steer(run.vector, **replaced, allow_mismatch=mismatch)
        logged = {"pretrained": model, **arguments}
        if library is not None and run.spec is not None:
            logged["library"] = library
        if run.answer_only:
            logged["answer_only"] = True
        with environment_asked_once(environment):
            score(lm, run, config, manager, folder / run.name, logged)


def read_flags(tasks: Sequence[str], folder: Path, flags: Sequence[str] = ()) -> EvaluatorConfig:
    """Parse flags of ``lm_eval run`` with lm-eval's own parser.

    Raises:
        AFTError: lm-eval refuses them, or they set model arguments or what is done with one run's results.
    """
    with borrowed("lm-eval: lm_eval._cli.run.Run, EvaluatorConfig.from_cli"):
        from lm_eval._cli.run import Run as StockRun
        from lm_eval.config.evaluate_config import EvaluatorConfig

        create, from_cli = StockRun.create, EvaluatorConfig.from_cli
    parser = argparse.ArgumentParser(prog="lm_eval")
    create(parser.add_subparsers())
    ours = ["--model", "aft", "--tasks", ",".join(tasks), "--log_samples", "--output_path", str(folder)]
    try:
        known, unknown = parser.parse_known_args(["run", *ours, *flags])
        if unknown:
            raise AFTError(
                f"lm-eval has no flag {unknown[0]!r}.",
                "Separate several tasks by commas; for the flags see `lm_eval run --help`.",
            )
        config = from_cli(known)
    except ValueError as error:
        raise AFTError(f"lm-eval refuses these flags: {error}", "See `lm_eval run --help`.") from error
    if config.model_args:
        raise AFTError("Model arguments belong before the `--`.", "Use --model-args of `aft eval`.")
    given = [flag for flag in UNSUPPORTED_FLAGS if getattr(config, flag, None)]
    if given:
        raise AFTError(
            f"--{given[0]} has no meaning for several runs at once.",
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
    """Score ``lm`` as it is steered now, and write lm-eval's ordinary result files into ``folder``.

    The folder appears complete or not at all.

    Args:
        run: what steers the model, for the record.
        config: the evaluation's settings, from `read_flags`.
        model_args: the model arguments that the results record.

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
    tracker = EvaluationTracker()
    results = _simple_evaluate(lm, run, config, manager, tracker)
    if results is None:  # not the main process
        return
    samples = results.pop("samples")
    if lm.routing is not None:
        _record_routes(lm.routing, results, samples)
    results["config"] |= {"model": "aft", "model_args": model_args}
    own = {"device": lm.device, **model_args}
    results["config"]["aft"]["asked"] = {
        "tasks": list(results["configs"]) if run.answer_only else list(config.tasks),
        **{name: value for name in _ASKED if (value := getattr(config, name)) not in (None, False, "", {})},
        "metadata": {name: value for name, value in (config.metadata or {}).items() if name not in own},
    }
    tracker.general_config_tracker.log_experiment_args(
        "aft",
        model_args,
        config.system_instruction,
        lm.chat_template(config.apply_chat_template) if config.apply_chat_template else None,
        bool(config.fewshot_as_multiturn),
    )
    with replacing_dir(folder) as place:
        tracker.output_path = str(place)
        tracker.save_results_aggregated(results=results, samples=samples)
        for task in results["configs"]:
            tracker.save_results_samples(task_name=task, samples=samples[task])
        if not _is_complete(place, {task: len(samples[task]) for task in results["configs"]}):
            # The tracker only logs failures to write.
            raise AFTError(
                f"The results could not be written to {folder}.", "Check its permissions and free space."
            )


# Settings that `simple_evaluate` takes under the names of the flags.
_PASSED_ON = (
    *("num_fewshot", "batch_size", "max_batch_size", "use_cache", "limit", "samples", "check_integrity"),
    *("write_out", "system_instruction", "apply_chat_template", "confirm_run_unsafe_code", "metadata"),
)
# Those that results do not show, or not as they were given.
_ASKED = (
    *("num_fewshot", "gen_kwargs", "apply_chat_template", "include_path", "samples"),
    "confirm_run_unsafe_code",
)
_SEEDS = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")


def _simple_evaluate(
    lm: AFTLM, run: PlannedRun, config: EvaluatorConfig, manager: TaskManager, tracker: EvaluationTracker
) -> Any:
    """lm-eval's results; ``None`` in other processes than the main one."""
    from lm_eval import simple_evaluate

    loaded = load_tasks(manager, config.tasks)
    if run.answer_only:
        # The task objects: by their names they would lose their group's settings.
        tasks = [loaded["tasks"][name] for name in scorable(loaded["tasks"])[0]]
    else:
        inner = {name for children in loaded["group_map"].values() for name in children}
        both = {**loaded["groups"], **loaded["tasks"]}
        tasks = [each for name, each in both.items() if name not in inner]
    return simple_evaluate(
        model=lm,
        tasks=tasks,
        device=str(lm.device),
        log_samples=True,
        fewshot_as_multiturn=bool(config.fewshot_as_multiturn),
        gen_kwargs=config.gen_kwargs or None,
        task_manager=manager,
        evaluation_tracker=tracker,
        **{name: getattr(config, name) for name in _PASSED_ON},
        **config.cache_requests,
        **dict(zip(_SEEDS, config.seed or [None] * 4, strict=True)),
    )


def _record_routes(routing: Routing, results: dict[str, Any], samples: dict[str, Any]) -> None:
    """Note in every logged sample which vector it got.

    The router is asked again, since other processes and lm-eval's cache may have answered.
    """
    for task, logged in samples.items():
        for sample in logged:
            name = routing.pick(task, sample["doc_id"], sample["doc"], str(sample["arguments"][0][0]))
            sample["steered_by"] = name
    results["config"]["aft"]["routing"] = routing.info()


# The runs of an evaluation, and the names of their result folders.

# Longest name taken from an expression, in characters.
LONGEST_LABEL = 80


@dataclass(frozen=True)
class PlannedRun:
    """One run to score; ``name`` is also its folder below the output.

    Attributes:
        spec: the vector as the user gave it.
        route: the router as the user gave it.
        answer_only: score without the questions those tasks that can be (see `lm_eval_aft.harness.tasks`).
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
        answer_only: score baseline and vectors without the questions too (not routers, which need them).

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
    without_questions: list[PlannedRun] = []
    for run in [each for each in runs if answer_only and each.route is None]:
        name = _unique(f"answer-only/{run.name.removeprefix('steered/')}", without_questions)
        without_questions.append(replace(run, name=name, answer_only=True))
    return [*runs, *placebos, *without_questions]


def vector_label(spec: str) -> str:
    """The name of a vector's run: the file's or folder's name, else the whole spec made into a file name.

    >>> vector_label("math/algebra*0.7 + logic/analogy*0.3")
    'math-algebrax0.7+logic-analogyx0.3'
    """
    path = Path(spec)
    if path.suffix == ".safetensors":
        return path.stem
    return path.resolve().name if exists(path) else _label(spec)


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


# The output folder of an evaluation: the settings it was started with, and which runs it holds.

SETTINGS_FILE = ".asked.json"


def missing_runs(
    folder: Path, runs: Sequence[PlannedRun], settings: dict[str, Any], library: str | None, resume: bool
) -> tuple[list[PlannedRun], str]:
    """The runs that an output folder lacks, and the text of its settings file.

    Raises:
        AFTError: it holds some already and ``resume`` is false, or they were made with other settings.
    """
    settings = {**settings, "runs": {run.name: _steering_digest(run, library) for run in runs}}
    settings = json.loads(json.dumps(settings, default=str))
    present = [run.name for run in runs if (folder / run.name).exists()]
    if present and not resume:
        raise AFTError(
            f"{folder} already holds {', '.join(present)}.",
            "Choose another output folder, or keep them and score what is missing with --resume.",
        )
    if present:
        before = _read_settings(folder)
        differing = [key for key in sorted(settings) if key != "runs" and settings[key] != before.get(key)]
        known = before.get("runs", {})
        differing += [name for name in present if settings["runs"][name] != known.get(name, "not recorded")]
        if differing:
            raise AFTError(
                f"The runs in {folder} were made with other settings: {', '.join(differing)} differ.",
                "Give the same arguments again, or choose another output folder.",
            )
        settings["runs"] = known | settings["runs"]
    return [run for run in runs if run.name not in present], canonical_json(settings)


def _read_settings(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and isinstance(found.get("runs"), dict) else {}


def _steering_digest(run: PlannedRun, library: str | None) -> Any:
    """The vector's digest; for a router, its table's and the library's."""
    if run.route is None:
        return run.vector.digest() if run.vector else None
    shelf, table = Library(library), Path(run.route.partition(":")[2])
    found: dict[str, Any] = {name: sha256(shelf.path(name) / FILE_NAME) for name in shelf.names()}
    return {"route": run.route, "table": sha256(table) if table.is_file() else None, "vectors": found}


def _is_complete(folder: Path, samples: dict[str, int]) -> bool:
    """Whether a folder holds a results file and that many samples of each task, to the last byte."""
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
