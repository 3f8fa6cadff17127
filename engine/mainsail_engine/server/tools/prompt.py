"""Tools for a model whose template knows none: described in the system message, in Hermes' form.

Calls and results in the conversation are written out the same way, as Qwen2.5's template does.
"""

from __future__ import annotations

import json
from typing import Any

_INTRODUCTION = """# Tools

You may call one or more functions to help with the user's request. Their signatures are within <tools></tools>:
<tools>
{tools}
</tools>

For each call write a JSON object with the function's name and arguments within <tool_call></tool_call>:
<tool_call>
{{"name": <function-name>, "arguments": <arguments-object>}}
</tool_call>"""


def with_tools_written_out(messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> list[dict[str, Any]]:
    """The same conversation in plain messages."""
    plain = [_plain(message) for message in messages]
    if not tools:
        return plain
    described = _INTRODUCTION.format(tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))
    if plain and plain[0]["role"] == "system":
        return [{**plain[0], "content": f"{plain[0]['content']}\n\n{described}"}, *plain[1:]]
    return [{"role": "system", "content": described}, *plain]


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
    calls = [
        f"<tool_call>\n{json.dumps({key: call['function'][key] for key in ('name', 'arguments')})}\n</tool_call>"
        for call in message.get("tool_calls", ())
    ]
    if not calls:
        return message
    content = "\n".join([*([message["content"]] if message["content"] else []), *calls])
    return {"role": message["role"], "content": content}
