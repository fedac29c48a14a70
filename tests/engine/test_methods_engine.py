"""Every method at every choice of positions: training, files, scoring and generation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from lm_eval_aft import AFTError, SteeringVector, attach, train_vector
from lm_eval_aft.engine.batching import TokenizedDocument, capture
from lm_eval_aft.lm import AFTLM
from lm_eval_aft.steering.backbone import cache_argument, find_backbone
from lm_eval_aft.steering.intervention import POSITIONS, Intervention
from lm_eval_aft.steering.methods import METHODS, find_method
from lm_eval_aft.training.candidate import Candidate, Engine, Recipe
from lm_eval_aft.training.objectives import LM, Choice, Objective
from lm_eval_aft.training.setup import mean_differences
from lm_eval_aft.training.trainer import Reference, Trajectory, make_engine, master_dtype
from tests.conftest import tiny_model
from tests.engine.test_engine import documents, nothing, single

TRAINED = [name for name, method in METHODS.items() if method.trained]


def intervention(name: str, positions: str, layer: int, dtype: torch.dtype = torch.float32) -> Intervention:
    method = find_method(name)
    generator = torch.Generator().manual_seed(7)
    layers = (layer, layer + 1) if method.steers_all_layers else (layer,)
    tensors = method.initial_tensors(32, layers, generator)
    tensors = {k: v + 0.1 * torch.randn(v.shape, generator=generator) for k, v in tensors.items()}
    return Intervention(method, {k: v.to(dtype) for k, v in tensors.items()}, positions=positions)


def gradients(
    engine: Engine, docs: list[TokenizedDocument], name: str, positions: str, layer: int = 1
) -> dict[str, torch.Tensor]:
    probe = Candidate(layer, 0, Recipe(), intervention(name, positions, layer))
    seen: dict[str, torch.Tensor] = {}

    def step() -> None:
        for key, tensor in probe.intervention.tensors.items():
            seen[key] = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad.clone()

    probe.step = step  # type: ignore[method-assign]
    engine.train([probe], [docs], nothing)
    return seen


@pytest.mark.parametrize("objective", [Choice("acc_norm"), LM()], ids=["choice", "lm"])
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("name", TRAINED)
def test_engine_equals_reference(name: str, positions: str, objective: Objective) -> None:
    model = tiny_model("llama")
    backbone = find_backbone(model)
    docs = single() if objective.name == "lm" else documents()
    engine, taken = make_engine(model, backbone, objective, docs)
    assert taken == ("unpacked" if objective.name == "lm" else "packed")
    reference = Reference(model, backbone, objective)
    fast, slow = (gradients(each, docs, name, positions) for each in (engine, reference))
    assert any(bool(value.any()) for value in slow.values())
    for key, expected in slow.items():
        bound = 1e-5 * max(float(expected.norm()), 1e-3 * max(float(v.norm()) for v in slow.values()))
        assert float((fast[key] - expected).norm()) <= bound, key
    pair = [Candidate(1, 0, Recipe(), intervention(name, positions, 1)) for _ in range(2)]
    (ours,) = engine.evaluate(pair[:1], docs, nothing)
    (theirs,) = reference.evaluate(pair[1:], docs, nothing)
    assert ours.cross_entropy == pytest.approx(theirs.cross_entropy, rel=1e-5)


@pytest.mark.parametrize("name", TRAINED)
def test_gradients_equal_finite_differences(name: str) -> None:
    # Llama's RMSNorm computes in fp32 whatever the model's dtype; LayerNorm does not.
    model = tiny_model("gpt_neox", dtype=torch.float64)
    engine = Trajectory(model, find_backbone(model), Choice("acc"), packed=True)
    docs = documents(4)
    probe = Candidate(1, 0, Recipe(), intervention(name, "prompt", 1, master_dtype(torch.float64)))
    seen: dict[str, torch.Tensor] = {}
    probe.step = lambda: seen.update(  # type: ignore[method-assign]
        {k: v.grad.clone() for k, v in probe.intervention.tensors.items() if v.grad is not None}
    )
    engine.train([probe], [docs], nothing)
    step = 1e-6
    for key, tensor in probe.intervention.tensors.items():
        flat = tensor.detach().reshape(-1)
        for index in {0, len(flat) // 2, len(flat) - 1}:
            losses = []
            for sign in (1, -2):
                flat[index] += sign * step
                losses.append(engine.evaluate([probe], docs, nothing)[0].cross_entropy)
            flat[index] += step
            numeric = (losses[0] - losses[1]) / (2 * step)
            assert numeric == pytest.approx(float(seen[key].reshape(-1)[index]), rel=2e-5, abs=1e-8), key


def naive_steered(model: Any, vector: SteeringVector, rows: list[list[int]]) -> Callable[..., Any]:
    """Hooks written for the test: ``rows`` marks by 1 the tokens whose hidden states are to change."""
    method = METHODS[vector.method]
    marks = torch.tensor(rows, dtype=torch.bool)[..., None]
    handles = []

    def hook(layer: int) -> Any:
        def add(_module: Any, _inputs: Any, output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            steered = hidden + vector.coefficient * method.delta(vector.tensors, layer, hidden)
            changed = torch.where(marks, steered, hidden)
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        return add

    for layer in vector.layers:
        handles.append(find_backbone(model).blocks[layer].register_forward_hook(hook(layer)))
    return lambda: [handle.remove() for handle in handles]


def vector_for(name: str, positions: str, layer: int = 1) -> SteeringVector:
    made = intervention(name, positions, layer)
    tensors = {key: value * 3 for key, value in made.tensors.items()}
    return SteeringVector.from_tensors(tensors, method=name, positions=positions, coefficient=0.7)


MARKS = {  # two prompts of 5 and 3 tokens, padded on the left
    "all": [[1, 1, 1, 1, 1], [1, 1, 1, 1, 1]],
    "prompt": [[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]],
    "last": [[0, 0, 0, 0, 1], [0, 0, 0, 0, 1]],
    "generated": [[0, 0, 0, 0, 0], [0, 0, 0, 0, 0]],
}


@pytest.mark.parametrize("name", ["static", "drab-strong", "scale"])
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2"])
@torch.no_grad()
def test_prefill_and_decoding_change_hidden_states_where_they_should(
    family: str, positions: str, name: str
) -> None:
    """Left padding, as generation pads: the prompt in one pass, then a token at a time on the cache."""
    model = tiny_model(family)
    backbone, keyword = find_backbone(model), cache_argument(model)
    vector = vector_for(name, positions)
    prompts = torch.tensor([[5, 6, 7, 8, 9], [1, 1, 10, 11, 12]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    more = torch.tensor([[13, 14], [15, 16]])
    places = (mask.cumsum(1) - 1).clamp(min=0)

    def passes() -> list[torch.Tensor]:
        seen = []
        with capture(backbone, [1]) as outputs:
            cache = DynamicCache()
            first = {"input_ids": prompts, "attention_mask": mask, "position_ids": places}
            model(**first, use_cache=True, **{keyword: cache})
            seen.append(hidden(outputs[1]))
            for step in range(2):
                grown = torch.cat([mask, torch.ones(2, step + 1, dtype=torch.long)], 1)
                model(
                    input_ids=more[:, step : step + 1],
                    attention_mask=grown,
                    position_ids=places[:, -1:] + 1 + step,
                    use_cache=True,
                    **{keyword: cache},
                )
                seen.append(hidden(outputs[1]))
        return seen

    plain = passes()
    # The lowest steered block's output, before and after: only the hook itself lies between.
    with attach(model, vector):
        steered = passes()
    marks = [MARKS[positions], *[[[int(positions in ("all", "generated"))]] * 2] * 2]
    for before, after, rows in zip(plain, steered, marks, strict=True):
        delta = vector.coefficient * METHODS[name].delta(vector.tensors, 1, before)
        expected = torch.where(torch.tensor(rows, dtype=torch.bool)[..., None], before + delta, before)
        assert torch.allclose(after, expected, atol=1e-5)
        if name == "scale":  # llama's hidden states of padding are zero, whatever they are multiplied by
            there = before.any(-1).int().tolist()
            rows = [[a * b for a, b in zip(*pair, strict=True)] for pair in zip(rows, there, strict=True)]
        changed = (after != before).any(-1).int().tolist()
        assert changed == rows


def hidden(output: Any) -> torch.Tensor:
    found = output[0] if isinstance(output, tuple) else output
    return found.clone()


@pytest.mark.parametrize("positions", POSITIONS)
@torch.no_grad()
def test_packed_rows_change_hidden_states_where_they_should(positions: str) -> None:
    model = tiny_model("llama")
    backbone = find_backbone(model)
    engine = Trajectory(model, backbone, Choice("acc"), packed=True)
    docs = [
        TokenizedDocument(
            (((5, 6, 7), (20, 21, 22)), ((5, 6, 7), (23,)), ((5, 6, 7), (24, 25))), (0,), (1.0,) * 3
        ),
        TokenizedDocument((((8,), (26, 27)),), (0,)),
    ]
    (batch,) = engine.batches(docs)
    # Row 0: context 5 6 7, then 20 21 of the first option and 24 of the third; row 1: 8, 26, padding.
    marks = {
        "all": [[1] * 6, [1] * 6],
        "prompt": [[1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0]],
        "last": [[0, 0, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0]],
        "generated": [[0, 0, 0, 1, 1, 1], [0, 1, 0, 0, 0, 0]],
    }[positions]
    outputs = engine.outputs(batch, [1])
    probe = Candidate(1, 0, Recipe(), intervention("static", positions, 1))
    seen: list[torch.Tensor] = []
    with engine.steered(probe, outputs):
        handle = backbone.blocks[1].register_forward_hook(lambda _m, _i, out: seen.append(hidden(out)))
        engine.objective.outcomes(continuation(engine, batch), batch)
        handle.remove()
    changed = (seen[0] != hidden(outputs[1])).any(-1).int().tolist()
    assert changed == marks


def continuation(engine: Trajectory, batch: Any) -> torch.Tensor:
    from lm_eval_aft.engine.batching import continuation_logits

    return continuation_logits(engine.model, batch)


REQUESTS = [
    ("the cat sees the", " dog"),
    ("the cat sees the", " red bird eats"),
    ("the cat sees the", " small fish likes one tree"),
    ("one", " two three"),
    ("", " a river"),
]


@pytest.mark.parametrize("name", ["static", "mlp", "all-layers", "scale"])
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("family", ["llama", pytest.param("falcon", marks=pytest.mark.slow)])
def test_log_likelihoods_equal_a_naive_hooked_model(
    family: str, positions: str, name: str, checkpoint: Callable[..., str]
) -> None:
    from lm_eval.api.instance import Instance

    vector = vector_for(name, positions)
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(REQUESTS)]
    lms = [AFTLM(checkpoint(family), vector=vector, batch_size=3, fast=fast) for fast in (True, False)]
    answers = [lm.loglikelihood(requests, disable_tqdm=True) for lm in lms]
    if family == "llama":
        assert lms[0].paths_taken()["packed"] >= 1
    lm = AFTLM(checkpoint(family))
    for i, (context, tail) in enumerate(REQUESTS):
        if context:
            head, own = lm._encode_pair(context, tail)
        else:
            head, own = [lm.prefix_token_id], lm.tok_encode(tail, add_special_tokens=False)
        row = [*head, *own][:-1]
        kinds = ["prompt"] * (len(head) - 1) + ["last"] + ["generated"] * (len(own) - 1)
        wanted = {"prompt": ("prompt", "last"), "all": ("prompt", "last", "generated")}
        marks = [int(kind in wanted.get(positions, (positions,))) for kind in kinds]
        remove = naive_steered(lm.model, vector, [marks])
        with torch.no_grad():
            logits = lm.model(torch.tensor([row])).logits[0].log_softmax(-1)
        remove()
        expected = sum(float(logits[len(head) - 1 + k, token]) for k, token in enumerate(own))
        for each in answers:
            assert each[i][0] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("name", ["static", "drab", "scale"])
@pytest.mark.parametrize("positions", POSITIONS)
def test_generation_equals_a_naive_loop(positions: str, name: str, checkpoint: Callable[..., str]) -> None:
    from lm_eval.api.instance import Instance

    vector = replace(vector_for(name, positions), coefficient=4.0)
    prompts = ["the cat sees", "one", "a small fish likes the red tree"]
    kwargs = {"until": ["zzz"], "max_gen_toks": 6, "do_sample": False}
    requests = [Instance("generate_until", {}, (text, kwargs), i) for i, text in enumerate(prompts)]
    texts = []
    for fast in (True, False):
        lm = AFTLM(checkpoint("llama"), vector=vector, batch_size=3, fast=fast)
        texts.append(lm.generate_until(requests, disable_tqdm=True))
        assert not fast or lm.paths_taken()["generated in shared batches"] == 3
    lm = AFTLM(checkpoint("llama"))
    for i, prompt in enumerate(prompts):
        start = lm.tok_encode(prompt)
        ids, n = list(start), len(start)
        for _ in range(6):
            kinds = ["prompt"] * (n - 1) + ["last"] + ["generated"] * (len(ids) - n)
            wanted = {"prompt": ("prompt", "last"), "all": ("prompt", "last", "generated")}
            marks = [int(kind in wanted.get(positions, (positions,))) for kind in kinds]
            remove = naive_steered(lm.model, vector, [marks])
            with torch.no_grad():
                ids.append(int(lm.model(torch.tensor([ids])).logits[0, -1].argmax()))
            remove()
            if ids[-1] == lm.eot_token_id:
                break
        expected = lm.tok_decode([t for t in ids[n:] if t != lm.eot_token_id])
        assert texts[0][i] == texts[1][i] == expected


def test_unknown_roles_are_refused() -> None:
    model = tiny_model("llama")
    with attach(model, vector_for("static", "prompt")), pytest.raises(AFTError, match="belong to the prompt"):
        model.model(inputs_embeds=torch.zeros(1, 3, 32), attention_mask=torch.zeros(1, 1, 3, 3))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_caa_equals_an_independent_mean_difference(family: str) -> None:
    """Against ``output_hidden_states``, whose entry L + 1 is block L's output (the last is normed)."""
    model = tiny_model(family)
    backbone = find_backbone(model)
    docs = documents(7)
    found = mean_differences(model, backbone, docs, window=128)
    assert sorted(found) == [0, 1, 2, 3]
    for layer in range(3):  # the last entry of output_hidden_states is behind the final norm
        total = torch.zeros(32)
        for document in docs:
            means = []
            for context, tail in document.pairs:
                with torch.no_grad():
                    out = model(torch.tensor([[*context, *tail]]), output_hidden_states=True)
                means.append(out.hidden_states[layer + 1][0, len(context) :].mean(0))
            right = means.pop(document.gold[0])
            total += right - torch.stack(means).mean(0)
        assert torch.allclose(found[layer], total / len(docs), atol=1e-5)


