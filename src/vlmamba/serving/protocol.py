"""OpenAI's chat completions as they travel: a request's JSON to what the engine takes, answers to JSON.

What a request asks for is followed or refused, never dropped: a field that is not known, or known and not supported,
is an error that names it.
"""

from __future__ import annotations

import reprlib
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vlmamba.inference import Sampling
from vlmamba.serving.errors import RequestError

MAX_CHOICES = 8
MAX_STOPS = 4
MAX_STOP_LENGTH = 256  # characters
MAX_NEW_TOKENS = 32_768
MAX_PICTURES = 64
MAX_SEED = 2**63

# Role on the wire: role of the template.
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}

_FOLLOWED = {
    "model", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "seed", "stop", "n",
    "stream", "stream_options",
}  # fmt: skip
_NOTES = {"user", "store", "metadata", "safety_identifier", "prompt_cache_key"}  # change no answer
# Not supported, and the value (besides null) that asks for nothing.
_UNSUPPORTED: dict[str, Any] = {
    "tools": [], "tool_choice": "none", "parallel_tool_calls": None, "functions": [], "function_call": "none",
    "response_format": {"type": "text"}, "logprobs": False, "top_logprobs": 0, "modalities": ["text"], "audio": None,
    "frequency_penalty": 0, "presence_penalty": 0, "logit_bias": {}, "prediction": None, "reasoning_effort": None,
    "verbosity": None, "web_search_options": None, "service_tier": "auto",
}  # fmt: skip


_IMAGE_SHAPE = '{"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}'
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxdict, _SHORT.maxlist, _SHORT.maxstring = 3, 4, 4, 60


@dataclass(frozen=True)
class PictureLink:
    """A picture that a message refers to. place: its part of the request, such as `messages[0].content[1]`."""

    url: str
    place: str

    @property
    def is_data(self) -> bool:
        """Whether the URL is the picture itself."""
        return self.url[:5].lower() == "data:"


@dataclass(frozen=True)
class ChatRequest:
    """A request as it was meant.

    Attributes:
        messages: as the engine takes them, but the images of their image parts are `PictureLink`s.
        choices: how many answers are wanted.
        stream: in pieces, as they come. include_usage: with the count of tokens at their end.
    """

    messages: tuple[dict[str, Any], ...]
    sampling: Sampling
    choices: int
    stream: bool
    include_usage: bool

    def links(self) -> list[PictureLink]:
        """Its pictures, in reading order."""
        return [part["image"] for part in _parts(self.messages) if part["type"] == "image"]

    def with_pictures(self, images: Sequence[Any]) -> list[dict[str, Any]]:
        """The messages with `images` in the places of `links()`."""
        rest = iter(images)

        def shown(part: dict[str, Any]) -> dict[str, Any]:
            return part | {"image": next(rest)} if part["type"] == "image" else part

        return [
            message
            if isinstance(message["content"], str)
            else message | {"content": [shown(part) for part in message["content"]]}
            for message in self.messages
        ]


