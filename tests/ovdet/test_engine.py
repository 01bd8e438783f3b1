"""Training, resuming, testing and their failures, on generated scenes with a tiny model."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ovdet.data.annotations import load_annotations
from ovdet.distributed import Process
from ovdet.engine import EXIT_INTERRUPTED, Trainer
from ovdet.errors import UserError
from ovdet.files import load
from ovdet.fvit.assemble import config_of_checkpoint, load_detector, load_vit, make_detector, read_config
from ovdet.schedule import lr_at, scaled_lr
from ovdet.sections import TrainConfig
from ovdet.testing import test as run_test
from ovdet.testing import to_original
from ovdet.vocabulary import compute_embeddings, make_vocabulary
from training.scenes.generate import SceneOptions, write_dataset

ROOT = Path(__file__).resolve().parents[2]
ALONE = Process(0, 1, torch.device("cpu"))
TINY = """
[model]
name = "ViT-Ti-8-64"
pretrained = ""
cache_dir = ""
blocks = [1, 2, 3]
channels = 16
box_convs = 1
box_width = 32
mask_convs = 1
rpn_pre_nms = 200
rpn_post_nms = 40
rpn_samples = 64
roi_samples = 32

[train]
precision = "fp32"
batch_size = 4
scale_lr = false
lr = 1e-3
warmup_steps = 2
log_every = 1
eval_every = 0
epochs = 100

[test]
per_image = 20
batch_size = 2
"""


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Generated scenes, and a config for them."""
    folder = tmp_path_factory.mktemp("scenes")
    write_dataset(folder, train=16, val=7, options=SceneOptions(size=96, things=6), novel=2)
    novel = json.loads((folder / "annotations" / "split.json").read_text())["novel"]
    np.save(folder / "embeddings.npy", np.random.default_rng(0).normal(size=(7, 128)).astype(np.float32))
    data = {
        "train_annotations": str(folder / "annotations" / "instances_train2017.json"),
        "train_images": str(folder / "train2017"),
        "val_annotations": str(folder / "annotations" / "instances_val2017.json"),
        "val_images": str(folder / "val2017"),
        "embeddings": str(folder / "embeddings.npy"),
        "novel": novel,
        "image_size": 96,
        "workers": 0,
        "jitter": [0.8, 1.25],
    }
    text = TINY + "\n[data]\n" + "\n".join(f"{key} = {json.dumps(value)}" for key, value in data.items())
    (folder / "tiny.toml").write_text(text)
    return folder


def trainer(scenes: Path, work_dir: Path, *overrides: str, **kwargs) -> Trainer:
    return Trainer(read_config(str(scenes / "tiny.toml"), overrides), ALONE, work_dir, **kwargs)


def losses(work_dir: Path) -> list[float]:
    return [float(v) for v in re.findall(r"  loss ([\d.]+)", (work_dir / "train.log").read_text())]


def shell(*command: str, check: bool = True) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable}
    result = subprocess.run(
        ["bash", *command], capture_output=True, text=True, env=environment, cwd=ROOT / "F-ViT", timeout=300
    )
    assert not check or result.returncode == 0, result.stderr[-3000:]
    return result


# -- schedule ---------------------------------------------------------------------------------------------------------


def test_schedule():
    config = TrainConfig(lr=1e-4, batch_size=4, base_batch=64, warmup_steps=250, warmup_factor=0.001,
                         decay_epochs=[32, 44])  # fmt: skip
    assert scaled_lr(config, 8) == pytest.approx(5e-5)
    assert scaled_lr(TrainConfig(lr=1e-4, scale_lr=False), 3) == 1e-4
    assert lr_at(0, 0, base=1.0, config=config) == pytest.approx(0.001)
    assert lr_at(125, 0, base=1.0, config=config) == pytest.approx(0.5005)
    assert lr_at(250, 0, base=1.0, config=config) == 1.0
    steps = [lr_at(10**6, e, base=1.0, config=config) for e in (31, 32, 43, 44, 47)]
    assert steps == pytest.approx([1, 0.1, 0.1, 0.01, 0.01])


def test_back_to_the_file():
    result = to_original({"boxes": torch.tensor([[0.0, 0, 64, 43], [-3, 10, 70, 50]])}, (43, 64), (333, 500))
    assert result["boxes"][0].tolist() == pytest.approx([0, 0, 500, 333])
    assert result["boxes"][1].tolist() == pytest.approx([0, 10 * 333 / 43, 500, 333])


# -- training ---------------------------------------------------------------------------------------------------------


