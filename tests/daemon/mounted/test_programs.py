"""What people run, on a bucket of a real S3 server that is mounted read-write. Whatever they have written is
in the bucket after a flush, byte for byte, and is shown by another mount that has nothing but the bucket."""

import json
import mmap
import os
import random
import shutil
import signal
import sqlite3
import struct
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from datacache.model import KiB
from tests.daemon.mounted.conftest import WAYS, Daemon, check_way, flushed, writable
from tests.support.s3 import S3Server
from tests.support.stores import Bucket, Tree, difference, tree_of

pytestmark = pytest.mark.server

ENVIRONMENT = {
    "PATH": os.environ.get("PATH", ""),
    "HOME": "/nonexistent",
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_AUTHOR_NAME": "A", "GIT_AUTHOR_EMAIL": "a@example.com",
    "GIT_COMMITTER_NAME": "A", "GIT_COMMITTER_EMAIL": "a@example.com",
    "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INDEX": "1", "PIP_ROOT_USER_ACTION": "ignore",
}  # fmt: skip


def run(*command: object, cwd: Path | None = None) -> str:
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def need(program: str) -> None:
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")


@pytest.fixture(scope="module")
def server(versitygw: S3Server) -> S3Server:
    versitygw.make_bucket("programs")
    return versitygw


@dataclass
class Shop:
    """A mount for all tests of one way, each in a directory of its own."""

    one: Daemon
    bucket: Bucket
    base: Path

    def check(self, top: Path) -> Tree:
        """What is at `top` is in the bucket, and nothing else; and another mount shows that. What it is."""
        flushed(self.one)
        shown = tree_of(top)
        below = top.relative_to(self.one.directory).as_posix() + "/"
        assert not difference(shown, self.bucket.tree(below))
        shutil.rmtree(self.base / "again", ignore_errors=True)
        (self.base / "again").mkdir()
        store = self.bucket.mount_point()
        with writable(
            self.base / "again", "passthrough", store, environment=self.bucket.environment
        ) as again:
            assert not difference(shown, tree_of(again.directory / below))
        assert not self.bucket.unfinished()
        return shown


@pytest.fixture(
    scope="module", params=[WAYS[0], *(pytest.param(way, marks=pytest.mark.long) for way in WAYS[1:])]
)
def shop(
    request: pytest.FixtureRequest, server: S3Server, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Shop]:
    way = request.param
    check_way(way)
    base = tmp_path_factory.mktemp(way)
    bucket = Bucket(server, "programs", f"{way}/")
    with writable(base, way, bucket.mount_point(), environment=bucket.environment) as one:
        yield Shop(one, bucket, base)


@pytest.fixture
def top(shop: Shop, request: pytest.FixtureRequest) -> Path:
    """A directory of the mount."""
    directory = shop.one.directory / request.function.__name__
    directory.mkdir()
    return directory


def test_git(shop: Shop, top: Path, tmp_path: Path) -> None:
    """A repository is made, cloned, committed to, collected and checked."""
    need("git")
    source = top / "source"
    run("git", "init", "-q", "-b", "main", source)
    for i in range(10):
        (source / f"file{i}").write_text(f"{i}\n" * i)
        (source / "d" / f"{i % 3}").mkdir(parents=True, exist_ok=True)
        (source / "d" / f"{i % 3}" / f"{i}").write_text("x" * i)
    run("git", "add", ".", cwd=source)
    run("git", "commit", "-qm", "one", cwd=source)
    run("git", "clone", "-q", source, top / "clone")
    for i in range(3):
        (top / "clone" / f"file{i}").write_text("changed")
        run("git", "commit", "-qam", f"{i}", cwd=top / "clone")
    run("git", "branch", "other", cwd=top / "clone")
    run("git", "gc", "-q", cwd=top / "clone")
    run("git", "push", "-q", "origin", "other", cwd=top / "clone")
    run("git", "checkout", "-q", "other", cwd=source)
    for one in ("source", "clone"):
        run("git", "fsck", "--full", "--strict", cwd=top / one)
        assert run("git", "status", "--porcelain", cwd=top / one) == ""
    assert (source / "file2").read_text() == "changed"
    shop.check(top)
    run("git", "clone", "-q", top / "clone", tmp_path / "out")
    run("git", "fsck", "--full", cwd=tmp_path / "out")


ODD_NAMES = (
    "with space", "new\nline", "tab\t", "quote'\"", "back\\slash", "-dash", "ünïcödé", "日本語", "%41%2F",
    "a+b&c=d", "~tilde", "#hash?", "*star", "dot.", "...", ".hidden", "x" * 255, "emoji😀", "e\u0301",
    "semi;colon", "$dollar", "[brackets]", "{braces}", "<angle>", "pi|pe", "at@", "CAPITAL", "capital",
)  # fmt: skip


