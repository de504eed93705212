"""A tokenizer of a few words, for the examples that have no other."""

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast


def tokenizer_of(words, special: tuple[str, ...], template: str) -> PreTrainedTokenizerFast:
    """A token a word; padding, end and beginning are the first of the ``special`` ones."""
    vocabulary = {word: number for number, word in enumerate((*special, *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = [(word, vocabulary[word]) for word in special[1:3]]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=ends)
    named = dict(zip(("pad_token", "eos_token", "bos_token", "unk_token"), special, strict=False))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)
