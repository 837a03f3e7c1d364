"""The Chromium that the end-to-end tests drive: found on this machine, or installed by `make test`.

python -m tests.browser --install: make sure there is one, or fail with what to do.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PLACES = (
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
    r"C:\Program Files\Google\Chrome\Application\chrome.exe",
)
HELP = (
    "The tests drive a real Chromium and none was found. Install one (Debian, Ubuntu: apt install chromium), "
    "or set CHROMIUM to the path of a Chrome or Chromium."
)


def find_browser() -> str | None:
    """Path of a browser, or None. CHROMIUM in the environment goes before everything."""
    candidates = [os.environ.get("CHROMIUM"), *(shutil.which(name) for name in NAMES), *PLACES, _playwrights_own()]
    return next((path for path in candidates if path and Path(path).exists()), None)


def _playwrights_own() -> str | None:
    root = Path(os.environ.get("PLAYWRIGHT_BROWSERS_PATH", Path.home() / ".cache" / "ms-playwright"))
    found = sorted(root.glob("chromium-*/chrome-linux*/chrome")) if root.is_dir() else []
    return str(found[-1]) if found else None


def install() -> int:
    """Get a browser by the system's package manager where we may, else by Playwright."""
    if find_browser():
        return 0
    print("No Chromium found; installing one for the browser tests ...", flush=True)
    if shutil.which("apt-get") and getattr(os, "geteuid", lambda: 1)() == 0:
        quietly = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        for words in ("update", "install -y --no-install-recommends chromium"):
            subprocess.run(["apt-get", "-qq", *words.split()], env=quietly, check=False)
    if not find_browser():
        subprocess.run([sys.executable, "-m", "playwright", "install", "chromium"], check=False)
    if find_browser():
        return 0
    print(HELP, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(install() if "--install" in sys.argv else print(find_browser() or HELP))
