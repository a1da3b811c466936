"""What reaches a log, and what does not."""

import io
import json
import logging
import sys
from collections.abc import Iterator

import pytest

from datacache.telemetry import redact, set_up_logging

SECRET = "wJalrXUtnFEMI/K7MDENG+bPxRfi="


@pytest.fixture(autouse=True)
def root_logger() -> Iterator[None]:
    """Logging is the process's: what a test sets up is taken back."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers = []
    yield
    root.handlers = handlers
    root.setLevel(level)


@pytest.mark.parametrize(
    "text",
    [
        "AWS_SECRET_ACCESS_KEY={}",
        "OSS_ACCESS_KEY_SECRET: {}",
        "AZURE_CLIENT_SECRET='{}'",
        '{{"SecretAccessKey": "{}", "AccessKeyId": "AKIA"}}',
        "<SecretAccessKey>{}</SecretAccessKey>",
        "aws_session_token = {}",
        "https://host/a?X-Amz-Signature={}&X-Amz-Date=2024",
        "https://host/a?sv=2022&sig={}",
        "DefaultEndpointsProtocol=https;AccountName=me;AccountKey={};EndpointSuffix=x",
        "AZURE_STORAGE_ACCOUNT_KEY={}",
        "x-amz-security-token: {}",
        "Authorization: Bearer {}",
        "Authorization: AWS4-HMAC-SHA256 Credential=AKIA/2024/s3, SignedHeaders=host, Signature={}",
        "s3://user:{}@bucket/key",
        "password={}",
        "headers {{'authorization': 'Basic {}'}}",
    ],
)
def test_what_looks_like_a_secret_is_not_shown(text: str) -> None:
    """The value goes, in whatever form libraries print it."""
    shown = redact(text.format(SECRET if "@" not in text else SECRET.replace("/", "-")))
    assert "wJalrXU" not in shown
    assert "***" in shown


@pytest.mark.parametrize(
    "text",
    ["'img/1.jpg' in s3://bucket/train: 404 Not Found", "ssd:/var/cache/x is full", "s3://bucket/a@b/c:d"],
)
def test_what_does_not_is_left_alone(text: str) -> None:
    """A redacted log must still tell what happened."""
    assert redact(text) == text


@pytest.mark.parametrize("style", ["text", "json"])
def test_secrets_reach_no_log(style: str) -> None:
    """Messages, arguments, extra fields and tracebacks pass the redactor."""
    stream = io.StringIO()
    set_up_logging(level="debug", style=style, stream=stream)
    log = logging.getLogger("somebody")
    log.debug("signing with secret_key=%s", SECRET)
    log.info("plain", extra={"request": f"token={SECRET}", "password": SECRET})
    try:
        raise ValueError(f"Authorization: Bearer {SECRET}")
    except ValueError:
        log.exception("failed")
    text = stream.getvalue()
    assert SECRET not in text
    assert text.count("***") >= 2
    if style == "json":
        lines = [json.loads(line) for line in text.splitlines()]
        assert [line["level"] for line in lines] == ["debug", "info", "error"]
        assert lines[0]["logger"] == "somebody"
        assert "ValueError" in lines[2]["traceback"]


def test_the_level_holds_and_the_last_set_up_counts() -> None:
    """What is below the level is not written; a second set-up replaces the first."""
    first, second = io.StringIO(), io.StringIO()
    set_up_logging(level="debug", style="text", stream=first)
    set_up_logging(level="warning", style="text", stream=second)
    log = logging.getLogger("somebody")
    log.info("no")
    log.warning("yes")
    assert (first.getvalue(), second.getvalue().count("\n")) == ("", 1)
    assert "WARNING somebody: yes" in second.getvalue()
    assert logging.getLogger().handlers[0].stream is not sys.stderr  # type: ignore[attr-defined]
