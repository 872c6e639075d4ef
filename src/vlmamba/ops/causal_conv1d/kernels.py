"""The causal convolution as native code: forward of one row, and the gradients up to the sums before the activation.

The last W - 1 inputs stay in registers over the steps of a chunk. The gradient of x is the forward kernel too, walking
backward over the gradients before the activation.

Weights [blocks, W, lanes], bias [blocks, lanes], the window of past inputs [blocks, W - 1, lanes].
"""

from __future__ import annotations

from enum import IntEnum, auto

from llvmlite import ir

from vlmamba.ops.emit import FIRST_FREE, RowArg, RowCode


class Arg(IntEnum):
    """The rest of the table of arguments: addresses, each (L, D) tensor's followed by its row stride in bytes."""

    X = FIRST_FREE
    X_STRIDE = auto()
    Y = auto()  # forward: y; backward: the gradient before the activation, out
    Y_STRIDE = auto()
    WEIGHT = auto()
    BIAS = auto()
    WINDOW = auto()  # in: before the row; forward, out: after it
    # Backward alone
    DY = auto()
    DY_STRIDE = auto()
    DWEIGHT = auto()  # added to, as is the next
    DBIAS = auto()


ARGUMENTS = max(Arg) + 1


def forward(name: str, lanes: int, avx512: bool, taps: int, silu: bool) -> str:
    """The forward kernel of one row."""
    code = RowCode(name, lanes, avx512, ARGUMENTS)
    with code.loop(code.integer(0), code.values[RowArg.CHUNK_COUNT]) as chunks:
        code.chunk(chunks.index)
        with code.loop(code.first, code.last) as blocks:
            code.block(blocks.index)
            weight, bias = _weights(code, taps)
            with code.loop(code.integer(0), code.steps, _window(code, taps)) as turns:
                step = code.ir.add(code.start, turns.index)
                seen = [*turns.values, code.channels(Arg.X, step)]
                y = _convolve(code, weight, bias, seen)
                code.write_channels(code.mul(y, code.sigmoid(y)) if silu else y, Arg.Y, step)
                turns.carry(seen[1:])
            _keep_window(code, turns.values)
    return code.finish()


def backward(name: str, lanes: int, avx512: bool, taps: int, silu: bool) -> str:
    """Gradients of the sums before the activation, of the weights and of the bias, of one row."""
    code = RowCode(name, lanes, avx512, ARGUMENTS)
    with code.loop(code.integer(0), code.values[RowArg.CHUNK_COUNT]) as chunks:
        code.chunk(chunks.index)
        with code.loop(code.first, code.last) as blocks:
            code.block(blocks.index)
            weight, bias = _weights(code, taps)
            places = [code.per_block(Arg.DWEIGHT, taps, tap) for tap in range(taps)] + [code.per_channel(Arg.DBIAS)]
            carried = _window(code, taps) + [code.load(place) for place in places]
            with code.loop(code.integer(0), code.steps, carried) as turns:
                step = code.ir.add(code.start, turns.index)
                seen = [*turns.values[: taps - 1], code.channels(Arg.X, step)]
                dy = code.channels(Arg.DY, step)
                if silu:
                    y = _convolve(code, weight, bias, seen)
                    gate = code.sigmoid(y)
                    dy = code.mul(dy, code.mul(gate, code.fma(y, code.sub(code.number(1), gate), code.number(1))))
                code.write_channels(dy, Arg.Y, step)
                sums = turns.values[taps - 1 :]
                gathered = [code.fma(dy, value, total) for value, total in zip(seen, sums)]
                turns.carry([*seen[1:], *gathered, code.add(dy, sums[taps])])
            _keep_window(code, turns.values[: taps - 1])
            for place, total in zip(places, turns.values[taps - 1 :]):
                code.store(total, place)
    return code.finish()


def _weights(code: RowCode, taps: int) -> tuple[list[ir.Value], ir.Value]:
    weight = [code.load(code.per_block(Arg.WEIGHT, taps, tap)) for tap in range(taps)]
    return weight, code.load(code.per_channel(Arg.BIAS))


def _window(code: RowCode, taps: int) -> list[ir.Value]:
    """The inputs before the chunk, none of them if a sequence begins with it."""
    places = [code.per_block(Arg.WINDOW, taps - 1, tap) for tap in range(taps - 1)]
    return [code.zero_if(code.restart, code.load(place)) for place in places]


def _keep_window(code: RowCode, window: list[ir.Value]) -> None:
    for tap, value in enumerate(window):
        code.store(value, code.per_block(Arg.WINDOW, len(window), tap))


def _convolve(code: RowCode, weight: list[ir.Value], bias: ir.Value, seen: list[ir.Value]) -> ir.Value:
    y = bias
    for factor, value in zip(weight, seen):
        y = code.fma(factor, value, y)
    return y
