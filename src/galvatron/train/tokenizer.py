"""Text to token ids: a Hugging Face tokenizer, or bytes with an end-of-text token."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from galvatron.core.errors import DataError
from galvatron.core.parsing import read_text

BYTES = "bytes"
END_OF_TEXT = "<|endoftext|>"  # GPT-2's name for it


class Tokenizer(Protocol):
    """Ids are below ``vocab_size``; ``end_of_text`` closes every document."""

    @property
    def vocab_size(self) -> int: ...  # noqa: D102
    @property
    def end_of_text(self) -> int: ...  # noqa: D102
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:  # noqa: D102
        ...
    def encode_with_places(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:  # noqa: D102
        ...
    def decode(self, ids: Sequence[int]) -> str: ...  # noqa: D102
    def for_transformers(self) -> Any: ...  # noqa: D102


class ByteTokenizer:
    """UTF-8 bytes are ids 0 to 255; 256 is end-of-text."""

    vocab_size = 257
    end_of_text = 256

    def __init__(self, chat_template: str | None = None) -> None:
        self._chat_template = chat_template

    def encode(self, text: str) -> np.ndarray:
        """The ids of ``text``: uint8 [number of UTF-8 bytes]."""
        return np.frombuffer(text.encode("utf-8", errors="replace"), dtype=np.uint8)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """``encode`` of each text."""
        return [self.encode(text) for text in texts]

    def encode_with_places(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """The ids of each text, and the characters each is of: [number of bytes, 2], from and before."""
        found = []
        for text in texts:
            character = np.repeat(np.arange(len(text)), [len(letter.encode()) for letter in text])
            found.append((self.encode(text), np.stack([character, character + 1], axis=1)))
        return found

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``: end-of-text vanishes, bytes that are no UTF-8 become U+FFFD."""
        values = np.asarray(ids, dtype=np.int64).reshape(-1)
        return values[values < 256].astype(np.uint8).tobytes().decode("utf-8", errors="replace")

    def for_transformers(self) -> Any:
        """The same ids as a tokenizer of ``transformers``, to save beside a model."""
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        # byte-pair encoding without pairs: every byte, in GPT-2's printable alphabet, is a token
        vocabulary = {character: byte for byte, character in enumerate(_printable_bytes())}
        backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        return PreTrainedTokenizerFast(
            tokenizer_object=backend,
            eos_token=END_OF_TEXT,  # added to the vocabulary: 256
            pad_token=END_OF_TEXT,
            split_special_tokens=True,  # a text that spells it is text
            chat_template=self._chat_template,
            clean_up_tokenization_spaces=False,
        )


def _printable_bytes() -> list[str]:
    """The character that stands for each byte in byte-level vocabularies (``bytes_to_unicode`` of GPT-2's encoder)."""
    own = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    moved = iter(range(256, 512))
    return [chr(byte if byte in own else next(moved)) for byte in range(256)]


class HuggingFaceTokenizer:
    """A tokenizer of ``transformers``, without its own special tokens around each text."""

    def __init__(self, tokenizer: Any, name: str) -> None:
        self.tokenizer, self.name = tokenizer, name
        self.vocab_size = len(tokenizer)
        ends = [i for i in (tokenizer.eos_token_id, tokenizer.sep_token_id) if i is not None]
        if not ends:
            raise DataError(f"tokenizer {name} has neither an eos nor a sep token to close documents; add one to it")
        self.end_of_text = int(ends[0])

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text: int64 [number of tokens]."""
        encoded = self.tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
        return [np.asarray(ids, dtype=np.int64) for ids in encoded["input_ids"]]

    def encode_with_places(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """The ids of each text, and the characters each is of: [number of tokens, 2], from and before.

        Raises:
            DataError: the tokenizer is a slow one, which does not tell.
        """
        if not self.tokenizer.is_fast:
            raise DataError(
                f"tokenizer {self.name} does not tell which characters a token is of, as learning answers alone needs; "
                "give a fast one (with a tokenizer.json)"
            )
        encoded = self.tokenizer(
            list(texts),
            add_special_tokens=False,
            return_attention_mask=False,
            return_offsets_mapping=True,
            verbose=False,
        )
        found = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        return [(np.asarray(ids, np.int64), np.asarray(places, np.int64).reshape(-1, 2)) for ids, places in found]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids`` without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def for_transformers(self) -> Any:
        """The tokenizer of ``transformers`` itself."""
        return self.tokenizer


def load_tokenizer(name: str, chat_template: str | None = None) -> Tokenizer:
    """``bytes``, or the Hugging Face tokenizer of a local directory or hub name.

    With the Jinja file ``chat_template`` in place of its own template, if it is given.  Raises DataError.
    """
    template = None if chat_template is None else read_text(chat_template, DataError)
    if name == BYTES:
        return ByteTokenizer(template)
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # the library raises many kinds; each means that there is no such tokenizer
        kind = "directory" if Path(name).exists() else "hub name"
        reason = str(error).split("\n", 1)[0]
        raise DataError(
            f"data.tokenizer={name!r} is no {kind} of a Hugging Face tokenizer ({type(error).__name__}: {reason}); "
            f"give one that loads, or {BYTES!r}"
        ) from None
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # what transformers makes of a directory with a config alone
        raise DataError(
            f"data.tokenizer={name!r} has no words, only {len(tokenizer)} special tokens; give a directory with the "
            f"tokenizer's files, or {BYTES!r}"
        )
    if template is not None:
        tokenizer.chat_template = template
    return HuggingFaceTokenizer(tokenizer, name)
