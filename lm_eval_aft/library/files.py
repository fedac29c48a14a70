"""The files a vector folder may hold, and copying them without trusting where they come from."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
from pathlib import Path

from lm_eval_aft.errors import AFTError
from lm_eval_aft.header_entry import MAX_FILE
from lm_eval_aft.library.header import FILE_NAME, OPEN_FLAGS, read_header
from lm_eval_aft.library.names import PART

CARD = "README.md"
SOURCE = "source.json"
# Name -> greatest length in bytes.
FILES = {FILE_NAME: MAX_FILE, CARD: 2**20, "training.jsonl": 2**28, "sweep.png": 2**25, SOURCE: 2**20}
_SEED = re.compile(rf"seeds/{PART}\.safetensors")


def limit(name: str) -> int | None:
    """The greatest length in bytes of a file a vector folder may hold; ``None``: it may not hold it.

    Args:
        name: path inside the folder, with ``/``.
    """
    return MAX_FILE if _SEED.fullmatch(name) else FILES.get(name)


def vector_files(folder: Path) -> list[str]:
    """The names of the files in a vector folder that belong to the vector; others are not counted.

    Raises:
        AFTError: one of them is a symbolic link or anything but a plain file.
    """
    names = [name for name in FILES if os.path.lexists(folder / name)]
    seeds = folder / "seeds"
    if seeds.is_symlink():
        raise _link(seeds)
    if seeds.is_dir():
        names += sorted(f"seeds/{e.name}" for e in seeds.iterdir() if _SEED.fullmatch(f"seeds/{e.name}"))
    for name in names:
        if not stat.S_ISREG((folder / name).lstat().st_mode):
            raise _link(folder / name)
    return names


def copy_vector(source: Path, target: Path) -> None:
    """Copy a vector folder's own files, or a lone ``.safetensors`` file, into an empty folder.

    ``source.json`` stays behind: only a pull can say where a vector came from, not who hands a folder over.

    Raises:
        AFTError: no vector there, a symbolic link, too long, or not to be read.
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
    """Check every file of a vector folder, numbers included, by contents and not by name.

    Raises:
        AFTError: a file that is not what its name says, or a vector that cannot be used.
    """
    from lm_eval_aft.vector import SteeringVector  # torch

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


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def open_rights(folder: Path) -> None:
    """Give a folder made by mkdtemp and the files in it the rights that newly made ones get."""
    umask = os.umask(0)
    os.umask(umask)
    folder.chmod(0o777 & ~umask)
    for each in folder.rglob("*"):
        each.chmod((0o777 if each.is_dir() else 0o666) & ~umask)


def _link(path: Path) -> AFTError:
    return AFTError(f"{path} is a symbolic link or not a plain file.", "Give the file itself.")
