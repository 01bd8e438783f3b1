"""Open-vocabulary detection: detectors whose classes are texts.

``load_detector(file)(images, classes)`` detects classes of your choice; see :mod:`ovdet.library`.
"""

from __future__ import annotations

from typing import Any

__all__ = ["LoadedDetector", "load_detector"]


def __getattr__(name: str) -> Any:
    if name in __all__:  # on demand: parts are used without what testing needs
        from ovdet import library

        return getattr(library, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
