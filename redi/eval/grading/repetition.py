"""Whether a text ends in repetition: an exact rule, reported and never acted on.

It does if it ends in copies of one block, at least 4 of them and at least 200 characters:

    ... so 4 + 4 = 8. Wait, 4 + 4 = 8. Wait, 4 + 4 = 8. Wait, ...      a block of 17, 12 times
    ... = 1000000000000                                                twelve zeros are too few

Left out: text that varies a little from round to round; no exact rule finds it.
"""

MIN_COPIES, MIN_CHARACTERS = 4, 200
PROBE = MIN_CHARACTERS // MIN_COPIES


def repeats(text: str) -> bool:
    """Whether a text ends in repetition."""
    probe, last = text[-PROBE:], len(text) - PROBE
    start = last
    # The last copy but one of a block contains the probe too: only these positions are candidates.
    while (start := text.rfind(probe, 0, start + PROBE - 1)) >= 0:
        size = last - start
        end = max(MIN_COPIES * size, MIN_CHARACTERS)
        if end > len(text):
            break
        if text[-end:-size] == text[len(text) - end + size :]:
            return True
    return False
