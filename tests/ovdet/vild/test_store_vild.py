"""The store of crops' embeddings: right, resumable after any kill, tied to its key, and opened without being read."""

from __future__ import annotations

import hashlib
import io
import multiprocessing
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from ovdet.clip import Clip
from ovdet.vild import embed as embedding
from ovdet.vild.assemble import load_teacher
from ovdet.vild.commands import embed as command
from ovdet.vild.commands import make_proposals
from ovdet.vild.crops import crop_pixels
from ovdet.vild.embed import Embedder, check_filled, fill, open_store
from ovdet.vild.proposals import ProposalList
from training.engine.data.store import TeacherStore
from training.engine.distributed import Dist
from training.engine.errors import UserError
from training.engine.precision import make_precision

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def teacher(scenes) -> Clip:
    return load_teacher(scenes.config())


def fill_folder(scenes, teacher: Clip, folder: Path, dist: Dist | None = None, **settings: object) -> TeacherStore:
    config = scenes.config()
    proposals = ProposalList.open(config.data.proposals)
    store = open_store(str(folder), config, proposals, teacher.model)
    embedder = Embedder(teacher.model, config.teacher, device=CPU, precision=make_precision("fp32", CPU))
    options = {"root": config.data.train_images, "exif": True, "dist": dist or scenes.alone, **settings}
    fill(store, proposals, embedder, **options)
    return store


def digests(folder: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.iterdir() if f.suffix == ".npy"}


def test_rows_are_those_of_crops_embedded_one_by_one(scenes, teacher):
    """Against Pillow's crops, one at a time, in the order of the proposals."""
    config = scenes.config()
    proposals = ProposalList.open(config.data.proposals)
    store = open_store(config.data.store, config, proposals, teacher.model)
    check_filled(store)
    visual = teacher.model.visual
    mean, std = (torch.tensor(v)[:, None, None] for v in (visual.image_mean, visual.image_std))
    for row in (0, 7):
        picture = Image.open(Path(config.data.train_images) / proposals.names[row]).convert("RGB")
        boxes, found = proposals.boxes[proposals.of(row)], torch.from_numpy(store.of_image(row)).float()
        assert len(found) == len(boxes) > 3
        for box, mine in zip(boxes, found, strict=True):
            total = torch.zeros(teacher.model.embed_dim)
            for scale in (1.0, 1.5):
                pixels = tuple(crop_pixels(box[None], scale, picture.height, picture.width)[0].tolist())
                part = np.array(picture.crop(pixels).resize((visual.image_size,) * 2, Image.BICUBIC))
                values = (torch.from_numpy(part).permute(2, 0, 1) / 255 - mean) / std
                with torch.inference_mode():
                    total = total + teacher.model.encode_image(values[None])[0]
            assert F.cosine_similarity(total, mine, dim=0) > 0.9995
            assert mine.norm() == pytest.approx(1, abs=2e-3)


