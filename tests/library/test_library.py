"""A library on disk: adding, finding, removing, many processes at once, and sudden death."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import save

from lm_eval_aft import AFTError, SteeringVector, load_vector
from lm_eval_aft.cli.main import aft
from lm_eval_aft.library import files, store
from lm_eval_aft.library.files import damage
from lm_eval_aft.library.store import INDEX, Library, default_library
from lm_eval_aft.lm import AFTLM
from lm_eval_aft.steering.fingerprint import fingerprint
from lm_eval_aft.training.artifacts import write_card
from tests.conftest import tiny_model, tiny_tokenizer

fork = multiprocessing.get_context("fork")  # the children have torch already


@pytest.fixture
def library(tmp_path: Path) -> Library:
    return Library(tmp_path / "library")


def a_vector(value: float = 1.0, layer: int = 1, width: int = 32, **metadata: Any) -> SteeringVector:
    return SteeringVector({layer: torch.full((width,), value)}, metadata=metadata)


def a_folder(place: Path, value: float = 1.0, **metadata: Any) -> Path:
    a_vector(value, **metadata).save(place)
    (place / "README.md").write_text("# card\n")
    (place / "training.jsonl").write_text("{}\n" * 100)
    a_vector(value).save(place / "seeds/seed-0.safetensors")
    return place


def run(*arguments: str | Path, code: int = 0) -> Result:
    done = CliRunner().invoke(aft, ["vectors", *map(str, arguments)])
    assert done.exit_code == code, done.output
    return done


RESULT = {
    "task": "gsm8k",
    "dataset": None,
    "metric": "exact_match (strict|match)",
    "num_fewshot": 5,
    "n": 1319,
    "value": 0.3,
    "baseline": "28.0 ± 1.2",
    "steered": "30.0 ± 1.2",
    "difference": "+2.0",
    "interval": "[+0.5, +3.5]",
    "p": "0.01",
    "verdict": "better",
}
TRAINED = {
    "task": "gsm8k",
    "num_fewshot": 5,
    "base_model": {"name": "org/tiny-160m", "revision": "main"},
    "num_hidden_layers": 4,
    "objective": "lm",
    "control": None,
    "protocol": {"name": "rapid", "seeds": 1, "biased": False},
    "splits": {"train": 50},
    "selection": {
        "baseline": {"score": 1.5, "accuracy": 0.25, "n": 500},
        "vector": {"score": 1.25, "accuracy": 0.375, "n": 500},
        "layers": {"1": {"score": 1.25, "accuracy": 0.375}},
    },
    "created": "2026-01-02T03:04:05+00:00",
    "versions": {"lm-eval-aft": "0.1.0", "torch": "2.13"},
}


def test_add_find_and_remove(library: Library, tmp_path: Path) -> None:
    folder = a_folder(tmp_path / "made", 2.0, task="toy")
    (folder / "notes.txt").write_text("mine")
    added = library.add(folder, "math/word_problems")
    assert sorted(p.name for p in added.iterdir()) == [
        "README.md",
        "seeds",
        "training.jsonl",
        "vector.safetensors",
    ]
    library.add(folder / "vector.safetensors", "logic/lone")
    assert library.names() == ["logic/lone", "math/word_problems"]
    assert load_vector("math/word_problems", library.root).digest() == SteeringVector.load(folder).digest()
    assert oct(added.stat().st_mode & 0o777) == oct(0o777 & ~_umask())
    assert oct((added / "vector.safetensors").stat().st_mode & 0o777) == oct(0o666 & ~_umask())
    with pytest.raises(AFTError, match="already has 'logic/lone'"):
        library.add(folder, "logic/lone")
    library.add(a_folder(tmp_path / "newer", 3.0), "logic/lone", replace=True)
    assert load_vector("logic/lone", library).layers[1][0] == 3
    library.remove("logic/lone")
    assert library.names() == ["math/word_problems"]
    assert sorted(p.name for p in library.root.iterdir()) == ["math"]


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


@pytest.mark.parametrize(
    "name",
    ["plain", "../up", "a/../b", "/abs/x", "a/b/c", "a/.b", ".a/b", "-a/b", "a/b+c", "a/b*2", "a,b/c",
     "a/b@c", "a/ b", "a/", "", "a\\b/c", "a/b\n", "ä/b", "a/" + "b" * 200],
)  # fmt: skip
def test_names_refused(library: Library, tmp_path: Path, name: str) -> None:
    with pytest.raises(AFTError, match="cannot name a vector"):
        library.add(a_folder(tmp_path / "v"), name)
    assert not library.root.exists()


def test_only_sound_vectors_get_in(library: Library, tmp_path: Path) -> None:
    good = SteeringVector({0: torch.ones(4)}).save(tmp_path / "good").read_bytes()
    header = {"method": "static", "layers": [0], "coefficient": 1.0, "positions": "all", "hidden_size": 4}
    nan = save({"layers.0": torch.full((4,), torch.nan)}, {"format": "aft/1", "aft": json.dumps(header)})
    for number, (content, word) in enumerate(
        [
            (good[:-3], "truncated"),
            (good + b"x", "truncated or too long"),
            (nan, "NaN"),
            (b"PK\x03", "pickle"),
        ]
    ):
        bad = tmp_path / f"bad{number}"
        bad.mkdir()
        (bad / "vector.safetensors").write_bytes(content)
        with pytest.raises(AFTError, match=word):
            library.add(bad, "math/bad")
        with pytest.raises(AFTError, match=word):
            library.add(bad / "vector.safetensors", "math/bad")
    with pytest.raises(AFTError, match="No steering vector at"):
        library.add(tmp_path / "nothing", "math/bad")
    assert library.names() == []
    assert list(library.root.iterdir()) == []


def test_a_wrong_name_gets_the_nearest(library: Library, tmp_path: Path) -> None:
    library.add(a_folder(tmp_path / "v"), "math/word_problems")
    for wrong in ("math/word_problms", "maths/word_problems", "logic/word_problems", "word_problems"):
        with pytest.raises(AFTError, match="No steering vector at") as caught:
            load_vector(wrong, library)
        assert caught.value.hint == "Did you mean math/word_problems?", wrong
    with pytest.raises(AFTError, match="Did you mean math/word_problems"):
        load_vector("math/word_problms*2 + math/word_problems", library)
    with pytest.raises(AFTError, match="no vector 'math/word_problms'.*\n.*Did you mean"):
        library.path("math/word_problms")
    with pytest.raises(AFTError, match="Did you mean math/word_problems"):
        library.path("word_problems")
    with pytest.raises(AFTError, match="no vector '../x/y'"):
        library.path("../x/y")
    for wrong in ("", "\0", "x" * 5000, "nowhere.safetensors", str(tmp_path / "nowhere")):
        with pytest.raises(AFTError, match="No steering vector at"):
            load_vector(wrong, library)


def test_where_the_library_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AFT_LIBRARY", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert default_library().parts[-2:] == ("lm-eval-aft", "library")
    monkeypatch.setenv("AFT_LIBRARY", str(tmp_path / "mine"))
    a_vector().save(tmp_path / "mine/math/a")
    assert load_vector("math/a").layers[1][0] == 1
    assert load_vector("math/a*2 - math/a").layers[1][0] == 1
    # A path comes before a name of the library.
    monkeypatch.chdir(tmp_path)
    a_vector(7.0).save(tmp_path / "math/a")
    assert load_vector("math/a").layers[1][0] == 7


def test_the_index_is_never_the_truth(library: Library, tmp_path: Path) -> None:
    for name in ("a", "b"):
        library.add(a_folder(tmp_path / name, task=name), f"math/{name}")
    first = library.entries()
    assert library.entries() == first
    index = library.root / INDEX
    for content in (
        "",
        "[]",
        "{}",
        '{"version": 2, "vectors": []}',
        "[" * 5000,
        '{"version": 2, "vectors": {"math/a": {}}}',
    ):
        index.write_text(content)
        assert library.entries() == first
    damaged = json.loads(index.read_text())
    damaged["vectors"]["math/a"]["entry"] = {"name": "math/a", "nonsense": 1}
    index.write_text(json.dumps(damaged))
    assert library.entries() == first
    # Behind the index's back: changed, damaged, removed, moved in.
    a_vector(task="other").save(library.root / "math/a")
    (library.root / "math/b/vector.safetensors").write_bytes(b"short")
    a_vector(task="new").save(library.root / "logic/c")
    found = {entry.name: entry for entry in library.entries()}
    assert list(found) == ["logic/c", "math/a", "math/b"]
    assert found["math/a"].tasks == ("other",)
    assert "truncated" in found["math/b"].error
    index.unlink()
    assert {entry.name: entry for entry in library.entries()} == found


def test_what_is_no_vector_is_not_listed(library: Library, tmp_path: Path) -> None:
    library.add(a_folder(tmp_path / "v"), "math/a")
    (library.root / "math/empty").mkdir()
    (library.root / "README.md").write_text("x")
    (library.root / "math/.hidden").mkdir()
    (library.root / "linked").symlink_to(tmp_path)
    (library.root / "math/linked").symlink_to(tmp_path / "v")
    (library.root / "math/inside").mkdir()
    (library.root / "math/inside/vector.safetensors").symlink_to(tmp_path / "v/vector.safetensors")
    (library.root / "math/pipe").mkdir()
    os.mkfifo(library.root / "math/pipe/vector.safetensors")
    entries = {entry.name: entry for entry in library.entries()}
    assert list(entries) == ["math/a", "math/inside", "math/pipe"]
    assert "symbolic link" in entries["math/inside"].error
    assert "not a plain file" in entries["math/pipe"].error
    with pytest.raises(AFTError, match="linked is a symbolic link"):
        library.add(tmp_path / "v", "linked/out")
    with pytest.raises(AFTError, match="not a plain file"):
        library.add(library.root / "math/pipe", "math/b")


def test_list_and_show(library: Library, tmp_path: Path) -> None:
    where = ("--library", library.root)
    assert "is empty" in run("list", *where).output
    vector = a_vector(**TRAINED, share={"1": 0.142})
    folder = tmp_path / "trained"
    vector.save(folder)
    write_card(folder, vector, [RESULT])
    run("add", folder, *where, "--name", "math/word_problems")
    a_folder(tmp_path / "b", task="arc_easy", control="random", base_model={"name": "/models/other"})
    run("add", tmp_path / "b", *where, "--name", "logic/b")
    (row,) = [line for line in run("list", *where).output.splitlines() if "math/" in line]
    for text in ("32", "14.2 %", "gsm8k", "tiny-160m", "-0.2500", "+2.0 [+0.5, +3.5]", "2026-01-02, 0.1.0"):
        assert text in row
    assert "placebo: random" in run("list", *where).output
    for filters, names in [
        (("--base-model", "TINY-*"), ["math/word_problems"]),
        (("--base-model", "org/tiny-160m"), ["math/word_problems"]),
        (("--base-model", "other"), ["logic/b"]),
        (("--task", "arc*"), ["logic/b"]),
        (("--category", "math"), ["math/word_problems"]),
        (("--category", "math", "--task", "arc*"), []),
    ]:
        listed = json.loads(run("list", *where, *filters, "--json").output)
        assert [entry["name"] for entry in listed] == names, filters
    assert "none of which match" in run("list", *where, "--task", "x").output
    (entry,) = json.loads(run("list", *where, "--task", "gsm8k", "--json").output)
    assert entry["selection"] == {"score": -0.25, "accuracy": 0.125}
    assert entry["results"] == [
        {"task": "gsm8k", "metric": RESULT["metric"], "n": "1319", "difference": "+2.0",
         "95 % interval": "[+0.5, +3.5]", "verdict": "better"}
    ]  # fmt: skip
    shown = run("show", *where, "math/word_problems").output
    assert "+2.0 [+0.5, +3.5] (n = 1319, better)" in shown
    assert "norm  14.2 % of the median residual norm" in shown
    assert "residual norm" not in run("show", *where, "logic/b").output  # not recorded
    assert (
        json.loads(run("show", *where, "math/word_problems", "--json").output)["metadata"]["task"] == "gsm8k"
    )
    assert "Did you mean" in run("show", *where, "math/wordproblems", code=1).output


def test_remove_verify_and_compose_commands(library: Library, tmp_path: Path) -> None:
    where = ("--library", library.root)
    for name, layer in (("a", 1), ("b", 1), ("c", 2)):
        a_vector(2.0, layer, **TRAINED).save(library.root / "math" / name)
    assert "3 vectors, all sound" in run("verify", *where).output
    out = tmp_path / "sum"
    done = run(
        "compose", *where, "math/a*0.5 + math/b*0.5 - math/c", "-o", out, "--name", "mix/abc", "--report"
    )
    assert "+1.0000" in done.output
    card = (out / "README.md").read_text()
    assert "math/a*0.5 + math/b*0.5 - math/c" in card
    assert "task:gsm8k" in card
    assert load_vector(out).digest() == load_vector("mix/abc", library).digest()
    assert list(load_vector(out).layers) == [1, 2]
    assert "mix/abc" in run("list", *where).output
    assert "exists already" in run("compose", *where, "math/a", "-o", out, code=1).output
    assert "Nothing to do" in run("compose", *where, "math/a", code=1).output
    assert "share a layer" in run("compose", *where, "math/a + math/c", "--report").output
    (library.root / "math/b/vector.safetensors").write_bytes(b"")
    broken = run("verify", *where, code=1).output
    assert "math/b" in broken
    assert "1 of 4" in broken
    assert (
        CliRunner().invoke(aft, ["vectors", "remove", *map(str, where), "math/a"], input="n\n").exit_code == 1
    )
    assert "math/a" in library.names()
    assert "no vector 'math/x'" in run("remove", *where, "--yes", "math/a", "math/x", code=1).output
    assert "math/a" in library.names()  # all must be there before the first goes
    run("remove", *where, "--yes", "math/a", "math/b")
    assert library.names() == ["math/c", "mix/abc"]


def test_routes_command(tmp_path: Path) -> None:
    shipped = run("routes").output
    table = tmp_path / "mine.yaml"
    table.write_text(shipped)
    assert "math, logic, knowledge" in run("routes", table).output
    assert run("routes", table, "--text", "How many apples?").output == "math\n"
    table.write_text("rules: 1")
    assert "at least one" in run("routes", table, code=1).output


def test_fits(library: Library, checkpoint: Callable[..., str]) -> None:
    def add(name: str, family: str, seed: int, layer: int = 1, **metadata: Any) -> None:
        identity = fingerprint(tiny_model(family, seed), tiny_tokenizer())
        a_vector(1.0, layer, fingerprint=identity, **metadata).save(library.root / name)

    add("llama/own", "llama", 0)
    add("llama/tuned", "llama", 1)  # the same architecture with other weights
    add("other/neox", "gpt_neox", 0)
    a_vector(1.0, 1).save(library.root / "hand/fits")
    a_vector(1.0, 9).save(library.root / "hand/deep")
    a_vector(1.0, 1, 16).save(library.root / "hand/narrow")
    a_vector(1.0, fingerprint={"config": 1}).save(library.root / "hand/damaged")
    for flags, names in [
        ((), ["hand/fits", "llama/own", "llama/tuned"]),
        (("--weights",), ["hand/fits", "llama/own"]),
    ]:
        done = CliRunner().invoke(
            aft,
            [
                "vectors",
                "list",
                "--library",
                str(library.root),
                "--fits",
                checkpoint("llama"),
                "--json",
                *flags,
            ],
        )
        assert [entry["name"] for entry in json.loads(done.stdout)] == names
        assert ("Only config and tokenizer were compared" in done.stderr) == (not flags)
    assert "cannot be loaded" in run("list", "--library", library.root, "--fits", "/no/model", code=1).output
    assert "--fits" in run("list", "--library", library.root, "--weights", code=1).output


def test_fits_of_a_model_loaded_with_arguments(
    library: Library, checkpoint: Callable[..., str], tmp_path: Path
) -> None:
    """What vectors were trained with is told where it was not given, and compared where it was."""
    from peft import LoraConfig, get_peft_model

    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    (tmp_path / "hub" / "sub").mkdir(parents=True)
    model.save_pretrained(tmp_path / "hub" / "sub")
    tokenizer.save_pretrained(tmp_path / "hub" / "sub")

    def add(name: str, base: Any, **args: str) -> None:
        identity = fingerprint(base, tokenizer)
        recorded = {"name": "me/model", "revision": "main", "args": {"dtype": "float32", **args}}
        a_vector(1.0, 1, fingerprint=identity, base_model=recorded).save(library.root / name)

    add("llama/plain", model)
    add("llama/sub", model, subfolder="sub")
    add("llama/old", tiny_model("llama", 1), revision="old")
    a_vector(1.0, 1).save(library.root / "llama/hand")
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(tiny_model("llama"), config).save_pretrained(tmp_path / "adapter")
    peft = f"peft={tmp_path / 'adapter'}"
    adapted = AFTLM(checkpoint("llama"), peft=str(tmp_path / "adapter"), device="cpu").model
    add("llama/adapted", adapted, peft=str(tmp_path / "adapter"))

    def listed(*flags: str) -> tuple[list[str], str]:
        words = ["vectors", "list", "--library", str(library.root), "--json", "--fits", *flags]
        done = CliRunner().invoke(aft, words)
        assert done.exit_code == 0, done.stderr
        return [entry["name"].removeprefix("llama/") for entry in json.loads(done.stdout)], done.stderr

    folder = checkpoint("llama")
    names, told = listed(folder)
    assert names == ["hand", "old", "plain", "sub"]
    for each in (f"peft='{tmp_path / 'adapter'}' (1)", "subfolder='sub' (1)", "revision='old' (1)"):
        assert each in told
    names, told = listed(folder, "--weights")
    assert names == ["hand", "plain", "sub"]
    assert "subfolder" not in told  # it fits, whatever it was loaded with
    assert "revision='old' (1)" in told
    names, told = listed(folder, "--model-args", peft)
    assert names == ["adapted", "hand"]
    assert "Only config" not in told
    assert "none (1)" in told
    names, told = listed(str(tmp_path / "hub"), "--model-args", "subfolder=sub")
    assert names == ["hand", "old", "plain", "sub"]
    assert "subfolder" not in told
    where = ("list", "--library", library.root)
    assert "--fits" in run(*where, "--model-args", peft, code=1).output
    refused = run(*where, "--fits", folder, "--model-args", "vector=v", code=1).output
    assert "vector= has no place here" in refused


def test_a_sum_goes_through_the_harness_model_and_the_report(
    library: Library, checkpoint: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval_aft.evaluation.provenance import VectorInfo, _fill
    from lm_eval_aft.lm import AFTLM

    monkeypatch.setenv("AFT_LIBRARY", str(library.root))
    identity = fingerprint(tiny_model("llama"), tiny_tokenizer())
    for name, layer in (("math/a", 1), ("logic/b", 2)):
        a_vector(0.5, layer, **TRAINED | {"fingerprint": identity}).save(library.root / name)
    lm = AFTLM(checkpoint("llama"), vector="math/a*0.7+logic/b*0.3")
    info = lm.get_model_info()["aft"]["vector"]
    assert (info["layers"], info["task"], info["biased"]) == ([1, 2], "gsm8k", False)
    assert info["base_model"] == TRAINED["base_model"]
    vector = load_vector("math/a*0.7+logic/b*0.3")
    described = VectorInfo("run", None, None)
    _fill(described, vector.metadata, list(vector.layers))
    assert described.facts["task"] == "gsm8k"
    assert not described.biased


def fake_library(root: Path, count: int) -> None:
    """Many vectors with headers as long as real ones."""
    padding = {"splits": {"selection_documents": [f"{i:016x}" for i in range(500)]}, "sketch": "x" * 12_000}
    for i in range(count):
        folder = root / f"category-{i % 12}" / f"vector-{i}"
        folder.mkdir(parents=True)
        header = {
            "method": "static",
            "layers": [3],
            "coefficient": 1.0,
            "positions": "all",
            "hidden_size": 64,
        }
        meta = {**TRAINED, **padding, **header, "task": f"task_{i % 50}"}
        content = save({"layers.3": torch.ones(64)}, {"format": "aft/1", "aft": json.dumps(meta)})
        (folder / "vector.safetensors").write_bytes(content)
        (folder / "README.md").write_text("# card\n" * 100)


def test_a_thousand_vectors_in_a_second(library: Library) -> None:
    """A second of the processor, whatever else the machine does; and listing again reads no vector at all."""
    fake_library(library.root, 1000)
    code = (
        "import resource, sys; from lm_eval_aft.cli.main import aft\n"
        "opened = []\n"
        "sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == 'open' else None)\n"
        f"aft(['vectors', 'list', '--library', {str(library.root)!r}], standalone_mode=False)\n"
        "used = resource.getrusage(resource.RUSAGE_SELF)\n"
        "read = sum(name.endswith('vector.safetensors') for name in opened)\n"
        "print(used.ru_utime + used.ru_stime, read, file=sys.stderr)"
    )

    def listed() -> tuple[float, int, str]:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
        )
        seconds, read = done.stderr.split()
        return float(seconds), int(read), done.stdout

    cold, read, output = listed()
    assert output.count("\n") == 1002
    assert read == 1000
    warm, read, again = listed()
    print(f"1,000 vectors: {cold:.2f} s of CPU cold, {warm:.2f} s warm")
    assert again == output
    assert read == 0
    assert warm < 1
    assert cold < 10


def test_listing_imports_nothing_heavy(library: Library, tmp_path: Path) -> None:
    library.add(a_folder(tmp_path / "v"), "math/a")
    code = (
        "import sys; from lm_eval_aft.cli.main import aft\n"
        f"aft(['vectors', 'list', '--library', {str(library.root)!r}], standalone_mode=False)\n"
        "print(sorted({'torch', 'transformers', 'lm_eval', 'huggingface_hub', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


def children(count: int, work: Callable[..., None], *arguments: Any) -> list[int | None]:
    """Run ``work(number, …)`` in so many processes at once; return their exit codes."""
    started = [fork.Process(target=work, args=(n, *arguments), daemon=True) for n in range(count)]
    for process in started:
        process.start()
    for process in started:
        process.join(60)
    return [process.exitcode for process in started]


def _add_many(number: int, root: Path, source: Path, each: int) -> None:
    for i in range(each):
        Library(root).add(source, f"category-{i % 3}/from-{number}-{i}")
        Library(root).entries()


def _add_and_remove(number: int, root: Path, source: Path) -> None:
    library = Library(root)
    for i in range(30):
        with contextlib.suppress(AFTError):
            library.add(source, "math/contested", replace=i % 2 == 0)
        with contextlib.suppress(AFTError):
            if number % 2:
                library.remove("math/contested")
        name = f"math/own-{number}"
        library.add(source, name)  # although others keep emptying, and so removing, the category
        if i < 29:
            library.remove(name)


def _add_same(number: int, root: Path, source: Path) -> None:
    try:
        Library(root).add(source, "math/same")
    except AFTError as error:
        os._exit(3 if "already has" in error.what else 1)


def test_eight_processes_add_at_once(library: Library, tmp_path: Path) -> None:
    source = a_folder(tmp_path / "v", task="toy")
    assert children(8, _add_many, library.root, source, 15) == [0] * 8
    assert len(library.names()) == 120
    assert all(not entry.error and entry.tasks == ("toy",) for entry in library.entries())
    assert all(damage(library.path(name)) == [] for name in library.names())
    assert not list(library.root.glob(".adding-*"))


def test_one_of_eight_wins_a_name(library: Library, tmp_path: Path) -> None:
    assert sorted(children(8, _add_same, library.root, a_folder(tmp_path / "v"))) == [0] + [3] * 7
    assert library.names() == ["math/same"]


def test_adding_replacing_and_removing_at_once(library: Library, tmp_path: Path) -> None:
    assert children(4, _add_and_remove, library.root, a_folder(tmp_path / "v")) == [0] * 4
    assert set(library.names()) - {"math/contested"} == {f"math/own-{n}" for n in range(4)}
    assert all(damage(library.path(name)) == [] for name in library.names())


def _die_at(step: int, root: Path, source: Path, replace: bool) -> None:
    """Add a vector, and be killed at the given step: before each file copied and each rename."""
    left = [step]

    def mortal(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return function(*arguments, **options)

        return wrapped

    files.copy_file = mortal(files.copy_file)
    Path.rename = mortal(Path.rename)  # type: ignore[method-assign]
    store.shutil.rmtree = mortal(store.shutil.rmtree)  # type: ignore[attr-defined]
    Library(root).add(source, "math/a", replace=replace)


@pytest.mark.parametrize("replace", [False, True])
def test_killed_at_every_step(
    library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replace: bool
) -> None:
    old, new = a_folder(tmp_path / "old", 1.0), a_folder(tmp_path / "new", 2.0)
    digests = [SteeringVector.load(folder).digest() for folder in (old, new)]
    killed = 0
    for step in range(20):
        root = tmp_path / f"library-{step}"
        mine = Library(root)
        if replace:
            mine.add(old, "math/a")
        process = fork.Process(target=_die_at, args=(step, root, new, replace))
        process.start()
        process.join(60)
        killed += process.exitcode == -signal.SIGKILL
        assert set(mine.names()) <= {"math/a"}
        assert all(damage(mine.path(name)) == [] for name in mine.names())
        # A later add, long after, clears up and brings back a vector caught between old and new.
        with monkeypatch.context() as later:
            later.setattr(store, "STALE", -1.0)
            mine.add(old, "math/later")
        assert not list(root.glob(".*ed-*"))
        assert not list(root.glob(".adding-*"))
        if replace:
            assert load_vector("math/a", mine).digest() in digests
        assert all(damage(mine.path(name)) == [] for name in mine.names())
        if process.exitcode == 0:
            break
    assert killed >= (6 if replace else 5)
    assert process.exitcode == 0


def _add_for_ever(_: int, root: Path, source: Path) -> None:
    for i in range(10_000):
        Library(root).add(source, f"math/v{i}")


def test_killed_at_any_moment(library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = a_folder(tmp_path / "v")
    (source / "training.jsonl").write_text("{}\n" * 200_000)
    random.seed(0)
    caught = 0
    for attempt in range(16):
        root = tmp_path / f"library-{attempt}"
        process = fork.Process(target=_add_for_ever, args=(0, root, source), daemon=True)
        process.start()
        time.sleep(random.uniform(0.05, 0.15))
        process.kill()
        process.join(60)
        mine = Library(root)
        assert all(damage(mine.path(name)) == [] for name in mine.names())
        assert all(not entry.error for entry in mine.entries())
        caught += bool(list(root.glob(".adding-*")))
    assert caught  # some died in the middle
    fresh = list(root.glob(".adding-*"))
    mine.add(source, "logic/later")
    assert list(root.glob(".adding-*")) == fresh  # somebody may still be at work on them
    monkeypatch.setattr(store, "STALE", -1.0)
    mine.add(source, "logic/much-later")
    assert not list(root.glob(".adding-*"))


def test_a_library_one_may_only_read(
    library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library.add(a_folder(tmp_path / "v"), "math/a")

    def refuse(*_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(store.tempfile, "mkstemp", refuse)
    monkeypatch.setattr(store.tempfile, "mkdtemp", refuse)
    assert [entry.name for entry in library.entries()] == ["math/a"]
    with pytest.raises(AFTError, match="Cannot write into the library .*Permission denied"):
        library.add(tmp_path / "v", "math/b")
    with pytest.raises(AFTError, match="Cannot remove"):
        library.remove("math/a")
