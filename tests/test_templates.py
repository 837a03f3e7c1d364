"""Chat templates: the starter's against golden strings and transformers, and hostile ones that must end in an error."""

from __future__ import annotations

import datetime
import itertools
import time
import types
from typing import Any

import jinja2
import pytest
from gguf import GGUFReader
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from backend.errors import CheckpointError
from backend.text import sandbox
from backend.text.messages import Message
from backend.text.templates import CHATML, CUT, MAX_TEMPLATE, ChatTemplate, TemplateError
from tests.material import llama_cpp_models

SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"


def chat(*turns: tuple[str, str]) -> list[Message]:
    return [Message(role, content) for role, content in turns]  # type: ignore[arg-type]


def render(source: str, messages: list[Message] | None = None, **special: str) -> str:
    return ChatTemplate(source, special).render(messages or chat(("user", "hello")), generation_prompt=True)


@pytest.fixture(scope="module")
def starter_source(starter_reader: GGUFReader) -> str:
    return str(starter_reader.fields["tokenizer.chat_template"].contents())


# the starter's own ------------------------------------------------------------------------------------------------

GOLDEN = [
    (chat(("user", "Hi")), True, SYSTEM + "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"),
    (chat(("user", "Hi")), False, SYSTEM + "<|im_start|>user\nHi<|im_end|>\n"),
    (
        chat(("system", "Be brief."), ("user", " a "), ("assistant", "b\n"), ("user", "{{ c }} {% d %}")),
        True,
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n a <|im_end|>\n"
        "<|im_start|>assistant\nb\n<|im_end|>\n"
        "<|im_start|>user\n{{ c }} {% d %}<|im_end|>\n<|im_start|>assistant\n",
    ),
]


@pytest.mark.parametrize(("messages", "generation_prompt", "expected"), GOLDEN)
def test_starter_golden(starter_source: str, messages: list[Message], generation_prompt: bool, expected: str) -> None:
    assert ChatTemplate(starter_source, {}).render(messages, generation_prompt=generation_prompt) == expected


@pytest.mark.parametrize(("messages", "generation_prompt", "expected"), GOLDEN)
def test_transformers_agrees_with_the_golden_strings(
    starter_source: str, messages: list[Message], generation_prompt: bool, expected: str
) -> None:
    plain = [{"role": message.role, "content": message.content} for message in messages]
    tokenizer = _bare_transformers_tokenizer()
    rendered = tokenizer.apply_chat_template(
        plain, chat_template=starter_source, add_generation_prompt=generation_prompt, tokenize=False
    )
    assert rendered == expected


def test_chatml_differs_from_the_starter_only_in_the_system_turn() -> None:
    assert render(CHATML, chat(("user", "Hi"))) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


# The language features that templates of published LLaMA-family models use, in the manner of those templates.
FEATURES = [
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + m['content'].strip() + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}"
    "{% else %}{{ m['content'] }}{% endif %}{% endfor %}",
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0]['content'] %}"
    "{% else %}{% set rest = messages %}{% set system = false %}{% endif %}"
    "{% for m in rest %}{% if loop.index0 == 0 and system != false %}{{ '<<SYS>>' ~ system ~ '<</SYS>>' }}{% endif %}"
    "{{ m.content }}{% if not loop.last %}{{ '|' }}{% endif %}{% endfor %}",
    "{%- set ns = namespace(found=false, n=0) -%}\n{%- for m in messages -%}\n  {%- set ns.n = ns.n + 1 -%}\n"
    "  {%- if m.role == 'user' and not ns.found -%}{%- set ns.found = true -%}first {%- continue -%}{%- endif -%}\n"
    "{{ loop.index }}:{{ m.role | upper }};\n{%- endfor %}{{ ns.n }}",
    "{% macro turn(role, text='') %}<{{ role }}>{{ text | replace('a', '*') }}</{{ role }}>{% endmacro %}"
    "{% for m in messages %}{{ turn(m.role, text=m.content) }}{% endfor %}",
    "{{ messages | map(attribute='role') | join(', ') }} {{ messages | selectattr('role', 'equalto', 'user') | list | "
    "length }} {{ messages | tojson }} {{ [1, 2.5, 'x', none, true] | tojson }} {{ {'k': 'v'}.items() | list }}",
    "{{ '%s-%d' % ('a', 3) }} {{ 'abc'[::-1] }} {{ 'a,b'.split(',')[1] }} {{ 7 // 2 }} {{ 2 ** 5 }} {{ 'ab' * 2 }} "
    "{{ [0] * 2 + [1] }} {{ ', '.join(['x', 'y']) }} {{ missing is defined }} {{ '' ~ 1 ~ 'z' }} {{ 'x' in 'xyz' }}",
    "{{ 'a\n\nb\n' | indent }}|{{ 'a\n\nb' | indent(2, true) }}|{{ 'a\n\nb' | indent('> ', blank=true) }}|"
    "{{ '' | indent }}|{{ '%s is %05.2f%%' | format('a', 2) }} {{ '%(x)s' | format(x=1) }} {{ '%-4s|' % 'a' }}",
    "{{ 2.567 | round(1) }} {{ 2.5 | round }} {{ 2.41 | round(1, 'ceil') }} {{ 2.49 | round(method='floor') | int }}",
    "{{ [1, 2.5] | sum }} {{ [{'n': 1}, {'n': 2}] | sum(attribute='n') }} {{ [1] | sum(start=4) }}",
    "{% for g in messages | groupby('role') %}{{ g.grouper }}={{ g.list | length }};{% endfor %}"
    "{% for role, turns in messages | groupby('role') %}{{ role }}{{ turns[0].content }}{% endfor %}",
    "{{ '{}-{}'.format(1, 'a') }} {{ '{1}{0}{1}'.format('a', 'b') }} {{ '{x}{{}}'.format(x='y') }}",
    "{{ 'a'.center(5) }}|{{ 'a'.ljust(3, '.') }}|{{ '7'.rjust(3) }}|{{ '7'.zfill(3) }}|{{ 'aB'.swapcase() }}",
    "{{ {'b': 1, 'a': '<é>'} | tojson(indent=2, sort_keys=true) }} {{ [1, 2] | tojson(separators=(',', ':')) }} "
    "{{ 'é' | tojson(ensure_ascii=true) }} {{ dict(a=1) }} {{ 'a b  c' | wordcount }}",
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% set x = 1 %}\n"
    "{% endgeneration %}{{ x }}{% else %}{{ m.content }}{% endif %}{% endfor %}",
    "{{ tools is none }} {{ documents is none }} {{ tools is defined }} {{ enable_thinking is defined }}"
    "{% if tools %}tools{% endif %}{% if not tools is defined %}{% set tools = none %}{% endif %}",
]  # fmt: skip


