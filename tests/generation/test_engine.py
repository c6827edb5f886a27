"""Generation: cache, batch, branches of guidance and looks all against one plain loop; what comes out is valid."""

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import N_CODES, TOKENIZER, VOCAB, random_task, tiny_model

from nanochameleon.config import SamplingParams
from nanochameleon.documents import EndOfTurn, Image, Text, parse, render
from nanochameleon.errors import UserError
from nanochameleon.generation.decoder import uniforms
from nanochameleon.generation.engine import Engine, generate, stream
from nanochameleon.generation.events import End, ImageStarted, PartialImage, Reader
from nanochameleon.generation.sampling import MODES, Grammar, Options, filtered, pick

# float64, so that rounding, which differs from one shape of a batch to another, decides nothing
MODEL, GROUPED = tiny_model().double(), tiny_model(1, n_heads=4, n_kv_heads=2, norm_order="post").double()
SINGLE = tiny_model()  # MODEL in float32, the path that a CPU takes
with torch.no_grad():  # so that all often begin an image where they may
    for model in (MODEL, GROUPED, SINGLE):
        model.output.weight[VOCAB.boi] *= 6
OPTIONS = SamplingParams(
    temperature=1.3, top_p=0.95, repetition_penalty=1.1, image_temperature=1.0,
    guidance_scale=1.0, image_guidance_scale=1.0,
    max_new_tokens=16,
)  # fmt: skip

images = st.lists(st.integers(0, 7), min_size=N_CODES, max_size=N_CODES).map(lambda codes: Image(tuple(codes)))
documents = st.lists(st.sampled_from([Text("a red"), Text("ta"), EndOfTurn()]) | images, max_size=3)


@st.composite
def prompts(draw) -> list[int]:
    """Any document, or one that ends inside an image after 0 to n codes."""
    ids = render(draw(documents), TOKENIZER, VOCAB, end=False)
    if draw(st.booleans()):
        ids += [VOCAB.boi, *(VOCAB.code_to_token(c) for c in draw(st.lists(st.integers(0, 7), max_size=N_CODES)))]
    return ids


batches = st.lists(prompts(), min_size=1, max_size=4)


@st.composite
def all_options(draw) -> SamplingParams:
    shares, scales = st.sampled_from([0.3, 0.9, 1.0]), st.sampled_from([0.0, 1.0, 1.2, 3.0])
    most, least = st.sampled_from([None, 1, 5]), st.sampled_from([0.0, 0.05])
    heat = st.sampled_from([0.0, 0.7, 1.3, 100.0])
    return SamplingParams(
        draw(heat), draw(shares), draw(most), draw(least), draw(st.sampled_from([1.0, 1.2, 0.8])),
        draw(heat), draw(shares), draw(most), draw(least), draw(scales), draw(scales), draw(st.integers(6, 40)),
    )  # fmt: skip


stop_ids = st.sampled_from([None, (VOCAB.eos, VOCAB.eot)])
tasks = st.tuples(prompts(), all_options(), st.sampled_from(MODES), stop_ids)


# ---------------------------------------------------------------------------------------------------------------------
# Against a plain loop


def plain_guided(model, ids, options) -> torch.Tensor:
    """Logits of the next code: the published formula on three whole sequences."""
    last = len(ids) - 1 - ids[::-1].index(VOCAB.boi)
    seen = ids, [t for t in ids if t == VOCAB.bos or 4 <= t <= VOCAB.boi], [VOCAB.bos, *ids[last:]]
    full, image, nothing = (model.logits(model(torch.tensor([some]))[0, -1]) for some in seen)
    return nothing + options.image_guidance_scale * (image - nothing) + options.guidance_scale * (full - image)


