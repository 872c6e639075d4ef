"""Native code for CPU ops, generated at first use."""

from __future__ import annotations


def refusal() -> str | None:
    """Why native code cannot be generated here; None if it can."""
    return "the native form is not part of this version"


def describe() -> str:
    """One line on the code that is generated."""
    return ""
