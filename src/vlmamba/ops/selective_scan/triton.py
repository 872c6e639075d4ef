"""Selective scan on the GPU, in Triton: forward and backward of Mamba's recurrence, over a sequence or over a grid of
patches.

One set of kernels serves both: a row is a sequence (K = 1) or one order of one image, and `position` says where in
memory its step t stands. A program is one warp that walks a segment of a row for 128 / S channels (`vlmamba.ops.lanes`
says how its lanes share them). Where rows and channels are too few to fill the GPU, a row is cut into segments: a
first pass finds what each segment adds to the state, and the main pass begins by folding what the segments before it
added.

The forward pass saves the state every CHUNK steps. The backward pass is two walks that never hold the state and its
gradient together: one forward with the state and its slope by A, from any saved state, and one back with the gradient;
a number for each step and channel that the first leaves behind takes the place of the states in the second. Every sum
over programs goes through partial results in memory and a second pass, so two runs agree bit for bit.

Letters: B batch, K scan orders, R = B * K rows, L length (or patches), D channels, N state size, C saved chunks, G
segments, J blocks of channels, S lanes of a group of 4 channels, NS states of a lane, T steps done together.
"""

from __future__ import annotations

import functools

import torch
import triton
from torch import Tensor

from vlmamba.ops.selective_scan.triton_kernels import (
    scan_forward_kernel,
    scan_output_grad_kernel,
    scan_segment_grad_kernel,
    scan_segment_kernel,
    scan_state_grad_kernel,
)

