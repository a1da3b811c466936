"""
The wire protocol of FUSE: what the kernel and a server say to each other over `/dev/fuse`, as data.

Pure: bytes in, values out, and back. No descriptor, no state, no errno of ours; `session` reads and
writes. The truth is `linux/fuse.h`; this is ABI 7.40 (Linux 6.9, the first with passthrough and RESEND)
to 7.45 (Linux 6.18, still so in 7.2), and a test holds sizes, offsets and numbers against the header of
the machine.

One read of the descriptor gives one whole request, of which the header tells the length:

    header (40 bytes) | structure of the opcode, maybe empty | names, each ended by NUL, or data | extensions

One write answers it: a header of 16 bytes (length, negative errno, the `unique` of the request), then,
if the errno is 0, the structure of the answer. FORGET, BATCH_FORGET and NOTIFY_REPLY take no answer, and
INTERRUPT needs none. The kernel refuses (EINVAL, ENOENT) what it does not expect, and then a caller waits
for ever. `unique` 0 in a write is a notification: the server speaks first, with the `Notify` code in the
place of the errno.

Byte order is the machine's, and nothing is aligned beyond the padding spelled out here (so `=`).

Where to look: `decode` and the `…In` tuples for requests, `reply` and `encode_…` for answers,
`notify_…` for notifications. `encode_request` and the other `decode_…` are the kernel's side of each:
the tests and a stand-in for the kernel speak it. What comes from the peer and is wrong raises
`Malformed`; a value of ours that does not fit its field is a `struct.error`, thus a bug.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import IntEnum, IntFlag, unique
from functools import partial
from struct import Struct
from typing import Any, NamedTuple, TypeAlias, TypeVar, cast

Buffer: TypeAlias = bytes | bytearray | memoryview

MAJOR = 7
"""Of the protocol. Both sides take the smaller of their minors; a peer of another major is not spoken to."""
MINOR = 45
"""The newest minor whose layouts are here: what to answer in INIT at most. Linux 6.18."""
OLDEST_MINOR = 40
"""The oldest minor for which all of this holds. Linux 6.9."""

ROOT = 1
"""The node of the root of every mount."""

NAME_MAX = 4095
"""The longest name or link target that the kernel sends (PATH_MAX without its NUL). That a file system
has a limit of 255 is its own business, and its ENAMETOOLONG."""

RESENT = 1 << 63
"""In `Header.unique`: this request was sent before, and came again after `notify_resend`. It is a part
of the number: the answer repeats it."""

INTERRUPT_BIT = 1
"""In `Header.unique`: set in INTERRUPT only; the number without it is the interrupted request's."""

NOBODY = 0xFFFF_FFFF
"""In `Header.uid` and `gid` with ALLOW_IDMAP: the id has no meaning in this mount."""

MIN_READ_BUFFER = 8192
"""A read of the descriptor with less room fails with EINVAL; so does one with less than `max_write` and
the 80 bytes of header and structure before the data."""

FOREVER = 0x7FFF_FFFF
"""Seconds (68 years) that stand for ∞ in a timeout: more than any uptime, and fits everywhere."""

ERRNO_MAX = 511
"""The kernel refuses an answer with a larger errno."""


class Malformed(ValueError):
    """The peer sent something that is no message of this protocol.

    `unique` is the request's, for the answer that its caller is owed; 0 where not even that can be known.
    """

    def __init__(self, opcode: int, reason: str, unique: int = 0) -> None:
        super().__init__(opcode, reason, unique)
        self.opcode = opcode
        self.reason = reason
        self.unique = unique

    def __str__(self) -> str:
        return f"malformed {opcode_name(self.opcode)}: {self.reason}"


# ---- numbers --------------------------------------------------------------------------------------
#
# `# 7.n` says which minor brought a number, where that is later than 7.9 (Linux 2.6.24).


@unique
class Opcode(IntEnum):
    """What is asked. Not in `Header`, which keeps the bare number: making a member costs more than
    decoding the header. Members and numbers compare, and index dictionaries, alike."""

    LOOKUP = 1  # a name in a directory; counts one reference of the node that is answered
    FORGET = 2  # gives references back; no answer
    GETATTR = 3
    SETATTR = 4  # chmod, chown, truncate, utimes: see SetattrValid
    READLINK = 5
    SYMLINK = 6
    MKNOD = 8
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    LINK = 13
    OPEN = 14  # answered ENOSYS: never asked again, opens succeed (NO_OPEN_SUPPORT)
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18  # the last descriptor is closed; says nothing of mappings
    FSYNC = 20
    SETXATTR = 21
    GETXATTR = 22  # size 0 asks for the size. Answered ENOSYS: never asked again
    LISTXATTR = 23
    REMOVEXATTR = 24
    FLUSH = 25  # each close of a descriptor. Answered ENOSYS: never asked again
    INIT = 26  # the first request of a mount: versions, limits, Capability
    OPENDIR = 27  # answered ENOSYS: never asked again (NO_OPENDIR_SUPPORT)
    READDIR = 28
    RELEASEDIR = 29
    FSYNCDIR = 30
    GETLK = 31
    SETLK = 32
    SETLKW = 33
    ACCESS = 34  # not asked with default_permissions
    CREATE = 35  # lookup, mknod and open in one
    INTERRUPT = 36  # a caller got a signal. Answered ENOSYS: never sent again; EAGAIN: again
    BMAP = 37
    DESTROY = 38  # the last request: unmounted
    IOCTL = 39  # 7.11
    POLL = 40  # 7.11
    NOTIFY_REPLY = 41  # 7.15: the data that notify_retrieve asked for; no answer
    BATCH_FORGET = 42  # 7.16: FORGET of many nodes; no answer
    FALLOCATE = 43  # 7.19
    READDIRPLUS = 44  # 7.21: READDIR with a LOOKUP of each name
    RENAME2 = 45  # 7.23: RENAME with flags of renameat2(2)
    LSEEK = 46  # 7.24: SEEK_DATA and SEEK_HOLE only
    COPY_FILE_RANGE = 47  # 7.28
    SETUPMAPPING = 48  # 7.31: DAX of virtiofs
    REMOVEMAPPING = 49  # 7.31
    SYNCFS = 50  # 7.34
    TMPFILE = 51  # 7.37
    STATX = 52  # 7.39
    COPY_FILE_RANGE_64 = 53  # 7.45: may copy more than 4 GiB at once
    CUSE_INIT = 4096  # 7.12: a character device instead of a file system


def opcode_name(opcode: int) -> str:
    """The name for a log line, of opcodes that we do not know too."""
    try:
        return Opcode(opcode).name
    except ValueError:
        return f"opcode {opcode}"


