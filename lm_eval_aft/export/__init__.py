"""Vectors for other tools: plain checkpoints, PEFT adapters, llama.cpp and lm-eval files; and back."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from lm_eval_aft.errors import AFTError
from lm_eval_aft.export.base import Base, check_constant, check_vector, load_base
from lm_eval_aft.export.provenance import cautions
from lm_eval_aft.export.report import Export, Progress
from lm_eval_aft.export.target import appearing, check_absent
from lm_eval_aft.vector import SteeringVector

__all__ = ["KINDS", "Export", "export_vector", "import_vector"]

KINDS = ("merged", "peft", "gguf", "steered")
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
    progress: Progress = _silent,
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
    if kind not in KINDS:
        raise AFTError(f"There is no export {kind!r}.", f"Choose one of: {', '.join(KINDS)}.")
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
    progress: Progress,
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
    progress: Progress = _silent,
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
    from lm_eval_aft.export.imports import read

    target = Path(output)
    check_absent(target)
    vector, notes = read(Path(source), model, revision, progress)
    with appearing(target) as folder:
        vector.save(folder)
    return target, notes
