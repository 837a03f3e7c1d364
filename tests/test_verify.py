"""verify: check sums, shards, structure and numbers; the bad file is named and the exit code is 1."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.commandline import command
from tests.hffiles import tiny_hf
from tests.metafiles import MetaModel, write_meta
from tests.test_convert_gguf import _spm
from tests.test_convert_vocab import byte_level_folder
from tests.tiny import tokens

Write = Callable[..., Path]


@pytest.fixture
def meta(tmp_path: Path) -> Path:
    """As Meta's download leaves it: MD5 sums of all files in checklist.chk."""
    folder = tmp_path / "7B"
    write_meta(folder, MetaModel(vocab_size=288), 2)
    _spm(folder / "tokenizer.model", 288)
    names = ["consolidated.00.pth", "consolidated.01.pth", "params.json"]
    sums = [f"{hashlib.md5((folder / name).read_bytes()).hexdigest()}  {name}" for name in names]
    (folder / "checklist.chk").write_text("\n".join(sums) + "\n")
    return folder


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_good_files_pass(meta: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("verify", meta, "--deep") == 0
    told = capsys.readouterr().out
    assert told.count(": OK") == 6
    assert "FAILED" not in told
    assert "consolidated.01.pth: OK (md5 as in checklist.chk)" in told


def test_one_flipped_byte_names_the_file(meta: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = meta / "consolidated.01.pth"
    flip(file, file.stat().st_size // 2)
    assert command("verify", meta) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "consolidated.01.pth: FAILED" in line]
    assert [line for line in lines if "consolidated.00.pth: OK" in line]


def test_a_missing_file_and_one_outside(meta: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "secret").write_text("x")
    zeros = "0" * 32
    (meta / "more.md5").write_text(f"{zeros}  gone.bin\n{zeros} *../secret\n{zeros}  /etc/passwd\n")
    assert command("verify", meta, "--json") == 1
    document = json.loads(capsys.readouterr().out)
    assert document["ok"] is False
    failed = {check["name"]: check["message"] for check in document["checks"] if not check["ok"]}
    assert set(failed) == {"gone.bin", "../secret", "/etc/passwd"}
    assert "missing" in failed["gone.bin"]
    assert "outside" in failed["../secret"]


@pytest.mark.parametrize("style", ["{digest}  {name}", "{digest} *{name}", "SHA256 ({name}) = {digest}", "{digest}"])
def test_sha256_in_every_spelling(tiny_path: Write, style: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tiny_path()
    digest = hashlib.sha256(path.read_bytes()).hexdigest().upper()
    lists = path.with_name("tiny.gguf.sha256")
    lists.write_text(style.format(digest=digest, name=path.name))
    assert command("verify", path) == 0
    assert "sha256 as in tiny.gguf.sha256" in capsys.readouterr().out
    flip(path, path.stat().st_size - 100)  # in the last tensor, which only the sum can know
    assert command("verify", path) == 1
    assert "tiny.gguf: FAILED (its sha256" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["hello world\n", "0" * 50 + "  x\n", "\x00\x01\x02\n"])
def test_a_list_that_is_none(tiny_path: Write, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tiny_path()
    path.with_name("SHA256SUMS").write_text(text)
    assert command("verify", path) == 1
    assert "SHA256SUMS: FAILED" in capsys.readouterr().out


def test_shards_are_all_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_hf(tmp_path, vocab_size=len(tokens()), sharded=True)
    byte_level_folder(tmp_path)
    assert command("verify", tmp_path) == 0
    assert "shards" in capsys.readouterr().out
    index = tmp_path / "model.safetensors.index.json"
    told = json.loads(index.read_text())
    good = index.read_text()
    told["metadata"]["total_size"] += 4
    index.write_text(json.dumps(told))
    assert command("verify", tmp_path) == 1
    assert "index says" in capsys.readouterr().out
    index.write_text(good)
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    data = shard.read_bytes()
    shard.write_bytes(data[:-8])
    assert command("verify", tmp_path) == 1
    assert shard.name in capsys.readouterr().out
    shard.unlink()
    assert command("verify", tmp_path) == 1
    assert shard.name in capsys.readouterr().out


def test_numbers_that_are_none_are_found_by_name(tiny_path: Write, capsys: pytest.CaptureFixture[str]) -> None:
    path = tiny_path(weights="F32")
    assert command("verify", path, "--deep") == 0
    data = bytearray(path.read_bytes())
    data[-64 * 4 :][:4]
    data[-4:] = b"\x00\x00\xc0\x7f"  # NaN, the last value of the last tensor
    path.write_bytes(data)
    assert command("verify", path) == 0
    capsys.readouterr()
    assert command("verify", path, "--deep") == 1
    told = [line for line in capsys.readouterr().out.splitlines() if "FAILED" in line]
    assert len(told) == 1
    assert "1 values that are not finite" in told[0]
    assert "output_norm.weight" in told[0]


def test_a_tokenizer_that_does_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_hf(tmp_path, vocab_size=len(tokens()) - 40)
    byte_level_folder(tmp_path)
    assert command("verify", tmp_path) == 1
    assert "tokenizer: FAILED" in capsys.readouterr().out


def test_what_is_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF\x03\x00")
    assert command("verify", tmp_path / "x.gguf") == 1
    assert "x.gguf: FAILED" in capsys.readouterr().out
    assert command("verify", tmp_path / "nothing") == 2
    assert "no such file" in capsys.readouterr().err
