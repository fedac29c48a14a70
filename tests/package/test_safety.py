"""What strangers' files may not do: run code, ask the network, put scripts into reports."""

from __future__ import annotations

import ast
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import lm_eval_aft
from lm_eval_aft import AFTError, SteeringVector, load_vector
from lm_eval_aft.cli.main import aft
from lm_eval_aft.evaluation.render import write_report
from lm_eval_aft.evaluation.report import compare
from lm_eval_aft.export.formats import import_vector
from lm_eval_aft.library.routers import read_table
from lm_eval_aft.library.store import Library
from lm_eval_aft.lm import AFTLM
from lm_eval_aft.steering.vector_file import MAX_FILE, MAX_HEADER
from lm_eval_aft.studies.config import read_library_study
from tests.result_folders import steered_by, write_results

PACKAGE = Path(lm_eval_aft.__file__).parent
# Modules that run what they read, and calls that do.
FORBIDDEN_MODULES = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "jsonpickle", "runpy"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_METHODS = {
    *("torch.load", "numpy.load", "np.load", "yaml.unsafe_load", "yaml.full_load", "os.system", "os.popen"),
    *("importlib.import_module",),
}
SAFE_YAML = {"BaseLoader", "SafeLoader"}
# The lazy names of the package itself, its export formats, and the libraries whose names are checked: the
# module's name comes from a table in that file.
ALLOWED = {
    (name, "importlib.import_module")
    for name in ("__init__.py", "export/formats.py", "_util/private_names.py")
}


def misdeeds(source: str, name: str) -> list[str]:
    """Where a module unpickles, runs text as code, trusts a model's code, or starts a shell."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        found += [n for n in names if n.partition(".")[0] in FORBIDDEN_MODULES]
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        keywords = {each.arg: ast.unparse(each.value) for each in node.keywords}
        if called in FORBIDDEN_CALLS or (called in FORBIDDEN_METHODS and (name, called) not in ALLOWED):
            found.append(called)
        if called == "yaml.load" and keywords.get("Loader", "").removeprefix("yaml.") not in SAFE_YAML:
            found.append(called)
        if keywords.get("shell") == "True" or keywords.get("allow_pickle") == "True":
            found.append(ast.unparse(node))
        if keywords.get("trust_remote_code", "False") != "False":
            found.append(ast.unparse(node))
        if (
            called.endswith(".from_pretrained")
            and "AutoModel" in called
            and "trust_remote_code" not in keywords
        ):
            found.append(f"{called} without trust_remote_code=False")
    return found


def test_the_package_never_runs_what_it_reads() -> None:
    checked = 0
    for path in PACKAGE.rglob("*.py"):
        found = misdeeds(path.read_text(encoding="utf-8"), str(path.relative_to(PACKAGE)))
        assert not found, f"{path}: {found}"
        checked += 1
    assert checked > 80
    for bad in (
        *("import pickle", "from dill import loads", "torch.load(f)", "eval(text)", "yaml.load(t)"),
        *("yaml.load(t, Loader=yaml.Loader)", "subprocess.run(c, shell=True)", "f(trust_remote_code=True)"),
        *("AutoModelForCausalLM.from_pretrained(x)", "np.load(x, allow_pickle=True)", "exec(x)"),
    ):
        assert misdeeds(bad, "x.py"), bad


class Bomb:
    """Unpickling one writes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_text, (self.mark, "boom"))


