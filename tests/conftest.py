"""Fixtures shared by all tests."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = Path(os.environ.get("CLIPSELF_GOLDEN", Path(__file__).parent / "golden"))


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of numbers recorded from the reference implementations.

    CLIPSELF_GOLDEN names another draw, with other models, sizes, counts and names; tests whose files are not there
    skip themselves.
    """
    return GOLDEN


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "recorded(file, pattern, argument='case'): one test for each different text that the pattern (its group, where "
        "it has one) finds among the names in a golden .json or .npz file, or among the files of a golden folder",
    )


def recorded_names(file: str, pattern: str) -> list[str]:
    """What ``pattern`` matches of each name recorded in ``file`` of the golden folder, in order, each once."""
    path = GOLDEN / file
    if path.is_dir():
        names = sorted(p.name for p in path.iterdir())
    elif not path.is_file():
        return []
    elif path.suffix == ".json":
        names = list(json.loads(path.read_text(encoding="utf-8")))
    else:
        with np.load(path) as arrays:
            names = arrays.files
    found = [match for name in names if (match := re.fullmatch(pattern, name))]
    return list(dict.fromkeys(match[1] if match.re.groups else match[0] for match in found))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Cases of another draw have other names and numbers: tests are made of what its files hold."""
    for mark in metafunc.definition.iter_markers("recorded"):
        file, pattern = mark.args
        cases = recorded_names(file, pattern) or [
            pytest.param("", marks=pytest.mark.skip(f"{file} with {pattern} is not among the golden files"))
        ]
        metafunc.parametrize(mark.kwargs.get("argument", "case"), cases)


def pytest_sessionstart() -> None:
    """One backward pass before all tests, so that processes can be forked in any order of them.

    The first one decides for good whether autograd needs threads, which a fork does not survive; after a test with
    tensors that are imagined on a GPU it would, though there is none.
    """
    torch.ones(1, requires_grad=True).sum().backward()


@pytest.fixture(scope="session")
def as_module() -> Callable[[str], ModuleType]:
    """``as_module("tools/show.py")``: a Python file of the project that is no part of a package, as a module."""

    def load(path: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"loaded_{Path(path).stem}", ROOT / path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def in_browser(as_module: Callable[[str], ModuleType]) -> Callable[..., AbstractContextManager[Any]]:
    """Called with the arguments of ``tools/page.py``, in a ``with``: Playwright's page of it, in a headless browser."""
    return as_module("tests/browser.py").in_browser


@pytest.fixture(scope="session")
def in_processes() -> Callable[..., None]:
    """``in_processes(function, world, *args)``: ``function(rank, *args)`` in ``world`` processes at once.

    They are forked, which saves each the seconds of importing torch; where there is a GPU, whose autograd threads do
    not survive a fork, they are spawned. A process that fails makes the call raise.
    """

    def run(function: Callable[..., None], world: int, *args: Any) -> None:
        method = "spawn" if torch.cuda.is_available() else "fork"
        torch.multiprocessing.start_processes(_one_thread, (function, *args), nprocs=world, start_method=method)

    return run


def _one_thread(rank: int, function: Callable[..., None], *args: Any) -> None:
    torch.set_num_threads(1)
    function(rank, *args)


@pytest.fixture(autouse=True)
def log_handlers_put_back() -> Iterator[None]:
    """Handlers that a program run within a test adds to the root logger end with the test, as its terminal does."""
    root = logging.getLogger()
    before, level, disabled = list(root.handlers), root.level, root.manager.disable
    yield
    logging.disable(disabled)
    for handler in [h for h in root.handlers if h not in before]:
        root.removeHandler(handler)
        handler.close()
    root.setLevel(level)
