"""The Mamba-1 language model (Gu & Dao 2023, arXiv 2312.00752): mixer, block, backbone, causal LM.

Parameters are saved under the names of transformers' `MambaForCausalLM`; at run time A_log, D and the bias of dt_proj
live together in `mixer.ssm`, which stays float32 whatever the model is cast to (see `names.py`).

Shapes: B batch, L length, d model width (hidden_size), D channels (intermediate_size), N state size, R rank of dt,
W convolution width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, MambaConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

from vlmamba import ops
from vlmamba.models import decode, prefill
from vlmamba.models.loading import LoadsStrictly
from vlmamba.models.loss import next_token_loss
from vlmamba.models.names import register_names
from vlmamba.models.padding import Compaction, towards_end
from vlmamba.models.state import MambaState


class SSMParameters(nn.Module):
    """A_log, D and the bias of dt: small, sensitive, float32 in storage, forward, gradient and optimiser.

    A submodule of its own, called like one, so that parallelism and precision can be applied to it alone.
    A leading shape (one set per scan order) is allowed.
    """

    def __init__(self, channels: int, state_size: int, sets: tuple[int, ...] = ()):
        super().__init__()
        self.A_log = nn.Parameter(torch.empty(*sets, channels, state_size, dtype=torch.float32))
        self.D = nn.Parameter(torch.empty(*sets, channels, dtype=torch.float32))
        self.dt_bias = nn.Parameter(torch.empty(*sets, channels, dtype=torch.float32))

    def forward(self, beside: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A = -exp(A_log) (..., D, N), D (..., D), dt bias (..., D), each at least float32.

        `beside` is any tensor on their device. A module must not be called without inputs: in a recomputation FSDP
        takes this one for the root of a forward pass, whose inputs it moves, and up to torch 2.11 fails without any.
        """
        with torch.autocast(beside.device.type, enabled=False):
            return -torch.exp(self.A_log), self.D, self.dt_bias

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        # `.to(bfloat16)`, `.half()` move these parameters but never narrow them: at a learning rate of 2e-5 a bf16
        # A_log would not move at all (its rounding step is a hundred Adam steps).
        def keep_wide(t: Tensor) -> Tensor:
            out = fn(t)
            return t.to(out.device) if out.dtype in (torch.bfloat16, torch.float16) else out

        return super()._apply(keep_wide, recurse)

    @torch.no_grad()
    def reset(self, dt_min: float, dt_max: float, dt_floor: float) -> None:
        """S4D-real A (A_n = -n), D = 1, dt log-uniform in [dt_min, dt_max] through the inverse of softplus."""
        n = torch.arange(1, self.A_log.shape[-1] + 1, dtype=torch.float32, device=self.A_log.device)
        init.copy_(self.A_log, torch.log(n).expand_as(self.A_log))
        init.ones_(self.D)
        spread = math.log(dt_max) - math.log(dt_min)
        dt = torch.exp(torch.rand_like(self.dt_bias) * spread + math.log(dt_min)).clamp(min=dt_floor)
        init.copy_(self.dt_bias, dt + torch.log(-torch.expm1(-dt)))


class CausalConv1d(nn.Module):
    """Depthwise causal convolution over time and its activation; weight (D, 1, W) as in `nn.Conv1d`."""

    def __init__(self, channels: int, width: int, bias: bool = True, activation: str | None = "silu"):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, width))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None
        self.activation = activation

    def forward(
        self,
        x_BLD: Tensor,
        initial_state: Tensor | None = None,
        seq_idx: Tensor | None = None,
        return_final_state: bool = False,
    ) -> tuple[Tensor, Tensor]:
        return ops.causal_conv1d(
            x_BLD,
            self.weight.squeeze(1),
            self.bias,
            activation=self.activation,
            initial_state=initial_state,
            seq_idx=seq_idx,
            return_final_state=return_final_state,
        )

    def step(self, state_SWD: Tensor, x_BD: Tensor) -> Tensor:
        """One token; `state_SWD` is updated in place."""
        return ops.conv_update(state_SWD, x_BD, self.weight.squeeze(1), self.bias, activation=self.activation)


