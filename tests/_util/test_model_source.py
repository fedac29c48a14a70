"""Names, folders and GGUF files as base models."""

from __future__ import annotations

from pathlib import Path

import pytest

from lm_eval_aft import AFTError
from lm_eval_aft._util.model_source import model_source
from tests.conftest import tiny_tokenizer


def test_a_file_becomes_its_folder_and_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a b, c.Q4_K_M.gguf"
    file.write_bytes(b"GGUF")
    given = {"dtype": "bfloat16"}
    wanted = (str(tmp_path), {"dtype": "bfloat16", "gguf_file": file.name})
    assert model_source(str(file), given) == wanted
    assert given == {"dtype": "bfloat16"}
    assert model_source(*wanted) == wanted
    monkeypatch.chdir(tmp_path)
    assert model_source(file.name, {}) == (".", {"gguf_file": file.name})


def test_other_models_stay_as_they_are(tmp_path: Path) -> None:
    for pretrained in ("owner/name", "demo", str(tmp_path), object(), None):
        assert model_source(pretrained, {"peft": "a"}) == (pretrained, {"peft": "a"})
    (tmp_path / "x.gguf").mkdir()  # a folder of that name
    assert model_source(str(tmp_path / "x.gguf"), {}) == (str(tmp_path / "x.gguf"), {})


def test_a_tokenizer_beside_the_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    tiny_tokenizer().save_pretrained(tmp_path)
    found = {"gguf_file": "m.gguf", "tokenizer": str(tmp_path)}
    assert model_source(str(tmp_path / "m.gguf"), {}) == (str(tmp_path), found)
    assert model_source(str(tmp_path), {"gguf_file": "m.gguf"}) == (str(tmp_path), found)
    assert model_source(str(tmp_path / "m.gguf"), {"tokenizer": "t"})[1]["tokenizer"] == "t"


def test_what_cannot_be_meant(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    (tmp_path / "m-00001-of-00002.gguf").write_bytes(b"GGUF")
    with pytest.raises(AFTError, match="holds no model but GGUF files.\nGive one of them: .*00002.gguf"):
        model_source(str(tmp_path), {})
    with pytest.raises(AFTError, match="pretrained=owner/name,gguf_file=q4.gguf"):
        model_source("owner/name/q4.gguf", {})
    with pytest.raises(AFTError, match="Two GGUF files are given"):
        model_source(str(tmp_path / "model.gguf"), {"gguf_file": "other.gguf"})
    with pytest.raises(AFTError, match="one part of a split model.*\n.*--merge"):
        model_source(str(tmp_path / "m-00001-of-00002.gguf"), {})
    (tmp_path / "config.json").write_text("{}")
    assert model_source(str(tmp_path), {}) == (str(tmp_path), {})
