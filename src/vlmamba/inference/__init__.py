"""The engine: many conversations at once on one model, each a slot of fixed size.

engine = Engine(model, processor)
content = [{"type": "image", "image": picture}, {"type": "text", "text": "what is this?"}]
answer = engine.submit([{"role": "user", "content": content}])
for piece in answer:
    print(piece.text, end="")
"""

from __future__ import annotations

from vlmamba.inference.engine import Engine
from vlmamba.inference.request import Answer, Overloaded, Piece, Sampling

__all__ = ["Answer", "Engine", "Overloaded", "Piece", "Sampling"]