class RMSNorm(nn.Module):
    """Root-mean-square norm: computed in float32 from the residual stream, given out in the compute dtype."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.weight.dtype
        return ops.rms_norm(x, self.weight, self.eps, dtype)


class MambaMixer(nn.Module):
    """The Mamba-1 layer (arXiv 2312.00752, section 3.4): in_proj, convolution, selective scan, gate, out_proj.

    Every projection is called as a module, so adapters and quantised layers take part.
    """

    def __init__(self, config: MambaConfig, layer: int):
        super().__init__()
        width, channels = config.hidden_size, config.intermediate_size
        self.layer = layer
        self.rank, self.state_size = int(config.time_step_rank), config.state_size
        self.in_proj = nn.Linear(width, 2 * channels, bias=config.use_bias)
        self.conv1d = CausalConv1d(channels, config.conv_kernel, config.use_conv_bias, config.hidden_act)
        self.x_proj = nn.Linear(channels, self.rank + 2 * self.state_size, bias=False)
        self.dt_proj = nn.Linear(self.rank, channels, bias=False)
        self.ssm = SSMParameters(channels, self.state_size)
        self.out_proj = nn.Linear(channels, width, bias=config.use_bias)

    def forward(self, x_BLd: Tensor, state: MambaState | None = None, seq_idx: Tensor | None = None) -> Tensor:
        """(B, L, d) to (B, L, d); `state` is continued from and updated."""
        x_BLD, z_BLD = self.in_proj(x_BLd).chunk(2, dim=-1)
        started = state is not None and state.ssm[self.layer] is not None
        if started and x_BLD.shape[1] == 1 and seq_idx is None and not torch.is_grad_enabled():
            assert state is not None
            y_BLD = self._step(x_BLD[:, 0], z_BLD[:, 0], state).unsqueeze(1)
        else:
            y_BLD = self._scan(x_BLD, z_BLD, state, seq_idx)
        return self.out_proj(y_BLD)

    def _select(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The input-dependent dt (..., D), B (..., N), C (..., N) of arXiv 2312.00752, algorithm 2."""
        dt, B, C = self.x_proj(x).split([self.rank, self.state_size, self.state_size], dim=-1)
        return self.dt_proj(dt), B, C

    def _scan(self, x_BLD: Tensor, z_BLD: Tensor, state: MambaState | None, seq_idx: Tensor | None) -> Tensor:
        keep = state is not None
        conv, ssm = (state.conv[self.layer], state.ssm[self.layer]) if state is not None else (None, None)
        x_BLD, conv = self.conv1d(x_BLD, conv, seq_idx, keep)
        dt_BLD, B_BLN, C_BLN = self._select(x_BLD)
        A, D, dt_bias = self.ssm(x_BLD)
        y_BLD, ssm = ops.selective_scan(
            x_BLD,
            dt_BLD,
            A,
            B_BLN,
            C_BLN,
            D,
            z_BLD,
            dt_bias,
            initial_state=ssm,
            seq_idx=seq_idx,
            return_final_state=keep,
        )
        if state is not None:
            state.update(self.layer, conv, ssm)
        return y_BLD

    def _step(self, x_BD: Tensor, z_BD: Tensor, state: MambaState) -> Tensor:
        conv, ssm = state.conv[self.layer], state.ssm[self.layer]
        assert conv is not None
        assert ssm is not None
        x_BD = self.conv1d.step(conv, x_BD)
        dt_BD, B_BN, C_BN = self._select(x_BD)
        A, D, dt_bias = self.ssm(x_BD)
        return ops.state_update(ssm, x_BD, dt_BD, A, B_BN, C_BN, D, z_BD, dt_bias)


class MambaBlock(GradientCheckpointingLayer):
    """Norm, mixer, residual."""

    def __init__(self, config: MambaConfig, layer: int):
        super().__init__()
        self.residual_in_fp32 = config.residual_in_fp32
        self.norm = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mixer = MambaMixer(config, layer)

    def forward(self, x_BLd: Tensor, state: MambaState | None = None, seq_idx: Tensor | None = None) -> Tensor:
        if self.residual_in_fp32:
            x_BLd = x_BLd.to(torch.promote_types(x_BLd.dtype, torch.float32))
        return x_BLd + self.mixer(self.norm(x_BLd), state, seq_idx)


