"""How redi.show lays out what it found: text for a terminal, one HTML page, histograms.

A row is drawn with its mask. In a terminal a margin says what is learned from, and colours say it
again where there are colours:

      | «<|im_start|>»user             what is given: dim
      | 1+1?«<|im_end|>»
      | «<|im_start|>»assistant
    + | <think>                        a response, chosen: green. Rejected: -, red
    + | [... 3,120 tokens left out ...]
    + | \\boxed{2}«<|im_end|>»          « » a control token, not such text

The page shows the same rows token by token. It is one file that loads nothing and runs nothing:
traces may hold `</script>`, so every text is escaped, and a policy in its head forbids the rest.
Characters that do not print are shown as escapes, in a terminal too, where they could be commands.
Left out: scripts; tokens are decoded one at a time, which fits byte-level tokenizers (Qwen2's).
"""

import html
import io
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import IO

import numpy as np

from redi.data.dataset import Dataset
from redi.data.tokenizer import ChatTokenizer

COLUMNS = 100
# Tokens of a stretch that are drawn, at its beginning and at its end.
IN_TERMINAL = (120, 60)
IN_PAGE = (400, 200)  # five rows of pairs stay under half a megabyte
LONGEST_CHARACTER = 8  # tokens that are looked at for one whole character

# What it is -> margin and colour in a terminal, class and colour on the page.
MARGINS = {"given": " ", "response": "+", "chosen": "+", "rejected": "-"}
ANSI = {"given": "2", "response": "32", "chosen": "32", "rejected": "31"}
# Told apart by those who do not see red and green as two colours (Okabe and Ito).
INK = {"prompt": "#8a8a8a", "response": "#009e73", "chosen": "#009e73", "rejected": "#d55e00"}


@dataclass(frozen=True)
class Section:
    """A table. Without a header its rows are names and values, and a value may be long."""

    title: str
    rows: list[tuple[str, ...]]
    header: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stretch:
    """Neighbouring tokens of a row that are all learned from, or all given."""

    kind: str  # one of MARGINS
    ids: list[int]
    begin: int  # place of the first one in the sequence, from 0


def stretches(dataset: Dataset, row: int) -> list[Stretch]:
    """A row cut where its mask changes; of a pair, the prompt, the chosen, the rejected."""
    found = []
    kinds = ("chosen", "rejected") if dataset.store.paired else ("response",)
    for side, kind in enumerate(kinds):
        sequence = dataset.sequence(len(kinds) * row + side)
        learned = np.zeros(len(sequence.tokens), dtype=bool)
        learned[sequence.supervised()] = True
        cuts = np.flatnonzero(np.diff(learned)) + 1
        for begin, end in pairwise([0, *cuts.tolist(), len(learned)]):
            if side == 0 or begin > 0:  # the prompt is the same
                ids = sequence.tokens[begin:end].tolist()
                found.append(Stretch(kind if learned[begin] else "given", ids, begin))
    return found


def visible(text: str) -> str:
    """Text in which only line breaks do something; other such characters are escapes."""
    return "".join(
        c if c == "\n" or c.isprintable() else c.encode("unicode_escape").decode() for c in text
    )


def _tokens(ids: list[int], chat: ChatTokenizer) -> Iterator[tuple[str, list[int], bool]]:
    """(text, its ids, whether it is a control token); ids that share a character come together."""
    controls = set(chat.control_ids.values())
    at = 0
    while at < len(ids):
        if ids[at] in controls:
            yield chat.token(ids[at]), ids[at : at + 1], True
            at += 1
            continue
        for end in range(at + 1, min(at + LONGEST_CHARACTER, len(ids)) + 1):
            text = chat.decode(ids[at:end])
            if _is_whole(text, ids[at:end], chat):
                break
        else:  # cut off, or no text that an encoder made
            end, text = at + 1, chat.decode(ids[at : at + 1])
        yield text, ids[at:end], False
        at = end


def _is_whole(text: str, ids: list[int], chat: ChatTokenizer) -> bool:
    """Part of a character decodes to "\ufffd", which does not encode to that part again."""
    return (
        not text.endswith("\ufffd")
        or chat.tokenizer.encode(text, add_special_tokens=False).ids == ids
    )


