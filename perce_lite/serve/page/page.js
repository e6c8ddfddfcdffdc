"use strict";
// Every text of a model, a user or the server is put in as text, never as HTML.
const at = (id) => document.getElementById(id);
const LISTED = 50, ENOUGH = 10;
const state = { models: [], model: null, bounds: [], stop: null, blind: null };

// The server

function headers() {
  const key = sessionStorage.getItem("key");
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

async function refusal(response) {
  const error = (await response.json().catch(() => ({}))).error;
  if (response.status === 401) at("key-form").hidden = false;
  return new Error(error ? error.message : `the server answered ${response.status}`);
}

async function got(path) {
  const response = await fetch(path, { headers: headers() });
  if (!response.ok) throw await refusal(response);
  return response.json();
}

// Gives the choices of an answer as they come; the last one holds `lean`, the first event the profile.
async function* streamed(body, signal) {
  const asked = { method: "POST", headers: headers(), signal, body: JSON.stringify({ ...body, stream: true }) };
  const response = await fetch("v1/chat/completions", asked);
  if (!response.ok) throw await refusal(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Error("the server went away");
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      yield { profile: chunk.profile, ...chunk.choices[0] };
    }
  }
}

// Who answers

const shownGain = (gain) => (gain === null ? "" : `${gain >= 0 ? "+" : "−"}${Math.abs(gain).toFixed(3)} nats`);

function matching(text) {
  const wanted = text.trim().toLowerCase();
  return state.models.filter((model) => model.id.toLowerCase().includes(wanted));
}

function listUsers(text) {
  const found = matching(text);
  const items = found.slice(0, LISTED).map((model, number) => {
    const item = document.createElement("li"), gain = document.createElement("span"), name = document.createElement("span");
    item.id = `user-${number}`;
    item.setAttribute("role", "option");
    item.setAttribute("aria-selected", "false");
    item.dataset.model = model.id;
    name.textContent = model.id;
    gain.className = "soft";
    gain.textContent = model.kind === "user" ? shownGain(model.gain) : model.kind === "base" ? "no adapter" : "shared adapter";
    item.append(name, gain);
    return item;
  });
  if (found.length > LISTED || !found.length) {
    const more = document.createElement("li");
    more.className = "soft more";
    more.setAttribute("role", "presentation");
    more.textContent = found.length ? `and ${found.length - LISTED} more: type to search` : "nobody of that name";
    items.push(more);
  }
  at("users").replaceChildren(...items);
  openUsers(true);
}

function openUsers(open) {
  at("users").hidden = !open;
  at("user").setAttribute("aria-expanded", String(open));
  if (!open) at("user").removeAttribute("aria-activedescendant");
}

function moveInUsers(step) {
  const items = [...at("users").querySelectorAll("[role=option]")];
  if (!items.length) return;
  const now = items.findIndex((item) => item.getAttribute("aria-selected") === "true");
  const next = items[(now + step + items.length + (now < 0 && step < 0 ? 1 : 0)) % items.length];
  for (const item of items) item.setAttribute("aria-selected", String(item === next));
  next.scrollIntoView({ block: "nearest" });
  at("user").setAttribute("aria-activedescendant", next.id);
}

function choose(id) {
  const model = state.models.find((one) => one.id === id);
  if (!model) return;
  state.model = model;
  at("user").value = model.id;
  const gain = model.gain === null ? "" : ` Their own adapter is ${shownGain(model.gain)} a token better on held-out texts.`;
  const kinds = { base: "The base, without any adapter.", adapter: "An adapter that is asked without a user.", user: "Their texts, chosen for each question, are the profile." };
  at("serves").textContent = kinds[model.kind] + gain;
  openUsers(false);
}

at("user").addEventListener("input", () => listUsers(at("user").value));
at("user").addEventListener("click", () => listUsers(""));
at("user").addEventListener("focus", () => at("user").select());
at("user").addEventListener("blur", () => { openUsers(false); if (state.model) at("user").value = state.model.id; });
at("user").addEventListener("keydown", (event) => {
  const open = !at("users").hidden;
  if (event.key === "ArrowDown" || event.key === "ArrowUp") {
    if (!open) listUsers("");
    moveInUsers(event.key === "ArrowDown" ? 1 : -1);
  } else if (event.key === "Enter") {
    const picked = at("users").querySelector("[aria-selected=true]") || (open && at("users").querySelector("[role=option]"));
    if (picked) choose(picked.dataset.model);
  } else if (event.key === "Escape") openUsers(false);
  else return;
  event.preventDefault();
});
at("users").addEventListener("pointerdown", (event) => {
  const item = event.target.closest("[role=option]");
  event.preventDefault(); // the field keeps the focus
  if (item) choose(item.dataset.model);
});

