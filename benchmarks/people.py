"""Several people at once: how much more is said in all, and how long a running chat waits while a long prompt is read.

Peer: llama.cpp's server (`xllamacpp`) with as many slots, on the same file. Both run in processes of their own and are
asked over HTTP by the same client; rounds are interleaved. The client and the readers' events take part of the same
cores, for both; the client collects no garbage meanwhile, or its own pauses would be gaps. The running chat is told in
plain English, so that each event is one token. A reply's gaps grow with the text before them, so its usual gap is that
of the seconds right before and right after the long prompt is read. The worst gap of about as many seconds without a
prompt says what the machine itself does to a reply.

With `weights: bf16` a step is no compiled call but one torch operation after the other; so are its products, but for
those of 4 tokens at most. The same file is asked that way too, to tell what batching gives from what kernels give.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from backend.models import ModelFolder
from backend.runtime import compute_threads
from backend.settings import PROJECT, Settings
from benchmarks.peers import XLLAMACPP, python_with

NAME, TORCH = "people", "suri, torch operations"
PEOPLE, REPLY, ROUNDS = 8, 96, 7
LONG_PROMPT = 4000  # tokens that come in
TALK = 6000  # tokens of the running chat, at most
BEFORE = 3.0  # seconds of it before the prompt, from its first event on
BESIDE = 2.0  # the last of these, and as many after it, have its usual gaps
REST = 3.0  # seconds
PEER = """
import sys, time, xllamacpp
p = xllamacpp.CommonParams()
p.model.path, p.port, p.hostnames = sys.argv[1], int(sys.argv[2]), ["127.0.0.1"]
p.n_parallel, p.n_ctx, p.kv_unified = int(sys.argv[4]), 16384, True
p.cpuparams.n_threads = p.cpuparams_batch.n_threads = int(sys.argv[3])
server = xllamacpp.Server(p)
print(server.listening_address, flush=True)
time.sleep(100000)
"""


@dataclass
class Stream:
    """One reply as it came: when each event arrived, and how many tokens there were in the end."""

    times: list[float] = field(default_factory=list)
    tokens: int = 0

    def gaps(self, begin: float, end: float) -> list[float]:
        """Seconds between events, of those that end between the two moments."""
        return [after - at for at, after in zip(self.times, self.times[1:]) if begin < after <= end]


def run() -> dict[str, Any]:
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    path = ModelFolder(Settings().models_dir).resolve("starter", PROJECT)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        ports = {f"suri, speculation {kind}": stack.enter_context(_ours(folder, kind)) for kind in ("off", "auto")}
        ports[TORCH] = stack.enter_context(_ours(folder, "off", "bf16"))
        try:
            ports["llama.cpp server"] = stack.enter_context(_peer(path))
        except RuntimeError as error:
            print(f"without the peer: {error}")
        found: dict[str, list[dict[str, float]]] = {name: [] for name in ports}
        stack.enter_context(_no_garbage_collected())
        for number in range(ROUNDS + 1):  # the first round warms up
            for name, port in ports.items():
                gc.collect()
                time.sleep(REST)  # the program before may not have noticed yet that nobody reads its chat any more
                row = asyncio.run(_measure(port, number))
                if number:
                    found[name].append(row)
    rows = {name: {key: statistics.median(row[key] for row in each) for key in each[0]} for name, each in found.items()}
    for name, row in rows.items():
        print(f"{name:22} one {row['one']:6.1f} tokens/s, {PEOPLE} people {row['all']:6.1f} ({row['times']:.2f} x)")
        gaps = f"median {1000 * row['gap_median']:.1f}, 99 of 100 {1000 * row['gap_99']:.1f}"
        gaps += f", worst {1000 * row['gap_worst']:.1f} ms"
        print(
            f"{'':22} gap {1000 * row['gap']:.1f}, worst {1000 * row['quiet_worst']:.1f} ms "
            f"({row['quiet_worst_in_gaps']:.1f} x); "
            f"while {LONG_PROMPT} tokens come in {gaps} "
            f"({row['worst_in_gaps']:.1f} x), read in {row['prompt_seconds']:.1f} s"
        )
        worst = ", ".join(f"{each['worst_in_gaps']:.1f}" for each in found[name])
        print(f"{'':22} worst by round: {worst} x; of gaps before only: {row['worst_in_gaps_before']:.1f} x")
    return {
        "people": PEOPLE, "reply_tokens": REPLY, "long_prompt_tokens": LONG_PROMPT, "rounds": ROUNDS,
        "peer": XLLAMACPP, "load_average_before": load, "medians": rows, "rounds_in_full": found,
    }  # fmt: skip


@contextlib.contextmanager
def _no_garbage_collected() -> Iterator[None]:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


async def _measure(port: int, number: int) -> dict[str, float]:
    """One round: one stream, all people, and a long prompt beside a running chat. Every prompt is a new one."""
    begin = time.perf_counter()
    one = await _ask(port, _prompt(number, 0, 40), REPLY)
    alone = one.tokens / (time.perf_counter() - begin)
    begin = time.perf_counter()
    streams = await asyncio.gather(*(_ask(port, _prompt(number, person, 40), REPLY) for person in range(1, PEOPLE + 1)))
    together = sum(stream.tokens for stream in streams) / (time.perf_counter() - begin)
    speeds = {"one": alone, "all": together, "times": together / alone}
    return speeds | await _gaps(port, number)


async def _gaps(port: int, number: int) -> dict[str, float]:
    chat = Stream()
    talking = asyncio.create_task(_ask(port, _story(number), TALK, chat))
    while not chat.times or time.perf_counter() - chat.times[0] < BEFORE:
        await asyncio.sleep(0.05)
    asked = time.perf_counter()
    await _ask(port, _prompt(number, 60, LONG_PROMPT), 1)
    answered = time.perf_counter()
    await asyncio.sleep(BESIDE)
    talking.cancel()
    answered_in = next((at for at in chat.times if at > answered), answered)  # the end of the gap that this falls into
    gaps = chat.gaps(asked, answered_in)
    before, after = chat.gaps(asked - BESIDE, asked), chat.gaps(answered_in, answered_in + BESIDE)
    usual = statistics.mean(statistics.median(each) for each in (before, after))
    quiet = max(*chat.gaps(chat.times[5], asked), *after)
    return {
        "gap_before": statistics.median(before),
        "gap_after": statistics.median(after),
        "gap": usual,
        "quiet_worst": quiet,
        "quiet_worst_in_gaps": quiet / usual,
        "gap_median": statistics.median(gaps),
        "gap_99": sorted(gaps)[len(gaps) * 99 // 100],
        "gap_worst": max(gaps),
        "worst_in_gaps": max(gaps) / usual,
        "worst_in_gaps_before": max(gaps) / statistics.median(before),
        "prompt_seconds": answered - asked,
    }


def _prompt(number: int, person: int, tokens: int) -> list[int]:
    """Token ids like nobody else's: no server finds any of it in its cache."""
    return [(7919 * (100 * number + person + 1) + 104729 * place) % 40000 + 1000 for place in range(tokens)]


