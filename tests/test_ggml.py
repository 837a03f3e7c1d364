"""Old llama.cpp files: every era decodes to exactly what was written, parts are joined, damage is one sentence."""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from backend.checkpoint.base import Checkpoint
from backend.checkpoint.ggml import GGMLCheckpoint
from backend.errors import CheckpointError
from backend.model.config import tensor_shapes
from tests.ggmlfiles import GGMLModel

OLD_TYPES = ("F32", "F16", "Q4_0", "Q4_1", "ftype 4", "Q5_0", "Q5_1", "Q8_0")
ERAS = [
    *(("ggml", 0, weights) for weights in ("F32", "F16", "Q4_0", "Q4_1")),
    *(("ggmf", 1, weights) for weights in ("F32", "F16", "Q4_0", "Q4_1", "ftype 4")),
    *(("ggjt", 1, weights) for weights in (*OLD_TYPES, "Q4_2", "Q4_3")),
    *(("ggjt", 2, weights) for weights in OLD_TYPES),
    *(("ggjt", 3, weights) for weights in (*OLD_TYPES, "Q4_K", "Q6_K")),
]


def opened(tmp_path: Path, model: GGMLModel) -> GGMLCheckpoint:
    return GGMLCheckpoint(model.write(tmp_path / "ggml-model.bin")[0])


def values_of(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """By the file's name."""
    return {info.name: checkpoint.read(name).float32().numpy() for name, info in checkpoint.tensors.items()}


def assert_exact(checkpoint: Checkpoint, model: GGMLModel) -> None:
    found, expected = values_of(checkpoint), model.decoded()
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)
        assert found[name].shape == values.shape == checkpoint.tensors[_canonical(name)].shape


def _canonical(name: str) -> str:
    for words in ("attention.", "feed_forward.", ".weight"):
        name = name.replace(words, "")
    return name


@pytest.mark.parametrize(("kind", "version", "weights"), ERAS, ids=lambda value: str(value))
def test_every_era_and_type_decodes_exactly(tmp_path: Path, kind: str, version: int, weights: str) -> None:
    wide = {"dim": 256, "ffn_dim": 256, "n_layers": 1} if weights.endswith("_K") else {}
    model = GGMLModel(kind=kind, version=version, weights=weights, **wide)
    checkpoint = opened(tmp_path, model)
    assert_exact(checkpoint, model)
    assert checkpoint.format.startswith(f"{kind} v{version}, " if version else "ggml, ")
    assert ("Q4_1 with F16" if weights == "ftype 4" else weights) in checkpoint.format
    assert {name: info.shape for name, info in checkpoint.tensors.items()} == tensor_shapes(checkpoint.config)


def test_part_of_the_rows_and_bytes(tmp_path: Path) -> None:
    model = GGMLModel(version=1, weights="Q4_1")
    checkpoint = opened(tmp_path, model)
    stored = checkpoint.read("layers.1.w2")
    expected = model.decoded()["layers.1.feed_forward.w2.weight"]
    np.testing.assert_array_equal(stored.float32(3, 17).numpy(), expected[3:17])
    np.testing.assert_array_equal(stored.float32(63).numpy(), expected[63:])
    before = stored.float32()
    stored.release()
    assert (stored.float32() == before).all()
    info = checkpoint.tensors["layers.1.w2"]
    assert info.nbytes == 64 * 128 // 32 * 24  # float32 scale and minimum, 16 bytes of codes


def test_tokens_and_scores(tmp_path: Path) -> None:
    model = GGMLModel(kind="ggmf", version=1)
    source = opened(tmp_path, model).tokenizer
    assert source.kind == "ggml"
    assert source.path == tmp_path / "ggml-model.bin"
    assert source.metadata["tokens"] == model.tokens()
    assert source.metadata["scores"] == model.scores()
    unscored = opened(tmp_path, GGMLModel(kind="ggml"))
    assert unscored.tokenizer.metadata["tokens"] == model.tokens()
    assert unscored.tokenizer.metadata["scores"] is None
    assert any("scores" in note for note in unscored.notes)


