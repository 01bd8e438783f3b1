"""Every method by the command line: it trains, goes on after an interruption, and releases what it read."""

from __future__ import annotations

import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend

import open_clip
from open_clip import CLIP
from open_clip.packed_blocks import CHANGING, prefer
from training.engine.checkpoint import read_checkpoint
from training.engine.data.annotations import load_annotations
from training.engine.errors import EXIT_INTERRUPTED
from training.methods import Method
from training.teachers.build import Teacher

VFM = ["--vfm", "test_vit", "--vfm-weights", "random"]  # a trunk of a few thousand parameters
DENSE = ["--dense-teacher", "tiny-eva", "--dense-teacher-weights", "random"]


@pytest.fixture
def files(scenes, tmp_path) -> dict[str, str]:
    """Instances with captions of boxes and of images, and a list of names; each has entries that are of no use."""
    content = json.loads((scenes / "annotations/instances_train2017.json").read_text())
    for number, entry in enumerate(content["annotations"]):
        if number % 3:
            entry["caption"] = f"thing {number}" if number % 5 else "  "
    images = [i["id"] for i in content["images"]]
    captions = [{"image_id": i, "caption": f"a picture of {i}"} for i in images[::2]]
    content["annotations"] += [*captions, {"image_id": images[0], "caption": 7}, {"image_id": -1, "caption": "lost"}]
    content["annotations"] += [{"image_id": images[0], "bbox": [1, 1, 0, 0], "caption": "of nothing"}]
    (tmp_path / "captioned.json").write_text(json.dumps(content))
    categories = json.loads((scenes / "annotations/panoptic_val2017.json").read_text())["categories"]
    (tmp_path / "names.json").write_text(json.dumps([*categories, {"isthing": 1}, categories[0], 5, "extra"]))
    rich = {c["name"]: [c["name"], "a kind of thing"] for c in categories[::2]} | {"x": 3}
    (tmp_path / "rich.json").write_text(json.dumps(rich))
    return {n: str(tmp_path / f"{n}.json") for n in ("captioned", "names", "rich")}


METHODS = {
    "clipself": ["--readout", "window:4", "--dataset-type", "mixed_distill", "--proposal-share", "0.3"],
    "declip": VFM,
    "declip of another grid": ["--method", "declip", "--readout", "csa", *VFM, "--vfm-size", "80"],
    "synclip": [*VFM, "--rich-texts", "{rich}"],
    "synclip free": ["--method", "synclip", *VFM, "--classes-from", "teacher", "--names", "{names}"],
    "densevlm": [*DENSE, "--names", "{names}", "--grid", "dense", "--threshold", "0.05"],
    "sc": [],
    "denserc": VFM,
    "fineclip": ["--train-data", "{captioned}"],
    "mixrc": [*VFM, *DENSE, "--names", "{names}", "--alignment-weight", "0.5", "--semantic-weight", "0.1"],
    "clim": ["--mosaics", "2", "--mosaic-size", "64", "--batch-size", "6"],
}


def arguments(name: str, files: dict[str, str]) -> list[str]:
    flags = [f.format(**files) for f in METHODS[name]]
    return flags if "--method" in flags else ["--method", name, *flags]


KINDS = {"clim": "contrastive", "synclip": "proposals_distill", "fineclip": "proposals_distill",
         "clipself": "mixed_distill", "mixrc": "mixed_distill"}  # fmt: skip


def run(program, case: str, files: dict[str, str], *extra: str, **flags) -> int:
    flags = {"epochs": 1, "lock_image_unlocked_groups": 3, **flags}
    return program("--lock-image", *arguments(case, files), *extra, train=KINDS.get(case, "grid_distill"), **flags)


