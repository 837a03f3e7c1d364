"""A preset brought to life: tokenizer, template, weights, cache and engine thread of one loaded model.

Built whole or not at all.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from backend.cache.blocks import BlockPool
from backend.cache.kv import KVPool
from backend.checkpoint.base import Checkpoint
from backend.checkpoint.lora import with_lora
from backend.checkpoint.open import open_checkpoint
from backend.checkpoint.override import with_overrides
from backend.engine.engine import Engine
from backend.engine.request import Request
from backend.engine.runner import Runner
from backend.engine.threads import Threads
from backend.engine.worker import Worker
from backend.errors import CheckpointError, ContextLengthError, ParameterError, PresetError
from backend.events import LoadProgress, Status
from backend.generation import Generation
from backend.memory import free_bytes
from backend.model.shapes import is_shape
from backend.params import GenerationParams
from backend.placement.devices import choose
from backend.placement.linears import DTYPES
from backend.placement.load import load_model
from backend.placement.machine import Machine
from backend.placement.plan import BLOCK_TOKENS, Plan, plan
from backend.presets import Preset
from backend.prompting import Prompting, choose_format
from backend.room import Held
from backend.sampling.grammar import Grammars
from backend.text.messages import Message
from backend.tokenizer.open import open_tokenizer

Progress = Callable[[LoadProgress], None]


class Prepared:
    """Everything that can be known, and go wrong, before the weights are read."""

    def __init__(self, preset: Preset, path: Path, adapters: Sequence[tuple[Path, float]] = ()) -> None:
        """`adapters`: LoRA folders and their strengths, put on top of each other."""
        self.preset = preset
        self.checkpoint: Checkpoint = with_overrides(open_checkpoint(path), dict(preset.overrides))
        for folder, strength in adapters:
            self.checkpoint = with_lora(self.checkpoint, folder, strength)
        self._files = [(str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in self.checkpoint.files]
        config = self.checkpoint.config
        if preset.context and preset.context > config.context:
            raise PresetError(
                f"preset {preset.name}: context is {preset.context} tokens, the model was made for {config.context}"
            )
        tokenizer = open_tokenizer(self.checkpoint.tokenizer, config.vocab_size)
        name = model_name(self.checkpoint)
        form = choose_format(preset.prompt_format, tokenizer, f"{name} {config.name}", preset.name)
        self.prompting = Prompting(tokenizer, form, name)
        self.plan = self.planned(None)

    def planned(self, machine: Machine | None) -> Plan:
        """How this preset would run on a machine; None: everything resident, nothing predicted."""
        return plan(self.preset, self.checkpoint.config, self.checkpoint.tensors, machine)

    def same(self, other: Prepared) -> bool:
        """Whether loading this one would give what the other is: the same keys, and files unchanged since."""
        return self.preset == other.preset and self._files == other._files


class Runtime:
    """A loaded model that answers."""

    def __init__(self, prepared: Prepared, max_waiting: int, progress: Progress = lambda _: None) -> None:
        torch.set_num_threads(compute_threads())
        self.prepared = prepared
        self.preset, self.plan = prepared.preset, prepared.plan
        self.checkpoint, self.prompting = prepared.checkpoint, prepared.prompting
        self.tokenizer = self.prompting.tokenizer
        self._grammars = Grammars(self.tokenizer, self.prompting.end_ids)
        label = self.preset.title or self.preset.name
        plan = self.plan
        loaded = load_model(self.checkpoint, self.preset.weights, label, progress, plan.parts, choose(plan.device))
        self._loaded = loaded
        self.weight_bytes, self.bytes_per_token = loaded.weight_bytes, loaded.bytes_per_token
        try:
            self._start(max_waiting)
        except BaseException:  # a cache for which there is no memory, a model that does not compute
            loaded.close()
            raise

    def _start(self, max_waiting: int) -> None:
        """The cache, the engine and its thread, and a first reply."""
        loaded = self._loaded
        config = self.checkpoint.config
        self._kv = KVPool(config, self.plan.kv_blocks, BLOCK_TOKENS, DTYPES[self.plan.kv_type], loaded.device)
        self.blocks = BlockPool(self.plan.kv_blocks, BLOCK_TOKENS)
        threads = Threads(compute_threads(), loaded.bytes_per_token)
        # What is brought or computed elsewhere while a step runs cannot be part of a recorded step.
        whole = all(part.place == "resident" for part in self.plan.parts)
        model = threads.fitted(loaded.model, loaded.output_bytes)
        self.runner = Runner(model, self._kv, threads, graphs=whole)
        self.worker = Worker(Engine(self.runner, self.blocks, prefill_tokens=self.plan.chunk_tokens), max_waiting)
        self._warm_up()

    @property
    def name(self) -> str:
        """What programs call this model."""
        return model_name(self.checkpoint)

    @property
    def kv_bytes(self) -> int:
        return self._kv.nbytes()

    @property
    def kv_used_bytes(self) -> int:
        """What of the cache has keys and values in it. The rest is reserved; on a CPU nothing has touched it."""
        blocks = self.blocks.n_blocks
        return self.kv_bytes * (blocks - self.blocks.free) // blocks

    def held(self) -> Held:
        """What returns when this model is unloaded."""
        loaded, device = self._loaded, self.plan.device
        if device == "cpu":
            return Held(device, ram=loaded.resident_bytes + self.plan.ring_bytes + self.kv_used_bytes)
        return Held(device, ram=loaded.host_bytes, vram=loaded.resident_bytes + self.plan.ring_bytes + self.kv_bytes)

    def status(self) -> Status:
        """This model's part of the service's status."""
        on_gpu = self.plan.device != "cpu"
        return Status(
            state="ready",
            preset=self.preset.name,
            title=self.preset.title or self.preset.name,
            model=self.name,
            context=self.plan.context,
            weight_bytes=self.weight_bytes,
            kv_bytes=self.kv_bytes,
            running=self.worker.running,
            waiting=self.worker.waiting,
            device=self.plan.device,
            predicted_bytes=self.plan.vram_bytes if on_gpu else self.plan.ram_bytes,
            kv_used_bytes=self.kv_used_bytes,
            free_bytes=free_bytes(self.plan.device),
            cache_tokens=self.blocks.n_blocks * BLOCK_TOKENS,
            cache_free_tokens=(self.blocks.n_blocks - self.blocks.in_use) * BLOCK_TOKENS,
        )

    # ids to a running reply -------------------------------------------------------------------------------------------

    def start_chat(self, messages: Sequence[Message], params: GenerationParams, **options: Any) -> Generation:
        """Answer a chat, in the model's format and with what ends a reply there. Options: those of `start`."""
        return self.start(self.prompting.encode_chat(messages), params, chat=True, **options)

    def start_text(self, prompt: str | Sequence[int], params: GenerationParams, **options: Any) -> Generation:
        """Continue raw text, or token ids as they are. Options: those of `start`."""
        return self.start(self.prompting.encode_text(prompt) if isinstance(prompt, str) else prompt, params, **options)

    def start(
        self,
        ids: Sequence[int],
        params: GenerationParams,
        *,
        chat: bool = False,
        want_logprobs: bool = False,
        top_logprobs: int | None = None,
        use_cache: bool = True,
        generation: Generation | None = None,
    ) -> Generation:
        """Submit; raises before anything runs when the prompt cannot fit or too many wait.

        `generation`: one that has waited for this model. It keeps no reference to this runtime: whoever keeps a reply
        would keep the weights.
        """
        context = self.plan.context
        if len(ids) >= context:
            raise ContextLengthError(
                f"this conversation has {len(ids)} tokens and the context holds {context}, so there is no room for a "
                "reply; shorten it or start a new chat",
                n_prompt_tokens=len(ids),
                n_ctx=context,
            )
        bad = [token for token in ids if not 0 <= token < self.tokenizer.vocab_size]
        if bad or not ids:
            found = f"token id {bad[0]}" if bad else "no tokens"
            raise ParameterError(f"the prompt has {found}; ids are from 0 to {self.tokenizer.vocab_size - 1}")
        params.check_tokens(self.tokenizer.vocab_size)
        prompting = self.prompting
        stop = (*params.stop, *prompting.stops) if chat else params.stop
        trim = chat and prompting.trims_reply
        generation = generation or Generation.waiting()
        generation.begin(self.tokenizer.token_bytes, stop, tuple(ids), trim_start=trim)
        generation.model = self.name
        request = Request(
            prompt=tuple(ids),
            params=params,
            end_ids=prompting.end_ids,
            listener=generation,
            context=context,
            want_logprobs=want_logprobs or top_logprobs is not None,
            top_logprobs=top_logprobs or 0,
            token_bytes=self.tokenizer.token_bytes,
            matcher=self._grammars.matcher(params),
            use_cache=use_cache,
        )
        generation.attach(request, request.cancel)
        self.worker.submit(request)
        return generation

    def close(self, *, drain: bool, reason: str | None = None) -> None:
        """Stop the engine thread; with `drain`, after the running replies are finished. `reason` is for the others."""
        self.worker.close(drain, reason)
        self._loaded.close()

    def _warm_up(self) -> None:
        """One short reply, so that the first person does not wait for one-time set-up, and a sick model is refused."""
        # On a GPU a step is recorded as a graph when it comes for the second time; that is one-time set-up too.
        on_gpu = self._kv.device.type == "cuda"
        params = GenerationParams(max_tokens=3 if on_gpu else 2, temperature=0.0)
        for chunk in self.start([0] * min(8, self.plan.context - params.max_tokens), params, use_cache=False):
            if chunk.error is not None:
                self.close(drain=False)
                raise CheckpointError(f"{self.checkpoint.path}: the model does not compute: {chunk.error}")


def compute_threads() -> int:
    """Physical cores this process may use: a second thread on a core only gets in the way of the first."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return max(1, min(allowed, psutil.cpu_count(logical=False) or allowed))


def model_name(checkpoint: Checkpoint) -> str:
    """What a model is called: its folder, or its file without the ending; a shape by its own name."""
    if is_shape(str(checkpoint.path)):
        return str(checkpoint.path)
    return checkpoint.path.name if checkpoint.path.is_dir() else checkpoint.path.stem
