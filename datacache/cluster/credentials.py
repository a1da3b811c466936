"""
Who is let in over TCP: the tokens that a caller may show, and the certificate that we show.

Both lie in files, as a Secret of Kubernetes is shown to a pod, and are read again when these change. A
token file may have several lines, each a token that is accepted: to rotate without a gap, add the new
one, let every caller have it, and take the old one away. A file of tokens that cannot be used any more
lets nobody in; a certificate that cannot be used leaves the one before in use, since it still proves
who we are.
"""

import hmac
import logging
import os
import ssl
import stat

from datacache.config.settings import ApiSettings
from datacache.errors import SettingError

_log = logging.getLogger(__name__)

SHORTEST = 32
"""Bytes of a token at least: 128 bits and more, where it is hexadecimal."""
LONGEST = 1024
"""Bytes of a token at most: it is a header of each request."""
MOST = 8
"""Tokens that are accepted at once."""
_FILE = MOST * (LONGEST + 2)

_Seen = tuple[int, int, int, int]


class Tokens:
    """The tokens in the file at `path`. Raises SettingError when there is none that will do."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._seen = _changes(path)
        self._accepted = read_tokens(path)

    def __repr__(self) -> str:
        return f"<Tokens {self._path}, {len(self._accepted)} accepted>"

    def admit(self, authorization: str) -> bool:
        """Whether a request with this `Authorization` is let in."""
        scheme, _, shown = authorization.partition(" ")
        # Header bytes that are no text arrive as surrogates, and a str of those cannot be compared.
        given = shown.strip().encode("utf-8", "surrogateescape")
        found = False
        for token in self._current():  # all of them, whatever the first says
            found |= hmac.compare_digest(given, token)
        return found and scheme.lower() == "bearer"

    def _current(self) -> tuple[bytes, ...]:
        seen = _changes(self._path)
        if seen != self._seen:
            self._seen = seen
            try:
                self._accepted = read_tokens(self._path)
            except SettingError as error:
                self._accepted = ()
                _log.warning("nobody is let in: %s", error)
        return self._accepted


def read_tokens(path: str) -> tuple[bytes, ...]:
    """The tokens in `path`, one a line. Raises SettingError, which never quotes what is in it."""
    raw = _read_private("--token-file", path, _FILE)
    tokens = tuple(line.strip() for line in raw.split(b"\n") if line.strip())
    if not 1 <= len(tokens) <= MOST:
        raise SettingError("--token-file", path, f"a file of 1 to {MOST} tokens, one a line")
    for token in tokens:
        if not SHORTEST <= len(token) <= LONGEST or not all(0x21 <= byte <= 0x7E for byte in token):
            raise SettingError(
                "--token-file", path,
                f"tokens of {SHORTEST} to {LONGEST} printable ASCII characters without spaces",
            )  # fmt: skip
    return tokens


class Certificate:
    """A TLS certificate with its key. Raises SettingError when they cannot be used."""

    def __init__(self, certificate: str, key: str) -> None:
        self._certificate, self._key = certificate, key
        self._seen = self._changes()
        self._context = self._loaded()

    def __repr__(self) -> str:
        return f"<Certificate {self._certificate}>"

    def context(self) -> ssl.SSLContext:
        """What the next connection is to be served with."""
        seen = self._changes()
        if seen != self._seen:
            self._seen = seen
            try:
                self._context = self._loaded()
            except SettingError as error:
                _log.warning("the certificate before stays in use: %s", error)
        return self._context

    def _changes(self) -> tuple[_Seen | None, _Seen | None]:
        return _changes(self._certificate), _changes(self._key)

    def _loaded(self) -> ssl.SSLContext:
        _read_private("--tls-key", self._key, 1 << 20)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            # A key with a pass phrase would be asked for at a terminal.
            context.load_cert_chain(self._certificate, self._key, password="")
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or "no PEM"
            raise SettingError(
                "--tls-cert",
                self._certificate,
                f"a certificate in PEM with its key in {self._key} ({reason})",
            ) from error
        return context


def admission(remote: ApiSettings) -> tuple[Tokens | None, Certificate | None]:
    """What `remote` asks for. Raises SettingError."""
    return (
        Tokens(remote.token_file) if remote.token_file else None,
        Certificate(remote.tls_cert, remote.tls_key) if remote.tls_cert else None,
    )


def _read_private(name: str, path: str, most: int) -> bytes:
    """What is in a file that others cannot read. Raises SettingError."""
    try:
        # Not waiting for a writer, where it is a pipe.
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            mode = os.fstat(file).st_mode
            raw = os.read(file, most + 1) if stat.S_ISREG(mode) else b""
        finally:
            os.close(file)
    except OSError as error:
        raise SettingError(name, path, f"a file that can be read ({error.strerror})") from error
    if not stat.S_ISREG(mode):
        raise SettingError(name, path, "a plain file")
    if mode & 0o007:
        found = f"its mode is {mode & 0o777:04o}; 0600 or 0640 will do"
        raise SettingError(name, path, f"a file that others cannot use ({found})")
    if len(raw) > most:
        raise SettingError(name, path, f"at most {most} bytes")
    return raw


def _changes(path: str) -> _Seen | None:
    """What is other when the file is; None when there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