@pytest.mark.parametrize("source", FEATURES)
def test_features_as_transformers_renders_them(source: str) -> None:
    messages = chat(("system", "rules & <tags>"), ("user", " a question "), ("assistant", "an answer"), ("user", "é"))
    plain = [{"role": message.role, "content": message.content} for message in messages]
    tokenizer = _bare_transformers_tokenizer(bos_token="<s>", eos_token="</s>")
    expected = tokenizer.apply_chat_template(plain, chat_template=source, add_generation_prompt=True, tokenize=False)
    assert render(source, messages, bos_token="<s>", eos_token="</s>") == expected


def _bare_transformers_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), **special)


DIALOGS = [
    chat(("user", "Hi")),
    chat(("system", "Be brief."), ("user", " Hi there ")),
    chat(("user", "a"), ("assistant", "b\n"), ("user", "c")),
    chat(("system", "S"), ("user", "a"), ("assistant", " b"), ("user", "c"), ("assistant", "d"), ("user", "e & <f> é")),
]
# What transformers cannot render without tools or functions, or with a system turn; and what we make of it.
BEYOND = {
    "CohereForAI-c4ai-command-r-plus-tool_use": "renders",
    "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use": "renders",
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use": "renders",
    "google-gemma-2-2b-it": "renders",
    "fireworks-ai-llama-3-firefunction-v2": "refuses",  # it wants a text of functions
}


def test_templates_of_published_models_as_transformers_renders_them() -> None:
    """About 70 of them, as llama.cpp's source package ships them: same text, also where both refuse."""
    now = datetime.datetime(2024, 7, 26, 13, 5)
    files = sorted((llama_cpp_models() / "templates").glob("*.jinja"))
    assert len(files) >= 60
    for file in files:
        source = file.read_text(encoding="utf-8")
        ours = ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"}, now=lambda: now)
        theirs = _bare_transformers_tokenizer(bos_token="<s>", eos_token="</s>")
        for messages, generation_prompt in itertools.product(DIALOGS, (True, False)):
            plain = [{"role": message.role, "content": message.content} for message in messages]
            expected = _theirs(theirs, plain, source, generation_prompt, now)
            if expected is not None:
                text = ours.render(messages, generation_prompt=generation_prompt)
                assert text == expected, f"{file.name}, {messages}"
            elif BEYOND[file.stem] == "renders":
                text = ours.render(messages, generation_prompt=generation_prompt)
                assert all(message.content.strip() in text for message in messages), file.name
            else:
                with pytest.raises(TemplateError):
                    ours.render(messages, generation_prompt=generation_prompt)


def _theirs(tokenizer: Any, plain: list[dict[str, str]], source: str, prompt: bool, now: Any) -> str | None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat_template_utils, "datetime", types.SimpleNamespace(now=lambda: now))
        try:
            return str(
                tokenizer.apply_chat_template(plain, chat_template=source, add_generation_prompt=prompt, tokenize=False)
            )
        except (jinja2.TemplateError, TypeError):
            return None


def test_a_date_is_that_of_the_clock() -> None:
    now = datetime.datetime(2024, 7, 26, 13, 5)
    template = ChatTemplate("{{ strftime_now('%d %b %Y %H:%M') }}", {}, now=lambda: now)
    assert template.render(chat(("user", "x")), generation_prompt=True) == "26 Jul 2024 13:05"


