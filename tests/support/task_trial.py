"""One task through training and scoring, against lm-eval's own requests, metrics and model."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM

from lm_eval_aft import AFTError
from lm_eval_aft.harness.examples import Example, Extractor, PromptSettings
from lm_eval_aft.harness.tasks import list_tasks, load_task, task_manager_for
from lm_eval_aft.lm import AFTLM
from lm_eval_aft.steering.backbone import find_backbone
from lm_eval_aft.training.recipe import TrainingPlan
from lm_eval_aft.training.run import run
from lm_eval_aft.training.setup import prepare
from tests.support.task_data import OWN, STOCK, own_doc
from tests.support.trial import LAYER, instances, plain_hook

TRAIN, REST, LIMIT = 16, 6, 4
CASES = [*STOCK, *OWN]


@dataclass
class TaskRow:
    """A line of the table: what a task is made of, and what came of it."""

    name: str
    kind: str = "-"
    features: list[str] = field(default_factory=list)
    trained: str = "-"
    marked: str = "-"
    scored: str = "-"
    why: str = ""

    @property
    def verdict(self) -> str:
        return "refused" if self.why else "passed"


def byte_model() -> AFTLM:
    """A tiny Llama that reads bytes, so that all texts differ."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    from tests.support.families import tiny_tokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {word: i for i, word in enumerate(["<eos>", "<pad>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(words, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", bos_token="<eos>", pad_token="<pad>"
    )
    fast.chat_template = tiny_tokenizer().chat_template
    config = transformers.LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=4096,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4)
    return AFTLM(model, tokenizer=fast, device="cpu", batch_size=4)


def stock_file(name: str) -> Path:
    """Where lm-eval defines a task."""
    from lm_eval_aft.harness.tasks import find_definition

    found = find_definition(name, [])
    assert found is not None, f"lm-eval has no task {name}"
    return found


def lay_out(case: str, folder: Path) -> str:
    """Write the case's YAML and data into ``folder``; return the name to ask for."""
    folder.mkdir()
    own = OWN.get(case)
    if own is None:
        from lm_eval.tasks._yaml_loader import load_yaml

        source = stock_file(case)
        config = load_yaml(source, resolve_func=False, recursive=True)
        keys = ("training_split", "validation_split", "test_split", "fewshot_split")
        splits = list(dict.fromkeys(str(config[key]) for key in keys if config.get(key)))
        written: dict[str, Any] = {
            "include": str(source),
            "task": case,
            "dataset_path": "json",
            "dataset_name": None,
        }
        if case in ("gsm8k", "babi"):
            written["generation_kwargs"] = {"until": ["\n"], "do_sample": False, "max_gen_toks": 6}
        text, make, name = yaml.safe_dump(written), STOCK[case], case
    else:
        for file, content in own.files.items():
            (folder / file).write_text(content)
        splits = list(own.splits)
        text, make, name = f"task: own\ndataset_path: json\n{own.yaml}", own_doc, own.name
    files = {}
    for k, split in enumerate(splits):
        path = folder / f"{split}.jsonl"
        count = TRAIN if split.startswith("train") else REST
        path.write_text("".join(json.dumps(make(100 * k + i)) + "\n" for i in range(count)))
        files[split] = str(path)
    (folder / "task.yaml").write_text(text + yaml.safe_dump({"dataset_kwargs": {"data_files": files}}))
    return name


