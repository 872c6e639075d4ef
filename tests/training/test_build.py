"""From a recipe's `model` section to a model: what is refused before anything trains."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import MambaConfig

import vlmamba
from vlmamba.commands.load import name_of
from vlmamba.models.mamba import VLMambaForCausalLM
from vlmamba.models.vlm import VLMambaForConditionalGeneration
from vlmamba.training import build, outline
from vlmamba.training.config import ConfigError, ModelConfig

NANO = str(vlmamba.nano())


def test_a_tower_taken_over_keeps_its_layer(tmp_path: Path) -> None:
    """Trained with a config that says another, the result could not be loaded."""
    with pytest.raises(ConfigError, match=r"write model\.vision_layer: -1 and model\.vision_cls: false"):
        build.build(ModelConfig(vision=NANO, language=NANO, tokenizer=NANO), "pad")
    model, processor = build.build(ModelConfig(vision=NANO, language=NANO, tokenizer=NANO, vision_layer=-1), "pad")
    build.save(model, processor, tmp_path / "model", {name: p.detach() for name, p in model.named_parameters()})
    VLMambaForConditionalGeneration.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize("make", [outline.outline, lambda config: build.build(config, "pad")])
@pytest.mark.parametrize(("part", "field"), [("language", "hidden_sizee"), ("vision", "patchsize")])
def test_fields_that_a_part_does_not_have(make, part: str, field: str) -> None:
    """A dry run refuses what the run refuses."""
    parts = {"vision": {"image_size": 64}, "language": {"hidden_size": 16}}
    parts[part] |= {field: 8}
    with pytest.raises(ConfigError, match=rf"model\.{part}\.{field}: .* has no such field"):
        make(ModelConfig(tokenizer=NANO, **parts))


def test_code_that_comes_along_never_runs(tmp_path: Path, monkeypatch) -> None:
    """Nor is it asked for: transformers does that, and a y is soon typed."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    code = f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\n"
    (folder / "code.py").write_text(code)
    auto = {"AutoConfig": "code.C", "AutoTokenizer": ["code.T", None]}
    (folder / "config.json").write_text(json.dumps({"model_type": "theirs", "auto_map": auto}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T", "auto_map": auto}))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    config = ModelConfig(tokenizer=str(folder), vision=str(folder), language={"hidden_size": 16})
    for make in (lambda: build.build(config, "pad"), lambda: outline.outline(config)):
        with pytest.raises(ValueError, match="theirs"):
            make()
    with pytest.raises(ConfigError):
        outline._vision(str(folder), {})
    assert not (tmp_path / "ran").exists()


def test_a_language_model_s_damaged_tokenizer_is_not_another_s(tmp_path) -> None:
    """Nor is that of a folder that is not there."""
    language = tmp_path / "language"
    VLMambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1)).save_pretrained(language)
    (language / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json is no tokenizer"):
        build.read_tokenizer(ModelConfig(language=str(language)))
    with pytest.raises(ValueError, match="no-such/place/at-all' is neither a folder here"):
        build.read_tokenizer(ModelConfig(language="no-such/place/at-all"))


def test_a_run_s_folder_stands_for_its_model(tmp_path) -> None:
    shutil.copytree(vlmamba.nano(), tmp_path / "run/model")
    model, _ = build.build(ModelConfig(path=str(tmp_path / "run")), "pad")
    assert model.config.scan == "bsm"
    assert name_of(str(tmp_path / "run/model")) == name_of(str(tmp_path / "run")) == "run"
    with pytest.raises(ValueError, match="nowhere' is neither a folder here nor a Hub id"):
        build.build(ModelConfig(path="nowhere"), "pad")
