"""The starter model for tests that need real weights: loaded once for each kind of weights and kept."""

from __future__ import annotations

import dataclasses
from functools import lru_cache

import torch

from backend.engine.runner import _Span
from backend.events import Chunk
from backend.generation import Generation
from backend.models import ModelFolder
from backend.presets import PresetFolder
from backend.runtime import Prepared, Runtime
from backend.settings import PROJECT, Settings

PRESETS = {"original": "starter", "bf16": "starter-bf16", "f32": "starter-f32"}


@lru_cache(maxsize=3)
def starter(weights: str) -> Runtime:
    """The shipped preset with these weights, as users load it."""
    preset = PresetFolder(Settings().presets_dir).read(PRESETS[weights])
    path = ModelFolder(Settings().models_dir).resolve(preset.model, PROJECT)
    return Runtime(Prepared(preset, path), max_waiting=64)


def tiny_runtime(path, **changes) -> Runtime:
    """A runtime on any small GGUF file."""
    preset = dataclasses.replace(PresetFolder(Settings().presets_dir).read("starter"), name="tiny", **changes)
    return Runtime(Prepared(preset, path), max_waiting=64)


def all_logits(runtime: Runtime, ids: list[int], chunk: int = 128) -> torch.Tensor:
    """Our logits at every position, through the paged cache, `chunk` tokens at a time. float32 (tokens, vocab)."""
    lease = runtime.blocks.acquire(ids[:1], tokens=len(ids))
    assert lease is not None
    runtime.runner.copy_blocks(runtime.blocks.take_moves())
    runner, rows = runtime.runner, []
    with torch.inference_mode():
        for start in range(0, len(ids), chunk):
            end = min(len(ids), start + chunk)
            span = _Span(0, end - start, runner.pool.table(lease.blocks, start, end))
            piece = torch.tensor(ids[start:end])
            rows.append(
                runner.model.forward(piece, torch.arange(start, end), runner._attend([span]), torch.arange(end - start))
            )
    runtime.blocks.release(lease, ())
    return torch.cat(rows)


def read(generation: Generation) -> tuple[str, list[int], Chunk]:
    """Text, ids and last chunk of a whole reply."""
    text, ids, chunk = "", [], Chunk()
    for chunk in generation:
        text += chunk.text
        ids += chunk.ids
    return text, ids, chunk
