/** The message that is being written: words and images in any order.
 *
 *  A list of parts, {area} for words or {image: {codes, url}}; the last is always for words. An image is read by the
 *  server first, and is shown as the model sees it.
 */

import { button, keepingFocus, make } from "./elements.js";
import { postBytes } from "./net.js";

/** Returns {segments(), fill(segments), add(files), focus(), ready(), showError(sentence)}.
 *
 *  imageBytes: the most of one file; fit() is crop or pad; send() follows Enter; lost() says that the server is gone.
 */
export function composerView(list, error, { imageBytes, fit, send, lost }) {
  let parts = [];
  let current = null; // the words where the caret is or was last

  function newWords(text = "") {
    const area = make("textarea", { rows: 1, value: text, spellcheck: true, dir: "auto" });
    const part = { area, element: make("li", { className: "part words" }, area) };
    area.addEventListener("input", () => update());
    area.addEventListener("focus", () => (current = part));
    area.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      send();
    });
    return part;
  }

  function newImage(image) {
    const shown = make("img", { width: 88, height: 88, alt: "", src: image?.url ?? "", hidden: !image?.url });
    const words = make("span", { className: "quiet small" }, image ? "image" : "reading …");
    return { image, shown, words, element: make("li", { className: "part image" }, shown, words) };
  }

  /** Drop empty words in the middle, join neighbours, keep words at the end; then show all. */
  function arrange() {
    const kept = [];
    for (const part of parts) {
      const before = kept.at(-1);
      if (part.area && before?.area) {
        part.area.value = joined(before.area.value, part.area.value);
        kept.pop();
      }
      if (part.area && part !== parts.at(-1) && !part.area.value.trim()) continue;
      kept.push(part);
    }
    if (!kept.at(-1)?.area) kept.push(newWords());
    parts = kept;
    list.replaceChildren(...parts.map((part) => part.element));
    if (!parts.includes(current)) current = parts.at(-1);
    update();
  }

  function update() {
    parts.forEach((part, i) => {
      const place = parts.length > 1 ? ` ${i + 1} of ${parts.length}` : "";
      if (part.area) {
        part.area.setAttribute("aria-label", `Message${place}`);
        part.area.placeholder = parts.length === 1 ? "Write words, add images" : "Words after it";
      } else {
        part.shown.alt = part.image ? `image in your message, part${place}` : "";
      }
      const written = part.image || part.area?.value.trim();
      showTools(part, place, i, parts.length > 1 && Boolean(written));
    });
    fitHeights(); // buttons make words narrower, and so higher
  }

  function fitHeights() {
    for (const { area } of parts.filter((part) => part.area)) {
      area.style.height = "auto";
      area.style.height = `${area.scrollHeight + 2}px`;
    }
  }

  function showTools(part, place, i, wanted) {
    const after = parts[i + 1];
    const isEnd = !after || (after.area && !after.area.value.trim());
    const state = `${place} ${isEnd} ${wanted}`;
    if (part.state === state) return; // typing leaves the buttons alone, and the focus on them
    part.state = state;
    part.tools?.remove();
    part.tools = null;
    if (!wanted) return;
    const kind = part.area ? "words" : "image";
    part.tools = make(
      "div",
      { className: "tools", role: "group", "aria-label": `Part${place}` },
      tool("↑", `Move ${kind} earlier, part${place}`, () => move(part, -1), i === 0),
      tool("↓", `Move ${kind} later, part${place}`, () => move(part, 1), isEnd),
      tool("✕", `Remove ${kind}, part${place}`, () => remove(part)),
    );
    part.element.append(part.tools);
  }

  function move(part, by) {
    const i = parts.indexOf(part);
    const nth = by < 0 ? 0 : 1;
    [parts[i], parts[i + by]] = [parts[i + by], parts[i]];
    arrange();
    const buttons = [...(part.tools?.children ?? [])];
    (buttons[nth]?.disabled === false ? buttons[nth] : (buttons[1 - nth] ?? current.area)).focus();
  }

  function remove(part) {
    const i = parts.indexOf(part);
    parts.splice(i, 1);
    arrange();
    const next = parts[Math.min(i, parts.length - 1)];
    (next.area ?? next.tools.lastChild).focus();
  }

  /** Add image files where the caret is. */
  async function add(files) {
    showError("");
    const { area } = current;
    const caret = area.selectionStart;
    const at = parts.indexOf(current);
    const before = newWords(area.value.slice(0, caret).trimEnd());
    area.value = area.value.slice(caret).trimStart();
    const images = [...files].map((file) => ({ ...newImage(), file }));
    parts.splice(at, 0, before, ...images);
    arrange();
    area.setSelectionRange(0, 0);
    focus();
    for (const part of images) part.reading = readImage(part);
    const problems = (await Promise.all(images.map((part) => part.reading))).filter(Boolean);
    if (problems.length) showError(problems.join(". "));
  }

  /** Returns a sentence where the image cannot be read. */
  async function readImage(part) {
    const { file } = part;
    const name = file.name || "pasted";
    try {
      if (file.size > imageBytes) throw new Error(`the image has more than ${imageBytes / 2 ** 20} MiB: use a smaller one`);
      part.image = await postBytes(`/api/images?fit=${fit()}`, file);
      part.shown.src = part.image.url;
      part.shown.hidden = false;
      part.words.textContent = "image";
      update();
    } catch (problem) {
      parts = parts.filter((other) => other !== part);
      keepingFocus(arrange, () => current.area);
      if (problem.status === 0) lost();
      return `${problem.message} (${name})`;
    }
  }

  /** Wait until every image is read. False: one of them could not be. */
  async function ready() {
    const reading = parts.filter((part) => part.file && !part.image);
    await Promise.all(reading.map((part) => part.reading));
    return reading.every((part) => part.image);
  }

  const segments = () =>
    parts
      .map((part) => (part.area ? { text: part.area.value.trim() } : part.image))
      .filter((segment) => segment && segment.text !== "");

  function fill(given) {
    parts = given.map((segment) => ("text" in segment ? newWords(segment.text) : newImage(segment)));
    arrange();
  }

  const showError = (sentence) => (error.textContent = sentence);
  const focus = () => current.area.focus();
  fill([]);
  // In the next frame: a change of heights inside the callback counts as an error.
  new ResizeObserver(() => requestAnimationFrame(fitHeights)).observe(list);
  return { segments, fill, add, focus, ready, showError };
}

const tool = (sign, label, onclick, disabled = false) =>
  button(sign, onclick, { className: "plain", "aria-label": label, title: label, disabled });

function joined(first, second) {
  return first.trim() && second.trim() ? `${first.trimEnd()} ${second.trimStart()}` : first + second;
}
