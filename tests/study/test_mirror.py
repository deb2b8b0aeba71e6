"""Artifacts and small files on shared storage: whole or absent, checked by content, inside of the study's prefix."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import fsspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoprune.errors import StorageError, UsageError
from autoprune.naming import StudyPaths, inner_parts
from autoprune.study import remote as remote_module
from autoprune.study.artifacts import MANIFEST, commit_folder, temporary_folder, verify, write_bytes_atomic
from autoprune.study.mirror import Mirror
from autoprune.study.remote import Remote, check_url, redacted

FILES = {"model.onnx": b"graph" * 100, "recipe.json": b"{}", "targets/openvino/model.xml": b"<net/>"}


def committed(parent: Path, name: str, files: dict[str, bytes] | None = None) -> Path:
    folder = temporary_folder(parent)
    for inner, content in (FILES if files is None else files).items():
        (folder / inner).parent.mkdir(parents=True, exist_ok=True)
        (folder / inner).write_bytes(content)
    commit_folder(folder, parent / name)
    return parent / name


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and p.name != MANIFEST
    }


def no_wait(_: float) -> None:
    """Stand in for the wait between attempts; of the module, so that a mirror can be sent to another process."""


@pytest.fixture(autouse=True)
def empty_memory() -> None:
    fsspec.filesystem("memory").store.clear()


@pytest.fixture(scope="session")
def bucket() -> Iterator[str]:
    """A bucket of a real S3 server on this machine; skipped where the driver or the server is not installed."""
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        fsspec.filesystem("s3").mkdir("s3://bucket")
        yield "s3://bucket/team"
    server.stop()


@pytest.fixture(params=["memory", "file", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The contract holds on every kind of storage."""
    if request.param == "s3":
        # A folder of the test's own: the bucket is shared.
        return f"{request.getfixturevalue('bucket')}/{tmp_path.name}"
    return f"file://{tmp_path / 'shared'}" if request.param == "file" else "memory://bucket/team"


@pytest.fixture
def mirror(url: str) -> Mirror:
    return Mirror(url, "study", sleep=no_wait)


def stored(mirror: Mirror) -> dict[str, bytes]:
    """Return everything on the storage below the URL, by its path there."""
    files = fsspec.filesystem(mirror.url.partition("://")[0], use_listings_cache=False)
    files.invalidate_cache()
    root = mirror.url.partition("://")[2].rstrip("/")
    return {
        str(path).removeprefix("/").removeprefix(root.removeprefix("/") + "/"): files.cat_file(path)
        for path in files.find(root)
    }


def damage(mirror: Mirror, ending: str, change: Callable[[bytes], bytes | None]) -> None:
    """Change the one stored file whose path ends so; None removes it."""
    files = fsspec.filesystem(mirror.url.partition("://")[0], use_listings_cache=False)
    (path,) = [p for p in files.find(mirror.url.partition("://")[2]) if str(p).endswith(ending)]
    content = change(files.cat_file(path))
    if content is None:
        files.rm_file(path)
    else:
        files.pipe_file(path, content)


def flipped(content: bytes) -> bytes:
    return bytes([content[0] ^ 1]) + content[1:]


# -- artifacts -------------------------------------------------------------------------------


def test_what_was_pushed_is_pulled_on_another_node(mirror: Mirror, tmp_path: Path) -> None:
    mirror.check()
    assert stored(mirror) == {}
    assert not mirror.has("trial-00001")
    assert mirror.names() == []
    mirror.push(committed(tmp_path / "a", "trial-00001"), "trial-00001")
    other = pickle.loads(pickle.dumps(mirror))
    assert other.has("trial-00001")
    assert other.names() == other.names("trial-") == ["trial-00001"]
    assert other.names("data-") == []
    place = tmp_path / "b" / "trial-00001"
    other.pull("trial-00001", place)
    verify(place)
    assert contents(place) == FILES
    assert [p.name for p in place.parent.iterdir()] == ["trial-00001"]
    other.remove("trial-00001")
    other.remove("trial-00001")
    assert stored(mirror) == {}


def test_an_equal_push_stores_nothing_and_another_replaces_all(mirror: Mirror, tmp_path: Path) -> None:
    folder = committed(tmp_path / "a", "one")
    mirror.push(folder, "trial-00001")
    before = stored(mirror)
    mirror.push(folder, "trial-00001")
    assert stored(mirror) == before
    mirror.push(committed(tmp_path / "a", "two", {"model.onnx": b"new"}), "trial-00001")
    mirror.pull("trial-00001", tmp_path / "b")
    assert contents(tmp_path / "b") == {"model.onnx": b"new"}
    assert len(stored(mirror)) == 2


