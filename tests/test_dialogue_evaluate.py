"""redi dialogue evaluate and report: killed runs end in the same bytes, and rates are right."""

import dataclasses
import json
import random
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from processes import command, main_in_this_process, wait_until
from small_dialogue import make_talker, world_scenarios
from small_run import files_in, read_jsonl, refusal, write_jsonl

from redi.config import UserError
from redi.dialogue import evaluate, report
from redi.dialogue.dialogues import read_dialogues
from redi.dialogue.evaluate import EvaluateConfig
from redi.dialogue.figures import Rates, corrected_rate
from redi.dialogue.report import Run
from redi.dialogue.scenario import END, HINT
from redi.dialogue.world import make_dialogue

WORLD = ("--student", "world", "--judge", "world", "--max-new-tokens", 60, "--slots", 3)
HOT = ("--temperature", 1.0, "--samples", 2)


@pytest.fixture(scope="module")
def talker(tmp_path_factory) -> Path:
    return make_talker(tmp_path_factory.mktemp("talker") / "model")


@pytest.fixture
def home(talker, tmp_path, monkeypatch) -> Path:
    """A working folder with the model; scenarios, and dialogues, of five topics and of two more."""
    monkeypatch.chdir(tmp_path)
    Path("model").symlink_to(talker)
    for name, scenarios in (("seen", world_scenarios(5)), ("unseen", world_scenarios(2, 30))):
        rows = [one.as_row() | {"max_turns": 4} for one in scenarios]
        write_jsonl(Path(f"{name}.jsonl"), rows)
        gold = [{"scenario": one.as_row(), "messages": make_dialogue(one, 1)} for one in scenarios]
        write_jsonl(Path(f"{name}_dialogues.jsonl"), gold)
    return tmp_path


def run(*flags: object, model: str = "model", unseen: bool = True, kind: str = "") -> int:
    sides = ("--scenarios", f"seen{kind}.jsonl", *(("--unseen", f"unseen{kind}.jsonl") * unseen))
    return main_in_this_process(evaluate.main, model, *sides, *flags)


def refused(capsys, *flags: object, **given) -> str:
    assert run(*flags, **given) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


# ---------------------------------------------------------------- evaluating


def test_dialogues_are_held_in_order_judged_and_reported(home, capsys):
    assert run(*WORLD, *HOT, "--hints", "--out", "out") == 0
    rows = read_jsonl("out/dialogues.jsonl")
    scenarios = [*world_scenarios(5), *world_scenarios(2, 30)]
    assert [(r["scenario"]["id"], r["sample"]) for r in rows] == [
        (one.id, sample) for one in scenarios for sample in range(2)
    ]
    assert [row["side"] for row in rows] == ["seen"] * 10 + ["unseen"] * 4
    for row in rows:
        replies = [m for m in row["messages"] if m["role"] == "assistant"]
        assert all(m["label"] == "broken" or m["good"] in (0.0, 1.0) for m in replies)
        asked = [m for m in row["messages"] if m["role"] == "user"]
        assert all(m["hint_label"] in ("good", "unfit") for m in asked if "hint" in m)
        assert len(asked) == len(replies) - 1 or row["end"] in ("student", "context")
    assert next(read_dialogues("out/dialogues.jsonl", {})).scenario.id == scenarios[0].id
    shown = capsys.readouterr().out
    assert "response success" in shown
    assert sorted(path.name for path in Path("out").iterdir()) == [
        "config.toml", "dialogues.jsonl", "metrics.jsonl", "report.html", "report.json",
        "report.md",
    ]  # fmt: skip
    before = files_in("out")
    assert run(*WORLD, *HOT, "--hints", "--out", "out", "--slots", 1) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert files_in("out") == before


