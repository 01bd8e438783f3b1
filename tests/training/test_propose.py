"""Proposals of a foundation model: planted regions are found, and the program's file is what training reads."""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from training import propose
from training.engine.data.annotations import load_annotations
from training.engine.data.images import read_image
from training.engine.errors import UserError

TRUNK = "test_vit.r160_in1k"  # of timm: 0.4 million weights
FLAGS = ["--vfm", TRUNK, "--vfm-weights", "random", "--cells", "4", "--workers", "0", "--device", "cpu"]


def planted(height: int, width: int, *regions: tuple[int, int, int, int]) -> np.ndarray:
    """A map of unit vectors with a little noise: background, and each region (x1, y1, x2, y2) another direction."""
    cells = np.zeros((height, width, 1 + len(regions)))
    cells[..., 0] = 1
    for i, (x1, y1, x2, y2) in enumerate(regions, 1):
        cells[y1:y2, x1:x2] = np.eye(cells.shape[-1])[i]
    return cells + np.random.default_rng(0).normal(0, 0.02, cells.shape)


def test_planted_regions_come_first():
    regions = [(2, 1, 5, 4), (8, 6, 12, 10), (0, 7, 3, 9)]  # the last one touches the left side
    cells = planted(10, 12, *regions) * np.linspace(0.5, 9, 12)[:, None]  # lengths play no part
    wanted = {tuple(np.array(r) / [12, 10, 12, 10]) for r in regions}
    found = {}
    for sides in (0, 1, 2):
        boxes, scores = propose.propose(cells, most=3, smallest=0.02, iou=0.7, sides=sides)
        assert len(boxes) == 3 and (np.diff(scores) <= 0).all() and scores[0] <= 1
        found[sides] = {tuple(b) for b in boxes.tolist()}
    boxes, scores = propose.propose(cells, most=9, smallest=0.02, iou=0.7, sides=2, least=0.5)
    assert 1 <= len(boxes) < 9 and scores.min() >= 0.5 and {tuple(b) for b in boxes.tolist()} <= wanted
    near = [(2 / 12, 0.1, 5 / 12, 0.4)]
    assert set(near) <= found[0] and len(wanted & found[1]) == 2 and wanted == found[2]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 2**31))
def test_the_tree_of_a_map(height, width, seed):
    cells = np.random.default_rng(seed).normal(size=(height, width, 3))
    boxes, areas, heights = propose.merge_tree(cells)
    number = height * width
    assert boxes.shape == (2 * number - 1, 4) and boxes[-1].tolist() == [0, 0, 1, 1] and areas[-1] == pytest.approx(1)
    covered = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    assert (areas <= covered + 1e-9).all() and np.allclose(areas[:number], 1 / number)
    assert ((heights >= 0) & (heights <= 1)).all() and heights[-1] == 1
    found, scores = propose.propose(cells, most=4, smallest=0.05, iou=0.5, sides=4)
    assert len(found) == len(scores) <= 4 and (found[:, :2] < found[:, 2:]).all()


@pytest.fixture
def photos(tmp_path):
    """Five images of two sizes, one of them unreadable, and a json with ids of its own."""
    folder = tmp_path / "images"
    (folder / "below").mkdir(parents=True)
    names = ["below/a.png", "b.jpg", "c.jpg", "d.jpg", "e.jpg"]
    for i, name in enumerate(names):
        pixels = np.random.default_rng(i).integers(0, 256, (40 + 8 * (i % 2), 56, 3), dtype=np.uint8)
        pixels[5:25, 10:40] = [250, 40 * i, 10]
        Image.fromarray(pixels).save(folder / name)
    (folder / "d.jpg").write_bytes(b"no image")
    images = [{"id": 70 + i, "file_name": name} for i, name in enumerate(names)]
    file = tmp_path / "list.json"
    file.write_text(json.dumps({"images": images, "annotations": [{"of": "no use"}]}))
    return folder, file