def test_what_is_whole_there_is_not_sent_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mirror, real = Mirror(str(tmp_path / "shared"), "study", sleep=no_wait), Remote.put_file
    sent: list[str] = []

    def put(self: Remote, source: Path, name: str) -> None:
        sent.append(name.split("/", 3)[3])
        real(self, source, name)

    monkeypatch.setattr(Remote, "put_file", put)
    one, two = committed(tmp_path / "a", "one"), committed(tmp_path / "a", "two", {"other.onnx": b"new"})
    mirror.push(one, "trial-00001")
    mirror.push(one, "trial-00001")
    assert sorted(sent) == sorted(contents(one))
    mirror.push(two, "trial-00001")
    assert sent[len(contents(one)) :] == ["other.onnx"]


def test_small_files_that_cannot_be_sent_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mirror, file = Mirror(str(tmp_path / "shared"), "study"), tmp_path / "screens.jsonl"
    with pytest.raises(StorageError) as caught:
        mirror.push_file(file)
    assert caught.value.message == f"{str(file)!r} cannot be read: No such file or directory"
    file.write_bytes(b"12345")
    monkeypatch.setattr("autoprune.study.mirror._SMALL_BYTES", 4)
    with pytest.raises(UsageError) as refused:
        mirror.push_file(file)
    assert refused.value.message == f"{str(file)!r} is above 4 bytes, the most for a small file"
    assert mirror.files() == []
    monkeypatch.setattr("autoprune.study.mirror._SMALL_BYTES", 5)
    mirror.push_file(file)
    assert mirror.files() == ["screens.jsonl"]


