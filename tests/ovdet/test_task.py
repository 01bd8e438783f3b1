"""Training, resuming, testing and their failures, on generated scenes with a tiny model."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import ovdet
from ovdet.data.annotations import load
from ovdet.files import former_vit_hash, save
from ovdet.files import load as load_file
from ovdet.fvit.assemble import config_of_checkpoint, load_into, load_vit, make_detector, read_config
from ovdet.fvit.run import make_task, train
from ovdet.precision import StaticScaler, choose_precision
from ovdet.sections import TrainConfig
from ovdet.task import DetectionTask, loop_options
from ovdet.testing import test as run_test
from ovdet.testing import to_original
from ovdet.vocabulary import make_vocabulary
from training.engine.checkpoint import read_checkpoint
from training.engine.distributed import Dist
from training.engine.errors import EXIT_INTERRUPTED, UserError
from training.engine.loop import Loop
from training.scenes.generate import SceneOptions, write_dataset

ROOT = Path(__file__).resolve().parents[2]
ALONE = Dist(0, 1, 0, torch.device("cpu"), False)
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
def scenes(tmp_path_factory: pytest.TempPathFactory, config_beside: Callable[..., Path]) -> Path:
    """Generated scenes, and a config for them."""
    folder = tmp_path_factory.mktemp("scenes")
    write_dataset(folder, train=16, val=7, options=SceneOptions(size=96, things=6), novel=2)
    np.save(folder / "embeddings.npy", np.random.default_rng(0).normal(size=(7, 128)).astype(np.float32))
    config_beside(folder, TINY, embeddings=str(folder / "embeddings.npy"))
    return folder


def run(scenes: Path, work_dir: Path, *overrides: str, **options: Any) -> int:
    return train(read_config(str(scenes / "tiny.toml"), overrides), ALONE, work_dir, **options)


def task_of(scenes: Path, work_dir: Path, *overrides: str) -> DetectionTask:
    return make_task(read_config(str(scenes / "tiny.toml"), overrides), ALONE, work_dir)


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


@pytest.mark.parametrize("kind", ["ov_coco", "ov_lvis"])
def test_published_schedule(golden: Path, kind: str, scenes: Path, tmp_path: Path):
    file = golden / "fvit" / "schedule.json"
    if not file.is_file():
        pytest.skip("recorded numbers of the detector are not there: set CLIPSELF_GOLDEN")
    config = read_config(str(ROOT / "F-ViT" / "configs" / f"{kind}_vitb16_original.toml"), [])
    task = task_of(scenes, tmp_path)
    task.train = config.train
    task.dist = Dist(0, 8, 0, torch.device("cpu"), False)
    rate = task.schedule(0, 0)
    for step, epoch, wanted in json.loads(file.read_text())[kind]:
        assert rate(step, epoch) == pytest.approx(wanted, rel=1e-9)
    task.dist = Dist(0, 2, 0, torch.device("cpu"), False)
    assert task.schedule(0, 0)(1000, 0) == pytest.approx(2.5e-5)
    task.train.scale_lr = False
    assert task.schedule(0, 0)(1000, 0) == 1e-4


def test_back_to_the_file():
    result = to_original({"boxes": torch.tensor([[0.0, 0, 64, 43], [-3, 10, 70, 50]])}, (43, 64), (333, 500))
    assert result["boxes"][0].tolist() == pytest.approx([0, 0, 500, 333])
    assert result["boxes"][1].tolist() == pytest.approx([0, 10 * 333 / 43, 500, 333])


def test_weight_decay(scenes: Path, tmp_path: Path):
    """The published detector decays everything; otherwise norms, biases and the temperature are spared."""
    for everything in (True, False):
        task = task_of(scenes, tmp_path, f"train.decay_all={str(everything).lower()}")
        groups = {g["weight_decay"]: {id(p) for p in g["params"]} for g in task.optimizer().param_groups}
        trained = {n: p for n, p in task.module.named_parameters() if p.requires_grad}
        decayed = {n for n, p in trained.items() if id(p) in groups[0.1]}
        assert decayed == (set(trained) if everything else {n for n, p in trained.items() if p.ndim > 1})
        assert sum(map(len, groups.values())) == len(trained)


def test_precision_of_float16(caplog: pytest.LogCaptureFixture):
    config = TrainConfig(precision="amp_fp16")
    with pytest.raises(UserError, match="needs a GPU: give train.precision=fp32"):
        choose_precision(config, torch.device("cpu"), training=True)
    assert choose_precision(config, torch.device("cpu"), training=False).name == "fp32"
    assert choose_precision(TrainConfig(), torch.device("cpu"), training=True).name == "fp32"
    scaler = StaticScaler("cpu", 512.0)
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    for gradient, wanted in ((1.0, 0.0), (float("inf"), 0.0), (1.0, -1.0)):  # a step that overflows is left out
        scaler.scale(weight.sum() * 1.0).backward()
        weight.grad = weight.grad * gradient
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert weight.item() == wanted and scaler.get_scale() == 512


# -- training ---------------------------------------------------------------------------------------------------------


def test_trains_and_resumes_exactly(scenes: Path, tmp_path: Path, killed_before: Callable[..., Any]):
    config = read_config(str(scenes / "tiny.toml"), [])
    whole = make_task(config, ALONE, tmp_path / "whole")
    vit = {k: v.clone() for k, v in whole.detector.backbone.state_dict().items()}
    options = loop_options(config.train, config.data, max_steps=20, save_every_steps=1)
    precision = choose_precision(config.train, ALONE.device, training=True)
    (tmp_path / "whole").mkdir()
    Loop(whole, options, dist=ALONE, precision=precision).train(tmp_path / "whole")
    after = whole.detector.backbone.state_dict()
    assert all(torch.equal(vit[k], after[k]) for k in vit)

    # Killed inside an epoch (4 steps each), at its end, and inside again.
    for steps in (5, 8, 14, 21):
        task = make_task(config, ALONE, tmp_path / "parts")
        (tmp_path / "parts").mkdir(exist_ok=True)
        loop = Loop(task, options, dist=ALONE, precision=precision)
        with killed_before(task, steps) if steps < 21 else nullcontext():
            loop.train(tmp_path / "parts", "latest")
    one, other = (read_checkpoint(tmp_path / name / "checkpoints" / "epoch_5.pt") for name in ("whole", "parts"))
    assert one["step"] == other["step"] == 20
    assert all(torch.equal(v, other["state_dict"][k]) for k, v in one["state_dict"].items())
    for a, b in zip(one["optimizer"]["state"].values(), other["optimizer"]["state"].values(), strict=True):
        assert all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a)

    # The detector file is small: nothing of the ViT, nothing of the vocabulary. Usable by name.
    small = load_file(tmp_path / "whole" / "epoch_5.pt")
    assert not any("backbone" in k or "embeddings" in k for k in small["detector"])
    assert all(torch.equal(v, one["state_dict"][k]) for k, v in small["detector"].items())
    assert small["vit"]["name"] == "ViT-Ti-8-64" and len(small["vit"]["hash"]) == 64
    assert len(small["base"]) == 4 and len(small["novel"]) == 2
    config = config_of_checkpoint(small, "latest.pt", ["test.score=0.5"])
    assert config.test.score == 0.5 and config.model.channels == 16


def test_losses_fall(scenes: Path, tmp_path: Path):
    assert run(scenes, tmp_path, max_steps=20) == 0
    found = losses(tmp_path)
    assert len(found) == 20 and np.mean(found[-5:]) < 0.95 * np.mean(found[:5])


def test_a_bad_step_leaves_nothing_behind(scenes: Path, tmp_path: Path):
    """A step that is not finite changes neither weights nor running statistics."""
    config = read_config(str(scenes / "tiny.toml"), [])
    task = make_task(config, ALONE, tmp_path)
    before = {k: v.clone() for k, v in task.detector.trainable_state_dict().items()}
    prepare = task.detector.prepare
    task.detector.prepare = lambda *a: prepare(*a).fill_(float("inf"))
    options = loop_options(config.train, config.data, max_steps=2)
    loop = Loop(task, options, dist=ALONE, precision=choose_precision(config.train, ALONE.device, training=True))
    tmp_path.mkdir(exist_ok=True)
    loop.train(tmp_path)
    after = task.detector.trainable_state_dict()
    assert any("running_mean" in k for k in after)
    assert all(torch.equal(v, after[k]) for k, v in before.items())


def test_masks_train_and_are_scored(scenes: Path, tmp_path: Path):
    options = ["model.masks=true", "train.eval_every=1", "test.score=0", "data.keep_empty=true"]
    task = task_of(scenes, tmp_path, *options)
    assert len(task.dataset) == 16 and any(not len(task.dataset[(0, i)]["boxes"]) for i in range(16))
    assert run(scenes, tmp_path, *options, max_steps=4) == 0
    assert "loss_mask" in (tmp_path / "train.log").read_text()
    metrics = json.loads((tmp_path / "epoch_1" / "metrics.json").read_text())
    assert set(metrics) == {"bbox", "segm"} and 0 <= metrics["segm"]["AP"] <= 1
    assert {"AP50_novel", "AP50_base"} <= set(metrics["bbox"])
    results = json.loads((tmp_path / "epoch_1" / "results.segm.json").read_text())
    ids = {c["id"] for c in json.loads((scenes / "annotations" / "instances_val2017.json").read_text())["categories"]}
    assert results and {r["category_id"] for r in results} <= ids
    assert set(results[0]) == {"image_id", "category_id", "score", "segmentation"}
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
        shell(*train, "--max-steps", "12")
        shell(*train, "--max-steps", "20", "--resume")
        found = losses(run)
        assert len(found) == 20 and np.mean(found[-5:]) < 0.95 * np.mean(found[:5])
        content = read_checkpoint(max((run / "checkpoints").glob("epoch_*.pt"), key=os.path.getmtime))
        assert content["step"] == 20 and content["global_batch"] == 4
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
    newest = max((tmp_path / "checkpoints").glob("epoch_*.pt"), key=os.path.getmtime)
    assert read_checkpoint(newest)["step"] >= 2 and load_file(tmp_path / "latest.pt")["base"]


# -- testing ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run of one step."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    run(scenes, folder, max_steps=1)
    return folder


def test_detector_file_and_vit_belong_together(
    scenes: Path, trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):  # fmt: skip
    path = str(trained / "latest.pt")
    config = read_config(str(scenes / "tiny.toml"), ["train.eval_every=1"])
    annotations = load(config, "val")
    vit = load_vit(config)
    detector = make_detector(config, vit, make_vocabulary(config, annotations), device=ALONE.device)
    load_into(path, detector, config, vit)
    assert "was trained with" not in caplog.text
    config.model.rpn_nms, config.model.anchor_ratios, config.data.padding = 0.3, [0.2, 1.0], "black"
    load_into(path, detector, config, vit)
    assert 'model.anchor_ratios=[0.5, 1.0, 2.0] model.rpn_nms=0.7 data.padding="zero"; the config' in caplog.text
    ovdet.load_detector(path, config=str(scenes / "tiny.toml"), overrides=["model.rpn_padding=false"])
    assert "was trained with model.rpn_padding=true; the config at hand" in caplog.text
    with pytest.raises(UserError, match="needs a detector with masks"):
        run_test(config, detector, annotations, make_vocabulary(config, annotations), dist=ALONE, kinds=["segm"])
    vit.identity["hash"] = "0" * 64
    with pytest.raises(UserError, match="trained on other weights"):
        load_into(path, detector, config, vit)
    vit.identity["name"] = "EVA02-CLIP-B-16"
    with pytest.raises(UserError, match="trained on ViT-Ti-8-64"):
        load_into(path, detector, config, vit)
    damaged = tmp_path / "damaged.pt"
    content = bytearray((trained / "latest.pt").read_bytes())
    content[len(content) // 2] ^= 0xFF
    damaged.write_bytes(content)
    torch.save({"state_dict": {}}, tmp_path / "vit.pt")
    for file, message in (("damaged.pt", "damaged"), ("vit.pt", "tools/convert_detector.py"), ("x.pt", "not exist")):
        with pytest.raises(UserError, match=message):
            load_file(tmp_path / file)


def test_files_of_the_former_version_load(
    scenes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):  # fmt: skip
    """A detector without a version: other names and another hash, and a config that lacks the keys of today."""
    former = ["model.temperature_kind=log", "model.box_own_fcs=0", "model.embedding_relu=false",
              "model.anchor_offset=0.5", "model.rpn_padding=false", "model.roi_finest=0", "test.vlm_boxes=refined",
              "model.roi_truth_keeps_label=false", "model.rpn_empty_counts_one=false", "model.box_limit_below=false",
              "data.resize=bicubic", "data.pixels=model", "data.padding=black", "test.mask_edges=repeated",
              "data.exif=false", "data.whole_target=false", "data.mask_centres=true", "data.by_orientation=false",
              "data.min_image_side=0", "data.min_object_side=0.0", "data.replace_thin=false"]  # fmt: skip
    run(scenes, tmp_path / "run", *former, max_steps=1)
    content = load_file(tmp_path / "run" / "latest.pt")
    today = config_of_checkpoint(content, "x")
    vit = load_vit(today)
    del content["version"]
    content["vit"]["hash"] = former_vit_hash(vit.model)
    content["detector"]["box_head.log_temperature"] = content["detector"].pop("classifier.log_temperature")
    for section, keys in {"model": ("temperature_kind", "box_own_fcs", "embedding_relu", "anchor_offset", "roi_finest"),
                          "data": ("resize", "pixels", "padding"), "test": ("vlm_boxes",)}.items():  # fmt: skip
        for key in keys:
            del content["config"][section][key]
    save(content, tmp_path / "former.pt")
    content = load_file(tmp_path / "former.pt")
    config = config_of_checkpoint(content, "former.pt")
    assert config.model == today.model and config.data == today.data and config.test == today.test
    detector = make_detector(config, vit, make_vocabulary(config, load(config, "val")), device=ALONE.device)
    load_into(str(tmp_path / "former.pt"), detector, config, vit)
    # With a config of today the file is refused, and the message says which settings it needs.
    config = read_config(str(scenes / "tiny.toml"), [])
    detector = make_detector(config, vit, make_vocabulary(config, load(config, "val")), device=ALONE.device)
    with pytest.raises(UserError, match="lacks .* with .*model.anchor_offset=0.5 .*model.box_own_fcs=0") as error:
        load_into(str(tmp_path / "former.pt"), detector, config, vit)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("fault", ["area", "segmentation"])
def test_objects_that_no_sample_holds_are_counted(scenes: Path, tmp_path: Path, caplog, fault: str):
    """Their images would be learned as background; where all objects are lost, there is nothing to train on."""
    content = json.loads((scenes / "annotations/instances_train2017.json").read_text())
    settings = ["data.min_object_side=1.0", "train.eval_every=0", f"model.masks={str(fault != 'area').lower()}"]
    spoiled = {"area": 0, "segmentation": []}[fault]
    reason = {"area": "object without area", "segmentation": "object without a segmentation"}[fault]
    for name, spoil in (("some", content["annotations"][:3]), ("all", content["annotations"])):
        for annotation in spoil:
            annotation[fault] = spoiled
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    file = f"data.train_annotations={tmp_path}/some.json"
    run(scenes, tmp_path / "run", *settings, file, max_steps=1)
    assert any(f"x {reason}" in message and "left out" in message for message in caplog.messages)
    with pytest.raises(UserError, match=f"no object can be learned .*{reason}"):
        run(scenes, tmp_path / "none", *settings, file.replace("some", "all"), max_steps=1)
    assert not (tmp_path / "none").exists()


def test_what_a_validation_file_lacks_is_said(scenes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    config = read_config(str(scenes / "tiny.toml"), [])
    content = json.loads(Path(config.locate(config.data.val_annotations)).read_text())
    content["annotations"][0]["bbox"] = [1, 1, -3, 2]
    (tmp_path / "val.json").write_text(json.dumps(content))
    config.data.val_annotations = str(tmp_path / "val.json")
    load(config, "val")
    assert "1 x box of zero or negative size (left out)" in caplog.text
    (tmp_path / "val.json").write_text(json.dumps(content | {"annotations": []}))
    load(config, "val")
    assert "lists no object: detections are written, AP cannot be computed" in caplog.text


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
        run(scenes, tmp_path / "run", override)
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_existing_runs(scenes: Path, trained: Path, tmp_path: Path):
    with pytest.raises(UserError, match="give --resume"):
        run(scenes, trained)
    with pytest.raises(UserError, match="another run: its weights was"):
        run(scenes, trained, "train.seed=1", resume=True)
    before = (trained / "config.toml").read_text()
    with pytest.raises(UserError, match="another run: the classes was .* 2 of them novel .* 0 of them novel"):
        run(scenes, trained, "data.novel=[]", resume=True)
    assert (trained / "config.toml").read_text() == before
    former = tmp_path / "former"
    former.mkdir()
    torch.save({"format": "fvit", "progress": {}}, former / "latest.pt")
    with pytest.raises(UserError, match="run of a former version"):
        run(scenes, former, resume=True)


def test_unusable_images(scenes: Path, tmp_path: Path):
    images = tmp_path / "images"
    images.mkdir()
    for i, file in enumerate(sorted((scenes / "train2017").iterdir())):
        (images / file.name).write_bytes(file.read_bytes() if i % 3 else b"")
    with pytest.raises(UserError, match="of 16 samples .* could not be used"):
        run(scenes, tmp_path / "bad", f"data.train_images={images}")
    assert "the file is empty" in (tmp_path / "bad" / "train.log").read_text()
    # A step of which nothing can be read is taken all the same.
    task = task_of(scenes, tmp_path, "model.masks=true")
    nothing = {"images": None, "sizes": [], "targets": [], "image_ids": [], "skipped": [("x", "y")], "samples": 0}
    assert task.module.train()(task.to_device(nothing))["loss"].isfinite()


def test_errors_are_one_line(scenes: Path, tmp_path: Path):
    result = shell("dist_train.sh", str(scenes / "none.toml"), "1", "--work-dir", str(tmp_path / "x"), check=False)
    assert result.returncode == 2 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    result = shell("dist_train.sh", "a", "zero", check=False)
    assert result.returncode == 2 and "number of processes" in result.stderr
