"""How ranks can divide an operation between them: write a rule for a layer of your own, and register it here."""

from tfpar.planning.layout_search import Option
from tfpar.planning.sharding import REPLICATED, Layout
from tfpar.tensor_parallel.rank_graph import RankGraphBuilder
from tfpar.tensor_parallel.rules import Site, rule, rule_of

__all__ = ["REPLICATED", "Layout", "Option", "RankGraphBuilder", "Site", "rule", "rule_of"]
