"""The lmms-eval plugin, against lmms-eval's own registry and request types where it is installed.

Its dependencies are many; these tests need `lmms_eval` itself (0.7.3) and loguru, pydantic and pytz. Without it a
stand-in with the same two classes takes its place, and what needs the registry is skipped.
"""

from __future__ import annotations

import importlib.util
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

HAVE_LMMS = importlib.util.find_spec("lmms_eval") is not None
GREEDY = {"max_new_tokens": 5, "temperature": 0, "do_sample": False, "num_beams": 1, "top_p": 1.0}


@dataclass
class StandInInstance:
    """`lmms_eval.api.instance.Instance`, as far as a model reads it."""

    request_type: str
    arguments: tuple
    idx: int
    metadata: dict = field(default_factory=dict)
    resps: list = field(default_factory=list)

    @property
    def args(self) -> tuple:
        return self.arguments if isinstance(self.arguments, tuple) else (self.arguments,)


class StandInHook:
    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        pass


class StandInModel:
    """`lmms_eval.api.model.lmms`, as far as a model inherits from it."""

    is_simple = True

    def __init__(self) -> None:
        self._rank, self._world_size, self.cache_hook, self.task_dict = 0, 1, StandInHook(), {}

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict) -> Any:
        arguments = dict(part.split("=", 1) for part in arg_string.split(","))
        return cls(**arguments, **{k: v for k, v in additional_config.items() if v is not None})

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def world_size(self) -> int:
        return self._world_size

    def clean(self) -> None:
        pass


@pytest.fixture(scope="module")
def plugin() -> Iterator[ModuleType]:
    """`vlmamba.commands.lmms`, over lmms-eval or the stand-in."""
    patch = pytest.MonkeyPatch()
    if not HAVE_LMMS:
        parts = {"api": {}, "api.instance": {"Instance": StandInInstance}, "api.model": {"lmms": StandInModel}}
        patch.setitem(sys.modules, "lmms_eval", ModuleType("lmms_eval"))
        for name, content in parts.items():
            module = ModuleType(f"lmms_eval.{name}")
            vars(module).update(content)
            patch.setitem(sys.modules, module.__name__, module)
    patch.delitem(sys.modules, "vlmamba.commands.lmms", raising=False)
    yield importlib.import_module("vlmamba.commands.lmms")
    patch.undo()
    sys.modules.pop("vlmamba.commands.lmms", None)


