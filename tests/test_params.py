"""Generation parameters: one declaration, strict values, errors that name the parameter."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backend.errors import ParameterError, UserError, nearest
from backend.params import KNOBS, GenerationParams

NUMBERS = [knob for knob in KNOBS if knob.kind in ("int", "float")]


def test_knobs_are_the_fields() -> None:
    assert [knob.name for knob in KNOBS] == [field.name for field in dataclasses.fields(GenerationParams)]
    for knob in KNOBS:
        assert knob.label
        assert knob.help.endswith(".")
        assert knob.group


def test_defaults_and_neutral_values_are_allowed() -> None:
    assert GenerationParams().changed() == {}
    neutral = GenerationParams(**{knob.name: knob.neutral for knob in KNOBS})
    assert [getattr(neutral, knob.name) for knob in KNOBS] == [knob.neutral for knob in KNOBS]


@pytest.mark.parametrize("knob", NUMBERS, ids=lambda knob: knob.name)
def test_both_ends_of_a_range_belong_to_it(knob) -> None:
    for value in (knob.low, knob.high):
        assert getattr(GenerationParams.from_mapping({knob.name: value}), knob.name) == value
    step = 1 if knob.kind == "int" else 1e-6
    for value in (knob.low - step, knob.high + step):
        with pytest.raises(ParameterError) as caught:
            GenerationParams.from_mapping({knob.name: value})
        assert caught.value.param == knob.name
        assert knob.name in caught.value.message
        assert f"{knob.low:g}" in caught.value.message
        assert f"{knob.high:g}" in caught.value.message


WRONG: list[object] = [
    None,
    True,
    False,
    "1",
    [],
    {},
    float("nan"),
    float("inf"),
    float("-inf"),
    10**400,
    -(10**400),
    1j,
    b"1",
]


@pytest.mark.parametrize("knob", NUMBERS, ids=lambda knob: knob.name)
@pytest.mark.parametrize("value", WRONG, ids=lambda value: repr(value)[:12])
def test_what_is_no_number_in_range(knob, value: object) -> None:
    with pytest.raises(ParameterError) as caught:
        GenerationParams.from_mapping({knob.name: value})
    assert caught.value.param == knob.name


def test_types_are_made_right() -> None:
    params = GenerationParams.from_mapping({"temperature": 1, "top_k": 5.0, "seed": 3.0, "stop": ["a", "", "b"]})
    assert (type(params.temperature), type(params.top_k), type(params.seed)) == (float, int, int)
    assert params.stop == ("a", "b")
    with pytest.raises(ParameterError, match="whole number"):
        GenerationParams(top_k=1.5)  # type: ignore[arg-type]


def test_seed() -> None:
    assert GenerationParams(seed=None).seed is None
    assert GenerationParams.from_mapping({"seed": ""}).seed is None
    assert GenerationParams(seed=2**63 - 1).seed == 2**63 - 1
    for bad in (-1, 2**63, True, "7", 10**400):
        with pytest.raises(ParameterError):
            GenerationParams.from_mapping({"seed": bad})


def test_stop_strings() -> None:
    assert GenerationParams.from_mapping({"stop": "one"}).stop == ("one",)
    assert GenerationParams.from_mapping({"stop": None}).stop == ()
    assert len(GenerationParams.from_mapping({"stop": ["x"] * 16}).stop) == 16
    for bad in (["x"] * 17, [1], {"a": 1}, 3, "x" * 1001, [None]):
        with pytest.raises(ParameterError) as caught:
            GenerationParams.from_mapping({"stop": bad})
        assert caught.value.param == "stop"


def test_unknown_names_get_a_suggestion() -> None:
    for typo, name in [("temprature", "temperature"), ("topp", "top_p"), ("max_token", "max_tokens"), ("sed", "seed")]:
        with pytest.raises(ParameterError, match=f"did you mean '{name}'") as caught:
            GenerationParams.from_mapping({typo: 1})
        assert caught.value.param == typo
    with pytest.raises(ParameterError, match=r"unknown parameter 'zzzzz'$"):
        GenerationParams.from_mapping({"zzzzz": 1})


def test_base_is_kept_where_nothing_else_is_said() -> None:
    base = GenerationParams(temperature=0.1, top_k=3)
    params = GenerationParams.from_mapping({"top_k": 4}, base)
    assert (params.temperature, params.top_k) == (0.1, 4)
    assert params.changed() == {"temperature": 0.1, "top_k": 4}


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from([knob.name for knob in KNOBS]), st.from_type(object) | st.none() | st.floats()))
def test_any_value_is_taken_or_refused_in_words(values: dict) -> None:
    try:
        params = GenerationParams.from_mapping(values)
    except UserError as error:
        assert error.param in values
    else:
        assert GenerationParams.from_mapping(params.changed()) == params


def test_nearest() -> None:
    assert nearest("tpo_k", ["top_k", "seed"]) == "; did you mean 'top_k'?"
    assert nearest("qqqq", ["top_k"]) == ""
    assert nearest("x", []) == ""


def test_lists_of_tokens() -> None:
    params = GenerationParams.from_mapping(
        {"logit_bias": {"7": 2, 3: -100.0}, "stop_token_ids": [5, 2, 5], "sampler_order": ["min_p", "temperature"]}
    )
    assert params.logit_bias == ((3, -100.0), (7, 2.0))
    assert params.stop_token_ids == (2, 5)
    assert params.sampler_order == ("min_p", "temperature")
    assert GenerationParams.from_mapping(params.changed()) == params
    assert hash(params) == hash(GenerationParams.from_mapping(json.loads(json.dumps(params.changed()))))
    for name, bad in [
        ("logit_bias", {"x": 1}), ("logit_bias", {"-1": 1}), ("logit_bias", {"5": 101}), ("logit_bias", {"5": None}),
        ("logit_bias", [5]), ("logit_bias", "5"), ("logit_bias", dict.fromkeys(range(1025), 1)),
        ("stop_token_ids", [1.5]), ("stop_token_ids", [True]), ("stop_token_ids", list(range(257))),
        ("sampler_order", ["min_p", "min_p"]), ("sampler_order", [1]), ("sampler_order", ["minp"]),
        ("ignore_eos", 1), ("grammar", "x" * 100_001), ("grammar", 5), ("banned_strings", ["x"] * 257),
    ]:  # fmt: skip
        with pytest.raises(ParameterError) as caught:
            GenerationParams.from_mapping({name: bad})
        assert caught.value.param == name


def test_tokens_are_checked_against_the_vocabulary() -> None:
    params = GenerationParams(logit_bias={9: 1.0}, stop_token_ids=(4,))  # type: ignore[arg-type]
    params.check_tokens(10)
    with pytest.raises(ParameterError, match="logit_bias: found token id 9, expected ids from 0 to 8"):
        params.check_tokens(9)
