"""Which tokens are learnt: answers and completions alone, exactly, however a template is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from galvatron.core.errors import ConfigError, DataError
from galvatron.core.job import DataSection, Job
from galvatron.train.chat import BadConversation, ChatTemplate
from galvatron.train.text import Skipped
from galvatron.train.tokenizer import ByteTokenizer, load_tokenizer
from galvatron.train.tokens import BEGINS, UNLEARNT, ids_of, prepare_tokens

PLAIN = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TAGGED = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</assistant>\n"
    "{% endgeneration %}{% else %}{{ m.content }}</{{ m.role }}>\n{% endif %}{% endfor %}"
)
FORGETS = "{% for m in messages %}{{ m.content if loop.last else '-' }}{% endfor %}"
CHAT = [
    {"role": "user", "content": "wie geht’s?"},
    {"role": "assistant", "content": "gut ü"},
    {"role": "user", "content": "assistant"},
    {"role": "assistant", "content": "ja"},
]
ANSWERS = ["gut ü</assistant>\n", "ja</assistant>\n"]
END = 256


def template(tmp_path: Path, text: str) -> str:
    (tmp_path / "template.jinja").write_text(text)
    return str(tmp_path / "template.jinja")


def render(text: str, messages: list[Any]) -> list[str]:
    rendered, spans = ChatTemplate(ByteTokenizer(text).for_transformers()).render(messages)
    return [rendered[start:stop] for start, stop in spans]


def jsonl(path: Path, records: list[Any]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.mark.parametrize("text", [PLAIN, TAGGED])
def test_answers_are_found_with_tags_and_without(text: str) -> None:
    assert render(text, CHAT) == ANSWERS
    assert render(text, CHAT[:2]) == ANSWERS[:1]
    assert render(text, CHAT[1:]) == ANSWERS  # who is answered first is nobody


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        (CHAT[:1], "has no message of the role 'assistant'"),
        ([*CHAT, "and?"], "must have messages with a role and a content"),
        ([{"content": "x"}], "must have messages with a role and a content"),
    ],
)
def test_what_is_no_conversation_is_said(messages: list[Any], words: str) -> None:
    with pytest.raises(BadConversation, match=words):
        render(PLAIN, messages)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (FORGETS, "answer, message 1, that the chat template renders otherwise within the whole"),
        ("{{ raise_exception('roles must alternate') }}", r"refused by the chat template \(.*roles must alternate"),
        ("{% if %}", "refused by the chat template"),
        ("{% generation %}{% endgeneration %}", "no answer that the chat template marks"),
    ],
)
def test_an_answer_that_cannot_be_told_exactly_is_refused(text: str, words: str) -> None:
    with pytest.raises(BadConversation, match=words):
        render(text, CHAT)


def test_a_tokenizer_without_a_template_needs_one() -> None:
    with pytest.raises(DataError, match=r"no chat template to render conversations by; set data\.chat_template"):
        ChatTemplate(ByteTokenizer().for_transformers())


def learnt(path: Path) -> list[str]:
    """What of each document is learnt, in runs of bytes."""
    tokens = np.load(path)
    documents = np.split(tokens, np.flatnonzero(tokens & BEGINS)[1:])
    shown = [ids_of(np.where(document & UNLEARNT, ord("|"), document)) for document in documents]
    return [bytes(np.where(ids == END, ord("$"), ids).astype(np.uint8)).decode() for ids in shown]


def test_tokens_of_answers_are_learnt_and_no_others(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", [{"messages": CHAT}, {"messages": CHAT[:2]}])
    data = DataSection(source=source, records="conversations", chat_template=template(tmp_path, PLAIN))
    first, second = learnt(prepare_tokens(data, tmp_path, seq_len=200))
    assert [part for part in first.split("|") if part] == ANSWERS
    assert [part for part in second.split("|") if part] == ANSWERS[:1]
    assert len(second.encode()) == len("<user>wie geht’s?</user>\n<assistant>gut ü</assistant>\n".encode())


def test_masks_are_those_of_transformers_where_a_template_marks_answers(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", [{"messages": CHAT}])
    data = DataSection(source=source, records="conversations", chat_template=template(tmp_path, TAGGED))
    tokens = np.load(prepare_tokens(data, tmp_path, seq_len=200))
    theirs = (
        ByteTokenizer(TAGGED)
        .for_transformers()
        .apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    )
    assert ids_of(tokens).tolist() == theirs["input_ids"]
    assert ((tokens & UNLEARNT) == 0).astype(int).tolist() == theirs["assistant_masks"]


def test_what_is_saved_beside_a_model_renders_as_the_run_did(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    load_tokenizer("bytes", template(tmp_path, PLAIN)).for_transformers().save_pretrained(tmp_path / "saved")
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert saved.apply_chat_template(CHAT[:1], tokenize=False, add_generation_prompt=True).endswith("<assistant>")


def test_completions_are_learnt_and_that_they_end(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", [{"q": "1+1=", "a": "2"}, {"q": "", "a": "ü"}])
    data = DataSection(source=source, records="pairs", prompt_field="q", completion_field="a")
    assert learnt(prepare_tokens(data, tmp_path, seq_len=8)) == ["||||2$", "ü$"]


def test_texts_apart_say_where_they_begin(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", [{"text": "ab"}, {"text": "c"}])
    joined, apart = (DataSection(source=source, separate_documents=apart) for apart in (False, True))
    assert np.load(prepare_tokens(joined, tmp_path)).tolist() == [97, 98, END, 99, END]
    assert learnt(prepare_tokens(apart, tmp_path)) == ["ab$", "c$"]


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"messages": "hello"}, r"a\.jsonl:2 has no messages in field 'messages', its lists: none; set data.messages"),
        ({"chat": CHAT}, r"a\.jsonl:2 has no messages in field 'messages', its lists: 'chat'; set data.messages_field"),
        ({"messages": CHAT[:1]}, r"a\.jsonl:2 has no message of the role 'assistant'"),
        ({"messages": CHAT * 3}, r"a\.jsonl:2 has \d+ tokens, of which a row of seq_len=150 has no place for all; rai"),
    ],
)
def test_a_bad_conversation_names_its_line_and_may_be_skipped(tmp_path: Path, record: dict, words: str) -> None:
    source = jsonl(tmp_path / "a.jsonl", [{"messages": CHAT}, record])
    data = DataSection(source=source, records="conversations", chat_template=template(tmp_path, PLAIN))
    with pytest.raises(DataError, match=words + ".* or data.skip_bad_records = true"):
        prepare_tokens(data, tmp_path, seq_len=150)
    skipped = Skipped(allowed=True)
    lenient = data.model_copy(update={"skip_bad_records": True})
    assert len(learnt(prepare_tokens(lenient, tmp_path, seq_len=150, skipped=skipped))) == skipped.count == 1


def test_records_are_not_plain_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match=r"a\.txt is plain text, not records of pairs; give files of \.jsonl"):
        prepare_tokens(DataSection(source=str(tmp_path / "a.txt"), records="pairs"), tmp_path)


def test_a_template_beside_texts_is_refused(tmp_path: Path) -> None:
    job = '[model]\npath = "m"\n[data]\nsource = "t"\nchat_template = "c"\n[train]\n' + "\n".join(
        f"{name} = 1" for name in ("global_batch_size", "seq_len", "num_steps")
    )
    (tmp_path / "job.toml").write_text(job)
    with pytest.raises(ConfigError, match="chat_template renders conversations, not text; set records or remove it"):
        Job.load(tmp_path / "job.toml")


def test_a_word_tokenizer_marks_the_same_characters(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<end>": 2, "?": 3}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    tokenizer.save_pretrained(tmp_path / "words")
    chat = [{"role": "user", "content": "a b a"}, {"role": "assistant", "content": "b b"}]
    source = jsonl(tmp_path / "a.jsonl", [{"messages": chat}])
    data = DataSection(source=source, records="conversations", tokenizer=str(tmp_path / "words"))
    tokens = np.load(prepare_tokens(data, tmp_path, seq_len=8))
    assert ids_of(tokens).tolist() == [0, 1, 0, 1, 1]
    assert ((tokens & UNLEARNT) != 0).tolist() == [True, True, True, False, False]
