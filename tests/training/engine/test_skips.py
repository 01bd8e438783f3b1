"""How many unusable samples end an epoch: exactly at its end, and before it only what leaves no doubt."""

from __future__ import annotations

import numpy as np
import pytest

from training.engine.errors import UserError
from training.engine.skips import SkipPolicy

EPOCH, STEP = 2000, 8


def stopped_at(bad: int, seed: int, allowed: float = 0.1, **how) -> int | None:
    """Samples that had been seen when an epoch with so many unusable ones, in random order, was ended; None if not."""
    policy = SkipPolicy("the formula", allowed, whole=EPOCH, **how)
    order = np.random.default_rng(seed).permutation(EPOCH) < bad
    for seen, unusable in enumerate(order.reshape(-1, STEP).sum(1), 1):
        policy.count(STEP - unusable, unusable)
        try:
            policy.judge()
        except UserError:
            return STEP * seen
    return None


def test_half_of_what_is_allowed_never_ends_an_epoch():
    assert {stopped_at(EPOCH // 20, seed) for seed in range(300)} == {None}


def test_twice_what_is_allowed_ends_it_early():
    assert max(stopped_at(EPOCH // 5, seed) or EPOCH for seed in range(100)) <= EPOCH // 2
    assert stopped_at(EPOCH, 0) == 32


def test_at_the_end_it_is_exact():
    ends = [stopped_at(EPOCH // 10, seed) for seed in range(100)]
    assert ends.count(None) >= 98  # what is beyond four standard deviations somewhere on the way is no accident
    assert all(stopped_at(EPOCH // 10 + 1, seed) for seed in range(100))


def test_what_was_counted_is_all_there_is():
    policy = SkipPolicy("the formula", 0.1, "--share")
    policy.count(9, 1)
    policy.judge(at_end=True)
    policy.count(8, 1)
    with pytest.raises(UserError, match="2 of 19 samples of the formula could not be used, more than --share 0.1"):
        policy.judge(at_end=True)
    policy.reset()
    policy.judge(at_end=True)  # of nothing
