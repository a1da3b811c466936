"""
Logging set-up and redaction. Imports nothing of this project.

A record's message and its `extra` fields pass the redactor before any handler sees them, so that a
secret that reached a log call by mistake does not reach the log.
"""

import json
import logging
import re
import sys
from collections.abc import Collection
from typing import Any, TextIO

# `token-file` is where tokens lie, and no secret: an error has to name it; a slip in it, too.
_SECRET = re.compile(
    r"""(?ix)
    (?P<name> secret[\w-]* | password | passwd | token(?!-file)[\w-]* | [\w-]*_token | signature
      | x-amz-security-token | x-amz-signature | authorization | sas | sig | account_?key
      | shared_?access_?key )
    (?P<sep> ["']?\s*[:=>]\s*["']? )
    (?P<value> (?!unknown\ flag;) (?:bearer\s+|basic\s+|aws4-hmac-sha256\s+)? [^\s"'&,;}<]+ )
    """
)
_USERINFO = re.compile(r"(?P<scheme>\b[a-z][a-z0-9+.-]*://)[^/\s@:]+:[^/\s@]+@")


def redact(text: str) -> str:
    """`text` with the values of anything that looks like a secret replaced by ***."""
    text = _USERINFO.sub(r"\g<scheme>***@", text)
    return _SECRET.sub(r"\g<name>\g<sep>***", text)


def hide(text: str, secrets: Collection[str]) -> str:
    """`text` without the values `secrets`, whatever brought them there: for who knows them."""
    for value in sorted(filter(str.strip, secrets), key=len, reverse=True):
        text = text.replace(value, "***")
    return text


def _redact_field(name: str, value: str) -> str:
    """A value that has a name of its own: the name may be what tells that it is a secret."""
    return "***" if _SECRET.fullmatch(f"{name}=x") else redact(value)


class _Redactor(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.msg = redact(record.getMessage())
        record.args = ()
        return True


class _JsonFormatter(logging.Formatter):
    _PLAIN = frozenset(vars(logging.LogRecord("", 0, "", 0, "", (), None))) | {
        "message",
        "asctime",
        "taskName",
    }

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = {
            "time": self.formatTime(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        fields |= {k: _redact_field(k, str(v)) for k, v in vars(record).items() if k not in self._PLAIN}
        if record.exc_info:
            fields["traceback"] = redact(self.formatException(record.exc_info))
        return json.dumps(fields)


class _TextFormatter(logging.Formatter):
    def formatException(self, ei: Any) -> str:  # noqa: N802  the name is logging's
        return redact(super().formatException(ei))


def set_up_logging(*, level: str, style: str, stream: TextIO | None = None, file: str = "") -> None:
    """Send this process's log to `file`, or to `stream` (standard error by default).

    `level` is debug, info, warning or error; `style` is text or json.
    """
    handler: logging.Handler = (
        logging.FileHandler(file) if file else logging.StreamHandler(stream or sys.stderr)
    )
    handler.setFormatter(
        _JsonFormatter()
        if style == "json"
        else _TextFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    )
    handler.addFilter(_Redactor())
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
        old.close()
    root.addHandler(handler)
    root.setLevel(level.upper())
