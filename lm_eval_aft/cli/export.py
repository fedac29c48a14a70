"""``aft export`` and ``aft import``: vectors for other tools and from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from lm_eval_aft._util.process import quiet_libraries
from lm_eval_aft.cli.options import offline_option, parse_model_args
from lm_eval_aft.export.formats import FORMATS, export_vector, import_vector


def _output_help() -> str:
    folders = [each.name for each in FORMATS.values() if not each.suffixes]
    files = [each.suffixes[0] for each in FORMATS.values() if each.suffixes]
    return f"Folder to make ({', '.join(folders)}), or {' or '.join(files)} file."


def _export_help() -> str:
    width = max(map(len, FORMATS)) + 2
    lines = [
        f"{'' if i else each.name:{width}}{line}"
        for each in FORMATS.values()
        for i, line in enumerate(each.description.splitlines())
    ]
    return _HELP.format("\n".join(lines))


_HELP = """Write VECTOR in a format that other tools read, and check that it does the same there.

\b
{}

The result is loaded again and its logits are compared with the steered model's (merged and
steered: with the vector as the checkpoint's dtype rounds it); one that does not agree is deleted.
Files of gguf and vllm-lens are read back instead. merged, peft and gguf keep the vector's own
record of how it was made and chosen, which `aft import` reads.

\b
Examples:
  aft export arc --to merged --output pythia-arc
  aft export demo-results/vector --model demo --to peft -o adapter
  aft export arc --model Qwen/Qwen2-0.5B --to gguf -o arc.gguf
  aft export v --model M --model-args peft=my-adapter --to merged -o m-with-adapter-and-vector
  lm_eval --model hf --model_args pretrained=pythia-arc --tasks arc_challenge
"""


def _arguments(model: str | None, text: str | None, revision: str | None) -> dict[str, Any]:
    from lm_eval_aft.harness.model_args import refuse_steering

    args = parse_model_args(text, revision=revision)
    refuse_steering(args, "they are about the base model, not about what steers it")
    return args


model_args_option = click.option(
    "--model-args", help="Further arguments of lm-eval's hf model: subfolder=..., gguf_file=..., peft=..."
)


@click.command("export", help=_export_help())
@offline_option
@click.argument("vector")
@click.option(
    "--to",
    "kind",
    required=True,
    type=click.Choice(list(FORMATS)),
    help=" ".join(f"{each.name}: {each.summary}." for each in FORMATS.values()),
)
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help=_output_help())
@click.option("--model", help="Hub name, folder or GGUF file of the base model.  [default: the vector's own]")
@click.option("--revision", help="The base model's revision on the Hub.")
@model_args_option
@click.option("--coefficient", type=float, help="Replaces the vector's own coefficient.")
@click.option("--allow-mismatch", is_flag=True, help="Export for another model than the vector's.")
@click.option("--blocks", help="Dotted path of the decoder blocks, for architectures not recognised.")
def export(
    vector: str,
    kind: str,
    output: Path,
    model: str | None,
    revision: str | None,
    model_args: str | None,
    coefficient: float | None,
    allow_mismatch: bool,
    blocks: str | None,
) -> None:
    quiet_libraries()
    from lm_eval_aft.library.load import load_vector

    found = load_vector(vector)
    if coefficient is not None:
        found = dataclasses.replace(found, coefficient=coefficient)
    with _stages() as progress:
        made = export_vector(
            found,
            kind,
            output,
            model=model,
            model_args=_arguments(model, model_args, revision),
            allow_mismatch=allow_mismatch,
            blocks=blocks,
            progress=progress,
        )
    for note in made.notes:
        click.echo(f"{note[0].upper()}{note[1:]}.")
    if made.agreement is not None:
        click.echo(f"Verified: {made.agreement}.")
    click.echo(f"Wrote {made.path}")


@click.command("import")
@click.argument("source", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Vector folder to make.")
@click.option("--model", help="The model it is for.  [default: the one an adapter names; none for .gguf]")
@click.option("--revision", help="That model's revision on the Hub.")
@model_args_option
@click.option(
    "--layer", "layers", type=click.IntRange(min=0), multiple=True, help="Keep this block only; may repeat."
)
def import_(
    source: Path,
    output: Path,
    model: str | None,
    revision: str | None,
    model_args: str | None,
    layers: tuple[int, ...],
) -> None:
    """Make a vector folder of what another tool wrote.

    SOURCE is a control vector of llama.cpp, repeng or EasySteer (.gguf), a steering vector of vllm-lens
    (.json), or a PEFT adapter folder that adds a constant: BEFT, or LoRA with zero matrices and
    lora_bias. Pickles (.pt, .bin) are never opened.

    \b
    Examples:
      aft import happy.gguf --model mistralai/Mistral-7B-v0.1 -o happy
      aft import diffmean.gguf --layer 14 --layer 15 -o vector
      aft import adapter -o vector
    """
    quiet_libraries()
    with _stages() as progress:
        path, notes = import_vector(
            source,
            output,
            model=model,
            model_args=_arguments(model, model_args, revision),
            layers=layers,
            progress=progress,
        )
    for note in notes:
        click.echo(f"{note[0].upper()}{note[1:]}.")
    click.echo(f"Wrote {path}")


@contextmanager
def _stages() -> Iterator[Callable[[str], None]]:
    """A line that says what is going on and for how long; nothing where there is no terminal."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting")
        yield lambda stage: bar.update(task, description=stage)
