"""What a client is told when its request is not answered: OpenAI's error JSON."""

from __future__ import annotations

from typing import Any


class RequestError(ValueError):
    """A request that is refused, or that failed.

    Args:
        message: what was found and what is expected.
        param: the field, such as `messages[0].content[1]`.
        code: the reason in a word, for programs.
        status: of HTTP. kind: OpenAI's `type`.
        headers: of the response.
    """

    def __init__(
        self,
        message: str,
        param: str | None = None,
        code: str | None = "invalid_value",
        *,
        status: int = 400,
        kind: str = "invalid_request_error",
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.param, self.code, self.status, self.kind, self.headers = param, code, status, kind, headers

    def body(self) -> dict[str, Any]:
        """The JSON that the client gets."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}


def server_error() -> RequestError:
    """Something broke that is none of the client's business; the log has it."""
    message = "the server failed to answer this request; its log says why"
    return RequestError(message, code="internal_error", status=500, kind="server_error")
