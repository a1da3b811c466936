"""
The `datacache` command: find the command, run it, turn what it raises into one line and an exit code.

A command is a module of this package with `add_arguments(parser)` and `run(args) -> int`, named in
`COMMANDS`. Only the module of the command that was asked for is imported, and commands import what
is heavy when they run, so that help and mistakes cost nothing.

Exit codes: 0 done; 1 it failed; 2 the request itself was wrong and nothing was started; 130 and 143
interrupted (Ctrl-C, SIGTERM); 141 nobody reads the output any more.
"""

import argparse
import importlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from importlib.metadata import PackageNotFoundError, version
from types import FrameType, ModuleType
from typing import NamedTuple, NoReturn

from datacache.errors import DatacacheError, SettingError
from datacache.telemetry import redact


class Command(NamedTuple):
    """A command: the module that does it, and its line in the help."""

    module: str
    summary: str


COMMANDS = {
    "mount": Command("mount", "show a bucket as a local directory"),
    "umount": Command("umount", "unmount it and wait for its daemon to end"),
    "worker": Command("worker", "serve the cache of a data set, without a mount"),
    "upgrade": Command("upgrade", "put a new daemon behind a mount that is in use"),
    "load": Command("load", "bring a data set into the cache before it is read"),
    "status": Command("status", "how mounts and their caches are doing"),
    "ls": Command("ls", "list a directory: what of it is cached, and where"),
    "stat": Command("ls", "all about one path: version, URI, what is cached where"),
    "flush": Command("flush", "wait until what was written is in the bucket"),
    "recover": Command("recover", "upload what a landing zone still holds, without a mount"),
    "evict": Command("evict", "drop cached copies"),
    "rm": Command("evict", "with --cache-only: the same"),
    "pin": Command("pin", "keep cached copies from eviction"),
    "unpin": Command("pin", "let pinned copies be evicted again"),
    "verify": Command("verify", "hold every cached block against its checksum"),
    "snapshot": Command("snapshot", "pin the names and versions of a data set, to mount them later"),
    "controller": Command("controller", "have the Datasets of a Kubernetes cluster be what they should be"),
    "uninstall-check": Command("uninstall_check", "say what keeps the chart from being uninstalled"),
    "demo": Command("demo", "see all of it at work, on a bucket of its own, in three minutes"),
    "doctor": Command("doctor", "check this machine, the cache and the store, and say what to do"),
}


class UsageError(Exception):
    """The command line does not parse. One line, without the usage text around it."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, raised where Ctrl-C would be: commands clean up after both in the same way."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose mistakes are one line that names the nearest flag."""

    def __init__(self, prog: str, **kwargs: object) -> None:
        super().__init__(
            prog=prog,
            allow_abbrev=False,  # a flag added later would change what an old script means
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **kwargs,  # type: ignore[arg-type]
        )
        self.add_argument("--debug", action="store_true", help="show tracebacks of errors")

    def error(self, message: str) -> NoReturn:
        message = message.removeprefix("argument ")
        raise UsageError(f"{message} (see `{self.prog} --help`)")

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse `argv`; flags and other words may come in any order."""
        args, unknown = self.parse_known_intermixed_args(list(argv))
        if unknown:
            word = unknown[0].partition("=")[0]
            self.error(
                f"{word}: unknown{' flag' if word.startswith('-') else ' argument'}{self._nearest(word)}"
            )
        return args

    def _nearest(self, word: str) -> str:
        flags = [s for a in self._actions for s in a.option_strings]
        if word in ("--ro", "--read-only", "--readonly") and "--rw" in flags:
            return "; it is read-only without --rw"
        near = get_close_matches(word, flags, n=1)
        return f"; did you mean {near[0]}?" if near and word.startswith("--") else ""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (this process's by default); the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    _print_any_name()
    try:
        with _sigterm_is_an_interrupt(), _warnings_are_lines():
            return _dispatch(words)
    except UsageError as error:
        return _fail(2, str(error), debug)
    except SettingError as error:
        return _fail(2, str(error), debug)
    except DatacacheError as error:
        return _fail(1, str(error), debug)
    except Terminated:
        return 143
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # `datacache ls | head`. Python flushes stdout once more at exit: give it somewhere to go.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
        return 141
    except OSError as error:
        return _fail(1, str(error), debug)
    except Exception as error:  # noqa: BLE001  a bug of ours: one line for the user, all of it with --debug
        hint = "" if debug else "; --debug shows where"
        return _fail(1, f"internal error: {type(error).__name__}: {error}{hint}", debug)


def command_parser(name: str) -> Parser:
    """The parser of command `name`."""
    parser = Parser(f"datacache {name}")
    _module(name).add_arguments(parser)
    return parser


def _dispatch(words: list[str]) -> int:
    if words[:1] == ["--debug"]:
        words = [*words[1:], "--debug"]
    name = words[0] if words else "--help"
    if name in ("--help", "-h", "help"):
        if len(words) > 1 and words[1] in COMMANDS:
            command_parser(words[1]).print_help()
        else:
            print(_overview())
        return 0 if words else 2
    if name == "--version":
        print(f"datacache {_version()}")
        return 0
    if name not in COMMANDS:
        near = get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean `datacache {near[0]}`?" if near else " (see `datacache --help`)"
        what = "flag" if name.startswith("-") else "command"
        raise UsageError(f"{name}: unknown {what}{hint}")
    try:
        args = command_parser(name).parse(words[1:])
    except SystemExit as done:  # argparse has printed the help
        return int(done.code or 0)
    args.command = name
    code: int = _module(name).run(args)
    sys.stdout.flush()  # here, where a broken pipe is still ours to handle
    return code


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"datacache.cli.{COMMANDS[name].module}")


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [
        "usage: datacache COMMAND [FLAGS]",
        "",
        "A tiered cache in front of object storage, mounted as a local directory.",
        "",
        "commands:",
        *(f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()),
        "",
        "flags:",
        f"  {'--version':<{width}}  print the version",
        f"  {'--debug':<{width}}  show tracebacks of errors",
        "",
        "`datacache COMMAND --help` has the flags of a command, with examples.",
        "",
        "  datacache mount s3://bucket/train /mnt/train",
        "  datacache load /mnt/train",
        "  datacache status --watch",
        "  datacache umount /mnt/train",
    ]
    return "\n".join(lines)


def _version() -> str:
    try:
        return version("dataset-cache")
    except PackageNotFoundError:
        return "unknown (not installed)"


def _fail(code: int, message: str, debug: bool) -> int:
    if debug:
        import traceback

        sys.stderr.write(redact(traceback.format_exc()))
    print(f"datacache: error: {redact(' '.join(message.split()))}", file=sys.stderr)
    return code


def _print_any_name() -> None:
    """Names in buckets may be no UTF-8: they are printed as the bytes that they are."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="surrogateescape")


@contextmanager
def _sigterm_is_an_interrupt() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Warning(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return f"datacache: warning: {redact(' '.join(record.getMessage().split()))}"


@contextmanager
def _warnings_are_lines() -> Iterator[None]:
    """What the layers below warn of is printed as a line, too; until a command sets up a log of its own."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setLevel(logging.WARNING)
    handler.setFormatter(_Warning())
    handler.addFilter(lambda record: record.name.partition(".")[0] in ("datacache", "fuse"))
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)


if __name__ == "__main__":
    sys.exit(main())
