"""What vectors are called in a library: CATEGORY/NAME."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

from lm_eval_aft.errors import AFTError

# No leading dot (temporaries, `..`) and no leading dash (an expression would read a minus).
PART = r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,95}"
_NAME = re.compile(rf"{PART}/{PART}")


def is_name(text: str) -> bool:
    """Whether ``text`` has the form of a library name."""
    return _NAME.fullmatch(text) is not None


def check_name(text: str) -> str:
    """Return ``text`` if it can name a vector.

    Raises:
        AFTError: it cannot.
    """
    if not is_name(text):
        raise AFTError(
            f"{text!r} cannot name a vector in a library.",
            "Write CATEGORY/NAME, as in math/word_problems: letters, digits and _ - . (not first: - and .).",
        )
    return text


def printable(text: str) -> str:
    """Text from a file as a terminal may show it: what would steer the terminal is written out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def suggestion(wrong: str, names: Iterable[str]) -> str:
    """A hint that lists the names nearest to a wrong one, or ``""``."""
    known = list(names)
    near = get_close_matches(wrong, known, n=3, cutoff=0.6)
    tails = {name.rpartition("/")[2]: name for name in known}
    near += [tails[t] for t in get_close_matches(wrong.rpartition("/")[2], tails, n=3, cutoff=0.75)]
    if not near:
        return ""
    return f"Did you mean {' or '.join(dict.fromkeys(near))}?"


def as_spec(value: Any) -> Any:
    """A name or path as it was typed: lm-eval makes numbers of what ``--model_args`` says where it can."""
    return str(value) if isinstance(value, int | float) else value
