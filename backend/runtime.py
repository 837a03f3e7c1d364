"""A preset brought to life: tokenizer, template, weights, cache and engine thread of one loaded model.

The only place where text and token ids meet. Built whole or not at all.
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
from backend.checkpoint.open import open_checkpoint
from backend.engine.engine import Engine
from backend.engine.request import Request
from backend.engine.runner import Runner
from backend.engine.threads import Threads
from backend.engine.worker import Worker
from backend.errors import CheckpointError, ContextLengthError, ParameterError, PresetError, UserError
from backend.events import LoadProgress
from backend.generation import Generation
from backend.params import GenerationParams
from backend.placement.load import DTYPES, load_model
from backend.placement.plan import BLOCK_TOKENS, Plan, plan
from backend.presets import Preset
from backend.text.messages import Message
from backend.text.templates import CHATML, ChatTemplate
from backend.tokenizer.base import Tokenizer
from backend.tokenizer.open import open_tokenizer
from backend.tokenizer.segments import ControlGuard

Progress = Callable[[LoadProgress], None]


class Prepared:
    """Everything that can be known, and go wrong, before the weights are read."""

    def __init__(self, preset: Preset, path: Path) -> None:
        self.preset = preset
        self.checkpoint: Checkpoint = open_checkpoint(path)
        config = self.checkpoint.config
        if preset.context and preset.context > config.context:
            raise PresetError(
                f"preset {preset.name}: context is {preset.context} tokens, the model was made for {config.context}"
            )
        self.tokenizer: Tokenizer = open_tokenizer(path, self.checkpoint.metadata, config.vocab_size)
        self.template = _template(preset, self.checkpoint, self.tokenizer)
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
        self.checkpoint, self.tokenizer, self.template = prepared.checkpoint, prepared.tokenizer, prepared.template
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
        return self.checkpoint.path.stem

    @property
    def kv_bytes(self) -> int:
        return self._kv.nbytes()

    # text to ids ------------------------------------------------------------------------------------------------------

    def encode_chat(self, messages: Sequence[Message], *, generation_prompt: bool = True) -> list[int]:
        """The prompt of a chat in the model's own format. Control tokens typed in a message stay text."""
        if self.template is None:
            raise ParameterError(
                f"{self.name} has no chat template; use completion, or set prompt_format in the preset"
            )
        guard = ControlGuard(self.tokenizer.control_tokens(), [message.content for message in messages])
        text = self.template.render(messages, generation_prompt=generation_prompt, prepare=guard.guard)
        return self.tokenizer.with_start(self.tokenizer.encode_segments(guard.split(text)))

    def encode_message(self, text: str) -> list[int]:
        """One user message as a whole chat."""
        return self.encode_chat([Message("user", text)])

    def encode_text(self, text: str) -> list[int]:
        """A raw prompt: nothing added but the begin token, where the vocabulary wants one."""
        ids = self.tokenizer.with_start(self.tokenizer.encode(text))
        return ids or self._something_to_start_from()

    def _something_to_start_from(self) -> list[int]:
        # An empty prompt is a fair question; the end-of-text token is what models saw before unrelated texts.
        return [min(self.tokenizer.end_ids, default=0)]

    # ids to a running reply -------------------------------------------------------------------------------------------

    def start(
        self, ids: Sequence[int], params: GenerationParams, *, want_logprobs: bool = False, use_cache: bool = True
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
        generation = Generation(self.tokenizer.token_bytes, params.stop, tuple(ids))
        request = Request(
            prompt=tuple(ids),
            params=params,
            end_ids=self.tokenizer.end_ids,
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


def _template(preset: Preset, checkpoint: Checkpoint, tokenizer: Tokenizer) -> ChatTemplate | None:
    spelt = {}
    for key, name in (("bos", "bos_token"), ("eos", "eos_token")):
        token = checkpoint.metadata.get(f"tokenizer.ggml.{key}_token_id")
        spelt[name] = tokenizer.token_text(token) if isinstance(token, int) else ""
    if preset.prompt_format == "chatml":
        return ChatTemplate(CHATML, spelt)
    if preset.prompt_format != "auto":
        try:
            return ChatTemplate(Path(preset.prompt_format).read_text(encoding="utf-8"), spelt)
        except (OSError, UnicodeDecodeError) as error:
            raise PresetError(f"preset {preset.name}: prompt_format: {error}") from None
    source = checkpoint.metadata.get("tokenizer.chat_template")
    return ChatTemplate(source, spelt) if isinstance(source, str) and source else None
