"""Trees of tokens: contexts with many continuations, of which the model reads each distinct prefix once.

    context   <s> the star is      0   1   2   3          tokens as they are read:  <s> the star is dark big and
    branches  |- dark red                      4          depth, their position:     0   1   2   3   4   4   5
              |- dark blue                     4          parents:                  -1   0   1   2   3   3   5
              '- big and red                   4 5

A tree is one sequence in which a token attends to its ancestors and to itself. The last token of a continuation is
predicted, but never read. Contexts that start with the same tokens, such as the same few shots, share their keys and
values (`shared_prefixes`). The idea is SpecInfer's tree attention (arXiv 2305.09781).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from nanochameleon.transformer import Chameleon

WORTH_SHARING = 256  # tokens that a shared prefix must save: below, its own run of the model costs more

Tokens = tuple[int, ...]


@dataclass
class Tree:
    """A context and its branches. Nodes are numbered in the order in which they are read."""

    n_context: int  # nodes of the context, which come first
    tokens: list[int]
    parents: list[int]  # of each node; -1 for the first
    paths: dict[Tokens, list[int]] = field(default_factory=dict)  # continuation -> the nodes that predict its tokens

    @staticmethod
    def grow(context: Tokens, continuations: Sequence[Tokens]) -> "Tree":
        n, children = len(context), {}
        tree = Tree(n, list(context), list(range(-1, n - 1)))
        for continuation in continuations:
            path = [n - 1]
            for token in continuation[:-1]:
                edge = path[-1], token
                if edge not in children:
                    children[edge] = len(tree.tokens)
                    tree.tokens.append(token)
                    tree.parents.append(path[-1])
                path.append(children[edge])
            tree.paths[continuation] = path[: len(continuation)]
        return tree

    def ancestors(self, size: int) -> np.ndarray:
        """(size, size) bool: which nodes each node attends to. Nodes that pad the tree attend to themselves."""
        n, seen = self.n_context, np.eye(size, dtype=bool)
        seen[:n, :n] = np.tri(n, dtype=bool)
        for node in range(n, len(self.tokens)):
            seen[node] |= seen[self.parents[node]]
        return seen


def shared_prefixes(contexts: Sequence[Tokens]) -> Iterator[tuple[int, list[Tokens]]]:
    """Group contexts -> (length of the prefix that all of a group share, group). Length 0: nothing worth sharing.

    Neighbours in sorted order belong together if they share at least half of the shorter one.
    """
    alone, group, shared = [], [], 0

    def close() -> Iterator[tuple[int, list[Tokens]]]:
        if shared * (len(group) - 1) >= WORTH_SHARING:
            yield shared, group
        else:
            alone.extend(group)

    for context in sorted(contexts):
        common = common_prefix(group[-1], context) if group else 0
        if 2 * common > min(len(context), len(group[-1]) if group else 0):
            group.append(context)
            shared = min(shared, common)
            continue
        yield from close()
        group, shared = [context], len(context) - 1
    yield from close()
    yield 0, alone


def common_prefix(a: Tokens, b: Tokens) -> int:
    """Count the first tokens that both have, without the last token of either."""
    n = min(len(a), len(b)) - 1
    return next((i for i in range(n) if a[i] != b[i]), n)


# ---------------------------------------------------------------------------------------------------------------------
# Running the model


class Prefix:
    """One layer's keys and values (1, G, P, E) of a prefix, as a cache that the model can run on.

    It takes the place of transformer.CacheView: new keys and values are seen after the prefix, and kept if `keep`.
    """

    def __init__(self, mask: Tensor, prefix: "Prefix | None" = None, keep: bool = False):
        self.mask, self.prefix, self.keep = mask, prefix, keep

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if self.keep:
            self.keys, self.values = k, v
        if self.prefix is None:
            return k, v
        before = (x.expand(len(k), -1, -1, -1) for x in (self.prefix.keys, self.prefix.values))
        return tuple(torch.cat(pair, 2) for pair in zip(before, (k, v), strict=True))


def read_prefix(model: Chameleon, tokens: Tokens) -> list[Prefix]:
    """Run the model on a prefix that several trees share."""
    device, n = model.output.weight.device, len(tokens)
    mask = torch.ones(1, n, n, dtype=torch.bool, device=device).tril()
    layers = [Prefix(mask, keep=True) for _ in model.layers]
    model(torch.tensor([tokens], device=device), cache=layers)
    return layers


def read_trees(model: Chameleon, trees: Sequence[Tree], pad: int, prefix: list[Prefix] | None) -> Tensor:
    """Run the model on trees, after a prefix that they share -> hidden states (trees, nodes, D)."""
    size, length = max(len(tree.tokens) for tree in trees), prefix[0].keys.shape[2] if prefix else 0
    seen = np.stack([tree.ancestors(size) for tree in trees])  # (B, T, T)
    tokens = np.full((len(trees), size), pad, np.int64)
    for row, tree in zip(tokens, trees, strict=True):
        row[: len(tree.tokens)] = tree.tokens
    positions = seen.sum(-1) - 1 + length
    mask = np.concatenate([np.ones((*tokens.shape, length), bool), seen], -1)  # (B, T, length + T)
    tokens, positions, mask = (torch.from_numpy(x).to(model.output.weight.device) for x in (tokens, positions, mask))
    layers = prefix or [None] * len(model.layers)
    return model(tokens, positions, cache=[Prefix(mask, layer) for layer in layers])
