"""On a machine with a CUDA device: kernels, decoder, graphs and placement against the CPU. Elsewhere: not run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from backend.cache.blocks import BlockRestore, BlockStore
from backend.cache.kv import KVPool
from backend.checkpoint.open import open_checkpoint
from backend.engine.runner import Runner
from backend.kernels.cuda.available import kernels
from backend.placement.load import load_model
from backend.placement.parts import Part
from benchmarks import gpu
from tests.test_gpu_paths import BLOCK, Batch, Lease, Sequence
from tests.tiny import TinyModel, write_tiny

ROOT = Path(__file__).resolve().parent.parent
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device: not run")
FORMS = ("bf16", "f16", "f32", "int8", "llm-int8", "int4", "nf4", "original")


@on_gpu
def test_the_kernels_work_on_this_device():
    assert kernels() is not None


@on_gpu
def test_every_kernel_agrees_with_torch_on_the_device():
    command = [sys.executable, "-m", "pytest", "tests/kernel_cases.py", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-4000:]


@on_gpu
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("streamed", [False, True])
def test_a_model_on_the_device_gives_the_logits_of_the_cpu(tmp_path, form, streamed):
    """Prefill of three prompts, then steps through the decoder and its graph; the CPU reads the device's tokens."""
    path = write_tiny(tmp_path / "m.gguf", TinyModel(weights="Q4_1" if form == "original" else "F32"))
    parts = (
        [Part(("layers.0.w1", "layers.0.w3"), 0, "streamed"), Part(("layers.1.w2",), 0, "streamed")] if streamed else []
    )
    loaded = load_model(open_checkpoint(path), form, "tiny", parts=parts, device="cuda")
    ours = Runner(loaded.model, KVPool(loaded.model.config, 16, BLOCK, torch.float16, "cuda"), graphs=not streamed)
    other = load_model(open_checkpoint(path), form, "tiny").model
    reference = Runner(other, KVPool(other.config, 16, BLOCK, torch.float32))
    batch = Batch([Sequence([9, 8, 7] * (8 * n + 10), Lease([5 * n, 5 * n + 1, 5 * n + 2])) for n in range(3)])
    for step in range(6):
        work = batch.work(step > 0)
        logits, expected = ours.run(work), reference.run(work)
        assert logits.device.type == "cpu"
        assert (logits - expected).abs().max() <= 0.05 * expected.abs().max()
        batch.advance(expected)
    assert ours._decoder is not None
    assert ours._decoder.graphs.captured == (0 if streamed else 1)
    loaded.close()


@on_gpu
def test_an_int8_cache_on_the_device_gives_nearly_the_logits_of_one_on_the_cpu(tmp_path):
    path = write_tiny(tmp_path / "m.gguf", TinyModel(weights="F32"))
    loaded = load_model(open_checkpoint(path), "f32", "tiny", device="cuda")
    ours = Runner(loaded.model, KVPool(loaded.model.config, 16, BLOCK, torch.int8, "cuda"))
    other = load_model(open_checkpoint(path), "f32", "tiny").model
    reference = Runner(other, KVPool(other.config, 16, BLOCK, torch.int8))
    batch = Batch([Sequence([9, 8, 7] * (8 * n + 10), Lease([5 * n, 5 * n + 1, 5 * n + 2])) for n in range(3)])
    for step in range(6):
        work = batch.work(step > 0)
        logits, expected = ours.run(work), reference.run(work)
        assert (logits - expected).abs().max() <= 0.05 * expected.abs().max()
        batch.advance(expected)
    assert ours._decoder is not None
    assert ours._decoder.graphs.captured == 1
    loaded.close()


@on_gpu
@pytest.mark.parametrize("kind", [torch.float16, torch.int8])
def test_blocks_leave_the_device_and_come_back(tmp_path, kind):
    """Through pinned memory, begun one after the other and waited for by nobody."""
    config = open_checkpoint(write_tiny(tmp_path / "m.gguf")).config
    pool = KVPool(config, 8, BLOCK, kind, "cuda", host_bytes=4 << 20)
    assert pool.host is not None
    assert pool.host.grow() >= 8
    for array in pool.arrays:
        array.copy_(torch.randint(-100, 100, array.shape))
    before = [[each.cpu() for each in pool.block(number)] for number in range(8)]
    assert pool.host.block(0)[0].is_pinned()
    pool.carry_out([BlockStore(number, number) for number in range(8)])
    for array in pool.arrays:
        array.zero_()
    pool.carry_out([BlockRestore(number, 7 - number) for number in range(8)])
    for number in range(8):
        for found, expected in zip(pool.block(7 - number), before[number], strict=True):
            assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("form", gpu.FORMS)
def test_the_random_models_of_the_benchmark_compute(form):
    """Their products are of ordinary size and say what their twins say; on any machine."""
    torch.manual_seed(0)
    x = torch.randn(3, 256)
    linear = gpu.random_linear(form, 64, 256, "cpu")
    expected = x @ linear.twin().T
    assert (linear(x) - expected).abs().max() <= 0.05 * expected.abs().max()
    assert 0.3 < expected.std() < 3


def test_without_a_gpu_the_benchmark_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.run() is None
    assert capsys.readouterr().out == "no CUDA device: not run\n"
