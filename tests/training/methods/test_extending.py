"""docs/extending.md, literally: its method is a file that the program finds, trains and tests."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

import training.methods as package
from open_clip.factory import build_model
from training.methods import Setting, list_methods, make_method, registry
from training.teachers.build import build_teacher
from training.teachers.describe import TeacherSpec

TEXT = (Path(__file__).parents[3] / "docs/extending.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


@pytest.fixture
def areas(tmp_path, monkeypatch):
    """The page's method, as if its file stood beside the others."""
    source = next(b for b in blocks("python") if "src/training/methods/areas.py" in b)
    (tmp_path / "areas.py").write_text(source)
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    registry._own.cache_clear()
    yield tmp_path
    registry._own.cache_clear()
    sys.modules.pop("training.methods.areas", None)


def test_the_program_finds_and_trains_it(areas, program, capsys):
    assert "areas" in list_methods() and len(list_methods()) > 10
    command = next(b for b in blocks("bash") if "--method areas" in b)
    flags = shlex.split(command.split("training.main ")[1].split("--train-data")[0])
    assert program(*flags, name="run", epochs=1) == 0
    log = (program.logs / "run/out.log").read_text()
    assert "distance 0." in log and "method: areas" in (program.logs / "run/params.txt").read_text()
    assert program(name="other", area_power=1.0) == 2  # CLIPSelf has no such flag
    assert "--area-power is a flag of --method areas, not of clipself" in capsys.readouterr().err
    assert program("--method", "areas", name="other", area_power=-1) == 2
    assert "--area-power" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        program("--method", "areas", "--help")
    assert "regions count by this power of their area (0.5)" in capsys.readouterr().out
    assert program("--recipe", "areas-b16", name="other", model="no-such-model") == 2
    assert "no-such-model" in capsys.readouterr().err


def test_its_own_test_holds(areas):
    source = next(b for b in blocks("python") if "test_areas.py" in b)
    space = {"make_method": make_method, "Setting": Setting, "torch": torch, "pytest": pytest}
    exec(source, space)
    torch.manual_seed(0)
    sizes = {"image_size": 32, "layers": 2, "width": 48, "head_width": 12, "patch_size": 8}
    text = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}
    student, teacher = (build_model({"embed_dim": 24, "vision_cfg": sizes, "text_cfg": text}) for _ in range(2))
    teachers = {"crops": build_teacher(TeacherSpec("crops", source="crops", emits="embedding"), teacher, image_size=64)}
    boxes = [torch.tensor([[0.1, 0.1, 0.9, 0.5], [0.0, 0.0, 0.2, 0.2]]), torch.tensor([[0.3, 0.0, 1.0, 1.0]])]
    batch = {"images": torch.randn(2, 3, 64, 64), "crops": torch.randn(3, 3, 32, 32), "boxes": boxes}
    space["test_areas"](student, teachers, batch)


def test_a_module_elsewhere_is_a_method_too(areas, program, monkeypatch, tmp_path):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "mine.py").write_text((areas / "areas.py").read_text())
    monkeypatch.syspath_prepend(str(tmp_path))
    assert program("--method", "elsewhere.mine", name="run", epochs=1) == 0
    assert (program.logs / "run/checkpoints/clipself.pt").is_file()
