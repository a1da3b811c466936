"""
The image of this checkout, made of its Dockerfile by buildah, on a base that debootstrap makes.

Nothing is installed for it: the two programs are unpacked from Debian's packages, steps run in a chroot. What
comes from package indexes is asked for as this machine asks for it: apt by its mirror, pip by its own
configuration, handed to the build as secrets that reach no layer. The base is made once; the steps before our
own code are built once for the same lock files; an archive lies in the cache under a name with a hash of all
that it is made of. `make image` builds the same file with a public base.
"""

import configparser
import contextlib
import fcntl
import fnmatch
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.cluster.binaries import cache
from tests.cluster.debian import BUILDER, NoPackages, mirror, root

REFERENCE = "local.test/datacache:1"
"""What it is called on a node."""
REPOSITORY, TAG = REFERENCE.split(":")

_CHECKOUT = Path(__file__).parents[2]
_SUITE = "bookworm"
_INCLUDED = "python3,python3-venv,ca-certificates"
_BASE = f"{_SUITE}-1"
"""Another number makes the base anew."""
_NEEDLESS = ("usr/share/doc", "usr/share/man", "usr/share/info", "usr/share/locale", "usr/share/lintian",
             "var/cache/apt", "var/lib/apt/lists", "var/log")  # fmt: skip
_KEPT = 2
"""Archives of other contents that stay in the cache: they are large, and checkouts change."""
_TIMEOUT = 900


class NotMade(Exception):
    """A step failed; the message ends with what it said last."""


def archive() -> Path:
    """The image as an archive for `ctr images import`, called REFERENCE. Raises NoPackages, NotMade."""
    made = cache() / f"image-{_content()}.tar"
    if made.exists():
        os.utime(made)
        return made
    tools = root("builder-1", BUILDER)
    with _alone(), tempfile.TemporaryDirectory(prefix="image.", dir=cache()) as scratch:
        if not made.exists():
            builder = _Builder(tools, Path(scratch))
            builder.base()
            builder.image(Path(scratch) / "image.tar")
            (Path(scratch) / "image.tar").rename(made)
            for old in sorted(cache().glob("image-*.tar"), key=lambda path: path.stat().st_mtime)[
                : -1 - _KEPT
            ]:
                old.unlink()
    return made


def _content() -> str:
    """A hash of all that the image is made of: what .dockerignore lets in, the Dockerfile, and the base."""
    ignored, taken = [], []
    for line in (_CHECKOUT / ".dockerignore").read_text().split():
        if line.startswith("!"):
            taken.append(line[1:])
        elif line.startswith("**/"):
            ignored.append(line[3:])
    found = hashlib.sha256(f"{_BASE} {_INCLUDED}".encode())
    for name in sorted(["Dockerfile", ".dockerignore", *taken]):
        top = _CHECKOUT / name
        for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
            inside = path.relative_to(_CHECKOUT)
            if path.is_file() and not any(
                fnmatch.fnmatch(part, each) for part in inside.parts for each in ignored
            ):
                found.update(f"{inside} {path.stat().st_mode & 0o111}\0".encode() + path.read_bytes())
    return found.hexdigest()[:12]