def test_trains_and_resumes_exactly(scenes: Path, tmp_path: Path):
    whole = trainer(scenes, tmp_path / "whole", max_steps=20)
    vit = {k: v.clone() for k, v in whole.detector.backbone.state_dict().items()}
    whole.run()
    found = losses(tmp_path / "whole")
    assert len(found) == 20 and np.mean(found[-5:]) < 0.95 * np.mean(found[:5])
    after = whole.detector.backbone.state_dict()
    assert all(torch.equal(vit[k], after[k]) for k in vit)

    # Stopped inside an epoch (3 steps each), at its end, and inside again.
    for steps in (4, 6, 11, 20):
        trainer(scenes, tmp_path / "parts", resume=True, max_steps=steps).run()
    one, other = load(tmp_path / "whole" / "latest.pt"), load(tmp_path / "parts" / "latest.pt")
    assert one["progress"] == other["progress"] == {"epoch": 6, "step_in_epoch": 2, "step": 20, "bad_steps": 0}
    assert all(torch.equal(v, other["detector"][k]) for k, v in one["detector"].items())
    for a, b in zip(one["optimizer"]["state"].values(), other["optimizer"]["state"].values(), strict=True):
        assert all(torch.equal(a[k], b[k]) for k in a)

    # Small: nothing of the ViT, nothing of the vocabulary. Usable by name.
    assert not any("backbone" in k or "embeddings" in k for k in one["detector"])
    assert one["vit"]["name"] == "ViT-Ti-8-64" and len(one["vit"]["hash"]) == 64
    small = load(tmp_path / "whole" / "epoch_6.pt") if (tmp_path / "whole" / "epoch_6.pt").exists() else one
    assert len(small["base"]) == 4 and len(small["novel"]) == 2
    config = config_of_checkpoint(one, "latest.pt", ["test.score=0.5"])
    assert config.test.score == 0.5 and config.model.channels == 16


def test_masks_train_and_are_scored(scenes: Path, tmp_path: Path):
    options = ["model.masks=true", "train.eval_every=1", "test.score=0", "data.keep_empty=true"]
    run = trainer(scenes, tmp_path, *options, max_steps=4)
    assert len(run.dataset) == 16 and any(not len(run.dataset[(0, i)]["boxes"]) for i in range(16))
    metrics = run.run()
    assert "loss_mask" in (tmp_path / "train.log").read_text()
    assert set(metrics) == {"bbox", "segm"} and 0 <= metrics["segm"]["AP"] <= 1
    assert {"AP50_novel", "AP50_base"} <= set(metrics["bbox"])
    results = json.loads((tmp_path / "epoch_1" / "results.segm.json").read_text())
    ids = {c["id"] for c in json.loads((scenes / "annotations" / "instances_val2017.json").read_text())["categories"]}
    assert results and {r["category_id"] for r in results} <= ids
    assert set(results[0]) == {"image_id", "category_id", "score", "segmentation"}
    assert json.loads((tmp_path / "epoch_1" / "metrics.json").read_text()) == metrics
    assert any((tmp_path / "tensorboard").iterdir())
    # The files that were written, read by pycocotools, give the same numbers.
    gold = COCO(str(scenes / "annotations" / "instances_val2017.json"))
    for kind in ("bbox", "segm"):
        evaluator = COCOeval(gold, gold.loadRes(str(tmp_path / "epoch_1" / f"results.{kind}.json")), kind)
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
        names = ("AP", "AP50", "AP75", "APs", "APm", "APl")
        assert [metrics[kind][n] for n in names] == pytest.approx(evaluator.stats[:6].tolist(), abs=1e-6)


@pytest.mark.slow
def test_one_and_two_processes(scenes: Path, tmp_path: Path):
    """The scripts: 1 and 2 processes train with falling loss and resume; 1 and 2 processes test alike."""
    config = str(scenes / "tiny.toml")
    for processes, images in (("1", 4), ("2", 2)):
        arguments = ["--device", "cpu", f"train.batch_size={images}", "test.score=0"]
        run = tmp_path / f"run{processes}"
        train = ["dist_train.sh", config, processes, "--work-dir", str(run), *arguments]
        shell(*train, "--max-steps", "13")
        shell(*train, "--max-steps", "20", "--resume")
        found = losses(run)
        assert len(found) == 20 and np.mean(found[-5:]) < 0.95 * np.mean(found[:5])
        content = load(run / "latest.pt")
        assert content["progress"]["step"] == 20 and content["images_per_step"] == 4
    for processes in ("1", "2"):
        shell(
            "dist_test.sh", config, str(run / "latest.pt"), processes, "--out", str(tmp_path / processes),
            *arguments, "--eval", "bbox",
        )  # fmt: skip
    files = [(tmp_path / p / name).read_text() for name in ("metrics.json", "results.bbox.json") for p in ("1", "2")]
    assert files[0] == files[1] and files[2] == files[3]
    assert len(json.loads(files[2])) > 7 and json.loads(files[0])["bbox"]["AP"] >= 0