def tried_task(case: str, work: Path, lm: AFTLM | None = None) -> TaskRow:
    """The table's line for one case.

    Raises:
        AssertionError: a prompt, a target or a number is not lm-eval's. Whatever else it raises is a fault.
    """
    lm = lm or byte_model()
    lm.steer(None)
    row = TaskRow(case)
    folder = work / "tasks"
    name = lay_out(case, folder)
    config = yaml_config(folder, case)
    row.kind = config["output_type"] if config else "python"
    row.features = _features(config)
    chat = case.startswith("chat")
    listed = _listed(name, folder)
    shots = 0 if config.get("num_fewshot") == 0 else 2
    prompts: dict[str, Any] = {"apply_chat_template": chat, "fewshot_as_multiturn": chat}
    settings: dict[str, Any] = {
        "protocol": "rapid",
        "layers": str(LAYER),
        "lr": 0.05,
        "epochs": 1,
        "batch_size": 4,
        "train_docs": 6,
        "selection_docs": 5,
        "include_path": (str(folder),),
    }
    try:
        settings["prompts"] = PromptSettings(shots, chat, None, chat)
        prepared = prepare(lm, TrainingPlan.of(name, **settings))
        result = run(prepared, None, progress=False)
    except AFTError as error:
        row.why = f"{error.what} {error.hint}".replace(str(work), "").split(" Nearest")[0]
        row.trained = row.scored = "refused"
        # What a task's own code imports is not known before it is loaded.
        assert not listed or "cannot be imported" in row.why, "aft tasks --trainable lists what is refused"
        return row
    assert listed, "aft tasks --trainable leaves out what works"
    row.trained = prepared.objective.name
    extractor = prepared.splits.extractor
    task = extractor.task
    _prompts_are_the_harnesss(task, extractor, folder, name, shots, prompts, lm)
    _selection_score_is_plain(prepared, result, lm)
    row.marked = _gold_is_marked(task, extractor, prepared)
    _scores_are_stocks(name, folder, lm, result.vector, prompts, shots)
    row.scored = "as stock"
    return row


def _listed(name: str, folder: Path) -> bool:
    """Whether `aft tasks --trainable` would list it, or every task of a group or tag."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    several = name in manager.all_tasks and name not in manager.all_subtasks
    names = list(manager.load(name)["tasks"]) if several else [name]
    return all(any(task.trainable for task in list_tasks(each, manager=manager)) for each in names)


def yaml_config(folder: Path, case: str) -> dict[str, Any]:
    from lm_eval.tasks._yaml_loader import load_yaml

    found: dict[str, Any] = load_yaml(folder / "task.yaml", resolve_func=False, recursive=True)
    return {"output_type": "generate_until", **found}


def _features(config: dict[str, Any]) -> list[str]:
    keys = (
        "doc_to_text",
        "doc_to_target",
        "doc_to_choice",
        "process_docs",
        "process_results",
        "custom_dataset",
    )
    found = [f"{key}()" for key in keys if _is_function(config.get(key), key)]
    return [*found, *(key for key in ("fewshot_config", "filter_list", "gen_prefix") if config.get(key))]


def _is_function(value: Any, key: str) -> bool:
    whole = ("process_docs", "process_results", "custom_dataset")
    return isinstance(value, str) and bool(value) and (key in whole or value.startswith(("/", "own_utils.")))


def _prompts_are_the_harnesss(
    task: Any, extractor: Extractor, folder: Path, name: str, shots: int, prompts: dict[str, Any], lm: AFTLM
) -> None:
    task.set_fewshot_seed(1234)
    docs = [doc for _, doc in zip(range(LIMIT), task.eval_docs, strict=False)]
    mine = [extractor.requests(doc) for doc in docs]
    theirs = load_task(name, [folder])
    if theirs.get_config("num_fewshot") != 0:
        theirs.set_config("num_fewshot", shots)
    theirs.set_fewshot_seed(1234)
    template = lm.apply_chat_template if prompts["apply_chat_template"] else None
    theirs.build_all_requests(limit=LIMIT, rank=0, world_size=1, chat_template=template, **prompts)
    by_doc: dict[int, list[Any]] = {}
    for instance in theirs.instances:
        by_doc.setdefault(instance.doc_id, []).append(instance.args)
    assert mine == [by_doc[i] for i in range(len(docs))]


def _selection_score_is_plain(prepared: Any, result: Any, lm: AFTLM) -> None:
    """The baseline's cross-entropy on the selection split, from stock's log-likelihoods of the strings."""
    stock = HFLM(lm.model, tokenizer=lm.tokenizer, device="cpu", batch_size=1)
    losses = []
    for example in prepared.splits.selection:
        asked = instances(example.requests, "loglikelihood")
        values = np.array([value for value, _ in stock.loglikelihood(asked, disable_tqdm=True)])
        if prepared.objective.name == "lm":
            losses.append(-values[0] / len(stock._encode_pair(*example.requests[0])[1]))
            continue
        if prepared.objective.metric == "acc_norm":
            lengths = np.array(example.lengths)
            values = values / lengths * lengths.mean()
        logs = values - np.logaddexp.reduce(values)
        losses.append(-np.logaddexp.reduce(logs[list(example.gold)]))
    found = result.sweep.baseline.cross_entropy
    assert math.isclose(found, float(np.mean(losses)), rel_tol=1e-4), (found, float(np.mean(losses)))


def _gold_is_marked(task: Any, extractor: Extractor, prepared: Any) -> str:
    """Does the task's own metric reward what training moves towards?"""
    verdicts = {_marked(task, example) for example in prepared.splits.selection}
    if verdicts == {None}:
        return "no metric of single documents"
    return "yes" if verdicts == {True} else "not always"


