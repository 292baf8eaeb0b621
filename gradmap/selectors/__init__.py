"""How layers are scored, by name. Each is a class or function that makes a LayerScorer of a
Subject."""

from gradmap.selection import Selector
from gradmap.selectors.fixed import listed, shuffled
from gradmap.selectors.gradient import GradientScorer
from gradmap.selectors.influence import CompensatedInfluenceScorer, block_influence
from gradmap.selectors.merging import InitialGradientScorer, SimilarityScorer, from_the_end
from gradmap.selectors.removal_loss import RemovalLossScorer
from gradmap.selectors.repair import RepairScorer
from gradmap.selectors.weights import MagnitudeScorer, taylor
from gradmap.selectors.window import WindowScorer

SELECTORS: dict[str, Selector] = {
    "repair": RepairScorer,
    "gradient": GradientScorer,
    "block-influence": block_influence,
    "sleb": RemovalLossScorer,
    "prune-comp": CompensatedInfluenceScorer,
    "mka": SimilarityScorer,
    "mka-as-released": from_the_end,
    "gradpruner": InitialGradientScorer,
    "window": WindowScorer,
    "taylor": taylor,
    "magnitude": MagnitudeScorer,
    "random": shuffled,
    "manual": listed,
}
# Those that choose all layers at once, for one count: what they remove for fewer is no beginning of
# it.
NOT_NESTED = ("window",)
