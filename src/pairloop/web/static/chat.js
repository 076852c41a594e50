// The arena: ask, watch two answers arrive, pick one by button or key, say why, go on with the chosen one.
"use strict";

const { policy, visitor, minLatencyMs } = document.body.dataset;
const byId = (id) => document.getElementById(id);
const prompt = byId("prompt");
const buttons = Object.fromEntries([...document.querySelectorAll("[data-pick]")].map((button) => [button.dataset.pick, button]));
const views = [0, 1].map((place) => new AnswerView(byId(`answer-${place}`)));
const KEYS = {
  pair: { 1: "a", 2: "b", 3: "tie", 4: "both_bad", 0: "skip", r: "again", R: "again" },
  repeat: { 1: "a", 2: "b", 3: "tie", 4: "both_bad", 0: "skip" },
  single: { 1: "good", 2: "bad", r: "again", R: "again" },
};
const SAID = { a: "A", b: "B", tie: "tie", both_bad: "both bad", skip: "skip", good: "good", bad: "not good" };

let turns = []; // those that are over: {role, text, detail}
let branch = null; // the group that the last turn is an edited answer of: no stored answer has its text
let round = null; // what is on the screen: {kind, state: asking | open | sending | settled, question, order, texts, …}
let repeat = null; // an earlier comparison that may be looked at once more

function note(text, isError = false) {
  byId("note").textContent = text;
  byId("note").classList.toggle("error", isError);
}

// order: places → indices. Where both answers are of one version the server tosses no coin, so that it is tossed here.
function newRound(kind, question, order, texts = order.map(() => "")) {
  return { kind, state: "asking", question, order, texts, seconds: [], id: null, began: performance.now(), stop: new AbortController() };
}

function showRound() {
  const isSingle = round.kind === "single";
  byId("comparison").hidden = false;
  byId("comparison").classList.toggle("is-single", isSingle);
  byId("comparison").setAttribute("aria-label", isSingle ? "The answer" : "Two answers to compare");
  byId("answers").classList.toggle("single", isSingle);
  byId("empty").hidden = true;
  byId("after").hidden = true;
  byId("once-more").hidden = true;
  byId("question").textContent = round.question;
  for (const view of views) view.begin();
  showTab(0);
  allowPicks(false);
}

function allowPicks(allowed) {
  byId("picks").hidden = false;
  const names = Object.values(KEYS[round.kind]);
  for (const [name, button] of Object.entries(buttons)) {
    button.hidden = !names.includes(name);
    button.disabled = !allowed;
    button.removeAttribute("aria-pressed");
  }
}

function showTab(place) {
  byId("answers").dataset.tab = place;
  for (const tab of document.querySelectorAll(".tabs button")) tab.setAttribute("aria-pressed", tab.dataset.tab === String(place));
  views[place].reach();
}

// -- asking

async function ask(question) {
  const isSingle = byId("single").checked;
  const mine = newRound(isSingle ? "single" : "pair", question, isSingle ? [0] : Math.random() < 0.5 ? [0, 1] : [1, 0]);
  round = mine;
  note(isSingle ? "" : "Both answers are being written.");
  showRound();
  byId("comparison").focus({ preventScroll: true });
  byId("comparison").scrollIntoView({ block: "nearest" });
  try {
    await stream(mine);
    if (round === mine) answered();
  } catch (error) {
    if (round === mine) refused(error);
  }
}

async function stream(mine) {
  const body = { model: policy, messages: [...turns.map(({ role, text }) => ({ role, content: text })), { role: "user", content: mine.question }], n: mine.order.length, stream: true, user: visitor };
  if (mine.kind === "single") body.stream_options = { include_usage: true };
  if (branch) body.metadata = { parent: branch };
  const response = await post("/v1/chat/completions", body, mine.stop.signal);
  let open = mine.order.length;
  for await (const chunk of chunksOf(response)) {
    if (chunk.error) throw new Error(sentence(chunk.error.message));
    if (round !== mine) return;
    Object.assign(mine, { id: chunk.id, model: chunk.model, usage: chunk.usage });
    for (const { index, delta, finish_reason: reason } of chunk.choices) {
      const place = mine.order.indexOf(index);
      const piece = delta.content || "";
      mine.texts[index] += piece;
      views[place].add(piece);
      if (piece) mine.seconds[index] = (performance.now() - mine.began) / 1000; // the ends of both come together
      if (!reason) continue;
      open -= 1;
      views[place].end(byId("plain").checked);
    }
  }
  if (open) throw new Error("the answer broke off.");
}

// What went wrong, in words; the question stays where it can be sent again.
function refused(error) {
  [round, branch] = [null, null];
  byId("comparison").hidden = true;
  byId("empty").hidden = turns.length > 0;
  if (!prompt.value.trim()) prompt.value = lastQuestion;
  const full = error.code === "context_length_exceeded" && turns.length;
  const next = full ? "Start a new conversation; your question is kept." : "Your question is kept: Enter sends it again.";
  note(`No answer: ${error.message} ${next}`, true);
  prompt.focus();
}

let lastQuestion = "";

