/** The owner's page: the results so far, as tables. It asks again every few seconds while it is visible.
 *
 *  The owner's key comes from the address after #, which browsers do not send, and travels in a header.
 */

import { $, make } from "./elements.js";

const PAUSE = 4000; // milliseconds between two requests, and at least 5 times what the last one took:
const PATIENCE = 5; // results of a large study take seconds to count, while people vote

/** -> the results; null: no vote is new since `tag`. Throws an Error with the server's sentence. */
async function fetchResults(key, tag) {
  const headers = { "x-owner-key": key, ...(tag && { "if-none-match": tag }) };
  const response = await fetch("/api/owner/results", { cache: "no-store", headers });
  const text = await response.text(); // read even where it is empty, else the browser counts the request as broken off
  if (response.status === 304) return null;
  const content = JSON.parse(text);
  if (!response.ok) throw Object.assign(new Error(content.error.message), { status: response.status });
  return { ...content, tag: response.headers.get("etag") };
}

function tableOf({ header, rows }, title) {
  const head = make("tr", {}, ...header.map((cell) => make("th", { scope: "col" }, cell)));
  const body = rows.map(([first, ...rest]) =>
    make("tr", {}, make("th", { scope: "row" }, first), ...rest.map((cell) => make("td", {}, cell))),
  );
  return make("table", { "aria-labelledby": title }, make("thead", {}, head), make("tbody", {}, ...body));
}

/** A title, and a frame that scrolls sideways. They stay when the numbers change, and keep their focus and place. */
function sectionOf(table) {
  const title = `title of ${table.name}`.replaceAll(" ", "-");
  const frame = { className: "table", role: "region", tabIndex: 0, "aria-labelledby": title };
  const section =
    $(title)?.parentElement ?? make("section", {}, make("h2", { id: title }, table.title), make("div", frame));
  section.lastElementChild.replaceChildren(tableOf(table, title));
  return section;
}

function show({ votes, items, tables }) {
  $("summary").textContent = `Votes so far: ${votes}; items of the study: ${items}`;
  const sections = tables.map(sectionOf);
  const same = sections.length === $("results").children.length && sections.every((section) => section.isConnected);
  if (!same) $("results").replaceChildren(...sections);
}

const pause = (time) => new Promise((resolve) => setTimeout(resolve, time));

/** Resolves when the page is visible. */
async function visible() {
  while (document.visibilityState !== "visible") {
    await new Promise((resolve) => document.addEventListener("visibilitychange", resolve, { once: true }));
  }
}

async function watch(key) {
  for (let tag = null, began = 0; ; await pause(Math.max(PAUSE, PATIENCE * (performance.now() - began)))) {
    await visible();
    began = performance.now();
    try {
      const results = await fetchResults(key, tag);
      $("problem").textContent = "";
      if (!results) continue;
      tag = results.tag;
      show(results);
    } catch (error) {
      $("problem").textContent = error.status ? error.message : "The server does not answer; asking again.";
      if ([403, 404].includes(error.status)) return; // asking again cannot help
    }
  }
}

addEventListener("hashchange", () => location.reload()); // another key
watch(new URLSearchParams(location.hash.slice(1)).get("key") ?? "");
