"""What figures depend on besides the job."""

import platform
from pathlib import Path
from typing import Any

import torch


def machine(threads: int) -> dict[str, Any]:
    """Processor, system and versions, with the number of CPU threads in use."""
    return {
        "processor": _processor(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": threads,
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
