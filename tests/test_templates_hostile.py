"""Templates that mean harm, or ask for more than a prompt can need, end in an error, soon and without effect."""

from __future__ import annotations

import time

import pytest

from backend.errors import UserError
from backend.text import sandbox
from backend.text.messages import Message
from backend.text.templates import CHATML, ChatTemplate, TemplateError


def chat(*turns: tuple[str, str]) -> list[Message]:
    return [Message(role, content) for role, content in turns]  # type: ignore[arg-type]


def render(source: str, messages: list[Message] | None = None) -> str:
    return ChatTemplate(source, {}).render(messages or chat(("user", "hello")), generation_prompt=True)


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
    "{{ '{0[__class__]}'.format(messages) }}",
    "{{ '{0.content}'.format(messages[0]) }}",
    "{{ '{0!r:>{1}}'.format('a', 9) }}",
    "{{ '{x.__class__}'.format_map({'x': range}) }}",
    "{% set f = '{0.__class__}'.format %}{{ f(range) }}",
    "{{ (messages|groupby('__class__'))[0].grouper.__mro__ }}",
    "{% for g in messages|groupby('content.__class__') %}{{ g.grouper.__base__ }}{% endfor %}",
    "{{ (messages|groupby('role'))[0].__class__ }}{{ (messages|groupby('role'))[0]._replace }}",
    "{{ messages|sum(attribute='__class__') }}",
    "{{ dict.__subclasses__() }}{{ dict.mro() }}",
    "{{ dict.fromkeys }}{{ dict.fromkeys(range(9)) }}",
    "{% generation %}{{ ''.__class__.__mro__ }}{% endgeneration %}",
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
    "ljust": "{{ 'a'.ljust(1000000000) }}",
    "rjust": "{{ 'a'.rjust(1000000000, 'b') }}",
    "a wide filter": "{{ '%1000000000d' | format(1) }}",
    "a long filter": "{% set s = 'a' * 100000 %}{{ ('%s' * 1000) | format(*([s] * 1000)) }}",
    "the same argument often": "{% set s = 'a' * 100000 %}{{ ('{0}' * 1000).format(s) }}",
    "a precise filter": "{{ '%.1000000000f' | format(1) }}",
    "an indent": "{{ 'a\nb' | indent(1000000000) }}",
    "a long indent": "{% set s = 'a' * 900 %}{{ ('\n' * 100000) | indent(s, blank=true) }}",
    "many digits": "{{ 1.5 | round(1000000000, 'ceil') }}",
    "a text to round": "{{ 'aaaa' | round(30, 'floor') }}",
    "deep margins": "{% set n = namespace(x=range(50000) | list) %}{% for i in range(300) %}{% set n.x = [n.x] %}"
    "{% endfor %}{{ n.x | tojson(indent=16) }}",
    "lists added up": "{{ ([[1]] * 50000) | sum(start=[]) }}",
    "a long separator": "{{ range(9999) | list | tojson(separators=('a' * 100000, ':')) }}",
    "a long date": "{{ strftime_now('%A' * 100000) }}",
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