class _Builder:
    """buildah with a store of its own in the cache."""

    def __init__(self, tools: Path, scratch: Path) -> None:
        self._tools, self._scratch = tools, scratch
        self._store = cache() / "buildah-1"
        self._base = f"localhost/base:{_BASE}"
        (scratch / "policy.json").write_text('{"default": [{"type": "insecureAcceptAnything"}]}')
        (scratch / "registries.conf").write_text("")
        (scratch / "run").mkdir()
        self._libraries = scratch / "ld.so.cache"
        places = [*tools.glob("usr/lib/*-linux-gnu"), *tools.glob("lib/*-linux-gnu")]
        lines = [*map(str, places), "include /etc/ld.so.conf"]
        (scratch / "ld.so.conf").write_text("\n".join(lines) + "\n")
        self._run("ldconfig", "-X", "-C", str(self._libraries), "-f", str(scratch / "ld.so.conf"))

    def base(self) -> None:
        """Have the base in the store: the smallest Debian with Python."""
        if not self._buildah("images", "-q", "--filter", f"reference={self._base}").strip():
            tree = self._scratch / "base"
            share = self._tools / "usr/share"
            self._run(
                "unshare", "--mount", str(self._tools / "usr/sbin/debootstrap"), "--variant=minbase",
                f"--keyring={share}/keyrings/debian-archive-keyring.gpg", f"--include={_INCLUDED}",
                _SUITE, str(tree), mirror(), DEBOOTSTRAP_DIR=f"{share}/debootstrap",
            )  # fmt: skip
            for needless in _NEEDLESS:
                shutil.rmtree(tree / needless)
                (tree / needless).mkdir()
            container = self._buildah("from", "scratch").strip()
            self._buildah("add", "-q", container, str(tree), "/")
            path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
            self._buildah("config", "--env", path, container)
            self._buildah("commit", "-q", "--rm", container, self._base)
            shutil.rmtree(tree)

    def image(self, into: Path) -> None:
        """Build the Dockerfile, and write the image."""
        words = ["build", "-q", "--isolation=chroot", "--layers", f"--build-arg=BASE={self._base}"]
        for name, path in self._secrets().items():
            words.append(f"--secret=id={name},src={path}")
        # A name for each stage: what has none is thrown away, and with it what need not be built again.
        self._buildah(*words, "--target=build", "--tag=localhost/datacache:build", str(_CHECKOUT))
        self._buildah(*words, f"--tag={REFERENCE}", str(_CHECKOUT))
        self._buildah("push", "-q", REFERENCE, f"docker-archive:{into}:{REFERENCE}")
        self._buildah("rmi", "--prune", "--force")

    def _secrets(self) -> dict[str, Path]:
        """How this machine's pip finds its index, for the pip of the build."""
        said = subprocess.run(
            [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
        ).stdout
        made, found = configparser.ConfigParser(interpolation=None), {}
        made["global"] = {}
        for line in said.splitlines():
            name, _, value = line.partition("=")
            key, value = name.rpartition(".")[2], value.strip("'\"")
            if key == "cert":
                found["ca"], value = Path(value), "/run/secrets/ca"
            if key in ("cert", "index-url", "extra-index-url", "timeout", "trusted-host", "proxy"):
                made["global"][key] = value
        found["pip"] = self._scratch / "pip.conf"
        with found["pip"].open("w") as file:
            made.write(file)
        return found

    def _buildah(self, *words: str) -> str:
        options = [
            "--root", str(self._store), "--runroot", str(self._scratch / "run"),
            "--registries-conf", str(self._scratch / "registries.conf"),
        ]  # fmt: skip
        more = ["--signature-policy", str(self._scratch / "policy.json")]
        verb, *rest = words
        trusting = more if verb in ("from", "build", "push", "commit", "add") else []
        # It starts itself again without its environment: where its libraries lie, the loader's cache says.
        found = [
            "unshare",
            "--mount",
            "sh",
            "-ec",
            f'mount --bind {self._libraries} /etc/ld.so.cache; exec "$@"',
            "-",
        ]
        return self._run(
            *found, str(self._tools / "usr/bin/buildah"), *options, verb, *trusting, *rest,
            HOME=str(self._scratch), TMPDIR=str(self._scratch), XDG_RUNTIME_DIR=str(self._scratch / "run"),
        )  # fmt: skip

    def _run(self, *words: str, **environment: str) -> str:
        path = f"{os.environ['PATH']}:{self._tools}/usr/bin:/usr/sbin:/sbin"
        done = subprocess.run(
            words, env={**os.environ, "PATH": path, **environment}, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=_TIMEOUT, check=False,
        )  # fmt: skip
        if done.returncode:
            said = "\n".join((done.stdout + done.stderr).splitlines()[-30:])
            raise NotMade(f"{Path(words[0]).name} exits {done.returncode}:\n{said}")
        return done.stdout


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    with (cache() / "image.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    try:
        print(f"the image: {archive()}")  # noqa: T201  what `make` shows
    except NoPackages as error:
        print(f"no image, and none of its tests: {error}")  # noqa: T201
    except NotMade as error:
        sys.exit(str(error))
