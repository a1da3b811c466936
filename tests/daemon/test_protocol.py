"""
The wire protocol: held against the header of the machine by compiling C, round trips of everything, and
a peer that sends anything at all.
"""

import enum
import re
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fuse import protocol
from fuse.protocol import (
    DECODERS,
    FOREVER,
    HEADER_SIZE,
    MINOR,
    Attr,
    AttrFlag,
    BatchForgetIn,
    Capability,
    CreateOut,
    Dirent,
    DirentPlus,
    EmptyIn,
    EntryOut,
    ForgetIn,
    Forgotten,
    FsyncFlag,
    GetattrFlag,
    GetattrIn,
    InitIn,
    InitOut,
    InvalEntryFlag,
    IoctlFlag,
    LkFlag,
    LookupIn,
    Malformed,
    MkdirIn,
    Notify,
    Opcode,
    OpenFlag,
    OpenIn,
    OpenInFlag,
    OpenOut,
    PollFlag,
    ReadFlag,
    ReadIn,
    ReleaseFlag,
    ReleaseIn,
    Request,
    SetattrValid,
    SetxattrFlag,
    SetxattrIn,
    StatfsOut,
    UnknownIn,
    WriteFlag,
    WriteIn,
    decode,
    decode_header,
    decode_notification,
    decode_reply,
    decoders,
    encode_request,
    error,
    reply,
)

# ---- the header of the machine ----------------------------------------------------------------------

# Of Debian 12 it is ABI 7.38; C_INCLUDE_PATH points the same tests at a newer one.

REQUESTS: list[tuple[str, str, Opcode, int]] = [
    # structure, its fields in the order of our tuple, an opcode that has it, the minor that brought it
    ("fuse_forget_in", "nlookup", Opcode.FORGET, 0),
    ("fuse_getattr_in", "getattr_flags fh", Opcode.GETATTR, 0),
    (
        "fuse_setattr_in",
        "valid fh size lock_owner atime mtime ctime atimensec mtimensec ctimensec mode uid gid",
        Opcode.SETATTR,
        23,
    ),
    ("fuse_mknod_in", "mode rdev umask", Opcode.MKNOD, 0),
    ("fuse_mkdir_in", "mode umask", Opcode.MKDIR, 0),
    ("fuse_rename_in", "newdir", Opcode.RENAME, 0),
    ("fuse_rename2_in", "newdir flags", Opcode.RENAME2, 23),
    ("fuse_link_in", "oldnodeid", Opcode.LINK, 0),
    ("fuse_open_in", "flags open_flags", Opcode.OPEN, 33),
    ("fuse_open_in", "flags open_flags", Opcode.OPENDIR, 33),
    ("fuse_create_in", "flags mode umask open_flags", Opcode.CREATE, 33),
    ("fuse_create_in", "flags mode umask open_flags", Opcode.TMPFILE, 37),
    ("fuse_read_in", "fh offset size read_flags lock_owner flags", Opcode.READ, 0),
    ("fuse_read_in", "fh offset size read_flags lock_owner flags", Opcode.READDIR, 0),
    ("fuse_read_in", "fh offset size read_flags lock_owner flags", Opcode.READDIRPLUS, 21),
    ("fuse_release_in", "fh flags release_flags lock_owner", Opcode.RELEASE, 0),
    ("fuse_flush_in", "fh lock_owner", Opcode.FLUSH, 0),
    ("fuse_fsync_in", "fh fsync_flags", Opcode.FSYNC, 0),
    ("fuse_getxattr_in", "size", Opcode.GETXATTR, 0),
    ("fuse_getxattr_in", "size", Opcode.LISTXATTR, 0),
    ("fuse_lk_in", "fh owner lk.start lk.end lk.type lk.pid lk_flags", Opcode.SETLKW, 0),
    ("fuse_access_in", "mask", Opcode.ACCESS, 0),
    ("fuse_interrupt_in", "unique", Opcode.INTERRUPT, 0),
    ("fuse_bmap_in", "block blocksize", Opcode.BMAP, 0),
    ("fuse_poll_in", "fh kh flags events", Opcode.POLL, 21),
    ("fuse_fallocate_in", "fh offset length mode", Opcode.FALLOCATE, 19),
    ("fuse_lseek_in", "fh offset whence", Opcode.LSEEK, 24),
    (
        "fuse_copy_file_range_in",
        "fh_in off_in nodeid_out fh_out off_out len flags",
        Opcode.COPY_FILE_RANGE,
        28,
    ),
    ("fuse_setupmapping_in", "fh foffset len flags moffset", Opcode.SETUPMAPPING, 31),
    ("fuse_syncfs_in", "", Opcode.SYNCFS, 34),
    ("fuse_statx_in", "getattr_flags fh sx_flags sx_mask", Opcode.STATX, 39),
]

ATTR = "ino size blocks atime mtime ctime atimensec mtimensec ctimensec mode nlink uid gid rdev blksize flags"
IN_ATTR = " ".join(f"attr.{name}" for name in ATTR.split())

