"""What a store's refusal means."""

import pytest

from datacache.errors import (
    Archived,
    CredentialsExpired,
    Denied,
    NotFound,
    SourceError,
    Unavailable,
    Unsupported,
    VersionChanged,
    WrongBytes,
)
from datacache.sources.answers import KEY_TROUBLE, failure, parse_retry_after


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (404, "NoSuchKey", NotFound), (404, "", NotFound), (404, "NoSuchBucket", NotFound),
        (403, "AccessDenied", Denied), (403, "", Denied), (401, "", Denied),
        (301, "PermanentRedirect", Denied),
        (400, "ExpiredToken", CredentialsExpired), (403, "InvalidObjectState", Archived),
        (409, "BlobArchived", Archived), (412, "", VersionChanged), (404, "NoSuchVersion", VersionChanged),
        (416, "InvalidRange", WrongBytes), (503, "SlowDown", Unavailable), (500, "", Unavailable),
        (429, "", Unavailable), (408, "", Unavailable), (400, "RequestTimeout", Unavailable),
        (0, "", Unavailable), (599, "NeverHeardOf", Unavailable), (501, "", Unsupported),
        (405, "MethodNotAllowed", Unsupported), (400, "NeverHeardOf", SourceError), (418, "", SourceError),
    ],
)  # fmt: skip
def test_each_refusal_is_one_of_our_errors(status: int, code: str, kind: type[SourceError]) -> None:
    """The store's code decides, its status where there is no code; what is unknown and not the
    client's fault may pass."""
    assert type(failure("s3://b/k", status=status, code=code)) is kind


def test_the_sentence_names_the_thing_the_cause_and_the_next_step() -> None:
    """An archived object's error says that it must be restored, and what the store said."""
    text = str(
        failure("s3://b/k", status=403, code="InvalidObjectState", message="The operation\n is not valid")
    )
    assert text == (
        "s3://b/k is archived and must be restored before it can be read (403 InvalidObjectState The "
        "operation is not valid); restore it to a readable storage class first"
    )


def test_the_stores_wish_to_wait_is_kept() -> None:
    """Retry-After in seconds reaches the error."""
    error = failure("x", status=503, retry_after=parse_retry_after("7"))
    assert isinstance(error, Unavailable)
    assert error.retry_after == 7
    assert parse_retry_after(None) is None
    assert parse_retry_after("Wed, 21 Oct 2026 07:28:00 GMT") is None


def test_trouble_with_keys_is_denial() -> None:
    """All codes for which other keys may help are denials, so that the one net catches them."""
    assert all(isinstance(failure("x", code=code), Denied) for code in KEY_TROUBLE)