T = 4  # steps done together in forward: their loads are in flight while the steps before are computed
T_BACK = 2  # the same in backward
CHUNK = 64  # steps between two saved states
# Warps that each of a multiprocessor's four schedulers should have before a row is left whole: forward, walking back,
# and for the backward pass's walk forward, whose segments begin from saved states and so cost nothing.
ROUNDS = 4
ROUNDS_BACK = 3
ROUNDS_OUTPUT = 20
REGISTERS = 168  # of a thread: three warps a scheduler
REGISTERS_CUT = 128  # where forward cuts rows, so that all ROUNDS warps are there at once; costs whole rows a twentieth
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def row_major(t: Tensor) -> Tensor:
    """The kernels take any outer strides, but the last dimension must be contiguous: copy where it is not."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def check(op: str, **tensors: Tensor | None) -> None:
    """Raise ValueError for what the kernels cannot take: another dtype, or a tensor off the GPU outside the
    interpreter."""
    for name, t in tensors.items():
        if t is None:
            continue
        if name in ("slots", "seq_idx"):
            if t.is_floating_point():
                raise ValueError(f"{op}: {name} holds {t.dtype}; expected integers")
        elif t.dtype not in DTYPES:
            raise ValueError(
                f"{op}: {name} is {t.dtype}, but the Triton kernels take float32, bfloat16 and float16; "
                'convert it or pass implementation="reference"'
            )
        if not t.is_cuda and not triton.knobs.runtime.interpret:
            raise ValueError(
                f"{op}: {name} is on {t.device}, but the Triton kernels need a GPU; "
                'move it or pass implementation="reference"'
            )


def valid_lengths(seq_idx: Tensor | None) -> Tensor | None:
    """(B,) int32: positions of each row before its padding, which is marked by negative values and stands at the
    end."""
    return None if seq_idx is None else (seq_idx >= 0).sum(-1, dtype=torch.int32)


def lanes_of(N: int) -> tuple[int, int]:
    """(S, NS): lanes that share a group of 4 channels, and the states of each."""
    NS = 2 if N <= 8 else 4
    return max(4, triton.next_power_of_2(N) // NS), NS


def saved_shape(batch: int, length: int, channels: int, states: int) -> tuple[int, ...]:
    """Shape of the third output of `forward`: the states before every CHUNK steps and after the last one, in the
    kernels' own layout."""
    S, NS = lanes_of(states)
    return (batch, 1, triton.cdiv(length, CHUNK) + 1, triton.cdiv(channels, 128 // S), 4, 32, NS)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; in the interpreter 2, so that small cases are cut into segments too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def segment_length(warps: int, length: int, device: torch.device, rounds: int) -> int:
    """Steps of a segment, a multiple of CHUNK: the row whole if `warps` fill the GPU, else cut so that they do."""
    segments = max(1, rounds * 4 * multiprocessors(device) // max(warps, 1))
    return triton.cdiv(triton.cdiv(length, segments), CHUNK) * CHUNK


def _at_most(registers: int) -> dict[str, int]:
    """The compiler's option; AMD's has none such."""
    return {} if torch.version.hip else {"maxnreg": registers}


def _strides(t: Tensor | None) -> tuple[int, int, int]:
    """(batch, order, step) strides of (B, K, L, *)."""
    return (0, 0, 0) if t is None else (t.stride(0), t.stride(1), t.stride(2))


def _outer(t: Tensor | None) -> tuple[int, int]:
    return (0, 0) if t is None else (t.stride(0), t.stride(1))


def _is_packed(N: int, NS: int, S: int, *matrices: Tensor) -> bool:
    """Whether every lane's NS values of B and C stand on boundaries of their own size (at most 8 bytes)."""
    words = (min(8, NS * t.element_size()) for t in matrices)
    aligned = (
        t.data_ptr() % word == 0 and all(stride * t.element_size() % word == 0 for stride in t.stride()[:-1])
        for t, word in zip(matrices, words)
    )
    return S * NS == N and all(aligned)


def _is_whole(length: int, steps: int, seq_idx: Tensor | None, grid: tuple[int, int]) -> bool:
    """Whether every row is made of groups of `steps` neighbours, so that no step needs a bound of its own."""
    return length % steps == 0 and seq_idx is None and grid == (0, 0)


def scan_rows(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None,
    softplus: bool, initial: Tensor | None, seq_idx: Tensor | None, return_final: bool,
    grid: tuple[int, int] = (0, 0), orders: int = 0, save: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Scan K orders of B rows: x, dt (B, K, L, D), B, C (B, K, L, N), A (K, D, N), D, dt_bias (K, D), z (B, L, D);
    states (B, K, D, N). Gives y (B, K, L, D), the final state (empty unless asked for) and the states the backward
    needs (empty without `save`)."""
    batch, K, length, dim = x.shape
    N = B.shape[-1]
    S, NS = lanes_of(N)
    x, dt, B, C, A = row_major(x), row_major(dt), row_major(B), row_major(C), A.contiguous()
    z = z if z is None else row_major(z)
    blocks, rows = triton.cdiv(dim, 128 // S), batch * K
    y = torch.empty((batch, K, length, dim), dtype=x.dtype, device=x.device)
    kept = (batch, K, *saved_shape(1, length, dim, N)[2:]) if save else (0, 0, 0)
    saved = torch.empty(kept, dtype=torch.float32, device=x.device)
    final = torch.empty((batch, K, dim, N) if return_final else (0,), dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return y, final if initial is None or not return_final else final.copy_(initial), saved
    steps = segment_length(blocks * rows, length, x.device, ROUNDS)
    segments = triton.cdiv(length, steps)
    parts = spans = None
    lengths = valid_lengths(seq_idx)
    shape = (length, dim, N, K, orders, *grid, steps, segments)
    flags = {
        "CHUNK": CHUNK, "T": T, "S": S, "NS": NS, "SOFTPLUS": softplus, "GRID": grid != (0, 0),
        "PACKED": _is_packed(N, NS, S, B, C), "WHOLE": _is_whole(length, T, seq_idx, grid),
        "HAS_BIAS": dt_bias is not None, "HAS_SEQ": seq_idx is not None, "num_warps": 1,
        **_at_most(REGISTERS_CUT if segments > 1 else REGISTERS),
    }  # fmt: skip
    if segments > 1:
        parts, spans = _segment_buffers(rows, segments, blocks, NS, x.device)
        scan_segment_kernel[(blocks, segments - 1, rows)](
            x, dt, A, B, dt_bias, seq_idx, lengths, parts, spans, *shape, *_strides(x), *_strides(dt), *_strides(B),
            **flags,
        )  # fmt: skip
    scan_forward_kernel[(blocks, segments, rows)](
        x, dt, A, B, C, D, z, dt_bias, initial, seq_idx, lengths, parts, spans, y, final, saved, *shape, kept[2],
        *_strides(x), *_strides(dt), *_strides(B), *_strides(C), *_outer(z),
        SAVE=save, HAS_D=D is not None, HAS_Z=z is not None, HAS_INITIAL=initial is not None, HAS_FINAL=return_final,
        HAS_PARTS=segments > 1, **flags,
    )  # fmt: skip
    return y, final, saved


def _segment_buffers(rows: int, segments: int, blocks: int, NS: int, device: torch.device) -> tuple[Tensor, Tensor]:
    parts = torch.empty((rows, segments, blocks, 4, 32, NS), dtype=torch.float32, device=device)
    return parts, torch.empty((rows, segments, blocks, 32), dtype=torch.float32, device=device)


def scan_rows_backward(
    dy: Tensor, dfinal: Tensor | None, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    z: Tensor | None, dt_bias: Tensor | None, softplus: bool, needs_initial: bool, seq_idx: Tensor | None,
    saved: Tensor,
    grid: tuple[int, int] = (0, 0), orders: int = 0,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of `scan_rows`. dy (B, L, D) is shared by the K orders; the gradients of x, dt, B, C come per order."""
    batch, K, length, dim = x.shape
    N = B.shape[-1]
    S, NS = lanes_of(N)
    dy, x, dt, B, C, A = row_major(dy), row_major(x), row_major(dt), row_major(B), row_major(C), A.contiguous()
    z = z if z is None else row_major(z)
    blocks, rows = triton.cdiv(dim, 128 // S), batch * K

    def cut(rounds: int) -> tuple[int, int]:
        steps = segment_length(blocks * rows, length, x.device, rounds) if length else CHUNK
        return steps, triton.cdiv(length, steps)

    steps, segments = cut(ROUNDS_BACK)
    output_steps, output_segments = cut(ROUNDS_OUTPUT)
    f32 = x.new_empty(0, dtype=torch.float32)
    dx, ddt = (torch.empty((batch, K, length, dim), dtype=t.dtype, device=t.device) for t in (x, dt))
    dz = None if z is None else torch.empty((batch, length, dim), dtype=z.dtype, device=z.device)
    dBC = f32.new_empty((batch, K, blocks, length, 2 * N))
    dA, output_dA = f32.new_empty((batch, K, segments, dim, N)), f32.new_empty((batch, K, output_segments, dim, N))
    dD = None if D is None else f32.new_empty((batch, K, output_segments, dim))
    dbias = None if dt_bias is None else f32.new_empty((batch, K, segments, dim))
    dinitial = None
    if needs_initial:
        dinitial = f32.new_empty((batch, K, dim, N)) if x.numel() else _no_steps(dfinal, f32, (batch, K, dim, N))
    if x.numel():
        parts = spans = None
        work, slopes = f32.new_empty((rows, length, dim)), torch.empty_like(saved)
        lengths = valid_lengths(seq_idx)
        walk = (length, dim, N, K, orders, *grid)
        strides = (*_outer(dy), *_strides(x), *_strides(dt), *_strides(B), *_strides(C), *_outer(z))
        flags = {
            "CHUNK": CHUNK, "T": T_BACK, "S": S, "NS": NS, "SOFTPLUS": softplus, "GRID": grid != (0, 0),
            "PACKED": _is_packed(N, NS, S, B, C), "WHOLE": _is_whole(length, T_BACK, seq_idx, grid),
            "HAS_Z": z is not None, "HAS_BIAS": dt_bias is not None, "HAS_SEQ": seq_idx is not None, "num_warps": 1,
            **_at_most(REGISTERS),
        }  # fmt: skip
        if segments > 1:
            parts, spans = _segment_buffers(rows, segments, blocks, NS, x.device)
            scan_segment_grad_kernel[(blocks, segments, rows)](
                dy, dt, A, C, z, dt_bias, seq_idx, lengths, parts, spans, *walk, steps, segments,
                *_outer(dy), *_strides(dt), *_strides(C), *_outer(z), **flags,
            )  # fmt: skip
        scan_output_grad_kernel[(blocks, output_segments, rows)](
            dy, x, dt, A, B, C, D, z, dt_bias, seq_idx, lengths, saved, work, slopes, output_dA, dBC, dD, dz,
            *walk, output_steps, output_segments, saved.shape[2], *strides, HAS_D=D is not None, **flags,
        )  # fmt: skip
        scan_state_grad_kernel[(blocks, segments, rows)](
            dy, dfinal, x, dt, A, B, C, D, z, dt_bias, seq_idx, lengths, saved, work, slopes, parts, spans,
            dx, ddt, dA, dBC, dbias, dinitial, *walk, steps, segments, saved.shape[2], *strides,
            HAS_D=D is not None, HAS_DFINAL=dfinal is not None, HAS_DINITIAL=needs_initial, HAS_PARTS=segments > 1,
            **flags,
        )  # fmt: skip
    dB, dC = dBC.sum(2).split(N, -1)
    return (
        dx, ddt, dA.sum((0, 2)) + output_dA.sum((0, 2)), dB.to(B.dtype).contiguous(), dC.to(C.dtype).contiguous(),
        None if dD is None else dD.sum((0, 2)), dz,
        None if dbias is None else dbias.sum((0, 2)), dinitial,
    )  # fmt: skip


def _no_steps(dfinal: Tensor | None, f32: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Gradient of the initial state of an empty sequence: that of the final state."""
    return f32.new_zeros(shape) if dfinal is None else dfinal.clone()


def forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None,
    dt_softplus: bool, initial_state: Tensor | None, seq_idx: Tensor | None, return_final_state: bool,
    save: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """x, dt, z (B, L, D), A (D, N), B, C (B, L, N), D, dt_bias (D,), initial_state (B, D, N), seq_idx (B, L) int32,
    negative for padding. Gives y (B, L, D), the final state (B, D, N) or an empty tensor, and the saved states for
    `backward` (empty without `save`).
    Raises ValueError for a dtype or device that the kernels cannot take."""
    check(
        "selective_scan",
        x=x,
        dt=dt,
        A=A,
        B=B,
        C=C,
        D=D,
        z=z,
        dt_bias=dt_bias,
        initial_state=initial_state,
        seq_idx=seq_idx,
    )
    y, final, saved = scan_rows(
        x[:, None], dt[:, None], A[None], B[:, None], C[:, None], _vector(D), z, _vector(dt_bias), dt_softplus,
        _state(initial_state), _indices(seq_idx), return_final_state, save=save,
    )  # fmt: skip
    return y[:, 0], final[:, 0] if return_final_state else final, saved


def backward(
    dy: Tensor, dfinal_state: Tensor | None, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    z: Tensor | None, dt_bias: Tensor | None, dt_softplus: bool, initial_state: Tensor | None, seq_idx: Tensor | None,
    saved: Tensor,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients (dx, ddt, dA, dB, dC, dD, dz, ddt_bias, dinitial_state) of `forward`; None where the input is None."""
    check("selective_scan", dy=dy, dfinal_state=dfinal_state, x=x, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias)
    dx, ddt, dA, dB, dC, dD, dz, dbias, dinitial = scan_rows_backward(
        dy, _state(dfinal_state), x[:, None], dt[:, None], A[None], B[:, None], C[:, None], _vector(D), z,
        _vector(dt_bias), dt_softplus, initial_state is not None, _indices(seq_idx), saved,
    )  # fmt: skip
    dx, ddt, dA, dB, dC = (_present(t) for t in (dx, ddt, dA, dB, dC))
    return (
        dx[:, 0], ddt[:, 0], dA[0], dB[:, 0], dC[:, 0], None if dD is None else dD[0], dz,
        None if dbias is None else dbias[0], None if dinitial is None else dinitial[:, 0],
    )  # fmt: skip


def _present(t: Tensor | None) -> Tensor:
    assert t is not None
    return t


def _vector(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()[None]


def _state(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()[:, None]


def _indices(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()
