"""Sharing vectors on the Hugging Face Hub: one repository per vector, or one that holds a library.

What comes from there was written by strangers: only the files of a vector folder are fetched, and all of them
are checked in a temporary folder before it is renamed into the library.

Files are fetched one by one rather than by ``snapshot_download``: the vector comes first, so that a bad one
ends the pull, and no other file is asked for. A push is one commit, whatever the number of vectors;
``upload_folder`` would make one for each.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from lm_eval_aft._util.errors import AFTError
from lm_eval_aft._util.files import sha256
from lm_eval_aft.library.files import (
    CARD,
    SOURCE,
    check_folder,
    check_name,
    copy_file,
    is_name,
    limit,
    suggestion,
    vector_files,
)
from lm_eval_aft.steering.vector_file import FILE_NAME, read_header

if TYPE_CHECKING:
    from lm_eval_aft.library.store import Library
    from lm_eval_aft.steering.vector import SteeringVector

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
    """A file to push: its local path, its path in the repository, its length in bytes."""

    file: Path
    path: str
    size: int


@dataclass(frozen=True)
class Pulled:
    """A vector from the Hub: its library name, its folder, and the commit it was read at."""

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
    """Upload files in one commit, creating the repository if necessary; return the commit's address.

    Raises:
        AFTError: no right to write there, no network, or the Hub refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(endpoint=endpoint)
    with translate_hub_errors(repo, "push to"):
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
    """Fetch vectors into a library; all of them are checked before the first is moved in.

    ``source.json`` in each folder records repository, commit and the files' SHA-256.

    Args:
        remote: what `look` found.
        vectors: folders in the repository; default all.
        name: library name, for one vector; default the folder's name in a library repository, and
            ``owner/name`` for a repository that is one vector.
        revision: as it was asked for, for the record.

    Raises:
        AFTError: anything that a vector folder may not hold; the library is then left unchanged.
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
            for file in sorted(remote.vectors[place], key=lambda each: each != FILE_NAME):  # the vector first
                cached = cached_file(remote, str(PurePosixPath(place) / file), revision, endpoint)
                copy_file(cached, folder / file, limit(file) or 0)
                if file.endswith(".safetensors"):
                    read_header(folder / file)
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
    """Load one vector from the Hub through its local cache; its metadata name the commit.

    Args:
        vector: its folder in a library repository; default the repository's root.

    Raises:
        AFTError: as `look`, or not a vector.
    """
    from lm_eval_aft.steering.vector import SteeringVector

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


# What a repository on the Hugging Face Hub holds, judged by its file names before anything is fetched.

_TIMEOUT = 10.0


@dataclass(frozen=True)
class Remote:
    """What a repository holds at one commit.

    Attributes:
        commit: the full commit hash.
        vectors: folder in the repository (``""`` is its root) -> file name -> length in bytes.
        left_out: files that belong to no vector; they are never fetched.
    """

    repo: str
    commit: str
    vectors: dict[str, dict[str, int]]
    left_out: list[str] = field(default_factory=list)


def check_repo(repo: str) -> str:
    """Return ``repo`` if it can be a repository's name; raises `AFTError` otherwise."""
    if not is_name(repo):
        raise AFTError(
            f"{repo!r} is no repository on the Hub.", "Write OWNER/NAME; a revision goes into --revision."
        )
    return repo


def look(repo: str, revision: str | None = None, endpoint: str | None = None) -> Remote:
    """The vectors that a repository holds; offline, those of them in the Hub's local cache.

    Raises:
        AFTError: no such repository or revision, no network, no vector in it, or file names that
            point outside.
    """
    from huggingface_hub import HfApi, is_offline_mode

    check_repo(repo)
    if is_offline_mode():
        commit, files = _look_in_cache(repo, revision)
    else:
        with translate_hub_errors(repo, "read"):
            info = HfApi(endpoint=endpoint).model_info(
                repo, revision=revision, files_metadata=True, timeout=_TIMEOUT
            )
            files = {s.rfilename: int(s.size or 0) for s in info.siblings or ()}
            commit = str(info.sha)
    if not re.fullmatch(r"[0-9a-f]{40,64}", commit):
        raise AFTError(f"The Hub names no commit for {repo}.", "Try again.")
    remote = Remote(repo, commit, *_sort_files(repo, files))
    if not remote.vectors:
        raise AFTError(
            f"{repo} on the Hub holds no {FILE_NAME}.", "It may be a model, not a steering vector."
        )
    return remote


def choose(remote: Remote, wanted: Sequence[str]) -> list[str]:
    """The folders of the wanted vectors, each once, or of all; raises `AFTError` if one is missing."""
    for place in wanted:
        if place not in remote.vectors:
            known = sorted(remote.vectors)
            hint = (
                suggestion(place, known)
                or f"It holds: {', '.join(k or 'one at its root' for k in known[:10])}."
            )
            raise AFTError(f"{remote.repo} on the Hub holds no vector {place!r}.", hint)
    return list(dict.fromkeys(wanted)) or sorted(remote.vectors)


