"""Sharing vectors on the Hugging Face Hub: one repository per vector, or one that holds a library.

What comes from there was written by strangers. Only the files of a vector folder are fetched, and everything
is checked beside its place before it is renamed in.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from lm_eval_aft.errors import AFTError
from lm_eval_aft.library.files import CARD, SOURCE, check_folder, copy_file, limit, sha256, vector_files
from lm_eval_aft.library.header import FILE_NAME, read_header
from lm_eval_aft.library.names import check_name
from lm_eval_aft.library.remote import Remote, cached_file, check_repo, choose, look, speaking

if TYPE_CHECKING:
    from lm_eval_aft.library.store import Library
    from lm_eval_aft.vector import SteeringVector

_LIBRARY_CARD = """\
---
library_name: lm-eval-aft
tags:
- activation-steering
- steering-vector
- lm-eval-aft
---

# A library of steering vectors

Every folder `CATEGORY/NAME` is one vector for
[lm-evaluation-harness](https://github.com/EleutherAI/lm-evaluation-harness), with a card of its own.

    aft vectors pull {repo}
    lm_eval --model aft --model_args pretrained=MODEL,vector={repo}/CATEGORY/NAME --tasks TASK
"""


@dataclass(frozen=True)
class Upload:
    """One file to push: where it lies, its path in the repository, its length in bytes."""

    file: Path
    path: str
    size: int


@dataclass(frozen=True)
class Pulled:
    """A vector that came from the Hub: its library name, its folder, the commit it was at."""

    name: str
    folder: Path
    commit: str


def plan_push(vectors: Sequence[tuple[Path, str]], repo: str) -> list[Upload]:
    """The files that a push uploads.

    Args:
        vectors: (vector folder, folder in the repository); ``""`` is the repository's root.

    Raises:
        AFTError: a folder without a card, or one that `check_folder` refuses.
    """
    check_repo(repo)
    uploads = []
    for folder, place in vectors:
        check_folder(folder)
        names = [name for name in vector_files(folder) if name != SOURCE]
        if CARD not in names:
            raise AFTError(f"{folder} has no model card ({CARD}).", "A vector is shared with its card.")
        for name in names:
            file = folder / name
            uploads.append(Upload(file, str(PurePosixPath(place) / name), file.stat().st_size))
    return uploads


def push(
    uploads: Sequence[Upload],
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    endpoint: str | None = None,
) -> str:
    """Upload files in one commit, making the repository if need be; return the commit's address.

    Raises:
        AFTError: no right to write there, no network, or the Hub refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(endpoint=endpoint)
    with speaking(repo, "push to"):
        api.create_repo(repo, private=private or None, exist_ok=True)
        if revision not in (None, "main"):
            api.create_branch(repo, branch=str(revision), exist_ok=True)
        operations = [CommitOperationAdd(each.path, each.file) for each in uploads]
        if all(each.path != CARD for each in uploads) and not api.file_exists(repo, CARD, revision=revision):
            operations.append(CommitOperationAdd(CARD, _LIBRARY_CARD.format(repo=repo).encode()))
        commit = api.create_commit(
            repo, operations, commit_message=message or "Add steering vectors", revision=revision
        )
    return str(commit.commit_url)


def pull(
    remote: Remote,
    library: Library,
    *,
    vectors: Sequence[str] = (),
    name: str | None = None,
    revision: str | None = None,
    replace: bool = False,
    endpoint: str | None = None,
) -> list[Pulled]:
    """Fetch vectors into a library: all of them are checked before the first is put in its place.

    ``source.json`` in each folder records repository, commit and the files' SHA-256.

    Args:
        remote: what `look` found.
        vectors: folders in the repository; default all.
        name: library name, for one vector; default the folder's name in a library repository, and
            ``owner/name`` for a repository that is one vector.
        revision: as it was asked for, for the record.

    Raises:
        AFTError: anything that is not what a vector folder may hold; the library then stays as it was.
    """
    chosen = choose(remote, vectors)
    if name is not None and len(chosen) != 1:
        raise AFTError(f"{remote.repo} holds {len(chosen)} vectors; --name is for one.", "Leave it out.")
    names = {place: check_name(name or place or remote.repo) for place in chosen}
    if len(set(names.values())) < len(names):  # a vector at the root and one in a folder OWNER/NAME
        raise AFTError(
            f"{remote.repo} holds two vectors that would both be called {remote.repo}.",
            f"Pull one of them with --vector {remote.repo}, or the other with --vector '' --name.",
        )
    taken = [each for each in names.values() if (library.root / each).exists()]
    if taken and not replace:
        raise AFTError(
            f"The library {library.root} already has {', '.join(taken[:5])}.",
            "Choose another --name, or add --replace.",
        )
    with ExitStack() as stack:
        ready = []
        for place in chosen:
            folder = stack.enter_context(library.temporary(f"{remote.repo}/{place}".rstrip("/")))
            _download(remote, place, folder, revision, endpoint)
            check_folder(folder)
            record = {
                "repo": remote.repo,
                "vector": place or None,
                "revision": revision,
                "commit": remote.commit,
                "pulled": datetime.now(UTC).isoformat(timespec="seconds"),
                "files": {file: sha256(folder / file) for file in vector_files(folder)},
            }
            (folder / SOURCE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            ready.append((folder, names[place]))
        for folder, each in ready:
            library.move_in(folder, each, replace=replace)
    return [Pulled(each, library.root / each, remote.commit) for each in names.values()]


def fetch(
    repo: str, vector: str | None = None, revision: str | None = None, endpoint: str | None = None
) -> SteeringVector:
    """Load one vector from the Hub through its local cache; its metadata record the commit.

    Args:
        vector: its folder in a library repository; default the repository's root.

    Raises:
        AFTError: as `look`, or not a vector.
    """
    from lm_eval_aft.vector import SteeringVector

    remote = look(repo, revision, endpoint)
    places = choose(remote, [vector or ""] if vector or "" in remote.vectors else [])
    if len(places) > 1:
        raise AFTError(
            f"{repo} on the Hub holds {len(places)} vectors: {', '.join(places[:5])}.",
            f"Name one, as in {repo}/{places[0]}.",
        )
    file = cached_file(remote, str(PurePosixPath(places[0]) / FILE_NAME), revision, endpoint)
    read_header(file)
    found = SteeringVector.load(file)
    found.metadata["hub"] = {"repo": repo, "vector": places[0] or None, "commit": remote.commit}
    return found


def _download(remote: Remote, place: str, folder: Path, revision: str | None, endpoint: str | None) -> None:
    names = remote.vectors[place]
    for name in sorted(names, key=lambda n: n != FILE_NAME):  # the vector first: it decides
        cached = cached_file(remote, str(PurePosixPath(place) / name), revision, endpoint)
        copy_file(cached, folder / name, limit(name) or 0)
        if name.endswith(".safetensors"):
            read_header(folder / name)
