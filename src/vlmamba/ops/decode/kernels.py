"""One token through a whole Mamba-1 language model as one native function, for any number of threads.

A token is a row of phases, each cut in chunks: per layer `enter` (norm, in_proj, convolution, a share of x_proj),
`advance` (dt_proj, recurrence, gate) and `leave` (out_proj, into the residual stream), at the end `answer` (final norm,
head). Threads take chunks as they come, from one counter that only ever grows, and a phase begins when another such
counter says that the one before is done. So a thread that comes late, or never, costs its help and no more.

Legend: B batch, d model width, D channels, N state size, R rank of dt, W taps, F = R + 2 N features of x_proj,
G groups of channels, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum, auto

from llvmlite import ir

from vlmamba.ops.decode.products import I16, ITEM, Product
from vlmamba.ops.emit import F32, FLOAT_BYTES, I32, I64, LOG2E, PTR, Code
from vlmamba.ops.state_update.kernels import Wide

SPINS = 200  # looks at the counter (some ten microseconds) before a waiting thread offers its core to others


class Arg(IntEnum):
    """The table of arguments: addresses, counts, strides in bytes. All vectors are float32, padded to whole lanes."""

    TAKEN = 0  # int64: chunks taken since the beginning of time
    DONE = auto()  # int64: chunks done
    YIELD = auto()  # int (*)(void): lets other threads run
    LAYERS = auto()  # int64 [layers, len(LayerArg)]
    LAYER_COUNT = auto()
    BATCH = auto()
    WIDTH = auto()
    CHANNELS = auto()
    RANK = auto()
    FEATURES = auto()
    VOCABULARY = auto()
    GROUP = auto()  # channels of a chunk of `enter` and `advance`, whole lanes
    OUT_ROWS = auto()  # rows of a chunk of `leave`
    HEAD_ROWS = auto()  # rows of a chunk of `answer`
    HIDDEN = auto()  # (B, d), the residual stream
    HIDDEN_STRIDE = auto()
    X = auto()  # (B, D)
    Z = auto()  # (B, D)
    DT = auto()  # (B, D)
    Y = auto()  # (B, D)
    CHANNEL_STRIDE = auto()  # of the four
    PARTIAL = auto()  # (G, B F): shares of x_proj
    PARTIAL_STRIDE = auto()
    SCRATCH = auto()  # (threads, B d + B F): the norm's output, the features
    SCRATCH_STRIDE = auto()
    LOGITS = auto()  # (B, V)
    NORM = auto()
    EPS = auto()  # the bits of a float32
    HEAD = auto()
    HEAD_SCALE = auto()


class LayerArg(IntEnum):
    """The table of a layer."""

    NORM = 0
    EPS = auto()
    IN = auto()  # (2 D, d)
    IN_SCALE = auto()
    CONV = auto()  # (W, D) float32
    CONV_BIAS = auto()
    X_PROJ = auto()  # (F, D)
    DT_PROJ = auto()  # (D, R)
    DT_BIAS = auto()
    A = auto()  # (D, N)
    D = auto()
    OUT = auto()  # (d, D)
    OUT_SCALE = auto()
    WINDOW = auto()  # (B, W-1, D), the state of the convolution
    STATE = auto()  # (B, D, N) float32


@dataclass(frozen=True)
class Form:
    """What the code is specialised for: "float32", "bfloat16", "int8" weights of the large matrices and of x_proj and
    dt_proj, the dtype of the convolution's window, N, W."""

    large: str
    small: str
    window: str
    states: int
    taps: int


def token(name: str, lanes: int, avx512: bool, arm: bool, form: Form) -> str:
    """The function: its second argument is the number of chunks taken when the token began, its third the thread."""
    return TokenCode(name, lanes, avx512, arm, form).build()


