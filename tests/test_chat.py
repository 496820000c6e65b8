"""redi/chat.py: answers are the engine's, and a conversation can be taken back, saved, stopped."""

import io
import json

import pytest
import torch
from processes import main_in_this_process
from small_run import write_jsonl

from redi import chat, programs
from redi.chat import ChatConfig, Conversation
from redi.checkpoint.folder import load_model
from redi.config import UserError
from redi.eval.engine.sampling import Sampling
from redi.eval.engine.streaming import Speaker

GREEDY = Sampling(temperature=0.0)
ABACUS = "🧮"  # four bytes, so several tokens of a small vocabulary


@pytest.fixture(scope="module")
def loaded(made):
    model, source = load_model(made / "student")
    return model.double(), source


@pytest.fixture
def speaker(loaded) -> Speaker:
    return Speaker(*loaded)


@pytest.fixture
def talk(speaker, capsys):
    """talk(line) -> what the terminal shows of it"""
    talk.conversation = Conversation(speaker, ChatConfig(model="student", max_new_tokens=6), False)

    def say(line: str) -> str:
        (talk.conversation.command if line.startswith("/") else talk.conversation.ask)(line)
        return capsys.readouterr().out

    say.conversation = talk.conversation
    return say


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_one_answer_is_sample_0_of_a_benchmark_of_that_problem(here, capsys, temperature):
    write_jsonl(here / "chat.jsonl", [{"id": "1", "problem": "6-1=?", "answer": "5"}])
    same = ("--temperature", temperature, "--seed", 7, "--max-new-tokens", 20)
    protocol = ("--user-prompt", "plain", "--prefix", "", "--samples", 2, "--out", "out")
    files = ("--model", "student", "--benchmark", "chat.jsonl")
    assert main_in_this_process(programs.evaluate, *files, *protocol, *same) == 0
    lines = (here / "out" / "completions" / "chat.jsonl").read_text().splitlines()
    capsys.readouterr()
    assert main_in_this_process(chat.main, "student", "-p", "6-1=?", *same) == 0
    assert capsys.readouterr().out == json.loads(lines[0])["text"] + "\n"


def test_an_answer_from_the_cache_is_that_of_a_fresh_speaker(loaded, speaker):
    """The prompts share their beginning, are equal, go back, and have nothing in common."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randint(3, 300, (70,), generator=generator).tolist()
    for prompt in (first[:40], first, first, [*first[:50], 7, 8], first[:3], [5, 6]):
        for sampling in (GREEDY, Sampling(1.0, 0.9, 3)):
            expected = list(Speaker(*loaded).answer(prompt, 1, sampling, 12))
            assert list(speaker.answer(prompt, 1, sampling, 12)) == expected


def test_only_what_the_cache_lacks_is_run(loaded, speaker):
    sizes: list[int] = []
    hook = loaded[0].model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    answer = list(speaker.answer(list(range(3, 43)), 1, GREEDY, 4))
    list(speaker.answer([*range(3, 43), *answer[:3], 9, 9], 1, GREEDY, 1))
    hook.remove()
    assert sizes == [40, *[1] * (len(answer) - 1), 2]


def test_a_conversation_is_retried_taken_back_and_saved(talk, tmp_path):
    first, second = talk("6-1=?"), talk("and 2?")
    assert talk("/retry") != second
    assert [m["role"] for m in talk.conversation.messages] == ["user", "assistant"] * 2
    talk("/undo")
    assert talk("and 2?") == second
    messages = talk.conversation.messages
    talk(f"/save {tmp_path / 'row.jsonl'}")
    saved = json.loads((tmp_path / "row.jsonl").read_text())["messages"]
    assert saved == messages
    assert saved[1]["content"] + "\n" == first
    talk("/clear")
    assert talk("6-1=?") == first
    talk("/system Be brief.")
    assert talk("6-1=?") != first
    talk("/clear")
    assert talk.conversation.messages == [{"role": "system", "content": "Be brief."}]
    with pytest.raises(UserError, match="no answer yet"):
        talk("/undo")


def test_a_character_is_shown_once_all_its_tokens_are_there(talk, monkeypatch):
    speaker = talk.conversation.speaker
    ids = speaker.chat.tokenizer.encode(f"a{ABACUS}b", add_special_tokens=False).ids
    assert len(ids) > 3
    monkeypatch.setattr(speaker, "answer", lambda *_: iter([*ids, *ids[:2]]))
    shown: list[str] = []
    monkeypatch.setattr(talk.conversation, "_print", lambda text, dim: shown.append(text))
    talk("?")
    assert "".join(shown[:-1]) == f"a{ABACUS}ba"
    assert f"{ABACUS}" in shown
    assert shown[-1] == "\ufffd\n"  # the answer was cut inside the character


def test_thoughts_are_dimmed_and_characters_that_do_not_print_are_escaped(
    talk, monkeypatch, capsys
):
    conversation = talk.conversation
    conversation.terminal = True
    text = "<think>\nso\n</think>\n\x1b[2J5"
    ids = conversation.speaker.chat.tokenizer.encode(text, add_special_tokens=False).ids
    monkeypatch.setattr(conversation.speaker, "answer", lambda *_: iter(ids))
    shown = talk("?").replace(chat.PLAIN + chat.DIM, "")
    thought, rest = shown.rsplit(chat.PLAIN, 1)
    assert rest == "\\x1b[2J5\n"
    assert thought.replace(chat.DIM, "") == "<think>\nso\n</think>\n"
    assert ">\nso\n" in thought.split(chat.DIM)[1]


def test_ctrl_c_ends_the_answer_and_keeps_what_was_said(talk, monkeypatch, capsys):
    speaker = talk.conversation.speaker
    ids = speaker.chat.tokenizer.encode("half", add_special_tokens=False).ids

    def interrupted(*_):
        yield from ids
        raise KeyboardInterrupt

    monkeypatch.setattr(speaker, "answer", interrupted)
    assert talk("?") == "half\n"
    assert talk.conversation.messages[-1] == {"role": "assistant", "content": "half"}


def test_a_full_context_is_one_line_and_the_question_is_taken_back(talk):
    with pytest.raises(
        UserError, match=r"has [0-9,]+ tokens, and the model's context is 256: /undo"
    ):
        talk("6-1=? " * 200)
    assert talk.conversation.messages == []
    assert talk("6-1=?")


def test_piped_lines_are_answered_without_prompts_and_errors_do_not_end_them(
    here, monkeypatch, capsys
):
    lines = "6-1=?\n\n/undo\n/undo\n/unknown\n6-1=?\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    assert main_in_this_process(chat.main, "student", "--max-new-tokens", 5) == 0
    shown = capsys.readouterr()
    half = len(shown.out) // 2
    assert shown.out[:half] == shown.out[half:]  # the second /undo came too early
    assert "there is no answer yet" in shown.err
    assert "/retry" in shown.err
