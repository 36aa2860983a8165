"""One process of the run that test_trl.py compares: a step of PACT in TRL on rollouts that are the same everywhere.

    python -m torch.distributed.run --nproc_per_node 2 trl_worker.py FOLDER

Processes sample with random numbers of their own, so the completions are made up: a function of the place of a rollout
in the batch of all processes.
"""

import os
import sys
from pathlib import Path

import torch
from trl_setup import make_trainer, rows, tokenizer_and_model, weights

from pact.integrations.trl import PactGRPOTrainer
from pact.objective import PactConfig

WORLD, RANK = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", 1), ("RANK", 0)))
ROLLOUTS, GENERATIONS, ITERATIONS = 12, 4, 2


class MadeUp(PactGRPOTrainer):
    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        first = RANK * len(prompt_ids)
        made = []
        for place in range(first, first + len(prompt_ids)):
            draws = torch.Generator().manual_seed(1000 * self.state.global_step + place)
            long = self.state.global_step == 0 and place == 4
            length = 40 if long else int(torch.randint(2, 9, (1,), generator=draws))
            made.append([*torch.randint(20, 300, (length,), generator=draws).tolist(), 150])
        return made, None

    def _micro_batches(self, inputs, batch):
        made = super()._micro_batches(inputs, batch)
        branches = {(*group.head_ids,): group.branch for groups in made for group in groups}
        self.branches = [*getattr(self, "branches", []), list(branches.values())]
        return made


def run(folder):
    tokenizer, model = tokenizer_and_model(folder / f"model_{WORLD}_{RANK}")
    trainer = make_trainer(
        folder / "run",
        PactConfig(anchor_q=0.5, sft_coef=0.5, context_length=160),
        kind=MadeUp,
        model=model,
        tokenizer=tokenizer,
        data=rows(6, without=(2,)),
        per_device_train_batch_size=ROLLOUTS // WORLD // 2,
        gradient_accumulation_steps=2,
        num_generations=GENERATIONS,
        num_iterations=ITERATIONS,
        max_steps=3,
        max_completion_length=64,
        learning_rate=0.5,
        beta=0.2,
        use_bias_correction_kl=False,
        entropy_coef=0.05,
        seed=59,
        logging_steps=3,
    )
    before = weights(trainer)
    trainer.train()
    log = trainer.state.log_history[0]
    result = {"before": before, "after": weights(trainer), "log": log, "branches": trainer.branches}
    torch.save(result, folder / f"{WORLD}_{RANK}.pt")


if __name__ == "__main__":
    run(Path(sys.argv[1]))
