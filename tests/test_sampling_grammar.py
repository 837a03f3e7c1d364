"""Replies that follow a grammar: JSON schema, regular expression, GBNF; and grammars that ask for too much."""

from __future__ import annotations

import itertools
import json
import re
from typing import Any

import numpy as np
import pytest

from backend.errors import ParameterError, SamplingError
from backend.events import Chunk
from backend.params import GenerationParams
from backend.runtime import Runtime
from backend.sampling import grammar
from backend.sampling.grammar import Grammars
from tests.real import read, starter, tiny_runtime
from tests.tiny import TinyModel, write_tiny

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory):
    """A model of random weights: what its replies keep to, they keep to by the grammar alone."""
    runtime = tiny_runtime(write_tiny(tmp_path_factory.mktemp("tiny") / "tiny.gguf", TinyModel()), context=256)
    yield runtime
    runtime.close(drain=False)


def reply(runtime: Runtime, **values: Any) -> tuple[str, list[int], Chunk]:
    prompt = runtime.prompting.encode_text("hello")
    values = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "max_tokens": 0} | values
    return read(runtime.start(prompt, GenerationParams.from_mapping(values)))


@pytest.mark.parametrize("seed", range(6))
def test_json_schema(runtime: Runtime, seed: int) -> None:
    text, _, last = reply(runtime, json_schema=json.dumps(PERSON), seed=seed)
    assert last.finish_reason == "stop"
    found = json.loads(text)
    assert set(found) == {"name", "age"}
    assert isinstance(found["name"], str)
    assert 0 <= found["age"] <= 150


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("regex", [r"[0-9]{3}-[a-f]{2,5}", r"(yes|no)", r"ä+ö{2}", r"\d\d:\d\d"])
def test_regular_expressions(runtime: Runtime, regex: str, seed: int) -> None:
    text, _, last = reply(runtime, regex=regex, seed=seed, repetition_penalty=2.0)
    assert last.finish_reason == "stop"
    assert re.fullmatch(regex, text)


@pytest.mark.parametrize("seed", range(6))
def test_gbnf(runtime: Runtime, seed: int) -> None:
    grammar = 'root ::= "(" item ("," item)? ")"\nitem ::= [a-c]{2} | root'
    text, _, last = reply(runtime, grammar=grammar, seed=seed, logit_bias={3 + ord(")") - 33: 5})
    assert last.finish_reason in ("stop", "length")
    if last.finish_reason == "stop":
        while "(" in text:
            text, smaller = re.sub(r"\((?:[a-c]{2}|x)(?:,(?:[a-c]{2}|x))?\)", "x", text), text
            assert text != smaller
        assert text == "x"


def test_an_end_that_the_grammar_wants_comes_in_spite_of_other_rules(runtime: Runtime) -> None:
    text, _, last = reply(runtime, regex="ab?", min_tokens=50, ignore_eos=True, seed=1)
    assert last.finish_reason == "stop"
    assert text in ("a", "ab")


def test_repetitions_that_the_grammar_wants(runtime: Runtime) -> None:
    text, _, last = reply(runtime, regex="aaaa", no_repeat_ngram=1, seed=1)
    assert (text, last.finish_reason) == ("aaaa", "stop")


def test_banned_texts_within_a_grammar(runtime: Runtime) -> None:
    for seed in range(10):
        text, _, last = reply(runtime, regex="(abc|abd|xyz)e", banned_strings=["bc", "xy"], seed=seed)
        assert (text, last.finish_reason) == ("abde", "stop")
    _, _, last = reply(runtime, regex="(abc|xyz)", banned_strings=["bc", "xy"])
    assert isinstance(last.error, SamplingError)


def test_the_same_seed_gives_the_same_reply_beside_others(runtime: Runtime) -> None:
    values: dict[str, Any] = {"json_schema": json.dumps(PERSON), "seed": 4}
    alone = reply(runtime, **values)[1]
    prompt = runtime.prompting.encode_text("hello")
    running = [
        runtime.start(prompt, GenerationParams.from_mapping({"max_tokens": 60, "temperature": 1.0, **more}))
        for more in (
            {"seed": 8},
            values | {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "max_tokens": 0},
            {"regex": "[a-z]+!"},
        )
    ]
    assert [read(generation)[1] for generation in running][1] == alone


WRONG = [
    ({"json_schema": "{"}, "json_schema: this is not JSON"),
    ({"json_schema": "[]"}, "a schema is a JSON object"),
    ({"json_schema": '{"type": "objct"}'}, "json_schema: Invalid type"),
    ({"json_schema": '{"$ref": "http://127.0.0.1/x"}'}, "does not fetch"),
    ({"regex": "(["}, "regex: .*unclosed"),
    ({"grammar": "root ::= nothing"}, "grammar: Rule 'nothing' not found"),
    ({"grammar": "("}, "grammar: "),
    ({"grammar": 'root ::= "a"' + "(" * 20_000}, "grammar: "),
    ({"regex": "a", "grammar": 'root ::= "a"'}, "one of them only"),
]


