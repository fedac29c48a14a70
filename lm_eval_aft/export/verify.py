"""Does an export compute what the hook computes? Logits on probe prompts, in float32 arithmetic."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lm_eval_aft.errors import AFTError

# Largest difference of two logits, relative to the largest logit where that is above 1.
TOLERANCE = 1e-5
_LONGEST = 1024
_SHOWN = 16  # positions of each probe whose logits are compared
_CHUNK = 2**22  # weights of one matrix turned to float32 at a time: 16 MiB


@dataclass(frozen=True)
class Agreement:
    """The outcome of a comparison, in logits.

    Attributes:
        difference: largest absolute difference between the export and the hooked model.
        bound: what it had to stay within.
        effect: largest absolute change that the vector makes: what would be seen if it were missing.
        probes: number of prompts.
    """

    difference: float
    bound: float
    effect: float
    probes: int

    def __str__(self) -> str:
        return (
            f"logits differ by at most {self.difference:.1e} on {self.probes} probe prompts "
            f"(bound {self.bound:.1e}; the vector itself changes them by {self.effect:.1e})"
        )


def probe_prompts(config: Any) -> list[Tensor]:
    """Random token ids of shape ``(batch, length)``, the same for the same config.

    Three short prompts and, for a model with a sliding window of reasonable size, one that is longer
    than the window.
    """
    text = config.get_text_config()
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(text.vocab_size, (3, _SHOWN), generator=generator)]
    window = getattr(text, "sliding_window", None)
    longest = min(_LONGEST, getattr(text, "max_position_embeddings", None) or _LONGEST)
    if isinstance(window, int) and window < longest:
        length = min(window + _SHOWN, longest)
        prompts.append(torch.randint(text.vocab_size, (1, length), generator=generator))
    return prompts


@torch.no_grad()
def probe_logits(model: Any, prompts: list[Tensor]) -> list[Tensor]:
    """Logits of the last positions of each prompt, ``(batch, <= 16, vocabulary)``, in float32.

    Computed in float32 whatever the dtype of the weights, so that the comparison can be strict.
    """
    return [forward_in_float32(model, ids, **_keep(model)).logits[:, -_SHOWN:] for ids in prompts]


def forward_in_float32(model: Any, ids: Tensor, **options: Any) -> Any:
    """``model``'s output for ``ids``, computed in float32; on a copy where it cannot be done in place."""
    try:
        with computing_in_float32(model):
            return model(input_ids=ids, use_cache=False, **options)
    except RuntimeError:
        if all(not _coarse(module) for module in model.modules()):
            raise
    # Mamba's blocks read weights of modules that they do not call, which no hook can widen. A copy keeps
    # the hooks that steer.
    return copy.deepcopy(model).float()(input_ids=ids, use_cache=False, **options)


def compare(base: list[Tensor], steered: list[Tensor], export: list[Tensor]) -> Agreement:
    """Compare an export's logits with the hooked model's; ``base`` are those without the vector."""
    difference = _distance(steered, export)
    return Agreement(
        difference=difference,
        bound=TOLERANCE * max(1.0, *(float(logits.abs().max()) for logits in steered)),
        effect=_distance(base, steered),
        probes=sum(len(logits) for logits in steered),
    )


def require(agreement: Agreement, what: str) -> Agreement:
    """Raise `AFTError` unless the export agrees with the hooked model.

    A vector whose whole effect is within the bound cannot be told from no vector at all: refused too.
    """
    if not agreement.difference <= agreement.bound:  # NaN must fail
        raise AFTError(
            f"The {what} was deleted: it does not compute what the vector does ({agreement}).",
            "This is a fault of the export, not of the vector: please report it with the model's name.",
        )
    if agreement.effect <= agreement.bound:
        raise AFTError(
            f"The {what} was deleted: the vector changes the logits too little to verify anything "
            f"({agreement}).",
            "Check the vector's norm and coefficient.",
        )
    return agreement


@contextmanager
def computing_in_float32(model: nn.Module) -> Iterator[None]:
    """Run ``model`` in float32 arithmetic without a float32 copy of it.

    Each module's own weights are turned to float32 only while it runs, large matrices in pieces.
    Nothing is patched where all weights are float32 already.
    """
    handles: list[Any] = []
    patched: list[nn.Module] = []

    def widen(module: nn.Module, _inputs: Any) -> None:
        module.__dict__["_aft_saved"] = saved = [(p, p.data) for p in _coarse(module)]
        for parameter, data in saved:
            parameter.data = data.float()

    def restore(module: nn.Module, _inputs: Any, output: Any) -> Any:
        for parameter, data in module.__dict__.pop("_aft_saved", []):
            parameter.data = data
        return output

    try:
        for module in model.modules():
            if not _coarse(module):
                continue
            if type(module) is nn.Linear and module.weight.numel() > _CHUNK:
                module.forward = _linear_in_pieces(module)  # type: ignore[method-assign]
                patched.append(module)
            elif type(module) is nn.Embedding:
                handles.append(module.register_forward_hook(lambda _m, _i, output: output.float()))
            else:
                handles.append(module.register_forward_pre_hook(widen))
                handles.append(module.register_forward_hook(restore, always_call=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in patched:
            del module.forward


def _coarse(module: nn.Module) -> list[nn.Parameter]:
    own = module.parameters(recurse=False)
    return [p for p in own if p.is_floating_point() and p.dtype not in (torch.float32, torch.float64)]


def _linear_in_pieces(module: nn.Linear) -> Any:
    rows = max(1, _CHUNK // module.in_features)

    def forward(inputs: Tensor) -> Tensor:
        # One buffer for all pieces: freed one by one, they would leave the heap in tatters.
        buffer = torch.empty(rows, module.in_features)
        output = torch.empty(*inputs.shape[:-1], module.out_features)
        for start in range(0, module.out_features, rows):
            weight = module.weight[start : start + rows]
            piece = functional.linear(inputs, buffer[: len(weight)].copy_(weight))
            output[..., start : start + rows] = piece
        return output if module.bias is None else output + module.bias.float()

    return forward


def _keep(model: Any) -> dict[str, int]:
    import inspect

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return (
        {"logits_to_keep": _SHOWN} if "logits_to_keep" in inspect.signature(inner.forward).parameters else {}
    )


def _distance(one: list[Tensor], other: list[Tensor]) -> float:
    if [x.shape for x in one] != [x.shape for x in other]:
        return float("inf")
    # torch's max, unlike Python's, keeps a NaN.
    return float(torch.stack([(x - y).abs().max() for x, y in zip(one, other, strict=True)]).max())