def _ends(stretch: Stretch, most: tuple[int, int]) -> list[tuple[int, list[int]]]:
    """(place, ids) of the two ends that are drawn, or of all if it is not longer than these."""
    head, tail = most
    if len(stretch.ids) <= head + tail:
        return [(stretch.begin, stretch.ids)]
    after = stretch.begin + len(stretch.ids) - tail
    return [(stretch.begin, stretch.ids[:head]), (after, stretch.ids[-tail:])]


def _left_out(stretch: Stretch, most: tuple[int, int]) -> str:
    return f"[... {len(stretch.ids) - sum(most):,} tokens left out ...]"


# ---------------------------------------------------------------- a terminal


def as_text(sections: list[Section]) -> str:
    """Tables of at most 100 columns, an empty line between them."""
    return "\n\n".join("\n".join(_table(s) if s.header else _values(s)) for s in sections)


def _table(section: Section) -> list[str]:
    cells = [[_flat(c) for c in row] for row in ((section.title, *section.header), *section.rows)]
    first, *widths = (max(map(len, column)) for column in zip(*cells))
    first = min(first, COLUMNS - sum(widths) - 2 * len(widths))
    return [
        "  ".join(
            [name[:first].ljust(first), *(v.rjust(w) for v, w in zip(values, widths))]
        ).rstrip()
        for name, *values in cells
    ]


def _values(section: Section) -> list[str]:
    named = [(_flat(name)[:30], _flat(value)) for name, value in section.rows]
    width = max(len(name) for name, _ in named) + 2
    lines = []
    for name, value in named:
        indents = {"initial_indent": name.ljust(width), "subsequent_indent": " " * width}
        lines += textwrap.wrap(value, COLUMNS, break_on_hyphens=False, **indents)
    return lines


def _flat(text: str) -> str:
    return visible(text).replace("\n", " ")


# Around a control token while lines are wrapped. Private-use characters do not print, so `visible`
# leaves none in a text.
_OPEN, _CLOSE = "\ue000", "\ue001"


def row_as_text(parts: list[Stretch], chat: ChatTokenizer, colours: bool) -> str:
    wrapper = textwrap.TextWrapper(
        COLUMNS - 6, drop_whitespace=False, replace_whitespace=False, break_on_hyphens=False
    )
    lines = []
    for stretch in parts:
        ends = (_tokens_as_text(ids, chat) for _, ids in _ends(stretch, IN_TERMINAL))
        for line in f"\n{_left_out(stretch, IN_TERMINAL)}\n".join(ends).split("\n"):
            for piece in wrapper.wrap(line) or [""]:
                lines.append(_margined(piece, stretch.kind, colours))
    return "\n".join(lines)


def _tokens_as_text(ids: list[int], chat: ChatTokenizer) -> str:
    return "".join(
        f"{_OPEN}{text}{_CLOSE}" if control else visible(text)
        for text, _, control in _tokens(ids, chat)
    ).removesuffix("\n")


def _margined(line: str, kind: str, colours: bool) -> str:
    margin = f"  {MARGINS[kind]} | "
    if not colours:
        return (margin + line.replace(_OPEN, "«").replace(_CLOSE, "»")).rstrip()
    line = line.replace(_OPEN, "\x1b[7m«").replace(_CLOSE, "»\x1b[27m")
    return f"\x1b[{ANSI[kind]}m{margin}{line}\x1b[0m"


# ---------------------------------------------------------------- a page

STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1c; --faint: #6a6a6a; --line: #d8d8d8;
  --paper: #fff; --sheet: #f8f8f6; --up: #dcf1e8; --up-2: #bfe5d5; --up-ink: #007a59;
  --down: #fbe6d8; --down-2: #f5cfb6; --down-ink: #b34700; --control: #1c1c1c; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e4e2; --faint: #9c9c9a; --line: #3a3a3a;
  --paper: #161616; --sheet: #1f1f1e; --up: #12352b; --up-2: #1d5142; --up-ink: #4fd1a5;
  --down: #42260f; --down-2: #5e371c; --down-ink: #ff9c5c; --control: #e4e4e2; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 66rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.35rem; overflow-wrap: anywhere; } h2 { font-size: 1rem; margin: 2rem 0 .4rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .15rem .9rem .15rem 0; text-align: right; vertical-align: top;
  border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; } tbody th { font-weight: 400; white-space: pre; }
