"""The prompt formats that are known by name: how each writes a chat, and what ends a reply in it.

Each is a Jinja template like those that come with models. BOS and EOS are written as the model's own spelling of them,
so that they become control tokens; where a format begins with one BOS and no more, the tokenizer puts it there (as it
does for every prompt) and the template does not.

What the pieces become as ids depends on the vocabulary. One of LLaMA 1 and 2 (SentencePiece) puts a space before
every text that it encodes, so before each piece between two control tokens and after each CUT. With enc(..) for such
an encoding and BOS, EOS for the tokens, of a system text s, messages u and answers a:

- llama-2      BOS enc("[INST] <<SYS>>\\n{s}\\n<</SYS>>\\n\\n{u} [/INST] {a} ") EOS BOS enc("[INST] {u} [/INST]")
- alpaca       BOS enc("{preamble}\\n\\n### Instruction:\\n{u}\\n\\n### Response:{a}") EOS
               enc("\\n\\n### Instruction:\\n{u}\\n\\n### Response:")
- vicuna-v0    BOS enc("{preamble}\\n\\n### Human: {u}\\n### Assistant: {a}\\n### Human: {u}\\n### Assistant:")
- vicuna-v1.1  BOS enc("{preamble} USER: {u} ASSISTANT: {a}") EOS enc("USER: {u} ASSISTANT:")
- koala        BOS enc("BEGINNING OF CONVERSATION: USER: {u} GPT:") enc("{a}") EOS enc("USER: {u} GPT:")
- mistral      BOS enc("[INST] {u} [/INST]") enc("{a}") EOS enc("[INST] {u} [/INST]")
- mistral-v1   BOS enc("[INST] {u} [/INST] {a}") EOS enc("[INST] {u} [/INST]")
- mistral-v3   BOS [INST] enc("{u}") [/INST] enc("{a}") EOS, the tags being control tokens; v7 the same with
               [SYSTEM_PROMPT] enc("{s}") [/SYSTEM_PROMPT] before. Where they are none: enc("[INST] {u}[/INST] {a}")
- zephyr       BOS enc("<|user|>\\n{u}") EOS enc("\\n<|assistant|>\\n{a}") EOS enc("\\n<|user|>\\n{u}"): the space
               before the line break comes from SentencePiece; transformers' older ("legacy") way has it too
- chatml       forced on such a vocabulary all of it is one text, and so is what ends a reply, "<|im_end|>"
- llama-3      the same. With the vocabularies that they were made for, which add no space, the ids of chatml, llama-3
               and the two tekken formats are those of the text as it is written

The texts of Mistral's formats show a space where SentencePiece adds one by itself; `chat_template` leaves those out
for a vocabulary that does, which gives the ids the models were trained with.

Sources: facebookresearch/llama generation.py, stanford_alpaca train.py, FastChat conversation.py, EasyLM's Koala
documentation, llama3 tokenizer.py, llama.cpp llama-chat.cpp, mistral-common, HuggingFaceH4/zephyr's template.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from backend.text import builtin
from backend.text.messages import Message
from backend.text.templates import CHATML, ChatTemplate

SPECIAL_TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")
SPECIAL_TAGS_ANSWER = "Error: special tags are not allowed as part of the prompt."


@dataclass(frozen=True)
class PromptFormat:
    """One way to write a chat as a prompt."""

    name: str
    template: str  # Jinja
    end_tokens: tuple[str, ...] = ()  # spellings of control tokens that end a reply, besides the vocabulary's own EOS
    stops: tuple[str, ...] = ()  # texts that end a reply and are not shown
    trims_reply: bool = False  # a reply begins with a space that belongs to the format, not to the answer
    special_tags: tuple[str, ...] = ()  # a chat with one of these in a message is not given to the model
    fold_system: bool = True  # see ChatTemplate
    built_in: bool = True  # False: the template is the model's own, and only the name and the stops are ours

    def chat_template(
        self,
        special_tokens: Mapping[str, str],
        *,
        control_tokens: Mapping[str, int] | None = None,
        adds_space: bool = False,
        now: Callable[[], datetime.datetime] = datetime.datetime.now,
    ) -> ChatTemplate:
        """Ready to render. `adds_space`: the vocabulary puts a space before every text that it encodes."""
        names = dict(special_tokens)
        if self.built_in:
            tags_are_tokens = "[INST]" in (control_tokens or {})
            names["gap"] = "" if adds_space else " "
            names["tag_gap"] = "" if adds_space and tags_are_tokens else " "
        return ChatTemplate(self.template, names, fold_system=self.fold_system, now=now)

    def refusal(self, messages: Sequence[Message]) -> str | None:
        """What is answered in the model's stead: Meta's rule for Llama 2, whose tags are ordinary text."""
        found = any(tag in message.content for message in messages for tag in self.special_tags)
        return SPECIAL_TAGS_ANSWER if found else None


def stops_for(form: PromptFormat, control_tokens: Mapping[str, int]) -> tuple[frozenset[int], tuple[str, ...]]:
    """The ids and the texts that end a reply in this format, with this vocabulary.

    A token that the format writes but the vocabulary lacks is plain text there, and so its spelling is a stop text.
    """
    ids = frozenset(control_tokens[token] for token in form.end_tokens if token in control_tokens)
    spelt = tuple(token for token in form.end_tokens if token not in control_tokens and token in form.template)
    return ids, form.stops + spelt


def alpaca_prompt(instruction: str, context: str = "") -> str:
    """One Alpaca prompt; `context` is what the data set calls the input, which a chat has no place for."""
    if not context:
        return f"{builtin.ALPACA_PREAMBLE}\n\n### Instruction:\n{instruction}\n\n### Response:"
    return (
        f"{builtin.ALPACA_INPUT_PREAMBLE}\n\n### Instruction:\n{instruction}\n\n### Input:\n{context}\n\n### Response:"
    )


def _named(*formats: PromptFormat) -> Mapping[str, PromptFormat]:
    return MappingProxyType({form.name: form for form in formats})


_CHATML_ENDS = ("<|im_end|>", "<|endoftext|>")
_LLAMA_3_ENDS = ("<|eot_id|>", "<|end_of_text|>", "<|eom_id|>")
_EOS = ("</s>",)

FORMATS: Mapping[str, PromptFormat] = _named(
    PromptFormat("llama-2", builtin.LLAMA_2, _EOS, trims_reply=True, special_tags=SPECIAL_TAGS, fold_system=False),
    PromptFormat("llama-3", builtin.LLAMA_3, _LLAMA_3_ENDS),
    PromptFormat("alpaca", builtin.ALPACA, _EOS, stops=("### Instruction:",), trims_reply=True),
    PromptFormat("vicuna-v0", builtin.VICUNA_V0, _EOS, stops=("###",), trims_reply=True),
    PromptFormat("vicuna-v1.1", builtin.VICUNA, _EOS, trims_reply=True),
    PromptFormat("koala", builtin.KOALA, _EOS, trims_reply=True),
    PromptFormat("chatml", CHATML, _CHATML_ENDS),
    PromptFormat("mistral", builtin.MISTRAL, _EOS, trims_reply=True),
    PromptFormat("mistral-v1", builtin.MISTRAL_V1, _EOS, trims_reply=True),
    PromptFormat("mistral-v3", builtin.MISTRAL_V3, _EOS, trims_reply=True),
    PromptFormat("mistral-tekken", builtin.MISTRAL_TEKKEN, _EOS),
    PromptFormat("mistral-v7", builtin.MISTRAL_V7, _EOS, trims_reply=True),
    PromptFormat("mistral-v7-tekken", builtin.MISTRAL_V7_TEKKEN, _EOS),
    PromptFormat("zephyr", builtin.ZEPHYR, (*_EOS, "<|endoftext|>")),
)