// Answers and their colours

const shown = (text) => text.replace(/\r/g, "").replace(/\n/g, "⏎\n").replace(/\t/g, "⇥\t");
const signed = (value) => `${value >= 0 ? "+" : "−"}${Math.abs(value).toFixed(2)}`;

function label(unit) {
  const parts = unit.token_pirs.length > 1 ? ` (of ${unit.token_pirs.length} tokens: ${unit.token_pirs.map(signed).join(", ")})` : "";
  return `“${shown(unit.text)}” PIR ${signed(unit.pir)}${parts} nats, log-prob with the profile ` +
    `${unit.factual.toFixed(2)}, without ${unit.counterfactual.toFixed(2)}`;
}

function colour(place, units) {
  const words = units.filter((unit) => !unit.end_of_turn);
  if (words.length) words[0] = { ...words[0], text: words[0].text.trimStart() };
  const spans = words.map((unit, number) => {
    const span = document.createElement("span");
    span.textContent = unit.text;
    span.className = `p${state.bounds.filter((bound) => unit.pir > bound).length}`;
    span.dataset.told = label(unit);
    span.tabIndex = number ? -1 : 0;
    return span;
  });
  place.replaceChildren(...spans);
}

for (const kind of ["pointerover", "focusin", "click"])
  document.addEventListener(kind, (event) => {
    const word = event.target.closest(".answer span");
    if (word) at("told").textContent = word.dataset.told;
  });
document.addEventListener("keydown", (event) => {
  const word = event.target.closest(".answer span");
  const next = word && { ArrowRight: word.nextSibling, ArrowLeft: word.previousSibling }[event.key];
  if (!next) return;
  word.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
  event.preventDefault();
});

function drawScale() {
  const cells = [...Array(state.bounds.length + 1).keys()].map((number) => {
    const cell = document.createElement("i");
    cell.className = `p${number}`;
    cell.textContent = number === state.bounds.length / 2 ? "0" : "";
    return cell;
  });
  const least = document.createElement("span"), most = document.createElement("b");
  least.textContent = `${state.bounds[0]}`.replace("-", "−");
  most.textContent = `+${state.bounds.at(-1)} nats`;
  at("scale").replaceChildren(least, ...cells, most);
  at("scale").setAttribute("role", "img");
}

// Ask

async function show(place, body, signal) {
  place.textContent = "";
  place.setAttribute("aria-busy", "true");
  let profile = "";
  try {
    for await (const choice of streamed({ ...body, lean: true }, signal)) {
      if (choice.profile !== undefined) profile = choice.profile;
      place.append(choice.delta.content || "");
      if (choice.lean) colour(place, choice.lean);
    }
  } finally {
    place.removeAttribute("aria-busy");
  }
  return profile;
}

function profileField() {
  const kind = document.querySelector("[name=profile]:checked").value;
  return kind === "own" ? {} : { profile: kind === "none" ? null : at("profile-text").value };
}

function busy(place, text, isError = false) {
  at(place).textContent = text;
  at(place).classList.toggle("error", isError);
}

async function ask(event) {
  event.preventDefault();
  if (!state.model || state.stop) return;
  const messages = [{ role: "user", content: at("question").value }];
  const limits = { max_tokens: Number(at("tokens").value), temperature: Number(at("temperature").value) };
  const personal = Number(at("personal").value);
  if (personal) limits.personal = personal;
  const body = { model: state.model.id, messages, ...limits, ...profileField() };
  state.stop = new AbortController();
  const bare = state.model.kind === "base";
  at("adapter").closest("article").hidden = bare;
  at("adapter-title").textContent = state.model.kind === "user" ? `Adapter of ${state.model.id}` : "Adapter";
  for (const id of ["base", "adapter"]) at(id).textContent = "";
  at("answers").hidden = false;
  at("stop").hidden = false;
  at("go").disabled = true;
  try {
    let profile;
    for (const [name, use_adapter] of bare ? [["base", false]] : [["adapter", true], ["base", false]]) {
      busy("status", `The ${name} answers …`);
      profile = await show(at(name), { ...body, use_adapter }, state.stop.signal);
      at("about").hidden = false;
      at("legend").hidden = !profile;
      at("chosen-title").textContent = profile ? "Texts chosen as profile" : "There was no profile in the prompt";
      at("chosen").textContent = profile;
    }
    busy("status", "");
  } catch (error) {
    busy("status", error.name === "AbortError" ? "Stopped." : `It did not work: ${error.message}`, error.name !== "AbortError");
  }
  at("stop").hidden = true;
  at("go").disabled = false;
  state.stop = null;
}

