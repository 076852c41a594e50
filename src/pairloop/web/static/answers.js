// How an answer is shown: as plain text while it grows, then as markdown. Answers are hostile input: HTML in them stays text,
// what marked makes of the rest passes an allow-list, and what is very long stays plain.
"use strict";

const RICH_LIMIT = 10000; // characters; marked is quadratic on some inputs: at worst it takes .3 s then
const SHOWN_LIMIT = 50000; // characters; what is longer is shown whole when asked for: a browser lays it out for seconds
const SAFE_LINK = /^(?:https?:|mailto:)/i;
const DIFF_CELLS = 4e6; // of the table of words against words

const escapeHtml = (text) => text.replace(/[&<>"']/g, (sign) => `&#${sign.charCodeAt(0)};`);
const reader = new marked.Marked({
  gfm: true,
  breaks: true,
  renderer: {
    html: ({ raw, block }) => (block ? `<p>${escapeHtml(raw.trim()).replaceAll("\n", "<br>")}</p>` : escapeHtml(raw)),
    image: ({ raw }) => escapeHtml(raw), // nothing is fetched because an answer says so
    link({ href, raw }) { return SAFE_LINK.test(href) ? false : escapeHtml(raw); },
    heading({ tokens }) { return `<p><strong>${this.parser.parseInline(tokens)}</strong></p>`; }, // the page's headings are its own
    checkbox: ({ checked }) => (checked ? "☑ " : "☐ "),
  },
});
const purifier = DOMPurify(window);
purifier.addHook("afterSanitizeAttributes", (node) => {
  if (node.nodeName !== "A") return;
  node.setAttribute("target", "_blank");
  node.setAttribute("rel", "noopener noreferrer");
});
const ALLOWED = {
  ALLOWED_TAGS: "p br hr strong em del code pre blockquote ul ol li table thead tbody tr th td a".split(" "),
  ALLOWED_ATTR: ["href", "start"],
  ALLOW_ARIA_ATTR: false,
  ALLOW_DATA_ATTR: false,
  ALLOWED_URI_REGEXP: SAFE_LINK,
  RETURN_DOM_FRAGMENT: true,
};

function markdownOf(text) {
  const part = purifier.sanitize(reader.parse(text), ALLOWED);
  for (const block of part.querySelectorAll("pre")) block.before(copyButton(block));
  return part;
}

function copyButton(block) {
  const button = document.createElement("button");
  button.type = "button";
  button.className = "copy";
  button.textContent = "Copy";
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(block.textContent);
      toast("Copied.");
    } catch {
      toast("The browser did not let it be copied; select it instead.", true);
    }
  });
  return button;
}

function show(box, text, isPlain) {
  box.classList.remove("rich");
  if (!isPlain && text.length <= RICH_LIMIT) {
    try {
      box.replaceChildren(markdownOf(text));
      box.classList.add("rich");
      return;
    } catch { /* nested deeper than the reader goes: plain */ }
  }
  box.textContent = text.slice(0, SHOWN_LIMIT).toWellFormed();
  if (text.length > SHOWN_LIMIT) box.append(wholeButton(box, text));
}

function wholeButton(box, text) {
  const button = document.createElement("button");
  button.type = "button";
  button.className = "whole";
  button.textContent = `Show all ${text.length.toLocaleString("en")} characters`;
  button.addEventListener("click", () => {
    box.textContent = text;
    box.tabIndex = 0;
    box.focus();
  });
  return button;
}

const wordsOf = (text) => text.match(/\s+|[\p{L}\p{N}_]+|[^]/gu) || [];

// For each of two texts its runs [text, whether the other lacks it]; null where they are too long to compare.
function differences(first, second) {
  if (first.length + second.length > 4 * SHOWN_LIMIT) return null;
  const [a, b] = [wordsOf(first), wordsOf(second)];
  let begin = 0;
  while (begin < Math.min(a.length, b.length) && a[begin] === b[begin]) begin += 1;
  let end = 0;
  while (end < Math.min(a.length, b.length) - begin && a.at(-1 - end) === b.at(-1 - end)) end += 1;
  const n = a.length - begin - end;
  const m = b.length - begin - end;
  if ((n + 1) * (m + 1) > DIFF_CELLS) return null;
  const common = new Uint16Array((n + 1) * (m + 1)); // of the words from i and j on; both are shorter than 65,536 or empty
  const at = (i, j) => i * (m + 1) + j;
  for (let i = n - 1; i >= 0; i -= 1) {
    for (let j = m - 1; j >= 0; j -= 1) {
      common[at(i, j)] = a[begin + i] === b[begin + j]
        ? common[at(i + 1, j + 1)] + 1
        : Math.max(common[at(i + 1, j)], common[at(i, j + 1)]);
    }
  }
  const own = [new Set(), new Set()]; // places of words that the other lacks
  let [i, j] = [0, 0];
  while (i < n || j < m) {
    if (i < n && j < m && a[begin + i] === b[begin + j]) [i, j] = [i + 1, j + 1];
    else if (j === m || (i < n && common[at(i + 1, j)] >= common[at(i, j + 1)])) own[0].add(begin + i++);
    else own[1].add(begin + j++);
  }
  return [runs(a, own[0]), runs(b, own[1])];
}

function runs(words, own) {
  const found = [];
  words.forEach((word, place) => {
    const last = found.at(-1);
    if (last && last[1] === own.has(place)) last[0] += word;
    else found.push([word, own.has(place)]);
  });
  return found;
}

// Marked alike on both sides: which is better is not ours to say.
function showRuns(box, found) {
  box.classList.remove("rich");
  box.replaceChildren(...found.map(([text, isOwn]) => {
    if (!isOwn) return text;
    const mark = document.createElement("mark");
    mark.textContent = text;
    return mark;
  }));
}

// The place of one answer: grows while it streams, a few times a second however many tokens come.
class AnswerView {
  constructor(article) {
    this.article = article;
    this.box = article.querySelector(".text");
    this.timer = 0;
    this.begin();
  }

  begin() {
    this.text = "";
    this.shown = 0;
    this.article.className = "answer busy";
    this.box.className = "text";
    this.box.replaceChildren(document.createTextNode(""));
    this.box.removeAttribute("tabindex");
    this.tell("");
  }

  add(piece) {
    this.text += piece;
    if (piece && !this.timer) this.timer = setTimeout(() => this.flush(), this.text.length > 20000 ? 500 : 40);
  }

  flush() {
    clearTimeout(this.timer);
    this.timer = 0;
    const until = Math.min(this.text.length, SHOWN_LIMIT);
    if (until > this.shown) this.box.firstChild.appendData(this.text.slice(this.shown, until));
    this.shown = until;
  }

  end(isPlain) {
    clearTimeout(this.timer);
    this.timer = 0;
    this.article.classList.remove("busy");
    this.draw(isPlain);
  }

  draw(isPlain) {
    show(this.box, this.text, isPlain);
    this.reach();
  }

  // What scrolls must be reachable by keyboard.
  reach() {
    if (this.box.scrollHeight > this.box.clientHeight + 1) this.box.tabIndex = 0;
    else this.box.removeAttribute("tabindex");
  }

  tell(detail) {
    this.article.querySelector(".version").textContent = detail;
  }
}
