"""Tiny random models of many families: the one list that tests and the table of families are made from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

WORDS = (
    "the a cat dog bird fish tree stone river sees eats likes finds red blue green small large one two "
    "three four five six seven eight nine ten Question Answer is not and or : . ? , # yes no up down"
).split()

KV: dict[str, Any] = {"num_key_value_heads": 2}
HEAD: dict[str, Any] = {**KV, "head_dim": 8}
WINDOW: dict[str, Any] = {**KV, "sliding_window": 6}
ATTENTIONS = ["full_attention"] * 4
MIXED = ["linear_attention", "full_attention"] * 2
EXPERTS: dict[str, Any] = {
    **KV,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
LATENT: dict[str, Any] = {  # attention through a latent space, as DeepSeek's
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "head_dim": 4,
}
ROUTED: dict[str, Any] = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
DELTA: dict[str, Any] = {  # gated delta rule, as Qwen3-Next's
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": MIXED,
}
MAMBA2: dict[str, Any] = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
}
COMMON: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 1,
}


@dataclass(frozen=True)
class Family:
    """What makes a family tiny.

    Attributes:
        kind: dense, mixture (of experts), state-space, hybrid, multimodal, encoder or encoder-decoder.
        config: its config class in transformers.
        extra: settings beyond `COMMON`.
        less: settings of `COMMON` that its config refuses.
        model: the class that builds it.
    """

    kind: str
    config: str
    extra: dict[str, Any] = field(default_factory=dict)
    less: tuple[str, ...] = ()
    model: str = "AutoModelForCausalLM"


def _dense(config: str, **extra: Any) -> Family:
    return Family("dense", config, extra)


# Those that most tests go through: one of each way a family can differ for packing and steering.
CORE: dict[str, Family] = {
    "gpt_neox": _dense("GPTNeoXConfig"),
    "llama": _dense("LlamaConfig", **KV),
    "qwen2": _dense("Qwen2Config", **KV),
    "qwen3": _dense("Qwen3Config", **HEAD),
    "phi": _dense("PhiConfig"),
    "stablelm": _dense("StableLmConfig", **KV),
    "mistral": _dense("MistralConfig", **KV, sliding_window=None),
    "mistral-window": _dense("MistralConfig", **WINDOW),
    "gpt2": _dense("GPT2Config"),
    "opt": _dense("OPTConfig", word_embed_proj_dim=32, ffn_dim=64),
    "gemma2": _dense("Gemma2Config", **HEAD, sliding_window=6),
    "olmo2": _dense("Olmo2Config"),
    "granite": _dense("GraniteConfig", residual_multiplier=0.5),
    "falcon": _dense("FalconConfig", alibi=True),
    "bloom": _dense("BloomConfig"),
    "gpt_neo": _dense("GPTNeoConfig", attention_types=[[["global", "local"], 2]], window_size=6),
    "smollm3": _dense("SmolLM3Config", **KV),
}
DENSE: dict[str, Family] = {
    "phi3": _dense("Phi3Config", **KV, sliding_window=None),
    "phi3-window": _dense("Phi3Config", **WINDOW),
    "qwen2-window": _dense("Qwen2Config", **WINDOW, use_sliding_window=True, max_window_layers=2),
    "gemma": _dense("GemmaConfig", **HEAD),
    "gemma3_text": _dense("Gemma3TextConfig", **HEAD, sliding_window=6, sliding_window_pattern=2),
    "olmo": _dense("OlmoConfig"),
    "olmo3": _dense("Olmo3Config", **KV, sliding_window=6),
    "cohere": _dense("CohereConfig", **KV),
    "cohere2": _dense("Cohere2Config", **WINDOW),
    "starcoder2": _dense("Starcoder2Config", **KV),
    "falcon-rope": _dense("FalconConfig", alibi=False, parallel_attn=True, multi_query=True),
    "gptj": _dense("GPTJConfig", rotary_dim=4),
    "codegen": _dense("CodeGenConfig", rotary_dim=4),
    "opt-post": _dense("OPTConfig", word_embed_proj_dim=32, ffn_dim=64, do_layer_norm_before=False),
    "glm": _dense("GlmConfig", **HEAD),
    "glm4": _dense("Glm4Config", **HEAD),
    "mpt": _dense("MptConfig"),
    "gpt_bigcode": _dense("GPTBigCodeConfig"),
    "gpt_neox_japanese": _dense("GPTNeoXJapaneseConfig"),
    "openai-gpt": _dense("OpenAIGPTConfig"),
    "ctrl": _dense("CTRLConfig", dff=64),
    "xglm": _dense("XGLMConfig", ffn_dim=64),
    "biogpt": _dense("BioGptConfig"),
    "persimmon": _dense("PersimmonConfig"),
    "nemotron": _dense("NemotronConfig", **KV),
    "helium": _dense("HeliumConfig", **HEAD),
    "apertus": _dense("ApertusConfig", **KV),
    "arcee": _dense("ArceeConfig", **KV),
    "exaone4": _dense("Exaone4Config", **WINDOW),
    "ernie4_5": _dense("Ernie4_5Config", **HEAD),
    "diffllama": _dense("DiffLlamaConfig", **KV),
    "hunyuan_v1_dense": _dense("HunYuanDenseV1Config", **HEAD),
    "seed_oss": _dense("SeedOssConfig", **HEAD),
    "nanochat": _dense("NanoChatConfig", **KV),
    "modernbert-decoder": _dense("ModernBertDecoderConfig", local_attention=6),
    "ministral3": _dense("Ministral3Config", **HEAD),
    "llama-dynamic-rope": _dense(
        "LlamaConfig", **KV, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    ),
    "minicpm3": _dense("MiniCPM3Config", **LATENT),
}
MIXTURES: dict[str, Family] = {
    "mixtral": Family("mixture", "MixtralConfig", {**KV, "num_local_experts": 4}),
    "phimoe": Family("mixture", "PhimoeConfig", {**KV, "num_local_experts": 4}),
    "qwen2_moe": Family("mixture", "Qwen2MoeConfig", EXPERTS),
    "qwen3_moe": Family("mixture", "Qwen3MoeConfig", {**EXPERTS, "head_dim": 8}),
    "olmoe": Family("mixture", "OlmoeConfig", EXPERTS),
    "granitemoe": Family("mixture", "GraniteMoeConfig", {**KV, "num_local_experts": 4}),
    "gpt_oss": Family(
        "mixture",
        "GptOssConfig",
        {**HEAD, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6},
    ),
    "deepseek_v3": Family("mixture", "DeepseekV3Config", {**LATENT, **ROUTED}),
    "glm4_moe": Family("mixture", "Glm4MoeConfig", {**HEAD, **ROUTED}),
    "jetmoe": Family("mixture", "JetMoeConfig", {"num_local_experts": 4, "kv_channels": 8, **KV}),
    "ernie4_5_moe": Family(
        "mixture",
        "Ernie4_5_MoeConfig",
        {**KV, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16, "moe_num_shared_experts": 1},
    ),
    "llama4_text": Family(
        "mixture",
        "Llama4TextConfig",
        {**HEAD, "num_local_experts": 4, "intermediate_size_mlp": 64, "attention_chunk_size": 6},
    ),
}
STATEFUL: dict[str, Family] = {
    "mamba": Family("state-space", "MambaConfig", {"state_size": 8}),
    "mamba2": Family(
        "state-space",
        "Mamba2Config",
        {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 8},
    ),
    "falcon_mamba": Family("state-space", "FalconMambaConfig", {"state_size": 8}),
    "rwkv": Family("state-space", "RwkvConfig", {"attention_hidden_size": 32, "context_length": 128}),
    "jamba": Family(
        "hybrid",
        "JambaConfig",
        {
            **KV,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "num_experts": 4,
            "use_mamba_kernels": False,
        },
    ),
    "bamba": Family("hybrid", "BambaConfig", {**KV, **MAMBA2, "attn_layer_indices": [1, 3]}),
    "falcon_h1": Family("hybrid", "FalconH1Config", {**HEAD, **MAMBA2, "mamba_d_ssm": 64}),
    "recurrent_gemma": Family("hybrid", "RecurrentGemmaConfig", {**KV, "attention_window_size": 8}),
    "granitemoehybrid": Family(
        "hybrid",
        "GraniteMoeHybridConfig",
        {
            **KV,
            **MAMBA2,
            "num_local_experts": 0,
            "shared_intermediate_size": 64,
            "layer_types": ["mamba", "attention"] * 2,
        },
    ),
    "zamba2": Family(
        "hybrid",
        "Zamba2Config",
        {
            **KV,
            "mamba_d_state": 8,
            "n_mamba_heads": 8,
            "mamba_headdim": 8,
            "chunk_size": 8,
            "adapter_rank": 4,
            "layers_block_type": ["mamba", "hybrid"] * 2,
        },
    ),
    "qwen3_next": Family("hybrid", "Qwen3NextConfig", {**EXPERTS, **DELTA, "head_dim": 8}),
    "qwen3_5_text": Family("hybrid", "Qwen3_5TextConfig", {**HEAD, **DELTA}),
    "lfm2": Family("hybrid", "Lfm2Config", {**KV, "layer_types": ["conv", "full_attention"] * 2}),
    "minimax": Family("hybrid", "MiniMaxConfig", {**HEAD, "num_local_experts": 4, "layer_types": MIXED}),
}
TEXT: dict[str, Any] = {k: v for k, v in COMMON.items() if not k.endswith("token_id")}
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 4,  # as many as the text model, so that depth alone does not tell them apart
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "image_size": 8,
    "patch_size": 4,
}
OTHERS: dict[str, Family] = {
    "gemma3": Family(
        "multimodal",
        "Gemma3Config",
        {
            "text_config": {**TEXT, **HEAD, "sliding_window": 6, "pad_token_id": 1},
            "vision_config": VISION,
            "mm_tokens_per_image": 4,
            "image_token_index": 63,
            "boi_token_index": 62,
            "eoi_token_index": 61,
        },
    ),
    "fuyu": Family("multimodal", "FuyuConfig", {"image_size": 8, "patch_size": 4, "num_channels": 1}),
    "llava": Family(
        "multimodal",
        "LlavaConfig",
        {
            "text_config": {"model_type": "llama", **TEXT, **KV},
            "vision_config": {"model_type": "clip_vision_model", **VISION},
            "image_token_index": 63,
        },
        model="LlavaForConditionalGeneration",
    ),
    "bert": Family("encoder", "BertConfig"),
    "bert-decoder": Family("dense", "BertConfig", {"is_decoder": True}),
    "xlm": Family("encoder", "XLMConfig", {"n_words": 64, "emb_dim": 32, "n_layers": 4, "n_heads": 4}),
    "t5": Family(
        "encoder-decoder",
        "T5Config",
        {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 4, "num_heads": 4, "decoder_start_token_id": 0},
        less=("num_hidden_layers", "num_attention_heads", "hidden_size"),
        model="T5ForConditionalGeneration",
    ),
    "bart": Family(
        "encoder-decoder",
        "BartConfig",
        {
            "d_model": 32,
            "encoder_layers": 4,
            "decoder_layers": 4,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
        },
        less=("num_hidden_layers", "num_attention_heads", "hidden_size"),
        model="BartForConditionalGeneration",
    ),
}
FAMILIES: dict[str, Family] = {**CORE, **DENSE, **MIXTURES, **STATEFUL, **OTHERS}


def tiny_config(family: str, layers: int = 4) -> Any:
    """The config of a tiny model."""
    import transformers

    found = FAMILIES[family]
    wrapped = {"text_config", "vision_config"} <= found.extra.keys()
    given = {**({} if wrapped else {**COMMON, "num_hidden_layers": layers}), **found.extra}
    return getattr(transformers, found.config)(**{k: v for k, v in given.items() if k not in found.less})


def tiny_model(family: str, seed: int = 0, dtype: Any = None, layers: int = 4) -> Any:
    """A random model of a family: hidden size 32, 4 blocks, vocabulary of the tiny tokenizer."""
    import torch
    import transformers

    config = tiny_config(family, layers)
    torch.manual_seed(seed)
    made: Any = getattr(transformers, FAMILIES[family].model)
    model = made.from_config(config) if hasattr(made, "from_config") else made(config)
    # The default initialisation is so small that every answer looks alike.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4)
    return model.to(dtype or torch.float32).eval()


def tiny_tokenizer() -> Any:
    """A word-level tokenizer over 64 tokens, white space kept as a token of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<eos>", "<pad>", "<unk>", " ", "\n", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(" ", behavior="isolated"),
            pre_tokenizers.Split("\n", behavior="isolated"),
            pre_tokenizers.Punctuation(),
        ]
    )
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", bos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )
    fast.chat_template = (
        "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} \n {% endfor %}"
        "{% if add_generation_prompt %}assistant : {% endif %}"
    )
    return fast
