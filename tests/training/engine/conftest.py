"""Two processes for a piece of code."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

SRC = Path(__file__).parents[3] / "src"
HEAD = """
from training.engine.distributed import end_distributed, init_distributed
dist = init_distributed("cpu", timeout_s=60)
"""


@pytest.fixture
def two_processes(tmp_path):
    """Runs code on two processes of a group (``dist`` is this process among them); both must end well."""

    def run(code: str, seconds: float = 120) -> list[str]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment = {"PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1", "HOME": str(tmp_path), "PATH": os.defpath,
                       "CUDA_VISIBLE_DEVICES": "", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                       "MASTER_PORT": str(port)}  # fmt: skip
        # At once: on a busy machine a thread of torch may still run when the interpreter is taken down, and abort.
        end = "\nend_distributed()\nimport os, sys\nsys.stdout.flush()\nos._exit(0)\n"
        command = [sys.executable, "-c", HEAD + textwrap.dedent(code) + end]
        started = [
            subprocess.Popen(command, env=environment | {"RANK": rank, "LOCAL_RANK": rank}, stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT, text=True)
            for rank in "01"
        ]  # fmt: skip
        try:
            outputs = [process.communicate(timeout=seconds)[0] for process in started]
        finally:
            for process in started:
                process.kill()
        assert all(process.returncode == 0 for process in started), "\n".join(outputs)[-4000:]
        return outputs

    return run
