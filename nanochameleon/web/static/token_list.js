/** Builds the list of a sequence's tokens: a block for what each turn says, and one for each image.
 *
 *  Every token is one button with data-index, its place in the sequence. No listener is here: tokens.js has them.
 */

import { make } from "./elements.js";
import { imageParts } from "./token_images.js";

const UNLIKELY = 0.01;

/** Return {blocks, buttons}: items of the list, and the button of every token. images: of token_images.js. */
export function tokenList({ tokens, pieces, characters }, images) {
  const ends = new Map(characters.map(({ last, text }) => [last, text]));
  const joined = new Set(characters.flatMap(({ first, last }) => range(first, last)));
  const starts = new Map(images.map((image) => [image.first - 1, image])); // at <boi>
  const buttons = tokens.map((token, i) => tokenButton(token, i, pieces[token.id], ends.get(i), joined.has(i)));
  const blocks = [];
  let block = null; // {element, into}
  buttons.forEach((button, i) => {
    if (starts.has(i)) block = null;
    if (!block) blocks.push((block = starts.has(i) ? imageBlock(starts.get(i)) : saidBlock()).element);
    block.into.append(button);
    if (["<eot>", "<eoi>"].includes(pieces[tokens[i].id].name)) block = null;
  });
  return { blocks, buttons };
}

const range = (first, last) => Array.from({ length: last - first }, (_, i) => first + i);

function saidBlock() {
  const element = make("li", { className: "said" });
  return { element, into: element };
}

function imageBlock(image) {
  const into = make("div", { className: "patches", hidden: image.folded });
  const element = make("li", { className: "drawn" }, ...imageParts(image), into);
  element.dataset.image = image.number;
  element.style.setProperty("--grid", image.grid);
  return { element, into };
}

/** end: the character that this token completes. joined: its bytes go on in the next token. */
function tokenButton({ probability, image }, i, piece, end, joined) {
  const button = make("button", { type: "button", tabIndex: -1, className: `token ${piece.kind}-token` }, ...label(piece, end));
  button.dataset.index = i;
  button.classList.toggle("joined", joined);
  if (probability !== null) button.style.setProperty("--p", probability);
  button.classList.toggle("unlikely", probability !== null && probability < UNLIKELY);
  if (image) {
    const [number, row, column] = image;
    button.setAttribute("aria-label", `code ${piece.code}, image ${number + 1}, row ${row + 1}, column ${column + 1}`);
    button.style.setProperty("--row", row);
    button.style.setProperty("--column", column);
  }
  return button;
}

// ---------------------------------------------------------------------------------------------------------------------
// What a token shows

/** Return nodes for a piece of /api/tokens. end: the character that its bytes complete. */
export function label(piece, end) {
  if (piece.kind === "special") return [piece.name];
  if (piece.kind === "image") return [make("span", { className: "code" }, String(piece.code))];
  if ("bytes" in piece) return [piece.bytes, ...(end ? [make("b", {}, ` ${visible(end)}`)] : [])];
  if (piece.text === "") return [make("i", {}, "nothing")];
  return piece.text.split(/([ \n\r\t])/u).filter(Boolean).map((part) => (part in SIGNS ? sign(part) : visible(part)));
}

const SIGNS = { " ": "space", "\n": "newline", "\r": "return", "\t": "tab" };

/** White space keeps its character, and the style sheet draws a sign for it; its name is for screen readers. */
const sign = (letter) =>
  make("span", { className: `sign ${SIGNS[letter]}` }, letter === " " ? " " : "", make("span", { className: "unseen" }, SIGNS[letter]));

/** Characters that nobody could see become their numbers; so does a mark without its letter. */
const visible = (text) => text.replace(/[\p{C}\p{Z}]|^\p{M}/gu, (letter) => `U+${hex(letter)}`);
const hex = (letter) => letter.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
