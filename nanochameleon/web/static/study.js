/** The page on which people judge answers: one question at a time, by keys or by clicks.
 *
 *  name -> next -> show -> choose -> vote -> show -> ... -> thanks
 *
 *  A vote's answer brings the next question, so a question is left only after its vote is on the server's disk.
 */

import { $, make } from "./elements.js";
import { postJson, getJson } from "./net.js";
import { stopwatch } from "./stopwatch.js";

const MOST_SECONDS = 600; // of one vote
const LONGEST_WAIT = 8000; // milliseconds between two tries

const urlOf = (image) => `/api/study/images/${image}`;
const nameInAddress = () => new URLSearchParams(location.hash.slice(1)).get("annotator");
const state = { annotator: "", screen: null, busy: false, watch: stopwatch(MOST_SECONDS) };

// ---------------------------------------------------------------------------------------------------------------------
// Showing

/** Show one of the three parts of the page. */
function show(part) {
  for (const id of ["start", "judging", "end"]) $(id).hidden = id !== part;
  $("so-far").hidden = $("who").hidden = part === "start";
}

/** Show what the server answered: the next question, or the end. */
function showScreen(screen) {
  const before = state.screen?.asked?.item;
  state.screen = screen;
  $("problem").textContent = "";
  $("note").textContent = screen.note ?? "";
  showProgress(screen.progress);
  show(screen.asked ? "judging" : "end");
  if (screen.asked) showAsked(screen.asked, screen.asked.item !== before);
  else showEnd(screen.progress.done);
  $("undo").disabled = !screen.undo;
  $("undo-last").hidden = !screen.undo;
  for (const image of screen.prefetch) new Image().src = urlOf(image);
  state.watch.restart();
}

function showProgress({ done, total }) {
  $("count").textContent = `${done} of ${total}`;
  Object.assign($("bar"), { max: Math.max(total, 1), value: done });
}

function showEnd(done) {
  $("end-text").textContent = done
    ? `You have answered all questions that are open to you. Your votes: ${done}.`
    : "There is no question that is open to you: other people have answered all of them.";
  $("end-title").focus();
}

function showAsked({ question, prompt, answers }, isNewItem) {
  if (isNewItem) {
    showParts($("prompt"), prompt, "Prompt");
    const titles = answers.length === 2 ? ["First answer", "Second answer"] : ["Answer"];
    $("answers").replaceChildren(...answers.map((segments, i) => answerPanel(segments, titles[i])));
  }
  $("question-text").textContent = question.text;
  $("labels").replaceChildren(...question.labels.map(choice));
  $("keys").textContent = `Keys: 1 to ${question.labels.length} choose, Enter confirms, u or Backspace undoes.`;
  if (isNewItem) {
    scrollTo(0, 0);
    $("prompt-title").focus({ preventScroll: true });
  } else {
    $("question-text").focus();
  }
}

function answerPanel(segments, title) {
  const content = make("div", { className: "segments" });
  showParts(content, segments, title);
  return make("article", { className: "panel", "aria-label": title }, make("h2", {}, title), content);
}

/** Text and images in order. The words for an image say where it is, and nothing else. */
function showParts(element, segments, whose) {
  let images = 0;
  const shown = segments.map((segment) =>
    "text" in segment
      ? make("p", { dir: "auto" }, segment.text)
      : imageOf(segment.image, `${whose}, image ${(images += 1)}`),
  );
  element.replaceChildren(...(shown.length ? shown : [make("p", { className: "quiet" }, "(nothing)")]));
}

function imageOf(name, alt) {
  const image = make("img", { alt, width: 512, height: 512, src: urlOf(name) });
  image.onerror = () => setTimeout(() => (image.src = urlOf(name)), 2000); // the server may be down
  return image;
}

function choice({ name, text }, i) {
  const radio = make("input", { type: "radio", name: "answer", value: name });
  return make("label", { className: "choice" }, radio, make("kbd", { "aria-hidden": "true" }, `${i + 1}`), text);
}

// ---------------------------------------------------------------------------------------------------------------------
// Asking the server

/** Send, and try again for as long as the server cannot answer. The same vote twice counts once. */
async function persist(path, body) {
  for (let wait = 500; ; wait = Math.min(2 * wait, LONGEST_WAIT)) {
    try {
      return await postJson(path, body);
    } catch (error) {
      if (error.status && error.status !== 429 && error.status < 500) throw error;
      $("problem").textContent = `${error.message}. Your choice is kept, and this page tries again by itself.`;
      await new Promise((resolve) => setTimeout(resolve, wait));
    }
  }
}

/** Carry out one request at a time, and show its answer. */
async function request(path, more = {}) {
  if (state.busy) return;
  state.busy = true;
  $("question").setAttribute("aria-busy", "true");
  try {
    showScreen(await persist(path, { annotator: state.annotator, ...more }));
  } catch (error) {
    $("problem").textContent = error.message;
  } finally {
    state.busy = false;
    $("question").setAttribute("aria-busy", "false");
  }
}

function vote() {
  const chosen = document.querySelector("input[name=answer]:checked");
  if (!chosen) {
    $("note").textContent = "Choose an answer first.";
    return;
  }
  const { item, question } = state.screen.asked;
  const seconds = state.watch.seconds();
  request("/api/study/vote", { item, question: question.name, answer: chosen.value, seconds });
}

function undo() {
  if (state.screen?.undo) request("/api/study/undo", state.screen.undo);
  else $("note").textContent = "There is nothing to undo.";
}

// ---------------------------------------------------------------------------------------------------------------------
// Keys and names

function onKey(event) {
  const typing = event.target.matches("input:not([type=radio])");
  if ($("start").hidden === false || typing || event.ctrlKey || event.altKey || event.metaKey) return;
  if (event.key === "Enter") onEnter(event);
  else if (event.repeat || state.busy) return;
  else if (event.key === "u" || event.key === "U" || event.key === "Backspace") undo();
  else choose(Number(event.key) - 1);
}

/** Enter confirms. On a button it presses the button, and in the form the browser submits by itself. */
function onEnter(event) {
  if (event.repeat) event.preventDefault(); // a key that is held down votes once
  else if (!event.target.matches("button, input") && !$("judging").hidden) vote();
}

function choose(place) {
  const radio = document.querySelectorAll("input[name=answer]")[place];
  if (!radio || $("judging").hidden) return;
  radio.checked = true;
  radio.focus();
  $("note").textContent = "";
}

async function begin(annotator) {
  state.annotator = annotator;
  $("name-shown").textContent = annotator;
  await request("/api/study/next");
  if (!state.screen) await askName();
  else if (state.screen.progress.done) $("note").textContent = "Welcome back: you resume where you left.";
}

async function askName() {
  show("start");
  $("name").focus();
  try {
    $("items").textContent = `Items of this study: ${(await getJson("/api/study")).items}.`;
  } catch (error) {
    $("problem").textContent = error.message;
  }
}

async function enter(event) {
  event.preventDefault();
  const annotator = $("name").value.trim();
  await begin(annotator);
  const fragment = new URLSearchParams({ annotator });
  $("name").setAttribute("aria-invalid", String(!state.screen));
  if (state.screen) history.replaceState(null, "", `#${fragment}`);
}

$("enter").addEventListener("submit", enter);
$("question").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!state.busy) vote();
});
$("undo").addEventListener("click", undo);
$("undo-last").addEventListener("click", undo);
$("leave").addEventListener("click", () => (location.hash = ""));
addEventListener("keydown", onKey);
addEventListener("hashchange", () => location.reload()); // another name
if (nameInAddress()) begin(nameInAddress());
else askName();
