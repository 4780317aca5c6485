// The page to play on: asks this server for a stream of tokens, and shows each with what the model
// thought of it. In: the form. Out: spans, a table of alternatives, and the run's loss curve.
"use strict";

const ALTERNATIVES = 8;
const $ = (id) => document.getElementById(id);
let model = null;
let asking = null; // the AbortController of the request that is under way

// --- talking to the server

function headers() {
  const key = $("key").value || sessionStorage.getItem("key") || "";
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function ask(path, options = {}) {
  const answer = await fetch(path, { ...options, headers: { ...headers(), ...options.headers } });
  if (answer.ok) {
    if ($("key").value) sessionStorage.setItem("key", $("key").value);
    return answer;
  }
  if (answer.status === 401) $("key-row").hidden = false;
  const content = await answer.json().catch(() => null);
  throw new Error(content?.error?.message ?? `the server answered ${answer.status}`);
}

async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("the connection ended before the text did");
    const parts = (held + value).split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

// --- generating

function wanted() {
  const body = { model: model.id, prompt: $("prompt").value, stream: true, logprobs: ALTERNATIVES };
  for (const input of $("settings").querySelectorAll("input")) {
    if (input.value === "") continue;
    body[input.name] = input.type === "number" ? Number(input.value) : input.value;
  }
  return body;
}

async function generate() {
  asking?.abort();
  const mine = (asking = new AbortController());
  const text = $("text");
  text.replaceChildren();
  append(text, "prompt", $("prompt").value);
  $("stop").disabled = false;
  $("status").textContent = "waiting …";
  const started = performance.now();
  let first = 0, tokens = 0, reason = "";
  try {
    if (!model) await describe();
    const answer = await ask("v1/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(wanted()),
      signal: mine.signal,
    });
    for await (const event of events(answer)) {
      const [choice] = event.choices;
      first ||= performance.now();
      tokens += choice.logprobs.tokens.length;
      showTokens(text, choice);
      reason = choice.finish_reason ?? reason;
      $("status").textContent = speed(tokens, first, started);
    }
    $("status").textContent = `${speed(tokens, first, started)}; ended by ${reason}`;
  } catch (error) {
    if (mine.signal.aborted) $("status").textContent = `${speed(tokens, first, started)}; stopped`;
    else {
      $("status").textContent = "";
      append(text, "error", `\n${error.message}`);
    }
  }
  if (asking === mine) {
    asking = null;
    $("stop").disabled = true;
  }
}

function speed(tokens, first, started) {
  if (!first) return "no token";
  const seconds = (performance.now() - first) / 1000;
  const rate = tokens > 1 && seconds > 0 ? `, ${((tokens - 1) / seconds).toFixed(1)} tokens/s` : "";
  return `${tokens} tokens${rate}, first after ${((first - started) / 1000).toFixed(2)} s`;
}

function append(parent, kind, content) {
  const span = document.createElement("span");
  span.className = kind;
  span.textContent = content;
  parent.append(span);
  return span;
}

// A piece of text may have several tokens, or begin with what belongs to the token before it.
function showTokens(parent, { text, logprobs }) {
  const characters = [...text];
  const { tokens, text_offset: offsets } = logprobs;
  const spans = parent.querySelectorAll(".token");
  const begin = spans.length ? Number(parent.dataset.end) : (offsets[0] ?? 0);
  const slice = (from, to) => characters.slice(from - begin, to - begin).join("");
  const end = (parent.dataset.end = begin + characters.length);
  const before = slice(begin, offsets[0] ?? end);
  if (before && spans.length) spans[spans.length - 1].textContent += before;
  for (const [i, chosen] of tokens.entries()) {
    const span = append(parent, "token", slice(offsets[i], offsets[i + 1] ?? end));
    const top = Object.entries(logprobs.top_logprobs[i]);
    top.sort((a, b) => b[1] - a[1]);
    span.alternatives = { chosen, top };
    span.tabIndex = -1;
    span.style.setProperty("--surprise", 1 - Math.exp(logprobs.token_logprobs[i]));
  }
}

