"""Real servers on free loopback ports, started and stopped by their own handle."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

PASSWORD = "s3cret"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for_port(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with {process.returncode}: {log.read_text()[-2000:]}")
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.02)
    raise RuntimeError(f"no server on port {port}: {log.read_text()[-2000:]}")


@dataclass
class Server:
    """A child process that listens on ``port``."""

    command: list[str]
    port: int
    root: Path
    process: subprocess.Popen[bytes] | None = field(default=None)

    def start(self) -> None:
        log = self.root / "log"
        with open(log, "ab") as output:
            self.process = subprocess.Popen(self.command, cwd=self.root, stdout=output, stderr=output)
        wait_for_port(self.port, self.process, log)

    def kill(self) -> None:
        """kill -9"""
        if self.process is not None:
            self.process.kill()
            self.process.wait(10)
            self.process = None


def redis_server(root: Path, *options: str) -> Server:
    """Redis with a password; what it has survives ``kill`` and ``start`` with ``--appendonly yes``."""
    port = free_port()
    where = ["--port", str(port), "--bind", "127.0.0.1", "--dir", str(root), "--save", ""]
    return Server(["redis-server", *where, "--requirepass", PASSWORD, "--loglevel", "warning", *options], port, root)


def redis_url(server: Server, prefix: str = "cairn") -> str:
    return f"redis://:{PASSWORD}@127.0.0.1:{server.port}/0?prefix={prefix}"


def tls_server(root: Path) -> Server:
    """Redis that speaks TLS only, with a certificate made here."""
    make_certificate(root)
    server = redis_server(root)
    files = ["--tls-cert-file", "cert.pem", "--tls-key-file", "key.pem", "--tls-ca-cert-file", "cert.pem"]
    plain = server.command.index("--port")
    server.command[plain] = "--tls-port"
    server.command += ["--port", "0", "--tls-auth-clients", "no", *files]
    return server


def tls_url(server: Server, prefix: str = "cairn") -> str:
    certificate = server.root / "cert.pem"
    return f"rediss://:{PASSWORD}@localhost:{server.port}/0?prefix={prefix}&ca={certificate}"


def make_certificate(root: Path) -> None:
    openssl = shutil.which("openssl")
    assert openssl, "openssl is needed to make a certificate for the TLS test"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    files = ["-keyout", str(root / "key.pem"), "-out", str(root / "cert.pem")]
    command = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *subject, *files]
    subprocess.run(command, check=True, capture_output=True)
