"""Preset files: strict keys, types and ranges; every error names the file."""

from __future__ import annotations

from pathlib import Path

import pytest

from backend.errors import PresetError
from backend.params import GenerationParams
from backend.presets import DEVICES, PLACEMENTS, PROMPT_FORMATS, Preset, PresetFolder
from backend.settings import PROJECT
from backend.strictyaml import MAX_PRESET_BYTES


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "base.yaml").write_text("model: starter\nweights: bf16\nsampling: {temperature: 0.2, top_k: 7}\n")
    return tmp_path


def read(folder: Path, text: str | bytes) -> Preset:
    file = folder / "mine.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return PresetFolder(folder).read("mine")


def test_the_shipped_presets_load() -> None:
    presets = PresetFolder(PROJECT / "presets")
    assert "starter" in presets.names()
    for name in presets.names():
        assert presets.read(name).title, f"{name} has a title for people"


def test_all_keys(folder: Path) -> None:
    preset = read(
        folder,
        "model: a.gguf\ntitle: T\nweights: f16\ndevice: cpu\ncontext: 64\nkv_cache: int8\nkv_tokens: 128\n"
        "cache_ram: 2GiB\n"
        "prompt_format: chatml\nsampling:\n  temperature: 0\n  stop: [a, b]\n",
    )
    assert preset == Preset(
        name="mine", model="a.gguf", title="T", weights="f16", device="cpu", context=64, kv_cache="int8",
        kv_tokens=128, cache_ram=2 << 30, prompt_format="chatml",
        sampling=GenerationParams(temperature=0, stop=("a", "b")),
    )  # fmt: skip


@pytest.mark.parametrize("value", [*PROMPT_FORMATS, "mine.jinja", "/a folder/Mine.jinja"])
def test_prompt_formats(folder: Path, value: str) -> None:
    assert read(folder, f"model: x\nprompt_format: {value}\n").prompt_format == value


def test_defaults_are_what_an_absent_key_means(folder: Path) -> None:
    assert read(folder, "model: x\n") == Preset(name="mine", model="x")
    assert read(folder, "model: x\ncontext: auto\nkv_tokens: auto\n") == Preset(name="mine", model="x")


@pytest.mark.parametrize("value", ["off", "'off'", "0"])
def test_no_host_tier(folder: Path, value: str) -> None:
    assert read(folder, f"model: x\ncache_ram: {value}\n").cache_ram == 0


def test_extends(folder: Path) -> None:
    preset = read(folder, "extends: base\nweights: f32\n")
    assert (preset.name, preset.model, preset.weights) == ("mine", "starter", "f32")
    assert preset.sampling == GenerationParams(temperature=0.2, top_k=7)
    with pytest.raises(PresetError, match="did you mean 'base'"):
        read(folder, "extends: bass\n")


def test_extends_in_a_circle(folder: Path) -> None:
    (folder / "a.yaml").write_text("extends: b\n")
    (folder / "b.yaml").write_text("extends: a\n")
    (folder / "c.yaml").write_text("extends: c\n")
    for name in "abc":
        with pytest.raises(PresetError, match="leads back to itself"):
            PresetFolder(folder).read(name)


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [
        ("modle", "model"), ("weigths", "weights"), ("contxt", "context"), ("sampl", "sampling"), ("titel", "title"),
        ("kv_token", "kv_tokens"), ("kv-cache", "kv_cache"), ("promptformat", "prompt_format"), ("extend", "extends"),
        ("devise", "device"),
    ],
)  # fmt: skip
def test_a_misspelt_key_names_the_nearest(folder: Path, key: str, suggestion: str) -> None:
    with pytest.raises(PresetError) as caught:
        read(folder, f"model: x\n{key}: y\n")
    assert f"unknown key '{key}'" in caught.value.message
    assert f"'{suggestion}'" in caught.value.message


