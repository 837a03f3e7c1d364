"""How many threads a step computes with.

A product of one token is over in microseconds when the model is small, and then a thread more brings little: what it
saves is spent on waiting for each other, a hundred times a token. Worse, on a machine that also draws the page, all
threads stand still whenever the browser takes one core for a moment. So a step of few tokens uses only as many threads
as have something to do, and a long prompt uses all.
"""

from __future__ import annotations

import dataclasses

import torch

from backend.model.llama import Llama, Multiply

# What a thread should have to read in one token: about 6 ms of streaming, against roughly 1 ms of waiting at barriers.
BYTES_PER_THREAD = 128 << 20
FEW_TOKENS = 4
# Bytes of a product that is worth all threads by itself, also in a step of few tokens: a large vocabulary's output.
LARGE_PRODUCT = 16 << 20


class Threads:
    """Chosen by size and not by timing, so that the same machine always computes in the same way."""

    def __init__(self, cores: int, bytes_per_token: int) -> None:
        self.all = cores
        self.few = max(1, min(cores, -(-bytes_per_token // BYTES_PER_THREAD)))

    def use(self, tokens: int) -> None:
        """Set torch's threads, of the calling thread, for a step of so many tokens."""
        wanted = self.few if tokens <= FEW_TOKENS else self.all
        if torch.get_num_threads() != wanted:
            torch.set_num_threads(wanted)

    def fitted(self, model: Llama, output_bytes: int) -> Llama:
        """The model, with an output that brings its own threads where it is large enough to be worth it."""
        if output_bytes < LARGE_PRODUCT or self.few == self.all:
            return model
        return dataclasses.replace(model, output=AllThreads(model.output, self.all))


class AllThreads:
    """A weight that multiplies with all threads whatever the step around it uses."""

    def __init__(self, multiply: Multiply, threads: int) -> None:
        self.multiply, self._threads = multiply, threads

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        around = torch.get_num_threads()
        if around == self._threads:
            return self.multiply(x)
        torch.set_num_threads(self._threads)
        try:
            return self.multiply(x)
        finally:
            torch.set_num_threads(around)
