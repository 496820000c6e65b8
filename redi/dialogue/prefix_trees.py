"""Log-probs of answers to prompts, where what prompts or answers begin with alike runs once.

    prompts   a b c d    a b c e f                a - b - c - d - x
    answers   x y, x z   x y, x z                           \\ e - f - x

A token attends to itself and its ancestors in the tree, and its position is its depth, so an answer
has the log-probs that it has alone behind its prompt. The last token of an answer is predicted but
not run. A pack is several trees, one for each group of prompts; what all prompts of the pack begin
with, such as a rubric, runs once. Letters: T tokens of a pack, N nodes of a tree, H heads, K kv
heads, d head size.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, repeat, takewhile

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from redi.config import UserError
from redi.logprobs import token_logps
from redi.model import Transformer
from redi.packing import to_device

PACK_TOKENS = 2048  # a pack is full when it has so many; the mask of a tree is quadratic


@dataclass(frozen=True)
class Question:
    group: str  # questions of a group share a tree
    prompt: list[int]
    answers: list[list[int]]  # each ends with the stop token


class _Tree:
    """Token sequences as nodes; a parent has a smaller number than its children."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.parents: list[int] = []  # -1 for the first token
        self.depths: list[int] = []
        self.children: dict[tuple[int, int], int] = {}  # (node, token) -> node
        # Number and question, and for each answer the nodes that predict its tokens.
        self.questions: list[tuple[int, Question, list[list[int]]]] = []

    def add(self, number: int, question: Question) -> None:
        end = self.extend(-1, question.prompt)[-1]
        paths = [[end, *self.extend(end, answer[:-1])] for answer in question.answers]
        self.questions.append((number, question, paths))

    def extend(self, node: int, ids: Sequence[int]) -> list[int]:
        """The nodes of the tokens that follow a node (-1: that begin a sequence)."""
        path = []
        for token in ids:
            child = self.children.setdefault((node, token), len(self.tokens))
            if child == len(self.tokens):
                self.depths.append(0 if node < 0 else self.depths[node] + 1)
                self.tokens.append(token)
                self.parents.append(node)
            path.append(node := child)
        return path

    def ancestors(self) -> np.ndarray:
        """(N, N) bool: whether the node of a row attends to that of a column."""
        mask = np.eye(len(self.tokens), dtype=bool)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                mask[node] |= mask[parent]
        return mask


@torch.inference_mode()
def answer_logps(model: Transformer, questions: Sequence[Question]) -> list[list[Tensor]]:
    """Of each question and answer, the log-probs (length of the answer,) in nats, on the host.
    Raises UserError if a prompt with its answers does not fit the model's context, and if the
    log-probs are not finite."""
    found: dict[int, list[Tensor]] = {}
    for trees in _packs(questions):
        longest, context = max(max(t.depths) for t in trees) + 1, model.config.max_positions
        if longest > context:
            raise UserError(
                f"a dialogue to judge has {longest:,} tokens; the judge's context is {context:,}"
            )
        found |= _run(model, trees)
    return [found[number] for number in range(len(questions))]


def _packs(questions: Sequence[Question]) -> Iterator[list[_Tree]]:
    trees: list[_Tree] = []
    group = None
    for number, question in sorted(enumerate(questions), key=lambda pair: pair[1].group):
        if not trees or question.group != group:
            trees.append(_Tree())
            group = question.group
        trees[-1].add(number, question)
        if sum(len(tree.tokens) for tree in trees) >= PACK_TOKENS:
            yield trees
            trees = []
    if trees:
        yield trees


def _run(model: Transformer, trees: list[_Tree]) -> dict[int, list[Tensor]]:
    """One pass over a pack: the beginning of all prompts, then the rest of each tree."""
    device, weight = model.output_weight.device, model.output_weight
    prompts = (question.prompt for tree in trees for _, question, _ in tree.questions)
    same = takewhile(lambda tokens: len(set(tokens)) == 1, zip(*prompts))
    shared = len(list(same))  # tokens that every tree begins with: its first nodes
    ends = np.cumsum([shared, *(len(tree.tokens) - shared for tree in trees)])
    masks = [to_device(tree.ancestors()[shared:], device) for tree in trees]

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        start = slice(0, shared)
        outputs = [_attention(query[start], key[start], value[start], is_causal=True)]
        for begin, end, mask in zip(ends, ends[1:], masks):
            keys, values = (torch.cat([x[start], x[begin:end]]) for x in (key, value))
            outputs.append(_attention(query[begin:end], keys, values, attn_mask=mask))
        return torch.cat(outputs)

    def in_pack(lists: list[list[int]]) -> Tensor:
        """What the trees have for their nodes, for the tokens of the pack (T,)."""
        return to_device([*lists[0][:shared], *chain(*(x[shared:] for x in lists))], device)

    tokens, positions = in_pack([t.tokens for t in trees]), in_pack([t.depths for t in trees])
    hidden = model.model(tokens, positions, repeat(attend))  # (T, D)
    rows, targets, lengths = [], [], []
    for tree, before in zip(trees, (ends - shared).tolist()):
        for _, question, paths in tree.questions:
            for answer, path in zip(question.answers, paths):
                rows += [node if node < shared else node + before for node in path]
                targets += answer
                lengths.append(len(answer))
    logps = token_logps(hidden[to_device(rows, device)], weight, to_device(targets, device)).cpu()
    if not torch.isfinite(logps).all():
        raise UserError("the judge's log-probs are not finite numbers: its weights are broken")
    parts = iter(logps.split(lengths))
    asked = (one for tree in trees for one in tree.questions)
    return {number: [next(parts) for _ in question.answers] for number, question, _ in asked}


def _attention(query: Tensor, key: Tensor, value: Tensor, **how) -> Tensor:
    """query (N, H, d), key and value (M, K, d) -> (N, H, d)."""
    heads_first = (x.transpose(0, 1)[None] for x in (query, key, value))
    grouped = query.shape[1] != key.shape[1]
    attended = F.scaled_dot_product_attention(*heads_first, enable_gqa=grouped, **how)
    return attended[0].transpose(0, 1)
