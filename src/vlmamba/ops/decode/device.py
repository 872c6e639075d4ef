"""The kernels of one decoding step, in Triton: at small batch four launches a layer, each reading its weights once.

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
def _prefetch(start, count, LANES: tl.constexpr):
    """Asks for `count` bytes from `start` (multiples of 16) to be in the L2 cache soon; NVIDIA since Hopper."""
    share = count // LANES // 16 * 16
    at = start.to(tl.pointer_type(tl.int8)) + tl.arange(0, LANES).to(tl.int64) * share
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; // dummy $0",
        "=r,l,r", [at, tl.full([LANES], 0, tl.int32) + share], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def vector_kernel(
    x, weight, scale, norm, out, rows, width, x_b, out_b, eps,
    BATCH: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, CHUNKS: tl.constexpr, EVEN: tl.constexpr,
    HAS_NORM: tl.constexpr, HAS_SCALE: tl.constexpr, ADD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out = norm(x) @ weight^T for one or two x: each program holds its rows of the weight in registers, whole."""
    if PDL:
        gdc_launch_dependents()
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, BLOCK_K)
    in_r = r < rows
    own = weight + r.to(tl.int64)[:, None] * width
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
            acc += tiles[c].to(tl.float32) * v[None, :]
        total = tl.sum(acc, axis=1) * factor
        if HAS_NORM:
            total *= tl.rsqrt(tl.sum(squares, axis=0) / width + eps)
        at = out + b * out_b + r
        if ADD:
            total += tl.load(at, mask=in_r, other=0.0).to(tl.float32)
        tl.store(at, total.to(out.dtype.element_ty), mask=in_r)


