"""Pushing to and pulling from a stand-in Hub: what goes there comes back, and nothing else gets in."""

from __future__ import annotations

import json
import os
import pickle
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save

from lm_eval_aft import AFTError, SteeringVector, load_vector
from lm_eval_aft.cli.vectors import vectors as command
from lm_eval_aft.library.files import damage
from lm_eval_aft.library.hub import fetch, look, plan_push, pull, push
from lm_eval_aft.library.store import Library
from tests.hub_server import Hub, running_hub

PNG = b"\x89PNG\r\n\x1a\n" + bytes(20)
CARD = b"---\nlibrary_name: lm-eval-aft\n---\n# card\n"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A stand-in, with a Hub cache of its own and the network allowed."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_TELEMETRY", True)
    with running_hub() as running:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", running.endpoint)
        monkeypatch.setattr(
            huggingface_hub.constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            running.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        )
        yield running


@pytest.fixture
def library(tmp_path: Path) -> Library:
    return Library(tmp_path / "library")


def vector_bytes(value: float = 1.0, width: int = 4, **metadata: Any) -> bytes:
    """A vector file with one layer."""
    header = {"method": "static", "layers": [0], "coefficient": 1.0, "positions": "all", "hidden_size": width}
    return save(
        {"layers.0": torch.full((width,), value)}, {"format": "aft/1", "aft": json.dumps(header | metadata)}
    )


def a_folder(place: Path, value: float = 1.0) -> Path:
    (place / "seeds").mkdir(parents=True)
    for name, content in {
        "vector.safetensors": vector_bytes(value, task="toy"),
        "seeds/seed-0.safetensors": vector_bytes(value),
        "README.md": CARD,
        "training.jsonl": b"{}\n",
        "sweep.png": PNG,
        "notes.txt": b"mine",
    }.items():
        (place / name).write_bytes(content)
    return place


