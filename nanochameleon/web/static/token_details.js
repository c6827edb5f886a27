/** The details of one token, in a popover next to it: id, probability, and the five likeliest alternatives. */

import { make } from "./elements.js";
import { label } from "./token_list.js";

/** Return {element, show(anchor, content), hide()}. list: where the tokens are, which the details cover only if they must. */
export function detailsView(list) {
  const element = make("div", { className: "token-details", id: "token-details", role: "tooltip", popover: "manual" });

  function show(anchor, content) {
    element.replaceChildren(...content);
    if (!element.matches(":popover-open")) element.showPopover();
    place(element, anchor.getBoundingClientRect(), list.getBoundingClientRect());
  }

  function hide() {
    if (element.matches(":popover-open")) element.hidePopover();
  }

  return { element, show, hide };
}

/** Left of the list, where there is room; else below the token, or above it. Never outside the window. */
function place(element, token, list) {
  const { offsetWidth: width, offsetHeight: height } = element;
  const within = (at, size, whole) => `${Math.max(8, Math.min(at, whole - size - 8))}px`;
  const aside = list.left > width + 16;
  const below = token.bottom + height + 14 <= innerHeight || token.top < height + 14;
  const left = aside ? list.left - width - 8 : token.left;
  const top = aside ? token.top - 8 : below ? token.bottom + 6 : token.top - height - 6;
  element.style.left = within(left, width, document.documentElement.clientWidth);
  element.style.top = within(top, height, innerHeight);
}

/** The content for token i. patches: urls of its own patch and of the alternatives', by token id; may be empty. */
export function tokenDetails({ tokens, pieces, characters, context }, i, patches) {
  const { id, probability, rank, alternatives, image } = tokens[i];
  const character = characters.find(({ first, last }) => first <= i && i <= last);
  const facts = [`token ${i + 1} of ${tokens.length}`, KINDS[pieces[id].kind]];
  if (image) facts.push(`image ${image[0] + 1}, row ${image[1] + 1}, column ${image[2] + 1}`);
  if (character) facts.push(`${character.last - character.first + 1} tokens make ${character.text}`);
  const head = make("p", { className: "facts small" }, facts.join(" · "));
  if (probability === null) {
    const why = tokens.length > context ? "No probability: the sequence is longer than the context." : FIRST;
    return [head, make("p", {}, chip(id, pieces, patches), ` id ${id}`), make("p", { className: "small" }, why)];
  }
  const rows = [[id, probability], ...alternatives].map(([token, p], place) => row(token, p, pieces, patches, place));
  const place = rank === 1 ? "The likeliest token here." : `${rank - 1} ${rank === 2 ? "token was" : "tokens were"} likelier.`;
  return [head, make("table", {}, HEAD(), make("tbody", {}, ...rows)), make("p", { className: "small quiet" }, place)];
}

const KINDS = { text: "text", image: "image code", special: "special" };
const FIRST = "No probability: nothing comes before the first token.";
const HEAD = () => make("thead", {}, make("tr", {}, ...["Token", "Id", "Probability"].map((name) => make("th", { scope: "col" }, name))));

function row(id, probability, pieces, patches, place) {
  const bar = make("span", { className: "bar", "aria-hidden": "true" });
  bar.style.setProperty("--p", probability);
  const number = make("td", {}, bar, make("span", { className: "number" }, percent(probability)));
  const name = make("th", { scope: "row" }, chip(id, pieces, patches));
  return make("tr", { className: place ? "other" : "own" }, name, make("td", {}, String(id)), number);
}

function chip(id, pieces, patches) {
  const piece = pieces[id];
  const element = make("span", { className: `token ${piece.kind}-token` }, ...label(piece));
  if (!patches[id]) return element;
  const alt = `patch of code ${piece.code}`;
  return make("span", { className: "with-patch" }, make("img", { src: patches[id], alt, width: 24, height: 24 }), element);
}

/** 0.9123 -> 91.2%, 0.00001 -> 0.001%, and powers of ten below. */
export function percent(p) {
  if (p >= 0.9995) return p === 1 ? "100%" : "over 99.9%";
  return p >= 1e-5 ? `${(100 * p).toPrecision(p >= 0.1 ? 3 : 2)}%` : p.toExponential(1);
}
