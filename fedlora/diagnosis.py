"""Why a server cannot be reached: gRPC says UNAVAILABLE, this says what to mend.

It goes the way of a connection once more by hand: name, TCP, TLS, and the opening of HTTP/2
(RFC 9113, https://www.rfc-editor.org/rfc/rfc9113, section 3.4). Nothing else is sent.
"""

import socket
import ssl
from dataclasses import dataclass
from datetime import UTC, datetime

from cryptography import x509

from fedlora.errors import CertificateError
from fedlora.tls import TlsFiles, check_validity

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes.fromhex("000000040000000000")
SETTINGS = 4  # type of the frame with which every HTTP/2 server begins
FRAME_HEADER_BYTES = 9

# codes of OpenSSL's X509_verify_cert, https://docs.openssl.org/master/man3/X509_STORE_CTX_get_error
NOT_YET_VALID, EXPIRED, WRONG_PURPOSE, WRONG_HOST, WRONG_ADDRESS = 9, 10, 26, 62, 64


@dataclass(frozen=True)
class Diagnosis:
    """What is wrong.

    Attributes:
        text: what keeps this machine from talking to the server, and what to do about it.
        lasting: it stays wrong until somebody changes something; otherwise the server may only
            not be there yet.
    """

    text: str
    lasting: bool


def diagnose(host: str, port: int, tls: TlsFiles | None, *, timeout_s: float = 5.0) -> Diagnosis:
    """What keeps this machine from talking to a server, and what to do about it.

    Args:
        host: name or address of the server, as it was called.
        port: its port.
        tls: the own files; None for a call in plain text.
        timeout_s: seconds to wait at each step.
    """
    where = f"{host}:{port}"
    try:
        connection = socket.create_connection((host, port), timeout_s)
    except socket.gaierror as e:
        return _passing(
            f"the name {host!r} does not resolve ({e.strerror}); check the name, or the DNS"
        )
    except ConnectionRefusedError:
        return _passing(
            f"{where} refuses connections: nothing listens there; check the port, and that the "
            "server runs and binds to an address that can be reached"
        )
    except TimeoutError:
        return _passing(
            f"{where} did not answer within {timeout_s:g} s; a firewall may drop the packets, or "
            "the machine is down"
        )
    except OSError as e:
        return _passing(f"{where} cannot be reached: {e.strerror or e}; check address and network")
    with connection:
        if tls is None:
            return _plain(connection, where, host, port, timeout_s)
        return _secured(connection, where, host, port, tls, timeout_s)


def _passing(text: str) -> Diagnosis:
    return Diagnosis(text, lasting=False)


def _lasting(text: str) -> Diagnosis:
    return Diagnosis(text, lasting=True)


def _plain(
    connection: socket.socket, where: str, host: str, port: int, timeout_s: float
) -> Diagnosis:
    if _speaks_http2(connection):
        return _passing(
            f"{where} takes plain text and speaks HTTP/2: connection and protocol are well; look "
            "at the server's log"
        )
    if _server_certificate(host, port, timeout_s) is not None:
        return _lasting(
            f"{where} speaks TLS, and the call was in plain text; give the certificate files, and "
            "leave out --insecure"
        )
    return _lasting(f"{where} is no HTTP/2 server; check the port")


def _secured(
    connection: socket.socket, where: str, host: str, port: int, tls: TlsFiles, timeout_s: float
) -> Diagnosis:
    try:
        context = ssl.create_default_context(cafile=str(tls.ca))
        # with an empty password, so that nobody is asked for one
        context.load_cert_chain(tls.certificate, tls.key, password="")
    except OSError as e:
        return _lasting(
            f"our own files {tls.ca}, {tls.certificate} and {tls.key} cannot be used "
            f"({_reason(e)}); make them anew with: fedlora certs request"
        )
    context.set_alpn_protocols(["h2"])
    try:
        with context.wrap_socket(connection, server_hostname=host) as secured:
            return _after_handshake(secured, where, tls)
    except ssl.SSLCertVerificationError as e:
        found = _server_certificate(host, port, timeout_s)
        return _lasting(f"{where}: {_unverified(e, found, host, tls)}")
    except TimeoutError:
        return _passing(
            f"{where} took the connection but did not answer within {timeout_s:g} s; something "
            "else may listen there, or the server hangs"
        )
    except OSError as e:
        if _alert(e):
            return _lasting(_refused(e, where, tls))
        if _answers_plain(host, port, timeout_s):
            return _lasting(
                f"{where} speaks plain text, without TLS; start the server with its certificate, "
                "or, on a network that you trust, call it with --insecure"
            )
        # a server that is killed in the middle of a handshake looks the same
        return _passing(f"{where} does not speak TLS ({_reason(e)}); check the port")


