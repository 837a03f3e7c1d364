"""Products of packed weights in compiled code, against the gguf package's decoding and float64."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from backend.checkpoint.open import open_checkpoint
from backend.kernels.cpu import build
from backend.kernels.cpu.products import product, product_in_rows, retile, tiles_library, values, with_types
from backend.placement.load import load_model
from backend.weights.blocks import IQ4_NL, IQ4_XS, Q2_K, Q4_0, Q4_K, Q5_0, Q6_K, Q8_0, BlockFormat
from backend.weights.decode import dequantize
from backend.weights.linear import BlockEmbedding
from backend.weights.tiled import TiledEmbedding, TiledLinear, blocks_of_tiles, multiplies_rightly, tiles_of_blocks
from backend.weights.tiles import FIELDS, is_tiled, tiled_bytes

FORMATS = tuple(FIELDS)
EVERY = pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
SCALES = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}  # where the float16 are
LIBRARY = tiles_library()
needs_compiler = pytest.mark.skipif(LIBRARY is None, reason="not run: there is no C compiler here")
pytestmark = needs_compiler


def blocks(fmt: BlockFormat, rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Any codes with scales of ordinary size, of either sign, some of them below the normal numbers of float16."""
    random = np.random.default_rng(seed)
    raw = random.integers(0, 256, (rows, columns // fmt.elements, fmt.bytes), dtype=np.uint8)
    for at in SCALES.get(fmt.name, (0,)):
        scale = (random.normal(size=raw.shape[:2]) * 0.01).astype(np.float16)
        scale[:, ::7] = np.float16(3e-6)
        raw[..., at : at + 2] = scale[..., None].view(np.uint8)
    return torch.from_numpy(raw.reshape(rows, -1))


def by_gguf(raw: torch.Tensor, fmt: BlockFormat) -> np.ndarray:
    assert fmt.ggml_id is not None
    return np.asarray(gguf.quants.dequantize(raw.numpy(), gguf.GGMLQuantizationType(fmt.ggml_id)), np.float32)


def linear(raws: Sequence[torch.Tensor], fmt: BlockFormat, exact: bool = False) -> TiledLinear:
    made = TiledLinear.of_blocks(raws, fmt)
    assert made is not None
    return TiledLinear(made.tiles, fmt, made.out_features, made.in_features, exact)


def steps_of(fmt: BlockFormat) -> int:
    """How many steps of activations there are to the largest of a group."""
    return 127 << {4: 4, 5: 3, 6: 2, 8: 7}[8 if fmt in (IQ4_NL, IQ4_XS) else int(fmt.name[1])]


def rounded(x: torch.Tensor, fmt: BlockFormat) -> np.ndarray:
    """Activations as the products of few tokens see them, float64: whole multiples of a part of the largest of 32."""
    most = steps_of(fmt)
    groups = x.numpy().reshape(x.shape[0], -1, 32)
    largest = np.abs(groups).max(-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        codes = np.rint(groups * (np.float32(most) / largest))
    codes[np.broadcast_to(largest < 1e-30, codes.shape)] = 0
    return (codes.astype(np.float64) * (largest.astype(np.float64) / most)).reshape(x.shape)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# layout -----------------------------------------------------------------------------------------------------------


@EVERY
def test_tiles_are_the_files_bytes_in_the_order_of_the_table(fmt: BlockFormat) -> None:
    raw = blocks(fmt, 48, 768)
    assert LIBRARY is not None
    tiles = retile(LIBRARY, [raw], fmt)
    assert tiles.nbytes == tiled_bytes(fmt, 48, 768) == raw.nbytes
    assert torch.equal(tiles, tiles_of_blocks(raw, fmt))
    assert torch.equal(blocks_of_tiles(tiles, fmt, raw.shape[1]), raw)


def test_a_fifth_bit_is_where_the_comment_says() -> None:
    raw = torch.zeros(16, 22, dtype=torch.uint8)
    raw[3, 2 + 13 // 8] = 1 << 13 % 8  # column 13 = 4 * 3 + 1 of row 3
    word = tiles_of_blocks(raw, Q5_0)[32 + 4 * 3 : 32 + 4 * 4].tolist()
    assert word == [0, 1 << 3, 0, 0]


@EVERY
@pytest.mark.parametrize("rows", [1, 16, 37])
def test_values_are_those_of_the_gguf_package_to_the_bit(fmt: BlockFormat, rows: int) -> None:
    raw = blocks(fmt, rows, 512)
    made = linear([raw], fmt)
    assert np.array_equal(made.decoded().numpy(), by_gguf(raw, fmt))
    assert torch.equal(made.twin(), dequantize(raw, fmt))
    assert made.nbytes() == tiled_bytes(fmt, rows, 512)


def test_where_there_are_no_tiles() -> None:
    raw = blocks(Q4_0, 40, 64)
    assert TiledLinear.of_blocks([raw, raw], Q4_0) is None, "a tile that is not full, with another matrix after it"
    assert TiledLinear.of_blocks([raw[::2]], Q4_0) is None, "rows that are not side by side"
    assert not is_tiled(Q2_K)
    assert TiledLinear.of_blocks([torch.zeros(16, 84, dtype=torch.uint8)], Q2_K) is None
    assert LIBRARY is not None
    with pytest.raises(ValueError, match="40 rows"):
        retile(LIBRARY, [raw, blocks(Q4_0, 16, 64)], Q4_0)


# products ---------------------------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize(
    ("rows", "columns", "tokens"), [(48, 512, 1), (37, 768, 3), (16, 256, 7), (20, 512, 16), (16, 256, 29)]
)
def test_products_of_few_tokens_are_exact_but_for_the_rounding_of_activations(
    fmt: BlockFormat, rows: int, columns: int, tokens: int
) -> None:
    raw = blocks(fmt, rows, columns)
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(1))
    found = linear([raw], fmt)(x).double().numpy()
    weight = by_gguf(raw, fmt).astype(np.float64)
    assert found.shape == (tokens, rows)
    # What is left are roundings of float32 sums, of codes and minima that may be larger than what they come to.
    reach = np.abs(x.double().numpy()).sum(1, keepdims=True) * np.abs(weight).max()
    assert (np.abs(found - rounded(x, fmt) @ weight.T) / reach).max() < 1e-6
    # And against activations as they are: half a step of each group at most, in practice far less.
    exact = x.double().numpy() @ weight.T
    half = np.abs(x.numpy()).reshape(tokens, -1, 32).max(-1) / (2 * steps_of(fmt))
    bound = half @ np.abs(weight).reshape(rows, -1, 32).sum(-1).T
    assert (np.abs(found - exact) <= bound + 1e-6 * reach).all()
    assert np.sqrt(np.mean((found - exact) ** 2)) < 1.3 / steps_of(fmt) * exact.std()


@EVERY
@pytest.mark.parametrize(
    ("rows", "columns", "tokens"), [(16, 256, 33), (37, 768, 70), (300, 512, 49), (33, 1280, 64), (9, 2048, 40)]
)
def test_products_of_many_tokens_are_those_of_bfloat16(fmt: BlockFormat, rows: int, columns: int, tokens: int) -> None:
    raw = blocks(fmt, rows, columns)
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(1))
    found = linear([raw], fmt)(x).double().numpy()
    weight = by_gguf(raw, fmt)
    reach = np.abs(x.double().numpy()).sum(1, keepdims=True) * np.abs(weight).max()
    assert LIBRARY is not None
    if LIBRARY.suri_matrix():
        expected = x.bfloat16().double() @ torch.from_numpy(weight).bfloat16().double().T
        # A value in the middle between two of bfloat16 may go either way: the last bit of float32 decides.
        assert (np.abs(found - expected.numpy()) / reach).max() < 1e-5
    else:
        assert (np.abs(found - rounded(x, fmt) @ weight.astype(np.float64).T) / reach).max() < 1e-6
    exact = x.double().numpy() @ weight.astype(np.float64).T
    assert np.sqrt(np.mean((found - exact) ** 2)) < 0.004 * exact.std()


@EVERY
def test_few_tokens_and_many_in_one_product(fmt: BlockFormat) -> None:
    """A step has both: each as if it came alone."""
    assert LIBRARY is not None
    raw, x = blocks(fmt, 53, 768), torch.randn(61, 768, generator=torch.Generator().manual_seed(1))
    own = linear([raw], fmt)
    together = product(LIBRARY, own.tiles, fmt, 53, 768, x, few=20)
    assert torch.equal(together[:20], torch.cat([own(row[None]) for row in x[:20]]))
    assert torch.equal(together[20:], own(x[20:]))


@pytest.mark.parametrize("columns", [32, 96, 352])
def test_any_number_of_blocks_of_32(columns: int) -> None:
    raw, x = blocks(Q8_0, 20, columns), torch.randn(2, columns)
    exact = rounded(x, Q8_0) @ by_gguf(raw, Q8_0).astype(np.float64).T
    np.testing.assert_allclose(linear([raw], Q8_0)(x).numpy(), exact, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("columns", [32, 64, 96, 352])
@pytest.mark.parametrize("fmt", [fmt for fmt in FORMATS if fmt.elements == 32], ids=lambda fmt: fmt.name)
def test_the_same_bits_for_any_number_of_blocks_of_32(fmt: BlockFormat, columns: int) -> None:
    """AMX takes two blocks in a turn, of which the last may be alone."""
    made = linear([blocks(fmt, 37, columns)], fmt)
    x = torch.randn(21, columns, generator=torch.Generator().manual_seed(3))
    alone = torch.cat([made(row[None]) for row in x])
    for tokens in (3, 4, 7, 8, 13, 16, 21):
        assert torch.equal(made(x[:tokens]), alone[:tokens])


@EVERY
def test_the_same_bits_for_any_number_of_tokens_and_threads(fmt: BlockFormat, threads: None) -> None:
    made = linear([blocks(fmt, 208, 512)], fmt)
    x = torch.randn(130, 512, generator=torch.Generator().manual_seed(2))
    torch.set_num_threads(1)
    alone, many = torch.cat([made(row[None]) for row in x[:9]]), made(x)
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        for tokens in (1, 2, 3, 4, 5, 8, 9, 16, 17, 32):
            assert torch.equal(made(x[:tokens])[:9], alone[:tokens])
        for tokens in (33, 48, 65, 130):
            assert torch.equal(made(x[:tokens]), many[:tokens])
    assert torch.equal(many[64:], made(x[64:]))


def test_matrices_one_above_the_other() -> None:
    raws = [blocks(Q4_K, rows, 512, seed=rows) for rows in (32, 16, 24)]
    x = torch.randn(4, 512)
    together = linear(raws, Q4_K)(x)
    assert torch.equal(together, torch.cat([linear([raw], Q4_K)(x) for raw in raws], dim=1))


def test_activations_of_any_kind() -> None:
    raw = blocks(Q6_K, 32, 512)
    made, weight = linear([raw], Q6_K), by_gguf(raw, Q6_K).astype(np.float64)
    assert not made(torch.zeros(3, 512)).any()
    assert made(torch.zeros(0, 512)).shape == (0, 32)
    huge = torch.randn(1, 512)
    huge[0, 100] = 1e30
    np.testing.assert_allclose(made(huge).numpy(), rounded(huge, Q6_K) @ weight.T, rtol=1e-5)
    tiny = torch.randn(1, 512) * 1e-39  # below the normal numbers
    assert not made(tiny).any()
    small = torch.randn(1, 512) * 1e-25
    np.testing.assert_allclose(made(small).numpy(), rounded(small, Q6_K) @ weight.T, rtol=1e-3, atol=1e-30)
    strided = torch.randn(512, 4).T
    assert torch.equal(made(strided), made(strided.contiguous()))


@EVERY
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_is_seen_in_its_token_and_in_no_other(fmt: BlockFormat, value: float) -> None:
    for tokens in (5, 40):
        made, x = linear([blocks(fmt, 16, 256)], fmt), torch.randn(tokens, 256)
        x[2, 77] = value
        found = made(x)
        assert not torch.isfinite(found[2]).any()
        assert torch.isfinite(found[[at for at in range(tokens) if at != 2]]).all()


def test_a_weight_that_is_no_number_is_seen() -> None:
    raw = blocks(Q4_0, 16, 64)
    raw[5, :2] = torch.tensor([float("nan")], dtype=torch.float16).view(torch.uint8)
    for tokens in (2, 33):
        found = linear([raw], Q4_0)(torch.randn(tokens, 64))
        assert found.isnan().nonzero()[:, 1].tolist() == [5] * tokens


def test_exact_activations() -> None:
    made = linear([blocks(Q4_0, 48, 256)], Q4_0)
    exact = linear([blocks(Q4_0, 48, 256)], Q4_0, True)
    x = torch.randn(20, 256)
    expected = (x.double() @ made.twin().double().T).float()
    torch.testing.assert_close(exact(x), expected, rtol=1e-5, atol=1e-5)
    assert not torch.equal(made(x), exact(x))


def test_the_same_weight_in_other_memory() -> None:
    made = linear([blocks(Q8_0, 48, 256)], Q8_0)
    other = made.with_tensors([tensor.clone() for tensor in made.tensors()])
    x = torch.randn(2, 256)
    assert torch.equal(other(x), made(x))
    assert other.tiles.data_ptr() != made.tiles.data_ptr()
    assert made.nbytes() == sum(tensor.nbytes for tensor in made.tensors())


# other processors ---------------------------------------------------------------------------------------------------

VARIANTS = {
    "AVX2": ("-O1", "-mno-avx512f", "-mno-avxvnni"),
    "AVX2 with AVX-VNNI": ("-O1", "-mno-avx512f", "-mavxvnni"),
    "plain C": ("-O1", "-DSURI_PORTABLE", "-fsanitize=undefined", "-fsanitize-undefined-trap-on-error"),
}


def processor_has(flag: str) -> bool:
    path = Path("/proc/cpuinfo")
    return path.is_file() and f" {flag} " in path.read_text().replace("\n", " ")


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> ctypes.CDLL:
    name = request.param
    if name != "plain C" and platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("not run: for x86 only")
    if name != "plain C" and not processor_has("avx_vnni" if "VNNI" in name else "avx2"):
        pytest.skip(f"not run: this processor has no {name}")
    compiler = build._compiler()
    assert compiler is not None
    made = with_types(ctypes.CDLL(str(build.compiled("product", compiler, build.cache_folder(), VARIANTS[name]))))
    assert made.suri_vectors().decode() == name
    return made


@EVERY
def test_code_for_other_processors(fmt: BlockFormat, variant: ctypes.CDLL) -> None:
    raw = blocks(fmt, 37, 512)
    # The largest codes there are, so that what is added up in 16 bits would overflow if it could.
    raw.view(37, -1, fmt.bytes)[:8, :, 4:16] = 255
    tiles, own = retile(variant, [raw], fmt), linear([raw], fmt)
    assert torch.equal(tiles, own.tiles)
    assert torch.equal(values(variant, tiles, fmt, 37, 512), own.decoded())
    x = torch.randn(19, 512, generator=torch.Generator().manual_seed(3))
    x[:2] = 1.0
    x[1, ::2] = -1.0
    for part in (x, x[:1], x[1:2]):
        expected = torch.cat([own(row[None]) for row in part])
        bound = 1e-5 * (part.abs() @ own.twin().abs().T) + 1e-4
        found = product(variant, tiles, fmt, 37, 512, part)
        assert ((found - expected).abs() <= bound).all()
        assert torch.equal(product_in_rows(variant, [raw], fmt, part), found)


def test_every_format_was_checked_on_first_use() -> None:
    assert all(multiplies_rightly(fmt) for fmt in FORMATS)


# the table of a tied model ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", FIELDS, ids=lambda fmt: fmt.name)
def test_rows_looked_up_in_tiles_are_those_of_the_file(fmt: BlockFormat) -> None:
    raw = torch.randint(0, 60, (43, 512 // fmt.elements * fmt.bytes), dtype=torch.uint8)
    product = TiledLinear.of_blocks([raw], fmt)
    assert product is not None
    table, wanted = TiledEmbedding(product), BlockEmbedding(raw, fmt)
    for ids in ([0], [42], [15, 16, 3, 3, 41], list(range(43)), [n * 7 % 43 for n in range(200)], []):
        looked_up = torch.tensor(ids, dtype=torch.int64)
        assert torch.equal(table(looked_up), wanted(looked_up))
    assert table.nbytes() == 0
    with pytest.raises(IndexError, match="ids are from 0 to 42"):
        table(torch.tensor([3, 43]))
    with pytest.raises(IndexError, match="ids are from 0 to 42"):
        table(torch.tensor([-1]))


def test_a_tied_model_has_one_table(tiny_path: Callable[..., Path]) -> None:
    path = tiny_path(weights="Q4_0", formats={"token_embd.weight": "Q8_0"})
    loaded = load_model(open_checkpoint(path), "original", "test")
    assert isinstance(loaded.model.embedding, TiledEmbedding)
    apart = load_model(open_checkpoint(tiny_path(weights="Q4_0", tied=False)), "original", "test")
    assert isinstance(apart.model.embedding, BlockEmbedding)
