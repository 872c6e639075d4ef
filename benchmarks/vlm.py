"""The whole vision-language model: an image and 32 words to the first token, and a whole answer of 128 tokens.

Ours beside a Transformer LLaVA of the same size: the same SigLIP-SO400M tower, a language model of as many parameters.
"graph": tower, connector and prompt captured as one CUDA graph for both. "shipped": ours as `model(...)` reads by
itself. "generate": the public interface.

Shapes: B batch, P visual tokens, L length, d width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import models
from benchmarks.bench import NO_TIME, Bench
from benchmarks.gate import relative
from benchmarks.prefill import ROUNDING
from benchmarks.timing import captured, measure

WORDS, ANSWER = 32, 128
COMPILING = 90  # seconds that torch.compile takes of a whole language model, about


def run(bench: Bench) -> None:
    size = "toy" if bench.toy else "2.8b"
    dtype = torch.float32 if bench.toy else torch.bfloat16
    builders: dict[str, Callable[..., nn.Module]] = {
        models.OURS: models.our_vlm,
        f"{models.TRANSFORMER} LLaVA": models.transformer_vlm,
    }
    for who in bench.in_turn(list(builders)):
        compiled = bench.part == "last"
        if compiled and (who == models.OURS or bench.device.type != "cuda"):
            continue
        if bench.over(COMPILING if compiled else 3):
            bench.missing(_answer_case(bench.toy), who, f"{NO_TIME}{' for torch.compile' * compiled}")
            continue
        with bench.row_of(f"whole VLM {size}", who, "all"), torch.no_grad():
            model = builders[who](size, bench.device, dtype)
            if not compiled:
                _first_token(bench, size, who, model, dtype, (1,) if bench.part == "marks" else (8,))
            if bench.part != "marks":
                _answer(bench, size, who, model, dtype, compiled)


def _first_token(bench: Bench, size: str, who: str, model: Any, dtype: torch.dtype, batches: tuple[int, ...]) -> None:
    for batch in batches:
        inputs = models.question(size, WORDS, batch, bench.device, dtype)
        length = inputs["input_ids"].shape[1]
        case = f"B{batch}: image ({models.patches(size)} patches) + {WORDS} words to the first token"
        public = partial(_public, model, **inputs)
        if who == models.OURS:
            with bench.row_of(case, who, "shipped"):
                note = _agreement(public, partial(_modules, model, **inputs))
                bench.add(case, who, "shipped", measure(public, **_how(bench)), note=note, batch=batch, length=length)
        with bench.row_of(case, who, "eager"):
            eager = partial(_modules, model, **inputs) if who == models.OURS else public
            bench.add(case, who, "eager", measure(eager, **_how(bench)), batch=batch, length=length)
        if bench.device.type != "cuda":
            continue
        with bench.row_of(case, who, "graph"):
            replay = captured(lambda i=inputs: _stitched(model, **i), warmup=2)
            bench.add(case, who, "graph", measure(replay, **_how(bench)), batch=batch, length=length)
        with bench.row_of(f"B{batch}: vision tower and connector alone", who, "graph"):
            replay = captured(lambda i=inputs: _features(model, i["pixel_values"]), warmup=2)
            case = f"B{batch}: vision tower and connector alone"
            bench.add(case, who, "graph", measure(replay, **_how(bench)), batch=batch)


def _answer(bench: Bench, size: str, who: str, model: Any, dtype: torch.dtype, compiled: bool) -> None:
    inputs = models.question(size, WORDS, 1, bench.device, dtype)
    new, case = _new(bench.toy), _answer_case(bench.toy)
    mode = "generate, static cache, compiled" if compiled else "generate"
    options: dict[str, Any] = {"cache_implementation": "static"} if compiled else {}
    options |= {"min_new_tokens": new, "max_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    attention = torch.ones_like(inputs["input_ids"])
    with bench.row_of(case, who, mode):
        timing = measure(
            lambda: model.generate(**inputs, attention_mask=attention, **options),
            device=bench.device,
            budget=bench.seconds(2.0),
            least=1,
            warmup=3 if who == models.OURS else 2 if compiled else 1,  # ours captures its graphs at the second prompt
        )
        bench.add(case, who, mode, timing, batch=1)
        bench.add(f"{case}, tokens/s", who, mode, timing, unit="tokens/s", work=new, batch=1)


def _new(toy: bool) -> int:
    return 8 if toy else ANSWER


def _answer_case(toy: bool) -> str:
    return f"B1: image + {WORDS} words, answer of {_new(toy)} tokens, first to last"


def _how(bench: Bench) -> dict[str, Any]:
    return {"device": bench.device, "budget": bench.seconds(1.0), "least": 3, "warmup": 2}


def _public(model: Any, **inputs: Tensor) -> Tensor:
    return model(**inputs, use_cache=True, logits_to_keep=1).logits


def _modules(model: Any, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
    """Ours, module by module, for a prompt that begins with its image."""
    features = model.connector(*model.vision_tower(pixel_values))
    words = model.get_input_embeddings()(input_ids[:, features.shape[1] :])
    return models.read_through_modules(model.language_model, None, torch.cat([features.to(words.dtype), words], dim=1))


def _agreement(shipped: Callable[[], Tensor], modules: Callable[[], Tensor]) -> str:
    """How the logits compare; an error if they differ by more than rounding."""
    for _ in range(3):  # the first prompt of a size runs kernel by kernel, the second is captured
        logits = shipped()
    exact = modules().masked_fill(torch.isinf(logits), 0)
    error = relative(logits.masked_fill(torch.isinf(logits), 0), exact)
    if not error <= ROUNDING:
        raise ValueError(f"logits are off by {error:.2g} from those of the modules, more than {ROUNDING}")
    return f"logits within {error:.1g} of those of the modules"


def _features(model: Any, pixel_values: Tensor) -> Tensor:
    """Images' tokens (B, P, d) of either model."""
    features = model.get_image_features(pixel_values)
    return features if isinstance(features, Tensor) else torch.stack(list(features.pooler_output))


def _stitched(model: Any, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
    """The forward pass for a prompt whose layout is known (image first), free of the checks that wait for the device,
    the same for both models."""
    features = _features(model, pixel_values)
    words = model.get_input_embeddings()(input_ids[:, features.shape[1] :])
    embeds = torch.cat([features.to(words.dtype), words], dim=1)
    if hasattr(model, "connector"):
        return model.language_model(inputs_embeds=embeds, use_cache=True, logits_to_keep=1).logits
    hidden = model.model.language_model(inputs_embeds=embeds, use_cache=True).last_hidden_state
    return model.lm_head(hidden[:, -1:])
