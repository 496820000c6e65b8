"""redi/data/tokenizer.py against transformers' and TRL's tokenization of conversations."""

import json
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from small_run import assistant, refusal, user
from small_template import chatml
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors

from redi.data.formats import to_example
from redi.data.tokenizer import ChatTokenizer, TokenizedRow

# In the manner of Qwen2.5-Math's: a system prompt of its own, several kinds of turn.
MATH_TEMPLATE = r"""{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}
{%- else %}
    {{- '<|im_start|>system\nPlease put your final answer within \\boxed{}.<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}
            {{- '\n' + message.content }}
        {%- endif %}
        {{- '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""
# Indented, and without the dashes that would cut the white space around each tag.
INDENTED_TEMPLATE = """{% for message in messages %}
    {% if message.role == 'user' %}
<|im_start|>user
{{ message.content }}<|im_end|>
    {% else %}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
"""
# In the manner of DeepSeek-R1-Distill's: it thinks first, and forgets what earlier turns thought.
R1_TEMPLATE = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}"
    "{% endif %}{% set ns = namespace(system='') %}{%- for message in messages %}"
    "{%- if message['role'] == 'system' %}{% set ns.system = message['content'] %}{%- endif %}"
    "{%- endfor %}{{bos_token}}{{ns.system}}{%- for message in messages %}"
    "{%- if message['role'] == 'user' %}"
    "{{'<｜User｜>' + message['content']}}{%- endif %}"  # noqa: RUF001
    "{%- if message['role'] == 'assistant' and message['content'] is not none %}"
    "{% set content = message['content'] %}{% if '</think>' in content %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{'<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>'}}"  # noqa: RUF001
    "{%- endif %}{%- endfor -%}"
    "{% if add_generation_prompt %}{{'<｜Assistant｜><think>\\n'}}{% endif %}"  # noqa: RUF001
)
TEMPLATES = {
    "chatml with the paper's system prompt": chatml(),
    "chatml with another": chatml('Say "hi",\nthen stop.'),
    "chatml without": chatml(system=None),
    "Qwen2.5-Math": MATH_TEMPLATE,
    "indented": INDENTED_TEMPLATE,
}
CONTROLS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

PIECES = ["\n", "\n\n", " ", "  ", "\t", "<think>\n", "</think>", "Compute", "\\boxed{2}", "6-1=5"]
ODD_PIECES = [
    "é", "e\u0301", "\u0301", "的", "🧮", "\u2028", "<|", "im_end|>", "<|im_end", "{{ x }}",
]  # fmt: skip
pieces = st.sampled_from([*PIECES, *ODD_PIECES])
texts = st.lists(pieces | st.text(max_size=5), max_size=8).map("".join)
contents = texts.filter(lambda text: not any(control in text for control in CONTROLS))

SYSTEM = {"role": "system", "content": "Be brief."}


def both_of(folder: Path) -> tuple:
    """(our tokenizer, transformers' own) of one folder."""
    from transformers import AutoTokenizer

    return ChatTokenizer.from_folder(folder), AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module", params=TEMPLATES)
def both(request, save_tokenizer, tmp_path_factory):
    return both_of(save_tokenizer(tmp_path_factory.mktemp("chat"), TEMPLATES[request.param]))


def row_of(chat: ChatTokenizer, question: str, answer: str) -> TokenizedRow:
    [row] = chat.encode_rows([([user(question)], assistant(answer))])
    return row


def whole(theirs, *messages: dict[str, str], generate: bool = False) -> list[int]:
    """transformers' ids of a conversation."""
    settings = {"add_generation_prompt": generate, "return_dict": True}
    return theirs.apply_chat_template(messages, **settings)["input_ids"]


# ---------------------------------------------------------------- the ids of the whole string


@settings(max_examples=150, deadline=None)
@given(question=contents, answer=contents)
@example(question=" \n leads and trails \n\n", answer=" leads and trails \n\n")
@example(question="", answer="")
@example(question="\u0301", answer="\u0301 combining first")
def test_rows_equal_transformers_up_to_the_stop_token(both, question, answer):
    ours, theirs = both
    blank = answer[: len(answer) - len(answer.lstrip())]
    # A newline first is the exception below. Before nothing, the Math template's header differs.
    if not answer or "\n" in blank or "\r" in blank:
        answer = "." + answer
    row = row_of(ours, question, answer)
    ids = whole(theirs, user(question), assistant(answer))
    last = len(ids) - ids[::-1].index(ours.stop_id)
    assert row.prompt_ids + row.response_ids == ids[:last]


@settings(max_examples=100, deadline=None)
@given(st.lists(contents, min_size=1, max_size=4), st.booleans())
def test_prompts_of_several_turns_equal_transformers(both, turns, has_system):
    ours, theirs = both
    messages = [(user, assistant)[i % 2](text or ".") for i, text in enumerate(turns)]
    messages = [SYSTEM] * has_system + messages
    assert ours.encode_prompt(messages) == whole(theirs, *messages, generate=True)


@settings(max_examples=100, deadline=None)
@given(question=texts, answer=texts)
def test_training_sees_the_prompt_of_generation_and_decodes_to_the_text(both, question, answer):
    ours, _ = both
    row = row_of(ours, question, answer)
    assert row.prompt_ids == ours.encode_prompt([user(question)])
    assert row.response_ids[-1] == ours.stop_id
    # Qwen2's tokenizer composes accents before anything else.
    assert ours.decode(row.response_ids[:-1]) == normalizers.NFC().normalize_str(answer)


def test_a_response_that_begins_with_a_newline_does_not_merge_with_the_header(both):
    """The one difference from the whole string, where two newlines are one token: a model that
    generates after the header cannot write that token."""
    ours, theirs = both
    row, ids = row_of(ours, "?", "\nyes"), whole(theirs, user("?"), assistant("\nyes"))
    assert row.prompt_ids == ours.encode_prompt([user("?")])
    assert row.prompt_ids + row.response_ids != ids[: len(row.prompt_ids + row.response_ids)]
    assert ours.decode(row.prompt_ids + row.response_ids) + "\n" == ours.decode(ids)


# ---------------------------------------------------------------- TRL's ids and masks

# TRL needs to be shown where the answers are.
GENERATION = chatml().replace(
    "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}",
    "{{ '<|im_start|>' + m['role'] + '\\n' }}{%- if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{%- else %}"
    "{{ m['content'] + '<|im_end|>' }}{%- endif %}{{ '\\n' }}",
)
ANSWERS = ["<think>\n6-1=5\n\n</think>\n\n\\boxed{2}", " leads", "trails \n\n", "é 的 🧮"]
SINGLE = [{"prompt": [user("6-1=?\n")], "completion": [assistant(text)]} for text in ANSWERS]
TURNS = [user("1+1?"), assistant("2"), user("And 1 more?"), assistant("3")]
SEVERAL = [{"messages": TURNS}, {"messages": TURNS[:2]}]
PAIR = {"prompt": TURNS[:1], "chosen": TURNS[1:2], "rejected": TURNS[3:]}
IMPLICIT_PAIR = {"chosen": TURNS[:2], "rejected": [TURNS[0], TURNS[3]]}


def prepared_by_trl(folder: Path, theirs, row: dict, generation: str | None = None) -> dict:
    """TRL's own preparation of a row, without the rest of its trainers."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    settings = {"output_dir": str(folder), "max_length": None, "use_cpu": True, "bf16": False}
    data, trainer = Dataset.from_list([row]), SimpleNamespace(_tokenizer=theirs)
    if "chosen" in row:
        [found] = DPOTrainer._prepare_dataset(trainer, data, theirs, DPOConfig(**settings), "train")
        return found
    trainer.chat_template, trainer.completion_only_loss = generation, generation is None
    arguments = SFTConfig(**settings, assistant_only_loss=generation is not None)
    prepare = SFTTrainer._prepare_dataset
    [found] = prepare(trainer, data, theirs, arguments, False, None, "train")
    return found


@pytest.mark.parametrize(
    ("template", "generation", "rows"),
    [
        (chatml(), None, SINGLE),
        (MATH_TEMPLATE, None, SINGLE),
        (chatml(), GENERATION, SEVERAL),
        (GENERATION, GENERATION, SEVERAL),
    ],
)
def test_tokens_and_mask_of_sft_are_trls(save_tokenizer, tmp_path, template, generation, rows):
    ours, theirs = both_of(save_tokenizer(tmp_path, template))
    for row in rows:
        example = to_example(row, "x", "rows")
        [found] = ours.encode_rows([(example.prompt, example.responses[0])])
        expected = prepared_by_trl(tmp_path, theirs, row, generation)
        # TRL also learns the newline after the stop token.
        ids = found.prompt_ids + found.response_ids
        assert ours.decode(expected["input_ids"][len(ids) :]) == "\n"
        assert ids == expected["input_ids"][: len(ids)]
        supervised = [label != -100 for label in expected["labels"][: len(ids)]]
        learned = found.learned or [True] * len(found.response_ids)
        assert supervised == [False] * len(found.prompt_ids) + learned
        assert (found.learned is None) == (row != SEVERAL[0])


@pytest.mark.parametrize("row", [PAIR, IMPLICIT_PAIR])
@pytest.mark.parametrize("template", [chatml(), MATH_TEMPLATE])
def test_tokens_of_pairs_are_trls(save_tokenizer, tmp_path, template, row):
    ours, theirs = both_of(save_tokenizer(tmp_path, template))
    expected, example = prepared_by_trl(tmp_path, theirs, row), to_example(row, "x", "pairs")
    found = ours.encode_rows([(example.prompt, response) for response in example.responses])
    for side, one in zip(("chosen", "rejected"), found, strict=True):
        assert one.prompt_ids == expected["prompt_ids"]
        ids = expected[f"{side}_ids"]
        assert one.response_ids == ids[: len(one.response_ids)]
        assert ours.decode(ids[len(one.response_ids) :]) == "\n"


# ---------------------------------------------------------------- text stays text


MARKERS = ["\ue0f0", "\ue0f00\ue0f1", "\ue0f01\ue0f1 {}"]  # as in our own rendering


@pytest.mark.parametrize("around", ["{}", "a{}b", " {} ", "\n{}\n", "{0}{0}", *MARKERS])
def test_a_control_token_in_a_content_is_text(both, around):
    ours, _ = both
    plain = row_of(ours, "plain", "plain")
    controls = set(ours.control_ids.values())
    for control in CONTROLS:
        quoting = around.format(control)
        row = row_of(ours, quoting, quoting)
        assert not controls & set(row.response_ids[:-1])
        assert ours.decode(row.response_ids[:-1]) == quoting
        written = [i for i in row.prompt_ids if i in controls]
        assert written == [i for i in plain.prompt_ids if i in controls]
        prompt = ours.decode(plain.prompt_ids).replace("plain", quoting)
        assert ours.decode(row.prompt_ids) == prompt


# ---------------------------------------------------------------- the thinking prefix


@pytest.mark.parametrize("question", ["?", "what is <think>"])
@pytest.mark.parametrize("trace", ["Okay", "6-1=5\n</think>", " so"])
def test_the_prefix_is_tokenized_as_in_training(both, question, trace):
    ours, _ = both
    row = row_of(ours, question, f"<think>\n{trace}")
    prompt = ours.encode_prompt([user(question)], prefix="<think>\n")
    assert (row.prompt_ids + row.response_ids)[: len(prompt)] == prompt
    assert ours.decode(prompt).endswith(f"{question}<|im_end|>\n<|im_start|>assistant\n<think>\n")


@pytest.mark.parametrize("written", ["<think>\n", "<think>", "<think>\n\n"])
@pytest.mark.parametrize("special", [False, True])
def test_a_prefix_that_the_template_writes_is_not_doubled(tokenizer_json, written, special):
    tokenizer = Tokenizer.from_str(tokenizer_json)
    tokenizer.add_tokens([AddedToken("<think>", special=special, normalized=False)])
    header = "<|im_start|>assistant\n"
    template = chatml(system=None).replace(repr(header).replace('"', "'"), repr(header + written))
    chat = ChatTokenizer(tokenizer, template)
    prompt = chat.decode(chat.encode_prompt([user("?")], prefix="<think>\n"))
    assert prompt.endswith(header + written)


# ---------------------------------------------------------------- templates


def per_message(turn: str) -> str:
    return "{% for m in messages %}" + turn + "{% endfor %}"


REFUSED = [
    (per_message("{{ m['role'] }}: {{ m['content'] }}\n"), "no stop token"),
    (per_message("{{ m['content'] }}</s>"), "no stop token"),
    (per_message("{{ m['content'] }}"), "no stop token"),
    ("{{ messages[0]['content'] }}<|im_end|>", "drops, repeats or moves"),
    (per_message("{{ m['content'] * 2 }}<|im_end|>"), "drops, repeats or moves"),
    ("{% for m in messages | reverse %}{{ m['content'] }}<|im_end|>{% endfor %}", "moves"),
    ("{{ raise_exception('never') }}", "refuses the messages: never"),
    ("{% for m in messages %}{{ m['content'] }}", "broken chat template"),
    (per_message("{{ m.content }}{{ m.tool.name }}<|im_end|>"), "chat template"),
    (per_message("{{ m.content | shout }}<|im_end|>"), "broken chat template"),
]


FILES = [
    ("tokenizer.json", None, "no such file"),
    ("tokenizer.json", "{", "not a tokenizer"),
    ("tokenizer_config.json", "{", "not readable as JSON"),
    ("tokenizer_config.json", "[1]", "expected a JSON object"),
    ("tokenizer_config.json", "{}", "no chat template"),
    ("tokenizer_config.json", '{"chat_template": 5}', "no chat template"),
    ("tokenizer_config.json", '{"chat_template": {"default": "x"}}', "no chat template"),
    ("tokenizer_config.json", '{"chat_template": [1]}', "not text"),
    ("tokenizer_config.json", '{"bos_token": {"x": 1}}', "not text"),
    *(("chat_template.jinja", template, message) for template, message in REFUSED),
]


@pytest.mark.parametrize(("name", "content", "message"), FILES)
def test_a_file_that_cannot_be_used_is_one_line(save_tokenizer, tmp_path, name, content, message):
    path = save_tokenizer(tmp_path) / name
    path.unlink() if content is None else path.write_text(content)
    error = refusal(ChatTokenizer.from_folder, tmp_path)
    assert error.startswith(f"{tmp_path}: " if "jinja" in name else str(tmp_path))
    assert message in error


def test_a_control_token_may_begin_like_another(tokenizer_json):
    tokenizer = Tokenizer.from_str(tokenizer_json)
    tokenizer.add_special_tokens(["<|im_end|><|im_end|>"])
    chat = ChatTokenizer(tokenizer, per_message("{{ m['content'] }}<|im_end|><|im_end|>"))
    assert chat.token(chat.stop_id) == "<|im_end|><|im_end|>"


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word"])
def test_a_control_token_that_depends_on_its_neighbors_is_refused(tokenizer_json, flag):
    tokenizer = Tokenizer.from_str(tokenizer_json)
    tokenizer.add_special_tokens([AddedToken("<|end|>", **{flag: True})])
    assert refusal(ChatTokenizer, tokenizer, chatml()).startswith("tokenizer: <|end|> has lstrip")


@pytest.mark.parametrize(
    "part",
    [
        pre_tokenizers.ByteLevel(add_prefix_space=True),
        pre_tokenizers.Metaspace(prepend_scheme="first"),
        pre_tokenizers.Metaspace(prepend_scheme="always"),
        normalizers.Prepend("▁"),
    ],
)
def test_a_tokenizer_that_begins_texts_with_a_blank_is_refused(part):
    tokenizer = Tokenizer(models.BPE({"▁": 0, "Ġ": 1, "x": 2}, []))
    is_normalizer = isinstance(part, normalizers.Normalizer)
    setattr(tokenizer, "normalizer" if is_normalizer else "pre_tokenizer", part)
    assert "adds a blank before texts" in refusal(ChatTokenizer, tokenizer, chatml())


def test_truncation_and_padding_of_a_tokenizer_are_ignored_as_in_transformers(
    tokenizer_json, save_tokenizer, tmp_path
):
    tokenizer = Tokenizer.from_str(tokenizer_json)
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding()
    tokenizer.save(str(save_tokenizer(tmp_path, MATH_TEMPLATE) / "tokenizer.json"))
    assert_rows_are_those_of_transformers(tmp_path)


ADDED = {"content": "<|im_end|>", "special": True}


@pytest.mark.parametrize(
    ("name", "eos"),
    [
        ("tokenizer_config.json", "<|im_end|>"),
        ("tokenizer_config.json", {"__type": "AddedToken", **ADDED}),
        ("special_tokens_map.json", "<|im_end|>"),
        ("special_tokens_map.json", ADDED),
    ],
)
def test_templates_see_the_special_tokens_and_no_tools(save_tokenizer, tmp_path, name, eos):
    template = (
        "{{ bos_token }}{% if tools is not none or documents is not none %}tools{% endif %}"
        + per_message("{{ m['role'] + ':' + m['content'] + eos_token }}")
        + "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    tokens = {"bos_token": "<|endoftext|>", "eos_token": eos}
    if name == "tokenizer_config.json":
        save_tokenizer(tmp_path, template, **tokens)
    else:
        save_tokenizer(tmp_path, template).joinpath(name).write_text(json.dumps(tokens))
    ours, theirs = both_of(tmp_path)
    row, ids = row_of(ours, "?", "!"), whole(theirs, user("?"), assistant("!"))
    assert row.prompt_ids + row.response_ids == ids
    assert ours.decode(ids) == "<|endoftext|>user:?<|im_end|>assistant:!<|im_end|>"


def test_of_several_templates_the_default_one_is_used(save_tokenizer, tmp_path):
    other = {"name": "tool_use", "template": "{{ raise_exception('not this one') }}"}
    default = {"name": "default", "template": MATH_TEMPLATE}
    assert_rows_are_those_of_transformers(save_tokenizer(tmp_path, [other, default]))


def test_a_template_file_overrides_the_settings(save_tokenizer, tmp_path):
    save_tokenizer(tmp_path, chatml()).joinpath("chat_template.jinja").write_text(MATH_TEMPLATE)
    assert_rows_are_those_of_transformers(tmp_path)


def test_a_tokenizer_saved_by_transformers_is_read(save_tokenizer, tmp_path):
    _, theirs = both_of(save_tokenizer(tmp_path, MATH_TEMPLATE))
    theirs.save_pretrained(tmp_path)
    assert "chat_template" not in json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert_rows_are_those_of_transformers(tmp_path)


def assert_rows_are_those_of_transformers(folder: Path) -> None:
    """And the template is the Math one."""
    ours, theirs = both_of(folder)
    row, ids = row_of(ours, "6-1=?\n", "5"), whole(theirs, user("6-1=?\n"), assistant("5"))
    assert row.prompt_ids + row.response_ids == ids[: len(row.prompt_ids + row.response_ids)]
    assert "Please put your final answer" in ours.decode(ids)


# ---------------------------------------------------------------- other families of templates


FAMILIES = ["qwen2_5", "qwen3", "llama3"]  # templates that the installed trl has


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tokenizer_json, save_tokenizer, tmp_path_factory):
    """(our tokenizer with a model's template, transformers' with TRL's training template of it)"""
    templates = files("trl") / "chat_templates"
    folder = save_tokenizer(
        tmp_path_factory.mktemp("family"),
        (templates / f"{request.param}.jinja").read_text(),
        bos_token="<|begin_of_text|>",
    )
    tokenizer = Tokenizer.from_str(tokenizer_json)
    headers = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer.add_special_tokens(headers)
    tokenizer.add_tokens([AddedToken(tag, normalized=False) for tag in ("<think>", "</think>")])
    tokenizer.save(str(folder / "tokenizer.json"))
    ours, theirs = both_of(folder)
    theirs.chat_template = (templates / f"{request.param}_training.jinja").read_text()
    return ours, theirs


thoughts = st.sampled_from(["{}", "<think>\n{}\n</think>\n\n5", "<think>\n{}</think>5"])


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(contents, contents, thoughts), min_size=1, max_size=3), st.booleans())
@example([(" \n leads and trails \n", " leads and trails \n", "{}")], True)
def test_rows_of_a_family_equal_trls_training_template(family, turns, has_system):
    """With one difference: TRL also learns newlines of the template, after the stop token of every
    answer and in Qwen2.5's header, which a model never generates."""
    ours, theirs = family
    messages = [SYSTEM] * has_system
    for question, answer, thought in turns:
        messages += [user(question), assistant(thought.format("." + answer))]
    first = len(messages) - 2 * len(turns) + 1
    [row] = ours.encode_rows([(messages[:first], messages[first:])])
    ids = row.prompt_ids + row.response_ids
    expected = theirs.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    assert ids == expected["input_ids"][: len(ids)]
    learned = row.learned or [True] * len(row.response_ids)
    for token, ours_learns, trl_learns in zip(
        ids, [False] * len(row.prompt_ids) + learned, expected["assistant_masks"]
    ):
        assert ours_learns == trl_learns or (trl_learns and ours.decode([token]) == "\n")


