"""Do the tests bite? Plants known bugs, one at a time, and expects a test to turn red: `make mutants`.

    python tests/mutants.py              all of them, as many at a time as there are cores
    python tests/mutants.py quantizer    those whose file's name holds that word

A bug is planted in a copy of package and tests, never in the tree. First the untouched copy must be green: a test that
is red anyway catches nothing. Ends with 1 if a bug survives, or if its text is no longer in its file.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from nanochameleon.kernels.amx import why_not

ROOT = Path(__file__).parents[1]
SCRIPTS = ("train.py", "sample.py")


@dataclass(frozen=True)
class Mutant:
    bug: str  # what it is, in words
    file: str  # in the package, kernels/ included, or one of SCRIPTS
    old: str  # stands exactly once in that file
    new: str
    tests: str  # files that must turn red, under tests/, separated by spaces


MUTANTS = [
    Mutant(
        "all seeds start from the same weights", "transformer.py", "manual_seed(zlib.crc32(name.encode(), seed))",
        "manual_seed(seed << 32 | zlib.crc32(name.encode()))", "test_transformer.py",
    ),
    Mutant("a stage draws as the next seed does", "data/loader.py", "Shares(weights, seed, stage)",
           "Shares(weights, seed + stage)", "test_data.py"),
    Mutant("codes begin one later", "vocab.py", "first_code = 4", "first_code = 5", "test_vocab.py"),
    Mutant("uint8 codes wrap round", "vocab.py", "values = values.long()", "values = values", "test_vocab.py"),
    Mutant("one code too many is let in", "vocab.py", "largest < high:", "largest <= high:", "test_vocab.py"),
    Mutant(
        "letters are decoded id by id", "text_tokenizer.py",
        'return self.decode_bytes(ids).decode("utf-8", errors="replace")',
        'return "".join(self.decode_bytes([i]).decode("utf-8", errors="replace") for i in ids)',
        "test_text_tokenizer.py",
    ),
    Mutant(
        "a stale merge is carried out", "text_tokenizer.py",
        "if j == n or ranks.get((pieces[i], pieces[j])) != rank:", "if j == n:", "test_text_tokenizer.py",
    ),
    Mutant(
        "a picture's end is left out", "documents.py", "for code in segment.codes), vocab.eoi]",
        "for code in segment.codes)]", "test_documents.py",
    ),
    Mutant(
        "text before a picture moves behind it", "documents.py",
        "elif token == vocab.boi:\n            close_text()", "elif token == vocab.boi:", "test_documents.py",
    ),
    Mutant("an open picture passes", "documents.py", "    if codes is not None:\n        raise",
           "    if not doc and codes is not None:\n        raise", "test_documents.py"),
    Mutant("the farthest code", "quantizer.py", ".argmin(1)", ".argmax(1)", "test_quantizer.py"),
    Mutant("distances without a centre lose their digits", "quantizer.py", "centre = codebook.mean(0)",
           "centre = 0 * codebook[0]", "test_quantizer.py"),
    Mutant("no straight-through", "quantizer.py", "return vectors + (quantized - vectors).detach()", "return quantized",
           "test_quantizer.py"),
    Mutant("beta on the codebook's term", "quantizer.py", "return F.mse_loss(vectors, quantized.detach())",
           "return F.mse_loss(quantized, vectors.detach())", "test_quantizer.py"),
    Mutant("moving averages with the shares swapped", "quantizer.py", "self.sums.lerp_(hits.T @ flat, 1 - decay)",
           "self.sums.lerp_(hits.T @ flat, decay)", "test_quantizer.py"),
    Mutant("dead codes are counted, not moved", "quantizer.py", "self.sums[dead] = flat[picks.to(flat.device)]", "pass",
           "test_quantizer.py"),
    Mutant("k-means starts anywhere", "quantizer.py", "weights = nearest if nearest.any() else torch.ones(len(flat))",
           "weights = torch.ones(len(flat))", "test_quantizer.py"),
    Mutant("the window is not looked at", "vqgan.py", "if self.cfg.window is None:", "if True:", "test_vqgan.py"),
    Mutant("windows are joined transposed", "vqgan.py", ".permute(0, 3, 1, 4, 2, 5)", ".permute(0, 3, 2, 4, 1, 5)",
           "test_vqgan.py"),
    Mutant("white is not 1", "image_tokenizer.py", "/ 127.5 - 1", "/ 128 - 1", "test_image_tokenizer.py"),
    Mutant("pictures without a budget", "image_tokenizer.py", "self.changed.wait_for(lambda: self.free >= n)", "pass",
           "test_image_tokenizer.py"),
    Mutant("transparent is black", "image_tokenizer.py", 'Image.new("RGBA", picture.size, "white")',
           'Image.new("RGBA", picture.size, "black")', "test_image_tokenizer.py"),
    Mutant("positions run on", "packing.py", "np.arange(end - start)", "np.arange(start, end)", "test_packing.py"),
    Mutant("a target across two documents", "packing.py", "targets[r, start : end - 1] = following",
           "targets[r, start : end] = np.append(following, ids[0])", "test_packing.py"),
    Mutant("a document is lost", "packing.py", "rows[row].append(ids)", "rows[row][:1] = [ids]", "test_packing.py"),
    Mutant("a relation is drawn the other way round", "shapes.py", "along = (high, low) if", "along = (low, high) if",
           "test_shapes.py"),
    Mutant("test pictures leak into training", "shapes.py", "self.background, sorted(zip(", "self.relation, list(zip(",
           "test_shapes.py"),
    Mutant("the oracle guesses", "evaluate/oracle.py", "if left[best] > TOLERANCE * energy[best]:", "if False:",
           "test_oracle.py"),
    Mutant("every epoch in one order", "data/loader.py", "self.seed, epoch, seed_of", "self.seed, 0, seed_of",
           "test_data.py"),
    Mutant("a stage begins its sources anew", "data/loader.py", "self.before[stage][name] + count", "count",
           "test_data.py"),
    Mutant("all stages have the first one's shares", "data/loader.py", "shares = self.shares[stage]",
           "shares = self.shares[0]", "test_data.py"),
    Mutant("prompts are learnt as well", "packing.py", "np.where(answers(ids, answers_from)[1:], following, IGNORE)",
           "following", "test_packing.py"),
    Mutant("an answer's end is not learnt", "packing.py", "np.concatenate([[0], turns[:-1]]) % 2 == 1",
           "turns % 2 == 1", "test_packing.py"),
    Mutant("pictures that are read get noise", "drawing.py", "share = most * drawn[:, None] *", "share = most *",
           "test_drawing.py"),
    Mutant("noise in what is to be written", "drawing.py", "return replace(batch, tokens=tokens)",
           "return replace(batch, tokens=tokens, targets=tokens)", "test_drawing.py"),
    Mutant("noise depends on the rows beside it", "drawing.py", "int(numbers[row])", "row", "test_drawing.py"),
    Mutant("every picture has the same share of noise", "drawing.py", "rng.random((len(codes), 1))", "0.5",
           "test_drawing.py"),
    Mutant("noise tells what the same document shows later", "drawing.py", "documents[ahead] != documents[:, None]",
           "ahead != n[:, None]", "test_drawing.py"),
    Mutant("the second code on is left out", "drawing.py", "targets[row, places[~drawn] - 1]",
           "targets[row, places[~drawn]]", "test_drawing.py"),
    Mutant("a batch is learnt as it comes", "train.py",
           "to_learn(self.loader.batch(number, rows), cfg, vocab)", "self.loader.batch(number, rows)",
           "test_train.py"),
    Mutant("a cut tar passes in silence", "webdataset.py", "if file.read(512) != bytes(512):", "if False:",
           "test_webdataset.py"),
    Mutant("a header's claim is believed", "webdataset.py", "if not 0 <= n <= max(MAX_HEADER, MAX_PICTURE):",
           "if False:", "test_webdataset.py"),
    Mutant("all members are one sample", "webdataset.py", "(begun[-1].key != key or ending in begun[-1].members)",
           "False", "test_webdataset.py"),
    Mutant("a joined tar ends in silence", "webdataset.py", 'if rest.strip(b"\\0"):', "if False:",
           "test_webdataset.py test_units.py"),
    Mutant("a stray quote swallows rows", "folder.py", "csv.reader(lines, strict=True)", "csv.reader(lines)",
           "test_folder.py test_units.py"),
    Mutant("what a quote swallowed is lost", "folder.py", "reversed(self.taken[1:])", "[]",
           "test_folder.py test_units.py"),
    Mutant("commas beyond the header cut a caption", "folder.py", "if len(fields) <= len(header) else", "if True else",
           "test_folder.py test_units.py"),
    Mutant("what is in no unit is not told", "tokenizing.py", "listed.writelines(map(as_line, job.left))", "pass",
           "test_tokenizing.py"),
    Mutant("captions are of any length", "data/reading.py", "caption[:MAX_CAPTION].rstrip()", "caption",
           "test_folder.py test_webdataset.py"),
    Mutant("shards begin where the first one does", "data/shards.py", "self.offsets[first + k] - before",
           "self.offsets[first + k] - 0 * before", "test_data.py"),
    Mutant("a line is in two units", "data/reading.py", "while (place := file.tell()) < end and",
           "while (place := file.tell()) < end + 1 and", "test_units.py"),
    Mutant("pictures of prompts are cropped, those of answers padded", "units.py",
           'form == "chat" and number % 2 == 0', 'form == "chat" and number % 2 == 1', "test_units.py"),
    Mutant("letters are cut in two", "units.py", "byte[0] & 0xC0 == 0x80", "False", "test_units.py"),
    Mutant("the caption is always first", "tokenizing.py", "rng.random() < 0.5", "rng.random() < 2",
           "test_tokenizing.py"),
    Mutant("a picture runs over the end", "tokenizing.py", "if len(ids) + len(part) > room:\n                break",
           "if len(ids) > room:\n                break", "test_tokenizing.py"),
    Mutant("a caption takes its picture's room", "tokenizing.py", "max(0, room - reserved - len(ids))",
           "max(0, room - len(ids))", "test_tokenizing.py"),
    Mutant("half a conversation is kept", "tokenizing.py", "if turns % 2 == 0 and len(ids) <= room:",
           "if len(ids) <= room:", "test_tokenizing.py"),
    Mutant("a long text loses what is behind", "tokenizing.py", "for i in range(0, len(ids), room)],",
           "for i in range(0, min(1, len(ids)), room)],", "test_tokenizing.py"),
    Mutant("bad items of all the unit are in a row", "tokenizing.py", "        in_a_row = 0\n        yield",
           "        yield", "test_tokenizing.py"),
    Mutant("the order of pairs hangs on who makes them", "tokenizing.py", "default_rng((job.seed, number))",
           "default_rng((job.seed, len(list(job.directory.iterdir()))))", "test_tokenizing.py"),
    Mutant("other tokenizers join the folder", "prepared.py", '.get("digest") != tokenizers.digest():', ".get(0):",
           "test_tokenizing.py"),
    Mutant("data and model may mean other things by their ids", "beginning.py",
           "if tokenizers and parts.tokenizers.digest() != tokenizers.digest():", "if False:", "test_prepared.py"),
    Mutant("the image decoder decides ids", "model_folder.py",
           "if not name.startswith(DECODER):\n                x", "if True:\n                x", "test_prepared.py"),
    Mutant("data may change under a run", "prepare.py", "elif kept.read_bytes() != content:", "elif False:",
           "test_prepared.py"),
    Mutant("the report looks at what was trained on", "evaluate/held_out.py", "run.cfg.data.path / TEST",
           'run.cfg.data.path / "pairs"', "test_prepared.py"),
    Mutant("unseen prompts are trained on", "alignment.py", "if turns[0].for_test == self.test:", "if True:",
           "test_alignment.py"),
    Mutant("programs draw one more", "alignment.py", "repeat({len(scene.things)},", "repeat({len(scene.things) + 1},",
           "test_alignment.py"),
    Mutant("an answer that goes on is right", "evaluate/alignment.py", "if len(said) != len(exchange.answer):",
           "said = said[: len(exchange.answer)]\n    if len(said) != len(exchange.answer):", "test_alignment.py"),
    Mutant("a tie is a hit", "evaluate/concepts.py", "(near < near[", "(near <= near[", "test_concepts.py"),
    Mutant("the gallery holds both styles", "evaluate/concepts.py",
           "members, asked = np.flatnonzero(styles == style)", "members, asked = np.flatnonzero(styles != '')",
           "test_concepts.py"),
    Mutant("the ceiling is the wanted picture itself", "evaluate/concepts.py",
           "other = dict(zip(STYLES.values(), reversed(STYLES.values()), strict=True))",
           "other = dict(zip(STYLES.values(), STYLES.values(), strict=True))", "test_concepts.py"),
    Mutant("top 5 of 6", "evaluate/concepts.py", "np.mean(found < k)", "np.mean(found <= k)", "test_concepts.py"),
    Mutant("weights may run code", "evaluate/concepts.py", "weights_only=True", "weights_only=False",
           "test_concepts.py"),
    Mutant("pictures are judged by another caption", "evaluate/concepts.py", "source.numbers[i] for i in asked",
           "source.numbers[i] for i in sorted(asked)", "test_concepts.py"),
    Mutant("the second stage forgets the first", "presets.py", "both = tuple((FIRST | BETTER).items())",
           "both = tuple(BETTER.items())", "test_presets.py"),
    Mutant("one sees the next token", "kernels/attention.py", ".tril(s - t)", ".tril(s - t + 1)",
           "kernels/test_attention.py test_transformer.py"),
    Mutant("documents see one another", "kernels/attention.py",
           "(query_docs[:, :, None] == key_docs[:, None, :])", "(query_docs[:, :, None] == query_docs[:, :, None])",
           "kernels/test_attention.py test_transformer.py"),
    Mutant("key heads go to the wrong queries", "kernels/attention.py",
           "k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)",
           "k.repeat(1, groups, 1, 1), v.repeat(1, groups, 1, 1)", "kernels/test_attention.py test_transformer.py"),
    Mutant("log Z is the largest logit", "kernels/zloss.py", "log_z = (total.log() + largest)[:, 0]",
           "log_z = largest[:, 0]", "kernels/test_zloss.py test_losses.py"),
    Mutant("log Z has no gradient", "kernels/zloss.py", "(g + h)[:, None] / total", "g[:, None] / total",
           "kernels/test_zloss.py test_losses.py"),
    Mutant("the diagonal sees one ahead", "kernels/attention_numba.py", "nk, i - j + 1", "nk, i - j + 2",
           "kernels/test_normed_attention.py"),
    Mutant("an earlier run of the document is forgotten", "kernels/attention_numba.py",
           "while low < t and not same_document(docs, j, low):", "while low < t:", "kernels/test_normed_attention.py"),
    Mutant("scores are trusted to be bounded", "kernels/attention_numba.py", "longest_k * longest_q < BOUND * BOUND",
           "longest_q >= ZERO", "kernels/test_normed_attention.py"),
    Mutant("the last partial register is dropped", "kernels/simd.py", "for i in range(whole, e):\n            poke(out",
           "for i in range(whole, whole):\n            poke(out", "kernels/test_normed_attention.py"),
    Mutant("an ignored row has a gradient", "kernels/zloss_numba.py",
           "fill_row(gradient, size, v, ZERO)\n            continue", "y = 0", "kernels/test_zloss_numba.py"),
    Mutant("a shift that follows leaves the sum behind", "kernels/zloss_numba.py",
           "            sum_ *= np.float32(math.exp(shift - most))\n", "", "kernels/test_zloss_numba.py"),
    Mutant("the shift never follows", "kernels/zloss_numba.py", "if most > shift + ROOM:", "if False:",
           "kernels/test_zloss_numba.py"),
    Mutant("blocks keep the shifts they were summed with", "kernels/zloss_numba.py",
           "factor * np.float32(math.exp(peek(shifts + 4 * (first // BLOCK)) - shift))", "factor",
           "kernels/test_zloss_numba.py"),
    Mutant("what lies behind a row counts", "kernels/simd.py",
           "args = b.inttoptr(p, V.as_pointer()), ir.Constant(i32, 4), lanes_below(b, n), x",
           "args = b.inttoptr(p, V.as_pointer()), ir.Constant(i32, 4), lanes_below(b, b.add(n, n)), x",
           "kernels/test_simd.py"),
    Mutant("a polynomial of one degree less", "kernels/powers.py",
           "scaled(b, ABOVE_FLOOR, x)", "scaled(b, ABOVE_FLOOR[:-1], x)", "kernels/test_simd.py"),
    Mutant("powers of two far below wrap round", "kernels/powers.py",
           "    x = at_least(b, x, -126.0)\n    n = b.fadd(x",
           "    n = b.fadd(x", "kernels/test_simd.py"),
    Mutant("another loss than the foretold one gets its gradient", "kernels/zloss.py",
           "    gradient *= ratio[:, None]\n", "", "kernels/test_zloss_numba.py"),
    Mutant("a correction forgets the target", "kernels/zloss.py", "own = torch.where(counted, share * ratio - g, 0)",
           "own = torch.zeros_like(ratio)", "kernels/test_zloss_numba.py"),
    Mutant("nobody is told that logits are gone", "kernels/zloss.py",
           "        torch.autograd.graph.increment_version(logits)", "        #", "kernels/test_zloss_numba.py"),
    Mutant("one memory serves two gradients", "kernels/zloss.py", "        if ctx.taken:", "        if False:",
           "kernels/test_zloss_numba.py"),
    Mutant("a training step foretells its loss wrongly", "train.py", "Expected(cfg.train.z_loss, mesh.data_size /",
           "Expected(cfg.train.z_loss, 2 * mesh.data_size /", "test_losses.py"),
    Mutant("a target in an earlier chunk is ignored", "kernels/linear_zloss_cpu.py",
           "here.masked_fill(elsewhere, len(part))", "here", "kernels/test_zloss_numba.py"),
    Mutant("each chunk's log Z replaces the last one's", "kernels/linear_zloss_cpu.py",
           "log_z = torch.logaddexp(log_z, forward_rows(logits, anyone)[1])", "log_z = forward_rows(logits, anyone)[1]",
           "kernels/test_zloss_numba.py"),
    Mutant("all logits are held after all", "kernels/linear_zloss_cpu.py", "CHUNKS = 16", "CHUNKS = 1",
           "test_bench_kernels.py"),
    Mutant("memory is summed, not what is held", "bench/memory.py", "event[\"args\"][\"Bytes\"])",
           "abs(event[\"args\"][\"Bytes\"]))", "test_bench_kernels.py"),
    Mutant("a thread's share of the work is lost", "kernels/region_numba.py",
           "n * part // parts, n * (part + 1) // parts", "n // parts * part, n // parts * (part + 1)",
           "kernels/test_launch.py"),
    Mutant("threads share their scratch", "kernels/region_numba.py", "peek_int(p + 40) * next_of(p + 48)",
           "0 * next_of(p + 48)", "kernels/test_launch.py"),
    Mutant("NaN becomes a number", "kernels/powers.py", "y, b.fadd(x, constant(math.inf)))", "y, y)",
           "kernels/test_zloss_numba.py"),
    Mutant("a row of -infinity has a finite log Z", "kernels/zloss_numba.py", "np.float32(-math.inf)",
           "np.float32(-1e30)", "kernels/test_zloss_numba.py"),
    Mutant("nobody waits for the helpers", "kernels/launch.py", "            other.result()", "            pass",
           "kernels/test_launch.py"),
    Mutant("code for one GPU goes to its neighbours", "kernels/dispatch.py", "(10, 0): \"sm_100a\"",
           "(10, minor): \"sm_100a\"", "kernels/test_dispatch.py"),
    Mutant("an unmet wish is ignored", "kernels/dispatch.py", "    if refusal := refused(name, op, device, dtype):",
           "    if (refusal := refused(name, op, device, dtype)) and False:",
           "kernels/test_dispatch.py"),
    Mutant("a CUDA call has one argument less", "kernels/gpu.py", "arguments = logits, targets, loss, log_z, v, float",
           "arguments = logits, targets, loss, v, float", "kernels/test_zloss_cuda.py"),
    Mutant("shared memory for one tile less", "kernels/gpu.py", "tile_bytes(5 * TILE, e)", "tile_bytes(4 * TILE, e)",
           "kernels/test_attention_cuda.py"),
    Mutant("a tile is used before it has arrived", "kernels/attention.cu", "copies_wait<1>();", "copies_wait<2>();",
           "kernels/test_attention_cuda.py"),
    Mutant("a tile is overwritten while it is read", "kernels/attention.cu",
           "__syncthreads();  // the stage is no longer read", "", "kernels/test_attention_cuda.py"),
    Mutant("sums keep the scale of an older maximum", "kernels/tiles.cuh", "sum[r] *= grown[r];", "",
           "kernels/test_attention_cuda.py"),
    Mutant("two fragments change places", "kernels/tiles.cuh", "mma(s[2 * n], a, b[0], b[2]);",
           "mma(s[2 * n], a, b[0], b[1]);", "kernels/test_attention_cuda.py"),
    Mutant("positions behind the last are not zeros", "kernels/tiles.cuh", "bool in = from + row < t;",
           "bool in = true;", "kernels/test_attention_cuda.py"),
    Mutant("queries of later tiles are forgotten", "kernels/attention_backward.cu",
           "end = max(end, last[(long long)b * t + j] + 1)", "end = max(end, j + 1)", "kernels/test_attention_cuda.py"),
    Mutant("a score's gradient without its sum", "kernels/attention_backward.cu", "(dp[n][x] - deltas[stage][column])",
           "dp[n][x]", "kernels/test_attention_cuda.py"),
    Mutant("the first query head of a key head gets all", "kernels/attention_backward.cu",
           "int h = g * shared_by + tile / tiles,", "int h = g * shared_by,", "kernels/test_attention_cuda.py"),
    Mutant("an id sees the place behind its own", "kernels/decode.cu", "positions[n * t + token] + 1 - from",
           "positions[n * t + token] + 2 - from", "kernels/test_decode_attention.py"),
    Mutant("pieces are joined without their scales", "kernels/decode.cu",
           "float weight = power(scales[i * rows + row].x - most) / sum;", "float weight = 1.f / sum;",
           "kernels/test_decode_attention.py"),
    Mutant("every head has the first one's norm", "kernels/norm_rotary.cu", "weight += head * pairs;", "",
           "kernels/test_attention_cuda.py"),
    Mutant("nobody waits for the row's bulk copies", "kernels/zloss.cu", "  barrier_wait(&barrier, 0);", "",
           "kernels/test_zloss_cuda.py"),
    Mutant("the loss reads the gradient", "kernels/zloss.cu", "z - wide(((const T*)stage)[y]);", "z - wide(x[y]);",
           "kernels/test_zloss_cuda.py"),
    Mutant("pieces of a tile lie where no product looks", "kernels/attention_sm90.cu", "(piece % 8 ^ row % 8) * 4",
           "piece % 8 * 4", "kernels/test_attention_cuda.py"),
    Mutant("each chunk forgets the ones before", "kernels/linear_zloss_cuda.py", "d_weight.addmm_(",
           "d_weight.zero_().addmm_(", "kernels/test_zloss_cuda.py"),
    Mutant("the compiler's built-ins are left to luck", "kernels/nvrtc.py", "ctypes.CDLL(str(builtins))", "pass",
           "kernels/test_cuda.py"),
    Mutant("a changed header is not seen", "kernels/nvrtc.py", "{text}{headers()}", "{text}", "kernels/test_cuda.py"),
    Mutant("the norm's gradient is that of a plain factor", "kernels/rms_norm_numba.py",
           "(load(g + 4 * i) - load(row + 4 * i) * mean)", "load(g + 4 * i)", "kernels/test_rms_norm.py"),
    Mutant("the gate's own slope is left out", "kernels/swiglu_numba.py",
           "s * (splat(ONE) + x * (splat(ONE) - s))", "s", "kernels/test_swiglu.py"),
    Mutant("the caller's logits are overwritten", "kernels/zloss.py",
           "        ctx.dtype = logits.dtype\n        loss =",
           "        ctx.dtype = logits.dtype\n        x.zero_()\n        loss =",
           "kernels/test_zloss.py"),
    Mutant("positions begin at 1", "transformer.py", "positions[:, None, :, None].float()",
           "(positions[:, None, :, None] + 1).float()", "test_transformer.py"),
    Mutant("QK-norm without the mean", "kernels/normed_attention.py", "F.layer_norm(x, x.shape[-1:], eps=eps)",
           "F.rms_norm(x, x.shape[-1:], eps=eps)", "test_transformer.py"),
    Mutant("queries are not normalised", "transformer.py", "for norm in (self.q_norm, self.k_norm)]",
           "for norm in (None, self.k_norm)]", "test_transformer.py"),
    Mutant("the document mask is dropped", "transformer.py",
           "mask = doc_ids if cache is None", "mask = None if cache is None", "test_transformer.py"),
    Mutant("the norm stays before the branch", "transformer.py", 'if self.norm_order == "pre":',
           'if self.norm_order != "none":', "test_transformer.py"),
    Mutant("dropout in sampling too", "transformer.py", "if not self.training or not self.dropout:",
           "if not self.dropout:", "test_transformer.py"),
    Mutant("all layers drop alike", "transformer.py", "None if keys is None else derive(keys, i)", "keys",
           "test_transformer.py"),
    Mutant("both branches drop alike", "transformer.py", "derive(keys, number), self.dropout)", "keys, self.dropout)",
           "test_transformer.py"),
    Mutant("a place is dropped in every row", "kernels/dropout.py", "+ high[:, None])", "+ 0 * high[:, None])",
           "kernels/test_dropout.py"),
    Mutant("a cache shows what is not written yet", "transformer.py",
           "device=self.positions.device) <= self.positions[:, :, None]",
           "device=self.positions.device) <= self.positions[:, :, None] + 1", "test_transformer.py test_engine.py"),
    Mutant("the cache is one place off", "transformer.py", "[rows, self.positions] = new",
           "[rows, self.positions - 1] = new", "test_transformer.py"),
    Mutant("branches start at full size", "transformer.py", "branches = 2 * self.cfg.n_layers if", "branches = 1 if",
           "test_transformer.py"),
    Mutant("a mean of means", "losses.py", "(self.cross_entropy + z_loss * self.z) / count",
           "(self.cross_entropy + z_loss * self.z) / self.count", "test_losses.py"),
    Mutant("padding enters the z-loss", "losses.py", "z=log_z.square().sum()", "z=logits.logsumexp(-1).square().sum()",
           "test_losses.py"),
    Mutant("QK-norm vectors decay", "optim.py", 'parameter.ndim >= 2 and "norm" not in name', "parameter.ndim >= 2",
           "test_optim.py"),
    Mutant("torch's eps, not the paper's", "optim.py", "betas=cfg.betas, eps=cfg.eps, fused", "betas=cfg.betas, fused",
           "test_optim.py"),
    Mutant("warm-up reaches the peak too soon", "optim.py", "(step + 1) / (cfg.warmup + 1)",
           "(step + 2) / (cfg.warmup + 1)",
           "test_optim.py"),
    Mutant("any tensors in a checkpoint's folder are read", "checkpoint.py", "reader.fs.ls = lambda folder: files",
           "pass", "test_checkpoint.py"),
    Mutant("ids that have changed are trained on", "data/shards.py", "if zlib.crc32(ids) != expected:", "if False:",
           "test_data.py"),
    Mutant("offsets are in any order", "data/shards.py", "(self.sizes(first, last) > 0).all()", "True", "test_data.py"),
    Mutant("rows of other shards are taken", "data/loader.py", "(*names, Shards.INDEX)", "names", "test_data.py"),
    Mutant("a flipped byte passes", "checkpoint.py", 'if sha256(file) != entry.get("sha256"):', "if False:",
           "test_checkpoint.py"),
    Mutant("the optimizer forgets", "checkpoint.py", "[field] = tensor.clone()", "[field] = torch.zeros_like(tensor)",
           "test_checkpoint.py"),
    Mutant("a configuration's tuples come back as lists", "run.py",
           "return tuple(build(k, v, name) for k, v in zip(kinds, value, strict=True))",
           "return [build(k, v, name) for k, v in zip(kinds, value, strict=True)]", "test_run.py"),
    Mutant("QK-norm vectors keep their order", "layouts.py",
           "return half_split(x.flatten(), cfg.head_dim).view(x.shape).repeat_interleave(heads // len(x), 0)",
           "return x.repeat_interleave(heads // len(x), 0)", "test_parity.py"),
    Mutant("wq and wk keep their order", "layouts.py", 'return name.endswith((".wq.weight", ".wk.weight"))',
           "return False", "test_parity.py"),
    Mutant("groups of QK-norm are dealt out in turn", "layouts.py", "x[shard * len(x) // n_shards].clone()",
           "x[shard % len(x)].clone()", "test_layouts.py test_convert.py"),
    Mutant("a shard takes the whole matrix along to the disk", "layouts.py",
           "x.chunk(n_shards, cut)[shard].clone(memory_format=torch.contiguous_format)",
           "x.chunk(n_shards, cut)[shard]", "test_layouts.py"),
    Mutant("copies that differ pass in silence", "layouts.py", "all(torch.equal(part, parts[0]) for part in parts)",
           "True", "test_layouts.py"),
    Mutant("the context is forgotten", "layout_files.py", '("qk_norm_groups", "max_seq_len")', '("qk_norm_groups",)',
           "test_layouts.py"),
    Mutant("GQA is claimed without it", "layout_files.py", "if cfg.kv_heads != cfg.n_heads:", "if True:",
           "test_layouts.py"),
    Mutant("a pickle runs", "tensor_files.py", "weights_only=True, mmap", "weights_only=False, mmap",
           "test_convert.py"),
    Mutant("a map stays for good", "tensor_files.py", "if self.given and self.given + size > REMAP // self.n_shards:",
           "if False:", "test_convert.py"),
    Mutant("a leftover tensor passes", "model_folder.py", 'if names:', 'if names and what == "misses":',
           "test_convert.py"),
    Mutant("the decoder is left behind", "convert.py", "if parts.has_decoder:\n        decoder",
           "if False:\n        decoder", "test_convert.py test_parity.py"),
    Mutant("files appear under their name at once", "convert.py", 'f".tmp-{args.dst.name}-{os.getpid()}"',
           "args.dst.name", "test_convert.py"),
    Mutant("a running conversion is swept away", "files.py", "or not alive(int(pid))", "or True", "test_convert.py"),
    Mutant("our note overrides the file", "layout_files.py", "content.get(NOTE, {}).items() if name in NOTED[layout]",
           "content.get(NOTE, {}).items()", "test_convert.py"),
    Mutant("a short path has no parent", "model_folder.py", "Path(os.path.abspath(folder)).parent", "folder.parent",
           "test_convert.py"),
    Mutant("a run deletes what it begins with", "beginning.py",
           "if cfg.init_from.resolve().is_relative_to(cfg.folder.resolve()):", "if False:", "test_train.py"),
    Mutant("a stopped run asks for its source again", "beginning.py", "if begun := begun_from(cfg):",
           "if begun := None:", "test_train.py"),
    Mutant("transformers' scale of pixels", "image_tokenizer.py", "* 0.0078 - 1", "/ 127.5 - 1", "test_parity.py"),
    Mutant("weights are not taken over", "model_folder.py", "    copy_weights(parts, model)\n", "    pass\n",
           "test_convert.py"),
    Mutant("top-k keeps one more", "sampling.py", "device=logits.device) < k[:, None]",
           "device=logits.device) <= k[:, None]", "test_sampling.py"),
    Mutant("top-p stops before it reaches p", "sampling.py", "((before < p) | (p >= 1))",
           "((before + probs < p) | (p >= 1))", "test_sampling.py"),
    Mutant("a penalty that rewards", "sampling.py", "torch.where(logits > 0, logits / penalty, logits * penalty)",
           "logits / penalty", "test_sampling.py test_engine.py"),
    Mutant("guidance with its scales swapped", "sampling.py", "for scale in (text_scale, image_scale)",
           "for scale in (image_scale, text_scale)", "test_sampling.py test_engine.py"),
    Mutant("a picture is one code short", "sampling.py", "turns[:, :, vocab.boi] = n_codes",
           "turns[:, :, vocab.boi] = n_codes - 1", "test_sampling.py test_engine.py"),
    Mutant("a picture begins without room", "sampling.py", "self.room >= self.n_codes + 2", "self.room >= self.n_codes",
           "test_sampling.py"),
    Mutant("an old picture stays in the empty branch", "decoder.py", "torch.where(begins, 1, length)", "length",
           "test_engine.py"),
    Mutant("the branch of pictures reads words", "decoder.py", "((reads == FULL) | of_picture)", "(reads >= FULL)",
           "test_engine.py"),
    Mutant("rows draw one another's numbers", "decoder.py", "self.uniforms[row, : task.room] =",
           "self.uniforms[:, : task.room] =", "test_engine.py"),
    Mutant("a row that waits writes over its prompt", "decoder.py", "self.length[row] = start + len(ids)  #", "pass  #",
           "test_engine.py"),
    Mutant("a row leaves its seat to nobody", "engine.py", "                last.place = gap", "                pass",
           "test_engine.py"),
    Mutant("a look comes one code late", "engine.py", "min(sample.left for sample in samples) + 1 if",
           "min(sample.left for sample in samples) + 2 if", "test_engine.py"),
    Mutant("the last partial picture is told twice", "events.py", "(len(self.picture) - 1) % self.preview == 0",
           "len(self.picture) % self.preview == 0", "test_engine.py"),
    Mutant("keys are kept for values", "cpu/layers.py", "projected(m, i, m.n_heads + m.kv_heads + g)",
           "projected(m, i, m.n_heads + g)", "test_decode_cpu.py"),
    Mutant("a scale of the neighbour", "cpu/products.py", "scales = scale + 4 * n", "scales = scale + 4 * first",
           "test_decode_cpu.py"),
    Mutant("the last of k are left out", "cpu/products.py", 'icmp_signed("<", whole, k)', 'icmp_signed(">", whole, k)',
           "test_decode_cpu.py"),
    Mutant("the last of equal ones comes first", "cpu/choose.py", "(line[i] == line[j] and i < j)",
           "(line[i] == line[j] and i > j)", "test_decode_cpu.py"),
    Mutant("top-p counts what top-k left out", "cpu/choose.py", "mass, taken, size = taken, 0.0, end",
           "taken, size = 0.0, end", "test_decode_cpu.py"),
    Mutant("a picture is a code short on a CPU", "cpu/choose.py", "left - 1 if left >= 0", "left - 2 if left >= 0",
           "test_decode_cpu.py"),
    Mutant("the empty branch goes on with the old picture", "cpu/steps.py", "position = 1 if reads == NOTHING and",
           "position = 1 if False and", "test_engine.py"),
    Mutant("gate and value are swapped", "decode_torch.py", "gate, up =", "up, gate =", "test_decode_torch.py"),
    Mutant("what stands apart passes for joined", "decode_torch.py", "== starts and", "!= starts or",
           "test_decode_torch.py"),
    Mutant("int8 is scaled behind the product", "quantize.py", ".to(x.dtype).mul_(self.scale[columns, None]))",
           ".to(x.dtype)) * self.scale[columns].to(x.dtype)", "test_quantize.py"),
    Mutant("a wrong stop joins the batch", "engine.py", "    check_stops(mode, stops, vocab)\n", "", "test_engine.py"),
    Mutant("a picture of too many codes is text", "engine.py", "begun is not None and left < 0", "False",
           "test_engine.py"),
    Mutant("a stop begins a picture", "events.py", "== self.vocab.boi and not last", "== self.vocab.boi",
           "test_engine.py"),
    Mutant("int8 that wraps round", "quantize.py", "abs().amax(1) / 127", "abs().amax(1) / 128", "test_quantize.py"),
    Mutant("ratios upside down", "bench/rows.py", "taken[p] / taken[ours]", "taken[ours] / taken[p]", "test_bench.py"),
    Mutant("norm vectors keep our order of pairs", "bench/engine.py",
           "half_split(each.flatten(), heads).view(heads, -1)", "each", "test_bench.py"),
    Mutant("dropout draws on from anywhere", "train.py", "keys = derive(places[rows], cfg.seed)",
           "keys = derive(places[rows], int(torch.randint(99, ())))", "test_train.py"),
    Mutant("a reader that has gone ends the run", "printing.py",
           "                self.stream.flush()\n            except (OSError, ValueError) as error:",
           "                self.stream.flush()\n            except ValueError as error:", "test_printing.py"),
    Mutant("a file takes the place of stderr", "printing.py", "os.open(os.devnull, os.O_RDWR)", "pass",
           "test_printing.py"),
    Mutant("a joiner is taken for a command", "printing.py", "\\x9f\\u202a", "\\x9f\\u200c\\u202a", "test_printing.py"),
    Mutant("a clear screen passes", "printing.py", "\\x0e-\\x1f", "\\x0e-\\x1a\\x1c-\\x1f", "test_printing.py"),
    Mutant("what to do is cut off", "printing.py", "{line[-160:]}", "{line[135:295]}", "test_printing.py"),
    Mutant("a rank alone fails without a word", "errors.py", "int(world) > 1", "int(world) > 0", "test_errors.py"),
    Mutant("two samplers write one picture", "files.py", "path.touch(exist_ok=False)", "path.touch()",
           "test_sample_cli.py"),
    Mutant("an out that cannot be written is found after drawing", "sample.py", "        shelf.check()\n", "",
           "test_sample_cli.py"),
    Mutant("a folder is drawn as words", "sample.py", "if os.path.lexists(path):", "if False:", "test_sample_cli.py"),
    Mutant("a folder called ~", "cli.py", "os.path.expanduser(value)", "value", "test_cli.py"),
    Mutant("a letter that the font lacks is a box", "report.py", "ord(c) in letters or c.isspace()", "True",
           "test_report.py"),
    Mutant("a question's turn stays open", "sample.py", '"answer": "answer", ', "", "test_sample_cli.py"),
    Mutant("an aligned run is not asked but gone on from", "sample.py", '"chat": "answer"}', '"chat": "go on"}',
           "test_sample_cli.py"),
    Mutant("ranks divide by what they have alone", "train.py",
           "(count,) = mesh.total(float((batch.targets != IGNORE).sum()))",
           "count = float((batch.targets != IGNORE).sum())", "test_distributed.py"),
    Mutant("the mean over ranks stands for their sum", "train.py", "(loss * mesh.data_size).backward()",
           "loss.backward()", "test_distributed.py"),
    Mutant("each rank drops what the first one drops", "train.py", "keys = derive(places[rows], cfg.seed)",
           "keys = derive(places[: rows.stop - rows.start], cfg.seed)", "test_distributed.py"),
    Mutant("all ranks read the same rows", "distributed.py", "return slice(which * each, (which + 1) * each)",
           "return slice(0, each)", "test_distributed.py"),
    Mutant("ranks with parts of a layer do not sum QK-norm's gradients", "transformer.py",
           "x.to_local(grad_placements=[Partial()])[mine]", "x.to_local()[mine]", "test_distributed.py"),
    Mutant("log Z is that of the rank's own columns", "losses.py", "log_z = largest + total.log()",
           "log_z = part + 0 * total", "test_distributed.py"),
    Mutant("each rank's part of log Z has the whole gradient", "losses.py",
           "return g * (part - log_z).exp(), h, None", "return g, h, None", "test_distributed.py"),
    Mutant("only the first rank's shards are in the manifest", "saver.py", "for part in entries for name",
           "for part in entries[:1] for name", "test_faults.py"),
    Mutant(
        "what led to a streak of failures is saved", "train.py", "(self.owed and not p.failed)", "self.owed",
        "test_train.py",
    ),
    Mutant(
        "a save that fell into a streak is not made up for", "train.py",
        "            self.owed |= p.step", "            self.owed = p.step", "test_train.py",
    ),
    Mutant(
        "roll-backs long ago count", "train.py", "self.rolled_back.count(path) == ROLL_BACKS",
        "len(self.rolled_back) == ROLL_BACKS", "test_train.py",
    ),
    Mutant(
        "others do not hear of Ctrl-C", "distributed.py", "except (Exception, KeyboardInterrupt) as problem",
        "except Exception as problem", "test_distributed.py",
    ),
    Mutant(
        "no factor, nothing to correct", "kernels/zloss_numba.py", "return x if abs(x) > LEAST_FACTOR else",
        "return x if True else", "kernels/test_zloss_numba.py",
    ),
    Mutant("a run that is killed early decides its precision anew", "run.py",
           '"auto" if cfg.overwrite else begun_with(cfg.folder)', '"auto"', "test_train.py"),
    Mutant("a lock that its owner has removed is taken", "run.py", "if not os.fstat(file.fileno()).st_nlink:",
           "if False:", "test_run.py"),
    Mutant("ranks outlive their torchrun", "stopping.py", "self.launcher not in (None, os.getppid())", "False",
           "test_faults.py"),
    Mutant("a restart by torchrun starts anew", "train.py", 'if environment("TORCHELASTIC_RESTART_COUNT", 0):',
           "if False:", "test_train.py"),
    Mutant("a last save that failed is let pass", "saver.py", "if problem and must:", "if False:", "test_faults.py"),
    Mutant("a save that failed ends the run", "saver.py", "if problem and must:", "if problem:", "test_faults.py"),
    Mutant("rolled back to the same batches", "train.py", "= before.step + before.passed - self.progress.step", "= 0",
           "test_train.py"),
    Mutant("a batch that is not finite moves the weights", "train.py", "            p.left_out += 1",
           "            self.move(lr)", "test_train.py"),
    Mutant("attention logits without their scale", "watch.py", "/ math.sqrt(attention.head_dim)", "/ 1.0",
           "test_watch.py"),
    Mutant("attention logits that nobody sees count", "watch.py", "~visible(doc_ids, doc_ids)[:, None]",
           "~visible(doc_ids, doc_ids)[:, None] & False", "test_watch.py"),
    Mutant("attention is counted twice", "scaling.py", "attention = 6 * cfg.n_layers", "attention = 12 * cfg.n_layers",
           "test_scaling.py"),
    Mutant("a stopped study goes on", "stability.py", "except GaveUp as error:", "except Exception as error:",
           "test_stability.py"),
    Mutant("a save deletes files that are being written", "checkpoint.py", 'glob(".tmp-*/")', 'glob(".tmp-*")',
           "test_checkpoint.py"),
    Mutant("float32 is taken for the default type", "kernels/zloss.py",
           'torch.empty(len(logits), dtype=torch.float32, device="cpu") for _ in range(2))\n    _run("forward"',
           'torch.empty(len(logits)) for _ in range(2))\n    _run("forward"', "kernels/test_inputs.py"),
    Mutant("the best checkpoint is deleted", "checkpoint.py", "if path == best and", "if False and",
           "test_checkpoint.py"),
    Mutant("a spike is a divergence", "stability.py", '"diverged": not end < best + 0.5',
           '"diverged": not max(losses) < best + 3.0', "test_stability.py"),
]  # fmt: skip

if why_not() is None:  # without AMX the tests of what runs on its tiles are skipped
    MUTANTS += [
        Mutant("on tiles, the diagonal sees one ahead", "kernels/attention_amx.py", "return ahead + c if c < nk",
               "return ahead + c - 1 if c < nk", "kernels/test_normed_attention.py"),
        Mutant("on tiles, keys behind a run's end are seen", "kernels/attention_amx.py", "if c < nk else BLOCK",
               "if c < BLOCK else BLOCK", "kernels/test_normed_attention.py"),
        Mutant("on tiles, an earlier run of the document is forgotten", "kernels/attention_amx.py",
               "if same_document(docs, run, start):", "if run == start:", "kernels/test_normed_attention.py"),
        Mutant("on tiles, scores are trusted to be bounded", "kernels/attention_amx.py",
               "longest_k * longest_q < BOUND * BOUND", "longest_q >= ZERO", "kernels/test_normed_attention.py"),
        Mutant("memory behind the last key is not cleared", "kernels/attention_amx.py",
               "for i in range(0, padded(job.t), BLOCK)", "for i in range(0, job.t, BLOCK)",
               "kernels/test_normed_attention.py"),
        Mutant("pairs hold one row twice", "kernels/amx.py", "b.lshr(_nearest(b, x)", "b.lshr(_nearest(b, y)",
               "kernels/test_normed_attention.py"),
        Mutant("on tiles, a pair is turned the other way", "kernels/attention_lanes_amx.py",
               "x * cos - y * sin, y * cos + x * sin", "x * cos + y * sin, y * cos - x * sin",
               "kernels/test_normed_attention.py"),
        Mutant("on tiles, a bias has its neighbour's gradient", "kernels/attention_lanes_amx.py",
               "add(bias + 4 * W, h)", "add(bias + 4 * W, g)", "kernels/test_normed_attention.py"),
        Mutant("on tiles, one tile's norm gradients are kept for the next head", "kernels/attention_amx.py",
               "            clear(at.norm, 2 * W * width)\n", "", "kernels/test_normed_attention.py"),
        Mutant("each span of rows starts a weight's gradient anew", "kernels/weight_gradient_amx.py", "if k == 0:",
               "if True:", "kernels/test_weight_gradient.py"),
        Mutant("the margin of a block holds anything", "kernels/amx.py", "    clear(spare, SQUARE // 4)\n", "",
               "kernels/test_weight_gradient.py"),
        Mutant("rows of half words are taken for rows of words", "kernels/amx.py", " and row % 4 == 0:", ":",
               "kernels/test_normed_attention.py"),
        Mutant("tiles for weights' gradients where nobody asked", "kernels/linear.py", 'name == "amx", *weights',
               "True, *weights", "kernels/test_weight_gradient.py"),
        Mutant("tiles where there are none", "kernels/dispatch.py",
               "if op in AMX and why_not_amx(device, dtype) is None:", "if op in AMX and dtype == torch.bfloat16:",
               "kernels/test_dispatch.py"),
    ]  # fmt: skip


def source(mutant: Mutant, root: Path) -> Path:
    """Where its file is in a copy, where kernels lies inside the package, as installing maps it."""
    return root / mutant.file if mutant.file in SCRIPTS else root / "nanochameleon" / mutant.file


def copy(target: Path) -> None:
    """Package, kernels, scripts, tests, pages and pytest's settings, laid out so that PYTHONPATH alone finds them."""
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "nanochameleon", target / "nanochameleon", ignore=ignore)
    shutil.copytree(ROOT / "kernels", target / "nanochameleon" / "kernels", ignore=ignore)
    shutil.copytree(ROOT / "tests", target / "tests", ignore=ignore)
    shutil.copytree(ROOT / "docs", target / "docs", ignore=shutil.ignore_patterns("*.png"))
    for name in (*SCRIPTS, "pyproject.toml"):
        shutil.copy(ROOT / name, target)


