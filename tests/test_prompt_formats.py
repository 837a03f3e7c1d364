"""The prompt formats known by name: their texts byte by byte, the ids that come out of them, their stops, detection.

The expected texts and ids are written out by hand from the formats' own sources (Meta's and Stanford's code, FastChat,
EasyLM's documentation, mistral-common, llama.cpp's tests), never by the templates under test.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from backend import presets
from backend.text.formats import FORMATS, SPECIAL_TAGS_ANSWER, PromptFormat, alpaca_prompt
from backend.text.messages import Message
from backend.text.templates import CUT, TemplateError, cut
from backend.tokenizer.segments import ControlGuard
from tests.material import mistral_data

LLAMA = {"bos_token": "<s>", "eos_token": "</s>"}
PREAMBLE = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
HUMAN = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
USER = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def chat(*contents: str, system: str | None = None) -> list[Message]:
    """User and assistant in turn, the user first."""
    turns = [Message("assistant" if n % 2 else "user", content) for n, content in enumerate(contents)]
    return turns if system is None else [Message("system", system), *turns]


ONE, THREE = chat("Hi"), chat("Hi", "Yes?", "Why?")
SYSTEM_ONE, SYSTEM_THREE = chat("Hi", system="Be brief."), chat("Hi", "Yes?", "Why?", system="Be brief.")


def text_of(
    name: str, messages: list[Message], *, generation_prompt: bool = True, special: Mapping[str, str] = LLAMA
) -> str:
    """As a person reads it: without the places where it is cut."""
    template = FORMATS[name].chat_template(special)
    return template.render(messages, generation_prompt=generation_prompt).replace(CUT, "")


# texts ------------------------------------------------------------------------------------------------------------

H = "<|start_header_id|>{}<|end_header_id|>\n\n{}<|eot_id|>"
H_END = "<|start_header_id|>assistant<|end_header_id|>\n\n"

GOLDEN: list[tuple[str, list[Message], str]] = [
    ("llama-2", ONE, "<s>[INST] Hi [/INST]"),
    ("llama-2", THREE, "<s>[INST] Hi [/INST] Yes? </s><s>[INST] Why? [/INST]"),
    ("llama-2", SYSTEM_ONE, "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST]"),
    (
        "llama-2", SYSTEM_THREE,
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Yes? </s><s>[INST] Why? [/INST]",
    ),
    # Meta's code strips a turn as a whole, so not what is inside of it.
    (
        "llama-2", chat("\n Hi ", " Yes?\n", " Why?\t", system=" Be brief. "),
        "<s>[INST] <<SYS>>\n Be brief. \n<</SYS>>\n\n\n Hi [/INST] Yes? </s><s>[INST] Why? [/INST]",
    ),
    ("llama-3", ONE, "<|begin_of_text|>" + H.format("user", "Hi") + H_END),
    (
        "llama-3", chat(" Hi\n", " Yes?", "Why?", system="\nBe brief. "),
        "<|begin_of_text|>" + H.format("system", "Be brief.") + H.format("user", "Hi") + H.format("assistant", "Yes?")
        + H.format("user", "Why?") + H_END,
    ),
    ("alpaca", ONE, PREAMBLE + "\n\n### Instruction:\nHi\n\n### Response:"),
    (
        "alpaca", THREE,
        PREAMBLE + "\n\n### Instruction:\nHi\n\n### Response:Yes?</s>\n\n### Instruction:\nWhy?\n\n### Response:",
    ),
    ("alpaca", SYSTEM_ONE, "Be brief.\n\n### Instruction:\nHi\n\n### Response:"),
    ("vicuna-v0", ONE, HUMAN + "\n\n### Human: Hi\n### Assistant:"),
    ("vicuna-v0", THREE, HUMAN + "\n\n### Human: Hi\n### Assistant: Yes?\n### Human: Why?\n### Assistant:"),
    ("vicuna-v0", SYSTEM_ONE, "Be brief.\n\n### Human: Hi\n### Assistant:"),
    ("vicuna-v1.1", ONE, USER + " USER: Hi ASSISTANT:"),
    ("vicuna-v1.1", THREE, USER + " USER: Hi ASSISTANT: Yes?</s>USER: Why? ASSISTANT:"),
    ("vicuna-v1.1", SYSTEM_THREE, "Be brief. USER: Hi ASSISTANT: Yes?</s>USER: Why? ASSISTANT:"),
    ("koala", ONE, "BEGINNING OF CONVERSATION: USER: Hi GPT:"),
    ("koala", THREE, "BEGINNING OF CONVERSATION: USER: Hi GPT:Yes?</s>USER: Why? GPT:"),
    ("koala", SYSTEM_ONE, "BEGINNING OF CONVERSATION: USER: Be brief.\n\nHi GPT:"),
    ("chatml", ONE, "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"),
    (
        "chatml", SYSTEM_THREE,
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes?<|im_end|>"
        "\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n",
    ),
    ("mistral", ONE, "<s>[INST] Hi [/INST]"),
    ("mistral", THREE, "<s>[INST] Hi [/INST]Yes?</s> [INST] Why? [/INST]"),
    ("mistral", SYSTEM_THREE, "<s>[INST] Be brief.\n\nHi [/INST]Yes?</s> [INST] Why? [/INST]"),
    ("mistral-v1", THREE, "<s> [INST] Hi [/INST] Yes?</s> [INST] Why? [/INST]"),
    ("mistral-v1", SYSTEM_ONE, "<s> [INST] Be brief.\n\nHi [/INST]"),
    ("mistral-v3", THREE, "<s>[INST] Hi[/INST] Yes?</s>[INST] Why?[/INST]"),
    ("mistral-v3", SYSTEM_ONE, "<s>[INST] Be brief.\n\nHi[/INST]"),
    ("mistral-tekken", THREE, "<s>[INST]Hi[/INST]Yes?</s>[INST]Why?[/INST]"),
    ("mistral-tekken", SYSTEM_ONE, "<s>[INST]Be brief.\n\nHi[/INST]"),
    ("mistral-v7", THREE, "<s>[INST] Hi[/INST] Yes?</s>[INST] Why?[/INST]"),
    (
        "mistral-v7", SYSTEM_THREE,
        "<s>[SYSTEM_PROMPT] Be brief.[/SYSTEM_PROMPT][INST] Hi[/INST] Yes?</s>[INST] Why?[/INST]",
    ),
    (
        "mistral-v7-tekken", SYSTEM_THREE,
        "<s>[SYSTEM_PROMPT]Be brief.[/SYSTEM_PROMPT][INST]Hi[/INST]Yes?</s>[INST]Why?[/INST]",
    ),
    ("zephyr", ONE, "<|user|>\nHi</s>\n<|assistant|>\n"),
    (
        "zephyr", SYSTEM_THREE,
        "<|system|>\nBe brief.</s>\n<|user|>\nHi</s>\n<|assistant|>\nYes?</s>\n<|user|>\nWhy?</s>\n<|assistant|>\n",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "messages", "expected"), GOLDEN)
def test_golden_text(name: str, messages: list[Message], expected: str) -> None:
    special = LLAMA if name != "llama-3" else {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    assert text_of(name, messages, special=special) == expected


def test_every_format_has_a_golden_text() -> None:
    assert {name for name, _, _ in GOLDEN} == set(FORMATS)


# The cache of blocks lives by this.
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("messages", [ONE, THREE, SYSTEM_THREE])
def test_a_longer_chat_begins_with_the_shorter(name: str, messages: list[Message]) -> None:
    shorter = text_of(name, messages)
    assert shorter.startswith(text_of(name, messages, generation_prompt=False))
    longer = text_of(name, [*messages, Message("assistant", "A"), Message("user", "B")])
    assert longer.startswith(shorter), "a reply is put right behind the prompt it was made for"


# Text and expectation of llama.cpp's own tests (tests/test-chat-template.cpp), which leave the begin token out.
LLAMA_CPP = chat(
    "Hello", "Hi there", "Who are you", "   I am an assistant   ", "Another question",
    system="You are a helpful assistant",
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "mistral-v1",
            " [INST] You are a helpful assistant\n\nHello [/INST] Hi there</s> [INST] Who are you [/INST]    I am an "
            "assistant   </s> [INST] Another question [/INST]",
        ),
        (
            "mistral-tekken",
            "[INST]You are a helpful assistant\n\nHello[/INST]Hi there</s>[INST]Who are you[/INST]   I am an assistant "
            "  </s>[INST]Another question[/INST]",
        ),
        (
            "mistral-v7",
            "[SYSTEM_PROMPT] You are a helpful assistant[/SYSTEM_PROMPT][INST] Hello[/INST] Hi there</s>[INST] Who are "
            "you[/INST]    I am an assistant   </s>[INST] Another question[/INST]",
        ),
        (
            "chatml",
            "<|im_start|>system\nYou are a helpful assistant<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>"
            "assistant\nHi there<|im_end|>\n<|im_start|>user\nWho are you<|im_end|>\n<|im_start|>assistant\n   I am an "
            "assistant   <|im_end|>\n<|im_start|>user\nAnother question<|im_end|>\n<|im_start|>assistant\n",
        ),
    ],
)
def test_as_llama_cpp_writes_it(name: str, expected: str) -> None:
    assert text_of(name, LLAMA_CPP, special={"bos_token": "", "eos_token": "</s>"}) == expected


def test_alpaca_with_and_without_an_input() -> None:
    assert alpaca_prompt("Name a colour.") == PREAMBLE + "\n\n### Instruction:\nName a colour.\n\n### Response:"
    assert alpaca_prompt("Name a colour.") == text_of("alpaca", chat("Name a colour."))
    assert alpaca_prompt("Add.", "1 and 2") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n"
        "### Response:"
    )


# Llama 2: Meta's rules ----------------------------------------------------------------------------------------------

BAD_ROLES = {
    "two users": [Message("user", "a"), Message("user", "b")],
    "the assistant first": [Message("assistant", "a"), Message("user", "b")],
    "system later": [Message("user", "a"), Message("system", "s")],
    "system later, then a user": [Message("user", "a"), Message("system", "s"), Message("user", "b")],
    "system twice": [Message("system", "s"), Message("system", "s"), Message("user", "a")],
    "system, then the assistant": [Message("system", "s"), Message("assistant", "a"), Message("user", "b")],
    "system alone": [Message("system", "s")],
    "nobody": [],
}


@pytest.mark.parametrize("messages", BAD_ROLES.values(), ids=BAD_ROLES.keys())
@pytest.mark.parametrize("generation_prompt", [True, False])
def test_llama_2_refuses_other_orders_in_metas_words(messages: list[Message], generation_prompt: bool) -> None:
    with pytest.raises(TemplateError) as caught:
        text_of("llama-2", messages, generation_prompt=generation_prompt)
    assert (
        "model only supports 'system', 'user' and 'assistant' roles, starting with 'system', then 'user' and "
        "alternating (u/a/u/a/u...)" in caught.value.message
    )


def test_llama_2_wants_the_user_to_speak_last() -> None:
    with pytest.raises(TemplateError, match="Last message must be from user, got assistant"):
        text_of("llama-2", chat("a", "b"))
    assert text_of("llama-2", chat("a", "b"), generation_prompt=False) == "<s>[INST] a [/INST] b </s>"


@pytest.mark.parametrize("tag", ["[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"])
@pytest.mark.parametrize("place", range(4))
def test_llama_2_answers_for_the_model_when_a_tag_is_typed(tag: str, place: int) -> None:
    contents = ["s", "u", "a", "u"]
    contents[place] += tag + "x"
    messages = chat(*contents[1:], system=contents[0])
    assert FORMATS["llama-2"].refusal(messages) == SPECIAL_TAGS_ANSWER
    assert SPECIAL_TAGS_ANSWER == "Error: special tags are not allowed as part of the prompt."
    assert FORMATS["mistral"].refusal(messages) is None
    assert FORMATS["llama-2"].refusal(SYSTEM_THREE) is None


@pytest.mark.parametrize("name", sorted(set(FORMATS) - {"llama-2"}))
def test_a_system_message_in_the_middle_is_not_lost(name: str) -> None:
    messages = [Message("user", "a"), Message("assistant", "b"), Message("system", "sss"), Message("user", "c")]
    text = text_of(name, messages)
    assert text.index("sss") > text.index("a")
    assert "sss" in text_of(name, [Message("system", "one"), *messages])


# ids --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["trained here", "Mistral's"])
def pieces(request: pytest.FixtureRequest) -> sentencepiece.SentencePieceProcessor:
    """SentencePiece vocabularies with the settings of LLaMA's, and Mistral's tags as control tokens."""
    if request.param == "Mistral's":
        file = mistral_data() / "mistral_instruct_tokenizer_241114.model.v7"
        return sentencepiece.SentencePieceProcessor(model_file=str(file))
    words = Path(__file__).read_text(encoding="utf-8").splitlines()
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words * 3), model_writer=model, model_type="bpe", vocab_size=700, byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True, minloglevel=2,
        control_symbols=["[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"],
    )  # fmt: skip
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def ids_of(
    form: PromptFormat,
    messages: list[Message],
    pieces: sentencepiece.SentencePieceProcessor,
    control: Mapping[str, int],
) -> list[int]:
    """Text to ids as this program does it: guarded, cut at control tokens and at CUT, each part encoded on its own."""
    guard = ControlGuard(control, [message.content for message in messages])
    template = form.chat_template(LLAMA, control_tokens=control, adds_space=True)
    ids: list[int] = []
    for segment in guard.split(template.render(messages, generation_prompt=True, prepare=guard.guard)):
        if segment.control:
            ids.append(control[segment.text])
        else:
            ids += [token for part in cut(segment.text) for token in pieces.encode(part)]
    return ids if ids[:1] == [control["<s>"]] else [control["<s>"], *ids]


# The dialogs of Meta's example_chat_completion.py, shortened.
DIALOGS = [
    chat("what is the recipe of mayonnaise?"),
    chat("I am going to Paris, what should I see?", "Paris offers:\n1. The Eiffel Tower\n2. The Louvre", "What of 1?"),
    chat("I am going to Paris", system="Always answer with Haiku"),
    chat("How to go from Beijing to NY?", system="Always answer with emojis 😀"),
    chat("Write a brief birthday message to John", system="You are a helpful, honest assistant.\n\nBe safe."),
    chat(" a </s><s> b ", " c ", "d\n", "e", "f", system=" <s> "),
]


@pytest.mark.parametrize("messages", DIALOGS)
def test_ids_of_llama_2_by_metas_formula(messages: list[Message], pieces: sentencepiece.SentencePieceProcessor) -> None:
    contents = [message.content for message in messages]
    if messages[0].role == "system":
        contents = ["<<SYS>>\n" + contents[0] + "\n<</SYS>>\n\n" + contents[1], *contents[2:]]
    expected: list[int] = []
    for prompt, answer in zip(contents[::2], contents[1::2], strict=False):
        expected += [1, *pieces.encode(f"[INST] {prompt.strip()} [/INST] {answer.strip()} "), 2]
    expected += [1, *pieces.encode(f"[INST] {contents[-1].strip()} [/INST]")]
    assert ids_of(FORMATS["llama-2"], messages, pieces, {"<s>": 1, "</s>": 2}) == expected


def test_ids_of_the_other_sentencepiece_formats(pieces: sentencepiece.SentencePieceProcessor) -> None:
    e = pieces.encode
    two = {"<s>": 1, "</s>": 2}
    tags = {name: pieces.piece_to_id(name) for name in ("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")}
    start, end, start_s, end_s = tags.values()
    hi, yes, why = (e(text) for text in ("Hi", "Yes?", "Why?"))
    rows = {
        "alpaca": [1, *e(PREAMBLE + "\n\n### Instruction:\nHi\n\n### Response:Yes?"), 2,
                   *e("\n\n### Instruction:\nWhy?\n\n### Response:")],
        "vicuna-v0": [1, *e(HUMAN + "\n\n### Human: Hi\n### Assistant: Yes?\n### Human: Why?\n### Assistant:")],
        "vicuna-v1.1": [1, *e(USER + " USER: Hi ASSISTANT: Yes?"), 2, *e("USER: Why? ASSISTANT:")],
        "koala": [1, *e("BEGINNING OF CONVERSATION: USER: Hi GPT:"), *yes, 2, *e("USER: Why? GPT:")],
        "mistral": [1, *e("[INST] Hi [/INST]"), *yes, 2, *e("[INST] Why? [/INST]")],
        "mistral-v1": [1, *e("[INST] Hi [/INST] Yes?"), 2, *e("[INST] Why? [/INST]")],
        "zephyr": [1, *e("<|user|>\nHi"), 2, *e("\n<|assistant|>\nYes?"), 2, *e("\n<|user|>\nWhy?"), 2,
                   *e("\n<|assistant|>\n")],
    }  # fmt: skip
    for name, expected in rows.items():
        assert ids_of(FORMATS[name], THREE, pieces, two) == expected, name
    v3 = [1, start, *hi, end, *yes, 2, start, *why, end]
    assert ids_of(FORMATS["mistral-v3"], THREE, pieces, two | tags) == v3
    v7 = [1, start_s, *e("Be brief."), end_s, *v3[1:]]
    assert ids_of(FORMATS["mistral-v7"], SYSTEM_THREE, pieces, two | tags) == v7
    plain = [1, *e("[INST] Hi[/INST] Yes?"), 2, *e("[INST] Why?[/INST]")]
    assert ids_of(FORMATS["mistral-v3"], THREE, pieces, two) == plain, "a vocabulary without the tags"


def test_koalas_answer_is_cut_off_its_prompt(pieces: sentencepiece.SentencePieceProcessor) -> None:
    text = FORMATS["koala"].chat_template(LLAMA).render(THREE, generation_prompt=True)
    assert cut(text) == ["BEGINNING OF CONVERSATION: USER: Hi GPT:", "Yes?</s>USER: Why? GPT:"]
    assert pieces.encode("GPT:Yes?") != pieces.encode("GPT:") + pieces.encode("Yes?"), "or else nothing is tested"


def test_cut() -> None:
    assert cut("") == []
    assert cut("ab") == ["ab"]
    assert cut(f"{CUT}a{CUT}{CUT}b{CUT}") == ["a", "b"]


# what is typed ------------------------------------------------------------------------------------------------------

CONTROL = {
    text: n
    for n, text in enumerate(
        ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
         "<|begin_of_text|>", "<|user|>", "<|assistant|>", "<|system|>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]",
         "[/SYSTEM_PROMPT]"]
    )
}  # fmt: skip
SNIPPETS = [*CONTROL, "<", "|>", "s>", "</", "[", "]", "im_end", CUT, "<|im_" + CUT + "end|>", "### Human:", "USER: ",
            "<<SYS>>", "{{ bos_token }}", "{% endfor %}", "a", " ", "\n"]  # fmt: skip
TYPED = st.lists(st.sampled_from(SNIPPETS), max_size=6).map("".join)


@settings(max_examples=25, deadline=None)
@given(st.lists(TYPED, min_size=4, max_size=4))
@pytest.mark.parametrize("name", FORMATS)
def test_typed_control_tokens_never_change_the_structure(name: str, contents: list[str]) -> None:
    system, first, answer, second = contents
    template = FORMATS[name].chat_template(LLAMA)

    def structure(messages: list[Message]) -> tuple[list[str], int, str]:
        guard = ControlGuard(CONTROL, [message.content for message in messages])
        rendered = template.render(messages, generation_prompt=True, prepare=guard.guard)
        segments = guard.split(rendered)
        return [part.text for part in segments if part.control], rendered.count(CUT), "".join(p.text for p in segments)

    typed = chat(first, answer, second, system=system)
    tokens, cuts, text = structure(typed)
    plain_tokens, plain_cuts, _ = structure(chat("u", "a", "u", system="s"))
    assert (tokens, cuts) == (plain_tokens, plain_cuts)
    assert text == template.render(typed, generation_prompt=True), "what is typed arrives as it was typed"


# the table --------------------------------------------------------------------------------------------------------


def test_which_replies_are_trimmed() -> None:
    """Those whose prompt ends where a space has to follow, not those that end with a line break."""
    for name, form in FORMATS.items():
        ends_with_a_line = text_of(name, ONE).endswith("\n")
        assert form.trims_reply == (not ends_with_a_line and "tekken" not in name), name


def test_presets_know_the_same_names() -> None:
    assert set(presets.PROMPT_FORMATS) == {"auto", *FORMATS}
