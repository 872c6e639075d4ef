"""What a recipe may not say: values out of their range, and fields that do not go together."""

from __future__ import annotations

import dataclasses
import math

from vlmamba.training.config import PARTS, OptimConfig, RunConfig, require


def check(config: RunConfig) -> None:
    """ConfigError at the first rule that a recipe breaks."""
    model = config.model
    for part in PARTS:
        of = getattr(config.stage, part)
        require(of.lr >= 0, f"stage.{part}.lr: is {of.lr:g}; it must be 0 (frozen) or more")
        require(of.weight_decay >= 0, f"stage.{part}.weight_decay: is {of.weight_decay:g}; it must be 0 or more")
    require(bool(config.data), "data: is empty; name at least one source (scenes or llava)")
    for i, source in enumerate(config.data):
        require((source.scenes is None) != (source.llava is None), f"data.{i}: needs exactly one of scenes and llava")
        require(source.weight > 0, f"data.{i}.weight: is {source.weight}; it must be positive")
        require(
            source.scenes is None or source.size > 0,
            f"data.{i}.size: scenes are endless; say how many samples make an epoch, e.g. size: 100000",
        )
        require(source.llava is None or bool(source.llava.file), f"data.{i}.llava.file: is missing")
    _check_optim(config.optim)
    require(min(config.checkpoint.every, config.checkpoint.keep) >= 1, "checkpoint: every and keep must be at least 1")
    require(config.logging.every >= 1, f"logging.every: is {config.logging.every}; it must be at least 1")
    require(config.workers >= 0, f"workers: is {config.workers}; it must be 0 or more")
    _check_lora(config)
    _check_encoder(config)
    if model.path is None:
        require(
            model.language is not None or model.vision is not None,
            "model: name a path (an existing VL-Mamba), a language part, or a vision encoder to be trained alone",
        )
    else:
        given = [f.name for f in dataclasses.fields(model) if f.name != "path" and getattr(model, f.name) != f.default]
        require(
            not given,
            f"model: path names a whole model, with its own {', '.join(given)}; leave path or these out (in a pipeline "
            "they are for the stage that puts the parts together: STAGE.model.KEY=VALUE)",
        )
    require(
        any(getattr(config.stage, part).lr > 0 for part in PARTS),
        "stage: nothing is trained; give vision, connector or language a learning rate (lr)",
    )


def _check_optim(optim: OptimConfig) -> None:
    """No comparison holds of nan, so that it is refused too."""
    require(optim.global_batch >= 1, f"optim.global_batch: is {optim.global_batch}; it must be at least 1")
    require(
        optim.micro_batch >= 1 and optim.global_batch % optim.micro_batch == 0,
        f"optim.micro_batch: {optim.micro_batch} does not divide optim.global_batch {optim.global_batch}",
    )
    require(optim.spike == 0 or optim.spike > 1, f"optim.spike: is {optim.spike}; it is a factor above 1, or 0")
    require(optim.max_length >= 2, f"optim.max_length: is {optim.max_length}; it must be at least 2")
    require(
        optim.pack_into is None or (optim.pack and optim.pack_into >= optim.max_length),
        f"optim.pack_into: is {optim.pack_into}; it needs pack: true, and at least max_length ({optim.max_length})",
    )
    require(
        0 <= optim.checkpoint_activations <= 1,
        f"optim.checkpoint_activations: is {optim.checkpoint_activations}; it is true, false or a share of the blocks",
    )
    if optim.capture:
        _check_capture(optim)
    for name in ("epochs", "max_steps", "time_budget", "eps"):
        value = getattr(optim, name)
        require(value is None or 0 < value < math.inf, f"optim.{name}: is {value}; it must be positive")
    for name in ("warmup", "beta1", "beta2"):
        value = getattr(optim, name)
        require(0 <= value < 1, f"optim.{name}: is {value}; it must be from 0 to below 1")
    require(optim.grad_clip >= 0, f"optim.grad_clip: is {optim.grad_clip}; it must be 0 (no clipping) or more")
    require(0 <= optim.final_lr <= 1, f"optim.final_lr: is {optim.final_lr}; it is a share of the peak, from 0 to 1")


def _check_capture(optim: OptimConfig) -> None:
    """A graph is one whole step, of kernels that are the same each time."""
    whole = optim.micro_batch == optim.global_batch
    require(whole, f"optim.capture: needs micro_batch ({optim.micro_batch}) equal to global_batch")
    require(not optim.compile, "optim.capture: does not go with optim.compile; choose one")
    require(not optim.checkpoint_activations, "optim.capture: does not go with checkpoint_activations; choose one")


def _check_encoder(config: RunConfig) -> None:
    """An encoder that is trained alone is kept whole, and learns from scenes' patches, as nothing else does."""
    model = config.model
    alone = model.vision is not None and model.language is None and model.path is None
    paired = model.contrastive is not None
    for i, source in enumerate(config.data):
        patches = source.scenes is not None and source.scenes.what == "patches"
        wanted = alone and not paired
        require(wanted or not patches, f"data.{i}.scenes.what: patches are for a model of a vision part alone")
        require(patches or not wanted, f"data.{i}: a vision part alone (no language) learns from scenes, what: patches")
        require(
            not patches or (source.scenes is not None and source.scenes.pictures),
            f"data.{i}.scenes.pictures: patches are nothing without the picture",
        )
    require(alone or not paired, "model.contrastive: is for a model of a vision part alone")
    if not alone:
        return
    whole = config.optim.micro_batch == config.optim.global_batch and config.stage.template == "plain"
    require(whole or not paired, "model.contrastive: needs stage.template: plain, and optim.micro_batch = global_batch")
    layer = model.vision_layer
    require(layer == -1, f"model.vision_layer: is {layer}; an encoder trained alone gives out its last layer, -1")
    require(not model.vision_cls, "model.vision_cls: an encoder trained alone is asked for patches only")
    require(not config.optim.pack, "optim.pack: pictures without text are not packed")
    require(config.lora is None, "lora: an encoder trained alone is trained whole")
    again = config.optim.checkpoint_activations
    require(not again, "optim.checkpoint_activations: is of a language model's blocks, and there is none")


def _check_lora(config: RunConfig) -> None:
    lora = config.lora
    if lora is None:
        return
    require(lora.rank >= 1, f"lora.rank: is {lora.rank}; it must be at least 1")
    require(bool(lora.targets), "lora.targets: is empty; name linear maps, such as in_proj")
    require(bool(lora.parts), "lora.parts: is empty; name vision, connector or language")
    for part in lora.parts:
        require(getattr(config.stage, part).lr > 0, f"lora.parts: {part} has no learning rate; give stage.{part}.lr")
