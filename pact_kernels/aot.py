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
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pact_kernels.backend import INTERPRETED
from pact_kernels.cotrain_loss import triton as loss
from pact_kernels.linear_logprob import triton as head
from pact_kernels.terms import N_BRANCHES, N_COMPONENTS, N_KINDS
from pact_kernels.tiles import (
    COMBINE_ROWS,
    COTRAIN_ROWS,
    GATHER_COLUMNS,
    HEAD_TILES,
    JOIN_WARPS,
    KEPT_TILE,
    HeadTile,
    TreeTile,
    tree_tiles,
)
from pact_kernels.tree_attention import triton as tree

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
OPERANDS = {"bf16": 2, "fp16": 2, "fp32": 4}
# Element types of pointers; those not named hold float32.
OPERAND_POINTERS = ("p_hidden", "p_weight", "p_bias", "p_kept", "p_out")
INDEX_POINTERS = ("p_target", "p_rows", "p_select", "p_source", "p_order", "p_start")
OTHER_POINTERS = {
    "p_flag": "i32", "p_sums": "fp64", "p_kind": "i64", "p_component": "i64", "p_branch": "i64",
}  # fmt: skip
TREE_POINTERS = dict.fromkeys(
    ("p_end", "p_start", "p_middle", "p_index", "p_tile", "p_begin", "p_stop", "p_slot", "p_split", "p_first"), "*i32"
)
HEAD_DIMS, GROUP = (64, 96, 128, 256), 4
N_SHARES = 4  # of the builds of a target
FLOATS = ("scale", "softcap", "clip_low", "clip_high", "kl_coef", "entropy_coef", "clip_dual")


@dataclass(frozen=True)
class Build:
    """One kernel with its compile-time settings; ``operand`` is the dtype of hidden, weight, bias and dL/du."""

    kernel: Any
    operand: str
    constants: dict[str, int | bool]
    num_warps: int
    num_stages: int
    config: str
    pointers: dict[str, str] = field(default_factory=dict)  # Triton types of pointers; others by the rules above

    def types(self) -> dict[str, str]:
        """Argument name -> Triton type."""
        return {name: self._type(name) for name in self.kernel.arg_names}

    def _type(self, name: str) -> str:
        if name in self.constants:
            return "constexpr"
        if name in self.pointers:
            return self.pointers[name]
        if name in INDEX_POINTERS:
            return "*i64"
        if name in OPERAND_POINTERS:
            return f"*{self.operand}"
        if name.startswith("p_"):
            return f"*{OTHER_POINTERS.get(name, 'fp32')}"
        return "fp32" if name in FLOATS else "i32"


def builds(target: str) -> Iterator[Build]:
    """Every kernel and tile that a call on ``target`` can launch: with no option and with all that go together."""
    for operand, size in OPERANDS.items():
        tile = HEAD_TILES[target][size]
        options = dict.fromkeys(("HAS_BIAS", "HAS_SOFTCAP", "HAS_SCALE", "ENTROPY"), True)
        none = dict.fromkeys(options, False)
        for config, flags in (
            ("plain", none | {"EVEN_H": True}),
            ("entropy", none | {"ENTROPY": True, "EVEN_H": True}),
            ("softcap", none | {"HAS_SOFTCAP": True, "EVEN_H": True}),
            ("softcap_entropy", none | {"HAS_SOFTCAP": True, "ENTROPY": True, "EVEN_H": True}),
            ("all", options | {"EVEN_H": False}),
        ):
            yield _head(head.head_forward_kernel, operand, tile, flags | {"KEEP": False}, config)
            yield _head(head.head_dlogits_kernel, operand, tile.backward(flags["HAS_SOFTCAP"]), flags, config)
            if config.startswith("softcap"):
                continue  # never kept
            kept = flags | {"HAS_SOFTCAP": False, "KEEP": True}
            yield _head(head.head_forward_kernel, operand, tile, kept, f"keep_{config}")
            yield _kept(operand, tile, flags, config)
    for flag in (False, True):
        combine = {"HAS_SCALE": flag, "ENTROPY": flag, "BLOCK_N": COMBINE_ROWS}
        yield Build(head.head_combine_kernel, "fp32", combine, 4, 3, f"n{COMBINE_ROWS}_{'all' if flag else 'plain'}")
        yield from (_loss(sums, flag) for sums in (False, True))
    for operand, size in OPERANDS.items():
        for width in HEAD_DIMS:
            yield from _tree(target, operand, size, width)
    for out in OPERANDS:
        yield Build(head.gather_sum_kernel, out, {"BLOCK_H": GATHER_COLUMNS}, 4, 3, f"{out}_h{GATHER_COLUMNS}")