def tree(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


def test_push_and_pull_one_vector(hub: Hub, library: Library, tmp_path: Path) -> None:
    folder = a_folder(tmp_path / "mine")
    uploads = plan_push([(folder, "")], "me/v")
    push(uploads, "me/v", private=True, endpoint=hub.endpoint)
    assert hub.repos["me/v"].private
    sha = hub.repos["me/v"].branches["main"]
    sent = hub.repos["me/v"].commits[sha]
    assert set(sent) == tree(folder) - {"notes.txt"}
    remote = look("me/v", endpoint=hub.endpoint)
    (pulled,) = pull(remote, library, name="math/v", endpoint=hub.endpoint)
    assert tree(pulled.folder) == {*sent, "source.json"}
    assert all((pulled.folder / name).read_bytes() == content for name, content in sent.items())
    assert not any(path.is_symlink() for path in pulled.folder.rglob("*"))
    record = json.loads((pulled.folder / "source.json").read_text())
    assert (record["repo"], record["commit"], pulled.commit) == ("me/v", sha, sha)
    assert damage(pulled.folder) == []
    (pulled.folder / "README.md").write_text("changed")
    assert damage(pulled.folder) == ["README.md changed since it was pulled"]
    assert load_vector("math/v", library).digest() == SteeringVector.load(folder).digest()


def test_a_library_repository(hub: Hub, library: Library, tmp_path: Path) -> None:
    folders = [(a_folder(tmp_path / "a", 1.0), "math/a"), (a_folder(tmp_path / "b", 2.0), "logic/b")]
    push(plan_push(folders, "me/all"), "me/all", endpoint=hub.endpoint)
    root = hub.repos["me/all"].commits[hub.repos["me/all"].branches["main"]]
    assert "aft vectors pull me/all" in root["README.md"].decode()
    (tmp_path / "a" / "README.md").write_bytes(b"---\n{}\n---\nnew\n")
    push(plan_push(folders[:1], "me/all"), "me/all", revision="next", endpoint=hub.endpoint)
    assert set(hub.repos["me/all"].branches) == {"main", "next"}
    remote = look("me/all", endpoint=hub.endpoint)
    (one,) = pull(remote, library, vectors=["logic/b"], endpoint=hub.endpoint)
    assert (one.name, library.names()) == ("logic/b", ["logic/b"])
    pull(remote, library, replace=True, endpoint=hub.endpoint)
    assert library.names() == ["logic/b", "math/a"]
    assert (library.root / "math/a/README.md").read_bytes() == CARD
    pull(look("me/all", "next", hub.endpoint), library, replace=True, revision="next", endpoint=hub.endpoint)
    assert b"new" in (library.root / "math/a/README.md").read_bytes()
    with pytest.raises(AFTError, match="Did you mean math/a"):
        pull(remote, library, vectors=["math/aa"], endpoint=hub.endpoint)
    with pytest.raises(AFTError, match="already has"):
        pull(remote, library, endpoint=hub.endpoint)
    with pytest.raises(AFTError, match="holds 2 vectors"):
        fetch("me/all", endpoint=hub.endpoint)


def test_a_pinned_revision_stays(hub: Hub, library: Library) -> None:
    repo = hub.repo("me/v", {"vector.safetensors": vector_bytes(1.0)})
    old = repo.branches["main"]
    repo.commit({"vector.safetensors": vector_bytes(2.0)})
    found = load_vector(f"me/v@{old}", library)
    assert found.layers[0][0] == 1
    assert found.metadata["hub"] == {"repo": "me/v", "vector": None, "commit": old}
    assert load_vector("me/v", library).layers[0][0] == 2
    assert load_vector(f"me/v*2 + me/v@{old}", library).layers[0][0] == 5
    with pytest.raises(AFTError, match="no such revision"):
        load_vector("me/v@nothing", library)


def test_names_from_the_hub(hub: Hub, library: Library) -> None:
    hub.repo("me/all", {"math/a/vector.safetensors": vector_bytes(3.0), "README.md": CARD})
    assert load_vector("me/all/math/a", library).layers[0][0] == 3
    assert load_vector("me/all", library).metadata["hub"]["vector"] == "math/a"
    SteeringVector({0: torch.ones(4)}).save(library.root / "me/all")
    before = len(hub.requests)
    assert load_vector("me/all", library).layers[0][0] == 1  # the library comes first
    assert len(hub.requests) == before
    with pytest.raises(AFTError, match=r"none of that name in the library .*no repository me/al") as caught:
        load_vector("me/al", library)
    assert caught.value.hint == "Did you mean me/all?"
    hub.repo("me/model", {"model.safetensors": b"x"})
    with pytest.raises(AFTError, match="holds no vector.safetensors"):
        look("me/model", endpoint=hub.endpoint)


def test_offline_takes_what_was_fetched(
    hub: Hub, library: Library, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    repo = hub.repo("me/v", {"vector.safetensors": vector_bytes(1.0), "README.md": CARD})
    pull(look("me/v", endpoint=hub.endpoint), library, endpoint=hub.endpoint)
    seen = len(hub.requests)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert load_vector("me/v", tmp_path / "empty").metadata["hub"]["commit"] == repo.branches["main"]
    again = Library(tmp_path / "again")
    for revision in (None, "main", repo.branches["main"], repo.branches["main"][:8]):
        pull(look("me/v", revision), again, replace=True)
    assert tree(again.root / "me/v") == {"vector.safetensors", "README.md", "source.json"}
    assert not any(path.is_symlink() for path in again.root.rglob("*"))
    with pytest.raises(AFTError, match="not in the Hub's local cache"):
        look("me/other")
    assert len(hub.requests) == seen


# What a hostile repository may hold in place of, or beside, a vector.
class Bomb:
    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.place,))


