"""redi/data/tokenizer.py against transformers' and TRL's tokenization of conversations."""

from types import SimpleNamespace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from small_run import assistant, refusal, user
from tokenizers import AddedToken, Tokenizer, normalizers, processors

from redi.data.tokenizer import ChatTokenizer, chatml

# In the manner of Qwen2.5-Math's: a system prompt of its own, tools, several kinds of turn.
MATH_TEMPLATE = r"""{%- if tools %}
    {{- '<|im_start|>system\n' }}{{- tools | tojson }}{{- '<|im_end|>\n' }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>system\nPlease put your final answer within \\boxed{}.<|im_end|>\n' }}
    {%- endif %}
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


GENERATE = {"add_generation_prompt": True, "return_dict": True}
ADDED_TOKEN = {"__type": "AddedToken", "content": "<|im_end|>", "special": True}


def begins_with_a_newline(text: str) -> bool:
    """Whether text begins with white space that reaches over a line's end: the exception."""
    blank = text[: len(text) - len(text.lstrip())]
    return "\n" in blank or "\r" in blank


@pytest.fixture(scope="module", params=TEMPLATES)
def both(request, make_chat, tmp_path_factory):
    """(our tokenizer, transformers' own) of one folder."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("chat")
    ours = make_chat(folder, TEMPLATES[request.param])
    return ours, AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def chat(make_chat, tmp_path_factory) -> ChatTokenizer:
    return make_chat(tmp_path_factory.mktemp("chat"))


# ---------------------------------------------------------------- the ids of the whole string


@settings(max_examples=150, deadline=None)
@given(question=contents, answer=contents)
@example(question=" \n leads and trails \n\n", answer=" leads and trails \n\n")
@example(question="", answer="")
@example(question="\u0301", answer="\u0301 combining first")
def test_rows_equal_transformers_up_to_the_stop_token(both, question, answer):
    ours, theirs = both
    if begins_with_a_newline(answer):
        answer = "." + answer
    if not answer:  # the Math template writes another header before nothing
        answer = "."
    [row] = ours.encode_rows([([user(question)], assistant(answer))])
    whole = theirs.apply_chat_template([user(question), assistant(answer)], return_dict=True)
    last = len(whole["input_ids"]) - whole["input_ids"][::-1].index(ours.stop_id)
    assert row.prompt_ids + row.response_ids == whole["input_ids"][:last]


@settings(max_examples=100, deadline=None)
@given(st.lists(contents, min_size=1, max_size=4), st.booleans())
def test_prompts_of_several_turns_equal_transformers(both, turns, has_system):
    ours, theirs = both
    messages = [(user, assistant)[i % 2](text or ".") for i, text in enumerate(turns)]
    if has_system:
        messages.insert(0, {"role": "system", "content": "Be brief."})
    whole = theirs.apply_chat_template(messages, **GENERATE)
    assert ours.encode_prompt(messages) == whole["input_ids"]


@settings(max_examples=100, deadline=None)
@given(question=texts, answer=texts)
def test_training_sees_the_prompt_of_generation_and_a_response_decodes_to_its_text(
    both, question, answer
):
    ours, _ = both
    [row] = ours.encode_rows([([user(question)], assistant(answer))])
    assert row.prompt_ids == ours.encode_prompt([user(question)])
    assert row.response_ids[-1] == ours.stop_id
    # Qwen2's tokenizer composes accents before anything else.
    assert ours.decode(row.response_ids[:-1]) == normalizers.NFC().normalize_str(answer)


def test_rows_equal_those_of_trl(make_chat, tmp_path):
    """TRL's own preparation of {prompt, completion}, without the rest of its trainer."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    ours = make_chat(tmp_path, MATH_TEMPLATE)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    answers = ["<think>\n6-1=5\n\n</think>\n\n\\boxed{2}", " leads", "trails \n\n", "é 的 🧮"]
    examples = [{"prompt": [user("6-1=?\n")], "completion": [assistant(a)]} for a in answers]
    trainer = SimpleNamespace(_tokenizer=theirs, chat_template=None, completion_only_loss=True)
    arguments = SFTConfig(output_dir=str(tmp_path), max_length=None, use_cpu=True, bf16=False)
    prepared = SFTTrainer._prepare_dataset(
        trainer, Dataset.from_list(examples), theirs, arguments, False, None, "train"
    )
    rows = ours.encode_rows([(e["prompt"], e["completion"][0]) for e in examples])
    for row, their_row in zip(rows, prepared):
        # TRL also learns the newline after the stop token.
        assert row.prompt_ids + row.response_ids == their_row["input_ids"][: len(row)]
        supervised = [label != -100 for label in their_row["labels"][: len(row)]]
        assert supervised == [False] * len(row.prompt_ids) + [True] * len(row.response_ids)
        assert ours.decode(their_row["input_ids"][len(row) :]) == "\n"


