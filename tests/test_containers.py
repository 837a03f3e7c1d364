"""One real model, every container, one answer: the starter's weights in each, against transformers on the same values.

Lossless containers hold the very float16 values: the tensors read are equal, and the greedy ids are those of
transformers in float32. Lossy ones must stay within a stated distance (mean KL divergence over English text); what they
hold exactly is checked in the tests of their readers.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from backend.checkpoint.base import Checkpoint
from backend.checkpoint.open import open_checkpoint
from backend.checkpoint.override import with_overrides
from backend.convert.to_gguf import plan_gguf
from backend.convert.to_gguf import write_gguf as convert_to_gguf
from backend.convert.to_hf import plan_hf
from backend.convert.to_hf import write_hf as convert_to_hf
from backend.placement.load import load_model
from backend.placement.plan import weight_bytes
from backend.tokenizer.open import open_tokenizer
from tests import containers as c
from tests.forward import logits
from tests.real import starter
from tests.test_numbers import TEXT

REPLY = 24
# What a ggml file does not say and the starter needs.
NUMBERS = {"rope_theta": 100000.0, "norm_eps": 1e-5}
Write = Callable[[Path], Path]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Cleared at once: these files are large."""
    yield tmp_path
    shutil.rmtree(tmp_path, ignore_errors=True)


@lru_cache(maxsize=1)
def reference() -> tuple[list[int], int, torch.Tensor]:
    """Ids (English, then transformers' own greedy reply), where the reply begins, and its log-probabilities."""
    config = LlamaConfig(**{key: value for key, value in c.CONFIG.items() if key != "torch_dtype"})
    config.rope_parameters = {"rope_type": "default", "rope_theta": 100000.0}
    model = LlamaForCausalLM(config).float().eval()
    state = {f"{name}.weight": value.float() for name, value in c.hf_state(c.starter_values()).items()}
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True)
    ids = starter("original").prompting.encode_text(TEXT)[:100]
    with torch.inference_mode():
        for _ in range(REPLY):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        return ids, 100, model(torch.tensor([ids])).logits[0].log_softmax(-1)


def check_same(checkpoint: Checkpoint) -> None:
    """The same values, the same ids."""
    for name, value in c.starter_values().items():
        if name in ("layers.0.feed_forward.w2", "layers.29.attention.wo", "norm", "tok_embeddings"):
            canonical = name.replace("feed_forward.", "").replace("attention.", "")
            assert torch.equal(checkpoint.read(canonical).float32(), value.float()), name
    ids, begin, expected = reference()
    ours = logits(checkpoint, ids, chunk=128).log_softmax(-1)
    assert ours[begin - 1 : -1].argmax(-1).tolist() == ids[begin:]
    assert (ours - expected).abs().max() < 5e-3  # float32 sums in another order, over 30 layers


def divergence(checkpoint: Checkpoint, weights: str) -> float:
    """Mean KL(reference || ours) over all positions, in nats."""
    ids, _, expected = reference()
    ours = logits(checkpoint, ids, weights, chunk=128).log_softmax(-1)
    return float((expected.exp() * (expected - ours)).sum(-1).mean())


# lossless -------------------------------------------------------------------------------------------------------------

LOSSLESS: dict[str, Write] = {
    "Meta, one file": lambda folder: c.write_meta(folder / "m", c.starter_values()),
    "Meta, three shards": lambda folder: c.write_meta(folder / "m", c.starter_values(), ranks=3),
    "Hugging Face safetensors": lambda folder: c.write_hf(folder / "m", c.starter_values()),
    "Hugging Face safetensors, four shards": lambda folder: c.write_hf(folder / "m", c.starter_values(), 4),
    "Hugging Face .bin, two shards": lambda folder: c.write_hf(folder / "m", c.starter_values(), 2, "bin"),
    "GGUF F16": lambda folder: c.write_gguf(folder / "m.gguf", c.starter_values()),
    "GGUF F16, split": lambda folder: (
        c.write_gguf(folder / "m.gguf", c.starter_values(), split=100).parent / "m-00002-of-00003.gguf"
    ),
    "ggml F16": lambda folder: c.StarterGGML("ggml", 0, "F16").write(folder / "m.bin")[0],
    "ggmf F16, three parts": lambda folder: c.StarterGGML("ggmf", 1, "F16", parts=3).write(folder / "m.bin")[0],
    "ggjt v1 F16": lambda folder: c.StarterGGML("ggjt", 1, "F16").write(folder / "m.bin")[0],
    "ggjt v3 F16": lambda folder: c.StarterGGML("ggjt", 3, "F16").write(folder / "m.bin")[0],
}


