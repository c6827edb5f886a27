"""Convert the text tokenizer's JSON to and from Hugging Face's layout, and write the files of its processor.

Both layouts hold the JSON of the `tokenizers` library. Hugging Face's gives a reserved name to the token of an image.
"""

import copy

from nanochameleon.config import VQGANConfig
from nanochameleon.errors import shown
from nanochameleon.vocab import Vocab

PLACEHOLDER = "<image>"  # Hugging Face's name for the reserved token after the end of turn (8711)


def bos_first() -> dict:
    """Return the post-processor that makes `tokenizers` put <s> first, as Meta's own code does."""
    bos = "<s>"
    word, text = {"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    pair = [word, text, {"SpecialToken": {"id": bos, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
    special = {bos: {"id": bos, "ids": [Vocab.bos], "tokens": [bos]}}
    return {"type": "TemplateProcessing", "single": [word, text], "pair": pair, "special_tokens": special}


def renamed(content: dict, old: str, new: str) -> dict:
    """Return a tokenizer's JSON in which one special token has another name."""
    content = copy.deepcopy(content)
    content["model"]["vocab"] = {new if name == old else name: i for name, i in content["model"]["vocab"].items()}
    for token in content["added_tokens"]:
        token["content"] = new if token["content"] == old else token["content"]
    return content


def tokenizer_to_hf(content: dict, vocab: Vocab) -> dict:
    """text_tokenizer.json -> tokenizer.json: a reserved token is named <image>, and <s> is put first.

    Raises ValueError where no token is reserved after the end of turn, or where the file has no name for it.
    """
    if vocab.eot + 1 >= vocab.first_text or vocab.name(vocab.eot + 1) not in vocabulary_map(content):
        raise ValueError("its vocabulary has no reserved name after the end of turn for Hugging Face's <image>")
    content = renamed(content, vocab.name(vocab.eot + 1), PLACEHOLDER)
    return content | {"post_processor": content.get("post_processor") or bos_first()}


def tokenizer_from_hf(content: dict) -> dict:
    """Inverse of tokenizer_to_hf. A post-processor other than the one that was added stays."""
    names, after = vocabulary_map(content), content.get("post_processor")
    if PLACEHOLDER in names:
        content = renamed(content, PLACEHOLDER, f"<reserved{names[PLACEHOLDER] - Vocab.first_code:05d}>")
    return content | {"post_processor": None if after == bos_first() else after}


def vocabulary_map(content: dict) -> dict[str, int]:
    """Return name -> token of all names, for config.json. Raises ValueError for a file of another form."""
    try:
        return content["model"]["vocab"] | {token["content"]: token["id"] for token in content["added_tokens"]}
    except (KeyError, TypeError) as error:
        raise ValueError(f"its text tokenizer has no table of names and tokens ({shown(error)})") from None


def processor_files(vocab: Vocab, vqgan: VQGANConfig) -> dict[str, dict]:
    """Return file name -> content of what ChameleonProcessor and generate() read next to config.json.

    Pixels are scaled by 2/255, as by Meta; transformers' own default, 0.0078, maps white to 0.989 instead of 1.
    """
    side = vqgan.resolution
    special = dict(bos_token=vocab.bos, eos_token=vocab.eos, unk_token=vocab.unk, pad_token=vocab.pad)
    names = {role: vocab.name(token) for role, token in special.items()} | {"sep_token": vocab.name(vocab.eot)}
    processor = dict(
        image_processor_type="ChameleonImageProcessor", processor_class="ChameleonProcessor", do_convert_rgb=True,
        do_resize=True, size={"shortest_edge": side}, resample=1, do_center_crop=True,
        crop_size={"height": side, "width": side}, do_rescale=True, rescale_factor=2 / 255, do_normalize=True,
        image_mean=[1.0] * 3, image_std=[1.0] * 3,
    )  # fmt: skip
    image = dict(image_seq_length=vqgan.codes_per_image, image_token=PLACEHOLDER)
    return {
        "generation_config.json": dict(bos_token_id=vocab.bos, eos_token_id=vocab.eos, pad_token_id=vocab.pad),
        "preprocessor_config.json": processor,
        "processor_config.json": dict(processor_class="ChameleonProcessor", **image),
        "special_tokens_map.json": names,
        "tokenizer_config.json": dict(
            tokenizer_class="PreTrainedTokenizerFast", processor_class="ChameleonProcessor",
            clean_up_tokenization_spaces=False, model_max_length=10**30, **names,
        ),
    }  # fmt: skip
