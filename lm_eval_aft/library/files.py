"""What vectors are called, which files their folders may hold, and copying and checking those files."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

from lm_eval_aft._util.errors import AFTError
from lm_eval_aft._util.files import sha256
from lm_eval_aft.steering.vector_file import FILE_NAME, MAX_FILE, OPEN_FLAGS, read_header

# No leading dot (temporaries, `..`) and no leading dash (an expression would read a minus).
PART = r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,95}"
_NAME = re.compile(rf"{PART}/{PART}")


def is_name(text: str) -> bool:
    """Whether ``text`` has the form of a library name.

    >>> is_name("math/algebra"), is_name("../algebra")
    (True, False)
    """
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
    """Text from a file, safe for a terminal: control characters are escaped."""
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


# The files a vector folder may hold, and copying them without trusting where they come from.

CARD = "README.md"
RESULTS = ".eval_results/lm-eval-aft.yaml"  # where the Hub looks for a model's results
SOURCE = "source.json"
# Name -> greatest length in bytes.
FILES = {
    FILE_NAME: MAX_FILE,
    CARD: 2**20,
    RESULTS: 2**20,
    "training.jsonl": 2**28,
    "sweep.png": 2**25,
    SOURCE: 2**20,
}
_SEED = re.compile(rf"seeds/{PART}\.safetensors")


def limit(name: str) -> int | None:
    """The greatest length in bytes of a file in a vector folder; ``None`` if it may not hold such a file.

    Args:
        name: path inside the folder, with ``/``.
    """
    return MAX_FILE if _SEED.fullmatch(name) else FILES.get(name)


def vector_files(folder: Path) -> list[str]:
    """The names of the files in a vector folder that belong to the vector; others are ignored.

    Raises:
        AFTError: one of them is a symbolic link or anything but a plain file.
    """
    names = [name for name in FILES if os.path.lexists(folder / name)]
    seeds = folder / "seeds"
    for inner in (seeds, (folder / RESULTS).parent):
        if inner.is_symlink():
            raise _link(inner)
    if seeds.is_dir():
        names += sorted(f"seeds/{e.name}" for e in seeds.iterdir() if _SEED.fullmatch(f"seeds/{e.name}"))
    for name in names:
        if not stat.S_ISREG((folder / name).lstat().st_mode):
            raise _link(folder / name)
    return names


def copy_vector(source: Path, target: Path) -> None:
    """Copy a vector folder's own files, or a lone ``.safetensors`` file, into an empty folder.

    ``source.json`` is not copied: only a pull may say where a vector came from.

    Raises:
        AFTError: no vector there, a symbolic link, too long, or unreadable.
    """
    if source.is_file() and source.suffix == ".safetensors":
        read_header(source)
        copy_file(source, target / FILE_NAME, MAX_FILE)
        return
    if not os.path.lexists(source / FILE_NAME):
        raise AFTError(
            f"No steering vector at {source}.",
            "Give a .safetensors file or a folder that holds vector.safetensors.",
        )
    for name in (each for each in vector_files(source) if each != SOURCE):
        copy_file(source / name, target / name, limit(name) or 0)


def copy_file(source: Path, target: Path, longest: int) -> None:
    """Copy one plain file of at most ``longest`` bytes; symbolic links are refused, not followed."""
    try:
        target.parent.mkdir(exist_ok=True)
        with os.fdopen(os.open(source, OPEN_FLAGS), "rb") as stream:
            status = os.fstat(stream.fileno())
            if not stat.S_ISREG(status.st_mode) or status.st_size > longest:
                raise AFTError(f"{source} is no file of at most {longest:,} bytes.")
            with target.open("xb") as out:
                shutil.copyfileobj(stream, out)
    except OSError as error:
        if source.is_symlink():
            raise _link(source) from error
        raise AFTError(f"Cannot copy {source} to {target}: {error.strerror}.") from error


def check_folder(folder: Path) -> None:
    """Check the contents of every file of a vector folder, numbers included.

    Raises:
        AFTError: a file that is not what its name says, or a vector that cannot be used.
    """
    from lm_eval_aft.steering.vector import SteeringVector  # torch

    for name in vector_files(folder):
        file, longest = folder / name, limit(name) or 0
        if file.stat().st_size > longest:
            raise AFTError(f"{file} is longer than {longest:,} bytes.")
        if name.endswith(".safetensors"):
            read_header(file)  # before anything else opens it
            SteeringVector.load(file)
        elif name == "sweep.png":
            with file.open("rb") as stream:
                if stream.read(8) != b"\x89PNG\r\n\x1a\n":
                    raise AFTError(f"{file} is not a PNG picture.")
        else:
            try:
                with file.open(encoding="utf-8") as text:
                    while text.read(2**20):
                        pass
            except UnicodeDecodeError as error:
                raise AFTError(f"{file} is not text.") from error


def _link(path: Path) -> AFTError:
    return AFTError(f"{path} is a symbolic link or not a plain file.", "Give the file itself.")


def damage(folder: Path) -> list[str]:
    """What is wrong with a vector folder: unreadable files, and any that changed since it was pulled."""
    found = []
    try:
        check_folder(folder)
        header = read_header(folder / FILE_NAME)
        depth = header.metadata.get("num_hidden_layers")
        if isinstance(depth, int) and header.layers[-1] >= depth:
            found.append(f"layer {header.layers[-1]} of a model that has {depth}")
    except (AFTError, OSError) as error:
        return [error.what if isinstance(error, AFTError) else str(error)]
    if (folder / SOURCE).is_file():
        try:
            recorded = json.loads((folder / SOURCE).read_text(encoding="utf-8"))["files"]
            added = [name for name in vector_files(folder) if name not in recorded and name != SOURCE]
            found += [f"{name} was not pulled with it" for name in added]
            for name, digest in recorded.items():
                if limit(name) is None or not (folder / name).is_file():
                    found.append(f"{name} was pulled but is no longer there")
                elif sha256(folder / name) != digest:
                    found.append(f"{name} changed since it was pulled")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            found.append(f"{SOURCE} is damaged ({type(error).__name__})")
    return found
