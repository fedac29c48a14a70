"""Training prompts are the harness's own, and never leak an answer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lm_eval_aft import AFTError
from lm_eval_aft.engine.batching import lay_out
from lm_eval_aft.harness.examples import Example, Extractor, PromptSettings, encode
from lm_eval_aft.harness.splits import split_task
from lm_eval_aft.harness.tasks import load_task
from lm_eval_aft.lm import AFTLM
from tests.conftest import toy_documents

CHAT = PromptSettings(apply_chat_template=True, system_instruction="the answer is one or two")


@pytest.fixture
def lm(checkpoint: Callable[..., str]) -> AFTLM:
    return AFTLM(checkpoint("llama"), device="cpu", batch_size=4)


def extractor(folder: str, lm: AFTLM, name: str = "toy_choice", **settings: Any) -> Extractor:
    return Extractor(load_task(name, [folder]), lm, PromptSettings(**settings))


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("shots", [0, 2])
@pytest.mark.parametrize("name", ["arc_challenge", "hellaswag", "gsm8k"])
def test_evaluation_requests_equal_the_harness_byte_for_byte(
    name: str, shots: int, chat: bool, test_data: Path, lm: AFTLM
) -> None:
    limit = 40
    ours = load_task(name)
    settings = PromptSettings(shots, chat, "Be brief." if chat else None)
    maker = Extractor(ours, lm, settings)
    ours.set_fewshot_seed(1234)
    mine = [maker.requests(doc) for _, doc in zip(range(limit), ours.eval_docs, strict=False)]

    theirs = load_task(name)
    theirs.set_config("num_fewshot", shots)
    theirs.set_fewshot_seed(1234)
    theirs.build_all_requests(
        limit=limit,
        rank=0,
        world_size=1,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
        chat_template=lm.apply_chat_template if chat else None,
        system_instruction="Be brief." if chat else None,
    )
    by_doc: dict[int, list[Any]] = {}
    for instance in theirs.instances:
        by_doc.setdefault(instance.doc_id, []).append(instance.args)
    assert mine == [by_doc[i] for i in range(limit)]
    # The example built from such a document is those requests too.
    ours.set_fewshot_seed(1234)
    example = maker.example(ours.eval_docs[0], 0)
    assert example is not None
    if name == "gsm8k":
        assert example.requests[0][0] == by_doc[0][0][0]
        gap = "" if chat else " "
        assert example.requests[0][1] == gap + ours.doc_to_target(ours.eval_docs[0])
    else:
        assert list(example.requests) == by_doc[0]


@pytest.mark.parametrize(
    "name", ["arc_challenge", pytest.param("hellaswag", marks=pytest.mark.slow), "gsm8k"]
)
def test_real_splits_are_apart(name: str, test_data: Path, lm: AFTLM) -> None:
    maker = Extractor(load_task(name), lm, PromptSettings(num_fewshot=2))
    splits = split_task(maker, train_docs=30, selection_docs=40)
    train = splits.train(0)
    assert (len(train), len(splits.selection)) == (30, 40)
    assert not {e.doc_id for e in train} & {e.doc_id for e in splits.selection}
    answers = [e.requests[e.gold[0]][1].strip() for e in [*train, *splits.selection]]
    questions = [e.requests[0][0].rsplit("\n\n", 1)[-1] for e in [*train, *splits.selection]]
    for example, question in zip([*train, *splits.selection], questions, strict=True):
        shots = example.requests[0][0][: -len(question)]
        assert question.strip() not in shots
    assert len(answers) == 70
    for selected in splits.selection:
        own = selected.requests[0][0].rsplit("\n\n", 1)[-1].strip()
        assert all(own not in other.requests[0][0] for other in train)
    assert [e.doc_id for e in splits.train(0)] == [e.doc_id for e in train]
    assert [e.doc_id for e in splits.train(1)] != [e.doc_id for e in train]


def test_a_planted_duplicates_answer_never_appears_in_a_fewshot_context(
    toy_tasks: Callable[..., str], lm: AFTLM
) -> None:
    documents = toy_documents(8)
    # The twin differs in case, spacing, other options and their order; the answer is unmistakable.
    documents[0] |= {"choices": ["hippo", "a", "b", "c"], "gold": 0}
    twin = {
        **documents[0],
        "question": documents[0]["question"].upper() + " ",
        "choices": ["d", "e", "hippo", "f"],
    }
    twin["gold"] = 2
    folder = toy_tasks(train=[*documents, twin])
    maker = extractor(folder, lm, num_fewshot=5)
    splits = split_task(maker, train_docs=6, selection_docs=1)
    assert splits.counts["duplicates"] == 1
    for seed in range(5):
        for example in splits.train(seed):
            if example.requests[example.gold[0]][1].strip() == "hippo":
                assert "hippo" not in example.requests[0][0]


def test_generation_duplicates_count_by_question_alone(toy_tasks: Callable[..., str], lm: AFTLM) -> None:
    documents = toy_documents(12)
    twin = {**documents[3], "answer": "ten # no"}
    maker = extractor(toy_tasks(train=[*documents, twin]), lm, "toy_generate")
    assert split_task(maker, train_docs=5, selection_docs=5).counts["duplicates"] == 1


def test_selection_documents_are_in_no_fewshot_context(toy_tasks: Callable[..., str], lm: AFTLM) -> None:
    maker = extractor(toy_tasks(), lm, num_fewshot=3)
    splits = split_task(maker, train_docs=20, selection_docs=20)
    questions = {example.requests[0][0].rsplit("\n\n", 1)[-1] for example in splits.selection}
    assert len(questions) == 20
    for example in [*splits.train(0), *splits.selection]:
        shots = example.requests[0][0].split("\n\n")[:-1]
        assert len(shots) == 3
        assert not questions & {shot.rsplit(" the ", 1)[0] for shot in shots}


def test_prompts_depend_on_neither_order_nor_seed(toy_tasks: Callable[..., str], lm: AFTLM) -> None:
    folder = toy_tasks()
    runs = [split_task(extractor(folder, lm, num_fewshot=3), 40, 20) for _ in range(2)]
    backwards = {e.doc_id: e for e in runs[1].train(7)}
    forwards = {e.doc_id: e for e in runs[0].train(0)}
    assert forwards == backwards


def test_documents_that_share_fewshot_examples_show_none_of_each_other(
    toy_tasks: Callable[..., str], lm: AFTLM
) -> None:
    folder = toy_tasks()
    maker = extractor(folder, lm, num_fewshot=3)
    splits = split_task(maker, train_docs=14, selection_docs=10, share=4)
    assert splits.train(0) == split_task(extractor(folder, lm, num_fewshot=3), 14, 10, share=4).train(0)
    examples = {each.doc_id: each for seed in range(3) for each in splits.train(seed)}
    for chosen in (splits.selection, list(examples.values())):
        by_group: dict[int, list[Example]] = {}
        for each in chosen:
            assert each.group is not None
            by_group.setdefault(each.group, []).append(each)
        assert max(map(len, by_group.values())) == 4
        for group in by_group.values():
            shots, *others = [each.requests[0][0].split("\n\n")[:-1] for each in group]
            assert len(shots) == 3
            assert all(other == shots for other in others)
            own = {each.requests[0][0].rsplit("\n\n", 1)[-1] for each in group}
            assert not own & {shot.rsplit(" the ", 1)[0] for shot in shots}
    # Whole groups are drawn, so that a seed's documents share as much as they can.
    assert len({each.group for each in splits.train(5)}) == 4
    encoded = encode(splits.selection[:4], lm)
    assert len(lay_out(encoded, packed=True)) == 1


def test_groups_give_way_where_documents_are_few(toy_tasks: Callable[..., str], lm: AFTLM) -> None:
    maker = extractor(toy_tasks(train=toy_documents(12)), lm, num_fewshot=5)
    splits = split_task(maker, train_docs=6, selection_docs=5, share=8)
    assert splits.share == 2
    assert len(splits.train(0)) == 6
    # Without examples there is nothing to share.
    assert {e.group for e in split_task(extractor(toy_tasks(), lm), 6, 5, share=8).train(0)} == {None}


def test_planted_evaluation_document_is_dropped_and_counted(toy_tasks: Callable[..., str], lm: AFTLM) -> None:
    test = toy_documents(20, start=200)
    leaked = {**test[4], "question": f"  {test[4]['question']}"}
    maker = extractor(toy_tasks(train=[*toy_documents(30), leaked], test=test), lm)
    splits = split_task(maker, 10, 10)
    assert splits.counts["evaluation_overlap"] == 1
    assert splits.counts["pool"] + splits.counts["selection"] == 30


def test_real_arc_easy_overlap_is_found(test_data: Path, lm: AFTLM) -> None:
    """Counted again from the files: same question and same right answer, whatever the options."""

    def keys(split: str) -> list[tuple[str, str]]:
        lines = (test_data / f"hub/allenai/ai2_arc/ARC-Easy/{split}.jsonl").read_text().splitlines()
        found = []
        for doc in map(json.loads, lines):
            answer = dict(zip(doc["choices"]["label"], doc["choices"]["text"], strict=True))[doc["answerKey"]]
            found.append((" ".join(doc["question"].lower().split()), " ".join(answer.lower().split())))
        return found

    expected = len(set(keys("train")) & set(keys("test")))
    maker = Extractor(load_task("arc_easy"), lm, PromptSettings())
    assert split_task(maker, 10, 10).counts["evaluation_overlap"] == expected > 0


def test_tokens_equal_what_hf_scores(toy_tasks: Callable[..., str], lm: AFTLM) -> None:
    """Token ids reach the model exactly as HFLM's own loglikelihood would send them."""
    splits = split_task(extractor(toy_tasks(), lm), 10, 10)
    seen: list[Any] = []
    original = lm._loglikelihood_tokens
    lm._loglikelihood_tokens = lambda reqs, **_: seen.extend(reqs) or [(0.0, False)] * len(reqs)
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    flat = [pair for example in splits.selection for pair in example.requests]
    HFLM.loglikelihood(lm, [Instance("loglikelihood", {}, pair, 0, ("toy", 0, 1)) for pair in flat])
    lm._loglikelihood_tokens = original
    ours = [pair for document in encode(splits.selection, lm) for pair in document.pairs]
    assert ours == [(tuple(context), tuple(tail)) for _, context, tail in seen]


