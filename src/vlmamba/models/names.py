"""The three namings of one Mamba language model, and the way between them.

original (mamba_ssm)      backbone.embedding.weight    mixer.A_log      mixer.D      mixer.dt_proj.bias
transformers, and saved   backbone.embeddings.weight   mixer.A_log      mixer.D      mixer.dt_proj.bias
ours at run time          backbone.embeddings.weight   mixer.ssm.A_log  mixer.ssm.D  mixer.ssm.dt_bias
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming

_SAVED_TO_RUNTIME = {
    "mixer.A_log": "mixer.ssm.A_log",
    "mixer.D": "mixer.ssm.D",
    "mixer.dt_proj.bias": "mixer.ssm.dt_bias",
}


def register_names(*models: str) -> None:
    """Teaches transformers' loading and saving the run-time names of the model classes named (both directions)."""
    for model in models:
        renamings = [WeightRenaming(saved, runtime) for saved, runtime in _SAVED_TO_RUNTIME.items()]
        register_checkpoint_conversion_mapping(model, renamings, overwrite=True)


def to_runtime(name: str) -> str:
    """Our run-time name of a saved tensor, original or transformers'."""
    name = name.replace("backbone.embedding.", "backbone.embeddings.")
    for saved, runtime in _SAVED_TO_RUNTIME.items():
        if name.endswith(saved):
            return name.removesuffix(saved) + runtime
    return name


def to_original(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A language model's run-time state dict under mamba_ssm's names."""
    out = {}
    for name, tensor in state_dict.items():
        for saved, runtime in _SAVED_TO_RUNTIME.items():
            if name.endswith(runtime):
                name = name.removesuffix(runtime) + saved
        out[name.replace("backbone.embeddings.", "backbone.embedding.")] = tensor
    return out
