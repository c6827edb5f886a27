"""A model that answers every request with the same words, whatever a test wants to see on the page.

monkeypatch.setattr("nanochameleon.web.batch.Engine", scripted_engine(run, "<b>hello</b>"))
"""

from nanochameleon.generation.engine import Engine
from nanochameleon.generation.request import RequestOutput
from nanochameleon.training.run import Run


def scripted_engine(run: Run, words: str) -> type[Engine]:
    tokens = (*run.tokenizer.encode(words), run.vocab.eot)

    class ScriptedEngine(Engine):
        def step(self) -> list[RequestOutput]:
            outputs = [RequestOutput(request_id, tokens, True) for request_id, _ in self.waiting]
            self.waiting.clear()
            return outputs

    return ScriptedEngine
