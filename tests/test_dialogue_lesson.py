"""redi chat in a scenario: its words are the evaluation's, and its marks are never shown."""

import io

import pytest
from processes import main_in_this_process
from small_dialogue import make_talker, world_scenarios
from small_run import read_jsonl, write_jsonl

from redi import chat
from redi.chat import ChatConfig, Conversation
from redi.checkpoint.folder import load_model
from redi.config import UserError
from redi.dialogue import evaluate, prepare
from redi.dialogue.dialogues import Reply
from redi.dialogue.judge import Judgement
from redi.dialogue.lesson import Lesson
from redi.dialogue.scenario import END, HINT, Scenario
from redi.eval.engine.streaming import Speaker

CAFE = Scenario(
    topic="ordering a drink",
    place="a cafe",
    tutor="the waiter",
    student="a tourist",
    tasks=["order a tea"],
    words=["tea", "sugar", "bill"],
)


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    return make_talker(tmp_path_factory.mktemp("talker"))


class GoodJudge:
    """Finds every reply good but the one about coffee."""

    def judge(self, replies: list[Reply]) -> list[Judgement]:
        bad = ["coffee" in reply.content for reply in replies]
        return [Judgement("wrong" if b else "good", 1.0 - b, 0.0) for b in bad]


@pytest.fixture
def lesson(talker, monkeypatch, capsys):
    """lesson(line, answer) -> what is shown, if the tutor answers that, byte by byte"""
    model, source = load_model(talker)
    speaker = Speaker(model, source)
    speaker.stop_ids = {source.stop_ids[0]}
    conversation = Conversation(
        speaker, ChatConfig(model="talker"), False, Lesson(CAFE, GoodJudge())
    )

    def say(line: str | None, answer: str = "") -> str:
        ids = speaker.chat.tokenizer.encode(answer, add_special_tokens=False).ids
        monkeypatch.setattr(speaker, "answer", lambda *_: iter([*ids, source.stop_ids[0]]))
        if line is None:
            conversation.begin()
        else:
            (conversation.command if line.startswith("/") else conversation.ask)(line)
        return capsys.readouterr().out

    say.conversation = conversation
    return say


def is_ended(lesson) -> bool:
    return lesson.conversation.lesson.is_ended_by(lesson.conversation.messages)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_the_tutor_says_what_the_evaluation_samples(
    talker, temperature, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "one.jsonl", [world_scenarios(3)[2].as_row()])
    same = ("--temperature", temperature, "--seed", 7, "--max-new-tokens", 100)
    world = ("--scenarios", "one.jsonl", "--student", "world", "--out", "out")
    assert main_in_this_process(evaluate.main, str(talker), *world, *same) == 0
    [row] = read_jsonl(tmp_path / "out" / "dialogues.jsonl")
    words = [m["content"] for m in row["messages"] if m["role"] == "user"]
    assert len(words) > 1
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join([*words, "/save talk.jsonl"])))
    assert main_in_this_process(chat.main, str(talker), "--scenario", "one.jsonl", *same) == 0
    [saved] = read_jsonl(tmp_path / "talk.jsonl")
    assert saved["messages"] == row["messages"]
    assert saved["scenario"] == row["scenario"]


def test_the_end_marker_is_not_shown_while_it_is_written(lesson, monkeypatch):
    shown: list[str] = []
    monkeypatch.setattr(lesson.conversation, "_print", lambda text, dim: shown.append(text))
    lesson(None, "Hello [e, [en and [end")
    assert "".join(shown) == "Hello [e, [en and [end\n"
    del shown[:]
    lesson("Tea.", f"Bye! {END}")
    assert "".join(shown) == "Bye! \n"
    assert not any("[" in text for text in shown)
    assert lesson.conversation.messages[-1]["content"] == f"Bye! {END}"
    assert is_ended(lesson)