STRUCTURES: list[tuple[str, str, str, int]] = [
    # structure, its fields in our order, the name of our layout of it, the minor that brought it
    ("fuse_in_header", "len opcode unique nodeid uid gid pid total_extlen", "_HEADER", 38),
    ("fuse_out_header", "len error unique", "_OUT", 0),
    ("fuse_attr", ATTR, "_ATTR", 32),
    (
        "fuse_entry_out",
        f"nodeid generation entry_valid attr_valid entry_valid_nsec attr_valid_nsec {IN_ATTR}",
        "_ENTRY",
        32,
    ),
    ("fuse_attr_out", f"attr_valid attr_valid_nsec {IN_ATTR}", "_ATTR_OUT", 32),
    ("fuse_open_out", "fh open_flags backing_id", "_OPEN_OUT", 40),
    ("fuse_write_in", "fh offset size write_flags lock_owner flags", "_WRITE_IN", 0),
    ("fuse_write_out", "size", "_COUNT", 0),
    (
        "fuse_statfs_out",
        "st.blocks st.bfree st.bavail st.files st.ffree st.bsize st.namelen st.frsize",
        "_STATFS_OUT",
        0,
    ),
    ("fuse_setxattr_in", "size flags setxattr_flags", "_SETXATTR_LONG", 33),
    ("fuse_getxattr_out", "size", "_COUNT", 0),
    ("fuse_lk_out", "lk.start lk.end lk.type lk.pid", "_LK_OUT", 0),
    ("fuse_init_in", "major minor max_readahead flags flags2", "_INIT_IN", 36),
    (
        "fuse_init_out",
        "major minor max_readahead flags max_background congestion_threshold max_write time_gran max_pages"
        " map_alignment flags2 max_stack_depth request_timeout",
        "_INIT_OUT",
        43,
    ),
    ("fuse_batch_forget_in", "count", "_COUNT", 16),
    ("fuse_forget_one", "nodeid nlookup", "_PAIR", 16),
    ("fuse_bmap_out", "block", "_U64", 0),
    ("fuse_ioctl_in", "fh flags cmd arg in_size out_size", "_IOCTL_IN", 0),
    ("fuse_ioctl_out", "result flags in_iovs out_iovs", "_IOCTL_OUT", 0),
    ("fuse_poll_out", "revents", "_COUNT", 0),
    ("fuse_lseek_out", "offset", "_U64", 24),
    ("fuse_dirent", "ino off namelen type", "_DIRENT", 0),
    ("fuse_removemapping_in", "count", "_U32", 31),
    ("fuse_removemapping_one", "moffset len", "_PAIR", 31),
    ("fuse_copy_file_range_out", "bytes_copied", "_U64", 45),
    (
        "fuse_statx_out",
        "attr_valid attr_valid_nsec flags stat.mask stat.blksize stat.attributes stat.nlink stat.uid stat.gid"
        " stat.mode stat.ino stat.size stat.blocks stat.attributes_mask stat.atime.tv_sec stat.atime.tv_nsec"
        " stat.btime.tv_sec stat.btime.tv_nsec stat.ctime.tv_sec stat.ctime.tv_nsec stat.mtime.tv_sec"
        " stat.mtime.tv_nsec stat.rdev_major stat.rdev_minor stat.dev_major stat.dev_minor",
        "_STATX_OUT",
        39,
    ),
    ("fuse_backing_map", "fd flags", "_BACKING_MAP", 40),
    ("fuse_notify_inval_inode_out", "ino off len", "_INVAL_INODE", 12),
    ("fuse_notify_inval_entry_out", "parent namelen flags", "_INVAL_ENTRY", 38),
    ("fuse_notify_delete_out", "parent child namelen", "_DELETE", 18),
    ("fuse_notify_store_out", "nodeid offset size", "_STORE", 15),
    ("fuse_notify_retrieve_out", "notify_unique nodeid offset size", "_RETRIEVE", 15),
    ("fuse_notify_retrieve_in", "offset size", "_RETRIEVE_IN", 15),
    ("fuse_notify_poll_wakeup_out", "kh", "_U64", 11),
    ("fuse_notify_prune_out", "count", "_PRUNE", 45),
]

PREFIXES: dict[type[enum.IntFlag], str] = {
    Capability: "FUSE_",
    OpenFlag: "FOPEN_",
    SetattrValid: "FATTR_",
    GetattrFlag: "FUSE_GETATTR_",
    OpenInFlag: "FUSE_OPEN_",
    ReadFlag: "FUSE_READ_",
    WriteFlag: "FUSE_WRITE_",
    ReleaseFlag: "FUSE_RELEASE_",
    FsyncFlag: "FUSE_FSYNC_",
    LkFlag: "FUSE_LK_",
    IoctlFlag: "FUSE_IOCTL_",
    PollFlag: "FUSE_POLL_",
    SetxattrFlag: "FUSE_SETXATTR_",
    AttrFlag: "FUSE_ATTR_",
    InvalEntryFlag: "FUSE_",
}
"""What C calls the members of our flags."""

MACROS: dict[str, int] = {
    "FUSE_ROOT_ID": protocol.ROOT,
    "FUSE_KERNEL_VERSION": protocol.MAJOR,
    "FUSE_MIN_READ_BUFFER": protocol.MIN_READ_BUFFER,
    "FUSE_UNIQUE_RESEND": protocol.RESENT,
    "FUSE_INVALID_UIDGID": protocol.NOBODY,
    "FUSE_NAME_OFFSET": protocol.DIRENT_SIZE,
    "FUSE_NAME_OFFSET_DIRENTPLUS": protocol.ENTRY_SIZE + protocol.DIRENT_SIZE,
    "FUSE_DEV_IOC_CLONE": protocol.DEV_IOC_CLONE,
    "FUSE_DEV_IOC_BACKING_OPEN": protocol.DEV_IOC_BACKING_OPEN,
    "FUSE_DEV_IOC_BACKING_CLOSE": protocol.DEV_IOC_BACKING_CLOSE,
    "FUSE_DEV_IOC_SYNC_INIT": protocol.DEV_IOC_SYNC_INIT,
    **{
        prefix + member.name.replace("BITS_32", "32BIT"): member.value
        for flags, prefix in PREFIXES.items()
        for member in flags
        if member.name
    },
}

LATE = {
    Opcode.STATX: 39,
    Opcode.COPY_FILE_RANGE_64: 45,
    Notify.RESEND: 40,
    Notify.INC_EPOCH: 44,
    Notify.PRUNE: 45,
}
"""Members of the header's enums that it may be too old for; C cannot ask whether they are there."""


class Header:
    """What the C compiler says of the header: its minor, macros, enum members, and filled structures."""

    def __init__(self, printed: str, text: str) -> None:
        self.text = text
        self.numbers: dict[str, int] = {}
        self.structures: dict[str, tuple[bytes, tuple[int, ...]]] = {}
        for line in printed.splitlines():
            kind, name, *rest = line.split()
            if kind == "number":
                self.numbers[name] = int(rest[0])
            else:
                data = "" if rest[0] == "-" else rest[0]
                self.structures[name] = (bytes.fromhex(data), tuple(map(int, rest[1:])))
        self.minor = self.numbers["FUSE_KERNEL_MINOR_VERSION"]

    def structure(self, name: str, fields: str, since: int) -> tuple[bytes, tuple[int, ...]]:
        """The bytes that C made of the structure, and what it had put into the fields."""
        if self.minor < since:
            pytest.skip(f"{name} came with ABI 7.{since}, the header of this machine is 7.{self.minor}")
        return self.structures[key(name, fields)]


