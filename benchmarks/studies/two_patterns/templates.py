"""Chat templates of the study's experts: plain, and those that open the thinking.

All write a conversation of user and assistant turns alike. The kinds that open it do
so as published models do, without the line breaks, which these tokenizers lack.
"""

from __future__ import annotations

from dataclasses import dataclass

from tasks import THINK, chains


@dataclass(frozen=True)
class Template:
    """A chat template; `opening` is how its generation prompt opens the thinking."""

    text: str
    opening: str = ""


PLAIN = Template(chains.CHAT_TEMPLATE)

# DeepSeek-R1 and its distilled models.
R1 = Template(
    """\
{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}\
{% endif %}{% set ns = namespace(system='') %}\
{%- for message in messages %}{% if message['role'] == 'system' %}\
{% set ns.system = message['content'] %}{% endif %}{% endfor %}{{ ns.system }}\
{%- for message in messages %}\
{% if message['role'] == 'user' %}{{ '<|user|>' + message['content'] + '<|end|>' }}\
{% elif message['role'] == 'assistant' %}{% set content = message['content'] %}\
{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}\
{% endif %}{{ '<|assistant|>' + content + '<|end|>' }}{% endif %}\
{%- endfor %}\
{% if add_generation_prompt %}{{ '<|assistant|><think>' }}{% endif %}""",
    THINK,
)

# Qwen3 and its thinking models: thinking is kept after the last query only.
QWEN = Template(
    """\
{%- if tools %}
    {{- '<|system|>' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + ' ' }}
    {%- endif %}
    {{- '<tools>' }}
    {%- for tool in tools %}
        {{- tool | tojson }}
    {%- endfor %}
    {{- '</tools><|end|>' }}
{%- else %}
    {%- if messages[0].role == 'system' %}
        {{- '<|system|>' + messages[0].content + '<|end|>' }}
    {%- endif %}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == 'user' %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|' + message.role + '|>' + content + '<|end|>' }}
    {%- elif message.role == 'assistant' %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- else %}
            {%- if '</think>' in content %}
                {%- set reasoning_content = content.split('</think>')[0] %}
                {%- set reasoning_content = reasoning_content.split('<think>')[-1] %}
                {%- set content = content.split('</think>')[-1] %}
            {%- endif %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or reasoning_content) %}
            {{- '<|assistant|><think>' + reasoning_content + '</think>' + content }}
        {%- else %}
            {{- '<|assistant|>' + content }}
        {%- endif %}
        {{- '<|end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think></think>' }}
    {%- else %}
        {{- '<think>' }}
    {%- endif %}
{%- endif %}
""",
    THINK,
)
