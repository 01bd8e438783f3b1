"""What a dataset gives for a key: a sample (a dict), or a Skipped with the reason."""

from __future__ import annotations

from typing import Any, NamedTuple

Sample = dict[str, Any]


class Skipped(NamedTuple):
    """A sample that cannot be used. It is counted and named in the log; it never stops a worker."""

    file: str
    reason: str
