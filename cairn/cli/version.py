"""``cairn --version``: of the package, of the protocol, and of everything that is stored."""

from __future__ import annotations

import argparse
from typing import Any

from chunk_store.format.versions import ARCHIVE_VERSION, ENTRY_VERSION, INDEX_VERSION, REDIS_VERSION
from protos import decode_pb2
from serving.process.version import package_version


class PrintVersions(argparse.Action):
    """Prints them and ends."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        protocol = decode_pb2.DESCRIPTOR.package
        print(f"cairn {package_version()}")
        print(f"protocol {protocol}")
        print(f"store entry {ENTRY_VERSION}, index {INDEX_VERSION}, redis {REDIS_VERSION}, archive {ARCHIVE_VERSION}")
        parser.exit()
