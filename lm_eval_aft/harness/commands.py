"""The ``lm_eval`` and ``aft eval`` commands that messages, model cards and reports print.

Run, they score again what was trained or scored: every setting of the prompts and every model argument is
in them.
"""

from __future__ import annotations

import ast
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval_aft.demo import command_name
from lm_eval_aft.harness.tasks import find_definition, tasks_path
from lm_eval_aft.library.entry import task_names

# Printed instead of the folder of this package's own tasks, which lies elsewhere on another machine.
_OUR_TASKS = '"$(aft tasks-path)"'


def pairs(values: Mapping[str, Any]) -> str:
    """``key=value,key=value`` if lm-eval reads the same values back from it, else JSON, which it reads too.

    >>> pairs({"revision": "main", "load_in_8bit": True})
    'revision=main,load_in_8bit=True'
    >>> pairs({"until": ["a", "b"]})
    '{"until": ["a", "b"]}'
    """
    texts = {key: str(value).removeprefix("torch.") for key, value in values.items()}
    if all(_reads_back(value, texts[key]) for key, value in values.items()):
        return ",".join(f"{key}={text}" for key, text in texts.items())
    return json.dumps(dict(values), default=lambda value: str(value).removeprefix("torch."))


def _reads_back(value: Any, text: str) -> bool:
    if set(text) & set(",[](){}'\"\n") or text != text.strip():
        return False
    if not isinstance(value, str):
        return True
    try:  # lm-eval would make a number, a boolean or None of it
        float(text)
    except ValueError:
        try:
            ast.literal_eval(text)
        except (ValueError, SyntaxError):
            return text.lower() not in ("true", "false", "none")
    return False


def lm_eval_flags(settings: Mapping[str, Any]) -> list[str]:
    """Flags of ``lm_eval run`` from their values, by the flags' names; those that say nothing are left out.

    >>> lm_eval_flags({"num_fewshot": 5, "apply_chat_template": True, "limit": None, "seed": [0, 1, 2, 3]})
    ['--num_fewshot', '5', '--apply_chat_template', '--seed', '0,1,2,3']
    """
    words = []
    for name, value in settings.items():
        # A template turns fewshot_as_multiturn on unless it is set to false.
        if value in (None, "", {}) or (value is False and name != "fewshot_as_multiturn"):
            continue
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, Mapping):
            # lm-eval 0.4.12 reads these as JSON only.
            text = json.dumps(value) if name in ("samples", "metadata") else pairs(value)
        else:
            text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            text = "false" if value is False else text
        if value is True:
            words.append(f"--{name}")
        elif text.startswith("-"):  # argparse would take it for a flag
            words.append(f"--{name}={text}")
        elif text:
            words += [f"--{name}", text]
    return words


def lm_eval_command(
    model: str, model_args: Mapping[str, Any], tasks: Sequence[str], settings: Mapping[str, Any]
) -> str:
    """``lm_eval --model MODEL ...``; ``settings`` as `lm_eval_flags` takes them."""
    head = ["lm_eval", "--model", model, *lm_eval_flags({"model_args": model_args, "tasks": list(tasks)})]
    return _joined([*head, *lm_eval_flags(settings)])


def aft_eval_command(
    model: str,
    model_args: Mapping[str, Any],
    tasks: Sequence[str],
    settings: Mapping[str, Any],
    *,
    vector: str,
    output: str,
    placebo: str | None = None,
) -> str:
    """``aft eval --model MODEL --vector VECTOR ...``; ``settings`` as `lm_eval_flags` takes them."""
    words = ["aft", "eval", "--model", model, "--vector", vector, "--tasks", ",".join(tasks)]
    words += [*(["--placebo", placebo] if placebo else []), "--output", output]
    if model_args:
        words += ["--model-args", pairs(model_args)]
    flags = lm_eval_flags(settings)
    return _joined([*words, *(["--", *flags] if flags else [])])


def vector_command(meta: Mapping[str, Any], vector: str, output: str | None = None) -> str:
    """The command that scores a trained vector with the model and the prompts it was trained with.

    It may hold line breaks where a system instruction does: show it in a fenced block, not an indented one.

    Args:
        meta: the vector's metadata; read are ``base_model`` (``name``, ``revision`` and the other model
            arguments, ``args``), ``task`` and ``tasks``, ``task_spec`` (as it was given), ``prompts``,
            ``include_path`` and ``task_metadata``.
        vector: the vector as the command should name it.
        output: folder for the results of an ``aft eval`` command, with three placebos; without it, the
            command is ``lm_eval``.
    """
    model, arguments = base_model(meta)
    specs = str(meta.get("task_spec") or ",".join(task_names(meta)) or "TASK")
    included = meta.get("include_path") or ()
    sources = {name.strip(): _definition(name.strip(), included) for name in specs.split(",")}
    tasks, folder = task_words(sources)
    if folder is None and included and None in sources.values():  # groups, tags and patterns are in no file
        folder = str(included[0])
    settings = {
        **(meta.get("prompts") or {"num_fewshot": meta.get("num_fewshot")}),
        "include_path": folder,
        "metadata": meta.get("task_metadata"),
    }
    if output is None:
        given = {"pretrained": model, **arguments, "vector": vector}
        return lm_eval_command("aft", given, tasks, settings)
    if folder == _OUR_TASKS:  # `aft` knows them
        del settings["include_path"]
    return aft_eval_command(
        model, arguments, tasks, settings, vector=vector, output=output, placebo="random:3"
    )


def base_model(meta: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The name of the model that a vector was trained on, and the arguments it was loaded with."""
    base = meta.get("base_model") or {}
    arguments = dict(base.get("args") or {})
    if base.get("revision") not in (None, "", "main"):
        arguments.setdefault("revision", base["revision"])
    return command_name(str(base.get("name") or "MODEL")), arguments


def _definition(name: str, include_path: Sequence[str | Path]) -> Path | None:
    """The file that defines a task; ``None`` for one named by its file, and where it is no longer found."""
    if name.endswith((".yaml", ".yml")) or not all(Path(folder).exists() for folder in include_path):
        return None
    found = find_definition(name, include_path)
    if found is None:
        return None
    for folder in include_path:  # as the user gave it, where it is the only one
        if len(include_path) == 1 and found.is_relative_to(folder):
            return Path(folder) / found.name
    return found


def task_words(sources: Mapping[str, Path | None]) -> tuple[list[str], str | None]:
    """How to name tasks to lm-eval, and the value of its ``--include_path``, which takes one folder only.

    Args:
        sources: task -> the file that defines it, if known. Of tasks that are not lm-eval's own, those in
            the first one's folder are named; others are given by their files.
    """
    import lm_eval.tasks

    stock, ours = Path(lm_eval.tasks.__file__).parent, tasks_path()
    words, folder = [], None
    for name, source in sources.items():
        if source is None or source.is_relative_to(stock) or "lm_eval/tasks" in source.as_posix():
            words.append(name)
            continue
        own = _OUR_TASKS if source.is_relative_to(ours) else str(source.parent)
        folder = folder or own
        words.append(name if own == folder else str(source))
    return words, folder


def _joined(words: Sequence[str]) -> str:
    return " ".join(word if word == _OUR_TASKS else shlex.quote(word) for word in words)
