// The labelling queue: a comparison is held for this rater, picked from by key, and the next one comes.
"use strict";

const { rater, guidelines } = document.body.dataset;
const byId = (id) => document.getElementById(id);
const NAME = "pairloop.rater";
const PICK_BY_KEY = { 1: "a", 2: "b", 3: "tie", 4: "both_bad", 0: "skip" };
const WORDS = { a: "A is better", b: "B is better", tie: "tie", both_bad: "both bad", skip: "skipped" };
const LOOK_AGAIN_S = 10;
const KEPT = 50; // so many answers can be undone

let item = null; // {id, inference_id, choices, shown_order, expires_at, seenMs, shownAt, said}
let busy = false;
let seconds = 0;
const done = []; // answered ones, the newest last

function note(text, isError = false) {
  byId("note").textContent = text;
  byId("note").classList.toggle("error", isError);
}

function turn({ role, content, tool_calls: calls }) {
  const line = document.createElement("li");
  line.className = `turn ${role === "user" || role === "assistant" ? role : "system"}`;
  line.dir = "auto";
  line.textContent = typeof content === "string" ? content : JSON.stringify(calls || content);
  if (line.classList.contains("system")) line.prepend(`${role}: `);
  return line;
}

function pickable(yes) {
  for (const button of document.querySelectorAll("[data-pick]")) button.disabled = !yes;
}

function show(next) {
  item = next;
  byId("item").hidden = item === null;
  byId("empty").hidden = item !== null;
  byId("undo").disabled = done.length === 0;
  if (item === null) return;
  byId("asked").replaceChildren(...item.messages.map(turn));
  byId("asked").scrollTop = byId("asked").scrollHeight;
  item.choices.forEach(({ text }, place) => {
    byId(`text-${place}`).textContent = text;
    byId(`text-${place}`).scrollTop = 0;
    byId(`answer-${place}`).className = item.said === "ab"[place] ? "answer chosen" : "answer";
  });
  item.shownAt = performance.now();
  pickable(true);
  byId("item").focus({ preventScroll: true });
}

// In the words of the wire; shown_order leads from a place to an answer.
function outcomeOf(pick, [first, second]) {
  if (pick === "a") return { outcome: "chosen", chosen_index: first, rejected_index: second };
  if (pick === "b") return { outcome: "chosen", chosen_index: second, rejected_index: first };
  return { outcome: pick };
}

function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return `queue-${[...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join("")}`;
}

function letGo() {
  if (item !== null) item.seenMs += performance.now() - item.shownAt;
}

// One request at a time: a key that is pressed meanwhile does nothing.
async function once(work) {
  if (busy) return;
  busy = true;
  pickable(false);
  try {
    await work();
  } catch (error) {
    note(error.message, true);
    pickable(item !== null);
  } finally {
    busy = false;
  }
}

async function take() {
  const { item: next } = await callApi("POST", "/v1/queue/reservations", { rater_id: rater });
  if (next === null) {
    byId("empty").innerHTML = "";
    const strong = document.createElement("strong");
    strong.textContent = "Nothing is left to label.";
    byId("empty").append(strong, "New comparisons come as people chat with two answers; this page looks again by itself.");
  }
  show(next === null ? null : { ...next, seenMs: 0, said: null });
}

function answer(pick) {
  return once(async () => {
    if (item === null) return;
    letGo();
    const answered = item;
    answered.shownAt = performance.now();
    const body = { id: newId(), inference_id: item.inference_id, reservation_id: item.id, shown_order: item.shown_order };
    Object.assign(body, outcomeOf(pick, item.shown_order), { latency_ms: Math.round(item.seenMs) });
    if (guidelines) body.tags = { guidelines };
    await callApi("POST", "/v1/preferences", body);
    note(`${answered.said === null ? "Recorded" : "Revised"}: ${WORDS[pick]}. U takes it back.`);
    answered.said = pick;
    done.push(answered);
    if (done.length > KEPT) done.shift();
    document.body.dispatchEvent(new CustomEvent("queue:answered"));
    await take();
  });
}

function undo() {
  if (busy || done.length === 0) return;
  letGo();
  const last = done.pop();
  show(last);
  note(`You said: ${WORDS[last.said]}. Pick again to revise it; N leaves it as it is.`);
}

function next() {
  return once(async () => {
    letGo();
    const left = item;
    if (left !== null && left.said === null) await callApi("DELETE", `/v1/queue/reservations/${encodeURIComponent(left.id)}`);
    note(left === null || left.said !== null ? "" : "Given back, unanswered.");
    await take();
    if (left !== null && item !== null && left.said === null && item.inference_id === left.inference_id) note("The same again: others may be few.");
  });
}

function tick() {
  let text = "";
  seconds += 1;
  if (item === null && seconds % LOOK_AGAIN_S === 0 && !document.hidden) once(take);
  if (item !== null && item.said === null) {
    const left = Math.round(item.expires_at - Date.now() / 1000);
    text = left > 0 ? `yours for ${Math.floor(left / 60)}:${String(left % 60).padStart(2, "0")}` : "hold ended: someone else may see it; your pick counts";
  }
  byId("hold").textContent = text;
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat || byId("keys").open) return;
  if (event.target.closest("input, textarea, select")) return;
  const key = event.key.toLowerCase();
  if (key === "enter" && event.target.closest("button, a, summary")) return;
  if (key in PICK_BY_KEY) answer(PICK_BY_KEY[key]);
  else if (key === "u") undo();
  else if (key === "n" || key === "enter") next();
  else if (key === "?") byId("keys").showModal();
  else if (key === "g" && byId("guidelines")) byId("guidelines").open = !byId("guidelines").open;
  else return;
  event.preventDefault();
}

// Folded guidelines stay folded until they change.
function unfold() {
  const box = byId("guidelines");
  if (!box) return;
  box.open = localStorage.getItem("pairloop.guidelines") !== guidelines;
  box.addEventListener("toggle", () => localStorage.setItem("pairloop.guidelines", box.open ? "" : guidelines));
  const clean = DOMPurify.sanitize(marked.parse(byId("guide").textContent), {
    RETURN_DOM_FRAGMENT: true,
    FORBID_TAGS: ["style", "img", "form", "input"],
    FORBID_ATTR: ["style"],
  });
  for (const title of clean.querySelectorAll("h1, h2, h3, h4")) { // below the page's own
    const lower = document.createElement(`h${Number(title.tagName[1]) + 1}`);
    lower.replaceChildren(...title.childNodes);
    title.replaceWith(lower);
  }
  byId("guide").classList.remove("text");
  byId("guide").replaceChildren(clean);
}

function begin() {
  if (!rater) {
    const known = localStorage.getItem(NAME);
    if (known) window.location.replace(`/queue?rater=${encodeURIComponent(known)}`);
    return;
  }
  if (!("signedIn" in document.body.dataset)) {
    localStorage.setItem(NAME, rater);
    byId("forget").addEventListener("click", () => localStorage.removeItem(NAME));
  }
  unfold();
  document.addEventListener("keydown", onKey);
  for (const button of document.querySelectorAll("[data-pick]")) button.addEventListener("click", () => answer(button.dataset.pick));
  byId("undo").addEventListener("click", undo);
  byId("next").addEventListener("click", next);
  byId("help").addEventListener("click", () => byId("keys").showModal());
  for (const name of ["loop:tick", "loop:moved"]) document.body.addEventListener(name, () => { if (item === null) once(take); });
  setInterval(tick, 1000);
  once(take);
}

begin();
