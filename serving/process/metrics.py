"""What the process is and uses: memory, processor time, descriptors, and what it was built of."""

from __future__ import annotations

from importlib.metadata import version

import torch
import transformers
from prometheus_client import CollectorRegistry, Gauge, PlatformCollector, ProcessCollector

from serving.process.loading import Loaded
from serving.process.version import package_version

LABELS = ("service", "version", "torch", "transformers", "grpc", "device", "dtype", "model_name", "model_identity")


def add_process_metrics(registry: CollectorRegistry, service: str, loaded: Loaded) -> None:
    """Adds ``process_*``, ``python_info`` and ``cairn_build_info``, which is always 1."""
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    borrowed = loaded.served.borrowed
    told = (service, package_version(), torch.__version__, transformers.__version__, version("grpcio"))
    model = (str(borrowed.device), borrowed.dtype_name, loaded.model_name, loaded.served.identity)
    Gauge("cairn_build_info", "What serves; always 1.", LABELS, registry=registry).labels(*told, *model).set(1)
