"""What a preset will take and where each part will be, from headers alone. Pure: no torch, nothing is loaded.

The order: the device, the cache of keys and values, then every part in its place (`arrange.py`), and from that bytes,
speed, and whether it fits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from backend.errors import PresetError
from backend.events import Fits
from backend.model.config import ModelConfig
from backend.model.shapes import is_shape
from backend.placement.arrange import STAYS, fastest, keeping, resident
from backend.placement.budget import (
    BLOCK_TOKENS,
    CHUNK_TOKENS,
    LONG_CHUNK_TOKENS,
    Cache,
    cache,
    decoded_bytes,
    host_bytes,
    host_cache,
    whole_tokens,
    workspace_bytes,
)
from backend.placement.machine import RAM_MARGIN, VRAM_MARGIN, Gpu, Machine
from backend.placement.parts import Part, placed_bytes, ring_bytes, with_one_table
from backend.placement.sizes import Tensors, looked_up_in_output, products, vector_bytes, weight_bytes
from backend.placement.speed import Placed, step
from backend.presets import Preset
from backend.units import show_bytes

__all__ = ["BLOCK_TOKENS", "Plan", "nearest_that_fits", "plan", "weight_bytes"]


@dataclass(frozen=True)
class Plan:
    """How a preset will run. Sizes in bytes, lengths in tokens."""

    preset: str
    model: str
    weights: str
    device: str  # cpu | cuda:0 | mps
    context: int
    kv_type: str
    kv_blocks: int
    kv_bytes: int  # reserved; on the CPU, pages are taken as tokens come
    weight_bytes: int  # of all weights, wherever they are
    parts: tuple[Part, ...]  # in the order of a step
    chunk_tokens: int = CHUNK_TOKENS  # of prompts in one step, at most
    host_cache_bytes: int = 0  # limit of the cache's host tier; taken as blocks come
    ring_bytes: int = 0  # buffers that streamed parts go through, on the device
    vram_bytes: int = 0  # most that will be taken on the GPU; 0 without one
    ram_bytes: int = 0  # most that this process will take in memory, with the cache full
    extra_ram_bytes: int = 0  # the same without what the process takes already
    max_context: int = 0  # tokens of one chat that would fit with these parts where they are
    tokens_per_second: float | None = None  # decode of one chat with a short context; None: rates were not measured
    bound_by: str = ""  # vram bandwidth | link | ram bandwidth | cpu | disk
    fits: Fits = "now"  # on the machine as it was given; "after-unload" is for who knows what is loaded
    reason: str = ""  # one sentence, where it does not fit
    draft: Plan | None = None  # of a smaller model that guesses, loaded first; its memory is counted above

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.kv_bytes

    def placed(self, place: str) -> int:
        """Bytes of parts in one place: resident, streamed or cpu."""
        return sum(part.bytes for part in self.parts if part.place == place)


def plan(preset: Preset, config: ModelConfig, tensors: Tensors, machine: Machine | None = None) -> Plan:
    """How a preset runs a model on a machine; without a machine: what it takes on a CPU that has room for it.

    Raises PresetError for a context that is longer than the model's.
    """
    if preset.context and preset.context > config.context:
        raise PresetError(
            f"preset {preset.name}: context is {preset.context} tokens, the model was made for {config.context}"
        )
    return _Planner(preset, config, tensors, machine or Machine()).plan()


def without(machine: Machine, taken: Plan) -> Machine:
    """What a machine has left when a plan was carried out."""
    gpus = tuple(
        dataclasses.replace(gpu, free=max(0, gpu.free - taken.vram_bytes)) if gpu.name == taken.device else gpu
        for gpu in machine.gpus
    )
    ram_free = max(0, machine.ram_free - taken.extra_ram_bytes)
    return dataclasses.replace(machine, ram_free=ram_free, gpus=gpus)


def with_draft(own: Plan, draft: Plan) -> Plan:
    """A preset's plan, made for what its draft preset leaves, with the draft's memory in it."""
    fits, reason = (own.fits, own.reason) if own.fits == "no" or draft.fits != "no" else (draft.fits, draft.reason)
    return dataclasses.replace(
        own,
        draft=draft,
        vram_bytes=own.vram_bytes + draft.vram_bytes,
        ram_bytes=own.ram_bytes + draft.extra_ram_bytes,
        extra_ram_bytes=own.extra_ram_bytes + draft.extra_ram_bytes,
        fits=fits,
        reason=reason,
    )


def nearest_that_fits(wanted: Plan, others: Iterable[Plan]) -> Plan | None:
    """Of the plans that fit, the one whose weights are nearest in size: of the same model, else of any other."""
    able = [other for other in others if other.fits != "no" and other.preset != wanted.preset]
    same = [other for other in able if other.model == wanted.model]
    return min(same or able, key=lambda other: abs(other.weight_bytes - wanted.weight_bytes), default=None)


class _Planner:
    def __init__(self, preset: Preset, config: ModelConfig, tensors: Tensors, machine: Machine) -> None:
        self.preset, self.config, self.tensors, self.machine = preset, config, tensors, machine
        self.gpu = _device(preset, machine)
        self.host = host_bytes(config, shape_only=is_shape(preset.model))
        self.products = products(preset.weights, config, tensors, tiled=False if self.gpu else None)
        self.vectors = vector_bytes(config, tensors)
        self.one_table = not self.gpu and looked_up_in_output(preset.weights, config, tensors)

    def plan(self) -> Plan:
        """With the longer chunk where that pays, unless there is no memory for its activations."""
        found = self._with_chunk(CHUNK_TOKENS)
        # A table on a GPU's host that is looked up in is read row by row, in any number of steps.
        if self.gpu and not found.ring_bytes:
            return found
        longer = self._with_chunk(LONG_CHUNK_TOKENS)
        return found if longer.fits == "no" and found.fits != "no" else longer

    def _with_chunk(self, chunk: int) -> Plan:
        workspace = workspace_bytes(self.config, chunk)
        room, asked = self._room(workspace)
        beside = self.vectors + workspace
        beside += self.gpu.context_bytes if self.gpu and self.gpu.name != "mps" else 0
        by_name = self._by_name()
        weights = _device_bytes(by_name) if by_name else sum(product.bytes for product in self.products)
        preset = self.preset
        kv_type = preset.kv_cache if preset.kv_cache != "auto" else ("f32" if preset.weights == "f32" else "bf16")
        kv = cache(self.config, kv_type, preset.context, preset.kv_tokens, weights + beside, room)
        if kv_type == "int8":
            beside += decoded_bytes(self.config, kv.context, 2 if self.gpu and self.gpu.name != "mps" else 4)
            kv = cache(self.config, kv_type, preset.context, preset.kv_tokens, weights + beside, room)
        placed = by_name
        if placed is None and room is None:
            placed = resident(self.products)
        elif placed is None and room is not None:
            left = room - beside - kv.bytes
            if self.gpu and self.gpu.name == "mps":  # one memory for both: nothing to stream from
                placed = resident(self.products) if weights <= left else None
            else:
                placed = fastest(self.products, left, self.config.n_layers, self.machine, self.gpu)
        found = self._described(placed or resident(self.products), kv, beside, room)
        return dataclasses.replace(self._judged(found, asked, room, placed is not None), chunk_tokens=chunk)

    def _room(self, workspace: int) -> tuple[int | None, int | None]:
        """(bytes of the device for everything, the budget that was asked for): None where there is no limit."""
        machine, preset = self.machine, self.preset
        if self.gpu:
            if preset.vram is not None or not self.gpu.total:
                return preset.vram, preset.vram
            return self.gpu.free - VRAM_MARGIN, None
        tier = preset.cache_ram or 0  # a part of the cache
        if preset.ram is not None:  # for weights and cache, says the preset: what else there is comes on top
            return preset.ram + workspace - tier, preset.ram
        if not machine.ram_total:
            return None, None
        return machine.ram_free - RAM_MARGIN - self.host - tier, None

    def _by_name(self) -> list[Placed] | None:
        """What the preset says about places; None where it leaves that to us."""
        placement = self.preset.placement
        if isinstance(placement, tuple):
            return keeping(self.products, placement, self.gpu is not None)
        if placement in STAYS:
            return keeping(self.products, STAYS[placement], self.gpu is not None)
        return resident(self.products) if placement == "gpu" else None

    def _described(self, placed: Sequence[Placed], kv: Cache, beside: int, room: int | None) -> Plan:
        machine, gpu = self.machine, self.gpu
        parts = tuple(product.part(place) for product, place in placed)
        if self.one_table:
            parts = with_one_table(parts)
        on_device = beside + placed_bytes(parts, "resident") + ring_bytes(parts)
        if gpu is None:
            extra = on_device + kv.bytes + self.host
        else:
            extra = placed_bytes(parts, "streamed") + placed_bytes(parts, "cpu") + self.host
            extra += gpu.host_bytes
        own_memory = gpu is not None and gpu.name != "mps"
        left = machine.ram_free - RAM_MARGIN - extra
        tier = host_cache(self.preset.cache_ram, own_memory, left, BLOCK_TOKENS * kv.token_bytes)
        extra += tier
        speed = step(placed, self.config.n_layers, machine, gpu)
        tokens = self.config.context if room is None else whole_tokens(room - on_device, kv.token_bytes)
        return Plan(
            preset=self.preset.name,
            model=self.preset.model,
            weights=self.preset.weights,
            device=gpu.name if gpu else "cpu",
            context=kv.context,
            kv_type=kv.type,
            kv_blocks=kv.blocks,
            kv_bytes=kv.bytes,
            host_cache_bytes=tier,
            weight_bytes=sum(part.bytes for part in parts) + self.vectors,
            parts=parts,
            ring_bytes=ring_bytes(parts),
            vram_bytes=on_device + kv.bytes if gpu else 0,
            ram_bytes=machine.process_bytes + extra,
            extra_ram_bytes=extra,
            max_context=min(tokens, self.config.context),
            tokens_per_second=speed.tokens_per_second if speed else None,
            bound_by=speed.bound_by if speed else "",
        )

    def _judged(self, found: Plan, asked: int | None, room: int | None, placed: bool) -> Plan:
        """The same with whether it fits, and why not."""
        machine, gpu = self.machine, self.gpu
        need = found.vram_bytes if gpu else found.extra_ram_bytes - self.host
        memory, limit = "GPU memory" if gpu else "memory", show_bytes(max(0, room or 0))
        reason = ""
        if gpu and not gpu.total:
            reason = f"device is {self.preset.device}, which this machine does not have"
        elif not placed and asked is None:
            reason = f"needs {show_bytes(need)} of {memory}, {limit} are free"
        elif not placed or (asked is not None and room is not None and need > room):
            reason = f"needs {show_bytes(need)} of {memory}, {'vram' if gpu else 'ram'} is {show_bytes(asked or 0)}"
        elif gpu and found.vram_bytes > gpu.free:
            reason = f"needs {show_bytes(need)} of {memory}, {show_bytes(gpu.free)} are free"
        elif machine.ram_total and found.extra_ram_bytes > machine.ram_free:
            reason = f"needs {show_bytes(found.extra_ram_bytes)} of memory, {show_bytes(machine.ram_free)} are free"
        return dataclasses.replace(found, fits="no", reason=reason) if reason else found


def _device(preset: Preset, machine: Machine) -> Gpu | None:
    """The GPU a preset runs on; None: the CPU. One that is not there has no memory at all (`total` 0)."""
    if preset.device == "cpu" or preset.placement == "cpu":
        return None
    if preset.device == "auto":
        return machine.gpus[0] if machine.gpus else None
    return machine.gpu(preset.device) or Gpu("cuda:0" if preset.device == "cuda" else preset.device)


def _device_bytes(placed: Sequence[Placed]) -> int:
    parts = [product.part(place) for product, place in placed]
    return placed_bytes(parts, "resident") + ring_bytes(parts)
