"""Handlers of the Parameters tab without a browser: what a choice of a set does, however often it is reported."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import gradio as gr

from backend.params import KNOBS, GenerationParams
from tests.fakes import FakeService
from ui.door import Context
from ui.parameters_tab import OWN, _Handlers, show_params
from ui.sessions import Registry

REQUEST: Any = SimpleNamespace(session_hash="page", username=None)
PLACE = [knob.name for knob in KNOBS].index("temperature")


def handlers() -> tuple[_Handlers, FakeService, Registry]:
    service, registry = FakeService(), Registry()
    return _Handlers(Context(service, registry)), service, registry


def pick(tab: _Handlers, name: str) -> list[Any]:
    return asyncio.run(tab.pick(REQUEST, name))


def values_with(temperature: float) -> list[Any]:
    values = show_params(GenerationParams())
    values[PLACE] = temperature
    return values


def test_a_choice_that_is_reported_twice_is_put_in_once() -> None:
    tab, _, _ = handlers()
    assert pick(tab, "Precise")[PLACE] == 0.0
    # the second report may be answered after the person has typed: it must not bring the old value back
    again = pick(tab, "Precise")
    assert all(isinstance(value, dict) and value.get("__type__") == "update" for value in again)
    assert again[PLACE] == gr.skip()


def test_a_set_can_be_chosen_again_after_a_change() -> None:
    tab, service, registry = handlers()
    pick(tab, "Precise")
    assert asyncio.run(tab.changed(REQUEST, *values_with(0.3)))[2] == OWN
    assert pick(tab, OWN)[PLACE] == gr.skip()
    assert pick(tab, "Precise")[PLACE] == 0.0
    asyncio.run(tab.changed(REQUEST, *values_with(0.3)))
    tab.save(REQUEST, "Careful", *values_with(0.3))
    assert service.sets["Careful"].temperature == 0.3
    assert pick(tab, "Careful")[PLACE] == gr.skip(), "its values are there"
    for other in (tab.defaults, tab.neutral):
        assert len(asyncio.run(other(REQUEST))) == len(KNOBS) + 3
        assert pick(tab, "Careful")[PLACE] == 0.3
    tab.delete(REQUEST, "Careful")
    assert pick(tab, "Creative")[PLACE] == 1.1
    assert registry.get("page").workspace.params is not None