@pytest.mark.parametrize(
    ("manifest", "why"),
    [
        ("{", "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        ("[]", "it does not hold hashes by name"),
        ('{"model.onnx": 3}', "it does not hold hashes by name"),
        ('{"model.onnx": "abc"}', "it does not hold hashes by name"),
    ],
)
def test_a_damaged_manifest_is_named(manifest: str, why: str, tmp_path: Path) -> None:
    folder = committed(tmp_path / "a", "one")
    (folder / "manifest.json").write_text(manifest, encoding="utf-8")
    with pytest.raises(StorageError) as caught:
        Mirror(str(tmp_path / "shared"), "study").push(folder, "trial-00001")
    assert (caught.value.message, caught.value.hint) == (
        f"the manifest of {folder} is damaged: {why}",
        "search it again",
    )


def test_a_push_mends_what_is_damaged_there_at_equal_size(mirror: Mirror, tmp_path: Path) -> None:
    folder = committed(tmp_path / "a", "one")
    (tmp_path / "small.json").write_bytes(b"{}")
    mirror.push(folder, "trial-00001")
    mirror.push_file(tmp_path / "small.json")
    damage(mirror, "model.onnx", flipped)
    damage(mirror, "/small.json", flipped)
    mirror.push(folder, "trial-00001")
    mirror.push_file(tmp_path / "small.json")
    mirror.pull("trial-00001", tmp_path / "b")
    assert contents(tmp_path / "b") == contents(folder)
    assert mirror.pull_file("small.json", tmp_path / "c.json") and (tmp_path / "c.json").read_bytes() == b"{}"


def test_a_push_that_was_cut_short_is_mended_by_the_next(mirror: Mirror, tmp_path: Path) -> None:
    folder = committed(tmp_path / "a", "one")
    mirror.push(folder, "trial-00001")
    damage(mirror, "model.onnx", lambda _: None)
    with pytest.raises(StorageError, match=r"'trial-00001'.*is damaged: model\.onnx"):
        mirror.pull("trial-00001", tmp_path / "b")
    mirror.push(folder, "trial-00001")
    mirror.pull("trial-00001", tmp_path / "b")


@pytest.mark.parametrize("stop", range(4))
def test_a_push_that_is_killed_leaves_nothing_under_the_name(
    mirror: Mirror, tmp_path: Path, stop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = committed(tmp_path / "a", "one")
    writes = 0

    def killed(real: Callable[..., None]) -> Callable[..., None]:
        def write(*args: Any) -> None:
            nonlocal writes
            if writes == stop:
                raise KeyboardInterrupt
            writes += 1
            real(*args)

        return write

    with monkeypatch.context() as patch:
        patch.setattr(Remote, "put_file", killed(Remote.put_file))
        patch.setattr(Remote, "put_bytes", killed(Remote.put_bytes))
        with pytest.raises(KeyboardInterrupt):
            mirror.push(folder, "trial-00001")
    assert not mirror.has("trial-00001")
    assert mirror.names() == []
    with pytest.raises(StorageError, match="has no artifact 'trial-00001'"):
        mirror.pull("trial-00001", tmp_path / "b")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("change", [flipped, lambda content: content[:-1], lambda _: b""])
@pytest.mark.parametrize("ending", ["model.onnx", "model.xml", "trial-00001.json"])
def test_a_damaged_copy_is_named_and_refused(
    mirror: Mirror, tmp_path: Path, ending: str, change: Callable[[bytes], bytes]
) -> None:
    mirror.push(committed(tmp_path / "a", "one"), "trial-00001")
    damage(mirror, ending, change)
    with pytest.raises(StorageError, match=r"trial-00001.*damaged"):
        mirror.pull("trial-00001", tmp_path / "b" / "trial-00001")
    assert not (tmp_path / "b").exists() or not list((tmp_path / "b").iterdir())


def test_a_damaged_or_uncommitted_folder_is_not_pushed(mirror: Mirror, tmp_path: Path) -> None:
    folder = committed(tmp_path / "a", "one")
    (folder / "model.onnx").write_bytes(b"other")
    with pytest.raises(StorageError, match=r"model\.onnx"):
        mirror.push(folder, "trial-00001")
    (folder / MANIFEST).unlink()
    with pytest.raises(StorageError, match="no committed folder"):
        mirror.push(folder, "trial-00001")
    assert stored(mirror) == {}


@pytest.mark.parametrize("inner", ["../../../outside", "/etc/hostname", "a/../b", "a//b", "", "a\\b", "a\0b"])
def test_a_manifest_that_leads_outside_is_refused(mirror: Mirror, tmp_path: Path, inner: str) -> None:
    mirror.push(committed(tmp_path / "a", "one"), "trial-00001")
    damage(mirror, "trial-00001.json", lambda _: json.dumps({inner: "0" * 64}).encode())
    with pytest.raises(StorageError, match="manifest .* is damaged"):
        mirror.pull("trial-00001", tmp_path / "b")
    folder = committed(tmp_path / "a", "two")
    (folder / MANIFEST).write_text(json.dumps({inner: "0" * 64}))
    with pytest.raises(StorageError, match="manifest .* is damaged"):
        mirror.push(folder, "trial-00002")


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".hidden", "a..b", "x" * 129, "a\n", "trial 1"])
def test_names_that_could_lead_elsewhere_are_refused(mirror: Mirror, tmp_path: Path, name: str) -> None:
    folder = committed(tmp_path / "a", "one")
    paths = StudyPaths(tmp_path / "study")
    for act in (
        lambda: mirror.push(folder, name),
        lambda: mirror.pull(name, tmp_path / "b"),
        lambda: mirror.has(name),
        lambda: mirror.remove(name),
        lambda: mirror.ensure(paths, name),
        lambda: mirror.push_file(folder / "recipe.json", name or "/"),
        lambda: mirror.pull_file(name, tmp_path / "b"),
    ):
        with pytest.raises(UsageError, match="cannot be used"):
            act()
    with pytest.raises(UsageError, match="study name"):
        Mirror(mirror.url, name)


@settings(deadline=None, max_examples=200)
@given(st.text())
def test_inner_paths_stay_inside(text: str) -> None:
    root = Path("/some/folder")
    try:
        parts = inner_parts(text)
    except UsageError:
        return
    assert Path(os.path.normpath(root.joinpath(*parts))).is_relative_to(root)
    assert "/".join(parts) == text


def test_other_studies_are_not_touched(mirror: Mirror, tmp_path: Path) -> None:
    folder = committed(tmp_path / "a", "one")
    other = Mirror(mirror.url, "study2", sleep=no_wait)
    for each in (mirror, other):
        each.push(folder, "trial-00001")
        each.push_file(folder / "recipe.json", "profile.json")
    kept = {path: content for path, content in stored(mirror).items() if path.startswith("study2/")}
    assert len(kept) == 6
    mirror.remove("trial-00001")
    mirror.push_file(folder / "model.onnx", "profile.json")
    assert {p: c for p, c in stored(mirror).items() if p.startswith("study2/")} == kept


