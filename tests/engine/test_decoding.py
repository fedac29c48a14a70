"""Attention over as many columns as rows see, against PyTorch's over all of them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lm_eval_aft.engine import attention
from lm_eval_aft.engine.attention import over_columns

CPU = torch.device("cpu")
SEEN = [[20], [7, 20, 3], [20, 19, 18, 17, 16], [1, 2, 3, 4, 20, 6, 7, 8, 9]]


# Before the fixture puts another in its place.
ask = attention.numpy_is_faster


@pytest.fixture(params=[False, True], ids=["torch", "numpy"], autouse=True)
def _products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "numpy_is_faster", lambda: request.param)


def given(seen: list[int], tokens: int = 2, heads: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys, values of rows that see ``seen`` columns of 20; the mask says so."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(len(seen), heads, n, 4, generator=generator) for n in (tokens, max(seen), max(seen))
    )
    hidden = torch.arange(max(seen)) >= torch.tensor(seen)[:, None]
    mask = torch.zeros(len(seen), 1, tokens, max(seen))
    mask.masked_fill_(hidden[:, None, None], torch.finfo(torch.float32).min)
    return query, key, value, mask


@pytest.mark.parametrize("seen", SEEN, ids=str)
@pytest.mark.parametrize("tokens", [1, 3])
def test_rows_get_what_the_whole_mask_gives(seen: list[int], tokens: int) -> None:
    query, key, value, mask = given(seen, tokens)
    whole = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.7)
    with over_columns(seen, CPU):
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.7)
        by_place = F.scaled_dot_product_attention(query, key, value, mask, 0.0, False, scale=0.7)
    torch.testing.assert_close(found, whole, rtol=0, atol=1e-6)
    assert torch.equal(found, by_place)
    assert found.is_contiguous()


@pytest.mark.parametrize("seen", SEEN[1:], ids=str)
def test_columns_that_no_row_of_a_call_sees_are_not_read(
    seen: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mask does not hide NaN; what is not read cannot be NaN."""
    query, key, value, mask = given(seen)
    together = 2
    monkeypatch.setattr(attention, "ROWS_TOGETHER", together)
    whole = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    for first in range(0, len(seen), together):
        rows = slice(first, first + together)
        for tensor in (key, value):
            tensor[rows, :, max(seen[rows]) :] = float("nan")
    with over_columns(seen, CPU):
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    torch.testing.assert_close(found, whole, rtol=0, atol=1e-6)


def test_heads_that_share_keys_are_served() -> None:
    seen = [5, 20, 9, 3, 4, 5]
    query, _, _, mask = given(seen, heads=4)
    _, key, value, _ = given(seen, heads=2)
    whole = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
    with over_columns(seen, CPU):
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(found, whole, rtol=0, atol=1e-6)


def test_what_the_mask_adds_is_added() -> None:
    """A bias for each head, as ALiBi has it."""
    seen = [5, 20, 9, 3, 4, 5]
    query, key, value, mask = given(seen)
    biased = mask + torch.randn(1, 3, 1, 20)
    whole = F.scaled_dot_product_attention(query, key, value, attn_mask=biased)
    with over_columns(seen, CPU):
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=biased)
    torch.testing.assert_close(found, whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_stay_what_they_are(dtype: torch.dtype) -> None:
    seen = [20] * 6
    asked = [tensor.to(dtype) for tensor in given(seen)]
    whole = F.scaled_dot_product_attention(*asked)
    with over_columns(seen, CPU):
        found = F.scaled_dot_product_attention(*asked)
    assert found.dtype == dtype
    torch.testing.assert_close(found, whole)


def test_one_mask_may_serve_all_rows() -> None:
    seen = [20] * 6
    query, key, value, mask = given(seen)
    whole = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    with over_columns(seen, CPU):
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=mask[:1])
    torch.testing.assert_close(found, whole, rtol=0, atol=1e-6)


def test_other_attention_is_left_alone() -> None:
    """Without a mask, with one over other columns, or for another number of rows."""
    seen = [3, 5, 4, 2, 5]
    query, key, value, mask = given(seen)
    for rows, options in ((5, {}), (5, {"is_causal": True}), (3, {"attn_mask": mask[:3]})):
        asked = query[:rows], key[:rows], value[:rows]
        whole = F.scaled_dot_product_attention(*asked, **options)  # type: ignore[arg-type]
        with over_columns(seen, CPU):
            assert torch.equal(F.scaled_dot_product_attention(*asked, **options), whole)  # type: ignore[arg-type]
    with over_columns(seen, CPU):
        assert torch.equal(torch.softmax(query, -1), query.softmax(-1))


@pytest.mark.parametrize(
    ("maker", "threads", "mine", "faster"),
    [
        ("AuthenticAMD", "1", 1, True),
        ("GenuineIntel", "1", 1, False),
        ("AuthenticAMD", "2", 1, False),
        ("AuthenticAMD", None, 1, False),
        ("AuthenticAMD", "1", 2, False),
    ],
)
def test_numpy_multiplies_for_one_thread_on_amd(
    maker: str, threads: str | None, mine: int, faster: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention.Path, "is_file", lambda _: True)
    monkeypatch.setattr(attention.Path, "read_text", lambda _: f"vendor_id\t: {maker}\n")
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch, "get_num_threads", lambda: mine)
    if threads is None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
    assert ask.__wrapped__() == faster


def test_accelerators_take_all_rows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_by_columns", None)  # would fail if it were called
    query, key, value, mask = given([3, 5, 4])
    with over_columns([3, 5, 4], torch.device("cuda")):
        F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
