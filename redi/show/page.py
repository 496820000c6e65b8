"""What redi.show found as one HTML page, with a picture of the lengths.

The page shows rows token by token. Traces may contain `</script>`, so every text is escaped.
"""

import html
import io

import numpy as np

from redi import pages
from redi.data.dataset import Dataset
from redi.data.tokenizer import ChatTokenizer
from redi.recipe import TrainConfig
from redi.show.rows import Stretch, tokens_of, visible

ENDS = (400, 200)  # tokens of a stretch that are shown; five rows of pairs stay under 500 kB
# Distinguishable for those who do not see red and green as two colors (Okabe and Ito).
INK = {"prompt": "#8a8a8a", "response": "#009e73", "chosen": "#009e73", "rejected": "#d55e00"}

STYLE = """
details { border: 1px solid var(--line); border-radius: 6px; margin: .5rem 0; }
summary { padding: .4rem .8rem; cursor: pointer; }
.stretch { font: 13px/1.55 ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; padding: .5rem .8rem; --shade: transparent;
  border-left: 5px solid var(--shade); background: var(--raised); }
.stretch h3 { font: 600 12px/1.4 system-ui, sans-serif; margin: 0 0 .3rem; color: var(--faint); }
.stretch i { font-style: normal; background: color-mix(in srgb, var(--shade) 12%, transparent); }
.stretch i:nth-of-type(even) { background: color-mix(in srgb, var(--shade) 26%, transparent); }
.stretch i:hover { outline: 1px solid; }
.stretch b { font-weight: 600; color: var(--paper); background: var(--ink); padding: 0 3px;
  border-radius: 3px; }
.given i { color: var(--faint); } .gap { display: block; padding: .5rem 0; }
.response, .chosen { --shade: var(--up); } .rejected { --shade: var(--down); }
"""
CAPTIONS = {
    "given": "given, not learned from", "response": "response: learned from",
    "chosen": "chosen: made more likely", "rejected": "rejected: made less likely",
}  # fmt: skip


def page(
    title: str,
    report: str,
    picture: bytes,
    rows: list[tuple[str, list[Stretch]]],
    chat: ChatTokenizer,
) -> str:
    """One HTML file. picture: a PNG. rows: (caption, row); the first one is open."""
    title = visible(title)
    parts = [
        f"<h1>{html.escape(title)}</h1>\n<pre>{html.escape(report)}</pre>",
        pages.figure("histograms", picture, "Share of the rows by length; the lines are limits"),
        '<h2>Rows as the model sees them</h2>\n<p class="faint">Each shade is a token; the '
        "pointer shows its position and id. Boxes are control tokens, ↵ is a line break.</p>",
    ]
    for number, (caption, row) in enumerate(rows):
        parts.append(f"<details{' open' if number == 0 else ''}><summary>{caption}</summary>")
        parts += [*(_stretch_as_html(stretch, chat) for stretch in row), "</details>"]
    return pages.page(title, "\n".join(parts), STYLE)


def _stretch_as_html(stretch: Stretch, chat: ChatTokenizer) -> str:
    gap = f'<span class="gap">{stretch.left_out(ENDS)}</span>'
    ends = (_tokens_as_html(position, ids, chat) for position, ids in stretch.ends(ENDS))
    caption = f"{CAPTIONS[stretch.kind]}, {len(stretch.ids):,} tokens"
    return f'<div class="stretch {stretch.kind}"><h3>{caption}</h3>{gap.join(ends)}</div>'


def _tokens_as_html(position: int, ids: list[int], chat: ChatTokenizer) -> str:
    spans = []
    for text, its_ids, control in tokens_of(ids, chat):
        tag = "b" if control else "i"
        hint = f"token {position}, id {' '.join(map(str, its_ids))}"
        shown = html.escape(visible(text)).replace("\n", '<span class="faint">↵</span>\n')
        spans.append(f'<{tag} title="{hint}">{shown}</{tag}>')
        position += len(its_ids)
    return "".join(spans)


def draw_histograms(dataset: Dataset, config: TrainConfig) -> bytes:
    """Share of the rows by length of prompt and responses, as a PNG."""
    from matplotlib.figure import Figure  # takes a second to import

    lengths = dataset.part_lengths()
    every = np.concatenate(list(lengths.values()))
    bins = np.geomspace(0.9 * every.min(), 1.1 * every.max(), 50)
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    axis = figure.subplots()
    for part, tokens in lengths.items():
        look = {"histtype": "stepfilled", "fc": (INK[part], 0.25), "ec": INK[part]}
        axis.hist(tokens, bins, weights=np.full(len(tokens), 1 / len(tokens)), label=part, **look)
    axis.axvline(config.max_prompt, color="black", lw=0.9, ls=":", label="longest prompt")
    axis.axvline(config.max_response, color="black", lw=0.9, ls="--", label="longest response")
    axis.set(xscale="log", xlabel="tokens", ylabel="share of the rows")
    axis.grid(alpha=0.25)
    axis.yaxis.set_major_formatter("{x:.0%}")
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.legend(frameon=False)
    figure.savefig(file := io.BytesIO(), dpi=110, format="png")
    return file.getvalue()
