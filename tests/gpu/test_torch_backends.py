"""The torch backends on a CUDA device against their float64 specifications. Needs torch and pytest: `make gpu`."""

import pytest
import torch

from pact_kernels import PrefixTree, TokenTerms, linear_cotrain_loss, linear_logprob, tree_attention
from pact_kernels.cotrain_loss.reference import cotrain_loss_reference
from pact_kernels.linear_logprob.reference import linear_logprob_reference
from pact_kernels.tree_attention.reference import tree_attention_reference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def on_both(*tensors):
    """Leaves in float64 on the CPU, and the same numbers in float32 on the GPU."""
    exact = [t.double().requires_grad_() for t in tensors]
    return exact, [t.detach().float().cuda().requires_grad_() for t in exact]


def assert_close(fast, exact):
    torch.testing.assert_close(fast.double().cpu(), exact, **CLOSE)


def test_tree_attention():
    torch.manual_seed(0)
    tree = PrefixTree.from_sequences([[1, 2, 3, *range(10 + 40 * i, 30 + 41 * i)] for i in range(5)])
    exact, fast = on_both(*(torch.randn(len(tree), heads, 64) for heads in (4, 2, 2)))
    grad = torch.randn(len(tree), 4, 64, dtype=torch.float64)
    reference, out = tree_attention_reference(*exact, tree.subtree_end), tree_attention(*fast, tree.to("cuda"))
    reference.backward(grad)
    out.backward(grad.float().cuda())
    assert_close(out, reference)
    for mine, wanted in zip(fast, exact, strict=True):
        assert_close(mine.grad, wanted.grad)


def test_linear_logprob_and_loss():
    torch.manual_seed(0)
    n, vocabulary = 507, 1001
    exact, fast = on_both(torch.randn(n, 123), torch.randn(vocabulary, 123))
    terms = TokenTerms(
        target=torch.randint(vocabulary, (n,)),
        old_logp=None,
        advantage=torch.randn(n),
        weight=torch.rand(n) / n,
        kind=torch.randint(2, (n,)),
        component=torch.randint(5, (n,)),
    )
    wanted = linear_logprob_reference(*exact, terms.target, entropy=True)
    found = linear_logprob(*fast, terms.target.cuda(), entropy=True)
    assert_close(found.logp, wanted.logp)
    assert_close(found.entropy, wanted.entropy)
    reference = cotrain_loss_reference(wanted.logp, terms, entropy=wanted.entropy, entropy_coef=0.01)
    result = linear_cotrain_loss(*fast, terms.to("cuda"), entropy_coef=0.01)
    reference.loss.backward()
    result.loss.backward()
    assert_close(result.loss, reference.loss)
    for mine, expected in zip(fast, exact, strict=True):
        assert_close(mine.grad, expected.grad)
