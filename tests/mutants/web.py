"""Bugs in the page and the API: what comes in, what is logged."""

from mutants.mutant import Mutant

IMAGES, RED_TEAM = "web/test_images.py", "web/test_web_red_team.py"
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
]
