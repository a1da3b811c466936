"""
`datacache doctor`: check this machine, the cache and the store, and say what to do.

Each check is a function from what it looks at to a `Finding`; none raises, none waits long, none
changes anything (a tier is tried with a file that is removed again, and with --rw a store with an object).
"""

import argparse
import dataclasses
import email.utils
import http.client
import os
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from datacache.cli import flags, permission, targets
from datacache.cli.tables import as_json, count
from datacache.clock import Clock, SystemClock
from datacache.errors import DatacacheError, Denied, NotFound, Unavailable
from datacache.model import Medium, MountPoint, format_size
from datacache.telemetry import redact

if TYPE_CHECKING:
    from datacache.config.settings import Settings, TierSettings
    from datacache.sources.sink import Sink
    from datacache.sources.source import Source

PROBE = ".datacache-doctor-"
"""What the name of an object begins with that `--rw` puts and deletes."""
OLDEST_KERNEL = (5, 4)
"""The oldest that the portable driver is made for."""
SKEW = 300.0
"""Seconds: S3 refuses requests that are signed with a clock further off than 15 minutes; a clock that
is five minutes off is on its way there."""
PATIENCE = 10.0
"""Seconds for the store to answer one question; a mount is more patient (--timeout)."""

EXAMPLES = """\
examples:
  datacache doctor                                      this machine
  datacache doctor s3://bucket/train --cache ssd:/var/cache/x=200GiB
  datacache doctor --rw s3://bucket/results --landing /mnt/nvme/landing

exit codes: 0 nothing failed (there may be warnings); 1 something did; 2 wrong input.
"""


@dataclass(frozen=True)
class Finding:
    """What a check found."""

    check: str
    state: str
    """ok, warn or fail."""
    text: str
    advice: str = ""
    """What to do, where there is something."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "datacache doctor [URI ...] [FLAGS]"
    parser.description = "Check the kernel, FUSE, the tiers, the store and its credentials; say what to do."
    parser.epilog = EXAMPLES
    parser.add_argument("uri", nargs="*", metavar="URI", help="a store to check as well")
    parser.add_argument("--allow-other", action="store_true", help="check that other users could be let in")
    flags.add_json_flag(parser)
    flags.add_dataset_flags(parser)
    flags.add_writing_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Check. 1 when a check failed."""
    from datacache.sources.opening import check_mount

    allow_other = args.allow_other
    del args.allow_other
    settings = None
    if args.uri or flags.setting_flags(args):
        settings = flags.read(args, args.uri)
        for point in settings.dataset.mounts:
            check_mount(point, settings.environment)
    findings = []
    for finding in _all(settings, allow_other=allow_other):
        findings.append(finding)
        if not args.json:
            print(f"{finding.state:<4}  {finding.check:<12} {finding.text}", flush=True)
            if finding.advice:
                print(f"{'':<6}{'':<12} -> {finding.advice}", flush=True)
    failed = any(finding.state == "fail" for finding in findings)
    if args.json:
        print(as_json({"ok": not failed, "checks": [dataclasses.asdict(f) for f in findings]}))
    return 1 if failed else 0


def _all(settings: "Settings | None", *, allow_other: bool) -> Iterator[Finding]:
    from fuse import mountpoint

    root = os.geteuid() == 0
    yield kernel(os.uname().release)
    yield device(mountpoint.obstacle())
    yield fusermount(shutil.which("fusermount3"), root=root)
    yield fuse_conf("/etc/fuse.conf", root=root, wanted=allow_other)
    yield native_driver(os.uname().release, root=root)
    yield portable_driver(native=mountpoint.is_native("auto"))
    if settings is None:
        return
    for tier in settings.cache.tiers:
        yield from tier_findings(tier, reserve=settings.cache.reserve)
    if settings.writing.enabled:
        yield from landing_zone(settings)
    for mount in settings.dataset.mounts:
        yield from store(mount, settings)


# ---- this machine -----------------------------------------------------------------------------------


