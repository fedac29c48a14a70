"""What a report tells besides its verdicts: warnings, scores without a test, intervals over seeds."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

from lm_eval_aft.reporting.pairing import primary_metric
from lm_eval_aft.reporting.results import Run
from lm_eval_aft.reporting.settings import fingerprint_text
from lm_eval_aft.reporting.stats import mean_stderr
from lm_eval_aft.reporting.vectors import VectorInfo
from lm_eval_aft.reporting.verdicts import Row


def warnings(baseline: Run, others: list[Run], vectors: list[VectorInfo], rows: list[Row]) -> list[str]:
    """What a reader should know before believing a row; ``vectors`` in the order of ``others``."""
    found = [note for run in (baseline, *others) for note in run.notes]
    identity = (baseline.any.get("config", {}).get("aft") or {}).get("fingerprint")
    if baseline.answer_only:
        found.append(
            "All of these runs were scored without the questions (answer_only): gains are answer style."
        )
    for run, info in zip(others, vectors, strict=True):
        found += info.warnings
        found += [
            f"{run.name}: {name} was left out of routing ({why}); documents meant for it went elsewhere."
            for name, why in ((run.routing or {}).get("left_out") or {}).items()
        ]
        results = run.any
        routed = ((run.routing or {}).get("vectors") or {}).values()
        own = (results.get("config", {}).get("aft") or {}).get("fingerprint")
        names = [each.get("model_name") for each in (baseline.any, results)]
        if identity and own:
            settings = [each.get("computation") for each in (own, identity)]
            other = None not in settings and settings[0] != settings[1]
            if other or fingerprint_text(own) != fingerprint_text(identity):
                found.append(f"{run.name}: its base model is not the baseline's (fingerprints differ).")
        elif None not in names and names[0] != names[1]:
            found.append(f"{run.name}: its base model is called {names[1]}, the baseline's {names[0]}.")
        vectors_logged = (run.vector or {}, *routed)
        for logged in (own for each in vectors_logged for own in each.get("tasks") or [each]):
            task = logged.get("task")
            if logged.get("num_fewshot") is None or task not in run.tasks:
                continue
            shots = run.tasks[task].results.get("n-shot", {}).get(task)
            if shots != logged["num_fewshot"]:
                found.append(
                    f"{run.name}: trained on {logged['num_fewshot']}-shot prompts of {task}, "
                    f"scored {shots}-shot."
                )
        if info.facts and bool(info.facts.get("chat_template")) != bool(results.get("chat_template_sha")):
            found.append(f"{run.name}: trained with a chat template and scored without one, or the reverse.")
        for library in ("lm_eval", "transformers"):
            used, old = results.get(f"{library}_version"), baseline.any.get(f"{library}_version")
            if used != old:
                found.append(f"{run.name}: {library} {used}, baseline {old}.")
        found += _displaced(baseline, run)
    for run in (baseline, *others):
        config = run.any.get("config", {})
        if config.get("use_cache") and config.get("model") != "aft":
            found.append(
                f"{run.name}: scored with --use_cache, which {config.get('model')} does not key by model."
            )
    return list(dict.fromkeys([*found, *(f"{row.task}: {row.clusters}." for row in rows if row.clusters)]))


def _displaced(baseline: Run, run: Run) -> Iterator[str]:
    """Metrics that verdicts would be on, but for documents without a finite number."""
    for task in run.tasks:
        sides = baseline.tasks[task], run.tasks[task]
        chosen, wanted = primary_metric(*sides), primary_metric(*sides, whole=False)
        if wanted is not None and wanted != chosen:
            name, metric = wanted
            lacking = sum(
                metric not in s.metrics for side in sides for s in side.samples.get(name, {}).values()
            )
            instead = f"the verdict is on {chosen[1]}" if chosen else "there is no verdict"
            yield f"{run.name}: {metric} of {task} is no finite number for {lacking} answers; {instead}."


def corpus_scores(baseline: Run, others: list[Run], rows: list[Row]) -> list[dict[str, Any]]:
    """Scores without a value per document (perplexities, F1 over the corpus, ...)."""
    tested = {(row.run, row.task, f"{row.metric},{row.filter}") for row in rows}
    found = []
    for run in others:
        for task, each in run.tasks.items():
            before = baseline.tasks[task].results["results"].get(task, {})
            after = each.results["results"].get(task, {})
            for key, value in after.items():
                if "," not in key or "_stderr," in key or (run.name, task, key) in tested:
                    continue
                if isinstance(value, int | float) and isinstance(before.get(key), int | float):
                    found.append(
                        {
                            "run": run.name,
                            "task": task,
                            "metric": key,
                            "baseline": before[key],
                            "steered": value,
                        }
                    )
    return found


def group_scores(baseline: Run, others: list[Run]) -> list[dict[str, Any]]:
    """lm-eval's own scores of groups of tasks: both values, no test."""
    found = []
    for run in others:
        before, after = _groups(baseline), _groups(run)
        for group in (name for name in after if name in before):
            for key, value in after[group].items():
                if "," in key and "_stderr," not in key and isinstance(value, int | float):
                    old = before[group].get(key)
                    if isinstance(old, int | float):
                        found.append(
                            {"run": run.name, "task": group, "metric": key, "baseline": old, "steered": value}
                        )
    return found


def _groups(run: Run) -> dict[str, dict[str, Any]]:
    """Group scores of all of a run's files, but for groups one of whose tasks was scored again since."""
    found: dict[str, dict[str, Any]] = {}
    for file, results in {each.file: each.results for each in run.tasks.values()}.items():
        below = results.get("group_subtasks") or {}
        for group, scores in results["groups"].items():
            tasks = [group]
            for name in tasks:  # grows as it goes: groups may hold groups
                tasks += [each for each in below.get(name, ()) if each not in tasks]
            if all(run.tasks[name].file == file for name in tasks if name in run.tasks):
                found[group] = scores
    return found


def over_seeds(rows: list[Row]) -> list[dict[str, Any]]:
    """Over the finalists of one vector (``NAME-seed-N``): what the method does, not one vector.

    The seeds share their documents, so the interval's half width is made of two, added as squares: over
    seeds, and over documents.
    """
    from scipy.special import stdtrit

    groups: dict[tuple[str, str, bool], list[Row]] = {}
    for row in rows:
        if row.primary and (match := re.fullmatch(r"(.+)-seed-\d+", row.run)):
            groups.setdefault((match[1], row.task, row.share), []).append(row)
    found: list[dict[str, Any]] = []
    for (run, task, share), own in groups.items():
        values = [row.difference for row in own]
        error = mean_stderr(values)
        if len(values) >= 3 and error is not None:
            documents = sum((row.high or 0.0) - (row.low or 0.0) for row in own) / (2 * len(own))
            mean = sum(values) / len(values)
            half = math.hypot(float(stdtrit(len(values) - 1, 0.975)) * error, documents)
            found.append(
                {
                    "run": run,
                    "task": task,
                    "share": share,
                    "seeds": len(values),
                    "mean": mean,
                    "low": mean - half,
                    "high": mean + half,
                }
            )
    return found
