"""config.json of Hugging Face folders against transformers' own reading of it, hostile ones, and the two row orders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from backend.checkpoint.hf_config import hf_config
from backend.checkpoint.permute import to_half_split, to_interleaved
from backend.errors import CheckpointError
from tests.hffiles import SIZES, change_json, to_hf, to_meta

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
ROPES: dict[str, dict[str, Any]] = {
    "transformers 5": dict(rope_parameters={"rope_type": "default", "rope_theta": 500000.0}),
    "before": dict(rope_theta=1000000.0, rope_parameters=...),
    "nothing said": dict(rope_parameters=...),
    "linear": dict(rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 20000.0}),
    "linear, old key": dict(rope_parameters=..., rope_scaling={"type": "linear", "factor": 2.5}, rope_theta=10000.0),
    "llama3": dict(rope_parameters={"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3}),
    "llama3, before": dict(
        rope_parameters=..., rope_scaling={"rope_type": "llama3", **LLAMA3, "factor": 32}, rope_theta=50000
    ),
    "dynamic": dict(rope_parameters=..., rope_scaling={"type": "dynamic", "factor": 2.0}),
    "null": dict(rope_parameters=..., rope_scaling=None),
}


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    """config.json of a tiny LLaMA, of which transformers can make a model, without weights."""
    LlamaConfig(**SIZES, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    return tmp_path / "config.json"


@pytest.mark.parametrize("case", ROPES)
def test_rotary_frequencies_are_those_of_transformers(config_file: Path, case: str) -> None:
    change_json(config_file, **ROPES[case])
    config = hf_config(config_file)
    scaling, dim = config.rope_scaling, config.head_dim
    divisors = scaling.divisors(dim, config.rope_theta) if scaling else [1.0] * (dim // 2)
    ours = torch.tensor([config.rope_theta ** (-2 * i / dim) / d for i, d in enumerate(divisors)])
    theirs = LlamaRotaryEmbedding(LlamaConfig.from_pretrained(config_file.parent)).inv_freq
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    assert config.context == SIZES["max_position_embeddings"]


def test_the_keys_of_early_conversions(config_file: Path) -> None:
    """As the first LLaMA folders have them: another class name, few keys; and Vicuna's length beside the positions."""
    change_json(config_file, architectures=["LLaMAForCausalLM"], max_sequence_length=2048, num_key_value_heads=...,
                max_position_embeddings=..., head_dim=..., rms_norm_eps=..., rope_parameters=...)  # fmt: skip
    config = hf_config(config_file)
    assert (config.n_kv_heads, config.head_dim, config.context, config.norm_eps) == (4, 16, 2048, 1e-6)
    change_json(config_file, max_position_embeddings=512, rope_scaling={"type": "linear", "factor": 4.0})
    assert hf_config(config_file).context == 2048
    change_json(config_file, model_type=..., rope_scaling=None, num_key_value_heads=None)
    assert (hf_config(config_file).context, hf_config(config_file).n_kv_heads) == (512, 4)
    change_json(config_file, model_type="llama", architectures=...)
    assert hf_config(config_file).architecture == "llama"


@pytest.mark.parametrize(
    ("changes", "window"),
    [
        (dict(model_type="mistral", sliding_window=...), 4096),
        (dict(model_type="mistral", sliding_window=None), None),
        (dict(model_type="mistral", sliding_window=7), 7),
        (dict(model_type="llama", sliding_window=7), None),
        (dict(model_type="qwen2", sliding_window=7), None),
        (dict(model_type="qwen2", sliding_window=7, use_sliding_window=True), None),  # from layer 28 on
        (dict(model_type="qwen2", sliding_window=7, use_sliding_window=True, max_window_layers=0), 7),
        (dict(model_type="qwen2", sliding_window=7, use_sliding_window=True, layer_types=["sliding_attention"] * 2), 7),
        (dict(model_type="qwen2", sliding_window=7, use_sliding_window=True, layer_types=["full_attention"] * 2), None),
    ],
)
def test_sliding_windows(config_file: Path, changes: dict[str, Any], window: int | None) -> None:
    change_json(config_file, architectures=None, **changes)
    assert hf_config(config_file).sliding_window == window


HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "another architecture": (dict(architectures=["GPTNeoXForCausalLM"]), "'GPTNeoXForCausalLM'"),
    "another model type": (dict(architectures=None, model_type="mixtral"), "'mixtral'"),
    "no architecture": (dict(architectures=None, model_type=None), "model_type is None"),
    "two that differ": (dict(architectures=["MistralForCausalLM"]), "model_type is 'llama'"),
    "a head for something else": (dict(architectures=["LlamaForSequenceClassification"]), "SequenceClassification"),
    "architectures a number": (dict(architectures=7), "architectures is 7"),
    "architectures of lists": (dict(architectures=[["LlamaForCausalLM"]]), "LlamaForCausalLM"),
    "10^12 layers": (dict(num_hidden_layers=10**12), "num_hidden_layers is 1000000000000"),
    "no layers": (dict(num_hidden_layers=0), "num_hidden_layers is 0"),
    "negative heads": (dict(num_attention_heads=-4), "num_attention_heads is -4"),
    "heads that do not divide": (dict(num_key_value_heads=3), "cannot be shared by 3"),
    "more key heads than heads": (dict(num_key_value_heads=8), "num_key_value_heads is 8"),
    "odd head": (dict(head_dim=15), "head_dim is 15"),
    "width no multiple": (dict(hidden_size=65, head_dim=None), "65"),
    "text for a number": (dict(hidden_size="64"), "hidden_size is '64'"),
    "a float": (dict(hidden_size=64.0), "hidden_size is 64.0"),
    "true for a number": (dict(num_hidden_layers=True), "num_hidden_layers is True"),
    "width missing": (dict(hidden_size=...), "'hidden_size' is missing"),
    "vocabulary missing": (dict(vocab_size=...), "'vocab_size' is missing"),
    "NaN eps": (dict(rms_norm_eps=float("nan")), "rms_norm_eps is nan"),
    "infinite theta": (dict(rope_theta=float("inf"), rope_parameters=...), "rope_theta is inf"),
    "NaN theta": (dict(rope_parameters={"rope_theta": float("nan")}), "rope_parameters.rope_theta is nan"),
    "negative theta": (dict(rope_parameters={"rope_theta": -1}), "rope_theta is -1"),
    "tie as text": (dict(tie_word_embeddings="yes"), "tie_word_embeddings is 'yes'"),
    "gelu": (dict(hidden_act="gelu"), "hidden_act is 'gelu'"),
    "yarn": (dict(rope_parameters={"rope_type": "yarn", "factor": 4.0}), "'yarn'"),
    "longrope": (dict(rope_scaling={"type": "longrope"}), "'longrope'"),
    "mrope": (dict(rope_scaling={"type": "mrope", "mrope_section": [1, 2]}), "'mrope'"),
    "rope by layer kind": (dict(rope_parameters={"full_attention": {"rope_type": "default"}}), "one object"),
    "rope a list": (dict(rope_scaling=[1]), "rope_scaling is [1]"),
    "rope type a list": (dict(rope_scaling={"type": ["linear"]}), "['linear']"),
    "linear without factor": (dict(rope_scaling={"type": "linear"}), "'rope_scaling.factor' is missing"),
    "factor 0": (dict(rope_scaling={"type": "linear", "factor": 0}), "rope_scaling.factor is 0"),
    "llama3 backwards": (
        dict(rope_scaling={"type": "llama3", **LLAMA3, "low_freq_factor": 4.0}), "high_freq_factor 4"),
    "half of each head": (dict(partial_rotary_factor=0.5), "partial_rotary_factor is 0.5"),
    "some layers slide": (
        dict(model_type="qwen2", architectures=None, use_sliding_window=True, max_window_layers=1), "1 of 2 layers"),
    "layer kinds unknown": (
        dict(model_type="qwen2", architectures=None, use_sliding_window=True, layer_types=["x"] * 2), "layer_types"),
    "window 0": (dict(model_type="mistral", architectures=None, sliding_window=0), "sliding_window is 0"),
    "window as text": (dict(model_type="mistral", architectures=None, sliding_window="4k"), "sliding_window is '4k'"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_configs_that_cannot_be_opened_are_refused_by_name(config_file: Path, case: str) -> None:
    changes, words = HOSTILE[case]
    change_json(config_file, **changes)
    with pytest.raises(CheckpointError) as caught:
        hf_config(config_file)
    assert words in caught.value.message
    assert caught.value.message.startswith(str(config_file))


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": 1, "a": 2}', "[" * 10_000, '{"x":' + "9" * 10_000 + "}", "\0"])
def test_a_config_that_is_no_object(config_file: Path, text: str) -> None:
    config_file.write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json: "):
        hf_config(config_file)


# rows of queries and keys -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("heads", "head_dim"), [(1, 2), (4, 16), (3, 10)])
def test_row_orders_follow_the_formula(heads: int, head_dim: int) -> None:
    rows = heads * head_dim
    meta = torch.randn(rows, 5)
    hugging_face = torch.empty_like(meta)
    for head in range(heads):
        for j in range(head_dim // 2):
            for s in (0, 1):
                hugging_face[head * head_dim + j + s * head_dim // 2] = meta[head * head_dim + 2 * j + s]
    assert torch.equal(meta[to_half_split(rows, heads)], hugging_face)
    assert torch.equal(hugging_face[to_interleaved(rows, heads)], meta)
    assert torch.equal(to_hf(meta, heads), hugging_face)
    assert torch.equal(to_meta(hugging_face[:, 0], heads), meta[:, 0]), "biases as rows"


@pytest.mark.parametrize(("rows", "heads"), [(6, 2), (7, 1), (8, 0), (8, -1)])
def test_rows_that_are_no_heads(rows: int, heads: int) -> None:
    with pytest.raises(ValueError, match="heads of an even size"):
        to_interleaved(rows, heads)
