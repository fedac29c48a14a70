"""The import hook, tried on a fake lm-eval in bare interpreters, and once on the real one."""

import subprocess
import sys
from pathlib import Path

import pytest

import lm_eval_aft
from lm_eval_aft import registration

ROOT = Path(__file__).parents[2]
STARTUP = ROOT / "startup"

# The part of lm-eval's registry that matters: a table filled by `lm_eval.models`, read by `get_model`.
REGISTRY = """
class Registry(dict):
    def register(self, name, target):
        self[name] = target

model_registry = Registry()

def get_model(name):
    if len(model_registry) == 0:
        import lm_eval.models
    return model_registry[name]
"""
MODELS = """
from lm_eval.api.registry import model_registry
if "hf" not in model_registry:
    model_registry.register("hf", target="lm_eval.models.huggingface:HFLM")
"""


@pytest.fixture
def fake(tmp_path: Path) -> Path:
    """A folder holding a fake lm_eval package."""
    package = tmp_path / "fake" / "lm_eval"
    (package / "api").mkdir(parents=True)
    (package / "models").mkdir()
    (package / "__init__.py").touch()
    (package / "api" / "__init__.py").touch()
    (package / "api" / "registry.py").write_text(REGISTRY)
    (package / "models" / "__init__.py").write_text(MODELS)
    return tmp_path / "fake"


def bare(code: str, *path: Path) -> str:
    """Run code in an interpreter that sees the standard library and ``path`` only; stderr must stay empty."""
    prelude = f"import sys; sys.path[:0] = {[str(p) for p in path]!r}\n"
    run = subprocess.run(
        [sys.executable, "-I", "-S", "-c", prelude + code], capture_output=True, text=True, timeout=60
    )
    assert run.stderr == ""
    assert run.returncode == 0
    return run.stdout.strip()


HOOKS = "sum('lm_eval_aft' in type(f).__module__ for f in sys.meta_path)"


def test_registers_when_the_table_is_filled_and_goes_away(fake: Path) -> None:
    code = f"""
import lm_eval_aft
assert {HOOKS} == 1
from lm_eval.api.registry import get_model, model_registry
assert not model_registry  # a filled table would keep lm_eval.models from being imported
print(get_model("hf"), get_model("aft"), {HOOKS})
"""
    assert bare(code, ROOT, fake) == f"lm_eval.models.huggingface:HFLM {registration.TARGET} 0"


def test_the_hooked_module_looks_ordinary(fake: Path) -> None:
    code = """
import lm_eval_aft, inspect
import lm_eval.models as m
print(type(m.__spec__.loader).__name__, sorted(vars(m.__spec__.loader)), "hf" in inspect.getsource(m))
"""
    assert bare(code, ROOT, fake) == "SourceFileLoader ['name', 'path'] True"


def test_registers_at_once_when_the_harness_is_already_imported(fake: Path) -> None:
    code = f"""
import lm_eval.models
import lm_eval_aft
from lm_eval.api.registry import model_registry
print(model_registry["aft"], {HOOKS})
"""
    assert bare(code, ROOT, fake) == f"{registration.TARGET} 0"


def test_keeps_an_existing_entry(fake: Path) -> None:
    models = fake / "lm_eval" / "models" / "__init__.py"
    models.write_text(MODELS + "model_registry.register('aft', target='other:Model')\n")
    code = """
import lm_eval_aft, lm_eval.models
from lm_eval.api.registry import get_model
print(get_model("aft"))
"""
    assert bare(code, ROOT, fake) == "other:Model"


def test_one_hook_however_often_installed(fake: Path) -> None:
    code = f"""
import importlib
from lm_eval_aft import registration
registration.install()
importlib.reload(registration).install()
print({HOOKS})
import lm_eval.models
registration.install()
print({HOOKS})
"""
    assert bare(code, ROOT, fake).split() == ["1", "0"]


def test_looking_for_the_module_does_not_use_up_the_hook(fake: Path) -> None:
    code = """
import lm_eval_aft, importlib.util
assert importlib.util.find_spec("lm_eval.models") is not None
from lm_eval.api.registry import get_model
get_model("hf")
print(get_model("aft"))
"""
    assert bare(code, ROOT, fake) == registration.TARGET


def test_a_failing_import_fails_as_without_us_and_may_be_repeated(fake: Path) -> None:
    models = fake / "lm_eval" / "models" / "__init__.py"
    models.write_text("import sys\nif not hasattr(sys, 'fixed'): raise OSError('torn')\n" + MODELS)
    code = """
import lm_eval_aft
try:
    import lm_eval.models
except OSError as error:
    print(error)
sys.fixed = True
import lm_eval.models
from lm_eval.api.registry import get_model
print(get_model("aft"))
"""
    assert bare(code, ROOT, fake).split() == ["torn", registration.TARGET]


