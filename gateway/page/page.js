// One page over the gateway: chunks are picked and ordered, questions asked in one or several reuse modes at once, and
// every part of a prompt is shown with where its KV came from. What the API key may see is all that is shown; it is
// kept in this page alone.
"use strict";

const SOURCES = ["device", "host", "store", "computed"];
const LIVE_MS = 2000;
const LISTED_MAX = 100;

const el = (id) => document.getElementById(id);
const picked = []; // {id, name, tokens, source}
const tokensBySource = { device: 0, host: 0, store: 0, computed: 0 };
let known = [];
let model = "";
let going = null; // AbortController of what is being answered

// -- asking the gateway ---------------------------------------------------------------------------------
async function call(path, options = {}) {
  const headers = { ...(options.body ? { "content-type": "application/json" } : {}) };
  if (el("key").value) headers.authorization = `Bearer ${el("key").value}`;
  const reply = await fetch(path, { ...options, headers });
  if (!reply.ok) throw new Error(await wordsOf(reply));
  return reply;
}

async function wordsOf(reply) {
  const again = reply.headers.get("retry-after");
  const later = again ? ` (again in ${again} s)` : "";
  try {
    return (await reply.json()).error.message + later;
  } catch {
    return `${reply.status} ${reply.statusText}${later}`;
  }
}

function tell(error) {
  el("trouble").textContent = error ? error.message : "";
  el("trouble").hidden = !error;
}

const guarded = (work) => async (...given) => {
  try {
    await work(...given);
    tell(null);
  } catch (error) {
    if (error.name !== "AbortError") tell(error);
  }
};

// -- chunks ---------------------------------------------------------------------------------------------
async function loadChunks() {
  const reply = await (await call(`v1/cairn/chunks?limit=${LISTED_MAX}&order=last_used`)).json();
  known = reply.data.filter((chunk) => chunk.type !== "turn" && chunk.type !== "query");
  showKnown();
}

function nameOf(chunk) {
  return chunk.name || `${chunk.type} ${chunk.id.slice(0, 10)}…`;
}

function itemOf(template) {
  return el(template).content.firstElementChild.cloneNode(true);
}

function showKnown() {
  const wanted = el("filter").value.toLowerCase();
  const shown = known.filter((chunk) => [nameOf(chunk), ...(chunk.tags || [])].some((word) => word.toLowerCase().includes(wanted)));
  el("known").replaceChildren(...shown.map((chunk) => {
    const item = itemOf("known-item");
    item.querySelector(".name").textContent = nameOf(chunk);
    item.querySelector(".kind").textContent = chunk.type;
    item.querySelector(".tokens").textContent = `${chunk.tokens} tokens`;
    item.querySelector(".add").setAttribute("aria-label", `Add ${nameOf(chunk)}`);
    item.querySelector(".add").onclick = () => { picked.push({ id: chunk.id, name: nameOf(chunk), tokens: chunk.tokens, source: "" }); showPicked(); };
    return item;
  }));
}

function move(from, to) {
  if (to < 0 || to >= picked.length) return;
  picked.splice(to, 0, ...picked.splice(from, 1));
  showPicked();
}

function showPicked() {
  el("picked-empty").hidden = picked.length > 0;
  el("picked").replaceChildren(...picked.map((chunk, at) => {
    const item = itemOf("picked-item");
    item.querySelector(".name").textContent = chunk.name;
    item.querySelector(".tokens").textContent = `${chunk.tokens} tokens${chunk.source ? ", " + chunk.source : ""}`;
    if (chunk.source) item.classList.add(chunk.source);
    item.querySelector(".up").onclick = () => { move(at, at - 1); focusOn(at - 1, ".up"); };
    item.querySelector(".down").onclick = () => { move(at, at + 1); focusOn(at + 1, ".down"); };
    item.querySelector(".drop").onclick = () => { picked.splice(at, 1); showPicked(); };
    item.ondragstart = (event) => event.dataTransfer.setData("text/plain", String(at));
    item.ondragover = (event) => { event.preventDefault(); item.classList.add("over"); };
    item.ondragleave = () => item.classList.remove("over");
    item.ondrop = (event) => { event.preventDefault(); move(Number(event.dataTransfer.getData("text/plain")), at); };
    return item;
  }));
}

