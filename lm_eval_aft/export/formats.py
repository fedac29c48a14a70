"""The formats a vector can be exported to and imported from.

To add a format, write a class here under ``@register_format``: ``aft export``, its help and ``aft import``
read `FORMATS`. Imports that need torch are inside the methods, so that ``aft export --help`` starts at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from lm_eval_aft._util.errors import AFTError
from lm_eval_aft._util.files import appearing, check_absent

if TYPE_CHECKING:
    from lm_eval_aft.export.base import Export, ExportJob
    from lm_eval_aft.steering.vector import SteeringVector

Progress = Callable[[str], None]


class Format(ABC):
    """A format of another tool.

    Attributes:
        name: what ``--to`` calls it.
        summary: it in a few words, for the help of ``--to``.
        description: lines for the help of ``aft export``.
        suffixes: of the file it writes, the usual one first; empty where it writes a folder.
        imported: what ``aft import`` reads of it, in words; empty where it reads nothing.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    description: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]] = ()
    imported: ClassVar[str] = ""

    def check(self, vector: SteeringVector) -> None:  # noqa: B027 - most formats take every vector
        """Raise `AFTError` for a vector that the format cannot express, before any model is loaded."""

    @abstractmethod
    def write(self, job: ExportJob) -> Export:
        """Write the export and check it by loading it again.

        Raises:
            AFTError: it cannot be expressed or written, or does not compute what the vector does.
        """

    def recognises(self, source: Path) -> bool:
        """Whether ``source``, which exists, is of this format."""
        return False

    def read(
        self, source: Path, model: str | None, revision: str | None, progress: Progress
    ) -> tuple[SteeringVector, list[str]]:
        """The vector in ``source``, and notes on what was read and checked; see `import_vector`."""
        raise AFTError(
            f"Exports of the format {self.name} cannot be imported.", "Keep the vector's own file."
        )


FORMATS: dict[str, Format] = {}


def register_format(cls: type[Format]) -> type[Format]:
    """Class decorator: make a format available under its name."""
    FORMATS[cls.name] = cls()
    return cls


@register_format
class Merged(Format):
    """A plain transformers checkpoint."""

    name = "merged"
    summary = "a plain checkpoint"
    description = """\
a checkpoint with the vector folded into a bias: no code, no hook, no extra time.
Families without such a bias are rewritten as one that has it, or refused.
A 16-bit bias rounds the vector: the output says by how much, and above 5 % of its norm
it is refused."""

    def write(self, job: ExportJob) -> Export:
        from lm_eval_aft.export.merged import export_merged

        return export_merged(job)


@register_format
class Peft(Format):
    """A PEFT adapter folder."""

    name = "peft"
    summary = "an adapter"
    description = "a folder for PeftModel.from_pretrained and `lm_eval --model hf ... peft=`"
    imported = "a PEFT adapter folder"

    def write(self, job: ExportJob) -> Export:
        from lm_eval_aft.export.peft import export_peft

        return export_peft(job)

    def recognises(self, source: Path) -> bool:
        return source.is_dir()

    def read(
        self, source: Path, model: str | None, revision: str | None, progress: Progress
    ) -> tuple[SteeringVector, list[str]]:
        from lm_eval_aft.export.peft import import_peft

        return import_peft(source, model, revision, progress)


@register_format
class GGUF(Format):
    """llama.cpp's control vector."""

    name = "gguf"
    summary = "llama.cpp's"
    description = "a llama.cpp control vector, for any block but the first"
    suffixes = (".gguf",)
    imported = "a .gguf file"

    def check(self, vector: SteeringVector) -> None:
        if 0 in vector.layers:
            raise AFTError(
                "A llama.cpp control vector cannot act after block 0: it counts blocks from 0 and its loader "
                "refuses direction.0.",
                "Use --to merged, and convert the merged checkpoint to GGUF.",
            )

    def write(self, job: ExportJob) -> Export:
        from lm_eval_aft.export.gguf import export_gguf

        return export_gguf(job)

    def recognises(self, source: Path) -> bool:
        return source.is_file() and _start(source) == b"GGUF"

    def read(
        self, source: Path, model: str | None, revision: str | None, progress: Progress
    ) -> tuple[SteeringVector, list[str]]:
        from lm_eval_aft.export.gguf import import_gguf

        return import_gguf(source, model, revision, progress)


