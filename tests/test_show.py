"""python -m redi.show: numbers worked by hand, hostile texts, masks, errors in one line."""

import hashlib
import html.parser
import re
import unicodedata
from collections import Counter
from importlib.resources import files
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from processes import main_in_this_process
from small_run import assistant, user, write_jsonl
from tokenizers import Tokenizer

from redi.data.tokenizer import ChatTokenizer
from redi.recipe import REDIConfig, SFTConfig
from redi.show import __main__ as show
from redi.show.rows import about_template, tokens_of, visible


def pair(problem: str, chosen: str, rejected: str, **fields) -> dict:
    sides = {"chosen": [assistant(chosen)], "rejected": [assistant(rejected)]}
    return {"prompt": [user(problem)], **sides, **fields}


def positive(problem: str, response: str, **fields) -> dict:
    return {"prompt": [user(problem)], "completion": [assistant(response)], **fields}


PAIRS = [
    pair("1+1?", "<think>\n</think>\n\\boxed{2}", "<think>\nI am lost", source="a"),
    pair("1+1?", "<think>\n</think>\n\\boxed{2}", "\\boxed{3}", source="a"),
    pair("1+2?", "<think>\n</think>\n2", "\\boxed{\\boxed{4}}", source="b"),
    pair("2+2?", "x" * 9, "y" * 9),
]
SYSTEM_LINE = r"adds 'system\nPlease reason step by step, and put your final answer [...]"
HOSTILE = (
    "</script><script>alert(1)</script>&lt;<|im_end|>\x1b[2J\x00\r\u202e\ue000\ufffd <b a='\"'>"
)


@pytest.fixture(scope="module")
def model(save_tokenizer, tmp_path_factory) -> Path:
    """A folder with nothing but a tokenizer."""
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def chat(model) -> ChatTokenizer:
    return ChatTokenizer.from_folder(model)


@pytest.fixture
def shown(model, tmp_path, monkeypatch, capsys):
    """shown(rows or file, flags...) -> stdout of the program, or stderr where it fails."""
    monkeypatch.chdir(tmp_path)

    def run(data, *flags: object, status: int = 0) -> str:
        file = write_jsonl(Path("p.jsonl"), data) if isinstance(data, list) else data
        given = (file, "--model", model, "--cache", "cache", *flags)
        ended = main_in_this_process(show.main, *given)
        out, err = capsys.readouterr()
        assert ended == status, err
        return err if status else out

    return run


def cells(table: str) -> dict[str, list[str]]:
    """First word of a line -> the others."""
    return {line.split()[0]: line.split()[1:] for line in table.splitlines() if line.split()}


# ---------------------------------------------------------------- numbers


def test_step_size_and_limits_are_those_of_the_training_programs_unless_given():
    config = show.ShowConfig(file="rows.jsonl")
    assert config.training("rows") == SFTConfig(data="rows.jsonl")
    for kind in ("pairs", "labeled rows"):
        assert config.training(kind) == REDIConfig(data="rows.jsonl")
    assert show.ShowConfig(file="x", max_prompt=7).training("pairs").max_prompt == 7


def test_a_report_of_four_pairs(shown):
    report = shown(PAIRS)
    lines, data = cells(report), Path("p.jsonl").read_bytes()
    assert "\n  p.jsonl: 4 pairs for train_redi.py, " in report
    assert lines["sha256"] == [hashlib.sha256(data).hexdigest()]
    assert (lines["a"], lines["b"]) == (["2", "50.0%"], ["1", "25.0%"])
    assert "\n(no source named)     1  25.0%\n" in report
    # The third chosen has no box, the first rejected neither; the fourth have none.
    assert "\n  chosen: 75.0% with </think>, 50.0% with \\boxed{}\n" in report
    assert "\n  rejected: 0.0% with </think>, 50.0% with \\boxed{}\n" in report
    assert "prompts: 25.0% repeat an earlier one" in report
    assert "1 optimizer steps of 32 rows" in report