def with_header(header: object, data: bytes = bytes(16), length: int | None = None) -> bytes:
    raw = json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def declared(shape: object, offsets: object = (0, 16), dtype: object = "F32", width: object = 4) -> bytes:
    aft = {"method": "static", "layers": [0], "coefficient": 1.0, "positions": "all", "hidden_size": width}
    return with_header(
        {
            "__metadata__": {"format": "aft/1", "aft": json.dumps(aft)},
            "layers.0": {"dtype": dtype, "shape": shape, "data_offsets": offsets},
        }
    )


BAD_VECTORS = {
    "symlink": (b"../../../../etc/passwd", "truncated or not a safetensors|cannot be read|header of"),
    "short symlink": (b"../x", "truncated"),
    "empty": (b"", "truncated"),
    "huge header": (with_header({}, length=2**62), "declares a header of"),
    "header above the cap": (with_header({}, length=17 * 2**20), "declares a header of"),
    "header past the end": (with_header({}, length=1000), "truncated"),
    "deep header": (struct.pack("<Q", 200_000) + b"[" * 200_000, "header is not"),
    "shape too large": (declared([2**40]), "does not fit"),
    "shape too small": (declared([2]), "does not fit"),
    "two axes": (declared([2, 2]), "does not fit"),
    "no number": (declared(["4"]), "damaged"),
    "offsets past the end": (declared([8], (0, 32), width=8), "truncated or too long"),
    "offsets with a gap": (declared([2], (8, 16), width=2), "overlap or leave gaps"),
    "negative offsets": (declared([4], (-16, 0)), "overlap or leave gaps"),
    "integers": (declared([4], dtype="I32"), "damaged or not float"),
    "another width": (declared([4], width=8), "does not fit"),
    "not a number": (vector_bytes(float("nan")), "NaN"),
    "another tensor": (
        with_header(
            {"__metadata__": {"format": "aft/1", "aft": json.dumps({"method": "static"})}, "../x": {}}
        ),
        "which no vector",
    ),
    "another format": (save({"weight": torch.ones(4)}), "not a steering vector"),
}


def refuse(hub: Hub, library: Library, files: dict[str, bytes], word: str) -> None:
    """Pulling and loading a repository of these files fails, and writes nothing into the library."""
    hub.repo("bad/v", files)
    SteeringVector({0: torch.ones(4)}).save(library.root / "good/one")
    before = tree(library.root.parent) - {
        name for name in tree(library.root.parent) if name.startswith("cache")
    }
    with pytest.raises(AFTError, match=word) as caught:
        pull(look("bad/v", endpoint=hub.endpoint), library, endpoint=hub.endpoint)
    assert "bad/v" in caught.value.what  # not the name of some temporary folder
    after = {name for name in tree(library.root.parent) if not name.startswith("cache")}
    assert after == before
    assert library.names() == ["good/one"]
    assert [path.name for path in library.root.iterdir()] == ["good"]


@pytest.mark.parametrize("case", BAD_VECTORS)
def test_damaged_and_hostile_vectors(hub: Hub, library: Library, case: str) -> None:
    content, word = BAD_VECTORS[case]
    refuse(hub, library, {"vector.safetensors": content, "README.md": CARD}, word)
    refuse(hub, library, {"vector.safetensors": vector_bytes(), "seeds/s.safetensors": content}, word)
    hub.repo("bad/w", {"vector.safetensors": content})
    with pytest.raises(AFTError):
        load_vector("bad/w", library)


