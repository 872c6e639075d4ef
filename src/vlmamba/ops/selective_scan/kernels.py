"""The selective scan as native code: forward and backward of one row, for a range of blocks of channels.

A block is `lanes` channels. A row's steps are cut into chunks, at every `KEPT` steps and wherever a sequence begins;
a chunk's step-wise values (dt, dt * x, ...) go through a scratch of a few KiB, so that the loop over the states
holds little else in registers than the states: `group` of them at a time, over all steps of the chunk.

Arrays for the kernels are cut in blocks: A and states [blocks, N, lanes], kept states [slots, blocks, N, lanes], D and
dt_bias [blocks, lanes]. A comes multiplied by log2(e). The rest keeps its layout, channels contiguous.
"""

from __future__ import annotations

from enum import IntEnum, auto

from llvmlite import ir

from vlmamba.ops.emit import FIRST_FREE, FLOAT_BYTES, LN2, RowArg, RowCode
from vlmamba.ops.rows import KEPT


class Arg(IntEnum):
    """The rest of the table of arguments: addresses, each (L, ...) tensor's followed by its row stride in bytes.

    A zero address means that the tensor is absent.
    """

    X = FIRST_FREE
    X_STRIDE = auto()
    DT = auto()
    DT_STRIDE = auto()
    Z = auto()
    Z_STRIDE = auto()
    B = auto()
    B_STRIDE = auto()
    C = auto()
    C_STRIDE = auto()
    A = auto()
    D = auto()
    BIAS = auto()
    SOFTPLUS = auto()
    STATE = auto()  # in: before the row; out: after it. Backward: the gradient, in: after the row; out: before it
    KEPT_STATES = auto()
    KEPT_STRIDE = auto()
    SCRATCH = auto()
    Y = auto()
    Y_STRIDE = auto()
    # Backward alone
    DY = auto()
    DY_STRIDE = auto()
    DX = auto()
    DX_STRIDE = auto()
    DDT = auto()
    DDT_STRIDE = auto()
    DZ = auto()
    DZ_STRIDE = auto()
    DA = auto()  # [blocks, N, lanes], added to; so are the next two, [blocks, lanes]
    DD = auto()
    DBIAS = auto()
    DB = auto()  # [L, N], as is the next
    DC = auto()


ARGUMENTS = max(Arg) + 1


class ScanCode(RowCode):
    """What forward and backward share."""

    def __init__(self, name: str, lanes: int, avx512: bool, states: int, group: int) -> None:
        super().__init__(name, lanes, avx512, ARGUMENTS)
        self.states = states
        # Groups of states, as (first, count).
        self.groups = [(n, min(group, states - n)) for n in range(0, states, group)]

    def scratch(self, plane: int, turn: ir.Value) -> ir.Value:
        """Address of the vector of a plane of the scratch that belongs to a step of the chunk."""
        offset = plane * KEPT * self.block_bytes
        return self.at(self.values[Arg.SCRATCH], offset, (turn, self.block_bytes))

    def table_row(self, table: int, turn: ir.Value) -> ir.Value:
        """Address of the vectors of all states that a table of the scratch holds for a step of the chunk."""
        size = self.states * self.block_bytes
        offset = KEPT * _PLANES * self.block_bytes + table * (KEPT + 1) * size
        return self.at(self.values[Arg.SCRATCH], offset, (turn, size))

    def per_state(self, tensor: int, n: int) -> ir.Value:
        """Address of state n of a [blocks, N, lanes] array."""
        return self.per_block(tensor, self.states, n)

    def kept(self, n: int, slot: ir.Value) -> ir.Value:
        """Address of state n in a slot of the kept states."""
        return self.at(self.per_state(Arg.KEPT_STATES, n), (slot, self.values[Arg.KEPT_STRIDE]))

    def step_size(self, step: ir.Value) -> tuple[ir.Value, ir.Value]:
        """dt + bias, and dt after softplus, of one step. (Both are computed: a branch costs more than the select.)"""
        raw = self.add(self.channels(Arg.DT, step), self.load(self.per_channel(Arg.BIAS)))
        return raw, self.ir.select(self.given(Arg.SOFTPLUS), self.softplus(raw), raw)


