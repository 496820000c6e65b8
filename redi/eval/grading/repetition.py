"""A text that repeats itself at its end: an exact rule, reported and never acted on.

A text loops if it ends in copies of one block, at least 4 of them and at least 200 characters:

    ... so 4 + 4 = 8. Wait, 4 + 4 = 8. Wait, 4 + 4 = 8. Wait, ...      a block of 17, 12 times
    ... = 1000000000000                                                twelve zeros are no loop

Left out: text that varies a little from round to round; no exact rule finds it.
"""

COPIES, CHARACTERS = 4, 200  # the least of both
PROBE = CHARACTERS // COPIES


def period(text: str) -> int:
    """The length of the shortest block that the text ends in over and over, 4 times or more and
    over 200 characters or more; 0 if there is none."""
    if len(text) < CHARACTERS:
        return 0
    probe, last = text[-PROBE:], len(text) - PROBE
    place = last
    # A block's copy before the last one holds the probe too, so only those places come in question.
    while (place := text.rfind(probe, 0, place + PROBE - 1)) >= 0:
        size = last - place
        end = max(COPIES * size, CHARACTERS)
        if end > len(text):
            break
        if text[-end:-size] == text[len(text) - end + size :]:
            return size
    return 0
