"""Reading the result folders that lm-eval writes with ``--log_samples``, by any model type."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lm_eval_aft._util.errors import AFTError

# The folders that `aft eval` writes, in the order reports list them.
RUN_KINDS = ("baseline", "steered", "placebo", "answer-only")


@dataclass(frozen=True)
class TaskRun:
    """The results of one task in one run.

    Attributes:
        results: the whole ``results_*.json`` file, decoded.
        file: the path of that file.
        samples_file: the samples file beside it.
        samples: filter -> doc_id -> sample.
    """

    task: str
    results: dict[str, Any]
    file: Path
    samples_file: Path
    samples: dict[str, dict[int, Sample]]

    def document(self, filter_name: str, doc_id: int) -> dict[str, Any]:
        """A document's logged line, complete."""
        with self.samples_file.open("rb") as stream:
            stream.seek(self.samples[filter_name][doc_id].offset)
            return decode(stream.readline(), str(self.samples_file))

    @property
    def config(self) -> dict[str, Any]:
        """The task's configuration as lm-eval logged it."""
        return dict(self.results.get("configs", {}).get(self.task, {}))


@dataclass(frozen=True)
class ScoredRun:
    """One model, steered or not, scored on one or more tasks (possibly by several lm-eval calls).

    Attributes:
        name: its name in tables.
        kind: ``baseline``, ``steered``, ``placebo`` or ``answer-only`` (scored without the questions,
            beside runs that were scored with them).
        notes: warnings from reading it.
    """

    name: str
    kind: str
    tasks: dict[str, TaskRun]
    notes: tuple[str, ...] = ()

    @property
    def any(self) -> dict[str, Any]:
        """One of its results files, for what all of them share."""
        return next(iter(self.tasks.values())).results

    @property
    def aft(self) -> dict[str, Any]:
        """What ``--model aft`` logged about itself; empty for other model types."""
        found = self.any.get("config", {}).get("aft")
        return found if isinstance(found, dict) else {}

    @property
    def vector(self) -> dict[str, Any] | None:
        """The vector that steered the run, as ``--model aft`` logged it."""
        return self.aft.get("vector") or None

    @property
    def routing(self) -> dict[str, Any] | None:
        """The router that picked each document's vector, those vectors, and what it picked."""
        found = self.aft.get("routing")
        return found if isinstance(found, dict) and found else None

    @property
    def answer_only(self) -> bool:
        """Whether the questions were removed before scoring."""
        return bool(self.aft.get("answer_only"))

    @property
    def texts_not_finite(self) -> bool:
        """Whether ``--model aft`` wrote texts from logits that are no finite numbers."""
        found = self.aft.get("not_finite")
        return bool(isinstance(found, dict) and found.get("generate_until"))

    @property
    def library(self) -> str | None:
        """The library that the vector's name was looked up in, if one was given."""
        return self._argument("library")

    @property
    def vector_path(self) -> str | None:
        """The vector as it was given to lm-eval."""
        return self._argument("vector")

    def _argument(self, name: str) -> str | None:
        value = model_args(self.any).get(name)
        return None if value in (None, "") else str(value)  # lm-eval reads "3" as a number


def read_run(path: str | Path, name: str | None = None, kind: str | None = None) -> ScoredRun:
    """Read a result folder, or one ``results_*.json`` file with its samples.

    Several lm-eval calls on one model count as one run; if a task was scored twice, the newest counts.

    Args:
        name: its name in tables; by default the folder's.
        kind: one of ``RUN_KINDS``; by default read from the results.

    Raises:
        AFTError: no results, no samples, a damaged line (its number is named), samples that do not
            add up to the results, or several models in one folder.
    """
    source = Path(path)
    files = _one_group(source, group_results(find_results(source)))
    return _load_run(files, name or (source.parent if source.is_file() else source).name, kind)


