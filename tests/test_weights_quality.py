"""What quantising while loading costs the starter: perplexity beside float32 values of the same file."""

from __future__ import annotations

import pytest
import torch

from backend.checkpoint.open import open_checkpoint
from backend.kernels.cpu.build import compiled_products
from backend.models import ModelFolder
from backend.settings import PROJECT, Settings
from tests.forward import Session
from tests.real import starter

TEXT = PROJECT / "backend" / "data" / "wonderland.txt"
TOKENS = 512


@pytest.fixture(scope="module")
def ids() -> list[int]:
    text = TEXT.read_text(encoding="utf-8")[20000:24000]
    return starter("original").prompting.encode_text(text)[:TOKENS]


def log_probabilities(weights: str, ids: list[int]) -> torch.Tensor:
    """float64 (tokens - 1, vocabulary): of every token after the first, by the path of a long prompt."""
    checkpoint = open_checkpoint(ModelFolder(Settings().models_dir).resolve("starter", PROJECT))
    logits = Session(checkpoint, weights, TOKENS).logits(ids, chunk=256)
    return torch.log_softmax(logits[:-1].double(), -1)


def log_perplexity(found: torch.Tensor, ids: list[int]) -> float:
    """Mean of -log p of the actual tokens."""
    return -float(found.gather(1, torch.tensor(ids[1:])[:, None]).mean())


def test_perplexity_of_the_starter_in_each_form(ids: list[int]) -> None:
    wanted = log_probabilities("f32", ids)
    exact = log_perplexity(wanted, ids)
    found = log_probabilities("int8", ids)
    in_tiles = compiled_products()  # a scale for each 32 weights, else for each row
    assert abs(log_perplexity(found, ids) - exact) < (0.004 if in_tiles else 0.01)
    assert float((wanted.exp() * (wanted - found)).sum(-1).mean()) < (0.002 if in_tiles else 0.005)  # KL divergence
    assert abs(log_perplexity(log_probabilities("int4", ids), ids) - exact) < 0.005  # its own codes
    assert abs(log_perplexity(log_probabilities("llm-int8", ids), ids) - exact) < 0.06  # 2.4 percent over 1,023 tokens
    assert (
        log_perplexity(log_probabilities("nf4", ids), ids) - exact < 0.35
    )  # 22 percent: 4-bit weights quantised a second time
