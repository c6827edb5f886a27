"""Generation: the cache, padding, rows beside rows and guidance all against one plain loop; what comes out is valid."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import N_CODES, TOKENIZER, VOCAB, tiny_model

from nanochameleon.config import SampleConfig
from nanochameleon.documents import EndOfTurn, Image, Text, parse, render
from nanochameleon.engine import End, PictureStarted, events, generate, pad_left, row_uniforms, stream
from nanochameleon.errors import UserError
from nanochameleon.sampling import Grammar, filtered, guide, pick
from nanochameleon.transformer import KVCache

MODEL, GROUPED = tiny_model(), tiny_model(1, n_heads=4, n_kv_heads=2, norm_order="post")
with torch.no_grad():  # so that both often begin a picture where they may
    for model in (MODEL, GROUPED):
        model.output.weight[VOCAB.boi] *= 6
OPTIONS = SampleConfig(temperature=1.3, top_p=0.95, image_temperature=1.0, image_top_p=0.9, max_new=16)

pictures = st.lists(st.integers(0, 7), min_size=N_CODES, max_size=N_CODES).map(lambda codes: Image(tuple(codes)))
documents = st.lists(st.sampled_from([Text("a red"), Text("ta"), EndOfTurn()]) | pictures, max_size=3)


@st.composite
def prompts(draw) -> list[int]:
    """Any document, or one that ends inside a picture after 0 to n codes."""
    ids = render(draw(documents), TOKENIZER, VOCAB, end=False)
    if draw(st.booleans()):
        ids += [VOCAB.boi, *(VOCAB.code_to_id(c) for c in draw(st.lists(st.integers(0, 7), max_size=N_CODES)))]
    return ids


batches = st.lists(prompts(), min_size=1, max_size=4)


# ---------------------------------------------------------------------------------------------------------------------
# Cache and padding


@given(st.integers(0, 9), st.lists(st.integers(1, 5), min_size=1, max_size=5), st.sampled_from([MODEL, GROUPED]))
def test_prefill_and_decode_in_any_split_equal_one_forward(seed, parts, model):
    """Invariant 15."""
    tokens = torch.randint(VOCAB.size, (2, sum(parts)), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        cache = KVCache.empty(model.cfg, 2, sum(parts), torch.device("cpu"), torch.float32)
        pieces = [model(piece, cache=cache) for piece in tokens.split(parts, 1)]
        torch.testing.assert_close(torch.cat(pieces, 1), model(tokens), atol=1e-5, rtol=1e-5)


@given(batches, st.sampled_from([MODEL, GROUPED]))
def test_padding_on_the_left_changes_no_logits(rows, model):
    width = max(map(len, rows)) + 2
    with torch.no_grad():
        padded = model.logits(model(*pad_left(rows, width, VOCAB.pad)))
        for i, row in enumerate(rows):
            alone = model.logits(model(torch.tensor([row])))[0]
            torch.testing.assert_close(padded[i, width - len(row) :], alone, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Against a plain loop


@torch.no_grad()
def plain(model, prompt, options, mode, seed, row) -> list[int]:
    """One row, no cache, no batch, no twins: every step runs the whole sequence, with guidance <s> <boi> codes too."""
    room = min(options.max_new, model.cfg.max_seq_len - len(prompt))
    uniforms = row_uniforms(seed, [row], room)[0]
    start = max((i for i, token in enumerate(prompt) if token == VOCAB.boi), default=-1)
    begun = start >= 0 and VOCAB.eoi not in prompt[start:]
    left = N_CODES + 1 - (len(prompt) - start) if begun else -1
    grammar = Grammar.start(VOCAB, N_CODES, mode, torch.tensor([left]), torch.tensor([room]))
    new = []
    while not grammar.done[0]:
        ids = [*prompt, *new]
        logits = model.logits(model(torch.tensor([ids])))[:, -1]
        is_code = int(grammar.left) > 0
        if is_code and options.guidance != 1:
            last = len(ids) - 1 - ids[::-1].index(VOCAB.boi)
            twin = model.logits(model(torch.tensor([[VOCAB.bos, *ids[last:]]])))[:, -1]
            logits = guide(logits, twin, options.guidance)
        logits = logits.masked_fill(~grammar.allowed(), -torch.inf)
        names = ("image_temperature", "image_top_k", "image_top_p") if is_code else ("temperature", "top_k", "top_p")
        logits = filtered(logits, *(getattr(options, name) for name in names))
        new.append(int(pick(logits, uniforms[None, len(new)])))
        grammar = grammar.after(torch.tensor(new[-1:]))
    return new


@settings(max_examples=25)
@given(batches, st.sampled_from(["text", "image", "both"]), st.sampled_from([1.0, 0.0, 2.5]), st.integers(0, 99))
def test_generate_equals_a_loop_without_cache_batch_or_twins(rows, mode, guidance, seed):
    model = GROUPED if seed % 2 else MODEL
    options = replace(OPTIONS, guidance=guidance, top_k=20, image_top_k=5)
    together = generate(model, rows, VOCAB, N_CODES, options, mode, seed)
    assert together == [plain(model, row, options, mode, seed, i) for i, row in enumerate(rows)]


def test_so_does_it_where_guided_pictures_begin_between_words():
    rows, options = [[VOCAB.bos, VOCAB.first_text + i] for i in range(6)], replace(OPTIONS, guidance=2.5, max_new=40)
    together = generate(MODEL, rows, VOCAB, N_CODES, options, "both", 1)
    begun = {i for row in together for i, token in enumerate(row) if token == VOCAB.boi}
    assert len(begun) > 5 and max(begun) > 10
    assert together == [plain(MODEL, row, options, "both", 1, i) for i, row in enumerate(rows)]


def test_positions_count_from_0_in_every_document_that_attention_sees():
    """Rotary scores see differences alone, so no logits would tell of a twin whose positions run on."""
    fed = []
    hook = MODEL.register_forward_pre_hook(lambda _, args: fed.append(args[1:3]))
    prompts = [[VOCAB.bos], [VOCAB.bos, *TOKENIZER.encode("a red"), VOCAB.boi, VOCAB.first_code]]
    try:
        generate(MODEL, prompts, VOCAB, N_CODES, replace(OPTIONS, guidance=2.0, max_new=40), seed=1)
    finally:
        hook.remove()
    positions, doc_ids = (torch.cat(parts, 1) for parts in zip(*fed, strict=True))
    assert len(positions) == 4
    for row, docs in zip(positions, doc_ids, strict=True):
        for doc in set(docs.tolist()) - {-1}:
            seen = row[docs == doc]
            assert torch.equal(seen, torch.arange(len(seen)))
    assert doc_ids[:2].unique().tolist() == [-1, 0] and doc_ids[2:].max() > 5


@settings(max_examples=15)
@given(batches, st.integers(0, 99), st.integers(1, 3))
def test_a_row_is_the_same_alone_and_in_any_batch(rows, seed, batch_size):
    together = generate(MODEL, rows, VOCAB, N_CODES, OPTIONS, seed=seed)
    assert generate(MODEL, rows, VOCAB, N_CODES, OPTIONS, seed=seed, batch_size=batch_size) == together


def test_guidance_0_draws_what_no_prompt_draws_and_guidance_1_listens():
    texts = [render([Text(text)], TOKENIZER, VOCAB, end=False) + [VOCAB.boi] for text in ("red", "a ta red")]
    drawn = {}
    for guidance in (0.0, 1.0):
        options = replace(OPTIONS, guidance=guidance)
        rows = [[VOCAB.bos, VOCAB.boi], *texts] * 4
        new = [generate(MODEL, [row], VOCAB, N_CODES, options, "image", seed)[0] for seed, row in enumerate(rows)]
        same = [generate(MODEL, [rows[0]], VOCAB, N_CODES, options, "image", seed)[0] for seed in range(len(rows))]
        drawn[guidance] = new == same
    assert drawn == {0.0: True, 1.0: False}


# ---------------------------------------------------------------------------------------------------------------------
# What comes out


@given(
    batches, st.sampled_from(["text", "image", "both"]), st.sampled_from([0.0, 1.0, 100.0]), st.integers(1, 20),
    st.sampled_from([None, (VOCAB.eos, VOCAB.eot)]),
)  # fmt: skip
def test_a_sample_parses_fits_and_repeats(rows, mode, temperature, max_new, stops):
    """Invariant 20, with flat logits too."""
    least = N_CODES + 2 if mode == "image" else N_CODES + 1
    options = SampleConfig(temperature, 1.0, None, temperature, 1.0, None, max_new=max(least, max_new))
    model = tiny_model(max_seq_len=max(map(len, rows)) + max(least, 9))
    new = generate(model, rows, VOCAB, N_CODES, options, mode, 3, stops=stops)
    assert new == generate(model, rows, VOCAB, N_CODES, options, mode, 3, stops=stops)
    for prompt, ids in zip(rows, new, strict=True):
        assert 1 <= len(ids) <= options.max_new and len(prompt) + len(ids) <= model.cfg.max_seq_len
        drawn = [segment for segment in parse(prompt + ids, TOKENIZER, VOCAB) if isinstance(segment, Image)]
        assert all(len(picture.codes) == N_CODES for picture in drawn)
        ends = [i for i, token in enumerate(ids) if token in (VOCAB.eos, VOCAB.eot)]
        assert ends in ([], [len(ids) - 1])
        full = len(ids) == options.max_new or len(prompt) + len(ids) == model.cfg.max_seq_len
        assert ends or full or (mode == "image" and ids[-1] == VOCAB.eoi)
        assert stops or VOCAB.eot not in ids
        forbidden = {VOCAB.bos, VOCAB.pad, VOCAB.unk, *range(VOCAB.boi + 1, VOCAB.first_text)} - {VOCAB.eot}
        assert not forbidden & set(ids)
        if mode == "text":
            assert VOCAB.boi not in ids
        if mode == "image":
            assert sum(token == VOCAB.eoi for token in ids) == 1


def test_seeds_differ():
    several = [generate(MODEL, [[VOCAB.bos]] * 2, VOCAB, N_CODES, OPTIONS, "text", seed) for seed in (1, 2)]
    assert len({tuple(row) for rows in several for row in rows}) == 4


def test_dropout_is_off_and_the_mode_put_back():
    model = tiny_model(dropout=0.5)
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


def test_an_open_picture_needs_room_for_its_rest():
    prompt = [VOCAB.bos] * (MODEL.cfg.max_seq_len - N_CODES) + [VOCAB.boi, VOCAB.first_code]
    assert len(generate(MODEL, [prompt[2:]], VOCAB, N_CODES, OPTIONS, "image")[0]) == N_CODES
    with pytest.raises(UserError, match="4 ids of a picture"):
        generate(MODEL, [prompt], VOCAB, N_CODES, OPTIONS, "image")
    with pytest.raises(UserError, match="max_new is 3"):
        generate(MODEL, [prompt[2:]], VOCAB, N_CODES, replace(OPTIONS, max_new=3), "image")


# ---------------------------------------------------------------------------------------------------------------------
# Streaming


@settings(max_examples=25)
@given(prompts(), st.sampled_from(["text", "image", "both"]), st.integers(0, 99))
def test_a_stream_tells_what_generate_gives(prompt, mode, seed):
    options = replace(OPTIONS, temperature=100.0, top_p=1.0)
    told = list(stream(MODEL, prompt, TOKENIZER, N_CODES, options, mode, seed, row=2))
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
    assert told.count(PictureStarted()) == len(everything) - len(before)


def parse_open(prompt):
    """The prompt's segments, an open picture at its end left out."""
    start = max((i for i, token in enumerate(prompt) if token == VOCAB.boi), default=0)
    return parse(prompt if VOCAB.eoi in prompt[start:] or not start else prompt[:start], TOKENIZER, VOCAB)


def test_pieces_of_text_never_split_a_character():
    """Each byte is an id of its own; a character appears with its last byte, a broken one where it breaks."""
    words = "é日\U0001f44d".encode() + b"\xe6\x97" + b"a"
    ids = [VOCAB.first_text + byte for byte in words]
    ids += [VOCAB.boi, *range(4, 8), VOCAB.eoi, VOCAB.first_text + 0xC3, VOCAB.eos]
    told = list(events(((torch.tensor([token]), None) for token in ids), [VOCAB.bos], TOKENIZER))
    texts = [event.text for event in told if isinstance(event, Text)]
    assert texts == ["é", "日", "\U0001f44d", "\ufffda", "\ufffd"]
    assert [type(event) for event in told[-4:]] == [PictureStarted, Image, Text, End]