def test_links_in_a_shared_folder_are_not_followed(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "trial-00001.json").write_text("{}")
    (tmp_path / "shared" / "study").mkdir(parents=True)
    (tmp_path / "shared" / "study" / "artifacts").symlink_to(secret)
    mirror = Mirror(str(tmp_path / "shared"), "study")
    for act in (
        lambda: mirror.names(),
        lambda: mirror.pull("trial-00001", tmp_path / "b"),
        lambda: mirror.remove("trial-00001"),
        lambda: mirror.push(committed(tmp_path / "a", "one"), "trial-00002"),
    ):
        with pytest.raises(StorageError, match="leads out of"):
            act()
    assert [p.name for p in secret.iterdir()] == ["trial-00001.json"]


def test_ensure_downloads_once(mirror: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = StudyPaths(tmp_path / "study")
    mirror.push(committed(tmp_path / "a", "one"), "trial-00007")
    assert mirror.ensure(paths, "trial-00007") == paths.artifact(7)
    monkeypatch.setattr(Remote, "_files", lambda _: pytest.fail("asked the storage again"))
    assert contents(mirror.ensure(paths, "trial-00007")) == FILES


def _pull(mirror: Mirror, place: Path, results: Any) -> None:
    try:
        for _ in range(5):
            mirror.pull("trial-00001", place)
        results.put("")
    except Exception as error:  # told to the test
        results.put(f"{type(error).__name__}: {error}")


def test_processes_of_one_node_may_pull_the_same_folder(tmp_path: Path) -> None:
    mirror = Mirror(str(tmp_path / "shared"), "study")
    mirror.push(committed(tmp_path / "a", "one"), "trial-00001")
    context = get_context("fork")
    results = context.Queue()
    place = tmp_path / "b" / "trial-00001"
    pullers = [context.Process(target=_pull, args=(mirror, place, results)) for _ in range(4)]
    for puller in pullers:
        puller.start()
    assert [results.get(timeout=60) for _ in pullers] == [""] * 4
    for puller in pullers:
        puller.join()
    assert contents(place) == FILES
    assert [p.name for p in place.parent.iterdir()] == ["trial-00001"]


# -- faults ----------------------------------------------------------------------------------


class Failing:
    """A storage whose calls fail as ``fault`` says, by the number of the call."""

    def __init__(self, real: Any, fault: Callable[[int], Exception | None]) -> None:
        self.real, self.fault, self.calls = real, fault, 0

    def __getattr__(self, name: str) -> Any:
        call = getattr(self.real, name)
        if name not in ("put_file", "pipe_file", "cat_file", "get_file", "info", "ls", "rm"):
            return call

        def faulty(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            error = self.fault(self.calls)
            if error is not None:
                raise error
            return call(*args, **kwargs)

        return faulty


def failing(monkeypatch: pytest.MonkeyPatch, fault: Callable[[int], Exception | None]) -> Failing:
    files = Failing(fsspec.filesystem("memory"), fault)
    monkeypatch.setattr(Remote, "_files", lambda _: files)
    return files


def test_passing_faults_are_waited_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("autoprune.study.remote.random.random", lambda: 0.25)
    waits: list[float] = []
    mirror = Mirror("memory://bucket", "study", sleep=waits.append)
    # Three of four attempts fail, whatever is asked.
    failing(monkeypatch, lambda call: None if call % 4 == 0 else ConnectionResetError("gone"))
    mirror.push(committed(tmp_path / "a", "one"), "trial-00001")
    mirror.pull("trial-00001", tmp_path / "b")
    assert contents(tmp_path / "b") == FILES
    assert waits[:6] == [0.375, 0.75, 1.5, 0.375, 0.75, 1.5]
    assert max(waits) == 1.5
    # What is asked first is what is there already.
    assert caplog.messages[0] == (
        "cannot read 'artifacts/trial-00001.json' in memory://bucket/study, trying again: gone"
    )


@pytest.mark.parametrize(
    ("error", "attempts"),
    [
        (OSError("s3://u:hidden@bucket?sig=hidden is down"), 4),
        (RuntimeError("driver"), 4),
        (PermissionError("denied"), 1),
        (OSError(errno.ENOSPC, "No space left on device"), 1),
    ],
)
def test_lasting_faults_end_with_cause_and_hint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, attempts: int
) -> None:
    files = failing(monkeypatch, lambda _: error)
    mirror = Mirror("memory://bucket", "study", sleep=no_wait)
    with pytest.raises(StorageError, match=type(error).__name__) as caught:
        mirror.push(committed(tmp_path / "a", "one"), "trial-00001")
    assert files.calls == attempts
    assert (
        f"trial-00001.json' in memory://bucket/study after {attempts} attempts: " in caught.value.message
    ) == (attempts > 1)
    assert "memory://bucket/study" in caught.value.message
    assert "credentials" in caught.value.hint
    assert "hidden" not in str(caught.value)
    for act in (lambda: mirror.names(), lambda: mirror.has("trial-00001"), lambda: mirror.check()):
        with pytest.raises(StorageError):
            act()


def test_a_storage_that_keeps_half_a_file_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = fsspec.filesystem("memory")
    mirror = Mirror("memory://bucket", "study", sleep=no_wait)
    with monkeypatch.context() as patch:
        patch.setattr(
            type(real), "put_file", lambda fs, src, path: fs.pipe_file(path, Path(src).read_bytes()[:-1])
        )
        with pytest.raises(StorageError, match="bytes of .* were stored"):
            mirror.push(committed(tmp_path / "a", "one"), "trial-00001")
    assert not mirror.has("trial-00001")


def test_a_read_only_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "shared")

    monkeypatch.setattr(remote_module, "_put_local", refuse)
    with pytest.raises(StorageError, match="cannot write 'files/probe-"):
        Mirror(str(tmp_path / "shared"), "study").check()


