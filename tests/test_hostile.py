"""Ten thousand damaged files of every format, opened as the app would in watched child processes.

What may happen: it opens, or one printable sentence says why not. What may not: another exception, a crash, more than 2
seconds of processor time for one file, more memory than is stated in `hostile_guard`, code from the file, a new import,
a socket, a write, or a read of any file but the model's own.

A failure names the seed and the case; `hostile_child.reproduce` makes it again:

    reproduce(write_specimens(Path("/tmp/small")), Path("/tmp/case"), SEED, 1234)
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from tests.hostile_child import Bench
from tests.hostile_guard import ADDRESS_SPACE, RESIDENT
from tests.mutations import mutate
from tests.smallfiles import Specimen
from tests.specimens import write_specimens

ROOT = Path(__file__).resolve().parent.parent
SEED, CASES, CHILDREN = "1", 10_000, 2


@pytest.fixture(scope="module")
def specimens(tmp_path_factory: pytest.TempPathFactory) -> list[Specimen]:
    return write_specimens(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def reports(specimens: list[Specimen], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the children say; what went wrong with them besides is among the troubles."""
    scratch = tmp_path_factory.mktemp("hostile")
    children = [_start(specimens, scratch, first) for first in range(CHILDREN)]
    return [_ended(child, scratch, first) for first, child in enumerate(children)]


def _start(specimens: list[Specimen], scratch: Path, first: int) -> subprocess.Popen[str]:
    job = {
        "specimens": [asdict(specimen) for specimen in specimens], "work": scratch / f"work{first}", "seed": SEED,
        "first": first,
        "step": CHILDREN, "count": CASES, "progress": scratch / f"progress{first}",
        "report": scratch / f"report{first}",
    }  # fmt: skip
    file = scratch / f"job{first}"
    file.write_text(json.dumps(job, default=str))
    command = [sys.executable, "-X", "utf8", "-m", "tests.hostile_child", str(file)]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace"
    )


def _ended(child: subprocess.Popen[str], scratch: Path, first: int) -> dict[str, Any]:
    """The report, or one that tells how the child died."""
    try:
        out, said = child.communicate(timeout=600)
    except subprocess.TimeoutExpired:  # it waits for something, or it would have died of SIGPROF
        child.kill()
        out, said = child.communicate()
    if child.returncode == 0:
        report: dict[str, Any] = json.loads((scratch / f"report{first}").read_text())
    else:
        progress = scratch / f"progress{first}"
        case = int(progress.read_text()) if progress.exists() else -1
        died = f"the process ended with {_named(child.returncode)}: {said[-3000:]}"
        report = {"troubles": [(case, "?", died)], "counts": {}}
    if not all(line.isprintable() for line in (out + said).replace("\t", " ").splitlines()):
        report["troubles"].append((-1, "?", f"something unprintable was written to the terminal: {said[-3000:]!r}"))
    return report