def key(name: str, fields: str) -> str:
    return f"{name}:{fields.replace(' ', ',')}"


def program() -> str:
    """C that prints what we want to know of the header."""
    lines = [
        "#include <stddef.h>",
        "#include <stdio.h>",
        "#include <string.h>",
        "#include <sys/ioctl.h>",
        "#include <linux/fuse.h>",
        "static void hex(const char *name, const void *at, size_t size) {",
        '  printf("structure %s ", name);',
        '  for (size_t i = 0; i < size; i++) printf("%02x", ((const unsigned char *)at)[i]);',
        "}",
        "int main(void) {",
        '  printf("number FUSE_KERNEL_MINOR_VERSION %d\\n", FUSE_KERNEL_MINOR_VERSION);',
    ]
    for macro in MACROS:
        lines += [
            f"#ifdef {macro}",
            f'  printf("number {macro} %llu\\n", {masked(macro)});',
            "#endif",
        ]
    for member, prefix in [(m, "FUSE_") for m in Opcode] + [(m, "FUSE_NOTIFY_") for m in Notify]:
        name = member.name if member is Opcode.CUSE_INIT else prefix + member.name
        lines += [
            f"#if FUSE_KERNEL_MINOR_VERSION >= {LATE.get(member, 0)}",
            f'  printf("number {name} %d\\n", {name});',
            "#endif",
        ]
    structures = {(name, fields): since for name, fields, _, since in REQUESTS}
    structures |= {(name, fields): since for name, fields, _, since in STRUCTURES}
    for (name, fields), since in structures.items():
        lines += [
            f"#if FUSE_KERNEL_MINOR_VERSION >= {since}",
            f"  {{ struct {name} s; memset(&s, 0, sizeof s);",
            # Every byte of every field differs from zero, and no field has what another has.
            *(
                f"  s.{f} = (__typeof__(s.{f}))(0x7877665544332211ULL + {n});"
                for n, f in enumerate(fields.split())
            ),
            f'  hex("{key(name, fields)}", &s, sizeof s);',
            *(f'  printf(" %llu", (unsigned long long)s.{f});' for f in fields.split()),
            '  printf("\\n"); }',
            "#endif",
        ]
    return "\n".join([*lines, "  return 0;", "}"])


def masked(macro: str) -> str:
    """As C has it, but for bit 31: `1 << 31` is negative there."""
    value = f"(unsigned long long)({macro})"
    return f"({value} & 0xffffffff)" if macro == "FUSE_INIT_RESERVED" else value


@pytest.fixture(scope="module")
def header(tmp_path_factory: pytest.TempPathFactory) -> Header:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    folder = tmp_path_factory.mktemp("header")
    (folder / "where.c").write_text("#include <linux/fuse.h>\n")
    where = subprocess.run([compiler, "-M", folder / "where.c"], capture_output=True, text=True)
    found = re.search(r"\S+/linux/fuse\.h", where.stdout)
    if where.returncode or found is None:
        pytest.skip("needs linux/fuse.h (linux-libc-dev)")
    (folder / "ask.c").write_text(program())
    subprocess.run([compiler, "-o", folder / "ask", folder / "ask.c"], check=True)
    printed = subprocess.run([folder / "ask"], check=True, capture_output=True, text=True).stdout
    return Header(printed, Path(found.group()).read_text())


@pytest.mark.parametrize(("name", "fields", "opcode", "since"), REQUESTS, ids=[r[2].name for r in REQUESTS])
def test_a_request_is_read_as_c_writes_it(
    header: Header, name: str, fields: str, opcode: Opcode, since: int
) -> None:
    """Each field is found where the compiler puts it, with its width, and no byte is left over."""
    structure, values = header.structure(name, fields, since)
    body = decode(framed(opcode, structure + TAILS.get(opcode, b"")))[1]
    assert body[: len(values)] == values
    assert encode_request(opcode, body) == framed(opcode, structure + TAILS.get(opcode, b""))


@pytest.mark.parametrize(
    ("name", "fields", "layout", "since"), STRUCTURES, ids=[f"{s[0]}" for s in STRUCTURES]
)
def test_a_layout_is_what_c_makes_of_the_structure(
    header: Header, name: str, fields: str, layout: str, since: int
) -> None:
    structure, values = header.structure(name, fields, since)
    ours = getattr(protocol, layout)
    assert ours.size == len(structure)
    assert ours.unpack(structure) == values
    assert ours.pack(*values) == structure


def test_every_number_is_the_headers(header: Header) -> None:
    """Macros and enum members, as far as the header of this machine knows them."""
    ours = MACROS | {f"FUSE_NOTIFY_{m.name}": m.value for m in Notify}
    ours |= {m.name if m is Opcode.CUSE_INIT else f"FUSE_{m.name}": m.value for m in Opcode}
    theirs = {name: value for name, value in header.numbers.items() if name != "FUSE_KERNEL_MINOR_VERSION"}
    assert {name: ours[name] for name in theirs} == theirs
    missing = set(ours) - set(theirs)
    if header.minor >= MINOR:
        assert missing == set()