@unique
class Capability(IntFlag):
    """What the kernel offers in INIT and the server takes of it. 64 bits: the lower half is `flags`, the
    upper `flags2`, which counts only beside INIT_EXT. ABI minor and the Linux that first had it."""

    ASYNC_READ = 1 << 0  # 7.6, 2.6.16: several reads of one file at once, answered in any order
    POSIX_LOCKS = 1 << 1  # 7.7, 2.6.18: fcntl locks are asked of the server; without, the kernel keeps them
    FILE_OPS = 1 << 2  # 7.9, 2.6.24: fstat and ftruncate carry the file handle
    ATOMIC_O_TRUNC = 1 << 3  # 7.9, 2.6.24: O_TRUNC comes with OPEN instead of a SETATTR before it
    EXPORT_SUPPORT = 1 << 4  # 7.9, 2.6.27: LOOKUP of "." and "..", for NFS export
    BIG_WRITES = 1 << 5  # 7.9, 2.6.26: writes of more than a page; always so since 4.20
    DONT_MASK = 1 << 6  # 7.12, 2.6.31: the server applies the umask itself
    SPLICE_WRITE = 1 << 7  # 7.14, 2.6.35: the device takes answers by splice(2)
    SPLICE_MOVE = 1 << 8  # 7.14, 2.6.35: splice may move pages instead of copying them
    SPLICE_READ = 1 << 9  # 7.14, 2.6.35: the device gives requests by splice(2)
    FLOCK_LOCKS = 1 << 10  # 7.17, 3.1: flock(2) is asked of the server; without, the kernel keeps it
    HAS_IOCTL_DIR = 1 << 11  # 7.18, 3.3: ioctl on directories
    AUTO_INVAL_DATA = 1 << 12  # 7.20, 3.6: other mtime or size in an attr: the file's pages are dropped
    DO_READDIRPLUS = 1 << 13  # 7.21, 3.9: READDIRPLUS instead of READDIR
    READDIRPLUS_AUTO = 1 << 14  # 7.21, 3.9: READDIRPLUS only where the reader then stats what it lists
    ASYNC_DIO = 1 << 15  # 7.22, 3.10: O_DIRECT requests of one call in parallel
    WRITEBACK_CACHE = 1 << 16  # 7.23, 3.15: writes gather in the page cache; excludes PASSTHROUGH
    NO_OPEN_SUPPORT = 1 << 17  # 7.23, 3.16: OPEN may be answered ENOSYS, once for the whole mount
    PARALLEL_DIROPS = 1 << 18  # 7.25, 4.7: LOOKUP and READDIR in one directory in parallel
    HANDLE_KILLPRIV = 1 << 19  # 7.26, 4.9: the server drops suid, sgid and capabilities on write and chown
    POSIX_ACL = 1 << 20  # 7.26, 4.9: the server keeps ACLs, the kernel checks them
    ABORT_ERROR = 1 << 21  # 7.27, 4.18: reads of the device after an abort say ECONNABORTED, not ENODEV
    MAX_PAGES = 1 << 22  # 7.28, 4.20: InitOut.max_pages counts; without, requests have 32 pages
    CACHE_SYMLINKS = 1 << 23  # 7.28, 4.20: link targets stay in the page cache
    NO_OPENDIR_SUPPORT = 1 << 24  # 7.29, 5.1: OPENDIR may be answered ENOSYS, once for the whole mount
    EXPLICIT_INVAL_DATA = 1 << 25  # 7.30, 5.2: pages go only when notified; excludes AUTO_INVAL_DATA
    MAP_ALIGNMENT = 1 << 26  # 7.31, 5.10: InitOut.map_alignment counts (DAX)
    SUBMOUNTS = 1 << 27  # 7.32, 5.10: a directory of another device is mounted by itself
    HANDLE_KILLPRIV_V2 = 1 << 28  # 7.33, 5.11: the same, where the request says so: no GETXATTR a write
    SETXATTR_EXT = 1 << 29  # 7.33, 5.13: the longer SETXATTR (see `decoders`)
    INIT_EXT = 1 << 30  # 7.36, 5.17: the upper half of these flags counts
    INIT_RESERVED = 1 << 31  # 7.36: never set
    SECURITY_CTX = 1 << 32  # 7.36, 5.17: creating requests carry security labels as an extension
    HAS_INODE_DAX = 1 << 33  # 7.36, 5.17: DAX is decided for each file
    CREATE_SUPP_GROUP = 1 << 34  # 7.38, 6.3: creating requests carry a supplementary group as an extension
    HAS_EXPIRE_ONLY = 1 << 35  # 7.38, 6.2: EXPIRE_ONLY in notify_inval_entry
    DIRECT_IO_ALLOW_MMAP = 1 << 36  # 7.39, 6.6: files opened with DIRECT_IO may be mapped shared
    PASSTHROUGH = 1 << 37  # 7.40, 6.9: opens with a backing file; needs max_stack_depth 1 or 2
    NO_EXPORT_SUPPORT = 1 << 38  # 7.40, 6.9: no file handles (name_to_handle_at(2), NFS) at all
    HAS_RESEND = 1 << 39  # 7.40, 6.9: notify_resend, and RESENT in what comes again
    ALLOW_IDMAP = 1 << 40  # 7.41, 6.12: the mount may be id-mapped; needs default_permissions
    OVER_IO_URING = 1 << 41  # 7.42, 6.14: requests over io_uring
    REQUEST_TIMEOUT = 1 << 42  # 7.43, 6.15: InitOut.request_timeout: unanswered so long aborts the mount


@unique
class OpenFlag(IntFlag):
    """How the kernel shall treat an open file: in the answer to OPEN, OPENDIR and CREATE."""

    DIRECT_IO = 1 << 0  # around the page cache
    KEEP_CACHE = 1 << 1  # pages from earlier opens stay
    NONSEEKABLE = 1 << 2  # 7.10
    CACHE_DIR = 1 << 3  # 7.28: the kernel keeps the listing (broken in Linux 6.9 to 6.12)
    STREAM = 1 << 4  # Linux 5.2: no position at all
    NOFLUSH = 1 << 5  # 7.35: no FLUSH on close
    PARALLEL_DIRECT_WRITES = 1 << 6  # 7.38: direct writes to one file in parallel
    PASSTHROUGH = 1 << 7  # 7.40: I/O goes to the backing file of `backing_id`


@unique
class Notify(IntEnum):
    """What a notification says: the code in the place of the errno."""

    POLL = 1  # 7.11
    INVAL_INODE = 2  # 7.12
    INVAL_ENTRY = 3  # 7.12
    STORE = 4  # 7.15
    RETRIEVE = 5  # 7.15
    DELETE = 6  # 7.18
    RESEND = 7  # 7.40
    INC_EPOCH = 8  # 7.44
    PRUNE = 9  # 7.45


@unique
class SetattrValid(IntFlag):
    """Which fields of SetattrIn count."""

    MODE = 1 << 0
    UID = 1 << 1
    GID = 1 << 2
    SIZE = 1 << 3
    ATIME = 1 << 4
    MTIME = 1 << 5
    FH = 1 << 6
    ATIME_NOW = 1 << 7  # ATIME is set too; the server's clock counts
    MTIME_NOW = 1 << 8
    LOCKOWNER = 1 << 9
    CTIME = 1 << 10  # 7.23, with WRITEBACK_CACHE
    KILL_SUIDGID = 1 << 11  # 7.33, with HANDLE_KILLPRIV_V2


@unique
class GetattrFlag(IntFlag):
    """GetattrIn.flags, StatxIn.flags."""

    FH = 1 << 0  # `fh` counts: fstat


@unique
class OpenInFlag(IntFlag):
    """OpenIn.open_flags, CreateIn.open_flags: what the kernel adds to the flags of open(2)."""

    KILL_SUIDGID = 1 << 0  # 7.33: this open truncates: drop suid and sgid


@unique
class ReadFlag(IntFlag):
    """ReadIn.read_flags."""

    LOCKOWNER = 1 << 1  # `lock_owner` counts


@unique
class WriteFlag(IntFlag):
    """WriteIn.write_flags."""

    CACHE = 1 << 0  # from the page cache, by whom is unknown: `fh` is some handle that may write
    LOCKOWNER = 1 << 1  # `lock_owner` counts
    KILL_SUIDGID = 1 << 2  # 7.31


@unique
class ReleaseFlag(IntFlag):
    """ReleaseIn.release_flags."""

    FLUSH = 1 << 0
    FLOCK_UNLOCK = 1 << 1  # 7.17


@unique
class FsyncFlag(IntFlag):
    """FsyncIn.flags."""

    FDATASYNC = 1 << 0  # the data, not the times


@unique
class LkFlag(IntFlag):
    """LkIn.lk_flags."""

    FLOCK = 1 << 0  # flock(2), not fcntl


@unique
class IoctlFlag(IntFlag):
    """IoctlIn.flags, IoctlOut.flags."""

    COMPAT = 1 << 0
    UNRESTRICTED = 1 << 1
    RETRY = 1 << 2
    BITS_32 = 1 << 3  # 7.16
    DIR = 1 << 4  # 7.18
    COMPAT_X32 = 1 << 5  # 7.30


@unique
class PollFlag(IntFlag):
    """PollIn.flags."""

    SCHEDULE_NOTIFY = 1 << 0  # notify_poll is wanted once there is something


@unique
class SetxattrFlag(IntFlag):
    """SetxattrIn.setxattr_flags."""

    ACL_KILL_SGID = 1 << 0  # 7.33


@unique
class AttrFlag(IntFlag):
    """Attr.flags."""

    SUBMOUNT = 1 << 0  # 7.32
    DAX = 1 << 1  # 7.36


@unique
class InvalEntryFlag(IntFlag):
    """Of notify_inval_entry."""

    EXPIRE_ONLY = 1 << 0  # 7.38: the name is looked up again when used, not thrown away


def _ioc(direction: int, number: int, size: int) -> int:
    """The number of an ioctl of the device, as `asm-generic/ioctl.h` packs it (x86, arm, riscv, s390)."""
    return direction << 30 | size << 16 | 229 << 8 | number


_NONE, _WRITE, _READ = 0, 1, 2

_U32 = Struct("=I")
_BACKING_MAP = Struct("=iI8x")

DEV_IOC_CLONE = _ioc(_READ, 0, _U32.size)
"""On a fresh `/dev/fuse`: make it a second queue of the mount whose descriptor is given."""
DEV_IOC_BACKING_OPEN = _ioc(_WRITE, 1, _BACKING_MAP.size)
"""Register a backing file (`encode_backing_map`); returns its id. 7.40; needs CAP_SYS_ADMIN."""
DEV_IOC_BACKING_CLOSE = _ioc(_WRITE, 2, _U32.size)
"""Give a backing id (`encode_backing_id`) up; opens that use it go on. 7.40."""
DEV_IOC_SYNC_INIT = _ioc(_NONE, 3, 0)
"""Before mount(2): let that wait for the answer to INIT. Linux 6.18."""


