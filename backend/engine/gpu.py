"""What a device other than the CPU gets: fused operations, the decoder of whole batches, and the way back of logits."""

from __future__ import annotations

import dataclasses

import torch

from backend.cache.kv import KVPool
from backend.engine.decode import Decoder
from backend.engine.graphs import CudaRecorder
from backend.kernels.cuda.available import kernels
from backend.model.llama import Llama
from backend.model.operations import Operations


def on_device(model: Llama, device: torch.device) -> Llama:
    """The model with what its device does better between the products; itself where that is nothing."""
    loaded = kernels() if device.type == "cuda" else None
    if loaded is None:
        return model
    return dataclasses.replace(model, operations=Operations(loaded.between.add_norm, loaded.between.gated))


def decoder(model: Llama, pool: KVPool, *, graphs: bool) -> Decoder | None:
    """For steps of one token per sequence; None where there are no kernels for it."""
    loaded = kernels() if pool.device.type == "cuda" else None
    if loaded is None:
        return None
    return Decoder(model, pool, loaded.paged, CudaRecorder() if graphs else None)


def enter(device: torch.device) -> None:
    """Make it the calling thread's device: kernels are launched there, not where their tensors are."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def to_host(logits: torch.Tensor) -> torch.Tensor:
    """Logits where tokens are drawn: on the CPU. Itself when it is there."""
    if logits.device.type != "cuda":
        return logits.cpu()
    # Pinned, so that the device writes it by itself, without a copy in between.
    host = torch.empty(logits.shape, dtype=logits.dtype, pin_memory=True)
    host.copy_(logits, non_blocking=True)
    torch.cuda.current_stream(logits.device).synchronize()
    return host