def _story(number: int) -> str:
    """Like no other one, too. What follows is English, so that each token is text to send; ids like those of `_prompt`
    may be followed by a script of which a character is two tokens, and of these the first sends nothing."""
    return (
        f"{number + 3} stories of the sea and of those who live by it. The first of the {number + 3} is about a man "
        "who had never learned to swim, and who, one morning in early spring, "
    )


async def _ask(port: int, prompt: list[int] | str, tokens: int, stream: Stream | None = None) -> Stream:
    stream = stream or Stream()
    body = json.dumps(
        {
            "prompt": prompt, "max_tokens": tokens, "stream": True, "temperature": 1.0, "seed": 1, "ignore_eos": True,
            "top_p": 1.0, "top_k": 40, "min_p": 0.0, "stream_options": {"include_usage": True},
        }
    ).encode()  # fmt: skip
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    try:
        writer.write(
            f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
            f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        async for line in reader:
            if line.startswith(b"data: [DONE]"):
                break
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(f"a server answered {event['error']}")
            if event.get("usage"):
                stream.tokens = event["usage"]["completion_tokens"]
            if event.get("choices") and event["choices"][0].get("finish_reason") is None:
                stream.times.append(time.perf_counter())
    finally:
        writer.close()
    return stream


# the servers ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _ours(folder: Path, speculation: str, weights: str = "original") -> Iterator[int]:
    name = f"starter-{speculation}-{weights}"
    preset = folder / f"{name}.yaml"
    preset.write_text(f"model: starter\nspeculation: {speculation}\nweights: {weights}\n", encoding="utf-8")
    port = _free_port()
    flags = ["--api-only", "--port", str(port), "--preset", str(preset), "--data-dir", str(folder / name)]
    with _running([sys.executable, "webui.py", *flags], port):
        yield port


@contextlib.contextmanager
def _peer(path: Path) -> Iterator[int]:
    port = _free_port()
    threads = str(compute_threads())
    with _running([python_with(XLLAMACPP), "-c", PEER, path, str(port), threads, str(PEOPLE + 1)], port):
        yield port


@contextlib.contextmanager
def _running(command: list[Any], port: int) -> Iterator[None]:
    process = subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not _answers(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{command[0]} did not begin to serve")
            time.sleep(0.2)
        yield
    finally:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
