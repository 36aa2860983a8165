"""An adapter on the LM head: its weight is not the layer's weight, so it must be refused, not ignored."""

import peft
import pytest
import torch
from tiny import make_model

from pact.modeling import attach_tree_attention, lm_head, tree_hidden
from pact_kernels import PrefixTree, linear_logprob


def with_lora(targets):
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=targets, init_lora_weights=False)
    return peft.get_peft_model(make_model(dtype=torch.float32), config)


def test_lora_on_the_head_is_refused():
    with pytest.raises(TypeError, match="not a plain linear layer; leave it out of the adapter"):
        lm_head(with_lora(["q_proj", "lm_head"]))


def test_lora_elsewhere_reaches_its_adapters():
    model = with_lora(["q_proj", "v_proj"])
    attach_tree_attention(model)
    tree = PrefixTree.from_sequences([[1, 2, 3, 4], [1, 2, 5]])
    head = lm_head(model)
    hidden = tree_hidden(model, tree)
    linear_logprob(
        hidden, head.weight, torch.zeros(len(tree), dtype=torch.int64), **head.options()
    ).logp.sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert gradients
    assert all("lora" in name and bool((grad != 0).any()) for name, grad in gradients.items())
