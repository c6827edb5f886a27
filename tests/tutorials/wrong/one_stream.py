"""Plausible wrong answers to lesson 3's exercises."""

import torch

from nanochameleon.documents import Image, Text
from nanochameleon.packing import IGNORE
from nanochameleon.vocab import Vocab


def sees_only_what_is_before(doc_ids):
    return torch.ones(len(doc_ids), len(doc_ids), dtype=torch.bool).tril(-1) & (doc_ids[:, None] == doc_ids)


def sees_all_documents(doc_ids):
    return torch.ones(len(doc_ids), len(doc_ids), dtype=torch.bool).tril()


def sees_the_future(doc_ids):
    return doc_ids[:, None] == doc_ids


def positions_run_through_the_sequence(doc_ids):
    return torch.arange(len(doc_ids))


def positions_from_one(doc_ids):
    return ((doc_ids[:, None] == doc_ids).tril().sum(1)).where(doc_ids >= 0, 0)


def target_crosses_the_border(tokens, doc_ids):
    return torch.cat([tokens[1:].where(doc_ids[1:] >= 0, IGNORE), torch.tensor([IGNORE])])


def target_is_the_token_itself(tokens, doc_ids):
    return tokens.where(doc_ids >= 0, IGNORE)


def padding_is_learnt(tokens, doc_ids):
    same = doc_ids[1:] == doc_ids[:-1]
    return torch.cat([tokens[1:].where(same, IGNORE), torch.tensor([IGNORE])])


def mean_for_sum(logits, targets, z_loss):
    cross_entropy = torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORE)
    return cross_entropy + z_loss * logits.logsumexp(-1)[targets != IGNORE].square().mean()


def z_loss_of_all_places(logits, targets, z_loss):
    cross_entropy = torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")
    return cross_entropy + z_loss * logits.logsumexp(-1).square().sum()


def z_loss_not_squared(logits, targets, z_loss):
    cross_entropy = torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")
    return cross_entropy + z_loss * logits.logsumexp(-1)[targets != IGNORE].sum()


V = Vocab()
WRONG = {
    "visible": [sees_only_what_is_before, sees_all_documents, sees_the_future],
    "positions": [positions_run_through_the_sequence, positions_from_one],
    "targets": [target_crosses_the_border, target_is_the_token_itself, padding_is_learnt],
    "loss": [mean_for_sum, z_loss_of_all_places, z_loss_not_squared],
    "images_in_context": [4, 4_096],
    "image_share": [1_024 / 1_036, 1_024 / 1_039, 1_024 / 4_096],
    "refused": [[V.bos, V.boi, V.first_code, V.eoi, V.eos], [V.size], [V.bos, V.eos, V.boi]],
    "unequal": [[Text("a red circle")], [Text("</s>")], [Image([1, 2])], ["a", "b"]],
}
