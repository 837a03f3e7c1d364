"""Models that are only a shape: published sizes, valid weights in every format, and the whole way to a reply."""

from __future__ import annotations

import json
import math
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from backend.checkpoint.open import open_checkpoint
from backend.checkpoint.synthetic import POOL_BYTES, SyntheticCheckpoint
from backend.errors import CheckpointError
from backend.model.config import tensor_shapes
from backend.model.shapes import SHAPES, is_shape, parse_shape
from backend.models import ModelFolder
from backend.params import GenerationParams
from backend.tokenizer.bytesonly import byte_tokenizer
from backend.weights.blocks import BY_NAME, F32, Q4_K
from backend.weights.encode import QUANTIZERS
from backend.weights.stored import Blocks, Plain
from tests.commandline import command
from tests.real import read, tiny_runtime

# Parameter counts as published with the models (or summed over their files' headers).
PARAMETERS = {
    "llama-7b": 6_738_415_616, "llama-13b": 13_015_864_320, "llama-33b": 32_528_943_616,
    "llama-65b": 65_285_660_672, "llama-2-7b": 6_738_415_616, "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192, "llama-3-8b": 8_030_261_248, "llama-3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248, "llama-3.1-70b": 70_553_706_496, "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824, "tinyllama-1.1b": 1_100_048_384, "smollm2-135m": 134_515_008,
    "mistral-7b": 7_241_732_096,
}  # fmt: skip
SMALL = "shape:smollm2-135m:{}:layers=2:vocabulary=512"


@pytest.mark.parametrize("name", SHAPES)
def test_published_parameter_counts(name: str):
    assert parse_shape(f"shape:{name}").config.parameters() == PARAMETERS[name]


def test_spelling():
    shape = parse_shape("shape:Llama-2-7B:Q4_K:layers=8:context=512")
    assert (shape.format, shape.config.n_layers, shape.config.context, shape.config.dim) == (Q4_K, 8, 512, 4096)
    assert shape.config.name == "llama-2-7b"
    assert is_shape("shape:x")
    assert not is_shape("models/shape")


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("shape:llama-2-8b", r"no shape 'llama-2-8b'; did you mean 'llama-"),
        ("shape:", r"no shape ''; there are llama-7b"),
        ("shape:llama-7b:q4_9", r"'q4_9' is no storage format; did you mean 'q4_"),
        ("shape:llama-7b:layer=2", r"unknown key 'layer'; did you mean 'layers'"),
        ("shape:llama-7b:layers=0", r"layers is '0', expected a whole number from 1 to 1000"),
        ("shape:llama-7b:layers=-1", r"layers is '-1'"),
        ("shape:llama-7b:layers=" + "9" * 500, r"layers is '9"),
        ("shape:llama-7b:iq2_xxs", r"no random weights can be made in IQ2_XXS"),
        ("shape:smollm2-135m:q4_k", r"not a multiple of the Q4_K block"),
    ],
)
def test_wrong_spellings_are_said(spec: str, words: str):
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(Path(spec))


@pytest.mark.parametrize("fmt", QUANTIZERS, ids=lambda fmt: fmt.name)
def test_weights_are_what_the_gguf_package_reads(fmt):
    """Random values of the deviation that was meant, in blocks that are valid to somebody else's decoder."""
    checkpoint = open_checkpoint(Path(f"shape:tinyllama-1.1b:{fmt.name.lower()}:layers=1:vocabulary=512"))
    assert isinstance(checkpoint, SyntheticCheckpoint)
    name = "layers.0.wk"
    stored, info = checkpoint.read(name), checkpoint.tensors[name]
    assert stored.shape == info.shape == (256, 2048)
    assert info.format is fmt
    if isinstance(stored, Blocks):
        raw = stored.raw.numpy()
        assert raw.nbytes == info.nbytes
        values = torch.from_numpy(gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[fmt.name]).astype(np.float32))
        assert torch.allclose(values, stored.float32(), rtol=1e-6, atol=0)
    else:
        assert isinstance(stored, Plain)
        values = stored.float32()
    deviation = 2048**-0.5
    assert values.std().item() == pytest.approx(deviation, rel=0.05)
    assert abs(values.mean().item()) < 0.01 * deviation


