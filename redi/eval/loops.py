"""A text that runs in circles: an exact rule, reported and never acted on.

A text loops if it ends in one block over and over, at least 4 times and over at least 64 tokens:

    ... so 4 + 4 = 8. Wait, 4 + 4 = 8. Wait, 4 + 4 = 8. Wait, ...      a block of 8 tokens, 8 times
    ... = 1000000                                                      six zeros are no loop

Left out: text that varies a little from round to round; no exact rule finds it.
"""

from collections.abc import Sequence

import numpy as np

COPIES, TOKENS = 4, 64  # the least of both


def period(token_ids: Sequence[int]) -> int:
    """The length of the shortest block that the text ends in over and over, 4 times or more and
    over 64 tokens or more; 0 if there is none."""
    tokens = np.asarray(token_ids, dtype=np.int64)
    last = tokens[-1:]
    for size in np.flatnonzero(tokens[-2::-1] == last) + 1:  # tokens[-1 - size] is the last too
        end = max(COPIES * size, TOKENS)
        if end > len(tokens):
            return 0
        if (tokens[-end:-size] == tokens[len(tokens) - end + size :]).all():
            return int(size)
    return 0
