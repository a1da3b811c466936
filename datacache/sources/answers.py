"""
What a store's refusal means.

Pure: an HTTP status, the store's own code and its words go in, one of our errors comes out. Both
doors (`objectstore`, `aws`) take their library's errors apart into these three and look here, so a
refusal reads the same whichever client met it.
"""

import re
from collections.abc import Mapping

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

BY_CODE: Mapping[str, type[SourceError]] = {
    # S3 and what speaks it; Azure's names stand last.
    "NoSuchKey": NotFound,
    "NoSuchBucket": NotFound,
    "NoSuchVersion": VersionChanged,
    "AccessDenied": Denied,
    "AllAccessDisabled": Denied,
    "AccountProblem": Denied,
    "InvalidAccessKeyId": Denied,
    "XAdminUserNotFound": Denied,  # versitygw, with 404
    "SignatureDoesNotMatch": Denied,
    "RequestTimeTooSkewed": Denied,
    "AuthorizationHeaderMalformed": Denied,
    "PermanentRedirect": Denied,
    "InvalidToken": Denied,
    "ExpiredToken": CredentialsExpired,
    "ExpiredTokenException": CredentialsExpired,
    "TokenRefreshRequired": CredentialsExpired,
    "SecurityTokenExpired": CredentialsExpired,
    "InvalidObjectState": Archived,
    "PreconditionFailed": VersionChanged,
    "ConditionalRequestConflict": VersionChanged,  # 409: somebody else writes the same key now
    "BlobAlreadyExists": VersionChanged,
    "BadDigest": WrongBytes,
    "XAmzContentSHA256Mismatch": WrongBytes,
    "XAmzContentChecksumMismatch": WrongBytes,
    "IncompleteBody": Unavailable,
    "NoSuchUpload": NotFound,
    "EntityTooLarge": Unsupported,
    "InvalidRange": WrongBytes,
    "SlowDown": Unavailable,
    "ServiceUnavailable": Unavailable,
    "InternalError": Unavailable,
    "RequestTimeout": Unavailable,
    "RequestLimitExceeded": Unavailable,
    "Throttling": Unavailable,
    "ThrottlingException": Unavailable,
    "BandwidthLimitExceeded": Unavailable,
    "OperationAborted": Unavailable,
    "NotImplemented": Unsupported,
    "MethodNotAllowed": Unsupported,
    "SecondLevelDomainForbidden": Unsupported,
    "BlobNotFound": NotFound,
    "ContainerNotFound": NotFound,
    "BlobArchived": Archived,
    "ConditionNotMet": VersionChanged,
    "AuthenticationFailed": Denied,
    "ServerBusy": Unavailable,
    "OperationTimedOut": Unavailable,
}

BY_STATUS: Mapping[int, type[SourceError]] = {
    301: Denied,  # S3's way to say: another region
    307: Unavailable,  # a new bucket whose name has not travelled yet
    401: Denied,
    403: Denied,
    404: NotFound,
    405: Unsupported,
    408: Unavailable,
    410: NotFound,
    412: VersionChanged,
    416: WrongBytes,
    425: Unavailable,
    429: Unavailable,
    501: Unsupported,
}

_ARRIVED = "did not arrive at the store as it was sent"
_SAID_OF: Mapping[str, str] = {
    "BadDigest": _ARRIVED,
    "XAmzContentSHA256Mismatch": _ARRIVED,
    "XAmzContentChecksumMismatch": _ARRIVED,
    "ConditionalRequestConflict": "is being written by somebody else",
}

_ADVICE: Mapping[str, str] = {
    "NoSuchBucket": "check the bucket's name and the endpoint",
    "InvalidAccessKeyId": "the store does not know this access key; check the credentials and the endpoint",
    "XAdminUserNotFound": "the store does not know this access key; check the credentials and the endpoint",
    "SignatureDoesNotMatch": "the secret key does not fit the access key",
    "RequestTimeTooSkewed": "the clock of this machine is wrong; set it",
    "AuthorizationHeaderMalformed": "set the option region to the bucket's region",
    "PermanentRedirect": "set the option region to the bucket's region",
    "SecondLevelDomainForbidden": "set the option style=virtual",
    "InvalidObjectState": "restore it to a readable storage class first",
    "BlobArchived": "rehydrate it to a readable tier first",
}

_SAID: Mapping[type[SourceError], str] = {
    NotFound: "does not exist",
    Denied: "is refused to these credentials",
    CredentialsExpired: "is refused: the credentials have expired",
    Archived: "is archived and must be restored before it can be read",
    VersionChanged: "no longer has the version that was asked for",
    WrongBytes: "does not have the range that was asked for",
    Unavailable: "cannot be had right now",
    Unsupported: "cannot be asked for in this way at this store",
    SourceError: "was refused",
}

# Codes for which other credentials may help: a rotated file, a renewed token.
KEY_TROUBLE = frozenset(
    {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "SecurityTokenExpired",
     "InvalidToken", "InvalidAccessKeyId", "XAdminUserNotFound", "SignatureDoesNotMatch"}
)  # fmt: skip

_BLANK = re.compile(r"\s+")


def failure(
    thing: str, *, status: int = 0, code: str = "", message: str = "", retry_after: float | None = None
) -> SourceError:
    """The error for what the store said of `thing` (a URI).

    The store's code decides; where it gave none (HEAD has no body), the status does.
    """
    kind = BY_CODE.get(code) or BY_STATUS.get(status)
    if kind is None:
        # Whatever else is 4xx will be the same next time; all the rest may pass.
        kind = SourceError if 400 <= status < 500 else Unavailable
    said = " ".join(filter(None, [str(status or ""), code, _BLANK.sub(" ", message).strip()[:300]]))
    advice = _ADVICE.get(code, "")
    text = (
        f"{thing} {_SAID_OF.get(code) or _SAID[kind]}"
        + (f" ({said})" if said else "")
        + (f"; {advice}" if advice else "")
    )
    if kind is Unavailable:
        return Unavailable(text, retry_after=retry_after)
    return kind(text)


def parse_retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header; dates, which no object store sends, are ignored."""
    return float(value) if value is not None and value.strip().isdecimal() else None
