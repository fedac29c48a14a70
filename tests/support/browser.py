"""Pages in headless Chromium: what the console says, what is asked for, and the picture."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on the path")


def browse(page: Path, picture: Path, size: str, *flags: str) -> tuple[str, list[str]]:
    """Open a page in headless Chromium: (console messages, addresses asked for outside the disk)."""
    log = picture.with_suffix(".netlog.json")
    done = subprocess.run(
        [
            *(str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
            *("--no-first-run", "--disable-background-networking", "--disable-component-update"),
            *("--disable-sync", "--disable-extensions", "--enable-logging=stderr", f"--log-net-log={log}"),
            *(f"--user-data-dir={picture.parent / 'profile'}", f"--window-size={size}"),
            *(*flags, f"--screenshot={picture}", page.as_uri()),
        ],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    console = "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)
    found = re.findall(r'"url":"(https?://[^"]+)"', log.read_text())
    return console, [url for url in found if "google" not in url]


def colours(picture: Path) -> dict[tuple[int, ...], int]:
    from PIL import Image

    with Image.open(picture) as image:
        counted = image.convert("RGB").getcolors(2**24) or []
    return {colour: count for count, colour in counted}  # type: ignore[misc]
