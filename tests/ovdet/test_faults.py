"""The detector's training under kills, damaged files and malformed data."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from ovdet.data.annotations import load_annotations
from ovdet.data.dataset import Skipped, TrainDataset, ViewOptions
from ovdet.data.loader import collate_train, targets_to
from ovdet.files import load as load_file
from ovdet.fvit.config import FViTConfig
from ovdet.vocabulary import make_vocabulary, training_labels
from training.engine.checkpoint import find_latest, read_checkpoint
from training.engine.errors import UserError
from training.scenes.generate import SceneOptions, write_dataset

ROOT = Path(__file__).resolve().parents[2]
STEPS = 36


def module_of(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Generated scenes with masks, and a tiny config for them."""
    folder = tmp_path_factory.mktemp("scenes")
    write_dataset(folder, train=16, val=2, options=SceneOptions(size=64, things=5), novel=1)
    novel = json.loads((folder / "annotations" / "split.json").read_text())["novel"]
    np.save(folder / "embeddings.npy", np.random.default_rng(0).normal(size=(6, 128)).astype(np.float32))
    data = {"train_annotations": str(folder / "annotations" / "instances_train2017.json"),
            "train_images": str(folder / "train2017"), "embeddings": str(folder / "embeddings.npy"), "novel": novel,
            "image_size": 64, "workers": 1}  # fmt: skip
    model = {"name": "ViT-Ti-8-64", "pretrained": "", "blocks": [1, 2, 3], "channels": 8, "box_convs": 1,
             "mask_convs": 1, "rpn_post_nms": 20, "roi_samples": 8, "masks": True}  # fmt: skip
    train = {"precision": "fp32", "batch_size": 4, "epochs": 100, "eval_every": 0, "warmup_steps": 2, "scale_lr": False}
    sections = {"model": model, "data": data, "train": train}
    text = [line for name, own in sections.items()
            for line in (f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in own.items()))]  # fmt: skip
    (folder / "tiny.toml").write_text("\n".join(text))
    return folder


def command(scenes: Path, work_dir: Path, *more: str) -> list[str]:
    return [sys.executable, str(ROOT / "F-ViT" / "train.py"), str(scenes / "tiny.toml"), "--work-dir", str(work_dir),
            "--device", "cpu", "--save-every-steps", "1", "--max-steps", str(STEPS), "--resume", *more]  # fmt: skip


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return all(map(same, a, b)) if isinstance(a, (list, tuple)) else a == b


@pytest.mark.slow
def test_twenty_kills_change_nothing(scenes: Path, tmp_path: Path):
    """A run that is killed twenty times at random moments ends with the weights of one that was left alone."""
    start = module_of("faults", ROOT / "tests" / "training" / "faults" / "conftest.py").Run
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    whole = start(command(scenes, tmp_path / "whole"), tmp_path / "whole.log", environment)
    assert whole.wait(600) == 0, whole.text[-2000:]
    rng, kills = random.Random(0), 0
    while True:
        run = start(command(scenes, tmp_path / "killed"), tmp_path / f"killed{kills}.log", environment)
        wanted = progress(tmp_path / "killed") + rng.randint(1, 2)
        while kills < 20 and run.process.poll() is None and progress(tmp_path / "killed") < wanted:
            time.sleep(0.005)
        if kills >= 20 or run.process.poll() is not None:
            break
        time.sleep(rng.uniform(0, 0.1))
        run.kill()
        kills += 1
    assert run.wait(600) == 0, run.text[-2000:]
    assert kills >= 15  # a run may have come to its end before the last ones
    one, other = (find_latest(tmp_path / name / "checkpoints")[1] for name in ("whole", "killed"))
    for key in ("state_dict", "optimizer", "step", "epoch"):
        assert same(one[key], other[key]), key
    assert one["step"] == STEPS
    files = [load_file(tmp_path / name / "latest.pt")["detector"] for name in ("whole", "killed")]
    assert same(*files)


def progress(work_dir: Path) -> int:
    """Steps of the newest checkpoint, by its name."""
    files = (work_dir / "checkpoints").glob("epoch_*_step_*.pt")
    names = [re.fullmatch(r"epoch_(\d+)_step_(\d+)", file.stem) for file in files]
    return max((4 * int(m[1]) + int(m[2]) for m in names if m), default=0)


