"""Bugs in the API that OpenAI's clients use."""

from mutants.mutant import Mutant

REFUSALS, CLIENTS, MESSAGES = (f"web/test_openai_{name}.py" for name in ("refusals", "clients", "messages"))
STOPS = "web/test_stop_strings.py"
MUTANTS = [
    Mutant(
        "of two stop strings in one piece of text the later one counts",
        "web/openai/stop_strings.py",
        "min(ends)[1] if ends",
        "max(ends)[1] if ends",
        STOPS,
    ),
    Mutant(
        "the beginning of a stop string is sent before it is complete",
        "web/openai/stop_strings.py",
        "len(self.held) - self.n_open()",
        "len(self.held)",
        STOPS,
    ),
    Mutant(
        "two messages of one speaker look like two speakers",
        "web/openai/messages.py",
        "if spoken and spoken[-1][0] == speaker:",
        "if False:",
        MESSAGES,
    ),
    Mutant(
        "of two equal images the second is lost on its way back",
        "web/openai/chat.py",
        '"image": next(numbers)',
        '"image": images.index(part)',
        MESSAGES,
    ),
    Mutant(
        "a field that nobody knows is ignored in silence",
        "web/openai/fields.py",
        "if value not in values:",
        "if name in neutral and value not in values:",
        REFUSALS,
    ),
    Mutant(
        "a sample that a stop string ended writes to its end",
        "web/openai/samples.py",
        "async with aclosing(stream):",
        "if True:",
        CLIENTS,
    ),
]
