"""recover: bit-equal to tuned models whose diffs numpy made here, in little memory, and refusing what does not fit."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from backend.checkpoint.easylm import read_easylm
from backend.checkpoint.open import open_checkpoint
from backend.convert.easylm_writer import write_leaf
from backend.errors import CheckpointError
from tests.commandline import command, peak_of
from tests.hffiles import tiny_hf, write_torch
from tests.metafiles import MetaModel, write_meta
from tests.test_convert_gguf import _spm

GROUPS = dict.fromkeys(("wq", "wk", "wv", "wo"), "attention/") | dict.fromkeys(("w1", "w2", "w3"), "feed_forward/")
TOKENIZER = '{"model_max_length": 1000000000000000019884624838656}'


def folder(path: Path, state: dict[str, torch.Tensor], like: Path, shards: int = 1) -> Path:
    """A folder of old torch files, as the diffs were published."""
    path.mkdir()
    write_torch(path, state, shards)
    (path / "config.json").write_bytes((like / "config.json").read_bytes())
    (path / "tokenizer_config.json").write_text(TOKENIZER)
    return path


def random_like(state: dict[str, torch.Tensor], rows: int, seed: int = 1) -> dict[str, torch.Tensor]:
    """Other numbers of the same shapes, with `rows` more tokens."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: (v.shape[0] + rows, v.shape[1]) if v.shape[0] == 160 else v.shape for name, v in state.items()}
    return {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def result(path: Path) -> dict[str, torch.Tensor]:
    return {name: values for file in sorted(path.glob("*.safetensors")) for name, values in load_file(file).items()}


# Alpaca -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def alpaca(tmp_path: Path) -> dict[str, torch.Tensor]:
    """base and diff folders; the tuned model. The diff is made as weight_diff.py makes it, in numpy's float32."""
    state = dict(tiny_hf(tmp_path / "base", dtype=torch.float16).state_dict())
    tuned = random_like(state, 1)
    diff = {}
    for name, values in tuned.items():
        raw = state[name].float().numpy()
        if raw.shape[0] == 160:
            raw = np.concatenate([raw, torch.from_numpy(raw).mean(dim=0, keepdim=True).numpy()])
        # Numbers that add up exactly: the diff keeps what the subtraction rounds away from the tuned model.
        delta = values.numpy() - raw
        diff[name] = torch.from_numpy(delta)
        tuned[name] = torch.from_numpy(raw + delta)
    folder(tmp_path / "diff", diff, tmp_path / "base", shards=3)
    return tuned


def test_alpaca(tmp_path: Path, alpaca: dict[str, torch.Tensor], capsys: pytest.CaptureFixture[str]) -> None:
    expected = float(sum(values.sum() for values in alpaca.values()))
    arguments = ("alpaca", "--base", tmp_path / "base", "--diff", tmp_path / "diff", "--out", tmp_path / "out")
    assert command("recover", *arguments, "--expected-sum", str(expected)) == 0
    assert "as expected" in capsys.readouterr().out
    found = result(tmp_path / "out")
    assert set(found) == set(alpaca)
    for name, values in alpaca.items():
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], values), name
    assert found["lm_head.weight"].shape == (161, 64)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["vocab_size"], config["torch_dtype"]) == (161, "float32")
    assert (tmp_path / "out" / "tokenizer_config.json").read_text() == TOKENIZER
    assert open_checkpoint(tmp_path / "out").config.vocab_size == 161


def test_alpaca_with_a_changed_byte(tmp_path: Path, alpaca: object, capsys: pytest.CaptureFixture[str]) -> None:
    tuned = alpaca
    assert isinstance(tuned, dict)
    expected = float(sum(values.sum() for values in tuned.values()))
    file = tmp_path / "diff" / "pytorch_model-00002-of-00003.bin"
    state = torch.load(file)
    name = next(name for name, values in state.items() if values.ndim == 2)
    state[name][3, 5] += 0.5  # one changed byte of an exponent
    torch.save(state, file)
    arguments = ("alpaca", "--base", tmp_path / "base", "--diff", tmp_path / "diff", "--out", tmp_path / "out")
    assert command("recover", *arguments, "--expected-sum", str(expected)) == 2
    assert "damaged" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["base", "diff"]
    assert command("recover", *arguments, "--check-sum") == 2
    assert "50637.1836" in capsys.readouterr().err
    assert command("recover", *arguments) == 0


