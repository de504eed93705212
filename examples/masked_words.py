"""BERT learns the words that are hidden from it, on Python's language reference: `python examples/masked_words.py`.

Makes a tokenizer of words, then runs `galvatron run examples/masked_words.toml`; the exported model fills gaps.
"""

import os
import pydoc_data.topics
import subprocess
import sys
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, pipeline

HERE, RUN, TOKENIZER = Path(__file__).resolve().parent, Path("runs/masked_words"), Path("runs/words")
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
TEXTS = (
    "if the value is not found, an exception is [MASK], and the name of the module is not the same as the class",
    "if the object does not have this attribute, the default value [MASK] used, and the method is not defined",
    "changed in version 3. 8 : the value of the [MASK] is evaluated from left to right",
)


def prepare(size: int = 1000) -> None:
    """A tokenizer of pieces of words, as BERT has one, for ``from_pretrained``."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    texts = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    ends = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    named = {f"{token.strip('[]').lower()}_token": token for token in SPECIAL}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(TOKENIZER)


def main(*options: str) -> None:
    """Train and export; ``options`` are those of ``galvatron run``."""
    if not TOKENIZER.exists():  # another one would have other pieces, and a run goes on with its own
        prepare()
    galvatron = [sys.executable, "-m", "galvatron"]
    subprocess.run([*galvatron, "run", str(HERE / "masked_words.toml"), *options], check=True)
    if not (RUN / "exported").exists():
        subprocess.run([*galvatron, "convert", "to-hf", str(RUN), str(RUN / "exported")], check=True)

    found = pipeline("fill-mask", model=str(RUN / "exported"), top_k=3)(list(TEXTS))
    for text, guesses in zip(TEXTS, found, strict=True):
        print(f"{text}\n  " + ", ".join(f"{guess['token_str']} {guess['score']:.0%}" for guess in guesses))


if __name__ == "__main__":
    os.chdir(HERE.parent)  # the job file's paths are relative to it
    main(*sys.argv[1:])