def test_stopped_again_and_again_it_ends_in_the_same_bytes(home, monkeypatch, capsys):
    flags = (*WORLD, *HOT, "--hints")
    assert run(*flags, "--out", "whole") == 0
    real, stops = evaluate.talk, []

    def interrupted(*arguments):
        for number, one in enumerate(real(*arguments)):
            if number == 3:
                stops.append(one)
                raise KeyboardInterrupt
            yield one

    monkeypatch.setattr(evaluate, "talk", interrupted)
    for done in (3, 6, 9):
        assert run(*flags, "--out", "out") == 130
        assert f"holds {done} of 14 dialogues; the same command resumes" in capsys.readouterr().err
        with open("out/dialogues.unfinished.jsonl", "ab") as file:
            file.write(b'{"number": 1, "ro')  # a line that a kill cut short
    monkeypatch.setattr(
        evaluate, "label_replies", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    monkeypatch.setattr(evaluate, "talk", real)
    assert run(*flags, "--out", "out") == 130  # all dialogues are there, without labels
    assert "label" not in read_jsonl("out/dialogues.jsonl")[0]["messages"][0]
    monkeypatch.undo()
    monkeypatch.chdir(home)
    monkeypatch.setattr(evaluate, "load_voices", None)  # no model is needed any more
    assert run(*flags, "--out", "out") == 0
    assert_same_files("out", "whole")


def assert_same_files(one: str, other: str) -> None:
    first, second = (
        {path.name: content for path, content in files_in(folder).items()}
        for folder in (one, other)
    )
    for files, folder in ((first, one), (second, other)):
        text = files["config.toml"].decode().replace(f'out = "{folder}"', "")
        files["config.toml"] = text
        found = json.loads(files["report.json"])
        assert found["settings"].pop("out") == folder
        files["report.json"] = found
    assert first == second


@pytest.mark.slow
def test_killed_ten_times_it_ends_in_the_same_bytes(home):
    sides = ("--scenarios", "seen.jsonl", "--unseen", "unseen.jsonl", *WORLD, "--temperature", 1.0)
    flags = ("-m", "redi.dialogue.evaluate", "model", *sides, "--samples", 12, "--hints")
    rng, part = random.Random(0), Path("out/dialogues.unfinished.jsonl")

    def lines() -> int:
        return part.read_bytes().count(b"\n") if part.is_file() else 0

    whole = command(*flags, "--out", "whole")
    assert whole.wait(300) == 0
    for _ in range(10):
        before = lines()
        process = command(*flags, "--out", "out")
        wait_until(lambda before=before: lines() > before, process)
        time.sleep(rng.uniform(0.0, 0.1))
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
    assert 10 <= lines() < 84
    last = command(*flags, "--out", "out")
    last.communicate(timeout=300)
    assert last.returncode == 0
    assert_same_files("out", "whole")


def test_a_model_plays_the_student_and_a_model_judges(home, monkeypatch, capsys):
    seen = []

    def load_judge(model, settings, world):
        seen.append((model, settings))

        def judge(replies):
            seen.extend(replies)
            good = [0.75 if "e" in reply.content else 0.25 for reply in replies]
            return [SimpleNamespace(label="good" if g > 0.5 else "odd", good=g) for g in good]

        return SimpleNamespace(judge=judge)

    monkeypatch.setattr(evaluate, "load_judge", load_judge)
    assert run("--student", "model", "--judge", "model", "--max-new-tokens", 40, unseen=False) == 0
    assert seen.pop(0) == ("model", None)
    rows = read_jsonl("model/dialogue/dialogues.jsonl")
    replies = [m for row in rows for m in row["messages"] if m["role"] == "assistant"]
    assert [one.content for one in seen] == [m["content"] for m in replies]
    assert all(m["good"] == (0.75 if "e" in m["content"] else 0.25) for m in replies)
    assert all(HINT not in m["content"] for row in rows for m in row["messages"])


def test_recorded_dialogues_are_answered_at_each_of_their_states(home, capsys):
    flags = ("--judge", "world", *HOT, "--hints", "--max-new-tokens", 60, "--out", "out")
    assert run(*flags, kind="_dialogues") == 0
    rows = read_jsonl("out/dialogues.jsonl")
    gold = [row for side in ("seen", "unseen") for row in read_jsonl(f"{side}_dialogues.jsonl")]
    expected = [
        (row["scenario"]["id"], row["messages"][:n])
        for row in gold
        for n, message in enumerate(row["messages"])
        if message["role"] == "assistant"
    ]
    plain = [[{k: m[k] for k in ("role", "content")} for m in row["messages"]] for row in rows]
    assert [(row["scenario"]["id"], m) for row, m in zip(rows, plain)] == expected
    for row in rows:
        assert len(row["replies"]) == 2
        assert all(reply["label"] for reply in row["replies"])
        assert all("label" not in message for message in row["messages"])
        assert ["hint" in message for message in row["messages"]][:-1].count(True) == 0
    dialogue = list(read_dialogues("out/dialogues.jsonl", {}))[1]
    kinds = [(one.label is not None, one.is_hint) for one in dialogue.all_replies()]
    assert kinds == [(False, False), (True, True), (True, False), (True, False)]
    found = json.loads(Path("out/report.json").read_text())["sides"]["seen"]
    assert found["counts"]["replies"] == 2 * sum(row["side"] == "seen" for row in rows)
    assert found["rates"].keys() == {"response success", "suggestion success"}


def test_a_state_that_two_dialogues_share_is_answered_once_and_commands_are_text(tmp_path):
    scenario = world_scenarios(1)[0].as_row()
    user = [{"role": "user", "content": text} for text in (f"Hi {END}", "Ho")]
    first = {"role": "assistant", "content": "Hello"}
    rows = [{"scenario": scenario, "messages": [first, one, first]} for one in (*user, user[1])]

    def states(rows: list[dict]) -> list[tuple]:
        path = str(write_jsonl(tmp_path / "d.jsonl", rows))
        return [job.states for job in evaluate.read_jobs(EvaluateConfig(model="m", scenarios=path))]

    found = states(rows)
    assert [[len(state) for state in one] for one in found] == [[0, 2], [2], []]
    assert found[0][1][1]["content"] == "Hi"
    several = {"messages": [first, user[0]], "replies": [{"content": "a"}, {"content": "b"}]}
    [found] = states([{"scenario": scenario, **several}])
    assert [[message["content"] for message in state] for state in found] == [[], ["Hello", "Hi"]]
    other = {"scenario": {**scenario, "place": "x"}, "messages": [first]}
    assert refusal(states, [rows[0], other]).endswith(
        f"two scenarios have the id {scenario['id']!r}"
    )
    opened = {**scenario, "opening": "Hello"}
    [[state]] = states([{"scenario": opened, "messages": [first, user[0], first]}])
    assert len(state) == 2  # the opening is not asked for


def test_an_opening_and_recorded_replies_are_not_judged():
    scenario = {**world_scenarios(1)[0].as_row(), "opening": "Hello"}
    messages = [
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "x", "hint": ""},
        {"role": "assistant", "content": "b"},
    ]
    held = evaluate.replies_to_judge({"scenario": scenario, "messages": messages})
    assert [(one.content, one.is_hint, len(one.history)) for one in held] == [
        ("", True, 1), ("b", False, 2),
    ]  # fmt: skip
    assert held[1].said is messages[2]
    state = {"scenario": scenario, "messages": messages[:2], "replies": [{"content": "c"}]}
    assert [one.content for one in evaluate.replies_to_judge(state)] == ["", "c"]