def kernel(release: str) -> Finding:
    """Whether the kernel is new enough."""
    numbers = release.split("-")[0].split(".")
    try:
        version = (int(numbers[0]), int(numbers[1]))
    except (ValueError, IndexError):
        return Finding("kernel", "warn", f"{release}: not a version that can be compared")
    if version < OLDEST_KERNEL:
        return Finding("kernel", "fail", f"Linux {release}", "5.4 or newer is needed")
    return Finding("kernel", "ok", f"Linux {release}")


def device(obstacle: str) -> Finding:
    """Whether FUSE can be had at all; `obstacle` is what stands in the way (`mountpoint.obstacle`)."""
    if obstacle:
        what, _, advice = obstacle.partition(": ")
        return Finding("fuse", "fail", what, advice)
    return Finding("fuse", "ok", "/dev/fuse can be opened")


def fusermount(program: str | None, *, root: bool) -> Finding:
    """Whether fusermount3 is there for who is not root, and may do its work."""
    if program is None:
        if root:
            return Finding("fusermount3", "ok", "not installed; root mounts without it")
        return Finding(
            "fusermount3", "fail", "not installed", "apt-get install fuse3 (or your system's fuse3)"
        )
    if not root and not os.stat(program).st_mode & 0o4000:
        return Finding(
            "fusermount3", "fail", f"{program} is not setuid root", f"chmod u+s {program}, as root"
        )
    return Finding("fusermount3", "ok", program)


def fuse_conf(path: str, *, root: bool, wanted: bool) -> Finding:
    """Whether --allow-other would be granted."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            allowed = any(line.strip() == "user_allow_other" for line in file)
    except OSError:
        allowed = False
    if allowed or root:
        return Finding("allow_other", "ok", "--allow-other will work")
    advice = f"only if other users shall read your mounts: add the line user_allow_other to {path}, as root"
    return Finding("allow_other", "fail" if wanted else "ok", "--allow-other would be refused", advice)


def native_driver(release: str, *, root: bool) -> Finding:
    """What of the native driver this kernel and user can have."""
    from fuse import mountpoint

    if not mountpoint.is_native("auto", release):
        return Finding(
            "native", "warn", f"Linux {release} is too old for the native driver: pyfuse3 is taken",
            "Linux 6.9 or newer has passthrough, and mounts that outlive their daemon",
        )  # fmt: skip
    if not root:
        return Finding(
            "native", "warn", "the native driver, without passthrough: that needs root",
            "mount as root, or --io pagecache for small files",
        )  # fmt: skip
    return Finding("native", "ok", "the native driver, with passthrough for caches on plain file systems")


def portable_driver(*, native: bool) -> Finding:
    """Whether the portable driver's library loads; where there is the native one it need not."""
    from importlib.util import find_spec

    if find_spec("pyfuse3") is None:
        return Finding(
            "pyfuse3", "warn" if native else "fail", "pyfuse3 is not installed",
            "apt-get install libfuse3-dev pkg-config gcc, then pip install pyfuse3",
        )  # fmt: skip
    return Finding("pyfuse3", "ok", "pyfuse3 is installed")


# ---- the tiers --------------------------------------------------------------------------------------


