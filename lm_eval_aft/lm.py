"""``--model aft``: lm-eval's `hf` model with a steering vector, and its entry in results files."""

from __future__ import annotations

import difflib
import hashlib
import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import CacheHook
from tqdm import tqdm

from lm_eval_aft._util.errors import AFTError, model_not_loaded, not_finite_cause, print_errors_plainly
from lm_eval_aft._util.files import canonical_json
from lm_eval_aft._util.model_source import model_source, unpacked
from lm_eval_aft._util.private_names import borrowed, gone, require
from lm_eval_aft.demo import resolve_pretrained
from lm_eval_aft.engine.active_steering import ActiveSteering, Routing, whole_spec
from lm_eval_aft.engine.checks import baseline_not_finite
from lm_eval_aft.engine.fallback import Companions, ScoringPaths
from lm_eval_aft.engine.generation import Texts
from lm_eval_aft.engine.rows import Answer, Request
from lm_eval_aft.engine.scorer import Answers, Scorer
from lm_eval_aft.engine.stock import StockLM
from lm_eval_aft.harness.model_args import ARGUMENTS, read_model_args, unknown_argument
from lm_eval_aft.harness.tasks import refuse_generation, refuse_thinking, without_contexts
from lm_eval_aft.library.load import load_vector
from lm_eval_aft.library.store import Library
from lm_eval_aft.steering.backbone import check_causal, check_weights, input_device, is_compiled
from lm_eval_aft.steering.fingerprint import fingerprint, is_quantized, stored_weights
from lm_eval_aft.steering.intervention import POSITIONS
from lm_eval_aft.steering.vector import SteeringVector, describe_vector

logger = logging.getLogger(__name__)
T = TypeVar("T")
_ANSWERS = "lm-eval: HFLM._loglikelihood_tokens"
# Without these a vector could be applied in the wrong place without an error.
_RELIED_ON = (
    _ANSWERS,
    "lm-eval: HFLM._detect_batch_size, batch_schedule, batch_sizes",
    "lm-eval: attributes of HFLM (softmax_dtype, mixed_precision_dtype, truncation, think_end_token, ...)",
)


def _in_force(method: Callable[..., T]) -> Callable[..., T]:
    """The method runs with the model steered as its `AFTLM` asks for; see `ActiveSteering.in_force`."""

    @wraps(method)
    def run(self: AFTLM, *args: Any, **kwargs: Any) -> T:
        with self.active.in_force():
            return method(self, *args, **kwargs)

    return run


