// The arena: ask, watch two answers arrive, pick one by button or key, go on with the chosen one.
"use strict";

const { policy, visitor, minLatencyMs } = document.body.dataset;
const byId = (id) => document.getElementById(id);
const prompt = byId("prompt");
const pickButtons = [...document.querySelectorAll("[data-pick]")];
const PICK_BY_KEY = { 1: "a", 2: "b", 3: "tie", 4: "both_bad", 0: "skip" };

function outcomeOf(name, [first, second]) {
  if (name === "a") return { outcome: "chosen", chosen_index: first, rejected_index: second };
  if (name === "b") return { outcome: "chosen", chosen_index: second, rejected_index: first };
  return { outcome: name };
}

let messages = [];
let open = null; // the comparison that waits for a pick: {id, texts, order, repeat, shownAt, sending}; order: places → indices
let asking = false;

function note(text, isError = false) {
  byId("note").textContent = text;
  byId("note").classList.toggle("error", isError);
}

function setPickable(pickable) {
  for (const button of pickButtons) button.disabled = !pickable;
}

function addTurn(role, text, detail = "") {
  const turn = document.createElement("li");
  turn.className = `turn ${role}`;
  turn.textContent = text;
  if (detail) {
    const small = document.createElement("small");
    small.textContent = detail;
    turn.append(small);
  }
  byId("conversation").append(turn);
}

function showComparison(question) {
  byId("comparison").hidden = false;
  byId("empty").hidden = true;
  byId("question").textContent = question;
  for (const index of [0, 1]) {
    byId(`answer-${index}`).className = "answer busy";
    byId(`text-${index}`).textContent = "";
    byId(`version-${index}`).textContent = "";
  }
  setPickable(false);
}

// Server-sent events of one reply, as parsed chunks.
async function* chunksOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

async function ask(question) {
  asking = true;
  byId("send").disabled = true;
  note("");
  showComparison(question);
  const asked = [...messages, { role: "user", content: question }];
  try {
    const response = await post("/v1/chat/completions", { model: policy, messages: asked, n: 2, stream: true, user: visitor });
    const texts = ["", ""];
    let id = null;
    for await (const chunk of chunksOf(response)) {
      if (chunk.error) throw new Error(chunk.error.message);
      id = chunk.id;
      for (const choice of chunk.choices) {
        texts[choice.index] += choice.delta.content || "";
        byId(`text-${choice.index}`).textContent = texts[choice.index];
        if (choice.finish_reason) byId(`answer-${choice.index}`).classList.remove("busy");
      }
    }
    messages = asked;
    prompt.value = "";
    offer({ id, texts, order: [0, 1], repeat: false });
    note("Pick with a button, or with the keys 1, 2, 3, 4 and 0.");
  } catch (error) {
    byId("comparison").hidden = true;
    note(`No answer: ${error.message}`, true);
    prompt.focus();
  } finally {
    asking = false;
    byId("send").disabled = open !== null;
  }
}

function offer(comparison) {
  open = { ...comparison, shownAt: performance.now(), sending: false };
  setPickable(true);
  byId("comparison").focus({ preventScroll: true }); // neither answer: a highlighted one would be picked more often
  byId("comparison").scrollIntoView({ block: "nearest" });
}

// Now and then an earlier comparison once more, sides swapped: how often are picks flipped? What is said of it is no vote.
async function offerRepeat() {
  const response = await fetch(`/v1/queue?repeats_only=true&rater_id=${encodeURIComponent(visitor)}`);
  const item = response.ok ? (await response.json()).item : null;
  if (item === null || asking || open !== null) return;
  fold();
  const asked = item.messages.filter((turn) => turn.role === "user");
  showComparison(asked.length ? asked[asked.length - 1].content : "");
  const texts = ["", ""];
  item.choices.forEach((choice, place) => {
    texts[choice.index] = choice.text;
    byId(`text-${place}`).textContent = choice.text;
    byId(`answer-${place}`).classList.remove("busy");
  });
  byId("send").disabled = true;
  offer({ id: item.inference_id, texts, order: item.shown_order, repeat: true });
  note("One more: an earlier question of yours. Which answer is better?");
}

async function pick(name) {
  if (open === null || open.sending) return;
  open.sending = true;
  setPickable(false);
  const outcome = outcomeOf(name, open.order);
  const latency = Math.round(performance.now() - open.shownAt);
  try {
    const response = await post("/v1/preferences", {
      inference_id: open.id,
      ...outcome,
      shown_order: open.order,
      repeat: open.repeat,
      rater_id: visitor,
      latency_ms: latency,
      tags: { via: "page" },
    });
    const reply = await response.json();
    if (open.repeat) settleRepeat();
    else settle(name, outcome, latency, reply);
  } catch (error) {
    open.sending = false;
    setPickable(true);
    note(`The pick was not recorded: ${error.message}`, true);
  }
}

function settleRepeat() {
  open = null;
  byId("comparison").hidden = true;
  byId("send").disabled = false;
  note("Thank you. That told us how sure picks are. Go on where you were.");
  prompt.focus();
}

// The pick is stored: show who answered, and go on with the chosen answer (the left one of a tie).
function settle(name, outcome, latency, reply) {
  const goesOn = name === "tie" ? 0 : outcome.chosen_index;
  const versions = reply.versions || [];
  const question = messages[messages.length - 1].content;
  if (goesOn === undefined) {
    messages.pop();
  } else {
    byId(`answer-${goesOn}`).classList.add("chosen");
    messages.push({ role: "assistant", content: open.texts[goesOn] });
  }
  versions.forEach((version, index) => { byId(`version-${index}`).textContent = version; });
  const told = versions.length === 2 ? ` A was ${versions[0]}, B was ${versions[1]}.` : "";
  const fast = latency < Number(minLatencyMs) ? " It was very fast, so it is kept but not trained on." : "";
  const next = goesOn === undefined ? " Ask again, or something else." : " Go on with the chosen answer.";
  note(`Recorded.${told}${fast}${next}`);
  settled = goesOn === undefined ? null : { question, answer: open.texts[goesOn], version: versions[goesOn] };
  open = null;
  byId("send").disabled = false;
  prompt.focus();
  offerRepeat();
}

let settled = null; // the last turn, still shown as a comparison until the next question is sent

function fold() {
  if (settled !== null) {
    addTurn("user", settled.question);
    addTurn("assistant", settled.answer, settled.version);
    settled = null;
  }
}

function restart() {
  if (asking) return;
  messages = [];
  settled = null;
  open = null;
  byId("conversation").replaceChildren();
  byId("comparison").hidden = true;
  byId("empty").hidden = false;
  byId("send").disabled = false;
  note("");
  prompt.focus();
}

async function post(url, body) {
  const response = await fetch(url, {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify(body),
  });
  if (response.ok) return response;
  const { error } = await response.json();
  throw new Error(error.message);
}

byId("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = prompt.value.trim();
  if (!question || asking || open !== null) return;
  fold();
  ask(question);
});
prompt.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    byId("ask").requestSubmit();
  }
});
document.addEventListener("keydown", (event) => {
  const typing = event.target === prompt && prompt.value !== "";
  if (typing || event.repeat || event.ctrlKey || event.metaKey || event.altKey || open === null) return;
  if (event.key in PICK_BY_KEY) {
    event.preventDefault();
    pick(PICK_BY_KEY[event.key]);
  }
});
for (const button of pickButtons) button.addEventListener("click", () => pick(button.dataset.pick));
byId("restart").addEventListener("click", restart);
