"""The loop with a toy task: a line is fitted, stopped, resumed, spoiled and evaluated."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from itertools import islice

import pytest
import torch
from torch import nn

import training.engine.loop as loop_module
from training.engine.checkpoint import find_latest, read_checkpoint
from training.engine.distributed import Dist
from training.engine.errors import EXIT_INTERRUPTED, UserError
from training.engine.journal import Pace
from training.engine.loop import Loop, LoopOptions, Task
from training.engine.optim import adamw, decay_groups
from training.engine.precision import make_precision
from training.engine.schedule import make_schedule, step_seed

CPU = Dist(0, 1, 0, torch.device("cpu"), False)


class Squares(nn.Module):
    """Squared error of a line behind batch norm, and whether it was small."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.line = nn.Sequential(nn.BatchNorm1d(1), nn.Linear(1, 1))

    def forward(self, batch: dict) -> dict[str, torch.Tensor]:
        error = (self.line(batch["x"]) - batch["y"]).square()
        return {"loss": error.mean() / batch["parts"], "small_sum": (error.detach() < 0.1).sum()}


class Line(Task):
    """y = 3 x, from ten batches of eight."""

    name, source, batches_per_epoch = "line", "the formula", 10

    def __init__(self, parts: int = 1) -> None:
        self.module, self.parts = Squares(), parts
        self.spoiled: dict[tuple[int, int], float] = {}  # (epoch, batch) -> what stands in its first input
        self.skipped: list[tuple[str, str]] = []
        self.evaluated: list[tuple[int, bool]] = []
        self.hook = lambda step: None

    def batches(self, epoch, start):
        for i in range(start, 10):
            x = torch.randn(8, 1, generator=torch.Generator().manual_seed(step_seed(epoch, i)))
            y = 3 * x
            x[0] = self.spoiled.get((epoch, i), x[0].item())
            yield {"x": x, "y": y, "parts": self.parts, "samples": 8 - len(self.skipped), "skipped": self.skipped,
                   "image_ids": [100 * epoch + i]}  # fmt: skip

    def optimizer(self):
        return adamw(decay_groups(self.module.named_parameters(), 0.01), lr=0.1)

    def schedule(self, total_steps, steps_per_epoch):
        return make_schedule("cosine", base=0.1, warmup=2, total=total_steps)

    def begin_step(self, micro, step):
        self.hook(step)

    def scalars(self, totals):
        return {"small": totals["small_sum"] / totals["samples"], "train/weight": self.module.line[1].weight.item()}

    def evaluate(self, progress, journal, *, start=False):
        self.evaluated.append((progress.step, start))
        journal.result({"epoch": progress.begun, "step": progress.step})

    def state(self):
        return {"state_dict": self.module.state_dict()}

    def load_state(self, content):
        self.module.load_state_dict(content["state_dict"])

    def identity(self):
        return {"formula": "y = 3 x"}

    def options(self):
        return {"parts": self.parts}

    def releases(self, progress):
        return {"line.pt": {"epoch": progress.epoch, "state_dict": self.module.state_dict()}}


def train(task, folder, *, resume=None, **options) -> int:
    folder.mkdir(exist_ok=True)
    options = {"epochs": 2, "batch_size": 8, "log_every": 1, **options}
    loop = Loop(task, LoopOptions(**options), dist=CPU, precision=make_precision("fp32", CPU.device))
    return loop.train(folder, resume)


@pytest.fixture(params=["at once", "a step late"])
def reading(request, monkeypatch) -> str:
    """When the numbers of a step are read: on a CPU at once, on a GPU while the next step is on its way."""
    monkeypatch.setitem(loop_module.LAG, "cpu", int(request.param == "a step late"))
    return request.param


def last(folder, name: str = "epoch_2.pt") -> dict:
    content = read_checkpoint(folder / "checkpoints" / name)
    assert content.pop("written") > 1.7e9  # the time of day, in which equal runs differ
    return content


