"""docs/families.md and docs/tasks.md say what the trials find, and every trial agrees with stock."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from lm_eval_aft.lm import AFTLM
from tests.support import tables
from tests.support.subjects import SUBJECTS, tried
from tests.support.task_data import STOCK
from tests.support.task_trial import CASES, byte_model, tried_task

# One for each way through the code; a wider sample with the slow tests, the rest with the full ones.
FAMILIES_OFTEN = (
    *("gpt_neox", "llama", "bloom", "mamba", "mixtral", "gemma3", "llava", "bert", "t5", "openai-gpt"),
    *("llama in bfloat16", "llama under a LoRA adapter (peft=)", "llama, two blocks on disk"),
)
FAMILIES_SLOW = (
    *("gemma2", "opt-post", "gptj", "falcon-rope", "mpt", "phi3-window", "llama-dynamic-rope", "gpt_oss"),
    *(
        "deepseek_v3",
        "llama4_text",
        "rwkv",
        "jamba",
        "recurrent_gemma",
        "qwen3_next",
        "zamba2",
        "fuyu",
        "xlm",
    ),
    *("llama with flex attention", "llama in int8 (torchao)", "llama, embedding and blocks on disk"),
    "llava as a model object",
)
TASKS_OFTEN = (
    *("winogrande", "copa", "nq_open", "webqs", "letters as options", "several right options"),
    *(
        "custom_dataset, a function",
        "chat, examples as turns (choice)",
        "one split only",
        "no split to score on",
    ),
)
TASKS_SLOW = (
    *(
        "hellaswag",
        "mutual",
        "paws_en",
        "medqa_4options",
        "record",
        "coqa",
        "drop",
        "boolq-seq2seq",
        "fld_default",
    ),
    *("hendrycks_math_algebra", "truthfulqa-multi_mc2_en", "wikitext", "aime", "a group", "a tag"),
    *("contexts as options (winogrande's way)", "acc_mutual_info", "chat with gen_prefix"),
    "loglikelihood with a training split",
)


def tiers(names: Any, often: tuple[str, ...], slow: tuple[str, ...]) -> list[Any]:
    assert {*often, *slow} <= {*names}
    mark = {name: [] for name in often} | {name: [pytest.mark.slow] for name in slow}
    return [pytest.param(name, marks=mark.get(name, [pytest.mark.full])) for name in names]


@pytest.mark.parametrize("name", tiers(SUBJECTS, FAMILIES_OFTEN, FAMILIES_SLOW))
def test_families(name: str, tmp_path: Path) -> None:
    if "torchao" in name:
        pytest.importorskip("torchao")
    row = tried(name, tmp_path)
    page = tables.FAMILIES.read_text().splitlines()
    if f"- {name}" in page:
        pytest.skip("right, but not in the table yet: run scripts/support_tables.py families")
    assert tables.family_line(row) in page
    said = [line for line in page if line.startswith(f"- **{name}**,")]
    assert tables.family_reasons(row) == said


@pytest.fixture(scope="module")
def byte_lm() -> AFTLM:
    return byte_model()


@pytest.mark.parametrize("case", tiers(CASES, TASKS_OFTEN, TASKS_SLOW))
def test_tasks(case: str, tmp_path: Path, byte_lm: AFTLM) -> None:
    row = tried_task(case, tmp_path, byte_lm)
    page = tables.TASKS.read_text().splitlines()
    if f"- {case}" in page:
        pytest.skip("right, but not in the table yet: run scripts/support_tables.py tasks")
    said = [line for line in page if line.startswith(f"- **{case}**:")]
    missing = re.search(r"No module named '([\w.]+)'", " ".join(said))
    if missing and find_spec(missing[1]) is not None:
        # The page is of the newest releases; an older one still has what the task's code imports.
        assert " | passed | " in tables.task_line(row)
        return
    assert tables.task_line(row) in page
    assert tables.task_reasons(row) == said


@pytest.mark.parametrize(("page", "names"), [(tables.FAMILIES, SUBJECTS), (tables.TASKS, CASES)])
def test_pages_have_a_line_for_everything(page: Path, names: Any) -> None:
    text = page.read_text().splitlines()
    lines = [line.split(" | ")[0].removeprefix("| ") for line in text if line.startswith("| ")]
    listed = [line.removeprefix("- ") for line in text if line.startswith("- ")]
    untried = {name for name in listed if name in {*names}}
    assert [line for line in lines if line in {*names}] == [name for name in names if name not in untried]


def test_there_are_as_many_as_promised() -> None:
    assert sum(kind == "dense" for kind, _ in SUBJECTS.values()) >= 25
    assert len(STOCK) >= 40
