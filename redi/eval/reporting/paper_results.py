"""The paper's results on the five benchmarks (arXiv 2505.24850), for reference.

Sixteen samples per problem, temperature 0.6, the authors' prompt and grader, models that they
trained or measured. Figures are (pass@1, pass@16) in percent, in the order of KNOWN.
"""

from redi.eval.benchmarks import KNOWN

RESULTS = {
    "SFT 3 epochs": ((76.7, 94.6), (18.1, 53.3), (52.8, 86.7), (24.6, 57.7), (37.5, 63.1)),
    "SFT 3 + DPO": ((81.3, 94.6), (24.6, 63.3), (58.5, 86.7), (28.7, 58.8), (43.1, 64.7)),
    "SFT 3 + SimPO": ((81.1, 94.8), (24.8, 60.0), (58.8, 89.2), (29.1, 58.5), (42.2, 63.3)),
    "SFT 3 + symmetric": ((81.7, 95.0), (25.8, 63.3), (59.5, 90.4), (29.3, 58.8), (42.1, 62.5)),
    "SFT 3 + REDI": ((81.7, 95.0), (27.3, 66.7), (58.8, 81.9), (30.4, 59.9), (43.4, 63.9)),
    "SFT 5 epochs": ((80.4, 95.6), (21.9, 56.7), (57.5, 86.7), (27.5, 56.3), (41.5, 64.3)),
    "Qwen-REDI-1.5B (SFT 5 + REDI)": (
        (83.1, 95.0), (28.1, 66.7), (62.4, 90.4), (28.8, 57.0), (45.2, 65.8),
    ),
    "DeepSeek-R1-Distill-Qwen-1.5B": (
        (83.2, 95.6), (28.3, 63.3), (62.1, 92.8), (26.0, 56.6), (43.1, 65.8),
    ),
}  # fmt: skip


def rows(benchmarks: list[str]) -> list[tuple[str, ...]]:
    """A table's rows for those of the five benchmarks that are given, header first; [] if none."""
    names = [name for name in KNOWN if name in benchmarks]
    table = [("the paper's models", *names)]
    for model, figures in RESULTS.items():
        figure_of = dict(zip(KNOWN, figures))
        table.append((model, *("{:.1f} / {:.1f}".format(*figure_of[name]) for name in names)))
    return table if names else []
