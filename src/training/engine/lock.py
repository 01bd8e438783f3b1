"""One run in a folder at a time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

from training.engine.errors import UserError

log = logging.getLogger(__name__)

FILE = ".lock"
BEAT = 10.0  # seconds between signs of life
STALE = 6 * BEAT  # without one for so long, a holder on another machine is taken for dead
_HELD: set[str] = set()  # by this process: locks of the kernel do not hold a process off itself
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


class FolderLock:
    """Holds a folder for the life of a run: a second run on it is refused, on this machine or another.

    Two things keep others off. A lock of the kernel on a file in the folder (POSIX record lock): it ends with the
    process, however that dies, so it is never stale, and network disks pass it on where they are set up to. And signs
    of life for disks that are not: the holder touches the file every ``BEAT`` seconds. Where the file names another
    machine, or the disk keeps no locks at all, one waits for its next sign; after ``STALE`` seconds without any the
    holder is taken for dead. Times are compared by the disk's own clock.

    Args:
        folder: it exists and can be written to.

    Raises:
        UserError: another run holds the folder; says which.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.path, self._file = folder, folder / FILE, -1
        self._key = os.path.realpath(self.path)
        if self._key in _HELD:
            raise UserError(self._refusal({"pid": os.getpid()}))
        self._take()
        _HELD.add(self._key)
        self._end = threading.Event()
        self._beat = threading.Thread(target=self._live, name="folder-lock", daemon=True)
        self._beat.start()

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *_: Any) -> None:
        self.release()

    def _take(self) -> None:
        first_sign = None
        while True:
            # Opened anew each time: a network disk then asks its server what is true.
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                sure = self._lock()
                holder, sign = self._holder(), os.fstat(self._file).st_mtime_ns
                # Where the kernel keeps locks, it has just said that nobody on this machine holds the folder.
                foreign = holder.get("host") not in (None, socket.gethostname() if sure else None)
                if not foreign or self._age() >= STALE:
                    return self._sign()
                if first_sign not in (None, sign):
                    raise UserError(self._refusal(holder))
            except BaseException:
                self._close()
                raise
            self._close()
            if first_sign is None:
                log.warning("%s: held by %s, waiting for a sign of life", self.folder, holder["host"])
            first_sign = sign
            time.sleep(BEAT / 10)

    def _lock(self) -> bool:
        """Take the kernel's lock; False on a disk that has none. UserError when another process has it."""
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise UserError(self._refusal(self._holder())) from None
            if error.errno not in _NO_LOCKS:
                raise
            log.debug("%s: this disk has no locks (%s); signs of life have to do", self.folder, error.strerror)
            return False
        return True

    def _sign(self) -> None:
        mine = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%F %T")})
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, mine.encode(), 0)
        os.fsync(self._file)

    def _holder(self) -> dict[str, Any]:
        try:
            content = json.loads(os.pread(self._file, 4096, 0))
        except ValueError:  # empty, or being written
            content = None
        return content if isinstance(content, dict) else {}

    def _age(self) -> float:
        """Seconds since the last sign of life, by the clock of the disk."""
        probe = self.folder / f"{FILE}.{socket.gethostname()}.{os.getpid()}"
        try:
            probe.touch()
            return probe.stat().st_mtime - os.fstat(self._file).st_mtime
        finally:
            probe.unlink(missing_ok=True)

    def _refusal(self, holder: dict[str, Any]) -> str:
        known = [f"{name} {holder[key]}" for name, key in (("process", "pid"), ("on", "host"), ("since", "since"))
                 if holder.get(key)]  # fmt: skip
        who = f" ({', '.join(known)})" if known else ""
        return f"another run{who} is at work in {self.folder}: end it first, or choose another name"

    def _live(self) -> None:
        while not self._end.wait(BEAT):
            with contextlib.suppress(OSError):  # a disk that is gone for a moment is no reason to stop
                os.utime(self._file)

    def _close(self) -> None:
        os.close(self._file)
        self._file = -1

    def release(self) -> None:
        """Give the folder free; nothing when it has been."""
        if self._file < 0:
            return
        self._end.set()
        self._beat.join()
        with contextlib.suppress(OSError):
            os.ftruncate(self._file, 0)
        self._close()
        _HELD.discard(self._key)