def tier_findings(tier: "TierSettings", *, reserve: float) -> Iterator[Finding]:
    """Whether the directory of a tier can be written, is what its medium says, and has room."""
    from fuse import mountpoint

    name = f"{tier.medium.value} tier"
    directory = _existing(tier.path)
    if not os.path.isdir(directory):
        yield Finding(name, "fail", f"{directory} is no directory", "choose another path")
        return
    probe = os.path.join(directory, f".datacache-doctor-{os.getpid()}")
    try:
        os.close(os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except OSError as error:
        yield Finding(
            name, "fail", f"{directory}: {error.strerror}", "make it writable for you, or choose another path"
        )
        return
    finally:
        with suppress(OSError):
            os.unlink(probe)
    yield _file_system(name, tier, file_system_type(directory, mountpoint.mountinfo()))
    space = os.statvfs(directory)
    total, free = space.f_blocks * space.f_frsize, space.f_bavail * space.f_frsize
    usable = free - int(total * reserve)
    if tier.quota > total:
        yield Finding(
            name, "fail", f"quota {format_size(tier.quota)} on a file system of {format_size(total)} in all",
            f"a quota of at most {format_size(total * (1 - reserve))}",
        )  # fmt: skip
    elif tier.quota > usable:
        yield Finding(
            name, "warn",
            f"quota {format_size(tier.quota)}, but only {format_size(max(0, usable))} are free beside the "
            f"reserve of {reserve:.0%}",
            "fine if that space holds this cache already; else the tier will be full before its quota",
        )  # fmt: skip
    else:
        quota = format_size(tier.quota) if tier.quota else "at most half of what is free"
        yield Finding(name, "ok", f"{tier.path}: quota {quota}, {format_size(free)} free")
    if space.f_files and space.f_favail < space.f_files * reserve:
        yield Finding(
            name, "warn", f"only {space.f_favail} of {space.f_files} inodes are free",
            "each cached object takes one; the tier is full until there are more",
        )  # fmt: skip


def landing_zone(settings: "Settings") -> Iterator[Finding]:
    """Whether a power cut leaves the landing zone alone, and whether files need to be copied between it and
    the cache."""
    from datacache.writing.opening import landing_directory, tier_beside
    from fuse import mountpoint

    directory, beside = landing_directory(settings), tier_beside(settings)
    yield from landing_place(directory, settings.cache.tiers)
    yield from landing_disk(directory, file_system_type(directory, mountpoint.mountinfo()))
    if beside:
        yield Finding(
            "landing zone", "ok", f"{directory}: on the file system of {beside}; no copies are made"
        )
        return
    yield Finding(
        "landing zone", "warn",
        f"{directory}: on another file system than the cache: what is uploaded is copied into that, and what "
        "is changed out of it",
        "--landing DIR, or --cache ssd:DIR, on the file system of the other",
    )  # fmt: skip


def landing_place(directory: str, own: Iterable["TierSettings"]) -> Iterator[Finding]:
    """What is wrong with a landing zone in a cache directory, but for those of its `own` mount."""
    from datacache.cache.owner import MANAGED

    tiers = {os.path.realpath(tier.path) for tier in own}
    above = os.path.realpath(directory)
    while True:
        if os.path.basename(above) == MANAGED:
            why = f"{directory} is among the files of a cache"
            yield Finding("landing zone", "fail", why, "--landing DIR, elsewhere")
            return
        if above not in tiers and os.path.isdir(os.path.join(above, MANAGED)):
            yield Finding(
                "landing zone", "warn",
                f"{directory} is in {above}, the cache directory of another data set: who deletes that cache "
                "deletes what is not in the bucket yet",
                "--landing DIR, elsewhere",
            )  # fmt: skip
            return
        if above == os.path.dirname(above):
            return
        above = os.path.dirname(above)


def landing_disk(directory: str, kind: str) -> Iterator[Finding]:
    """What is wrong with a landing zone on a file system of type `kind`."""
    if kind in ("tmpfs", "ramfs"):
        yield Finding(
            "landing zone", "warn",
            f"{directory} is on {kind}: what is written is lost with the power until it is in the bucket",
            "--landing DIR, on a disk",
        )  # fmt: skip
    elif kind.startswith("fuse.") and "ceph" not in kind:
        yield Finding(
            "landing zone", "fail", f"{directory} is on {kind}: in another mount of a user's program",
            "--landing DIR, on a disk of this machine or a CephFS",
        )  # fmt: skip


def file_system_type(directory: str, table: bytes) -> str:
    """Type of the file system that `directory` is on, by a mountinfo `table`."""
    from fuse import mountpoint

    path = mountpoint.real(directory)
    above = [
        m for m in mountpoint.parse_mountinfo(table) if targets.relative_to(m.directory, path) is not None
    ]
    # The deepest; of several at one directory the last that was mounted.
    return max(enumerate(above), key=lambda m: (len(m[1].directory), m[0]))[1].fstype if above else ""


def _file_system(name: str, tier: "TierSettings", kind: str) -> Finding:
    if tier.medium is Medium.MEM and kind not in ("tmpfs", "ramfs"):
        return Finding(
            name, "fail", f"{tier.path} is on {kind}, not in memory", "a path below /dev/shm, or ssd:"
        )
    if tier.medium is Medium.SSD and kind in ("tmpfs", "ramfs"):
        return Finding(
            name, "warn", f"{tier.path} is on {kind}: it is memory", "mem: for memory, or a path on a disk"
        )
    if kind == "overlay":
        return Finding(
            name, "warn", f"{tier.path} is on overlay: the kernel will not read files there by itself",
            "a volume of its own (ext4, xfs, tmpfs) for passthrough",
        )  # fmt: skip
    if kind.startswith(("nfs", "cifs", "smb", "fuse")):
        return Finding(
            name,
            "warn",
            f"{tier.path} is on {kind}",
            "a disk of this machine: a cache over the network is slow",
        )
    return Finding(name, "ok", f"{tier.path} is on {kind or 'an unknown file system'}")


def _existing(path: str) -> str:
    """`path`, or the nearest directory above it that exists: the rest would be made."""
    while not os.path.exists(path) and path != "/":
        path = os.path.dirname(path)
    return path


# ---- the store --------------------------------------------------------------------------------------


def store(mount: MountPoint, settings: "Settings") -> Iterator[Finding]:
    """Whether the store answers, lets us in, and what it can do."""
    from datacache.sources.opening import open_sink, open_source

    patience = dataclasses.replace(settings.sources, timeout=min(settings.sources.timeout, PATIENCE))
    source = open_source(mount, settings=patience, environment=settings.environment, clock=SystemClock())
    try:
        yield from source_findings(source, may_be_empty=settings.writing.enabled)
    finally:
        source.close()
    if settings.writing.enabled:
        sink = open_sink(mount, patience, environment=settings.environment, clock=SystemClock())
        try:
            yield write_finding(sink)
        finally:
            sink.close()
    url = clock_url(mount, settings.environment)
    if url:
        yield skew(url, SystemClock(), ask=_date)


def source_findings(source: "Source", *, may_be_empty: bool = False) -> Iterator[Finding]:
    """Whether `source` lists and reads, and its traits."""
    try:
        page = next(iter(source.list("", recursive=False)), None)
    except DatacacheError as error:
        yield Finding("store", "fail", redact(str(error)), _advice(error))
        return
    objects = page.objects if page is not None else []
    listed = len(objects) + (len(page.prefixes) if page is not None else 0)
    if not listed and not may_be_empty:
        yield Finding(
            "store", "warn", f"{source.uri}: lists, but there is nothing below it", "check the prefix"
        )
    else:
        entries = count(listed, "entry", "entries")
        yield Finding("store", "ok", f"{source.uri}: lists ({entries} on the first page)")
    small = next((o for o in objects if o.size and not o.archived), None)
    if small is not None:
        yield _first_byte(source, small.key)
    traits = source.traits
    untagged = next((o.key for o in objects if not (o.version.etag or o.version.version_id)), None)
    if traits.conditional and untagged is not None:
        yield Finding(
            "versions", "warn",
            f"no entity tag for {untagged!r}: what has none is told apart by size and time, "
            "and each fetch of it is checked by two more requests",
            "objects written through the store's own API have one",
        )  # fmt: skip
    elif traits.conditional:
        yield Finding("versions", "ok", "reads are conditional on the version")
    else:
        yield Finding("versions", "warn", "no conditional reads: each fetch is checked by two more requests")
    yield Finding(
        "snapshots",
        "ok",
        "by version id" if traits.versioned else "by entity tag; overwritten objects are gone",
    )


def write_finding(sink: "Sink") -> Finding:
    """Whether objects can be put and deleted: one is, and nothing of it stays."""
    from datacache.sources.sink import NOTHING

    key = f"{PROBE}{os.urandom(8).hex()}"
    try:
        probe = Probe(b"Put here by `datacache doctor --rw`; it can be deleted.\n")
        stored = sink.put(key, probe, expected=NOTHING, metadata={}, put=probe)
    except (DatacacheError, KeyboardInterrupt) as error:
        if not isinstance(error, Denied | NotFound):  # only the answer may be lost
            with suppress(DatacacheError):
                if (there := sink.find(key)) is not None:
                    sink.delete(key, expected=there.info.version)
        if isinstance(error, KeyboardInterrupt):
            raise
        return Finding("write", "fail", f"nothing can be put: {_refusal(error)}", _may_write(error))
    try:
        sink.delete(key, expected=stored.info.version)
    except DatacacheError as error:
        return Finding(
            "write", "fail", f"objects can be put, but not deleted: {_refusal(error)}; {key!r} stays",
            _may_write(error),
        )  # fmt: skip
    if not sink.traits.conditional:
        return Finding(
            "write", "warn", "objects can be put and deleted; conditional: no",
            "what somebody else writes in the very moment of an upload is overwritten (docs/limits.md)",
        )  # fmt: skip
    return Finding("write", "ok", "objects can be put and deleted; conditional: yes")


def _refusal(error: DatacacheError) -> str:
    return f"{'denied: ' if isinstance(error, Denied) else ''}{redact(str(error))}"


def _may_write(error: DatacacheError) -> str:
    if isinstance(error, Denied):
        return permission.ADVICE
    return _advice(error)


@dataclass(frozen=True)
class Probe:
    """A `Content` that is put once, by the `Put` that it is, too."""

    data: bytes
    resume: str = ""

    @property
    def size(self) -> int:
        return len(self.data)

    def read(self, offset: int, length: int) -> bytes:
        return self.data[offset : offset + length]

    def stopped(self) -> bool:
        return False

    def sent(self, count: int) -> None: ...
    def remember(self, state: str) -> None: ...


def _first_byte(source: "Source", key: str) -> Finding:
    from datacache.model import ByteRange

    try:
        source.read(source.stat(key), ByteRange(0, 1))
    except DatacacheError as error:
        return Finding("read", "fail", redact(str(error)), _advice(error))
    return Finding("read", "ok", "objects can be read")


def _advice(error: DatacacheError) -> str:
    if isinstance(error, Denied):
        return "check the credentials (environment, --profile, --anonymous) and the policy of the bucket"
    if isinstance(error, NotFound):
        return "check the name of the bucket, --endpoint and --region"
    if isinstance(error, Unavailable):
        return "check --endpoint, the network, proxies and the name server"
    return "see docs/troubleshooting.md"


def clock_url(mount: MountPoint, environment: Mapping[str, str]) -> str:
    """A URL whose server tells what time it is for the store, or ""."""
    scheme, _, rest = mount.uri.partition("://")
    given = mount.options.get("endpoint", "")
    if scheme == "s3":
        given = given or environment.get("AWS_ENDPOINT_URL_S3", "") or environment.get("AWS_ENDPOINT_URL", "")
        return given or f"https://{rest.split('/')[0]}.s3.amazonaws.com"
    if scheme in ("http", "https"):
        return mount.uri
    return given or {"gs": "https://storage.googleapis.com"}.get(scheme, "")


def skew(url: str, clock: Clock, *, ask: Callable[[str], str]) -> Finding:
    """How far this machine's clock is from the store's; `ask` gives the Date header of a URL."""
    try:
        theirs = email.utils.parsedate_to_datetime(ask(url)).timestamp()
    except (OSError, ValueError, TypeError, http.client.HTTPException):
        return Finding("clock", "ok", "the store does not say what time it is")
    off = clock.wall() - theirs
    text = f"{abs(off):.0f} s {'ahead of' if off > 0 else 'behind'} the store's"
    if abs(off) > SKEW:
        return Finding(
            "clock",
            "fail",
            text,
            "set this machine's clock (timedatectl set-ntp true): signatures carry the time",
        )
    return Finding("clock", "ok", text)


def _date(url: str) -> str:
    request = urllib.request.Request(url, method="HEAD")  # noqa: S310  http(s), from settings
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:  # noqa: S310
            return str(answer.headers.get("Date", ""))
    except urllib.error.HTTPError as error:  # no permission, perhaps; but it has a clock
        with error:
            return str(error.headers.get("Date", ""))
