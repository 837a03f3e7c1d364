"""The only door to the Triton kernels. They are there when Triton is installed and they compute rightly on the device.

Triton comes with torch's CUDA packages and is absent elsewhere; on first use it compiles, which needs a C compiler. So
nothing here is imported before it is asked for, and whatever goes wrong is a line in the log and torch's slower way.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kernels:
    """The modules of this folder that import Triton."""

    gemv: Any
    skinny: Any
    outliers: Any
    dense: Any
    between: Any
    paged: Any


@cache
def kernels() -> Kernels | None:
    """The kernels for the CUDA devices of this machine; None where they cannot be used. One answer per process."""
    if not torch.cuda.is_available():
        return None
    if importlib.util.find_spec("triton") is None:
        log.warning("Triton is not installed: products on the GPU take torch's slower way")
        return None
    try:
        loaded = load()
        wrong = _wrong(loaded, "cuda")
    except Exception as error:  # a compiler's, a driver's or Triton's: every kind means the same here
        log.warning("Triton does not work on this machine (%s: %s): torch's slower way", type(error).__name__, error)
        return None
    if wrong:
        log.warning("Triton's %s is wrong on this machine: torch's slower way", wrong)
        return None
    return loaded


def load() -> Kernels:
    """Import the kernels. Fails where Triton is not installed."""
    here = __name__.rpartition(".")[0]
    return Kernels(*(importlib.import_module(f"{here}.{name}") for name in Kernels.__dataclass_fields__))


def _wrong(loaded: Kernels, device: str) -> str | None:
    """The name of a kernel that does not agree with torch on a small product; None when all of them do."""
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 256, generator=random).bfloat16().to(device)
    for name, tokens in (("gemv", 3), ("skinny", 9)):
        x = torch.randn(tokens, 256, generator=random).to(device)
        expected = x.bfloat16().float() @ weight.float().T
        if not torch.allclose(getattr(loaded, name).rows(x, weight), expected, rtol=1e-2, atol=0.1):
            return name
    return None
