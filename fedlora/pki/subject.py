"""Subject: whom a certificate is for. CN is the name, OU the role, SANs the server's hosts.

Names follow RFC 5280, https://www.rfc-editor.org/rfc/rfc5280, sections 4.1.2.6 and 4.2.1.6.
"""

import ipaddress
import re
from dataclasses import dataclass
from typing import Literal, get_args

from cryptography import x509
from cryptography.x509.oid import NameOID

from fedlora.errors import CertificateError, near_miss
from fedlora.pki.files import file_name

Role = Literal["client", "operator", "server"]
ROLES: tuple[Role, ...] = get_args(Role)

MAX_NAME = 64  # ub-common-name of RFC 5280, appendix A.1
# with its serial number the name must fit into a file name of 255 bytes
MAX_FILE_NAME = 200
# underscores are no part of a host name, but docker-compose makes such ones
HOST = re.compile(
    r"(?=.{1,253}\Z)(?!-)[A-Za-z0-9_-]{1,63}(?<!-)(\.(?!-)[A-Za-z0-9_-]{1,63}(?<!-))*"
)


@dataclass(frozen=True)
class Subject:
    """Whom a certificate is for.

    Attributes:
        name: the client's or operator's name, or that of the server.
        role: what the holder may do.
        hosts: host names and IP addresses under which a server is reached; sorted.

    Raises:
        CertificateError: a name, role or host that no certificate of ours can carry.
    """

    name: str
    role: Role
    hosts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        name = self.name
        if (
            not name.isprintable()
            or not 0 < len(name) <= MAX_NAME
            or len(file_name(name)) > MAX_FILE_NAME
        ):
            raise CertificateError(
                f"name {name[:80]!r} has {len(name)} characters; expected 1 to {MAX_NAME}, all "
                "printable; choose a shorter or plainer name"
            )
        if self.role not in ROLES:
            raise CertificateError(
                f"role {self.role!r} is not known{near_miss(self.role, ROLES)}; known: "
                f"{', '.join(ROLES)}"
            )
        if name == "ca":
            raise CertificateError("name 'ca' is that of the authority's files; choose another")
        for host in self.hosts:
            if not _is_address(host) and not HOST.fullmatch(host):
                raise CertificateError(
                    f"host {host[:80]!r} is neither a host name nor an IP address; give it "
                    "without port and scheme"
                )
        if (self.role == "server") != bool(self.hosts):
            raise CertificateError(
                f"{name!r} has role {self.role!r} and hosts: {', '.join(self.hosts) or 'none'}; "
                "a server needs at least one (--host), others have none"
            )
        object.__setattr__(self, "hosts", tuple(sorted({host.lower() for host in self.hosts})))

    @classmethod
    def of(cls, document: x509.Certificate | x509.CertificateSigningRequest) -> "Subject":
        """Whom a certificate or a request names.

        Raises:
            CertificateError: it names nobody, or more than one, or somebody of no role.
        """
        try:
            common = document.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
            units = document.subject.get_attributes_for_oid(NameOID.ORGANIZATIONAL_UNIT_NAME)
            extensions = document.extensions
        except (ValueError, x509.DuplicateExtension, x509.UnsupportedGeneralNameType) as e:
            raise CertificateError(f"the certificate or request is not readable: {e}") from e
        if len(common) != 1 or len(units) != 1:
            raise CertificateError(
                f"subject {document.subject.rfc4514_string()[:200]!r} has {len(common)} common "
                f"names and {len(units)} units; expected one name and one role, as fedlora certs "
                "writes them"
            )
        hosts: tuple[str, ...] = ()
        try:
            names = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        except x509.ExtensionNotFound:
            pass
        else:
            hosts = tuple(str(name.value) for name in names)
        role = str(units[0].value)
        # __post_init__ refuses any other text
        return cls(str(common[0].value), role, hosts)  # type: ignore[arg-type]

    @property
    def distinguished_name(self) -> x509.Name:
        """The subject field: OU, then CN."""
        return x509.Name(
            [
                x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, self.role),
                x509.NameAttribute(NameOID.COMMON_NAME, self.name),
            ]
        )

    @property
    def alternative_names(self) -> x509.SubjectAlternativeName | None:
        """The hosts as an extension; None without any."""
        if not self.hosts:
            return None
        return x509.SubjectAlternativeName(
            x509.IPAddress(ipaddress.ip_address(host)) if _is_address(host) else x509.DNSName(host)
            for host in self.hosts
        )


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