class AFTLM(StockLM):
    """A Hugging Face causal LM, scored by lm-eval, with a vector added to its residual stream.

    Takes every argument of ``hf`` (``pretrained``, ``dtype``, ``revision``, ``peft``, ...) and:

    Args:
        vector: what `load_vector` takes, or a `SteeringVector`; none means baseline.
        library: folder of the library that names come from; default the user's own.
        route: router that picks a vector of the library for each document, instead of ``vector``:
            ``constant:NAME``, ``task``, ``keyword``, or a keyword table's path (`Routing.open`).
        coefficient: replaces the vector's (or vectors') own; 0 is the baseline.
        positions: replaces the vector's own: ``all``, ``prompt``, ``last`` or ``generated``.
        allow_mismatch: try a vector trained on another model, with a warning.
        fast: share work among requests where that gives stock's answers (`lm_eval_aft.engine`);
            false scores exactly as `hf` does.
        answer_only: score log-likelihoods with every context removed; see `lm_eval_aft.harness.tasks`.
        blocks: dotted path of the decoder blocks, for architectures not recognised.
        device: default CUDA where there is one, else the CPU.

    Raises:
        AFTError: model or vector missing, unreadable or not fitting each other.

    >>> lm = AFTLM("demo", vector=SteeringVector({2: torch.ones(128)}), coefficient=0.1)
    >>> lm.vector.layers.keys(), lm.vector.coefficient
    (dict_keys([2]), 0.1)
    """

    def __init__(
        self,
        pretrained: Any,
        vector: str | SteeringVector | None = None,
        library: str | None = None,
        route: str | None = None,
        coefficient: float | None = None,
        positions: str | None = None,
        allow_mismatch: bool = False,
        fast: bool = True,
        answer_only: bool = False,
        blocks: str | None = None,
        device: str | None = None,
        **kwargs: Any,
    ) -> None:
        print_errors_plainly()
        for key in _RELIED_ON:
            require(key)
        own = {"vector": vector, "library": library, "route": route, "coefficient": coefficient}
        own |= {"positions": positions, "allow_mismatch": allow_mismatch, "fast": fast}
        own |= {"answer_only": answer_only, "blocks": blocks, "device": device}
        given = SimpleNamespace(**read_model_args(own))
        kwargs = read_model_args(kwargs)
        if given.positions is not None and given.positions not in POSITIONS:
            raise AFTError(f"positions={positions!r} is not known.", f"Use one of: {', '.join(POSITIONS)}.")
        if given.route and given.vector:
            raise AFTError("Both vector= and route= are given.", "A router picks the vectors: leave one out.")
        _check_names_of_torch(pretrained, given.device, kwargs)
        pretrained, kwargs = model_source(pretrained, kwargs)
        # Read before the model, so that a wrong path fails in milliseconds.
        shelf = Library(given.library)
        loaded = None if given.vector is None else load_vector(given.vector, shelf)
        route = whole_spec(given.route) if given.route else None
        device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
        pretrained = _runnable(pretrained, kwargs)
        try:
            super().__init__(pretrained=pretrained, device=device, **kwargs)
        except (OSError, ValueError, ImportError) as error:
            raise model_not_loaded(pretrained, error) from error
        except TypeError as error:
            name = re.search(r"unexpected keyword argument '(\w+)'", str(error))
            if name is None or name[1] not in kwargs:
                raise
            raise unknown_argument(name[1]) from error
        if self.backend != "causal":
            raise AFTError("Encoder-decoder models are not supported.", "Use a decoder-only (causal) model.")
        check_weights(self.model)
        if kwargs.get("gguf_file"):
            _tell_dequantised(self.model, str(kwargs["gguf_file"]))
        if self.device.type == "meta":  # stock looks at the first weights, which lie on disk
            self._device = input_device(self.model)
            if self.device.type == "meta":
                raise gone("accelerate: _hf_hook.execution_device of offloaded modules")
        self.active = ActiveSteering(self.model, self.tokenizer, given.blocks)
        self.active.claim()
        if not isinstance(pretrained, str):
            self.active.remove_when_gone()
        check_causal(self.model)
        self.fast, self.answer_only = given.fast, given.answer_only
        self._shared: tuple[ScoringPaths, Texts] | None = None
        self._companions: Companions | None = None
        self.require_finite = False  # whether a baseline whose answers are NaN or infinite ends the run
        self._asked = 0
        # As given, for records and printed commands, besides what steers it and where it runs.
        self.model_args: dict[str, Any] = {**kwargs, **({"blocks": blocks} if blocks else {})}
        self._states: list[int] = []  # under a router: which vector each request at hand gets
        replaced = {"coefficient": given.coefficient, "positions": given.positions}
        self.steer(loaded, **replaced, allow_mismatch=given.allow_mismatch)
        if route:
            routing = self.routing_of(route, shelf, allow_mismatch=given.allow_mismatch)
            self.follow(routing.adjusted(**replaced))

    def _create_model(self, *args: Any, **kwargs: Any) -> None:
        super()._create_model(*args, **(kwargs | unpacked(kwargs.get("gguf_file"))))

    def steer(
        self,
        vector: SteeringVector | None,
        *,
        coefficient: float | None = None,
        positions: str | None = None,
        allow_mismatch: bool = False,
    ) -> None:
        """Replace the active vector; ``None`` makes this the baseline again."""
        if self.routing is not None:
            self._shared = None
        for part in self._shared or ():
            part.taken.clear()
        if vector is None:
            self.active.clear()
        else:
            self.active.use(vector, coefficient, positions, allow_mismatch)
        self.texts_not_finite, self._told_not_finite = 0, False
        if self.forget_checks():
            self._shared = None

    def routing_of(self, spec: str, library: Library, *, allow_mismatch: bool = False) -> Routing:
        """A router over those vectors of the library that fit this model; see `Routing.open`."""
        return self.active.open_routing(spec, library, str(self.pretrained), allow_mismatch)

    def follow(self, routing: Routing) -> None:
        """Let a router pick the vector for each document, in place of the active vector."""
        self.active.follow(routing)
        self.texts_not_finite, self._told_not_finite = 0, False
        self._shared = None  # rows that are steered differently are to be checked against stock anew
        self.forget_checks()

    @property
    def model(self) -> Any:
        """The model, steered as this one asks for, whatever it was used for in between."""
        if self.active is not None:
            self.active.claim()
        return super().model

    @property
    def vector(self) -> SteeringVector | None:
        """The active vector, with the coefficient and positions it is applied with."""
        return self.active.vector

    @property
    def routing(self) -> Routing | None:
        """What picks the vectors, if a router does."""
        return self.active.routing

    def require_plain(self) -> None:
        """Raise `AFTError` unless this is the baseline, scored as it is, which vectors are trained on."""
        steered = self.vector is not None and self.vector.coefficient
        if steered or self.routing is not None or self.answer_only:
            raise AFTError(
                "The model is steered, or scored without its questions: vectors are trained on plain models.",
                "Call steer(None) before, or load the model without vector=, route= and answer_only=.",
            )
        self.active.ownership.require_plain()

    def score_along(self, vectors: Sequence[SteeringVector]) -> None:
        """While this is the baseline, find the answers of ``vectors`` to the same requests as well.

        They are kept until `steer` makes such a vector active, which then answers from them.
        Log-likelihoods only, and only with ``fast``; the vectors must have passed `steer` before.
        """
        self._companions = Companions(vectors) if self.fast else None

    @_in_force
    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Answer]:
        """As `HFLM`; answers found while the baseline was scored are not computed again."""
        refuse_thinking(self, {request.task_name for request in requests})
        self._states = [] if self.routing is None else self.routing.states(requests)
        requests = without_contexts(requests) if self.answer_only else requests
        found: list[Answer | None] = [None] * len(requests)
        if self.vector is not None and self._companions is not None:
            found = self._companions.answers(self.vector, [request.args for request in requests])
            if self.kept_answers_differ(requests, found):
                self._companions, found = None, [None] * len(requests)
        for request, answer in zip(requests, found, strict=True):
            if answer is not None:
                self.cache_hook.add_partial("loglikelihood", request.args, answer)
        missing = [request for request, answer in zip(requests, found, strict=True) if answer is None]
        with self._called_back(missing):
            rest = iter(
                super().loglikelihood(missing, disable_tqdm=disable_tqdm) if missing or not requests else ()
            )
        answers = [next(rest) if answer is None else answer for answer in found]
        self._check_finite(value for value, _ in answers)
        return answers

    def _check_finite(self, values: Iterable[float]) -> None:
        """Warn, once for each steering, of log-likelihoods that are no numbers; or raise, where asked for.

        Minus infinity is one: of a token that the model rules out.
        """
        if not any(math.isnan(value) or value == math.inf for value in values):
            return
        if self.require_finite and self.vector is None and self.routing is None:
            raise baseline_not_finite(self.model)
        if not self._told_not_finite:
            dtype = str(self.mixed_precision_dtype or self.model.dtype).removeprefix("torch.")
            logger.warning(
                "Answers of %s are NaN or infinite, and say nothing: %s",
                _name(self.pretrained),
                not_finite_cause(dtype, None if self.vector is None else self.vector.coefficient),
            )
        self._told_not_finite = True

    @_in_force
    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Answer]:
        self._asked += len(requests)
        # Rolling windows bring a batch size of their own: long rows without anything to share.
        if override_bs is not None or not requests:
            return self.stock_answers(requests, disable_tqdm, override_bs)
        routed = self.active.rows is not None
        if not self.fast:
            if routed:
                return self.some_stock_answers(requests, self._states)
            return self.stock_answers(requests, disable_tqdm)
        paths, _ = self._fast()
        before = paths.taken.copy()
        companions = self._companions if self.vector is None and not routed else None
        found: Answers = {}
        quiet = disable_tqdm or self.rank != 0
        with tqdm(total=len(requests), disable=quiet, desc="Running loglikelihood requests") as bar:
            for part in paths.score(requests, companions.shifts if companions else [], self._states):
                self._check_finite(value for value, _ in part[0].values())
                for index, answer in part[0].items():
                    strings = requests[index][0]
                    if strings is not None:
                        self.cache_hook.add_partial("loglikelihood", strings, answer)
                        if companions and len(part) > 1:
                            companions.keep(strings, [state[index] for state in part[1:]])
                found.update(part[0])
                bar.update(len(part[0]))
        if companions:
            companions.paths += paths.taken - before
        return [found[i] for i in range(len(requests))]

    @contextmanager
    def _called_back(self, requests: Sequence[Instance]) -> Iterator[None]:
        """Inside the block `HFLM` must call `_loglikelihood_tokens`, where roles and routers are applied."""
        before = self._asked
        yield
        if requests and self._asked == before:
            raise gone(_ANSWERS, "it answered without calling it")

    @_in_force
    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """As `HFLM`; under a router vector by vector.

        Raises:
            AFTError: a router and several processes, whose batches `HFLM` keeps in step.
        """
        if self.routing is not None and self.world_size > 1:
            raise AFTError("A router cannot serve rolling log-likelihoods in several processes.", "Use one.")
        with self._called_back(requests):
            ask = partial(super().loglikelihood_rolling, disable_tqdm=disable_tqdm)
            found = self.by_vector(requests, ask)
        self._check_finite(found)
        return found

    @_in_force
    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """As `HFLM`; plain greedy decoding in fp32 is done in shared batches, the rest by stock."""
        refuse_generation(requests if self.answer_only else ())
        found = self._texts(requests, disable_tqdm)
        self._check_finite([math.nan] * self.texts_not_finite)
        return found

    def _texts(self, requests: list[Instance], disable_tqdm: bool) -> list[str]:
        if not self.fast or not requests:
            return self.stock_texts(requests, disable_tqdm)
        _, generator = self._fast()
        if generator.refusal():
            generator.taken["stock"] += len(requests)
            return self.stock_texts(requests, disable_tqdm)
        texts: dict[int, str] = {}
        states = [] if self.routing is None else self.routing.states(requests)
        quiet = disable_tqdm or self.rank != 0
        before = generator.scorer.not_finite
        with tqdm(total=len(requests), disable=quiet, desc="Running generate_until requests") as bar:
            for index, text in generator.answers(requests, states):
                self.cache_hook.add_partial("generate_until", requests[index].args, text)
                texts[index] = text
                bar.update(1)
        self.texts_not_finite += generator.scorer.not_finite - before
        left = [i for i in range(len(requests)) if i not in texts]
        if left:
            texts |= zip(left, self.some_stock_texts([requests[i] for i in left]), strict=True)
        return [texts[i] for i in range(len(requests))]

    def _fast(self) -> tuple[ScoringPaths, Texts]:
        """The optimised scoring and generation; made on first use."""
        if self._shared is None:
            scorer = Scorer(
                self.model,
                self.active.backbone,
                device=self.device,
                softmax_dtype=self.softmax_dtype,
                autocast=self.mixed_precision_dtype,
                rows=self.active.rows,
            )
            self._shared = ScoringPaths(self, scorer), Texts(self, scorer)
        return self._shared

    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        """As `HFLM`; answers are kept apart by what steers the model."""
        super().set_cache_hook(cache_hook)
        key_cache(self, cache_hook)

    def get_model_info(self) -> dict[str, Any]:
        """`HFLM`'s model information and an ``aft`` entry: what steered the model, and how it was scored."""
        return {**super().get_model_info(), "aft": describe(self)}

    def paths_taken(self) -> Counter[str]:
        """How many documents were scored by which path, since the model was last steered."""
        taken = sum((part.taken for part in self._shared or ()), Counter[str]())
        return taken + self._companions.paths if self._companions and self.vector else taken