@triton.jit
def matrix_kernel(
    x, weight, scale, norm, out, batch, rows, width, x_b, out_b, eps,
    BLOCK_B: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, EVEN: tl.constexpr,
    DTYPE: tl.constexpr, LANES: tl.constexpr, HAS_NORM: tl.constexpr, HAS_SCALE: tl.constexpr, ADD: tl.constexpr,
    PDL: tl.constexpr, PREFETCH: tl.constexpr,
):  # fmt: skip
    """out = norm(x) @ weight^T for a batch, on the matrix units; the norm's scale, a factor of the row, comes last."""
    if PDL:
        gdc_launch_dependents()
    first = tl.program_id(0) * BLOCK_R
    r = first + tl.arange(0, BLOCK_R)
    b = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    k = tl.arange(0, BLOCK_K)
    in_r, in_b = r < rows, b < batch
    own = weight + r.to(tl.int64)[:, None] * width
    if PREFETCH:
        held = tl.minimum(rows - first, BLOCK_R) * width * (weight.dtype.element_ty.primitive_bitwidth // 8)
        _prefetch(weight + first.to(tl.int64) * width, held, LANES)
    factor = tl.load(scale + r, mask=in_r, other=0.0) if HAS_SCALE else tl.full([BLOCK_R], 1.0, tl.float32)
    if PDL:
        gdc_wait()
    acc = tl.zeros([BLOCK_R, BLOCK_B], tl.float32)
    squares = tl.zeros([BLOCK_B], tl.float32)
    for start in tl.range(0, width, BLOCK_K, num_stages=STAGES):
        kk = start + k
        if EVEN:
            w = tl.load(own + kk[None, :], eviction_policy="evict_first")
        else:
            w = tl.load(own + kk[None, :], mask=in_r[:, None] & (kk < width)[None, :], other=0.0)
        v = tl.load(x + b[:, None] * x_b + kk[None, :], mask=in_b[:, None] & (kk < width)[None, :], other=0.0)
        if HAS_NORM:
            v = v.to(tl.float32)
            squares += tl.sum(v * v, axis=1)
            v *= tl.load(norm + kk, mask=kk < width, other=0.0).to(tl.float32)[None, :]
        acc = tl.dot(w.to(DTYPE), tl.trans(v.to(DTYPE)), acc, input_precision="ieee")
    acc *= factor[:, None]
    if HAS_NORM:
        acc *= tl.rsqrt(squares / width + eps)[None, :]
    at = out + b[None, :] * out_b + r[:, None]
    inside = in_r[:, None] & in_b[None, :]
    if ADD:
        acc += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(at, acc.to(out.dtype.element_ty), mask=inside)


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
def _held(state, weight, bias, row, d, inside, dim, W: tl.constexpr, HAS_BIAS: tl.constexpr):
    """The taps (D,) and the inputs (B, D) that the convolution remembers, oldest first, and its bias."""
    taps, inputs = (), ()
    for j in tl.static_range(W):
        taps += (tl.load(weight + d * W + j, mask=d < dim, other=0.0).to(tl.float32),)
    for j in tl.static_range(W - 1):
        inputs += (tl.load(state + row[:, None] + j * dim + d[None, :], mask=inside, other=0.0),)
    if HAS_BIAS:
        offset = tl.load(bias + d, mask=d < dim, other=0.0).to(tl.float32)
    else:
        offset = tl.zeros(d.shape, tl.float32)
    return taps, inputs, offset


@triton.jit
def _convolve(new, taps, inputs, offset, W: tl.constexpr):
    """silu of the convolution at the newest input, float32."""
    v = taps[W - 1][None, :] * new.to(tl.float32) + offset[None, :]
    for j in tl.static_range(W - 1):
        v += taps[j][None, :] * inputs[j].to(tl.float32)
    return v * sigmoid(v)


@triton.jit
def mix_kernel(
    xz, conv_state, slots, conv_weight, conv_bias, weight, partial, batch, dim, features, xz_b, conv_s,
    BLOCK_B: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr, STEPS: tl.constexpr, W: tl.constexpr,
    DTYPE: tl.constexpr, HAS_BIAS: tl.constexpr, MATRIX: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One share of x_proj(silu(conv(x))): the sum over STEPS * BLOCK_K channels. The conv state is only read."""
    if PDL:
        gdc_launch_dependents()
    b = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    f = tl.arange(0, BLOCK_F)
    in_b, in_f = b < batch, f < features
    row = tl.load(slots + b, mask=in_b, other=0).to(tl.int64) * conv_s
    acc = tl.zeros([BLOCK_F, BLOCK_B], tl.float32)
    for step in tl.static_range(STEPS):
        d = (tl.program_id(0) * STEPS + step) * BLOCK_K + tl.arange(0, BLOCK_K)
        inside = in_b[:, None] & (d < dim)[None, :]
        w = tl.load(weight + f[:, None] * dim + d[None, :], mask=in_f[:, None] & (d < dim)[None, :], other=0.0)
        taps, inputs, offset = _held(conv_state, conv_weight, conv_bias, row, d, inside, dim, W, HAS_BIAS)
        if PDL and step == 0:
            gdc_wait()
        new = tl.load(xz + b[:, None] * xz_b + d[None, :], mask=inside, other=0.0)
        v = _convolve(new, taps, inputs, offset, W)
        if MATRIX:
            acc = tl.dot(w, tl.trans(v.to(DTYPE)), acc, input_precision="ieee")
        else:
            acc += tl.sum(w.to(tl.float32) * v, axis=1)[:, None]
    at = partial + (tl.program_id(0) * batch + b)[None, :] * features + f[:, None]
    tl.store(at, acc, mask=in_f[:, None] & in_b[None, :])


@triton.jit
def combine_kernel(partial, out, count, parts, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """The sum of the shares, in their order."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for p in range(parts):
        total += tl.load(partial + p * count + i, mask=i < count, other=0.0)
    tl.store(out + i, total, mask=i < count)


@triton.jit
def _gathered(partial, b, in_b, first, count, batch, features, PARTS: tl.constexpr, GROUP: tl.constexpr,
              BLOCK: tl.constexpr):  # fmt: skip
    """Features first .. first + count of x_proj (BLOCK_B, BLOCK): the sum of the shares, GROUP at a time."""
    i = tl.arange(0, BLOCK)
    at = partial + b[:, None] * features + first + i[None, :]
    inside = in_b[:, None] & (i < count)[None, :]
    if PARTS == 1:
        total = tl.load(at, mask=inside, other=0.0)
    else:
        g = tl.arange(0, GROUP)
        shares = tl.zeros([b.shape[0], GROUP, BLOCK], tl.float32)
        for p in tl.static_range(0, PARTS, GROUP):
            own = at[:, None, :] + ((p + g) * batch * features)[None, :, None]
            shares += tl.load(own, mask=inside[:, None, :] & (p + g < PARTS)[None, :, None], other=0.0)
        total = tl.sum(shares, axis=1)
    return total


@triton.jit
def advance_kernel(
    partial, xz, conv_state, ssm_state, slots, conv_weight, conv_bias, weight, dt_bias, A, D, y,
    batch, dim, rank, features, xz_b, conv_s, ssm_s,
    PARTS: tl.constexpr, GROUP: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
    N: tl.constexpr, W: tl.constexpr, DTYPE: tl.constexpr, HAS_BIAS: tl.constexpr, MATRIX: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """dt_proj, softplus, the recurrence, D and the gate for some channels of some sequences; both states move on."""
    if PDL:
        gdc_launch_dependents()
    b = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    n, i = tl.arange(0, N), tl.arange(0, BLOCK_R)
    in_b, in_d = b < batch, d < dim
    inside = in_b[:, None] & in_d[None, :]
    slot = tl.load(slots + b, mask=in_b, other=0).to(tl.int64)
    dn = d[:, None] * N + n[None, :]
    own = ssm_state + (slot * ssm_s)[:, None, None] + dn[None, :, :]
    h = tl.load(own, mask=inside[:, :, None], other=0.0)
    a = tl.load(A + dn, mask=in_d[:, None], other=0.0) * LOG2E
    w = tl.load(weight + d[:, None] * rank + i[None, :], mask=in_d[:, None] & (i < rank)[None, :], other=0.0)
    taps, inputs, offset = _held(conv_state, conv_weight, conv_bias, slot * conv_s, d, inside, dim, W, HAS_BIAS)
    bias = tl.load(dt_bias + d, mask=in_d, other=0.0)
    skip = tl.load(D + d, mask=in_d, other=0.0)
    if PDL:
        gdc_wait()
    at = xz + b[:, None] * xz_b + d[None, :]
    new = tl.load(at, mask=inside, other=0.0)
    z = tl.load(at + dim, mask=inside, other=0.0).to(tl.float32)
    low = _gathered(partial, b, in_b, 0, rank, batch, features, PARTS, GROUP, BLOCK_R)
    B = _gathered(partial, b, in_b, rank, N, batch, features, PARTS, GROUP, N)
    C = _gathered(partial, b, in_b, rank + N, N, batch, features, PARTS, GROUP, N)
    x = _convolve(new, taps, inputs, offset, W)
    if MATRIX:
        v = tl.dot(low.to(DTYPE), tl.trans(w), input_precision="ieee")
    else:
        v = tl.sum(w.to(tl.float32) * low, axis=1)[None, :]
    dt = softplus(v + bias[None, :])
    h = tl.exp2(dt[:, :, None] * a[None, :, :]) * h + (dt * x)[:, :, None] * B[:, None, :]
    tl.store(own, h, mask=inside[:, :, None])
    out = tl.sum(h * C[:, None, :], axis=2) + skip[None, :] * x
    out *= z * sigmoid(z)
    tl.store(y + b[:, None] * dim + d[None, :], out.to(y.dtype.element_ty), mask=inside)
    to = conv_state + (slot * conv_s)[:, None] + d[None, :]
    for j in tl.static_range(1, W - 1):
        tl.store(to + (j - 1) * dim, inputs[j], mask=inside)
    if W > 1:
        tl.store(to + (W - 2) * dim, new.to(conv_state.dtype.element_ty), mask=inside)


@triton.jit
def choose_kernel(
    logits, temperature, seed, stops, limits, count, history, tokens, slots, vocabulary, spare, logits_b, history_b,
    capacity, BLOCK: tl.constexpr, STOPS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The next token of a sequence: the likeliest at temperature 0, else drawn (the largest of logit / T + Gumbel)."""
    if PDL:
        gdc_launch_dependents()
    b = tl.program_id(0)
    T = tl.load(temperature + b)
    key = tl.load(seed + b)
    ends = tl.load(stops + tl.arange(0, STOPS))
    known, banned = tl.load(limits).to(tl.int32), tl.load(limits + 1).to(tl.int32)
    if PDL:
        gdc_wait()
    done = tl.load(count + b)
    best = tl.full([BLOCK], -float("inf"), tl.float32)
    where = tl.zeros([BLOCK], tl.int32)
    for start in range(0, known, BLOCK):
        i = start + tl.arange(0, BLOCK)
        v = tl.load(logits + b.to(tl.int64) * logits_b + i, mask=i < logits_b, other=0.0).to(tl.float32)
        v = tl.where((i < known) & (i != banned), v, -float("inf"))
        if T > 0:
            v = v / T - tl.log(-tl.log(tl.maximum(tl.rand(key, done * vocabulary + i), 1e-10)))
        better = v > best
        best, where = tl.where(better, v, best), tl.where(better, i, where)
    top = tl.max(best, axis=0)
    token = tl.min(tl.where(best == top, where, 2147483647), axis=0)
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
