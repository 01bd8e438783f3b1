"""Averages over the data sets of ODinW, and the files of its leader board."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ovdet.glip.data.odinw import ODINW13
from training.engine.errors import UserError
from training.engine.files import write_json


def averages(results: Mapping[str, Mapping[str, float]], metric: str = "AP") -> dict[str, float]:
    """Mean of a metric over all data sets, and over the paper's thirteen where all of them are there."""
    if not results:
        raise UserError("there is no result of any data set to average")
    values = {name: metrics[metric] for name, metrics in results.items()}
    means = {f"{metric} of {len(values)} sets": sum(values.values()) / len(values)}
    if set(ODINW13) <= set(values) and len(values) != len(ODINW13):
        means[f"{metric} of {len(ODINW13)} sets"] = sum(values[name] for name in ODINW13) / len(ODINW13)
    return means


def write_leader_board(path: Path, detections: Mapping[str, Any], *, seeds: Sequence[int] | None = None) -> None:
    """The file that is handed in: data set to COCO results; for few shots data set to seed to results.

    Args:
        detections: data set to results (zero shot, all data), or to a dict from seed to results.
        seeds: with few shots, the seeds that every data set must have.

    Raises:
        UserError: a seed is missing, or the file cannot be written.
    """
    content: dict[str, Any] = {}
    for name, results in detections.items():
        if seeds is None:
            content[name] = list(results)
            continue
        missing = [seed for seed in seeds if seed not in results]
        if missing:
            raise UserError(f"{path}: data set {name} has no results of seed {missing[0]}: run it before")
        content[name] = {str(seed): list(results[seed]) for seed in seeds}
    write_json(path, content)


def format_averages(results: Mapping[str, Mapping[str, float]], metric: str = "AP") -> str:
    """A line for each data set and for the averages, in percent."""
    rows = [*((name, metrics[metric]) for name, metrics in sorted(results.items())), *averages(results, metric).items()]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {100 * value:6.2f}" for name, value in rows)
