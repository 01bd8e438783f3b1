"""Configs of detectors: TOML files that inherit, read into typed sections; ``section.key=value`` overrides a value.

A detector's config is a dataclass that derives from :class:`Config` and whose fields are its sections, dataclasses of
plain values. A file may start with ``inherit = "other.toml"`` (or a list of files), relative to itself; later values
win.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import logging
import math
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib  # type: ignore[no-redef]

log = logging.getLogger(__name__)

_CHECKOUT = Path(__file__).resolve().parents[2]  # the repository, where the package is used from a clone


@dataclass
class Config:
    """What all configs have: the file that it was read from. Fields whose type is a dataclass are sections."""

    path: str = ""

    @classmethod
    def sections(cls) -> dict[str, type]:
        """Sections by name."""
        hints = typing.get_type_hints(cls)
        return {f.name: hints[f.name] for f in dataclasses.fields(cls) if dataclasses.is_dataclass(hints[f.name])}

    def check(self) -> Iterable[tuple[str, Any, bool, str]]:
        """Rules that the types do not say: (name of the value, value, whether it is right, what it must be)."""
        return ()

    def locate(self, path: str) -> str:
        """Where a relative path of this config leads.

        The path as it stands where it is empty, absolute, a URL or exists in the working folder; else below the first
        folder, from the config file's own upwards, that holds it; else below the clone that the package is used from.
        """
        if not path or "://" in path or Path(path).is_absolute() or Path(path).exists():
            return path
        around = [*Path(self.path).resolve().parents] if self.path else []
        for folder in (*around, _CHECKOUT):
            if (folder / path).exists():
                return str(folder / path)
        return path


C = TypeVar("C", bound=Config)


def load_config(kind: type[C], path: str | Path, overrides: Sequence[str] = ()) -> C:
    """Read a config file and apply overrides.

    Args:
        kind: the detector's config, such as :class:`ovdet.fvit.config.FViTConfig`.
        path: a TOML file; ``inherit`` names files to start from.
        overrides: ``"section.key=value"``, value in TOML (``data.jitter=[0.5, 1.5]``); text needs no quotes.

    Raises:
        FileNotFoundError: the file, or one that it inherits, does not exist.
        ValueError: not TOML, an unknown section or key (with close matches), or a value of another type or range.
    """
    return _finish(_fill(kind(), _read(Path(path), ()), str(path)), str(path), overrides)


def config_from_dict(
    kind: type[C],
    values: dict[str, dict[str, Any]],
    *,
    source: str = "config",
    near: str = "",
    overrides: Sequence[str] = (),
) -> C:
    """A config from ``{section: {key: value}}``. Raises as :func:`load_config`.

    Args:
        source: stands in messages; near: the file around which relative paths are looked for.
    """
    return _finish(_fill(kind(), values, source), near, overrides, source)


def config_to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """``{section: {key: value}}`` of plain values, for checkpoints; :func:`config_from_dict` takes it back."""
    return {section: dataclasses.asdict(getattr(config, section)) for section in config.sections()}


def differing_settings(
    trained: Config, config: Config, which: Mapping[str, Sequence[str]], but: Sequence[str] = ()
) -> list[str]:
    """Settings in which a config differs from the one that weights were trained with.

    Args:
        which: section -> its keys that count; none: all of them.
        but: keys that do not, such as where weights are.

    Returns:
        Overrides with the values of the training: ``model.anchor_offset=0.5``.
    """
    then, now = config_to_dict(trained), config_to_dict(config)
    found = []
    for section, keys in which.items():
        for key in keys or then[section]:
            if key not in but and then[section][key] != now[section][key]:
                found.append(f"{section}.{key}={_toml(then[section][key])}")
    return found


def warn_of(differing: Sequence[str], path: str | Path) -> None:
    """Say in the log in which settings a checkpoint was trained otherwise than the config at hand has them."""
    if differing:
        log.warning("%s was trained with %s; the config at hand differs there", path, " ".join(differing))


def format_config(config: Config) -> str:
    """The complete config as TOML text that :func:`load_config` reads."""
    lines = []
    for section, entries in config_to_dict(config).items():
        lines += [f"[{section}]", *(f"{key} = {_toml(value)}" for key, value in entries.items()), ""]
    return "\n".join(lines)


def _toml(value: Any) -> str:
    """TOML of a plain value: json's, but for numbers that are not finite and control characters."""
    if isinstance(value, list):
        return f"[{', '.join(_toml(v) for v in value)}]"
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    # Characters stand for themselves: json would write those beyond 16 bits as two halves, which TOML refuses.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007F")


