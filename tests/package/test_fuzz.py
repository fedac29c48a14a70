"""Damaged and hostile input of every kind: one plain message, or the right numbers; never anything else."""

from __future__ import annotations

import json
import logging
import math
import random
import re
import shutil
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from click.testing import CliRunner

from lm_eval_aft import AFTError, SteeringVector
from lm_eval_aft.cli.main import aft
from lm_eval_aft.cli.options import parse_model_args
from lm_eval_aft.evaluation.render import write_report
from lm_eval_aft.evaluation.report import compare
from lm_eval_aft.harness.model_args import ARGUMENTS, read_model_args
from lm_eval_aft.library.routers import make_router, parse_keyword_table, parse_task_table
from lm_eval_aft.library.store import Library
from lm_eval_aft.studies.config import read_bench_study, read_library_study
from lm_eval_aft.studies.jobs import build_cells
from tests.result_folders import steered_by, write_results
from tests.support.scripts import load_script

ROOT = Path(__file__).parents[2]


vectors = load_script("fuzz_vectors")


def sizes(few: int, some: int, many: int) -> Any:
    return pytest.mark.parametrize(
        "mutations",
        [few, pytest.param(some, marks=pytest.mark.slow), pytest.param(many, marks=pytest.mark.full)],
    )


@sizes(500, 10_000, 100_000)
@pytest.mark.timeout(3600)
def test_vector_files(mutations: int, tmp_path: Path) -> None:
    count = vectors.fuzz(mutations, seed=mutations, folder=tmp_path)
    assert not count.failures, count.failures[:5]
    assert sum(count.outcomes.values()) == mutations
    assert count.outcomes["loaded"] > mutations / 50
    assert count.outcomes["refused"] > mutations / 2


