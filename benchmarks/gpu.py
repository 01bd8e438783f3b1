"""Everything worth knowing about this project on a GPU, in one command that fits a short loan of one.

    python benchmarks/gpu.py --minutes 20            on a GPU; writes benchmarks/results/<device>.json
    python benchmarks/gpu.py --smoke --device cpu    the same stages with tiny sizes, to see that they run

Stages run in order of importance, each in a process of its own with a time limit: environment, tests, agreement with
the CPU, the program (device crops, saving, resuming, scaler), one process of data parallelism, its profile, the step
beside the conventional one, compiling, what methods cost, attention kernels, L/14, detector, loader, evaluation.
Results are written after every stage, so that a run that ends early keeps what it has. A stage that fails is named and
the next one goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "benchmarks")]

from common import print_table  # noqa: E402

LOSS = re.compile(r"step (\d+)/\d+  loss ([0-9.]+|nan|inf)")
RATE = re.compile(r"([0-9.]+) images/s  data ([0-9.]+) s  step ([0-9.]+) s")
REQUIRED = ("torch", "torchvision", "timm", "numpy", "pycocotools", "ftfy", "regex")
LOSSES_AGREE = 2e-4  # of float32 training on CPU and GPU, over eight steps; the log rounds to 1e-4


@dataclass
class Run:
    """A run of this program: sizes, where it keeps things, and what it has found."""

    device: str
    smoke: bool
    folder: Path
    output: Path | None
    deadline: float
    results: dict[str, dict] = field(default_factory=dict)

    @property
    def model(self) -> str:
        """The model whose speed is measured."""
        return "ViT-Ti-8-64" if self.smoke else "EVA02-CLIP-B-16"

    def command(self, *arguments: object, limit: float) -> str:
        """Run Python with arguments; its output.

        Raises:
            RuntimeError: a failure, or the time limit; with the end of what was written.
        """
        paths = [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
        if not Path(find_spec("torch").origin).with_name("__pycache__").is_dir():
            env.pop("PYTHONDONTWRITEBYTECODE", None)  # every process would compile PyTorch's modules anew: 7 s
            env["PYTHONPYCACHEPREFIX"] = str(self.folder / "bytecode")
        limit = max(min(limit, self.deadline - time.monotonic()), 1)
        try:
            done = subprocess.run(
                [sys.executable, *map(str, arguments)], env=env, cwd=ROOT, timeout=limit, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            text = (error.output or b"").decode(errors="replace")[-500:]
            raise RuntimeError(f"stopped after {limit:.0f} s; last lines: {text}") from error
        if done.returncode:
            raise RuntimeError(f"exit {done.returncode}: {' '.join(done.stdout.split())[-3000:]}")
        return done.stdout

    def benchmark(self, script: str, *arguments: object, limit: float) -> dict:
        """The JSON line that one of the benchmarks ends with."""
        return json.loads(self.command(ROOT / "benchmarks" / script, *arguments, limit=limit).splitlines()[-1])

    def train(self, name: str, *arguments: object, limit: float, launcher: Sequence[str] = ()) -> str:
        """``training.main`` on the drawn scenes; its log."""
        data = self.folder / "scenes"
        if not data.is_dir():
            size, count = (64, 12) if self.smoke else (640, 64)
            scenes = ["--out", data, "--train", count, "--val", 4, "--size", size]
            self.command("-m", "training.scenes", *scenes, limit=120)
        where = ["-m", "training.main"] if not launcher else [*launcher, "-m", "--", "training.main"]
        flags = ["--train-data", data / "annotations/instances_train2017.json",
                 "--train-image-root", data / "train2017", "--lock-image", "--lock-image-unlocked-groups", 12,
                 "--warmup", 5, "--save-frequency", 0,
                 "--logs", self.folder / "runs", "--name", name, "--epochs", 99]  # fmt: skip
        self.command(*where, *flags, *arguments, limit=limit)
        return (self.folder / "runs" / name / "out.log").read_text()

    def tiny(self, device: str) -> list[object]:
        """Flags of a small training on a device."""
        side = 64 if self.smoke else 128
        return ["--model", "ViT-Ti-8-64", "--det-image-size", side, "--batch-size", 4, "--device", device,
                "--workers", 2, "--log-every-n-steps", 1]  # fmt: skip

    def large(self) -> list[object]:
        """Flags of the training whose speed counts."""
        side = 64 if self.smoke else 1024
        return ["--model", self.model, "--det-image-size", side, "--batch-size", 2, "--device", self.device,
                "--workers", 1 if self.smoke else 8, "--log-every-n-steps", 3 if self.smoke else 7]  # fmt: skip


def rates(log: str) -> dict:
    """Images per second and the share of waiting of a log's last line, and how the speed came about, line by line."""
    found = RATE.findall(log)
    if not found:
        raise RuntimeError("the log has no line with images/s")
    speed, waited, step = map(float, found[-1])
    by_line = [float(line[0]) for line in found]
    return {"images_per_s": speed, "data_wait_share": waited / max(step, 1e-9), "images_per_s_by_line": by_line}