def test_a_crash_while_writing_to_a_shared_folder_leaves_no_half_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror = Mirror(str(tmp_path / "shared"), "study")
    (tmp_path / "profile.json").write_bytes(b"old")
    mirror.push_file(tmp_path / "profile.json")
    (tmp_path / "profile.json").write_bytes(b"new")
    before = stored(mirror)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            mirror.push_file(tmp_path / "profile.json")
    assert stored(mirror) == before


# -- small files -----------------------------------------------------------------------------


def test_small_files_are_replaced_whole(mirror: Mirror, tmp_path: Path) -> None:
    file, place = tmp_path / "screens.jsonl", tmp_path / "there.jsonl"
    assert not mirror.pull_file("screens.jsonl", place)
    for content in (b"one\n", b"one\n", b"one\ntwo\n", b""):
        file.write_bytes(content)
        mirror.push_file(file)
        assert mirror.pull_file("screens.jsonl", place)
        assert place.read_bytes() == content
        assert len(stored(mirror)) == 2
    assert mirror.files() == ["screens.jsonl"]


@pytest.mark.parametrize("change", [flipped, lambda _: b"", lambda _: None])
@pytest.mark.parametrize("ending", ["/screens.jsonl", "/screens.jsonl.json"])
def test_a_damaged_small_file_is_never_taken(
    mirror: Mirror, tmp_path: Path, ending: str, change: Callable[[bytes], bytes | None]
) -> None:
    file, place = tmp_path / "screens.jsonl", tmp_path / "there.jsonl"
    file.write_bytes(b"some content")
    mirror.push_file(file)
    damage(mirror, ending, change)
    if ending.endswith(".json") and change(b"x") is None:
        assert not mirror.pull_file("screens.jsonl", place)
    else:
        with pytest.raises(StorageError, match=r"'screens\.jsonl'.*is damaged"):
            mirror.pull_file("screens.jsonl", place)
    assert not place.exists()


def test_the_record_is_no_small_file(mirror: Mirror, tmp_path: Path) -> None:
    for name in ("study.db", "study.db-wal", "driver.lock"):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(UsageError, match="PostgreSQL"):
            mirror.push_file(tmp_path / name)


def test_a_study_is_restored_where_its_folder_is_absent(mirror: Mirror, tmp_path: Path) -> None:
    here, there = StudyPaths(tmp_path / "here" / "study"), StudyPaths(tmp_path / "there" / "study")
    here.root.mkdir(parents=True)
    texts = {"settings.yaml": "a: 1\n", "env.json": "[]", "screens.jsonl": "{}\n", "report.html": "<p>"}
    for name, text in texts.items():
        (here.root / name).write_text(text)
    for name in ("study.db", "study.db-wal", "driver.lock", ".half.unfinished"):
        (here.root / name).write_text("not to be mirrored")
    committed(here.artifacts, "trial-00000")
    assert mirror.push_files(here) == sorted(texts)
    mirror.push(here.artifact(0), "trial-00000")
    mirror.push(here.artifact(0), "data-0123")
    assert mirror.restore(there) == ["trial-00000"]
    assert {p.name: p.read_text() for p in there.root.iterdir()} == texts
    assert contents(mirror.ensure(there, "trial-00000")) == FILES
    # What this node has is not overwritten.
    there.settings.write_text("mine")
    mirror.restore(there)
    assert there.settings.read_text() == "mine"