class TokenCode(Code):
    """The function under construction."""

    def __init__(self, name: str, lanes: int, avx512: bool, arm: bool, form: Form) -> None:
        super().__init__(name, lanes, avx512)
        self.form, self.arm = form, arm
        self.products = {kind: Product(self, kind) for kind in {form.large, form.small}}
        self.values = [self.argument(index) for index in range(len(Arg))]
        self.wide = Wide(self, form.states)
        own = self.at(self.values[Arg.SCRATCH], (self.last, self.values[Arg.SCRATCH_STRIDE]))
        self.normed = own
        self.features = self.at(own, (self.values[Arg.BATCH], self.values[Arg.HIDDEN_STRIDE]))

    def build(self) -> str:
        v = self.values
        groups = self._parts(v[Arg.CHANNELS], v[Arg.GROUP])
        layer_bytes = self.integer(8 * len(LayerArg))
        with self.loop(self.integer(0), v[Arg.LAYER_COUNT], [self.first]) as layers:
            self.layer = self.at(v[Arg.LAYERS], (layers.index, layer_bytes))
            begin = layers.values[0]
            begin = self._phase(begin, groups, self._layer_norm, self._enter)
            begin = self._phase(begin, groups, self._gather_features, self._advance)
            chunks = self._parts(v[Arg.WIDTH], v[Arg.OUT_ROWS])
            layers.carry([self._phase(begin, chunks, lambda: None, self._leave)])
        chunks = self._parts(v[Arg.VOCABULARY], v[Arg.HEAD_ROWS])
        self._phase(layers.values[0], chunks, lambda: self._norm(v[Arg.NORM], v[Arg.EPS]), self._answer)
        return self.finish()

    # Who does what, and when

    def _phase(
        self, begin: ir.Value, count: ir.Value, prepare: Callable[[], None], work: Callable[[ir.Value], None]
    ) -> ir.Value:
        """Takes chunks begin .. begin + count until none is left, then waits until all are done. `prepare` runs on each
        thread before its first chunk: only while a chunk is its own can nobody change what it reads."""
        end = self.ir.add(begin, count)
        blocks = [self.ir.append_basic_block(name) for name in ("look", "take", "mine", "prepare", "work", "wait")]
        look, take, mine, first, act, wait = blocks
        before = self.ir.block
        self.ir.branch(look)
        self.ir.position_at_end(look)
        ready = self.ir.phi(ir.IntType(1))
        ready.add_incoming(ir.Constant(ir.IntType(1), 0), before)
        taken = self._counter(Arg.TAKEN)
        self.ir.cbranch(self.ir.icmp_signed("<", taken, end), take, wait)
        self.ir.position_at_end(take)
        won = self.ir.extract_value(
            self.ir.cmpxchg(
                self.ir.inttoptr(self.values[Arg.TAKEN], PTR), taken, self.at(taken, 1), "acq_rel", "acquire"
            ),
            1,
        )
        ready.add_incoming(ready, take)
        self.ir.cbranch(won, mine, look)
        self.ir.position_at_end(mine)
        self.ir.cbranch(ready, act, first)
        self.ir.position_at_end(first)
        prepare()
        self.ir.branch(act)
        self.ir.position_at_end(act)
        work(self.ir.sub(taken, begin))
        self.ir.atomic_rmw("add", self.ir.inttoptr(self.values[Arg.DONE], PTR), self.integer(1), "acq_rel")
        ready.add_incoming(ir.Constant(ir.IntType(1), 1), self.ir.block)
        self.ir.branch(look)
        self._wait(wait, end)
        return end

    def _wait(self, start: ir.Block, end: ir.Value) -> None:
        """Looks at the counter some hundred times, then lets others run between looks."""
        pause, give, after = (self.ir.append_basic_block(name) for name in ("pause", "give", "after"))
        head = self.ir.append_basic_block("head")
        self.ir.position_at_end(start)
        self.ir.branch(head)
        self.ir.position_at_end(head)
        looks = self.ir.phi(I64)
        looks.add_incoming(self.integer(0), start)
        self.ir.cbranch(self.ir.icmp_signed(">=", self._counter(Arg.DONE), end), after, pause)
        self.ir.position_at_end(pause)
        if self.arm:
            self.ir.call(self._intrinsic("llvm.aarch64.hint", ir.VoidType(), (I32,)), (ir.Constant(I32, 1),))
        else:
            self.ir.call(self._intrinsic("llvm.x86.sse2.pause", ir.VoidType(), ()), ())
        more = self.at(looks, 1)
        looks.add_incoming(more, pause)
        self.ir.cbranch(self.ir.icmp_signed("<", looks, self.integer(SPINS)), head, give)
        self.ir.position_at_end(give)
        function = ir.FunctionType(I32, ())
        self.ir.call(self.ir.inttoptr(self.values[Arg.YIELD], function.as_pointer()), ())
        looks.add_incoming(looks, give)
        self.ir.branch(head)
        self.ir.position_at_end(after)

    def _counter(self, which: Arg) -> ir.Value:
        return self.ir.load_atomic(self.ir.inttoptr(self.values[which], PTR), "acquire", 8, typ=I64)

    def _parts(self, whole: ir.Value, part: ir.Value) -> ir.Value:
        return self.ir.sdiv(self.at(whole, part, -1), part)

    def _share(self, index: ir.Value, part: ir.Value, whole: ir.Value) -> tuple[ir.Value, ir.Value]:
        """First and count of part number `index`."""
        first = self.ir.mul(index, part)
        left = self.ir.sub(whole, first)
        return first, self.ir.select(self.ir.icmp_signed("<", left, part), left, part)

    # The phases

    def _layer_norm(self) -> None:
        self._norm(self._of_layer(LayerArg.NORM), self._of_layer(LayerArg.EPS))

    def _enter(self, group: ir.Value) -> None:
        """in_proj, the convolution, and what these channels give to x_proj."""
        v = self.values
        first, count = self._share(group, v[Arg.GROUP], v[Arg.CHANNELS])
        stride = self._row_bytes(v[Arg.WIDTH], self.form.large)
        offset = self.ir.mul(first, self.integer(FLOAT_BYTES))
        for half, out in ((self.integer(0), Arg.X), (v[Arg.CHANNELS], Arg.Z)):
            row = self.ir.add(first, half)
            scale = self._part_of_scale(self._of_layer(LayerArg.IN_SCALE), row)
            weight = self.at(self._of_layer(LayerArg.IN), (row, stride))
            target = self.at(v[out], offset)
            self._product(self.form.large, weight, stride, scale, count, v[Arg.WIDTH], self.normed,
                          v[Arg.HIDDEN_STRIDE], target, v[Arg.CHANNEL_STRIDE])  # fmt: skip
        with self.loop(self.integer(0), v[Arg.BATCH]) as b:
            self._convolve(b.index, first, count)
        weight = self.at(self._of_layer(LayerArg.X_PROJ), (first, ITEM[self.form.small]))
        partial = self.at(v[Arg.PARTIAL], (group, v[Arg.PARTIAL_STRIDE]))
        self._product(self.form.small, weight, self._row_bytes(v[Arg.CHANNELS], self.form.small), self.integer(0),
                      v[Arg.FEATURES], count, self.at(v[Arg.X], offset), v[Arg.CHANNEL_STRIDE], partial,
                      self.ir.mul(v[Arg.FEATURES], self.integer(FLOAT_BYTES)))  # fmt: skip

    def _convolve(self, b: ir.Value, first: ir.Value, count: ir.Value) -> None:
        """x = silu(conv(x)); the window moves up by one."""
        v, item = self.values, ITEM[self.form.window]
        row = self.at(v[Arg.X], (b, v[Arg.CHANNEL_STRIDE]))
        step = self.ir.mul(v[Arg.CHANNELS], self.integer(item))
        window = self.at(self._of_layer(LayerArg.WINDOW), (b, self.ir.mul(step, self.integer(self.form.taps - 1))))
        end = self.ir.add(first, count)
        with self._blocks(first, count) as channel:
            tail = self.mask(self.ir.sub(end, channel))
            place = self.ir.mul(channel, self.integer(FLOAT_BYTES))
            held = self.ir.mul(channel, self.integer(item))
            seen = [self._read_window(self.at(window, (step, w), held), tail) for w in range(self.form.taps - 1)]
            seen.append(self._as_window(self.load(self.at(row, place))))
            y = self.load(self.at(self._of_layer(LayerArg.CONV_BIAS), place))
            for w, value in enumerate(seen):
                tap = self.at(self._of_layer(LayerArg.CONV), (v[Arg.CHANNEL_STRIDE], w), place)
                y = self.fma(self._from_window(value), self.load(tap), y)
            self.store(self.mul(y, self.sigmoid(y)), self.at(row, place))
            for w, value in enumerate(seen[1:]):
                self._write_window(value, self.at(window, (step, w), held), tail)

    def _gather_features(self) -> None:
        """The sum of all groups' shares."""
        v = self.values
        count = self.ir.mul(v[Arg.BATCH], v[Arg.FEATURES])
        groups = self._parts(v[Arg.CHANNELS], v[Arg.GROUP])
        with self._blocks(self.integer(0), count) as feature:
            place = self.ir.mul(feature, self.integer(FLOAT_BYTES))
            with self.loop(self.integer(0), groups, [self.number(0)]) as shares:
                share = self.at(v[Arg.PARTIAL], (shares.index, v[Arg.PARTIAL_STRIDE]), place)
                shares.carry([self.add(shares.values[0], self.load(share))])
            self.store(shares.values[0], self.at(self.features, place))

    def _advance(self, group: ir.Value) -> None:
        """dt_proj, the recurrence, the gate."""
        v = self.values
        first, count = self._share(group, v[Arg.GROUP], v[Arg.CHANNELS])
        offset = self.ir.mul(first, self.integer(FLOAT_BYTES))
        stride = self._row_bytes(v[Arg.RANK], self.form.small)
        weight = self.at(self._of_layer(LayerArg.DT_PROJ), (first, stride))
        feature_bytes = self.ir.mul(v[Arg.FEATURES], self.integer(FLOAT_BYTES))
        self._product(self.form.small, weight, stride, self.integer(0), count, v[Arg.RANK], self.features,
                      feature_bytes, self.at(v[Arg.DT], offset), v[Arg.CHANNEL_STRIDE])  # fmt: skip
        with self.loop(self.integer(0), v[Arg.BATCH]) as b:
            x, z, dt, y = (self.at(v[arg], (b.index, v[Arg.CHANNEL_STRIDE])) for arg in (Arg.X, Arg.Z, Arg.DT, Arg.Y))
            with self._blocks(first, count) as channel:
                place = self.ir.mul(channel, self.integer(FLOAT_BYTES))
                raw = self.add(
                    self.load(self.at(dt, place)), self.load(self.at(self._of_layer(LayerArg.DT_BIAS), place))
                )
                self.store(self.softplus(raw), self.at(dt, place))
            self._recur(b.index, first, count, x, dt, y)
            with self._blocks(first, count) as channel:
                place = self.ir.mul(channel, self.integer(FLOAT_BYTES))
                skip = self.load(self.at(self._of_layer(LayerArg.D), place))
                value = self.fma(self.load(self.at(x, place)), skip, self.load(self.at(y, place)))
                gate = self.load(self.at(z, place))
                self.store(self.mul(value, self.mul(gate, self.sigmoid(gate))), self.at(y, place))

    def _recur(self, b: ir.Value, first: ir.Value, count: ir.Value, x: ir.Value, dt: ir.Value, y: ir.Value) -> None:
        """The states lie (D, N), so lanes run over a channel's states."""
        v, wide, size = self.values, self.wide, self.form.states * FLOAT_BYTES
        features = self.at(self.features, (b, self.ir.mul(v[Arg.FEATURES], self.integer(FLOAT_BYTES))))
        low = self.at(features, (v[Arg.RANK], FLOAT_BYTES))
        B, C = wide.load(low), wide.load(self.at(low, size))
        state = self.at(self._of_layer(LayerArg.STATE), (b, self.ir.mul(v[Arg.CHANNELS], self.integer(size))))
        A = self._of_layer(LayerArg.A)
        with self.loop(first, self.ir.add(first, count)) as channels:
            place = self.ir.mul(channels.index, self.integer(FLOAT_BYTES))
            vector = self.ir.mul(channels.index, self.integer(size))
            step = wide.spread(self.at(dt, place))
            decay = wide.exp2(wide.mul(wide.mul(step, wide.number(LOG2E)), wide.load(self.at(A, vector))))
            drive = wide.mul(wide.mul(step, wide.spread(self.at(x, place))), B)
            after = wide.fma(decay, wide.load(self.at(state, vector)), drive)
            wide.store(after, self.at(state, vector))
            self.store_scalar(wide.total(wide.mul(after, C)), self.at(y, place))

    def _leave(self, chunk: ir.Value) -> None:
        v = self.values
        first, count = self._share(chunk, v[Arg.OUT_ROWS], v[Arg.WIDTH])
        stride = self._row_bytes(v[Arg.CHANNELS], self.form.large)
        self._product(self.form.large, self.at(self._of_layer(LayerArg.OUT), (first, stride)), stride,
                      self._part_of_scale(self._of_layer(LayerArg.OUT_SCALE), first), count, v[Arg.CHANNELS],
                      v[Arg.Y], v[Arg.CHANNEL_STRIDE], self.at(v[Arg.HIDDEN], (first, FLOAT_BYTES)),
                      v[Arg.HIDDEN_STRIDE], add=True)  # fmt: skip

    def _answer(self, chunk: ir.Value) -> None:
        v = self.values
        first, count = self._share(chunk, v[Arg.HEAD_ROWS], v[Arg.VOCABULARY])
        stride = self._row_bytes(v[Arg.WIDTH], self.form.large)
        self._product(self.form.large, self.at(v[Arg.HEAD], (first, stride)), stride,
                      self._part_of_scale(v[Arg.HEAD_SCALE], first), count, v[Arg.WIDTH], self.normed,
                      v[Arg.HIDDEN_STRIDE], self.at(v[Arg.LOGITS], (first, FLOAT_BYTES)),
                      self.ir.mul(v[Arg.VOCABULARY], self.integer(FLOAT_BYTES)))  # fmt: skip

    # Parts of them

    @contextmanager
    def _blocks(self, first: ir.Value, count: ir.Value) -> Iterator[ir.Value]:
        """Over the lanes of a range: the number of each block's first."""
        with self.loop(self.integer(0), self._parts(count, self.integer(self.lanes))) as block:
            yield self.at(first, (block.index, self.lanes))

    def _read_window(self, address: ir.Value, mask: ir.Value) -> ir.Value:
        """A vector of the window, in its dtype (bfloat16 as integers)."""
        if self.form.window == "float32":
            return self.load_masked(address, mask)
        kind = ir.VectorType(I16, self.lanes)
        load = self._intrinsic(f"llvm.masked.load.v{self.lanes}i16.p0", kind, (PTR, I32, mask.type, kind))
        nothing = ir.Constant(kind, [0] * self.lanes)
        return self.ir.call(load, (self.ir.inttoptr(address, PTR), ir.Constant(I32, 2), mask, nothing))

    def _write_window(self, value: ir.Value, address: ir.Value, mask: ir.Value) -> None:
        if self.form.window == "float32":
            self.store_masked(value, address, mask)
            return
        name = f"llvm.masked.store.v{self.lanes}i16.p0"
        store = self._intrinsic(name, ir.VoidType(), (value.type, PTR, I32, mask.type))
        self.ir.call(store, (value, self.ir.inttoptr(address, PTR), ir.Constant(I32, 2), mask))

    def _as_window(self, value: ir.Value) -> ir.Value:
        """Rounded to the window's dtype: what the convolution sees now is what it will remember."""
        if self.form.window == "float32":
            return value
        kind = ir.VectorType(I32, self.lanes)

        def every(number: int) -> ir.Value:
            return ir.Constant(kind, [number] * self.lanes)

        bits = self.ir.bitcast(value, kind)
        odd = self.ir.and_(self.ir.lshr(bits, every(16)), every(1))
        rounded = self.ir.lshr(self.ir.add(bits, self.ir.add(odd, every(0x7FFF))), every(16))
        rounded = self.ir.select(self.ir.fcmp_unordered("uno", value, value), every(0x7FC0), rounded)
        return self.ir.trunc(rounded, ir.VectorType(I16, self.lanes))

    def _from_window(self, value: ir.Value) -> ir.Value:
        if self.form.window == "float32":
            return value
        kind = ir.VectorType(I32, self.lanes)
        shifted = self.ir.shl(self.ir.zext(value, kind), ir.Constant(kind, [16] * self.lanes))
        return self.ir.bitcast(shifted, self.vector)

    def _norm(self, weight: ir.Value, eps_bits: ir.Value) -> None:
        """normed = hidden / rms(hidden) * weight; the padding of `hidden` is zero and stays it."""
        v = self.values
        width = self._splat(self.ir.sitofp(v[Arg.WIDTH], F32))
        eps = self._splat(self.ir.bitcast(self.ir.trunc(eps_bits, I32), F32))
        with self.loop(self.integer(0), v[Arg.BATCH]) as b:
            row, out = (self.at(base, (b.index, v[Arg.HIDDEN_STRIDE])) for base in (v[Arg.HIDDEN], self.normed))
            blocks = self._parts(v[Arg.WIDTH], self.integer(self.lanes))
            with self.loop(self.integer(0), blocks, [self.number(0)]) as squares:
                value = self.load(self.at(row, (squares.index, self.lanes * FLOAT_BYTES)))
                squares.carry([self.fma(value, value, squares.values[0])])
            mean = self.ir.fdiv(self._splat(self.across(squares.values[0])), width)
            root = self._intrinsic(f"llvm.sqrt.v{self.lanes}f32", self.vector, (self.vector,))
            inverse = self.ir.fdiv(self.number(1), self.ir.call(root, (self.add(mean, eps),)))
            with self._blocks(self.integer(0), v[Arg.WIDTH]) as column:
                place = self.ir.mul(column, self.integer(FLOAT_BYTES))
                value = self.mul(self.load(self.at(row, place)), inverse)
                self.store(self.mul(value, self.load(self.at(weight, place))), self.at(out, place))

    def store_scalar(self, value: ir.Value, address: ir.Value) -> None:
        self.ir.store(value, self.ir.inttoptr(address, PTR), align=FLOAT_BYTES)

    def _of_layer(self, arg: LayerArg) -> ir.Value:
        return self.load_int(self.at(self.layer, 8 * arg))

    def _row_bytes(self, width: ir.Value, kind: str) -> ir.Value:
        return self.ir.mul(width, self.integer(ITEM[kind]))

    def _part_of_scale(self, scale: ir.Value, row: ir.Value) -> ir.Value:
        """The address of a row's scale; zero stays zero: there is none."""
        if self.form.large != "int8":
            return self.integer(0)
        return self.at(scale, (row, FLOAT_BYTES))

    def _product(self, kind: str, weight: ir.Value, stride: ir.Value, scale: ir.Value, rows: ir.Value,
                 columns: ir.Value, x: ir.Value, x_stride: ir.Value, out: ir.Value, out_stride: ir.Value,
                 add: bool = False) -> None:  # fmt: skip
        arguments = (weight, stride, scale, rows, columns, x, x_stride, self.values[Arg.BATCH], out, out_stride)
        self.ir.call(self.products[kind].function, (*arguments, self.integer(int(add))))
