"""Rows that a dense reading does not read stay as they are, whatever the optimizer does to the rest."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from open_clip.readouts import Unread, build_readout, freeze_unread, hold_unread, unread_by_all


def train(tower, readout, optimizer, steps: int = 3) -> None:
    torch.manual_seed(3)
    for _ in range(steps):
        optimizer.zero_grad()
        dense = tower.encode_dense(torch.randn(1, 3, 4 * tower.patch_size, 6 * tower.patch_size), readout=readout)
        dense.square().mul(torch.arange(6)).sum().backward()
        optimizer.step()


@pytest.mark.parametrize("make", [
    lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, fused=True),
    lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, weight_decay=0.1),
])  # fmt: skip
@pytest.mark.parametrize(("kind", "name"), [("vit", "value"), ("vit", "qq"), ("eva01", "value"), ("siglip", "value")])
def test_unread_rows_neither_train_nor_decay(tiny, kind, name, make):
    models = [tiny(kind) for _ in range(2)]
    start = {n: p.detach().clone() for n, p in models[0].visual.named_parameters()}
    for model, hold in zip(models, (True, False), strict=True):
        tower = model.visual
        readout = build_readout(name, tower)
        unread = readout.unread(tower)
        freeze_unread(unread)
        optimizer = make([p for p in tower.parameters() if p.requires_grad])
        handles = hold_unread(optimizer, unread) if hold else []
        train(tower, readout, optimizer)
    assert len(handles := hold_unread(optimizer, unread)) == 2
    held, shrunk = (dict(m.visual.named_parameters()) for m in models)
    parts = [u for u in unread if u.index]
    assert parts
    for u in parts:
        assert torch.equal(held[u.name][u.index], start[u.name][u.index])
        if u.parameter.ndim > 1:
            assert not torch.equal(shrunk[u.name][u.index], start[u.name][u.index])
    for n, p in held.items():
        if not any(u.name == n for u in unread):
            assert not torch.equal(p, start[n]), n
        for u in parts:  # all else is the optimizer's alone
            if u.name == n:
                with torch.no_grad():
                    shrunk[n][u.index] = p[u.index]
        torch.testing.assert_close(p, shrunk[n], rtol=0, atol=0)
    for handle in handles:
        handle.remove()


def test_weights_loaded_meanwhile_are_held_as_they_are(tiny):
    tower = tiny("vit").visual
    unread = tower.readout.unread(tower)
    optimizer = torch.optim.AdamW(tower.parameters(), lr=1e-2, weight_decay=0.1)
    hold_unread(optimizer, unread)
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.add_(1)
    before = [u.parameter[u.index].detach().clone() for u in unread]
    train(tower, None, optimizer, steps=1)
    assert all(torch.equal(b, u.parameter[u.index]) for b, u in zip(before, unread, strict=True))


def test_nothing_to_hold(tiny):
    tower = tiny("eva02").visual
    unread = tower.readout.unread(tower)  # its projections are apart
    assert unread and all(not u.index for u in unread)
    assert hold_unread(torch.optim.SGD(tower.parameters(), lr=1), unread) == []
    tower = tiny("vit").visual
    assert hold_unread(torch.optim.SGD(tower.trunk.head.parameters(), lr=1), tower.readout.unread(tower)) == []


def test_what_several_readings_leave_out(tiny):
    tower = tiny("vit").visual
    value, kk, qq, bare = (build_readout(n, tower) for n in ("value", "kk", "qq", "value_bare"))
    names = lambda readouts: {(u.name.split("blocks.2.")[-1], str(u.index)) for u in unread_by_all(readouts, tower)}  # noqa: E731
    assert names([value]) == names([value, bare]) < names([bare])
    assert names([kk, value]) == {n for n in names([kk]) if "qkv" in n[0]}  # queries, and the MLP is read by value
    assert names([kk, qq]) == {n for n in names([kk]) if "qkv" not in n[0]}
    with pytest.raises(ValueError, match="no readings"):
        unread_by_all([], tower)


def _sharded(rank: int, world: int, port: int, rows: int) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    try:
        torch.manual_seed(0)
        start = torch.randn(rows, 4)
        weight = nn.Parameter(distribute_tensor(start, init_device_mesh("cpu", (world,)), [Shard(0)]))
        optimizer = torch.optim.AdamW([weight], lr=1e-2, weight_decay=0.5)
        hold_unread(optimizer, [Unread("weight", weight, (slice(2, 5),))])
        weight.sum().backward()
        optimizer.step()
        full = weight.detach().full_tensor()
        assert torch.equal(full[2:5], start[2:5])
        others = [i for i in range(rows) if not 2 <= i < 5]
        assert (full[others] != start[others]).all()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("rows", [6, 7])
def test_shards_are_held_by_the_processes_that_have_them(rows, unused_port, in_processes):
    """Two processes have 3 and 3 rows, or 4 and 3, as FSDP2 divides: the part begins in one and ends in the other."""
    in_processes(_sharded, 2, 2, unused_port, rows)


@pytest.fixture
def unused_port() -> int:
    import socket

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]