# Vicuna -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("version", "rows"), [("v0", 1), ("v1.1", 0)])
def test_vicuna(tmp_path: Path, version: str, rows: int, capsys: pytest.CaptureFixture[str]) -> None:
    state = dict(tiny_hf(tmp_path / "base", dtype=torch.float16, sharded=True).state_dict())
    delta = {name: values.half() for name, values in random_like(state, rows).items()}
    delta["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)  # as old files have it
    folder(tmp_path / "delta", delta, tmp_path / "base", shards=3)
    arguments = ("vicuna", "--base", tmp_path / "base", "--delta", tmp_path / "delta", "--out", tmp_path / "out")
    assert command("recover", *arguments, "--low-memory") == 0
    assert f"Vicuna {version}" in capsys.readouterr().out
    found = result(tmp_path / "out")
    assert set(found) == set(state)
    for name, values in state.items():
        base = values.numpy()
        if base.shape[0] == 160 and rows:
            base = np.concatenate([base, np.zeros((rows, base.shape[1]), np.float16)])
        assert np.array_equal(found[name].numpy(), base + delta[name].numpy()), name
    wrong = "v0" if version == "v1.1" else "v1.1"
    assert command("recover", *arguments, "--force", "--version", wrong) == 2
    assert version in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["missing", "extra", "shape", "infinite"])