@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_lives_beside_another_hook_of_the_same_kind(fake: Path, first: str) -> None:
    steps = ["import lm_eval_aft", "sys.meta_path.insert(0, Other())"]
    code = """
import importlib.util
class Other:
    def find_spec(self, name, path=None, target=None):
        if name != "lm_eval.models":
            return None
        for finder in sys.meta_path:
            if finder is not self:
                spec = finder.find_spec(name, path, target)
                if spec is not None:
                    print("asked")
                    return spec
""" + "\n".join(steps if first == "ours" else reversed(steps))
    code += """
from lm_eval.api.registry import get_model
get_model("hf")
print(get_model("aft"))
"""
    *asked, entry = bare(code, ROOT, fake).split()
    assert entry == registration.TARGET
    assert len(asked) == (
        2 if first == "ours" else 1
    )  # the last to come is asked first; no endless mutual asking


@pytest.mark.parametrize(
    "registry",
    [
        "",
        "model_registry = {}",
        "model_registry = None",
        "class R(dict): register = None\nmodel_registry = R()",
    ],
    ids=["absent", "a dict", "none", "not callable"],
)
def test_silent_with_a_registry_of_another_make(fake: Path, registry: str) -> None:
    (fake / "lm_eval" / "api" / "registry.py").write_text(registry)
    (fake / "lm_eval" / "models" / "__init__.py").write_text("import lm_eval.api.registry\n")
    assert bare("import lm_eval_aft, lm_eval.models; print('fine')", ROOT, fake) == "fine"


def test_silent_without_the_harness() -> None:
    code = f"""
import lm_eval_aft
try:
    import lm_eval.models
except ModuleNotFoundError as error:
    print(error.name, {HOOKS})
"""
    assert bare(code, ROOT) == "lm_eval 1"


def _site(tmp_path: Path, package: dict[str, str] | None) -> Path:
    site = tmp_path / "site"
    site.mkdir()
    (site / "lm_eval_aft.pth").write_bytes((STARTUP / "lm_eval_aft.pth").read_bytes())
    for name, text in (package or {}).items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text(text)
    return site


def test_start_up_file_installs_the_hook(tmp_path: Path, fake: Path) -> None:
    site = _site(tmp_path, None)
    code = f"import site; site.addsitedir({str(site)!r}); print({HOOKS})"
    assert bare(code, ROOT, fake) == "1"


@pytest.mark.parametrize(
    "package",
    [
        None,
        {"lm_eval_aft/steering/vector.py": ""},
        {"lm_eval_aft/__init__.py": ""},
        {"lm_eval_aft/__init__.py": "from lm_eval_aft import registration"},
        {"lm_eval_aft/__init__.py": "def ("},
        {"lm_eval_aft/__init__.py": "", "lm_eval_aft/registration.py": ""},
        {"lm_eval_aft/__init__.py": "raise RuntimeError"},
    ],
    ids=["gone", "namespace", "no registration", "torn", "syntax", "emptied", "raises"],
)
def test_start_up_file_is_silent_when_the_package_is_half_deleted(
    tmp_path: Path, package: dict[str, str] | None
) -> None:
    site = _site(tmp_path, package)
    assert bare(f"import site; site.addsitedir({str(site)!r}); print('fine')") == "fine"


def test_start_up_files_say_the_same() -> None:
    """Python 3.15 and later resolves and calls each line of the .start file (PEP 829)."""
    line, rest = (STARTUP / "lm_eval_aft.start").read_text().split("\n", 1)
    assert rest == ""
    code = f"import pkgutil; pkgutil.resolve_name({line!r})(); print({HOOKS})"
    assert bare(code, ROOT) == "1"
    pth = (STARTUP / "lm_eval_aft.pth").read_text()
    assert pth.startswith("import ")
    assert pth.count("\n") == 1


def test_import_is_light() -> None:
    code = "old = set(sys.modules); import lm_eval_aft; print(*sorted(set(sys.modules) - old))"
    assert bare(code, ROOT).split() == ["lm_eval_aft", "lm_eval_aft.registration"]


def test_public_names() -> None:
    assert set(lm_eval_aft.__all__) - {"__version__"} == set(lm_eval_aft._HOMES)
    assert set(lm_eval_aft.__all__) <= set(dir(lm_eval_aft))
    for name in lm_eval_aft.__all__:
        assert getattr(lm_eval_aft, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        _ = lm_eval_aft.no_such_name


def test_real_harness_lists_both_models_in_a_new_interpreter() -> None:
    code = """
import lm_eval_aft
from lm_eval.api.registry import model_registry
import lm_eval.models
print(*(name in model_registry for name in ("hf", "steered", "aft")))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert run.stdout.split() == ["True", "True", "True"], run.stderr


def test_real_harness_resolves_both_models() -> None:
    from lm_eval.api.registry import get_model
    from lm_eval.models.huggingface import HFLM

    assert get_model("hf") is HFLM
    steered = get_model(registration.MODEL_NAME)
    assert issubclass(steered, HFLM)
    assert f"{steered.__module__}:{steered.__name__}" == registration.TARGET
