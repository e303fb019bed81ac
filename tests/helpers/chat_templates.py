# ruff: noqa: RUF001, the full-width bars are DeepSeek's
"""Chat templates of the kinds that published models have, written for these tests.

Each follows one family's way: what its generation prompt ends in, how it takes system
turns, tools and the history's thinking.
"""

# DeepSeek-R1 and its distills: full-width bars, thinking cut from the history, and a
# prompt that opens the block in one long line of Jinja.
R1 = (
    "{% if not add_generation_prompt is defined %}"
    "{% set add_generation_prompt = false %}{% endif %}"
    "{% set ns = namespace(is_first=false, is_tool=false, system='') %}"
    "{%- for message in messages %}{%- if message['role'] == 'system' %}"
    "{% set ns.system = message['content'] %}{%- endif %}{%- endfor %}"
    "{{bos_token}}{{ns.system}}"
    "{%- for message in messages %}"
    "{%- if message['role'] == 'user' %}{%- set ns.is_tool = false -%}"
    "{{'<｜User｜>' + message['content']}}{%- endif %}"
    "{%- if message['role'] == 'assistant' and message['content'] is none %}"
    "{%- set ns.is_tool = false -%}"
    "{%- for tool in message['tool_calls'] %}"
    "{{'<｜Assistant｜><｜tool▁calls▁begin｜>' + tool['type'] + '<｜tool▁sep｜>' + "
    "tool['function']['name'] + '\\n' + '```json' + '\\n' + "
    "tool['function']['arguments'] + '\\n' + '```' + '<｜tool▁calls▁end｜>'}}"
    "{%- endfor %}{%- endif %}"
    "{%- if message['role'] == 'assistant' and message['content'] is not none %}"
    "{%- if ns.is_tool %}"
    "{{'<｜tool▁outputs▁end｜>' + message['content'] + '<｜end▁of▁sentence｜>'}}"
    "{%- set ns.is_tool = false -%}{%- else %}"
    "{% set content = message['content'] %}"
    "{% if '</think>' in content %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{'<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>'}}"
    "{%- endif %}{%- endif %}"
    "{%- if message['role'] == 'tool' %}{%- set ns.is_tool = true -%}"
    "{{'<｜tool▁output▁begin｜>' + message['content'] + '<｜tool▁output▁end｜>'}}"
    "{%- endif %}{%- endfor -%}"
    "{% if ns.is_tool %}{{'<｜tool▁outputs▁end｜>'}}{% endif %}"
    "{% if add_generation_prompt and not ns.is_tool %}"
    "{{'<｜Assistant｜><think>\\n'}}{% endif %}"
)

# Qwen3: what comes before the generation prompt, which differs from one to the next.
_QWEN3 = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- "# Tools\\n\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(searching=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.searching and message.role == "user" and message.content is string \
and not message.content.startswith('<tool_response>') %}
        {%- set ns.searching = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].split('<think>')[-1] %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last and (loop.last or reasoning) %}
            {{- '<|im_start|>' + message.role + '\\n<think>\\n' }}
            {{- reasoning.strip('\\n') + '\\n</think>\\n\\n' + content }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {%- for call in message.tool_calls or [] %}
            {{- '\\n<tool_call>\\n{"name": "' + call.function.name }}
            {{- '", "arguments": ' + (call.function.arguments | tojson) }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or messages[loop.index0 - 1].role != "tool" %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' + content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != "tool" %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
"""
QWEN3_THINKING = (
    _QWEN3 + "    {{- '<|im_start|>assistant\\n<think>\\n' }}\n{%- endif %}\n"
)
# Thinks unless it is told not to; its empty block is no opening.
QWEN3_HYBRID = (
    _QWEN3
    + """\
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
)
# The same, and the prompt opens the block where it may think.
QWEN3_LATER = (
    _QWEN3
    + """\
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- else %}
        {{- '<think>\\n' }}
    {%- endif %}
{%- endif %}"""
)

# QwQ: plain text, in which the opening's line break is one; refuses a first tool turn.
QWQ = """\
{%- if messages[0].role == 'tool' %}{{ raise_exception('a tool turn first') }}\
{%- endif %}
{%- for message in messages %}
{%- set content = message.content or '' %}
{%- if message.role == 'assistant' %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}
{{- '<|im_start|>' + message.role + '\\n' }}{{ content }}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant' }}
<think>
{% endif %}"""

# Magistral: [THINK] in a system turn of its own, prompts that end with the instruction.
MAGISTRAL = """\
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {{- '[SYSTEM_PROMPT]' + messages[0]['content'] + '[/SYSTEM_PROMPT]' }}
    {%- set rest = messages[1:] %}
{%- else %}
    {{- '[SYSTEM_PROMPT]First think, as in [THINK]draft[/THINK].[/SYSTEM_PROMPT]' }}
    {%- set rest = messages %}
{%- endif %}
{%- for message in rest %}
    {%- if message['role'] == 'user' %}
        {{- '[INST]' + message['content'] + '[/INST]' }}
    {%- elif message['role'] == 'assistant' %}
        {{- (message['content'] or '') + eos_token }}
    {%- else %}
        {{- raise_exception('Only user, system and assistant roles are supported.') }}
    {%- endif %}
{%- endfor %}"""
MAGISTRAL_OPENS = MAGISTRAL + "{%- if add_generation_prompt %}[THINK]{%- endif %}"

# gpt-oss: channels; the model itself begins the one of its analysis.
CHANNELS = """\
<|start|>system<|message|>Reasoning: {{ reasoning_effort or 'medium' }}<|end|>
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|start|>assistant<|channel|>final<|message|>' }}
        {{- (message.content or '') + '<|end|>' }}
    {%- else %}
        {{- '<|start|>' + message.role + '<|message|>' + message.content + '<|end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|start|>assistant{% endif %}"""
CHANNELS_OPEN = CHANNELS.replace(
    "<|start|>assistant{% endif",
    "<|start|>assistant<|channel|>analysis<|message|>{% endif",
)

# The bracket is a variable that the history needs too: the source has it once.
SHARED = """\
{%- set open = '<think>' %}
{%- for message in messages %}
    {{- message.role + ': ' + (message.content or '').replace(open, '(') + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'assistant: ' + open + '\\n' }}{% endif %}"""
# The same with the assistant's turns marked, whose places a cut would move.
MARKED = SHARED.replace(
    "{{- message.role + ': ' + (message.content or '').replace(open, '(') + '\\n' }}",
    "{{- message.role + ': ' }}{% generation %}"
    "{{ (message.content or '').replace(open, '(') + '\\n' }}{% endgeneration %}",
)
