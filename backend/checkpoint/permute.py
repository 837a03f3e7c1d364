"""The two orders of query and key rows: which halves of a head turn together under rotary embedding.

Meta (and GGUF of architecture llama): rows 2j and 2j + 1 of a head are a pair. Hugging Face: rows j and j + hd/2. One
head of hd rows goes from one to the other by

    Hugging Face row j + s * hd/2  =  Meta row 2j + s      (j in 0 .. hd/2 - 1, s in 0, 1)

(`permute` in transformers' convert_llama_weights_to_hf.py.) Biases permute as the rows do. All other weights are equal.
"""

from __future__ import annotations

import torch


def to_half_split(rows: int, heads: int) -> torch.Tensor:
    """int64 (rows,): Hugging Face's matrix is meta_matrix[index]. `rows` = heads * head size, an even head size."""
    return _by_head(rows, heads).view(heads, -1, 2).transpose(1, 2).flatten()


def to_interleaved(rows: int, heads: int) -> torch.Tensor:
    """int64 (rows,): Meta's matrix is hugging_face_matrix[index]. The inverse of `to_half_split`."""
    return _by_head(rows, heads).view(heads, 2, -1).transpose(1, 2).flatten()


def _by_head(rows: int, heads: int) -> torch.Tensor:
    """Row numbers (heads, head size). ValueError when there is no such even head size."""
    if heads < 1 or rows < 1 or rows % (2 * heads):
        raise ValueError(f"{rows} rows are not {heads} heads of an even size")
    return torch.arange(rows).view(heads, -1)