def test_nothing_of_the_header_is_missing_here(header: Header) -> None:
    """Every opcode, notification, INIT and OPEN flag that a kernel up to our minor may use has a name."""
    if header.minor > MINOR:
        pytest.skip(f"the header of this machine is ABI 7.{header.minor}, newer than ours")
    text = header.text
    opcodes = text.split("enum fuse_opcode {")[1].split("}")[0]
    assert {int(n) for n in re.findall(r"^\s+\w+\s*=\s*(\d+)", opcodes, re.M)} - {1 << 20, 26 << 24} <= set(
        Opcode
    )
    codes = text.split("enum fuse_notify_code {")[1].split("}")[0]
    assert {int(n) for n in re.findall(r"=\s*(\d+)", codes)} <= set(Notify)
    init = text.split("#define FUSE_ASYNC_READ")[1].split("CUSE INIT")[0]
    bits = {1 << int(n) for n in re.findall(r"\(1(?:ULL)? << (\d+)\)", init)}
    assert bits <= {member.value for member in Capability}
    assert {1 << int(n) for n in re.findall(r"#define FOPEN_\w+\s+\(1 << (\d+)\)", text)} <= set(OpenFlag)


TAILS = {
    Opcode.MKNOD: b"n\0",
    Opcode.MKDIR: b"n\0",
    Opcode.RENAME: b"n\0m\0",
    Opcode.RENAME2: b"n\0m\0",
    Opcode.LINK: b"n\0",
    Opcode.CREATE: b"n\0",
    Opcode.TMPFILE: b"/\0",  # what the kernel calls a file without a name
    Opcode.GETXATTR: b"user.n\0",
}
"""Names that follow the structure."""


def framed(opcode: int, body: bytes, **header: Any) -> bytes:
    """A request of this body, whatever that is."""
    return encode_request(opcode, UnknownIn(body), **header)


# ---- what was measured on a kernel ------------------------------------------------------------------


def test_the_init_of_linux_6_18() -> None:
    """What the kernel was seen to offer, in the bytes that it sent."""
    body = protocol._INIT_IN.pack(7, 45, 131072, 0x73FFFFFB, 0x5FD)
    offered = decode(framed(Opcode.INIT, body))[1]
    assert isinstance(offered, InitIn)
    assert (offered.major, offered.minor, offered.max_readahead) == (7, 45, 131072)
    wanted = Capability.PASSTHROUGH | Capability.HAS_RESEND | Capability.INIT_EXT | Capability.MAX_PAGES
    assert offered.capabilities & wanted == wanted
    assert not offered.capabilities & Capability.OVER_IO_URING, "that kernel had enable_uring=N"
    assert (Capability.PASSTHROUGH, Capability.HAS_RESEND) == (1 << 32 + 5, 1 << 32 + 7)


def test_the_answers_that_were_seen_to_work() -> None:
    """Passthrough and take-over, byte by byte: younger than the header of many a distribution."""
    flags = Capability.INIT_EXT | Capability.PASSTHROUGH | Capability.HAS_RESEND
    out = InitOut(45, 4096, flags, 1 << 20, 64, 48, 1, 256, max_stack_depth=1, request_timeout=9)
    assert protocol.encode_init_out(out) == struct.pack(
        "=4I2H2I2H2IH22x", 7, 45, 4096, 1 << 30, 64, 48, 1 << 20, 1, 256, 0, 1 << 5 | 1 << 7, 1, 9
    )
    assert OpenFlag.PASSTHROUGH == 1 << 7
    assert protocol.encode_open_out(3, OpenFlag.PASSTHROUGH, -2) == struct.pack("=QIi", 3, 1 << 7, -2)


def test_the_ioctls_that_were_seen_to_work() -> None:
    assert protocol.DEV_IOC_CLONE == 0x8004E500
    assert protocol.DEV_IOC_BACKING_OPEN == 0x4010E501
    assert protocol.DEV_IOC_BACKING_CLOSE == 0x4004E502
    assert protocol.encode_backing_map(5) == bytearray([5, *bytes(15)])
    assert isinstance(protocol.encode_backing_map(5), bytearray), "bytes lose the ioctl's result"
    assert protocol.encode_backing_id(3) == b"\3\0\0\0"


def test_the_resend_notification_that_was_seen_to_work() -> None:
    assert protocol.notify_resend() == bytes([16, 0, 0, 0, 7, *bytes(11)])


# ---- round trips ------------------------------------------------------------------------------------

u16 = st.integers(0, 2**16 - 1)
u32 = st.integers(0, 2**32 - 1)
u64 = st.integers(0, 2**64 - 1)
i32 = st.integers(-(2**31), 2**31 - 1)
i64 = st.integers(-(2**63), 2**63 - 1)
data = st.binary(max_size=200)
texts = st.binary(min_size=1, max_size=300).filter(lambda raw: b"\0" not in raw)
names = texts.filter(lambda raw: b"/" not in raw)

