/** The Talk page: joins its parts.
 *
 *  Parts in other files get the object `page`:
 *    page.settings           what GET /api/settings answered
 *    page.turns()            the turns that the model reads, as the server takes them
 *    page.mode()             the mode that is set
 *    page.options()          the options of sampling that are set
 *    page.turnElement(i)     the element of page.turns()[i]
 *    page.answer(i)          the answer that page.turns()[i] is (conversation.js); undefined for the user's turns
 *    page.stop()             the name of the stop token that ends the last turn; null where none does
 *    page.on(name, callback) "turns": a turn was added, changed or removed; "busy", "idle": an answer begins, ends
 */

import { composerView } from "./composer.js";
import { chosen, placesRead, tokensUsed, turnsRead } from "./conversation.js";
import { dropAndPaste } from "./drop.js";
import { $, keepingFocus, make } from "./elements.js";
import { showExamples } from "./examples.js";
import { keep, openFile, restored, saveFile } from "./files.js";
import { getJson } from "./net.js";
import { notice } from "./notices.js";
import { following, keepFocusInSight, toEnd } from "./scrolling.js";
import { serverWatch } from "./server.js";
import { settingsView } from "./settings.js";
import { makeTalk } from "./talk.js";
import { threadView } from "./thread.js";

const root = document.documentElement;

async function start() {
  try {
    const settings = await getJson("/api/settings");
    const redTeam = settings.red_team && (await import("./red_team.js")).redTeam;
    build(settings, await restored(settings), redTeam);
  } catch (error) {
    if (error.status === 0) serverWatch($("banner"), start)();
    else $("banner").textContent = error.message;
    if (!("status" in error)) throw error;
  }
}

/** Build all parts at once, so that nothing can be sent before what was kept is shown. */
function build(settings, kept, redTeam) {
  const { model } = settings;
  const lost = serverWatch($("banner"), () => lookAgain(model).catch(() => lost()));
  const composer = composerView($("parts"), $("composer-error"), {
    imageBytes: settings.limits.image_bytes,
    fit: () => setting.values().fit ?? "crop",
    send: () => talk.send(),
    lost,
  });
  const setting = settingsView($("settings"), settings, (summary) => ($("set").textContent = summary));
  const { page, emit } = makePage(settings, setting, () => ({ talk, thread }));
  const showAnswer = (turn, answer) => thread.showAnswer(turn, answer);
  const talk = makeTalk({ settings, composer, setting, changed, emit, lost, showAnswer });
  const thread = threadView($("thread"), { ...talk.actions, reuse: (answer) => setting.apply(valuesOf(answer)) });

  let isLeaving = false; // an answer that breaks off because the page is left is no failure
  addEventListener("pageshow", () => (isLeaving = false));
  addEventListener("pagehide", () => {
    keepInTab();
    isLeaving = true;
  });

  function changed() {
    const change = () => (talk.turns.length ? following(show) : show()); // an empty page is read from its top
    keepingFocus(change, () => (talk.isBusy ? $("stop") : composer));
    emit("turns");
    keepInTab();
  }

  function keepInTab() {
    if (!isLeaving) keep(talk.turns, composer.segments(), settings);
  }

  function show() {
    thread.update(talk.turns, talk.isBusy);
    $("send").hidden = talk.isBusy;
    $("stop").hidden = !talk.isBusy;
    $("lesson").hidden = talk.turns.length > 0;
    for (const id of ["new", "open", "save"]) $(id).disabled = talk.isBusy;
    showContext(tokensUsed(talk.turns), model.context);
  }

  $("model").textContent = model.name;
  root.dataset.pixels = model.resolution <= 128 ? "few" : "many";
  showExamples($("lesson"), settings, (example) => {
    setting.apply({ ...setting.values(), mode: example.mode ?? "auto" });
    composer.fill([{ text: example.messages[0] }]);
    talk.next = example.messages.slice(1);
    talk.send();
  });
  joinFiles(talk, composer, setting, settings);
  joinControls(talk, composer);
  joinTokens(page);
  if (redTeam) {
    $("red-team").hidden = false;
    addStyle("red_team.css");
    redTeam(page, $("red-team"));
  }
  for (const element of document.querySelectorAll("[inert]")) element.inert = false; // it was until all listen
  composer.fill(kept.draft);
  talk.replace(kept.turns);
  keepFocusInSight(document.querySelector(".top"), $("composer"));
  if (kept.turns.length) toEnd();
  composer.focus();
}

