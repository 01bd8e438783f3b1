"""Mistakes of users, over all programs: each ends with one line and exit status 2, and nothing is written."""

from __future__ import annotations

import importlib
import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

import open_clip
from open_clip.weight_files import save_weights
from open_clip.weights import export_state_dict
from training.engine.errors import run_program
from training.scenes.compose import SceneOptions
from training.scenes.generate import write_dataset

ROOT = Path(__file__).parents[1]
TINY = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 4, "width": 48, "head_width": 12, "patch_size": 8, "mlp_ratio": 2.6667,
                   "eva_model_name": "tiny", "rope": True, "naiveswiglu": True, "subln": True},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 24, "heads": 2, "layers": 1},
}  # fmt: skip
DETECTOR = """
[model]
name = "tiny.json"
pretrained = "start.pt"
blocks = [0, 1, 2]
[data]
train_annotations = "scenes/annotations/instances_train2017.json"
train_images = "scenes/train2017"
val_annotations = "scenes/annotations/instances_val2017.json"
val_images = "scenes/val2017"
image_size = 64
workers = 0
"""


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> Path:
    """A folder with what a user may have: data, weights, names, and things that are none of these."""
    folder = tmp_path_factory.mktemp("material")
    options = SceneOptions(size=48, things=4, stuff=2)
    write_dataset(folder / "scenes", train=4, val=2, pairs=0, options=options)
    (folder / "tiny.json").write_text(json.dumps(TINY))
    open_clip.add_model_config(folder / "tiny.json", "tiny-mistakes")
    torch.manual_seed(0)
    model = open_clip.create_model("tiny-mistakes", pretrained=None)
    save_weights(export_state_dict(model), folder / "start.pt", "tiny")
    (folder / "lfs.pt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n")
    (folder / "page.pt").write_text("<!DOCTYPE html><html><body>Please log in</body></html>")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    (folder / "photos").mkdir()
    for name in ("a", "b"):
        Image.fromarray(pixels).save(folder / "photos" / f"{name}.jpg")
    Image.fromarray(pixels).save(folder / "photo.jpg")
    shutil.copy(folder / "photo.jpg", folder / "photo.pt")
    (folder / "empty").mkdir()
    (folder / "names.txt").write_text("cat\ndog\n")
    (folder / "empty.txt").write_text("\n\n")
    (folder / "latin.txt").write_bytes("caf\u00e9\n".encode("latin-1"))
    (folder / "list.json").write_text('{"a": 1}')
    images = [{"id": 1, "file_name": "000000000001.jpg"}]
    (folder / "no_boxes.json").write_text(json.dumps({"images": images, "annotations": [], "categories": []}))
    (folder / "twice.json").write_text('{"base": ["cat"], "novel": ["cat"]}')
    np.save(folder / "narrow.npy", np.ones((6, 5), np.float32))
    (folder / "coco").mkdir()
    (folder / "coco" / "precious.json").write_text("{}")
    (folder / "detector.toml").write_text(DETECTOR)
    (folder / "logs" / "old").mkdir(parents=True)
    return folder


def _main(program: str, as_module: Callable[[str], ModuleType]) -> Callable[[list[str]], int]:
    """The main function of a program; one that only raises is run as its command runs it."""
    kind, _, name = program.partition(":")
    if kind == "tools":
        main = as_module(f"tools/{name}.py").main
        return main if name != "convert_detector" else lambda argv: run_program(lambda: main(argv))
    if kind == "F-ViT":
        package = "ovdet.fvit.commands" if importlib.util.find_spec(f"ovdet.fvit.commands.{name}") else "ovdet.commands"
        module = importlib.import_module(f"{package}.{name}")
        return lambda argv: run_program(lambda: module.main(argv))
    return importlib.import_module(program).main