def test_signal_saves(scenes: Path, tmp_path: Path):
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "F-ViT" / "train.py"), str(scenes / "tiny.toml"), "--work-dir", str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stderr=subprocess.DEVNULL,
    )
    log = tmp_path / "train.log"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (log.exists() and "step 2/" in log.read_text()):
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == EXIT_INTERRUPTED
    assert load(tmp_path / "latest.pt")["progress"]["step"] >= 2


# -- testing ----------------------------------------------------------------------------------------------------------


def test_detector_file_and_vit_belong_together(scenes: Path, tmp_path: Path):
    trainer(scenes, tmp_path, max_steps=1).run()
    path = str(tmp_path / "latest.pt")
    config = read_config(str(scenes / "tiny.toml"), ["train.eval_every=1"])
    annotations = load_annotations(config.data.val_annotations, key="k")
    vit = load_vit(config)
    detector = make_detector(config, vit, make_vocabulary(config, annotations), device=ALONE.device)
    load_detector(path, detector, vit)
    with pytest.raises(UserError, match="needs a detector with masks"):
        run_test(config, detector, annotations, make_vocabulary(config, annotations), process=ALONE, kinds=["segm"])
    vit.identity["hash"] = "0" * 64
    with pytest.raises(UserError, match="trained on other weights"):
        load_detector(path, detector, vit)
    vit.identity["name"] = "EVA02-CLIP-B-16"
    with pytest.raises(UserError, match="trained on ViT-Ti-8-64"):
        load_detector(path, detector, vit)
    damaged = tmp_path / "damaged.pt"
    content = bytearray((tmp_path / "latest.pt").read_bytes())
    content[len(content) // 2] ^= 0xFF
    damaged.write_bytes(content)
    torch.save({"state_dict": {}}, tmp_path / "vit.pt")
    for file, message in (("damaged.pt", "damaged"), ("vit.pt", "no detector file"), ("x.pt", "not exist")):
        with pytest.raises(UserError, match=message):
            load(tmp_path / file)


def test_embeddings_are_computed_once(scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    vit = load_vit(read_config(str(scenes / "tiny.toml"), []))
    first = compute_embeddings(vit.model, vit.tokenizer, ["red circle", "background"], cache_folder=tmp_path)
    assert first.shape == (2, 128) and torch.allclose(first.norm(dim=1), torch.ones(2))
    monkeypatch.setattr("ovdet.vocabulary.class_embeddings", None)  # from here on the cache must do
    again = compute_embeddings(vit.model, vit.tokenizer, ["red circle", "background"], cache_folder=tmp_path)
    assert torch.equal(first, again)


# -- failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.train_annotations=nowhere.json", "data.train_annotations .*nowhere.json: no such file"),
        ('data.train_annotations=""', "data.train_annotations is empty"),
        ("data.train_images=nowhere", "data.train_images .*nowhere: no such folder"),
        ('data.novel=["unicorn"]', "unicorn"),
        ("data.embeddings=nowhere.npy", "no such file"),
        ("data.image_size=100", "multiple of 8"),
        ("model.name=ViT-Tiny", "unknown"),
        ("model.pretrained=nowhere.pt", "nowhere.pt"),
        ("model.blocks=[1, 2, 9]", "block"),
        ("train.precision=amp_fp16", "needs a GPU"),
    ],
)
def test_faulty_input_writes_nothing(scenes: Path, tmp_path: Path, override: str, message: str):
    with pytest.raises(UserError, match=message) as error:
        trainer(scenes, tmp_path / "run", override)
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_existing_run_and_unusable_images(scenes: Path, tmp_path: Path):
    trainer(scenes, tmp_path / "run", max_steps=2).run()
    with pytest.raises(UserError, match="give --resume"):
        trainer(scenes, tmp_path / "run")
    with pytest.raises(UserError, match="images a step"):
        trainer(scenes, tmp_path / "run", "train.batch_size=2", resume=True)
    images = tmp_path / "images"
    images.mkdir()
    for i, file in enumerate(sorted((scenes / "train2017").iterdir())):
        (images / file.name).write_bytes(file.read_bytes() if i % 3 else b"")
    with pytest.raises(UserError, match="of 12 images .* could not be used"):
        trainer(scenes, tmp_path / "bad", f"data.train_images={images}").run()
    assert "the file is empty" in (tmp_path / "bad" / "train.log").read_text()


def test_errors_are_one_line(scenes: Path, tmp_path: Path):
    result = shell("dist_train.sh", str(scenes / "none.toml"), "1", "--work-dir", str(tmp_path / "x"), check=False)
    assert result.returncode == 2 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    result = shell("dist_train.sh", "a", "zero", check=False)
    assert result.returncode == 2 and "number of processes" in result.stderr
