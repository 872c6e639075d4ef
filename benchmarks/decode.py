"""Decoding: tokens a second of the captured step, all counted (embedding, layers, head, choice, feeding back).

    python -m benchmarks.decode --output decode.json             gate, marks, kernels of a step
    python -m benchmarks.decode --variants                       also other cuts of the kernels
    python -m benchmarks.decode --quick                          a gate of two layers, for a look between changes

The gate comes first: against float64, the fused step may be no further off than the modules in the same dtype.
Letters: B batch, V vocabulary.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.bench import Bench
from benchmarks.models import OURS, mamba_config, placed
from benchmarks.timing import measure
from vlmamba.models import MambaState, VLMambaForCausalLM, decode
from vlmamba.ops.decode import Buffers, Head, Layer, Matrix, Plan, step

MARKS = {1: 600, 8: 4500, 64: 25000, 256: 42000}
INT8_MARK = 900
PROFILED = 2  # steps
# What else to try: batch, changes of the plan, int8.
VARIANTS: list[tuple[int, dict[str, Any], bool]] = [
    (256, {"recur_sequences": 2}, False),
    (64, {"recur_sequences": 2}, False),
    (1, {"vector_bytes": 10240}, True),
    (1, {"vector_up_to": 0}, True),
    (256, {"recur_channels": 32}, False),
    (1, {"vector_up_to": 0}, False),
    (64, {"mix_block": 64}, False),
]


class Wide(Sequence[Layer]):
    """Layers in float64, one at a time (all of them would take 22 GB)."""

    def __init__(self, layers: Sequence[Layer]):
        self._layers = layers

    def __len__(self) -> int:
        return len(self._layers)

    def __getitem__(self, i: Any) -> Any:
        return wide(self._layers[i])


def wide(part: Any) -> Any:
    """A layer or head in float64."""

    def exact(value: Any) -> Any:
        if isinstance(value, Matrix):
            return Matrix(value.weight.double() * (1 if value.scale is None else value.scale.double()[:, None]))
        return value.double() if isinstance(value, Tensor) else value

    return replace(part, **{f.name: exact(getattr(part, f.name)) for f in fields(part)})


def exact_logits(layers: Sequence[Layer], head: Head, state: MambaState, tokens: Tensor) -> Tensor:
    """Logits (steps, B, V) in float64 after each of tokens (B, steps), from a state."""
    conv, ssm = ([torch.cat([t, t[:1]]).double() for t in tensors] for tensors in (state.conv, state.ssm))
    buffers = Buffers.make(len(tokens), layers[0], head, Plan())
    given = {f.name: getattr(buffers, f.name) for f in fields(buffers)}
    buffers = replace(buffers, **{name: b.double() for name, b in given.items() if b.is_floating_point()})
    logits, ends = [], wide(head)
    for i in range(tokens.shape[1]):
        buffers.tokens.copy_(tokens[:, i])
        step(Wide(layers), ends, conv, ssm, buffers, Plan(), "reference")
        logits.append(buffers.logits.clone())
    return torch.stack(logits)


def build(size: str, device: str | torch.device, dtype: torch.dtype) -> VLMambaForCausalLM:
    model = placed(lambda: VLMambaForCausalLM(mamba_config(size)), torch.device(device), dtype)
    return realistic(model)


def realistic(model: VLMambaForCausalLM) -> VLMambaForCausalLM:
    """Random weights whose logits are spread as a trained model's are (about 2), norms and biases not all alike."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("norm.weight", "norm_f.weight", ".D")):
                p.add_(torch.randn_like(p) * 0.2)
            elif name.endswith("conv1d.bias"):
                p.normal_(0, 0.1)
        model.lm_head.weight.normal_(0, 2 * model.config.hidden_size**-0.5)
    return model


def modules(model: VLMambaForCausalLM, tokens: Tensor, state: MambaState) -> Tensor:
    """Logits (steps, B, V) through the modules."""
    out = []
    for i in range(tokens.shape[1]):
        hidden = model.backbone(tokens[:, i : i + 1], cache_params=state, use_cache=True).last_hidden_state
        out.append(model.lm_head(hidden[:, -1]))
    return torch.stack(out)


