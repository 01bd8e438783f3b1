"""Sharded checkpoints are replaced whole, and written to one disk."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from training.engine import shards
from training.engine.checkpoint import find_latest, read_checkpoint, remove_unfinished


def write(path: Path, step: int) -> None:
    meta = {"epoch": 1, "step": step, "state_dict": {}, "optimizer": {}}
    shards.write_shards(path, {"model/a": torch.full((3,), float(step))}, meta, rank=0, folder_flag="--logs")


def test_a_kill_while_a_checkpoint_is_replaced_leaves_one(tmp_path, monkeypatch):
    """Before, between and after the renames; what is found when the run goes on is the old one or the new one."""
    path, replace, flush = tmp_path / "epoch_1.shards", os.replace, shards.flush
    kept = []
    for dies_at in (1, 2, 3):
        write(path, 1)
        moments = iter(range(1, 4))

        def dies(moments=moments, dies_at=dies_at):
            if next(moments) == dies_at:
                raise KeyboardInterrupt

        def renames(source, target, dies=dies):
            if Path(source).is_dir():
                dies()
            replace(source, target)

        def flushes(what, dies=dies):
            if what == tmp_path:  # the renames
                dies()
            flush(what)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", renames)
            patch.setattr(shards, "flush", flushes)
            with pytest.raises(KeyboardInterrupt):
                write(path, 2)
        remove_unfinished(tmp_path)
        assert [f.name for f in tmp_path.iterdir()] == ["epoch_1.shards"], dies_at
        step = read_checkpoint(path)["step"]
        values = {"model/a": torch.zeros(3)}
        shards.load_tensors(path, values)
        assert values["model/a"].tolist() == [step] * 3
        kept.append(step)
    assert kept == [1, 1, 2]
    write(path, 3)
    assert find_latest(tmp_path)[1]["step"] == 3 and [f.name for f in tmp_path.iterdir()] == ["epoch_1.shards"]


def test_machines_with_disks_of_their_own_write_no_checkpoint(two_processes, tmp_path):
    """Each process has written its part to another folder: it would count as written, and could not be read."""
    two_processes(f"""
        from pathlib import Path
        import torch
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Shard, distribute_tensor
        from training.engine import shards
        from training.engine.errors import UserError

        folder = Path({str(tmp_path)!r}) / f"disk{{dist.rank}}"
        folder.mkdir()
        divided = distribute_tensor(torch.arange(8.0), init_device_mesh("cpu", (2,)), [Shard(0)])
        try:
            shards.write_shards(folder / "epoch_1.shards", {{"model/a": divided}}, {{}}, rank=dist.rank,
                                folder_flag="--logs")
            raise AssertionError("it counts as written")
        except UserError as error:
            assert "epoch_1.shards cannot be written (__1_0.distcp, of another process, is not there)" in str(error)
            assert "choose a --logs that all machines share" in str(error)
        assert not list(folder.iterdir())
    """)
