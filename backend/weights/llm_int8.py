"""LLM.int8: int8 weights and int8 activations, and the columns with large activations in float (arXiv:2208.07339).

    y = s * (t * sum over the others of a_k w_k + sum over outliers of x_k w_k)

w int8 and s float32 per output row; a = round(x / t) int8 and t = largest |x| below the threshold / 127 per token; an
outlier column is one in which any token of the batch reaches the threshold. As bitsandbytes computes it: activations
and weights are rounded to float16 before they are quantised, the first sum is of whole numbers, and an outlier column
uses the int8 weights like any other. So both sums go over the same bytes and one pass is enough; bitsandbytes takes two
and a copy of the columns.

Without compiled code, and on other devices, torch does the same in several passes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from backend.kernels.cpu import rows
from backend.kernels.cuda import products

THRESHOLD = 6.0
_KERNEL_TOKENS = 8  # with more, torch's product of whole numbers is faster
_EXACT_COLUMNS = 1024  # 1024 * 127 * 127 < 2^24: float32 adds up that many products exactly
_CUDA_ROWS, _CUDA_MULTIPLE = 17, 8  # the least that torch._int_mm takes on CUDA


class LlmInt8Linear:
    """codes int8 (out, in), scale float32 (out,): kept as given, so pass no views of a mapped file. x float32
    (tokens, in) -> float32 (tokens, out)."""

    def __init__(self, codes: torch.Tensor, scale: torch.Tensor) -> None:
        self.codes, self.scale = codes.contiguous(), scale.float().contiguous()
        self.out_features, self.in_features = codes.shape

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if x.device.type == "cpu" and x.shape[0] <= _KERNEL_TOKENS:
            y = rows.llm_int8(x, self.codes, self.scale, THRESHOLD)
            if y is not None:
                return y
        if x.is_cuda and (y := products.llm_int8(x, self.codes, self.scale, THRESHOLD)) is not None:
            return y
        return product(x, self.codes, self.scale)

    def nbytes(self) -> int:
        return self.codes.nbytes + self.scale.nbytes

    def twin(self) -> torch.Tensor:
        return self.codes.float() * self.scale[:, None]

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.codes, self.scale

    def with_tensors(self, tensors: Sequence[torch.Tensor]) -> LlmInt8Linear:
        codes, scale = tensors
        return LlmInt8Linear(codes, scale)


def quantise(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 (rows, columns) -> codes int8, and what one code is worth, float32 (rows,): bitsandbytes' codes."""
    values = values.clamp(-65504, 65504).half().float()
    largest = values.abs().amax(1)
    each = torch.where(largest > 0, 127 / largest, 0)
    return values.mul_(each[:, None]).round_().to(torch.int8), largest / 127


def product(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The formula above in torch: the twin of compiled code, and the way for many tokens."""
    whole, each, outliers = quantise_activations(x)
    y = integer_product(whole, codes).float().mul_(each[:, None])
    if outliers.numel():
        y += F.linear(x.index_select(1, outliers), codes.index_select(1, outliers).float())
    return y.mul_(scale)


def quantise_activations(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x float32 (tokens, in) -> codes int8 (tokens, in), 0 in outlier columns; what a code is worth, float32 (tokens,),
    not a number for a token that has one that is none; the outlier columns, int64."""
    if x.device.type == "cpu":
        found = rows.llm_int8_codes(x, THRESHOLD)
        if found is not None:
            return found
    return quantise_activations_twin(x)


def quantise_activations_twin(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same by torch alone."""
    rounded = x.half().float()
    large = rounded.abs() >= THRESHOLD
    rounded.masked_fill_(large, 0)
    largest = rounded.abs().amax(1)  # of a token with something that is no number: no number either
    each = torch.where(largest > 0, 127 / largest, 0)
    columns = large.any(0)
    codes = rounded.mul_(each[:, None]).masked_fill_(columns, 0).nan_to_num_(0).round_().to(torch.int8)
    return codes, largest / 127, columns.nonzero().flatten()


def integer_product(x: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """int8 (tokens, in) by int8 (out, in) -> int32 (tokens, out), exactly."""
    if _multiplies_int8(x.device.type, codes.shape[0], codes.shape[1]):
        missing = max(0, _CUDA_ROWS - x.shape[0]) if x.device.type == "cuda" else 0
        return torch._int_mm(F.pad(x, (0, 0, 0, missing)), codes.t())[: x.shape[0]]
    total = torch.zeros(x.shape[0], codes.shape[0], dtype=torch.int32, device=x.device)
    for some, weights in zip(x.split(_EXACT_COLUMNS, 1), codes.split(_EXACT_COLUMNS, 1), strict=True):
        total += F.linear(some.float(), weights.float()).to(torch.int32)
    return total


def _multiplies_int8(device: str, out_features: int, in_features: int) -> bool:
    """Whether torch._int_mm is there and fast. On the CPU it is a scalar loop without AVX-512."""
    if device == "cpu":
        return torch.backends.cpu.get_cpu_capability() == "AVX512"
    return device == "cuda" and out_features % _CUDA_MULTIPLE == 0 and in_features % _CUDA_MULTIPLE == 0
