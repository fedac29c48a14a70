"""What others made, as vectors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lm_eval_aft.errors import AFTError
from lm_eval_aft.export.base import Base, load_base
from lm_eval_aft.export.provenance import FILE_NAME, read_record, restore
from lm_eval_aft.export.report import Progress
from lm_eval_aft.fingerprint import compare_fingerprints, fingerprint
from lm_eval_aft.steering import check_fits
from lm_eval_aft.vector import SteeringVector


def read(
    source: Path, model: str | None, revision: str | None, progress: Progress
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
    source: Path, model: str | None, revision: str | None, progress: Progress
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
    source: Path, model: str | None, revision: str | None, progress: Progress
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
    notes += restore(vector, own, FILE_NAME)
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