def test_a_response_that_begins_with_a_newline_does_not_merge_with_the_header(both):
    """The one difference from the whole string, where two newlines are one token: a model that
    generates after the header cannot write that token."""
    ours, theirs = both
    [row] = ours.encode_rows([([user("?")], assistant("\nyes"))])
    whole = theirs.apply_chat_template([user("?"), assistant("\nyes")], return_dict=True)
    assert row.prompt_ids == ours.encode_prompt([user("?")])
    assert row.prompt_ids + row.response_ids != whole["input_ids"][: len(row)]
    assert ours.decode(row.prompt_ids + row.response_ids) + "\n" == ours.decode(whole["input_ids"])


# ---------------------------------------------------------------- text stays text


@pytest.mark.parametrize("around", ["{}", "a{}b", " {} ", "\n{}\n", "{0}{0}"])
def test_a_control_token_in_a_content_is_text(both, around):
    ours, _ = both
    [plain] = ours.encode_rows([([user("plain")], assistant("plain"))])
    controls = set(ours.control_ids.values())
    for control in CONTROLS:
        quoting = around.format(control)
        [row] = ours.encode_rows([([user(quoting)], assistant(quoting))])
        assert not controls & set(row.response_ids[:-1])
        assert ours.decode(row.response_ids[:-1]) == quoting
        written = [i for i in row.prompt_ids if i in controls]
        assert written == [i for i in plain.prompt_ids if i in controls]
        prompt = ours.decode(plain.prompt_ids).replace("plain", quoting)
        assert ours.decode(row.prompt_ids) == prompt


@pytest.mark.parametrize("content", ["\ue0f0", "\ue0f00\ue0f1", "\ue0f01\ue0f1 <|im_end|>"])
def test_a_content_that_looks_like_a_marker_is_text(chat, content):
    [row] = chat.encode_rows([([user(content)], assistant(content))])
    assert chat.decode(row.response_ids[:-1]) == content
    assert content in chat.decode(row.prompt_ids)


# ---------------------------------------------------------------- the thinking prefix


@pytest.mark.parametrize("trace", ["Okay", "6-1=5\n</think>", " so"])
def test_the_prefix_is_tokenized_as_in_training(both, trace):
    ours, _ = both
    [row] = ours.encode_rows([([user("?")], assistant(f"<think>\n{trace}"))])
    prompt = ours.encode_prompt([user("?")], prefix="<think>\n")
    assert (row.prompt_ids + row.response_ids)[: len(prompt)] == prompt
    assert ours.decode(prompt).endswith("<|im_start|>assistant\n<think>\n")


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


def test_a_prefix_in_the_question_does_not_stand_for_the_answers(chat):
    prompt = chat.encode_prompt([user("what is <think>")], prefix="<think>\n")
    assert chat.decode(prompt).endswith("<think><|im_end|>\n<|im_start|>assistant\n<think>\n")


# ---------------------------------------------------------------- templates


def test_a_control_token_may_begin_like_another(tokenizer_json):
    tokenizer = Tokenizer.from_str(tokenizer_json)
    tokenizer.add_special_tokens(["<|im_end|><|im_end|>"])
    chat = ChatTokenizer(tokenizer, per_message("{{ m['content'] }}<|im_end|><|im_end|>"))
    assert chat.token(chat.stop_id) == "<|im_end|><|im_end|>"


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


@pytest.mark.parametrize(("template", "message"), REFUSED)
def test_a_template_that_cannot_be_trained_on_is_refused(make_chat, tmp_path, template, message):
    error = refusal(make_chat, tmp_path, template)
    assert error.startswith(f"{tmp_path}: ")
    assert message in error


