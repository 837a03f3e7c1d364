"""What the README and docs/ say is what the code says."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

import pytest

import webui
from backend.__main__ import COMMANDS
from backend.checkpoint.hf_config import CLASSES, FAMILIES
from backend.convert.mixes import MIXES, tensor_format
from backend.headers import read_headers
from backend.model.config import ModelConfig
from backend.models import ModelFolder
from backend.params import KNOBS
from backend.placement.arrange import STAYS
from backend.placement.parts import EMBEDDING, OUTPUT
from backend.placement.plan import plan
from backend.presets import _KEYS as PRESET_KEYS
from backend.presets import OVERRIDES, PLACEMENTS, PROMPT_FORMATS, RESIDENT, WEIGHTS, PresetFolder
from backend.settings import PROJECT
from backend.text.formats import FORMATS as PROMPTS
from backend.weights.blocks import F64, FORMATS, BlockFormat
from backend.weights.legacy import LEGACY
from tests.test_plan import box

README = (PROJECT / "README.md").read_text(encoding="utf-8")
DOCS = {
    name: (PROJECT / "docs" / f"{name}.md").read_text(encoding="utf-8") for name in ("formats", "presets", "design")
}
START, END = (
    "<!-- parameters: made from backend/params.py, checked by tests/test_docs.py -->\n",
    "\n<!-- end of parameters",
)


def rows(text: str, header: str) -> list[list[str]]:
    """The cells of the table whose first line is `header`."""
    lines = text.split(header + "\n")[1].splitlines()[1:]
    table = lines[: next(n for n, line in enumerate([*lines, ""]) if not line.startswith("|"))]
    return [[cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line.strip("|\n"))] for line in table]


def quoted(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


# README --------------------------------------------------------------------------------------------------------------


BOUNDS = {
    "strings": lambda knob: f"at most {knob.high:g} texts",
    "names": lambda knob: "names of steps",
    "text": lambda knob: f"at most {knob.high:,.15g} letters",
    "ids": lambda knob: f"at most {knob.high:g} token ids",
    "biases": lambda knob: f"token ids, each with {knob.low:g} to {knob.high:g}",
    "bool": lambda knob: "yes or no",
}


def parameter_value(value) -> str:
    if value in (None, (), ""):
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return ", ".join("line end" if text == "\n" else f"`{text}`" for text in value)
    return f"{value:g}"


def parameter_table() -> str:
    rows = ["| parameter | default | neutral | range | meaning |", "|---|---|---|---|---|"]
    for knob in KNOBS:
        bounds = f"{knob.low:g} to {knob.high:,.15g}" if knob.kind in ("int", "float") else "whole number, or empty"
        bounds = BOUNDS[knob.kind](knob) if knob.kind in BOUNDS else bounds
        shown = [parameter_value(value) for value in (knob.default, knob.neutral)]
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


def test_every_command_is_listed():
    assert {quoted(row[0])[0] for row in rows(README, "| command | what it does |")} == set(COMMANDS)


@pytest.mark.parametrize("name", ["README", *DOCS])
def test_every_file_named_exists(name: str):
    text, folder = (README, PROJECT) if name == "README" else (DOCS[name], PROJECT / "docs")
    named = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert named or name != "README"
    assert all((folder / link).exists() for link in named)
    assert all((PROJECT / file).exists() for file in re.findall(r"`((?:backend|tests|ui)/[\w/]+\.py)`", text))


def command_lines() -> list[str]:
    texts = [README, *DOCS.values()]
    return [line for text in texts for line in re.findall(r"^python -m backend (.+)$", text, re.MULTILINE)]


def test_every_command_line_shown_can_be_typed():
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in COMMANDS.items():
        module.add_arguments(commands.add_parser(name))
    shown = {parser.parse_args(shlex.split(line)).command for line in command_lines()}
    assert shown == set(COMMANDS)


# docs/presets.md -----------------------------------------------------------------------------------------------------


def test_every_preset_shown_is_one(tmp_path: Path):
    examples = re.findall(r"```yaml\n(.*?)```", DOCS["presets"], re.DOTALL)
    assert len(examples) >= 8
    for number, example in enumerate(examples):
        file = tmp_path / f"example-{number}.yaml"
        file.write_text(example, encoding="utf-8")
        preset = PresetFolder(PROJECT / "presets").read_file(file)
        assert preset.model
    assert set(re.findall(r"^(\w+):", examples[0], re.MULTILINE)) == set(PRESET_KEYS)


def test_overrides():
    table = rows(DOCS["presets"], "| name | range | for |")
    assert {quoted(row[0])[0]: row[1] for row in table} == {
        name: f"{low:g} to {high:.8g}" for name, (low, high) in OVERRIDES.items()
    }
    assert set(quoted(DOCS["formats"].split("`overrides:` corrects it:")[1].split("\n\n")[0])) == set(OVERRIDES)


def test_ways_to_keep_weights_and_places():
    weights = rows(DOCS["presets"], "| value | bits | what it is |")
    assert {name for row in weights for name in quoted(row[0])} == set(WEIGHTS)
    places = rows(DOCS["presets"], "| value | what stays on the GPU | in the seed's table |")
    assert [quoted(row[0])[0] for row in places if "{" not in row[0]] == [*PLACEMENTS[1:], "auto"]
    said = quoted(next(row[1] for row in places if "{" in row[0]))
    assert tuple(said) == RESIDENT
    for row in places:
        if quoted(row[0])[0] in ("offload-ff", "offload-attention"):
            assert set(re.findall(r"w[qkvo123]", row[1])) == set(STAYS[quoted(row[0])[0]]) - {*EMBEDDING, *OUTPUT}


def test_shipped_presets_are_listed():
    table = rows(DOCS["presets"], "| shipped preset | use it |")
    ladder = {name for name in PresetFolder(PROJECT / "presets").names() if name.endswith("gb")}
    listed = {name for row in table for name in quoted(row[0])}
    assert listed - ladder == set(PresetFolder(PROJECT / "presets").names()) - ladder


def test_the_ladder_in_the_docs():
    """Weights, context and the layers' share on the GPU are those of the plans."""
    presets = PresetFolder(PROJECT / "presets")
    table = rows(DOCS["presets"], "| GPU memory | `llama2-7b-...` | `llama2-13b-...` | `llama2-70b-...` |")
    assert len(table) == 9
    for row in table:
        size = int(row[0].removesuffix(" GB"))
        for model, said in zip(("7b", "13b", "70b"), row[1:]):
            preset = presets.read(f"llama2-{model}-{size}gb")
            headers = read_headers(preset, ModelFolder(PROJECT / "no such folder"), PROJECT / "no such folder")
            found = plan(preset, headers.config, headers.tensors, box(42, 38, vram=size))
            layers = [part for part in found.parts if part.names[0].startswith("layers.")]
            on_gpu = sum(part.bytes for part in layers if part.place == "resident")
            share = on_gpu / sum(part.bytes for part in layers)
            words = re.fullmatch(r"([\w-]+), ([\d,]+): (\d+)%", said)
            assert (words[1], int(words[2].replace(",", ""))) == (preset.weights, preset.context)
            assert abs(int(words[3]) / 100 - share) < 0.02, (preset.name, share)
            assert found.fits == "now"


