"""Damaged tokenizer files, a few hundred of each kind: one sentence or a tokenizer that works, never anything else."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from backend.errors import CheckpointError
from backend.tokenizer.open import open_tokenizer
from backend.tokenizer.source import TokenizerSource
from tests import test_tokenizer_json, test_tokenizer_ranks, test_tokenizer_sentence

CASES = 200


def small_json() -> bytes:
    return test_tokenizer_json.made("llama3").encode()


def small_ranks() -> bytes:
    return b"".join(test_tokenizer_ranks.GOOD)


def small_model() -> bytes:
    return test_tokenizer_sentence.trained()


def small_unigram() -> bytes:
    return test_tokenizer_sentence.trained(model_type="unigram", user_defined_symbols="<think>,▁▁,abc")


def damaged(data: bytes, chance: random.Random) -> bytes:
    kind = chance.randrange(4)
    at = chance.randrange(len(data))
    if kind == 0:
        return data[:at]
    if kind == 1:  # a few bytes changed
        changed = bytearray(data)
        for _ in range(chance.randrange(1, 8)):
            changed[chance.randrange(len(data))] = chance.choice([0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)])
        return bytes(changed)
    if kind == 2:  # a part twice, or away
        end = min(len(data), at + chance.randrange(1, 200))
        return data[:at] + data[at:end] * chance.choice([0, 2, 3]) + data[end:]
    return data[:at] + chance.randbytes(chance.randrange(1, 20)) + data[at:]


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("tokenizer.model", small_model),
        ("tokenizer.model", small_unigram),
        ("tokenizer.model", small_ranks),
        ("tokenizer.json", small_json),
    ],
)
def test_damaged_files(tmp_path: Path, name: str, make) -> None:
    chance = random.Random(make.__name__)
    data, refused = make(), 0
    for _ in range(CASES):
        (tmp_path / name).write_bytes(damaged(data, chance))
        try:
            tokenizer = open_tokenizer(TokenizerSource("folder", tmp_path), 4096)
            ids = tokenizer.encode("hello the 1234 🙂<think>  \n")
        except CheckpointError as error:
            refused += 1
            assert str(tmp_path) in str(error)
            assert "\n" not in str(error)
            continue
        assert all(0 <= token < tokenizer.vocab_size for token in ids)
        assert not set(ids) & set(tokenizer.control_tokens().values()) - {tokenizer.unk_id}
    assert refused >= CASES // 8, "most damage must be noticed"


def other_value(chance: random.Random):
    return chance.choice(
        [None, True, -1, 0, 3, 1 << 70, 1.5, "", "a", "\u2581", [], {}, [["a", "b"]], {"type": "x"}, [1]]
    )


def test_json_with_other_values_in_it(tmp_path: Path) -> None:
    """Whole JSON in which a part somewhere is something else, or missing."""
    chance = random.Random(7)
    refused = 0
    for number in range(3 * CASES):
        content = json.loads(test_tokenizer_json.made(("llama3", "prepend", "first")[number % 3]))
        place = content
        while True:
            key = chance.choice(list(place) if isinstance(place, dict) else range(len(place)))
            if not isinstance(place[key], dict | list) or not place[key] or chance.random() < 0.25:
                break
            place = place[key]
        if chance.random() < 0.2:
            del place[key]
        else:
            place[key] = other_value(chance)
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
        try:
            tokenizer = open_tokenizer(TokenizerSource("folder", tmp_path), 4096)
            ids = tokenizer.encode("hello the 1234 🙂<think>  \n")
        except CheckpointError:
            refused += 1
            continue
        assert all(0 <= token < tokenizer.vocab_size for token in ids)
    assert CASES <= refused < 3 * CASES


def test_every_beginning_of_a_small_model(tmp_path: Path) -> None:
    data = small_model()
    for length in range(0, len(data), 41):
        (tmp_path / "tokenizer.model").write_bytes(data[:length])
        try:
            open_tokenizer(TokenizerSource("folder", tmp_path), 4096)
        except CheckpointError:
            continue
