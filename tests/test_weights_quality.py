"""What quantising while loading costs the starter: perplexity beside float32 values of the same file."""

from __future__ import annotations

import pytest
import torch

from backend.checkpoint.open import open_checkpoint
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


def log_perplexity(weights: str, ids: list[int]) -> float:
    """Mean of -log p of each token after the first, by the path of a long prompt."""
    checkpoint = open_checkpoint(ModelFolder(Settings().models_dir).resolve("starter", PROJECT))
    logits = Session(checkpoint, weights, TOKENS).logits(ids, chunk=256)
    found = torch.log_softmax(logits[:-1].double(), -1).gather(1, torch.tensor(ids[1:])[:, None])
    return -float(found.mean())


def test_perplexity_of_the_starter_in_each_form(ids: list[int]) -> None:
    exact = log_perplexity("f32", ids)
    assert abs(log_perplexity("int8", ids) - exact) < 0.01  # one percent
    assert abs(log_perplexity("int4", ids) - exact) < 0.005  # its own codes
    assert abs(log_perplexity("llm-int8", ids) - exact) < 0.06  # 2.4 percent over 1,023 tokens
    assert log_perplexity("nf4", ids) - exact < 0.35  # 22 percent: 4-bit weights quantised a second time
