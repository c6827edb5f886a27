"""Bugs in the Talk page: what it sends, opens and keeps."""

from mutants.mutant import Mutant

SETTINGS, FILES, COMPOSER, SIGHT = (
    f"web/test_page_{name}.py" for name in ("settings", "files", "composer", "sight")
)  # each in a real browser
MUTANTS = [
    Mutant(
        "the address sets a number out of range",
        "web/static/settings.js",
        "return field.test(value) ? value : undefined;",
        "return value;",
        SETTINGS,
    ),
    Mutant(
        "what is set is not sent",
        "web/static/talk.js",
        "const asked = { mode: setting.mode(), options: setting.options() };",
        "const asked = { mode: setting.mode(), options: {} };",
        SETTINGS,
    ),
    Mutant(
        "a file's codes are not checked",
        "web/static/saving.js",
        "check(segment.codes.length === model.codes_per_image && segment.codes.every(isCode), damaged);",
        "",
        FILES,
    ),
    Mutant(
        "images of another model are opened",
        "web/static/saving.js",
        "check(fits, `the images of",
        "check(true, `the images of",
        FILES,
    ),
    Mutant(
        "an image goes to the end of the message",
        "web/static/composer.js",
        "const caret = area.selectionStart;",
        "const caret = area.value.length;",
        COMPOSER,
    ),
    Mutant(
        "a message leaves before its images are read",
        "web/static/talk.js",
        "if (talk.isBusy || !(await composer.ready()) || talk.isBusy) return;",
        "if (talk.isBusy) return;",
        COMPOSER,
    ),
    Mutant(
        "a message that was refused is offered to be sent again",
        "web/static/thread.js",
        'retry.hidden = state !== "failed" || isRefused;',
        'retry.hidden = state !== "failed";',
        SIGHT,
    ),
    Mutant(
        "words are cut where buttons make them narrower",
        "web/static/composer.js",
        "requestAnimationFrame(fitHeights)",
        "requestAnimationFrame(() => {})",
        SIGHT,
    ),
]