def fill_until_killed(scenes, teacher: Clip, folder: Path, number: int) -> None:
    """In a child: this process is killed at a step of the filling, the ``number``-th of those below.

    Steps are crops embedded, and a shard's file opened, half written, flushed and put into its place.
    """
    left = [number]

    def step() -> None:
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)

    def before(function):
        def stepping(*args, **settings):
            step()
            return function(*args, **settings)

        return stepping

    def save(file, array: np.ndarray) -> None:
        content = io.BytesIO()
        np.lib.format.write_array(content, array)
        whole = content.getvalue()
        step()
        file.write(whole[: len(whole) // 2])
        file.flush()
        step()
        file.write(whole[len(whole) // 2 :])

    np.save, os.fsync, os.replace = save, before(os.fsync), before(os.replace)
    Embedder.raw = before(Embedder.raw)
    fill_folder(scenes, teacher, folder)


def test_filling_survives_kills(scenes, teacher, tmp_path, monkeypatch):
    """Killed 20 times, at any step; what is there at the end is what an undisturbed filling gives."""
    monkeypatch.setattr(embedding, "SHARD_IMAGES", 1)
    fill_folder(scenes, teacher, tmp_path / "whole")
    context, chance = multiprocessing.get_context("fork"), random.Random(0)
    sizes = []
    for number in [1, 2, 3, 4, 5, *(chance.randint(1, 8) for _ in range(15))]:
        child = context.Process(target=fill_until_killed, args=(scenes, teacher, tmp_path / "killed", number))
        child.start()
        child.join(120)
        assert child.exitcode == -signal.SIGKILL
        sizes.append(len(digests(tmp_path / "killed")))
    assert sizes == sorted(sizes) and 0 < sizes[-1] < len(digests(tmp_path / "whole"))
    assert digests(tmp_path / "killed").items() <= digests(tmp_path / "whole").items()
    fill_folder(scenes, teacher, tmp_path / "killed")
    assert digests(tmp_path / "killed") == digests(tmp_path / "whole") != {}


def test_another_teacher_other_crops_or_other_proposals_are_refused(scenes, teacher, tmp_path):
    config = scenes.config()
    proposals = ProposalList.open(config.data.proposals)
    for settings, model, message in (
        ([], load_teacher(scenes.config("train.seed=1")).model, "made with other teacher"),
        (["teacher.crop_rule=pad"], teacher.model, "other crops"),
        (["teacher.crop_scales=[1.0]"], teacher.model, "other scales"),
        (["teacher.precision=amp_bf16"], teacher.model, "other precision"),
        (["data.exif=false"], teacher.model, "other upright"),
    ):
        with pytest.raises(UserError, match=message) as error:
            open_store(config.data.store, scenes.config(*settings), proposals, model)
        assert "data.store" in str(error.value) and "\n" not in str(error.value)
    out = str(tmp_path / "fewer")
    network = [scenes.config_file, str(scenes.folder / "proposer" / "latest.pt"), *scenes.proposer, "--device", "cpu"]
    make_proposals.main([*network, "--out", out, "--most", "5"])
    with pytest.raises(UserError, match="made with other proposals"):
        open_store(config.data.store, config, ProposalList.open(out), teacher.model)
    with pytest.raises(UserError, match="made with other most"):
        make_proposals.main([*network, "--out", out, "--most", "6"])
    with pytest.raises(UserError, match="data.store is empty"):
        open_store("", config, proposals, teacher.model)
    with pytest.raises(UserError, match="embed.py fills it"):
        check_filled(open_store(str(tmp_path / "new"), config, proposals, teacher.model))


def test_damage_is_found(scenes, teacher, capsys, tmp_path):
    """A wrong size at once, wrong bytes when they are asked for."""
    folder, whole = tmp_path / "store", Path(scenes.config().data.store)
    shutil.copytree(whole, folder)
    arguments = [scenes.config_file, f"data.store={folder}", "--device", "cpu"]
    command.main([*arguments, "--verify"])
    assert "complete and undamaged" in capsys.readouterr().out
    shard = next(folder.glob("shard-*.npy"))
    content = bytearray(shard.read_bytes())
    content[-3] ^= 1
    shard.write_bytes(content)
    command.main(arguments)  # nothing is read, so nothing is noticed
    with pytest.raises(UserError, match="missing or were damaged"):
        command.main([*arguments, "--verify"])
    command.main(arguments)
    assert digests(folder) == digests(whole)
    shard = next(folder.glob("shard-*.npy"))
    shard.write_bytes(shard.read_bytes()[:-2])
    config = scenes.config(f"data.store={folder}")
    store = open_store(str(folder), config, ProposalList.open(config.data.proposals), teacher.model)
    with pytest.raises(UserError, match="1 of 1 shards are not there"):
        check_filled(store)


def test_the_size_of_lvis_opens_in_seconds_without_being_read(tmp_path):
    """30 million rows of 512 numbers: 31 GB, here of files that hold nothing."""
    images, most, width = 100_170, 300, 512
    store = TeacherStore(tmp_path, np.arange(images + 1) * most, width, {"k": 1}, shard_images=embedding.SHARD_IMAGES)
    store.create()
    for shard in range(store.num_shards):
        with open(tmp_path / f"shard-{shard:05d}-0123456789abcdef.npy", "wb") as file:
            shape = store.shape(shard)
            np.lib.format.write_array_header_1_0(file, {"descr": "<f2", "fortran_order": False, "shape": shape})
            file.truncate(file.tell() + 2 * shape[0] * shape[1])
    begin = time.perf_counter()
    again = TeacherStore(tmp_path, store.offsets, width, {"k": 1}, shard_images=embedding.SHARD_IMAGES)
    check_filled(again)
    assert again.of_image(images - 1).shape == again.of_image(51_234).shape == (most, width)
    assert time.perf_counter() - begin < 20
    assert "30.8 GB" in embedding.announcement(again) and again.num_shards == 1002


def test_unreadable_images_are_rows_of_nan_and_too_many_are_an_error(scenes, teacher, tmp_path, caplog):
    images = tmp_path / "images"
    shutil.copytree(scenes.config().data.train_images, images)
    bad = ProposalList.open(scenes.config().data.proposals).names[2]
    (images / bad).write_bytes(b"no image")
    store = fill_folder(scenes, teacher, tmp_path / "store", root=str(images), max_skipped=0.2)
    assert np.isnan(store.of_image(2)).all() and np.isfinite(store.of_image(1)).all() and bad in caplog.text
    with pytest.raises(UserError, match=re.escape("1 of 12 samples")):
        fill_folder(scenes, teacher, tmp_path / "other", root=str(images), max_skipped=0.01)


def test_counts_are_summed_where_the_processes_compute(scenes, teacher, tmp_path, monkeypatch):
    """NCCL sums nothing on the host. A device without memory stands for the GPU."""
    places = []

    def all_reduce_sum(counts: torch.Tensor) -> torch.Tensor:
        places.append(counts.device.type)
        return torch.tensor([12.0, 0.0, 60.0])

    monkeypatch.setattr(embedding, "all_reduce_sum", all_reduce_sum)
    fill_folder(scenes, teacher, tmp_path / "store", Dist(0, 1, 0, torch.device("meta"), True))
    assert places == ["meta"]


def test_several_processes_fill_one_store(scenes, teacher, tmp_path, monkeypatch):
    """Each takes its own shards; together they make what one makes."""
    monkeypatch.setattr(embedding, "SHARD_IMAGES", 5)
    fill_folder(scenes, teacher, tmp_path / "one")
    for rank in (0, 1):
        fill_folder(scenes, teacher, tmp_path / "two", Dist(rank, 2, rank, CPU, False))
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