def test_what_a_user_can_get_wrong_is_one_line(home, talker, tmp_path, capsys, monkeypatch):
    assert main_in_this_process(evaluate.main, "model") == 2
    assert "--scenarios: expected a file" in capsys.readouterr().err
    Path("none.toml").write_text("scenario = []")
    given = ("--scenarios", "none.toml", *WORLD)
    assert main_in_this_process(evaluate.main, "model", *given) == 2
    assert "none.toml: expected one scenario" in capsys.readouterr().err
    assert "nobody: no such file or folder" in refused(capsys, "--student", "nobody")
    write_jsonl(Path("again.jsonl"), [world_scenarios(1)[0].as_row() | {"id": "other"}])
    error = refused(capsys, *WORLD, "--unseen", "again.jsonl")
    assert "--unseen: the topic 'buying bread' is in --scenarios" in error
    same = ("--scenarios", "seen.jsonl", "--unseen", "seen.jsonl", *WORLD)
    assert main_in_this_process(evaluate.main, "model", *same) == 2
    assert "another scenario has the id 'buying bread 1.0'" in capsys.readouterr().err
    other = {**world_scenarios(1)[0].as_row(), "topic": "tea"}
    write_jsonl(Path("tea.jsonl"), [other])
    given = ("--scenarios", "tea.jsonl", *WORLD)
    assert main_in_this_process(evaluate.main, "model", *given) == 2
    assert "not of the world" in capsys.readouterr().err
    make_talker(Path("short"), context=64)
    assert "and the model's context is 64" in refused(capsys, *WORLD, model="short")
    assert "another run" in refused_later(capsys)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "start it without torchrun" in refused(capsys, *WORLD)


