"""The engine: cache, batch, guidance branches and syncs against one plain loop; its outputs are valid."""

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import N_CODES, TOKENIZER, VOCAB, random_request, tiny_model

from nanochameleon.config import SamplingParams
from nanochameleon.documents import EndOfTurn, Image, Text, parse, render
from nanochameleon.errors import UserError
from nanochameleon.generation.decode_torch import FusedDecoder
from nanochameleon.generation.decoder import Decoder, read_together, uniforms
from nanochameleon.generation.engine import Engine, generate
from nanochameleon.generation.events import stream
from nanochameleon.generation.sampling import MODALITIES, Grammar, SamplingTensors, apply_filters, sample

# float64, so that rounding, which differs from one shape of a batch to another, decides nothing
MODEL, GROUPED = tiny_model().double(), tiny_model(1, n_heads=4, n_kv_heads=2, norm_order="post").double()
SINGLE = tiny_model()  # MODEL in float32, the path that a CPU takes
with torch.no_grad():  # so that all often start an image where they may
    for model in (MODEL, GROUPED, SINGLE):
        model.output.weight[VOCAB.boi] *= 6
PARAMS = SamplingParams(
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
def all_params(draw) -> SamplingParams:
    top_ps, scales = st.sampled_from([0.3, 0.9, 1.0]), st.sampled_from([0.0, 1.0, 1.2, 3.0])
    top_ks, min_ps = st.sampled_from([None, 1, 5]), st.sampled_from([0.0, 0.05])
    heat = st.sampled_from([0.0, 0.7, 1.3, 100.0])
    return SamplingParams(
        draw(heat), draw(top_ps), draw(top_ks), draw(min_ps), draw(st.sampled_from([1.0, 1.2, 0.8])),
        draw(heat), draw(top_ps), draw(top_ks), draw(min_ps), draw(scales), draw(scales), draw(st.integers(6, 40)),
    )  # fmt: skip


stop_ids = st.sampled_from([None, (VOCAB.eos, VOCAB.eot)])
requests = st.tuples(prompts(), all_params(), st.sampled_from(MODALITIES), stop_ids)


# ---------------------------------------------------------------------------------------------------------------------
# Against a plain loop


def plain_guided(model, tokens, params) -> torch.Tensor:
    """Logits of the next code: the published formula on three whole sequences."""
    last = len(tokens) - 1 - tokens[::-1].index(VOCAB.boi)
    seen = tokens, [t for t in tokens if t == VOCAB.bos or 4 <= t <= VOCAB.boi], [VOCAB.bos, *tokens[last:]]
    cond, image_cond, uncond = (model.logits(model(torch.tensor([some]))[0, -1]) for some in seen)
    return uncond + params.image_guidance_scale * (image_cond - uncond) + params.guidance_scale * (cond - image_cond)


@torch.no_grad()
def plain(model, prompt, params, modality, seed, stops=None) -> list[int]:
    """One sample without cache, batch or kept branches: every step runs the whole sequences."""
    room = min(params.max_new_tokens, model.cfg.max_seq_len - len(prompt))
    start = max((i for i, token in enumerate(prompt) if token == VOCAB.boi), default=-1)
    begun = start >= 0 and VOCAB.eoi not in prompt[start:]
    left = N_CODES + 1 - (len(prompt) - start) if begun else -1
    grammar = Grammar.start(VOCAB, N_CODES, [modality], [left], [room], [stops])
    numbers, row, new = uniforms(seed, room), SamplingTensors.of([params], torch.device("cpu")), []
    while not grammar.done[0]:
        tokens, in_image = [*prompt, *new], int(grammar.image_tokens_left) > 0
        if in_image:
            logits = plain_guided(model, tokens, params)
        else:
            logits = model.logits(model(torch.tensor([tokens]))[0, -1])
            for token in set(tokens):
                logits[token] *= 1 / params.repetition_penalty if logits[token] > 0 else params.repetition_penalty
        logits = logits[None].masked_fill(~grammar.mask(), -torch.inf)
        if (params.image_temperature if in_image else params.temperature) == 0:
            new.append(int(logits.argmax()))
        else:
            new.append(int(sample(apply_filters(logits, row, torch.tensor([in_image])), numbers[None, len(new)])))
        grammar = grammar.advance(torch.tensor(new[-1:]))
    return new


def room_for(request):
    """A request with room for an image."""
    prompt, params, modality, stops = request
    return prompt, replace(params, max_new_tokens=max(params.max_new_tokens, N_CODES + 2)), modality, stops


@settings(max_examples=15)
@given(
    st.lists(requests.map(room_for), min_size=1, max_size=6), st.integers(3, 9), st.integers(1, 40), st.integers(0, 99)
)
def test_any_mixture_of_requests_that_join_and_leave_equals_plain_loops(requests, n_slots, chunk, seed):
    """Every request with its own modality, length, stops, seed and params; new ones join a running batch."""
    model = GROUPED if seed % 2 else MODEL
    engine = Engine(model, VOCAB, N_CODES, n_slots, prefill_chunk=chunk, max_steps_between_syncs=seed % 5 or None)
    queue, new = list(enumerate(requests)), {}
    order, joining = {}, random.Random(seed)
    while queue or engine.waiting or engine.running:
        while queue and joining.random() < 0.6:
            number, (prompt, params, modality, stops) = queue.pop()
            order[engine.add(prompt, params, modality, (seed, number), stops)] = number
        for output in engine.step():
            new.setdefault(order[output.request_id], []).extend(output.tokens)
    for number, (prompt, params, modality, stops) in enumerate(requests):
        assert new[number] == plain(model, prompt, params, modality, (seed, number), stops)
    assert engine.n_live == 0 and not engine.prefilling


@pytest.mark.parametrize("decoder", [Decoder, FusedDecoder])
@settings(max_examples=15)
@given(st.integers(5, 12), st.booleans(), st.integers(1, 12), st.integers(0, 99))
def test_a_guided_request_waits_for_its_branches_while_others_decode(decoder, n_words, has_image, chunk, seed):
    """Its prompt is longer than a chunk, so some of its branches have been read before the others."""
    words = range(VOCAB.first_text, VOCAB.first_text + n_words)
    image = [VOCAB.boi, *(VOCAB.code_to_token((seed + i) % 8) for i in range(N_CODES)), VOCAB.eoi]
    prompt = [VOCAB.bos, *words, *(image if has_image else ()), *words, VOCAB.boi]
    params, modality = replace(PARAMS, guidance_scale=2.5, image_guidance_scale=1.7), ("image", "both")[seed % 2]
    engine = Engine(GROUPED, VOCAB, N_CODES, 4, prefill_chunk=chunk)
    with torch.inference_mode():
        engine.decoder = decoder(GROUPED, VOCAB, N_CODES, 4, engine.context)
    engine.add([VOCAB.bos], replace(PARAMS, max_new_tokens=60), "text", (9,))
    engine.step()
    guided = engine.add(prompt, params, modality, (seed,))
    tokens = [token for output in engine.run() if output.request_id == guided for token in output.tokens]
    assert tokens == plain(GROUPED, prompt, params, modality, (seed,))


@settings(max_examples=25)
@given(st.lists(prompts(), min_size=2, max_size=5), st.integers(3, 20), st.integers(2, 60))
def test_prompts_say_the_same_read_together_as_one_by_one(batch, chunk, most):
    """A GPU reads neighbouring prompts in one pass, padded to the longest."""
    new, passes = [], []
    for together in (1, most):
        engine = Engine(GROUPED, VOCAB, N_CODES, 8, prefill_chunk=chunk)
        engine.decoder.prefill_together = together
        read, n_passes = engine.decoder.read_padded, []
        engine.decoder.read_padded = lambda chunks, read=read, n=n_passes: n.append(len(chunks)) or read(chunks)
        for i, prompt in enumerate(batch):
            engine.add(prompt, PARAMS, "both", (i,))
        new.append([[] for _ in batch])
        for output in engine.run():
            new[-1][output.request_id] += output.tokens
        passes.append(n_passes)
    assert new[0] == new[1]
    assert set(passes[0]) == {1} and sum(passes[1]) == sum(passes[0])


def test_chunks_are_read_together_if_their_slots_are_neighbours_and_padding_fits():
    a, b, long, gap, later = ([5] * 3, 0, 0), ([6] * 2, 1, 0), ([7] * 9, 2, 0), ([8], 4, 0), ([9], 5, 7)
    assert read_together([a, b, long, gap, later], 12) == [[a, b], [long], [gap], [later]]
    assert read_together([a, b, long], 27) == [[a, b, long]]


def test_a_slot_that_waits_may_be_longer_than_what_the_steps_read():
    """Steps of a short request read 64 entries of the cache, and the slots of the long one run with it."""
    model = tiny_model(1, max_seq_len=160).double()
    prompt = [VOCAB.bos, *[VOCAB.first_text + i % 7 for i in range(100)], VOCAB.boi]
    params = replace(PARAMS, guidance_scale=2.5, image_guidance_scale=1.7)
    new = []
    for company in (False, True):
        engine = Engine(model, VOCAB, N_CODES, 4, prefill_chunk=100)
        if company:
            engine.add([VOCAB.bos], replace(PARAMS, max_new_tokens=40), "text", (9,))
            engine.step()
        guided = engine.add(prompt, params, "image")
        new.append([token for output in engine.run() if output.request_id == guided for token in output.tokens])
    assert new[0] == new[1]


@pytest.mark.parametrize("model", [MODEL, SINGLE], ids=["double", "single"])
def test_guided_images_that_begin_between_words_equal_plain_loops(model):
    rows = [[VOCAB.bos, VOCAB.first_text + i] for i in range(6)]
    params = replace(
        PARAMS, guidance_scale=2.5, image_guidance_scale=-2.0, max_new_tokens=40
    )  # far from 1, where mistakes show
    together = generate(model, rows, VOCAB, N_CODES, params, "both", 1)
    begun = {i for row in together for i, token in enumerate(row) if token == VOCAB.boi}
    assert len(begun) > 5 and max(begun) > 10
    assert together == [plain(model, row, params, "both", (1, i)) for i, row in enumerate(rows)]


@settings(max_examples=15)
@given(batches, st.integers(0, 99), st.integers(1, 3))
def test_a_sample_is_the_same_alone_and_in_any_batch(rows, seed, batch_size):
    together = generate(MODEL, rows, VOCAB, N_CODES, PARAMS, seed=seed)
    assert generate(MODEL, rows, VOCAB, N_CODES, PARAMS, seed=seed, batch_size=batch_size) == together


def test_a_sample_is_the_same_alone_and_in_a_batch_in_float32():
    rows = [[VOCAB.bos, *range(VOCAB.first_text, VOCAB.first_text + i)] for i in range(20)]
    params = replace(PARAMS, max_new_tokens=20, guidance_scale=2.0)
    together = generate(SINGLE, rows, VOCAB, N_CODES, params, seed=5)
    for size in (3, 17):
        assert generate(SINGLE, rows, VOCAB, N_CODES, params, seed=5, batch_size=size) == together
    assert len({tuple(row) for row in together}) > 15


# ---------------------------------------------------------------------------------------------------------------------
# Prompts that are shared, and steps without a sync


def counted(monkeypatch, name):
    """Calls of a method of Decoder, by their arguments."""
    calls, method = [], getattr(Decoder, name)
    monkeypatch.setattr(Decoder, name, lambda self, *args: calls.append(args) or method(self, *args))
    return calls


def test_a_prompt_is_read_once_for_all_its_samples_and_branches(monkeypatch):
    calls = counted(monkeypatch, "prefill")
    prompt = [VOCAB.bos, *TOKENIZER.encode("a red"), VOCAB.boi]
    generate(
        MODEL, [prompt] * 5, VOCAB, N_CODES, replace(PARAMS, guidance_scale=3.0, image_guidance_scale=1.2), "image"
    )
    read = [list(tokens) for (chunks,) in calls for tokens, *_ in chunks]
    assert sorted(read) == sorted([prompt, [VOCAB.bos, VOCAB.boi]])


def test_a_long_prompt_is_read_in_chunks_between_steps_of_other_requests(monkeypatch):
    read, syncs = counted(monkeypatch, "prefill"), counted(monkeypatch, "sync")
    engine = Engine(MODEL, VOCAB, N_CODES, 2, prefill_chunk=8)
    engine.add([VOCAB.bos], replace(PARAMS, temperature=0.0, max_new_tokens=40), "text")
    engine.step()
    engine.add([VOCAB.bos] * 30, PARAMS, "text")
    before = len(syncs)
    while len(read) < 5:
        engine.step()
    chunks = [(len(tokens), start) for (chunks,) in read[1:] for tokens, _, start in chunks]
    assert chunks == [(8, 0), (8, 8), (8, 16), (6, 24)]
    assert len(syncs) - before >= 4


def test_the_host_does_not_sync_inside_an_image(monkeypatch):
    syncs = counted(monkeypatch, "sync")
    prompt = [VOCAB.bos, VOCAB.boi]
    generate(MODEL, [prompt, [*prompt, VOCAB.first_code]], VOCAB, N_CODES, PARAMS, "image")
    assert [steps for _, steps in syncs] == [N_CODES, 1]  # the second image's end, then the first one's


def test_only_logits_that_may_be_sampled_are_computed(monkeypatch):
    computed = counted(monkeypatch, "logits")
    generate(MODEL, [[VOCAB.bos, VOCAB.boi]], VOCAB, N_CODES, PARAMS, "image")
    assert {part for _, part in computed} == {"image"}
    computed.clear()
    generate(MODEL, [[VOCAB.bos]], VOCAB, N_CODES, PARAMS, "text")
    assert {part for _, part in computed} == {"text"}


def test_steps_work_in_place_and_have_few_shapes(monkeypatch):
    """A CUDA graph needs both: no tensor that a step reads or writes may move."""
    engine = Engine(MODEL, VOCAB, N_CODES, 6)
    decoder = engine.decoder

    def addresses():
        others = decoder.branch_slots, decoder.token_buffer, decoder.step_idx, decoder.cache.keys, decoder.cache.values
        return [x.data_ptr() for x in (*decoder.slot_tensors(), *others)]

    before = addresses()
    for seed in range(12):
        engine.add([VOCAB.bos], replace(PARAMS, guidance_scale=2.0, max_new_tokens=30), "both", (seed,))
    list(engine.run())
    engine.add([VOCAB.bos, VOCAB.boi], PARAMS, "image")
    list(engine.run())
    assert addresses() == before
    kv_lens, parts = ({key[i] for key in decoder.graphs.graphs} for i in (1, 2))
    assert kv_lens == {64} and parts == {"text", "image", "all"}
    decoder.graphs.enabled = True
    assert [decoder.graphs.round_up(n, 6) for n in range(1, 7)] == [1, 2, 4, 4, 6, 6]


# ---------------------------------------------------------------------------------------------------------------------
# Guidance


@settings(max_examples=15)
@given(batches, st.integers(0, 99))
def test_with_scales_of_1_guidance_is_off(rows, seed):
    """Also with branches: scales that are almost 1 need them."""
    new = generate(MODEL, rows, VOCAB, N_CODES, replace(PARAMS, max_new_tokens=40), seed=seed)
    nearly = replace(PARAMS, guidance_scale=1 + 1e-12, image_guidance_scale=1 - 1e-12, max_new_tokens=40)
    assert generate(MODEL, rows, VOCAB, N_CODES, nearly, seed=seed) == new


def test_guidance_0_ignores_the_prompt_and_guidance_1_does_not():
    texts = [render([Text(text)], TOKENIZER, VOCAB, end=False) + [VOCAB.boi] for text in ("red", "a ta red")]
    drawn = {}
    for guidance in (0.0, 1.0):
        params = replace(PARAMS, guidance_scale=guidance, image_guidance_scale=guidance)
        rows = [[VOCAB.bos, VOCAB.boi], *texts] * 4
        new = [generate(MODEL, [row], VOCAB, N_CODES, params, "image", seed)[0] for seed, row in enumerate(rows)]
        same = [generate(MODEL, [rows[0]], VOCAB, N_CODES, params, "image", seed)[0] for seed in range(len(rows))]
        drawn[guidance] = new == same
    assert drawn == {0.0: True, 1.0: False}


# ---------------------------------------------------------------------------------------------------------------------
# Outputs


@pytest.mark.parametrize("model", [MODEL, GROUPED])
def test_a_sample_parses_fits_and_is_reproducible(model):
    """Invariant 20, with 500 random requests for each of two models."""
    rng = random.Random(model.cfg.n_heads)
    drawn, context = [random_request(rng) for _ in range(500)], 30

    def once(n_slots, some):
        engine = Engine(model, VOCAB, N_CODES, n_slots, context)
        for number, (prompt, params, modality, stops) in some:
            engine.add(prompt, params, modality, (number,), stops)
        new = [[] for _ in some]
        for output in engine.run():
            new[output.request_id] += output.tokens
        return new

    new = once(64, list(enumerate(drawn)))
    assert once(5, list(enumerate(drawn))[::50]) == new[::50]
    for (prompt, params, modality, stops), tokens in zip(drawn, new, strict=True):
        assert 1 <= len(tokens) <= params.max_new_tokens and len(prompt) + len(tokens) <= context
        images = [segment for segment in parse(prompt + tokens, TOKENIZER, VOCAB) if isinstance(segment, Image)]
        assert all(len(image.codes) == N_CODES for image in images)
        ends = [i for i, token in enumerate(tokens) if token in (VOCAB.eos, VOCAB.eot)]
        assert ends in ([], [len(tokens) - 1])
        full = len(tokens) == params.max_new_tokens or len(prompt) + len(tokens) == context
        assert ends or full or (modality == "image" and tokens[-1] == VOCAB.eoi)
        assert stops or VOCAB.eot not in tokens
        forbidden = {VOCAB.bos, VOCAB.pad, VOCAB.unk, *range(VOCAB.boi + 1, VOCAB.first_text)} - {VOCAB.eot}
        assert not forbidden & set(tokens)
        if modality == "text":
            assert VOCAB.boi not in tokens
        if modality == "image":
            assert sum(token == VOCAB.eoi for token in tokens) == 1


def test_boi_as_a_stop_ends_a_sample():
    """The released code's extra stop: <boi> may come, ends the row, and no code follows."""
    rows = generate(MODEL, [[VOCAB.bos]] * 20, VOCAB, N_CODES, PARAMS, "text", stops=(VOCAB.eos, VOCAB.boi))
    assert sum(row[-1] == VOCAB.boi for row in rows) > 5
    assert all(VOCAB.boi not in row[:-1] and not set(row) & set(range(4, VOCAB.eoi + 1)) for row in rows)


def test_a_repetition_penalty_forbids_nothing_and_avoids_repetition():
    params = replace(PARAMS, temperature=0.0, max_new_tokens=40)
    [plainly] = generate(MODEL, [[VOCAB.bos]], VOCAB, N_CODES, replace(params, repetition_penalty=1.0), "text")
    [varied] = generate(MODEL, [[VOCAB.bos]], VOCAB, N_CODES, replace(params, repetition_penalty=50.0), "text")
    assert len(set(plainly)) < len(plainly) and len(set(varied)) == len(varied)


def test_seeds_differ():
    several = [generate(MODEL, [[VOCAB.bos]] * 2, VOCAB, N_CODES, PARAMS, "text", seed) for seed in (1, 2)]
    assert len({tuple(row) for rows in several for row in rows}) == 4


def test_dropout_is_off_and_training_mode_is_restored():
    model = tiny_model(dropout=0.5).double()
    rows = generate(model, [[VOCAB.bos]] * 3, VOCAB, N_CODES, PARAMS)
    assert not model.training
    assert generate(model.train(), [[VOCAB.bos]] * 3, VOCAB, N_CODES, PARAMS) == rows
    assert model.training
    with pytest.raises(ValueError, match="eval"):
        stream(model, [VOCAB.bos], TOKENIZER, N_CODES, PARAMS)


def test_no_prompts_give_no_samples():
    assert generate(MODEL, [], VOCAB, N_CODES, PARAMS) == []


# ---------------------------------------------------------------------------------------------------------------------
# Prompts that are too long


@pytest.mark.parametrize("modality, need", [("text", 1), ("image", N_CODES + 2)])
@pytest.mark.parametrize("over", [-1, 0, 1])
def test_a_prompt_of_one_under_at_and_one_over_the_longest_that_fits(modality, need, over):
    length = MODEL.cfg.max_seq_len - need + over
    prompt = [VOCAB.bos] + [VOCAB.first_text] * (length - 1)
    if over > 0:
        with pytest.raises(UserError, match=rf"prompt has {length} tokens.* of {MODEL.cfg.max_seq_len}"):
            generate(MODEL, [[VOCAB.bos], prompt], VOCAB, N_CODES, PARAMS, modality)
        with pytest.raises(UserError, match=str(length)):  # at the call, not at the first event
            stream(MODEL, prompt, TOKENIZER, N_CODES, PARAMS, modality)
    else:
        assert 1 <= len(generate(MODEL, [prompt], VOCAB, N_CODES, PARAMS, modality)[0]) <= need - over


def test_an_open_image_needs_room_for_its_rest():
    prompt = [VOCAB.bos] * (MODEL.cfg.max_seq_len - N_CODES) + [VOCAB.boi, VOCAB.first_code]
    assert len(generate(MODEL, [prompt[2:]], VOCAB, N_CODES, PARAMS, "image")[0]) == N_CODES
    with pytest.raises(UserError, match="4 tokens of an image"):
        generate(MODEL, [prompt], VOCAB, N_CODES, PARAMS, "image")
    with pytest.raises(UserError, match="max_new_tokens is 3"):
        generate(MODEL, [prompt[2:]], VOCAB, N_CODES, replace(PARAMS, max_new_tokens=3), "image")


def test_an_engine_without_slots_for_guidance_is_an_error():
    engine = Engine(MODEL, VOCAB, N_CODES, 2)
    with pytest.raises(UserError, match="guidance needs 3 slots of the batch, and it has 2"):
        engine.add([VOCAB.bos], replace(PARAMS, guidance_scale=3.0, image_guidance_scale=1.2))


@pytest.mark.parametrize(
    "modality, stops", [("draw", None), ("text", ()), ("text", (VOCAB.pad,)), ("both", (VOCAB.eos, VOCAB.boi))]
)
def test_a_wrong_modality_or_stop_is_refused_when_added_and_harms_no_other_request(modality, stops):
    engine = Engine(MODEL, VOCAB, N_CODES, 4)
    engine.add([VOCAB.bos], PARAMS, seed=(0, 0))
    with pytest.raises(ValueError, match=r"stops are|<boi> can be a stop"):
        engine.add([VOCAB.bos], PARAMS, modality, stops=stops)
    tokens = [token for output in engine.run() for token in output.tokens]
    assert [tokens] == generate(MODEL, [[VOCAB.bos]], VOCAB, N_CODES, PARAMS)


def test_an_open_image_of_too_many_codes_is_refused():
    prompt = [VOCAB.bos, VOCAB.boi, *[VOCAB.first_code] * (N_CODES + 1)]
    with pytest.raises(UserError, match="has 5 tokens, and an image has 4"):
        generate(MODEL, [prompt], VOCAB, N_CODES, PARAMS)


@pytest.mark.parametrize("token", [-1, VOCAB.size, 10**12])
def test_a_token_outside_the_vocabulary_is_refused(token):
    with pytest.raises(ValueError, match=f"has token {token}, and the vocabulary has {VOCAB.size}"):
        generate(MODEL, [[VOCAB.bos, token]], VOCAB, N_CODES, PARAMS)


@pytest.mark.parametrize("context", [0, MODEL.cfg.max_seq_len + 1])
def test_a_context_longer_than_the_models_is_refused(context):
    with pytest.raises(ValueError, match="1 to the model's 64 tokens"):
        Engine(MODEL, VOCAB, N_CODES, 2, context)
