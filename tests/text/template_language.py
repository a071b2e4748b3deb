"""Constructs that chat templates use, and templates of the structures in circulation, all written for these tests."""

from __future__ import annotations

from typing import Any

MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "  Be brief & <kind>.\n"},
    {"role": "user", "content": "What is 2 + 2?\n\nSay 'so', \"so\" or ü你🙂."},
    {"role": "assistant", "content": "<think>two and two</think>\n\nFour."},
    {"role": "user", "content": " And three? "},
]

VARIABLES: dict[str, Any] = {
    "tools": None,
    "documents": None,
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "additional_special_tokens": ["<a>", "<b>"],
}

CONSTRUCTS = {
    # what values look like
    "booleans": "{{ true }} {{ True }} {{ false }} {{ not false }} {{ 1 == 1.0 }}",
    "none": "{{ none }} {{ None }} {{ tools }} {{ [none, true] }}",
    "numbers": "{{ 1.0 }} {{ 10 / 4 }} {{ 10 // 4 }} {{ -7 % 3 }} {{ 2 ** 10 }} {{ 1e20 }} {{ 0.1 + 0.2 }} {{ 7 / 1 }}",
    "containers": "{{ messages[0] }} {{ ['a', 'b\\n', \"c'd\"] }} {{ (1,) }} {{ {'k': [1, none]} }} {{ 'x'.split() }}",
    "text with quotes": "{{ [messages[1].content] }}",
    # undefined, none and the tests
    "tools are none": "{% if tools is none %}n{% endif %}{% if tools is not none %}t{% endif %}{% if tools %}y{% endif %}",
    "defined": "{{ tools is defined }} {{ documents is defined }} {{ nothing is defined }} {{ sep_token is defined }}",
    "undefined prints nothing": "[{{ nothing }}][{{ messages[0].nothing }}][{{ messages[0]['tool_calls'] }}]",
    "undefined is falsy": "{{ 'y' if messages[0].tool_calls else 'n' }}{% if nothing is not defined %}u{% endif %}",
    "default": "{{ nothing | default('d') }} {{ none | default('d') }} {{ none | default('d', true) }} {{ '' | d('e', true) }}",
    "tests": "{{ 1 is number }}{{ 1.5 is float }}{{ 1 is integer }}{{ 'a' is string }}{{ [] is sequence }}{{ {} is mapping }}"
    "{{ 'a' is iterable }}{{ 1 is iterable }}{{ true is boolean }}{{ true is true }}{{ 0 is false }}{{ 2 is even }}"
    "{{ 3 is odd }}{{ 4 is divisibleby 2 }}{{ 'a' is in ['a'] }}{{ 1 is eq 1 }}{{ 2 is gt 1 }}{{ 'A' is upper }}"
    "{{ namespace is callable }}{{ messages[0] is sameas messages[0] }}{{ none is undefined }}",
    "membership": "{{ 'a' in 'abc' }} {{ 'z' not in 'abc' }} {{ 'role' in messages[0] }} {{ 'user' in ['user'] }}",
    "comparisons": "{{ 1 < 2 < 3 }} {{ 1 < 2 > 3 }} {{ 'a' < 'b' }} {{ [1, 2] == [1, 2] }} {{ 1 != 2 }}",
    "logic": "{{ 'a' or 'b' }} {{ '' or 'b' }} {{ 'a' and 'b' }} {{ not 'a' }} {{ none or 0 }} {{ 1 and 0 or 2 }}",
    # strings
    "strip": "[{{ messages[0].content.strip() }}][{{ ' a '.lstrip() }}][{{ ' a '.rstrip() }}][{{ 'xxaxx'.strip('x') }}]",
    "split": "{{ 'a,b,,c'.split(',') }} {{ ' a  b '.split() }} {{ 'a</think>b</think>c'.split('</think>')[-1] }}"
    "{{ 'a b c'.rsplit(' ', 1) }} {{ 'a\\nb'.splitlines() }} {{ 'k=v'.partition('=') }} {{ 'a b c'.split(' ', 1) }}",
    "starts and ends": "{{ 'abc'.startswith('a') }}{{ 'abc'.endswith(('x', 'c')) }}{{ 'abc'.startswith('b', 1) }}",
    "letters": "{{ 'aB c'.upper() }}{{ 'aB'.lower() }}{{ 'ab cd'.title() }}{{ 'ab'.capitalize() }}{{ 'aB'.swapcase() }}"
    "{{ \"it's a-b\" | title }}{{ 'HELLO' | capitalize }}{{ 'ß' | upper }}",
    "replace": "{{ 'aaa'.replace('a', 'b', 2) }}{{ 'aaa' | replace('a', 'b') }}{{ 'aaa' | replace('a', 'b', 1) }}",
    "finding": "{{ 'abcb'.find('b') }}{{ 'abcb'.rfind('b') }}{{ 'abc'.find('z') }}{{ 'abcb'.count('b') }}{{ 'abc'.index('c') }}",
    "joining": "{{ ', '.join(['a', 'b']) }}{{ [1, none, 'c'] | join('-') }}{{ messages | map(attribute='role') | join(', ') }}",
    "format": "{{ '{}-{:>4}-{x}'.format(1, 'a', x=2) }}{{ '%s %d %.2f %r' % ('a', 3, 2.5, 'q') }}{{ '%s-%s' | format('a', 1) }}",
    "predicates": "{{ '12'.isdigit() }}{{ 'ab'.isalpha() }}{{ ' '.isspace() }}{{ 'A'.isupper() }}{{ '1a'.isalnum() }}",
    "padding": "{{ 'a'.ljust(3) }}|{{ 'a'.rjust(3, '.') }}|{{ '7'.zfill(3) }}|{{ 'a'.center(5) }}|{{ 'a' | center(5) }}|",
    "repeat and add": "{{ 'ab' * 2 }}{{ [1] * 2 }}{{ [1] + [2] }}{{ 'a' ~ 1 ~ none ~ true ~ 1.0 }}{{ 'a' 'b' }}",
    "escapes": "{{ 'a\\nb\\tc\\\\d\\'e\\x41\\u00e9' }}{{ \"q\\\"q\" }}{{ '\\N{BULLET}' }}",
    "prefixes": "{{ 'abc'.removeprefix('a') }}{{ 'abc'.removesuffix('c') }}{{ 'a\\tb'.expandtabs(4) }}{{ 'ab'.encode() }}",
    # lists and dicts
    "slices": "{{ 'abcdef'[1:4] }}{{ 'abcdef'[::-1] }}{{ [1, 2, 3, 4][::2] }}{{ [1, 2, 3][-2:] }}{{ [1, 2, 3][:-1] }}{{ [1, 2, 3, 4][3:0:-2] }}"
    "{{ messages[1:] | length }}{{ messages[-1].role }}{{ (messages[::-1] | first).content }}",
    "dict methods": "{{ {'a': 1, 'b': 2}.items() | list }}{{ {'a': 1}.get('b', 3) }}{{ {'a': 1}.get('b') }}{{ {'a': 1}.keys() | list }}"
    "{{ {'a': 1}.values() | list }}{% for k, v in {'x': 1, 'y': 2}.items() %}{{ k }}={{ v }};{% endfor %}{{ {'a': 1} | items | list }}",
    "attribute before item": "{{ {'items': 1}.items is callable }}{{ {'items': 1}['items'] }}{{ messages[0].get('role') }}",
    "list methods": "{{ ['a', 'b'].index('b') }}{{ ['a', 'a'].count('a') }}{{ [3, 1].copy() }}",
    "dict of keywords": "{{ dict(a=1, b='c') }}{{ dict({'a': 1}, b=2) }}",
    # filters
    "choosing": "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ messages | rejectattr('role', 'eq', 'user') "
    "| map(attribute='role') | list }}{{ [0, 1, none] | select | list }}{{ [1, 2, 3] | reject('odd') | list }}"
    "{{ messages | selectattr('content') | list | length }}{{ [1, 2] | map('string') | list }}{{ ['a '] | map('trim') | first }}",
    "ends of lists": "{{ [1, 2] | first }}{{ [1, 2] | last }}{{ [] | first }}{{ 'abc' | last }}{{ [1, 2, 3] | length }}{{ 'abc' | count }}",
    "ordering": "{{ [3, 1, 2] | sort }}{{ ['b', 'A'] | sort }}{{ ['b', 'A'] | sort(case_sensitive=true) }}{{ [1, 2] | reverse | list }}"
    "{{ {'b': 1, 'a': 2} | dictsort }}{{ {'b': 1, 'a': 2} | dictsort(by='value') }}{{ ['a', 'A', 'b'] | unique | list }}"
    "{{ messages | sort(attribute='role') | map(attribute='role') | join(',') }}",
    "grouping": "{% for role, turns in messages | groupby('role') %}{{ role }}:{{ turns | length }} {% endfor %}{{ [1, 2, 3] | batch(2) | list }}"
    "{{ [1, 2, 3] | slice(2) | list }}{{ [1, 2] | sum }}{{ [3, 1] | min }}{{ [3, 1] | max }}",
    "conversion": "{{ '3' | int }}{{ 'x' | int(7) }}{{ '2.5' | float }}{{ 3 | string }}{{ 'ab' | list }}{{ 3.7 | int }}{{ 2.567 | round(1) }}{{ -1 | abs }}",
    "indent": "{{ 'a\\nb\\n\\nc' | indent }}|{{ 'a\\nb' | indent(2, true) }}|{{ 'a\\n\\nb' | indent(2, blank=true) }}|{{ 'a\\nb' | indent('> ') }}",
    "trim": "[{{ '  a ' | trim }}][{{ 'xxaxx' | trim('x') }}]",
    "safe and escape": "{{ '<b>' | safe }}{{ '<b>' | e }}{{ '<b>&' | escape }}{{ '<b>' }}{{ ('<b>' | e) + '<i>' }}",
    "words": "{{ 'a b c' | wordcount }}{{ 'abcdefghij' | truncate(5, true, '') }}{{ 'one two three four' | wordwrap(9) }}{{ 'a b' | urlencode }}",
    "other filters": "{{ '<p>a</p> b' | striptags }}{{ 1000 | filesizeformat }}{{ {'a': 1} | pprint }}{{ [1, 2] | pprint }}{{ {'c': 'd e'} | xmlattr }}"
    "{{ messages[0] | attr('keys') is defined }}{{ [[1]] | first | first }}",
    # tojson as transformers has it
    "tojson": "{{ messages | tojson }}{{ '<&>' | tojson }}{{ 'ü你' | tojson }}{{ none | tojson }}{{ true | tojson }}{{ 1.0 | tojson }}",
    "tojson keywords": "{{ {'b': 'ü', 'a': [1]} | tojson(indent=2) }}{{ {'b': 'ü', 'a': 1} | tojson(ensure_ascii=true, sort_keys=true) }}"
    "{{ {'a': [1, 2]} | tojson(separators=(',', ':')) }}{{ [1] | tojson(indent='\\t') }}{{ ['ü'] | tojson(true, 1) }}",
    # statements
    "loops": "{% for m in messages %}{{ loop.index }}{{ loop.index0 }}{{ loop.revindex }}{{ loop.first }}{{ loop.last }}{{ loop.length }}"
    "{{ loop.previtem.role if loop.previtem is defined }}{{ loop.nextitem.role if not loop.last }}{{ loop.cycle('a', 'b') }}{{ loop.changed(m.role) }};{% endfor %}",
    "loop else and if": "{% for m in messages if m.role == 'tool' %}x{% else %}none{% endfor %}{% for m in messages if m.role != 'user' %}{{ loop.index }}{% endfor %}",
    "loop controls": "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{% if loop.index > 3 %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
    "recursive loop": "{% for n in [{'v': 1, 'c': [{'v': 2, 'c': []}]}] recursive %}{{ n.v }}{{ loop.depth }}[{{ loop(n.c) }}]{% endfor %}",
    "unpacking": "{% for a, b in [[1, 2], [3, 4]] %}{{ a + b }}{% endfor %}{% set a, b = 1, 2 %}{{ a }}{{ b }}",
    "namespace": "{% set ns = namespace(n=0, last=none, found=false) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.n = ns.n + 1 %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{{ ns.n }}{{ ns.last }}{{ ns.found }}",
    "scoping": "{% set x = 1 %}{% for i in [1, 2] %}{% set x = i %}{% endfor %}{{ x }}{% if true %}{% set x = 5 %}{% endif %}{{ x }}",
    "set block": "{% set t %}a{{ 1 }}\nb{% endset %}[{{ t }}]{% set u | upper %}abc{% endset %}{{ u }}{{ t | length }}",
    "filter block": "{% filter upper %}abc {{ 'd' }}{% endfilter %}{% filter indent(2) %}a\nb{% endfilter %}",
    "with": "{% with a = 1, b = 2 %}{{ a + b }}{% endwith %}{{ a is defined }}",
    "macro": "{% macro m(a, b='x', c=none) %}{{ a }}{{ b }}{{ c }}{{ varargs }}{{ kwargs }}{% endmacro %}{{ m(1) }}{{ m(1, c=2) }}{{ m(1, 2, 3, 4, d=5) }}{{ m.name }}",
    "macro sees globals": "{% set g = 'G' %}{% macro m() %}{{ g }}{{ bos_token }}{% endmacro %}{{ m() }}",
    "call": "{% macro box(t) %}<{{ t }}>{{ caller() }}</{{ t }}>{% endmacro %}{% call box('a') %}in{% endcall %}"
    "{% macro each(l) %}{% for i in l %}{{ caller(i) }}{% endfor %}{% endmacro %}{% call(i) each([1, 2]) %}({{ i }}){% endcall %}",
    "recursive macro": "{% macro f(n) %}{% if n > 0 %}{{ n }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(4) }}",
    "inline if": "{{ 'a' if false }}|{{ 'a' if true else 'b' }}|{{ 'x' if messages | length > 2 else 'y' }}",
    "whitespace": "  {%- if true %}\n  a\n  {%- endif %}\n  {% if true %}\n  b\n  {% endif %}\nc {{- ' d ' -}} e\n{#- gone -#}\n f {%+ if true %}g{% endif %}\n",
    "trim and lstrip blocks": "{% for m in messages %}\n    {% if loop.first %}\n        {{ m.role }}\n    {% endif %}\n{% endfor %}\n\nend\n",
    "raw and comments": "{% raw %}{{ not }} {% this %}{% endraw %}{# {{ gone }} #}{{ '{{ x }}' }}",
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}",
    "generation with whitespace": "a\n{%- generation -%}\n b {{ 1 }}\n{%- endgeneration %}\nc{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x is defined }}",
    "special tokens": "{{ bos_token }}{{ eos_token }}{{ unk_token }}{{ pad_token }}{{ additional_special_tokens }}{{ bos_token is defined }}",
    "generation prompt": "{{ add_generation_prompt }}{% if add_generation_prompt %}A:{% endif %}{{ add_generation_prompt is true }}",
    "functions": "{{ range(3) | list }}{{ range(5, 0, -2) | list }}{% set c = cycler('a', 'b') %}{{ c.next() }}{{ c.next() }}{{ c.current }}{% set j = joiner(',') %}{{ j() }}a{{ j() }}b",
    "strftime": "{{ strftime_now('%%')}}{{ strftime_now('x') }}{{ strftime_now('%Y') | length }}{{ strftime_now(format='y') }}",
    "random and lorem": "{{ [1] | random }}{{ lipsum(n=1) | length > 10 }}",
    # what must fail, with a reason
    "raise": "{{ raise_exception('Conversation roles must alternate') }}",
    "raise in a loop": "{% for m in messages %}{{ m.role }}{% if loop.index == 2 %}{{ raise_exception('no ' ~ m.role) }}{% endif %}{% endfor %}",
    "adding text and none": "{{ 'a' + none }}",
    "adding undefined": "{{ nothing + 'a' }}",
    "calling what is undefined": "{{ nothing() }}",
    "attribute of undefined": "{{ nothing.deep }}",
    "unknown filter": "{{ 'a' | fromjson }}",
    "unknown test": "{{ 'a' is wonderful }}",
    "unknown tag": "{% frobnicate %}",
    "no such method": "{{ 'a'.frobnicate() }}",
    "unclosed": "{% if true %}a",
    "unbalanced": "{{ (1 }}",
    "changing a list": "{{ messages.append(1) }}",
    "changing a dict": "{{ messages[0].update({'role': 'x'}) }}",
    "popping": "{% set _ = messages.pop(0) %}{{ messages | length }}",
    "private attributes": "{{ ''.__class__ }}",
    "private by filter": "{{ ('' | attr('__class__')).__mro__ }}",
    "format escapes": "{{ '{0.__class__}'.format('a') }}",
    "dividing by zero": "{{ 1 / 0 }}",
    "no index": "{{ [1].index(2) }}",
    "bad format": "{{ '%d' % 'a' }}",
    "import": "{% import 'x' as y %}",
    "include": "{% include 'x' %}",
    "extends": "{% extends 'x' %}",
    "deep recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "json of an object": "{{ range(3) | tojson }}",
    "json of undefined": "{{ nothing | tojson }}",
}
"""Name -> template. Each must render as jinja2 does, or fail where it fails."""

