"""The LVIS and OV-COCO configs from images to AP by one command, the study, and bad input on the command line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import open_clip
from ovdet.vild.commands import embed, make_proposals, train
from ovdet.vild.proposals import ProposalList
from training.engine.data.store import _digest
from training.engine.errors import UserError

ROOT = Path(__file__).resolve().parents[3]
VILD = ROOT / "ViLD"
SMALL = (
    "model.trunk=test_resnet", "model.trunk_weights=random", "model.channels=16", "model.box_width=32",
    "model.rpn_post_nms=40", "model.roi_samples=16", "teacher.name=ViT-Ti-8-64", 'teacher.pretrained=""',
    "data.image_size=96", "data.workers=0", "train.precision=fp32", "train.warmup_steps=2", "train.eval_every=0",
)  # fmt: skip


def environment(folder: Path) -> dict[str, str]:
    """Of programs: this interpreter, one thread, no GPU, and caches in the folder."""
    names = {"OMP_NUM_THREADS": "1", "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", "DEVICE": "cpu",
             "HOME": str(folder), "MOST": "8"}  # fmt: skip
    return {**os.environ, **names}


def run(*words: str, folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run(words, env=environment(folder), capture_output=True, text=True, timeout=900)


def lvis_like(file: Path, novel: list[str]) -> str:
    """Annotations with what LVIS's have besides: frequencies, and what is known to be absent or not exhaustive."""
    content = json.loads(file.read_text())
    for category in content["categories"]:
        category["frequency"] = "r" if category["name"] in novel else "f"
        category["synonyms"] = [category["name"], f"painted {category['name']}"]
    for image in content["images"]:
        present = {a["category_id"] for a in content["annotations"] if a["image_id"] == image["id"]}
        image["neg_category_ids"] = [c["id"] for c in content["categories"] if c["id"] not in present]
        image["not_exhaustive_category_ids"] = []
    target = file.with_name(f"lvis_{file.name}")
    target.write_text(json.dumps(content))
    return str(target)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lvis_r50_ensemble", "ov_coco_r50_ensemble"])
