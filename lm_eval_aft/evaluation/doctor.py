"""What is installed, and whether steering gives right answers with it; the report of ``aft doctor``."""

from __future__ import annotations

import json
import os
import platform
import site
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from lm_eval_aft import __version__
from lm_eval_aft._util.private_names import NAMES, version
from lm_eval_aft.engine.precision import hardware_has_bf16
from lm_eval_aft.evaluation.self_check import (
    BROKEN,
    FAMILIES,
    FAST,
    REFUSED,
    RIGHT,
    SLOWER,
    WRONG,
    Outcome,
    Trial,
    try_family,
)

# Columns of the table, and the parts that each summarizes.
_COLUMNS = {
    "log-likelihoods": ("log-likelihoods", "resumed"),
    "generation": ("generation",),
    "stock": ("stock",),
    "by hand": ("by hand",),
}
_MEANING = (
    "Each family is a tiny random model. Its log-likelihoods and greedy texts (generation: by --model aft;",
    "stock: with fast=false; by hand: by the model's own generate under attach), without a vector and",
    "steered at all, prompt, last and generated positions, are compared with full forward passes that",
    "use no cache and are told which tokens to steer.",
)


@dataclass
class Diagnosis:
    """Everything that was checked.

    Attributes:
        names: private names of other libraries that are not as this package needs them: key -> problem.
        checked: how many names were checked.
    """

    versions: dict[str, str]
    machine: dict[str, str]
    registration: dict[str, str]
    names: dict[str, str] = field(default_factory=dict)
    checked: int = 0
    device: str = "cpu"
    trials: list[Trial] = field(default_factory=list)

    @property
    def bad(self) -> list[tuple[str, Outcome]]:
        """Wrong answers and broken trials, with their families."""
        return [(trial.family, each) for trial in self.trials for each in trial.outcomes if each.bad]

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"wrong": len(self.bad), **asdict(self)}

    def __str__(self) -> str:
        lines: list[str] = []
        for title in ("versions", "machine", "registration"):
            lines += [title, *_aligned(getattr(self, title)), ""]
        lines += [
            f"private names of other libraries: {self.checked - len(self.names)} of {self.checked} as needed"
        ]
        for key, reason in self.names.items():
            lines += [f"  {key}", f"    {reason}", f"    without it: {NAMES[key].when_gone}"]
        lines += ["", f"answers on {self.device}, float32", *_table(self.trials)]
        lines += self._reasons(SLOWER, "slower, and right unless listed as wrong below")
        lines += self._reasons(REFUSED, "refused")
        lines += self._wrong()
        return "\n".join([*lines, "", self.verdict])

    @property
    def verdict(self) -> str:
        """The last line."""
        ran = [trial for trial in self.trials if not trial.absent]
        if not self.bad:
            return f"Every answer of {len(ran)} families is right."
        families = list(dict.fromkeys(family for family, _ in self.bad))
        return (
            f"{len(self.bad)} answers are wrong, in {len(families)} of {len(ran)} families: do not trust "
            "scores and texts of these kinds with these versions. Please report this output."
        )

    def _reasons(self, verdict: str, title: str) -> list[str]:
        """Each reason once, with the families and parts it applies to."""
        reasons: dict[str, dict[str, list[Outcome]]] = {}
        for trial in self.trials:
            for each in trial.outcomes:
                if each.verdict == verdict:
                    reasons.setdefault(each.why, {}).setdefault(trial.family, []).append(each)
        lines = []
        for reason, families in reasons.items():
            where = "; ".join(f"{family} ({_places(found)})" for family, found in families.items())
            lines += [f"  {where}", f"    {reason}"]
        return ["", title, *lines] if lines else []

    def _wrong(self) -> list[str]:
        """What is wrong in each family, with one answer as an example."""
        lines = []
        for trial in self.trials:
            if found := [each for each in trial.outcomes if each.bad]:
                first = found[0]
                lines += [
                    f"  {trial.family}: {_places(found)}",
                    f"    {first.part} {first.positions}: {first.why}".replace(" :", ":"),
                ]
        return ["", f"{WRONG} ({BROKEN}: an error that no user should meet)", *lines] if lines else []


def examine(
    families: Sequence[str] = (), device: str = "cpu", progress: Callable[[str], None] = lambda _: None
) -> Diagnosis:
    """Check everything; ``progress`` is called with what comes next."""
    progress("versions and devices")
    found = Diagnosis(versions(), machine(), registration(), device=device)
    progress("private names of other libraries")
    for key, entry in NAMES.items():
        if entry.optional and version(entry.library) == "not installed":
            continue
        found.checked += 1
        if reason := entry.problem():
            found.names[key] = reason
    chosen = families or tuple(FAMILIES)
    for place, family in enumerate(chosen, 1):
        progress(f"{family} ({place} of {len(chosen)})")
        found.trials.append(try_family(family, device))
    return found


def _places(outcomes: Sequence[Outcome]) -> str:
    """Parts, each with its positions."""
    parts: dict[str, list[str]] = {}
    for each in outcomes:
        parts.setdefault(each.part, []).append(each.positions or "unsteered")
    whole = {part for part, found in parts.items() if found == ["unsteered"]}
    return ", ".join(p if p in whole else f"{p} ({' '.join(found)})" for p, found in parts.items())


