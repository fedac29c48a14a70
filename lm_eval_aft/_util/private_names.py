"""Checks of the private or undocumented names of other libraries that this package uses.

Such a name may go, or come to mean something else, with any release. Each is listed in
``private_names.toml`` with where and why it is used, what happens without it, and a check that a test and
`aft doctor` run; code that cannot do without one asks for it by `borrowed` or `require`, so that its loss is
an error that names the library.

A test reads the source for names with a leading underscore and fails where one is not among ``words``.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from lm_eval_aft._util.errors import AFTError

NAMES: Mapping[str, PrivateName]  # by key; read when first asked for


@dataclass(frozen=True)
class PrivateName:
    """One name, or a few that come and go together; the fields are explained in ``private_names.toml``."""

    key: str  # ``LIBRARY: NAME``, by which `borrowed` and `require` know it
    used_in: Sequence[str]
    why: str
    when_gone: str
    words: Sequence[str] = ()
    optional: bool = False
    has: Sequence[str] = ()
    config: Sequence[str] = ()
    sets: Mapping[str, Sequence[str]] = field(default_factory=dict)
    takes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    reads: Mapping[str, str] = field(default_factory=dict)
    tried: str = ""

    @property
    def library(self) -> str:
        """The distribution that has it."""
        return self.key.partition(": ")[0]

    @property
    def name(self) -> str:
        """What it is called there."""
        return self.key.partition(": ")[2]

    def problem(self) -> str:
        """What is wrong with the name in the library that is installed; ``""`` when nothing is."""
        try:
            fine = all(self._findings())
        except Exception as error:  # whatever looking for a name that is gone comes to
            return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
        return "" if fine else "it is gone, or not as it was"

    def _findings(self) -> Iterator[bool]:
        """The outcomes of the checks in turn; a name that is not there is an error of any kind."""
        for place in self.has:
            resolve_name(place)
        yield from (hasattr(_llama_config(), name) for name in self.config)
        for place, names in self.sets.items():
            kind = resolve_name(place)
            source = "".join(inspect.getsource(base) for base in kind.__mro__[:-1])
            for name in names:
                if not (hasattr(kind, name) or re.search(rf"self\.{name}\b[^=\n]*=[^=]", source)):
                    raise AttributeError(f"{kind.__name__}.{name}")
        for place, names in self.takes.items():
            yield set(names) <= set(_parameters(resolve_name(place)))
        for place, code in self.reads.items():
            yield "".join(code.split()) in "".join(inspect.getsource(resolve_name(place)).split())
        if self.tried:
            yield bool(globals()[f"_{self.tried}"]())


@cache
def _names() -> dict[str, PrivateName]:
    table = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
    found = {}
    for key, given in table.items():
        own = {"used_in": given.pop("used_in").split(), "words": re.findall(r"\b_[a-z]\w*", key)}
        found[key] = PrivateName(key, **own | given)
    return found


def __getattr__(name: str) -> Any:
    if name == "NAMES":
        return _names()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def version(library: str) -> str:
    """The installed version of a distribution; ``"not installed"`` without one."""
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return "not installed"


def gone(key: str, error: BaseException | str = "") -> AFTError:
    """What to raise when the name listed as ``key`` is not there."""
    entry = _names()[key]
    told = f" ({error})" if str(error) else ""
    return AFTError(
        f"{entry.library} {version(entry.library)} does not have {entry.name} as this version of "
        f"lm-eval-aft needs it, for {entry.why}{told}.",
        f"Install another {entry.library}, upgrade lm-eval-aft, or report it with what `aft doctor` says.",
    )


@contextmanager
def borrowed(key: str) -> Iterator[None]:
    """Inside the block a name that is not there raises the error of `gone`.

    Keep the block to taking the name: other errors of these kinds would be misread.
    """
    try:
        yield
    except (ImportError, AttributeError) as error:
        raise gone(key, error) from error


def require(key: str) -> None:
    """Raise the error of `gone` unless the listed name passes its check."""
    reason = _names()[key].problem()
    if reason:
        raise gone(key, reason)


def _parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


# What models call their key-value cache, the newest name first: transformers renamed it in 5.24.
CACHE_ARGUMENTS = ("cache", "past_key_values")
# What models ask of a cache that they are handed: `Slots` answers the first three, and inherits
# answers to the others that hold for it too.
CACHE_CALLS = frozenset({"update", "get_seq_length", "get_mask_sizes"})
CACHE_INHERITED = frozenset(
    {"get_query_offset", "is_compileable", "is_sliding", "is_linear", "is_dummy", "layers"}
)


def _keyword(model: Any) -> str:
    found = [name for name in CACHE_ARGUMENTS if name in _parameters(model.forward)]
    if not found:
        raise AttributeError(f"{getattr(model, '__name__', type(model).__name__)} takes no cache")
    return found[0]


def _cache_keyword() -> bool:
    """The models that ship with transformers take a cache by a name that is known."""
    from transformers import GPT2LMHeadModel, LlamaForCausalLM

    return all(map(_keyword, (LlamaForCausalLM, GPT2LMHeadModel)))


def asked_of_a_cache(model: Any) -> set[str]:
    """Which attributes of its cache a model's passes ask for, over a prompt and two tokens more."""
    import torch
    from transformers import DynamicCache

    asked: set[str] = set()

    class Watched(DynamicCache):
        def __getattribute__(self, name: str) -> Any:
            caller = sys._getframe(1)
            theirs = str(caller.f_globals.get("__name__", "")).startswith("transformers.")
            # What the cache's own methods ask for is the inherited answer, not the model's question.
            if theirs and name[:2] != "__" and caller.f_locals.get("self") is not self:
                asked.add(name)
            return super().__getattribute__(name)

    cache = {_keyword(model): Watched()}
    with torch.no_grad():
        for ids in ([[2, 3, 4]], [[5, 6]]):
            model(input_ids=torch.tensor(ids), use_cache=True, **cache)
    return asked


