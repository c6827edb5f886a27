/** Builds the list of a sequence's tokens: one block for each turn's words, one for each image.
 *
 *  Every token is one button with data-index, its place in the sequence. No handlers are here: tokens.js has them all.
 */

import { make } from "./elements.js";

/** Return the blocks of the list. images: [{codes, url, first, folded}], by number; url is null where none can be shown. */
export function tokenBlocks({ tokens, pieces, characters }, images) {
  const whole = new Map(characters.map(({ last, text }) => [last, text]));
  const inside = new Set(characters.flatMap(({ first, last }) => range(first, last)));
  const blocks = [];
  let block = null;
  tokens.forEach((token, i) => {
    const piece = pieces[token.id];
    if (piece.name === "<boi>" && images.find(({ first }) => first === i + 1)) block = null;
    if (!block) blocks.push((block = newBlock(images.find(({ first }) => first === i + 1))));
    block.tokens.append(tokenButton(i, token, piece, { whole: whole.get(i), inside: inside.has(i) }));
    if (piece.name === "<eot>" || piece.name === "<eoi>") block = null;
  });
  return blocks.map(({ element }) => element);
}

const range = (first, last) => Array.from({ length: last - first }, (_, i) => first + i);

function newBlock(image) {
  if (!image) {
    const element = make("li", { className: "words" });
    return { element, tokens: element };
  }
  const tokens = make("div", { className: "patches", hidden: image.folded });
  const element = make("li", { className: "drawn" }, imageHead(image), imagePlace(image), tokens);
  element.style.setProperty("--grid", grid(image));
  showImage(element, image);
  return { element, tokens };
}

export const grid = ({ codes }) => Math.round(Math.sqrt(codes.length));

function imageHead(image) {
  const label = `Image ${image.number + 1}: ${image.codes.length} codes`;
  const fold = make("button", { type: "button", className: "plain fold", "aria-expanded": String(!image.folded) }, label);
  fold.dataset.image = image.number;
  return fold;
}

/** The whole image, and the mark of one patch in it. */
function imagePlace(image) {
  const picture = make("img", { alt: `Image ${image.number + 1}, decoded`, width: 160, height: 160 });
  const place = make("div", { className: "whole", hidden: !image.url }, picture, make("span", { className: "mark", hidden: true }));
  place.dataset.image = image.number;
  return place;
}

/** Give a block its decoded image: one property, which every patch crops. */
export function showImage(block, { url }) {
  const place = block.querySelector(".whole");
  place.hidden = !url;
  block.classList.toggle("decoded", Boolean(url));
  if (!url) return;
  place.querySelector("img").src = url;
  block.style.setProperty("--decoded", `url("${url}")`);
}

function tokenButton(i, token, piece, character) {
  const button = make("button", { type: "button", tabIndex: -1, className: `token ${piece.kind}-token` });
  button.dataset.index = i;
  if (token.probability !== null) button.style.setProperty("--p", token.probability);
  if (token.probability !== null && token.probability < UNLIKELY) button.classList.add("unlikely");
  if (token.image) {
    const [number, row, column] = token.image;
    button.setAttribute("aria-label", `code ${piece.code}, image ${number + 1}, row ${row + 1}, column ${column + 1}`);
    button.style.setProperty("--row", row);
    button.style.setProperty("--column", column);
  }
  button.append(...label(piece, character.whole));
  button.classList.toggle("inside", character.inside);
  return button;
}

export const UNLIKELY = 0.01;

/** What a token shows. whole: the character that its bytes complete. */
export function label(piece, whole) {
  if (piece.kind === "special") return [piece.name];
  if (piece.kind === "image") return [make("span", { className: "code" }, String(piece.code))];
  if ("bytes" in piece) return [piece.bytes, ...(whole ? [make("b", {}, ` ${visible(whole)}`)] : [])];
  if (piece.text === "") return [make("i", {}, "nothing")];
  return piece.text.split(/([ \n\r\t])/u).filter(Boolean).map((part) => SPACES[part]?.() ?? visible(part)); // prettier-ignore
}

/** Spaces keep their character; style sheets draw the sign over it. */
const sign = (text, name) => () => make("span", { className: `sign ${name}` }, text, make("span", { className: "unseen" }, name));
const SPACES = {
  " ": sign(" ", "space"),
  "\n": sign("", "newline"),
  "\r": sign("", "return"),
  "\t": sign("", "tab"),
};

/** Characters that nobody could see, by their number. */
const visible = (text) =>
  text.replace(/[\p{C}\p{Z}]|^\p{M}/gu, (letter) =>
    letter === " " ? letter : `U+${letter.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`,
  );