@torch.no_grad()
def plain(model, prompt, options, mode, seed, stops=None) -> list[int]:
    """One sample, no cache, no batch, no branches kept: every step runs the whole sequences."""
    room = min(options.max_new_tokens, model.cfg.max_seq_len - len(prompt))
    start = max((i for i, token in enumerate(prompt) if token == VOCAB.boi), default=-1)
    begun = start >= 0 and VOCAB.eoi not in prompt[start:]
    left = N_CODES + 1 - (len(prompt) - start) if begun else -1
    grammar = Grammar.start(VOCAB, N_CODES, [mode], [left], [room], [stops])
    numbers, row, new = uniforms(seed, room), Options.of([options], torch.device("cpu")), []
    while not grammar.done[0]:
        ids, is_code = [*prompt, *new], int(grammar.left) > 0
        if is_code:
            logits = plain_guided(model, ids, options)
        else:
            logits = model.logits(model(torch.tensor([ids]))[0, -1])
            for token in set(ids):
                logits[token] *= 1 / options.repetition_penalty if logits[token] > 0 else options.repetition_penalty
        logits = logits[None].masked_fill(~grammar.allowed(), -torch.inf)
        if (options.image_temperature if is_code else options.temperature) == 0:
            new.append(int(logits.argmax()))
        else:
            new.append(int(pick(filtered(logits, row, torch.tensor([is_code])), numbers[None, len(new)])))
        grammar = grammar.after(torch.tensor(new[-1:]))
    return new


def room_for(task):
    """A task whose mode leaves room for an image."""
    prompt, options, mode, stops = task
    return prompt, replace(options, max_new_tokens=max(options.max_new_tokens, N_CODES + 2)), mode, stops


@settings(max_examples=15)
@given(st.lists(tasks.map(room_for), min_size=1, max_size=6), st.integers(3, 9), st.integers(1, 40), st.integers(0, 99))
def test_any_mixture_that_comes_and_goes_equals_plain_loops(tasks, n_rows, chunk, seed):
    """Every row with a modality, length, stop, seed and options of its own; new ones join a running batch."""
    model = GROUPED if seed % 2 else MODEL
    engine = Engine(model, VOCAB, N_CODES, n_rows, chunk=chunk, look=seed % 5 or None)
    queue, new = list(enumerate(tasks)), {}
    order, joining = {}, random.Random(seed)
    while queue or engine.waiting or engine.running:
        while queue and joining.random() < 0.6:
            number, (prompt, options, mode, stops) = queue.pop()
            order[engine.add(prompt, options, mode, (seed, number), stops)] = number
        for news in engine.step():
            new.setdefault(order[news.handle], []).extend(news.ids)
    for number, (prompt, options, mode, stops) in enumerate(tasks):
        assert new[number] == plain(model, prompt, options, mode, (seed, number), stops)
    assert engine.n_live == 0 and not engine.prompts


@pytest.mark.parametrize("model", [MODEL, SINGLE], ids=["double", "single"])
def test_so_does_it_where_guided_images_begin_between_words(model):
    rows = [[VOCAB.bos, VOCAB.first_text + i] for i in range(6)]
    options = replace(
        OPTIONS, guidance_scale=2.5, image_guidance_scale=-2.0, max_new_tokens=40
    )  # far from 1, where mistakes show
    together = generate(model, rows, VOCAB, N_CODES, options, "both", 1)
    begun = {i for row in together for i, token in enumerate(row) if token == VOCAB.boi}
    assert len(begun) > 5 and max(begun) > 10
    assert together == [plain(model, row, options, "both", (1, i)) for i, row in enumerate(rows)]


@settings(max_examples=15)
@given(batches, st.integers(0, 99), st.integers(1, 3))
def test_a_row_is_the_same_alone_and_in_any_batch(rows, seed, batch_size):
    together = generate(MODEL, rows, VOCAB, N_CODES, OPTIONS, seed=seed)
    assert generate(MODEL, rows, VOCAB, N_CODES, OPTIONS, seed=seed, batch_size=batch_size) == together


def test_a_row_is_the_same_alone_and_in_a_batch_in_the_numbers_that_models_have():
    rows = [[VOCAB.bos, *range(VOCAB.first_text, VOCAB.first_text + i)] for i in range(20)]
    options = replace(OPTIONS, max_new_tokens=20, guidance_scale=2.0)
    together = generate(SINGLE, rows, VOCAB, N_CODES, options, seed=5)
    for size in (3, 17):
        assert generate(SINGLE, rows, VOCAB, N_CODES, options, seed=5, batch_size=size) == together
    assert len({tuple(row) for row in together}) > 15


# ---------------------------------------------------------------------------------------------------------------------
# What is shared, and what is not looked at


