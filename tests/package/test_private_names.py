"""Private names of other libraries: all listed, all there today, and what happens when one is gone."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import sys
import textwrap
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.pytorch_utils import Conv1D

import lm_eval_aft
from lm_eval_aft import AFTError
from lm_eval_aft._util.private_names import (
    CACHE_CALLS,
    CACHE_INHERITED,
    NAMES,
    PrivateName,
    asked_of_a_cache,
    borrowed,
    gone,
    require,
    version,
)
from lm_eval_aft.engine.checks import packing_ruled_out
from lm_eval_aft.engine.kv_cache import RowCache
from lm_eval_aft.steering.backbone import UNTOLD, attention_kernel, cache_argument
from tests.conftest import FAMILIES, tiny_model

ROOT = Path(lm_eval_aft.__file__).parent
KEYS = [pytest.param(entry, id=key.partition(" (")[0]) for key, entry in NAMES.items()]


@pytest.mark.parametrize("entry", KEYS)
def test_each_name_is_as_it_is_needed(entry: PrivateName) -> None:
    if entry.optional and version(entry.library) == "not installed":
        pytest.skip(f"{entry.library} is not installed")
    reason = entry.problem()
    if reason:
        pytest.fail(
            f"{entry.library} {version(entry.library)}: {entry.name}: {reason}. It is used in "
            f"{', '.join(entry.used_in)} for {entry.why}; without it: {entry.when_gone}.",
            pytrace=False,
        )


@pytest.mark.parametrize("entry", KEYS)
def test_each_entry_tells_where_and_what_then(entry: PrivateName) -> None:
    assert all((ROOT / place).is_file() for place in entry.used_in), entry.used_in
    assert entry.why
    assert entry.when_gone
    places = "".join((ROOT / place).read_text() for place in entry.used_in)
    # Packages are named where they are imported, all others by the name itself.
    assert all(word in places for word in entry.words), entry.words


# The source, read for names with a leading underscore that are not this package's own.


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def sources() -> list[tuple[Path, ast.Module]]:
    left_out = ROOT / "_util/private_names.py"  # the list itself
    return [(p, ast.parse(p.read_text())) for p in sorted(ROOT.rglob("*.py")) if p != left_out]


def defined(tree: ast.AST) -> set[str]:
    """Names that a module defines: functions, classes, variables, and attributes of ``self``."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.arg):
            found.add(node.arg)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
    return {name for name in found if is_private(name)}


def used(tree: ast.AST) -> set[str]:
    """Names that a module takes from an object or a module, or hands to a function as a keyword."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.keyword) and node.arg:
            found.add(node.arg)
        elif isinstance(node, ast.ImportFrom):
            found |= {*(node.module or "").split("."), *(alias.name for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {part for alias in node.names for part in alias.name.split(".")}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            found.add(node.value)  # getattr(config, "_attn_implementation")
    return {name for name in found if is_private(name)}


def inherited() -> dict[str, str]:
    """Private names of other libraries' classes that classes of ours define or set on themselves anew."""
    found = {}
    for module in [m.name for m in pkgutil.walk_packages([str(ROOT)], "lm_eval_aft.")]:
        if module == "lm_eval_aft._util.private_names":
            continue
        for kind in vars(importlib.import_module(module)).values():
            if not inspect.isclass(kind) or kind.__module__ != module:
                continue
            foreign = [base for base in kind.__mro__[1:-1] if not base.__module__.startswith("lm_eval_aft")]
            tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
            for name in defined(tree):
                for base in foreign:
                    try:
                        theirs = inspect.getsource(base)
                    except (OSError, TypeError):
                        continue
                    if name in vars(base) or f"self.{name} = " in theirs or f"self.{name}: " in theirs:
                        found[name] = f"{module}.{kind.__name__}"
    return found


# Names that look like another library's and are not.
OURS = {
    "_util": "a package of ours",
    "_buffers": "of RowCache, which is no module",
    "_aft_passes": "kept on a model while its passes are watched",
    "_aft_saved": "kept on a module for one pass",
    "_replace": "public, of the standard library's named tuples",
    "_low": "the end of a field's name",
    "_high": "the end of a field's name",
    "_proj": "the end of layers' names",
    "_version": "the end of a key in result files",
}