@pytest.mark.parametrize("name", LOSSLESS)
def test_a_lossless_container_gives_the_same_answer(folder: Path, name: str) -> None:
    checkpoint = open_checkpoint(LOSSLESS[name](folder))
    if name.startswith("gg"):
        checkpoint = with_overrides(checkpoint, NUMBERS)
    check_same(checkpoint)


def test_converted_to_hugging_face_and_back(folder: Path, f16: Path) -> None:
    """By our own converter; the tokenizer goes along, so the folder answers in words, too."""
    source = open_checkpoint(f16)
    convert_to_hf(source, plan_hf(source, None, 100_000_000), folder / "hf", lambda _: None)
    made = open_checkpoint(folder / "hf")
    assert len(made.files) == 3
    check_same(made)
    ours, theirs = (open_tokenizer(x.tokenizer, x.config.vocab_size) for x in (made, source))
    assert ours.encode(TEXT) == theirs.encode(TEXT)
    assert ours.chat_template == theirs.chat_template
    assert ours.end_ids == theirs.end_ids
    convert_to_gguf(made, plan_gguf(made, "f16"), folder / "again.gguf", lambda _: None)
    check_same(open_checkpoint(folder / "again.gguf"))


# lossy ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def f16(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The starter's values as GGUF F16, to convert from."""
    folder = tmp_path_factory.mktemp("f16")
    yield c.write_gguf(folder / "starter.gguf", c.starter_values())
    shutil.rmtree(folder, ignore_errors=True)


def converted(kind: str) -> Write:
    def write(folder: Path) -> Path:
        source = open_checkpoint(folder / "f16.gguf")
        convert_to_gguf(source, plan_gguf(source, kind), folder / "m.gguf", lambda _: None)
        return folder / "m.gguf"

    return write


def old(kind: str, version: int, weights: str) -> Write:
    return lambda folder: c.StarterGGML(kind, version, weights).write(folder / "m.bin")[0]


def quantised(make: Callable[[], dict], settings: dict, file: str = "model.safetensors") -> Write:
    return lambda folder: c.write_quantised(folder / "m", make(), settings, file)


V = c.starter_values
GPTQ_SETTINGS = {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": False, "sym": False}
GPTQ_V2 = GPTQ_SETTINGS | {"checkpoint_format": "gptq_v2"}
AWQ_SETTINGS = {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"}

# What the container's own loss may cost, read in float32: mean KL in nats, about 1.5 times what was measured.
LOSSY: dict[str, tuple[Write, float]] = {
    "GGUF q8_0": (converted("q8_0"), 0.002),
    "GGUF q6_k": (converted("q6_k"), 0.01),
    "GGUF q4_k_m": (converted("q4_k_m"), 0.08),
    "GGUF q4_0": (converted("q4_0"), 0.45),
    "GGUF bf16": (converted("bf16"), 0.001),
    "ggml Q4_1": (old("ggml", 0, "Q4_1"), 0.15),
    "ggjt v1 ftype 4": (old("ggjt", 1, "ftype 4"), 0.001),
    "ggjt v2 Q5_1": (old("ggjt", 2, "Q5_1"), 0.25),
    "ggjt v3 Q8_0": (old("ggjt", 3, "Q8_0"), 0.002),
    "GPTQ folder": (quantised(lambda: c.gptq(V()), GPTQ_SETTINGS), 0.45),
    "GPTQ act-order, v2 zeros": (
        quantised(lambda: c.gptq(V(), act_order=True, version=2), GPTQ_V2), 0.45
    ),
    "GPTQ .pt, no settings": (quantised(lambda: c.gptq(V()), {}, "llama-4bit-64g.pt"), 0.45),
    "AWQ": (quantised(lambda: c.awq(V()), AWQ_SETTINGS), 0.45),
    "LLM.int8": (
        quantised(lambda: c.llm_int8(V()), {"quant_method": "bitsandbytes", "load_in_8bit": True}), 0.008
    ),
}  # fmt: skip
# What packing adds to that: activations and scales in bfloat16.
PACKING = 0.002


@pytest.mark.parametrize("name", LOSSY)
def test_a_lossy_container_stays_near(folder: Path, f16: Path, name: str) -> None:
    write, bound = LOSSY[name]
    (folder / "f16.gguf").symlink_to(f16)
    checkpoint = open_checkpoint(write(folder))
    if name.startswith(("ggml", "ggjt")):
        checkpoint = with_overrides(checkpoint, NUMBERS)
    plain, packed = divergence(checkpoint, "f32"), divergence(checkpoint, "original")
    print(f"{name}: mean KL {plain:.4f} in float32, {packed:.4f} packed")
    assert plain <= bound
    assert packed <= plain * 1.1 + PACKING
    assert load_model(checkpoint, "original", "x").weight_bytes == weight_bytes(
        "original", checkpoint.config, checkpoint.tensors
    )
