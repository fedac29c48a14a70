"""What users call a base model by: a name on the Hub, a folder, or a GGUF file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lm_eval_aft._util.errors import AFTError

_PART = re.compile(r"-\d{5}-of-(?!00001)\d{5}\.gguf$", re.IGNORECASE)


def model_source(pretrained: Any, given: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A model and its arguments as lm-eval's `hf` takes them.

    The path of a GGUF file becomes its folder and the file's name as ``gguf_file``; all else stays. Where a
    tokenizer lies beside the file, it is named too: transformers would take its vocabulary alone, and leave
    out its special tokens and chat template.

    >>> model_source("owner/model", {"dtype": "float32"})
    ('owner/model', {'dtype': 'float32'})
    >>> model_source("models/q4.gguf", {})  # doctest: +SKIP
    ('models', {'gguf_file': 'q4.gguf'})

    Raises:
        AFTError: no such file, one part of a split file, or a folder with GGUF files and no other model.
    """
    args = dict(given)
    if not isinstance(pretrained, str):
        return pretrained, args
    place = Path(pretrained)
    if place.suffix.lower() == ".gguf" and not place.is_dir():
        if args.get("gguf_file"):
            raise AFTError(
                f"Two GGUF files are given: {pretrained!r}, and gguf_file={args['gguf_file']!r}.",
                "Leave gguf_file= out.",
            )
        if not place.is_file():
            folder = pretrained.rpartition("/")[0] or "OWNER/NAME"
            raise AFTError(
                f"There is no file {pretrained}.",
                f"Check the path; for a file of a model on the Hub use pretrained={folder},"
                f"gguf_file={place.name} (on the command line --model {folder} --model-args "
                f"gguf_file={place.name}).",
            )
        pretrained, args["gguf_file"] = str(place.parent), place.name
    elif not args.get("gguf_file"):
        if (files := sorted(place.glob("*.gguf"))) and not (place / "config.json").is_file():
            raise AFTError(
                f"{pretrained!r} holds no model but GGUF files.",
                f"Give one of them: {files[0]} (to lm-eval's own hf: pretrained={pretrained},"
                f"gguf_file={files[0].name}).",
            )
        return pretrained, args
    if _PART.search(str(args["gguf_file"])):
        raise AFTError(
            f"{args['gguf_file']} is one part of a split model, and transformers reads whole files only.",
            "Join the parts: llama-gguf-split --merge FIRST-PART WHOLE.gguf",
        )
    if not args.get("tokenizer") and not args.get("subfolder") and _has_tokenizer(Path(pretrained)):
        args["tokenizer"] = pretrained
    return pretrained, args


def _has_tokenizer(folder: Path) -> bool:
    return (folder / "tokenizer.json").is_file() and (folder / "tokenizer_config.json").is_file()


def unpacked(gguf_file: Any) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` by which the weights of a GGUF file become ordinary ones.

    Where the package ``kernels`` is installed, transformers would leave them in their quantised blocks, which
    nothing here can compare, train on or write.
    """
    import transformers

    if not gguf_file or not hasattr(transformers, "GgufConfig"):  # before it, they always did
        return {}
    return {"quantization_config": transformers.GgufConfig(dequantize=True)}


def loaded_by_lm_eval(path: str, args: Mapping[str, Any]) -> tuple[Any, Any]:
    """A model and its tokenizer as lm-eval's ``hf`` loads them, on the CPU unless ``args`` say otherwise."""
    from lm_eval.models.huggingface import HFLM

    class Unpacked(HFLM):
        def _create_model(self, *given: Any, **options: Any) -> None:
            super()._create_model(*given, **(options | unpacked(options.get("gguf_file"))))

    lm = Unpacked(pretrained=path, **{"device": "cpu", **args})
    model: Any = lm.model
    if args.get("gguf_file"):  # dequantised while it was read: a checkpoint of it is a plain one
        vars(model.config).pop("quantization_config", None)
    return model, lm.tokenizer
