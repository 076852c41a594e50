// "Your picks": what this browser said, and what became of it. The list is kept here; the server is asked by the picks' ids.
"use strict";

const PICKS_KEPT = 20;
const USE_WORDS = {
  waiting: () => "waits for the next cycle",
  training: () => "is being trained on now",
  left_out: ({ reason }) => `was left out${reason ? `: ${reason.replaceAll("_", " ")}` : ""}`,
  noted: () => "is noted",
  judged: () => "judged a new version",
  examines: () => "is kept to examine new versions",
};

// Who looks: a name that is signed in, else this browser's visitor. What one said here, the next one does not see.
const person = [document.body.dataset.visitor, document.querySelector(".who b")?.textContent].join();
const MINE = `picks.${person}`;

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
  const kept = recall(MINE);
  return Array.isArray(kept) ? kept : [];
}

async function lineageOf(ids) {
  if (!ids.length) return [];
  const response = await fetch(`/v1/lineage?${new URLSearchParams(ids.map((id) => ["feedback_id", id]))}`);
  return response.ok ? (await response.json()).data : [];
}

function rememberPick(id, said, question) {
  remember(MINE, [{ id, said, question: question.slice(0, 80) }, ...keptPicks().filter((pick) => pick.id !== id)].slice(0, PICKS_KEPT));
  return showPicks();
}

// What became of a pick: text, and links to the versions where whoever looks may open them.
function fateOf(known) {
  if (!known) return ["not known here any more"];
  if (known.use !== "trained") return [(USE_WORDS[known.use] || (() => known.use))(known)];
  const mayOpen = document.querySelector('.menu a[href="/versions"]') !== null;
  const numbers = known.versions.map((name) => name.split("@").pop());
  const places = numbers.flatMap((number, place) => [place ? ", " : "", mayOpen ? linkTo(`/versions/${number}`, number) : number]);
  return ["is in version ", ...places, known.serving ? "" : " (not in use)"];
}

function linkTo(path, text) {
  const link = document.createElement("a");
  link.href = path;
  link.textContent = text;
  return link;
}

// Resolves to what the server knows of each, by id.
async function showPicks() {
  const picks = keptPicks();
  document.getElementById("mine").hidden = !picks.length;
  const found = new Map((await lineageOf(picks.map((pick) => pick.id)).catch(() => [])).map((one) => [one.id, one]));
  const list = document.getElementById("mine-list");
  const hadFocus = list.contains(document.activeElement);
  list.replaceChildren(...picks.map((pick) => {
    const line = document.createElement("li");
    const about = document.createElement("span");
    about.dir = "auto";
    about.textContent = pick.question;
    const fate = document.createElement("small");
    const known = found.get(pick.id);
    fate.append(`${pick.said}: `, ...fateOf(known));
    line.classList.toggle("trained", Boolean(known && known.use === "trained"));
    line.append(about, fate);
    return line;
  }));
  if (hadFocus) list.focus();
  return found;
}

document.getElementById("forget").addEventListener("click", () => {
  remember(MINE, []);
  showPicks();
  document.getElementById("prompt").focus();
});
document.body.addEventListener("loop:moved", showPicks);
