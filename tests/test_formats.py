"""redi/data/formats.py: the same training row out of every usual shape."""

import re
from pathlib import Path

import pytest
import torch
from small_run import assistant, refusal, run, sft_config, user, write_jsonl

from redi.data.formats import Example, to_example
from redi.data.tokenizer import ChatTokenizer

SYSTEM = {"role": "system", "content": "Be brief."}
ASKED = [user("1+1?")]
RIGHT, WRONG = [assistant("It is 2.")], [assistant("It is 3.")]
TURNS = [user("1+1?"), assistant("2"), user("And 1 more?"), assistant("3")]

SFT_ROW = Example(ASKED, [RIGHT])
PAIR_ROW = Example(ASKED, [RIGHT, WRONG])
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
    assert to_example(SFT_SHAPES[name], "x", paired=False) == SFT_ROW


@pytest.mark.parametrize("name", PAIR_SHAPES)
def test_every_shape_of_a_pair(name):
    assert to_example(PAIR_SHAPES[name], "x", paired=True) == PAIR_ROW


def test_all_answers_of_messages_are_learned_and_what_both_sides_begin_with_is_the_prompt():
    assert to_example({"messages": TURNS}, "x", False) == Example(TURNS[:1], [TURNS[1:]])
    last = [[assistant("3")], [assistant("4")]]
    implicit = {"chosen": TURNS[:3] + last[0], "rejected": TURNS[:3] + last[1]}
    assert to_example(implicit, "x", True) == Example(TURNS[:3], last)
    with_system = {"prompt": "1+1?", "chosen": [SYSTEM, *ASKED, *RIGHT], "rejected": WRONG}
    assert to_example(with_system, "x", True) == Example([SYSTEM, *ASKED], [RIGHT, WRONG])
    history = {"prompt": TURNS[:3], "completion": [assistant("3")]}
    assert to_example(history, "x", False) == Example(TURNS[:3], [last[0]])


def test_thoughts_that_are_apart_come_before_the_answer_as_in_qwen3s_template():
    apart = {"role": "assistant", "reasoning_content": "1+1=2\n", "content": "\nIt is 2."}
    together = [assistant("<think>\n1+1=2\n</think>\n\nIt is 2.")]
    assert to_example({"messages": [*ASKED, apart]}, "x", False) == Example(ASKED, [together])


REFUSED = {  # row, paired, what the error says
    "unknown": ({"a": 1, "b": 2}, False, "fields seen: a, b; expected .*completion.* or"),
    "none": ({}, True, "fields seen: none; expected {prompt, chosen, rejected} or {chosen"),
    "pairs for SFT": ({"chosen": "a", "rejected": "b"}, False, "train_redi.py trains on such rows"),
    "SFT for pairs": ({"messages": TURNS}, True, "train_sft.py trains on such rows"),
    "a teacher's": ({"problem": "?", "generations": []}, False, "python -m redi.prepare makes"),
    "not messages": ({"messages": "hello"}, False, "'messages' must be a list of"),
    "a number": ({"prompt": 1, "completion": "a"}, False, "'prompt' must be text, or a list of"),
    "empty list": ({"prompt": [], "completion": "a"}, False, "'prompt' must be"),
    "nested": ({"messages": [TURNS]}, False, "'messages' must be a list"),
    "role": ({"messages": [{"role": "gpt", "content": "a"}]}, False, "roles among system, user"),
    "content": ({"messages": [{"role": "user", "content": None}]}, False, "'messages' must be"),
    "surrogate": ({"prompt": "\ud800", "completion": "a"}, False, "'prompt' must be"),
    "blank": ({"prompt": "a", "completion": " \n"}, False, "'completion' is empty"),
    "blank turn": ({"messages": [*ASKED, assistant(""), *TURNS[2:]]}, False, "is empty"),
    "no answer": ({"messages": ASKED}, False, "must start with an assistant's message"),
    "ends with a question": ({"messages": TURNS[:3]}, False, "and end with one"),
    "no question": ({"messages": RIGHT}, False, "a prompt is missing"),
    "prompt ends with an answer": (
        {"prompt": TURNS[:2], "completion": "3"}, False, "'prompt' ends with an assistant's",
    ),
    "another prompt": (
        {"prompt": "2+2?", "chosen": ASKED + RIGHT, "rejected": ASKED + WRONG}, True,
        "'prompt' is not what chosen and rejected begin with",
    ),
    "another prompt, listed": (
        {"prompt": [user("2+2?")], "chosen": ASKED + RIGHT, "rejected": WRONG}, True,
        "'chosen' is a whole conversation that does not begin with the prompt",
    ),
    "nothing shared": (
        {"chosen": [user("a"), *RIGHT], "rejected": ASKED + WRONG}, True, "no prompt",
    ),
    "two plain texts": ({"chosen": "Q: a A: b", "rejected": "Q: a A: c"}, True, "no prompt"),
    "tool calls": (
        {"messages": [*ASKED, {**RIGHT[0], "tool_calls": [{"id": 1}]}]}, False,
        "'messages' has 'tool_calls' beside 'content'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_other_rows_are_refused_in_one_line(name):
    row, paired, expected = REFUSED[name]
    message = refusal(to_example, row, "file.jsonl:7", paired)
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
        example = to_example(row, "x", paired=False)
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