def refused_later(capsys) -> str:
    assert run(*WORLD, "--out", "out", unseen=False) == 0
    write_jsonl(Path("seen.jsonl"), [one.as_row() for one in world_scenarios(5)])
    assert "the scenarios or templates changed" in refused(
        capsys, *WORLD, "--out", "out", unseen=False
    )
    return refused(capsys, *WORLD, "--out", "out", "--seed", 3, unseen=False)


# ---------------------------------------------------------------- reporting, by hand


def said(label: str, **fields) -> dict:
    return {"role": "assistant", "content": label, "label": label, "good": 0.5, **fields}


def session(topic: str, number: int, labels: str, end: str = "tutor", side: str = "seen") -> dict:
    """labels: g is good, w wrong, s skips."""
    names = {"g": "good", "w": "wrong", "s": "skips"}
    messages = []
    for label in labels:
        if messages:
            hint = {"hint": "?", "hint_label": "good" if label == "g" else "unfit"}
            hint["hint_good"] = float(label == "g")
            messages.append({"role": "user", "content": "a menu, please", **hint})
        messages.append(said(names[label]))
    scenario = {"id": f"{topic} {number}", "topic": topic, "words": ["Menu", "bill"]}
    scenario |= {"place": "p", "tutor": "t", "student": "s", "tasks": ["x"]}
    row = {"side": side, "scenario": scenario, "sample": 0, "messages": messages}
    return {**row, "end": end, "tokens": 10 * len(labels)}


ROWS = [
    session("tea", 1, "gg"), session("tea", 1, "gw"), session("tea", 2, "ggg"),
    session("bus", 1, "gsg", end="max_turns"), session("bus", 2, "gg", end="student"),
    session("zoo", 1, "gg", side="unseen"), session("farm", 1, "ws", end="length", side="unseen"),
]  # fmt: skip
SETTINGS = {"model": "m", "student": "world", "judge": "world"}


def test_rates_and_counts_by_hand():
    found = report.summary(SETTINGS, ROWS)
    seen, unseen = found["sides"]["seen"], found["sides"]["unseen"]
    rates = {name: (one["good"], one["count"]) for name, one in seen["rates"].items()}
    assert rates == {
        "response success": (10, 12), "suggestion success": (5, 7), "session success": (2, 5),
    }  # fmt: skip
    assert unseen["rates"]["session success"]["rate"] == 0.5
    assert seen["counts"] == {
        "scenarios": 4, "topics": 2, "dialogues or states": 5,
        "ended by: max_turns": 1, "ended by: student": 1, "ended by: tutor": 3,
        "failed because of: student": 1, "failed because of: the tutor": 2,
        "fault: skips": 1, "fault: wrong": 1, "replies": 12, "tutor's tokens": 120,
    }  # fmt: skip
    assert json.loads(json.dumps(found)) == found


