"use strict";
// Everything that comes from the run is written with textContent, never as HTML.
const byId = (id) => document.getElementById(id);
const say = (text) => words[text] || text;

function put(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== "" && value != null) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== "" && child != null));
  return made;
}

function set(id, text) {
  const place = byId(id);
  if (place.textContent !== text) place.textContent = text;
  place.hidden = text === "";
}

const name = (text) => put("bdi", {}, text);

// The state, and what runs now

let told = "";
let toldAt = 0;

function announce(text) {
  // Screen readers hear at most one sentence every five seconds; the last one counts.
  clearTimeout(announce.later);
  announce.later = setTimeout(() => {
    if (text === told) return;
    told = text;
    toldAt = Date.now();
    byId("said").textContent = text;
  }, Math.max(0, toldAt + 5000 - Date.now()));
}

const show = {
  head(head) {
    set("name", head.name);
    document.title = `${head.word} · ${head.name}`;
    byId("head").className = `verdict state ${head.state}`;
    set("word", head.word);
    set("why", head.why);
    set("round", head.round);
    set("time", head.time);
    byId("whole").hidden = !head.report;
    announce([head.word, head.round, head.why].filter(Boolean).join(". "));
  },

  now(now) {
    byId("now").hidden = !now;
    if (!now) return;
    for (const part of ["stage", "what", "count", "left"]) set(part, now[part]);
    const known = now.share !== null;
    const track = byId("track");
    track.classList.toggle("unknown", !known);
    byId("fill").style.width = known ? `${100 * now.share}%` : "";
    if (known) track.setAttribute("aria-valuenow", Math.round(100 * now.share));
    else track.removeAttribute("aria-valuenow");
    track.setAttribute("aria-valuetext", [now.count, now.left].filter(Boolean).join(", "));
  },

  steps(steps) {
    byId("steps").replaceChildren(...steps.map((step) => put("li", { class: step.kind },
      put("span", { "aria-hidden": "true" }, step.sign), ` ${step.number} `, put("span", { class: "small" }, step.word))));
  },

  champion(champion) {
    if (!champion) return byId("champion").replaceChildren(put("p", { class: "sub" }, say("none yet")));
    const made = champion.round === null ? "" : ` ${say("made by round {number}").replace("{number}", champion.round)}`;
    byId("champion").replaceChildren(put("p", {}, put("code", { class: "hash", title: champion.full }, champion.short),
      made, put("br"), put("code", { class: "small" }, champion.path)));
  },

  rounds(rounds) {
    byId("rounds").replaceChildren(...(rounds.length ? rounds.map(round)
      : [put("p", { class: "sub" }, say("no finished round yet"))]));
  },

  stages(stages) {
    if (!stages.length) return byId("stages").replaceChildren(put("p", { class: "sub" }, say("no finished stage yet")));
    unfold("stages", stages, 8, (some) => put("table", { class: "stages" },
      put("thead", {}, put("tr", {}, head("Stage", "first"), head("Time", "num"))),
      put("tbody", {}, ...some.map((stage) => put("tr", { class: stage.reused ? "again" : "" },
        put("th", { scope: "row", class: "first" }, name(stage.name)),
        put("td", { class: "num" }, stage.reused ? put("span", { class: "tag" }, `↺ ${stage.reused} `) : "", stage.time))))),
    say("more stages"));
  },

  events(events) {
    if (!events.length) return byId("events").replaceChildren(put("p", { class: "sub" }, say("nothing yet")));
    unfold("events", events, 5, (some) => put("ul", { class: "events" }, ...some.map((event) => put("li", {},
      put("strong", {}, name(event.what)), " ", put("code", {}, event.model), " ",
      put("span", { class: "small" }, event.time), event.reason ? put("span", { class: "reason small" }, name(event.reason)) : ""))),
    say("more events"));
  },
};

// The first few, and the others behind a click that stays open while the page changes.
function unfold(id, every, few, draw, label) {
  const before = byId(id).querySelector("details");
  const shown = [draw(every.slice(0, few))];
  if (every.length > few) {
    const details = put("details", { open: before && before.open ? "open" : null },
      put("summary", {}, `${label} (${every.length - few})`), draw(every.slice(few)));
    shown.push(details);
  }
  const focused = before && before.contains(document.activeElement);
  byId(id).replaceChildren(...shown);
  if (focused) byId(id).querySelector("summary").focus({ preventScroll: true });
}

const head = (text, kind, unit) => put("th", { scope: "col", class: kind }, say(text), unit ? ` (${unit})` : "");

// A finished round

function round(one) {
  const accepted = one.kind === "promoted" ? "accepted" : "refused";
  const card = put("article", { class: `verdict round ${accepted}` },
    put("h3", {}, `${one.title}: `, put("span", { class: "state" }, `${one.sign} ${one.word}`)),
    put("p", { class: "why" }, name(one.reason)),
    put("dl", { class: "facts" }, ...one.facts.map((fact) => put("div", {}, put("dt", {}, fact.name),
      put("dd", {}, fact.value, fact.note ? put("span", { class: "small" }, fact.note) : "")))));
  if (one.domains.length) {
    card.append(put("table", { class: "changes" },
      put("thead", {}, put("tr", {}, head("Domain", "first"), head("Change, with its interval", "plot", one.unit),
        head("Score", "num"), head("Outcome", "outcome"))),
      put("tbody", {}, ...one.domains.map(domain))));
  }
  if (one.more) card.append(put("p", { class: "small" }, `+ ${one.more} ${say("more in the report")}`));
  if (one.report) card.append(put("p", {}, put("a", { href: one.report }, say("Report of this round"))));
  return card;
}

function domain(one) {
  const way = { "▲": "up", "▼": "down", "✗": "down" }[one.sign] || "";
  return put("tr", {}, put("th", { scope: "row", class: "first" }, name(one.name), " ",
    put("span", { class: "tag" }, one.tags)),
  put("td", { class: "plot" }, put("div", {}, strip(one), put("span", { class: "numbers" },
    put("strong", {}, one.change), put("span", { class: "small" }, ` ${one.interval}`)))),
  put("td", { class: "num" }, one.scores), put("td", { class: `outcome ${way}` }, `${one.sign} ${one.outcome}`));
}

// A line for the interval, a square for the change; the numbers stand beside it.
function strip(one) {
  const [at, low, high] = one.at;
  const drawn = put("span", { class: "interval", "aria-hidden": "true" });
  const add = (kind, left, width) => {
    const piece = put("span", { class: kind });
    piece.style.left = `${left}%`;
    if (width !== undefined) piece.style.width = `${width}%`;
    drawn.append(piece);
  };
  add("origin", one.zero);
  if (low !== null && high !== null) add("reach", low, high - low);
  if (at !== null) add("point", at);
  return drawn;
}

// Following: events at once, or a question every second where they do not come through

let asking = 0;

function take(parts) {
  byId("lost").hidden = true;
  for (const part of Object.keys(parts)) if (part in show) show[part](parts[part]);
}

async function ask() {
  try {
    const answer = await fetch("/state", { cache: "no-store" });
    take(await answer.json());
  } catch {
    byId("lost").hidden = false;
  }
  asking = setTimeout(ask, 1000);
}

function follow() {
  if (!("EventSource" in window)) return ask();
  const source = new EventSource("/events");
  source.onmessage = (event) => {
    clearTimeout(asking);
    asking = 0;
    take(JSON.parse(event.data));
  };
  source.onerror = () => {
    byId("lost").hidden = source.readyState !== EventSource.CONNECTING;
    if (source.readyState === EventSource.CLOSED && !asking) ask();
  };
}

follow();