def test_a_pickle_in_every_input(tmp_path: Path, checkpoint: Callable[..., str]) -> None:
    import torch

    mark = tmp_path / "boom"
    bomb = pickle.dumps(Bomb(mark))
    pickle.loads(bomb)
    assert mark.exists()  # it does go off
    mark.unlink()
    torch.save({"weight": Bomb(mark)}, tmp_path / "archive.pt")
    archive = (tmp_path / "archive.pt").read_bytes()
    tried: list[str] = []

    def plant(path: Path, content: bytes) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path

    def refused(what: str, use: Callable[[], object]) -> None:
        with pytest.raises((AFTError, SystemExit)):
            use()
        assert not mark.exists(), what
        tried.append(what)

    whole = SteeringVector({1: torch.ones(32)}, metadata={"task": "toy"})
    for kind, content in (("pickle", bomb), ("archive", archive)):
        place = tmp_path / kind
        vector = plant(place / "v" / "vector.safetensors", content)
        refused(f"{kind} vector", lambda: load_vector(vector))  # noqa: B023
        refused(f"{kind} folder", lambda: load_vector(vector.parent))  # noqa: B023
        refused(f"{kind} add", lambda: Library(place / "lib").add(vector.parent, "a/b"))  # noqa: B023
        plant(place / "lib" / "a" / "c" / "vector.safetensors", content)
        assert Library(place / "lib").entries()[0].error
        plant(place / "lib" / ".index.json", content)
        assert Library(place / "lib").entries()[0].error
        refused(f"{kind} name", lambda: load_vector("a/c", place / "lib"))  # noqa: B023
        refused(f"{kind} model arg", lambda: AFTLM(checkpoint("llama"), vector=str(vector)))  # noqa: B023
        whole.save(place / "seeded")
        plant(place / "seeded" / "seeds" / "seed-0.safetensors", content)
        refused(f"{kind} seed", lambda: Library(place / "lib").add(place / "seeded", "a/d"))  # noqa: B023
        for name in ("x.gguf", "x.pt", "x.bin", "x.safetensors"):
            file = plant(place / name, content)
            refused(f"{kind} {name}", lambda: import_vector(file, place / "out"))  # noqa: B023
        adapter = place / "adapter"
        plant(adapter / "adapter_config.json", b'{"peft_type": "LORA", "base_model_name_or_path": "demo"}')
        plant(adapter / "adapter_model.bin", content)
        refused(f"{kind} adapter", lambda: import_vector(adapter, place / "out"))  # noqa: B023
        model = place / "model"
        shutil.copytree(checkpoint("llama"), model)
        (model / "model.safetensors").unlink()
        plant(model / "pytorch_model.bin", content)
        with pytest.raises(Exception, match=".") as error:  # torch's own refusal is as good
            AFTLM(str(model), device="cpu")
        assert not isinstance(error.value, AssertionError)
        assert not mark.exists()
        run = place / "run"
        whole.save(run)
        plant(run / "training.jsonl", content)
        plant(run / "state.safetensors", content)
        from lm_eval_aft.training.checkpoint import open_run

        refused(f"{kind} state", lambda: open_run(run, {}, resume=True))  # noqa: B023
        for name, read in (("study.yaml", read_library_study), ("table.yaml", read_table)):
            file = plant(place / name, content)
            refused(f"{kind} {name}", lambda: read(file))  # noqa: B023
        write_results(place / "results" / "baseline", {"toy": [0, 1]})
        write_results(place / "results" / "steered" / "v", {"toy": [1, 1]}, vector=steered_by())
        for file in list((place / "results").rglob("*.json*")):
            kept = file.read_bytes()
            file.write_bytes(content)
            refused(f"{kind} {file.name}", lambda: compare(place / "results"))  # noqa: B023
            file.write_bytes(kept)
    assert len(tried) >= 30
    python = plant(tmp_path / "s.yaml", b"!!python/object/apply:os.system ['touch " + bytes(mark) + b"']\n")
    refused("YAML", lambda: read_library_study(python))
    result = CliRunner().invoke(aft, ["vectors", "routes", str(python)])
    assert (result.exit_code, mark.exists()) == (1, False)


