"""Addresses of databases: read, checked, and never shown with a password."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

from autoprune.errors import UsageError

VARIABLE = "AUTOPRUNE_STORAGE"
ALLOWED = "sqlite, the study's own file, or postgresql://USER@HOST/DATABASE"
_SCHEMES = ("postgresql", "postgres", "postgresql+psycopg")
_SECRETS = ("password", "sslpassword")
_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<rest>[^\s'\"]*)")
_PASSWORD = re.compile(
    r"(?i)((?:password|passwd|pwd|passphrase|secret|token|sslpassword|key)[a-z_]*\s*=\s*)('[^']*'|\"[^\"]*\"|[^&;\s'\"]+)"
)
HINT = f"leave --storage out for SQLite in the study's folder (AUTOPRUNE_STUDIES moves it), or give {VARIABLE} a URL"


@dataclass(frozen=True)
class DatabaseUrl:
    """Where a PostgreSQL database is.

    Attributes:
        text: ``postgresql://user@host:port/database?option=value``, without any password.
        secrets: ``password`` and ``sslpassword``, as far as the URL held them; shown nowhere.
    """

    text: str
    secrets: dict[str, str] = field(default_factory=dict, repr=False, compare=False, hash=False)

    def clean(self, message: str) -> str:
        """Return a message of another program without what this URL keeps secret."""
        for secret in self.secrets.values():
            for form in (secret, quote(secret, safe="")):
                if len(form) > 2:
                    message = message.replace(form, "***")
        return without_passwords(message)


def without_passwords(message: str) -> str:
    """Return a URL, or any text with URLs in it, without passwords: of the user, and among the parameters.

    What stands between ``://`` and the last ``@`` of a word is taken for user and password, so that a password with
    ``@``, ``/`` or ``:`` in it does not show either.
    """

    def hidden(match: re.Match[str]) -> str:
        user, at, place = match["rest"].rpartition("@")
        if not at:
            return match[0]
        name, colon, _ = user.partition(":")
        return f"{match['scheme']}://{name}{':***' if colon else ''}@{place}"

    return _PASSWORD.sub(r"\1***", _URL.sub(hidden, message))


def given_storage(storage: str | None) -> str | None:
    """Return the storage that was given, else the one of ``AUTOPRUNE_STORAGE``; None for neither."""
    return storage if storage is not None else os.environ.get(VARIABLE) or None


def is_sqlite(storage: str | None) -> bool:
    """Return whether the study's own SQLite file is meant."""
    return storage is None or storage == "sqlite" or storage.startswith("sqlite:")


def parse_database_url(storage: str) -> DatabaseUrl:
    """Read ``postgresql://USER[:PASSWORD]@HOST[:PORT]/DATABASE[?OPTION=VALUE]``.

    Raises:
        UsageError: If the scheme is another, the database is missing, or the URL cannot be read. The message shows
            no more of it than its scheme.
    """
    scheme = storage.split(":", 1)[0] if ":" in storage else ""
    shown = f"{scheme}:…" if re.fullmatch(r"[A-Za-z0-9+.-]{1,24}", scheme) else "…"
    if scheme.lower() not in _SCHEMES:
        raise UsageError(f"storage {shown!r} cannot be used; allowed: {ALLOWED}", HINT)
    try:
        parts = urlsplit(storage)
        options = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
        port, host = parts.port, parts.hostname or ""
        names = [name.lower() for name, _ in options]
        database = unquote(parts.path.removeprefix("/"))
        whole = storage.isprintable() and " " not in storage and not parts.fragment
        if not whole or not database or "/" in database or "\0" in unquote(storage):
            raise ValueError
    except ValueError:
        raise UsageError(
            f"storage {shown!r} is no complete URL; allowed: {ALLOWED}",
            "what is no letter or digit in a password is written as %40 and so on; better leave it out: "
            f"PGPASSWORD and ~/.pgpass hold it too. {HINT}",
        ) from None
    secrets = {name.lower(): value for name, value in options if name.lower() in _SECRETS}
    if parts.password:
        secrets["password"] = unquote(parts.password)
    user = f"{quote(unquote(parts.username), safe='')}@" if parts.username else ""
    place = f"[{host}]" if ":" in host else host
    kept = urlencode(
        [pair for pair, name in zip(options, names, strict=True) if name not in _SECRETS], safe="/"
    )
    at = f"{user}{place}{f':{port}' if port else ''}"
    return DatabaseUrl(f"postgresql://{at}/{quote(database, safe='')}{f'?{kept}' if kept else ''}", secrets)


def check_storage(storage: object, own: str | None = None) -> str | None:
    """Return a storage that can be used, None for the study's own SQLite file.

    Args:
        storage: What was given; None for nothing.
        own: Path of the study's SQLite file, the only one that ``sqlite:///PATH`` may name; None to leave that check.

    Raises:
        UsageError: If it is no text, or none that can be used; no message shows a password.
    """
    if storage is None:
        return None
    if not isinstance(storage, str):
        raise UsageError(f"storage is {type(storage).__name__}, no text; allowed: {ALLOWED}", HINT)
    if not is_sqlite(storage):
        parse_database_url(storage)
    elif own is not None and storage not in ("sqlite", f"sqlite:///{own}"):
        raise UsageError(f"storage 'sqlite:…' names another file than the study's own ({own})", HINT)
    return storage


def shown_storage(storage: str | None) -> str | None:
    """Return a storage as it may be shown and kept: without passwords."""
    return storage if storage is None or is_sqlite(storage) else parse_database_url(storage).text
