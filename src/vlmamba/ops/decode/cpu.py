"""One decoding step in native code on the CPU: a whole token in one call, weights read once, by all threads.

States stay where the caller keeps them and are advanced in place. Arithmetic is float32, whatever the weights are
stored in. Legend: B batch, d model width, D channels, N state size, R rank of dt, W taps, F = R + 2 N features of
x_proj, V vocabulary.
"""

from __future__ import annotations

import functools
import struct
import threading
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from vlmamba.ops import native
from vlmamba.ops.decode import HOST_ROWS, Head, Layer, Matrix, crew, kernels
from vlmamba.ops.decode.kernels import Arg, Form, LayerArg
from vlmamba.ops.decode.products import ITEM

MOST_THREADS = 8
CHUNK = 1 << 15  # bytes of weights that a chunk has at least: some microseconds of reading
PARTS = (
    4  # chunks of a phase for each thread: more of them cost starts, fewer make the quick thread wait for the slow one
)
_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.int8: "int8"}


def compact(layers: Sequence[Layer], head: Head) -> tuple[list[Layer], Head]:
    """The same weights in half the memory traffic, bit for bit: float32 weights that are all bfloat16 numbers (a
    checkpoint in bfloat16, loaded as float32) as bfloat16. Others are returned as they are."""
    matrices = [head.matrix, *(m for layer in layers for m in (layer.in_proj, layer.out_proj))]
    weights = [m.weight for m in matrices if m.scale is None]
    weights += [w for layer in layers for w in (layer.x_proj, layer.dt_proj)]
    if not all(w.dtype == torch.float32 and _is_bfloat16(w) for w in weights):
        return list(layers), head

    def half(matrix: Matrix) -> Matrix:
        return matrix if matrix.scale is not None else Matrix(matrix.weight.bfloat16())

    slim = [
        replace(
            layer,
            in_proj=half(layer.in_proj),
            x_proj=layer.x_proj.bfloat16(),
            dt_proj=layer.dt_proj.bfloat16(),
            out_proj=half(layer.out_proj),
        )
        for layer in layers
    ]
    return slim, replace(head, matrix=half(head.matrix))


def _is_bfloat16(weight: Tensor) -> bool:
    """Whether the lower half of every float32 is zero; one row mostly tells."""
    return all(not bool((part.view(torch.int32) & 0xFFFF).any()) for part in (weight[:1], weight))