def test_pickles_are_never_opened(hub: Hub, library: Library, tmp_path: Path) -> None:
    place = tmp_path / "exploded"
    for protocol in (0, 2, pickle.HIGHEST_PROTOCOL):
        bomb = pickle.dumps(Bomb(place), protocol=protocol)
        refuse(hub, library, {"vector.safetensors": bomb}, "pickle|not a safetensors|header of")
        torch.save(Bomb(place), tmp_path / "bomb.pt")
        saved = (tmp_path / "bomb.pt").read_bytes()
        (tmp_path / "bomb.pt").unlink()
        refuse(hub, library, {"vector.safetensors": saved}, "pickle")
    names = ["model.pkl", "pytorch_model.bin", "seeds/s.pt", "seeds/x/y.safetensors", "run.py", "a.so"]
    hub.repo("bad/v", {"vector.safetensors": vector_bytes()} | dict.fromkeys(names, bomb))
    remote = look("bad/v", endpoint=hub.endpoint)
    assert sorted(remote.left_out) == sorted(names)
    (pulled,) = pull(remote, library, endpoint=hub.endpoint)
    assert tree(pulled.folder) == {"vector.safetensors", "source.json"}
    assert not any(name in request for request in hub.requests for name in names)  # not even asked for
    assert not place.exists()


@pytest.mark.parametrize(
    "name",
    [
        "../vector.safetensors",
        "../../outside.txt",
        "/tmp/outside.txt",
        "seeds/../../../outside.safetensors",
        "math/../../x/vector.safetensors",
        "..\\outside.txt",
        "seeds//x.safetensors",
        "./README.md",
        ".",
        "",
    ],
)
def test_names_that_point_outside(hub: Hub, library: Library, name: str) -> None:
    refuse(hub, library, {"vector.safetensors": vector_bytes(), name: vector_bytes()}, "points outside")


def test_other_files_are_judged_by_contents(hub: Hub, library: Library) -> None:
    for name, content, word in [
        ("sweep.png", b"<script>", "not a PNG"),
        ("README.md", b"\xff\xfe", "not text"),
        ("training.jsonl", b"\x80\x04", "not text"),
        ("README.md", bytes(2**20 + 1), "at most 1,048,576"),
    ]:
        refuse(hub, library, {"vector.safetensors": vector_bytes(), name: content}, word)


def test_a_record_of_their_own_is_not_taken(hub: Hub, library: Library) -> None:
    hub.repo("bad/v", {"vector.safetensors": vector_bytes(), "source.json": b'{"repo": "good/v"}'})
    (pulled,) = pull(look("bad/v", endpoint=hub.endpoint), library, endpoint=hub.endpoint)
    assert json.loads((pulled.folder / "source.json").read_text())["repo"] == "bad/v"


