"""What results files and lm-eval's answer cache must know of a steered model."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lm_eval.api.model import CacheHook

from lm_eval_aft.fingerprint import fingerprint, stored_weights
from lm_eval_aft.library.entry import is_biased
from lm_eval_aft.private_names import borrowed, require
from lm_eval_aft.vector import SteeringVector, canonical_json

if TYPE_CHECKING:
    from lm_eval_aft.lm import AFTLM


def describe_vector(vector: SteeringVector) -> dict[str, Any]:
    """A vector as results files name it: what it does, what it was made from and on, where it came from."""
    meta = vector.metadata
    # Of a mixture, what each task's prompts were like.
    several = [each for each in meta.get("tasks") or () if isinstance(each, Mapping)]
    mixed = [{key: each.get(key) for key in ("task", "num_fewshot")} for each in several]
    return {
        "sha256": vector.digest(),
        "layers": list(vector.layers),
        "coefficient": vector.coefficient,
        "positions": vector.positions,
        "method": vector.method,
        "norm": vector.norm(),
        "task": meta.get("task"),
        "num_fewshot": meta.get("num_fewshot"),
        "control": meta.get("control"),
        # Chosen on evaluation documents, by its own word: no report may take it for a result.
        "biased": is_biased(meta),
        "base_model": meta.get("base_model"),
        # A sum's operands, and the repository and commit a vector was fetched from.
        **{key: meta[key] for key in ("recipe", "hub") if meta.get(key)},
        **({"tasks": mixed} if mixed else {}),
    }


def describe(lm: AFTLM) -> dict[str, Any]:
    """The ``aft`` entry of a results file."""
    info: dict[str, Any] = {
        "fingerprint": fingerprint(lm.model, lm.tokenizer),
        "world_size": lm.world_size,
        "softmax_dtype": None if lm.softmax_dtype is None else str(lm.softmax_dtype),
        "scoring_path": _path_taken(lm.paths_taken()),
        "answer_only": lm.answer_only,
        "vector": None if lm.vector is None else describe_vector(lm.vector),
    }
    if lm.routing is not None:
        info["routing"] = lm.routing.info()
    return info


def key_cache(lm: AFTLM, cache_hook: CacheHook) -> None:
    """Give this model, as it is steered, a table of its own in lm-eval's ``--use_cache`` file.

    lm-eval keys that file by the request alone, so a steered run would be served the
    baseline's answers. `CachingLM` looks answers up, and hooks write them, through one
    ``SqliteDict``; renaming its table here separates both.
    """
    handed = "lm-eval: CachingLM.set_cache_hook, CacheHook.dbdict"
    with borrowed(handed):
        database = cache_hook.dbdict
    if database is None:
        return
    # A name that only seems to take effect would serve a steered run the baseline's answers.
    require(handed)
    require("sqlitedict: SqliteDict.tablename, conn")
    table = f"aft_{hashlib.sha256(canonical_json(_answers_depend_on(lm)).encode()).hexdigest()[:24]}"
    database.tablename = table
    database.conn.execute(f'CREATE TABLE IF NOT EXISTS "{table}" (key TEXT PRIMARY KEY, value BLOB)')
    database.conn.commit()


def _name(source: Any) -> str | None:
    """A path or a name on the Hub; of a model that was handed over, its class."""
    return source if source is None or isinstance(source, str) else type(source).__name__


def _path_taken(taken: Counter[str]) -> str:
    """Which way documents were scored: the most frequent path and its share, then the others."""
    total = sum(taken.values())
    return ", ".join(f"{path} ({n / total:.1%} of {total})" for path, n in taken.most_common()) or "stock"


def _answers_depend_on(lm: AFTLM) -> dict[str, Any]:
    vector = lm.vector
    steered = vector is not None and vector.coefficient != 0
    found: dict[str, Any] = {
        "model": fingerprint(lm.model, lm.tokenizer),
        # What the fingerprint leaves out: quantised weights, and most of the config.
        "weights": stored_weights(lm.model),
        "config": hashlib.sha256(lm.model.config.to_json_string(use_diff=False).encode()).hexdigest(),
        "source": [_name(each) for each in (lm.pretrained, lm.revision, lm.peft, lm.delta)],
        "texts": [str(lm.truncation), str(lm.think_end_token), str(lm.max_gen_toks)],
        "vector": vector.digest() if vector is not None and steered else None,
        "dtype": str(lm.model.dtype),
        "softmax_dtype": str(lm.softmax_dtype),
        "mixed_precision_dtype": str(lm.mixed_precision_dtype),
        "max_length": lm.max_length,
        "add_bos_token": lm.add_bos_token,
        "prefix_token_id": lm.prefix_token_id,
        "fast": lm.fast,
        **({"answer_only": True} if lm.answer_only else {}),  # ordinary runs keep the tables they have
    }
    return found if lm.routing is None else {**found, "routing": lm.routing.depends_on()}
