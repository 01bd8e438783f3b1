"""Learning rates against recorded ones, and the ends of each curve."""

from __future__ import annotations

import json

import pytest
import torch

from training.engine.schedule import make_schedule, set_lr

KEYS = {"w": "warmup", "t": "total", "c": "cooldown", "p": "power", "e": "end"}


def settings_of(name: str) -> tuple[str, dict[str, float]]:
    """Kind and settings of a recorded curve by its name, such as ``cooldown_w5_t50_c30_p2_e1e-6``."""
    kind, *parts = name.split("_")
    settings = {KEYS[part[0]]: float(part[1:]) if part[0] in "pe" else int(part[1:]) for part in parts}
    return {"cooldown": "const-cooldown"}.get(kind, kind), settings


@pytest.mark.recorded("train/schedules.json", "cosine.*|const.*|cooldown.*")
def test_rates_are_the_recorded_ones(golden, case):
    rates = json.loads((golden / "train" / "schedules.json").read_text())[case]
    kind, settings = settings_of(case)
    # The base rate is not in the name: it is the rate at the end of the warm-up.
    schedule = make_schedule(kind, base=rates[settings["warmup"]], **{"total": len(rates), **settings})
    for step, rate in enumerate(rates):
        assert schedule(step) == pytest.approx(rate, rel=1e-12, abs=0), step


def test_short_runs_have_a_rate_at_every_step():
    """Warm-up as long as the run or longer, and a cooldown over all of it."""
    for kind in ("cosine", "const", "const-cooldown"):
        for warmup, total in ((0, 1), (5, 5), (1000, 20)):
            schedule = make_schedule(kind, base=1e-3, warmup=warmup, total=total, cooldown=total)
            assert all(0 < schedule(step) <= 1e-3 for step in range(total)), (kind, warmup, total)


def test_unknown_schedule_is_named():
    with pytest.raises(ValueError, match='"linear".*cosine'):
        make_schedule("linear", base=1.0, warmup=0, total=1)


def test_every_group_gets_the_rate():
    groups = [{"params": [torch.zeros(1, requires_grad=True)]} for _ in range(2)]
    optimizer = torch.optim.AdamW(groups, lr=1.0)
    set_lr(optimizer, 0.25)
    assert [g["lr"] for g in optimizer.param_groups] == [0.25, 0.25]
