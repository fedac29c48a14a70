"""Real installs into throw-away environments: wheel and editable, pip and uv, every way into the harness.

A throw-away environment sees the packages of the running one through a folder of links that leaves out our
own files, so that whatever makes ``--model aft`` work there came from the install under test.
"""

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from lm_eval_aft import __version__

ROOT = Path(__file__).parents[2]
OURS = ("lm_eval_aft", "_lm_eval_aft")
WAYS = ("lm_eval", "lm-eval run", "python -m lm_eval", "accelerate launch", "torchrun", "simple_evaluate")
TASK = "aft_install_check"

pytestmark = pytest.mark.timeout(900)


def _run(
    *command: str | Path, cwd: Path, timeout: int = 600, **variables: str
) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))}
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**inherited, **variables},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def _checked(*command: str | Path, cwd: Path, **variables: str) -> str:
    run = _run(*command, cwd=cwd, **variables)
    assert run.returncode == 0, f"{command}\n{run.stdout[-2000:]}\n{run.stderr[-4000:]}"
    return run.stdout


@pytest.fixture(scope="module")
def farm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Links to everything installed here except this project."""
    # By its name dill, which data sets are fingerprinted by, knows a library's modules from a user's.
    folder = tmp_path_factory.mktemp("farm") / "site-packages"
    folder.mkdir()
    for site in (Path(p) for p in sys.path if Path(p).name in ("site-packages", "dist-packages")):
        for entry in site.iterdir():
            link = folder / entry.name
            if not entry.name.startswith(OURS) and entry.name != "__pycache__" and not link.exists():
                link.symlink_to(entry)
    assert (folder / "lm_eval").is_dir()
    return folder


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the source distribution as an index would serve it."""
    folder = tmp_path_factory.mktemp("dist")
    _checked(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    assert len(list(folder.glob("*.tar.gz"))) == 1
    (built,) = folder.glob("*.whl")
    return built


class Environment:
    """A throw-away virtual environment."""

    def __init__(self, folder: Path, farm: Path | None) -> None:
        venv.create(folder, with_pip=False)
        self.folder = folder
        self.bin = folder / ("Scripts" if os.name == "nt" else "bin")
        self.python = self.bin / "python"
        (self.site,) = folder.glob("lib/*/site-packages")
        (self.site / "keep").touch()  # pip removes a site-packages folder that it has emptied
        if farm is not None:
            (self.site / "farm.pth").write_text(f"{farm}\n")
            for script in entry_points(group="console_scripts"):
                if script.name in ("lm_eval", "lm-eval", "accelerate", "torchrun"):
                    path = self.bin / script.name
                    path.write_text(
                        f"#!{self.python}\nimport sys\nfrom {script.module} import {script.attr}\n"
                        f"sys.exit({script.attr}())\n"
                    )
                    path.chmod(0o755)

    def files(self) -> set[str]:
        return {
            str(path.relative_to(self.folder))
            for root, folders, names in os.walk(self.folder)
            for path in (Path(root, name) for name in folders + names)
            if path.name != ".lock"  # uv's own
        }

    def install(self, what: Path, *, installer: str = "pip") -> None:
        offline = ["--no-deps", "--no-build-isolation", *(["-e"] if what == ROOT else []), str(what)]
        self._package_tool(installer, "install", *offline)

    def uninstall(self, *, installer: str = "pip") -> None:
        yes = ["--yes"] if installer == "pip" else []
        self._package_tool(installer, "uninstall", *yes, "lm-eval-aft")

    def _package_tool(self, installer: str, verb: str, *arguments: str) -> None:
        if installer == "uv":
            uv = shutil.which("uv") or str(Path(sys.executable).parent / "uv")
            _checked(uv, "pip", verb, "--python", self.python, *arguments, cwd=self.folder)
        else:
            pip = [sys.executable, "-m", "pip", "--python", str(self.python), "--quiet"]
            _checked(*pip, verb, *arguments, cwd=self.folder)

    def code(self, code: str, cwd: Path) -> str:
        """Standard output of code run here; standard error must stay empty."""
        run = _run(self.python, "-c", code, cwd=cwd)
        assert (run.returncode, run.stderr) == (0, "")
        return run.stdout.strip()


Maker = Callable[..., Environment]


@pytest.fixture
def environment(tmp_path: Path, farm: Path) -> Maker:
    def make(*, with_packages: bool = True) -> Environment:
        return Environment(tmp_path / "env", farm if with_packages else None)

    return make


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random model in ``model`` and a four-document task in ``tasks``."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("job")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate([*alphabet, "<end>"])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    end = len(alphabet)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", bos_token="<end>", pad_token="<end>"
    ).save_pretrained(folder / "model")
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=end + 1,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=256,
            bos_token_id=end,
            eos_token_id=end,
            pad_token_id=end,
        )
    ).save_pretrained(folder / "model")

    tasks = folder / "tasks"
    tasks.mkdir()
    documents = [
        {"question": f"{n} + 1 =", "choices": [str(n), str(n + 1), str(n + 2)], "answer": 1} for n in range(4)
    ]
    (tasks / "data.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    task = {
        "task": TASK,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tasks / "data.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    (tasks / f"{TASK}.yaml").write_text(json.dumps(task))  # JSON is YAML
    (folder / "evaluate.py").write_text(
        f"""\
import json, sys
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

if __name__ == "__main__":
    tasks = TaskManager(include_path="tasks", include_defaults=False)
    results = [
        simple_evaluate(model, model_args="pretrained=model,dtype=float32", tasks=[{TASK!r}],
                        task_manager=tasks, batch_size=1, device="cpu")
        for model in ("aft", "hf")
    ]
    scores = [[s["resps"] for s in r["samples"][{TASK!r}]] for r in results]
    assert scores[0] == scores[1], scores
    print(json.dumps(results[0]["results"]))
"""
    )
    return folder


def _evaluate(environment: Environment, way: str, job: Path, output: Path) -> dict[str, float]:
    """The task's results when ``--model aft`` scores it in one of WAYS."""
    variables = {
        "HF_HOME": str(output / "hf"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PATH": f"{environment.bin}{os.pathsep}{os.environ['PATH']}",
    }
    if way == "simple_evaluate":
        printed = _checked(environment.python, job / "evaluate.py", cwd=job, **variables)
        return dict(json.loads(printed.splitlines()[-1])[TASK])
    start = {
        "lm_eval": ["lm_eval"],
        "lm-eval run": ["lm-eval", "run"],
        "python -m lm_eval": ["python", "-m", "lm_eval"],
        "accelerate launch": ["accelerate", "launch", "--cpu", "--num_processes=1", "-m", "lm_eval"],
        "torchrun": ["torchrun", "--standalone", "--nproc_per_node=1", "-m", "lm_eval"],
    }[way]
    flags = {
        "model": "aft",
        "model_args": "pretrained=model,dtype=float32",
        "tasks": TASK,
        "include_path": "tasks",
        "batch_size": "1",
        "device": "cpu",
        "output_path": str(output / "results"),
    }
    arguments = [part for name, value in flags.items() for part in (f"--{name}", value)]
    _checked(environment.bin / start[0], *start[1:], *arguments, cwd=job, **variables)
    (found,) = (output / "results").rglob("results_*.json")
    results = json.loads(found.read_text())
    assert results["config"]["model"] == "aft"
    return dict(results["results"][TASK])


def _source(kind: str, request: pytest.FixtureRequest) -> Path:
    return ROOT if kind == "editable" else request.getfixturevalue("wheel")


LISTED = """
from lm_eval.api.registry import model_registry
import lm_eval.models
print(*(name in model_registry for name in ("hf", "steered", "aft")))
"""


@pytest.mark.slow
def test_wheel_holds_what_it_should(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"lm_eval_aft.pth", "lm_eval_aft.start", "lm_eval_aft/py.typed"} <= names
    roots = {name.split("/")[0] for name in names if not name.split("/")[0].endswith(".dist-info")}
    assert roots == {"lm_eval_aft", "lm_eval_aft.pth", "lm_eval_aft.start"}
    skipped = ("__pycache__", ".pyc")
    for source, target in (("lm_eval_aft", "lm_eval_aft"), ("tasks", "lm_eval_aft/tasks")):
        expected = {
            f"{target}/{path.relative_to(ROOT / source).as_posix()}"
            for path in (ROOT / source).rglob("*")
            if path.is_file() and not any(part in str(path) for part in skipped)
        }
        assert expected
        assert expected <= names


@pytest.mark.slow
def test_a_release_works_outside_the_tree(environment: Maker, wheel: Path, tmp_path: Path) -> None:
    """The wheel that the source distribution makes, in a fresh environment."""
    env = environment()
    env.install(wheel)
    command = [env.bin / "aft"]
    assert __version__ in _checked(*command, "--version", cwd=tmp_path)
    assert "static" in _checked(*command, "methods", cwd=tmp_path)
    tasks = Path(_checked(*command, "tasks-path", cwd=tmp_path).strip())
    assert tasks.is_relative_to(env.site)
    sizes = {name: len((tasks / f"aft_demo/{name}.jsonl").read_text().splitlines()) for name in DATA}
    assert sizes == DATA
    train = [env.bin / "train-vector", *"--model demo --task aft_demo_choice --output v --layers 1".split()]
    sizes_flags = "--train-docs 8 --selection-docs 8 --protocol rapid --epochs 1".split()
    said = _checked(*train, *sizes_flags, cwd=tmp_path, OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    assert "Chose layer 1" in said
    assert (tmp_path / "v/vector.safetensors").is_file()


DATA = {
    f"aft_demo_{kind}_{split}": count
    for kind in ("choice", "math")
    for split, count in (("train", 2600), ("test", 1100))
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_install_and_uninstall(
    kind: str, environment: Maker, job: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    source = _source(kind, request)
    env = environment()
    before = env.files()
    assert env.code(LISTED, cwd=job) == "True True False"

    env.install(source)
    assert env.code(LISTED, cwd=job) == "True True True"
    where = Path(env.code("import lm_eval_aft; print(lm_eval_aft.__file__)", cwd=job))
    assert where.is_relative_to(ROOT if kind == "editable" else env.site)
    own_paths = sorted(path.name for path in env.site.glob("*lm_eval_aft*.pth"))
    assert own_paths == ["_lm_eval_aft.pth", "lm_eval_aft.pth"][0 if kind == "editable" else 1 :]
    way = "lm_eval" if kind == "wheel" else "simple_evaluate"
    assert "acc,none" in _evaluate(env, way, job, tmp_path / "output")

    env.uninstall()
    assert env.files() == before
    assert env.code(LISTED, cwd=job) == "True True False"


@pytest.mark.slow
def test_silent_without_the_harness_and_half_deleted(environment: Maker, wheel: Path, tmp_path: Path) -> None:
    env = environment(with_packages=False)
    before = env.files()
    env.install(wheel)
    hooks = "import sys; print(sum('lm_eval_aft' in type(f).__module__ for f in sys.meta_path))"
    assert env.code(hooks, cwd=tmp_path) == "1"
    assert env.code("import lm_eval_aft; print(lm_eval_aft.__version__)", cwd=tmp_path)
    assert "No module named 'lm_eval'" in _run(env.python, "-c", "import lm_eval", cwd=tmp_path).stderr
    env.uninstall()
    assert env.files() == before

    env.install(wheel)
    (env.site / "lm_eval_aft" / "registration.py").unlink()
    assert env.code(hooks, cwd=tmp_path) == "0"
    shutil.rmtree(env.site / "lm_eval_aft")
    assert env.code(hooks, cwd=tmp_path) == "0"


@pytest.mark.full
@pytest.mark.parametrize("installer", ["pip", "uv"])
@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_every_way_into_the_harness(
    kind: str, installer: str, environment: Maker, job: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if installer == "uv" and not (shutil.which("uv") or (Path(sys.executable).parent / "uv").exists()):
        pytest.skip("uv is not installed")
    env = environment()
    before = env.files()
    env.install(_source(kind, request), installer=installer)
    results = {way: _evaluate(env, way, job, tmp_path / way.replace(" ", "_")) for way in WAYS}
    assert len({result["acc_norm,none"] for result in results.values()}) == 1
    env.uninstall(installer=installer)
    assert env.files() == before
