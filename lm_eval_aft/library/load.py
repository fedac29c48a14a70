"""Finding and loading a vector by what the user calls it: a path, a name, an expression or a Hub id."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from lm_eval_aft._util.errors import AFTError
from lm_eval_aft._util.files import exists
from lm_eval_aft.library.files import is_name, suggestion
from lm_eval_aft.library.store import Library
from lm_eval_aft.steering.vector_file import FILE_NAME

if TYPE_CHECKING:
    from lm_eval_aft.steering.vector import SteeringVector

# owner/name, perhaps the folder of one vector in a library repository, perhaps @revision.
_HUB_ID = re.compile(
    r"(?P<repo>[\w.\-]+/[\w.\-]+)(?:/(?P<vector>[\w.\-]+/[\w.\-]+))?(?:@(?P<revision>[\w.\-/]+))?"
)


def load_vector(
    spec: str | os.PathLike[str] | SteeringVector, library: str | os.PathLike[str] | Library | None = None
) -> SteeringVector:
    """Load the vector that ``spec`` means; the first of these that exists:

    - a `SteeringVector`: itself;
    - a path that holds one: a vector folder or a ``.safetensors`` file;
    - a library name, ``math/word_problems``;
    - an expression over any of these, ``"math/algebra*0.7 + logic/analogy*0.3"``;
    - a Hub id: ``owner/name``, ``owner/library/math/algebra``, either with ``@revision``.

    Args:
        library: folder of the library; default ``$AFT_LIBRARY`` or the one in the user's data folder.

    Raises:
        AFTError: nothing there, or not a vector.
    """
    from lm_eval_aft.steering.vector import SteeringVector

    if isinstance(spec, SteeringVector):
        return spec
    path = Path(spec)
    if not isinstance(spec, str) or holds_vector(path):
        return SteeringVector.load(path)
    shelf = library if isinstance(library, Library) else Library(library)
    if is_name(spec) and exists(shelf.root / spec):
        return SteeringVector.load(shelf.path(spec))
    if exists(path):  # its own message says what is wrong with it
        return SteeringVector.load(path)
    if is_expression(spec):
        from lm_eval_aft.library.compose import Operand, combine

        terms = parse_expression(spec).items()
        return combine([Operand(name, weight, load_vector(name, shelf)) for name, weight in terms], spec)
    known = shelf.names()
    hub = _HUB_ID.fullmatch(spec)
    if hub is None or spec.startswith((".", "~")) or spec.endswith(".safetensors"):
        raise AFTError(
            f"No steering vector at {spec}, and none of that name in the library {shelf.root}.",
            suggestion(spec, known)
            or "Give a vector folder or file, a name that `aft vectors list` shows, or a Hub id.",
        )
    from lm_eval_aft.library.hub import fetch

    try:
        return fetch(hub["repo"], hub["vector"], hub["revision"])
    except AFTError as error:
        raise AFTError(
            f"No steering vector at {spec}, none of that name in the library {shelf.root}, and none from "
            f"the Hub: {error.what}",
            suggestion(spec, known) or error.hint,
        ) from error


def folder_of(
    spec: str | os.PathLike[str], library: str | os.PathLike[str] | Library | None = None
) -> Path | None:
    """The vector folder that ``spec`` means: a path that is one, or a name's; None for anything else."""
    path = Path(spec)
    if holds_vector(path):
        return path if path.is_dir() else None
    shelf = library if isinstance(library, Library) else Library(library)
    found = shelf.root / path
    if is_name(str(spec)) and exists(found):
        return found
    return path if exists(path) and path.is_dir() else None


def holds_vector(path: Path) -> bool:
    """Whether there is a vector folder, or a file, at ``path``; another folder hides no library name."""
    if not exists(path):
        return False
    return exists(path / FILE_NAME) if path.is_dir() else True


# Expressions: text in, weights out.
#
#     expression = term { ("+" | "-") term }
#     term       = factor { "*" factor }
#     factor     = ("+" | "-") factor | number | name | "(" expression ")"
#
# A name is bare or in quotes. Names may contain dashes, so a minus wants a space before it.

_TOKEN = re.compile(
    r"""\s*(?:
      (?P<sign>[-+*()])
    | (?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)(?![\w./@])
    | (?P<name>[\w.~/][\w.~/@:\\-]*)
    | "(?P<double>[^"]*)" | '(?P<single>[^']*)'
    )""",
    re.VERBOSE | re.ASCII,
)
_LONGEST, _DEEPEST = 10_000, 50
_HINT = 'Write it like "math/algebra*0.7 + logic/analogy*0.3", with a space before a minus.'


