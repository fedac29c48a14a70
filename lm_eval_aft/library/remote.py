"""What a repository on the Hugging Face Hub holds, judged by its file names before anything is fetched."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lm_eval_aft.errors import AFTError
from lm_eval_aft.library.files import SOURCE, limit
from lm_eval_aft.library.header import FILE_NAME
from lm_eval_aft.library.names import is_name, suggestion

_TIMEOUT = 10.0


@dataclass(frozen=True)
class Remote:
    """What a repository holds at one commit.

    Attributes:
        commit: the full commit hash.
        vectors: folder in the repository (``""`` is its root) -> file name -> length in bytes.
        left_out: files that belong to no vector; they are never fetched.
        cached: local folder to read from instead of the network, when offline.
    """

    repo: str
    commit: str
    vectors: dict[str, dict[str, int]]
    left_out: list[str] = field(default_factory=list)
    cached: Path | None = None


def check_repo(repo: str) -> str:
    """Return ``repo`` if it can be a repository's name; raises `AFTError` otherwise."""
    if not is_name(repo):
        raise AFTError(
            f"{repo!r} is no repository on the Hub.", "Write OWNER/NAME; a revision goes into --revision."
        )
    return repo


def look(repo: str, revision: str | None = None, endpoint: str | None = None) -> Remote:
    """What vectors a repository holds; offline, what of it lies in the Hub's local cache.

    Raises:
        AFTError: no such repository or revision, no network, no vector in it, or file names that
            point outside.
    """
    from huggingface_hub import HfApi, is_offline_mode

    check_repo(repo)
    if is_offline_mode():
        commit, files, cached = _look_in_cache(repo, revision)
    else:
        with speaking(repo, "read"):
            info = HfApi(endpoint=endpoint).model_info(
                repo, revision=revision, files_metadata=True, timeout=_TIMEOUT
            )
            files = {s.rfilename: int(s.size or 0) for s in info.siblings or ()}
            commit, cached = str(info.sha), None
    if not re.fullmatch(r"[0-9a-f]{40,64}", commit):
        raise AFTError(f"The Hub names no commit for {repo}.", "Try again.")
    remote = Remote(repo, commit, *_sort_files(repo, files), cached)
    if not remote.vectors:
        raise AFTError(
            f"{repo} on the Hub holds no {FILE_NAME}.", "It may be a model, not a steering vector."
        )
    return remote


def choose(remote: Remote, wanted: Sequence[str]) -> list[str]:
    """The folders of the wanted vectors, each once, or of all; raises `AFTError` where one is not there."""
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
    """Deal a repository's files to its vectors; what no vector may hold is left out."""
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
            raise AFTError(f"{repo} on the Hub holds {name} of {size:,} bytes; at most {longest:,} is right.")
        else:
            vectors[place][own] = size
    return vectors, left_out


def cached_file(remote: Remote, name: str, revision: str | None, endpoint: str | None) -> Path:
    """A file of the repository at the commit, in the Hub's cache; fetched if it is not there yet."""
    if remote.cached is not None:
        return (remote.cached / name).resolve()
    from huggingface_hub import hf_hub_download

    with speaking(remote.repo, "read"):
        # By the name asked for, so that the cache learns it for times without a network.
        path = Path(hf_hub_download(remote.repo, name, revision=revision or "main", endpoint=endpoint))
    if remote.commit not in path.parts:
        raise AFTError(f"{remote.repo} changed on the Hub while it was read.", "Try again.")
    return path.resolve()  # the cache keeps links to blobs


def _look_in_cache(repo: str, revision: str | None) -> tuple[str, dict[str, int], Path]:
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    wanted = revision or "main"
    try:
        repos = [
            r
            for r in scan_cache_dir(constants.HF_HUB_CACHE).repos
            if r.repo_id == repo and r.repo_type == "model"
        ]
    except (CacheNotFound, OSError, ValueError):
        repos = []
    for each in (version for found in repos for version in found.revisions):
        if wanted in each.refs or (len(wanted) >= 7 and each.commit_hash.startswith(wanted)):
            root = Path(each.snapshot_path)
            files = {f.file_path.relative_to(root).as_posix(): f.size_on_disk for f in each.files}
            return each.commit_hash, files, root
    raise AFTError(
        f"{repo} at {wanted} is not in the Hub's local cache, and HF_HUB_OFFLINE forbids the network.",
        "Unset HF_HUB_OFFLINE, or pull it once where there is a network.",
    )


@contextmanager
def speaking(repo: str, doing: str) -> Iterator[None]:
    """Turn whatever the Hub's client raises into one message."""
    from huggingface_hub import errors

    # httpx in some releases, its successor in others: the base class of both kinds of failure.
    http_error: Any = errors.HfHubHTTPError.__mro__[1]
    if http_error in (Exception, BaseException):  # would take every error for one of the network
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
    except (http_error, OSError) as error:
        reason = (str(error) or type(error).__name__).strip().partition("\n")[0][:200]
        raise AFTError(
            f"Cannot {doing} {repo}: the Hub cannot be reached ({reason}).",
            "Check the network; HF_HUB_OFFLINE=1 uses what was fetched before.",
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = (str(error) or type(error).__name__).strip().partition("\n")[0][:200]
        raise AFTError(f"Cannot {doing} {repo}: {reason}", "Check its name and card.") from error
