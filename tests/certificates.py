"""Self-signed certificates for loopback, made by openssl."""

from __future__ import annotations

import subprocess
from pathlib import Path


def certificate(directory: Path, name: str = "cairn") -> tuple[Path, Path]:
    """A fresh certificate for 127.0.0.1 and localhost and its key, as PEM files."""
    cert, key = directory / f"{name}-cert.pem", directory / f"{name}-key.pem"
    command = (
        f"openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN={name} "
        f"-addext subjectAltName=IP:127.0.0.1,DNS:localhost -keyout {key} -out {cert}"
    )
    subprocess.run(command.split(), check=True, capture_output=True)
    return cert, key