th:first-child, td.value { text-align: left; }
td.value { white-space: normal; overflow-wrap: anywhere; }
.values th { color: var(--faint); }
.wide { overflow-x: auto; } svg { max-width: 100%; min-width: 36rem; height: auto; }
details { border: 1px solid var(--line); border-radius: 6px; margin: .5rem 0; }
summary { padding: .4rem .8rem; cursor: pointer; } p { color: var(--faint); margin: .4rem 0; }
.stretch { font: 13px/1.55 ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; padding: .5rem .8rem;
  border-left: 5px solid var(--line); border-top: 1px solid var(--line); background: var(--sheet); }
.stretch h3 { font: 600 12px/1.4 system-ui, sans-serif; margin: 0 0 .3rem; color: var(--faint); }
.stretch i { font-style: normal; border-radius: 2px; } .stretch i:hover { outline: 1px solid; }
.stretch b { font-weight: 600; color: var(--paper); background: var(--control); padding: 0 3px;
  border-radius: 3px; }
.end, .gap { color: var(--faint); } .gap { display: block; padding: .5rem 0; }
.given i { color: var(--faint); } .given b { background: var(--faint); }
.response, .chosen { border-left-color: var(--up-ink); }
.response h3, .chosen h3 { color: var(--up-ink); }
.response i, .chosen i { background: var(--up); }
.response i:nth-of-type(even), .chosen i:nth-of-type(even) { background: var(--up-2); }
.rejected { border-left-color: var(--down-ink); } .rejected h3 { color: var(--down-ink); }
.rejected i { background: var(--down); }
.rejected i:nth-of-type(even) { background: var(--down-2); }
"""
CAPTIONS = {
    "given": "given, not learned from",
    "response": "response: learned from",
    "chosen": "chosen: made more likely",
    "rejected": "rejected: made less likely",
}


def page(
    title: str,
    sections: list[Section],
    drawing: str,
    rows: list[tuple[str, list[Stretch]]],
    chat: ChatTokenizer,
) -> str:
    """One HTML file. drawing: SVG. rows: (caption, row); the first one is open."""
    drawn = "".join(
        f"<details{' open' if number == 0 else ''}><summary>{_escaped(caption)}</summary>"
        f"{''.join(_stretch_as_html(s, chat) for s in parts)}</details>\n"
        for number, (caption, parts) in enumerate(rows)
    )
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_escaped(title)}</title><style>{STYLE}</style></head><body>\n"
        f"<h1>{_escaped(title)}</h1>\n{''.join(map(_section_as_html, sections))}"
        f'<h2>Lengths</h2>\n<div class="wide">{drawing}</div>\n<h2>Rows as the model sees them'
        "</h2>\n"
        "<p>A token is a shade; its place and its id show when the pointer rests on it. Boxes are "
        f"control tokens, and ↵ a line break of the text.</p>\n{drawn}</body></html>\n"
    )


def _section_as_html(section: Section) -> str:
    rows, head = section.rows, ""
    if section.header:
        cells = "".join(f"<th>{_escaped(cell)}</th>" for cell in ("", *section.header))
        head = f"<thead><tr>{cells}</tr></thead>"
    kind, cell = ("", "<td>") if section.header else (' class="values"', '<td class="value">')
    body = "".join(
        f"<tr><th>{_escaped(name)}</th>{''.join(f'{cell}{_escaped(v)}</td>' for v in values)}</tr>"
        for name, *values in rows
    )
    return (
        f'<h2>{_escaped(section.title)}</h2>\n<div class="wide"><table{kind}>{head}'
        f"<tbody>{body}</tbody></table></div>\n"
    )


def _stretch_as_html(stretch: Stretch, chat: ChatTokenizer) -> str:
    gap = f'<span class="gap">{_left_out(stretch, IN_PAGE)}</span>'
    ends = (_tokens_as_html(place, ids, chat) for place, ids in _ends(stretch, IN_PAGE))
    caption = f"{CAPTIONS[stretch.kind]}, {len(stretch.ids):,} tokens"
    return f'<div class="stretch {stretch.kind}"><h3>{caption}</h3>{gap.join(ends)}</div>'


def _tokens_as_html(place: int, ids: list[int], chat: ChatTokenizer) -> str:
    spans = []
    for text, its_ids, control in _tokens(ids, chat):
        tag = "b" if control else "i"
        told = f"token {place}, id {' '.join(map(str, its_ids))}"
        shown = _escaped(text).replace("\n", '<span class="end">↵</span>\n')
        spans.append(f'<{tag} title="{told}">{shown}</{tag}>')
        place += len(its_ids)
    return "".join(spans)


def _escaped(text: str) -> str:
    return html.escape(visible(text))


# ---------------------------------------------------------------- histograms

TEXT_INK = "#101112"  # of the drawing's text and axes; on the page it becomes the page's own


def draw_histograms(
    lengths: dict[str, np.ndarray], limits: dict[str, int], file: IO, form: str = "png"
) -> None:
    """Shares of the rows by length, and how many are no longer. Drawn are the parts that INK has:
    turns between answers may have no tokens, which a logarithmic axis cannot show."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator, PercentFormatter

    inked = {f"{name}.color": TEXT_INK for name in ("text", "xtick", "ytick")}
    inked |= {"axes.edgecolor": TEXT_INK, "axes.labelcolor": TEXT_INK, "font.size": 9}
    inked |= {"axes.spines.top": False, "axes.spines.right": False}
    # In SVG, text stays text, and the same data give the same bytes.
    inked |= {"svg.fonttype": "none", "svg.hashsalt": "redi"}
    lengths = {name: of for name, of in lengths.items() if name in INK}
    shortest = min(int(of.min()) for of in lengths.values())
    longest = max(int(of.max()) for of in lengths.values())
    bins = np.geomspace(0.9 * shortest, 1.1 * longest, 50)
    up_to = np.linspace(0, 1, 401)  # so many points, however many the rows are
    with plt.rc_context(inked):
        figure, (counts, shares) = plt.subplots(
            2, 1, figsize=(9, 5), sharex=True, height_ratios=(3, 2), layout="constrained"
        )
        for name, of in lengths.items():
            weights = np.full(len(of), 1 / len(of))
            dashed = {"ls": "--" if name == "rejected" else "-", "color": INK[name], "lw": 1.6}
            counts.hist(of, bins, weights=weights, color=INK[name], alpha=0.25)
            counts.hist(of, bins, weights=weights, histtype="step", label=name, **dashed)
            shares.plot(np.quantile(of, up_to, method="inverted_cdf"), up_to, **dashed)
        for place, limit in enumerate(sorted(set(limits.values()))):
            names = " and ".join(name for name, value in limits.items() if value == limit)
            for axis in (counts, shares):
                axis.axvline(limit, color=TEXT_INK, lw=0.9, ls=":")
            counts.text(
                limit, 1 + 0.08 * place, f"{limit:,}: limit of {names} ", ha="right", va="bottom",
                transform=counts.get_xaxis_transform(),
            )  # fmt: skip
        for axis, label in ((counts, "share of the rows"), (shares, "no longer than that")):
            axis.set(xscale="log", ylabel=label)
            axis.grid(alpha=0.25)
            axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        shares.set(xlabel="tokens", ylim=(0, 1.02))
        shares.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
        shares.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: f"{tokens:,.0f}"))
        shares.xaxis.set_minor_locator(NullLocator())
        counts.legend(frameon=False)
        about = dict.fromkeys(("Creator", "Date", "Format", "Type")) if form == "svg" else None
        figure.savefig(file, dpi=110, format=form, transparent=form == "svg", metadata=about)
        plt.close(figure)


def histograms_as_svg(lengths: dict[str, np.ndarray], limits: dict[str, int]) -> str:
    """To stand in a page, with text of the page's colour."""
    file = io.StringIO()
    draw_histograms(lengths, limits, file, "svg")
    drawing = file.getvalue()
    return drawing[drawing.index("<svg") :].replace(TEXT_INK, "currentColor")