def test_a_restore_that_was_cut_short_begins_anew(
    mirror: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = StudyPaths(tmp_path / "here"), StudyPaths(tmp_path / "there")
    here.root.mkdir()
    for name in ("settings.yaml", "zz.json", "env.json"):
        (here.root / name).write_text(name)
    mirror.push_files(here)
    written: list[str] = []

    def cut(path: Path, content: bytes) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path.name)
        write_bytes_atomic(path, content)

    with monkeypatch.context() as patch:
        patch.setattr("autoprune.study.mirror.write_bytes_atomic", cut)
        with pytest.raises(KeyboardInterrupt):
            mirror.restore(there)
    assert written == ["env.json", "zz.json"]
    mirror.restore(there)
    assert sorted(p.name for p in there.root.iterdir()) == ["env.json", "settings.yaml", "zz.json"]


# -- URLs ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given_url", "means"),
    [
        ("s3://bucket/some/folder/", "s3://bucket/some/folder"),
        ("gs://bucket", "gs://bucket"),
        ("file:///nfs/studies//x", "file:///nfs/studies/x"),
        ("/nfs/studies", "file:///nfs/studies"),
        (
            "abfs://container@account.dfs.core.windows.net/x",
            "abfs://container@account.dfs.core.windows.net/x",
        ),
    ],
)
def test_urls_that_are_taken(given_url: str, means: str) -> None:
    assert check_url(given_url) == means
    assert check_url(means) == means


def test_a_relative_folder_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert check_url("shared") == f"file://{tmp_path}/shared"


@pytest.mark.parametrize(
    "bad",
    [
        "", " ", "s3://", "file:///", "s3://bucket/../other", "../shared", "a/../b", "s3://bucket/x?versionId=1",
        "s3://bucket/x#y", "simplecache::s3://bucket", "zip://x::s3://bucket", "http://host/x", "sftp://host/x",
        "file://host/share", "s3://bucket/a\nb", "s3://bucket/a\\b", "s3://bucket ", "reference://x", "S3://bucket",
    ],
)  # fmt: skip
def test_urls_that_are_refused(bad: str) -> None:
    with pytest.raises(UsageError, match="artifacts URL"):
        Mirror(bad, "study")


def test_a_chain_of_storages_is_named_as_one() -> None:
    for url in ("simplecache::s3://bucket", "/shared/a::b"):
        with pytest.raises(UsageError, match="chained URLs are not taken"):
            check_url(url)


def test_passwords_are_never_shown() -> None:
    for bad in (
        "s3://key:hidden@bucket/x",
        "s3://key:hidden@bucket/x?token=hidden",
        "s3://key:so/hidden@b/x",
        "foo://a:hidden@b",
    ):
        with pytest.raises(UsageError) as caught:
            check_url(bad)
        assert "hidden" not in str(caught.value)
    assert (
        redacted("at postgresql://u:pw@h/db, s3://b?sig=pw now")
        == "at postgresql://u:***@h/db, s3://b?*** now"
    )


@pytest.mark.parametrize(("protocol", "line"), [("s3", "autoprune[s3]"), ("gs", "autoprune[gcs]")])
def test_a_missing_driver_says_what_installs_it(
    protocol: str, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lacking(*_: Any, **__: Any) -> None:
        raise ImportError(f"Install the driver to access {protocol}")

    monkeypatch.setattr(fsspec, "filesystem", lacking)
    with pytest.raises(UsageError, match=f"driver for {protocol}://") as caught:
        Mirror(f"{protocol}://bucket", "study").check()
    assert line in caught.value.hint


def test_shutil_is_not_asked_to_follow_links(tmp_path: Path) -> None:
    """Removing an artifact removes a link inside of it, not what it leads to."""
    mirror = Mirror(str(tmp_path / "shared"), "study")
    mirror.push(committed(tmp_path / "a", "one"), "trial-00001")
    kept = tmp_path / "kept"
    shutil.copytree(tmp_path / "a", kept)
    (tmp_path / "shared" / "study" / "artifacts" / "trial-00001" / "link").symlink_to(kept)
    mirror.remove("trial-00001")
    assert contents(kept / "one") == FILES
    assert mirror.names() == []