def _parts(messages: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    for message in messages:
        if not isinstance(message["content"], str):
            yield from message["content"]


# ---------------------------------------------------------------------- requests


def parse_request(body: Any, model: str) -> ChatRequest:
    """A request's JSON, read for the model that is served under the name `model`. null counts as absent.

    Raises:
        RequestError: what is missing, wrong, unknown or not supported.
    """
    if not isinstance(body, dict):
        raise RequestError(f"the request is {_show(body)}; expected a JSON object", code="invalid_type")
    fields = {name: value for name, value in body.items() if value is not None}
    _check_names(fields)
    _check_model(fields, model)
    stream = _flag(fields, "stream")
    return ChatRequest(
        _messages(fields),
        _sampling(fields),
        _integer(fields, "n", 1, 1, MAX_CHOICES),
        stream,
        _include_usage(fields, stream),
    )


def _check_names(fields: Mapping[str, Any]) -> None:
    for name, value in fields.items():
        if name in _UNSUPPORTED:
            neutral = _UNSUPPORTED[name]
            if value != neutral:
                wanted = "leave it out" if neutral is None else f"leave it out, or give {_show(neutral)}"
                raise RequestError(
                    f"{name} is {_show(value)}, which this server does not support; {wanted}",
                    name,
                    "unsupported_parameter",
                )
        elif name not in _FOLLOWED | _NOTES:
            raise RequestError(
                f"the field {name!r:.80} is unknown; known are {', '.join(sorted(_FOLLOWED))}",
                name[:80],
                "unknown_parameter",
            )


def _check_model(fields: Mapping[str, Any], model: str) -> None:
    asked = _required(fields, "model")
    if not isinstance(asked, str):
        raise RequestError(f"model is {_show(asked)}; expected {model!r}", "model", "invalid_type")
    if asked != model:
        raise RequestError(
            f"the model {asked!r:.200} is not here; this server has {model!r}", "model", "model_not_found", status=404
        )


def _sampling(fields: Mapping[str, Any]) -> Sampling:
    names = [name for name in ("max_completion_tokens", "max_tokens") if name in fields]
    if len(names) == 2 and fields[names[0]] != fields[names[1]]:
        raise RequestError(
            f"max_tokens is {_show(fields['max_tokens'])} and max_completion_tokens "
            f"{_show(fields['max_completion_tokens'])}; they mean the same: give one of them",
            "max_tokens",
        )
    default = Sampling()
    longest = _integer(fields, names[0], 1, 1, MAX_NEW_TOKENS) if names else default.max_new_tokens
    try:
        return Sampling(
            max_new_tokens=longest,
            temperature=_number(fields, "temperature", default.temperature, 0, 2),
            top_p=_number(fields, "top_p", default.top_p, 0, 1),
            top_k=_integer(fields, "top_k", default.top_k, 0, 2**31),
            seed=_integer(fields, "seed", 0, -MAX_SEED, MAX_SEED - 1) if "seed" in fields else None,
            stop=_stops(fields),
        )
    except RequestError:
        raise
    except ValueError as error:  # begins with the field's name
        raise RequestError(str(error), str(error).split()[0]) from error


def _stops(fields: Mapping[str, Any]) -> tuple[str, ...]:
    stops = fields.get("stop", [])
    stops = [stops] if isinstance(stops, str) else stops
    if not isinstance(stops, list) or len(stops) > MAX_STOPS:
        raise RequestError(f"stop is {_show(stops)}; expected a string or a list of up to {MAX_STOPS}", "stop")
    for place, stop in enumerate(stops):
        if not isinstance(stop, str) or not 0 < len(stop) <= MAX_STOP_LENGTH:
            raise RequestError(
                f"stop[{place}] is {_show(stop)}; expected a string of 1 to {MAX_STOP_LENGTH} characters",
                f"stop[{place}]",
            )
    return tuple(stops)


def _include_usage(fields: Mapping[str, Any], stream: bool) -> bool:
    if "stream_options" not in fields:
        return False
    options = fields["stream_options"]
    if not isinstance(options, dict) or set(options) - {"include_usage"}:
        raise RequestError(f'stream_options is {_show(options)}; expected {{"include_usage": true}}', "stream_options")
    if not stream:
        raise RequestError("stream_options is given without stream: true", "stream_options")
    return _flag(options, "include_usage", "stream_options.")


def _messages(fields: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    messages = _required(fields, "messages")
    if not isinstance(messages, list) or not messages:
        raise RequestError(f"messages is {_show(messages)}; expected a list of at least one message", "messages")
    read = tuple(_message(message, f"messages[{number}]") for number, message in enumerate(messages))
    pictures = sum(part["type"] == "image" for part in _parts(read))
    if pictures > MAX_PICTURES:
        raise RequestError(f"messages hold {pictures} images; at most {MAX_PICTURES} are taken", "messages")
    return read


def _message(message: Any, place: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise RequestError(f"{place} is {_show(message)}; expected an object with role and content", place)
    fields = {name: value for name, value in message.items() if value not in (None, [])}  # as clients echo answers
    for name in fields:
        if name not in ("role", "content"):
            raise RequestError(
                f"{place} has {name!r:.80}, which this server does not support; expected role and content",
                f"{place}.{name[:80]}",
                "unsupported_parameter",
            )
    role = fields.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise RequestError(f"{place}.role is {_show(role)}; expected one of {', '.join(_ROLES)}", f"{place}.role")
    content = fields.get("content")
    if isinstance(content, list):
        content = [_part(part, role, f"{place}.content[{number}]") for number, part in enumerate(content)]
    elif not isinstance(content, str):
        raise RequestError(
            f"{place}.content is {_show(message.get('content'))}; expected text or a list of parts", f"{place}.content"
        )
    return {"role": _ROLES[role], "content": content}


def _part(part: Any, role: str, place: str) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        if set(part) != {"type", "text"} or not isinstance(part["text"], str):
            raise RequestError(f'{place} is {_show(part)}; expected {{"type": "text", "text": ...}}', place)
        return {"type": "text", "text": part["text"]}
    if kind == "image_url":
        if role != "user":
            raise RequestError(f"{place} is an image in a message of role {role!r}; only user messages hold any", place)
        return {"type": "image", "image": PictureLink(_url(part, place), place)}
    raise RequestError(f"{place} is {_show(part)}; expected an object of type 'text' or 'image_url'", place)


def _url(part: Mapping[str, Any], place: str) -> str:
    image = part.get("image_url")
    if set(part) != {"type", "image_url"} or not isinstance(image, dict) or set(image) - {"url", "detail"}:
        raise RequestError(f"{place} is {_show(part)}; expected {_IMAGE_SHAPE}", place)
    if not isinstance(image.get("url"), str):
        raise RequestError(
            f"{place}.image_url.url is {_show(image.get('url'))}; expected an address or a data: URL",
            f"{place}.image_url.url",
        )
    # The model sees every picture at one resolution, so that the three differ in nothing.
    if image.get("detail", "auto") not in (None, "auto", "low", "high"):
        raise RequestError(
            f"{place}.image_url.detail is {_show(image['detail'])}; expected auto, low or high",
            f"{place}.image_url.detail",
        )
    url: str = image["url"]
    return url


def _required(fields: Mapping[str, Any], name: str) -> Any:
    if name not in fields:
        raise RequestError(f"{name} is missing", name, "missing_required_parameter")
    return fields[name]


def _flag(fields: Mapping[str, Any], name: str, prefix: str = "") -> bool:
    value = fields.get(name)
    if value is not None and not isinstance(value, bool):
        raise RequestError(f"{prefix}{name} is {_show(value)}; expected true or false", prefix + name, "invalid_type")
    return bool(value)


def _integer(fields: Mapping[str, Any], name: str, default: int, least: int, most: int) -> int:
    value = fields.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise RequestError(f"{name} is {_show(value)}; expected a whole number from {least} to {most}", name)
    return value


def _number(fields: Mapping[str, Any], name: str, default: float, least: float, most: float) -> float:
    value = fields.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise RequestError(f"{name} is {_show(value)}; expected a number from {least:g} to {most:g}", name)
    return float(value)


def _show(value: Any) -> str:
    """A value of JSON in an error message, cut short."""
    return _SHORT.repr(value)


# ---------------------------------------------------------------------- answers


@dataclass(frozen=True)
class Usage:
    """Tokens of a request. prompt: of its prompt, pictures' places included; cached: of these, those that no answer
    had to read again; completion: of all answers together."""

    prompt: int
    cached: int
    completion: int

    def body(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


@dataclass(frozen=True)
class Writer:
    """Writes the answers to one request: as one object, or as a stream's chunks."""

    model: str
    include_usage: bool = False
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def response(self, answers: Sequence[tuple[str, str]], usage: Usage) -> dict[str, Any]:
        """All at once. answers: the text and the finish ("stop", "length") of each."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": text, "refusal": None},
                "logprobs": None,
                "finish_reason": finish,
            }
            for index, (text, finish) in enumerate(answers)
        ]
        return self._object("chat.completion", choices) | {"usage": usage.body()}

    def first_chunk(self, index: int) -> dict[str, Any]:
        """Begins a choice."""
        return self._chunk(index, {"role": "assistant", "content": ""}, None)

    def text_chunk(self, index: int, text: str) -> dict[str, Any]:
        return self._chunk(index, {"content": text}, None)

    def last_chunk(self, index: int, finish: str) -> dict[str, Any]:
        """Ends a choice."""
        return self._chunk(index, {}, finish)

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        """Comes last, where usage was asked for."""
        return self._object("chat.completion.chunk", []) | {"usage": usage.body()}

    def _chunk(self, index: int, delta: dict[str, Any], finish: str | None) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}
        chunk = self._object("chat.completion.chunk", [choice])
        return chunk | {"usage": None} if self.include_usage else chunk

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}


def model_list(model: str, created: int) -> dict[str, Any]:
    """What GET /v1/models gives."""
    return {
        "object": "list",
        "data": [{"id": model, "object": "model", "created": created, "owned_by": "vlmamba"}],
    }
