"""Annotation files: what is read, what is left out and counted, what is refused, and the cache."""

from __future__ import annotations

import json
import logging
import os

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from training.engine.data.annotations import Strings, load_annotations, parse, read_captions, read_json
from training.engine.errors import UserError

COCO = {
    "images": [
        {"id": 7, "file_name": "b.jpg", "width": 100, "height": 80},
        {"id": 3, "coco_url": "http://images.cocodataset.org/train2017/000000000003.jpg", "width": 50, "height": 50},
        {"id": 9, "file_name": "ü.jpg"},
    ],
    "annotations": [
        {"id": 1, "image_id": 9, "category_id": 40, "bbox": [1, 2, 3, 4], "area": 5.5},
        {"id": 2, "image_id": 7, "category_id": 2, "bbox": [10.5, 20, 30, 40], "iscrowd": 1},
        {"id": 3, "image_id": 9, "category_id": 2, "bbox": [0, 0, 9, 9]},
    ],
    "categories": [{"id": 40, "name": "dog"}, {"id": 2, "name": "cat"}],
}


def write(path, content) -> str:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(path)


def check_coco(found) -> None:
    assert [found.file_name(i) for i in range(3)] == ["b.jpg", "train2017/000000000003.jpg", "ü.jpg"]
    assert found.image_ids.tolist() == [7, 3, 9] and found.sizes.tolist() == [[100, 80], [50, 50], [0, 0]]
    assert found.names == ["cat", "dog"] and found.category_ids.tolist() == [2, 40]
    assert found.boxes[found.of(0)].tolist() == [[10.5, 20, 40.5, 60]]  # crowds are kept
    assert found.boxes[found.of(2)].tolist() == [[1, 2, 4, 6], [0, 0, 9, 9]]
    assert found.areas.tolist() == [1200, 5.5, 81] and found.labels.tolist() == [0, 1, 0]
    assert len(found.boxes[found.of(1)]) == 0 and found.skipped == {}


def test_coco_and_lvis_records(tmp_path):
    check_coco(load_annotations(write(tmp_path / "a.json", COCO)))


def test_ids_that_begin_anew_in_each_image(tmp_path):
    """Some tools number annotations so; nothing refers to these ids."""
    content = {**COCO, "annotations": [{**entry, "id": 1} for entry in COCO["annotations"]]}
    check_coco(load_annotations(write(tmp_path / "a.json", content)))


def test_crowds_frequencies_and_masks(tmp_path):
    polygons = [[[1.5, 2, 3, 4, 5, 6]], {"size": [80, 100], "counts": "ü\\"}, None]
    entries = [{**e, "segmentation": p} for e, p in zip(COCO["annotations"], polygons, strict=True)]
    categories = [{"id": 40, "name": "dog", "frequency": "r"}, {"id": 2, "name": "cat", "frequency": "f"}]
    path = write(tmp_path / "a.json", {**COCO, "annotations": entries, "categories": categories})
    for cache in ("", str(tmp_path / "cache"), str(tmp_path / "cache")):
        found = load_annotations(path, masks=True, cache_dir=cache)
        check_coco(found)
        assert found.crowd.tolist() == [True, False, False] and found.frequencies == ["f", "r"]
        assert [found.segmentation(i) for i in range(3)] == [polygons[1], polygons[0], polygons[2]]
        assert list(found.file_names) == ["b.jpg", "train2017/000000000003.jpg", "ü.jpg"]
    without = load_annotations(path, cache_dir=str(tmp_path / "cache"))
    check_coco(without)
    assert len(without.mask_bytes) == 0


def test_labels_that_must_be_there():
    entries = [*COCO["annotations"], {"image_id": 9, "category_id": 3, "bbox": [0, 0, 9, 9]},
               {"image_id": 9, "bbox": [0, 0, 9, 9]}]  # fmt: skip
    categories = [*COCO["categories"], {"id": 3}, {"id": 4, "name": ""}]
    content = {**COCO, "annotations": entries, "categories": categories}
    found = parse(content, "a.json", labelled=True)
    assert found.skipped == {"category without a name": 2, "annotation without a listed category": 2}
    found.skipped = {}
    check_coco(found)
    assert parse(content, "a.json").labels.tolist() == [0, 3, 0, 1, -1]
    for categories, message in (([], "no category"), ([{"id": 1, "name": "a"}, {"id": 2, "name": "a"}], 'called "a"')):
        with pytest.raises(UserError, match=f"--train a.json.*{message}"):
            parse({**COCO, "categories": categories}, "a.json", "--train", labelled=True)


def test_a_file_of_which_most_is_left_out_is_refused(tmp_path):
    bad = [{"image_id": 7, "bbox": [0, 0, 0, 5]}] * 3
    assert (
        len(load_annotations(write(tmp_path / "a.json", {**COCO, "annotations": COCO["annotations"] + bad})).boxes) == 3
    )
    worse = [*COCO["annotations"], *bad, {"image_id": 1}]
    with pytest.raises(UserError, match=r"4 of its 7 annotations .* box of zero or negative size \(3 times\)"):
        load_annotations(write(tmp_path / "a.json", {**COCO, "annotations": worse}))