def test_a_report_of_long_names_and_many_sources_fits_a_screen(shown):
    rows = [positive(f"{i}?", "\\boxed{1}", source=f"s{i % 30}" * 99) for i in range(60)]
    report = shown(rows, "--rows-per-step", 32)
    assert "20 others" in report
    assert "10 optimizer steps of 32 rows (2 per epoch, 5 epochs)" in " ".join(report.split())
    assert report[: report.index("Row 1")].count("\n") <= 40
    assert max(map(len, report.splitlines())) <= 100


def test_token_quantiles_are_lengths_that_occur(shown):
    """A digit is a token, and so is the stop token at the end of a response."""
    rows = [pair("?" + "1" * n, "1", "2" * m) for n, m in ((1, 5), (2, 3), (1, 24))]
    table = cells(shown(rows))
    #                            total  min  median  p90   p99   max
    assert table["chosen"] == ["6", "2", "2", "2", "2", "2"]
    assert table["rejected"] == ["35", "4", "6", "25", "25", "25"]
    total, least, *quantiles = map(int, table["prompt"])
    assert (total, quantiles) == (3 * least + 1, [least, least + 1, least + 1, least + 1])


def test_all_rows_over_a_limit_are_still_described(shown):
    report = shown(PAIRS, "--max-prompt", 3)
    assert "no row is left to train on (4 prompt over 3 tokens)" in " ".join(report.split())


# ---------------------------------------------------------------- the row with its mask


def test_a_row_is_drawn_with_its_mask(shown):
    report = shown([PAIRS[0], pair("1+1?\n<|im_end|>", "So\n\n2\n", "3")], "--row", 2)
    drawn = report[report.index("Row 2: ") :].splitlines()
    assert drawn == [
        "Row 2: + is made more likely, - less",
        "    | «<|im_start|>»system",
        "    | Please reason step by step, and put your final answer within \\boxed{}.«<|im_end|>»",
        "    | «<|im_start|>»user",
        "    | 1+1?",
        "    | <|im_end|>«<|im_end|>»",
        "    | «<|im_start|>»assistant",
        "  + | So",
        "  + |",
        "  + | 2",
        "  + | «<|im_end|>»",
        "  - | 3«<|im_end|>»",
        f"  template: {SYSTEM_LINE}",
    ]


def test_a_long_response_is_shortened_in_the_middle(shown):
    """Of 1,000 digits, each a token, and the stop token: 120 at the beginning, 60 at the end."""
    report = shown([positive("?", "12345" * 200)])
    learned = [line[6:] for line in report.splitlines() if line.startswith("  + | ")]
    assert "[... 821 tokens left out ...]" in learned
    assert sum(len(line) for line in learned if line[0] != "[") == 120 + 59 + len("«<|im_end|>»")
    assert all(len(line) <= 94 for line in learned)


def test_of_several_turns_only_the_answers_are_learned_from(shown):
    turns = [user("a"), assistant("b"), user("c"), assistant("d")]
    rows = [{"messages": turns}, {"messages": turns[:2]}]
    report = shown(rows, "--html", "p.html", "--max-response", 4)
    # 4 tokens of the first row are learned from, but the turn between them counts too.
    assert "left out: 1 response over 4 tokens" in " ".join(report.split())
    text = Path("p.html").read_text(encoding="utf-8")
    captions = [text for text in Page(text).texts if ", not learned from" in text]
    assert len(captions) == 2 + 1  # two prompts, and a turn between answers
    between = captions[1].split()[-2]  # its tokens; nothing is left out of the second row
    assert cells(report)["between"] == [between, "0", "0", *[between] * 3]
    tokens = positions(opened(text))
    assert tokens == [*range(len(tokens))]  # each once, in all four stretches
    assert report.splitlines()[-8:-1] == [
        "  + | b«<|im_end|>»",
        "    |",
        "    | «<|im_start|>»user",
        "    | c«<|im_end|>»",
        "    | «<|im_start|>»assistant",
        "  + | d«<|im_end|>»",
        f"  template: {SYSTEM_LINE}",
    ]