def _cache_calls() -> bool:
    import torch
    from transformers import LlamaForCausalLM

    with torch.random.fork_rng([]):
        asked = asked_of_a_cache(LlamaForCausalLM(_llama_config()).eval())
    if more := sorted(asked - CACHE_CALLS - CACHE_INHERITED):
        raise AttributeError(f"models ask a cache for {', '.join(more)} too")
    return asked >= CACHE_CALLS


def _llama_config() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=16, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )


def _rope_parameters() -> bool:
    from transformers import LlamaConfig

    scaled = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    return bool(LlamaConfig(rope_parameters=scaled).rope_parameters["rope_type"] == "dynamic")


def _blocks_take_hidden_states() -> bool:
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    return _parameters(LlamaDecoderLayer.forward)[1] == "hidden_states"


def _execution_device() -> bool:
    import torch
    from accelerate import cpu_offload

    module = cpu_offload(torch.nn.Sequential(torch.nn.Linear(2, 2)), execution_device=torch.device("cpu"))
    return torch.device(module[0]._hf_hook.execution_device).type == "cpu"


def _device_map() -> bool:
    import torch
    from accelerate import dispatch_model

    module = dispatch_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), {"": "cpu"}, force_hooks=True)
    return bool(module.hf_device_map == {"": "cpu"})


def _attention_counted() -> bool:
    """Attention on a CPU runs the two kernels that are counted, forwards and backwards."""
    import torch
    import torch.nn.functional as F
    from torch.utils.flop_counter import FlopCounterMode

    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    back = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    ran: list[str] = []

    def noting(name: str) -> Callable[..., int]:
        def count(*_: Any, **__: Any) -> int:
            ran.append(name)
            return 0

        return count

    query = torch.ones(1, 2, 16, 8, requires_grad=True)
    counted = {kernel: noting("forward"), back: noting("backward")}
    with FlopCounterMode(display=False, custom_mapping=counted):
        torch.autograd.backward(F.scaled_dot_product_attention(query, query, query).sum())
    return ran == ["forward", "backward"]


