"""The end of a server, and `vlmamba serve`."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from engines import CannedEngine, eventually

from vlmamba import cli
from vlmamba.serving import server
from vlmamba.serving.app import create_app

HELLO = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 3}


@pytest.fixture(autouse=True)
def heeds_interrupts() -> Iterator[None]:
    """As at a terminal; a job in the background of a shell begins with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as door:
        port: int = door.getsockname()[1]
        return port


@contextlib.contextmanager
def visitor(port: int, visit: Callable[[httpx.Client], Any]) -> Iterator[list[Any]]:
    """Does something at a server that the caller runs on the main thread, and then interrupts it; what came of it."""
    seen: list[Any] = []

    def go() -> None:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20) as client:
            eventually(lambda: is_up(client), 60)
            try:
                seen.append(visit(client))
            finally:
                os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=go)
    thread.start()
    yield seen
    thread.join()


def is_up(client: httpx.Client) -> bool:
    with contextlib.suppress(httpx.ConnectError):
        return client.get("/health").status_code == 200
    return False


def test_answers_under_way_end_with_the_server(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """Nobody waits forever, streams are told, and nothing alarming is printed."""
    monkeypatch.setattr(server, "PATIENCE", 0.3)
    engine, streamed = CannedEngine(["word "] * 10_000, pause=0.02), []
    body = HELLO | {"model": "canned", "stream": True}

    def stream() -> None:
        streamed.append(httpx.post(f"http://127.0.0.1:{door.getsockname()[1]}/v1/chat/completions", json=body).text)

    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        listener = threading.Thread(target=stream)

        def begin(client: httpx.Client) -> None:
            listener.start()
            assert eventually(lambda: len(engine.answers) == 1)

        with visitor(door.getsockname()[1], begin), pytest.raises(KeyboardInterrupt):
            server.run(create_app(engine), engine, door)
        listener.join()
    [text] = streamed
    *_, last = text.strip().split("\n\n")
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "cancelled"
    assert "Traceback" not in capfd.readouterr().err + caplog.text


def test_serve(tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("vlmamba.inference.engine")
    monkeypatch.setenv("VLMAMBA_API_KEY", "sesame")
    port, name = free_port(), tiny_model.name

    def visit(client: httpx.Client) -> list[int]:
        headers = {"Authorization": "Bearer sesame"}
        ask = HELLO | {"model": name}
        return [
            client.post("/v1/chat/completions", json=ask).status_code,
            client.post("/v1/chat/completions", json=ask, headers=headers).status_code,
        ]

    with visitor(port, visit) as seen:
        code = cli.main(["serve", str(tiny_model), "--port", str(port), "--device", "cpu", "--slots", "2"])
    assert (code, seen) == (130, [[401, 200]])
    assert f"vlmamba: {name} on cpu at http://127.0.0.1:{port}/v1\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--port", "70000"], "--port 70000: expected 0"),
        (["--slots", "0"], "--slots 0: at least 1"),
        (["--host", "192.0.2.1"], "--host 192.0.2.1 --port 8000 cannot be had"),
        (["--port", "TAKEN"], "cannot be had: Address already in use"),
        (["--port", "0", "--model", "x"], "--model"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes(capsys: pytest.CaptureFixture[str], options: list[str], words: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as door:
        given = [str(door.getsockname()[1]) if option == "TAKEN" else option for option in options]
        assert cli.main(["serve", "/no/such/model", *given]) == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("package", ["fastapi", "uvicorn"])
def test_without_the_packages(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], package: str
) -> None:
    for module in [name for name in sys.modules if name.startswith("vlmamba.serving")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    assert cli.main(["serve"]) == 2
    assert f'{package} is not installed, which serving needs: pip install "vlmamba[serve]"' in capsys.readouterr().err
