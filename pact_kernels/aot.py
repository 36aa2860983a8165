"""Compile every kernel and tile in use for each architecture, with no GPU: ``python -m pact_kernels.aot [--json]``.

It runs nothing and measures nothing; registers and spills come from the ``cuobjdump`` in Triton's own package.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pact_kernels.backend import INTERPRETED

from pact_kernels.linear_logprob import triton as head
from pact_kernels.tiles import COMBINE_ROWS, GATHER_COLUMNS, HEAD_TILES, HeadTile

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
OPERANDS = {"bf16": 2, "fp16": 2, "fp32": 4}
POINTERS = {
    "p_target": "*i64", "p_rows": "*i64", "p_select": "*i64", "p_source": "*i64", "p_order": "*i64", "p_start": "*i64", "p_flag": "*i32",
}  # fmt: skip  # the other pointers are float32 or operands


@dataclass(frozen=True)
class Build:
    """One kernel with its compile-time settings; ``operand`` is the dtype of hidden, weight, bias and dL/du."""

    kernel: Any
    operand: str
    constants: dict[str, int | bool]
    num_warps: int
    num_stages: int
    config: str

    def types(self) -> dict[str, str]:
        """Argument name -> Triton type."""
        own = dict.fromkeys(("p_hidden", "p_weight", "p_bias"), f"*{self.operand}")
        if self.kernel is head.head_dlogits_kernel:
            own["p_out"] = f"*{self.operand}"
        found = {}
        for name in self.kernel.arg_names:
            if name in self.constants:
                found[name] = "constexpr"
            elif name.startswith("p_"):
                found[name] = own.get(name) or POINTERS.get(name, "*fp32")
            else:
                found[name] = "fp32" if name == "softcap" else "i32"
        return found


def builds(target: str) -> Iterator[Build]:
    """Everything that a call on ``target`` can launch."""
    for operand, size in OPERANDS.items():
        tile = HEAD_TILES[target][size]
        for options in (False, True):
            flags = dict.fromkeys(("HAS_BIAS", "HAS_SOFTCAP", "HAS_SCALE", "ENTROPY"), options)
            for kernel in (head.head_forward_kernel, head.head_dlogits_kernel):
                yield _head(kernel, operand, tile, flags)
    for entropy in (False, True):
        constants: dict[str, int | bool] = {"ENTROPY": entropy, "BLOCK_N": COMBINE_ROWS}
        yield Build(head.head_combine_kernel, "fp32", constants, 4, 3, f"n{COMBINE_ROWS}_entropy{int(entropy)}")
    yield Build(head.gather_sum_kernel, "fp32", {"BLOCK_H": GATHER_COLUMNS}, 4, 3, f"h{GATHER_COLUMNS}")


def _head(kernel: Any, operand: str, tile: HeadTile, flags: dict[str, bool]) -> Build:
    blocks = {"BLOCK_N": tile.block_n, "BLOCK_V": tile.block_v, "BLOCK_H": tile.block_h, "UPCAST": False}
    config = f"{operand}_{tile.name}{'_all' if all(flags.values()) else ''}"
    return Build(kernel, operand, flags | blocks, tile.num_warps, tile.num_stages, config)


def compile_one(build: Build, target: str) -> dict[str, Any]:
    """One line of the report; ``ok`` is False and ``error`` says why where it does not compile."""
    types, names = build.types(), build.kernel.arg_names
    aligned = [i for i, name in enumerate(names) if types[name].startswith("*") or name == "n_width" or name.startswith("stride_")]
    source = ASTSource(
        build.kernel,
        types,
        constexprs={(names.index(name),): value for name, value in build.constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    line: dict[str, Any] = {"kernel": build.kernel.__name__, "config": build.config, "target": target, "ok": False}
    line |= {"registers": None, "spills": None, "shared_bytes": None, "wgmma": None}
    try:
        options = {"num_warps": build.num_warps, "num_stages": build.num_stages}
        built = triton.compile(source, target=TARGETS[target], options=options)
    except Exception as error:  # whatever the compiler says belongs into the report
        return line | {"error": str(error).splitlines()[0][:200] if str(error) else type(error).__name__}
    line |= {"ok": True, "shared_bytes": built.metadata.shared}
    if "cubin" in built.asm:
        line |= {"wgmma": "wgmma" in built.asm["ptx"]} | _resources(built.asm["cubin"])
    return line


def _resources(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found, f"cuobjdump printed no resource usage: {text!r}"
    return {"registers": int(found[1]), "spills": int(found[2])}


def report() -> list[dict[str, Any]]:
    """All lines, architecture by architecture. Raises RuntimeError in the interpreter, which compiles nothing."""
    if INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET=1 is set: interpreted kernels cannot be compiled, unset it")
    return [compile_one(build, target) for target in TARGETS for build in builds(target)]


def main() -> int:
    """Print the report; exit code 1 when something did not compile."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print a JSON list and nothing else")
    arguments = parser.parse_args()
    lines = report()
    if arguments.json:
        print(json.dumps(lines))
    else:
        for line in lines:
            print("  ".join(f"{key}={value}" for key, value in line.items() if value is not None))
    return 0 if all(line["ok"] for line in lines) else 1


if __name__ == "__main__":
    sys.exit(main())