@pytest.mark.parametrize("command", ["eval", "export", "list"])
def test_a_models_own_code_is_not_run_unasked(
    command: str, tmp_path: Path, checkpoint: Callable[..., str]
) -> None:
    import torch

    model, mark = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(checkpoint("llama"), model)
    config = json.loads((model / "config.json").read_text())
    config["model_type"] = "of_its_own"
    config["auto_map"] = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    (model / "config.json").write_text(json.dumps(config))
    (model / "own.py").write_text(f"open({str(mark)!r}, 'w')\n")
    SteeringVector({1: torch.ones(32)}).save(tmp_path / "v")
    Library(tmp_path / "lib").add(tmp_path / "v", "a/b")
    commands = {
        "eval": [
            "eval",
            "--model",
            str(model),
            "--vector",
            str(tmp_path / "v"),
            "--tasks",
            "aft_demo_choice",
        ],
        "export": ["export", str(tmp_path / "v"), "--model", str(model), "--to", "merged"],
        "list": ["vectors", "list", "--library", str(tmp_path / "lib"), "--fits", str(model)],
    }
    output = [] if command == "list" else ["--output", str(tmp_path / "out")]
    result = CliRunner().invoke(aft, [*commands[command], *output], input="y\ny\ny\n")
    assert result.exit_code == 1
    assert "brings code of its own" in result.output
    assert not mark.exists()


