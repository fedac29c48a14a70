"""Several vectors on one model, each on rows of its own: every row as if its vector were alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lm_eval_aft import AFTError
from lm_eval_aft.steering.backbone import Backbone, find_backbone
from lm_eval_aft.steering.hooks import RowSteering, add_all
from tests.conftest import tiny_model

IDS = torch.randint(5, 60, (4, 9), generator=torch.Generator().manual_seed(0))
STATES = [2, 0, 3, 1]


def double(hidden: Tensor) -> Tensor:
    return 2 * hidden


class Blocks(nn.Module):
    """Blocks that pass on what they are given, in the container a test asks for."""

    def __init__(self, count: int, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Identity() for _ in range(count))
        self.wrap = wrap

    def forward(self, hidden: Tensor) -> list[Any]:
        return [block(self.wrap(hidden)) for block in self.blocks]


def backbone(stub: Blocks) -> Backbone:
    return Backbone(name="blocks", blocks=list(stub.blocks), hidden_size=32)


@pytest.mark.parametrize("family", ["llama", "gpt_neo", "falcon"])
@pytest.mark.parametrize("third", [torch.full((32,), 0.5), double], ids=["vectors", "a function among them"])
def test_every_row_equals_a_pass_under_its_vector_alone_bit_for_bit(family: str, third: Any) -> None:
    model = tiny_model(family)
    found = find_backbone(model)
    shifts = [{1: torch.randn(32)}, {0: torch.randn(32), 3: torch.randn(32)}, {1: third, 2: torch.randn(32)}]
    with torch.no_grad():
        plain = model(IDS).logits
        rows = RowSteering(found, shifts)
        assert rows.count == 3
        assert torch.equal(model(IDS).logits, plain)
        with rows.chosen(STATES):
            together = model(IDS).logits
            with rows.chosen(2):
                whole = model(IDS).logits
            again = model(IDS).logits  # the states before it are back
        after = model(IDS).logits
        rows.remove()
        removed = model(IDS).logits
        alone = []
        for state in range(4):
            with add_all(found, shifts[state - 1] if state else {}):
                alone.append(model(IDS).logits)
    assert torch.equal(together, again)
    assert torch.equal(after, plain)
    assert torch.equal(removed, plain)
    assert torch.equal(alone[0], plain)
    assert torch.equal(whole, alone[2])
    assert all(torch.equal(together[row], alone[state][row]) for row, state in enumerate(STATES))
    assert len({float(each.sum()) for each in alone}) == 4


def test_an_error_inside_leaves_no_rows_steered() -> None:
    model = tiny_model("llama")
    rows = RowSteering(find_backbone(model), [{1: torch.randn(32)}])
    plain = model(IDS).logits
    with suppress(ZeroDivisionError), rows.chosen(1):
        assert not torch.equal(model(IDS).logits, plain)
        raise ZeroDivisionError
    assert torch.equal(model(IDS).logits, plain)


def test_rows_that_do_not_match_are_refused() -> None:
    model = tiny_model("llama")
    rows = RowSteering(find_backbone(model), [{1: torch.randn(32)}, {2: torch.randn(32)}])
    with rows.chosen([1, 2]), pytest.raises(AFTError, match="over 2 rows has 4 rows"):
        model(IDS)
    with rows.chosen([0, 0]):
        model(IDS)  # nothing to add, so nothing to tell apart


@pytest.mark.parametrize("states", [1, 3, [1, 2, 0, 1], [3, 0, 2, 1]])
def test_what_is_added_follows_the_hidden_states_to_their_device(states: Any) -> None:
    # Tensors without data, on the device "meta", refuse to meet others as those of a GPU do.
    model = tiny_model("llama").to("meta")
    rows = RowSteering(
        find_backbone(model), [{1: torch.ones(32)}, {2: torch.ones(32)}, {1: double, 2: torch.ones(32)}]
    )
    with torch.no_grad(), rows.chosen(states):
        assert model(IDS.to("meta")).logits.device.type == "meta"


def test_one_state_for_all_in_half_precision() -> None:
    stub = Blocks(1, lambda hidden: hidden)
    rows = RowSteering(backbone(stub), [{0: torch.full((32,), 1 / 3)}])
    with rows.chosen(1):
        (found,) = stub(torch.zeros(2, 3, 32, dtype=torch.bfloat16))
    assert found.dtype == torch.bfloat16


def test_a_moved_model_gets_vectors_in_its_dtype() -> None:
    model = tiny_model("llama")
    shifts = [{1: torch.randn(32)}, {1: torch.randn(32)}]
    rows = RowSteering(find_backbone(model), shifts)
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        model.to(dtype)
        with torch.no_grad(), rows.chosen([1, 2, 0, 1]):
            found = model(IDS).logits
        assert found.dtype == dtype


@pytest.mark.parametrize("kind", [tuple, list])
def test_what_else_a_block_returns_stays(kind: Callable[[Any], Any]) -> None:
    stub = Blocks(2, lambda hidden: kind([hidden, "second", "third"]))
    hidden = torch.zeros(3, 2, 32)
    one = torch.arange(32.0)
    rows = RowSteering(backbone(stub), [{0: one}, {0: double, 1: double}])
    for states, added in (([1, 0, 1], [1.0, 0.0, 1.0]), (1, [1.0, 1.0, 1.0]), ([1, 2, 0], [1.0, 0.0, 0.0])):
        with rows.chosen(states):
            first, second = stub(hidden)
        for output in (first, second):
            assert type(output) is kind
            assert output[1:] == kind(["second", "third"])
        assert torch.equal(first[0], torch.tensor(added)[:, None, None] * one.expand(3, 2, 32))
        assert torch.equal(second[0], hidden)


def test_items_are_asked_state_by_state_and_answered_in_order() -> None:
    stub = Blocks(1, lambda hidden: hidden)
    rows = RowSteering(backbone(stub), [{0: torch.full((32,), 10.0)}, {0: torch.full((32,), 20.0)}])
    asked: list[list[int]] = []

    def ask(items: list[int]) -> Sequence[float]:
        asked.append(items)
        hidden = torch.tensor(items).reshape(-1, 1, 1).expand(-1, 1, 32).float()
        return [float(row[0, 0]) for row in stub(hidden)[0]]

    assert rows.apart([2, 0, 2, 1], [1, 2, 3, 4], ask) == [21, 2, 23, 14]
    assert asked == [[2], [4], [1, 3]]
    with pytest.raises(ValueError, match="zip"):
        rows.apart([0, 0], [1, 2], lambda items: items[:1])
