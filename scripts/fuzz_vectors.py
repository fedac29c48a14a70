"""Damages vector files in every way it can think of, and checks what the readers make of them.

    OMP_NUM_THREADS=1 python scripts/fuzz_vectors.py --mutations 100000

A damaged file may be refused with one message (`AFTError`), or load; then it must hold the numbers that its
own bytes say, read here independently. Anything else is a failure: another exception, a file that takes
longer than two seconds, numbers that differ, NaN, a file that comes to lie outside the folder. The last line
printed is the count as JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

from lm_eval_aft import AFTError, SteeringVector
from lm_eval_aft.steering.methods import METHODS
from lm_eval_aft.steering.vector_file import read_header

DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}
SLOW = 2.0  # seconds
JUNK: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2**31, 2**63, -(2**64), 10**400, 1e308, -0.0, 0.5, "", "a", "é\0", "../x"),
    *(float("nan"), float("inf"), [], {}, [[]], [None], {"": 1}, "x" * 5000, [0] * 200, "F32", "layers.1"),
    *(
        "static",
        "mlp",
        "drab",
        "all",
        "last",
        [1, 3],
        [0, 8],
        [16],
        [8, 2],
        {"name": 5},
        "aft/1",
        "null",
        "[]",
    ),
)


@dataclass
class Count:
    """What became of the mutants."""

    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)


def originals() -> list[bytes]:
    """Whole vector files: every method, several dtypes, with the metadata of a trained vector."""
    torch.manual_seed(0)
    found = []
    for name, method in METHODS.items():
        layers = (1, 3) if method.constant else (2,)
        tensors = {f"layers.{layer}": torch.randn(8) for layer in layers}
        tensors |= {key: torch.randn(shape) for key, shape in method.extra_shapes(8).items()}
        for dtype in (torch.float32, torch.float16, torch.float64, torch.bfloat16):
            held = {key: value.to(dtype) for key, value in tensors.items()}
            entry = {**METADATA, "method": name, "layers": list(layers), "hidden_size": 8}
            header = {"format": "aft/1", "aft": json.dumps(entry, sort_keys=True)}
            found.append(save(held, metadata=header))
    return found


METADATA: dict[str, Any] = {
    "coefficient": 0.5,
    "positions": "all",
    "num_hidden_layers": 4,
    "base_model": {"name": "demo", "revision": "main"},
    "fingerprint": {"config": "a", "parameters": "b", "vocabulary": None, "dtype": "float32"},
    "task": "toy",
    "num_fewshot": 0,
    "prompts": {"num_fewshot": None},
    "objective": "choice",
    "metric": "acc",
    "protocol": {"name": "rapid", "seeds": 1, "layers": [1, 3]},
    "seed": 0,
    "splits": {"train": 5, "selection_documents": ["x"]},
    "selection": {"baseline": {"score": 1.0, "accuracy": 0.5, "n": 5}, "vector": {"score": 0.9}},
    "versions": {"torch": "2"},
    "created": "2026-11-22T00:00:00+00:00",
}  # fmt: skip


# Mutations ------------------------------------------------------------------------------------------------


def mutant(files: list[bytes], rng: random.Random) -> bytes:
    """One of the files, damaged once or several times."""
    raw = rng.choice(files)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        raw = rng.choice(MUTATIONS)(raw, files, rng)
    return raw


def _place(raw: bytes, rng: random.Random) -> int:
    """Mostly in the header, where damage matters."""
    return rng.randrange(max(1, min(len(raw), rng.choice((8, 16, 400, len(raw) or 1)))))


def _flip(raw: bytes, _files: list[bytes], rng: random.Random) -> bytes:
    at = _place(raw, rng)
    return raw[:at] + bytes([raw[at] ^ (1 << rng.randrange(8))]) + raw[at + 1 :] if raw else raw


def _overwrite(raw: bytes, _files: list[bytes], rng: random.Random) -> bytes:
    at, piece = (
        _place(raw, rng),
        rng.choice((b"\0", b"\xff", b'"', b"{", b"}", b"[", b",", b"-", b"9", b"\x80")),
    )
    length = rng.choice((1, 1, 2, 8))
    return raw[:at] + piece * length + raw[at + length :]


def _cut(raw: bytes, _files: list[bytes], rng: random.Random) -> bytes:
    return raw[: rng.randrange(len(raw) + 1)]


def _drop(raw: bytes, _files: list[bytes], rng: random.Random) -> bytes:
    at = _place(raw, rng)
    return raw[:at] + raw[at + rng.choice((1, 4, 8, 64)) :]


def _insert(raw: bytes, _files: list[bytes], rng: random.Random) -> bytes:
    at = rng.choice((_place(raw, rng), len(raw)))
    return raw[:at] + rng.randbytes(rng.choice((1, 4, 8, 64))) + raw[at:]


def _splice(raw: bytes, files: list[bytes], rng: random.Random) -> bytes:
    other = rng.choice(files)
    return raw[: _place(raw, rng)] + other[_place(other, rng) :]


def _length(raw: bytes, _files: list[bytes], rng: random.Random) -> bytes:
    value = rng.choice((0, 1, 7, len(raw), len(raw) - 8, 2**24, 2**31, 2**40, 2**63, 2**64 - 1))
    return struct.pack("<Q", max(0, value)) + raw[8:]


def _numbers(raw: bytes, _files: list[bytes], rng: random.Random) -> bytes:
    bad = rng.choice((b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f", b"\x00\x00\x80\xff", b"\xff\xff\x7f\x7f"))
    at = max(0, len(raw) - 4 * rng.randrange(1, 9))
    return raw[:at] + bad + raw[at + 4 :]


def _json(raw: bytes, _files: list[bytes], rng: random.Random) -> bytes:
    """Change the header as JSON, and state its new length rightly."""
    parts = split(raw)
    if parts is None:
        return raw
    header, body = parts
    where = header
    if rng.random() < 0.6 and isinstance(header.get("__metadata__"), dict):
        meta = header["__metadata__"]
        try:
            where = json.loads(meta["aft"])
        except (KeyError, TypeError, ValueError, RecursionError):
            where = meta
        if isinstance(where, dict | list):
            _change(where, rng)
        meta["aft"] = json.dumps(where) if rng.random() < 0.98 else "[" * 20_000
    else:
        _change(where, rng)
    text = json.dumps(header).encode()
    if rng.random() < 0.1:  # a key that is there twice
        text = b'{"layers.1":' + json.dumps(rng.choice(JUNK)).encode() + b"," + text[1:]
    if rng.random() < 0.05:
        text = text.ljust(len(text) + rng.randrange(16))
    return struct.pack("<Q", len(text)) + text + body


def _change(value: Any, rng: random.Random) -> None:
    """Replace, remove, rename or add something somewhere inside."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    if not keys:
        return
    key = rng.choice(keys)
    inner = value[key]
    if isinstance(inner, dict | list) and inner and rng.random() < 0.6:
        _change(inner, rng)
        return
    what = rng.randrange(5)
    if what == 0:
        del value[key]
    elif what == 1 and isinstance(value, dict):
        value[str(rng.choice(("layers.2", "layers.01", "layers.99999999", "method.w", "x", "", key)))] = inner
    elif what == 2 and isinstance(inner, int | float) and not isinstance(inner, bool):
        value[key] = inner + rng.choice((-1, 1, 0.5, 1000))
    else:
        value[key] = rng.choice(JUNK)