@register_format
class Steered(Format):
    """The file of lm-eval's own ``--model steered``."""

    name = "steered"
    summary = "lm-eval's own"
    description = "the .pt file for `lm_eval --model steered --model_args ...,steer_path=`"
    suffixes = (".pt", ".pth")

    def write(self, job: ExportJob) -> Export:
        from lm_eval_aft.export.steered import export_steered

        return export_steered(job)


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
    """Write a vector in another tool's format, check it by loading it there, and say how well it agrees.

    Args:
        kind: ``merged`` (a plain checkpoint), ``peft``, ``gguf`` (llama.cpp) or ``steered`` (lm-eval's).
        output: folder to make for ``merged`` and ``peft``; ``.gguf`` or ``.pt`` file for the others.
        model: base model; by default the one the vector was trained on.
        allow_mismatch: export for a sibling of the model that the vector was trained on.
        blocks: dotted path of the decoder blocks, for architectures not recognised.
        progress: called with a word on each stage as it starts.

    Raises:
        AFTError: bad input, or an export that does not compute what the vector does; nothing is left.

    >>> export_vector(load_vector("arc"), "merged", "pythia-arc").agreement  # doctest: +SKIP
    Agreement(difference=1.4e-06, bound=0.00017, effect=2.1, probes=3)
    """
    from lm_eval_aft.export.base import ExportJob, cautions, check_constant, check_vector, load_base

    if kind not in FORMATS:
        raise AFTError(f"There is no export {kind!r}.", f"Choose one of: {', '.join(FORMATS)}.")
    chosen, target = FORMATS[kind], Path(output)
    if chosen.suffixes and target.suffix not in chosen.suffixes:
        suffix = chosen.suffixes[0]
        raise AFTError(f"{target} should be a {suffix} file.", f"Write -o {target}{suffix}.")
    check_absent(target)
    check_constant(vector)
    recorded = vector.metadata.get("base_model") or {}
    if model is None:
        model, revision = recorded.get("name"), revision or recorded.get("revision")
    if not model:
        raise AFTError("The vector does not say which model it is for.", "Give --model.")
    chosen.check(vector)
    progress(f"loading {model}")
    base = load_base(model, revision, blocks)
    shifts = check_vector(vector, base, allow_mismatch=allow_mismatch)
    made = chosen.write(ExportJob(base, vector, shifts, target, progress))
    made.notes.extend(cautions(vector))
    return made


def import_vector(
    source: str | Path,
    output: str | Path,
    *,
    model: str | None = None,
    revision: str | None = None,
    progress: Progress = _silent,
) -> tuple[Path, list[str]]:
    """Make a vector folder from a llama.cpp control vector (``.gguf``) or a PEFT bias adapter (a folder).

    Args:
        model: the model it is for. Optional for a control vector, which then carries no fingerprint;
            for an adapter the one its config names.

    Returns:
        The folder and notes on what was read and checked.

    Raises:
        AFTError: neither of the two, pickled, damaged, not a constant, or for another model.
    """
    source, target = Path(source), Path(output)
    check_absent(target)
    wanted = f"Give {' or '.join(each.imported for each in FORMATS.values() if each.imported)}."
    if not source.exists():
        raise AFTError(f"There is nothing at {source}.", wanted)
    found = next((each for each in FORMATS.values() if each.recognises(source)), None)
    if found is None:
        start = _start(source)
        if start[:1] == b"\x80" or start[:2] == b"PK":
            raise AFTError(
                f"{source} is a pickle or a torch.save archive.",
                "Pickles can run code, so they are never opened; .gguf and safetensors are read.",
            )
        raise AFTError(f"{source} is not a GGUF file.", wanted)
    vector, notes = found.read(source, model, revision, progress)
    with appearing(target) as folder:
        vector.save(folder)
    return target, notes


def _start(file: Path) -> bytes:
    with file.open("rb") as stream:
        return stream.read(4)