at("question-form").addEventListener("submit", ask);
at("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey) { event.preventDefault(); at("question-form").requestSubmit(); }
});
at("personal").addEventListener("input", () => { at("strength").value = at("personal").value; });
at("stop").addEventListener("click", () => state.stop && state.stop.abort());
for (const radio of document.querySelectorAll("[name=profile]"))
  radio.addEventListener("change", () => { at("profile-text").hidden = radio.value !== "text"; });

// Blind test

function shuffled(list) {
  const mixed = [...list];
  for (let last = mixed.length - 1; last > 0; last--) {
    const other = Math.floor(Math.random() * (last + 1));
    [mixed[last], mixed[other]] = [mixed[other], mixed[last]];
  }
  return mixed;
}

function binomial(n, k, p) { // P(X = k)
  let log = 0;
  for (let i = 1; i <= k; i++) log += Math.log(n - k + i) - Math.log(i);
  return Math.exp(log + (k ? k * Math.log(p) : 0) + (n - k ? (n - k) * Math.log(1 - p) : 0));
}

const atLeast = (n, k, p) => { let sum = 0; for (let i = k; i <= n; i++) sum += binomial(n, i, p); return sum; };

// The exact two-sided sign test, and the share's 95 % interval by Clopper and Pearson.
function signTest(k, n) {
  const tail = Math.max(k, n - k);
  const solve = (rises) => {
    let low = 0, high = 1;
    for (let step = 0; step < 60; step++) {
      const middle = (low + high) / 2;
      if (rises(middle)) high = middle; else low = middle;
    }
    return (low + high) / 2;
  };
  return {
    p: Math.min(1, 2 * atLeast(n, tail, 0.5)),
    low: k === 0 ? 0 : solve((p) => atLeast(n, k, p) > 0.025),
    high: k === n ? 1 : solve((p) => 1 - atLeast(n, k + 1, p) < 0.025),
  };
}

async function answerText(body) {
  let text = "";
  for await (const choice of streamed(body)) text += choice.delta.content || "";
  return text;
}

// One pair: what the adapter says, and what stands against it. No question comes twice: its answers would be the same,
// and the sign test wants choices that are independent. null: all were asked.
async function pairFor(test) {
  if (!test.questions.length) return null;
  const { query, written } = test.questions.pop();
  const body = { model: test.user, messages: [{ role: "user", content: query }], max_tokens: Number(at("tokens").value) };
  const adapter = await answerText(body);
  const other = test.against === "written" ? written : await answerText({ ...body, use_adapter: false });
  return { query, adapter, other };
}

async function begin(event) {
  event.preventDefault();
  if (!state.model || state.model.kind === "base") return busy("blind-status", "Choose a user first.", true);
  const against = document.querySelector("[name=against]:checked").value;
  const typed = at("questions").value.split("\n").map((line) => line.trim()).filter(Boolean);
  const test = { user: state.model.id, against, choices: [] };
  state.blind = test;
  at("trial").hidden = true;
  at("verdict").textContent = "";
  at("save").hidden = true;
  try {
    const rows = typed.length && against === "base" ? [...new Set(typed)].map((query) => ({ query })) :
      (await got(`perce/held-out?model=${encodeURIComponent(test.user)}`)).rows;
    if (!rows.length) throw new Error("the data hold nothing of theirs back; type questions, against the base");
    test.questions = shuffled(rows);
    test.of = rows.length;
    test.next = pairFor(test);
    await present(test);
  } catch (error) {
    busy("blind-status", `It did not work: ${error.message}`, true);
  }
}

