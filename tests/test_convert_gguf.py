"""convert to GGUF: read back by the `gguf` package, equal to what was there, errors under a stated bound."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize

from backend.checkpoint.open import open_checkpoint
from backend.convert import to_gguf
from backend.convert.mixes import tensor_format
from backend.model.config import ModelConfig
from backend.tokenizer.modelproto import Piece, SentenceModel, serialized
from backend.weights.blocks import BY_NAME
from tests.commandline import command
from tests.forward import greedy, logits
from tests.ggmlfiles import GGMLModel
from tests.hffiles import tiny_hf
from tests.metafiles import MetaModel, write_meta
from tests.test_convert_vocab import byte_level_folder
from tests.tiny import TinyModel, tokens, write_tiny

Write = Callable[..., Path]
# Root mean square of the error over that of the values, random normal numbers: measured, and a little more.
BOUNDS = {"f32": 0.0, "f16": 3e-4, "bf16": 3e-3, "q8_0": 0.007, "q5_0": 0.05, "q5_1": 0.045, "q4_0": 0.095,
          "q4_1": 0.085, "q6_k": 0.02, "q5_k_m": 0.045, "q4_k_m": 0.085, "q3_k_m": 0.19, "q2_k": 0.35}  # fmt: skip


def values(path: Path) -> dict[str, np.ndarray]:
    """By the package's own reader and decoder."""
    return {t.name: dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}


def keys(path: Path) -> dict[str, object]:
    found = {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}
    return {name: value for name, value in found.items() if not name.startswith("GGUF.")}


@pytest.mark.parametrize("weights", ["F32", "F16", "BF16", "Q4_0", "Q8_0"])
def test_as_stored_is_the_same_file_again(tiny_path: Write, tmp_path: Path, weights: str) -> None:
    source, target = tiny_path(weights=weights, tied=False, rope_freqs=True), tmp_path / "again.gguf"
    assert command("convert", source, target) == 0
    ours, theirs = gguf.GGUFReader(target).tensors, gguf.GGUFReader(source).tensors
    there = {tensor.name: tensor for tensor in theirs}
    assert {tensor.name for tensor in ours} == set(there)
    for tensor in ours:
        assert tensor.tensor_type == there[tensor.name].tensor_type
        assert np.array_equal(tensor.data, there[tensor.name].data)
    kept = [key for key in keys(source) if key.startswith(("tokenizer.", "llama."))]
    assert len(kept) > 15
    assert {key: keys(target)[key] for key in kept} == {key: keys(source)[key] for key in kept}
    assert not [file.name for file in tmp_path.iterdir() if file.name.endswith(".partial")]


@pytest.mark.parametrize("kind", BOUNDS)
def test_every_type_is_near_and_has_the_size_of_its_blocks(tmp_path: Path, kind: str) -> None:
    model = TinyModel(dim=256, ffn_dim=256, head_dim=64, n_layers=1, tied=False)
    source, target = write_tiny(tmp_path / "f32.gguf", model), tmp_path / "out.gguf"
    assert command("convert", source, target, "--type", kind.upper()) == 0
    reader, there = gguf.GGUFReader(target), model.values()
    assert keys(target)["general.file_type"] == int(
        gguf.LlamaFileType[("ALL_" if kind == "f32" else "MOSTLY_") + kind.upper()]
    )
    assert ("general.quantization_version" in keys(target)) == (kind not in ("f32", "f16", "bf16"))
    for tensor in reader.tensors:
        found, expected = dequantize(tensor.data, tensor.tensor_type), there[tensor.name]
        if expected.ndim == 1:
            assert np.array_equal(found, expected)
            continue
        error = np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2))
        assert error <= BOUNDS[kind], tensor.name
    end = max(int(tensor.data_offset + tensor.n_bytes) for tensor in reader.tensors)
    assert end <= target.stat().st_size < end + 32
    config = open_checkpoint(source).config
    for tensor in reader.tensors:
        name = next(n for n, info in open_checkpoint(source).tensors.items() if info.name == tensor.name)
        shape = tuple(int(size) for size in reversed(tensor.shape))
        assert tensor.tensor_type.name == tensor_format(kind, name, shape, config).name