function answered() {
  if (prompt.value.trim() === round.question) prompt.value = "";
  note("Pick with a button, or with the keys 1, 2, 3, 4 and 0; R asks again.");
  offer();
  if (round.kind === "single") {
    reveal([round.model], round.usage ? [round.usage.completion_tokens] : []);
    openAfter();
    note("Rate it, or just go on.");
    prompt.focus();
  }
}

function offer() {
  Object.assign(round, { state: "open", shownAt: performance.now() });
  allowPicks(true);
  draw();
  byId("comparison").focus({ preventScroll: true }); // neither answer: a highlighted one would be picked more often
  byId("comparison").scrollIntoView({ block: "nearest" });
}

function draw() {
  if (!round || round.state === "asking") return;
  const compared = byId("differ").checked && round.kind !== "single" ? differences(views[0].text, views[1].text) : undefined;
  views.slice(0, round.order.length).forEach((view, place) => {
    if (compared) showRuns(view.box, compared[place]);
    else view.draw(byId("plain").checked);
    view.reach();
  });
  if (compared === null) note("The answers are too long to be compared word by word.");
}

// -- picking

function outcomeOf(name, [first, second]) {
  if (name === "a") return { outcome: "chosen", chosen_index: first, rejected_index: second };
  if (name === "b") return { outcome: "chosen", chosen_index: second, rejected_index: first };
  return { outcome: name };
}

async function pick(name) {
  if (!round || !(name in buttons) || (round.state !== "open" && !(round.kind === "single" && round.state === "settled"))) return;
  if (name === "again") {
    askAgain();
    return;
  }
  const mine = round;
  const latency = Math.round(performance.now() - mine.shownAt);
  mine.state = "sending";
  allowPicks(false);
  try {
    const reply = await (mine.kind === "single" ? rate(mine, name === "good") : prefer(mine, name, latency));
    if (round !== mine) return;
    mine.state = "settled";
    if (mine.kind === "repeat") settleRepeat();
    else settle(name, latency, reply);
  } catch (error) {
    if (round !== mine) return;
    mine.state = "open";
    allowPicks(true);
    byId("comparison").focus({ preventScroll: true });
    note(`The pick was not recorded: ${error.message} Pick again.`, true);
  }
}

// The group that was not picked from stays unpicked.
function askAgain() {
  const { question } = round;
  round = null;
  lastQuestion = question;
  ask(question);
}

async function prefer(mine, name, latency) {
  const body = { inference_id: mine.id, ...outcomeOf(name, mine.order), shown_order: mine.order, repeat: mine.kind === "repeat", rater_id: visitor, latency_ms: latency, tags: { via: "page" } };
  return (await post("/v1/preferences", body)).json();
}

const rate = (mine, isGood) => say(mine, "thumbs", isGood, 0);

// The pick is stored: show who answered, and go on with the chosen answer (the left one of a tie).
function settle(name, latency, reply) {
  const mine = round;
  const taken = mine.kind === "single" ? 0 : name === "tie" ? mine.order[0] : outcomeOf(name, mine.order).chosen_index;
  mine.taken = taken;
  if (taken !== undefined && mine.kind !== "single") views[mine.order.indexOf(taken)].article.classList.add("chosen");
  mine.versions = reply.versions || [];
  if (mine.kind === "pair") {
    byId("picks").hidden = true; // they have done their part
    reveal(mine.versions, []);
  }
  if (mine.kind === "single") {
    allowPicks(true);
    buttons.again.disabled = true;
    for (const one of ["good", "bad"]) buttons[one].setAttribute("aria-pressed", one === name);
  }
  if (name !== "skip") openAfter();
  note(settledWords(mine, taken, latency));
  rememberPick(reply.feedback_id, SAID[name], mine.question).then((found) => {
    const known = found.get(reply.feedback_id);
    if (round === mine && known && mine.versions.length) reveal(mine.versions, known.answers.map((answer) => answer.tokens));
  });
  prompt.focus();
  if (mine.kind === "pair") lookForRepeat();
}

function settledWords(mine, taken, latency) {
  if (mine.kind === "single") return "Recorded. Go on, or say why.";
  const who = mine.versions.length ? ` A was ${mine.versions[mine.order[0]]}, B was ${mine.versions[mine.order[1]]}.` : "";
  const fast = latency < Number(minLatencyMs) ? " It was very fast, so it is kept but not trained on." : "";
  return `Recorded.${who}${fast}${taken === undefined ? " Ask again, or something else." : " Go on with the chosen answer."}`;
}

// versions and tokens by index, as far as they are known; how long an answer took is known here.
function reveal(versions, tokens) {
  round.order.forEach((index, place) => {
    const took = round.seconds[index];
    const parts = [versions[index], took && (took < 1 ? `${(took * 1000).toFixed(0)} ms` : `${took.toFixed(1)} s`), tokens[index] && `${tokens[index]} tokens`];
    views[place].tell(parts.filter(Boolean).join(" · "));
  });
}

// -- an earlier comparison once more, sides swapped: how often are picks flipped? What is said of it is no vote.

