"""redi/data/formats.py: the same training row out of every usual shape."""

import re
from pathlib import Path

import pytest
import torch
from small_run import assistant, redi_config, refusal, run, sft_config, user, write_jsonl

from redi.data.formats import Example, to_example
from redi.data.tokenizer import ChatTokenizer

SYSTEM = {"role": "system", "content": "Be brief."}
ASKED = [user("1+1?")]
RIGHT, WRONG = [assistant("It is 2.")], [assistant("It is 3.")]
TURNS = [user("1+1?"), assistant("2"), user("And 1 more?"), assistant("3")]

SFT_ROW = Example(ASKED, [RIGHT])
PAIR_ROW = Example(ASKED, [RIGHT, WRONG], (1.0, -1.0))
SFT_SHAPES = {  # each is SFT_ROW
    "message lists": {"prompt": ASKED, "completion": RIGHT},
    "strings": {"prompt": "1+1?", "completion": "It is 2."},
    "prompt a string": {"prompt": "1+1?", "completion": RIGHT},
    "completion a string": {"prompt": ASKED, "completion": "It is 2."},
    "messages": {"messages": ASKED + RIGHT},
    "completion a whole conversation": {"prompt": "1+1?", "completion": ASKED + RIGHT},
    "with null and other fields": {
        "messages": ASKED + RIGHT, "prompt": None, "chosen": None, "source": "x", "score": 1.0,
    },
    "with other fields in messages": {
        "messages": [{**m, "info": {"a": 1}, "tool_calls": None} for m in ASKED + RIGHT]
    },
}  # fmt: skip
PAIR_SHAPES = {  # each is PAIR_ROW
    "message lists": {"prompt": ASKED, "chosen": RIGHT, "rejected": WRONG},
    "strings": {"prompt": "1+1?", "chosen": "It is 2.", "rejected": "It is 3."},
    "implicit prompt": {"chosen": ASKED + RIGHT, "rejected": ASKED + WRONG},
    "the mixed form": {"prompt": "1+1?", "chosen": ASKED + RIGHT, "rejected": ASKED + WRONG},
    "prompt repeated": {"prompt": ASKED, "chosen": ASKED + RIGHT, "rejected": ASKED + WRONG},
    "one side repeats it": {"prompt": "1+1?", "chosen": ASKED + RIGHT, "rejected": "It is 3."},
    "the prompt in messages too": {
        "prompt": "1+1?", "messages": ASKED + RIGHT, "chosen": RIGHT, "rejected": WRONG,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", SFT_SHAPES)
def test_every_shape_of_a_row_for_sft(name):
    assert to_example(SFT_SHAPES[name], "x", "rows") == SFT_ROW


@pytest.mark.parametrize("name", PAIR_SHAPES)
def test_every_shape_of_a_pair(name):
    assert to_example(PAIR_SHAPES[name], "x", "pairs") == PAIR_ROW


def test_all_answers_of_messages_are_learned_and_what_both_sides_begin_with_is_the_prompt():
    assert to_example({"messages": TURNS}, "x", "rows") == Example(TURNS[:1], [TURNS[1:]])
    last = [[assistant("3")], [assistant("4")]]
    implicit = {"chosen": TURNS[:3] + last[0], "rejected": TURNS[:3] + last[1]}
    assert to_example(implicit, "x", "pairs") == Example(TURNS[:3], last, (1.0, -1.0))
    with_system = {"prompt": "1+1?", "chosen": [SYSTEM, *ASKED, *RIGHT], "rejected": WRONG}
    assert to_example(with_system, "x", "pairs") == Example(
        [SYSTEM, *ASKED], [RIGHT, WRONG], (1, -1)
    )
    history = {"prompt": TURNS[:3], "completion": [assistant("3")]}
    assert to_example(history, "x", "rows") == Example(TURNS[:3], [last[0]])


def test_thoughts_that_are_apart_come_before_the_answer_as_in_qwen3s_template():
    apart = {"role": "assistant", "reasoning_content": "1+1=2\n", "content": "\nIt is 2."}
    together = [assistant("<think>\n1+1=2\n</think>\n\nIt is 2.")]
    assert to_example({"messages": [*ASKED, apart]}, "x", "rows") == Example(ASKED, [together])


def context(text: str) -> dict:
    return {**assistant(text), "weight": 0}


MORE = [*TURNS, user("*4?"), assistant("12")]
WEIGHTED = {  # row, kind, the example
    "at the beginning": (
        {"messages": [TURNS[0], context("2"), *TURNS[2:]]}, "rows",
        Example(TURNS[:1], [[context("2"), *TURNS[2:]]]),
    ),
    "at the end": (
        {"messages": [*TURNS, user("*4?"), context("12")]}, "rows", Example(TURNS[:1], [TURNS[1:]]),
    ),
    "1, null, and those of others mean nothing": (
        {"messages": [{**m, "weight": w} for m, w in zip(TURNS, (0, 1, None, 1.0))]}, "rows",
        Example(TURNS[:1], [TURNS[1:]]),
    ),
    "in a completion": (
        {"prompt": "1+1?", "completion": [context("2"), *TURNS[2:]]}, "rows",
        Example(TURNS[:1], [[context("2"), *TURNS[2:]]]),
    ),
    "in a prompt that the completion repeats": (
        {"prompt": TURNS[:3], "completion": [TURNS[0], context("2"), *TURNS[2:]]}, "rows",
        Example(TURNS[:3], [TURNS[3:]]),
    ),
    "in what both sides begin with": (
        {"chosen": [TURNS[0], context("2"), *TURNS[2:]], "rejected": [*TURNS[:3], *WRONG]}, "pairs",
        Example(TURNS[:3], [TURNS[3:], WRONG], (1.0, -1.0)),
    ),
    "in one side": (
        {"prompt": "1+1?", "chosen": [context("2"), *TURNS[2:]], "rejected": WRONG}, "pairs",
        Example(TURNS[:1], [[context("2"), *TURNS[2:]], WRONG], (1.0, -1.0)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WEIGHTED)
def test_weight_0_makes_an_answer_context(name):
    row, kind, example = WEIGHTED[name]
    assert to_example(row, "x", kind) == example


REFUSED = {  # row, kind, what the error says
    "nothing to learn": (
        {"messages": [*ASKED, context("2")]}, "rows", "'messages' has no answer to learn from",
    ),
    "nothing to learn in a side": (
        {"prompt": "1+1?", "chosen": RIGHT, "rejected": [context("3")]}, "pairs",
        "'rejected' has no",
    ),
    "weight": (
        {"messages": [*ASKED, {**RIGHT[0], "weight": 0.5}]}, "rows",
        "'messages' has the weight 0.5; expected 0 or 1",
    ),
    "weight in a prompt": (
        {"prompt": [{**ASKED[0], "weight": "a\nb"}], "completion": "2"}, "rows",
        "has the weight 'a",
    ),
    "unknown": ({"a": 1, "b": 2}, "rows", "fields seen: a, b; expected .*completion.* or"),
    "none": ({}, "pairs", "fields seen: none; expected {prompt, chosen, rejected} or {chosen"),
    "pairs for SFT": ({"chosen": "a", "rejected": "b"}, "rows", "train_redi.py .* files of pairs"),
    "SFT for pairs": ({"messages": TURNS}, "pairs", "train_sft.py trains on such rows"),
    "a teacher's": ({"problem": "?", "generations": []}, "rows", "python -m redi.prepare makes"),
    "not messages": ({"messages": "hello"}, "rows", "'messages' must be a list of"),
    "a number": ({"prompt": 1, "completion": "a"}, "rows", "'prompt' must be text, or a list of"),
    "empty list": ({"prompt": [], "completion": "a"}, "rows", "'prompt' must be"),
    "nested": ({"messages": [TURNS]}, "rows", "'messages' must be a list"),
    "role": ({"messages": [{"role": "gpt", "content": "a"}]}, "rows", "roles among system, user"),
    "content": ({"messages": [{"role": "user", "content": None}]}, "rows", "'messages' must be"),
    "surrogate": ({"prompt": "\ud800", "completion": "a"}, "rows", "'prompt' must be"),
    "blank": ({"prompt": "a", "completion": " \n"}, "rows", "'completion' is empty"),
    "blank turn": ({"messages": [*ASKED, assistant(""), *TURNS[2:]]}, "rows", "is empty"),
    "no answer": ({"messages": ASKED}, "rows", "must start with an assistant's message"),
    "ends with a question": ({"messages": TURNS[:3]}, "rows", "and end with one"),
    "no question": ({"messages": RIGHT}, "rows", "a prompt is missing"),
    "prompt ends with an answer": (
        {"prompt": TURNS[:2], "completion": "3"}, "rows", "'prompt' ends with an assistant's",
    ),
    "another prompt": (
        {"prompt": "2+2?", "chosen": ASKED + RIGHT, "rejected": ASKED + WRONG}, "pairs",
        "'prompt' is not what chosen and rejected begin with",
    ),
    "another prompt, listed": (
        {"prompt": [user("2+2?")], "chosen": ASKED + RIGHT, "rejected": WRONG}, "pairs",
        "'chosen' is a whole conversation that does not begin with the prompt",
    ),
    "nothing shared": (
        {"chosen": [user("a"), *RIGHT], "rejected": ASKED + WRONG}, "pairs", "no prompt",
    ),
    "two plain texts": ({"chosen": "Q: a A: b", "rejected": "Q: a A: c"}, "pairs", "no prompt"),
    "thoughts in the text": (
        {"messages": [*ASKED, {**assistant("a </think> b"), "reasoning_content": ""}]}, "rows",
        "'messages' has a reasoning_content, and <think> or </think> in a text",
    ),
    "tags in the thoughts": (
        {"messages": [*ASKED, {**RIGHT[0], "reasoning_content": "a <think> b"}]}, "rows",
        "'messages' has a reasoning_content, and",
    ),
    "tool calls": (
        {"messages": [*ASKED, {**RIGHT[0], "tool_calls": [{"id": 1}]}]}, "rows",
        "'messages' has 'tool_calls' beside 'content'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_other_rows_are_refused_in_one_line(name):
    row, kind, expected = REFUSED[name]
    message = refusal(to_example, row, "file.jsonl:7", kind)
    assert message.startswith("file.jsonl:7: ")
    assert re.search(expected, message)


# ---------------------------------------------------------------- what a run learns from them


def test_several_turns_are_trained_on_as_transformers_scores_them(here, capsys):
    """The loss of the first step: minus the mean log-prob of the answers' tokens, with stops."""
    from transformers import AutoModelForCausalLM

    rows = [{"messages": TURNS}, {"messages": [*TURNS, user("1*4?"), assistant("4\n")]}]
    write_jsonl(Path("turns.jsonl"), rows)
    record = run(sft_config(data="turns.jsonl", rows_per_step=2, epochs=1))[0]
    shown = re.findall(r"^  (\w+) *\| '", capsys.readouterr().out, re.MULTILINE)
    assert shown == ["prompt", "response", "between", "response"]
    chat = ChatTokenizer.from_folder("student")
    model = AutoModelForCausalLM.from_pretrained("student", dtype=torch.float32)
    scores = []
    for row in rows:
        example = to_example(row, "x", "rows")
        [rendered] = chat.encode_rows([(example.prompt, example.responses[0])])
        ids = torch.tensor([rendered.prompt_ids + rendered.response_ids])
        with torch.no_grad():
            logps = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        # An answer: all after a generated header, up to the stop token.
        text, answering = "", False
        for position, token in enumerate(ids[0].tolist()):
            if answering:
                scores.append(logps[position - 1].item())
            text += chat.decode([token])
            answering = token != chat.stop_id and (
                answering or text.endswith("<|im_start|>assistant\n")
            )
    assert record["loss"] == pytest.approx(-sum(scores) / len(scores), rel=1e-5)


def test_tokens_of_weight_0_are_the_next_prompt_and_are_not_learned(here):
    """Of answers 2 (weight 0), 3 and 12 (weight 0 in the second row), against ids by hand."""
    chat = ChatTokenizer.from_folder("student")
    plain, stop = chat.tokenizer.encode, chat.stop_id

    def encoded(messages: list[dict]):
        example = to_example({"messages": messages}, "x", "rows")
        [row] = chat.encode_rows([(example.prompt, example.responses[0])])
        return row

    first = encoded([TURNS[0], context("2"), *MORE[2:]])
    assert first.prompt_ids == chat.encode_prompt(TURNS[:3])  # as generation would see it
    between = chat.encode_prompt(MORE[:5])[len(first.prompt_ids) + 2 :]  # after "3", stop
    three, twelve = plain("3").ids, plain("12").ids
    assert first.response_ids == [*three, stop, *between, *twelve, stop]
    learned = [True] * 2 + [False] * len(between) + [True] * (len(twelve) + 1)
    assert first.learned == learned
    middle = encoded([*TURNS[:3], context("3"), *MORE[4:]])
    assert middle.prompt_ids == chat.encode_prompt(TURNS[:1])
    assert middle.response_ids[:2] == [*plain("2").ids, stop]
    whole = [*middle.prompt_ids, *middle.response_ids]
    assert whole == [*chat.encode_prompt(MORE[:5]), *twelve, stop]
    assert [i for i, is_learned in enumerate(middle.learned) if is_learned] == [
        0, 1, *range(len(middle.learned) - len(twelve) - 1, len(middle.learned)),
    ]  # fmt: skip


def test_the_loss_ignores_answers_of_weight_0(here):
    """As if they were in the prompt: of SFT, and of pairs, whose reports are of learned tokens."""
    weighted = [TURNS[0], context("2"), *TURNS[2:]]
    write_jsonl(Path("weighted.jsonl"), [{"messages": weighted}])
    write_jsonl(Path("prompt.jsonl"), [{"prompt": TURNS[:3], "completion": "3"}])
    write_jsonl(Path("learned.jsonl"), [{"messages": TURNS}])
    one, same, other = (
        run(sft_config(data=f"{name}.jsonl", out=name, rows_per_step=1, epochs=1))[0]["loss"]
        for name in ("weighted", "prompt", "learned")
    )
    assert one == same != other
    sides = {"chosen": weighted[1:], "rejected": [context("2"), TURNS[2], assistant("4")]}
    write_jsonl(Path("sides.jsonl"), [{"prompt": "1+1?", **sides}])
    write_jsonl(Path("plain.jsonl"), [{"prompt": TURNS[:3], "chosen": "3", "rejected": "4"}])
    one, same = (
        run(redi_config(data=f"{name}.jsonl", out=f"{name}-run", rows_per_step=1))[0]["loss"]
        for name in ("sides", "plain")
    )
    assert one == same
