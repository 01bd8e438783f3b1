"""Proposals and region-text pairs, detection of a free vocabulary, and what command lines name."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import ovdet
from ovdet.config import config_to_dict
from ovdet.data.annotations import load_annotations
from ovdet.files import detector_content, save
from ovdet.fvit.assemble import load_vit, make_detector, read_config
from ovdet.listing import list_images, place_pictures, read_names
from ovdet.visualize import LEGIBLE, draw_detections
from ovdet.vocabulary import make_vocabulary
from training.engine.data.keyed import write_key
from training.engine.errors import UserError
from training.scenes.generate import SceneOptions, write_dataset


def program(name: str) -> ModuleType:
    own = name in ("train", "test", "make_proposals")
    return importlib.import_module(f"ovdet.fvit.commands.{name}" if own else f"ovdet.commands.{name}")


@pytest.fixture(scope="module")
def detector_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """(scenes, config, an untrained detector with masks)."""
    folder = tmp_path_factory.mktemp("detector")
    write_dataset(folder / "data", train=3, val=3, options=SceneOptions(size=96, things=4))
    config_file = folder / "tiny.toml"
    config_file.write_text(
        """
        [model]
        name = "ViT-Ti-8-64"
        pretrained = ""
        cache_dir = ""
        blocks = [1, 2, 3]
        channels = 16
        box_convs = 1
        box_width = 32
        mask_convs = 1
        rpn_post_nms = 40
        masks = true
        [data]
        image_size = 96
        workers = 0
        embeddings = "unused.npy"
        [train]
        precision = "fp32"
        """
    )
    config = read_config(str(config_file), ['data.embeddings=""'])
    annotations = load_annotations(str(folder / "data" / "annotations" / "instances_val2017.json"), key="k")
    vocabulary = make_vocabulary(config, annotations)
    vit = load_vit(config)
    np.save(folder / "e.npy", np.random.default_rng(0).normal(size=(5, 128)))
    config.data.embeddings = str(folder / "e.npy")
    detector = make_detector(config, vit, vocabulary, device=torch.device("cpu"))
    content = detector_content(
        detector, vit=vit.identity, config=config_to_dict(config), names=vocabulary.names, novel=vocabulary.novel
    )
    save(content, folder / "detector.pt")
    return folder / "data", config_file, folder / "detector.pt"


def test_make_proposals(detector_file: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))  # of the cache of embeddings
    data, config, checkpoint = detector_file
    nouns = tmp_path / "nouns.txt"
    nouns.write_text("red circle\nblue square\n\nsky\nred circle\n")
    source = data / "annotations" / "instances_val2017.json"
    tool = program("make_proposals")
    tool.main(
        [str(config), str(checkpoint), "--images", str(source), "--image-root", str(data / "val2017"), "--out",
         str(tmp_path), "--name", "mine", "--most", "15", "--nouns", str(nouns), "--pairs", "5", "--device", "cpu"]
    )  # fmt: skip
    proposals = load_annotations(str(tmp_path / "mine_proposals.json"), key="k")
    original = load_annotations(str(source), key="k")
    assert proposals.image_ids.tolist() == original.image_ids.tolist() and not proposals.skipped
    assert list(proposals.file_names) == list(original.file_names) and np.diff(proposals.offsets).max() <= 15
    width = original.sizes[:, 0].max()
    assert proposals.boxes.min() >= 0 and proposals.boxes[:, 0::2].max() <= width + 0.02
    assert len(np.unique(proposals.boxes, axis=0)) > 10

    pairs = json.loads((tmp_path / "mine_pseudo_3.json").read_text())
    embeddings = np.load(tmp_path / "mine_pseudo_3_embeddings.npy")
    assert [c["name"] for c in pairs["categories"]] == ["red circle", "blue square", "sky"]
    assert embeddings.shape == (3, 128) and np.allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-5)
    for image in pairs["images"]:
        scores = [a["score"] for a in pairs["annotations"] if a["image_id"] == image["id"]]
        assert len(scores) <= 5 and scores == sorted(scores, reverse=True)

    # The same from a folder; the nouns of some boxes by hand.
    tool.main(
        [str(config), str(checkpoint), "--images", str(data / "val2017"), "--out", str(tmp_path / "folder"),
         "--most", "15", "--device", "cpu"]
    )  # fmt: skip
    again = load_annotations(str(tmp_path / "folder" / "coco_proposals.json"), key="k")
    assert np.array_equal(again.boxes, proposals.boxes)
    # What is there may be the published file: it is refused before any work, and replaced when one says so.
    args = SimpleNamespace(out=tmp_path / "folder", name="coco", force=False)
    before = (tmp_path / "folder" / "coco_proposals.json").stat().st_mtime_ns
    with pytest.raises(UserError, match="coco_proposals.json exists: choose another --name or --out, or add --force"):
        tool.main([str(config), "nowhere.pt", "--images", "nowhere", "--out", str(args.out), "--device", "cpu"])
    assert (tmp_path / "folder" / "coco_proposals.json").stat().st_mtime_ns == before
    args.force = True
    assert tool.targets_of(args, []) == [tmp_path / "folder" / "coco_proposals.json"]
    with pytest.raises(UserError, match="mine_pseudo_3_embeddings.npy exists"):
        for name in ("mine_proposals.json", "mine_pseudo_3.json"):
            (tmp_path / name).unlink()
        tool.targets_of(SimpleNamespace(out=tmp_path, name="mine", force=False), ["a", "b", "c"])
    with pytest.raises(UserError, match="no image below this folder"):
        tool.list_images(tmp_path / "folder", "")
    with pytest.raises(UserError, match="empty"):
        (tmp_path / "empty.txt").touch()
        tool.read_nouns(tmp_path / "empty.txt")


def test_flags_and_images_of_make_proposals(tmp_path: Path):
    tool = program("make_proposals")
    command = ["config.toml", "detector.pt", "--images", str(tmp_path), "--out", str(tmp_path)]
    for flags in (["--most", "0"], ["--most", "-1"], ["--score", "2"], ["--score", "nan"], ["--crop-scale", "0"],
                  ["--crop-scale", "-1"], ["--cosine", "5"], ["--pairs", "-1"]):  # fmt: skip
        with pytest.raises(UserError, match=f"argument {flags[0]}: {flags[1]} is out of range"):
            tool.main([*command, *flags])
    for flags, message in ((["--name", ""], '--name ""'), (["--pairs", "3", "--clip", "x"], "--pairs, --clip without")):
        with pytest.raises(UserError, match=message):
            tool.main([*command, *flags])
    file = tmp_path / "images.json"
    for more in ({}, {"annotations": [{"image_id": 9, "category_id": 9, "bbox": [0, 0, 1, 1]}], "categories": []}):
        file.write_text(json.dumps({"images": [{"id": 5, "file_name": "x.jpg"}], **more}))
        (tmp_path / "x.jpg").unlink(missing_ok=True)
        with pytest.raises(UserError, match="--image-root .*images.json are not there, e.g. .*x.jpg"):
            tool.list_images(file, str(tmp_path))
        (tmp_path / "x.jpg").touch()
        assert tool.list_images(file, str(tmp_path)) == ([5], ["x.jpg"], str(tmp_path))


def test_nouns_of_boxes():
    """Each box gets the noun nearest to CLIP's embedding of its crop."""
    tool = program("make_proposals")
    grown = tool.enlarge(np.array([[10.0, 20, 30, 60], [0, 0, 10, 10]]), 1.5, 64, 64)
    assert grown.tolist() == [[5, 10, 35, 64], [0, 0, 12.5, 12.5]]
    image = {"boxes": np.arange(12).reshape(3, 4), "nouns": np.array([4, 5, 6]), "cosine": np.array([0.1, 0.9, 0.5])}
    best = tool.best_pairs(image, 2, 0.2)
    assert best["nouns"].tolist() == [5, 6] and best["scores"].tolist() == [0.9, 0.5]
    assert tool.best_pairs(image, 20, 0.95)["boxes"].shape == (0, 4)


