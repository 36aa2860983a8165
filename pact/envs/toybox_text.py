"""The toybox tokenizer: a small byte-level BPE made from toybox text, with the toybox chat template.

It knows nothing of tasks or tools beyond the text it is trained on.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VOCAB_SIZE = 1536
CORPUS = 300  # tasks in the tokenizer's text
MIN_FREQUENCY = 20  # rarer pieces are not worth a token
CONTROL = ("<|pad|>", "<|im_start|>", "<|im_end|>")
MARKUP = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")

# What may become one token: the skeleton of the JSON around keys; a name, always without its spaces, so that it is
# the same wherever it stands (a small model can then copy it); up to three digits; the side of a source, so that look-
# alike sources differ in one token; a word with its spaces; signs.
_KEYS = "type|function|name|description|parameters|properties|required|arguments"
_SKELETON = rf'(?:[{{}}\[\],":]*(?:{_KEYS})":[{{\["]*(?:object)?)+'
PIECES = _SKELETON + r"|[A-Z][a-z]+|[A-Z]|\d{1,3}|_[a-z]+| ?[a-z]+ ?|\n|[^A-Za-z\d\n]+"


def _train(texts: list[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE over ``texts``: deterministic, and every string can be encoded and decoded."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(MARKUP),
        min_frequency=MIN_FREQUENCY,
        special_tokens=list(CONTROL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in MARKUP])
    return tokenizer


def _wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerBase:
    from transformers import PreTrainedTokenizerFast

    from pact.trace import prepare_tokenizer

    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|pad|>")
    return prepare_tokenizer(fast)


@lru_cache(maxsize=1)
def build_tokenizer() -> PreTrainedTokenizerBase:
    """The tokenizer of every toybox run, trained on fixed tasks of all shapes, rendered as the models will see them."""
    from pact.envs.toybox import NAMES, SIDES, Toybox
    from pact.trace import render_context, render_prompt, render_trace

    spelling = _wrap(_train([], 256 + len(CONTROL) + len(MARKUP)))  # one token a byte: ids that decode to the text
    atoms = [name for names in NAMES.values() for name in names] + [str(number) for number in range(100)]
    atoms += [f"_{side}" for side in SIDES]
    texts = atoms * MIN_FREQUENCY  # so that each becomes one token
    for task in Toybox(train=CORPUS, seed=1, hops=(1, 3), flaky=0.1).tasks("train"):
        assert task.expert is not None
        head, suffix = render_prompt(task.messages, task.tools, spelling)
        trace = render_trace(task.expert, task.tools, spelling)
        for ids in (head + suffix + trace.ids, render_context(task.expert, spelling)):
            texts.append(str(spelling.decode(ids)))
    markers = re.compile("|".join(map(re.escape, CONTROL + MARKUP)))
    return _wrap(_train([piece for text in texts for piece in markers.split(text) if piece], VOCAB_SIZE))
