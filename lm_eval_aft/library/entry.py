"""One vector of a library as a listing shows it, and whether it fits a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from lm_eval_aft._util.errors import AFTError, model_not_loaded
from lm_eval_aft.library.files import CARD, FILES
from lm_eval_aft.steering.vector_file import (
    FILE_NAME,
    Header,
    is_biased,
    mapping_or_empty,
    read_header,
    recorded_share,
)

# The columns of a card's results table, as lm_eval_aft.training.artifacts writes them.
_COLUMNS = ("task", "metric", "n", "difference", "95 % interval", "verdict")


@dataclass(frozen=True)
class Entry:
    """A vector in a library.

    Attributes:
        name: ``CATEGORY/NAME``.
        error: why the vector cannot be used; the other fields are then empty.
        file_size: bytes of ``vector.safetensors``.
        layers: 0-based block indices.
        hidden_size: numbers per layer.
        num_hidden_layers: blocks of the base model, if known.
        share: its norm as a share of the median residual norm at its layer, if recorded.
        tasks: harness tasks it was trained on.
        base_model: name of the base model as given at training.
        control: the placebo it is, if it is one.
        selection: ``{"score", "accuracy"}``, the change against the baseline on the selection split
            (nats of cross-entropy, negative is better; share of right answers), or empty.
        results: rows of the card's table: task, metric, n, difference, 95 % interval, verdict.
        created: ISO 8601.
        versions: library name -> version at training.
        recipe: the expression a composed vector was made with.
    """

    name: str
    error: str = ""
    file_size: int = 0
    layers: tuple[int, ...] = ()
    hidden_size: int = 0
    num_hidden_layers: int | None = None
    tasks: tuple[str, ...] = ()
    base_model: str | None = None
    control: str | None = None
    selection: dict[str, float] = field(default_factory=dict)
    results: tuple[dict[str, str], ...] = ()
    created: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    recipe: str | None = None
    share: float | None = None

    @property
    def category(self) -> str:
        """The part of the name before the slash."""
        return self.name.partition("/")[0]

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Entry:
        """The inverse of `to_dict`; raises ``TypeError`` on anything else."""
        kept = dict(values)
        for key in ("layers", "tasks", "results"):
            kept[key] = tuple(kept[key])
        return cls(**kept)

    def matches(
        self, base_model: str | None = None, task: str | None = None, category: str | None = None
    ) -> bool:
        """Whether the entry passes the filters: patterns with * and ?, letter case ignored.

        A base model also matches by the last part of its name or path.
        """
        model = self.base_model or ""
        return (
            _matches(category, (self.category,))
            and _matches(task, self.tasks)
            and _matches(base_model, (model, model.rstrip("/").rpartition("/")[2]))
        )


def read_entry(name: str, folder: Path) -> Entry:
    """The description of the vector in ``folder``; if it cannot be read, an entry with its ``error``."""
    try:
        header = read_header(folder / FILE_NAME)
    except AFTError as error:
        return Entry(name, error=error.what)
    meta = header.metadata
    base_model, versions = (mapping_or_empty(meta.get(key)) for key in ("base_model", "versions"))
    depth = meta.get("num_hidden_layers")
    return Entry(
        name,
        file_size=header.size,
        layers=header.layers,
        hidden_size=header.hidden_size,
        num_hidden_layers=depth if isinstance(depth, int) else None,
        tasks=task_names(meta),
        base_model=_text(base_model.get("name")),
        control=_text(meta.get("control")) or ("biased" if is_biased(meta) else None),
        selection=_selection(meta),
        results=tuple(read_card_results(folder / CARD)),
        created=_text(meta.get("created")),
        versions={str(k)[:40]: str(v)[:40] for k, v in list(versions.items())[:20]},
        recipe=_text(mapping_or_empty(meta.get("recipe")).get("expression")),
        share=recorded_share(meta),
    )


def task_names(meta: Mapping[str, Any]) -> tuple[str, ...]:
    """The tasks that a vector's metadata name: several if composed or a mixture, none if made by hand.

    >>> task_names({"task": "gsm8k"})
    ('gsm8k',)
    """
    tasks = meta.get("tasks")
    if isinstance(tasks, list) and tasks:
        names = (task.get("task") if isinstance(task, dict) else task for task in tasks)
        return tuple(str(name)[:200] for name in names)
    return (str(meta["task"])[:200],) if meta.get("task") else ()


def read_card_results(card: Path) -> list[dict[str, str]]:
    """The rows of the results table in a model card; none if it has no table or is damaged."""
    try:
        if card.is_symlink() or card.stat().st_size > FILES[CARD]:
            return []
        lines = card.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return []
    rows: list[dict[str, str]] = []
    names: list[str] = []
    for line in lines:
        # A verdict may hold an escaped bar.
        cells = [c.replace("\0", "|").strip() for c in line.replace("\\|", "\0").strip("|").split("|")]
        if not line.startswith("|"):
            names = []
        elif not names:
            names = cells if set(_COLUMNS) <= set(cells) else []
        elif len(cells) == len(names) and set(cells[0]) != {"-"}:
            row = dict(zip(names, cells, strict=True))
            rows.append({key: row[key] for key in _COLUMNS})
    return rows


def _selection(meta: Mapping[str, Any]) -> dict[str, float]:
    selection = mapping_or_empty(meta.get("selection"))
    baseline, own = (mapping_or_empty(selection.get(key)) for key in ("baseline", "vector"))
    found = {}
    for key in ("score", "accuracy"):
        before, after = baseline.get(key), own.get(key)
        if isinstance(before, int | float) and isinstance(after, int | float):
            found[key] = after - before
    return found


def _text(value: Any) -> str | None:
    return str(value)[:300] if value else None


def _matches(pattern: str | None, texts: tuple[str, ...]) -> bool:
    return pattern is None or any(fnmatchcase(text.lower(), pattern.lower()) for text in texts)


# Which vectors fit a model, from as little of the model as is needed.


@dataclass(frozen=True)
class ModelIdentity:
    """The properties of a model that a vector must fit.

    Attributes:
        fingerprint: as `lm_eval_aft.steering.fingerprint.fingerprint` gives it.
        weights: whether the weights were read; otherwise a fine-tuned copy cannot be told from its original.
    """

    name: str
    hidden_size: int
    num_hidden_layers: int
    fingerprint: Mapping[str, Any]
    weights: bool


def identify(model: str, *, weights: bool = False) -> ModelIdentity:
    """Identify a model by its config and tokenizer, or with its weights if asked or needed.

    Args:
        model: local folder or Hub name.
        weights: load the weights as well.

    Raises:
        AFTError: no such model.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from lm_eval_aft.steering.fingerprint import fingerprint

    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
        loaded: Any = None
        if not weights:
            try:
                with torch.device("meta"):  # names and shapes, no numbers
                    loaded = AutoModelForCausalLM.from_config(config)
            except (ImportError, NotImplementedError, RuntimeError, ValueError):
                weights = True
        if weights:
            loaded = AutoModelForCausalLM.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise model_not_loaded(model, error) from error
    text = config.get_text_config()
    found = fingerprint(loaded, tokenizer)
    if getattr(config, "quantization_config", None) is not None:
        found["quantized"] = True
    return ModelIdentity(model, text.hidden_size, text.num_hidden_layers, found, weights)


def misfits(header: Header, model: ModelIdentity) -> list[str]:
    """In what a vector does not fit a model; an empty list means that it does."""
    from lm_eval_aft.steering.fingerprint import compare_fingerprints

    if header.hidden_size != model.hidden_size:
        return ["hidden size"]
    if header.layers[-1] >= model.num_hidden_layers:
        return ["number of blocks"]
    recorded = header.metadata.get("fingerprint")
    if recorded is None:  # made by hand
        return []
    try:
        return compare_fingerprints(recorded, model.fingerprint)
    except AFTError:
        return ["fingerprint (damaged)"]
