"""Routers: which vector a request gets, and what a table may say."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_eval_aft import AFTError
from lm_eval_aft.cli.evaluate import evaluate
from lm_eval_aft.library.entry import Entry
from lm_eval_aft.library.routers import (
    ROUTERS,
    Router,
    default_table,
    make_router,
    parse_keyword_table,
    parse_task_table,
    register_router,
    resolve,
)

LIBRARY = [
    Entry("knowledge/science", tasks=("sciq",)),
    Entry("logic/analogy", tasks=("arc_challenge",)),
    Entry("math/word_problems", tasks=("gsm8k",)),
]
TABLE = "rules:\n- vector: math/x\n  words: [sum, 'how many', '2+2', 'no']\nelse: none\n"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Calculate 3 + 4.", "math/word_problems"),
        ("How  many\napples are left?", "math/word_problems"),
        ("Why can he solve it?", "math/word_problems"),  # rules are tried from the top
        ("Why is the sky blue?", "logic/analogy"),
        ("BECAUSE it rained", "logic/analogy"),
        ("Which gas do plants take in?", "knowledge/science"),
        ("calculated resolves whyever", "knowledge/science"),  # whole words only
        ("", "knowledge/science"),
    ],
)
def test_the_shipped_table(text: str, name: str) -> None:
    assert make_router("keyword", LIBRARY).route(text) == name


def test_the_shipped_table_leaves_unsteered_what_the_library_lacks() -> None:
    router = make_router("keyword", LIBRARY[2:])
    assert router.route("solve it") == "math/word_problems"
    assert router.route("why?") is None
    assert router.route("plants") is None
    with pytest.raises(AFTError, match="none of the categories"):
        make_router("keyword", [Entry("style/careful")])


def test_a_table_of_the_users(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(TABLE)
    router = make_router(f"keyword:{path}", [*LIBRARY, Entry("math/x")])
    assert router.route("what is 2+2?") == "math/x"
    assert router.route("yes or no?") == "math/x"  # `no` is a word here, not false
    assert router.route("nothing") is None
    with pytest.raises(AFTError, match="no vector and no category 'math/x'"):
        make_router(f"keyword:{path}", LIBRARY)
    with pytest.raises(AFTError, match="cannot be read"):
        make_router(f"keyword:{tmp_path / 'missing.yaml'}", LIBRARY)
    path.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(AFTError, match="cannot be read"):
        make_router(f"keyword:{path}", LIBRARY)


def test_constant() -> None:
    assert make_router("constant:logic/analogy", LIBRARY).route("x", "gsm8k") == "logic/analogy"
    assert make_router("constant:math", LIBRARY).route("x") == "math/word_problems"
    for spec, word in [("constant", "needs a vector"), ("constant:math/nothing", "no vector")]:
        with pytest.raises(AFTError, match=word):
            make_router(spec, LIBRARY)


def test_task(tmp_path: Path) -> None:
    router = make_router("task", LIBRARY)
    assert router.route("why", "gsm8k") == "math/word_problems"
    assert router.route("why", "hellaswag") is None
    assert router.route("why") is None
    with pytest.raises(AFTError, match=r"Both math/word_problems and math/y"):
        make_router("task", [*LIBRARY, Entry("math/y", tasks=("gsm8k",))])
    with pytest.raises(AFTError, match="No vector"):
        make_router("task", [Entry("a/b", tasks=("x", "y"))])
    path = tmp_path / "tasks.yaml"
    path.write_text("tasks: {gsm8k: math, 'arc*': logic/analogy, arc_easy: none}\nelse: knowledge\n")
    router = make_router(f"task:{path}", LIBRARY)
    routed = [router.route("", task) for task in ("gsm8k", "arc_challenge", "arc_easy", "sciq")]
    assert routed == ["math/word_problems", "logic/analogy", None, "knowledge/science"]


def test_placebos_and_damaged_vectors_are_never_picked() -> None:
    bad = [
        Entry("math/a", control="random", tasks=("gsm8k",)),
        Entry("math/b", error="damaged"),
    ]
    assert make_router("keyword", [*LIBRARY, *bad]).route("solve") == "math/word_problems"
    assert make_router("task", [*LIBRARY, *bad]).route("", "gsm8k") == "math/word_problems"


def test_unknown_router_and_ambiguous_category() -> None:
    with pytest.raises(AFTError, match="no router 'magic'"):
        make_router("magic", LIBRARY)
    with pytest.raises(AFTError, match="holds 2 vectors"):
        resolve("math", [Entry("math/a"), Entry("math/b")])
    with pytest.raises(AFTError, match="Did you mean math/word_problems"):
        resolve("math/word_problms", LIBRARY)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "must be a mapping"),
        ("[1]", "must be a mapping"),
        ("a: [", "not YAML"),
        ("rules: []", "at least one"),
        ("rules: {a: b}", "at least one"),
        ("rule: []", "unknown keys: rule"),
        ("rules: [a]", "Rule 1"),
        ("rules: [{vector: a}]", "Rule 1"),
        ("rules: [{vector: a, words: []}]", "at least one word"),
        ("rules: [{vector: a, words: x}]", "must be a list"),
        ("rules: [{vector: a, words: ['']}]", "must be text"),
        ("rules: [{vector: a, words: [[x]]}]", "must be text"),
        ("rules: [{vector: a, words: [x]}, {vector: ../b, words: [x]}]", "Rule 2 .* no vector's name"),
        ("rules: [{vector: [a], words: [x]}]", "no vector's name"),
        ("rules: [{vector: a, words: [x]}]\nelse: a*b", "`else`"),
        ("rules: &a [*a]", "Rule 1|not YAML"),
        ("? [x]\n: y", "not YAML"),
        ("!!python/object/apply:os.system ['true']", "must be a mapping"),
        ("[" * 2000, "not YAML"),
        ("x" * 300_000, "longer than"),
        ("\0", "not YAML"),
    ],
)
def test_wrong_tables_are_refused(text: str, word: str) -> None:
    with pytest.raises(AFTError, match=word):
        parse_keyword_table(text)


JSONISH = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
RULES = st.lists(st.fixed_dictionaries({"vector": JSONISH, "words": JSONISH | st.lists(st.text(max_size=5))}))


@settings(max_examples=300, deadline=None)
@given(
    st.text(max_size=80)
    | JSONISH.map(yaml.safe_dump)
    | st.fixed_dictionaries({"rules": RULES | JSONISH, "else": JSONISH}).map(yaml.safe_dump)
    | st.fixed_dictionaries({"tasks": JSONISH, "else": JSONISH}).map(yaml.safe_dump)
    | st.text(alphabet="{}[]:,&*!|>-?# \nabelsrut'\"%@`", max_size=60),
    st.text(max_size=40),
)
def test_any_table_is_read_or_refused_plainly(text: str, request_text: str) -> None:
    for parse in (parse_keyword_table, parse_task_table):
        try:
            table = parse(text)
        except AFTError:
            continue
        if parse is parse_keyword_table:
            table.route(request_text)  # type: ignore[union-attr]


def test_the_shipped_table_is_sound() -> None:
    assert parse_keyword_table(default_table()).targets() == ["math", "logic", "knowledge"]


def test_a_router_is_added_by_one_decorated_class() -> None:
    @register_router
    class LengthRouter(Router):
        name, usage = "length", "length:WORDS"

        def __init__(self, most: int, vector: str) -> None:
            self.most, self.vector = most, vector

        @classmethod
        def of(cls, argument: str, entries: Sequence[Entry]) -> LengthRouter:
            return cls(int(argument), entries[0].name)

        def route(self, text: str, task: str | None = None) -> str | None:
            return self.vector if len(text.split()) <= self.most else None

        def targets(self) -> list[str]:
            return [self.vector]

        def described(self) -> dict[str, Any]:
            return {"length": self.most}

    try:
        router = make_router("length:3", LIBRARY)
        assert router.route("How many apples?") == "knowledge/science"
        assert router.route("How many apples are left?") is None
        assert "length:WORDS" in CliRunner().invoke(evaluate, ["--help"]).output
        with pytest.raises(AFTError, match="no router 'magic'") as caught:
            make_router("magic", LIBRARY)
        assert "length" in caught.value.hint
    finally:
        del ROUTERS["length"]