def encode_backing_map(fd: int) -> bytearray:
    """The argument of DEV_IOC_BACKING_OPEN. A bytearray: with `bytes`, `fcntl.ioctl` loses the id."""
    return bytearray(_BACKING_MAP.pack(fd, 0))


def encode_backing_id(backing_id: int) -> bytes:
    """The argument of DEV_IOC_BACKING_CLOSE."""
    return _U32.pack(backing_id)


# ---- requests -------------------------------------------------------------------------------------


class Header(NamedTuple):
    """What stands before every request."""

    length: int
    """Of the whole request."""
    opcode: int
    unique: int
    """Names the request in its answer. Never 0."""
    node: int
    uid: int
    gid: int
    pid: int
    """Who asks, as seen by the mount; 0: the kernel itself, or somebody outside our pid namespace."""
    extensions: int = 0
    """Bytes of extensions at the end of the request."""


class EmptyIn(NamedTuple):
    """READLINK, STATFS, DESTROY: the header says all."""


class UnknownIn(NamedTuple):
    """A request of an opcode that is not here. ENOSYS is the answer."""

    data: bytes


class LookupIn(NamedTuple):
    name: bytes


class ForgetIn(NamedTuple):
    lookups: int


class Forgotten(NamedTuple):
    node: int
    lookups: int


class BatchForgetIn(NamedTuple):
    nodes: tuple[Forgotten, ...]


class GetattrIn(NamedTuple):
    flags: int
    fh: int


class SetattrIn(NamedTuple):
    """Times are seconds and, apart, nanoseconds; those before 1970 are negative."""

    valid: int
    fh: int
    size: int
    lock_owner: int
    atime: int
    mtime: int
    ctime: int
    atime_nsec: int
    mtime_nsec: int
    ctime_nsec: int
    mode: int
    uid: int
    gid: int


class SymlinkIn(NamedTuple):
    name: bytes
    target: bytes


class MknodIn(NamedTuple):
    mode: int
    rdev: int
    umask: int
    name: bytes


class MkdirIn(NamedTuple):
    mode: int
    umask: int
    name: bytes


class UnlinkIn(NamedTuple):
    name: bytes


class RmdirIn(NamedTuple):
    name: bytes


class RenameIn(NamedTuple):
    new_parent: int
    name: bytes
    new_name: bytes


class Rename2In(NamedTuple):
    new_parent: int
    flags: int
    name: bytes
    new_name: bytes


class LinkIn(NamedTuple):
    """The header's node is the directory that gets the name."""

    node: int
    name: bytes


class OpenIn(NamedTuple):
    """OPEN and OPENDIR. `flags` are those of open(2)."""

    flags: int
    open_flags: int


class CreateIn(NamedTuple):
    """CREATE; TMPFILE, where the name means nothing: the kernel sends "/"."""

    flags: int
    mode: int
    umask: int
    open_flags: int
    name: bytes


class ReadIn(NamedTuple):
    """READ, READDIR and READDIRPLUS. `flags` are those of the open file."""

    fh: int
    offset: int
    size: int
    read_flags: int
    lock_owner: int
    flags: int


class WriteIn(NamedTuple):
    """`data` is a view of the buffer that was decoded, good as long as that is not read into again."""

    fh: int
    offset: int
    write_flags: int
    lock_owner: int
    flags: int
    data: Buffer


class ReleaseIn(NamedTuple):
    """RELEASE and RELEASEDIR."""

    fh: int
    flags: int
    release_flags: int
    lock_owner: int


class FlushIn(NamedTuple):
    fh: int
    lock_owner: int


class FsyncIn(NamedTuple):
    """FSYNC and FSYNCDIR."""

    fh: int
    flags: int


class SetxattrIn(NamedTuple):
    """`flags` are those of setxattr(2). `setxattr_flags` are 0 without SETXATTR_EXT."""

    flags: int
    setxattr_flags: int
    name: bytes
    value: bytes


class GetxattrIn(NamedTuple):
    size: int
    name: bytes


class ListxattrIn(NamedTuple):
    size: int


class RemovexattrIn(NamedTuple):
    name: bytes


class LkIn(NamedTuple):
    """GETLK, SETLK and SETLKW."""

    fh: int
    owner: int
    start: int
    end: int
    type: int
    pid: int
    lk_flags: int


class AccessIn(NamedTuple):
    mask: int


class InitIn(NamedTuple):
    """What the kernel speaks and offers. `capabilities` may hold bits that are not in `Capability` yet."""

    major: int
    minor: int
    max_readahead: int
    capabilities: int


class InterruptIn(NamedTuple):
    unique: int


class BmapIn(NamedTuple):
    block: int
    blocksize: int


class IoctlIn(NamedTuple):
    fh: int
    flags: int
    command: int
    argument: int
    out_size: int
    data: bytes


class PollIn(NamedTuple):
    fh: int
    handle: int
    """The kernel's: what notify_poll names."""
    flags: int
    events: int


class NotifyReplyIn(NamedTuple):
    """The header's `unique` is the one that notify_retrieve gave."""

    offset: int
    data: bytes


class FallocateIn(NamedTuple):
    fh: int
    offset: int
    length: int
    mode: int


class LseekIn(NamedTuple):
    fh: int
    offset: int
    whence: int


class CopyFileRangeIn(NamedTuple):
    """COPY_FILE_RANGE, answered by `encode_write_out`, and COPY_FILE_RANGE_64, which has its own answer."""

    fh: int
    offset: int
    to_node: int
    to_fh: int
    to_offset: int
    length: int
    flags: int


class SetupMappingIn(NamedTuple):
    fh: int
    offset: int
    length: int
    flags: int
    window_offset: int


class MappedRange(NamedTuple):
    window_offset: int
    length: int


class RemoveMappingIn(NamedTuple):
    mappings: tuple[MappedRange, ...]


class SyncfsIn(NamedTuple):
    """SYNCFS: nothing but padding."""


class StatxIn(NamedTuple):
    flags: int
    fh: int
    sx_flags: int
    sx_mask: int


Request: TypeAlias = (
    AccessIn
    | BatchForgetIn
    | BmapIn
    | CopyFileRangeIn
    | CreateIn
    | EmptyIn
    | FallocateIn
    | FlushIn
    | ForgetIn
    | FsyncIn
    | GetattrIn
    | GetxattrIn
    | InitIn
    | InterruptIn
    | IoctlIn
    | LinkIn
    | ListxattrIn
    | LkIn
    | LookupIn
    | LseekIn
    | MkdirIn
    | MknodIn
    | NotifyReplyIn
    | OpenIn
    | PollIn
    | ReadIn
    | ReleaseIn
    | RemoveMappingIn
    | RemovexattrIn
    | Rename2In
    | RenameIn
    | RmdirIn
    | SetattrIn
    | SetupMappingIn
    | SetxattrIn
    | StatxIn
    | SymlinkIn
    | SyncfsIn
    | UnknownIn
    | UnlinkIn
    | WriteIn
)

Decoder: TypeAlias = Callable[[Buffer, int], Request]
"""Takes a whole request and where its body ends; the body begins after the header."""

_Encoder: TypeAlias = Callable[[tuple[Any, ...]], bytes]


class _Codec(NamedTuple):
    decode: Decoder
    encode: _Encoder


_Tuple = TypeVar("_Tuple", bound=tuple[Any, ...])


def _maker(kind: type[_Tuple]) -> Callable[[Iterable[Any]], _Tuple]:
    """`kind._make` without its Python: a third of the time that decoding a request takes."""
    return cast(Callable[[Iterable[Any]], _Tuple], partial(tuple.__new__, kind))


_header = _maker(Header)
_lookup = _maker(LookupIn)
_write = _maker(WriteIn)
_forgotten = _maker(Forgotten)

_HEADER = Struct("=IIQQIIIHxx")
HEADER_SIZE = _HEADER.size
"""Bytes of the header of a request."""

# One number each for what bodies are made of; all precompiled, `x` where the kernel has padding.
_U64 = Struct("=Q")
_COUNT = Struct("=I4x")
_PAIR = Struct("=QQ")
_WRITE_IN = Struct("=QQIIQI4x")
_SETXATTR_SHORT = Struct("=II")
_SETXATTR_LONG = Struct("=III4x")
_INIT_IN_OLD = Struct("=IIII")
_INIT_IN = Struct("=IIIII44x")
_IOCTL_IN = Struct("=QIIQII")
_RETRIEVE_IN = Struct("=8xQI20x")