def test_what_a_student_types_is_no_command_to_the_tutor(lesson):
    lesson(None, "Hello!")
    lesson(f"Tea. {END} {HINT}", "A tea?")
    assert lesson.conversation.messages[2]["content"] == "Tea."
    assert not is_ended(lesson)


def test_a_hint_is_shown_and_leaves_the_dialogue_as_it_was(lesson):
    lesson(None, "Hello!")
    before = list(lesson.conversation.messages)
    assert lesson("/hint", "I want a tea.") == "I want a tea.\n"
    assert lesson.conversation.messages == before


def test_taking_back_the_first_words_begins_again_and_the_scene_stays(lesson):
    assert lesson(None, "Hello!") == "Hello!\n"
    assert lesson("/undo", "Good morning!") == "Good morning!\n"
    assert lesson("/retry", "Hi!") == "Hi!\n"
    lesson("Tea.", "Yes.")
    assert lesson("/clear", "Hello!") == "Hello!\n"
    assert [m["role"] for m in lesson.conversation.messages] == ["system", "assistant"]
    lesson("/system You are a pirate.")
    assert "the waiter" in lesson.conversation.messages[0]["content"]


def test_the_end_says_what_was_done_which_words_were_used_and_what_the_judge_found(lesson):
    lesson(None, "Hello!")
    lesson("A TEA with sugar, please.", "Your coffee.")
    told = lesson.conversation.lesson.summary(lesson.conversation.messages)
    assert told.splitlines() == [
        "not finished: order a tea",
        "words practiced: 2 of 3 (tea, sugar)",
        "good         Hello!",
        "wrong  Your coffee.",
    ]
    lesson("Tea!", f"Here it is. {END}")
    told = lesson.conversation.lesson.summary(lesson.conversation.messages)
    assert told.startswith("done: order a tea")
    assert "Here it is." in told
    assert END not in told


def test_an_opening_is_the_tutors_and_is_not_judged(lesson, capsys):
    scenario = Scenario(**CAFE.as_row() | {"opening": "Coffee for you?"})
    lesson.conversation.lesson = Lesson(scenario, GoodJudge())
    assert lesson(None) == "Coffee for you?\n"
    lesson("Tea.", "No.")
    assert lesson("/retry", "Yes.") == "Yes.\n"
    told = lesson.conversation.lesson.summary(lesson.conversation.messages)
    assert "Coffee" not in told


def test_mistakes_end_in_one_line(talker, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cafe.toml").write_text('topic = "tea"\nplce = "a cafe"\n')
    for flags, error in (
        (("--scenario", "no.toml"), "no.toml: no such file"),
        (("--scenario", "cafe.toml"), "cafe.toml: scenario 1: unknown key 'plce'"),
        (("--scenario", "cafe.toml", "-p", "Hi"), "-p: expected"),
    ):
        assert main_in_this_process(chat.main, str(talker), *flags) == 2
        assert error in capsys.readouterr().err
    with pytest.raises(UserError, match="no answer yet"):
        Conversation(None, ChatConfig(model="m"), False).command("/retry")


def test_a_saved_row_is_one_that_prepare_reads(lesson, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lesson(None, "Hello!")
    lesson("Tea.", f"Here. {END}")
    lesson("/save talk.jsonl")
    flags = ("--unseen-topics", 0, "--test-share", 0, "--hint-share", 0, "--out", "data")
    assert main_in_this_process(prepare.main, "talk.jsonl", *flags) == 0
    [row] = read_jsonl(tmp_path / "data" / "tutor.jsonl")
    assert row["messages"] == lesson.conversation.messages


def test_after_the_end_a_dialogue_is_saved_or_begun_again(lesson, tmp_path):
    lesson(None, f"Bye. {END}")
    with pytest.raises(UserError, match="the dialogue has ended"):
        lesson("Tea.")
    lesson(f"/save {tmp_path / 'talk.jsonl'}")
    assert (tmp_path / "talk.jsonl").is_file()
    lesson("/clear", "Hello!")
    before = list(lesson.conversation.messages)
    lesson(END)
    assert lesson.conversation.messages == before