def test_block_types_are_not_quantised_twice(tiny_path: Write, tmp_path: Path) -> None:
    source, target = tiny_path(weights="Q4_0", tied=False, formats={"output.weight": "Q8_0"}), tmp_path / "out.gguf"
    assert command("convert", source, target, "--type", "q4_0") == 0
    ours = {tensor.name: tensor for tensor in gguf.GGUFReader(target).tensors}
    for tensor in gguf.GGUFReader(source).tensors:
        assert np.array_equal(ours[tensor.name].data, tensor.data)  # rows of 64: the output is Q8_0, not Q6_K


@pytest.mark.parametrize("ranks", [1, 2])
def test_meta_to_gguf(tmp_path: Path, ranks: int) -> None:
    """Interleaved on both sides: the rows stay where they are."""
    model = MetaModel(vocab_size=288)
    written = write_meta(tmp_path / "meta", model, ranks)
    _spm(tmp_path / "meta" / "tokenizer.model", 288)
    target = tmp_path / "out.gguf"
    assert command("convert", tmp_path / "meta", target) == 0
    found = values(target)
    names = {"layers.1.wq": "blk.1.attn_q", "layers.0.wk": "blk.0.attn_k", "layers.0.w2": "blk.0.ffn_down"}
    for theirs, ours in names.items():
        assert np.array_equal(found[ours + ".weight"], written[theirs].float().numpy())
    assert {t.tensor_type.name for t in gguf.GGUFReader(target).tensors} == {"F16", "F32"}
    _same_answers(tmp_path / "meta", target)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_hugging_face_to_gguf(tmp_path: Path, family: str) -> None:
    """Half-split rows become interleaved, but for qwen2, whose GGUF files keep them."""
    options = {"sliding_window": 8} if family == "mistral" else {}
    model = tiny_hf(tmp_path / "hf", family, vocab_size=len(tokens()), **options)
    byte_level_folder(tmp_path / "hf", "qwen2" if family == "qwen2" else "smollm")
    target = tmp_path / "out.gguf"
    assert command("convert", tmp_path / "hf", target) == 0
    found, state = values(target), model.state_dict()
    query = state["model.layers.1.self_attn.q_proj.weight"].numpy()
    if family != "qwen2":  # heads, halves, pairs, columns: spelt here a second time
        query = query.reshape(4, 2, 8, 64).swapaxes(1, 2).reshape(64, 64)
    assert np.array_equal(found["blk.1.attn_q.weight"], query)
    assert np.array_equal(found["blk.1.attn_v.weight"], state["model.layers.1.self_attn.v_proj.weight"].numpy())
    assert keys(target)["general.architecture"] == ("qwen2" if family == "qwen2" else "llama")
    assert keys(target).get("llama.attention.sliding_window") == (8 if family == "mistral" else None)
    assert ("blk.0.attn_q.bias" in found) == (family == "qwen2")
    _same_answers(tmp_path / "hf", target)


def test_llama3_scaling_becomes_a_tensor_and_linear_a_key(tmp_path: Path) -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 64}  # fmt: skip
    for name, parameters in (("a", scaling), ("b", {"rope_type": "linear", "factor": 2.0})):
        rope = {"rope_parameters": {"rope_theta": 10000.0, **parameters}}
        model = tiny_hf(tmp_path / name, vocab_size=len(tokens()), **rope)
        byte_level_folder(tmp_path / name, "smollm")
        target = tmp_path / f"{name}.gguf"
        assert command("convert", tmp_path / name, target) == 0
        if name == "a":
            plain = 1 / 10000.0 ** (np.arange(0, 16, 2) / 16)
            expected = plain / model.model.rotary_emb.inv_freq.numpy()
            assert expected.max() == pytest.approx(8)
            np.testing.assert_allclose(values(target)["rope_freqs.weight"], expected, rtol=1e-5)
        else:
            assert keys(target)["llama.rope.scaling.type"] == "linear"
            assert keys(target)["llama.rope.scaling.factor"] == 2.0
        _same_answers(tmp_path / name, target)