# -- stages, in order of importance ----------------------------------------------------------------------------------


def environment(run: Run) -> dict:
    """Versions, memory, and what the card reaches in matrix products and copies."""
    from importlib.metadata import PackageNotFoundError, version

    import torch

    versions = {}
    for name in REQUIRED:
        try:
            versions[name] = version(name)
        except PackageNotFoundError as error:
            raise RuntimeError(f"{name} is not installed: pip install -r requirements.txt") from error
    out: dict = {"versions": versions, "cores": os.cpu_count()}
    if Path("/dev/shm").is_dir():
        out["shared_memory_gb"] = shutil.disk_usage("/dev/shm").total / 1e9
    if run.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        out |= {"name": properties.name, "memory_gb": properties.total_memory / 1e9}
        out["cudnn"] = torch.backends.cudnn.version()
    dtype = torch.bfloat16 if run.device == "cuda" else torch.float32
    side, count = (8192, 2**28) if run.device == "cuda" else (512, 2**22)
    a = torch.randn(side, side, device=run.device, dtype=dtype)
    x = torch.empty(count, device=run.device, dtype=torch.uint8)
    out["tflop_per_s"] = 2 * side**3 / _seconds(lambda: a @ a, run.device) / 1e12
    out["copy_gb_per_s"] = 2 * count / _seconds(x.clone, run.device) / 1e9
    return out


