"""The README.md beside an exported checkpoint or adapter."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from lm_eval_aft.export.base import Base
from lm_eval_aft.export.provenance import FILE_NAME, cautions
from lm_eval_aft.library.entry import task_names
from lm_eval_aft.vector import SteeringVector

_RELATION = {"merged": "finetune", "peft": "adapter"}
_LIBRARY = {"merged": "transformers", "peft": "peft"}


def write_card(folder: Path, kind: str, base: Base, vector: SteeringVector, notes: list[str]) -> None:
    """Write ``folder/README.md``: base model, the vector's identity, how it was stored and checked.

    A placebo, or a vector chosen on evaluation documents, is said to be one.
    """
    data = ModelCardData(
        base_model=base.name,
        base_model_relation=_RELATION[kind],
        library_name=_LIBRARY[kind],
        tags=["activation-steering"],
    )
    layers, tasks = ", ".join(map(str, vector.layers)), task_names(vector.metadata)
    at = f" (revision `{base.revision}`)" if base.revision else ""
    lines = [
        f"# {base.name} with a steering vector",
        "",
        *(line for caution in cautions(vector) for line in (f"**{_sentence(caution)}.**", "")),
        f"`{base.name}`{at} with one constant vector added to the residual stream after block {layers}, "
        f"{'folded into its weights' if kind == 'merged' else 'as a PEFT adapter'} by `aft export`.",
        "",
        f"- Vector: SHA-256 `{vector.digest()}`, norm {vector.norm():.4g}, coefficient {vector.coefficient:g}"
        + (f", trained on {', '.join(f'`{task}`' for task in tasks)}" if tasks else ""),
        *(f"- {_sentence(note)}." for note in notes),
        f"- `{FILE_NAME}` holds the vector's own record of how it was made and chosen.",
        "- The base model's licence applies.",
    ]
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines) + "\n").save(folder / "README.md")


def _sentence(phrase: str) -> str:
    return phrase[0].upper() + phrase[1:]