WIDTHS: dict[Opcode, tuple[Callable[..., Request], list[Any]]] = {
    Opcode.LOOKUP: (LookupIn, [names]),
    Opcode.FORGET: (ForgetIn, [u64]),
    Opcode.GETATTR: (GetattrIn, [u32, u64]),
    Opcode.SETATTR: (protocol.SetattrIn, [u32, u64, u64, u64, i64, i64, i64, u32, u32, u32, u32, u32, u32]),
    Opcode.READLINK: (EmptyIn, []),
    Opcode.SYMLINK: (protocol.SymlinkIn, [names, texts]),
    Opcode.MKNOD: (protocol.MknodIn, [u32, u32, u32, names]),
    Opcode.MKDIR: (MkdirIn, [u32, u32, names]),
    Opcode.UNLINK: (protocol.UnlinkIn, [names]),
    Opcode.RMDIR: (protocol.RmdirIn, [names]),
    Opcode.RENAME: (protocol.RenameIn, [u64, names, names]),
    Opcode.LINK: (protocol.LinkIn, [u64, names]),
    Opcode.OPEN: (OpenIn, [u32, u32]),
    Opcode.READ: (ReadIn, [u64, u64, u32, u32, u64, u32]),
    Opcode.WRITE: (WriteIn, [u64, u64, u32, u64, u32, data]),
    Opcode.STATFS: (EmptyIn, []),
    Opcode.RELEASE: (ReleaseIn, [u64, u32, u32, u64]),
    Opcode.FSYNC: (protocol.FsyncIn, [u64, u32]),
    Opcode.SETXATTR: (SetxattrIn, [u32, st.just(0), texts, data]),
    Opcode.GETXATTR: (protocol.GetxattrIn, [u32, texts]),
    Opcode.LISTXATTR: (protocol.ListxattrIn, [u32]),
    Opcode.REMOVEXATTR: (protocol.RemovexattrIn, [texts]),
    Opcode.FLUSH: (protocol.FlushIn, [u64, u64]),
    Opcode.INIT: (InitIn, [u32, u32, u32, u64.map(lambda bits: bits | Capability.INIT_EXT.value)]),
    Opcode.OPENDIR: (OpenIn, [u32, u32]),
    Opcode.READDIR: (ReadIn, [u64, u64, u32, u32, u64, u32]),
    Opcode.RELEASEDIR: (ReleaseIn, [u64, u32, u32, u64]),
    Opcode.FSYNCDIR: (protocol.FsyncIn, [u64, u32]),
    Opcode.GETLK: (protocol.LkIn, [u64, u64, u64, u64, u32, u32, u32]),
    Opcode.SETLK: (protocol.LkIn, [u64, u64, u64, u64, u32, u32, u32]),
    Opcode.SETLKW: (protocol.LkIn, [u64, u64, u64, u64, u32, u32, u32]),
    Opcode.ACCESS: (protocol.AccessIn, [u32]),
    Opcode.CREATE: (protocol.CreateIn, [u32, u32, u32, u32, names]),
    Opcode.INTERRUPT: (protocol.InterruptIn, [u64]),
    Opcode.BMAP: (protocol.BmapIn, [u64, u32]),
    Opcode.DESTROY: (EmptyIn, []),
    Opcode.IOCTL: (protocol.IoctlIn, [u64, u32, u32, u64, u32, data]),
    Opcode.POLL: (protocol.PollIn, [u64, u64, u32, u32]),
    Opcode.NOTIFY_REPLY: (protocol.NotifyReplyIn, [u64, data]),
    Opcode.BATCH_FORGET: (
        BatchForgetIn,
        [st.lists(st.builds(Forgotten, u64, u64), max_size=20).map(tuple)],
    ),
    Opcode.FALLOCATE: (protocol.FallocateIn, [u64, u64, u64, u32]),
    Opcode.READDIRPLUS: (ReadIn, [u64, u64, u32, u32, u64, u32]),
    Opcode.RENAME2: (protocol.Rename2In, [u64, u32, names, names]),
    Opcode.LSEEK: (protocol.LseekIn, [u64, u64, u32]),
    Opcode.COPY_FILE_RANGE: (protocol.CopyFileRangeIn, [u64, u64, u64, u64, u64, u64, u64]),
    Opcode.SETUPMAPPING: (protocol.SetupMappingIn, [u64, u64, u64, u64, u64]),
    Opcode.REMOVEMAPPING: (
        protocol.RemoveMappingIn,
        [st.lists(st.builds(protocol.MappedRange, u64, u64), max_size=20).map(tuple)],
    ),
    Opcode.SYNCFS: (protocol.SyncfsIn, []),
    Opcode.TMPFILE: (protocol.CreateIn, [u32, u32, u32, u32, texts]),
    Opcode.STATX: (protocol.StatxIn, [u32, u64, u32, u32]),
    Opcode.COPY_FILE_RANGE_64: (protocol.CopyFileRangeIn, [u64, u64, u64, u64, u64, u64, u64]),
}


extensions = st.integers(0, 4).flatmap(lambda words: st.binary(min_size=words * 8, max_size=words * 8))


def bodies(opcode: Opcode) -> st.SearchStrategy[Request]:
    """What a request of this opcode may say."""
    make, fields = WIDTHS[opcode]
    return st.builds(make, *fields)


requests = st.sampled_from(sorted(WIDTHS)).flatmap(lambda opcode: st.tuples(st.just(opcode), bodies(opcode)))


def test_every_opcode_has_a_decoder_and_a_round_trip() -> None:
    assert set(DECODERS) == set(Opcode) - {Opcode.CUSE_INIT} == set(WIDTHS)


@pytest.mark.parametrize("opcode", WIDTHS, ids=lambda opcode: opcode.name)
def test_a_request_comes_back_as_it_was(opcode: Opcode) -> None:
    """From any kind of buffer, with its header, extensions cut off."""

    @settings(max_examples=20)
    @given(
        bodies(opcode), extensions, u64, u64, u32, u32, u32, st.sampled_from([bytes, bytearray, memoryview])
    )
    def check(
        body: Request,
        more: bytes,
        unique: int,
        node: int,
        uid: int,
        gid: int,
        pid: int,
        buffer: Callable[[bytes], Any],
    ) -> None:
        raw = encode_request(
            opcode, body, unique=unique, node=node, uid=uid, gid=gid, pid=pid, extensions=more
        )
        header, decoded = decode(buffer(raw))
        assert decoded == body
        assert type(decoded) is type(body)
        assert header == (len(raw), opcode, unique, node, uid, gid, pid, len(more))

    check()


@given(u32, u32, texts, data)
def test_the_long_setxattr_comes_back_as_it_was(flags: int, more: int, name: bytes, value: bytes) -> None:
    """Which of the two layouts the kernel uses is decided by what INIT agreed upon."""
    body = SetxattrIn(flags, more, name, value)
    agreed = Capability.SETXATTR_EXT | Capability.ASYNC_READ
    raw = encode_request(Opcode.SETXATTR, body, negotiated=agreed)
    assert decode(raw, decoders(agreed))[1] == body
    assert decoders(Capability.ASYNC_READ) is DECODERS


def test_data_to_write_is_not_copied() -> None:
    """A view of the buffer that was read into."""
    buffer = bytearray(encode_request(Opcode.WRITE, WriteIn(1, 0, 0, 0, 0, b"before")))
    body = decode(buffer)[1]
    assert isinstance(body, WriteIn)
    buffer[-6:] = b"after!"
    assert body.data == b"after!"


