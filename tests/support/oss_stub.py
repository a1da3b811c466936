"""
As much of Alibaba's OSS as ossfs asks for, on loopback: GET, HEAD and the first version of listing.

The same server as `faulty_s3`, in OSS's dialect: XML without a namespace, markers in place of
continuation tokens, errors of HEAD in a header. With an endpoint that is an IP address, oss2 puts the
bucket into the path, which is where this stub looks for it.
"""

from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler

from tests.support.faulty_s3 import FaultyS3, Handler, encoded


class OssStub(FaultyS3):
    """The server."""

    def handler(self) -> type[BaseHTTPRequestHandler]:
        return _Oss


class _Oss(Handler):
    namespace = ""

    def listing(self, query: Mapping[str, str]) -> str:
        marker = query.get("marker", "")
        names, last, _ = self.names(query, marker)
        return (
            '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult>'
            f"<Name>{self.server.owner.bucket}</Name><Prefix>{encoded(query.get('prefix', ''))}</Prefix>"
            f"<Marker>{encoded(marker)}</Marker><MaxKeys>{query.get('max-keys', '100')}</MaxKeys>"
            f"<EncodingType>url</EncodingType><IsTruncated>{str(bool(last)).lower()}</IsTruncated>"
            f"<NextMarker>{encoded(last)}</NextMarker>{''.join(names)}</ListBucketResult>"
        )
