"""The releases of torch, torchvision and timm that are declared: the oldest, and the newest there is.

Each goes into a folder of its own, in front of the installed ones, and the tests of this folder run with it. The
oldest torch takes 3 GB to fetch and 6 GB of disk; an index of CPU builds in ``PIP_EXTRA_INDEX_URL`` makes that 200 MB.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SPACE = 10e9  # bytes


def oldest(*packages: str) -> list[str]:
    """``name==version`` of the declared minima."""
    declared = dict(re.findall(r"(?m)^([\w-]+)>=([\d.]+)", (ROOT / "requirements.txt").read_text()))
    return [f"{name}=={declared[name]}" for name in packages]


def install(requirements: list[str], folder: Path, *flags: str) -> None:
    """Into a folder; skip where there is no network, no space, or no such release for this Python."""
    if shutil.disk_usage(folder.parent).free < SPACE:
        pytest.skip(f"less than {SPACE / 1e9:.0f} GB free in {folder.parent}")
    command = [sys.executable, "-m", "pip", "install", "-q", "--target", str(folder), *flags, *requirements]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        if re.search("No matching distribution|connection|No module named pip", result.stderr, re.IGNORECASE):
            pytest.skip(f"{' '.join(requirements)} cannot be had here: {result.stderr.strip().splitlines()[-1]}")
        raise AssertionError(result.stderr)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["oldest", "oldest timm", "newest timm"])
def test_models_run_on_declared_releases(tmp_path, case):
    folder = tmp_path / "packages"
    if case == "oldest":
        install(oldest("torch", "torchvision", "timm"), folder)
    elif case == "oldest timm":
        install(oldest("timm"), folder, "--no-deps")
    else:
        install(["timm"], folder, "--no-deps")
    path = os.pathsep.join([str(folder), str(ROOT / "src")])
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    show = "import torch, torchvision, timm; print(timm.__file__, torch.__version__, torchvision.__version__)"
    versions = subprocess.run([sys.executable, "-c", show], env=environment, capture_output=True, text=True)
    assert versions.stdout.startswith(str(folder)), versions.stdout + versions.stderr
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(Path(__file__).parent)],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, f"{versions.stdout}\n{result.stdout[-3000:]}"
