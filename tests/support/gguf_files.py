"""GGUF files of tiny models."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def llama_to_gguf(model: Any, path: Path, kind: str = "F32") -> Path:
    """A Llama model as GGUF without a vocabulary, its matrices in a format such as F32, Q8_0 or Q4_0."""
    import gguf
    from gguf.quants import quantize

    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        for part, heads in (("q", config.num_attention_heads), ("k", config.num_key_value_heads)):
            if name.endswith(f"{part}_proj.weight"):  # GGUF rotates neighbours, transformers halves
                pairs = tensor.view(heads, 2, config.head_dim // 2, -1)
                tensor = pairs.transpose(1, 2).reshape(tensor.shape)
        values, called = tensor.contiguous().numpy(), names.get_name(name, try_suffixes=(".weight",))
        if tensor.ndim < 2 or kind == "F32":
            writer.add_tensor(called, values)
        else:
            stored = getattr(gguf.GGMLQuantizationType, kind)
            writer.add_tensor(called, quantize(values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