@pytest.mark.parametrize("kind", ["ggml", "ggjt"])
def test_old_ggml_to_gguf(tmp_path: Path, kind: str) -> None:
    model = GGMLModel(kind=kind, version=1, weights="F16")
    model.write(tmp_path / "old.bin")
    target = tmp_path / "out.gguf"
    assert command("convert", tmp_path / "old.bin", target) == 0
    found = values(target)
    for theirs, ours in {
        "layers.1.attention.wq.weight": "blk.1.attn_q.weight",
        "norm.weight": "output_norm.weight",
    }.items():
        assert np.array_equal(found[ours], model.decoded()[theirs].astype(np.float32))
    told = keys(target)
    assert told["tokenizer.ggml.tokens"][:5] == ["<unk>", "<s>", "</s>", "<0x00>", "<0x01>"]
    assert told["tokenizer.ggml.tokens"][260] == "▁piece1"
    assert told["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 6]
    scores = told["tokenizer.ggml.scores"]
    assert all(one > other for one, other in zip(scores[259:], scores[260:]))


def test_vocab_only_and_dump(tiny_path: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tiny_path(), tmp_path / "vocab.gguf"
    assert command("convert", source, target, "--dump") == 0
    assert not target.exists()
    told = capsys.readouterr().out
    assert "llama.block_count = 2" in told
    assert "blk.1.ffn_up.weight" in told
    assert command("convert", source, target, "--vocab-only") == 0
    assert not gguf.GGUFReader(target).tensors
    assert keys(target)["tokenizer.ggml.tokens"] == tokens()


# mixes: counts of llama.cpp's rules, by hand for 32 layers -----------------------------------------------------------


def _counts(kind: str, **changes: object) -> dict[str, Counter[str]]:
    sizes = {"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 32, "head_dim": 128, "ffn_dim": 11008}
    config = ModelConfig(architecture="llama", name="7B", vocab_size=32000, context=4096, norm_eps=1e-5,
                         **(sizes | changes))  # type: ignore[arg-type]  # fmt: skip
    counts: dict[str, Counter[str]] = {}
    for part in ("wq", "wv", "wo", "w1", "w2"):
        columns = config.ffn_dim if part == "w2" else config.dim
        formats = [
            tensor_format(kind, f"layers.{n}.{part}", (64, columns), config).name for n in range(config.n_layers)
        ]
        counts[part] = Counter(formats)
    counts["output"] = Counter([tensor_format(kind, "output", (64, config.dim), config).name])
    counts["tok_embeddings"] = Counter([tensor_format(kind, "tok_embeddings", (64, config.dim), config).name])
    return counts


def test_mixes_of_a_7b_model() -> None:
    found = _counts("q4_k_m")
    assert found["wv"] == found["w2"] == {"Q6_K": 16, "Q4_K": 16}  # 4 + 8 of 24 + 4
    assert found["wq"] == found["wo"] == found["w1"] == {"Q4_K": 32}
    assert (found["output"], found["tok_embeddings"]) == ({"Q6_K": 1}, {"Q4_K": 1})
    assert _counts("q5_k_m")["wv"] == {"Q6_K": 16, "Q5_K": 16}
    small = _counts("q4_k_s")
    assert (small["wv"], small["w2"]) == ({"Q5_K": 4, "Q4_K": 28}, {"Q5_K": 4, "Q4_K": 28})
    assert _counts("q5_k_s")["wv"] == {"Q5_K": 32}
    three = _counts("q3_k_m")
    assert three["wv"] == three["w2"] == {"Q5_K": 2, "Q4_K": 30}
    assert (three["wo"], three["wq"]) == ({"Q4_K": 32}, {"Q3_K": 32})
    two = _counts("q2_k")
    assert two["wv"] == two["w2"] == two["wo"] == {"Q3_K": 32}
    assert two["wq"] == {"Q2_K": 32}
    assert _counts("q2_k", n_kv_heads=8)["wv"] == {"Q4_K": 32}
    assert _counts("q4_0")["output"] == {"Q6_K": 1}
    assert _counts("q8_0")["output"] == {"Q8_0": 1}


def test_a_70b_model_gives_its_values_more_bits() -> None:
    found = _counts("q4_k_m", n_layers=80, n_heads=64, n_kv_heads=8, dim=8192, ffn_dim=28672)
    assert found["wv"] == {"Q6_K": 40, "Q5_K": 40}
    assert found["w2"] == {"Q6_K": 40, "Q4_K": 40}


def test_rows_that_are_not_whole_blocks() -> None:
    found = _counts("q4_k_m", dim=576, ffn_dim=1536, n_layers=30, n_heads=9, n_kv_heads=3, head_dim=64)
    assert found["wq"] == {"Q5_0": 30}
    assert set(found["wv"]) == {"Q8_0", "Q5_0"}
    assert set(found["w2"]) == {"Q6_K", "Q4_K"}
    assert found["output"] == {"Q8_0": 1}
    assert _counts("q5_k_s", dim=576, n_heads=9, n_kv_heads=3, head_dim=64)["wq"] == {"Q5_1": 32}
    assert _counts("q4_0", dim=72, n_heads=9, n_kv_heads=9, head_dim=8)["wq"] == {"F16": 32}
    assert BY_NAME["Q4_0"].bytes == BY_NAME["IQ4_NL"].bytes  # Q2_K's and Q3_K's stand-in has the right size


# what must not be written -----------------------------------------------------------------------------------------


def test_nothing_is_overwritten_and_nothing_is_left_behind(
    tiny_path: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = tiny_path(), tmp_path / "out.gguf"
    target.write_bytes(b"mine")
    assert command("convert", source, target) == 2
    assert "--force" in capsys.readouterr().err
    assert target.read_bytes() == b"mine"
    assert command("convert", source, source, "--force") == 2
    assert command("convert", source, tmp_path / "nowhere" / "out.gguf") == 2
    assert command("convert", source, target, "--type", "q4_7") == 2
    assert "q4_k_m" in capsys.readouterr().err

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(to_gguf, "write_rows", interrupt)
    assert command("convert", source, target, "--force") == 130
    monkeypatch.undo()
    assert target.read_bytes() == b"mine"
    assert sorted(os.listdir(tmp_path)) == ["out.gguf", "tiny.gguf"]
    assert command("convert", source, target, "--force") == 0
    assert open_checkpoint(target).config == open_checkpoint(source).config


def test_a_full_disk_is_seen_beforehand(
    tiny_path: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("backend.convert.output.shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    assert command("convert", tiny_path(), tmp_path / "out.gguf") == 2
    assert "GB free" in capsys.readouterr().err
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize(("bad", "kind", "word"), [(np.nan, "q8_0", "damaged"), (1e5, "f16", "bf16")])
def test_numbers_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], bad: float, kind: str, word: str
) -> None:
    class Spoilt(TinyModel):
        def values(self) -> dict[str, np.ndarray]:
            found = super().values()
            found["blk.1.ffn_up.weight"][3, 5] = bad
            return found

    source = write_tiny(tmp_path / "tiny.gguf", Spoilt())
    assert command("convert", source, tmp_path / "out.gguf", "--type", kind) == 2
    told = capsys.readouterr().err
    assert "layers.1.w3" in told
    assert word in told
    assert sorted(os.listdir(tmp_path)) == ["tiny.gguf"]


def _same_answers(source: Path, target: Path) -> None:
    """The same greedy ids and logits before and after."""
    one, other = open_checkpoint(source), open_checkpoint(target)
    prompt = [5, 9, 17, 33]
    assert greedy(one, prompt, 12) == greedy(other, prompt, 12)
    torch.testing.assert_close(logits(one, prompt), logits(other, prompt), rtol=1e-4, atol=1e-5)


def _spm(path: Path, size: int) -> None:
    """A tiny SentencePiece vocabulary: bytes and a few pieces."""
    start = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces = [*start, *(f"▁p{number}" for number in range(size - len(start)))]
    kinds = [2, 3, 3, *([6] * 256), *([1] * (size - 259))]
    model = SentenceModel([Piece(text.encode(), -float(n), kinds[n]) for n, text in enumerate(pieces)])
    path.write_bytes(serialized(model))
