"""The connectors against a naive transcription of the paper's equations."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from transformers import MambaConfig, SiglipVisionConfig

from vlmamba.models.config import SCANS, VLMambaConfig
from vlmamba.models.connector import VSS, Connector
from vlmamba.models.vlm import init_vss

V, D_MODEL = 12, 20


def config(**options) -> VLMambaConfig:
    vision = SiglipVisionConfig(hidden_size=V, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    text = MambaConfig(hidden_size=D_MODEL, num_hidden_layers=1, vocab_size=32)
    return VLMambaConfig(vision_config=vision, text_config=text, **options)


def randomise(module: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(0)
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.3)
    for m in module.modules():
        if isinstance(m, VSS):
            m.ssm.reset(0.001, 0.1, 1e-4)
            init_vss(m)
            torch.nn.init.normal_(m.conv_bias, std=0.3)
            torch.nn.init.normal_(m.ssm.D, std=0.3)
    return module.double()


def permutation(order: str, h: int, w: int) -> list[int]:
    """Patch index at each step, by walking the grid."""
    rows = [i * w + j for i in range(h) for j in range(w)]
    columns = [i * w + j for j in range(w) for i in range(h)]
    walk = rows if order.startswith("row") else columns
    return walk[::-1] if order.endswith("reverse") else walk


def naive_layer(vss: VSS, x: torch.Tensor, k: int) -> torch.Tensor:
    """One whole Mamba-1 layer over one sequence (L, c), step by step, with the parameters of order k."""

    def own(p: torch.Tensor, shared_ndim: int) -> torch.Tensor:
        return p if p.ndim == shared_ndim else p[k]

    u, z = (x @ vss.in_proj.weight.T).chunk(2, -1)
    weight, bias = own(vss.conv_weight, 2), own(vss.conv_bias, 1)
    u = F.pad(u.T, (3, 0))
    u = F.silu(F.conv1d(u[None], weight[:, None], bias, groups=len(bias))[0].T)
    dt, B, C = (u @ own(vss.x_proj.weight, 2).T).split([vss.rank, 16, 16], -1)
    A, D, dt_bias = (own(p, n) for p, n in zip(vss.ssm(x), (2, 1, 1), strict=True))
    dt = F.softplus(dt @ own(vss.dt_proj.weight, 2).T + dt_bias)
    state, out = torch.zeros_like(A), []
    for t in range(len(x)):
        state = torch.exp(dt[t, :, None] * A) * state + dt[t, :, None] * B[t] * u[t, :, None]
        out.append(state @ C[t] + D * u[t])
    return (torch.stack(out) * F.silu(z)) @ vss.out_proj.weight.T


def naive_vss(vss: VSS, v: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    images = []
    for image in v:
        merged = torch.zeros_like(image)
        for k, order in enumerate(vss.orders):
            index = permutation(order, *grid)
            merged[index] = merged[index] + naive_layer(vss, image[index], k)
        images.append(merged)
    return torch.stack(images)


@pytest.mark.parametrize("grid", [(3, 3), (2, 5), (7, 1), (1, 1)])
@pytest.mark.parametrize("scan", list(SCANS))
@pytest.mark.parametrize("shared", [True, False])
def test_short_form_equals_the_layer_run_once_per_order(grid, scan, shared):
    vss = randomise(VSS(8, SCANS[scan], shared))
    v = torch.randn(2, grid[0] * grid[1], 8, dtype=torch.float64, requires_grad=True)
    fast, slow = vss(v, grid), naive_vss(vss, v, grid)
    assert_close(fast, slow, rtol=1e-10, atol=1e-12)
    weight = torch.randn_like(fast)
    names, params = zip(*vss.named_parameters(), strict=True)
    for name, a, b in zip(
        ("v", *names),
        torch.autograd.grad((fast * weight).sum(), [v, *params]),
        torch.autograd.grad((slow * weight).sum(), [v, *params]),
        strict=True,
    ):
        assert_close(a, b, rtol=1e-8, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


def test_equations_of_the_three_connectors():
    v = torch.randn(2, 6, V, dtype=torch.float64)

    mlp = randomise(Connector(config(connector="mlp")))
    assert_close(mlp(v, (2, 3)), mlp.linear_out(F.gelu(mlp.linear_in(v))))

    c = randomise(Connector(config(connector="vss-mlp", scan="csm")))
    v_scan = naive_vss(c.vss, v, (2, 3))
    assert_close(c(v, (2, 3)), c.linear_out(F.gelu(c.linear_in(c.norm(v_scan + v)))))

    c = randomise(Connector(config(connector="vss-l2", scan="bsm")))
    v1 = c.linear_in(v)
    v_scan = naive_vss(c.vss, F.gelu(v1), (2, 3))
    assert_close(c(v, (2, 3)), c.linear_out(c.norm(v_scan + v1)))


def test_the_scan_runs_at_the_width_the_paper_gives():
    assert Connector(config(connector="vss-mlp")).vss.in_proj.in_features == V
    assert Connector(config(connector="vss-l2")).vss.in_proj.in_features == D_MODEL


def test_class_token_skips_the_scan():
    c = randomise(Connector(config(connector="vss-l2")))
    v = torch.randn(1, 7, V, dtype=torch.float64)
    with_cls, without = c(v, (2, 3)), c(v[:, 1:], (2, 3))
    assert_close(with_cls[:, 1:], without)
    with pytest.raises(ValueError, match="do not fill a grid of 3 x 3"):
        c(v, (3, 3))


@pytest.mark.parametrize("kind", ["mlp", "vss-mlp"])
def test_width_of_the_mlp(kind: str) -> None:
    connector = Connector(config(connector=kind, connector_width=33))
    assert connector.linear_out.in_features == 33
    assert connector(torch.randn(2, 6, V), (2, 3)).shape == (2, 6, D_MODEL)


def test_vss_l2_has_no_width_of_its_own() -> None:
    with pytest.raises(ValueError, match=r"connector_width=33: .* for connector mlp or vss-mlp"):
        config(connector="vss-l2", connector_width=33)
