"""python -m redi.show: numbers worked by hand, hostile texts, masks, errors in one line."""

import hashlib
import html.parser
import json
import re
import sys
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from redi import recipe
from redi.config import UserError
from redi.data.dataset import Limits
from redi.data.tokenizer import ChatTokenizer
from redi.packing import ATTENTION, TokenSequence
from redi.show import __main__ as show
from redi.show.facts import Training, about_tokens, about_training
from redi.show.rows import Stretch, Table, stretches, tables_as_text, tokens_of, visible


def messages(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def pair(problem: str, chosen: str, rejected: str, **fields) -> dict:
    return {
        "prompt": messages("user", problem),
        "chosen": messages("assistant", chosen),
        "rejected": messages("assistant", rejected),
        **fields,
    }


def positive(problem: str, response: str, **fields) -> dict:
    answer = messages("assistant", response)
    return {"prompt": messages("user", problem), "completion": answer, **fields}


PAIRS = [
    pair(
        "1+1?", "<think>\n</think>\n\\boxed{2}", "<think>\nI am lost", source="a", grade=1, id="1"
    ),
    pair("1+1?", "<think>\n</think>\n\\boxed{2}", "\\boxed{3}", source="a", grade=2, id="2"),
    pair("1+2?", "<think>\n</think>\n2", "\\boxed{\\boxed{4}}", source="b", grade=1, id="3"),
    pair("2+2?", "x" * 9, "y" * 9, grade=None, id="4"),
]
HOSTILE = (
    "</script><script>alert(1)</script>&lt;<|im_end|>\x1b[2J\x00\r\u202e\ue000\ufffd <b a='\"'>"
)


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def model(save_tokenizer, tmp_path_factory) -> Path:
    """A folder with nothing but a tokenizer."""
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def shown(model, tmp_path, monkeypatch, capsys):
    """shown(file, flags...) -> (exit status, stdout, stderr) of the program."""
    monkeypatch.chdir(tmp_path)

    def run(file, *flags: str, wanted: int = 0) -> str:
        arguments = ["show", str(file), "--model", str(model), "--cache", "cache", *map(str, flags)]
        monkeypatch.setattr(sys, "argv", arguments)
        status = 0
        try:
            show.main()
        except SystemExit as stop:
            status = stop.code
        out, err = capsys.readouterr()
        assert status == wanted, err
        return out if wanted == 0 else err

    return run


def lines_of(report: str) -> dict[str, str]:
    """First word or words of a line -> the rest of it."""
    cut = [line.strip().split("  ", 1) for line in report.splitlines()]
    return {parts[0]: " ".join(parts[1].split()) for parts in cut if len(parts) == 2}


# ---------------------------------------------------------------- numbers


def test_step_size_and_limits_are_those_of_the_training_programs():
    config = show.ShowConfig(file="rows.jsonl")
    sft, redi = recipe.SFTConfig, recipe.REDIConfig
    assert config.training(False).limits == Limits(sft.max_prompt, sft.max_response, sft.max_length)
    assert config.training(True).limits == Limits(800, 19_000, 32_768)
    assert config.training(True).rows_per_step == redi.rows_per_step == 32
    assert show.ShowConfig(file="x", max_prompt=7).training(True).limits.prompt == 7


def test_a_report_of_four_pairs(shown):
    report = shown(write(Path("p.jsonl"), PAIRS))
    lines = lines_of(report)
    assert lines["data"].startswith("p.jsonl: 4 pairs for train_redi.py, ")
    data = Path("p.jsonl").read_bytes()
    assert lines["sha256"] == hashlib.sha256(data).hexdigest()
    assert (lines["a"], lines["b"]) == ("2 50.0 %", "1 25.0 %")
    assert lines["no source named"] == "1 25.0 %"
    assert lines["</think>"] == "75.0 % of chosen and 0.0 % of rejected"
    # The third chosen has no box, the first rejected neither; the fourth have none.
    assert lines["\\boxed{}"] == "50.0 % of chosen and 50.0 % of rejected"
    assert lines["prompts"] == "25.0 % repeat an earlier one"
    assert lines["steps"] == "1 per epoch, of 32 pairs"
    created = pa.array([10**8] * 4, pa.date32())  # days: no date that Python has
    pq.write_table(pa.Table.from_pylist(PAIRS).append_column("created", created), "p.parquet")
    assert lines_of(shown("p.parquet"))["data"].startswith("p.parquet: 4 pairs")
    assert all(len(line) <= 100 for line in report.splitlines())


@dataclass
class Sized:
    """What the tables need of a Dataset."""

    lengths: np.ndarray  # (N,) or (N, 2)
    prompt_lengths: np.ndarray  # of each sequence
    response_lengths: np.ndarray
    dropped: dict[str, int] = field(default_factory=dict)

    @property
    def store(self) -> SimpleNamespace:
        return SimpleNamespace(paired=self.lengths.ndim == 2)

    def __len__(self) -> int:
        return len(self.lengths)


def sized(lengths: list, responses: list[int]) -> Sized:
    """Rows of one turn each."""
    given, answers = np.array(lengths), np.array(responses)
    return Sized(given, given.reshape(-1) - answers, answers)


def test_token_quantiles_are_lengths_that_occur_and_limits_are_counted():
    pairs = sized([[5, 9], [6, 8], [7, 30]], [2, 6, 2, 4, 2, 25])
    table = {name: cells for name, *cells in about_tokens(pairs, Limits(4, 5, 20)).rows}
    #                            in all  min  median  p90   p99   max  limit over
    assert table["prompt"] == ["12", "3", "4", "5", "5", "5", "4", "1"]
    assert table["chosen"] == ["6", "2", "2", "2", "2", "2", "5", "0"]
    assert table["rejected"] == ["35", "4", "6", "25", "25", "25", "5", "2"]
    assert table["together"] == ["65", "5", "7", "30", "30", "30", "20", "1"]


def test_turns_between_answers_count_towards_the_limit_of_the_response():
    """10 tokens: a prompt of 2, and of the 8 behind it 5 are learned from."""
    rows = Sized(np.array([10]), np.array([2]), np.array([5]))
    table = {name: cells[1:] for name, *cells in about_tokens(rows, Limits(9, 7, 20)).rows}
    assert table["response"] == ["5", "5", "5", "5", "5", "7", "1"]
    assert table["between"] == ["3", "3", "3", "3", "3", "", ""]


def test_a_step_of_two_ranks_is_as_balanced_as_its_work():
    """Rows of 30 and 10 tokens, one a rank: the mean of the work over the largest."""
    training = Training(Limits(99, 99, 99), rows_per_step=2, pack_tokens=40, ranks=2, seed=42)
    printed = dict(about_training(sized([30, 10], [9, 9]), training).rows)
    long, short = 30 + 900 * ATTENTION, 10 + 100 * ATTENTION
    balance = f"{(long + short) / 2 / long:.3f}"
    assert printed["steps"] == "1 per epoch, of 2 rows"
    assert printed["tokens"] == "per step: median 40, 40 to 40"
    assert printed["packs"] == "of 40 tokens: 1.0 per step on each of 2 ranks, 50 % full"
    assert printed["balance"].endswith(f": {balance}, {balance} in the worst step")


def test_an_epoch_of_five_rows_has_a_smaller_last_step():
    training = Training(Limits(99, 99, 99), rows_per_step=2, pack_tokens=10, ranks=1, seed=42)
    printed = dict(about_training(sized([10] * 5, [9] * 5), training).rows)
    assert printed["steps"] == "3 per epoch, of 2 rows"
    assert printed["tokens"] == "per step: median 20, 10 to 20"
    # 2, 2 and 1 packs
    assert printed["packs"] == "of 10 tokens: 1.7 per step, 100 % full"


# ---------------------------------------------------------------- the row with its mask


def test_a_row_is_drawn_with_its_mask(shown):
    row = pair("1+1?\n<|im_end|>", "So\n\n2\n", "3")
    report = shown(write(Path("p.jsonl"), [PAIRS[0], row]), "--row", 2)
    drawn = report[report.index("Row 2: prompt ") :].splitlines()
    assert drawn[0].endswith(", rejected 2 tokens; + is made more likely, - less")
    assert drawn[1:] == [
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
    ]


def test_a_long_response_is_shortened_in_the_middle(shown):
    """Of 1,000 digits, each a token, and the stop token: 120 at the beginning, 60 at the end."""
    report = shown(write(Path("p.jsonl"), [positive("?", "12345" * 200)]))
    assert "response 1,001 tokens; + is made more likely\n" in report
    learned = [line[6:] for line in report.splitlines() if line.startswith("  + | ")]
    assert "[... 821 tokens left out ...]" in learned
    assert sum(len(line) for line in learned if line[0] != "[") == 120 + 59 + len("«<|im_end|>»")
    assert all(len(line) <= 94 for line in learned)


@pytest.mark.parametrize(
    ("terminal", "no_color", "colored"), [(True, "", True), (True, "1", False), (False, "", False)]
)
def test_colors_are_for_terminals_that_want_them(shown, monkeypatch, terminal, no_color, colored):
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    report = shown(write(Path("p.jsonl"), PAIRS))
    assert ("\x1b[31m  - | <think>" in report) == colored
    assert ("\x1b" in report) == colored


def test_a_row_is_cut_where_its_mask_changes():
    """A prompt of 2 tokens; of the 5 behind it, the 2nd and 3rd are another's turn."""
    learned = np.array([True, False, False, True, True])
    sequence = TokenSequence(np.arange(10, 17), 2, row=0, sign=1, learned=learned)
    rows = SimpleNamespace(store=SimpleNamespace(paired=False), sequence=lambda number: sequence)
    assert stretches(rows, 0) == [
        Stretch("given", [10, 11], 0),
        Stretch("response", [12], 2),
        Stretch("given", [13, 14], 3),
        Stretch("response", [15, 16], 5),
    ]


def test_of_several_turns_only_the_answers_are_learned_from(shown):
    turns = [*messages("user", "a"), *messages("assistant", "b")]
    turns += [*messages("user", "c"), *messages("assistant", "d")]
    rows = [{"messages": turns}, {"messages": turns[:2]}]
    report = shown(write(Path("p.jsonl"), rows), "--html", "p.html")
    page = Page(Path("p.html").read_text(encoding="utf-8"))
    captions = [text for text in page.texts if ", not learned from" in text]
    assert len(captions) == 2 + 1  # two prompts, and a turn between answers
    assert report.splitlines()[-7:-1] == [
        "  + | b«<|im_end|>»",
        "    |",
        "    | «<|im_start|>»user",
        "    | c«<|im_end|>»",
        "    | «<|im_start|>»assistant",
        "  + | d«<|im_end|>»",
    ]


@given(
    st.text(max_size=30) | st.lists(st.sampled_from(["🧮", "é", "\ufffd", "a", "的"])).map("".join)
)
def test_tokens_give_the_text_again(model, text):
    chat = ChatTokenizer.from_folder(model)
    ids = chat.tokenizer.encode(text).ids
    found = list(tokens_of(ids, chat))
    normal = unicodedata.normalize("NFC", text)  # as Qwen2's tokenizer normalizes
    assert "".join(shown for shown, _, _ in found) == normal
    assert [i for _, its_ids, _ in found for i in its_ids] == ids


# ---------------------------------------------------------------- the page and the picture


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


def test_hostile_texts_stay_texts(shown):
    row = pair(HOSTILE, f"a{HOSTILE}", f"b{HOSTILE}", source=HOSTILE, **{HOSTILE: HOSTILE})
    report = shown(write(Path("p.jsonl"), [row] * 2), "--html", "p.html")
    assert not set(report) - {"\n"} & {chr(code) for code in [*range(32), 0x202E, 0xE000]}
    text = Path("p.html").read_text(encoding="utf-8")
    page = Page(text)
    assert "script" not in page.tags
    shown_text = "".join(page.texts)
    assert shown_text.count(visible(HOSTILE)) >= 5
    assert "\x1b" not in text
    assert "\x00" not in text


def test_the_page_loads_nothing_and_shows_every_token_with_its_place(shown):
    rows = [PAIRS[0], pair("1+🧮?", "é🧮x", "的")]  # characters of several tokens
    shown(write(Path("p.jsonl"), rows), "--html", "p.html", "--row", 2)
    text = Path("p.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert text.count("src=") == text.count('src="data:image/png;base64,') == page.tags["img"] == 1
    assert "url(http" not in text
    caption = next(t for t in page.texts if t.startswith("Row "))
    row, prompt, chosen, rejected = (int(number) for number in re.findall(r"\d+", caption))
    assert row == 2
    opened = Page(text[text.index("<details open>") : text.index("</details>") + 10])
    found = [re.fullmatch(r"token (\d+), id ([\d ]+)", title) for title in opened.titles]
    places = [int(f[1]) + i for f in found for i in range(len(f[2].split()))]
    assert places == [*range(prompt + chosen), *range(prompt, prompt + rejected)]


def test_a_page_of_long_rows_stays_small(shown):
    rows = [pair("?" * 3000, "1" * n, "2" * (n + 1)) for n in range(20_000, 20_006)]
    shown(write(Path("p.jsonl"), rows), "--html", "p.html")
    assert Path("p.html").stat().st_size < 500_000


def test_histograms_are_a_png_and_the_same_each_time(shown):
    file = write(Path("p.jsonl"), PAIRS)
    shown(file, "--histograms", "p.png", "--html", "p.html")
    assert Path("p.png").read_bytes().startswith(b"\x89PNG")
    first = Path("p.html").read_bytes()
    shown(file, "--html", "p.html")
    assert Path("p.html").read_bytes() == first


def test_all_rows_over_a_limit_are_still_described(shown):
    report = shown(write(Path("p.jsonl"), PAIRS), "--max-prompt", 3)
    assert "no row is left to train on (4 prompt over 3 tokens)" in " ".join(report.split())


# ---------------------------------------------------------------- errors


def error_of(shown, *arguments) -> str:
    text = shown(*arguments, wanted=2)
    assert text.startswith("error: ")
    assert text.count("\n") == 1
    return text


def test_errors_are_one_line_that_says_what_to_do(shown, tmp_path):
    assert "`python -m redi.prepare` makes it" in error_of(shown, "data/pairs.jsonl")
    assert "no such file" in error_of(shown, "rows.jsonl")
    raw = write(Path("raw.jsonl"), [{"problem": "?", "response": "!", "correct": True}])
    assert "its fields are correct, problem, response" in error_of(shown, raw)
    assert "python -m redi.prepare makes such rows" in error_of(shown, raw)
    file = write(Path("p.jsonl"), [*PAIRS, pair("?", "same", "same")])
    assert f"--row 6: {file} has 5 rows" in error_of(shown, file, "--row", 6)
    assert "--row 5: is left out (chosen equals rejected)" in error_of(shown, file, "--row", 5)
    assert "--row: expected at least 1" in error_of(shown, file, "--row", 0)
    assert "nowhere/p.html: cannot be written" in error_of(shown, file, "--html", "nowhere/p.html")
    assert "is a folder" in error_of(shown, file, "--histograms", tmp_path)


def test_a_folder_of_both_stages_is_refused(shown):
    Path("both").mkdir()
    write(Path("both/pairs.jsonl"), PAIRS)
    write(Path("both/positives.jsonl"), [positive("?", "!")])
    assert "pairs (pairs.jsonl) and rows for SFT (positives.jsonl)" in error_of(shown, "both")


def test_an_unwritable_page_is_found_before_the_rows_are_read(tmp_path):
    with pytest.raises(UserError, match="cannot be written"):
        show.ShowConfig(file="rows.jsonl", html=str(tmp_path / "missing/p.html"))


def test_a_report_fits_a_screen(shown):
    rows = [positive(f"{i}?", "</think>\\boxed{1}", source=f"s{i % 30}") for i in range(60)]
    report = shown(write(Path("p.jsonl"), rows))
    assert "20 others" in report
    assert report[: report.index("Row 1")].count("\n") <= 40


def test_a_table_of_long_names_keeps_its_width():
    table = Table("t", [("n" * 300, "1")], ("rows",))
    assert max(map(len, tables_as_text([table]).splitlines())) == 100