def _seconds(work: Callable[[], object], device: str, repeats: int = 10) -> float:
    """Fastest of some repeats, after one to warm up."""
    import torch

    times = []
    for _ in range(repeats + 1):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def tests(run: Run) -> dict:
    """The tests that need a GPU, and those of data preparation, precision and models."""
    chosen = ["tests/training/data/test_prepare.py", "tests/training/engine/test_precision.py", "tests/gpu"]
    chosen = [c for c in chosen if (ROOT / c).exists()][: 1 if run.smoke else None]
    last = run.command("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *chosen, limit=180).splitlines()[-1]
    return {"tests": last.strip("= ")}


def agreement(run: Run) -> dict:
    """Eight float32 steps on the CPU and on the device: the same losses."""
    losses = {}
    for device in ("cpu", run.device):
        log = run.train(
            f"agree_{device}", *run.tiny(device), "--precision", "fp32", "--max-steps", 8, "--seed", 3,
            *(["--resume", "latest"] if device in losses else []), limit=120,
        )  # fmt: skip
        losses[device] = [float(loss) for _, loss in LOSS.findall(log)]
    ours, theirs = losses[run.device], losses["cpu"]
    worst = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    if not worst <= LOSSES_AGREE:
        raise RuntimeError(f"losses of CPU and {run.device} differ by {worst:.2g}: {theirs} and {ours}")
    return {"losses_differ_by": worst}


def program(run: Run) -> dict:
    """Crops on the device, a save inside an epoch, resuming, evaluation, and mixed precision."""
    data = run.folder / "scenes"
    flags = [*run.tiny(run.device), "--crop-on", "device", "--save-every-n-steps", 3, "--val-image-root",
             data / "val2017", "--val-data", data / "annotations/panoptic_val2017.json"]  # fmt: skip
    run.train("program", *flags, "--max-steps", 4, limit=120)
    log = run.train("program", *flags, "--max-steps", 8, "--resume", "latest", limit=120)
    half = ["--precision", "amp"] if run.device == "cuda" else []
    run.train("half", *run.tiny(run.device), *half, "--alpha", 0.7, "--max-steps", 4, limit=120)
    return {"last_loss": float(LOSS.findall(log)[-1][1])}


def profile(run: Run) -> dict:
    """The program's own speed, and which attention kernel runs."""
    steps = 6 if run.smoke else 84  # numbers of crops, whose memory must be found first, keep changing
    log = run.train("profile", *run.large(), "--max-steps", steps, "--profile", 2 if run.smoke else 5, limit=180)
    text = "".join(f.read_text(errors="replace") for f in (run.folder / "runs/profile/profile").glob("*.txt"))
    kernels = [k for k in ("flash", "cudnn", "fmha_cutlass", "softmax") if k in text]
    slowest = [" ".join(line.split()) for line in text.splitlines()[:40]]
    return {**rates(log), "attention_kernels": kernels, "operators": slowest}


def compiled(run: Run) -> dict:
    """The program with ``--compile``."""
    log = run.train("compiled", *run.large(), "--compile", "--max-steps", 6 if run.smoke else 60, limit=300)
    return {**rates(log), "fell_back": "recompile_limit" in log}


def attention(run: Run) -> dict:
    """The program with each kind of attention kernel: images/s, or why the card has none."""
    found: dict = {}
    for name in ("flash", "math") if run.smoke else ("auto", "flash", "cudnn", "efficient"):
        flags = [*run.large(), "--attention", name, "--max-steps", 6 if run.smoke else 28]
        try:
            found[name] = rates(run.train(f"attention_{name}", *flags, limit=90))["images_per_s"]
        except RuntimeError as error:
            found[name] = " ".join(str(error).split())[-200:]
    if not any(isinstance(rate, float) for rate in found.values()):
        raise RuntimeError(f"no kernel of attention runs: {found}")
    return found


def _step(run: Run, *arguments: object, limit: float) -> dict:
    sizes = ["--sizes", 64, "--batches", 2, "--crops", 2, "--steps", 2] if run.smoke else []
    return run.benchmark("train_step.py", "--model", run.model, "--device", run.device, *arguments, *sizes, limit=limit)


def step(run: Run) -> dict:
    """A step beside the conventional one, eager and compiled: ratio, memory, agreement of losses, waiting for data."""
    more = [] if run.smoke else ["--compile", "--batches", 2, 8, "--steps", 10, "--workers", 8, "--loader-steps", 30]
    return _step(run, *more, "--curve-regions", "--curve-sizes", limit=300)


def methods(run: Run) -> dict:
    """What a step of all other methods costs beside CLIPSelf's: seconds and memory."""
    small = ["--model", run.model, "--size", 64, "--batch", 2, "--crops", 2, "--methods", "sc", "--rounds", 1]
    large = ["--size", 1024, "--batch", 2, 8, "--crops", 20, "--steps", 5, "--rounds", 1]
    return run.benchmark("method_cost.py", "--device", run.device, *(small if run.smoke else large), limit=300)


def large_model(run: Run) -> dict:
    """L/14-336 at 896, eager and compiled."""
    if run.smoke:
        return {"skipped": "smoke"}
    return run.benchmark(
        "train_step.py", "--model", "EVA02-CLIP-L-14-336", "--sizes", 896, "--batches", 2, 8, "--compile",
        "--no-baseline", "--steps", 6, "--loader-steps", 0, "--curve-regions", "--curve-sizes", limit=360,
    )  # fmt: skip


def loader(run: Run) -> dict:
    """Delivery by the loaders."""
    sizes = ["--workers", 1, "--seconds", 1, "--count", 4] if run.smoke else ["--workers", 8, "--batch-size", 8]
    return run.benchmark("data.py", *sizes, "--rounds", 1, *([] if run.smoke else ["--seconds", 6]), limit=120)


def parallel(run: Run) -> dict:
    """One process under torchrun: NCCL, the wrapper, gathering of objects."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1"]
    log = run.train("parallel", *run.tiny(run.device), "--max-steps", 6, limit=120, launcher=launcher)
    return {"last_loss": float(LOSS.findall(log)[-1][1])}


def evaluation(run: Run) -> dict:
    """The mAcc evaluation beside the plain one."""
    sizes = ["--count", 2, "--size", 64] if run.smoke else ["--size", 1024, "--count", 16, "--batch-size", 8]
    model = ["--model", run.model] if run.smoke else []
    return run.benchmark("evaluate.py", *model, "--device", run.device, *sizes, "--rounds", 1, limit=180)


def detector(run: Run) -> dict:
    """F-ViT: training and testing."""
    if run.smoke:
        return {"skipped": "smoke"}
    return run.benchmark("detector.py", "--device", run.device, "--steps", 15, "--workers", 8, limit=240)


STAGES: tuple[Callable[[Run], dict], ...] = (
    environment, tests, agreement, program, parallel, profile, step, compiled, methods, attention, large_model,
    detector, loader, evaluation,
)  # fmt: skip


def save(run: Run) -> None:
    """Write what is known so far."""
    if run.output is not None:
        run.output.parent.mkdir(parents=True, exist_ok=True)
        temporary = run.output.with_suffix(".part")
        temporary.write_text(json.dumps(run.results, indent=1) + "\n")
        os.replace(temporary, run.output)


def short(result: dict) -> str:
    """The plain figures of a stage, in a line."""
    plain = {k: v for k, v in result.items() if isinstance(v, (int, float, str, bool))}
    hidden = ("status", "seconds", "device", "model")
    shown = [f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in plain.items() if k not in hidden]
    return ", ".join(shown)[:110]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages; exit status 1 when one failed."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20, help="in all; stages that no longer fit are left out")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", nargs="+", choices=[s.__name__ for s in STAGES], help="these stages alone")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes; nothing is written to results/")
    parser.add_argument("--folder", help="keep scenes and runs there, and take the scenes that lie there")
    parser.add_argument("--out", type=Path, help="file of the results; by default results/<device>.json")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("error: no GPU is visible to PyTorch; --smoke --device cpu tries the stages without one", file=sys.stderr)
        return 2
    name = torch.cuda.get_device_name().replace(" ", "_") if args.device == "cuda" else "cpu"
    output = args.out or (None if args.smoke else ROOT / "benchmarks" / "results" / f"{name}.json")
    failed = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary if args.folder is None else args.folder).absolute()
        run = Run(args.device, args.smoke, folder, output, time.monotonic() + 60 * args.minutes)
        rows = []
        for stage in STAGES:
            if args.only and stage.__name__ not in args.only:
                continue
            start = time.monotonic()
            print(f"== {stage.__name__}: {stage.__doc__.splitlines()[0]}", flush=True)
            try:
                if run.deadline - start < 5:
                    raise RuntimeError("no time left")
                result = {"status": "ok", **stage(run)}
            except (RuntimeError, ValueError, OSError) as error:
                result = {"status": "failed", "why": " ".join(str(error).split())}
                failed += 1
            result["seconds"] = time.monotonic() - start
            run.results[stage.__name__] = result
            save(run)
            text = result["why"][-300:] if result["status"] == "failed" else short(result)
            rows.append([stage.__name__, result["status"], f"{result['seconds']:.0f}", text])
            print(f"   {result['status']}: {text}", flush=True)
    print_table(f"On {name}", ["stage", "", "s", "found"], [[*r[:3], r[3][:110]] for r in rows])
    if output is not None:
        print(f"written to {output}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
