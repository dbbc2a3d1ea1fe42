"""A pair of tiny models as fusion reads them: random plans, weights and rows, no files."""

import torch

from core.fusion.projections import PROJECTIONS

L, M, T, U = 2, 3, 60, 25
ATTENTION_SIZES = {"q": 6, "k": 4, "v": 4, "o": 5, "attn_in": 5, "o_in": 6}
TARGET = ATTENTION_SIZES | {"gate": 9, "up": 9, "down": 5, "mlp_in": 5, "down_in": 9}
SOURCE = {"q": 8, "k": 4, "v": 4, "o": 7, "attn_in": 7, "o_in": 8, "gate": 11, "up": 11, "down": 7, "mlp_in": 7}
SOURCE |= {"down_in": 11}


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def number(projection: str) -> int:
    """A seed for each projection."""
    return sum(map(ord, projection))


class RandomWeights:
    """Implements `core.fusion.inputs.Weights`."""

    def __init__(self, sizes, seed, biases):
        self.sizes, self.seed, self.biases = sizes, seed, biases

    def weight(self, layer, projection):
        inputs = self.sizes[PROJECTIONS[projection].input_side]
        return draw(self.sizes[projection], inputs, seed=self.seed + 7 * layer + number(projection))

    def bias(self, layer, projection):
        if projection not in self.biases:
            return None
        return draw(self.sizes[projection], seed=self.seed + 99 + layer + number(projection))


class RandomPlans:
    """Implements `core.fusion.inputs.Plans`. Its rows obey the law of real ones: the outputs of both models are their
    weights times their inputs."""

    shape = (L, M)
    unaligned_weight = 1.5

    def __init__(self, target, source):
        self.models = {"target": target, "source": source}
        self.target = target
        self.n_unaligned = U

    def layer_plan(self, projection):
        return torch.softmax(draw(L, M, seed=number(projection)), 1).double() / L

    def feature_plan(self, side, target_layer, source_layer, rows=None):
        n, m = TARGET[side], SOURCE[side]
        Q = torch.softmax(draw(n * m, seed=target_layer + 10 * source_layer + len(side)), 0).reshape(n, m)
        return Q if rows is None else Q[rows]

    def raw(self, model, side, layer, rows=T):
        """Rows as a model would give them, not centred."""
        weights = self.models[model]
        if side in PROJECTIONS:
            x = self.raw(model, PROJECTIONS[side].input_side, layer, rows)
            bias = weights.bias(layer, side)
            return x @ weights.weight(layer, side).T + (0 if bias is None else bias)
        n = weights.sizes[side]
        seed = 1000 + layer + number(side) + (500 if model == "source" else 0) + rows
        return draw(rows, n, seed=seed) @ draw(n, n, seed=n) + draw(n, seed=3)

    def unaligned(self, side, layer):
        return self.raw("target", side, layer, U)[: self.n_unaligned] - self.fit_mean(side, layer)

    def fit_mean(self, side, layer):
        return self.raw("target", side, layer)[: T - 20].mean(0)

    def rows(self, model, side, layer, part):
        rows = self.raw(model, side, layer)[: T - 20] if part == "fit" else self.raw(model, side, layer)[T - 20 :]
        return rows - rows.mean(0)

    def mean(self, model, side, layer):
        return self.raw(model, side, layer).mean(0)

    def std(self, model, side, layer):
        return self.raw(model, side, layer).std(0)

    def strongest(self, side, layer):
        return self.raw("target", side, layer).abs().mean(0).argsort(descending=True)


def random_pair(target_biases=(), source_biases=("q", "k", "v")):
    """(plans, target, source); `biases` are the projections that have one."""
    target = RandomWeights(TARGET, 0, target_biases)
    source = RandomWeights(SOURCE, 300, source_biases)
    return RandomPlans(target, source), target, source
