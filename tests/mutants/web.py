"""Bugs in the page and the API: what comes in, what is logged."""

from mutants.mutant import Mutant

IMAGES, RED_TEAM = "web/test_images.py", "web/test_web_red_team.py"
TOKENS = "web/test_tokens.py"
MUTANTS = [
    Mutant(
        "a data URL is decoded whatever its size",
        "web/images.py",
        "if len(url) - len(head) - 1 > most:",
        "if False:",
        IMAGES,
    ),
    Mutant(
        "a decoder's own words reach the client",
        "web/images.py",
        "raise Refused(str(error) if cause is None else UNREADABLE) from None",
        "raise Refused(str(error)) from None",
        IMAGES,
    ),
    Mutant(
        "every upload is taken in, however many there are",
        "web/uploads.py",
        "if self.n >= self.most:",
        "if False:",
        IMAGES,
    ),
    Mutant(
        "a failed log keeps the images",
        "web/red_team.py",
        "if find(path, conversation.id) is None:",
        "if find(path, conversation.id) is not None:",
        RED_TEAM,
    ),
    Mutant(
        "another conversation under the same id is thrown away without a word",
        "web/red_team.py",
        "same = logged == red_team.row_of(conversation)",
        "same = True",
        RED_TEAM,
    ),
    Mutant(
        "half a line stays where the disk is full",
        "evaluate/harm/labels.py",
        "            file.truncate(size)\n        raise",
        "            pass\n        raise",
        f"{RED_TEAM} evaluate/test_red_team.py",
    ),
    Mutant(
        "a token's probability is the one given itself",
        "web/tokens.py",
        "hidden = run.model(read[None])[0, :-1]",
        "hidden = run.model(read[None])[0, 1:]",
        TOKENS,
    ),
    Mutant(
        "a token is its own alternative",
        "web/tokens.py",
        "best = log_probs.scatter(1, targets[:, None], -torch.inf).topk(N_ALTERNATIVES)",
        "best = log_probs.topk(N_ALTERNATIVES)",
        TOKENS,
    ),
    Mutant(
        "a character goes on after a special token",
        "web/tokens.py",
        "if not (data and utf8.getstate()[0]):",
        "if not utf8.getstate()[0]:",
        TOKENS,
    ),
    Mutant(
        "a patch is cut where the whole image would have it",
        "web/tokens.py",
        "y, x = (row - top) * size, (column - left) * size",
        "y, x = row * size, column * size",
        TOKENS,
    ),
]
