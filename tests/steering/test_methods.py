"""The interventions: their parameter counts, what they add, their files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from lm_eval_aft import AFTError, SteeringVector, attach
from lm_eval_aft.cli.main import aft
from lm_eval_aft.steering.methods import METHODS, find_method, register_method
from lm_eval_aft.steering.vector_file import read_header
from lm_eval_aft.training.setup import random_like
from tests.conftest import tiny_model

COUNTS = {
    "static": 1024,
    "drab": 2049,
    "drab-strong": 74_312,
    "mlp": 263_296,
    "caa": 1024,
    "all-layers": 24_576,
    "scale": 1024,
}


def tensors_of(name: str, width: int = 32, layer: int = 2, noise: float = 0.5) -> dict[str, torch.Tensor]:
    """A method's tensors, all of them random."""
    generator = torch.Generator().manual_seed(3)
    layers = (1, layer) if name == "all-layers" else (layer,)
    tensors = find_method(name).initial_tensors(width, layers, generator)
    return {k: v + noise * torch.randn(v.shape, generator=generator) for k, v in tensors.items()}


def vector_of(name: str, **options: int) -> SteeringVector:
    return SteeringVector.from_tensors(tensors_of(name, **options), method=name, coefficient=0.5)


@pytest.mark.parametrize("name", METHODS)
def test_parameter_counts_at_1024(name: str) -> None:
    method = METHODS[name]
    assert method.parameters(1024, 24) == COUNTS[name]
    tensors = method.initial_tensors(
        1024, tuple(range(24)) if method.steers_all_layers else (3,), torch.Generator()
    )
    assert sum(tensor.numel() for tensor in tensors.values()) == COUNTS[name]


def test_counts_follow_their_formulas() -> None:
    for d in (32, 64, 768):
        r, k = d // 16, d // 8
        assert METHODS["drab"].parameters(d) == 2 * d + 1
        assert METHODS["drab-strong"].parameters(d) == r * (d + 1) + 8 * (r + 1) + 8 * d
        assert METHODS["mlp"].parameters(d) == 2 * d * k + k + d


@pytest.mark.parametrize("name", METHODS)
def test_nothing_is_added_at_the_start(name: str) -> None:
    method = METHODS[name]
    tensors = method.initial_tensors(
        32, (1, 2) if method.steers_all_layers else (2,), torch.Generator().manual_seed(0)
    )
    delta = method.delta(tensors, 2, torch.randn(3, 5, 32))
    assert not bool(delta.any())