def test_every_private_name_of_another_library_is_listed() -> None:
    listed = {word for entry in NAMES.values() for word in entry.words}
    own = {name for _, tree in sources() for name in defined(tree)}
    taken: dict[str, list[str]] = {}
    for path, tree in sources():
        for name in used(tree) - own - set(OURS):
            taken.setdefault(name, []).append(str(path.relative_to(ROOT)))
    for name, where in inherited().items():
        if name not in OURS:
            taken.setdefault(name, []).append(where)
    missing = {name: where for name, where in taken.items() if name not in listed}
    assert not missing, f"add these to lm_eval_aft/_util/private_names.toml: {missing}"
    assert listed <= {*taken, *own}, "listed, but used no more"


def test_the_search_finds_what_is_not_listed() -> None:
    code = (
        "from lib._inner import x\nconfig._secret\ngetattr(model, '_hidden', 1)\n"
        "f(_option=1)\nself._mine = 2\nself._mine\n"
    )
    tree = ast.parse(code)
    assert used(tree) - defined(tree) == {"_inner", "_secret", "_hidden", "_option"}


# Gone: the check says so, for each of them.

Take = Callable[[pytest.MonkeyPatch], Any]


def without(module: str, name: str) -> Take:
    """Take a name out of a module or a class in it."""

    def take(patch: pytest.MonkeyPatch) -> None:
        target: Any = importlib.import_module(module)
        *outer, last = name.split(".")
        for part in outer:
            target = getattr(target, part)
        for kind in getattr(target, "__mro__", (target,)):
            if last in vars(kind):
                patch.delattr(kind, last)

    return take


def instead(module: str, name: str, value: Any) -> Take:
    """Put something else in a name's place."""

    def take(patch: pytest.MonkeyPatch) -> None:
        target: Any = importlib.import_module(module)
        *outer, last = name.split(".")
        for part in outer:
            target = getattr(target, part)
        patch.setattr(target, last, value)

    return take


def no_module(name: str) -> Take:
    def take(patch: pytest.MonkeyPatch) -> None:
        patch.setitem(sys.modules, name, None)

    return take


def hidden(namespace: Any, name: str) -> Take:
    """torch.ops finds its operators on demand: hide the whole namespace but for others."""

    def take(patch: pytest.MonkeyPatch) -> None:
        class Without:
            def __getattr__(self, asked: str) -> Any:
                if asked.startswith(name):
                    raise AttributeError(asked)
                return getattr(namespace, asked)

        patch.setattr(torch.ops, namespace.name, Without())

    return take


def nothing(*_: Any, **__: Any) -> None:
    """A function without parameters of its own that does nothing."""


HF = "lm_eval.models.huggingface"
LLAMA = "transformers.models.llama.modeling_llama"


class Bare:
    """A class with nothing in it."""


NO_CONFIG = instead("transformers", "LlamaConfig", lambda **_: Bare())
# Taken from the list where the names are long.
(DOC_HASH,) = (key for key in NAMES if "doc_hash" in key)
(TEXTS,) = (key for key in NAMES if "normalize_gen_kwargs" in key)
(TRACKER,) = (key for key in NAMES if "EvaluationTracker" in key)
(ATTRIBUTES,) = (key for key in NAMES if "attributes of HFLM" in key)