def make_odd_tree(top: Path) -> None:
    rng = random.Random(1)
    for i, name in enumerate(ODD_NAMES):
        (top / name).write_bytes(rng.randbytes(rng.choice((0, 1, 4095, 70_000))))
        (top / name).chmod((0o644, 0o600, 0o755, 0o444, 0o640)[i % 5])
        os.utime(top / name, ns=(10**18, 1_500_000_000_000_000_000 + i * 1_000_000_001))
    deep = top / "directory"
    for name in ODD_NAMES[:5]:
        deep = deep / name
        deep.mkdir(parents=True)
        (deep / "file").write_bytes(name.encode())
    (top / "empty").mkdir()
    (top / "empty mode").mkdir(mode=0o700)
    os.symlink("with space", top / "link")
    os.symlink("nowhere/at all", top / "broken")
    os.symlink("directory", top / "to a directory")


def as_listed(top: Path) -> dict[str, tuple[int, int, int]]:
    """Modes, sizes and times."""
    found = {}
    for at, directories, files in os.walk(top):
        for name in files + directories:
            st = os.lstat(os.path.join(at, name))
            size = 0 if os.path.isdir(os.path.join(at, name)) else st.st_size
            mtime = 0 if os.path.islink(os.path.join(at, name)) else st.st_mtime_ns
            found[os.path.relpath(os.path.join(at, name), top)] = (st.st_mode, size, mtime)
    return found


def test_tar(shop: Shop, top: Path, tmp_path: Path) -> None:
    """Names, modes, times and links of a tree survive `tar x`."""
    (tmp_path / "tree").mkdir()
    make_odd_tree(tmp_path / "tree")
    run("tar", "cf", tmp_path / "tree.tar", "--format=posix", "-C", tmp_path, "tree")
    run("tar", "xpf", tmp_path / "tree.tar", "-C", top)
    assert not difference(tree_of(tmp_path / "tree"), tree_of(top / "tree"))
    assert as_listed(tmp_path / "tree") == as_listed(top / "tree")
    shop.check(top)
    assert as_listed(tmp_path / "tree") == as_listed(top / "tree"), "as before it was uploaded"
    run("tar", "cf", top / "again.tar", "--format=posix", "-C", top, "tree")
    run("tar", "df", top / "again.tar", "-C", tmp_path)


def test_rsync(shop: Shop, top: Path, tmp_path: Path) -> None:
    """The second run of `rsync -a` sends nothing, before and after the upload; a third sends what changed."""
    need("rsync")
    (tmp_path / "tree").mkdir()
    make_odd_tree(tmp_path / "tree")

    def sent() -> list[str]:
        return run("rsync", "-ai", f"{tmp_path}/tree/", f"{top}/tree/").splitlines()

    assert len(sent()) > len(ODD_NAMES)
    assert sent() == []
    shop.check(top)
    assert sent() == []
    (tmp_path / "tree" / "dot.").write_bytes(b"other")
    (tmp_path / "tree" / "...").unlink()
    os.rename(tmp_path / "tree" / "CAPITAL", tmp_path / "tree" / "renamed")
    run("rsync", "-a", "--delete", "--inplace", f"{tmp_path}/tree/", f"{top}/tree/")
    assert not difference(tree_of(tmp_path / "tree"), shop.check(top / "tree"))


def make_wheel(where: Path) -> Path:
    wheel = where / "proved-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        names = [f"proved/m{i}.py" for i in range(40)] + ["proved/__init__.py", "proved/data/blob"]
        for name in names:
            file.writestr(name, "value = 1\n" * 100 if name.endswith(".py") else os.urandom(300 * KiB))
        about = "proved-1.0.dist-info"
        file.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: proved\nVersion: 1.0\n")
        file.writestr(
            f"{about}/WHEEL", "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        file.writestr(f"{about}/RECORD", "".join(f"{name},,\n" for name in names))
    return wheel


def test_pip(shop: Shop, top: Path, tmp_path: Path) -> None:
    """A package is installed, imported and replaced."""
    wheel = make_wheel(tmp_path)
    for more in ((), ("--upgrade",)):
        run(sys.executable, "-m", "pip", "install", "-q", *more, "--target", top / "site", wheel)
        program = "import proved.m7; print(proved.m7.value, proved.__file__)"
        done = run(sys.executable, "-c", f"import sys; sys.path.insert(0, {str(top / 'site')!r}); {program}")
        assert done.startswith(f"1 {top}")
    assert shop.check(top)["site/proved/data/blob"]


WRITER = """
import sqlite3, sys
db = sqlite3.connect(sys.argv[1], isolation_level=None)
db.execute("PRAGMA journal_mode=DELETE")
n = db.execute("SELECT coalesce(max(n), 0) FROM t").fetchone()[0]
while True:
    n += 1
    db.execute("BEGIN IMMEDIATE")
    db.executemany("INSERT INTO t VALUES (?, ?)", [(n, bytes([n % 256]) * 500) for _ in range(20)])
    db.execute("COMMIT")
    print(n, flush=True)
"""


def test_sqlite(shop: Shop, top: Path) -> None:
    """Transactions with a rollback journal, the writer killed in the middle of them: what was committed is
    there, whole, and the next writer goes on."""
    db = sqlite3.connect(top / "db", isolation_level=None)
    db.execute("PRAGMA journal_mode=DELETE")
    db.execute("CREATE TABLE t (n INTEGER, data BLOB)")
    db.close()
    last = 0
    for round in range(3):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(top / "db")], stdout=subprocess.PIPE, text=True
        ) as writer:
            assert writer.stdout is not None
            for _ in range(5 + round):
                last = int(writer.stdout.readline())
            writer.send_signal(signal.SIGKILL)
            said = writer.stdout.read().split()
            last = int(said[-1]) if said else last
        db = sqlite3.connect(top / "db", isolation_level=None)
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        counts = dict(db.execute("SELECT n, count(*) FROM t GROUP BY n").fetchall())
        assert set(counts.values()) == {20}
        assert len(counts) in (last, last + 1)
        assert max(counts) == len(counts)
        db.close()
    assert set(shop.check(top)) == {"db"}