def counted(monkeypatch, name):
    """Calls of a method of Decoder, by their arguments."""
    from nanochameleon.generation.decoder import Decoder

    calls, method = [], getattr(Decoder, name)
    monkeypatch.setattr(Decoder, name, lambda self, *args: calls.append(args) or method(self, *args))
    return calls


def test_one_prompt_is_read_once_for_its_samples_and_their_branches(monkeypatch):
    calls = counted(monkeypatch, "prefill")
    prompt = [VOCAB.bos, *TOKENIZER.encode("a red"), VOCAB.boi]
    generate(
        MODEL, [prompt] * 5, VOCAB, N_CODES, replace(OPTIONS, guidance_scale=3.0, image_guidance_scale=1.2), "image"
    )
    read = [list(ids) for (parts,) in calls for ids, *_ in parts]
    assert sorted(read) == sorted([prompt, [VOCAB.bos, VOCAB.boi]])


def test_a_long_prompt_is_read_in_chunks_between_steps_of_others(monkeypatch):
    read, looks = counted(monkeypatch, "prefill"), counted(monkeypatch, "look")
    engine = Engine(MODEL, VOCAB, N_CODES, 2, chunk=8)
    engine.add([VOCAB.bos], replace(OPTIONS, temperature=0.0, max_new_tokens=40), "text")
    engine.step()
    engine.add([VOCAB.bos] * 30, OPTIONS, "text")
    before = len(looks)
    while len(read) < 5:
        engine.step()
    parts = [(len(ids), start) for (parts,) in read[1:] for ids, _, start in parts]
    assert parts == [(8, 0), (8, 8), (8, 16), (6, 24)]
    assert len(looks) - before >= 4


def test_the_host_does_not_look_inside_an_image(monkeypatch):
    looks = counted(monkeypatch, "look")
    prompt = [VOCAB.bos, VOCAB.boi]
    generate(MODEL, [prompt, [*prompt, VOCAB.first_code]], VOCAB, N_CODES, OPTIONS, "image")
    assert [steps for _, steps in looks] == [N_CODES, 1]  # the second image's end, then the first one's


def test_no_logits_but_those_that_may_come(monkeypatch):
    chosen = counted(monkeypatch, "logits")
    generate(MODEL, [[VOCAB.bos, VOCAB.boi]], VOCAB, N_CODES, OPTIONS, "image")
    assert {columns for _, columns in chosen} == {"image"}
    chosen.clear()
    generate(MODEL, [[VOCAB.bos]], VOCAB, N_CODES, OPTIONS, "text")
    assert {columns for _, columns in chosen} == {"text"}


def test_steps_stay_in_place_and_their_keys_are_few(monkeypatch):
    """What a CUDA graph needs: nothing that a step reads or writes ever moves, and few shapes."""
    engine = Engine(MODEL, VOCAB, N_CODES, 6)
    decoder = engine.decoder
    state = [
        *decoder.row_tensors(),
        decoder.sample,
        decoder.log,
        decoder.tick,
        decoder.cache.keys,
        decoder.cache.values,
    ]
    for seed in range(12):
        engine.add([VOCAB.bos], replace(OPTIONS, guidance_scale=2.0, max_new_tokens=30), "both", (seed,))
    list(engine.run())
    engine.add([VOCAB.bos, VOCAB.boi], OPTIONS, "image")
    list(engine.run())
    now = [*decoder.row_tensors(), decoder.sample, decoder.log, decoder.tick, decoder.cache.keys, decoder.cache.values]
    assert [x.data_ptr() for x in now] == [x.data_ptr() for x in state]
    spans, columns = ({key[i] for key in engine.graphs.graphs} for i in (1, 2))
    assert spans == {64} and columns == {"text", "image", "all"}
    engine.graphs.on = True
    assert [engine.graphs.size(n, 6) for n in range(1, 7)] == [1, 2, 4, 4, 6, 6]


# ---------------------------------------------------------------------------------------------------------------------
# Guidance


