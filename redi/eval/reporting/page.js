"use strict";
const byId = id => document.getElementById(id);
const data = JSON.parse(byId("data").textContent);
const MARK = {correct: "✓", incorrect: "✗", no_answer: "∅", truncated: "…", timeout: "⧗"};
const problems = data.benchmarks.flatMap(b => b.problems.map(p => ({...p, benchmark: b.name})));
const several = data.runs.length > 1;
const words = verdict => verdict.replace("_", " ");
const difficulty = p => p.difficulty === null ? "" : `difficulty ${p.difficulty}`;

// Strings become text nodes: nothing that a model wrote is markup.
function element(tag, className, ...children) {
  const made = document.createElement(tag);
  made.className = className;
  made.append(...children);
  return made;
}

// ------------------------------------------------------------- filters

const all = p => p.runs.flat();
const isCorrect = s => s.verdict === "correct";
const share = samples => samples.filter(isCorrect).length / samples.length;
const VERDICTS = {
  "any": () => true,
  "all correct": p => all(p).every(isCorrect),
  "some correct, some not": p => all(p).some(isCorrect) && !all(p).every(isCorrect),
  "none correct": p => !all(p).some(isCorrect),
};
for (const verdict in MARK)
  VERDICTS["has " + words(verdict)] = p => all(p).some(s => s.verdict === verdict);
if (data.runs.length === 2)  // a share of no samples is NaN, which is never greater
  data.runs.forEach((name, i) => {
    VERDICTS[name + " is ahead"] = p => share(p.runs[i]) > share(p.runs[1 - i]);
  });

function fill(id, values) {
  const options = [...new Set(values)].filter(value => value !== null);
  byId(id).append(...options.map(value => new Option(value === "" ? "all" : value, value)));
  byId(id).parentElement.hidden = options.length < 3;  // "all" and two others
}
fill("benchmark", ["", ...data.benchmarks.map(b => b.name)]);
fill("verdict", Object.keys(VERDICTS));
fill("subject", ["", ...problems.map(p => p.subject).sort()]);
fill("difficulty", ["", ...problems.map(p => p.difficulty).sort((a, b) => a - b)]);

function matches(p) {
  const chosen = id => ["", String(p[id])].includes(byId(id).value);
  if (!["benchmark", "subject", "difficulty"].every(chosen)) return false;
  if (!VERDICTS[byId("verdict").value](p)) return false;
  const texts = [p.id, p.problem, ...p.answers];
  if (byId("deep").checked) texts.push(...all(p).map(s => s.text));
  const text = texts.join("\n").toLowerCase();
  return byId("words").value.toLowerCase().split(/\s+/).every(word => text.includes(word));
}

// ------------------------------------------------------------- the list

let shown = [], current = null;

function refresh() {
  shown = problems.filter(matches);
  byId("count").textContent = `${shown.length} of ${problems.length} problems`;
  for (const p of shown) {
    p.row = element("button", "problem",
      element("div", "where", `${p.benchmark} ${p.id}`, element("span", "", difficulty(p))),
      element("div", "what", p.problem),
      ...p.runs.map((samples, i) => element("div", "where",
        element("span", "marks", ...samples.map(s => element("span", s.verdict, MARK[s.verdict]))),
        several ? data.runs[i] : "")));
    p.row.onclick = () => read(p);
  }
  byId("list").replaceChildren(...shown.map(p => p.row));
  if (shown.length) return read(shown.includes(current) ? current : shown[0]);
  current = null;
  byId("question").replaceChildren("No problem matches.");
  byId("panes").replaceChildren();
}

// ------------------------------------------------------------- one problem

// Each run has a pane; a single run has two, to compare its samples.
const panes = several ? data.runs.map((_, i) => ({run: i, sample: 0}))
                      : [{run: 0, sample: 0}, {run: 0, sample: 1}];

function read(p) {
  if (current) current.row.classList.remove("here");
  current = p;
  p.row.classList.add("here");
  p.row.scrollIntoView({block: "nearest"});
  const about = [`${p.benchmark} ${p.id}`, p.subject, difficulty(p)];
  byId("question").replaceChildren(
    element("div", "faint", about.filter(Boolean).join(" · ")),
    element("p", "", p.problem),
    element("p", "", element("span", "faint", "gold: "), p.answers.join("   or   ")));
  const drawn = panes.filter((pane, i) => several || i < p.runs[0].length);
  byId("panes").replaceChildren(...drawn.map(pane => draw(p, pane)));
}

function draw(p, pane) {
  const samples = p.runs[pane.run];
  const bar = element("div", "bar", element("span", "faint", several ? data.runs[pane.run] : ""));
  if (!samples.length) return element("div", "pane", bar);
  const s = samples[Math.min(pane.sample, samples.length - 1)];
  samples.forEach((other, i) => {
    const here = other === s ? " here" : "";
    const button = element("button", other.verdict + here, `${MARK[other.verdict]} ${other.sample}`);
    button.title = `sample ${other.sample}: ${words(other.verdict)}`;
    button.onclick = () => { pane.sample = i; read(p); };
    bar.append(button);
  });
  const tokens = s.tokens === null ? "" : ` · ${s.tokens} tokens`;
  const facts = element("div", "facts", element("b", s.verdict, words(s.verdict)),
    element("span", "faint", " · answer "), s.extracted ?? "none",
    element("span", "faint", `${tokens} · ended by ${s.finish}`));
  const last = element("span", "");
  const end = element("button", "end", "to the end");
  end.onclick = () => last.scrollIntoView({block: "end"});
  bar.append(end);
  return element("div", "pane", bar, facts, element("pre", "", s.text, last));
}

// ------------------------------------------------------------- start

for (const input of document.querySelectorAll("select, input"))
  input.addEventListener("input", refresh);
document.addEventListener("keydown", event => {
  const step = {ArrowDown: 1, ArrowUp: -1}[event.key];
  if (!step || /INPUT|SELECT/.test(event.target.tagName) || !current) return;
  event.preventDefault();
  const next = shown[shown.indexOf(current) + step];
  if (next) read(next);
});
refresh();
