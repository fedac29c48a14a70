"""What every export needs: the base model, the comparison of logits, the model card, the vector's record."""

from __future__ import annotations

import gc
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from lm_eval_aft._util.errors import AFTError, model_not_loaded
from lm_eval_aft._util.files import canonical_json
from lm_eval_aft._util.private_names import require
from lm_eval_aft.demo import resolve_pretrained
from lm_eval_aft.library.entry import task_names
from lm_eval_aft.steering.backbone import Backbone, find_backbone
from lm_eval_aft.steering.fingerprint import (
    WEIGHT_ARGS,
    check_fingerprint,
    compare_fingerprints,
    describe_base,
    fingerprint,
)
from lm_eval_aft.steering.hooks import add_all, check_fits
from lm_eval_aft.steering.methods import METHODS
from lm_eval_aft.steering.vector import SteeringVector
from lm_eval_aft.steering.vector_file import (
    MAX_HEADER,
    is_biased,
    mapping_or_empty,
    norm_text,
    parse_entry,
)

_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.json"),
    *("vocab.txt", "merges.txt", "sentencepiece.bpe.model", "tekken.json", "tokenizer.tiktoken"),
)

# How to bring over what other tools pickle.
CONVERT = (
    "If you trust the file, open it where it was written, see which block each tensor is added after, and "
    "save it: lm_eval_aft.SteeringVector({LAYER: tensor}).save(FOLDER)."
)

_MAY_BE_MISSING = "transformers: cached_file(_raise_exceptions_for_...)"


@dataclass
class Base:
    """A causal LM on the CPU in its own dtype.

    Weights read from safetensors stay memory-mapped: they take memory only once they are used.

    Attributes:
        name: as the user gave it; ``path`` is where it was loaded from.
        args: the arguments of lm-eval's ``hf`` that it was loaded with, besides ``pretrained``.
        model: the transformers (or PEFT) model in evaluation mode; ``None`` once released.
        tokenizer: its tokenizer, or ``None`` for a checkpoint without one.
    """

    name: str
    path: str
    args: dict[str, Any]
    model: Any
    tokenizer: Any
    backbone: Backbone

    @property
    def revision(self) -> str | None:
        """The revision on the Hub, if one was asked for."""
        return self.args.get("revision")

    @property
    def config(self) -> Any:
        """The model's configuration."""
        return self.model.config

    def release(self) -> None:
        """Drop the model, so that another one can be loaded in its place."""
        self.model = None
        self.backbone = Backbone(self.backbone.name, [], self.backbone.hidden_size)
        gc.collect()