@dataclass
class MambaOutput(ModelOutput):
    """What the backbone and the causal LM return; `cache_params` is the state, for the next call."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    last_hidden_state: Tensor | None = None
    cache_params: MambaState | None = None
    hidden_states: tuple[Tensor, ...] | None = None


class VLMambaPreTrainedModel(LoadsStrictly, PreTrainedModel):
    """What our models share: precision, initialisation, and the way transformers sees them."""

    config_class: type = MambaConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MambaBlock"]
    _keep_in_fp32_modules_strict = ["ssm"]
    _is_stateful = True
    _input_embed_layer = "embeddings"

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the state is a MambaState, made by the first forward pass

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        config = self.config.get_text_config()
        if isinstance(module, SSMParameters):
            module.reset(config.time_step_min, config.time_step_max, config.time_step_floor)
        elif isinstance(module, CausalConv1d):
            bound = module.weight.shape[-1] ** -0.5
            init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=0.02)
        elif isinstance(module, RMSNorm | nn.LayerNorm):
            init.ones_(module.weight)
            if isinstance(module, nn.LayerNorm) and module.bias is not None:
                init.zeros_(module.bias)
        if isinstance(module, MambaMixer):
            self._init_mixer(module, config)

    def _init_mixer(self, mixer: MambaMixer, config: MambaConfig) -> None:
        bound = config.time_step_rank**-0.5 * config.time_step_scale
        if config.time_step_init_scheme == "constant":
            init.constant_(mixer.dt_proj.weight, bound)
        else:
            init.uniform_(mixer.dt_proj.weight, -bound, bound)
        if config.rescale_prenorm_residual and not getattr(mixer.out_proj.weight, "_is_hf_initialized", False):
            # GPT-2's scheme: variance of the residual stream independent of depth.
            mixer.out_proj.weight.div_(math.sqrt(config.num_hidden_layers))


class VLMambaBackbone(VLMambaPreTrainedModel):
    """Embedding, blocks, final norm."""

    def __init__(self, config: MambaConfig):
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([MambaBlock(config, i) for i in range(config.num_hidden_layers)])
        self.norm_f = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | Compaction | None = None,
        inputs_embeds: Tensor | None = None,
        cache_params: MambaState | None = None,
        use_cache: bool | None = None,
        seq_idx: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> MambaOutput:
        """Reads tokens after whatever `cache_params` has read.

        Args:
            input_ids: (B, L) int64; or inputs_embeds (B, L, d).
            attention_mask: (B, L), 0 marks padding, anywhere in a row: a padded row gives what it gives alone, the
                state included.
            cache_params: state to continue from, updated in place; with `use_cache` a new one is made.
            seq_idx: (B, L) int32, which sequence of a packed row each position belongs to; the state resets where
                it changes.

        Returns:
            last_hidden_state (B, L, d); if asked for, cache_params and hidden_states (of every block, then the norm).
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds, not both and not neither")
        hidden = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and cache_params is None:
            cache_params = MambaState.empty(len(self.layers))
        if cache_params is not None and self.training and torch.is_grad_enabled() and self.is_gradient_checkpointing:
            raise ValueError(
                "a state (cache_params, use_cache=True) and gradient checkpointing do not go together in training: "
                "what is computed again would begin from the state's end; turn one of them off"
            )
        if cache_params is not None and cache_params.slots not in (None, hidden.shape[0]):
            raise ValueError(f"the state holds {cache_params.slots} sequences, the input {hidden.shape[0]}")
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states

        padding = Compaction.of(attention_mask, seq_idx, hidden.shape[:2])
        if padding is not None:
            hidden, seq_idx = padding.to_front(hidden), padding.seq_idx
        trace: list[Tensor] = []
        for block in self.layers:
            hidden = block(hidden, cache_params, seq_idx)
            if output_hidden_states:
                trace.append(hidden)
        hidden = self.norm_f(hidden)
        if output_hidden_states:
            trace.append(hidden)
        if padding is not None:
            hidden, trace = padding.restore(hidden), [padding.restore(h) for h in trace]
        return MambaOutput(
            last_hidden_state=hidden,
            cache_params=cache_params,
            hidden_states=tuple(trace) if output_hidden_states else None,
        )


class RecurrentGenerationMixin(GenerationMixin):
    """`generate` for a model whose past is a state.

    With `cache_params` it reads all ids that it is given, after what the state has read. So give what is new alone: the
    last token of the answer before, which was drawn but not read, and what follows it; not the whole sequence again.
    """

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """As transformers', and exact wherever `attention_mask` has its zeros: prompts that end in padding are read
        as if it stood before them, and given back as they came, with the new tokens after the padding."""
        mask, embeds = kwargs.get("attention_mask"), kwargs.get("inputs_embeds")
        ids = kwargs.get("input_ids") if inputs is None else inputs
        tokens = ids if embeds is None else embeds
        if mask is None or tokens is None or mask.ndim != 2 or bool((mask[:, -1] != 0).all()):
            return super().generate(inputs, *args, **kwargs)
        prompt = {name: t for name, t in (("input_ids", ids), ("inputs_embeds", embeds)) if t is not None}
        kwargs["attention_mask"], *moved = towards_end(mask[:, -tokens.shape[1] :], *prompt.values())
        output = super().generate(None, *args, **kwargs | dict(zip(prompt, moved, strict=True)))
        if ids is not None:
            sequences = output if isinstance(output, Tensor) else output.sequences
            sequences[:, : ids.shape[1]] = ids.repeat_interleave(len(sequences) // len(ids), 0)
        return output

    def _prepare_generation_config(self, *args: Any, **kwargs: Any) -> tuple[GenerationConfig, dict[str, Any]]:
        config, model_kwargs = super()._prepare_generation_config(*args, **kwargs)
        if config.output_attentions and config.return_dict_in_generate:
            raise ValueError(
                "output_attentions=True: this language model has no attention to give; leave it out "
                "(output_hidden_states=True gives what every layer makes)"
            )
        return config, model_kwargs

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        inputs_embeds: Tensor | None = None,
        cache_params: MambaState | None = None,
        attention_mask: Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """What transformers prepares for a step (images for the prompt alone), trimmed to what is new."""
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            is_first_iteration=is_first_iteration,
            cache_params=cache_params,
            **kwargs,
        )
        if not is_first_iteration and cache_params is not None:
            # After the prompt the state is all there is: one new token per row, none of them padding.
            inputs |= {"input_ids": inputs["input_ids"][:, -1:], "attention_mask": None}
        elif attention_mask is not None and inputs.get("input_ids") is not None:
            # A continued conversation may hand in a mask of all that was ever read: the new tokens' part counts.
            inputs["attention_mask"] = attention_mask[:, -inputs["input_ids"].shape[1] :]
        return inputs


