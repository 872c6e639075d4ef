"""The two prompt templates of the paper, as pieces: text, image places and ends of answers.

A prompt is a list of pieces, not a string, so that text stays text: `<image>` or any special token that a user writes
is never parsed. The processor turns pieces into token ids.

`plain` (stage 1): image, caption, end. `v1` (stage 2 and all use), as LLaVA-1.5 has it:

    SYSTEM USER: <image>\\nquestion ASSISTANT: answer<end>USER: question ASSISTANT: answer<end>

With `image_place` "after": USER: question\\n<image> ASSISTANT: ...
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
TEMPLATES = ("plain", "v1")
PLACEHOLDER = "<image>"


class Piece(NamedTuple):
    """A stretch of a prompt. `learn`: the model is trained to say it."""

    kind: Literal["text", "image", "end"]
    text: str = ""
    learn: bool = False


IMAGE = Piece("image")
END = Piece("end", learn=True)


def turn_pieces(
    pairs: Sequence[tuple[str, str]], num_images: int, template: str, image_place: str = "before"
) -> list[Piece]:
    """Question and answer pairs as they are trained on; the images stand before the first question, or after it.

    Raises:
        ValueError: an unknown template, no pairs, an empty answer, or several pairs for `plain`.
    """
    if template not in TEMPLATES:
        raise ValueError(f"template {template!r} is unknown; expected one of {', '.join(TEMPLATES)}")
    if not pairs:
        raise ValueError("the conversation has no human turn with an answer")
    for number, (_, answer) in enumerate(pairs, 1):
        if not answer.strip():
            raise ValueError(f"answer {number} of {len(pairs)} is empty: nothing to learn from")
    if template == "plain":
        if len(pairs) > 1:
            raise ValueError(f"the plain template takes one caption; this conversation has {len(pairs)} answers")
        return [IMAGE] * num_images + [Piece("text", pairs[0][1].strip(), learn=True), END]
    pieces = [Piece("text", SYSTEM + " ")]
    for number, (question, answer) in enumerate(pairs):
        pieces += _question(question, num_images if number == 0 else 0, image_place)
        pieces += _answer(answer)
    return pieces


def message_pieces(
    messages: Sequence[dict[str, Any]],
    *,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
    begin: bool = True,
    image_place: str = "before",
) -> tuple[list[Piece], list[Any]]:
    """Chat messages (role, content) as pieces of template v1, and their images in reading order.

    Within a user message the images stand together, where they do in training; text parts are joined by newlines.

    Args:
        begin: start with the system sentence (a system message replaces it). False for later turns of a conversation
            whose beginning the model has already read.
        image_place: the images come before the text or after it.

    Raises:
        ValueError: what is not a message, a part or a role; a system message elsewhere than at the start.
    """
    if not messages:
        raise ValueError("the conversation has no messages")
    pieces: list[Piece] = []
    images: list[Any] = []
    for number, message in enumerate(messages):
        role, text, found = _read_message(message, number)
        if number == 0 and begin:
            system = text if role == "system" else SYSTEM
            pieces += [Piece("text", system + " ")] if system else []
        if role == "system":
            if number or not begin:
                raise ValueError(f"message {number + 1} has role 'system'; only the first of a conversation may")
        elif role == "user":
            images += found
            pieces += _question(text, len(found), image_place)
        else:
            pieces += _answer(text)
    if continue_final_message:
        if messages[-1]["role"] != "assistant" or add_generation_prompt:
            raise ValueError(
                "continue_final_message continues the last message, which must be the assistant's, and excludes "
                f"add_generation_prompt; the last message is the {messages[-1]['role']}'s"
            )
        pieces.pop()
    elif add_generation_prompt:
        pieces.append(Piece("text", "ASSISTANT:"))
    return pieces, images


def _question(text: str, num_images: int, image_place: str) -> list[Piece]:
    if num_images == 0:
        return [Piece("text", f"USER: {text.strip()} ")]
    asked, line = Piece("text", text.strip()), Piece("text", "\n")
    if image_place == "after":
        parts = [asked, *[line, IMAGE] * num_images]
    else:
        parts = [*[IMAGE, line] * num_images, asked]
    return [Piece("text", "USER: "), *parts, Piece("text", " ")]


def _answer(text: str) -> list[Piece]:
    # The blank belongs to the answer's first word, as in byte-level vocabularies: the prompt ends at the colon.
    return [Piece("text", "ASSISTANT:"), Piece("text", " " + text.strip(), learn=True), END]


def _read_message(message: dict[str, Any], number: int) -> tuple[str, str, list[Any]]:
    """Role, text and images of one message."""
    place = f"message {number + 1}"
    if not isinstance(message, dict) or "role" not in message or "content" not in message:
        raise ValueError(f"{place} is {message!r:.80}; expected a mapping with 'role' and 'content'")
    role, content = message["role"], message["content"]
    if role not in ("system", "user", "assistant"):
        raise ValueError(f"{place} has role {role!r}; expected 'system', 'user' or 'assistant'")
    if isinstance(content, str):
        return role, content, []
    if not isinstance(content, list | tuple):
        raise ValueError(f"{place} has content of type {type(content).__name__}; expected text or a list of parts")
    texts, images = [], []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind in ("image", "image_url"):
            images.append(_image_of(part, place))
        else:
            raise ValueError(
                f"{place} has a part {part!r:.80}; expected type 'text' with text, or 'image' with a picture"
            )
    if images and role != "user":
        raise ValueError(f"{place} is the {role}'s and holds an image; only user messages may")
    return role, "\n".join(texts), images


def _image_of(part: dict[str, Any], place: str) -> Any:
    """The picture of an image part; None for a part that only marks the place of one."""
    if part["type"] == "image_url":
        url = part.get("image_url")
        return url.get("url") if isinstance(url, dict) else url
    keys = [key for key in ("image", "url", "path", "base64") if part.get(key) is not None]
    if len(keys) > 1:
        raise ValueError(f"{place} has an image part with {' and '.join(keys)}; expected one of them")
    if not keys:
        return None
    return "data:;base64," + part["base64"] if keys[0] == "base64" else part[keys[0]]
