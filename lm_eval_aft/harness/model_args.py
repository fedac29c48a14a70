"""The arguments of ``--model aft``: their names and types, read strictly.

lm-eval turns ``true`` and ``false`` into booleans and leaves every other word as text, which Python takes
for true: ``answer_only=no`` would remove the questions. So all values are read by one table, `ARGUMENTS`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from lm_eval_aft._util.errors import AFTError

_SWITCH = dict.fromkeys(("yes", "on", "true", "1"), True) | dict.fromkeys(("no", "off", "false", "0"), False)
Reader = Callable[[str, Any], Any]


def switch(name: str, value: Any) -> bool:
    """A boolean: itself, 0 or 1, or yes/no, on/off, true/false in any case.

    >>> switch("fast", "No")
    False

    Raises:
        AFTError: anything else.
    """
    known = isinstance(value, str) or (isinstance(value, int) and value in (0, 1))
    found = _SWITCH.get(str(value).strip().lower()) if known else None
    if found is None:
        raise _refused(name, value, "is neither yes nor no", f"Write {name}=yes or {name}=no.")
    return found


def optional_switch(name: str, value: Any) -> bool | None:
    """As `switch`; None stays."""
    return None if value is None else switch(name, value)


def number(name: str, value: Any) -> float | None:
    """A finite number, or text that is one; None stays.

    Raises:
        AFTError: anything else, booleans among it.
    """
    if value is None:
        return None
    try:
        found = float("nan" if isinstance(value, bool) or "_" in str(value) else value)
    except (TypeError, ValueError, OverflowError):
        found = float("nan")
    if not abs(found) < float("inf"):
        raise _refused(name, value, "is not a number", f"Give a finite one, as in {name}=0.5.")
    return found


def whole(name: str, value: Any) -> int | None:
    """A whole number, or text that is one; None stays.

    Raises:
        AFTError: anything else, booleans among it.
    """
    if value is None or type(value) is int:
        return value
    if not isinstance(value, str) or not re.fullmatch(r"\s*[+-]?[0-9]{1,18}\s*", value):
        raise _refused(name, value, "is not a whole number", f"Give one, as in {name}=128.")
    return int(value)


def text(name: str, value: Any) -> Any:
    """A name or path. lm-eval turns what looks like a number into one; None and objects stay.

    Raises:
        AFTError: a boolean.
    """
    if isinstance(value, bool):
        raise _refused(name, value, "is not a name", f"In quotes it is one: {name}='{str(value).lower()}'.")
    return (str(value) if isinstance(value, int | float) else value) or None


def as_given(_name: str, value: Any) -> Any:
    """Whatever it is."""
    return value


class Argument(NamedTuple):
    """How an argument's value is read, and whether it decides what steers the model, or what is scored."""

    read: Reader
    steers: bool = False


# AFTLM's own, and lm-eval's `hf`'s.
ARGUMENTS: dict[str, Argument] = {
    "vector": Argument(text, steers=True),
    "library": Argument(text, steers=True),
    "route": Argument(text, steers=True),
    "coefficient": Argument(number, steers=True),
    "positions": Argument(text, steers=True),
    "allow_mismatch": Argument(switch, steers=True),
    "answer_only": Argument(switch, steers=True),
    "fast": Argument(switch),
    "blocks": Argument(text),
    "device": Argument(text),
}
OWN = tuple(ARGUMENTS)
STEERING = tuple(name for name, argument in ARGUMENTS.items() if argument.steers)
_OF_HF: dict[Reader, str] = {
    # Those for which None means something are read by `optional_switch`.
    switch: "truncation logits_cache trust_remote_code use_fast_tokenizer parallelize gptqmodel",
    whole: "max_length max_batch_size prefix_token_id",
    as_given: "pretrained backend revision subfolder tokenizer dtype softmax_dtype mixed_precision_dtype "
    "batch_size max_memory_per_gpu max_cpu_memory offload_folder tp_plan peft delta autogptq gguf_file "
    "think_end_token chat_template_args",
}


