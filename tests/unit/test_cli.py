"""The command line, in this process: what is typed, what is printed, what is returned."""

import argparse
import dataclasses
import email.utils
import io
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from datacache.cache.directory import Owner
from datacache.cache.tier import TierStats
from datacache.cache.tiered import open_cache
from datacache.cli import doctor, fstab, load, mount, progress, snapshot, status, tables, targets, umount
from datacache.cli.main import COMMANDS, UsageError, command_parser, main
from datacache.clock import SystemClock, VirtualClock
from datacache.cluster import registry
from datacache.cluster.control import CachedPath
from datacache.cluster.server import ControlServer
from datacache.config.keys import KEYS
from datacache.config.settings import CacheSettings, Settings, TierSettings, WritingSettings
from datacache.errors import (
    Denied,
    MountError,
    NoSuchPath,
    NotFound,
    SettingError,
    SourceError,
    Unavailable,
    Unsupported,
)
from datacache.model import Buffer, ByteRange, Dataset, GiB, Medium, MiB, MountPoint, ObjectInfo, Version
from datacache.reading.job import LoadRequest, LoadStatus
from datacache.sources.memory import MemorySink, MemorySource
from datacache.sources.source import Page
from fuse import mountpoint


@pytest.fixture(autouse=True)
def own_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sockets, state and caches of a test lie in its own directory; no variable of ours is set."""
    for name in [name for name in os.environ if name.startswith("DATACACHE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("DATACACHE_RUNTIME", str(tmp_path / "run"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


Said = Callable[..., tuple[int, str, str]]


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Said:
    """Run a command line: exit code, standard output, standard error."""

    def run(*words: str) -> tuple[int, str, str]:
        code = main(words)
        out = capsys.readouterr()
        return code, out.out, out.err

    return run


# ---- the command line itself --------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_flag_has_help(name: str, say: Said) -> None:
    """A flag without an explanation is a flag that nobody finds."""
    parser = command_parser(name)
    assert not [a for a in parser._actions if not a.help or a.help is argparse.SUPPRESS]
    code, out, err = say(name, "--help")
    assert (code, err) == (0, "")
    assert f"datacache {name}" in out


def test_every_key_has_a_flag_of_its_name() -> None:
    """Flags, keys of datacache.yaml and variables carry the same names."""
    flags = {s.removeprefix("--") for a in command_parser("mount")._actions for s in a.option_strings}
    assert set(KEYS) - flags == {"uri", "mounts", "directory"}, "these are the words beside the flags"


def test_help_is_fast() -> None:
    """Nothing heavy is imported for a help text or a mistake."""
    heavy = {
        "rich",
        "yaml",
        "aiohttp",
        "obstore",
        "botocore",
        "fsspec",
        "pyfuse3",
        "trio",
        "xxhash",
    }
    code = (
        "import sys; from datacache.cli.main import main; main(['--help']); main(['mount', '--help']);"
        f"print('heavy:', sorted({heavy} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "heavy: []" in done.stdout


def test_version_and_overview(say: Said) -> None:
    """The version is one line; no command at all is a wrong command line that shows the commands."""
    assert say("--version")[1].startswith("datacache ")
    code, out, _ = say()
    assert code == 2
    assert all(name in out for name in COMMANDS)
    assert say("--help")[0] == 0
    assert say("help", "umount")[1] == say("umount", "--help")[1]


WRONG = [
    (["mout"], "mout: unknown command; did you mean `datacache mount`?"),
    (["xyzzy"], "xyzzy: unknown command (see `datacache --help`)"),
    (["--vresion"], "--vresion: unknown flag"),
    (["mount", "--polcy", "lru", "file:///data", "/mnt"], "--polcy: unknown flag; did you mean --policy?"),
    (["mount", "--ro", "file:///data", "/mnt"], "--ro: unknown flag; it is read-only without --rw"),
    (["mount", "--polcy=lru", "file:///data", "/mnt"], "--polcy: unknown flag; did you mean --policy?"),
    (["mount", "--token-fil", "/x"], "--token-fil: unknown flag; did you mean --token-file?"),
    (["controller", "--namespce", "x"], "--namespce: unknown flag; did you mean --namespace?"),
    (["controller", "--namespace", "x"], "--image: '' will not do; expected the name of an image"),
    (["mount", "--pol", "lru", "file:///data", "/mnt"], "--pol: unknown flag"),
    (["mount", "file:///data", "/mnt", "--cache"], "--cache: expected one argument"),
    (["mount", "file:///data", "/mnt", "--policy", "fifo"], "--policy: 'fifo' will not do"),
    (["mount", "file:///data", "/mnt", "--ttl", "soon"], "--ttl: 'soon' will not do"),
    (["mount", "file:///data", "/mnt", "--block-size", "5MiB"], "--block-size: '5MiB' will not do"),
    (["mount", "file:///data", "/mnt", "--cache", "hdd:/x=1GiB"], "'hdd' will not do"),
    (["mount", "file:///data", "/mnt", "--cache", "ssd:/x=lots"], "'lots' will not do"),
    (["mount", "file:///data", "/mnt", "--option", "secret_key=x"], "no secret here"),
    (["mount", "file:///data", "/mnt", "--file-mode", "999"], "--file-mode: '999' will not do"),
    (["mount", "file:///data", "/mnt", "--max-tasks", "-1"], "--max-tasks"),
    (["mount", "file:///data", "/mnt", "--metrics", "9090"], "--metrics: '9090' will not do"),
    (["mount", "file:///data", "/mnt", "--config", "/nowhere.yaml"], "--config: '/nowhere.yaml' will not do"),
    (["mount", "file:///data", "/mnt", "--path-style", "--virtual-host"], "not allowed with"),
    (["mount", "s3:/bucket", "/mnt"], "URI: 's3:/bucket' will not do"),
    (["mount", "nosuch://bucket", "/mnt"], "nosuch"),
    (["mount", "file:///data"], "DIR: '' will not do"),
    (["mount", "/mnt"], "URI: '' will not do"),
    (["mount"], "URI: '' will not do"),
    (["umount"], "required: DIR"),
    (["umount", "/mnt", "--lazy", "--force"], "not allowed with"),
    (["umount", "/no/such/directory"], "DIR: '/no/such/directory' will not do"),
    (["load"], "TARGET: '' will not do"),
    (["load", "nothing-of-this-name"], "TARGET: 'nothing-of-this-name' will not do"),
    (["load", "file:///data", "--bandwidth", "fast"], "--bandwidth: 'fast' will not do"),
    (["load", "file:///data", "--bandwidth", "0"], "--bandwidth: '0' will not do"),
    (["load", "file:///data", "--concurrency", "0"], "--concurrency: '0' will not do"),
    (["load", "file:///data", "--outage-timeout", "soon"], "--outage-timeout: 'soon' will not do"),
    (["load", "file:///data", "--files-from", "/no/such/list"], "--files-from: '/no/such/list' will not do"),
    (["load", "file:///data", "--files-from", "/dev/null", "--path", "*"], "--path: '*' will not do"),
    (["load", "file:///data", "--files-from", "a", "--order", "b"], "not allowed with"),
    (["load", "file:///data", "--order", "/dev/null"], "--order"),
    (["load", "file:///data", "--resume"], "--resume: 'file:///data' will not do"),
    (["load", "file:///data", "--resume", "--path", "*"], "a target whose last load was interrupted"),
    (["load", "/mnt", "--policy", "lru"], "--policy: '/mnt' will not do; expected a URI"),
    (["status", "--interval", "0"], "--interval: '0' will not do"),
    (["status", "a", "b"], "b: unknown argument"),
    (["ls"], "required: PATH"),
    (["stat"], "required: PATH"),
    (["evict", "--dryrun", "/mnt"], "--dryrun: unknown flag; did you mean --dry-run?"),
    (["pin"], "required: PATH"),
    (["verify", "/no/such/directory"], "TARGET: '/no/such/directory' will not do"),
    (["snapshot"], "required: ACTION"),
    (["snapshot", "make", "file:///data", "a"], "make: unknown action"),
    (["snapshot", "create", "file:///data"], "the name of a snapshot expected"),
    (["snapshot", "diff", "file:///data", "a"], "the names of two snapshots expected"),
    (["snapshot", "list", "file:///data", "a"], "no snapshot name expected"),
    (["doctor", "file:///data", "--cache", "ssd"], "--cache: 'ssd' will not do"),
    (["demo", "--s3", "http://"], "--s3: 'http://' will not do"),
    (["demo", "--s3", "minio:9000"], "--s3: 'minio:9000' will not do"),
    (["demo", "--data", "/no/such/directory"], "--data: '/no/such/directory' will not do"),
]


@pytest.mark.parametrize(("words", "part"), WRONG, ids=[" ".join(words) or "-" for words, _ in WRONG])
def test_wrong_input_is_one_line_and_code_2(
    words: list[str], part: str, say: Said, own_directories: Path
) -> None:
    """What is wrong is named in one line, and nothing was started or made."""
    code, out, err = say(*words)
    assert (code, out) == (2, "")
    assert err.startswith("datacache: error: ")
    assert err.count("\n") == 1
    assert part in err
    assert not list(own_directories.rglob("*.json"))


def test_a_secret_in_a_flag_is_not_repeated(say: Said) -> None:
    """A complaint about a URI does not print the password in it."""
    code, _, err = say("mount", "https://user:hunter2@host/data", "/mnt")
    assert code == 2
    assert "hunter2" not in err


def test_no_mount_is_an_error_of_the_world_not_of_the_command_line(say: Said) -> None:
    """A path that no running mount has: code 1, and where to look."""
    for command in ("ls", "stat", "evict", "pin", "unpin", "status"):
        code, _, err = say(command, "/no/such/mount")
        assert code == 1
        assert err == (
            "datacache: error: /no/such/mount: no running mount has it; "
            "`datacache status` lists the mounts there are\n"
        )


def test_debug_shows_the_traceback(say: Said) -> None:
    """One line is for users; --debug is for us, before or after the command."""
    for words in (["ls", "/nowhere", "--debug"], ["--debug", "ls", "/nowhere"]):
        code, _, err = say(*words)
        assert code == 1
        assert "Traceback" in err
        assert err.splitlines()[-1].startswith("datacache: error: /nowhere")


def test_reading_less_than_is_printed_is_no_error_message() -> None:
    """`datacache --help | head -1` ends quietly, with the code of a broken pipe."""
    code = "from datacache.cli.main import main; import sys; sys.stdin.read(); sys.exit(main(['status']))"
    reader, writer = os.pipe()
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=writer, stderr=subprocess.PIPE
    )
    os.close(writer)
    os.close(reader)
    _, err = child.communicate()
    assert (child.returncode, err) == (141, b"")


# ---- what is written for people -----------------------------------------------------------------------


def test_columns_are_aligned() -> None:
    """Columns are as wide as their widest cell, figures on the right."""
    rows = [["NAME", "SIZE"], ["a", "10"], ["longer", "7"]]
    assert tables.columns(rows, right=[1]) == ["NAME    SIZE", "a         10", "longer     7"]
    assert tables.columns([]) == []


def test_names_cannot_move_the_cursor() -> None:
    """A key of a bucket may hold escape sequences; a terminal is not shown them."""
    assert tables.printable("a\x1b[2Jb\nc") == "a\\x1b[2Jb\\nc"
    assert tables.printable("é\udcff") == "é\udcff", "bytes that are no UTF-8 go out as they are"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (59.9, "59s"), (61, "1m01s"), (7384, "2h03m"), (float("inf"), "?")]
)
def test_spans(seconds: float, text: str) -> None:
    """Times to go are written as people say them."""
    assert tables.span(seconds) == text


def test_shares_do_not_round_up_to_all() -> None:
    """100 % means that nothing is missing."""
    assert tables.share(999, 1000) == "99 %"
    assert tables.share(1000, 1000) == "100 %"
    assert tables.share(0, 0) == "-"


def test_json_holds_any_name() -> None:
    """A name that is no UTF-8 comes back from the JSON as it was."""
    assert json.loads(tables.as_json({"a": "\udcff\n"})) == {"a": "\udcff\n"}


# ---- the fstab helper ---------------------------------------------------------------------------------


def test_fstab_options_are_flags() -> None:
    """mount(8) and fstab write what the command line writes, with other punctuation."""
    words = fstab.translate(
        [
            "s3://b/x",
            "/mnt/x",
            "-s",
            "-v",
            "-o",
            "rw,_netdev,x-systemd.automount,allow_other,ttl=5m,cache=ssd:/x=1GiB",
        ]
    )
    assert words == ["mount", "s3://b/x", "/mnt/x", "--allow-other", "--ttl=5m", "--cache=ssd:/x=1GiB"]


def test_fstab_can_say_that_it_is_written_to() -> None:
    """`rw` comes from mount(8) where nobody says it: it means nothing, and with a value it is a mistake."""
    assert fstab.translate(["s3://b", "/mnt", "-o", "rw"]) == ["mount", "s3://b", "/mnt"]
    assert fstab.translate(["s3://b", "/mnt", "-o", "rw,writable"]) == ["mount", "s3://b", "/mnt", "--rw"]
    with pytest.raises(
        UsageError, match="rw: takes no value; what is to be written to has the option `writable`"
    ):
        fstab.translate(["s3://b", "/mnt", "-o", "rw=true"])


def test_fstab_quoted_values_may_hold_commas() -> None:
    """mount(8) writes name="a,b" for a value with a comma."""
    words = fstab.translate(["s3://b", "/mnt", "-o", 'cache="ssd:/x=1GiB,high=0.9",strict'])
    assert words == ["mount", "s3://b", "/mnt", "--cache=ssd:/x=1GiB,high=0.9", "--strict"]


def test_fstab_with_a_config_file_needs_no_uri() -> None:
    """The first column of fstab may be any word when the file has the URIs."""
    words = fstab.translate(["datacache", "/mnt", "-t", "fuse.datacache", "-o", "config=/etc/x.yaml"])
    assert words == ["mount", "/mnt", "--config=/etc/x.yaml"]


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["s3://b"], "usage"),
        (["s3://b", "/mnt", "-o", "tll=5m"], "tll: unknown option"),
        (["s3://b", "/mnt", "-o", "ttl"], "ttl: needs a value"),
        (["s3://b", "/mnt", "-o", "strict=yes"], "strict: takes no value"),
        (["s3://b", "/mnt", "-x"], "-x: unknown flag"),
    ],
)
def test_fstab_mistakes_have_the_code_of_mount(
    words: list[str], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is wrong in fstab is one line and code 1, "incorrect invocation"."""
    with pytest.raises(UsageError, match=part):
        fstab.translate(words)
    assert fstab.main(words) == 1
    assert part in capsys.readouterr().err