@pytest.mark.parametrize(
    ("entry", "word"),
    [
        ({"base_model": "demo"}, "'base_model' is a str"),
        ({"fingerprint": [1]}, "'fingerprint' is a list"),
        ({"splits": {"selection_documents": 0.5}}, "'splits.selection_documents' is a float"),
        ({"selection": {"layers": [1]}}, "'selection.layers' is a list"),
        ({"num_hidden_layers": True}, "'num_hidden_layers' is a bool"),
        ({"selection": {"score": float("nan")}}, "NaN"),
        ({"task": "\ud800"}, "surrogates"),
        ({"coefficient": 10**400}, "too large"),
        ({"deep": "[" * 10_000}, "nested too deeply"),
    ],
)
def test_wrong_headers_are_refused_by_both_readers(entry: dict[str, Any], word: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from lm_eval_aft.steering.vector_file import read_header

    whole = SteeringVector.load(_vector(tmp_path / "v"))
    text = json.dumps({"method": "static", "layers": [1, 3], "hidden_size": 8, **vectors.METADATA, **entry})
    text = text.replace('"' + "[" * 10_000 + '"', "[" * 10_000 + "]" * 10_000)
    save_file(whole.tensors, tmp_path / "w.safetensors", metadata={"format": "aft/1", "aft": text})
    with pytest.raises(AFTError, match=word):
        SteeringVector.load(tmp_path / "w.safetensors")
    with pytest.raises(AFTError, match=word):
        read_header(tmp_path / "w.safetensors")


def _vector(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vector.safetensors").write_bytes(vectors.originals()[0])
    return folder


@sizes(60, 500, 10_000)
@pytest.mark.timeout(3600)
def test_headers_that_load_can_be_used(mutations: int, tmp_path: Path) -> None:
    """Whatever parts of the header are changed: listing, showing, adding up, cards and reports cope."""
    from lm_eval_aft.library.load import load_vector
    from lm_eval_aft.training.artifacts import write_card

    rng, outcomes = random.Random(mutations), Counter[str]()
    shelf = Library(tmp_path / "library")
    shelf.add(_vector(tmp_path / "whole"), "a/whole")
    place = shelf.path("a/whole").with_name("changed")
    place.mkdir()
    for _ in range(mutations):
        (place / "vector.safetensors").write_bytes(vectors._json(vectors.originals()[0], [], rng))
        try:
            vector = SteeringVector.load(place)
        except AFTError:
            outcomes["refused"] += 1
            assert shelf.entry("a/changed").error or True  # a listing tells it, and goes on
            continue
        outcomes["loaded"] += 1
        assert [entry.name for entry in shelf.entries()] == ["a/changed", "a/whole"]

        def card() -> None:
            both = load_vector('"a/whole"*0.5 + "a/changed"', shelf)
            write_card(tmp_path / "card", both)

        show = ["vectors", "show", "--library", str(shelf.root), "a/changed"]
        for use in (
            lambda show=show: CliRunner().invoke(aft, show, catch_exceptions=False),
            card,
            lambda: make_router("task", shelf.entries()),
            lambda vector=vector: _report_of(vector, place, tmp_path / "runs"),
        ):
            try:
                use()
            except AFTError:
                outcomes["use refused"] += 1
    assert outcomes["loaded"] > mutations / 10
    assert outcomes["refused"] > mutations / 20


def _report_of(vector: SteeringVector, place: Path, folder: Path) -> None:
    model_args = {"pretrained": "some/model", "vector": str(place)}
    write_results(folder / "baseline", {"toy": [0, 1, 1, 0]})
    logged = steered_by(sha256=vector.digest(), coefficient=vector.coefficient)
    write_results(
        folder / "steered" / "v", {"toy": [1, 1, 1, 0]}, vector=logged, config={"model_args": model_args}
    )
    write_report(compare(folder), folder / "report")


def _results(folder: Path) -> None:
    rng = random.Random(0)
    outcomes = {"toy": [rng.randrange(2) for _ in range(12)], "other": [rng.randrange(2) for _ in range(8)]}
    better = {task: [1 if rng.random() < 0.5 else v for v in values] for task, values in outcomes.items()}
    write_results(folder / "baseline", outcomes)
    write_results(folder / "steered" / "v", better, vector=steered_by())


@sizes(40, 700, 10_000)
@pytest.mark.timeout(3600)
def test_result_folders(mutations: int, tmp_path: Path) -> None:
    rng, outcomes = random.Random(mutations), Counter[str]()
    _results(tmp_path / "whole")
    files = [p.relative_to(tmp_path / "whole") for p in (tmp_path / "whole").rglob("*.json*")]
    for number in range(mutations):
        folder = tmp_path / "damaged"
        shutil.copytree(tmp_path / "whole", folder)
        for _ in range(rng.choice((1, 1, 2))):
            _damage(folder, rng.choice(files), rng)
        began = time.monotonic()
        try:
            found = compare(folder)
            write_report(found, tmp_path / "report")
        except AFTError:
            outcomes["refused"] += 1
        else:
            outcomes["compared"] += 1
            for row in found.rows:
                for run, score in (("baseline", row.baseline), (row.run, row.steered)):
                    assert score == pytest.approx(_mean(folder, run, row)), (number, row)
        assert time.monotonic() - began < 20
        shutil.rmtree(folder)
    assert outcomes["compared"] > mutations / 50
    assert outcomes["refused"] > mutations / 5
    assert {each.name for each in tmp_path.iterdir()} <= {"whole", "report"}


def _damage(folder: Path, name: Path, rng: random.Random) -> None:
    path = folder / name
    if not path.exists():
        return
    raw = path.read_bytes()
    lines = raw.splitlines(keepends=True)
    at = rng.randrange(max(1, len(lines)))
    what = rng.randrange(8)
    if what == 0:
        path.unlink()
    elif what == 1:
        path.write_bytes(raw[: rng.randrange(len(raw) + 1)])
    elif what == 2:
        del lines[at : at + rng.choice((1, 1, 5))]
        path.write_bytes(b"".join(lines))
    elif what == 3:
        path.write_bytes(b"".join([*lines, lines[at]] if lines else []))
    elif what == 4 and raw:
        place = rng.randrange(len(raw))
        path.write_bytes(raw[:place] + bytes([rng.randrange(256)]) + raw[place + 1 :])
    elif lines:
        text = raw if name.suffix == ".json" else lines[at]
        try:
            value = json.loads(text)
        except ValueError:
            return
        if isinstance(value, dict):
            vectors._change(value, rng)
        changed = json.dumps(value).encode()
        path.write_bytes(changed if name.suffix == ".json" else raw.replace(lines[at], changed + b"\n"))


def _mean(folder: Path, run: str, row: Any) -> float:
    (path,) = (folder / run).rglob(f"samples_{row.task}_*.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    given = [line[row.metric] for line in lines if line["filter"] == row.filter]
    # A document's score may be a list: of its repeats.
    values = [statistics.fmean(each) if isinstance(each, list) else float(each) for each in given]
    return math.fsum(values) / len(values)


TABLES = (
    "rules:\n- vector: math/a\n  words: [solve, '+']\n- vector: none\n  words: [why]\nelse: logic/all\n",
    "tasks: {gsm8k: math/algebra, 'arc*': logic/all}\nelse: none\n",
)
STUDY = (
    "model: demo\ndefaults: {protocol: rapid, train_docs: 50}\nvectors:\n  math/w: gsm8k\n"
    "  logic/a: {task: arc_challenge, seeds: 3, limit: 20}\nscores: {limit: 200}\nunavailable: {a/b: data}\n"
)


BENCH = (
    "study: s\nmodels: [demo, {name: m, pretrained: gpt2, dtype: float32}]\ntasks: [aft_demo_choice, "
    "{task: aft_demo_math, limit: 16}]\nmethods: [static, {name: p, control: random}]\nseeds: 2\n"
    "recipe: {protocol: rapid, layers: '25%', train_docs: 16, lr: 0.01}\n"
    "evaluation: {limit: 32, batch_size: 16}\n"
    "prune: true\nearlier: rapid\n"
)


@sizes(300, 3000, 50_000)
@pytest.mark.timeout(3600)
def test_tables_and_studies(mutations: int, tmp_path: Path) -> None:
    rng, outcomes = random.Random(mutations), Counter[str]()
    for _ in range(mutations):
        text = rng.choice((*TABLES, STUDY, BENCH))
        raw = _yaml_damage(text, rng)
        try:
            if text == STUDY:
                (tmp_path / "study.yaml").write_bytes(raw)
                study = read_library_study(tmp_path / "study.yaml")
                for entry in study.entries:
                    entry.plan()
            elif text == BENCH:
                (tmp_path / "study.yaml").write_bytes(raw)
                build_cells(read_bench_study(tmp_path / "study.yaml"))
            elif text == TABLES[0]:
                parse_keyword_table(raw.decode(errors="replace")).route("solve this")
            else:
                parse_task_table(raw.decode(errors="replace"))
            outcomes["read"] += 1
        except AFTError:
            outcomes["refused"] += 1
    assert min(outcomes["read"], outcomes["refused"]) > mutations / 20
    assert {each.name for each in tmp_path.iterdir()} <= {"study.yaml"}


def _yaml_damage(text: str, rng: random.Random) -> bytes:
    if rng.random() < 0.5:
        value = yaml.safe_load(text)
        vectors._change(value, rng)
        return yaml.safe_dump(value, allow_unicode=True).encode(errors="replace")
    raw = text.encode()
    for _ in range(rng.choice((1, 2, 5))):
        at = rng.randrange(len(raw) + 1)
        piece = rng.choice(
            (b"", b"!!python/object:os.system ", b"&a ", b"*a", b"{", b"[", b":", b"\0", b"\xff", b"- ")
        )
        raw = raw[:at] + piece + raw[at + rng.choice((0, 0, 1, 6)) :]
    return raw


WORDS = (
    *(
        "",
        " ",
        "demo",
        "no/such",
        "../../x",
        "/proc/1/mem",
        "-1",
        "0",
        "1e999",
        "nan",
        "99999999999999999999",
    ),
    *(
        "math/a*",
        "a*b",
        "(((",
        "'",
        '"',
        "é",
        "a,b",
        "1:2:3",
        "none:",
        "random:",
        "random:x",
        "x" * 5000,
    ),
    *("--", "-", "--help", "25%-75%:2", "1-", "constant:", "keyword:/dev/null", "task:", "a=b", "=,=", "[]"),
)


@sizes(40, 300, 3000)
@pytest.mark.timeout(3600)
def test_command_lines(mutations: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arguments at random for every command; models and data that would cost time are not among them."""
    inside = tmp_path / "inside"
    inside.mkdir()
    monkeypatch.chdir(inside)
    monkeypatch.setenv("AFT_LIBRARY", str(inside / "library"))
    rng, codes = random.Random(mutations), Counter[int]()
    commands = _commands(aft, [])
    for _ in range(mutations):
        path, command = rng.choice(commands)
        arguments = [*path]
        for parameter in command.params:
            if not (parameter.required or rng.random() < 0.25):
                continue
            word = rng.choice(WORDS)
            if isinstance(parameter, click.Option):
                flag = rng.choice(parameter.opts)
                arguments += [flag] if parameter.is_flag else [flag, word]
            else:
                arguments.append(word)
        if path == ["train"]:
            arguments.append("--dry-run")
        result = CliRunner().invoke(aft, arguments)
        told = (arguments, result.output[-1500:])
        assert result.exception is None or isinstance(result.exception, SystemExit), (told, result.exception)
        assert "Traceback" not in result.output, told
        codes[result.exit_code] += 1
    assert set(codes) <= {0, 1, 2}
    assert codes[1] + codes[2] > mutations / 2
    assert [each.name for each in tmp_path.iterdir()] == ["inside"]


MODEL_ARGS = (
    "vector=math/a*0.5,coefficient=-2.5,fast=no,answer_only=yes,allow_mismatch=off,library=shelf",
    "route=keyword:words.yaml,positions=all,blocks=model.layers,device=cpu,dtype=float32",
    "revision=main,trust_remote_code=true,max_length=128,batch_size=8,add_bos_token=False,peft=adapter",
    "softmax_dtype=float32,truncation=on,prefix_token_id=2,parallelize=0,gguf_file=m.gguf,logits_cache=1",
    "attn_implementation=eager,low_cpu_mem_usage=true,enable_thinking=None,rope_theta=1e6,max_batch_size=4",
)
VALUES = (
    *("yes", "NO", "oN", "0", "1", "2", "-1", "007", "1e3", "1e999", "nan", "true", "False", "None", "", " "),
    *("1_000", "²", "٣", "0x10", "'no'", '"1"', "'", "maybe", "[1]", "{}", "a=b", "é", "\0", "x" * 3000),
)
SWITCHES = {"yes": True, "on": True, "true": True, "1": True, "no": False, "off": False, "false": False}
SWITCHES["0"] = False


@sizes(500, 10_000, 100_000)
@pytest.mark.timeout(3600)
def test_model_arguments(mutations: int) -> None:
    """Refused in one message, or every value is what was written; as lm-eval hands them over, or as we do."""
    from lm_eval.utils import simple_parse_args_string

    rng, outcomes, longest = random.Random(mutations), Counter[str](), 0
    for _ in range(mutations):
        text = _argument_damage(rng.choice(MODEL_ARGS), rng)
        try:
            theirs = read_model_args(simple_parse_args_string(text))
        except AFTError:
            theirs = None
        except ValueError:  # lm-eval's own parser
            theirs = None
        try:
            found = parse_model_args(text)
        except AFTError as error:
            outcomes["refused"] += 1
            longest = max(longest, len(error.message))
            continue
        outcomes["read"] += 1
        given = {part.partition("=")[0]: part.partition("=")[2].strip() for part in text.strip().split(",")}
        assert found.keys() == given.keys(), text
        for name, value in found.items():
            written = given[name]
            quoted = len(written) > 1 and written[0] == written[-1] and written[0] in "'\""
            bare = written[1:-1] if quoted else written
            reader = ARGUMENTS[name].read.__name__ if name in ARGUMENTS else "as_given"
            if value is None:
                assert bare.lower() in ("none", ""), (text, name)
                assert reader != "switch", (text, name)
            elif reader in ("switch", "optional_switch"):
                assert value is SWITCHES[bare.strip().lower()], (text, name)
            elif reader == "number":
                assert math.isfinite(value), (text, name)
                assert value == float(bare), (text, name)
            elif reader == "whole":
                assert type(value) is int, (text, name)
                assert value == int(bare), (text, name)
            elif reader == "text":
                assert value == bare, (text, name)
        if theirs is not None:
            assert {k: str(v) for k, v in theirs.items() if type(found[k]) is not str} == {
                k: str(v) for k, v in found.items() if type(v) is not str
            }, text
    assert min(outcomes["read"], outcomes["refused"]) > mutations / 20, outcomes
    assert longest < 1200


SPECS = (
    "x_one",
    "x_two,x_three",
    "x_*",
    "x_group",
    "x_tag",
    "tasks/one.yaml",
    "tasks/*.yaml",
    "tasks",
    "x_t?o",
)


@pytest.fixture
def own_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Path:
    """Three tasks, a group and a tag below the working directory; the harness's own are not indexed."""
    from lm_eval.tasks import TaskManager

    from lm_eval_aft.harness import tasks as module

    folder = tmp_path / "work" / "tasks"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder.parent)
    for name, more in (("one", ""), ("two", "tag: x_tag"), ("three", "tag: [x_tag, x_other]")):
        (folder / f"{name}.yaml").write_text(
            f"task: x_{name}\noutput_type: multiple_choice\ntest_split: test\ndataset_path: json\n"
            f"doc_to_text: q\ndoc_to_target: 0\ndoc_to_choice: [a, b]\n{more}\n"
        )
    (folder / "group.yaml").write_text("group: x_group\ntask: [x_one, x_two]\n")
    (folder / "notes.yaml").write_text("just: notes\n")

    def small(include_path: Any = (), metadata: Any = None, **_: Any) -> TaskManager:
        paths = [
            str(folder),
            *map(str, [include_path] if isinstance(include_path, str) else include_path or ()),
        ]
        return TaskManager(include_path=paths, include_defaults=False, metadata=metadata)

    caplog.set_level(logging.ERROR, "lm_eval")  # it tells of each task that is found twice
    monkeypatch.setattr(module, "full_index", small)
    monkeypatch.setattr("tests.package.test_fuzz.STOCK_INDEX", small)
    module._search_stock.cache_clear()
    monkeypatch.setattr(module, "_search_stock", lambda *_: None)
    return folder


STOCK_INDEX: Any = None


def _stock_names(spec: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str] | None:
    """The tasks and groups that ``lm_eval --tasks SPEC`` would score; ``None`` where it ends in an error."""
    from lm_eval.config.evaluate_config import EvaluatorConfig

    config = EvaluatorConfig(tasks=[spec], include_path=str(folder))
    with monkeypatch.context() as patch:
        patch.setattr("lm_eval.tasks.TaskManager", lambda **given: STOCK_INDEX(**given))
        try:
            config.process_tasks()
        except (ValueError, OSError, KeyError, re.error):
            return None
    found: list[Any] = config.tasks
    return [each if isinstance(each, str) else str(each.get("group") or each.get("task")) for each in found]


@sizes(150, 1000, 10_000)
@pytest.mark.timeout(3600)
def test_task_specifications(mutations: int, own_tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lm-eval scores under a name, a pattern, a group, a tag, a file or a folder, or one message."""
    from lm_eval_aft.harness.tasks import find_tasks, read_definition

    rng, outcomes = random.Random(mutations), Counter[str]()
    for _ in range(mutations):
        spec = _spec_damage(rng)
        theirs = _stock_names(spec, own_tasks, monkeypatch)
        try:
            _, names = find_tasks([spec], [str(own_tasks)])
        except AFTError:
            outcomes["refused"] += 1
            continue
        outcomes["found"] += 1
        read = {name: read_definition(Path(name)) for name in names if name.endswith((".yaml", ".yml"))}
        found = [str(read[n].get("group") or read[n].get("task")) if n in read else n for n in names]
        if theirs is None:
            outcomes["lm-eval refuses"] += 1
        else:
            assert sorted(set(found)) == sorted({each for each in theirs if each != "None"}), spec
    assert min(outcomes["found"], outcomes["refused"]) > mutations / 20, outcomes
    assert outcomes["lm-eval refuses"] < outcomes["found"] / 2, outcomes


def _spec_damage(rng: random.Random) -> str:
    spec = rng.choice(SPECS)
    for _ in range(rng.choice((0, 1, 1, 2))):
        what = rng.randrange(5)
        place = rng.randrange(len(spec) + 1)
        if what == 0:
            spec = f"{spec},{rng.choice(SPECS)}"
        elif what == 1:
            spec = spec[:place] + rng.choice("*?[]!x_,/. ~{}\\\0é") + spec[place:]
        elif what == 2:
            spec = spec[:place] + spec[place + 1 :]
        elif what == 3:
            spec = rng.choice(
                (spec.upper(), f" {spec} ", f"./{spec}", f"../work/{spec}", f"{spec}/", f"{spec},")
            )
        else:
            spec = rng.choice((spec, *(word for word in WORDS if not word.startswith("-"))))
    return spec


def _argument_damage(text: str, rng: random.Random) -> str:
    parts = rng.sample(text.split(","), rng.randrange(1, text.count(",") + 2))
    for _ in range(rng.choice((1, 1, 2))):
        at = rng.randrange(len(parts))
        name, _, value = parts[at].partition("=")
        what = rng.randrange(6)
        if what <= 1:
            value = rng.choice(VALUES)
        elif what == 2:
            value = "".join(rng.choice((c.upper(), c.lower())) for c in value)
        elif what == 3:
            place = rng.randrange(len(name) + 1)
            name = name[:place] + rng.choice(("", "_", "x", " ", "é")) + name[place + rng.choice((0, 1)) :]
        elif what == 4:
            parts.append(parts[rng.randrange(len(parts))])
        else:
            place = rng.randrange(len(value) + 1)
            value = value[:place] + chr(rng.choice((0, 32, 44, 61, 233, 8239, 0x1F600))) + value[place:]
        parts[at] = f"{name}={value}"
    return ",".join(parts)


def _commands(group: click.Group, path: list[str]) -> list[tuple[list[str], click.Command]]:
    found: list[tuple[list[str], click.Command]] = []
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            found += _commands(command, [*path, name])
        elif name not in ("lm-eval", "tasks"):  # the harness's own, and slow
            found.append(([*path, name], command))
    return found
