"""A judge model behind any OpenAI-compatible endpoint, its replies kept so that none is paid for twice."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlmamba.evaluation.files import load_text, require_texts

# Worth another try: timeouts, conflicts, rate limits, and the server's own trouble.
_PASSING = {408, 409, 425, 429, 500, 502, 503, 504}
_LETTERS_PER_TOKEN = 4


@dataclass
class Judge:
    """Asks `model` at `url` (such as https://api.openai.com/v1, or a server of your own).

    key_variable: the environment variable with the API key; unset means none is sent. cache: a JSON-lines file of
    replies. tries: per question, with waits of 1, 2, 4 ... seconds between. price: dollars per million tokens in and
    out, for the estimate.
    """

    url: str
    model: str
    cache: Path | None = None
    key_variable: str = "OPENAI_API_KEY"
    tries: int = 5
    timeout: float = 60.0
    price: tuple[float, float] | None = None
    wait: float = 1.0
    _replies: dict[str, str] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"the judge's address must begin with http:// or https://, found {self.url!r}")
        if self.cache is not None and self.cache.exists():
            text = load_text(self.cache)
            for number, line in enumerate(text.split("\n"), 1):
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:
                    continue  # empty, or cut short by a kill: asked again
                require_texts(record, ["key", "reply"], f"{self.cache}, line {number}")
                self._replies[record["key"]] = record["reply"]
            if text and not text.endswith("\n"):  # the next reply must not continue a line that a kill cut short
                with self.cache.open("a", encoding="utf-8") as file:
                    file.write("\n")

    def ask(self, prompt: str, temperature: float = 0.0, max_tokens: int = 16, sample: Sequence[int] = ()) -> str:
        """The judge's reply. `sample` tells apart calls that ask the same on purpose, such as another run's."""
        request = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": temperature,
            "max_tokens": max_tokens,
        }
        key = hashlib.sha256(json.dumps([self.url, request, list(sample)]).encode()).hexdigest()
        if key not in self._replies:
            self._replies[key] = self._call(request)
            self._keep(key)
        return self._replies[key]

    def _keep(self, key: str) -> None:
        if self.cache is None:
            return
        self.cache.parent.mkdir(parents=True, exist_ok=True)
        with self.cache.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, "reply": self._replies[key]}) + "\n")

    def _call(self, request: dict[str, Any]) -> str:
        headers = {"Content-Type": "application/json"}
        if os.environ.get(self.key_variable):
            headers["Authorization"] = f"Bearer {os.environ[self.key_variable]}"
        address = self.url.rstrip("/") + "/chat/completions"
        for attempt in range(1, self.tries + 1):
            try:
                message = urllib.request.Request(address, json.dumps(request).encode(), headers)
                with urllib.request.urlopen(message, timeout=self.timeout) as response:
                    body = json.loads(response.read())
                return str(body["choices"][0]["message"]["content"] or "")
            except urllib.error.HTTPError as error:
                reason = f"{error.code} {error.reason}"
                if error.code not in _PASSING:
                    raise ValueError(f"the judge {self.model} at {address} refuses: {reason}") from error
            except http.client.InvalidURL as error:
                raise ValueError(f"the judge's address {address} cannot be used: {error}") from error
            except (OSError, http.client.HTTPException, ValueError, KeyError, IndexError, TypeError) as error:
                reason = f"{type(error).__name__}: {error}"
            if attempt < self.tries:
                time.sleep(self.wait * 2 ** (attempt - 1))
        raise ValueError(f"the judge {self.model} at {address} did not answer in {self.tries} tries: {reason}")

    def estimate(self, prompts: Sequence[str], max_tokens: int) -> str:
        """What asking all of these once would take, in words: calls, tokens and, with a price, dollars."""
        tokens_in = sum(len(prompt) for prompt in prompts) // _LETTERS_PER_TOKEN
        tokens_out = max_tokens * len(prompts)
        text = (
            f"up to {len(prompts)} calls to {self.model}, about {tokens_in:,} tokens in and at most {tokens_out:,} out"
        )
        if self.price is not None:
            text += f", about ${(tokens_in * self.price[0] + tokens_out * self.price[1]) / 1e6:.2f}"
        return text + " (repeats and cached replies not counted)"
