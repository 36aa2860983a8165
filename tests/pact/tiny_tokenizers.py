"""Small tokenizers of the three layouts, trained on the spot: the real ones' splitting, normaliser and added tokens."""

from functools import cache

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
SPECIAL = {
    "qwen": ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>"),
    "smollm2": ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<jupyter_start>"),
    "toybox": ("<|im_start|>", "<|im_end|>", "<|pad|>"),
}
ADDED = {"qwen": (*TAGS, "<|fim_prefix|>"), "smollm2": (), "toybox": TAGS}  # added, but not special
LAYOUTS = tuple(SPECIAL)

# As in Qwen's tokenizer: letters, single digits, punctuation with the line breaks after it, blanks.
QWEN_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CORPUS = (
    "The system calls a tool, reads the result and answers the user. First look at the price, then call again.\n",
    '<tool_call>\n{"name": "lookup", "arguments": {"key": "value", "n": 12}}\n</tool_call>\n'
    '{"name":"lookup","arguments":{}}',
    "<think>\nI need the tool. The answer is 42!\n</think>\n\n"
    "assistant user tool system <tool_response> </tool_response>",
    "。「！」" * 20,  # becomes one token with sentence ends inside
)


@cache
def _vocabulary(layout: str) -> str:
    tokenizer = Tokenizer(BPE())
    if layout == "qwen":
        tokenizer.normalizer = normalizers.NFC()
        split = pre_tokenizers.Split(Regex(QWEN_PIECES), "isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    elif layout == "smollm2":
        digits = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=list(SPECIAL[layout]),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in ADDED[layout]])
    return tokenizer.to_str()


def tiny_tokenizer(layout: str, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """A fresh tokenizer of ``layout``: "qwen", "smollm2" or "toybox", with no training template installed."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_vocabulary(layout)),
        eos_token="<|im_end|>",
        pad_token="<|pad|>" if layout == "toybox" else "<|endoftext|>",
    )
    tokenizer.chat_template = chat_template
    return tokenizer
