"""The teacher cache: runs with it equal runs without it, and whatever does not fit is refused."""

from __future__ import annotations

import json
import os
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest

from open_clip import CLIP
from training.data.options import RegionOptions
from training.data.regions import Proposals
from training.engine.data.annotations import load_annotations
from training.engine.data.store import TeacherStore
from training.engine.distributed import init_distributed
from training.engine.errors import UserError
from training.teachers import cache


@pytest.fixture
def proposals(scenes, tmp_path) -> str:
    """Instances of the scenes, with an image that has none and one whose boxes are all too small."""
    content = json.loads((scenes / "annotations/instances_train2017.json").read_text())
    bare, tiny = content["images"][0]["id"], content["images"][1]["id"]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != bare]
    for a in content["annotations"]:
        if a["image_id"] == tiny:
            a["bbox"] = [4, 4, 3, 3]
    file = tmp_path / "proposals.json"
    file.write_text(json.dumps(content))
    return str(file)


def run(program, proposals, *extra, **flags) -> int:
    flags = {"train_data": proposals, "max_boxes": 2, "lock_image_unlocked_groups": 2, "epochs": 3, **flags}
    return program("--lock-image", *extra, train="proposals_distill", **flags)


def losses(program, name) -> list[float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(program.logs / name / "tensorboard"))
    events.Reload()
    return [e.value for e in events.Scalars("train/loss")]


@pytest.mark.parametrize("crop_on", ["worker", "device"])
def test_cached_run_equals_the_uncached_one_and_skips_the_teacher(program, proposals, monkeypatch, tmp_path, crop_on):
    calls = []
    original = CLIP.encode_image
    monkeypatch.setattr(CLIP, "encode_image", lambda *a, **k: calls.append(len(a[1])) or original(*a, **k))
    cache = tmp_path / "cache"
    flags = {"crop_on": crop_on, "log_every_n_steps": 1}
    assert run(program, proposals, name="plain", **flags) == 0
    steps = 3 * 12
    assert len(calls) == steps
    calls.clear()
    assert run(program, proposals, name="cached", cache_teacher=cache, **flags) == 0
    annotations = load_annotations(proposals)
    # Every region of the size limits once, and the region that stands in for two images: before the first step.
    assert sum(calls) == int((annotations.areas > 0).sum()) - small(annotations) + 2
    calls.clear()
    assert run(program, proposals, name="again", cache_teacher=cache, **flags) == 0
    assert calls == []
    plain, cached, again = (losses(program, n) for n in ("plain", "cached", "again"))
    assert len(plain) == len(cached) == steps
    np.testing.assert_allclose(cached, plain, atol=1e-3)
    assert again == cached


def small(annotations) -> int:
    box = annotations.boxes
    area = (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1])
    return int((area < 64).sum())


def test_stale_caches_are_refused(program, proposals, tmp_path, capsys):
    cache = tmp_path / "cache"
    assert run(program, proposals, name="first", cache_teacher=cache, epochs=1) == 0
    for flags, word in [({"seed": 7}, "weights"), ({"min_size": 12}, "min_size"), ({"crop_on": "device"}, "crop"),
                        ({"train_ratio": 0.5}, "regions"), ({"precision": "amp_bf16"}, "precision")]:  # fmt: skip
        assert run(program, proposals, name="other", cache_teacher=cache, epochs=1, **flags) == 2
        error = capsys.readouterr().err
        assert error.count("\n") <= 1 or "error:" in error.splitlines()[-1]
        assert "was made with other" in error and word in error and str(cache) in error
        assert not (program.logs / "other").exists()
    content = json.loads(open(proposals).read())
    content["annotations"][3]["bbox"][0] += 1
    changed = tmp_path / "changed.json"
    changed.write_text(json.dumps(content))
    assert run(program, str(changed), name="other", cache_teacher=cache, epochs=1) == 2
    assert "regions" in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full/photo.jpg").write_bytes(b"x")
    assert run(program, proposals, name="other", cache_teacher=tmp_path / "full") == 2
    assert "holds something else" in capsys.readouterr().err
    assert program("--cache-teacher", str(cache), name="other") == 2
    assert "proposals_distill" in capsys.readouterr().err