BAD = {
    "no model": ("title: x", "model"),
    "not a mapping": ("- a\n- b", "key: value"),
    "empty": ("", "key: value"),
    "a number": ("7", "key: value"),
    "weights": ("model: x\nweights: bf15", "expected one of"),
    "weights type": ("model: x\nweights: [f32]", "weights"),
    "device": ("model: x\ndevice: gpu9", "device"),
    "kv cache": ("model: x\nkv_cache: q3", "kv_cache"),
    "cache_ram": ("model: x\ncache_ram: some", "cache_ram"),
    "context small": ("model: x\ncontext: 63", "from 64"),
    "context large": ("model: x\ncontext: 16777217", "16777216"),
    "context text": ("model: x\ncontext: many", "context"),
    "context bool": ("model: x\ncontext: true", "context"),
    "context float": ("model: x\ncontext: 128.0", "context"),
    "context null": ("model: x\ncontext:", "context"),
    "model empty": ("model: ''", "model"),
    "model number": ("model: 7", "model"),
    "prompt format": ("model: x\nprompt_format: gpt", "jinja"),
    "prompt format near": ("model: x\nprompt_format: lama-2", "did you mean 'llama-2'"),
    "prompt format, large letters": ("model: x\nprompt_format: ChatML", "did you mean 'chatml'"),
    "prompt format number": ("model: x\nprompt_format: 2", "expected a text"),
    "sampling list": ("model: x\nsampling: [1]", "sampling"),
    "sampling key": ("model: x\nsampling: {temprature: 1}", "did you mean 'temperature'"),
    "sampling range": ("model: x\nsampling: {top_p: 1.5}", "top_p"),
    "sampling nan": ("model: x\nsampling: {top_p: .nan}", "top_p"),
    "key twice": ("model: x\nmodel: y", "twice"),
    "key twice inside": ("model: x\nsampling: {top_p: 1, top_p: 0.5}", "twice"),
    "key twice among many": ("model: x\n" + "".join(f"k{n}:\n" for n in range(3000)) + "k7:\n", "'k7' appears twice"),
    "number of many bits": ("model: x\ncontext: 0b" + "1" * 20000, "20002 digits"),
    "alias": ("model: &a x\ntitle: *a", "aliases"),
    "laughs": ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]", "aliases"),
    "python object": ("model: !!python/object/apply:os.system ['true']", "python"),
    "python name": ("model: !!python/name:os.system", "python"),
    "no yaml": ("model: [", "mine.yaml"),
    "a tab": ("model:\tx\n\ty: z", "mine.yaml"),
    "an impossible date": ("model: 2024-99-99", "mine.yaml"),
    "an odd key": ("model: x\n? [a, b]\n: c", "mine.yaml"),
    "a null key": ("model: x\n~: c", "None"),
    "two documents": ("model: x\n---\nmodel: y", "mine.yaml"),
    "depth": ("model: " + "[" * 3000, "mine.yaml"),
    "control characters": ("model: \x00", "mine.yaml"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "words"), BAD.values(), ids=BAD.keys())
def test_what_does_not_fit_is_one_sentence_with_the_file(folder: Path, text: str, words: str) -> None:
    with pytest.raises(PresetError) as caught:
        read(folder, text)
    assert str(folder / "mine.yaml") in caught.value.message
    assert words in caught.value.message
    assert "\n" not in caught.value.message


def test_files_that_cannot_be_read(folder: Path) -> None:
    with pytest.raises(PresetError, match=r"mine\.yaml"):
        read(folder, b"model: \xff\xfe")
    with pytest.raises(PresetError, match="at most"):
        read(folder, "model: x\n#" + "x" * MAX_PRESET_BYTES)
    with pytest.raises(PresetError, match="no such preset file"):
        PresetFolder(folder).read_file(folder / "absent.yaml")
    (folder / "dir.yaml").mkdir()
    with pytest.raises(PresetError, match=r"dir\.yaml"):
        PresetFolder(folder).read("dir")


@pytest.mark.parametrize("name", ["../base", "base.yaml", "/etc/passwd", "", ".", "base\0", "BASE", "nosuch"])
def test_a_name_is_looked_up_in_the_listing_only(folder: Path, name: str) -> None:
    with pytest.raises(PresetError, match="there is no preset"):
        PresetFolder(folder / ".").read(name)


def test_names_in_order(folder: Path) -> None:
    for name in ("zeta", "auto", "starter", "alpha"):
        (folder / f"{name}.yaml").write_text("model: x\n")
    (folder / "notes.txt").write_text("")
    assert PresetFolder(folder).names() == ["auto", "starter", "alpha", "base", "zeta"]
    assert PresetFolder(folder / "nowhere").names() == []


def test_an_edited_file_counts_at_once(folder: Path) -> None:
    presets = PresetFolder(folder)
    assert presets.read("base").weights == "bf16"
    (folder / "base.yaml").write_text("model: starter\nweights: f32\n")
    assert presets.read("base").weights == "f32"


def test_sampling_is_merged_value_by_value(folder: Path) -> None:
    (folder / "base.yaml").write_text("model: starter\nsampling: {temperature: 0.3, top_k: 5}\n")
    (folder / "mine.yaml").write_text("extends: base\nsampling: {top_k: 7}\n")
    sampling = PresetFolder(folder).read("mine").sampling
    assert (sampling.temperature, sampling.top_k) == (0.3, 7)


