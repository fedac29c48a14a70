"""One logged document per line: what a comparison keeps of lm-eval's samples files."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval_aft.errors import AFTError

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
