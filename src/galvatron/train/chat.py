"""Conversations as text, by a chat template, and which of its characters are answers.

Takes a tokenizer of ``transformers`` and messages; gives what the template makes of them.  Knows nothing of tokens.

A template with ``{% generation %}`` tags marks answers itself.  Of any other, what an answer added to the text is found
by rendering prefixes: up to the answer with the words that ask for it, and up to its end.  Where either is not how the
whole conversation begins (a template that drops earlier thoughts), the mark would not be exact, and it is refused.
"""

from __future__ import annotations

import re
from typing import Any

from galvatron.core.errors import DataError
from galvatron.core.words import shown

_MARKS_ANSWERS = re.compile(r"\{%-?\s*generation\s*-?%\}")  # as transformers looks for it
ANSWERS = "assistant"


class BadConversation(Exception):
    """What is wrong with messages, and what to do about it."""


class ChatTemplate:
    """The Jinja template that ``tokenizer`` (of ``transformers``) has.

    Raises:
        DataError: it has none.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        if not isinstance(tokenizer.chat_template, str):
            raise DataError(
                "the tokenizer has no chat template to render conversations by; set data.chat_template to a Jinja file"
            )
        self._template: str = tokenizer.chat_template
        self._marks_answers = _MARKS_ANSWERS.search(self._template) is not None

    def render(self, messages: list[Any]) -> tuple[str, tuple[tuple[int, int], ...]]:
        """The conversation's text, and from where to before where in it the answers go.

        Raises:
            BadConversation: a message has no role, the template refuses them, no answer is among them, or answers
                cannot be told exactly.
        """
        for message in messages:
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise BadConversation(f"must have messages with a role and a content, got {shown(message)}; mend it")
        if not any(message["role"] == ANSWERS for message in messages):
            raise BadConversation(f"has no message of the role {ANSWERS!r}, so nothing to learn; mend that record")
        spans: tuple[tuple[int, int], ...]
        text, marked = self._rendered(messages, mark=self._marks_answers)
        spans = marked if self._marks_answers else tuple(self._answers(messages, text))
        if not any(start < stop for start, stop in spans):
            raise BadConversation("has no answer that the chat template marks; mend the record or the template")
        return text, spans

    def _answers(self, messages: list[Any], text: str) -> list[tuple[int, int]]:
        found = []
        for index, message in enumerate(messages):
            if message["role"] == ANSWERS:
                before, _ = self._rendered(messages[:index], ask=True)
                until = text if index + 1 == len(messages) else self._rendered(messages[: index + 1])[0]
                if not (text.startswith(until) and until.startswith(before)):
                    raise BadConversation(
                        f"has an answer, message {index}, that the chat template renders otherwise within the whole "
                        "conversation, so it cannot be told apart exactly; give a template with {% generation %} tags"
                    )
                found.append((len(before), len(until)))
        return found

    def _rendered(
        self, messages: list[Any], *, ask: bool = False, mark: bool = False
    ) -> tuple[str, tuple[tuple[int, int], ...]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        if not messages and not ask:
            return "", ()
        try:
            rendered: Any = render_jinja_template(
                [[{name: part for name, part in message.items() if part is not None} for message in messages]],
                chat_template=self._template,
                add_generation_prompt=ask,
                return_assistant_tokens_mask=mark,
                **self._tokenizer.special_tokens_map,
            )
        except Exception as error:  # templates raise what they like
            reason = f"{type(error).__name__}: {error}".split("\n", 1)[0]
            raise BadConversation(f"is refused by the chat template ({reason}); mend it") from None
        texts, spans = rendered
        return texts[0], tuple((start, stop) for start, stop in spans[0]) if mark else ()
