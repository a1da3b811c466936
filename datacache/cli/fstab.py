"""
`mount.fuse.datacache`: what mount(8) runs for `mount -t fuse.datacache URI DIR -o ...` and for fstab.

Options are the long flags of `datacache mount` without the dashes (`cache=ssd:/var/cache/x=200GiB`,
`allow-other` or `allow_other`); options that mean something to mount(8) or systemd only are passed
over. `translate` is pure; the exit code is mount(8)'s.
"""

import sys
from collections.abc import Sequence

from datacache.cli import main as command_line
from datacache.cli.main import UsageError, command_parser

IGNORED = frozenset([
    "auto", "defaults", "nofail", "noauto", "user", "nouser", "users", "owner", "group", "_netdev",
    "ro", "rw", "async", "atime", "noatime", "relatime", "strictatime", "lazytime", "nodiratime",
    "dev", "nodev", "suid", "nosuid", "exec", "noexec",
])  # fmt: skip
"""Options of mount(8) that change nothing here: the mount is nosuid and nodev whatever is said. `rw` is among
them because mount(8) says it where nobody does."""
WRITABLE = "writable"
"""The option for `--rw`."""

WRONG_REQUEST, FAILED = 1, 32
"""Exit codes of mount(8): "incorrect invocation or permissions" and "mount failure"."""


def translate(words: Sequence[str]) -> list[str]:
    """The arguments of mount(8) to its helper, as those of `datacache`. Raises UsageError."""
    operands: list[str] = []
    flags: list[str] = []
    rest = iter(words)
    for word in rest:
        if word == "-o":
            flags += _flags(next(rest, ""))
        elif word in ("-t", "-N"):
            next(rest, None)
        elif word.startswith("-"):
            if set(word[1:]) - set("fnsv"):
                raise UsageError(f"{word}: unknown flag of mount.fuse.datacache")
            if "f" in word:
                return []  # "fake": everything but the mount itself
        else:
            operands.append(word)
    if len(operands) != 2:
        raise UsageError("usage: mount.fuse.datacache URI DIR [-o OPTION[=VALUE],...]")
    spec, directory = operands
    # `none` and `datacache` are what stands in the first column of fstab when config= has the URIs.
    uris = [] if "://" not in spec else [spec]
    return ["mount", *uris, directory, *flags]


def main(argv: Sequence[str] | None = None) -> int:
    """Console script of the helper."""
    try:
        words = translate(sys.argv[1:] if argv is None else argv)
    except UsageError as error:
        print(f"mount.fuse.datacache: {error}", file=sys.stderr)
        return WRONG_REQUEST
    code = command_line.main(words) if words else 0
    return {0: 0, 2: WRONG_REQUEST}.get(code, FAILED)


def _flags(options: str) -> list[str]:
    known = {s: action for action in command_parser("mount")._actions for s in action.option_strings}
    flags = []
    for option in _split(options):
        name, equals, value = option.partition("=")
        flag = "--rw" if name == WRITABLE else f"--{name.replace('_', '-')}"
        if name in ("ro", "rw") and equals:
            raise UsageError(f"{name}: takes no value; what is to be written to has the option `{WRITABLE}`")
        if name in IGNORED or name.startswith(("x-", "comment")) or not name:
            continue
        if flag not in known:
            raise UsageError(f"{name}: unknown option; the options are the flags of `datacache mount`")
        takes_value = known[flag].nargs != 0
        if takes_value != bool(equals):
            raise UsageError(f"{name}: {'needs a value' if takes_value else 'takes no value'}")
        flags.append(f"{flag}={value}" if equals else flag)
    return flags


def _split(options: str) -> list[str]:
    """At commas, except within double quotes: mount(8) writes a value with commas as name="a,b"."""
    parts, quoted = [""], False
    for c in options:
        if c == '"':
            quoted = not quoted
        elif c == "," and not quoted:
            parts.append("")
        else:
            parts[-1] += c
    return parts


if __name__ == "__main__":
    sys.exit(main())
