/** The details of one token, in a popover next to it: id, probability, and the five likeliest alternatives. */

import { make } from "./elements.js";
import { label } from "./token_list.js";

const KINDS = { text: "text", image: "image code", special: "special" };

/** Return {element, show(anchor, answer, i, patches), hide(), follow()}. list: what they should not cover. */
export function detailsView(list) {
  const element = make("div", { className: "token-details", id: "token-details", role: "tooltip", popover: "manual" });
  let anchor = null;

  const isOpen = () => element.matches(":popover-open");

  function follow() {
    if (isOpen()) place(element, anchor.getBoundingClientRect(), list.getBoundingClientRect());
  }

  return {
    element,
    follow,
    show(at, answer, i, patches = {}) {
      anchor = at;
      element.replaceChildren(...content(answer, i, patches));
      if (!isOpen()) element.showPopover();
      follow();
    },
    hide: () => isOpen() && element.hidePopover(),
  };
}

/** Left of the list, where there is room; else below the token, or above it. Never outside the window. */
function place(element, token, list) {
  const { offsetWidth: width, offsetHeight: height } = element;
  const within = (at, size, whole) => `${Math.max(8, Math.min(at, whole - size - 8))}px`;
  const aside = list.left > width + 16;
  const below = token.bottom + height + 8 <= innerHeight || token.top < height + 8;
  element.style.left = within(aside ? list.left - width - 8 : token.left, width, document.documentElement.clientWidth);
  element.style.top = within(aside ? token.top - 8 : below ? token.bottom + 6 : token.top - height - 6, height, innerHeight);
}

// ---------------------------------------------------------------------------------------------------------------------
// What they say of token i of an answer of /api/tokens. patches: urls by token.

function content(answer, i, patches) {
  const { tokens, pieces, context } = answer;
  const { id, probability, rank, alternatives } = tokens[i];
  const head = make("p", { className: "small" }, facts(answer, i).join(" · "));
  const rows = [[id, probability], ...alternatives].map(([token, p]) => row(token, p, pieces, patches));
  const foot = make("p", { className: "small quiet" }, ranked(rank) ?? (tokens.length > context ? LONG : FIRST));
  return [head, make("table", {}, header(), make("tbody", {}, ...rows)), foot];
}

const FIRST = "No probability: nothing comes before the first token.";
const LONG = "No probability: the sequence is longer than the context.";

function ranked(rank) {
  if (rank === null) return null;
  if (rank === 1) return "No token was likelier.";
  return `${rank - 1} ${rank === 2 ? "token was" : "tokens were"} likelier.`;
}

function facts({ tokens, pieces, characters }, i) {
  const { id, image } = tokens[i];
  const said = [`token ${i + 1} of ${tokens.length}`, KINDS[pieces[id].kind]];
  if (image) said.push(`image ${image[0] + 1}, row ${image[1] + 1}, column ${image[2] + 1}`);
  const character = characters.find(({ first, last }) => first <= i && i <= last);
  if (character) said.push(`${character.last - character.first + 1} tokens make “${character.text}”`);
  return said;
}

const header = () => make("thead", {}, make("tr", {}, ...["Token", "Id", "Probability"].map((name) => make("th", { scope: "col" }, name))));

function row(id, probability, pieces, patches) {
  const number = make("td", { className: "likely" }, ...(probability === null ? ["none"] : [percent(probability), bar(probability)]));
  return make("tr", {}, make("th", { scope: "row" }, ...chip(pieces[id], patches[id])), make("td", {}, String(id)), number);
}

function bar(probability) {
  const element = make("span", { className: "amount", "aria-hidden": "true" });
  element.style.setProperty("--p", probability);
  return element;
}

function chip(piece, url) {
  const words = piece.kind === "image" && !url ? [`code ${piece.code}`] : label(piece);
  const element = make("span", { className: `token ${piece.kind}-token` }, ...words);
  return url ? [make("img", { src: url, alt: "", width: 20, height: 20 }), element] : [element]; // prettier-ignore
}

/** 0.9123 -> 91.2%, 0.00001 -> 0.001%, and powers of ten below. */
function percent(p) {
  if (p >= 0.9995) return p === 1 ? "100%" : "> 99.9%";
  return p >= 1e-5 ? `${(100 * p).toPrecision(p >= 0.1 ? 3 : 2)}%` : p.toExponential(1);
}