# several parts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ggml", "ggmf", "ggjt"])
@pytest.mark.parametrize(("weights", "parts"), [("F32", 4), ("F16", 2), ("Q4_0", 2), ("Q4_1", 2)])
def test_parts_are_joined(tmp_path: Path, kind: str, weights: str, parts: int) -> None:
    model = GGMLModel(kind=kind, version=1, weights=weights, parts=parts)
    paths = model.write(tmp_path / "ggml-model.bin")
    checkpoint = GGMLCheckpoint(paths[0])
    assert_exact(checkpoint, model)
    assert list(checkpoint.files) == paths
    assert f"{parts} parts" in checkpoint.format
    assert_exact(GGMLCheckpoint(paths[-1]), model)  # a later part leads to all of them


def test_a_single_file_does_not_look_for_others(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    GGMLModel().write(path)
    (tmp_path / "model.bin.1").write_text("something else")
    assert list(GGMLCheckpoint(path).files) == [path]
    numbered = tmp_path / "model.bin.2"
    GGMLModel().write(numbered)
    assert list(GGMLCheckpoint(numbered).files) == [numbered]


def test_parts_that_do_not_belong_together(tmp_path: Path) -> None:
    model = GGMLModel(kind="ggmf", version=1, parts=2)
    path, second = model.write(tmp_path / "model.bin")
    second.unlink()
    refused(path, r"first of 2 parts, but model\.bin\.1")
    second.mkdir()
    refused(path, r"model\.bin\.1")
    second.rmdir()
    second.write_bytes(b"")
    refused(path, r"model\.bin\.1")
    second.write_bytes(GGMLModel(kind="ggmf", version=1, parts=2, n_layers=1).bytes(1))
    refused(path, "another model")
    second.write_bytes(GGMLModel(kind="ggmf", version=1, parts=2, drop=("norm.weight",)).bytes(1))
    refused(path, r"model\.bin\.1: tensor 'norm\.weight' is missing")
    second.write_bytes(GGMLModel(kind="ggmf", version=1).bytes())
    refused(path, "expected F32")
    second.write_bytes(GGMLModel(kind="ggmf", version=1, parts=2, weights="F16", numbers={"ftype": 0}).bytes(1))
    refused(path, "is F16")


# padding ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("n_tokens", [300, 301, 302])  # token counts shift where the tensors begin
def test_ggmf_with_and_without_padding(tmp_path: Path, padded: bool, n_tokens: int) -> None:
    model = GGMLModel(kind="ggmf", version=1, weights="ftype 4", padded=padded, n_tokens=n_tokens)
    assert_exact(opened(tmp_path, model), model)


def test_damage_in_a_padded_ggmf_file_is_told_as_such(tmp_path: Path) -> None:
    model = GGMLModel(kind="ggmf", version=1, weights="ftype 4", padded=True)
    path = model.write(tmp_path / "model.bin")[0]
    path.write_bytes(path.read_bytes()[:-5])
    refused(path, r"layers\.1\.ffn_norm\.weight' needs bytes")


def test_ggjt_is_always_padded(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    GGMLModel(padded=False).write(path)
    refused(path, "damaged|not part of a LLaMA")


# numbers the file does not say --------------------------------------------------------------------------------------

ASSUMED = {
    "LLaMA 1": (GGMLModel(), 4, 1e-6, 2048, 1e4),
    "Llama 2 70B": (GGMLModel(n_kv_heads=2), 2, 1e-5, 4096, 1e4),
    "Code Llama": (GGMLModel(n_tokens=32016, dim=32), 4, 1e-5, 16384, 1e6),
    "Code Llama 34B": (GGMLModel(n_kv_heads=1, n_layers=48, dim=32, ffn_dim=32, n_tokens=3), 1, 1e-5, 16384, 1e6),
    "LLaMA 65B": (
        GGMLModel(dim=8192, n_heads=64, n_kv_heads=64, ffn_dim=32, n_layers=1, n_tokens=1, weights="Q4_0"),
        64, 1e-5, 2048, 1e4,
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", ASSUMED)
def test_what_is_assumed_is_said(tmp_path: Path, family: str) -> None:
    model, n_kv_heads, norm_eps, context, theta = ASSUMED[family]
    if model.dim == 8192:
        path = _sparse_65b(tmp_path / "model.bin", model)
    else:
        path = model.write(tmp_path / "model.bin")[0]
    checkpoint = GGMLCheckpoint(path)
    config = checkpoint.config
    assert (config.n_kv_heads, config.norm_eps, config.context, config.rope_theta) == (
        n_kv_heads, norm_eps, context, theta
    )  # fmt: skip
    assert (config.dim, config.n_heads, config.ffn_dim) == (model.dim, model.n_heads, model.ffn_dim)
    assert (config.n_layers, config.vocab_size, config.tied_output) == (model.n_layers, model.n_tokens, False)
    assert config.rope_interleaved
    assert any("norm_eps" in note and family.removesuffix(" 34B") in note for note in checkpoint.notes)


def _sparse_65b(path: Path, model: GGMLModel) -> Path:
    """The headers as they are, the data a hole: opening must not touch them."""
    at = len(model.header())
    with open(path, "wb") as file:
        file.write(model.header())
        for name, shape in model.shapes().items():
            type_id, row = (2, shape[-1] // 32 * 18) if len(shape) == 2 else (0, shape[-1] * 4)
            head = struct.pack("<3I", len(shape), len(name), type_id)
            head += struct.pack(f"<{len(shape)}I", *reversed(shape)) + name.encode()
            head += bytes(-(at + len(head)) % 32)
            file.write(head)
            at += len(head) + row * (shape[0] if len(shape) == 2 else 1)
            file.seek(at)
        file.truncate(at)
    return path


# damage and lies ----------------------------------------------------------------------------------------------------


def refused(path: Path, words: str) -> str:
    with pytest.raises(CheckpointError, match=words) as caught:
        GGMLCheckpoint(path)
    message = caught.value.message
    assert str(path.parent) in message
    assert "\n" not in message
    return message


SMALL = GGMLModel(kind="ggjt", version=3, weights="Q4_0", n_layers=1, dim=32, n_heads=2, n_kv_heads=2, ffn_dim=32,
                  n_tokens=7)  # fmt: skip


@pytest.mark.parametrize("kind", ["ggmf", "ggjt"])
def test_truncation_at_every_byte_of_the_headers(tmp_path: Path, kind: str) -> None:
    model = GGMLModel(**(vars(SMALL) | {"kind": kind, "version": 1}))
    path = tmp_path / "model.bin"
    cuts, at = [], 0
    for piece, is_data in model.pieces():
        cuts += [at, at + 1, at + len(piece) - 1] if is_data else range(at, at + len(piece))
        at += len(piece)
    whole = model.bytes()
    assert len(cuts) > 500
    for cut in cuts:
        path.write_bytes(whole[:cut])
        refused(path, "damaged|missing|fewer")
    path.write_bytes(whole)
    GGMLCheckpoint(path)
    path.write_bytes(whole + b"\0")
    refused(path, "damaged")


def put(at: int, value: int) -> Callable[[bytearray], None]:
    return lambda data: struct.pack_into("<I", data, at, value)


# ggjt: magic 0, version 4, n_vocab 8, n_embd 12, n_mult 16, n_head 20, n_layer 24, n_rot 28, ftype 32, token 0 at 36
FIRST = len(SMALL.header())  # the first tensor: n_dims, name length, type, 2 dimensions, name
NUMBERS = {"n_vocab": 8, "n_embd": 12, "n_mult": 16, "n_head": 20, "n_layer": 24, "n_rot": 28, "ftype": 32}
HOSTILE: list[tuple[str, Callable[[bytearray], None], str]] = [
    ("another magic", put(0, 0x12345678), "expected a ggml"),
    ("an adapter", put(0, 0x67676C61), "expected a ggml"),
    *((f"version {version}", put(4, version), "expected 1 to 3") for version in (0, 4, 1 << 31, 0xFFFFFFFF)),
    *((f"{name} 0", put(at, 0), f"{name} is 0") for name, at in NUMBERS.items() if name != "ftype"),
    *((f"{name} huge", put(at, 0xFFFFFFFF), f"{name} is 4294967295") for name, at in NUMBERS.items()),
    ("too many tokens", put(8, 1 << 20), "vocabulary of 1048576"),
    ("a token more", put(8, 8), "."),
    ("a token less", put(8, 6), "."),
    ("n_embd not a multiple", put(12, 33), "no multiple"),
    ("n_embd doubled", put(12, 64), "n_rot is 16 where"),
    ("n_rot of another model", put(28, 8), "n_rot is 8 where"),
    ("more layers", put(24, 1024), r"layers\.1\.attention_norm\.weight' is missing"),
    ("ftype 19", put(32, 19), "ftype is 19"),
    ("a long token", put(36, 4097), "token 0 claims 4097"),
    ("an endless token", put(36, 0xFFFFFFFF), "token 0 claims"),
    ("score nan", put(36 + 4 + 5, 0x7FC00000), "score of token 0 is nan"),
    ("no dimensions", put(FIRST, 0), "no tensor begins"),
    ("three dimensions", put(FIRST, 3), "no tensor begins"),
    ("many dimensions", put(FIRST, 0xFFFFFFFF), "no tensor begins"),
    ("no name", put(FIRST + 4, 0), "no tensor begins"),
    ("a long name", put(FIRST + 4, 0xFFFFFFFF), "no tensor begins"),
    ("a shorter name", put(FIRST + 4, 20), "not part of a LLaMA"),
    ("an unknown type", put(FIRST + 8, 99), r"type 99 \(unknown\)"),
    ("a removed type", put(FIRST + 8, 4), r"type 4 \(Q4_2\)"),
    ("no columns", put(FIRST + 12, 0), "at least 1"),
    ("columns of half a block", put(FIRST + 12, 33), "multiple of the Q4_0 block"),
    ("columns of another model", put(FIRST + 12, 96), "96 columns|needs bytes|."),
    ("endless columns", put(FIRST + 12, 0xFFFFFFE0), "needs bytes"),
    ("endless rows", put(FIRST + 16, 0xFFFFFFFF), "needs bytes"),
    ("a name that is not text", lambda data: data.__setitem__(FIRST + 20, 0xFF), "not part of a LLaMA"),
    ("only the vocabulary", lambda data: data.__delitem__(slice(FIRST, None)), "tok_embeddings.weight' is missing"),
]


@pytest.mark.parametrize(("change", "words"), [case[1:] for case in HOSTILE], ids=[case[0] for case in HOSTILE])
def test_lies_are_one_sentence(tmp_path: Path, change: Callable[[bytearray], None], words: str) -> None:
    data = bytearray(SMALL.bytes())
    change(data)
    path = tmp_path / "model.bin"
    path.write_bytes(data)
    refused(path, words)


def test_both_dimensions_endless(tmp_path: Path) -> None:
    data = bytearray(SMALL.bytes())
    put(FIRST + 12, 0xFFFFFFE0)(data)
    put(FIRST + 16, 0xFFFFFFFF)(data)
    (tmp_path / "model.bin").write_bytes(data)
    refused(tmp_path / "model.bin", "more than any model has")


WRONG_MODELS = {
    "a tensor is missing": (
        GGMLModel(drop=("layers.1.ffn_norm.weight",)), r"'layers\.1\.ffn_norm\.weight' is missing"
    ),
    "no wk": (GGMLModel(drop=("layers.0.attention.wk.weight",)), r"attention\.wk\.weight' is missing"),
    "no w1": (GGMLModel(drop=("layers.0.feed_forward.w1.weight",)), r"feed_forward\.w1\.weight' is missing"),
    "no embeddings": (GGMLModel(drop=("tok_embeddings.weight",)), r"'tok_embeddings\.weight' is missing"),
    "no output": (GGMLModel(drop=("output.weight",)), r"'output\.weight' is missing"),
    "a name of another model": (GGMLModel(rename={"norm.weight": "transformer.ln_f.weight"}), "not part of a LLaMA"),
    "a layer too many": (GGMLModel(numbers={"n_layer": 1}), "not part of a LLaMA of 1 layers"),
    "a name twice": (GGMLModel(rename={"norm.weight": "layers.0.ffn_norm.weight"}), "appears twice"),
    "leading zero": (GGMLModel(rename={"norm.weight": "layers.00.ffn_norm.weight"}), "not part of a LLaMA"),
    "key heads that do not divide": (GGMLModel(n_kv_heads=3), "must divide 4"),
    "heads that are no power of two": (GGMLModel(n_heads=64, n_kv_heads=64), "n_rot is 1 .*even"),
    "Q4_3 in v2": (GGMLModel(version=2, weights="Q4_3"), r"type 5 \(Q4_3\)"),
    "K types in v1": (GGMLModel(version=1, weights="Q4_K", dim=256, ffn_dim=256), r"type 12 \(Q4_K\)"),
}  # fmt: skip


@pytest.mark.parametrize(("model", "words"), WRONG_MODELS.values(), ids=WRONG_MODELS.keys())
def test_files_that_are_no_llama(tmp_path: Path, model: GGMLModel, words: str) -> None:
    path = tmp_path / "model.bin"
    model.write(path)
    refused(path, words)


OTHER_MODELS = {  # the hyper-parameters of well-known files with the magic `ggml`, in the order of their own loaders
    "GPT-J 6B": (50400, 2048, 4096, 16, 28, 64, 1),
    "GPT-2 117M": (50257, 1024, 768, 12, 12, 1, 50257),
    "GPT-NeoX 20B": (50432, 2048, 6144, 64, 44, 24, 1, 1),
    "MPT 7B": (4096, 65536, 32, 32, 50432, 0, 0, 1),
    "BLOOM 7B": (250880, 2048, 4096, 32, 30, 1, 1),
    "Whisper base": (51865, 1500, 512, 8, 6, 448, 512, 8, 6, 80, 1),
    "RWKV": (50277, 2560, 32, 1, 0, 0, 0),
}


@pytest.mark.parametrize("numbers", OTHER_MODELS.values(), ids=OTHER_MODELS.keys())
def test_other_models_with_the_same_magic(tmp_path: Path, numbers: tuple[int, ...]) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(b"lmgg" + struct.pack(f"<{len(numbers)}I", *numbers) + bytes(1 << 16))
    assert "GPT-J" in refused(path, "not the numbers of a LLaMA")


@pytest.mark.parametrize("size", [0, 100])
def test_a_file_that_changes_after_it_was_opened(tmp_path: Path, size: int) -> None:
    checkpoint = opened(tmp_path, GGMLModel())
    os.truncate(checkpoint.path, size)
    with pytest.raises(CheckpointError, match=r"ggml-model\.bin"):
        checkpoint.read("norm")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    refused(tmp_path / "absent.bin", "cannot be read")
    refused(tmp_path, "cannot be read")


def test_random_mutations_end_in_a_typed_error_or_an_open_file(tmp_path: Path) -> None:
    """It opens with the right shapes and every tensor can be read, or it is a CheckpointError."""
    chance, opened_files, errors = random.Random(7), 0, 0
    path = tmp_path / "model.bin"
    for kind in ("ggml", "ggmf", "ggjt"):
        model = GGMLModel(**(vars(SMALL) | {"kind": kind, "version": 1}))
        whole = model.bytes()
        header = [at for at, is_header in _map(model) if is_header]
        for _ in range(120):
            data = bytearray(whole)
            for _ in range(chance.randint(1, 3)):
                data[chance.choice(header)] = chance.choice((0, 1, 31, 32, 127, 128, 255, chance.randrange(256)))
            path.write_bytes(data)
            try:
                checkpoint = GGMLCheckpoint(path)
            except CheckpointError:
                errors += 1
                continue
            opened_files += 1
            shapes = tensor_shapes(checkpoint.config)
            assert {name: values.shape for name, values in _by_canonical(checkpoint).items()} == shapes
    assert errors > 120
    assert opened_files > 12


def _map(model: GGMLModel) -> list[tuple[int, bool]]:
    flags = [not is_data for piece, is_data in model.pieces() for _ in piece]
    return list(enumerate(flags))


def _by_canonical(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    return {name: checkpoint.read(name).float32().numpy() for name in checkpoint.tensors}
