"""Training, exact resumption, optimizers and schedules, testing on 1 and 2 processes, reference rows, bad input."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

import ovdet
from ovdet.commands import detect as detect_command
from ovdet.data.annotations import load
from ovdet.files import load as load_file
from ovdet.precision import choose_precision
from ovdet.task import loop_options
from ovdet.vild.assemble import learned, load_into, load_teacher, make_detector, read_config
from ovdet.vild.commands import test as test_command
from ovdet.vild.commands import train as train_command
from ovdet.vild.config import VARIANTS
from ovdet.vild.run import make_task, train
from ovdet.vocabulary import make_vocabulary
from training.engine.checkpoint import read_checkpoint
from training.engine.distributed import Dist
from training.engine.errors import UserError
from training.engine.loop import Loop

ROOT = Path(__file__).resolve().parents[3]
ADAMW = ["data.sampling=repeat", "data.repeat_threshold=0.5", "train.optimizer=adamw", "train.lr=1e-3",
         "train.image_warmup=9"]  # fmt: skip


def losses(folder: Path, name: str = "loss") -> list[float]:
    return [float(v) for v in re.findall(rf"  {name} ([\d.]+)", (folder / "train.log").read_text())]


@pytest.mark.parametrize("settings", [[], ADAMW], ids=["sgd", "adamw"])
def test_killed_runs_go_on_to_the_last_bit(scenes, tmp_path: Path, settings: list[str], killed_before):
    def run(folder: Path, end: int = 0) -> None:
        config = scenes.config("train.steps=11", *settings)
        precision = choose_precision(config.train, scenes.alone.device, training=True)
        task = make_task(config, scenes.alone, folder)
        options = loop_options(config.train, config.data, max_steps=11, save_every_steps=1)
        folder.mkdir(exist_ok=True)
        with killed_before(task, end) if end else nullcontext():
            Loop(task, options, dist=scenes.alone, precision=precision).train(folder, "latest")

    run(tmp_path / "whole")
    for end in (2, 4, 9):  # inside an epoch of three or four steps, and elsewhere
        run(tmp_path / "parts", end)
    run(tmp_path / "parts")
    newest = [
        max((tmp_path / name / "checkpoints").glob("epoch_*.pt"), key=os.path.getmtime) for name in ("whole", "parts")
    ]
    assert newest[0].name == newest[1].name
    one, other = map(read_checkpoint, newest)
    assert one["step"] == other["step"] == 11
    assert all(torch.equal(v, other["state_dict"][k]) for k, v in one["state_dict"].items())
    for a, b in zip(one["optimizer"]["state"].values(), other["optimizer"]["state"].values(), strict=True):
        assert all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "supervised"])
def test_losses_fall(scenes, tmp_path: Path, variant: str):
    config = scenes.config(f"model.variant={variant}", "model.masks=false")
    assert train(config, scenes.alone, tmp_path / "run", max_steps=24) == 0
    found = losses(tmp_path / "run")
    assert len(found) == 24 and np.mean(found[-5:]) < 0.95 * np.mean(found[1:6])
    if VARIANTS[variant][1]:
        teacher = losses(tmp_path / "run", "loss_image")
        # Unrelated unit vectors of D numbers are sqrt(2 D) * 0.8 apart; w is 0.5.
        assert teacher[0] == pytest.approx(0.5 * 0.8 * np.sqrt(2 * 128), rel=0.15)
        assert np.mean(teacher[-5:]) < 0.98 * np.mean(teacher[:5])


def test_schedules_in_steps_epochs_and_shares(scenes, tmp_path: Path):
    """Against the rates of the first experiment: warm-up 1000 from 0.0032 to 0.32, tenths at 90, 95 and 97.5 %."""
    task = make_task(scenes.config("model.variant=text"), scenes.alone, tmp_path)
    task.train = read_config(str(ROOT / "ViLD" / "configs" / "lvis_r50_ensemble_180k.toml"), []).train
    task.dist = Dist(0, 64, 0, torch.device("cpu"), False)
    rate = task.schedule(20, 391)
    for step, wanted in (
        (0, 0.0032), (500, 0.1616), (1000, 0.32), (161_999, 0.32), (162_000, 0.032), (170_999, 0.032),
        (171_000, 0.0032), (175_500, 0.00032), (179_999, 0.00032),
    ):  # fmt: skip
        assert rate(step, step // 391) == pytest.approx(wanted, rel=1e-9), step
    settings = ["train.lr=0.02", "train.decay_epochs=[16]", "train.decay_steps=[700]", "train.warmup_steps=0"]
    task.train = scenes.config(*settings).train
    rate = task.schedule(20, 3)
    assert [rate(s, e) for s, e in ((0, 0), (699, 15), (699, 16), (700, 16))] == pytest.approx([0.02, 0.02, 2e-3, 2e-4])
    task.train = scenes.config("train.steps=10").train
    assert task.batches_per_epoch == 3 and task.epochs == 4
    groups = task.optimizer().param_groups
    assert [g["weight_decay"] for g in groups] == [2.5e-5] and groups[0]["momentum"] == 0.9
    task.train.decay_all = False
    spared = [p for g in task.optimizer().param_groups if g["weight_decay"] == 0 for p in g["params"]]
    assert spared and all(p.ndim < 2 for p in spared)
    task.train.image_warmup = 4
    shares = []
    for step in (0, 1, 4, 9):
        task.begin_step([], step)
        shares.append(task.detector.image_share)
    assert shares == [0, 0.25, 1, 1]


def test_any_batch_size_and_frozen_norms(scenes, tmp_path: Path):
    for images in (1, 5, 12):
        config = scenes.config(f"train.batch_size={images}", "model.masks=false", "model.trunk_norm=frozen")
        assert train(config, scenes.alone, tmp_path / str(images), max_steps=2) == 0
        found = losses(tmp_path / str(images))
        assert len(found) == 2 and all(np.isfinite(found))


@pytest.fixture(scope="module")
def trained(scenes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A detector of a few steps, with masks."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    train(scenes.config(), scenes.alone, folder, max_steps=6)
    return folder / "latest.pt"


def test_detector_files(scenes, trained: Path):
    content = load_file(trained, ("vild",))
    assert content["format"] == "vild" and content["vit"]["name"] == "ViT-Ti-8-64"
    assert set(content["novel"]) == set(scenes.novel) and len(content["base"]) == 4
    assert any(k.startswith("backbone.") for k in content["detector"]) and "background" in content["detector"]
    assert not any("embeddings" in k for k in content["detector"])


def test_one_and_two_processes_test_alike(scenes, trained: Path, tmp_path: Path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    for processes in ("1", "2"):
        subprocess.run(
            ["bash", str(ROOT / "ViLD" / "dist_test.sh"), scenes.config_file, str(trained), processes, "--out",
             str(tmp_path / processes), "--device", "cpu", "--eval", "bbox", "segm"],
            check=True, capture_output=True, env=environment, timeout=300,
        )  # fmt: skip
    for name in ("metrics.json", "results.bbox.json", "results.segm.json"):
        assert (tmp_path / "1" / name).read_text() == (tmp_path / "2" / name).read_text()
    assert set(json.loads((tmp_path / "1" / "metrics.json").read_text())) == {"bbox", "segm", "run"}


def test_reference_rows(scenes, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    """CLIP judges the boxes of the network that proposes, and helps a detector of its own."""
    proposer = str(scenes.folder / "proposer" / "latest.pt")
    common = [scenes.config_file, "--eval", "bbox", "--device", "cpu"]
    best = {}
    for row, file, overrides in (
        ("clip", proposer, scenes.proposer),
        ("clip-objectness", proposer, scenes.proposer),
        ("text-clip", str(trained), ()),
    ):
        copy = tmp_path / row / "latest.pt"
        copy.parent.mkdir()
        copy.write_bytes(Path(file).read_bytes())
        test_command.main([*common, str(copy), *overrides, "--crops", row])
        folder = tmp_path / row / f"latest_tiny_{row}_test"  # not that of the detector's own scores
        found = json.loads((folder / "results.bbox.json").read_text())
        assert json.loads((folder / "metrics.json").read_text())["run"]["crops"] == row
        best[row] = max(r["score"] for r in found)
        assert "AP50 novel" in capsys.readouterr().out
    assert len(set(best.values())) == 3
    with pytest.raises(UserError, match=r"made with other crops \(crops: text-clip, now clip\)"):
        test_command.main([*common, file, "--crops", "clip", "--out", str(folder)])
    with pytest.raises(UserError, match="network that proposes regions"):
        test_command.main([*common, proposer, *scenes.proposer])
    with pytest.raises(UserError, match="give one, or --crops clip"):
        test_command.main([*common, proposer, *scenes.proposer, "--crops", "text-clip"])


def test_classes_and_attributes_of_ones_own(scenes, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    detector = ovdet.load_detector(trained, device="cpu")
    picture = next(iter(sorted((scenes.folder / "val2017").iterdir())))
    plain = detector(picture, ["circle", "square"])[0]
    assert set(plain["names"]) <= {"circle", "square"} and len(plain["boxes"]) and "masks" in plain
    detector.use_attributes(["red", "green", "blue"])
    found = detector(picture, ["circle", "square"])[0]
    assert len(found["names"]) and all(re.fullmatch("(red|green|blue) (circle|square)", n) for n in found["names"])
    assert found["scores"].max() <= plain["scores"].max()
    with pytest.raises(ValueError, match="none twice"):
        detector.use_attributes(["red", "red"])
    detector.use_attributes([])
    assert set(detector(picture, ["circle"])[0]["names"]) == {"circle"}
    detect_command.main(
        [str(picture), "--checkpoint", str(trained), "--classes", "circle,square", "--attributes", "red,green",
         "--score", "0", "--out", str(tmp_path / "pictures"), "--json", str(tmp_path / "found.json"), "--device", "cpu"]
    )  # fmt: skip
    assert re.search("(red|green) (circle|square)", capsys.readouterr().out)
    assert len(list((tmp_path / "pictures").iterdir())) == 1
    record = json.loads((tmp_path / "found.json").read_text())["images"][0]["detections"][0]
    assert record["class"].split()[0] in ("red", "green")


def refused(scenes, *overrides: str, message: str, folder: Path) -> None:
    with pytest.raises(UserError, match=message) as error:
        train(scenes.config(*overrides), scenes.alone, folder)
    assert "\n" not in str(error.value) and not folder.exists()


def test_starts_from_another_detector(scenes, tmp_path: Path):
    file = scenes.folder / "proposer" / "latest.pt"
    given = load_file(file, ("vild",))["detector"]
    state = make_task(scenes.config(f"model.start={file}"), scenes.alone, tmp_path).detector.state_dict()
    for name in ("backbone.body.layer1.0.conv1.weight", "rpn.objectness.weight", "box_head.fcs.0.weight"):
        assert torch.equal(state[name], given[name])
    assert torch.equal(state["image_head.fcs.0.weight"], given["box_head.fcs.0.weight"])
    assert len(state["box_head.embedding.weight"]) != len(given["box_head.embedding.weight"])
    refused(scenes, f"model.start={file}", "model.trunk=resnet10t", message="its trunk is another one",
            folder=tmp_path / "run")  # fmt: skip


def test_bad_input_is_one_line_and_writes_nothing(scenes, tmp_path: Path):
    other = json.loads((scenes.folder / "annotations" / "instances_train2017.json").read_text())
    other["images"].append({"id": 999, "file_name": "new.jpg", "width": 96, "height": 96})
    (tmp_path / "more.json").write_text(json.dumps(other))
    np.save(tmp_path / "narrow.npy", np.ones((6, 7), np.float32))
    for override, message in (
        ("data.proposals=", r"data.proposals \(empty\): no such folder; ViLD/make_proposals.py"),
        ("data.proposals=nowhere", "data.proposals nowhere: no such folder"),
        (f"data.proposals={scenes.folder}", "holds no complete list"),
        ("data.store=nowhere", "data.store nowhere: no such folder; ViLD/embed.py fills it"),
        ("train.seed=3", "data.store .* was made with other teacher"),
        ("teacher.name=ViT-Z-1", "ViT-Z-1"),
        (f"data.train_annotations={tmp_path / 'more.json'}", "no proposals of 1 of the 13 images .*new.jpg"),
        ("model.trunk=resnet5000", "model.trunk resnet5000"),
        ("data.prompts=synonyms", "have no synonyms"),
        (f"data.embeddings={tmp_path / 'narrow.npy'}", r"shape \(6, 7\)"),
    ):
        refused(scenes, override, message=message, folder=tmp_path / "run")
    for override, message in (
        ("model.variant=vlid", "model.variant is 'vlid', but must be one of text, image, vild"),
        ("data.image_size=100", "multiple of 32"),
        ("train.decay_at=[2.0]", "train.decay_at"),
        ("teacher.crop_rule=cut", "squash"),
        ("model.masks=3", "must be of type bool"),
        ("test.attribute_text=object", "a text with {}"),
        ("data.single_class=true", 'false where model.variant is not "supervised"'),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            scenes.config(override)


def test_checkpoints_of_other_detectors_are_refused(scenes, trained: Path, tmp_path: Path):
    arguments = ["--eval", "bbox", "--device", "cpu", "--out", str(tmp_path / "out")]
    for override, message in (
        ("train.seed=3", "was trained with the teacher ViT-Ti-8-64"),
        ("model.variant=vild", "has unknown image_head"),
        ("model.channels=32", "use the config that it was trained with"),
    ):
        with pytest.raises(UserError, match=message):
            test_command.main([scenes.config_file, str(trained), *arguments, override])
    with pytest.raises(UserError, match="does not exist"):
        test_command.main([scenes.config_file, "nowhere.pt", *arguments])
    again = [scenes.config_file, "--work-dir", str(trained.parent), "--device", "cpu"]
    with pytest.raises(UserError, match="model.variant was 'ensemble', now it is 'vild'"):
        train_command.main([*again, "model.variant=vild", "--resume", "--max-steps", "8"])
    with pytest.raises(UserError, match="give --resume"):
        train_command.main(again)


def test_settings_that_differ_from_the_training_are_named(scenes, trained: Path, caplog: pytest.LogCaptureFixture):
    config = scenes.config()
    vocabulary, teacher = make_vocabulary(config, load(config, "val")), load_teacher(config)
    detector = make_detector(config, teacher, learned(config, vocabulary), device=scenes.alone.device, trained=True)
    load_into(str(trained), detector, config, teacher)
    assert "was trained with" not in caplog.text
    config.model.rpn_nms, config.data.pixels, config.model.start = 0.3, "model", "elsewhere.pt"
    load_into(str(trained), detector, config, teacher)
    assert 'was trained with model.rpn_nms=0.7 data.pixels="imagenet"; the config at hand' in caplog.text
    ovdet.load_detector(trained, overrides=["model.rpn_padding=false"])
    assert "was trained with model.rpn_padding=true; the config at hand" in caplog.text


def test_every_config_can_be_read():
    files = sorted((ROOT / "ViLD" / "configs").glob("*.toml"))
    configs = {file.stem: read_config(str(file), []) for file in files}
    assert len(configs) >= 15
    assert configs["lvis_r152_vild"].model.image_weight == 1 and configs["lvis_r152_ensemble"].model.image_weight == 2
    assert len(configs["ov_coco_r50_ensemble"].data.novel) == 17 and not configs["ov_coco_r50_text"].model.masks
    assert configs["transfer_voc_r50"].data.protocol == "voc" and configs["lvis_r50_ensemble"].model.masks
