"""What an installation of the client and the command line alone lacks, and what brings it: an extra."""

from __future__ import annotations

from importlib.util import find_spec

SERVER = (  # what the extra brings, by the names that are imported
    *("torch", "transformers", "tokenizers", "safetensors", "numpy", "llguidance"),
    *("grpc_reflection", "prometheus_client", "xxhash"),
)
HTTP = ("starlette", "uvicorn", "prometheus_client")
OTHERS = {"httpx": "load", "matplotlib": "plot"}  # packages of smaller extras


def require_server() -> None:
    """Raises ``ModuleNotFoundError`` for what the services need and this installation lacks; imports nothing."""
    for name in SERVER:
        if find_spec(name) is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def require_http() -> None:
    """The same for the gateway."""
    for name in HTTP:
        if find_spec(name) is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def remedy(missing: ModuleNotFoundError, command: str) -> str:
    """What to install for a package that ``command`` needs; "" for one that no extra of ours brings."""
    package = (missing.name or "").partition(".")[0]
    if package in HTTP and package not in SERVER:
        return f'cairn {command} needs the gateway, and {package} is not installed: pip install "cairn[server,http]"'
    if extra := OTHERS.get(package):
        return f'cairn {command} needs {package} for that, which is not installed: pip install "cairn[{extra}]"'
    if package not in SERVER:
        return ""
    return f'cairn {command} needs the server side, and {package} is not installed: pip install "cairn[server]"'
