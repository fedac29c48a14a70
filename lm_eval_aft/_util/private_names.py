"""Every private or undocumented name of another library that this package uses.

Such a name may go, or come to mean something else, with any release. Each is listed here with where and why
it is used, what happens without it, and a check that a test and `aft doctor` run; code that cannot do
without one asks for it by `borrowed` or `require`, so that its loss is an error that names the library.

A test reads the source for names with a leading underscore and fails where one is not among ``words``.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from lm_eval_aft._util.errors import AFTError


@dataclass(frozen=True)
class PrivateName:
    """One name, or a few that come and go together.

    Attributes:
        key: ``LIBRARY: NAME``, by which `borrowed` and `require` know it.
        places: modules of this package that use it, as paths below it, separated by spaces.
        why: what it is used for.
        when_gone: what happens without it.
        check: true where the name is there and means what it is taken for; may raise.
        words: the identifiers with a leading underscore that this entry accounts for; default: those in
            its name.
        optional: whether the library may be missing altogether.
    """

    key: str
    places: str
    why: str
    when_gone: str
    check: Callable[[], Any]
    words: tuple[str, ...] = ()
    optional: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "words", self.words or tuple(re.findall(r"\b_[a-z]\w*", self.name)))

    @property
    def library(self) -> str:
        """The distribution that has it."""
        return self.key.partition(": ")[0]

    @property
    def name(self) -> str:
        """What it is called there."""
        return self.key.partition(": ")[2]

    @property
    def used_in(self) -> tuple[str, ...]:
        """The modules one by one."""
        return tuple(self.places.split())

    def problem(self) -> str:
        """What is wrong with the name in the library that is installed; ``""`` when nothing is."""
        try:
            fine = bool(self.check())
        except Exception as error:  # whatever looking for a name that is gone comes to
            return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
        return "" if fine else "it is gone, or not as it was"


def version(library: str) -> str:
    """The installed version of a distribution; ``"not installed"`` without one."""
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return "not installed"


def gone(key: str, error: BaseException | str = "") -> AFTError:
    """What to raise when the name listed as ``key`` is not there."""
    entry = NAMES[key]
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
    reason = NAMES[key].problem()
    if reason:
        raise gone(key, reason)


def _has(module: str, *names: str) -> Callable[[], bool]:
    """A check that a module has these names; dots lead into what it holds."""

    def check() -> bool:
        for name in names:
            found: Any = importlib.import_module(module)
            for part in name.split("."):
                found = getattr(found, part)
        return True

    return check


def _source(module: str, name: str) -> str:
    """The source of a class or function of a module, without white space."""
    return re.sub(r"\s+", "", inspect.getsource(getattr(importlib.import_module(module), name)))


def _sets(module: str, name: str, *attributes: str) -> Callable[[], bool]:
    """A check that the methods of a class (or of its bases) set these attributes on ``self``."""

    def check() -> bool:
        kind = getattr(importlib.import_module(module), name)
        source = "".join(inspect.getsource(base) for base in kind.__mro__[:-1])
        for attribute in attributes:
            if not (hasattr(kind, attribute) or re.search(rf"self\.{attribute}\b[^=\n]*=[^=]", source)):
                raise AttributeError(f"{name}.{attribute}")
        return True

    return check


def _all(*checks: Callable[[], Any]) -> Callable[[], bool]:
    return lambda: all(bool(check()) for check in checks)


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


def _slots_answer() -> bool:
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


def _cached_file_options() -> bool:
    from transformers.utils import hub

    options = {"_raise_exceptions_for_missing_entries", "_raise_exceptions_for_connection_errors"}
    return options <= set(_parameters(hub.cached_files))


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


def _compiled_module() -> bool:
    import torch

    module = torch.nn.Linear(2, 2)
    compiled: Any = torch.compile(module)
    return compiled._orig_mod is module


def _registry() -> bool:
    importlib.import_module("lm_eval.models")
    table = importlib.import_module("lm_eval.api.registry").model_registry
    return "target" in _parameters(table.register) and "hf" in table


def _cache_hook() -> bool:
    """lm-eval hands its cache to the model, and one table of it is used for looking up and for writing."""
    caching_lm = importlib.import_module("lm_eval.api.model").CachingLM
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


def _doc_hash() -> bool:
    """lm-eval names a logged document by the digest that vectors keep."""
    evaluator = importlib.import_module("lm_eval.evaluator")
    source = re.sub(r"\s+", "", inspect.getsource(evaluator))
    wanted = (
        "hash_string(json.dumps(requests[0].doc,indent=2,default=handle_non_serializable,ensure_ascii=False"
    )
    return wanted in source


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


_HF = "lm_eval.models.huggingface"
_STUCK = "an error that names lm-eval's version, when the model is made"
_TRIED = "the fast ways are compared with stock on first use, and not used where they differ"

# fmt: off
_LIST = (
    PrivateName("transformers: PreTrainedConfig._attn_implementation",
        "steering/backbone.py engine/compatibility.py training/trainer.py",
        "checking whether attention accepts other masks", "rows are not packed: slower, and right",
        lambda: hasattr(_llama_config(), "_attn_implementation")),
    PrivateName("transformers: PreTrainedModel._is_stateful", "engine/compatibility.py",
        "recognising blocks that carry a state along the row", "rows are not packed: slower, and right",
        _has("transformers", "PreTrainedModel._is_stateful", "MambaForCausalLM._is_stateful")),
    PrivateName("transformers: PreTrainedConfig._name_or_path", "steering/fingerprint.py",
        "the model's name in messages", "messages name the model's class",
        lambda: hasattr(_llama_config(), "_name_or_path")),
    PrivateName("transformers: the keyword of a model's cache (cache, once past_key_values)",
        "steering/backbone.py engine/scorer.py",
        "handing a cache of our own to a model",
        "an error, upon which scoring and generation are left to stock",
        _cache_keyword),
    PrivateName("transformers: what models ask of a cache (update, get_seq_length, get_mask_sizes)",
        "engine/kv_cache.py",
        "a cache of our own, whose rows and columns are chosen", _TRIED,
        _slots_answer),
    PrivateName("transformers: decoder blocks called with hidden_states first", "engine/batching.py",
        "passes that start at a block",
        "partial passes are compared with whole ones on first use, and not used where they differ",
        _blocks_take_hidden_states),
    PrivateName("transformers: pytorch_utils.Conv1D",
        "steering/backbone.py export/merged.py engine/precision.py",
        "GPT-2's linear layers", "their weights stay as they are, and exports have nowhere to write in them",
        _has("transformers.pytorch_utils", "Conv1D")),
    PrivateName("transformers: cached_file(_raise_exceptions_for_...)", "export/base.py",
        "asking for a file of a checkpoint that may not be there",
        "an error that names transformers' version",
        _cached_file_options,
        words=("_raise_exceptions_for_missing_entries", "_raise_exceptions_for_connection_errors")),
    PrivateName("transformers: GenerationConfig._from_model_config", "engine/generation.py",
        "a setting that says nothing about greedy decoding",
        "nothing; a new such setting leaves generation to stock",
        lambda: hasattr(importlib.import_module("transformers").GenerationConfig(), "_from_model_config")),
    PrivateName("transformers: PreTrainedModel.hf_quantizer", "export/merged.py steering/fingerprint.py",
        "recognising quantised weights",
        "recognised by integer weights as well; exports are compared with the hooked model in any case",
        lambda: "hf_quantizer" in inspect.getsource(importlib.import_module("transformers.modeling_utils"))),
    PrivateName("transformers: rope_parameters of a config",
        "steering/fingerprint.py engine/compatibility.py",
        "rotary positions that depend on the batch's longest row", _TRIED,
        _rope_parameters),
    PrivateName("accelerate: _hf_hook.execution_device of offloaded modules", "steering/backbone.py",
        "where inputs go when weights lie on disk", "an error that names accelerate's version",
        _execution_device),
    PrivateName("accelerate: hf_device_map of dispatched models", "engine/scorer.py",
        "recognising models spread over devices, whose passes must not end early",
        "recognised by the weights' devices as well",
        _device_map),
    PrivateName("torch: torch.cpu._is_amx_tile_supported", "engine/precision.py",
        "recognising CPUs that multiply bfloat16 natively", "training in float32",
        _has("torch", "cpu._is_amx_tile_supported")),
    PrivateName("torch: torch.cpu._is_avx512_bf16_supported", "engine/precision.py",
        "recognising CPUs that multiply bfloat16 natively", "training in float32",
        _has("torch", "cpu._is_avx512_bf16_supported")),
    PrivateName("torch: torch.ops.mkldnn._linear_pointwise, _reorder_linear_weight", "engine/precision.py",
        "weights in the order of oneDNN's kernels",
        "tried on a small product first; weights stay in the checkpoint's order",
        _onednn),
    PrivateName("torch: torch.ops.aten._scaled_dot_product_flash_attention_for_cpu and its backward",
        "training/cost.py studies/simulated_device.py",
        "counting the operations of attention on a CPU",
        "an error where operations are counted (--dry-run, --plan-for), none elsewhere",
        _attention_counted,
        words=("_scaled_dot_product_flash_attention_for_cpu",
               "_scaled_dot_product_flash_attention_for_cpu_backward")),
    PrivateName("torch: torch.ops.aten._scaled_dot_product_efficient_attention",
        "studies/simulated_device.py",
        "what attention on a GPU would take", "an error in --plan-for",
        _has("torch", "ops.aten._scaled_dot_product_efficient_attention")),
    PrivateName("torch: torch.utils._python_dispatch.TorchDispatchMode, torch.utils._pytree.tree_leaves",
        "training/cost.py studies/simulated_device.py",
        "measuring the memory and time that operations take", "an error that names torch's version",
        _all(
            _has("torch.utils._python_dispatch", "TorchDispatchMode"),
            _has("torch.utils._pytree", "tree_leaves"),
        )),
    PrivateName("torch: UntypedStorage._cdata", "training/cost.py",
        "recognising tensors that share memory", "an error in --dry-run and --plan-for",
        lambda: isinstance(importlib.import_module("torch").ones(1).untyped_storage()._cdata, int)),
    PrivateName("torch: torch.utils.flop_counter (flop_registry, register_flop_formula, sdpa_flop_count)",
        "engine/precision.py training/cost.py",
        "counting operations of kernels that PyTorch's counter does not know",
        "an error that names torch's version",
        _has(
            "torch.utils.flop_counter",
            *("flop_registry", "register_flop_formula", "sdpa_flop_count", "sdpa_backward_flop_count"),
        )),
    PrivateName("torch: _orig_mod of compiled modules", "engine/precision.py",
        "recognising compiled models, whose layers are better left alone",
        "layers of compiled models are changed for a pass and recompiled: slower, and right",
        _compiled_module),
    PrivateName("torch: torch.utils.collect_env.get_pretty_env_info", "harness/tasks.py",
        "describing the machine once, not for every run", "it is described for every run",
        _has("torch.utils.collect_env", "get_pretty_env_info")),
    PrivateName("lm-eval: HFLM._loglikelihood_tokens", "lm.py engine/stock.py",
        "answering log-likelihoods", f"{_STUCK}; and an error where lm-eval answers without calling it",
        lambda: (
            "self._loglikelihood_tokens(" in _source("lm_eval.api.model", "TemplateLM")
            and {"requests", "disable_tqdm", "override_bs"}
            <= set(_parameters(importlib.import_module(_HF).HFLM._loglikelihood_tokens))
        )),
    PrivateName("lm-eval: HFLM._detect_batch_size, batch_schedule, batch_sizes", "engine/stock.py",
        "asking stock code for some of an evaluation's requests", _STUCK,
        _sets(_HF, "HFLM", "_detect_batch_size", "batch_schedule", "batch_sizes")),
    PrivateName("lm-eval: HFLM._device", "lm.py",
        "where inputs go when weights lie on disk", "an error, as no device is known then",
        lambda: "returnself._device" in _source(_HF, "HFLM")),
    PrivateName("lm-eval: attributes of HFLM "
        "(softmax_dtype, mixed_precision_dtype, truncation, think_end_token, ...)",
        "lm.py engine/stock.py engine/generation.py training/rft.py",
        "scoring and generating as stock does", _STUCK,
        _sets(
            _HF,
            "HFLM",
            *("softmax_dtype", "mixed_precision_dtype", "truncation", "think_end_token", "max_batch_size"),
            *("add_bos_token", "pretrained", "revision", "peft", "delta", "batch_size_per_gpu", "backend"),
            *("max_length", "max_gen_toks", "eot_token_id", "prefix_token_id", "tok_encode", "tok_decode"),
            *("tok_batch_encode", "chat_template", "apply_chat_template"),
        )),
    PrivateName("lm-eval: HFLM._encode_pair", "harness/examples.py engine/stock.py",
        "splitting a prompt into tokens as it is scored", "an error when training",
        lambda: (
            _parameters(importlib.import_module(_HF).HFLM._encode_pair)[1:] == ["context", "continuation"]
        )),
    PrivateName("lm-eval: SteeredModel._model_call", "export/steered.py",
        "checking an exported file through lm-eval's own model", "an error in `aft export --to steered`",
        _has("lm_eval.models.hf_steered", "SteeredModel._model_call")),
    PrivateName("lm-eval: lm_eval.tasks._yaml_loader.load_yaml", "harness/tasks.py",
        "reading a task's definition without its data", "an error in `aft tasks` and in studies",
        lambda: (
            {"resolve_func", "recursive"}
            <= set(_parameters(importlib.import_module("lm_eval.tasks._yaml_loader").load_yaml))
        )),
    PrivateName("lm-eval: lm_eval._cli.run.Run, EvaluatorConfig.from_cli", "evaluation/run.py",
        "reading lm-eval's flags as lm-eval does", "an error in `aft eval`",
        _all(
            _has("lm_eval._cli.run", "Run.create"),
            _has("lm_eval.config.evaluate_config", "EvaluatorConfig.from_cli"),
        )),
    PrivateName("lm-eval: ConfigurableTask._filters", "harness/grading.py",
        "grading the model's own answers as the task does", "an error in training on own solutions",
        _sets("lm_eval.api.task", "ConfigurableTask", "_filters")),
    PrivateName("lm-eval: lm_eval.models and lm_eval.api.registry.model_registry",
        "cli/main.py registration.py",
        "registering `--model aft`",
        "lm-eval reports that it knows no model aft, and `aft lm-eval` is an error",
        _registry),
    PrivateName("lm-eval: CachingLM.set_cache_hook, CacheHook.dbdict", "lm.py",
        "keeping answers of different vectors apart in --use_cache", "an error where --use_cache is given",
        _cache_hook),
    PrivateName("sqlitedict: SqliteDict.tablename, conn", "lm.py",
        "a table for each vector in the file of --use_cache", "an error where --use_cache is given",
        _table_renamed),
    PrivateName("lm-eval: lm_eval.utils.env", "harness/tasks.py",
        "compiling prompt templates once", "they are compiled for every document: slower",
        _has("lm_eval.utils", "env.from_string")),
    PrivateName("lm-eval: doc_hash of logged samples (lm_eval.utils.hash_string, handle_non_serializable)",
        "harness/splits.py",
        "reporting that a vector was chosen on a reported document",
        "a warning when training: reports may not recognise such vectors",
        _all(_has("lm_eval.utils", "hash_string", "handle_non_serializable"), _doc_hash)),
    PrivateName("lm-eval: lm_eval.models.utils "
        "(handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text)",
        "engine/generation.py training/rft.py",
        "stop strings and settings of generation",
        "an error that names lm-eval's version, when the model is made",
        _has(
            "lm_eval.models.utils",
            *("handle_stop_sequences", "normalize_gen_kwargs", "postprocess_generated_text"),
        )),
    PrivateName("lm-eval: TaskManager (task_index, all_tasks, all_subtasks, match_tasks, load)",
        "evaluation/run.py harness/tasks.py",
        "finding a task without reading all of them", "an error that names lm-eval's version",
        _sets(
            "lm_eval.tasks", "TaskManager", "task_index", "all_tasks", "all_subtasks", "match_tasks", "load"
        )),
    PrivateName("lm-eval: EvaluationTracker."
        "general_config_tracker, save_results_aggregated, save_results_samples",
        "evaluation/run.py",
        "writing result folders as lm-eval does", "an error in `aft eval`",
        _sets(
            "lm_eval.loggers",
            "EvaluationTracker",
            *("general_config_tracker", "save_results_aggregated", "save_results_samples"),
        )),
    PrivateName("lm-eval: lm_eval.__main__.cli_evaluate", "cli/main.py",
        "running the stock command", "an error in `aft lm-eval`",
        _has("lm_eval.__main__", "cli_evaluate")),
    PrivateName("peft: BeftConfig, beft_bias, lora_A and lora_B of adapted layers", "export/peft.py",
        "writing a vector as an adapter", "an error in `aft export --to peft`",
        _adapters,
        optional=True),
    PrivateName("huggingface_hub: constants.HF_HUB_OFFLINE, constants.HF_HUB_CACHE",
        "cli/options.py library/hub.py",
        "staying offline in a process that has imported it, and its local cache", "an error with --offline",
        _has("huggingface_hub.constants", "HF_HUB_OFFLINE", "HF_HUB_CACHE")),
    PrivateName("huggingface_hub: the base class of HfHubHTTPError", "library/hub.py",
        "recognising network failures", "they are reported with their own messages",
        _hub_errors),
    PrivateName("datasets: config.HF_HUB_OFFLINE, config.HF_DATASETS_OFFLINE", "cli/options.py",
        "staying offline in a process that has imported it", "an error with --offline",
        lambda: any(
            hasattr(importlib.import_module("datasets.config"), name)
            for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
        )),
    PrivateName("safetensors: the bytes of a file's header", "_util/errors.py steering/vector_file.py",
        "checking a file before anything opens it", "an error: the file cannot be read",
        _header_bytes),
)
# fmt: on
NAMES = {entry.key: entry for entry in _LIST}
