"""A control vector in a real llama.cpp, where its Python bindings (llama-cpp-python) are installed."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from lm_eval_aft import SteeringVector
from lm_eval_aft.demo import model_path
from lm_eval_aft.export.formats import export_vector
from lm_eval_aft.steering.hooks import attach
from tests.support.gguf_files import llama_to_gguf

llama_cpp: Any = pytest.importorskip("llama_cpp")
gguf: Any = pytest.importorskip("gguf")

IDS = [5, 17, 300, 42, 7, 999, 123, 456]


def logits(model_file: Path, control_vector: Path | None) -> NDArray[np.float32]:
    """Logits of llama.cpp at every position of IDS."""
    parameters = llama_cpp.llama_model_default_params()
    parameters.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(str(model_file).encode(), parameters)
    assert model
    options = llama_cpp.llama_context_default_params()
    options.n_ctx, options.n_batch, options.n_threads, options.n_threads_batch = 64, 64, 1, 1
    options.flash_attn_type = 0
    options.type_k = options.type_v = 0  # F32 keys and values
    context = llama_cpp.llama_init_from_model(model, options)
    width, depth = llama_cpp.llama_model_n_embd(model), llama_cpp.llama_model_n_layer(model)
    if control_vector is not None:
        # As llama.cpp's own loader does: direction.N at place N - 1.
        data = np.zeros((depth - 1, width), dtype=np.float32)
        for tensor in gguf.GGUFReader(control_vector).tensors:
            data[int(tensor.name.removeprefix("direction.")) - 1] = tensor.data
        apply = getattr(llama_cpp, "llama_set_adapter_cvec", None) or llama_cpp.llama_apply_adapter_cvec
        pointer = data.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        assert apply(context, pointer, data.size, width, 1, depth) == 0
    batch = llama_cpp.llama_batch_init(len(IDS), 0, 1)
    batch.n_tokens = len(IDS)
    for i, token in enumerate(IDS):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, 1
        batch.seq_id[i][0] = 0
    assert llama_cpp.llama_decode(context, batch) == 0
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    found = llama_cpp.llama_get_logits(context)
    result = np.ctypeslib.as_array(found, shape=(len(IDS), vocabulary)).copy()
    llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
    return result


@pytest.mark.parametrize("layers", [(1,), (2,), (1, 3)])
def test_llama_cpp_steers_as_the_hook_does(layers: tuple[int, ...], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32).eval()
    llama_to_gguf(model, tmp_path / "model.gguf")
    generator = torch.Generator().manual_seed(1)
    vector = SteeringVector({n: torch.randn(128, generator=generator) for n in layers}, 0.5)
    export_vector(vector, "gguf", tmp_path / "v.gguf", model="demo")
    ids = torch.tensor([IDS])
    with torch.no_grad():
        plain = model(ids).logits[0].numpy()
        with attach(model, vector):
            steered = model(ids).logits[0].numpy()
    theirs_plain = logits(tmp_path / "model.gguf", None)
    theirs = logits(tmp_path / "model.gguf", tmp_path / "v.gguf")
    effect = np.abs(steered - plain).max()
    print(
        f"layers {layers}: without the vector {np.abs(theirs_plain - plain).max():.1e}, "
        f"with it {np.abs(theirs - steered).max():.1e}, effect {effect:.1e}"
    )
    assert effect > 0.1
    assert np.abs(theirs_plain - plain).max() < 1e-3
    assert np.abs(theirs - steered).max() < 1e-3
