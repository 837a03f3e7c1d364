"""Chat templates: the starter's against golden strings and transformers, and hostile ones that must end in an error."""

from __future__ import annotations

import time

import pytest
from gguf import GGUFReader
from transformers import PreTrainedTokenizerFast

from backend.errors import CheckpointError, UserError
from backend.text import sandbox
from backend.text.messages import Message
from backend.text.templates import CHATML, MAX_TEMPLATE, ChatTemplate, TemplateError

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
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}",
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


# what a template may not do ---------------------------------------------------------------------------------------

HOSTILE = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__ }}",
    "{{ messages[0]['content'].__class__ }}",
    "{{ ''['__class__'] }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ joiner.__init__.__globals__ }}",
    "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ raise_exception.__code__.co_consts }}",
    "{{ strftime_now.__globals__ }}",
    "{{ range.__class__ }}",
    "{{ ''|attr('__class__') }}",
    "{{ messages|map('attr', '__class__')|list }}",
    "{{ messages|map(attribute='__class__')|map(attribute='__mro__')|list }}",
    "{{ [messages]|join(attribute='__class__.__base__') }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(range) }}",
    "{{ '{0.__class__}'['format'](range) }}",
    "{{ ['{0.__class__}']|map('format', range)|list }}",
    "{{ '%s'|format(range.__class__) }}",
    "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context.environment }}",
    "{{ loop.__class__ }}{% for x in messages %}{{ loop._iterable.__class__ }}{% endfor %}",
    "{% set x = messages.append({'role': 'user'}) %}",
    "{% set x = messages[0].update({'role': 'system'}) %}",
    "{% set x = messages.pop() %}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{% extends 'x' %}",
    "{{ open('/etc/passwd') }}",
    "{{ config }}{{ request.application.__globals__ }}",
    "{% macro m() %}{% endmacro %}{{ m.__init__.__globals__ }}{{ m._func.__globals__ }}",
]  # fmt: skip


@pytest.mark.parametrize("source", HOSTILE)
def test_nothing_of_python_is_in_reach(source: str) -> None:
    messages = chat(("user", "hello"))
    try:
        text = render(source, messages)
    except UserError as error:
        assert "chat template" in error.message
    else:  # Jinja may answer an unsafe attribute with nothing at all; it must then really be nothing
        assert text == ""
    assert messages == chat(("user", "hello"))


ENDLESS = {
    "a long text": "{{ 'a' * 10**9 }}",
    "the other way round": "{{ 10**9 * 'a' }}",
    "a long list": "{{ ([1] * 10**9) | length }}",
    "nested loops": "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "loops that only filter": "{% for i in range(9999) %}{% for j in range(100000) if false %}{% endfor %}{% endfor %}",
    "a large range": "{% for i in range(10**9) %}{% endfor %}",
    "much output": "{% for i in range(100000) %}{{ 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaa' }}{% endfor %}",
    "a large power": "{{ 10 ** (10 ** 9) }}",
    "squares": "{% set n = namespace(x=3) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "doubling by +": "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "doubling by ~": "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "doubling by set": "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set y %}{{ n.x }}{{ n.x }}{% endset %}"
    "{% set n.x = y %}{% endfor %}",
    "lists in lists": "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}"
    "{{ n.x }}",
    "pairs in pairs": "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = (n.x, n.x) %}{% endfor %}"
    "{{ n.x == n.x }}",
    "maps in maps": "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = {'a': n.x, 'b': n.x} %}"
    "{% endfor %}{{ n.x | tojson }}",
    "arguments in arguments": "{% set n = namespace(x='a') %}{% macro f() %}{% set n.x = varargs %}{% endmacro %}"
    "{% for i in range(60) %}{{ f(n.x, n.x) }}{% endfor %}{{ n.x }}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "a macro for ever": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "center": "{{ 'a'.center(1000000000) }}",
    "zfill": "{{ 'a'.zfill(1000000000) }}",
    "expandtabs": "{{ '\t'.expandtabs(1000000000) }}",
    "a wide format": "{{ '{:>1000000000}'.format('a') }}",
    "a wide %": "{{ '%1000000000d' % 1 }}",
    "a width from outside": "{{ '%*d' % (1000000000, 1) }}",
    "bytes": "{{ (1).to_bytes(1000000000, 'big') }}",
    "replace": "{% set s = 'a' * 100000 %}{{ s.replace('a', s) }}",
    "the filter replace": "{% set s = 'a' * 100000 %}{{ s | replace('a', s) }}",
    "join": "{% set s = 'a' * 100000 %}{{ s.join(s) }}",
    "the filter join": "{% set s = 'a' * 100000 %}{{ s | join(s) }}",
    "tests over lists": "{% set l = range(100000) | list %}{{ l | reject('in', l) | list | length }}",
    "texts by map": "{% set s = '1' * 500000 %}{{ range(100000) | map('replace', '1', s) | list | length }}",
    "a wide indent": "{{ [1] | tojson(indent=1000000000) }}",
    "too much nesting": "{% for i in [1] %}" * 30 + "{% endfor %}" * 30,
    "deep brackets": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
}


@pytest.mark.parametrize("source", ENDLESS.values(), ids=ENDLESS.keys())
def test_too_much_ends_soon_with_an_error(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "CPU_SECONDS", 0.2)
    begin = time.thread_time()
    with pytest.raises(UserError, match="chat template"):
        render(source)
    assert time.thread_time() - begin < 1.2, "no single step may be long"


def test_the_real_limit_is_less_than_two_seconds() -> None:
    begin = time.thread_time()
    with pytest.raises(UserError, match="more than 1 seconds"):
        render(ENDLESS["nested loops"])
    assert 1 <= time.thread_time() - begin < 2


def test_a_long_chat_is_no_abuse() -> None:
    messages = chat(*[("user", "x" * 200)] * 5000)
    turn = "<|im_start|>user\n" + "x" * 200 + "<|im_end|>\n"
    assert render(CHATML, messages) == turn * 5000 + "<|im_start|>assistant\n"


def test_one_rendering_does_not_use_up_the_time_of_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "CPU_SECONDS", 0.2)
    template = ChatTemplate("{% for i in range(n) %}{% for j in range(n) %}{% endfor %}{% endfor %}ok", {"n": 0})  # type: ignore[dict-item]
    template._special["n"] = 100000  # type: ignore[assignment]
    with pytest.raises(TemplateError):
        template.render(chat(("user", "x")), generation_prompt=True)
    template._special["n"] = 2  # type: ignore[assignment]
    assert template.render(chat(("user", "x")), generation_prompt=True) == "ok"


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
