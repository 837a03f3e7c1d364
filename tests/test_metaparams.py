"""params.json of Meta's checkpoints: known models, wrong values, context lengths and scaled rotary frequencies."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backend.checkpoint.meta import meta_config
from backend.errors import CheckpointError
from backend.model.config import RopeScaling


def params_file(folder: Path, params: Any) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "params.json"
    path.write_text(params if isinstance(params, str) else json.dumps(params))
    return path


SEVEN = {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-06, "vocab_size": -1}
LLAMA3_8B = {"dim": 4096, "ffn_dim_multiplier": 1.3, "multiple_of": 1024, "n_heads": 32, "n_kv_heads": 8,
             "n_layers": 32, "norm_eps": 1e-05, "rope_theta": 500000.0, "vocab_size": 128256}  # fmt: skip
CODE = {"multiple_of": 256, "ffn_dim_multiplier": 1.0, "norm_eps": 1e-5, "rope_theta": 1000000}
# The totals are those published with the models (safetensors metadata on the Hub), and the context lengths those of
# the model cards.
KNOWN: list[tuple[str, dict[str, Any], int, int]] = [
    ("LLaMA 7B", SEVEN, 6738415616, 2048),
    ("LLaMA 13B", SEVEN | {"dim": 5120, "n_heads": 40, "n_layers": 40}, 13015864320, 2048),
    ("LLaMA 33B", SEVEN | {"dim": 6656, "n_heads": 52, "n_layers": 60}, 32528943616, 2048),
    ("LLaMA 65B", SEVEN | {"dim": 8192, "n_heads": 64, "n_layers": 80, "norm_eps": 1e-5}, 65285660672, 2048),
    ("Llama 2 7B", SEVEN | {"norm_eps": 1e-5}, 6738415616, 4096),
    ("Llama 2 13B", SEVEN | {"dim": 5120, "n_heads": 40, "n_layers": 40, "norm_eps": 1e-5}, 13015864320, 4096),
    ("Llama 2 70B", {"dim": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3, "n_heads": 64, "n_kv_heads": 8,
                     "n_layers": 80, "norm_eps": 1e-05, "vocab_size": -1}, 68976648192, 4096),
    ("Code Llama 7B", CODE | {"dim": 4096, "n_heads": 32, "n_layers": 32, "vocab_size": 32016}, 6738546688, 16384),
    ("Code Llama 34B", CODE | {"dim": 8192, "n_heads": 64, "n_kv_heads": 8, "n_layers": 48}, 33743970304, 16384),
    ("Llama 3 8B", LLAMA3_8B, 8030261248, 8192),
    ("Llama 3 70B", LLAMA3_8B | {"dim": 8192, "multiple_of": 4096, "n_heads": 64, "n_layers": 80}, 70553706496, 8192),
    ("Llama 3.1 8B", LLAMA3_8B | {"use_scaled_rope": True}, 8030261248, 131072),
    ("Llama 3.1 405B", LLAMA3_8B | {"dim": 16384, "multiple_of": 4096, "ffn_dim_multiplier": 1.2, "n_heads": 128,
                                    "n_layers": 126, "use_scaled_rope": True}, 405853388800, 131072),
    ("Mistral 7B", {"dim": 4096, "n_layers": 32, "head_dim": 128, "hidden_dim": 14336, "n_heads": 32, "n_kv_heads": 8,
                    "norm_eps": 1e-05, "sliding_window": 4096, "vocab_size": 32000}, 7241732096, 32768),
]  # fmt: skip


@pytest.mark.parametrize(("name", "params", "total", "context"), KNOWN, ids=[row[0] for row in KNOWN])
def test_known_models_from_params_alone(
    tmp_path: Path, name: str, params: dict[str, Any], total: int, context: int
) -> None:
    for config in (meta_config(params_file(tmp_path, params)), meta_config(tmp_path)):
        assert config.parameters() == total
        assert config.context == context


@pytest.mark.parametrize(
    ("params", "ffn_dim"),
    [
        ({"dim": 4096}, 11008),
        ({"dim": 5120, "n_heads": 40}, 13824),
        ({"dim": 6656, "n_heads": 52}, 17920),
        ({"dim": 8192}, 22016),
        ({"dim": 8192, "ffn_dim_multiplier": 1.3, "multiple_of": 4096}, 28672),
        ({"dim": 2048, "ffn_dim_multiplier": 1.5}, 8192),
        ({"dim": 3072, "ffn_dim_multiplier": 1.0, "n_heads": 24}, 8192),
        ({"dim": 576, "n_heads": 9}, 1536),
        ({"dim": 16384, "ffn_dim_multiplier": 1.2, "multiple_of": 4096}, 53248),
    ],
)
def test_the_feed_forward_size(tmp_path: Path, params: dict[str, Any], ffn_dim: int) -> None:
    assert meta_config(params_file(tmp_path, SEVEN | params)).ffn_dim == ffn_dim


def test_params_may_be_nested_and_say_more_than_we_know(tmp_path: Path) -> None:
    more = {"quantization_args": {"scheme": "x"}, "lora_args": None, "vision_chunk_size": 560, "n_kv_heads": None}
    flat = meta_config(params_file(tmp_path, SEVEN))
    assert meta_config(params_file(tmp_path, {"model": SEVEN | more, "tokenizer": {}})) == flat
    assert (flat.n_kv_heads, flat.rope_theta, flat.rope_scaling, flat.vocab_size) == (32, 10000.0, None, 32000)
    assert meta_config(params_file(tmp_path, SEVEN | {"rope_theta": 1000000})).rope_theta == 1e6


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dim": None}, "'dim' is missing"),
        ({"n_layers": 10**12}, "'n_layers' is 1000000000000, expected a whole number from 1 to 4096"),
        ({"n_heads": -32}, "'n_heads' is -32"),
        ({"n_heads": 33}, "not a multiple of n_heads 33"),
        ({"n_kv_heads": 5}, "n_heads 32 is not a multiple of n_kv_heads 5"),
        ({"n_kv_heads": 64}, "'n_kv_heads' is 64"),
        ({"dim": 4096.0}, "'dim' is 4096.0, expected a whole number"),
        ({"dim": True}, "'dim' is true"),
        ({"dim": "4096"}, "'dim' is \"4096\""),
        ({"dim": [4096] * 99}, "'dim' is [4096"),
        ({"head_dim": 127}, "need an even number"),
        ({"norm_eps": 0}, "'norm_eps' is 0"),
        ({"norm_eps": float("nan")}, "'norm_eps' is NaN"),
        ({"rope_theta": float("inf")}, "'rope_theta' is Infinity"),
        ({"rope_theta": 10**400}, "'rope_theta' is 1000"),
        ({"rope_theta": True}, "'rope_theta' is true"),
        ({"use_scaled_rope": 1}, "'use_scaled_rope' is 1, expected true or false"),
        ({"use_scaled_rope": True, "rope_scaling_factor": 0}, "'rope_scaling_factor' is 0"),
        ({"ffn_dim_multiplier": -1}, "'ffn_dim_multiplier' is -1"),
        ({"multiple_of": 0}, "'multiple_of' is 0"),
        ({"vocab_size": 0}, "'vocab_size' is 0"),
        ({"vocab_size": -2}, "'vocab_size' is -2"),
        ({"moe": {"num_experts": 8}}, "'moe'"),
    ],
)
def test_params_of_a_wrong_type_or_range(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        meta_config(params_file(tmp_path, SEVEN | change))
    assert words in str(caught.value)
    assert "params.json" in str(caught.value)
    assert len(str(caught.value)) < 300 + len(str(tmp_path))


@pytest.mark.parametrize(
    "text",
    ["", "[]", "7", "{", "{]", '{"dim": ', "[" * 60000, '{"dim": ' + "9" * 60000 + "}", " " * 70000, "\0", "\ud800"],
)
def test_what_is_no_params_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "params.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(CheckpointError):
        meta_config(path)


# rotary frequencies -----------------------------------------------------------------------------------------------


def test_the_scaling_factor_and_where_it_comes_from(tmp_path: Path) -> None:
    folder = tmp_path / "repository" / "original"
    folder.mkdir(parents=True)
    params = LLAMA3_8B | {"use_scaled_rope": True}
    usual = RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
    assert meta_config(params_file(folder, LLAMA3_8B | {"use_scaled_rope": False})).rope_scaling is None
    assert meta_config(params_file(folder, params)).rope_scaling == usual
    said = params | {"rope_scaling_factor": 32}
    assert meta_config(params_file(folder, said)).rope_scaling == replace(usual, factor=32.0)
    params_file(folder, params)
    config = {"hidden_size": 4096, "num_hidden_layers": 32, "rope_scaling": {"factor": 32.0, "rope_type": "llama3"}}
    for place in (tmp_path / "repository", folder):
        (place / "config.json").write_text(json.dumps(config | {"hidden_size": 2048}))
        assert meta_config(folder).rope_scaling == usual  # of another model
        (place / "config.json").write_text(json.dumps(config))
        assert meta_config(folder).rope_scaling == replace(usual, factor=32.0)
        (place / "config.json").unlink()


@pytest.mark.parametrize(("head_dim", "theta", "factor"), [(128, 500000.0, 8.0), (64, 500000.0, 32.0), (128, 1e4, 8.0)])
def test_scaled_frequencies_follow_the_formula(head_dim: int, theta: float, factor: float) -> None:
    """`apply_scaling` of llama 3.1's model.py, in numpy float64 and without a loop."""
    frequency = 1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    wavelength = 2 * np.pi / frequency
    smooth = (8192 / wavelength - 1) / (4 - 1)
    expected = np.where(
        wavelength < 8192 / 4,
        frequency,
        np.where(wavelength > 8192, frequency / factor, (1 - smooth) * frequency / factor + smooth * frequency),
    )
    assert {"kept", "mixed", "divided"} == {
        "kept" if w < 2048 else "divided" if w > 8192 else "mixed" for w in wavelength
    }
    divisors = RopeScaling("llama3", factor, 1.0, 4.0, 8192).divisors(head_dim, theta)
    np.testing.assert_allclose(frequency / np.array(divisors), expected, rtol=1e-6, atol=0)
