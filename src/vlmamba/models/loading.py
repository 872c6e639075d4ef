"""What a checkpoint must be to become a model: its sizes make sense, its tensors are just those of the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

# Far above any model there is: what lies beyond is a damaged or hostile file, and would take all memory.
WIDEST = 1 << 17
_MOST = {
    **dict.fromkeys(("hidden_size", "intermediate_size", "d_model", "time_step_rank"), WIDEST),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_attention_heads"), 1 << 12),
    **dict.fromkeys(("image_size", "patch_size"), 1 << 13),
    **dict.fromkeys(("state_size", "conv_kernel", "expand"), 1 << 10),
    "vocab_size": 1 << 24,
    "num_channels": 1 << 6,
}
_MOST_PATCHES = 1 << 9  # along a side
_SHOWN = 8


def check_sizes(config: Mapping[str, Any], where: str) -> None:
    """ValueError for a size that is no whole number, below 1, or beyond reason."""
    for name, most in _MOST.items():
        value = config.get(name, 1)
        if name == "time_step_rank" and value == "auto":
            continue
        if type(value) is not int or not 1 <= value <= most:
            raise ValueError(f"{where}: {name} is {value!r}; expected a whole number from 1 to {most}")
    image, patch = config.get("image_size", 1), config.get("patch_size", 16)
    if image // patch > _MOST_PATCHES:
        raise ValueError(f"{where}: image_size {image} makes more than {_MOST_PATCHES} patches of {patch} along a side")


def refuse_misfits(where: str, missing: Iterable[str], surplus: Iterable[str], misshaped: Iterable[str]) -> None:
    """ValueError that names tensors which a checkpoint lacks, has too many, or has in another shape."""
    problems = [*(f"missing {name}" for name in missing), *(f"surplus {name}" for name in surplus), *misshaped]
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise ValueError(f"{where} does not fit the model: {'; '.join(problems[:_SHOWN])}{more}")


class LoadsStrictly:
    """`from_pretrained` that takes no checkpoint with a tensor missing, surplus or of another shape.

    transformers draws random numbers for what is missing and only logs it.
    """

    @classmethod
    def from_pretrained(
        cls,
        source: Any,
        *args: Any,
        output_loading_info: bool = False,
        ignore_mismatched_sizes: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As transformers', which this calls.

        Raises:
            ValueError: names every tensor that does not fit; with `ignore_mismatched_sizes`, shapes may differ.
        """
        model, found = super().from_pretrained(  # type: ignore[misc]
            source, *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
        misshaped = [] if ignore_mismatched_sizes else sorted(found["mismatched_keys"])
        refuse_misfits(
            str(source),
            sorted(found["missing_keys"]),
            sorted(found["unexpected_keys"]),
            [f"{name} is {tuple(given)}, expected {tuple(own)}" for name, given, own in misshaped],
        )
        return (model, found) if output_loading_info else model
