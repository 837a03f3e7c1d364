"""A preset brought to life: tokenizer, template, weights, cache and engine thread of one loaded model.

Built whole or not at all.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

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
from backend.errors import CheckpointError, ContextLengthError, ParameterError, PresetError, UserError
from backend.events import LoadProgress
from backend.generation import Generation
from backend.params import GenerationParams
from backend.placement.linears import DTYPES
from backend.placement.load import load_model
from backend.placement.plan import BLOCK_TOKENS, Plan, plan
from backend.presets import Preset
from backend.prompting import Prompting, choose_format
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
        config = self.checkpoint.config
        if preset.context and preset.context > config.context:
            raise PresetError(
                f"preset {preset.name}: context is {preset.context} tokens, the model was made for {config.context}"
            )
        tokenizer = open_tokenizer(self.checkpoint.tokenizer, config.vocab_size)
        name = model_name(self.checkpoint)
        form = choose_format(preset.prompt_format, tokenizer, f"{name} {config.name}", preset.name)
        self.prompting = Prompting(tokenizer, form, name)
        self.plan: Plan = plan(preset, config, self.checkpoint.tensors)
        free = psutil.virtual_memory().available
        if self.plan.weight_bytes > free:
            raise UserError(
                f"preset {preset.name} needs {self.plan.weight_bytes / 1e9:.1f} GB for its weights, "
                f"{free / 1e9:.1f} GB of memory are free"
            )


class Runtime:
    """A loaded model that answers."""

    def __init__(self, prepared: Prepared, max_waiting: int, progress: Progress = lambda _: None) -> None:
        torch.set_num_threads(compute_threads())
        self.preset, self.plan = prepared.preset, prepared.plan
        self.checkpoint, self.prompting = prepared.checkpoint, prepared.prompting
        self.tokenizer = self.prompting.tokenizer
        label = self.preset.title or self.preset.name
        loaded = load_model(self.checkpoint, self.preset.weights, label, progress)
        self.weight_bytes, self.bytes_per_token = loaded.weight_bytes, loaded.bytes_per_token
        config = self.checkpoint.config
        self._kv = KVPool(config, self.plan.kv_blocks, BLOCK_TOKENS, DTYPES[self.plan.kv_type])
        self.blocks = BlockPool(self.plan.kv_blocks, BLOCK_TOKENS)
        threads = Threads(compute_threads(), loaded.bytes_per_token)
        self.runner = Runner(threads.fitted(loaded.model, loaded.output_bytes), self._kv, threads)
        self.worker = Worker(Engine(self.runner, self.blocks), max_waiting)
        self._warm_up()

    @property
    def name(self) -> str:
        """What programs call this model."""
        return model_name(self.checkpoint)

    @property
    def kv_bytes(self) -> int:
        return self._kv.nbytes()

    # ids to a running reply -------------------------------------------------------------------------------------------

    def start_chat(self, messages: Sequence[Message], params: GenerationParams, **options: bool) -> Generation:
        """Answer a chat, in the model's format and with what ends a reply there. Options: those of `start`."""
        return self.start(self.prompting.encode_chat(messages), params, chat=True, **options)

    def start(
        self,
        ids: Sequence[int],
        params: GenerationParams,
        *,
        chat: bool = False,
        want_logprobs: bool = False,
        use_cache: bool = True,
    ) -> Generation:
        """Submit; raises before anything runs when the prompt cannot fit or too many wait."""
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
        prompting = self.prompting
        stop = (*params.stop, *prompting.stops) if chat else params.stop
        trim = chat and prompting.trims_reply
        generation = Generation(self.tokenizer.token_bytes, stop, tuple(ids), trim_start=trim)
        request = Request(
            prompt=tuple(ids),
            params=params,
            end_ids=prompting.end_ids,
            listener=generation,
            context=context,
            want_logprobs=want_logprobs,
            use_cache=use_cache,
        )
        generation.attach(request, lambda: self.worker.cancel(request))
        self.worker.submit(request)
        return generation

    def close(self, *, drain: bool) -> None:
        """Stop the engine thread; with `drain`, after the running replies are finished."""
        self.worker.close(drain)

    def _warm_up(self) -> None:
        """One short reply, so that the first person does not wait for one-time set-up, and a sick model is refused."""
        params = GenerationParams(max_tokens=2, temperature=0.0)
        for chunk in self.start([0] * min(8, self.plan.context - 2), params, use_cache=False):
            if chunk.error is not None:
                self.close(drain=False)
                raise CheckpointError(f"{self.checkpoint.path}: the model does not compute: {chunk.error}")


def compute_threads() -> int:
    """Physical cores this process may use: a second thread on a core only gets in the way of the first."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return max(1, min(allowed, psutil.cpu_count(logical=False) or allowed))


def model_name(checkpoint: Checkpoint) -> str:
    """What a model is called: its folder, or its file without the ending."""
    return checkpoint.path.name if checkpoint.path.is_dir() else checkpoint.path.stem
