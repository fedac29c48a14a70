"""Ledgers and folders that survive a sudden death."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lm_eval_aft._util.files import JsonLines, replacing_dir


def test_a_ledger_passes_over_a_cut_line_and_drops_it_at_the_next(tmp_path: Path) -> None:
    ledger = JsonLines(tmp_path / "ledger.jsonl")
    assert ledger.read() == []
    ledger.append(event="start", n=1)
    ledger.append(event="cell", name="größer")
    with ledger.path.open("ab") as stream:
        stream.write('{"event": "cell", "name": "grö'.encode()[:-1])  # cut within a letter
    before = ledger.path.read_bytes()
    assert [line["event"] for line in ledger.read()] == ["start", "cell"]
    assert ledger.path.read_bytes() == before  # reading changes nothing
    ledger.append(event="end")
    lines = [json.loads(line) for line in ledger.path.read_text(encoding="utf-8").splitlines()]
    assert [line["event"] for line in lines] == ["start", "cell", "end"]
    assert lines == ledger.read()


def test_a_ledger_whose_only_line_was_cut_begins_anew(tmp_path: Path) -> None:
    ledger = JsonLines(tmp_path / "ledger.jsonl")
    ledger.path.write_text('{"event": "sta')
    ledger.append(event="start")
    assert ledger.path.read_text() == '{"event": "start"}\n'


def test_a_ledger_is_replaced_whole(tmp_path: Path) -> None:
    ledger = JsonLines(tmp_path / "ledger.jsonl")
    ledger.append(n=1)
    ledger.write({"n": n} for n in (2, 3))
    assert ledger.read() == [{"n": 2}, {"n": 3}]
    with pytest.raises(ZeroDivisionError):
        ledger.write({"n": 1 // n} for n in (1, 0))
    assert ledger.read() == [{"n": 2}, {"n": 3}]
    assert list(tmp_path.iterdir()) == [ledger.path]


def test_a_folder_is_replaced_when_the_new_one_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "scores" / "task"
    with replacing_dir(target) as folder:
        (folder / "old").touch()
    (tmp_path / "scores/.task.begun").mkdir()
    (tmp_path / "scores/.task.begun/of a killed process").touch()
    with pytest.raises(FileNotFoundError), replacing_dir(target) as folder:
        (folder / "of a killed process").unlink()
    assert [each.name for each in target.iterdir()] == ["old"]
    with replacing_dir(target) as folder:
        (folder / "new").touch()
    assert [each.name for each in target.iterdir()] == ["new"]
    assert [each.name for each in target.parent.iterdir()] == ["task"]
