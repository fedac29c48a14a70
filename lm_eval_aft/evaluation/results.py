"""Reading the result folders that lm-eval writes with ``--log_samples``, by any model type."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lm_eval_aft._util.errors import AFTError
from lm_eval_aft.evaluation.run import is_begun

# The folders that `aft eval` writes, in the order reports tell them.
RUN_KINDS = ("baseline", "steered", "placebo", "answer-only")


@dataclass
class TaskRun:
    """One task as one run answered it.

    Attributes:
        results: the whole ``results_*.json`` file, decoded.
        file: where that file lies.
        samples_file: the samples beside it.
        samples: filter -> doc_id -> sample.
    """

    task: str
    results: dict[str, Any]
    file: Path
    samples_file: Path
    samples: dict[str, dict[int, Sample]]

    def document(self, filter_name: str, doc_id: int) -> dict[str, Any]:
        """The logged line of a document, whole."""
        with self.samples_file.open("rb") as stream:
            stream.seek(self.samples[filter_name][doc_id].offset)
            return decode(stream.readline(), str(self.samples_file))

    @property
    def config(self) -> dict[str, Any]:
        """The task's configuration as lm-eval logged it."""
        return dict(self.results.get("configs", {}).get(self.task, {}))


@dataclass
class ScoredRun:
    """One model state, scored on one or more tasks (possibly by several calls of lm-eval).

    Attributes:
        name: how it is called in tables.
        kind: ``baseline``, ``steered``, ``placebo`` or ``answer-only`` (scored without the questions,
            beside runs that were scored with them).
    """

    name: str
    kind: str
    tasks: dict[str, TaskRun]
    notes: list[str] = field(default_factory=list)

    @property
    def any(self) -> dict[str, Any]:
        """One of the results files, for what all of them share."""
        return next(iter(self.tasks.values())).results

    @property
    def vector(self) -> dict[str, Any] | None:
        """What steered the run, as ``--model aft`` logged it."""
        return self.any.get("config", {}).get("aft", {}).get("vector") or None

    @property
    def routing(self) -> dict[str, Any] | None:
        """The router that picked each document's vector, those vectors, and what it picked."""
        found = self.any.get("config", {}).get("aft", {}).get("routing")
        return found if isinstance(found, dict) and found else None

    @property
    def answer_only(self) -> bool:
        """Whether the questions were taken away before scoring."""
        return bool(self.any.get("config", {}).get("aft", {}).get("answer_only"))

    @property
    def library(self) -> str | None:
        """The library that the vector's name was looked up in, if one was given."""
        path = model_args(self.any).get("library")
        return None if path in (None, "") else str(path)

    @property
    def vector_path(self) -> str | None:
        """The vector as it was given to lm-eval."""
        path = model_args(self.any).get("vector")
        return None if path in (None, "") else str(path)  # lm-eval reads "3" as a number


def read_run(path: str | Path, name: str | None = None, kind: str | None = None) -> ScoredRun:
    """Read a result folder, or one ``results_*.json`` file with its samples.

    Several runs of one model in a folder count as one; of a task scored twice the newest counts.

    Raises:
        AFTError: no results, no samples, a damaged line (its number is named), samples that do not
            add up to the results, or several models in one folder.
    """
    source = Path(path)
    files = _one_group(source, group_results(find_results(source)))
    return load_run(files, name or (source.parent if source.is_file() else source).name, kind)


