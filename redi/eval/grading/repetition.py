"""Whether a text ends by repeating itself: an exact rule, reported and never acted on.

A text loops if it ends in copies of one block, at least 4 of them and at least 200 characters:

    ... so 4 + 4 = 8. Wait, 4 + 4 = 8. Wait, 4 + 4 = 8. Wait, ...      a block of 17, 12 times
    ... = 1000000000000                                                twelve zeros are no loop

Left out: text that varies a little from round to round; no exact rule finds it.
"""

MIN_COPIES, MIN_CHARACTERS = 4, 200
PROBE = MIN_CHARACTERS // MIN_COPIES


def period(text: str) -> int:
    """The length of the shortest block that the text ends in copies of, at least 4 of them and at
    least 200 characters; 0 if there is no such block."""
    if len(text) < MIN_CHARACTERS:
        return 0
    probe, last = text[-PROBE:], len(text) - PROBE
    start = last
    # The last copy but one of a block contains the probe too: only these positions are candidates.
    while (start := text.rfind(probe, 0, start + PROBE - 1)) >= 0:
        size = last - start
        end = max(MIN_COPIES * size, MIN_CHARACTERS)
        if end > len(text):
            break
        if text[-end:-size] == text[len(text) - end + size :]:
            return size
    return 0