def _unverified(
    error: ssl.SSLCertVerificationError,
    found: x509.Certificate | None,
    host: str,
    tls: TlsFiles,
) -> str:
    if error.verify_code in (NOT_YET_VALID, EXPIRED):
        if found is not None:
            try:
                check_validity(found, "the server's certificate", datetime.now(UTC))
            except CertificateError as e:
                return str(e)
        return (
            f"the server's certificate or its authority's is not valid now "
            f"({error.verify_message}); check this machine's clock, or ask the operator to issue "
            "a new one"
        )
    if error.verify_code in (WRONG_HOST, WRONG_ADDRESS):
        return (
            f"the server's certificate is not for {host!r} but for {_hosts(found)}; call it by one "
            f"of these, or issue its certificate with --host {host}"
        )
    if error.verify_code == WRONG_PURPOSE:
        return (
            "what answers there has a certificate, but not that of a server; check address and "
            "port, or issue the server's certificate with --role server"
        )
    issuer = f" by {found.issuer.rfc4514_string()!r}" if found is not None else ""
    return (
        f"wrong CA: the server's certificate was signed{issuer}, not by the authority in {tls.ca} "
        f"({error.verify_message}); get ca.crt from the operator of this server, or, if it should "
        "be right, somebody stands between"
    )


def _after_handshake(secured: ssl.SSLSocket, where: str, tls: TlsFiles) -> Diagnosis:
    """In TLS 1.3 the server looks at our certificate after our side is done (RFC 8446, 4.4.2)."""
    if secured.selected_alpn_protocol() != "h2":
        return _lasting(
            f"{where} speaks TLS but not HTTP/2, so it is no gRPC server; check the port (Flower's "
            "is another one)"
        )
    try:
        # a gRPC server speaks first. Should it refuse us instead, anything we had sent by then
        # would make its machine reset the connection, and the alert would be lost
        answer = secured.recv(1)
    except TimeoutError:
        return _passing(f"{where} took our certificate but is silent; look at the server's log")
    except OSError as e:
        return _lasting(_refused(e, where, tls))
    if answer:
        return _passing(
            f"{where} takes our certificate and speaks HTTP/2: name, network and TLS are well; if "
            "calls still fail, the certificate may be revoked, or look at the server's log"
        )
    return _lasting(
        f"{where} closed the connection after the handshake, which usually means that it does not "
        f"take the certificate {tls.certificate}: {_own_problem(tls)}"
    )


def _refused(error: OSError, where: str, tls: TlsFiles) -> str:
    reason = _alert(error) or _reason(error)
    if "EXPIRED" in reason:
        why = "it has expired by the server's clock; set the clocks, or ask for a new certificate"
    elif "REVOKED" in reason:
        why = "it was revoked; ask the operator"
    elif "UNKNOWN_CA" in reason:
        why = "the server trusts another authority; ask its operator for a certificate of theirs"
    else:
        why = _own_problem(tls)
    return f"{where} does not accept our certificate {tls.certificate} ({reason}): {why}"


def _own_problem(tls: TlsFiles) -> str:
    """What may be wrong with our certificate when the server does not say; gRPC never does."""
    try:
        own = tls.load(None)
    except CertificateError as e:
        return str(e)
    if own.subject.role == "server":
        return "it is that of a server, which cannot call; give one of role client or operator"
    return (
        "here it is good, so the server's clock may be wrong or the server trusts another "
        "authority; compare clocks, and ask its operator for: fedlora certs list"
    )


def _alert(error: OSError) -> str:
    """OpenSSL's name of the alert that the peer sent, "" if none."""
    reason = getattr(error, "reason", None) or ""
    return reason if "ALERT" in reason else ""


def _reason(error: OSError) -> str:
    return getattr(error, "reason", None) or error.strerror or type(error).__name__


def _hosts(certificate: x509.Certificate | None) -> str:
    try:
        assert certificate is not None
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (AssertionError, ValueError, x509.ExtensionNotFound):
        return "others"
    return ", ".join(str(name.value) for name in names)


def _anybody() -> ssl.SSLContext:
    """Takes every certificate; only to look at it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def _server_certificate(host: str, port: int, timeout_s: float) -> x509.Certificate | None:
    try:
        with (
            socket.create_connection((host, port), timeout_s) as connection,
            _anybody().wrap_socket(connection, server_hostname=host) as secured,
        ):
            return x509.load_der_x509_certificate(secured.getpeercert(binary_form=True) or b"")
    except (OSError, ValueError):
        return None


def _answers_plain(host: str, port: int, timeout_s: float) -> bool:
    try:
        with socket.create_connection((host, port), timeout_s) as connection:
            return _speaks_http2(connection)
    except OSError:
        return False


def _speaks_http2(connection: socket.socket) -> bool:
    try:
        connection.sendall(PREFACE)
        frame = b""
        while len(frame) < FRAME_HEADER_BYTES:
            chunk = connection.recv(FRAME_HEADER_BYTES - len(frame))
            if not chunk:
                return False
            frame += chunk
    except OSError:
        return False
    return frame[3] == SETTINGS
