"""How a method declares itself, and how it is found: every module of this package with a ``METHOD`` is one."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from torch import Tensor

from open_clip import CLIP
from training.engine.errors import UserError
from training.methods.base import Method
from training.teachers.build import Teacher
from training.teachers.describe import TeacherSpec

Embed = Callable[..., Tensor]


@dataclass(frozen=True)
class Setting:
    """What a run hands to a method that is being made.

    Attributes:
        student: the model that trains, on its device, locked as the flags say.
        teachers: those that the method asked for, by name; without those whose answers are kept.
        readout: name of the dense reading that is trained; None for the student's own.
        class_names: of the annotations' categories, by label; None without.
        embed: (names, teacher's name or None for the student) -> class embeddings ``[C, D]`` of unit length on the
            device; with None for the names those of ``class_names``, or of the file that a flag names.
        rank, world_size: this process among all.
    """

    student: CLIP
    teachers: Mapping[str, Teacher] = field(default_factory=dict)
    readout: str | None = None
    class_names: Sequence[str] | None = None
    embed: Embed | None = None
    rank: int = 0
    world_size: int = 1

    def common(self) -> dict[str, Any]:
        """What every region method is made with: student, teachers, readout and world size."""
        return {
            "student": self.student, "teachers": self.teachers, "readout": self.readout,
            "world_size": self.world_size,
        }  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """A training method, as the program sees it.

    Attributes:
        name: of ``--method``.
        summary: one line for ``--help``.
        options: frozen dataclass whose fields are the method's flags (:func:`training.engine.flags.flag`).
        build: (options, setting) -> the method.
        sources: dataset types that it can learn from; the first is the default.
        losses: names of its losses, as the log shows them.
        fields: options -> what samples must have besides image and boxes: ``crops``, ``labels``, ``captions``,
            ``region_captions``, ``classes``.
        teachers: options -> its teachers.
        readout: dense reading that it trains unless ``--readout`` says otherwise; None for the start model's own, which
            is the value path unless its weights name another.
        texts: whether it runs the student's text tower in each step.
        trains_texts: whether that tower trains.
        learns_from: options -> what people wrote about its data, besides boxes: ``class names`` (of each
            image), a :data:`~training.methods.names.LIST` of them, ``captions``.
        recipes: name -> command line that it stands for.
    """

    name: str
    summary: str
    options: type
    build: Callable[[Any, Setting], Method]
    sources: tuple[str, ...]
    losses: tuple[str, ...]
    fields: Callable[[Any], tuple[str, ...]] = lambda options: ()
    teachers: Callable[[Any], tuple[TeacherSpec, ...]] = lambda options: ()
    readout: str | None = None
    texts: bool = False
    trains_texts: bool = False
    learns_from: Callable[[Any], tuple[str, ...]] = lambda options: ()
    recipes: Mapping[str, str] = field(default_factory=dict)


@cache
def _own() -> dict[str, Entry]:
    found = {}
    for module in pkgutil.iter_modules(importlib.import_module(__package__).__path__):
        entry = getattr(importlib.import_module(f"{__package__}.{module.name}"), "METHOD", None)
        if entry is not None:
            found[entry.name] = entry
    return found


def list_methods() -> dict[str, Entry]:
    """All methods of this package by name, in alphabetical order."""
    return dict(sorted(_own().items()))


def find_method(name: str) -> Entry:
    """A method by name; a name with a dot is a module to import that has a ``METHOD``.

    Raises:
        UserError: there is none.
    """
    if "." in name:
        try:
            return importlib.import_module(name).METHOD
        except (ImportError, AttributeError) as error:
            raise UserError(f"--method {name}: no module with a METHOD ({error}); see docs/extending.md") from error
    if name not in _own():
        raise UserError(f"--method {name}: there is none of this name; use one of {', '.join(list_methods())}")
    return _own()[name]


def make_method(name: str, setting: Setting, **flags: Any) -> Method:
    """A method by name, for use from Python: ``make_method("clipself", setting, cosine_weight=2.0)``.

    Raises:
        TypeError: the method has no such flag.
    """
    entry = find_method(name)
    return entry.build(entry.options(**flags), replace(setting, readout=setting.readout or entry.readout))


def find_recipe(name: str) -> tuple[Entry, str]:
    """(method, command line) of a recipe. UserError when there is none."""
    recipes = {recipe: entry for entry in list_methods().values() for recipe in entry.recipes}
    if name not in recipes:
        raise UserError(f"--recipe {name}: there is none of this name; use one of {', '.join(sorted(recipes))}")
    return recipes[name], recipes[name].recipes[name]
