"""Full sharding on two processes: the same training as without, exact resuming, damaged parts."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import pytest
import torch

from training.engine import shards
from training.engine.checkpoint import find_latest, prune, read_checkpoint, remove_unfinished
from training.engine.errors import UserError

TESTS = Path(__file__).parent
COMMON = f"""
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {str(TESTS)!r})
import torch
from torch import nn
from test_loop import Line, equal
from training.engine.checkpoint import find_latest, read_checkpoint
from training.engine.errors import EXIT_INTERRUPTED, UserError
from training.engine.loop import Loop, LoopOptions
from training.engine.precision import make_precision
from training.engine.sharding import whole_state

class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(1, 7), nn.Linear(7, 1)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(7, 5), nn.GELU(), nn.Linear(5, 7)) for _ in range(3))
        self.scale = nn.Parameter(torch.tensor(1.0))

    def read(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return self.last(x) * self.scale

    def forward(self, batch):
        error = (self.read(batch["x"]) - batch["y"]).square()
        return {{"loss": error.mean() / batch["parts"], "small_sum": (error.detach() < 0.1).sum()}}

class Divided(Line):
    def __init__(self, parts=2):
        super().__init__(parts)
        self.module = Deep()
        self.seen = []

    def batches(self, epoch, start):
        for i, batch in enumerate(super().batches(epoch, start), start):
            share = slice(4 * dist.rank, 4 * dist.rank + 4)  # each process has half of the eight
            yield batch | {{"x": batch["x"][share], "y": batch["y"][share], "samples": 4}}

    def blocks(self):
        return list(self.module.blocks)

    def scalars(self, totals):
        return {{"scale": self.module.scale.item()}}

    def evaluate(self, progress, journal, *, start=False):
        with torch.inference_mode():
            self.seen.append(self.inside(lambda: self.module.read(torch.ones(1, 1)).item()))

    def releases(self, progress):
        state = whole_state(self.module.state_dict(), keep=dist.is_master)
        return {{"line.pt": {{"epoch": progress.epoch, "state_dict": state}}}} if dist.is_master else {{}}

def train(task, folder, *, resume=None, **options):
    Path(folder).mkdir(exist_ok=True)
    usual = {{"epochs": 2, "batch_size": 4, "accum_freq": 2, "log_every": 1, "clip_norm": 2.0, "fsdp": True}}
    loop = Loop(task, LoopOptions(**usual | options), dist=dist, precision=make_precision("fp32", dist.device))
    return loop.train(Path(folder), resume)
"""


def test_sharded_training_equals_replicated_and_resumes_exactly(two_processes, tmp_path):
    two_processes(COMMON + f"""
tmp = Path({str(tmp_path)!r})
replicated, divided = Divided(), Divided()
assert train(replicated, tmp / "replicated", fsdp=False) == 0
assert train(divided, tmp / "whole") == 0
a, b = (torch.load(tmp / name / "line.pt", weights_only=True)["state_dict"] for name in ("replicated", "whole"))
for name, value in a.items():
    torch.testing.assert_close(b[name], value, rtol=1e-5, atol=1e-6)
assert len(divided.seen) == 3 and all(abs(x - y) < 1e-5 for x, y in zip(divided.seen, replicated.seen))
weight = divided.module.blocks[0][0].weight
assert hasattr(weight, "full_tensor") and weight.to_local().shape[0] in (2, 3)

for at in (1, 4, 7):
    task = Divided()
    task.hook = lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == at and dist.rank == 1 else None
    folder = tmp / f"run{{at}}"
    assert train(task, folder, save_every_steps=2) == EXIT_INTERRUPTED
    task = Divided()
    assert train(task, folder, resume="latest") == 0
    resumed = torch.load(folder / "line.pt", weights_only=True)["state_dict"]
    assert equal(resumed, b), at
    # The optimizer's moments as well: one more epoch from each.
    for name in ("whole", f"run{{at}}"):
        assert train(Divided(), tmp / name, resume="latest", epochs=3) == 0
    ends = [torch.load(tmp / name / "line.pt", weights_only=True) for name in ("whole", f"run{{at}}")]
    assert equal(*ends) and ends[0]["epoch"] == 3
    assert sorted(f.name for f in (folder / "checkpoints").iterdir()) == [f"epoch_{{i}}.shards" for i in (1, 2, 3)]
    import shutil
    torch.distributed.barrier()
    if dist.is_master:
        shutil.rmtree(tmp / "whole/checkpoints/epoch_3.shards")
    torch.distributed.barrier()

# From a sharded checkpoint to a run without sharding, and the other way round.
whole = torch.load(tmp / "run1/line.pt", weights_only=True)["state_dict"]
for name, source, fsdp in (("a", tmp / "run1/checkpoints/epoch_2.shards", False),
                           ("b", tmp / "replicated/checkpoints/epoch_2.pt", True)):
    assert train(Divided(), tmp / name, resume=str(source), epochs=3, fsdp=fsdp) == 0
    for key, value in torch.load(tmp / name / "line.pt", weights_only=True)["state_dict"].items():
        torch.testing.assert_close(value, whole[key], rtol=1e-4, atol=1e-5)

wide = Divided()
wide.module.extra = nn.Linear(3, 3)
try:
    train(wide, tmp / "run1", resume="latest")
    raise AssertionError
except UserError as error:
    assert "does not fit this run (it differs in 2 tensors" in str(error), error
""", seconds=240)  # fmt: skip


def test_outside_of_a_step_passes_may_differ(two_processes):
    """Of a part of the module as well; afterwards blocks are gathered one at a time, and train, as before."""
    two_processes(COMMON + """
from training.engine.sharding import Sharded, is_divided, is_sharded, most_of_processes

whole, task = Deep(), Divided()
task.module.other = Deep()
task.blocks = lambda: [*task.module.blocks, *task.module.other.blocks]
module, model = task.module, Sharded(task, dist)
x = torch.ones(2, 1)
with torch.no_grad():
    expected = whole.read(x)
first, other = module.blocks[0], module.other.blocks[0]
batch = next(task.batches(0, 0))
loss = model(batch)["loss"].item()

for passes in ((3, 1), (0, 2)):
    said = model.inside(lambda: [module.read(x) for _ in range(passes[dist.rank])])
    assert len(said) == passes[dist.rank] and all(torch.allclose(s, expected) for s in said)
    assert is_sharded(first[0].weight) and model(batch)["loss"].item() == loss

def look():
    assert not is_sharded(first[0].weight) and is_sharded(other[0].weight)
    raise ZeroDivisionError

try:
    model.inside(look, module.blocks)
    raise AssertionError
except ZeroDivisionError:
    assert is_sharded(first[0].weight)

assert is_divided(module) and is_divided(first) and not is_divided(whole)
assert most_of_processes(5 - dist.rank, dist.device) == 5
model(batch)["loss"].backward()
assert all(is_sharded(p.grad) for p in module.blocks.parameters())
""")  # fmt: skip


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A checkpoint as a single process writes it."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    tensors = {"model/a": torch.arange(6.0).view(2, 3), "optimizer/a/step": torch.tensor(7.0)}
    meta = {"epoch": 1, "step": 2, "state_dict": {}, "optimizer": {}}
    for name in ("epoch_0_step_1.shards", "epoch_1.shards"):
        shards.write_shards(folder / name, tensors, meta, rank=0, folder_flag="--logs")
    return folder / "epoch_1.shards"


def test_damaged_parts_are_passed_over(checkpoint, caplog):
    assert find_latest(checkpoint.parent)[0] == checkpoint
    part = next(f for f in checkpoint.iterdir() if f.suffix == ".distcp")
    good = part.read_bytes()
    for damage in (good[:-1], good[:100] + b"x" + good[101:], None):
        part.unlink()
        if damage is not None:
            part.write_bytes(damage)
        with pytest.raises(UserError, match="epoch_1.shards is damaged"):
            read_checkpoint(checkpoint)
        assert find_latest(checkpoint.parent)[0].name == "epoch_0_step_1.shards"
        part.write_bytes(good)
    (checkpoint / shards.META).unlink()
    with pytest.raises(UserError, match="has no meta.pt"):
        read_checkpoint(checkpoint)


def test_leftovers_and_pruning(checkpoint):
    folder = checkpoint.parent
    (folder / ".epoch_2.shards.4711").mkdir()
    remove_unfinished(folder)
    prune(folder, 0, "epoch_*_step_*")
    assert [f.name for f in folder.iterdir()] == ["epoch_1.shards"]


def test_a_table_of_contents_that_runs_code_is_refused(checkpoint):
    table = checkpoint / ".metadata"
    values = {"model/a": torch.zeros(2, 3)}
    shards.load_tensors(checkpoint, values)
    assert values["model/a"].tolist() == [[0, 1, 2], [3, 4, 5]]
    marker = checkpoint / "code_ran"

    class Evil:
        def __reduce__(self):
            return Path.touch, (marker,)

    content = pickle.loads(table.read_bytes())
    content.planner_data = Evil()
    buffer = io.BytesIO()
    pickle.dump(content, buffer)
    table.write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match="has no place in a checkpoint"):
        shards.load_tensors(checkpoint, values)
    assert not marker.exists()


def test_a_failed_write_leaves_the_former_checkpoint(checkpoint, monkeypatch):
    import torch.distributed.checkpoint as dcp

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dcp, "save", full)
    before = {f: f.read_bytes() for f in checkpoint.iterdir()}
    with pytest.raises(UserError, match="cannot be written .*No space left"):
        shards.write_shards(checkpoint, {}, {}, rank=0, folder_flag="--logs")
    assert before == {f: f.read_bytes() for f in checkpoint.iterdir()}
