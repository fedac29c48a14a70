"""Every model the table of families has a line for: families as they come, and ways of loading one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lm_eval_aft.lm import AFTLM
from tests.support.families import FAMILIES, tiny_model, tiny_tokenizer
from tests.support.trial import Row, Subject, run

BASE = "llama"
Loader = Callable[[Path], Subject]


def save(family: str, folder: Path, dtype: Any = None) -> Path:
    """A checkpoint of a tiny model none of whose norms and biases are ones and zeros."""
    model = tiny_model(family)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.to(dtype or torch.float32).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def opened(pretrained: Any, **arguments: Any) -> AFTLM:
    """The model under test, as `--model aft` makes it."""
    pretrained = str(pretrained) if isinstance(pretrained, Path) else pretrained
    return AFTLM(pretrained, tokenizer=tiny_tokenizer(), device="cpu", batch_size=4, **arguments)


def family(name: str) -> Loader:
    """As it comes."""

    def load(work: Path) -> Subject:
        folder = save(name, work / "base")
        return Subject(opened(folder), folder)

    return load


def with_arguments(**arguments: Any) -> Loader:
    """The base family under arguments of ``--model aft``."""

    def load(work: Path) -> Subject:
        return Subject(opened(save(BASE, work / "base"), **arguments))

    return load


def sixteen_bits(dtype: str) -> Loader:
    """The base family in 16 bits, with the same numbers in float32 to measure its errors by."""

    def load(work: Path) -> Subject:
        folder = save(BASE, work / "base", getattr(torch, dtype))
        return Subject(opened(folder, dtype=dtype), folder, opened(folder, dtype="float32"))

    return load


def with_adapter(work: Path) -> Subject:
    """The base family under a LoRA adapter, not merged."""
    import peft

    base = tiny_model(BASE)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(3)
    peft.get_peft_model(base, config).save_pretrained(work / "lora")
    return Subject(opened(save(BASE, work / "base"), peft=str(work / "lora")))


def quantized(work: Path) -> Subject:
    """The base family with 8-bit weights (torchao)."""
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import AutoModelForCausalLM, TorchAoConfig

    folder = save(BASE, work / "base")
    scheme = TorchAoConfig(Int8WeightOnlyConfig())
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=scheme, dtype=torch.float32)
    return Subject(opened(model.eval()))


def offloaded(*on_disk: str) -> Loader:
    """The base family spread over CPU and disk."""

    def load(work: Path) -> Subject:
        from transformers import AutoModelForCausalLM

        parts = [
            "model.embed_tokens",
            *(f"model.layers.{i}" for i in range(4)),
            "model.norm",
            "model.rotary_emb",
        ]
        places = {part: "disk" if part in on_disk else "cpu" for part in [*parts, "lm_head"]}
        folder = save(BASE, work / "base")
        model = AutoModelForCausalLM.from_pretrained(
            folder, device_map=places, offload_folder=str(work / "offload"), dtype=torch.float32
        )
        return Subject(opened(model.eval()))

    return load


def object_of(name: str) -> Loader:
    """A family that no class for causal language models loads, as a model object."""

    def load(work: Path) -> Subject:
        return Subject(opened(tiny_model(name)))

    return load


# Lines beside the families: (kind, how it is loaded).
WAYS: dict[str, tuple[str, Loader]] = {
    "llama in bfloat16": ("precision", sixteen_bits("bfloat16")),
    "llama in float16": ("precision", sixteen_bits("float16")),
    "llama with eager attention": ("attention", with_arguments(attn_implementation="eager")),
    "llama with sdpa attention": ("attention", with_arguments(attn_implementation="sdpa")),
    "llama with flex attention": ("attention", with_arguments(attn_implementation="flex_attention")),
    "llama under a LoRA adapter (peft=)": ("adapter", with_adapter),
    "llama in int8 (torchao)": ("quantised", quantized),
    "llama, two blocks on disk": ("offloaded", offloaded("model.layers.1", "model.layers.2")),
    "llama, all blocks on disk": ("offloaded", offloaded(*(f"model.layers.{i}" for i in range(4)))),
    "llama, embedding and blocks on disk": (
        "offloaded",
        offloaded("model.embed_tokens", *(f"model.layers.{i}" for i in range(4))),
    ),
    "llava as a model object": ("multimodal", object_of("llava")),
}
SUBJECTS: dict[str, tuple[str, Loader]] = {
    **{name: (found.kind, family(name)) for name, found in FAMILIES.items()},
    **WAYS,
}


def tried(name: str, work: Path) -> Row:
    """The table's line for one of `SUBJECTS`.

    Raises:
        AssertionError: a wrong number. Whatever else it raises is a fault too.
    """
    kind, load = SUBJECTS[name]
    return run(Row(name, kind), lambda: load(work), work)