Mutation = Callable[[bytes, list[bytes], random.Random], bytes]
MUTATIONS: tuple[Mutation, ...] = (
    *(_flip, _overwrite, _cut, _drop, _insert, _splice, _length, _numbers),
    *(_json, _json, _json, _json, _json),
)


# What a file says of itself -------------------------------------------------------------------------------


def split(raw: bytes) -> tuple[dict[str, Any], bytes] | None:
    """The header and the numbers' bytes, or None."""
    if len(raw) < 8:
        return None
    (length,) = struct.unpack("<Q", raw[:8])
    try:
        header = json.loads(raw[8 : 8 + length])
    except (ValueError, RecursionError):
        return None
    return (header, raw[8 + length :]) if isinstance(header, dict) else None


def stated(raw: bytes) -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, Any]]:
    """Tensors as float32 and the entry, read without the package or safetensors."""
    parts = split(raw)
    assert parts is not None, "it loaded, but its header is not JSON"
    header, body = parts
    entry = json.loads(header.pop("__metadata__")["aft"])
    tensors = {}
    for name, told in header.items():
        first, last = told["data_offsets"]
        if told["dtype"] == "BF16":
            wide = np.frombuffer(body[first:last], dtype="<u2").astype("<u4") << 16
            values = wide.view("<f4")
        else:
            values = np.frombuffer(body[first:last], dtype=DTYPES[told["dtype"]])
        with np.errstate(over="ignore"):
            tensors[name] = values.reshape(told["shape"]).astype("<f4")
    return tensors, entry


