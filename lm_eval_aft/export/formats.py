"""The formats a vector can be exported to and imported from.

To add a format, write a class here under ``@register_format``: ``aft export``, its help and ``aft import``
read `FORMATS`. Imports that need torch are inside the methods, so that ``aft export --help`` starts at once.
"""

from __future__ import annotations

import base64
import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lm_eval_aft._util.errors import AFTError
from lm_eval_aft._util.files import appearing, check_absent
from lm_eval_aft._util.private_names import borrowed

if TYPE_CHECKING:
    from torch import Tensor

    from lm_eval_aft.export.base import Base, Export, ExportJob
    from lm_eval_aft.steering.vector import SteeringVector

Progress = Callable[[str], None]


class Format:
    """A format of another tool.

    By default it is written and read by the functions ``write`` and ``read`` of the module here that has its
    name.

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

    def check(self, vector: SteeringVector) -> None:
        """Raise `AFTError` for a vector that the format cannot express, before any model is loaded."""

    def write(self, job: ExportJob) -> Export:
        """Write the export and check it by loading it again.

        Raises:
            AFTError: it cannot be expressed or written, or does not compute what the vector does.
        """
        made: Export = importlib.import_module(f"lm_eval_aft.export.{self.name}").write(job)
        return made

    def recognises(self, source: Path) -> bool:
        """Whether ``source``, which exists, is of this format."""
        return False

    def read(
        self, source: Path, model: str | None, args: Mapping[str, Any], progress: Progress
    ) -> tuple[SteeringVector, list[str]]:
        """The vector in ``source``, and notes on what was read and checked; see `import_vector`."""
        module = importlib.import_module(f"lm_eval_aft.export.{self.name}")
        vector, notes = module.read(source, model, args, progress)
        return vector, notes


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


@register_format
class Peft(Format):
    """A PEFT adapter folder."""

    name = "peft"
    summary = "an adapter"
    description = "a folder for PeftModel.from_pretrained and `lm_eval --model hf ... peft=`"
    imported = "a PEFT adapter folder"

    def recognises(self, source: Path) -> bool:
        return source.is_dir()


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

    def recognises(self, source: Path) -> bool:
        return source.is_file() and _start(source) == b"GGUF"


@register_format
class Steered(Format):
    """The file of lm-eval's own ``--model steered``."""

    name = "steered"
    summary = "lm-eval's own"
    description = "the .pt file for `lm_eval --model steered --model_args ...,steer_path=`"
    suffixes = (".pt", ".pth")

    def write(self, job: ExportJob) -> Export:
        """Write the file and compare logits through lm-eval's own loader, in the model's own dtype.

        Raises:
            AFTError: the blocks lie outside the base model that lm-eval hooks, or the check fails.
        """
        import torch

        from lm_eval_aft.export import base as checks
        from lm_eval_aft.steering.hooks import add_all

        base, shifts = job.base, job.shifts
        wanted = {id(base.backbone.blocks[layer]): layer for layer in shifts}
        modules = base.model.base_model.named_modules()  # lm-eval's names begin there, with an adapter too
        points = {wanted[id(module)]: name for name, module in modules if id(module) in wanted}
        if points.keys() != shifts.keys():
            raise AFTError(f"lm-eval's steered model cannot reach {base.backbone.name}.", "Use --to peft.")
        content = {
            points[layer]: {"steering_vector": delta, "steering_coefficient": 1.0, "action": "add"}
            for layer, delta in shifts.items()
        }
        job.progress("base model's logits")
        # Only the short ones: lm-eval's call returns the logits of every position.
        prompts = checks.probe_prompts(base.config)[:1]
        # lm-eval rounds the vector to the model's dtype, as the hook does where activations have it too.
        rounded = {layer: delta.to(base.model.dtype) for layer, delta in shifts.items()}
        with torch.no_grad():
            plain = [base.model(input_ids=ids, use_cache=False).logits for ids in prompts]
            with add_all(base.backbone, rounded):
                steered = [base.model(input_ids=ids, use_cache=False).logits for ids in prompts]
        with appearing(job.target, 10**6) as file:
            job.progress("writing")
            # Not straight into the file: on a full disk torch raises RuntimeError, or nothing before 2.10.
            buffer = BytesIO()
            torch.save(content, buffer)
            file.write_bytes(buffer.getvalue())
            job.progress("reloading")
            exported = _steered_logits(base, file, prompts)
            sides = ([logits.float() for logits in side] for side in (plain, steered, exported))
            agreement = checks.require_agreement(checks.compare_logits(*sides), "file")
        notes = [f"it hooks {', '.join(points.values())}", *checks.same_base(base)]
        return checks.Export(job.target, self.name, agreement, notes)


def _steered_logits(base: Base, file: Path, prompts: list[Tensor]) -> list[Tensor]:
    import torch

    call = "lm-eval: SteeredModel._model_call"
    with borrowed(call):
        from lm_eval.models.hf_steered import SteeredModel

    if base.tokenizer is None:
        raise AFTError(f"{base.name} has no tokenizer, which lm-eval needs.")
    lm: Any = SteeredModel(base.model, str(file), device="cpu", tokenizer=base.tokenizer)
    with borrowed(call):
        ask = lm._model_call
    try:
        with torch.no_grad():
            return [ask(ids) for ids in prompts]
    except TypeError as error:  # its hook takes tensors and tuples
        raise AFTError(
            f"lm-eval's steered model cannot hook blocks of {base.config.model_type} ({error}).",
            "Score it with `--model aft`, or use --to merged or --to peft.",
        ) from error