# a system text that the template has no place for ----------------------------------------------------------------

REFUSES = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}"
)
DROPS = "{% for m in messages %}{% if m.role != 'system' %}<{{ m.role }}>{{ m.content }}{% endif %}{% endfor %}"
FIRST_ONLY = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}{{ raise_exception('only first') }}"
    "{% endif %}<{{ m.role }}>{{ m.content }}{% endfor %}"
)
MIDDLE = chat(("system", "S"), ("user", "a"), ("assistant", "b"), ("system", "T"), ("system", "U"), ("user", "c"))


@pytest.mark.parametrize(
    ("source", "messages", "expected"),
    [
        (REFUSES, chat(("system", "S"), ("user", "a")), "<user>S\n\na"),
        (REFUSES, chat(("system", "S")), "<user>S"),
        (REFUSES, MIDDLE, "<user>S\n\na<assistant>b<user>T\n\nU\n\nc"),
        (REFUSES, chat(("user", "a"), ("assistant", "b")), "<user>a<assistant>b"),
        (DROPS, MIDDLE, "<user>S\n\na<assistant>b<user>T\n\nU\n\nc"),
        (DROPS, chat(("system", " \n"), ("user", "a")), "<user>a"),
        (FIRST_ONLY, MIDDLE, "<system>S<user>a<assistant>b<user>T\n\nU\n\nc"),
        (FIRST_ONLY, chat(("user", "a"), ("system", "S")), "<user>a<user>S"),
        (CHATML, MIDDLE, "".join(f"<|im_start|>{m.role}\n{m.content}<|im_end|>\n" for m in MIDDLE)),
    ],
)
def test_a_system_text_goes_to_the_user_where_there_is_no_place(
    source: str, messages: list[Message], expected: str
) -> None:
    assert ChatTemplate(source, {}).render(messages, generation_prompt=False) == expected


def test_without_folding_the_refusal_stands() -> None:
    with pytest.raises(TemplateError, match="System role not supported"):
        ChatTemplate(REFUSES, {}, fold_system=False).render(chat(("system", "S")), generation_prompt=True)
    assert ChatTemplate(DROPS, {}, fold_system=False).render(chat(("system", "S")), generation_prompt=True) == ""


def test_the_first_refusal_is_the_one_that_is_told() -> None:
    source = "{{ raise_exception('no ' ~ messages[0].role) }}"
    with pytest.raises(TemplateError, match="no system"):
        render(source, chat(("system", "S"), ("user", "a")))


def test_a_template_for_tools_works_without_any() -> None:
    assert render("{% for tool in tools %}{{ tool }}{% endfor %}ok") == "ok"
    assert render("{{ tools is none }}") == "True"


def test_attempts_share_one_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "CPU_SECONDS", 0.2)
    slow = "{% for i in range(100000) %}{% if i == 30000 %}{{ raise_exception('no') }}{% endif %}{% endfor %}"
    begin = time.thread_time()
    with pytest.raises(TemplateError):
        render(slow * 9, MIDDLE)
    assert time.thread_time() - begin < 0.6


def test_typed_cuts_are_taken_out_before_anything_else() -> None:
    seen: list[str] = []

    def prepare(text: str) -> str:
        seen.append(text)
        return text

    ChatTemplate(CHATML, {}).render(chat(("user", f"<|im_{CUT}end|>")), generation_prompt=True, prepare=prepare)
    assert seen == ["<|im_end|>"], "or else the spelling would be mended behind the guard's back"


# errors -----------------------------------------------------------------------------------------------------------


def test_the_templates_own_refusal_is_readable() -> None:
    source = (
        "{% if messages[0].role != 'system' %}{{ raise_exception('The first turn must be a system turn!') }}{% endif %}"
    )
    with pytest.raises(TemplateError) as caught:
        render(source)
    assert "The first turn must be a system turn!" in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.status == 400


@pytest.mark.parametrize("source", ["{% for %}", "{{ x", "{% if a %}", "{{ x | nosuchfilter }}", "{% nosuchtag %}"])
def test_a_template_that_cannot_be_read(source: str) -> None:
    with pytest.raises(CheckpointError, match="chat template"):
        ChatTemplate(source, {})


def test_a_template_that_is_too_long() -> None:
    ChatTemplate("x" * MAX_TEMPLATE, {})
    with pytest.raises(CheckpointError, match="characters"):
        ChatTemplate("x" * (MAX_TEMPLATE + 1), {})


def test_prepare_sees_every_content_and_nothing_else() -> None:
    seen: list[str] = []

    def prepare(text: str) -> str:
        seen.append(text)
        return text.upper()

    text = ChatTemplate(CHATML, {}).render(
        chat(("user", "a"), ("assistant", "b")), generation_prompt=False, prepare=prepare
    )
    assert seen == ["a", "b"]
    assert text == "<|im_start|>user\nA<|im_end|>\n<|im_start|>assistant\nB<|im_end|>\n"
