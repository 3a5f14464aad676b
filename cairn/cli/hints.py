"""What a person may do about a service that did not answer. Looks at the address itself; sends no request."""

from __future__ import annotations

import socket
import ssl
from pathlib import Path

from cairn.client.errors import CairnError, Unavailable
from serving.rpc.addresses import host_and_port, is_loopback

PROBE_TIMEOUT_S = 2.0


def hint(error: CairnError, addresses: tuple[str, ...], tls_ca: Path | None) -> str:
    """Why one of ``addresses`` could not be reached and what to do, as one line; "" if nothing is known."""
    if not isinstance(error, Unavailable):
        return ""
    named = error.source.replace(",", "").split()
    address = next((address for address in addresses if address in named), "")
    return reachability(address, tls_ca) if address else ""


def reachability(address: str, tls_ca: Path | None) -> str:
    """What stands between this machine and ``HOST:PORT``; "" if nothing does, or if the address is of another form."""
    host, port = host_and_port(address)
    if not host or not port.isdigit():
        return ""
    try:
        with socket.create_connection((host, int(port)), PROBE_TIMEOUT_S) as connection:
            connection.settimeout(PROBE_TIMEOUT_S)
            return _secured(connection, host, address, tls_ca)
    except ConnectionRefusedError:
        if is_loopback(host):
            return f"nothing listens on {address}; start both services with: cairn up --model PATH"
        return f"nothing listens on {address}; is the service up, and is that its address?"
    except socket.gaierror:
        return f"the name {host} is not known; check --prefill, --decode and CAIRN_PREFILL, CAIRN_DECODE"
    except OSError:
        return ""


def _secured(connection: socket.socket, host: str, address: str, tls_ca: Path | None) -> str:
    """Whether the listener's TLS is what the caller took it for."""
    context = ssl.create_default_context(cafile=None if tls_ca is None else str(tls_ca))
    context.set_alpn_protocols(["h2"])
    if tls_ca is None:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    try:
        with context.wrap_socket(connection, server_hostname=host):
            return f"{address} speaks TLS: give --tls-ca FILE" if tls_ca is None else ""
    except ssl.SSLCertVerificationError as error:
        return f"{address} has a certificate that --tls-ca {tls_ca} does not vouch for: {error.verify_message}"
    except (ssl.SSLError, OSError):
        return "" if tls_ca is None else f"{address} does not speak TLS: leave out --tls-ca"