// --- what the model thought of a token

function showAlternatives({ chosen, top }) {
  const table = document.createElement("table");
  table.createCaption().textContent = `instead of ${JSON.stringify(chosen)}`;
  for (const [token, logprob] of top) {
    const row = table.insertRow();
    row.className = token === chosen ? "chosen" : "";
    row.insertCell().textContent = JSON.stringify(token).slice(1, -1).replaceAll(" ", "␣");
    const meter = document.createElement("meter");
    meter.value = Math.exp(logprob);
    row.insertCell().append(meter);
    row.insertCell().textContent = `${(100 * Math.exp(logprob)).toFixed(1)}%`;
  }
  $("alternatives").replaceChildren(table);
}

function step(forward) {
  const tokens = [...$("text").querySelectorAll(".token")].filter((token) => token.textContent);
  if (!tokens.length) return;
  const at = tokens.indexOf(document.activeElement);
  const next = at < 0 ? (forward ? 0 : tokens.length - 1) : at + (forward ? 1 : -1);
  tokens[Math.max(0, Math.min(tokens.length - 1, next))].focus();
}

// --- what is served

async function describe() {
  const { data } = await (await ask("v1/models")).json();
  [model] = data;
  const loss = model.val_loss_estimate === null ? "" : `, val loss ${model.val_loss_estimate.toFixed(4)}`;
  const step = model.step === null ? "" : ` · step ${model.step}${loss}`;
  $("model").textContent = `${model.id}${step} · ${model.dtype} on ${model.device}`;
}

let watching = 0; // the timer of the next look
async function watch() {
  clearTimeout(watching);
  const mine = (watching = setTimeout(() => {}));
  try {
    await describe();
    const run = await (await ask("v1/run")).json();
    if (run.train.length) draw(run);
  } catch (error) {
    $("model").textContent = error.message;
  }
  // Unless a change of the key has begun another chain meanwhile.
  if (mine === watching && (!model || model.follows_its_run)) watching = setTimeout(watch, 5000);
}

function draw({ train, val, step }) {
  const [W, H, left, bottom] = [640, 180, 44, 22];
  const all = [...train, ...val];
  const last = Math.max(...all.map(([at]) => at), 1);
  const [low, high] = [Math.min(...all.map(([, y]) => y)), Math.max(...all.map(([, y]) => y))];
  const x = (at) => left + (at / last) * (W - left - 10);
  const y = (loss) => 10 + ((high - loss) / (high - low || 1)) * (H - bottom - 10);
  const line = (points) => points.map(([at, loss], i) => `${i ? "L" : "M"}${x(at).toFixed(1)},${y(loss).toFixed(1)}`).join("");
  const svg = $("curve");
  svg.replaceChildren();
  const add = (name, attributes, content = "") => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.textContent = content;
    svg.append(element);
  };
  add("path", { class: "train", d: line(train) });
  add("path", { class: "val", d: line(val) });
  if (step !== null) add("path", { class: "now", d: `M${x(step)},10V${H - bottom}` });
  add("text", { x: 4, y: y(high) + 4 }, high.toFixed(2));
  add("text", { x: 4, y: y(low) + 4 }, low.toFixed(2));
  add("text", { x: left, y: H - 6 }, "step 0");
  add("text", { x: W - 10, y: H - 6, "text-anchor": "end" }, String(last));
  $("run-caption").textContent = `Loss of training (blue) and validation (orange); the weights are of step ${step}.`;
  $("run").hidden = false;
}

// --- the keyboard and the mouse

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  generate();
});
$("stop").addEventListener("click", () => asking?.abort());
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("form").requestSubmit();
  else if (event.key === "Escape") asking?.abort();
});
$("text").addEventListener("keydown", (event) => {
  if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
  event.preventDefault();
  step(event.key === "ArrowRight");
});
for (const kind of ["mouseover", "focusin"]) {
  $("text").addEventListener(kind, ({ target }) => target.alternatives && showAlternatives(target.alternatives));
}
$("key").addEventListener("change", watch);
watch();
