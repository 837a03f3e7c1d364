"""What is measured of a machine, how it is kept, and what is known of models that are not here."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from backend import calibration
from backend.errors import CheckpointError, PresetError, UserError
from backend.headers import NOT_HERE, published_shape, read_headers
from backend.kernels.cpu import steps
from backend.models import STARTER, ModelFolder
from backend.placement.machine import Gpu, Machine, Rates
from backend.placement.plan import plan
from backend.presets import WEIGHTS, Preset
from backend.units import parse_bytes, show_bytes
from tests.commandline import command
from tests.tiny import write_tiny

KEPT = Machine(
    cores=2, rates=Rates(2e10, {"bf16": 1e10}, 1e-4), one_core=0.6, conversion={"bf16": 1e9}, disk=1e9,
    step_seconds=1e-5,
    gpus=(Gpu("cuda:0", "test", 8, 0, 2e10, Rates(8e11, {"int8": 7e11})),),
)  # fmt: skip


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is measured, on almost nothing."""
    monkeypatch.setattr(calibration, "ROWS", 64)
    monkeypatch.setattr(calibration, "COLUMNS", 256)
    monkeypatch.setattr(calibration, "ROUND", 1 << 16)
    monkeypatch.setattr(calibration, "FILE_BYTES", 1 << 20)


def test_every_form_has_a_speed(quick: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(calibration, "cache_folder", lambda: tmp_path / "kernels")
    found = calibration.measure()
    forms = {*WEIGHTS} - {"original"} | {"Q4_0", "Q4_1", "Q4_K", "Q5_K", "Q6_K", "Q8_0"}
    assert forms <= set(found.rates.products)
    assert {*WEIGHTS} - {"original"} <= set(found.conversion)
    assert all(speed > 0 for speed in (*found.rates.products.values(), *found.conversion.values()))
    assert found.rates.bandwidth > 0
    assert 0 < found.rates.layer_seconds < 1
    assert 0 < found.one_core <= 1
    assert {*found.rates.row_seconds} == {"bf16", "f16", "f32"}
    assert all(0 <= seconds < 1e-3 for seconds in found.rates.row_seconds.values())
    assert (found.step_seconds > 0) == (steps.step_library() is not None)
    assert found.step_seconds < found.rates.layer_seconds or not found.step_seconds


def test_a_machine_is_kept_and_read_again(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "machine.json"
    calibration._write(file, KEPT, busy=False)
    assert calibration._read(file) == KEPT
    assert [path.name for path in file.parent.iterdir()] == ["machine.json"]


def test_what_was_measured_on_a_busy_machine_counts_for_an_hour(tmp_path: Path) -> None:
    file = tmp_path / "machine.json"
    calibration._write(file, KEPT, busy=True)
    assert calibration._read(file) == KEPT
    old = time.time() - calibration.AGAIN_SECONDS - 60
    os.utime(file, (old, old))
    assert calibration._read(file) is None
    calibration._write(file, KEPT, busy=False)
    os.utime(file, (old, old))
    assert calibration._read(file) == KEPT


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "7", '{"busy": false}', '{"busy": false, "gpus": [], "rates": {"x": 1}}']
)
def test_a_damaged_file_is_measured_anew(tmp_path: Path, text: str) -> None:
    file = tmp_path / "machine.json"
    assert calibration._read(file) is None
    file.write_text(text)
    assert calibration._read(file) is None


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    calibration._write(tmp_path / "file" / "machine.json", KEPT, busy=False)


def test_this_machine_is_measured_once(quick: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(calibration, "cache_folder", lambda: tmp_path / "kernels")
    calibration._measured.cache_clear()
    try:
        first = calibration.this_machine()
        assert first.ram_total > first.ram_free > 0
        assert first.process_bytes > 50e6
        calibration._measured.cache_clear()
        monkeypatch.setattr(calibration, "measure", lambda: pytest.fail("measured again"))
        assert calibration.this_machine().rates == first.rates
    finally:
        calibration._measured.cache_clear()


# models that are not here ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "shape", "fmt"),
    [
        ("models/llama-2-7b-chat", "llama-2-7b", "BF16"),
        ("hub:meta-llama/Llama-2-13b-chat-hf", "llama-2-13b", "BF16"),
        ("hub:someone/Llama-2-70B-Chat-GGUF:Q4_K_M", "llama-2-70b", "Q4_K"),
        ("hub:meta-llama/Meta-Llama-3-8B-Instruct", "llama-3-8b", "BF16"),
        ("Llama_3.1_8B_Instruct.Q8_0.gguf", "llama-3.1-8b", "Q8_0"),
        ("/data/TinyLlama-1.1B-Chat-v1.0/", "tinyllama-1.1b", "BF16"),
        ("starter", "smollm2-135m", "Q4_1"),
    ],
)
def test_published_shapes_by_name(model: str, shape: str, fmt: str) -> None:
    found = published_shape(model)
    assert found is not None
    assert found.format.name == fmt
    expected = published_shape(f"x/{shape}")
    assert expected is not None
    assert found.config.parameters() == expected.config.parameters()


@pytest.mark.parametrize("model", ["models/mine", "llama-2-7bx", "hub:a/b", "my-llama-2-7b"])
def test_other_names_tell_nothing(model: str) -> None:
    assert published_shape(model) is None


