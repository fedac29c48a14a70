"""Finding and loading a vector by what the user calls it: a path, a name, an expression or a Hub id."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from lm_eval_aft._util.errors import AFTError
from lm_eval_aft.library.expression import is_expression
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
    if is_name(spec) and _exists(shelf.root / spec):
        return SteeringVector.load(shelf.path(spec))
    if _exists(path):  # its own message says what is wrong with it
        return SteeringVector.load(path)
    if is_expression(spec):
        from lm_eval_aft.library.compose import compose

        return compose(spec, lambda name: load_vector(name, shelf))
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
    if is_name(str(spec)) and _exists(found):
        return found
    return path if _exists(path) and path.is_dir() else None


def holds_vector(path: Path) -> bool:
    """Whether there is a vector folder, or a file, at ``path``; another folder hides no library name."""
    if not _exists(path):
        return False
    return _exists(path / FILE_NAME) if path.is_dir() else True


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # too long for a file name, or a null byte in it
        return False
