"""What a measurement depends on besides the code: recorded with every result."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from pathlib import Path

import torch

import flash_dmattn


def describe() -> dict[str, object]:
    found: dict[str, object] = {
        "date": datetime.date.today().isoformat(),
        "commit": os.environ.get("FLASH_DMATTN_COMMIT") or _commit(),
        "flash_dmattn": flash_dmattn.__version__,
        "backends": flash_dmattn.get_available_backends(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    if "cpu" in flash_dmattn.get_available_backends():
        found["build"] = torch.ops.flash_dmattn.describe_build()
    if torch.cuda.is_available():
        found |= {"gpu": torch.cuda.get_device_name(), "driver": _driver(), "cuda": torch.version.cuda}
        found["cudnn"] = torch.backends.cudnn.version()
    return found


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return ""


def _commit() -> str:
    changes = "+changes" if _git("status", "--porcelain", "-uno") else ""
    return _git("rev-parse", "--short=12", "HEAD") + changes


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    fields = dict(line.split(":", 1) for line in lines[: lines.index("")] if ":" in line)
    values = {name.strip(): value.strip() for name, value in fields.items()}
    family = f" (family {values['cpu family']}, model {values['model']})" if "cpu family" in values else ""
    return values.get("model name", platform.processor()) + family


def _git(*arguments: str) -> str:
    try:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
