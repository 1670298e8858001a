"""Takes the pictures of docs/images again: TensorBoard's pages of a run, as a browser shows them.

    python docs/screenshots.py RUN

RUN is what `./launch.sh tensorboard` takes; a directory with two runs fills the page that compares them. It needs
Chromium (Debian: apt install chromium) and, in any Python environment, `pip install playwright pillow`; both are tools
of whoever writes these pages and no part of the project.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

PROJECT = Path(__file__).resolve().parents[1]
WIDTH = 1280  # of a picture, in pixels
SETTLE_SECONDS, PATIENCE_SECONDS = 1.0, 40.0


def close_settings(page: Page) -> None:
    page.get_by_role("button", name="Settings").last.click()


def nothing(page: Page) -> None:
    pass


@dataclass(frozen=True)
class Shot:
    """A picture: which page, and how wide and high the browser's window is in CSS pixels."""

    name: str
    address: str
    width: int = WIDTH
    height: int = 800
    phone: bool = False
    part: str = ""  # CSS selector of what is shown; the whole window without
    prepare: Callable[[Page], None] = nothing


SHOTS = (
    Shot("time_series", "?tagFilter=^(train/(loss|grad_norm)|val/loss)$#timeseries", prepare=close_settings),
    Shot("scalars", "#scalars&tagFilter=^train/", height=760),
    Shot("custom_scalars", "#custom_scalars", height=1000),
    Shot("text", "#text&tagFilter=^(notes|marks)", height=900),
    Shot("histograms", "#histograms", height=760),
    Shot("hparams", "#hparams", width=2140, height=300, part="tf-hparams-sessions-pane"),
    Shot("phone", "#custom_scalars", width=412, height=850, phone=True),
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Takes the pictures of docs/images again.")
    parser.add_argument("run", metavar="RUN", help="a run's name or directory, or a directory of runs")
    parser.add_argument("--out", type=Path, default=PROJECT / "docs" / "images", metavar="DIR")
    parser.add_argument("--browser", default=shutil.which("chromium"), metavar="PATH", help="default: chromium")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with served(options.run) as url, sync_playwright() as driver:
        flags = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium's sandbox refuses root
        browser = driver.chromium.launch(executable_path=options.browser, args=flags)
        for shot in SHOTS:
            file = options.out / f"{shot.name}.png"
            file.write_bytes(small(take(browser, url, shot)))
            print(f"{file}: {file.stat().st_size:,} bytes", flush=True)
        browser.close()


@contextlib.contextmanager
def served(run: str) -> Iterator[str]:
    """The address of a TensorBoard that has read the run's scalars."""
    process = subprocess.Popen([PROJECT / "launch.sh", "tensorboard", run], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        found = next((match for line in process.stdout if (match := re.search(r"http://127\S+/", line))), None)
        if found is None:
            raise SystemExit(f"TensorBoard of {run} did not start")
        wait_for_scalars(found[0])
        yield found[0]
    finally:
        process.terminate()
        process.wait()


def wait_for_scalars(url: str) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        with urllib.request.urlopen(url + "data/plugin/scalars/tags") as reply:
            if any(json.load(reply).values()):
                return
        time.sleep(0.5)
    raise SystemExit(f"no scalars at {url} after {PATIENCE_SECONDS:g} s")


def take(browser: Browser, url: str, shot: Shot) -> bytes:
    """A PNG of the page once it has stopped changing."""
    scale = 2.0 if shot.phone else WIDTH / shot.width
    window = {"width": shot.width, "height": shot.height}
    context = browser.new_context(viewport=window, device_scale_factor=scale, is_mobile=shot.phone)
    page = context.new_page()
    page.goto(url + shot.address, wait_until="networkidle")
    shot.prepare(page)
    photograph = page.locator(shot.part).screenshot if shot.part else page.screenshot
    before, now = b"", photograph()
    deadline = time.monotonic() + PATIENCE_SECONDS
    while before != now and time.monotonic() < deadline:
        page.wait_for_timeout(1000 * SETTLE_SECONDS)
        before, now = now, photograph()
    context.close()
    return now


def small(png: bytes) -> bytes:
    """The same picture in at most 128 colours."""
    packed = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(
        packed, "PNG", optimize=True
    )
    return packed.getvalue()


if __name__ == "__main__":
    main()
