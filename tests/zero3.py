"""DeepSpeed ZeRO-3 on two CPU processes (gloo) against one plain process; writes benchmarks/results/zero3_cpu.json.

make zero3    # its own environment: DeepSpeed is no dependency of this project
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch

HERE = Path(__file__).parent
RESULT = HERE.parent / "benchmarks" / "results" / "zero3_cpu.json"
TOLERANCE = 1e-5


def launch(folder: Path, strategy: str, processes: int) -> dict:
    """What the first process of the worker wrote, by scenario."""
    folder.mkdir()
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    worker = [str(HERE / "pact" / "distributed_worker.py"), strategy, str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    subprocess.run([sys.executable, *(several if processes > 1 else []), *worker], check=True, env=environment)
    return torch.load(folder / f"{strategy}_{processes}_0.pt", weights_only=True)


def main() -> int:
    with tempfile.TemporaryDirectory() as temporary:
        one = launch(Path(temporary) / "one", "ddp", 1)
        two = launch(Path(temporary) / "two", "zero3", 2)
    scenarios = {}
    for name, expected in one.items():
        found = two[name]
        pairs = [(expected["weights"][key], found["weights"][key]) for key in expected["weights"]]
        logs = [(a["loss"], b["loss"]) for a, b in zip(expected["logs"], found["logs"], strict=True) if "loss" in a]
        scenarios[name] = {
            "sharded": all(found["sharded"]),
            "largest_weight_difference": max((a - b).abs().max().item() for a, b in pairs),
            "largest_loss_difference": max(abs(a - b) for a, b in logs),
        }
    passed = all(
        s["sharded"] and max(s["largest_weight_difference"], s["largest_loss_difference"]) < TOLERANCE
        for s in scenarios.values()
    )
    packages = ("torch", "transformers", "accelerate", "deepspeed")
    record = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, no GPU",
        "versions": {name: version(name) for name in packages},
        "tolerance": TOLERANCE,
        "scenarios": scenarios,
        "passed": passed,
    }
    RESULT.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=2))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