GONE: dict[str, Take] = {
    "transformers: PreTrainedConfig._attn_implementation": NO_CONFIG,
    "transformers: PreTrainedModel.all_tied_weights_keys": instead(
        "transformers", "LlamaForCausalLM", lambda config: Bare()
    ),
    "transformers: PreTrainedModel._is_stateful": without("transformers", "PreTrainedModel._is_stateful"),
    "transformers: PreTrainedConfig._name_or_path": instead(
        "transformers", "LlamaConfig", lambda **_: Bare()
    ),
    "transformers: the keyword of a model's cache (cache, once past_key_values)": instead(
        "transformers", "LlamaForCausalLM.forward", nothing
    ),
    "transformers: what models ask of a cache (update, get_seq_length, get_mask_sizes)": instead(
        "lm_eval_aft._util.private_names", "CACHE_INHERITED", frozenset()
    ),
    "transformers: decoder blocks called with hidden_states first": instead(
        LLAMA, "LlamaDecoderLayer.forward", nothing
    ),
    "transformers: pytorch_utils.Conv1D": without("transformers.pytorch_utils", "Conv1D"),
    "transformers: cached_file(_raise_exceptions_for_...)": instead(
        "transformers.utils.hub", "cached_files", nothing
    ),
    "transformers: GenerationConfig._from_model_config": instead("transformers", "GenerationConfig", Bare),
    "transformers: PreTrainedModel.hf_quantizer": no_module("transformers.modeling_utils"),
    "transformers: rope_parameters of a config": NO_CONFIG,
    "accelerate: _hf_hook.execution_device of offloaded modules": instead(
        "accelerate", "cpu_offload", lambda module, **_: module
    ),
    "accelerate: hf_device_map of dispatched models": instead(
        "accelerate", "dispatch_model", lambda module, *_, **__: module
    ),
    "torch: torch.cpu._is_amx_tile_supported": without("torch.cpu", "_is_amx_tile_supported"),
    "torch: torch.cpu._is_avx512_bf16_supported": without("torch.cpu", "_is_avx512_bf16_supported"),
    "torch: torch.ops.mkldnn._linear_pointwise, _reorder_linear_weight": hidden(
        torch.ops.mkldnn, "_reorder_linear_weight"
    ),
    "torch: torch.ops.aten._scaled_dot_product_flash_attention_for_cpu and its backward": hidden(
        torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu"
    ),
    "torch: torch.ops.aten._scaled_dot_product_efficient_attention": hidden(
        torch.ops.aten, "_scaled_dot_product_efficient_attention"
    ),
    "torch: torch.utils._python_dispatch.TorchDispatchMode, torch.utils._pytree.tree_leaves": without(
        "torch.utils._pytree", "tree_leaves"
    ),
    "torch: UntypedStorage._cdata": instead("torch", "ones", lambda *_: Bare()),
    "torch: torch.utils.flop_counter (flop_registry, register_flop_formula, sdpa_flop_count)": without(
        "torch.utils.flop_counter", "sdpa_flop_count"
    ),
    "torch: _orig_mod, _compiled_call_impl of compiled modules": instead(
        "torch", "compile", lambda module: Bare()
    ),
    "torch: torch.utils.collect_env.get_pretty_env_info": without(
        "torch.utils.collect_env", "get_pretty_env_info"
    ),
    "lm-eval: HFLM._loglikelihood_tokens": without(HF, "HFLM._loglikelihood_tokens"),
    "lm-eval: HFLM._detect_batch_size, batch_schedule, batch_sizes": without(HF, "HFLM._detect_batch_size"),
    "lm-eval: HFLM._create_model": without(HF, "HFLM._create_model"),
    "lm-eval: HFLM._device": instead(HF, "HFLM", Bare),
    ATTRIBUTES: instead(HF, "HFLM", Bare),
    "lm-eval: HFLM._encode_pair": without(HF, "HFLM._encode_pair"),
    "lm-eval: SteeredModel._model_call": instead("lm_eval.models.hf_steered", "SteeredModel", Bare),
    "lm-eval: lm_eval.tasks._yaml_loader.load_yaml": no_module("lm_eval.tasks._yaml_loader"),
    "lm-eval: lm_eval._cli.run.Run, EvaluatorConfig.from_cli": no_module("lm_eval._cli.run"),
    "lm-eval: ConfigurableTask._filters": instead("lm_eval.api.task", "ConfigurableTask", Bare),
    "lm-eval: lm_eval.models and lm_eval.api.registry.model_registry": instead(
        "lm_eval.api.registry", "model_registry", {}
    ),
    "lm-eval: CachingLM.set_cache_hook, CacheHook.dbdict": without(
        "lm_eval.api.model", "CachingLM.get_cache_hook"
    ),
    "sqlitedict: SqliteDict.tablename, conn": instead(
        "sqlitedict", "SqliteDict.__contains__", lambda self, key: True
    ),
    "lm-eval: lm_eval.utils.env": without("lm_eval.utils", "env"),
    DOC_HASH: without("lm_eval.utils", "hash_string"),
    TEXTS: without("lm_eval.models.utils", "normalize_gen_kwargs"),
    "lm-eval: TaskManager (task_index, all_tasks, all_subtasks, match_tasks, load)": instead(
        "lm_eval.tasks", "TaskManager", Bare
    ),
    TRACKER: instead("lm_eval.loggers", "EvaluationTracker", Bare),
    "lm-eval: lm_eval.__main__.cli_evaluate": without("lm_eval.__main__", "cli_evaluate"),
    "peft: BeftConfig, beft_bias, lora_A and lora_B of adapted layers": no_module("peft"),
    "huggingface_hub: constants.HF_HUB_OFFLINE, constants.HF_HUB_CACHE": without(
        "huggingface_hub.constants", "HF_HUB_CACHE"
    ),
    "huggingface_hub: the base class of HfHubHTTPError": instead(
        "huggingface_hub.errors", "HfHubHTTPError", type("HfHubHTTPError", (OSError,), {})
    ),
    "datasets: config.HF_HUB_OFFLINE, config.HF_DATASETS_OFFLINE": no_module("datasets.config"),
    "safetensors: the bytes of a file's header": instead("safetensors.torch", "save", lambda *_: b"PK" * 20),
}


