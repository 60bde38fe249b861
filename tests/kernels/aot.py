"""Compiles every launch of every kernel for GPUs that are not there, and says what it takes.

``python -m tests.kernels.aot`` prints one JSON object a line. It is a process of its own: under
TRITON_INTERPRET, which tests of values need, there is nothing that could be compiled. The tools
that read the result come with Triton.
"""

import importlib
import json
import pkgutil
import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fedlora.ops import kernels

TARGETS = (80, 90)
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def modules():
    """Name -> module, of every module that has kernels."""
    names = [info.name for info in pkgutil.iter_modules(kernels.__path__)]
    found = {name: importlib.import_module(f"{kernels.__name__}.{name}") for name in names}
    return {
        n: m
        for n, m in found.items()
        if any(isinstance(k, triton.JITFunction) for k in vars(m).values())
    }


def usage(case, target):
    """Registers, bytes of stack and of shared memory of one compiled case."""
    names = case.kernel.arg_names
    constants = {(names.index(name),): value for name, value in case.constexprs.items()}
    signature = {name: case.signature.get(name, "constexpr") for name in names}
    made = triton.compile(
        ASTSource(case.kernel, signature, constants),
        target=GPUTarget("cuda", target, 32),
        options={
            "num_warps": case.num_warps,
            "num_stages": case.num_stages,
            "enable_fp_fusion": case.fused,
        },
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        report = subprocess.run(
            [CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    text = report.stdout + report.stderr
    found = {key: int(re.search(rf"{key}:(\d+)", text)[1]) for key in ("REG", "STACK", "LOCAL")}
    return {**found, "SHARED": made.metadata.shared}


def main():
    for name, module in modules().items():
        for number, case in enumerate(getattr(module, "AOT", ())):
            for target in TARGETS:
                row = {"module": name, "case": number, "target": target}
                row["kernel"] = case.kernel.__name__
                row["constexprs"] = {key: str(value) for key, value in case.constexprs.items()}
                print(json.dumps({**row, **usage(case, target)}), flush=True)
        bare = {key for key, k in vars(module).items() if isinstance(k, triton.JITFunction)}
        bare -= {case.kernel.__name__ for case in getattr(module, "AOT", ())}
        print(json.dumps({"module": name, "bare": sorted(bare)}), flush=True)


if __name__ == "__main__":
    main()
