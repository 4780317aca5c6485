// The page to play on: asks this server for a stream of tokens, and shows each with what the model
// thought of it. In: the form. Out: spans, a table of alternatives, and the run's loss curve.
"use strict";

const ALTERNATIVES = 8;
const $ = (id) => document.getElementById(id);
const field = (name) => document.getElementsByName(name)[0];
const fields = () => [$("prompt"), ...$("settings").querySelectorAll("input, textarea")];
let model = null;
let asking = null; // the AbortController of the request that is under way

// --- talking to the server

function headers() {
  const key = $("key").value || sessionStorage.getItem("key") || "";
  return key ? { Authorization: `Bearer ${key}` } : {};
}

const GONE = `The server at ${location.host} does not answer. It has ended, or cannot be reached from here; the page looks for it every few seconds.`;

// A browser has one kind of error, with words of its own, for all that a network can do.
async function reached(promise) {
  try {
    return await promise;
  } catch (error) {
    if (error.name === "AbortError") throw error;
    if (model) setTimeout(watch); // until it is back
    model = null;
    throw new Error(GONE);
  }
}

async function ask(path, options = {}) {
  const answer = await reached(fetch(path, { ...options, headers: { ...headers(), ...options.headers } }));
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
    const { value, done } = await reached(reader.read());
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
  const body = { model: model?.id ?? "", prompt: $("prompt").value };
  for (const input of $("settings").querySelectorAll("input")) {
    if (input.value !== "") body[input.name] = Number(input.value);
  }
  const stops = field("stop").value.split("\n").filter((line) => line !== "");
  const escapes = { n: "\n", t: "\t" };
  if (stops.length) body.stop = stops.map((line) => line.replace(/\\(.)/g, (_, c) => escapes[c] ?? c));
  return body;
}

// End the answer under way; it changes nothing on the page any more.
function abandon() {
  asking?.abort();
  asking = null;
  $("stop").disabled = true;
}

