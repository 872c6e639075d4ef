"""The multimodal connector: patches of the vision encoder to tokens of the language model (arXiv 2403.13600, sec. 3.2).

    mlp      V_out = Linear(GELU(Linear(V)))
    vss-mlp  V_out = MLP(Norm(VSS(V) + V))
    vss-l2   V' = Linear(V);  V_out = Linear(Norm(VSS(GELU(V')) + V'))

VSS unfolds the patch grid along several orders, passes each sequence through one Mamba layer, puts the outputs back in
patch order and sums them.

Shapes: I images, P patches, h x w grid, v vision width, d model width, c width of the VSS, D channels, K orders,
N state size, R rank of dt, W convolution width.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmamba import ops
from vlmamba.models.config import VLMambaConfig
from vlmamba.models.mamba import SSMParameters


class OrderLinear(nn.Module):
    """A linear map per scan order: weight (K, out, in), input (I, K, P, in), output (I, K, P, out)."""

    def __init__(self, orders: int, features_in: int, features_out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(orders, features_out, features_in))

    def forward(self, x: Tensor) -> Tensor:
        return torch.matmul(x, self.weight.transpose(1, 2))


class VSS(nn.Module):
    """One Mamba layer scanned over the patch grid along K orders, outputs summed: (I, P, c) to (I, P, c).

    What acts on each patch alone commutes with the reordering, so in_proj, gate and out_proj run once, around the
    sum; convolution, x_proj, dt_proj and scan run per order, in place of patch order (no copies in scan order). This
    equals running the whole layer once per order, exactly. With weights per order, the part that runs per order has
    its own parameters for each, as in VMamba (arXiv 2401.10166).

    Sizes are Mamba-1's own: expand 2, N = 16, W = 4, R = ceil(c / 16).
    """

    def __init__(self, width: int, orders: tuple[str, ...], shared: bool):
        super().__init__()
        self.orders = orders
        self.channels, self.state_size, self.rank, self.conv_width = 2 * width, 16, math.ceil(width / 16), 4
        sets = () if shared else (len(orders),)
        self.in_proj = nn.Linear(width, 2 * self.channels, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(*sets, self.channels, self.conv_width))
        self.conv_bias = nn.Parameter(torch.empty(*sets, self.channels))
        per_patch = self.rank + 2 * self.state_size
        if shared:
            self.x_proj: nn.Module = nn.Linear(self.channels, per_patch, bias=False)
            self.dt_proj: nn.Module = nn.Linear(self.rank, self.channels, bias=False)
        else:
            self.x_proj = OrderLinear(len(orders), self.channels, per_patch)
            self.dt_proj = OrderLinear(len(orders), self.rank, self.channels)
        self.ssm = SSMParameters(self.channels, self.state_size, sets)
        self.out_proj = nn.Linear(self.channels, width, bias=False)

    def forward(self, x_IPc: Tensor, grid: tuple[int, int]) -> Tensor:
        x_IPD, z_IPD = self.in_proj(x_IPc).chunk(2, dim=-1)
        x_IKPD = ops.conv_2d(x_IPD, self.conv_weight, self.conv_bias, grid=grid, orders=self.orders, activation="silu")
        dt, B_IKPN, C_IKPN = self.x_proj(x_IKPD).split([self.rank, self.state_size, self.state_size], dim=-1)
        A, D, dt_bias = self.ssm(x_IKPD)
        y_IPD = ops.scan_2d(x_IKPD, self.dt_proj(dt), A, B_IKPN, C_IKPN, D, dt_bias, grid=grid, orders=self.orders)
        return self.out_proj(y_IPD * F.silu(z_IPD))


class Connector(nn.Module):
    """Patches (I, P, v) on an h x w grid to tokens (I, P, d). A class token before the patches skips the scan."""

    def __init__(self, config: VLMambaConfig):
        super().__init__()
        vision, width = (cast(Any, part).hidden_size for part in (config.vision_config, config.text_config))
        self.kind, hidden = config.connector, config.connector_width or width
        shared = config.scan_weights == "shared"
        if self.kind == "mlp":
            self.linear_in, self.linear_out = nn.Linear(vision, hidden), nn.Linear(hidden, width)
        elif self.kind == "vss-mlp":
            self.vss = VSS(vision, config.orders, shared)
            self.norm = nn.LayerNorm(vision)
            self.linear_in, self.linear_out = nn.Linear(vision, hidden), nn.Linear(hidden, width)
        else:
            self.linear_in, self.linear_out = nn.Linear(vision, width), nn.Linear(width, width)
            self.vss = VSS(width, config.orders, shared)
            self.norm = nn.LayerNorm(width)

    def forward(self, v: Tensor, grid: tuple[int, int]) -> Tensor:
        if self.kind == "vss-mlp":
            v = self.norm(self._scan(v, grid) + v)
        v = self.linear_in(v)
        if self.kind == "vss-l2":
            return self.linear_out(self.norm(self._scan(F.gelu(v), grid) + v))
        return self.linear_out(F.gelu(v))

    def _scan(self, v: Tensor, grid: tuple[int, int]) -> Tensor:
        extra = v.shape[1] - grid[0] * grid[1]
        if extra < 0:
            raise ValueError(f"{v.shape[1]} patches do not fill a grid of {grid[0]} x {grid[1]}")
        return F.pad(self.vss(v[:, extra:], grid), (0, 0, extra, 0))