@settings(max_examples=15)
@given(batches, st.integers(0, 99))
def test_scales_of_1_are_no_guidance(rows, seed):
    """With branches beside it, too: guidance 1 after images, where image_guidance_scale is another number, has them."""
    new = generate(MODEL, rows, VOCAB, N_CODES, replace(OPTIONS, max_new_tokens=40), seed=seed)
    nearly = replace(OPTIONS, guidance_scale=1 + 1e-12, image_guidance_scale=1 - 1e-12, max_new_tokens=40)
    assert generate(MODEL, rows, VOCAB, N_CODES, nearly, seed=seed) == new


def test_guidance_0_draws_what_no_prompt_draws_and_guidance_1_listens():
    texts = [render([Text(text)], TOKENIZER, VOCAB, end=False) + [VOCAB.boi] for text in ("red", "a ta red")]
    drawn = {}
    for guidance in (0.0, 1.0):
        options = replace(OPTIONS, guidance_scale=guidance, image_guidance_scale=guidance)
        rows = [[VOCAB.bos, VOCAB.boi], *texts] * 4
        new = [generate(MODEL, [row], VOCAB, N_CODES, options, "image", seed)[0] for seed, row in enumerate(rows)]
        same = [generate(MODEL, [rows[0]], VOCAB, N_CODES, options, "image", seed)[0] for seed in range(len(rows))]
        drawn[guidance] = new == same
    assert drawn == {0.0: True, 1.0: False}


# ---------------------------------------------------------------------------------------------------------------------
# What comes out


@pytest.mark.parametrize("model", [MODEL, GROUPED])
def test_a_sample_parses_fits_and_repeats(model):
    """Invariant 20, with 1,000 random options, two models together."""
    rng = random.Random(model.cfg.n_heads)
    drawn, context = [random_task(rng) for _ in range(500)], 30

    def once(n_rows, some):
        engine = Engine(model, VOCAB, N_CODES, n_rows, context)
        for number, (prompt, options, mode, stops) in some:
            engine.add(prompt, options, mode, (number,), stops)
        new = [[] for _ in some]
        for news in engine.run():
            new[news.handle] += news.ids
        return new

    new = once(64, list(enumerate(drawn)))
    assert once(5, list(enumerate(drawn))[::50]) == new[::50]
    for (prompt, options, mode, stops), ids in zip(drawn, new, strict=True):
        assert 1 <= len(ids) <= options.max_new_tokens and len(prompt) + len(ids) <= context
        images = [segment for segment in parse(prompt + ids, TOKENIZER, VOCAB) if isinstance(segment, Image)]
        assert all(len(image.codes) == N_CODES for image in images)
        ends = [i for i, token in enumerate(ids) if token in (VOCAB.eos, VOCAB.eot)]
        assert ends in ([], [len(ids) - 1])
        full = len(ids) == options.max_new_tokens or len(prompt) + len(ids) == context
        assert ends or full or (mode == "image" and ids[-1] == VOCAB.eoi)
        assert stops or VOCAB.eot not in ids
        forbidden = {VOCAB.bos, VOCAB.pad, VOCAB.unk, *range(VOCAB.boi + 1, VOCAB.first_text)} - {VOCAB.eot}
        assert not forbidden & set(ids)
        if mode == "text":
            assert VOCAB.boi not in ids
        if mode == "image":
            assert sum(token == VOCAB.eoi for token in ids) == 1


def test_a_stop_where_the_model_wants_to_draw():
    """The released code's extra stop: <boi> may come, ends the row, and no code follows."""
    rows = generate(MODEL, [[VOCAB.bos]] * 20, VOCAB, N_CODES, OPTIONS, "text", stops=(VOCAB.eos, VOCAB.boi))
    assert sum(row[-1] == VOCAB.boi for row in rows) > 5
    assert all(VOCAB.boi not in row[:-1] and not set(row) & set(range(4, VOCAB.eoi + 1)) for row in rows)


def test_a_repetition_penalty_forbids_nothing_and_turns_a_model_away_from_what_it_said():
    options = replace(OPTIONS, temperature=0.0, max_new_tokens=40)
    [plainly] = generate(MODEL, [[VOCAB.bos]], VOCAB, N_CODES, replace(options, repetition_penalty=1.0), "text")
    [varied] = generate(MODEL, [[VOCAB.bos]], VOCAB, N_CODES, replace(options, repetition_penalty=50.0), "text")
    assert len(set(plainly)) < len(plainly) and len(set(varied)) == len(varied)


