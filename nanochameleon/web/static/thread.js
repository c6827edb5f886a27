/** Shows the conversation: one list item a turn, changed in place as answers come. */

import { ASSISTANT, USER, chosen, placesRead, words } from "./conversation.js";
import { button, make } from "./elements.js";
import { showSegments } from "./segments.js";

const MODES = { draw: "drawn", answer: "answered", chat: "chat", text: "text", free: "text and images" };

/** actions: again(), edit(), remove(), choose(i), reuse(answer). Returns {update, element(place), showAnswer(answer)}. */
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
      if (list.children[place] !== element) list.insertBefore(element, list.children[place] ?? null);
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

function userView(turn) {
  const segments = make("div", { className: "segments" });
  const element = make("li", { className: "turn user" }, make("h3", { className: "unseen" }, "You"), segments);
  return {
    element,
    show({ isRead }) {
      showSegments(segments, turn.segments, "image in your message");
      element.classList.toggle("unread", !isRead);
    },
  };
}

function modelView(turn, actions) {
  const answers = make("div", { className: "answers", role: "group", "aria-label": "Answers" });
  const foot = make(
    "div",
    { className: "row foot" },
    button("Again", () => actions.again(), { className: "plain", title: "Answer again with another seed" }),
    button("Edit message", () => actions.edit(), { className: "plain" }),
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
    shown.forEach((answer) => {
      if (!cards.has(answer)) cards.set(answer, answerView(turn, answer, actions));
      answers.append(...(cards.get(answer).element.isConnected ? [] : [cards.get(answer).element]));
      showAnswer(answer);
    });
    answers.classList.toggle("several", !alone);
    foot.hidden = !isLast || busy;
  }

  return { element, show, showAnswer };
}

let groups = 0;

function answerView(turn, answer, actions) {
  turn.group ??= `answers-${++groups}`;
  const segments = make("div", { className: "segments" });
  const working = make("p", { className: "working" }, make("span", { className: "unseen" }, "The answer is coming"));
  const error = make("p", { className: "error", role: "alert" });
  const radio = make("input", { type: "radio", name: turn.group, onchange: () => actions.choose(turn, answer) });
  const choose = make("label", { className: "choose small" }, radio, " Continue with this one");
  const about = make("details", { className: "about small" });
  const element = make("div", { className: "answer" }, segments, working, error, choose, about);

  function show(answer, { about: message, alone, chosen: isChosen }) {
    const alt = message ? `image drawn for: ${message}` : "image drawn by the model";
    showSegments(segments, answer.segments, alt);
    working.hidden = answer.state !== "coming";
    error.textContent = answer.error ?? "";
    choose.hidden = alone;
    radio.checked = isChosen;
    about.hidden = answer.state === "coming";
    if (!about.hidden && !about.firstChild) about.append(...aboutAnswer(turn, answer, actions));
    element.classList.toggle("chosen", isChosen && !alone);
  }

  return { element, show };
}

/** How an answer was made, so that it can be made again. */
function aboutAnswer(turn, answer, actions) {
  const { asked, seed, sample, end, state } = answer;
  const mode = turn.mode ?? asked.mode;
  const parts = [MODES[mode] ?? mode, `seed ${seed}`];
  if (sample) parts.push(`sample ${sample}`);
  if (end) parts.push(`${end.new_tokens} tokens in ${end.seconds.toFixed(2)} s`);
  if (end?.reason === "length") parts.push("cut: no room was left");
  if (state === "stopped") parts.push("stopped");
  const rows = [["mode", asked.mode], ["seed", seed], ["sample", sample], ...Object.entries(asked.options)];
  const list = make("dl", {}, ...rows.flatMap(([name, value]) => [term(name), make("dd", {}, String(value))]));
  return [
    make("summary", {}, parts.join(" · ")),
    list,
    make("p", { className: "quiet" }, "Everything else is the model's own value."),
    button("Use these settings", () => actions.reuse(answer), { className: "plain" }),
  ];
}

const term = (name) => make("dt", {}, name.replaceAll("_", " "));