def discover(folder: str | Path) -> list[ScoredRun]:
    """Read all runs below a folder that ``aft eval`` wrote, or that holds one baseline and steered runs.

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
        run = _load_run(_one_group(root / name, list(groups.values())), name if kind else "", kind or None)
        runs.append(run if kind else replace(run, name=_unnamed(run, name, {each.name for each in runs})))
    if not all(run.answer_only for run in runs):
        runs = [_beside_questions(run) for run in runs]
    baselines = [run for run in runs if run.kind == "baseline"]
    if len(baselines) != 1 or len(runs) < 2:
        found = ", ".join(f"{run.name} ({run.kind})" for run in runs)
        raise AFTError(
            f"{root} should hold one baseline and at least one steered run; it holds: {found}.",
            "Give the folders one by one, the baseline first.",
        )
    return sorted(runs, key=lambda run: RUN_KINDS.index(run.kind))


def _beside_questions(run: ScoredRun) -> ScoredRun:
    """The run, called answer-only if it is and its folder does not say so."""
    if not run.answer_only or run.kind == "answer-only":
        return run
    tail = run.name if run.kind == "baseline" else run.name.partition("/")[2]
    return replace(run, kind="answer-only", name=f"answer-only/{tail}")


def _one_group(place: Path, groups: Sequence[list[Path]]) -> list[Path]:
    """The only group of results files; an error if there are several."""
    if len(groups) > 1:
        first = "; ".join(str(files[0]) for files in groups)
        raise AFTError(
            f"{place} holds runs of {len(groups)} different models or vectors.",
            f"Name one results file of each instead: {first}",
        )
    return groups[0]


def _unnamed(run: ScoredRun, number: str, taken: set[str]) -> str:
    """A name for a run whose folder gives none: kind and vector, numbered if that is taken."""
    stem = Path(run.vector_path).name.removesuffix(".safetensors") if run.vector_path else number
    if run.routing:
        stem = f"routed-{run.routing.get('router')}"
    name = "baseline" if run.kind == "baseline" else f"{run.kind}/{stem}"
    names = (name if n == 1 else f"{name}-{n}" for n in itertools.count(1))
    return next(each for each in names if each not in taken)


def _load_run(files: list[Path], name: str, kind: str | None) -> ScoredRun:
    tasks: dict[str, TaskRun] = {}
    notes = []
    for file in reversed(files):
        results, beside = read_results(file), _samples_beside(file)
        wanted = sorted(results.get("configs", {}))
        if lacking := [task for task in wanted if task not in beside] or ([] if wanted else ["anything"]):
            raise AFTError(
                f"{file} has no samples of {', '.join(lacking)} beside it.", "Run lm_eval with --log_samples."
            )
        for task in wanted:
            if task in tasks:
                notes.append(f"{task} was scored more than once in {name or file.parent}: the newest counts.")
            else:
                tasks[task] = _load_task(task, results, file, beside[task])
    run = ScoredRun(name, kind or "baseline", dict(sorted(tasks.items())), tuple(sorted(set(notes))))
    steered = run.vector or run.vector_path or run.routing or model_args(run.any).get("route")
    if kind is None and steered:
        run = replace(run, kind="steered")
    if run.kind == "steered" and (run.vector or {}).get("control"):
        run = replace(run, kind="placebo")  # whatever its folder is called
    return run


def _samples_beside(file: Path) -> dict[str, Path]:
    """The samples files of a results file, by task."""
    tail = f"_{_stamp(file)}.jsonl"
    found = (path for path in file.parent.iterdir() if path.name.endswith(tail))
    return {
        path.name.removeprefix("samples_").removesuffix(tail): path
        for path in found
        if path.name.startswith("samples_")
    }


def _load_task(task: str, results: dict[str, Any], file: Path, samples_file: Path) -> TaskRun:
    """A task's samples, checked against its scores.

    Samples that do not add up to the score belong to another run, or were cut between lines. If it is not
    known how a metric is aggregated, a differing mean only shows that the metric is not a mean: then it
    has no score per document.
    """
    config, stated = results["configs"][task], results["results"].get(task, {})
    samples = read_samples(samples_file, config)
    # Not n-samples: older versions of lm-eval count it without regard to --samples.
    expected = stated.get("sample_len")
    means = mean_metrics(config)
    for filter_name, rows in samples.items():
        if isinstance(expected, int) and len(rows) < expected:  # metrics may have documents of their own
            raise AFTError(
                f"{samples_file} holds {len(rows)} documents of filter {filter_name!r}; {file.name} "
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
                    f"{samples_file} averages {mean:.6f} in {metric}; {file.name} states {score:.6f}.",
                    "The files belong to different runs: run the evaluation again.",
                )
            for sample in rows.values():
                del sample.metrics[metric]
    return TaskRun(task, results, file, samples_file, samples)


# The ``results_*.json`` files that lm-eval writes: finding, decoding and grouping them.

# How the folders of results still being written end, or of those left by a process that died; 0.1 wrote the
# second kind. They begin with a dot, which alone says nothing: lm-eval calls ../models/m's ..__models__m.
_UNFINISHED = (".begun", ".scoring")

# results_STAMP.json, or FILE_STAMP.json after `--output_path FILE.json`.
_DATED = re.compile(r"(?<=_)\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d(\.\d+)?$")

_MAPPINGS = (
    *("config", "configs", "versions", "n-shot", "n-samples", "higher_is_better", "groups"),
    "task_hashes",
)


def find_results(source: Path) -> list[Path]:
    """Every results file below a folder, oldest first.

    Raises:
        AFTError: there is none.
    """
    if source.is_file() and source.suffix == ".json":
        return [source]
    named = (path for path in source.rglob("*.json") if path.match("results_*") or _DATED.search(path.stem))
    seen = (path for path in named if not any(map(_is_unfinished, path.relative_to(source).parts[:-1])))
    found = sorted(seen, key=lambda path: (_stamp(path), str(path)))
    if not found:
        raise AFTError(f"No lm-eval results below {source}.", "Give the folder named by --output_path.")
    return found


def _stamp(file: Path) -> str:
    """What the names of a results file and of its samples end in: when they were written."""
    dated = _DATED.search(file.stem)
    return dated[0] if dated else file.stem.removeprefix("results_")


def _is_unfinished(name: str) -> bool:
    return name.startswith(".") and name.endswith(_UNFINISHED)


def group_results(files: list[Path]) -> list[list[Path]]:
    """Group results files by what was scored: model, its arguments, vector."""
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
        AFTError: the file is unreadable, damaged, or something else.
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
    """A run's model arguments, which lm-eval logs as a mapping or as text."""
    found = results.get("config", {}).get("model_args") or {}
    if isinstance(found, dict):
        return found
    from lm_eval.utils import simple_parse_args_string

    return dict(simple_parse_args_string(str(found)))


