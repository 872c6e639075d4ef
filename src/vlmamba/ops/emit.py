"""A small vector language over llvmlite's IR builder: what the CPU kernels are written in.

A kernel is a function `void name(i64 arguments, i64 first, i64 last)`: the address of a table of 64-bit arguments and
a range of blocks of channels. SIMD lanes run over channels. Addresses are plain 64-bit integers in bytes.

`contract` (a multiply and an add may become one fma) is the only fast-math flag ever set: the others let LLVM simplify
away the rounding in `exp2`, which costs eight per cent of accuracy in silence.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import IntEnum

from llvmlite import ir

I1, I32, I64, F32, PTR = ir.IntType(1), ir.IntType(32), ir.IntType(64), ir.FloatType(), ir.PointerType()
FLOAT_BYTES = 4
LOG2E = 1.4426950408889634
LN2 = 0.6931471805599453

# 2^f on [-1/2, 1/2] and on [0, 1], minimax in the relative error (9e-8) among those that are 1 at 0.
_EXP2_CENTRED = (1.0, 0.69314698, 0.24022242, 0.055507337, 0.0096715126, 0.0013264727)
_EXP2_UNIT = (1.0, 0.69315131, 0.24016445, 0.055799913, 0.0090170303, 0.0018671301)
# atanh(s) / s in powers of s^2, for s in [0, 1/3], minimax in the relative error (4e-9).
_ATANH = (1.0, 0.33333157, 0.20012455, 0.13980301, 0.14089168)


@dataclass
class Loop:
    """A counted loop under construction: `index`, the carried `values` (of this turn inside, the last ones after)."""

    index: ir.Value
    values: list[ir.Value]
    following: list[ir.Value] = field(default_factory=list)

    def carry(self, values: Sequence[ir.Value]) -> None:
        """Set the carried values of the next turn."""
        assert len(values) == len(self.values)
        self.following = list(values)


class Code:
    """One kernel under construction."""

    def __init__(self, name: str, lanes: int, avx512: bool) -> None:
        self.module = ir.Module(name)
        kind = ir.FunctionType(ir.VoidType(), (I64, I64, I64))
        function = ir.Function(self.module, kind, name)
        self.table, self.first, self.last = function.args
        self.ir = ir.IRBuilder(function.append_basic_block("entry"))
        self.lanes = lanes
        self.avx512 = avx512
        self.vector = ir.VectorType(F32, lanes)

    def finish(self) -> str:
        """The text of the module."""
        self.ir.ret_void()
        return str(self.module)

    # Integers and control

    def integer(self, value: int) -> ir.Value:
        return ir.Constant(I64, value)

    def argument(self, index: int) -> ir.Value:
        """Entry `index` of the table: an address, a stride in bytes, a count."""
        return self.load_int(self.ir.add(self.table, self.integer(8 * index)))

    def at(self, base: ir.Value, *terms: ir.Value | int | tuple[ir.Value, ir.Value | int]) -> ir.Value:
        """base + the sum of the terms; a pair is a product."""
        for term in terms:
            if isinstance(term, tuple):
                term = self.ir.mul(term[0], self._as_int(term[1]))
            base = self.ir.add(base, self._as_int(term))
        return base

    def _as_int(self, value: ir.Value | int) -> ir.Value:
        return self.integer(value) if isinstance(value, int) else value

    @contextmanager
    def loop(self, start: ir.Value, stop: ir.Value, carried: Sequence[ir.Value] = ()) -> Iterator[Loop]:
        """for index in range(start, stop), with values carried from turn to turn."""
        before = self.ir.block
        head, body, after = (self.ir.append_basic_block(name) for name in ("head", "body", "after"))
        self.ir.branch(head)
        self.ir.position_at_end(head)
        index = self.ir.phi(I64)
        index.add_incoming(start, before)
        phis = [self.ir.phi(value.type) for value in carried]
        for phi, value in zip(phis, carried):
            phi.add_incoming(value, before)
        self.ir.cbranch(self.ir.icmp_signed("<", index, stop), body, after)
        self.ir.position_at_end(body)
        loop = Loop(index, list(phis))
        yield loop
        assert len(loop.following) == len(phis), "carry() was not called"
        end = self.ir.block
        index.add_incoming(self.ir.add(index, self.integer(1)), end)
        for phi, value in zip(phis, loop.following):
            phi.add_incoming(value, end)
        self.ir.branch(head)
        self.ir.position_at_end(after)

    # Memory

    def load_int(self, address: ir.Value) -> ir.Value:
        return self.ir.load(self.ir.inttoptr(address, PTR), typ=I64, align=8)

    def load(self, address: ir.Value) -> ir.Value:
        """A whole vector."""
        return self.ir.load(self.ir.inttoptr(address, PTR), typ=self.vector, align=4)

    def store(self, value: ir.Value, address: ir.Value) -> None:
        self.ir.store(value, self.ir.inttoptr(address, PTR), align=4)

    def spread(self, address: ir.Value) -> ir.Value:
        """One float in every lane."""
        scalar = self.ir.load(self.ir.inttoptr(address, PTR), typ=F32, align=4)
        return self._splat(scalar)

    def _splat(self, scalar: ir.Value) -> ir.Value:
        undefined = ir.Constant(self.vector, ir.Undefined)
        single = self.ir.insert_element(undefined, scalar, ir.Constant(I32, 0))
        zeros = ir.Constant(ir.VectorType(I32, self.lanes), [0] * self.lanes)
        return self.ir.shuffle_vector(single, undefined, zeros)

    def mask(self, channels_left: ir.Value) -> ir.Value:
        """True in the lanes that hold one of the remaining channels."""
        numbers = ir.VectorType(I32, self.lanes)
        single = self.ir.insert_element(
            ir.Constant(numbers, ir.Undefined), self.ir.trunc(channels_left, I32), ir.Constant(I32, 0)
        )
        left = self.ir.shuffle_vector(single, single, ir.Constant(numbers, [0] * self.lanes))
        return self.ir.icmp_signed("<", ir.Constant(numbers, list(range(self.lanes))), left)

    def load_masked(self, address: ir.Value, mask: ir.Value) -> ir.Value:
        """A vector whose masked-out lanes are zero and are not read."""
        name = f"llvm.masked.load.v{self.lanes}f32.p0"
        load = self._intrinsic(name, self.vector, (PTR, I32, mask.type, self.vector))
        return self.ir.call(load, (self.ir.inttoptr(address, PTR), ir.Constant(I32, 4), mask, self.number(0)))

    def store_masked(self, value: ir.Value, address: ir.Value, mask: ir.Value) -> None:
        name = f"llvm.masked.store.v{self.lanes}f32.p0"
        store = self._intrinsic(name, ir.VoidType(), (self.vector, PTR, I32, mask.type))
        self.ir.call(store, (value, self.ir.inttoptr(address, PTR), ir.Constant(I32, 4), mask))

    def prefetch(self, address: ir.Value) -> None:
        """Ask for a cache line ahead of its use; any address will do."""
        hint = self._intrinsic("llvm.prefetch.p0", ir.VoidType(), (PTR, I32, I32, I32))
        pointer = self.ir.inttoptr(address, PTR)
        self.ir.call(hint, (pointer, *(ir.Constant(I32, flag) for flag in (0, 2, 1))))

    def _intrinsic(self, name: str, result: ir.Type, arguments: Sequence[ir.Type]) -> ir.Function:
        known = self.module.globals.get(name)
        return known if known is not None else ir.Function(self.module, ir.FunctionType(result, arguments), name)

    # Arithmetic

    def number(self, value: float) -> ir.Value:
        """A constant in every lane, rounded to float32."""
        rounded = struct.unpack("f", struct.pack("f", value))[0]
        return ir.Constant(self.vector, [rounded] * self.lanes)

    def add(self, a: ir.Value, b: ir.Value) -> ir.Value:
        return self.ir.fadd(a, b)

    def sub(self, a: ir.Value, b: ir.Value) -> ir.Value:
        return self.ir.fsub(a, b)

    def mul(self, a: ir.Value, b: ir.Value) -> ir.Value:
        return self.ir.fmul(a, b)

    def fma(self, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
        """a * b + c, fused where the host can."""
        name = f"llvm.fmuladd.v{self.lanes}f32"
        return self.ir.call(self._intrinsic(name, self.vector, (self.vector,) * 3), (a, b, c))

    def sum(self, values: Sequence[ir.Value]) -> ir.Value:
        """Pairwise."""
        while len(values) > 1:
            pairs = [self.add(a, b) for a, b in zip(values[::2], values[1::2])]
            values = pairs + list(values[len(pairs) * 2 :])
        return values[0]

    def across(self, value: ir.Value) -> ir.Value:
        """The sum over the lanes, a scalar, by halving."""
        width = self.lanes
        while width > 1:
            width //= 2
            order = [lane % width + (width if lane < width else 0) for lane in range(self.lanes)]
            indices = ir.Constant(ir.VectorType(I32, self.lanes), order)
            value = self.add(value, self.ir.shuffle_vector(value, value, indices))
        return self.ir.extract_element(value, ir.Constant(I32, 0))

    def polynomial(self, v: ir.Value, coefficients: Sequence[float]) -> ir.Value:
        """By Horner's rule, lowest power first."""
        result = self.number(coefficients[-1])
        for coefficient in reversed(coefficients[:-1]):
            result = self.fma(result, v, self.number(coefficient))
        return result

    def exp2(self, v: ir.Value) -> ir.Value:
        """2^v. NaN stays NaN; below 2^-126 the result is 0 or a denormal number, above 2^127 infinite or near it."""
        return self._exp2_avx512(v) if self.avx512 else self._exp2_portable(v)

    def _exp2_portable(self, v: ir.Value) -> ir.Value:
        v = self.ir.select(self.ir.fcmp_ordered("<", v, self.number(-126)), self.number(-126), v)
        v = self.ir.select(self.ir.fcmp_ordered(">", v, self.number(127)), self.number(127), v)
        magic = self.number(1.5 * 2**23)  # adding it rounds to an integer, which then stands in the low bits
        shifted = self.add(v, magic)
        fraction = self.sub(v, self.sub(shifted, magic))
        bits = ir.VectorType(I32, self.lanes)
        exponent = self.ir.shl(self.ir.bitcast(shifted, bits), ir.Constant(bits, [23] * self.lanes))
        mantissa = self.ir.bitcast(self.polynomial(fraction, _EXP2_CENTRED), bits)
        return self.ir.bitcast(self.ir.add(mantissa, exponent), self.vector)

    def _exp2_avx512(self, v: ir.Value) -> ir.Value:
        """Two instructions of AVX-512 take the place of seven: v - floor(v), and p * 2^floor(v)."""
        i16 = ir.IntType(16)
        mask = ir.Constant(i16, -1)
        current = ir.Constant(I32, 4)
        reduce = self._intrinsic(
            "llvm.x86.avx512.mask.reduce.ps.512", self.vector, (self.vector, I32, self.vector, i16, I32)
        )
        scale = self._intrinsic(
            "llvm.x86.avx512.mask.scalef.ps.512", self.vector, (self.vector, self.vector, self.vector, i16, I32)
        )
        zero = self.number(0)
        fraction = self.ir.call(reduce, (v, ir.Constant(I32, 1), zero, mask, current))
        return self.ir.call(scale, (self.polynomial(fraction, _EXP2_UNIT), v, zero, mask, current))

    def exp(self, v: ir.Value) -> ir.Value:
        return self.exp2(self.mul(v, self.number(LOG2E)))

    def sigmoid(self, v: ir.Value) -> ir.Value:
        one = self.number(1)
        return self.ir.fdiv(one, self.add(one, self.exp2(self.mul(v, self.number(-LOG2E)))))

    def softplus(self, v: ir.Value) -> ir.Value:
        """log(1 + e^v) = max(v, 0) + 2 atanh(u / (2 + u)) with u = e^-|v|: accurate for large negative v too."""
        negative = self.ir.fcmp_ordered("<", v, self.number(0))
        flipped = self.mul(v, self.number(-1))
        u = self.exp(self.ir.select(negative, v, flipped))
        s = self.ir.fdiv(u, self.add(u, self.number(2)))
        series = self.polynomial(self.mul(s, s), _ATANH)
        return self.fma(self.add(s, s), series, self.ir.select(negative, self.number(0), v))