ARGUMENTS |= {name: Argument(read) for read, names in _OF_HF.items() for name in names.split()}
ARGUMENTS |= dict.fromkeys(("add_bos_token", "enable_thinking"), Argument(optional_switch))
# Those that are names even where they look like numbers.
TEXTS = {name for name, argument in ARGUMENTS.items() if argument.read is text}
TEXTS |= set("pretrained revision subfolder tokenizer peft delta gguf_file".split())
# Arguments of `from_pretrained` whose names are like those above.
_OF_TRANSFORMERS = (
    *("attn_implementation", "cache_dir", "code_revision", "config", "device_map", "force_download"),
    *("local_files_only", "low_cpu_mem_usage", "max_memory", "token", "torch_dtype", "tp_size"),
    *("use_safetensors", "variant", "weights_only"),
)
_ALIKE = 0.85


def read_model_args(given: Mapping[str, Any]) -> dict[str, Any]:
    """Model arguments with their values as the types they should have. Nothing is imported for it.

    Names that are not known are left to transformers, unless they are nearly a known one.

    >>> read_model_args({"answer_only": "No", "coefficient": "0.5", "revision": "main"})
    {'answer_only': False, 'coefficient': 0.5, 'revision': 'main'}

    Raises:
        AFTError: a value of another type, or a misspelt name; the message gives the nearest right one.
    """
    found = {}
    for name, value in given.items():
        if name in ("load_in_4bit", "load_in_8bit", "quantization_config"):
            raise AFTError(
                f"{name}= cannot be given: transformers 5 takes it as part of a quantization_config, which "
                "lm-eval reads from the checkpoint alone.",
                "Give a checkpoint saved with one, or, from Python, load the model with "
                "quantization_config=BitsAndBytesConfig(...) and pass the model itself as pretrained.",
            )
        if name not in ARGUMENTS and name not in _OF_TRANSFORMERS:
            near = nearest(name, _ALIKE)
            if near or not name.strip():
                raise unknown_argument(name, near)
        found[name] = ARGUMENTS[name].read(name, value) if name in ARGUMENTS else value
    return found


def nearest(name: str, alike: float = 0.5) -> str:
    """The known argument that ``name`` may have been meant for; ``""`` where none is near."""
    known = [*ARGUMENTS, *_OF_TRANSFORMERS]
    plain = name.lower().replace("-", "_")
    begun = [each for each in OWN if len(plain) > 2 and each.startswith(plain)]
    return next(iter(begun or difflib.get_close_matches(plain, known, n=1, cutoff=alike)), "")


def unknown_argument(name: str, near: str | None = None) -> AFTError:
    """What to raise for an argument that neither this package, lm-eval nor transformers takes."""
    near = nearest(name) if near is None else near
    what = f"There is no model argument {name[:80]!r}."
    return AFTError(what, f"Did you mean {near}?" if near else f"Our own are: {', '.join(OWN)}.")


def refuse_steering(given: Mapping[str, Any], why: str) -> None:
    """Raise `AFTError` if model arguments steer the model, or change what is scored, where ``why`` says no.

    >>> refuse_steering({"vector": "mine"}, "a study steers by itself")
    Traceback (most recent call last):
    lm_eval_aft._util.errors.AFTError: The model argument vector= has no place here: a study steers by itself.
    Leave it out.
    """
    found = [f"{name}=" for name in STEERING if name in given]
    if found:
        plural = len(found) > 1
        raise AFTError(
            f"The model argument{'s' * plural} {' and '.join(found)} {'have' if plural else 'has'} no place "
            f"here: {why}.",
            f"Leave {'them' if plural else 'it'} out.",
        )


def _refused(name: str, value: Any, why: str, hint: str) -> AFTError:
    return AFTError(f"{name}={str(value)[:80]!r} {why}.", hint)