def test_lengths_are_limited_before_anything_is_read(tmp_path: Path) -> None:
    path = tmp_path / "v.safetensors"
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", 100) + b"{")
        stream.truncate(MAX_FILE + 1)  # takes no room on the disk
    with pytest.raises(AFTError, match="no vector is longer"):
        SteeringVector.load(path)
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", MAX_HEADER + 1) + b"{")
        stream.truncate(MAX_HEADER + 100)
    with pytest.raises(AFTError, match="declares a header"):
        SteeringVector.load(path)


GUARD = """
import os, socket, sys
log = os.environ["AFT_TEST_SOCKETS"]
def refuse(self, address, *rest):
    if self.family != socket.AF_UNIX:
        with open(log, "a") as stream:
            stream.write(repr(address) + "\\n")
        raise OSError(101, "Network is unreachable")
socket.socket.connect = socket.socket.connect_ex = refuse
def nowhere(host, *rest, **options):
    with open(log, "a") as stream:
        stream.write(repr(host) + "\\n")
    raise socket.gaierror(-2, "Name or service not known")
socket.getaddrinfo = nowhere
from lm_eval_aft.cli.main import aft
aft()
"""


def asked_of_the_network(
    tmp_path: Path, *arguments: str
) -> tuple[list[str], subprocess.CompletedProcess[str]]:
    """What a command tried to reach, in a process where nothing can be."""
    log = tmp_path / "sockets"
    log.unlink(missing_ok=True)
    switches = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE")
    environment = {key: value for key, value in os.environ.items() if key not in switches}
    environment |= {"AFT_TEST_SOCKETS": str(log), "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", GUARD, *arguments],
        capture_output=True, text=True, check=False, env=environment, cwd=tmp_path,
    )  # fmt: skip
    return (log.read_text().splitlines() if log.exists() else []), done


def test_offline_asks_nothing(tmp_path: Path) -> None:
    (tmp_path / "data.txt").write_text("")
    wanted = ["vectors", "pull", "some-owner/some-vector", "--library", str(tmp_path / "lib")]
    asked, done = asked_of_the_network(tmp_path, *wanted)
    assert asked  # the guard sees what goes out
    assert done.returncode == 1
    asked, done = asked_of_the_network(tmp_path, "--offline", *wanted)
    assert (asked, done.returncode) == ([], 1)
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_offline_work_asks_nothing(tmp_path: Path) -> None:
    """Training, scoring and a model that is nowhere: no request leaves the process."""
    sizes = ["--train-docs", "10", "--selection-docs", "10", "--layers", "1", "--protocol", "rapid"]
    task = ["--task", "aft_demo_choice", "--output", str(tmp_path / "v"), "--epochs", "1", *sizes]
    asked, done = asked_of_the_network(tmp_path, "train", "--offline", "--model", "demo", *task)
    assert (asked, done.returncode) == ([], 0), done.stderr[-2000:]
    score = ["--tasks", "aft_demo_choice,aft_demo_math", "--output", str(tmp_path / "r")]
    asked, done = asked_of_the_network(
        tmp_path,
        *("eval", "--offline", "--model", "demo", "--vector", str(tmp_path / "v"), *score),
        *("--", "--limit", "4"),
    )
    assert (asked, done.returncode) == ([], 0), done.stderr[-2000:]
    for unknown in (
        ["train", "--offline", "--model", "no-owner/no-model", "--task", "aft_demo_choice", "--dry-run"],
        ["train", "--offline", "--model", "demo", "--task", "arc_easy", "--dry-run"],
        ["export", "--offline", str(tmp_path / "v"), "--model", "no/model", "--to", "peft", "-o", "x"],
    ):
        asked, done = asked_of_the_network(tmp_path, *unknown)
        assert (asked, done.returncode) == ([], 1), (unknown, done.stderr[-2000:])
        assert "Traceback" not in done.stderr


MARKUP = (
    "\"'><script>alert(1)</script><img src=x onerror=alert(2)><a href='javascript:alert(3)'>$x$ &amp; ${7*7}"
)


class Page(HTMLParser):
    """Tags and attributes of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.inputs: list[dict[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.inputs += [dict(attrs)] if tag == "input" else []
        self.attributes += [(key, value or "") for key, value in attrs]


def test_markup_in_every_field_stays_text(tmp_path: Path) -> None:
    """Questions, answers, targets, few-shot text, names, settings and the vector's own header."""
    import torch

    entry = {"task": MARKUP, "base_model": {"name": MARKUP}, "created": MARKUP, "objective": MARKUP}
    entry |= {"protocol": {"name": MARKUP}, "control": None, "metric": MARKUP, "versions": {MARKUP: MARKUP}}
    vector = SteeringVector({1: torch.ones(8)}, metadata=entry)
    vector.save(tmp_path / "vector")
    args = {"pretrained": MARKUP, "vector": str(tmp_path / "vector"), "revision": MARKUP}
    common: dict[str, Any] = {"question": MARKUP, "target": MARKUP, "doc": {"x": MARKUP}, "fewshot": MARKUP}
    common |= {"top": {"model_name": MARKUP, "system_instruction": MARKUP, "lm_eval_version": MARKUP}}
    logged = steered_by(sha256=vector.digest(), task=MARKUP)
    write_results(tmp_path / "r" / "baseline", {"toy": [0, 1, 0]}, **common, config={"model_args": args})
    for name in ("v<script>alert(1)</script>$x^$", "w"):
        write_results(
            tmp_path / "r" / "steered" / name.replace("/", "-"),
            {"toy": [1, 1, 0]}, **common, vector=logged, config={"model_args": args},
        )  # fmt: skip
    write_report(compare(tmp_path / "r", force=True), tmp_path / "out")
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    assert "alert(1)" in text  # it is shown
    assert not page.tags & {"script", "img", "iframe", "object", "embed", "form", "base", "video"}
    # The page's own: they choose which documents are shown, by CSS alone.
    assert page.inputs
    for each in page.inputs:
        assert each["type"] == "radio"
        assert each.keys() <= {"type", "name", "id", "class", "checked"}
        assert all(re.fullmatch(r"[\w-]*", value or "") for value in each.values()), each
    assert not [key for key, _ in page.attributes if key.startswith("on")]
    targets = [value for key, value in page.attributes if key in ("href", "src", "xlink:href", "action")]
    assert all(value.startswith(("#", "data:,")) for value in targets), targets
    assert "default-src 'none'" in text


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, lm_eval_aft; print(sorted({n.partition('.')[0] for n in sys.modules}))"
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    loaded = set(ast.literal_eval(done.stdout))
    assert "lm_eval_aft" in loaded
    heavy = {"torch", "transformers", "lm_eval", "datasets", "huggingface_hub", "numpy", "click", "scipy"}
    assert not loaded & heavy
