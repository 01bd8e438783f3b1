"""The whole program on a tiny model: methods, files it writes, errors before anything is written."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import open_clip
from training.engine.checkpoint import read_checkpoint


def results(program, name: str) -> list[dict]:
    return json.loads((program.logs / name / "results.json").read_text())


@pytest.mark.parametrize("method", ["grid_distill", "proposals_distill", "region_clip", "contrastive"])
def test_each_method_trains_evaluates_and_releases(program, method):
    assert program("--lock-image", train=method, val=True, name="run", alpha=0.7,
                   lock_image_unlocked_groups=3, eval_image_sizes="64", log_images=1) == 0  # fmt: skip
    folder = program.logs / "run"
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0}).Reload()
    (tag,) = events.Tags()["images"]
    assert tag.startswith("val/") and [e.step for e in events.Images(tag)] == [0, 12, 24]
    records = results(program, "run")
    assert [r["epoch"] for r in records] == [0, 1, 2] and all(0 <= r["rois.thing.macc1"] <= 1 for r in records)
    assert "dataset_type: " + method in (folder / "params.txt").read_text()
    assert list((folder / "tensorboard").iterdir()) and (folder / "out.log").stat().st_size
    checkpoint = read_checkpoint(folder / "checkpoints" / "epoch_2.pt")
    assert checkpoint["step"] == 24 and checkpoint["epoch"] == 2
    # The release is in the published layout, loads as weights, and is the ensemble of start and student.
    release = torch.load(folder / "checkpoints" / "clipself.pt", weights_only=True)
    assert release["name"] == "run" and any(k.startswith("visual.blocks.0.attn.q_proj") for k in release["state_dict"])
    model = open_clip.create_model("tiny-eva", pretrained=folder / "checkpoints" / "clipself.pt")
    torch.manual_seed(0)
    start, student = open_clip.create_model("tiny-eva").state_dict(), checkpoint["state_dict"]
    changed = [k for k in student if not torch.equal(start[k], student[k])]
    assert changed
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, 0.7 * student[name] + 0.3 * start[name], rtol=1e-6, atol=1e-7)


def test_loss_falls_and_a_checkpoint_is_evaluated_alone(program):
    assert program(name="run", epochs=12, val=True, zeroshot_frequency=0, log_every_n_steps=1) == 0
    losses = [
        float(line.split("loss ")[1].split()[0]) for line in (program.logs / "run/out.log").open() if "loss " in line
    ]
    assert len(losses) == 144 and np.mean(losses[-20:]) < 0.7 * np.mean(losses[:5])
    file = program.logs / "run/checkpoints/clipself.pt"
    again = program(train_data="", train_image_root="", val=True, pretrained=file, name="alone", eval_image_sizes="64")
    assert again == 0
    last, alone = results(program, "run")[-1], results(program, "alone")[-1]
    assert {k: v for k, v in last.items() if "macc" in k} == pytest.approx(
        {k: v for k, v in alone.items() if "macc" in k}
    )


def test_several_sizes_and_embeddings_from_a_file(program, scenes, tmp_path):
    names = json.loads((scenes / "annotations/panoptic_val2017.json").read_text())["categories"]
    np.save(tmp_path / "classes.npy", np.random.default_rng(0).normal(size=(len(names), 24)).astype(np.float32))
    code = program("--eval-image-sizes", "64", "96", train_data="", train_image_root="", val=True, name="sizes",
                   embed_path=tmp_path / "classes.npy", det_image_size=63)  # fmt: skip
    assert code == 0  # the training's size, which would not fit, is not asked for
    assert {"64.rois.thing.macc1", "96.maskpool.stuff.macc5", "crops.thing.macc1"} <= set(results(program, "sizes")[0])


def bad_json(tmp_path):
    (tmp_path / "bad.json").write_text("{not json")
    return {"train_data": tmp_path / "bad.json"}


def empty_root(tmp_path):
    (tmp_path / "empty").mkdir()
    return {"train_image_root": tmp_path / "empty"}


def wrong_count(tmp_path):
    np.save(tmp_path / "few.npy", np.zeros((3, 24), np.float32))
    return {"val": True, "embed_path": tmp_path / "few.npy"}


def other_weights(tmp_path):
    torch.save({"visual.transformer.resblocks.0.x": torch.zeros(1)}, tmp_path / "other.pt")
    return {"pretrained": tmp_path / "other.pt"}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (lambda t: {"train_data": t / "none.json"}, ["none.json", "no such file"]),
        (bad_json, ["bad.json", "not a json"]),
        (lambda t: {"val": True, "val_data": t / "none.json"}, ["none.json"]),
        (empty_root, ["--train-image-root", "empty", "000"]),
        (lambda t: {"train_image_root": t / "gone"}, ["gone", "no such folder"]),
        (wrong_count, ["few.npy", "3", "11"]),
        (other_weights, ["other.pt", "another architecture"]),
        (lambda t: {"model": "EVA02-CLIP-B16"}, ["EVA02-CLIP-B16", "EVA02-CLIP-B-16"]),
        (lambda t: {"pretrained": "nope"}, ["nope", "neither a file nor a tag"]),
        (lambda t: {"det_image_size": 65}, ["65", "64", "patch"]),
        (lambda t: {"downsample_factor": 16}, ["--downsample-factor 16", "8"]),
        (lambda t: {"batch_size": 0}, ["--batch-size", "0"]),
        (lambda t: {"alpha": 1.5}, ["--alpha", "1.5"]),
        (lambda t: {"lr": "nan"}, ["--lr", "nan"]),
        (lambda t: {"extract_type": "v1"}, ["v1", "CLIP ViT"]),
        (lambda t: {"precision": "fp16"}, ["fp16", "GPU"]),
        (lambda t: {"no_such_flag": 1}, ["--no-such-flag"]),
        (lambda t: {"train_data": "", "train_image_root": ""}, ["nothing to do"]),
        (lambda t: {"max_split": "many"}, ["--max-split", "many"]),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(program, tmp_path, capsys, flags, words):
    assert program(name="run", **flags(tmp_path)) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(error) == 1 and all(w in error[0] for w in words), error
    assert not program.logs.exists()


def test_existing_experiment_needs_resume(program, capsys):
    assert program(name="run", epochs=1) == 0
    before = {f: f.stat().st_mtime_ns for f in (program.logs / "run").rglob("*") if f.is_file()}
    assert program(name="run", epochs=1) == 2
    assert "exists" in capsys.readouterr().err
    assert before == {f: f.stat().st_mtime_ns for f in (program.logs / "run").rglob("*") if f.is_file()}


def write_scene_copy(scenes, target, change) -> None:
    """Annotations with changed entries, and links to the images."""
    content = json.loads((scenes / "annotations/instances_train2017.json").read_text())
    (target / "images").mkdir()
    for file in (scenes / "train2017").iterdir():
        (target / "images" / file.name).symlink_to(file)
    change(content, target / "images")
    (target / "train.json").write_text(json.dumps(content))


def test_lvis_style_annotations_train(program, scenes, tmp_path):
    def change(content, images):
        for image in content["images"]:
            image["coco_url"] = f"http://images.cocodataset.org/train2017/{image.pop('file_name')}"

    write_scene_copy(scenes, tmp_path, change)
    assert program(name="run", epochs=1, train_data=tmp_path / "train.json", train_image_root=scenes) == 0


def test_unusable_images_are_skipped_counted_and_bounded(program, scenes, tmp_path, capsys):
    def change(content, images):
        first, second, third = (images / i["file_name"] for i in content["images"][:3])
        for file in (first, second, third):
            file.unlink()
        first.write_bytes(b"not an image")
        second.write_bytes((scenes / "train2017" / second.name).read_bytes()[:300])
        content["annotations"][0]["bbox"] = [1, 1, 0, 5]

    write_scene_copy(scenes, tmp_path, change)
    data = {"train_data": tmp_path / "train.json", "train_image_root": tmp_path / "images"}
    assert program(name="run", epochs=1, max_skipped=0.2, **data) == 0
    log = (program.logs / "run/out.log").read_text()
    assert log.count("skipped ") == 3 and "zero or negative size" in log
    assert program(name="strict", epochs=1, max_skipped=0.05, **data) == 2
    assert "3 of 24 samples" in capsys.readouterr().err