# Planes of the scratch: a vector for every step of the chunk. Forward uses the first three.
_DT, _DTX, _Y, _X, _SLOPE, _DY, _UPDATE, _EXPONENT, _PLANES = range(9)
# After them, for backward, tables of a vector for every step and state. A table has one row of states to spare, as
# _STATES holds the states before the first step too.
_STATES, _DECAYS, _DB, _DC, _TABLES = range(5)


def scratch_floats(lanes: int, states: int) -> int:
    """How large one task's scratch must be."""
    return lanes * (KEPT * _PLANES + (KEPT + 1) * states * _TABLES)


def forward(name: str, lanes: int, avx512: bool, states: int, group: int) -> str:
    """The forward kernel of one row."""
    code = ScanCode(name, lanes, avx512, states, group)
    zero = code.integer(0)
    with code.loop(zero, code.values[RowArg.CHUNK_COUNT]) as chunks:
        code.chunk(chunks.index)
        with code.loop(code.first, code.last) as blocks:
            code.block(blocks.index)
            _prepare(code, zero)
            for first, count in code.groups:
                _advance(code, first, count)
            with code.ir.if_else(code.given(Arg.Z)) as (gated, plain):
                with gated:
                    _write_y(code, gate=True)
                with plain:
                    _write_y(code, gate=False)
    return code.finish()


def _prepare(code: ScanCode, zero: ir.Value) -> None:
    """Step sizes, dt * x and the part D x of y, for the steps of the chunk."""
    skip = code.load(code.per_channel(Arg.D))
    with code.loop(zero, code.steps) as turns:
        step = code.ir.add(code.start, turns.index)
        code.prefetch_next_block(step, (Arg.X, Arg.DT, Arg.Z, Arg.Y))
        _, dt = code.step_size(step)
        x = code.channels(Arg.X, step)
        code.store(dt, code.scratch(_DT, turns.index))
        code.store(code.mul(dt, x), code.scratch(_DTX, turns.index))
        code.store(code.mul(x, skip), code.scratch(_Y, turns.index))


def _advance(code: ScanCode, first: int, count: int) -> None:
    """The recurrence of `count` states, in registers over the steps of the chunk."""
    span = range(first, first + count)
    before = [code.zero_if(code.restart, code.load(code.per_state(Arg.STATE, n))) for n in span]
    with code.ir.if_then(code.ir.icmp_signed(">=", code.slot, code.integer(0))):
        for n, state in zip(span, before):
            code.store(state, code.kept(n, code.slot))
    with code.loop(code.integer(0), code.steps, before) as turns:
        step = code.ir.add(code.start, turns.index)
        row_B, row_C = code.row(Arg.B, step), code.row(Arg.C, step)
        dt, dtx = code.load(code.scratch(_DT, turns.index)), code.load(code.scratch(_DTX, turns.index))
        y = [code.load(code.scratch(_Y, turns.index)), code.number(0)]
        after = []
        for n, state in zip(span, turns.values):
            decay = code.exp2(code.mul(dt, code.load(code.per_state(Arg.A, n))))
            state = code.fma(decay, state, code.mul(dtx, code.spread(code.at(row_B, n * FLOAT_BYTES))))
            y[n % 2] = code.fma(state, code.spread(code.at(row_C, n * FLOAT_BYTES)), y[n % 2])
            after.append(state)
        code.store(code.sum(y), code.scratch(_Y, turns.index))
        turns.carry(after)
    for n, state in zip(span, turns.values):
        code.store(state, code.per_state(Arg.STATE, n))


def _write_y(code: ScanCode, gate: bool) -> None:
    with code.loop(code.integer(0), code.steps) as turns:
        step = code.ir.add(code.start, turns.index)
        y = code.load(code.scratch(_Y, turns.index))
        if gate:
            z = code.channels(Arg.Z, step)
            y = code.mul(y, code.mul(z, code.sigmoid(z)))
        code.write_channels(y, Arg.Y, step)


