"""Meta's checkpoints: shards joined bit for bit, and how little opening and loading them takes."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from backend.checkpoint.meta import MetaCheckpoint, meta_config
from backend.errors import CheckpointError
from backend.weights.stored import Joined, copy_values
from tests.metafiles import MetaModel, shard, write_meta

ROOT = Path(__file__).resolve().parent.parent
LLAMA3 = MetaModel(
    n_kv_heads=2, vocab_size=512, dtype=torch.bfloat16, embeddings_by_rows=True, rope_freqs=False,
    params={"rope_theta": 500000.0, "use_scaled_rope": True, "vocab_size": 512},
)  # fmt: skip


def merged(checkpoint: MetaCheckpoint) -> dict[str, torch.Tensor]:
    values = {}
    for name, info in checkpoint.tensors.items():
        stored = checkpoint.read(name)
        assert stored.shape == info.shape
        values[name] = torch.empty(stored.shape, dtype=stored.dtype)
        copy_values(stored, values[name])
        stored.release()
    return values


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name


# shards -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize(
    "model",
    [
        MetaModel(),
        MetaModel(rope_freqs=False, n_kv_heads=4, dtype=torch.float32),
        MetaModel(n_kv_heads=8, n_heads=16, ffn_dim=256),  # MP=8: one key and value head a shard, as the 70B
        MetaModel(n_kv_heads=1, tied=True),
        LLAMA3,
    ],
    ids=["v1", "no-freqs-f32", "grouped", "one-kv-head-tied", "llama3"],
)
def test_merged_tensors_are_bit_equal(tmp_path: Path, model: MetaModel, ranks: int) -> None:
    expected = write_meta(tmp_path, model, ranks)
    checkpoint = MetaCheckpoint(tmp_path)
    assert_same(merged(checkpoint), expected)
    assert checkpoint.format == f"Meta, {ranks} shard{'s' * (ranks > 1)}"
    assert [file.name for file in checkpoint.files] == [f"consolidated.{n:02}.pth" for n in range(ranks)]
    config = checkpoint.config
    assert (config.vocab_size, config.ffn_dim, config.tied_output) == (model.vocab_size, model.ffn_dim, model.tied)
    assert (config.n_kv_heads, config.head_dim, config.rope_interleaved) == (model.n_kv_heads, model.head_dim, True)
    assert config.parameters() == sum(value.numel() for value in expected.values())
    assert (checkpoint.tokenizer.kind, checkpoint.tokenizer.path) == ("folder", tmp_path)


def test_rows_are_decoded_across_shards(tmp_path: Path) -> None:
    expected = write_meta(tmp_path, MetaModel(), 4)
    checkpoint = MetaCheckpoint(tmp_path)
    for name in ("layers.1.w1", "layers.1.w2", "tok_embeddings"):
        stored = checkpoint.read(name)
        assert isinstance(stored, Joined)
        assert torch.equal(stored.float32(13, 61), expected[name][13:61].float())


def test_the_embedding_is_joined_by_its_shape_alone(tmp_path: Path) -> None:
    """The same numbers cut both ways, with the same params.json."""
    model = MetaModel(vocab_size=64)  # a square table
    by_columns = write_meta(tmp_path / "columns", model, 2)
    by_rows = write_meta(tmp_path / "rows", replace(model, embeddings_by_rows=True), 2)
    assert torch.equal(by_columns["tok_embeddings"], by_rows["tok_embeddings"])
    for folder in ("columns", "rows"):
        assert_same(merged(MetaCheckpoint(tmp_path / folder)), by_rows)


def test_sixteen_shards_with_the_heads_written_twice(tmp_path: Path) -> None:
    """The 405B in 16 files: 8 heads in truth, 16 in its own params.json, and both readings give a right model."""
    model = MetaModel(n_heads=16, n_kv_heads=8, ffn_dim=256)
    expected = write_meta(tmp_path / "said", model, 16)
    assert_same(merged(MetaCheckpoint(tmp_path / "said")), expected)
    write_meta(tmp_path / "unsaid", replace(model, params={"n_kv_heads": 16}), 16)
    doubled = merged(MetaCheckpoint(tmp_path / "unsaid"))["layers.0.wk"].view(8, 2, 4, 64)
    assert torch.equal(doubled[:, 0], doubled[:, 1])
    assert torch.equal(doubled[:, 0].reshape(32, 64), expected["layers.0.wk"])


def test_copies_of_a_head_that_differ_are_an_error(tmp_path: Path) -> None:
    model = MetaModel(n_kv_heads=2)
    values = model.values()
    write_meta(tmp_path, model, 4)
    own = shard(model, values, 3, 4)
    own["layers.1.attention.wv.weight"][0, 0] += 1
    torch.save(own, tmp_path / "consolidated.03.pth")
    checkpoint = MetaCheckpoint(tmp_path)
    checkpoint.read("layers.1.wk")
    with pytest.raises(CheckpointError, match=r"03\.pth: tensor 'layers\.1\.attention\.wv\.weight' differs .*02\.pth"):
        checkpoint.read("layers.1.wv")


def test_a_file_of_the_folder_opens_the_folder(tmp_path: Path) -> None:
    expected = write_meta(tmp_path, MetaModel(), 2)
    for name in ("consolidated.00.pth", "consolidated.01.pth", "params.json"):
        checkpoint = MetaCheckpoint(tmp_path / name)
        assert checkpoint.path == tmp_path / name
        assert_same(merged(checkpoint), expected)


def test_weights_nested_under_a_name_are_found(tmp_path: Path) -> None:
    model = MetaModel()
    expected = write_meta(tmp_path, model)
    torch.save({"model": model.values(), "step": 7}, tmp_path / "consolidated.00.pth")
    assert_same(merged(MetaCheckpoint(tmp_path)), expected)


def test_views_of_one_storage_are_joined(tmp_path: Path) -> None:
    """Shards saved without cloning: each tensor is a view, by columns even a strided one, of the whole storage."""
    model = MetaModel()
    expected = write_meta(tmp_path, model, 2)
    values = model.values()
    for rank in range(2):
        own = shard(model, values, rank, 2)
        for name in [name for name in own if name.endswith(("wo.weight", "w2.weight"))]:
            own[name] = values[name].chunk(2, dim=1)[rank]
            assert not own[name].is_contiguous()
        torch.save(own, tmp_path / f"consolidated.{rank:02}.pth")
    assert_same(merged(MetaCheckpoint(tmp_path)), expected)


# what can be wrong ------------------------------------------------------------------------------------------------


def refused(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        MetaCheckpoint(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write_meta(tmp_path, MetaModel(), 4)
    (tmp_path / "consolidated.01.pth").unlink()
    assert "consolidated.01.pth missing" in refused(tmp_path)


def test_a_missing_last_shard_shows_in_the_shapes(tmp_path: Path) -> None:
    write_meta(tmp_path, MetaModel(), 4)
    (tmp_path / "consolidated.03.pth").unlink()
    assert "has shape" in refused(tmp_path)


def test_no_shard_and_no_params(tmp_path: Path) -> None:
    write_meta(tmp_path, MetaModel(), 1)
    (tmp_path / "consolidated.00.pth").rename(tmp_path / "model.pth")
    assert "no file consolidated.00.pth" in refused(tmp_path)
    assert "no file consolidated.00.pth" in refused(tmp_path / "model.pth")
    (tmp_path / "params.json").unlink()
    assert "params.json: there is no such file" in refused(tmp_path)
    assert "there is no such file" in refused(tmp_path / "nowhere")


def change(folder: Path, rank: int, ranks: int, edit: Any) -> str:
    model = MetaModel()
    write_meta(folder, model, ranks)
    own = shard(model, model.values(), rank, ranks)
    edit(own)
    torch.save(own, folder / f"consolidated.{rank:02}.pth")
    return refused(folder)


WQ = "layers.1.attention.wq.weight"


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda own: own.pop(WQ), f"01.pth: has no tensor '{WQ}', but consolidated.00.pth has it"),
        (lambda own: own.update({WQ: own[WQ][:1].clone()}), "float16 of shape (1, 64), but in consolidated.00.pth"),
        (lambda own: own.update({WQ: own[WQ].float()}), "float32 of shape (32, 64), but in consolidated.00.pth"),
        (lambda own: own.update({WQ: own[WQ].to(torch.int8)}), "stored as int8"),
        (lambda own: own.update({WQ: own[WQ].flatten()}), "shape (2048,), but in consolidated.00.pth"),
        (lambda own: own.update({"layers.2.ffn_norm.weight": torch.ones(64).half()}), "there are 2 layers"),
        (lambda own: own.update({"layers.1.attention.wq.scales": torch.ones(64)}), "is no part of a LLaMA"),
        (lambda own: own.update({"layers.01.ffn_norm.weight": torch.ones(64).half()}), "is no part of a LLaMA"),
        (lambda own: own.update({"vision_model.x": torch.ones(64)}), "'vision_model.x' is no part of a LLaMA"),
    ],
)  # fmt: skip
def test_shards_that_disagree(tmp_path: Path, edit: Any, words: str) -> None:
    message = change(tmp_path, 1, 2, edit)
    assert words in message
    assert "consolidated.01.pth" in message


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda own: own.pop("norm.weight"), "tensor 'norm.weight' is missing"),
        (lambda own: own.pop("tok_embeddings.weight"), "tensor 'tok_embeddings.weight' is missing"),
        (lambda own: own.pop(WQ), f"tensor '{WQ}' is missing"),
        (lambda own: own.update({WQ: own[WQ][:32].clone()}), "shape (32, 64), expected (64, 64)"),
        (lambda own: own.update({"norm.weight": torch.ones(()).half()}), "shape (), expected 1 sizes"),
        (lambda own: own.update({"norm.weight": torch.ones(0).half()}), "shape (0,), expected 1 sizes"),
        (lambda own: own.update({"output.weight": torch.ones(300, 64).half()}), "(300, 64), expected (320, 64)"),
    ],
)  # fmt: skip
def test_one_shard_with_wrong_tensors(tmp_path: Path, edit: Any, words: str) -> None:
    assert words in change(tmp_path, 0, 1, edit)


def test_the_shape_of_w1_wins_over_the_formula(tmp_path: Path) -> None:
    write_meta(tmp_path, MetaModel(multiple_of=256), 2)
    assert meta_config(tmp_path).ffn_dim == 256
    assert MetaCheckpoint(tmp_path).config.ffn_dim == 192


# what opening and loading cost ------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="reads Linux's account of this process")
def test_opening_a_folder_like_the_70b_reads_headers_only(tmp_path: Path) -> None:
    """80 layers in 8 shards, 2 GB of holes: no page of the mapped files is touched, and few bytes are read."""
    model = MetaModel(dim=1024, n_layers=80, n_heads=64, n_kv_heads=8, ffn_dim=3584, vocab_size=32000, rope_freqs=False)
    (tmp_path / "params.json").write_text(json.dumps(model.written_params()))
    with torch.serialization.skip_data():
        for rank in range(8):
            own = {}
            for name, shape in model.shapes().items():
                whole = torch.empty(shape, dtype=torch.bfloat16, device="meta")
                part = shard(model, {name: whole}, rank, 8)[name]
                own[name] = torch.empty(part.shape, dtype=torch.bfloat16)  # never touched
            torch.save(own, tmp_path / f"consolidated.{rank:02}.pth")
    files = sorted(tmp_path.glob("*.pth"))
    assert sum(file.stat().st_size for file in files) > 1.9e9

    before = read_so_far()
    checkpoint = MetaCheckpoint(tmp_path)
    assert read_so_far() - before < 8 * 1.5e6
    assert len(checkpoint.tensors) == 723
    for name in checkpoint.tensors:
        checkpoint.read(name)
    assert resident(tmp_path) == 0
    checkpoint.read("layers.40.w2").float32(0, 1)
    assert 0 < resident(tmp_path) < 1 << 20


def read_so_far() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


def resident(folder: Path) -> int:
    """Bytes of files in `folder` that are mapped into memory and present."""
    total, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if not line.split()[0].endswith(":"):
            ours = str(folder) in line
        elif ours and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


PEAK = """
import sys, torch
from pathlib import Path
from backend.checkpoint.meta import MetaCheckpoint
from backend.weights.stored import copy_values

