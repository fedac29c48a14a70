"""What is on a model belongs to somebody: one loaded model, several who use it."""

import copy
import gc
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from lm_eval_aft import AFTError, SteeringVector, attach
from lm_eval_aft.library.store import Library
from lm_eval_aft.lm import AFTLM

ASK = [Instance("loglikelihood", {}, ("tree number three", " seven"), 0)]
OPTIONS: dict[str, Any] = {"device": "cpu", "batch_size": 4}
IDS = torch.tensor([[5, 6, 7, 8]])


def vector(seed: int = 0, **fields: Any) -> SteeringVector:
    return SteeringVector({1: torch.randn(32, generator=torch.Generator().manual_seed(seed))}, **fields)


def score(lm: Any) -> float:
    return float(lm.loglikelihood(ASK, disable_tqdm=True)[0][0])


class Shared:
    """A checkpoint's model, loaded once, and what fresh models of their own answer."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.model = AutoModelForCausalLM.from_pretrained(folder)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.plain = score(HFLM(folder, **OPTIONS))

    def lm(self, kind: type = AFTLM, model: Any = None, **given: Any) -> Any:
        return kind(self.model if model is None else model, tokenizer=self.tokenizer, **OPTIONS, **given)

    def alone(self, **given: Any) -> float:
        return score(AFTLM(self.folder, **OPTIONS, **given))


@pytest.fixture
def shared(checkpoint: Callable[..., str]) -> Shared:
    return Shared(checkpoint("llama"))


@pytest.mark.parametrize("positions", ["all", "last"])
@pytest.mark.parametrize("fast", [True, False])
def test_coefficients_tried_on_one_model_do_not_add_up(shared: Shared, positions: str, fast: bool) -> None:
    given = {"positions": positions, "fast": fast, "vector": vector()}
    lms = {c: shared.lm(coefficient=c, **given) for c in (0.5, 2.0, 0.0)}
    wanted = {c: shared.alone(coefficient=c, **given) for c in lms}
    assert wanted[0.0] == shared.plain
    assert len(set(wanted.values())) == 3
    for _ in range(2):  # in any order, again and again
        assert {c: score(lm) for c, lm in lms.items()} == wanted
    assert score(shared.lm()) == shared.plain
    assert torch.equal(
        lms[2.0].model(IDS).logits, AFTLM(shared.folder, coefficient=2, **given).model(IDS).logits
    )


@pytest.mark.parametrize("first", [True, False])
def test_lm_evals_own_model_runs_without_the_vector_and_says_so(
    shared: Shared, first: bool, caplog: pytest.LogCaptureFixture
) -> None:
    before = shared.lm(HFLM) if first else None
    steered = shared.lm(vector=vector())
    stock = before or shared.lm(HFLM)
    assert score(stock) == shared.plain
    assert "HFLM runs a model that --model aft steers: it runs it without the vector" in caplog.text
    assert score(steered) == shared.alone(vector=vector())
    assert score(stock) == shared.plain
    assert torch.equal(steered.model(IDS).logits, AFTLM(shared.folder, vector=vector()).model(IDS).logits)
    steered.steer(None)
    assert score(stock) == shared.plain == score(steered)


def test_a_model_that_is_gone_leaves_nothing(shared: Shared) -> None:
    plain = shared.model(IDS).logits
    steered = shared.lm(vector=vector(positions="last"))
    score(steered)
    del steered
    gc.collect()
    assert torch.equal(shared.model(IDS).logits, plain)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in shared.model.modules())


def test_vectors_attached_inside_one_another_add_up_and_forgotten_ones_are_refused(shared: Shared) -> None:
    both = SteeringVector({1: vector(0).layers[1] + vector(1).layers[1]})
    wanted = AFTLM(shared.folder, vector=both, **OPTIONS).model(IDS).logits
    with attach(shared.model, vector(0)), attach(shared.model, vector(1)):
        torch.testing.assert_close(shared.model(IDS).logits, wanted)
        with pytest.raises(AFTError, match=r"vectors attached to it \(layer 1, \w{8}; layer 1, \w{8}\)"):
            shared.lm(vector=vector())
    lm = shared.lm()

    def forgotten() -> Any:
        with attach(shared.model, vector()):
            yield

    left_open = forgotten()
    next(left_open)
    for ask in (lm.loglikelihood, lm.loglikelihood_rolling, lm.generate_until):
        with pytest.raises(AFTError, match="Call remove"):
            ask(ASK)
    left_open.close()
    assert score(lm) == shared.plain


def test_an_error_while_attaching_leaves_nothing(shared: Shared, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError

    monkeypatch.setattr("lm_eval_aft.steering.hooks.layer_shifts", fails)
    with pytest.raises(RuntimeError):
        attach(shared.model, vector(positions="last"))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in shared.model.modules())
    assert "generate" not in vars(shared.model)
    assert score(shared.lm()) == shared.plain


@pytest.mark.parametrize("positions", ["all", "last"])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_plain(
    shared: Shared, duplicate: Any, positions: str, caplog: pytest.LogCaptureFixture
) -> None:
    plain = shared.model(IDS).logits
    written = shared.model.generate(IDS, max_new_tokens=3, do_sample=False)
    with attach(shared.model, vector(positions=positions)):
        duplicates = [duplicate(shared.model)]
    lm = shared.lm(vector=vector(positions=positions))
    duplicates.append(duplicate(lm.model))
    assert "it is without the vector" in caplog.text
    for each in duplicates:
        assert torch.equal(each(IDS).logits, plain)
        assert torch.equal(each.generate(IDS, max_new_tokens=3, do_sample=False), written)
        assert each.generate.__self__ is each
        assert score(shared.lm(model=each)) == shared.plain == score(shared.lm(HFLM, each))
        steered = shared.lm(model=each, vector=vector(positions=positions))
        assert score(steered) == shared.alone(vector=vector(positions=positions))


def test_threads_take_turns(shared: Shared) -> None:
    lms = {c: shared.lm(vector=vector(), coefficient=c) for c in (0.0, 1.0, 2.0)}
    wanted = {c: shared.alone(vector=vector(), coefficient=c) for c in lms}
    found: dict[float, set[float]] = {c: set() for c in lms}
    threads = [
        threading.Thread(target=lambda c=c, lm=lm: found[c].update(score(lm) for _ in range(10)))
        for c, lm in lms.items()
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {c: {value} for c, value in wanted.items()}


@pytest.mark.parametrize("positions", ["all", "last"])
def test_a_router_takes_the_model_back(shared: Shared, positions: str, tmp_path: Any) -> None:
    saved = vector(positions=positions).save(tmp_path / "one.safetensors")
    Library(tmp_path / "library").add(saved, "some/one")
    routed = shared.lm(route="constant:some/one", library=str(tmp_path / "library"))
    wanted = shared.alone(vector=vector(positions=positions))
    assert score(routed) == wanted != shared.plain
    assert score(shared.lm(vector=vector(1))) == shared.alone(vector=vector(1))
    assert score(routed) == wanted
    assert score(shared.lm(HFLM)) == shared.plain
    assert score(routed) == wanted


def test_compiled_models(shared: Shared) -> None:
    plain, steered = shared.model(IDS).logits, None
    with attach(shared.model, vector()):
        steered = shared.model(IDS).logits
    compiled: Any = torch.compile(shared.model, backend="eager")
    assert torch.equal(compiled(IDS).logits, plain)
    with attach(compiled, vector()):
        assert torch.equal(compiled(IDS).logits, steered)
    assert torch.equal(compiled(IDS).logits, plain)
    assert score(shared.lm(model=compiled, vector=vector())) == shared.alone(vector=vector())
    shared.model.compile(backend="eager")
    with pytest.raises(AFTError, match="compiled in place"):
        shared.lm()


def test_a_part_or_a_wrapper_of_a_model_is_the_same_model(shared: Shared) -> None:
    peft = pytest.importorskip("peft")
    steered = shared.lm(vector=vector())
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=True)
    wrapped = peft.get_peft_model(shared.model, config)
    assert score(shared.lm(model=wrapped)) == shared.plain
    assert score(steered) == shared.alone(vector=vector())
    with attach(wrapped, vector()), pytest.raises(AFTError, match="vectors attached to it"):
        shared.lm(model=wrapped)


def test_models_without_weights_are_refused(shared: Shared) -> None:
    with pytest.raises(AFTError, match="no weights at .*meta device"):
        shared.lm(model=shared.model.to("meta"))


def test_arguments_a_loaded_model_would_ignore_are_refused(shared: Shared) -> None:
    with pytest.raises(AFTError, match="attn_implementation= would have no effect: the model is loaded"):
        shared.lm(attn_implementation="eager")
    with pytest.raises(AFTError, match="no model argument 'vectr'.\nDid you mean vector?"):
        shared.lm(vectr=vector())


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"dtype": "fp16"}, "dtype='fp16' is not a dtype.\nDid you mean float16?"),
        ({"softmax_dtype": "auto"}, "softmax_dtype='auto' is not a dtype."),
        ({"device": "cuad"}, "device='cuad' is not a device."),
        ({"what": 1}, "no model argument 'what'"),
        ({"answers": 1}, "no model argument 'answers'.\nDid you mean answer_only?"),
        ({"positions": "Last"}, "positions='Last' is not known"),
    ],
)
def test_names_that_nothing_has(shared: Shared, given: dict[str, Any], told: str) -> None:
    with pytest.raises(AFTError, match=told):
        AFTLM(shared.folder, **{"device": "cpu", **given})


def test_the_gpu_that_lm_eval_names_by_itself_need_not_be_there(shared: Shared) -> None:
    if not torch.cuda.is_available():
        assert score(AFTLM(shared.folder, device="cuda:0")) == pytest.approx(shared.plain, abs=1e-5)


def test_words_for_no(shared: Shared) -> None:
    lm = AFTLM(shared.folder, answer_only="no", fast="off", allow_mismatch="No", **OPTIONS)
    assert (lm.answer_only, lm.fast, score(lm)) == (False, False, shared.plain)
    assert AFTLM(shared.folder, fast="0", answer_only="YES", **OPTIONS).answer_only is True