def _sort_files(repo: str, files: dict[str, int]) -> tuple[dict[str, dict[str, int]], list[str]]:
    """Assign a repository's files to its vectors; files that no vector may hold are left out."""
    vectors: dict[str, dict[str, int]] = {}
    for name in files:
        parts = name.split("/")
        if {"", ".", ".."} & set(parts) or "\\" in name:
            raise AFTError(
                f"{repo} on the Hub holds a file named {name[:100]!r}, which points outside its folder.",
                "Do not use that repository, and report it.",
            )
        place = "/".join(parts[:-1])
        if parts[-1] == FILE_NAME and (not place or is_name(place)):
            vectors[place] = {}
    left_out = []
    for name, size in files.items():
        fitting = [p for p in vectors if (not p or name.startswith(f"{p}/"))]
        place = max(fitting, key=len, default="")
        own = name[len(place) + 1 :] if place else name
        longest = limit(own) if place in vectors and own != SOURCE else None
        if longest is None:
            left_out.append(name)
        elif size > longest:
            raise AFTError(
                f"{repo} on the Hub holds {name} of {size:,} bytes; at most {longest:,} are allowed."
            )
        else:
            vectors[place][own] = size
    return vectors, left_out


def cached_file(remote: Remote, name: str, revision: str | None, endpoint: str | None) -> Path:
    """The path of a repository's file in the Hub's cache, fetched if it is not there yet."""
    from huggingface_hub import hf_hub_download, is_offline_mode

    # By the name of the revision, so that the cache knows it when offline.
    asked = remote.commit if is_offline_mode() else revision or "main"
    with translate_hub_errors(remote.repo, "read"):
        path = Path(hf_hub_download(remote.repo, name, revision=asked, endpoint=endpoint))
    if remote.commit not in path.parts:
        raise AFTError(f"{remote.repo} changed on the Hub while it was read.", "Try again.")
    return path.resolve()  # the cache keeps links to blobs


def _look_in_cache(repo: str, revision: str | None) -> tuple[str, dict[str, int]]:
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    wanted = revision or "main"
    try:
        repos = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except (CacheNotFound, OSError, ValueError):
        repos = frozenset()
    own = (each for each in repos if each.repo_id == repo and each.repo_type == "model")
    for each in (version for found in own for version in found.revisions):
        if wanted in each.refs or (len(wanted) >= 7 and each.commit_hash.startswith(wanted)):
            root = each.snapshot_path
            files = {f.file_path.relative_to(root).as_posix(): f.size_on_disk for f in each.files}
            return each.commit_hash, files
    raise AFTError(
        f"{repo} at {wanted} is not in the Hub's local cache, and HF_HUB_OFFLINE forbids the network.",
        "Unset HF_HUB_OFFLINE, or pull it once where there is a network.",
    )


@contextmanager
def translate_hub_errors(repo: str, doing: str) -> Iterator[None]:
    """Turn whatever the Hub's client raises into one message."""
    from huggingface_hub import errors

    # From httpx in some releases and its successor in others: the common base class of network failures.
    http_error: Any = errors.HfHubHTTPError.__mro__[1]
    if http_error in (Exception, BaseException):  # would take every error for a network failure
        http_error = errors.HfHubHTTPError
    try:
        yield
    except errors.GatedRepoError as error:
        hint = "Ask for access on its page, then `hf auth login` or HF_TOKEN."
        raise AFTError(f"Cannot {doing} {repo} on the Hub: access must be granted first.", hint) from error
    except errors.RevisionNotFoundError as error:
        raise AFTError(f"{repo} on the Hub has no such revision.", "Give a branch, tag or commit.") from error
    except errors.RepositoryNotFoundError as error:
        hint = "Check the name; for a private one `hf auth login` or set HF_TOKEN."
        raise AFTError(f"The Hub has no repository {repo}, or not for you.", hint) from error
    except errors.OfflineModeIsEnabled as error:
        raise AFTError(f"Cannot {doing} {repo}: HF_HUB_OFFLINE is set.", "Unset it.") from error
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        told = (error.server_message or "").strip()[:300]
        hint = "`hf auth login` with a token that may write." if status in (401, 403) else "Try again later."
        raise AFTError(f"Cannot {doing} {repo}: the Hub answers {status}. {told}".strip(), hint) from error
    except (http_error, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = (str(error) or type(error).__name__).strip().partition("\n")[0][:200]
        hint = "Check its name and card."
        if isinstance(error, http_error | OSError):
            reason = f"the Hub cannot be reached ({reason})."
            hint = "Check the network; HF_HUB_OFFLINE=1 uses what was fetched before."
        raise AFTError(f"Cannot {doing} {repo}: {reason}", hint) from error
