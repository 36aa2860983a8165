"""One of two training processes with a vLLM engine, started by test_vllm_engine: weights, rollouts, then a failure."""

import os
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from fake_vllm import STOP, VOCAB, table
from transformers import Qwen3Config

from pact.engines.vllm import VllmOptions, make_engine
from pact.rollout import Sampling

url, folder = sys.argv[1:]
rank = PartialState(cpu=True).process_index
options = VllmOptions(urls=(url,), retry_seconds=0.2)
engine = make_engine(options, Qwen3Config(vocab_size=VOCAB, tie_word_embeddings=False), None, Path(folder))


def gathered(version):
    """Weights whose gathering is work of all processes, as sharded ones are."""
    value = table(version) * (rank == 0)
    torch.distributed.all_reduce(value)
    yield "table", value


for version in range(2):
    engine.update(gathered(version), version)
    session = engine.open([[rank]], stop_id=STOP, sampling=Sampling(), seeds=[rank])
    completion = session.generate({}, {0: 6})[0]
    session.close()
    context = torch.tensor([rank, *completion.ids])
    expected = table(version).log_softmax(-1)[context[:-1], context[1:]]
    torch.testing.assert_close(torch.tensor(completion.logp), expected)
    PartialState().wait_for_everyone()
if rank == 0:
    Path(folder, "vllm").rename(Path(folder, "gone"))
    Path(folder, "vllm").write_text("in the way")
try:
    engine.update(gathered(2), 2)
except RuntimeError as error:
    print(f"rank {rank} of {os.environ['WORLD_SIZE']}: {error}")
torch.distributed.destroy_process_group()