_TURN = "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"

STRUCTURES = {
    "chatml": "{% for message in messages %}"
    + _TURN
    + "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    "chatml with a default system prompt": "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou help.<|im_end|>\\n' }}{% endif %}" + _TURN + "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    "chatml whose last answer stays open": "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content }}"
    "{% if (loop.last and add_generation_prompt) or not loop.last %}{{ '<|im_end|>' + '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt and messages[-1]['role'] != 'assistant' %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    "brackets, system in the first user turn": "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set sys = messages[0]['content'] %}"
    "{% else %}{% set rest = messages %}{% set sys = false %}{% endif %}{% for message in rest %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if loop.index0 == 0 and sys != false %}{% set content = '<<SYS>>\\n' + sys + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
    "brackets with tools before the last question": "{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content'] %}{%- set loop_messages = messages[1:] %}"
    "{%- else %}{%- set loop_messages = messages %}{%- endif %}{%- if not tools is defined %}{%- set tools = none %}{%- endif %}"
    "{%- set user_messages = loop_messages | selectattr('role', 'equalto', 'user') | list %}{{- bos_token }}"
    "{%- for message in loop_messages %}{%- if message['role'] == 'user' %}{%- if tools is not none and (message == user_messages[-1]) %}"
    "{{- '[AVAILABLE_TOOLS] [' }}{%- for tool in tools %}{{- tool | tojson }}{%- if not loop.last %}{{- ', ' }}{%- endif %}{%- endfor %}{{- '][/AVAILABLE_TOOLS]' }}{%- endif %}"
    "{%- if loop.last and system_message is defined %}{{- '[INST] ' + system_message + '\\n\\n' + message['content'] + '[/INST]' }}"
    "{%- else %}{{- '[INST] ' + message['content'] + '[/INST]' }}{%- endif %}{%- elif message.tool_calls is defined and message.tool_calls is not none %}"
    "{{- '[TOOL_CALLS]' }}{%- elif message['role'] == 'assistant' %}{{- ' ' + message['content'] | trim + eos_token }}{%- endif %}{%- endfor %}",
    "headers with a date": "{{- bos_token }}{%- if not date_string is defined %}{%- if strftime_now is defined %}{%- set date_string = strftime_now('%d %b %Y') | length | string %}"
    "{%- else %}{%- set date_string = '26 Jul 2024' %}{%- endif %}{%- endif %}{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content'] | trim %}"
    "{%- set messages = messages[1:] %}{%- else %}{%- set system_message = '' %}{%- endif %}{{- '<|header|>system<|/header|>\\n\\n' }}"
    "{%- if tools is not none %}{{- 'Environment: ipython\\n' }}{%- endif %}{{- 'Today: ' + date_string + '\\n\\n' }}{{- system_message }}{{- '<|eot_id|>' }}"
    "{%- for message in messages %}{%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}"
    "{{- '<|header|>' + message['role'] + '<|/header|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}{%- elif 'tool_calls' in message %}"
    "{%- if not message.tool_calls | length == 1 %}{{- raise_exception('one call at a time') }}{%- endif %}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|header|>assistant<|/header|>\\n\\n' }}{%- endif %}",
    "turns of user and model": "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] | trim + '\\n\\n' %}{% set loop_messages = messages[1:] %}"
    "{% else %}{% set first = '' %}{% set loop_messages = messages %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\\n' + (first if loop.first else '') }}{% if message['content'] is string %}{{ message['content'] | trim }}"
    "{% elif message['content'] is iterable %}{% for item in message['content'] %}{{ item['text'] | trim }}{% endfor %}"
    "{% else %}{{ raise_exception('bad content') }}{% endif %}{{ '<end_of_turn>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}",
    "pipes and end": "{% for message in messages %}{% if message['role'] == 'system' %}{{'<|system|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'assistant' %}"
    "{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
    "pipes over lines, lstripped": "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'assistant' %}\n"
    "{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}",
    "plain words": "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{{ messages[0]['content'].strip() ~ ' ' }}{% else %}{% set loop_messages = messages %}"
    "{% endif %}{% for message in loop_messages %}{{ message.role.upper() }}: {{ message.content.strip() }}{{ ' ' if message.role == 'user' else eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}",
    "instruction and response": "{%- for message in messages %}\n    {%- if message['role'] == 'system' %}\n{{ message['content'] }}\n    {%- elif message['role'] == 'user' %}\n### Instruction:\n{{ message['content'] }}\n"
    "    {%- else %}\n### Response:\n{{ message['content'] }}\n{{ eos_token }}\n    {%- endif %}\n{%- endfor %}\n{%- if add_generation_prompt %}\n### Response:\n{% endif %}",
    "thinking cut from earlier answers": "{%- set ns = namespace(last_query_index=messages | length - 1, searching=true) %}{%- for message in messages[::-1] %}"
    "{%- set index = (messages | length - 1) - loop.index0 %}{%- if ns.searching and message.role == 'user' and message.content is string and not (message.content.startswith('<tool>') and message.content.endswith('</tool>')) %}"
    "{%- set ns.searching = false %}{%- set ns.last_query_index = index %}{%- endif %}{%- endfor %}{%- for message in messages %}{%- if message.role == 'assistant' %}"
    "{%- set content = message.content %}{%- set reasoning = '' %}{%- if message.reasoning_content is string %}{%- set reasoning = message.reasoning_content %}"
    "{%- elif '</think>' in content %}{%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}"
    "{%- if loop.index0 > ns.last_query_index %}{{- '<|im_start|>assistant\\n<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' + content }}{%- else %}{{- '<|im_start|>assistant\\n' + content }}{%- endif %}"
    "{{- '<|im_end|>\\n' }}{%- else %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}",
    "thinking with fullwidth bars": "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}{% set ns = namespace(is_first=false, is_tool=false, system_prompt='', is_first_sp=true) %}"
    "{%- for message in messages %}{%- if message['role'] == 'system' %}{%- if ns.is_first_sp %}{% set ns.system_prompt = ns.system_prompt + message['content'] %}{% set ns.is_first_sp = false %}"
    "{%- else %}{% set ns.system_prompt = ns.system_prompt + '\\n\\n' + message['content'] %}{%- endif %}{%- endif %}{%- endfor %}{{ bos_token }}{{ ns.system_prompt }}"
    "{%- for message in messages %}{%- if message['role'] == 'user' %}{%- set ns.is_tool = false -%}{{'<｜User｜>' + message['content']}}{%- endif %}"
    "{%- if message['role'] == 'assistant' and 'tool_calls' not in message %}{% set content = message['content'] %}{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{'<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>'}}{%- endif %}{%- endfor -%}{% if add_generation_prompt and not ns.is_tool %}{{'<｜Assistant｜><think>\\n'}}{% endif %}",
    "capitals and bars": "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system_message = messages[0]['content'] %}{% set loop_messages = messages[1:] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% if system_message != false %}{{ '<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>' + system_message + '<|END_OF_TURN_TOKEN|>' }}{% endif %}"
    "{% for message in loop_messages %}{% set content = message['content'] %}{% if message['role'] == 'user' %}{{ '<|START_OF_TURN_TOKEN|><|USER_TOKEN|>' + content.strip() + '<|END_OF_TURN_TOKEN|>' }}"
    "{% elif message['role'] == 'assistant' %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' + content.strip() + '<|END_OF_TURN_TOKEN|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}",
    "channels": "{%- macro head(role, channel=none) -%}<|start|>{{ role }}{% if channel %}<|channel|>{{ channel }}{% endif %}<|message|>{%- endmacro -%}"
    "{%- macro types(spec) -%}{%- if spec.type == 'array' -%}{{ types(spec['items']) + '[]' }}{%- elif spec.type == 'string' -%}string{%- else -%}any{%- endif -%}{%- endmacro -%}"
    "{{- head('system') }}Types: {{ types({'type': 'array', 'items': {'type': 'string'}}) }}<|end|>{%- set loop_messages = messages[1:] if messages[0].role in ['developer', 'system'] else messages %}"
    "{%- if messages[0].role in ['developer', 'system'] %}{{- head('developer') + '# Instructions\\n\\n' + messages[0].content | trim + '<|end|>' }}{%- endif %}"
    "{%- for message in loop_messages -%}{%- if message.role == 'assistant' -%}{%- if loop.last and not add_generation_prompt %}{{- head('assistant', 'final') + message.content + '<|return|>' }}"
    "{%- else %}{{- head('assistant', 'final') + message.content + '<|end|>' }}{%- endif %}{%- elif message.role == 'user' -%}{{- head('user') + message.content + '<|end|>' }}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|start|>assistant{%- endif -%}",
    "no end of turn": "[gMASK]<sop>{% for item in messages %}{% if item['role'] == 'tool' %}<|observation|>{% else %}<|{{ item['role'] }}|>\n{{ item['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    "generation marks": "{%- for message in messages -%}{{- '<|im_start|>' + message.role + '\\n' -}}{%- if message.role == 'assistant' -%}{%- generation -%}{{- message.content + '<|im_end|>' -}}{%- endgeneration -%}"
    "{%- else -%}{{- message.content + '<|im_end|>' -}}{%- endif -%}{{- '\\n' -}}{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}",
    "content parts": "{%- for message in messages %}{{ '<|' + message.role + '|>' }}{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{% endif %}{{ eos_token }}{% endfor %}",
    "documents": "{%- if documents %}{% for d in documents %}{{ 'Document ' ~ loop.index ~ ': ' ~ d.title ~ '\\n' ~ d.text }}{% endfor %}{%- elif documents is none and tools is none %}plain:{%- endif %}{% for m in messages %}{{ m.role ~ '=' ~ m.content ~ ';' }}{% endfor %}",
    "roles by table": "{%- set names = {'user': 'Human', 'assistant': 'Bot', 'system': 'Setup'} %}{% for m in messages %}{% set name = names.get(m.role, m.role | title) %}{{ name }}: {{ m.content | trim | replace('\\n\\n', '\\n') }}\n{% endfor %}{{ 'Bot:' if add_generation_prompt }}",
    "tools listed with macros": "{%- macro show(tool) %}{{ tool.name }}({% for k, v in tool.args | dictsort %}{{ k }}: {{ v }}{{ ', ' if not loop.last }}{% endfor %}){% endmacro %}"
    "{%- set listed = tools or [{'name': 'f', 'args': {'b': 'int', 'a': 'str'}}] %}{% for tool in listed %}{{ show(tool) }}\n{% endfor %}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
    "alternation checked": "{%- set ns = namespace(expect='user') %}{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{% if m.role != ns.expect %}{{ raise_exception('After ' ~ ns.expect ~ ' came ' ~ m.role) }}{% endif %}"
    "{% set ns.expect = 'assistant' if ns.expect == 'user' else 'user' %}{{ '<' ~ m.role ~ '>' ~ m.content ~ eos_token }}{% endfor %}",
    "dbrx like": "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set system_message = 'You help.' %}{% endif %}"
    "{% for message in loop_messages %}{% if loop.index0 == 0 %}{% if system_message != false %}{{ '<|im_start|>system\n' + system_message.strip() + '<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' }}{% else %}{{ '\n' + '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' }}{% endif %}"
    "{% if (add_generation_prompt == true and loop.last) %}{{ '\n' + '<|im_start|>' + 'assistant' + '\n' }}{% endif %}{% endfor %}",
}
"""Name -> template of a structure that published templates have."""
