// Which words two texts do not have in common. Texts are text, never markup.
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

// Two answers side by side, the earlier one first.
for (const pair of document.querySelectorAll("[data-words]")) {
  const [before, after] = pair.querySelectorAll(".text");
  const parts = wordDiff(before.textContent, after.textContent);
  if (parts === null) continue;
  show(before, parts, "del");
  show(after, parts, "ins");
}
