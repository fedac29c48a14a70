"""Where scores and vectors come from: how a vector was selected and trained, and how to repeat either."""

from __future__ import annotations

import contextlib
import json
import shlex
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval_aft._util.errors import AFTError
from lm_eval_aft._util.files import exists
from lm_eval_aft.evaluation.results import ScoredRun, TaskRun, model_args
from lm_eval_aft.harness.commands import base_model, lm_eval_command, pairs, task_words
from lm_eval_aft.harness.tasks import read_definition
from lm_eval_aft.steering.vector_file import is_biased

if TYPE_CHECKING:
    from lm_eval_aft.steering.vector import SteeringVector

# Digits of lm-eval's doc_hash that a vector keeps of each selection document.
HASH_DIGITS = 16
# Metadata that record how a vector was selected; one made by hand, or by another tool, has none.
_CHOICE = ("splits", "protocol", "recipe")


@dataclass
class VectorInfo:
    """A vector as a report describes it.

    Attributes:
        facts: what the report shows of it, by name.
        prompts: the settings of the prompts it was trained on, by name; empty if not recorded.
        biased: its own metadata say that it was selected on evaluation documents.
        selection_documents: first digits of the ``doc_hash`` of each document it was selected on.
        baseline: selection scores of the model without a vector, if recorded.
        layers: selection scores of each layer: ``{"layer", "score", "accuracy", "chosen"}``.
        curves: scores of each candidate by epoch:
            ``{"name", "layer", "seed", "chosen", "points": [{"epoch", "score", "accuracy"}]}``.
        command: the ``aft train`` call that trains it again.
    """

    run: str
    path: str | None
    sha256: str | None
    facts: dict[str, Any] = field(default_factory=dict)
    prompts: dict[str, Any] = field(default_factory=dict)
    biased: bool = False
    selection_documents: list[str] = field(default_factory=list)
    baseline: dict[str, Any] | None = None
    layers: list[dict[str, Any]] = field(default_factory=list)
    curves: list[dict[str, Any]] = field(default_factory=list)
    command: str | None = None
    warnings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain values; selection documents only as a count."""
        return asdict(self) | {"selection_documents": len(self.selection_documents)}


def read_vector_info(run: ScoredRun) -> VectorInfo:
    """Read the vector that steered a run, if it can be found, and check that it is still the same."""
    logged = run.vector or {}
    info = VectorInfo(run.name, run.vector_path, logged.get("sha256"), biased=bool(logged.get("biased")))
    if run.routing is not None:
        _add_routed(info, run.routing)
        return info
    if run.vector_path is None:
        if run.kind == "steered":
            info.warnings.append(
                f"{run.name}: what was changed and how it was chosen is not logged; the verdict holds only "
                "if it was not chosen on these documents."
            )
        return info
    from lm_eval_aft.library.load import folder_of  # torch

    path = folder_of(run.vector_path, run.library) or Path(run.vector_path)
    changed = f"the vector at {path} is no longer the one that was scored; it is left out."
    vector = _load_as_scored(info, logged, run.vector_path, run.library, changed)
    if vector is None:
        return info
    _fill(info, vector.metadata, list(vector.layers))
    if run.kind == "steered" and not any(vector.metadata.get(key) for key in _CHOICE):
        info.warnings.append(
            f"{run.name}: how the vector was chosen is not recorded; the verdict holds only if it was not "
            "chosen on these documents."
        )
    info.facts |= {
        "method": vector.method,
        "positions": vector.positions,
        "layers": list(vector.layers),
        "norm": round(vector.norm(), 4),
        "coefficient": vector.coefficient,
    }
    if (share := vector.share()) is not None:
        info.facts["norm as a share of the residual norm"] = f"{100 * share:.3g} %"
    if exists(path):  # false for a sum of vectors, or one on the Hub
        info.path = str(path)
        _read_ledger(info, path if path.is_dir() else path.parent, vector.metadata, list(vector.layers))
    return info


def _load_as_scored(
    info: VectorInfo, logged: dict[str, Any], spec: str | Path, library: str | None, changed: str
) -> SteeringVector | None:
    """The vector with the coefficient and positions it was scored with; ``None``, and a warning, if it is
    gone or is another one by now."""
    from lm_eval_aft.library.load import load_vector  # torch

    try:
        vector = load_vector(spec, library)
    except AFTError as error:
        info.warnings.append(f"{info.run}: {error.what} How it was chosen cannot be checked.")
        return None
    if isinstance(coefficient := logged.get("coefficient"), int | float):
        vector.coefficient = float(coefficient)
    vector.positions = str(logged.get("positions", vector.positions))
    if logged.get("sha256") and vector.digest() != logged["sha256"]:
        info.warnings.append(f"{info.run}: {changed}")
        return None
    return vector


def _add_routed(info: VectorInfo, routing: dict[str, Any]) -> None:
    """Add what is known of every vector the router may pick: one selected on these documents is enough to
    bias the run."""
    info.sha256 = routing.get("router_sha256")
    root = routing.get("library")
    for name, logged in (routing.get("vectors") or {}).items():
        info.biased = info.biased or bool(logged.get("biased"))
        changed = f"{name} in {root} is no longer the vector that was scored."
        vector = _load_as_scored(info, logged, Path(str(root)) / str(name), None, changed)
        if vector is not None:
            info.selection_documents += _selection_documents(vector.metadata)


def _selection_documents(meta: dict[str, Any]) -> list[str]:
    found = (meta.get("splits") or {}).get("selection_documents") or []
    return [str(each)[:HASH_DIGITS] for each in found]


def _fill(info: VectorInfo, meta: dict[str, Any], layers: list[int]) -> None:
    protocol, splits, selection = (meta.get(key) or {} for key in ("protocol", "splits", "selection"))
    info.biased = info.biased or is_biased(meta)
    info.selection_documents = _selection_documents(meta)
    info.prompts = dict(meta.get("prompts") or {})
    info.facts = {
        "task": meta.get("task"),
        "base model": (meta.get("base_model") or {}).get("name"),
        "num_fewshot": meta.get("num_fewshot"),
        "chat_template": meta.get("chat_template"),
        "objective": meta.get("objective"),
        "metric": meta.get("metric"),
        "loss": _loss_text(meta.get("loss")),
        "control": meta.get("control"),
        "protocol": protocol.get("name"),
        "seed": meta.get("seed"),
        "epoch": meta.get("epoch"),
        "train documents": splits.get("train"),
        "selection documents": splits.get("selection"),
        "selection_sha256": splits.get("selection_sha256"),
        "created": meta.get("created"),
    }
    info.baseline = selection.get("baseline")
    info.layers = [
        {
            "layer": int(layer),
            "score": each["score"],
            "accuracy": each["accuracy"],
            "chosen": int(layer) in layers,
        }
        for layer, each in sorted((selection.get("layers") or {}).items(), key=lambda item: int(item[0]))
    ]


def _loss_text(loss: Any) -> str | None:
    """``cross-entropy``, or with its parameters: ``margin (margin 1.0)``."""
    if not isinstance(loss, dict):
        return None
    numbers = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in loss.items() if key != "name")
    return f"{loss.get('name')} ({numbers})"


def _read_ledger(info: VectorInfo, folder: Path, meta: dict[str, Any], layers: list[int]) -> None:
    """Read training curves from ``training.jsonl``, if it is there and undamaged."""
    ledger = folder / "training.jsonl"
    if not ledger.is_file():
        return
    curves: dict[str, dict[str, Any]] = {}
    try:
        for line in ledger.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            if entry.get("event") == "start":
                info.command = training_command(entry["settings"], meta)
            elif entry.get("event") == "epoch" and entry.get("stage") not in ("search", "penalty"):
                name = entry["candidate"]
                curve = {"name": name, "layer": entry["layer"], "seed": entry["seed"], "points": []}
                curves.setdefault(name, curve)["points"].append(
                    {key: entry[key] for key in ("epoch", "score", "accuracy")}
                )
    except (ValueError, KeyError, TypeError) as error:
        info.warnings.append(f"{info.run}: {ledger} is damaged ({error!r}); training curves are left out.")
        return
    for curve in curves.values():
        curve["chosen"] = curve["layer"] in layers and curve["seed"] == meta.get("seed")
    info.curves = list(curves.values())


# The commands that score a run again and train its vector again, from what is recorded of them.


def commands(run: ScoredRun) -> list[str]:
    """One ``lm_eval`` call per results file and number of shots; none for a placebo without a file."""
    if (run.vector or {}).get("control") and not run.vector_path:
        return []
    calls: dict[tuple[Path, str], list[str]] = {}
    for task, each in run.tasks.items():
        # Tasks may have their own numbers of shots.
        shots = "" if _asked(each.results) else str(each.results.get("n-shot", {}).get(task))
        calls.setdefault((each.file, shots), []).append(task)
    return [_command(run, tasks) for tasks in calls.values()]


def _command(run: ScoredRun, tasks: list[str]) -> str:
    results = run.tasks[tasks[0]].results
    config: dict[str, Any] = results.get("config", {})
    template, multiturn = results.get("chat_template_sha"), results.get("fewshot_as_multiturn")
    sources = {task: _source(run.tasks[task].config) for task in tasks}
    names, folder = task_words(sources)
    settings = {
        "num_fewshot": results.get("n-shot", {}).get(tasks[0]),
        **{name: config.get(name) for name in ("batch_size", "device", "limit", "gen_kwargs")},
        "apply_chat_template": bool(template),
        "system_instruction": results.get("system_instruction"),
        "fewshot_as_multiturn": bool(multiturn) if template or multiturn else None,
        "seed": [config.get(f"{name}_seed") for name in ("random", "numpy", "torch", "fewshot")],
        "metadata": _given_metadata(run.tasks[tasks[0]]),
        "include_path": folder,
    }
    if all(seed is None for seed in settings["seed"]):
        del settings["seed"]
    # `aft eval` records what it was asked for: the name of a template, tasks as a group, and more.
    if asked := _asked(results):
        # A file's task goes by its name: lm-eval 0.4.12 reads no functions from a file that is named itself.
        words = {path.resolve(): word for path, word in zip(sources.values(), names, strict=True) if path}
        settings |= {"num_fewshot": None, **asked}
        given = settings.pop("tasks")
        names = (
            given if asked.get("include_path") else [words.get(Path(each).resolve(), each) for each in given]
        )
        settings["include_path"] = asked.get("include_path") or (folder if names != given else None)
    last = {"log_samples": True, "output_path": f"RESULTS/{run.name}"}
    return lm_eval_command(str(config.get("model")), model_args(results), names, settings | last)


def _asked(results: dict[str, Any]) -> dict[str, Any]:
    found = results["config"]["aft"].get("asked")
    return dict(found) if isinstance(found, dict) and isinstance(found.get("tasks"), list) else {}


def _metadata(config: dict[str, Any]) -> dict[str, Any]:
    """A task's metadata; lm-eval takes anything there."""
    found = config.get("metadata")
    return found if isinstance(found, dict) else {}