def test_names_of_prompt_formats():
    said = DOCS["presets"].split("## `prompt_format`")[1].split("Names:")[1].split(";")[0]
    assert tuple(quoted(said)) == PROMPT_FORMATS[1:]


# docs/formats.md -----------------------------------------------------------------------------------------------------


def kept(fmt: BlockFormat) -> str:
    if fmt.plain:
        return fmt.name
    return {0: "BF16", 1: "one plane", 2: "two planes"}[fmt.planes]


def test_block_formats():
    table = rows(DOCS["formats"], "| type (id) | values / bytes | fields in order | value | kept in memory as |")
    said = {row[0]: (row[1], row[4]) for row in table}
    assert len(said) == len(table)
    assert said == {
        f"{fmt.name} ({fmt.ggml_id})": (
            f"{fmt.elements} / {fmt.bytes}",
            kept(fmt) if fmt is not F64 else said["F64 (28)"][1],
        )
        for fmt in FORMATS
    }


def test_fields_fill_the_blocks():
    """The fields of each row add up to its bytes."""
    sizes = {"d": 2, "m": 2, "float32 d": 4, "float32 m": 4, "e (one byte)": 1}
    block = rows(DOCS["formats"], "| type (id) | values / bytes | fields in order | value | kept in memory as |")
    old = rows(DOCS["formats"], "| type | values / bytes | fields in order | nibbles | kept in memory as |")
    checked = 0
    for row in [*block, *old]:
        fields = re.sub(r" \([^)]*\)", lambda found: found[0] if "byte)" in found[0] else "", row[2].split(";")[0])
        if not fields or fields == "the same" or fields.startswith("decoded"):
            continue
        found = 0
        for field in fields.split(", "):
            number = re.search(r"(?:^| )(\d+)( bytes)?$", field)
            found += sizes[field] if field in sizes else int(number[1]) if number else 10**6
        assert found == int(row[1].split(" / ")[1]), row
        checked += 1
    assert checked == 22


