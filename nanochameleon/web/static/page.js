/** The Talk page: joins its parts.
 *
 *  Parts in other files get the object `page`:
 *    page.settings           what GET /api/settings answered
 *    page.turns()            the turns that the model reads, as the server takes them
 *    page.mode()             the mode that is set
 *    page.options()          the options of sampling that are set
 *    page.turnElement(i)     the element of page.turns()[i]
 *    page.on(name, callback) "turns": a turn was added, changed or removed; "busy", "idle": an answer begins, ends
 */

import { generate, newAnswer } from "./answers.js";
import { composerView } from "./composer.js";
import { ASSISTANT, USER, chosen, placesRead, tokensUsed, turnsRead, words } from "./conversation.js";
import { keepingFocus, make } from "./elements.js";
import { getJson } from "./net.js";
import { announce, notice } from "./notices.js";
import { settingsView } from "./settings.js";
import { threadView } from "./thread.js";

const $ = (id) => document.getElementById(id);

/** The object that parts in other files get, and emit(name) for those here. */
function makePage(settings, state) {
  const listeners = { turns: [], busy: [], idle: [] };
  const page = {
    settings,
    turns: () => turnsRead(state.turns),
    mode: () => state.values().mode ?? "auto",
    options: () => optionsOf(state.values()),
    turnElement: (i) => state.thread.element(state.turns[placesRead(state.turns)[i]]),
    on: (name, callback) => listeners[name].push(callback),
  };
  return { page, emit: (name) => listeners[name].forEach((callback) => callback()) };
}

function optionsOf(values) {
  const names = ["temperature", "top_p", "guidance_scale", "max_new_tokens"];
  return Object.fromEntries(names.filter((name) => name in values).map((name) => [name, values[name]]));
}

async function start() {
  const settings = await getJson("/api/settings");
  const { model } = settings;
  $("model").textContent = model.name;
  const state = { turns: [], values: () => ({}), stopping: null };
  const { page, emit } = makePage(settings, state);
  const composer = composerView($("parts"), $("composer-error"), {
    changed: () => {},
    fit: () => state.values().fit ?? "crop",
    onEnter: send,
  });
  state.thread = threadView($("thread"), { again, edit, remove, choose, reuse: () => {} });
  const view = settingsView($("settings"), settings, (values) => (state.values = () => values));

  /** Change the turns; the page shows them and the other parts hear of it. */
  function change(turns) {
    state.turns = turns;
    show();
    emit("turns");
  }

  function show() {
    const busy = state.stopping !== null;
    const inPlace = () => {
      state.thread.update(state.turns, busy);
      $("send").hidden = busy;
      $("stop").hidden = !busy;
      $("lesson").hidden = state.turns.length > 0;
    };
    keepingFocus(() => following(inPlace), () => (busy ? $("stop") : $("parts").lastChild.firstChild)); // prettier-ignore
    const used = tokensUsed(state.turns);
    $("context").textContent = used === null ? `context ${model.context}` : `${used} of ${model.context} tokens`;
  }

  async function send() {
    if (state.stopping || !(await composer.ready())) return;
    const segments = composer.segments();
    if (!segments.length) return composer.focus();
    composer.fill([]);
    composer.focus();
    change([...state.turns, { role: USER, segments }, { role: ASSISTANT, answers: [], chosen: 0 }]);
    scrollTo(0, document.documentElement.scrollHeight);
    await answer();
  }

  /** Get new answers for the last turn. */
  async function answer() {
    const { mode = "auto", seed = Math.floor(Math.random() * 2 ** 31), samples = 1 } = state.values();
    const asked = { mode, options: page.options() };
    const turn = state.turns.at(-1);
    const answers = Array.from({ length: samples }, (_, sample) => newAnswer(seed, sample, asked));
    const turns = turnsRead(state.turns.slice(0, -1));
    turn.chosen = turn.answers.length;
    turn.answers.push(...answers);
    state.stopping = new AbortController();
    show();
    emit("busy");
    const update = (answer) => following(() => state.thread.showAnswer(turn, answer));
    turn.mode = (await generate(turns, asked, answers, model.codes_per_image, state.stopping.signal, update)) ?? turn.mode;
    state.stopping = null;
    change([...state.turns]);
    emit("idle");
    announce(spoken(chosen(turn)));
  }

  function again() {
    answer();
  }

  function edit() {
    const { segments } = state.turns.at(-2);
    change(state.turns.slice(0, -2));
    composer.fill([...segments, ...composer.segments()]);
    composer.focus();
  }

  function remove() {
    const before = state.turns;
    change(before.slice(0, -2));
    notice("The message and its answers were removed.", ["Undo", () => change(before)]);
  }

  function choose(turn, answer) {
    turn.chosen = turn.answers.indexOf(answer);
    change([...state.turns]);
  }

  $("composer").addEventListener("submit", (event) => (event.preventDefault(), send()));
  $("stop").addEventListener("click", () => state.stopping?.abort());
  addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !$("settings").open) state.stopping?.abort();
  });
  $("add-image").addEventListener("click", () => $("image-file").click());
  $("image-file").addEventListener("change", ({ target }) => {
    composer.add([...target.files]);
    target.value = "";
  });
  $("show-settings").addEventListener("click", () => $("settings").showModal());
  $("skip").addEventListener("click", () => composer.focus());
  joinTokens(page);
  if (settings.red_team) (await import("./red_team.js")).redTeam(page, shownAs($("red-team")));
  show();
  composer.focus();
}

const shownAs = (element) => Object.assign(element, { hidden: false });

/** The switch of the token view, which is loaded when it is first wanted. */
function joinTokens(page) {
  let joined = false;
  $("show-tokens").addEventListener("click", async ({ currentTarget }) => {
    const on = currentTarget.getAttribute("aria-pressed") !== "true";
    currentTarget.setAttribute("aria-pressed", String(on));
    $("tokens").hidden = !on;
    if (on && !joined) {
      joined = true;
      document.head.append(make("link", { rel: "stylesheet", href: "/static/tokens.css" }));
      (await import("./tokens.js")).tokenView(page, $("token-view"));
    }
  });
}

/** Carry out a change; where the reader was at the bottom, stay there. */
function following(change) {
  const root = document.documentElement;
  const atBottom = root.scrollHeight - innerHeight - scrollY < 60;
  change();
  if (atBottom) scrollTo(0, root.scrollHeight);
}

/** What a screen reader says of a finished answer. */
function spoken(answer) {
  if (answer.error) return "";
  const images = answer.segments.filter((segment) => "codes" in segment).length;
  return [words(answer.segments, 2000), images ? `${images} image${images > 1 ? "s" : ""}` : ""].filter(Boolean).join("; ");
}

start();