def _onednn() -> bool:
    """A small product by oneDNN's kernels, which PyTorch has for itself, comes to the plain one."""
    import torch
    import torch.nn.functional as F

    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return True
    generator = torch.Generator().manual_seed(0)
    inputs, weight = (torch.randn(rows, 32, generator=generator) for rows in (8, 48))
    reordered = torch.ops.mkldnn._reorder_linear_weight(weight, 8)
    found = torch.ops.mkldnn._linear_pointwise(inputs, reordered, None, "none", [], "")
    return torch.allclose(found, F.linear(inputs, weight), atol=1e-4)


def _ties() -> bool:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model: Any = LlamaForCausalLM(LlamaConfig(vocab_size=8, tie_word_embeddings=True, **sizes))
    return bool(model.all_tied_weights_keys == {"lm_head.weight": "model.embed_tokens.weight"})


def _compiled_module() -> bool:
    import torch

    module = torch.nn.Linear(2, 2)
    compiled: Any = torch.compile(module)
    module.compile()
    return compiled._orig_mod is module and module._compiled_call_impl is not None


def _registry() -> bool:
    importlib.import_module("lm_eval.models")
    table = resolve_name("lm_eval.api.registry:model_registry")
    return "target" in _parameters(table.register) and "hf" in table


def _cache_hook() -> bool:
    """lm-eval hands its cache to the model, and one table of it is used for looking up and for writing."""
    caching_lm = resolve_name("lm_eval.api.model:CachingLM")
    handed: list[Any] = []

    class Stub:
        def set_cache_hook(self, hook: Any) -> None:
            handed.append(hook)

    with tempfile.TemporaryDirectory() as folder:
        caching = caching_lm(Stub(), str(Path(folder) / "answers.db"))
        try:
            return bool(handed) and handed[0].dbdict is caching.dbdict
        finally:
            caching.dbdict.close()


def _table_renamed() -> bool:
    """A `SqliteDict` reads and writes the table that its ``tablename`` names, changed at any time."""
    from sqlitedict import SqliteDict

    with tempfile.TemporaryDirectory() as folder:
        database = SqliteDict(str(Path(folder) / "answers.db"), autocommit=True)
        try:
            database["asked"] = 1
            database.tablename = "other"
            database.conn.execute('CREATE TABLE IF NOT EXISTS "other" (key TEXT PRIMARY KEY, value BLOB)')
            database.conn.commit()
            apart = "asked" not in database
            database["asked"] = 2
            return apart and database["asked"] == 2
        finally:
            database.close()


def _adapters() -> bool:
    """Adapters keep what they hold where an export writes it."""
    import peft
    import torch

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = torch.nn.Linear(2, 2)

    biased = peft.get_peft_model(Model(), peft.BeftConfig(target_modules=["one"]))
    lora = peft.get_peft_model(Model(), peft.LoraConfig(r=1, lora_bias=True, target_modules=["one"]))
    layer = lora.base_model.model.one
    return bool(
        biased.base_model.model.one.beft_bias["default"].numel() == 2
        and layer.lora_A["default"].weight.shape == (1, 2)
        and layer.lora_B["default"].bias.shape == (2,)
    )


def _hub_errors() -> bool:
    from huggingface_hub import errors

    return errors.HfHubHTTPError.__mro__[1] not in (OSError, Exception)


def _header_bytes() -> bool:
    """A safetensors file is eight bytes of length, that many of JSON, then the numbers."""
    import json

    import torch
    from safetensors.torch import save

    data = save({"a": torch.ones(2)}, {"key": "value"})
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    return header == {"__metadata__": {"key": "value"}, "a": entry} and len(data) == 8 + length + 8


def _storage_address() -> bool:
    import torch

    return isinstance(torch.ones(1).untyped_storage()._cdata, int)


def _encode_pair() -> bool:
    encode = resolve_name("lm_eval.models.huggingface:HFLM._encode_pair")
    return _parameters(encode)[1:] == ["context", "continuation"]


def _offline_switch() -> bool:
    config = importlib.import_module("datasets.config")
    return hasattr(config, "HF_HUB_OFFLINE") or hasattr(config, "HF_DATASETS_OFFLINE")
