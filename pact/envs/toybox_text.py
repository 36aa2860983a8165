"""The toybox tokenizer: a small byte-level BPE made from toybox text, with the toybox chat template.

It knows nothing of tasks or tools beyond the text it is trained on.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 1024
CONTROL = ("<|pad|>", "<|im_start|>", "<|im_end|>")
MARKUP = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")

# What may become one token: the skeleton of the JSON around a key; a name, always without its spaces, so that it is the
# same ids wherever it stands (a small model can then copy it); one digit; a word with its spaces; a run of signs.
_KEYS = "type|function|name|description|parameters|properties|required|arguments"
PIECES = rf'[{{}}\[\], "]*"(?:{_KEYS})": ?[{{\["]*|[A-Z][a-z]+|[A-Z]|\d| ?[a-z_]+ ?|\n|[^A-Za-z\d\n]+'


def train_bpe(texts: list[str]) -> Tokenizer:
    """Byte-level BPE over ``texts``: deterministic, and every string can be encoded."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(MARKUP),
        min_frequency=100,  # below this come pairs of syllables, which would make the spelling of a name ambiguous
        special_tokens=list(CONTROL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in MARKUP])
    return tokenizer


@lru_cache(maxsize=1)
def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of every toybox run, trained on 2,000 fixed tasks of all shapes (about a second)."""
    from transformers import PreTrainedTokenizerFast

    from pact.envs.toybox import Toybox
    from pact.trace import load_template, plain_trace

    texts: list[str] = []
    for task in Toybox(train=2000, seed=1, hops=(1, 3), flaky=0.1).tasks("train"):
        ...
    return PreTrainedTokenizerFast(tokenizer_object=train_bpe(texts), eos_token="<|im_end|>", pad_token="<|pad|>")
