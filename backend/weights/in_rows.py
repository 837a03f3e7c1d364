"""Weights multiplied where their file is mapped: for those that are streamed, and used once before they go.

A weight then crosses the memory bus once and not three times. Results have the same bits as those of `TiledLinear` and
`PlainLinear`, which keep weights.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import torch

from backend.kernels.cpu.plain import KINDS, plain
from backend.kernels.cpu.products import product_in_rows, tiles_library
from backend.weights.blocks import BlockFormat
from backend.weights.decode import dequantize
from backend.weights.linear import PlainLinear
from backend.weights.tiled import multiplies_rightly
from backend.weights.tiles import is_tiled


class RowsLinear:
    """y = x W^T with W, float (out, in): blocks as in the file, raws uint8 (rows, bytes per row), one above the other.

    On the CPU. Tiles are made inside the product, one at a time, in the cache. `release` is called when the last
    reference to this goes: it gives the pages back.
    """

    def __init__(
        self, raws: Sequence[torch.Tensor], fmt: BlockFormat, release: Callable[[], None] = lambda: None
    ) -> None:
        compiled = tiles_library()
        if compiled is None:
            raise RuntimeError("products of blocks in rows need a C compiler")
        self._compiled, self.raws, self.format = compiled, tuple(raws), fmt
        self.out_features = sum(raw.shape[0] for raw in raws)
        self.in_features = raws[0].shape[1] // fmt.bytes * fmt.elements
        weakref.finalize(self, release)

    @classmethod
    def of_blocks(
        cls, raws: Sequence[torch.Tensor], fmt: BlockFormat, release: Callable[[], None] = lambda: None
    ) -> RowsLinear | None:
        """None where there is no such product: no compiler, another format, rows with gaps between."""
        if tiles_library() is None or not is_tiled(fmt) or not multiplies_rightly(fmt):
            return None
        return cls(raws, fmt, release) if all(raw.is_contiguous() for raw in raws) else None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return product_in_rows(self._compiled, self.raws, self.format, x)

    def nbytes(self) -> int:
        return sum(raw.nbytes for raw in self.raws)

    def twin(self) -> torch.Tensor:
        return torch.cat([dequantize(raw, self.format) for raw in self.raws])

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.raws

    def with_tensors(self, tensors: Sequence[torch.Tensor]) -> RowsLinear:
        return RowsLinear(tensors, self.format)


class ViewsLinear:
    """y = x W^T with W, bfloat16 or float16 (out, in): views of a file, (rows, in) each, one above the other.

    Few tokens are multiplied in place. Many are not, because there a matrix library multiplies, and may sum what is
    stacked in another order than the parts alone: they are stacked first. `release` as above.
    """

    def __init__(self, views: Sequence[torch.Tensor], release: Callable[[], None] = lambda: None) -> None:
        self.views = tuple(views)
        self.out_features, self.in_features = sum(view.shape[0] for view in views), views[0].shape[1]
        weakref.finalize(self, release)

    @classmethod
    def of_views(cls, views: Sequence[torch.Tensor], release: Callable[[], None] = lambda: None) -> ViewsLinear | None:
        """None where there is no such product: no compiler, another type, rows with gaps between."""
        fits = len({view.dtype for view in views}) == 1 and all(view.is_contiguous() for view in views)
        usable = fits and views[0].dtype in KINDS and tiles_library() is not None
        return cls(views, release) if usable else None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        parts = [part for view in self.views if (part := plain(x, view)) is not None]
        if len(parts) == len(self.views):
            return torch.cat(parts, dim=-1)
        return self._stacked()(x)

    def nbytes(self) -> int:
        return sum(view.nbytes for view in self.views)

    def twin(self) -> torch.Tensor:
        return self._stacked().twin()

    def _stacked(self) -> PlainLinear:
        return PlainLinear(self.views[0] if len(self.views) == 1 else torch.cat(self.views))

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.views

    def with_tensors(self, tensors: Sequence[torch.Tensor]) -> ViewsLinear:
        return ViewsLinear(tensors)