attrs = st.builds(Attr, u64, u64, u64, i64, i64, i64, u32, u32, u32, u32, u32, u32, u32, u32, u32, u32)
timeouts = st.integers(0, FOREVER).map(float)
entries = st.builds(EntryOut, u64, u64, timeouts, timeouts, attrs)
opens = st.builds(OpenOut, u64, u32, i32)
inits = st.builds(
    InitOut, u32, u32, u64.map(lambda bits: bits | Capability.INIT_EXT.value), u32, u16, u16, u32, u16, u16,
    u32, u16, u32,
)  # fmt: skip
statxs = st.builds(
    protocol.StatxOut, timeouts, u32, u32, u64, u32, u32, u32, u16, u64, u64, u64, u64,
    i64, u32, i64, u32, i64, u32, i64, u32, u32, u32, u32, u32,
)  # fmt: skip


def encoded(entry: EntryOut) -> bytes:
    return protocol.encode_entry(
        entry.node, entry.attr, entry.entry_timeout, entry.attr_timeout, entry.generation
    )


ANSWERS: list[tuple[str, Any, Callable[[Any], bytes], Callable[[Any], Any]]] = [
    ("attr", attrs, protocol.encode_attr, protocol.decode_attr),
    ("entry", entries, encoded, protocol.decode_entry),
    (
        "attr_out",
        st.builds(protocol.AttrOut, timeouts, attrs),
        lambda out: protocol.encode_attr_out(out.attr, out.timeout),
        protocol.decode_attr_out,
    ),
    ("open", opens, lambda out: protocol.encode_open_out(*out), protocol.decode_open_out),
    (
        "create",
        st.builds(CreateOut, entries, opens),
        lambda out: protocol.encode_create_out(encoded(out.entry), *out.open),
        protocol.decode_create_out,
    ),
    ("write", u32, protocol.encode_write_out, protocol.decode_write_out),
    ("copy", u64, protocol.encode_copy_file_range_out, protocol.decode_copy_file_range_out),
    ("getxattr", u32, protocol.encode_getxattr_out, protocol.decode_getxattr_out),
    ("lseek", u64, protocol.encode_lseek_out, protocol.decode_lseek_out),
    ("bmap", u64, protocol.encode_bmap_out, protocol.decode_bmap_out),
    ("poll", u32, protocol.encode_poll_out, protocol.decode_poll_out),
    (
        "statfs",
        st.builds(StatfsOut, u64, u64, u64, u64, u64, u32, u32, u32),
        protocol.encode_statfs_out,
        protocol.decode_statfs_out,
    ),
    (
        "lk",
        st.builds(protocol.LkOut, u64, u64, u32, u32),
        protocol.encode_lk_out,
        protocol.decode_lk_out,
    ),
    (
        "ioctl",
        st.builds(protocol.IoctlOut, i32, u32, u32, u32),
        protocol.encode_ioctl_out,
        protocol.decode_ioctl_out,
    ),
    ("statx", statxs, protocol.encode_statx_out, protocol.decode_statx_out),
    ("init", inits, protocol.encode_init_out, protocol.decode_init_out),
]


@pytest.mark.parametrize(
    ("values", "encode", "decode_"), [a[1:] for a in ANSWERS], ids=[a[0] for a in ANSWERS]
)
def test_an_answer_comes_back_as_it_was(
    values: Any, encode: Callable[[Any], bytes], decode_: Callable[[Any], Any]
) -> None:
    @given(values, u64.filter(bool))
    def check(value: Any, unique: int) -> None:
        raw = encode(value)
        assert decode_(raw) == value
        assert decode_reply(b"".join(reply(unique, raw))) == (unique, 0, raw)

    check()


notifications: list[tuple[Any, Callable[[Any], bytes]]] = [
    (st.builds(protocol.PollWakeup, u64), lambda n: protocol.notify_poll(*n)),
    (st.builds(protocol.InvalInode, u64, i64, i64), lambda n: protocol.notify_inval_inode(*n)),
    (st.builds(protocol.InvalEntry, u64, names, u32), lambda n: protocol.notify_inval_entry(*n)),
    (st.builds(protocol.Delete, u64, u64, names), lambda n: protocol.notify_delete(*n)),
    (st.builds(protocol.Store, u64, u64, data), lambda n: protocol.notify_store(*n)),
    (st.builds(protocol.Retrieve, u64, u64, u64, u32), lambda n: protocol.notify_retrieve(*n)),
    (st.builds(protocol.Resend), lambda n: protocol.notify_resend()),
    (st.builds(protocol.IncEpoch), lambda n: protocol.notify_inc_epoch()),
    (st.builds(protocol.Prune, st.lists(u64, max_size=9).map(tuple)), lambda n: protocol.notify_prune(*n)),
]


@given(st.one_of(*(values.map(lambda n, e=encode: (n, e(n))) for values, encode in notifications)))
def test_a_notification_comes_back_as_it_was(case: tuple[Any, bytes]) -> None:
    notification, raw = case
    written = decode_reply(raw)
    assert written.unique == 0
    decoded = decode_notification(written)
    assert decoded == notification
    assert type(decoded) is type(notification)


@given(
    st.lists(st.tuples(entries, st.builds(Dirent, u64, u64, u32, names)), max_size=12), st.integers(0, 2000)
)
def test_a_listing_comes_back_up_to_what_fitted(found: list[tuple[EntryOut, Dirent]], limit: int) -> None:
    """Never longer than asked for, names whole or not at all, each on a multiple of 8."""
    plain, plus = bytearray(), bytearray()
    names_of_plain = [d for _, d in found if protocol.add_dirent(plain, limit, *d)]
    names_of_plus = [
        DirentPlus(e, d) for e, d in found if protocol.add_direntplus(plus, limit, encoded(e), *d)
    ]
    assert len(plain) <= limit
    assert len(plus) <= limit
    assert len(plain) % 8 == len(plus) % 8 == 0
    assert protocol.decode_dirents(plain) == names_of_plain
    assert protocol.decode_direntplus(plus) == names_of_plus
    if limit >= sum(128 + 24 + 307 for _ in found):
        assert len(names_of_plus) == len(found)


def test_a_name_that_just_fits_is_taken_and_one_byte_more_is_not() -> None:
    buffer = bytearray()
    assert not protocol.add_dirent(buffer, 31, 1, 1, 8, b"12345678")
    assert buffer == b""
    assert protocol.add_dirent(buffer, 32, 1, 1, 8, b"12345678")
    assert len(buffer) == 32
    assert not protocol.add_dirent(buffer, 32, 1, 2, 8, b"a")


