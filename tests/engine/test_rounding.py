"""The first-use check knows how far fp32 carries on a model: as far as stock's own answers move."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from lm_eval_aft.engine import checks, fallback
from lm_eval_aft.engine.precision import computed_in_float32
from tests.conftest import tiny_model
from tests.engine.test_scoring_hazards import asked, ours, sentence, stock

REQUESTS = asked(
    "loglikelihood", [(sentence(6 + i, i), " " + sentence(4, 9 * i + j)) for i in range(8) for j in range(3)]
)


def coarse(size: float, where: str, dtype: torch.dtype = torch.float32) -> Any:
    """Logits are off by ``size`` in this dtype: by a pass's width, or under packed masks alone."""
    model: Any = tiny_model("llama", dtype=dtype)
    seen: dict[str, Any] = {}

    def note(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.clear()
        seen.update(dict(zip(["input_ids"], args, strict=False)), **kwargs)

    def blur(_module: Any, _args: Any, logits: torch.Tensor) -> torch.Tensor:
        if logits.dtype != dtype:
            return logits
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


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt_neox", "mixtral"])
def test_16_bit_weights_compute_in_float32(family: str) -> None:
    """As a float32 copy of the model, bit by bit; the weights are the same tensors afterwards."""
    model = tiny_model(family, dtype=torch.bfloat16)
    before = {name: (each.data_ptr(), each.dtype) for name, each in model.named_parameters()}
    ids = torch.randint(5, 60, (3, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        with computed_in_float32(model):
            found = model(ids).logits
        assert model(ids).logits.dtype == torch.bfloat16
        with pytest.raises(IndexError), computed_in_float32(model):
            model(ids + 10**6)
        assert {name: (each.data_ptr(), each.dtype) for name, each in model.named_parameters()} == before
        expected = copy.deepcopy(model).float()(ids).logits
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_16_bits_are_judged_by_their_error_against_float32() -> None:
    """Stock's own answers are half a nat off here, differently in every batch: so may ours be."""
    model = coarse(0.5, "width", torch.bfloat16)
    exact = [value for value, _ in stock(copy.deepcopy(model).float(), batch_size=1).loglikelihood(REQUESTS)]
    expected = [value for value, _ in stock(model, batch_size=1).loglikelihood(REQUESTS)]
    values, paths = found(model)
    assert max(abs(a - b) for a, b in zip(values, expected, strict=True)) > 0.1 * 5  # a bar for 5 tokens
    assert paths == {"packed"}
    errors = [float(np.std([a - b for a, b in zip(each, exact, strict=True)])) for each in (values, expected)]
    assert errors[0] <= checks.ERRORS * errors[1]


def test_an_error_of_packed_rows_alone_is_found_in_16_bits(caplog: pytest.LogCaptureFixture) -> None:
    expected = [
        value
        for value, _ in stock(tiny_model("llama", dtype=torch.bfloat16), batch_size=1).loglikelihood(REQUESTS)
    ]
    values, paths = found(coarse(3.0, "packed", torch.bfloat16))
    assert "packed" not in paths
    assert "against float32" in caplog.text
    assert values == pytest.approx(expected, abs=0.5)
