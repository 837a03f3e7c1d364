"""Bytes of everything a loaded model keeps, from headers alone: each weight in each form, norms, cache, workspace.

The formulas restate what `backend/weights` allocates; tests/test_load.py holds them equal to the byte.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

from backend.kernels.cpu.build import compiled_products
from backend.model.config import ModelConfig
from backend.placement.parts import EMBEDDING, OUTPUT, PRODUCTS, Product, Weight
from backend.weights.blocks import Q4_1, Q8_0, BlockFormat, StorageFormat
from backend.weights.tiles import is_tiled, tiled_bytes

VALUE_BYTES = {"f32": 4, "bf16": 2, "f16": 2}
_SCALE = 4  # bytes beside each int8 key and value of a head
# What weights become that are quantised while loading.
_INT8, _NF4 = StorageFormat("int8", int8=True), StorageFormat("NF4", codebook=64)
_INT4 = Q4_1
_ROW_TILE = 16  # rows the packed product takes at a time; the last tile is filled up


class StoredTensor(Protocol):
    """What the plan needs to know of a tensor in a file."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def format(self) -> StorageFormat: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def elements(self) -> int: ...
    @property
    def beside(self) -> int: ...


Tensors = Mapping[str, StoredTensor]


def products(weights: str, config: ModelConfig, tensors: Tensors, tiled: bool | None = None) -> tuple[Product, ...]:
    """Every product of the model in the order of a step, with the bytes it takes in this form.

    `tiled`: whether weights are for a CPU with compiled products, which take packed ones in tiles; None: if there are.
    """
    on_cpu = compiled_products()
    tiled = on_cpu if tiled is None else tiled

    def linear(name: str, source: str | None = None) -> Weight:
        info = tensors[source or name]
        size, form = linear_bytes(weights, name, info, tiled), form_of(weights, name, info, tiled)
        beside_gpu = linear_bytes(weights, name, info, on_cpu)
        return Weight(name, size, form, info.nbytes, tiled and in_tiles(weights, name, info), beside_gpu, info.shape[0])

    table = tensors[EMBEDDING[0]]
    shared = shares_table(weights, config, tensors)
    form = form_of(weights, OUTPUT[0], table, tiled)
    embedding = Weight(EMBEDDING[0], table_bytes(weights, table), form, table.nbytes, rows=table.shape[0])
    found = [Product((embedding,), read=shared)]
    for n in range(config.n_layers):
        found += [Product(tuple(linear(f"layers.{n}.{kind}") for kind in stacked)) for stacked in PRODUCTS]
    if not config.tied_output:
        found.append(Product((linear(OUTPUT[0]),)))
    elif not shared:
        found.append(Product((linear(OUTPUT[0], EMBEDDING[0]),)))
    return tuple(found)


def shares_table(weights: str, config: ModelConfig, tensors: Tensors) -> bool:
    """Whether one table of values in memory is both the embedding and the output."""
    fmt = tensors[EMBEDDING[0]].format
    kept = table_weights(weights, tensors[EMBEDDING[0]]) == "original"
    return config.tied_output and not (kept and isinstance(fmt, BlockFormat) and not fmt.plain)


def looked_up_in_output(weights: str, config: ModelConfig, tensors: Tensors, tiled: bool | None = None) -> bool:
    """Whether tokens are looked up in the output's tiles, where those are resident: a tied table that stays packed.
    `tiled`: see `products`."""
    tiled = compiled_products() if tiled is None else tiled
    return tiled and config.tied_output and in_tiles(weights, OUTPUT[0], tensors[EMBEDDING[0]])


def table_weights(weights: str, info: StoredTensor) -> str:
    """The value of `weights` that the embedding and the output head are kept by.

    Quantised forms are for the layers, as with bitsandbytes: a table that its file packs stays packed as it is, any
    other is bfloat16.
    """
    if weights == "original" or weights in VALUE_BYTES:
        return weights
    return "bf16" if info.format.plain else "original"


def vector_bytes(config: ModelConfig, tensors: Tensors) -> int:
    """Norms, biases and tables of factors, all float32."""
    total = sum(4 * info.elements for info in tensors.values() if len(info.shape) == 1)
    # Biases of several weights in one product are one vector, with zeros for those that have none.
    for stacked in PRODUCTS:
        if any(name in config.biases for name in stacked):
            missing = [name for name in stacked if name not in config.biases]
            total += sum(4 * tensors[name].shape[0] for name in _in_layers(config, missing))
    return total