async function present(test) {
  busy("blind-status", "The answers are being written …");
  for (const id of ["choose-1", "choose-2"]) at(id).disabled = true;
  const pair = await test.next;
  if (state.blind !== test) return;
  if (!pair) {
    at("trial").hidden = true;
    const more = test.of < ENOUGH ? ` ${ENOUGH} are wanted: type more of your own, against the base.` : "";
    return busy("blind-status", `${test.of === 1 ? "The one question was" : `All ${test.of} questions were`} asked.${more}`);
  }
  test.next = pairFor(test); // while this one is read
  test.next.catch(() => {}); // it is told when its turn comes
  test.pair = { ...pair, adapterFirst: Math.random() < 0.5 };
  const texts = [pair.adapter, pair.other];
  [at("first").textContent, at("second").textContent] = test.pair.adapterFirst ? texts : texts.reverse();
  at("asked").textContent = pair.query;
  at("trial").hidden = false;
  const question = test.against === "base" ? `Which sounds more like ${test.user}?` : `Which one did ${test.user} write?`;
  busy("blind-status", `${test.choices.length + 1} of ${test.of}. ${question} Press 1 or 2.`);
  for (const id of ["choose-1", "choose-2"]) at(id).disabled = false;
}

async function take(number) {
  const test = state.blind;
  if (!test || !test.pair) return;
  const { adapterFirst, ...pair } = test.pair;
  test.pair = null;
  test.choices.push({ ...pair, chose: (number === 1) === adapterFirst ? "adapter" : "other", adapter_was: adapterFirst ? 1 : 2 });
  at("save").hidden = false;
  at("verdict").textContent = verdict(test);
  try {
    await present(test);
  } catch (error) {
    busy("blind-status", `It did not work: ${error.message}`, true);
  }
}

function counted(test) {
  const wanted = test.against === "base" ? "adapter" : "other";
  const k = test.choices.filter((choice) => choice.chose === wanted).length;
  return { chosen: k, of: test.choices.length, ...signTest(k, test.choices.length) };
}

function verdict(test) {
  const { chosen, of, p, low, high } = counted(test);
  if (of < ENOUGH) return `${of} of ${ENOUGH} choices.`;
  const percent = (share) => `${Math.round(100 * share)} %`;
  const figures = `${chosen} of ${of}, ${percent(chosen / of)} (95 % interval ${percent(low)} to ${percent(high)}, sign test p = ${p.toFixed(3)})`;
  const sure = p < 0.05;
  if (test.against === "base")
    return !sure ? `The adapter's was chosen in ${figures}: no preference that can be told from chance.` :
      `The ${chosen * 2 > of ? "adapter" : "base"} sounds more like ${test.user}: the adapter's was chosen in ${figures}.`;
  if (!sure) return `Their own text was found in ${figures}: you cannot tell it from the adapter's.`;
  return chosen * 2 > of ? `You can tell: their own text was found in ${figures}.` :
    `You take the adapter's for theirs: their own text was found in only ${figures}.`;
}

at("blind-form").addEventListener("submit", begin);
at("choose-1").addEventListener("click", () => take(1));
at("choose-2").addEventListener("click", () => take(2));
document.addEventListener("keydown", (event) => {
  const typing = event.target.matches("textarea, input:not([type=radio])");
  if (!at("blind").hidden && !typing && ["1", "2"].includes(event.key)) take(Number(event.key));
});
for (const radio of document.querySelectorAll("[name=against]"))
  radio.addEventListener("change", () => { at("own-questions").hidden = radio.value !== "base"; });
at("save").addEventListener("click", () => {
  const { user, against, choices } = state.blind;
  const text = JSON.stringify({ user, against, ...counted(state.blind), choices }, null, 2);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  link.download = "blind-test.json";
  link.click();
  URL.revokeObjectURL(link.href);
});

// Tabs, the key, the beginning

const tabs = ["ask", "blind"];
function openTab(name) {
  for (const one of tabs) {
    at(one).hidden = one !== name;
    at(`tab-${one}`).setAttribute("aria-selected", String(one === name));
    at(`tab-${one}`).tabIndex = one === name ? 0 : -1;
  }
  at("told").hidden = name !== "ask";
}
for (const name of tabs) {
  at(`tab-${name}`).addEventListener("click", () => openTab(name));
  at(`tab-${name}`).addEventListener("keydown", (event) => {
    if (event.key !== "ArrowRight" && event.key !== "ArrowLeft") return;
    const other = tabs[1 - tabs.indexOf(name)];
    openTab(other);
    at(`tab-${other}`).focus();
  });
}

at("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("key", at("key").value.trim());
  start();
});

async function start() {
  try {
    state.bounds = (await got("perce/page")).pir_bounds;
    state.models = (await got("v1/models")).data;
    at("key-form").hidden = true;
    busy("status", "");
    drawScale();
    choose((state.models.find((model) => model.kind === "user") || state.models[0]).id);
  } catch (error) {
    busy("status", `It did not work: ${error.message}`, true);
  }
}
start();