def equal(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def test_it_learns_saves_and_evaluates(tmp_path, caplog):
    task = Line()
    with caplog.at_level("INFO"):
        assert train(task, tmp_path, epochs=12, keep=2, evaluate_every=5) == 0
    # y = 3 x, of inputs that batch norm makes standard: the slope is 3 standard deviations.
    batch_norm, linear = task.module.line
    slope = batch_norm.weight * linear.weight / batch_norm.running_var.sqrt()
    assert slope.item() == pytest.approx(3, 0.1)
    assert task.evaluated == [(0, True), (50, False), (100, False), (120, False)]
    assert sorted(f.name for f in (tmp_path / "checkpoints").iterdir()) == ["epoch_11.pt", "epoch_12.pt"]
    assert torch.load(tmp_path / "line.pt", weights_only=True)["epoch"] == 12
    lines = [r.getMessage() for r in caplog.records if " loss " in r.getMessage()]
    assert len(lines) == 120 and all("  small " in line and "left 0:0" in line for line in lines)
    assert list((tmp_path / "tensorboard").iterdir())


def test_accumulation_equals_one_large_batch(tmp_path):
    """Without batch norm, whose statistics are of micro-batches; the mean of means of equal batches is the mean."""
    weights = []
    for parts in (1, 2):
        task = Line(parts)
        task.module.line[0] = nn.Identity()
        whole = task.batches

        def joined(epoch, start, whole=whole):
            micro = list(whole(epoch, 0))
            for a, b in list(zip(micro[::2], micro[1::2], strict=True))[start:]:
                yield {**a, "x": torch.cat([a["x"], b["x"]]), "y": torch.cat([a["y"], b["y"]])}

        if parts == 1:
            task.batches, task.batches_per_epoch = joined, 5
        assert train(task, tmp_path / str(parts), accum_freq=parts) == 0
        weights.append(task.module.line[1].weight)
    torch.testing.assert_close(*weights, rtol=1e-6, atol=0)


@pytest.mark.parametrize("at", [0, 4, 9, 13])
def test_a_signal_saves_and_a_resumed_run_ends_the_same(tmp_path, at, reading):
    assert train(Line(), tmp_path / "whole") == 0
    task = Line()
    task.hook = lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == at else None
    assert train(task, tmp_path / "run", save_every_steps=3, log_every=50) == EXIT_INTERRUPTED
    stopped = find_latest(tmp_path / "run/checkpoints")[1]["step"]
    assert stopped == at + 1 or reading == "a step late" and stopped == at + 2
    assert train(Line(), tmp_path / "run", resume="latest") == 0
    assert equal(last(tmp_path / "run"), last(tmp_path / "whole"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_step_leaves_nothing_behind(tmp_path, value, reading):
    """Neither in weights nor in running statistics: as if it had not been, but for the schedule, which goes on."""
    task = Line()
    task.spoiled = {(0, 3): value}
    before, after = [], []
    task.hook = lambda step: {3: before, 4: after}.get(step, []).append(
        {k: v.clone() for k, v in task.module.state_dict().items()}
    )
    assert train(task, tmp_path, log_every=50) == 0
    assert equal(before[0], after[0]) and before[0]["line.0.num_batches_tracked"] == 3
    assert all(torch.isfinite(v).all() for v in last(tmp_path)["state_dict"].values())
    assert {float(s["step"]) for s in last(tmp_path)["optimizer"]["state"].values()} == {19.0}


def test_bad_steps_in_a_row_stop_the_run_and_are_counted_over_a_resume(tmp_path, reading):
    def spoiled():
        task = Line()
        task.spoiled = {(0, i): float("nan") for i in range(4, 9)}
        return task

    with pytest.raises(UserError, match=r"3 steps in a row, lastly of images \[6\].*last good .*step_6.pt"):
        train(spoiled(), tmp_path / "a", max_bad_steps=3, save_every_steps=3)
    task = spoiled()
    task.hook = lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 5 else None
    assert train(task, tmp_path / "b", max_bad_steps=3) == EXIT_INTERRUPTED
    found = find_latest(tmp_path / "b/checkpoints")[1]
    assert found["bad_steps"] == found["step"] - 4 and found["step"] in (6, 7)
    with pytest.raises(UserError, match=r"3 steps in a row, lastly of images \[6\]"):
        train(spoiled(), tmp_path / "b", max_bad_steps=3, resume="latest")


def test_too_many_unusable_samples_stop_the_run(tmp_path):
    task = Line()
    task.skipped = [("a.jpg", "the file is empty")]
    assert train(task, tmp_path / "a", max_skipped=0.125) == 0
    with pytest.raises(UserError, match="9 of 72 samples of the formula .* --max-skipped 0.1 allows"):  # 8 of 80 may be
        train(task, tmp_path / "b", max_skipped=0.1)


class Holes(Line):
    """One sample is missing in some of the batches."""

    def __init__(self, holes) -> None:
        super().__init__()
        self.holes = holes

    def batches(self, epoch, start):
        for i, batch in enumerate(super().batches(epoch, start), start):
            yield batch | ({"samples": 7, "skipped": [("a.jpg", "gone")]} if i in self.holes else {})


@pytest.mark.parametrize("of_a_former_version", [False, True])
def test_unusable_samples_are_counted_over_a_resume(tmp_path, of_a_former_version, reading):
    """Interrupted a step before the end of an epoch; what is left of it is a handful, of which no share is judged."""

    def interrupted(holes, allowed):
        task, at, bad = Holes(holes), 8 if reading == "at once" else 7, len(holes - {9})
        task.hook = lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == at else None
        assert train(task, tmp_path, epochs=1, max_skipped=allowed, log_every=50) == EXIT_INTERRUPTED
        (file,) = (tmp_path / "checkpoints").iterdir()
        content = torch.load(file, weights_only=True)
        assert (content["step"], content["usable"], content["skipped"]) == (9, 72 - bad, bad)
        if of_a_former_version:
            torch.save({k: v for k, v in content.items() if k not in ("usable", "skipped")}, file)

    interrupted({9}, 0.1)
    assert train(Holes({9}), tmp_path, epochs=1, resume="latest", max_skipped=0.1) == 0  # 1 of 80, and of the last 8
    assert [last(tmp_path, "epoch_1.pt")[name] for name in ("usable", "skipped")] == [0, 0]
    if of_a_former_version:
        return
    (tmp_path / "checkpoints/epoch_1.pt").unlink()
    interrupted({5, 6, 7, 8, 9}, 0.05)
    with pytest.raises(UserError, match="5 of 80 samples"):
        train(Holes({5, 6, 7, 8, 9}), tmp_path, epochs=1, resume="latest", max_skipped=0.05)


@pytest.fixture
def paces(monkeypatch) -> list:
    """What the loop's lines of the log are means of: (samples, seconds of waiting for data, seconds) of each step."""
    noted, original = [], Pace.add
    monkeypatch.setattr(Pace, "add", lambda self, *step: noted.append(step) or original(self, *step))
    return noted


def test_all_samples_are_in_the_speed(tmp_path, paces, reading):
    """Also those of steps that are read together with a later one."""
    assert train(Line(), tmp_path, log_every=5) == 0
    assert [sum(samples for samples, *_ in paces[i : i + 5]) for i in range(0, 20, 5)] == [40] * 4


def test_saving_is_no_waiting_for_data(tmp_path, paces):
    task = Line()
    task.before_saving = lambda: time.sleep(0.2)
    assert train(task, tmp_path, save_every_steps=1, max_steps=5) == 0
    assert sum(waited for _, waited, _ in paces) < 0.2 and sum(whole for *_, whole in paces) < 0.6


def test_what_a_report_needs_is_asked_for_before_the_run(tmp_path, monkeypatch):
    for report, module in (("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(UserError, match=f"--report-to {report}: {report} is not installed.*pip install {report}"):
            Loop(Line(), LoopOptions(epochs=1, batch_size=8, report_to=report), dist=CPU,
                 precision=make_precision("fp32", CPU.device))  # fmt: skip
    assert train(Line(), tmp_path, max_steps=1, report_to="none") == 0


def test_a_report_that_fails_on_one_process_ends_all(two_processes, tmp_path):
    two_processes(f"""
    import sys, types
    from pathlib import Path
    import pytest
    from training.engine.errors import UserError
    from training.engine.journal import Journal

    def init(**settings):
        raise RuntimeError("No API key configured.\\nUse wandb login")

    sys.modules["wandb"] = types.SimpleNamespace(init=init)
    with pytest.raises(UserError, match="--report-to wandb: No API key configured. Use wandb login; mend it"):
        Journal(Path({str(tmp_path)!r}) if dist.is_master else None, report_to="wandb")
    """)


@pytest.mark.parametrize("run", [{"epochs": 1, "profile": 50}, {"max_steps": 5, "profile": 10}])
def test_a_profile_is_written_where_the_run_ends_before(tmp_path, run):
    assert train(Line(), tmp_path, **run) == 0
    assert json.loads((tmp_path / "profile/trace.json").read_text())["traceEvents"]
    assert "aten::" in (tmp_path / "profile/operators.txt").read_text()


def test_a_profile_that_does_not_begin_says_so_and_follows_in_the_next_epoch(tmp_path, caplog):
    assert train(Line(), tmp_path / "short", max_steps=2, profile=3) == 0
    assert "no profile yet: an epoch ended after 2 of the first 3 micro-batches" in caplog.text
    task = Line()
    whole = task.batches
    task.batches_per_epoch, task.batches = 2, lambda epoch, start: islice(whole(epoch, start), 2)
    assert train(task, tmp_path / "epochs", profile=3) == 0
    assert (tmp_path / "epochs/profile/trace.json").is_file() and not (tmp_path / "short/profile").exists()


def test_resume_refuses_another_run(tmp_path):
    task = Line()
    task.hook = lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 4 else None
    assert train(task, tmp_path) == EXIT_INTERRUPTED
    with pytest.raises(UserError, match="inside an epoch of 8 samples a step, now there are 16"):
        train(Line(), tmp_path, resume="latest", batch_size=16)
    other = Line()
    other.identity = lambda: {"formula": "y = 4 x"}
    with pytest.raises(UserError, match="formula was 'y = 3 x', now it is 'y = 4 x'"):
        train(other, tmp_path, resume="latest")
    other = Line()
    other.name = "parabola"
    with pytest.raises(UserError, match="is of line, not of parabola"):
        train(other, tmp_path, resume="latest")
    wide = Line()
    wide.module.line[1] = nn.Linear(1, 2)
    with pytest.raises(UserError, match="does not fit this run"):
        train(wide, tmp_path, resume="latest")
    with pytest.raises(UserError, match="no step, optimizer: .* start from them instead"):
        train(Line(), tmp_path, resume=tmp_path / "line.pt")


@pytest.mark.parametrize("steers", [False, True])
@pytest.mark.parametrize("ending", [{}, {"max_steps": 15}], ids=["after its epochs", "inside an epoch"])
def test_an_evaluation_that_was_broken_off_is_made_up_for(tmp_path, ending, steers):
    class Broken(Line):
        def evaluate(self, progress, journal, *, start=False):
            if progress.epoch:
                raise KeyboardInterrupt
            super().evaluate(progress, journal, start=start)

    def resumed(**more) -> list[int]:
        task = Line()
        task.evaluations_steer = steers
        assert train(task, tmp_path, resume="latest", **ending, **more) == 0
        return [step for step, _ in task.evaluated]

    end = ending.get("max_steps", 20)
    with pytest.raises(KeyboardInterrupt):
        train(Broken(), tmp_path, evaluate_every=1, **ending)  # after the first epoch
    assert resumed(evaluate_every=1) == [10, end]
    assert resumed(evaluate_every=1) == ([end] if steers else [])  # all are known
    (tmp_path / "results.json").unlink()
    assert resumed(evaluate_every=0) == [end]
    (tmp_path / "results.json").unlink()
    assert resumed(evaluate_every=0, evaluate_last=False) == []


def test_resume_names_changed_options_and_follows_them(tmp_path, caplog):
    assert train(Line(), tmp_path, epochs=1) == 0
    task = Line()
    task.options = lambda: {"parts": 7}
    made = []
    task.optimizer = lambda: made.append(adamw(decay_groups(task.module.named_parameters(), 0.3), lr=0.1)) or made[0]
    assert train(task, tmp_path, resume="latest") == 0
    assert "resuming with another parts: it was 1, now it is 7" in caplog.text
    assert [group["weight_decay"] for group in made[0].param_groups] == [0.0, 0.3]


def test_a_run_that_is_given_more_steps_goes_on_inside_its_epoch(tmp_path):
    """Ended at step 13 and at 15 of epochs of 10 steps, then not at all: the batches and weights of one run."""
    seen = []

    class Watched(Line):
        def batches(self, epoch, start):
            for batch in super().batches(epoch, start):
                seen.append(batch["image_ids"][0])
                yield batch

        def schedule(self, total_steps, steps_per_epoch):  # other ones follow the number of steps
            return lambda step, epoch: 0.1

    assert train(Watched(), tmp_path / "whole", epochs=3) == 0
    whole = list(seen)
    seen.clear()
    for steps in (13, 15, 0):
        assert train(Watched(), tmp_path / "parts", epochs=3, max_steps=steps, resume="latest") == 0
    assert seen == whole and len(whole) == 30
    one, other = (last(tmp_path / name, "epoch_3.pt") for name in ("whole", "parts"))
    assert all(torch.equal(v, other["state_dict"][k]) for k, v in one["state_dict"].items())
    assert [other[k] for k in ("epoch", "step_in_epoch", "step")] == [3, 0, 30]


@pytest.mark.parametrize("name", ["bf16", "pure_bf16"])
def test_weights_in_half_precision_are_refused(name):
    precision = make_precision(name, CPU.device)
    with pytest.raises(UserError, match=f"--precision {name} keeps the weights in half precision.*amp_bf16"):
        Loop(Line(), LoopOptions(epochs=1, batch_size=8), dist=CPU, precision=precision)


def test_steps_end_a_run(tmp_path):
    assert train(Line(), tmp_path, max_steps=13) == 0
    content = last(tmp_path)
    assert (content["step"], content["epoch"], content["step_in_epoch"]) == (13, 1, 3)
    assert (tmp_path / "checkpoints" / "epoch_2.pt").is_file()
    with pytest.raises(UserError, match="--accum-freq 11 exceeds an epoch's 10 batches"):
        train(Line(), tmp_path, accum_freq=11)
    task = Line()
    task.module.requires_grad_(False)
    with pytest.raises(UserError, match="nothing trains"):
        train(task, tmp_path)