def recorded_base(metadata: Mapping[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """The name of the model that a vector was trained on, and the arguments that it must be loaded with."""
    recorded = mapping_or_empty(metadata.get("base_model"))
    given = {"revision": recorded.get("revision"), **mapping_or_empty(recorded.get("args"))}
    # Only what names weights: a stranger's file must not ask for trust_remote_code.
    known = {key: given[key] for key in WEIGHT_ARGS if isinstance(given.get(key), str)}
    return recorded.get("name"), known


def load_base(name: str, args: Mapping[str, Any] | None = None, blocks: str | None = None) -> Base:
    """Load a causal LM and its tokenizer from a folder, the Hub, or ``demo``.

    Args:
        args: further arguments of lm-eval's ``hf``: ``revision``, ``subfolder``, ``gguf_file``, ``peft``, ...

    Raises:
        AFTError: it or its tokenizer cannot be loaded, or its blocks are not found.
    """
    from transformers import AutoModelForCausalLM

    path, given = resolve_pretrained(name), {k: v for k, v in (args or {}).items() if v not in (None, "")}
    revision = given.get("revision")
    try:
        if given.keys() <= {"revision"}:
            # Unset, transformers would ask on the terminal whether to run a stranger's code.
            model: Any = AutoModelForCausalLM.from_pretrained(
                path, revision=revision, dtype="auto", trust_remote_code=False
            ).eval()
            tokenizer = _tokenizer(name, path, revision)
        else:
            model, tokenizer = _loaded_by_lm_eval(path, given)
    except (OSError, ValueError, ImportError, TypeError, KeyError) as error:
        raise model_not_loaded(name, error) from error
    model.requires_grad_(False)
    return Base(name, path, given, model, tokenizer, find_backbone(model, blocks))


def same_base(base: Base) -> list[str]:
    """A note where the export works only on a base that is loaded with the same arguments."""
    told = ",".join(
        f"{key}={base.args[key]}" for key in WEIGHT_ARGS if base.args.get(key) not in (None, "main")
    )
    return [f"it is for {base.name} loaded with {told}: give these to lm-eval as well"] if told else []


def _loaded_by_lm_eval(path: str, args: dict[str, Any]) -> tuple[Any, Any]:
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=path, **{"device": "cpu", **args})
    model: Any = lm.model
    if args.get("gguf_file"):  # dequantised while it was read: a checkpoint of it is a plain one
        del model.config.quantization_config
    return model, lm.tokenizer


def _tokenizer(name: str, path: str, revision: str | None) -> Any:
    """The tokenizer, or ``None`` for a checkpoint without one, whose weights can still be exported."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)
    except Exception as error:  # tokenizers, in Rust, raises nothing narrower for a damaged file
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        try:
            there = [file for file in _TOKENIZER_FILES if _cached(path, file, {"revision": revision})]
        except OSError as unknown:
            raise AFTError(
                f"Cannot tell whether {name!r} has a tokenizer: {str(unknown).splitlines()[0][:300]}",
                "Give a folder that holds the whole model, or work online.",
            ) from error
        if there:
            raise AFTError(
                f"The tokenizer of {name!r} ({', '.join(there)}) cannot be read: {reason}",
                "Copy or download the model again; it may also need a package, or code of its own.",
            ) from error
    return None


def source_file(base: Base, name: str) -> Path | None:
    """A file of the base model's repository or folder, or ``None`` where it has no such file."""
    try:
        found = _cached(base.path, name, base.args, _raise_exceptions_for_connection_errors=False)
    except OSError:
        return None
    return None if found is None else Path(found)


def _cached(path: str, file: str, args: Mapping[str, Any], **options: bool) -> str | None:
    from transformers.utils import cached_file

    require(_MAY_BE_MISSING)
    place = {"revision": args.get("revision"), "subfolder": args.get("subfolder", "")}
    found: str | None = cached_file(
        path, file, **place, _raise_exceptions_for_missing_entries=False, **options
    )
    return found


def check_vector(vector: SteeringVector, base: Base, *, allow_mismatch: bool = False) -> dict[int, Tensor]:
    """What the vector adds after each block: coefficient included, fp32, shape ``(hidden_size,)``.

    Raises:
        AFTError: not a constant at every position, no effect, not finite, or made for another model.
    """
    check_constant(vector)
    check_fits(vector, base.backbone)
    check_fingerprint(
        vector.metadata, base.model, base.tokenizer, allow_mismatch=allow_mismatch, args=base.args
    )
    shifts = {layer: values * vector.coefficient for layer, values in vector.layers.items()}
    if not all(bool(torch.isfinite(delta).all()) for delta in shifts.values()):
        raise AFTError(
            f"The vector times its coefficient {vector.coefficient:g} overflows float32.",
            "Give a smaller --coefficient.",
        )
    if not any(bool(delta.any()) for delta in shifts.values()):
        raise AFTError(
            f"The vector times its coefficient {vector.coefficient:g} is 0: it would change nothing.",
            "Check the vector's norm, or give a larger --coefficient.",
        )
    return shifts


def check_constant(vector: SteeringVector) -> None:
    """Raise `AFTError` unless the vector adds one constant at every position."""
    stay = "Score it with `--model aft`, which applies it as it was trained."
    if not METHODS[vector.method].constant:
        raise AFTError(
            f"A vector of method {vector.method!r} cannot be exported: what it adds depends on the hidden "
            "state, and every export format holds a constant.",
            stay,
        )
    if vector.positions != "all":
        raise AFTError(
            f"A vector for positions {vector.positions!r} cannot be exported: a bias, an adapter or a "
            "control vector acts at every position.",
            stay,
        )
    if vector.coefficient == 0:
        raise AFTError(
            "The vector's coefficient is 0: it would change nothing.", "Give another --coefficient."
        )


@dataclass(frozen=True)
class ExportJob:
    """What is to be exported where.

    Attributes:
        shifts: what is added after each block: fp32, shape ``(hidden_size,)``, coefficient included.
        progress: called with a word on each stage as it starts.
    """

    base: Base
    vector: SteeringVector
    shifts: dict[int, Tensor]
    target: Path
    progress: Callable[[str], None]


@dataclass(frozen=True)
class Export:
    """A finished export.

    Attributes:
        path: the file or folder that was written.
        kind: ``merged``, ``peft``, ``gguf`` or ``steered``.
        agreement: the comparison of logits; ``None`` where the format has no loader to ask.
        notes: what users should know, one sentence each.
    """

    path: Path
    kind: str
    agreement: Agreement | None
    notes: list[str]


@contextmanager
def optional_package(name: str, needing: str) -> Iterator[None]:
    """In this context an import of a package that comes with an extra of ours may fail as an `AFTError`."""
    try:
        yield
    except ImportError as error:
        raise AFTError(
            f"{needing} need the {name} package.", f"Install it: pip install 'lm-eval-aft[{name}]'"
        ) from error


# The vector's own record in what is exported, so that an import restores it.
#
# Without it, a placebo or a vector chosen on evaluation documents would come back as an ordinary vector.

# Beside an adapter or a merged checkpoint; in a GGUF file it is a string.
RECORD_NAME = "aft.json"
_VALUES = "exported_values"
_ENTRIES = 32  # of each layer: enough to tell vectors apart
_TOLERANCE = 0.01  # between tools values are cast to 16 bits, and scaled
# Attributes of the vector, not of its metadata: an import sets them itself.
_ATTRIBUTES = ("method", "layers", "coefficient", "positions", "hidden_size")


def record(vector: SteeringVector, added: dict[int, Tensor]) -> str:
    """The vector's header as JSON.

    Args:
        added: what the export adds after each block; the record keeps a sketch of it, by which an import
            recognises the values it belongs to.

    Raises:
        AFTError: the metadata are no JSON.
    """
    try:
        return canonical_json({**vector.header(), _VALUES: _sketch(added)})
    except (TypeError, ValueError) as error:
        raise AFTError(f"The vector's metadata cannot be written as JSON: {error}.") from error


def read_record(folder: Path) -> str | None:
    """The record in a folder, or ``None`` where there is none.

    Raises:
        AFTError: it cannot be read, or is longer than any.
    """
    file = folder / RECORD_NAME
    if not file.exists():
        return None
    try:
        if file.stat().st_size > MAX_HEADER:
            raise AFTError(f"{file} is longer than any vector's record.", "Export or download it again.")
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise AFTError(f"{file} cannot be read: {error}.", "Export or download it again.") from error


def restore(vector: SteeringVector, text: object, where: str) -> list[str]:
    """Give an imported vector the metadata of its record, if they belong together; return notes.

    Args:
        text: the record, or ``None`` where there is none.
        where: its name in messages.

    Raises:
        AFTError: the record is damaged.
    """
    if text is None:
        return ["how the vector was made and chosen is not recorded there"]
    try:
        if not isinstance(text, str) or len(text) > MAX_HEADER:
            raise ValueError("it is no text, or too long a one")
        found = parse_entry(text)
        canonical_json(found)  # 1e999 is read as infinite, which no vector file can hold
    except (ValueError, RecursionError) as error:
        raise AFTError(
            f"{where}, the vector's record, is damaged: {error}.",
            "Export or download it again.",
        ) from error
    if not _belongs(found.pop(_VALUES, None), _sketch(vector.layers)):
        return [
            f"{where} was written for other values and is ignored: how this vector was chosen is not known"
        ]
    for key in _ATTRIBUTES:
        found.pop(key, None)
    vector.metadata = {**found, **vector.metadata}
    return [f"{where} says how the vector was made", *cautions(vector)]


def identity(base: Base) -> dict[str, Any]:
    """The entries of a vector's metadata that say which model it is for."""
    more = {key: value for key, value in base.args.items() if key != "revision"}
    return {
        "base_model": {"name": base.name, "revision": base.revision, **({"args": more} if more else {})},
        "num_hidden_layers": len(base.backbone.blocks),
        "fingerprint": fingerprint(base.model, base.tokenizer),
    }


def place(
    vector: SteeringVector, model: str | None, args: Mapping[str, Any], progress: Callable[[str], None]
) -> list[str]:
    """Make an imported vector one for this model; return notes. Without a model it fits any of its width.

    Raises:
        AFTError: it does not fit the model, or the model cannot be loaded.
    """
    if model is None:
        if "fingerprint" in vector.metadata:
            return []
        return ["no --model was given: the vector carries no fingerprint and fits any model of its width"]
    progress(f"loading {model}")
    base = load_base(model, args)
    depth = len(base.backbone.blocks)
    if max(vector.layers) == depth and 0 not in vector.layers:
        raise AFTError(
            f"The file numbers blocks up to {depth}, but {model!r} has blocks 0 to {depth - 1}: it seems to "
            "count from 1, while control vectors count from 0.",
            "Write it again with every number one lower, if its author agrees.",
        )
    check_fits(vector, base.backbone)
    return assign_model(vector, identity(base))


def told_strength(vector: SteeringVector) -> str:
    """How strong an imported direction is, in a phrase: other tools multiply by a factor given at use."""
    norms = [float(values.norm()) for values in vector.layers.values()]
    size = " to ".join(dict.fromkeys(f"{norm:.3g}" for norm in (min(norms), max(norms))))
    where = f" at each of its {len(norms)} blocks" if len(norms) > 1 else ""
    return (
        f"its norm{where} is {size}; the factor it is meant to be used with, and the blocks if not all, are "
        "not in the file: choose them with coefficient= and `aft import --layer`"
    )


def assign_model(vector: SteeringVector, identity: dict[str, Any]) -> list[str]:
    """Make an imported vector one for this model; return a note where its record names another.

    Raises:
        AFTError: the fingerprint in its record is damaged.
    """
    recorded, trained_on = (
        vector.metadata.get("fingerprint"),
        mapping_or_empty(vector.metadata.get("base_model")),
    )
    vector.metadata |= identity
    differences = [] if recorded is None else compare_fingerprints(recorded, identity["fingerprint"])
    if not differences:
        return []
    vector.metadata["imported_from"]["trained_on"] = trained_on.get("name")
    return [
        f"it was trained on {describe_base(trained_on)}, not on this model: {', '.join(differences)} differ"
    ]


def cautions(vector: SteeringVector) -> list[str]:
    """Warnings for whoever uses the vector or reads its scores, one phrase each."""
    meta = vector.metadata
    found = []
    if meta.get("control"):
        found.append(f"this is a placebo (control `{meta['control']}`), not a vector to use")
    if is_biased(meta):
        found.append(
            "this vector is biased: it was chosen on evaluation documents, so scores on them are no result"
        )
    return found


def _sketch(layers: dict[int, Tensor]) -> dict[str, Any]:
    """Per layer its norm and evenly spaced entries."""
    found = {}
    for layer, values in layers.items():
        step = torch.arange(_ENTRIES) * len(values) // _ENTRIES
        found[str(layer)] = {"norm": float(values.double().norm()), "entries": values[step].tolist()}
    return found


def _belongs(recorded: Any, present: dict[str, Any]) -> bool:
    """Whether two sketches are of the same values, up to rounding."""
    try:
        return recorded.keys() == present.keys() and all(
            math.isclose(recorded[layer]["norm"], now["norm"], rel_tol=_TOLERANCE)
            and max(abs(a - b) for a, b in zip(recorded[layer]["entries"], now["entries"], strict=True))
            <= _TOLERANCE * max(map(abs, now["entries"]))
            for layer, now in present.items()
        )
    except (AttributeError, KeyError, TypeError, ValueError):  # a stranger's record
        return False


# Comparing an export with the hooked model: logits on probe prompts, in float32 arithmetic.

# Largest difference of two logits, relative to the largest logit where that is above 1.
TOLERANCE = 1e-5
_LONGEST = 1024
_SHOWN = 16  # positions of each probe whose logits are compared
_CHUNK = 2**22  # weights of one matrix turned to float32 at a time: 16 MiB


@dataclass(frozen=True)
class Agreement:
    """The outcome of a comparison, in logits.

    Attributes:
        difference: largest absolute difference between the export and the hooked model.
        bound: what it had to stay within.
        effect: largest absolute change that the vector makes: the difference if it were missing.
        probes: number of prompts.
    """

    difference: float
    bound: float
    effect: float
    probes: int

    def __str__(self) -> str:
        return (
            f"logits differ by at most {self.difference:.1e} on {self.probes} probe prompts "
            f"(bound {self.bound:.1e}; the vector itself changes them by {self.effect:.1e})"
        )


def probe_prompts(config: Any) -> list[Tensor]:
    """Random token ids of shape ``(batch, length)``, the same for the same config.

    Three short prompts and, for a model with a sliding window of reasonable size, one that is longer
    than the window.
    """
    text = config.get_text_config()
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(text.vocab_size, (3, _SHOWN), generator=generator)]
    window = getattr(text, "sliding_window", None)
    longest = min(_LONGEST, getattr(text, "max_position_embeddings", None) or _LONGEST)
    if isinstance(window, int) and window < longest:
        length = min(window + _SHOWN, longest)
        prompts.append(torch.randint(text.vocab_size, (1, length), generator=generator))
    return prompts


