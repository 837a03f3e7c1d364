"""An independent answer to check ours against: transformers' LLaMA on the same file, read by the `gguf` package.

Nothing of ours is used here: not our reader, decoder, rope or attention.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from transformers import LlamaConfig, LlamaForCausalLM

_LAYER = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_down": "mlp.down_proj", "ffn_up": "mlp.up_proj",
}  # fmt: skip
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def reference_model(path: Path, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """transformers' model with the file's weights, dequantized in float32 and then cast to `dtype`."""
    reader = GGUFReader(path)

    def key(name: str) -> Any:
        return reader.fields[f"llama.{name}"].contents()

    heads, kv_heads = key("attention.head_count"), key("attention.head_count_kv")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = LlamaConfig(
        hidden_size=key("embedding_length"),
        intermediate_size=key("feed_forward_length"),
        num_hidden_layers=key("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        rms_norm_eps=key("attention.layer_norm_rms_epsilon"),
        rope_theta=key("rope.freq_base"),
        max_position_embeddings=key("context_length"),
        vocab_size=int(tensors["token_embd.weight"].shape[1]),
        tie_word_embeddings="output.weight" not in tensors,
        attn_implementation="eager",
    )
    config.rope_parameters = {"rope_type": "default", "rope_theta": key("rope.freq_base")}
    state = {}
    for name, tensor in tensors.items():
        weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if ".attn_q." in name or ".attn_k." in name:
            weight = _to_half_split(weight, heads if ".attn_q." in name else kv_heads)
        state[_hf_name(name)] = torch.from_numpy(np.ascontiguousarray(weight))
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model = LlamaForCausalLM(config)
    model.load_state_dict(state, strict=True)
    return model.to(dtype).eval()


def reference_logits(model: LlamaForCausalLM, ids: list[int]) -> torch.Tensor:
    """float32 (tokens, vocab)."""
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0].float()


def _hf_name(name: str) -> str:
    if name.startswith("blk."):
        _, number, rest, _ = name.split(".")
        return f"model.layers.{number}.{_LAYER[rest]}.weight"
    return f"{_TOP[name.removesuffix('.weight')]}.weight"


def _to_half_split(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of interleaved pairs -> in each head all first elements, then all second ones, as transformers expects."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
