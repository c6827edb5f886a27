/** Shows the conversation: one list item a turn, changed in place as answers come. */

import { ASSISTANT, USER, chosen, placesRead, words } from "./conversation.js";
import { button, make } from "./elements.js";
import { showSegments } from "./segments.js";

const MODES = { draw: "drawn", answer: "answered", chat: "chat", text: "text", free: "text and images" };

/** actions: again(), retry(), edit(), remove(), choose(turn, answer), reuse(answer).
 *
 *  Returns {update(turns, busy), element(turn), showAnswer(turn, answer)}.
 */
export function threadView(list, actions) {
  const views = new Map(); // turn -> its view

  /** Make the list as `turns` are. busy: an answer is coming. */
  function update(turns, busy) {
    const read = new Set(placesRead(turns));
    for (const [turn, view] of views) {
      if (turns.includes(turn)) continue;
      view.element.remove();
      views.delete(turn);
    }
    turns.forEach((turn, place) => {
      if (!views.has(turn)) views.set(turn, turn.role === USER ? userView(turn) : modelView(turn, actions));
      const { element, show } = views.get(turn);
      putAt(list, place, element);
      const about = turn.role === ASSISTANT ? words(turns[place - 1]?.segments ?? []) : "";
      show({ about, isLast: place === turns.length - 1, busy, isRead: read.has(place) });
    });
  }

  return {
    update,
    element: (turn) => views.get(turn)?.element,
    showAnswer: (turn, answer) => views.get(turn)?.showAnswer(answer),
  };
}

/** Make an element the child at a place, unless it is. */
function putAt(parent, place, element) {
  if (parent.children[place] !== element) parent.insertBefore(element, parent.children[place] ?? null);
}

function userView(turn) {
  const segments = make("div", { className: "segments" });
  const unread = make("p", { className: "quiet small" }, "Not part of what the model reads: it has no answer.");
  const element = make("li", { className: "turn user" }, make("h3", { className: "unseen" }, "You"), segments, unread);
  return {
    element,
    show({ isRead }) {
      showSegments(segments, turn.segments, "image in your message");
      unread.hidden = isRead;
    },
  };
}

function modelView(turn, actions) {
  const answers = make("div", { className: "answers" });
  const again = button("Again", () => actions.again(), { className: "plain", title: "Answer again with another seed" });
  const retry = button("Send again", () => actions.retry());
  const edit = button("Edit message", () => actions.edit());
  const foot = make(
    "div",
    { className: "row foot" },
    again,
    retry,
    edit,
    button("Remove", () => actions.remove(), { className: "plain", title: "Remove this message and its answers" }),
  );
  const element = make("li", { className: "turn model" }, make("h3", { className: "unseen" }, "Model"), answers, foot);
  const cards = new Map();
  let about = "";
  let alone = true;

  const showAnswer = (answer) => cards.get(answer)?.show(answer, { about, alone, chosen: answer === chosen(turn) });

  function show({ about: message, isLast, busy }) {
    about = message;
    alone = turn.answers.length === 1 || !isLast;
    const shown = isLast ? turn.answers : [chosen(turn)];
    for (const [answer, card] of cards) {
      if (shown.includes(answer)) continue;
      card.element.remove();
      cards.delete(answer);
    }
    shown.filter(Boolean).forEach((answer, place) => {
      if (!cards.has(answer)) cards.set(answer, answerView(turn, answer, actions));
      putAt(answers, place, cards.get(answer).element);
      showAnswer(answer);
    });
    answers.classList.toggle("several", !alone);
    const { state, isRefused = false } = chosen(turn) ?? {};
    again.hidden = state === "failed";
    retry.hidden = state !== "failed" || isRefused;
    edit.classList.toggle("plain", !isRefused);
    foot.hidden = !isLast;
    foot.classList.toggle("waiting", busy);
  }

  return { element, show, showAnswer };
}

let groups = 0;

function answerView(turn, answer, actions) {
  turn.group ??= `answers-${++groups}`;
  const segments = make("div", { className: "segments" });
  const dots = [1, 2, 3].map(() => make("i", { "aria-hidden": "true" }));
  const coming = make("span", { className: "unseen" }, "The answer is coming");
  const working = make("p", { className: "working" }, coming, ...dots);
  const empty = make("p", { className: "quiet" }, "The answer is empty.");
  const error = make("p", { className: "error", role: "alert" });
  const radio = make("input", { type: "radio", name: turn.group, onchange: () => actions.choose(turn, answer) });
  const choose = make("label", { className: "choose small" }, radio, " Continue here");
  const about = make("details", { className: "about small" });
  const name = `Answer ${turn.answers.indexOf(answer) + 1}`;
  const element = make(
    "div",
    { className: "answer", role: "group", "aria-label": name },
    segments,
    working,
    empty,
    error,
    about,
    choose,
  );

  function show(answer, { about: message, alone, chosen: isChosen }) {
    const alt = message ? `image drawn for: ${message}` : "image drawn by the model";
    showSegments(segments, answer.segments, alt);
    working.hidden = answer.state !== "coming";
    empty.hidden = answer.state !== "ended" || answer.segments.length > 0;
    error.textContent = answer.error ?? "";
    choose.hidden = alone;
    radio.checked = isChosen;
    about.hidden = answer.state === "coming";
    if (!about.hidden && !about.firstChild) about.append(...aboutAnswer(answer, actions));
    element.classList.toggle("chosen", isChosen && !alone);
  }

  return { element, show };
}

/** How an answer was made, so that it can be made again. */
function aboutAnswer(answer, actions) {
  const { asked, mode, seed, sample, end, state } = answer;
  const cut = end?.reason === "length" ? ["cut at its length"] : [];
  const head = [MODES[mode] ?? mode ?? asked.mode, `seed ${seed}`, ...(sample ? [`sample ${sample}`] : []), ...cut];
  if (state === "stopped") head.push("stopped");
  const rows = [["mode", asked.mode], ["seed", seed], ["sample", sample], ...Object.entries(asked.options)];
  if (end) rows.push(["tokens", end.new_tokens], ["seconds", end.seconds]);
  const list = rows.flatMap(([name, value]) => [make("dt", {}, name.replaceAll("_", " ")), make("dd", {}, `${value}`)]);
  return [
    make("summary", {}, head.join(" · ")),
    make("dl", {}, ...list),
    make("p", {}, "All else is the model's own."),
    button("Use these settings", () => actions.reuse(answer), { className: "plain" }),
  ];
}
