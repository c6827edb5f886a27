/** What may be set: the mode, the numbers of sampling, and how images are cut. The address keeps it after the #.
 *
 *  What is left empty is the model's own value, which the placeholder shows.
 */

import { button, make } from "./elements.js";

const number = (words, test) => ({ words: `a number ${words}`, test });
const POSITIVE = number("of 0 or more, such as 0.7", (x) => x >= 0);
const whole = (low, high) => ({
  words: `a whole number from ${low} to ${high.toLocaleString("en")}`,
  test: (x) => Number.isInteger(x) && x >= low && x <= high,
  isWhole: true,
});
const FITS = [
  ["crop", "Keep the middle, as for training images."],
  ["pad", "Keep all of it and add a white border, as the paper does for prompts."],
];

/** The fields, from what GET /api/settings answered. */
function fieldsOf({ model, modes, defaults, limits }) {
  const both = (name) => {
    const [text, image] = [defaults[name], defaults[`image_${name}`]];
    return text === image || !model.can_draw ? `${text}` : `${text}; images ${image}`;
  };
  const fields = [
    { name: "mode", label: "Mode", choices: modes.map((mode) => [mode, helpOfMode(mode, model.aligned)]) },
    {
      name: "temperature",
      label: "Temperature",
      ...POSITIVE,
      placeholder: both("temperature"),
      help: "Higher is more surprising; 0 takes the likeliest token at each step.",
    },
    {
      name: "top_p",
      label: "Top-p",
      ...number("above 0 and at most 1, such as 0.9", (x) => x > 0 && x <= 1),
      placeholder: both("top_p"),
      help: "Samples from the smallest set of tokens that holds this probability.",
    },
    {
      name: "guidance_scale",
      label: "Guidance",
      ...POSITIVE,
      placeholder: `${defaults.guidance_scale}`,
      help: "How closely an image follows the prompt; 1 is off.",
    },
    {
      name: "max_new_tokens",
      label: "Length",
      ...whole(1, model.context),
      placeholder: `${Math.min(defaults.max_new_tokens, model.context)}`,
      help: "The most tokens of an answer.",
    },
    {
      name: "samples",
      label: "Answers",
      ...whole(1, limits.samples),
      placeholder: "1",
      help: "Several are shown next to one another; one is chosen to continue with.",
    },
    {
      name: "seed",
      label: "Seed",
      ...whole(0, Math.min(limits.seed, Number.MAX_SAFE_INTEGER)),
      placeholder: "a new one each time",
      help: "The same seed and settings give the same answer.",
    },
    { name: "fit", label: "Images that are not square", short: "images", choices: FITS },
  ];
  return fields.filter(({ name }) => name !== "guidance_scale" || model.can_draw);
}

function helpOfMode(mode, aligned) {
  const auto = aligned
    ? "Chat, since this model is aligned."
    : "Draw after words alone; answer where words follow an image, or end with ? after an earlier one; " +
      "say what is in an image that comes last.";
  const helps = {
    auto,
    draw: "Reads the last message; draws one image.",
    answer: "Reads the last image and all that was said after it; writes text.",
    chat: "Reads every turn; writes text and draws images.",
    text: "Reads every turn as one document; continues it with text.",
    free: "Reads every turn as one document; continues it with text and images.",
  };
  return helps[mode] ?? "";
}

/** The value that a text means for a field; undefined where it has none. */
function valueOf(field, text) {
  if (field.choices) return field.choices.some(([name]) => name === text) ? text : undefined;
  const form = field.isWhole ? /^\d{1,16}$/ : /^(\d{1,16}[.,]?\d{0,16}|[.,]\d{1,16})(e-\d{1,2})?$/;
  const value = form.test(text) ? Number(text.replace(",", ".")) : NaN; // some keyboards have no other decimal sign
  return field.test(value) ? value : undefined;
}

const OPTIONS = ["temperature", "top_p", "guidance_scale", "max_new_tokens"];

