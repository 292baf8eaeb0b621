"""How layers are scored, by name. Each is a class or function that makes a LayerScorer of a
Subject."""

from gradmap.methods.gradmap.selector import GradientScorer
from gradmap.methods.merging import InitialGradientScorer, SimilarityScorer, from_the_end
from gradmap.methods.repair import RepairScorer
from gradmap.methods.selection import Selector
from gradmap.methods.shortened_llama import MagnitudeScorer, taylor
from gradmap.methods.shortgpt import CompensatedInfluenceScorer, block_influence
from gradmap.methods.simple import listed, shuffled
from gradmap.methods.sleb import RemovalLossScorer
from gradmap.methods.streamline import WindowScorer

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
