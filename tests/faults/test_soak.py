"""The quick start's two trainings for a long time: memory and open files stay where they are."""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import pytest

from training.engine.loop import EXIT_INTERRUPTED

ROOT = Path(__file__).parents[3]
MINUTES = float(os.environ.get("CLIPSELF_SOAK_MINUTES", "30"))  # of CPU time, both trainings together
WARM_UP = 0.25  # share of the time in which caches may still fill
WINDOWS = 6  # the time after the warm-up is cut into so many; their medians are compared
GROWTH = 1.05
TICKS = os.sysconf("SC_CLK_TCK")

TRAININGS = {
    "contrastive": {"train-data": "annotations/captions_pairs.json", "train-image-root": "pairs", "batch-size": 64},
    "grid_distill": {"train-data": "annotations/instances_train2017.json", "train-image-root": "train2017",
                     "batch-size": 8, "max-split": 4, "max-boxes": 12, "lock-image-unlocked-groups": 8},
}  # fmt: skip


@pytest.fixture(scope="module")
def quick_start_data(tmp_path_factory) -> Path:
    """As the quick start draws it, with fewer images."""
    from training.scenes.generate import main as generate

    folder = tmp_path_factory.mktemp("scenes")
    generate(["--out", str(folder), "--train", "400", "--val", "16", "--pairs", "640", "--size", "128", "--pair-size",
              "64", "--things", "16", "--stuff", "6", "--pattern-names", "--min-object", "0.28", "--max-object", "0.5",
              "--max-objects", "4"])  # fmt: skip
    return folder


def stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat after the name: state, parent, ..."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def children(parent: int) -> list[int]:
    found = []
    for entry in os.listdir("/proc"):
        try:
            if entry.isdigit() and int(stat(int(entry))[1]) == parent:
                found.append(int(entry))
        except (FileNotFoundError, ProcessLookupError):
            pass  # ended meanwhile
    return found


def cpu_seconds(main: int, workers: list[int]) -> float:
    """CPU time of a process, its ended children and its living ones."""
    ticks = sum(map(int, stat(main)[11:15]))  # utime, stime, cutime, cstime
    for pid in workers:
        try:
            ticks += sum(map(int, stat(pid)[11:13]))
        except (FileNotFoundError, ProcessLookupError):
            pass
    return ticks / TICKS


def resident_mb(pid: int) -> float:
    line = next(s for s in Path(f"/proc/{pid}/status").read_text().splitlines() if s.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def watch(process: subprocess.Popen, seconds: float) -> dict[int, list[tuple[float, float, int]]]:
    """Samples (CPU seconds so far, resident MB, open files) of a process and its children, by process id."""
    samples = defaultdict(list)
    while process.poll() is None:
        workers = children(process.pid)
        used = cpu_seconds(process.pid, workers)
        for pid in (process.pid, *workers):
            try:
                samples[pid].append((used, resident_mb(pid), len(os.listdir(f"/proc/{pid}/fd"))))
            except (FileNotFoundError, ProcessLookupError, StopIteration):
                pass  # a worker of an evaluation ended
        if used > seconds:
            break
        time.sleep(1)
    return samples


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize("method", TRAININGS)
def test_memory_and_open_files_stay_flat(quick_start_data, tmp_path, method):
    data, seconds = quick_start_data, MINUTES * 60 / len(TRAININGS)
    flags = dict(TRAININGS[method])
    for name in ("train-data", "train-image-root"):
        flags[name] = data / flags[name]
    # Epochs pass quickly and evaluations and checkpoints are frequent, so that what leaks there leaks many times.
    flags |= {"model": "ViT-Ti-8-64", "dataset-type": method, "epochs": 100_000, "lr": 1e-4, "wd": 0.1, "warmup": 50,
              "save-every-n-steps": 47, "save-frequency": 0, "zeroshot-frequency": 5, "device": "cpu",
              "precision": "fp32", "workers": 1, "log-every-n-steps": 5, "logs": tmp_path / "logs", "name": "soak",
              "val-data": data / "annotations/panoptic_val2017.json", "val-image-root": data / "val2017",
              "det-image-size": 128}  # fmt: skip
    command = [sys.executable, "-m", "training.main", *(f"--{k}={v}" for k, v in flags.items())]
    command += ["--lock-image"] if method == "grid_distill" else []
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)}
    with open(tmp_path / "output", "wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
        try:
            samples = watch(process, seconds)
            assert process.poll() is None, (tmp_path / "output").read_text()[-2000:]
            process.send_signal(signal.SIGTERM)
            assert process.wait(180) == EXIT_INTERRUPTED
        finally:
            process.kill()
    lasting = {
        p: rows for p, rows in samples.items() if rows[0][0] < WARM_UP * seconds and rows[-1][0] > 0.95 * seconds
    }
    assert len(lasting) == 2, "the training process and its loader worker"
    for pid, rows in lasting.items():
        who = "main" if pid == process.pid else "worker"
        kept = [row for row in rows if row[0] > WARM_UP * seconds]
        size = len(kept) // WINDOWS
        windows = [kept[i * size : (i + 1) * size] for i in range(WINDOWS)]
        memory = [statistics.median(row[1] for row in window) for window in windows]
        files = [max(row[2] for row in window) for window in windows]
        print(f"\n{method} {who}: {rows[-1][0] / 60:.1f} CPU min, {len(rows)} samples, resident MB by window "
              f"{[round(m) for m in memory]}, open files {files}")  # fmt: skip
        assert max(memory) < GROWTH * memory[0], who
        # Every batch on its way from the worker holds a few open files, so the maximum of a window varies a little.
        assert max(files[WINDOWS // 2 :]) <= max(files[: WINDOWS // 2]) + 3, who