def _check_names_of_torch(pretrained: Any, device: Any, given: Mapping[str, Any]) -> None:
    """Raise `AFTError` for a device or a dtype that PyTorch has not.

    A GPU that is not there is no error: lm-eval names one by itself, and then takes the CPU.
    """
    dtypes = [name for name, each in vars(torch).items() if isinstance(each, torch.dtype)]
    for name in ("dtype", "softmax_dtype", "mixed_precision_dtype"):
        wanted = given.get(name)
        if isinstance(wanted, str) and wanted not in (*dtypes, *["auto"] * (name == "dtype")):
            spelt = re.sub("^(fp|bf)", lambda start: {"fp": "float", "bf": "bfloat"}[start[0]], wanted)
            near = difflib.get_close_matches(spelt, dtypes)
            raise AFTError(
                f"{name}={wanted!r} is not a dtype.", f"Did you mean {near[0]}?" if near else "Try float32."
            )
    if not isinstance(pretrained, str) or not isinstance(device, str):
        return
    try:
        torch.device(device)
    except RuntimeError as error:
        raise AFTError(f"device={device!r} is not a device.", "Write cpu, cuda, cuda:1 or mps.") from error


def _tell_dequantised(model: Any, file: str) -> None:
    """Say what dequantised weights take in memory; raise `AFTError` if they are still quantised."""
    if is_quantized(model):
        raise gone(
            "lm-eval: HFLM._create_model", f"the weights of {file} were left in their quantised blocks"
        )
    size = sum(parameter.nbytes for parameter in model.parameters())
    dtype = str(model.dtype).removeprefix("torch.")
    half = "" if model.dtype.itemsize < 4 else "; dtype=bfloat16 takes half of it"
    logger.info("%s was dequantised: its weights take %.0f MB in %s%s.", file, size / 1e6, dtype, half)


