"""The programs that train, described alike, to be run in this process or in processes of their own that are killed.

All train on the same drawn scenes: 24 images, which are 12 steps of two images in an epoch.
"""

from __future__ import annotations

import importlib.util
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from training.engine.checkpoint import read_checkpoint
from training.engine.errors import Flags, run_program

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
STEPS = 12  # of an epoch


def _module(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"faults_{file.parent.name}_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def same(a: Any, b: Any) -> bool:
    """Whether two contents of files are equal to the last bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


class Program(ABC):
    """How a program is called, and what it leaves where.

    Args:
        scenes: folder of the data.
        setup: folder that :meth:`prepare` has filled once for all tests.
        place: of this test's runs.

    Attributes:
        name: of the program.
        entry: what Python runs: ``-m`` and a module, or a file.
        flags: what it calls its options, for messages.
        log: name of a run's log.
        release: file for users, below a run's folder, and ``key`` of its weights.
        bad: options that make it end after three bad steps in a row, and how many they are.
    """

    name: str
    entry: list[str]
    flags: Flags
    log: str
    release: str
    key: str
    bad: tuple[list[str], int] = ([], 10)

    def __init__(self, scenes: Path, setup: Path, place: Path) -> None:
        self.scenes, self.setup, self.place = scenes, setup, place

    @classmethod
    @abstractmethod
    def prepare(cls, scenes: Path, setup: Path) -> None:
        """Write what all runs share."""

    @abstractmethod
    def arguments(self, run: str, *more: str, resume: bool = False, **options: Any) -> list[str]:
        """Command line of a run.

        Args:
            run: its name.
            more: further arguments, as the program knows them.
            resume: go on where the run exists, else begin.
            options: any of ``epochs``, ``batch_size``, ``workers``, ``save_every`` (steps), ``max_steps``,
                ``log_every``, ``max_skipped``, ``annotations``, ``images``, ``place``.
        """

    @abstractmethod
    def main(self, argv: list[str]) -> int:
        """The program in this process; its exit status."""

    @abstractmethod
    def read_release(self, path: Path) -> dict[str, Any]:
        """What a file for users holds; UserError or RuntimeError for a damaged one."""

    def __call__(self, run: str, *more: str, **options: Any) -> int:
        return self.main(self.arguments(run, *more, **options))

    def folder(self, run: str) -> Path:
        """Of a run."""
        return self.place / run

    def checkpoints(self, run: str) -> list[Path]:
        """Complete checkpoints of a run."""
        return sorted((self.folder(run) / "checkpoints").glob("epoch_*.pt"))

    def steps(self, run: str) -> int:
        """Steps of the newest checkpoint inside an epoch, from file names, as epoch * 1000 + step; -1 without one."""
        found = [re.fullmatch(r"epoch_(\d+)_step_(\d+)\.pt", f.name) for f in self.checkpoints(run)]
        return max((1000 * int(m[1]) + int(m[2]) for m in found if m), default=-1)

    def text(self, run: str) -> str:
        """Log of a run."""
        return (self.folder(run) / self.log).read_text()

    def last(self, run: str, epoch: int) -> dict[str, Any]:
        """Content of the checkpoint at the end of an epoch."""
        return read_checkpoint(self.folder(run) / "checkpoints" / f"epoch_{epoch}.pt")

    def check_equal(self, epoch: int, *runs: str) -> None:
        """Checkpoints (weights, optimizer, random states) and files for users are the same to the last bit."""
        whole = self.last(runs[0], epoch)
        assert whole["step"] > 0 and whole["optimizer"]["state"]
        for other in runs[1:]:
            resumed = self.last(other, epoch)
            for key in ("state_dict", "optimizer", "random_states", "step", "step_in_epoch", "epoch"):
                assert same(whole[key], resumed[key]), key
            a, b = (self.read_release(self.folder(run) / self.release) for run in (runs[0], other))
            assert same(a[self.key], b[self.key])


class Distillation(Program):
    """``python -m training.main``."""

    name, entry, flags, log = "clipself", ["-m", "training.main"], Flags(), "out.log"
    release, key, bad = "checkpoints/clipself.pt", "state_dict", (["--max-nan-steps=3"], 3)
    flag_of = {"save_every": "save-every-n-steps", "log_every": "log-every-n-steps", "annotations": "train-data",
               "images": "train-image-root", "place": "logs"}  # fmt: skip

    @classmethod
    def prepare(cls, scenes: Path, setup: Path) -> None:
        tiny = _module(TESTS / "training" / "conftest.py").TINY
        (setup / "tiny-eva.json").write_text(json.dumps(tiny))

    def arguments(self, run: str, *more: str, resume: bool = False, **options: Any) -> list[str]:
        values = {
            "model": self.setup / "tiny-eva.json", "dataset-type": "grid_distill", "det-image-size": 64,
            "batch-size": 2, "epochs": 2, "lr": 1e-3, "warmup": 2, "workers": 0, "logs": self.place, "name": run,
            "max-split": 3, "max-boxes": 6, "log-every-n-steps": 4, "device": "cpu", "alpha": 0.7,
            "train-data": self.scenes / "annotations/instances_train2017.json",
            "train-image-root": self.scenes / "train2017",
        }  # fmt: skip
        values |= {self.flag_of.get(k, k.replace("_", "-")): v for k, v in options.items()}
        return [*(f"--{k}={v}" for k, v in values.items()), *more, *(["--resume=auto"] if resume else [])]

    def main(self, argv: list[str]) -> int:
        from training.main import main

        return main(argv)

    def read_release(self, path: Path) -> dict[str, Any]:
        from open_clip.weights import load_state_dict_file

        return {"state_dict": load_state_dict_file(path)}


class Detector(Program):
    """A detector: one config file, the rest on the command line."""

    log, release = "train.log", "latest.pt"
    overrides = {"epochs": "train.epochs", "batch_size": "train.batch_size", "workers": "data.workers",
                 "log_every": "train.log_every", "max_skipped": "data.max_skipped",
                 "annotations": "data.train_annotations", "images": "data.train_images"}  # fmt: skip

    def arguments(self, run: str, *more: str, resume: bool = False, **options: Any) -> list[str]:
        options = {"epochs": 2, "batch_size": 2, "workers": 0, "log_every": 4, **options}
        folder = Path(options.pop("place", self.place)) / run
        found = [str(self.setup / "tiny.toml"), "--work-dir", str(folder), "--device", "cpu"]
        for flag in ("save_every", "max_steps"):
            name = {"save_every": "--save-every-steps", "max_steps": "--max-steps"}[flag]
            found += [name, str(options.pop(flag, 0))]
        found += [f"{self.overrides[k]}={v}" for k, v in options.items()]
        return [*found, *more, *(["--resume"] if resume else [])]


class FViT(Detector):
    """``python F-ViT/train.py``."""

    name, entry, key = "fvit", [str(ROOT / "F-ViT" / "train.py")], "detector"

    @property
    def flags(self) -> Flags:
        from ovdet.task import FLAGS

        return FLAGS

    @classmethod
    def prepare(cls, scenes: Path, setup: Path) -> None:
        import numpy as np

        names = json.loads((scenes / "annotations" / "instances_train2017.json").read_text())["categories"]
        embeddings = np.random.default_rng(0).normal(size=(len(names) + 1, 128)).astype(np.float32)
        np.save(setup / "embeddings.npy", embeddings)
        sections = {
            "model": {"name": "ViT-Ti-8-64", "pretrained": "", "blocks": [1, 2, 3], "channels": 8, "box_convs": 1,
                      "mask_convs": 1, "rpn_post_nms": 20, "roi_samples": 8, "masks": True},
            "data": {"train_annotations": str(scenes / "annotations" / "instances_train2017.json"),
                     "train_images": str(scenes / "train2017"), "embeddings": str(setup / "embeddings.npy"),
                     "novel": [], "image_size": 64, "keep_empty": True, "min_image_side": 0},
            "train": {"precision": "fp32", "eval_every": 0, "warmup_steps": 2, "scale_lr": False},
        }  # fmt: skip
        lines = []
        for name, own in sections.items():
            lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in own.items())]
        (setup / "tiny.toml").write_text("\n".join(lines))

    def main(self, argv: list[str]) -> int:
        from ovdet.fvit.commands import train

        return run_program(lambda: train.main(argv), self.flags)

    def read_release(self, path: Path) -> dict[str, Any]:
        from ovdet.files import load

        return load(path)


class Glip(Detector):
    """``python GLIP/train.py``."""

    name, entry, release, key = "glip", [str(ROOT / "GLIP" / "train.py")], "model_last.pt", "model"

    @property
    def flags(self) -> Flags:
        from ovdet.glip.task import FLAGS

        return FLAGS

    @classmethod
    def prepare(cls, scenes: Path, setup: Path) -> None:
        from ovdet.config import format_config

        pytest.importorskip("transformers")
        shared = _module(TESTS / "ovdet" / "glip" / "conftest.py")
        vocabulary = setup / "vocab.txt"
        vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys(shared.WORDS)]))
        config = shared.tiny_config(vocabulary, deform=False)
        data, train = config.data, config.train
        data.train_annotations = str(scenes / "annotations" / "instances_train2017.json")
        data.train_images = str(scenes / "train2017")
        data.sizes, data.test_size, data.longest = [64], 64, 200
        train.lr, train.text_lr, train.warmup_steps = 3e-3, 3e-4, 2
        train.precision, train.ema, train.eval_every = "fp32", 0.5, 0
        config.model.checkpoint = False
        (setup / "tiny.toml").write_text(format_config(config))

    def main(self, argv: list[str]) -> int:
        from ovdet.glip.commands import train

        return train.run(argv)

    def read_release(self, path: Path) -> dict[str, Any]:
        from training.engine.checkpoint import read_file

        return read_file(path)


PROGRAMS = {program.name: program for program in (Distillation, FViT, Glip)}


@pytest.fixture(scope="session", name="same")
def same_of() -> Callable[[Any, Any], bool]:
    """Whether two contents of files are equal to the last bit."""
    return same


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of drawn scenes in COCO's layout: 24 for training, 6 for validation."""
    from training.scenes.generate import main as generate

    folder = tmp_path_factory.mktemp("scenes")
    generate(["--out", str(folder), "--train", "24", "--val", "6", "--pairs", "6", "--size", "64", "--things", "8",
              "--stuff", "3", "--novel", "2"])  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def prepared(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Path], Program]:
    """Makes a program, by name, whose runs are in a folder."""
    setups: dict[str, Path] = {}

    def make(name: str, place: Path) -> Program:
        if name not in setups:
            setup = tmp_path_factory.mktemp(name)
            PROGRAMS[name].prepare(scenes, setup)
            setups[name] = setup
        return PROGRAMS[name](scenes, setups[name], place)

    return make


@pytest.fixture(params=["clipself", "fvit", pytest.param("glip", marks=pytest.mark.slow)])
def program(request: Any, prepared: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Program:
    """Each of the programs in turn."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RANK", raising=False)
    return prepared(request.param, tmp_path / "runs")


@pytest.fixture(scope="session")
def tiny_config(prepared: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Config file of the distillation's model."""
    return prepared("clipself", tmp_path_factory.mktemp("unused")).setup / "tiny-eva.json"


@pytest.fixture
def distillation(scenes: Path, tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The distillation program with all its flags, for what it alone has."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RANK", raising=False)
    return _module(TESTS / "training" / "conftest.py").Program(scenes, tiny_config, tmp_path / "logs")


@pytest.fixture
def launcher(program: Program, tmp_path: Path) -> Iterator[Any]:
    """Starts processes of a program (see ``processes.py``), which end with the test."""
    found = _module(Path(__file__).with_name("processes.py")).Launcher(program, tmp_path)
    yield found
    for run in found.started:
        run.kill()