def discover(folder: str | Path) -> list[ScoredRun]:
    """All runs below a folder written by ``aft eval``, or holding one baseline and steered runs.

    Returns the baseline first, then steered runs, placebos and answer-only runs.

    Raises:
        AFTError: see `read_run`; or no baseline, or several.
    """
    root = Path(folder)
    kinds: dict[tuple[str, str], dict[int, list[Path]]] = {}
    for number, files in enumerate(group_results(find_results(root))):
        for file in files:
            parts = file.relative_to(root).parts if root.is_dir() else ()
            key = ("", f"{number}")
            if parts and parts[0] in RUN_KINDS:
                key = (parts[0], "/".join(parts[:2]) if len(parts) > 3 else parts[0])
            kinds.setdefault(key, {}).setdefault(number, []).append(file)
    runs: list[ScoredRun] = []
    for (kind, name), groups in kinds.items():
        files = _one_group(root / name, list(groups.values()))
        if kind:
            runs.append(load_run(files, name, kind))
        else:
            run = load_run(files, "")
            run.name = _unnamed(run, name, {each.name for each in runs})
            runs.append(run)
    if not all(run.answer_only for run in runs):
        for run in (each for each in runs if each.answer_only and each.kind != "answer-only"):
            tail = run.name if run.kind == "baseline" else run.name.partition("/")[2]
            run.kind, run.name = "answer-only", f"answer-only/{tail}"
    baselines = [run for run in runs if run.kind == "baseline"]
    if len(baselines) != 1 or len(runs) < 2:
        found = ", ".join(f"{run.name} ({run.kind})" for run in runs)
        raise AFTError(
            f"{root} should hold one baseline and at least one steered run; it holds: {found}.",
            "Give the folders one by one, the baseline first.",
        )
    return sorted(runs, key=lambda run: RUN_KINDS.index(run.kind))


def _one_group(place: Path, groups: Sequence[list[Path]]) -> list[Path]:
    """The results files of the one model or vector that a place holds.

    Raises:
        AFTError: it holds several.
    """
    if len(groups) > 1:
        first = "; ".join(str(files[0]) for files in groups)
        raise AFTError(
            f"{place} holds runs of {len(groups)} different models or vectors.",
            f"Name one results file of each instead: {first}",
        )
    return groups[0]


def _unnamed(run: ScoredRun, number: str, taken: set[str]) -> str:
    """What a run is called whose folder does not say it: kind and vector, numbered where that is taken."""
    stem = Path(run.vector_path).name.removesuffix(".safetensors") if run.vector_path else number
    if run.routing:
        stem = f"routed-{run.routing.get('router')}"
    name = "baseline" if run.kind == "baseline" else f"{run.kind}/{stem}"
    names = (name if n == 1 else f"{name}-{n}" for n in itertools.count(1))
    return next(each for each in names if each not in taken)


def load_run(files: list[Path], name: str, kind: str | None = None) -> ScoredRun:
    """Read results files of one model as one run; see `read_run`."""
    tasks: dict[str, TaskRun] = {}
    notes = []
    for file in reversed(files):
        results, stamp = read_results(file), file.stem.removeprefix("results_")
        beside = {}
        for path in sorted(file.parent.glob(f"samples_*_{stamp}.jsonl")):
            match = re.fullmatch(rf"samples_(.+)_{re.escape(stamp)}", path.stem)
            if match:
                beside[match[1]] = path
        wanted = set(results.get("configs", {}))
        if not wanted or wanted - set(beside):
            what = ", ".join(sorted(wanted - set(beside))) or "anything"
            raise AFTError(f"{file} has no samples of {what} beside it.", "Run lm_eval with --log_samples.")
        for task in sorted(wanted):
            if task in tasks:
                notes.append(f"{task} was scored more than once in {name or file.parent}: the newest counts.")
                continue
            tasks[task] = TaskRun(
                task, results, file, beside[task], read_samples(beside[task], results["configs"][task])
            )
            _check_sums(tasks[task])
    run = ScoredRun(name, kind or "steered", dict(sorted(tasks.items())), sorted(set(notes)))
    if kind is None:
        steered = run.vector or run.vector_path or run.routing or model_args(run.any).get("route")
        run.kind = "steered" if steered else "baseline"
    if run.kind == "steered" and (run.vector or {}).get("control"):
        run.kind = "placebo"  # whatever its folder is called
    return run


