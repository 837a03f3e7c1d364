"""A preset brought to life: tokenizer, template, weights, cache and engine thread of one loaded model.

Built whole or not at all.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch

from backend.bell import Bell
from backend.cache.blocks import BlockPool
from backend.cache.kv import KV_TYPES, KVPool
from backend.checkpoint.base import Checkpoint
from backend.checkpoint.lora import with_lora
from backend.checkpoint.open import open_checkpoint
from backend.checkpoint.override import with_overrides
from backend.context import Fitted, fit_chat, with_system
from backend.drafting import Draft, check_vocabulary
from backend.engine.engine import Engine
from backend.engine.keeping import Keeper, fingerprint
from backend.engine.pairs import add_partner
from backend.engine.request import Request
from backend.engine.runner import Runner
from backend.engine.speculation import MOST_ALIKE, MOST_IN_STEP, Speculation
from backend.engine.threads import Threads
from backend.engine.worker import Worker
from backend.errors import CheckpointError, ContextLengthError, ParameterError, PresetError
from backend.events import LoadProgress, Status
from backend.generation import Generation
from backend.kernels.cpu.memory import populate
from backend.kernels.cpu.slices import long_slices
from backend.memory import free_bytes
from backend.metrics import Records, Totals
from backend.model.shapes import is_shape
from backend.params import GenerationParams
from backend.persons import salt_of
from backend.placement.budget import CHUNK_TOKENS
from backend.placement.devices import choose
from backend.placement.load import load_model
from backend.placement.machine import Machine
from backend.placement.plan import BLOCK_TOKENS, Plan, plan, with_draft, without
from backend.presets import Preset
from backend.prompting import Prompting, choose_format
from backend.room import Held
from backend.said import Said
from backend.sampling.grammar import Grammars
from backend.store.caches import CacheFolder
from backend.text.messages import Message
from backend.tokenizer.open import open_tokenizer

Progress = Callable[[LoadProgress], None]

PLENTY = 8  # where so many such caches would find memory, all of it is taken while nobody asks for anything


class Prepared:
    """Everything that can be known, and go wrong, before the weights are read."""

    def __init__(
        self,
        preset: Preset,
        path: Path,
        adapters: Sequence[tuple[Path, float]] = (),
        draft: Prepared | None = None,
    ) -> None:
        """`adapters`: LoRA folders and their strengths, put on top of each other. `draft`: what guesses."""
        self.preset, self.draft = preset, draft
        self.checkpoint: Checkpoint = with_overrides(open_checkpoint(path), dict(preset.overrides))
        for folder, strength in adapters:
            self.checkpoint = with_lora(self.checkpoint, folder, strength)
        self.files = [(str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in self.checkpoint.files]
        config = self.checkpoint.config
        if preset.context and preset.context > config.context:
            raise PresetError(
                f"preset {preset.name}: context is {preset.context} tokens, the model was made for {config.context}"
            )
        tokenizer = open_tokenizer(self.checkpoint.tokenizer, config.vocab_size)
        name = model_name(self.checkpoint)
        form = choose_format(preset.prompt_format, tokenizer, f"{name} {config.name}", preset.name)
        self.prompting = Prompting(tokenizer, form, name)
        if draft is not None:
            check_vocabulary(preset.name, tokenizer, draft.preset.name, draft.prompting.tokenizer)
        self.plan = self.planned(None)

    def planned(self, machine: Machine | None) -> Plan:
        """How this preset would run on a machine; None: everything resident, nothing predicted."""
        draft = self.draft.planned(machine) if self.draft is not None else None
        left = without(machine, draft) if machine is not None and draft is not None else machine
        own = plan(self.preset, self.checkpoint.config, self.checkpoint.tensors, left)
        return with_draft(own, draft) if draft is not None else own

    def same(self, other: Prepared) -> bool:
        """Whether loading this one would give what the other is: the same keys, and files unchanged since."""
        drafts = self.draft, other.draft
        same = drafts[0].same(drafts[1]) if drafts[0] is not None and drafts[1] is not None else drafts == (None, None)
        return same and self.preset == other.preset and self.files == other.files


class Runtime:
    """A loaded model that answers."""

    def __init__(
        self,
        prepared: Prepared,
        max_waiting: int,
        progress: Progress = lambda _: None,
        records: Records | None = None,
        caches: CacheFolder | None = None,
    ) -> None:
        """`records`: what is told of requests, and what this model has counted when it goes. `caches`: where its cache
        is kept when it goes and found when it comes again; None: nowhere."""
        torch.set_num_threads(compute_threads())
        self.prepared, self._records, self._closed = prepared, records, False
        self.preset, self.plan = prepared.preset, prepared.plan
        self.checkpoint, self.prompting = prepared.checkpoint, prepared.prompting
        self._said = Said(prepared.prompting.tokenizer)
        self.tokenizer = self.prompting.tokenizer
        self._grammars = Grammars(self.tokenizer, self.prompting.end_ids)
        label = self.preset.title or self.preset.name
        plan, draft = self.plan, prepared.draft
        self._draft: Draft | None = None
        if draft is not None and plan.draft is not None:
            self._draft = Draft(draft.checkpoint, draft.preset, plan.draft, compute_threads(), progress)
        try:
            loaded = load_model(self.checkpoint, self.preset.weights, label, progress, plan.parts, choose(plan.device))
        except BaseException:
            self._close_draft()
            raise
        self._loaded = loaded
        self.weight_bytes, self.bytes_per_token = loaded.weight_bytes, loaded.bytes_per_token
        try:
            self._start(max_waiting, caches)
        except BaseException:  # a cache for which there is no memory, a model that does not compute
            loaded.close()
            self._close_draft()
            raise

    def _start(self, max_waiting: int, caches: CacheFolder | None) -> None:
        """The cache, the engine and its thread, and a first reply."""
        loaded = self._loaded
        config = self.checkpoint.config
        plan = self.plan
        kv_type = KV_TYPES[plan.kv_type]
        self._kv = KVPool(config, plan.kv_blocks, BLOCK_TOKENS, kv_type, loaded.device, plan.host_cache_bytes)
        self.blocks = BlockPool(plan.kv_blocks, BLOCK_TOKENS, self._kv.host)
        threads = Threads(compute_threads(), loaded.bytes_per_token)
        # What is brought or computed elsewhere while a step runs cannot be part of a recorded step.
        whole = all(part.place == "resident" for part in self.plan.parts)
        model = threads.fitted(loaded.model, loaded.output_bytes)
        self.runner = Runner(model, self._kv, threads, graphs=whole)
        drafter = self._draft.model if self._draft is not None else None
        most = MOST_IN_STEP if self.runner.in_one_call else MOST_ALIKE
        speculation = Speculation(drafter=drafter, most_in_step=most) if self.preset.speculation != "off" else None
        # A step that brings weights from elsewhere takes as long for few tokens as for many.
        least = None if plan.ring_bytes else CHUNK_TOKENS
        apart = self.runner.sets_aside and not plan.ring_bytes  # else a step that goes on would bring weights once more
        engine = Engine(self.runner, self.blocks, time.sleep, plan.chunk_tokens, speculation, least, apart=apart)
        self._engine, self._bell = engine, Bell()
        self.runner.before = engine.resting = self._bell.ring
        way = self.preset.weights, self.preset.lora, plan.kv_type, plan.device, BLOCK_TOKENS, self.runner.in_one_call
        numbers = fingerprint(self.prepared.files, config, *way)
        self._keeper = Keeper(caches, numbers, self.blocks, self._kv, config.vocab_size)
        self._keeper.restore()
        plenty = self._kv.nbytes() * PLENTY <= free_bytes(plan.device)
        meanwhile = partial(self._kv.take_ahead, populate) if plenty else lambda: False
        prepare = long_slices if loaded.device.type == "cpu" else lambda: None  # a GPU's threads mostly wait for it
        self.worker = Worker(engine, max_waiting, meanwhile, prepare)
        self._warm_up()
        self._keeper.mark()
        engine.records = self._records  # from now on: nobody asked for the first reply

    @property
    def engine(self) -> Engine:
        """For those who measure: it belongs to a thread of its own while somebody is served."""
        return self._engine

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
        return self._own() if self._draft is None else Held.together([self._draft.held(), self._own()])

    def _own(self) -> Held:
        loaded, device = self._loaded, self.plan.device
        tier = self._kv.host.nbytes() if self._kv.host else 0
        if device == "cpu":
            return Held(device, ram=loaded.resident_bytes + self.plan.ring_bytes + self.kv_used_bytes + tier)
        on_device = loaded.resident_bytes + self.plan.ring_bytes + self.kv_bytes
        return Held(device, ram=loaded.host_bytes + tier, vram=on_device)

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
            cache_blocks_in_use=self.blocks.in_use,
            cache_blocks_cached=self.blocks.n_blocks - self.blocks.in_use - self.blocks.free,
            cache_blocks_free=self.blocks.free,
            cache_blocks_host=self.blocks.hosted,
        )

    def totals(self) -> Totals:
        """What this model has counted since it was loaded; nothing once it is closed, since the records have it."""
        if self._closed:
            return {}
        engine, cache = self._engine.counts, self.blocks.counts
        return {
            "steps": self.runner.steps,
            "model_tokens": self.runner.tokens_evaluated,
            "preemptions": self._engine.scheduler.counts.preemptions,
            "speculation_passes": engine.passes,
            "speculation_drafted_tokens": engine.drafted,
            "speculation_accepted_tokens": engine.accepted,
            "cache_evicted_blocks": cache.evicted,
            "cache_host_stored_blocks": cache.stored,
            "cache_host_restored_blocks": cache.restored,
            "cache_host_dropped_blocks": cache.dropped,
        }

    # ids to a running reply -------------------------------------------------------------------------------------------

    def start_chat(
        self, messages: Sequence[Message], params: GenerationParams, *, trim: bool = False, **options: Any
    ) -> Generation:
        """Answer a chat, in the model's format and with what ends a reply there. Options: those of `start`.

        `trim`: a chat that has outgrown the context is read without its oldest turns instead of being refused;
        `left_out` of the reply says without how many messages.
        """
        encode, size = partial(self.encode_chat, person=options.get("person", "")), self.prompting.message_size
        if trim:
            fitted = fit_chat(messages, encode, size, self.plan.context, params.max_tokens)
        else:
            fitted = Fitted(encode(messages), 0, tuple(messages))
        negative = None
        if params.guidance_scale != 1 and params.negative_prompt:
            negative = encode(with_system(fitted.messages, params.negative_prompt))
        return self.start(fitted.ids, params, chat=True, left_out=fitted.left_out, negative=negative, **options)

    def encode_chat(
        self, messages: Sequence[Message], *, person: str = "", generation_prompt: bool = True
    ) -> list[int]:
        """A chat's prompt: replies of this model as they were drawn, all else as the tokenizer cuts it."""
        ids = self.prompting.encode_chat(messages, generation_prompt=generation_prompt)
        return self._said.as_said(ids, salt_of(person))

    def start_text(self, prompt: str | Sequence[int], params: GenerationParams, **options: Any) -> Generation:
        """Continue raw text, or token ids as they are. Options: those of `start`."""
        encode = self.prompting.encode_text
        negative = encode(params.negative_prompt) if params.guidance_scale != 1 and params.negative_prompt else None
        ids = encode(prompt) if isinstance(prompt, str) else prompt
        return self.start(ids, params, negative=negative, **options)

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
        left_out: int = 0,
        person: str = "",
        negative: Sequence[int] | None = None,
        score_prompt: bool = False,
        only_prompt: bool = False,
    ) -> Generation:
        """Submit; raises before anything runs when the prompt cannot fit or too many wait.

        `generation`: one that has waited for this model. It keeps no reference to this runtime: whoever keeps a reply
        would keep the weights. `person`: of `persons`; people share the engine evenly. `negative`: what a guided reply
        is led away from; by default the prompt's last token, as in transformers. `score_prompt`: the prompt's own
        tokens get log probabilities too, in `prompt_scores` of the reply; `only_prompt`: there is no reply.
        """
        context = self.plan.context
        if len(ids) >= context + only_prompt:
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
        guided = params.guidance_scale != 1 and not only_prompt
        if guided and params.context_shift:
            raise ParameterError("context_shift: not together with guidance_scale", param="context_shift")
        prompting = self.prompting
        stop = (*params.stop, *prompting.stops) if chat else params.stop
        trim = chat and prompting.trims_reply
        generation = generation or Generation.waiting()
        generation.begin(self.tokenizer.token_bytes, stop, tuple(ids), trim_start=trim, bell=self._bell)
        generation.model, generation.left_out = self.name, left_out
        request = Request(
            prompt=tuple(ids),
            params=params,
            end_ids=prompting.end_ids,
            listener=self._said.listening(generation, ids, salt_of(person)) if chat else generation,
            context=context,
            want_logprobs=want_logprobs or top_logprobs is not None,
            top_logprobs=top_logprobs or 0,
            token_bytes=self.tokenizer.token_bytes,
            matcher=self._grammars.matcher(params),
            score_prompt=score_prompt,
            only_prompt=only_prompt,
            use_cache=use_cache,
            person=person,
            salt=salt_of(person),
        )
        if guided:
            add_partner(request, negative or ids[-1:], self.blocks.n_blocks, BLOCK_TOKENS)
        generation.attach(request, request.cancel)
        self.worker.submit(request)
        return generation

    def close(self, *, drain: bool, reason: str | None = None) -> None:
        """Stop the engine thread; with `drain`, after the running replies are finished. `reason` is for the others."""
        if not self.worker.close(drain, reason):
            return
        self._keeper.keep()
        totals, self._closed = self.totals(), True
        if self._records is not None:
            self._records.retire(totals)
        self._loaded.close()
        self._close_draft()

    def _close_draft(self) -> None:
        if self._draft is not None:
            self._draft.close()

    def save_cache(self, path: Path, ids: Sequence[int], person: str = "") -> int:
        """Write what the cache has of a sequence to a file; returns its tokens. See `Keeper.save`."""
        return self.worker.ask(lambda: self._keeper.save(path, ids, salt_of(person)))

    def load_cache(self, path: Path, person: str = "") -> int:
        """Put what `save_cache` wrote into the cache; returns tokens that are new there. See `Keeper.load`."""
        return self.worker.ask(lambda: self._keeper.load(path, salt_of(person)))

    def _warm_up(self) -> None:
        """One short reply, so that the first person does not wait for one-time set-up, and a sick model is refused."""
        # On a GPU a step is recorded as a graph when it comes for the second time; that is one-time set-up too.
        params = GenerationParams(max_tokens=3 if self._kv.device.type == "cuda" else 2, temperature=0.0)
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