@given(
    st.text(max_size=30) | st.lists(st.sampled_from(["🧮", "é", "\ufffd", "a", "的"])).map("".join)
)
def test_tokens_give_the_text_again(chat, text):
    ids = chat.tokenizer.encode(text).ids
    found = list(tokens_of(ids, chat))
    normal = unicodedata.normalize("NFC", text)  # as Qwen2's tokenizer normalizes
    assert "".join(shown for shown, _, _ in found) == normal
    assert [i for _, its_ids, _ in found for i in its_ids] == ids


# ---------------------------------------------------------------- what the template did

QWEN = r"adds 'system\nYou are Qwen, created by Alibaba Cloud. You are a helpful [...]"
DATE = "adds 'Cutting Knowledge Date: December 2023\\nToday Date: 26 Jul 2024'"
THOUGHT = "adds '<think>\\n\\n</think>'"
OLD = [user("1?"), assistant("<think>\nold\n</think>\n\n1"), user("2?")]
DONE = [  # a template that the installed trl has, a row, the lines
    ("qwen2_5", positive(" 1 \n", "\n 2 "), [QWEN]),
    ("qwen3", positive("1?", "2"), [THOUGHT]),
    ("qwen3", positive("1?", "<think>\nmy\n</think>\n\n<|im_end|>e\u0301"), []),
    ("qwen3", positive("1?", "<think>my</think>2"), ["message 2 (assistant) is rewritten"]),
    (
        "qwen3",
        {"prompt": OLD, "completion": [assistant("<think>\nmy\n</think>\n\n2")]},
        ["message 2 (assistant) loses 22 characters at its beginning, 0 at its end"],
    ),
    (
        "llama3",
        pair("user", "\n\n2", "3 \t\n"),
        [
            "message 2 (chosen) loses 2 characters at its beginning, 0 at its end",
            "message 2 (rejected) loses 0 characters at its beginning, 3 at its end",
        ],
    ),
    ("llama3_1", positive("26", "Jul"), [DATE]),
]


@pytest.mark.parametrize(("template", "row", "lines"), DONE)
def test_what_a_template_did_to_a_row_is_said_below_it(
    shown, template, row, lines, tokenizer_json, save_tokenizer, tmp_path
):
    text = (files("trl") / "chat_templates" / f"{template}.jinja").read_text()
    folder = save_tokenizer(tmp_path / "model", text, bos_token="<|begin_of_text|>")
    tokenizer = Tokenizer.from_str(tokenizer_json)
    headers = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer.add_special_tokens(headers)
    tokenizer.save(str(folder / "tokenizer.json"))
    other = PAIRS[0] if "chosen" in row else positive("?", "!")
    report = shown([other, row], "--model", folder, "--row", 2)
    found = [line for line in report.splitlines() if line.startswith("  template: ")]
    assert found == [f"  template: {line}" for line in lines]


@given(st.text(), st.text())
def test_of_messages_that_a_template_writes_as_they_are_nothing_is_said(chat, question, answer):
    turns = [user(question), assistant(answer), user(answer), assistant(question)]
    for prompt, response in [(turns[:1], turns[1:]), (turns[:3], turns[3:])]:
        assert [*about_template(prompt, response, "response", chat)] == [SYSTEM_LINE]


# ---------------------------------------------------------------- the page


