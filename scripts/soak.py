"""Many trainings, scorings and reports in one process, counting what grows.

    OMP_NUM_THREADS=1 python scripts/soak.py --minutes 60

Each cycle takes the next method, positions and demo task: trains a vector, attaches and detaches it,
generates with it, evaluates it beside the baseline and a placebo in a model loaded anew, writes the report,
exports it, composes it, keeps it in a library, lists, verifies and removes it, and makes the mistakes that
users make. After each cycle it samples memory, forward hooks, live models, open files, threads and files
left in the temporary folder. The last line printed is the result as JSON; growth is from the median of the
first quarter after the warm-up (every method once) to the median of the last quarter.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import itertools
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TASKS = ("aft_demo_choice", "aft_demo_math")
METHODS = ("static", "drab", "all-layers", "mlp", "caa", "drab-strong")
POSITIONS = ("all", "prompt", "last", "generated", "all")
COUNTED = ("rss_mib", "hooks", "models", "open_files", "threads", "temporary_files")


class Soak:
    """One process's work and what is counted of it."""

    def __init__(self, folder: Path) -> None:
        from lm_eval_aft._util.process import quiet_libraries
        from lm_eval_aft.library.store import Library
        from lm_eval_aft.lm import AFTLM

        quiet_libraries()
        self.folder, self.library = folder, Library(folder / "library")
        self.lm = AFTLM("demo", device="cpu", batch_size=16)
        self.done: dict[str, int] = dict.fromkeys(("cycles", "trained", "scored", "refused"), 0)
        self.samples: list[dict[str, float]] = []

    def cycle(self, number: int) -> None:
        """Train one vector and do everything with it that a user may."""
        place = self.folder / f"cycle-{number}"
        task = TASKS[number % len(TASKS)]
        method = METHODS[number % len(METHODS)]
        positions = "all" if method == "caa" else POSITIONS[number % len(POSITIONS)]
        output = io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            vector = self._train(task, place / "vector", number, method, positions)
            self._steer(vector)
            self._evaluate(place, task)
            self._keep(place, vector, method)
            self._mistakes(place, task)
        shutil.rmtree(place)
        self.done["cycles"] += 1

    def _train(self, task: str, folder: Path, seed: int, method: str, positions: str) -> Any:
        from lm_eval_aft import train_vector

        self.lm.steer(None)
        result = train_vector(
            self.lm,
            task,
            folder,
            protocol="rapid",
            layers="1-2",
            train_docs=16,
            selection_docs=16,
            epochs=1,
            first_seed=seed % 7,
            method=method,
            positions=positions,
        )
        self.done["trained"] += 1
        return result.vector

    def _steer(self, vector: Any) -> None:
        import torch

        from lm_eval_aft import attach

        tokens = self.lm.tokenizer("What is 12 + 30?", return_tensors="pt")
        with torch.no_grad():
            plain = self.lm.model(**tokens).logits
            handle = attach(self.lm.model, vector, coefficient=0.5)
            self.lm.model(**tokens)
            handle.remove()
            with contextlib.suppress(ZeroDivisionError), attach(self.lm.model, vector):
                self.lm.model.generate(**tokens, max_new_tokens=8, do_sample=False)
                raise ZeroDivisionError  # an error inside the block must not leave the vector there
            if not torch.equal(plain, self.lm.model(**tokens).logits):
                raise SystemExit("soak: the model is still steered after the vector was removed")

    def _evaluate(self, place: Path, task: str) -> None:
        from lm_eval_aft.evaluation.render import update_cards, write_report
        from lm_eval_aft.evaluation.report import compare
        from lm_eval_aft.evaluation.run import evaluate_pair

        runs = evaluate_pair(
            "demo",
            str(place / "vector"),
            [task],
            place / "scores",
            placebo="random:1",
            model_args={"device": "cpu"},
            flags=["--limit", "12", "--batch_size", "16"],
        )
        self.done["scored"] += len(runs)
        found = compare(place / "scores")
        write_report(found, place / "report")
        update_cards(found)

    def _keep(self, place: Path, vector: Any, method: str) -> None:
        from lm_eval_aft import load_vector
        from lm_eval_aft.export.formats import export_vector
        from lm_eval_aft.library.files import damage

        self.library.add(place / "vector", "soak/newest", replace=True)
        if any(entry.error for entry in self.library.entries()) or damage(self.library.path("soak/newest")):
            raise SystemExit("soak: the library is damaged")
        if method in ("static", "all-layers", "caa"):
            load_vector('"soak/newest"*0.5 + "soak/newest"*0.5', self.library)
            if vector.positions == "all":
                export_vector(vector, "merged", place / "merged", model="demo")
        if self.done["cycles"] % 3 == 2:
            self.library.remove("soak/newest")

    def _mistakes(self, place: Path, task: str) -> None:
        """Refusals must leave as little behind as successes."""
        from lm_eval_aft import AFTError, load_vector, train_vector
        from lm_eval_aft.lm import AFTLM

        broken = place / "broken.safetensors"
        broken.write_bytes((place / "vector" / "vector.safetensors").read_bytes()[:-1])
        mistakes: list[Callable[[], object]] = [
            lambda: load_vector(broken),
            lambda: AFTLM("demo", vector=str(broken), device="cpu"),
            lambda: train_vector(self.lm, task, place / "vector", layers="1"),
            lambda: train_vector(self.lm, task, place / "other", layers="99"),
            lambda: self.library.add(broken, "soak/broken"),
        ]
        for mistake in mistakes:
            try:
                mistake()
            except AFTError:
                self.done["refused"] += 1
            else:
                raise SystemExit("soak: a mistake was not refused")

    def sample(self, seconds: float) -> dict[str, float]:
        """Count what could leak."""
        import psutil
        from transformers import PreTrainedModel

        gc.collect()
        process = psutil.Process()
        hooks = sum(
            len(module._forward_hooks) + len(module._forward_pre_hooks) for module in self.lm.model.modules()
        )
        found = {
            "seconds": round(seconds, 1),
            "rss_mib": round(process.memory_info().rss / 2**20, 2),
            "hooks": hooks,
            "models": sum(issubclass(type(each), PreTrainedModel) for each in gc.get_objects()),
            "open_files": process.num_fds(),
            "threads": process.num_threads(),
            "temporary_files": sum(1 for _ in Path(tempfile.gettempdir()).rglob("*")),
        }
        self.samples.append(found)
        return found


