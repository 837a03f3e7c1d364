"""What the README says is what the code says."""

from __future__ import annotations

import re

import webui
from backend.params import KNOBS
from backend.settings import PROJECT

README = (PROJECT / "README.md").read_text(encoding="utf-8")
START, END = (
    "<!-- parameters: made from backend/params.py, checked by tests/test_docs.py -->\n",
    "\n<!-- end of parameters",
)


def parameter_table() -> str:
    rows = ["| parameter | default | neutral | range | meaning |", "|---|---|---|---|---|"]
    for knob in KNOBS:
        bounds = f"{knob.low:g} to {knob.high:,.15g}" if knob.kind in ("int", "float") else "whole number, or empty"
        bounds = f"at most {knob.high:g} texts" if knob.kind == "strings" else bounds
        shown = ["none" if value in (None, ()) else f"{value:g}" for value in (knob.default, knob.neutral)]
        rows.append(f"| `{knob.name}` | {shown[0]} | {shown[1]} | {bounds} | {knob.help} |")
    return "\n".join(rows)


def test_parameter_table():
    assert README.split(START)[1].split(END)[0] == parameter_table()


def test_every_flag_is_listed():
    flags = {option for action in webui._parser()._actions for option in action.option_strings}
    listed = set(re.findall(r"`(--[a-z-]+)", README.split("## Flags")[1].split("## Commands")[0]))
    assert listed == flags - {"-h", "--help"}


def test_every_library_is_listed_and_pinned():
    lines = (PROJECT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all("==" in pin for pin in pins)
    table = README.split("## Libraries")[1].split("For tests")[0]
    for pin in pins:
        assert re.search(rf"\b{pin.split('==')[0]}\b", table), f"{pin} has no reason in the README"


def test_every_file_named_exists():
    named = re.findall(r"\]\(((?:docs/|LICENSE)[^)]*)\)", README)
    assert named
    assert all((PROJECT / name).exists() for name in named)
