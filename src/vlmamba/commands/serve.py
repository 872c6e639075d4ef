"""`vlmamba serve`: a model behind HTTP."""

from __future__ import annotations

import ipaddress
import os
import socket
import sys

KEY_VARIABLE = "VLMAMBA_API_KEY"


def serve(
    model: str,
    host: str,
    port: int,
    slots: int,
    api_key: str | None,
    no_fetch: bool,
    allow_host: list[str] | None,
    device: str,
    dtype: str,
) -> None:
    """Answers requests until it is interrupted."""
    try:
        from vlmamba.serving.app import create_app
        from vlmamba.serving.server import run
    except ModuleNotFoundError as error:
        if error.name not in ("fastapi", "starlette", "uvicorn"):
            raise
        raise ValueError(f'{error.name} is not installed, which serving needs: pip install "vlmamba[serve]"') from error
    from vlmamba.commands.load import load, name_of
    from vlmamba.inference import Engine
    from vlmamba.serving.fetch import Limits

    if slots < 1:
        raise ValueError(f"--slots {slots}: at least 1 is needed")
    key = api_key or os.environ.get(KEY_VARIABLE) or None
    door = _bind(host, port)  # before the seconds that a model takes to load
    with door:
        print(f"vlmamba: loading {model}", file=sys.stderr, flush=True)
        loaded = load(model, device, dtype)
        name = name_of(model)
        engine = Engine(loaded.model, loaded.processor, name=name, slots=slots)
        try:
            limits = Limits(remote=not no_fetch, allowed_hosts=frozenset(map(str.lower, allow_host or ())))
            app = create_app(engine, pictures=limits, api_key=key)
            print(f"vlmamba: {name} on {loaded.device} at http://{_shown(host)}:{door.getsockname()[1]}/v1", flush=True)
            if key is None and not _is_loopback(host):
                print(f"vlmamba: anybody who reaches {host} may ask: no --api-key, no {KEY_VARIABLE}", file=sys.stderr)
            run(app, engine, door)
        finally:
            engine.close()


def _bind(host: str, port: int) -> socket.socket:
    """A socket that has the address, but takes no connections yet."""
    if not 0 <= port <= 65535:
        raise ValueError(f"--port {port}: expected 0 (any that is free) to 65535")
    door = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        door.bind((host, port))
    except OSError as error:
        door.close()
        raise ValueError(f"--host {host} --port {port} cannot be had: {error.strerror or error}") from error
    return door


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
