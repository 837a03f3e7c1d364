"""The GGUF reader: equal to what the `gguf` package wrote; models that do not hold together are named."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGUFValueType as Type
from gguf.quants import dequantize

from backend.checkpoint.open import open_checkpoint
from backend.errors import CheckpointError
from backend.weights.stored import Blocks
from tests.tiny import TinyModel, add_key, add_tensor, finish, tokens, write_tiny

Write = Callable[..., Path]

# files as they should be ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("fmt", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_tensors_are_read_as_the_writers_own_reader_reads_them(tiny_path: Write, fmt: str, tied: bool) -> None:
    path = tiny_path(weights=fmt, tied=tied, rope_freqs=tied)
    checkpoint, reader = open_checkpoint(path), gguf.GGUFReader(path)
    names = {"token_embd.weight": "tok_embeddings", "blk.1.ffn_down.weight": "layers.1.w2"}
    assert len(checkpoint.tensors) == len(reader.tensors)
    theirs = {tensor.name: tensor for tensor in reader.tensors}
    for info in checkpoint.tensors.values():
        other = theirs[info.name]
        assert info.shape == tuple(int(size) for size in reversed(other.shape))
        assert info.format.name == other.tensor_type.name
        assert info.nbytes == other.n_bytes
    for theirs_name, ours_name in names.items():
        stored = checkpoint.read(ours_name)
        assert stored.shape == checkpoint.tensors[ours_name].shape
        if isinstance(stored, Blocks):
            assert stored.raw.numpy().tobytes() == theirs[theirs_name].data.tobytes()
        expected = dequantize(theirs[theirs_name].data, theirs[theirs_name].tensor_type)
        assert np.array_equal(stored.float32().numpy(), expected.astype(np.float32))
    assert checkpoint.config.tied_output == tied
    assert ("output" in checkpoint.tensors) == (not tied)
    assert ("rope_freqs" in checkpoint.tensors) == tied
    assert checkpoint.format == "GGUF v3"


def test_every_tensor_gets_its_canonical_name(tiny_path: Write) -> None:
    model = TinyModel(tied=False)
    checkpoint = open_checkpoint(tiny_path(tied=False))
    for name, values in model.values().items():
        canonical = [key for key, info in checkpoint.tensors.items() if info.name == name]
        assert len(canonical) == 1
        assert np.array_equal(checkpoint.read(canonical[0]).float32().numpy(), values)
    by_file_name = {info.name: key for key, info in checkpoint.tensors.items()}
    assert by_file_name["blk.0.ffn_gate.weight"] == "layers.0.w1"
    assert by_file_name["blk.0.ffn_up.weight"] == "layers.0.w3"
    assert by_file_name["blk.1.attn_output.weight"] == "layers.1.wo"


def test_the_configuration(tiny_path: Write) -> None:
    config = open_checkpoint(tiny_path(rope_theta=50000.0, norm_eps=1e-6)).config
    assert (config.architecture, config.name) == ("llama", "tiny")
    assert (config.dim, config.n_layers, config.n_heads, config.n_kv_heads, config.head_dim) == (64, 2, 4, 2, 16)
    assert (config.ffn_dim, config.vocab_size, config.context) == (96, len(tokens()), 256)
    assert config.norm_eps == pytest.approx(1e-6)
    assert (config.rope_theta, config.rope_scaling) == (50000.0, None)
    assert (config.sliding_window, config.biases) == (None, frozenset())
    assert config.rope_interleaved


def test_what_may_be_left_out(tiny_path: Write) -> None:
    left_out = [
        "llama.attention.head_count_kv", "llama.attention.key_length", "llama.attention.value_length",
        "llama.rope.dimension_count", "llama.rope.freq_base", "general.name", "tokenizer.chat_template",
    ]  # fmt: skip
    path = tiny_path(n_kv_heads=4, metadata=dict.fromkeys(left_out))
    config = open_checkpoint(path).config
    assert (config.n_kv_heads, config.head_dim, config.rope_theta, config.name) == (4, 16, 10000.0, "tiny")


@pytest.mark.parametrize(
    ("keys", "scale"),
    [
        ({"llama.rope.scale_linear": 4.0}, 4.0),
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 8.0}, 8.0),
        ({"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 8.0}, 1.0),
        ({"llama.embedding_length": (64, Type.UINT64), "llama.block_count": (2, Type.INT32)}, 1.0),
        ({"llama.rope.freq_base": (10000.0, Type.FLOAT64)}, 1.0),
    ],
)
def test_other_spellings_of_numbers(tiny_path: Write, keys: dict[str, Any], scale: float) -> None:
    config = open_checkpoint(tiny_path(metadata=keys)).config
    assert (config.rope_scaling.factor if config.rope_scaling else 1.0) == scale
    assert (config.dim, config.n_layers) == (64, 2)


VALUES: dict[str, tuple[Any, ...]] = {
    "u8": (255, Type.UINT8), "i8": (-128, Type.INT8), "u16": (65535, Type.UINT16), "i16": (-32768, Type.INT16),
    "u32": (2**32 - 1, Type.UINT32), "i32": (-(2**31), Type.INT32), "u64": (2**64 - 1, Type.UINT64),
    "i64": (-(2**63), Type.INT64), "f32": (1.5, Type.FLOAT32), "f64": (0.1, Type.FLOAT64), "yes": (True, Type.BOOL),
    "no": (False, Type.BOOL), "text": ("höllo\n🙂", Type.STRING), "empty": ("", Type.STRING),
    "a.u8": ([0, 255], Type.ARRAY, Type.UINT8), "a.i8": ([-1, 5], Type.ARRAY, Type.INT8),
    "a.u16": ([1, 65535], Type.ARRAY, Type.UINT16), "a.i16": ([-9], Type.ARRAY, Type.INT16),
    "a.u32": ([7] * 100, Type.ARRAY, Type.UINT32), "a.i32": ([-7, 0], Type.ARRAY, Type.INT32),
    "a.u64": ([2**63], Type.ARRAY, Type.UINT64), "a.i64": ([-(2**63)], Type.ARRAY, Type.INT64),
    "a.f32": ([0.25, -1.0], Type.ARRAY, Type.FLOAT32), "a.f64": ([0.1, 1e300], Type.ARRAY, Type.FLOAT64),
    "a.bool": ([True, False, True], Type.ARRAY, Type.BOOL), "a.text": (["", "ä", "bc"], Type.ARRAY, Type.STRING),
}  # fmt: skip


@pytest.mark.parametrize("version", [2, 3])
def test_metadata_of_every_type(tiny_path: Write, version: int) -> None:
    path = tiny_path(metadata={f"test.{name}": value for name, value in VALUES.items()})
    data = bytearray(path.read_bytes())
    data[4:8] = struct.pack("<I", version)  # 2 and 3 have one layout
    path.write_bytes(data)
    checkpoint = open_checkpoint(path)
    assert checkpoint.format == f"GGUF v{version}"
    for name, value in VALUES.items():
        read = checkpoint.metadata[f"test.{name}"]
        assert read == value[0]
        assert type(read) is type(value[0])


@pytest.mark.parametrize("alignment", [8, 32, 64, 4096])
def test_alignment(tmp_path: Path, alignment: int) -> None:
    model, path = TinyModel(), tmp_path / "aligned.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(alignment)
    for key, value in model.keys().items():
        add_key(writer, key, value)
    values = model.values()
    for name, array_ in values.items():
        add_tensor(writer, name, array_, "F32")
    checkpoint = open_checkpoint(finish(writer))
    for key, info in checkpoint.tensors.items():
        assert checkpoint.read(key).float32().numpy().tobytes() == values[info.name].tobytes()


# models that do not hold together ---------------------------------------------------------------------------------

WRONG_KEYS: dict[str, dict[str, Any]] = {
    "llama.embedding_length": {"missing": None, "text": "64", "float": 64.0, "zero": 0, "list": [64], "other": 32},
    "llama.block_count": {"missing": None, "zero": 0, "huge": 2**32 - 1, "bool": True, "more": 3, "fewer": 1},
    "llama.attention.head_count": {"missing": None, "zero": 0, "three": 3, "other": 8, "float": 4.0},
    "llama.attention.head_count_kv": {"zero": 0, "more than heads": 8, "three": 3, "other": 4, "list": [2, 2]},
    "llama.attention.key_length": {"odd": 17, "zero": 0, "other": 32},
    "llama.attention.value_length": {"other": 32, "text": "16"},
    "llama.rope.dimension_count": {"half": 8, "zero": 0},
    "llama.feed_forward_length": {"missing": None, "other": 64, "list": [96, 96]},
    "llama.context_length": {"missing": None, "zero": 0, "huge": (2**63, Type.UINT64)},
    "llama.attention.layer_norm_rms_epsilon": {"missing": None, "nan": float("nan"), "negative": -1.0, "text": "x"},
    "llama.rope.freq_base": {"nan": float("nan"), "inf": float("inf"), "zero": 0.0, "negative": -1.0, "text": "1e4"},
    "llama.rope.scaling.type": {"yarn": "yarn", "number": 7},
    "llama.rope.scale_linear": {"zero": 0.0, "nan": float("nan")},
    "llama.expert_count": {"eight": 8},
}
CASES = [(name, what, value) for name, values in WRONG_KEYS.items() for what, value in values.items()]


@pytest.mark.parametrize(("name", "value"), [case[::2] for case in CASES], ids=[" ".join(case[:2]) for case in CASES])
def test_keys_that_do_not_fit(tiny_path: Write, name: str, value: Any) -> None:
    path = tiny_path(metadata={name: value})
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert str(path) in caught.value.message
    if value is None:
        assert f"'{name}' is missing" in caught.value.message


def with_tensors(path: Path, change: Callable[[dict[str, np.ndarray]], None]) -> Path:
    model = TinyModel(tied=False, rope_freqs=True)
    values = model.values()
    change(values)
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in model.keys().items():
        add_key(writer, name, value)
    for name, array_ in values.items():
        add_tensor(writer, name, array_, "F32")
    return finish(writer)


MISSING = ["token_embd.weight", "output_norm.weight", *(n for n in TinyModel().shapes() if n.startswith("blk.1."))]


@pytest.mark.parametrize("name", MISSING)
def test_a_missing_tensor_is_named(tmp_path: Path, name: str) -> None:
    path = with_tensors(tmp_path / "tiny.gguf", lambda values: values.__delitem__(name))
    with pytest.raises(CheckpointError, match="is missing") as caught:
        open_checkpoint(path)
    assert str(path) in caught.value.message
    assert f"'{name}'" in caught.value.message


@pytest.mark.parametrize("name", [n for n in TinyModel(tied=False, rope_freqs=True).shapes() if "blk.0" not in n])
def test_a_tensor_of_the_wrong_shape_is_named(tmp_path: Path, name: str) -> None:
    def longer(values: dict[str, np.ndarray]) -> None:
        shape = list(values[name].shape)
        shape[-1] += 32
        values[name] = np.zeros(shape, np.float32)

    def transposed(values: dict[str, np.ndarray]) -> None:
        values[name] = np.zeros((*values[name].shape, 1), np.float32)

    for change in (longer, transposed):
        path = with_tensors(tmp_path / f"{change.__name__}.gguf", change)
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(path)
        assert name in caught.value.message


UNKNOWN = [
    "blk.0.attn_q.scale", "blk.2.attn_q.weight", "blk.00.attn_q.weight", "blk.².attn_q.weight", "blk.-1.attn_q.weight",
    "blk..attn_q.weight", "blk.0.attn_q", "blk.+1.attn_q.weight", "blk.0.ffn_gate_inp.weight", "token_embd.weight2",
    "blk." + "9" * 5000 + ".attn_q.weight", "blk.٠.attn_q.weight", "rope_freqs", "",
]  # fmt: skip


@pytest.mark.parametrize("name", UNKNOWN, ids=lambda name: repr(name)[:30])
def test_an_unknown_tensor_would_change_the_answer(tmp_path: Path, name: str) -> None:
    path = with_tensors(tmp_path / "tiny.gguf", lambda values: values.update({name: np.zeros(32, np.float32)}))
    with pytest.raises(CheckpointError, match="not part of the llama architecture"):
        open_checkpoint(path)


# version 1, several files, other families ---------------------------------------------------------------------------


def as_version_1(data: bytes) -> bytes:
    """The same file with the 32-bit counts and lengths of version 1."""
    out = bytearray(b"GGUF" + struct.pack("<I", 1))
    at = 8

    def take(form: str) -> int:
        nonlocal at
        value = struct.unpack_from("<" + form, data, at)[0]
        at += struct.calcsize("<" + form)
        return value

    def raw(count: int) -> None:
        nonlocal at
        out.extend(data[at : at + count])
        at += count

    def short() -> int:
        value = take("Q")
        out.extend(struct.pack("<I", value))
        return value

    def value(kind: int) -> None:
        if kind == 8:
            raw(short())
        elif kind == 9:
            inner = take("I")
            out.extend(struct.pack("<I", inner))
            for _ in range(short()):
                value(inner)
        else:
            raw({0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}[kind])

    n_tensors, n_keys = short(), short()
    for _ in range(n_keys):
        raw(short())
        kind = take("I")
        out.extend(struct.pack("<I", kind))
        value(kind)
    for _ in range(n_tensors):
        raw(short())
        n_dims = take("I")
        out.extend(struct.pack("<I", n_dims))
        for _ in range(n_dims):
            short()
        raw(12)  # type and offset
    start = -(-at // 32) * 32
    out.extend(bytes(-len(out) % 32))
    return bytes(out) + data[start:]


def same_values(one: Path, other: Path) -> None:
    first, second = open_checkpoint(one), open_checkpoint(other)
    assert first.tensors.keys() == second.tensors.keys()
    for name in first.tensors:
        assert torch.equal(first.read(name).float32(), second.read(name).float32()), name


def test_version_1(tiny_path: Write, tmp_path: Path) -> None:
    path = tiny_path(weights="Q4_0", tied=False)
    old = tmp_path / "old.gguf"
    old.write_bytes(as_version_1(path.read_bytes()))
    checkpoint = open_checkpoint(old)
    assert checkpoint.format == "GGUF v1"
    assert checkpoint.config == open_checkpoint(path).config
    assert checkpoint.tokenizer.metadata == open_checkpoint(path).tokenizer.metadata
    same_values(old, path)


def write_split(folder: Path, tensors_each: int) -> list[Path]:
    model = TinyModel(weights="Q8_0")
    writer = gguf.GGUFWriter(folder / "split.gguf", "llama", split_max_tensors=tensors_each)
    for key, value in model.keys().items():
        add_key(writer, key, value)
    for name, values in model.values().items():
        add_tensor(writer, name, values, model.format_of(name))
    finish(writer)
    return sorted(folder.glob("split-*.gguf"))


def test_a_split_model_opens_by_any_of_its_files(tmp_path: Path) -> None:
    files = write_split(tmp_path, 6)
    assert len(files) == 4
    whole = write_tiny(tmp_path / "whole.gguf", TinyModel(weights="Q8_0"))
    for file in files:
        checkpoint = open_checkpoint(file)
        assert checkpoint.format == "GGUF v3, 4 files"
        assert list(checkpoint.files) == files
        assert checkpoint.tokenizer.metadata["tokenizer.ggml.pre"] == "smollm"
        same_values(file, whole)


def test_a_split_model_that_is_not_whole(tmp_path: Path) -> None:
    files = write_split(tmp_path, 6)
    files[2].rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"split-00003-of-00004\.gguf is not beside it"):
        open_checkpoint(files[0])
    files[1].rename(files[2])
    with pytest.raises(CheckpointError, match="is not beside it"):
        open_checkpoint(files[0])
    shutil.copy(files[2], files[1])
    with pytest.raises(CheckpointError, match="says it is part 1, expected 2 of 4"):
        open_checkpoint(files[0])
    files[0].rename(tmp_path / "renamed.gguf")
    with pytest.raises(CheckpointError, match=r"one of 4 files; its name should end in '-00001-of-00004\.gguf'"):
        open_checkpoint(tmp_path / "renamed.gguf")


def test_qwen2_has_biases_and_pairs_of_halves(tmp_path: Path) -> None:
    model = TinyModel()
    writer = gguf.GGUFWriter(tmp_path / "qwen.gguf", "qwen2")
    for key, value in model.keys().items():
        add_key(writer, key.replace("llama.", "qwen2."), value)
    values = model.values()
    for layer in range(2):
        for name, rows in (("attn_q", 64), ("attn_k", 32), ("attn_v", 32)):
            values[f"blk.{layer}.{name}.bias"] = np.full(rows, layer + 0.5, np.float32)
    for name, tensor in values.items():
        add_tensor(writer, name, tensor, "F32")
    checkpoint = open_checkpoint(finish(writer))
    config = checkpoint.config
    assert (config.architecture, config.rope_interleaved) == ("qwen2", False)
    assert config.biases == {"wq", "wk", "wv"}
    assert checkpoint.read("layers.1.wk_bias").float32().tolist() == [1.5] * 32


def test_other_files(tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    other.write_bytes(b"PNG\3\4 a picture")
    cases = [(other, "no model file known"), (tmp_path, "holds no model known"), (tmp_path / "absent", "no such file")]
    for path, words in cases:
        with pytest.raises(CheckpointError, match=words) as caught:
            open_checkpoint(path)
        assert str(path) in caught.value.message


def test_the_name_of_a_file_decides_nothing(tmp_path: Path) -> None:
    assert open_checkpoint(write_tiny(tmp_path / "model.safetensors")).config.dim == 64