# ---- values with a meaning --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("timeout", "seconds", "nanoseconds"),
    [
        (0.0, 0, 0),
        (-1.0, 0, 0),
        (1.5, 1, 500_000_000),
        (0.999_999_999_9, 0, 999_999_999),
        (60, 60, 0),
        (float("inf"), FOREVER, 0),
        (2.0**60, FOREVER, 0),
    ],
)
def test_a_timeout_is_seconds_and_nanoseconds(timeout: float, seconds: int, nanoseconds: int) -> None:
    """∞ is a number that ends after any machine; less than nothing is nothing."""
    raw = protocol.encode_entry(9, protocol.NO_ATTR, timeout, timeout)
    assert protocol._ENTRY.unpack(raw)[2:6] == (seconds, seconds, nanoseconds, nanoseconds)
    assert protocol._ATTR_OUT.unpack(protocol.encode_attr_out(protocol.NO_ATTR, timeout))[:2] == (
        seconds,
        nanoseconds,
    )


@given(i64.map(lambda s: s // 4), st.integers(0, 999_999_999))
@example(-1, 999_999_999)
def test_times_before_1970_keep_their_nanoseconds(seconds: int, nanoseconds: int) -> None:
    made = protocol.attr(7, 0o100644, size=3, mtime_ns=seconds * 10**9 + nanoseconds)
    back = protocol.decode_attr(protocol.encode_attr(made))
    assert (back.mtime, back.mtime_nsec) == (seconds, nanoseconds)
    assert (back.ino, back.mode, back.size, back.nlink) == (7, 0o100644, 3, 1)


def test_a_negative_entry_is_node_0_with_a_timeout() -> None:
    entry = protocol.decode_entry(protocol.encode_negative(5.0))
    assert (entry.node, entry.entry_timeout) == (0, 5.0)


def test_an_errno_that_the_kernel_would_refuse_is_refused_here() -> None:
    """The kernel would drop the answer, and the caller would wait for ever."""
    assert decode_reply(b"".join(error(8, 2))) == (8, 2, b"")
    for number in (0, -2, 512):
        with pytest.raises(ValueError, match="no errno"):
            error(8, number)


def test_parts_of_an_answer_are_not_copied() -> None:
    """What is read goes from the cached file's buffer to the kernel as it is."""
    part = memoryview(bytearray(100))
    head, same = reply(4, part)
    assert same is part
    assert len(head) == 16


def test_capabilities_that_the_kernel_would_not_look_at_are_refused() -> None:
    """Without INIT_EXT, PASSTHROUGH would silently not be taken."""
    with pytest.raises(ValueError, match="INIT_EXT"):
        protocol.encode_init_out(InitOut(45, 0, Capability.PASSTHROUGH, 4096))


def test_a_resent_request_keeps_its_mark() -> None:
    """The answer has to repeat the number, mark included."""
    header = decode_header(encode_request(Opcode.READLINK, EmptyIn(), unique=0xC | protocol.RESENT))
    assert header.unique == 0x8000_0000_0000_000C


def test_an_opcode_of_a_later_kernel_is_no_error() -> None:
    """It is for the session to say ENOSYS."""
    header, body = decode(framed(54, b"whatever"))
    assert (header.opcode, body) == (54, UnknownIn(b"whatever"))
    assert protocol.opcode_name(54) == "opcode 54"


def test_an_init_of_an_older_or_newer_kernel_is_understood() -> None:
    """INIT is read before there is a common version."""
    old = decode(framed(Opcode.INIT, protocol._INIT_IN_OLD.pack(7, 31, 4096, 0xFF)))[1]
    assert old == InitIn(7, 31, 4096, 0xFF)
    longer = protocol._INIT_IN.pack(7, 60, 4096, 1 << 30, 1 << 31) + bytes(64)
    assert decode(framed(Opcode.INIT, longer))[1] == InitIn(7, 60, 4096, 1 << 63 | 1 << 30)


# ---- a peer that sends anything ---------------------------------------------------------------------

MALFORMED: list[tuple[str, Opcode, bytes]] = [
    ("an empty name", Opcode.LOOKUP, b"\0"),
    ("without a NUL", Opcode.LOOKUP, b"name"),
    ("without a NUL", Opcode.LOOKUP, b""),
    ("a slash", Opcode.LOOKUP, b"a/b\0"),
    ("a NUL in it", Opcode.LOOKUP, b"a\0b\0"),
    ("a name of 4096 bytes", Opcode.LOOKUP, b"n" * 4096 + b"\0"),
    ("a name of 4096 bytes", Opcode.UNLINK, b"n" * 4096 + b"\0"),
    ("an empty name", Opcode.UNLINK, b"\0"),
    ("a slash", Opcode.RMDIR, b"../x\0"),
    ("without a NUL", Opcode.RENAME, bytes(8) + b"a\0b"),
    ("without a NUL", Opcode.RENAME, bytes(8) + b"a\0"),
    ("an empty name", Opcode.RENAME, bytes(8) + b"a\0\0"),
    ("after the last name", Opcode.RENAME, bytes(8) + b"a\0b\0c"),
    ("after the last name", Opcode.MKDIR, bytes(8) + b"a\0b\0"),
    ("less than 8", Opcode.MKDIR, bytes(7)),
    ("an empty name", Opcode.SYMLINK, b"a\0\0"),
    ("instead of 40", Opcode.READ, bytes(39)),
    ("instead of 40", Opcode.READ, bytes(41)),
    ("instead of 8", Opcode.OPEN, b""),
    ("instead of 0", Opcode.STATFS, b"x"),
    ("5 bytes of data, says 6", Opcode.WRITE, protocol._WRITE_IN.pack(1, 0, 6, 0, 0, 0) + b"12345"),
    ("5 bytes of data, says 4", Opcode.WRITE, protocol._WRITE_IN.pack(1, 0, 4, 0, 0, 0) + b"12345"),
    ("less than 40", Opcode.WRITE, bytes(39)),
    ("a value of 2 bytes, says 3", Opcode.SETXATTR, protocol._SETXATTR_SHORT.pack(3, 0) + b"n\0vv"),
    ("without a NUL", Opcode.SETXATTR, protocol._SETXATTR_SHORT.pack(3, 0) + b"nvv"),
    ("an empty name", Opcode.SETXATTR, protocol._SETXATTR_SHORT.pack(2, 0) + b"\0vv"),
    ("16 bytes for 2 nodes", Opcode.BATCH_FORGET, protocol._COUNT.pack(2) + bytes(16)),
    ("0 bytes for 4294967295 nodes", Opcode.BATCH_FORGET, protocol._COUNT.pack(2**32 - 1)),
    ("16 bytes for 2 mappings", Opcode.REMOVEMAPPING, protocol._U32.pack(2) + bytes(16)),
    ("3 bytes of data, says 4", Opcode.IOCTL, protocol._IOCTL_IN.pack(1, 0, 0, 0, 4, 0) + b"123"),
    ("3 bytes of data, says 4", Opcode.NOTIFY_REPLY, protocol._RETRIEVE_IN.pack(0, 4) + b"123"),
    ("less than 16", Opcode.INIT, bytes(15)),
    ("less than 64", Opcode.INIT, protocol._INIT_IN_OLD.pack(7, 36, 0, 1 << 30) + bytes(4)),
]


@pytest.mark.parametrize(("reason", "opcode", "body"), MALFORMED)
def test_a_malformed_request_says_what_is_wrong_and_who_waits(
    reason: str, opcode: Opcode, body: bytes
) -> None:
    """The caller is still owed an answer, so the number is kept."""
    with pytest.raises(Malformed, match=reason) as caught:
        decode(framed(opcode, body, unique=42))
    assert (caught.value.opcode, caught.value.unique) == (opcode, 42)
    assert opcode.name in str(caught.value)


def test_a_length_that_is_not_the_buffers_is_malformed() -> None:
    good = encode_request(Opcode.LOOKUP, LookupIn(b"name"), unique=6)
    for bad in (good[:-1], good + b"\0", good[:40]):
        with pytest.raises(Malformed, match="says that it has 45 bytes") as caught:
            decode(bad)
        assert caught.value.unique == 6
    for short in (b"", good[:39]):
        with pytest.raises(Malformed, match="no header"):
            decode(short)


def test_extensions_that_are_longer_than_the_request_are_malformed() -> None:
    raw = bytearray(encode_request(Opcode.MKDIR, MkdirIn(0, 0, b"name"), unique=6))
    raw[36:38] = (2).to_bytes(2, "little")
    with pytest.raises(Malformed, match="16 bytes of extensions"):
        decode(raw)
    raw[36:38] = (1).to_bytes(2, "little")
    with pytest.raises(Malformed, match="less than 8"):
        decode(raw)


def harmless(raw: bytes) -> None:
    """Whatever comes is decoded or is Malformed, with either layout of SETXATTR."""
    for table in (DECODERS, decoders(Capability.SETXATTR_EXT)):
        try:
            header, body = decode(raw, table)
        except Malformed as bad:
            assert str(bad)
        else:
            assert header.length == len(raw)
            if not isinstance(body, InitIn | UnknownIn) and table is DECODERS:
                assert len(encode_request(header.opcode, body)) == len(raw) - header.extensions


@given(st.binary(max_size=400))
def test_bytes_of_any_kind_never_crash_the_decoder(raw: bytes) -> None:
    harmless(raw)


@settings(max_examples=300)
@given(st.integers(0, 60), st.binary(max_size=200), extensions)
def test_a_body_of_any_kind_never_crashes_the_decoder(opcode: int, body: bytes, more: bytes) -> None:
    harmless(framed(opcode, body, extensions=more))


@settings(max_examples=300)
@given(requests, extensions, st.data())
def test_a_damaged_request_never_crashes_the_decoder(
    request: tuple[Opcode, Request], more: bytes, draw: st.DataObject
) -> None:
    """Bytes changed, cut off, put in, with the length made to match or not."""
    opcode, body = request
    raw = bytearray(encode_request(opcode, body, extensions=more))
    for _ in range(draw.draw(st.integers(1, 4))):
        at = draw.draw(st.integers(0, len(raw)))
        if draw.draw(st.booleans()):
            raw[at : at + draw.draw(st.integers(0, 9))] = draw.draw(st.binary(max_size=9))
        else:
            raw[at : at + 1] = draw.draw(st.sampled_from([b"\0", b"\xff", b"/", b"\x01"]))
    if len(raw) >= HEADER_SIZE and draw.draw(st.booleans()):
        raw[:4] = len(raw).to_bytes(4, "little")
    harmless(bytes(raw))


OUT_DECODERS: list[Callable[[Any], Any]] = [
    *(a[3] for a in ANSWERS),
    protocol.decode_dirents,
    protocol.decode_direntplus,
    decode_reply,
]


@given(st.sampled_from(OUT_DECODERS), st.binary(max_size=300))
def test_what_a_server_writes_is_decoded_or_malformed(decoder: Callable[[Any], Any], raw: bytes) -> None:
    """The stand-in for the kernel is as strict as the kernel."""
    try:
        decoder(raw)
    except Malformed as bad:
        assert str(bad)


@given(st.integers(-1, 12), st.binary(max_size=60))
def test_any_notification_is_decoded_or_malformed(code: int, raw: bytes) -> None:
    try:
        decode_notification(protocol.Reply(0, code, raw))
    except Malformed as bad:
        assert str(bad)


@given(st.binary(max_size=60))
def test_any_answer_is_decoded_or_malformed(raw: bytes) -> None:
    framed_answer = protocol._OUT.pack(16 + len(raw), 0, 3) + raw
    assert decode_reply(framed_answer).data == raw
    for bad in (protocol._OUT.pack(16 + len(raw), -600, 3) + raw, framed_answer + b"x"):
        with pytest.raises(Malformed):
            decode_reply(bad)