def one_of_two(rank: int, port: int, arguments: list[str]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
    propose.main(arguments)


def weights_file(tmp_path: Path) -> str:
    """Weights that both processes share: random ones differ."""
    import timm
    from safetensors.torch import save_file

    file = tmp_path / "trunk.safetensors"
    save_file(timm.create_model(TRUNK, num_classes=0).state_dict(), file)
    return str(file)


def test_the_file_and_two_processes(photos, tmp_path, in_processes, capsys):
    folder, file = photos
    flags = [*FLAGS, "--vfm-weights", weights_file(tmp_path), "--max-skipped", "0.5", "--most", "3", "--sides", "4"]
    given = ["--images", str(file), "--image-root", str(folder), *flags]
    propose.main([*given, "--out", str(tmp_path / "one.json")])
    assert "4 images" in capsys.readouterr().out
    found = load_annotations(str(tmp_path / "one.json"))
    assert found.image_ids.tolist() == [70, 71, 72, 74] and not found.skipped
    assert found.sizes.tolist() == [[56, 40], [56, 48], [56, 40], [56, 40]] and 1 <= np.diff(found.offsets).max() <= 3
    assert found.boxes.min() >= 0 and (found.boxes[:, 2:] <= [56, 48]).all()
    others = ["--out", str(tmp_path / "folder.json"), "--batch-size", "1", "--workers", "2", "--pictures", "9"]
    propose.main(["--images", str(folder), *flags, *others])
    again = load_annotations(str(tmp_path / "folder.json"))
    assert sorted(again.file_names) == sorted(found.file_names)
    drawn = {file.name: read_image(str(file)) for file in (tmp_path / "folder_pictures").iterdir()}
    assert len(drawn) == 4 and "below_a.png.jpg" in drawn and drawn["below_a.png.jpg"].shape == (3, 40, 56)
    for row, name in enumerate(found.file_names):  # whatever the batches, and whoever merges the cells
        other = list(again.file_names).index(name)
        assert np.allclose(again.boxes[again.of(other)], found.boxes[found.of(row)], atol=0.02)
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    in_processes(one_of_two, 2, port, [*given, "--out", str(tmp_path / "two.json")])
    assert (tmp_path / "two.json").read_text() == (tmp_path / "one.json").read_text()


def test_processes_that_merge_keep_the_order():
    tasks = [(i, np.full(2, i)) for i in range(30)]
    assert list(propose.in_order(iter(tasks), np.sum, 2)) == [(i, 2 * i) for i in range(30)]
    with pytest.raises(UserError, match="was ended, most likely for want of memory: lower --workers"):
        list(propose.in_order([("last words", np.array(7))], os._exit, 1))


def test_faulty_input_is_told_in_one_line(photos, tmp_path, monkeypatch):
    folder, file = photos
    out = ["--out", str(tmp_path / "out.json")]
    for arguments, message in (
        (["--images", str(folder)], "1 of 5 samples of --images .* more than --max-skipped 0.1"),
        (["--images", str(file)], "--image-root .not given."),
        (["--images", str(tmp_path / "none.json")], "none.json"),
        (["--images", str(file), "--image-root", str(tmp_path)], "images of .*list.json are not there"),
        (["--images", str(folder), "--vfm", "no_such_trunk"], "--vfm no_such_trunk"),
        (["--images", str(folder), "--most", "0"], "argument --most: 0 is out of range"),
    ):
        with pytest.raises(UserError, match=message):
            propose.main([*FLAGS, *arguments, *out])
    # A file that cannot be written is told before the first image is read; folders that are missing are no fault.
    monkeypatch.setattr(propose, "find", lambda *args, **kwargs: pytest.fail("images are looked at"))
    for place, message in ((folder, "is a folder: give a file"), (file / "out.json", "cannot be written"),
                           (Path("/proc/new/out.json"), "cannot be written")):  # fmt: skip
        with pytest.raises(UserError, match=f"--out {place} {message}"):
            propose.main([*FLAGS, "--images", str(folder), "--max-skipped", "0.5", "--out", str(place)])
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(UserError, match=r"scikit-learn: pip install"):
        propose.main([*FLAGS, "--images", str(folder), *out])
    assert not (tmp_path / "out.json").exists()