def backward(name: str, lanes: int, avx512: bool, states: int, group: int) -> str:
    """The backward kernel of one row. Every chunk's states are recomputed from the kept ones, block by block."""
    code = ScanCode(name, lanes, avx512, states, group)
    zero, count = code.integer(0), code.values[RowArg.CHUNK_COUNT]
    with code.loop(zero, count) as chunks:
        code.chunk(code.ir.sub(code.ir.sub(count, code.integer(1)), chunks.index))
        _clear_sums(code)
        with code.loop(code.first, code.last) as blocks:
            code.block(blocks.index)
            _prepare_back(code)
            for first, number in code.groups:
                _recompute(code, first, number)
            with code.ir.if_else(code.given(Arg.Z)) as (gated, plain):
                with gated:
                    _start_back(code, gate=True)
                with plain:
                    _start_back(code, gate=False)
            for first, number in code.groups:
                _retreat(code, first, number)
            _write_gradients(code)
        _write_sums(code)
    return code.finish()


def _clear_sums(code: ScanCode) -> None:
    """dB and dC are sums over channels: they gather lane by lane over the blocks."""
    with code.loop(code.integer(0), code.steps) as turns:
        for table in (_DB, _DC):
            row = code.table_row(table, turns.index)
            for n in range(code.states):
                code.store(code.number(0), code.at(row, n * code.block_bytes))


def _write_sums(code: ScanCode) -> None:
    with code.loop(code.integer(0), code.steps) as turns:
        position = code.position(code.ir.add(code.start, turns.index))
        for table, tensor in ((_DB, Arg.DB), (_DC, Arg.DC)):
            row = code.table_row(table, turns.index)
            out = code.at(code.values[tensor], (position, code.states * FLOAT_BYTES))
            for n in range(code.states):
                total = code.across(code.load(code.at(row, n * code.block_bytes)))
                code.store(total, code.at(out, n * FLOAT_BYTES))


def _prepare_back(code: ScanCode) -> None:
    skip = code.load(code.per_channel(Arg.D))
    one, chosen = code.number(1), code.given(Arg.SOFTPLUS)
    with code.loop(code.integer(0), code.steps) as turns:
        step = code.ir.add(code.start, turns.index)
        code.prefetch_next_block(step, (Arg.X, Arg.DT, Arg.Z, Arg.DY))
        raw, dt = code.step_size(step)
        x = code.channels(Arg.X, step)
        vectors = {
            _DT: dt,
            _DTX: code.mul(dt, x),
            _Y: code.mul(x, skip),
            _X: x,
            _SLOPE: code.ir.select(chosen, code.sigmoid(raw), one),
            _UPDATE: code.number(0),
            _EXPONENT: code.number(0),
        }
        for plane, value in vectors.items():
            code.store(value, code.scratch(plane, turns.index))


def _recompute(code: ScanCode, first: int, count: int) -> None:
    """The states and decays of `count` states over the chunk, into the tables; y too, for the gradient of z."""
    span = range(first, first + count)
    absent = code.ir.icmp_signed("<", code.slot, code.integer(0))
    slot = code.ir.select(absent, code.integer(0), code.slot)
    before = [code.zero_if(code.restart, code.load(code.kept(n, slot))) for n in span]
    for n, state in zip(span, before):
        code.store(state, code.at(code.table_row(_STATES, code.integer(0)), n * code.block_bytes))
    with code.loop(code.integer(0), code.steps, before) as turns:
        step = code.ir.add(code.start, turns.index)
        row_B, row_C = code.row(Arg.B, step), code.row(Arg.C, step)
        decays = code.table_row(_DECAYS, turns.index)
        states = code.table_row(_STATES, code.ir.add(turns.index, code.integer(1)))
        dt, dtx = code.load(code.scratch(_DT, turns.index)), code.load(code.scratch(_DTX, turns.index))
        y = [code.load(code.scratch(_Y, turns.index)), code.number(0)]
        after = []
        for n, state in zip(span, turns.values):
            decay = code.exp2(code.mul(dt, code.load(code.per_state(Arg.A, n))))
            state = code.fma(decay, state, code.mul(dtx, code.spread(code.at(row_B, n * FLOAT_BYTES))))
            y[n % 2] = code.fma(state, code.spread(code.at(row_C, n * FLOAT_BYTES)), y[n % 2])
            code.store(decay, code.at(decays, n * code.block_bytes))
            code.store(state, code.at(states, n * code.block_bytes))
            after.append(state)
        code.store(code.sum(y), code.scratch(_Y, turns.index))
        turns.carry(after)