async function lookForRepeat() {
  const response = await fetch(`/v1/queue?repeats_only=true&rater_id=${encodeURIComponent(visitor)}`).catch(() => null);
  repeat = response && response.ok ? (await response.json()).item : null;
  byId("once-more").hidden = !repeat || !round || round.state !== "settled";
}

function offerRepeat() {
  fold();
  const asked = repeat.messages.filter((turn) => turn.role === "user");
  round = newRound("repeat", asked.length ? asked.at(-1).content : "", repeat.shown_order);
  round.id = repeat.inference_id;
  showRound();
  repeat.choices.forEach((choice, place) => {
    views[place].add(choice.text);
    views[place].end(byId("plain").checked);
  });
  repeat = null;
  note("One more: an earlier question of yours. Which answer is better?");
  offer();
}

function settleRepeat() {
  round = null;
  byId("comparison").hidden = true;
  note("Thank you. That told us how sure picks are. Go on where you were.");
  prompt.focus();
}

// -- the conversation

function addTurn({ role, text, detail }) {
  const turn = document.createElement("li");
  turn.className = `turn ${role}`;
  const body = document.createElement("div");
  body.dir = "auto";
  if (role === "assistant") show(body, text, byId("plain").checked);
  else body.textContent = text;
  turn.append(body);
  if (detail) {
    const small = document.createElement("small");
    small.textContent = detail;
    turn.append(small);
  }
  byId("conversation").append(turn);
}

// What is on the screen as turns, if it was decided.
function turnsOf(mine) {
  if (!mine || mine.kind === "repeat" || mine.state === "asking") return [];
  const taken = mine.kind === "single" ? 0 : mine.taken;
  const text = mine.edited ?? mine.texts[taken];
  if (text === undefined) return [];
  const detail = mine.edited === undefined ? (mine.versions || [])[taken] || mine.model : "edited by you";
  return [{ role: "user", text: mine.question }, { role: "assistant", text, detail }];
}

const branchOf = (mine) => (mine.edited === undefined ? null : mine.id);

// What is on the screen becomes a part of the conversation, if it was decided; reasons that were not saved are.
function fold() {
  const mine = round;
  if (!mine || mine.kind === "repeat") return;
  saveWhy(mine).catch((error) => note(`The reasons were not saved: ${error.message}`, true));
  const more = turnsOf(mine);
  round = null;
  if (!more.length) return;
  branch = branchOf(mine);
  turns.push(...more);
  more.forEach(addTurn);
}

// A tab goes on with its conversation after a reload or on the way back; another person who logs in there does not.
function keepConversation() {
  const more = turnsOf(round);
  const kept = { person, turns: [...turns, ...more], branch: more.length ? branchOf(round) : branch };
  try {
    sessionStorage.setItem("pairloop.conversation", JSON.stringify(kept));
  } catch { /* full or forbidden: it ends with the page */ }
}

function resume() {
  try {
    const kept = JSON.parse(sessionStorage.getItem("pairloop.conversation"));
    if (kept?.person === person) ({ turns, branch } = kept);
  } catch { /* nothing is kept */ }
  turns.forEach(addTurn);
  byId("empty").hidden = turns.length > 0;
}

function restart() {
  if (round) {
    round.stop.abort();
    saveWhy(round).catch(() => {});
  }
  [turns, branch, round] = [[], null, null];
  byId("conversation").replaceChildren();
  byId("comparison").hidden = true;
  byId("once-more").hidden = true;
  byId("empty").hidden = false;
  note("");
  prompt.focus();
}

function submit() {
  const question = prompt.value.trim();
  if (!question) return;
  if (round && round.state === "asking") note("The answers are still being written.");
  else if (round && round.state !== "settled" && round.kind !== "single") note("Pick first: 1, 2, 3 or 4; 0 skips.");
  else {
    fold();
    lastQuestion = question;
    ask(question);
  }
}

byId("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
prompt.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    byId("ask").requestSubmit();
  }
});
// Keys pick unless somebody writes: in an empty message a digit still picks while two answers wait, a letter never.
document.addEventListener("keydown", (event) => {
  if (!round || round.state !== "open" || event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
  const writes = event.target.matches("textarea, input:not([type=checkbox])");
  const empty = event.target === prompt && prompt.value === "" && round.kind !== "single" && event.key >= "0" && event.key <= "9";
  if (!(event.key in KEYS[round.kind]) || (writes && !empty)) return;
  event.preventDefault();
  pick(KEYS[round.kind][event.key]);
});
for (const [name, button] of Object.entries(buttons)) button.addEventListener("click", () => pick(name));
for (const tab of document.querySelectorAll(".tabs button")) tab.addEventListener("click", () => showTab(Number(tab.dataset.tab)));
byId("once-more").addEventListener("click", offerRepeat);
byId("restart").addEventListener("click", restart);
for (const id of ["plain", "differ"]) byId(id).addEventListener("change", draw);
for (const id of ["single", "plain"]) {
  byId(id).checked = recall(id) === true;
  byId(id).addEventListener("change", () => remember(id, byId(id).checked));
}
addEventListener("pagehide", keepConversation);
resume();
showPicks();