async function generate() {
  abandon();
  const mine = (asking = new AbortController());
  const text = $("text");
  text.replaceChildren();
  append(text, "prompt", $("prompt").value);
  const values = fields().map((one) => one.value);
  $("stop").disabled = false;
  $("status").textContent = "waiting …";
  const started = performance.now();
  let first = 0, tokens = 0, reason = "";
  try {
    if (!model) await describe();
    const answer = await ask("v1/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ ...wanted(), stream: true, logprobs: ALTERNATIVES }),
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
    if (asking !== mine) return;
    if (mine.signal.aborted) $("status").textContent = `${speed(tokens, first, started)}; stopped`;
    else {
      $("status").textContent = "";
      append(text, "error", `\n${error.message}`).role = "alert";
    }
  }
  if (asking === mine) {
    asking = null;
    $("stop").disabled = true;
    if (tokens) remember(values, [...text.childNodes]);
  }
}

function remember(values, nodes) {
  const item = document.createElement("li");
  const whole = nodes.map((node) => node.textContent).join("").trim();
  const button = append(item, "", whole.length > 200 ? `${whole.slice(0, 200)} …` : whole, "button");
  button.type = "button";
  button.addEventListener("click", () => {
    abandon();
    fields().forEach((one, i) => (one.value = values[i]));
    $("text").replaceChildren(...nodes);
    $("status").textContent = "";
  });
  $("history").hidden = false;
  $("history").querySelector("ol").prepend(item);
}

function speed(tokens, first, started) {
  if (!first) return "no token";
  const seconds = (performance.now() - first) / 1000;
  const rate = tokens > 1 && seconds > 0 ? `, ${((tokens - 1) / seconds).toFixed(1)} tokens/s` : "";
  return `${tokens} tokens${rate}, first after ${((first - started) / 1000).toFixed(2)} s`;
}

function append(parent, kind, content, name = "span") {
  const span = document.createElement(name);
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

// --- the text and the request, elsewhere

async function copy(text) {
  if (navigator.clipboard) await navigator.clipboard.writeText(text);
  else {
    // Over plain HTTP from another machine a page has no clipboard but this one.
    const area = append(document.body, "", "", "textarea");
    area.value = text;
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  $("copied").textContent = "copied";
}

function asCurl(body) {
  const quoted = (text) => `'${text.replaceAll("'", `'\\''`)}'`;
  const key = headers().Authorization ? ' \\\n  -H "Authorization: Bearer $YUZOGPT_API_KEY"' : "";
  const url = new URL("v1/completions", location.href).href;
  return `curl ${quoted(url)} -H 'Content-Type: application/json'${key} \\\n  -d ${quoted(JSON.stringify(body))}`;
}

const OPENAI = ["model", "prompt", "max_tokens", "temperature", "top_p", "seed", "stop"];
function asPython(body) {
  // A string, number or list of JSON is one of Python.
  const key = headers().Authorization ? 'os.environ["YUZOGPT_API_KEY"]' : '"none"';
  const own = Object.entries(body).filter(([name]) => OPENAI.includes(name));
  const extra = Object.fromEntries(Object.entries(body).filter(([name]) => !OPENAI.includes(name)));
  const lines = own.map(([name, value]) => `    ${name}=${JSON.stringify(value)},`);
  return [
    ...(headers().Authorization ? ["import os", ""] : []),
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${JSON.stringify(new URL("v1", location.href).href)}, api_key=${key})`,
    "answer = client.completions.create(",
    ...lines,
    `    extra_body=${JSON.stringify(extra)},`,
    ")",
    "print(answer.choices[0].text)",
  ].join("\n");
}

function showCode(button, write) {
  const isOpen = button.ariaExpanded === "true";
  $("curl").ariaExpanded = $("python").ariaExpanded = "false";
  $("code").hidden = isOpen;
  $("copied").textContent = "";
  if (isOpen) return;
  button.ariaExpanded = "true";
  $("code").textContent = write(wanted());
  copy($("code").textContent).catch(() => {});
}

// --- what is served

async function describe() {
  const { data } = await (await ask("v1/models")).json();
  [model] = data;
  const loss = model.val_loss_estimate === null ? "" : `, val_loss_estimate ${model.val_loss_estimate.toFixed(4)}`;
  const step = model.step === null ? "" : ` · step ${model.step}${loss}`;
  $("model").textContent = `${model.id}${step} · context ${model.context_length} tokens · ${model.dtype} on ${model.device}`;
  field("max_tokens").max = model.max_new_tokens;
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
  const words = (points) => (points.length ? points.at(-1)[1].toFixed(4) : "none");
  svg.setAttribute("aria-label", `Loss to step ${last}: training ${words(train)}, validation ${words(val)} at the end`);
  $("run-caption").textContent = `Loss of training (blue) and validation (orange, thicker); the weights are of step ${step}.`;
  $("run").hidden = false;
}

// --- the keyboard and the mouse

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  generate();
});
$("stop").addEventListener("click", () => asking?.abort());
$("copy").addEventListener("click", () => copy($("text").textContent).catch((error) => ($("copied").textContent = error.message)));
$("curl").addEventListener("click", () => showCode($("curl"), asCurl));
$("python").addEventListener("click", () => showCode($("python"), asPython));
$("examples").addEventListener("click", ({ target }) => {
  if (!target.dataset.prompt) return;
  $("prompt").value = target.dataset.prompt;
  field("stop").value = target.dataset.stop ?? "";
  field("temperature").value = target.dataset.temperature ?? field("temperature").defaultValue;
  generate();
});
if (matchMedia("(max-width: 44rem)").matches) $("more").open = false;
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
  $("text").addEventListener(kind, ({ target }) => {
    if (!target.alternatives) return;
    showAlternatives(target.alternatives);
    if (kind === "focusin") target.scrollIntoView({ block: "nearest" }); // on a phone they may cover it
  });
}
$("key").addEventListener("change", watch);
watch();
