"use strict";
// One form, one picture at a time. A picture is watched through the same API that everybody else uses.

const FRAMES = 30, KEPT = 60; // pictures of the way; earlier pictures on the page
const find = id => document.getElementById(id);
const fields = ["prompt", "order", "size", "seed"];
let running = null, shown = null; // an AbortController; what the large picture is made of

const headers = () => find("key").value ? {Authorization: `Bearer ${find("key").value}`} : {};

function say(text) { find("status").textContent = text; }

function fail(text) { find("error").textContent = text; say(""); }

async function reason(answer) {
  if (answer.status === 401) {
    find("key-row").hidden = false;
    if (!find("key").value) return "This server asks for an API key.";
  }
  try { return (await answer.json()).error.message; } catch { return `The server answers ${answer.status}.`; }
}

async function start() {
  let answer;
  try { answer = await fetch("/v1/models", {headers: headers()}); } catch { return fail("The server cannot be reached."); }
  if (!answer.ok) {
    fail(await reason(answer));
    find("key").addEventListener("change", start, {once: true});
    return;
  }
  fail("");
  const model = (await answer.json()).data[0], side = model.rolling.size;
  find("model").textContent = `Model: ${model.id}`;
  const near = pixels => Math.max(16, Math.round(pixels / 16) * 16), half = near(side / 2), long = near(side * 1.5);
  const sizes = [[side, side], [side, long], [long, side], [half, half]]
    .filter(([w, h]) => w * h <= model.rolling.most_pixels).map(([w, h]) => [`${w}x${h}`, `${w} × ${h}`]);
  choices("order", model.rolling.orders.map(name => [name, name]));
  choices("size", sizes);
  restore();
}

function choices(id, pairs) { find(id).replaceChildren(...pairs.map(([value, text]) => new Option(text, value))); }

// The settings of a picture are a link: after the #, which no server is told.
function restore() {
  const said = new URLSearchParams(location.hash.slice(1));
  for (const name of fields) {
    const value = said.get(name);
    if (value === null) continue;
    const field = find(name);
    if (name === "size" && /^\d+x\d+$/.test(value) && ![...field.options].some(option => option.value === value))
      field.add(new Option(value.replace("x", " × "), value));
    field.value = value;
  }
}

function caption(figure, made) {
  const link = document.createElement("a");
  link.href = `#${new URLSearchParams(fields.map(name => [name, made[name]]))}`;
  link.textContent = "settings";
  link.setAttribute("aria-label", `Settings of ${made.prompt}, seed ${made.seed}`);
  const text = made.prompt.length > 120 ? `${made.prompt.slice(0, 120)}…` : made.prompt;
  figure.querySelector("figcaption").replaceChildren(`${text} `, link);
}

function keep() { // the large picture moves to the earlier ones
  if (!shown) return;
  const item = document.createElement("li"), figure = document.createElement("figure"), image = new Image();
  image.src = shown.source;
  image.alt = shown.prompt;
  figure.append(image, document.createElement("figcaption"));
  caption(figure, shown);
  item.append(figure);
  find("earlier").prepend(item);
  while (find("earlier").children.length > KEPT) find("earlier").lastChild.remove();
  find("gallery").hidden = false;
  shown = null;
  find("current").hidden = true;
}

async function* lines(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const {done, value} = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n");
    rest = parts.pop();
    yield* parts;
  }
}

function look(data, made) {
  const image = find("picture"), done = data.type === "image_generation.completed";
  image.src = `data:image/${data.output_format};base64,${data.b64_json}`;
  image.alt = done ? made.prompt : `Being drawn: ${made.prompt}`;
  find("current").hidden = false;
  if (!done) return find("current").querySelector("figcaption").replaceChildren(made.prompt);
  shown = {...made, size: data.size, seed: data.seed, source: image.src};
  caption(find("current"), shown);
  say("The picture is finished.");
}

async function watch(answer, made) {
  for await (const line of lines(answer.body)) {
    const [, word, number, total] = line.match(/^: (place|call) (\d+) of (\d+)/) || [];
    if (word === "place") say(`In line: ${number} before this one.`);
    if (word === "call") {
      if (find("progress").hidden) say("Drawing.");
      find("progress").hidden = false;
      find("progress").value = number / total;
    }
    if (!line.startsWith("data: ")) continue;
    const data = JSON.parse(line.slice(6));
    if (data.error) throw new Error(data.error.message);
    look(data, made);
  }
  if (!shown) throw new Error("The connection was lost before the picture was finished.");
}

async function draw() {
  if (running || !find("form").reportValidity()) return;
  const made = Object.fromEntries(fields.map(name => [name, find(name).value.trim()]));
  const asked = {prompt: made.prompt, order: made.order, size: made.size, stream: true, frames: FRAMES};
  if (made.seed) asked.seed = Number(made.seed);
  keep();
  running = new AbortController();
  find("draw").disabled = true;
  find("stop").hidden = false;
  fail("");
  say("Sent.");
  try {
    const answer = await fetch("/v1/images/generations", {
      method: "POST", headers: {"Content-Type": "application/json", ...headers()}, body: JSON.stringify(asked),
      signal: running.signal,
    });
    if (!answer.ok) throw new Error(await reason(answer));
    await watch(answer, made);
  } catch (error) {
    find("current").hidden = true;
    if (error.name === "AbortError") say("Stopped.");
    else fail(error instanceof TypeError ? "The server cannot be reached." : error.message);
  } finally {
    running = null;
    find("draw").disabled = false;
    find("stop").hidden = find("progress").hidden = true;
  }
}

find("form").addEventListener("submit", event => { event.preventDefault(); draw(); });
find("stop").addEventListener("click", () => { running?.abort(); find("draw").disabled = false; find("draw").focus(); });
find("prompt").addEventListener("keydown", event => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); draw(); }
});
addEventListener("hashchange", () => { restore(); find("prompt").focus(); });
start();