@pytest.mark.parametrize("name", METHODS)
def test_trains_and_resumes_bit_identically(program, files, name, monkeypatch):
    flags = {"max_steps": 4, "alpha": 0.7}
    assert run(program, name, files, name="whole", **flags) == 0
    with monkeypatch.context() as patch:
        calls, begin = [], Method.begin_step

        def begin_step(self, *args, **kwargs):
            calls.append(1)
            if len(calls) == 2:
                os.kill(os.getpid(), signal.SIGTERM)  # the step is finished and saved
            begin(self, *args, **kwargs)

        patch.setattr(Method, "begin_step", begin_step)
        assert run(program, name, files, name="parts", **flags) == EXIT_INTERRUPTED
    assert len(calls) == 2 and run(program, name, files, name="parts", resume="latest", **flags) == 0
    files_ = [program.logs / n / "checkpoints/epoch_1.pt" for n in ("whole", "parts")]
    whole, parts = (read_checkpoint(file)["state_dict"] for file in files_)
    assert whole.keys() == parts.keys() and all(torch.equal(whole[k], parts[k]) for k in whole)
    log = (program.logs / "whole/out.log").read_text()
    losses = [float(line.split("loss ")[1].split()[0]) for line in log.splitlines() if "loss " in line]
    assert len(losses) >= 1 and np.isfinite(losses).all()
    # The released weights name the reading that they were trained with.
    model = open_clip.create_model("tiny-eva", pretrained=program.logs / "whole/checkpoints/clipself.pt")
    reading = {"clipself": "window:4", "declip": "qq", "declip of another grid": "csa", "synclip": "csa",
               "synclip free": "csa", "denserc": "gated:3", "mixrc": "gated:3"}.get(name, "value")  # fmt: skip
    assert model.visual.readout.name == reading
    if name == "denserc":
        assert model.visual.readout.gate.weight.any()


def test_kept_answers_of_all_teachers(program, files, tmp_path, monkeypatch, capsys):
    """Grids that recur: crops and foundation model are asked once; the run is the one without kept answers."""
    flags = {"log_every_n_steps": 1, "epochs": 2}
    fixed = ["--fixed-regions", "--precision", "fp32"]
    assert run(program, "declip", files, *fixed, name="plain", **flags) == 0
    cache = tmp_path / "cache"
    assert run(program, "declip", files, *fixed, name="kept", cache_teacher=cache, **flags) == 0
    assert {f.name for f in cache.iterdir()} == {"crops", "vfm"}
    calls = []
    forward = Teacher.forward
    monkeypatch.setattr(Teacher, "forward", lambda self, pixels: calls.append(1) or forward(self, pixels))
    assert run(program, "declip", files, *fixed, name="again", cache_teacher=cache, **flags) == 0
    assert not calls
    losses = [
        [float(line.split("loss ")[1].split()[0]) for line in (program.logs / n / "out.log").open() if "loss " in line]
        for n in ("plain", "kept", "again")
    ]
    assert len(losses[0]) == 24 and losses[1] == losses[2]
    np.testing.assert_allclose(losses[1], losses[0], atol=2e-3)
    # What is said of whole images stays true with other boxes.
    (cache / "crops").rename(tmp_path / "crops")
    kept = {f.name: f.stat().st_mtime_ns for f in (cache / "vfm").glob("shard*")}
    boxes = {"train_data": files["captioned"], "cache_teacher": cache, "epochs": 1}
    assert program(*arguments("declip", files), *fixed, train="mixed_distill", name="boxes", **boxes) == 0
    assert kept and kept == {f.name: f.stat().st_mtime_ns for f in (cache / "vfm").glob("shard*")}
    shutil.rmtree(cache / "crops")
    (tmp_path / "crops").rename(cache / "crops")
    for change, word in (("max-boxes=5", "max_boxes"), ("seed=3", "seed"), ("vfm-size=96", "view")):
        assert run(program, "declip", files, *fixed, f"--{change}", name="other", cache_teacher=cache) == 2
        assert word in capsys.readouterr().err


@pytest.mark.parametrize("name", ["synclip free", "densevlm", "mixrc"])
def test_kept_answers_and_a_batch_without_a_readable_image(program, scenes, files, tmp_path, name):
    """The teacher has left, and the counts hinge on what it says."""
    images = tmp_path / "images"
    shutil.copytree(scenes / "train2017", images)
    victim = sorted(images.iterdir())[2]
    victim.write_bytes(victim.read_bytes()[:100])
    flags = {"train_image_root": images, "cache_teacher": tmp_path / "cache", "epochs": 1, "batch_size": 1}
    assert run(program, name, files, "--fixed-regions", name="run", **flags) == 0
    log = (program.logs / "run/out.log").read_text()
    assert victim.name in log and "training runs without the teacher" in log


def test_bad_entries_are_counted_and_named(program, files, caplog):
    assert run(program, "fineclip", files, name="captions") == 0
    log = (program.logs / "captions/out.log").read_text()
    for text in ("region caption without text", "region caption of a box that is not usable",
                 "caption without text or image"):  # fmt: skip
        assert text in log, text
    assert run(program, "synclip free", files, name="names") == 0
    assert "3 entries are no new class (left out), e.g. {'isthing': 1}" in caplog.text
    assert run(program, "synclip", files, name="rich") == 0
    assert "the texts of 1 names are no texts" in caplog.text and "their names stand in" in caplog.text


