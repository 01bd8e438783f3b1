"""The programs from the command line: scores, resume, processes, pseudo labels, training; one line for each mistake."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ovseg import evaluate, pseudo_labels
from ovseg.classes import class_list
from ovseg.maskclip_plus import __main__ as maskclip_plus
from ovseg.maskclip_plus.network import load_student

ROOT = Path(__file__).parents[2]
_spec = importlib.util.spec_from_file_location("trees", Path(__file__).with_name("trees.py"))
trees = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(trees)


@pytest.fixture()
def model(golden, tmp_path) -> list[str]:
    """Flags of a tiny model, with embeddings of the words "person" and "cat" from a file."""
    folder = golden / "vit_quickgelu"
    width = json.loads((folder / "config.json").read_text())["embed_dim"]
    embeddings = torch.randn(2, width, generator=torch.Generator().manual_seed(0))
    torch.save(dict(zip(("person", "cat"), embeddings, strict=True)), tmp_path / "words.pt")
    return [
        "--model", str(folder / "config.json"), "--pretrained", str(folder / "weights.safetensors"),
        "--embed-path", str(tmp_path / "words.pt"), "--device", "cpu", "--workers", "0",
    ]  # fmt: skip


@pytest.fixture()
def scenes(tmp_path) -> Path:
    """A panoptic set of five images of two classes and different sizes."""
    rng = np.random.default_rng(0)
    root, images, annotations = tmp_path / "scenes", [], []
    (root / "annotations" / "panoptic_val2017").mkdir(parents=True)
    (root / "val2017").mkdir()
    for i in range(5):
        height, width = 40 + 8 * i, 70 - 4 * i
        ids = (np.arange(width)[None] * 3 // width).repeat(height, 0)  # 0: void
        rgb = np.stack([ids, ids * 0, ids * 0], -1).astype(np.uint8)
        Image.fromarray(rgb).save(root / "annotations" / "panoptic_val2017" / f"{i}.png")
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "val2017" / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png"})
        segments = [{"id": 1, "category_id": 1}, {"id": 2, "category_id": 17}]
        annotations.append({"image_id": i, "file_name": f"{i}.png", "segments_info": segments})
    categories = [{"id": 1, "name": "person", "isthing": 1}, {"id": 17, "name": "cat", "isthing": 1}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "annotations" / "panoptic_val2017.json").write_text(json.dumps(content))
    return root


def rewrite_words(model: list[str]) -> None:
    """Other embeddings in the same file."""
    file = Path(model[model.index("--embed-path") + 1])
    torch.save({name: value.flip(0) for name, value in torch.load(file).items()}, file)


def flags(model: list[str], root: Path, *more: str) -> list[str]:
    return [*model, "--dataset", "panoptic", "--data-root", str(root), "--short-side", "48", *more]


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())["results"]


def test_scores_in_one_run_two_runs_and_two_processes(model, scenes, tmp_path, capsys):
    """Cut short and gone on with, and spread over processes: the same numbers to the last digit."""
    common = flags(model, scenes, "--refine", "none", "pd", "--window", "32", "--stride", "16", "--batch-size", "2")
    assert evaluate.main([*common, "--output", str(tmp_path / "one")]) == 0
    table = capsys.readouterr().out
    assert "mIoU" in table and len(table.splitlines()) == 3
    whole = results(tmp_path / "one")

    # Counts as a run that was killed after two images has left them.
    counts = tmp_path / "one" / "counts"
    (done,) = [f for f in counts.glob("*.json") if f.name != "run.json"]
    content = json.loads(done.read_text())
    assert sorted(content["images"]) == [0, 1, 2, 3, 4]
    partial = evaluate.Counts(tmp_path / "cut", json.loads((counts / "run.json").read_text()))
    assert evaluate.main([*common, "--max-images", "2", "--output", str(tmp_path / "two")]) == 0
    (two,) = [f for f in (tmp_path / "two" / "counts").glob("*.json") if f.name != "run.json"]
    partial.file.write_text(two.read_text())
    assert evaluate.main([*common, "--output", str(tmp_path / "cut")]) == 0
    assert results(tmp_path / "cut") == whole

    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "--"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(
        [*command, "ovseg.evaluate", *common, "--output", str(tmp_path / "both")],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    assert results(tmp_path / "both") == whole
    assert len(list((tmp_path / "both" / "counts").glob("*.json"))) == 3  # each process its own, and the settings


def test_mistakes_are_one_line(model, scenes, tmp_path, capsys):
    output = ["--output", str(tmp_path / "out")]
    assert evaluate.main([*flags(model, scenes), *output]) == 0
    capsys.readouterr()

    def error_of(*arguments: str) -> str:
        assert evaluate.main(list(arguments)) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") or "\nerror: " in error
        return error.splitlines()[-1]

    assert "other settings" in error_of(*flags(model, scenes, "--scale", "10"), *output)
    assert "no such folder" in error_of(*flags(model, scenes / "nowhere"))
    assert "panoptic_test.json" in error_of(*flags(model, scenes, "--split", "test"))
    assert "asked for twice" in error_of(*flags(model, scenes, "--refine", "pd", "pd"))
    assert "threshold is 3.0" in error_of(*flags(model, scenes, "--threshold", "3"))
    assert "at least 1" in error_of(*flags(model, scenes, "--batch-size", "0"))
    assert "short_side is 0" in error_of(
        *model, "--dataset", "panoptic", "--data-root", str(scenes), "--short-side", "0"
    )
    assert "panoptic has no published unseen classes" in error_of(*flags(model, scenes, "--zero-shot"))
    assert "stride is 112 and window 64" in error_of(*flags(model, scenes, "--protocol", "sclip", "--window", "64"))
    rewrite_words(model)
    assert "other embed_path" in error_of(*flags(model, scenes), *output)
    os.remove(scenes / "val2017" / "3.png")
    assert "1 of 5 images could not be used" in error_of(*flags(model, scenes))
    assert evaluate.main(flags(model, scenes, "--max-skipped", "0.3")) == 0
    # A label file of another data set: no image would fit, so it ends at once.
    Image.fromarray(np.full((40, 70, 3), 9, np.uint8)).save(scenes / "annotations" / "panoptic_val2017" / "0.png")
    assert "does not name" in error_of(*flags(model, scenes, "--max-skipped", "1"))


def test_pseudo_labels_go_on_where_they_stopped(model, scenes, tmp_path, capsys):
    common = [*model, "--images", str(scenes / "val2017"), "--classes", "person,cat", "--short-side", "48"]
    out = tmp_path / "labels"
    assert pseudo_labels.main([*common, "--confidence", "0.6", "--output", str(out)]) == 0
    assert "5 label maps" in capsys.readouterr().out
    labels = [Image.open(out / f"{i}.png") for i in range(5)]
    assert all(image.mode == "P" for image in labels)
    assert [image.size for image in labels] == [Image.open(scenes / "val2017" / f"{i}.png").size for i in range(5)]
    values = set(np.unique(np.concatenate([np.asarray(image).ravel() for image in labels])))
    assert 255 in values and values <= {0, 1, 255}
    record = json.loads((out / "pseudo_labels.json").read_text())
    assert record["classes"] == ["person", "cat"] and record["ignore"] == 255

    before = (out / "1.png").read_bytes()
    (out / "1.png").unlink()
    assert pseudo_labels.main([*common, "--confidence", "0.6", "--output", str(out)]) == 0
    assert "1 label maps" in capsys.readouterr().out and (out / "1.png").read_bytes() == before
    assert pseudo_labels.main([*common, "--confidence", "0.7", "--output", str(out)]) == 2
    assert "other confidence" in capsys.readouterr().err
    rewrite_words(model)
    assert pseudo_labels.main([*common, "--confidence", "0.6", "--output", str(out)]) == 2
    assert "other embeddings" in capsys.readouterr().err
    assert pseudo_labels.main([*common, "--confidence", "7", "--output", str(out)]) == 2
    assert pseudo_labels.main([*model, "--images", str(scenes), "--output", str(tmp_path / "x")]) == 2
    assert "no class names" in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_pseudo_labels_of_unseen_classes_are_unseen(model, tmp_path, capsys):
    """It is known that these pixels are of an unseen class: as if there were no others, before and after refinement."""
    trees.voc(tmp_path / "data")
    photographs = tmp_path / "data" / "VOCdevkit" / "VOC2012" / "JPEGImages"
    classes, words = class_list("voc21"), Path(model[model.index("--embed-path") + 1])
    width = next(iter(torch.load(words).values())).shape[0]
    embeddings = torch.randn(len(classes.all_words), width, generator=torch.Generator().manual_seed(1))
    torch.save(dict(zip(classes.all_words, embeddings, strict=True)), words)
    common = [*model, "--short-side", "48", "--denoise", "0.5", "--smooth", "1.0", "--confidence", "0.4"]
    unseen = [classes.names[label] for label in classes.unseen]
    own = ["--images", str(photographs), "--classes", *unseen, "--out", str(tmp_path / "own")]
    assert pseudo_labels.main([*common, *own]) == 0
    voc = ["--dataset", "voc21", "--data-root", str(tmp_path / "data"), "--split", "val", "--threshold", "0.1"]
    assert pseudo_labels.main([*common, *voc, "--keep-seen", "--out", str(tmp_path / "voc")]) == 0
    known = trees.stripes(0, 1, 20, 255)
    for name in ("2007_000033.png", "2007_000042.png"):
        labels, alone = (np.asarray(Image.open(tmp_path / folder / name)).astype(int) for folder in ("voc", "own"))
        expected = np.where(alone == 255, 255, alone + classes.unseen[0])
        assert (labels == np.where(known == 20, expected, known)).all()
    assert capsys.readouterr().err.count("--threshold: not used, there is no background class") == 1
    record = json.loads((tmp_path / "voc" / "pseudo_labels.json").read_text())
    assert record["classes"] == list(classes.names) and record["filled"] == unseen


def test_options_that_would_do_nothing_are_refused(model, scenes, tmp_path, capsys):
    """Classes are those of a data set, or they are named: what is said of the other kind changes nothing."""
    (tmp_path / "names.txt").write_text("person\ncat\n")
    dataset = [*model, "--dataset", "panoptic", "--data-root", str(scenes), "--split", "val"]
    photographs = [*model, "--images", str(scenes / "val2017"), "--classes", "person,cat"]
    for program, out in (
        (pseudo_labels, ["--out", str(tmp_path / "out")]), (maskclip_plus, ["--logs", str(tmp_path), "--name", "out"])
    ):  # fmt: skip
        for arguments, flag, more in (
            (dataset, "--classes", ["person"]),
            (dataset, "--classes-from", [str(tmp_path / "names.txt")]),
            (dataset, "--background", ["wall|sky"]),
            (photographs, "--words", ["sclip"]),
            (photographs, "--image-root", [str(scenes)]),
        ):
            assert program.main([*arguments, flag, *more, *out]) == 2
            errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
            kind = "--dataset panoptic" if arguments is dataset else "--images"
            assert len(errors) == 1 and f"{flag} does nothing with {kind}" in errors[0] and "leave it out" in errors[0]
            assert not (tmp_path / "out").exists()


def test_a_student_is_taught_by_the_similarities_of_another_model(model, golden, scenes, tmp_path, capsys):
    """--external reaches the reading that follows it; where none does, or patches do not fit, it is refused."""
    patch = json.loads((golden / "vit_quickgelu" / "config.json").read_text())["vision_cfg"]["patch_size"]
    common = flags(model, scenes, "--split", "val", "--steps", "1", "--backbone", "lraspp_mobilenet_v3_large")
    common += ["--batch-size", "2", "--logs", str(tmp_path)]
    follows, other = ["--readout", "proxyclip"], ["--external", "test_convnext:random"]  # cells of 32 pixels
    fits = ["--crop", "64"]
    assert maskclip_plus.main([*common, *fits, *follows, *other, "--name", "run"]) == 0
    assert json.loads((tmp_path / "run" / "params.json").read_text())["external"] == other[1]
    capsys.readouterr()
    for more, message in (
        ([*fits, *follows], "the reading proxyclip follows another model: name one with --external"),
        ([*fits, *other], "--external does nothing: only the reading proxyclip follows another model; leave it out"),
        (["--crop", str(3 * patch), *follows, *other], f"--crop {3 * patch}: no multiple of the patch size {patch} of"),
        ([*fits, *follows, *other, "--smooth", "1"], "--smooth: the reading proxyclip lies on the grid of --external"),
        ([*fits, *follows, *other, "--drop-padding"], "reads the padding of samples, which this teacher leaves out"),
    ):
        assert maskclip_plus.main([*common, *more, "--name", "x"]) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_student_trains_stops_goes_on_and_is_read_again(model, golden, scenes, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("training.engine.checkpoint.prune", lambda *_, **__: None)  # the one inside the epoch is needed
    patch = json.loads((golden / "vit_quickgelu" / "config.json").read_text())["vision_cfg"]["patch_size"]
    crop = str(2 * patch)
    common = flags(model, scenes, "--split", "val", "--crop", crop, "--batch-size", "2", "--templates", "plain")
    common += [
        "--logs",
        str(tmp_path),
        "--setting",
        "zero-shot",
        "--unseen",
        "cat",
        "--guided",
        "0.5",
        "--log-every",
        "1",
    ]
    whole = ["--steps", "4", "--val-split", "val"]
    assert maskclip_plus.main([*common, *whole, "--name", "whole", "--save-every", "1"]) == 0
    (record,) = json.loads((tmp_path / "whole" / "results.json").read_text())
    assert record["step"] == 4 and {"mIoU", "mIoU_seen", "mIoU_unseen", "hIoU"} <= set(record)
    student, about = load_student(tmp_path / "whole" / "checkpoints" / "student.pt")
    assert about["classes"] == ["person", "cat"] and not student.training

    # The same run, taken up after its first step: both phases go on as they would have.
    inside = tmp_path / "whole" / "checkpoints" / "epoch_0_step_1.pt"
    assert maskclip_plus.main([*common, *whole, "--name", "cut", "--resume", str(inside)]) == 0
    again, _ = load_student(tmp_path / "cut" / "checkpoints" / "student.pt")
    for (name, value), other in zip(student.state_dict().items(), again.state_dict().values(), strict=True):
        torch.testing.assert_close(other, value, atol=1e-6, rtol=1e-5, msg=name)

    # With another precision it is the same run, of the same teacher.
    half = ["--resume", str(inside), "--precision", "amp_bf16", "--name", "half"]
    assert maskclip_plus.main([*common, *whole, *half]) == 0
    assert "resuming with another --precision: it was None, now it is 'amp_bf16'" in capsys.readouterr().err
    assert "resnet50 starts from random weights" in (tmp_path / "whole" / "out.log").read_text()

    goes_on = [*common, *whole, "--name", "other", "--resume", str(inside)]
    for changed, message in [
        (["--seed", "1"], "--seed was 0, now it is 1"),
        (["--unseen", "person"], "--unseen was ['cat'], now it is ['person']"),
        (["--crop", str(3 * patch)], "--crop was"),
        (["--short-side", "56"], "--short-side was 48, now it is 56"),
        (["--templates", "project"], "--templates was 'plain'"),
    ]:
        assert maskclip_plus.main([*goes_on, *changed]) == 2
        assert message in capsys.readouterr().err
    capsys.readouterr()
    photographs = [
        *model,
        "--images",
        str(scenes / "val2017"),
        "--classes",
        "person,cat",
        "--crop",
        crop,
        "--name",
        "x",
    ]
    for wrong, message in [
        ([*photographs, "--val-split", "val"], "--val-split belongs to --dataset"),
        ([*common, "--name", "whole"], "exists"),
        ([*common, "--name", "x", "--unseen", "dog"], "not a class"),
        ([*common, "--name", "x", "--unseen", "cat", "person"], "names every class"),
        ([*common, "--name", "x", "--crop", str(2 * patch + 1)], f"no multiple of the patch size {patch}"),
        ([*common, "--name", "x", "--batch-size", "1"], "at least 2"),
    ]:
        assert maskclip_plus.main(wrong) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_a_student_is_scored_without_unusable_images(model, golden, scenes, tmp_path):
    """They are put up with after training as they are in training."""
    patch = json.loads((golden / "vit_quickgelu" / "config.json").read_text())["vision_cfg"]["patch_size"]
    (scenes / "val2017" / "3.png").write_bytes(b"no picture")
    common = flags(model, scenes, "--split", "val", "--val-split", "val", "--crop", str(2 * patch), "--steps", "1")
    common += ["--backbone", "lraspp_mobilenet_v3_large", "--batch-size", "2", "--logs", str(tmp_path), "--name", "run"]
    assert maskclip_plus.main([*common, "--max-skipped", "0.5"]) == 0
    assert len(json.loads((tmp_path / "run" / "results.json").read_text())) == 1


def test_words_of_a_student_are_those_of_maskclip(tmp_path):
    """Where it has some; --words says otherwise."""
    trees.voc(tmp_path)
    for name, more, words in [
        ("voc20", [], "maskclip"), ("voc21", [], "names"), ("voc20", ["--words", "sclip"], "sclip")
    ]:  # fmt: skip
        arguments = ["--model", "m", "--name", "n", "--dataset", name, "--data-root", str(tmp_path), *more]
        _, classes = maskclip_plus.open_data(maskclip_plus.parse_args(arguments))
        assert classes == class_list(name, words)


def test_script_of_a_data_set(model, scenes, tmp_path):
    """The bash entry point: readings side by side in one table, further flags handed on."""
    flag = dict(zip(model[::2], model[1::2], strict=True))
    environment = {
        **os.environ, "PYTHON": sys.executable, "DATA": str(scenes), "OUT": str(tmp_path / "out"), "NPROC": "1",
        "MODEL": flag["--model"], "PRETRAINED": flag["--pretrained"], "READOUTS": "own value naclip",
        "PROTOCOL": "sclip", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    command = ["bash", str(ROOT / "scripts" / "segment_panoptic.sh"), "--embed-path", flag["--embed-path"]]
    run = subprocess.run(
        [*command, "--workers", "0", "--short-side", "64", "--window", "64", "--stride", "32"],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    assert [line.split()[0] for line in run.stdout.splitlines()] == ["reading", "own", "value", "naclip"]
    found = results(tmp_path / "out" / "panoptic-sclip-vit_quickgelu-weights")
    assert set(found) == {"own", "value", "naclip"} and found["own"] == found["value"] != found["naclip"]
    for script in (ROOT / "scripts").glob("segment_*.sh"):
        subprocess.run(["bash", "-n", str(script)], check=True)