@pytest.fixture(scope="module")
def documents() -> list[dict[str, Any]]:
    colours = ("red", "blue", "green")
    return [
        {"picture": Image.new("RGB", (20 + i // 2, 20), colours[i // 2]), "text": f"Is it {colour}?"}
        for i, colour in enumerate(("red", "blue", "green", "red", "blue", "green"))
    ]


@pytest.fixture
def model(plugin: ModuleType, tiny_model: Path, documents: list[dict[str, Any]]) -> Any:
    made = plugin.VLMamba.create_from_arg_string(
        f"pretrained={tiny_model},dtype=float32", {"batch_size": 4, "max_batch_size": None, "device": "cpu"}
    )
    made.task_dict = {"colours": {"test": documents}}
    return made


def to_messages(document: dict[str, Any]) -> list[dict[str, Any]]:
    parts = [{"type": "image", "url": document["picture"]}, {"type": "text", "text": document["text"]}]
    return [{"role": "user", "content": parts}]


def asked(plugin: ModuleType, kind: str, *arguments: Any) -> Any:
    return plugin.Instance(kind, arguments, 0, {"task": "colours", "doc_id": 0, "repeats": 1})


def generation(plugin: ModuleType, doc_id: int, options: dict[str, Any] = GREEDY, make: Any = to_messages) -> Any:
    return asked(plugin, "generate_until", f"context {doc_id}", make, options, doc_id, "colours", "test")


def test_the_registry_finds_the_model_by_its_entry_point(plugin: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    (name, value), group = *project["entry-points"]["lmms_eval.models"].items(), "lmms_eval.models"
    if not HAVE_LMMS:
        pytest.skip("lmms_eval is not installed: its registry cannot be asked")
    from lmms_eval.models.registry_v2 import ModelRegistryV2

    registry = ModelRegistryV2()
    monkeypatch.setattr(registry, "_select_entry_points", lambda wanted: [EntryPoint(name, value, wanted)])
    registry.load_entrypoint_manifests(group)
    assert registry.resolve("vlmamba").model_type == "chat"
    found = registry.get_model_class("vlmamba")
    assert (found.__module__, found.__name__, found.is_simple) == ("vlmamba.commands.lmms", "VLMamba", False)


def test_answers_come_in_the_order_of_the_requests(
    plugin: ModuleType, model: Any, documents: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = []
    monkeypatch.setattr(model.cache_hook, "add_partial", lambda *arguments: cached.append(arguments))
    brief = GREEDY | {"max_new_tokens": 2, "until": ["\n\n"]}
    requests = [generation(plugin, i, brief if i % 2 else GREEDY) for i in range(6)]
    answers = model.generate_until(requests)
    alone = [model.answerer.converse([to_messages(d)], 2 if i % 2 else 5)[0] for i, d in enumerate(documents)]
    assert answers == alone
    assert len(set(answers)) > 1
    # Ours and the cache's: the context and the options name a request.
    assert sorted((c[1][0], c[2]) for c in cached[:6]) == [(f"context {i}", text) for i, text in enumerate(answers)]
    assert all(c[0] == "generate_until" and c[1][1] in (brief, GREEDY) for c in cached)


def test_messages_pass_through_lmms_eval_s_own_types(
    plugin: ModuleType, model: Any, documents: list[dict[str, Any]]
) -> None:
    if not HAVE_LMMS:
        pytest.skip("lmms_eval is not installed: its message types cannot be asked")
    from lmms_eval.protocol import ChatMessages

    written = ChatMessages(messages=to_messages(documents[0])).to_hf_messages()
    plain = generation(plugin, 0)
    typed = generation(plugin, 0, make=lambda document: written)
    assert model.generate_until([plain]) == model.generate_until([typed])


def test_stop_strings_and_sampling(plugin: ModuleType, model: Any) -> None:
    (whole,) = model.generate_until([generation(plugin, 0)])
    stop = whole[len(whole) // 2]
    for until in (stop, [stop, "zebra"]):
        (cut,) = model.generate_until([generation(plugin, 0, GREEDY | {"until": until})])
        assert cut == whole.split(stop)[0].strip()
    warm = {"max_new_tokens": 8, "temperature": 5.0, "do_sample": True}
    drawn = model.generate_until([generation(plugin, 0, warm)] * 8)
    assert len(set(drawn)) > 4
    assert (
        model.generate_until([generation(plugin, 0, warm | {"do_sample": False})] * 2)
        == [model.generate_until([generation(plugin, 0, GREEDY | {"max_new_tokens": 8})])[0]] * 2
    )
    for wrong in ({"num_beams": 4}, {"top_p": 0.9, "temperature": 1.0, "do_sample": True}):
        with pytest.raises(ValueError, match=f"asks for {next(iter(wrong))}="):
            model.generate_until([generation(plugin, 0, GREEDY | wrong)])


def test_what_the_model_has_no_ears_for_is_refused(plugin: ModuleType, model: Any) -> None:
    film = [{"role": "user", "content": [{"type": "video", "url": "film.mp4"}, {"type": "text", "text": "What?"}]}]
    with pytest.raises(ValueError, match="'image' with a picture"):
        model.generate_until([generation(plugin, 0, make=lambda document: film)])


def test_rounds_go_on_until_the_task_ends_them(plugin: ModuleType, model: Any) -> None:
    calls = []

    def rounds(
        document: Any, round_idx: Any = None, previous_output: Any = None, previous_round_info: Any = None
    ) -> Any:
        messages = to_messages(document)
        if round_idx is None:
            return messages
        calls.append((round_idx, previous_output, previous_round_info))
        messages += [{"role": "assistant", "content": previous_output[-1]}, {"role": "user", "content": "And?"}]
        return messages, round_idx == 2, previous_output, f"info {round_idx}"

    (said,) = model.generate_until_multi_round([generation(plugin, 0, make=rounds)])
    assert len(said) == 2
    assert calls == [(1, said[:1], None), (2, said, "info 1")]

    # A task that knows no rounds has one.
    def once(document: Any, **info: Any) -> Any:
        return to_messages(document)

    assert model.generate_until_multi_round([generation(plugin, 0, make=once)]) == [said[:1]]


def test_likelihoods_rank_continuations(plugin: ModuleType, model: Any, documents: list[dict[str, Any]]) -> None:
    def pictures(document: Any) -> list[Image.Image]:
        return [document["picture"]]

    place = (pictures, 1, "colours", "test")
    text = documents[1]["text"]
    requests = [
        asked(plugin, "loglikelihood", text, "red", *place),
        asked(plugin, "loglikelihood", text, lambda document: "red and blue", *place),
        asked(plugin, "loglikelihood", "", "red"),
    ]
    short, longer, bare = model.loglikelihood(requests)
    assert short[0] > longer[0]
    assert short[0] != bare[0]
    assert model.loglikelihood(requests[1:2])[0][0] == pytest.approx(longer[0], rel=1e-4)


def test_processes_take_their_rank_from_the_environment(
    plugin: ModuleType, tiny_model: Path, documents: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("RANK", "3"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    made = plugin.VLMamba(str(tiny_model), device="cpu", batch_size="auto")
    assert (made.rank, made.world_size, made.batch_size, made.device.type) == (3, 8, 64, "cpu")
    with pytest.raises(ValueError, match="batch_size must be at least 1, found 0"):
        plugin.VLMamba(str(tiny_model), device="cpu", batch_size=0)
    made.task_dict = {"colours": {"test": documents}}
    made.clean()
    with pytest.raises(ValueError, match="cleaned out of memory"):
        made.generate_until([generation(plugin, 0)])