@pytest.mark.parametrize("eos", ["<|im_end|>", ADDED_TOKEN])
def test_templates_see_the_special_tokens_and_no_tools(make_chat, tmp_path, eos):
    from transformers import AutoTokenizer

    template = (
        "{{ bos_token }}{% if tools is not none or documents is not none %}tools{% endif %}"
        + per_message("{{ m['role'] + ':' + m['content'] + eos_token }}")
        + "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    chat = make_chat(tmp_path, template, bos_token="<|endoftext|>", eos_token=eos)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    whole = theirs.apply_chat_template([user("?"), assistant("!")], return_dict=True)
    [row] = chat.encode_rows([([user("?")], assistant("!"))])
    assert row.prompt_ids + row.response_ids == whole["input_ids"]
    assert chat.decode(whole["input_ids"]) == "<|endoftext|>user:?<|im_end|>assistant:!<|im_end|>"


def test_of_several_templates_the_default_one_is_used(make_chat, tmp_path):
    named = [
        {"name": "tool_use", "template": "{{ raise_exception('not this one') }}"},
        {"name": "default", "template": chatml(system="Default.")},
    ]
    chat = make_chat(tmp_path, named)
    assert "Default." in chat.decode(chat.encode_prompt([user("?")]))


def test_a_template_file_overrides_the_settings(save_tokenizer, tmp_path):
    from transformers import AutoTokenizer

    save_tokenizer(tmp_path, chatml(system="In the settings."))
    (tmp_path / "chat_template.jinja").write_text(chatml(system="In the file."))
    prompt = ChatTokenizer.from_folder(tmp_path).encode_prompt([user("?")])
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert prompt == theirs.apply_chat_template([user("?")], **GENERATE)["input_ids"]
    assert "In the file." in theirs.decode(prompt)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", None, "tokenizer.json: no such file"),
        ("tokenizer.json", "{", "not a tokenizer"),
        ("tokenizer_config.json", "{", "not a JSON object"),
        ("tokenizer_config.json", "[1]", "not a JSON object"),
        ("tokenizer_config.json", "{}", "no chat template"),
    ],
)
def test_a_broken_folder_is_one_line(save_tokenizer, tmp_path, name, content, message):
    save_tokenizer(tmp_path)
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_text(content)
    assert message in refusal(ChatTokenizer.from_folder, tmp_path)


def test_the_fingerprint_changes_with_what_changes_the_ids(make_chat, tmp_path):
    begin = {"bos_token": "<|endoftext|>"}
    cases = [(chatml(), {}), (chatml(), {}), (chatml(system=None), {}), (chatml(), begin)]
    prints = [make_chat(tmp_path, template, **s).fingerprint for template, s in cases]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


# ---------------------------------------------------------------- another family of templates


@pytest.fixture(scope="module")
def distilled(tokenizer_json, save_tokenizer, tmp_path_factory):
    """(our tokenizer, transformers' own) with R1's control tokens, of which few are special."""
    from transformers import AutoTokenizer

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
    return ChatTokenizer.from_folder(folder), AutoTokenizer.from_pretrained(folder)


@settings(max_examples=50, deadline=None)
@given(contents)
def test_an_r1_distilled_prompt_equals_transformers(distilled, question):
    ours, theirs = distilled
    for messages in ([user(question)], [{"role": "system", "content": "Hi"}, user(question)]):
        whole = theirs.apply_chat_template(messages, **GENERATE)
        assert ours.encode_prompt(messages, prefix="<think>\n") == whole["input_ids"]


def test_an_r1_distilled_tokenizer_stops_and_is_refused_for_training(distilled):
    ours, theirs = distilled
    assert ours.stop_id == theirs.eos_token_id
    message = refusal(ours.encode_rows, [([user("?")], assistant("<think>\n</think>\n!"))])
    assert "training would not match generation" in message


def test_a_tokenizer_that_transformers_saved_is_read_the_same(make_chat, tmp_path):
    from transformers import AutoTokenizer

    ours = make_chat(tmp_path / "ours", MATH_TEMPLATE)
    AutoTokenizer.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    assert "chat_template" not in (tmp_path / "theirs" / "tokenizer_config.json").read_text()
    again = ChatTokenizer.from_folder(tmp_path / "theirs")
    conversation = ([user("6-1=?\n")], assistant("<think>\n5\n</think>"))
    assert again.encode_rows([conversation]) == ours.encode_rows([conversation])
    assert again.stop_id == ours.stop_id