def errors(model: VLMambaForCausalLM, batch: int, int8: bool = False, **options: Any) -> dict[str, float]:
    """Relative errors against float64 of four tokens' logits: fused, by modules; and whether two fused runs agree."""
    make = torch.Generator("cuda").manual_seed(batch)
    ids = torch.randint(2, model.config.vocab_size, (batch, 20), device="cuda", generator=make)
    state = model(ids[:, :16], use_cache=True, logits_to_keep=1).cache_params
    exact = exact_logits(*decode.fused_weights(model), state.clone(), ids[:, 16:])
    decoder = decode.Decoder(model, int8=int8, **options)
    runs = []
    for _ in range(2):
        own = state.clone()
        runs.append(torch.stack([decoder.logits(ids[:, i], own).clone() for i in range(16, 20)]))
    plain = modules(model, ids[:, 16:], state)

    def off(logits: Tensor) -> float:
        return float((logits.double() - exact).norm() / exact.norm())

    same = torch.equal(runs[0], runs[1])
    return {"fused": off(runs[0]), "modules": off(plain), "same twice": float(same)}


def gate(model: VLMambaForCausalLM) -> dict[str, dict[str, float]]:
    """Every kind of plan on a small model, with and without PDL, and batches 1 and 8 on the large one."""
    small = shallow("130m", hidden_size=256, intermediate_size=512, num_hidden_layers=4, time_step_rank=16)
    found = {f"small B{b}": errors(small, b) for b in (1, 2, 3, 8, 16, 40, 130)}
    found["small B1, no PDL"] = errors(small, 1, plan=Plan())
    found |= {f"2.8b B{b}": errors(model, b) for b in (1, 8)}
    found["2.8b B1 int8"] = errors(model, 1, int8=True)
    return found


def quick_gate() -> dict[str, dict[str, float]]:
    """The kernels that are timed, on two layers of the large model. One that does not run is red, not the end."""
    model, found = shallow("2.8b", num_hidden_layers=2), {}
    for batch, int8 in [*((b, False) for b in MARKS), (1, True), (8, True)]:
        name = f"two layers B{batch}{' int8' * int8}"
        try:
            found[name] = errors(model, batch, int8=int8)
        except Exception as error:
            print(f"  {name}: {type(error).__name__}: {error}"[:2000], flush=True)
            found[name] = {"fused": float("nan"), "modules": 0.0, "same twice": 0.0}
    return found


def shallow(size: str, **changes: int) -> VLMambaForCausalLM:
    config = mamba_config(size)
    for name, value in changes.items():
        setattr(config, name, value)
    return realistic(placed(lambda: VLMambaForCausalLM(config), torch.device("cuda"), torch.bfloat16))


def passes(found: dict[str, dict[str, float]]) -> bool:
    """NaN never passes; int8 may be ten times as far off as bf16."""
    return all(
        e["fused"] <= e["modules"] * (10 if "int8" in name else 1.2) and e["same twice"] == 1
        for name, e in found.items()
    )