function focusOn(at, button) {
  el("picked").children[Math.min(Math.max(at, 0), picked.length - 1)]?.querySelector(button).focus();
}

async function register() {
  const chunk = { text: el("new-text").value, name: el("new-name").value, type: el("new-type").value, role: el("new-role").value };
  el("register").disabled = true;
  try {
    await call("v1/cairn/chunks", { method: "POST", body: JSON.stringify(chunk) });
    el("new-text").value = el("new-name").value = "";
    await loadChunks();
  } finally {
    el("register").disabled = false;
  }
}

// -- answers --------------------------------------------------------------------------------------------
function requestOf(reuse) {
  const messages = [{ role: "user", content: el("question").value }];
  if (el("system").value) messages.unshift({ role: "system", content: el("system").value });
  return {
    model, messages, stream: true, stream_options: { include_usage: true },
    max_tokens: Number(el("max-tokens").value), temperature: Number(el("temperature").value),
    cairn: { reuse, cache: el("bypass").checked ? "bypass" : "shared", keep: false, documents: picked.map(({ id }) => ({ id })) },
  };
}

async function askAll() {
  if (!el("question").value.trim()) throw new Error("question: write one first");
  const modes = [...document.querySelectorAll("input[name=mode]:checked")].map((box) => box.value);
  if (!modes.length) throw new Error("reuse: choose a mode at least");
  if (!model) await loadModel();
  going = new AbortController();
  el("ask").disabled = true;
  el("stop").disabled = false;
  const cards = modes.map((mode) => { const card = itemOf("card"); card.dataset.mode = mode; card.querySelector(".mode").textContent = mode; return card; });
  el("cards").replaceChildren(...cards);
  try {
    await Promise.all(modes.map((mode, at) => answer(mode, cards[at], going.signal)));
  } finally {
    el("ask").disabled = false;
    el("stop").disabled = true;
    showBySource();
  }
}

