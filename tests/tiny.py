"""Tiny random models of every family and a tiny tokenizer, made on the spot: the fixture `tiny` of every test.

model = tiny.tiny_model("llama")             hidden 32, 3 layers, intermediate 64, 256 positions, eval mode
tokenizer = tiny.tiny_tokenizer()            one token per byte
tiny.save_tiny("bert", tmp_path / "dense")   both, as a folder that transformers loads
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

SPECIAL = ("<pad>", "<bos>", "<eos>", "<cls>", "<sep>", "<mask>")  # ids 0, 1, 2, 3, 4 and, after the bytes, 261
VOCAB, POSITIONS = 264, 256
ENCODERS = ("bert", "roberta", "distilbert")

LLAMA = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
LLAMA |= {"num_key_value_heads": 2, "head_dim": 8}
BERT = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_inner": 64, "n_positions": POSITIONS},
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma": LLAMA,
    "gemma2": LLAMA,
    "gemma3_text": LLAMA,
    "arcee": LLAMA,
    "phi3": {**BERT, "num_key_value_heads": 4},
    "opt": {
        **{"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "ffn_dim": 64},
        **{"word_embed_proj_dim": 32, "init_std": 0.1},
    },
    "gpt_neox": BERT,
    "bert": BERT,
    "roberta": BERT,
    "distilbert": {"dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 64},
}


def tiny_tokenizer(eos: bool = True, ends: bool = False) -> PreTrainedTokenizerFast:
    """Return a tokenizer of one token per byte (ids 5 to 260); without `eos` BOS only, with `ends` <cls> and <sep>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*SPECIAL[:5], *alphabet, SPECIAL[5]]
    core = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    if ends:
        core.post_processor = processors.BertProcessing(("<sep>", 4), ("<cls>", 3))
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "cls_token": "<cls>", "sep_token": "<sep>"}
    if eos:
        special["eos_token"] = "<eos>"
    return PreTrainedTokenizerFast(tokenizer_object=core, mask_token="<mask>", **special)


def tiny_model(family: str, heads: str = "lm", seed: int = 0, **config: Any) -> PreTrainedModel:
    """A random model in float32 and eval mode. `heads`: lm (causal, or masked for encoders), base, classification.

    Biases and norms are random too, so that one that is lost on the way shows in the output.
    """
    settings = {"vocab_size": VOCAB, "max_position_embeddings": POSITIONS, "initializer_range": 0.1}
    settings |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if family == "gpt2":
        del settings["max_position_embeddings"]
    if family == "opt":
        del settings["initializer_range"]
    made = AutoConfig.for_model(family, **{**settings, **SHAPES[family], **config})
    lm = AutoModelForMaskedLM if family in ENCODERS else AutoModelForCausalLM
    auto = {"lm": lm, "base": AutoModel, "classification": AutoModelForSequenceClassification}[heads]
    torch.manual_seed(seed)
    model = auto.from_config(made)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def save_tiny(family: str, folder: str | Path, heads: str = "lm", seed: int = 0, **config: Any) -> PreTrainedModel:
    """Save a tiny model with its tokenizer to `folder`, and return the model."""
    model = tiny_model(family, heads, seed, **config)
    model.save_pretrained(folder)
    tiny_tokenizer(ends=family in ENCODERS).save_pretrained(folder)
    return model


def damaged(source: Path, target: Path, damage: Callable[[dict[str, torch.Tensor], dict[str, Any]], None]) -> Path:
    """A copy of a model folder in which `damage(tensors, config)` has been at the weights and at config.json."""
    shutil.copytree(source, target)
    config, tensors = json.loads((target / "config.json").read_text()), load_file(target / "model.safetensors")
    damage(tensors, config)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text(json.dumps(config))
    (target / "manifest.json").unlink(missing_ok=True)  # whose checksums would answer first
    return target


def save_gguf(path: str | Path, *, bos: bool = False, kind: str = "Q8_0", split: int = 0, seed: int = 0) -> None:
    """Write a tiny Llama with a byte tokenizer as a GGUF file.

    `bos`: the tokenizer puts BOS before a text. `kind`: type of the matrices. `split`: files that it says there are.
    """
    import gguf

    words = [*SPECIAL[:5], *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]
    hidden, inner, heads, layers = 32, 64, 4, 2
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(POSITIONS)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(words)
    writer.add_token_types([3] * 5 + [1] * (len(words) - 5))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(bos)
    if split:
        writer.add_uint16("split.count", split)
    generator = torch.Generator().manual_seed(seed)
    names = {"token_embd": (len(words), hidden)}
    for layer in range(layers):
        attention = dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (hidden, hidden))
        mlp = {"ffn_gate": (inner, hidden), "ffn_up": (inner, hidden), "ffn_down": (hidden, inner)}
        names |= {f"blk.{layer}.{name}": shape for name, shape in {**attention, **mlp}.items()}
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{norm}.weight", torch.ones(hidden).numpy())
    writer.add_tensor("output_norm.weight", torch.ones(hidden).numpy())
    quantization = gguf.GGMLQuantizationType[kind]
    for name, shape in names.items():
        weight = 0.2 * torch.randn(shape, generator=generator)
        data = weight.half().numpy() if kind == "F16" else gguf.quants.quantize(weight.numpy(), quantization)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=None if kind == "F16" else quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