def weight_bytes(weights: str, config: ModelConfig, tensors: Tensors, tiled: bool | None = None) -> int:
    """Bytes that all loaded weights take, exactly. `tiled`: see `products`."""
    tiled = compiled_products() if tiled is None else tiled
    total = sum(product.bytes for product in products(weights, config, tensors, tiled)) + vector_bytes(config, tensors)
    once = looked_up_in_output(weights, config, tensors, tiled)
    return total - (table_bytes(weights, tensors[EMBEDDING[0]]) if once else 0)


def kv_token_bytes(config: ModelConfig, kv_type: str) -> int:
    """Bytes of keys and values that one token keeps in all layers, in a value of the preset's key `kv_cache`."""
    if kv_type == "int8":
        return config.kv_bytes_per_token(1) + 2 * config.n_layers * config.n_kv_heads * _SCALE
    return config.kv_bytes_per_token(VALUE_BYTES[kv_type])


def linear_bytes(weights: str, name: str, info: StoredTensor, tiled: bool) -> int:
    """One weight that is multiplied with, in the form of the preset's key `weights`."""
    rows, columns = info.shape
    if name in (*EMBEDDING, *OUTPUT):
        weights = table_weights(weights, info)
    if weights in VALUE_BYTES:
        return VALUE_BYTES[weights] * info.elements
    if weights == "int8" and tiled and not info.format.int8 and columns % Q8_0.elements == 0:
        return info.beside + tiled_bytes(Q8_0, rows, columns)
    if weights in ("int8", "llm-int8"):
        return info.beside + _packed_bytes(_INT8, rows, columns)
    if weights == "int4":
        fmt = info.format if info.format.planes == 1 else _INT4
        return info.beside + (_packed_bytes(fmt, rows, columns, tiled) if columns % 32 == 0 else 2 * info.elements)
    if weights == "nf4":
        return info.beside + _packed_bytes(info.format if info.format.codebook else _NF4, rows, columns)
    if info.format.plain:
        return min(info.format.plain, 4) * info.elements
    return info.beside + _packed_bytes(info.format, rows, columns, tiled)


def form_of(weights: str, name: str, info: StoredTensor, tiled: bool) -> str:
    """What a weight is multiplied as: a value of the key `weights`, or the storage format where that is kept packed."""
    if name in (*EMBEDDING, *OUTPUT):
        weights = table_weights(weights, info)
    if weights != "original":
        return weights
    plain = {"F64": "f32", "F32": "f32", "F16": "f16", "BF16": "bf16"}
    packed = info.format.planes or info.format.int8 or info.format.codebook or (tiled and is_tiled(info.format))
    return plain.get(info.format.name) or (info.format.name if packed else "bf16")


def in_tiles(weights: str, name: str, info: StoredTensor) -> bool:
    """Whether compiled code on a CPU multiplies a weight in tiles, and nothing beside it."""
    if name in (*EMBEDDING, *OUTPUT):
        weights = table_weights(weights, info)
    if weights == "int4" and info.format.planes != 1:  # quantised while loading
        return not info.beside and info.shape[1] % _INT4.elements == 0
    if weights == "int8" and not info.format.int8:
        return not info.beside and info.shape[1] % Q8_0.elements == 0
    return weights in ("original", "int4") and not info.beside and is_tiled(info.format)


def table_bytes(weights: str, info: StoredTensor) -> int:
    """An embedding: ggml's blocks are kept as they are, the rest as values."""
    weights = table_weights(weights, info)
    if weights in VALUE_BYTES:
        return VALUE_BYTES[weights] * info.elements  # a tied table serves both its uses as it is
    if weights == "original" and isinstance(info.format, BlockFormat):
        return min(info.format.plain, 4) * info.elements if info.format.plain else info.nbytes
    return 2 * info.elements  # bfloat16


def _packed_bytes(fmt: StorageFormat, rows: int, columns: int, tiled: bool = False) -> int:
    if tiled and isinstance(fmt, BlockFormat) and is_tiled(fmt):
        return tiled_bytes(fmt, rows, columns)
    if fmt.int8:
        return rows * columns + 4 * rows  # a float32 scale for each row
    if fmt.codebook and columns % fmt.codebook == 0:
        return rows * columns // 2 + 4 * rows * (columns // fmt.codebook)  # a float32 scale for each block
    if fmt.planes:
        padded = -(-rows // _ROW_TILE) * _ROW_TILE
        # Codes, and a scale and a zero in bfloat16 for each group.
        return fmt.planes * (padded * columns // 2 + padded * (columns // fmt.group) * 4)
    return 2 * rows * columns  # decoded to bfloat16


def _in_layers(config: ModelConfig, kinds: list[str]) -> Iterator[str]:
    for n in range(config.n_layers):
        yield from (f"layers.{n}.{kind}" for kind in kinds)