def test_one_process_parses_and_the_others_wait(tmp_path, two_processes):
    """With a cache and without one; and a file that cannot be used is refused on both."""
    path = write(tmp_path / "a.json", COCO)
    two_processes(f"""
        import training.engine.data.annotations as a, pytest
        from training.engine.errors import UserError
        parsed = []
        original = a.parse
        a.parse = lambda *args, **kwargs: parsed.append(1) or original(*args, **kwargs)
        for cache in ("", {str(tmp_path / "cache")!r}):
            found = a.load_annotations({path!r}, cache_dir=cache)
            assert found.file_name(2) == "ü.jpg" and found.areas.tolist() == [1200, 5.5, 81]
        assert len(parsed) == (2 if dist.rank == 0 else 0)
        with pytest.raises(UserError, match="no such file"):
            a.load_annotations("nowhere.json")
    """)


def test_bad_parts_are_left_out_and_counted():
    good = COCO["annotations"]
    bad = [
        {"image_id": 7, "bbox": [0, 0, 0, 5]}, {"image_id": 7, "bbox": [0, 0, 5, -5]},
        {"image_id": 7, "bbox": [float("nan"), 0, 5, 5]}, {"image_id": 7, "bbox": [0, 0, float("inf"), 5]},
        {"image_id": 7, "bbox": [0, 0, 10**400, 5]}, {"image_id": 7, "bbox": [0, 0, "5", 5]}, {"image_id": 7},
        {"image_id": 7, "bbox": [0, 0, 5]}, {"image_id": 99, "bbox": [0, 0, 5, 5]}, {"image_id": [], "bbox": []},
        {"image_id": 7, "bbox": [200, 0, 5, 5]}, None,
    ]  # fmt: skip
    images = [*COCO["images"], {"id": 7, "file_name": "again.jpg"}, {"id": "x", "file_name": "y"}, {"id": 1}, 5]
    found = parse({"images": images, "annotations": good + bad, "categories": COCO["categories"]}, "a.json")
    assert found.skipped == {
        "image with a repeated id": 1, "image without id or file name": 3, "box of zero or negative size": 2,
        "box with a coordinate that is no finite pixel": 3, "annotation without a box of four numbers": 3,
        "annotation of an image that is not listed": 2, "box outside its image": 1, "annotation that is no object": 1,
    }  # fmt: skip
    found.skipped = {}
    check_coco(found)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not a json file"), ("{", "not a json file"), ("[]", "no list"), ("{}", "no list"),
        ('{"images": {}}', "no list"), ('{"images": []}', "lists no image"), ('{"images": [{}]}', "none of its 1"),
        ('{"images": [{"id": 1, "file_name": "a"}], "annotations": {}}', "no list"),
        ("[" * 100_000, "not a json file"), ('{"images": ' + "9" * 5000 + "}", "not a json file|no list"),
    ],
)  # fmt: skip
def test_unusable_files_are_refused_in_one_line(content, message, tmp_path):
    path = write(tmp_path / "bad.json", content)
    for cache in (None, str(tmp_path / "cache")):
        with pytest.raises(UserError, match=message) as caught:
            load_annotations(path, cache_dir=cache)
        assert "--train-data" in str(caught.value) and path in str(caught.value) and "\n" not in str(caught.value)
        with pytest.raises(UserError, match="no such file"):
            load_annotations(str(tmp_path / "absent.json"), cache_dir=cache)
    with pytest.raises(UserError, match="cannot be read"):
        read_json(str(tmp_path), "--val-data")


def test_encodings(tmp_path):
    (tmp_path / "bom.json").write_bytes(json.dumps(COCO, ensure_ascii=False).encode("utf-8-sig"))
    check_coco(load_annotations(str(tmp_path / "bom.json")))
    (tmp_path / "other.json").write_bytes(json.dumps(COCO, ensure_ascii=False).encode("latin-1"))
    with pytest.raises(UserError, match="not a json file"):
        load_annotations(str(tmp_path / "other.json"))
    assert Strings.of(["a\ud800b"])[0] == "a?b"