def test_intervals_are_those_of_drawing_scenarios_and_topics_one_by_one():
    rows = [
        session(f"t{n % 6}", n, "".join(random.Random(n).choices("gw", k=3 + n % 3)))
        for n in range(30)
    ]
    rng = np.random.default_rng(0)
    for key, by in (("id", "scenarios"), ("topic", "topics")):
        units: dict[str, list[str]] = {}
        for row in rows:
            units.setdefault(row["scenario"][key], []).extend(report.labels(row))
        groups, rates = list(units.values()), []
        for _ in range(4000):
            drawn = [x for i in rng.integers(0, len(groups), len(groups)) for x in groups[i]]
            rates.append(drawn.count("good") / len(drawn))
        side = report.summary(SETTINGS, rows)["sides"]["seen"]
        found = side["rates"]["response success"][f"interval by {by}"]
        assert found == pytest.approx(np.quantile(rates, [0.025, 0.975]), abs=0.015)


def test_a_session_without_a_reply_has_failed_and_one_topic_has_no_interval():
    row = session("tea", 1, "", end="student")
    row["messages"] = [{"role": "assistant", "content": "Hello"}, {"role": "user", "content": ""}]
    row["scenario"]["opening"] = "Hello"
    found = report.summary(SETTINGS, [row, session("tea", 2, "gg")])["sides"]["seen"]
    assert found["rates"]["session success"]["rate"] == 0.5
    assert found["rates"]["session success"]["interval by topics"] is None
    assert found["rates"]["session success"]["interval by scenarios"] == [0.0, 1.0]
    assert found["counts"]["failed because of: student"] == 1


def test_rates_are_corrected_where_the_judge_was_measured(tmp_path):
    rates = Rates(tpr=0.9, num_good=50, tnr=0.8, num_bad=40)
    group = {"rates": dataclasses.asdict(rates)}
    path = tmp_path / "agreement.json"
    path.write_text(json.dumps({"judge": {}, "measured": {"seen replies": group}}))
    found = report.summary({**SETTINGS, "judge_settings": str(path)}, ROWS)
    seen = found["sides"]["seen"]["rates"]
    expected = corrected_rate(10 / 12, 12, rates)
    assert seen["response success"]["corrected"] == expected
    assert expected[0] == pytest.approx((10 / 12 - 0.2) / 0.7)
    assert "corrected" not in seen["session success"]
    assert "corrected" not in found["sides"]["unseen"]["rates"]["response success"]
    low, high = (f"{100 * end:.1f}" for end in expected[1:])
    assert ["  corrected", f"90.5 [{low}, {high}]", ""] in report.cells(found)
    seen["response success"]["corrected"] = None  # no share of good replies fits
    assert ["  corrected", "none fits", ""] in report.cells(found)


def test_without_a_judge_only_counts_are_reported():
    rows = [session("tea", 1, "gg"), session("tea", 2, "", end="student")]
    for message in rows[0]["messages"]:
        for name in ("label", "good", "hint_label"):
            message.pop(name, None)
    found = report.summary({"model": "m", "student": "world"}, rows)["sides"]["seen"]
    assert found["rates"] == {}
    assert found["counts"]["ended by: tutor"] == 1
    assert not any(name.startswith("failed") for name in found["counts"])


def test_a_topic_in_two_spellings_is_one():
    rows = [session("Tea  time", 1, "g"), session("tea time", 2, "w")]
    seen = report.summary(SETTINGS, rows)["sides"]["seen"]
    assert seen["counts"]["topics"] == 1
    assert seen["rates"]["response success"]["interval by topics"] is None


def test_a_report_is_not_written_again_with_other_settings_of_the_judge(tmp_path, capsys):
    write_jsonl(tmp_path / "dialogues.jsonl", ROWS)
    (tmp_path / "agreement.json").write_text('{"judge": {}, "measured": {}}')
    path = tmp_path / "agreement.json"
    settings = f"# judge's settings: 0\njudge = 'm'\njudge_settings = '{path}'\n"
    (tmp_path / "config.toml").write_text(settings)
    assert main_in_this_process(report.main, tmp_path) == 2
    assert f"{path}: changed since {tmp_path} was evaluated" in capsys.readouterr().err


