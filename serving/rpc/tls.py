"""The files that a server proves with who it is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import grpc


@dataclass(frozen=True)
class TlsFiles:
    """PEM files of the server's certificate chain and private key."""

    cert: Path
    key: Path

    def credentials(self) -> grpc.ServerCredentials:
        """Reads the files. Raises ``OSError``."""
        return grpc.ssl_server_credentials([(self.key.read_bytes(), self.cert.read_bytes())])
