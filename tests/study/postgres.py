"""A PostgreSQL server of one test process, in a temporary folder, reached by a socket there."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import pytest

USER = "autoprune"
GUARDED = "guarded"  # the one user who needs a password
# Where no Debian package put the programs, they may be on the path.
_FOLDERS = [
    *sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True),
    Path(shutil.which("initdb") or "-").parent,
]
_numbers = count()


@dataclass
class Postgres:
    """A server that can be stopped and started again.

    Attributes:
        root: Its folder, which holds its data and its socket.
        programs: The folder of ``initdb``, ``pg_ctl`` and so on.
        prefix: Words that run a program as another user, where this one is root, which PostgreSQL refuses.
        port: Port on the loopback address; None for the socket alone.
    """

    root: Path
    programs: Path
    prefix: list[str] = field(default_factory=list)
    port: int | None = None

    def run(self, program: str, *words: str, check: bool = True) -> str:
        """Run one of PostgreSQL's programs and return what it printed."""
        # In a session of its own, so that what interrupts a test does not stop the server.
        done = subprocess.run(
            [*self.prefix, str(self.programs / program), *words],
            cwd=self.root, capture_output=True, text=True, timeout=60, check=False, start_new_session=True,
            stdin=subprocess.DEVNULL, env={"PATH": os.environ.get("PATH", ""), "LC_ALL": "C"},
        )  # fmt: skip
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def make(self) -> None:
        """Make an empty database system."""
        data = self.root / "data"
        self.run("initdb", "-D", str(data), "-U", USER, "-A", "trust", "--no-sync", "-E", "UTF8")
        access = f"local all {GUARDED} scram-sha-256\nlocal all all trust\nhost all all 127.0.0.1/32 trust\n"
        (data / "pg_hba.conf").write_text(access, encoding="utf-8")

    def start(self) -> None:
        """Start it and wait until it answers."""
        listens = f"-p {self.port} -h 127.0.0.1" if self.port else "-h ''"
        options = f"-k {self.root} {listens} -c fsync=off -c max_connections=400"
        log = str(self.root / "log")
        self.run("pg_ctl", "-D", str(self.root / "data"), "-l", log, "-o", options, "-w", "start")

    def stop(self, mode: str = "fast") -> None:
        """Stop it: ``fast`` ends all connections, ``immediate`` is as good as a crash."""
        self.run("pg_ctl", "-D", str(self.root / "data"), "-m", mode, "-w", "stop", check=False)

    def database(self) -> str:
        """Make a new database and return its URL."""
        name = f"db{next(_numbers)}"
        self.sql(f"CREATE DATABASE {name}", "postgres")
        return self.url(name)

    def url(self, name: str) -> str:
        """Return the URL of a database."""
        return f"postgresql://{USER}@/{name}?host={self.root}" + (f"&port={self.port}" if self.port else "")

    def sql(self, statement: str, url: str = "postgres") -> str:
        """Run a statement in a database and return its rows."""
        words = ["-h", str(self.root), *(["-p", str(self.port)] if self.port else []), "-U", USER]
        name = url.removeprefix(f"postgresql://{USER}@/").partition("?")[0]
        return self.run("psql", *words, "-d", name, "-X", "-A", "-t", "-q", "-c", statement)


def make_postgres(port: int | None = None) -> Postgres:
    """Make and start a server, or skip the test with the reason."""
    pytest.importorskip("psycopg", reason="no psycopg: pip install 'autoprune[postgres]'")
    programs = next((folder for folder in _FOLDERS if (folder / "initdb").is_file()), None)
    if programs is None:
        pytest.skip("no PostgreSQL: apt-get install postgresql")
    # A short path: that of a socket has at most 107 characters.
    root = Path(tempfile.mkdtemp(prefix="autoprune-pg-", dir="/tmp"))
    prefix: list[str] = []
    if os.geteuid() == 0:
        shutil.chown(root, "nobody")
        root.chmod(0o755)
        prefix = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups"]
    server = Postgres(root, programs, prefix, port)
    try:
        server.make()
        server.start()
    except BaseException:
        remove_postgres(server)
        raise
    return server


def remove_postgres(server: Postgres) -> None:
    """Stop a server and remove its folder."""
    server.stop("immediate")
    shutil.rmtree(server.root, ignore_errors=True)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """Return the server of this test process; it is there for all of its tests."""
    server = make_postgres()
    yield server
    remove_postgres(server)


@pytest.fixture
def database(postgres: Postgres) -> str:
    """Return the URL of an empty database."""
    return postgres.database()
