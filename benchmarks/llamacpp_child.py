"""llama.cpp in a process of its own, told by lines of JSON what to measure. Runs in the peer's environment, not ours.

A line {"model": path, "threads": n, "context": n, "repack": true} loads; with "repack" weights take its layouts for
this processor. {"prompt": [ids], "reply": n} reads a prompt into an empty cache, goes on with the likeliest tokens, and
answers with the seconds to the first token and of the whole reply.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from typing import Any

import llama_cpp
import numpy as np


@llama_cpp.llama_log_callback
def silent(level: int, text: bytes, data: ctypes.c_void_p) -> None:
    """What llama.cpp says while it loads."""


class Model:
    """A loaded model and one sequence of it."""

    def __init__(self, path: str, threads: int, context: int, repack: bool) -> None:
        how = llama_cpp.llama_model_default_params()
        how.use_extra_bufts = repack
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), how)
        if not self.model:
            raise RuntimeError(f"llama.cpp does not load {path}")
        about = llama_cpp.llama_context_default_params()
        about.n_ctx, about.n_batch, about.n_threads, about.n_threads_batch = context, 512, threads, threads
        self.context = llama_cpp.llama_init_from_model(self.model, about)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def close(self) -> None:
        llama_cpp.llama_free(self.context)
        llama_cpp.llama_model_free(self.model)

    def next(self, ids: list[int]) -> int:
        """Evaluate tokens and return the likeliest next one."""
        for first in range(0, len(ids), 512):
            part = ids[first : first + 512]
            tokens = (llama_cpp.llama_token * len(part))(*part)
            if llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(tokens, len(part))):
                raise RuntimeError("llama_decode failed")
        logits = llama_cpp.llama_get_logits_ith(self.context, -1)
        return int(
            np.ctypeslib.as_array(ctypes.cast(logits, ctypes.POINTER(ctypes.c_float)), (self.vocabulary,)).argmax()
        )

    def reply(self, prompt: list[int], count: int) -> dict[str, float]:
        """Seconds to the first token and of all `count`."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        begun = time.perf_counter()
        token = self.next(prompt)
        first = time.perf_counter() - begun
        for _ in range(count - 1):
            token = self.next([token])
        return {"first": first, "total": time.perf_counter() - begun}


def main() -> None:
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    model: Any = None
    for line in sys.stdin:
        asked = json.loads(line)
        if "model" in asked:
            if model is not None:
                model.close()
            model = Model(asked["model"], asked["threads"], asked["context"], asked["repack"])
            answer: dict[str, Any] = {"system": llama_cpp.llama_print_system_info().decode()}
        else:
            answer = model.reply(asked["prompt"], asked["reply"])
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
