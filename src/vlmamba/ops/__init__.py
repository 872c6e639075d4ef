"""The tensor functions under the models: selective scan, causal convolution, one-token updates, 2-D scans.

Each op is a folder with `reference.py` (plain torch, any device), `cpu.py` (native code generated on first use)
and `triton.py` (GPU); `dispatch` decides which one runs, and `explain` says why.
"""

from vlmamba.ops.add_norm import add_norm, rms_norm
from vlmamba.ops.causal_conv1d import causal_conv1d
from vlmamba.ops.dispatch import explain, use_implementation
from vlmamba.ops.scan_2d import ORDERS, conv_2d, scan_2d
from vlmamba.ops.selective_scan import selective_scan
from vlmamba.ops.state_update import conv_update, state_update

__all__ = [
    "ORDERS",
    "add_norm",
    "causal_conv1d",
    "conv_2d",
    "conv_update",
    "explain",
    "rms_norm",
    "scan_2d",
    "selective_scan",
    "state_update",
    "use_implementation",
]
