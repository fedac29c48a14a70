"""What is installed here: versions, devices, and how lm-eval comes to know ``--model aft``."""

from __future__ import annotations

import json
import os
import platform
import site
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from lm_eval_aft import __version__
from lm_eval_aft.private_names import version
from lm_eval_aft.training.precision import hardware_has_bf16

LIBRARIES = (
    *("torch", "transformers", "lm-eval", "datasets", "accelerate", "safetensors", "tokenizers"),
    *("huggingface_hub", "numpy", "sqlitedict", "click", "peft", "gguf", "ray", "optuna", "bitsandbytes"),
)
START_UP_FILES = ("lm_eval_aft.pth", "lm_eval_aft.start")
# What a fresh interpreter knows: whether a start-up file was read, and whether lm-eval has the model.
_FRESH = """
import json, sys
read = "lm_eval_aft.registration" in sys.modules
import lm_eval.models
from lm_eval.api.registry import model_registry
print(json.dumps({"start-up file read": read, "aft known": "aft" in model_registry}))
"""


def versions() -> dict[str, str]:
    """Python, this package and the libraries it stands on."""
    found = {"python": platform.python_version(), "lm-eval-aft": __version__}
    return found | {name: version(name) for name in LIBRARIES}


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
    """Kinds of device that models can run on here."""
    found = ["cpu"]
    found += ["cuda"] if torch.cuda.is_available() else []
    return found + (["mps"] if torch.backends.mps.is_available() else [])


def registration() -> dict[str, str]:
    """How a fresh interpreter's lm-eval comes to know the model; the folders are those it reads."""
    places = [Path(each) for each in (*site.getsitepackages(), site.getusersitepackages())]
    lying = [str(place / name) for place in places for name in START_UP_FILES if (place / name).is_file()]
    found = {"start-up file": ", ".join(lying) or "none: the package is not installed, or is on PYTHONPATH"}
    with tempfile.TemporaryDirectory() as elsewhere:
        try:
            run = subprocess.run(
                [sys.executable, "-c", _FRESH], cwd=elsewhere, capture_output=True, text=True, timeout=120
            )
            told: dict[str, Any] = json.loads(run.stdout.strip().splitlines()[-1])
        except (OSError, subprocess.TimeoutExpired, ValueError, IndexError) as error:
            return found | {"fresh interpreter": f"could not be asked ({type(error).__name__})"}
    if told["aft known"]:
        way = "by the start-up file" if told["start-up file read"] else "by its entry point"
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