def test_checkpoints(shop: Shop, top: Path) -> None:
    """Writers of model files: a zip with sizes filled in afterwards, and a header with mapped tensors."""
    tensors = [os.urandom(random.Random(i).randrange(1, 400_000)) for i in range(10)]
    with open(top / "model.pt", "w+b") as target, zipfile.ZipFile(target, "w") as file:
        for i, data in enumerate(tensors):
            with file.open(f"archive/data/{i}", "w") as one:  # seeks back to its header when it is closed
                one.write(data)
    with zipfile.ZipFile(top / "model.pt") as file:
        assert file.testzip() is None
        assert [file.read(f"archive/data/{i}") for i in range(10)] == tensors
    offsets, at = {}, 0
    for i, data in enumerate(tensors):
        offsets[f"t{i}"] = [at, at + len(data)]
        at += len(data)
    header = json.dumps(offsets).encode()
    with open(top / "model.safetensors", "w+b") as target:
        target.write(struct.pack("<Q", len(header)) + header)
        target.truncate(8 + len(header) + at)
        target.flush()
        with mmap.mmap(target.fileno(), 8 + len(header) + at) as mapped:
            for i, data in enumerate(tensors):
                start = 8 + len(header) + offsets[f"t{i}"][0]
                mapped[start : start + len(data)] = data
    assert (top / "model.safetensors").read_bytes() == struct.pack("<Q", len(header)) + header + b"".join(
        tensors
    )
    assert set(shop.check(top)) == {"model.pt", "model.safetensors"}


def save(path: Path, data: bytes) -> None:
    """As editors and trainers do: beside, synced, in place, synced."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(beside, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.rename(beside, path)
    directory = os.open(path.parent, os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)


def test_files_are_put_in_place(shop: Shop, top: Path) -> None:
    """Again and again, while uploads run and others read: each reader sees one of them whole."""
    wrong: list[object] = []
    ended = threading.Event()
    size = 50_000

    def read() -> None:
        while not ended.is_set():
            try:
                data = (top / "latest").read_bytes()
            except OSError as error:
                wrong.append(error)
            else:
                if data != data[:1] * size:
                    wrong.append((len(data), sorted(set(data))))

    save(top / "latest", b"\0" * size)
    reader = threading.Thread(target=read)
    reader.start()
    try:
        for i in range(60):
            save(top / "latest", bytes([i]) * size)
            save(top / f"step{i % 7}", bytes([i]) * i)
            os.replace(top / f"step{i % 7}", top / "step")
    finally:
        ended.set()
        reader.join()
    assert not wrong
    found = shop.check(top)
    assert found == {"latest": bytes([59]) * size, "step": bytes([59]) * 59}


def test_a_log_is_appended_to_all_the_while(shop: Shop, top: Path) -> None:
    """By one who keeps it open, and by ones that open it each time; every line is there once."""
    lines = 400

    def keep_open() -> None:
        with open(top / "kept", "a", buffering=1) as log:
            for i in range(lines):
                log.write(f"line {i}\n")

    def open_each_time(name: str) -> None:
        for i in range(lines):
            with open(top / "log", "a") as log:
                log.write(f"{name} {i}\n")

    threads = [threading.Thread(target=keep_open)]
    threads += [threading.Thread(target=open_each_time, args=(name,)) for name in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = shop.check(top)
    assert found["kept"] == b"".join(b"line %d\n" % i for i in range(lines))
    written = (found["log"] or b"").decode().splitlines()
    for name in ("a", "b"):
        assert [line for line in written if line[0] == name] == [f"{name} {i}" for i in range(lines)]
    assert len(written) == 2 * lines
