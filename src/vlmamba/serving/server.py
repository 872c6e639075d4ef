"""Runs an application on a socket until it is interrupted; answers under way may go on for a little."""

from __future__ import annotations

import asyncio
import socket

import uvicorn
from fastapi import FastAPI

from vlmamba.inference import Engine

PATIENCE = 5.0  # seconds for answers under way, then they end as cancelled
LEAVING = 3  # seconds more, then connections are cut


def run(app: FastAPI, engine: Engine, door: socket.socket) -> None:
    """Serves at a bound socket until SIGINT or SIGTERM. The engine is closed by then, or must be.

    Raises:
        KeyboardInterrupt: it was SIGINT.
    """
    config = uvicorn.Config(app, timeout_graceful_shutdown=round(PATIENCE) + LEAVING)
    _Server(config, engine).run(sockets=[door])


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, engine: Engine) -> None:
        super().__init__(config)
        self._engine = engine

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        loop = asyncio.get_running_loop()
        timer = loop.call_later(PATIENCE, loop.run_in_executor, None, self._engine.close)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()