def _aligned(entries: dict[str, str]) -> list[str]:
    width = max(map(len, entries))
    return [f"  {key:<{width}}  {value}" for key, value in entries.items()]


def _table(trials: Sequence[Trial]) -> list[str]:
    rows = [("family", "fast ways", *_COLUMNS)]
    for trial in trials:
        if trial.absent:
            rows.append((trial.family, "-", *(["-"] * len(_COLUMNS))))
            continue
        taken = [o.part for o in trial.outcomes if o.part in (*FAST, "resumed") and o.verdict == RIGHT]
        verdicts = [_worst(trial.outcomes, parts) for parts in _COLUMNS.values()]
        rows.append((trial.family, " ".join(dict.fromkeys(taken)) or "none", *verdicts))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    table = [
        "  " + "  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    absent = [f"  {trial.family}: not tried, {trial.absent}" for trial in trials if trial.absent]
    return [*(f"  {line}" for line in _MEANING), "", *table, *absent]


def _worst(outcomes: Sequence[Outcome], parts: Sequence[str]) -> str:
    """The worst verdict on any of these parts."""
    found = {each.verdict for each in outcomes if each.part in parts}
    return next((verdict for verdict in (WRONG, BROKEN, REFUSED, SLOWER, RIGHT) if verdict in found), "-")


# What is installed: versions, devices, and how ``--model aft`` is registered with lm-eval.

LIBRARIES = (
    *("torch", "transformers", "lm-eval", "datasets", "accelerate", "safetensors", "tokenizers"),
    *("huggingface_hub", "numpy", "sqlitedict", "click", "peft", "gguf", "ray", "optuna", "bitsandbytes"),
)
START_UP_FILES = ("lm_eval_aft.pth", "lm_eval_aft.start")
# Run by a fresh interpreter: was a start-up file read, and does lm-eval have the model?
_FRESH = """
import json, sys
read = "lm_eval_aft.registration" in sys.modules
import lm_eval.models
from lm_eval.api.registry import model_registry
print(json.dumps({"start-up file read": read, "aft known": "aft" in model_registry}))
"""


def versions() -> dict[str, str]:
    """Versions of Python, this package and the libraries it uses."""
    found = {"python": platform.python_version(), "lm-eval-aft": __version__}
    # torch's own word says which build it is, which its distribution leaves out.
    return found | {name: version(name) for name in LIBRARIES} | {"torch": torch.__version__}


def machine() -> dict[str, str]:
    """Operating system, processor, threads and accelerators."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = {
        "system": platform.platform(),
        "processor": f"{_processor()}, {cores} cores",
        "torch threads": f"{torch.get_num_threads()} (OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS')})",
    }
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        found[f"cuda:{index}"] = f"{about.name}, {about.total_memory / 2**30:.0f} GiB"
    if torch.backends.mps.is_available():
        found["mps"] = "available"
    for device in devices():
        found[f"dtypes on {device}"] = ", ".join(_dtypes(torch.device(device)))
    return found


def devices() -> list[str]:
    """The types of device that are available."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    return ["cpu", *(name for name, available in there.items() if available)]


def registration() -> dict[str, str]:
    """How lm-eval in a fresh interpreter finds the model."""
    places = [Path(each) for each in (*site.getsitepackages(), site.getusersitepackages())]
    files = [str(place / name) for place in places for name in START_UP_FILES if (place / name).is_file()]
    found = {"start-up file": ", ".join(files) or "none: the package is not installed, or is on PYTHONPATH"}
    with tempfile.TemporaryDirectory() as elsewhere:
        try:
            run = subprocess.run(
                [sys.executable, "-c", _FRESH], cwd=elsewhere, capture_output=True, text=True, timeout=120
            )
            answer: dict[str, Any] = json.loads(run.stdout.strip().splitlines()[-1])
        except (OSError, subprocess.TimeoutExpired, ValueError, IndexError) as error:
            return found | {"fresh interpreter": f"did not answer ({type(error).__name__})"}
    if answer["aft known"]:
        way = "by the start-up file" if answer["start-up file read"] else "by its entry point"
        return found | {"fresh interpreter": f"lm-eval knows --model aft, {way}"}
    hint = "use `aft lm-eval` in place of `lm_eval`, or install the package"
    return found | {"fresh interpreter": f"lm-eval does not know --model aft: {hint}"}


def _dtypes(device: torch.device) -> list[str]:
    found = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        try:
            torch.ones(2, 2, dtype=dtype, device=device) @ torch.ones(2, 2, dtype=dtype, device=device)
        except (RuntimeError, TypeError) as error:
            found.append(f"no {name} ({str(error).splitlines()[0][:80]})")
            continue
        native = dtype != torch.bfloat16 or hardware_has_bf16(device)
        found.append(name if native else f"{name} (not by the hardware)")
    return found


def _processor() -> str:
    known = Path("/proc/cpuinfo")
    if known.is_file():
        for line in known.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
