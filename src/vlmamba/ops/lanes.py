"""Device functions of the Triton scans: how the 32 lanes of a warp share channels and states, and what each lane
computes.

S lanes stand side by side for a group of 4 channels and divide its states among them, NS states a lane; 32 / S groups
make a warp, which is the whole program. A lane keeps the 4 x NS states of its group that are its own as separate
values, loads and finishes one channel of the group (its own), and learns the others' by exchange between lanes
(`tl.gather`, a shuffle).
So what depends on the channel alone is computed once, B and C are read once for 4 channels, and a sum over channels
crosses 32 / S lanes instead of 32.

Letters: S lanes of a group, NS states of a lane, T steps done together.
"""

# mypy: ignore-errors
# ruff: noqa: RUF005
# (Triton's language looks like Python, but only its own compiler knows the types of its names; it has no starred
# tuples, and a condition known to it must stand apart from one that is not.)

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def softplus(v):
    """log(1 + exp(v)). The polynomial is log(1 + e) / e on [0, 1], minimax in the relative error (2e-7): no
    cancellation where dt is small, and no second trip to the special-function unit."""
    e = tl.exp2(tl.abs(v) * -LOG2E)
    p = e * 0.0052326880395412445 - 0.029505213722586632
    p = p * e + 0.07822591066360474
    p = p * e - 0.13663242757320404
    p = p * e + 0.19106005132198334
    p = p * e - 0.2484298199415207
    p = p * e + 0.3331909775733948
    p = p * e - 0.4999949336051941
    p = p * e + 0.9999999403953552
    return tl.maximum(v, 0.0) + p * e


@triton.jit
def sigmoid(v):
    """1 / (1 + exp(-v)) as the square of a reciprocal root: one instruction where a division takes eight."""
    r = tl.rsqrt(1.0 + tl.exp2(v * -LOG2E))
    return r * r


