"""`vlmamba ask` and `vlmamba chat`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from vlmamba.models.images import read_image

if TYPE_CHECKING:
    from vlmamba.commands.conversation import Conversation

_HELP = "/image PATH shows a picture with the next question, /reset forgets everything, /quit ends."


def ask(
    image: str, question: str, model: str, device: str, dtype: str, max_new_tokens: int, temperature: float
) -> None:
    """Prints the answer to one question about one image."""
    picture = read_image(image)  # before the seconds that a model takes to load
    if not question.strip():
        raise ValueError("the question is empty")
    conversation = _begin(model, device, dtype, max_new_tokens, temperature)
    _stream(conversation.ask(question, [picture]))


def chat(image: str | None, model: str, device: str, dtype: str, max_new_tokens: int, temperature: float) -> None:
    """Talks until /quit or the end of the input."""
    if sys.stdin is None:
        raise ValueError("chat reads its questions from standard input, which is closed")
    pictures = [] if image is None else [read_image(image)]
    conversation = _begin(model, device, dtype, max_new_tokens, temperature)
    interactive = sys.stdin.isatty()
    if interactive:
        print(_HELP)
    for line in _lines(interactive):
        command, _, argument = line.partition(" ")
        try:
            if command == "/quit":
                return
            elif command == "/reset":
                conversation.reset()
                pictures = []
            elif command == "/image" and argument.strip():
                pictures.append(read_image(Path(argument.strip()).expanduser()))
            elif command.startswith("/"):
                print(f"unknown command {line.strip()}. {_HELP}", file=sys.stderr)
            elif line.strip():
                _stream(conversation.ask(line, pictures))
                pictures = []
        except ValueError as error:  # a picture that cannot be read does not end a conversation
            print(f"vlmamba: {error}", file=sys.stderr)


def _begin(model: str, device: str, dtype: str, max_new_tokens: int, temperature: float) -> Conversation:
    from vlmamba.commands.conversation import Conversation
    from vlmamba.commands.load import load
    from vlmamba.inference import Sampling

    sampling = Sampling(max_new_tokens, temperature)
    return Conversation(load(model, device, dtype), sampling)


def _lines(interactive: bool) -> Iterator[str]:
    while True:
        try:
            yield input("> " if interactive else "")
        except EOFError:
            return


def _stream(pieces: Iterator[str]) -> None:
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
    finally:
        print(flush=True)