/** The object that parts in other files get, and emit(name), which calls those that listen. */
function makePage(settings, setting, parts) {
  const turn = (i) => parts().talk.turns[placesRead(parts().talk.turns).at(i)];
  const listeners = { turns: [], busy: [], idle: [] };
  const page = {
    settings,
    turns: () => turnsRead(parts().talk.turns),
    mode: setting.mode,
    options: setting.options,
    turnElement: (i) => parts().thread.element(turn(i)),
    answer: (i) => turn(i).answers && chosen(turn(i)),
    stop: () => (turn(-1)?.answers && chosen(turn(-1)).end?.stop) ?? null,
    on: (name, callback) => listeners[name].push(callback),
  };
  return { page, emit: (name) => listeners[name].forEach((callback) => callback()) };
}

/** The settings that make an answer again. */
const valuesOf = ({ asked, seed, sample }) => ({ mode: asked.mode, ...asked.options, seed, samples: sample + 1 });

function showContext(used, context) {
  const isNearlyFull = used > context * 0.9;
  const most = `${context.toLocaleString("en")} tokens`;
  const words = used === null ? `room for ${most}` : `${used.toLocaleString("en")} of ${most}`;
  $("context").textContent = isNearlyFull ? `${words}: nearly full` : words;
  $("context").classList.toggle("nearly-full", isNearlyFull);
}

function joinControls(talk, composer) {
  $("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    talk.send();
  });
  $("stop").addEventListener("click", talk.stop);
  addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !event.defaultPrevented && !$("settings").open) talk.stop();
  });
  $("add-image").addEventListener("click", () => $("image-file").click());
  $("image-file").addEventListener("change", ({ target }) => {
    composer.add([...target.files]);
    target.value = "";
  });
  $("show-settings").addEventListener("click", () => $("settings").showModal());
  $("skip").addEventListener("click", composer.focus);
  dropAndPaste($("drop"), composer.add);
}

function joinFiles(talk, composer, setting, settings) {
  $("new").addEventListener("click", () => {
    talk.next = [];
    if (talk.turns.length) talk.replaceWithUndo([], "A new conversation begins.");
    composer.focus();
  });
  $("save").addEventListener("click", () => saveFile(talk.turns, settings, setting.values()));
  $("open").addEventListener("click", () => $("open-file").click());
  $("open-file").addEventListener("change", async ({ target }) => {
    const [file] = target.files;
    target.value = "";
    try {
      const { turns, values, isOther } = await openFile(file, settings);
      if (talk.isBusy) throw new Error("An answer is coming: open the file when it is whole.");
      const warning = isOther ? " It was saved with another model, so its images may look different." : "";
      const before = { ...setting.values() };
      talk.replaceWithUndo(turns, `Opened ${file.name}.${warning}`, () => setting.apply(before));
      setting.apply(values);
    } catch (error) {
      notice(error.message);
    }
  });
}

const addStyle = (name) => document.head.append(make("link", { rel: "stylesheet", href: `/static/${name}` }));

/** The switch of the token view, which is loaded when it is first wanted. */
function joinTokens(page) {
  let isJoined = false;
  $("show-tokens").addEventListener("click", async ({ currentTarget }) => {
    const isOn = currentTarget.getAttribute("aria-pressed") !== "true";
    currentTarget.setAttribute("aria-pressed", String(isOn));
    following(() => {
      $("tokens").hidden = !isOn;
      document.body.classList.toggle("with-tokens", isOn); // :has() would look at every token again when one changes
    });
    if (!isOn || isJoined) return;
    isJoined = true;
    addStyle("tokens.css");
    (await import("./tokens.js")).tokenView(page, $("token-view"));
  });
}

/** The server is back: is it the same model's? */
async function lookAgain(before) {
  const { model } = await getJson("/api/settings");
  const isSame = JSON.stringify(model) === JSON.stringify(before);
  if (isSame) notice("The server is back.");
  else $("banner").textContent = `The server now has another model (${model.name}): load this page again.`;
}

start();
