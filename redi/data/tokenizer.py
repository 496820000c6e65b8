"""Messages -> token ids, the same way for training and for generation.

A chat template turns messages into one string in which control tokens (`<|im_start|>`) and the
messages' own text meet. Text from data must stay text: a trace that quotes `<|im_end|>` must not
end the turn. So contents never pass through the template:

    1. render the template with a marker in place of each content
    2. cut the result at the control tokens that the *template* wrote
    3. put the contents back, and encode each stretch of text with control tokens switched off

    <|im_start|> user\\n{problem} <|im_end|> \\n <|im_start|> assistant\\n | {trace} <|im_end|>
    control      text            control    ... prompt ends here          | response

Where no content holds a control token these are the ids of the whole rendered string. A training
row is the prompt exactly as generation will see it, then the response, then the stop token: the
first control token that the template writes after an answer. What the template puts behind it (a
newline) is not in the row. The response is encoded apart from the header before it, so a trace
that begins with a newline cannot merge with the header's: generation could not either.

Of several turns, every answer with its stop token is learned from; what stands between them is
in the row and is not. Masks are by position (`prompt_ids`, `response_ids`, `learned`), never by
token id.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tokenizers import Tokenizer

from redi.config import UserError

Message = dict[str, str]  # role, content
# The system prompt that Qwen2.5-Math's own template supplies, and the paper trains with.
SYSTEM_PROMPT = "Please reason step by step, and put your final answer within \\boxed{}."


def chatml(system: str | None = SYSTEM_PROMPT) -> str:
    """The ChatML template as Jinja; `system` stands in where a conversation has no system turn."""
    turn = "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}"
    default = ""
    if system is not None:
        text = json.dumps(f"<|im_start|>system\n{system}<|im_end|>\n")
        default = "{%- if messages[0]['role'] != 'system' %}{{ " + text + " }}{%- endif %}"
    return (
        f"{default}{{%- for m in messages %}}{turn}{{%- endfor %}}"
        "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"
    )


@dataclass(frozen=True)
class Rendered:
    """A rendered training row."""

    prompt_ids: list[int]
    response_ids: list[int]  # ends with the stop token
    learned: list[bool] | None = None  # of response_ids; None: all, as in every single turn

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


class ChatTokenizer:
    """A tokenizer with a chat template. Raises UserError, naming `where`, if the
    template has no stop token. It switches the tokenizer's control tokens off."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: str,
        special_tokens: dict[str, str] | None = None,
        where: str = "tokenizer",
    ):
        self.tokenizer, self.template, self.where = tokenizer, template, where
        self.special_tokens = special_tokens or {}  # bos_token, eos_token, ...: templates use them
        added = tokenizer.get_added_tokens_decoder()
        self.control_ids = {token.content: i for i, token in added.items() if token.special}
        # Longest first: a control token may begin like another one.
        names = sorted(self.control_ids, key=len, reverse=True)
        self._controls = re.compile("(" + "|".join(map(re.escape, names)) + ")") if names else None
        self._rendered: dict[tuple[tuple[str, ...], bool], list] = {}
        tokenizer.encode_special_tokens = True  # encode "<|im_end|>" as the text it is
        self.stop_id = self._find_stop_id()

    @classmethod
    def from_folder(cls, folder: str | Path) -> "ChatTokenizer":
        """Read tokenizer.json and the chat template of a Hugging Face folder."""
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise UserError(f"{path}: no such file; a model folder needs its tokenizer")
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception
            raise UserError(f"{path}: not a tokenizer ({error})") from None
        config_path, config = folder / "tokenizer_config.json", {}
        if config_path.is_file():
            try:
                config = json.loads(config_path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise UserError(f"{config_path}: not JSON ({error})") from None
        if not isinstance(config, dict):
            raise UserError(f"{config_path}: expected a JSON object")
        special = {k: v for k, v in config.items() if k.endswith("_token") and v is not None}
        special = {k: v["content"] if isinstance(v, dict) else v for k, v in special.items()}
        template = _find_template(folder, config)
        return cls(tokenizer, template, special, where=str(folder))

    # ------------------------------------------------------------ rendering

    def encode_prompt(self, messages: Sequence[Message], prefix: str = "") -> list[int]:
        """Token ids up to where the assistant's answer begins, then `prefix` as answer text.

        The prefix is left out where the template writes it already (`<think>` in some).
        """
        stretches = self._render(messages, add_generation_prompt=True)
        written = "".join(x if isinstance(x, str) else self.token(x) for x in stretches)
        if prefix and not written.rstrip().endswith(prefix.rstrip()):
            stretches.append(prefix)
        return self._encode([stretches])[0]

    def encode_rows(
        self, conversations: Sequence[tuple[Sequence[Message], Message | Sequence[Message]]]
    ) -> list[Rendered]:
        """(prompt messages, response) -> rows; many at once are encoded in parallel.

        A response is an assistant's message, or several messages that begin and end with one: all
        of the assistant's are learned from.
        Raises UserError if the template shows an answer another header than it generates from.
        """
        cut = [
            self._cut_at_answers(prompt, [response] if isinstance(response, dict) else response)
            for prompt, response in conversations
        ]
        encoded = iter(self._encode([stretches for pieces in cut for stretches in pieces]))
        rows = []
        for pieces in cut:
            prompt_ids, *rest = (next(encoded) for _ in pieces)
            learned = None
            if len(rest) > 1:  # answer, turns of others, answer, ...
                learned = [i % 2 == 0 for i, ids in enumerate(rest) for _ in ids]
            rows.append(Rendered(prompt_ids, [t for ids in rest for t in ids], learned))
        return rows

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=False)

    def token(self, token_id: int) -> str:
        return self.tokenizer.id_to_token(token_id) or f"<{token_id}>"

    @cached_property
    def fingerprint(self) -> str:
        """Changes whenever the same messages could give other ids."""
        text = self.tokenizer.to_str() + self.template + json.dumps(self.special_tokens)
        return hashlib.sha256(text.encode()).hexdigest()

    def _cut_at_answers(self, prompt: Sequence[Message], response: Sequence[Message]) -> list[list]:
        """Stretches of the prompt, the first answer with its stop token, the turns up to the next
        answer, that answer, ..."""
        messages = [*prompt, *response]
        stretches = self._render(messages, add_generation_prompt=False, apart=len(prompt))
        pieces, begin = [], 0
        for number in range(len(prompt), len(messages)):
            if not _is_answer(messages[number]):
                continue
            place = stretches.index(_Content(number))
            if stretches[:place] != self._render(
                messages[:number], add_generation_prompt=True, apart=len(prompt)
            ):
                raise UserError(
                    f"{self.where}: the chat template puts other text before a written answer "
                    "than before a generated one, so training would not match generation"
                )
            if stretches[place + 1 : place + 2] != [self.stop_id]:
                raise UserError(f"{self.where}: a row does not end with the stop token")
            pieces += [stretches[begin:place], [messages[number]["content"], self.stop_id]]
            begin = place + 2
        return [
            [messages[x.number]["content"] if isinstance(x, _Content) else x for x in piece]
            for piece in pieces
        ]

    def _find_stop_id(self) -> int:
        question, answer = {"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}
        stretches = self._render([question, answer], add_generation_prompt=False, apart=1)
        _, *after = stretches[stretches.index(_Content(1)) :]
        stop = after[0] if after else ""
        if not isinstance(stop, int):
            raise UserError(
                f"{self.where}: no stop token: the chat template ends an answer with {stop!r}, "
                "not with a special token of the tokenizer; generation could not stop"
            )
        return stop

    def _render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool,
        apart: int | None = None,
    ) -> list:
        """The conversation as a list of text (str) and control tokens (int), texts joined.

        Contents of assistant's messages from number `apart` on are the items `_Content(number)`,
        joined to nothing.
        """
        parts = self._template_parts(tuple(m["role"] for m in messages), add_generation_prompt)
        stretches: list = []
        for part in parts:
            if not isinstance(part, _Content):
                _extend(stretches, [part])
            elif apart is not None and part.number >= apart and _is_answer(messages[part.number]):
                stretches.append(part)
            else:
                _extend(stretches, [messages[part.number]["content"]])
        return stretches

    def _template_parts(self, roles: tuple[str, ...], add_generation_prompt: bool) -> list:
        """What the template writes around contents, which it never sees: so it is asked once."""
        key = roles, add_generation_prompt
        if key not in self._rendered:
            self._rendered[key] = self._ask_template(*key)
        return self._rendered[key]

    def _ask_template(self, roles: tuple[str, ...], add_generation_prompt: bool) -> list:
        """Text, control tokens, and `_Content(number)` where the content of any message goes."""
        from jinja2 import TemplateError

        marked = [{"role": role, "content": _mark(i)} for i, role in enumerate(roles)]
        told = {"add_generation_prompt": add_generation_prompt, "tools": None, "documents": None}
        try:
            text = self._jinja.render(messages=marked, **told, **self.special_tokens)
        except TemplateError as error:
            raise UserError(f"{self.where}: the chat template fails ({error})") from None
        parts = re.split(f"{_OPEN}(\\d+){_CLOSE}", text)
        if [int(i) for i in parts[1::2]] != list(range(len(roles))):
            raise UserError(
                f"{self.where}: the chat template drops, repeats or moves a message "
                f"(roles {list(roles)})"
            )
        pieces: list = []
        for position, part in enumerate(parts):
            if position % 2:
                pieces.append(_Content(int(part)))
            else:
                pieces += self._cut_at_controls(part)
        return pieces

    def _cut_at_controls(self, text: str) -> list:
        pieces = self._controls.split(text) if self._controls else [text]
        return [self.control_ids.get(piece, piece) for piece in pieces if piece]

    def _encode(self, rendered: list[list]) -> list[list[int]]:
        """Lists of text and control tokens -> ids. One batch call, so all cores encode."""
        texts = [item for stretches in rendered for item in stretches if isinstance(item, str)]
        encoded = iter(self.tokenizer.encode_batch_fast(texts, add_special_tokens=False))
        result = []
        for stretches in rendered:
            ids: list[int] = []
            for item in stretches:
                ids.extend(next(encoded).ids if isinstance(item, str) else [item])
            result.append(ids)
        return result

    @cached_property
    def _jinja(self):
        from jinja2 import TemplateError
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def raise_exception(message: str):
            raise UserError(f"{self.where}: the chat template refuses the messages: {message}")

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.globals["raise_exception"] = raise_exception
        environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
        try:
            return environment.from_string(self.template)
        except TemplateError as error:
            raise UserError(f"{self.where}: broken chat template ({error})") from None


# Private-use characters: no template writes them.
_OPEN, _CLOSE = "\ue0f0", "\ue0f1"


@dataclass(frozen=True)
class _Content:
    """Where the content of a message goes."""

    number: int


def _is_answer(message: Message) -> bool:
    return message["role"] == "assistant"


def _mark(index: int) -> str:
    return f"{_OPEN}{index}{_CLOSE}"


def _extend(stretches: list, items: list) -> None:
    """Append items; text that follows text joins it, as it would in the whole string."""
    for item in items:
        if isinstance(item, str) and stretches and isinstance(stretches[-1], str):
            stretches[-1] += item
        else:
            stretches.append(item)


def _find_template(folder: Path, config: dict) -> str:
    """The chat template: in a file of its own, or inside tokenizer_config.json."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several named ones
        template = next((t["template"] for t in template if t["name"] == "default"), None)
    if not template:
        raise UserError(
            f"{folder}: no chat template in chat_template.jinja or tokenizer_config.json"
        )
    return template