def _named(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def test_damaged_files_end_in_one_sentence_or_open(reports: list[dict[str, Any]]) -> None:
    told = [
        f"seed {SEED!r}, case {number}, {name}: {said}"
        for report in reports
        for number, name, said in report["troubles"]
    ]
    assert not told, f"{len(told)} of {CASES} cases\n" + "\n".join(told[:10])


def test_all_cases_ran_and_the_damage_reached_every_format(
    specimens: list[Specimen], reports: list[dict[str, Any]]
) -> None:
    """Of each format some still open and some are refused, or this file would test nothing."""
    counts: Counter[str] = Counter()
    for specimen in specimens:
        found = sum((Counter(report["counts"].get(specimen.name, {})) for report in reports), Counter())
        assert found["opened"] >= 3, (specimen.name, found)
        assert found["refused"] >= 10, (specimen.name, found)
        counts += found
    assert counts.total() == CASES


# the tools can fail -------------------------------------------------------------------------------------------------

WATCHED = """
import os, sys
from pathlib import Path
from tests.hostile_guard import Guard
guard = Guard(Path(sys.argv[1]), os.open(sys.argv[1] + "/progress", os.O_WRONLY | os.O_CREAT), seconds=1.0)
try:
    with guard.case(77):
        {body}
except BaseException as error:
    print(type(error).__name__)
print("broken:", guard.broken[:1])
"""
CAUGHT = {
    "os.system('true')": "os.system",
    "os.posix_spawn('/bin/true', ['true'], {})": "os.posix_spawn",
    "os.fork()": "os.fork",
    "import subprocess": "import ('subprocess'",
    "__import__('_socket').socket()": "import ('_socket'",
    "open(sys.argv[1] + '/new', 'w')": "for writing",
    "os.open(sys.argv[1] + '/new', os.O_RDWR | os.O_CREAT)": "for writing",
    "open('/etc/passwd')": "opens '/etc/passwd'",
    "open(sys.argv[1] + '/../other')": "/other",
    "os.remove(sys.argv[1] + '/progress')": "os.remove",
    "eval('1')": "compile of code",
    "exec(compile.__self__.compile('1', 'x', 'exec'))": "compile of code",
    "os.kill(0, 0)": "os.kill",
    f"bytearray({ADDRESS_SPACE + (1 << 20)})": "MemoryError",
    f"b'x' * {RESIDENT + (1 << 24)}": "resident size has grown",
}


def _watched(tmp_path: Path, body: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "own").mkdir()
    (tmp_path / "other").write_text("")
    command = [sys.executable, "-c", WATCHED.format(body=body), str(tmp_path / "own")]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("body", CAUGHT)
def test_the_guard_catches(tmp_path: Path, body: str) -> None:
    done = _watched(tmp_path, body)
    assert CAUGHT[body] in done.stdout, done
    assert not (tmp_path / "own" / "new").exists()


def test_the_guard_lets_a_file_of_the_folder_be_read(tmp_path: Path) -> None:
    assert _watched(tmp_path, "open(sys.argv[1] + '/progress').read()").stdout == "broken: []\n"


@pytest.mark.parametrize(("body", "death"), [("while True: pass", signal.SIGPROF), ("os.abort()", signal.SIGABRT)])
def test_a_hang_and_a_crash_end_the_process_and_the_case_is_known(
    tmp_path: Path, body: str, death: signal.Signals
) -> None:
    done = _watched(tmp_path, body)
    assert done.returncode == -death
    assert 'File "<string>", line 8' in done.stderr  # where it was
    assert int((tmp_path / "own" / "progress").read_text()) == 77


def test_a_case_can_be_made_again_and_is_mended_after(specimens: list[Specimen], tmp_path: Path) -> None:
    first, second = (Bench(specimens, tmp_path / name, SEED) for name in ("one", "two"))
    changed = 0
    for number in range(0, 300, 3):
        first.prepare(number - 1)
        made = first.prepare(number)
        assert made.relative_to(tmp_path / "one") == second.prepare(number).relative_to(tmp_path / "two")
        for specimen in specimens:
            for file in specimen.files:
                content = (first.folder(specimen) / file).read_bytes()
                assert content == (second.folder(specimen) / file).read_bytes()
                changed += content != (specimen.folder / file).read_bytes()
    assert 90 <= changed <= 120  # one file a case, two where shards are exchanged, none where the damage is no damage


def test_mutations_change_files_and_keep_them_small(specimens: list[Specimen]) -> None:
    for specimen in specimens:
        for file, kind in specimen.files.items():
            data = (specimen.folder / file).read_bytes()
            made = [mutate(random.Random(n), data, kind) for n in range(30)]
            assert sum(content != data for content in made) >= 25, (specimen.name, file)
            assert len(set(made)) >= 15, (specimen.name, file)
            assert max(map(len, made)) <= len(data) + (1 << 16)