def test_detect_free_vocabulary(
    detector_file: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    data, _, checkpoint = detector_file
    tool = program("detect")
    images = sorted((data / "val2017").iterdir())
    (tmp_path / "folder" / "a").mkdir(parents=True)
    for place in ("one.jpg", "a/one.jpg"):
        (tmp_path / "folder" / place).write_bytes(images[0].read_bytes())
    tool.main(
        [str(images[0]), str(images[1]), str(tmp_path / "folder"), str(tmp_path / "none.jpg"), "--checkpoint",
         str(checkpoint), "--classes", "red circle, sky", "--score", "0.0", "--out", str(tmp_path / "out"), "--device",
         "cpu", "--set", "test.per_image=5", "--json", str(tmp_path / "found.json"), "--batch-size", "3", "--workers",
         "2"]
    )  # fmt: skip
    printed = capsys.readouterr().out
    assert printed.count("->") == 4 and ("red circle" in printed or "sky" in printed)
    drawn = np.asarray(Image.open(tmp_path / "out" / f"{images[0].stem}.png"))
    plain = np.asarray(Image.open(images[0]).convert("RGB"))
    assert drawn.shape == tuple(n * -(-LEGIBLE // 96) for n in plain.shape[:2]) + (3,)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["classes"] == ["red circle", "sky"] and len(found["images"]) == 4
    first = found["images"][0]
    assert first["file"] == str(images[0]) and (first["height"], first["width"]) == plain.shape[:2]
    assert 0 < len(first["detections"]) <= 5 and set(first["detections"][0]) == {"class", "score", "box", "mask"}
    # Two files of one name leave two pictures.
    assert len(list((tmp_path / "out").rglob("one.png"))) == 2
    faulty = ["--checkpoint", str(checkpoint), "--classes", "sky", "--out", str(tmp_path / "out2")]
    with pytest.raises(UserError, match="--score 5"):
        tool.main([str(images[0]), *faulty, "--score", "5"])
    with pytest.raises(UserError, match="none of the images could be read"):
        tool.main([str(tmp_path / "none.jpg"), *faulty, "--device", "cpu"])
    # What cannot be written is found out before the detector is read.
    (tmp_path / "file").touch()
    for flags, message in [
        (["--out", str(tmp_path / "file")], "--out .*file is a file"), (["--json", str(tmp_path)], "--json .*a folder"),
        (["--json", str(tmp_path / "file" / "x.json")], "is a file"), (["--json", str(images[0])], "would replace"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=message):
            tool.main([str(images[0]), *faulty, "--checkpoint", str(tmp_path / "absent.pt"), *flags])


def test_library_call(detector_file: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    data, _, checkpoint = detector_file
    images = sorted((data / "val2017").iterdir())[:3]
    overrides = ["test.score=0.0", "test.per_image=7"]
    detector = ovdet.load_detector(checkpoint, device="cpu", overrides=overrides)
    found = detector(images, ["red circle", "sky"])
    assert [len(f["boxes"]) for f in found] == [7] * 3 and found[0]["size"] == (96, 96)
    assert all(f["names"] == [["red circle", "sky"][i] for i in f["labels"]] for f in found)
    assert (np.diff(found[0]["scores"]) <= 0).all() and found[0]["boxes"].max() <= 96
    picture = Image.open(images[0])
    array = np.asarray(picture.convert("RGB"))
    for one in (picture, array, torch.from_numpy(array.copy()).permute(2, 0, 1)):
        again = detector(one, ["red circle", "sky"])[0]
        assert np.abs(again["boxes"] - found[0]["boxes"]).max() < 2 and again["names"] == found[0]["names"]
    batched = detector(iter(images), ["red circle", "sky"], batch_size=2)
    assert all(np.allclose(a["boxes"], b["boxes"], atol=1e-2) for a, b in zip(found, batched, strict=True))
    assert set(detector(images[:1], ["grass"])[0]["names"]) == {"grass"} and detector.classes == ("grass",)
    for bad, message in ((([], "give at least one")), (["a", "a"], "none twice")):
        with pytest.raises(ValueError, match=message):
            detector(images[:1], bad)
    with pytest.raises(ValueError, match="uint8 RGB"):
        detector(np.zeros((4, 4)), ["grass"])


def test_results_of_another_test_are_kept(detector_file: tuple, tmp_path: Path, capsys: pytest.CaptureFixture):
    """By default each config has a folder of its own; in any folder another test's results are not replaced."""
    data, config, checkpoint = detector_file
    (tmp_path / "d.pt").write_bytes(checkpoint.read_bytes())
    (tmp_path / "other.toml").write_text(f'inherit = "{config}"\n[test]\nscore = 0.5\n')
    embeddings = f"data.embeddings={checkpoint.parent / 'e.npy'}"
    values = [f"data.val_annotations={data}/annotations/instances_val2017.json", f"data.val_images={data}/val2017"]
    test = program("test")

    def run(name: Path, *more: str) -> None:
        test.main([str(name), str(tmp_path / "d.pt"), "--device", "cpu", "--eval", "bbox", *values, embeddings, *more])

    run(config)
    run(tmp_path / "other.toml")
    own, other = tmp_path / "d_tiny_test", tmp_path / "d_other_test"
    tested = {folder: json.loads((folder / "metrics.json").read_text()) for folder in (own, other)}
    for folder, name in ((own, "tiny.toml"), (other, "other.toml")):
        annotations = f"{data}/annotations/instances_val2017.json"
        about = {"config": name, "checkpoint": str(tmp_path / "d.pt"), "annotations": annotations}
        assert tested[folder]["run"] == about and tested[folder]["bbox"].keys() > {"AP", "AP50"}
    before = (own / "results.bbox.json").read_bytes()
    for more, message in (
        (["test.score=0.2"], r"other test.score \(test.score: 0.01, now 0.2\); give another folder"),
        (["--out", str(other)], r"other test.score \(test.score: 0.5, now 0.01\)"),
    ):
        with pytest.raises(UserError, match=message) as error:
            run(config, *more)
        assert "\n" not in str(error.value)
    # Another file under the same name is another test, the same one elsewhere is not; nor is how it is computed.
    embedding = np.load(checkpoint.parent / "e.npy")
    for name, table in (("same", embedding), ("others", embedding[::-1])):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "e.npy", table)
    embeddings = f"data.embeddings={tmp_path / 'others' / 'e.npy'}"
    with pytest.raises(UserError, match=r"other data.embeddings \(data.embeddings: e.npy \("):
        run(config)
    assert (own / "results.bbox.json").read_bytes() == before
    embeddings, written = f"data.embeddings={tmp_path / 'same' / 'e.npy'}", (own / "metrics.json").stat().st_mtime_ns
    run(config, "test.batch_size=2", "train.lr=1")
    assert (own / "metrics.json").stat().st_mtime_ns > written and "AP50" in capsys.readouterr().out
    # Results that nobody can tell whose they are; and a folder with something else in it.
    (own / "key.json").unlink()
    with pytest.raises(UserError, match="results of another run .there is no key.json"):
        run(config)
    run(config, "--out", str(tmp_path / "same"))
    # A key alone is of a test that was interrupted; among other files it is somebody's who needs it.
    write_key(tmp_path / "cut", {"weights": "others"})
    run(config, "--out", str(tmp_path / "cut"))
    write_key(tmp_path / "store", {"teacher": "x"})
    (tmp_path / "store" / "shard-00000.npy").touch()
    with pytest.raises(UserError, match="store was made with other .*teacher"):
        run(config, "--out", str(tmp_path / "store"))


def test_detecting_needs_no_package_that_computes_ap(detector_file: tuple):
    data, config, checkpoint = detector_file
    image = sorted((data / "val2017").iterdir())[0]
    code = f"""
import sys
sys.modules["faster_coco_eval"] = None
import ovdet
from ovdet.fvit.commands import test
import ovdet.glip.assemble, ovdet.vild.assemble
detector = ovdet.load_detector({str(checkpoint)!r}, device="cpu", overrides=["test.score=0.0"])
print(len(detector({str(image)!r}, ["sky"])))
sys.argv = ["test.py", {str(config)!r}, "nowhere.pt"]
sys.exit(test.run())
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 2 and done.stdout == "1\n" and len(errors) == 1, done.stderr[-2000:]
    assert "pip install 'open_clip_torch[fvit]'" in errors[0]


def test_names_and_files_of_command_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    assert read_names("cat, dog ,red car") == ["cat", "dog", "red car"] and read_names("cat") == ["cat"]
    many = [f"class number {i}" for i in range(400)]  # longer than a file's name may be
    assert read_names(",".join(many)) == many
    (tmp_path / "names.txt").write_bytes("\ufeffcafé\n\nbus \U0001f68c\n".encode())
    assert read_names(str(tmp_path / "names.txt")) == ["café", "bus \U0001f68c"]
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    for text, message in [
        ("cat, dog,cat", '"cat" is named twice'), (" , ", "give names"), (str(tmp_path / "latin.txt"), "UTF-8"),
        ("namse.txt", "no such file"), ("lists/names", "no such file"), (str(tmp_path / "x.TXT"), "no such file"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=message) as error:
            read_names(text)
        assert "\n" not in str(error.value)
    assert read_names("bow/tie,cat,St. Bernard") == ["bow/tie", "cat", "St. Bernard"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plain").touch()
    for name in ("names.txt", "im/y.jpg", "namse.toml", "lists/animals.v2", "plain"):
        with pytest.raises(UserError, match=f'"{name}" among the names is a file'):
            read_names(f"cat, {name}")
    with pytest.raises(UserError, match="no such file"):
        read_names("namse.toml")

    for name in ("b/x.png", "a/x.png", "a/y.JPG", "a/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    files = list_images([str(tmp_path / "a"), str(tmp_path / "b" / "x.png"), str(tmp_path / "a" / "x.png")])
    assert [Path(f).relative_to(tmp_path).as_posix() for f in files] == ["a/x.png", "a/y.JPG", "b/x.png"]
    out = tmp_path / "out"
    assert place_pictures(files, out) == [out / "a" / "x.png", out / "y.png", out / "b" / "x.png"]
    assert place_pictures(["q/x.jpg", "q/x.png"], out) == [out / "x.png", out / "x.png.png"]
    assert len(set(place_pictures(["d/a.png.png", "d/a.jpg", "d/a.png"], out))) == 3
    assert list_images(["a/x.png", "./a/x.png", str(tmp_path / "a" / "x.png"), "b/x.png"]) == ["a/x.png", "b/x.png"]
    # A second run in a folder leaves out what the first one drew; asked for by name, pictures are images.
    (out / "a").mkdir(parents=True)
    (out / "a" / "x.png").touch()
    assert list_images(["."], output=Path("out")) == ["a/x.png", "a/y.JPG", "b/x.png"]
    assert "1 pictures in the output folder out are left out" in caplog.text
    assert list_images(["out"], output=Path("out")) == ["out/a/x.png"]
    with pytest.raises(UserError, match="would replace one of the images"):
        place_pictures([files[0]], tmp_path / "a")
    (tmp_path / "c").mkdir()
    with pytest.raises(UserError, match="holds no image"):
        list_images([str(tmp_path / "c")])


@pytest.mark.parametrize("script", ["dist_train.sh", "dist_test.sh", "scripts/demo.sh"])
def test_scripts_tell_their_usage(script: str):
    file = Path(__file__).parents[2] / "F-ViT" / script
    done = subprocess.run(["bash", str(file), "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and f"{file.name} " in done.stdout and not done.stderr


def test_drawing():
    image = torch.zeros(3, 480, 640, dtype=torch.uint8)
    boxes = torch.tensor([[80.0, 160, 400, 400], [560, 40, 560.2, 40.1]])
    masks = torch.zeros(2, 480, 640, dtype=torch.bool)
    masks[0, 240:320, 160:320] = True
    drawn = draw_detections(image, boxes, [0, 1], [0.9, 0.4], ["a", "b"], masks)
    assert drawn.shape == image.shape and drawn[:, 400, 240].any() and drawn[:, 280, 240].any()
    assert not drawn[:, 360, 240].any()
    assert torch.equal(draw_detections(image, boxes[:0], [], [], ["a"]), image)
    # What is sure lies on what is not, in whichever order it is given.
    same = torch.tensor([[100.0, 100, 300, 300]] * 2)
    one, other = (draw_detections(image, same, labels, scores, ["a", "b"]) for labels, scores in
                  (([0, 1], [0.9, 0.2]), ([1, 0], [0.2, 0.9])))  # fmt: skip
    assert torch.equal(one, other)
    # Small images are enlarged, with what is on them.
    small = draw_detections(image[:, :60, :80], boxes[:1] / 8, [0], [0.9], ["a"], masks[:1, ::8, ::8])
    assert small.shape == (3, 360, 480) and small[:, 210, 180].any()
