"""A draft preset beside a loaded model: its weights, its cache, and the `DraftModel` that guesses with them."""

from __future__ import annotations

from collections.abc import Callable

from backend.cache.blocks import BlockPool
from backend.cache.kv import KV_TYPES, KVPool
from backend.checkpoint.base import Checkpoint
from backend.engine.runner import Runner
from backend.engine.speculation_draft import DraftModel
from backend.engine.threads import Threads
from backend.errors import PresetError
from backend.events import LoadProgress
from backend.placement.devices import choose
from backend.placement.load import load_model
from backend.placement.plan import BLOCK_TOKENS, Plan
from backend.presets import Preset
from backend.room import Held
from backend.tokenizer.base import Tokenizer


class Draft:
    """Loaded when made; raises as `load_model` does."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        preset: Preset,
        plan: Plan,
        cores: int,
        progress: Callable[[LoadProgress], None] = lambda _: None,
    ) -> None:
        label = preset.title or preset.name
        loaded = load_model(checkpoint, preset.weights, label, progress, plan.parts, choose(plan.device))
        self._loaded, self._plan = loaded, plan
        try:
            self._kv = KVPool(checkpoint.config, plan.kv_blocks, BLOCK_TOKENS, KV_TYPES[plan.kv_type], loaded.device)
            threads = Threads(cores, loaded.bytes_per_token)
            whole = all(part.place == "resident" for part in plan.parts)
            runner = Runner(threads.fitted(loaded.model, loaded.output_bytes), self._kv, threads, graphs=whole)
            self.model = DraftModel(runner, BlockPool(plan.kv_blocks, BLOCK_TOKENS), plan.context)
        except BaseException:
            loaded.close()
            raise

    def held(self) -> Held:
        """What returns when it is unloaded."""
        loaded, plan = self._loaded, self._plan
        taken = loaded.resident_bytes + plan.ring_bytes + self._kv.nbytes()
        if plan.device == "cpu":
            return Held(plan.device, ram=taken)
        return Held(plan.device, ram=loaded.host_bytes, vram=taken)

    def close(self) -> None:
        self._loaded.close()


def check_vocabulary(preset: str, tokenizer: Tokenizer, draft: str, other: Tokenizer) -> None:
    """A guess is a token id, so an id must mean the same to both models."""
    sizes = tokenizer.vocab_size, other.vocab_size
    if sizes[0] != sizes[1]:
        raise PresetError(
            f"preset {preset}: speculation: the draft preset '{draft}' has a vocabulary of {sizes[1]} tokens, expected "
            f"the {sizes[0]} of this model"
        )
    for token in range(sizes[0]):
        if tokenizer.token_bytes(token) != other.token_bytes(token):
            raise PresetError(
                f"preset {preset}: speculation: token {token} of the draft preset '{draft}' is "
                f"{other.token_bytes(token)!r}, expected {tokenizer.token_bytes(token)!r} as in this model"
            )