def growth(samples: list[dict[str, float]], warm: int) -> dict[str, Any]:
    """First and last quarter of the samples after the warm-up, and the difference, for everything counted."""
    kept = samples[warm:] if len(samples) >= warm + 4 else samples
    quarter = max(1, len(kept) // 4)
    told: dict[str, Any] = {"samples": len(kept)}
    for name in COUNTED:
        first = statistics.median(each[name] for each in kept[:quarter])
        last = statistics.median(each[name] for each in kept[-quarter:])
        told[name] = {"first": first, "last": last, "growth": round(last - first, 2)}
        told[name]["most"] = max(each[name] for each in kept)
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0, help="wall time (default 60)")
    parser.add_argument("--least", type=int, default=1, help="cycles to do even when the time is over")
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        folder = Path(name)
        # What anything forgets in the temporary folder is to be seen; its own folder is apart.
        (folder / "temporary").mkdir()
        tempfile.tempdir = str(folder / "temporary")
        soak, begin = Soak(folder), time.monotonic()
        for number in itertools.count():
            elapsed = time.monotonic() - begin
            if elapsed > 60 * options.minutes and number >= options.least:
                break
            soak.cycle(number)
            sample = soak.sample(time.monotonic() - begin)
            print(number, " ".join(f"{key}={value:g}" for key, value in sample.items()), flush=True)
        result = {"minutes": round((time.monotonic() - begin) / 60, 2), **soak.done}
        print(json.dumps({**result, **growth(soak.samples, len(METHODS))}))
        tempfile.tempdir = None


if __name__ == "__main__":
    main()