# lm-eval's samples files, one logged document per line.

AGAIN = "Run the evaluation again."


@dataclass(slots=True)
class Sample:
    """What a comparison needs of one logged line; the rest is read again from the file when it is shown.

    Attributes:
        prompts: digest of the contexts.
        options: digest of the continuations that were scored, or of the generation settings.
        generates: whether ``options`` are generation settings.
        requests: how many there were.
        cluster: the document's ``source_id``, if it has one.
        metrics: metric -> score; corpus-level metrics (no score per document) are left out.
        odd: log-likelihoods that are no finite numbers: number of the request -> value.
        offset: byte offset of the line.
    """

    doc_hash: str
    target_hash: str
    prompts: bytes
    options: bytes
    generates: bool
    requests: int
    cluster: str | None
    metrics: dict[str, float]
    odd: dict[int, float]
    offset: int

    def comparable(self, other: Sample) -> bool:
        """Whether the answers of both are numbers.

        Minus infinity is one where both runs have it, as of a token that the model rules out, and another
        option has a chance.
        """
        agree = self.odd.keys() == other.odd.keys()
        ruled_out = all(value == -math.inf for value in (*self.odd.values(), *other.odd.values()))
        return agree and ruled_out and (not self.odd or len(self.odd) < self.requests)


def read_samples(path: Path, config: dict[str, Any]) -> dict[str, dict[int, Sample]]:
    """Stream a samples file into compact records; 100,000 documents fit in a few hundred MB."""
    per_document = mean_metrics(config)
    found: dict[str, dict[int, Sample]] = {}
    for number, offset, line in _lines(path):
        where = f"{path}, line {number},"
        value = decode(line, where)
        try:
            doc_id, filter_name = int(value["doc_id"]), str(value["filter"])
            arguments = request_arguments(value)
            doc = value["doc"]
            generates = any(isinstance(part, dict) for each in arguments for part in each[1:])
            cluster = doc.get("source_id") if isinstance(doc, dict) else None
            sample = Sample(
                value["doc_hash"],
                value["target_hash"],
                _digest([each[:1] for each in arguments]),
                _digest([each[1:] for each in arguments]),
                generates,
                len(arguments),
                None if cluster is None else str(cluster),
                {
                    m: score
                    for m in value["metrics"]
                    if (score := _score(value[m], m, per_document)) is not None
                },
                {} if generates else _odd(value),
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


def request_arguments(sample: dict[str, Any]) -> list[list[Any]]:
    """The arguments of a document's requests, which lm-eval logs as mappings or as lists."""
    logged = sample["arguments"]
    logged = logged.values() if isinstance(logged, dict) else logged
    return [list(each.values()) if isinstance(each, dict) else list(each) for each in logged]


def log_likelihood(sample: Mapping[str, Any], request: int) -> float | None:
    """The log-likelihood that answers one of a document's requests; of its repeats, the first."""
    value = sample["resps"][request]
    while isinstance(value, list):
        value = value[0] if value else None
    try:
        return None if value is None else float(value)  # lm-eval logs it as text
    except ValueError:
        return None


def _odd(sample: Mapping[str, Any]) -> dict[int, float]:
    answers = sample.get("resps")
    found = {i: log_likelihood(sample, i) for i in range(len(answers) if isinstance(answers, list) else 0)}
    return {i: value for i, value in found.items() if value is not None and not math.isfinite(value)}


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
    """Metric -> whether the task's score is the mean over its documents; ``None`` if not stated."""
    stated = {metric: entry.get("aggregation") for metric, entry in listed_metrics(config).items()}
    return {metric: None if how is None else how in ("mean", "nanmean") for metric, how in stated.items()}


def listed_metrics(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The entries of a task's ``metric_list`` by metric; none if it is damaged."""
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
    """A JSON object; ``where`` names its place in error messages."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise AFTError(f"{where} is damaged: {error}.", AGAIN) from error
    if not isinstance(value, dict):
        raise AFTError(f"{where} holds no object.", AGAIN)
    return value