def is_expression(text: str) -> bool:
    """Whether ``text`` contains anything that only an expression can.

    >>> is_expression("math/algebra"), is_expression("math/algebra*2")
    (False, True)
    """
    return re.search(r"""[+*()"'\s]|^-""", text) is not None


# The weights of each name, to be added up; of numbers without a name under "".
_Weights = dict[str, list[float]]


def _scaled(weights: _Weights, factor: float) -> _Weights:
    return {name: [weight * factor for weight in each] for name, each in weights.items()}


def parse_expression(text: str) -> dict[str, float]:
    """The weight of each vector that an expression names, in order of appearance.

    A name that occurs twice has its weights added.

    Raises:
        AFTError: not an expression, no vector in it, a number added to a vector, a product of two
            vectors, or a weight that is not finite.

    >>> parse_expression("math/algebra*0.5 - logic/arc")
    {'math/algebra': 0.5, 'logic/arc': -1.0}
    """
    if len(text) > _LONGEST:
        raise AFTError(f"An expression of {len(text):,} characters is too long.", _HINT)
    parser = _Parser(text)
    found = parser.expression(0)
    if parser.kind:
        raise parser.error(f"{parser.value!r} is not expected")
    constant = sum(found.pop("", []))
    if not found:
        raise parser.error("it names no vector")
    if constant != 0:
        raise parser.error("a number cannot be added to a vector")
    weights = {}
    for name, each in found.items():
        try:
            weights[name] = math.fsum(each)  # exactly rounded: the order does not matter
        except (OverflowError, ValueError):
            weights[name] = math.nan
        if not math.isfinite(weights[name]):
            raise parser.error(f"the weight of {name!r} is not a finite number")
    return weights


class _Parser:
    """Recursive descent with one token of lookahead: ``kind`` and ``value``; kind ``""`` is the end."""

    def __init__(self, text: str) -> None:
        self.text, self.position = text, 0
        self.kind = self.value = ""
        self.advance()

    def error(self, why: str) -> AFTError:
        shown = self.text if len(self.text) <= 200 else f"{self.text[:200]}..."
        return AFTError(f"Cannot read the expression {shown!r}: {why}.", _HINT)

    def advance(self) -> None:
        match = _TOKEN.match(self.text, self.position)
        if match is None:
            rest = self.text[self.position :].strip()
            if rest:
                raise self.error(f"{rest[:20]!r} is not expected")
            self.kind = self.value = ""
            return
        self.position = match.end()
        kind = str(match.lastgroup)
        self.kind, self.value = ("name" if kind in ("double", "single") else kind), match[kind]
        if self.kind == "name" and (not self.value.strip() or re.search(r"[+*,]", self.value)):
            raise self.error(
                f"{self.value!r} cannot be named in an expression (give that vector a library name)"
            )

    def expression(self, depth: int) -> _Weights:
        total = self.term(depth)
        while self.value in ("+", "-") and self.kind == "sign":
            sign = 1.0 if self.value == "+" else -1.0
            self.advance()
            for name, each in _scaled(self.term(depth), sign).items():
                total[name] = total.get(name, []) + each
        return total

    def term(self, depth: int) -> _Weights:
        product = self.factor(depth)
        while self.kind == "sign" and self.value == "*":
            self.advance()
            number, other = product, self.factor(depth)
            if any(number) and any(other):  # names in both
                raise self.error("two vectors cannot be multiplied")
            if any(number):
                number, other = other, number
            product = _scaled(other, sum(number[""]))
        return product

    def factor(self, depth: int) -> _Weights:
        if depth > _DEEPEST:
            raise self.error("it is nested too deeply")
        kind, value = self.kind, self.value
        if not kind:
            raise self.error("it ends too early")
        if kind == "sign" and value in ("*", ")"):
            raise self.error(f"{value!r} is not expected")
        self.advance()
        if kind == "number":
            if not math.isfinite(float(value)):
                raise self.error(f"{value} is not a finite number")
            return {"": [float(value)]}
        if kind == "name":
            return {value: [1.0]}
        if value in ("+", "-"):
            return _scaled(self.factor(depth + 1), 1.0 if value == "+" else -1.0)
        inner = self.expression(depth + 1)
        if self.kind != "sign" or self.value != ")":
            raise self.error("a parenthesis is not closed")
        self.advance()
        return inner
