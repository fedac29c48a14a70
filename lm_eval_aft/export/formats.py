"""The formats a vector can be exported to and imported from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from lm_eval_aft._util.errors import AFTError
from lm_eval_aft._util.files import appearing, check_absent
from lm_eval_aft.export.base import (
    RECORD_NAME,
    Base,
    Export,
    ExportProgress,
    cautions,
    check_constant,
    check_vector,
    load_base,
    read_record,
    restore,
)
from lm_eval_aft.steering.fingerprint import compare_fingerprints, fingerprint
from lm_eval_aft.steering.hooks import check_fits
from lm_eval_aft.steering.vector import SteeringVector

EXPORT_KINDS = ("merged", "peft", "gguf", "steered")
_SUFFIXES = {"gguf": (".gguf",), "steered": (".pt", ".pth")}


def _silent(_stage: str) -> None: ...


def export_vector(
    vector: SteeringVector,
    kind: str,
    output: str | Path,
    *,
    model: str | None = None,
    revision: str | None = None,
    allow_mismatch: bool = False,
    blocks: str | None = None,
    progress: ExportProgress = _silent,
) -> Export:
    """Write a vector in another tool's format, check it by loading it there, and tell how well it agrees.

    Args:
        kind: ``merged`` (a plain checkpoint), ``peft``, ``gguf`` (llama.cpp) or ``steered`` (lm-eval's).
        output: folder to make for ``merged`` and ``peft``; ``.gguf`` or ``.pt`` file for the others.
        model: base model; by default the one the vector was trained on.
        allow_mismatch: export for a sibling of the model that the vector was trained on.
        blocks: dotted path of the decoder blocks, for architectures not recognised.
        progress: called with a word on each stage as it starts.

    Raises:
        AFTError: bad input, or an export that does not compute what the vector does; nothing is left.
    """
    if kind not in EXPORT_KINDS:
        raise AFTError(f"There is no export {kind!r}.", f"Choose one of: {', '.join(EXPORT_KINDS)}.")
    target = Path(output)
    wanted = _SUFFIXES.get(kind)
    if wanted and target.suffix not in wanted:
        raise AFTError(f"{target} should be a {wanted[0]} file.", f"Write -o {target}{wanted[0]}.")
    check_absent(target)
    check_constant(vector)
    recorded = vector.metadata.get("base_model") or {}
    if model is None:
        model, revision = recorded.get("name"), revision or recorded.get("revision")
    if not model:
        raise AFTError("The vector does not say which model it is for.", "Give --model.")
    if kind == "gguf":
        from lm_eval_aft.export.gguf import check_layers

        check_layers(vector.layers)  # before a model is loaded for nothing
    progress(f"loading {model}")
    base = load_base(model, revision, blocks)
    deltas = check_vector(vector, base, allow_mismatch=allow_mismatch)
    made = _exported(kind, base, vector, deltas, target, progress)
    made.notes.extend(cautions(vector))
    return made


def _exported(
    kind: str,
    base: Base,
    vector: SteeringVector,
    deltas: dict[int, Tensor],
    target: Path,
    progress: ExportProgress,
) -> Export:
    if kind == "merged":
        from lm_eval_aft.export.merged import export_merged

        return export_merged(base, vector, deltas, target, progress)
    if kind == "peft":
        from lm_eval_aft.export.peft import export_peft

        return export_peft(base, vector, deltas, target, progress)
    if kind == "gguf":
        from lm_eval_aft.export.gguf import export_gguf

        return export_gguf(base, vector, deltas, target, progress)
    from lm_eval_aft.export.steered import export_steered

    return export_steered(base, deltas, target, progress)


def import_vector(
    source: str | Path,
    output: str | Path,
    *,
    model: str | None = None,
    revision: str | None = None,
    progress: ExportProgress = _silent,
) -> tuple[Path, list[str]]:
    """Make a vector folder of a llama.cpp control vector (``.gguf``) or a PEFT bias adapter (a folder).

    Args:
        model: the model it is for. Optional for a control vector, which then carries no fingerprint;
            for an adapter the one its config names.

    Returns:
        The folder and notes on what was read and checked.

    Raises:
        AFTError: neither of the two, pickled, damaged, not a constant, or for another model.
    """
    target = Path(output)
    check_absent(target)
    vector, notes = read(Path(source), model, revision, progress)
    with appearing(target) as folder:
        vector.save(folder)
    return target, notes


# What others made, as vectors.


def read(
    source: Path, model: str | None, revision: str | None, progress: ExportProgress
) -> tuple[SteeringVector, list[str]]:
    """The vector in a ``.gguf`` file or a PEFT adapter folder, and notes; see `import_vector`.

    Raises:
        AFTError: neither of the two, or it cannot be read as a vector.
    """
    if not source.exists():
        raise AFTError(f"There is nothing at {source}.", "Give a .gguf file or a PEFT adapter folder.")
    if source.is_dir():
        return _adapter(source, model, revision, progress)
    with source.open("rb") as stream:
        start = stream.read(4)
    if start != b"GGUF":
        pickled = start[:1] == b"\x80" or start[:2] == b"PK"
        raise AFTError(
            f"{source} is {'a pickle or a torch.save archive' if pickled else 'not a GGUF file'}.",
            "Pickles can run code, so they are never opened; .gguf and safetensors are read."
            if pickled
            else "Give a .gguf file or a PEFT adapter folder.",
        )
    return _control_vector(source, model, revision, progress)


def _control_vector(
    source: Path, model: str | None, revision: str | None, progress: ExportProgress
) -> tuple[SteeringVector, list[str]]:
    from lm_eval_aft.export.gguf import RECORD, read_gguf

    layers, described = read_gguf(source)
    own = described.pop("aft", None)
    vector = SteeringVector(layers, metadata={"imported_from": {"format": "gguf", **described}})
    notes = [f"directions for blocks {', '.join(map(str, layers))}, hidden size {vector.hidden_size}"]
    notes += restore(vector, own, f"{RECORD} in {source.name}")
    if model is None:
        if "fingerprint" not in vector.metadata:
            notes.append(
                "no --model was given: the vector carries no fingerprint and fits any model of its width"
            )
        return vector, notes
    progress(f"loading {model}")
    base = load_base(model, revision)
    check_fits(vector, base.backbone)
    return vector, notes + _identify(vector, _identity(base))


def _adapter(
    source: Path, model: str | None, revision: str | None, progress: ExportProgress
) -> tuple[SteeringVector, list[str]]:
    from lm_eval_aft.export.peft import import_peft, read_biases, read_config

    config = read_config(source)
    read_biases(source)  # before a model is loaded for nothing
    own = read_record(source)
    if model is None:
        model, revision = config.get("base_model_name_or_path"), revision or config.get("revision")
    if not model:
        raise AFTError("The adapter does not name its base model.", "Give --model.")
    progress(f"loading {model}")
    base = load_base(model, revision)
    identity = _identity(base)  # before peft wraps the Linears
    deltas, agreement = import_peft(base, source, progress)
    described = {"format": "peft", "peft_type": config["peft_type"]}
    vector = SteeringVector(deltas, metadata={"imported_from": described})
    notes = [f"{config['peft_type']} on blocks {', '.join(map(str, deltas))}", str(agreement)]
    notes += restore(vector, own, RECORD_NAME)
    return vector, notes + _identify(vector, identity)


def _identify(vector: SteeringVector, identity: dict[str, Any]) -> list[str]:
    """Make the vector one for the model it was imported for; a note where its record names another."""
    recorded = vector.metadata.get("fingerprint")
    trained_on = (vector.metadata.get("base_model") or {}).get("name")
    vector.metadata |= identity
    if recorded is None:
        return []
    try:
        differences = compare_fingerprints(recorded, identity["fingerprint"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise AFTError(
            f"The fingerprint in the vector's record is damaged ({error!r}).", "Export it again."
        ) from error
    if not differences:
        return []
    vector.metadata["imported_from"]["trained_on"] = trained_on
    return [f"it was trained on {trained_on!r}, not on this model: {', '.join(differences)} differ"]


def _identity(base: Base) -> dict[str, Any]:
    return {
        "base_model": {"name": base.name, "revision": base.revision},
        "num_hidden_layers": len(base.backbone.blocks),
        "fingerprint": fingerprint(base.model, base.tokenizer),
    }
