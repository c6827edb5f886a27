/** The token view: the conversation as the model sees it, one sequence of text, image and special tokens.
 *
 *  It asks the server after each turn, and only while it is on the screen. Hover, focus and tap show a token's details;
 *  arrow keys move from token to token; Escape closes. A few listeners serve all tokens.
 */

import { button, make } from "./elements.js";
import { decodeImages } from "./images.js";
import { postJson } from "./net.js";
import { detailsView } from "./token_details.js";
import { codeAt, imagesOf, markPatch, patchesOf, showImage } from "./token_images.js";
import { tokenList } from "./token_list.js";
import { meter } from "./token_meter.js";
import { MOVES, nextShown } from "./token_moves.js";

const DWELL = 150; // milliseconds before patches of alternatives are asked for
const LEAVE = 200; // milliseconds in which the pointer may cross from a token to its details
const EMPTY = { answer: null, images: [], buttons: [], patches: new Map() };

export function tokenView(page, element) {
  const list = make("ol", { className: "token-list", "aria-label": "Tokens of the conversation" });
  const length = make("div", { className: "stack" });
  const status = make("p", { className: "small quiet", role: "status" });
  const error = make("p", { className: "error", role: "alert" });
  const details = detailsView(list);
  element.replaceChildren(about(), length, marking(list), status, error, list, details.element);

  const sheet = new CSSStyleSheet(); // of the images' patches
  document.adoptedStyleSheets.push(sheet);

  let view = EMPTY; // of one sequence: its answer, images, buttons, and patches by token
  let current = 0; // the token that Tab reaches
  let shown = null; // the token whose details are shown
  const asking = { stale: true, busy: false, leaving: 0 };

  // -------------------------------------------------------------------------------------------------------------------
  // The sequence

  /** Ask for the sequence if it has changed and somebody can see it. */
  async function refresh() {
    if (!asking.stale || asking.busy || !element.checkVisibility()) return;
    asking.stale = false;
    const turns = page.turns();
    if (!turns.length) return show(null, "Nothing is said yet: the sequence appears with the first message.");
    status.textContent = "The model reads the conversation.";
    try {
      const answer = await postJson("/api/tokens", { turns, mode: page.mode(), stop: page.stop() });
      if (asking.stale || asking.busy) return refresh(); // the conversation has changed meanwhile
      show(answer, "");
      if (page.settings.model.can_draw) await decodeImages(view.images, shownIn(view));
    } catch (failure) {
      show(null, "");
      error.replaceChildren(failure.message, " ", button("Try again", changed, { className: "plain" }));
    }
  }

  function changed() {
    asking.stale = true;
    refresh();
  }

  /** Show an answer of /api/tokens, or nothing, and a sentence. */
  function show(answer, sentence) {
    const held = list.contains(document.activeElement);
    close();
    const images = answer ? imagesOf(answer, view.images) : [];
    const { blocks, buttons } = answer ? tokenList(answer, images) : { blocks: [], buttons: [] };
    view = { answer, images, buttons, patches: new Map() };
    sheet.replaceSync("");
    list.replaceChildren(...blocks);
    length.replaceChildren(...(answer ? meter(answer) : []));
    images.filter(({ url }) => url).forEach(shownIn(view));
    status.textContent = sentence;
    error.replaceChildren();
    makeCurrent(Math.min(current, buttons.length - 1));
    if (held) buttons[current]?.focus();
  }

  /** Shows a decoded image, unless another sequence has come. */
  const shownIn = (of) => (image) => of === view && showImage(blockOf(image), image, sheet);
  const blockOf = ({ first }) => view.buttons[first].closest("li");

  // -------------------------------------------------------------------------------------------------------------------
  // Details

  /** Show the details of token i next to an element, and its place in its image. */
  async function open(i, anchor = view.buttons[i]) {
    unmark();
    shown = i;
    view.buttons[i].classList.add("shown");
    view.buttons[i].setAttribute("aria-describedby", details.element.id);
    details.show(anchor, view.answer, i, view.patches.get(i));
    const place = view.answer.tokens[i].image;
    if (!place) return;
    const [number] = place;
    markPatch(blockOf(view.images[number]), view.images[number], place);
    await addPatches(view, i, view.images[number], anchor);
  }

  /** After a moment, show how the alternatives of an image token would look. */
  async function addPatches(of, i, image, anchor) {
    if (of.patches.has(i) || !image.url) return;
    await new Promise((resolve) => setTimeout(resolve, DWELL));
    if (shown !== i || of !== view) return;
    of.patches.set(i, await patchesOf(of.answer, image, i).catch(() => ({}))); // without them, codes are numbers
    if (shown === i && of === view) details.show(anchor, of.answer, i, of.patches.get(i));
  }

  function close() {
    unmark();
    details.hide();
  }

  function unmark() {
    if (shown === null) return;
    const token = view.buttons[shown];
    const place = view.answer.tokens[shown].image;
    token.classList.remove("shown");
    token.removeAttribute("aria-describedby");
    if (place) markPatch(blockOf(view.images[place[0]]), view.images[place[0]]);
    shown = null;
  }

  /** The pointer has left: back to the token that has the focus. */
  function leave() {
    const focused = list.contains(document.activeElement) ? indexOf(document.activeElement) : null;
    if (focused === null) close();
    else if (shown !== null) open(focused);
  }

  // -------------------------------------------------------------------------------------------------------------------
  // Pointer and keys

  const indexOf = (target) => (target.dataset.index === undefined ? null : Number(target.dataset.index));

  /** [token, element to show its details at] under the pointer, or []. */
  function under(event) {
    const whole = event.target.closest(".whole");
    if (whole) return [codeAt(whole, view.images[whole.dataset.image], event), whole];
    const token = event.target.closest("[data-index]");
    return token ? [indexOf(token), token] : [];
  }

  /** Make token i the one that Tab reaches. */
  function makeCurrent(i) {
    if (view.buttons[current]) view.buttons[current].tabIndex = -1;
    current = Math.max(0, i);
    if (view.buttons[current]) view.buttons[current].tabIndex = 0;
  }

  function fold(toggle) {
    const image = view.images[toggle.dataset.image];
    image.folded = !image.folded;
    blockOf(image).querySelector(".patches").hidden = image.folded;
    toggle.setAttribute("aria-expanded", String(!image.folded));
    if (view.buttons[current].closest("[hidden]")) makeCurrent(nextShown(view.buttons, current, -1) ?? nextShown(view.buttons, current, 1));
  }

  list.addEventListener("keydown", (event) => {
    const i = indexOf(event.target);
    if (i === null || !(event.key in MOVES) || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    view.buttons[MOVES[event.key](view.buttons, i) ?? i].focus();
  });
  list.addEventListener("focusin", ({ target }) => {
    const i = indexOf(target);
    if (i === null) return;
    makeCurrent(i);
    open(i);
  });
  list.addEventListener("focusout", close);
  list.addEventListener("click", (event) => {
    if (event.target.matches(".fold")) return fold(event.target);
    const [i, anchor] = under(event);
    if (i === undefined) return;
    view.buttons[i].focus(); // not in every browser does a click
    open(i, anchor);
  });
  list.addEventListener("pointermove", (event) => {
    const [i, anchor] = under(event);
    if (event.pointerType !== "touch" && i !== undefined && i !== shown) open(i, anchor);
  });
  for (const part of [list, details.element]) {
    part.addEventListener("pointerenter", () => clearTimeout(asking.leaving));
    part.addEventListener("pointerleave", () => (asking.leaving = setTimeout(leave, LEAVE)));
  }
  addEventListener("scroll", details.follow, { capture: true, passive: true });
  addEventListener("resize", details.follow);
  addEventListener(
    "keydown",
    (event) => {
      if (event.key !== "Escape" || shown === null) return;
      event.stopPropagation(); // Escape elsewhere stops an answer
      close();
    },
    { capture: true },
  );

  page.on("turns", () => {
    asking.stale = true;
    queueMicrotask(refresh); // "busy" follows a sent message at once
  });
  page.on("busy", () => {
    asking.busy = true;
    status.textContent = "An answer is coming: the sequence follows when it is whole.";
  });
  page.on("idle", () => {
    asking.busy = false;
    changed();
  });
  new IntersectionObserver(refresh).observe(element);
}

function about() {
  const words =
    "Text and images are one sequence of tokens from one vocabulary. Probabilities are the model's own, given all tokens before: at temperature 1, without guidance, filters or grammar."; // prettier-ignore
  return make("p", { className: "small quiet" }, words);
}

/** The switch that marks how likely tokens are. */
function marking(list) {
  const box = make("input", { type: "checkbox", onchange: () => list.classList.toggle("marked", box.checked) });
  const words = " Mark probabilities: a bar under each token, a dashed frame where it is under 1%";
  return make("p", { className: "small" }, make("label", {}, box, words));
}