@torch.no_grad()
def probe_logits(model: Any, prompts: list[Tensor]) -> list[Tensor]:
    """Logits of the last positions of each prompt, ``(batch, <= 16, vocabulary)``, in float32.

    Computed in float32 whatever the dtype of the weights, so that the comparison can be strict.
    """
    return [forward_in_float32(model, ids, **_keep(model)).logits[:, -_SHOWN:] for ids in prompts]


def hooked_logits(base: Base, shifts: dict[int, Tensor], prompts: list[Tensor]) -> list[Tensor]:
    """`probe_logits` of the base model with each ``shifts[L]``, ``(hidden_size,)``, added after block L."""
    with add_all(base.backbone, shifts):
        return probe_logits(base.model, prompts)


def forward_in_float32(model: Any, ids: Tensor, **options: Any) -> Any:
    """``model``'s output for ``ids``, computed in float32."""
    with ComputingInFloat32():
        return model(input_ids=ids, use_cache=False, **options)


def compare_logits(base: list[Tensor], steered: list[Tensor], export: list[Tensor]) -> Agreement:
    """Compare an export's logits with the hooked model's; ``base`` are those without the vector."""
    difference = _distance(steered, export)
    return Agreement(
        difference=difference,
        bound=TOLERANCE * max(1.0, *(float(logits.abs().max()) for logits in steered)),
        effect=_distance(base, steered),
        probes=sum(len(logits) for logits in steered),
    )