def test_headers_of_what_is_here_and_what_is_not(tmp_path: Path) -> None:
    models = ModelFolder(tmp_path)
    write_tiny(tmp_path / "llama-2-7b.gguf")
    here = read_headers(Preset("p", "llama-2-7b.gguf"), models, tmp_path)
    assert (here.note, here.config.dim < 4096) == ("", True)  # the file counts, not its name
    absent = read_headers(Preset("p", "models/llama-2-7b-chat"), models, tmp_path)
    assert (absent.note, absent.config.parameters()) == (NOT_HERE, 6_738_415_616)
    assert plan(Preset("p", "m", weights="f16"), absent.config, absent.tensors).weight_bytes > 13e9
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "params.json").write_text('{"dim": 64, "n_layers": 2, "n_heads": 4, "norm_eps": 1e-5}')
    alone = read_headers(Preset("p", "mine"), models, tmp_path)
    assert (alone.config.dim, alone.note) == (64, "its weights are not here yet, only mine")
    with pytest.raises(PresetError, match="'models/mine-13b' is not here"):
        read_headers(Preset("p", "models/mine-13b"), models, tmp_path)
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + b"\xff" * 40)
    with pytest.raises(CheckpointError):
        read_headers(Preset("p", "bad.gguf"), models, tmp_path)


def test_the_absent_starter_is_planned_as_it_is(tmp_path: Path) -> None:
    found = read_headers(Preset("p", "starter"), ModelFolder(tmp_path), tmp_path)
    size = sum(info.nbytes for info in found.tensors.values())
    assert abs(size / STARTER.size - 1) < 0.2
    assert found.note == NOT_HERE


# the command ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def known_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(64 << 30, 60 << 30, 2 << 28, 8, Rates(4e10, {"bf16": 3e10}), 0.5, {"bf16": 1e9}, 1e9)
    monkeypatch.setattr("backend.commands.plan.this_machine", lambda: machine)


KEYS = {
    "preset", "vram_bytes", "ram_bytes", "kv_bytes", "max_context", "predicted_tokens_per_second", "bound_by", "fits",
    "parts",
}  # fmt: skip


def test_plan_as_json(known_machine: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("plan", "--preset", "llama2-7b-10gb", "cpu-int8", "--json", "--context", "1024") == 0
    document = json.loads(capsys.readouterr().out)
    first, second = document["presets"]
    assert set(first) >= KEYS
    assert (first["preset"], first["fits"], first["note"], first["context"]) == (
        "llama2-7b-10gb",
        "now",
        NOT_HERE,
        1024,
    )
    assert sum(part["bytes"] for part in first["parts"]) < first["weight_bytes"] < 7.5e9
    assert {part["place"] for part in first["parts"]} == {"resident"}
    assert second["preset"] == "cpu-int8"


def test_plan_of_any_model_in_every_mode(
    known_machine: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "params.json").write_text('{"dim": 4096, "n_layers": 32, "n_heads": 32, "norm_eps": 1e-5}')
    assert command("plan", "--model", tmp_path, "--json") == 0
    rows = {row["preset"]: row for row in json.loads(capsys.readouterr().out)["presets"]}
    assert set(rows) == {"auto", "cpu-bf16", "cpu-int8", "cpu-int4", "gpu-fp16", "gpu-int8", "gpu-int4"}
    assert rows["gpu-fp16"]["fits"] == "no"
    assert rows["gpu-fp16"]["nearest"] in ("auto", "cpu-bf16")
    assert rows["gpu-fp16"]["predicted_tokens_per_second"] is None
    assert rows["cpu-int8"]["weight_bytes"] < rows["cpu-bf16"]["weight_bytes"] == rows["auto"]["weight_bytes"]


def test_plan_for_a_gpu_that_is_not_here(known_machine: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("plan", "--preset", "llama2-13b", "--vram", "8GiB", "--json") == 0
    (row,) = json.loads(capsys.readouterr().out)["presets"]
    assert row["device"] == "cuda:0"
    assert 7.5 * 2**30 < row["vram_bytes"] <= 8 * 2**30
    assert {part["place"] for part in row["parts"]} >= {"resident", "streamed"} or row["parts"][0]["place"] == "cpu"
    assert row["predicted_tokens_per_second"] is None


def test_plan_as_a_table(known_machine: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("plan") == 0
    lines = capsys.readouterr().out
    for words in ("tokens/s", "llama2-70b-80gb", NOT_HERE, "does not fit: device is cuda", "streamed"):
        assert words in lines


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--vram", "8"), "--vram is '8'; expected a size from 1MiB"),
        (("--ram", "lots"), "--ram is 'lots'"),
        (("--context", "5"), "--context is 5"),
        (("--preset", "stater"), "did you mean 'starter'"),
    ],
)
def test_what_cannot_be_planned(arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("plan", *arguments) == 2
    assert words in capsys.readouterr().err


def test_a_preset_whose_model_is_unknown_is_a_row(known_machine: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("plan", "--preset", "auto", "--model", "models/nobody-knows", "--json") == 0
    (row,) = json.loads(capsys.readouterr().out)["presets"]
    assert "is not here" in row["error"]


def test_amounts() -> None:
    assert parse_bytes("1 MiB") == 1 << 20
    assert parse_bytes(1 << 30) == 1 << 30
    for wrong in ("", "GiB", "1e3 GB", "10 G", "0x10", "-5GB", "1.2.3GB", True, 0, "9" * 30):
        with pytest.raises(ValueError, match="expected a size"):
            parse_bytes(wrong)
    assert [show_bytes(size) for size in (950_000_000, 9_600_000_000)] == ["950 MB", "9.6 GB"]
    assert issubclass(PresetError, UserError)
