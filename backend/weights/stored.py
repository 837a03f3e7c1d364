"""A weight as its file holds it: a view of bytes that says its shape and can be decoded, a few rows at a time.

Readers make these from mapped files; nothing is read before it is asked for. The loader takes 4-bit planes where the
storage has them, else values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from backend.kernels.cpu.repack import decode_to_bf16
from backend.weights.blocks import BF16, F16, F32, F64, BlockFormat
from backend.weights.decode import dequantize
from backend.weights.planes import Planes, block_planes

CHUNK_ELEMENTS = 1 << 22  # decoded at once: 16 MiB of float32
PLAIN_DTYPES = {F32: torch.float32, F16: torch.float16, BF16: torch.bfloat16, F64: torch.float64}


class Stored(Protocol):
    """A stored matrix (rows, columns) or vector (n,)."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype | None:
        """The type of the values where they are plain numbers; None where they are packed."""
        ...

    def float32(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows start to stop as float32 (rows, columns); a vector whole, (n,). A copy."""
        ...

    def planes(self) -> Planes | None:
        """The matrix as 4-bit planes, exact in its codes; None where it has no such form."""
        ...

    def release(self) -> None:
        """The bytes were used: let the operating system take their pages back. They can be read again."""
        ...


class Plain:
    """Numbers as they are: a float32, float16, bfloat16 or float64 tensor of any stride, (rows, columns) or (n,)."""

    def __init__(self, values: torch.Tensor, release: Release | None = None) -> None:
        self.values, self._release = values, release

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    @property
    def dtype(self) -> torch.dtype | None:
        return self.values.dtype

    def float32(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        part = self.values if self.values.ndim == 1 else self.values[start:stop]
        return torch.empty(part.shape, dtype=torch.float32).copy_(part)

    def planes(self) -> Planes | None:
        return None

    def release(self) -> None:
        if self._release is not None:
            self._release()


class Blocks:
    """ggml blocks along each row: raw uint8 (rows, bytes per row)."""

    def __init__(self, raw: torch.Tensor, fmt: BlockFormat, release: Release | None = None) -> None:
        self.raw, self.format, self._release = raw, fmt, release

    @property
    def shape(self) -> tuple[int, ...]:
        return self.raw.shape[0], self.raw.shape[1] // self.format.bytes * self.format.elements

    @property
    def dtype(self) -> torch.dtype | None:
        return None

    def float32(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        return dequantize(self.raw[start:stop], self.format)

    def planes(self) -> Planes | None:
        return block_planes(self.raw, self.format)

    def release(self) -> None:
        if self._release is not None:
            self._release()


class Joined:
    """Parts of one matrix side by side: along rows (dim 0) or columns (dim 1), as tensor-parallel shards have them."""

    def __init__(self, parts: Sequence[Stored], dim: int) -> None:
        self.parts, self.dim = tuple(parts), dim

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.parts[0].shape)
        shape[self.dim] = sum(part.shape[self.dim] for part in self.parts)
        return tuple(shape)

    @property
    def dtype(self) -> torch.dtype | None:
        kinds = {part.dtype for part in self.parts}
        return kinds.pop() if len(kinds) == 1 else None

    def float32(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        if self.dim == 1:
            return torch.cat([part.float32(start, stop) for part in self.parts], dim=1)
        rows: list[torch.Tensor] = []
        stop, at = self.shape[0] if stop is None else stop, 0
        for part in self.parts:
            first, last = max(start - at, 0), min(stop - at, part.shape[0])
            if first < last:
                rows.append(part.float32(first, last))
            at += part.shape[0]
        return torch.cat(rows)

    def planes(self) -> Planes | None:
        return None

    def release(self) -> None:
        for part in self.parts:
            part.release()


class Release(Protocol):
    def __call__(self) -> None: ...


def copy_values(stored: Stored, out: torch.Tensor) -> None:
    """Write all values into `out`, (rows, columns) or (n,) of any float type, a slice of rows at a time."""
    if isinstance(stored, Plain):
        out.copy_(stored.values)
    elif isinstance(stored, Joined):
        at = 0
        for part in stored.parts:
            copy_values(part, out.narrow(stored.dim, at, part.shape[stored.dim]))
            at += part.shape[stored.dim]
            part.release()
    elif len(stored.shape) == 1:
        out.copy_(stored.float32())
    elif isinstance(stored, Blocks) and decode_to_bf16(stored.raw, stored.format, out):
        pass
    else:
        step = max(1, CHUNK_ELEMENTS // stored.shape[1])
        for start in range(0, stored.shape[0], step):
            out[start : start + step] = stored.float32(start, start + step)
