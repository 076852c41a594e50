// "Your picks": what this browser said, and what became of it. The list is kept here; the server is asked by the picks' ids.
"use strict";

const PICKS_KEPT = 20;
const USE_WORDS = {
  waiting: () => "waits for the next cycle",
  training: () => "is being trained on now",
  trained: ({ versions, serving }) => `is in version ${versions.map((name) => name.split("@").pop()).join(", ")}${serving ? "" : ", which does not serve"}`,
  left_out: ({ reason }) => `was left out${reason ? `: ${reason.replaceAll("_", " ")}` : ""}`,
  noted: () => "is noted",
  judged: () => "judged a new version",
  examines: () => "is kept to examine new versions",
};

// What this browser keeps, under names of ours; null where it keeps nothing.
function recall(name) {
  try {
    return JSON.parse(localStorage.getItem(`pairloop.${name}`));
  } catch {
    return null;
  }
}

function remember(name, value) {
  try {
    localStorage.setItem(`pairloop.${name}`, JSON.stringify(value));
  } catch { /* full or forbidden: it ends with the page */ }
}

function keptPicks() {
  const kept = recall("picks");
  return Array.isArray(kept) ? kept : [];
}

async function lineageOf(ids) {
  if (!ids.length) return [];
  const response = await fetch(`/v1/lineage?${new URLSearchParams(ids.map((id) => ["feedback_id", id]))}`);
  return response.ok ? (await response.json()).data : [];
}

function rememberPick(id, said, question) {
  remember("picks", [{ id, said, question: question.slice(0, 80) }, ...keptPicks().filter((pick) => pick.id !== id)].slice(0, PICKS_KEPT));
  return showPicks();
}

// Resolves to what the server knows of each, by id.
async function showPicks() {
  const picks = keptPicks();
  document.getElementById("mine").hidden = !picks.length;
  const found = new Map((await lineageOf(picks.map((pick) => pick.id)).catch(() => [])).map((one) => [one.id, one]));
  document.getElementById("mine-list").replaceChildren(...picks.map((pick) => {
    const line = document.createElement("li");
    const about = document.createElement("span");
    about.dir = "auto";
    about.textContent = pick.question;
    const became = document.createElement("small");
    const known = found.get(pick.id);
    const words = known && USE_WORDS[known.use];
    became.textContent = `${pick.said}: ${words ? words(known) : "not known here any more"}`;
    line.classList.toggle("trained", Boolean(known && known.use === "trained"));
    line.append(about, became);
    return line;
  }));
  return found;
}

document.getElementById("forget").addEventListener("click", () => {
  remember("picks", []);
  showPicks();
  document.getElementById("prompt").focus();
});
document.body.addEventListener("loop:moved", showPicks);
