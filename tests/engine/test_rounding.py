"""The first-use check knows how far fp32 carries on a model: as far as stock's own answers move."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lm_eval_aft.engine import fallback
from tests.conftest import tiny_model
from tests.engine.test_scoring_hazards import asked, ours, sentence, stock

REQUESTS = asked(
    "loglikelihood", [(sentence(6 + i, i), " " + sentence(4, 9 * i + j)) for i in range(8) for j in range(3)]
)


def coarse(size: float, where: str) -> Any:
    """A model whose logits are off by ``size``: by a pass's width, or under packed masks alone."""
    model: Any = tiny_model("llama")
    seen: dict[str, Any] = {}

    def note(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.clear()
        seen.update(dict(zip(["input_ids"], args, strict=False)), **kwargs)

    def blur(_module: Any, _args: Any, logits: torch.Tensor) -> torch.Tensor:
        mask, width = seen.get("attention_mask"), seen["input_ids"].shape[1]
        packed = mask is not None and mask.ndim == 4
        phase = float(width) if where == "width" else 1.0
        pattern = torch.sin(phase + torch.arange(logits.shape[-1]))
        return logits + size * pattern if where == "width" or packed else logits

    model.register_forward_pre_hook(note, with_kwargs=True)
    model.lm_head.register_forward_hook(blur)
    return model


def found(model: Any) -> tuple[list[float], set[str]]:
    lm = ours(model, batch_size=1)
    values = [value for value, _ in lm.loglikelihood(REQUESTS, disable_tqdm=True)]
    return values, set(lm.paths_taken())


def test_rounding_as_large_as_stocks_own_is_no_reason_to_be_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    exact, _ = found(tiny_model("llama"))
    values, paths = found(coarse(2e-4, "width"))
    assert max(abs(a - b) for a, b in zip(values, exact, strict=True)) > 1e-4
    assert paths == {"packed"}
    monkeypatch.setattr(fallback, "ROUNDINGS", 0)
    assert "packed" not in found(coarse(2e-4, "width"))[1]


def test_an_error_that_stock_does_not_make_is_a_reason() -> None:
    expected = [value for value, _ in stock(tiny_model("llama"), batch_size=1).loglikelihood(REQUESTS)]
    values, paths = found(coarse(2e-4, "packed"))
    assert "packed" not in paths
    assert values == pytest.approx(expected, abs=1e-5)