def test_symbolic_links_are_not_followed_when_pushing_or_adding(
    hub: Hub, library: Library, tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    for number, name in enumerate(["README.md", "vector.safetensors", "seeds/seed-0.safetensors", "seeds"]):
        folder = a_folder(tmp_path / f"v{number}")
        if name == "seeds":
            (folder / name).rename(tmp_path / "elsewhere")
        else:
            (folder / name).unlink()
        (folder / name).symlink_to(tmp_path / "elsewhere" if name == "seeds" else secret)
        for act in (
            lambda folder=folder: plan_push([(folder, "")], "me/v"),
            lambda folder=folder: library.add(folder, "math/v"),
        ):
            with pytest.raises(AFTError, match="symbolic link"):
                act()
    assert library.names() == []
    assert hub.requests == []


def test_failures_are_told_in_one_message(hub: Hub, library: Library, tmp_path: Path) -> None:
    hub.repo("me/v", {"vector.safetensors": vector_bytes(), "README.md": CARD})
    for status, word in [(500, "answers 500"), (403, "answers 403"), (429, "answers 429")]:
        hub.status = {"/api/models/me/v": status}
        with pytest.raises(AFTError, match=word):
            look("me/v", endpoint=hub.endpoint)
    hub.status = {}
    remote = look("me/v", endpoint=hub.endpoint)
    hub.status = {"/me/v/resolve": 403}
    with pytest.raises(AFTError, match="403|reached"):
        pull(remote, library, endpoint=hub.endpoint)
    hub.status = {"/api/repos/create": 403}
    uploads = plan_push([(a_folder(tmp_path / "f"), "")], "me/new")
    with pytest.raises(AFTError, match="answers 403.*\n.*hf auth login"):
        push(uploads, "me/new", endpoint=hub.endpoint)
    hub.status = {}
    with pytest.raises(AFTError, match="no repository on the Hub"):
        look("no-owner", endpoint=hub.endpoint)
    repo = hub.repos["me/v"]
    repo.commit({"README.md": CARD + b"more"})
    with pytest.raises(AFTError, match="changed on the Hub while"):
        pull(remote, library, endpoint=hub.endpoint)
    assert not library.root.exists() or list(library.root.iterdir()) == []


def test_no_network_at_all(library: Library, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(AFTError, match="cannot be reached"):
        look("me/v", endpoint=nobody)
    with pytest.raises(AFTError, match="cannot be reached"):
        push([], "me/v", endpoint=nobody)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(AFTError, match="HF_HUB_OFFLINE"):
        push([], "me/v", endpoint=hub.endpoint)


def test_a_download_that_breaks_off(hub: Hub, library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)  # the client waits between its attempts
    hub.repo("me/v", {"vector.safetensors": vector_bytes(), "README.md": CARD})
    remote = look("me/v", endpoint=hub.endpoint)
    hub.cut = {"README.md"}
    with pytest.raises(AFTError, match="me/v"):
        pull(remote, library, endpoint=hub.endpoint)
    assert list(library.root.iterdir()) == []
    hub.cut = set()
    pull(remote, library, endpoint=hub.endpoint)
    assert damage(library.root / "me/v") == []


def test_the_commands(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AFT_LIBRARY", str(tmp_path / "library"))
    SteeringVector({1: torch.ones(4)}, metadata={"task": "toy"}).save(tmp_path / "plain")
    run = CliRunner().invoke
    assert run(command, ["add", str(tmp_path / "plain"), "--name", "math/a"]).exit_code == 0
    dry = run(command, ["push", "math/a", "--repo", "me/v", "--dry-run"])
    assert dry.exit_code == 0, dry.output
    assert "vector.safetensors" in dry.output
    assert "README.md" in dry.output  # made for it, as it had none
    assert hub.requests == []
    sent = run(command, ["push", "math/a", "--repo", "me/v", "--private"])
    assert sent.exit_code == 0, sent.output
    library = run(command, ["push", "math/a", "--repo", "me/all", "--as-library"])
    assert library.exit_code == 0, library.output
    assert "math/a/vector.safetensors" in hub.repos["me/all"].commits[hub.repos["me/all"].branches["main"]]
    dry = run(command, ["pull", "me/all", "--dry-run"])
    assert "math/a/vector.safetensors" in dry.output
    taken = run(command, ["pull", "me/all"])
    assert (taken.exit_code, "already has" in taken.output) == (1, True)
    pulled = run(command, ["pull", "me/v", "--name", "math/back"])
    assert pulled.exit_code == 0, pulled.output
    shown = run(command, ["show", "math/back"])
    assert hub.repos["me/v"].branches["main"] in shown.output


def test_in_a_process_of_its_own(tmp_path: Path) -> None:
    """As users run it: the address comes from HF_ENDPOINT, errors are one message without traceback."""
    with running_hub() as hub:
        hub.repo("me/v", {"vector.safetensors": vector_bytes(), "README.md": CARD})
        environment = os.environ | {
            "HF_ENDPOINT": hub.endpoint,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(tmp_path / "home"),
            "AFT_LIBRARY": str(tmp_path / "library"),
            "OMP_NUM_THREADS": "1",
        }
        environment.pop("HF_HUB_CACHE", None)
        for repo, code, word in [("me/v", 0, "Pulled: me/v"), ("me/nothing", 1, "no repository me/nothing")]:
            done = subprocess.run(
                [sys.executable, "-m", "lm_eval_aft.cli.main", "vectors", "pull", repo],
                env=environment,
                capture_output=True,
                text=True,
                timeout=100,
                check=False,
            )
            assert (done.returncode, "Traceback" in done.stderr) == (code, False), done.stderr
            assert word in done.stdout + done.stderr