SETTINGS: dict[str, Any] = {
    "train_docs": 12,
    "selection_docs": 12,
    "protocol": "maximum",
    "epochs": 2,
    "seeds": 2,
    "layers": "1-2",
    "lr": 1e-2,
    "retries": 0,
    "regression": False,
    "batch_size": 4,
    "progress": False,
}


@pytest.mark.parametrize("task", ["toy_choice", pytest.param("toy_generate", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_saves_and_scores(
    name: str, task: str, checkpoint: Callable[..., str], toy_tasks: Callable[..., str], tmp_path: Path
) -> None:
    lm = AFTLM(checkpoint("llama"), batch_size=8)
    settings = {**SETTINGS, "include_path": (toy_tasks(),), "method": name}
    if METHODS[name].trained:
        settings["positions"] = "prompt"
    result = train_vector(lm, task, tmp_path / "v", **settings)
    vector = SteeringVector.load(tmp_path / "v")
    assert vector.method == name
    assert vector.positions == settings.get("positions", "all")
    assert vector.metadata["parameters"] == sum(tensor.numel() for tensor in vector.tensors.values())
    assert tuple(vector.layers) == ((1, 2) if name == "all-layers" else (result.sweep.chosen.layer,))
    lm.steer(vector)
    assert lm.get_model_info()["aft"]["vector"]["method"] == name
    if name == "drab-strong":  # random parameters are drawn from the seed
        again = train_vector(AFTLM(checkpoint("llama"), batch_size=8), task, None, **settings)
        assert again.vector.digest() == result.vector.digest()


def test_calibration_finds_the_best_coefficient(
    checkpoint: Callable[..., str], toy_tasks: Callable[..., str]
) -> None:
    settings = {**SETTINGS, "include_path": (toy_tasks(),), "lr": 3e-2}
    lm = AFTLM(checkpoint("llama"), batch_size=8)
    found = train_vector(lm, "toy_choice", None, calibrate=True, **settings).vector
    said = found.metadata["calibration"]
    scores = {c: score for c, score, _, _ in said["curve"]}
    assert found.coefficient == said["coefficient"] > 0
    assert scores[found.coefficient] == min(score for c, score in scores.items() if c > 0)
    selection = found.metadata["selection"]
    assert scores[1.0] == pytest.approx(selection["trained"]["score"], abs=1e-6)
    assert scores[found.coefficient] == pytest.approx(selection["vector"]["score"], abs=1e-6)
    assert scores[0.0] == pytest.approx(found.metadata["selection"]["baseline"]["score"], abs=1e-6)
    capped = train_vector(
        AFTLM(checkpoint("llama"), batch_size=8), "toy_choice", None, norm_cap=0.01, **settings
    )
    assert 0 < capped.vector.coefficient < 1
    assert capped.vector.coefficient == pytest.approx(capped.vector.metadata["calibration"]["cap"])
    with pytest.raises(AFTError, match="norm cap"):
        train_vector(lm, "toy_choice", None, norm_cap=0.1, method="mlp", **settings)
