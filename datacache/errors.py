"""
Every error that this project raises on purpose.

One tree, one table per border (errno in `fuse.filesystem`, exit code and one line in `cli.main`,
HTTP status in `cluster.server`). Messages name the thing, the cause and the next step, and never
hold a secret. The cause is always chained.

* DatacacheError
  x SettingError          a flag, variable, file or URI that is wrong; nothing was started
  x SourceError           the store, or the way to it
    + NotFound            no such object
    + Denied              the store refuses these credentials
      - CredentialsExpired   ... because they have run out; renewed and tried again
    + Archived            the object must be restored from an archive class before it can be read
    + VersionChanged      the store no longer has the version that was asked for
    + WrongBytes          the answer is not what was asked for: length, range, version or digest
    + Unavailable         network, 5xx, 429, stall: may pass by itself, so it is tried again
      - BreakerOpen       ... failed for so long that it is answered at once, until a probe succeeds
    + Unsupported         the store, or this client of it, cannot do this
    + Stopped             a put was given up because whoever asked for it said so
  x CacheError            a copy, or the place of copies; readers go on without it
    + TierFull            no room here: not an illness
    + TierBroken          the medium fails; the tier is set aside
    + Damaged             bytes that do not match their checksum; they are a miss from now on
    + Locked              another live process owns this cache directory, or landing zone
  x NamespaceError        the names of a data set
    + NoSuchPath
    + NotADirectory
    + IsADirectory
    + NoSuchSnapshot
    + SnapshotExists
    + PathExists          something has this name
    + NotEmpty            a directory that still holds something
    + NotHere             no writing here: above the mount points, or under a name that no key can have
    + OtherStore          a rename from one mount point to another
    + TooManyAttributes   more extended attributes than a path may have
  x LandingError          the landing zone of what is written
    + LandingFull         no room for what is to be written: nothing was dropped
    + LandingBroken       its medium or its journal fails; what it acknowledged is still owed
  x IndexBroken           the database of names fails: I/O error, damage
    + IndexFull           ... or its disk has no room for what is new
  x MountError            the kernel, the mount point, or the way to it
  x ControlError          a running mount that cannot be reached, or refuses
  x VolumeError           a volume of Kubernetes, or a call for one
    + NoSuchVolume        there is none of this name, or not at this place
    + VolumeDiffers       it is there already, but not as it is asked for
    + VolumeBusy          another call for the same volume is under way
    + VolumeInUse         somebody still needs what was to be taken away
    + NotStaged           what has to come before has not
    + TookTooLong         the time that the caller gave was over
  x ClusterError          the API of Kubernetes: it refuses, or does not answer
    + Conflicting         somebody else has changed, or made, the object meanwhile
"""

import shlex


class DatacacheError(Exception):
    """Base of all errors of this project. `str()` of it is one line that a user can act on."""


class SettingError(DatacacheError):
    """A setting that cannot be used.

    `name` is the flag, key or variable as the user wrote it, `value` what was given (never a
    secret), `expected` what would be right. All three appear in the one line that is printed.
    """

    def __init__(self, name: str, value: object, expected: str) -> None:
        super().__init__(f"{name}: {value!r} will not do; expected {expected}")
        self.name, self.value, self.expected = name, value, expected


class SourceError(DatacacheError):
    """The store did not give what was asked for."""


class NotFound(SourceError):
    """There is no such object (or bucket) in the store."""


class Denied(SourceError):
    """The store refuses these credentials this operation."""


class CredentialsExpired(Denied):
    """The store says that the credentials have run out."""


class Archived(SourceError):
    """The object lies in an archive class and must be restored before it can be read."""


class VersionChanged(SourceError):
    """The store no longer has the version that was asked for."""


class WrongBytes(SourceError):
    """The answer differs in length, range, version or digest from what was asked for."""


