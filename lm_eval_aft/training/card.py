"""The model card (README.md) of a vector folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from lm_eval_aft.vector import SteeringVector, replacing

_BODY = """\
# {title}

A steering vector for [lm-evaluation-harness](https://github.com/EleutherAI/lm-evaluation-harness):
{width} numbers, added to the residual stream of `{model}` at the output of block
{layer} (of {depth}, counted from 0). Trained on the training split of `{task}`
({shots}-shot, objective `{objective}`, {train} documents).{control}

    lm_eval --model aft --model_args pretrained={model},vector=FOLDER --tasks {task}

## Selection split

These scores chose the layer and the epoch, so they flatter the vector: **they are not results**.
Score the evaluation split with the command above. Cross-entropy in nats after fitting one
temperature; mean over {seeds} seed(s); {n} documents.

| layer | cross-entropy | accuracy |
|---|---|---|
{rows}
"""


def write_card(folder: Path, vector: SteeringVector) -> None:
    """Write ``README.md`` into a vector folder, from the vector's metadata alone."""
    meta = vector.metadata
    data = ModelCardData(
        library_name="lm-eval-aft",
        base_model=_hub_name(meta),
        tags=["activation-steering", "steering-vector", "lm-eval-aft", f"task:{meta['task']}"],
    )
    if data.base_model:
        data["base_model_relation"] = "adapter"
    text = f"---\n{data.to_yaml()}\n---\n\n{_text(vector)}"
    with replacing(folder / "README.md") as temporary:
        ModelCard(text).save(temporary)


def _text(vector: SteeringVector) -> str:
    meta: dict[str, Any] = vector.metadata
    selection = meta["selection"]
    baseline = selection["baseline"]
    rows = [f"| baseline | {baseline['score']:.4f} | {baseline['accuracy']:.4f} |"]
    for layer, result in selection["layers"].items():
        mark = " (chosen)" if int(layer) in vector.layers else ""
        rows.append(f"| {layer}{mark} | {result['score']:.4f} | {result['accuracy']:.4f} |")
    control = meta.get("control")
    return _BODY.format(
        title=f"{meta['task']} for {Path(meta['base_model']['name']).name}",
        width=vector.hidden_size,
        model=meta["base_model"]["name"],
        layer=", ".join(map(str, vector.layers)),
        depth=meta["num_hidden_layers"],
        task=meta["task"],
        shots=meta["num_fewshot"],
        objective=meta["objective"],
        train=meta["splits"]["train"],
        control=f"\n\n**This is a placebo (`{control}`), not a vector to use.**" if control else "",
        seeds=meta["protocol"]["seeds"],
        n=baseline["n"],
        rows="\n".join(rows),
    )


def _hub_name(meta: dict[str, Any]) -> str | None:
    """The base model's name if it is one the Hub could know; a local path is not."""
    name = str(meta["base_model"]["name"])
    return name if name.count("/") <= 1 and not name.startswith((".", "/")) and name else None
