"""
Who a worker is to the controller: an authority of the release, and a certificate of each Dataset.

The door to cryptography. Pure but for the random numbers of keys: what is made depends on the time that is
handed in, and everything is PEM in and PEM out, as Secrets hold it. Workers are asked by the addresses of
their pods, and known by the name of their Dataset's Service: a pod that came to have the address of another
is none of them.

The authority is renewed long before its end. Until then certificates of the one before are trusted, too, so
that no worker is a stranger while it gets another.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

AUTHORITY = timedelta(days=365)
"""How long an authority is good."""
CERTIFICATE = timedelta(days=90)
"""How long a certificate is good: no longer than what is left of its authority when that is renewed."""
RENEW = 2 / 3
"""Of the life of either, after which it is renewed: months before it matters, should nobody act for weeks."""
_SKEW = timedelta(hours=1)
"""By how much clocks of nodes may be behind."""


@dataclass(frozen=True)
class Pair:
    """A certificate and its key, in PEM."""

    certificate: str
    key: str = field(repr=False)


@dataclass(frozen=True)
class Authority:
    """Who signs, and who did before."""

    pair: Pair
    before: str = ""
    """The certificate of the one before; empty: there was none."""

    def trusted(self, now: float) -> str:
        """The certificates that sign those of workers, in PEM."""
        both = [self.pair.certificate, *([self.before] if self.before else [])]
        return "".join(each for each in both if _left(each, now) > 0)


def make_authority(now: float, before: Authority | None = None) -> Authority:
    """A new one. Who has a certificate of `before` goes on to be trusted until that ends."""
    known = before.pair.certificate if before is not None and _left(before.pair.certificate, now) > 0 else ""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "datacache workers")])
    certificate = (
        _begun(name, key, now, AUTHORITY)
        .issuer_name(name)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs=True), critical=True)
        .sign(key, hashes.SHA256())
    )
    return Authority(_pair(certificate, key), known)


def issue(authority: Authority, names: Sequence[str], now: float) -> Pair:
    """A certificate of a server of these names."""
    signer = x509.load_pem_x509_certificate(authority.pair.certificate.encode())
    signing = serialization.load_pem_private_key(authority.pair.key.encode(), password=None)
    assert isinstance(signing, ec.EllipticCurvePrivateKey)
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = (
        _begun(x509.Name([]), key, now, CERTIFICATE)
        .issuer_name(signer.subject)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name) for name in names]), critical=True)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(_usage(signs=False), critical=True)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signing.public_key()), critical=False
        )
        .sign(signing, hashes.SHA256())
    )
    return _pair(certificate, key)


def is_good_authority(authority: Authority | None, now: float) -> bool:
    """Whether it need not be renewed yet."""
    return authority is not None and _is_whole(authority.pair) and _is_fresh(authority.pair.certificate, now)


def is_good_pair(pair: Pair | None, authority: Authority, names: Sequence[str], now: float) -> bool:
    """Whether it is a certificate of `authority` for just these names, and need not be renewed yet."""
    if pair is None or not _is_whole(pair) or not _is_fresh(pair.certificate, now):
        return False
    try:
        certificate = x509.load_pem_x509_certificate(pair.certificate.encode())
        signer = x509.load_pem_x509_certificate(authority.pair.certificate.encode())
        certificate.verify_directly_issued_by(signer)
        said = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        return said.value.get_values_for_type(x509.DNSName) == list(names)
    except (ValueError, TypeError, InvalidSignature, x509.ExtensionNotFound):
        return False


def _begun(
    name: x509.Name, key: ec.EllipticCurvePrivateKey, now: float, life: timedelta
) -> x509.CertificateBuilder:
    begins = datetime.fromtimestamp(int(now), UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begins - _SKEW)
        .not_valid_after(begins + life)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs, key_cert_sign=signs, crl_sign=signs, content_commitment=False,
        key_encipherment=False, data_encipherment=False, key_agreement=False, encipher_only=False,
        decipher_only=False,
    )  # fmt: skip


def _pair(certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> Pair:
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return Pair(certificate.public_bytes(serialization.Encoding.PEM).decode(), private.decode())


def _is_whole(pair: Pair) -> bool:
    """Whether the key is that of the certificate."""
    try:
        key = serialization.load_pem_private_key(pair.key.encode(), password=None)
        certificate = x509.load_pem_x509_certificate(pair.certificate.encode())
    except (ValueError, TypeError):
        return False
    return key.public_key() == certificate.public_key()


def _is_fresh(certificate: str, now: float) -> bool:
    try:
        found = x509.load_pem_x509_certificate(certificate.encode())
    except ValueError:
        return False
    begins, ends = found.not_valid_before_utc.timestamp(), found.not_valid_after_utc.timestamp()
    return begins <= now < begins + (ends - begins) * RENEW


def _left(certificate: str, now: float) -> float:
    """Seconds until it ends; none where it is no certificate."""
    try:
        return x509.load_pem_x509_certificate(certificate.encode()).not_valid_after_utc.timestamp() - now
    except ValueError:
        return 0.0