def require_agreement(agreement: Agreement, what: str) -> Agreement:
    """Raise `AFTError` unless the export agrees with the hooked model.

    A vector whose whole effect is within the bound cannot be told from no vector at all: refused too.
    """
    if not agreement.difference <= agreement.bound:  # NaN must fail
        raise AFTError(
            f"The {what} was deleted: it does not compute what the vector does ({agreement}).",
            "This is a bug in the export, not in the vector: please report it with the model's name.",
        )
    if agreement.effect <= agreement.bound:
        raise AFTError(
            f"The {what} was deleted: the vector changes the logits too little to verify anything "
            f"({agreement}).",
            "Check the vector's norm and coefficient.",
        )
    return agreement


class ComputingInFloat32(TorchFunctionMode):
    """Inside the block, models run in float32 arithmetic, without a float32 copy of their weights.

    Each 16-bit parameter is turned to float32 for the one operation that reads it, large matrices in pieces.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(function, "__name__", "") == "__get__":  # a property: dtype, shape, T, ...
            found = function(*args, **kwargs)
            if not _is_coarse(args[0]):
                return found
            if isinstance(found, Tensor):
                return found.float()
            return torch.float32 if found is args[0].dtype else found
        if function is functional.embedding:
            return function(*args, **kwargs).float()
        if function is functional.linear and _is_coarse(args[1]) and args[1].numel() > _CHUNK:
            return _linear_in_pieces(*args, **kwargs)
        kwargs = {key: _widened(value) for key, value in kwargs.items()}
        return function(*map(_widened, args), **kwargs)


def _is_coarse(value: Any) -> bool:
    return isinstance(value, nn.Parameter) and value.dtype in (torch.float16, torch.bfloat16)


def _widened(value: Any) -> Any:
    if isinstance(value, list | tuple) and any(map(_is_coarse, value)):
        return [_widened(each) for each in value]
    return value.float() if _is_coarse(value) else value


def _linear_in_pieces(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    outputs, width = weight.shape
    rows = max(1, _CHUNK // width)
    # One buffer for all pieces: allocated one by one, they would fragment the heap.
    buffer, output = torch.empty(rows, width), torch.empty(*inputs.shape[:-1], outputs)
    for start in range(0, outputs, rows):
        piece = weight[start : start + rows]
        output[..., start : start + rows] = functional.linear(inputs, buffer[: len(piece)].copy_(piece))
    return output if bias is None else output + bias.float()


def _keep(model: Any) -> dict[str, int]:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    known = "logits_to_keep" in inspect.signature(inner.forward).parameters
    return {"logits_to_keep": _SHOWN} if known else {}


def _distance(one: list[Tensor], other: list[Tensor]) -> float:
    if [x.shape for x in one] != [x.shape for x in other]:
        return float("inf")
    # torch's max, unlike Python's, keeps a NaN.
    return float(torch.stack([(x - y).abs().max() for x, y in zip(one, other, strict=True)]).max())


# The README.md beside an exported checkpoint or adapter.


def write_card(
    job: ExportJob, folder: Path, notes: list[str], *, stored: str, library_name: str, relation: str
) -> None:
    """Write the vector's record and ``README.md``: base model, vector, how it was ``stored`` and checked.

    A placebo, or a vector chosen on evaluation documents, is said to be one.

    Args:
        library_name: what loads the folder.
        relation: to the base model, as the Hub names relations.
    """
    base, vector = job.base, job.vector
    (folder / RECORD_NAME).write_text(record(vector, job.shifts), encoding="utf-8")
    data = ModelCardData(
        base_model=base.name,
        base_model_relation=relation,
        library_name=library_name,
        tags=["activation-steering"],
    )
    layers, tasks = ", ".join(map(str, vector.layers)), task_names(vector.metadata)
    at = "".join(f" ({key} `{base.args[key]}`)" for key in WEIGHT_ARGS if base.args.get(key))
    lines = [
        f"# {base.name} with a steering vector",
        "",
        *(line for caution in cautions(vector) for line in (f"**{_sentence(caution)}.**", "")),
        f"`{base.name}`{at} with one constant vector added to the residual stream after block {layers}, "
        f"{stored} by `aft export`.",
        "",
        f"- Vector: SHA-256 `{vector.digest()}`, norm {norm_text(vector.norm(), vector.share())}, "
        f"coefficient {vector.coefficient:g}"
        + (f", trained on {', '.join(f'`{task}`' for task in tasks)}" if tasks else ""),
        *(f"- {_sentence(note)}." for note in notes),
        f"- `{RECORD_NAME}` holds the vector's own record of how it was made and chosen.",
        "- The base model's licence applies.",
    ]
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines) + "\n").save(folder / "README.md")


def _sentence(phrase: str) -> str:
    return phrase[0].upper() + phrase[1:]