def test_seeds_differ():
    several = [generate(MODEL, [[VOCAB.bos]] * 2, VOCAB, N_CODES, OPTIONS, "text", seed) for seed in (1, 2)]
    assert len({tuple(row) for rows in several for row in rows}) == 4


def test_dropout_is_off_and_the_mode_put_back():
    model = tiny_model(dropout=0.5).double()
    rows = generate(model, [[VOCAB.bos]] * 3, VOCAB, N_CODES, OPTIONS)
    assert not model.training
    assert generate(model.train(), [[VOCAB.bos]] * 3, VOCAB, N_CODES, OPTIONS) == rows
    assert model.training
    with pytest.raises(ValueError, match="eval"):
        stream(model, [VOCAB.bos], TOKENIZER, N_CODES, OPTIONS)


def test_no_prompts_give_no_rows():
    assert generate(MODEL, [], VOCAB, N_CODES, OPTIONS) == []


# ---------------------------------------------------------------------------------------------------------------------
# Prompts that are too long


@pytest.mark.parametrize("mode, need", [("text", 1), ("image", N_CODES + 2)])
@pytest.mark.parametrize("over", [-1, 0, 1])
def test_a_prompt_at_one_under_and_one_over_the_most_that_fits(mode, need, over):
    length = MODEL.cfg.max_seq_len - need + over
    prompt = [VOCAB.bos] + [VOCAB.first_text] * (length - 1)
    if over > 0:
        with pytest.raises(UserError, match=rf"prompt has {length} ids.* of {MODEL.cfg.max_seq_len}"):
            generate(MODEL, [[VOCAB.bos], prompt], VOCAB, N_CODES, OPTIONS, mode)
        with pytest.raises(UserError, match=str(length)):  # at the call, not at the first event
            stream(MODEL, prompt, TOKENIZER, N_CODES, OPTIONS, mode)
    else:
        assert 1 <= len(generate(MODEL, [prompt], VOCAB, N_CODES, OPTIONS, mode)[0]) <= need - over


def test_an_open_image_needs_room_for_its_rest():
    prompt = [VOCAB.bos] * (MODEL.cfg.max_seq_len - N_CODES) + [VOCAB.boi, VOCAB.first_code]
    assert len(generate(MODEL, [prompt[2:]], VOCAB, N_CODES, OPTIONS, "image")[0]) == N_CODES
    with pytest.raises(UserError, match="4 ids of an image"):
        generate(MODEL, [prompt], VOCAB, N_CODES, OPTIONS, "image")
    with pytest.raises(UserError, match="max_new_tokens is 3"):
        generate(MODEL, [prompt[2:]], VOCAB, N_CODES, replace(OPTIONS, max_new_tokens=3), "image")


def test_an_engine_without_rows_for_guidance_says_so():
    engine = Engine(MODEL, VOCAB, N_CODES, 2)
    with pytest.raises(UserError, match="guidance needs 3 rows of the batch, and it has 2"):
        engine.add([VOCAB.bos], replace(OPTIONS, guidance_scale=3.0, image_guidance_scale=1.2))


@pytest.mark.parametrize(
    "mode, stops", [("draw", None), ("text", ()), ("text", (VOCAB.pad,)), ("both", (VOCAB.eos, VOCAB.boi))]
)
def test_a_wrong_mode_or_stop_is_refused_when_it_is_added_and_harms_nobody(mode, stops):
    engine = Engine(MODEL, VOCAB, N_CODES, 4)
    engine.add([VOCAB.bos], OPTIONS, seed=(0, 0))
    with pytest.raises(ValueError, match=r"stops are|<boi> can end"):
        engine.add([VOCAB.bos], OPTIONS, mode, stops=stops)
    ids = [token for news in engine.run() for token in news.ids]
    assert [ids] == generate(MODEL, [[VOCAB.bos]], VOCAB, N_CODES, OPTIONS)


def test_an_open_image_of_too_many_codes_is_refused():
    prompt = [VOCAB.bos, VOCAB.boi, *[VOCAB.first_code] * (N_CODES + 1)]
    with pytest.raises(UserError, match="has 5 codes, and an image has 4"):
        generate(MODEL, [prompt], VOCAB, N_CODES, OPTIONS)


