"""Real servers on free loopback ports, started and stopped by their own handle."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import pytest

from cairn.local.processes import free_port

ROOT = Path(__file__).parents[2]
PASSWORD = "s3cret"


def need_redis() -> None:
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not installed (Debian: apt-get install redis-server)")


def need_mooncake() -> None:
    try:
        import mooncake.store  # noqa: F401
    except ImportError as error:
        pytest.skip(f"Mooncake's client does not load ({error}): pip install 'cairn[mooncake]', libibverbs1")


def running(server: Server) -> Iterator[Server]:
    server.start()
    yield server
    server.kill()


def wait_until_up(port: int, says: bytes, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until something listens on ``port`` or, where ``says`` is given, until the log has these words."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with {process.returncode}: {log.read_text()[-2000:]}")
        if says:
            if says in log.read_bytes():
                return
        else:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return
        time.sleep(0.02)
    raise RuntimeError(f"the server is not up: {log.read_text()[-2000:]}")


@dataclass
class Server:
    """A child process that listens on ``port``, or is up when it ``says`` so."""

    command: list[str]
    port: int
    root: Path
    says: bytes = b""
    process: subprocess.Popen[bytes] | None = field(default=None)

    def start(self) -> None:
        log = self.root / "log"
        with open(log, "wb") as output:
            environment = {**os.environ, "PYTHONPATH": str(ROOT)}
            self.process = subprocess.Popen(self.command, cwd=self.root, stdout=output, stderr=output, env=environment)
        try:
            wait_until_up(self.port, self.says, self.process, log)
        except RuntimeError:
            self.kill()
            raise

    def kill(self) -> None:
        """kill -9"""
        if self.process is not None:
            self.process.kill()
            self.process.wait(10)
            self.process = None


def redis_server(root: Path, *options: str) -> Server:
    """Redis with a password; what it has survives ``kill`` and ``start`` with ``--appendonly yes``."""
    port = free_port("127.0.0.1")
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


@dataclass
class Mooncake:
    """A master and one owner of memory, with Redis for the metadata."""

    master: Server
    owner: Server
    redis: Server

    def start(self) -> None:
        self.master.start()
        try:
            self.owner.start()
        except RuntimeError:
            self.master.kill()
            raise

    def kill(self) -> None:
        self.owner.kill()
        self.master.kill()


def mooncake(root: Path, redis: Server, memory_gib: float = 0.5) -> Mooncake:
    port, metrics = free_port("127.0.0.1"), free_port("127.0.0.1")
    program = Path(sys.executable).parent / "mooncake_master"
    loopback = ["--rpc_address=127.0.0.1", f"--rpc_port={port}"]
    quiet = [
        "--metrics_host=127.0.0.1",
        f"--metrics_port={metrics}",
        "--client_ttl=3",
        "--put_start_discard_timeout_sec=2",
        "--put_start_release_timeout_sec=3",
    ]
    (root / "owner").mkdir()
    lend = ["-m", "chunk_store.mooncake.lender", "--master", f"127.0.0.1:{port}", "--memory", f"{memory_gib}GiB"]
    return Mooncake(
        Server([str(program), *loopback, *quiet], port, root),
        Server([sys.executable, *lend], 0, root / "owner", says=b"lending"),
        redis,
    )


def mooncake_url(cluster: Mooncake, prefix: str = "mooncake") -> str:
    metadata = quote(redis_url(cluster.redis, prefix), safe="")
    return f"mooncake://127.0.0.1:{cluster.master.port}?redis={metadata}&buffer_mib=64"
