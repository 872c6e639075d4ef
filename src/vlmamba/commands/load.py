"""Loading a model by the name a user gives."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from vlmamba.models.processor import VLMambaProcessor
    from vlmamba.models.vlm import VLMambaForConditionalGeneration

NANO = Path(__file__).resolve().parent.parent / "assets" / "nano"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

INT8 = "int8"  # as auto, but the large matrices of every token after the prompt are read as int8


@dataclass(frozen=True)
class Loaded:
    """A model and its processor, ready to answer."""

    model: VLMambaForConditionalGeneration
    processor: VLMambaProcessor

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device


def load(name: str, device: str = "auto", dtype: str = "auto") -> Loaded:
    """The model called `nano`, or in a folder or on the Hub under `name`, and its processor.

    Raises:
        ValueError: no such model, not a VL-Mamba, a device that is not here, an unknown dtype.
    """
    place = pick_device(device)
    kind = pick_dtype("auto" if dtype == INT8 else dtype, place)
    folder = find_model(name)

    from transformers.utils import logging

    from vlmamba.models.decode import read_as_int8
    from vlmamba.models.processor import VLMambaProcessor
    from vlmamba.models.vlm import VLMambaForConditionalGeneration

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        processor = VLMambaProcessor.from_pretrained(folder)
        model = VLMambaForConditionalGeneration.from_pretrained(folder, dtype=kind)
    except Exception as error:  # transformers and its parsers raise nearly anything on damaged files
        raise ValueError(f"{name} cannot be loaded: {error}") from error
    if processor.image_token_id != model.config.image_token_id:
        raise ValueError(
            f"{name}: the model's image token is {model.config.image_token_id}, its processor's "
            f"{processor.image_token_id}; they do not belong together"
        )
    model = model.to(place).eval()
    if dtype == INT8:
        read_as_int8(model)
    return Loaded(model, processor)


def find_model(name: str) -> Path:
    """The folder of a model: the shipped one for `nano`, the folder itself (of a training run: the model in it), or the
    downloaded Hub repository."""
    if name == "nano":
        if not (NANO / "config.json").is_file():
            raise ValueError(f"the nano model is not in this installation ({NANO}); reinstall, or give --model FOLDER")
        return NANO
    from vlmamba.models.weights import fetch_whole

    return fetch_whole(name)


def name_of(model: str) -> str:
    """What a model is called where it is one among others: by its folder, of a run's `model` by the run's."""
    folder = Path(model).resolve()
    if not folder.is_dir():
        return model
    return folder.parent.name if folder.name == "model" else folder.name


def pick_device(name: str) -> torch.device:
    """The device of that name; `auto`: CUDA, else Apple's mps, else the CPU. A GPU chosen by number becomes the current
    one: kernels, events and graphs go by that."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        return torch.device("cuda" if cuda else "mps" if mps else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device {name} is unknown; expected auto, cpu, cuda, cuda:N or mps") from error
    here = {"cpu": 1, "cuda": torch.cuda.device_count() if cuda else 0, "mps": int(mps)}
    if (device.index or 0) >= here.get(device.type, 0):
        raise ValueError(f"--device {name} is not here; `vlmamba info` lists the devices")
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of that name; `auto`: bfloat16 on CUDA, else float32."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise ValueError(f"--dtype {name} is unknown; expected auto, {INT8}, {', '.join(DTYPES)}")
    return DTYPES[name]
