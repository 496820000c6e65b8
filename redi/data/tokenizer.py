"""Chat messages -> token ids, the same way for training and for generation.

A chat template turns messages into one string, in which control tokens (`<|im_start|>`) and the
messages' own text mix. Text must stay text: a trace that quotes `<|im_end|>` must not end the turn.
So the template gets contents whose control tokens are broken up:

    1. put an unused character between the letters of a control token that a content quotes
    2. render: what is a whole control token now was written by the *template*
    3. split there, repair the quotes, and encode each text with control tokens switched off

    <|im_start|> user\\n{problem} <|im_end|> \\n <|im_start|> assistant\\n | {trace} <|im_end|>
    control      text            control    ...        the prompt ends here | response

If no content quotes a control token, these are the ids of the whole rendered string, unless a
response begins with a newline. A training row is the prompt exactly as generation will see it, then
what the template writes for the answer (some trim it, or add an empty thought), up to the stop
token: the first control token after an answer. The response is encoded apart from the prompt: a
newline at its beginning must not merge with the header's, because in generation it could not.
Only the answers of a conversation are learned. Each is rendered as the last message, because some
templates drop the thoughts of earlier answers. An answer with weight 0 is rendered as the prompt of
the next answer, and not learned.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Template, TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from redi.config import UserError
from redi.data.files import read_json

Message = dict[str, Any]  # role, content; weight: 0 for an answer that is only context
# Private-use characters, which no tokenizer's control token contains.
BREAK = "\ue0f0"  # after each letter of a quoted control token; twice: the character itself
MARKER = "\ue0f1{}\ue0f1"  # holds a message's number, to find the messages in what is rendered


def is_answer(message: Message) -> bool:
    return message["role"] == "assistant"


def is_learned(message: Message) -> bool:
    return is_answer(message) and message.get("weight") != 0


class Piece(NamedTuple):
    """A part of a rendered conversation."""

    text: str
    control_id: int | None = None  # if the text is a control token


@dataclass(frozen=True)
class TokenizedRow:
    """A training row as token ids."""

    prompt_ids: list[int]
    response_ids: list[int]  # ends with the stop token
    learned: list[bool] | None = None  # for each of response_ids; None: all, as for one answer


class ChatTokenizer:
    """A tokenizer with a chat template. Raises UserError, which begins with `where`, for a template
    that fails or has no stop token. Switches the tokenizer's control tokens off."""

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
        # Longest first: a control token may begin with another one.
        controls = sorted(map(re.escape, self.control_ids), key=len, reverse=True)
        self._controls = re.compile(f"({'|'.join(controls) or '(?!)'})")
        self._quoted = re.compile(f"{self._controls.pattern}|{BREAK}")
        self._jinja = self._compile_template()
        self._checked_roles: set[tuple[str, ...]] = set()  # of conversations
        tokenizer.encode_special_tokens = True  # encode "<|im_end|>" as the text it is
        tokenizer.no_truncation()  # tokenizer.json may ask for both
        tokenizer.no_padding()
        # A conversation is encoded in parts, so no part may depend on what is beside it.
        for t in added.values():
            if t.special and (t.lstrip or t.rstrip or t.single_word):
                raise UserError(f"{where}: {t} has lstrip, rstrip or single_word; unsupported")
        if "".join(tokenizer.encode("x", add_special_tokens=False).tokens).startswith(("▁", "Ġ")):
            raise UserError(f"{where}: a tokenizer that adds a blank before texts is unsupported")
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
        path = folder / "tokenizer_config.json"
        config = read_json(path) if path.is_file() else {}
        older = folder / "special_tokens_map.json"
        if older.is_file() and "added_tokens_decoder" not in config:  # as in transformers
            config |= read_json(older)
        special = {k: v for k, v in config.items() if k.endswith("_token") and v is not None}
        template = config.get("chat_template")
        try:
            special = {k: v["content"] if isinstance(v, dict) else v for k, v in special.items()}
            if isinstance(template, list):  # several named ones
                template = {one["name"]: one["template"] for one in template}.get("default")
        except (KeyError, TypeError) as error:
            raise UserError(f"{path}: a token or template is not text ({error!r})") from None
        path = folder / "chat_template.jinja"
        if path.is_file():
            template = path.read_text(encoding="utf-8", errors="replace")
        if not isinstance(template, str):
            raise UserError(f"{path}: no such file, and no chat template in tokenizer_config.json")
        return cls(tokenizer, template, special, where=str(folder))

    def encode_prompt(self, messages: Sequence[Message], prefix: str = "") -> list[int]:
        """Token ids up to where the assistant's answer begins, then those of the text `prefix`,
        unless the template writes the prefix itself (`<think>` in some)."""
        text = self._render(messages, generation=True)
        if prefix and not text.rstrip().endswith(prefix.rstrip()):
            text += self._quote(prefix)
        return self._encode([self._split(text)])[0]

    def encode_rows(
        self, conversations: Sequence[tuple[Sequence[Message], Message | Sequence[Message]]]
    ) -> list[TokenizedRow]:
        """(prompt messages, response) -> rows; many at once are encoded in parallel. A response is
        an assistant's message or several messages. Raises UserError if the template begins a
        written answer otherwise than a generated one."""
        segments = []
        for prompt, response in conversations:
            messages = [*prompt, *([response] if isinstance(response, dict) else response)]
            segments.append(self._split_at_answers(messages, num_prompt=len(prompt)))
        encoded = iter(self._encode([pieces for row in segments for pieces in row]))
        rows = []
        for row in segments:
            prompt_ids, *rest = (next(encoded) for _ in row)
            learned = None
            if len(rest) > 1:  # answer, other turns, answer, ...
                learned = [i % 2 == 0 for i, ids in enumerate(rest) for _ in ids]
            rows.append(TokenizedRow(prompt_ids, list(chain.from_iterable(rest)), learned))
        return rows

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=False)

    def token(self, token_id: int) -> str:
        return self.tokenizer.id_to_token(token_id) or f"<{token_id}>"

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all that token ids depend on apart from the messages."""
        text = self.tokenizer.to_str() + self.template + json.dumps(self.special_tokens)
        return hashlib.sha256(text.encode()).hexdigest()

    def _split_at_answers(self, messages: list[Message], num_prompt: int) -> list[list[Piece]]:
        """[prompt, answer with its stop token, other turns, answer, ...]; of answers to learn."""
        segments, num_stops = [], 0  # stop tokens up to the end of the last answer
        for number in range(num_prompt, len(messages)):
            if not is_learned(messages[number]):
                continue
            prompt = self._render(messages[:number], generation=True)
            text = self._render(messages[: number + 1], generation=False)
            if not text.startswith(prompt):
                raise UserError(
                    f"{self.where}: the chat template puts other text before a written answer "
                    "than before a generated one, so training would not match generation"
                )
            before, answer = self._split(prompt), self._split(text[len(prompt) :])
            starts, ends = [0, *self._after_stops(before)], self._after_stops(answer)
            if not ends:
                raise UserError(
                    f"{self.where}: the chat template does not end every answer with the stop token"
                )
            segments += [before[starts[num_stops] :], answer[: ends[0]]]
            num_stops = len(starts)  # those before this answer, and its own
        return segments

    def _after_stops(self, pieces: list[Piece]) -> list[int]:
        """The indices after the stop tokens."""
        return [i for i, piece in enumerate(pieces, 1) if piece.control_id == self.stop_id]

    def _find_stop_id(self) -> int:
        marker = MARKER.format(1)
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": marker}]
        after = self._render(messages, generation=False).partition(marker)[2]
        stop = [*self._split(after), Piece("")][0]
        if stop.control_id is None:
            raise UserError(
                f"{self.where}: no stop token: the chat template ends an answer with {stop.text!r},"
                " not with a special token of the tokenizer; generation could not stop"
            )
        return stop.control_id

    def _render(self, messages: Sequence[Message], generation: bool) -> str:
        """What the template writes. Control tokens that the contents quote are broken up."""
        roles = tuple(message["role"] for message in messages)
        if roles not in self._checked_roles:
            markers = [MARKER.format(number) for number in range(len(roles))]
            marked = [{"role": role, "content": text} for role, text in zip(roles, markers)]
            found = re.findall(MARKER.format("[0-9]+"), self._run_template(marked, generation))
            if found != markers:
                problem = f"drops, repeats or moves a message (roles {list(roles)})"
                raise UserError(f"{self.where}: the chat template {problem}")
            self._checked_roles.add(roles)
        quoted = [{**message, "content": self._quote(message["content"])} for message in messages]
        return self._run_template(quoted, generation)

    def _run_template(self, messages: Sequence[Message], generation: bool) -> str:
        try:
            return self._jinja.render(messages=messages, add_generation_prompt=generation)
        except Exception as error:  # a template can fail with any error
            raise UserError(f"{self.where}: the chat template fails ({error})") from None

    def _quote(self, text: str) -> str:
        """Break up the control tokens in a text of which none is meant as one. Not empty: some
        templates write another header before an empty answer than before a generated one."""
        return self._quoted.sub(lambda match: BREAK.join(match[0]) + BREAK, text) or BREAK

    def _split(self, rendered: str) -> list[Piece]:
        """Whole control tokens, and the texts between them with their quotes repaired."""
        return [
            Piece(re.sub(f"{BREAK}({BREAK}?)", r"\1", text), self.control_ids.get(text))
            for text in filter(None, self._controls.split(rendered))
        ]

    def _compile_template(self) -> Template:
        def refuse(message: str):
            raise UserError(f"{self.where}: the chat template refuses the messages: {message}")

        env = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        env.globals.update(self.special_tokens, tools=None, documents=None, raise_exception=refuse)
        env.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
        # TRL marks what is learned: {% generation %} ... {% endgeneration %}. A scope, like `with`.
        unmarked = re.sub(r"({%[-+]?\s*(?:end)?)generation\b", r"\1with", self.template)
        try:
            return env.from_string(unmarked)
        except TemplateError as error:
            raise UserError(f"{self.where}: broken chat template ({error})") from None

    def _encode(self, segments: list[list[Piece]]) -> list[list[int]]:
        """Token ids of each segment. One batch call, so that all cores encode."""
        texts = [p.text for pieces in segments for p in pieces if p.control_id is None]
        encoded = iter(self.tokenizer.encode_batch_fast(texts, add_special_tokens=False))

        def ids(piece: Piece) -> list[int]:
            return next(encoded).ids if piece.control_id is None else [piece.control_id]

        return [list(chain.from_iterable(map(ids, pieces))) for pieces in segments]
