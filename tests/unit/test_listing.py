"""The XML of S3's listings."""

import pytest

from datacache.errors import NotFound, Unavailable, WrongBytes
from datacache.model import ObjectInfo, Version
from datacache.sources.listing import Listing, entity_tag, parse_listing, timestamp_ns

SPACE = ' xmlns="http://s3.amazonaws.com/doc/2006-03-01/"'


def contents(key: str, size: object = 5, tag: str = "&quot;aa&quot;", more: str = "") -> str:
    return (
        f"<Contents><Key>{key}</Key><LastModified>2026-01-02T03:04:05.678Z</LastModified>"
        f"<ETag>{tag}</ETag><Size>{size}</Size>{more}</Contents>"
    )


def parse(inside: str, *, root: str = "", kind: str = "ListBucketResult", space: str = SPACE) -> Listing:
    body = f"<?xml version='1.0'?><{kind}{space}>{inside}</{kind}>"
    return parse_listing(body.encode(), root=root, thing="s3://b")


@pytest.mark.parametrize("space", [SPACE, ""])
def test_an_object_is_read_whole_with_and_without_a_namespace(space: str) -> None:
    """Size, tag, time and class of each object arrive; OSS sends no namespace."""
    page = parse(contents("p/a", more="<StorageClass>STANDARD</StorageClass>"), root="p/", space=space)
    assert page.objects == [ObjectInfo("a", 5, Version('"aa"'), 1767323045678000000, False)]
    assert page.prefixes == []
    assert page.next == {}


def test_an_object_without_a_tag_is_told_apart_by_size_and_time() -> None:
    """Else an overwritten one would be taken for the one before. HEAD knows whole seconds."""
    page = parse(contents("a", tag="") + contents("b", size=6).replace("<ETag>&quot;aa&quot;</ETag>", ""))
    assert [o.version for o in page.objects] == [
        Version(stamp="5-1767323045000000000"), Version(stamp="6-1767323045000000000"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "archived"),
    [("GLACIER", True), ("DEEP_ARCHIVE", True), ("GLACIER_IR", False), ("STANDARD_IA", False)],
)
def test_what_must_be_restored_is_known_from_its_class(name: str, archived: bool) -> None:
    """Glacier and Deep Archive must be restored; Glacier Instant Retrieval need not."""
    page = parse(contents("a", more=f"<StorageClass>{name}</StorageClass>"))
    assert page.objects[0].archived is archived


def test_keys_are_decoded_only_where_the_store_says_that_it_encoded_them() -> None:
    """`+` is a space in an encoded listing, and itself in one that is not."""
    encoded = "<EncodingType>url</EncodingType>"
    names = contents("a+b%2Bc%01") + "<CommonPrefixes><Prefix>x+%C3%BC/</Prefix></CommonPrefixes>"
    page = parse(encoded + names)
    assert ([o.key for o in page.objects], page.prefixes) == (["a b+c\x01"], ["x ü/"])
    page = parse(names)
    assert ([o.key for o in page.objects], page.prefixes) == (["a+b%2Bc%01"], ["x+%C3%BC/"])


def test_only_what_lies_below_the_root_is_listed() -> None:
    """The root's own marker and what a careless store lists beside it are left out."""
    more = "".join(f"<CommonPrefixes><Prefix>{p}</Prefix></CommonPrefixes>" for p in ("q/", "p//"))
    page = parse(contents("p/") + contents("p//a") + contents("q/b") + more, root="p/")
    assert ([o.key for o in page.objects], page.prefixes) == (["/a"], ["/"])


def test_the_next_page_is_asked_for_as_the_store_said() -> None:
    """A token, or a marker of key and version, leads to the next page."""
    more = "<IsTruncated>true</IsTruncated>"
    assert parse(more + "<NextContinuationToken>t</NextContinuationToken>").next == {"ContinuationToken": "t"}
    marker = "<NextKeyMarker>a+b</NextKeyMarker><NextVersionIdMarker>v</NextVersionIdMarker>"
    page = parse("<EncodingType>url</EncodingType>" + more + marker, kind="ListVersionsResult")
    assert page.next == {"KeyMarker": "a b", "VersionIdMarker": "v"}
    assert parse(more + "<NextKeyMarker>k</NextKeyMarker>").next == {"KeyMarker": "k"}


def test_of_versions_only_the_current_ones_count() -> None:
    """Older versions, and keys whose current version is a delete marker, are not there."""

    def version(key: str, version_id: str, latest: str, tag: str = "Version") -> str:
        return contents(
            key, more=f"<VersionId>{version_id}</VersionId><IsLatest>{latest}</IsLatest>"
        ).replace("Contents", tag)

    inside = (
        version("a", "2", "true") + version("a", "1", "false")
        + version("b", "4", "true", "DeleteMarker") + version("b", "3", "false")
    )  # fmt: skip
    page = parse(inside, kind="ListVersionsResult")
    assert [(o.key, o.version) for o in page.objects] == [("a", Version('"aa"', "2"))]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"<html></html>", "a html"),
        (b"<ListBucketResult><Contents><Key>a</Key></Contents></ListBucketResult>", "no key or size"),
        (b"<ListBucketResult><Contents><Size>1</Size></Contents></ListBucketResult>", "no key or size"),
        (b"<ListBucketResult><IsTruncated>true</IsTruncated></ListBucketResult>", "not where"),
    ],
)
def test_what_is_no_listing_is_an_error(body: bytes, said: str) -> None:
    """Half a listing is never taken for a whole one."""
    with pytest.raises(WrongBytes, match=said):
        parse_listing(body, root="", thing="s3://b")


@pytest.mark.parametrize("body", [b"", b"nothing", b"<ListBucketResult><Contents><Key>a</Ke"])
def test_half_a_listing_may_be_whole_next_time(body: bytes) -> None:
    """What broke off is asked for again."""
    with pytest.raises(Unavailable, match="not XML"):
        parse_listing(body, root="", thing="s3://b")


def test_an_error_sent_as_a_success_is_an_error() -> None:
    """Stores say 200 and think of an error later."""
    body = b"<Error><Code>NoSuchBucket</Code><Message>gone</Message></Error>"
    with pytest.raises(NotFound, match="gone"):
        parse_listing(body, root="", thing="s3://b")


def test_tags_and_times_have_one_form() -> None:
    """A tag has its quotes whatever the store lists; a time that cannot be read is no error."""
    assert [entity_tag(t) for t in ("aa", '"aa"', 'W/"aa"', "", None)] == ['"aa"', '"aa"', 'W/"aa"', "", ""]
    assert parse(contents("a", tag="aa")).objects[0].version.etag == '"aa"'
    assert (timestamp_ns("2026-01-02T03:04:05Z"), timestamp_ns("soon"), timestamp_ns(None)) == (
        1767323045000000000, 0, 0,
    )  # fmt: skip
