"""What ends a run early: a signal, a launcher that has gone, another rank that has died."""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import sys
import threading
from pathlib import Path
from types import FrameType, TracebackType

import psutil

from pretrain.process_group import Ranks

EVERY = 1.0
"""Seconds from one look at the other processes to the next."""
PATIENCE = 3.0
"""Seconds in which a rank whose connection has broken off must turn out to be dead."""
LOST = ".lost"
"""File in the run folder made by the rank that misses another first, so that only that one says so."""


def _launchers() -> list[psutil.Process]:
    """The processes of the DeepSpeed launcher that this one belongs to: it has a child that starts the ranks."""
    parent = psutil.Process().parent()
    if parent is None or not any("deepspeed.launcher" in word for word in _command(parent)):
        return []
    command = parent.parent()
    return [parent] if command is None else [parent, command]


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _dead(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


LAUNCHERS = _launchers()
"""As they were when this process began."""


@dataclasses.dataclass(frozen=True)
class _Peer:
    """A rank as the others find it."""

    rank: int
    host: str
    process: int
    began: float
    """When the process began, which tells it from another of the same number."""

    def find(self) -> psutil.Process | None:
        """The process; None where it cannot be seen from here, or is not the one that is meant."""
        try:
            process = psutil.Process(self.process)
        except psutil.NoSuchProcess:
            return None
        return process if self.host == socket.gethostname() and process.create_time() == self.began else None


class Watch:
    """A context in which a run notices what ends it early; all ranks enter it at once.

    TERM, USR1, Ctrl-C and the end of the launcher let `told_to_stop` become true; a second Ctrl-C interrupts. Where
    another rank of this machine dies, this process says which, in one line, and ends with code 1, from within whatever
    it is waiting for.

    Args:
        ranks: of the run.
        folder: of the run.
    """

    def __init__(self, ranks: Ranks, folder: Path) -> None:
        self.told_to_stop = False
        self._folder = folder
        me = _Peer(ranks.rank, socket.gethostname(), os.getpid(), psutil.Process().create_time())
        others = [peer for peer in ranks.gather(me) if peer.rank != ranks.rank]
        self._peers = [(peer, process) for peer in others if (process := peer.find())]
        self._launchers = LAUNCHERS
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Watch:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._note)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, RuntimeError):  # what a broken connection raises; who is dead turns out a moment later
            self._over.wait(PATIENCE if self._peers else 0)
        self.close()

    def close(self) -> None:
        """Stop looking at the others: from here on they may end."""
        self._over.set()
        self._thread.join()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.told_to_stop = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _look(self) -> None:
        while not self._over.wait(EVERY):
            if any(map(_dead, self._launchers)):
                self.told_to_stop, self._launchers = True, []
            for peer, process in self._peers:
                if _dead(process):
                    self._leave(peer)

    def _leave(self, lost: _Peer) -> None:
        try:
            os.close(os.open(self._folder / LOST, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            os._exit(1)
        except OSError:
            pass  # rather twice than never
        print(
            f"error: rank {lost.rank} (process {lost.process} on {lost.host}) has ended before the run: killed, "
            "perhaps for want of memory, or by an error of its own; give the same command again, it goes on from the "
            "newest checkpoint",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)