def copy_bandwidth() -> float:
    """Bytes a second, read plus written, of a large copy."""
    source = torch.randint(0, 255, (2**31,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * len(source) / statistics.median(times(lambda: target.copy_(source), 10))


def times(function: Any, repeats: int) -> list[float]:
    """Seconds of each call, by device events, after one to warm up."""
    function()
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, stop in pairs:
        start.record()
        function()
        stop.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(stop) / 1e3 for start, stop in pairs]


def least_bytes(layers: Sequence[Layer], head: Head, batch: int) -> int:
    """What one step must move: every weight once, both states read and written, the logits."""

    def size(part: Any) -> int:
        values = [getattr(part, f.name) for f in fields(part)]
        return sum(
            v.nbytes if isinstance(v, Tensor) else v.weight.nbytes if isinstance(v, Matrix) else 0 for v in values
        )

    channels, states = layers[0].A.shape
    state = channels * (states * 4 + (layers[0].conv_weight.shape[1] - 1) * 2) * len(layers)
    weights = sum(size(layer) for layer in layers) + head.matrix.weight.nbytes
    return weights + 2 * batch * state + batch * len(head.matrix.weight) * 4


def lane_of(layers: Sequence[Layer], head: Head, batch: int, **options: Any) -> decode.Lane:
    """A captured step whose sequences are all different."""
    lane = decode.Lane(layers, head, batch, **options)
    for conv, ssm in zip(lane.pool.conv, lane.pool.ssm, strict=True):
        conv.normal_()
        ssm.normal_()
    lane.aim(batch)
    lane.step.buffers.tokens.random_(2, len(head.embedding))
    return lane


def speed(lane: decode.Lane, tokens: int, repeats: int) -> dict[str, float]:
    """Tokens a second over `tokens` dependent steps."""

    def generate() -> None:
        for _ in range(tokens):
            lane.step.run()

    batch = lane.step.batch
    rates = sorted(batch * tokens / t for t in times(generate, repeats))
    return {"tokens/s": statistics.median(rates), "low": rates[0], "high": rates[-1]}


def profile(lane: decode.Lane) -> list[dict[str, Any]]:
    """Kernels of one step by name and grid: how many, mean microseconds from start to end, and the mean time by which
    their start lies behind the end of the kernel before (below zero: they overlap)."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as prof:
        for _ in range(PROFILED):
            lane.step.run()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        prof.export_chrome_trace(str(path))
        events = [e for e in json.loads(path.read_text())["traceEvents"] if e.get("cat") == "kernel"]
    events.sort(key=lambda e: e["ts"])
    groups: dict[tuple[str, str], list[tuple[float, float, int]]] = defaultdict(list)
    end = None
    for e in events:
        gap = 0.0 if end is None else e["ts"] - end
        end = e["ts"] + e["dur"]
        key = (e["name"][:48], str(e["args"].get("grid")))
        groups[key].append((e["dur"], gap, e["args"].get("registers per thread", 0)))
    return [
        {
            "kernel": name,
            "grid": grid,
            "a step": len(found) / PROFILED,
            "us": statistics.fmean(f[0] for f in found),
            "gap us": statistics.median(f[1] for f in found),
            "registers": found[0][2],
        }
        for (name, grid), found in sorted(groups.items(), key=lambda g: -sum(f[0] for f in g[1]))
    ][:14]


def resources() -> list[dict[str, Any]]:
    """Compiled kernels that spill registers."""
    from vlmamba.ops.decode import device as kernels

    found = []
    for name, kernel in vars(kernels).items():
        if name.endswith("_kernel"):
            for cache, *_ in kernel.device_caches.values():
                found += [{"kernel": name, "registers": c.n_regs, "spills": c.n_spills} for c in cache.values()]
    return [f for f in found if f["spills"]]


def whole_loops(model: VLMambaForCausalLM) -> dict[str, float]:
    """Tokens a second of `generate` and of `generate_tokens`: a prompt of 32 (its time included), 256 new, batch 1; and
    of the first token alone."""
    ids = torch.randint(2, 1000, (1, 32), device="cuda")

    def loop(count: int = 256) -> None:
        list(decode.generate_tokens(model, ids, max_new_tokens=count))

    def generate() -> None:
        model.generate(ids, max_new_tokens=256, min_new_tokens=256, do_sample=False)

    return {
        "generate_tokens": 256 / statistics.median(times(loop, 3)),
        "generate": 256 / statistics.median(times(generate, 3)),
        "prompt and first token": 1 / statistics.median(times(lambda: loop(1), 3)),
    }


def trials(options: argparse.Namespace) -> Iterator[tuple[int, dict[str, Any], bool]]:
    """(batch, changes of the plan, int8), the most telling first."""
    for batch in options.batches:
        yield batch, {}, False
    yield 1, {}, True
    if options.variants:
        yield from (v for v in VARIANTS if v[0] in options.batches)


def run(bench: Bench) -> None:
    """The section of the whole benchmark: every batch, then int8 at batch 1."""
    size = "toy" if bench.toy else "2.8b"
    on_gpu = bench.device.type == "cuda"
    with torch.no_grad():
        model = build(size, bench.device, torch.float32 if bench.toy else torch.bfloat16)
        for int8 in (False, True):
            layers, head = decode.fused_weights(model, int8)
            for batch in MARKS if not int8 else (1,):
                case, mode = f"decode {size}, B{batch}{' int8' * int8}", "graph" if on_gpu else "eager"
                with bench.row_of(case, OURS, mode):
                    lane = lane_of(layers, head, batch, capture=on_gpu)
                    timing = measure(lane.step.run, device=bench.device, budget=bench.seconds(1.5), warmup=20)
                    floor = least_bytes(layers, head, batch)
                    bench.add(case, OURS, mode, timing, unit="tokens/s", work=batch, floor_bytes=floor, batch=batch)
                bench.free()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, help="where the JSON goes")
    parser.add_argument("--batches", type=int, nargs="+", default=list(MARKS))
    parser.add_argument("--variants", action="store_true", help="also time other cuts of the kernels")
    parser.add_argument("--quick", action="store_true", help="a gate of two layers, and no loops around the step")
    parser.add_argument("--seconds", type=float, default=170, help="no new trial after this long")
    parser.add_argument("--no-gate", action="store_true", help="time although the gate is red (to see where time goes)")
    options = parser.parse_args()
    began = time.time()
    results: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "trials": []}

    def save() -> None:
        if options.output:
            options.output.write_text(json.dumps(results, indent=1))

    with torch.no_grad():
        model = build("2.8b", "cuda", torch.bfloat16)
        results["gate"] = quick_gate() if options.quick else gate(model)
        for name, found in results["gate"].items():
            print(f"  {name:20s}", "   ".join(f"{k} {v:.3g}" for k, v in found.items()))
        save()
        if not passes(results["gate"]):
            print("the gate is red")
            if not options.no_gate:
                return 1
        results["copy"] = copy_bandwidth()
        print(f"gate {time.time() - began:.0f} s; copy {results['copy'] / 1e12:.2f} TB/s")
        if not options.quick:
            results["loops"] = whole_loops(model)
            print("  ".join(f"{k} {v:.0f} tokens/s" for k, v in results["loops"].items()))
        decode._decoders.clear()
        weights = {int8: decode.fused_weights(model, int8) for int8 in (False, True)}
        for batch, changes, int8 in trials(options):
            if time.time() - began > options.seconds:
                print("no time left for the other trials")
                break
            results["trials"].append(trial(*weights[int8], batch, changes, int8, results["copy"]))
            save()
    results["spills"] = resources()
    print("spilling:", results["spills"] or "nothing", f"   {time.time() - began:.0f} s in all")
    save()
    return 0


def trial(
    layers: Sequence[Layer], head: Head, batch: int, changes: dict[str, Any], int8: bool, copy: float
) -> dict[str, Any]:
    """Times one plan, and prints it; as shipped, also its kernels."""
    row: dict[str, Any] = {"batch": batch, "int8": int8, "changes": changes}
    label = f"B{batch}{' int8' if int8 else ''} {', '.join(f'{k} {v}' for k, v in changes.items()) or 'as shipped'}"
    gc.collect()
    torch.cuda.empty_cache()
    try:
        plan = replace(decode.default_plan(head.embedding.device), **changes)
        lane = lane_of(layers, head, batch, plan=plan)
        row |= speed(lane, 256 if batch < 32 else 32, 3)
        row["limit"] = copy * batch / least_bytes(layers, head, batch)
        mark = INT8_MARK if int8 else MARKS.get(batch, 0)
        print(
            f"{label:66s} {row['tokens/s']:8.0f} tokens/s ({row['low']:.0f} to {row['high']:.0f})"
            f"  {row['tokens/s'] / row['limit']:.0%} of copy  mark {mark}",
            flush=True,
        )
        if not changes:
            row["kernels"] = profile(lane)
            for k in row["kernels"]:
                print("    ", "  ".join(f"{v:.2f}" if isinstance(v, float) else f"{v}" for v in k.values()), flush=True)
    except Exception as error:  # a cut that does not fit the card is a finding, not an end
        row["failed"] = f"{type(error).__name__}: {error}"[:300]
        print(f"{label:66s} {row['failed']}", flush=True)
    return row


if __name__ == "__main__":
    raise SystemExit(main())
