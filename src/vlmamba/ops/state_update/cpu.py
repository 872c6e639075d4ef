"""One-token updates in native code on the CPU: one call for all that the token needs of the scan or the convolution.

Legend: S slots, B batch, D channels, N states per channel, W taps.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from vlmamba.ops import native
from vlmamba.ops.rows import place, readable
from vlmamba.ops.state_update import kernels, reference
from vlmamba.ops.state_update.kernels import Arg


def forward(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    dt_bias: Tensor | None, dt_softplus: bool, slots: Tensor | None,
) -> Tensor:  # fmt: skip
    """Advances state (S, D, N) by one token and returns y (B, D) in x's dtype."""
    if not _in_place(state):
        return reference.forward(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, slots)
    batch, channels = x.shape
    states = A.shape[1]
    y = torch.empty(batch, channels)
    held = {Arg.X: readable(x), Arg.DT: readable(dt), Arg.B: readable(B), Arg.C: readable(C), Arg.Y: y}
    held[Arg.STATE] = state
    if z is not None:
        held[Arg.Z] = readable(z)
    parameters = {Arg.A: A, Arg.D: D, Arg.BIAS: dt_bias}
    fixed = {arg: value.float().contiguous() for arg, value in parameters.items() if value is not None}
    table, slots = _table(held, fixed, channels, batch, slots)
    table[Arg.SOFTPLUS] = int(dt_softplus)
    lanes = native.host().lanes
    kernel = _kernel("update", states, False)
    work = [
        functools.partial(_run, kernel, table, rows, 2 * (-(-channels // lanes) * lanes))
        for rows in _shares(batch, 4 * batch * channels * states)
    ]
    native.run(work, len(work))
    return y.to(x.dtype)


def conv_forward(
    state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, slots: Tensor | None
) -> Tensor:
    """Shifts x (B, D) into state (S, W-1, D), oldest first, and returns the convolution's output (B, D)."""
    if not _in_place(state):
        return reference.conv_forward(state, x, weight, bias, activation, slots)
    batch, channels = x.shape
    y = torch.empty(batch, channels)
    held = {Arg.X: readable(x), Arg.Y: y, Arg.STATE: state}
    fixed = {Arg.WEIGHT: weight.float().t().contiguous()}
    if bias is not None:
        fixed[Arg.BIAS] = bias.float().contiguous()
    table, slots = _table(held, fixed, channels, batch, slots)
    _kernel("convolve", weight.shape[1], activation == "silu")(table, 0, batch)
    return y.to(x.dtype)


def _in_place(state: Tensor) -> bool:
    """Whether the kernels can work on the state where it lies; otherwise (a bfloat16 window) the plain form does."""
    return state.dtype == torch.float32 and (state.shape[0] == 0 or state[0].is_contiguous())


def _table(
    held: dict[Arg, Tensor], fixed: dict[Arg, Tensor], channels: int, batch: int, slots: Tensor | None
) -> tuple[list[int], Tensor]:
    """The table of arguments, and the slots, which must outlive it."""
    if slots is None:
        slots = torch.arange(batch)
    else:
        slots = slots.long().contiguous()
        count = held[Arg.STATE].shape[0]
        if batch and not 0 <= int(slots.min()) <= int(slots.max()) < count:
            raise ValueError(f"slots {slots.tolist()} must lie in 0..{count - 1}: the state has {count} slots")
    table = [0] * kernels.ARGUMENTS
    table[Arg.CHANNELS], table[Arg.SLOTS] = channels, slots.data_ptr()
    for arg, tensor in held.items():
        place(table, arg, tensor)
    for arg, tensor in fixed.items():
        table[arg] = tensor.data_ptr()
    return table, slots


def _shares(batch: int, work: int) -> list[range]:
    parts = max(min(native.threads_for(work), batch), 1)
    return [range(batch * part // parts, batch * (part + 1) // parts) for part in range(parts)]


def _run(kernel: native.Kernel, table: list[int], rows: range, scratch_floats: int) -> None:
    scratch = torch.empty(scratch_floats)
    kernel([*table[: Arg.SCRATCH], scratch.data_ptr(), *table[Arg.SCRATCH + 1 :]], rows.start, rows.stop)


@functools.cache
def _kernel(name: str, size: int, silu: bool) -> native.Kernel:
    host = native.host()
    if name == "update":
        return native.Kernel(name, kernels.update(name, host.lanes, host.avx512, size))
    return native.Kernel(name, kernels.convolve(name, host.lanes, host.avx512, size, silu))
