"""The source archive holds all that an installation from it needs."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SUFFIXES = (".json", ".gz", ".txt")  # of what lies beside the modules and is read by them


def test_a_package_can_be_made_from_the_source_archive(tmp_path):
    pytest.importorskip("setuptools")
    clone, out = tmp_path / "clone", tmp_path / "out"
    leave = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "src", clone / "src", ignore=leave)
    for name in ("setup.py", "pyproject.toml", "requirements.txt", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, clone)
    make = f"from setuptools.build_meta import build_sdist; build_sdist({str(out)!r})"
    done = subprocess.run([sys.executable, "-c", make], cwd=clone, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (archive,) = out.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(tmp_path, filter="data")
    unpacked = tmp_path / archive.name.removesuffix(".tar.gz")
    done = subprocess.run([sys.executable, "setup.py", "--version"], cwd=unpacked, text=True, capture_output=True)
    assert done.returncode == 0 and "clipself" in done.stdout, done.stderr[-2000:]
    files = {p.relative_to(clone / "src") for p in (clone / "src").rglob("*") if p.suffix in (".py", *SUFFIXES)}
    files = {f for f in files if "egg-info" not in str(f)}
    assert len(files) > 100
    missing = {f for f in files if not (unpacked / "src" / f).is_file()}
    assert not missing