def decode_header(buffer: Buffer) -> Header:
    """The header of the request that fills `buffer`, which must have the length that it says."""
    if len(buffer) < HEADER_SIZE:
        raise Malformed(0, f"{len(buffer)} bytes are no header")
    header = _header(_HEADER.unpack_from(buffer))
    if header[0] != len(buffer):
        reason = f"says that it has {header.length} bytes, has {len(buffer)}"
        raise Malformed(header.opcode, reason, header.unique)
    if header.extensions:
        header = header._replace(extensions=header.extensions * 8)
        if header.extensions > header.length - HEADER_SIZE:
            reason = f"{header.extensions} bytes of extensions in a request of {header.length}"
            raise Malformed(header.opcode, reason, header.unique)
    return header


def opcode_of(buffer: Buffer) -> int:
    """The opcode alone, of a request that is whole."""
    return int(_U32.unpack_from(buffer, 4)[0])


def decode(buffer: Buffer, table: Mapping[int, Decoder] | None = None) -> tuple[Header, Request]:
    """The request that fills `buffer`. `table`: what `decoders` made for what was negotiated."""
    header = decode_header(buffer)
    decoder = (DECODERS if table is None else table).get(header.opcode)
    if decoder is None:
        return header, UnknownIn(bytes(buffer[HEADER_SIZE:]))
    try:
        return header, decoder(buffer, header.length - header.extensions)
    except Malformed as bad:
        bad.unique = header.unique
        raise