@pytest.mark.parametrize("token", [-1, VOCAB.size, 10**12])
def test_an_id_that_the_vocabulary_does_not_have_is_refused(token):
    with pytest.raises(ValueError, match=f"has id {token}, and the vocabulary has {VOCAB.size}"):
        generate(MODEL, [[VOCAB.bos, token]], VOCAB, N_CODES, OPTIONS)


@pytest.mark.parametrize("context", [0, MODEL.cfg.max_seq_len + 1])
def test_a_context_that_the_model_does_not_have_is_refused(context):
    with pytest.raises(ValueError, match="1 to the model's 64 ids"):
        Engine(MODEL, VOCAB, N_CODES, 2, context)


# ---------------------------------------------------------------------------------------------------------------------
# Streaming


@settings(max_examples=25)
@given(prompts(), st.sampled_from(["text", "image", "both"]), st.integers(0, 99), st.sampled_from([None, 1, 3]))
def test_a_stream_tells_what_generate_gives(prompt, mode, seed, preview):
    options = replace(OPTIONS, temperature=100.0, top_p=1.0)
    told = list(stream(MODEL, prompt, TOKENIZER, N_CODES, options, mode, seed, row=2, preview=preview))
    new = generate(MODEL, [prompt] * 3, VOCAB, N_CODES, options, mode, seed)[2]
    assert told[-1] == End(tuple(new)) and End not in map(type, told[:-1])
    segments = [event for event in told if isinstance(event, Text | Image)]
    joined = [segments[0]] if segments else []
    for segment in segments[1:]:
        if isinstance(segment, Text) and isinstance(joined[-1], Text):
            joined[-1] = Text(joined[-1].text + segment.text)
        else:
            joined.append(segment)
    before = [s for s in parse_open(prompt) if isinstance(s, Image)]
    everything = [s for s in parse(prompt + new, TOKENIZER, VOCAB) if isinstance(s, Image)]
    assert [s for s in joined if isinstance(s, Image)] == everything[len(before) :]
    letters = [token for token in new if VOCAB.is_text(token)]
    if not any(isinstance(s, Image) for s in joined):
        assert "".join(s.text for s in joined) == TOKENIZER.decode(letters)
    assert told.count(ImageStarted()) == len(everything) - len(before)


def test_an_image_is_told_while_it_grows():
    told = list(stream(MODEL, [VOCAB.bos, VOCAB.boi], TOKENIZER, N_CODES, OPTIONS, "image", preview=2))
    assert [type(event) for event in told] == [ImageStarted, PartialImage, PartialImage, Image, End]
    assert told[1].codes == told[3].codes[:2] and told[2].codes == told[3].codes


def parse_open(prompt):
    """The prompt's segments, an open image at its end left out."""
    start = max((i for i, token in enumerate(prompt) if token == VOCAB.boi), default=0)
    return parse(prompt if VOCAB.eoi in prompt[start:] or not start else prompt[:start], TOKENIZER, VOCAB)


def test_pieces_of_text_never_split_a_character():
    """Each byte is an id of its own; a character appears with its last byte, a broken one where it breaks."""
    words = "é日\U0001f44d".encode() + b"\xe6\x97" + b"a"
    ids = [VOCAB.first_text + byte for byte in words]
    ids += [VOCAB.boi, *range(4, 8), VOCAB.eoi, VOCAB.first_text + 0xC3, VOCAB.eos]
    reader = Reader([VOCAB.bos], TOKENIZER)
    told = [event for i, token in enumerate(ids) for event in reader.read([token], i == len(ids) - 1)]
    texts = [event.text for event in told if isinstance(event, Text)]
    assert texts == ["é", "日", "\U0001f44d", "\ufffda", "\ufffd"]
    assert [type(event) for event in told[-4:]] == [ImageStarted, Image, Text, End]


def test_a_row_that_ends_where_the_model_wants_to_draw_tells_of_no_image():
    reader, letter = Reader([VOCAB.bos], TOKENIZER), VOCAB.first_text + 65
    told = [*reader.read([letter], False), *reader.read([letter, VOCAB.boi], True)]
    assert told == [Text("A"), Text("A"), End((letter, letter, VOCAB.boi))]
