"""A loaded model's cache in files: one that is kept over a restart, and those that somebody asks for.

The first is written when the model goes and found again when the same model comes. Only what belongs to nobody in
particular is in it: blocks with a salt, which are those of people with a key or a login, never leave the process unless
they are asked for by name.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from backend.cache.blocks import BlockPool
from backend.cache.kv import KVPool
from backend.engine.saved import load_blocks, save_blocks
from backend.errors import UserError
from backend.kernels.cpu.build import library
from backend.settings import VERSION
from backend.store.caches import CacheFolder

SECONDS = 5.0  # that writing may take, because somebody waits for the end or for the next model

log = logging.getLogger(__name__)


def fingerprint(*parts: object) -> bytes:
    """SHA-256 of what decides which keys and values a text has: `parts` of the model and its plan, by their repr, and
    the programs that compute."""
    built = [Path(str(getattr(library(name), "_name", ""))).name for name in ("product", "step")]
    return hashlib.sha256(repr((VERSION, torch.__version__, built, *parts)).encode()).digest()


class Keeper:
    """Of one loaded model. Used by one thread at a time, and never beside a step."""

    def __init__(self, folder: CacheFolder | None, model: bytes, pool: BlockPool, kv: KVPool, vocabulary: int) -> None:
        """folder: where the cache is kept over a restart; None: nowhere. model: its fingerprint."""
        self._folder, self._model, self._pool, self._kv, self._vocabulary = folder, model, pool, kv, vocabulary
        self._file = folder.file(model.hex()) if folder else None
        self._mark = pool.clock

    def restore(self) -> int:
        """What was kept of this model, back into the cache. Returns tokens; a file that is of no use is a line in the
        log."""
        if self._folder is None or self._file is None or not self._file.is_file():
            return 0
        try:
            found = self.load(self._file)
            self._folder.used(self._file)
        except (UserError, OSError) as error:
            log.warning("the kept cache is not used: %s", error)
            return 0
        return found

    def mark(self) -> None:
        """What happened up to now is not worth writing."""
        self._mark = self._pool.clock

    def keep(self) -> int:
        """Write what was used last, within the folder's limit, if anything was used at all. Returns tokens."""
        if self._folder is None or self._file is None or self._pool.clock == self._mark:
            return 0
        self.mark()
        block_bytes = sum(array.nbytes for array in self._kv.block(0)) + 4 * self._kv.block_size + 8
        try:
            self._kv.carry_out(self._pool.take_moves())
            nodes = self._pool.latest(max(0, self._folder.limit - 4096) // block_bytes)
            if not nodes:
                return 0
            tokens = save_blocks(self._file, self._model, self._kv, nodes, SECONDS)
            self._folder.make_room(self._file)
        except Exception as error:  # for want of memory, say: the model has to go all the same
            log.warning("the cache is not kept: %s", error)
            return 0
        return tokens

    def save(self, path: Path, ids: Sequence[int], salt: bytes = b"") -> int:
        """Write what the cache has of this sequence. Returns its tokens; 0: it has nothing, so there is no file.

        Raises UserError where the file cannot be written.
        """
        self._kv.carry_out(self._pool.take_moves())
        nodes = self._pool.latest(len(ids), ids, salt)
        return save_blocks(path, self._model, self._kv, nodes) if nodes else 0

    def load(self, path: Path, salt: bytes = b"") -> int:
        """Put what `save` wrote into the cache, as far as there is room. Returns tokens that were not there.

        Raises SavedCacheError, and changes nothing, for a file that is damaged or of another model.
        """
        return load_blocks(path, self._model, self._pool, self._kv, self._vocabulary, salt)