@pytest.mark.parametrize(("values", "words"), WRONG, ids=[str(values)[:40] for values, _ in WRONG])
def test_what_is_no_grammar_is_refused_before_anything_runs(runtime: Runtime, values: dict, words: str) -> None:
    with pytest.raises(ParameterError, match=words) as caught:
        reply(runtime, **values)
    assert caught.value.param in values


def test_a_grammar_that_takes_too_much_work_ends_its_own_reply_only(runtime: Runtime) -> None:
    prompt = runtime.prompting.encode_text("hello")
    hostile = GenerationParams(
        regex="(.*a.{200}|b.{1,3000}c)*x", temperature=2.0, top_k=0, top_p=1, max_tokens=0, seed=1
    )
    bad = runtime.start(prompt, hostile)
    good = runtime.start(prompt, GenerationParams(max_tokens=20, temperature=0, ignore_eos=True))
    assert read(good)[2].finish_reason == "length"
    last = read(bad)[2]
    assert last.error is None or isinstance(last.error, SamplingError)


def test_limits_are_reached() -> None:
    """On the starter's vocabulary, where a step is more work."""
    runtime = starter("original")
    matcher = Grammars(runtime.tokenizer, runtime.prompting.end_ids).matcher(
        GenerationParams(regex="(.*a.{200}|b.{1,3000}c)*x")
    )
    assert matcher is not None
    random, size = np.random.default_rng(0), runtime.tokenizer.vocab_size
    with pytest.raises(SamplingError, match=r"cannot go on: .*too many states"):
        for _ in range(400):
            matcher.accept(int(random.choice(np.flatnonzero(matcher.allowed(size)))))


def test_the_mask_is_what_the_tokens_bytes_say() -> None:
    """The slow twin: every token's own bytes against the expression."""
    runtime = starter("original")
    matcher = Grammars(runtime.tokenizer, runtime.prompting.end_ids).matcher(GenerationParams(regex="[a-m ]{1,8}7"))
    assert matcher is not None
    size, ends = runtime.tokenizer.vocab_size, runtime.prompting.end_ids
    pieces = [runtime.tokenizer.token_bytes(token) for token in range(size)]
    said = b""
    for word in (b"", b" bad", b"ge"):
        if word:
            token = pieces.index(word)
            matcher.accept(token)
            said += word
        possible = re.compile(rb"[a-m ]{1,8}(7|$)")
        expected = [bool(p) and possible.fullmatch(said + p) is not None for p in pieces]
        assert np.array_equal(np.flatnonzero(matcher.allowed(size)), np.flatnonzero(expected))
    matcher.accept(pieces.index(b"7"))
    assert matcher.complete
    assert set(np.flatnonzero(matcher.allowed(size + 7)).tolist()) == set(ends), "and the ends, in a longer row as well"


def test_taking_tokens_back() -> None:
    runtime = starter("original")
    matcher = Grammars(runtime.tokenizer, runtime.prompting.end_ids).matcher(GenerationParams(regex="ab(cd)+e"))
    assert matcher is not None
    size, tokens = runtime.tokenizer.vocab_size, [runtime.tokenizer.encode(letter)[0] for letter in "abcde"]
    masks = []
    for token in tokens:
        masks.append(matcher.allowed(size))
        matcher.accept(token)
    for back in (1, 2):
        matcher.rewind(back)
        at = 5 - back
        np.testing.assert_array_equal(matcher.allowed(size), masks[at])
        for token in tokens[at:]:
            matcher.accept(token)
    assert matcher.complete


def test_chains_that_would_end_the_process_are_refused() -> None:
    names = [f"a{n}" for n in range(1500)]
    links = {name: {"$ref": f"#/$defs/{after}"} for name, after in itertools.pairwise(names)}
    schema = {"$defs": links | {names[-1]: {"type": "string"}}, "$ref": "#/$defs/a0"}
    with pytest.raises(ValueError, match="a schema may have 200"):
        grammar._json_schema(json.dumps(schema))
    with pytest.raises(ValueError, match="a schema may have 200"):
        grammar._json_schema(json.dumps(schema).replace("$ref", r"$\u0072ef"))
    with pytest.raises(ValueError, match="a grammar may have 500"):
        grammar._gbnf("\n".join(f"r{n} ::= r{n + 1}" for n in range(4000)))