junk = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5),
        st.sampled_from([-1, 0, 2**63, 10**400, 1e300, float("nan"), "\ud800", "../x.jpg"]),
    ),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_malformed_files_are_read_in_part_or_refused(tmp_path, data):
    """Any values of a valid file replaced by anything: what comes out is sound, or one line says why nothing does."""
    content = json.loads(json.dumps(COCO))
    for _ in range(data.draw(st.integers(1, 6))):
        target = content
        while True:  # down to a random place
            keys = list(target) if isinstance(target, dict) else list(range(len(target)))
            if not keys:
                break
            key = data.draw(st.sampled_from(keys))
            if isinstance(target[key], (dict, list)) and data.draw(st.booleans()):
                target = target[key]
                continue
            if data.draw(st.booleans()):
                target[key] = data.draw(junk)
            else:
                del target[key]
            break
    path = write(tmp_path / "fuzzed.json", content)
    try:
        found = load_annotations(path)
        captions = read_captions(content.get("annotations"), found)
    except UserError as error:
        assert path in str(error) and "\n" not in str(error)
        return
    count = len(found)
    assert count == len(set(found.image_ids.tolist())) > 0 and all(found.file_name(i) for i in range(count))
    assert found.offsets[0] == 0 and found.offsets[-1] == len(found.boxes) and (np.diff(found.offsets) >= 0).all()
    assert np.isfinite(found.boxes).all() and (found.boxes[:, 2:] >= found.boxes[:, :2]).all()
    assert np.isfinite(found.areas).all() and (found.areas >= 0).all()
    assert (found.labels >= -1).all() and (found.labels < len(found.names)).all()
    assert len(captions) == count
    listed = content.get("annotations")
    lost = sum(number for reason, number in found.skipped.items() if "box" in reason or "annotation" in reason)
    assert len(found.boxes) + lost == (len(listed) if isinstance(listed, list) else 0)


def test_cache_gives_the_same_arrays_without_the_json(tmp_path, monkeypatch):
    path, cache = write(tmp_path / "a.json", COCO), str(tmp_path / "cache")
    check_coco(load_annotations(path, cache_dir=cache))
    monkeypatch.setattr("training.engine.data.annotations.read_json", None)  # a second reading would fail
    again = load_annotations(path, cache_dir=cache)
    check_coco(again)
    assert isinstance(again.boxes, np.memmap)
    monkeypatch.undo()
    changed = json.loads(json.dumps(COCO))
    changed["images"][0]["file_name"] = "longer_name.jpg"
    assert load_annotations(write(tmp_path / "a.json", changed), cache_dir=cache).file_name(0) == "longer_name.jpg"


def test_damaged_cache_is_built_anew(tmp_path, caplog):
    path, cache = write(tmp_path / "a.json", COCO), tmp_path / "cache"
    load_annotations(path, cache_dir=str(cache))
    files = sorted(file.name for file in next(cache.iterdir()).iterdir())
    assert len(files) == 13
    for name in files:
        for damage in ("flip", "truncate", "remove"):
            file = next(cache.iterdir()) / name
            content = bytearray(file.read_bytes())
            if damage == "remove":
                file.unlink()
            elif damage == "flip":
                content[len(content) // 2] ^= 4
                file.write_bytes(content)
            else:
                file.write_bytes(content[: len(content) // 2])
            caplog.clear()
            with caplog.at_level(logging.WARNING):
                check_coco(load_annotations(path, cache_dir=str(cache)))
            assert "damaged" in caplog.text


def test_unwritable_cache_only_warns(tmp_path, caplog):
    path = write(tmp_path / "a.json", COCO)
    (tmp_path / "file").touch()
    check_coco(load_annotations(path, cache_dir=str(tmp_path / "file" / "below")))
    assert "cannot be written" in caplog.text
    assert sorted(os.listdir(tmp_path)) == ["a.json", "file"]


def test_a_cache_is_as_open_as_the_umask_says(tmp_path):
    """Several users may share one."""
    path = write(tmp_path / "a.json", COCO)
    for umask in (0o022, 0o002, 0o077):
        before = os.umask(umask)
        try:
            load_annotations(path, cache_dir=str(tmp_path / f"{umask:o}"))
        finally:
            os.umask(before)
        (folder,) = (tmp_path / f"{umask:o}").iterdir()
        assert folder.stat().st_mode & 0o777 == 0o777 & ~umask


def test_a_cache_of_somebody_else_that_is_closed_only_warns(tmp_path, caplog, monkeypatch):
    path, cache = write(tmp_path / "a.json", COCO), str(tmp_path / "cache")
    load_annotations(path, cache_dir=cache)

    def closed(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("training.engine.data.annotations._read_cache", closed)
    monkeypatch.setattr("training.engine.data.annotations.shutil.rmtree", lambda *_, **__: None)
    check_coco(load_annotations(path, cache_dir=cache))
    assert "cannot be read ([Errno 13] Permission denied): the json is read each time" in caplog.text


def test_large_files_are_cached_by_default(tmp_path, monkeypatch):
    path, folder = write(tmp_path / "a.json", COCO), tmp_path / "default"
    monkeypatch.setattr("training.engine.data.annotations.CACHE_FOLDER", folder)
    check_coco(load_annotations(path))
    assert not folder.exists()
    monkeypatch.setattr("training.engine.data.annotations.CACHED_FROM", 10)
    check_coco(load_annotations(path, cache_dir=""))
    assert not folder.exists()
    check_coco(load_annotations(path))
    assert len(list(folder.iterdir())) == 1
    monkeypatch.setattr("training.engine.data.annotations.read_json", None)
    check_coco(load_annotations(path))
