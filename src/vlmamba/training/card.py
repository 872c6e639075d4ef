"""The model card that a finished run leaves beside its weights."""

from __future__ import annotations

from pathlib import Path

import yaml
from torch import nn

from vlmamba.training.config import RunConfig, to_mapping

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


def write_card(folder: Path, model: nn.Module, config: RunConfig, seconds: float, loss: float | None) -> None:
    """README.md: what this is, how to load it (`import vlmamba` first), and how it was made."""
    has_images = hasattr(model, "vision_tower")
    parameters = sum(p.numel() for p in model.parameters())
    end = "" if loss is None else f", final training loss {loss:.3f}"
    recipe = yaml.safe_dump(to_mapping(config), sort_keys=False)
    (folder / "README.md").write_text(
        "---\nlibrary_name: vlmamba\n"
        + ("pipeline_tag: image-text-to-text\n" if has_images else "pipeline_tag: text-generation\n")
        + f"---\n\n# {'VL-Mamba' if has_images else 'Mamba language model'}, {parameters / 1e6:.1f}M parameters\n\n"
        + (_USE if has_images else _USE_LANGUAGE).replace("FOLDER", "path/to/this/folder")
        + f"\n## Training\n\n{seconds / 60:.1f} minutes{end}, with this recipe:\n\n```yaml\n{recipe}```\n",
        encoding="utf-8",
    )