@pytest.mark.parametrize(("asked", "flash_first"), [("auto", True), ("math", False)])
def test_crops_whose_number_changes_do_not_take_the_kernel_that_is_built_for_each(
    program, files, monkeypatch, asked, flash_first
):  # fmt: skip
    """By the student that trains; what was asked for stands."""
    seen, original = set(), CLIP.encode_image

    def noted(*args, **kwargs):
        order = torch._C._get_sdp_priority_order()
        seen.add(order.index(int(SDPBackend.FLASH_ATTENTION)) < order.index(int(SDPBackend.CUDNN_ATTENTION)))
        return original(*args, **kwargs)

    monkeypatch.setattr(CLIP, "encode_image", noted)
    with prefer(("CUDNN_ATTENTION", *CHANGING)):
        assert run(program, "fineclip", files, "--attention", asked, name="run", max_steps=1) == 0
    assert seen == {flash_first}


def test_what_a_method_cannot_do_without_is_said(program, scenes, files, tmp_path, capsys):
    (tmp_path / "nothing.json").write_text("[]")
    cases = {
        ("fineclip",): ["no image has any captions"],
        ("fineclip", "--caption-weight", "0"): ["region captions"],
        ("densevlm", *DENSE): ["--names"],
        ("densevlm", *DENSE, "--names", str(tmp_path / "nothing.json")): ["no class name in it"],
        ("densevlm", "--names", files["names"]): ["weights"],
        ("synclip", *VFM, "--classes-from", "teacher"): ["--names"],
        ("declip", "--vfm", "no_such_trunk"): ["--vfm no_such_trunk"],
        ("declip", *VFM, "--readout", "value"): ["no context to distil"],
        ("declip", *VFM, "--vfm-size", "50"): ["50"],
        ("denserc", *VFM, "--readout", "nonsense"): ["nonsense"],
        ("sc", "--crop-teacher", "ViT-Ti-8-64", "--crop-teacher-weights", "random"): ["ViT-Ti-8-64", "128", "24"],
    }
    for (method, *flags), words in cases.items():
        kind = "grid_distill" if method in ("densevlm", "declip", "denserc", "sc") else "proposals_distill"
        assert program("--method", method, *flags, train=kind, name="run") == 2, (method, flags)
        error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
        assert len(error) == 1 and all(w in error[0] for w in words), error
    assert not (program.logs / "run").exists()


def test_proposals_that_are_not_there(program, scenes, tmp_path, capsys, caplog):
    """Images without a usable box are counted; a file where all lack one is refused."""
    content = json.loads((scenes / "annotations/instances_train2017.json").read_text())
    first = content["images"][0]["id"]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != first]
    (tmp_path / "some.json").write_text(json.dumps(content))
    assert program(train="proposals_distill", name="some", epochs=1, train_data=tmp_path / "some.json") == 0
    missing = (load_annotations(str(tmp_path / "some.json")).offsets[:2] == 0).all()
    assert missing and "1 of 24 images have no usable box" in caplog.text
    (tmp_path / "none.json").write_text(json.dumps({**content, "annotations": []}))
    assert program(train="proposals_distill", name="none", train_data=tmp_path / "none.json") == 2
    assert "not one of its 24 images has a box" in capsys.readouterr().err
    assert program(train="grid_distill", name="grid", epochs=1, train_data=tmp_path / "none.json") == 0
    # Boxes beside cells: as many as there are, but not none at all.
    assert program(train="mixed_distill", name="none", train_data=tmp_path / "none.json") == 2
    assert "not one of its 24 images has a box" in capsys.readouterr().err
    caplog.clear()
    flags = {"epochs": 1, "train_data": tmp_path / "some.json", "max_size": 16}
    assert program(train="mixed_distill", name="mixed", **flags) == 0
    assert "boxes are not of --min-size 8 to --max-size 16 pixels" in caplog.text


@pytest.mark.parametrize(("unannotated", "learned_from"), [(True, []), (False, ["boxes"])])
def test_results_say_what_people_made(program, scenes, tmp_path, unannotated, learned_from):
    content = json.loads((scenes / "annotations/instances_train2017.json").read_text())
    (tmp_path / "boxes.json").write_text(json.dumps({**content, "info": {"unannotated": unannotated}}))
    flags = {"train_data": tmp_path / "boxes.json", "epochs": 1, "max_steps": 1}
    assert program(train="mixed_distill", val=True, name="run", **flags) == 0
    last = json.loads((program.logs / "run/results.json").read_text())[-1]
    assert (last["method"], last["learned_from"]) == ("clipself", learned_from)
