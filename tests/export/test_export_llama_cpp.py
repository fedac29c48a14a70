"""A control vector in a real llama.cpp, where a build of it with declarations for Python is installed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from lm_eval_aft import SteeringVector
from lm_eval_aft._util.model_source import loaded_by_lm_eval, model_source
from lm_eval_aft.demo import model_path
from lm_eval_aft.export.formats import export_vector
from lm_eval_aft.steering.backbone import find_backbone
from lm_eval_aft.steering.hooks import attach
from tests.support.gguf_files import llama_to_gguf

gguf: Any = pytest.importorskip("gguf")
bindings: Any = pytest.importorskip(
    "llama_cpp_py_sync._cffi_bindings",
    reason="llama.cpp is not here (pip install llama-cpp-py-sync==0.11548 xllamacpp==2026.10.11549)",
)


def library() -> Any:
    """llama.cpp as llama-cpp-py-sync brings it or, where that needs a newer libc, as xllamacpp does.

    The declarations are the former's, so both must be of one time.
    """
    try:
        return bindings.get_lib()
    except RuntimeError as error:
        other = pytest.importorskip("xllamacpp.xllamacpp", reason=f"no xllamacpp, and {error}")
        return ffi.dlopen(other.__file__)


ffi = bindings.get_ffi()
llama = library()
silence = ffi.callback("void(enum ggml_log_level, const char *, void *)", lambda *_: None)
llama.llama_log_set(silence, ffi.NULL)
IDS = [5, 17, 300, 42, 7, 999, 123, 456]
TEXT = "Question: Which of these conducts electricity best, and why do people put it into the walls of \
houses?\nAnswer: copper wire, because it lets the current through with little loss and bends easily."


def logits(model_file: Path, control_vector: Path | None, ids: list[int]) -> Tensor:
    """Logits of llama.cpp at every position of ``ids``, shape (positions, vocabulary)."""
    parameters = llama.llama_model_default_params()
    parameters.n_gpu_layers = 0
    model = llama.llama_model_load_from_file(str(model_file).encode(), parameters)
    assert model != ffi.NULL
    options = llama.llama_context_default_params()
    options.n_ctx = options.n_batch = options.n_ubatch = 256
    options.n_threads = options.n_threads_batch = 1
    options.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
    options.type_k = options.type_v = llama.GGML_TYPE_F32
    context = llama.llama_init_from_model(model, options)
    assert context != ffi.NULL
    width, depth = llama.llama_model_n_embd(model), llama.llama_model_n_layer(model)
    if control_vector is not None:
        # As llama.cpp's own loader does: direction.N at place N - 1.
        data = np.zeros((depth - 1, width), dtype=np.float32)
        for tensor in gguf.GGUFReader(control_vector).tensors:
            data[int(tensor.name.removeprefix("direction.")) - 1] = tensor.data
        values = ffi.from_buffer("float[]", data)
        assert llama.llama_set_adapter_cvec(context, values, data.size, width, 1, depth) == 0
    batch = llama.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for i, token in enumerate(ids):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, 1
        batch.seq_id[i][0] = 0
    assert llama.llama_decode(context, batch) == 0
    vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    found = ffi.buffer(llama.llama_get_logits(context), 4 * len(ids) * vocabulary)
    result: NDArray[np.float32] = np.frombuffer(found, dtype=np.float32).reshape(len(ids), vocabulary)
    copied = torch.from_numpy(result.copy())
    llama.llama_batch_free(batch)
    llama.llama_free(context)
    llama.llama_model_free(model)
    return copied


def hooked(model: Any, ids: list[int], vector: SteeringVector | None) -> Tensor:
    with torch.no_grad():
        if vector is None:
            return model(torch.tensor([ids])).logits[0].float()
        with attach(model, vector):
            return model(torch.tensor([ids])).logits[0].float()


@pytest.mark.parametrize("layers", [(1,), (2,), (1, 3)])
def test_llama_cpp_steers_as_the_hook_does(layers: tuple[int, ...], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32).eval()
    llama_to_gguf(model, tmp_path / "model.gguf")
    generator = torch.Generator().manual_seed(1)
    vector = SteeringVector({n: torch.randn(128, generator=generator) for n in layers}, 0.5)
    export_vector(vector, "gguf", tmp_path / "v.gguf", model="demo")
    plain, steered = hooked(model, IDS, None), hooked(model, IDS, vector)
    floor = (logits(tmp_path / "model.gguf", None, IDS) - plain).abs().max()
    error = (logits(tmp_path / "model.gguf", tmp_path / "v.gguf", IDS) - steered).abs().max()
    effect = (steered - plain).abs().max()
    print(f"layers {layers}: without the vector {floor:.1e}, with it {error:.1e}, effect {effect:.1e}")
    assert effect > 0.1
    assert floor < 1e-3
    assert error < 1e-3


@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", ["smollm2-135m-instruct", "gemma-3-270m", "qwen2.5-coder-0.5b-instruct"])
def test_a_quantised_file_is_steered_as_its_dequantised_weights(
    name: str, real_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """llama.cpp rounds activations where weights are quantised: a control vector adds nothing to that error.

    In F32 nothing is rounded, and the two agree.
    """
    file = real_model(name) / "gguf" / "model.gguf"
    model, tokenizer = loaded_by_lm_eval(*model_source(str(file), {"dtype": "float32"}))
    ids = tokenizer(TEXT)["input_ids"]
    layer = len(find_backbone(model).blocks) // 3
    with torch.no_grad():
        states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[layer + 1][0]
    direction = torch.randn(states.shape[-1], generator=torch.Generator().manual_seed(3))
    vector = SteeringVector({layer: direction / direction.norm() * states.norm(dim=-1).median() / 2})
    export_vector(vector, "gguf", tmp_path / "v.gguf", model=str(file))

    ours = [hooked(model, ids, each).log_softmax(-1) for each in (None, vector)]
    best = ours[1].topk(10).indices
    ours = [each.gather(-1, best) for each in ours]
    shift = ours[1] - ours[0]

    def compare(weights: Path) -> list[Tensor]:
        """Without the vector, with it, and in what it changes: how far apart the log-probabilities are."""
        theirs = [logits(weights, each, ids).log_softmax(-1) for each in (None, tmp_path / "v.gguf")]
        theirs = [each.gather(-1, best) for each in theirs]
        pairs = (theirs[0], ours[0]), (theirs[1], ours[1]), (theirs[1] - theirs[0], shift)
        apart = [(a - b).abs() for a, b in pairs]
        told = ", ".join(f"{each.mean():.1e} (at most {each.max():.1e})" for each in apart)
        print(f"{name}, {weights.parent.name}, layer {layer}, {len(ids)} tokens, nats: {told}")
        return apart

    print(f"the vector moves them by {shift.abs().mean():.2f} nats (at most {shift.abs().max():.2f})")
    floor, error, of_shift = compare(file)
    assert shift.abs().mean() > 10 * of_shift.mean()
    assert error.mean() < 1.5 * floor.mean()
    if model.config.model_type == "llama":  # the one architecture that is written as GGUF here
        for apart in compare(llama_to_gguf(model, tmp_path / "model.gguf")):
            assert apart.max() < 1e-3
