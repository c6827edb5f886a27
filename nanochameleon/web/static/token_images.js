/** Images in the token view: the codes that the sequence holds, the images that they decode to, patches of alternatives.
 *
 *  image: {number, first, codes, grid, url, folded}; first is the place of its first code in the sequence, grid its side.
 */

import { make } from "./elements.js";
import { postJson } from "./net.js";

/** Return the images of a sequence, in order. before: those of the last sequence, whose urls and folds are kept. */
export function imagesOf({ tokens, pieces }, before) {
  const codes = [];
  const first = [];
  tokens.forEach(({ id, image }, i) => {
    if (!image) return;
    const [number] = image;
    first[number] ??= i;
    (codes[number] ??= []).push(pieces[id].code);
  });
  const urls = new Map(before.map((image) => [image.codes.join(), image.url]));
  return codes.map((of, number) => ({
    number,
    codes: of,
    first: first[number],
    grid: Math.round(Math.sqrt(of.length)),
    url: urls.get(of.join()) ?? null,
    folded: before[number]?.folded ?? false,
  }));
}

/** Get the patches of token i and of its alternatives that are codes: {token id: url}. */
export async function patchesOf({ tokens, pieces }, { codes, first }, i) {
  const all = [tokens[i].id, ...tokens[i].alternatives.map(([id]) => id)];
  const ids = all.filter((id) => pieces[id].kind === "image");
  const body = { codes, place: i - first, alternatives: ids.map((id) => pieces[id].code) };
  const { urls } = await postJson("/api/tokens/patches", body);
  return Object.fromEntries(ids.map((id, k) => [id, urls[k]]));
}

/** The parts of an image's block before its patches: the button that folds them, and the whole image with its mark. */
export function imageParts({ number, codes, folded }) {
  const words = `Image ${number + 1}: ${codes.length} codes`;
  const fold = make("button", { type: "button", className: "plain fold", "aria-expanded": String(!folded) }, words);
  const decoded = make("img", { alt: `image ${number + 1}, decoded`, width: 160, height: 160 });
  const whole = make("div", { className: "whole", hidden: true }, decoded, make("span", { className: "mark" }));
  fold.dataset.image = whole.dataset.image = number;
  return [fold, whole];
}

/** Show an image's url in its block. Its patches crop it by one rule of `sheet`, since a thousand copies of the url in
 *  as many styles take seconds. */
export function showImage(block, { number, url }, sheet) {
  const whole = block.querySelector(".whole");
  whole.hidden = false;
  whole.firstChild.src = url;
  block.classList.add("decoded");
  const rule = sheet.cssRules[sheet.insertRule(`#token-view .drawn[data-image="${number}"] .image-token {}`)];
  rule.style.backgroundImage = `url("${url}")`;
}

/** Mark a patch in the whole image; without a patch, remove the mark. */
export function markPatch(block, { grid }, [, row, column] = []) {
  const mark = block.querySelector(".mark");
  const part = (n) => `${(100 * n) / grid}%`;
  mark.classList.toggle("on", row !== undefined);
  if (row !== undefined) Object.assign(mark.style, { left: part(column), top: part(row), width: part(1), height: part(1) });
}

/** The place in the sequence of the code under a point of the whole image. */
export function codeAt(whole, { first, grid }, { clientX, clientY }) {
  const box = whole.getBoundingClientRect();
  const at = (part) => Math.min(grid - 1, Math.max(0, Math.floor(part * grid)));
  return first + at((clientY - box.top) / box.height) * grid + at((clientX - box.left) / box.width);
}