class RowArg(IntEnum):
    """What the tables of arguments of all row kernels begin with."""

    CHANNELS = 0
    CHUNKS = 1  # int64 [count, 4]: first step, end, whether a sequence begins, slot of the kept state or -1
    CHUNK_COUNT = 2
    WALK = 3  # int64 [L]: the position of every step


FIRST_FREE = len(RowArg)


class RowCode(Code):
    """A kernel over one row of L positions x D channels: chunks of steps outside, blocks of lanes inside.

    Step t stands at position walk[t]: a sequence walks 0, 1, 2, ...; the orders of a grid walk over its patches.
    """

    def __init__(self, name: str, lanes: int, avx512: bool, arguments: int) -> None:
        super().__init__(name, lanes, avx512)
        self.block_bytes = lanes * FLOAT_BYTES
        self.values = [self.argument(index) for index in range(arguments)]

    def position(self, step: ir.Value) -> ir.Value:
        return self.load_int(self.at(self.values[RowArg.WALK], (step, 8)))

    def row(self, tensor: int, step: ir.Value) -> ir.Value:
        """Address of a (L, ...) tensor's row at a step of the walk; its stride follows it in the table."""
        return self.at(self.values[tensor], (self.position(step), self.values[tensor + 1]))

    def given(self, tensor: int) -> ir.Value:
        """Whether an address or a flag is not zero."""
        return self.ir.icmp_signed("!=", self.values[tensor], self.integer(0))

    def chunk(self, index: ir.Value) -> None:
        """Make a row of the table of chunks the chunk at hand."""
        row = self.at(self.values[RowArg.CHUNKS], (index, 32))
        self.start, stop, restart, self.slot = (self.load_int(self.at(row, 8 * column)) for column in range(4))
        self.restart = self.ir.icmp_signed("!=", restart, self.integer(0))
        self.steps = self.ir.sub(stop, self.start)

    def block(self, index: ir.Value) -> None:
        """Make a block of channels the block at hand."""
        self.channel_offset = self.ir.mul(index, self.integer(self.block_bytes))
        self.tail = self.mask(self.ir.sub(self.values[RowArg.CHANNELS], self.ir.mul(index, self.integer(self.lanes))))

    def channels(self, tensor: int, step: ir.Value) -> ir.Value:
        """The block's channels of a (L, D) tensor."""
        return self.load_masked(self.at(self.row(tensor, step), self.channel_offset), self.tail)

    def write_channels(self, value: ir.Value, tensor: int, step: ir.Value) -> None:
        self.store_masked(value, self.at(self.row(tensor, step), self.channel_offset), self.tail)

    def prefetch_next_block(self, step: ir.Value, tensors: Sequence[int]) -> None:
        """Rows lie pages apart, so the hardware does not foresee them; the loop over the states hides the wait."""
        for tensor in tensors:
            self.prefetch(self.at(self.row(tensor, step), self.channel_offset, self.block_bytes))

    def per_channel(self, tensor: int) -> ir.Value:
        """Address of the block's vector of a [blocks, lanes] array."""
        return self.at(self.values[tensor], self.channel_offset)

    def per_block(self, tensor: int, count: int, n: int) -> ir.Value:
        """Address of vector n of the block's `count` in a [blocks, count, lanes] array."""
        return self.at(self.values[tensor], (self.channel_offset, count), n * self.block_bytes)

    def zero_if(self, condition: ir.Value, value: ir.Value) -> ir.Value:
        return self.ir.select(condition, self.number(0), value)
