"""A scenario in `redi chat`: what is printed before and after it, and which row it leaves.

The tutor's words are those that redi dialogue evaluate samples as sample 0, if the student says the
same; /retry is the next sample.
"""

from dataclasses import dataclass
from typing import Any

from redi.data.tokenizer import Message
from redi.dialogue.dialogues import Dialogue
from redi.dialogue.judge import Judge, load_judge
from redi.dialogue.scenario import Scenario, read_scenarios, split_end, words_used
from redi.dialogue.talk import num_replies, turn_key
from redi.distributed import World
from redi.tables import text_table


@dataclass(frozen=True)
class Lesson:
    scenario: Scenario
    judge: Judge | None

    @classmethod
    def load(
        cls, scenarios: str, judge: str | None, settings: str | None, world: World
    ) -> "Lesson":
        """The first scenario of a file, and a judge. Raises UserError as what reads them."""
        scenario = next(read_scenarios(scenarios))
        return cls(scenario, load_judge(judge, settings, world) if judge else None)

    def scene(self) -> str:
        """What the student is told, and the commands."""
        commands = "/hint: what you could say; /help: all commands"
        return f"{self.scenario.prompt('student')}\n{commands}\n"

    def system(self) -> Message:
        return {"role": "system", "content": self.scenario.prompt("tutor")}

    def key(self, messages: list[Message], attempt: int, who: str) -> int:
        return turn_key(self.scenario.id, attempt, num_replies(messages), who)

    def row(self, messages: list[Message]) -> dict[str, Any]:
        """For a file that redi dialogue prepare reads."""
        return {"scenario": self.scenario.as_row(), "messages": messages[1:]}

    def summary(self, messages: list[Message]) -> str:
        """How far the dialogue came, the words that were practiced, and the judge's verdicts."""
        turns = messages[1:]
        ended = bool(turns) and split_end(turns[-1]["content"])[1]
        tasks, words = "; ".join(self.scenario.tasks), self.scenario.words
        lines = [f"{'done' if ended else 'not finished'}: {tasks}"]
        if words:
            used = words_used(self.scenario, turns)
            lines.append(f"words practiced: {len(used)} of {len(words)} ({', '.join(used)})")
        if self.judge:
            replies = list(Dialogue(self.scenario, turns, []).all_replies())
            replies = replies[bool(self.scenario.opening) :]  # which is not the tutor's own
            found = zip(replies, self.judge.judge(replies))
            lines.append(text_table([(j.label, split_end(r.content)[0]) for r, j in found]))
        return "\n".join(lines)
