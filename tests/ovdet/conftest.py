"""What the tests of the detectors share."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from training.engine.loop import Task


class Killed(Exception):
    """As if the process had been killed."""


@pytest.fixture(scope="session")
def killed_before() -> Callable[[Task, int], AbstractContextManager[None]]:
    """``with killed_before(task, step):`` a run of the task ends right before the step, whatever has been saved."""

    @contextmanager
    def kill(task: Task, step: int) -> Iterator[None]:
        begin = task.begin_step

        def begin_step(micro: list, number: int) -> None:
            if number >= step:
                raise Killed
            begin(micro, number)

        task.begin_step = begin_step
        with pytest.raises(Killed):
            yield

    return kill


@pytest.fixture(scope="session")
def config_beside() -> Callable[..., Path]:
    """``config_beside(folder, text, **values)``: writes ``tiny.toml`` into the folder of generated scenes.

    It is the text and a section ``data`` that names the scenes, at 96 pixels, with further values.
    """

    def write(folder: Path, text: str, **values: Any) -> Path:
        data = {
            "train_annotations": str(folder / "annotations" / "instances_train2017.json"),
            "train_images": str(folder / "train2017"),
            "val_annotations": str(folder / "annotations" / "instances_val2017.json"),
            "val_images": str(folder / "val2017"),
            "novel": json.loads((folder / "annotations" / "split.json").read_text())["novel"],
            "image_size": 96,
            "workers": 0,
            "jitter": [0.8, 1.25],
            **values,
        }
        path = folder / "tiny.toml"
        path.write_text(text + "\n[data]\n" + "\n".join(f"{key} = {json.dumps(value)}" for key, value in data.items()))
        return path

    return write