def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

Path("/proc/self/clear_refs").write_text("5")
baseline = status("VmRSS")
checkpoint = MetaCheckpoint(Path(sys.argv[1]))
final, held = 0, {}
for name in checkpoint.tensors:
    stored = checkpoint.read(name)
    held[name] = torch.empty(stored.shape, dtype=stored.dtype)
    copy_values(stored, held[name])
    stored.release()
    final += held[name].nbytes
print(final, max(value.nbytes for value in held.values()), status("VmHWM") - baseline)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's account of this process")
def test_loading_two_shards_holds_one_copy(tmp_path: Path) -> None:
    """Peak memory of loading MP=2 is under the final size + the largest tensor + 15%."""
    model = MetaModel(dim=1024, n_layers=8, n_heads=16, n_kv_heads=16, ffn_dim=2816, vocab_size=8192, rope_freqs=False)
    (tmp_path / "params.json").write_text(json.dumps(model.written_params()))
    for rank in range(2):
        own = {}
        for name, shape in model.shapes().items():
            part = shard(model, {name: torch.empty(shape, device="meta")}, rank, 2)[name]
            own[name] = torch.full(part.shape, rank + 1.0, dtype=torch.bfloat16)
        torch.save(own, tmp_path / f"consolidated.{rank:02}.pth")
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    final, largest, peak = (int(word) for word in done.stdout.split())
    assert final == sum(torch.Size(shape).numel() * 2 for shape in model.shapes().values()) > 200e6
    assert peak < 1.15 * final + largest