class Token:
    """The step for one model: its weights, where they lie, and the memory it works in.

    Args:
        layers, head: float32 or bfloat16 weights, contiguous; the large matrices may be int8. They are read where they
            lie, so they must not move.
        threads: how many; if not given, one or `torch.get_num_threads()`, whichever is faster at the time.
    """

    def __init__(self, layers: Sequence[Layer], head: Head, threads: int | None = None) -> None:
        self._threads, self._pace = threads, Pace()
        self._head, self._layers = head, list(layers)
        self._lanes = native.host().lanes
        (self._channels, self._states), self._taps = layers[0].A.shape, layers[0].conv_weight.shape[1]
        self._width, self._features = len(layers[0].norm), len(layers[0].x_proj)
        self._vocabulary = len(head.matrix.weight)
        self._large, self._small = _NAMES[head.matrix.weight.dtype], _NAMES[layers[0].x_proj.dtype]
        self._kept: list[Tensor] = []  # what the table points at
        self._counters = np.zeros(32, np.int64)  # two numbers, on cache lines of their own
        self._began = 0
        self._one_at_a_time = threading.Lock()
        self._cut()
        self._fill()

    def _padded(self, count: int) -> int:
        return -(-count // self._lanes) * self._lanes

    def _cut(self) -> None:
        """How many channels or rows make a chunk, and so how many chunks a token is."""
        large = ITEM[self._large]
        parts = PARTS * min(self._threads or torch.get_num_threads(), MOST_THREADS)

        def share(rows: int, row_bytes: int) -> int:
            return min(max(-(-rows // parts), -(-CHUNK // row_bytes)), rows)

        self._group = self._padded(share(self._channels, 2 * self._width * large))
        self._out_rows = share(self._width, self._channels * large)
        self._head_rows = share(self._vocabulary, self._width * large)
        self._groups = -(-self._channels // self._group)
        chunks = 2 * self._groups - (-self._width // self._out_rows)
        self._chunks = len(self._layers) * chunks - (-self._vocabulary // self._head_rows)

    def _fill(self) -> None:
        """The tables and the buffers."""
        rows, channels, width = HOST_ROWS, self._padded(self._channels), self._padded(self._width)
        scratch = rows * width + self._padded(rows * self._features)
        table = self._table = np.zeros(len(Arg), np.int64)
        for arg, shape in {
            Arg.HIDDEN: (rows, width), Arg.X: (rows, channels), Arg.Z: (rows, channels), Arg.DT: (rows, channels),
            Arg.Y: (rows, channels), Arg.PARTIAL: (self._groups, self._padded(rows * self._features)),
            Arg.SCRATCH: (MOST_THREADS, scratch),
        }.items():  # fmt: skip
            buffer = torch.zeros(shape)
            table[arg] = self._keep(buffer)
            if arg == Arg.HIDDEN:
                self._hidden = buffer
        table[Arg.HIDDEN_STRIDE], table[Arg.CHANNEL_STRIDE] = 4 * width, 4 * channels
        table[Arg.PARTIAL_STRIDE], table[Arg.SCRATCH_STRIDE] = 4 * self._padded(rows * self._features), 4 * scratch
        table[Arg.TAKEN], table[Arg.DONE] = self._counters.ctypes.data, self._counters[16:].ctypes.data
        table[Arg.YIELD] = crew.yield_address()
        table[Arg.LAYER_COUNT], table[Arg.WIDTH], table[Arg.CHANNELS] = len(self._layers), self._width, self._channels
        table[Arg.RANK], table[Arg.FEATURES] = self._features - 2 * self._states, self._features
        table[Arg.VOCABULARY], table[Arg.GROUP] = self._vocabulary, self._group
        table[Arg.OUT_ROWS], table[Arg.HEAD_ROWS] = self._out_rows, self._head_rows
        table[Arg.NORM], table[Arg.EPS] = self._vector(self._head.norm), _bits(self._head.eps)
        self._enter_matrix(table, Arg.HEAD, self._head.matrix)
        self._layer_table = np.stack([self._layer(layer) for layer in self._layers])
        table[Arg.LAYERS] = self._layer_table.ctypes.data

    def _layer(self, layer: Layer) -> np.ndarray:
        row = np.zeros(len(LayerArg), np.int64)
        row[LayerArg.NORM], row[LayerArg.EPS] = self._vector(layer.norm), _bits(layer.eps)
        self._enter_matrix(row, LayerArg.IN, layer.in_proj)
        self._enter_matrix(row, LayerArg.OUT, layer.out_proj)
        row[LayerArg.CONV] = self._vector(layer.conv_weight.t())
        no_bias = torch.zeros(self._channels)
        row[LayerArg.CONV_BIAS] = self._vector(no_bias if layer.conv_bias is None else layer.conv_bias)
        row[LayerArg.X_PROJ], row[LayerArg.DT_PROJ] = self._keep(layer.x_proj), self._keep(layer.dt_proj)
        row[LayerArg.DT_BIAS], row[LayerArg.D] = self._vector(layer.dt_bias), self._vector(layer.D)
        row[LayerArg.A] = self._keep(layer.A.float())
        return row

    def _enter_matrix(self, table: np.ndarray, arg: int, matrix: Matrix) -> None:
        table[arg] = self._keep(matrix.weight)
        if matrix.scale is not None:
            table[arg + 1] = self._keep(matrix.scale)

    def _vector(self, values: Tensor) -> int:
        """Address of a float32 copy whose last dimension is padded to whole lanes."""
        surplus = -values.shape[-1] % self._lanes
        return self._keep(torch.nn.functional.pad(values.float(), (0, surplus)).contiguous())

    def _keep(self, tensor: Tensor) -> int:
        assert tensor.is_contiguous()
        self._kept.append(tensor)
        return tensor.data_ptr()

    def prepare(self, window: torch.dtype) -> None:
        """Compiles the code for states whose convolution windows have this dtype, if that was not done yet."""
        self._kernel(window)

    def _kernel(self, window: torch.dtype) -> native.Kernel:
        return _compiled(Form(self._large, self._small, _NAMES[window], self._states, self._taps))

    def logits(self, tokens: Tensor, conv: Sequence[Tensor], ssm: Sequence[Tensor]) -> Tensor:
        """Logits (B, V) float32 after one token (B,) per row; the states conv (B, W-1, D), all float32 or all bfloat16,
        and ssm (B, D, N) float32, per layer and contiguous, move on in place."""
        batch = len(tokens)
        assert batch <= HOST_ROWS
        kernel = self._kernel(conv[0].dtype)
        result = torch.empty(batch, self._vocabulary)
        with self._one_at_a_time:
            self._hidden[:batch, : self._width] = self._head.embedding[tokens]
            self._table[Arg.BATCH], self._table[Arg.LOGITS] = batch, result.data_ptr()
            self._layer_table[:, LayerArg.WINDOW] = [t.data_ptr() for t in conv]
            self._layer_table[:, LayerArg.STATE] = [t.data_ptr() for t in ssm]
            began, self._began = self._began, self._began + self._chunks
            # A helper may come to this token when it is long over: what it is told must not change meanwhile, and what
            # its table points at must still be there (`owner` sees to it).
            table = self._table.tolist()

            def job(thread: int, owner: Token = self) -> None:
                kernel(table, began, thread)

            threads = self._threads or self._pace.choose(min(torch.get_num_threads(), MOST_THREADS))
            start = time.perf_counter()
            crew.run(job, threads)
            self._pace.note(threads, time.perf_counter() - start)
        return result


class Pace:
    """Whether helpers pay: on a busy machine a helper is stopped in the middle of a chunk and all wait for it, and tiny
    models are through before it wakes. So both ways are timed all along. The result is the same to the last bit."""

    BEGIN = 6  # tokens at first that go both ways in turn
    AGAIN, SOON, CLEAR = (
        32,
        8,
        1.3,
    )  # every so many tokens the slower way gets a chance: seldom where it is clearly slower
    MEMORY = 0.7  # of the mean that is kept at every sample

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}
        self._tokens = 0

    def choose(self, most: int) -> int:
        """1 or `most` threads."""
        self._tokens += 1
        if most not in self._seconds or (self._tokens <= self.BEGIN and self._tokens % 2 == 1):
            return most
        if self._tokens <= self.BEGIN or 1 not in self._seconds:
            return 1
        better, other = sorted((most, 1), key=lambda threads: self._seconds[threads])
        clear = self._seconds[other] > self.CLEAR * self._seconds[better]
        return other if self._tokens % (self.AGAIN if clear else self.SOON) == 0 else better

    def note(self, threads: int, seconds: float) -> None:
        """What a token took."""
        before = self._seconds.get(threads, seconds)
        self._seconds[threads] = self.MEMORY * before + (1 - self.MEMORY) * seconds


def _bits(value: float) -> int:
    return int(struct.unpack("i", struct.pack("f", value))[0])


@functools.cache
def _compiled(form: Form) -> native.Kernel:
    host = native.host()
    return native.Kernel("token", kernels.token("token", host.lanes, host.avx512, host.name == "NEON", form))
