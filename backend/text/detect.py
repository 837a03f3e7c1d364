"""Which prompt format a model was made for: told from its own template, else its control tokens, else its name.

A template that comes with the model is always what is rendered; recognising it gives it a name to show, and the tokens
and texts that end a reply. A model of which nothing is known gets no format: it continues text and does not chat.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from backend.text.formats import FORMATS, PromptFormat

# What a name must hold, and must not: names in small letters, everything between letters, digits and points a dash.
_NAMES = (
    (r"vicuna.*v-?0(?!\.?\d)", "vicuna-v0"),  # v0 and no other: v0.1 would be something else
    (r"vicuna", "vicuna-v1.1"),
    (r"koala", "koala"),
    (r"zephyr|tiny-?llama.*chat", "zephyr"),
    (r"code-?llama(?!.*70b).*instruct", "llama-2"),  # the 70B one has a format of its own
    (r"llama-?2.*chat|(?<!tiny)llama-?v2.*chat", "llama-2"),
    (r"mi[sx]tral.*instruct", "mistral"),
    (r"alpaca(?!-2\b)", "alpaca"),  # (Chinese) Alpaca 2 is a Llama 2
)
# A template of which nothing else is known ends its turns with one of these, where it holds one.
_COMMON_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|endoftext|>")


def detect_format(
    template: str | None, tokens: Mapping[str, int], name: str = "", *, adds_space: bool = False
) -> PromptFormat | None:
    """The format of a model, or None for one that shows no sign of having been taught to chat.

    `template` is the one that came with it (or a file that a preset names); `tokens` are the spellings of its control
    tokens with their ids; `name` is what it or its file or folder is called; `adds_space` is true of a SentencePiece
    vocabulary, which puts a space before every text that it encodes.
    """
    if template:
        return _own(template)
    if "<|im_start|>" in tokens:
        return FORMATS["chatml"]
    if "<|start_header_id|>" in tokens:
        return FORMATS["llama-3"]
    found = _by_name(name)
    if found == "mistral" and "[INST]" in tokens:  # in the vocabulary of base models, too: the name has to say it
        if "[SYSTEM_PROMPT]" in tokens:
            found = "mistral-v7" if adds_space else "mistral-v7-tekken"
        else:
            found = "mistral-v3" if adds_space else "mistral-tekken"
    return FORMATS[found] if found else None


def _own(template: str) -> PromptFormat:
    known = _by_template(template)
    if known is None:
        ends = tuple(token for token in _COMMON_ENDS if token in template)
        return PromptFormat("own", template, ends, built_in=False)
    return replace(FORMATS[known], template=template, special_tags=(), fold_system=True, built_in=False)


def _by_template(template: str) -> str | None:
    def holds(*words: str) -> bool:
        return all(word in template for word in words)

    if holds("<|im_start|>"):
        # Phi 4 and SmolVLM write the token but end their turns in other ways.
        return None if holds("<|im_sep|>") or holds("<end_of_utterance>") else "chatml"
    if holds("[INST]"):
        return "llama-2" if holds("<<SYS>>") else _mistral(template)
    if holds("<|start_header_id|>"):
        return "llama-3"
    if holds("<|user|>", "<|endoftext|>") or re.search(r"<\|user\|>.{0,60}eos_token", template, re.DOTALL):
        return "zephyr"
    if holds("BEGINNING OF CONVERSATION", "GPT:"):
        return "koala"
    if holds("USER: ", "ASSISTANT: ") or holds("USER: ", "ASSISTANT:", "eos_token"):
        return "vicuna-v1.1"
    if holds("### Human:"):
        return "vicuna-v0"
    return "alpaca" if holds("### Instruction:", "### Response:") and not holds("<|EOT|>") else None


def _mistral(template: str) -> str:
    spaced = not re.search(r"""\[INST\](?! )["']""", template)  # the tag and then the text, or a space between
    if "[SYSTEM_PROMPT]" in template:
        return "mistral-v7" if spaced else "mistral-v7-tekken"
    if "[AVAILABLE_TOOLS]" in template:
        return "mistral-v3" if spaced else "mistral-tekken"
    return "mistral-v1" if "' [INST] ' + system_message" in template else "mistral"


def _by_name(name: str) -> str | None:
    plain = re.sub(r"[^a-z0-9.]+", "-", name.lower())
    return next((form for pattern, form in _NAMES if re.search(pattern, plain)), None)
