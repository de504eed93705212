"""T5 learns to say what is missing, on Python's language reference: `python examples/missing_spans.py`.

Makes a tokenizer with sentinels, then runs `galvatron run examples/missing_spans.toml`; the exported model fills gaps.
"""

import os
import pydoc_data.topics
import subprocess
import sys
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedTokenizerFast

HERE, RUN, TOKENIZER = Path(__file__).resolve().parent, Path("runs/missing_spans"), Path("runs/pieces")
SPECIAL = ["<pad>", "</s>", "<unk>", *(f"<extra_id_{number}>" for number in range(8))]
TEXTS = (
    "if the value is not found , an <extra_id_0> is raised , and the name of the module is not the <extra_id_1>",
    "if the object does not have this attribute , the default value <extra_id_0> , and the method <extra_id_1>",
)


def prepare(size: int = 1000) -> None:
    """A tokenizer of pieces of words, with T5's sentinels, for ``from_pretrained``."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    texts = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    named = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(TOKENIZER)


def main(*options: str) -> None:
    """Train and export; ``options`` are those of ``galvatron run``."""
    if not TOKENIZER.exists():  # another one would have other pieces, and a run goes on with its own
        prepare()
    galvatron = [sys.executable, "-m", "galvatron"]
    subprocess.run([*galvatron, "run", str(HERE / "missing_spans.toml"), *options], check=True)
    if not (RUN / "exported").exists():
        subprocess.run([*galvatron, "convert", "to-hf", str(RUN), str(RUN / "exported")], check=True)

    model, tokenizer = (kind.from_pretrained(RUN / "exported") for kind in (AutoModelForSeq2SeqLM, AutoTokenizer))
    for text in TEXTS:
        said = model.generate(**tokenizer(text, return_tensors="pt", return_token_type_ids=False), max_new_tokens=12)
        print(f"{text}\n  {tokenizer.decode(said[0])}")


if __name__ == "__main__":
    os.chdir(HERE.parent)  # the job file's paths are relative to it
    main(*sys.argv[1:])
