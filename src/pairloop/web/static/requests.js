// A request's page: the answer of another version beside the recorded one, and which words differ. Answers are text, never markup.
"use strict";

const WORDS_AT_MOST = 1200; // beyond, the table of the comparison would take too long: then both stand without marks

// The longest common subsequence of words, as [kind, text] with kind "same", "del" or "ins".
function wordDiff(before, after) {
  const a = before.match(/\s+|[^\s]+/g) || [];
  const b = after.match(/\s+|[^\s]+/g) || [];
  if (a.length > WORDS_AT_MOST || b.length > WORDS_AT_MOST) return null;
  const wide = b.length + 1;
  const longest = new Uint16Array((a.length + 1) * wide);
  for (let i = a.length - 1; i >= 0; i--) {
    for (let j = b.length - 1; j >= 0; j--) {
      longest[i * wide + j] = a[i] === b[j]
        ? longest[(i + 1) * wide + j + 1] + 1
        : Math.max(longest[(i + 1) * wide + j], longest[i * wide + j + 1]);
    }
  }
  const parts = [];
  let i = 0, j = 0;
  while (i < a.length || j < b.length) {
    if (i < a.length && j < b.length && a[i] === b[j]) { parts.push(["same", a[i]]); i++; j++; }
    else if (j >= b.length || (i < a.length && longest[(i + 1) * wide + j] >= longest[i * wide + j + 1])) parts.push(["del", a[i++]]);
    else parts.push(["ins", b[j++]]);
  }
  return parts;
}

function show(target, parts, mark) {
  target.replaceChildren(...parts.filter(([kind]) => kind === "same" || kind === mark).map(([kind, text]) => {
    if (kind === "same") return document.createTextNode(text);
    const word = document.createElement(kind);
    word.textContent = text;
    return word;
  }));
}

document.addEventListener("api:done", (event) => {
  const form = event.target.closest("[data-replay]");
  if (form === null) return;
  const reply = event.detail;
  const against = form.querySelector("[data-against]");
  const original = document.querySelector(`[data-answer="${against ? against.value : 0}"] .text`).textContent;
  const result = document.querySelector("[data-result]");
  const parts = wordDiff(original, reply.text) || [["del", original], ["ins", reply.text]];
  show(result.querySelector("[data-before]"), parts, "del");
  show(result.querySelector("[data-after]"), parts, "ins");
  result.querySelector("[data-who]").textContent = `${reply.model} says now`;
  const mean = reply.logp_mean === null ? "" : `, log-prob a token ${reply.logp_mean.toFixed(3)}`;
  const same = reply.text === original ? "the same words, " : "";
  result.querySelector("[data-figures]").textContent = `${same}${reply.tokens} tokens, ended by ${reply.finish_reason}${mean}`;
  result.hidden = false;
});
