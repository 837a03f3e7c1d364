"""Starting wrongly: one clear line, exit code 2, nothing served."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

import webui
from backend.commands.terminal import run_command
from backend.settings import PROJECT
from tests.tiny import TinyModel, write_tiny


@pytest.fixture
def start(monkeypatch, capsys):
    """start(flags...) -> (exit code, stderr lines). Serving would be a failure: it is not reached in these tests."""

    def run(*flags: str) -> tuple[int, list[str]]:
        monkeypatch.setattr(sys, "argv", ["webui.py", *flags])
        monkeypatch.setattr(webui, "_serve", lambda *_: pytest.fail("the server was started"))
        code = run_command(webui.main)
        return code, [line for line in capsys.readouterr().err.splitlines() if line.startswith("suri:")]

    return run


def test_port_in_use(start):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        code, lines = start("--port", str(port))
    assert code == 2
    assert len(lines) == 1
    assert f"port {port}" in lines[0]
    assert "--port" in lines[0]


def test_preset_typo(start):
    code, lines = start("--port", "0", "--preset", "startr")
    assert code == 2
    assert "did you mean 'starter'" in lines[0]


def test_preset_with_a_wrong_key(start, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("model: starter\ncontexts: 100\n")
    code, lines = start("--port", "0", "--preset", str(path))
    assert code == 2
    assert "'contexts'" in lines[0]
    assert "did you mean 'context'" in lines[0]


@pytest.mark.parametrize("cut", [3, 20, 500, -1])
def test_truncated_model(start, tmp_path, cut):
    path = write_tiny(tmp_path / "whole.gguf", TinyModel())
    path.write_bytes(path.read_bytes()[:cut])
    code, lines = start("--port", "0", "--model", str(path))
    assert code == 2
    assert len(lines) == 1
    assert str(path) in lines[0]


def test_another_architecture(start, tmp_path):
    path = write_tiny(tmp_path / "other.gguf", TinyModel(metadata={"general.architecture": "mamba"}))
    code, lines = start("--port", "0", "--model", str(path))
    assert code == 2
    assert "mamba" in lines[0]


def test_missing_model(start, tmp_path):
    code, lines = start("--port", "0", "--model", str(tmp_path / "no.gguf"))
    assert code == 2
    assert "no.gguf" in lines[0]


def test_other_machines_only_with_keys(start, tmp_path):
    code, lines = start("--host", "0.0.0.0", "--port", "0")
    assert code == 2
    assert "--auth" in lines[0]
    logins = tmp_path / "logins"
    logins.write_text("ana:secret\n")
    code, _ = start("--host", "0.0.0.0", "--port", "0", "--auth", str(logins))
    assert code == 2  # the API would still be open


def test_bad_login_file(start, tmp_path):
    logins = tmp_path / "logins"
    logins.write_text("ana\n")
    code, lines = start("--port", "0", "--auth", str(logins))
    assert code == 2
    assert "user:password" in lines[0]


def test_unknown_flag_and_command():
    for command in (["webui.py", "--prot", "1"], ["-m", "backend", "generat"], ["-m", "backend", "inspect", "no.gguf"]):
        done = subprocess.run([sys.executable, *command], cwd=PROJECT, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr


def test_list_presets():
    done = subprocess.run(
        [sys.executable, "webui.py", "--list-presets"], cwd=PROJECT, capture_output=True, text=True, check=True
    )
    assert [line.split()[0] for line in done.stdout.splitlines()][:2] == ["auto", "starter"]
    assert Path(PROJECT / "presets" / "starter.yaml").exists()