async function answer(mode, card, signal) {
  const text = card.querySelector(".text");
  const began = performance.now();
  let first = 0;
  let last = null;
  try {
    const reply = await call("v1/chat/completions", { method: "POST", body: JSON.stringify(requestOf(mode)), signal });
    for await (const event of events(reply.body)) {
      if (event.error) throw new Error(event.error.message);
      for (const choice of event.choices) {
        const words = (choice.delta.reasoning_content || "") + (choice.delta.content || "");
        if (words && !first) first = performance.now();
        text.textContent += words;
      }
      if (event.cairn) last = event;
    }
    if (last) report(mode, card, last, first ? first - began : 0, performance.now() - (first || began));
  } catch (error) {
    text.classList.toggle("failed", error.name !== "AbortError");
    text.textContent += error.name === "AbortError" ? " — stopped" : error.message;
    card.dataset.done = "failed";
  }
}

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const blocks = held.split("\n\n");
    held = blocks.pop();
    for (const block of blocks) {
      const data = block.split("\n").filter((line) => line.startsWith("data: ")).map((line) => line.slice(6)).join("\n");
      if (data && data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

function report(mode, card, last, firstMs, restMs) {
  const { reuse, usage } = last.cairn;
  const parts = reuse.segments.flatMap(partsOf);
  card.querySelector(".exactness").textContent = reuse.exactness.replaceAll("_", " ");
  card.querySelector(".parts").replaceChildren(...parts.map((part) => slice(part.source, part.tokens, `${part.name}: ${part.tokens} tokens, ${part.source}`)));
  card.querySelector("tbody").replaceChildren(...parts.map(rowOf));
  card.querySelector("table").hidden = false;
  const rate = usage.completion_tokens > 1 ? `, ${Math.round(1000 * (usage.completion_tokens - 1) / Math.max(restMs, 1))} tokens/s` : "";
  card.querySelector(".figures").textContent = `${usage.cached_tokens} of ${usage.prompt_tokens} prompt tokens reused; first words after ${Math.round(firstMs)} ms${rate}`;
  for (const part of parts) tokensBySource[part.source] += part.tokens;
  for (const chunk of picked) {
    const segment = reuse.segments.find((each) => each.chunk_id === chunk.id);
    if (segment && (mode === "exact" || !chunk.source)) chunk.source = segment.source;
  }
  showPicked();
  card.dataset.done = "yes";
}

// What was reused of a segment and what was computed of it are parts of their own.
function partsOf(segment, at) {
  const name = segment.name || (segment.type === "query" ? "question" : picked.find((chunk) => chunk.id === segment.chunk_id)?.name) || segment.type.replaceAll("_", " ");
  const part = (source, tokens) => ({ name, source, tokens, exactness: segment.exactness, why: segment.miss_reason });
  const computed = segment.tokens - segment.cached_tokens;
  return [
    ...(segment.cached_tokens ? [part(segment.source, segment.cached_tokens)] : []),
    ...(computed ? [part("computed", computed)] : []),
  ];
}

function rowOf(part) {
  const row = document.createElement("tr");
  for (const words of [part.name, part.tokens, part.source, shortened(part.exactness)]) row.insertCell().textContent = words;
  row.cells[2].prepend(Object.assign(document.createElement("i"), { className: part.source }));
  if (part.why) row.cells[2].append(` (${part.why.replaceAll("_", " ")})`);
  return row;
}

// In a table of parts the words of "exact_context" and "exact_block_mask" that tell them apart.
function shortened(exactness) {
  return exactness.replace(/^exact_/, "").replaceAll("_", " ");
}

function slice(kind, share, title) {
  const part = document.createElement("i");
  part.className = kind;
  part.style.flexGrow = share;
  part.title = title;
  return part;
}

// -- live -----------------------------------------------------------------------------------------------
function showBySource() {
  const there = SOURCES.filter((source) => tokensBySource[source]);
  el("by-source").replaceChildren(...there.map((source) => slice(source, tokensBySource[source], `${source}: ${tokensBySource[source]} tokens`)));
  el("by-source-words").textContent = there.map((source) => `${tokensBySource[source]} ${source}`).join(", ") || "none yet";
}

function amount(bytes) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let at = 0;
  for (; bytes >= 1000 && at < units.length - 1; at++) bytes /= 1000;
  return `${bytes.toFixed(bytes < 10 && at ? 1 : 0)} ${units[at]}`;
}

let before = null;

function showLoads(loads) {
  const seen = loads.pages_free + loads.pages_chunks + loads.pages_tails > 0;
  el("pages").replaceChildren(...(seen ? [slice("chunks", loads.pages_chunks, "chunks"), slice("tails", loads.pages_tails, "queries and answers"), slice("saved", loads.pages_free, "free")] : []));
  el("pages-words").textContent = seen
    ? `${loads.pages_chunks} hold ${loads.chunks_resident} chunks, ${loads.pages_tails} queries and answers, ${loads.pages_free} are free`
    : `${loads.pages_total} in all; what others use is not shown to this key`;
  const since = before && loads.steps > before.steps ? before : { steps: 0, step_bytes_read: 0, step_bytes_flat: 0 };
  const read = loads.step_bytes_read - since.step_bytes_read, flat = loads.step_bytes_flat - since.step_bytes_flat;
  const steps = loads.steps - since.steps;
  el("steps").replaceChildren(...(flat ? [slice("read", read, "read"), slice("saved", flat - read, "saved")] : []));
  el("steps-words").textContent = flat
    ? `${amount(read / steps)} a step instead of ${amount(flat / steps)}: ${(flat / read).toFixed(2)} times less; ${loads.running} running, ${loads.waiting} waiting`
    : `${loads.running} running, ${loads.waiting} waiting`;
  if (!before || loads.steps > before.steps) before = loads;
}

async function live() {
  try {
    showLoads(await (await call("v1/cairn/loads")).json());
  } catch (error) {
    el("pages-words").textContent = error.message;
  }
  setTimeout(live, LIVE_MS);
}

async function loadModel() {
  model = (await (await call("v1/models")).json()).data[0].id;
  el("model").textContent = model;
}

// -- what is pressed ------------------------------------------------------------------------------------
const ask = guarded(askAll);
el("ask").onclick = ask;
el("stop").onclick = () => going?.abort();
el("reload").onclick = guarded(loadChunks);
el("register").onclick = guarded(register);
el("filter").oninput = showKnown;
el("key").onchange = guarded(async () => { before = null; await loadModel(); await loadChunks(); });
el("question").onkeydown = (event) => { if (event.key === "Enter" && event.ctrlKey && !el("ask").disabled) ask(); };
guarded(async () => { await loadModel(); await loadChunks(); })();
live();