def _check_sums(run: TaskRun) -> None:
    """Samples that do not add up to the stated score belong to another run or were cut between lines.

    Of a metric whose aggregation is not said, a sum that differs only shows that it is no mean: it
    counts as a metric of the whole corpus.
    """
    stated = run.results["results"].get(run.task, {})
    # Not n-samples: older versions of lm-eval count it without regard to --samples.
    expected = stated.get("sample_len")
    means = mean_metrics(run.config)
    for filter_name, rows in run.samples.items():
        if isinstance(expected, int) and len(rows) < expected:  # metrics may have documents of their own
            raise AFTError(
                f"{run.samples_file} holds {len(rows)} documents of filter {filter_name!r}; {run.file.name} "
                f"counts {expected}.",
                AGAIN,
            )
        for metric in sorted({metric for sample in rows.values() for metric in sample.metrics}):
            score = stated.get(f"{metric},{filter_name}")
            values = [s.metrics[metric] for s in rows.values() if metric in s.metrics]
            if not isinstance(score, int | float) or len(values) < len(rows):
                continue
            mean = math.fsum(values) / len(values)
            if abs(mean - score) <= 1e-6 * max(1.0, abs(score)):
                continue
            if means.get(metric):
                raise AFTError(
                    f"{run.samples_file} averages {mean:.6f} in {metric}; {run.file.name} states "
                    f"{score:.6f}.",
                    "The files belong to different runs: run the evaluation again.",
                )
            for sample in rows.values():
                del sample.metrics[metric]


# The ``results_*.json`` files that lm-eval writes: found, decoded, and told apart by what they scored.

_MAPPINGS = (
    "config",
    "configs",
    "versions",
    "n-shot",
    "n-samples",
    "higher_is_better",
    "groups",
    "task_hashes",
)


def find_results(source: Path) -> list[Path]:
    """Every results file below a folder, oldest first.

    Raises:
        AFTError: there is none.
    """
    if source.is_file() and source.suffix == ".json":
        return [source]
    seen = source.rglob("results_*.json")
    seen = (path for path in seen if not any(map(is_begun, path.relative_to(source).parts[:-1])))
    found = sorted(seen, key=lambda path: (path.name, str(path)))
    if not found:
        raise AFTError(f"No lm-eval results below {source}.", "Give the folder named by --output_path.")
    return found


def group_results(files: list[Path]) -> list[list[Path]]:
    """Results files by what was scored: model, its arguments, vector."""
    groups: dict[str, list[Path]] = {}
    for file in files:
        results = read_results(file)
        config, info = results["config"], results["config"]["aft"]
        arguments = sorted(map(str, model_args(results).items()))
        identity = (config.get("model"), arguments, info["vector"].get("sha256"), info.get("answer_only"))
        groups.setdefault(repr(identity), []).append(file)
    return list(groups.values())


def read_results(file: Path) -> dict[str, Any]:
    """Decode a results file.

    Raises:
        AFTError: unreadable, damaged, or not such a file.
    """
    try:
        results = decode(file.read_bytes(), str(file))
    except OSError as error:
        raise AFTError(f"{file} cannot be read: {error.strerror}.", "Check the path.") from error
    if not isinstance(results.get("results"), dict):
        raise AFTError(f"{file} holds no lm-eval results.", "Give a results_*.json that lm_eval wrote.")
    for key in _MAPPINGS:
        _require_mapping(results, key, file)
    for parent in ("results", "configs", "higher_is_better"):
        for task in results[parent]:
            _require_mapping(results[parent], task, file)
    info = _require_mapping(results["config"], "aft", file)
    for key in ("fingerprint", "vector"):
        _require_mapping(info, key, file)
    return results


def _require_mapping(parent: dict[str, Any], key: str, file: Path) -> dict[str, Any]:
    """A part of a results file; missing or null counts as empty."""
    parent[key] = parent.get(key) or {}
    if not isinstance(parent[key], dict):
        raise AFTError(f"{file} is damaged: {key!r} is no mapping.", AGAIN)
    found: dict[str, Any] = parent[key]
    return found


def model_args(results: dict[str, Any]) -> dict[str, Any]:
    """The model arguments of a run, which lm-eval logs as a mapping or as text."""
    found = results.get("config", {}).get("model_args") or {}
    if isinstance(found, dict):
        return found
    return dict(part.partition("=")[::2] for part in str(found).split(",") if part)


# One logged document per line: what a comparison keeps of lm-eval's samples files.

AGAIN = "Run the evaluation again."


