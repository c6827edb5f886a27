"""The world of shapes as a source: captioned scenes and questions about them, endless, made on the fly."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from nanochameleon.data import FORMS, RawDocument, captioned, interleaved, question_answer
from nanochameleon.data.sources.questions import ASK_CAPTION, questions
from nanochameleon.data.sources.scenes import Scene, World, draw, draw_scene, source_seed


@dataclass(frozen=True)
class ShapesSource:
    """One split as documents of one form (data.Source): endless, document i a pure function of (seed, i)."""

    world: World
    form: str  # one of data.FORMS
    seed: int
    test: bool = False  # the split that no training image shows
    size = None  # endless
    FORMS = FORMS

    def scene(self, index: int) -> tuple[Scene, np.random.Generator]:
        seed = source_seed(self.seed, FORMS.index(self.form))
        return draw_scene(self.world, seed, index, test=self.test), np.random.default_rng((seed, index, 2))

    def document(self, index: int) -> RawDocument:
        """A document of this source's form; one of questions has up to 6 about its image."""
        if self.form == "interleaved":
            both = [self.scene(2 * index + i) for i in range(2)]
            return interleaved([(caption(scene, rng), draw(scene, self.world)) for scene, rng in both])
        scene, rng = self.scene(index)
        pixels = draw(scene, self.world)
        if self.form != "questions":
            return captioned(self.form, caption(scene, rng), pixels, rng)
        asked = questions(scene, self.world, rng)
        chosen = [asked[i] for i in rng.permutation(len(asked))[:5]] + [(ASK_CAPTION, scene.caption())]
        return question_answer(pixels, [chosen[i] for i in rng.permutation(len(chosen))])

    def captions(self, n: int) -> Iterator[str]:
        """n texts as the documents have them: captions, or questions and answers."""
        for index in range(n):
            scene, rng = self.scene(index)
            if self.form == "questions":
                yield from (text for qa in questions(scene, self.world, rng) for text in qa)
            else:
                yield caption(scene, rng)


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """The scene's caption; one in three does not mention the background."""
    return scene.caption(with_background=rng.random() < 2 / 3)
