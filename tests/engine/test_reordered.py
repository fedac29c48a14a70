"""Products with reordered weights: what they give, which layers they serve, and what they leave behind."""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

from lm_eval_aft.engine import precision
from lm_eval_aft.engine.precision import ReorderedWeights

pytestmark = pytest.mark.skipif(
    not ReorderedWeights(nn.Linear(2, 2)), reason="no reordered weights on this machine"
)


class Own(nn.Linear):
    """A layer of somebody's own."""


class Odd(nn.Parameter):
    """A weight that is more than its numbers."""


def linear(bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    return nn.Linear(24, 40, bias=bias, dtype=dtype)


def with_weight(make: Callable[[Tensor], Any]) -> nn.Linear:
    layer = linear()
    del layer.weight
    layer.weight = make(torch.randn(40, 24))
    return layer


def with_forward() -> nn.Linear:
    layer = linear()
    layer.forward = lambda inputs: inputs  # type: ignore[method-assign]
    return layer


@pytest.mark.parametrize("rows", [(0,), (1,), (7,), (300,), (2, 5), (3, 0)])
@pytest.mark.parametrize(
    "layer", [linear(), linear(bias=False), Conv1D(40, 24), nn.Linear(1, 3), nn.Linear(3, 1)]
)
def test_products_are_the_layers_own(layer: nn.Module, rows: tuple[int, ...]) -> None:
    weights = ReorderedWeights(layer)
    assert len(weights) == 1
    width = layer.in_features if isinstance(layer, nn.Linear) else 24
    inputs = torch.randn(*rows, width)
    with torch.no_grad():
        expected = layer(inputs)
        with weights.in_use():
            found = layer(inputs)
            turned = layer(inputs.mT.contiguous().mT) if inputs.dim() == 3 else found
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(found, turned)


def test_a_row_does_not_depend_on_those_beside_it() -> None:
    layer, inputs = linear(), torch.randn(60, 24)
    weights = ReorderedWeights(layer)
    with torch.no_grad(), weights.in_use():
        alone = layer(inputs)
        inputs[10:] = torch.nan
        assert torch.equal(layer(inputs)[:10], alone[:10])
        assert layer(inputs)[10:].isnan().all()


def test_only_passes_inside_the_block_use_them() -> None:
    model = nn.Sequential(linear(), nn.ReLU(), nn.Linear(40, 24))
    seen: list[int] = []
    model[2].register_forward_hook(lambda *_: seen.append(1))
    weights = ReorderedWeights(model)
    inputs = torch.randn(5, 24)
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.zero_()  # what was reordered stays as it was
        with weights.in_use():
            assert model(inputs).std() > 0.1
        assert model(inputs).std() < 0.3
        with pytest.raises(RuntimeError), weights.in_use():
            model(torch.randn(5, 23))
    assert all("forward" not in module.__dict__ for module in model.modules())
    assert len(seen) == 2
    assert torch.equal(model[0](inputs), model[0].bias.expand(5, 40))


@pytest.mark.parametrize(
    "layer",
    [
        linear(dtype=torch.float64),
        linear(dtype=torch.bfloat16),
        Own(24, 40),
        with_weight(Odd),
        with_forward(),
        nn.Linear(24, 40, device="meta"),
        nn.Linear(24, 0),
        nn.Embedding(40, 24),
    ],
)
def test_other_layers_are_left_alone(layer: nn.Module) -> None:
    before = dict(layer.__dict__)
    weights = ReorderedWeights(nn.Sequential(layer, linear()))
    assert len(weights) == 1
    with weights.in_use():
        assert layer.__dict__ == before
    assert layer.__dict__ == before


def test_other_machines_large_and_compiled_models_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    size = 24 * 40 * 4
    model = nn.Sequential(linear(), linear())
    monkeypatch.setattr(precision, "MOST_BYTES", 2 * size)
    assert len(ReorderedWeights(model)) == 2
    monkeypatch.setattr(precision, "MOST_BYTES", 2 * size - 1)
    assert not ReorderedWeights(model)
    model[1].weight = model[0].weight
    assert len(ReorderedWeights(model)) == 2  # one copy for both
    assert not ReorderedWeights(torch.compile(linear()))  # type: ignore[arg-type]
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    assert not ReorderedWeights(linear())


def test_a_weight_that_layers_share_is_reordered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Tensor] = []
    reorder = precision._reorder
    monkeypatch.setattr(precision, "_reorder", lambda weight: (made.append(weight), reorder(weight))[1])
    model = nn.Sequential(linear(bias=False), linear())
    model[1].weight = model[0].weight
    weights = ReorderedWeights(model)
    assert (len(weights), len(made)) == (2, 1)
    inputs = torch.randn(3, 24)
    with torch.no_grad(), weights.in_use():
        torch.testing.assert_close(model[1](inputs), model[0](inputs) + model[1].bias)


@pytest.mark.parametrize("layer", [linear(), linear(bias=False), Conv1D(40, 24)])
def test_operations_are_counted_as_those_of_plain_products(layer: nn.Module) -> None:
    weights, counts = ReorderedWeights(layer), []
    for use in (False, True):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            if use:
                with weights.in_use():
                    layer(torch.randn(2, 8, 24))
            else:
                layer(torch.randn(2, 8, 24))
        counts.append(counter.get_total_flops())
    assert counts == [2 * 16 * 24 * 40] * 2


def test_few_numbers_of_rows_are_multiplied_and_no_result_depends_on_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes = {rows: precision.round_up(rows) for rows in range(2049)}
    assert sizes[0] == 0
    assert len(set(sizes.values())) < 100
    assert all(rows <= size <= max(rows + 7, rows * 17 / 16) for rows, size in sizes.items())
    layer = linear()
    weights = ReorderedWeights(layer)
    with torch.no_grad(), weights.in_use():
        for rows in (1, 9, 63, 301):
            inputs = torch.randn(rows, 24)
            padded = layer(inputs)
            with monkeypatch.context() as patch:
                patch.setattr(precision, "round_up", lambda rows: rows)
                assert torch.equal(layer(inputs), padded)
