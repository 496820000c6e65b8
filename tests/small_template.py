"""ChatML with a system prompt, the template of most tests."""

import json

from redi.toy import CHATML

# Of Qwen2.5-Math's own template, which the paper trains with.
SYSTEM_PROMPT = "Please reason step by step, and put your final answer within \\boxed{}."


def chatml(system: str | None = SYSTEM_PROMPT) -> str:
    """The template in Jinja. Conversations without a system turn get `system`."""
    if system is None:
        return CHATML
    turn = json.dumps(f"<|im_start|>system\n{system}<|im_end|>\n")
    return "{%- if messages[0]['role'] != 'system' %}{{ " + turn + " }}{%- endif %}" + CHATML
