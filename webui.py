"""Serve Suri: flags -> Settings -> Service -> API and page on one port. The only file that knows every part."""

from __future__ import annotations

import argparse
import asyncio
import importlib
import os
import signal
import socket
import sys
import threading
from pathlib import Path
from types import FrameType

import uvicorn

from backend.api.app import create_api
from backend.api.guard import Guard
from backend.commands.choice import add_choice, chosen
from backend.commands.terminal import ProgressBar, run_command
from backend.errors import StartError, UserError
from backend.runtime import Prepared
from backend.service import Service
from backend.settings import Settings
from backend.units import parse_bytes

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def main() -> int:
    arguments = _parser().parse_args()
    settings = _settings(arguments)
    service = Service(settings)
    if arguments.list_presets:
        for info in service.presets():
            print(f"{info.name:20} {info.error or f'{info.title} ({info.needs})'}")
        service.close()  # it may be measuring this machine in the background
        return 0
    listener = _listen(settings)  # first of all: a taken port should not cost a download
    preset = chosen(service, arguments)
    bar = ProgressBar()
    prepared = service.prepare(preset, bar)
    bar.close()
    threading.Thread(target=_load, args=(service, prepared), name="load", daemon=True).start()
    _serve(service, settings, listener)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Chat with LLaMA-family models on this machine.")
    defaults = Settings()
    add = parser.add_argument
    add_choice(parser)
    add("--host", default=defaults.host, help="address to listen on (default: %(default)s)")
    add("--port", type=int, default=defaults.port, help="port to listen on (default: %(default)s)")
    add("--auth", metavar="FILE", type=Path, help="logins for the page: a file with one 'user:password' per line")
    add("--api-key", metavar="KEY", action="append", default=[], help="key that programs must send; may be repeated")
    add("--admin-key", metavar="KEY", help="key that programs must send to load presets (default: any --api-key)")
    add("--data-dir", type=Path, default=defaults.data_dir, help="where settings and chats are kept")
    add("--cache-disk", metavar="SIZE", default="256MiB",
        help="of the data folder, for what models had read when the server ended; off: keep nothing "
        "(default: %(default)s)")  # fmt: skip
    add("--models-dir", type=Path, default=defaults.models_dir, help="where models are kept")
    add("--presets-dir", type=Path, default=defaults.presets_dir, help="where presets are read from")
    add("--list-presets", action="store_true", help="print the presets and end")
    add(
        "--drain-seconds", type=float, default=defaults.drain_seconds, metavar="N",
        help="how long running replies may take when the server ends or their model goes (default: %(default)s)",
    )  # fmt: skip
    add("--api-only", action="store_true", help="serve programs only, without the page")
    return parser


def _settings(arguments: argparse.Namespace) -> Settings:
    settings = Settings(
        host=arguments.host,
        port=arguments.port,
        data_dir=arguments.data_dir.resolve(),
        cache_disk=_cache_disk(arguments.cache_disk),
        models_dir=arguments.models_dir.resolve(),
        presets_dir=arguments.presets_dir.resolve(),
        api_keys=tuple(arguments.api_key),
        admin_key=arguments.admin_key,
        logins=_logins(arguments.auth),
        api_only=arguments.api_only,
        drain_seconds=arguments.drain_seconds,
    )
    guarded = settings.api_keys and (settings.logins or settings.api_only)
    if settings.host not in LOOPBACK and not guarded:
        raise StartError(
            f"--host {settings.host} lets other machines in, so the page needs --auth FILE and programs --api-key KEY"
        )
    return settings


def _cache_disk(size: str) -> int:
    try:
        return 0 if size in ("off", "0") else parse_bytes(size)
    except ValueError as error:
        raise StartError(f"--cache-disk {size}: {error}, or off") from None


def _logins(path: Path | None) -> tuple[tuple[str, str], ...]:
    if path is None:
        return ()
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise StartError(f"--auth {path}: cannot be read ({error})") from None
    pairs = [line.partition(":") for line in lines]
    if not pairs or any(not user or not password for user, _, password in pairs):
        raise StartError(f"--auth {path}: expected lines of the form 'user:password'")
    return tuple((user, password) for user, _, password in pairs)


def _listen(settings: Settings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    if os.name == "posix":  # on Windows this option would let two servers share the port
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
    except (OSError, OverflowError) as error:
        listener.close()
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise StartError(
            f"port {settings.port} on {settings.host} cannot be used ({reason}); give another with --port"
        ) from None
    return listener


def _load(service: Service, prepared: Prepared) -> None:
    """In the background, so that the page can be opened and say how far it is."""
    bar = ProgressBar()
    try:
        service.load_prepared(prepared, bar)
    except UserError as error:
        bar.close()
        print(f"suri: {error.message}", file=sys.stderr)
        return
    finally:
        service.measure_speeds()
    bar.close()
    print(f"{service.status().title} is ready.", flush=True)


def _serve(service: Service, settings: Settings, listener: socket.socket) -> None:
    # Gradio reads these while it is imported, and its import takes seconds: hence here and not at the top.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # nothing leaves the machine
    os.environ["GRADIO_TEMP_DIR"] = str(settings.data_dir / "tmp")
    os.environ["GRADIO_QUEUE_SESSION_RESUME_TTL"] = "0"  # a closed tab ends its reply
    app = create_api(service, settings)
    if not settings.api_only:
        app = importlib.import_module("ui.app").mount(app, service, settings)
    # A page that stays open holds a connection for ever: after a second they are cut, or the server would never end.
    config = uvicorn.Config(Guard(app, settings), log_level="warning", timeout_graceful_shutdown=1, lifespan="on")
    port = listener.getsockname()[1]
    name = f"[{settings.host}]" if ":" in settings.host else settings.host
    print(f"Suri is at http://{name}:{port} (Ctrl+C ends it)", flush=True)
    # uvicorn ends in order on SIGTERM and then raises it once more, for whoever ran it: we go on to the end instead.
    signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        _Server(config, service).run(sockets=[listener])
    except KeyboardInterrupt:  # uvicorn raises it again after an orderly end
        pass
    finally:
        service.close()  # also when the start failed; a second time does nothing


class _Server(uvicorn.Server):
    """Lets replies come to their end, or ends them, before the connections: whoever reads one gets its end, not a cut.

    The first signal takes no new requests and waits for those that are being answered; a second one waits no longer.
    """

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            self.force_exit = True
            threading.Thread(target=self._service.close, name="close", daemon=True).start()
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        status = await asyncio.to_thread(self._service.status)
        if status.running + status.waiting and not self.force_exit:
            words = f"up to {self._service.settings.drain_seconds:.0f} s for running replies; once more ends it now"
            print(f"suri: waiting {words}", file=sys.stderr, flush=True)
            await asyncio.to_thread(self._service.drain)
        await asyncio.to_thread(self._service.close)
        await super().shutdown(sockets)


if __name__ == "__main__":
    sys.exit(run_command(main))
