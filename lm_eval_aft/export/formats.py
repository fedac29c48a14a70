"""The formats a vector can be exported to and imported from.

To add a format, write a class here under ``@register_format``: ``aft export``, its help and ``aft import``
read `FORMATS`. Imports that need torch are inside the methods, so that ``aft export --help`` starts at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

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
        self, source: Path, model: str | None, args: Mapping[str, Any], progress: Progress
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
        self, source: Path, model: str | None, args: Mapping[str, Any], progress: Progress
    ) -> tuple[SteeringVector, list[str]]:
        from lm_eval_aft.export.peft import import_peft

        return import_peft(source, model, args, progress)


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
        self, source: Path, model: str | None, args: Mapping[str, Any], progress: Progress
    ) -> tuple[SteeringVector, list[str]]:
        from lm_eval_aft.export.gguf import import_gguf

        return import_gguf(source, model, args, progress)


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


@register_format
class VLLMLens(Format):
    """The JSON of vllm-lens's ``SteeringVector``."""

    name = "vllm-lens"
    summary = "vLLM's plugin"
    description = "the .json file for vllm-lens: SteeringVector.model_validate_json"
    suffixes = (".json",)
    imported = "a vllm-lens .json file"

    def write(self, job: ExportJob) -> Export:
        from lm_eval_aft.export.vllm_lens import export_vllm_lens

        return export_vllm_lens(job)

    def recognises(self, source: Path) -> bool:
        return source.is_file() and _start(source).lstrip()[:1] == b"{"

    def read(
        self, source: Path, model: str | None, args: Mapping[str, Any], progress: Progress
    ) -> tuple[SteeringVector, list[str]]:
        from lm_eval_aft.export.vllm_lens import import_vllm_lens

        return import_vllm_lens(source, model, args, progress)


def _silent(_stage: str) -> None: ...


def export_vector(
    vector: SteeringVector,
    kind: str,
    output: str | Path,
    *,
    model: str | None = None,
    revision: str | None = None,
    model_args: Mapping[str, Any] | None = None,
    allow_mismatch: bool = False,
    blocks: str | None = None,
    progress: Progress = _silent,
) -> Export:
    """Write a vector in another tool's format, check it by loading it there, and say how well it agrees.

    Args:
        kind: ``merged`` (a plain checkpoint), ``peft``, ``gguf`` (llama.cpp) or ``steered`` (lm-eval's).
        output: folder to make for ``merged`` and ``peft``; ``.gguf`` or ``.pt`` file for the others.
        model: base model; by default the one the vector was trained on, loaded as it was then.
        model_args: further arguments of lm-eval's ``hf``: ``subfolder``, ``gguf_file``, ``peft``, ...
        allow_mismatch: export for a sibling of the model that the vector was trained on.
        blocks: dotted path of the decoder blocks, for architectures not recognised.
        progress: called with a word on each stage as it starts.

    Raises:
        AFTError: bad input, or an export that does not compute what the vector does; nothing is left.

    >>> export_vector(load_vector("arc"), "merged", "pythia-arc").agreement  # doctest: +SKIP
    Agreement(difference=1.4e-06, bound=0.00017, effect=2.1, probes=3)
    """
    from lm_eval_aft.export import base as bases

    if kind not in FORMATS:
        raise AFTError(f"There is no export {kind!r}.", f"Choose one of: {', '.join(FORMATS)}.")
    chosen, target = FORMATS[kind], Path(output)
    if chosen.suffixes and target.suffix not in chosen.suffixes:
        suffix = chosen.suffixes[0]
        raise AFTError(f"{target} should be a {suffix} file.", f"Write -o {target}{suffix}.")
    check_absent(target)
    bases.check_constant(vector)
    args = {"revision": revision, **(model_args or {})}
    if model is None:
        model, recorded = bases.recorded_base(vector.metadata)
        args = recorded | {key: value for key, value in args.items() if value is not None}
    if not model:
        raise AFTError("The vector does not say which model it is for.", "Give --model.")
    chosen.check(vector)
    progress(f"loading {model}")
    base = bases.load_base(model, args, blocks)
    shifts = bases.check_vector(vector, base, allow_mismatch=allow_mismatch)
    made = chosen.write(bases.ExportJob(base, vector, shifts, target, progress))
    made.notes.extend(bases.cautions(vector))
    return made


def import_vector(
    source: str | Path,
    output: str | Path,
    *,
    model: str | None = None,
    revision: str | None = None,
    model_args: Mapping[str, Any] | None = None,
    layers: Sequence[int] = (),
    progress: Progress = _silent,
) -> tuple[Path, list[str]]:
    """Make a vector folder of what another tool wrote; docs/exports.md lists the tools.

    Args:
        model: the model it is for. Optional for a control vector, which then carries no fingerprint;
            for an adapter the one its config names.
        model_args: further arguments of lm-eval's ``hf``: ``subfolder``, ``gguf_file``, ...
        layers: keep these blocks only.

    Returns:
        The folder and notes on what was read and checked.

    Raises:
        AFTError: a format that is not read, pickled, damaged, not a constant, or for another model.
    """
    source, target = Path(source), Path(output)
    check_absent(target)
    if not source.exists():
        raise AFTError(f"There is nothing at {source}.", _wanted())
    found = next((each for each in FORMATS.values() if each.recognises(source)), None)
    if found is None:
        raise _refusal(source)
    vector, notes = found.read(source, model, {"revision": revision, **(model_args or {})}, progress)
    if layers:
        lacking = ", ".join(str(layer) for layer in layers if layer not in vector.layers)
        if lacking:
            raise AFTError(f"{source} holds nothing for block {lacking}.", f"It has: {list(vector.layers)}.")
        vector.layers = {layer: vector.layers[layer] for layer in sorted(set(layers))}
        notes.append(f"only block {', '.join(map(str, vector.layers))} was kept")
    with appearing(target) as folder:
        vector.save(folder)
    return target, notes


def _wanted() -> str:
    return f"Give {' or '.join(each.imported for each in FORMATS.values() if each.imported)}."


def _refusal(source: Path) -> AFTError:
    """Why a file is none that can be read, from its first bytes; other tools' pickles are never opened."""
    from lm_eval_aft.export.base import CONVERT

    start = _start(source)
    if start[:1] == b"\x80" or start[:2] == b"PK":
        return AFTError(
            f"{source} is a pickle or a torch.save archive.",
            f"Pickles can run code, so they are never opened; .gguf and safetensors are read. {CONVERT}",
        )
    if start == b"vers":
        return AFTError(
            f"{source} is not a GGUF file but a pointer of Git LFS, which stands for a file that was not "
            "downloaded.",
            "Run git lfs pull in its repository, or download the file itself.",
        )
    if source.suffix == ".safetensors":
        from lm_eval_aft.steering.vector_file import read_header

        try:
            read_header(source)
        except AFTError as error:
            return AFTError(error.what, f"Its names do not say what is added where. {CONVERT}")
        return AFTError(
            f"{source} is not a GGUF file but a vector of this package.", "Give it as it is, as --vector."
        )
    return AFTError(f"{source} is not a GGUF file.", _wanted())


def _start(file: Path) -> bytes:
    with file.open("rb") as stream:
        return stream.read(4)