def test_what_dynamic_methods_add() -> None:
    """Against torch's own modules."""
    hidden = torch.randn(2, 7, 32)
    t = tensors_of("drab")
    gate = nn.Linear(32, 1)
    gate.load_state_dict({"weight": t["method.gate.weight"], "bias": t["method.gate.bias"]})
    assert torch.allclose(METHODS["drab"].delta(t, 2, hidden), gate(hidden).sigmoid() * t["layers.2"])
    t = tensors_of("drab-strong")
    router = nn.Sequential(nn.Linear(32, 2), nn.ReLU(), nn.Linear(2, 8), nn.Softmax(-1))
    state = {}
    for part, place in (("hidden", 0), ("out", 2)):
        state |= {f"{place}.{kind}": t[f"method.router.{part}.{kind}"] for kind in ("weight", "bias")}
    router.load_state_dict(state)
    bank = torch.cat([t["layers.2"][None], t["method.bank"]])
    expected = torch.einsum("rtk,kd->rtd", router(hidden), bank)
    assert torch.allclose(METHODS["drab-strong"].delta(t, 2, hidden), expected, atol=1e-6)
    t = tensors_of("mlp")
    net = nn.Sequential(nn.Linear(32, 4), nn.ReLU(), nn.Linear(4, 32))
    net.load_state_dict(
        {
            "0.weight": t["method.down.weight"],
            "0.bias": t["method.down.bias"],
            "2.weight": t["method.up.weight"],
            "2.bias": t["layers.2"],
        }
    )
    assert torch.allclose(METHODS["mlp"].delta(t, 2, hidden), net(hidden), atol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_units_follow_the_hidden_states(name: str) -> None:
    """Hidden states 8 times as long, tensors in their units: what is added is 8 times as long."""
    method, tensors = METHODS[name], tensors_of(name)
    hidden = torch.randn(5, 32, generator=torch.Generator().manual_seed(4))
    longer = {key: each * 8.0 ** method.power(key) for key, each in tensors.items()}
    added = method.delta(tensors, 2, hidden)
    assert torch.allclose(method.delta(longer, 2, hidden * 8), added * 8, rtol=1e-5, atol=1e-5)
    assert float(added.norm()) > 0.1


def test_scale_multiplies_by_one_plus_its_factors() -> None:
    hidden, factors = torch.randn(2, 7, 32), torch.randn(32)
    added = METHODS["scale"].delta({"layers.2": factors}, 2, hidden)
    assert torch.allclose(hidden + added, hidden * (1 + factors), atol=1e-6)
    model = tiny_model("llama")
    vector = SteeringVector({1: factors}, method="scale", coefficient=0.5)
    read: list[torch.Tensor] = []  # by the block after the steered one
    model.model.layers[2].register_forward_pre_hook(lambda _module, inputs: read.append(inputs[0]))
    with torch.no_grad():
        model(torch.tensor([[5, 6, 7, 8]]))
        with attach(model, vector):
            model(torch.tensor([[5, 6, 7, 8]]))
    plain, steered = read
    assert torch.allclose(steered, plain * (1 + 0.5 * factors), atol=1e-5)


def test_the_placebo_of_scale_flips_signs() -> None:
    vector = vector_of("scale")
    (factors,), (drawn,) = vector.layers.values(), random_like(vector, 0).layers.values()
    assert torch.equal(drawn.abs(), factors.abs())
    assert 0 < int((drawn == factors).sum()) < 32


def test_a_retry_starts_with_a_tenth_of_the_hidden_state() -> None:
    hidden = 37.0 * torch.nn.functional.normalize(torch.randn(500, 32), dim=-1)
    for name in ("static", "scale"):
        method = METHODS[name]
        noise = torch.stack([torch.randn(32) * method.retry_std(32, 37.0) for _ in range(500)])
        added = torch.stack([method.delta({"layers.2": v}, 2, h) for v, h in zip(noise, hidden, strict=True)])
        assert float((added.norm(dim=-1) / hidden.norm(dim=-1)).mean()) == pytest.approx(0.1, rel=0.1)


def test_a_method_is_added_by_one_decorated_class() -> None:
    class Negative(type(METHODS["static"])):  # type: ignore[misc]
        name, formula = "negative", "-v"

        def delta(self, tensors: dict[str, torch.Tensor], layer: int, hidden: torch.Tensor) -> torch.Tensor:
            return -tensors[f"layers.{layer}"]

    register_method(Negative)
    try:
        assert "h + -v" in CliRunner().invoke(aft, ["methods"]).output
        with pytest.raises(AFTError, match="scale, negative"):
            find_method("lora")
        assert SteeringVector({1: torch.ones(4)}, method="negative").method == "negative"
    finally:
        del METHODS["negative"]


@pytest.mark.parametrize("name", METHODS)
def test_files_keep_everything(tmp_path: Path, name: str) -> None:
    vector = vector_of(name)
    file = vector.save(tmp_path / "v")
    back = SteeringVector.load(file)
    assert (back.method, back.coefficient, back.digest()) == (name, 0.5, vector.digest())
    assert all(torch.equal(back.tensors[key], value) for key, value in vector.tensors.items())
    header = read_header(file)
    assert header.layers == tuple(vector.layers)


def test_digest_depends_on_every_tensor() -> None:
    vector = vector_of("mlp")
    for name in vector.extra:
        other = vector_of("mlp")
        other.extra[name] = other.extra[name] + 1
        assert other.digest() != vector.digest()


def test_misshapen_methods_are_refused(tmp_path: Path) -> None:
    tensors = tensors_of("drab")
    with pytest.raises(AFTError, match="'mlp' but holds"):
        SteeringVector.from_tensors(tensors, method="mlp")
    with pytest.raises(AFTError, match="'static' but holds"):
        SteeringVector.from_tensors(tensors)
    with pytest.raises(AFTError, match="NaN"):
        SteeringVector.from_tensors({**tensors, "method.gate.bias": torch.tensor([torch.nan])}, method="drab")
    with pytest.raises(AFTError, match="steers one"):
        SteeringVector.from_tensors({**tensors, "layers.1": torch.zeros(32)}, method="drab")
    with pytest.raises(AFTError, match="no vector of"):
        SteeringVector.from_tensors({**tensors, "weights.1": torch.zeros(32)}, method="drab")
    file = vector_of("drab").save(tmp_path / "v")
    raw = file.read_bytes().replace(b'"method\\":\\"drab\\"', b'"method\\":\\"mlpp\\"')
    file.write_bytes(raw)
    for read in (SteeringVector.load, read_header):
        with pytest.raises(AFTError, match=r"mlpp.*this version knows"):
            read(file)


@pytest.mark.parametrize("name", METHODS)
def test_random_control_adds_as_much_in_another_direction(name: str) -> None:
    vector = vector_of(name)
    method, hidden = METHODS[name], torch.randn(50, 32)
    drawn = [random_like(vector, seed) for seed in (0, 0, 1)]
    assert drawn[0].digest() == drawn[1].digest() != drawn[2].digest()
    ours = method.delta(vector.tensors, 2, hidden).expand(50, 32)
    placebo = method.delta(drawn[0].tensors, 2, hidden).expand(50, 32)
    assert torch.allclose(placebo.norm(dim=-1), ours.norm(dim=-1), rtol=1e-4)
    cosines = torch.cosine_similarity(ours, placebo, dim=-1)
    assert float(cosines.abs().mean()) < 0.5


def test_random_rotations_have_no_direction_of_their_own() -> None:
    vector = vector_of("drab")
    drawn = torch.stack([random_like(vector, seed).layers[2] for seed in range(400)])
    # The mean of 400 directions of unit length in 32 dimensions has a norm of about 1/20.
    assert float(drawn.mean(0).norm() / drawn[0].norm()) < 0.1


def test_methods_are_listed() -> None:
    shown = CliRunner().invoke(aft, ["methods", "--hidden-size", "1024", "--layers", "24"])
    assert shown.exit_code == 0
    for name, count in COUNTS.items():
        assert any(name in line and f"{count:,}" in line for line in shown.output.splitlines())


def test_unknown_method() -> None:
    with pytest.raises(AFTError, match="no method 'lora'"):
        find_method("lora")


def test_methods_are_known_without_torch() -> None:
    code = "import lm_eval_aft.steering.methods, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