class Page(html.parser.HTMLParser):
    """Counts elements, gathers text, and fails where an element is not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.texts, self.titles, self._open = Counter(), [], [], []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attributes):
        self.tags[tag] += 1
        self.titles += [value for name, value in attributes if name == "title"]
        if tag not in ("meta", "img"):
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def opened(text: str) -> Page:
    """The row that a page shows when it is opened."""
    return Page(text[text.index("<details open>") : text.index("</details>") + 10])


def positions(row: Page) -> list[int]:
    found = [re.fullmatch(r"token (\d+), id ([\d ]+)", title) for title in row.titles]
    return [int(f[1]) + i for f in found for i in range(len(f[2].split()))]


def test_hostile_texts_stay_texts(shown):
    row = pair(HOSTILE, f"a{HOSTILE}", f"b{HOSTILE}", source=HOSTILE, **{HOSTILE: HOSTILE})
    report = shown([row] * 2, "--html", "p.html")
    assert not set(report) - {"\n"} & {chr(code) for code in [*range(32), 0x202E, 0xE000]}
    text = Path("p.html").read_text(encoding="utf-8")
    page = Page(text)
    assert "script" not in page.tags
    assert "".join(page.texts).count(visible(HOSTILE)) >= 3
    assert not {"\x1b", "\x00"} & set(text)


def test_the_page_loads_nothing_and_shows_every_token_with_its_position_and_id(shown):
    rows = [PAIRS[0], pair("1+🧮?", "é🧮x", "的")]  # characters of several tokens
    shown(rows, "--html", "p.html", "--row", 2)
    text = Path("p.html").read_text(encoding="utf-8")
    page, row = Page(text), opened(text)
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert text.count("src=") == text.count('src="data:image/png;base64,') == page.tags["img"] == 1
    assert "url(http" not in text
    captions = [re.fullmatch(r".*, (\d+) tokens", text) for text in row.texts]
    prompt, chosen, rejected = (int(found[1]) for found in captions if found)
    assert row.texts[0] == f"Row 2, {chosen + rejected} response tokens"
    assert positions(row) == [*range(prompt + chosen), *range(prompt, prompt + rejected)]


def test_a_page_of_long_rows_stays_small_and_is_the_same_each_time(shown):
    rows = [pair("?" * 3000, "1" * n, "2" * (n + 1)) for n in range(20_000, 20_006)]
    shown(rows, "--html", "p.html")
    first = Path("p.html").read_bytes()
    assert len(first) < 500_000
    shown(rows, "--html", "p.html")
    assert Path("p.html").read_bytes() == first


# ---------------------------------------------------------------- errors

FIVE = [*PAIRS, pair("?", "same", "same")]
ERRORS = [
    ("data/pairs.jsonl", [], "`python -m redi prepare` makes it"),
    ("rows.jsonl", [], "no such file"),
    (FIVE, ["--row", 6], "--row 6: not among the 4 rows of p.jsonl that can be trained on"),
    (FIVE, ["--row", 5], "--row 5: not among the 4 rows of p.jsonl that can be trained on"),
    (FIVE, ["--row", 0], "--row 0: not among the 4 rows of p.jsonl"),
    (FIVE, ["--html", "nowhere/p.html"], "nowhere/p.html: cannot be written"),
    (FIVE, ["--html", "cache"], "cache: cannot be written (Is a directory)"),
    (FIVE, ["--html", "./p.jsonl"], "--html ./p.jsonl: would overwrite p.jsonl; choose another"),
    ([*PAIRS, positive("?", "!")], [], "p.jsonl:5: fields seen: prompt, completion; expected {"),
]


@pytest.mark.parametrize(("data", "flags", "expected"), ERRORS, ids=range(len(ERRORS)))
def test_an_error_is_one_line_that_says_what_to_do(shown, data, flags, expected):
    text = shown(data, *flags, status=2)
    assert text.startswith("error: ")
    assert text.count("\n") == 1
    assert expected in text


def test_rows_of_no_known_form_are_refused_before_they_are_tokenized(shown):
    error = shown([{"problem": "?", "response": "!", "correct": True}], status=2)
    assert "p.jsonl:1: fields seen: problem, response, correct; expected " in error
    pairs, rows = "{prompt, chosen, rejected} or {chosen, rejected}", "{prompt, completion}"
    assert f"{pairs} or {{prompt, completion, label}} or {rows} or {{messages}}" in error
    assert not Path("cache").exists()