class VLMambaForCausalLM(VLMambaPreTrainedModel, RecurrentGenerationMixin):
    """The Mamba language model with its head; loads and saves what transformers' `MambaForCausalLM` does."""

    _tied_weights_keys = {"lm_head.weight": "backbone.embeddings.weight"}

    def __init__(self, config: MambaConfig):
        super().__init__(config)
        self.backbone = VLMambaBackbone(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | Compaction | None = None,
        inputs_embeds: Tensor | None = None,
        cache_params: MambaState | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        seq_idx: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        num_tokens: int | None = None,
        num_labels: int | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> MambaOutput:
        """As `VLMambaBackbone.forward`, plus:

        Args:
            labels: (B, L), -100 where there is no loss; shifted here. In training mode the loss is computed from the
                supervised positions alone and no logits are returned.
            logits_to_keep: only the last so many positions (0: all), or a tensor of positions. A prompt of more than
                `prefill.CHUNK` tokens is read in pieces where no gradient is wanted; with this, in the memory of one.
            num_items_in_batch: divides the summed loss (token-weighted accumulation); default: the labels counted.
            num_tokens: entries of the vocabulary that exist; the padded rows above get logit -inf and no loss.
            num_labels: how many positions have a label to predict, if known: a GPU is then not waited for.

        Returns:
            loss (float32 scalar), logits (B, kept, V), cache_params.
        """
        if labels is attention_mask is seq_idx is None and input_ids is not None and cache_params is not None:
            fused = None if output_hidden_states else decode.one_token(self, input_ids, cache_params)
            if fused is not None:
                return MambaOutput(logits=_without_padding(fused, num_tokens), cache_params=cache_params)
        else:
            decode.look_again(self)
        if labels is seq_idx is None and not (output_hidden_states or self.config.output_hidden_states):
            prompt = prefill.read(
                self, input_ids, inputs_embeds, attention_mask, cache_params, use_cache, logits_to_keep
            )
            if prompt is not None:
                return MambaOutput(logits=_without_padding(prompt[0], num_tokens), cache_params=prompt[1])
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        padding = None if tokens is None else Compaction.of(attention_mask, seq_idx, tokens.shape[:2])
        output = self.backbone(
            input_ids,
            padding,
            inputs_embeds,
            cache_params,
            use_cache,
            seq_idx,
            output_hidden_states,
        )
        hidden = output.last_hidden_state
        if labels is not None:
            front = hidden
            if padding is not None:  # the first token after padding is told from the last before it, or from nothing
                front, labels, seq_idx = padding.to_front(hidden), padding.to_front(labels), padding.seq_idx
            output.loss = next_token_loss(
                self.lm_head, front, labels, seq_idx, num_items_in_batch, num_tokens, num_labels
            )
            if self.training:
                return output
        if isinstance(logits_to_keep, int):
            hidden = hidden[:, -logits_to_keep:] if logits_to_keep else hidden
        else:
            hidden = hidden[:, logits_to_keep]
        output.logits = _without_padding(self.lm_head(hidden), num_tokens)
        return output


def _without_padding(logits: Tensor, num_tokens: int | None) -> Tensor:
    """Logits in which the padded rows of the vocabulary are impossible, in place."""
    if num_tokens is not None and num_tokens < logits.shape[-1]:
        logits[..., num_tokens:] = -torch.inf
    return logits


register_names("VLMambaBackbone", "VLMambaForCausalLM")
