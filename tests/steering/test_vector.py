"""The vector file: what goes in comes out, and whatever else is refused in one sentence."""

from __future__ import annotations

import json
import pickle
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lm_eval_aft import AFTError, SteeringVector, load_vector
from lm_eval_aft.steering.vector_file import read_header


def a_vector() -> SteeringVector:
    return SteeringVector(
        {3: torch.randn(8), 1: torch.randn(8)},
        coefficient=0.5,
        metadata={"task": "toy", "numbers": [1, 2.5, None]},
    )


@pytest.mark.parametrize("place", ["v", "v/w.safetensors"])
def test_round_trip(tmp_path: Path, place: str) -> None:
    vector = a_vector()
    written = vector.save(tmp_path / place)
    loaded = load_vector(tmp_path / place)
    assert written.is_file()
    assert list(loaded.layers) == [1, 3]
    assert all(torch.equal(loaded.layers[k], vector.layers[k]) for k in vector.layers)
    assert (loaded.coefficient, loaded.positions, loaded.method) == (0.5, "all", "static")
    assert loaded.metadata == vector.metadata
    assert loaded.digest() == vector.digest()
    assert [p.name for p in (tmp_path / place).parent.rglob("*.tmp")] == []


def test_header_is_plain_json_that_any_reader_can_use(tmp_path: Path) -> None:
    file = a_vector().save(tmp_path / "v")
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    metadata = json.loads(raw[8 : 8 + length])["__metadata__"]
    assert metadata["format"] == "aft/1"
    header = json.loads(metadata["aft"])
    assert (header["layers"], header["hidden_size"], header["coefficient"]) == ([1, 3], 8, 0.5)


def test_digest_depends_on_effect_alone() -> None:
    vector = a_vector()
    same = SteeringVector(vector.layers, 0.5, metadata={"other": 1})
    assert same.digest() == vector.digest()
    moved = SteeringVector({2: vector.layers[1], 3: vector.layers[3]}, 0.5)
    assert len({vector.digest(), moved.digest(), SteeringVector(vector.layers, 0.6).digest()}) == 3


def with_header(
    tmp_path: Path, tensors: dict[str, torch.Tensor], header: object, form: str = "aft/1"
) -> Path:
    path = tmp_path / "v.safetensors"
    save_file(tensors, path, metadata={"format": form, "aft": json.dumps(header)})
    return path


GOOD = {"method": "static", "layers": [0], "coefficient": 1.0, "positions": "all", "hidden_size": 4}


def bad_files(tmp_path: Path) -> dict[str, Path]:
    whole = SteeringVector({0: torch.ones(64)}).save(tmp_path / "whole.safetensors").read_bytes()
    cut, renamed, empty = (tmp_path / f"{name}.safetensors" for name in ("cut", "renamed", "empty"))
    cut.write_bytes(whole[:-10])
    renamed.write_bytes(pickle.dumps({"layers": [1, 2]}))
    empty.write_bytes(b"")
    archive = tmp_path / "archive.safetensors"
    torch.save({"layers.0": torch.ones(4)}, archive)
    return {"truncated": cut, "pickle": renamed, "truncated or not": empty, "torch.save": archive}


def test_damaged_files_are_named(tmp_path: Path) -> None:
    for word, path in bad_files(tmp_path).items():
        with pytest.raises(AFTError, match=word):
            load_vector(path)


def test_a_pickle_is_never_run(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "exploded",))

    path = tmp_path / "v.safetensors"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        path.write_bytes(pickle.dumps(Bomb(), protocol=protocol))
        with pytest.raises(AFTError):
            load_vector(path)
    assert not (tmp_path / "exploded").exists()


def test_no_length_of_the_header_makes_a_vector_look_like_a_pickle(tmp_path: Path) -> None:
    """safetensors files begin with their header's length: one in 32 begins with a pickle's first byte."""
    starts = set()
    for extra in range(0, 300, 4):
        vector = SteeringVector({0: torch.ones(4)}, metadata={"note": "x" * extra})
        path = vector.save(tmp_path / "v.safetensors")
        starts.add(path.read_bytes()[0])
        assert load_vector(path).digest() == vector.digest()
        assert read_header(path).layers == (0,)
    assert 0x80 in starts


@pytest.mark.parametrize(
    ("tensors", "change", "form", "word"),
    [
        ({"layers.0": torch.tensor([1.0, float("nan"), 0, 0])}, {}, "aft/1", "NaN"),
        ({"layers.0": torch.tensor([1.0, float("inf"), 0, 0])}, {}, "aft/1", "infinite"),
        ({"layers.0": torch.ones(5)}, {}, "aft/1", "hidden_size 4"),
        ({"layers.0": torch.ones(2, 4)}, {}, "aft/1", "shape"),
        ({"layers.1": torch.ones(4)}, {}, "aft/1", "declares layers"),
        ({"layers.x": torch.ones(4)}, {}, "aft/1", "layers.x"),
        ({"layers.0": torch.ones(4, dtype=torch.int32)}, {}, "aft/1", "floating"),
        ({"layers.0": torch.ones(4)}, {"coefficient": "big"}, "aft/1", "not a number"),
        ({"layers.0": torch.ones(4)}, {"method": "magic"}, "aft/1", "method 'magic'"),
        ({"layers.0": torch.ones(4)}, {"positions": "some"}, "aft/1", "positions 'some'"),
        ({"layers.0": torch.ones(4)}, {}, "other", "not a steering vector"),
    ],
)
def test_wrong_contents_are_named(
    tmp_path: Path, tensors: dict[str, torch.Tensor], change: dict[str, object], form: str, word: str
) -> None:
    with pytest.raises(AFTError, match=word):
        load_vector(with_header(tmp_path, tensors, GOOD | change, form))


def test_missing_and_headerless(tmp_path: Path) -> None:
    with pytest.raises(AFTError, match="No steering vector at"):
        load_vector(tmp_path / "nothing")
    with pytest.raises(AFTError, match="header"):
        load_vector(with_header(tmp_path, {"layers.0": torch.ones(4)}, [1]))


def test_unwritable_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(AFTError, match="Cannot write"):
        a_vector().save(tmp_path / "file" / "v")
