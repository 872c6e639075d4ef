"""Requests: followed, or refused by the field's name. Answers: in OpenAI's shapes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from vlmamba.inference import Sampling
from vlmamba.serving.errors import RequestError
from vlmamba.serving.protocol import MAX_PICTURES, PictureLink, Usage, Writer, parse_request

HELLO = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
USER = {"role": "user"}


def image(url: Any = "data:,", **more: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, **more}}


def refusal(body: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        parse_request(body, "m")
    return caught.value


# ---------------------------------------------------------------------- what is followed


def test_the_least() -> None:
    request = parse_request(HELLO, "m")
    assert request.messages == ({"role": "user", "content": "hello"},)
    assert request.sampling == Sampling()
    assert (request.choices, request.stream, request.include_usage) == (1, False, False)


def test_all_that_is_followed() -> None:
    fields = {
        "max_tokens": 9, "temperature": 1, "top_p": 0.5, "top_k": 3, "seed": -4, "stop": ["a", "b"], "n": 2,
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    request = parse_request(HELLO | fields, "m")
    assert request.sampling == Sampling(9, 1.0, 0.5, 3, -4, ("a", "b"))
    assert (request.choices, request.stream, request.include_usage) == (2, True, True)
    assert parse_request(HELLO | {"stop": "a", "max_completion_tokens": 3}, "m").sampling == Sampling(3, stop=("a",))


def test_nothing_asked_for_is_as_nothing_said() -> None:
    nulls = dict.fromkeys(("temperature", "stop", "tools", "seed", "n", "stream", "stream_options", "nonsense"))
    neutral = {
        "tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "logprobs": False, "logit_bias": {},
        "frequency_penalty": 0.0, "presence_penalty": 0, "user": "u", "store": True, "metadata": {"a": "b"},
    }  # fmt: skip
    assert parse_request(HELLO | nulls, "m") == parse_request(HELLO | neutral, "m") == parse_request(HELLO, "m")


def test_messages() -> None:
    echoed = {"role": "assistant", "content": "yes", "refusal": None, "tool_calls": None, "annotations": []}
    text = {"type": "text", "text": "<image>?"}
    body = {
        "model": "m",
        "messages": [
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": [image("u:1", detail="high"), text, image("u:2")]},
            echoed,
            {"role": "user", "content": "why?"},
        ],
    }
    request = parse_request(body, "m")
    assert [message["role"] for message in request.messages] == ["system", "user", "assistant", "user"]
    links = [PictureLink("u:1", "messages[1].content[0]"), PictureLink("u:2", "messages[1].content[2]")]
    assert request.links() == links
    shown = request.with_pictures(["first", "second"])
    assert shown[1]["content"] == [
        {"type": "image", "image": "first"},
        text,
        {"type": "image", "image": "second"},
    ]
    assert [message["content"] for message in (shown[0], *shown[2:])] == ["be brief", "yes", "why?"]
    assert request.links() == links  # as it was


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"max_tokens": 0}, "max_tokens", "max_tokens is 0; expected a whole number from 1"),
        ({"max_completion_tokens": 1.5}, "max_completion_tokens", "is 1.5"),
        ({"max_tokens": 10**9}, "max_tokens", "to 32768"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "give one of them"),
        ({"temperature": "hot"}, "temperature", "temperature is 'hot'; expected a number from 0 to 2"),
        ({"temperature": 2.1}, "temperature", "2.1"),
        ({"temperature": float("nan")}, "temperature", "nan"),
        ({"temperature": True}, "temperature", "True"),
        ({"top_p": 0}, "top_p", "top_p is 0.0; expected above 0"),
        ({"top_p": 1.1}, "top_p", "from 0 to 1"),
        ({"top_k": -1}, "top_k", "-1"),
        ({"seed": "x"}, "seed", "'x'"),
        ({"seed": 10**60}, "seed", "expected a whole number"),
        ({"stop": ""}, "stop[0]", "1 to 256 characters"),
        ({"stop": ["a"] * 5}, "stop", "up to 4"),
        ({"stop": ["a", 1]}, "stop[1]", "stop[1] is 1"),
        ({"stop": {}}, "stop", "a string or a list"),
        ({"n": 9}, "n", "from 1 to 8"),
        ({"n": 0}, "n", "n is 0"),
        ({"n": True}, "n", "True"),
        ({"stream": "yes"}, "stream", "true or false"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "without stream"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage", "true or false"),
        ({"stream": True, "stream_options": {"other": 1}}, "stream_options", "include_usage"),
        ({"tools": [{"type": "function"}]}, "tools", "does not support; leave it out, or give []"),
        ({"tool_choice": "auto"}, "tool_choice", "'none'"),
        ({"response_format": {"type": "json_object"}}, "response_format", "{'type': 'text'}"),
        ({"logprobs": True}, "logprobs", "does not support"),
        ({"top_logprobs": 2}, "top_logprobs", "does not support"),
        ({"audio": {"voice": "x"}}, "audio", "leave it out"),
        ({"modalities": ["audio"]}, "modalities", "does not support"),
        ({"frequency_penalty": 0.1}, "frequency_penalty", "0.1"),
        ({"presence_penalty": -1}, "presence_penalty", "-1"),
        ({"logit_bias": {"1": 2}}, "logit_bias", "does not support"),
        ({"temprature": 1}, "temprature", "'temprature' is unknown"),
        ({"min_p": 0.1}, "min_p", "unknown"),
        ({"model": 1}, "model", "expected 'm'"),
        ({"messages": []}, "messages", "at least one"),
        ({"messages": "hello"}, "messages", "a list"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_fields(fields: dict[str, Any], param: str, words: str) -> None:
    error = refusal(HELLO | fields)
    assert (error.param, error.status, error.kind) == (param, 400, "invalid_request_error")
    assert words in str(error)


@pytest.mark.parametrize(
    ("message", "param", "words"),
    [
        ("hello", "messages[0]", "an object with role and content"),
        ({"content": "x"}, "messages[0].role", "role is None; expected one of system, developer, user, assistant"),
        ({"role": "tool", "content": "x"}, "messages[0].role", "'tool'"),
        ({"role": ["user"], "content": "x"}, "messages[0].role", "['user']"),
        (USER, "messages[0].content", "None"),
        (USER | {"content": []}, "messages[0].content", "[]"),
        (USER | {"content": 3}, "messages[0].content", "3"),
        (USER | {"content": "x", "name": "Ada"}, "messages[0].name", "'name'"),
        ({"role": "assistant", "content": "x", "tool_calls": [1]}, "messages[0].tool_calls", "does not support"),
        (USER | {"content": ["x"]}, "messages[0].content[0]", "'x'"),
        (USER | {"content": [{"type": "input_audio"}]}, "messages[0].content[0]", "'text' or 'image_url'"),
        (USER | {"content": [{"type": "image", "image": "/etc/passwd"}]}, "messages[0].content[0]", "'image_url'"),
        (USER | {"content": [{"type": "text"}]}, "messages[0].content[0]", "text"),
        (USER | {"content": [{"type": "text", "text": 1}]}, "messages[0].content[0]", "1"),
        (USER | {"content": [{"type": "image_url", "image_url": "u"}]}, "messages[0].content[0]", '{"url": "data:'),
        (USER | {"content": [image(), image(7)]}, "messages[0].content[1].image_url.url", "is 7"),
        (USER | {"content": [image(detail="best")]}, "messages[0].content[0].image_url.detail", "auto, low or high"),
        (USER | {"content": [image(size=1)]}, "messages[0].content[0]", "size"),
        ({"role": "system", "content": [image()]}, "messages[0].content[0]", "only user messages"),
        (USER | {"content": [image()] * (MAX_PICTURES + 1)}, "messages", f"{MAX_PICTURES + 1} images"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_messages_that_are_none(message: Any, param: str, words: str) -> None:
    error = refusal(HELLO | {"messages": [message]})
    assert error.param == param
    assert words in str(error)


def test_what_is_missing_or_elsewhere() -> None:
    assert refusal({"messages": []}).code == "missing_required_parameter"
    assert refusal({"model": "m"}).param == "messages"
    error = refusal(HELLO | {"model": "gpt"})
    assert (error.status, error.code) == (404, "model_not_found")
    assert refusal([1]).param is None


def test_refusals_stay_short() -> None:
    long = "x" * 10**6
    nested: Any = 0
    for _ in range(900):
        nested = [nested]
    for fields in ({long: 1}, {"temperature": long}, {"tools": nested}, {"messages": [[long] * 99]}, {"model": long}):
        error = refusal(HELLO | fields)
        assert len(json.dumps(error.body())) < 800


# ---------------------------------------------------------------------- answers


def test_a_response() -> None:
    writer = Writer("m")
    body = writer.response([("yes", "stop"), ("no", "length")], Usage(prompt=5, cached=4, completion=2))
    assert body["id"] == writer.id
    assert [choice["finish_reason"] for choice in body["choices"]] == ["stop", "length"]
    assert [choice["message"]["content"] for choice in body["choices"]] == ["yes", "no"]
    assert body["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": 2,
        "total_tokens": 7,
        "prompt_tokens_details": {"cached_tokens": 4},
    }
    assert Writer("m").id != writer.id


def test_chunks() -> None:
    writer = Writer("m", include_usage=True)
    chunks = [writer.first_chunk(1), writer.text_chunk(1, "yes"), writer.last_chunk(1, "length")]
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": ""},
        {"content": "yes"},
        {},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, "length"]
    assert all(chunk["usage"] is None and chunk["choices"][0]["index"] == 1 for chunk in chunks)
    last = writer.usage_chunk(Usage(1, 0, 2))
    assert last["choices"] == []
    assert last["usage"]["total_tokens"] == 3
    assert "usage" not in Writer("m").text_chunk(0, "yes")
