"""The application behind a real server: answers, streams, cancellation, the door, and every way to be refused."""

from __future__ import annotations

import base64
import io
import json
import logging
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import httpx
import pytest
from engines import CannedEngine, eventually, serving
from PIL import Image

from vlmamba.serving import app as application
from vlmamba.serving.app import create_app, prometheus
from vlmamba.serving.fetch import Limits


def picture(colour: str = "red", size: tuple[int, int] = (4, 3)) -> str:
    stream = io.BytesIO()
    Image.new("RGB", size, colour).save(stream, "PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def asking(text: str = "what?", *images: str, **fields: Any) -> dict[str, Any]:
    parts = [{"type": "image_url", "image_url": {"url": image}} for image in images]
    content = [*parts, {"type": "text", "text": text}]
    return {"model": "canned", "messages": [{"role": "user", "content": content}], **fields}


def head(length: int) -> bytes:
    """How a request begins whose body has this length."""
    lines = ("POST /v1/chat/completions HTTP/1.1", "Host: x", "Content-Type: application/json")
    return "\r\n".join([*lines, f"Content-Length: {length}", "", ""]).encode()


def events(text: str) -> list[Any]:
    """A stream's data, parsed but for the last."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


@pytest.fixture(scope="module")
def engine() -> CannedEngine:
    return CannedEngine()


@pytest.fixture(scope="module")
def client(engine: CannedEngine) -> Iterator[httpx.Client]:
    with serving(create_app(engine, pictures=Limits(remote=False, max_bytes=1000), max_body=10_000)) as client:
        yield client


def refused(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error of a refusal, which has OpenAI's form."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert "Traceback" not in response.text
    return error


# ---------------------------------------------------------------------- answers


def test_an_answer(client: httpx.Client, engine: CannedEngine) -> None:
    body = asking("what?", picture("red"), temperature=0.5, stop="x", max_completion_tokens=9)
    response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200
    answer = response.json()
    assert answer["id"].startswith("chatcmpl-")
    assert (answer["object"], answer["model"]) == ("chat.completion", "canned")
    [choice] = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": "a red square", "refusal": None}
    assert (choice["index"], choice["finish_reason"]) == (0, "stop")
    assert answer["usage"] == {
        "prompt_tokens": 7,
        "completion_tokens": 3,
        "total_tokens": 10,
        "prompt_tokens_details": {"cached_tokens": 3},
    }
    [message], sampling = engine.asked[-1]
    image, text = message["content"]
    assert (message["role"], image["type"], text) == ("user", "image", {"type": "text", "text": "what?"})
    assert image["image"].size == (4, 3)
    assert image["image"].getpixel((0, 0)) == (255, 0, 0)
    assert (sampling.temperature, sampling.stop, sampling.max_new_tokens) == (0.5, ("x",), 9)


def test_several_answers_draw_with_seeds_of_their_own(client: httpx.Client, engine: CannedEngine) -> None:
    answer = client.post("/v1/chat/completions", json=asking(n=3, seed=5)).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert [sampling.seed for _, sampling in engine.asked[-3:]] == [5, 6, 7]
    assert answer["usage"]["completion_tokens"] == 9
    assert answer["usage"]["prompt_tokens"] == 7


def test_a_stream(client: httpx.Client) -> None:
    body = asking(stream=True, stream_options={"include_usage": True}, n=2)
    response = client.post("/v1/chat/completions", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, last = events(response.text)
    assert {chunk["object"] for chunk in [*chunks, last]} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in [*chunks, last]}) == 1
    for index in range(2):
        choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert choices[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(choice["delta"].get("content", "") for choice in choices) == "a red square"
        assert [choice["finish_reason"] for choice in choices] == [None] * 4 + ["stop"]
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 6


def test_a_stream_without_usage_has_none(client: httpx.Client) -> None:
    chunks = events(client.post("/v1/chat/completions", json=asking(stream=True)).text)
    assert all("usage" not in chunk and len(chunk["choices"]) == 1 for chunk in chunks)


def test_a_stream_comes_as_it_is_made() -> None:
    engine = CannedEngine(["one", "two"])
    engine.go.clear()
    with (
        serving(create_app(engine)) as client,
        client.stream("POST", "/v1/chat/completions", json=asking(stream=True)) as response,
    ):
        lines = response.iter_lines()
        assert '"role":"assistant"' in next(lines)
        engine.go.set()
        assert list(lines)[-2] == "data: [DONE]"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("begun", [False, True])
def test_an_answer_that_nobody_waits_for_is_cancelled(stream: bool, begun: bool) -> None:
    engine = CannedEngine(["word "] * 1000, pause=0.01)
    if not begun:
        engine.go.clear()
    with serving(create_app(engine)) as client:
        port = client.base_url.port
        body = json.dumps(asking(stream=stream, n=2)).encode()
        with socket.create_connection(("127.0.0.1", port)) as caller:
            caller.sendall(head(len(body)) + body)
            if stream:
                assert caller.recv(100).startswith(b"HTTP/1.1 200")
            assert eventually(lambda: len(engine.answers) == 2)
            assert not any(answer.cancelled for answer in engine.answers)
        assert eventually(lambda: all(answer.cancelled for answer in engine.answers))
        engine.go.set()


def test_what_fails_half_way(caplog: pytest.LogCaptureFixture) -> None:
    engine = CannedEngine()
    engine.end = ("error", "out of memory at /secret/place")
    with serving(create_app(engine)) as client:
        error = refused(client.post("/v1/chat/completions", json=asking()), 500)
        streamed = client.post("/v1/chat/completions", json=asking(stream=True))
    assert "secret" not in str(error)
    assert "an answer failed after 3 tokens: out of memory at /secret/place" in caplog.text
    *_, last = [line for line in streamed.text.split("\n\n") if line]
    assert json.loads(last.removeprefix("data: "))["error"]["type"] == "server_error"


def test_an_engine_that_ends(caplog: pytest.LogCaptureFixture) -> None:
    engine = CannedEngine()
    engine.end = ("cancelled",)
    with serving(create_app(engine)) as client:
        assert refused(client.post("/v1/chat/completions", json=asking()), 503)["code"] == "cancelled"


# ---------------------------------------------------------------------- other routes


def test_models_health_metrics(client: httpx.Client) -> None:
    [model] = client.get("/v1/models").json()["data"]
    assert (model["id"], model["object"]) == ("canned", "model")
    assert client.get("/health").json() == {"status": "ok"}
    metrics = client.get("/metrics")
    assert metrics.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert "# TYPE vlmamba_running gauge\nvlmamba_running 1\n" in metrics.text


def test_prometheus() -> None:
    assert prometheus({"a_total": 2.5, "b": 0}) == (
        "# TYPE vlmamba_a_total counter\nvlmamba_a_total 2.5\n# TYPE vlmamba_b gauge\nvlmamba_b 0\n"
    )


# ---------------------------------------------------------------------- refusals


def test_the_key() -> None:
    with serving(create_app(CannedEngine(), api_key="sésame")) as client:
        right = {"Authorization": "Bearer sésame".encode()}
        assert client.get("/v1/models", headers=right).status_code == 200
        assert client.get("/health").status_code == 200
        for wrong in ({}, {"Authorization": "Bearer sesame"}, {"Authorization": "Basic sésame".encode()}):
            for path in ("/v1/models", "/metrics"):
                error = refused(client.get(path, headers=wrong), 401)
                assert error["code"] == "invalid_api_key"
            response = client.post("/v1/chat/completions", json=asking(), headers=wrong)
            refused(response, 401)
            assert response.headers["www-authenticate"] == "Bearer"


def test_paths_and_methods_that_are_not_there(client: httpx.Client) -> None:
    assert "/v1/completions" in refused(client.post("/v1/completions", json={}), 404)["message"]
    refused(client.get("/docs"), 404)
    response = client.get("/v1/chat/completions")
    refused(response, 405)
    assert response.headers["allow"] == "POST"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "not JSON"),
        (b"", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b'{"model": "\xed\xa0\x80"}', "not JSON"),
        (b'{"model": "\\ud800"}', "surrogates"),
        (b'{"model": "canned", "temperature": NaN}', "NaN is not a number"),
        (b'{"seed": ' + b"1" * 6000 + b"}", "not JSON"),
        (b"[" * 9000, "not JSON"),
        (b"[]", "expected a JSON object"),
        (b'{"messages": []}', "model is missing"),
    ],
    ids=range(10),
)
def test_bodies_that_are_no_request(client: httpx.Client, content: bytes, words: str) -> None:
    response = client.post("/v1/chat/completions", content=content, headers={"Content-Type": "application/json"})
    assert words in refused(response, 400)["message"]


def test_only_json_is_taken(client: httpx.Client) -> None:
    content = json.dumps(asking()).encode()
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        response = client.post("/v1/chat/completions", content=content, headers={"Content-Type": kind})
        assert kind in refused(response, 415)["message"]
    kind = "application/json; charset=utf-8"
    assert client.post("/v1/chat/completions", content=content, headers={"Content-Type": kind}).status_code == 200


def test_a_model_that_is_not_here(client: httpx.Client) -> None:
    error = refused(client.post("/v1/chat/completions", json=asking() | {"model": "other"}), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")


def test_bodies_that_are_too_large(client: httpx.Client) -> None:
    refused(client.post("/v1/chat/completions", json=asking("a" * 10_000)), 413)
    kind = {"Content-Type": "application/json"}
    response = client.post("/v1/chat/completions", content=iter([b" " * 6000] * 2), headers=kind)  # no length is given
    assert refused(response, 413)["code"] == "request_too_large"


def test_bodies_that_do_not_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(application, "BODY_SECONDS", 0.2)
    with (
        serving(create_app(CannedEngine())) as client,
        socket.create_connection(("127.0.0.1", client.base_url.port or 0)) as caller,
    ):
        caller.sendall(head(9) + b"{")
        assert caller.recv(100).startswith(b"HTTP/1.1 408")


def test_pictures_that_are_none(client: httpx.Client) -> None:
    for image, words in (
        ("http://example.org/a.png", "fetches nothing"),
        ("file:///etc/passwd", "not a picture's address"),
        ("/etc/passwd", "not a picture's address"),
        ("data:image/png;base64,AAAA", "not an image"),
        ("data:image/png;base64," + "A" * 2000, "more than 1000 bytes"),
    ):
        error = refused(client.post("/v1/chat/completions", json=asking("what?", picture(), image)), 400)
        assert error["param"] == "messages[0].content[1]"
        assert words in error["message"]


def test_slow_hosts_hold_up_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(application, "FETCHES", 1)
    engine = CannedEngine()
    limits = Limits(seconds=1, allowed_hosts=frozenset({"127.0.0.1"}))
    with socket.create_server(("127.0.0.1", 0)) as silent, serving(create_app(engine, pictures=limits)) as client:
        slow = asking("slow", f"http://127.0.0.1:{silent.getsockname()[1]}/a.png")
        with ThreadPoolExecutor(1) as other:
            waiting = other.submit(client.post, "/v1/chat/completions", json=slow)
            caller, _ = silent.accept()
            with caller:
                assert client.post("/v1/chat/completions", json=asking("quick", picture())).status_code == 200
                assert not waiting.done()
                wait([waiting])
            assert "too long" in refused(waiting.result(), 400)["message"]


def test_what_the_template_does_not_take() -> None:
    engine = CannedEngine()
    engine.refusal = ValueError("message 2 has role 'system'")
    with serving(create_app(engine)) as client:
        error = refused(client.post("/v1/chat/completions", json=asking()), 400)
        assert (error["param"], error["message"]) == ("messages", "message 2 has role 'system'")


def test_overload_takes_back_what_was_begun() -> None:
    engine = CannedEngine(["word "] * 1000, pause=0.01, room=1)
    with serving(create_app(engine)) as client:
        response = client.post("/v1/chat/completions", json=asking(n=2))
        assert refused(response, 429)["code"] == "overloaded"
        assert response.headers["retry-after"] == "1"
        assert engine.answers[0].cancelled


def test_our_own_mistakes_are_a_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    engine = CannedEngine()
    engine.refusal = KeyError("secret")
    with caplog.at_level(logging.INFO), serving(create_app(engine)) as client:
        response = client.post("/v1/chat/completions", json=asking())
    assert "secret" not in refused(response, 500)["message"]
    [record] = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert record.getMessage() == "/v1/chat/completions: KeyError: 'secret'"
    assert record.exc_info in (None, False)


# ---------------------------------------------------------------------- the engine


def test_the_real_engine(tiny_model: Path) -> None:
    pytest.importorskip("vlmamba.inference.engine")
    from vlmamba.commands.load import load
    from vlmamba.inference import Engine

    loaded = load(str(tiny_model), "cpu", "float32")
    engine = Engine(loaded.model, loaded.processor, name="canned", slots=4)
    try:
        with serving(create_app(engine)) as client:
            body = asking("what is <image>?", picture(), max_tokens=5, n=2, temperature=1, seed=1)
            first, second = (client.post("/v1/chat/completions", json=body).json() for _ in range(2))
            assert [choice["message"] for choice in first["choices"]] == [
                choice["message"] for choice in second["choices"]
            ]
            assert 2 <= first["usage"]["completion_tokens"] <= 10
            streamed = events(client.post("/v1/chat/completions", json=body | {"stream": True, "n": 1}).text)
            text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in streamed)
            assert text == first["choices"][0]["message"]["content"]
            late = {"role": "system", "content": "be brief"}
            messages = [*body["messages"], late]
            assert (
                "system"
                in refused(client.post("/v1/chat/completions", json=body | {"messages": messages}), 400)["message"]
            )
            assert "vlmamba_requests_total" in client.get("/metrics").text
    finally:
        engine.close()
