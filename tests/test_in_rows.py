"""Products of weights where their file is mapped: the same bits as of weights that are kept, and pages given back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from backend.checkpoint.mapped import MappedFile
from backend.kernels.cpu.memory import bring
from backend.kernels.cpu.products import tiles_library
from backend.placement.linears import borrow, build
from backend.weights.blocks import Q4_0, Q6_K, Q8_0
from backend.weights.in_rows import RowsLinear, ViewsLinear
from backend.weights.stored import Blocks, Plain, Stored
from backend.weights.tiles import FIELDS

pytestmark = pytest.mark.skipif(tiles_library() is None, reason="not run: there is no C compiler")
HEIGHTS = (48, 5, 32)  # of stacked matrices; tiles have 16 rows


def random(*shape: int) -> torch.Tensor:
    return torch.randint(0, 60, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(len(shape)))


@pytest.mark.parametrize("fmt", FIELDS, ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("tokens", [1, 3, 4, 6, 19, 70])
def test_blocks_in_rows_give_the_bits_of_tiles(fmt, tokens: int) -> None:  # type: ignore[no-untyped-def]
    x = torch.randn(tokens, 1024, generator=torch.Generator().manual_seed(1))
    stacked = [Blocks(random(rows, fmt.row_bytes(1024)), fmt) for rows in HEIGHTS]
    borrowed = borrow(stacked, "original")
    assert isinstance(borrowed, RowsLinear)
    assert (borrowed.out_features, borrowed.in_features) == (85, 1024)
    kept = torch.cat([build([part], "original")(x) for part in stacked], dim=-1)
    assert torch.equal(borrowed(x), kept)
    expected = x.double() @ borrowed.twin().double().T
    assert (borrowed(x) - expected).abs().max() <= 0.01 * expected.abs().max()
    assert torch.equal(borrowed.with_tensors(borrowed.tensors())(x), kept)
    assert borrowed.nbytes() == sum(part.raw.nbytes for part in stacked)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 4, 5, 40])
def test_views_give_the_bits_of_kept_values(dtype: torch.dtype, tokens: int) -> None:
    x = torch.randn(tokens, 96, generator=torch.Generator().manual_seed(2))
    stacked: list[Stored] = [Plain(torch.randn(rows, 96).to(dtype)) for rows in HEIGHTS]
    borrowed, kept = borrow(stacked, "original"), build(stacked, "original")
    assert isinstance(borrowed, ViewsLinear)
    assert torch.equal(borrowed(x), kept(x))
    assert torch.equal(borrowed.twin(), kept.twin())
    assert borrowed.nbytes() == kept.nbytes()


def test_what_cannot_be_borrowed() -> None:
    plain, packed = Plain(torch.randn(16, 64)), Blocks(random(16, Q8_0.row_bytes(64)), Q8_0)
    assert borrow([plain], "original") is None  # float32: compiled code has no product of it
    assert borrow([plain], "bf16") is None  # of another type
    assert borrow([packed], "int4") is None
    assert borrow([packed, Blocks(random(16, Q4_0.row_bytes(64)), Q4_0)], "original") is None
    assert borrow([Plain(torch.randn(64, 16).bfloat16().T)], "original") is None


def test_pages_are_given_back_with_the_last_reference(tmp_path: Path) -> None:
    rows = 256
    (path := tmp_path / "weights").write_bytes(random(rows * Q6_K.row_bytes(4096)).numpy().tobytes())
    file = MappedFile(path)
    release = file.releaser(0, file.size)
    released: list[None] = []
    stored = Blocks(file.bytes.view(rows, -1), Q6_K, lambda: released.append(release()))
    before = mapped_kilobytes(path)
    linear = borrow([stored], "original")
    assert linear is not None
    assert mapped_kilobytes(path) - before >= file.size // 1024 - 8  # all of it is in memory before it is multiplied
    expected = linear(torch.ones(1, 4096))
    del linear
    assert released == [None]
    assert mapped_kilobytes(path) <= before + 8
    again = borrow([stored], "original")
    assert again is not None
    assert torch.equal(again(torch.ones(1, 4096)), expected)


def test_bringing_what_is_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    part = torch.arange(100_000)[17:]
    bring(part)
    monkeypatch.setattr("backend.kernels.cpu.memory._advise", lambda *about: -1)  # a system that does not know how
    bring(part)
    assert torch.equal(part, torch.arange(17, 100_000))


def mapped_kilobytes(path: Path) -> int:
    """Of a file that this process has mapped: what is in its memory."""
    smaps = Path("/proc/self/smaps")
    if not smaps.is_file():
        pytest.skip("not run: the system does not say what is in memory")
    found, counted = 0, False
    for line in smaps.read_text().splitlines():
        if "-" in line.split(" ")[0]:
            counted = line.endswith(str(path))
        elif counted and line.startswith("Rss:"):
            found += int(line.split()[1])
    return found