def test_fstab_helper_answers_in_codes_of_mount(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Wrong settings are 1 for mount(8), a mount that fails is 32, a fake one (-f) is done."""
    assert fstab.main(["s3://b", "/mnt", "-o", "ttl=soon"]) == 1
    assert fstab.main(["s3://b", "/mnt", "-f"]) == 0
    assert "--ttl: 'soon'" in capsys.readouterr().err


# ---- a load, followed ---------------------------------------------------------------------------------

RUNNING = LoadStatus(
    "load-1", "running", files=400, bytes=400 * MiB, listed=True, files_done=120, bytes_done=120 * MiB,
    files_skipped=20, bytes_fetched=100 * MiB, seconds=10.0,
)  # fmt: skip
DONE = LoadStatus(
    "load-1", "done", files=400, bytes=400 * MiB, listed=True, files_done=400, bytes_done=400 * MiB,
    files_skipped=20, bytes_fetched=380 * MiB, seconds=38.0,
)  # fmt: skip


class FakeControl:
    """A worker that has some paths and one load job, and writes down what it is asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.more: dict[str, Any] = {}
        self.job: list[LoadStatus | BaseException] = [RUNNING, DONE]
        self.paths = [
            CachedPath("/img", "directory", 0),
            CachedPath(
                "/img/a\x1b.jpg", "file", 1000, 1_700_000_000 * 10**9, '"v1"', "s3://b/img/a", {"mem": 999}
            ),
            CachedPath("/img/b.jpg", "file", 2048, 0, "", "s3://b/img/b", {"ssd": 2048}, pinned=True),
            CachedPath("/img/c.jpg", "file", 10, 0, "", "s3://b/img/c"),
        ]
        self.found = {"entries": 3, "blocks": 10, "damaged": 2, "repaired": 2, "orphans": 0}

    def status(self) -> dict[str, Any]:
        tier = TierStats("ssd:/var/cache/x", 100 * GiB, 25 * GiB, 1234, "full", "at its quota")
        return {
            "tiers": [dataclasses.asdict(tier)],
            "reader": {"hit_ratio": 0.5, "bytes_fetched": 3 * MiB, "in_flight": 2},
            "mount_requests": {"read": 7, "lookup": 1},
            "errors": {},
        } | self.more

    def load(self, request: LoadRequest) -> str:
        self.asked.append(("load", request))
        return "load-1"

    def load_status(self, job: str) -> LoadStatus:
        answer = self.job.pop(0) if len(self.job) > 1 else self.job[0]
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def load_cancel(self, job: str) -> None:
        self.asked.append(("cancel", job))
        self.job = [dataclasses.replace(RUNNING, state="cancelled")]

    def list(self, path: str, *, after: int = 0, limit: int = 1000) -> tuple[list[CachedPath], int]:
        self.asked.append(("list", path, after))
        return self.paths[after : after + 2], after + 2 if after + 2 < len(self.paths) else 0

    def stat(self, path: str) -> CachedPath:
        for found in self.paths:
            if found.path == path:
                return found
        raise NoSuchPath(f"{path}: no such path")

    def evict(self, path: str, *, dry_run: bool = False) -> tuple[int, int]:
        self.asked.append(("evict", path, dry_run))
        return 3, 3 * MiB

    def pin(self, path: str, pinned: bool) -> int:
        self.asked.append(("pin", path, pinned))
        return 3

    def verify(self) -> dict[str, int]:
        return self.found


def test_rate_and_time_left_count_what_is_fetched() -> None:
    """What was cached before the job makes it neither faster nor longer."""
    assert progress.rate(RUNNING) == 10 * MiB
    assert progress.left(RUNNING) == 28
    assert progress.left(DONE) == 0
    assert progress.left(dataclasses.replace(RUNNING, listed=False)) == float("inf")
    assert progress.left(dataclasses.replace(RUNNING, bytes_fetched=0)) == float("inf")
    nothing = LoadStatus("load-1", "running", listed=True)
    assert progress.left(nothing) == 0
    assert progress.line(RUNNING) == "120 of 400 files, 120.0 MiB of 400.0 MiB, 10.0 MiB/s, 28s left"
    assert "400+ files" in progress.line(dataclasses.replace(RUNNING, listed=False))
    assert progress.line(LoadStatus("load-1", "done", files=1, listed=True)).startswith("0 of 1 file, ")
    assert progress.line(dataclasses.replace(DONE, files_failed=3)).endswith("10.0 MiB/s, 3 failed")


def test_a_load_into_a_log_file_is_a_line_every_five_seconds(clock: VirtualClock) -> None:
    """No terminal, no bar: lines that can be read later, not four a second."""
    control, out = FakeControl(), io.StringIO()
    control.job = [*[RUNNING] * 50, DONE]
    assert progress.follow(control, "load-1", out=out, clock=clock) == DONE
    assert out.getvalue().splitlines() == [progress.line(RUNNING)] * 2, "12.5 seconds passed"


def test_a_load_that_waits_for_the_store_says_so(clock: VirtualClock) -> None:
    """A bar that stands still is explained; a log has the reason, too."""
    control, out = FakeControl(), io.StringIO()
    waiting = dataclasses.replace(RUNNING, waiting="s3://b has not answered for 42 s")
    assert progress.line(waiting).endswith("10.0 MiB/s, waiting for the store")
    control.job = [*[waiting] * 30, DONE]
    progress.follow(control, "load-1", out=out, clock=clock)
    assert out.getvalue().endswith("waiting for the store (s3://b has not answered for 42 s)\n")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_load_on_a_terminal_is_a_bar(clock: VirtualClock) -> None:
    """Files, bytes, rate and time left move in place, and nothing of it stays."""
    control, out = FakeControl(), Terminal()
    control.job = [LoadStatus("load-1", "running"), RUNNING, DONE]
    progress.follow(control, "load-1", out=out, clock=clock)
    assert "120 of 400 files" in out.getvalue()
    assert "\x1b" in out.getvalue()


def test_an_interrupted_load_is_not_waited_for_longer_than_its_patience(clock: VirtualClock) -> None:
    """A store that stalls does not hold up Ctrl-C."""
    control, begun = FakeControl(), clock.monotonic()
    control.job = [RUNNING]
    assert progress.follow(control, "load-1", quiet=True, patience=3.0, clock=clock) == RUNNING
    assert clock.monotonic() - begun == 3.0


def test_a_quiet_load_prints_nothing(clock: VirtualClock) -> None:
    """With --json the only output is the object at the end."""
    out = Terminal()
    progress.follow(FakeControl(), "load-1", out=out, quiet=True, clock=clock)
    assert out.getvalue() == ""


# ---- commands on a running worker ---------------------------------------------------------------------


@pytest.fixture
def worker(own_directories: Path) -> Iterator[FakeControl]:
    """A worker that registered as mounted at <tmp>/mnt, data set `images`."""
    control = FakeControl()
    run = own_directories / "run"
    run.mkdir(mode=0o700, exist_ok=True)
    socket = str(run / "images.sock")
    server = ControlServer(control, socket)
    server.start()
    mount, cache = own_directories / "mnt", own_directories / "own-cache"
    mount.mkdir()
    cache.mkdir()
    registration = registry.Registration(
        pid=os.getpid(), mount=str(mount), dataset="images", socket=socket, caches=[str(cache)], started=0.0
    )
    registry.register(str(run), registration)
    try:
        yield control
    finally:
        registry.unregister(str(run), registration)
        server.close()


def test_ls_shows_what_is_cached_where(worker: FakeControl, say: Said, tmp_path: Path) -> None:
    """Each line: size, share that is cached, tier, name; page by page."""
    code, out, _ = say("ls", str(tmp_path / "mnt" / "img"))
    assert code == 0
    rows = [line.split() for line in out.splitlines()]
    assert rows == [
        ["-", "-", "-", "img/"],
        ["1000", "B", "99", "%", "mem", "a\\x1b.jpg"],
        ["2.0", "KiB", "100", "%", "ssd", "pinned", "b.jpg"],
        ["10", "B", "0", "%", "-", "c.jpg"],
    ]
    assert worker.asked == [("list", "/img", 0), ("list", "/img", 2)]
    _, out, _ = say("ls", "-l", "images:/img")
    assert '"v1"' in out
    _, out, _ = say("ls", "--json", "images:/img")
    assert [json.loads(line)["path"] for line in out.splitlines()] == [p.path for p in worker.paths]


def test_stat_says_all_of_one_path(worker: FakeControl, say: Said, tmp_path: Path) -> None:
    """Version, URI, bytes in each tier; a directory has none of that; what is not there is an error."""
    _, out, _ = say("stat", str(tmp_path / "mnt/img/b.jpg"))
    assert "in ssd:   2048 (100 %)" in out
    assert "pinned:   yes" in out
    _, out, _ = say("stat", "images:/img/c.jpg")
    assert "cached:   no" in out
    _, out, _ = say("stat", "images:/img")
    assert out.splitlines() == ["path: /img", "kind: directory"]
    _, out, _ = say("stat", "--json", "images:/img/c.jpg")
    assert json.loads(out)["uri"] == "s3://b/img/c"
    code, _, err = say("stat", "images:/nothing")
    assert (code, err) == (1, "datacache: error: /nothing: no such path\n")


def test_evict_pin_and_unpin(worker: FakeControl, say: Said, tmp_path: Path) -> None:
    """They ask the worker for exactly that path and say how much it was."""
    assert say("evict", str(tmp_path / "mnt/img"), "--dry-run")[1].endswith(
        "3 files, 3.0 MiB would be evicted\n"
    )
    assert json.loads(say("evict", "images:/", "--json")[1])["bytes"] == 3 * MiB
    assert say("rm", "images:/img", "--cache-only", "--dry-run")[1].endswith("would be evicted\n")
    code, _, err = say("rm", "images:/img")
    assert (code, "--cache-only" in err) == (2, True), "files are rm(1)'s to remove"
    code, _, err = say("rm", "images:/img", "--cach-only")
    assert (code, "did you mean --cache-only" in err) == (2, True)
    assert say("pin", "images:/img")[1] == "images:/img: 3 files pinned\n"
    assert json.loads(say("unpin", "images:/img", "--json")[1])["pinned"] is False
    assert worker.asked == [
        ("evict", "/img", True), ("evict", "/", False), ("evict", "/img", True),
        ("pin", "/img", True), ("pin", "/img", False),
    ]  # fmt: skip


def test_verify_asks_the_owner_of_a_cache(worker: FakeControl, say: Said, tmp_path: Path) -> None:
    """A cache that is in use is verified by who uses it; damage that is left is code 1."""
    code, out, _ = say("verify", str(tmp_path / "own-cache"))
    assert (code, out) == (0, f"{tmp_path}/own-cache: 10 blocks of 3 entries: 2 damaged; 2 repaired\n")
    worker.found = {"entries": 3, "blocks": 10, "damaged": 2, "repaired": 1, "problems": 2}
    code, out, err = say("verify", str(tmp_path / "mnt"))
    assert code == 1
    assert "--repair" in err
    assert json.loads(say("verify", "images", "--json")[1])["damaged"] == 2


def test_status_of_all_of_one_and_as_json(worker: FakeControl, say: Said, tmp_path: Path) -> None:
    """Tiers as a table, every other figure on a line of its group."""
    code, out, _ = say("status")
    assert code == 0
    assert "images at" in out
    assert "full" in out
    assert "25 %" in out
    assert "at its quota" in out
    assert "reader: hit_ratio 50.0%, bytes_fetched 3.0 MiB, in_flight 2" in out
    assert "errors" not in out, "groups without figures are left out"
    one = json.loads(say("status", str(tmp_path / "mnt"), "--json")[1])
    assert one["mount_requests"]["read"] == 7
    assert one["dataset"] == "images"
    every = json.loads(say("status", "--json")[1])
    assert [m["dataset"] for m in every["mounts"]] == ["images"]


def test_status_without_mounts(say: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    """No mount is no error."""
    monkeypatch.setattr(mountpoint, "mounts", dict)  # other users of this machine may have some
    assert say("status") == (0, "nothing is mounted\n", "")
    assert json.loads(say("status", "--json")[1]) == {"mounts": []}


def test_status_of_a_worker_that_does_not_answer(own_directories: Path, say: Said) -> None:
    """It is a line with the reason, code 1, and no obstacle for the others."""
    run = own_directories / "run"
    run.mkdir(mode=0o700)
    gone = registry.Registration(
        pid=os.getpid(),
        mount="/mnt/gone",
        dataset="gone",
        socket=str(run / "gone.sock"),
        caches=[],
        started=0.0,
    )
    registry.register(str(run), gone)
    code, out, _ = say("status")
    broker = Path(registry.broker_socket(gone.socket))
    broker.touch()
    between = say("status")[1]
    broker.unlink()
    registry.unregister(str(run), gone)
    assert code == 1
    assert "gone at /mnt/gone" in out
    assert "does not answer (it has ended)" in out
    assert "its daemon has ended, and the next one begins" in between, "the broker of its mount lives"
    assert "where none does any more, its log says why, and `datacache upgrade` begins one" in between


def test_status_is_watched_until_interrupted(worker: FakeControl, capsys: pytest.CaptureFixture[str]) -> None:
    """--watch shows it again at each interval."""

    class ThreeTimes(VirtualClock):
        def sleep(self, seconds: float) -> None:
            super().sleep(seconds)
            if self.monotonic() >= 1_000_006:
                raise KeyboardInterrupt

    args = command_parser("status").parse(["--watch", "images"])
    with pytest.raises(KeyboardInterrupt):
        status.run(args, clock=ThreeTimes())
    assert capsys.readouterr().out.count("images at") == 3


def test_load_of_a_mount(worker: FakeControl, say: Said, tmp_path: Path) -> None:
    """The request is what was typed; the end is one line; nothing is left to resume."""
    code, out, err = say(
        "load", str(tmp_path / "mnt/img"), "--path", "**/*.jpg", "--path", "*.png",
        "--tier", "mem", "--bandwidth", "10MiB", "--concurrency", "3", "--verify",
        "--outage-timeout", "1.5m",
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert out == (
        f"{tmp_path}/mnt/img: 400 of 400 files cached (20 were before), 380.0 MiB fetched in 38.0 s, "
        "0 damaged blocks fetched again\n"
    )
    assert worker.asked == [
        ("load", LoadRequest("/img", ("**/*.jpg", "*.png"), None, False, "mem", 10 * MiB, 3, True, 90))
    ]
    assert say("load", str(tmp_path / "mnt/img"), "--resume")[0] == 2


def test_load_of_listed_files(worker: FakeControl, say: Said, tmp_path: Path) -> None:
    """Files are named relative to TARGET or as they are called under the mount; any byte will do."""
    names = tmp_path / "names"
    names.write_bytes(b"a.jpg\n" + os.fsencode(tmp_path) + b"/mnt/img/b.jpg\n\nx/../../\xff\n")
    say("load", str(tmp_path / "mnt/img"), "--files-from", str(names))
    names.write_bytes(b"new\nline\0other\0")
    say("load", "images", "--order", str(names))
    first, second = (request for _, request in worker.asked)
    assert first.files == ("/img/a.jpg", "/img/b.jpg", "/\udcff")
    assert second.files == ("/new\nline", "/other")
    assert (first.order, second.order) == (False, True)


def test_load_reads_the_list_from_standard_input(
    worker: FakeControl, say: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`find ... | datacache load TARGET --files-from -`."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\nb\n")))
    assert say("load", "images", "--files-from", "-")[0] == 0
    assert worker.asked[0][1].files == ("/a", "/b")


def test_load_with_failures_says_why_and_resumes(worker: FakeControl, say: Said) -> None:
    """Some files failed: code 1, the first reasons, and --resume asks for the same again."""
    failures = tuple((f"/f{i}", "denied") for i in range(25))
    worker.job = [dataclasses.replace(DONE, state="failed", failures=failures, files_failed=25)]
    code, _, err = say("load", "images", "--path", "*.jpg")
    assert code == 1
    assert err.count(": denied") == 20
    assert "and 5 more" in err
    assert "25 files failed; `datacache load images --resume` tries them again" in err
    worker.job = [DONE]
    assert say("load", "images", "--resume")[0] == 0
    assert worker.asked[0] == worker.asked[1]
    code, _, err = say("load", "images", "--resume")
    assert (code, "a target whose last load was interrupted" in err) == (2, True)


def test_load_that_matches_nothing_is_not_a_success(worker: FakeControl, say: Said) -> None:
    """A pattern with a mistake in it: code 1 and a line, instead of a job that cached nothing."""
    worker.job = [dataclasses.replace(DONE, files=0, files_done=0, bytes=0, bytes_done=0)]
    code, _, err = say("load", "images", "--path", "imgs/*")
    assert (code, err) == (1, "datacache: no file matches --path imgs/*\n")
    assert say("load", "images")[0] == 0, "a data set without files is loaded"


def test_load_resumes_with_the_selection_typed_again(worker: FakeControl, say: Said, tmp_path: Path) -> None:
    """--resume behind the same command is the same; behind another one it is an error."""
    worker.job = [dataclasses.replace(DONE, state="failed", files_failed=1)]
    say("load", "images", "--path", "*.jpg")
    assert say("load", "images", "--path", "*.png", "--resume")[0] == 2
    worker.job = [DONE]
    assert say("load", "images", "--path", "*.jpg", "--resume")[0] == 0
    assert worker.asked[0] == worker.asked[-1]


@pytest.mark.parametrize(
    "flag",
    [
        ["--tier", "mem"],
        ["--bandwidth", "1MiB"],
        ["--concurrency", "2"],
        ["--verify"],
        ["--outage-timeout", "1h"],
    ],
)
def test_an_order_is_not_loaded_and_takes_no_flags_of_loading(
    flag: list[str], worker: FakeControl, say: Said, tmp_path: Path
) -> None:
    """What would do nothing is refused by name."""
    names = tmp_path / "names"
    names.write_bytes(b"a.jpg\n")
    code, _, err = say("load", "images", "--order", str(names), *flag)
    assert (code, worker.asked) == (2, [])
    assert flag[0] in err


def test_load_as_json(worker: FakeControl, say: Said) -> None:
    """One object on standard output, with the failures."""
    worker.job = [dataclasses.replace(DONE, state="failed", failures=(("/a", "denied"),), files_failed=1)]
    code, out, _ = say("load", "images", "--json")
    result = json.loads(out)
    assert code == 1
    assert result["state"] == "failed"
    assert result["failures"] == [{"path": "/a", "reason": "denied"}]


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_load_is_cancelled_and_can_be_resumed(
    number: int, expected: int, worker: FakeControl, own_directories: Path
) -> None:
    """Ctrl-C and SIGTERM stop the job in the worker, and say how to go on."""
    worker.job = [RUNNING]
    child = subprocess.Popen(
        [sys.executable, "-c", _LOAD, "load", "images", "--path", "*.jpg"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert child.stdout is not None
    assert child.stdout.readline() == "looked\n"
    child.send_signal(number)
    _, err = child.communicate()
    assert child.returncode == expected
    assert ("cancel", "load-1") in worker.asked
    assert "`datacache load images --resume` goes on" in err
    worker.job = [DONE]
    assert main(["load", "images", "--resume"]) == 0
    assert worker.asked[-1][1].globs == ("*.jpg",)


# Says when it has looked at the job for the first time: from then on it can be interrupted.
_LOAD = """
import sys
from datacache.cluster import client
from datacache.cli.main import main
class Telling(client.ControlClient):
    def load_status(self, job):
        status = super().load_status(job)
        print("looked", flush=True)
        return status
client.ControlClient = Telling
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("target", "path"),
    [
        ("images", "/"), ("images:/a/b", "/a/b"), ("images:/../a//b/.", "/a/b"), ("MNT", "/"), ("MNT/", "/"),
        ("MNT/a/../b", "/b"), ("LINK/a", "/a"), ("CACHE", "/"),
    ],
)  # fmt: skip
def test_targets_name_a_worker_and_a_path(
    target: str, path: str, worker: FakeControl, own_directories: Path
) -> None:
    """A mount directory, what is in it, through links too; NAME, NAME:/path, a cache directory."""
    (own_directories / "link").symlink_to(own_directories / "mnt")
    for word, name in (("MNT", "mnt"), ("LINK", "link"), ("CACHE", "own-cache")):
        target = target.replace(word, str(own_directories / name))
    found = targets.find(target)
    assert found is not None
    assert (found.worker.dataset, found.path) == ("images", path)


def test_targets_that_are_not_there(worker: FakeControl, own_directories: Path) -> None:
    """A neighbour of a mount whose name begins alike is not in it."""
    for target in (
        str(own_directories / "mnt2"),
        "image",
        "other:/a",
        "s3://nothing/here",
        str(own_directories),
    ):
        assert targets.find(target) is None


# ---- doctor -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("release", "state"),
    [
        ("6.18.44-fc", "ok"),
        ("5.4.0-150-generic", "ok"),
        ("5.3.18", "fail"),
        ("4.19", "fail"),
        ("custom", "warn"),
    ],
)
def test_doctor_knows_the_oldest_kernel(release: str, state: str) -> None:
    """Older than 5.4 is named, and what cannot be read is a doubt."""
    assert doctor.kernel(release).state == state


def test_doctor_says_what_stands_in_the_way_of_fuse() -> None:
    """What is wrong is apart from what to do."""
    found = doctor.device("/dev/fuse is missing: `modprobe fuse`, or more")
    assert (found.state, found.text, found.advice) == (
        "fail", "/dev/fuse is missing", "`modprobe fuse`, or more",
    )  # fmt: skip
    assert doctor.device("").state == "ok"


@pytest.mark.parametrize(
    ("release", "root", "state", "says"),
    [
        ("6.18.1-amd64", True, "ok", "passthrough"),
        ("6.9.0", False, "warn", "root"),
        ("6.8.12", True, "warn", "pyfuse3"),
        ("5.15.0-1-generic", True, "warn", "pyfuse3"),
    ],
)
def test_doctor_says_which_driver_there_is(release: str, root: bool, state: str, says: str) -> None:
    """Native from 6.9 on, its passthrough for root; older kernels have pyfuse3, which then must be there."""
    found = doctor.native_driver(release, root=root)
    assert found.state == state
    assert says in found.text + found.advice
    assert doctor.portable_driver(native=state == "ok").state == "ok"


def test_doctor_on_fusermount(tmp_path: Path) -> None:
    """Only who is not root needs it, and then setuid root."""
    program = tmp_path / "fusermount3"
    program.touch()
    assert doctor.fusermount(None, root=True).state == "ok"
    assert doctor.fusermount(None, root=False).state == "fail"
    assert doctor.fusermount(str(program), root=False).state == "fail"
    program.chmod(0o4755)
    assert doctor.fusermount(str(program), root=False).state == "ok"


def test_doctor_on_allow_other(tmp_path: Path) -> None:
    """It fails only where somebody wants it; a comment in fuse.conf allows nothing."""
    conf = tmp_path / "fuse.conf"
    conf.write_text("#user_allow_other\n")
    assert doctor.fuse_conf(str(conf), root=False, wanted=True).state == "fail"
    assert doctor.fuse_conf(str(conf), root=False, wanted=False).state == "ok"
    assert doctor.fuse_conf(str(tmp_path / "none"), root=True, wanted=True).state == "ok"
    conf.write_text("user_allow_other\n")
    assert doctor.fuse_conf(str(conf), root=False, wanted=True).advice == ""


def _tier(medium: Medium, path: Path, quota: int) -> list[tuple[str, str]]:
    tier = TierSettings(medium, str(path), quota)
    return [(found.state, found.text) for found in doctor.tier_findings(tier, reserve=0.0)]


def test_doctor_says_whether_files_are_copied_between_cache_and_landing_zone(tmp_path: Path) -> None:
    """They are not where both lie on one file system, be they made or not; `status` says the same."""
    one = Settings(
        dataset=Dataset("x", (MountPoint("s3://x"),)), state=str(tmp_path / "state"), runtime=str(tmp_path),
        cache=CacheSettings(tiers=(TierSettings(Medium.SSD, str(tmp_path / "not made" / "cache"), MiB),)),
    )  # fmt: skip
    *_, found = doctor.landing_zone(one)
    assert (found.state, f"ssd:{tmp_path}" in found.text) == ("ok", True)
    if os.path.ismount("/dev/shm"):
        elsewhere = dataclasses.replace(one, writing=WritingSettings(landing="/dev/shm/not made"))
        volatile, copied = doctor.landing_zone(elsewhere)
        assert (volatile.state, copied.state) == ("warn", "warn")
        assert "lost with the power" in volatile.text


@pytest.mark.parametrize(
    ("kind", "states"),
    [("ext4", []), ("ceph", []), ("fuse.ceph-fuse", []), ("tmpfs", ["warn"]), ("fuse.datacache", ["fail"])],
)
def test_doctor_on_the_disk_of_a_landing_zone(kind: str, states: list[str]) -> None:
    assert [found.state for found in doctor.landing_disk("/x", kind)] == states


@pytest.mark.parametrize(
    ("landing", "states"),
    [
        ("theirs/landing", ["warn"]), ("theirs", ["warn"]), ("theirs/datacache-cache/l", ["fail"]),
        ("ours/landing", []), ("ours", []), ("ours/datacache-cache", ["fail"]), ("elsewhere", []),
        ("link/x", ["warn"]),
    ],
)  # fmt: skip
def test_doctor_on_a_landing_zone_in_a_cache(tmp_path: Path, landing: str, states: list[str]) -> None:
    """A cache may be deleted at any time, what lands may not; beside a tier of its own mount it may lie."""
    for name in ("theirs", "ours"):
        (tmp_path / name / "datacache-cache").mkdir(parents=True)
    (tmp_path / "link").symlink_to("theirs")
    own = [TierSettings(Medium.SSD, str(tmp_path / "ours"), MiB)]
    found = list(doctor.landing_place(str(tmp_path / landing), own))
    assert [one.state for one in found] == states


def test_mount_warns_of_its_landing_zone_or_refuses_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one line each, before anything is started."""
    (tmp_path / "theirs" / "datacache-cache").mkdir(parents=True)
    tiers = (TierSettings(Medium.SSD, str(tmp_path / "ours"), MiB),)
    one = Settings(Dataset("a", ()), f"{tmp_path}/state", "/run", cache=CacheSettings(tiers=tiers))
    for landing, said in (("theirs/l", True), ("l", False)):
        writing = WritingSettings(enabled=True, landing=str(tmp_path / landing))
        mount._check_landing(dataclasses.replace(one, writing=writing))
        err = capsys.readouterr().err
        assert (err.count("another data set"), "warning: " in err) == (said, said or "tmpfs" in err)
    writing = WritingSettings(enabled=True, landing=str(tmp_path / "theirs/datacache-cache/l"))
    with pytest.raises(SettingError, match=r"^--landing: .*elsewhere: .* among the files of a cache$"):
        mount._check_landing(dataclasses.replace(one, writing=writing))


def test_doctor_puts_an_object_and_removes_it() -> None:
    """Nobody's is overwritten, and nothing of it stays."""
    bucket = MemorySource()
    found = doctor.write_finding(MemorySink(bucket))
    assert (found.state, found.text) == ("ok", "objects can be put and deleted; conditional: yes")
    assert (bucket.requests["put"], bucket.requests["delete"]) == (1, 1)
    assert not [page for page in bucket.list("", recursive=True) if page.objects]


@pytest.mark.parametrize("error", [Unavailable("no answer"), KeyboardInterrupt()])
def test_doctor_removes_what_it_put_though_there_was_no_answer(error: BaseException) -> None:
    put = []

    class Losing(MemorySink):
        def put(self, key: str, *args: Any, **more: Any) -> Any:
            super().put(key, *args, **more)
            put.append(key)
            raise error

    bucket = MemorySource()
    if isinstance(error, KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt):
            doctor.write_finding(Losing(bucket))
    else:
        found = doctor.write_finding(Losing(bucket))
        assert (found.state, found.text) == ("fail", "nothing can be put: no answer")
    (key,) = put
    assert key.startswith(doctor.PROBE)
    assert f"`{doctor.PROBE}`" in (Path(__file__).parents[2] / "docs/troubleshooting.md").read_text()
    assert not [page for page in bucket.list("", recursive=True) if page.objects]


@pytest.mark.parametrize("call", ["put", "delete"])
def test_doctor_says_that_credentials_are_for_reading_only(call: str) -> None:
    def denied(*args: object, **more: object) -> Any:
        raise Denied("s3://b/x is forbidden")

    bucket = MemorySource()
    sink = MemorySink(bucket)
    setattr(sink, call, denied)
    found = doctor.write_finding(sink)
    assert (found.state, "denied: s3://b/x is forbidden" in found.text) == ("fail", True)
    assert "or mount without --rw" in found.advice
    stays = [info.key for page in bucket.list("", recursive=True) for info in page.objects]
    assert len(stays) == (call == "delete")
    assert all(repr(key) in found.text for key in stays)


def test_doctor_on_tiers(tmp_path: Path) -> None:
    """Medium, room and quota are held against the file system; nothing is left there."""
    found = _tier(Medium.SSD, tmp_path / "not" / "yet" / "there", MiB)
    assert found[-1][0] == "ok"
    assert not list(tmp_path.iterdir())
    space = os.statvfs(tmp_path)
    total = space.f_blocks * space.f_frsize
    assert any(state == "fail" and "in all" in text for state, text in _tier(Medium.SSD, tmp_path, total + 1))
    assert any(state == "warn" and "free" in text for state, text in _tier(Medium.SSD, tmp_path, total))
    assert _tier(Medium.SSD, tmp_path, 0)[-1][0] == "ok", "no quota: at most half of what is free"
    (tmp_path / "file").touch()
    assert _tier(Medium.SSD, tmp_path / "file" / "x", MiB)[0][0] == "fail"
    assert _tier(Medium.SSD, Path("/proc/sys"), MiB)[0][0] == "fail"


@pytest.mark.parametrize(
    ("medium", "kind", "state"),
    [
        (Medium.MEM, "tmpfs", "ok"), (Medium.MEM, "ext4", "fail"), (Medium.SSD, "tmpfs", "warn"),
        (Medium.SSD, "nfs4", "warn"), (Medium.SSD, "xfs", "ok"), (Medium.SSD, "", "ok"),
    ],
)  # fmt: skip
def test_doctor_on_file_systems(medium: Medium, kind: str, state: str) -> None:
    """A MEM tier is in memory; a disk that is memory, or far away, is worth a word."""
    assert doctor._file_system("tier", TierSettings(medium, "/x", MiB), kind).state == state


def test_the_file_system_of_a_directory_is_that_of_the_deepest_mount(tmp_path: Path) -> None:
    """Of two mounts on one directory it is the last; a neighbour of like name is none."""
    table = b"".join(
        b"%d 1 0:%d / %s rw - %s src rw\n" % (n, n, where.encode(), kind.encode())
        for n, (where, kind) in enumerate(
            [("/", "ext4"), (str(tmp_path), "xfs"), (str(tmp_path), "tmpfs"), (f"{tmp_path}x", "nfs")]
        )
    )
    assert doctor.file_system_type(str(tmp_path), table) == "tmpfs"
    assert doctor.file_system_type("/", table) == "ext4"
    assert doctor.file_system_type("/", b"") == ""


def test_doctor_reads_from_a_store() -> None:
    """It lists, reads a byte, and says what the store can do."""
    source = MemorySource(objects={"a": b"1", "d/b": b"2"})
    found = {f.check: f for f in doctor.source_findings(source)}
    assert {name: f.state for name, f in found.items()} == {
        "store": "ok", "read": "ok", "versions": "ok", "snapshots": "ok",
    }  # fmt: skip
    assert "2 entries" in found["store"].text
    untagged = MemorySource(objects={"a": b"1"})
    page = next(untagged.list("", recursive=True))
    page.objects[0] = page.objects[0]._replace(version=Version(stamp="1-1"))
    untagged.list = lambda *_, **__: iter([page])  # type: ignore[method-assign]
    assert {f.check: f.state for f in doctor.source_findings(untagged)}["versions"] == "warn"
    empty = next(iter(doctor.source_findings(MemorySource())))
    assert (empty.state, "nothing below it" in empty.text) == ("warn", True)
    begun = next(iter(doctor.source_findings(MemorySource(), may_be_empty=True)))
    assert begun.state == "ok", "where results are to go there may be none yet"


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (Denied("no"), "credentials"), (NotFound("no bucket"), "name of the bucket"),
        (Unavailable("no route"), "network"), (Unsupported("no"), "troubleshooting"),
    ],
)  # fmt: skip
def test_doctor_advises_on_what_the_store_answers(error: SourceError, advice: str) -> None:
    """Each kind of refusal has its own next step, for listings and for reads."""

    class Refusing(MemorySource):
        def list(self, prefix: str, *, recursive: bool, versions: bool = False) -> Iterator[Page]:
            raise error

    class Unreadable(MemorySource):
        def read(self, info: ObjectInfo, span: ByteRange) -> Buffer:
            raise error

    found = list(doctor.source_findings(Refusing()))
    assert [(f.state, advice in f.advice) for f in found] == [("fail", True)]
    found = list(doctor.source_findings(Unreadable(objects={"a": b"1"})))
    assert [(f.state, advice in f.advice) for f in found if f.check == "read"] == [("fail", True)]


def test_doctor_compares_clocks(clock: VirtualClock) -> None:
    """A clock that is off makes signatures fail; a store without one is not asked further."""

    def at(seconds: float) -> Callable[[str], str]:
        return lambda url: email.utils.formatdate(clock.wall() + seconds, usegmt=True)

    def silent(url: str) -> str:
        raise OSError("no route")

    assert doctor.skew("http://x", clock, ask=at(2)).state == "ok"
    assert "behind" in doctor.skew("http://x", clock, ask=at(400)).text
    assert doctor.skew("http://x", clock, ask=at(400)).state == "fail"
    assert "ahead" in doctor.skew("http://x", clock, ask=at(-400)).text
    assert doctor.skew("http://x", clock, ask=lambda url: "").state == "ok"
    assert doctor.skew("http://x", clock, ask=silent).state == "ok"


@pytest.mark.parametrize(
    ("uri", "options", "environment", "url"),
    [
        ("s3://b/x", {"endpoint": "http://h:1"}, {}, "http://h:1"),
        ("s3://b/x", {}, {"AWS_ENDPOINT_URL": "http://e"}, "http://e"),
        ("s3://b/x", {}, {}, "https://b.s3.amazonaws.com"),
        ("https://h/x/", {}, {}, "https://h/x/"),
        ("gs://b", {}, {}, "https://storage.googleapis.com"),
        ("file:///x", {}, {}, ""),
    ],
)
def test_doctor_asks_the_store_for_the_time(
    uri: str, options: dict[str, str], environment: dict[str, str], url: str
) -> None:
    """Whose clock counts is whoever checks the signatures."""
    assert doctor.clock_url(MountPoint(uri, options=options), environment) == url


def test_doctor_of_this_machine_and_a_directory(say: Said, tmp_path: Path) -> None:
    """One line a check, the same as JSON; a store that is not there is a failure with advice."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a").write_bytes(b"1")
    tier = f"ssd:{tmp_path}/cache=1MiB"
    code, out, _ = say("doctor", f"file://{tmp_path}/data", "--cache", tier)
    assert {"kernel", "fuse", "ssd", "store", "read"} <= {line.split()[1] for line in out.splitlines()}
    result = json.loads(say("doctor", f"file://{tmp_path}/data", "--cache", tier, "--json")[1])
    assert result["ok"] == (code == 0)
    assert next(c for c in result["checks"] if c["check"] == "read")["state"] == "ok"
    code, out, _ = say("doctor", f"file://{tmp_path}/nothing", "--cache", tier)
    assert code == 1
    assert "->" in out


# ---- what is left behind by a load --------------------------------------------------------------------


def test_a_request_is_remembered_with_any_name(own_directories: Path) -> None:
    """What --resume repeats is what was asked, names that are no UTF-8 included."""
    memory = load.Memory("s3://b/x")
    request = LoadRequest("/", ("*.jpg",), ("/a\udcff",), True, "mem", 5, 6, True)
    memory.keep(request)
    assert load.Memory("s3://b/x").recall() == request
    with pytest.raises(SettingError):
        load.Memory("s3://b/y").recall()
    memory.forget()
    memory.forget()
    with pytest.raises(SettingError):
        memory.recall()


def test_a_damaged_memory_is_none(own_directories: Path) -> None:
    """What was cut off by a full disk is no request."""
    memory = load.Memory("s3://b/x")
    memory.keep(LoadRequest())
    next((own_directories / "state" / "datacache" / "loads").iterdir()).write_text('{"path": "/"')
    with pytest.raises(SettingError, match="--resume"):
        memory.recall()


# ---- commands that do it themselves -------------------------------------------------------------------


@pytest.fixture
def bucket(tmp_path: Path) -> str:
    """A store with three files, by its URI."""
    for name in ("a.txt", "img/1.jpg", "img/2.jpg"):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_bytes(name.encode() * 1000)
    return f"file://{tmp_path}/data"


def test_load_straight_on_a_cache_and_verify_it(bucket: str, say: Said, tmp_path: Path) -> None:
    """Without a mount this process is the worker: what it leaves is a cache that proves well."""
    tier = ("--cache", f"ssd:{tmp_path}/tier=100MiB")
    code, out, err = say("load", bucket, *tier, "--path", "img/*")
    assert (code, err) == (0, "")
    assert "2 of 2 files cached" in out
    code, out, _ = say("load", bucket, *tier, "--json")
    assert [json.loads(out)[key] for key in ("files_done", "files_skipped")] == [3, 2]
    code, out, _ = say("verify", f"{tmp_path}/tier")
    assert (code, out) == (0, f"{tmp_path}/tier: 3 blocks of 3 entries: all as they should be\n")


def test_load_from_a_config_file(bucket: str, say: Said, tmp_path: Path) -> None:
    """The file says what and where; TARGET is left out, and --resume finds it by the file."""
    config = tmp_path / "x.yaml"
    config.write_text(f"uri: ['{bucket}']\ncache: ['ssd:{tmp_path}/tier=100MiB']\n")
    assert "3 of 3 files" in say("load", "--config", str(config))[1]


def test_load_names_the_files_that_fail(bucket: str, say: Said, tmp_path: Path) -> None:
    """A file that is listed and not there is a failure with its reason; the others are cached."""
    names = tmp_path / "names"
    names.write_text("a.txt\nnothing.txt\n")
    cache = f"ssd:{tmp_path}/tier=100MiB"
    code, out, err = say("load", bucket, "--cache", cache, "--files-from", str(names))
    assert code == 1
    assert f"`datacache load {bucket} --cache {cache} --resume` tries them again" in err
    assert "1 of 2 files cached" in out
    assert "/nothing.txt: " in err


def test_verify_finds_and_repairs_damage(bucket: str, say: Said, tmp_path: Path) -> None:
    """A byte that changed on the disk: code 1 and the block; --repair drops it; then all is well."""
    tier = tmp_path / "tier"
    say("load", bucket, "--cache", f"ssd:{tier}=100MiB")
    copy = next(f for f in tier.rglob("*") if f.is_file() and f.read_bytes().startswith(b"img/1.jpg"))
    with open(copy, "r+b") as file:
        file.write(b"X")
    code, out, err = say("verify", str(tier))
    assert (code, "1 damaged; 0 repaired" in out) == (1, True)
    assert "--repair drops them" in err
    code, out, _ = say("verify", str(tier), "--repair")
    assert (code, "1 damaged; 1 repaired" in out) == (0, True)
    assert "2 blocks of 2 entries: all as they should be" in say("verify", str(tier))[1]


def test_a_load_is_refused_by_the_owner_of_another_data_set(bucket: str, say: Said, tmp_path: Path) -> None:
    """Who holds the cache is named, with its pid."""
    tier = TierSettings(Medium.SSD, f"{tmp_path}/tier", 100 * MiB)
    held = open_cache(
        CacheSettings(tiers=(tier,)), dataset="other", block_size=MiB,
        owner=Owner(os.getpid(), "/mnt/other", ""), clock=SystemClock(),
    )  # fmt: skip
    try:
        code, _, err = say("load", bucket, "--cache", f"ssd:{tmp_path}/tier=100MiB")
    finally:
        held.close()
    assert code == 1
    used = f"is in use by process {os.getpid()}, mounted at /mnt/other"
    assert f"{used}; `datacache umount /mnt/other` first, or take another one\n" in err


def test_snapshots_are_made_listed_compared_and_removed(bucket: str, say: Said, tmp_path: Path) -> None:
    """Names and versions of the store, as text and as JSON; a snapshot never changes."""
    assert say("snapshot", "list", bucket)[1].endswith(": no snapshots\n")
    code, out, err = say("snapshot", "create", bucket, "one")
    assert (code, err) == (0, "")
    assert "snapshot one of 3 files" in out
    (tmp_path / "data" / "a.txt").unlink()
    (tmp_path / "data" / "b.txt").write_text("b")
    (tmp_path / "data" / "img" / "1.jpg").write_text("other")
    assert json.loads(say("snapshot", "create", bucket, "two", "--json")[1])["files"] == 3
    _, out, _ = say("snapshot", "diff", bucket, "one", "two")
    assert sorted(out.splitlines()) == ["+ /b.txt", "- /a.txt", "~ /img/1.jpg"]
    changes = say("snapshot", "diff", bucket, "one", "two", "--json")[1].splitlines()
    assert {json.loads(line)["kind"] for line in changes} == {"added", "removed", "changed"}
    rows = say("snapshot", "list", bucket)[1].splitlines()
    assert [row.split()[0] for row in rows] == ["NAME", "one", "two"]
    code, _, err = say("snapshot", "create", bucket, "two")
    assert (code, "two" in err) == (1, True)
    assert say("snapshot", "rm", bucket, "one")[0] == 0
    assert json.loads(say("snapshot", "rm", bucket, "two", "--json")[1]) == {"removed": "two"}
    assert json.loads(say("snapshot", "list", bucket, "--json")[1]) == []
    code, _, err = say("snapshot", "rm", bucket, "two")
    assert (code, "two" in err) == (1, True)


def test_snapshots_of_a_mounted_data_set(worker: FakeControl, bucket: str, say: Said, tmp_path: Path) -> None:
    """Its mount points, options and state directory are asked of the mount."""
    worker.more = {
        "dataset": "images", "state": f"{tmp_path}/own", "manifest": "",
        "mounts": [{"uri": bucket, "path": "/here", "options": {}}],
    }  # fmt: skip
    assert "snapshot one of 3 files" in say("snapshot", "create", str(tmp_path / "mnt"), "one")[1]
    assert "one" in say("snapshot", "list", "images")[1]
    assert (tmp_path / "own" / "snapshots" / "one.db").exists()
    code, _, err = say("snapshot", "list", "images", "--ttl", "5s")
    assert (code, "--ttl" in err) == (2, True)
    worker.more["manifest"] = "s3://b/list.jsonl"
    assert say("snapshot", "create", "images", "two")[0] == 2


def test_a_snapshot_that_is_mounted_is_not_removed(
    worker: FakeControl, bucket: str, say: Said, tmp_path: Path
) -> None:
    """The next daemon of that mount would not find it."""
    worker.more = {
        "dataset": "images", "state": f"{tmp_path}/own", "manifest": "", "snapshot": "one",
        "mounts": [{"uri": bucket, "path": "/", "options": {}}],
    }  # fmt: skip
    for name in ("one", "two"):
        assert say("snapshot", "create", "images", name)[0] == 0
    code, _, err = say("snapshot", "rm", "images", "one")
    assert (code, f"snapshot one is mounted at {tmp_path}/mnt" in err) == (1, True)
    assert say("snapshot", "rm", "images", "two")[0] == 0
    worker.more["snapshot"] = ""
    assert say("snapshot", "rm", "images", "one")[0] == 0


def test_a_snapshot_of_nothing_asks_for_the_data_set_too(say: Said) -> None:
    """Not only for the name of the snapshot."""
    code, _, err = say("snapshot", "create")
    assert (code, "the data set (URI, mount or name) and the name of a snapshot" in err) == (2, True)


def test_an_upgrade_with_flags_alone_says_that_all_settings_are_given_anew(say: Said, tmp_path: Path) -> None:
    """Only DIR keeps the settings; a flag beside it changes not just one of them."""
    code, _, err = say("upgrade", str(tmp_path), "--memory", "512MiB")
    assert (code, "all settings are given anew" in err) == (2, True)


def test_a_snapshot_in_the_making_is_counted(clock: VirtualClock, capsys: pytest.CaptureFixture[str]) -> None:
    """A line every five seconds where there is no terminal."""
    show = snapshot.counting(clock)
    for count in range(12):
        show(count * 1000)
        clock.advance(1)
    assert capsys.readouterr().err == "5000 files listed\n10000 files listed\n"


# ---- mount and umount, as far as no kernel is needed ---------------------------------------------------


@pytest.fixture
def instead_of_the_daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Let the daemon's interpreter run some other code before it comes to the daemon."""

    def use(code: str) -> None:
        (tmp_path / "site").mkdir()
        (tmp_path / "site" / "sitecustomize.py").write_text(
            f"import os, signal, sys, time\nif 'fuse' in sys.orig_argv:\n    {code}\n"
        )
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))

    return use


