"""The model states that an evaluation scores, and what their result folders are called."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lm_eval_aft.errors import AFTError
from lm_eval_aft.library import folder_of, load_vector
from lm_eval_aft.routing import whole_spec
from lm_eval_aft.training.controls import random_like
from lm_eval_aft.vector import SteeringVector

# Characters of a run's name that come from an expression.
LONGEST_LABEL = 80


@dataclass(frozen=True)
class Run:
    """One model state to score: ``name`` is also its folder below the output.

    ``answer_only`` runs score the tasks that can do without their questions; see `lm_eval_aft.answer_only`.
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
) -> list[Run]:
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
    runs = [Run("baseline")]
    placebos = []
    for spec in vectors:
        name = _unique(f"steered/{vector_label(spec)}", runs)
        vector = load_vector(spec, library)
        runs.append(Run(name, spec, vector))
        if all_seeds:
            folder = folder_of(spec, library)
            finalists = sorted((folder / "seeds").glob("*.safetensors")) if folder else []
            if not finalists:
                raise AFTError(f"{spec} has no seeds/ with other finalists.", "Leave out --all-seeds.")
            for each in finalists:
                runs.append(Run(_unique(f"{name}-{each.stem}", runs), str(each), load_vector(each)))
        for seed in range(draws):
            placebos.append(
                Run(
                    f"placebo/{name.removeprefix('steered/')}-random-{seed}",
                    vector=random_like(vector, seed),
                )
            )
    for route in routes:
        kind, _, rest = whole_spec(route).partition(":")
        table = "" if not rest else f"-{Path(rest).stem if Path(rest).is_file() else _label(rest)}"
        runs.append(Run(_unique(f"steered/routed-{kind}{table}", runs), route=whole_spec(route)))
    return [*runs, *placebos, *(_bare(runs) if answer_only else [])]


def _bare(runs: Sequence[Run]) -> list[Run]:
    """The same model states, but for routers, to be scored without the questions."""
    found: list[Run] = []
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


def _unique(name: str, runs: Sequence[Run]) -> str:
    taken = {run.name for run in runs}
    if name.endswith(".json"):  # lm-eval would take it for a file
        name += "_"
    candidate, count = name, 2
    while candidate in taken:
        candidate, count = f"{name}-{count}", count + 1
    return candidate