@pytest.fixture(scope="module")
def run_folder(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps, each saved."""
    from ovdet.fvit.assemble import read_config
    from ovdet.fvit.run import train
    from training.engine.distributed import Dist

    folder = tmp_path_factory.mktemp("run") / "run"
    config = read_config(str(scenes / "tiny.toml"), ["data.workers=0"])
    train(config, Dist(0, 1, 0, torch.device("cpu"), False), folder, max_steps=3, save_every_steps=1)
    return folder


def test_damaged_files_are_never_taken_for_good(run_folder: Path, tmp_path: Path):
    """50 damaged detector files and checkpoints: refused in one line, or (a byte that no one reads) unharmed."""
    rng = np.random.default_rng(0)
    sources = [(run_folder / "latest.pt", load_file),
               (max((run_folder / "checkpoints").glob("*.pt")), read_checkpoint)]  # fmt: skip
    refused = 0
    for source, read in sources:
        whole, good = source.read_bytes(), read(source)
        for number in range(25):
            damaged = bytearray(whole)
            if number % 5 == 0:
                damaged = damaged[: int(rng.integers(0, len(whole)))]
            else:
                damaged[int(rng.integers(0, len(whole)))] ^= int(rng.integers(1, 256))
            (tmp_path / "x.pt").write_bytes(damaged)
            try:
                found = read(tmp_path / "x.pt")
            except UserError as error:
                refused += 1
                assert "x.pt" in str(error) and "\n" not in str(error)
                continue
            key = "detector" if "detector" in good else "state_dict"
            assert same(found[key], good[key])
    assert refused > 35


def spoilt(content: dict, rng: random.Random) -> dict:
    """A copy of an annotation file with a few values replaced, removed or repeated."""
    strange = [None, -1, 0, 10**20, 1e400, float("nan"), "", "x", "\ud800", [], {}, [[]], True, [1, 2], "../../x.jpg",
               {"size": [1, 1], "counts": "~"}, {"size": [64, 64], "counts": [5]}, [[1, 2, 3, 4, 5, 6]], [["a"] * 6]]
    content = copy.deepcopy(content)
    for _ in range(rng.randint(1, 6)):
        part = rng.choice(["images", "annotations", "annotations", "categories"])
        entries = content.get(part)
        if not isinstance(entries, list) or not entries or rng.random() < 0.03:
            content[part] = copy.deepcopy(rng.choice(strange))
            continue
        number = rng.randrange(len(entries))
        entry = entries[number]
        if not isinstance(entry, dict) or not entry or rng.random() < 0.1:
            entries[number] = copy.deepcopy(rng.choice(strange))
            continue
        key = rng.choice(sorted(entry, key=str))
        action = rng.random()
        if action < 0.2:
            del entry[key]
        elif action < 0.3:
            entries.append(copy.deepcopy(entry))
        elif isinstance(entry[key], list) and entry[key] and action < 0.6:
            entry[key][rng.randrange(len(entry[key]))] = copy.deepcopy(rng.choice(strange))
        else:
            entry[key] = copy.deepcopy(rng.choice(strange))
    return content


def test_malformed_annotations(scenes: Path, tmp_path: Path):
    """200 spoilt annotation files: refused in one line, or every sample of them can be trained on."""
    content = json.loads((scenes / "annotations" / "instances_train2017.json").read_text())
    content["images"], rng = content["images"][:3], random.Random(0)
    ids = {image["id"] for image in content["images"]}
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in ids]
    used = refused = 0
    for _ in range(200):
        (tmp_path / "a.json").write_text(json.dumps(spoilt(content, rng)))
        try:
            annotations = load_annotations(str(tmp_path / "a.json"), key="data.train_annotations", masks=True)
            labels = training_labels(annotations, make_vocabulary(FViTConfig(), annotations))
        except UserError as error:
            refused += 1
            assert "a.json" in str(error) and "\n" not in str(error)
            continue
        data = TrainDataset(
            annotations, labels=labels, root=str(scenes / "train2017"), options=ViewOptions(image_size=64), masks=True,
            min_image_side=8, min_object_side=1.0, keep_empty=True,
        )  # fmt: skip
        samples = [data[(0, i)] for i in range(len(data))]
        batch = collate_train(samples)
        targets = targets_to(batch["targets"], 64, torch.device("cpu"))
        for target in targets:
            assert target["boxes"].isfinite().all() and len(target["masks"]) == len(target["boxes"])
            assert ((target["labels"] >= 0) & (target["labels"] < len(annotations.names))).all()
            assert target["masks"].flatten(1).any(1).all()
        used += any(not isinstance(s, Skipped) for s in samples)
    assert used > 80 and refused > 10


def test_a_disk_that_is_full(scenes: Path, run_folder: Path, tmp_path: Path):
    """Writing fails in the middle of a checkpoint: one line, status 2, and everything that was there is as it was."""
    folder = tmp_path / "run"
    shutil.copytree(run_folder, folder)
    kept = {f: f.read_bytes() for f in (*folder.glob("*.pt"), *(folder / "checkpoints").glob("*.pt"))}
    limit = max(len(content) for content in kept.values()) // 2
    arguments = command(scenes, folder, "data.workers=0")
    code = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); import runpy, sys; "
    code += f"sys.argv = {arguments[1:]!r}; runpy.run_path(sys.argv[0], run_name='__main__')"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300)
    errors = re.findall(r"^error: .*$", done.stderr, re.MULTILINE)
    assert done.returncode == 2 and len(errors) == 1 and "Traceback" not in done.stderr, done.stderr[-2000:]
    assert "cannot be written" in errors[0] and "--work-dir" in errors[0]
    assert {f: f.read_bytes() for f in kept} == kept and not list(folder.rglob(".*.pt.*"))


@pytest.mark.slow
def test_torchrun_restarts_continue_by_themselves(scenes: Path, tmp_path: Path):
    """A process that is killed is started anew by torchrun, and goes on from its checkpoint."""
    start = module_of("faults", ROOT / "tests" / "training" / "faults" / "conftest.py").Run
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--max-restarts", "2",
              "--monitor-interval", "0.1", "--"]  # fmt: skip
    python, *rest = command(scenes, tmp_path / "run", "data.workers=0", "train.batch_size=2")
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = start([python, *launch, *[a for a in rest if a != "--resume"]], tmp_path / "log", environment)
    try:
        run.until(lambda: progress(tmp_path / "run") >= 6, "checkpoint")
        os.kill(run.ranks()[1], signal.SIGKILL)
        assert run.wait(600) == 0, run.text[-3000:]
    finally:
        run.kill()
    assert "resumed" in run.text and find_latest(tmp_path / "run" / "checkpoints")[1]["step"] == STEPS