needs_fuse = pytest.mark.skipif(bool(mountpoint.obstacle()), reason=mountpoint.obstacle() or "-")


@needs_fuse
def test_a_daemon_that_dies_without_a_word(
    instead_of_the_daemon: Callable[[str], None], bucket: str, say: Said, tmp_path: Path
) -> None:
    """Its last line in the log is in the message, and where the rest is."""
    (tmp_path / "mnt").mkdir()
    instead_of_the_daemon("os.write(2, b'first\\nboom\\n'); os._exit(3)")
    code, out, err = say("mount", bucket, str(tmp_path / "mnt"))
    assert (code, out) == (1, "")
    assert "the daemon ended before it had mounted: boom (" in err
    assert "mount.log)" in err
    code, _, err = say("mount", "--foreground", bucket, str(tmp_path / "mnt"))
    assert (code, "what it said is above" in err) == (1, True)


@needs_fuse
def test_a_daemon_that_never_mounts_is_killed(
    instead_of_the_daemon: Callable[[str], None], bucket: str, say: Said, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Deaf to SIGTERM and silent: we give up in bounded time, and it is gone."""
    (tmp_path / "mnt").mkdir()
    instead_of_the_daemon(
        f"signal.signal(signal.SIGTERM, signal.SIG_IGN); open({str(tmp_path / 'pid')!r}, 'w')"
        ".write(str(os.getpid())); time.sleep(600)"
    )
    monkeypatch.setattr(mount, "START_TIMEOUT", 0.5)
    monkeypatch.setattr(mount, "STOP_TIMEOUT", 0.2)
    monkeypatch.setattr(mount, "QUIET", 0.1)
    code, _, err = say("mount", bucket, str(tmp_path / "mnt"))
    assert code == 1
    still, failed = err.splitlines()
    assert "still mounting" in still
    assert "not mounted after" in failed
    assert not Path("/proc", (tmp_path / "pid").read_text()).exists()


@needs_fuse
@pytest.mark.parametrize("key", ["state", "log-file", "DATACACHE_RUNTIME"])
def test_a_directory_that_cannot_be_made_is_named(
    bucket: str, say: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    """Found out before anything is started: one line with the setting and its value, code 2."""
    (tmp_path / "mnt").mkdir()
    (tmp_path / "file").touch()
    wrong = str(tmp_path / "file" / "below")
    words = ["mount", bucket, str(tmp_path / "mnt")]
    if key.startswith("DATACACHE_"):
        monkeypatch.setenv(key, wrong)
    else:
        words += [f"--{key}", wrong]
    code, out, err = say(*words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"{key}: {wrong!r} will not do" in err


@needs_fuse
def test_only_one_mount_starts_at_a_directory(bucket: str, say: Said, tmp_path: Path) -> None:
    """While somebody is mounting there, another is told so and starts nothing."""
    (tmp_path / "mnt").mkdir()
    with mount._locked(str(tmp_path / "mnt")):
        code, _, err = say("mount", bucket, str(tmp_path / "mnt"))
    assert (code, "another `datacache mount` is starting there" in err) == (1, True)
    assert not (tmp_path / "state").exists(), "no daemon was started"


def test_a_mount_that_is_none_does_not_count(tmp_path: Path) -> None:
    """We believe the kernel, not the daemon."""
    with pytest.raises(MountError, match="the kernel that it is not"):
        mount._wait_until_it_answers(str(tmp_path))
    with pytest.raises(MountError, match="it answers No such file"):
        mount._wait_until_it_answers(str(tmp_path / "gone"))


def test_systemd_is_told_at_an_abstract_address_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """sd_notify(3): a leading @ is a NUL; without a service manager nobody is told."""
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    mount.tell_systemd("READY=1")
    name = f"datacache-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(f"\0{name}")
        systemd.settimeout(10)
        monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}")
        mount.tell_systemd("READY=1")
        assert systemd.recv(100) == b"READY=1"
    mount.tell_systemd("READY=1")  # gone: no reason to fail a mount


@pytest.fixture
def lingering(own_directories: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """A daemon whose mount is gone, and which does not end by itself."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    run, at = own_directories / "run", own_directories / "mnt"
    run.mkdir(mode=0o700)
    at.mkdir()
    known = registry.Registration(child.pid, str(at), "images", str(run / "lingering.sock"))
    registry.register(str(run), known)
    yield child
    child.kill()
    child.communicate()
    registry.unregister(str(run), known)


def test_umount_waits_for_a_daemon_and_says_when_it_does_not_end(
    lingering: "subprocess.Popen[bytes]", say: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unmounted is not enough: it still holds the cache. --force ends it."""
    monkeypatch.setattr(umount, "END_TIMEOUT", 0.2)
    monkeypatch.setattr(umount, "FORCE_TIMEOUT", 0.1)
    code, _, err = say("umount", str(tmp_path / "mnt"))
    assert code == 1
    assert f"the daemon (process {lingering.pid}) has not ended" in err
    monkeypatch.setattr(umount, "END_TIMEOUT", 30)
    code, out, _ = say("umount", "images", "--force")
    assert (code, out) == (0, f"{tmp_path}/mnt: unmounted\n")
    assert lingering.wait(30) == -signal.SIGKILL


def test_umount_of_nothing_is_done_already(say: Said, tmp_path: Path) -> None:
    """Scripts may ask twice."""
    assert say("umount", str(tmp_path)) == (0, f"{tmp_path}: nothing of datacache is mounted there\n", "")