def _start_back(code: ScanCode, gate: bool) -> None:
    """The gradient of y before the gate, of z, and of D."""
    total = code.per_channel(Arg.DD)
    with code.loop(code.integer(0), code.steps, [code.load(total)]) as turns:
        step = code.ir.add(code.start, turns.index)
        dy = code.channels(Arg.DY, step)
        if gate:
            z, y = code.channels(Arg.Z, step), code.load(code.scratch(_Y, turns.index))
            sigmoid = code.sigmoid(z)
            slope = code.mul(sigmoid, code.fma(z, code.sub(code.number(1), sigmoid), code.number(1)))
            dz = code.mul(code.mul(dy, y), slope)
            code.write_channels(dz, Arg.DZ, step)
            dy = code.mul(dy, code.mul(z, sigmoid))
        code.store(dy, code.scratch(_DY, turns.index))
        turns.carry([code.fma(dy, code.load(code.scratch(_X, turns.index)), turns.values[0])])
    code.store(turns.values[0], total)


def _retreat(code: ScanCode, first: int, count: int) -> None:
    """The recurrence of the gradients of `count` states, from the chunk's last step to its first.

    With g the gradient of a state after a step: update gathers g B over the states, exponent gathers
    g decay (state before) A, which is the gradient of log2(e) dt A's factor dt.
    """
    span = range(first, first + count)
    gradients = [code.load(code.per_state(Arg.STATE, n)) for n in span]
    sums = [code.load(code.per_state(Arg.DA, n)) for n in span]
    with code.loop(code.integer(0), code.steps, gradients + sums) as turns:
        turn = code.ir.sub(code.ir.sub(code.steps, code.integer(1)), turns.index)
        step = code.ir.add(code.start, turn)
        row_B, row_C = code.row(Arg.B, step), code.row(Arg.C, step)
        dt, dtx, dy = (code.load(code.scratch(plane, turn)) for plane in (_DT, _DTX, _DY))
        before, decays, dB, dC = (code.table_row(table, turn) for table in (_STATES, _DECAYS, _DB, _DC))
        after = code.table_row(_STATES, code.ir.add(turn, code.integer(1)))
        update, exponent = (code.load(code.scratch(plane, turn)) for plane in (_UPDATE, _EXPONENT))
        passed, gathered = [], []
        for n, gradient, total in zip(span, turns.values[:count], turns.values[count:]):
            offset = n * code.block_bytes
            gradient = code.fma(dy, code.spread(code.at(row_C, n * FLOAT_BYTES)), gradient)
            update = code.fma(gradient, code.spread(code.at(row_B, n * FLOAT_BYTES)), update)
            _gather(code, code.at(dB, offset), gradient, dtx)
            _gather(code, code.at(dC, offset), code.load(code.at(after, offset)), dy)
            gradient = code.mul(gradient, code.load(code.at(decays, offset)))
            pull = code.mul(gradient, code.load(code.at(before, offset)))
            exponent = code.fma(pull, code.load(code.per_state(Arg.A, n)), exponent)
            passed.append(gradient)
            gathered.append(code.fma(pull, dt, total))
        code.store(update, code.scratch(_UPDATE, turn))
        code.store(exponent, code.scratch(_EXPONENT, turn))
        turns.carry(passed + gathered)
    for n, gradient, total in zip(span, turns.values[:count], turns.values[count:]):
        code.store(code.zero_if(code.restart, gradient), code.per_state(Arg.STATE, n))
        code.store(total, code.per_state(Arg.DA, n))


def _gather(code: ScanCode, address: ir.Value, a: ir.Value, b: ir.Value) -> None:
    code.store(code.fma(a, b, code.load(address)), address)


def _write_gradients(code: ScanCode) -> None:
    skip, total = code.load(code.per_channel(Arg.D)), code.per_channel(Arg.DBIAS)
    with code.loop(code.integer(0), code.steps, [code.load(total)]) as turns:
        step = code.ir.add(code.start, turns.index)
        planes = (_DT, _X, _SLOPE, _DY, _UPDATE, _EXPONENT)
        dt, x, slope, dy, update, exponent = (code.load(code.scratch(plane, turns.index)) for plane in planes)
        dx = code.fma(update, dt, code.mul(dy, skip))
        ddt = code.mul(slope, code.fma(exponent, code.number(LN2), code.mul(update, x)))
        code.write_channels(dx, Arg.DX, step)
        code.write_channels(ddt, Arg.DDT, step)
        turns.carry([code.add(ddt, turns.values[0])])
    code.store(turns.values[0], total)
