"""Weights times a vector as native code: rows as they lie in memory, in float32, bfloat16 or int8, each read once.

Legend: B batch.
"""

from __future__ import annotations

from llvmlite import ir

from vlmamba.ops.emit import F32, FLOAT_BYTES, I32, I64, PTR, Code

I8, I16 = ir.IntType(8), ir.IntType(16)
ITEM = {"float32": 4, "bfloat16": 2, "int8": 1}  # bytes
LINE = 64  # bytes of a cache line
AHEAD = 8192  # bytes between a weight in use and the one asked for: the hardware's own prefetching ends at a page
ROWS = 2  # of a weight that are read side by side


class Product(Code):
    """out (B, rows) = scale * (weight (rows, columns) @ x (B, columns)), or added to what is there, as a function of
    the same module: (weight, stride, scale or 0, rows, columns, x, x's stride, B, out, out's stride, whether to add).

    Memory is what it waits for: weights are asked for `AHEAD` of their use, and widened in registers.
    """

    def __init__(self, code: Code, kind: str) -> None:
        self.module, self.lanes, self.avx512, self.vector = code.module, code.lanes, code.avx512, code.vector
        self.kind, self.item = kind, ITEM[kind]
        self.function = ir.Function(self.module, ir.FunctionType(ir.VoidType(), [I64] * 11), f"product_{kind}")
        self.function.linkage = "internal"
        self.ir = ir.IRBuilder(self.function.append_basic_block("entry"))
        weight, self.stride, scale, rows, self.columns, x, x_stride, batch, out, out_stride, add = self.function.args
        self.per_turn = max(2, LINE // (self.lanes * self.item))  # vectors of a row that one turn of the loop reads
        self.scaled = self.ir.icmp_signed("!=", scale, self.integer(0))
        self.adds = self.ir.icmp_signed("!=", add, self.integer(0))
        done = self.integer(0)
        for count in (ROWS, 1):
            blocks = self.ir.sdiv(self.ir.sub(rows, done), self.integer(count))
            with self.loop(self.integer(0), blocks) as block:
                first = self.at(done, (block.index, count))
                with self.loop(self.integer(0), batch) as b:
                    sums = self._dots(self.at(weight, (first, self.stride)), self.at(x, (b.index, x_stride)), count)
                    target = self.at(out, (b.index, out_stride))
                    for row, value in enumerate(sums):
                        offset = self.ir.mul(self.at(first, row), self.integer(FLOAT_BYTES))
                        self._write(value, self.at(target, offset), self.at(scale, offset))
            done = self.ir.mul(blocks, self.integer(count))
        self.ir.ret_void()

    def _dots(self, row: ir.Value, x: ir.Value, count: int) -> list[ir.Value]:
        """`count` rows times x, as scalars."""
        chains = min(self.per_turn, 4)
        zeros = [self.number(0)] * (count * chains)
        turn = self.per_turn * self.lanes
        with self.loop(self.integer(0), self.ir.sdiv(self.columns, self.integer(turn)), zeros) as turns:
            sums = list(turns.values)
            for u in range(self.per_turn):
                column = self.at(self.integer(u * self.lanes), (turns.index, turn))
                value = self.load(self.at(x, (column, FLOAT_BYTES)))
                for r in range(count):
                    address = self.at(row, (column, self.item), (self.stride, r))
                    if u * self.lanes * self.item % LINE == 0:
                        self.prefetch(self.at(address, AHEAD))
                    chain = r * chains + u % chains
                    sums[chain] = self.fma(self._widened(address), value, sums[chain])
            turns.carry(sums)
        sums = [self.sum(turns.values[r * chains : (r + 1) * chains]) for r in range(count)]
        start = self.ir.mul(self.ir.sdiv(self.columns, self.integer(turn)), self.integer(self.per_turn))
        whole = self.ir.sdiv(self.columns, self.integer(self.lanes))
        with self.loop(start, whole, sums) as vectors:
            column = self.ir.mul(vectors.index, self.integer(self.lanes))
            value = self.load(self.at(x, (column, FLOAT_BYTES)))
            at = [self.at(row, (column, self.item), (self.stride, r)) for r in range(count)]
            vectors.carry([self.fma(self._widened(a), value, s) for a, s in zip(at, vectors.values)])
        scalars = [self.across(s) for s in vectors.values]
        with self.loop(self.ir.mul(whole, self.integer(self.lanes)), self.columns, scalars) as rest:
            value = self._number_at(self.at(x, (rest.index, FLOAT_BYTES)), F32, FLOAT_BYTES)
            at = [self.at(row, (rest.index, self.item), (self.stride, r)) for r in range(count)]
            rest.carry([self.ir.fadd(self.ir.fmul(self._widened(a, 1), value), s) for a, s in zip(at, rest.values)])
        return rest.values

    def _widened(self, address: ir.Value, lanes: int | None = None) -> ir.Value:
        """A vector (or, with 1, a scalar) of weights as float32."""
        count = self.lanes if lanes is None else lanes

        def many(kind: ir.Type) -> ir.Type:
            return kind if count == 1 else ir.VectorType(kind, count)

        if self.kind == "float32":
            return self._number_at(address, many(F32), self.item)
        raw = self._number_at(address, many(I16 if self.kind == "bfloat16" else I8), self.item)
        if self.kind == "int8":
            return self.ir.sitofp(self.ir.sext(raw, many(I32)), many(F32))
        shift = ir.Constant(I32, 16) if count == 1 else ir.Constant(many(I32), [16] * count)
        return self.ir.bitcast(self.ir.shl(self.ir.zext(raw, many(I32)), shift), many(F32))

    def _number_at(self, address: ir.Value, kind: ir.Type, align: int) -> ir.Value:
        return self.ir.load(self.ir.inttoptr(address, PTR), typ=kind, align=align)

    def _write(self, value: ir.Value, target: ir.Value, scale: ir.Value) -> None:
        one, zero = ir.Constant(F32, 1.0), ir.Constant(F32, 0.0)
        somewhere = self.ir.select(self.scaled, scale, target)
        factor = self.ir.select(self.scaled, self._number_at(somewhere, F32, FLOAT_BYTES), one)
        before = self.ir.select(self.adds, self._number_at(target, F32, FLOAT_BYTES), zero)
        result = self.ir.fadd(before, self.ir.fmul(value, factor))
        self.ir.store(result, self.ir.inttoptr(target, PTR), align=FLOAT_BYTES)
