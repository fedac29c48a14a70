"""Several vectors in one batch: the answers are those of each vector alone, and the record says whose."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from lm_eval.api.instance import Instance

from lm_eval_aft import AFTError, SteeringVector, evaluate_pair, load_vector
from lm_eval_aft.cli.main import aft
from lm_eval_aft.engine.active_steering import Routing
from lm_eval_aft.evaluation.render import to_html, to_markdown
from lm_eval_aft.evaluation.report import compare
from lm_eval_aft.evaluation.run import plan_runs, vector_label
from lm_eval_aft.library.routers import question_of
from lm_eval_aft.library.store import Library
from lm_eval_aft.lm import AFTLM
from lm_eval_aft.steering.fingerprint import fingerprint
from tests.conftest import tiny_model, tiny_tokenizer
from tests.engine.test_scoring import questions, words

OPTIONS: dict[str, Any] = {"device": "cpu", "batch_size": 4, "tokenizer": tiny_tokenizer()}
TASKS = ("red", "green", "blue", "yellow")  # the last has no vector
TABLE = """\
rules:
  - {vector: colours/red, words: [red]}
  - {vector: colours/green, words: [green]}
else: none
"""


def a_library(root: Path, **metadata: Any) -> Library:
    """Three vectors that change answers a good deal: at two layers, one layer, another layer."""
    library = Library(root / "library")
    torch.manual_seed(1)
    for name, layers in {"red": (0, 2), "green": (1,), "blue": (3,)}.items():
        vector = SteeringVector(
            {layer: 3 * torch.randn(32) for layer in layers}, metadata={"task": name, **metadata}
        )
        library.add(vector.save(root / f"{name}.safetensors"), f"colours/{name}")
    return library


def mixed(kind: str, n: int = 16) -> list[Instance]:
    """Requests of four tasks in turn, document by document."""
    found = []
    if kind == "loglikelihood":
        pairs: list[tuple[Any, ...]] = list(questions(n, seed=5))
    else:
        import random

        draw = random.Random(3)
        settings = {"until": ["."], "max_gen_toks": 6, "do_sample": False}
        pairs = [(words(draw, draw.randint(2, 12)), settings) for _ in range(n)]
    contexts = list(dict.fromkeys(context for context, _ in pairs))
    for number, pair in enumerate(pairs):
        doc_id = contexts.index(pair[0])
        found.append(Instance(kind, {}, pair, number, (TASKS[doc_id % 4], doc_id, 1)))  # type: ignore[arg-type]
    return found


def answers(lm: AFTLM, kind: str, requests: list[Instance]) -> list[Any]:
    ask = {"loglikelihood": lm.loglikelihood, "generate_until": lm.generate_until}[kind]
    return list(ask(requests, disable_tqdm=True))


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("kind", ["loglikelihood", "generate_until"])
@pytest.mark.parametrize("family", ["llama", "gpt_neo", "falcon"])  # packed; trimmed; stock generation
def test_a_mixed_batch_equals_runs_of_each_vector(family: str, kind: str, fast: bool, tmp_path: Path) -> None:
    library = a_library(tmp_path)
    requests = mixed(kind)
    lm = AFTLM(tiny_model(family), fast=fast, library=str(library.root), route="task", **OPTIONS)
    found = answers(lm, kind, requests)
    info = lm.get_model_info()["aft"]
    expected: dict[int, Any] = {}
    alone = []
    for task in TASKS:
        lm.steer(SteeringVector.load(library.path(f"colours/{task}")) if task != "yellow" else None)
        every = answers(lm, kind, requests)
        alone.append(every)
        expected |= {i: a for i, a in enumerate(every) if requests[i].task_name == task}
    assert len({repr(each) for each in alone}) == 4  # the vectors do something
    for i, answer in enumerate(found):
        if kind == "generate_until":
            assert answer == expected[i]
        else:
            assert answer[0] == pytest.approx(expected[i][0], rel=1e-6, abs=1e-5)
            assert answer[1] == expected[i][1]
    assert info["routing"]["counts"]["red"] == {"colours/red": 4}
    assert info["routing"]["routes"]["yellow"] == {"none": [3, 7, 11, 15]}
    assert info["routing"]["vectors"]["colours/red"]["layers"] == [0, 2]
    if fast and family == "llama":
        shared = "generated in shared batches" if kind == "generate_until" else "packed"
        assert info["scoring_path"].startswith(f"{shared} (100.0%")


def test_a_prefix_in_common_is_read_once_for_each_vector(tmp_path: Path) -> None:
    import random

    prefix = words(random.Random(9), 40) + " "
    pairs = questions(24, prefix=prefix, seed=2)
    contexts = list(dict.fromkeys(context for context, _ in pairs))
    requests = [
        Instance("loglikelihood", {}, p, i, (TASKS[contexts.index(p[0]) % 2], i, 1))
        for i, p in enumerate(pairs)
    ]
    lm = AFTLM(tiny_model("llama"), library=str(a_library(tmp_path).root), route="task", **OPTIONS)
    fast = lm.loglikelihood(requests, disable_tqdm=True)
    assert lm.get_model_info()["aft"]["scoring_path"].startswith("prefixed")
    lm.fast = False
    slow = lm.loglikelihood(requests, disable_tqdm=True)
    for (value, greedy), (other, same) in zip(fast, slow, strict=True):
        assert value == pytest.approx(other, rel=1e-6, abs=1e-4)
        assert greedy == same


def test_the_same_words_in_one_batch_under_two_vectors(tmp_path: Path) -> None:
    """Equal requests must not share a row when their vectors differ."""
    library = a_library(tmp_path)
    pair = ("the cat sees", " red")
    requests = [Instance("loglikelihood", {}, pair, i, (task, i, 1)) for i, task in enumerate(TASKS)]
    for family in ("llama", "gpt_neo"):
        lm = AFTLM(tiny_model(family), library=str(library.root), route="task", **OPTIONS)
        assert len({round(value, 3) for value, _ in lm.loglikelihood(requests, disable_tqdm=True)}) == 4


def test_a_documents_options_get_one_vector(tmp_path: Path) -> None:
    table = tmp_path / "table.yaml"
    table.write_text(TABLE)
    routing = Routing.open(str(table), a_library(tmp_path))
    pairs = [("the red cat", " a"), ("the green cat", " a"), ("", " a"), ("the green cat", " a")]
    requests = [Instance("loglikelihood", {}, p, i, ("t", i // 3, 1)) for i, p in enumerate(pairs)]
    names = [None, *routing.vectors]
    assert [names[state] for state in routing.states(requests)] == ["colours/red"] * 3 + ["colours/green"]
    assert routing.info()["routes"] == {"t": {"colours/red": [0], "colours/green": [1]}}


def test_rolling_requests_are_routed(tmp_path: Path) -> None:
    library = a_library(tmp_path)
    texts = ["the red cat sees one", "the green dog eats", "a bird likes the tree"]
    requests = [Instance("loglikelihood_rolling", {}, (t,), i, ("t", i, 1)) for i, t in enumerate(texts)]
    table = tmp_path / "table.yaml"
    table.write_text(TABLE)
    lm = AFTLM(tiny_model("llama"), library=str(library.root), route=str(table), **OPTIONS)
    found = lm.loglikelihood_rolling(requests, disable_tqdm=True)
    for i, name in enumerate(("colours/red", "colours/green", None)):
        lm.steer(None if name is None else SteeringVector.load(library.path(name)))
        assert lm.loglikelihood_rolling(requests[i : i + 1], disable_tqdm=True) == found[i : i + 1]


@pytest.mark.parametrize(
    ("prompt", "document", "question"),
    [
        # Few-shot examples do not count, though they hold the same words.
        (
            "Q: Why is it so red?\nA: x\n\nQ: How many cats sleep?\nA:",
            {"question": "How many cats sleep?", "answer": "three"},
            "Q: How many cats sleep?\nA:",
        ),
        # The question comes before the longest text shown, an option.
        (
            "why\n\nWhat grows here?\nA. a very long option indeed\nB. moss\nAnswer:",
            {"q": "What grows here?", "choices": {"text": ["a very long option indeed", "moss"]}},
            "What grows here?\nA. a very long option indeed\nB. moss\nAnswer:",
        ),
        # A passage, then the question.
        (
            "ex\n\nSome long passage about the sea.\n\nQuestion: Is it salty?\nAnswer:",
            {"passage": "Some long passage about the sea.", "question": "Is it salty?"},
            "Some long passage about the sea.\n\nQuestion: Is it salty?\nAnswer:",
        ),
        # No text of the document is shown: the last paragraph.
        ("one\n\ntwo 3 + 4 =", {"a": 3, "b": 4}, "two 3 + 4 ="),
        ("one", None, "one"),
        ("", {}, ""),
    ],
)
def test_what_a_prompt_asks(prompt: str, document: Any, question: str) -> None:
    assert question_of(prompt, document) == question


def test_errors_name_what_is_wrong(tmp_path: Path, checkpoint: Callable[..., str]) -> None:
    library = a_library(tmp_path)
    arguments = {"library": str(library.root), **OPTIONS}
    with pytest.raises(AFTError, match="Both vector= and route="):
        AFTLM(checkpoint(), vector=str(tmp_path / "red.safetensors"), route="task", **arguments)
    with pytest.raises(AFTError, match="no router 'keyworld'"):
        AFTLM(checkpoint(), route="keyworld", **arguments)
    with pytest.raises(AFTError, match="no vector and no category"):
        AFTLM(checkpoint(), route="constant:colours/rad", **arguments)
    with pytest.raises(AFTError, match="no vectors to route to"):
        AFTLM(checkpoint(), route="task", library=str(tmp_path / "none"), **OPTIONS)


def test_vectors_of_other_models_are_left_out(tmp_path: Path) -> None:
    other = fingerprint(tiny_model("llama", seed=1), tiny_tokenizer())
    library = a_library(tmp_path, fingerprint=other)
    with pytest.raises(AFTError, match=r"3 vectors do not fit this model \(colours/blue: weights"):
        AFTLM(tiny_model("llama"), library=str(library.root), route="task", **OPTIONS)
    lm = AFTLM(tiny_model("llama"), library=str(library.root), route="task", allow_mismatch=True, **OPTIONS)
    assert set(lm.routing.vectors) == {f"colours/{task}" for task in TASKS[:3]}  # type: ignore[union-attr]


def test_what_is_left_out_of_routing_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    library = a_library(tmp_path)
    file = library.path("colours/red") / "vector.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    with caplog.at_level(logging.WARNING):
        routing = Routing.open("constant:colours/green", library)
    assert "colours/red" in caplog.text
    assert "damaged" in routing.info()["left_out"]["colours/red"]


@pytest.mark.parametrize("given", [math.nan, math.inf, "much"])
@pytest.mark.parametrize("how", [{"route": "constant:colours/red"}, {"vector": "colours/red"}])
def test_a_coefficient_that_is_no_number_is_refused(tmp_path: Path, given: Any, how: dict[str, str]) -> None:
    library = a_library(tmp_path)
    with pytest.raises(AFTError):
        AFTLM(tiny_model("llama"), library=str(library.root), coefficient=given, **how, **OPTIONS)


def test_the_cache_keeps_routings_apart(tmp_path: Path) -> None:
    from lm_eval_aft.lm import _answers_depend_on

    library = a_library(tmp_path)
    table = tmp_path / "table.yaml"
    table.write_text(TABLE)
    lm = AFTLM(tiny_model("llama"), library=str(library.root), route=str(table), **OPTIONS)

    def router() -> str:
        return str(_answers_depend_on(lm)["routing"]["router"])

    first = router()
    table.write_text("# a comment\n" + TABLE)
    lm.follow(Routing.open(str(table), library))
    assert first == router()
    table.write_text(TABLE.replace("[red]", "[red, one]"))
    lm.follow(Routing.open(str(table), library))
    assert first != router()
    # Of a document answered in part the cache hands on the rest, which may be routed elsewhere.
    assert _answers_depend_on(lm) != _answers_depend_on(lm)
    lm.follow(Routing.open("task", library))  # one request may be asked by two tasks
    assert _answers_depend_on(lm) != _answers_depend_on(lm)
    lm.follow(Routing.open("constant:colours/red", library))
    assert _answers_depend_on(lm) == _answers_depend_on(lm)
    lm.steer(None)
    assert "routing" not in json.dumps(_answers_depend_on(lm))


@pytest.fixture(scope="module")
def demo_library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    """Two quick vectors of the demo, in categories that the shipped keyword table knows."""
    from lm_eval_aft import train_vector

    root = tmp_path_factory.mktemp("demo")
    library = Library(root / "library")
    lm = AFTLM("demo", device="cpu")
    quick: dict[str, Any] = {
        "protocol": "maximum", "layers": "1", "seeds": 1, "train_docs": 80, "selection_docs": 40,
        "epochs": 2, "lr": 1e-2, "l2": 0.02, "batch_size": 4, "retries": 0, "regression": False,
    }  # fmt: skip
    for task, name in {"aft_demo_choice": "knowledge/facts", "aft_demo_math": "math/sums"}.items():
        train_vector(lm, task, root / task, progress=False, **quick)
        library.add(root / task, name)
    return library


def test_the_demo_routed_by_task_and_by_keyword_gets_the_right_vectors_scores(
    demo_library: Library, tmp_path: Path
) -> None:
    output = tmp_path / "results"
    command = ["eval", "--model", "demo", "--library", str(demo_library.root), "--device", "cpu"]
    command += [
        "--vector",
        "knowledge/facts",
        "--vector",
        "math/sums",
        "--route",
        "task",
        "--route",
        "keyword",
    ]
    command += ["--tasks", "aft_demo_choice,aft_demo_math", "--output", str(output)]
    done = CliRunner().invoke(aft, [*command, "--", "--limit", "60"])
    assert done.exit_code == 0, done.output
    report = compare(output)
    right = {"aft_demo_choice": "knowledge-facts", "aft_demo_math": "math-sums"}
    scores = {(row.run, row.task): row for row in report.rows if row.primary}
    for task, own in right.items():
        assert scores[f"steered/{own}", task].difference > 0.1
        for router in ("task", "keyword"):
            # All documents go the right way, so it is the right vector's score to the last document.
            assert scores[f"steered/routed-{router}", task].steered == scores[f"steered/{own}", task].steered
    assert [
        (row["run"], row["task"], row["route"], row["own"], row["n"], row["of"]) for row in report.routes
    ] == [
        (f"steered/routed-{router}", task, name, True, 60, 60)
        for router in ("task", "keyword")
        for task, name in (("aft_demo_choice", "knowledge/facts"), ("aft_demo_math", "math/sums"))
    ]
    for text in (to_markdown(report), to_html(report), done.output):
        assert "By route" in text
        assert "60 (100.0 %)" in text
    samples = next((output / "steered/routed-keyword").rglob("samples_aft_demo_math_*.jsonl"))
    assert {json.loads(line)["steered_by"] for line in samples.open()} == {"math/sums"}
    found = next((output / "steered/routed-keyword").rglob("results_*.json"))
    logged = json.loads(found.read_text())["config"]
    assert logged["model_args"]["route"] == "keyword"
    assert logged["aft"]["routing"]["counts"] == {
        "aft_demo_choice": {"knowledge/facts": 60},
        "aft_demo_math": {"math/sums": 60},
    }
    facts = load_vector("knowledge/facts", demo_library)
    assert logged["aft"]["routing"]["vectors"]["knowledge/facts"]["sha256"] == facts.digest()
    # A vector that a router may pick was chosen on other documents than these: there are verdicts.
    assert scores["steered/routed-task", "aft_demo_choice"].verdict == "better"
    assert (
        "route=keyword"
        in next(c for c in report.commands if c["run"] == "steered/routed-keyword")["commands"][0]
    )


def test_documents_of_one_task_split_by_route(demo_library: Library, tmp_path: Path) -> None:
    """A table that sends part of a task elsewhere: rows of one batch, two vectors, a report of each part."""
    table = tmp_path / "parts.yaml"
    table.write_text(
        "rules:\n- {vector: knowledge, words: [row, letter, letters]}\n"
        "- {vector: none, words: [known]}\nelse: math\n"
    )
    output = tmp_path / "results"
    evaluate_pair(
        "demo", "knowledge/facts", ["aft_demo_choice"], output, library=demo_library.root,
        routes=[str(table)], model_args={"device": "cpu"}, flags=["--limit", "60"],
    )  # fmt: skip
    report = compare(output)
    rows = {row["route"]: row for row in report.routes}
    assert set(rows) == {"knowledge/facts", "math/sums", "none"}
    assert sum(row["n"] for row in rows.values()) == 60
    assert rows["none"]["difference"] == 0
    assert [row["own"] for row in rows.values()].count(True) == 1
    whole = next(r for r in report.rows if r.run == "steered/routed-keyword-parts" and r.primary)
    total = sum(row["n"] * row["difference"] for row in rows.values()) / 60
    assert total == pytest.approx(whole.difference)
    # Where the router picked the task's own vector, the answers are that vector's own, document by document.
    parts = {path.parts[-3]: path for path in output.rglob("samples_*.jsonl")}
    alone, routed = (
        {s["doc_id"]: s for s in map(json.loads, parts[name].open())}
        for name in ("knowledge-facts", "routed-keyword-parts")
    )
    for doc_id, sample in routed.items():
        if sample["steered_by"] == "knowledge/facts":
            values = [[float(each[0]) for each in s["filtered_resps"]] for s in (sample, alone[doc_id])]
            assert values[0] == pytest.approx(values[1], abs=1e-4)


@pytest.mark.parametrize(
    ("spec", "label"),
    [
        ("math/algebra", "math-algebra"),
        ("math/algebra*0.7 + logic/analogy*0.3", "math-algebrax0.7+logic-analogyx0.3"),
        ("owner/name@main", "owner-name_main"),
        ("runs/v.safetensors", "v"),
    ],
)
def test_names_of_runs(spec: str, label: str) -> None:
    assert vector_label(spec) == label


def test_long_expressions_get_names_of_their_own() -> None:
    specs = [" + ".join(["math/a_rather_long_name"] * 9) + end for end in ("", " + x/y")]
    labels = [vector_label(spec) for spec in specs]
    assert len(set(labels)) == 2
    assert max(map(len, labels)) < 100


def test_library_names_expressions_and_all_seeds_in_one_plan(tmp_path: Path) -> None:
    library = a_library(tmp_path)
    seeds = library.path("colours/red") / "seeds"
    load_vector("colours/red", library).save(seeds / "seed-0.safetensors")
    root = str(library.root)
    runs = plan_runs(["colours/red"], all_seeds=True, library=root, routes=["task", "constant:colours/red"])
    assert [run.name for run in runs] == [
        "baseline",
        "steered/colours-red",
        "steered/colours-red-seed-0",
        "steered/routed-task",
        "steered/routed-constant-colours-red",
    ]
    both = "colours/red*0.5 + colours/blue*0.5"
    names = [run.name for run in plan_runs([both, "colours/red", both], library=root)]
    assert names[1:] == ["steered/colours-redx0.5+colours-bluex0.5", "steered/colours-red", f"{names[1]}-2"]
    with pytest.raises(AFTError, match="no seeds/"):
        plan_runs([both], all_seeds=True, library=root)


def test_results_keep_a_sums_recipe_and_where_a_vector_came_from(tmp_path: Path) -> None:
    library = a_library(tmp_path)
    lm = AFTLM(
        tiny_model("llama"), vector="colours/red*0.5 + colours/blue", library=str(library.root), **OPTIONS
    )
    logged = lm.get_model_info()["aft"]["vector"]
    operands = {each["name"]: each["weight"] for each in logged["recipe"]["operands"]}
    assert operands == {"colours/red": 0.5, "colours/blue": 1.0}
    hub = {"repo": "me/vectors", "vector": None, "commit": "0" * 40}
    lm.steer(SteeringVector({0: torch.ones(32)}, metadata={"hub": hub}))
    assert lm.get_model_info()["aft"]["vector"]["hub"] == hub
