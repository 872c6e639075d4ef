"""`vlmamba info`: what is installed, what will run, and what is wrong with this machine."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from importlib import metadata

import torch

from vlmamba import __version__
from vlmamba.commands.load import NANO
from vlmamba.ops import dispatch

_PACKAGES = (
    *("torch", "transformers", "safetensors", "pillow", "numpy", "llvmlite", "triton", "jsonargparse", "rich"),
    *("peft", "tensorboard", "fastapi", "uvicorn", "torchvision"),
)
_LEAST = {"torch": (2, 11), "transformers": (5, 17)}
_SETTINGS = ("VLMAMBA_OPS", "VLMAMBA_DEBUG", "TRITON_INTERPRET", "OMP_NUM_THREADS", "HF_HUB_OFFLINE", "HF_HOME")


def info() -> int:
    """Prints the report; 1 when something is wrong."""
    print(f"vlmamba {__version__}, Python {platform.python_version()}, {platform.platform()}")
    print(f"  in {os.path.dirname(os.path.dirname(os.path.abspath(dispatch.__file__)))}")
    print("packages")
    for name in _PACKAGES:
        print(f"  {name:14}{installed(name) or 'not installed'}")
    print("devices")
    for line in _devices():
        print(f"  {line}")
    print("ops: what runs, and why")
    for device, dtype in _places():
        print(f"  {device}, {str(dtype).removeprefix('torch.')}")
        for op in dispatch.OPS:
            print(f"    {op:16}{_explained(op, device, dtype)}")
    print(f"nano model: {NANO if (NANO / 'config.json').is_file() else 'not in this installation'}")
    for name in _SETTINGS:
        if name in os.environ:
            print(f"environment: {name}={os.environ[name]}")
    for title, found in (("problems", wrong := list(problems())), ("could be better", list(notes()))):
        print(title if found else f"{title}: nothing found")
        for what, remedy in found:
            print(f"  {what}\n    -> {remedy}")
    return int(bool(wrong))


def installed(name: str) -> str | None:
    """The version of a distribution, None without one."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def problems() -> Iterator[tuple[str, str]]:
    """What is wrong with this machine, and what to do about it."""
    for name, least in _LEAST.items():
        version = installed(name) or "0"
        if _numbers(version) < least:
            wanted = ".".join(map(str, least))
            yield f"{name} {version} is older than {wanted}", f"pip install -U '{name}>={wanted}'"
    if _numbers(installed("transformers") or "0") >= (6, 0):
        yield "transformers 6 is not supported yet", "pip install 'transformers>=5.17,<6'"
    if (trouble := _torchvision_trouble()) is not None:
        yield f"torchvision does not fit this torch: {trouble}", "pip uninstall torchvision (VL-Mamba does not use it)"
    if shutil.which("nvidia-smi") and not torch.cuda.is_available():
        why = "is built without CUDA" if torch.version.cuda is None else "finds no usable driver"
        yield f"there is an NVIDIA driver, but torch {torch.__version__} {why}", "install torch for your CUDA version"
    if torch.cuda.is_available() and installed("triton") is None:
        yield "triton is missing: the ops run as plain torch on the GPU, slowly", "pip install triton"
    slow = _explained("selective_scan", "cpu", torch.float32)
    if slow.startswith("reference") and "set by" not in slow:
        yield f"the CPU runs the plain torch scan, {slow}", "pip install -U llvmlite"
    if "fails" in slow:
        yield f"the forced implementation: {slow}", "unset VLMAMBA_OPS"


def notes() -> Iterator[tuple[str, str]]:
    """What works, but slower or with less than it might; often on purpose."""
    if torch.get_num_threads() == 1 and (os.cpu_count() or 1) > 1:
        yield f"torch uses 1 of {os.cpu_count()} CPUs", "unset OMP_NUM_THREADS, or raise it"
    if (font := _font_trouble()) is not None:
        yield font, "install the Noto Color Emoji font (Debian: apt install fonts-noto-color-emoji)"


def _devices() -> Iterator[str]:
    yield f"cpu: {platform.machine()}, {os.cpu_count()} CPUs, torch uses {torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(index)
            yield f"cuda:{index}: {card.name}, {card.total_memory / 2**30:.0f} GiB, compute {card.major}.{card.minor}"
    if torch.backends.mps.is_available():
        yield "mps: Apple GPU"


def _explained(op: str, device: str, dtype: torch.dtype) -> str:
    try:
        return dispatch.explain(op, device, dtype)
    except ValueError as error:  # a setting that every op will refuse
        return f"fails: {error}"


def _places() -> Iterator[tuple[str, torch.dtype]]:
    yield "cpu", torch.float32
    if torch.cuda.is_available():
        yield "cuda", torch.bfloat16
    if torch.backends.mps.is_available():
        yield "mps", torch.float32


def _torchvision_trouble() -> str | None:
    if installed("torchvision") is None:
        return None
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError, AttributeError) as error:
        return str(error).splitlines()[0]
    return None


def _font_trouble() -> str | None:
    try:
        from vlmamba.data.scenes.sprites import emoji_font
    except ImportError:
        return None
    return None if emoji_font() else "no emoji font: scenes hold shapes and words, but no things"


def _numbers(version: str) -> tuple[int, ...]:
    parts = version.split("+")[0].split(".")[:2]
    return tuple(int(part) if part.isdigit() else 0 for part in parts)