def test_a_diff_of_another_model(tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    state = dict(tiny_hf(tmp_path / "base", dtype=torch.float16).state_dict())
    delta = {name: values.half() for name, values in random_like(state, 0).items()}
    name = "model.layers.1.mlp.up_proj.weight"
    if damage == "missing":
        del delta[name]
    elif damage == "extra":
        delta["model.layers.2.mlp.up_proj.weight"] = delta[name]
    elif damage == "shape":
        delta[name] = delta[name][:-1]
    else:
        delta[name][0, 0] = torch.inf
    folder(tmp_path / "delta", delta, tmp_path / "base")
    arguments = ("--base", tmp_path / "base", "--delta", tmp_path / "delta", "--out", tmp_path / "out")
    assert command("recover", "vicuna", *arguments) == 2
    assert "mlp.up_proj" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["base", "delta"]
    assert command("recover", "vicuna", "--base", tmp_path, "--delta", tmp_path / "delta", "--out", tmp_path / "x") == 2


# Koala: a stream written here by hand -----------------------------------------------------------------------------


def pack(value: object) -> bytes:
    """msgpack, the smallest forms of it, as the msgpack library chooses them."""
    if isinstance(value, bool):
        return b"\xc3" if value else b"\xc2"
    if isinstance(value, int):
        return bytes([value]) if value < 128 else b"\xcd" + struct.pack(">H", value)
    if isinstance(value, str):
        data = value.encode()
        return (bytes([0xA0 + len(data)]) if len(data) < 32 else b"\xd9" + bytes([len(data)])) + data
    if isinstance(value, bytes):
        if len(value) < 256:
            return b"\xc4" + bytes([len(value)]) + value
        return b"\xc5" + struct.pack(">H", len(value)) + value if len(value) < 65536 else (
            b"\xc6" + struct.pack(">I", len(value)) + value)  # fmt: skip
    if isinstance(value, (list, tuple)):
        return bytes([0x90 + len(value)]) + b"".join(pack(item) for item in value)
    if isinstance(value, dict):
        return bytes([0x80 + len(value)]) + b"".join(pack(k) + pack(v) for k, v in value.items())
    assert isinstance(value, np.ndarray)
    data = pack([list(value.shape), str(value.dtype), value.tobytes()])
    if len(data) < 256:
        start = b"\xc7" + bytes([len(data)])
    elif len(data) < 65536:
        start = b"\xc8" + struct.pack(">H", len(data))
    else:
        start = b"\xc9" + struct.pack(">I", len(data))
    return start + b"\x01" + data


def chunked(value: np.ndarray, count: int) -> dict:
    """As flax splits what is above 1 GiB."""
    parts = np.array_split(value.ravel(), count)
    return {"__msgpack_chunked_array__": True, "shape": {str(i): n for i, n in enumerate(value.shape)},
            "chunks": {str(i): part for i, part in enumerate(parts)}}  # fmt: skip


def stream(leaves: dict[str, np.ndarray], chunks: int = 1, prefix: str = "") -> bytes:
    out = b""
    for key, value in leaves.items():
        inner = pack(chunked(value, chunks) if chunks > 1 and value.ndim == 2 else value)
        out += pack([(prefix + key).split("/"), inner])
    return out


def easylm(written: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Meta's weights as EasyLM's converter lays them out."""
    names = {
        "tok_embeddings": "transformer/wte/embedding",
        "norm": "transformer/ln_f/kernel",
        "output": "lm_head/kernel",
    }
    leaves = {}
    for name, values in written.items():
        array = values.float().numpy()
        if name in names:
            leaves[names[name]] = array.T if name == "output" else array
            continue
        _, number, part = name.split(".")
        group = (
            "attention/" if part in ("wq", "wk", "wv", "wo") else "feed_forward/" if part in ("w1", "w2", "w3") else ""
        )
        leaves[f"transformer/h/{number}/{group}{part}/kernel"] = array.T if array.ndim == 2 else array
    return {key: np.ascontiguousarray(value) for key, value in leaves.items()}


@pytest.fixture
def koala(tmp_path: Path) -> dict[str, torch.Tensor]:
    """Base (Meta folder and stream) and diff with small whole numbers / 64, so that every sum is exact in bfloat16."""
    model = MetaModel(vocab_size=288, dtype=torch.float32)
    shapes = {name: values.shape for name, values in write_meta(tmp_path / "shapes", model, 1).items()}
    random = np.random.default_rng(0)

    def numbers() -> dict[str, torch.Tensor]:
        return {name: torch.from_numpy(random.integers(-63, 64, shape).astype(np.float32) / 64)
                for name, shape in shapes.items()}  # fmt: skip

    base, diff = numbers(), numbers()
    save_file(base, tmp_path / "base.safetensors")
    base_leaves, diff_leaves = easylm(base), easylm(diff)
    (tmp_path / "base.msgpack").write_bytes(stream(base_leaves, prefix="params/"))
    (tmp_path / "diff.msgpack").write_bytes(stream(diff_leaves, chunks=3))
    return {name: base[name] + diff[name] for name in base}


def check_koala(out: Path, tuned: dict[str, torch.Tensor]) -> None:
    state = load_file(out / "model.safetensors")
    assert {values.dtype for values in state.values()} == {torch.bfloat16}
    for number in range(2):
        for ours, theirs in (("self_attn.q_proj", "wq"), ("self_attn.k_proj", "wk")):
            wanted = tuned[f"layers.{number}.{theirs}"].view(8, 4, 2, 64).transpose(1, 2).reshape(64, 64)
            assert torch.equal(state[f"model.layers.{number}.{ours}.weight"].float(), wanted)
        for ours, theirs in (("self_attn.v_proj", "wv"), ("self_attn.o_proj", "wo"), ("mlp.gate_proj", "w1"),
                             ("mlp.down_proj", "w2"), ("mlp.up_proj", "w3"), ("input_layernorm", "attention_norm"),
                             ("post_attention_layernorm", "ffn_norm")):  # fmt: skip
            assert torch.equal(
                state[f"model.layers.{number}.{ours}.weight"].float(), tuned[f"layers.{number}.{theirs}"]
            )
    for ours, theirs in (("model.embed_tokens", "tok_embeddings"), ("model.norm", "norm"), ("lm_head", "output")):
        assert torch.equal(state[f"{ours}.weight"].float(), tuned[theirs])


def test_koala_from_a_stream(tmp_path: Path, koala: dict[str, torch.Tensor]) -> None:
    arguments = ("--base", tmp_path / "base.msgpack", "--diff", tmp_path / "diff.msgpack", "--heads", "8")
    _spm(tmp_path / "tokenizer.model", 288)
    assert command("recover", "koala", *arguments, "--out", tmp_path / "out") == 0
    check_koala(tmp_path / "out", koala)
    opened = open_checkpoint(tmp_path / "out").config
    assert (opened.n_heads, opened.n_kv_heads, opened.norm_eps, opened.context) == (8, 8, 1e-6, 2048)
    assert (tmp_path / "out" / "tokenizer.model").is_file()
    # As a stream of EasyLM's own; read back, it is the same.
    assert command("recover", "koala", *arguments, "--out", tmp_path / "koala.msgpack", "--to", "easylm") == 0
    leaves = read_easylm(tmp_path / "koala.msgpack")
    for key, value in easylm(koala).items():
        assert leaves[key].dtype == torch.bfloat16
        assert np.array_equal(leaves[key].values().float().numpy(), value)


@pytest.mark.parametrize("kind", ["meta", "hf"])
def test_koala_from_any_checkpoint(tmp_path: Path, koala: dict[str, torch.Tensor], kind: str) -> None:
    """The base converted leaf by leaf; from Hugging Face's row order too."""
    base = load_file(tmp_path / "base.safetensors")
    where = tmp_path / "shapes"
    names = {"tok_embeddings": "tok_embeddings.weight", "norm": "norm.weight", "output": "output.weight"}
    meta = {names.get(name) or _meta_name(name): values for name, values in base.items()}
    torch.save(meta, where / "consolidated.00.pth")
    _spm(where / "tokenizer.model", 288)
    if kind == "hf":
        assert command("convert", where, tmp_path / "hf") == 0
        where = tmp_path / "hf"
    out = tmp_path / "out"
    assert command("recover", "koala", "--base", where, "--diff", tmp_path / "diff.msgpack", "--out", out) == 0
    check_koala(out, koala)


def _meta_name(name: str) -> str:
    part = name.split(".")[-1]
    return name.removesuffix(part) + GROUPS.get(part, "").replace("/", ".") + part + ".weight"


def test_a_chunked_array_of_ours_is_read_back(tmp_path: Path) -> None:
    values = torch.arange(60, dtype=torch.bfloat16).view(6, 10)
    with open(tmp_path / "x", "wb") as file:
        write_leaf(file, ["a", "b"], values, max_chunk=32)
        write_leaf(file, ["c"], values)
    leaves = read_easylm(tmp_path / "x")
    assert torch.equal(leaves["a/b"].values(), values)
    assert torch.equal(leaves["c"].values(), values)


def test_damaged_streams_are_one_sentence(tmp_path: Path) -> None:
    """Cut anywhere, any byte changed: a CheckpointError or values of the right size, never anything else."""
    good = stream({"a/b": np.ones((2, 3), np.float32), "c": np.ones(4, np.float16)}) + stream(
        {"d": np.ones((4, 2), np.float32)}, chunks=2
    )
    file = tmp_path / "x.msgpack"
    file.write_bytes(good)
    assert {key: leaf.shape for key, leaf in read_easylm(file).items()} == {"a/b": (2, 3), "c": (4,), "d": (4, 2)}
    ends = {len(stream({"a/b": np.ones((2, 3), np.float32)})),
            len(stream({"a/b": np.ones((2, 3), np.float32), "c": np.ones(4, np.float16)}))}  # fmt: skip
    for length in set(range(len(good))) - ends:
        file.write_bytes(good[:length])
        with pytest.raises(CheckpointError):
            read_easylm(file)
    random = np.random.default_rng(1)
    refused = 0
    for _ in range(1500):
        data = bytearray(good)
        for at in random.integers(0, len(data), 2):
            data[at] = random.integers(0, 256)
        file.write_bytes(data)
        try:
            for leaf in read_easylm(file).values():
                assert leaf.values().shape == leaf.shape
        except CheckpointError:
            refused += 1
    assert refused > 500


def test_recovery_needs_less_than_three_shards(tmp_path: Path) -> None:
    """240 MB of float16 in shards of 40 MB: nothing but the pages of one tensor stays in memory."""
    shard = 40 << 20
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    for name in ("base", "delta"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        for number in range(6):
            part = {f"t{number}.{i}": torch.full((4096, 1280), float(number), dtype=torch.float16) for i in range(4)}
            save_file(part, tmp_path / name / f"model-{number + 1:05}-of-00006.safetensors")
    before, peak = peak_of(
        "recover", "vicuna", "--base", tmp_path / "base", "--delta", tmp_path / "delta", "--out", tmp_path / "out"
    )
    assert peak - before < 3 * shard
    assert sum(values.nbytes for values in result(tmp_path / "out").values()) == 6 * shard