def test_an_opening_is_not_a_reply():
    row = session("tea", 1, "g")
    opening = {"role": "assistant", "content": "Hello"}
    row["messages"] = [opening, {"role": "user", "content": "Hi"}, *row["messages"]]
    row["scenario"]["opening"] = "Hello"
    assert report.summary(SETTINGS, [row])["sides"]["seen"]["counts"]["replies"] == 1


def test_text_stays_text_in_the_page_and_in_the_table(tmp_path, capsys):
    evil = "</script><b>&amp;"
    row = session(evil, 1, "gw")
    row["messages"][0]["content"] = row["messages"][1]["content"] = evil
    row["messages"][1]["hint"] = row["messages"][2]["label"] = evil
    row["messages"][1]["hint_label"] = evil
    row["scenario"] |= {"facts": [evil], "wants": [evil]}
    state = {**session("tea", 1, "g"), "replies": [said("good", content=evil)]}
    del state["end"]
    write_jsonl(tmp_path / "dialogues.jsonl", [row, state])
    (tmp_path / "config.toml").write_text(f"model = '{evil}'\nstudent = 'world'\n")
    assert main_in_this_process(report.main, tmp_path) == 0
    page = (tmp_path / "report.html").read_text()
    assert page.count("</script>") == 1
    assert "<b>&" not in page
    assert page.count("&lt;/script&gt;&lt;b&gt;&amp;amp;") > 8
    for value in ("tea", "good"):
        assert f'<option value="{value}">' in page
    assert '<span class="faint">0.50</span>' in page


def test_two_evaluations_are_compared_scenario_by_scenario(tmp_path, capsys):
    better = [session("tea", number, "gg") for number in range(8)]
    worse = [session("tea", number, "gw") for number in range(8)]
    table = report.compare(Run(SETTINGS, worse, {}), Run(SETTINGS, better, {}))
    assert table[1][:4] == ["session success, seen", "8", "+100.0", "[+100.0, +100.0]"]
    assert float(table[1][4]) == pytest.approx(2 / 2**8, rel=0.1)
    assert table[2][2] == "+50.0"
    assert report.compare(Run(SETTINGS, better, {}), Run(SETTINGS, better, {}))[1][2:] == [
        "+0.0",
        "[+0.0, +0.0]",
        "1",
    ]
    for name, rows in (("a", worse), ("b", better), ("c", better[1:])):
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / "dialogues.jsonl", rows)
        (tmp_path / name / "config.toml").write_text("judge = 'world'\n")
    assert main_in_this_process(report.main, tmp_path / "a", tmp_path / "b") == 0
    assert "session success, seen" in capsys.readouterr().out
    for folders, message in ((("a", "c"), "different scenarios"), (("a",) * 3, "one or two")):
        assert main_in_this_process(report.main, *(tmp_path / one for one in folders)) == 2
        assert message in capsys.readouterr().err
    moved = [row | {"side": "unseen"} for row in better]
    changed = [row | {"scenario": row["scenario"] | {"place": "x"}} for row in better]
    for others in (moved, changed):
        with pytest.raises(UserError, match="different scenarios or sides"):
            report.compare(Run(SETTINGS, better, {}), Run(SETTINGS, others, {}))
    for settings, message in (
        ("judge = 'm'", "different settings of --judge"),
        ("# judge's settings: 1\njudge = 'world'", "different contents of the judge's settings"),
        ("# judge's weights: 1\njudge = 'world'", "different contents of the judge's weights"),
    ):
        (tmp_path / "c" / "config.toml").write_text(settings)
        assert main_in_this_process(report.main, tmp_path / "a", tmp_path / "c") == 2
        assert message in capsys.readouterr().err
    (tmp_path / "c" / "config.toml").write_text("")
    assert main_in_this_process(report.main, tmp_path / "c", tmp_path / "c") == 2
    assert "have no --judge" in capsys.readouterr().err
    assert main_in_this_process(report.main, tmp_path / "no") == 2
    assert "no such file" in capsys.readouterr().err