def check(path: Path, raw: bytes) -> str:
    """What the readers make of a file: ``loaded`` or ``refused``; raises where they do wrong."""
    path.write_bytes(raw)
    began = time.monotonic()
    try:
        header = read_header(path)
    except AFTError:
        header = None
    try:
        vector = SteeringVector.load(path)
    except AFTError:
        vector = None
    assert time.monotonic() - began < SLOW, f"it took {time.monotonic() - began:.1f} s"
    if vector is None:
        return "header accepted, numbers refused" if header else "refused"
    tensors, entry = stated(raw)
    held = vector.tensors
    assert held.keys() == tensors.keys(), f"holds {sorted(held)}, says {sorted(tensors)}"
    for name, values in held.items():
        assert values.dtype == torch.float32
        assert values.numpy().tobytes() == tensors[name].tobytes(), f"other numbers in {name}"
        assert bool(torch.isfinite(values).all())
    assert (vector.method, vector.positions) == (entry["method"], entry["positions"])
    assert vector.coefficient == float(entry["coefficient"])
    assert math.isfinite(vector.coefficient)
    assert entry["layers"] == list(vector.layers)
    if header is not None:
        assert list(header.layers) == list(vector.layers)
        assert header.hidden_size == vector.hidden_size
    again = vector.save(path.with_name("again.safetensors"))
    assert SteeringVector.load(again).digest() == vector.digest(), "saving it changes it"
    return "loaded" if header is not None else "loaded, header refused"


def fuzz(mutations: int, seed: int, folder: Path) -> Count:
    """Check so many mutants; those that fail are kept in ``folder/failures``."""
    rng, files, count = random.Random(seed), originals(), Count()
    inside = folder / "inside"
    inside.mkdir()
    for number in range(mutations):
        raw = mutant(files, rng)
        try:
            count.outcomes[check(inside / "v.safetensors", raw)] += 1
        except Exception as error:  # whatever it is, it is what is looked for
            count.outcomes["failed"] += 1
            count.failures.append(f"mutant {number}: {type(error).__name__}: {str(error)[:300]}")
            (folder / "failures").mkdir(exist_ok=True)
            (folder / "failures" / f"{number}.safetensors").write_bytes(raw)
    outside = {each.name for each in folder.iterdir()} - {"inside", "failures"}
    within = {each.name for each in inside.iterdir()} - {"v.safetensors", "again.safetensors"}
    if outside or within:
        count.failures.append(f"files appeared: {sorted(outside | within)}")
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--mutations", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    began = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    count = fuzz(options.mutations, options.seed, folder)
    for line in count.failures[:20]:
        print(line)
    print(f"{time.monotonic() - began:.0f} s; failing files are kept in {folder}/failures")
    print(json.dumps({"mutations": options.mutations, **count.outcomes, "failures": len(count.failures)}))
    sys.exit(1 if count.failures else 0)


if __name__ == "__main__":
    main()