def test_long_prompts_are_cut_on_the_left_as_hf_cuts_them(toy_tasks: Callable[..., str], lm: AFTLM) -> None:
    lm._max_length = 20
    splits = split_task(extractor(toy_tasks(), lm, num_fewshot=5), 10, 10)
    for example, document in zip(splits.selection, encode(splits.selection, lm), strict=True):
        for (context, tail), text in zip(document.pairs, example.requests, strict=True):
            head, end = lm._encode_pair(*text)
            assert [*context, *tail] == (head + end)[-21:]


def test_chat_template_and_system_instruction_are_in_the_prompt(
    toy_tasks: Callable[..., str], lm: AFTLM
) -> None:
    maker = Extractor(load_task("toy_choice", [toy_tasks()]), lm, CHAT)
    example = split_task(maker, 10, 10).selection[0]
    context, continuation = example.requests[0]
    assert context.startswith("system : the answer is one or two")
    assert context.rstrip().endswith("assistant :")
    assert not continuation.startswith(" ")


def test_refusals(toy_tasks: Callable[..., str], lm: AFTLM) -> None:
    folder = toy_tasks()
    task = load_task("toy_choice", [folder])
    maker = Extractor(task, lm, PromptSettings())
    with pytest.raises(AFTError, match="'test' is the split on which 'toy_choice' is evaluated"):
        split_task(maker, train_split="test")
    with pytest.raises(AFTError, match=r"no split 'dev'.*\n.*train, test"):
        split_task(maker, train_split="dev")
    with pytest.raises(AFTError, match="has 60 usable ones"):
        split_task(maker, 50, 50)
    task.config.training_split = None
    with pytest.raises(AFTError, match="no training split; its data has: train, test"):
        split_task(maker)
    with pytest.raises(AFTError, match=r"no harness task 'toy_choise'[\s\S]*Nearest names: .*toy_choice"):
        load_task("toy_choise", [folder])


def test_too_few_documents_left_says_what_was_left_out(toy_tasks: Callable[..., str], lm: AFTLM) -> None:
    maker = extractor(toy_tasks(), lm)
    documents = list(maker.task.dataset["train"])
    maker.task.dataset["test"] = documents[:40]
    maker.task.dataset["train"] = documents[:45] + documents[40:45]
    told = (
        "5 usable ones. Of its 50 documents, 40 were left out because an evaluation split has them too, and 5"
    )
    with pytest.raises(AFTError, match=f"{told} because they occur before[^\n]*\nLower --train-docs or"):
        split_task(maker, 10, 10)
    maker.task.dataset["train"] = documents[:40]
    told = "has 0 usable documents, too few to train and to choose on. Of its 40 documents, 40 were left out"
    with pytest.raises(AFTError, match=f"{told}[^\n]*\nName another split with --train-split, or choose"):
        split_task(maker)


def test_default_sizes_share_a_small_split(toy_tasks: Callable[..., str], lm: AFTLM) -> None:
    splits = split_task(extractor(toy_tasks(), lm))
    assert (splits.train_docs, len(splits.selection)) == (30, 30)
