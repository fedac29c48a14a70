"""Expressions, and what they make of vectors: the sum, its metadata, and the refusals."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_eval_aft import AFTError, SteeringVector, load_vector
from lm_eval_aft.library.compose import Operand, combine, conflicts
from lm_eval_aft.library.load import is_expression, parse_expression
from lm_eval_aft.library.store import Library
from lm_eval_aft.steering.fingerprint import fingerprint
from lm_eval_aft.steering.hooks import attach
from tests.conftest import tiny_model, tiny_tokenizer


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("a/b", {"a/b": 1}),
        ("a/b*0.7 + c/d*0.3", {"a/b": 0.7, "c/d": 0.3}),
        ("math/gsm8k*0.7+logic/arc*0.3", {"math/gsm8k": 0.7, "logic/arc": 0.3}),
        ("0.7*a/b+.3*c/d", {"a/b": 0.7, "c/d": 0.3}),
        ("a/b - c/d", {"a/b": 1, "c/d": -1}),
        ("a/b*0.5-c/d", {"a/b": 0.5, "c/d": -1}),
        ("a/b-c/d", {"a/b-c/d": 1}),
        ("-a/b", {"a/b": -1}),
        ("a/b + a/b*2", {"a/b": 3}),
        ("2*(a/b - (c/d + a/b)*0.5)", {"a/b": 1, "c/d": -1}),
        ("'my folder/v' * 1e-3", {"my folder/v": 1e-3}),
        ('"a/b"*1.5E+2', {"a/b": 150}),
        ("owner/name@refs/pr/1*2", {"owner/name@refs/pr/1": 2}),
        ("./here/v.safetensors*2", {"./here/v.safetensors": 2}),
        ("2024/x*2", {"2024/x": 2}),
        ("a/b*0", {"a/b": 0}),
        ("a/b*-2", {"a/b": -2}),
        ("a/b + 0", {"a/b": 1}),
    ],
)
def test_expressions(text: str, weights: dict[str, float]) -> None:
    assert parse_expression(text) == weights


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "ends too early"),
        ("a/b +", "ends too early"),
        ("a/b b/c", "not expected"),
        ("a/b ** 2", "not expected"),
        ("a/b / 2", "not expected"),
        ("a/b, c/d", "not expected"),
        ("a/b*c/d", "cannot be multiplied"),
        ("a/b + 1", "a number cannot be added"),
        ("0.5", "no vector"),
        ("(a/b", "not closed"),
        ("a/b)", "not expected"),
        ("'a/b", "not expected"),
        ("''*2", "cannot be named"),
        ("'x,y'*2", "library name"),
        ("a/b*1e999", "not a finite number"),
        ("a/b*1e999*0", "not a finite number"),
        ("a/b*1e300*1e300", "not a finite number"),
        ("(" * 60 + "a/b" + ")" * 60, "nested too deeply"),
        ("-" * 5000 + "a/b", "nested too deeply"),
        ("a" * 20_000, "too long"),
    ],
)
def test_expressions_refused(text: str, word: str) -> None:
    with pytest.raises(AFTError, match=word):
        parse_expression(text)


@settings(max_examples=400, deadline=None)
@given(st.text(alphabet="ab/ *+-().0123eE'\"@,_~\n\0é", max_size=40) | st.text(max_size=40))
def test_any_text_parses_or_is_refused_plainly(text: str) -> None:
    try:
        weights = parse_expression(text)
    except AFTError:
        return
    assert weights
    assert all(math.isfinite(weight) for weight in weights.values())


NUMBERS = st.floats(-1e3, 1e3).map(lambda x: float(f"{x:.6g}"))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcd"), NUMBERS), min_size=1, max_size=6), st.randoms())
def test_written_sums_read_back_in_any_order(terms: list[tuple[str, float]], random: Any) -> None:
    def written(order: list[tuple[str, float]]) -> dict[str, float]:
        return parse_expression(" + ".join(f"x/{name}*{weight!r}" for name, weight in order))

    expected = {f"x/{n}": math.fsum(w for name, w in terms if name == n) for n, _ in terms}
    shuffled = random.sample(terms, len(terms))
    assert written(terms) == expected == written(shuffled)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=60))
def test_any_specification_loads_or_is_refused_plainly(tmp_path_factory: Any, text: str) -> None:
    with pytest.raises(AFTError):
        load_vector(f"{text}\0", tmp_path_factory.getbasetemp() / "no-library")


def test_what_counts_as_an_expression() -> None:
    assert all(map(is_expression, ["a*2", "a + b", "-a", "(a)", "a -b", "'a'"]))
    assert not any(map(is_expression, ["a", "a/b", "a-b", "owner/name@v1.0", "./a_b.safetensors"]))


@pytest.fixture
def library(tmp_path: Path) -> Library:
    """math/a at layers 1, 3; logic/b at 3, 4 with coefficient 0.5; knowledge/c at 3."""
    torch.manual_seed(0)
    identity = fingerprint(tiny_model("llama"), tiny_tokenizer())
    common = {
        "base_model": {"name": "org/tiny", "revision": "main"},
        "fingerprint": identity,
        "num_hidden_layers": 6,
        "num_fewshot": 5,
    }
    made = {
        "math/a": SteeringVector({1: torch.randn(32), 3: torch.randn(32)}, metadata={"task": "gsm8k"}),
        "logic/b": SteeringVector({3: torch.randn(32), 4: torch.randn(32)}, 0.5, metadata={"task": "arc"}),
        "knowledge/c": SteeringVector({3: torch.randn(32)}, metadata={"task": "arc"}),
    }
    library = Library(tmp_path / "library")
    for number, (name, vector) in enumerate(made.items()):
        vector.metadata |= common | {
            "splits": {"train": 10, "selection_documents": [f"{number:016x}", "f" * 16]}
        }
        vector.save(library.root / name)
    return library


def test_weight_one_is_the_vector_itself(library: Library) -> None:
    for name in library.names():
        original = load_vector(name, library)
        for text in (f"{name}*1", f"1*{name}", f"({name})", f"{name} + 0"):
            same = load_vector(text, library)
            assert same.digest() == original.digest()
            assert same.layers.keys() == original.layers.keys()
            assert all(torch.equal(same.layers[k], original.layers[k]) for k in original.layers)


def test_the_sum_in_fp32(library: Library) -> None:
    a, b = load_vector("math/a", library), load_vector("logic/b", library)
    both = load_vector("math/a*0.7 + logic/b*0.3", library)
    assert list(both.layers) == [1, 3, 4]
    assert both.coefficient == 1.0
    assert torch.equal(both.layers[1], a.layers[1] * 0.7)
    assert torch.equal(both.layers[3], a.layers[3] * 0.7 + b.layers[3] * (0.3 * 0.5))
    assert torch.equal(both.layers[4], b.layers[4] * (0.3 * 0.5))
    exact = a.layers[3].double() * 0.7 + b.layers[3].double() * 0.15
    assert torch.allclose(
        both.layers[3].double(), exact, rtol=0, atol=3 * 2.0**-24 * float(exact.abs().max())
    )


def test_order_does_not_matter(library: Library) -> None:
    texts = [
        "math/a*0.7 + logic/b*0.3 - knowledge/c*0.1",
        "logic/b*0.3 + math/a*0.7 - knowledge/c*0.1",
        "-(knowledge/c*0.1) + 0.3*logic/b + 0.7*math/a",
        "math/a*0.7 - (knowledge/c*0.1 - logic/b*0.3)",
    ]
    assert len({load_vector(text, library).digest() for text in texts}) == 1


def test_the_sum_steers_like_its_parts(library: Library) -> None:
    model = tiny_model("llama", layers=6)
    a, b = load_vector("math/a", library), load_vector("logic/b", library)
    for each in (a, b):
        each.metadata.pop("fingerprint")  # of a model with four blocks
    both = combine([Operand("a", 0.7, a), Operand("b", 0.3, b)])
    tokens = torch.arange(12)[None]
    with torch.no_grad(), attach(model, both):
        together = model(tokens).logits
    with torch.no_grad(), attach(model, a, coefficient=0.7), attach(model, b, coefficient=0.15):
        apart = model(tokens).logits
        assert not torch.allclose(apart, together + 1)
    assert torch.allclose(together, apart, atol=1e-4)


def test_metadata_tell_the_recipe(library: Library, tmp_path: Path) -> None:
    text = "math/a*0.7 + logic/b*0.3"
    load_vector(text, library).save(tmp_path / "c")
    meta = load_vector(tmp_path / "c").metadata
    assert meta["recipe"]["expression"] == text
    operands = {each["name"]: each for each in meta["recipe"]["operands"]}
    assert operands["logic/b"]["weight"] == 0.3
    assert operands["logic/b"]["coefficient"] == 0.5
    assert operands["logic/b"]["sha256"] == load_vector("logic/b", library).digest()
    assert (meta["task"], meta["tasks"]) == ("arc + gsm8k", ["arc", "gsm8k"])
    assert meta["base_model"] == {"name": "org/tiny", "revision": "main"}
    assert (meta["num_hidden_layers"], meta["num_fewshot"], meta["control"]) == (6, 5, None)
    assert meta["fingerprint"] == load_vector("math/a", library).metadata["fingerprint"]
    # So that a report can tell when it is scored on documents that one of its parts was chosen on.
    assert meta["splits"]["selection_documents"] == [f"{0:016x}", f"{1:016x}", "f" * 16]
    assert meta["protocol"] == {"name": "composed", "biased": False}
    again = load_vector(f"'{tmp_path / 'c'}'*2 + knowledge/c", library)
    assert again.metadata["recipe"]["operands"][0].keys() >= {"name", "sha256"}
    assert any("recipe" in each for each in again.metadata["recipe"]["operands"])


def test_bias_and_placebo_are_inherited(library: Library) -> None:
    a, b = load_vector("math/a", library), load_vector("logic/b", library)
    a.metadata["protocol"] = {"name": "x", "biased": True}
    b.metadata["control"] = "random"
    meta = combine([Operand("a", 1, a), Operand("b", 1, b)]).metadata
    assert meta["protocol"]["biased"]
    assert meta["control"] == "random"


def test_another_base_model_is_refused_by_name(library: Library) -> None:
    other = load_vector("logic/b", library)
    other.metadata |= {
        "fingerprint": fingerprint(tiny_model("llama", seed=1), tiny_tokenizer()),
        "base_model": {"name": "org/another"},
    }
    other.save(library.root / "logic/other")
    with pytest.raises(AFTError, match="weights differ") as caught:
        load_vector("math/a + logic/other", library)
    for name in ("math/a", "org/tiny", "logic/other", "org/another"):
        assert repr(name) in caught.value.what


def test_misfits_are_refused(library: Library) -> None:
    a = load_vector("math/a", library)
    wide = SteeringVector({0: torch.ones(8)})
    deep = SteeringVector({0: torch.ones(32)}, metadata={"num_hidden_layers": 9})
    damaged = SteeringVector({0: torch.ones(32)}, metadata={"fingerprint": {"config": 1}})
    dynamic, elsewhere = copy.copy(a), copy.copy(a)
    dynamic.method, elsewhere.positions = "mlp", "last"
    for other, word in [
        (wide, "hidden sizes"),
        (deep, "numbers of blocks"),
        (damaged, "damaged"),
        (dynamic, "static"),
        (elsewhere, "positions"),
    ]:
        with pytest.raises(AFTError, match=word):
            combine([Operand("a", 1, a), Operand("other", 1, other)])
    with pytest.raises(AFTError, match="too large"):
        combine([Operand("a", 1e39, a)])
    with pytest.raises(AFTError, match="nothing to compose"):
        combine([])


def test_a_vector_made_by_hand_goes_with_any_of_its_width(library: Library) -> None:
    hand = SteeringVector({2: torch.ones(32)})
    a = load_vector("math/a", library)
    both = combine([Operand("hand", 1, hand), Operand("a", 1, a)])
    assert both.metadata["fingerprint"] == a.metadata["fingerprint"]
    assert list(both.layers) == [1, 2, 3]


def test_a_sum_keeps_the_residual_norms_and_has_a_share_of_its_own() -> None:
    known = {"residual_norm": {"0": 50}, "share": {"0": 0.1}}
    a = SteeringVector({0: torch.tensor([3.0, 4, 0])}, 2.0, metadata=known)
    b = SteeringVector({0: torch.tensor([0.0, 0, 5])}, metadata=known)
    hand = SteeringVector({0: torch.tensor([0.0, 0, 5])})
    assert combine([Operand("a", 1, a)]).share() == 0.1
    total = combine([Operand("a", 0.5, a), Operand("b", 1, b)])
    assert total.norm() == pytest.approx(50**0.5)
    assert total.share() == pytest.approx(50**0.5 / 50, rel=1e-3)
    assert combine([Operand("a", 1, a), Operand("h", 1, hand)]).metadata["residual_norm"] == {"0": 50.0}
    assert combine([Operand("h", 2, hand)]).share() is None
    (row,) = conflicts([Operand("a", 1, a), Operand("b", 1, b)])
    assert row["shares"] == pytest.approx([0.2, 0.1])


def test_conflicts() -> None:
    east, north = torch.tensor([2.0, 0, 0]), torch.tensor([0.0, 3, 0])
    a = Operand("a", 1, SteeringVector({0: east, 1: east}))
    b = Operand("b", -1, SteeringVector({0: east * 4, 1: north, 2: north}, 0.5))
    zero = Operand("z", 0, SteeringVector({1: north}))
    rows = conflicts([a, b, zero])
    assert [(row["layer"], row["one"], row["other"]) for row in rows] == [
        (0, "a", "b"),
        (1, "a", "b"),
        (1, "a", "z"),
        (1, "b", "z"),
    ]
    assert rows[0]["cosine"] == pytest.approx(-1)
    assert rows[0]["norms"] == [2, 4]
    assert rows[1]["cosine"] == 0
    assert rows[2]["cosine"] is None
    assert rows[0]["shares"] == [None, None]
