"""One token of the scan and of the convolution as native code, for a range of batch rows.

The state stays (slots, D, N) in memory, as the caller keeps it, so here SIMD lanes run over a channel's states: one
vector is one channel. What belongs to the channel alone (softplus, gate) is computed beside it, lanes over channels.
"""

from __future__ import annotations

from enum import IntEnum, auto

from llvmlite import ir

from vlmamba.ops.emit import FLOAT_BYTES, LOG2E, Code


class Arg(IntEnum):
    """The table of arguments: addresses, and strides of batch rows or slots in bytes. Zero: not there."""

    CHANNELS = 0
    SLOTS = auto()  # int64 [B]
    STATE = auto()
    STATE_STRIDE = auto()
    X = auto()
    X_STRIDE = auto()
    Y = auto()
    Y_STRIDE = auto()
    DT = auto()
    DT_STRIDE = auto()
    Z = auto()
    Z_STRIDE = auto()
    B = auto()
    B_STRIDE = auto()
    C = auto()
    C_STRIDE = auto()
    A = auto()  # (D, N) contiguous
    D = auto()
    BIAS = auto()
    SOFTPLUS = auto()
    SCRATCH = auto()  # 2 x D floats, padded to lanes, for one thread
    WEIGHT = auto()  # (W, D) contiguous


ARGUMENTS = max(Arg) + 1


class UpdateCode(Code):
    """What both kernels share."""

    def __init__(self, name: str, lanes: int, avx512: bool) -> None:
        super().__init__(name, lanes, avx512)
        self.values = [self.argument(index) for index in range(ARGUMENTS)]

    def given(self, tensor: int) -> ir.Value:
        return self.ir.icmp_signed("!=", self.values[tensor], self.integer(0))

    def row(self, tensor: int, index: ir.Value) -> ir.Value:
        """Address of a batch row; its stride follows the tensor in the table."""
        return self.at(self.values[tensor], (index, self.values[tensor + 1]))

    def slot(self, index: ir.Value) -> ir.Value:
        """Address of the state that belongs to a batch row."""
        return self.row(Arg.STATE, self.load_int(self.at(self.values[Arg.SLOTS], (index, 8))))

    def blocks(self) -> ir.Value:
        return self.ir.sdiv(
            self.ir.add(self.values[Arg.CHANNELS], self.integer(self.lanes - 1)), self.integer(self.lanes)
        )

    def block(self, index: ir.Value) -> None:
        self.offset = self.ir.mul(index, self.integer(self.lanes * FLOAT_BYTES))
        self.tail = self.mask(self.ir.sub(self.values[Arg.CHANNELS], self.ir.mul(index, self.integer(self.lanes))))

    def read(self, address: ir.Value) -> ir.Value:
        """The block's channels of a vector."""
        return self.load_masked(self.at(address, self.offset), self.tail)

    def read_or(self, tensor: Arg, otherwise: float) -> ir.Value:
        """The block's channels of a parameter (D,), a constant if it is not there."""
        nowhere = self.ir.select(self.given(tensor), self.tail, ir.Constant(self.tail.type, [0] * self.lanes))
        value = self.load_masked(self.at(self.values[tensor], self.offset), nowhere)
        return value if otherwise == 0 else self.ir.select(nowhere, value, self.number(otherwise))


def update(name: str, lanes: int, avx512: bool, states: int) -> str:
    """One token of the scan."""
    code = UpdateCode(name, lanes, avx512)
    with code.loop(code.first, code.last) as rows:
        _step_sizes(code, rows.index)
        _advance(code, rows.index, states)
        _write_y(code, rows.index)
    return code.finish()


def _scratch(code: UpdateCode, plane: int) -> ir.Value:
    width = code.ir.mul(code.blocks(), code.integer(code.lanes * FLOAT_BYTES))
    return code.at(code.values[Arg.SCRATCH], (width, plane))


_DT, _Y = 0, 1  # planes of the scratch


