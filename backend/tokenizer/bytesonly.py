"""A tokenizer that needs no file: one token for each byte, for models that are only a shape.

The rest of the vocabulary spells numbers in brackets, so that whatever such a model draws can be shown.
"""

from __future__ import annotations

from backend.tokenizer.bytelevel import byte_spellings
from backend.tokenizer.vocabulary import Vocabulary, VocabularyTokenizer

CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
FIRST_BYTE = len(CONTROL)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer(vocab_size: int) -> VocabularyTokenizer:
    """`vocab_size` tokens, at least 259: three control tokens, the bytes, then `[259]`, `[260]` and so on."""
    others = [f"[{token}]" for token in range(FIRST_BYTE + 256, vocab_size)]
    vocabulary = Vocabulary(
        texts=[*CONTROL, *byte_spellings(), *others],
        spelt=[b""] * len(CONTROL) + [bytes([byte]) for byte in range(256)] + [text.encode() for text in others],
        control={text: token for token, text in enumerate(CONTROL)},
        bos_id=0,
        eos_id=2,
        unk_id=None,
        end_ids=frozenset({0, 2}),
        add_bos=False,
        adds_space_prefix=False,
        chat_template=CHAT_TEMPLATE,
        description=f"one token a byte, {vocab_size:,} tokens",
    )
    return VocabularyTokenizer(vocabulary, _encode)


def _encode(text: str, begins: bool) -> list[int]:
    return [FIRST_BYTE + byte for byte in text.encode("utf-8", "replace")]