def _fill(config: C, values: dict[str, Any], source: str) -> C:
    sections = config.sections()
    for section, entries in values.items():
        if section not in sections:
            raise ValueError(f'{source}: section "{section}" is unknown{_near(section, sections)}')
        if not isinstance(entries, dict):
            raise ValueError(f"{source}: {section} must be a section ([{section}]), not a value")
        for key, value in entries.items():
            _assign(config, section, key, value, source)
    return config


def _finish(config: C, path: str, overrides: Sequence[str], source: str = "") -> C:
    config.path = path
    for override in overrides:
        _override(config, override)
    for name, value, good, wanted in config.check():
        if not good:
            raise ValueError(f"{source or path or 'config'}: {name} is {value!r}, but must be {wanted}")
    return config


def _read(path: Path, children: tuple[Path, ...]) -> dict[str, Any]:
    """Values of a file over those it inherits; ``children`` are the files that led here."""
    by = f" (inherited by {children[-1]})" if children else ""
    if not path.is_file():
        raise FileNotFoundError(f"config {path}{by} does not exist: give the path of a .toml file")
    if path.resolve() in children:
        raise ValueError(f"config {path}{by} inherits itself: remove one of the inherit lines")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"config {path} is no text: the CONFIG (.toml) comes first, then the CHECKPOINT") from error
    except (tomllib.TOMLDecodeError, ValueError, RecursionError) as error:
        raise ValueError(f"config {path} is not TOML: {str(error)[:200]}") from error
    except OSError as error:
        raise ValueError(f"config {path} cannot be read: {error.strerror}") from error
    parents = values.pop("inherit", [])
    parents = [parents] if isinstance(parents, str) else parents
    if not isinstance(parents, list) or not all(isinstance(parent, str) for parent in parents):
        raise ValueError(f"config {path}: inherit is {parents!r}, but must be a file name or a list of them")
    merged: dict[str, Any] = {}
    for layer in [*(_read(path.parent / parent, (*children, path.resolve())) for parent in parents), values]:
        for section, entries in layer.items():
            if isinstance(entries, dict) and isinstance(merged.setdefault(section, {}), dict):
                merged[section].update(entries)
            else:
                merged[section] = entries
    return merged


def _override(config: Config, override: str) -> None:
    name, equals, text = override.partition("=")
    section, dot, key = name.strip().partition(".")
    if not equals or not dot:
        raise ValueError(f'override "{override}" is not of the form section.key=value, such as train.lr=2e-4')
    sections = config.sections()
    if section not in sections:
        raise ValueError(f'override "{override}": section "{section}" is unknown{_near(section, sections)}')
    try:
        parsed = tomllib.loads(f"value = {text}")
        value = parsed["value"] if len(parsed) == 1 else text.strip()
    except (ValueError, RecursionError):
        value = text.strip()  # a word or path without quotes
    _assign(config, section, key, value, f'override "{override}"')


def _assign(config: Config, section: str, key: str, value: Any, source: str) -> None:
    kind = config.sections()[section]
    hints = typing.get_type_hints(kind)
    types = {f.name: hints[f.name] for f in dataclasses.fields(kind)}
    if key not in types:
        raise ValueError(f'{source}: key "{section}.{key}" is unknown{_near(key, types)}')
    fitting, fits = _convert(value, types[key])
    if not fits:
        wanted = types[key]
        name = wanted.__name__ if isinstance(wanted, type) and not typing.get_args(wanted) else str(wanted)
        raise ValueError(f"{source}: {section}.{key} is {value!r}, but must be of type {name}")
    setattr(getattr(config, section), key, fitting)


def _convert(value: Any, kind: Any) -> tuple[Any, bool]:
    """(value as ``kind``, whether it is one); whole numbers pass for float."""
    if typing.get_origin(kind) is list:
        if not isinstance(value, list):
            return value, False
        items = [_convert(item, typing.get_args(kind)[0]) for item in value]
        return [item for item, _ in items], all(fits for _, fits in items)
    if isinstance(value, bool) or kind is bool:
        return value, isinstance(value, bool) and kind is bool
    if kind is float and isinstance(value, int):
        return (float(value), True) if abs(value) < 2**1000 else (value, False)
    return value, isinstance(value, kind)


def _near(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f": did you mean {' or '.join(near)}?" if near else f": use one of {', '.join(known)}"