def _runnable(pretrained: Any, given: Mapping[str, Any]) -> Any:
    """What `HFLM` is to load, or to run: of a compiled model the original."""
    if isinstance(pretrained, str):
        return resolve_pretrained(pretrained)
    if ignored := [name for name in given if name not in ARGUMENTS]:
        raise AFTError(
            f"{ignored[0]}= would have no effect: the model is loaded already.",
            "Leave it out, or load with it.",
        )
    model = getattr(pretrained, "_orig_mod", pretrained)
    if isinstance(model, torch.nn.Module) and is_compiled(model):
        raise AFTError(
            "The model was compiled in place, so what is added to its layers later would be ignored.",
            "Load it again without compile(); torch.compile(model) is understood: its original is used.",
        )
    return model


# What results files and lm-eval's answer cache record of a steered model.


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
    if lm.texts_not_finite:
        info["not_finite"] = {"generate_until": lm.texts_not_finite}
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
    # If renaming the table had no effect, a steered run would get the baseline's answers.
    require(handed)
    require("sqlitedict: SqliteDict.tablename, conn")
    table = f"aft_{hashlib.sha256(canonical_json(_answers_depend_on(lm)).encode()).hexdigest()[:24]}"
    database.tablename = table
    database.conn.execute(f'CREATE TABLE IF NOT EXISTS "{table}" (key TEXT PRIMARY KEY, value BLOB)')
    database.conn.commit()


def _name(source: Any) -> str | None:
    """A path or a name on the Hub; for a model object, its class."""
    return source if source is None or isinstance(source, str) else type(source).__name__


def _path_taken(taken: Counter[str]) -> str:
    """How documents were scored: the most frequent path and its share, then the others."""
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