@pytest.fixture(scope="module")
def distilled(tokenizer_json, save_tokenizer, tmp_path_factory):
    """(our tokenizer, transformers' own) with R1's control tokens, of which few are special."""
    begin, end = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"  # noqa: RUF001
    folder = save_tokenizer(
        tmp_path_factory.mktemp("distilled"), R1_TEMPLATE, bos_token=begin, eos_token=end
    )
    tokenizer = Tokenizer.from_str(tokenizer_json)
    tokenizer.add_special_tokens([AddedToken(begin), AddedToken(end)])
    roles = ["<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"]  # noqa: RUF001
    tokenizer.add_tokens([AddedToken(role, normalized=False) for role in roles])
    # Such tokenizers put the begin token before every text that is not a conversation's.
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, tokenizer.token_to_id(begin))]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return both_of(folder)


@settings(max_examples=50, deadline=None)
@given(contents)
def test_an_r1_distilled_prompt_equals_transformers(distilled, question):
    ours, theirs = distilled
    for messages in ([user(question)], [SYSTEM, user(question)]):
        ids = whole(theirs, *messages, generate=True)
        assert ours.encode_prompt(messages, prefix="<think>\n") == ids


def test_an_r1_distilled_tokenizer_stops_and_is_refused_for_training(distilled):
    ours, theirs = distilled
    assert ours.stop_id == theirs.eos_token_id
    message = refusal(row_of, ours, "?", "<think>\n</think>\n!")
    assert "training would not match generation" in message
