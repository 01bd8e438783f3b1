"""The page of ``tools/page.py`` in a headless browser; tests that use it are skipped where there is none."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@contextlib.contextmanager
def in_browser(*arguments: str) -> Iterator[Any]:
    """Playwright's page, opened, of the page started with these arguments."""
    pytest.importorskip("gradio")
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium on this machine")
    with _served(*arguments) as address, playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1300, "height": 1000})
        page.goto(address)
        yield page
        browser.close()


@contextlib.contextmanager
def _served(*arguments: str) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), *sys.path]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tools" / "page.py"), *arguments, "--device", "cpu", "--port", str(port)]
    server = subprocess.Popen(command, env=environment)
    try:
        _wait_for(f"http://127.0.0.1:{port}", server)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(timeout=30)


def _wait_for(address: str, server: subprocess.Popen) -> None:
    """Until a server answers; fails when it has ended, or after two minutes."""
    for _ in range(240):
        assert server.poll() is None, "the page has ended"
        try:
            urllib.request.urlopen(address, timeout=5)
            return
        except OSError:
            time.sleep(0.5)
    raise AssertionError("the page does not answer")