@triton.jit
def position(step, length, orders, k, height, width, GRID: tl.constexpr):
    """Where step `step` of order k stands in memory. `orders` packs two bits per k: 1 reverses, 2 walks down the
    columns."""
    if GRID:
        order = (orders >> (2 * k)) & 3
        t = tl.where(order % 2 == 1, length - 1 - step, step)
        t = tl.where(order >= 2, (t % height) * width + t // height, t)
    else:
        t = step
    return t


@triton.jit
def places(first, last, length, orders, k, height, width, T: tl.constexpr, GRID: tl.constexpr):
    """Positions of T steps from `first`; beyond `last` the last step again, so that a load needs no mask."""
    at = ()
    for j in tl.static_range(T):
        step = tl.maximum(tl.minimum(first + j, last - 1), 0)
        at = at + (position(step, length, orders, k, height, width, GRID).to(tl.int64),)
    return at


@triton.jit
def fetch(pointer, stride, at, T: tl.constexpr):
    """Each lane's own channel at T positions, as it stands in memory."""
    raw = ()
    for j in tl.static_range(T):
        raw = raw + (tl.load(pointer + at[j] * stride),)
    return raw


@triton.jit
def fetch_states(pointer, stride, at, held, T: tl.constexpr, NS: tl.constexpr, PACKED: tl.constexpr):
    """Each lane's NS values of B or C at T positions, in words of up to 8 bytes, or one by one where rows are not
    aligned."""
    raw = ()
    for j in tl.static_range(T):
        here = pointer + at[j] * stride
        if not PACKED:
            words = ()
            for i in tl.static_range(NS):
                words = words + (tl.load(here + i, mask=held > i, other=0.0),)
        elif NS * pointer.dtype.element_ty.primitive_bitwidth == 32:
            words = (tl.load(here.to(tl.pointer_type(tl.int32))),)
        else:
            words = ()
            for i in tl.static_range(NS * pointer.dtype.element_ty.primitive_bitwidth // 64):
                words = words + (tl.load(here.to(tl.pointer_type(tl.int64)) + i),)
        raw = raw + (words,)
    return raw


@triton.jit
def unpack(words, dtype: tl.constexpr, PACKED: tl.constexpr):
    """The float32 values in a lane's words."""
    values = ()
    for i in tl.static_range(len(words)):
        word = words[i]
        if not PACKED:
            values = values + (word.to(tl.float32),)
        elif word.dtype == tl.int32:
            values = values + _pair(word, dtype)
        else:
            values = values + _pair(word.to(tl.int32), dtype) + _pair((word >> 32).to(tl.int32), dtype)
    return values


@triton.jit
def _pair(word, dtype: tl.constexpr):
    if dtype == tl.float32:
        values = (word.to(tl.float32, bitcast=True),)
    elif dtype == tl.bfloat16:
        values = ((word << 16).to(tl.float32, bitcast=True), (word & -65536).to(tl.float32, bitcast=True))
    else:
        low = word.to(tl.int16).to(tl.float16, bitcast=True)
        values = (low.to(tl.float32), (word >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32))
    return values


@triton.jit
def spread(value, S: tl.constexpr):
    """From a lane's own value, those of the group's 4 channels."""
    lane = tl.arange(0, 32)
    values = ()
    for i in tl.static_range(4):
        values = values + (tl.gather(value, lane // S * S + i, 0),)
    return values


@triton.jit
def add_across(values, bit: tl.constexpr):
    """Sum over the pairs of lanes that differ in `bit`: of several values each lane of a pair keeps half, the upper
    lane the upper half; a single one both keep."""
    lane = tl.arange(0, 32)
    total = ()
    if len(values) == 1:
        total = (values[0] + tl.gather(values[0], lane ^ bit, 0),)
    else:
        upper = (lane & bit) != 0
        for i in tl.static_range(len(values) // 2):
            low, high = values[i], values[i + len(values) // 2]
            total = total + (tl.where(upper, high, low) + tl.gather(tl.where(upper, low, high), lane ^ bit, 0),)
    return total


@triton.jit
def own_total(values, S: tl.constexpr):
    """Sum of the group's 4 values over its S lanes: each lane gets the total of its own channel."""
    values = add_across(add_across(values, 2), 1)
    if S >= 8:
        values = add_across(values, 4)
    if S >= 16:
        values = add_across(values, 8)
    return values[0]


@triton.jit
def over_groups(values, S: tl.constexpr):
    """Sum of each value over the 32 / S groups: a lane keeps the share of the values whose turn is its group."""
    values = add_across(values, 16)
    if S <= 8:
        values = add_across(values, 8)
    if S <= 4:
        values = add_across(values, 4)
    return values


@triton.jit
def _apart(tile, NS: tl.constexpr):
    """The NS values of each lane in a tile (32, NS)."""
    if NS == 2:
        values = tl.split(tile)
    else:
        even, odd = tl.split(tl.reshape(tile, [32, 2, 2]))
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        values = (first, second, third, fourth)
    return values


@triton.jit
def _together(values, first: tl.constexpr, NS: tl.constexpr):
    """The opposite of `_apart`, of NS values from `first` on."""
    tile = tl.join(values[first], values[first + 1])
    if NS == 4:
        odd = tl.join(values[first + 1], values[first + 3])
        even = tl.join(values[first], values[first + 2])
        tile = tl.reshape(tl.join(even, odd), [32, 4])
    return tile


@triton.jit
def _tile(NS: tl.constexpr):
    """Where a lane's NS values stand in a tile (32, NS)."""
    return tl.arange(0, 32)[:, None] * NS + tl.arange(0, NS)[None, :]


@triton.jit
def load_values(pointer, NS: tl.constexpr):
    """4 x NS values of each lane from the kernels' own layout, (4, 32, NS): a tile of several values is one access,
    and the compiler looks at every access for as long as at all others."""
    values = ()
    for i in tl.static_range(4):
        values = values + _apart(tl.load(pointer + i * 32 * NS + _tile(NS)), NS)
    return values


@triton.jit
def store_values(pointer, values, NS: tl.constexpr):
    """The opposite of `load_values`."""
    for i in tl.static_range(4):
        tl.store(pointer + i * 32 * NS + _tile(NS), _together(values, i * NS, NS))


@triton.jit
def load_matrix(pointer, channel, state, dim, states, scale, NS: tl.constexpr):
    """A lane's 4 x NS values of a (D, N) matrix, times `scale`; zero outside."""
    values = ()
    n = state[:, None] + tl.arange(0, NS)[None, :]
    for i in tl.static_range(4):
        inside = (channel + i < dim)[:, None] & (n < states)
        at = (channel + i).to(tl.int64)[:, None] * states + n
        values = values + _apart(tl.load(pointer + at, mask=inside, other=0.0) * scale, NS)
    return values


@triton.jit
def store_matrix(pointer, values, channel, state, dim, states, NS: tl.constexpr):
    """The opposite of `load_matrix`."""
    n = state[:, None] + tl.arange(0, NS)[None, :]
    for i in tl.static_range(4):
        inside = (channel + i < dim)[:, None] & (n < states)
        at = (channel + i).to(tl.int64)[:, None] * states + n
        tl.store(pointer + at, _together(values, i * NS, NS), mask=inside)


@triton.jit
def zeros(COUNT: tl.constexpr):
    """COUNT zero values."""
    values = ()
    for _ in tl.static_range(COUNT):
        values = values + (tl.zeros([32], tl.float32),)
    return values


@triton.jit
def keep_unless(reset, values):
    """The values, or zeros where `reset`."""
    kept = ()
    for e in tl.static_range(len(values)):
        kept = kept + (tl.where(reset, 0.0, values[e]),)
    return kept


@triton.jit
def decayed(values, a2, dts, NS: tl.constexpr):
    """exp(dt A) times each state; `a2` is A log2(e), `dts` the group's 4 time steps."""
    result = ()
    for e in tl.static_range(4 * NS):
        result = result + (tl.exp2(dts[e // NS] * a2[e]) * values[e],)
    return result


@triton.jit
def fold(values, parts, spans, a2, count, order, S: tl.constexpr, NS: tl.constexpr):
    """Carry a state over `count` segments: values = exp(A span) values + part. Segments stand `order` apart in `parts`
    and (by sign) in `spans`; a span that is no number says that the segment began a new sequence."""
    for segment in range(count):
        dts = spread(tl.load(spans + segment * order * 32 + tl.arange(0, 32)), S)
        part = load_values(parts + segment * order * (4 * NS * 32), NS)
        carried = ()
        for e in tl.static_range(4 * NS):
            span = dts[e // NS]
            carried = carried + (part[e] + tl.where(span == span, tl.exp2(span * a2[e]) * values[e], 0.0),)
        values = carried
    return values
