"""The model card that a finished run leaves beside its weights."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import yaml
from torch import nn

from vlmamba.models.vlm import VLMambaForConditionalGeneration
from vlmamba.training.config import RunConfig
from vlmamba.training.contrastive import ContrastivePairs
from vlmamba.training.patches import PatchReader

_USE = """\
```python
import vlmamba  # first: it makes the Auto classes below know this model
from transformers import AutoModelForImageTextToText, AutoProcessor

processor = AutoProcessor.from_pretrained("FOLDER")
model = AutoModelForImageTextToText.from_pretrained("FOLDER")
```

Or, from the command line: `vlmamba ask --model FOLDER picture.jpg "What is in the picture?"`
"""

_USE_LANGUAGE = """\
```python
from vlmamba import VLMambaForCausalLM
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = VLMambaForCausalLM.from_pretrained("FOLDER")
```
"""

_USE_ENCODER = """\
```python
from vlmamba import VLMambaForConditionalGeneration

model = VLMambaForConditionalGeneration.from_parts(vision="FOLDER", language="a language model", vision_layer=-1)
```
"""


def write_card(folder: Path, model: nn.Module, config: RunConfig, seconds: float, loss: float | None) -> None:
    """README.md: what this is, how to load it (`import vlmamba` first), and how it was made."""
    kind, tag, use = _kind(model)
    parameters = sum(p.numel() for n, p in model.named_parameters() if not n.startswith("heads."))
    end = "" if loss is None else f", final training loss {loss:.3f}"
    recipe = recipe_text(config)
    made = ""
    if isinstance(model, VLMambaForConditionalGeneration):
        of = model.config
        made = f"Connector {of.connector}, scan {of.scan} ({of.scan_weights} weights), encoder read at layer "
        made += f"{of.vision_layer}.\n\n"
    (folder / "README.md").write_text(
        "---\nlibrary_name: vlmamba\n"
        + f"pipeline_tag: {tag}\n---\n\n# {kind}, {parameters / 1e6:.1f}M parameters\n\n"
        + made
        + use.replace("FOLDER", "path/to/this/folder")
        + f"\n## Training\n\n{seconds / 60:.1f} minutes{end}, with this recipe:\n\n```yaml\n{recipe}```\n",
        encoding="utf-8",
    )


def recipe_text(config: RunConfig) -> str:
    """A recipe as YAML. Of a whole model only its path: its connector and its scan are its own."""
    recipe = asdict(config)
    if config.model.path is not None:
        recipe["model"] = {"path": config.model.path}
    return yaml.safe_dump(recipe, sort_keys=False)


def _kind(model: nn.Module) -> tuple[str, str, str]:
    """What a model is, its tag on the Hub, and how it is loaded."""
    if isinstance(model, PatchReader | ContrastivePairs):
        return "Vision encoder", "image-feature-extraction", _USE_ENCODER
    if hasattr(model, "vision_tower"):
        return "VL-Mamba", "image-text-to-text", _USE
    return "Mamba language model", "text-generation", _USE_LANGUAGE