class Unavailable(SourceError):
    """Network trouble, an overloaded store or a stalled request. Trying again may help.

    `retry_after` is the store's own wish in seconds, where it stated one.
    """

    def __init__(self, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class BreakerOpen(Unavailable):
    """The store failed for the whole of a bounded retry and is not asked again until a probe succeeds."""


class Unsupported(SourceError):
    """The store, or this client of it, cannot do what was asked."""


class Stopped(SourceError):
    """A put was given up by request of its caller; nothing of it is visible."""


class CacheError(DatacacheError):
    """A copy or its place failed. Never an answer to a reader: the read goes on elsewhere."""


class TierFull(CacheError):
    """The tier is at its quota or at the reserve of its file system."""


class TierBroken(CacheError):
    """The tier's medium fails (EIO, read-only, deleted underneath); it is set aside."""


class Damaged(CacheError):
    """Bytes of a copy do not match their checksum. They have been dropped: a miss."""


class Locked(CacheError):
    """Another live process owns this directory, which is a `what`."""

    def __init__(self, directory: str, *, pid: int, mount: str, what: str = "cache directory") -> None:
        where = f", mounted at {mount}" if mount else ""
        free = f"`datacache umount {shlex.quote(mount)}` first" if mount else "wait until that has ended"
        super().__init__(f"{what} {directory} is in use by process {pid}{where}; {free}, or take another one")
        self.directory, self.pid, self.mount = directory, pid, mount


class NamespaceError(DatacacheError):
    """A name that is not what the caller took it for."""


class NoSuchPath(NamespaceError):
    """No object or directory has this path."""


class NotADirectory(NamespaceError):
    """The path names an object."""


class IsADirectory(NamespaceError):
    """The path names a directory."""


class NoSuchSnapshot(NamespaceError):
    """No snapshot of this data set has this name."""


class SnapshotExists(NamespaceError):
    """A snapshot of this name exists; snapshots never change."""


class PathExists(NamespaceError):
    """Something has this name already."""


class NotEmpty(NamespaceError):
    """The directory still holds something."""


class NotHere(NamespaceError):
    """Nothing can be written here: the directory is made of mount points, or no key has such a name."""


class OtherStore(NamespaceError):
    """The two names lie under different mount points."""


class TooManyAttributes(NamespaceError):
    """A path would have more extended attributes than it may."""


class LandingError(DatacacheError):
    """The landing zone of what is written."""


class LandingFull(LandingError):
    """There is no room for what is to be written. Nothing that was acknowledged is dropped."""


class LandingBroken(LandingError):
    """The medium or the journal of the landing zone fails."""


class IndexBroken(DatacacheError):
    """The database of names fails (I/O error, damage); the store is not to blame."""


class IndexFull(IndexBroken):
    """There is no room to remember new names; what was known can be told."""


class MountError(DatacacheError):
    """Mounting, or unmounting, failed."""


class ControlError(DatacacheError):
    """A running mount cannot be reached, or refuses what was asked."""


class VolumeError(DatacacheError):
    """A volume of Kubernetes, or a call for one."""


class NoSuchVolume(VolumeError):
    """There is no volume of this name, or it is not at this place."""


class VolumeDiffers(VolumeError):
    """The volume is there already, with other attributes or in another mode."""


class VolumeBusy(VolumeError):
    """Another call for the same volume is under way. To be tried again."""


class VolumeInUse(VolumeError):
    """Somebody still needs what was to be taken away. To be tried again."""


class NotStaged(VolumeError):
    """What has to come before this call has not come."""


class TookTooLong(VolumeError):
    """What was asked for did not end in the time that the caller gave. To be tried again."""


class ClusterError(DatacacheError):
    """The API of Kubernetes refuses, or does not answer. `status` is HTTP's, 0 where nothing was answered;
    `about` the name of the object that it is about, where the API says one."""

    def __init__(self, message: str, *, status: int = 0, about: str = "") -> None:
        super().__init__(message)
        self.status, self.about = status, about


class Conflicting(ClusterError):
    """Somebody else has changed, or made, the object meanwhile: look again."""