def test_damaged_shards_are_made_anew(program, proposals, tmp_path):
    cache = tmp_path / "cache"
    assert run(program, proposals, name="first", cache_teacher=cache, epochs=1) == 0
    (shard,) = (cache / "crops").glob("shard-*.npy")
    good = shard.read_bytes()
    damaged = bytearray(good)
    damaged[len(good) // 2] ^= 1
    shard.write_bytes(damaged)
    assert run(program, proposals, name="second", cache_teacher=cache, epochs=1) == 0
    assert shard.read_bytes() == good


def test_a_dry_run_fills_no_cache_and_uses_a_full_one(program, proposals, tmp_path, monkeypatch):
    calls, original, cache = [], CLIP.encode_image, tmp_path / "cache"
    monkeypatch.setattr(CLIP, "encode_image", lambda *a, **k: calls.append(1) or original(*a, **k))
    assert run(program, proposals, "--dry-run", name="dry", cache_teacher=cache) == 0
    assert len(calls) == 4 and not cache.exists()
    assert run(program, proposals, name="first", cache_teacher=cache, epochs=1) == 0
    calls.clear()
    assert run(program, proposals, "--dry-run", name="dry", cache_teacher=cache) == 0
    assert not calls
    (shard,) = (cache / "crops").glob("shard-*.npy")
    shard.write_bytes(shard.read_bytes()[:-10])
    assert run(program, proposals, "--dry-run", name="dry", cache_teacher=cache) == 0
    assert len(calls) == 4 and shard.is_file() and not (program.logs / "dry").exists()


def test_a_full_cache_may_lie_on_a_disk_that_can_only_be_read(program, proposals, tmp_path, monkeypatch, capsys):
    cache = tmp_path / "cache"
    assert run(program, proposals, name="first", cache_teacher=cache, epochs=1) == 0
    left = cache / "crops/.shard-00000.4711"
    left.touch()
    os.utime(left, (0, 0))

    def read_only(path, *_, **__):
        assert cache in path.parents
        raise OSError(30, "Read-only file system")

    unlink = Path.unlink
    monkeypatch.setattr("training.engine.data.keyed.write_atomically", read_only)
    monkeypatch.setattr(Path, "unlink", lambda p, **k: (read_only if cache in p.parents else unlink)(p, **k))
    assert run(program, proposals, name="second", cache_teacher=cache, epochs=1) == 0
    (shard,) = (cache / "crops").glob("shard-*.npy")
    shard.write_bytes(shard.read_bytes()[:-10])
    assert run(program, proposals, name="third", cache_teacher=cache, epochs=1) == 2
    assert f"{cache / 'crops'} cannot be written ([Errno 30] Read-only file system)" in capsys.readouterr().err


def fill_apart(rank: int, port: int, folder: Path) -> None:
    """One of two processes of which each has a folder of its own, as on two machines that share no disk."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port)}  # fmt: skip
    where = init_distributed("cpu", timeout_s=60)
    store = TeacherStore(folder / str(rank), np.arange(21), 4, {"weights": "w"}, shard_images=5)
    store.create()
    cache._shards = lambda store, missing, *_: ((s, np.zeros(store.shape(s), np.float16), 5) for s in missing)
    with pytest.raises(UserError, match="0: process 0 does not see 2 of the 4 shards .* that every machine shares"):
        cache.fill(store, None, None, dist=where, precision=None)


def test_processes_that_share_no_folder_are_told(in_processes, tmp_path):
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    in_processes(fill_apart, 2, port, tmp_path)


def test_unreadable_images_are_counted_as_without_a_cache(program, proposals, scenes, tmp_path, caplog):
    images = tmp_path / "images"
    shutil.copytree(scenes / "train2017", images)
    victim = sorted(images.iterdir())[2]
    whole = victim.read_bytes()
    victim.write_bytes(whole[:100])
    flags = {"cache_teacher": tmp_path / "cache", "train_image_root": images, "epochs": 1}
    assert run(program, proposals, name="first", **flags) == 0
    assert any("left out of the teacher cache" in m and victim.name in m for m in caplog.messages)
    victim.write_bytes(whole)  # readable again, but without embeddings
    caplog.clear()
    assert run(program, proposals, name="second", **flags) == 0
    assert any("could not be read when the teacher cache" in m and victim.name in m for m in caplog.messages)


def test_rows_of_several_shards(scenes, tmp_path):
    annotations = load_annotations(str(scenes / "annotations/instances_train2017.json"))
    offsets = Proposals(annotations, RegionOptions()).answer_offsets()
    store = TeacherStore(tmp_path / "s", offsets, 4, {"weights": "w"}, shard_images=5)
    assert store.num_shards == 5 and sum(store.shape(s)[0] for s in range(5)) == len(annotations.boxes) + 24
    store.create()
    seen = set()
    for shard in range(5):
        assert not store.is_complete(shard)
        array = np.arange(store.shape(shard)[0], dtype=np.float16)[:, None].repeat(4, 1)
        store.write(shard, array)
        assert store.is_complete(shard)
    for image in range(24):
        own = annotations.of(image)
        for drawn in range(own.stop - own.start + 1):  # the last: the region that stands in
            shard, (row,) = store.rows(image, [drawn])
            assert (shard, row) not in seen
            seen.add((shard, int(row)))
            assert store.answers(image, [drawn]).tolist() == [[row] * 4]
        assert len(store.of_image(image)) == own.stop - own.start + 1
    assert len(seen) == len(annotations.boxes) + 24
    with pytest.raises(ValueError, match="float16"):
        store.write(0, np.zeros((1, 4), np.float32))
    with pytest.raises(UserError, match="weights"):
        TeacherStore(tmp_path / "s", offsets, 4, {"weights": "v"}, shard_images=5)
    with pytest.raises(UserError, match="width"):
        TeacherStore(tmp_path / "s", offsets, 5, {"weights": "w"}, shard_images=5)


def test_maps_of_crops_are_asked_for_in_every_step(program, proposals, tmp_path):
    """SC's teacher gives a map of each crop: tens of times what is kept of its embedding, so it stays."""
    flags = {"log_every_n_steps": 1, "method": "sc", "epochs": 2}
    assert run(program, proposals, name="plain", **flags) == 0
    assert run(program, proposals, name="cached", cache_teacher=tmp_path / "cache", **flags) == 0
    assert [f.name for f in (tmp_path / "cache").iterdir()] == ["crops"]
    assert losses(program, "cached") == pytest.approx(losses(program, "plain"), rel=1e-3)