@dataclass(slots=True)
class Sample:
    """What a comparison needs of one logged line; the rest is read again by its place in the file.

    Attributes:
        prompts: digest of the contexts asked.
        options: digest of what was scored or how it was generated.
        generates: whether ``options`` are generation settings.
        cluster: the document's ``source_id``, if it has one.
        metrics: metric -> score; corpus-level metrics (no score per document) are left out.
        offset: byte at which the line begins.
    """

    doc_hash: str
    target_hash: str
    prompts: bytes
    options: bytes
    generates: bool
    cluster: str | None
    metrics: dict[str, float]
    offset: int


def read_samples(path: Path, config: dict[str, Any]) -> dict[str, dict[int, Sample]]:
    """Stream a samples file into compact records; 100,000 documents fit in a few hundred MB."""
    per_document = mean_metrics(config)
    found: dict[str, dict[int, Sample]] = {}
    for number, offset, line in _lines(path):
        where = f"{path}, line {number},"
        value = decode(line, where)
        try:
            doc_id, filter_name = int(value["doc_id"]), str(value["filter"])
            asked = asked_of(value)
            doc = value["doc"]
            cluster = doc.get("source_id") if isinstance(doc, dict) else None
            sample = Sample(
                value["doc_hash"],
                value["target_hash"],
                _digest([each[:1] for each in asked]),
                _digest([each[1:] for each in asked]),
                any(isinstance(part, dict) for each in asked for part in each[1:]),
                None if cluster is None else str(cluster),
                {
                    m: score
                    for m in value["metrics"]
                    if (score := _score(value[m], m, per_document)) is not None
                },
                offset,
            )
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise AFTError(f"{where} lacks what lm-eval logs ({error!r}).", AGAIN) from error
        rows = found.setdefault(filter_name, {})
        if doc_id in rows:
            raise AFTError(f"{where} repeats document {doc_id} of filter {filter_name!r}.", AGAIN)
        rows[doc_id] = sample
    if not found:
        raise AFTError(f"{path} is empty.", AGAIN)
    return found


def asked_of(sample: dict[str, Any]) -> list[list[Any]]:
    """The arguments of a logged document's requests, which lm-eval logs as mappings or as lists."""
    logged = sample["arguments"]
    logged = logged.values() if isinstance(logged, dict) else logged
    return [list(each.values()) if isinstance(each, dict) else list(each) for each in logged]


def _score(value: Any, metric: str, per_document: dict[str, bool | None]) -> float | None:
    """A document's score; the mean of its repeats where it has several; ``None`` without one."""
    known = per_document.get(metric)
    if known is False:
        return None
    if isinstance(value, bool | int | float):
        return float(value) if math.isfinite(value) else None
    # Only where the mean is certain: for F1 the list is a pair of gold and answer.
    if known and isinstance(value, list) and value:
        numbers = [float(each) for each in value if isinstance(each, bool | int | float)]
        return math.fsum(numbers) / len(numbers) if len(numbers) == len(value) else None
    return None


def mean_metrics(config: dict[str, Any]) -> dict[str, bool | None]:
    """Metric -> whether the task's score is the mean over its documents; ``None`` where not said."""
    said = {metric: entry.get("aggregation") for metric, entry in listed_metrics(config).items()}
    return {metric: None if how is None else how in ("mean", "nanmean") for metric, how in said.items()}


def listed_metrics(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The entries of a task's ``metric_list`` by metric; none where it is damaged."""
    listed = config.get("metric_list")
    entries = [each for each in listed if isinstance(each, dict)] if isinstance(listed, list) else []
    return {str(entry["metric"]): entry for entry in entries if "metric" in entry}


def _digest(value: Any) -> bytes:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).digest()


def _lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    offset = 0
    try:
        opened = path.open("rb")
    except OSError as error:
        raise AFTError(f"{path} cannot be read: {error.strerror}.", "Check its rights.") from error
    with opened as stream:
        for number, line in enumerate(stream, start=1):
            yield number, offset, line
            offset += len(line)


def decode(text: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise AFTError(f"{where} is damaged: {error}.", AGAIN) from error
    if not isinstance(value, dict):
        raise AFTError(f"{where} holds no object.", AGAIN)
    return value
