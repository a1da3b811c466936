"""What a store holds, asked of the store itself, beside what a directory shows."""

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from datacache.model import MountPoint
from tests.support.s3 import S3Server

Tree = dict[str, bytes | None]
"""By path: the bytes of files and the targets of symbolic links; None for directories."""


@dataclass(frozen=True)
class Bucket:
    """A bucket of a running server, below a prefix."""

    server: S3Server
    name: str
    prefix: str = ""

    def mount_point(self) -> MountPoint:
        options = {"endpoint": self.server.endpoint, "style": "path"}
        return MountPoint(f"s3://{self.name}/{self.prefix}".rstrip("/"), options=options)

    @property
    def environment(self) -> dict[str, str]:
        return {**self.server.environment, "AWS_REGION": "us-east-1"}

    def keys(self, below: str = "") -> list[str]:
        top = self.prefix + below
        found, more = [], {}
        while True:
            page = self.server.client.list_objects_v2(
                Bucket=self.name, Prefix=top, EncodingType="url", **more
            )
            found += [one["Key"] for one in page.get("Contents", ())]
            if not page.get("IsTruncated"):
                return [key[len(self.prefix) :] for key in found]
            more = {"ContinuationToken": page["NextContinuationToken"]}

    def read(self, key: str) -> bytes:
        return bytes(self.server.client.get_object(Bucket=self.name, Key=self.prefix + key)["Body"].read())

    def tree(self, below: str = "") -> Tree:
        """All that is in it, as a directory would show it. `below` ends with "/", or is all."""
        found: Tree = {}
        for key in self.keys(below):
            path = key[len(below) :]
            above = path.rstrip("/")
            if not above:
                continue
            found[above] = None if path.endswith("/") else self.read(key)
            while "/" in above:
                above = above.rpartition("/")[0]
                found.setdefault(above, None)
        return found

    def unfinished(self) -> list[str]:
        """Keys of multipart uploads that have parts and were not ended."""
        client = self.server.client
        found = []
        for one in client.list_multipart_uploads(Bucket=self.name).get("Uploads", ()):
            parts = client.list_parts(Bucket=self.name, Key=one["Key"], UploadId=one["UploadId"])
            if parts.get("Parts"):
                found.append(one["Key"])
        return found


def tree_of(top: Path) -> Tree:
    """All that a directory shows."""
    found: Tree = {}
    below = [""]
    while below:
        prefix = below.pop()
        with os.scandir(top / prefix) as entries:
            for entry in entries:
                path, mode = prefix + entry.name, entry.stat(follow_symlinks=False).st_mode
                if stat.S_ISDIR(mode):
                    found[path] = None
                    below.append(path + "/")
                elif stat.S_ISLNK(mode):
                    found[path] = os.fsencode(os.readlink(entry.path))
                else:
                    found[path] = Path(entry.path).read_bytes()
    return found


def difference(one: Tree, other: Tree) -> list[str]:
    """Paths that are not the same in both, and how they differ."""
    found = []
    for path in sorted({*one, *other}):
        if path not in one or path not in other:
            found.append(f"{path!r} is only in the {'first' if path in one else 'second'}")
        elif one[path] != other[path]:
            sizes = [None if tree[path] is None else len(tree[path] or b"") for tree in (one, other)]
            found.append(f"{path!r} differs: {sizes[0]} and {sizes[1]} bytes")
    return found