def test_configs_run_from_images_to_ap(scenes, tmp_path: Path, name: str):
    """20 steps of each network, and the same AP from 1 and 2 processes; a second run does nothing anew."""
    kinds = ["bbox", "segm"] if name.startswith("lvis") else ["bbox"]
    values = [*SMALL, "train.steps=20", f"data.novel={json.dumps(scenes.novel)}"]
    for split in ("train", "val"):
        file = scenes.folder / "annotations" / f"instances_{split}2017.json"
        used = lvis_like(file, scenes.novel) if name.startswith("lvis") else str(file)
        values += [f"data.{split}_annotations={used}", f"data.{split}_images={scenes.folder / f'{split}2017'}"]
    if name.startswith("lvis"):
        values += ["data.novel=[]", "data.prompts=synonyms"]
    config, out = str(VILD / "configs" / f"{name}.toml"), tmp_path / "out"
    program = str(VILD / "scripts" / "pipeline.sh")
    words = ["env", f"EVAL={' '.join(kinds)}", "bash", program, config, str(out), "2", *values]
    done = run(*words, folder=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "AR@100" in done.stdout and "AR@8" in done.stdout and "complete" in done.stdout
    assert "20 in all" in (out / name / "train.log").read_text()
    given = [f"data.proposals={out / 'proposals'}", f"data.store={out / 'store'}", *values]
    test = [str(VILD / "dist_test.sh"), config, str(out / name / "latest.pt"), "1", "--out", str(tmp_path / "one")]
    alone = run("bash", *test, "--device", "cpu", "--eval", *kinds, *given, folder=tmp_path)
    assert alone.returncode == 0, alone.stderr[-3000:]
    for file in ("metrics.json", *(f"results.{kind}.json" for kind in kinds)):
        assert (tmp_path / "one" / file).read_text() == (out / name / "test" / file).read_text()
    log = (out / name / "train.log").read_text()
    again = run(*words, folder=tmp_path)
    assert again.returncode == 0 and (out / name / "train.log").read_text() == log


@pytest.mark.slow
def test_the_study_runs(tmp_path: Path):
    torch.manual_seed(0)
    teacher = tmp_path / "quickstart" / "logs" / "start" / "checkpoints" / "clipself.pt"
    teacher.parent.mkdir(parents=True)
    torch.save({"state_dict": open_clip.create_model("ViT-Ti-8-64").state_dict()}, teacher)
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (venv / "bin" / "python").chmod(0o755)
    state = subprocess.check_output("cat setup.py requirements.txt | cksum", shell=True, text=True, cwd=ROOT).strip()
    (venv / ".installed-vild").write_text(f"{ROOT} {state}\n")
    names = {"CLIPSELF_VENV": venv, "QUICKSTART": tmp_path / "quickstart", "OUT": tmp_path / "out", "SEEDS": "0"}
    words = ["env", *(f"{key}={value}" for key, value in names.items()), "bash", str(VILD / "scripts" / "study.sh")]
    done = run(*words, "--smoke", folder=tmp_path)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    text = (tmp_path / "out" / "result.md").read_text()
    found = json.loads((tmp_path / "out" / "result.json").read_text())
    assert text in done.stdout and text.count("| CLIP on proposals") == 2
    assert set(found["detectors"]) == {"text", "image", "vild", "ensemble", "clip", "clip-objectness"}
    assert set(found["recall"]) == {"novel", "base", "all"} and found["seeds"] == [0]
    for name in ("detections.png", "expansion.png"):
        assert (tmp_path / "out" / name).stat().st_size > 1000
    wrong = run(*words, "--fast", folder=tmp_path)
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: unknown argument --fast")


def fails(scenes, folder: Path, program: str, *words: str) -> str:
    """What a program that must fail says: one line, with exit status 2."""
    done = run(sys.executable, str(VILD / program), scenes.config_file, *words, "--device", "cpu", folder=folder)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 2 and len(errors) == 1 and "Traceback" not in done.stderr, done.stderr[-2000:]
    return errors[0]


def test_bad_input_is_one_line_with_status_2(scenes, tmp_path: Path):
    """Other widths, missing proposals, and another teacher, each by the command line."""
    work = ("--work-dir", str(tmp_path / "run"))
    assert "data.proposals nowhere: no such folder; ViLD/make_proposals.py" in fails(
        scenes, tmp_path, "train.py", *work, "data.proposals=nowhere"
    )
    wide = tmp_path / "wide.json"
    content = json.loads((ROOT / "src" / "open_clip" / "model_configs" / "ViT-Ti-8-64.json").read_text())
    wide.write_text(json.dumps({**content, "embed_dim": 192}))
    assert "other" in fails(scenes, tmp_path, "train.py", *work, f"teacher.name={wide}")
    assert "made with other teacher" in fails(scenes, tmp_path, "embed.py", "train.seed=3")
    np.save(tmp_path / "narrow.npy", np.ones((6, 7), np.float32))
    assert "(6, 7)" in fails(scenes, tmp_path, "train.py", *work, f"data.embeddings={tmp_path / 'narrow.npy'}")
    assert not (tmp_path / "run").exists()


def test_images_without_proposals_and_rows_of_nan_are_trained_around(scenes, tmp_path: Path):
    """They are no error where a part is so; nothing but NaN is one, and so is nothing at all to distil."""
    for case in ("some", "all"):
        store = tmp_path / f"store_{case}"
        shutil.copytree(scenes.folder / "store", store)
        proposals = ProposalList.open(scenes.folder / "proposals")
        _spoil(store, slice(0, int(proposals.offsets[2])) if case == "some" else slice(None))
        words = [scenes.config_file, "--device", "cpu", f"data.store={store}", "--work-dir", str(tmp_path / case)]
        if case == "some":
            assert train.main([*words, "--max-steps", "3"]) == 0
            continue
        with pytest.raises(UserError, match="could not embed any") as error:
            train.main([*words, "--max-steps", "3"])
        assert "\n" not in str(error.value)


def test_nothing_to_distil_is_one_line(scenes, tmp_path: Path):
    out = str(tmp_path / "none")
    network = [scenes.config_file, str(scenes.folder / "proposer" / "latest.pt"), *scenes.proposer, "--device", "cpu"]
    make_proposals.main([*network, "--out", out, "--min-side", "1000"])
    assert len(ProposalList.open(out).boxes) == 0
    given = [f"data.proposals={out}", f"data.store={tmp_path / 'store'}"]
    embed.main([scenes.config_file, "--device", "cpu", *given])
    with pytest.raises(UserError, match="no image has any") as error:
        train.main([scenes.config_file, "--device", "cpu", *given, "--work-dir", str(tmp_path / "run")])
    assert "\n" not in str(error.value)


def _spoil(store: Path, rows: slice) -> None:
    """Rows of the first shard become NaN, and its name that of its new content."""
    file = next(store.glob("shard-00000-*.npy"))
    array = np.load(file)
    array[rows] = np.nan
    np.save(file, array)
    file.rename(file.with_name(f"shard-00000-{_digest(file)}.npy"))