def _source(config: dict[str, Any]) -> Path | None:
    found = _metadata(config).get("config_source")
    return Path(found) if isinstance(found, str) and found != "inline" else None


def _given_metadata(run: TaskRun) -> dict[str, Any]:
    """What was given as ``--metadata``: not the model arguments, nor what the task's file says."""
    own = {"version": None, "config_source": None, "device": None, **model_args(run.results)}
    source = _source(run.config)
    if source is not None and source.is_file():
        with contextlib.suppress(Exception):  # whatever is in a file of that name by now
            own |= _metadata(read_definition(source))
    return {key: value for key, value in _metadata(run.config).items() if key not in own}


# Settings of a plan that are no flags of the same name, or that flags set together with others.
_NO_FLAGS = {"task", "protocol", "prompts", "rft", "fingerprint", "documents", "tasks"}
# Flags for false; what else is false needs none.
_NEGATIVE = {"regression": "--no-regression", "fewshot_as_multiturn": "--fewshot-as-text"}


def training_command(settings: dict[str, Any], meta: dict[str, Any]) -> str:
    """The ``aft train`` call that trains this vector again, from the ledger's settings."""
    from lm_eval_aft.training.recipe import DEFAULT_PROTOCOL, PROTOCOLS  # torch

    protocol = dict(settings.get("protocol") or {})
    name = protocol.pop("name", DEFAULT_PROTOCOL)
    usual = PROTOCOLS[name].to_dict() if name in PROTOCOLS else {}
    model, arguments = base_model(meta)
    usually = {"method": "static", "positions": "all", "screen": "off", "calibrate": False}
    options = {
        "model": model,
        "task": str(settings["task"]).split(","),
        "protocol": name,
        # The protocol's own settings need no flag; its document counts are limits, not flags.
        **{
            key: _flag(value)
            for key, value in protocol.items()
            if value != usual.get(key) and key not in ("train_docs", "selection_docs")
        },
        **{k: v for k, v in settings.items() if k not in _NO_FLAGS and v != usually.get(k)},
        **{f"rft_{key}": value for key, value in (settings.get("rft") or {}).items()},
        **(settings.get("prompts") or {}),
        "model_args": arguments and pairs(arguments),
        "metadata": pairs(settings.get("task_metadata") or {}),
        "output": "VECTOR",
    }
    options.pop("task_metadata", None)
    words = ["aft", "train"]
    for key, value in options.items():
        flag = f"--{key.replace('_', '-')}"
        if value is True:
            words.append(flag)
        elif value is False and key in _NEGATIVE:
            words.append(_NEGATIVE[key])
        elif isinstance(value, list | tuple):
            words += (word for each in value for word in (flag, str(each)))
        elif value is not None and value is not False and value not in ("", {}):
            words += [flag, str(value)]
    return shlex.join(words)


def _flag(value: Any) -> Any:
    """A setting as its flag takes it: lists comma-separated, 0 for "never"."""
    if isinstance(value, list):
        return ",".join(map(str, value)) or "none"
    return "0" if value is None else value
