"""What the README tells users to do works as written."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_examples_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first asks, the second goes on, the third asks the engine."""
    monkeypatch.chdir(ROOT)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile("".join(BLOCKS[:3]), "README.md", "exec"), {})
    assert [line.strip() for line in printed.getvalue().splitlines()] == ["bell", "square", "['bell', 'bell', 'bell']"]


def test_composition_is_spelled_right() -> None:
    """Its parts are on the Hub: the call's names are checked, not the download."""
    import inspect

    from vlmamba.models.weights import compose

    compile(BLOCKS[3], "README.md", "exec")
    assert {"vision", "language", "connector", "scan"} <= set(inspect.signature(compose).parameters) & set(
        re.findall(r"(\w+)=", BLOCKS[3])
    )


def test_the_size_of_the_state() -> None:
    """The 2.8b model's, in bf16: float32 SSM states, a window of three inputs of the convolution."""
    import torch

    from vlmamba import MambaState

    state = MambaState.zeros(64, 1, 5120, 16, 4, dtype=torch.bfloat16, device="meta")
    assert f"{state.nbytes / 1e6:.1f} MB" in README


def test_commands_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^ +make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    from vlmamba import cli

    source = Path(cli.__file__).read_text()
    for command in set(re.findall(r"`?vlmamba (\w+)", README)):
        assert f'"{command}"' in source or f"def {command}" in source, command


@pytest.mark.parametrize("link", re.findall(r"\]\(((?!http)[^)]+)\)", README))
def test_links_lead_somewhere(link: str) -> None:
    assert (ROOT / link).exists(), link
