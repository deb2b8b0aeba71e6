"""Who may write a study in a shared database: a lease in a table, proved inside of every write."""

from __future__ import annotations

import os
import socket
import threading
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from autoprune.errors import StorageError

# A driver that stopped is taken for dead after so long; one that was killed on this machine at once.
LEASE_S = 60.0
TABLE = """
CREATE TABLE IF NOT EXISTS autoprune_leases (
    study_id integer PRIMARY KEY, token bigint NOT NULL, owner text NOT NULL, host text NOT NULL, pid integer NOT NULL,
    until timestamptz NOT NULL, receipt text, trial_id integer)
"""


class OwnedByAnotherError(StorageError):
    """Raised when another driver has a study, or took it over."""


@dataclass(frozen=True)
class Owner:
    """One driver: no two have the same word, on whatever machine.

    Attributes:
        word: Boot of the machine, space of process numbers, number and start of the process, and a random part.
        host: Name of the machine.
        pid: Number of the process.
    """

    word: str
    host: str
    pid: int

    @classmethod
    def here(cls) -> Owner:
        """Return this process as an owner that is there once."""
        pid = os.getpid()
        return cls(f"{_machine()}/{pid}/{_started(pid)}/{uuid.uuid4().hex[:12]}", socket.gethostname(), pid)


def is_dead(word: str) -> bool:
    """Return whether an owner is a process of this machine that is surely gone; False where that is not known."""
    boot, space, pid, started, *_ = [*word.split("/"), "", "", "", ""]
    known = boot and space and pid.isdigit() and started
    return bool(known) and f"{boot}/{space}" == _machine() and _started(int(pid)) != started


def _machine() -> str:
    """Return what tells machines and their containers apart; empty parts where this system does not say."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}/{Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return "/"


def _started(pid: int) -> str:
    """Return when a process began, in ticks of the machine; empty if there is none, or only its remains."""
    try:
        # The name of the program, in brackets, may hold blanks; the state and the 20th word after it are wanted.
        words = (
            Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        )
    except OSError:
        return ""
    return "" if words[0] in "ZX" else words[19]


class Lease:
    """The right to write one study, renewed by a thread until it is released.

    The token grows with every owner. :meth:`prove` is called within each transaction that writes, so that a driver
    that was stopped, or cut off, for longer than its lease cannot write once another one has the study. It also leaves
    a receipt, by which a write whose acknowledgement was lost is known to have landed.
    Time is the database's own.

    Args:
        engine: The database.
        study_id: The study's number there.
        name: Its name, for messages.
        seconds: How long the lease holds without being renewed.
    """

    def __init__(self, engine: Engine, study_id: int, name: str, seconds: float = LEASE_S) -> None:
        self._engine = engine
        self._name = name
        self._seconds = seconds
        self._ended = threading.Event()
        self._row = {"study": study_id}
        self.owner = Owner.here()
        self.token = 0

    def take(self) -> None:
        """Take the study, and keep it until :meth:`release`.

        Raises:
            OwnedByAnotherError: If another driver has it; says who and until when.
        """
        with self._engine.begin() as link:
            self._take(link)
        threading.Thread(target=self._renew, name=f"lease of {self._name}", daemon=True).start()

    def _take(self, link: Connection) -> None:
        link.execute(
            text(
                "INSERT INTO autoprune_leases VALUES (:study, 0, '', '', 0, 'epoch', NULL, NULL) "
                "ON CONFLICT DO NOTHING"
            ),
            self._row,
        )
        found = link.execute(
            text(
                "SELECT owner, host, pid, token, to_char(until, 'HH24:MI:SS TZ') AS until, "
                "ceil(extract(epoch FROM until - clock_timestamp())) AS left_s, until > clock_timestamp() AS held "
                "FROM autoprune_leases WHERE study_id = :study FOR UPDATE"
            ),
            self._row,
        ).one()
        if found.held and found.owner != self.owner.word and not is_dead(found.owner):
            raise OwnedByAnotherError(
                f"study {self._name!r} is being run by another driver: host {found.host}, process {found.pid}, "
                f"which has it until {found.until}, {int(found.left_s)} s from now, and goes on renewing that",
                "wait for it or stop it; one that died is replaced after that time. Else use another --study NAME",
            )
        self.token = int(found.token) + (found.owner != self.owner.word)
        mine = {"token": self.token, "owner": self.owner.word, "host": self.owner.host, "pid": self.owner.pid}
        link.execute(
            text(
                "UPDATE autoprune_leases SET token = :token, owner = :owner, host = :host, pid = :pid, receipt = NULL, "
                "trial_id = NULL, until = clock_timestamp() + make_interval(secs => :seconds) WHERE study_id = :study"
            ),
            {**self._row, **mine, "seconds": self._seconds},
        )

    def _renew(self) -> None:
        while not self._ended.wait(self._seconds / 3):
            # While the database is away there is nothing to renew; who writes meanwhile waits for it too.
            with suppress(SQLAlchemyError), self._engine.begin() as link:
                if not self._extend(link, self._seconds):
                    return

    def _extend(self, link: Connection, seconds: float) -> bool:
        done = link.execute(
            text(
                "UPDATE autoprune_leases SET until = clock_timestamp() + make_interval(secs => :seconds) "
                "WHERE study_id = :study AND token = :token"
            ),
            {**self._row, "token": self.token, "seconds": seconds},
        )
        return done.rowcount == 1

    def release(self) -> None:
        """Let another driver have the study at once; where the database is away, when the lease ends."""
        self._ended.set()
        with suppress(SQLAlchemyError), self._engine.begin() as link:
            self._extend(link, 0.0)

    # -- within the transactions of the record -----------------------------------------------

    def prove(self, session: Session, receipt: str, trial_id: int | None) -> None:
        """Write that the study is still ours, and a receipt, into the session's transaction.

        Raises:
            OwnedByAnotherError: If another driver took it over; the transaction must not be committed.
        """
        done: Any = session.execute(
            text(
                "UPDATE autoprune_leases SET receipt = :receipt, trial_id = :trial "
                "WHERE study_id = :study AND token = :token"
            ),
            {**self._row, "token": self.token, "receipt": receipt, "trial": trial_id},
        )
        if done.rowcount == 1:
            return
        now = session.execute(
            text("SELECT host, pid FROM autoprune_leases WHERE study_id = :study"), self._row
        ).one_or_none()
        who = f"host {now.host}, process {now.pid}" if now is not None else "who deleted it"
        raise OwnedByAnotherError(
            f"another driver ({who}) took the study {self._name!r} over: this one was stopped, or cut off from the "
            f"database, for longer than its lease of {self._seconds:g} s, and writes nothing more",
            "the other one goes on with all finished trials",
        )

    def made(self, session: Session, receipt: str) -> int | None:
        """Return the trial that an earlier attempt of the same write made; None if it made none."""
        found = session.execute(
            text(
                "SELECT trial_id FROM autoprune_leases "
                "WHERE study_id = :study AND token = :token AND receipt = :receipt"
            ),
            {**self._row, "token": self.token, "receipt": receipt},
        ).scalar()
        return None if found is None else int(found)

    def landed(self, receipt: str) -> bool:
        """Return whether the write with this receipt was committed."""
        with self._engine.connect() as link:
            found = link.execute(
                text(
                    "SELECT 1 FROM autoprune_leases "
                    "WHERE study_id = :study AND token = :token AND receipt = :receipt"
                ),
                {**self._row, "token": self.token, "receipt": receipt},
            )
            return found.scalar() is not None
