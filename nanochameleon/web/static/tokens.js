/** The token view: the conversation as the model sees it, one sequence of text, image and special tokens.
 *
 *  It asks the server after each turn, and only while it is on the screen. Hover, focus and tap show a token's details;
 *  arrow keys move from token to token; Escape closes. One listener serves all tokens.
 */

import { button, make } from "./elements.js";
import { postJson } from "./net.js";
import { detailsView, tokenDetails } from "./token_details.js";
import { grid, showImage, tokenBlocks } from "./token_list.js";
import { meter } from "./token_meter.js";

const DWELL = 150; // milliseconds before alternatives of an image token are decoded
const LEAVE = 200; // milliseconds before details close

export function tokenView(page, element) {
  const list = make("ol", { className: "tokens-list", "aria-label": "Tokens of the conversation" });
  const details = detailsView(list);
  const status = make("p", { className: "small quiet", role: "status" });
  const error = make("p", { className: "error", role: "alert" });
  const length = make("div", { className: "stack" });
  element.replaceChildren(about(), length, marking(list), status, error, list, details.element);

  const state = { answer: null, images: [], urls: new Map(), asked: 0, stale: true, busy: false, current: 0, hovered: null };

  // -------------------------------------------------------------------------------------------------------------------
  // The sequence

  /** Ask for the sequence, if it has changed and somebody can see it. */
  async function refresh() {
    if (!state.stale || state.busy || !element.checkVisibility()) return;
    state.stale = false;
    const asked = ++state.asked;
    const turns = page.turns();
    error.textContent = "";
    if (!turns.length) return show(null, "Nothing is said yet: the sequence appears with the first message.");
    status.textContent = "The model reads the conversation.";
    try {
      const body = { turns, mode: page.mode(), finished: page.finished?.() ?? true };
      const answer = await postJson("/api/tokens", body);
      if (asked === state.asked) show(answer, "");
      if (asked === state.asked) await decode(asked);
    } catch (failure) {
      if (asked !== state.asked) return;
      show(null, "");
      error.replaceChildren(failure.message, " ", button("Try again", changed, { className: "plain" }));
    }
  }

  function show(answer, sentence) {
    const focused = list.contains(document.activeElement);
    close();
    const folded = state.images.map((image) => image.folded);
    state.answer = answer;
    state.images = answer ? imagesOf(answer, state.urls).map((image, i) => ({ ...image, folded: folded[i] ?? false })) : [];
    status.textContent = sentence;
    length.replaceChildren(...(answer ? meter(answer) : []));
    list.replaceChildren(...(answer ? tokenBlocks(answer, state.images) : []));
    state.patches = new Map();
    makeCurrent(Math.min(state.current, (answer?.tokens.length ?? 1) - 1));
    if (focused) tokenAt(state.current)?.focus();
  }

  /** Get the images that are not known yet, and show them. */
  async function decode(asked) {
    const missing = state.images.filter(({ url }) => !url);
    if (!page.settings.model.can_draw || !missing.length) return;
    for (let i = 0; i < missing.length; i += 16) {
      const part = missing.slice(i, i + 16);
      const { urls } = await postJson("/api/images/decode", { codes: part.map(({ codes }) => codes) });
      if (asked !== state.asked) return;
      part.forEach((image, k) => {
        image.url = urls[k];
        state.urls.set(image.codes.join(), image.url);
        showImage(tokenAt(image.first).closest("li"), image);
      });
    }
    const used = new Set(state.images.map(({ codes }) => codes.join()));
    for (const key of state.urls.keys()) if (!used.has(key)) state.urls.delete(key);
  }

  function changed() {
    state.stale = true;
    refresh();
  }

  // -------------------------------------------------------------------------------------------------------------------
  // Details

  const tokenAt = (i) => list.querySelector(`[data-index="${i}"]`);
  const indexOf = (target) => (target.dataset?.index === undefined ? null : Number(target.dataset.index));

  /** Show the details of token i, and its place in its image. */
  async function open(i, anchor = tokenAt(i)) {
    const { answer } = state;
    close();
    state.hovered = i;
    tokenAt(i).classList.add("shown");
    tokenAt(i).setAttribute("aria-describedby", "token-details");
    const [number, y, x] = answer.tokens[i].image ?? [];
    if (number !== undefined) mark(number, y, x);
    details.show(anchor, tokenDetails(answer, i, state.patches.get(i) ?? {}));
    if (number === undefined || state.patches.has(i) || !page.settings.model.can_draw) return;
    await new Promise((resolve) => setTimeout(resolve, DWELL));
    if (state.hovered !== i || state.answer !== answer) return;
    const found = await patchesOf(answer, state.images[number], i).catch(() => ({})); // the codes' numbers stay
    if (state.answer !== answer) return;
    state.patches.set(i, found);
    if (state.hovered === i) details.show(anchor, tokenDetails(answer, i, found));
  }

  function close() {
    if (state.hovered === null) return;
    const token = tokenAt(state.hovered);
    token?.classList.remove("shown");
    token?.removeAttribute("aria-describedby");
    list.querySelectorAll(".mark").forEach((mark) => (mark.hidden = true));
    state.hovered = null;
    details.hide();
  }

  function mark(number, row, column) {
    const place = list.querySelector(`.whole[data-image="${number}"]`);
    const side = 100 / grid(state.images[number]);
    const sign = place.querySelector(".mark");
    Object.assign(sign.style, { left: `${column * side}%`, top: `${row * side}%`, width: `${side}%`, height: `${side}%` });
    sign.hidden = false;
  }

  /** The token under the pointer: a button, or a patch of a whole image. */
  function under({ target, clientX, clientY }) {
    const place = target.closest(".whole");
    if (!place) return target.closest("[data-index]") ? indexOf(target.closest("[data-index]")) : null;
    const image = state.images[place.dataset.image];
    const box = place.getBoundingClientRect();
    const at = (from, size, point) => Math.min(grid(image) - 1, Math.max(0, Math.floor(((point - from) / size) * grid(image))));
    return image.first + at(box.top, box.height, clientY) * grid(image) + at(box.left, box.width, clientX);
  }

  /** The pointer is elsewhere: back to the token that has the focus. */
  function leave() {
    const focused = list.contains(document.activeElement) ? indexOf(document.activeElement) : null;
    if (focused === null) close();
    else if (state.hovered !== null) open(focused);
  }

  // -------------------------------------------------------------------------------------------------------------------
  // Pointer and keys

  /** Make token i the one that Tab reaches. */
  function makeCurrent(i) {
    const before = tokenAt(state.current);
    if (before) before.tabIndex = -1;
    state.current = Math.max(0, i);
    const token = tokenAt(state.current);
    if (token) token.tabIndex = 0;
  }

  function fold(image) {
    image.folded = !image.folded;
    const block = list.querySelector(`.fold[data-image="${image.number}"]`).closest("li");
    block.querySelector(".patches").hidden = image.folded;
    block.querySelector(".fold").setAttribute("aria-expanded", String(!image.folded));
    close();
    if (block.querySelector(".patches").contains(tokenAt(state.current))) makeCurrent(nextShown(state.current, -1) ?? 0);
  }

  const isShown = (token) => !token.closest("[hidden]");

  /** The next token that is not folded away. */
  function nextShown(i, step) {
    const last = state.answer.tokens.length - 1;
    for (let k = i + step; k >= 0 && k <= last; k += step) if (isShown(tokenAt(k))) return k;
    return null;
  }

  /** The nearest token on the line above or below. */
  function nextLine(i, step) {
    const { left, width, top } = tokenAt(i).getBoundingClientRect();
    const middle = left + width / 2;
    let best = null;
    let line = null;
    for (let k = nextShown(i, step); k !== null; k = nextShown(k, step)) {
      const box = tokenAt(k).getBoundingClientRect();
      if (Math.abs(box.top - top) < 4) continue;
      line ??= box.top;
      if (Math.abs(box.top - line) >= 4) break;
      const distance = Math.abs(box.left + box.width / 2 - middle);
      if (!best || distance < best.distance) best = { k, distance };
    }
    return best?.k ?? null;
  }

  const MOVES = {
    ArrowRight: (i) => nextShown(i, 1),
    ArrowLeft: (i) => nextShown(i, -1),
    ArrowDown: (i) => nextLine(i, 1),
    ArrowUp: (i) => nextLine(i, -1),
    Home: () => nextShown(-1, 1),
    End: () => nextShown(state.answer.tokens.length, -1),
  };

  list.addEventListener("keydown", (event) => {
    const i = indexOf(event.target);
    if (event.key === "Escape" && state.hovered !== null) {
      event.stopPropagation(); // Escape elsewhere stops an answer
      return close();
    }
    if (i === null || !(event.key in MOVES) || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    tokenAt(MOVES[event.key](i) ?? i).focus();
  });
  list.addEventListener("focusin", ({ target }) => {
    const i = indexOf(target);
    if (i === null) return;
    makeCurrent(i);
    open(i);
  });
  list.addEventListener("focusout", close);
  list.addEventListener("click", (event) => {
    if (event.target.matches(".fold")) return fold(state.images[event.target.dataset.image]);
    const i = under(event);
    if (i !== null && isShown(tokenAt(i))) tokenAt(i).focus();
    if (i !== null) open(i, event.target.closest(".whole") ?? tokenAt(i));
  });
  list.addEventListener("pointermove", (event) => {
    const i = under(event);
    if (event.pointerType !== "touch" && i !== null && i !== state.hovered) open(i, event.target.closest(".whole") ?? tokenAt(i));
  });
  // The pointer may go on into the details; a moment passes while it crosses the gap
  for (const part of [list, details.element]) {
    part.addEventListener("pointerenter", () => clearTimeout(state.leaving));
    part.addEventListener("pointerleave", () => {
      clearTimeout(state.leaving);
      state.leaving = setTimeout(leave, LEAVE);
    });
  }

  page.on("turns", () => {
    state.stale = true;
    queueMicrotask(refresh); // after "busy", which follows a sent message at once
  });
  page.on("busy", () => {
    state.busy = true;
    status.textContent = "An answer is coming: the sequence follows when it is whole.";
  });
  page.on("idle", () => {
    state.busy = false;
    changed();
  });
  new IntersectionObserver(refresh).observe(element);
  refresh();
}

/** The images of a sequence, in order. first: the place of the first code in the sequence. */
function imagesOf({ tokens, pieces }, urls) {
  const images = [];
  tokens.forEach(({ id, image }, i) => {
    if (!image) return;
    const [number] = image;
    images[number] ??= { number, first: i, codes: [] };
    images[number].codes.push(pieces[id].code);
  });
  return images.map((image) => ({ ...image, url: urls.get(image.codes.join()) ?? null }));
}

/** Patches of token i and of those alternatives that are codes, by token id. */
async function patchesOf({ tokens, pieces }, { codes, first }, i) {
  const ids = [tokens[i].id, ...tokens[i].alternatives.map(([id]) => id)].filter((id) => pieces[id].kind === "image");
  const others = ids.map((id) => pieces[id].code);
  const { urls } = await postJson("/api/tokens/patches", { codes, place: i - first, alternatives: others });
  return Object.fromEntries(ids.map((id, k) => [id, urls[k]]));
}

function about() {
  const words = "What the model reads and writes is one sequence: text and images share a vocabulary. Probabilities are the model's own, given all tokens before: at temperature 1, without guidance, filters or grammar.";
  return make("p", { className: "small quiet" }, words);
}

/** The switch that marks how likely tokens are. */
function marking(list) {
  const box = make("input", { type: "checkbox", onchange: () => list.classList.toggle("marked", box.checked) });
  const words = " Mark probabilities: a bar under each token; a dashed frame where it is under 1%";
  return make("p", { className: "small" }, make("label", {}, box, words));
}