def _head(kernel: Any, operand: str, tile: HeadTile, flags: dict[str, bool], config: str) -> Build:
    blocks = {"BLOCK_N": tile.block_n, "BLOCK_V": tile.block_v, "BLOCK_H": tile.block_h, "UPCAST": False}
    return Build(kernel, operand, flags | blocks, tile.num_warps, tile.num_stages, f"{operand}_{tile.name}_{config}")


def _kept(operand: str, tile: HeadTile, flags: dict[str, bool], config: str) -> Build:
    rows, warps = KEPT_TILE
    constants = {name: flags[name] for name in ("HAS_SCALE", "ENTROPY")} | {"BLOCK_N": rows, "BLOCK_V": tile.block_v}
    name = f"{operand}_n{rows}_v{tile.block_v}_w{warps}_{config}"
    return Build(head.head_kept_dlogits_kernel, operand, constants, warps, 3, name)


def _loss(sums: bool, optional: bool) -> Build:
    flags = ("HAS_ENTROPY", "HAS_OLD", "HAS_REF", "HAS_COMPONENT", "HAS_BRANCH")
    sizes = {"N_BRANCHES": N_BRANCHES, "N_COMPONENTS": N_COMPONENTS, "CELLS": N_KINDS * N_BRANCHES * N_COMPONENTS}
    constants = dict.fromkeys(flags, optional) | {"SUMS": sums, "BLOCK_N": COTRAIN_ROWS} | sizes
    name = f"n{COTRAIN_ROWS}_{'sums' if sums else 'derivatives'}_{'all' if optional else 'plain'}"
    return Build(loss.cotrain_rows_kernel, "fp32", constants, 4, 3, name)


def _tree(target: str, operand: str, size: int, width: int) -> Iterator[Build]:
    """Tree attention with heads of ``width`` channels."""
    tiles = tree_tiles(target, size, width)
    shape = {"D": width, "BLOCK_D": triton.next_power_of_2(width)}
    names = ("p_q", "p_k", "p_v", "p_out", "p_dout", "p_dq", "p_dk", "p_dv")
    pointers = dict.fromkeys(names, f"*{operand}") | TREE_POINTERS

    def build(kernel: Any, tile: TreeTile, constants: dict[str, int | bool], warps: int, stages: int) -> Build:
        config = f"{operand}_d{width}_{tile.name}"
        return Build(kernel, operand, shape | constants, warps, stages, config, pointers)

    for kernel, tile in (
        (tree.tree_forward_kernel, tiles.forward),
        (tree.tree_dq_kernel, tiles.dq),
        (tree.tree_dkv_kernel, tiles.dkv),
    ):
        blocks = {"GROUP": GROUP, "BLOCK_Q": tile.block_q, "BLOCK_K": tile.block_k, "UPCAST": False}
        yield build(kernel, tile, blocks, tile.num_warps, tile.num_stages)
    yield build(tree.tree_delta_kernel, tiles.dq, {"BLOCK_Q": tiles.dq.block_q}, 4, 3)
    yield build(tree.tree_join_kernel, tiles.dkv, {"BLOCK_K": tiles.dkv.block_k}, JOIN_WARPS, 3)


def compile_one(build: Build, target: str) -> dict[str, Any]:
    """One line of the report; ``ok`` is False and ``error`` says why where it does not compile."""
    types, names = build.types(), build.kernel.arg_names
    # As launched: pointers and strides are multiples of 16 (launch.py copies operands that are not), an even width too.
    multiples = ("p_", "stride_", "n_width") if build.constants.get("EVEN_H", True) else ("p_", "stride_")
    aligned = [i for i, name in enumerate(names) if name.startswith(multiples)]
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
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        return [line for lines in pool.map(_report_share, *_shares()) for line in lines]


def _shares() -> tuple[list[str], list[int]]:
    """Arguments of ``_report_share``: a target and every how manieth of its builds, a few for each process."""
    pairs = [(target, share) for target in TARGETS for share in range(N_SHARES)]
    return [target for target, _ in pairs], [share for _, share in pairs]


def _report_share(target: str, share: int) -> list[dict[str, Any]]:
    """Kernels do not travel between processes, so each makes its own list."""
    return [compile_one(build, target) for build in list(builds(target))[share::N_SHARES]]


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