HERE = """
import sys, pathlib, nanochameleon, nanochameleon.kernels, pytest
for module in (nanochameleon, nanochameleon.kernels):
    assert pathlib.Path(module.__file__).is_relative_to(pathlib.Path.cwd()), f"{module.__file__} is not of the copy"
sys.exit(pytest.main(sys.argv[1:]))
"""  # an installed nanochameleon must not be the one that is tested


def run_tests(folder: Path, tests: list[str]) -> subprocess.CompletedProcess:
    """pytest's exit status: 0 green, 1 a test is red; anything else is no answer."""
    env = os.environ | {"PYTHONPATH": str(folder), "NANOCHAMELEON_NO_SHRINK": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", HERE, "-x", "-q", "-p", "no:cacheprovider", *(f"tests/{name}" for name in tests)]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


def try_mutant(mutant: Mutant) -> str:
    """'red', or what is wrong."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        copy(folder)
        path = source(mutant, folder)
        text = path.read_text()
        if text.count(mutant.old) != 1:
            return f"its text stands {text.count(mutant.old)} times in {mutant.file}"
        path.write_text(text.replace(mutant.old, mutant.new))
        for test in mutant.tests.split():
            result = run_tests(folder, [test])
            if result.returncode != 1:
                return f"SURVIVED {test}" if result.returncode == 0 else f"{test} did not run: {result.stdout[-300:]}"
    return "red"


def green(mutants: list[Mutant]) -> bool:
    tests = sorted({test for mutant in mutants for test in mutant.tests.split()})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        copy(folder)
        result = run_tests(folder, tests)
    if result.returncode:
        print(f"the tests are red without a mutant:\n{result.stdout[-3000:]}{result.stderr[-1000:]}", file=sys.stderr)
    return result.returncode == 0


def main(words: list[str]) -> int:
    mutants = [m for m in MUTANTS if not words or any(word in m.file for word in words)]
    print("the tests without a mutant ...", file=sys.stderr)
    if not mutants or not green(mutants):
        return 1
    outcomes: dict[Mutant, str] = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = {pool.submit(try_mutant, mutant): mutant for mutant in mutants}
        for job in tqdm(as_completed(jobs), total=len(jobs), desc="mutants", unit="bug"):
            outcomes[jobs[job]] = job.result()
    for mutant in mutants:
        print(f"{mutant.file:22} {mutant.bug:46} {outcomes[mutant]}")
    survivors = sum(outcome != "red" for outcome in outcomes.values())
    print(f"{len(mutants) - survivors} of {len(mutants)} turned a test red")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