def test_the_same_every_time_and_different_for_every_name():
    first, second = (open_checkpoint(Path(SMALL.format("q8_0"))) for _ in range(2))
    for name, shape in tensor_shapes(first.config).items():
        if len(shape) == 2:
            assert torch.equal(first.read(name).raw, second.read(name).raw)  # type: ignore[attr-defined]
        else:
            assert torch.equal(first.read(name).float32(), torch.ones(shape))
            assert first.tensors[name].format is F32
    assert not torch.equal(first.read("layers.0.wq").raw, first.read("layers.1.wq").raw)  # type: ignore[attr-defined]


@pytest.mark.parametrize("fmt", ["q4_0", "bf16"])
def test_rows_do_not_repeat(fmt: str):
    """Repeating rows would give repeating activations. The pool's length is prime to a row's."""
    checkpoint = open_checkpoint(Path(f"shape:llama-2-7b:{fmt}:layers=1:vocabulary=512"))
    values = checkpoint.read("layers.0.wq").float32(0, 2048)
    assert values.numel() * BY_NAME[fmt.upper()].bytes / BY_NAME[fmt.upper()].elements > 2 * POOL_BYTES
    assert len({tuple(row[:8].tolist()) for row in values}) == 2048


def test_a_whole_large_model_is_only_numbers():
    checkpoint = open_checkpoint(Path("shape:llama-2-70b:q4_0"))
    matrices = sum(math.prod(shape) for shape in tensor_shapes(checkpoint.config).values() if len(shape) == 2)
    assert sum(info.nbytes for info in checkpoint.tensors.values()) == matrices // 32 * 18 + 4 * 8192 * 161
    assert checkpoint.files == ()


def test_byte_tokenizer():
    tokenizer = byte_tokenizer(300)
    text = "Grüße, \x00 <|im_end|> 🦙"
    ids = tokenizer.encode(text)
    assert b"".join(map(tokenizer.token_bytes, ids)).decode() == text
    assert not set(ids) & set(tokenizer.control_tokens().values())  # a control token that is typed stays text
    assert tokenizer.token_bytes(299) == b"[299]"
    assert tokenizer.vocab_size == 300


@pytest.mark.parametrize("weights", ["original", "bf16", "f32"])
def test_a_shape_answers(weights: str):
    runtime = tiny_runtime(Path(SMALL.format("q4_0")), weights=weights, context=256)
    try:
        assert runtime.name == SMALL.format("q4_0")
        params = GenerationParams(max_tokens=8, temperature=0.0)
        _, ids, chunk = read(runtime.start(runtime.prompting.encode_text("Hello"), params))
        assert chunk.error is None
        assert len(ids) == chunk.stats.completion_tokens <= 8
    finally:
        runtime.close(drain=False)


def test_activations_stay_of_ordinary_size():
    """All 32 layers of a real depth, narrow enough to be quick: no overflow, and layers that do something."""
    runtime = tiny_runtime(Path("shape:smollm2-135m:bf16:layers=30:vocabulary=512"), weights="f32", context=64)
    try:
        model, seen = runtime.runner.model, []
        for layer in model.layers:
            x = torch.randn(4, model.config.dim)
            seen += [layer.wo(torch.randn(4, 576)).std().item(), layer.w2(torch.randn(4, 1536)).std().item()]
            seen.append(layer.wqkv(x).std().item() / 7.75)
        assert all(0.05 < size < 0.5 for size in seen)
    finally:
        runtime.close(drain=False)


def test_a_preset_may_name_a_shape(tmp_path: Path):
    folder = ModelFolder(tmp_path)
    assert folder.resolve(SMALL.format("q4_0"), tmp_path) == Path(SMALL.format("q4_0"))
    assert folder.local("shape:llama-2-7b", tmp_path) == Path("shape:llama-2-7b")


def test_inspect_a_shape(capsys: pytest.CaptureFixture[str]):
    assert command("inspect", "shape:llama-2-7b:q4_0", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["parameters"] == PARAMETERS["llama-2-7b"]
    assert facts["quantization"] == {"Q4_0": 226}
    assert facts["tokenizer"] == "one token a byte, 32,000 tokens"
