"""The starter's numbers against transformers on the same file, dequantized by the gguf package.

Bounds for bf16 are the project's own; transformers in bf16 is measured beside them to show what that type costs anyway.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import pytest
import torch

from backend.params import GenerationParams
from backend.quality import ModelSource, score
from backend.text.messages import Message
from tests.oracle import reference_logits, reference_model
from tests.real import all_logits, read, starter

TEXT = (Path(__file__).parent / "data" / "alice.txt").read_text(encoding="utf-8")
PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n",
    "Once upon a time, in a village by the sea,",
    "Q: What is 12 + 30?\nA:",
    "The three most important things about llamas are",
]
GREEDY = GenerationParams(temperature=0, max_tokens=64)


@lru_cache(maxsize=1)
def reference():
    return reference_model(starter("f32").checkpoint.path)


@lru_cache(maxsize=1)
def english() -> tuple[list[int], torch.Tensor]:
    """513 tokens of English and the reference's log-probabilities at the first 512."""
    ids = starter("f32").prompting.encode_text(TEXT)[:513]
    assert len(ids) == 513
    return ids, reference_logits(reference(), ids)[:-1].log_softmax(-1)


def cost(logits: torch.Tensor) -> tuple[float, float]:
    """Mean |difference of the actual token's log-probability| and mean KL(reference || ours), in nats."""
    ids, expected = english()
    ours = logits[:-1].log_softmax(-1)
    ids, expected = ids[: len(ours) + 1], expected[: len(ours)]
    actual = torch.tensor(ids[1:])[:, None]
    difference = (expected - ours).gather(1, actual).abs().mean()
    kl = (expected.exp() * (expected - ours)).sum(-1).mean()
    return float(difference), float(kl)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_text_in_f32_is_the_references(prompt):
    # Each token must be the reference's argmax after the same prefix; by induction the whole text is its greedy text.
    runtime = starter("f32")
    ids = runtime.prompting.encode_text(prompt)
    _, reply, last = read(runtime.start(ids, GREEDY, use_cache=False))
    assert last.finish_reason == "length" or reply[-1] in runtime.tokenizer.end_ids
    assert len(reply) == 64 or last.finish_reason == "stop"
    expected = reference_logits(reference(), ids + reply)[len(ids) - 1 : -1].argmax(-1)
    assert reply == expected.tolist()


def test_logits_in_f32_are_the_references():
    ids, expected = english()
    ours = all_logits(starter("f32"), ids)[:-1].log_softmax(-1)
    assert (ours - expected).abs().max() < 5e-3  # float32 summation order over 30 layers; measured 1e-4


@pytest.mark.parametrize("chunk", [512, 1], ids=["prefill", "decode"])
@pytest.mark.parametrize("weights", ["bf16", "original"])
def test_cost_of_bf16_and_of_packed_weights(weights, chunk):
    ids, _ = english()
    # One token at a time is the other code path; a part of the text shows it without taking a minute.
    ids = ids if chunk > 1 else ids[:193]
    difference, kl = cost(all_logits(starter(weights), ids, chunk))
    print(f"{weights}: mean |dlogp| {difference:.4f}, mean KL {kl:.5f} nats")
    assert difference <= 0.05
    assert kl <= 0.002


def test_chunked_prefill_equals_one_pass():
    ids, _ = english()
    runtime = starter("f32")
    whole, pieces = all_logits(runtime, ids[:300], 300), all_logits(runtime, ids[:300], 37)
    torch.testing.assert_close(pieces, whole, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("weights", ["f32", "original"])
def test_a_chat_evaluates_only_what_is_new(weights):
    runtime = starter(weights)
    runtime.blocks.clear()
    questions = ["What is the capital of France?", "And of Italy?", "Name a river there.", "Is it long?", "Why?"]
    params = GenerationParams(temperature=0, max_tokens=24)
    messages: list[Message] = []
    known: list[int] = []  # ids whose keys and values were computed: all but the last drawn one
    for question in questions:
        messages.append(Message("user", question))
        ids = runtime.prompting.encode_chat(messages)
        shared = next((i for i, (a, b) in enumerate(zip(ids, known)) if a != b), min(len(ids), len(known)))
        before = runtime.runner.tokens_evaluated
        text, reply, last = read(runtime.start(ids, params))
        new = len(ids) - shared
        assert shared == len(known), "the reply was tokenized differently when it came back as history"
        assert last.stats.evaluated_tokens == new
        assert last.stats.cached_tokens == shared
        guessed = last.stats.drafted_tokens - last.stats.accepted_tokens  # a right guess is one of the reply's tokens
        assert runtime.runner.tokens_evaluated - before == new + len(reply) - 1 + guessed
        known = (ids + reply)[:-1]
        messages.append(Message("assistant", text))
    _, uncached, _ = read(runtime.start(runtime.prompting.encode_chat(messages[:-1]), params, use_cache=False))
    assert reply == uncached


def test_a_batch_gives_each_what_it_would_get_alone():
    runtime = starter("f32")
    params = GenerationParams(temperature=0.9, seed=11, max_tokens=24)
    prompts = [runtime.prompting.encode_text(prompt) for prompt in PROMPTS]
    alone = [read(runtime.start(ids, params, use_cache=False))[1] for ids in prompts]
    together = [runtime.start(ids, params, use_cache=False) for ids in prompts]
    assert [read(generation)[1] for generation in together] == alone


def test_every_counter_of_memory_is_what_was_planned():
    for weights in ("original", "bf16", "f32"):
        runtime = starter(weights)
        assert runtime.weight_bytes == runtime.plan.weight_bytes
        assert runtime.kv_bytes == runtime.plan.kv_bytes
    assert starter("original").weight_bytes < 0.5 * starter("bf16").weight_bytes  # packed stays packed
    assert starter("bf16").weight_bytes * 2 == pytest.approx(starter("f32").weight_bytes, rel=0.001)


def test_perplexity_in_f32_is_the_references():
    """One window of 512 tokens, its second half scored."""
    ids, expected = english()
    found = score(ModelSource(starter("f32")), [ids[:512]], None)
    actual = torch.tensor(ids[257:512])[:, None]
    mean = -expected[256:511].double().gather(1, actual).mean()
    assert found.tokens == 255
    assert found.perplexity == pytest.approx(float(mean.exp()), rel=1e-4)