def test_old_layouts():
    table = rows(DOCS["formats"], "| type | values / bytes | fields in order | nibbles | kept in memory as |")
    assert {row[0]: (row[1], row[4]) for row in table} == {
        fmt.name: (f"{fmt.elements} / {fmt.bytes}", kept(fmt)) for fmt in LEGACY
    }


def test_prompt_formats():
    table = rows(DOCS["formats"], "| name | the first turn | ends at | chosen by `auto` for |")
    assert {quoted(row[0])[0]: tuple(quoted(row[2])) for row in table} == {
        name: (*form.end_tokens, *form.stops) for name, form in PROMPTS.items()
    }
    for row in table:  # what stands between the names in a turn is what the format writes
        template = PROMPTS[quoted(row[0])[0]].template
        for mark in re.findall(r"<\|\w+\|>|\[/?\w+\]|### \w+:|USER:|ASSISTANT:|GPT:|<<SYS>>", row[1]):
            spelt = "'<|' ~ turn.role ~ '|>" if mark == "<|user|>" else mark  # a role that the template fills in
            assert spelt in template, (row[0], mark)


def test_families():
    said = DOCS["formats"].split("## Families")[1].split("## What is refused")[0]
    assert set(re.findall(r"\*\*(\w+)\*\*", said)) == set(FAMILIES)
    assert {name for name in CLASSES if name.endswith("ForCausalLM") and "LLaMA" not in name} <= set(quoted(said))


def config(layers: int = 32, heads: int = 32, shared: int = 8) -> ModelConfig:
    return ModelConfig(
        architecture="llama", name="t", dim=4096, n_layers=layers, n_heads=heads, n_kv_heads=heads // shared,
        head_dim=128, ffn_dim=11008, vocab_size=32000, context=4096, norm_eps=1e-5,
    )  # fmt: skip


def test_types_of_convert():
    """Every type is in the table, its main block is the one that is said, and rows too short take what is said."""
    table = rows(DOCS["formats"], "| `--type` | most matrices | some others |")
    assert [kind for row in table for kind in quoted(row[0])] == list(MIXES)
    for row in table:
        for kind in quoted(row[0]):
            found = tensor_format(kind, "layers.16.w1", (11008, 4096), config()).name
            assert row[1] == (found if kind not in ("f32", "f16", "bf16") and "_0" not in kind and "_1" not in kind
                              else {"f": "that type", "b": "that type", "q": "that block"}[kind[0]])  # fmt: skip
            assert found == MIXES[kind].base.name
            if not MIXES[kind].base.plain:
                assert tensor_format(kind, "output", (32000, 4096), config()).name == (
                    "Q8_0" if kind == "q8_0" else "Q6_K"
                )
    said = " ".join(DOCS["formats"].split("The output (a tied embedding) is Q6_K")[1].split("\n\n")[0].split())
    for kind, words in {
        "q4_k_s": "Q4_K -> Q5_0", "q5_k_s": "Q5_K -> Q5_1", "q6_k": "Q6_K -> Q8_0", "q3_k_s": "Q2_K and Q3_K -> Q4_0",
        "q2_k": "Q2_K and Q3_K -> Q4_0",
    }.items():  # fmt: skip
        assert words in said
        assert tensor_format(kind, "layers.16.w1", (1536, 576), config()).name == words.split("-> ")[1]


def test_numbers_of_files_are_within_the_bounds_of_their_tests():
    """The measured distances are below what tests/test_containers.py allows (read from its text: it is slow to run)."""
    bounds = {}
    source = (PROJECT / "tests" / "test_containers.py").read_text(encoding="utf-8")
    for name, bound in re.findall(r'"GGUF (\w+)": \(converted\("\w+"\), ([0-9.]+)\)', source):
        bounds[name.upper()] = float(bound)
    table = rows(DOCS["formats"], "| weights | computed in float32 | as packed, the default |")
    said = {row[0]: (float(row[1]), float(row[2])) for row in table}
    assert set(bounds) <= set(said)
    assert all(said[name][0] <= bound for name, bound in bounds.items())
    packing = float(re.search(r"^PACKING = ([0-9.]+)", source, re.MULTILINE)[1])
    assert all(packed <= plain * 1.1 + packing for plain, packed in said.values())
