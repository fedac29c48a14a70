"""Documents in the schemas of stock data sets, and small tasks of our own, for the table of tasks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Doc = dict[str, Any]
_NOUNS = "cat dog river stone engine letter garden market doctor planet".split()
_VERBS = "finds keeps paints follows repairs carries".split()


def _a(i: int, shift: int = 0) -> str:
    return f"{_NOUNS[(i + shift) % 10]} {(i * 7 + shift) % 97}"


def _s(i: int, shift: int = 0) -> str:
    return f"The {_a(i, shift)} {_VERBS[(i + shift) % 6]} the {_a(i, shift + 3)}."


def _options(i: int, n: int = 4) -> list[str]:
    return [f"the {_a(i, k)}" for k in range(n)]


def _labelled(i: int, n: int = 4) -> Doc:
    return {"text": _options(i, n), "label": list("ABCDE"[:n])}


def _pair(i: int, labels: int = 2) -> Doc:
    return {"sentence1": _s(i), "sentence2": _s(i, 1), "label": i % labels, "idx": i}


def _glue(i: int) -> Doc:
    return {**_pair(i), "premise": _s(i), "hypothesis": _s(i, 1), "label": i % 3, "idx": i}


def _drop(i: int) -> Doc:
    date = {"day": "", "month": "", "year": ""}
    answer = {"number": str(i), "date": date, "spans": [], "hit_id": "", "worker_id": ""}
    validated = {"number": [str(i + 1)], "date": [date], "spans": [[]], "hit_id": [""], "worker_id": [""]}
    return {
        "query_id": str(i),
        "passage": _s(i),
        "question": f"How many {_a(i)}?",
        "answer": answer,
        "validated_answers": validated,
    }


def _coqa(i: int) -> Doc:
    other = {"input_text": [f"the {_a(i)}", f"the {_a(i, 2)}!"]}
    turns = {"input_text": [f"the {_a(i)}", f"the {_a(i, 1)}"]}
    asked = {"input_text": ["Who?", "What is found?"]}
    return {"story": _s(i), "questions": asked, "answers": turns, "additional_answers": {"0": other}}


def _hellaswag(i: int) -> Doc:
    return {
        "ind": i,
        "activity_label": "Cooking",
        "ctx_a": _s(i),
        "ctx_b": "then it",
        "ctx": _s(i),
        "label": str(i % 4),
        "endings": _options(i),
        "source_id": f"s{i}",
        "split": "x",
        "split_type": "x",
    }


def _qasper(i: int) -> Doc:
    answer = {
        "unanswerable": False,
        "yes_no": None,
        "extractive_spans": [],
        "free_form_answer": f"the {_a(i)}",
    }
    return {
        "title": _a(i),
        "abstract": _s(i),
        "qas": {"question": [f"Which {_a(i)}?"], "answers": [{"answer": [answer]}]},
    }


def _truthful(i: int) -> Doc:
    both = {"choices": _options(i), "labels": [1, 1, 0, 0]}
    return {"question": _s(i), "mc1_targets": both, "mc2_targets": both}


def _record(i: int) -> Doc:
    named = _options(i)
    return {
        "passage": f"{_s(i)}\n@highlight\n{_s(i, 2)}",
        "query": f"@placeholder is what it was about in {i}",
        "entities": named,
        "answers": [named[i % 4]],
    }


def _math(i: int) -> Doc:
    return {
        "problem": f"What is {i} + 1?",
        "level": "Level 1",
        "type": "Algebra",
        "solution": f"It is $\\boxed{{{i + 1}}}$.",
    }


# stock task -> a document in the schema of its data set
STOCK: dict[str, Callable[[int], Doc]] = {
    "arc_easy": lambda i: {
        "id": str(i),
        "question": _s(i),
        "choices": _labelled(i),
        "answerKey": "ABCD"[i % 4],
    },
    "hellaswag": _hellaswag,
    "winogrande": lambda i: {
        "sentence": f"The {_a(i)} met the {_a(i, 1)} because _ was late in {i}.",
        "option1": f"the {_a(i)}",
        "option2": f"the {_a(i, 1)}",
        "answer": str(1 + i % 2),
    },
    "piqa": lambda i: {"goal": _s(i), "sol1": _s(i, 1), "sol2": _s(i, 2), "label": i % 2},
    "boolq": lambda i: {"passage": _s(i), "question": f"is it {_a(i)}", "idx": i, "label": i % 2},
    "openbookqa": lambda i: {"question_stem": _s(i), "choices": _labelled(i), "answerKey": "ABCD"[i % 4]},
    "social_iqa": lambda i: {
        "context": _s(i),
        "question": "Why?",
        "answerA": _s(i, 1),
        "answerB": _s(i, 2),
        "answerC": _s(i, 3),
        "label": str(1 + i % 3),
    },
    "commonsense_qa": lambda i: {"question": _s(i), "choices": _labelled(i, 5), "answerKey": "ABCDE"[i % 5]},
    "sciq": lambda i: {
        "question": _s(i),
        "support": _s(i, 5),
        "distractor1": _a(i, 1),
        "distractor2": _a(i, 2),
        "distractor3": _a(i, 3),
        "correct_answer": _a(i),
    },
    "copa": lambda i: {
        "premise": _s(i),
        "choice1": _s(i, 1),
        "choice2": _s(i, 2),
        "question": ["cause", "effect"][i % 2],
        "idx": i,
        "label": i % 2,
    },
    "rte": _pair,
    "cola": lambda i: {"sentence": _s(i), "label": i % 2, "idx": i},
    "mnli": _glue,
    "mrpc": _pair,
    "qnli": lambda i: {"question": f"{_a(i)}?", "sentence": _s(i), "label": i % 2, "idx": i},
    "qqp": lambda i: {"question1": _s(i), "question2": _s(i, 1), "label": i % 2, "idx": i},
    "sst2": lambda i: {"sentence": _s(i), "label": i % 2, "idx": i},
    "wnli": _pair,
    "cb": _glue,
    "multirc": lambda i: {
        "paragraph": _s(i),
        "question": "Who?",
        "answer": _a(i),
        "idx": {"a": i},
        "label": i % 2,
    },
    "wic": lambda i: {
        **_pair(i),
        "word": "The",
        "start1": 0,
        "end1": 3,
        "start2": 0,
        "end2": 3,
    },
    "wsc": lambda i: {
        "text": f"The {_a(i)} met it and he left.",
        "span1_index": 0,
        "span2_index": 4,
        "span1_text": "The",
        "span2_text": "it",
        "idx": i,
        "label": i % 2,
    },
    "record": _record,
    "swag": lambda i: {
        "startphrase": _s(i),
        **{f"ending{k}": _s(i, k + 1) for k in range(4)},
        "label": i % 4,
    },
    "logiqa": lambda i: {
        "label": "abcd"[i % 4],
        "context": _s(i),
        "question": "Which?",
        "options": _options(i),
    },
    "headqa_en": lambda i: {
        "qtext": _s(i),
        "ra": 1 + i % 4,
        "answers": [{"aid": k + 1, "atext": t} for k, t in enumerate(_options(i))],
    },
    "medmcqa": lambda i: {
        "question": _s(i),
        "opa": _a(i),
        "opb": _a(i, 1),
        "opc": _a(i, 2),
        "opd": _a(i, 3),
        "cop": i % 4,
    },
    "mutual": lambda i: {"answers": "ABCD"[i % 4], "options": _options(i), "article": _s(i), "id": str(i)},
    "paws_en": lambda i: {"id": i, "sentence1": _s(i), "sentence2": _s(i, 1), "label": i % 2},
    "xnli_en": lambda i: {"premise": _s(i), "hypothesis": _s(i, 1), "label": i % 3},
    "anli_r1": lambda i: {
        "uid": str(i),
        "premise": _s(i),
        "hypothesis": _s(i, 1),
        "label": i % 3,
        "reason": "",
    },
    "medqa_4options": lambda i: {
        "id": str(i),
        "sent1": _s(i),
        "sent2": "",
        **{f"ending{k}": _a(i, k) for k in range(4)},
        "label": i % 4,
    },
    "pubmedqa": lambda i: {
        "CONTEXTS": [_s(i)],
        "QUESTION": _a(i),
        "final_decision": ["yes", "no", "maybe"][i % 3],
    },
    "truthfulqa-multi_mc2_en": _truthful,
    "mela_en": lambda i: {"sentence": _s(i), "label": i % 2},
    "ethics_cm": lambda i: {"label": i % 2, "input": _s(i), "is_short": True, "edited": False},
    "assin_entailment": lambda i: {"premise": _s(i), "hypothesis": _s(i, 1), "entailment_judgment": i % 2},
    "webqs": lambda i: {"url": "", "question": _s(i), "answers": [_a(i), _a(i, 1)]},
    "gsm8k": lambda i: {"question": f"What is {i} + 1?", "answer": f"{i} + 1 = {i + 1}\n#### {i + 1}"},
    "hendrycks_math_algebra": _math,
    "super_glue-boolq-t5-prompt": lambda i: {"passage": _s(i), "question": _a(i), "idx": i, "label": i % 2},
    "boolq-seq2seq": lambda i: {"passage": _s(i), "question": f"is it {_a(i)}", "idx": i, "label": i % 2},
    "coqa": _coqa,
    "drop": _drop,
    "triviaqa": lambda i: {"question": _s(i), "answer": {"aliases": [_a(i), _a(i, 1)], "value": _a(i)}},
    "nq_open": lambda i: {"question": _s(i), "answer": [_a(i), _a(i, 1)]},
    "babi": lambda i: {"passage": _s(i), "question": "Where?", "answer": _a(i), "task": 1},
    "fld_default": lambda i: {"prompt_serial": _s(i), "world_assump_label": ["PROVED", "DISPROVED"][i % 2]},
    "mgsm_direct_en": lambda i: {"question": f"Question: {i} + 1?", "answer": "x", "answer_number": i + 1},
    "catalanqa": lambda i: {
        "context": _s(i),
        "question": "Qui?",
        "answers": [{"text": _a(i), "answer_start": 4}],
    },
    "qasper_freeform": _qasper,
    # Without a training split apart from what they are scored on, or of a type that is not trained on:
    "truthfulqa_mc1": _truthful,
    "blimp_adjunct_island": lambda i: {"sentence_good": _s(i), "sentence_bad": _s(i, 1)},
    "aime": lambda i: {"Question": _s(i), "Answer": str(i)},
    "lambada_openai": lambda i: {"text": _s(i)},
    "wikitext": lambda i: {"page": _s(i)},
}


@dataclass(frozen=True)
class Own:
    """A task of our own: its YAML beyond the data, and files beside it.

    Attributes:
        name: the task's name, or the group's or tag's to ask for.
        splits: the splits its data has.
    """

    yaml: str
    name: str = "own"
    files: dict[str, str] = field(default_factory=dict)
    splits: tuple[str, ...] = ("train", "test")


def own_doc(i: int) -> Doc:
    """A document with a little of everything."""
    return {
        "question": _s(i),
        "options": _options(i),
        "gold": i % 4,
        "letter": "ABCD"[i % 4],
        "also": [i % 4, (i + 1) % 4],
        "answer": _a(i),
        "answers": [_a(i), _a(i, 1)],
        "story": f"{_s(i)} It was the",
        "end": f" {_a(i)}",
    }


_CHOICE = """\
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: options
doc_to_target: gold
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
_GENERATE = """\
output_type: generate_until
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: answer
generation_kwargs: {until: ["\\n"], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
_BOTH = "training_split: train\ntest_split: test\n"
_MEMBERS = "".join(f"  - {{task: own_{k}, include: base.yaml}}\n" for k in "ab")
OWN: dict[str, Own] = {
    "letters as options": Own(
        _CHOICE.replace("doc_to_choice: options", "doc_to_choice: [A, B, C, D]").replace(": gold", ": letter")
        + _BOTH
    ),
    # lm-eval itself cannot write a list of indices as a few-shot answer.
    "several right options": Own(_CHOICE.replace(": gold", ": also") + _BOTH + "num_fewshot: 0\n"),
    "target as template": Own(_CHOICE.replace(": gold", ': "{{options[gold]}}"') + _BOTH),
    "doc_to_choice, a function": Own(
        _CHOICE.replace(": options", ": !function own_utils.choices") + _BOTH,
        files={"own_utils.py": "def choices(doc):\n    return [f'it is {o}' for o in doc['options']]\n"},
    ),
    "contexts as options (winogrande's way)": Own(
        _CHOICE.replace('"Question: {{question}}\\nAnswer:"', "!function own_utils.index")
        .replace(": options", ": !function own_utils.starts")
        .replace(": gold", ": !function own_utils.rest")
        + _BOTH,
        files={
            "own_utils.py": "def index(doc):\n    return doc['gold']\n\n\ndef starts(doc):\n"
            "    return [f'The story of {o}:' for o in doc['options']]\n\n\n"
            "def rest(doc):\n    return doc['question']\n"
        },
    ),
    "process_docs": Own(
        _CHOICE + _BOTH + "process_docs: !function own_utils.process\n",
        files={
            "own_utils.py": "def process(dataset):\n    return dataset.map(lambda d: {'question': "
            "d['question'].upper()})\n"
        },
    ),
    "acc_mutual_info": Own(_CHOICE.replace("metric: acc,", "metric: acc_mutual_info,") + _BOTH),
    "custom_dataset, a function": Own(
        _CHOICE + _BOTH + "custom_dataset: !function own_utils.load\n",
        files={
            "own_utils.py": "import datasets\n\n\ndef load(data_files=None, **_):\n"
            "    return datasets.load_dataset('json', data_files=data_files)\n"
        },
    ),
    "description and gen_prefix": Own(
        _CHOICE + _BOTH + 'description: "Choose well.\\n\\n"\ngen_prefix: "I say"\n'
    ),
    "few-shot samples in the YAML": Own(
        _CHOICE
        + _BOTH
        + "fewshot_config:\n  sampler: first_n\n  samples:\n"
        + "".join(f"  - {{question: 'Which {k}?', options: [a, b, c, d], gold: {k}}}\n" for k in (0, 1, 2))
    ),
    "several targets (generation)": Own(_GENERATE.replace(": answer\n", ": answers\n") + _BOTH),
    "chat, examples as turns (choice)": Own(_CHOICE + _BOTH),
    "chat, examples as turns (generation)": Own(_GENERATE + _BOTH),
    "chat with gen_prefix": Own(_GENERATE + _BOTH + 'gen_prefix: "The answer is"\n'),
    "loglikelihood with a training split": Own(
        'output_type: loglikelihood\ndoc_to_text: story\ndoc_to_target: end\ntarget_delimiter: ""\n'
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n" + _BOTH
    ),
    "one split only": Own(_CHOICE + "test_split: test\n", splits=("test",)),
    "trained and scored on one split": Own(
        _CHOICE + "training_split: test\ntest_split: test\n", splits=("test",)
    ),
    "no split to score on": Own(_CHOICE + "training_split: train\n", splits=("train",)),
    "rolling log-likelihood": Own(
        "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: story\n"
        "metric_list: [{metric: word_perplexity}]\n" + _BOTH
    ),
    "a group": Own(
        _CHOICE + _BOTH, name="own_group", files={"group.yaml": "group: own_group\ntask: [own]\n"}
    ),
    "a tag": Own(_CHOICE + _BOTH + "tag: own_tag\n", name="own_tag"),
}
