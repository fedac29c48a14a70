"""Shapes of published models and lengths of well-known tasks' documents, for plans made offline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval_aft._util.errors import AFTError
from lm_eval_aft.engine.batching import Document


def _shape(width: int, layers: int, heads: int, inner: int, vocabulary: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "intermediate_size": inner,
        "vocab_size": vocabulary,
        **more,
    }


def _pythia(width: int, layers: int, heads: int) -> dict[str, Any]:
    shape = _shape(width, layers, heads, 4 * width, 50304, max_position_embeddings=2048)
    del shape["num_key_value_heads"]
    return shape


# What the models' own config.json say of their shape: model type, and the settings that are not its default.
KNOWN: dict[str, tuple[str, dict[str, Any]]] = {
    "EleutherAI/pythia-70m": ("gpt_neox", _pythia(512, 6, 8)),
    "EleutherAI/pythia-160m": ("gpt_neox", _pythia(768, 12, 12)),
    "EleutherAI/pythia-410m": ("gpt_neox", _pythia(1024, 24, 16)),
    "Qwen/Qwen1.5-0.5B": ("qwen2", _shape(1024, 24, 16, 2816, 151936, tie_word_embeddings=True)),
    "Qwen/Qwen1.5-0.5B-Chat": ("qwen2", _shape(1024, 24, 16, 2816, 151936, tie_word_embeddings=True)),
    "Qwen/Qwen1.5-1.8B": ("qwen2", _shape(2048, 24, 16, 5504, 151936)),
    "Qwen/Qwen1.5-1.8B-Chat": ("qwen2", _shape(2048, 24, 16, 5504, 151936)),
    "Qwen/Qwen1.5-7B": ("qwen2", _shape(4096, 32, 32, 11008, 151936)),
    "microsoft/phi-1_5": ("phi", _shape(2048, 24, 32, 8192, 51200, max_position_embeddings=2048)),
    "stabilityai/stablelm-2-1_6b": ("stablelm", _shape(2048, 24, 32, 5632, 100352, use_qkv_bias=True)),
    "meta-llama/Llama-2-7b-hf": ("llama", _shape(4096, 32, 32, 11008, 32000, max_position_embeddings=4096)),
    "mistralai/Mistral-7B-v0.1": (
        "mistral",
        _shape(4096, 32, 32, 14336, 32000, sliding_window=4096) | {"num_key_value_heads": 8},
    ),
}


def find_config(model: str) -> Any:
    """The transformers config of a Hub model or local folder; known shapes need no network.

    Raises:
        AFTError: neither known nor to be had.
    """
    from transformers import AutoConfig

    from lm_eval_aft.demo import resolve_pretrained

    if model in KNOWN:
        family, settings = KNOWN[model]
        return AutoConfig.for_model(family, **settings)
    try:
        return AutoConfig.from_pretrained(resolve_pretrained(model))
    except (OSError, ValueError) as error:
        raise AFTError(
            f"The config of {model!r} cannot be had: {str(error).strip().splitlines()[0]}",
            f"Give a local folder, go online, or use one of: {', '.join(KNOWN)}.",
        ) from error


Lengths = tuple[int, tuple[int, ...]]  # tokens of the context, tokens of each continuation
# The training splits' documents at the 12.5th, 37.5th, 62.5th and 87.5th percentile of length, and at the
# 99.5th, prompted as the stock tasks do, in tokens of a 4,096-entry vocabulary: larger ones need some fewer.
# Then the tokens that each few-shot example adds, on average.
LENGTHS: dict[str, tuple[tuple[Lengths, ...], int]] = {
    "arc_challenge": (
        (
            (21, (2, 2, 5, 5)),
            (32, (3, 6, 6, 9)),
            (17, (12, 18, 13, 15)),
            (93, (2, 2, 6)),
            (147, (7, 7, 8, 7)),
        ),
        46,
    ),
    "arc_easy": (
        (
            *((25, (2, 1, 2, 1)), (15, (7, 8, 9, 6)), (30, (7, 7, 10, 8))),
            *((33, (15, 13, 11, 17)), (105, (9, 12, 14, 18))),
        ),
        40,
    ),
    "hellaswag": (
        (
            *((19, (17, 17, 8, 16)), (32, (13, 17, 17, 17)), (37, (15, 18, 27, 18))),
            *((39, (26, 28, 28, 25)), (76, (53, 19, 33, 61))),
        ),
        57,
    ),
    "aft_demo_choice": (((16, (2, 2, 2, 2)), (22, (4, 4, 4, 4))), 18),
    "aft_demo_math": (((26, (12,)), (36, (14,))), 38),
    "gsm8k": (((64, (81,)), (71, (121,)), (64, (180,)), (131, (198,)), (105, (424,))), 232),
}


def typical_documents(task: str, num_fewshot: int = 0, share: int = 1) -> list[Document]:
    """Documents as long as a well-known task's, without contents; the longest comes last.

    Args:
        share: how many of each length show the same examples, where they show any.

    Raises:
        AFTError: the task's lengths are not known here.
    """
    if task not in LENGTHS:
        raise AFTError(
            f"The lengths of the documents of {task!r} are not known.",
            f"Known: {', '.join(LENGTHS)}. Use documents_of with lengths of your own.",
        )
    lengths, example = LENGTHS[task]
    return with_examples(lengths, num_fewshot * example, share)


def with_examples(lengths: Sequence[Lengths], examples: int, share: int) -> list[Document]:
    """Documents of these lengths after so many tokens of examples, ``share`` of each length with the same."""
    if not examples or share == 1:
        return documents_of([(examples + context, tails) for context, tails in lengths])
    found = []
    for group, (context, tails) in enumerate(lengths):
        for member in range(share):
            prompt = (0,) * examples + (1 + member,) * context
            pairs = tuple((prompt, (0,) * tail) for tail in tails)
            found.append(Document(pairs, (0,), tuple(map(float, tails)), group=group))
    return found


def documents_of(lengths: Sequence[Lengths]) -> list[Document]:
    """Documents of these lengths in tokens, without contents."""
    return [
        Document(
            tuple(((0,) * context, (0,) * tail) for tail in tails), (0,), tuple(float(tail) for tail in tails)
        )
        for context, tails in lengths
    ]