# where and how much -------------------------------------------------------------------------------------------------


def test_budgets_are_sizes(folder: Path) -> None:
    for text, size in {
        "10GiB": 10 << 30, "10 GB": 10**10, "512MiB": 512 << 20, "1.5gib": 3 << 29, "8589934592": 8 << 30,
        "4194304 B": 4 << 20, "2 tb": 2 * 10**12, "auto": None,
    }.items():  # fmt: skip
        preset = read(folder, f"model: x\nvram: {text}\nram: {text}\n")
        assert (preset.vram, preset.ram) == (size, size)


def test_devices(folder: Path) -> None:
    for device in (*DEVICES, "cuda:0", "cuda:12"):
        assert read(folder, f"model: x\ndevice: {device}\n").device == device


def test_placements(folder: Path) -> None:
    for name in PLACEMENTS:
        assert read(folder, f"model: x\nplacement: {name}\n").placement == name
    listed = read(folder, "model: x\nplacement: {resident: [w3, w1, output, wq, w1]}\n")
    assert listed.placement == ("wq", "w1", "w3", "output")
    assert read(folder, "model: x\nplacement: {resident: []}\n").placement == ()
    assert isinstance(hash(listed), int)  # plans are kept by preset


BAD_PLACES = {
    "vram: 10": "from 1MiB", "vram: -1GiB": "such as 10GiB", "vram: 10XB": "such as 10GiB", "vram: [1]": "such as",
    "vram: true": "such as", "vram:": "such as", "ram: 99999TiB": "to 1024TiB", "ram: much": "or auto",
    "ram: 1e9": "or auto", "device: gpu": "expected one of auto, cuda, mps, cpu or cuda:N",
    "device: cuda:x": "cuda:N", "device: cuda:007": "cuda:N", "device: [cpu]": "cuda:N",
    "device: CPU": "cuda:N", "placement: offload": "did you mean 'offload-", "placement: offload_ff": "'offload-ff'",
    "placement: [w1]": "resident: [w1, w2, ...]", "placement: {resident: w1}": "expected one of auto, gpu",
    "placement: {resident: [w4]}": "unknown weight 'w4'", "placement: {resident: [w1], streamed: [w2]}": "expected one",
    "placement: {stays: [w1]}": "expected one", "placement: {resident: [norm]}": "known names: wq",
    "placement:": "expected one of", "weights: int-8": "did you mean 'int8'", "weights: nf8": "'nf4'",
}  # fmt: skip


@pytest.mark.parametrize(("line", "words"), BAD_PLACES.items(), ids=BAD_PLACES.keys())
def test_places_that_do_not_fit(folder: Path, line: str, words: str) -> None:
    with pytest.raises(PresetError) as caught:
        read(folder, f"model: x\n{line}\n")
    assert str(folder / "mine.yaml") in caught.value.message
    assert words in caught.value.message
    assert line.split(":")[0] in caught.value.message


def test_numbers_in_names_are_in_order(folder: Path) -> None:
    for name in ("m-10gb", "m-8gb", "m-4gb", "m", "m10"):
        (folder / f"{name}.yaml").write_text("model: x\n")
    assert PresetFolder(folder).names() == ["base", "m", "m10", "m-4gb", "m-8gb", "m-10gb"]


def test_the_shipped_ladder() -> None:
    """Every size of card for every size of model; each says its budget in its name."""
    presets = PresetFolder(PROJECT / "presets")
    for size in ("7b", "13b", "70b"):
        for gigabytes in (4, 6, 8, 10, 12, 16, 24, 48, 80):
            preset = presets.read(f"llama2-{size}-{gigabytes}gb")
            assert preset.vram == gigabytes * 10**9
            assert preset.model == f"models/llama-2-{size}-chat"
            assert f"{gigabytes} GB" in preset.title
            assert len((PROJECT / "presets" / f"{preset.name}.yaml").read_text().splitlines()) <= 6
    modes = {
        name: presets.read(name) for name in ("cpu-bf16", "cpu-int8", "cpu-int4", "gpu-fp16", "gpu-int8", "gpu-int4")
    }
    assert all(preset.device == ("cpu" if name.startswith("cpu") else "cuda") for name, preset in modes.items())
    assert all(preset.weights == name.split("-")[1].replace("fp16", "f16") for name, preset in modes.items())
