// How the chat page talks to the API: the same routes that everybody uses.
"use strict";

const sentence = (text) => text.replace(/[.!?]?$/, (end) => end || ".");

// The reply, or an Error whose message is a sentence.
async function post(url, body, signal) {
  const response = await fetch(url, { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body), signal })
    .catch((error) => { throw new Error(error.name === "AbortError" ? "stopped." : "the server cannot be reached."); });
  if (response.ok) return response;
  const { error } = await response.json().catch(() => ({}));
  const said = error ? sentence(error.message) : `the server answered ${response.status}.`;
  const wait = Number(response.headers.get("retry-after"));
  throw Object.assign(new Error(wait && !/again in \d/.test(said) ? `${said} Try again in ${wait} s.` : said), { code: error && error.code });
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