_TEXT = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 72}
_DECODER = {**_TEXT, "num_key_value_heads": 2}
_VISION = {**_TEXT, "num_hidden_layers": 4, "image_size": 16, "patch_size": 8}
_T5 = {"d_model": 32, "num_layers": 3, "num_heads": 4, "d_kv": 8, "d_ff": 72}
_ROTATED = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    # blocks that return a tuple or a list, pass something on beside the states, or put tokens first
    "deberta-v2": ("DebertaV2ForMaskedLM", {**_TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
    "deberta": ("DebertaForMaskedLM", {**_TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
    "openai-gpt": ("OpenAIGPTLMHeadModel", {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": POSITIONS}),
    "t5": ("T5EncoderModel", {**_T5, "feed_forward_proj": "gated-gelu"}),
    "xlnet": ("XLNetLMHeadModel", {"d_model": 32, "n_layer": 3, "n_head": 4, "d_inner": 72}),
    "rwkv": ("RwkvForCausalLM", {"hidden_size": 32, "num_hidden_layers": 3, "intermediate_size": 72}),
    # attention that differs from block to block, parallel blocks, position biases
    "gemma3_text": ("Gemma3ForCausalLM", {**_DECODER, "num_hidden_layers": 6, "head_dim": 8, "sliding_window": 4}),
    "modernbert": ("ModernBertForMaskedLM", {**_TEXT, "local_attention": 4, "cls_token_id": 3, "sep_token_id": 4}),
    "falcon": ("FalconForCausalLM", {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}),
    "bloom": ("BloomForCausalLM", {"hidden_size": 32, "n_layer": 3, "n_head": 4}),
    # state-space mixers, hybrids, experts
    "mamba": ("MambaForCausalLM", {"hidden_size": 32, "num_hidden_layers": 3, "state_size": 8}),
    "jamba": (
        "JambaForCausalLM",
        {**_DECODER, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 4, "mamba_d_state": 8}
        | {"use_mamba_kernels": False},
    ),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        {**_DECODER, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
        | {"shared_expert_intermediate_size": 48},
    ),
    "mixtral": ("MixtralForCausalLM", {**_DECODER, "num_local_experts": 4}),
    # several towers
    "llava": (
        "LlavaForConditionalGeneration",
        {"text_config": {"model_type": "llama", **_DECODER, "vocab_size": VOCAB}, "image_token_index": 263}
        | {"vision_config": {"model_type": "clip_vision_model", **_VISION}},
    ),
    "qwen2_audio": (
        "Qwen2AudioForConditionalGeneration",
        {"text_config": {"model_type": "qwen2", **_DECODER, "vocab_size": VOCAB}, "audio_token_index": 263}
        | {"audio_config": {"d_model": 32, "encoder_layers": 4, "encoder_attention_heads": 4, "encoder_ffn_dim": 72}},
    ),
    "qwen2_vl": (
        "Qwen2VLForConditionalGeneration",
        {"text_config": {**_DECODER, "vocab_size": VOCAB, "rope_parameters": _ROTATED}}
        | {"vision_config": {"depth": 4, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 8}},
    ),
    # what does not walk through its blocks once, or reads other things than tokens
    "albert": ("AlbertForMaskedLM", {**_TEXT, "embedding_size": 32}),
    "funnel": ("FunnelForMaskedLM", {"block_sizes": [1, 1, 1], "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 72}),
    "xlm": ("XLMWithLMHeadModel", {"emb_dim": 32, "n_layers": 3, "n_heads": 4}),
    "vit": ("ViTModel", _VISION),
    "clip": ("CLIPModel", {"text_config": {**_TEXT, "vocab_size": VOCAB}, "vision_config": _VISION}),
    "wav2vec2": ("Wav2Vec2Model", {**_TEXT, "num_conv_pos_embedding_groups": 4}),
    "bart": ("BartModel", {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64}),
}


def other_model(name: str, seed: int = 0, **config: Any) -> PreTrainedModel:
    """A random model of an architecture that has no row in the table, in float32 and eval mode; weights of a size that
    makes each block count."""
    kind, settings = OTHERS[name]
    defaults = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    made = AutoConfig.for_model(name, **{**defaults, **settings, **config})
    torch.manual_seed(seed)
    model = getattr(transformers, kind)(made)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model.eval()
