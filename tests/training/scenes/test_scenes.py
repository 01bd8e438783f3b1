"""The generator of drawn scenes: COCO's layout read back by pycocotools, reproducible, classes as named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from training.scenes.compose import SceneOptions, categories, draw_pairs, draw_scene
from training.scenes.generate import main, write_dataset

OPTIONS = SceneOptions(size=96, things=12, stuff=5, pattern_names=True, min_aspect=0.6, pair_size=32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scenes")
    write_dataset(out, train=6, val=4, pairs=5, seed=3, options=OPTIONS, novel=3, suffix=".png")
    return out


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_panoptic_and_instances_tell_the_same(folder: Path) -> None:
    """Segments cover every pixel once; area, box and mask follow from the PNG; instances are the panoptic things."""
    for split, count in (("train2017", 6), ("val2017", 4)):
        coco = COCO(str(folder / "annotations" / f"instances_{split}.json"))
        panoptic = json.loads((folder / "annotations" / f"panoptic_{split}.json").read_text())
        is_thing = {c["id"]: c["isthing"] for c in panoptic["categories"]}
        assert list(is_thing.values()) == [1] * 12 + [0] * 5
        assert len(panoptic["annotations"]) == len(panoptic["images"]) == count
        for image, record in zip(panoptic["images"], panoptic["annotations"], strict=True):
            rgb = np.array(Image.open(folder / "annotations" / f"panoptic_{split}" / record["file_name"])).astype(int)
            ids = rgb @ [1, 256, 65536]
            photo = np.array(Image.open(folder / split / image["file_name"]))
            assert photo.shape == (image["height"], image["width"], 3) and max(photo.shape) == 96
            assert set(np.unique(ids)) == {s["id"] for s in record["segments_info"]}
            instances = coco.loadAnns(coco.getAnnIds(image["id"]))
            things = [s for s in record["segments_info"] if is_thing[s["category_id"]]]
            assert len(things) == len(instances) and things
            for s in record["segments_info"]:
                y, x = np.nonzero(ids == s["id"])
                assert s["area"] == len(y)
                assert s["bbox"] == [x.min(), y.min(), np.ptp(x) + 1, np.ptp(y) + 1]
            for s, instance in zip(things, instances, strict=True):
                assert (coco.annToMask(instance) == (ids == s["id"])).all()
                assert (s["category_id"], s["bbox"]) == (instance["category_id"], instance["bbox"])


def test_same_files_whatever_the_workers_and_the_number(folder: Path, tmp_path: Path) -> None:
    argv = [
        "--train",
        "6",
        "--val",
        "4",
        "--pairs",
        "5",
        "--seed",
        "3",
        "--size",
        "96",
        "--things",
        "12",
        "--stuff",
        "5",
    ]
    argv += ["--pattern-names", "--min-aspect", "0.6", "--pair-size", "32", "--novel", "3", "--format", "png"]
    main(["--out", str(tmp_path / "a"), "--workers", "2", *argv])
    assert files(tmp_path / "a") == files(folder)
    write_dataset(tmp_path / "b", train=2, val=1, pairs=2, seed=3, options=OPTIONS, suffix=".png")
    few, many = files(tmp_path / "b"), files(folder)
    pictures = [name for name in few if name.endswith(".png")]
    assert len(pictures) > 8 and all(few[name] == many[name] for name in pictures)
    other_seed = draw_scene(np.random.default_rng([4, 0, 0]), OPTIONS)
    assert other_seed.image.tobytes() != draw_scene(np.random.default_rng([3, 0, 0]), OPTIONS).image.tobytes()


def test_pairs_and_split(folder: Path) -> None:
    pairs = json.loads((folder / "annotations" / "captions_pairs.json").read_text())
    names = [c.name for c in categories(OPTIONS)]
    assert len(pairs["images"]) == len(pairs["annotations"]) > 10
    for image, note in zip(pairs["images"], pairs["annotations"], strict=True):
        assert np.array(Image.open(folder / "pairs" / image["file_name"])).shape == (32, 32, 3)
        assert note["image_id"] == image["id"]
    captions = [note["caption"] for note in pairs["annotations"]]
    assert sum(any(name in caption for name in names) for caption in captions) > 0.9 * len(captions)
    split = json.loads((folder / "annotations" / "split.json").read_text())
    assert len(split["novel"]) == 3 and sorted(split["base"] + split["novel"]) == sorted(names[:12])


def test_objects_have_the_colour_of_their_name() -> None:
    """The median pixel of a solid object is nearest to the named colour, and captions name what is in the picture."""
    from training.scenes.draw import COLORS

    options = SceneOptions(things=20, pattern_names=True)
    right = total = 0
    for seed in range(30):
        for s in draw_scene(np.random.default_rng(seed), options).segments:
            if s.category.pattern == "solid":
                image = draw_scene(np.random.default_rng(seed), options).image
                median = np.median(image[s.mask], axis=0) / 255
                right += min(COLORS, key=lambda c: np.abs(median - COLORS[c]).sum()) == s.category.color
                total += 1
    assert total > 10 and right > 0.85 * total


@pytest.mark.parametrize("count", [1, 7, 20, 48, 80])
@pytest.mark.parametrize("pattern_names", [False, True])
def test_class_names_are_unique(count: int, pattern_names: bool) -> None:
    classes = categories(SceneOptions(things=count, pattern_names=pattern_names))
    assert len({c.name for c in classes}) == len(classes) == count + 8
    assert [c.id for c in classes] == list(range(1, count + 9))


def test_too_many_classes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["--out", str(tmp_path / "x"), "--things", "81", "--train", "1", "--val", "0"]) == 2
    assert capsys.readouterr().err.startswith("error: 81 thing classes")
    assert not (tmp_path / "x").exists()


def test_pairs_hold_whole_and_cut_objects() -> None:
    """Windows differ in shape, so some pictures have black borders as the crops of distillation have."""
    options, bars = SceneOptions(things=6), 0
    for seed in range(12):
        for image, caption in draw_pairs(np.random.default_rng(seed), options, categories(options)):
            assert image.shape == (64, 64, 3) and caption.endswith(".")
            bars += bool((image[0] == 0).all() or (image[:, 0] == 0).all())
    assert bars > 5


def test_folders_of_others_are_left_alone(tmp_path, capsys):
    """Whatever the generator did not make is never overwritten; its own folders may be made anew."""
    theirs = tmp_path / "coco"
    (theirs / "annotations").mkdir(parents=True)
    precious = theirs / "annotations/instances_train2017.json"
    precious.write_text('{"info": {"description": "COCO 2017 Dataset"}}')
    flags = ["--train", "1", "--val", "1", "--size", "48"]
    for folder in (theirs, precious):
        assert main(["--out", str(folder), *flags]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error:") and error.count("\n") == 1 and str(folder) in error
    assert precious.read_text().startswith('{"info"') and len(list(theirs.rglob("*"))) == 2
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / ".hidden").touch()
    for _ in range(2):
        main(["--out", str(empty), *flags])
        assert "1 training, 1 validation and 0 pair scenes" in capsys.readouterr().out
    (empty / "scenes.json").unlink()  # as former versions left it
    main(["--out", str(empty), *flags])
    assert main(["--out", str(tmp_path / "none"), "--train", "0", "--val", "0"]) == 2
    assert "nothing to draw" in capsys.readouterr().err and not (tmp_path / "none").exists()


def test_colour_separates_usual_scenes_and_not_those_of_exchanged_colours():
    """Mean colour of cells that lie in one segment: nearer within a segment than across, or not."""
    found = {}
    for exchanged in (False, True):
        options = SceneOptions(size=128, things=16, stuff=6, pattern_names=True, exchange_colors=exchanged,
                               min_object=0.28, max_object=0.5, max_objects=4)  # fmt: skip
        right = pairs = 0.0
        for seed in range(24):
            scene = draw_scene(np.random.default_rng(seed), options)
            owner = sum(s.mask * (k + 1) for k, s in enumerate(scene.segments))
            cells = scene.image.reshape(8, 16, 8, 16, 3).mean((1, 3)).reshape(64, 3)
            owners = owner.reshape(8, 16, 8, 16).swapaxes(1, 2).reshape(64, 256)
            pure = (owners == owners[:, :1]).mean(1) > 0.9
            cells, owners = cells[pure], owners[pure, 0]
            first, second = np.triu_indices(len(cells), 1)
            distance = np.linalg.norm(cells[first] - cells[second], axis=1)
            same = owners[first] == owners[second]
            within, across = distance[same], distance[~same]
            right += (within[:, None] < across[None]).sum()
            pairs += len(within) * len(across)
        found[exchanged] = right / pairs
    assert found[False] > 0.85 and 0.4 < found[True] < 0.6, found


def test_classes_of_exchanged_colours(tmp_path):
    options = SceneOptions(size=64, things=16, stuff=4, exchange_colors=True)
    classes = categories(options)
    things = [c for c in classes if c.is_thing]
    assert len({c.name for c in classes}) == 20 and [c.id for c in classes] == list(range(1, 21))
    assert all(c.name == f"{c.pattern} {c.shape}" and not c.color for c in things)
    assert len({c.pattern for c in things[:8]}) == 4 and len({c.shape for c in things[:8]}) == 8
    with pytest.raises(ValueError, match="33 thing classes: there are 1 to 32"):
        categories(SceneOptions(things=33, exchange_colors=True))
    a, b = (draw_scene(np.random.default_rng(3), options) for _ in range(2))
    assert np.array_equal(a.image, b.image) and sum(s.mask.astype(int) for s in a.segments).max() == 1
    for image, caption in draw_pairs(np.random.default_rng(0), options, classes):
        assert image.shape == (64, 64, 3) and caption