def test_every_listed_name_is_taken_away_once() -> None:
    assert set(GONE) == set(NAMES)


@pytest.mark.parametrize("key", [pytest.param(key, id=key.partition(" (")[0]) for key in GONE])
def test_a_name_that_is_gone_is_told(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    importlib.import_module("lm_eval_aft.lm")  # before anything is missing
    with monkeypatch.context() as patch:
        GONE[key](patch)
        assert NAMES[key].problem()
        with pytest.raises(AFTError) as caught:
            require(key)
    assert version(NAMES[key].library) in caught.value.what
    assert NAMES[key].why in caught.value.what
    assert "aft doctor" in caught.value.hint
    assert not NAMES[key].problem() or (
        NAMES[key].optional and version(NAMES[key].library) == "not installed"
    )


def test_what_is_borrowed_and_missing_is_one_error() -> None:
    key = "lm-eval: HFLM._encode_pair"
    with pytest.raises(AFTError, match="for splitting a prompt"), borrowed(key):
        from lm_eval.models import no_such_name  # noqa: F401
    with pytest.raises(AFTError, match="HFLM._encode_pair"), borrowed(key):
        Bare()._encode_pair  # type: ignore[attr-defined] # noqa: B018
    with pytest.raises(ValueError), borrowed(key):
        raise ValueError
    assert version("lm-eval") in gone(key).what


# Gone: what the package then does.


@pytest.mark.parametrize("name", ["_attn_implementation", "_is_stateful"])
def test_rows_are_not_packed_where_attention_or_state_is_untold(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama")
    assert packing_ruled_out(model, 8) == ""
    target = PreTrainedModel if name == "_is_stateful" else type(model.config)
    with monkeypatch.context() as patch:
        for kind in target.__mro__:
            if name in vars(kind):
                patch.delattr(kind, name)
        assert "does not say" in packing_ruled_out(model, 8)
        if name == "_attn_implementation":
            assert attention_kernel(model) == UNTOLD


def test_weights_stay_in_order_where_kernels_take_other_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval_aft.engine.precision import ReorderedWeights

    model = nn.Sequential(nn.Linear(32, 32))
    with monkeypatch.context() as patch:
        GONE["torch: torch.ops.mkldnn._linear_pointwise, _reorder_linear_weight"](patch)
        assert len(ReorderedWeights(model)) == 0


def test_answers_that_do_not_pass_through_us_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from lm_eval_aft.lm import AFTLM
    from tests.conftest import tiny_tokenizer

    lm = AFTLM(tiny_model("llama"), tokenizer=tiny_tokenizer(), device="cpu")
    monkeypatch.setattr(HFLM, "loglikelihood", lambda self, requests, **_: [(0.0, False) for _ in requests])
    monkeypatch.setattr(HFLM, "loglikelihood_rolling", lambda self, requests, **_: [0.0 for _ in requests])
    for kind, arguments in (("loglikelihood", ("a cat", " sees")), ("loglikelihood_rolling", ("a cat",))):
        request = Instance(kind, {}, arguments, 0, ("toy", 0, 1))  # type: ignore[arg-type]
        with pytest.raises(AFTError, match="answered without calling it"):
            getattr(lm, kind)([request])


@pytest.mark.parametrize(
    "key",
    [
        "lm-eval: HFLM._loglikelihood_tokens",
        "lm-eval: HFLM._detect_batch_size, batch_schedule, batch_sizes",
    ],
)
def test_a_model_is_not_made_without_what_it_relies_on(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval_aft.lm import AFTLM

    with monkeypatch.context() as patch:
        GONE[key](patch)
        with pytest.raises(AFTError, match=version("lm-eval")):
            AFTLM("no such model")


def test_a_cache_that_cannot_be_told_apart_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.api.model import CacheHook

    from lm_eval_aft.lm import key_cache

    lm: Any = None  # not looked at before the tables are known to work
    hook = CacheHook(None)
    hook.dbdict = types.SimpleNamespace(tablename="unnamed")
    with monkeypatch.context() as patch:
        GONE["sqlitedict: SqliteDict.tablename, conn"](patch)
        with pytest.raises(AFTError, match="sqlitedict"):
            key_cache(lm, hook)
    del hook.dbdict
    with pytest.raises(AFTError, match="dbdict"):
        key_cache(lm, hook)


def test_operations_are_not_counted_wrongly(monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval_aft.studies.simulated_device import shapes_only
    from lm_eval_aft.training.cost import flops_of

    with monkeypatch.context() as patch:
        GONE["torch: torch.ops.aten._scaled_dot_product_flash_attention_for_cpu and its backward"](patch)
        with pytest.raises(AFTError, match="counting the operations"):
            flops_of(lambda: None)
        with pytest.raises(AFTError, match="counting the operations"), shapes_only("cpu"):
            pass
    assert flops_of(lambda: torch.mm(torch.ones(2, 3), torch.ones(3, 4))) == 2 * 2 * 3 * 4


def test_helpers_that_only_save_time_go_on_without(monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval_aft.harness.tasks import compiled_once, environment_asked_once

    with monkeypatch.context() as patch:
        GONE["lm-eval: lm_eval.utils.env"](patch)
        GONE["torch: torch.utils.collect_env.get_pretty_env_info"](patch)
        with compiled_once(), environment_asked_once([]):
            pass


@pytest.mark.parametrize("module", ["huggingface_hub.constants", "datasets.config"])
def test_offline_that_would_not_hold_is_an_error(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval_aft.cli.options import go_offline

    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
    with pytest.raises(AFTError, match="--offline|staying offline"):
        go_offline()


# The cache: what models ask of it, and by which name they take it.


@pytest.mark.parametrize("family", FAMILIES)
def test_models_ask_a_cache_only_for_what_ours_answers(family: str) -> None:
    asked = asked_of_a_cache(tiny_model(family))
    assert asked <= CACHE_CALLS | CACHE_INHERITED
    assert "update" in asked


def test_what_is_inherited_holds_for_our_cache() -> None:
    slots = RowCache(2, 8)
    slots.open(slice(0, 2), 5)
    assert slots.get_seq_length() == slots.get_mask_sizes(1, 0)[0] - 1 == 5
    if hasattr(DynamicCache, "get_query_offset"):
        assert slots.get_query_offset(0) == 5
    assert not slots.is_compileable
    assert not any(slots.is_sliding)


class Taking(nn.Module):
    """Takes its cache by the new name, though the old one is known too."""

    def forward(self, input_ids: Any, past_key_values: Any = None, cache: Any = None) -> None:
        """Nothing."""


class Old(nn.Module):
    """A model of a stranger's own, which knows the old name alone."""

    def forward(self, input_ids: Any, past_key_values: Any = None, **kwargs: Any) -> None:
        """Nothing."""


class Wrapper(nn.Module):
    """Hands everything on."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What it wraps, asked."""
        return self.inner(*args, **kwargs)


class Without(nn.Module):
    """A model without a cache, whose layers know one."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Old()

    def forward(self, input_ids: Any, **kwargs: Any) -> None:
        """Nothing."""


def test_the_name_by_which_a_cache_is_taken() -> None:
    assert cache_argument(Taking()) == "cache"
    assert cache_argument(Old()) == "past_key_values"
    assert cache_argument(Wrapper(Wrapper(Old()))) == "past_key_values"
    theirs = inspect.signature(tiny_model("llama").forward).parameters
    assert cache_argument(tiny_model("llama")) == ("cache" if "cache" in theirs else "past_key_values")
    for model in (Without(), Wrapper(nn.Linear(1, 1))):
        with pytest.raises(AFTError, match="takes no key-value cache"):
            cache_argument(model)


def test_the_name_is_found_through_adapters_and_compiled_models() -> None:
    plain = cache_argument(tiny_model("llama"))
    assert cache_argument(torch.compile(tiny_model("llama"))) == plain  # type: ignore[arg-type]
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=1, target_modules=["q_proj"], task_type="CAUSAL_LM")
    assert cache_argument(peft.get_peft_model(tiny_model("llama"), config)) == plain


def test_linear_layers_of_gpt2_are_known() -> None:
    from lm_eval_aft.steering import backbone

    assert backbone.Conv1D is Conv1D