@register_format
class VLLMLens(Format):
    """The JSON of vllm-lens's ``SteeringVector``, which it adds after the blocks that are listed.

    ``activations`` is a tensor in base64, perhaps compressed: (blocks, hidden_size), or with positions in
    between. What is added is ``scale`` times it, or with ``norm_match`` a share of each token's own norm.
    """

    name = "vllm-lens"
    summary = "vLLM's plugin"
    description = "the .json file for vllm-lens: SteeringVector.model_validate_json"
    suffixes = (".json",)
    imported = "a vllm-lens .json file"

    def write(self, job: ExportJob) -> Export:
        """Write the file and read it back.

        Raises:
            AFTError: it cannot be written, or does not read back equal.
        """
        import torch

        from lm_eval_aft.export.base import Export

        values = torch.stack(list(job.shifts.values())).numpy().astype("<f4")
        data = base64.b64encode(values.tobytes()).decode()
        content = {
            "activations": {"data": data, "dtype": "float32", "shape": values.shape},
            "layer_indices": list(job.shifts),
            "scale": 1.0,
            "norm_match": False,
        }
        with appearing(job.target, 10**6) as file:
            job.progress("writing")
            file.write_text(json.dumps(content), encoding="utf-8")
            layers, _ = _lens_layers(file)
            if not all(torch.equal(layers[n], job.shifts[n]) for n in job.shifts):
                raise AFTError("The file was deleted: it does not read back as it was written.")
        notes = [
            f"written for blocks {', '.join(map(str, job.shifts))}; read back equal",
            "its logits were not compared, as that takes vLLM (SteeringVector.model_validate_json there)",
        ]
        return Export(job.target, self.name, None, notes)

    def recognises(self, source: Path) -> bool:
        return source.is_file() and _start(source).lstrip()[:1] == b"{"

    def read(
        self, source: Path, model: str | None, args: Mapping[str, Any], progress: Progress
    ) -> tuple[SteeringVector, list[str]]:
        from lm_eval_aft.export.base import place, told_strength
        from lm_eval_aft.steering.vector import SteeringVector

        layers, scale = _lens_layers(source)
        vector = SteeringVector(layers, scale, metadata={"imported_from": {"format": self.name}})
        notes = [
            f"for blocks {', '.join(map(str, layers))}, hidden size {vector.hidden_size}, scale {scale:g}"
        ]
        notes += ["how the vector was made and chosen is not recorded there", told_strength(vector)]
        return vector, notes + place(vector, model, args, progress)


def _lens_layers(path: Path) -> tuple[dict[int, Tensor], float]:
    """Block -> fp32 ``(hidden_size,)`` of a vllm-lens file, and what they are multiplied by."""
    import numpy as np
    import torch

    from lm_eval_aft.steering.vector_file import MAX_FILE

    # int16 holds the bits of bfloat16, which numpy does not know.
    dtypes = {"float32": "<f4", "float16": "<f2", "float64": "<f8", "int16": "<i2"}
    try:
        if path.stat().st_size > 2 * MAX_FILE:
            raise ValueError("it is too long")
        found = json.loads(path.read_text(encoding="utf-8"))
        stored, indices = found["activations"], [int(each) for each in found["layer_indices"]]
        scale, shape = float(found.get("scale", 1.0)), tuple(map(int, stored["shape"]))
        raw = base64.b64decode(stored["data"], validate=True)
        if stored.get("compression") == "zstd":
            raw = _decompressed(raw, 8 * int(np.prod(shape)))
        values = torch.from_numpy(np.frombuffer(raw, dtypes[stored["dtype"]]).reshape(shape).copy())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise AFTError(
            f"{path} is not a steering vector of vllm-lens: {str(error)[:200] or type(error).__name__}.",
            "EasySteer's JSON files, settings and biases of expert routers, hold no vector either.",
        ) from error
    if found.get("norm_match"):
        raise AFTError(
            f"{path} has norm_match: what it adds grows with a token's hidden state, so it is no constant.",
            "Write it with norm_match=False and a scale to match.",
        )
    if len(shape) != 2 or found.get("position_indices") is not None:
        raise AFTError(
            f"{path} holds values for single positions, shape {shape}; a vector is the same at all of them.",
            "Write it with activations of shape (blocks, hidden_size).",
        )
    if len(indices) != len(values) or len(set(indices)) != len(indices):
        raise AFTError(f"{path} lists blocks {indices} for {shape[0]} rows of values.", "Write it again.")
    if "bfloat16" in str(stored.get("original_dtype")):
        values = values.view(torch.bfloat16)
    return dict(zip(indices, values.float(), strict=True)), scale


def _decompressed(data: bytes, most: int) -> bytes:
    try:
        import zstandard
    except ImportError as error:
        raise AFTError(
            "This file of vllm-lens is compressed, which needs the zstandard package.",
            "Install it: pip install zstandard",
        ) from error
    try:
        return bytes(zstandard.ZstdDecompressor().decompress(data, max_output_size=most))
    except zstandard.ZstdError as error:
        raise ValueError(f"its data are damaged ({error})") from error


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