def _marked(task: Any, example: Example) -> bool | None:
    doc = example.doc
    if task.OUTPUT_TYPE == "multiple_choice":
        choices = len(example.requests)
        right = [(0.0 if i in example.gold else -50.0 - i, i in example.gold) for i in range(choices)]
        results: Any = right
        if "acc_mutual_info" in task.aggregation():
            results = right + [(0.0, False)] * choices
        wrong = [(-50.0 - i if i in example.gold else 0.0, False) for i in range(choices)]
        wrong = wrong + [(0.0, False)] * (len(results) - choices)
        good, bad = (_first(task, doc, each) for each in (results, wrong))
        return None if good is None or bad is None else good > bad
    if task.OUTPUT_TYPE == "loglikelihood":
        return bool(_first(task, doc, [(0.0, True)]) == 1)
    if not task.config.metric_list and task.config.process_results is None:
        return None
    good = _first(task, doc, [example.requests[0][1].strip()])
    return None if good is None else good > 0


def _first(task: Any, doc: dict[str, Any], results: Sequence[Any]) -> float | None:
    """The first metric that is a number for one document."""
    for value in task.process_results(doc, list(results)).values():
        if isinstance(value, bool | int | float | np.number):
            return float(value)
    return None


def _all_samples(results: dict[str, Any]) -> list[dict[str, Any]]:
    return [sample for _, samples in sorted(results["samples"].items()) for sample in samples]


def _scores_are_stocks(
    name: str, folder: Path, lm: AFTLM, vector: Any, prompts: dict[str, Any], shots: int
) -> None:
    manager = task_manager_for([name], [folder])
    stock = HFLM(lm.model, tokenizer=lm.tokenizer, device="cpu", batch_size=1)
    found = []
    for ours in (True, False):
        lm.steer(vector if ours else None, allow_mismatch=False)
        shift = None if ours else vector.layers[LAYER] * vector.coefficient
        with plain_hook(find_backbone(lm.model).blocks[LAYER], shift):
            found.append(
                simple_evaluate(
                    lm if ours else stock,
                    tasks=[name],
                    num_fewshot=shots,
                    limit=LIMIT,
                    task_manager=manager,
                    log_samples=True,
                    bootstrap_iters=0,
                    gen_kwargs={"max_gen_toks": 6},
                    **prompts,
                )
            )
    lm.steer(None)
    for mine, theirs in zip(*map(_all_samples, found), strict=True):
        assert mine["arguments"] == theirs["arguments"]
        for one, other in zip(mine["resps"], theirs["resps"], strict=True):
            if isinstance(one[0], str):
                assert one == other
            else:
                assert abs(one[0][0] - other[0][0]) <= max(1e-4, 1e-6 * abs(other[0][0]))
                assert one[0][1] == other[0][1]
    numbers = [
        {
            (task, key): value
            for task, scores in each["results"].items()  # of a group or tag: those of its tasks
            for key, value in scores.items()
            if isinstance(value, float | int)
        }
        for each in found
    ]
    assert numbers[0].keys() == numbers[1].keys()
    for key, value in numbers[1].items():
        assert numbers[0][key] == value or math.isclose(numbers[0][key], value, rel_tol=1e-3), (key, numbers)