TRAIN = (
    "--model tiny.json --pretrained start.pt --train-data scenes/annotations/instances_train2017.json "
    "--train-image-root scenes/train2017 --det-image-size 64 --workers 0 --device cpu --name run --batch-size 2 "
    "--warmup 1"
)
VAL = (
    "--model tiny.json --pretrained start.pt --val-data scenes/annotations/panoptic_val2017.json "
    "--val-image-root scenes/val2017 --det-image-size 64 --workers 0 --device cpu --name run"
)
SEG = "--model tiny.json --pretrained start.pt --device cpu --workers 0"
SHOW = "photo.jpg --model tiny.json --pretrained start.pt --device cpu"
M, E, P, S = "training.main", "ovseg.evaluate", "ovseg.pseudo_labels", "tools:show"

MISTAKES = [
    # training.main: values and names
    (M, f"{TRAIN} --batchsize 4", "unrecognized arguments: --batchsize"),
    (M, f"{TRAIN} --epochs two", "invalid whole number value: 'two'"),
    (M, f"{TRAIN} --lr nan", "--lr: nan is out of range"),
    (M, f"{TRAIN} --alpha 1.5", "--alpha: 1.5 is out of range"),
    (M, f"{TRAIN} --precision fp8", "invalid choice: 'fp8'"),
    (M, f"{TRAIN} --model EVA02-CLIP-B16", "did you mean EVA02-CLIP-B-16"),
    (M, f"{TRAIN} --method clipselv", "clipself"),
    (M, f"{TRAIN} --recipe clipself-b61", "clipself-b16"),
    (M, f"{TRAIN} --dataset-type proposals", "proposals_distill"),
    (M, f"{TRAIN} --readout vaule", "value"),
    # training.main: weights
    (M, f"{TRAIN} --pretrained nowhere.pt", "nowhere.pt"),
    (M, f"{TRAIN} --pretrained photo.pt", "a JPEG picture"),
    (M, f"{TRAIN} --pretrained lfs.pt", "git lfs pull"),
    (M, f"{TRAIN} --pretrained page.pt", "page"),
    (M, f"{TRAIN} --pretrained narrow.npy", "a numpy array"),
    (M, f"{TRAIN} --model ViT-Ti-8-64 --pretrained start.pt", "start.pt"),
    (M, f"{TRAIN} --pretrained eva", "checkpoint file in cache_dir"),
    # training.main: data
    (M, f"{TRAIN} --train-data nowhere.json", "nowhere.json"),
    (M, f"{TRAIN} --train-data names.txt", "names.txt"),
    (M, f"{TRAIN} --train-data empty", "no image below this folder"),
    (M, f"{TRAIN} --train-image-root nowhere", "nowhere"),
    (M, f"{TRAIN} --train-image-root scenes/annotations", "scenes/annotations"),
    (M, f"{TRAIN} --train-image-root memory://nothing-here", "memory://nothing-here"),
    (M, f"{TRAIN} --train-image-root nosuchprotocol://bucket", "nosuchprotocol"),
    (M, f"{TRAIN} --train-data no_boxes.json --dataset-type proposals_distill", "no_boxes.json"),
    (M, f"{TRAIN} --dataset-type contrastive", "caption"),
    (M, f"{TRAIN} --train-ratio 0", "--train-ratio: 0 is out of range"),
    (M, f"{VAL} --val-data scenes/annotations/instances_val2017.json", "instances_val2017.json"),
    (M, f"{VAL} --val-image-root nowhere", "nowhere"),
    (M, f"{VAL} --embed-path narrow.npy", "shape (6, 5)"),
    (M, f"{VAL} --embed-path names.txt", "names.txt"),
    # training.main: what does not go together
    (M, f"{TRAIN} --det-image-size 100", "use 96"),
    (M, f"{TRAIN} --downsample-factor 16", "patches of 8"),
    (M, f"{TRAIN} --lock-image", "nothing trains"),
    (M, f"{TRAIN} --lock-image-unlocked-groups 2", "--lock-image only"),
    (M, f"{TRAIN} --min-size 50 --max-size 40", "--min-size 50"),
    (M, f"{TRAIN} --cache-teacher cache", "--fixed-regions"),
    (M, f"{TRAIN} --accum-freq 1000", "--accum-freq 1000"),
    (M, f"{VAL} --dry-run", "--train-data"),
    # training.main: the run
    (M, f"{TRAIN} --name ../../evil", "leads out of logs"),
    (M, f"{TRAIN} --name old", "exists"),
    (M, f"{TRAIN} --name odl --resume latest", 'did you mean "old"'),
    (M, f"{TRAIN} --resume start.pt", "released weights"),
    # training.scenes
    ("training.scenes.generate", "--out coco --train 1 --val 1", "precious.json"),
    ("training.scenes.generate", "--out new --train -1", "-1 training"),
    ("training.scenes.generate", "--out new --train 1 --val 1 --size 0", "size"),
    ("training.scenes.generate", "--out new --train 1 --val 1 --min-object 0.9 --max-object 0.1", "object"),
    ("training.scenes.generate", "--train 1", "--out"),
    # ovseg
    (E, f"{SEG} --dataset voc --data-root scenes", "invalid choice: 'voc'"),
    (E, f"{SEG} --dataset voc20 --data-root nowhere", "nowhere"),
    (E, f"{SEG} --dataset panoptic --data-root scenes --readouts nope --short-side 64", "nope"),
    (E, f"{SEG} --dataset panoptic --data-root scenes --max-images 0", "--max-images"),
    (E, f"{SEG} --dataset panoptic --data-root scenes --max-skipped 7", "--max-skipped"),
    (E, "--dataset panoptic --data-root scenes", "--model"),
    (P, f"{SEG} --out labels --classes cat,dog", "--images"),
    (P, f"{SEG} --out labels --images nowhere --classes cat,dog", "nowhere"),
    (P, f"{SEG} --out labels --images empty --classes cat,dog", "empty"),
    (P, f"{SEG} --out labels --images photos --classes-from latin.txt", "latin.txt"),
    (P, f"{SEG} --out labels --images photos --classes cat,dog,cat", '"cat"'),
    (P, f"{SEG} --out names.txt --images photos --classes cat,dog --short-side 32", "names.txt"),
    ("ovseg.maskclip_plus.__main__", f"{SEG} --images photos --classes cat,dog --name ../evil --crop 32", "evil"),
    # tools
    (S, f"{SHOW} --query 500,3", "outside a photograph of 60 x 40"),
    (S, f"{SHOW} --classes-from nowhere.txt", "nowhere.txt"),
    (S, f"names.txt {SHOW}", "names.txt"),
    (S, f"photos {SHOW} --out one.png", "name a folder"),
    (S, f"{SHOW} --opacity 3", "--opacity"),
    ("tools:generate_text_embeddings", "--model tiny.json --classes-from dog,cat --out e.npy", "--classes"),
    ("tools:generate_text_embeddings", "--model tiny.json --classes dog --out e.csv", ".npy"),
    ("tools:generate_text_embeddings", "--model tiny.json --classes-from empty.txt --out e.npy", "no class names"),
    ("tools:generate_text_embeddings", "--model tiny.json --classes-from list.json --out e.npy", "list.json"),
    ("tools:generate_text_embeddings", "--model tiny.json --out e.npy", "--classes"),
    ("tools:convert_weights", "start.pt photo.jpg --model tiny.json", "photo.jpg exists"),
    ("tools:convert_weights", "photo.pt new.pt --model tiny.json", "a JPEG picture"),
    ("tools:convert_weights", "start.pt new.pt --model tiny.json --layout openai", '"openai" layout'),
    ("tools:ensemble_weights", "start.pt start.pt new.pt --model tiny.json --alpha 0.5", "given twice"),
    ("tools:ensemble_weights", "start.pt nowhere.pt new.pt --model tiny.json --alpha 0.5", "nowhere.pt"),
    ("tools:ensemble_weights", "start.pt photo.pt new.pt --model tiny.json --alpha 7", "--alpha: 7"),
    ("tools:quickstart_report", "--start a --distilled b --data scenes --out new.png", "b"),
    ("tools:convert_detector", "detector.toml nowhere.pth photo.jpg", "photo.jpg exists"),
    ("tools:page", "--model tiny.json --device cpu", "--pretrained"),
    # F-ViT
    ("F-ViT:train", "nowhere.toml --work-dir run --device cpu", "nowhere.toml"),
    ("F-ViT:train", "detector.toml --work-dir run --device cpu train.batchsize=2", "batch_size"),
    ("F-ViT:train", "detector.toml --work-dir run --device cpu train.batch_size", "train.batch_size"),
    ("F-ViT:train", "detector.toml --work-dir run --device cpu train.batch_size=many", "many"),
    ("F-ViT:train", "detector.toml --work-dir run --device cpu data.train_annotations=x.json", "x.json"),
    ("F-ViT:train", "detector.toml --work-dir run --device cpu data.val_images=nowhere", "nowhere"),
    ("F-ViT:train", "detector.toml --work-dir run --device cpu data.novel=['unicorn']", "unicorn"),
    ("F-ViT:train", "detector.toml", "--work-dir"),
    ("F-ViT:test", "start.pt detector.toml --device cpu", "CONFIG"),
    ("F-ViT:test", "detector.toml nowhere.pt --device cpu", "nowhere.pt"),
    ("F-ViT:test", "detector.toml start.pt --eval boxes --device cpu", "bbox or segm"),
    ("F-ViT:detect", "photo.jpg --checkpoint start.pt --classes cat", "no detector"),
    ("F-ViT:detect", "photo.jpg --checkpoint nowhere.pt --classes cat", "nowhere.pt"),
    ("F-ViT:detect", "photo.jpg --checkpoint start.pt --classes nmaes.txt", "no such file"),
    ("F-ViT:detect", "photo.jpg --checkpoint start.pt --classes latin.txt", "UTF-8"),
    ("F-ViT:detect", "photo.jpg --checkpoint start.pt --classes cat dog cat", "twice"),
    ("F-ViT:detect", "photo.jpg --checkpoint start.pt", "--classes"),
    ("F-ViT:detect", "photo.jpg --checkpoint start.pt --classes cat --score 5", "--score 5"),
    ("F-ViT:detect", "empty --checkpoint start.pt --classes cat", "holds no image"),
    ("F-ViT:make_proposals", "detector.toml start.pt --images photos --out out --nouns nowhere.txt", "nowhere.txt"),
    ("F-ViT:make_proposals", "detector.toml start.pt --images nowhere --out out", "nowhere"),
    ("F-ViT:prepare_open_vocabulary", "coco", "--train FILE"),
    ("F-ViT:prepare_open_vocabulary", "coco --train no_boxes.json --split twice.json", "listed twice"),
    ("F-ViT:prepare_open_vocabulary", "lvis --train no_boxes.json", "no_boxes.json"),
    ("F-ViT:prepare_open_vocabulary", "voc --root nowhere --out voc.json", "nowhere"),
]  # fmt: skip


def _files(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()} | {
        str(p): (0, 0) for p in folder.rglob("*") if p.is_dir()
    }


def test_there_are_sixty():
    assert len(MISTAKES) >= 60 and len(set(MISTAKES)) == len(MISTAKES)


@pytest.mark.parametrize(("program", "command", "message"), MISTAKES, ids=[f"{p} {c}"[:100] for p, c, _ in MISTAKES])
def test_one_line_and_nothing_written(material, tmp_path, monkeypatch, capsys, as_module, program, command, message):
    monkeypatch.chdir(material)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    main, before = _main(program, as_module), _files(material)
    assert main(command.split()) == 2
    # The progress of what came before the mistake (names of classes, an image) may stand above the line.
    error = capsys.readouterr().err.rstrip("\n").replace("\r", "\n").split("\n")
    lines = [line for line in error if line.startswith("error: ")]
    assert len(lines) == 1 and error[-1] == lines[0], error
    assert message in lines[0] and "Traceback" not in "".join(error) and "Errno" not in lines[0], lines[0]
    assert len(error) == 1, error
    assert _files(material) == before