def _step_sizes(code: UpdateCode, index: ir.Value) -> None:
    with code.loop(code.integer(0), code.blocks()) as blocks:
        code.block(blocks.index)
        raw = code.add(code.read(code.row(Arg.DT, index)), code.read_or(Arg.BIAS, 0))
        dt = code.ir.select(code.given(Arg.SOFTPLUS), code.softplus(raw), raw)
        code.store(dt, code.at(_scratch(code, _DT), code.offset))


def _advance(code: UpdateCode, index: ir.Value, states: int) -> None:
    """A vector of all states at a time, whatever their number: LLVM cuts it to the host's registers."""
    wide = Wide(code, states)
    state, x = code.slot(index), code.row(Arg.X, index)
    B, C = wide.load(code.row(Arg.B, index)), wide.load(code.row(Arg.C, index))
    dts, ys = _scratch(code, _DT), _scratch(code, _Y)
    with code.loop(code.integer(0), code.values[Arg.CHANNELS]) as channels:
        scalar = code.ir.mul(channels.index, code.integer(FLOAT_BYTES))
        vector = code.ir.mul(scalar, code.integer(states))
        dt = wide.spread(code.at(dts, scalar))
        dtx = wide.mul(dt, wide.spread(code.at(x, scalar)))
        exponent = wide.mul(wide.mul(dt, wide.number(LOG2E)), wide.load(code.at(code.values[Arg.A], vector)))
        after = wide.fma(wide.exp2(exponent), wide.load(code.at(state, vector)), wide.mul(dtx, B))
        wide.store(after, code.at(state, vector))
        code.store(wide.total(wide.mul(after, C)), code.at(ys, scalar))


class Wide(Code):
    """The same function under construction, with vectors of another width."""

    def __init__(self, code: Code, lanes: int) -> None:
        self.module, self.ir, self.lanes = code.module, code.ir, lanes
        self.vector = ir.VectorType(code.vector.element, lanes)
        self.avx512 = code.avx512 and lanes == code.lanes

    def total(self, value: ir.Value) -> ir.Value:
        """The sum over the lanes, a scalar, in whatever order is fastest."""
        name = f"llvm.vector.reduce.fadd.v{self.lanes}f32"
        scalar = self.vector.element
        reduce = self._intrinsic(name, scalar, (scalar, self.vector))
        return self.ir.call(reduce, (ir.Constant(scalar, 0.0), value), fastmath=("reassoc",))


def _write_y(code: UpdateCode, index: ir.Value) -> None:
    with code.loop(code.integer(0), code.blocks()) as blocks:
        code.block(blocks.index)
        y = code.load(code.at(_scratch(code, _Y), code.offset))
        y = code.fma(code.read(code.row(Arg.X, index)), code.read_or(Arg.D, 0), y)
        with code.ir.if_else(code.given(Arg.Z)) as (gated, plain):
            with gated:
                z = code.read(code.row(Arg.Z, index))
                result = code.mul(y, code.mul(z, code.sigmoid(z)))
                code.store_masked(result, code.at(code.row(Arg.Y, index), code.offset), code.tail)
            with plain:
                code.store_masked(y, code.at(code.row(Arg.Y, index), code.offset), code.tail)


def convolve(name: str, lanes: int, avx512: bool, taps: int, silu: bool) -> str:
    """One token of the convolution; the window moves up by one."""
    code = UpdateCode(name, lanes, avx512)
    width = code.ir.mul(code.values[Arg.CHANNELS], code.integer(FLOAT_BYTES))
    with code.loop(code.first, code.last) as rows:
        window = code.slot(rows.index)
        with code.loop(code.integer(0), code.blocks()) as blocks:
            code.block(blocks.index)
            seen = [code.read(code.at(window, (width, tap))) for tap in range(taps - 1)]
            seen.append(code.read(code.row(Arg.X, rows.index)))
            y = code.read_or(Arg.BIAS, 0)
            for tap, value in enumerate(seen):
                y = code.fma(value, code.read(code.at(code.values[Arg.WEIGHT], (width, tap))), y)
            y = code.mul(y, code.sigmoid(y)) if silu else y
            code.store_masked(y, code.at(code.row(Arg.Y, rows.index), code.offset), code.tail)
            for tap, value in enumerate(seen[1:]):
                code.store_masked(value, code.at(window, (width, tap), code.offset), code.tail)
    return code.finish()
