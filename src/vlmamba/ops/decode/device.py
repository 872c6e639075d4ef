"""The kernels of one decoding step, in Triton: for one or two sequences four launches a layer, each reading its weights
once; for more, kernels that do one thing each around the products of torch's library.

Every kernel first loads what does not depend on the kernel before it (weights, states), then waits for it, then
computes. On NVIDIA GPUs since Hopper, programmatic dependent launch (`PDL`) starts a kernel while the one before it
still runs, so these loads fill the gap between them; elsewhere the order costs nothing. Sums over programs go through
partial results in memory, never through float atomics: two runs agree bit for bit.

Letters: B batch, S slots of the state pool, d model width, D channels, N state size, R rank of dt, W taps, F = R + 2 N
features of x_proj, P partial sums, V vocabulary.
"""

# mypy: ignore-errors
# (Triton's language looks like Python, but only its own compiler knows the types of its names.)

from __future__ import annotations

import triton
import triton.language as tl

from vlmamba.ops.lanes import LOG2E, sigmoid, softplus

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # a Triton without its NVIDIA part: plans then leave PDL out
    gdc_launch_dependents = gdc_wait = None


@triton.jit
def _widened(tile, PACKED: tl.constexpr):
    """Weights in float32. PACKED (int8, on NVIDIA): w + 128 as the low byte of the float 2^23 + 128 + w, one
    instruction for each weight where a conversion takes the time of eight."""
    if PACKED:
        bits = tl.inline_asm_elementwise(
            """{ .reg .b32 t; xor.b32 t, $4, 0x80808080;
            prmt.b32 $0, t, 0x4B000000, 0x7440; prmt.b32 $1, t, 0x4B000000, 0x7441;
            prmt.b32 $2, t, 0x4B000000, 0x7442; prmt.b32 $3, t, 0x4B000000, 0x7443; }""",
            "=r,=r,=r,=r,r", [tile], dtype=tl.int32, is_pure=True, pack=4,
        )  # fmt: skip
        wide = bits.to(tl.float32, bitcast=True) - 8388736.0
    else:
        wide = tile.to(tl.float32)
    return wide


@triton.jit
def vector_kernel(
    x, weight, scale, norm, out, rows, width, x_b, out_b, eps,
    BATCH: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, CHUNKS: tl.constexpr, EVEN: tl.constexpr,
    HAS_NORM: tl.constexpr, HAS_SCALE: tl.constexpr, ADD: tl.constexpr, PACKED: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """out = norm(x) @ weight^T for one or two x: each program holds its rows of the weight in registers, whole."""
    if PDL:
        gdc_launch_dependents()
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, BLOCK_K)
    in_r = r < rows
    own = weight + r.to(tl.int64)[:, None] * width
    if PACKED:  # eight bytes a thread, not sixteen: then its columns are those of the x it loads
        k = tl.max_contiguous(k, 8)
    tiles = ()
    for c in tl.static_range(CHUNKS):
        kk = c * BLOCK_K + k
        if EVEN:
            tiles += (tl.load(own + kk[None, :], eviction_policy="evict_first"),)
        else:
            tiles += (tl.load(own + kk[None, :], mask=in_r[:, None] & (kk < width)[None, :], other=0.0),)
    factor = tl.load(scale + r, mask=in_r, other=0.0) if HAS_SCALE else tl.full([ROWS], 1.0, tl.float32)
    if PDL:
        gdc_wait()
    inputs = ()
    for b in tl.static_range(BATCH):
        for c in tl.static_range(CHUNKS):
            kk = c * BLOCK_K + k
            if EVEN:
                inputs += (tl.load(x + b * x_b + kk),)
            else:
                inputs += (tl.load(x + b * x_b + kk, mask=kk < width, other=0.0),)
    norms = ()
    if HAS_NORM:
        for c in tl.static_range(CHUNKS):
            kk = c * BLOCK_K + k
            norms += (tl.load(norm + kk, mask=kk < width, other=0.0).to(tl.float32),)
    for b in tl.static_range(BATCH):
        acc = tl.zeros([ROWS, BLOCK_K], tl.float32)
        squares = tl.zeros([BLOCK_K], tl.float32)
        for c in tl.static_range(CHUNKS):
            v = inputs[b * CHUNKS + c].to(tl.float32)
            if HAS_NORM:
                squares += v * v
                v *= norms[c]
            acc += _widened(tiles[c], PACKED) * v[None, :]
        total = tl.sum(acc, axis=1) * factor
        if HAS_NORM:
            total *= tl.rsqrt(tl.sum(squares, axis=0) / width + eps)
        at = out + b * out_b + r
        if ADD:
            total += tl.load(at, mask=in_r, other=0.0).to(tl.float32)
        tl.store(at, total.to(out.dtype.element_ty), mask=in_r)