def encode_request(
    opcode: int,
    body: Request,
    *,
    unique: int = 2,
    node: int = ROOT,
    uid: int = 0,
    gid: int = 0,
    pid: int = 0,
    extensions: bytes = b"",
    negotiated: int = 0,
) -> bytes:
    """A request as the kernel would send it. The inverse of `decode`."""
    if isinstance(body, UnknownIn):
        data = body.data
    elif opcode == Opcode.SETXATTR and negotiated & Capability.SETXATTR_EXT:
        data = _SETXATTR_EXT.encode(body)
    else:
        data = _CODECS[Opcode(opcode)].encode(body)
    length = HEADER_SIZE + len(data) + len(extensions)
    return _HEADER.pack(length, opcode, unique, node, uid, gid, pid, len(extensions) // 8) + data + extensions


def _wrong_size(opcode: Opcode, size: int, end: int) -> Malformed:
    return Malformed(opcode, f"has a body of {end - HEADER_SIZE} bytes instead of {size}")


def _need(opcode: Opcode, layout: Struct, end: int) -> int:
    """Where what follows a structure begins; that it is there is certain then."""
    begin = HEADER_SIZE + layout.size
    if end < begin:
        raise Malformed(opcode, f"has a body of {end - HEADER_SIZE} bytes, less than {layout.size}")
    return begin


_SLASH = ord("/")  # looking for a number in bytes is several times faster than for bytes


def _checked_name(opcode: Opcode, name: bytes) -> bytes:
    if not name:
        raise Malformed(opcode, "an empty name")
    if len(name) > NAME_MAX:
        raise Malformed(opcode, f"a name of {len(name)} bytes")
    if _SLASH in name:
        raise Malformed(opcode, "a name with a slash")
    if 0 in name:
        raise Malformed(opcode, "a name with a NUL in it")
    return name


def _checked_text(opcode: Opcode, text: bytes) -> bytes:
    """A link's target or an xattr's name: as a name, but slashes are welcome."""
    _checked_name(opcode, text.replace(b"/", b"-"))
    return text


def _fixed(opcode: Opcode, kind: type[Request], layout: str) -> _Codec:
    """A body that is one structure."""
    struct = Struct(layout)
    make, unpack, whole = _maker(kind), struct.unpack_from, HEADER_SIZE + struct.size

    def decode_fixed(buffer: Buffer, end: int) -> Request:
        if end != whole:
            raise _wrong_size(opcode, struct.size, end)
        return make(unpack(buffer, HEADER_SIZE))

    return _Codec(decode_fixed, lambda body: struct.pack(*body))


_Check: TypeAlias = Callable[[Opcode, bytes], bytes]


def _named(
    opcode: Opcode, kind: type[Request], layout: str = "=", checks: Sequence[_Check] = (_checked_name,)
) -> _Codec:
    """A body of one structure, maybe empty, and one or more strings that NUL ends."""
    struct, make = Struct(layout), _maker(kind)

    def decode_named(buffer: Buffer, end: int) -> Request:
        begin = _need(opcode, struct, end)
        parts = bytes(buffer[begin:end]).split(b"\0", len(checks))
        if len(parts) != len(checks) + 1:
            raise Malformed(opcode, "a name without a NUL at its end")
        if parts[-1]:
            raise Malformed(opcode, f"{len(parts[-1])} bytes after the last name")
        names = [check(opcode, part) for check, part in zip(checks, parts, strict=False)]
        return make((*struct.unpack_from(buffer, HEADER_SIZE), *names))

    def encode_named(body: tuple[Any, ...]) -> bytes:
        names = body[-len(checks) :]
        return struct.pack(*body[: -len(checks)]) + b"".join(name + b"\0" for name in names)

    return _Codec(decode_named, encode_named)


def _decode_lookup(buffer: Buffer, end: int) -> LookupIn:
    # The most frequent of all, so without the generality of `_named`.
    name = bytes(buffer[HEADER_SIZE : end - 1])
    if end == HEADER_SIZE or buffer[end - 1]:
        raise Malformed(Opcode.LOOKUP, "a name without a NUL at its end")
    if not name or _SLASH in name or 0 in name or len(name) > NAME_MAX:
        _checked_name(Opcode.LOOKUP, name)
    return _lookup((name,))


def _decode_batch_forget(buffer: Buffer, end: int) -> BatchForgetIn:
    begin = _need(Opcode.BATCH_FORGET, _COUNT, end)
    (count,) = _COUNT.unpack_from(buffer, HEADER_SIZE)
    if end - begin != count * _PAIR.size:
        raise Malformed(Opcode.BATCH_FORGET, f"{end - begin} bytes for {count} nodes")
    pairs = _PAIR.iter_unpack(memoryview(buffer)[begin:end])
    return BatchForgetIn(tuple(map(_forgotten, pairs)))


def _encode_batch_forget(body: tuple[Any, ...]) -> bytes:
    (nodes,) = body
    return _COUNT.pack(len(nodes)) + b"".join(_PAIR.pack(*node) for node in nodes)


def _decode_write(buffer: Buffer, end: int) -> WriteIn:
    begin = _need(Opcode.WRITE, _WRITE_IN, end)
    fh, offset, size, write_flags, lock_owner, flags = _WRITE_IN.unpack_from(buffer, HEADER_SIZE)
    if end - begin != size:
        raise Malformed(Opcode.WRITE, f"{end - begin} bytes of data, says {size}")
    return _write((fh, offset, write_flags, lock_owner, flags, memoryview(buffer)[begin:end]))


def _encode_write(body: tuple[Any, ...]) -> bytes:
    fh, offset, write_flags, lock_owner, flags, data = body
    return b"".join((_WRITE_IN.pack(fh, offset, len(data), write_flags, lock_owner, flags), data))


def _setxattr(layout: Struct) -> _Codec:
    def decode_setxattr(buffer: Buffer, end: int) -> SetxattrIn:
        begin = _need(Opcode.SETXATTR, layout, end)
        size, *flags = layout.unpack_from(buffer, HEADER_SIZE)
        name, nul, value = bytes(buffer[begin:end]).partition(b"\0")
        if not nul:
            raise Malformed(Opcode.SETXATTR, "a name without a NUL at its end")
        if len(value) != size:
            raise Malformed(Opcode.SETXATTR, f"a value of {len(value)} bytes, says {size}")
        return SetxattrIn(flags[0], flags[1] if flags[1:] else 0, _checked_text(Opcode.SETXATTR, name), value)

    def encode_setxattr(body: tuple[Any, ...]) -> bytes:
        flags, setxattr_flags, name, value = body
        long = (setxattr_flags,) if layout is _SETXATTR_LONG else ()
        return b"".join((layout.pack(len(value), flags, *long), name, b"\0", value))

    return _Codec(decode_setxattr, encode_setxattr)


def _decode_init(buffer: Buffer, end: int) -> InitIn:
    # The one body that may be shorter or longer than we know it: it comes before there is a common
    # version, and the kernel has made it longer before (7.36).
    _need(Opcode.INIT, _INIT_IN_OLD, end)
    major, minor, max_readahead, flags = _INIT_IN_OLD.unpack_from(buffer, HEADER_SIZE)
    if flags & _INIT_EXT:
        _need(Opcode.INIT, _INIT_IN, end)
        flags |= _INIT_IN.unpack_from(buffer, HEADER_SIZE)[4] << 32
    return InitIn(major, minor, max_readahead, flags)


def _encode_init(body: tuple[Any, ...]) -> bytes:
    major, minor, max_readahead, capabilities = body
    return _INIT_IN.pack(major, minor, max_readahead, capabilities & _LOW, capabilities >> 32)


def _decode_ioctl(buffer: Buffer, end: int) -> IoctlIn:
    begin = _need(Opcode.IOCTL, _IOCTL_IN, end)
    fh, flags, command, argument, size, out_size = _IOCTL_IN.unpack_from(buffer, HEADER_SIZE)
    if end - begin != size:
        raise Malformed(Opcode.IOCTL, f"{end - begin} bytes of data, says {size}")
    return IoctlIn(fh, flags, command, argument, out_size, bytes(buffer[begin:end]))


def _encode_ioctl(body: tuple[Any, ...]) -> bytes:
    fh, flags, command, argument, out_size, data = body
    return b"".join((_IOCTL_IN.pack(fh, flags, command, argument, len(data), out_size), data))


def _decode_notify_reply(buffer: Buffer, end: int) -> NotifyReplyIn:
    begin = _need(Opcode.NOTIFY_REPLY, _RETRIEVE_IN, end)
    offset, size = _RETRIEVE_IN.unpack_from(buffer, HEADER_SIZE)
    if end - begin != size:
        raise Malformed(Opcode.NOTIFY_REPLY, f"{end - begin} bytes of data, says {size}")
    return NotifyReplyIn(offset, bytes(buffer[begin:end]))


def _encode_notify_reply(body: tuple[Any, ...]) -> bytes:
    offset, data = body
    return b"".join((_RETRIEVE_IN.pack(offset, len(data)), data))


def _decode_remove_mapping(buffer: Buffer, end: int) -> RemoveMappingIn:
    # The count has no padding here, unlike BATCH_FORGET's.
    begin = _need(Opcode.REMOVEMAPPING, _U32, end)
    (count,) = _U32.unpack_from(buffer, HEADER_SIZE)
    if end - begin != count * _PAIR.size:
        raise Malformed(Opcode.REMOVEMAPPING, f"{end - begin} bytes for {count} mappings")
    pairs = _PAIR.iter_unpack(memoryview(buffer)[begin:end])
    return RemoveMappingIn(tuple(map(MappedRange._make, pairs)))


def _encode_remove_mapping(body: tuple[Any, ...]) -> bytes:
    (mappings,) = body
    return _U32.pack(len(mappings)) + b"".join(_PAIR.pack(*mapping) for mapping in mappings)


_LOW = 0xFFFF_FFFF
_INIT_EXT = int(Capability.INIT_EXT)
_SETXATTR_EXT = _setxattr(_SETXATTR_LONG)

_READ_IN = "=QQIIQI4x"
_OPEN_IN = "=II"
_RELEASE_IN = "=QIIQ"
_FSYNC_IN = "=QI4x"
_LK_IN = "=QQQQIII4x"
_CREATE_IN = "=IIII"
_COPY_IN = "=QQQQQQQ"
_TWO_NAMES = (_checked_name, _checked_name)

_CODECS: dict[Opcode, _Codec] = {
    Opcode.LOOKUP: _Codec(_decode_lookup, lambda body: bytes(body[0]) + b"\0"),
    Opcode.FORGET: _fixed(Opcode.FORGET, ForgetIn, "=Q"),
    Opcode.GETATTR: _fixed(Opcode.GETATTR, GetattrIn, "=I4xQ"),
    Opcode.SETATTR: _fixed(Opcode.SETATTR, SetattrIn, "=I4xQQQqqqIIII4xII4x"),
    Opcode.READLINK: _fixed(Opcode.READLINK, EmptyIn, "="),
    Opcode.SYMLINK: _named(Opcode.SYMLINK, SymlinkIn, checks=(_checked_name, _checked_text)),
    Opcode.MKNOD: _named(Opcode.MKNOD, MknodIn, "=III4x"),
    Opcode.MKDIR: _named(Opcode.MKDIR, MkdirIn, "=II"),
    Opcode.UNLINK: _named(Opcode.UNLINK, UnlinkIn),
    Opcode.RMDIR: _named(Opcode.RMDIR, RmdirIn),
    Opcode.RENAME: _named(Opcode.RENAME, RenameIn, "=Q", _TWO_NAMES),
    Opcode.LINK: _named(Opcode.LINK, LinkIn, "=Q"),
    Opcode.OPEN: _fixed(Opcode.OPEN, OpenIn, _OPEN_IN),
    Opcode.READ: _fixed(Opcode.READ, ReadIn, _READ_IN),
    Opcode.WRITE: _Codec(_decode_write, _encode_write),
    Opcode.STATFS: _fixed(Opcode.STATFS, EmptyIn, "="),
    Opcode.RELEASE: _fixed(Opcode.RELEASE, ReleaseIn, _RELEASE_IN),
    Opcode.FSYNC: _fixed(Opcode.FSYNC, FsyncIn, _FSYNC_IN),
    Opcode.SETXATTR: _setxattr(_SETXATTR_SHORT),
    Opcode.GETXATTR: _named(Opcode.GETXATTR, GetxattrIn, "=I4x", (_checked_text,)),
    Opcode.LISTXATTR: _fixed(Opcode.LISTXATTR, ListxattrIn, "=I4x"),
    Opcode.REMOVEXATTR: _named(Opcode.REMOVEXATTR, RemovexattrIn, checks=(_checked_text,)),
    Opcode.FLUSH: _fixed(Opcode.FLUSH, FlushIn, "=Q8xQ"),
    Opcode.INIT: _Codec(_decode_init, _encode_init),
    Opcode.OPENDIR: _fixed(Opcode.OPENDIR, OpenIn, _OPEN_IN),
    Opcode.READDIR: _fixed(Opcode.READDIR, ReadIn, _READ_IN),
    Opcode.RELEASEDIR: _fixed(Opcode.RELEASEDIR, ReleaseIn, _RELEASE_IN),
    Opcode.FSYNCDIR: _fixed(Opcode.FSYNCDIR, FsyncIn, _FSYNC_IN),
    Opcode.GETLK: _fixed(Opcode.GETLK, LkIn, _LK_IN),
    Opcode.SETLK: _fixed(Opcode.SETLK, LkIn, _LK_IN),
    Opcode.SETLKW: _fixed(Opcode.SETLKW, LkIn, _LK_IN),
    Opcode.ACCESS: _fixed(Opcode.ACCESS, AccessIn, "=I4x"),
    Opcode.CREATE: _named(Opcode.CREATE, CreateIn, _CREATE_IN),
    Opcode.INTERRUPT: _fixed(Opcode.INTERRUPT, InterruptIn, "=Q"),
    Opcode.BMAP: _fixed(Opcode.BMAP, BmapIn, "=QI4x"),
    Opcode.DESTROY: _fixed(Opcode.DESTROY, EmptyIn, "="),
    Opcode.IOCTL: _Codec(_decode_ioctl, _encode_ioctl),
    Opcode.POLL: _fixed(Opcode.POLL, PollIn, "=QQII"),
    Opcode.NOTIFY_REPLY: _Codec(_decode_notify_reply, _encode_notify_reply),
    Opcode.BATCH_FORGET: _Codec(_decode_batch_forget, _encode_batch_forget),
    Opcode.FALLOCATE: _fixed(Opcode.FALLOCATE, FallocateIn, "=QQQI4x"),
    Opcode.READDIRPLUS: _fixed(Opcode.READDIRPLUS, ReadIn, _READ_IN),
    Opcode.RENAME2: _named(Opcode.RENAME2, Rename2In, "=QI4x", _TWO_NAMES),
    Opcode.LSEEK: _fixed(Opcode.LSEEK, LseekIn, "=QQI4x"),
    Opcode.COPY_FILE_RANGE: _fixed(Opcode.COPY_FILE_RANGE, CopyFileRangeIn, _COPY_IN),
    Opcode.SETUPMAPPING: _fixed(Opcode.SETUPMAPPING, SetupMappingIn, "=QQQQQ"),
    Opcode.REMOVEMAPPING: _Codec(_decode_remove_mapping, _encode_remove_mapping),
    Opcode.SYNCFS: _fixed(Opcode.SYNCFS, SyncfsIn, "=8x"),
    Opcode.TMPFILE: _named(Opcode.TMPFILE, CreateIn, _CREATE_IN, (_checked_text,)),
    Opcode.STATX: _fixed(Opcode.STATX, StatxIn, "=I4xQII"),
    Opcode.COPY_FILE_RANGE_64: _fixed(Opcode.COPY_FILE_RANGE_64, CopyFileRangeIn, _COPY_IN),
}

DECODERS: Mapping[int, Decoder] = {int(opcode): codec.decode for opcode, codec in _CODECS.items()}
"""By opcode; for a mount that has not taken SETXATTR_EXT."""


def decoders(negotiated: int) -> Mapping[int, Decoder]:
    """The table for `decode` once the capabilities are agreed upon: they decide how long SETXATTR is."""
    if not negotiated & Capability.SETXATTR_EXT:
        return DECODERS
    return {**DECODERS, int(Opcode.SETXATTR): _SETXATTR_EXT.decode}


# ---- answers --------------------------------------------------------------------------------------

_OUT = Struct("=IiQ")
OUT_HEADER_SIZE = _OUT.size
"""Bytes of the header of an answer or a notification."""


def reply(unique: int, *parts: Buffer) -> list[Buffer]:
    """The answer to a request, as `os.writev` takes it; `parts` are not copied."""
    length = OUT_HEADER_SIZE
    for part in parts:
        length += len(part)
    return [_OUT.pack(length, 0, unique), *parts]


def error(unique: int, errno: int) -> list[Buffer]:
    """The answer that something failed. `errno` is positive, as in the module `errno`."""
    if not 0 < errno <= ERRNO_MAX:
        raise ValueError(f"{errno} is no errno: the kernel refuses it, and the caller waits for ever")
    return [_OUT.pack(OUT_HEADER_SIZE, -errno, unique)]


class Reply(NamedTuple):
    """What a server wrote: an answer, or with `unique` 0 a notification, whose code is in `error`."""

    unique: int
    error: int
    data: bytes


def decode_reply(buffer: Buffer) -> Reply:
    """The kernel's side of `reply`, `error` and the notifications."""
    if len(buffer) < OUT_HEADER_SIZE:
        raise Malformed(0, f"{len(buffer)} bytes are no answer")
    length, negative, unique = _OUT.unpack_from(buffer)
    if length != len(buffer):
        raise Malformed(0, f"an answer says that it has {length} bytes, has {len(buffer)}", unique)
    if unique == 0:
        return Reply(0, negative, bytes(buffer[OUT_HEADER_SIZE:]))
    if not -ERRNO_MAX <= negative <= 0 or (negative and length != OUT_HEADER_SIZE):
        raise Malformed(0, f"an answer of errno {-negative} and {length} bytes", unique)
    return Reply(unique, -negative, bytes(buffer[OUT_HEADER_SIZE:]))


class Attr(NamedTuple):
    """A node as stat(2) shows it, in the order of the wire. `attr` makes one by name."""

    ino: int
    size: int
    blocks: int
    atime: int
    mtime: int
    ctime: int
    atime_nsec: int
    mtime_nsec: int
    ctime_nsec: int
    mode: int
    nlink: int
    uid: int
    gid: int
    rdev: int
    blksize: int
    flags: int


def attr(
    ino: int,
    mode: int,
    *,
    size: int = 0,
    blocks: int = 0,
    nlink: int = 1,
    uid: int = 0,
    gid: int = 0,
    atime_ns: int = 0,
    mtime_ns: int = 0,
    ctime_ns: int = 0,
    rdev: int = 0,
    blksize: int = 0,
    flags: int = 0,
) -> Attr:
    """An `Attr`, its times in nanoseconds since 1970. `blocks` of 512 bytes; `blksize` 0: the mount's."""
    atime, atime_nsec = divmod(atime_ns, 1_000_000_000)
    mtime, mtime_nsec = divmod(mtime_ns, 1_000_000_000)
    ctime, ctime_nsec = divmod(ctime_ns, 1_000_000_000)
    return Attr(
        ino, size, blocks, atime, mtime, ctime, atime_nsec, mtime_nsec, ctime_nsec,
        mode, nlink, uid, gid, rdev, blksize, flags,
    )  # fmt: skip


_ATTR_FIELDS = "QQQqqqIIIIIIIIII"  # seconds are signed: times before 1970
_ENTRY_FIELDS = "QQQQII" + _ATTR_FIELDS
_OPEN_FIELDS = "QIi"
_DIRENT_FIELDS = "QQII"

_ATTR = Struct("=" + _ATTR_FIELDS)
_ENTRY = Struct("=" + _ENTRY_FIELDS)
_ATTR_OUT = Struct("=QI4x" + _ATTR_FIELDS)
_OPEN_OUT = Struct("=" + _OPEN_FIELDS)
_CREATE_OUT = Struct("=" + _ENTRY_FIELDS + _OPEN_FIELDS)
_DIRENT = Struct("=" + _DIRENT_FIELDS)
_STATFS_OUT = Struct("=QQQQQIII28x")
_INIT_OUT = Struct("=IIIIHHIIHHIIH22x")
_LK_OUT = Struct("=QQII")
_IOCTL_OUT = Struct("=iIII")
_STATX_OUT = Struct("=QII16x" + "IIQIIIH2xQQQQ" + "qI4x" * 4 + "IIII112x")

ENTRY_SIZE = _ENTRY.size
DIRENT_SIZE = _DIRENT.size


def _split(timeout: float) -> tuple[int, int]:
    """Seconds and nanoseconds of a timeout. Less than none is none."""
    if timeout >= FOREVER:
        return FOREVER, 0
    if timeout <= 0:
        return 0, 0
    return divmod(int(timeout * 1e9), 1_000_000_000)


def _unpacked(what: str, layout: Struct, buffer: Buffer) -> tuple[Any, ...]:
    """An answer that is one structure."""
    if len(buffer) != layout.size:
        raise Malformed(0, f"{what} of {len(buffer)} bytes instead of {layout.size}")
    return layout.unpack(buffer)


class EntryOut(NamedTuple):
    """The answer to LOOKUP and to whatever makes a name. `node` 0, in LOOKUP: no such name, for so long."""

    node: int
    generation: int
    entry_timeout: float
    attr_timeout: float
    attr: Attr


def encode_entry(
    node: int, attr: Attr, entry_timeout: float = 0.0, attr_timeout: float = 0.0, generation: int = 0
) -> bytes:
    """An `EntryOut`; also what READDIRPLUS has before each name. Timeouts in seconds, ∞ included."""
    entry, entry_nsec = _split(entry_timeout)
    believed, believed_nsec = _split(attr_timeout)
    return _ENTRY.pack(node, generation, entry, believed, entry_nsec, believed_nsec, *attr)


NO_ATTR = Attr(*(0,) * len(Attr._fields))


def encode_negative(entry_timeout: float) -> bytes:
    """The answer to LOOKUP that lets the kernel remember for a while that there is no such name."""
    return encode_entry(0, NO_ATTR, entry_timeout)


def _entry_out(fields: Sequence[Any]) -> EntryOut:
    node, generation, entry, believed, entry_nsec, believed_nsec = fields[:6]
    return EntryOut(
        node, generation, entry + entry_nsec / 1e9, believed + believed_nsec / 1e9, Attr._make(fields[6:])
    )


def decode_entry(buffer: Buffer) -> EntryOut:
    """The inverse of `encode_entry`."""
    return _entry_out(_unpacked("an entry", _ENTRY, buffer))


def encode_attr(attr: Attr) -> bytes:
    """The bare structure, as it stands inside others."""
    return _ATTR.pack(*attr)


def decode_attr(buffer: Buffer) -> Attr:
    """The inverse of `encode_attr`."""
    return Attr._make(_unpacked("an attr", _ATTR, buffer))


class AttrOut(NamedTuple):
    """The answer to GETATTR and SETATTR."""

    timeout: float
    attr: Attr


def encode_attr_out(attr: Attr, timeout: float = 0.0) -> bytes:
    """An `AttrOut`."""
    seconds, nanoseconds = _split(timeout)
    return _ATTR_OUT.pack(seconds, nanoseconds, *attr)


def decode_attr_out(buffer: Buffer) -> AttrOut:
    """The inverse of `encode_attr_out`."""
    seconds, nanoseconds, *fields = _unpacked("an attr_out", _ATTR_OUT, buffer)
    return AttrOut(seconds + nanoseconds / 1e9, Attr._make(fields))


class OpenOut(NamedTuple):
    """The answer to OPEN and OPENDIR. `backing_id` counts with OpenFlag.PASSTHROUGH."""

    fh: int
    flags: int
    backing_id: int


def encode_open_out(fh: int, flags: int = 0, backing_id: int = 0) -> bytes:
    """An `OpenOut`."""
    return _OPEN_OUT.pack(fh, flags, backing_id)


def handle_of(answer: Buffer) -> int:
    """The handle that an answer to OPEN, OPENDIR or CREATE gives: an `OpenOut` ends it."""
    handle, *_ = _OPEN_OUT.unpack(bytes(answer)[-_OPEN_OUT.size :])
    return int(handle)


def decode_open_out(buffer: Buffer) -> OpenOut:
    """The inverse of `encode_open_out`."""
    return OpenOut._make(_unpacked("an open_out", _OPEN_OUT, buffer))


class CreateOut(NamedTuple):
    """The answer to CREATE and TMPFILE."""

    entry: EntryOut
    open: OpenOut


def encode_create_out(entry: bytes, fh: int, flags: int = 0, backing_id: int = 0) -> bytes:
    """A `CreateOut`: what `encode_entry` made, and the open file."""
    return entry + _OPEN_OUT.pack(fh, flags, backing_id)


def decode_create_out(buffer: Buffer) -> CreateOut:
    """The inverse of `encode_create_out`."""
    fields = _unpacked("a create_out", _CREATE_OUT, buffer)
    return CreateOut(_entry_out(fields[:-3]), OpenOut._make(fields[-3:]))


def encode_write_out(size: int) -> bytes:
    """How many bytes were written, or copied by COPY_FILE_RANGE."""
    return _COUNT.pack(size)


def decode_write_out(buffer: Buffer) -> int:
    """The inverse of `encode_write_out`."""
    return int(_unpacked("a write_out", _COUNT, buffer)[0])


def encode_copy_file_range_out(size: int) -> bytes:
    """How many bytes COPY_FILE_RANGE_64 copied."""
    return _U64.pack(size)


def decode_copy_file_range_out(buffer: Buffer) -> int:
    """The inverse of `encode_copy_file_range_out`."""
    return int(_unpacked("a copy_file_range_out", _U64, buffer)[0])


def encode_getxattr_out(size: int) -> bytes:
    """How long the value (or list of names) is, for a GETXATTR or LISTXATTR of size 0."""
    return _COUNT.pack(size)


def decode_getxattr_out(buffer: Buffer) -> int:
    """The inverse of `encode_getxattr_out`."""
    return int(_unpacked("a getxattr_out", _COUNT, buffer)[0])


def encode_lseek_out(offset: int) -> bytes:
    """Where the data or the hole is."""
    return _U64.pack(offset)


def decode_lseek_out(buffer: Buffer) -> int:
    """The inverse of `encode_lseek_out`."""
    return int(_unpacked("an lseek_out", _U64, buffer)[0])


def encode_bmap_out(block: int) -> bytes:
    """The block of the device."""
    return _U64.pack(block)


def decode_bmap_out(buffer: Buffer) -> int:
    """The inverse of `encode_bmap_out`."""
    return int(_unpacked("a bmap_out", _U64, buffer)[0])


def encode_poll_out(events: int) -> bytes:
    """Which of the polled events are there."""
    return _COUNT.pack(events)


def decode_poll_out(buffer: Buffer) -> int:
    """The inverse of `encode_poll_out`."""
    return int(_unpacked("a poll_out", _COUNT, buffer)[0])


class StatfsOut(NamedTuple):
    """The answer to STATFS; blocks are of `frsize` bytes."""

    blocks: int
    bfree: int
    bavail: int
    files: int
    ffree: int
    bsize: int
    namelen: int
    frsize: int


def encode_statfs_out(statfs: StatfsOut) -> bytes:
    """The answer to STATFS."""
    return _STATFS_OUT.pack(*statfs)


def decode_statfs_out(buffer: Buffer) -> StatfsOut:
    """The inverse of `encode_statfs_out`."""
    return StatfsOut._make(_unpacked("a statfs_out", _STATFS_OUT, buffer))


class LkOut(NamedTuple):
    """The answer to GETLK: the lock that is in the way; type F_UNLCK: none."""

    start: int
    end: int
    type: int
    pid: int


def encode_lk_out(lock: LkOut) -> bytes:
    """The answer to GETLK."""
    return _LK_OUT.pack(*lock)


def decode_lk_out(buffer: Buffer) -> LkOut:
    """The inverse of `encode_lk_out`."""
    return LkOut._make(_unpacked("an lk_out", _LK_OUT, buffer))


class IoctlOut(NamedTuple):
    """The answer to IOCTL, before its data."""

    result: int
    flags: int
    in_iovs: int
    out_iovs: int


def encode_ioctl_out(out: IoctlOut) -> bytes:
    """The answer to IOCTL, before its data."""
    return _IOCTL_OUT.pack(*out)


def decode_ioctl_out(buffer: Buffer) -> IoctlOut:
    """The inverse of `encode_ioctl_out`, of the structure alone."""
    return IoctlOut._make(_unpacked("an ioctl_out", _IOCTL_OUT, buffer))


class StatxOut(NamedTuple):
    """The answer to STATX. `mask` says which fields count; times are seconds and nanoseconds."""

    timeout: float
    mask: int
    blksize: int
    attributes: int
    nlink: int
    uid: int
    gid: int
    mode: int
    ino: int
    size: int
    blocks: int
    attributes_mask: int
    atime: int
    atime_nsec: int
    btime: int
    btime_nsec: int
    ctime: int
    ctime_nsec: int
    mtime: int
    mtime_nsec: int
    rdev_major: int
    rdev_minor: int
    dev_major: int
    dev_minor: int


def encode_statx_out(out: StatxOut) -> bytes:
    """The answer to STATX."""
    seconds, nanoseconds = _split(out.timeout)
    return _STATX_OUT.pack(seconds, nanoseconds, 0, *out[1:])


def decode_statx_out(buffer: Buffer) -> StatxOut:
    """The inverse of `encode_statx_out`."""
    seconds, nanoseconds, _flags, *fields = _unpacked("a statx_out", _STATX_OUT, buffer)
    return StatxOut(seconds + nanoseconds / 1e9, *fields)


class InitOut(NamedTuple):
    """What the server takes of what INIT offered."""

    minor: int
    """The smaller of both sides' minors."""
    max_readahead: int
    """Bytes. The kernel offers what its bdi has, and only ever lowers that."""
    capabilities: int
    max_write: int
    """Bytes of the largest WRITE."""
    max_background: int = 0
    """Requests in flight that nobody waits for (readahead, asynchronous I/O). 0: the kernel's 12."""
    congestion_threshold: int = 0
    """So many of those make the mount look busy. 0: the kernel's 9, whatever `max_background` is."""
    time_gran: int = 1
    """Nanoseconds: what the times are multiples of."""
    max_pages: int = 0
    """Pages of the largest request, READ too; needs MAX_PAGES, and is cut to `fs.fuse.max_pages_limit`."""
    map_alignment: int = 0
    max_stack_depth: int = 0
    """With PASSTHROUGH: 1 for backing files on plain file systems, 2 for such on overlayfs too."""
    request_timeout: int = 0
    """Seconds; needs REQUEST_TIMEOUT."""
    major: int = MAJOR


def encode_init_out(out: InitOut) -> bytes:
    """The answer to INIT."""
    if out.capabilities >> 32 and not out.capabilities & _INIT_EXT:
        raise ValueError("without INIT_EXT the kernel does not look at the upper half of the capabilities")
    return _INIT_OUT.pack(
        out.major,
        out.minor,
        out.max_readahead,
        out.capabilities & _LOW,
        out.max_background,
        out.congestion_threshold,
        out.max_write,
        out.time_gran,
        out.max_pages,
        out.map_alignment,
        out.capabilities >> 32,
        out.max_stack_depth,
        out.request_timeout,
    )


def decode_init_out(buffer: Buffer) -> InitOut:
    """The inverse of `encode_init_out`."""
    (
        major,
        minor,
        max_readahead,
        flags,
        max_background,
        congestion_threshold,
        max_write,
        time_gran,
        max_pages,
        map_alignment,
        flags2,
        max_stack_depth,
        request_timeout,
    ) = _unpacked("an init_out", _INIT_OUT, buffer)
    return InitOut(
        minor,
        max_readahead,
        flags | flags2 << 32 if flags & _INIT_EXT else flags,
        max_write,
        max_background,
        congestion_threshold,
        time_gran,
        max_pages,
        map_alignment,
        max_stack_depth,
        request_timeout,
        major,
    )


# ---- directories ----------------------------------------------------------------------------------

_PADDING = tuple(bytes(-length % 8) for length in range(8))
"""What makes a name of a length (its last three bits) end on a multiple of 8."""


class Dirent(NamedTuple):
    """One name of a directory."""

    ino: int
    offset: int
    """Where a reader goes on after it."""
    type: int
    """DT_…: the mode's upper bits, `mode >> 12`."""
    name: bytes


class DirentPlus(NamedTuple):
    """One name of a directory with its LOOKUP. `entry.node` 0: only the name, nothing is counted."""

    entry: EntryOut
    dirent: Dirent


def add_dirent(into: bytearray, limit: int, ino: int, offset: int, type: int, name: bytes) -> bool:
    """Append a name to the answer to READDIR; False, and nothing appended, where that exceeds `limit`."""
    length = len(name)
    if len(into) + DIRENT_SIZE + length + (-length & 7) > limit:
        return False
    into += _DIRENT.pack(ino, offset, length, type) + name + _PADDING[length & 7]
    return True


def add_direntplus(
    into: bytearray, limit: int, entry: bytes, ino: int, offset: int, type: int, name: bytes
) -> bool:
    """Append a name, and what `encode_entry` made of it, to the answer to READDIRPLUS, if it fits.

    Whatever of it the kernel gets counts as a LOOKUP ("." and ".." do not).
    """
    length = len(name)
    if len(into) + ENTRY_SIZE + DIRENT_SIZE + length + (-length & 7) > limit:
        return False
    into += entry + _DIRENT.pack(ino, offset, length, type) + name + _PADDING[length & 7]
    return True


def _decode_dirent(buffer: Buffer, begin: int) -> tuple[Dirent, int]:
    """A dirent, and where the next begins."""
    if begin + DIRENT_SIZE > len(buffer):
        raise Malformed(0, f"{len(buffer) - begin} bytes are no dirent")
    ino, offset, length, kind = _DIRENT.unpack_from(buffer, begin)
    begin += DIRENT_SIZE
    after = begin + length + (-length & 7)
    if not length or after > len(buffer):
        raise Malformed(0, f"a dirent with a name of {length} bytes, {len(buffer) - begin} are left")
    return Dirent(ino, offset, kind, bytes(buffer[begin : begin + length])), after


def decode_dirents(buffer: Buffer) -> list[Dirent]:
    """The inverse of `add_dirent`: a whole answer to READDIR."""
    found, begin = [], 0
    while begin < len(buffer):
        dirent, begin = _decode_dirent(buffer, begin)
        found.append(dirent)
    return found


def decode_direntplus(buffer: Buffer) -> list[DirentPlus]:
    """The inverse of `add_direntplus`: a whole answer to READDIRPLUS."""
    found, begin = [], 0
    while begin < len(buffer):
        entry = decode_entry(buffer[begin : begin + ENTRY_SIZE])
        dirent, begin = _decode_dirent(buffer, begin + ENTRY_SIZE)
        found.append(DirentPlus(entry, dirent))
    return found


# ---- notifications --------------------------------------------------------------------------------
#
# Each is written by itself, with os.write. The write fails with ENOENT where the kernel knows no such
# node or name: it has nothing to forget then. It may wait for locks that a request holds: never notify
# about a directory from the thread that is answering a request in it.

_INVAL_INODE = Struct("=Qqq")
_INVAL_ENTRY = Struct("=QII")
_DELETE = Struct("=QQI4x")
_STORE = Struct("=QQI4x")
_RETRIEVE = Struct("=QQQI4x")
_PRUNE = Struct("=I12x")


def _notification(code: Notify, *parts: Buffer) -> bytes:
    body = b"".join(parts)
    return _OUT.pack(OUT_HEADER_SIZE + len(body), code, 0) + body


def notify_poll(handle: int) -> bytes:
    """Something is there for who polls `handle` (PollIn)."""
    return _notification(Notify.POLL, _U64.pack(handle))


def notify_inval_inode(node: int, offset: int = 0, length: int = 0) -> bytes:
    """Forget a node's attributes and its pages in a range; length 0: to the end; offset < 0: no pages."""
    return _notification(Notify.INVAL_INODE, _INVAL_INODE.pack(node, offset, length))


def notify_inval_entry(parent: int, name: bytes, flags: int = 0) -> bytes:
    """Forget a name, also that there is none; `InvalEntryFlag.EXPIRE_ONLY`: only ask again."""
    return _notification(Notify.INVAL_ENTRY, _INVAL_ENTRY.pack(parent, len(name), flags), name, b"\0")


def notify_delete(parent: int, child: int, name: bytes) -> bytes:
    """The name of this node is gone: as after an unlink by the kernel itself, inotify included."""
    return _notification(Notify.DELETE, _DELETE.pack(parent, child, len(name)), name, b"\0")


def notify_store(node: int, offset: int, data: Buffer) -> bytes:
    """Put data into the page cache of a node; grows the file where it goes beyond its end."""
    return _notification(Notify.STORE, _STORE.pack(node, offset, len(data)), data)


def notify_retrieve(unique: int, node: int, offset: int, size: int) -> bytes:
    """Ask for what the page cache has of a node; comes as NOTIFY_REPLY with this `unique`."""
    return _notification(Notify.RETRIEVE, _RETRIEVE.pack(unique, node, offset, size))


def notify_resend() -> bytes:
    """Send all again that was read and not answered, with RESENT in `unique`."""
    return _notification(Notify.RESEND)


def notify_inc_epoch() -> bytes:
    """All names the kernel knows are looked up again when used. 7.44."""
    return _notification(Notify.INC_EPOCH)


def notify_prune(nodes: Sequence[int]) -> bytes:
    """Let go of these nodes where nobody uses them: their FORGET follows. 7.45."""
    return _notification(Notify.PRUNE, _PRUNE.pack(len(nodes)), *map(_U64.pack, nodes))


class PollWakeup(NamedTuple):
    handle: int


class InvalInode(NamedTuple):
    node: int
    offset: int
    length: int


class InvalEntry(NamedTuple):
    parent: int
    name: bytes
    flags: int


class Delete(NamedTuple):
    parent: int
    child: int
    name: bytes


class Store(NamedTuple):
    node: int
    offset: int
    data: bytes


class Retrieve(NamedTuple):
    unique: int
    node: int
    offset: int
    size: int


class Resend(NamedTuple):
    """All again, please."""


class IncEpoch(NamedTuple):
    """All names are to be looked up again."""


class Prune(NamedTuple):
    nodes: tuple[int, ...]


Notification: TypeAlias = (
    PollWakeup | InvalInode | InvalEntry | Delete | Store | Retrieve | Resend | IncEpoch | Prune
)


def decode_notification(written: Reply) -> Notification:
    """The kernel's side of the notifications: what `decode_reply` made of one."""
    code, data = written.error, written.data
    if code == Notify.POLL:
        return PollWakeup(*_unpacked("a poll notification", _U64, data))
    if code == Notify.INVAL_INODE:
        return InvalInode(*_unpacked("an inval_inode notification", _INVAL_INODE, data))
    if code == Notify.INVAL_ENTRY:
        (parent, length, flags), tail = _headed("an inval_entry notification", _INVAL_ENTRY, data)
        return InvalEntry(parent, _notified_name(length, tail), flags)
    if code == Notify.DELETE:
        (parent, child, length), tail = _headed("a delete notification", _DELETE, data)
        return Delete(parent, child, _notified_name(length, tail))
    if code == Notify.STORE:
        (node, offset, size), tail = _headed("a store notification", _STORE, data)
        if len(tail) != size:
            raise Malformed(0, f"a store notification with {len(tail)} bytes, says {size}")
        return Store(node, offset, tail)
    if code == Notify.RETRIEVE:
        return Retrieve(*_unpacked("a retrieve notification", _RETRIEVE, data))
    if code == Notify.PRUNE:
        (count,), tail = _headed("a prune notification", _PRUNE, data)
        if len(tail) != count * _U64.size:
            raise Malformed(0, f"a prune notification of {len(tail)} bytes for {count} nodes")
        return Prune(tuple(node for (node,) in _U64.iter_unpack(tail)))
    if data or code not in (Notify.RESEND, Notify.INC_EPOCH):
        raise Malformed(0, f"a notification of code {code} with {len(data)} bytes")
    return Resend() if code == Notify.RESEND else IncEpoch()


def _headed(what: str, layout: Struct, data: bytes) -> tuple[tuple[Any, ...], bytes]:
    """A structure and what follows it."""
    if len(data) < layout.size:
        raise Malformed(0, f"{what} of {len(data)} bytes")
    return layout.unpack_from(data), data[layout.size :]


def _notified_name(length: int, tail: bytes) -> bytes:
    if len(tail) != length + 1 or tail[-1:] != b"\0" or not length:
        raise Malformed(0, f"a name of {length} bytes in {len(tail)}")
    return tail[:-1]