/** Build the dialog. changed(summary) is called after each change, with what is set in a few words.
 *
 *  Returns {values(), mode(), options(), apply(values)}; values holds what is set, of the right type.
 */
export function settingsView(dialog, settings, changed) {
  const fields = fieldsOf(settings);
  const values = {};
  const views = fields.map((field) => (field.choices ? choiceView : numberView)(field, set));

  function set(name, value) {
    const first = fields.find((field) => field.name === name).choices?.[0][0];
    if (value === undefined || value === first) delete values[name];
    else values[name] = value;
    keepInAddress(values);
    changed(summary());
  }

  function summary() {
    const set = fields.filter(({ name }) => name in values);
    const words = set.map(({ name, label, short = label }) => `${short.toLowerCase()} ${values[name]}`);
    return words.join(" · ").replace(/^mode /, "");
  }

  /** Take the values that are right; forget the others. */
  function apply(given) {
    fields.forEach((field, i) => {
      const value = Object.hasOwn(given, field.name) ? valueOf(field, String(given[field.name])) : undefined;
      views[i].show(value);
      set(field.name, value);
    });
  }

  const title = make("h2", { id: "settings-title" }, "Settings");
  const reset = button("Reset", () => apply({}), { className: "plain" });
  const close = button("Close", () => dialog.close(), { className: "main" });
  const words = "Left empty, a value is the model's own. The address of this page keeps what is set.";
  dialog.append(
    make("div", { className: "row head" }, title, reset, close),
    make("p", { className: "quiet small" }, words),
    ...views.map((view) => view.element),
  );
  const fromAddress = () => apply(Object.fromEntries(new URLSearchParams(location.hash.slice(1))));
  addEventListener("hashchange", fromAddress);
  fromAddress();
  return {
    values: () => values,
    mode: () => values.mode ?? "auto",
    options: () => Object.fromEntries(OPTIONS.filter((name) => name in values).map((name) => [name, values[name]])),
    apply,
  };
}

function keepInAddress(values) {
  const hash = new URLSearchParams(values).toString();
  const address = hash ? `#${hash}` : location.pathname + location.search;
  if (hash !== location.hash.slice(1)) history.replaceState(null, "", address);
}

function choiceView(field, set) {
  const lines = field.choices.map(([name, help]) => {
    const id = `set-${field.name}-${name}`;
    const radio = make("input", {
      type: "radio",
      name: field.name,
      value: name,
      onchange: () => set(field.name, name),
      "aria-labelledby": id,
      "aria-describedby": `${id}-help`,
    });
    const words = [make("span", { id }, name), make("span", { id: `${id}-help`, className: "help" }, help)];
    return make("label", { className: "choice" }, radio, make("span", {}, ...words));
  });
  const element = make("fieldset", { className: "choices" }, make("legend", {}, field.label), ...lines);
  const radios = lines.map((line) => line.firstChild);
  const show = (value = field.choices[0][0]) => radios.forEach((radio) => (radio.checked = radio.value === value));
  return { element, show };
}

function numberView(field, set) {
  const id = `set-${field.name}`;
  const error = make("p", { className: "help wrong", id: `${id}-error`, role: "alert" });
  const input = make("input", {
    id,
    type: "text",
    inputMode: field.isWhole ? "numeric" : "decimal",
    autocomplete: "off",
    placeholder: field.placeholder,
    oninput: check,
    "aria-describedby": `${id}-help ${id}-error`,
  });
  const label = make("label", { htmlFor: id }, field.label);
  const help = make("p", { className: "help", id: `${id}-help` }, field.help);
  const element = make("div", { className: "field" }, label, input, help, error);

  function check() {
    const text = input.value.trim();
    const value = valueOf(field, text);
    const wrong = text !== "" && value === undefined;
    input.setAttribute("aria-invalid", String(wrong));
    error.textContent = wrong ? `${field.label} must be ${field.words}. Until then it is not set.` : "";
    set(field.name, value);
  }

  function show(value) {
    input.value = value ?? "";
    input.setAttribute("aria-invalid", "false");
    error.textContent = "";
  }

  return { element, show };
}