@triton.jit
def matrix_kernel(
    x, weight, scale, out, batch, rows, width, x_b, out_b,
    BLOCK_B: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, EVEN: tl.constexpr,
    DTYPE: tl.constexpr, HAS_SCALE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out = x @ weight^T for a batch, on the matrix units: for weights that torch's library has no product for."""
    if PDL:
        gdc_launch_dependents()
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    b = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    k = tl.arange(0, BLOCK_K)
    in_r, in_b = r < rows, b < batch
    own = weight + r.to(tl.int64)[:, None] * width
    factor = tl.load(scale + r, mask=in_r, other=0.0) if HAS_SCALE else tl.full([BLOCK_R], 1.0, tl.float32)
    if PDL:
        gdc_wait()
    acc = tl.zeros([BLOCK_R, BLOCK_B], tl.float32)
    for start in tl.range(0, width, BLOCK_K, num_stages=STAGES):
        kk = start + k
        if EVEN:
            w = tl.load(own + kk[None, :], eviction_policy="evict_first")
        else:
            w = tl.load(own + kk[None, :], mask=in_r[:, None] & (kk < width)[None, :], other=0.0)
        v = tl.load(x + b[:, None] * x_b + kk[None, :], mask=in_b[:, None] & (kk < width)[None, :], other=0.0)
        acc = tl.dot(w.to(DTYPE), tl.trans(v.to(DTYPE)), acc, input_precision="ieee")
    acc *= factor[:, None]
    at = out + b[None, :] * out_b + r[:, None]
    tl.store(at, acc.to(out.dtype.element_ty), mask=in_r[:, None] & in_b[None, :])


@triton.jit
def norm_kernel(
    h, delta, norm, out, width, eps, BLOCK: tl.constexpr, HAS_DELTA: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """h += delta; out = norm(h)."""
    if PDL:
        gdc_launch_dependents()
    k = tl.arange(0, BLOCK)
    inside = k < width
    weight = tl.load(norm + k, mask=inside, other=0.0).to(tl.float32)
    row = tl.program_id(0) * width + k
    if PDL:
        gdc_wait()
    v = tl.load(h + row, mask=inside, other=0.0).to(tl.float32)
    if HAS_DELTA:
        v += tl.load(delta + row, mask=inside, other=0.0).to(tl.float32)
        tl.store(h + row, v.to(h.dtype.element_ty), mask=inside)
    v *= tl.rsqrt(tl.sum(v * v, axis=0) / width + eps) * weight
    tl.store(out + row, v.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _remembered(state, weight, bias, d, inside, dim, tap_d, tap_w, W: tl.constexpr, HAS_BIAS: tl.constexpr):
    """For some channels of one sequence: what the inputs that the convolution remembers add up to, the tap of the
    newest input, and those inputs (oldest first)."""
    total = tl.load(bias + d, mask=inside, other=0.0).to(tl.float32) if HAS_BIAS else tl.zeros(d.shape, tl.float32)
    inputs = ()
    for j in tl.static_range(W - 1):
        inputs += (tl.load(state + j * dim + d, mask=inside, other=0.0),)
        total += inputs[j].to(tl.float32) * tl.load(weight + d * tap_d + j * tap_w, mask=inside, other=0.0)
    tap = tl.load(weight + d * tap_d + (W - 1) * tap_w, mask=inside, other=0.0).to(tl.float32)
    return total, tap, inputs


@triton.jit
def features_kernel(
    xz, conv_state, slots, conv_weight, conv_bias, weight, out, dim, features, xz_b, conv_s, tap_d, tap_w,
    BLOCK_K: tl.constexpr, CHUNKS: tl.constexpr, W: tl.constexpr, HAS_BIAS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Two features of x_proj(silu(conv(x))) for one sequence. Every program convolves all channels again: that is less
    than adding up partial sums would take. The conv state is only read."""
    if PDL:
        gdc_launch_dependents()
    b, first = tl.program_id(1), tl.program_id(0) * 2
    state = conv_state + tl.load(slots + b).to(tl.int64) * conv_s
    totals, taps, weights = (), (), ()
    for c in tl.static_range(CHUNKS):
        d = c * BLOCK_K + tl.arange(0, BLOCK_K)
        for r in tl.static_range(2):
            inside = (d < dim) & (first + r < features)
            weights += (tl.load(weight + (first + r) * dim + d, mask=inside, other=0.0),)
        total, tap, _ = _remembered(state, conv_weight, conv_bias, d, d < dim, dim, tap_d, tap_w, W, HAS_BIAS)
        totals += (total,)
        taps += (tap,)
    if PDL:
        gdc_wait()
    news = ()
    for c in tl.static_range(CHUNKS):
        d = c * BLOCK_K + tl.arange(0, BLOCK_K)
        news += (tl.load(xz + b * xz_b + d, mask=d < dim, other=0.0),)
    values = ()
    for c in tl.static_range(CHUNKS):
        v = totals[c] + taps[c] * news[c].to(tl.float32)
        values += (v * sigmoid(v),)
    even, odd = tl.zeros([BLOCK_K], tl.float32), tl.zeros([BLOCK_K], tl.float32)
    for c in tl.static_range(CHUNKS):
        even += weights[c * 2].to(tl.float32) * values[c]
        odd += weights[c * 2 + 1].to(tl.float32) * values[c]
    f = first + tl.arange(0, 2)
    tl.store(out + b * features + f, tl.sum(tl.join(even, odd), axis=0), mask=f < features)


@triton.jit
def advance_kernel(
    given, xz, conv_state, ssm_state, slots, conv_weight, conv_bias, weight, dt_bias, A, D, y,
    dim, rank, features, xz_b, conv_s, ssm_s, tap_d, tap_w,
    BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, CHUNKS: tl.constexpr, N: tl.constexpr, W: tl.constexpr,
    HAS_BIAS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """dt_proj, softplus, the recurrence, D and the gate for some channels of one sequence; both states move on."""
    if PDL:
        gdc_launch_dependents()
    b = tl.program_id(1)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    n, i = tl.arange(0, N), tl.arange(0, BLOCK_R)
    in_d = d < dim
    slot = tl.load(slots + b).to(tl.int64)
    dn = d[:, None] * N + n[None, :]
    own = ssm_state + slot * ssm_s + dn
    h = tl.load(own, mask=in_d[:, None], other=0.0)
    a = tl.load(A + dn, mask=in_d[:, None], other=0.0) * LOG2E
    weights = ()
    for c in tl.static_range(CHUNKS):
        inside = in_d[:, None] & (c * BLOCK_R + i < rank)[None, :]
        weights += (tl.load(weight + d[:, None] * rank + (c * BLOCK_R + i)[None, :], mask=inside, other=0.0),)
    to = conv_state + slot * conv_s
    total, tap, inputs = _remembered(to, conv_weight, conv_bias, d, in_d, dim, tap_d, tap_w, W, HAS_BIAS)
    bias = tl.load(dt_bias + d, mask=in_d, other=0.0)
    skip = tl.load(D + d, mask=in_d, other=0.0)
    if PDL:
        gdc_wait()
    from_here = given + b * features
    low = ()
    for c in tl.static_range(CHUNKS):
        low += (tl.load(from_here + c * BLOCK_R + i, mask=c * BLOCK_R + i < rank, other=0.0),)
    B, C = tl.load(from_here + rank + n), tl.load(from_here + rank + N + n)
    new = tl.load(xz + b * xz_b + d, mask=in_d, other=0.0)
    z = tl.load(xz + b * xz_b + dim + d, mask=in_d, other=0.0).to(tl.float32)
    acc = tl.zeros([BLOCK_D, BLOCK_R], tl.float32)
    for c in tl.static_range(CHUNKS):
        acc += weights[c].to(tl.float32) * low[c][None, :]
    dt = softplus(tl.sum(acc, axis=1) + bias)
    x = total + tap * new.to(tl.float32)
    x *= sigmoid(x)
    h = tl.exp2(dt[:, None] * a) * h + (dt * x)[:, None] * B[None, :]
    tl.store(own, h, mask=in_d[:, None])
    out = (tl.sum(h * C[None, :], axis=1) + skip * x) * (z * sigmoid(z))
    tl.store(y + b * dim + d, out.to(y.dtype.element_ty), mask=in_d)
    for j in tl.static_range(1, W - 1):
        tl.store(to + (j - 1) * dim + d, inputs[j], mask=in_d)
    if W > 1:
        tl.store(to + (W - 2) * dim + d, new.to(conv_state.dtype.element_ty), mask=in_d)


@triton.jit
def mix_kernel(
    xz, conv_state, slots, conv_weight, conv_bias, weight, x, partial, batch, dim, features, xz_b, conv_s, tap_d, tap_w,
    BLOCK_B: tl.constexpr, BLOCK_F: tl.constexpr, TILES: tl.constexpr, BLOCK_K: tl.constexpr, W: tl.constexpr,
    DTYPE: tl.constexpr, HAS_BIAS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """x = silu(conv(x)) for some channels of some sequences, whose conv state moves on, and their share of x_proj."""
    if PDL:
        gdc_launch_dependents()
    b = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    d = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    in_b, in_d = b < batch, d < dim
    inside = in_b[:, None] & in_d[None, :]
    slot = tl.load(slots + b, mask=in_b, other=0).to(tl.int64)
    to = conv_state + (slot * conv_s)[:, None] + d[None, :]
    weights, inputs, taps = (), (), ()
    for t in tl.static_range(TILES):
        f = t * BLOCK_F + tl.arange(0, BLOCK_F)
        at = weight + f[:, None] * dim + d[None, :]
        weights += (tl.load(at, mask=(f < features)[:, None] & in_d[None, :], other=0.0),)
    for j in tl.static_range(W - 1):
        inputs += (tl.load(to + j * dim, mask=inside, other=0.0),)
    for j in tl.static_range(W):
        taps += (tl.load(conv_weight + d * tap_d + j * tap_w, mask=in_d, other=0.0).to(tl.float32)[None, :],)
    if HAS_BIAS:
        v = tl.zeros([BLOCK_B, BLOCK_K], tl.float32) + tl.load(conv_bias + d, mask=in_d, other=0.0).to(tl.float32)
    else:
        v = tl.zeros([BLOCK_B, BLOCK_K], tl.float32)
    if PDL:
        gdc_wait()
    new = tl.load(xz + b[:, None] * xz_b + d[None, :], mask=inside, other=0.0)
    for j in tl.static_range(W - 1):
        v += taps[j] * inputs[j].to(tl.float32)
    v += taps[W - 1] * new.to(tl.float32)
    v = (v * sigmoid(v)).to(DTYPE)
    tl.store(x + b[:, None] * dim + d[None, :], v, mask=inside)
    for j in tl.static_range(1, W - 1):
        tl.store(to + (j - 1) * dim, inputs[j], mask=inside)
    if W > 1:
        tl.store(to + (W - 2) * dim, new.to(conv_state.dtype.element_ty), mask=inside)
    for t in tl.static_range(TILES):
        f = t * BLOCK_F + tl.arange(0, BLOCK_F)
        tile = weights[t]
        # A select keeps the tile in registers until here; without it shared memory takes it at once, and the loads
        # after it go out only when it has come. More sequences need the registers themselves.
        if BLOCK_B <= 16:
            tile = tl.where(in_d[None, :], tile, 0.0)
        share = tl.dot(tile, tl.trans(v), input_precision="ieee")
        at = partial + (tl.program_id(0) * batch + b)[None, :] * features + f[:, None]
        tl.store(at, share, mask=(f < features)[:, None] & in_b[None, :])


@triton.jit
def combine_kernel(partial, out, count, parts, BLOCK: tl.constexpr, BLOCK_P: tl.constexpr, PDL: tl.constexpr):
    """The sum of the shares of x_proj."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    p = tl.arange(0, BLOCK_P)
    shares = tl.load(
        partial + p[:, None] * count + i[None, :], mask=(p < parts)[:, None] & (i < count)[None, :], other=0.0
    )
    tl.store(out + i, tl.sum(shares, axis=0), mask=i < count)


@triton.jit
def delta_kernel(
    given, weight, bias, out, batch, dim, rank, features,
    BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, CHUNKS: tl.constexpr, DTYPE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """dt = softplus(dt_proj(the first `rank` features) + bias), float32."""
    if PDL:
        gdc_launch_dependents()
    b = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    i = tl.arange(0, BLOCK_R)
    in_b, in_d = b < batch, d < dim
    weights = ()
    for c in tl.static_range(CHUNKS):
        inside = in_d[:, None] & (c * BLOCK_R + i < rank)[None, :]
        weights += (tl.load(weight + d[:, None] * rank + (c * BLOCK_R + i)[None, :], mask=inside, other=0.0),)
    offset = tl.load(bias + d, mask=in_d, other=0.0)
    if PDL:
        gdc_wait()
    low = ()
    for c in tl.static_range(CHUNKS):
        inside = in_b[:, None] & (c * BLOCK_R + i < rank)[None, :]
        low += (tl.load(given + b[:, None] * features + (c * BLOCK_R + i)[None, :], mask=inside, other=0.0),)
    acc = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
    for c in tl.static_range(CHUNKS):
        acc = tl.dot(low[c].to(DTYPE), tl.trans(weights[c]), acc, input_precision="ieee")
    dt = softplus(acc + offset[None, :])
    tl.store(out + b[:, None] * dim + d[None, :], dt, mask=in_b[:, None] & in_d[None, :])


@triton.jit
def recur_kernel(
    given, xz, x, dt, ssm_state, slots, A, D, y, batch, dim, rank, features, xz_b, ssm_s,
    SEQUENCES: tl.constexpr, BLOCK_D: tl.constexpr, N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The recurrence, D and the gate for some channels of some sequences: little but reading and writing the state."""
    if PDL:
        gdc_launch_dependents()
    first = tl.program_id(1) * SEQUENCES
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    n = tl.arange(0, N)
    in_d = d < dim
    dn = d[:, None] * N + n[None, :]
    places, held = (), ()
    for s in tl.static_range(SEQUENCES):
        slot = tl.load(slots + first + s, mask=first + s < batch, other=0).to(tl.int64)
        places += (ssm_state + slot * ssm_s,)
    for s in tl.static_range(SEQUENCES):
        inside = in_d[:, None] & (first + s < batch)
        held += (tl.load(places[s] + dn, mask=inside, other=0.0, eviction_policy="evict_first"),)
    a = tl.load(A + dn, mask=in_d[:, None], other=0.0) * LOG2E
    skip = tl.load(D + d, mask=in_d, other=0.0)
    if PDL:
        gdc_wait()
    steps, inputs, gates, Bs, Cs = (), (), (), (), ()
    for s in tl.static_range(SEQUENCES):
        b = first + s
        inside = in_d & (b < batch)
        steps += (tl.load(dt + b * dim + d, mask=inside, other=0.0),)
        inputs += (tl.load(x + b * dim + d, mask=inside, other=0.0),)
        gates += (tl.load(xz + b * xz_b + dim + d, mask=inside, other=0.0),)
        Bs += (tl.load(given + b * features + rank + n, mask=(n < N) & (b < batch), other=0.0),)
        Cs += (tl.load(given + b * features + rank + N + n, mask=(n < N) & (b < batch), other=0.0),)
    for s in tl.static_range(SEQUENCES):
        b = first + s
        v, z = inputs[s].to(tl.float32), gates[s].to(tl.float32)
        h = tl.exp2(steps[s][:, None] * a) * held[s] + (steps[s] * v)[:, None] * Bs[s][None, :]
        tl.store(places[s] + dn, h, mask=in_d[:, None] & (b < batch), eviction_policy="evict_first")
        out = (tl.sum(h * Cs[s][None, :], axis=1) + skip * v) * (z * sigmoid(z))
        tl.store(y + b * dim + d, out.to(y.dtype.element_ty), mask=in_d & (b < batch))


@triton.jit
def best_kernel(
    logits, temperature, seed, limits, count, best, where, vocabulary, logits_b, parts,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The best token in a part of the vocabulary: by logit at temperature 0, else by logit / T + Gumbel noise."""
    if PDL:
        gdc_launch_dependents()
    b = tl.program_id(0)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    T = tl.load(temperature + b)
    key, done = tl.load(seed + b), tl.load(count + b)
    known, banned = tl.load(limits).to(tl.int32), tl.load(limits + 1).to(tl.int32)
    if PDL:
        gdc_wait()
    v = tl.load(logits + b.to(tl.int64) * logits_b + i, mask=i < logits_b, other=0.0).to(tl.float32)
    if T > 0:
        v = v / T - tl.log(-tl.log(tl.maximum(tl.rand(key, done * vocabulary + i), 1e-10)))
    v = tl.where((i < known) & (i != banned), v, -float("inf"))
    top = tl.max(v, axis=0)
    tl.store(best + b * parts + tl.program_id(1), top)
    tl.store(where + b * parts + tl.program_id(1), tl.min(tl.where(v == top, i, 2147483647), axis=0))


@triton.jit
def choose_kernel(
    best, where, stops, count, history, tokens, slots, spare, parts, history_b, capacity,
    BLOCK: tl.constexpr, STOPS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The next token of a sequence, from the best of every part of the vocabulary, and what follows from it."""
    if PDL:
        gdc_launch_dependents()
    b = tl.program_id(0)
    ends = tl.load(stops + tl.arange(0, STOPS))
    if PDL:
        gdc_wait()
    done = tl.load(count + b)
    p = tl.arange(0, BLOCK)
    v = tl.load(best + b * parts + p, mask=p < parts, other=-float("inf"))
    i = tl.load(where + b * parts + p, mask=p < parts, other=2147483647)
    token = tl.min(tl.where(v == tl.max(v, axis=0), i, 2147483647), axis=0)
    token = tl.where(token == 2147483647, 0, token)  # all logits NaN: any token that can be looked up
    tl.store(tokens + b, token.to(tl.int64))
    tl.store(history + b * history_b + done % capacity, token.to(tl.int64))
    tl.store(count + b, done + 1)
    ended = tl.sum((ends == token).to(tl.int32), axis=0) > 0
    tl.store(slots + b, spare, mask=ended)


@triton.jit
def embed_kernel(tokens, table, h, width, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """h (float32) = the token's row of the table."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.load(tokens + tl.program_id(0)).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(table + token * width + k, mask=k < width, other=0.0)
    tl.store(h + tl.program_id(0) * width + k, v.to(h.dtype.element_ty), mask=k < width)
